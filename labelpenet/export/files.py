"""Writing files so that nothing is ever half written, and never outside the folder asked for."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from labelpenet.data.dataset import TaggedImage
from labelpenet.errors import InputError


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        paths: the files, in the order of writing.
        notes: one line each about what the format cannot hold, as far as this data met it.
    """

    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_bytes(path: Path, content: bytes) -> Path:
    """Writes a file, and its folder where that is missing: by a temporary file beside it, which then takes its name.

    Raises:
        InputError: the file cannot be written (full disk, no permission, a folder of that name); the old file, if any,
            is as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)  # mkstemp's 0600 would hide the file from the user's other tools
        os.replace(temporary, path)  # noqa: PTH105
        temporary = None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Writes a UTF-8 file as `write_bytes` does."""
    return write_bytes(path, text.encode("utf-8"))


def safe_name(name: str) -> str:
    """A name as one plain file name: letters, digits, ``.``, ``-`` and ``_`` stay, anything else becomes ``_``.

    Neither a slash, a drive, ``..``, a hidden file nor a name longer than file systems take comes out.
    """
    plain = re.sub(r"[^\w.-]", "_", name).strip("._-") or "unnamed"
    while len(plain.encode()) > 150:
        plain = plain[:-1]
    return plain


def stems(images: Iterable[TaggedImage]) -> dict[str, str]:
    """For each image id a file name without suffix, unique also on file systems that ignore case.

    The id without the image's suffix, made safe; the second image of the same name gets ``-2`` and so on.
    """
    taken: set[str] = set()
    names: dict[str, str] = {}
    for image in images:
        base = safe_name(image.id.removesuffix(image.path.suffix))
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names[image.id] = name
    return names
