"""What a run writes about itself: ``metrics.jsonl``, TensorBoard and ``environment.json``."""

import functools
import json
import math
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labelpenet.data import run_folder
from labelpenet.data.files import json_lines, write_json, write_text, writing
from labelpenet.engine.checkpoint import git_revision, versions

Row = dict[str, Any]

_REMEDY = "make room or choose another folder, then continue with --resume"


class MetricsLog:
    """The rows of one stage, in ``RUN/metrics.jsonl`` and as scalars in ``RUN/tensorboard/STAGE``.

    Opening it rewrites the file: rows of other stages stay, rows of this stage become those of the checkpoint that
    training continues from. So what was logged after that checkpoint, and what a crash left half written, is gone, and
    no step is ever there twice.

    Args:
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
        with writing(self._path, _REMEDY):
            kept = [row for row in read_metrics(run_dir) if row.get("stage") != stage] + self.rows
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept), _REMEDY)
            self._file = self._path.open("a", encoding="utf-8")
            # purge_step makes TensorBoard forget what an interrupted run drew beyond the checkpoint.
            _silence_worker()
            self._board = SummaryWriter(str(run_folder.tensorboard(run_dir, stage)), purge_step=step + 1, flush_secs=30)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row (its ``step`` is the number of finished steps) with the time; values that are not finite become
        null."""
        lost = {key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        clean = {"stage": self._stage} | {key: None if key in lost else value for key, value in row.items()}
        clean["time"] = round(time.time(), 3)
        self.rows.append(clean)
        with writing(self._path, _REMEDY):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
            for key, value in clean.items():
                if isinstance(value, (int, float)) and key not in ("step", "time"):
                    self._board.add_scalar(key, value, clean["step"])

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Shows an (H, W, 3) uint8 picture in TensorBoard under ``name``."""
        with writing(self._path, _REMEDY):
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Writes out what is buffered."""
        with writing(self._path, _REMEDY):
            self._file.close()
            self._board.close()


def read_metrics(run_dir: Path) -> list[Row]:
    """The rows of ``RUN/metrics.jsonl`` in order; a line that a crash left half written is skipped."""
    path = run_folder.metrics(run_dir)
    return json_lines(path) if path.exists() else []


def write_environment(run_dir: Path, device: torch.device, world: int) -> None:
    """Writes ``RUN/environment.json``: versions, machine, devices and command line; no environment variables.

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


@functools.cache
def _silence_worker() -> None:
    """Keeps the traceback of TensorBoard's thread on a full disk from the user; the next call raises the error here."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        tensorboard = type(failure.thread).__module__.startswith("tensorboard.")
        if not (tensorboard and isinstance(failure.exc_value, OSError)):
            before(failure)

    threading.excepthook = hook
