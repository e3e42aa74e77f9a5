"""The processes of a run: how they start and how they end."""

from __future__ import annotations

import subprocess
import sys

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
