"""A command that is killed at any moment ends as if it had not been; a damaged file is made again or named.

``LABELPENET_KILLS=200 pytest -m slow tests/training/test_survival.py`` kills so often.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
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

# Six photographs and a few steps: the whole chain takes seconds.
TRAIN = (
    "schedule.steps=2", "schedule.warmup=0", "schedule.batch_size=2", "rpn_post_nms_top_n_train=8",
    "rpn_post_nms_top_n_test=8", "rois=8", "cells=1", "mask_width=8", "label.iterations=1", "predict.iterations=1",
    "label.max_attention=8", "predict.max_attention=8", "label.max_masks=8", "predict.max_masks=8",
)  # fmt: skip
SETTINGS = (
    "images.sides=64", "images.test_side=64", "proposals.limit=20", "warm_up.steps=4", "warm_up.batch_size=4",
    *(f"modules.*.{one}" for one in TRAIN), "forward_backward.schedule.steps=2",
)  # fmt: skip
STUDENT = (
    "images.sides=64", "images.test_side=64", "images.longest=128", "network.rois=16", "network.width=16",
    "network.mask_depth=1", "schedule.steps=3", "schedule.warmup=0", "schedule.batch_size=2",
)  # fmt: skip


def commands(year: Path, kills: int) -> list[tuple[list[str], str, int]]:
    """Every command that writes, as `kills` wants them: arguments, what it writes, how often it is killed."""
    run, scenes, photos = "WORLD/run", str(year), str(year / "JPEGImages")
    train = ["--device", "cpu", "--resume", "--checkpoint-minutes", "0"]
    cache, cpu = ["--cache", "WORLD/cache"], ["--device", "cpu"]
    plan: list[tuple[list[str], str, float]] = [
        (["proposals", scenes, "--split", "val", *cache, "--workers", "1"], "cache", 0.04),
        (["train", scenes, "--out", run, "--recipe", "demo", "--backbone", "tiny", *cache, *train,
          "--set", *SETTINGS], "run", 0.4),
        (["forward-backward", run, scenes, "--out", "WORLD/fb", *cache, *train], "fb", 0.12),
        (["distill", run, scenes, "--out", "WORLD/student", *train, "--set", *STUDENT], "student", 0.08),
        (["predict", run, photos, *cpu, *cache, "--out", "WORLD/found.json", "--overwrite"], "found.json", 0.04),
        (["predict", run, photos, *cpu, "--out", "WORLD/parts", "--shard", "1/1"], "parts", 0.1),
        (["merge", "WORLD/parts", "--out", "WORLD/merged.json", "--overwrite"], "merged.json", 0.04),
        (["export", "WORLD/found.json", photos, "--to", "voc", "--out", "WORLD/voc", "--overwrite"], "voc", 0.05),
        (["export", "WORLD/parts", photos, "--to", "yolo", "--out", "WORLD/yolo", "--overwrite"], "yolo", 0.05),
        (["measure", run, scenes, *cpu, *cache], "run/results.json", 0.05),
        (["report", run, "--data", scenes, "--out", "WORLD/report.html", "--overwrite"], "report.html", 0.03),
    ]  # fmt: skip
    return [(arguments, out, max(1, round(part * kills))) for arguments, out, part in plan]


@pytest.fixture(scope="module")
def year(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=N, val=0, size=(64, 80), seed=3)


@pytest.fixture(scope="module")
def finished(year, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(year, run)
    return run


def left(world: Path) -> dict[str, bytes]:
    """What the commands leave that must be the same; a report and a run's own account tell of times."""
    parts = ("*/weights/*", "*/instances/*", "run/predictions/*", "run/results.json", "cache/**/*", "found.json",
             "parts/*", "merged.json", "voc/**/*", "yolo/**/*")  # fmt: skip
    found = {path for part in parts for path in world.glob(part) if path.is_file()}
    return {str(path.relative_to(world)): path.read_bytes() for path in sorted(found)}


@pytest.mark.slow
def test_commands_that_are_killed_again_and_again_leave_bit_for_bit_the_same(tmp_path):
    year = write_scenes(tmp_path / "scenes", train=6, val=2, size=(64, 64), seed=3)
    straight, world = tmp_path / "straight", tmp_path / "world"
    straight.mkdir(), world.mkdir()
    plan = {"commands": commands(year, KILLS), "straight": str(straight), "world": str(world), "seed": 0}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    killing = [sys.executable, "-m", "tests.training.kills", str(tmp_path / "plan.json")]
    done = subprocess.run(killing, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    killed = [line for line in done.stdout.splitlines() if line.startswith("killed ")]
    assert len(killed) == sum(kills for *_, kills in plan["commands"])
    expected, found = left(straight), left(world)
    assert len(expected) > 40 and expected.keys() == found.keys()
    assert not [name for name in expected if found[name] != expected[name]]
    assert (world / "report.html").stat().st_size > 10_000
    strays = [path for path in world.rglob("*") if path.suffix in (".tmp", ".partial", ".part") or ".part" in path.name]
    assert not [path for path in strays if path.is_dir() or path.stat().st_size]


def files(run: Path) -> list[str]:
    """All files of a run but those that nothing reads again."""
    names = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("tensorboard/") and name != ".lock")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_no_damaged_file_of_a_run_is_used_in_silence(year, finished, tmp_path, capsys, caplog, damage):
    expected, fates = results(finished), Counter[str]()
    for index, name in enumerate(files(finished)):
        run = tmp_path / str(index)
        shutil.copytree(finished, run)
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
        said = "".join(capsys.readouterr()) + caplog.text
        caplog.clear()
        told = f"{run / name} is damaged" in said
        unread = name in ("metrics.jsonl", "environment.json") or name.endswith("/step-00000001.pt")
        assert told != unread, name
        fates["made again" if told else "rewritten"] += 1
        shutil.rmtree(run)
    assert fates["made again"] > 10 and fates["refused"] <= 2, fates
