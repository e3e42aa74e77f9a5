"""Files: read without trusting them, written whole or not at all.

Everything here turns a missing, damaged or hostile file, and a disk that fails, into one `InputError` that names the
file and the remedy.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from defusedxml import ElementTree

from labelpenet.errors import InputError, one_line

TEXT_LIMIT = 64 * 2**20  # bytes of a list, a tags file: ten million lines
XML_LIMIT = 8 * 2**20  # bytes of one annotation: VOC's largest has 30 kB
NOTES_OF_A_KIND = 20


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a UTF-8 file (with or without byte order mark).

    Raises:
        InputError: the file is missing, is no regular file, has more than ``limit`` bytes or is not UTF-8.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; check the path")
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"{path}: {size} bytes are more than the {limit} that such a file may have")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def read_json(path: Path, limit: int = 4 * 2**30) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: as `read_text`, or the text is not JSON.
    """
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); export or download it again") from error


def read_xml(path: Path, limit: int = XML_LIMIT) -> Any:
    """The root element of an XML file; document types and entities are refused, so that none can be expanded.

    Raises:
        InputError: as `read_text`, or the text is not XML or declares a document type.
    """
    text = read_text(path, limit)
    try:
        return ElementTree.fromstring(text, forbid_dtd=True)
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        # defusedxml's refusals are ValueErrors whose text is a Python repr; the user needs only what to remove.
        refused = type(error).__module__.startswith("defusedxml")
        reason = "a document type or entity, which is refused; remove it" if refused else f"no valid XML ({error})"
        raise InputError(f"{path}: {reason}") from error


def read_names(path: Path) -> list[str]:
    """The first word of every line that is neither empty nor a comment (``#``), in order, each once.

    Raises:
        InputError: as `read_text`.
    """
    lines = (line.split() for line in read_text(path).splitlines())
    return list(dict.fromkeys(words[0] for words in lines if words and not words[0].startswith("#")))


def inside(root: Path, name: str) -> Path:
    """The path of ``name``, as a file of the data set calls it, inside the folder ``root``.

    Links are followed before the check, so neither ``..`` nor an absolute path nor a link leads out of ``root``.

    Raises:
        InputError: the name is empty, absolute, holds ``..`` or a NUL, or leads out of the folder.
    """
    parts = PureWindowsPath(name)  # knows both kinds of slash, and drives
    if not parts.parts or parts.anchor or ".." in parts.parts or "\0" in name:
        raise InputError(f"{name!r} is no path inside {root}; name files relative to that folder, without '..'")
    path = root.joinpath(*parts.parts)
    try:
        resolved = path.resolve()
        home = root.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{name!r} cannot be followed in {root} ({error}); remove the link or the name") from error
    if not resolved.is_relative_to(home):
        raise InputError(f"{path} is a link that leaves {root}; copy the file into the folder")
    return path


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file; a name that no file can have (too long, odd bytes) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def brief(problems: Sequence[str], what: str) -> list[str]:
    """The problems as notes: the first twenty, and a last line that counts all of them as ``what``."""
    if not problems:
        return []
    notes = [one_line(problem) for problem in problems[:NOTES_OF_A_KIND]]
    more = len(problems) - len(notes)
    return [*notes, f"{len(problems)} {what}" + (f" (the first {len(notes)} are named above)" if more else "")]


def listing(names: Iterable[str], limit: int = 30) -> str:
    """Names for an error message: comma-separated, in order, at most ``limit`` of them."""
    names = [one_line(name) for name in names]
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "") or "none"


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
