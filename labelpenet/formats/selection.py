"""Which of the predictions are exported, and in what form every annotation format can take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import safe_name, write_bytes
from labelpenet.errors import InputError
from labelpenet.instances import Instances


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        paths: the files, in the order of writing.
        notes: one line each about what the format cannot hold, as far as this data met it.
    """

    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def stems(images: Iterable[TaggedImage]) -> dict[str, str]:
    """For each image id a file name without suffix, unique also on file systems that ignore case.

    The id without the image's suffix, made safe; the second image of the same name gets ``-2`` and so on.
    """
    taken: set[str] = set()
    names: dict[str, str] = {}
    for image in images:
        base = safe_name(image.id.removesuffix(image.path.suffix))
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names[image.id] = name
    return names


def selected(
    predictions: Mapping[str, Instances], images: Sequence[TaggedImage], min_score: float, notes: list[str]
) -> Iterator[tuple[TaggedImage, Instances]]:
    """Each image that has a prediction (perhaps an empty one) and its instances to export, in the order of ``images``.

    Left out are instances with a score below ``min_score`` and, counted in a note once all are read, those without area
    (no pixel, or a box of no size), which annotation formats refuse.
    """
    dropped = 0
    for image in images:
        found = predictions.get(image.id)
        if found is None:
            continue
        found = found[found.weights >= min_score]
        whole = (found.boxes[:, 2:] > found.boxes[:, :2]).all(1)
        if found.masks is not None:
            whole &= found.masks.flatten(1).any(1)
        dropped += len(found) - int(whole.sum())
        yield image, found[whole]
    if dropped:
        notes.append(f"{dropped} instances without area are left out")


def clipped_boxes(instances: Instances) -> torch.Tensor:
    """(N, 4) float64 boxes, cut at the borders of the image."""
    height, width = instances.image_size
    boxes = instances.boxes.double().cpu()
    return torch.stack([boxes[:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], 1)


def mask_arrays(instances: Instances) -> list[np.ndarray | None]:
    """N bool arrays (H, W), or N times None where there are no masks."""
    return [None] * len(instances) if instances.masks is None else list(instances.masks.cpu().numpy())


def copy_photographs(images: Sequence[TaggedImage], names: Mapping[str, str], folder: Path, done: Exported) -> None:
    """Copies the photographs into ``folder`` under ``names``; one that cannot be read becomes a note."""
    for image in images:
        try:
            content = image.path.read_bytes()
        except OSError as error:
            done.notes.append(f"{image.path}: cannot be copied ({error.strerror or error})")
            continue
        done.paths.append(write_bytes(folder / f"{names[image.id]}{image.path.suffix}", content))


def check_class_count(classes: Sequence[str], limit: int = 254) -> None:
    """Refuses more classes than an 8-bit class map holds beside background and *ignore*.

    Raises:
        InputError: more than ``limit`` classes.
    """
    if len(classes) > limit:
        raise InputError(
            f"{len(classes)} classes do not fit an 8-bit PNG, which holds {limit}; export fewer, or to coco"
        )
