"""One door to all formats, for the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.errors import InputError
from labelpenet.formats.coco import export_coco
from labelpenet.formats.label_studio import export_label_studio
from labelpenet.formats.selection import Exported
from labelpenet.formats.voc import export_voc
from labelpenet.formats.voc_submission import export_voc_submission
from labelpenet.formats.yolo import export_yolo
from labelpenet.instances import Instances

Format = Literal["coco", "coco-polygons", "voc", "yolo", "label-studio", "voc-submission"]


def export(
    predictions: Mapping[str, Instances],
    images: TaggedImages | Sequence[TaggedImage],
    classes: Sequence[str],
    out: Path | str,
    to: Format,
    *,
    min_score: float = 0.0,
    copy_images: bool = False,
) -> Exported:
    """Writes predictions as annotation that other tools read.

    Args:
        predictions: by image id; read once, so the mapping may be lazy.
        images: the photographs.
        classes: names of the C classes, in label order.
        out: the folder; nothing is written outside it, whatever images and classes are called.
        to: ``coco`` (masks as RLE), ``coco-polygons`` (also for CVAT), ``voc``, ``yolo``, ``label-studio`` or
            ``voc-submission`` (which takes every score).
        min_score: instances below are left out; not for ``voc-submission``.
        copy_images: copies the photographs beside the annotation; for ``voc`` and ``yolo``.

    Returns:
        The files written, and notes on what the format could not hold.

    Raises:
        InputError: the format is unknown or cannot take an option; a file cannot be written.
    """
    photographs = images.images if isinstance(images, TaggedImages) else images
    if copy_images and to not in ("voc", "yolo"):
        raise InputError(f"{to} holds no photographs; copying is for voc and yolo")
    if to == "coco" or to == "coco-polygons":
        polygons = to == "coco-polygons"
        return export_coco(predictions, photographs, classes, out, polygons=polygons, min_score=min_score)
    if to == "voc":
        return export_voc(predictions, photographs, classes, out, copy_images=copy_images, min_score=min_score)
    if to == "yolo":
        return export_yolo(predictions, photographs, classes, out, copy_images=copy_images, min_score=min_score)
    if to == "label-studio":
        return export_label_studio(predictions, photographs, classes, out, min_score=min_score)
    if to == "voc-submission":
        if min_score:
            raise InputError("a submission takes every score; leave the minimum away")
        return export_voc_submission(predictions, photographs, classes, out)
    raise InputError(f"unknown format {to}; valid are {', '.join(Format.__args__)}")  # type: ignore[attr-defined]
