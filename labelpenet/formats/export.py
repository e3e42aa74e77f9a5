"""Writes any format, for the command line."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from labelpenet.config import Format
from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.errors import InputError
from labelpenet.formats.coco import export_coco, export_coco_results
from labelpenet.formats.label_studio import export_label_studio
from labelpenet.formats.labelme import export_labelme
from labelpenet.formats.selection import Exported
from labelpenet.formats.voc import export_voc
from labelpenet.formats.voc_submission import export_voc_submission
from labelpenet.formats.yolo import export_yolo
from labelpenet.instances import Instances

_WRITERS: dict[str, tuple[Callable[..., Exported], set[str]]] = {  # what writes each format, and what it can do
    "coco": (export_coco, {"copy_images"}),
    "coco-polygons": (partial(export_coco, polygons=True), {"copy_images", "tolerance"}),
    "coco-results": (export_coco_results, set()),
    "voc": (export_voc, {"copy_images"}),
    "yolo": (export_yolo, {"copy_images", "tolerance"}),
    "labelme": (export_labelme, {"copy_images", "tolerance"}),
    "label-studio": (export_label_studio, {"tolerance"}),
    "voc-submission": (export_voc_submission, set()),
}


def export(
    predictions: Mapping[str, Instances],
    images: TaggedImages | Sequence[TaggedImage],
    classes: Sequence[str],
    out: Path | str,
    to: Format,
    *,
    category_ids: Sequence[int] | None = None,
    split: str = "train",
    min_score: float = 0.0,
    copy_images: bool = False,
    tolerance: float = 0.0,
    overwrite: bool = False,
) -> Exported:
    """Writes predictions as annotation that other tools read.

    Args:
        predictions: by image id; read once, so the mapping may be lazy.
        images: the photographs; those without a prediction are left out.
        classes: names of the C classes, in label order.
        out: the folder; nothing is written outside it, whatever images and classes are called, and nothing that was
            there before is written over.
        to: ``coco`` (masks as RLE), ``coco-polygons`` (also for CVAT), ``coco-results`` (the bare list), ``voc``,
            ``yolo``, ``labelme`` (also for X-AnyLabeling), ``label-studio`` or ``voc-submission`` (which takes every
            score).
        category_ids: for COCO: the C ids of the classes; None for 1..C.
        split: for VOC and YOLO: the name of the list or sub-folders; a folder may hold several.
        min_score: instances below are left out; not for ``voc-submission``.
        copy_images: copies the photographs beside the annotation; not for ``coco-results`` and ``label-studio``.
        tolerance: pixels by which polygons may differ from the masks, for fewer corners; IoU stays above .97.
        overwrite: replaces an earlier export that nobody has changed.

    Returns:
        The files written, and notes on what the format could not hold.

    Raises:
        InputError: the format is unknown or cannot take an option; ``out`` is taken; a file cannot be written.
    """
    photographs = images.images if isinstance(images, TaggedImages) else images
    if to not in _WRITERS:
        raise InputError(f"unknown format {to}; valid are {', '.join(_WRITERS)}")
    write, takes = _WRITERS[to]
    if copy_images and "copy_images" not in takes:
        raise InputError(f"{to} holds no photographs; copying is for {_taking('copy_images')}")
    if tolerance and "tolerance" not in takes:
        raise InputError(f"{to} holds no polygons; a tolerance is for {_taking('tolerance')}")
    if not 0 <= tolerance < 1000:
        raise InputError(f"a tolerance is a number of pixels from 0 on, but got {tolerance}")
    if min_score and to == "voc-submission":
        raise InputError("a submission takes every score; leave the minimum away")
    options = {"category_ids": category_ids, "split": split, "min_score": min_score, "copy_images": copy_images}
    return write(predictions, photographs, classes, out, overwrite, tolerance=tolerance, **options)


def _taking(option: str) -> str:
    return ", ".join(name for name, (_, takes) in _WRITERS.items() if option in takes)
