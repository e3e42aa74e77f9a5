"""COCO's average precision, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from labelpenet.evaluation.records import Record, RunLengths

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
    truths, found = [], []
    for i, item in enumerate(records):
        ignored = (item.difficult | item.crowd).astype(int).tolist()
        truths += _rows(i, item.truth_boxes, item.truth_labels, item.truth_masks, kind, iscrowd=ignored)
        # Found objects fall into an area by what is measured, true ones by their mask if they have one: as pycocotools
        masks = item.masks if kind == "segm" else None
        if kind == "bbox" or masks is not None:
            found += _rows(i, item.boxes, item.labels, masks, kind, score=item.scores.tolist())
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


def _rows(
    image: int, boxes: np.ndarray, labels: np.ndarray, masks: RunLengths | None, kind: str, **more: list[Any]
) -> list[dict[str, Any]]:
    """Objects as COCO's rows, with ``more`` columns; their areas are those of their masks, if they have any."""
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = rle.area(masks).tolist() if masks else sides.prod(1).tolist()
    columns = {"category_id": labels.tolist(), "bbox": np.hstack([boxes[:, :2], sides]).tolist(), "area": areas, **more}
    if kind == "segm":
        columns["segmentation"] = masks or []
    rows = zip(*columns.values(), strict=True)
    return [{"image_id": image, "iscrowd": 0, **dict(zip(columns, row, strict=True))} for row in rows]


def _coco(images: list[dict], categories: list[dict], rows: list[dict]) -> COCO:
    for i, row in enumerate(rows):
        row["id"] = i + 1  # pycocotools reads id 0 as "unmatched"
    data = COCO()
    data.dataset = {"images": images, "categories": categories, "annotations": rows}
    data.createIndex()
    return data
