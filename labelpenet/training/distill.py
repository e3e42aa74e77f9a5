"""Distillation: a student learns from a run's labels; the function behind ``labelpenet distill``.

What makes labels of a network fit for another one: the best instance of every tag and all that are about as sure are
taught, weighed by their confidence, and the doubtful rest is neither object nor background; RoIs whose loss
stays large after a fifth of the steps leave the loss, for there the label is likely to be wrong; the result is the
average of the weights over many steps. Tags are right: in the end they teach what a photograph as a whole looks
like, and with the labels what a class's pixels do.

Shape letters: ``N`` instances, ``h, w`` the network's input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labelpenet import config
from labelpenet.calibration.maps import full_precision
from labelpenet.calibration.sharpen import area_means
from labelpenet.config import Images, Noise, RunOptions, StudentRecipe
from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.files import RESUME, digest, read_tensors, write_tensors
from labelpenet.data.images import read_image
from labelpenet.data.transforms import View, random_view, scaled_size, shrink
from labelpenet.engine.distributed import build_fabric, gather, images_together, precision_of
from labelpenet.engine.sampler import seed_step
from labelpenet.engine.stage import Stage, load_each
from labelpenet.engine.trainer import train_stage
from labelpenet.errors import InputError
from labelpenet.instances import Instances
from labelpenet.models.layers import evaluating
from labelpenet.models.student import KIND, Lesson, Student, build_body, fitted
from labelpenet.progress import log_notes
from labelpenet.training.labels import check_size, fingerprint, read_all, sort_out
from labelpenet.training.run import open_run
from labelpenet.training.tags import fit_pixels, fit_tags

ALONE = 20
"""Photographs that show a class alone, from which on its cells are learnt from such photographs only."""

NO_OBJECT = 0.1
"""Share of a cell that an object covers at most where it counts as background; from half on it counts as object."""


def distill(
    images: TaggedImages,
    labels: Mapping[str, Instances],
    out: Path,
    recipe: StudentRecipe,
    *,
    backbone: str,
    weights: Path | None = None,
    source: Mapping[str, Any] | None = None,
    supervision: str = "labels",
    options: RunOptions = RunOptions(),
) -> Student:
    """Trains a student on labels and writes it to a folder, or continues what the folder holds.

    Args:
        images: the photographs; labels: their instances by image id, confidences as weights. A photograph that is not
            there is not trained on; one without instances shows nothing; one without masks teaches boxes and classes.
        out: the student's folder; recipe: every choice.
        backbone, weights: as `models.student.build_body` takes them.
        source, options: as `train_run` takes them.
        supervision: ``labels``, or ``full`` where the labels are the truth; kept in ``run.json``.

    Raises:
        InputError: something the user gave cannot be used; KeyboardInterrupt: the state is saved.
    """
    taught = images.where(lambda image: image.id in labels)
    if not any((labels[image.id].weights > 0).any() for image in taught.images):
        raise InputError("no photograph has a label surer than 0; check the labels, the split and the classes")
    if all(not len(one) or one.masks is None for one in (labels[image.id] for image in taught.images)):
        raise InputError("no label has a mask, and a student learns masks, too; give labels with masks")
    fabric = build_fabric(options.device, options.devices, options.nodes, options.precision)
    seed_step(options.seed, "initialisation", 0)
    body, normalisation = build_body(backbone, weights)
    student = Student(body, images.classes, recipe, backbone, normalisation)
    facts = {
        "kind": KIND,
        "classes": list(images.classes),
        "backbone": backbone,
        "normalisation": student.normalisation,
        "network": student.description(),
        "seed": options.seed,
        "precision": precision_of(fabric),
        "supervision": supervision,
        "images": len(taught.images),
        "labels": digest(fingerprint(*one) for one in read_all(labels, taught.images, fabric.global_rank == 0)),
        "recipe": config.to_dict(recipe),
    }
    files = {part: run_folder.weights(out, part) for part in (*fitted(recipe), KIND)}
    with open_run(out, {**facts, "source": dict(source or {})}, options.resume, taught, fabric):
        whole = [_is_whole(path) for path in files.values()]
        if not all(map(all, gather(fabric.world_size, whole))):
            lessons = stage(student, taught, labels, images_together(recipe.schedule.batch_size, fabric))
            train_stage(lessons, out, options, config=facts, fabric=fabric)
            with evaluating(student):
                if student.tags is not None:
                    fit_tags(student.tags, taught.images, student.whole, fabric)
                if student.pixels is not None:
                    fit_pixels(student.pixels, taught.images, cells_of(student, taught, labels), fabric)
            for part, path in files.items() if fabric.global_rank == 0 else ():
                own = student.plain_state() if part == KIND else student.get_submodule(part).state_dict()
                write_tensors(path, own, RESUME)
            fabric.barrier()
    return Student.from_run(out, fabric.device)


def _is_whole(path: Path) -> bool:
    """Whether a file of weights is there as it was written: a damaged one is made again, as the cascade's are."""
    try:
        return path.is_file() and bool(read_tensors(path))
    except (OSError, ValueError):
        log_notes(f"{path} is damaged; it is made again")
        return False


def cells_of(
    student: Student, images: TaggedImages, labels: Mapping[str, Instances]
) -> Callable[[TaggedImage], tuple[Tensor, Tensor] | None]:
    """From a photograph to what its cells teach a `models.pixels.PixelClassifier`, seen as in prediction: features
    (K, h, w), and (C, h, w) 1 in an instance that is taught, 0 outside of all, -1 where nothing is known. None where
    an instance has no mask.

    Outlines of several classes in one photograph are in doubt, so a class that `ALONE` photographs show alone has its
    objects from those. `InputError` where a photograph cannot be read, or has another size than its labels.
    """
    recipe, classes = student.recipe, range(len(student.classes))
    still = replace(recipe.images, sides=(cast(int, recipe.images.test_side),), flip=False)
    lonely = Counter(image.tags[0] for image in images.images if len(image.tags) == 1)

    def one(image: TaggedImage) -> tuple[Tensor, Tensor] | None:
        pixels, own = read_image(image.path), labels[image.id]
        check_size(image, pixels, own)
        shown = lesson(pixels, own, still, recipe.noise, torch.Generator())
        target, masks = shown.target, shown.target.masks
        if masks is None:
            masks = torch.zeros(len(target), *target.image_size, dtype=torch.bool)
        if not masks.flatten(1).any(1).all():
            return None
        features, stride = student.cells(shown.pixels.to(student.device))
        size = (features.shape[-2], features.shape[-1])
        found = torch.zeros(len(classes), *size)
        union = torch.stack([masks[target.labels == label].any(0) for label in classes]).float()
        with full_precision(union.device):
            shares = area_means(union, (size[0] * stride, size[1] * stride), size)
        for label, share in enumerate(shares):
            value = -1.0 if len(image.tags) > 1 and lonely[label] >= ALONE else 1.0
            found[label] = torch.where(share > 0.5, value, torch.where(share < NO_OBJECT, 0.0, -1.0))
        return features.cpu(), found

    return one


def stage(student: Student, images: TaggedImages, labels: Mapping[str, Instances], micro_batch: int = 1) -> Stage:
    """The student's training, ``micro_batch`` images at a time."""
    recipe = student.recipe
    schedule, noise = recipe.schedule, recipe.noise

    def one(image: TaggedImage, generator: torch.Generator) -> Lesson:
        pixels, own = read_image(image.path), labels[image.id]
        check_size(image, pixels, own)
        return lesson(pixels, own, recipe.images, noise, generator)

    def loss(lessons: list[Lesson], step: int) -> dict[str, Tensor]:
        late = step >= noise.limit_from * schedule.steps
        return student.losses(lessons, noise.limit if late else None)

    return Stage(
        name=KIND,
        module=student,
        schedule=schedule,
        images=[image.id for image in images.images],
        loss=loss,
        load=load_each(images.images, one),
        micro_batch=micro_batch,
        ema=average_decay(noise.ema, schedule.steps),
        ema_from_start=False,
    )


def average_decay(ema: float | None, steps: int) -> float | None:
    """The decay of the averaged weights: ``ema``, but never a longer memory than an eighth of the steps.

    Of 1,600 steps an average over 500 reached back to where the learning rate was still high: its box mAP@.5 was 4.5
    points below that of the last weights (docs/studies.md).
    """
    return None if ema is None else min(ema, max(0.0, 1 - 8 / steps))


def lesson(image: np.ndarray, labels: Instances, images: Images, noise: Noise, generator: torch.Generator) -> Lesson:
    """A photograph (H, W, 3) uint8 RGB and its labels as they are taught once: at a drawn size, perhaps mirrored."""
    side, flip = random_view(images, generator)
    taught, doubtful = sort_out(labels, noise)
    height, width = scaled_size(image.shape, side, images.longest)
    small = np.ascontiguousarray(shrink(image, (height, width)))
    pixels = torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255
    # as torchvision's own transform resizes, so that the student sees in training what it sees later
    pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
    scale = width / image.shape[1], height / image.shape[0]
    view = View(pixels.flip(-1) if flip else pixels, scale, flip)
    return Lesson(view.pixels[0], view.instances(taught), view.boxes(doubtful))
