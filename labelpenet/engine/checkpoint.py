"""Checkpoints that survive whatever happens while they are written.

A stage keeps its newest two checkpoints in a folder of its own, as ``step-00001200.pt``. A file appears under its name
only once it is complete and on the disk; one that was damaged later is recognised by its checksums, and the one before
it is used.
"""

import json
import platform
import re
import subprocess
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from labelpenet.data.files import write_bytes
from labelpenet.data.run_folder import changes
from labelpenet.errors import InputError, reason

KEPT = 2
_NAME = re.compile(r"step-\d+\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a stage, newest first; empty where there is none."""
    return sorted((path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Writes the state after ``step`` steps so that a crash at any moment leaves the earlier checkpoints usable.

    The newest `KEPT` files up to ``step`` stay, and what lies beyond ``step`` goes: it was damaged, or training would
    not have gone back before it.

    Args:
        folder: the stage's folder, see `run_folder.checkpoints`; made where it is missing.
        state: tensors and plain Python values only, for it is read back with ``weights_only=True``.

    Raises:
        InputError: the disk is full or the folder cannot be written; what was there before is intact.
    """
    path = folder / f"step-{step:08d}.pt"
    write_bytes(
        path,
        lambda file: torch.save(dict(state), file),
        "earlier checkpoints are intact: make room, then continue with --resume",
    )
    earlier = [other for other in checkpoints(folder) if _step(other) <= step]
    for other in [*folder.glob("*.tmp"), *checkpoints(folder)]:
        if other not in earlier[:KEPT]:
            other.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint of a stage that can be read, on the CPU.

    Returns:
        The state, None where the stage has no checkpoint, and one line for each damaged file that was skipped.

    Raises:
        InputError: there are checkpoints, and every one is damaged.
    """
    notes: list[str] = []
    paths = checkpoints(folder)
    for path in paths:
        try:
            return _read(path), notes
        # A damaged file may make the reader raise almost anything; each means that this file is of no use.
        except Exception as error:
            notes.append(f"{path} is damaged ({reason(error)}); going back to the checkpoint before it")
    if paths:
        raise InputError(f"every checkpoint in {folder} is damaged; delete the folder to train this stage again")
    return None, notes


def check_configuration(saved: Mapping[str, Any], current: Mapping[str, Any], where: Path) -> None:
    """Refuses to continue the run ``where`` under another configuration than it was started with.

    Raises:
        InputError: values differ; the line names each differing key with both values.
    """
    differing = changes(plain(saved), plain(current))
    if differing:
        raise InputError(
            f"{where} was started with another configuration ({'; '.join(differing)}); "
            "restore it to resume, or start in another folder"
        )


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON would hold it: tuples become lists, paths and other objects their text."""
    return json.loads(json.dumps(dict(config), default=str))


def versions() -> dict[str, str | None]:
    """The versions of what decides a result: python, labelpenet and the libraries that compute."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("labelpenet", "torch", "torchvision", "lightning-fabric", "numpy", "opencv-contrib-python-headless"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_revision() -> str | None:
    """The revision of the source tree that labelpenet runs from, with ``-dirty`` if edited; None outside of one."""
    tree = Path(__file__).parents[2]
    # An installed package may lie inside somebody else's repository, whose revision would say nothing about it.
    if not (tree / ".git").exists():
        return None
    # Without its optional locks, git cannot get in the way of somebody who commits at the same moment.
    options = "--no-optional-locks describe --always --dirty --abbrev=40 --exclude=*"
    command = ["git", "-C", str(tree), *options.split()]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: Path) -> dict[str, Any]:
    # torch.load does not compare the checksums that torch.save writes, so a flipped bit would pass as a weight.
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
