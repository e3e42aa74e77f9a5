"""Class-wise non-maximum suppression, of boxes with a memory of who suppressed whom, and of masks.

Shape letters: ``M`` boxes, ``K`` kept ones, ``N`` instances.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou, nms

from labelpenet.instances import Instances


def nms_groups(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Class-wise greedy NMS that also tells which kept box suppressed each box.

    Args:
        boxes: (M, 4) on the CPU.
        scores: (M,).
        labels: (M,).
        threshold: boxes of a class with a larger IoU suppress one another.

    Returns:
        keep: (K,) indices of the kept boxes, by descending score; leader: (M,) index of the kept box that suppressed
        each one, its own for a kept box.
    """
    if not len(boxes):
        return labels.new_zeros(0), labels.new_zeros(0)
    boxes, scores = boxes.float(), scores.float()
    keeps, leader = [], torch.empty(len(boxes), dtype=torch.long)
    # Class by class: batched_nms shifts the classes apart, which rounds the corners and so moves overlaps across the
    # threshold; in double precision, as NMS itself compares, for the same reason.
    for label in labels.unique():
        own = torch.where(labels == label)[0]
        keep = own[nms(boxes[own], scores[own], threshold)]
        suppresses = box_iou(boxes[own], boxes[keep]).double() > threshold
        # the first that holds is the best scored: the one greedy NMS meets first
        leader[own] = keep[suppresses.float().argmax(1)]
        leader[keep] = keep
        keeps.append(keep)
    keep = torch.cat(keeps)
    return keep[scores[keep].argsort(descending=True, stable=True)], leader


def rank_within_class(labels: Tensor) -> Tensor:
    """For boxes (M,), best first, the number of better ones of the same class."""
    same = labels[:, None] == labels[None]
    return torch.tril(same, diagonal=-1).sum(1)


def mask_nms(found: Instances, threshold: float | None) -> Tensor:
    """Class-wise greedy NMS of masks.

    Args:
        found: N instances with masks, on the CPU.
        threshold: masks of a class with a larger IoU suppress one another; None keeps all.

    Returns:
        (K,) indices of the kept instances, in order.
    """
    masks = found.compact_masks
    if threshold is None or len(found) < 2 or masks is None:
        return torch.arange(len(found))
    areas, labels = masks.areas(), found.labels.tolist()
    kept: list[int] = []
    for index in found.weights.argsort(descending=True, stable=True).tolist():
        same = [other for other in kept if labels[other] == labels[index]]
        shared = [masks.overlap(index, other) for other in same]
        unions = [areas[index] + areas[other] - both for other, both in zip(same, shared, strict=True)]
        if not any(
            np.float32(both) / np.float32(max(union, 1)) > np.float32(threshold)
            for both, union in zip(shared, unions, strict=True)
        ):
            kept.append(index)
    return torch.tensor(sorted(kept))


def score_masks(scores: Tensor, labels: Tensor, masks: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Scores of class and mask for those of the class alone.

    A class score does not know how well the mask fits, and where the CRF leaves many pixels in doubt the mask is often
    wrong: it is multiplied by the square of the mean probability of the mask's pixels, those above one half (as the
    mask's own score of SOLO; Wang et al., 2020). Boxes that NMS has kept apart may have grown to the same mask, so
    scores decay by `matrix_nms`. Not in the paper. Not for autocast, which would round areas in pixels.

    Args:
        scores: (N,) in [0, 1].
        labels: (N,) class indices.
        masks: (N, h, w) probabilities of object; the score of an instance without a pixel above one half becomes 0.
        decay: of `matrix_nms`.

    Returns:
        Scores (N,) in [0, 1], best first, and the index (N,) of the instance that each belongs to.
    """
    masks = masks.flatten(1)
    inside = (masks > 0.5).float()
    mean = (masks * inside).sum(1) / inside.sum(1).clamp(min=1)
    scores, order = (scores * mean**2).sort(descending=True)
    scores, again = (scores * matrix_nms(inside[order], labels[order], decay)).sort(descending=True)
    return scores, order[again]


def matrix_nms(masks: Tensor, labels: Tensor, decay: float) -> Tensor:
    """Matrix NMS (SOLOv2; Wang et al., 2020), Gaussian: no mask goes, but what lies on a better one decays.

    The factor of mask j is ``min_i exp(-decay (IoU_ij^2 - IoU_i^2))`` over the better masks i of its class, at most 1,
    where ``IoU_i`` is the largest IoU of i with one that is better still.

    Args:
        masks: (N, P) float, 0 or 1 for each of P pixels, best first.
        labels: (N,) class indices.
        decay: >= 0; 0 leaves all factors 1.

    Returns:
        (N,) factors of the scores, in (0, 1].
    """
    both, area = masks @ masks.T, masks.sum(1)
    overlap = both / (area[:, None] + area - both).clamp(min=1) * (labels[:, None] == labels)
    overlap = torch.cat([0 * area[None], overlap.triu(1)])  # by none, and by those before it
    own = torch.cat([area.new_zeros(1), overlap.amax(0)])  # one that decays itself makes others decay less
    return (-decay * (overlap**2 - own[:, None] ** 2).amax(0)).exp()


def confident(found: Instances, keep: float, nested: float | None) -> Tensor:
    """Which instances are about as sure as the best one of their class, and none inside a better one.

    Args:
        found: N instances, weights in [0, 1].
        keep: fraction of the best weight of the class that an instance needs; the best one itself has it.
        nested: an instance of whose box this fraction lies inside a better one of its class fails; None for none.

    Returns:
        (N,) bool.
    """
    weights, order = found.weights, torch.arange(len(found))
    same = found.labels[:, None] == found.labels[None]
    best = torch.where(same, weights[None], 0).amax(1) if len(found) else weights
    sure = weights >= keep * best
    if nested is None:
        return sure
    # the earlier one of two that are equally sure counts as the better one
    first = (weights[None] == weights[:, None]) & (order < order[:, None])
    better = same & ((weights[None] > weights[:, None]) | first)
    return sure & ~(better & (inside(found.boxes, found.boxes) >= nested)).any(1)


def inside(boxes: Tensor, others: Tensor) -> Tensor:
    """(R, M) the part of each box's area (R, 4) that lies inside each other one (M, 4)."""
    corners = torch.minimum(boxes[:, None, 2:], others[:, 2:]) - torch.maximum(boxes[:, None, :2], others[:, :2])
    return corners.clamp(min=0).prod(2) / box_area(boxes).clamp(min=1e-6)[:, None]
