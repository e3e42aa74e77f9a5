"""Masks as polygons, exactly: they run along the borders between pixels, so rasterising them gives the mask back.

A *ring* is a closed chain of corners, (K, 2) float64 ``x, y`` in pixels; pixel (row, column) is the square from
(column, row) to (column + 1, row + 1).
"""

from __future__ import annotations

import numpy as np


def rings(mask: np.ndarray) -> list[np.ndarray]:
    """The borders of an (H, W) bool mask: one ring around each 4-connected part, one around each hole.

    Outer rings run clockwise as seen on the screen, holes the other way. Only corners are kept. Every ring starts at
    its topmost, then leftmost corner, and the rings are in the order of these.
    """
    padded = np.pad(mask.astype(bool), 1)
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
        for start in zip((xs + x0).tolist(), (ys + y0).tolist(), strict=True):
            leaving.setdefault(start, []).append(step)
    found = []
    for start in sorted(leaving, key=lambda corner: corner[::-1]):
        while leaving[start]:
            found.append(_follow(start, leaving))
    return found


def _follow(start: tuple[int, int], leaving: dict[tuple[int, int], list[tuple[int, int]]]) -> np.ndarray:
    """Takes the arrows of one ring out of ``leaving``."""
    corners, corner = [], start
    step = leaving[start].pop(0)
    first = step
    corners.append(start)
    while True:
        corner = (corner[0] + step[0], corner[1] + step[1])
        choices = leaving[corner]
        if corner == start and (not choices or (-step[1], step[0]) not in choices):
            break
        # Where two parts touch at a corner, turning right keeps to the part that we walk around.
        right = (-step[1], step[0])
        turned = choices.pop(choices.index(right)) if right in choices else choices.pop()
        if turned != step:
            corners.append(corner)
        step = turned
    if first == step and len(corners) > 1:
        corners.pop(0)
    return np.array(corners, dtype=np.float64)


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


def coco_polygons(mask: np.ndarray) -> list[list[float]]:
    """A mask as COCO polygons ``[x1, y1, x2, y2, ...]``, which pycocotools rasterises to exactly this mask.

    One polygon a part; a mask with holes is one polygon with bridges, as COCO has no holes.
    """
    found = rings(mask)
    if any(signed_area(ring) < 0 for ring in found):
        found = [joined(found)]
    return [ring.flatten().tolist() for ring in found]
