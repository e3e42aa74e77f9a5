"""Semantic segmentation by painted instances, and its mean IoU (table 5). Pure NumPy.

Shape letters: ``H, W`` image size in pixels, ``C`` foreground classes; class map values are 0 background, 1..C classes,
255 ignore.
"""

from collections.abc import Sequence

import numpy as np

from labelpenet.instances import Instances

IGNORE = 255


def paint(instances: Instances, values: Sequence[int] | None = None) -> np.ndarray:
    """The map (H, W) uint16 of instances painted in ascending order of score; without masks all background.

    ``values`` are those of the instances, 1 and above; None for their classes, as class maps count them.
    """
    painted = np.zeros(instances.image_size, dtype=np.uint16)
    if instances.masks is None:
        return painted
    masks, values = instances.masks.cpu().numpy(), (instances.labels + 1).tolist() if values is None else values
    for index in np.argsort(instances.weights.cpu().numpy(), kind="stable"):
        painted[masks[index]] = values[index]
    return painted


def confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Pixel counts, (C + 1, C + 1) int64, by true class (rows) and predicted class (columns); 255 in truth is left out.
    `ValueError` where the (H, W) shapes differ, or a value lies outside 0..C.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"class maps must have one shape, but got {predicted.shape} and {truth.shape}")
    counted = truth != IGNORE
    true, guess = truth[counted].astype(np.int64), predicted[counted].astype(np.int64)
    if len(true) and (true.max() > classes or guess.max() > classes):
        raise ValueError(f"class map values must be 0..{classes}, but got {max(true.max(), guess.max())}")
    return np.bincount(true * (classes + 1) + guess, minlength=(classes + 1) ** 2).reshape(classes + 1, classes + 1)


def class_ious(counts: np.ndarray) -> np.ndarray:
    """IoU of background and each class, (C + 1,) float64, from `confusion`; NaN for a class without a true pixel."""
    right, true = counts.diagonal().astype(np.float64), counts.sum(1)
    union = true + counts.sum(0) - right
    return np.divide(right, union, out=np.full(len(counts), np.nan), where=true > 0)
