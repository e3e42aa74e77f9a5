"""How long the measures take: 5,000 images x 20 classes x 100 detections by default.

    python benchmarks/evaluation.py                  # boxes only, as the VOC 2007 test set: seconds
    python benchmarks/evaluation.py --masks 500      # the first 500 images with masks of 375 x 500 pixels
    python benchmarks/evaluation.py --protocol coco

The scene of an image is drawn when it is asked for, so that memory stays small; the drawing is timed apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from labelpenet.data.dataset import Truth
from labelpenet.evaluation import evaluate
from labelpenet.instances import Instances

SIZE = (375, 500)


class Drawn(Mapping[str, Any]):
    """A mapping whose values are drawn when asked for; ``seconds`` adds up the time that takes."""

    def __init__(self, images: int, draw: Any) -> None:
        self.images, self.draw, self.seconds = images, draw, 0.0

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[str]:
        return (str(i) for i in range(self.images))

    def __contains__(self, image: object) -> bool:
        return True

    def __getitem__(self, image: str) -> Any:
        start = time.perf_counter()
        value = self.draw(int(image))
        self.seconds += time.perf_counter() - start
        return value


def boxes_at(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) random boxes of at least 20 pixels a side."""
    height, width = SIZE
    corner = rng.random((count, 2)) * [width - 40, height - 40]
    far = corner + 20 + rng.random((count, 2)) * ([width - 20, height - 20] - corner)
    return np.concatenate([corner, far], 1).round()


def ellipses(boxes: np.ndarray) -> torch.Tensor:
    """(N, H, W) bool: the ellipse inside each box, a shape with as many runs as a real object has."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float32)
    masks = np.zeros((len(boxes), *SIZE), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(np.float32), strict=True):
        mask[:] = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
    return torch.from_numpy(masks)


def instances(rng: np.random.Generator, boxes: np.ndarray, labels: np.ndarray, masks: bool) -> Instances:
    scores = torch.from_numpy(rng.random(len(boxes))).float()
    drawn = ellipses(boxes) if masks else None
    return Instances(torch.from_numpy(boxes).float(), torch.from_numpy(labels), scores, SIZE, drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--detections", type=int, default=100, help="an image")
    parser.add_argument("--masks", type=int, default=0, help="images that have masks")
    parser.add_argument("--protocol", choices=("voc07", "voc12", "coco"), default="voc07")
    options = parser.parse_args()

    def truth(index: int) -> Truth:
        rng = np.random.default_rng(index)
        count = int(rng.integers(1, 6))
        objects = instances(rng, boxes_at(rng, count), rng.integers(0, options.classes, count), index < options.masks)
        return Truth(objects, torch.from_numpy(rng.random(count) < 0.1), torch.zeros(count, dtype=torch.bool))

    def prediction(index: int) -> Instances:
        rng = np.random.default_rng([index, 1])
        objects = truth(index).instances
        invented = options.detections - len(objects)
        near = objects.boxes.numpy().astype(float) + rng.normal(0, 5, (len(objects), 4)).round()
        boxes = np.concatenate([near, boxes_at(rng, invented)])
        labels = np.concatenate([objects.labels.numpy(), rng.integers(0, options.classes, invented)])
        return instances(rng, boxes, labels, index < options.masks)

    predictions, truths = Drawn(options.images, prediction), Drawn(options.images, truth)
    start = time.perf_counter()
    result = evaluate(predictions, truths, [f"class {i}" for i in range(options.classes)], options.protocol)
    seconds = time.perf_counter() - start - predictions.seconds - truths.seconds
    print(f"box mAP {result['box']['mAP']:.4f}, CorLoc {result['box']['CorLoc']:.4f}")
    if "mask" in result:
        print(f"mask mAP@0.5 {result['mask']['mAP@0.5']:.4f}, ABO {result['mask']['ABO']:.4f}")
    print(
        f"{options.images} images x {options.classes} classes x {options.detections} detections, {options.masks} with "
        f"masks, {options.protocol}: {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
