"""Instance segmentation: mask average precision AP^r and average best overlap (table 6). Pure NumPy.

Both are measured only over the images that have mask annotation. The overlap is the plain IoU of two masks; pixels
marked 255 in the annotation belong to no object and are not excluded.

Shape letters: ``D`` detections, ``T`` true objects, ``C`` classes.
"""

from collections.abc import Iterable

import numpy as np
from pycocotools import mask as rle

from labelpenet.evaluation.detection import Matches, match
from labelpenet.evaluation.records import Record, RunLengths


def mask_iou(masks: RunLengths, others: RunLengths) -> np.ndarray:
    """IoU of D and T run lengths: (D, T) float64 in [0, 1], 0 for an empty mask."""
    if not masks or not others:
        return np.zeros((len(masks), len(others)))
    return np.asarray(rle.iou(masks, others, [0] * len(others)))


def match_masks(records: Iterable[Record]) -> Matches:
    """Matches the masks of every image that has mask annotation; a detection without a mask overlaps nothing."""
    return match((item for item in records if item.truth_masks is not None), _overlap)


def average_best_overlap(records: Iterable[Record], classes: int) -> np.ndarray:
    """ABO of each class, (C,) float64 in [0, 1]; NaN for a class without a true mask.

    Each object's best IoU with a predicted mask of its class in its image (0 if there is none), whatever the score,
    averaged over the objects of the class, difficult ones included; a crowd region is no object. The ABO of a data set
    is the mean over classes.
    """
    count, total = np.zeros(classes), np.zeros(classes)
    for item in records:
        if item.truth_masks is None:
            continue
        objects = np.flatnonzero(~item.crowd)
        labels = item.truth_labels[objects]
        iou = np.where(item.labels[:, None] == labels[None], _overlap(item)[:, objects], 0.0)
        np.add.at(count, labels, 1)
        np.add.at(total, labels, iou.max(0, initial=0.0))
    return np.divide(total, count, out=np.full(classes, np.nan), where=count > 0)


def _overlap(item: Record) -> np.ndarray:
    """(D, T) IoU; only pairs of the same class are computed, the others are 0."""
    iou = np.zeros((len(item.labels), len(item.truth_labels)))
    if item.masks is None or item.truth_masks is None:
        return iou
    for label in np.intersect1d(item.labels, item.truth_labels):
        rows, columns = np.flatnonzero(item.labels == label), np.flatnonzero(item.truth_labels == label)
        iou[np.ix_(rows, columns)] = mask_iou([item.masks[i] for i in rows], [item.truth_masks[i] for i in columns])
    return iou
