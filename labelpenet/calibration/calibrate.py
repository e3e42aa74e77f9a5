"""Proposal calibration (section 3.2, figure 2): from scored proposals to instances with masks, boxes and weights.

Shape letters: ``R`` proposals, ``C`` foreground classes, ``K`` instances, ``H, W`` the image, ``h, w`` the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from labelpenet.calibration.crf import DenseCRF
from labelpenet.calibration.maps import (
    background_map,
    confidence_map,
    full_precision,
    heat_map,
    normalise,
    project_maps,
)
from labelpenet.config import AttentionCalibration, Calibration
from labelpenet.instances import CompactMasks, Instances

Attend = Callable[[Tensor, Tensor], Tensor]
"""(n,) indices of proposals and (n,) their class indices to (n, a, a) attention maps >= 0 of those proposals."""

SURE = 1e-3
"""Confidences are taken to be in [SURE, 1 - SURE]: no map is ever surer than that."""

LARGEST_CANVAS = 640
"""Longer side in pixels of the canvas where the recipe names none: a camera's photograph has 24 million pixels."""


@dataclass(frozen=True)
class Trace:
    """The maps behind the instances, for reports: each (K, h, w) float32 in [0, 1]."""

    attention: Tensor
    heat: Tensor
    confidence: Tensor
    marginals: Tensor


def calibrate(
    image: np.ndarray,
    boxes: Tensor,
    scores: Tensor,
    tags: tuple[int, ...] | None,
    attend: Attend,
    settings: AttentionCalibration,
    regions: Tensor | None = None,
) -> tuple[Instances, Trace]:
    """Instances of an image from its scored proposals.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (R, 4) proposals in pixels of the image.
        scores: (R, C) class scores in [0, 1]; a proposal's class is the best one among ``tags``.
        tags: the classes that the image shows, or None where they are not known.
        attend: computes the proposals' attention maps; only asked for those that are summed into some instance.
        settings: the recipe's choices.
        regions: (R, 4) where the attention maps lie, if not in the boxes (a detector regresses its RoIs to boxes).

    Returns:
        The instances, within each class the best kept proposal first; none if there is no proposal or no tag. And the
        maps behind them.

    Raises:
        ValueError: shapes that do not fit, a tag that is no class, or NaN or infinity in scores,
            boxes, regions or attention maps.
    """
    _check(image, boxes, scores, tags, regions)
    size = (image.shape[0], image.shape[1])
    canvas, scale = working_canvas(image, settings.side)
    small = canvas.shape[:2]
    seeds, labels, member = choose_instances(boxes, scores, tags, settings)
    if not len(seeds):
        nothing = torch.zeros(0, *small, device=boxes.device)
        return Instances.empty(size, with_masks=True).to(boxes.device), Trace(nothing, nothing, nothing, nothing)
    scaled = boxes.float() * boxes.new_tensor([*scale, *scale]).float()
    areas = scaled if regions is None else regions.float() * scaled.new_tensor([*scale, *scale])
    attention = instance_attention(areas, labels, member, attend, small)
    heat = instance_heat(scaled, scores, labels, member, small, settings)
    confidence = normalise(confidence_map(attention, heat, settings.combine))
    marginals = segment(canvas, confidence, settings, attention)
    found = settle(marginals, boxes[seeds].float(), labels, scores[seeds, labels], size, settings)
    alive = distinct(found, settings.mask_nms)
    return found[alive], Trace(normalise(attention)[alive], heat[alive], confidence[alive], marginals[alive])


def _check(
    image: np.ndarray,
    boxes: Tensor,
    scores: Tensor,
    tags: tuple[int, ...] | None,
    regions: Tensor | None,
) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"image must be (H, W, 3) uint8, but got {image.shape} {image.dtype}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (R, 4), but got {tuple(boxes.shape)}")
    if scores.ndim != 2 or len(scores) != len(boxes):
        raise ValueError(f"scores must be ({len(boxes)}, C), but got {tuple(scores.shape)}")
    if regions is not None and regions.shape != boxes.shape:
        raise ValueError(f"regions must be ({len(boxes)}, 4), but got {tuple(regions.shape)}")
    if tags is not None and not all(0 <= tag < scores.shape[1] for tag in tags):
        raise ValueError(f"tags must be in [0, {scores.shape[1]}), but got {tags}")
    for name, values in (("boxes", boxes), ("scores", scores), ("regions", regions)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} must be finite, but hold NaN or infinity")


def working_canvas(image: np.ndarray, side: int | None) -> tuple[np.ndarray, tuple[float, float]]:
    """The image scaled down to a longer side of ``side`` (None: `LARGEST_CANVAS`), never up, and the factors."""
    height, width = image.shape[:2]
    side = LARGEST_CANVAS if side is None else side
    if side >= max(height, width):
        return np.ascontiguousarray(image), (1.0, 1.0)
    factor = side / max(height, width)
    small = cv2.resize(
        image, (max(1, round(width * factor)), max(1, round(height * factor))), interpolation=cv2.INTER_AREA
    )
    return small, (small.shape[1] / width, small.shape[0] / height)


def choose_instances(
    boxes: Tensor, scores: Tensor, tags: tuple[int, ...] | None, settings: AttentionCalibration
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept proposals and who belongs to them.

    Returns:
        seeds (K,) proposal indices; labels (K,) their classes; member (K, R) bool, the proposals whose attention maps
        make up each instance.
    """
    present = list(range(scores.shape[1]) if tags is None else dict.fromkeys(tags))
    if not len(boxes) or not present:
        none = torch.zeros(0, dtype=torch.long, device=boxes.device)
        return none, none, torch.zeros(0, len(boxes), dtype=torch.bool, device=boxes.device)
    columns = torch.tensor(present, device=boxes.device)
    own = columns[scores[:, columns].argmax(1)]
    score = scores.gather(1, own[:, None])[:, 0]
    seeds, labels, members = [], [], []
    for label in present:
        ours = torch.where(own == label)[0]
        if not len(ours):  # a tag that is no proposal's best class: the best proposal for it stands in
            if tags is None:
                continue
            ours = scores[:, label].argmax()[None]
        ours = ours[score[ours].argsort(descending=True, stable=True)]
        rank = scores[ours, label]
        keep = batched_nms(boxes[ours].float(), rank.float(), torch.zeros_like(ours), settings.nms)
        first = 0 if tags is None else 1
        strong = [
            index for place, index in enumerate(keep.tolist()) if place < first or rank[index] >= settings.min_score
        ]
        attended = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        attended[ours[: settings.max_attention]] = True
        # in double precision, as NMS compares: a float32 overlap of 3 / 10 exceeds 0.3 there
        suppressor = box_iou(boxes[ours].float(), boxes[ours[keep]].float()).double() > settings.nms
        group = suppressor.float().argmax(1)
        group[keep] = torch.arange(len(keep), device=keep.device)
        for place in range(min(len(strong), settings.per_class)):
            if settings.members == "class":
                member = attended.clone()
            else:
                member = torch.zeros_like(attended)
                member[ours[group == place]] = True
                member &= attended
            member[ours[keep[place]]] = True
            seeds.append(ours[keep[place]])
            labels.append(label)
            members.append(member)
    if not seeds:
        return choose_instances(boxes, scores, (), settings)
    return torch.stack(seeds), torch.tensor(labels, device=boxes.device), torch.stack(members)


def instance_attention(
    boxes: Tensor, labels: Tensor, member: Tensor, attend: Attend, canvas: tuple[int, int]
) -> Tensor:
    """Instance attention maps (K, h, w): the members' attention maps, projected into their boxes and added.

    Args:
        boxes: (R, 4) in pixels of the canvas; labels: (K,); member: (K, R) bool; attend: see `Attend`; canvas: (h, w).
    """
    instance, proposal = torch.where(member)
    # with members="class" instances of one class share their proposals: each pair is computed once
    pairs, inverse = torch.unique(torch.stack([proposal, labels[instance]], 1), dim=0, return_inverse=True)
    maps = attend(pairs[:, 0], pairs[:, 1])
    if maps.ndim != 3 or len(maps) != len(pairs):
        raise ValueError(f"attend must return ({len(pairs)}, a, a), but got {tuple(maps.shape)}")
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("attention maps must be finite, but hold NaN or infinity")
    return project_maps(maps[inverse], boxes[proposal], canvas, groups=instance, num_groups=len(labels))


def instance_heat(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    member: Tensor,
    canvas: tuple[int, int],
    settings: AttentionCalibration,
) -> Tensor:
    """Object heat-maps (K, h, w) in [0, 1]: pixel-wise sum of the class score over the proposals.

    Of all proposals where one instance a class is sought; of the instance's own members where there are several, whose
    heat would otherwise run together.
    """
    if settings.members == "class" or settings.per_class == 1:
        return normalise(heat_map(boxes, scores[:, labels], canvas))
    return normalise(heat_map(boxes, (member * scores[:, labels].T).T, canvas))


def segment(canvas: np.ndarray, confidence: Tensor, settings: Calibration, attention: Tensor | None = None) -> Tensor:
    """Foreground probabilities (K, h, w) of the instances after the dense CRF.

    Args:
        canvas: (h, w, 3) uint8.
        confidence: (K, h, w) in [0, 1].
        attention: (K, h, w) >= 0, the instance attention maps that the paper's background map is made of; the
            confidence maps if None.
    """
    p = unaries(confidence, settings, attention)
    if settings.iterations:
        crf = DenseCRF(
            torch.as_tensor(canvas).to(confidence.device),
            settings.sxy_gaussian,
            settings.compat_gaussian,
            settings.sxy_bilateral,
            settings.srgb,
            settings.compat_bilateral,
        )
        with full_precision(p.device):
            p = crf(p, settings.iterations)
    return foreground(p, settings.joint)


def unaries(confidence: Tensor, settings: Calibration, attention: Tensor | None = None) -> Tensor:
    """What the CRF starts from: probabilities of the background, the first label, and the instances.

    With a threshold t an instance of confidence c has the odds ``c / (1 - c) : t / (1 - t)`` against the background, so
    that both sides can become equally sure; alone it has the probability sigmoid(logit(c) - logit(t)). A constant
    background b against c, as one might write first, would leave the object at most 1 / (1 + b).

    Args:
        confidence: (K, h, w) in [0, 1].
        attention: as for `segment`.

    Returns:
        (1, K + 1, h, w) where the instances compete (``joint``), else (K, 2, h, w), each against the background alone.
    """
    if settings.threshold is None:
        background = background_map(confidence if attention is None else normalise(attention))
        object_ = confidence
    else:
        background = torch.ones_like(confidence[0])
        object_ = (torch.logit(confidence, SURE) - math.log(settings.threshold / (1 - settings.threshold))).exp()
    if settings.joint:
        p = torch.cat([background[None], object_])[None]
    else:
        p = torch.stack([background.expand_as(object_), object_], 1)
    return (p / p.sum(1, keepdim=True).clamp(min=1e-8)).clamp(0, 1)


def foreground(p: Tensor, joint: bool) -> Tensor:
    """The instances' probabilities (K, h, w) from those of `unaries`, before or after the CRF."""
    if not joint:
        return p[:, 1]
    # The winning label owns the pixel, whatever its absolute probability; of equals the first instance. The margin on
    # both sides keeps two instances from sharing a pixel once their maps are enlarged.
    own, margin = p[0, 1:], 1e-3
    best, winner = own.max(0)
    wins = F.one_hot(winner, len(own)).permute(2, 0, 1).bool() & (best >= p[0, 0])
    return torch.where(wins, own.clamp(min=0.5 + margin), own.clamp(max=0.5 - margin))


def settle(
    marginals: Tensor,
    proposals: Tensor,
    labels: Tensor,
    weights: Tensor,
    size: tuple[int, int],
    settings: Calibration,
) -> Instances:
    """Instances with masks and boxes at the image's size from their probabilities; none is left without a pixel.

    Args:
        marginals: (K, h, w) in [0, 1]; proposals: (K, 4) the kept proposals in pixels of the image; labels: (K,);
        weights: (K,); size: (H, W).
    """
    masks = grow_crops(marginals, size)
    parts = [largest_parts(torch.from_numpy(crop), settings.min_component).numpy() for crop in masks.crops]
    corners = list(masks.corners)
    for index in [place for place, part in enumerate(parts) if not part.size]:
        parts[index], corners[index] = box_mask(proposals[index], size).cpu().numpy(), (0, 0)  # its proposal stands in
    masks = CompactMasks.of(size, parts, corners)
    boxes = masks.boxes().to(proposals.device)
    if settings.box == "proposal":
        clipped = clip_boxes_to_image(proposals, size)
        inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
        boxes = torch.where(inside[:, None], clipped, boxes)
    return Instances(boxes, labels, weights.clamp(0, 1), size, masks)


def grow_masks(probabilities: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) probabilities as (K, H, W) bool masks: resized bilinearly, then cut at one half."""
    if probabilities.shape[-2:] != size:
        probabilities = F.interpolate(probabilities[None], size=size, mode="bilinear", align_corners=False)[0]
    return probabilities > 0.5


def grow_crops(probabilities: Tensor, size: tuple[int, int]) -> CompactMasks:
    """What `grow_masks` gives, pixel for pixel, with one mask at a time at the image's size."""
    at_least = (probabilities >= 0.5).flatten(1).any(1).tolist()
    parts = [
        grow_masks(one[None], size)[0].cpu().numpy() if possible else np.zeros((0, 0), bool)
        for one, possible in zip(probabilities, at_least, strict=True)
    ]
    return CompactMasks.of(size, parts)


def largest_parts(mask: Tensor, fraction: float | None) -> Tensor:
    """The (H, W) bool mask without components smaller than ``fraction`` of its largest one."""
    if fraction is None or not mask.numel():
        return mask
    count, components, stats, _ = cv2.connectedComponentsWithStats(mask.cpu().numpy().astype(np.uint8))
    if count <= 2:
        return mask
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = np.concatenate([[False], areas >= fraction * areas.max()])
    return torch.from_numpy(kept[components]).to(mask.device)


def box_mask(box: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) bool, True in the pixels that the box (4,) touches, at least one."""
    mask = torch.zeros(size, dtype=torch.bool, device=box.device)
    x1, y1 = int(box[0].floor().clamp(0, size[1] - 1)), int(box[1].floor().clamp(0, size[0] - 1))
    x2, y2 = max(x1 + 1, int(box[2].ceil())), max(y1 + 1, int(box[3].ceil()))
    mask[y1:y2, x1:x2] = True
    return mask


def distinct(found: Instances, duplicate: float | None) -> Tensor:
    """Indices (K',) of the instances that are no duplicate of a better one of their class, in order."""
    masks = found.compact_masks
    if duplicate is None or len(found) < 2 or masks is None:
        return torch.arange(len(found), device=found.boxes.device)
    areas, labels = masks.areas(), found.labels.tolist()
    alive: list[int] = []
    for index in found.weights.argsort(descending=True, stable=True).tolist():
        same = [other for other in alive if labels[other] == labels[index]]
        shared = [masks.overlap(index, other) for other in same]
        unions = [areas[index] + areas[other] - both for other, both in zip(same, shared, strict=True)]
        if not any(
            np.float32(both) / np.float32(max(union, 1)) > np.float32(duplicate)
            for both, union in zip(shared, unions, strict=True)
        ):
            alive.append(index)
    return torch.tensor(sorted(alive), device=found.boxes.device)
