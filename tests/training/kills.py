"""Runs a plan of commands that are killed again and again: ``python -m tests.training.kills PLAN.json``.

One interpreter forks a child for every attempt, for to start one each time would take most of the time. A child is
killed after a number of seconds of its own processor time, so that a busy machine does not matter, or just before the
n-th time that it opens a file for writing, renames or removes one: the moments between the parts of a write.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from labelpenet import cli
from labelpenet.data import proposals

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


@dataclass
class End:
    """How an attempt ended: killed or with an exit status, its processor seconds, its changes of files, its errors."""

    killed: bool
    status: int
    seconds: float
    changes: int
    said: str


def attempt(arguments: Sequence[str], log: Path, seconds: float = 0, change: int = 0) -> End:
    """One command in a child; 0 for a limit that does not hold."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stderr = log.open("w", buffering=1)
        seen = 0

        def count(event: str, given: tuple[object, ...]) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if event in CHANGES or (writes and given[0] != os.devnull):
                seen += 1
                if seen == change:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(count)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            cli.main(arguments)
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(write, str(seen).encode())
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        seen_by_child = pipe.read()
    _, ended, usage = os.wait4(child, 0)
    killed = os.WIFSIGNALED(ended)
    spent = usage.ru_utime + usage.ru_stime
    return End(killed, 0 if killed else os.WEXITSTATUS(ended), spent, int(seen_by_child or 0), log.read_text())


def phase(out: Path) -> str:
    """What a run folder holds already: how far it had come."""
    have = [path.stem for part in ("weights", "instances") for path in sorted((out / part).glob("*[!p]"))]
    begun = [path.name for path in sorted((out / "checkpoints").glob("*")) if path.name not in have]
    return "+".join(have) + (f", in {begun[-1]}" if begun else "")


def torture(arguments: Sequence[str], out: Path, kills: int, whole: End, rng: random.Random, log: Path) -> list[str]:
    """Kills a command ``kills`` times, each time going on with what is there; a line a kill. It has ended well then."""
    lines: list[str] = []
    while True:
        limits = {"seconds": rng.uniform(0.001, 0.6 * whole.seconds)}
        if rng.random() < 0.5:
            limits = {"change": rng.randint(1, max(1, int(0.7 * whole.changes)))}
        end = attempt(arguments, log, **(limits if len(lines) < kills else {}))
        if end.killed:
            lines.append(f"killed {arguments[0]} {limits} {phase(out) if out.is_dir() else ''}")
            continue
        if end.status or "Traceback" in end.said:
            raise SystemExit(f"{' '.join(arguments)}: ended with {end.status} after {lines[-1:]}:\n{end.said}")
        if len(lines) >= kills:
            return lines
        shutil.rmtree(out) if out.is_dir() else out.unlink()  # ended too early: once more from the start


def main() -> None:
    """Plan: {"commands": [[arguments, what it writes, kills]], "world": folder, "straight": folder, "seed": number}.

    Each command is first run undisturbed in ``straight``, then killed in ``world``: ``WORLD`` in its arguments is
    either.
    """
    torch.set_num_threads(1)
    proposals._usable_cores = lambda: 1  # a pool of processes would start anew for every attempt
    plan = json.loads(Path(sys.argv[1]).read_text())
    rng = random.Random(plan["seed"])
    for arguments, out, kills in plan["commands"]:
        straight, world = ([one.replace("WORLD", plan[name]) for one in arguments] for name in ("straight", "world"))
        log = Path(plan["world"]) / "stderr"
        whole = attempt(straight, log)
        if whole.status:
            raise SystemExit(f"{' '.join(straight)}: ended with {whole.status}:\n{whole.said}")
        lines = torture(world, Path(plan["world"]) / out, kills, whole, rng, log)
        print("\n".join(lines), f"\ndone {arguments[0]}: {whole.seconds:.1f} s, {whole.changes} changes", flush=True)


if __name__ == "__main__":
    main()
