"""Masks as polygons, in the two ways that programs draw them; either gives the mask back, exactly.

A *ring* is a closed chain of corners, (K, 2) float64 ``x, y`` in pixels; pixel (row, column) is the square from
(column, row) to (column + 1, row + 1). `rings` run along the borders between pixels: pycocotools fills them, and so
does whoever draws on a canvas. `contours` run through the outermost pixels: OpenCV and Pillow, which
colour the pixels of the outline too, fill these (`drawn`), as Ultralytics, supervision and Labelme do.
"""

import cv2
import numpy as np
from pycocotools import mask as rle

_SAME = 0.97  # the least IoU of a mask and its polygons with fewer corners


def rings(mask: np.ndarray) -> list[np.ndarray]:
    """The borders of an (H, W) bool mask: one ring around each 4-connected part, one around each hole.

    Outer rings run clockwise as seen on the screen, holes the other way. Only corners are kept. Every ring starts at
    its topmost, then leftmost corner, and the rings are in the order of these.
    """
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    padded = np.pad(mask[top : top + height, left : left + width].astype(bool), 1)
    inside = padded[1:-1, 1:-1]
    # Each border side as an arrow from corner to corner, with the mask on its right.
    sides = (
        (~padded[:-2, 1:-1], (0, 0), (1, 0)),  # above the pixel: to the right
        (~padded[1:-1, 2:], (1, 0), (0, 1)),  # right of it: down
        (~padded[2:, 1:-1], (1, 1), (-1, 0)),  # below it: to the left
        (~padded[1:-1, :-2], (0, 1), (0, -1)),  # left of it: up
    )
    leaving: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for outside, (x0, y0), step in sides:
        ys, xs = np.nonzero(inside & outside)
        for start in zip((xs + left + x0).tolist(), (ys + top + y0).tolist(), strict=True):
            leaving.setdefault(start, []).append(step)
    found = []
    for start in sorted(leaving, key=lambda corner: corner[::-1]):
        while leaving[start]:
            found.append(_follow(start, leaving))
    return found


def _follow(start: tuple[int, int], leaving: dict[tuple[int, int], list[tuple[int, int]]]) -> np.ndarray:
    """Takes the arrows of one ring out of ``leaving``."""
    corners, corner, step = [start], start, leaving[start].pop(0)
    while True:
        corner = (corner[0] + step[0], corner[1] + step[1])
        choices = leaving[corner]
        # Where two parts touch at a corner, turning right keeps to the part that we walk around.
        right = (-step[1], step[0])
        if corner == start and right not in choices:  # a ring turns at its topmost, then leftmost corner
            return np.array(corners, dtype=np.float64)
        turned = choices.pop(choices.index(right)) if right in choices else choices.pop()
        if turned != step:
            corners.append(corner)
        step = turned


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """All rings as one: each is joined to the nearest by a bridge of no width, walked there and back.

    Under the even-odd rule, which pycocotools follows, the one ring encloses what the rings together enclosed, holes
    included; a program that also draws outlines shows the bridges as lines one pixel wide.

    Args:
        parts: at least one ring.
    """
    bridges = _bridges(parts)
    detours: list[dict[int, list[np.ndarray]]] = [{} for _ in parts]
    for ring, (home, here, there) in reversed(bridges.items()):
        walk = _walk(parts[ring], there, detours[ring])
        detours[home].setdefault(here, []).append(np.concatenate([walk, walk[:1]]))
    return _walk(parts[0], 0, detours[0])


def _bridges(parts: list[np.ndarray]) -> dict[int, tuple[int, int, int]]:
    """For each ring but the first: a ring before it in this order, the corner of that one, and its own corner.

    Prim's shortest spanning tree by city-block distance between corners.
    """
    corners = np.concatenate(parts)
    owner = np.repeat(np.arange(len(parts)), [len(ring) for ring in parts])
    first = np.cumsum([0, *(len(ring) for ring in parts)])
    distance = np.full(len(corners), np.inf)
    nearest = np.zeros(len(corners), dtype=int)
    bridges: dict[int, tuple[int, int, int]] = {}
    joining = 0
    while True:
        distance[owner == joining] = np.inf
        waiting = ~np.isin(owner, [0, *bridges])
        if not waiting.any():
            return bridges
        left = np.flatnonzero(waiting)
        for start in range(first[joining], first[joining + 1], 256):  # in blocks, so that memory stays small
            block = corners[start : min(start + 256, first[joining + 1])]
            between = np.abs(corners[left, None] - block[None]).sum(-1)
            index = between.argmin(1)
            shortest = between[np.arange(len(left)), index]
            nearer = shortest < distance[left]
            distance[left[nearer]], nearest[left[nearer]] = shortest[nearer], start + index[nearer]
        there = int(left[distance[left].argmin()])
        joining, home = int(owner[there]), int(owner[nearest[there]])
        bridges[joining] = (home, int(nearest[there] - first[home]), int(there - first[joining]))


def _walk(ring: np.ndarray, start: int, detours: dict[int, list[np.ndarray]]) -> np.ndarray:
    """The ring from its corner ``start`` on, with the detours taken at the corners where they begin."""
    pieces = []
    for index in [*range(start, len(ring)), *range(start)]:
        pieces.append(ring[index : index + 1])
        for detour in detours.get(index, ()):
            pieces += [detour, ring[index : index + 1]]
    return np.concatenate(pieces)


def signed_area(ring: np.ndarray) -> float:
    """The area that a ring encloses, in pixels: positive for an outer ring, negative for a hole."""
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def contours(mask: np.ndarray) -> list[np.ndarray]:
    """The pixels at the rim of an (H, W) bool mask as rings through them (``column + .25, row + .25``).

    One around each 8-connected part, and one around each of its holes. Every pixel of a rim is a corner. A quarter, so
    that those who cut corners to whole pixels (Ultralytics) and those who round them (supervision) draw the same.
    """
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [ring[::-1, 0].astype(np.float64) + 0.25 for ring in found]


def drawn(parts: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The (H, W) bool mask of `contours`: filled, their holes left open, with all pixels that a ring touches.

    Corners are cut to whole pixels, as OpenCV's users do.
    """
    mask = np.zeros(size, np.uint8)
    cv2.fillPoly(mask, [np.floor(ring).astype(np.int32) for ring in parts], 1)
    return mask.astype(bool)


def filled(parts: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The (H, W) bool mask that pycocotools makes of `rings` joined into one, holes left open."""
    polygon = joined(parts).flatten().tolist()
    return rle.decode(rle.frPyObjects([polygon], *size)[0]).astype(bool)


def bridged(parts: list[np.ndarray], mask: np.ndarray) -> list[np.ndarray]:
    """Of `contours`, those to keep where all of them have to be drawn as one, `joined`, bridges and all.

    The largest, and what has more pixels than the bridges to it colour outside the (H, W) bool mask: of a mask with a
    speck at the other end of the photograph that is the mask without the speck.
    """
    parts = sorted(parts, key=signed_area, reverse=True)
    gain = [_pixels(ring) for ring in parts]
    bridges = _bridges(parts)
    for ring, (home, here, there) in reversed(bridges.items()):  # those that hang on others first
        ends = parts[home][here], parts[ring][there]
        x, y = np.linspace(*ends, int(np.abs(ends[0] - ends[1]).max()) + 1).astype(int).T
        gain[ring] -= int((~mask[y, x]).sum())
        gain[home] += max(gain[ring], 0)
    kept = [0]
    kept += [ring for ring, (home, _, _) in bridges.items() if gain[ring] > 0 and home in kept]
    few = [parts[ring] for ring in sorted(kept)]
    return max(few, parts, key=lambda rings: _overlap(drawn([joined(rings)], mask.shape), mask))


def _pixels(ring: np.ndarray) -> int:
    """The pixels of a part, or of a hole, by Pick's theorem from the ring through them, or around it."""
    rim, area = np.abs(ring - np.roll(ring, 1, 0)).max(1).sum(), signed_area(ring)
    return int(abs(area + rim / 2)) + 1


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def outline(
    mask: np.ndarray, *, centres: bool = False, single: bool = False, tolerance: float = 0.0
) -> list[np.ndarray]:
    """The rings of a mask with as few corners as wanted.

    Args:
        mask: (H, W) bool, not empty.
        centres: `contours` instead of `rings`; single: only those that are worth being `bridged`.
        tolerance: how far, in pixels, the rings may leave their way, and the side of specks and holes to leave out;
            less where they (with ``single``, joined) would no longer give the mask with an IoU of .97. 0: they give it
            exactly, but for what ``single`` costs.
    """
    exact = contours(mask) if centres else rings(mask)
    if single and len(exact) > 1:
        exact = bridged(exact, mask)
    while tolerance >= 0.25:
        large = (ring[:, None].astype(np.float32) for ring in exact if abs(signed_area(ring)) >= tolerance**2)
        simple = (cv2.approxPolyDP(ring, tolerance, True)[:, 0].astype(np.float64) for ring in large)
        parts = [ring for ring in simple if len(ring) > 2]
        if parts:
            one = [joined(parts)] if single else parts
            if _overlap(drawn(one, mask.shape) if centres else filled(one, mask.shape), mask) >= _SAME:
                return parts
        tolerance /= 2
    return exact


def straight(ring: np.ndarray) -> np.ndarray:
    """A ring without the corners at which it goes straight on; three corners at least, if need be the same ones."""
    ring = ring[(ring != np.roll(ring, 1, 0)).any(1)] if len(np.unique(ring, axis=0)) > 1 else ring[:1]
    before, after = ring - np.roll(ring, 1, 0), np.roll(ring, -1, 0) - ring
    turns = (before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]) | ((before * after).sum(1) < 0)
    kept = ring[turns] if turns.any() else ring[:1]
    return kept if len(kept) > 2 else np.concatenate([kept, np.repeat(kept[-1:], 3 - len(kept), 0)])


def coco_polygons(mask: np.ndarray, tolerance: float = 0.0) -> list[list[float]]:
    """A mask as COCO polygons ``[x1, y1, x2, y2, ...]``, which pycocotools rasterises to exactly this mask.

    One polygon a part; a mask with holes is one polygon with bridges, as COCO has no holes.

    Args:
        mask: (H, W) bool, not empty.
        tolerance: as `outline` takes it.
    """
    found = outline(mask, tolerance=tolerance)
    if any(signed_area(ring) < 0 for ring in found):
        found = [joined(found)]
    return [ring.flatten().tolist() for ring in found]
