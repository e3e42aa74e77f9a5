"""What a network's tag classifier learns from (`models.tags`): the tags of the training photographs, seen once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.images import read_image
from labelpenet.engine.distributed import gather, map_images
from labelpenet.errors import InputError
from labelpenet.models.classification import present_classes
from labelpenet.models.tags import TagClassifier, describe
from labelpenet.progress import Progress, silent

LIMIT = 10_000
"""Photographs that it learns from at most: 200 MB of features of MobileNetV2."""


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
    images = images[:: -(-len(images) // LIMIT) or 1]

    @torch.no_grad()
    def one(image: TaggedImage) -> Tensor | None:
        try:
            pixels = read_image(image.path)
        except InputError:
            return None  # other stages have said so
        with fabric.autocast():
            return describe(features(pixels)).cpu()

    share = images[fabric.global_rank :: fabric.world_size]
    with Progress("tags", len(share), log=silent if fabric.global_rank else None) as progress:
        found = list(progress.tracked(map_images(one, share, fabric.device)))
    shares = gather(fabric.world_size, found)
    rows = [shares[number % len(shares)][number // len(shares)] for number in range(len(images))]
    known = [(row, image) for row, image in zip(rows, images, strict=True) if row is not None]
    if known:
        tags = [present_classes(image.tags, len(classifier.bias)) for _, image in known]
        classifier.cpu().fit(torch.stack([row for row, _ in known]), torch.stack(tags))
        classifier.to(fabric.device)
