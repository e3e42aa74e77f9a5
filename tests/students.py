"""Runs that several tests need: a student that has learnt a few generated scenes, a cascade that has learnt nothing."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from labelpenet import config
from labelpenet.data import run_folder
from labelpenet.data.scenes import write_scenes
from labelpenet.formats import open_annotated
from labelpenet.models.build import build_backbone
from labelpenet.models.cascade import MODULES, LabelPEnet
from labelpenet.models.student import KIND
from labelpenet.training.distill import distill
from labelpenet.training.pretrain import save_part
from labelpenet.training.supervised import read_supervision

SIDE = 96
CHOICES = (
    f"images.sides={SIDE}", f"images.test_side={SIDE}", "images.longest=200", "images.flip=false", "network.rois=32",
    "network.width=16", "network.mask_depth=1", "noise.ema=0.9", "schedule.steps=80", "schedule.lr=0.002",
    "schedule.warmup=5",
)  # fmt: skip


@functools.cache
def small_student() -> tuple[Path, Path]:
    """A folder of the student, and the data set (VOC) whose `train` split it learnt from.

    The first process of a test session trains it; each has a copy of its own.
    """
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # the same for all processes
    home = Path(tempfile.gettempdir(), f"labelpenet-{session}") if session else Path(tempfile.mkdtemp())
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        year = write_scenes(home / "scenes", 16, 3, size=(SIDE, SIDE))
        if not run_folder.weights(home / "student", KIND).is_file():
            annotated = open_annotated(year, "train")
            truths = read_supervision("full", annotated).truths
            recipe = config.override(config.StudentRecipe(), CHOICES)
            source = {"data": str(year), "split": "train"}
            options = config.RunOptions(resume=(home / "student").exists(), device="cpu")
            distill(annotated.tagged, truths, home / "student", recipe, backbone="tiny", source=source, options=options)
    own = Path(tempfile.mkdtemp(prefix="labelpenet-student"), "student")
    return shutil.copytree(home / "student", own), year


def random_run(run: Path, classes: Sequence[str]) -> Path:
    """A run folder of the demo's recipe and the tiny backbone with random weights, which find one instance a class."""
    torch.manual_seed(0)
    recipe = config.override(config.recipe("demo"), ["modules.3.predict.per_class=1", "modules.4.predict.per_class=1"])
    network = LabelPEnet(build_backbone("tiny", pretrained=False), classes, recipe)
    facts = {"classes": list(classes), "backbone": "tiny", "normalisation": network.normalisation}
    run.mkdir()
    run_folder.start_run(run, {**facts, "recipe": config.to_dict(network.recipe)}, False)
    for part in ("stem", *MODULES):
        save_part(network, run, part)
    return run
