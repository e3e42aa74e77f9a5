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


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_whose_peer_is_killed_ends_with_one_line(tmp_path, victim):
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, str(tmp_path / "two.py"), str(victim)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    ours = [line for line in done.stderr.splitlines() if "Child process" not in line]
    assert len(ours) == 1 and ours[0].startswith(f"rank {1 - victim}: another process of this command has ended")
