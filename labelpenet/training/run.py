"""One run from tags to a trained cascade: the function behind ``labelpenet train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from labelpenet.config import Recipe
from labelpenet.data.dataset import TaggedImages
from labelpenet.data.proposals import compute_proposals, default_cache
from labelpenet.errors import InputError
from labelpenet.models.backbones import build_backbone
from labelpenet.models.cascade import LabelPEnet, proposal_settings
from labelpenet.training.loop import seed_step
from labelpenet.training.machine import build_fabric
from labelpenet.training.pretrain import Training, pretrain, run_facts, start_run
from labelpenet.training.warmup import warm_up


def train_run(
    images: TaggedImages,
    run: Path,
    recipe: Recipe,
    *,
    backbone: str = "mobilenet_v2",
    weights: Path | None = None,
    until: int = 4,
    resume: bool = False,
    seed: int = 0,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    precision: str = "auto",
    cache: Path | None = None,
    checkpoint_minutes: float = 5.0,
    source: dict[str, Any] | None = None,
) -> LabelPEnet:
    """Trains the cascade on photographs and tags, and nothing else: `TaggedImages` hold no box and no mask.

    Args:
        images: the photographs; run: the run folder; recipe: every choice.
        backbone, weights: as `build_backbone` takes them.
        until: last module to train; resume: continue what the folder holds; seed: of everything random.
        device, devices, nodes, precision: as `build_fabric` takes them.
        cache: folder of the proposals' cache; None for the user's.
        source: where the images came from, kept in ``run.json`` for reports.

    Raises:
        InputError: something the user gave cannot be used; KeyboardInterrupt: the state is saved.
    """
    if len(images.classes) < 2:
        raise InputError(
            f"training needs at least two classes, but the data set has {len(images.classes)}: tags tell classes apart"
        )
    if not any(image.tags for image in images.images):
        raise InputError("no image has a tag of the chosen classes; check the tags and --classes")
    fabric = build_fabric(device, devices, nodes, precision)
    seed_step(seed, "initialisation", 0)
    plug = build_backbone(backbone, weights)
    network = LabelPEnet(plug, images.classes, recipe)
    facts = run_facts(network, images, seed, str(fabric._precision.precision))
    if fabric.global_rank == 0:
        start_run(run, {**facts, "source": source or {}}, resume)
    fabric.barrier()
    network.to(fabric.device)
    boxes = compute_proposals(
        images.images, proposal_settings(recipe), cache or default_cache(), progress=fabric.global_rank == 0
    )
    for note in boxes.notes if fabric.global_rank == 0 else ():
        print(f"note: {note}")
    readable = tuple(image for image in images.images if image.id in boxes)
    if not readable:
        raise InputError("no image can be read; see the notes above")
    images = TaggedImages(images.classes, readable, images.notes)
    training = Training(network, images, boxes, run, seed, fabric, resume, checkpoint_minutes, facts)
    torch.backends.cudnn.benchmark = False
    if plug.untrained is not None:
        plug = warm_up(training, plug)
        seed_step(seed, "initialisation", 1)
        training.network = LabelPEnet(plug, images.classes, recipe).to(fabric.device)
    pretrain(training, until)
    return training.network
