"""A handful of photographs and predictions for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.instances import Instances, masks_to_boxes

CLASSES = ("cat", "dog", "emu")


def photographs(folder: Path, names: tuple[str, ...], numbers: bool = False) -> TaggedImages:
    """Noise of sizes that differ, one file a name; the id is the name's stem, or the path where it has folders."""
    images = []
    for k, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (10 + k, 14, 3), dtype=np.uint8)).save(path)
        identity = name if "/" in name else path.stem
        images.append(TaggedImage(identity, path, (0,), 100 + k if numbers else None))
    return TaggedImages(CLASSES, tuple(images))


def instances(size: tuple[int, int], seed: int, count: int = 4, masks: bool = True) -> Instances:
    """Rectangles with ragged edges and holes; scores all differ."""
    rng = np.random.default_rng(seed)
    drawn = torch.zeros(count, *size, dtype=torch.bool)
    for mask in drawn:
        y, x = rng.integers(0, size[0] - 4), rng.integers(0, size[1] - 4)
        mask[y : y + rng.integers(3, 9), x : x + rng.integers(3, 9)] = True
        mask &= torch.from_numpy(rng.random(size) > 0.15)
        mask[y, x] = True
    scores = torch.from_numpy(rng.permutation(count) / max(count, 1) * 0.9 + 0.05).float()
    labels = torch.from_numpy(rng.integers(0, len(CLASSES), count))
    return Instances(masks_to_boxes(drawn), labels, scores, size, drawn if masks else None)


def predictions(images: TaggedImages, masks: bool = True) -> dict[str, Instances]:
    """For the k-th image k + 1 instances, and none for the last."""
    last = len(images.images) - 1
    return {
        image.id: instances((10 + k, 14), k, 0 if k == last else k + 1, masks) for k, image in enumerate(images.images)
    }


def assert_same(one: Instances, other: Instances) -> None:
    assert one.image_size == other.image_size
    torch.testing.assert_close(one.boxes, other.boxes)
    assert one.labels.tolist() == other.labels.tolist()
    torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=0)
    if len(one):
        assert (one.masks is None) == (other.masks is None)
        assert one.masks is None or other.masks is None or torch.equal(one.masks, other.masks)
