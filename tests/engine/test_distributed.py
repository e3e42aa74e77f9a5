"""The processes of a run: how they start and how they end."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import atexit
import torch.distributed as dist
atexit.register(lambda: print("left behind" if dist.is_initialized() else "clean", flush=True))
from labelpenet.engine.distributed import build_fabric
fabric = build_fabric("cpu", 2)
seen = [None, None]
dist.all_gather_object(seen, fabric.global_rank)
assert seen == [0, 1]
"""


def test_no_process_group_outlives_its_process(tmp_path):
    """Its threads would abort about one process in a hundred while Python shuts down."""
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("clean") == 2 and "left" not in done.stdout


TWO = """
import os, signal, sys
from labelpenet.engine.distributed import build_fabric, gather, peers
from labelpenet.errors import InputError
fabric = build_fabric("cpu", 2)
try:
    with peers(fabric.world_size):
        for number in range(1000):
            gather(fabric.world_size, number)
            if number == 3 and fabric.global_rank == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
except InputError as error:
    print(f"rank {fabric.global_rank}: {error}", file=sys.stderr)
    sys.exit(2)
"""


REFUSED = """
import os, sys, threading, time
from types import SimpleNamespace
from lightning_fabric.strategies.launchers import subprocess_script
subprocess_script.time = SimpleNamespace(sleep=lambda seconds: time.sleep(0.01))  # it looks every five seconds else
from labelpenet.engine.distributed import build_fabric, together
from labelpenet.errors import InputError
fabric = build_fabric("cpu", 2)

def work():
    if fabric.global_rank:
        raise InputError("no room")

try:
    together(2, work)
except InputError as error:
    if fabric.global_rank == 0:  # is slow to end
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":
                thread.join()
    print(error)
    sys.exit(2)
"""


def test_a_shared_error_ends_all_processes_and_none_kills_another(tmp_path):
    """Not even the first one that comes to its end long after the others."""
    (tmp_path / "two.py").write_text(REFUSED)
    done = subprocess.run([sys.executable, str(tmp_path / "two.py")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stdout.count("no room") == 2, done


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_whose_peer_is_killed_ends_with_one_line(tmp_path, victim):
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, str(tmp_path / "two.py"), str(victim)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    ours = [line for line in done.stderr.splitlines() if "Child process" not in line]
    assert len(ours) == 1 and ours[0].startswith(f"rank {1 - victim}: another process of this command has ended")
