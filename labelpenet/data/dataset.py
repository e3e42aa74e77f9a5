"""What a data set is to the rest of the project: tagged images for training, and truth only for measuring.

The two never meet in one type. `TaggedImages` is all that a weakly supervised run can be given; it holds file names
and tags and has no field, method or back-reference that leads to a box or a mask. `Truth` is what evaluation asks for,
image by image, through `AnnotatedImages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from labelpenet.data.files import brief, counted, listing, nfc
from labelpenet.errors import InputError

if TYPE_CHECKING:  # torch would make every process that computes proposals start 2 seconds later
    from torch import Tensor

    from labelpenet.instances import Instances

T = TypeVar("T")
Classes = Sequence[str] | None  # those that are asked for, in label order; None for all

# Index i + 1 in VOC's class maps.
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class ByImage(Mapping[str, T]):
    """Something of each image by its id, made anew each time that it is asked for (`__getitem__`)."""

    _known: Mapping[str, Any]  # what it is made from

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._known  # without making it


@dataclass(frozen=True)
class TaggedImage:
    """One photograph and what is in it.

    Attributes:
        id: unique name within the data set: the path below its image folder (VOC: the file's stem, as in its lists).
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

    def where(self, keep: Callable[[TaggedImage], bool]) -> TaggedImages:
        """The photographs that ``keep`` says yes to, with the same classes and notes."""
        return replace(self, images=tuple(filter(keep, self.images)))

    def with_classes(self, classes: Sequence[str]) -> TaggedImages:
        """The same photographs in the classes of a run: tags that it does not know are left out, and noted."""
        label = {nfc(name): index for index, name in enumerate(classes)}
        other = [name for name in self.classes if name not in label]
        new = [label.get(name) for name in self.classes]
        images = tuple(
            replace(one, tags=tuple(sorted(tag for old in one.tags if (tag := new[old]) is not None)))
            for one in self.images
        )
        notes = [f"the run does not know {listing(other)}; left out"] if other else []
        return TaggedImages(tuple(classes), images, (*self.notes, *notes))


@dataclass(frozen=True)
class Truth:
    """The annotation of one image.

    Attributes:
        instances: the true objects of the classes asked for, weights 1; ``masks`` is None where the image has none.
        difficult: (N,) bool, VOC's *difficult* flag: neither counted nor penalised.
        crowd: (N,) bool, COCO's ``iscrowd``.
        semantic: (H, W) uint8 class map: 0 background, 1..C the classes, 255 ignore; None where there is none.
        notes: one line each about objects that were cut or left out, and masks that cannot be used.
        complete: whether no object was left out; else what is not annotated here may be one.
    """

    instances: Instances
    difficult: Tensor
    crowd: Tensor
    semantic: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    complete: bool = True


@dataclass(frozen=True)
class AnnotatedImages:
    """Truth for measuring (or for a fully supervised yardstick): never given to a weakly supervised run.

    Attributes:
        tagged: the same images as a weakly supervised run sees them.
        read: ``read(image_id) -> Truth``; raises `InputError` for a damaged annotation.
        categories: for each class its id in COCO files.
        others: the ids of its other categories in COCO files.
        unlisted: ids of images that the annotation does not name, and which so show nothing.
    """

    tagged: TaggedImages
    read: Callable[[str], Truth]
    categories: tuple[int, ...]
    others: tuple[int, ...] = ()
    unlisted: frozenset[str] = frozenset()

    def by_number(self) -> AnnotatedImages:
        """The images in the order of their COCO ids, in which COCO's measure takes equal scores; else as they are."""
        numbers = {image.id: image.number for image in self.tagged.images if image.number is not None}
        if len(numbers) < len(self.tagged.images):
            return self
        images = tuple(sorted(self.tagged.images, key=lambda image: numbers[image.id]))
        return replace(self, tagged=replace(self.tagged, images=images))

    def where(self, keep: Callable[[TaggedImage], bool]) -> AnnotatedImages:
        """As `TaggedImages.where`."""
        return replace(self, tagged=self.tagged.where(keep))

    def truths(self) -> dict[str, Truth]:
        """The truth of every image by id, in the order of the images."""
        return {image.id: self.read(image.id) for image in self.tagged.images}

    def readable_truths(self) -> tuple[dict[str, Truth], tuple[str, ...]]:
        """As `truths`, but a damaged annotation among many costs only its image; with notes on these and of the truths.

        Raises:
            InputError: no annotation can be read.
        """
        notes: list[str] = []
        return dict(self.each(notes)), tuple(notes)

    def each(self, notes: list[str]) -> Iterator[tuple[str, Truth]]:
        """As `readable_truths`, one after the other: they need not fit into memory. Adds the notes in the end."""
        problems: list[str] = []
        remarks: list[str] = []
        masked, boxed = False, 0
        for image in self.tagged.images:
            try:
                truth = self.read(image.id)
            except InputError as error:
                problems.append(str(error))
                continue
            remarks += truth.notes
            boxed += truth.instances.masks is None
            masked |= truth.instances.masks is not None and len(truth.instances) > 0
            yield image.id, truth
        if len(problems) == len(self.tagged.images):
            raise InputError(problems[0] if problems else "the data set holds no image")
        notes += brief(problems, "images are left out because their annotation is damaged")
        notes += brief(remarks, "objects or masks are cut or left out")
        notes += counted((masked * boxed, "images have no true masks: what needs masks is measured on the others"))


Opened = AnnotatedImages | TaggedImages  # the latter where only tags are known


def only_tagged(images: Opened) -> TaggedImages:
    """The images without their truth, if they have any."""
    return images.tagged if isinstance(images, AnnotatedImages) else images


@dataclass(frozen=True)
class NamedImage:
    """What a reader finds of one image before classes are chosen: with the names of what is in it, in any order."""

    id: str
    path: Path
    names: frozenset[str]
    number: int | None = None


def choose_classes(classes: Classes, known: Iterable[str], source: Path) -> tuple[str, ...]:
    """The classes of a run: those asked for, in their order, or all ``known`` ones in alphabetical order. `InputError`:
    a class that ``source`` does not know (the known ones are listed), one named twice, or none.
    """
    names = sorted(set(known))
    for name in names:
        if not name.strip():
            raise InputError(f"{source}: a class without a name; name it")
        if not name.isprintable():  # it would break every table, file and terminal that it reaches
            raise InputError(f"{source}: the class name {name!r} holds unprintable characters; rename it")
    if classes is None:
        if not names:
            raise InputError(f"{source}: no image has a tag; nothing can be learnt from it")
        return tuple(names)
    chosen = tuple(classes)
    if not chosen:
        raise InputError(f"{source}: no class is asked for; known are {listing(names)}")
    known, asked = set(names), set[str]()
    for name in chosen:
        if name not in known:
            raise InputError(f"{source}: unknown class {name!r}; known are {listing(names)}")
        if name in asked:
            raise InputError(f"{source}: class {name!r} is asked for twice; name each once")
        asked.add(name)
    return chosen


def tag_images(
    found: Sequence[NamedImage],
    classes: Classes,
    known: Iterable[str],
    problems: Sequence[str],
    source: Path,
    said: Sequence[str] = (),
) -> TaggedImages:
    """The images of a data set with the chosen classes as tags; other names of an image are left out.

    Args:
        found: the images that can be used, in order.
        classes, known, source: as in `choose_classes`; errors, too.
        problems: one line each about images that cannot be used; if all of them, this is an error.
        said: notes that come before those from here.
    """
    known = set(known)
    classes = choose_classes(classes, known, source) if found else ()
    problems = [*problems, *(f"{source}: unprintable image id {one.id!r}" for one in found if not one.id.isprintable())]
    found = [one for one in found if one.id.isprintable()]
    if not found:
        reason = f" ({problems[0]})" if problems else ""
        raise InputError(f"{source}: no image can be used{reason}")
    label = {name: index for index, name in enumerate(classes)}
    images = tuple(
        TaggedImage(one.id, one.path, tuple(sorted(label[name] for name in one.names if name in label)), one.number)
        for one in found
    )
    notes = brief(problems, f"of {len(found) + len(problems)} images are skipped")
    negatives = sum(not image.tags for image in images)
    notes += counted((negatives, f"of {len(images)} images show none of the classes; they serve as negatives"))
    present = {tag for image in images for tag in image.tags}
    absent = [name for name in classes if label[name] not in present]
    if absent:
        notes.append(f"no image shows {listing(absent)}")
    alike: dict[str, str] = {}
    for name in sorted(known):
        other = alike.setdefault(" ".join(name.lower().split()), name)
        if other != name:
            notes.append(f"{source.name}: {other!r} and {name!r} are two classes; write them alike if they are one")
    return TaggedImages(classes, images, (*said, *notes))


def with_truth(
    tagged: TaggedImages, source: Path, truth: Callable[[TaggedImage], Truth], categories: Sequence[int] | None = None
) -> AnnotatedImages:
    """The images together with what reads their truth; ``categories`` are their classes' COCO ids, None for 1..C."""
    images = {image.id: image for image in tagged.images}

    def read(image_id: str) -> Truth:
        if image_id not in images:
            raise InputError(f"{source}: no image {image_id!r} in this split; check the ids of the predictions")
        return truth(images[image_id])

    return AnnotatedImages(tagged, read, tuple(categories or range(1, len(tagged.classes) + 1)))
