"""Labels that a training is given: those of a run, or of files, which may be several models' opinions.

Shape letters: ``N`` instances, ``M`` doubtful ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from labelpenet.calibration.fusion import fuse
from labelpenet.calibration.nms import confident
from labelpenet.config import Noise
from labelpenet.data import run_folder
from labelpenet.data.dataset import ByImage, TaggedImage, TaggedImages
from labelpenet.data.files import listing
from labelpenet.errors import InputError
from labelpenet.formats.predictions import read_content, read_predictions
from labelpenet.formats.review import is_review, read_review
from labelpenet.formats.rows import Predictions
from labelpenet.instances import Instances
from labelpenet.progress import Progress, silent


class Fused(ByImage[Instances]):
    """The labels of several models, put together when they are asked for (`calibration.fusion`).

    Args:
        opinions: of each model; tags: classes of the images that are known.
        judged: by image id the review in which a person has accepted its labels, which are then no opinion.
    """

    def __init__(
        self,
        opinions: Sequence[Mapping[str, Instances]],
        tags: Mapping[str, tuple[int, ...]],
        judged: Mapping[str, Mapping[str, Instances]] | None = None,
    ):
        self._opinions, self._known, self._judged = opinions, tags, judged or {}

    def __getitem__(self, image: str) -> Instances:
        tags = self._known[image]  # a KeyError for one that no file names
        if image in self._judged:
            return self._judged[image][image]
        return fuse([one[image] for one in self._opinions if image in one], tags)


def read_labels(
    run: Path, paths: Sequence[Path], images: TaggedImages
) -> tuple[Mapping[str, Instances], tuple[str, ...]]:
    """The labels of a run's last module, or of the predictions or COCO files ``paths``; and notes about them.

    Several files are several models' opinions, which are fused, classes of each photograph's tags alone. What a person
    has said on the review page is none: accepted labels stand as they are, photographs that were judged otherwise are
    left out.

    Raises:
        InputError: there are none, or a file cannot be used.
    """
    remedy = "check the path" if paths else "train the run's module 4, or give labels with --labels"
    if not paths:
        paths = [run_folder.instances(run, "module4")]
        run_folder.check_own(run, {image.id: image.path for image in images.images})
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: not there; {remedy}")
        if sum(path.samefile(other) for other in paths if other.exists()) > 1:
            raise InputError(f"{path}: given twice, which would count as two models' opinions; give each file once")
    by_path = {path: read_predictions(path, images, images.classes) for path in paths}
    notes = list(dict.fromkeys(note for one in by_path.values() for note in one.notes))
    if len(paths) == 1:
        (labels,) = by_path.values()
        known = {image.id: [labels] for image in images.images if image.id in labels}
        return labels, (*notes, *_not_found(known, images), *_beyond_tags(paths[0], labels, images))
    judged, refused = _verdicts(by_path, images)
    opinions = [one for one in by_path.values() if not any(one is own for own in judged.values())]
    known = {
        image.id: [judged[image.id]] if image.id in judged else [one for one in opinions if image.id in one]
        for image in images.images
        if image.id not in refused and any(image.id in one for one in by_path.values())
    }
    tags = {image.id: image.tags for image in images.images if image.id in known}
    if judged:
        notes.append(f"{len(judged)} photographs are learnt as a person has accepted them, whatever other files say")
    return Fused(opinions, tags, judged), (*notes, *_not_found(known, images))


def _verdicts(
    by_path: Mapping[Path, Predictions], images: TaggedImages
) -> tuple[dict[str, Predictions], frozenset[str]]:
    """What was said on the review page, where that wrote some of the files: of each photograph that was accepted the
    file, and those that were not accepted. `InputError` where a photograph stands in two.
    """
    accepted: dict[str, Predictions] = {}
    refused: set[str] = set()
    for path, labels in by_path.items():
        if not path.is_file() or not is_review(read_content(path)):
            continue
        said, _ = read_review(path, images.images, images.classes)
        own = {name for name, one in said.items() if one.status != "accepted"}
        if twice := sorted({*labels, *own} & {*accepted, *refused}):
            raise InputError(f"{path}: {listing(twice, 3)} stands in another review too; leave one of them out")
        accepted |= dict.fromkeys(labels, labels)
        refused |= own
    return accepted, frozenset(refused)


def _beyond_tags(path: Path, labels: Predictions, images: TaggedImages) -> list[str]:
    """A note where photographs have labels of classes that are not among their tags: they are learnt all the same."""
    other = [len(set(labels.labels(one.id).tolist()) - set(one.tags)) for one in images.images if one.id in labels]
    count = sum(map(bool, other))
    if not count:
        return []
    return [f"{path}: {count} photographs have labels of classes that their tags do not name; they are learnt, too"]


def _not_found(known: Mapping[str, Sequence[Predictions]], images: TaggedImages) -> list[str]:
    """A note where photographs have no label of one of their tags, as after a high ``--min-score``; ``known`` has the
    files that count for each."""
    tags = {one.id: one.tags for one in images.images}
    found = {name: {label for one in own for label in one.labels(name).tolist()} for name, own in known.items()}
    count = sum(not labels.issuperset(tags[name]) for name, labels in found.items())
    return [f"{count} photographs have no label of one of their tags: it is learnt as background"] * bool(count)


class Given(ByImage[Instances]):
    """Labels as the modules of a cascade learn them: those that a student would ignore (`sort_out`) have weight 0."""

    def __init__(self, labels: Mapping[str, Instances]):
        self._known = labels
        self._read = functools.lru_cache(maxsize=1)(self._doubted)  # four modules ask for the same photograph

    def __getitem__(self, image: str) -> Instances:
        return self._read(image)

    def _doubted(self, image: str) -> Instances:
        labels = self._known[image]
        return labels.weighted(labels.weights * _sure(labels, Noise()))


def check_size(image: TaggedImage, pixels: np.ndarray, *labels: Instances) -> None:
    """`InputError` where the photograph (H, W, 3) has another size than any of its labels, which then lie elsewhere."""
    if any(len(one) and one.image_size != pixels.shape[:2] for one in labels):
        raise InputError(f"{image.path}: has another size than its labels; label it anew")


def sort_out(labels: Instances, noise: Noise) -> tuple[Instances, Tensor]:
    """The instances that are taught, and the boxes (M, 4) of the doubtful ones (see `config.Noise`)."""
    sure = _sure(labels, noise)
    taught = labels[sure]
    if not noise.weighted:
        taught = taught.weighted(torch.ones(len(taught)))
    return taught, labels.boxes[~sure]


def _sure(labels: Instances, noise: Noise) -> Tensor:
    """(N,) bool: neither doubtful nor without area; of weight 0 the best of its class is doubtful, too."""
    sides = labels.boxes[:, 2:] - labels.boxes[:, :2]
    return confident(labels, noise.keep, noise.nested) & (sides > 0).all(1) & (labels.weights > 0)


def read_all(
    labels: Mapping[str, Instances], images: Sequence[TaggedImage], first: bool = True
) -> Iterator[tuple[str, Instances]]:
    """The image ids and labels of photographs, one after another; the ``first`` process shows how far it is, for to put
    several files together takes a while.
    """
    with Progress("reading labels", len(images), log=None if first else silent) as progress:
        for image in progress.tracked(images):
            yield image.id, labels[image.id]


def fingerprint(name: str, one: Instances) -> bytes:
    """What tells a photograph's labels from others, for a digest: image id, boxes, classes, weights and masks."""
    values = [value.numpy() for value in (one.boxes, one.labels, one.weights)]
    if one.masks is not None:
        values.append(np.packbits(one.masks.numpy()))
    return name.encode() + b"".join(value.tobytes() for value in values)
