"""Small data sets on disk for the tests of the readers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Of each image: (name, box as VOC writes it, difficult) an object; None: an image without any object.
OBJECTS: dict[str, list[tuple[str, tuple[int, int, int, int], int]]] = {
    "a": [("cat", (1, 1, 10, 8), 0), ("dog", (11, 5, 30, 20), 0)],
    "b": [("dog", (3, 4, 20, 18), 1)],
    "c": [("bird", (2, 2, 9, 9), 0), ("cat", (12, 6, 31, 23), 0)],
    "d": [],
}
SIZE = (24, 32)


def photograph(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def voc_xml(objects: Sequence[tuple[str, tuple[int, int, int, int], int]]) -> str:
    parts = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox><part><name>head</name></part></object>"
        for name, box, difficult in objects
    ]
    return f"<annotation><size><width>32</width><height>24</height></size>{''.join(parts)}</annotation>"


def voc_kit(root: Path) -> Path:
    """VOCdevkit/VOC2012 with the images a to d, train = a, b, d and val = c; maps for a."""
    year = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main", "SegmentationObject", "SegmentationClass"):
        (year / folder).mkdir(parents=True)
    for seed, (name, objects) in enumerate(OBJECTS.items()):
        photograph(year / "JPEGImages" / f"{name}.jpg", seed=seed)
        (year / "Annotations" / f"{name}.xml").write_text(voc_xml(objects))
    (year / "ImageSets/Main/train.txt").write_text("a\nb\nd\n")
    (year / "ImageSets/Main/val.txt").write_text("c\n")
    (year / "ImageSets/Main/cat_train.txt").write_text("a  1\nb -1\nd -1\n")
    indices = np.zeros(SIZE, np.uint8)
    indices[0:8, 0:10], indices[4:20, 10:30] = 1, 2
    indices[8, 0:10] = 255
    Image.fromarray(indices).save(year / "SegmentationObject/a.png")
    classes = np.array([0, 8, 12], np.uint8)[np.where(indices == 255, 0, indices)]  # cat and dog in VOC's order
    classes[indices == 255] = 255
    Image.fromarray(classes).save(year / "SegmentationClass/a.png")
    return year


def coco_content() -> dict[str, Any]:
    size = {"height": SIZE[0], "width": SIZE[1]}
    return {
        "images": [{"id": 7, "file_name": "x.jpg", **size}, {"id": 9, "file_name": "sub/y.jpg", **size}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}, {"id": 8, "name": "person"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 5,
                "bbox": [2, 3, 10, 8],
                "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]],
                "iscrowd": 0,
            },
            {
                "id": 2,
                "image_id": 7,
                "category_id": 8,
                "bbox": [0, 0, 2, 24],
                "segmentation": {"size": [24, 32], "counts": [0, 48, 720]},
                "iscrowd": 1,
            },
        ],
    }


def coco_set(root: Path, content: Any = None) -> Path:
    """instances.json with images/x.jpg (a cat and a crowd of persons) and images/sub/y.jpg (nothing)."""
    photograph(root / "images" / "x.jpg")
    photograph(root / "images" / "sub" / "y.jpg")
    (root / "instances.json").write_text(json.dumps(coco_content() if content is None else content))
    return root / "instances.json"
