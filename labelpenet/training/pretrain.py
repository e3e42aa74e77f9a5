"""Cascaded pre-training (sections 3.3, 4.2): the modules one after the other, each on what the one before inferred."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from labelpenet import config
from labelpenet.config import MODULES, Recipe, RunOptions
from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.files import RESUME, digest, listing, write_tensors
from labelpenet.data.images import read_image
from labelpenet.data.transforms import Batch, View, random_view
from labelpenet.engine.distributed import gather, images_together
from labelpenet.engine.stage import Stage, load_each
from labelpenet.engine.trainer import train_stage
from labelpenet.errors import DamagedError
from labelpenet.instances import Instances
from labelpenet.models.cascade import LabelPEnet
from labelpenet.models.layers import evaluating
from labelpenet.progress import log_notes
from labelpenet.training.features import RoIFeatures
from labelpenet.training.inferred import infer_all, read_inferred
from labelpenet.training.photographs import Answer, find_instances
from labelpenet.training.supervised import with_masks
from labelpenet.training.tags import fit_tags

if TYPE_CHECKING:
    from labelpenet.training.observe import Observer

_log = logging.getLogger(__name__)

Boxes = Mapping[str, np.ndarray]


@dataclass
class Training:
    """What every stage of a run needs.

    Attributes:
        network: the cascade.
        images: photographs and tags: the only supervision, but for ``truths``.
        proposals: (R, 4) boxes by image id.
        run: the run folder.
        fabric: device, precision, processes.
        options: how it runs.
        facts: kept in checkpoints; a resumed run must have the same.
        truths: mixed supervision: true objects by image id, which stand in for inferred ones; ``masks`` is None where
            only the boxes are known. Empty in a run on tags.
    """

    network: LabelPEnet
    images: TaggedImages
    proposals: Boxes
    run: Path
    fabric: Fabric
    options: RunOptions = RunOptions()
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
        return self.network.select(self.proposals[image.id], size)

    def infer(self, number: int, images: Sequence[TaggedImage], pixels: Sequence[np.ndarray]) -> list[Instances]:
        """What module ``number`` passes on for training images of these ``pixels`` (H, W, 3) uint8."""
        network, proposals, features = self.network, None, None
        if network.module(number).needs_proposals:
            proposals = [self.boxes(image, own.shape) for image, own in zip(images, pixels, strict=True)]
            known = [found for found in map(self.features.known, images) if found is not None]
            features = known if len(known) == len(images) else None
        with self.fabric.autocast():
            batch = network.batch(pixels, [image.tags for image in images], proposals, features)
            return [found for found, _ in network.infer(number, batch)]

    def train(self, stage: Stage) -> None:
        """Trains a stage of this run, or continues it; see `train_stage`."""
        train_stage(stage, self.run, self.options, config=self.facts, fabric=self.fabric)


def pretrain(training: Training, until: int = 4, observer: Observer | None = None) -> None:
    """Trains modules 1 to ``until``; what is finished already in the run folder is only loaded. Errors as
    `train_stage`.
    """
    freeze_stem(training)
    for number in range(1, until + 1):
        train_module(training, number, observer=observer)


def freeze_stem(training: Training) -> None:
    """Keeps the stem as it is and writes it to the run folder."""
    network = training.network
    network.stem.requires_grad_(False)
    # A resumed run goes on with the stem that it began with, whatever weights this process was started with.
    if not load_trained(training, "stem") and training.fabric.global_rank == 0:
        save_part(network, training.run, "stem")


def train_module(
    training: Training,
    number: int,
    targets: Mapping[str, Instances] | None = None,
    observer: Observer | None = None,
) -> None:
    """Trains one module and lets it label the training images; loads what is finished already in the run folder.

    Args:
        targets: what modules 2 to 4 learn, by image id; None for what the module before has inferred.
        observer: looks at the module while it is trained, and once it is.

    Raises:
        InputError: as `train_stage` and `infer_all`.
    """
    network, name = training.network, MODULES[number - 1]
    network.untrained = tuple(one for one in network.untrained if one != name)
    if load_trained(training, name):
        _log.info("module %d (%s): trained before, loaded", number, name)
        if getattr(network.module(number).settings, "freeze_head", False):
            training.features.folder.mkdir(parents=True, exist_ok=True)  # if deleted, its features are computed again
    else:
        start_from_before(network, number)
        one = stage(training, number, targets)
        training.train(one if observer is None else observer.watch(one, [number]))
        if number == 1:
            fit_tags_of(training)
        if observer is not None:  # before the part is saved, so that an interruption does not skip it
            observer.conclude(one, [number])
        if training.fabric.global_rank == 0:
            save_part(network, training.run, name)
    training.fabric.barrier()
    label_images(training, number)


def fit_tags_of(training: Training) -> None:
    """Fits module 1's tag classifier to the training photographs (`training.tags`), where the recipe wants one."""
    network = training.network
    if not network.classification.settings.tag_power:
        return

    def features(pixels: np.ndarray) -> Tensor:
        return network.classification.whole(network.batch([pixels]))[0]

    with evaluating(network):
        fit_tags(network.classification.tags, training.images.images, features, training.fabric)


def start_from_before(network: LabelPEnet, number: int) -> None:
    """Copies the weights of the trained module before into the layers of modules 3 and 4 that it has, too, where the
    recipe says so (``start``): what it has learnt need not be learnt again from as many photographs. Not in the paper.

    Args:
        network: whose ``untrained`` modules pass nothing on; changed in place.
        number: of the module that is to be trained, 1 to 4.
    """
    settings = network.module(number).settings
    if getattr(settings, "start", "backbone") == "backbone" or MODULES[number - 2] in network.untrained:
        return
    own, before = network.module(number).state_dict(), network.module(number - 1).state_dict()
    shared = {key: value for key, value in before.items() if key in own and own[key].shape == value.shape}
    network.module(number).load_state_dict(shared, strict=False)


def load_trained(training: Training, part: str) -> bool:
    """Loads what the run folder holds of the stem or a module; False, in all processes, if one finds nothing whole.

    A damaged file counts as missing: the stage's last checkpoint has the same weights.
    """
    found, path = False, run_folder.weights(training.run, part)
    try:
        found = training.network.load_part(training.run, part)
    except DamagedError:
        log_notes(f"{path} is damaged; it is made again")
    return all(gather(training.fabric.world_size, found))


def save_part(network: LabelPEnet, run: Path, part: str) -> None:
    """Writes ``RUN/weights/PART.safetensors``, whole or not at all."""
    path = run_folder.weights(run, part)
    write_tensors(path, getattr(network, part).state_dict(), RESUME)


def label_images(training: Training, number: int) -> None:
    """Lets module ``number`` infer the instances of every training image whose true objects are not known."""
    network, fabric = training.network, training.fabric
    network.eval()
    crf = network.recipe.modules[number - 1].label

    def infer(images: Sequence[TaggedImage], pixels: Sequence[np.ndarray]) -> list[Instances]:
        found, truths = training.infer(number, images, pixels), [training.truths.get(image.id) for image in images]
        pairs = zip(truths, found, pixels, strict=True)
        return [one if truth is None else with_masks(truth, one, own, crf) for truth, one, own in pairs]

    def find(images: Sequence[TaggedImage]) -> Generator[Answer, None, None]:
        known = {name: truth for name, truth in training.truths.items() if truth.masks is not None}
        yield from ((image, known[image.id], "") for image in images if image.id in known)
        rest = [image for image in images if image.id not in known]
        yield from find_instances(infer, rest, network.input_size, fabric.device)

    place = fabric.global_rank, fabric.world_size, fabric.barrier
    infer_all(training.run, f"module{number}", training.images, find, *place)


def labelled(images: TaggedImages, labels: Sequence[Mapping[str, Instances]], fabric: Fabric) -> TaggedImages:
    """The photographs that have labels in all of ``labels``, with a note on the others, which could not be read when
    they were to be labelled: to learn them without would be to learn that they show nothing.
    """
    known = set.intersection(*map(set, labels))
    left = [image.id for image in images.images if image.id not in known]
    if left and fabric.global_rank == 0:
        log_notes(f"{len(left)} photographs have no labels ({listing(left, 3)}): not learnt")
    return images.where(lambda image: image.id in known)


def stage(training: Training, number: int, targets: Mapping[str, Instances] | None = None) -> Stage:
    """The training stage of one module; ``targets`` as in `train_module`."""
    module, schedule = training.network.module(number), training.recipe.modules[number - 1].schedule
    if targets is None and number > 1:
        targets = read_inferred(training.run, f"module{number - 1}", len(training.images.classes))
    if targets is not None:
        training = replace(training, images=labelled(training.images, [targets], training.fabric))
    names = [image.id for image in training.images.images]
    micro_batch = images_together(schedule.batch_size, training.fabric)
    build = partial(Stage, MODULES[number - 1], module, schedule, names, micro_batch=micro_batch)
    if getattr(module.settings, "freeze_head", False):
        training.features.compute_all(training.images.images)
        return build(loss=cached_loss(training))
    load = load_samples(training, targets, module.needs_proposals, module.needs_masks)
    return build(loss=module_loss(training, number), load=load)


# -- what a loss sees ------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """A training image as a loss sees it.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        view: of it.
        tags: its classes.
        proposals: (R, 4) in its pixels; empty where no module needs them.
        target: the instances to learn, in pixels of the view.
        features: (R, D) module 1's RoI features of the view, where they are known.
    """

    image: np.ndarray
    view: View
    tags: tuple[int, ...]
    proposals: Tensor
    target: Instances | None = None
    features: Tensor | None = None


def load_samples(
    training: Training, targets: Mapping[str, Instances] | None = None, proposals: bool = False, masks: bool = False
) -> Callable[[list[int], torch.Generator], list[Sample]]:
    """Images at a scale and mirroring drawn for each, with the proposals and the instances to learn where wanted."""
    choice = training.recipe.images

    def sample(image: TaggedImage, generator: torch.Generator) -> Sample:
        pixels = read_image(image.path)
        side, flip = random_view(choice, generator)
        view, target = training.network.view(pixels, side, flip), None
        if targets is not None:
            found = targets[image.id]
            target = view.instances(found if masks else replace(found, masks=None))
        boxes = training.boxes(image, pixels.shape) if proposals else torch.zeros(0, 4)
        return Sample(pixels, view, image.tags, boxes, target)

    return load_each(training.images.images, sample)


def to_batch(network: LabelPEnet, samples: Sequence[Sample]) -> Batch:
    """The samples as the modules see them, with the stem's map of all, and RoI features if those of all are known."""
    views = [sample.view for sample in samples]
    images, tags, proposals = zip(*((one.image, one.tags, one.proposals) for one in samples), strict=True)
    features = [sample.features for sample in samples if sample.features is not None]
    known = features if len(features) == len(samples) else None
    stem, fine = network.stem_maps(*views)
    return Batch(views, stem, images, tags, proposals, known, fine)


def module_loss(training: Training, number: int) -> Callable[[Any, int], dict[str, Tensor]]:
    """The losses of a module, each a mean over the images given."""
    network = training.network

    def loss(samples: list[Sample], step: int) -> dict[str, Tensor]:
        targets = [sample.target for sample in samples if sample.target is not None]
        return network.module(number).losses(to_batch(network, samples), targets)

    return loss


def cached_loss(training: Training) -> Callable[[Any, int], dict[str, Tensor]]:
    """Module 1's loss on cached RoI features, a mean over the images given that could be read."""
    network = training.network

    def loss(indices: list[int], step: int) -> dict[str, Tensor]:
        images = [training.images.images[index] for index in indices]
        known = [(image.tags, training.features.known(image)) for image in images]
        read = [(tags, features) for tags, features in known if features is not None]
        if not read:
            return {}
        tags, features = zip(*read, strict=True)
        return network.classification.losses(Batch((), torch.zeros(0), tags=tags, features=features))

    return loss


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
