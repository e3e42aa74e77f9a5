"""Thresholds that a module finds by itself, one for each class: where its masks end on edges and hold still. Not in the
paper, whose background map knows no threshold.

How far confidence reaches beyond an object differs from module to module, with the length of the training and from
class to class: what is true of all of a cat's pixels is half true of its cushion. At a good threshold the mask's border
lies where the photograph changes, and a little more or less changes the mask but little. Neither needs an annotation.

Shape letters: ``K`` instances, ``T`` thresholds, ``C`` classes, ``h, w`` the canvas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import Tensor

from labelpenet.calibration.calibrate import drop_components, segment
from labelpenet.config import Calibration

CHOICES = tuple(round(0.3 + 0.05 * step, 2) for step in range(9))
"""The thresholds that are compared, T of them."""

START = 0.4
"""A class's threshold before any has been found."""

_REACH = 2  # steps to either side over which a mask is to hold still
_GRID = tuple(round(CHOICES[0] + 0.05 * step, 2) for step in range(-_REACH, len(CHOICES) + _REACH))
_STRONG_EDGE = 6.0  # times the median gradient: an edge stronger than that counts no more
_OTHERS = 20.0  # instances of its own at which a class hears itself as much as all classes together


def judge(canvas: np.ndarray, confidence: Tensor, settings: Calibration) -> Tensor:
    """How well each threshold fits each instance, (K, T) in (0, 1], the best of an instance 1.

    It is the product of the mean gradient along the mask's border (Lab, Sobel, in units of the photograph's median) and
    the IoU of the masks at 0.1 less and 0.1 more, all after the dense CRF.

    Args:
        canvas: (h, w, 3) uint8 RGB.
        confidence: (K, h, w) in [0, 1].
        settings: of the dense CRF and of what is dropped from its masks.
    """
    count, height, width = confidence.shape
    if not count:
        return torch.zeros(0, len(CHOICES))
    wanted = torch.tensor(_GRID, device=confidence.device).repeat(count)
    alone = replace(settings, joint=False, threshold="auto")
    repeated = confidence.repeat_interleave(len(_GRID), 0)
    masks = (segment(canvas, repeated, alone, None, wanted) > 0.5).cpu()
    kept = [drop_components(mask, settings.min_component).numpy() for mask in masks]
    of_instance = np.stack(kept).reshape(count, len(_GRID), height, width)
    gradient = _gradient(canvas)
    fits = torch.zeros(count, len(CHOICES))
    for row, own in zip(fits, of_instance, strict=True):
        for index in range(len(CHOICES)):
            loose, mask, tight = own[index], own[index + _REACH], own[index + 2 * _REACH]
            still = (loose & tight).sum() / max(1, (loose | tight).sum())
            row[index] = float(still) * _along_border(mask, gradient)
    return fits.clamp(min=1e-6) / fits.clamp(min=1e-6).amax(1, keepdim=True)


def choose_thresholds(fits: Iterable[tuple[int, Tensor]], num_classes: int) -> Tensor:
    """The threshold of each class, (C,) float32: that which fits its instances best in the mean.

    A class with few instances listens to those of all classes, too; without any instance it is `START`.

    Args:
        fits: class index and (T,) as from `judge` of each instance.
        num_classes: C.
    """
    total, counts = torch.zeros(num_classes, len(CHOICES)), torch.zeros(num_classes)
    for label, fit in fits:
        total[label] += fit
        counts[label] += 1
    if not counts.sum():
        return torch.full((num_classes,), START)
    together = total.sum(0) / counts.sum()
    mean = (total + _OTHERS * together) / (counts + _OTHERS)[:, None]
    return torch.tensor(CHOICES)[mean.argmax(1)]


def _gradient(canvas: np.ndarray) -> np.ndarray:
    """(h, w) float32, the length of the gradient of the smoothed photograph in units of its median, up to a cap."""
    lab = cv2.GaussianBlur(cv2.cvtColor(canvas, cv2.COLOR_RGB2LAB).astype(np.float32), (0, 0), 1.0)
    across, down = cv2.Sobel(lab, cv2.CV_32F, 1, 0), cv2.Sobel(lab, cv2.CV_32F, 0, 1)
    length = np.sqrt((across**2 + down**2).sum(2))
    return np.minimum(length / (np.median(length) + 3), _STRONG_EDGE)  # 3: a flat photograph has no edges, only noise


def _along_border(mask: np.ndarray, gradient: np.ndarray) -> float:
    """The mean gradient on the pixels to both sides of a mask's border; the photograph's own border is none."""
    cross = np.ones((3, 3), np.uint8)
    filled = mask.astype(np.uint8)
    border = cv2.dilate(filled, cross) > cv2.erode(filled, cross)
    return float(gradient[border].mean()) if border.any() else 0.0
