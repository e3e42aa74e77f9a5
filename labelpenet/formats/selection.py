"""Which of the predictions are exported, and in what form every annotation format can take them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import listing, safe_name, whole_folder, write_bytes
from labelpenet.data.images import upright_file
from labelpenet.errors import InputError
from labelpenet.instances import MIN_SCORE, Instances


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        paths: the files, in the order of writing.
        notes: one line each about what the format cannot hold, as far as this data met it.
        again: photographs whose copies were encoded again, and as what.
    """

    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)


@contextmanager
def new_export(
    out: Path | str, images: Iterable[TaggedImage], overwrite: bool, about: Mapping[str, Any], extend: bool = False
) -> Iterator[tuple[Path, Exported]]:
    """A folder to write an export into, and what to note about it; `whole_folder` says what ``out`` may be.

    Nothing appears at ``out`` before the block is done; the paths noted in it are those that the files then have.
    """
    done = Exported()
    with whole_folder(out, (image.path for image in images), overwrite, about, extend) as folder:
        yield folder, done
    done.paths = [Path(out) / path.relative_to(folder) for path in done.paths]
    if done.again:
        done.notes.append(f"stored again, upright: {listing(done.again, 10)}")


def check_new_split(paths: Iterable[Path], out: Path | str, split: str) -> None:
    """Refuses a split of which an earlier export into ``out`` has written one of the paths."""
    if any(path.exists() for path in paths):
        raise InputError(f"{out}: already holds the split {split}; choose another folder, or replace it (--overwrite)")


def stems(images: Iterable[TaggedImage], taken: Iterable[str] = (), folders: bool = False) -> dict[str, str]:
    """For each image id a file name without suffix, unique also on file systems that ignore case, and not ``taken``.

    The id without the image's suffix, made safe; the second image of the same name gets ``-2`` and so on, and so does
    one whose name would be that of another image's file. With ``folders`` the folders within an id stay folders; else
    all is one plain name.
    """
    used = {name.casefold() for name in taken}
    bases: dict[str, str] = {}
    owned: dict[str, set[str]] = {}
    for image in images:
        whole = image.id.removesuffix(image.path.suffix)
        bases[image.id] = "/".join(map(safe_name, whole.split("/")[-8:])) if folders else safe_name(whole)
        owned[image.id] = {whole.casefold(), image.path.stem.casefold()}
    natural = {base.casefold() for base in bases.values()}  # what gets a number must not take another image's name
    every = set().union(*owned.values())  # a copy of another photograph's name would bring its labels to that one
    names: dict[str, str] = {}
    for own, base in bases.items():
        name, number = base, 1
        while (
            name.casefold() in used
            or (number > 1 and name.casefold() in natural)
            or ({name.casefold(), name.casefold().rsplit("/", 1)[-1]} & every) - owned[own]
        ):
            number += 1
            name = f"{base}-{number}"
        used.add(name.casefold())
        names[own] = name
    return names


def selected(
    predictions: Mapping[str, Instances],
    images: Sequence[TaggedImage],
    min_score: float,
    notes: list[str],
    as_labels: bool = True,
    doubt: bool = True,
) -> Iterator[tuple[TaggedImage, Instances]]:
    """Each image that has a prediction (perhaps an empty one) and its instances to export, in the order of ``images``.

    Left out are instances with a score below ``min_score`` and, counted in notes once all are read, images without a
    prediction, instances without area (no pixel, or a box of no size), which annotation formats refuse, and where a
    format's readers know no ``doubt`` (it holds no scores, or they pass over them) those of score 0: neither object nor
    background. Where they are to be taken ``as_labels``, another note counts the weak ones.
    """
    dropped = doubtful = weak = total = absent = 0
    for image in images:
        found = predictions.get(image.id)
        if found is None:
            absent += 1
            continue
        found = found[found.weights >= min_score]
        if not doubt:
            doubtful += int((found.weights == 0).sum())
            found = found[found.weights > 0]
        whole = (found.boxes[:, 2:] > found.boxes[:, :2]).all(1)
        if found.masks is not None:
            whole &= found.masks.flatten(1).any(1)
        dropped += len(found) - int(whole.sum())
        found = found[whole]
        weak, total = weak + int((found.weights < MIN_SCORE).sum()), total + len(found)
        yield image, found
    if absent:
        notes.append(f"{absent} of {len(images)} photographs are not in the predictions; they are left out")
    if dropped:
        notes.append(f"{dropped} instances without area, or without a mask where others have one, are left out")
    if doubtful:
        notes.append(f"{doubtful} instances of score 0 are left out: doubtful, they would be read as objects")
    if weak and as_labels:
        notes.append(f"{weak} of {total} instances have a score below {MIN_SCORE}; --min-score leaves out weak ones")


def clipped_boxes(instances: Instances) -> torch.Tensor:
    """(N, 4) float64 boxes, cut at the borders of the image."""
    height, width = instances.image_size
    boxes = instances.boxes.double().cpu()
    return torch.stack([boxes[:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], 1)


def mask_arrays(instances: Instances) -> list[np.ndarray | None]:
    """N bool arrays (H, W), or N times None where there are no masks."""
    return [None] * len(instances) if instances.masks is None else list(instances.masks.cpu().numpy())


def objects(instances: Instances) -> Iterator[tuple[int, float, np.ndarray, np.ndarray | None]]:
    """For each instance its label, its score, its box (4,) as `clipped_boxes` has it, and its (H, W) bool mask.

    One of score 0, which is doubtful, has none: its mask may be nothing but its box, which a person would take for an
    outline.
    """
    labels, scores = instances.labels.tolist(), instances.weights.tolist()
    masks = [mask if score else None for mask, score in zip(mask_arrays(instances), scores, strict=True)]
    return zip(labels, scores, clipped_boxes(instances).numpy(), masks, strict=True)


def copy_photograph(image: TaggedImage, place: Path, done: Exported, jpeg: bool = False) -> Path:
    """Copies a photograph to ``place`` with the suffix that belongs to it, and returns the copy's path.

    One that its camera stored turned is stored again, upright, as its labels are: half of the tools that read them
    ignore what the file says about it. ``jpeg`` makes a JPEG file of any. `InputError` where it cannot be read or
    written.
    """
    content, suffix, again = upright_file(image.path, jpeg)
    if again:
        done.again.append(f"{image.path.name} as {suffix.removeprefix('.').upper()}")
    copy = write_bytes(place.with_name(place.name + suffix), content)
    done.paths.append(copy)
    return copy
