"""From scored boxes to instances with masks, boxes and weights (section 3.2, figure 2): one chain for modules 1 to 4.

A module scores boxes (`Candidates`), `choose_instances` tells which of them become instances and whose maps make up
each one, the module computes those maps (attention maps in modules 1 and 2, masks in 3 and 4), and `calibrate` does the
rest: confidence maps, dense CRF, masks, boxes. What is chosen is chosen on the CPU and what is computed for pixels on
the device of the maps, so that the host waits for a device a few times an image, however many boxes there are.

Shape letters: ``M`` candidates, ``C`` foreground classes, ``K`` instances, ``n`` candidates with a map, ``a`` side of a
map, ``H, W`` the image, ``h, w`` the canvas.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from labelpenet.calibration.crf import DenseCRF
from labelpenet.calibration.maps import (
    background_map,
    confidence_map,
    full_precision,
    heat_map,
    normalise,
    project_maps,
)
from labelpenet.calibration.nms import confident, mask_nms, nms_groups, rank_within_class, score_masks
from labelpenet.config import AttentionCalibration, Calibration, MaskCalibration
from labelpenet.instances import CompactMasks, Instances

SURE = 1e-3
"""Confidences are taken to be in [SURE, 1 - SURE]: no map is ever surer than that."""

LARGEST_CANVAS = 640
"""Longer side in pixels of the canvas where the recipe names none: a camera's photograph has 24 million pixels."""

_STRIPE = 64  # columns that are resized at a time


@dataclass(frozen=True)
class Candidates:
    """The scored boxes of an image, on the CPU.

    Attributes:
        boxes: (M, 4) in pixels of the image.
        scores: (M,) in [0, 1].
        labels: (M,) class index from 0.
        regions: (M, 4) where their maps lie, in pixels of the image; a detector regresses its RoIs to boxes.
        rois: (M,) index of the proposal or RoI that each came from.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    regions: Tensor
    rois: Tensor


@dataclass(frozen=True)
class Chosen:
    """Which candidates become instances, on the CPU.

    Attributes:
        kept: (K,) indices of candidates.
        member: (K, M) bool, whose maps make up each instance.
    """

    kept: Tensor
    member: Tensor

    @property
    def mapped(self) -> Tensor:
        """(n,) indices of the candidates whose maps are wanted, ascending."""
        return torch.where(self.member.any(0))[0]


@dataclass(frozen=True)
class Trace:
    """The maps behind the instances, for reports: each (K, h, w) float32 in [0, 1], attention and heat 0 if unused."""

    attention: Tensor
    heat: Tensor
    confidence: Tensor
    marginals: Tensor


def proposal_candidates(boxes: Tensor, scores: Tensor, classes: tuple[int, ...]) -> Candidates:
    """The proposals of an image as candidates, each for the class that fits it best.

    Args:
        boxes: (R, 4) in pixels of the image.
        scores: (R, C) class scores in [0, 1], on the CPU.
        classes: the classes that are sought. One that is no proposal's best class gets the best proposal for it as a
            further candidate.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.ndim != 2 or len(scores) != len(boxes):
        raise ValueError(
            f"boxes must be (R, 4) and scores (R, C), but got {tuple(boxes.shape)} and {tuple(scores.shape)}"
        )
    if not all(0 <= label < scores.shape[1] for label in classes):
        raise ValueError(f"classes must be in [0, {scores.shape[1]}), but got {classes}")
    present = torch.tensor(sorted(set(classes)), dtype=torch.long)
    if not len(boxes) or not len(present):
        none = torch.zeros(0, dtype=torch.long)
        return Candidates(boxes[:0].float(), scores.new_zeros(0), none, boxes[:0].float(), none)
    labels = present[scores[:, present].argmax(1)]
    lost = present[~torch.isin(present, labels)]
    rows = torch.cat([torch.arange(len(boxes)), scores[:, lost].argmax(0)])
    labels = torch.cat([labels, lost])
    order = (rows * scores.shape[1] + labels).argsort()
    rows, labels = rows[order], labels[order]
    return Candidates(boxes[rows].float(), scores[rows, labels], labels, boxes[rows].float(), rows)


def choose_instances(found: Candidates, settings: Calibration, each_class: bool) -> Chosen:
    """The candidates that NMS keeps and that are good enough, and who belongs to them.

    Args:
        found: M candidates.
        each_class: whether the best of each class is kept whatever its score.
    """
    keep, leader = nms_groups(found.boxes, found.scores, found.labels, settings.nms)
    if isinstance(settings, AttentionCalibration):  # one class after the other
        keep = keep[found.labels[keep].argsort(stable=True)]
    place = rank_within_class(found.labels[keep])
    strong = found.scores[keep] >= settings.min_score
    if each_class:
        strong |= place == 0
    kept = keep[strong & (place < settings.per_class)]
    if isinstance(settings, AttentionCalibration) and settings.members == "class":
        member = found.labels[None] == found.labels[kept][:, None]
    else:
        member = leader[None] == kept[:, None]
    member &= _with_a_map(found, member, settings)
    member[torch.arange(len(kept)), kept] = True
    return Chosen(kept, member)


def _with_a_map(found: Candidates, member: Tensor, settings: Calibration) -> Tensor:
    """(M,) bool: the best so many, of each class by attention, of all that belong to an instance by masks."""
    order = found.scores.argsort(descending=True, stable=True)
    allowed = torch.zeros(len(order), dtype=torch.bool)
    if isinstance(settings, AttentionCalibration):
        allowed[order] = rank_within_class(found.labels[order]) < settings.max_attention
    elif isinstance(settings, MaskCalibration):
        allowed[order] = member.any(0)[order].cumsum(0) <= settings.max_masks
    return allowed


def calibrate(
    image: np.ndarray,
    found: Candidates,
    chosen: Chosen,
    maps: Tensor,
    settings: Calibration,
    heat: tuple[Tensor, Tensor] | None = None,
    offset: float = 0.0,
) -> tuple[Instances, Trace]:
    """The chosen instances of an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        found: M candidates.
        chosen: which of them become instances.
        maps: (n, a, a) >= 0 of the candidates ``chosen.mapped``: attention maps (`config.AttentionCalibration`) or mask
            probabilities (`config.MaskCalibration`), on the device that is to compute.
        heat: boxes (R, 4) and class scores (R, C) that make the heat-maps of a class that has one instance; the
            candidates' own if None.
        offset: of attention maps, see `project_maps`.

    Returns:
        K instances on the CPU, within each class the best first, and the maps behind them; with ``settings.vote``
        without `select_instances`, which is to follow the vote.

    Raises:
        ValueError: shapes that do not fit, or NaN or infinity in scores, boxes or maps.
    """
    _check(image, found, chosen, maps)
    size = (image.shape[0], image.shape[1])
    canvas, scale = working_canvas(image, settings.side)
    small = (canvas.shape[0], canvas.shape[1])
    if not len(chosen.kept):
        nothing = torch.zeros(0, *small, device=maps.device)
        return Instances.empty(size, with_masks=True), Trace(nothing, nothing, nothing, nothing)
    kept, factor = chosen.kept, torch.tensor([*scale, *scale])
    if isinstance(settings, AttentionCalibration):
        attention = project_members(maps, found, chosen, factor, small, offset=offset)
        warmth = instance_heat(found, chosen, heat, factor, small, settings, maps.device)
        confidence = normalise(confidence_map(attention, warmth, settings.combine))
        background: Tensor | None = attention
    else:
        confidence = mean_of_members(maps, found, chosen, factor, small)
        attention = warmth = torch.zeros_like(confidence)
        background = None
    against = rivals(found.labels[kept], found.scores[kept], settings)
    marginals = segment(canvas, confidence, settings, background, against)
    instances = to_instances(
        marginals.cpu(), found.boxes[kept].float(), found.labels[kept], found.scores[kept], size, settings
    )
    trace = Trace(normalise(attention), warmth, confidence, marginals)
    return (instances, trace) if settings.vote else select_instances(instances, trace, settings)


def select_instances(found: Instances, trace: Trace, settings: Calibration) -> tuple[Instances, Trace]:
    """Those of K instances, on the CPU, that neither double a better one nor are too doubtful beside it; their maps.

    With ``settings.rescore`` their weights, in [0, 1], are those of `score_masks`, and none is left whose mask has no
    pixel, but those that were doubtful (of weight 0) before.
    """
    seen = torch.ones(len(found), dtype=torch.bool)
    if settings.rescore is not None and len(found):
        doubtful, found = found.weights == 0, _rescored(found, trace.marginals, settings.rescore)
        seen = doubtful | (found.weights > 0)
    alive = mask_nms(found, settings.mask_nms)
    alive = alive[seen[alive]]
    alive = alive[confident(found[alive], settings.keep, settings.nested)]
    if len(alive) == len(found):
        return found, trace
    index = alive.to(trace.confidence.device)
    return found[alive], Trace(*(one[index] for one in vars(trace).values()))


def _rescored(found: Instances, marginals: Tensor, decay: float) -> Instances:
    """K instances on the CPU, weighted anew by their probabilities (K, h, w); see `score_masks`."""
    device = marginals.device
    with full_precision(device):
        scores, order = score_masks(found.weights.to(device), found.labels.to(device), marginals.float(), decay)
        weights = torch.empty_like(scores).index_copy_(0, order, scores)
    return found.weighted(weights.cpu())


def _check(image: np.ndarray, found: Candidates, chosen: Chosen, maps: Tensor) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"image must be (H, W, 3) uint8, but got {image.shape} {image.dtype}")
    for name, values in (("boxes", found.boxes), ("scores", found.scores), ("regions", found.regions)):
        expected = (len(found.labels),) if name == "scores" else (len(found.labels), 4)
        if values.shape != expected:
            raise ValueError(f"{name} must be {expected}, but got {tuple(values.shape)}")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} must be finite, but hold NaN or infinity")
    if maps.ndim != 3 or len(maps) != len(chosen.mapped):
        raise ValueError(f"maps must be ({len(chosen.mapped)}, a, a), but got {tuple(maps.shape)}")
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("maps must be finite, but hold NaN or infinity")


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


# -- confidence maps ---------------------------------------------------------------------------------------------------


def project_members(
    maps: Tensor,
    found: Candidates,
    chosen: Chosen,
    factor: Tensor,
    canvas: tuple[int, int],
    weights: Tensor | None = None,
    offset: float = 0.0,
) -> Tensor:
    """Instance maps (K, h, w): the members' maps, projected into their regions and added.

    Args:
        maps: (n, a, a) of the candidates ``chosen.mapped``.
        found: M candidates.
        chosen: K instances.
        factor: (4,) from pixels of the image to those of the canvas.
        canvas: (h, w).
        weights: (M,) factors of the maps; 1 if None.
        offset: see `project_maps`.
    """
    instance, candidate = torch.where(chosen.member)
    position = torch.zeros(len(found.boxes), dtype=torch.long)
    position[chosen.mapped] = torch.arange(len(maps))
    regions = (found.regions.float() * factor)[candidate]
    device = maps.device
    own = None if weights is None else weights[candidate].to(device)
    index = position[candidate].to(device)
    groups = instance.to(device)
    return project_maps(maps[index], regions.to(device), canvas, own, groups, len(chosen.kept), offset)


def instance_heat(
    found: Candidates,
    chosen: Chosen,
    heat: tuple[Tensor, Tensor] | None,
    factor: Tensor,
    canvas: tuple[int, int],
    settings: AttentionCalibration,
    device: torch.device,
) -> Tensor:
    """Object heat-maps (K, h, w) in [0, 1]: pixel-wise sum of the class score over the boxes.

    Of all boxes where one instance a class is sought; of the instance's own members where there are several, whose heat
    would otherwise run together. Arguments as for `project_members` and `calibrate`.
    """
    labels = found.labels[chosen.kept]
    boxes, scores = found.boxes, (found.labels[:, None] == labels[None]) * found.scores[:, None]
    if settings.members != "class" and settings.per_class > 1:
        scores = chosen.member.T * scores
    elif heat is not None:
        boxes, scores = heat[0], heat[1][:, labels]
    return normalise(heat_map((boxes.float() * factor).to(device), scores.to(device), canvas))


def mean_of_members(maps: Tensor, found: Candidates, chosen: Chosen, factor: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Confidence maps (K, h, w): the members' masks in the image, a mean weighted by score."""
    summed = project_members(maps, found, chosen, factor, canvas, found.scores)
    instance, candidate = torch.where(chosen.member)
    total = torch.zeros(len(chosen.kept)).index_add_(0, instance, found.scores[candidate]).to(maps.device)
    return (summed / total.clamp(min=1e-6)[:, None, None]).clamp(0, 1)


# -- the CRF -----------------------------------------------------------------------------------------------------------


def rivals(labels: Tensor, scores: Tensor, settings: Calibration) -> Tensor | None:
    """How much each of K instances is held against each other one, (K, K) in [0, 1]; None where none is.

    Of labels and scores (K,). One of another class counts as far as its score reaches the instance's own: a doubtful
    one takes no pixels.
    """
    if settings.compete != "classes":
        return None
    scores = scores.float()
    return (labels[:, None] != labels[None]) * (scores[None] / scores[:, None].clamp(min=1e-6)).clamp(max=1)


def segment(
    canvas: np.ndarray,
    confidence: Tensor,
    settings: Calibration,
    attention: Tensor | None = None,
    against: Tensor | None = None,
) -> Tensor:
    """Foreground probabilities (K, h, w) of the instances after the dense CRF.

    Args:
        canvas: (h, w, 3) uint8.
        confidence: (K, h, w) in [0, 1].
        attention: (K, h, w) >= 0, the instance attention maps that the paper's background map is made of; the
            confidence maps if None.
        against: (K, K) of `rivals`; nobody's if None.
    """
    p = unaries(confidence, settings, attention, against)
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
    return foreground(p, settings.compete == "instances")


def unaries(
    confidence: Tensor, settings: Calibration, attention: Tensor | None = None, against: Tensor | None = None
) -> Tensor:
    """What the CRF starts from: probabilities of the background, the first label, and the instances.

    With a threshold t an instance of confidence c has the odds ``c / (1 - c) : t / (1 - t)`` against the background, so
    that both sides can become equally sure; alone it has the probability sigmoid(logit(c) - logit(t)). A constant
    background b against c, as one might write first, would leave the object at most 1 / (1 + b).

    Args:
        confidence: (K, h, w) in [0, 1].
        attention, against: as for `segment`. Where a rival has better odds than the background, it takes its place:
            the instance keeps the pixels in which it is the surer of the two.

    Returns:
        (1, K + 1, h, w) where all instances compete, else (K, 2, h, w), each against the background and its rivals.
    """
    if settings.threshold is None:
        maps = confidence if attention is None else normalise(attention)
        # of one that stands alone the sum is its own: others would leave it no background, however doubtful it is
        background = background_map(maps) if settings.compete == "instances" else (1 - maps).clamp(min=0)
        object_ = confidence
    else:
        background = torch.ones_like(confidence[0])
        object_ = (torch.logit(confidence, SURE) - math.log(settings.threshold / (1 - settings.threshold))).exp()
    if settings.compete == "instances":
        p = torch.cat([background[None], object_])[None]
    elif against is None:
        p = torch.stack([background.expand_as(object_), object_], 1)
    else:  # one row after the other: (K, K, h, w) would be too much for a crowd
        best = torch.stack([(row[:, None, None] * object_).amax(0) for row in against.to(object_.device)])
        p = torch.stack([torch.maximum(background, best), object_], 1)
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


# -- masks and boxes -------------------------------------------------------------------------------------------------


def to_instances(
    marginals: Tensor,
    proposals: Tensor,
    labels: Tensor,
    weights: Tensor,
    size: tuple[int, int],
    settings: Calibration,
) -> Instances:
    """Instances with masks and boxes at the image's size from their probabilities; none is left without a pixel.

    Args:
        marginals: (K, h, w) in [0, 1], on the CPU.
        proposals: (K, 4) the kept boxes in pixels of the image.
        labels: (K,) class index from 0.
        weights: (K,).
        size: (H, W).
    """
    drawn = [_draw(one, size, settings.min_component) for one in marginals]
    empty = [index for index, mask in enumerate(drawn) if not mask.crops[0].size]
    for index in empty:  # its proposal stands in
        drawn[index] = CompactMasks.of(size, [box_mask(proposals[index], size).numpy()])
    if settings.empty == "doubtful":
        weights = weights.index_fill(0, torch.tensor(empty, dtype=torch.long), 0.0)
    masks = CompactMasks(size, tuple(mask.crops[0] for mask in drawn), tuple(mask.corners[0] for mask in drawn))
    boxes = masks.boxes()
    if settings.box != "mask":
        clipped = clip_boxes_to_image(proposals, size)
        inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
        wanted = clipped if settings.box == "proposal" else enclosing_boxes(clipped, boxes)
        boxes = torch.where(inside[:, None], wanted, boxes)
    return Instances(boxes, labels, weights.clamp(0, 1), size, masks)


def enclosing_boxes(boxes: Tensor, others: Tensor) -> Tensor:
    """The smallest boxes (N, 4) that enclose each pair of boxes (N, 4), in the same pixels."""
    return torch.cat([torch.minimum(boxes[:, :2], others[:, :2]), torch.maximum(boxes[:, 2:], others[:, 2:])], 1)


def resize_masks(probabilities: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) probabilities as (K, H, W) bool masks: resized bilinearly as ``F.interpolate`` does, cut at a half."""
    whole = [slice(0, length) for length in size]
    masks = [_resized(one, size, *whole) for one in probabilities]
    return torch.stack(masks) if masks else torch.zeros((0, *size), dtype=torch.bool, device=probabilities.device)


def _resized(probabilities: Tensor, size: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """Those rows and columns of one of `resize_masks`; what they are does not depend on where they are cut out."""
    height, width = probabilities.shape
    high = _between(probabilities, _places(height, size[0], rows, probabilities.device)).T.contiguous()
    lower, upper, share = _places(width, size[1], columns, probabilities.device)
    # turned over, some columns at a time: all of them, as floats, would not fit a processor's cache
    parts = zip(lower.split(_STRIPE), upper.split(_STRIPE), share.split(_STRIPE), strict=True)
    return torch.cat([_between(high, part) > 0.5 for part in parts]).T


def _places(cells: int, drawn: int, pixels: slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Between which two of a side's cells the ``pixels`` of a side of ``drawn`` lie, and the second one's share."""
    at = (torch.arange(pixels.start, pixels.stop, dtype=torch.float64) + 0.5) * (cells / drawn) - 0.5
    at = at.clamp(0, cells - 1)
    lower = at.long()
    share = (at - lower).float()
    return lower.to(device), (lower + 1).clamp(max=cells - 1).to(device), share.to(device)


def _between(maps: Tensor, places: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(n, K) rows between those of maps (m, K)."""
    # by `maps.interpolation` every pixel would cost a side's cells, and be rounded as the crop's size has it
    lower, upper, share = places
    low = maps.index_select(0, lower)
    return maps.index_select(0, upper).sub_(low).mul_(share[:, None]).add_(low)


def _reach(sure: Tensor, drawn: int) -> slice:
    """The pixels of a side of ``drawn`` that any of its cells (n,) bool has a say in, of which one is True at least."""
    cells, scale = torch.where(sure)[0], drawn / len(sure)
    first, last = math.floor((int(cells[0]) - 0.5) * scale), math.ceil((int(cells[-1]) + 1.5) * scale)
    return slice(max(0, first), min(drawn, last))


def _draw(probabilities: Tensor, size: tuple[int, int], fraction: float | None) -> CompactMasks:
    """One instance's (h, w) probabilities as `resize_masks` and `drop_components` make them a mask, kept as a crop: a
    camera's photograph has room for few masks at its size, and an object mostly fills a small part of it.
    """
    sure = probabilities >= 0.5
    if not bool(sure.any()):
        return CompactMasks.of(size, [np.zeros((0, 0), bool)])
    rows, columns = (_reach(sure.any(axis), length) for axis, length in zip((1, 0), size, strict=True))
    drawn = _resized(probabilities, size, rows, columns)
    whole = CompactMasks.of(size, [drawn.numpy()], [(columns.start, rows.start)])
    if fraction is None:
        return whole
    return CompactMasks.of(size, [drop_components(torch.from_numpy(whole.crops[0]), fraction).numpy()], whole.corners)


def drop_components(mask: Tensor, fraction: float | None) -> Tensor:
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
