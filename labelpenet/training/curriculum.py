"""Forward-backward learning with curriculum (sections 3.3 and 4.2): all modules and the stem, end to end.

An iteration shows the same photographs to two phases, each an update of all weights. In the *forward* phase modules 1
to 4 are trained in order, each on the instances that the one before has just inferred. In the *backward* phase module 4
only infers; its instances train module 3 with full supervision, module 3's boxes train module 2, and module 2's
detections label the proposals of module 1 for a single-label loss beside its multi-label one. The stem's map is
computed once a phase and shared; what a phase infers, it infers with the weights that it began with.

With validated labels (`training.validated`) the same module infers for the same other one, but a teacher's, for both
phases at once, and its instances are checked before they are learnt. With given labels nothing is inferred for another
module: all four learn what a better network, or a person, says of the photographs.
"""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from labelpenet import config
from labelpenet.config import MODULES, CascadeOptions, Recipe
from labelpenet.data import run_folder
from labelpenet.data.dataset import AnnotatedImages, TaggedImage, TaggedImages
from labelpenet.data.files import digest, read_json
from labelpenet.data.images import read_image
from labelpenet.data.transforms import mirror, random_view
from labelpenet.engine.distributed import build_fabric, gather, images_together, precision_of
from labelpenet.engine.sampler import stream_seed
from labelpenet.engine.stage import Stage, load_each
from labelpenet.errors import InputError
from labelpenet.instances import Instances
from labelpenet.models.cascade import LabelPEnet, read_cascade
from labelpenet.models.detection import covered
from labelpenet.training import validated
from labelpenet.training.inferred import read_inferred
from labelpenet.training.labels import Given, check_size, fingerprint, read_all
from labelpenet.training.observe import check_held_out
from labelpenet.training.pretrain import (
    Sample,
    Training,
    fit_tags_of,
    label_images,
    labelled,
    load_trained,
    run_facts,
    save_part,
    to_batch,
)
from labelpenet.training.run import build_observer, open_training

STAGE = "forward-backward"
WATCHED = 12  # photographs whose labels are compared with the cascade's
GUARD = 50  # iterations between two comparisons


def forward_backward(
    images: TaggedImages,
    start: Path,
    run: Path,
    recipe: Recipe | None = None,
    *,
    labels: Mapping[str, Instances] | None = None,
    source: dict[str, Any] | None = None,
    held_out: AnnotatedImages | None = None,
    options: CascadeOptions = CascadeOptions(),
) -> LabelPEnet:
    """Trains a cascade further by forward-backward learning and writes it, with new instances, as a run of its own.

    Args:
        images: the photographs and tags; start: run folder of the cascade; run: the run folder to write.
        recipe: every choice; that of ``start`` if None.
        labels: what all modules learn instead of what another one infers: instances with masks by image id, weights
            their confidences. A photograph that is not there is left out; one that ``start`` has not seen may be there.
        source, held_out, options: as for `train_run`.

    Raises:
        InputError: ``start`` is not a run of these classes with all four modules and (where none are given) labels of
            the photographs, or something else that was given cannot be used; KeyboardInterrupt: the state is saved.
    """
    facts = read_cascade(start)
    if list(images.classes) != list(facts["classes"]):
        raise InputError(
            f"{start}: was trained on {', '.join(facts['classes'])}, but the photographs are tagged with "
            f"{', '.join(images.classes)}; forward-backward learning needs the same classes"
        )
    known = facts.get("supervision", "tags")
    if known != "tags" and not (known == "labels" and labels is not None):
        raise InputError(
            f"{start}: was trained with {known} supervision, but forward-backward learning knows tags alone (or "
            "labels, if --labels gives some again); start it from a run on tags"
        )
    if "proposals" in facts and options.proposals is None:
        raise InputError(f"{start}: was trained on another tool's proposals; give them again with --proposals")
    check_held_out(images, held_out)
    recipe = recipe or config.from_dict(facts["recipe"])
    if labels is None and recipe.forward_backward.labels == "given":
        raise InputError("there are no given labels to learn; give them with --labels")
    if labels is None and recipe.forward_backward.labels == "validated" and recipe.forward_backward.share is None:
        raise InputError("validated labels need a teacher; choose --set forward_backward.share=0.4, say")
    fabric = build_fabric(options.device, options.devices, options.nodes, options.precision)
    own: dict[str, Any] = {}
    if labels is not None:
        images, own["labels"] = with_labels(images, labels, fabric.global_rank == 0)
        own["supervision"] = "labels"  # so that report and model card do not say that tags alone were learnt
        recipe = replace(recipe, forward_backward=replace(recipe.forward_backward, labels="given"))
    network = LabelPEnet.from_run(start, recipe=recipe)
    for number in range(1, len(MODULES) + 1):
        network.require(number)
    anchors = read_anchors(start, images) if labels is None else (Given(labels),) * len(MODULES)
    images = labelled(images, anchors, fabric)
    weights = digest(value.numpy().tobytes() for value in network.state_dict().values())
    own = {**run_facts(network, images, options.seed, precision_of(fabric)), "start": weights, **own}
    with open_training(network, images, run, fabric, options, own, source) as training:
        observer = build_observer(training, held_out, options)
        parts = ("stem", *MODULES)
        if not all(load_trained(training, part) for part in parts):
            one = stage(training, anchors)
            training.train(observer.watch(one, range(1, len(MODULES) + 1)))
            fit_tags_of(training)  # of the stem and the head that there are now
            observer.conclude(one, range(1, len(MODULES) + 1))
            if fabric.global_rank == 0:
                for part in parts:
                    save_part(network, run, part)
        fabric.barrier()
        for number in range(1, len(MODULES) + 1):
            label_images(training, number)
        return network


Anchors = Sequence[Mapping[str, Instances]]
"""What modules 1 to 4 of the cascade inferred, or are given to learn, by image id."""


def with_labels(images: TaggedImages, labels: Mapping[str, Instances], first: bool = True) -> tuple[TaggedImages, str]:
    """The photographs that have labels, and the labels' digest; `InputError` where no label is there, or no mask.

    ``first`` as for `read_all`.
    """
    taught = images.where(lambda image: image.id in labels)
    prints, count = [], 0
    for name, own in read_all(labels, taught.images, first):  # once: several files are put together as they are read
        if len(own) and own.masks is None:
            raise InputError(f"{name}: its labels have no masks, which modules 3 and 4 learn; give some, or none")
        prints.append(fingerprint(name, own))
        count += int((own.weights > 0).sum())
    if not count:
        raise InputError("no photograph has a label surer than 0; check the labels, the split and the classes")
    return taught, digest(prints)


def read_anchors(start: Path, images: TaggedImages) -> Anchors:
    """The labels of the run ``start``; `InputError` where they are damaged, or a photograph is none of its own."""
    run_folder.check_own(start, {image.id: image.path for image in images.images})
    anchors = tuple(read_inferred(start, f"module{number + 1}", len(images.classes)) for number in range(len(MODULES)))
    listed = run_folder.photographs(start)
    known = set.intersection(*map(set, anchors)).union(read_json(listed) if listed.is_file() else ())
    missing = [image.id for image in images.images if image.id not in known]
    if missing:
        raise InputError(
            f"{start}: has no labels of {len(missing)} of the photographs, such as {missing[0]}; give those that it was"
            " trained on (--split)"
        )
    return anchors


@dataclass
class Shown(Sample):
    """A sample with the photograph's ``id`` and what the cascade's modules inferred, or were given, in its pixels."""

    id: str = ""
    anchors: tuple[Instances, ...] = ()


def stage(training: Training, anchors: Anchors) -> Stage:
    """Forward-backward learning as the loop sees it: each phase of an iteration is a step on the same photographs."""
    choice = training.recipe.forward_backward
    schedule = choice.schedule
    network = training.network
    network.stem.requires_grad_(choice.train_stem)
    phases = {"both": (forward, backward), "forward": (forward,), "backward": (backward,)}[choice.phases]
    count = len(phases)
    teacher = None if choice.share is None else copy.deepcopy(network).requires_grad_(False).eval()
    asked = teacher or network
    labels: dict[tuple[int, str], list[Instances]] = {}

    def validate(one: Shown, iteration: int) -> list[Instances]:
        """The teacher does not move within an iteration, so both phases have the same labels."""
        if (iteration, one.id) not in labels:
            for old in [key for key in labels if key[0] != iteration]:
                del labels[old]
            asked.eval()
            labels[iteration, one.id] = validated.label(
                asked, one.image, one.tags, one.proposals, one.anchors, choice.enter, choice.doubt
            )
            network.train()
        return labels[iteration, one.id]

    def loss(samples: list[Shown], step: int) -> dict[str, Tensor]:
        taught: Labels = None
        if choice.labels == "validated":
            taught = [validate(one, step // count) for one in samples]
        elif choice.labels == "given":
            taught = [one.anchors for one in samples]
        return phases[step % count](network, samples, taught)

    return Stage(
        name=STAGE,
        module=network,
        schedule=replace(schedule, steps=schedule.steps * count, warmup=schedule.warmup * count),
        images=[image.id for image in training.images.images],
        loss=loss,
        load=load(training, anchors),
        micro_batch=images_together(schedule.batch_size, training.fabric),
        repeat=count,
        ema=None if choice.share is None else choice.share ** (1 / schedule.steps),
        teacher=teacher,
        guard=guard(training, asked, anchors),
        guard_steps=GUARD * count,
    )


def guard(training: Training, asked: LabelPEnet, anchors: Anchors) -> Callable[[], tuple[dict[str, float], str | None]]:
    """How far the labels of modules 2 to 4 have left the cascade's, on a few photographs that the seed chooses.

    With given labels: how far they are from those, which they are to come nearer; no bound.
    """
    learning, fabric = training.recipe.forward_backward, training.fabric
    bound = None if learning.labels == "given" else learning.drift
    tagged = [image for image in training.images.images if image.tags]
    chosen = random.Random(stream_seed(training.options.seed, STAGE, 0, use="drift")).sample(
        tagged, min(WATCHED, len(tagged))
    )

    def look() -> tuple[dict[str, float], str | None]:
        asked.eval()
        rows: dict[int, list[validated.Comparison]] = {2: [], 3: [], 4: []}
        for image in chosen[fabric.global_rank :: fabric.world_size]:
            own = {number: anchors[number - 1][image.id] for number in rows}
            try:
                pixels = read_image(image.path)
                check_size(image, pixels, *own.values())
            except InputError:  # whoever loads it for training says so
                continue
            with fabric.autocast():  # as the anchors were inferred
                batch = asked.batch([pixels], [image.tags])
                inferred = {number: asked.infer(number, batch)[0][0] for number in rows}
            for number, anchor in own.items():
                found = inferred[number]
                rows[number].append(validated.compare(found[found.weights > 0], anchor[anchor.weights > 0]))
        shares = gather(fabric.world_size, rows)
        figures: dict[str, float] = {}
        problem: str | None = None
        for number in rows:
            together = [one for share in shares for one in share[number]]
            if together:
                moved = validated.drift(together)
                figures |= {f"drift/module{number}_{key}": value for key, value in moved.items()}
                problem = problem or (validated.beyond(number, moved, bound) if bound else None)
        return figures, f"stopped, for {problem}; what was within the bound is kept" if problem else None

    return look


def load(training: Training, anchors: Anchors) -> Callable[[list[int], torch.Generator], list[Shown]]:
    """Photographs and proposals at a scale and mirroring drawn for each."""
    choice, learning = training.recipe.images, training.recipe.forward_backward

    def one(image: TaggedImage, generator: torch.Generator) -> Shown:
        pixels = read_image(image.path)
        boxes = training.boxes(image, pixels.shape)
        side, flip = random_view(choice, generator)
        if learning.labels == "inferred":
            if flip:
                # The photograph itself is mirrored, for what the modules infer is in its pixels.
                pixels = np.ascontiguousarray(pixels[:, ::-1])
                boxes = mirror(boxes, pixels.shape[1])
            return Shown(pixels, training.network.view(pixels, side), image.tags, boxes, id=image.id)
        labels = tuple(module[image.id] for module in anchors)
        check_size(image, pixels, *labels)
        zoom = learning.zoom ** (2 * float(torch.rand((), generator=generator)) - 1)
        seen = validated.recolour(pixels, learning.colours, generator)
        view = training.network.view(seen, round(side * zoom), flip)
        return Shown(pixels, view, image.tags, boxes, id=image.id, anchors=labels)

    return load_each(training.images.images, one)


Labels = Sequence[Sequence[Instances]] | None


class Phase:
    """What the two phases share: the photographs with their stem map, what a module infers on it, what it loses.

    Args:
        labels: what modules 1 to 4 are taken to infer for each photograph; None to let them infer.
    """

    def __init__(self, network: LabelPEnet, samples: Sequence[Sample], labels: Labels = None):
        self.network, self.samples, self.labels = network, samples, labels
        self.batch = to_batch(network, samples)

    def infer(self, number: int) -> list[Instances]:
        """What module ``number`` passes on, in pixels of each photograph; without gradients, without dropout."""
        if self.labels is not None:
            return [one[number - 1] for one in self.labels]
        self.network.eval()
        try:
            own = self.batch
            batch = replace(own, stem=own.stem.detach(), fine=None if own.fine is None else own.fine.detach())
            return [found for found, _ in self.network.infer(number, batch)]
        finally:
            self.network.train()
            torch.clear_autocast_cache()  # torch 2.9 would give the losses the weights cast here, without gradients

    def classify(self) -> list[tuple[Tensor, Tensor]]:
        """Module 1's ``x^c`` (R, C + 1) and ``x^p`` (R, C) of each photograph, for its losses.

        Where stem, tail and RoI head do not learn, the samples keep their RoI features, which are then those of the
        other phase, too.
        """
        module = self.network.classification
        learns = _learns(module.head)
        # Behind a frozen RoI head the features of hundreds of RoIs would send the stem a gradient at great cost. They
        # are also those of inference, for a head that does not learn needs no dropout.
        module.head.train(learns)
        with torch.set_grad_enabled(learns):
            features = module.features(self.batch)
        if not learns:
            self.batch = replace(self.batch, features=features)
            if not _learns(self.network.stem, module.tail):
                for sample, own in zip(self.samples, features, strict=True):
                    sample.features = own
        return [module(one) for one in features]

    def learn(self, number: int, targets: Sequence[Instances]) -> Tensor:
        """The loss of module 2, 3 or 4 on instances in pixels of each photograph."""
        module = self.network.module(number)
        wanted = targets if module.needs_masks else [replace(target, masks=None) for target in targets]
        seen = [view.instances(target) for view, target in zip(self.batch.views, wanted, strict=True)]
        return torch.stack([value.float() for value in module.losses(self.batch, seen).values()]).sum()


def _learns(*modules: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def forward(network: LabelPEnet, samples: Sequence[Sample], labels: Labels = None) -> dict[str, Tensor]:
    """The forward phase of some photographs: the loss of each module on what the one before has just inferred."""
    phase = Phase(network, samples, labels)
    terms = {"forward_1": network.classification.multi_label(phase.classify(), phase.batch.tags)}
    for number in (2, 3, 4):
        terms[f"forward_{number}"] = phase.learn(number, phase.infer(number - 1))
    return terms


def backward(network: LabelPEnet, samples: Sequence[Sample], labels: Labels = None) -> dict[str, Tensor]:
    """The backward phase of some photographs: the losses of modules 3, 2 and 1 on what the next one infers."""
    phase = Phase(network, samples, labels)
    certain = [found.weighted((found.weights > 0).float()) for found in phase.infer(4)]
    terms = {"backward_3": phase.learn(3, certain), "backward_2": phase.learn(2, phase.infer(3))}
    scores = phase.classify()
    beta, single = network.recipe.forward_backward.beta, []
    for sample, found, (x_c, _) in zip(samples, phase.infer(2), scores, strict=True):
        own = proposal_labels(sample.proposals, found, beta)
        single.append(network.classification.single_label_loss(x_c, own.to(x_c.device)))
    terms["backward_1_multi"] = network.classification.multi_label(scores, phase.batch.tags)
    terms["backward_1_single"] = torch.stack(single).mean()
    return terms


def proposal_labels(proposals: Tensor, found: Instances, beta: float) -> Tensor:
    """Section 3.3: the class of each proposal (R,), 0 for background and 1 + class index otherwise.

    Args:
        proposals: (R, 4).
        found: module 2's detections in the same pixels. Background that one of weight 0 covers is left out: -1.
        beta: IoU above which a proposal belongs to the detection that it overlaps most.
    """
    proposals, boxes, sure = proposals.cpu().float(), found.boxes.cpu().float(), found.weights.cpu() > 0
    labels = torch.zeros(len(proposals), dtype=torch.long)
    if bool(sure.any()):
        overlap, which = box_iou(proposals, boxes[sure]).max(1)
        labels = torch.where(overlap > beta, found.labels.cpu()[sure][which] + 1, 0)
    return torch.where((labels == 0) & covered(proposals, boxes[~sure]), -1, labels)
