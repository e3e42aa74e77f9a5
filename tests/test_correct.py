"""The story of docs/correct.md with its own commands, shortened: tags, labels, corrections, better labels."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from labelpenet.cli import main
from labelpenet.data import run_folder
from labelpenet.formats import open_tagged
from labelpenet.review.server import Review
from labelpenet.training.inferred import read_inferred
from tests.test_cli import SIDES
from tests.test_docs import ROOT, fences

SHORT = {
    "train": ["--shorten", "0.01", "--device", "cpu", "--cache", "cache", "--set", *SIDES],
    "measure": ["--device", "cpu", "--cache", "cache"],
}


def review(arguments: list[str]) -> None:
    """Stands in for the person before the page: accepts, rejects and drops a photograph each."""
    run, data = map(Path, arguments)
    images = open_tagged(data, "train")
    page = Review.open(run, images, run_folder.review(run))
    kept = dict(enumerate(page.photograph(0)["kept"].values()))
    page.judge(0, "accepted", kept)
    page.judge(1, "rejected", {})
    page.judge(2, "dropped", {})


def test_the_commands_of_the_story_lead_from_tags_to_labels_that_know_the_corrections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("labelpenet.data.proposals._usable_cores", lambda: 1)
    for line in fences((ROOT / "docs" / "correct.md").read_text(encoding="utf-8")):
        words = shlex.split(line)
        if words[:2] == ["python", "benchmarks/corrections.py"]:
            continue  # how the page's table was made: no part of the story
        if words[0] == "python":
            script = words[2].replace("200", "8").replace("60", "4").replace(")", ", size=(96, 96))")
            subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
        elif words[1] == "review":
            review(words[2:])
        else:
            main([*words[1:], *SHORT.get(words[1], [])])
    runs = [Path("runs", name) for name in ("first", "second", "third")]
    first, second, third = (run_folder.read_facts(run) for run in runs)
    assert (first["images"], second["images"], third["images"]) == (8, 7, 8)
    assert "supervision" not in first and second["supervision"] == third["supervision"] == "mixed"
    said = json.loads(run_folder.review(runs[0]).read_text())
    accepted = next(image["image"] for image in said["images"] if image["status"] == "accepted")
    before = read_inferred(runs[0], "module4", 4)[accepted]
    after = read_inferred(runs[1], "module1", 4)[accepted]
    assert len(before) == len(after) and before.masks is not None and after.masks is not None
    assert bool((before.masks == after.masks).all()) and after.weights.tolist() == [1] * len(after)
    assert all(run_folder.results(run).is_file() for run in runs[:2])
