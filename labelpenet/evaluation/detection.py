"""Detection as the VOC development kit measures it: average precision and CorLoc. Pure NumPy.

In the kit a detection is compared only with the true object of its class that it overlaps most, whether or not that
object is already taken. So one number and one index a detection (`Matches`) hold all that average precision needs, for
every threshold.

Shape letters: ``D`` detections, ``T`` true objects, ``I`` images, ``C`` classes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from labelpenet.evaluation.records import Record

Interpolation = Literal["voc07", "voc12"]


@dataclass(frozen=True)
class Matches:
    """The detections of all images, each with the true object of its class that it overlaps most.

    Attributes:
        scores, labels: (D,) float64 and int64.
        iou: (D,) float64 in [0, 1], overlap with that object; 0 where the image has no object of the class.
        truth: (D,) int64, index of that object among all T; -1 where the image has none of the class.
        truth_labels: (T,) int64.
        ignored: (T,) bool, objects that neither count nor penalise (difficult, crowd).
    """

    scores: np.ndarray
    labels: np.ndarray
    iou: np.ndarray
    truth: np.ndarray
    truth_labels: np.ndarray
    ignored: np.ndarray


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of (D, 4) and (T, 4) half-open boxes ``x1, y1, x2, y2``: (D, T) float64 in [0, 1], 0 for an empty box."""
    boxes, others = boxes[:, None].astype(np.float64), others[None].astype(np.float64)
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    overlap = sides.clip(min=0).prod(-1)
    areas = [(part[..., 2:] - part[..., :2]).clip(min=0).prod(-1) for part in (boxes, others)]
    union = areas[0] + areas[1] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def match_boxes(records: Iterable[Record]) -> Matches:
    """Matches the boxes of every image."""
    return match(records, lambda item: box_iou(item.boxes, item.truth_boxes))


def match(records: Iterable[Record], overlap: Callable[[Record], np.ndarray]) -> Matches:
    """Matches the detections of every image by ``overlap(record)``, a (D, T) array of IoU.

    Of several true objects with the same largest IoU the first counts, as in the kit.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    offset = 0
    for item in records:
        iou, truth = best_overlaps(overlap(item), item.labels, item.truth_labels)
        truth = np.where(truth >= 0, truth + offset, -1)
        parts.append((item.scores, item.labels, iou, truth, item.truth_labels, item.difficult | item.crowd))
        offset += len(item.truth_labels)
    empty = (np.zeros(0), np.zeros(0, int), np.zeros(0), np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool))
    return Matches(*(np.concatenate(column) for column in zip(empty, *parts, strict=True)))


def best_overlaps(iou: np.ndarray, labels: np.ndarray, truth_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each detection the largest IoU with an object of its class, (D,) float64, and that object, (D,) int64.

    They are 0 and -1 where there is no object of the class. Takes ``iou`` (D, T), and class indices (D,) and (T,).
    """
    if not iou.size:
        return np.zeros(len(labels)), np.full(len(labels), -1)
    iou = np.where(labels[:, None] == truth_labels[None], iou, -1.0)
    index = iou.argmax(1)
    best = iou[np.arange(len(labels)), index]
    return np.maximum(best, 0.0), np.where(best >= 0, index, -1)


def match_detections(
    scores: np.ndarray, iou: np.ndarray, truth: np.ndarray, ignored: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Judges the detections of one class in descending order of score; equal scores keep their order.

    A detection is right if its IoU with its object reaches ``threshold`` and no earlier one took that object; it is
    neither right nor wrong if that object is ignored; otherwise it is wrong.

    Args:
        scores, iou, truth: (D,) as in `Matches`, of one class.
        ignored: (T,) bool, over all objects that ``truth`` points to.

    Returns:
        right and wrong, (D,) bool each, in descending order of score.
    """
    order = np.argsort(-scores, kind="stable")
    truth = truth[order]
    reached = (iou[order] >= threshold) & (truth >= 0)
    neither = reached.copy()
    neither[reached] = ignored[truth[reached]]
    candidates = np.flatnonzero(reached & ~neither)
    _, first = np.unique(truth[candidates], return_index=True)
    right = np.zeros(len(order), dtype=bool)
    right[candidates[first]] = True
    return right, ~right & ~neither


def precision_recall(right: np.ndarray, wrong: np.ndarray, positives: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each detection that counts, float64 in [0, 1], in descending order of score.

    Takes (D,) ``right`` and ``wrong`` from `match_detections`, and the number of objects that count, at least 1.
    """
    counted = right | wrong
    found = np.cumsum(right[counted])
    return found / np.arange(1, len(found) + 1), found / positives


def average_precision(precision: np.ndarray, recall: np.ndarray, interpolation: Interpolation = "voc12") -> float:
    """Average precision of a curve from `precision_recall`, in [0, 1]; 0 for an empty curve.

    ``voc07`` is the mean over the recalls 0, 0.1 .. 1 of the best precision at that recall or beyond; ``voc12`` the
    area under the precision made monotonic.
    """
    if not len(recall):
        return 0.0
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if interpolation == "voc07":
        # k * 0.1 in floating point, as the kit counts 0:0.1:1: a recall of exactly 3/10, 6/10 or 7/10 misses its point.
        position = np.searchsorted(recall, np.arange(11) * 0.1, side="left")
        return float(np.append(best, 0.0)[position].mean())
    return float(np.sum(np.diff(recall, prepend=0.0) * best))


def class_average_precisions(
    matches: Matches, classes: int, threshold: float = 0.5, interpolation: Interpolation = "voc12"
) -> np.ndarray:
    """Average precision of each class, (C,) float64 in [0, 1]; NaN for a class without an object that counts."""
    values = np.full(classes, np.nan)
    positives = np.bincount(matches.truth_labels[~matches.ignored], minlength=classes)
    for label in np.flatnonzero(positives):
        mine = matches.labels == label
        right, wrong = match_detections(
            matches.scores[mine], matches.iou[mine], matches.truth[mine], matches.ignored, threshold
        )
        precision, recall = precision_recall(right, wrong, int(positives[label]))
        values[label] = average_precision(precision, recall, interpolation)
    return values


def corloc(records: Iterable[Record], classes: int) -> np.ndarray:
    """CorLoc of each class, (C,) float64 in [0, 1]; NaN for a class that no image contains.

    Of the images that contain the class (difficult objects included; a crowd region is no object), the fraction whose
    highest-scoring box of the class has IoU >= 0.5 with an object of it. Of several boxes with the highest
    score the first counts; an image without a box of the class counts as a miss.
    """
    images, hits = np.zeros(classes), np.zeros(classes)
    for item in records:
        objects = ~item.crowd
        for label in np.unique(item.truth_labels[objects]):
            images[label] += 1
            mine = np.flatnonzero(item.labels == label)
            if len(mine):
                top = mine[item.scores[mine].argmax()]
                truths = item.truth_boxes[objects & (item.truth_labels == label)]
                hits[label] += bool((box_iou(item.boxes[top : top + 1], truths) >= 0.5).any())
    return np.divide(hits, images, out=np.full(classes, np.nan), where=images > 0)


def classification_ap(scores: np.ndarray | Sequence, labels: np.ndarray | Sequence) -> np.ndarray:
    """Average precision of multi-label image classification by class: area under the monotonic curve.

    Args:
        scores: (I, C), any range; equal scores keep the order of the images.
        labels: (I, C) bool or 0/1, whether the image shows the class.

    Returns:
        (C,) float64 in [0, 1]; NaN for a class that no image shows.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must both be (I, C), but got {scores.shape} and {labels.shape}")
    values = np.full(scores.shape[1], np.nan)
    for column in np.flatnonzero(labels.any(0)):
        right = labels[np.argsort(-scores[:, column], kind="stable"), column]
        values[column] = average_precision(*precision_recall(right, ~right, int(right.sum())))
    return values
