"""Masks of RoIs drawn on the photograph and drawn to its edges: a dense CRF on a coarse grid, exact, in few products.

A mask head gives a RoI 28 x 28 probabilities, whose border is as blurred as the labels that taught it were uncertain.
The dense CRF of section 3.2 moves it to where the colours change. Here the photograph becomes a grid of some 2,000
cells, on which every pair can be compared outright: one matrix for all instances, without a lattice. So the same
operations run on a CPU, on a GPU without waiting, and in an ONNX file, and a kernel may have any number of dimensions:
besides their colours, cells are compared by the network's own features. Finer than the grid only what the CRF changed
is interpolated, so a small mask keeps its shape; and a pixel follows those cells around it whose colours are like its
own, so an edge need not lie between cells.

Shape letters: ``N`` instances, ``S`` side of a mask, ``H, W`` the image, ``h, w`` the canvas, ``P`` cells of the grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from labelpenet.calibration.calibrate import SURE
from labelpenet.calibration.maps import interpolation
from labelpenet.calibration.nms import score_masks
from labelpenet.config import Sharpening

CANVAS = 2**15
"""Pixels of the canvas, about so many, and more where the grid's cells are so many that each would have less than 4 x 4
of them."""

RESOLVED = 16
"""Cells along the shorter side of a box from which on its object may grow beyond it as far as the settings say."""

ALIKE = 20.0
"""Standard deviation, in grey levels of 0..255, of the colours of cells that a finer pixel follows."""

DECAY = 2.0
"""Of `score_masks`: of two masks with an IoU of .7 the worse one's score decays to .38 of it."""

NOTHING = -60.0
"""Logarithm of a weight that counts for nothing; smaller ones would be denormal, with which processors are slow."""


def sharpen(
    image: Tensor,
    masks: Tensor,
    boxes: Tensor,
    settings: Sharpening,
    features: Tensor | None = None,
    stride: float = 1.0,
    evidence: Tensor | None = None,
) -> Tensor:
    """The masks on a canvas of the image's shape, as probabilities: an object's pixels are those above one half.

    Not for autocast: the products need all bits of float32 (`maps.full_precision`).

    Args:
        image: (3, H, W) RGB in [0, 1].
        masks: (N, S, S) probabilities inside the boxes.
        boxes: (N, 4) in pixels of the image.
        settings: every choice; without iterations the masks are drawn as they are, in their boxes, cut at the
            threshold.
        features: (K, h', w') a map of the network, of any scale, that covers the image or more, from its upper left
            corner on; None leaves the CRF's third kernel out.
        stride: of that map, in pixels of the image.
        evidence: (N, h', w') log-odds on the same map's cells that these show the instance's class (`models.pixels`),
            of which the CRF's unaries get ``settings.evidence`` times as much, inside the boxes alone where they are
            positive: beyond may stand another one of the class; None for none.

    Returns:
        (N, h, w) in [0, 1], some `CANVAS` pixels.
    """
    height, width = image.shape[-2:]
    rows, columns = grid_size(height, width, settings.cells)
    steps = pixels_per_cell(settings.cells)
    canvas = (rows * steps, columns * steps)
    scale = torch.tensor([canvas[1] / width, canvas[0] / height] * 2, device=boxes.device)
    drawn = draw(*_beyond(masks.float(), boxes * scale, settings), canvas)
    doubt = math.log(settings.threshold / (1 - settings.threshold))
    odds = torch.logit(drawn, SURE) - doubt
    if not settings.iterations:
        return odds.sigmoid()
    fine = area_means(image.float(), (height, width), canvas)
    colours = F.avg_pool2d(fine, steps)
    if features is not None:
        features = area_means(features.float(), (height / stride, width / stride), (rows, columns))
    unary = torch.logit(F.avg_pool2d(drawn[:, None], steps)[:, 0], SURE) - doubt
    believed = unary
    if evidence is not None:
        looks = area_means(evidence.float(), (height / stride, width / stride), (rows, columns))
        inside = draw(torch.ones_like(masks).float(), boxes * scale, canvas)
        inside = F.avg_pool2d(inside[:, None], steps)[:, 0]
        believed = unary + settings.evidence * torch.where(looks > 0, looks * inside, looks)
    change = mean_field(colours, believed, settings, features) - unary
    return (odds + joint_bilateral_upsampling(change, colours, fine)).sigmoid()


def rescore(scores: Tensor, labels: Tensor, masks: Tensor, settings: Sharpening) -> tuple[Tensor, Tensor]:
    """Scores of class and mask (`nms.score_masks`, `DECAY`); without iterations of the CRF those of the class alone.

    Args:
        scores: (N,) in [0, 1].
        labels: (N,) class indices.
        masks: (N, h, w) in [0, 1] as `sharpen` gives them; a score of an empty one becomes 0.

    Returns:
        Scores (N,) in [0, 1], best first, and the index (N,) of the instance that each belongs to.
    """
    if not settings.iterations:
        return scores.sort(descending=True)
    return score_masks(scores, labels, masks, DECAY)


def _beyond(masks: Tensor, boxes: Tensor, settings: Sharpening) -> tuple[Tensor, Tensor]:
    """Masks (N, S, S) and boxes (N, 4), in pixels of the canvas, with the margin of which the mask head says nothing.

    An object of a few cells would swell by one of them, so the less of them its box has, the less it may grow.
    """
    side = masks.shape[-1]
    margin = round(settings.margin * side) if settings.iterations else 0
    sides = boxes[:, 2:] - boxes[:, :2]
    beyond = settings.beyond * (sides.amin(1) / (RESOLVED * pixels_per_cell(settings.cells))).clamp(0, 1)[:, None, None]
    grown = sides * (margin / side)
    boxes = torch.cat([boxes[:, :2] - grown, boxes[:, 2:] + grown], 1)
    return F.pad(masks - beyond, (margin,) * 4) + beyond, boxes


def pixels_per_cell(cells: int) -> int:
    """Pixels of the canvas per cell of a grid of about so many ``cells`` (from 1 on), along each side: 4 or more."""
    return max(4, round(math.sqrt(CANVAS / cells)))


def grid_size(height: int, width: int, cells: int) -> tuple[int, int]:
    """(rows, columns) of a grid of about so many cells, as square as can be, never finer than half the pixels."""
    scale = min(math.sqrt(cells / (height * width)), 0.5)
    return max(1, round(height * scale)), max(1, round(width * scale))


def joint_bilateral_upsampling(maps: Tensor, colours: Tensor, fine: Tensor) -> Tensor:
    """Maps of the grid's cells at the canvas's size (joint bilateral upsampling; Kopf et al., 2007).

    A pixel is the mean of its own cell and of the eight around it, weighted by how near they are (Gaussian, of a cell)
    and how alike in colour (Gaussian, of `ALIKE`); cells at the border stand for what lies beyond.

    Args:
        maps: (N, h, w).
        colours: (3, h, w) RGB in [0, 1] of the cells.
        fine: (3, k h, k w) of the canvas, k pixels per cell along each side.

    Returns:
        (N, k h, k w).
    """
    height, width = maps.shape[-2:]
    k = fine.shape[-1] // width
    steps = torch.tensor([-1, 0, 1], device=maps.device)
    rows, columns = (
        (torch.arange(length, device=maps.device) + steps[:, None]).clamp(0, length - 1) for length in (height, width)
    )
    around = (rows[:, None, :, None] * width + columns[:, None]).view(9, -1)  # of each cell, from its upper left
    place = (torch.arange(k, device=maps.device) + 0.5) / k - 0.5  # of a pixel in its cell, in cells
    square = (place - steps[:, None]) ** 2
    apart = (square[:, None, :, None] + square[:, None]).view(9, k**2)
    pixels = fine.view(3, height, k, width, k).permute(0, 2, 4, 1, 3).reshape(3, 1, k**2, height * width)
    there = colours.flatten(1)[:, around][:, :, None]
    unlike = ((pixels - there) ** 2).sum(0) * (255 / ALIKE) ** 2
    weights = (-0.5 * (apart[..., None] + unlike)).clamp(min=NOTHING).exp()
    weights = weights / weights.sum(0)
    found = torch.zeros(len(maps), k**2, height * width, device=maps.device)
    for weight, own in zip(weights, maps.flatten(1)[:, around].unbind(1), strict=True):
        found = torch.addcmul(found, weight, own[:, None])
    found = found.view(len(maps), k, k, height, width).permute(0, 3, 1, 4, 2)
    return found.reshape(len(maps), k * height, k * width)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) at another size, (N, H, W), bilinear as ``F.interpolate``, which takes no N = 0."""
    low = torch.zeros(1, device=maps.device)
    rows, columns = (
        interpolation(low, low + length, own, length)[0] for own, length in zip(maps.shape[-2:], size, strict=True)
    )
    return rows.T @ maps @ columns


def area_means(maps: Tensor, extent: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """The means (K, h, w) over a grid of ``size`` that lies on the first ``extent`` pixels of maps (K, H, W)."""
    rows, columns = (
        _shares(own, cells, pixels, maps.device)
        for own, cells, pixels in zip(extent, size, maps.shape[-2:], strict=True)
    )
    return rows @ maps @ columns.T


def _shares(length: float, cells: int, pixels: int, device: torch.device) -> Tensor:
    """(cells, pixels) share of each pixel of a side in the mean of each cell, of which so many make up the length."""
    edges = torch.arange(cells + 1, device=device) * (length / cells)
    pixel = torch.arange(pixels, device=device)
    inside = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return inside.clamp(min=0) * (cells / length)


def draw(masks: Tensor, boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Masks (N, S, S) in boxes (N, 4), in pixels of the canvas (h, w), drawn on it: (N, h, w), 0 outside.

    Bilinear, as torchvision pastes them, but without rounding boxes to pixels, which a small canvas would not bear. A
    resize is a product with a matrix on either side, so all masks are drawn at once.
    """
    margin = (boxes[:, 2:] - boxes[:, :2]) / masks.shape[-1]  # one empty cell, into which a mask fades
    first, last, side = boxes[:, :2] - margin, boxes[:, 2:] + margin, masks.shape[-1] + 2
    rows, columns = (interpolation(first[:, axis], last[:, axis], side, canvas[1 - axis]) for axis in (1, 0))
    return rows.transpose(1, 2) @ F.pad(masks, (1, 1, 1, 1)) @ columns


def mean_field(image: Tensor, unary: Tensor, settings: Sharpening, features: Tensor | None = None) -> Tensor:
    """Log-odds of the instances after the mean field, each alone against its background.

    The model and its symmetric normalisation are those of `crf.DenseCRF`, which the result equals up to the error of
    the lattice there; with features there is a third kernel, of them and the place.

    Args:
        image: (3, h, w) RGB in [0, 1].
        unary: (N, h, w) log-odds of object against background.
        features: (K, h, w) of any scale: they are compared by their standard deviation over this image.

    Returns:
        (N, h, w) log-odds.
    """
    height, width = unary.shape[-2:]
    side = math.sqrt(height * width)
    device = unary.device
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    place = torch.stack([y, x]).flatten(1) / (settings.sxy_bilateral * side)
    colours = torch.cat([place, (image.flatten(1) - 0.5) * (255 / settings.srgb)])
    alike = _kernel(colours, settings.compat_bilateral)
    if features is not None and settings.compat_features:
        values = features.flatten(1) - features.flatten(1).mean(1, keepdim=True)
        spread = (values**2).sum(0).mean().clamp(min=1e-12).sqrt()
        alike += _kernel(torch.cat([place, values / (settings.sfeatures * spread)]), settings.compat_features)
    rows, columns = (_gaussian(length, settings.sxy_gaussian * side, device) for length in (height, width))
    near = (rows.sum(1)[:, None] * columns.sum(1)).rsqrt()
    odds = unary
    for _ in range(settings.iterations):
        lean = 2 * odds.sigmoid() - 1  # of the object's probability over the background's
        smooth = near * (rows @ (near * lean) @ columns)
        odds = unary + (lean.flatten(1) @ alike).view_as(unary) + settings.compat_gaussian * smooth
    return odds


def _kernel(feature: Tensor, weight: float) -> Tensor:
    """(P, P) exp(-|f_i - f_j|^2 / 2) of features (K, P), by the root of its rows' and columns' sums, times weight."""
    square = -0.5 * (feature**2).sum(0, keepdim=True)
    ones = torch.ones_like(square)
    # -|f_i - f_j|^2 / 2 as one product; a pass over P x P less for each term
    exponent = torch.cat([feature, square, ones]).T @ torch.cat([feature, ones, square])
    kernel = exponent.clamp_(min=NOTHING).exp_()
    norm = kernel.sum(1).rsqrt()
    return kernel.mul_(weight * norm).mul_(norm[:, None])


def _gaussian(length: int, deviation: float, device: torch.device) -> Tensor:
    """(length, length) exp(-d^2 / (2 deviation^2)) of the distances along a side; 0 where two of them multiplied would
    count for nothing (`NOTHING`).
    """
    place = torch.arange(length, device=device, dtype=torch.float32)
    exponent = -0.5 * ((place[:, None] - place) / max(deviation, 0.5)) ** 2
    return torch.where(exponent > NOTHING / 2, exponent.exp(), 0.0)
