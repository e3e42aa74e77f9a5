"""What a data set is to the rest of the project: tagged images for training, and truth only for measuring.

The two never meet in one type. `TaggedImages` is all that a weakly supervised run can be given; it holds file names and
tags and has no field, method or back-reference that leads to a box or a mask. `Truth` is what evaluation asks for, image
by image, through `AnnotatedImages`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from labelpenet.instances import Instances


@dataclass(frozen=True)
class TaggedImage:
    """One photograph and what is in it.

    Attributes:
        id: unique name within the data set (VOC: the file's stem; COCO: the image id as text; folder: relative path).
        path: the image file.
        tags: ascending class indices, from 0; empty for an image that shows none of the classes.
        number: the id that COCO files use for the image, where the data set has one.
    """

    id: str
    path: Path
    tags: tuple[int, ...]
    number: int | None = None


@dataclass(frozen=True)
class TaggedImages:
    """Photographs with tags: the only supervision of a weakly supervised run.

    Attributes:
        classes: names of the C foreground classes, in label order.
        images: the photographs, in a fixed order.
        notes: one line each about what was skipped or looked odd while reading (bad files, images without a tag).
    """

    classes: tuple[str, ...]
    images: tuple[TaggedImage, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Truth:
    """The annotation of one image.

    Attributes:
        instances: the true objects of the classes asked for, weights 1; ``masks`` is None where the image has none.
        difficult: (N,) bool, VOC's *difficult* flag: neither counted nor penalised.
        crowd: (N,) bool, COCO's ``iscrowd``.
        semantic: (H, W) uint8 class map: 0 background, 1..C the classes, 255 ignore; None where there is none.
    """

    instances: Instances
    difficult: Tensor
    crowd: Tensor
    semantic: np.ndarray | None = None


@dataclass(frozen=True)
class AnnotatedImages:
    """Truth for measuring (or for a fully supervised yardstick): never given to a weakly supervised run.

    Attributes:
        tagged: the same images as a weakly supervised run sees them.
        read: ``read(image_id) -> Truth``; raises `InputError` for a damaged annotation.
        categories: for each class its id in COCO files.
    """

    tagged: TaggedImages
    read: Callable[[str], Truth]
    categories: tuple[int, ...]

    def truths(self) -> dict[str, Truth]:
        """The truth of every image by id, in the order of the images."""
        return {image.id: self.read(image.id) for image in self.tagged.images}
