"""Small data sets on disk for the tests of the readers."""

from __future__ import annotations

import json
import struct
import zlib
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


def matlab(order: str = "<", compressed: bool = False, **cells: Sequence[Any]) -> bytes:
    """A MATLAB file with these cell arrays of texts and of number arrays."""

    def element(kind: int, content: bytes) -> bytes:
        padding = b"" if kind == 15 else bytes(-len(content) % 8)
        return struct.pack(f"{order}II", kind, len(content)) + content + padding

    def matrix(kind: int, shape: Sequence[int], name: str, content: bytes) -> bytes:
        head = element(6, struct.pack(f"{order}II", kind, 0)) + element(5, struct.pack(f"{order}2i", *shape))
        short = struct.pack(f"{order}I", len(name) << 16 | 1) + name.encode().ljust(4, b"\0")
        return element(14, head + (short if len(name) <= 4 else element(1, name.encode())) + content)

    def cell(value: Any) -> bytes:
        if isinstance(value, str):
            return matrix(4, (1, len(value)), "", element(16, value.encode()))
        return matrix(6, np.shape(value), "", element(9, np.asarray(value, f"{order}f8").tobytes("F")))

    parts = [matrix(1, (len(values), 1), name, b"".join(map(cell, values))) for name, values in cells.items()]
    end = b"\x00\x01IM" if order == "<" else b"\x01\x00MI"
    return bytes(124) + end + b"".join(element(15, zlib.compress(one)) if compressed else one for one in parts)


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
