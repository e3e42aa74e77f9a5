"""Files: read without trusting them, written whole or not at all.

Everything here turns a missing, damaged or hostile file, and a disk that fails, into one `InputError` that names the
file and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

from defusedxml import ElementTree

from labelpenet.errors import InputError, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEXT_LIMIT = 64 * 2**20  # bytes of a list, a tags file: ten million lines
XML_LIMIT = 8 * 2**20  # bytes of one annotation: VOC's largest has 30 kB
NOTES_OF_A_KIND = 20
MANIFEST = ".labelpenet"


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


@contextmanager
def whole_folder(
    out: Path | str,
    reads: Iterable[Path] = (),
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    extend: bool = False,
) -> Iterator[Path]:
    """A folder to fill, beside ``out``, which takes its name when the block is done: whole or not at all.

    Nothing that another hand made is ever replaced: a folder made here lists its files and their digests in
    ``.labelpenet``, and only one that holds just these, unchanged, may be written again. What a killed process left is
    swept.

    Args:
        out: the folder to make; new or empty, or with ``overwrite`` one that was made here.
        reads: files and folders that the work reads; ``out`` may neither hold one nor lie in one of the folders.
        overwrite: replaces a folder that was made here.
        about: what is remembered of the folder, as JSON.
        extend: keeps what a folder holds that was made here with the same ``about`` and adds to it.

    Raises:
        InputError: ``out`` is taken, or something cannot be written; what was there is as it was.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 resolving would follow a link at the end
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    about = dict(about or {})
    try:
        if old.is_dir() and not old.is_symlink() and (old / MANIFEST).is_file():  # killed in the middle of a swap
            shutil.rmtree(old) if out.exists() else old.rename(out)
        check_new_folder(out, reads)
        made = _manifest(out) if out.is_dir() and any(out.iterdir()) else None
        if made is not None and not overwrite and not (extend and made == about):
            raise InputError(f"{out}: already holds an export; choose another folder, or overwrite it")
        part.mkdir(parents=True, exist_ok=True)
        with _alone(part):
            for entry in part.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            if made is not None and not overwrite:
                _link_files(out, part)
            yield part
            digests = {path.relative_to(part).as_posix(): _digest(path) for path in _files(part)}
            write_text(part / MANIFEST, json.dumps({"about": about, "files": digests}))
            if made is not None:
                out.rename(old)
            part.rename(out)  # an empty folder may be replaced
            if made is not None:
                shutil.rmtree(old)
    except OSError as error:
        where = error.filename or out
        raise InputError(f"{where}: cannot be written ({error.strerror or error}); choose another place") from error
    except InputError as error:  # about a file in the folder that nobody will find
        raise InputError(str(error).replace(str(part), str(out))) from error
    finally:
        if not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)


def check_new_folder(out: Path, reads: Iterable[Path]) -> None:
    """Refuses a folder to write that holds, or lies in, what is read. Links are followed.

    Raises:
        InputError: names the two, and what to do.
    """
    home = out.resolve()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: there is a file or link of that name; choose another folder")
    for path in reads:
        read = path.resolve()
        if read.is_relative_to(home):
            raise InputError(f"{out}: holds {path}, which is read; choose another folder")
        if home.is_relative_to(read) and path.is_dir():
            raise InputError(f"{out}: lies in {path}, which is read; choose a folder outside")


def unchanged(folder: Path) -> set[Path]:
    """The files of a folder that `whole_folder` made which nobody has changed since; none of another folder."""
    try:
        digests = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
        return {path for path in _files(folder) if digests.get(path.relative_to(folder).as_posix()) == _digest(path)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _manifest(folder: Path) -> dict[str, Any]:
    """What is remembered of a folder that `whole_folder` made; refuses one that holds anything else.

    Raises:
        InputError: the folder was not made here, or a file was added or changed since.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        about, digests = content["about"], dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: is not empty and no export of labelpenet; choose a new folder") from error
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST and (name not in digests or path.is_symlink() or _digest(path) != digests[name]):
            raise InputError(f"{path}: was added or changed since the export; move it away, or choose another folder")
    return about


def _files(folder: Path) -> list[Path]:
    """All files and links below a folder, in order; links are not followed."""
    return sorted(Path(home) / name for home, _, names in os.walk(folder) for name in names)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _link_files(folder: Path, into: Path) -> None:
    """The files of a folder once more, without copying their content where the disk can share it."""
    for path in _files(folder):
        target = into / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(path)
        except OSError:
            shutil.copy2(path, target)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from a folder as long as this one lives.

    Raises:
        InputError: another one has it, or it is a link.
    """
    if folder.is_symlink():
        raise InputError(f"{folder}: is a link; remove it")
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(f"{folder}: another process is writing there; wait for it") from error
    finally:
        os.close(descriptor)
