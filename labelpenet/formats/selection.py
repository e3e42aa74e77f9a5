"""Which of the predictions are exported, and in what form every annotation format can take them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import counted, listing, safe_name, whole_folder, write_bytes
from labelpenet.data.images import upright_file
from labelpenet.errors import InputError
from labelpenet.instances import MIN_SCORE, Instances


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        paths: the files, in the order of writing.
        notes: one line each about what the format cannot hold, as far as this data met it.
    """

    paths: list[Path]
    notes: list[str]


@dataclass
class Export:
    """What is to be exported, as `export.export` takes it, and the ``folder`` that gets it.

    ``polygons``, ``outside_data`` and ``url`` are for one format each, which says what they are; ``again`` are the
    photographs whose copies were encoded again, and as what.
    """

    predictions: Mapping[str, Instances]
    images: Sequence[TaggedImage]
    classes: Sequence[str]
    out: Path
    folder: Path
    category_ids: Sequence[int] | None = None
    split: str = "train"
    min_score: float = 0.0
    copy_images: bool = False
    tolerance: float = 0.0
    polygons: bool = False
    outside_data: bool = False
    url: str = "/data/local-files/?d="
    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)

    def write(self, name: str | Path, content: str | bytes) -> None:
        """Writes a file of the folder."""
        content = content.encode() if isinstance(content, str) else content
        self.paths.append(write_bytes(self.folder / name, content))

    def check_new_split(self, paths: Iterable[Path]) -> None:
        """Refuses a split of which an earlier export into the folder has written one of the paths."""
        if any(path.exists() for path in paths):
            raise InputError(
                f"{self.out}: already holds the split {self.split}; choose another folder, or replace it (--overwrite)"
            )

    def copy(self, image: TaggedImage, place: Path, jpeg: bool = False) -> Path:
        """Copies a photograph to ``place`` with the suffix that belongs to it, and returns the copy's path.

        One that its camera stored turned is stored again, upright, as its labels are: half of the tools that read them
        ignore what the file says about it. ``jpeg`` makes a JPEG file of any. `InputError` where it cannot be read or
        written.
        """
        content, suffix, again = upright_file(image.path, jpeg)
        if again:
            self.again.append(f"{image.path.name} as {suffix.removeprefix('.').upper()}")
        self.write(place.with_name(place.name + suffix), content)
        return self.paths[-1]

    def selected(self, as_labels: bool = True, doubt: bool = True) -> Iterator[tuple[TaggedImage, Instances]]:
        """Each image that has a prediction (perhaps an empty one) and its instances to export, in their order.

        Left out are instances with a score below ``min_score`` and, counted in notes once all are read, images without
        a prediction, instances without area (no pixel, or a box of no size), which annotation formats refuse, and where
        a format's readers know no ``doubt`` (it holds no scores, or they pass over them) those of score 0: neither
        object nor background. Where they are to be taken ``as_labels``, another note counts the weak ones.
        """
        dropped = doubtful = weak = total = absent = 0
        for image in self.images:
            found = self.predictions.get(image.id)
            if found is None:
                absent += 1
                continue
            found = found[found.weights >= self.min_score]
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
        weak *= as_labels
        self.notes += counted(
            (absent, f"of {len(self.images)} photographs are not in the predictions; they are left out"),
            (dropped, "instances without area, or without a mask where others have one, are left out"),
            (doubtful, "instances of score 0 are left out: doubtful, they would be read as objects"),
            (weak, f"of {total} instances have a score below {MIN_SCORE}; --min-score leaves out weak ones"),
        )


def exporter(name: str, extend: bool = False) -> Callable[[Callable[[Export], None]], Callable[..., Exported]]:
    """Makes of what fills the folder of an `Export` a function that takes what `export.export` does.

    Nothing appears at ``out`` before all is written, and the paths returned are those that the files then have;
    `whole_folder` says what ``out`` may be, and what ``extend`` is: of another export of the same format and classes.
    """

    def wrap(fill: Callable[[Export], None]) -> Callable[..., Exported]:
        @wraps(fill)
        def write(
            predictions: Mapping[str, Instances],
            images: Sequence[TaggedImage],
            classes: Sequence[str],
            out: Path | str,
            overwrite: bool = False,
            **options: Any,
        ) -> Exported:
            about = {"format": name, "classes": list(classes)} if extend else {"format": name}
            with whole_folder(out, (image.path for image in images), overwrite, about, extend) as folder:
                job = Export(predictions, images, classes, Path(out), folder, **options)
                fill(job)
            if job.again:
                job.notes.append(f"stored again, upright: {listing(job.again, 10)}")
            return Exported([Path(out) / path.relative_to(folder) for path in job.paths], job.notes)

        return write

    return wrap


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


def clipped_boxes(instances: Instances) -> torch.Tensor:
    """(N, 4) float64 boxes, cut at the borders of the image."""
    height, width = instances.image_size
    boxes = instances.boxes.double().cpu()
    return torch.stack([boxes[:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], 1)


def mask_arrays(instances: Instances) -> list[np.ndarray | None]:
    """N bool arrays (H, W), or N times None where there are no masks."""
    return [None] * len(instances) if instances.masks is None else list(instances.masks.cpu().numpy())


def objects(instances: Instances) -> Iterator[tuple[int, float, np.ndarray, np.ndarray | None]]:
    """For each instance its label, its score, its box (4,) as `clipped_boxes` has it, and its (H, W) bool mask, which
    one of score 0, doubtful, lacks: its mask may be nothing but its box, which a person would take for an outline.
    """
    labels, scores = instances.labels.tolist(), instances.weights.tolist()
    masks = [mask if score else None for mask, score in zip(mask_arrays(instances), scores, strict=True)]
    return zip(labels, scores, clipped_boxes(instances).numpy(), masks, strict=True)
