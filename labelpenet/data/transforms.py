"""A photograph as a network sees it, and the way there and back for boxes and masks.

Shape letters: ``N`` photographs, ``H, W`` one of them, ``h, w`` the network's input, ``R`` boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from labelpenet.instances import Instances


@dataclass
class View:
    """A photograph as the network sees it.

    Attributes:
        pixels: (1, 3, h, w) normalised.
        scale: factors (x, y) from the photograph's pixels to the network's.
        flipped: whether it is mirrored left to right.
    """

    pixels: Tensor
    scale: tuple[float, float]
    flipped: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return int(self.pixels.shape[-2]), int(self.pixels.shape[-1])

    def boxes(self, boxes: Tensor) -> Tensor:
        """(R, 4) boxes of the photograph in pixels of the view."""
        scaled = boxes.to(self.pixels.device).float() * self.pixels.new_tensor([*self.scale, *self.scale])
        if not self.flipped:
            return scaled
        width = self.pixels.shape[-1]
        return torch.stack([width - scaled[:, 2], scaled[:, 1], width - scaled[:, 0], scaled[:, 3]], 1)

    def back(self, boxes: Tensor) -> Tensor:
        """The inverse of `boxes`, for a view that is not flipped."""
        return boxes / boxes.new_tensor([*self.scale, *self.scale])

    def instances(self, one: Instances) -> Instances:
        """The photograph's instances in pixels of the view; boxes exact, masks resized to the nearest pixel."""
        height, width = self.size
        device, masks = self.pixels.device, None
        if one.masks is not None:
            masks = torch.zeros(len(one), height, width, dtype=torch.bool)
            for index, mask in enumerate(one.masks.cpu().numpy()):
                resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
                masks[index] = torch.from_numpy(resized.astype(bool))
            masks = (masks.flip(-1) if self.flipped else masks).to(device)
        return Instances(self.boxes(one.boxes), one.labels.to(device), one.weights.to(device), (height, width), masks)


@dataclass
class Batch:
    """N photographs as the modules see them.

    Attributes:
        views: of the photographs.
        stem: (N, D, h / stride, w / stride) the stem's map of the views, padded right and below to the largest.
        images: (H, W, 3) uint8 RGB each; needed to infer.
        tags: the classes of each, None where they are not known; needed to infer, and by module 1's losses.
        proposals: (R, 4) of each in its own pixels; needed by module 1 alone.
        features: (R, D) module 1's RoI features of each, where they are known.
    """

    views: Sequence[View]
    stem: Tensor
    images: Sequence[np.ndarray] = ()
    tags: Sequence[tuple[int, ...] | None] = ()
    proposals: Sequence[Tensor] = ()
    features: Sequence[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.views)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(h, w) of each view."""
        return [view.size for view in self.views]


def stack(views: Sequence[View]) -> Tensor:
    """The views' pixels (N, 3, h, w), padded with the mean colour right and below to the largest."""
    height, width = (max(sizes) for sizes in zip(*(view.size for view in views), strict=True))
    if all(view.size == (height, width) for view in views):
        return torch.cat([view.pixels for view in views])
    stacked = views[0].pixels.new_zeros(len(views), 3, height, width)
    for target, view in zip(stacked, views, strict=True):
        target[:, : view.size[0], : view.size[1]] = view.pixels[0]
    return stacked
