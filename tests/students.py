"""A student that has learnt a few generated scenes, once for all tests that need one."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from labelpenet import config
from labelpenet.data.scenes import write_scenes
from labelpenet.formats import open_annotated
from labelpenet.training.distill import distill
from labelpenet.training.supervised import read_supervision

SIDE = 96
CHOICES = (
    f"images.sides={SIDE}", f"images.test_side={SIDE}", "images.longest=200", "images.flip=false", "network.rois=32",
    "network.width=16", "network.mask_depth=1", "noise.ema=0.9", "schedule.steps=80", "schedule.lr=0.002",
    "schedule.warmup=5",
)  # fmt: skip


@functools.cache
def small_student() -> tuple[Path, Path]:
    """The folder of the student, and the data set (VOC) whose `train` split it learnt from."""
    out = Path(tempfile.mkdtemp(prefix="labelpenet-student"))
    year = write_scenes(out / "scenes", 16, 3, size=(SIDE, SIDE))
    annotated = open_annotated(year, "train")
    truths = read_supervision("full", annotated).truths
    recipe = config.override(config.StudentRecipe(), CHOICES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = {"data": str(year), "split": "train"}
    distill(annotated.tagged, truths, out / "student", recipe, backbone="tiny", device="cpu", source=source)
    torch.set_num_threads(threads)
    return out / "student", year
