"""Files: read without trusting them, written whole or not at all.

Everything here turns a missing, damaged or hostile file, or a full disk, into one `InputError` that names the file and
the remedy. What the package keeps for a later stage carries a checksum (CRC-32) within the file: JSON as a last entry
``checksum``, arrays behind their numbers, tensors in safetensors' metadata. Files without one are taken as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from defusedxml import ElementTree

from labelpenet.errors import InputError, one_line, reason, told

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

TEXT_LIMIT = 64 * 2**20  # bytes of a list, a tags file: ten million lines
XML_LIMIT = 8 * 2**20  # bytes of one annotation: VOC's largest has 30 kB
NOTES_OF_A_KIND = 20
MANIFEST = ".labelpenet"

ROOM = "make room or choose another place"
RESUME = "free some space and use --resume"  # what a training cannot write it makes again
_SEAL = re.compile(r', "checksum": "([0-9a-f]{8})"}\s*$')
_MARK = b"\nlabelpenet crc32:"  # with four more bytes of an odd length, so that no array could end in it


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a file of at most ``limit`` bytes; `InputError` where it is none, or no UTF-8 (mark or not)."""
    with (
        told(lambda error: f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8", UnicodeDecodeError),
        told(lambda error: f"{path}: cannot be read ({reason(error)}); check the file", OSError),
    ):
        if not path.is_file():
            raise InputError(f"{path}: no such file; check the path")
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"{path}: {size} bytes are more than the {limit} that such a file may have")
        return path.read_text(encoding="utf-8-sig")


def read_json(path: Path, limit: int = 4 * 2**30) -> Any:
    """The content of a JSON file, without `write_json`'s checksum; `InputError` as `read_text`, or of damage."""
    text = read_text(path, limit)
    with told(
        lambda error: f"{path}: not valid JSON ({error}); export or download it again", ValueError, RecursionError
    ):
        content = json.loads(text)
    if not is_whole(text):
        raise InputError(
            f'{path}: damaged, its checksum is wrong; make it again (or take out the last entry, "checksum", if you '
            "changed the file yourself)"
        )
    if isinstance(content, dict):
        content.pop("checksum", None)
    return content


def json_line(line: str | bytes) -> dict[str, Any] | None:
    """The object on a line of JSON lines; None where it is torn, no object, or its checksum is there and wrong."""
    try:
        text = line.decode() if isinstance(line, bytes) else line
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and is_whole(text) else None


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that grows by a line at a time: what a crash has left half written is skipped."""
    rows = map(json_line, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [row for row in rows if row is not None]


def read_xml(path: Path) -> Any:
    """The root of an XML file; `InputError` as `read_text`, or where it is damaged or has a document type or entity."""
    text = read_text(path, XML_LIMIT)
    try:
        return ElementTree.fromstring(text, forbid_dtd=True)
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        # defusedxml's refusals are ValueErrors whose text is a Python repr; the user needs only what to remove.
        refused = type(error).__module__.startswith("defusedxml")
        why = "a document type or entity, which is refused; remove it" if refused else f"no valid XML ({error})"
        raise InputError(f"{path}: {why}") from error


def read_names(path: Path, known: Callable[[str], object]) -> list[str]:
    """The name on every line that is neither empty nor a comment (``#``), in order, each once.

    A name may hold blanks; the numbers that VOC's lists write behind it are no part of it (`bare_name`), but where a
    name with one or more of them is ``known``, the longest such is taken. `InputError`: as `read_text`.
    """

    def name(line: str) -> str:
        bare = bare_name(line)
        longer = [line[: blank.start()] for blank in re.finditer(r"\s+|$", line) if blank.start() > len(bare)]
        return next(filter(known, reversed(longer)), bare)

    return [one for one in dict.fromkeys(name(line.strip()) for line in read_text(path).splitlines()) if one]


def bare_name(line: str) -> str:
    """The name on a line of a list, without a comment and without the numbers behind it."""
    return re.sub(r"(^|(\s+-?\d+)*\s+)#.*|(\s+-?\d+)+\s*$", "", line)


def inside(root: Path, name: str) -> Path:
    """The path of ``name``, as a file of the data set calls it, inside the folder ``root``.

    Links are followed before the check, so neither ``..`` nor an absolute path nor a link leads out of ``root``. A name
    with accents is also found where the disk has it in Unicode's other form, as macOS writes it. `InputError`: the name
    is empty, absolute, holds ``..`` or a NUL, or leads out of the folder.
    """
    parts = PureWindowsPath(name)  # knows both kinds of slash, and drives
    if not parts.parts or parts.anchor or ".." in parts.parts or "\0" in name:
        raise InputError(f"{name!r} is no path inside {root}; name files relative to that folder, without '..'")
    path = root.joinpath(*parts.parts)
    if not name.isascii() and not os.path.lexists(path):  # which says no to a name that is too long, too
        forms = (root.joinpath(*(unicodedata.normalize(form, part) for part in parts.parts)) for form in ("NFC", "NFD"))
        path = next(filter(os.path.lexists, forms), path)
    said = "remove the link or the name"
    with told(
        lambda error: f"{name!r} cannot be followed in {root} ({error}); {said}", OSError, RuntimeError, ValueError
    ):
        within = path.resolve().is_relative_to(root.resolve())
    if not within:
        raise InputError(f"{path} is a link that leaves {root}; copy the file into the folder")
    return path


def nfc(name: str) -> str:
    """A name in the one form of Unicode in which names are compared: macOS writes accents in another."""
    return unicodedata.normalize("NFC", name)


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file; a name that no file can have (too long, odd bytes) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_hidden(name: str) -> bool:
    """Whether no data set holds a file or folder of this name: hidden, or where a Synology keeps its thumbnails."""
    return name.startswith((".", "@eaDir"))


# -- writing ---------------------------------------------------------------------------------------------------------


def check_outputs(paths: Iterable[Path], reads: Iterable[Path] = (), overwrite: bool = False) -> None:
    """Refuses, before any work is done, files that may not or cannot be written. Links are followed.

    Args:
        paths: the files that will be written.
        reads: neither these files nor anything that lies in the folders among them is ever written over.
        overwrite: whether other files that are there already may be replaced.

    Raises:
        InputError: one of the files is read, is there already or is no regular file, or its folder cannot be written.
    """
    reads = list(reads)
    files = {_place(path) for path in reads} | {real_path(path) for path in reads}
    identities = {_identity(path) for path in reads if path.is_file()}
    folders = [real_path(path) for path in reads if path.is_dir()]
    probed: set[Path] = set()
    for path in paths:
        with writing(path, "choose another place", ValueError, RuntimeError):
            place, there = _place(path), os.path.lexists(path)
            if "\0" in str(path) or len(os.fsencode(path.name)) > 255:
                raise InputError(f"{path}: is no name that a file can have; choose another")
            if path.is_dir():
                raise InputError(f"{path}: is a folder; name a file in it")
            if there:
                if place in files or (path.exists() and _identity(path) in identities):
                    raise InputError(f"{path}: is read by this command and would be written over; choose another place")
                if any(place.is_relative_to(folder) for folder in folders):
                    raise InputError(f"{path}: belongs to what this command reads; choose another place")
                if path.exists() and not path.is_file():
                    raise InputError(f"{path}: is no regular file; choose another place")
                if not overwrite:
                    raise InputError(f"{path}: is there already; choose another place, or replace it with --overwrite")
            folder = next(parent for parent in place.parents if parent.exists())
            if folder not in probed:
                with tempfile.TemporaryFile(dir=folder):
                    probed.add(folder)


def _place(path: Path) -> Path:
    """Where a file lies, folders' links followed; that of the file itself is not, as writing replaces it."""
    return real_path(path.parent) / path.name


def real_path(path: Path) -> Path:
    """The absolute path, links followed as far as they lead: `Path.resolve` fails where they go in a circle."""
    return Path(os.path.realpath(path))


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def write_bytes(path: Path, content: bytes | Callable[[BinaryIO], object], remedy: str = ROOM) -> Path:
    """Writes a file, and its folder where that is missing; whatever happens, the file is there whole or as it was.

    It is written under a name of its own, ``PATH.tmp``, always the same and locked while the writer lives: what a
    killed process left is overwritten, and processes that write the same file wait for one another. A link is replaced.

    Args:
        content: the bytes, or what writes them to an open file; remedy: what the user can do where that fails.

    Raises:
        InputError: full disk, no permission, a folder of that name; KeyboardInterrupt: it was interrupted.
    """
    short = path.name if len(path.name.encode()) < 240 else hashlib.blake2b(path.name.encode()).hexdigest()[:32]
    temporary = path.with_name(f"{short}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _open_alone(temporary) as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()
                temporary.replace(path)
        except BaseException:
            _drop(temporary)
            raise
    except (OSError, RuntimeError) as error:
        cause = _buried(error)
        if cause is None:
            raise
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise InputError(f"{path}: cannot be written ({reason(cause)}); {remedy}") from error
    return path


def writing(path: Path, remedy: str = ROOM, *kinds: type[Exception]) -> contextlib.AbstractContextManager[None]:
    """For what is written piece by piece: an error of the system becomes an `InputError` about ``path``."""
    return told(lambda error: f"{path}: cannot be written ({reason(error)}); {remedy}", OSError, *kinds)


def write_text(path: Path, text: str, remedy: str = ROOM) -> Path:
    """Writes a UTF-8 file as `write_bytes` does."""
    return write_bytes(path, text.encode("utf-8"), remedy)


def write_json(path: Path, content: Mapping[str, Any], remedy: str = ROOM, indent: int | None = None) -> Path:
    """Writes a JSON object, not empty, with a checksum that `read_json` verifies."""
    return write_text(path, sealed(json.dumps(content, indent=indent)) + "\n", remedy)


def write_array(path: Path, array: np.ndarray, remedy: str = ROOM) -> Path:
    """Writes an array as ``.npy``, which numpy reads too, with a checksum behind the numbers."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    content = buffer.getvalue()
    return write_bytes(path, content + _MARK + zlib.crc32(content).to_bytes(4, "big"), remedy)


def read_array(path: Path) -> np.ndarray | None:
    """The array of an ``.npy`` file; None if it is missing or damaged."""
    try:
        content = path.read_bytes()
        body, mark, checksum = content.rpartition(_MARK) if _MARK in content[-len(_MARK) - 4 :] else (content, b"", b"")
        if mark and checksum != zlib.crc32(body).to_bytes(4, "big"):
            return None
        stream = io.BytesIO(body)
        array = np.load(stream, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError):  # numpy parses the header as Python
        return None
    return array if isinstance(array, np.ndarray) and stream.tell() == len(body) else None


def write_tensors(path: Path, state: Mapping[str, Tensor], remedy: str = ROOM) -> Path:
    """Writes tensors as safetensors, with a checksum in the metadata."""
    from safetensors.torch import save

    state = {name: value.detach().contiguous().cpu() for name, value in state.items()}
    return write_bytes(path, save(state, {"crc32": _tensor_checksum(state)}), remedy)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; ValueError: it is damaged, OSError: it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            expected = (file.metadata() or {}).get("crc32")
    except SafetensorError as error:
        raise ValueError(f"damaged, {reason(error)}") from error
    if expected is not None and expected != _tensor_checksum(state):
        raise ValueError("damaged, its checksum is wrong")
    return state


def sealed(text: str) -> str:
    """The text of a JSON object, not empty, with its checksum as the last entry."""
    body = text.rstrip().removesuffix("}").rstrip()
    return f'{body}, "checksum": "{zlib.crc32(body.encode()):08x}"}}'


def is_whole(text: str) -> bool:
    """Whether the text of a JSON object is as `sealed` left it; True where it has no checksum."""
    seal = _SEAL.search(text, max(0, len(text) - 64))
    return seal is None or f"{zlib.crc32(text[: seal.start()].encode()):08x}" == seal.group(1)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone has the lock of a folder, or of a file, made where it is missing (else an OSError).

    The lock dies with the process. True also where the file system knows no locks, and once it is free with ``wait``.
    """
    if fcntl is None:
        yield True
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _lock(descriptor, wait)
    finally:
        os.close(descriptor)


def digest(parts: Iterable[bytes]) -> str:
    """A short fingerprint of values that two processes or runs must share: 64 bits of BLAKE2b, in hexadecimal."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part + b"\n")
    return found.hexdigest()


def hash_file(path: Path) -> str:
    """Names the content of a file: 128 bits of BLAKE2b, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def hash_files(paths: Iterable[Path], threads: int = 4) -> dict[Path, str | InputError]:
    """The content hash of each file, or why it cannot be read."""

    def attempt(path: Path) -> str | InputError:
        try:
            return hash_file(path)
        except OSError as error:
            return InputError(f"{path}: cannot be read ({reason(error)}); check the path")

    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(threads) as pool:  # hashing and reading let other threads run
        return dict(zip(unique, pool.map(attempt, unique), strict=True))


def _open_alone(path: Path) -> BinaryIO:
    """The file, empty, open for writing by this process alone."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666), "wb")
        try:
            _lock(file, wait=True)
            # The one who had it before may have given it its final name, also between two questions about it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _drop(path: Path) -> None:
    """Removes what a failure or an interruption left half written, at any moment; not what another process writes."""
    with contextlib.suppress(OSError):  # which would hide the reason
        if stat.S_ISREG(path.lstat().st_mode):
            with locked(path) as alone:
                if alone:
                    path.unlink()


def _lock(file: BinaryIO | int, wait: bool) -> bool:
    """Locks an open file against other processes; False if another one has the lock."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _buried(error: BaseException) -> OSError | KeyboardInterrupt | None:
    """The system's error or the interruption behind an exception: torch.save may bury a full disk or a Ctrl-C under an
    error of its own."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, (OSError, KeyboardInterrupt)):
        seen = seen.__cause__ or seen.__context__
    return seen


def _tensor_checksum(state: Mapping[str, Tensor]) -> str:
    import torch

    found = 0
    for name in sorted(state):
        value = state[name]
        found = zlib.crc32(f"{name}{value.dtype}{tuple(value.shape)}".encode(), found)
        found = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def brief(problems: Sequence[str], what: str) -> list[str]:
    """The problems as notes: the first twenty, and a last line that counts all of them as ``what``."""
    if not problems:
        return []
    notes = [one_line(problem) for problem in problems[:NOTES_OF_A_KIND]]
    more = len(problems) - len(notes)
    return [*notes, f"{len(problems)} {what}" + (f" (the first {len(notes)} are named above)" if more else "")]


def counted(*notes: tuple[int, str]) -> list[str]:
    """Of notes those with a number that is not 0, which comes first."""
    return [f"{count} {what}" for count, what in notes if count]


def listing(names: Iterable[str], limit: int = 30) -> str:
    """Names for an error message: comma-separated, in order, at most ``limit`` of them."""
    names = [one_line(name) for name in names]
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "") or "none"


def excerpt(value: object, length: int = 60) -> str:
    """What a file holds, for a message; it may be nested deep, or a number of thousands of digits."""
    try:
        return str(value)[:length]
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"


def safe_name(name: str) -> str:
    """A name as one plain file name: letters, digits, ``.``, ``-`` and ``_`` stay, anything else becomes ``_``.

    Neither a slash, a drive, ``..``, a hidden file nor a name longer than file systems take comes out.
    """
    plain = re.sub(r"[^\w.-]", "_", name).strip("._-") or "unnamed"
    while len(plain.encode()) > 150:
        plain = plain[:-1]
    return plain


@contextlib.contextmanager
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
    part, old = unfinished(out), out.with_name(f".{out.name}.old")
    about, ours, homes = dict(about or {}), False, list[Path]()
    try:
        _end_swap(out, old)
        check_new_folder(out, reads)
        made = _manifest(out) if out.is_dir() and any(out.iterdir()) else None
        if made is not None and not overwrite and not (extend and made == about):
            raise InputError(f"{out}: already holds an export; choose another, or replace it (--overwrite)")
        if part.is_symlink():
            raise InputError(f"{part}: is a link; remove it")
        homes = [home for home in part.parents if not home.exists()]
        part.mkdir(parents=True, exist_ok=True)
        with locked(part) as alone:
            if not alone:
                raise InputError(f"{part}: another process is writing there; wait for it")
            ours = True
            _empty(part)
            if made is not None and not overwrite:
                _link_files(out, part)
            yield part
            digests = {path.relative_to(part).as_posix(): hash_file(path) for path in _files(part)}
            write_text(part / MANIFEST, json.dumps({"about": about, "files": digests}))
            if made is not None:
                out.rename(old)
            part.rename(out)  # an empty folder may be replaced
    except OSError as error:
        where = error.filename or out
        raise InputError(f"{where}: cannot be written ({reason(error)}); choose another place") from error
    except InputError as error:  # about a file in the folder that nobody will find
        raise InputError(str(error).replace(str(part), str(out))) from error
    finally:
        if ours:
            with contextlib.suppress(OSError):
                _end_swap(out, old)
            shutil.rmtree(part, ignore_errors=True)
            with contextlib.suppress(OSError):  # where something came of the work, they are not empty
                for home in homes:
                    home.rmdir()


def _end_swap(out: Path, old: Path) -> None:
    """Removes the folder that was replaced, or puts it back where a kill or an interruption came in between."""
    if old.is_dir() and not old.is_symlink() and (old / MANIFEST).is_file():
        if out.exists():
            _empty(old, but=MANIFEST)  # which goes last: by it the rest is known as ours
            shutil.rmtree(old)
        else:
            old.rename(out)


def _empty(folder: Path, but: str = "") -> None:
    for entry in folder.iterdir():
        if entry.name != but:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def unfinished(out: Path) -> Path:
    """The folder that `whole_folder` fills until all is there."""
    return out.with_name(f".{out.name}.part")


def check_new_folder(out: Path, reads: Iterable[Path]) -> None:
    """`InputError` where a folder to write holds, or lies in, what is read. Links are followed."""
    home = real_path(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: there is a file or link of that name; choose another folder")
    for path in reads:
        read = real_path(path)
        if read.is_relative_to(home):
            raise InputError(f"{out}: holds {path}, which is read; choose another folder")
        if home.is_relative_to(read) and path.is_dir():
            raise InputError(f"{out}: lies in {path}, which is read; choose a folder outside")


def changed(folder: Path) -> set[Path]:
    """The files of a folder that `whole_folder` made which somebody has changed since; none of another folder."""
    try:
        digests = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
        return {path for path in _files(folder) if digests.get(path.relative_to(folder).as_posix()) != hash_file(path)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _manifest(folder: Path) -> dict[str, Any]:
    """What is remembered of a folder that `whole_folder` made; `InputError` where it holds anything else."""
    said = f"{folder}: is not empty and no export of labelpenet; choose a new folder"
    with told(said, OSError, ValueError, KeyError, TypeError):
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        about, digests = content["about"], dict(content["files"])
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST and (name not in digests or path.is_symlink() or hash_file(path) != digests[name]):
            raise InputError(f"{path}: was added or changed since the export; move it away, or choose another folder")
    return about


def _files(folder: Path) -> list[Path]:
    """All files and links below a folder, in order; links are not followed."""
    return sorted(Path(home) / name for home, _, names in os.walk(folder) for name in names)


def _link_files(folder: Path, into: Path) -> None:
    """The files of a folder once more, without copying their content where the disk can share it."""
    for path in _files(folder):
        target = into / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(path)
        except OSError:
            shutil.copy2(path, target)
