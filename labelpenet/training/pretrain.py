"""Cascaded pre-training (sections 3.3, 4.2): the modules one after the other, each on what the one before inferred."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from labelpenet import config
from labelpenet.config import MODULES, Recipe, Schedule
from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.files import write_tensors
from labelpenet.data.images import read_image
from labelpenet.engine.distributed import gather
from labelpenet.engine.log import Progress
from labelpenet.engine.stage import Optimiser, Stage
from labelpenet.engine.trainer import train_stage
from labelpenet.errors import DamagedError
from labelpenet.instances import Instances
from labelpenet.models.cascade import LabelPEnet, View
from labelpenet.training.features import RoIFeatures
from labelpenet.training.inferred import infer_all, read_inferred
from labelpenet.training.supervised import with_masks

if TYPE_CHECKING:
    from labelpenet.training.observe import Observer

Boxes = Mapping[str, np.ndarray]


@dataclass
class Training:
    """What every stage of a run needs.

    Attributes:
        network: the cascade.
        images: photographs and tags: the only supervision, but for ``truths``.
        proposals: (R, 4) boxes by image id.
        run: the run folder.
        seed: of everything random.
        fabric: device, precision, processes.
        resume: whether to continue what the run folder holds.
        checkpoint_minutes: between checkpoints.
        facts: kept in checkpoints; a resumed run must have the same.
        truths: mixed supervision: true objects by image id, which stand in for inferred ones; ``masks`` is None where
            only the boxes are known. Empty in a run on tags.
    """

    network: LabelPEnet
    images: TaggedImages
    proposals: Boxes
    run: Path
    seed: int
    fabric: Fabric
    resume: bool = False
    checkpoint_minutes: float = 5.0
    facts: dict[str, Any] = field(default_factory=dict)
    truths: Mapping[str, Instances] = field(default_factory=dict)

    @cached_property
    def features(self) -> RoIFeatures:
        """Module 1's RoI features; first asked for once the stem is the one that the run trains on."""
        return RoIFeatures(self.run, self.network, self.proposals, self.fabric)

    @property
    def recipe(self) -> Recipe:
        """The network's."""
        return self.network.recipe

    def boxes(self, image: TaggedImage, size: tuple[int, ...]) -> Tensor:
        """The proposals of an image (R, 4) that the recipe keeps."""
        return self.network.select(torch.from_numpy(np.array(self.proposals[image.id])).float(), size)

    def autocast(self) -> Any:
        """The precision of training, for inference."""
        return self.fabric.autocast()


def pretrain(
    training: Training, until: int = 4, say: Callable[[str], None] = print, observer: Observer | None = None
) -> None:
    """Trains modules 1 to ``until``; what is finished already in the run folder is only loaded.

    Raises:
        InputError: see `train_stage` and `infer_all`.
    """
    freeze_stem(training)
    for number in range(1, until + 1):
        train_module(training, number, say=say, observer=observer)


def freeze_stem(training: Training) -> None:
    """Keeps the stem as it is and writes it to the run folder."""
    network = training.network
    for parameter in network.stem.parameters():
        parameter.requires_grad_(False)
    # A resumed run goes on with the stem that it began with, whatever weights this process was started with.
    if not load_trained(training, "stem") and training.fabric.global_rank == 0:
        save_part(network, training.run, "stem")


def train_module(
    training: Training,
    number: int,
    targets: Mapping[str, Instances] | None = None,
    say: Callable[[str], None] = print,
    observer: Observer | None = None,
) -> None:
    """Trains one module and lets it label the training images; loads what is finished already in the run folder.

    Args:
        targets: what modules 2 to 4 learn, by image id; None for what the module before has inferred.
        observer: looks at the module while it is trained, and once it is.

    Raises:
        InputError: see `train_stage` and `infer_all`.
    """
    network, name = training.network, MODULES[number - 1]
    if load_trained(training, name):
        say(f"module {number} ({name}): trained before, loaded")
    else:
        one = stage(training, number, targets)
        train_stage(
            one if observer is None else observer.watch(one, [number]),
            training.run,
            seed=training.seed,
            config=training.facts,
            fabric=training.fabric,
            resume=training.resume,
            checkpoint_minutes=training.checkpoint_minutes,
        )
        if observer is not None:  # before the part is saved, so that an interruption does not pass it over
            observer.conclude(one, [number])
        if training.fabric.global_rank == 0:
            save_part(network, training.run, name)
    training.fabric.barrier()
    label_images(training, number)


def load_trained(training: Training, part: str) -> bool:
    """Loads what the run folder holds of the stem or a module; False, in all processes, if one finds nothing whole.

    A damaged file counts as missing: the stage's last checkpoint has the same weights.
    """
    found, path = False, run_folder.weights(training.run, part)
    try:
        found = training.network.load_part(training.run, part)
    except DamagedError:
        print(f"note: {path} is damaged; it is made again")
    return all(gather(training.fabric.world_size, found))


def save_part(network: LabelPEnet, run: Path, part: str) -> None:
    """Writes ``RUN/weights/PART.safetensors``, whole or not at all."""
    path = run_folder.weights(run, part)
    write_tensors(path, getattr(network, part).state_dict(), "free some space and use --resume")


def label_images(training: Training, number: int) -> None:
    """Lets module ``number`` infer the instances of every training image whose true objects are not known."""
    network, fabric = training.network, training.fabric
    network.eval()
    images = training.images
    share = len(images.images[fabric.global_rank :: fabric.world_size])

    crf = network.recipe.modules[number - 1].label

    def infer(image: TaggedImage) -> Instances:
        truth = training.truths.get(image.id)
        if truth is not None and truth.masks is not None:
            return truth
        features = training.features.known(image) if number == 1 else None
        pixels = read_image(image.path)
        proposals = None
        if network.needs_proposals(number):
            proposals = training.boxes(image, pixels.shape)
        with training.autocast():
            found, _ = network.infer(number, pixels, proposals, image.tags, features)
        return found if truth is None else with_masks(truth, found, pixels, crf)

    done = 0
    with Progress(f"module {number} labels the images", share, 0) as progress:

        def advance(note: str) -> None:
            nonlocal done
            done += 1
            progress.show(done, {})
            if note:
                progress.say(note)

        infer_all(
            training.run,
            f"module{number}",
            images,
            infer,
            fabric.device,
            fabric.global_rank,
            fabric.world_size,
            fabric.barrier,
            advance,
        )


def stage(training: Training, number: int, targets: Mapping[str, Instances] | None = None) -> Stage:
    """The training stage of one module; ``targets`` as in `train_module`."""
    schedule = training.recipe.modules[number - 1].schedule
    images = [image.id for image in training.images.images]
    common: dict[str, Any] = {
        "name": MODULES[number - 1],
        "module": training.network.module(number),
        "steps": schedule.steps,
        "images": images,
        "batch_size": schedule.batch_size,
        "optimiser": optimiser(schedule),
    }
    if number == 1:
        if training.recipe.modules[0].freeze_head:
            training.features.compute_all(training.images.images)
            return Stage(**common, loss=cached_loss(training))
        return Stage(**common, load=load_tagged(training), loss=classification_loss(training))
    if targets is None:
        targets = read_inferred(training.run, f"module{number - 1}", len(training.images.classes))
    return Stage(**common, load=load_targets(training, targets, number), loss=detector_loss(training, number))


def optimiser(schedule: Schedule) -> Optimiser:
    """The schedule in the words of the loop."""
    return Optimiser(
        lr=schedule.lr,
        kind=schedule.kind,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
        milestones=tuple((round(schedule.steps * fraction), factor) for fraction, factor in schedule.decay),
        warmup=schedule.warmup,
        clip=schedule.clip,
    )


# -- module 1 --------------------------------------------------------------------------------------------------------


def present_classes(image: TaggedImage, num_classes: int) -> Tensor:
    """(C,) float, 1 for the classes among the image's tags."""
    present = torch.zeros(num_classes)
    present[list(image.tags)] = 1
    return present


def cached_loss(training: Training) -> Callable[[Any, int], dict[str, Tensor]]:
    """Equation 2 on cached RoI features, meaned over the images of the pass."""
    module, images = training.network.classification, training.images

    def loss(indices: list[int], step: int) -> dict[str, Tensor]:
        total = []
        for index in indices:
            features = training.features.known(images.images[index])
            if features is None:  # the image could not be read
                continue
            x_c, x_p = module(features)
            present = present_classes(images.images[index], len(images.classes)).to(x_c.device)
            total.append(module.loss(x_c, x_p, present))
        return {"multi_label": torch.stack(total).mean()} if total else {}

    return loss


@dataclass
class Sample:
    """A training image as a loss sees it: view, tags (C,), proposals (R, 4) and target in pixels of the view."""

    view: View
    present: Tensor
    proposals: Tensor
    target: Instances | None = None


def _view(training: Training, image: TaggedImage, generator: torch.Generator) -> tuple[View, np.ndarray]:
    choice = training.recipe.images
    pixels = read_image(image.path)
    side = choice.sides[int(torch.randint(len(choice.sides), (1,), generator=generator))]
    flip = choice.flip and bool(torch.rand((), generator=generator) < 0.5)
    return training.network.view(pixels, side, flip), pixels


def load_tagged(training: Training) -> Callable[[list[int], torch.Generator], list[Sample]]:
    """Images, tags and proposals for module 1."""

    def load(indices: list[int], generator: torch.Generator) -> list[Sample]:
        samples = []
        for index in indices:
            image = training.images.images[index]
            view, pixels = _view(training, image, generator)
            boxes = view.boxes(training.boxes(image, pixels.shape))
            samples.append(Sample(view, present_classes(image, len(training.images.classes)), boxes))
        return samples

    return load


def classification_loss(training: Training) -> Callable[[Any, int], dict[str, Tensor]]:
    """Equation 2 through RoI pooling and RoI head."""
    network, module = training.network, training.network.classification

    def loss(samples: list[Sample], step: int) -> dict[str, Tensor]:
        total = []
        for sample in samples:
            stem = network.stem_map(sample.view)
            features = module.features(stem, sample.proposals)
            x_c, x_p = module(features)
            total.append(module.loss(x_c, x_p, sample.present.to(x_c.device)))
        return {"multi_label": torch.stack(total).mean()}

    return loss


# -- modules 2 to 4 --------------------------------------------------------------------------------------------------


def load_targets(
    training: Training, targets: Mapping[str, Instances], number: int
) -> Callable[[list[int], torch.Generator], list[Sample]]:
    """Images and the instances that the module before inferred."""
    wants_masks = number > 2

    def load(indices: list[int], generator: torch.Generator) -> list[Sample]:
        samples = []
        for index in indices:
            image = training.images.images[index]
            view, _ = _view(training, image, generator)
            found = targets[image.id]
            if not wants_masks:
                found = Instances(found.boxes, found.labels, found.weights, found.image_size)
            present = present_classes(image, len(training.images.classes))
            samples.append(Sample(view, present, torch.zeros(0, 4), view.instances(found)))
        return samples

    return load


def detector_loss(training: Training, number: int) -> Callable[[Any, int], dict[str, Tensor]]:
    """Equations 3 and 4 (and the masks' loss), meaned over the images of the pass."""
    network, module = training.network, training.network.module(number)

    def loss(samples: list[Sample], step: int) -> dict[str, Tensor]:
        terms: dict[str, list[Tensor]] = {}
        for sample in samples:
            assert sample.target is not None
            stem = network.stem_map(sample.view)
            own = module.losses(stem, sample.view.pixels, sample.target)  # type: ignore[operator]
            for name, value in own.items():
                terms.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    return loss


# -- the run folder --------------------------------------------------------------------------------------------------


def run_facts(network: LabelPEnet, images: TaggedImages, seed: int, precision: str) -> dict[str, Any]:
    """What ``run.json`` holds and what a resumed run must share."""
    return {
        "classes": list(images.classes),
        "backbone": network.backbone_name,
        "normalisation": network.normalisation,
        "seed": seed,
        "precision": precision,
        "images": len(images.images),
        "tags": digest(f"{image.id}\0{image.tags}".encode() for image in images.images),
        "weights": digest(value.detach().cpu().numpy().tobytes() for value in network.stem.state_dict().values()),
        "recipe": config.to_dict(network.recipe),
    }


def digest(parts: Iterable[bytes]) -> str:
    """A short fingerprint of values that two processes or runs must share."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part + b"\n")
    return found.hexdigest()
