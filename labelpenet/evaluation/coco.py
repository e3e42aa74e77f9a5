"""COCO's average precision, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from labelpenet.evaluation.records import Record

THRESHOLDS = np.array([0.25, *np.linspace(0.5, 0.95, 10)])
_AREAS = ("all", "small", "medium", "large")


def coco_average_precisions(records: Sequence[Record], classes: int, kind: Literal["bbox", "segm"]) -> np.ndarray:
    """COCO's average precision (101 recalls, at most 100 detections an image and class) of boxes or masks.

    A crowd region absorbs detections without counting, and so does a *difficult* object, which COCO does not know. The
    area of an object is that of its mask, or of its box where there is no mask. Masks are measured in the images that
    have mask annotation.

    Returns:
        (11, C, 4) float64 in [0, 1]: IoU 0.25 and 0.5, 0.55 .. 0.95; classes; objects of every, small, medium and large
        area. NaN where there is no object.
    """
    if kind == "segm":
        records = [item for item in records if item.truth_masks is not None]
    images = [{"id": i, "height": 0, "width": 0} for i in range(len(records))]  # the run lengths carry their size
    categories = [{"id": i} for i in range(classes)]
    truths = [row for i, item in enumerate(records) for row in _truth_rows(i, item, kind)]
    found = [row for i, item in enumerate(records) for row in _found_rows(i, item, kind)]
    with contextlib.redirect_stdout(io.StringIO()):
        measured = COCOeval(_coco(images, categories, truths), _coco(images, categories, found), kind)
        measured.params.iouThrs = THRESHOLDS
        measured.evaluate()
        measured.accumulate()
    precision = measured.eval["precision"][..., -1]  # (thresholds, recalls, classes, areas) at 100 detections
    return np.where((precision > -1).any(1), precision.mean(1), np.nan)


def average(precisions: np.ndarray, area: str = "all", threshold: float | None = None) -> np.ndarray:
    """By class, (C,) float64, the mean over IoU 0.5 .. 0.95 (``threshold`` None) or the value at one threshold."""
    values = precisions[..., _AREAS.index(area)]
    if threshold is None:
        return values[1:].mean(0)
    return values[int(np.flatnonzero(np.isclose(THRESHOLDS, threshold))[0])]


def _truth_rows(image: int, item: Record, kind: str) -> list[dict[str, Any]]:
    rows = _rows(image, item.truth_boxes, item.truth_labels, item.truth_masks, kind)
    for row, ignored in zip(rows, item.difficult | item.crowd, strict=True):
        row["iscrowd"] = int(ignored)
    return rows


def _found_rows(image: int, item: Record, kind: str) -> list[dict[str, Any]]:
    if kind == "segm" and item.masks is None:
        return []
    # Found objects fall into an area by what is measured, true ones by their mask if they have one (as pycocotools).
    rows = _rows(image, item.boxes, item.labels, item.masks if kind == "segm" else None, kind)
    for row, score in zip(rows, item.scores.tolist(), strict=True):
        row["score"] = score
    return rows


def _rows(
    image: int, boxes: np.ndarray, labels: np.ndarray, masks: list[dict[str, Any]] | None, kind: str
) -> list[dict[str, Any]]:
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = rle.area(masks).tolist() if masks else sides.prod(1).tolist()
    rows: list[dict[str, Any]] = [
        {"image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": 0}
        for box, label, area in zip(np.hstack([boxes[:, :2], sides]).tolist(), labels.tolist(), areas, strict=True)
    ]
    if kind == "segm":
        for row, mask in zip(rows, masks or [], strict=True):
            row["segmentation"] = mask
    return rows


def _coco(images: list[dict], categories: list[dict], rows: list[dict]) -> COCO:
    for i, row in enumerate(rows):
        row["id"] = i + 1  # pycocotools reads id 0 as "unmatched"
    data = COCO()
    data.dataset = {"images": images, "categories": categories, "annotations": rows}
    data.createIndex()
    return data
