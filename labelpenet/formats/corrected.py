"""Labels that a person has corrected, as they come: files of the review page, or of any tool whose format is read."""

import filecmp
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from labelpenet.data.dataset import AnnotatedImages, TaggedImage, TaggedImages, Truth
from labelpenet.data.files import listing, read_json
from labelpenet.data.images import image_size
from labelpenet.errors import InputError, told
from labelpenet.formats.open import open_annotated
from labelpenet.formats.review import is_review, read_review
from labelpenet.formats.rows import copy_name, plain_name
from labelpenet.instances import Instances

Read = Callable[[], Truth]


@dataclass(frozen=True)
class Corrected:
    """What people said of some photographs of a data set: by image id what reads the objects that its corrector left,
    the ids of the photographs that are not to be trained on, and a line about each thing that was left out.
    """

    truths: Mapping[str, Read]
    dropped: frozenset[str]
    notes: tuple[str, ...]


def read_corrected(paths: Sequence[Path], images: TaggedImages) -> Corrected:
    """Finds the photographs that were corrected and what is known of them.

    A review file gives the photographs that were accepted and those that were dropped. Any other file or folder gives
    every photograph that it lists, also one without objects.

    Args:
        paths: files of `labelpenet review`, and files or folders that `open_annotated` reads.
        images: the photographs that are trained on; those of a file are told by their path, else by their file's name.

    Raises:
        InputError: a file cannot be read, or knows no photograph or class of ours, or one is corrected twice.
    """
    truths: dict[str, Read] = {}
    dropped: set[str] = set()
    notes: list[str] = []
    for path in paths:
        content = read_json(path) if path.is_file() and path.suffix.lower() == ".json" else None
        read = _read_review if is_review(content) else _read_annotated
        found, gone, said = read(path, images)
        if not found and not gone:
            raise InputError(f"{path}: says nothing of the photographs that are trained on; check the file and --split")
        twice = sorted(({*found, *gone}) & {*truths, *dropped})
        if twice:
            raise InputError(f"{path}: {listing(twice, 3)} stands in another corrected file too; leave one of them out")
        truths |= found
        dropped |= gone
        notes += said
    return Corrected(truths, frozenset(dropped), tuple(notes))


def _read_review(path: Path, images: TaggedImages) -> tuple[dict[str, Read], set[str], list[str]]:
    reviewed, notes = read_review(path, images.images, images.classes)
    by_id = {image.id: image for image in images.images}

    def read(name: str) -> Truth:
        one = reviewed[name]
        none = torch.zeros(len(one.rows), dtype=torch.bool)
        return Truth(_checked(one.instances(len(images.classes)), by_id[name]), none, none)

    accepted = [name for name, one in reviewed.items() if one.status == "accepted"]
    readers = {name: _named(partial(read, name), path, name) for name in accepted}
    return readers, {name for name, one in reviewed.items() if one.status == "dropped"}, notes


def _read_annotated(path: Path, images: TaggedImages) -> tuple[dict[str, Read], set[str], list[str]]:
    root = Path(os.path.commonpath([image.path.parent.absolute() for image in images.images]))
    opened: list[tuple[AnnotatedImages, list[tuple[TaggedImage, TaggedImage]]]] = []
    problems: list[InputError] = []
    for home in (None, root):  # with photographs of its own, else ours
        try:
            found = open_annotated(path, None, None, home)
            opened.append((found, _matched(found.tagged.images, images.images)))
        except InputError as error:
            problems.append(error)
    if not opened:
        raise problems[-1]
    annotated, pairs = max(opened, key=lambda one: len(one[1]))
    tagged = annotated.tagged.where(lambda image: image.id not in annotated.unlisted)
    pairs = [(theirs, ours) for theirs, ours in pairs if theirs.id not in annotated.unlisted]
    labels = torch.tensor([images.classes.index(name) if name in images.classes else -1 for name in tagged.classes])
    strangers = [name for name in tagged.classes if name not in images.classes]
    if len(strangers) == len(tagged.classes):
        raise InputError(f"{path}: none of its classes ({listing(strangers)}) is among {listing(images.classes)}")
    notes = [f"{path}: its objects of {listing(strangers)} are left out: no class of that name"] if strangers else []
    if annotated.unlisted:
        notes.append(f"{path}: of its photographs those without a label file count as not corrected")
    absent = len(tagged.images) - len(pairs)
    if absent:
        notes.append(f"{path}: {absent} of its {len(tagged.images)} photographs are not trained on, or several fit")
    readers = {
        ours.id: _named(partial(_renamed, annotated, theirs, ours, labels), path, ours.id) for theirs, ours in pairs
    }
    return readers, set(), [*tagged.notes, *notes]


def _matched(theirs: Sequence[TaggedImage], ours: Sequence[TaggedImage]) -> list[tuple[TaggedImage, TaggedImage]]:
    """Pairs of the same photograph: the same file, else the only one of its name on both sides, else of the name that
    an export gives a copy. Where two differ in their suffix, or their copies in nothing, content alone tells a copy.
    """
    files = {os.path.realpath(image.path): image for image in ours}
    stems = Counter(image.path.stem.casefold() for image in ours)
    named = {image.path.name: image for image in ours if stems[image.path.stem.casefold()] == 1}
    copies = Counter(map(copy_name, ours))
    copied = {copy_name(image): image for image in ours if copies[copy_name(image)] == 1}
    names = Counter(image.path.name for image in theirs)
    alike = [Counter(map(copy_name, theirs)), Counter(plain_name(image.path.stem) for image in theirs)]
    fitting: dict[str, list[TaggedImage]] = {}
    for image in ours:
        fitting.setdefault(copy_name(image), []).append(image)
    pairs: dict[str, tuple[TaggedImage, TaggedImage]] = {}
    for image in theirs:
        same = files.get(os.path.realpath(image.path))
        plain = plain_name(image.path.stem)
        # of one name copies get numbers
        called = (name for name in (copy_name(image), plain, re.sub(r"-\d+$", "", plain)) if name in fitting)
        rivals = {one.id: one for one in (*fitting.get(next(called, ""), []), named.get(image.path.name)) if one}
        doubtful = len(rivals) > 1 and not all(one.path.name in names for one in rivals.values())
        if same is None and doubtful:
            # a rival that another of theirs is called as is that one's
            free = (one for one in rivals.values() if one.path.name == image.path.name or one.path.name not in names)
            same = _same_content(image, free)
        elif same is None and names[image.path.name] == 1:
            same = named.get(image.path.name)
        for count, name in zip(alike, (copy_name(image), plain), strict=True):
            if same is None and not doubtful and count[name] == 1:
                same = copied.get(name)
        if same is not None:
            pairs.setdefault(same.id, (image, same))
    return list(pairs.values())


def _same_content(image: TaggedImage, rivals: Iterable[TaggedImage]) -> TaggedImage | None:
    """Of the rivals the one with the image's content; of several the one of its name, else none."""
    same = [one for one in rivals if filecmp.cmp(image.path, one.path, shallow=False)]
    own = [one for one in same if one.path.name == image.path.name]
    return next((found[0] for found in (own, same) if len(found) == 1), None)


def _renamed(annotated: AnnotatedImages, theirs: TaggedImage, ours: TaggedImage, labels: torch.Tensor) -> Truth:
    """The truth of a photograph with our labels, without objects of other classes."""
    truth = annotated.read(theirs.id)
    known = labels[truth.instances.labels] >= 0
    one = truth.instances[known]
    one.labels = labels[one.labels]
    difficult, crowd = truth.difficult[known], truth.crowd[known]
    return replace(truth, instances=_checked(one, ours), difficult=difficult, crowd=crowd, semantic=None)


def _checked(one: Instances, image: TaggedImage) -> Instances:
    """The instances, if they were drawn on a photograph of this size."""
    size, drawn = image_size(image.path), tuple(one.image_size)
    if drawn != size:
        raise InputError(f"corrected at {drawn[1]} x {drawn[0]} pixels, but the photograph has {size[1]} x {size[0]}")
    return one


def _named(read: Read, path: Path, name: str) -> Read:
    """The same, but its errors say which file and photograph they are about."""
    return told(lambda error: f"{path}: {name}: {error}; correct it again or take it out of the file", InputError)(read)
