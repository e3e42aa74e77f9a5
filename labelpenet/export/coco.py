"""COCO annotations, as pycocotools, CVAT, FiftyOne, Roboflow and detectron2 read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from labelpenet.data.dataset import TaggedImage
from labelpenet.errors import InputError
from labelpenet.export.files import Exported, write_text
from labelpenet.export.polygons import coco_polygons
from labelpenet.export.predictions import file_name, image_numbers
from labelpenet.export.selection import mask_arrays, selected
from labelpenet.instances import Instances


def export_coco(
    predictions: Mapping[str, Instances],
    images: Sequence[TaggedImage],
    classes: Sequence[str],
    out: Path | str,
    *,
    category_ids: Sequence[int] | None = None,
    polygons: bool = False,
    min_score: float = 0.0,
) -> Exported:
    """Writes ``out/annotations.json``: images, categories and annotations with unique ids.

    CVAT takes the file as "COCO 1.0" (with ``polygons``, as it reads RLE as crowd masks), and so does everything else
    that reads COCO's instance annotation. Every annotation has ``score`` beside COCO's keys. Polygons run along pixel
    borders and are rasterised to the same mask; a mask with holes becomes one polygon with bridges of no width.

    Args:
        predictions: by image id.
        images: the photographs; those without a prediction are not listed.
        classes: names of the C classes, in label order.
        out: the folder.
        category_ids: (C,) ids of the categories; None for 1..C.
        polygons: segmentations as polygons instead of RLE.
        min_score: instances below are left out.

    Raises:
        InputError: the file cannot be written, or a score or box is not finite.
    """
    done = Exported()
    numbers = image_numbers(images)
    ids = list(range(1, len(classes) + 1) if category_ids is None else category_ids)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, found in selected(predictions, images, min_score, done.notes):
        height, width = found.image_size
        number = numbers[image.id]
        entries.append({"id": number, "file_name": file_name(image), "width": width, "height": height})
        for row, mask in zip(found.to_coco(number, ids), mask_arrays(found), strict=True):
            area = row["bbox"][2] * row["bbox"][3] if mask is None else int(mask.sum())
            if polygons and mask is not None:
                row["segmentation"] = coco_polygons(mask)
            elif mask is None:
                row["segmentation"] = []
            annotations.append({"id": len(annotations) + 1, **row, "area": area, "iscrowd": 0})
    categories = [{"id": i, "name": name, "supercategory": ""} for i, name in zip(ids, classes, strict=True)]
    content = {
        "info": {"description": "pseudo-labels by Label-PEnet"},
        "licenses": [],
        "images": entries,
        "categories": categories,
        "annotations": annotations,
    }
    path = Path(out) / "annotations.json"
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{path}: a score or box is NaN or infinite; remove it from the predictions") from error
    done.paths.append(write_text(path, text))
    return done
