"""What is fitted at once, when a network is trained: its classifiers of whole photographs, which learn tags alone, and
of cells (`models.tags`, `models.pixels`). The training photographs are seen once for each."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.images import read_image
from labelpenet.engine.distributed import gather, map_images
from labelpenet.errors import InputError
from labelpenet.models.classification import present_classes
from labelpenet.models.pixels import PixelClassifier
from labelpenet.models.tags import TagClassifier, describe
from labelpenet.progress import Progress, silent

T = TypeVar("T")

LIMIT = 10_000
"""Photographs that are seen at most: 200 MB of features of MobileNetV2."""

CELLS, NUMBERS = 120, 10**8
"""Cells of a photograph at most, and numbers (cells times channels) of all."""


def fit_tags(
    classifier: TagClassifier,
    images: Sequence[TaggedImage],
    features: Callable[[np.ndarray], Tensor],
    fabric: Fabric,
) -> None:
    """Fits the classifier on the photographs that can be read, evenly drawn where there are more than `LIMIT`; each
    process computes its share, and all end with the same weights. Without any it stays as it is.

    Args:
        features: the map (K, h, w) of a whole photograph (H, W, 3) uint8 RGB, as it is in prediction.
    """
    known = _seen("tags", images, lambda image, _: describe(features(read_image(image.path))).cpu(), fabric)
    if known:
        tags = [present_classes(image.tags, len(classifier.bias)) for image, _ in known]
        classifier.cpu().fit(torch.stack([row for _, row in known]), torch.stack(tags))
        classifier.to(fabric.device)


def fit_pixels(
    classifier: PixelClassifier,
    images: Sequence[TaggedImage],
    cells: Callable[[TaggedImage], tuple[Tensor, Tensor] | None],
    fabric: Fabric,
) -> None:
    """Fits the classifier on some cells of these photographs, drawn at random, as `fit_tags`.

    Args:
        cells: features (K, h, w) of a photograph's cells, and (C, h, w) what they show, as `PixelClassifier.fit` takes
            both; None where nothing is known of it; `InputError` where it cannot be read.
    """
    channels = classifier.weight.shape[1]
    share = max(1, min(CELLS, NUMBERS // (channels * max(1, min(len(images), LIMIT)))))

    def one(image: TaggedImage, number: int) -> tuple[Tensor, Tensor] | None:
        found = cells(image)
        if found is None:
            return None
        features, shown = (part.flatten(1).T for part in found)
        drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(number))[:share]
        return features[drawn], shown[drawn]

    known = [row for _, row in _seen("pixels", images, one, fabric)]
    if known:
        features, shown = (torch.cat(part) for part in zip(*known, strict=True))
        classifier.cpu().fit(features, shown)
        classifier.to(fabric.device)


def _seen(
    name: str, images: Sequence[TaggedImage], one: Callable[[TaggedImage, int], T | None], fabric: Fabric
) -> list[tuple[TaggedImage, T]]:
    """What ``one`` makes of each photograph and its number, of `LIMIT` at most; without those that cannot be read, or
    of which it makes None."""
    images = images[:: -(-len(images) // LIMIT) or 1]

    def safely(numbered: tuple[int, TaggedImage]) -> T | None:
        try:
            with torch.no_grad(), fabric.autocast():
                return one(numbered[1], numbered[0])
        except InputError:
            return None  # other stages have said so

    share = list(enumerate(images))[fabric.global_rank :: fabric.world_size]
    with Progress(name, len(share), log=silent if fabric.global_rank else None) as progress:
        found = list(progress.tracked(map_images(safely, share, fabric.device)))
    shares = gather(fabric.world_size, found)
    rows = [shares[number % len(shares)][number // len(shares)] for number in range(len(images))]
    return [(image, row) for image, row in zip(images, rows, strict=True) if row is not None]
