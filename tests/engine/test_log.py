import errno
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from labelpenet.engine.log import (
    MetricsLog,
    memory_mb,
    read_metrics,
    write_environment,
)
from labelpenet.errors import InputError
from labelpenet.progress import Progress, describe, duration


def log_steps(run_dir, stage, steps, rows=(), start=0):
    metrics = MetricsLog(run_dir, stage, list(rows), start)
    for step in steps:
        metrics.write({"step": step, "loss/total": 1.0 / step})
    metrics.close()
    return metrics.rows


def test_rows_are_appended_and_read_back(tmp_path):
    log_steps(tmp_path, "module1", (10, 20))
    log_steps(tmp_path, "module2", (10,))
    assert [(row["stage"], row["step"]) for row in read_metrics(tmp_path)] == [
        ("module1", 10),
        ("module1", 20),
        ("module2", 10),
    ]


def test_resuming_drops_rows_beyond_the_checkpoint_and_half_lines(tmp_path):
    log_steps(tmp_path, "module1", (10,))
    rows = log_steps(tmp_path, "module2", (10, 20, 30))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "module2", "st')
    log_steps(tmp_path, "module2", (20, 30), rows=rows[:1], start=15)
    assert [(row["stage"], row["step"]) for row in read_metrics(tmp_path)] == [
        ("module1", 10),
        ("module2", 10),
        ("module2", 20),
        ("module2", 30),
    ]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_lost_file_is_rebuilt_from_the_checkpoint(tmp_path):
    rows = log_steps(tmp_path, "module1", (10, 20))
    (tmp_path / "metrics.jsonl").unlink()
    log_steps(tmp_path, "module1", (30,), rows=rows, start=20)
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path, monkeypatch):
    rows = log_steps(tmp_path, "module1", (10, 20, 30))
    later = time.time() + 1  # TensorBoard orders its files by the second; within one, number 10 comes before number 9
    monkeypatch.setattr(time, "time", lambda: later)
    log_steps(tmp_path, "module1", (20, 30, 40), rows=rows[:1], start=15)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "module1"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [10, 20, 30, 40]
    assert events.Scalars("loss/total")[3].value == pytest.approx(1 / 40)
    assert "time" not in events.Tags()["scalars"]


def test_a_picture_reaches_tensorboard(tmp_path):
    metrics = MetricsLog(tmp_path, "module1", [])
    metrics.picture("instances/a.jpg", np.zeros((4, 6, 3), np.uint8), 3)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "module1"))
    events.Reload()
    (picture,) = events.Images("instances/a.jpg")
    assert (picture.step, picture.width, picture.height) == (3, 6, 4)


def test_values_that_json_cannot_hold_become_null(tmp_path):
    metrics = MetricsLog(tmp_path, "module1", [])
    metrics.write({"step": 1, "gradient_norm": float("inf")})
    metrics.close()
    [row] = read_metrics(tmp_path)
    assert row == {"stage": "module1", "step": 1, "gradient_norm": None, "time": row["time"]}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for attempt in (
        lambda: MetricsLog(tmp_path, "module1", []),
        lambda: write_environment(tmp_path, torch.device("cpu"), 1),
    ):
        with pytest.raises(InputError, match=r"cannot be written \(No space left") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_the_environment_names_versions_and_machine_but_no_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2secret")
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/labelpenet", "train", "my photos", "--out", "run"])
    write_environment(tmp_path, torch.device("cpu"), 2)
    text = (tmp_path / "environment.json").read_text()
    environment = json.loads(text)
    assert "hunter2secret" not in text and "SOME_TOKEN" not in text
    assert environment["command"] == "labelpenet train 'my photos' --out run"
    assert environment["versions"]["torch"] and environment["versions"]["python"]
    assert environment["devices"] == ["cpu"] and environment["processes"] == 2


def test_plain_progress_says_what_a_reader_needs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = []
    progress = Progress("module1", 1100, start=100, log=lines.append, every=30)
    for step in range(101, 301):  # one step a second
        now[0] += 1
        progress.show(
            step, {"loss/total": 1.5, "loss/rpn": 1.0, "loss/roi": 0.5, "images_per_s": 2.0, "memory_mb": 512.0}
        )
    assert len(lines) == 6
    assert lines[0] == (
        "module1 130/1100: loss 1.5 (rpn 1, roi 0.5), 2 images/s, 512 MB, 16 min left"  # 970 steps at one a second
    )
    progress.show(301, {})  # too soon
    now[0] += 30
    progress.show(302, {})
    assert lines[-1] == "module1 302/1100: 0.878/s, 15 min left"
    progress.say("a message")
    assert lines[-1] == "a message"


def test_the_live_line_is_used_on_a_terminal_only(monkeypatch, capsys, caplog):
    with caplog.at_level("INFO", "labelpenet"), Progress("module1", 10) as progress:
        progress.say("to Python's logging")
    assert caplog.messages == ["to Python's logging"] and not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("module1", 10, start=2) as progress:
        progress._shown = -1e9
        progress.show(5, {"loss/total": 1.5})
        progress.say("above the [bar]")
    written = capsys.readouterr().err
    assert "above the [bar]" in written and "5/10" in written and "loss 1.5" in written


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3570, "1 h 00 min"), (11100, "3 h 05 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_describe_is_silent_about_what_is_missing():
    assert describe({}) == ""
    assert describe({"loss/total": 0.25, "loss/mil": 0.25, "skipped": 2}) == "loss 0.25, 2 skipped"


def test_memory_is_that_of_the_process():
    assert 10 < memory_mb(torch.device("cpu")) < 10**6


FULL = """
import resource, sys
from pathlib import Path
from torch.utils import tensorboard
from labelpenet.engine.log import MetricsLog
from labelpenet.errors import InputError
run, when, real = Path(sys.argv[1]), sys.argv[2], tensorboard.SummaryWriter
def fill(*arguments, **options):
    if when == "open":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, -1))
    return real(*arguments, **options)
tensorboard.SummaryWriter = fill
try:
    metrics = MetricsLog(run, "module1", [])
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, -1))
    for step in range(3):
        metrics.write({"step": step + 1, "loss/total": 1.0})
except InputError as error:
    print(error, file=sys.stderr)
"""


@pytest.mark.parametrize("when", ["open", "write"])
def test_a_disk_that_fills_under_tensorboard_is_one_line(tmp_path, when):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path, when], capture_output=True, text=True, timeout=300)
    assert done.stderr.count("\n") == 1 and "cannot be written (File too large)" in done.stderr
