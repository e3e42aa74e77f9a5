"""A photograph as a network sees it, and the way there and back for boxes and masks.

Shape letters: ``N`` photographs, ``H, W`` one of them, ``h, w`` the network's input, ``R`` boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from labelpenet.config import Images
from labelpenet.instances import Instances

GRID = 128  # pixels; on a GPU the sides of what a network sees are multiples of it


@dataclass
class View:
    """A photograph as the network sees it: normalised ``pixels`` (1, 3, h, w), the factors (x, y) from the photograph's
    pixels to these, and whether it is mirrored left to right.
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
        return mirror(scaled, self.pixels.shape[-1])

    def back(self, boxes: Tensor) -> Tensor:
        """The inverse of `boxes`, for a view that is not flipped."""
        return boxes / boxes.new_tensor([*self.scale, *self.scale])

    def instances(self, one: Instances) -> Instances:
        """The photograph's instances in pixels of the view; boxes exact, masks resized to the nearest pixel."""
        height, width = self.size
        device, masks = self.pixels.device, None
        if one.masks is not None:
            masks = resize_masks(one.masks, (height, width))
            masks = (masks.flip(-1) if self.flipped else masks).to(device)
        return Instances(self.boxes(one.boxes), one.labels.to(device), one.weights.to(device), (height, width), masks)


def random_view(images: Images, generator: torch.Generator) -> tuple[int, bool]:
    """The shorter side at which a photograph is presented, and whether it is mirrored."""
    side = images.sides[int(torch.randint(len(images.sides), (1,), generator=generator))]
    return side, images.flip and bool(torch.rand((), generator=generator) < 0.5)


def scaled_size(size: tuple[int, ...], side: int | None, longest: int) -> tuple[int, int]:
    """(h, w), 32 at least, of a photograph (H, W) whose shorter side becomes ``side`` (None: as it is)."""
    height, width = size[:2]
    factor = 1.0 if side is None else min(side / min(height, width), longest / max(height, width))
    return max(32, round(height * factor)), max(32, round(width * factor))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The photograph (H, W, 3) uint8 at another size (h, w): bilinear, or by areas where `shrink` does it."""
    image = shrink(image, size)
    return image if image.shape[:2] == size else cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def shrink(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The photograph (H, W, 3) uint8 at size (h, w), each pixel the mean of those it covers, if that is no more than
    half of its own, where bilinear interpolation would skip pixels; otherwise as it is.
    """
    if size[0] * 2 > image.shape[0]:
        return image
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def mirror(boxes: Tensor, width: int) -> Tensor:
    """Boxes (R, 4) of a picture so many pixels wide, mirrored left to right with it."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool masks at another size (h, w), on the CPU, each pixel from the one that lies under its centre.

    OpenCV's plain nearest neighbour takes another, and would move masks against their boxes by half a pixel to one.
    """
    resized = torch.zeros(len(masks), *size, dtype=torch.bool)
    for index, mask in enumerate(masks.cpu().numpy()):
        one = cv2.resize(mask.astype(np.uint8), (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
        resized[index] = torch.from_numpy(one.astype(bool))
    return resized


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
        fine: (N, K, h / 8, w / 8) the stem's last map of stride 8, for feature pyramids.
    """

    views: Sequence[View]
    stem: Tensor
    images: Sequence[np.ndarray] = ()
    tags: Sequence[tuple[int, ...] | None] = ()
    proposals: Sequence[Tensor] = ()
    features: Sequence[Tensor] | None = None
    fine: Tensor | None = None

    def __len__(self) -> int:
        return len(self.views)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(h, w) of each view."""
        return [view.size for view in self.views]


def stacked_size(views: Sequence[View]) -> tuple[int, int]:
    """(h, w) of the views as `stack` puts them together."""
    multiple = divisible(views[0].pixels.device)
    height, width = (
        -(-max(sizes) // multiple) * multiple for sizes in zip(*(view.size for view in views), strict=True)
    )
    return height, width


def stack(views: Sequence[View]) -> Tensor:
    """The views' pixels (N, 3, h, w), padded with the mean colour right and below to the largest, and `divisible`."""
    height, width = stacked_size(views)
    if all(view.size == (height, width) for view in views):
        return torch.cat([view.pixels for view in views])
    stacked = views[0].pixels.new_zeros(len(views), 3, height, width)
    for target, view in zip(stacked, views, strict=True):
        target[:, : view.size[0], : view.size[1]] = view.pixels[0]
    return stacked


def divisible(device: torch.device, least: int = 1) -> int:
    """What the sides of a network's input are multiples of: at least ``least``, `GRID` on a GPU.

    Photographs come in hundreds of sizes, and cuDNN plans every convolution anew for a size that it has not seen.
    """
    return max(least, GRID if device.type == "cuda" else 1)
