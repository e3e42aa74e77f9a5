"""benchmarks/training.py from end to end, with the smallest of everything: that its road is open."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"


@pytest.mark.slow
def test_every_stage_and_the_three_loops_are_measured(tmp_path: Path) -> None:
    options = ["--backbone", "tiny", "--recipe", "demo", "--images", "4", "--steps", "3", "--rounds", "1"]
    options += [
        "--threads",
        "1",
        "--cache",
        str(tmp_path),
        "--set",
        "modules.1.schedule.batch_size=4",
        "images.sides=96",
    ]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=True)
    table = done.stdout.split("\n\n", 1)[1]
    for number in (1, 2, 3, 4):
        for use in ("training", "labelling"):
            assert re.search(rf"^module {number}, {use} +[\d.]+ ", table, re.MULTILINE), table
    for name in ("module 1, RoI features", "forward-backward, a phase", "train_stage", "torchvision's Mask R-CNN"):
        assert re.search(rf"^{name} +[\d.]+ ", table, re.MULTILINE), table
    assert table.rstrip().endswith("end with the same weights")
