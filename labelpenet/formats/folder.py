"""A folder of photographs with a tags file, or with one sub-folder per class.

- CSV, ``,`` ``;`` or tab: a header, then an image a row (or several rows: their tags are put together). A column names
  the file, with or without suffix; another holds its tags, or each class has a column of 0 and 1.
- JSON ``{"file": ["tag", ...], ...}``, and lines of JSON such as Hugging Face's ``metadata.jsonl``.
- sub-folders: each image has the name of its sub-folder as its one tag.

Files are named relative to the folder. ``SPLIT.txt`` in the folder (a file name a line) makes a split.
"""

import ast
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labelpenet.data.dataset import Classes, NamedImage, Opened, TaggedImages, only_tagged, tag_images
from labelpenet.data.files import (
    brief,
    counted,
    excerpt,
    inside,
    is_file,
    is_hidden,
    listing,
    nfc,
    read_json,
    read_text,
)
from labelpenet.data.images import SUFFIXES
from labelpenet.errors import InputError, collected, told
from labelpenet.formats.shapes import PROBE, image_folder

SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "trainval")
_SPLIT_OF = {"training": "train", "valid": "val", "validation": "val"}
# Folders that other layouts use: never classes, or a data set that lacks a file would be read as something else.
_NO_CLASSES = (
    *("images", "annotations", "labels", "jpegimages", "imagesets", "segmentationclass", "segmentationobject", "masks"),
    *("data", "obj_train_data", "obj_valid_data", "obj_test_data", "obj_validation_data"),
    *("img", "imgs", "image", "mask", "gt", "leftimg8bit", "gtfine", "default", "defaultannot"),
)
_UNLABELLED = ("no_label", "_unlabeled")  # where CVAT and datumaro, and FiftyOne, put photographs without a class
_NO_TAGS = ("nan", "none", "null", "n/a", "na", "-", "?")
FILE_COLUMNS = ("file", "filename", "file_name", "image", "image_id", "image_path", "path", "filepath")
TAG_COLUMNS = ("tags", "labels", "tag", "label", "classes", "class", "categories", "category")
_REMEDY = (
    f"name them {' or '.join(FILE_COLUMNS[:5])}, and {' or '.join(TAG_COLUMNS[:4])} "
    "(or give each class a column of 0 and 1)"
)


@dataclass
class _Table:
    """What a tags file says: tags by file as written there, or the cells (name, line, texts) in which they stand
    together, what looked odd, and what is to be said once."""

    tags: dict[str, frozenset[str]] = field(default_factory=dict)
    cells: list[tuple[str, int, list[str]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, tags: frozenset[str]) -> None:
        self.tags[name] = self.tags.get(name, frozenset()) | tags


def open_tags_file(
    path: Path, split: str | None = None, classes: Sequence[str] | None = None, images: Path | None = None
) -> TaggedImages:
    """The tagged images of a CSV, JSON or JSON-lines file of tags.

    Args:
        path, classes: as `open.open_tagged` takes them; errors, too.
        split: a name for which ``SPLIT.txt`` lies beside the file or the photographs, or a text file of file names.
        images: the folder that the names are relative to; None: the file's own, or ``images``, ``data`` or one of the
            file's name there.
    """
    suffix = path.suffix.lower()
    table = _read_lines(path) if suffix == ".jsonl" else _read_json(path) if suffix == ".json" else _read_csv(path)
    _add_cells(table, path)
    stemless = any(Path(name).suffix.lower() not in SUFFIXES for name in table.tags)
    folders = [images] if images else [path.parent, *(path.parent / name for name in ("images", "data", path.stem))]
    stems = {folder: _stems(folder) if stemless else {} for folder in folders if folder.is_dir()}
    first = list(table.tags)[:PROBE]
    held = {folder: sum(exists(folder, name) or nfc(name) in stems[folder] for name in first) for folder in stems}
    home, said = image_folder(held, path) if any(held.values()) else (images or path.parent, [])
    tags: dict[str, frozenset[str]] = {}
    for name, names in table.tags.items():
        fitting = [] if exists(home, name) else stems[home].get(nfc(name), [])
        if len(fitting) > 1:
            table.problems.append(f"{path}: {name[:80]} may be {listing(fitting)}; write the suffix")
        else:
            full = fitting[0] if fitting else name
            tags[full] = tags.get(full, frozenset()) | names
    if not tags and table.problems:
        raise InputError(table.problems[0])
    notes = [*table.notes, *said, *brief(table.problems, "rows look odd")]
    occurring = set().union(*tags.values()) if tags else set()
    if occurring and all(name.isdigit() for name in occurring):
        numbers = sorted(occurring, key=lambda name: (len(name), name))  # int takes neither ² nor 5,000 digits
        notes.append(f"{path.name} calls the classes by numbers: {listing(numbers)}")
    named = set(map(nfc, tags))
    untagged = sum(nfc(name) not in named for name in _all_images(home))
    notes += counted((untagged, f"images of {home} do not stand in {path.name}; they are not used"))
    known = known_beside(path.parent, classes, occurring, lambda part: open_tags_file(part / path.name))
    return tag_names(tags, home, path, split, classes, notes, known)


def open_class_folders(data: Path, split: str | None = None, classes: Sequence[str] | None = None) -> TaggedImages:
    """The images of a folder with one sub-folder per class, each with that class as its tag, also those deeper down.

    Where all images lie a folder deeper (``animals/cat/1.jpg``), ``classes`` says which of the two levels is meant.
    Images of sub-folders that are not asked for are negatives. Arguments and errors as `open_tags_file`.
    """
    held = class_folders(data)
    level, notes = 0, []
    for name in set(_UNLABELLED) & set(held) - set(classes or ()):
        notes.append(f"{len(held.pop(name))} images lie in {name}, which is no class; they are not used")
    files = [name.split("/") for names in held.values() for name in names]
    deep = sum(len(parts) > 2 for parts in files)
    if deep == len(files):
        upper, lower = ({nfc(parts[one]) for parts in files} for one in (0, 1))
        fits = [set(classes or ()) <= names for names in (upper, lower)]
        if classes is None or fits[0] == fits[1]:
            raise InputError(
                f"{data}: all photographs lie two folders deep; name the classes, of the upper folders "
                f"({listing(sorted(upper), 5)}) or of the lower ones ({listing(sorted(lower), 5)})"
            )
        level = fits.index(True)
    notes += counted((deep, f"images lie deeper; their class is the {'lower' if level else 'upper'} folder's name"))
    tags = {"/".join(parts): frozenset({nfc(parts[level])}) for parts in files}
    for copies in _copies(data, tags):
        tags[copies[0]] = frozenset().union(*(tags[name] for name in copies))
        for name in copies[1:]:
            del tags[name]
    same = "images are copies of one of the same name in another class's folder: it has all the tags"
    notes += counted((len(files) - len(tags), same))
    empty = {path.name for path in data.iterdir() if path.is_dir()} - {parts[0] for parts in files} - set(_UNLABELLED)
    if empty := {name for name in empty if not _is_passed_over(name)}:
        notes.append(f"no photograph lies in {listing(sorted(empty))}: no class of that name")
    if unread := sum(is_file(beside(data / name, ".xml")) for name in tags):
        notes.append(
            f"{unread} images have an XML file beside them, which is not read: the sub-folders are taken as classes; "
            "for what the XML says give a folder whose photographs lie in no sub-folder"
        )
    notes += counted((len(image_files(data)), "images lie in no class's sub-folder; they are not used"))
    known = known_beside(data, classes, set().union(*tags.values()), open_class_folders)
    return tag_names(tags, data, data, split, classes, notes, known)


def known_beside(data: Path, classes: Classes, known: Iterable[str], opened: Callable[[Path], Opened]) -> set[str]:
    """The ``known`` class names and, where one that is asked for is none, those of the data set's other parts (read by
    ``opened``): a small ``val`` beside ``train`` need not show every class.
    """
    names = set(known)
    if data.resolve().name.lower() in SPLIT_NAMES and not names.issuperset(classes or ()):
        parts = (part for part in data.resolve().parent.iterdir() if part.name.lower() in SPLIT_NAMES)
        for part in filter(Path.is_dir, parts):
            with suppress(InputError):  # what is wrong with another part is no matter here
                names.update(only_tagged(opened(part)).classes)
    return names


def _copies(data: Path, tags: Mapping[str, frozenset[str]]) -> Iterator[list[str]]:
    """Names of files of one content and file name with different tags, as CVAT and datumaro write several classes."""
    named: dict[str, list[str]] = {}
    for name in tags:
        named.setdefault(name.rsplit("/", 1)[-1], []).append(name)
    for names in named.values():
        sizes = {name: (data / name).stat().st_size for name in names} if len(names) > 1 else {}
        alike: dict[bytes, list[str]] = {}
        for name in (one for one in sizes if list(sizes.values()).count(sizes[one]) > 1):
            alike.setdefault((data / name).read_bytes(), []).append(name)
        yield from (one for one in alike.values() if len({tags[name] for name in one}) > 1)


def class_folders(data: Path) -> dict[str, list[str]]:
    """The images below each sub-folder; nothing at all where a folder has a name that another layout uses."""
    found: dict[str, list[str]] = {}
    for name in _all_images(data):
        folders = name.split("/")[:-1]
        if any(one.lower() in (*SPLIT_NAMES, *_NO_CLASSES) for one in folders):
            return {}
        if folders:
            found.setdefault(folders[0], []).append(name)
    return found


def tag_names(
    tags: dict[str, frozenset[str]],
    home: Path,
    source: Path,
    split: str | None,
    classes: Sequence[str] | None,
    notes: Sequence[str],
    more: Iterable[str] = (),
) -> TaggedImages:
    """Tagged images from tags by their id, a name in ``home``; ``more`` classes are known. Errors as `tag_images`."""
    chosen, split_notes = restrict(tags, home, source, split)
    found, problems = [], list[str]()
    for name in chosen:
        with collected(problems):
            path = inside(home, name)
            if not is_file(path):
                raise InputError(
                    f"{path}: no such image; add it, remove it from {source.name}, or give its folder (--images)"
                )
            found.append(NamedImage(name, path, tags[name]))
    known = {tag for names in tags.values() for tag in names}
    notes = [*notes, *split_notes, *_doubts(known, classes or (), source)]
    return tag_images(found, classes, known.union(more), problems, source, notes)


def _doubts(known: set[str], classes: Sequence[str], source: Path) -> Iterator[str]:
    """Notes on tags that may be none; `InputError` where one may be several and is none of ``classes``."""
    for tag in sorted(known - set(classes)):
        parts = [part for part in re.split(r"[\s/+&,;|]+", tag) if part.lower() != "and"]
        if len(parts) > 1 and known.issuperset(parts):
            raise InputError(
                f"{source}: {tag!r} may be one tag or several, for {listing(parts)} are tags, too; "
                f"write {';'.join(parts)}, or name the classes"
            )
        if tag.lower() in _NO_TAGS:
            yield f"{source.name}: {tag!r} is taken for a class; leave the place empty where there is no tag"


def tag_set(values: Iterable[Any]) -> frozenset[str]:
    """Tags without the space around them, and with one blank for any space within; empty ones are left out."""
    return frozenset(" ".join(nfc(str(value)).split()) for value in values) - {""}


def restrict(names: Iterable[str], home: Path, source: Path, split: str | None) -> tuple[list[str], list[str]]:
    """Those of the names that are in a split, in order, and notes; its list lies beside the photographs or the file
    that describes them. A data set without any lists is used whole.
    """
    folders = list(dict.fromkeys([source.parent if source.is_file() else source, home]))
    files = [path for folder in folders for path in sorted(folder.glob("*.txt"))]
    lists = [path.stem for path in files if path.stem.lower() in SPLIT_NAMES]
    names = list(names)
    if split is None:
        return names, [f"no split is named: all are used, of {listing(lists)} too"] if lists else []
    path = list_file(split, folders, source)
    if path is not None:
        wanted = {nfc(_name(line)) for line in read_text(path).splitlines()} - {""}
        chosen = [name for name in names if nfc(name) in wanted]
        if not chosen:
            raise InputError(f"{path}: names no image of {source}; give file names relative to {home}")
        missing = wanted.difference(map(nfc, chosen))
        return chosen, [f"{len(missing)} lines of {path.name} name no tagged image"] if missing else []
    if lists:
        raise InputError(f"{source}: no split {split!r}; available are {listing(lists)}, or give a text file")
    return names, [f"{source} has no splits: all its images are used as {split!r}"]


def plain_split(name: str) -> str:
    """The name of a split in its shortest form: ``valid`` and ``validation`` are ``val``."""
    return _SPLIT_OF.get(name, name)


def list_file(split: str, folders: Iterable[Path], source: Path) -> Path | None:
    """A split's ``SPLIT.txt`` in one of the folders, or a text file; `InputError` where there is no such file."""
    own = Path(os.path.expanduser(split))  # noqa: PTH111 the shell leaves the ~ of --split=~/few.txt; no home, no error
    for path in (*(folder / f"{split}.txt" for folder in folders), own):
        if path.suffix and is_file(path):
            return path
    if split.lower().endswith(".txt") or "/" in split or "\\" in split:
        raise InputError(f"{split}: no such list of photographs of {source}; check the path")
    return None


def _read_csv(path: Path) -> _Table:
    """A row a file, or several; a column of tags, or one of 0 and 1 for each class."""
    text = read_text(path)
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    with told(lambda error: f"{path}: line {reader.line_num}: no valid CSV ({error}); save it again", csv.Error):
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    header = [cell.strip() for cell in rows[0][1]] if rows else []
    file, tag = _columns(header, path)
    table, extra = _Table(), 0
    for number, row in rows[1:]:
        name = _name(row[file]) if len(row) > file else ""
        if not name:
            table.problems.append(f"{path}: line {number} names no file")
            continue
        more = [cell for cell in row[len(header) :] if cell.strip()]
        if more and tag != len(header) - 1:
            raise InputError(
                f"{path}: line {number} has {len(row)} cells for {len(header)} columns; put several tags in quotes"
            )
        if "\n" in "".join([row[file], *row[tag : tag + 1], *more] if tag is not None else []):
            raise InputError(f"{path}: line {number}: a name or tag goes on in the next line; close its quotation mark")
        extra += bool(more)
        table.cells.append((name, number, [*row[tag : tag + 1], *more] if tag is not None else row))
    again = len(table.cells) - len({name for name, _, _ in table.cells})
    table.notes += counted((again, f"rows of {path.name} name a file again; the tags of a file are put together"))
    if tag is None:
        for name, number, row in table.cells:
            table.add(name, _marked(header, file, row, f"{path}: line {number}"))
        table.cells = []
        return table
    longer = f"lines of {path.name} are longer than the first; all that follows is taken as tags"
    unread = [one for index, one in enumerate(header) if one and index not in (file, tag)]
    table.notes += counted((extra, longer))
    if unread:
        table.notes.append(f"{path.name}: the columns {listing(unread, 8)} are not read")
    return table


def _columns(header: Sequence[str], path: Path) -> tuple[int, int | None]:
    """Where the file's name and its tags stand; None for the tags where all other columns are classes."""
    names = [name.lower() for name in header]
    files = [names.index(name) for name in FILE_COLUMNS if name in names]
    tags = [names.index(name) for name in TAG_COLUMNS if name in names]
    twice = sorted({name for name in header if header.count(name) > 1})
    if not files or len(header) < 2:
        raise InputError(f"{path}: its first line must name the columns, but is {','.join(header)[:60]!r}; {_REMEDY}")
    if len(tags) > 1 or twice:
        columns = listing(twice or [header[index] for index in tags])
        raise InputError(f"{path}: several columns could hold the tags ({columns}); leave one")
    return files[0], tags[0] if tags else None


def _marked(header: Sequence[str], file: int, row: Sequence[str], where: str) -> frozenset[str]:
    """The names of the columns that hold 1."""
    found = []
    for index, (name, cell) in enumerate(zip(header, row, strict=False)):
        mark = cell.strip().lower()
        if index != file and mark not in ("", "0", "1", "0.0", "1.0", "false", "true"):
            raise InputError(f"{where}: column {name!r} holds {cell[:40]!r}, not 0 or 1; remove it, or call it tags")
        if index != file and mark in ("1", "1.0", "true"):
            found.append(name)
    return tag_set(found)


def _add_cells(table: _Table, path: Path) -> None:
    """Adds the tags of cells: ``cat;dog``, ``cat|dog``, ``cat, dog`` (one mark in a file) or ``["cat", "dog"]``."""
    joined = [(text, number) for _, number, texts in table.cells for text in texts if not text.strip().startswith("[")]
    lines = {mark: next((number for text, number in joined if mark in text), 0) for mark in ";|,"}
    marks = {mark: number for mark, number in lines.items() if number}
    if len(marks) > 1:
        where = " and ".join(f"{mark!r} (line {number})" for mark, number in marks.items())
        raise InputError(f"{path}: tags are separated by {where}; use ; alone")
    mark = next(iter(marks), ";")
    if mark != ";":
        table.notes.append(f"{path.name}: tags are separated by {mark!r}")
    for name, number, texts in table.cells:
        found: list[Any] = []
        for text in texts:
            if not text.strip().startswith("["):
                found += text.split(mark)
                continue
            try:
                if re.search(r"""['"]\s+['"]""", text):  # NumPy's, which Python would take for one text
                    raise ValueError("no comma")
                found += _plain_list(ast.literal_eval(text.strip()), f"{path}: line {number}")
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise InputError(f"{path}: line {number}: no list of tags: {text[:60]!r}; write cat;dog") from error
        table.add(name, tag_set(found))


def _plain_list(value: Any, where: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in values):
        raise InputError(f"{where}: tags must be names, but are {excerpt(value)}; write them as a list of texts")
    return [str(one) for one in values]


def _read_lines(path: Path) -> _Table:
    """JSON lines: ``{"file_name": "a.jpg", "labels": ["cat"]}``, or with ``objects`` and their ``categories``."""
    table = _Table()
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({error}); save it again") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: no object; write one with file_name and labels")
        row = {key.lower(): value for key, value in row.items()}
        name = next((row[key] for key in FILE_COLUMNS if key in row), None)
        objects = row["objects"] if isinstance(row.get("objects"), dict) else {}
        values = [part[key] for part in (row, objects) for key in TAG_COLUMNS if part.get(key) is not None]
        if not isinstance(name, str) or len(values) != 1:
            raise InputError(f"{where}: it must name one file and its tags once; {_REMEDY}")
        if isinstance(values[0], str):
            table.cells.append((_name(name), number, [values[0]]))
        else:
            table.add(_name(name), tag_set(_plain_list(values[0], where)))
    return table


def _read_json(path: Path) -> _Table:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f'{path}: expected {{"file": ["tag", ...], ...}}; write one object with a list for each file')
    table = _Table()
    # in pairs, for of a name that stands there twice an object has the last tags alone
    pairs = [pair for pair in json.loads(read_text(path), object_pairs_hook=list) if pair[0] in content]
    again = len(pairs) - len(content)
    table.notes += counted((again, f"entries of {path.name} name a file again; the tags of a file are put together"))
    for number, (name, values) in enumerate(pairs, 1):
        if isinstance(values, str):
            table.add(_name(name), frozenset())  # its place among the others
            table.cells.append((_name(name), number, [values]))
        elif not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            table.problems.append(f"{path}: the tags of {name[:80]} are no list of names; it is skipped")
        else:
            table.add(_name(name), tag_set(values))
    return table


def disk_form(path: Path) -> Path:
    """The path, or where there is no such file the one whose name has its accents in Unicode's other form."""
    if not path.name.isascii() and not is_file(path):
        with suppress(InputError):
            return inside(path.parent, path.name)
    return path


def beside(path: Path, suffix: str) -> Path:
    """The file of the same name with another suffix, in the form in which it lies there (`disk_form`)."""
    return disk_form(path.with_suffix(suffix))


def _name(text: str) -> str:
    return text.strip().replace("\\", "/").removeprefix("./")


def exists(home: Path, name: str, kind: Callable[[Path], bool] = is_file) -> bool:
    """Whether a name, as the data set writes it, is a file (or another ``kind`` of entry) in the folder."""
    with suppress(InputError, OSError):
        return kind(inside(home, name))
    return False


def _stems(folder: Path) -> dict[str, list[str]]:
    """The images below a folder by their paths without suffix, as `nfc` has them."""
    found: dict[str, list[str]] = {}
    for name in _all_images(folder):
        found.setdefault(nfc(name.rsplit(".", 1)[0]), []).append(name)
    return found


def _all_images(folder: Path) -> Iterator[str]:
    """The paths of the images below a folder, in order; hidden files and folders are left out, links not followed."""
    for home, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_passed_over(name))
        below = Path(home).relative_to(folder)
        yield from ((below / name).as_posix() for name in image_files(Path(home)))


def image_files(folder: Path) -> list[str]:
    """Names of the image files that lie directly in a folder, in order; hidden ones are left out."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file()]
    return sorted(name for name in names if not is_hidden(name))


def _is_passed_over(folder: str) -> bool:
    """Whether a folder of this name is no class: hidden, or as ``__MACOSX``."""
    return is_hidden(folder) or folder.startswith("__")
