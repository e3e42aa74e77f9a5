"""What a run writes about itself: ``metrics.jsonl``, TensorBoard, ``environment.json`` and a line of progress."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from labelpenet.data import run_folder
from labelpenet.data.files import write_json, write_text
from labelpenet.engine.checkpoint import git_revision, versions
from labelpenet.errors import InputError, reason

Row = dict[str, Any]

_REMEDY = "make room or choose another folder, then continue with --resume"


class MetricsLog:
    """The rows of one stage, in ``RUN/metrics.jsonl`` and as scalars in ``RUN/tensorboard/STAGE``.

    Opening it rewrites the file: rows of other stages stay, rows of this stage become those of the checkpoint that
    training continues from. So what was logged after that checkpoint, and what a crash left half written, is gone, and
    no step is ever there twice.

    Args:
        run_dir: the run folder; made where it is missing.
        stage: name of the stage.
        rows: the stage's rows so far (empty at its start), ascending by their ``step``.
        step: number of finished steps that training continues from.

    Raises:
        InputError: the disk is full or the folder cannot be written (also from `write`).
    """

    def __init__(self, run_dir: Path, stage: str, rows: list[Row], step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here: it is slow, and nothing else needs it

        self.rows = list(rows)
        self._stage = stage
        self._path = run_folder.metrics(run_dir)
        try:
            kept = [row for row in read_metrics(run_dir) if row.get("stage") != stage] + self.rows
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept), _REMEDY)
            self._file = self._path.open("a", encoding="utf-8")
            # purge_step makes TensorBoard forget what an interrupted run drew beyond the checkpoint.
            _silence_worker()
            self._board = SummaryWriter(str(run_folder.tensorboard(run_dir, stage)), purge_step=step + 1, flush_secs=30)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row (its ``step`` is the number of finished steps); values that are not finite become null."""
        clean = {"stage": self._stage} | {key: _finite(value) for key, value in row.items()}
        self.rows.append(clean)
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
            for key, value in clean.items():
                if isinstance(value, (int, float)) and key not in ("step", "time"):
                    self._board.add_scalar(key, value, clean["step"])
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Shows an (H, W, 3) uint8 picture in TensorBoard under ``name``."""
        try:
            self._board.add_image(name, picture, step, dataformats="HWC")
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Writes out what is buffered."""
        try:
            self._file.close()
            self._board.close()
        except OSError as error:
            raise _unwritable(self._path, error) from error


def read_metrics(run_dir: Path) -> list[Row]:
    """The rows of ``RUN/metrics.jsonl`` in order; a line that a crash left half written is passed over."""
    path = run_folder.metrics(run_dir)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write_environment(run_dir: Path, device: torch.device, world: int) -> None:
    """Writes ``RUN/environment.json``: versions, machine, devices and command line; no environment variables.

    Args:
        run_dir: the run folder; made where it is missing.
        device: the device of this process.
        world: number of processes.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    cuda = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    environment = {
        "versions": versions(),
        "git": git_revision(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": {
            "system": platform.platform(),
            "architecture": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "device": str(device),
        "devices": [torch.cuda.get_device_name(index) for index in cuda] or [device.type],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "processes": world,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(run_folder.environment(run_dir), environment, _REMEDY, indent=2)


class Progress:
    """One line that tells how a stage is doing: a live one on a terminal, a plain one every half minute elsewhere.

    Args:
        stage: name of the stage.
        steps: number of steps of the whole stage.
        start: number of steps that were finished before this session.
        log: where plain lines go; with None, the live line on a terminal, else standard error.
        every: seconds between plain lines.
    """

    def __init__(
        self, stage: str, steps: int, start: int = 0, log: Callable[[str], None] | None = None, every: float = 30.0
    ) -> None:
        self._stage, self._steps, self._start, self._every = stage, steps, start, every
        self._began = self._shown = time.monotonic()
        self._log = log or _to_stderr
        self._bar = _live_bar(stage, steps, start) if log is None and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Prints a line of its own, above the live one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            self._log(message)

    def show(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows the state after ``step`` steps with the values of ``row``, if the last time is long enough ago."""
        now = time.monotonic()
        if now - self._shown < (0.5 if self._bar is not None else self._every):
            return
        self._shown = now
        left = (now - self._began) / max(step - self._start, 1) * (self._steps - step)
        line = f"{describe(row)}, {duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, status=line)
        else:
            self._log(f"{self._stage} {step}/{self._steps}: {line}")


def silent(message: str) -> None:
    """Takes what the processes other than the first would say."""


def describe(row: Mapping[str, Any]) -> str:
    """A row of metrics as a reader wants it: losses, speed, share of time spent waiting for data, memory."""
    losses = {key.removeprefix("loss/"): value for key, value in row.items() if key.startswith("loss/")}
    total = losses.pop("total", None)
    parts = []
    if total is not None:
        terms = ", ".join(f"{key} {value:.3g}" for key, value in losses.items())
        parts.append(f"loss {total:.4g}" + (f" ({terms})" if len(losses) > 1 else ""))
    if row.get("images_per_s"):
        parts.append(f"{row['images_per_s']:.3g} images/s")
    if row.get("data_s"):
        parts.append(f"data {row['data_s']:.2g} s")
    if row.get("memory_mb"):
        parts.append(f"{row['memory_mb']:.0f} MB")
    if row.get("skipped"):
        parts.append(f"{row['skipped']} skipped")
    return ", ".join(parts) or "starting"


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: ``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory_mb(device: torch.device) -> float | None:
    """Most memory used so far in MB (2^20 bytes): on the GPU, or by the process; None where the system cannot tell."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _live_bar(stage: str, steps: int, start: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
    )
    bar = Bar(*columns, console=Console(stderr=True))
    bar.add_task(stage, total=steps, completed=start, status="starting")
    return bar


@functools.cache
def _silence_worker() -> None:
    """Keeps the traceback of TensorBoard's thread on a full disk from the user; the next call raises the error here."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        tensorboard = type(failure.thread).__module__.startswith("tensorboard.")
        if not (tensorboard and isinstance(failure.exc_value, OSError)):
            before(failure)

    threading.excepthook = hook


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({reason(error)}); {_REMEDY}")
