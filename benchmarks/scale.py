"""What a large set of photographs takes: photographs a second by workers, memory and disk by number of photographs.

    python benchmarks/scale.py --photographs 20000 --workers 1 2

Generates small photographs and a cascade of the tiny backbone with random weights, labels them by `predict --shard`,
one process a shard, merges the parts, and exports them as parts. Rates hold for this network, which is as cheap as one
gets, and these photographs; what does not depend on them is how memory and disk grow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from labelpenet import config
from labelpenet.data import run_folder
from labelpenet.models.build import build_backbone
from labelpenet.models.cascade import MODULES, LabelPEnet
from labelpenet.training.pretrain import save_part

CLASSES = ("cat", "dog")


def random_run(run: Path) -> Path:
    """A run folder of random weights that find one instance a class."""
    torch.manual_seed(0)
    small = [f"modules.2.predict.{one}" for one in ("per_class=1", "side=64", "iterations=0", "max_attention=5")]
    recipe = config.override(
        config.recipe("demo"), ["images.test_side=64", "modules.*.rpn_post_nms_top_n_test=10", *small]
    )
    network = LabelPEnet(build_backbone("tiny", pretrained=False), CLASSES, recipe)
    run.mkdir()
    facts = {"classes": list(CLASSES), "backbone": "tiny", "normalisation": network.normalisation}
    run_folder.start_run(run, {**facts, "recipe": config.to_dict(network.recipe)}, False)
    for part in ("stem", *MODULES):
        save_part(network, run, part)
    return run


def photographs(folder: Path, count: int, side: int) -> Path:
    """A folder of generated photographs with ``tags.csv``."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index:07d}.jpg")
    rows = (f"{index:07d}.jpg,{CLASSES[index % 2]}" for index in range(count))
    (folder / "tags.csv").write_text("\n".join(["file,tags", *rows]) + "\n")
    return folder


def timed(
    commands: Sequence[Sequence[str]], growing: Path | None = None
) -> tuple[float, float, float, list[list[int]]]:
    """Runs commands side by side.

    Returns:
        seconds by the clock, seconds of processors, MiB of the largest at its peak, and, where a folder of ``growing``
        parts is given, what the first took while they grew: bytes of parts, MiB.
    """
    before, began = os.times(), time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-m", "labelpenet", *one], env=environment, stdout=subprocess.DEVNULL)
        for one in commands
    ]
    curve: list[list[int]] = []
    while growing is not None and not os.waitid(os.P_PID, running[0].pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(1)
        curve.append([sum(path.stat().st_size for path in growing.glob("*.partial")), resident(running[0].pid)])
    peak = 0
    for process in running:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{process.args!r} ended with {process.returncode}")
        peak = max(peak, usage.ru_maxrss)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - began, spent, peak / 1024, curve


def resident(pid: int) -> int:
    """MiB of a process that are in memory; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, IndexError):
        return 0


def measure(home: Path, count: int, workers: int, side: int) -> dict[str, Any]:
    """One row of the table."""
    home.mkdir()
    run, photos, parts = random_run(home / "run"), photographs(home / "photos", count, side), home / "parts"
    predict = ["predict", str(run), str(photos), "--module", "2", "--device", "cpu", "--out", str(parts)]
    shards = [[*predict, "--shard", f"{i + 1}/{workers}"] for i in range(workers)]
    clock, spent, memory, curve = timed(shards, parts)
    each = sum(path.stat().st_size for path in parts.iterdir()) / count
    row = {"photographs": count, "workers": workers, "a second": count / clock, "CPU ms each": 1000 * spent / count}
    row |= {"MiB predict": memory, "bytes each": each}
    merged = timed([["merge", str(parts), "--out", str(home / "found.json")]])
    exported = timed([["export", str(parts), str(photos), "--to", "yolo", "--out", str(home / "yolo")]])
    row |= {"s merge": merged[1], "MiB merge": merged[2], "s export": exported[1], "MiB export": exported[2]}
    tenths = [curve[len(curve) * part // 10] for part in range(10) if curve]
    shown = {key: round(value, 2) for key, value in row.items()}
    return shown | {"photographs, MiB": [[round(size / each), memory] for size, memory in tenths]}


def main() -> None:
    """Prints a line of JSON a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, nargs="+", default=[1000, 20_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--side", type=int, default=64, help="pixels of a photograph")
    options = parser.parse_args()
    for count in options.photographs:
        for workers in options.workers:
            with tempfile.TemporaryDirectory() as home:
                row = measure(Path(home) / "home", count, workers, options.side)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
