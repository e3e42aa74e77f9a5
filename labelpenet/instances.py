"""`Instances`: the one thing that flows between modules, readers, evaluators and exporters.

Shape letters: ``N`` instances, ``H, W`` height and width of the image in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from labelpenet.errors import InputError

MIN_SCORE = 0.3  # predictions below it are mostly wrong: good for measuring, not for looking at


@dataclass(frozen=True, eq=False)
class CompactMasks:
    """N masks of one image as crops: an image of 24 million pixels with thirty instances fits where one float does.

    Attributes:
        image_size: (H, W).
        crops: for each mask its tight crop (h, w) bool, on the CPU; (0, 0) where it is empty.
        corners: for each crop the (x, y) of its first pixel.
    """

    image_size: tuple[int, int]
    crops: tuple[np.ndarray, ...]
    corners: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls, image_size: tuple[int, int], parts: Iterable[np.ndarray], corners: Iterable[tuple[int, int]] | None = None
    ) -> CompactMasks:
        """From (h, w) bool arrays that lie with their first pixel at ``corners``, by default (0, 0)."""
        crops, places = [], []
        for part, (x, y) in zip(parts, itertools.repeat((0, 0)) if corners is None else corners):  # noqa: B905
            rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
            if not len(rows):
                rows, columns = np.array([0, -1]), np.array([0, -1])
            crops.append(part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy())
            places.append((x + int(columns[0]), y + int(rows[0])))
        return cls(image_size, tuple(crops), tuple(places))

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: Sequence[int]) -> CompactMasks:
        return CompactMasks(self.image_size, tuple(self.crops[i] for i in index), tuple(self.corners[i] for i in index))

    def dense(self) -> Tensor:
        """(N, H, W) bool."""
        masks = np.zeros((len(self), *self.image_size), bool)
        for mask, crop, (x, y) in zip(masks, self.crops, self.corners, strict=True):
            mask[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        return torch.from_numpy(masks)

    def boxes(self) -> Tensor:
        """The tight boxes (N, 4) float32, half-open in pixels; zeros for an empty mask."""
        rows = [(x, y, x + crop.shape[1], y + crop.shape[0]) if crop.size else (0, 0, 0, 0) for crop, (x, y) in self]
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)

    def __iter__(self) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
        return zip(self.crops, self.corners, strict=True)

    def areas(self) -> list[int]:
        """The number of pixels of each mask."""
        return [int(np.count_nonzero(crop)) for crop in self.crops]

    def overlap(self, one: int, other: int) -> int:
        """The number of pixels that two of the masks share."""
        (ax, ay), (bx, by) = self.corners[one], self.corners[other]
        a, b = self.crops[one], self.crops[other]
        x1, y1 = max(ax, bx), max(ay, by)
        x2, y2 = min(ax + a.shape[1], bx + b.shape[1]), min(ay + a.shape[0], by + b.shape[0])
        if x1 >= x2 or y1 >= y2:
            return 0
        return int(np.count_nonzero(a[y1 - ay : y2 - ay, x1 - ax : x2 - ax] & b[y1 - by : y2 - by, x1 - bx : x2 - bx]))

    def encode(self) -> list[dict[str, Any]]:
        """The masks as compressed COCO RLE, ``{"size": [H, W], "counts": str}`` each."""
        height, width = self.image_size
        rows = []
        for crop, (x, y) in self:
            padded = np.zeros((crop.shape[1], crop.shape[0] + 2), np.int8)  # columns, as COCO counts
            padded[:, 1:-1] = crop.T
            turns = np.diff(padded, axis=1)
            columns, first = np.nonzero(turns == 1)
            last = np.nonzero(turns == -1)[1]
            column = (columns.astype(np.int64) + x) * height + y
            starts, ends = column + first, column + last
            joined = np.flatnonzero(starts[1:] == ends[:-1])  # a run that goes on at the top of the next column
            starts, ends = np.delete(starts, joined + 1), np.delete(ends, joined)
            edges = np.concatenate([[0], np.stack([starts, ends], 1).ravel(), [height * width]])
            runs = np.diff(edges)
            if len(runs) > 1 and runs[-1] == 0:
                runs = runs[:-1]
            row = rle.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
            rows.append({"size": [height, width], "counts": row["counts"].decode("ascii")})
        return rows


class _Masks:
    """The field `Instances.masks`: given dense or compact, read dense."""

    def __get__(self, owner: Instances | None, kind: type[Instances]) -> Tensor | None:
        if owner is None:  # the field's default
            return None
        kept = owner.__dict__["_masks"]
        return kept.dense().to(owner.boxes.device) if isinstance(kept, CompactMasks) else kept

    def __set__(self, owner: Instances, masks: Tensor | CompactMasks | None) -> None:
        owner.__dict__["_masks"] = masks


@dataclass(eq=False)
class Instances:
    """The instances of one image.

    Attributes:
        boxes: (N, 4) float32, ``x1, y1, x2, y2`` in pixels; a box is the half-open rectangle [x1, x2) x [y1, y2).
        labels: (N,) int64, index into the list of foreground classes, from 0.
        weights: (N,) float32 in [0, 1]: confidence of a pseudo-label, score of a prediction, 1 for a true object.
        image_size: (H, W) of the image that boxes and masks refer to.
        masks: (N, H, W) bool, or None where there are none. Those given as `CompactMasks` are kept so, and made
            dense each time they are read; `compact_masks` does not.
    """

    boxes: Tensor
    labels: Tensor
    weights: Tensor
    image_size: tuple[int, int]
    masks: _Masks = _Masks()

    def __post_init__(self) -> None:
        n = len(self.boxes)
        height, width = self.image_size
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 4:
            raise ValueError(f"boxes must be (N, 4), but got {tuple(self.boxes.shape)}")
        for name, one in (("labels", self.labels), ("weights", self.weights)):
            if one.shape != (n,):
                raise ValueError(f"{name} must be ({n},), but got {tuple(one.shape)}")
        kept = self._kept
        if kept is not None:
            shape = (len(kept), *kept.image_size) if isinstance(kept, CompactMasks) else tuple(kept.shape)
            if shape != (n, height, width):
                raise ValueError(f"masks must be ({n}, {height}, {width}), but got {shape}")

    @property
    def _kept(self) -> Tensor | CompactMasks | None:
        return self.__dict__["_masks"]

    @property
    def compact_masks(self) -> CompactMasks | None:
        """The masks as crops on the CPU, None where there are none."""
        kept = self._kept
        return CompactMasks.of(self.image_size, kept.cpu().numpy()) if isinstance(kept, Tensor) else kept

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | np.ndarray | slice | Sequence[int] | Sequence[bool] | int) -> Instances:
        """The instances selected by a boolean mask, indices or a slice; an int selects one, still as `Instances`."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.boxes.device)
            index = (index if index.dtype == torch.bool else index.long()).reshape(-1)
        masks = self._kept
        if isinstance(masks, CompactMasks):
            masks = masks[torch.arange(len(self), device=self.boxes.device)[index].tolist()]
        elif masks is not None:
            masks = masks[index]
        return Instances(self.boxes[index], self.labels[index], self.weights[index], self.image_size, masks)

    @classmethod
    def empty(cls, image_size: tuple[int, int], with_masks: bool = False) -> Instances:
        """No instance in an image of ``image_size`` (H, W)."""
        masks = torch.zeros(0, *image_size, dtype=torch.bool) if with_masks else None
        return cls(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0), image_size, masks)

    @classmethod
    def cat(cls, parts: Sequence[Instances]) -> Instances:
        """The instances of several parts of the same image, in order; masks only if every part has them."""
        if not parts:
            raise ValueError("cat needs at least one Instances")
        sizes = {part.image_size for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"parts must belong to one image, but their sizes are {sorted(sizes)}")
        masks = [dense for part in parts if (dense := part.masks) is not None]
        return cls(
            torch.cat([part.boxes for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat([part.weights for part in parts]),
            parts[0].image_size,
            torch.cat(masks) if len(masks) == len(parts) else None,
        )

    def to(self, device: torch.device | str) -> Instances:
        """The same instances on another device."""
        masks = self._kept.to(device) if isinstance(self._kept, Tensor) else self._kept
        return Instances(self.boxes.to(device), self.labels.to(device), self.weights.to(device), self.image_size, masks)

    def weighted(self, weights: Tensor) -> Instances:
        """The same instances with other weights (N,)."""
        return Instances(self.boxes, self.labels, weights, self.image_size, self._kept)

    def validate(self, num_classes: int | None = None) -> Instances:
        """Checks the values, not only the shapes, and returns self; `InputError` for a box that is not finite, has no
        area or leaves the image by more than a pixel, a label outside [0, num_classes), or a weight outside [0, 1].
        """
        height, width = self.image_size
        boxes, weights = self.boxes, self.weights
        if not bool(torch.isfinite(boxes).all()):
            raise InputError("a box holds NaN or infinity; remove it")
        for index in torch.nonzero((boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])).flatten().tolist():
            raise InputError(f"box {index} {_round(boxes[index])} has no area; x2 must exceed x1, and y2 y1")
        outside = (boxes < -1).any(1) | (boxes[:, 2] > width + 1) | (boxes[:, 3] > height + 1)
        for index in torch.nonzero(outside).flatten().tolist():
            raise InputError(f"box {index} {_round(boxes[index])} leaves the image of {width} x {height} pixels")
        if len(self) and (int(self.labels.min()) < 0 or (num_classes and int(self.labels.max()) >= num_classes)):
            bound = "C" if num_classes is None else num_classes
            raise InputError(f"labels must be in [0, {bound}), but got {sorted(set(self.labels.tolist()))}")
        if not bool(((weights >= 0) & (weights <= 1)).all()):
            raise InputError(f"weights must be in [0, 1], but got {_round(weights)}")
        return self

    def to_coco(self, image_id: int | str, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """The instances as rows of a COCO results list.

        Args:
            image_id: the id that every row carries.
            category_ids: for each class index the COCO ``category_id``; None for 1..C.

        Returns:
            One dict an instance: ``image_id, category_id, bbox`` (x, y, width, height), ``score`` and, where there are
            masks, ``segmentation`` (compressed RLE with ``counts`` as text).
        """
        compact = self.compact_masks
        masks = [{}] * len(self) if compact is None else [{"segmentation": one} for one in compact.encode()]
        columns = self.boxes.tolist(), self.labels.tolist(), self.weights.tolist(), masks
        return [
            {
                "image_id": image_id,
                "category_id": label + 1 if category_ids is None else category_ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": weight,
                **mask,
            }
            for (x1, y1, x2, y2), label, weight, mask in zip(*columns, strict=True)
        ]

    @classmethod
    def from_coco(
        cls, rows: Iterable[dict[str, Any]], image_size: tuple[int, int], category_ids: Sequence[int]
    ) -> Instances:
        """The inverse of `to_coco`, for the rows of one image; `InputError` for an unknown category, or a mask that
        does not fit it. Masks are kept if every row has a ``segmentation`` (RLE, compressed or not, or polygons). A row
        without ``bbox`` gets its mask's tight box.
        """
        rows = list(rows)
        index = {category: label for label, category in enumerate(category_ids)}
        unknown = sorted({row["category_id"] for row in rows} - set(index))
        if unknown:
            raise InputError(f"unknown category_id {unknown[0]}; known are {sorted(index)}")
        masks = None
        if rows and all(row.get("segmentation") for row in rows):
            masks = torch.stack([decode_mask(row["segmentation"], image_size) for row in rows])
        boxes = torch.zeros(len(rows), 4)
        for i, row in enumerate(rows):
            if row.get("bbox") is not None:
                x, y, width, height = row["bbox"]
                boxes[i] = torch.tensor([x, y, x + width, y + height])
            elif masks is not None:
                boxes[i] = masks_to_boxes(masks[i : i + 1])[0]
        labels = torch.tensor([index[row["category_id"]] for row in rows], dtype=torch.long)
        weights = torch.tensor([float(row.get("score", 1.0)) for row in rows])
        return cls(boxes, labels, weights, image_size, masks)


def decode_mask(segmentation: Any, image_size: tuple[int, int]) -> Tensor:
    """One COCO ``segmentation`` (polygons, or RLE compressed or not) as an (H, W) bool mask; checks it first."""
    height, width = image_size
    runs = check_segmentation(segmentation, image_size)
    if runs is None:
        encoded = rle.merge(rle.frPyObjects(segmentation, height, width))
        return torch.from_numpy(rle.decode(encoded).astype(bool))
    return torch.from_numpy(np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T.copy())


def check_segmentation(segmentation: Any, image_size: tuple[int, int]) -> np.ndarray | None:
    """Refuses a COCO ``segmentation`` that does not describe a mask of ``image_size`` (H, W).

    pycocotools itself decodes run lengths that end early into whatever lies in memory, and polygons of any extent.

    Returns:
        The lengths of an RLE's runs, None for polygons.

    Raises:
        InputError: the fault.
    """
    height, width = image_size
    if isinstance(segmentation, list) and segmentation:
        for polygon in segmentation:
            _check_polygon(polygon, image_size)
        return None
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    if not isinstance(counts, (str, bytes, list)):
        raise InputError("segmentation must be polygons, or RLE with size and counts")
    size = segmentation.get("size")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise InputError(
            f"RLE of size {size} on an image of [{height}, {width}]; predict on the photographs at their original size"
        )
    runs = _runs(counts)
    # each by itself, too: the sum may overflow
    if runs is None or (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise InputError(f"damaged RLE, its runs do not add up to {height * width} pixels; write it again")
    return runs


def masks_to_boxes(masks: Tensor) -> Tensor:
    """The tight boxes (N, 4) float32 of (N, H, W) bool masks, half-open in pixels; zeros for an empty mask."""
    _, height, width = masks.shape
    return CompactMasks.of((height, width), masks.cpu().numpy()).boxes().to(masks.device)


def _runs(counts: str | bytes | list[Any]) -> np.ndarray | None:
    """The run lengths of an RLE, compressed (text) or not; None if it is none.

    In COCO's text five bits a character, least first; the sixth says that more follow, the sign is in the last one's
    fifth bit, and from the fourth run on it is the difference to the run two before.
    """
    if isinstance(counts, list):
        return np.array(counts, np.int64) if all(type(run) is int and abs(run) < 2**32 for run in counts) else None
    letters = np.frombuffer(
        counts.encode(errors="surrogatepass") if isinstance(counts, str) else counts, np.uint8
    ).astype(np.int64)
    bits = letters - 48
    if not len(bits) or (bits < 0).any() or (bits > 63).any() or bits[-1] & 32:
        return None
    last = np.flatnonzero((bits & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(bits)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # 35 bits: more than any image has pixels
        return None
    runs = np.add.reduceat((bits & 31) << (5 * place), first)
    runs -= np.where(bits[last] & 16, np.int64(1) << (5 * (last - first + 1)), 0)
    # Undoing the differences: the runs 1, 3, 5, ... and 2, 4, 6, ... are running sums; run 0 stands alone.
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def _check_polygon(polygon: Any, image_size: tuple[int, int]) -> None:
    """Refuses what makes pycocotools slow or wrong: other things than x, y lists, and outlines without end."""
    try:
        values = np.asarray(polygon)
    except ValueError:  # lists of different lengths
        values = np.zeros(0)
    numbers = isinstance(polygon, list) and values.ndim == 1 and values.dtype.kind in "iuf"  # no text that looks so
    if not numbers or len(values) < 6 or len(values) % 2:
        raise InputError("a polygon must be a list [x1, y1, x2, y2, x3, y3, ...]; mend it")
    longest = max(image_size)
    # Not-a-number fails this comparison too.
    if not ((values >= -longest) & (values <= 2 * longest)).all():
        raise InputError(f"a polygon leaves the image of {image_size[1]} x {image_size[0]} pixels; mend it")
    if np.abs(np.diff(values.reshape(-1, 2), axis=0)).sum() > 1e7:
        raise InputError("a polygon's outline is more than ten million pixels long; simplify it")


def _round(values: Tensor) -> list[float]:
    return [round(value, 2) for value in values.flatten().tolist()]
