"""From the attention maps of proposals to the confidence maps of instances (paper, section 3.2, figure 2 c-d).

A pixel belongs to a box [x1, x2) x [y1, y2) when its centre does; pixel (i, j) has its centre at (i + 0.5, j + 0.5).
Boxes may leave the image: what lies outside is dropped. A box that is not finite, or holds no pixel centre, covers
nothing. NaN in a map or a score makes the map that it is summed into NaN, so that it cannot go unnoticed.

Everything here is computed on the device of its input without waiting for it.

Shape letters: ``R`` proposals, ``C`` classes, ``G`` groups (instances), ``h, w`` an attention map, ``H, W`` the image.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

# Proposals projected at a time: bounds the memory at about 40 MB for 7x7 maps on an image 500 pixels wide.
CHUNK = 512


def project_maps(
    maps: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int = 1,
    offset: float = 0.0,
) -> Tensor:
    """Resizes each proposal's attention map into its box and sums the maps of each group: instance attention maps.

    Resampling is bilinear between the centres of the map's cells, the outermost values reaching to the box's edge
    (``align_corners=False``): on a box with integer corners it equals ``F.interpolate`` to the box's size.

    Args:
        maps: (R, h, w) attention maps.
        boxes: (R, 4) ``x1, y1, x2, y2`` in pixels.
        image_size: (H, W).
        weights: (R,) factor of each map; 1 if None.
        groups: (R,) int64, the group of each proposal; one outside [0, G) is left out; all 0 if None.
        num_groups: G.
        offset: how far right of and below its middle each cell of the maps looks, as a fraction of the box's side.

    Returns:
        (G, H, W), float32 (float64 if maps are).
    """
    height, width = image_size
    dtype = torch.promote_types(maps.dtype, torch.float32)
    maps, boxes = maps.to(dtype), boxes.to(dtype)
    if weights is not None:
        maps = maps * weights.to(dtype)[:, None, None]
    canvas = maps.new_zeros(num_groups, height, width)
    # Resizing into a box is separable: canvas = sum over r of rows_r^T (maps_r columns_r), a product of two matrices.
    for start in range(0, len(maps), CHUNK):
        part = slice(start, start + CHUNK)
        rows = interpolation(boxes[part, 1], boxes[part, 3], maps.shape[1], height, offset)
        columns = interpolation(boxes[part, 0], boxes[part, 2], maps.shape[2], width, offset)
        with full_precision(maps.device):
            stretched = maps[part] @ columns
        if groups is None:
            _add_product(canvas[0], rows, stretched)
            continue
        for group in range(num_groups):
            _add_product(canvas[group], *_members(groups[part] == group, rows, stretched))
    return canvas


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Where a caller's autocast would compute in 16 bits, this keeps the type of the tensors."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _members(member: Tensor, rows: Tensor, stretched: Tensor) -> tuple[Tensor, Tensor]:
    """Those proposals alone on the CPU; elsewhere, where counting them would wait for the device, the others as 0."""
    if member.device.type == "cpu":
        return rows[member], stretched[member]
    return rows, torch.where(member[:, None, None], stretched, 0.0)


def _add_product(canvas: Tensor, rows: Tensor, stretched: Tensor) -> None:
    """canvas (H, W) += sum over r of rows (r, h, H)^T stretched (r, h, W), in place."""
    with full_precision(canvas.device):
        canvas.addmm_(rows.flatten(0, 1).T, stretched.flatten(0, 1))


def interpolation(low: Tensor, high: Tensor, cells: int, pixels: int, offset: float = 0.0) -> Tensor:
    """Linear interpolation from ``cells`` values spread over [low, high) to the pixels of one axis.

    Args:
        low, high: (R,) ends of the interval in pixels.
        offset: fraction of the interval by which the values stand right of the middles of their cells.

    Returns:
        (R, cells, pixels) weights: those of a pixel whose centre lies in the interval sum to 1, of any other to 0.
    """
    centre = torch.arange(pixels, dtype=low.dtype, device=low.device) + 0.5
    low, high = low[:, None], high[:, None]
    inside = (centre >= low) & (centre < high) & torch.isfinite(low) & torch.isfinite(high)
    position = (((centre - low) / (high - low) - offset) * cells - 0.5).clamp(0, cells - 1)
    cell = torch.arange(cells, dtype=low.dtype, device=low.device)[:, None]
    hat = (1 - (position[:, None] - cell).abs()).clamp(min=0)
    return torch.where(inside[:, None], hat, 0.0)


def heat_map(boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Object heat-maps: for each pixel the sum of the class scores of the proposals that cover it (section 3.2).

    Args:
        boxes: (R, 4) ``x1, y1, x2, y2`` in pixels.
        scores: (R, C), of any sign; pass only the columns that are wanted.
        image_size: (H, W).

    Returns:
        (C, H, W), float32 (float64 if scores are); exactly 0 where no box is.
    """
    height, width = image_size
    dtype = torch.promote_types(scores.dtype, torch.float32)
    num_classes = scores.shape[1]
    # The corners of the boxes are scattered with alternating signs and summed up along both axes. Sums of integers
    # are exact and do not depend on their order: uncovered pixels come out as 0, and a GPU repeats itself.
    largest = scores.detach().double().abs().amax(0) if len(scores) else scores.new_zeros(num_classes).double()
    # A score that is not finite makes its unit, and with it its map, NaN.
    unit = torch.where(largest == 0, 1.0, torch.where(largest.isinf(), torch.nan, largest)) * 2.0**-44
    fixed = (scores.double() / unit).round().to(torch.int64)
    x1, y1, x2, y2 = _pixel_range(boxes, image_size)
    corners = fixed.new_zeros((height + 1) * (width + 1), num_classes)
    for x, y, sign in ((x1, y1, 1), (x2, y1, -1), (x1, y2, -1), (x2, y2, 1)):
        corners.index_add_(0, y * (width + 1) + x, fixed, alpha=sign)
    sums = corners.T.reshape(num_classes, height + 1, width + 1)[:, :height, :width].cumsum(1).cumsum(2)
    return (sums * unit[:, None, None]).to(dtype)


def _pixel_range(boxes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and one-past-last pixel of each box, (R,) int64 each: ``x1, y1, x2, y2``, within the image."""
    height, width = image_size
    finite = torch.isfinite(boxes).all(1, keepdim=True)
    edges = torch.where(finite, (boxes.double() - 0.5).ceil(), 0.0)
    ranges = []
    for axis, size in ((0, width), (1, height)):
        first = edges[:, axis].clamp(0, size).long()
        ranges.append((first, torch.maximum(edges[:, axis + 2].clamp(0, size).long(), first)))
    (x1, x2), (y1, y2) = ranges
    return x1, y1, x2, y2


def normalise(maps: Tensor) -> Tensor:
    """Each map (..., H, W) divided by its own maximum: values in [0, 1].

    Negative values (heat-maps of logits) count as 0; a map without a positive value becomes 0.
    """
    maps = maps.clamp(min=0)
    largest = maps.amax((-2, -1), keepdim=True)
    return torch.where(largest == 0, 0.0, maps / largest)


def background_map(class_maps: Tensor) -> Tensor:
    """``A_0 = max(0, 1 - sum of the maps)`` over the classes or instances present (section 3.2).

    Args:
        class_maps: (K, H, W), meant to be in [0, 1] (see `normalise`).

    Returns:
        (H, W) in [0, 1] for maps >= 0; all 1 where K = 0.
    """
    return (1 - class_maps.sum(0)).clamp(min=0)


def confidence_map(attention: Tensor, heat: Tensor, how: Literal["mean", "product"] = "mean") -> Tensor:
    """Instance confidence maps from attention and heat-maps, each first divided by its maximum (section 3.2).

    Args:
        attention: (..., H, W) instance attention maps.
        heat: (..., H, W) object heat-maps of the instances' classes.
        how: ``mean`` keeps what either map shows; ``product`` only what both do. The paper does not say which.

    Returns:
        (..., H, W) in [0, 1]. The maximum is 1 only where both maps peak at the same pixel; `normalise` again if 1
        is needed.

    Raises:
        ValueError: another ``how``.
    """
    attention, heat = normalise(attention), normalise(heat)
    if how == "mean":
        return (attention + heat) / 2
    if how == "product":
        return attention * heat
    raise ValueError(f"how must be 'mean' or 'product', but got {how!r}")
