"""All measures of a set of predictions in one dictionary, ready for JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from labelpenet.data.dataset import Truth
from labelpenet.data.files import listing
from labelpenet.errors import InputError
from labelpenet.evaluation.coco import average, coco_average_precisions
from labelpenet.evaluation.detection import class_average_precisions, corloc, match_boxes
from labelpenet.evaluation.masks import average_best_overlap, match_masks
from labelpenet.evaluation.records import Record, pairs, record
from labelpenet.evaluation.semantic import class_ious, confusion, paint
from labelpenet.instances import Instances

Protocol = Literal["voc07", "voc12", "coco"]
MASK_THRESHOLDS = (0.25, 0.5, 0.75)


def evaluate(
    predictions: Mapping[str, Instances],
    truths: Mapping[str, Truth] | Iterable[tuple[str, Truth]],
    classes: Sequence[str],
    protocol: Protocol = "voc12",
) -> dict[str, Any]:
    """Measures predictions against the truth.

    Args:
        predictions: for each image id what was found; an image that is missing has no detection. Predictions for
            other images than those of ``truths`` are not looked at.
        truths: for each image id what is there, as a mapping or as pairs. Both are read once, image by image, so they
            may be lazy.
        classes: names of the C classes, in label order.
        protocol: ``voc07`` (AP at 11 recalls), ``voc12`` (AP as area) or ``coco`` (AP by pycocotools).

    Returns:
        Fractions in [0, 1], by part. A part whose ground truth is missing is absent, a class without ground truth is
        absent from ``per_class`` and left out of the mean. ``mask`` and ``semantic`` are measured over the images that
        have that annotation, and are absent too if predictions hold boxes only; where those of some images do, the
        objects of these count as missed, and the boxes are no false masks.

        - ``box``: ``mAP`` (mean of ``per_class``; at IoU 0.5, for ``coco`` averaged over 0.5 .. 0.95), ``CorLoc``
          (mean of ``CorLoc_per_class``); for ``coco`` also ``AP50, AP75, AP_small, AP_medium, AP_large``.
        - ``mask``: ``mAP@0.25, mAP@0.5, mAP@0.75`` (means of ``per_class@0.25``, ``per_class`` and ``per_class@0.75``;
          by area, for ``coco`` by pycocotools), ``ABO`` (mean of ``ABO_per_class``); for ``coco`` also ``AP`` (mean of
          ``AP_per_class``, over 0.5 .. 0.95) and ``AP_small, AP_medium, AP_large``.
        - ``semantic``: ``mIoU`` (mean of ``per_class``, which has ``background`` too, as ``no class`` where
          a class is called so).

    Raises:
        InputError: predictions and truths have no image in common; a prediction of another size than its image; a class
            index, score or box that is out of range.
    """
    if protocol not in get_args(Protocol):
        raise InputError(f"unknown protocol {protocol}; valid are {', '.join(get_args(Protocol))}")
    records: list[Record] = []
    counts = np.zeros((len(classes) + 1, len(classes) + 1), dtype=np.int64)
    found = masks_found = False
    for prediction, truth in pairs(predictions, truths, len(classes)):
        records.append(record(prediction, truth, every_mask=protocol == "coco"))
        found |= len(prediction) > 0
        masks_found |= len(prediction) > 0 and prediction.masks is not None
        if truth.semantic is not None:
            counts += confusion(paint(prediction), truth.semantic, len(classes))
    boxes_only = found and not masks_found
    result: dict[str, Any] = {}
    if any((~item.crowd).any() for item in records):
        result["box"] = _boxes(records, classes, protocol)
    if not boxes_only and any(item.truth_masks for item in records):
        result["mask"] = _masks(records, classes, protocol)
    if not boxes_only and counts.any():
        none = "no class" if "background" in classes else "background"
        result["semantic"] = _figures(class_ious(counts), [none, *classes], "mIoU", "per_class")
    return result


def uncounted(result: Mapping[str, Any], classes: Sequence[str]) -> tuple[str, ...]:
    """A note on the classes of which `evaluate` found no object that counts; none where all have some."""
    names = [name for name in classes if name not in result.get("box", {}).get("per_class", {})]
    return (f"no object of {listing(names)} counts here: no figure of it, no part in the means",) if names else ()


def _boxes(records: Sequence[Record], classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
    located = _figures(corloc(records, len(classes)), classes, "CorLoc", "CorLoc_per_class")
    if protocol != "coco":
        values = class_average_precisions(match_boxes(records), len(classes), 0.5, protocol)
        return _figures(values, classes, "mAP", "per_class") | located
    precisions = coco_average_precisions(records, len(classes), "bbox")
    result = _figures(average(precisions), classes, "mAP", "per_class") | located
    for key, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        result[key] = _mean(_by_name(average(precisions, threshold=threshold), classes))
    return result | _by_area(precisions, classes)


def _masks(records: Sequence[Record], classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if protocol == "coco":
        precisions = coco_average_precisions(records, len(classes), "segm")
        by_threshold = [average(precisions, threshold=threshold) for threshold in MASK_THRESHOLDS]
        result = _figures(average(precisions), classes, "AP", "AP_per_class") | _by_area(precisions, classes)
    else:
        matches = match_masks(item if item.masks is not None else _nothing_found(item) for item in records)
        by_threshold = [class_average_precisions(matches, len(classes), threshold) for threshold in MASK_THRESHOLDS]
    for threshold, values in zip(MASK_THRESHOLDS, by_threshold, strict=True):
        key = "per_class" if threshold == 0.5 else f"per_class@{threshold}"
        result |= _figures(values, classes, f"mAP@{threshold}", key)
    return result | _figures(average_best_overlap(records, len(classes)), classes, "ABO", "ABO_per_class")


def _nothing_found(item: Record) -> Record:
    """Boxes that were found without masks are no false masks, by pycocotools neither."""
    return replace(item, boxes=item.boxes[:0], labels=item.labels[:0], scores=item.scores[:0])


def _by_area(precisions: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    means = {size: _by_name(average(precisions, size), classes) for size in ("small", "medium", "large")}
    return {f"AP_{size}": _mean(per_class) for size, per_class in means.items() if per_class}


def _figures(values: np.ndarray, names: Sequence[str], mean: str, by_class: str) -> dict[str, Any]:
    """The figures of the classes that have one, and their mean, under two keys."""
    per_class = _by_name(values, names)
    return {mean: _mean(per_class), by_class: per_class}


def _by_name(values: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True) if np.isfinite(value)}


def _mean(per_class: Mapping[str, float]) -> float:
    # No class that counts (difficult objects alone, say): nothing was there to find and nothing was found.
    return float(np.mean(list(per_class.values()))) if per_class else 0.0
