"""A run that is killed at any moment ends as if it had not been; a damaged file of it is made again or named.

``LABELPENET_KILLS=200 pytest -m slow tests/training/test_survival.py`` kills so often.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from labelpenet.data import run_folder
from labelpenet.data.scenes import write_scenes
from labelpenet.errors import InputError
from tests.training.test_features import garble
from tests.training.test_pretrain import results, train

KILLS = int(os.environ.get("LABELPENET_KILLS", "20"))
N = 4

# One interpreter that forks a child for every attempt: to start an interpreter each time would take most of the time.
FORKS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.training.test_pretrain import train
year, run, kills, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
generator, killed = random.Random(0), 0
while True:
    child = os.fork()
    if child == 0:
        try:
            train(year, run, resume=True)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    end = time.monotonic() + generator.uniform(0, seconds)
    while killed < kills and time.monotonic() < end:
        time.sleep(0.002)
        if os.waitpid(child, os.WNOHANG)[0]:
            child = 0
            break
    if child and killed < kills:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        parts = sorted(path.parent.name + "/" + path.name for path in run.rglob("*") if path.is_file())
        print("killed", len(parts), flush=True)
        continue
    status = os.waitpid(child, 0)[1] if child else 0
    if status or killed >= kills:
        sys.exit(status != 0)
    for path in sorted(run.rglob("*"), reverse=True):  # finished too early: once more from the start
        path.unlink() if path.is_file() else path.rmdir()
"""


@pytest.fixture(scope="module")
def year(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=N, val=0, size=(64, 80), seed=3)


@pytest.fixture(scope="module")
def finished(year, tmp_path_factory) -> tuple[Path, float]:
    """A run that nobody disturbed, and how many seconds it took."""
    import torch

    torch.set_num_threads(1)
    run, began = tmp_path_factory.mktemp("finished") / "run", time.monotonic()
    train(year, run)
    return run, time.monotonic() - began


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_the_same(year, finished, tmp_path):
    straight, seconds = finished
    command = [sys.executable, "-c", FORKS, str(year), str(tmp_path / "run"), str(KILLS), str(0.4 * seconds)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed") == KILLS and len(set(done.stdout.split("\n"))) > min(KILLS, 5)
    assert results(tmp_path / "run") == results(straight)
    assert not [path for path in (tmp_path / "run").rglob("*.tmp") if path.stat().st_size]


def files(run: Path) -> list[str]:
    """All files of a run but those that nothing reads again."""
    names = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("tensorboard/") and name != ".lock")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_no_damaged_file_of_a_run_is_used_in_silence(year, finished, tmp_path, capsys, damage):
    straight, _ = finished
    expected, fates = results(straight), Counter[str]()
    for index, name in enumerate(files(straight)):
        run = tmp_path / str(index)
        shutil.copytree(straight, run)
        garble(run / name, damage, random.Random(index).uniform(0.05, 0.95))
        if name.startswith("checkpoints/"):  # they are only read where the finished module is gone
            run_folder.weights(run, name.split("/")[1]).unlink()
        if name.startswith("cache/"):
            run_folder.instances(run, "module1").unlink()
        try:
            train(year, run, resume=True)
        except InputError as error:
            assert str(run) in str(error) and "\n" not in str(error)
            assert "damaged" in str(error)
            fates["refused"] += 1
            continue
        assert results(run) == expected, name
        said = "".join(capsys.readouterr())
        told = f"{run / name} is damaged" in said
        unread = name in ("metrics.jsonl", "environment.json") or name.endswith("/step-00000001.pt")
        assert told != unread, name
        fates["made again" if told else "rewritten"] += 1
        shutil.rmtree(run)
    assert fates["made again"] > 10 and fates["refused"] <= 2, fates
