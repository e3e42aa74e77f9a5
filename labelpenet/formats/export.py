"""Writes any format, for the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

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

Format = Literal["coco", "coco-polygons", "coco-results", "voc", "yolo", "labelme", "label-studio", "voc-submission"]
_POLYGONS = ("coco-polygons", "yolo", "labelme", "label-studio")
_COPIES = ("coco", "coco-polygons", "voc", "yolo", "labelme")


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
    if copy_images and to not in _COPIES:
        raise InputError(f"{to} holds no photographs; copying is for {', '.join(_COPIES)}")
    if tolerance and to not in _POLYGONS:
        raise InputError(f"{to} holds no polygons; a tolerance is for {', '.join(_POLYGONS)}")
    if not 0 <= tolerance < 1000:
        raise InputError(f"a tolerance is a number of pixels from 0 on, but got {tolerance}")
    if to == "voc-submission":
        if min_score:
            raise InputError("a submission takes every score; leave the minimum away")
        return export_voc_submission(predictions, photographs, classes, out, overwrite=overwrite)
    common: dict[str, Any] = {"min_score": min_score, "overwrite": overwrite}
    args = (predictions, photographs, classes, out)
    if to == "coco" or to == "coco-polygons":
        polygons = to == "coco-polygons"
        common |= {"copy_images": copy_images, "tolerance": tolerance}
        return export_coco(*args, category_ids=category_ids, polygons=polygons, **common)
    if to == "coco-results":
        return export_coco_results(*args, category_ids=category_ids, **common)
    if to == "voc":
        return export_voc(*args, split=split, copy_images=copy_images, **common)
    if to == "yolo":
        return export_yolo(*args, split=split, copy_images=copy_images, tolerance=tolerance, **common)
    if to == "labelme":
        return export_labelme(*args, copy_images=copy_images, tolerance=tolerance, **common)
    if to == "label-studio":
        return export_label_studio(*args, tolerance=tolerance, **common)
    raise InputError(f"unknown format {to}; valid are {', '.join(Format.__args__)}")  # type: ignore[attr-defined]
