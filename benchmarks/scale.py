"""What a large set of photographs takes: photographs a second by workers, memory and disk by number of photographs.

    python benchmarks/scale.py --photographs 2000 5000 20000 --workers 1

Generates scenes of 64 x 48 pixels, trains the tiny backbone for a few steps on twenty of them, labels the others by
`predict --shard`, one process a shard, and merges, exports, evaluates and reports the parts. Rates hold for this
network, which is as cheap as one gets, and these photographs; what does not depend on them is how memory and disk grow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labelpenet.data.scenes import write_scenes

SIZE = (48, 64)
SETTINGS = (
    *("images.sides=48", "images.test_side=48", "modules.*.rpn_post_nms_top_n_test=10", "proposals.limit=20"),
    *("modules.2.predict.iterations=0", "modules.2.predict.max_attention=5"),
)


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


def trained(home: Path) -> Path:
    """A run of a few steps."""
    year, run = write_scenes(home / "few", train=20, val=0, size=SIZE), home / "run"
    train = ["train", str(year), "--out", str(run), "--split", "train", "--recipe", "demo", "--backbone", "tiny"]
    timed(
        [
            [
                *train,
                "--shorten",
                "0.1",
                "--until",
                "2",
                "--device",
                "cpu",
                "--cache",
                str(home / "cache"),
                "--set",
                *SETTINGS,
            ]
        ]
    )
    return run


def measure(run: Path, home: Path, count: int, workers: int) -> dict[str, Any]:
    """One row of the table."""
    home.mkdir()
    parts, merged = home / "parts", home / "found.json"
    year = write_scenes(home / "scenes", train=1, val=count, size=SIZE)
    held_out = [str(year), "--split", "val"]
    photos = home / "photos"
    photos.mkdir()
    for path in (year / "JPEGImages").glob("val_*"):
        (photos / path.name).symlink_to(path)
    predict = ["predict", str(run), str(photos), "--module", "2", "--device", "cpu", "--out", str(parts)]
    shards = [[*predict, "--shard", f"{i + 1}/{workers}"] for i in range(workers)]
    clock, spent, memory, curve = timed(shards, parts)
    each = sum(path.stat().st_size for path in parts.iterdir()) / count
    row = {"photographs": count, "workers": workers, "a second": count / clock, "CPU ms each": 1000 * spent / count}
    row |= {"MiB predict": memory, "bytes each": each}
    steps = {
        "merge": ["merge", str(parts), "--out", str(merged)],
        "parquet": ["merge", str(parts), "--out", str(home / "found.parquet")],
        "export": ["export", str(parts), *held_out, "--to", "yolo", "--out", str(home / "yolo")],
        "evaluate": ["evaluate", str(parts), *held_out],
        "evaluate parquet": ["evaluate", str(home / "found.parquet"), *held_out],
        "report": ["report", str(run), "--data", str(year), "--images", "2", "--predictions", str(parts)],
    }
    for name, command in steps.items():
        _, spent, memory, _ = timed([command])
        row |= {f"s {name}": spent, f"MiB {name}": memory}
    tenths = [curve[len(curve) * part // 10] for part in range(10) if curve]
    shown = {key: round(value, 2) for key, value in row.items()}
    return shown | {"photographs, MiB": [[round(size / each), memory] for size, memory in tenths]}


def main() -> None:
    """Prints a line of JSON a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, nargs="+", default=[2000, 5000, 20_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        run = trained(home)
        for count in options.photographs:
            for workers in options.workers:
                row = measure(run, home / "many", count, workers)
                print(json.dumps(row), flush=True)
                shutil.rmtree(home / "many")


if __name__ == "__main__":
    main()
