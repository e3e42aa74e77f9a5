"""Random predictions and truths, small enough that ties, duplicates, misses and shared best objects all happen."""

from __future__ import annotations

import numpy as np
import torch

from labelpenet.data.dataset import Truth
from labelpenet.instances import Instances, masks_to_boxes

SIZE = (12, 16)


def random_masks(rng: np.random.Generator, count: int) -> torch.Tensor:
    """(count, 12, 16) bool: rectangles with a few pixels missing, never empty."""
    masks = torch.zeros(count, *SIZE, dtype=torch.bool)
    for mask in masks:
        y, x = rng.integers(0, SIZE[0] - 3), rng.integers(0, SIZE[1] - 3)
        mask[y : y + rng.integers(2, 9), x : x + rng.integers(2, 9)] = True
        mask &= torch.from_numpy(rng.random(SIZE) > 0.1)
        mask[y, x] = True
    return masks


def random_instances(rng: np.random.Generator, count: int, classes: int, levels: int = 5) -> Instances:
    """Instances whose scores take few values, so that many are equal."""
    masks = random_masks(rng, count)
    scores = torch.from_numpy(rng.integers(0, levels + 1, count) / levels).float()
    return Instances(masks_to_boxes(masks), torch.from_numpy(rng.integers(0, classes, count)), scores, SIZE, masks)


def random_truth(rng: np.random.Generator, count: int, classes: int, crowds: bool = False) -> Truth:
    """A truth of which some objects are difficult, and some (``crowds``) crowd regions."""
    objects = random_instances(rng, count, classes)
    objects.weights = torch.ones(count)
    semantic = np.zeros(SIZE, dtype=np.uint8)
    assert objects.masks is not None
    for mask, label in zip(objects.masks.numpy(), objects.labels.tolist(), strict=True):
        semantic[mask] = label + 1
    semantic[rng.random(SIZE) < 0.1] = 255
    difficult = torch.from_numpy(rng.random(count) < 0.2)
    crowd = torch.from_numpy(rng.random(count) < 0.2) if crowds else torch.zeros(count, dtype=torch.bool)
    return Truth(objects, difficult & ~crowd, crowd, semantic)


def near(rng: np.random.Generator, truth: Truth, classes: int) -> Instances:
    """A prediction near the truth: some objects found, some twice, some shifted, and some invented."""
    objects = truth.instances
    index = rng.integers(0, max(len(objects), 1), rng.integers(0, 5) if len(objects) else 0)
    found = objects[torch.from_numpy(index)]
    assert found.masks is not None
    masks = (
        torch.stack([m.roll(int(rng.integers(-2, 3)), int(rng.integers(0, 2))) for m in found.masks] or [*found.masks])
        if len(found)
        else found.masks
    )
    scores = torch.from_numpy(rng.integers(0, 6, len(found)) / 5).float()
    shifted = Instances(masks_to_boxes(masks), found.labels, scores, SIZE, masks)
    return Instances.cat([shifted, random_instances(rng, int(rng.integers(0, 5)), classes)])


def random_set(seed: int, images: int = 6, classes: int = 3, crowds: bool = False) -> tuple[dict, dict]:
    """Predictions and truths by image id; some images have no prediction, some no object."""
    rng = np.random.default_rng(seed)
    truths = {f"image{i}": random_truth(rng, int(rng.integers(0, 5)), classes, crowds) for i in range(images)}
    predictions = {name: near(rng, truth, classes) for name, truth in truths.items() if rng.random() < 0.9}
    return predictions, truths
