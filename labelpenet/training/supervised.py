"""More than tags: the fully supervised yardstick, and data sets of which a part is annotated (mixed supervision).

A run on tags never comes here: `train_run` is given a `Supervision` only where the user asked for one, and without one
it holds nothing that leads to a box or a mask.

Shape letters: ``N`` true objects, ``M`` inferred instances, ``H, W`` the photograph.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from labelpenet.calibration.calibrate import box_mask, resize_masks, segment, working_canvas
from labelpenet.config import Calibration, Recipe, change
from labelpenet.data.dataset import AnnotatedImages, TaggedImages, Truth
from labelpenet.data.files import brief, digest, listing, read_names
from labelpenet.errors import InputError, collected
from labelpenet.formats import open_annotated
from labelpenet.formats.corrected import Corrected, Read, read_corrected
from labelpenet.instances import Instances
from labelpenet.training.inferred import Inferred, Rows

Kind = Literal["full", "mixed"]

IN_BOX = 0.7  # the share of its box that an object fills, roughly


@dataclass(frozen=True)
class Supervision:
    """What a run may know beyond tags.

    Attributes:
        kind: ``full``, the yardstick: module 4 alone, on true objects, presented as many images as modules 2 to 4 of
            the cascade; ``mixed``: the cascade, in which true objects stand in for inferred ones where they are known.
        truths: the true objects by image id, weights 1 (crowds 0); ``masks`` is None for an image with boxes only. An
            image that is not there has tags only.
        digest: fingerprint of the truths: a resumed run must have the same.
        notes: what was found, a line each.
        tags: of the photographs that a person has corrected, by image id: the classes of what was left in them.
        dropped: ids of the photographs that a person wants left out.
    """

    kind: Kind
    truths: Mapping[str, Instances]
    digest: str
    notes: tuple[str, ...]
    tags: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` says of it; a run on tags has no such entries."""
        return {"supervision": self.kind, "truth": self.digest}

    def images(self, images: TaggedImages) -> TaggedImages:
        """The images that are trained on, with corrected tags: with full supervision those whose true objects are
        known, else all but those that were dropped."""
        used = (
            replace(image, tags=self.tags.get(image.id, image.tags))
            for image in images.images
            if image.id not in self.dropped and (self.kind == "mixed" or image.id in self.truths)
        )
        return replace(images, images=tuple(used))


def open_supervision(
    kind: Literal["tags", "full", "mixed"],
    data: Path,
    split: str | None,
    images: TaggedImages,
    supervised: Path | None = None,
    corrected: Sequence[Path] = (),
    photographs: Path | None = None,
) -> Supervision | None:
    """What a run may know beyond tags; nothing of it is opened for ``tags``.

    Args:
        data, split: the data set; its annotation is read unless only what was ``corrected`` is to be known.
        images: its photographs that are trained on.
        supervised: a file with the names of the images whose annotation may be read; None for all.
        corrected: files and folders of corrected labels.
        photographs: the folder of the data set's images, where that is another one.

    Raises:
        InputError: choices that do not go together; and as `read_supervision`, `read_corrected`.
    """
    if supervised and kind != "mixed":
        raise InputError("--supervised goes with --supervision mixed; to train on other photographs use --split")
    if corrected and kind != "mixed":
        raise InputError("--corrected goes with --supervision mixed; give both")
    if kind == "tags":
        return None
    known = {name for image in images.images for name in (image.id, image.path.name)}
    listed = read_names(supervised, known.__contains__) if supervised else None
    if corrected:
        annotated = open_annotated(data, split, images.classes, photographs) if supervised else None
        return read_corrections(images, read_corrected(corrected, images), annotated, listed)
    return read_supervision(kind, open_annotated(data, split, images.classes, photographs), listed)


def read_supervision(kind: Kind, annotated: AnnotatedImages, listed: Collection[str] | None = None) -> Supervision:
    """Reads the annotation that a run may use, once and into memory (masks run-length encoded).

    An image whose annotation cannot be read, or that has names of objects but not all their boxes, has tags only: full
    supervision leaves it out.

    Args:
        annotated: the photographs of the split.
        listed: image ids or file names; the annotation of no other image is read. None for all.

    Raises:
        InputError: none of the listed images is in the split, or no annotation can be read.
    """
    readers, notes = _annotations(annotated, listed)
    return _read(kind, annotated.tagged, readers, notes)


def read_corrections(
    images: TaggedImages,
    corrected: Corrected,
    annotated: AnnotatedImages | None = None,
    listed: Collection[str] | None = None,
) -> Supervision:
    """Mixed supervision by what people have corrected: the objects that they left are true, and their classes the tags.

    Args:
        images: the photographs of the split.
        corrected: what people said of some of them.
        annotated: the photographs with annotation of their own, which is used where nobody has corrected it; None for
            none. listed: as `read_supervision` takes it; errors, too.
    """
    readers, notes = _annotations(annotated, listed) if annotated is not None else ({}, [])
    dropped = corrected.dropped
    kept = {name: read for name, read in {**readers, **corrected.truths}.items() if name not in dropped}
    if dropped:
        notes.append(f"{len(dropped)} images are left out, as a person wants it")
    if not kept:
        raise InputError("nothing was accepted in the corrected files: mixed supervision needs at least one photograph")
    used = images.where(lambda image: image.id not in dropped)
    one = _read("mixed", used, kept, [*corrected.notes, *notes])
    known = {name: one.truths[name] for name in corrected.truths if name in one.truths}
    tags = {name: tuple(own.labels[own.weights > 0].unique().tolist()) for name, own in known.items()}
    changed = sum(tags.get(image.id, image.tags) != image.tags for image in images.images)
    said = [f"{len(tags)} corrected images, of {changed} of which the tags change"]
    return replace(one, notes=(*one.notes, *said), tags=tags, dropped=dropped)


def _annotations(annotated: AnnotatedImages, listed: Collection[str] | None) -> tuple[dict[str, Read], list[str]]:
    """What reads the annotation of each image that may be read, and notes."""
    images, notes = annotated.tagged.images, list[str]()
    if listed is not None:
        names, ids = Counter(image.path.name for image in images), {image.id for image in images}
        several = [name for name in listed if names[name] > 1 and name not in ids]
        if several:
            raise InputError(f"{listing(several, 3)} may be several images of the split; list them by their ids")
        images = tuple(
            image
            for image in images
            if image.id in listed or (image.path.name in listed and image.path.name not in ids)
        )
        if not images:
            raise InputError(f"none of the images listed as supervised ({listing(listed, 3)}) is in the split")
        absent = len(listed) - len(images)
        if absent > 0:
            notes.append(f"{absent} of the {len(listed)} images listed as supervised are not in the split")
    return {image.id: partial(annotated.read, image.id) for image in images}, notes


def _read(kind: Kind, images: TaggedImages, readers: Mapping[str, Read], notes: list[str]) -> Supervision:
    """The supervision that ``readers`` give, in the order of the images."""
    rows: dict[str, Rows] = {}
    sizes: dict[str, tuple[int, int]] = {}
    problems, boxes_only = list[str](), 0
    for image in images.where(lambda image: image.id in readers).images:
        with collected(problems):
            truth = readers[image.id]()
            if not truth.complete:  # the object that is missing would be taught as background
                raise InputError(next(note for note in truth.notes if "left out" in note))
            one = true_objects(truth)
            rows[image.id], sizes[image.id] = one.to_coco(image.id), one.image_size
            boxes_only += one.masks is None
    if not rows:
        raise InputError(problems[0])
    fate = "are left out" if kind == "full" else "count as tagged only"
    tagged = len(images.images) - len(rows)
    counts = f"{kind} supervision: {len(rows) - boxes_only} images with masks, {boxes_only} with boxes only"
    notes = [*notes, *brief(problems, f"images {fate} because their annotation cannot be used")]
    notes.append(counts if kind == "full" else f"{counts}, {tagged} with tags only")
    found = digest(json.dumps([name, sizes[name], own]).encode() for name, own in rows.items())
    return Supervision(kind, Inferred(rows, sizes, len(images.classes)), found, tuple(notes))


def true_objects(truth: Truth) -> Instances:
    """The objects of an annotation as training targets, weights 1, and crowd regions, weights 0.

    Difficult objects are kept: left out, they would be taught as background. So would crowd regions, in which no single
    object can be told: they are doubtful. If the mask of any object is empty, the image counts as one with boxes only.
    """
    sides = truth.instances.boxes[:, 2:] - truth.instances.boxes[:, :2]
    kept = (sides > 0).all(1)
    one, single = truth.instances[kept], ~truth.crowd[kept]
    whole = one.masks is not None and bool(one.masks[single].flatten(1).any(1).all())
    return Instances(one.boxes, one.labels, single.float(), one.image_size, one.masks if whole else None)


def presentations(one: Recipe) -> int:
    """How many images modules 2 to 4 of the cascade are presented together in cascaded pre-training."""
    return sum(schedule.steps * schedule.batch_size for schedule in (module.schedule for module in one.modules[1:]))


def fully_supervised(one: Recipe) -> Recipe:
    """The recipe whose module 4 is presented as many images as modules 2 to 4 together, up to half a batch."""
    four = one.modules[3]
    steps = max(1, round(presentations(one) / four.schedule.batch_size))
    return change(one, 4, schedule=replace(four.schedule, steps=steps))


def with_masks(truth: Instances, found: Instances, image: np.ndarray, settings: Calibration) -> Instances:
    """True boxes with masks for them, for an image (H, W, 3) uint8 RGB of which only the boxes are known.

    A box that one of the M inferred instances of its class matches (IoU at least 0.5; the best one) takes that
    instance's mask, cut to the box. For the others the dense CRF decides which pixels of the box are the object's.
    Crowds, of weight 0, come last and fill their boxes.

    Returns:
        The N true objects with masks (N, H, W), none of them empty, on the device of ``found``.
    """
    size = truth.image_size
    truth = truth.to(found.boxes.device)
    found = found[found.weights > 0]  # the mask of a doubtful one fills its box
    if not len(truth):
        return Instances.empty(size, with_masks=True)
    whole = torch.stack([box_mask(box, size) for box in truth.boxes])
    if not bool((single := truth.weights > 0).all()):  # crowds compete with no object for pixels
        crowds = Instances(truth.boxes, truth.labels, truth.weights, size, whole)[~single]
        return Instances.cat([with_masks(truth[single], found, image, settings), crowds])
    index, matched = match(truth, found)
    masks = masks_in_boxes(whole, image, settings) if not bool(matched.all()) else whole.clone()
    if found.masks is not None and bool(matched.any()):
        masks[matched] = found.masks[index[matched]]
    masks &= whole
    empty = ~masks.flatten(1).any(1)
    masks[empty] = whole[empty]
    return Instances(truth.boxes, truth.labels, truth.weights, size, masks)


def match(truth: Instances, found: Instances, iou: float = 0.5) -> tuple[Tensor, Tensor]:
    """(N,) for each true object the inferred instance of its class that overlaps most, and (N,) whether by ``iou``."""
    if not len(found):
        nothing = torch.zeros(len(truth), dtype=torch.long, device=found.boxes.device)
        return nothing, nothing.bool()
    overlap = box_iou(truth.boxes, found.boxes) * (truth.labels[:, None] == found.labels[None])
    best, index = overlap.max(1)
    return index, best >= iou


def masks_in_boxes(boxes: Tensor, image: np.ndarray, settings: Calibration) -> Tensor:
    """Masks (N, H, W) by the dense CRF from filled boxes (N, H, W) bool, which compete for pixels that they share.

    A pixel of a box is the object's with a probability of `IN_BOX`, one outside of it is not: a box says where its
    object ends, not that it fills the box.
    """
    canvas, _ = working_canvas(image, settings.side)
    confidence = IN_BOX * F.interpolate(boxes[None].float(), size=canvas.shape[:2], mode="area")[0]
    even = replace(settings, threshold=0.5, compete="instances")
    return resize_masks(segment(canvas, confidence, even), (image.shape[0], image.shape[1]))
