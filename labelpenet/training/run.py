"""One run from tags to a trained cascade: the function behind ``labelpenet train``."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from labelpenet.config import MODULES, CascadeOptions, Recipe
from labelpenet.data import precomputed, run_folder
from labelpenet.data.dataset import AnnotatedImages, TaggedImages
from labelpenet.data.files import digest, hash_files, listing
from labelpenet.data.proposals import compute_proposals
from labelpenet.engine.distributed import build_fabric, peers, precision_of, together
from labelpenet.engine.sampler import seed_step
from labelpenet.errors import InputError
from labelpenet.models.build import build_backbone
from labelpenet.models.cascade import LabelPEnet
from labelpenet.progress import log_notes
from labelpenet.training.observe import Observer, check_held_out
from labelpenet.training.pretrain import Boxes, Training, freeze_stem, pretrain, run_facts, train_module
from labelpenet.training.supervised import Supervision, fully_supervised
from labelpenet.training.warmup import warm_up

_log = logging.getLogger(__name__)


def train_run(
    images: TaggedImages,
    run: Path,
    recipe: Recipe,
    *,
    backbone: str = "mobilenet_v2",
    weights: Path | None = None,
    until: int = 4,
    source: dict[str, Any] | None = None,
    supervision: Supervision | None = None,
    held_out: AnnotatedImages | None = None,
    options: CascadeOptions = CascadeOptions(),
) -> LabelPEnet:
    """Trains the cascade on photographs and tags, and nothing else: `TaggedImages` hold no box and no mask.

    Args:
        images: the photographs; run: the run folder; recipe: every choice.
        backbone, weights: as `build_backbone` takes them.
        until: last module to train.
        source: where the images came from, kept in ``run.json`` for reports.
        supervision: what is known beyond tags, and what is then trained; None for tags alone.
        held_out: images that are not trained on, to measure the modules on while they are trained; None for none.
        options: how it runs.

    Raises:
        InputError: something the user gave cannot be used; KeyboardInterrupt: the state is saved.
    """
    full = supervision is not None and supervision.kind == "full"
    if full and until != 4:
        raise InputError("full supervision trains module 4 alone; leave --until out")
    if len(images.classes) < 2 and not full:
        raise InputError(
            f"training needs at least two classes, but got only {', '.join(images.classes) or 'none'}: tags tell "
            "classes apart; choose more with --classes, or add photographs of another class"
        )
    if not any(image.tags for image in images.images):
        raise InputError("no image has a tag of the chosen classes; check the tags and --classes")
    check_held_out(images, held_out)
    fabric = build_fabric(options.device, options.devices, options.nodes, options.precision)
    if supervision is not None:
        images = supervision.images(images)
        recipe = fully_supervised(recipe) if full else recipe
    seed_step(options.seed, "initialisation", 0)
    body = build_backbone(backbone, weights)
    network = LabelPEnet(body, images.classes, recipe)
    facts = run_facts(network, images, options.seed, precision_of(fabric))
    if supervision is not None:
        facts |= supervision.facts()
    with open_training(network, images, run, fabric, options, facts, source) as training:
        torch.backends.cudnn.benchmark = False
        if body.untrained is not None:
            body = warm_up(training, body)
            seed_step(options.seed, "initialisation", 1)
            training.network = LabelPEnet(body, images.classes, recipe).to(fabric.device)
        training.network.untrained = MODULES  # until their turn they are random and have no vote
        observer = build_observer(training, held_out, options)
        if supervision is not None and full:
            if fabric.global_rank == 0:
                steps, size = recipe.modules[3].schedule.steps, recipe.modules[3].schedule.batch_size
                _log.info(
                    "module 4 alone: %d image presentations (%d steps of %d), as modules 2 to 4",
                    *(steps * size, steps, size),
                )
            freeze_stem(training)
            train_module(training, 4, supervision.truths, observer=observer)
            return training.network
        if supervision is not None:
            training.truths = supervision.truths
        pretrain(training, until, observer=observer)
        return training.network


@contextlib.contextmanager
def open_training(
    network: LabelPEnet,
    images: TaggedImages,
    run: Path,
    fabric: Fabric,
    options: CascadeOptions,
    facts: Mapping[str, Any],
    source: Mapping[str, Any] | None,
) -> Iterator[Training]:
    """The training of a cascade in its run folder (see `open_run`), on the device, with the images' proposals: those of
    another tool where the options name them. Errors also as `precomputed.read_proposals` and `read_proposals`.
    """
    given = None if options.proposals is None else precomputed.read_proposals(options.proposals, images.images)
    facts = dict(facts)
    if given is not None:
        facts["proposals"] = digest(name.encode() + given[name].tobytes() for name in given)
        log_notes(*given.notes)
    with open_run(run, {**facts, "source": dict(source or {})}, options.resume, images, fabric):
        network.to(fabric.device)
        readable, boxes = read_proposals(images, network.recipe, options.cache, fabric, given)
        shown, left = ({tag for one in part.images for tag in one.tags} for part in (images, readable))
        lost = [images.classes[tag] for tag in sorted(shown - left)]
        if lost and fabric.global_rank == 0:
            log_notes(f"no photograph that can be read shows {listing(lost)}, so nothing is learnt of it")
        yield Training(network, readable, boxes, run, fabric, options, facts)


@contextlib.contextmanager
def open_run(run: Path, facts: Mapping[str, Any], resume: bool, images: TaggedImages, fabric: Fabric) -> Iterator[None]:
    """The run folder, for the processes of this training alone: started, or found to be of the same facts and images.

    Errors as those of `run_folder`; one also where another process of this training is gone. A KeyboardInterrupt says
    what to do.
    """
    with contextlib.ExitStack() as claim:

        def start() -> None:
            if fabric.global_rank:
                return
            claim.enter_context(run_folder.claimed(run))
            run_folder.start_run(run, facts, resume)
            hashes = hash_files([image.path for image in images.images])
            contents = {path: one if isinstance(one, str) else None for path, one in hashes.items()}
            note = run_folder.check_photographs(run, {image.id: contents[image.path] for image in images.images})
            if note:
                log_notes(note)

        try:
            with peers(fabric.world_size):
                together(fabric.world_size, start)
                yield
        except KeyboardInterrupt as interrupt:
            if str(interrupt):
                raise
            line = f"{run}: interrupted; what is finished is kept, continue with --resume"
            raise KeyboardInterrupt(line) from interrupt


def build_observer(training: Training, held_out: AnnotatedImages | None, options: CascadeOptions) -> Observer:
    """What looks at the modules while they are trained; computes the held-out images' proposals if they are missing."""
    boxes = None
    if held_out is not None:
        boxes = read_proposals(held_out.tagged, training.recipe, options.cache, training.fabric)[1]
    return Observer(training, options.observe_minutes, held_out, boxes)


def read_proposals(
    images: TaggedImages, recipe: Recipe, cache: Path | None, fabric: Fabric, given: Boxes | None = None
) -> tuple[TaggedImages, Boxes]:
    """The proposals of the images, computed where the cache does not hold them, and the images that can be read.

    Those ``given`` by another tool take the place of computed ones. An `InputError` where no image can be read.
    """
    boxes, settings, first = given, recipe.proposals, fabric.global_rank == 0
    if boxes is None:
        if fabric.world_size > 1:  # each process its share, into the cache that all of them read
            share = images.images[fabric.global_rank :: fabric.world_size]
            compute_proposals(share, settings, cache, torch.get_num_threads(), progress=first)
            fabric.barrier()
        boxes = computed = compute_proposals(images.images, settings, cache, progress=first)
        log_notes(*(computed.notes if first else ()))
    readable = images.where(lambda image: image.id in boxes)
    if not readable.images:
        raise InputError("no image can be read; see the notes above")
    return readable, boxes
