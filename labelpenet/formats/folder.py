"""A folder of photographs with a tags file, or with one sub-folder per class.

- ``tags.csv``: a header ``file,tags``, then an image a row; several tags are separated by ``;``, none makes a negative.
- ``tags.json``: ``{"file": ["tag", ...], ...}``.
- sub-folders: each image has the name of its sub-folder as its one tag.

Files are named relative to the folder. ``SPLIT.txt`` in the folder (a file name a line) makes a split.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from labelpenet.data.dataset import NamedImage, TaggedImages, choose_classes, tag_images
from labelpenet.data.files import brief, inside, is_file, listing, read_json, read_text
from labelpenet.data.images import SUFFIXES
from labelpenet.errors import InputError

SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "trainval")
# Folders that other layouts use: never classes, or a data set that lacks a file would be read as something else.
_NO_CLASSES = ("images", "annotations", "labels", "jpegimages", "imagesets", "segmentationclass", "segmentationobject")


def open_tags_file(
    path: Path, split: str | None = None, classes: Sequence[str] | None = None, images: Path | None = None
) -> TaggedImages:
    """The tagged images of a ``tags.csv`` or ``tags.json``.

    Args:
        path: the tags file.
        split: a name for which ``SPLIT.txt`` lies beside the file, or a text file of file names.
        classes: names of the classes, in label order; None: all tags, in alphabetical order.
        images: the folder that the names are relative to; None: the file's own.

    Raises:
        InputError: the file is damaged, a class or the split is unknown, or no image can be used.
    """
    tags, notes = _read_csv(path) if path.suffix.lower() == ".csv" else _read_tags_json(path)
    home = images or path.parent
    untagged = sum(name not in tags for name in _image_files(home))
    if untagged:
        notes.append(f"{untagged} images of {home} do not stand in {path.name}; they are not used")
    return tag_names(tags, home, path, split, classes, notes)


def open_class_folders(data: Path, split: str | None = None, classes: Sequence[str] | None = None) -> TaggedImages:
    """The images of a folder with one sub-folder per class, each with that class as its tag. No deeper folder is read.

    Args:
        data: the folder.
        split: a name for which ``SPLIT.txt`` lies in the folder, or a text file of file names.
        classes: names of the classes, in label order; images of other sub-folders are negatives. None: all.

    Raises:
        InputError: a class or the split is unknown, or no image can be used.
    """
    folders = class_folders(data)
    tags = {f"{name}/{file}": frozenset({name}) for name in folders for file in _image_files(data / name)}
    loose = len(_image_files(data))
    notes = [f"{loose} images lie in no class's sub-folder; they are not used"] if loose else []
    return tag_names(tags, data, data, split, classes, notes)


def class_folders(data: Path) -> list[str]:
    """Names of the sub-folders that hold images; none at all where one has a name that another layout uses."""
    names = sorted(path.name for path in data.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    if any(name.lower() in (*SPLIT_NAMES, *_NO_CLASSES) for name in names):
        return []
    return [name for name in names if _image_files(data / name)]


def tag_names(
    tags: dict[str, frozenset[str]],
    home: Path,
    source: Path,
    split: str | None,
    classes: Sequence[str] | None,
    notes: Sequence[str],
) -> TaggedImages:
    """Tagged images from tags by file name relative to ``home``; ids are these names.

    Raises:
        InputError: unknown class or split, or no usable image.
    """
    chosen, split_notes = _restrict(tags, home, source, split)
    found, problems = [], []
    for name in chosen:
        try:
            path = inside(home, name)
            if not is_file(path):
                raise InputError(f"{path}: no such image; add it or remove it from {source.name}")
            found.append(NamedImage(name, path, tags[name]))
        except InputError as error:
            problems.append(str(error))
    known = {tag for names in tags.values() for tag in names}
    tagged = tag_images(found, choose_classes(classes, known, source) if found else (), problems, source)
    return TaggedImages(tagged.classes, tagged.images, (*notes, *split_notes, *tagged.notes))


def tag_set(values: Iterable[Any]) -> frozenset[str]:
    """Tags without the space around them, and with one blank for any space within; empty ones are left out."""
    return frozenset(" ".join(str(value).split()) for value in values) - {""}


def _restrict(
    tags: dict[str, frozenset[str]], home: Path, source: Path, split: str | None
) -> tuple[list[str], list[str]]:
    """The names of a split, in the order of ``tags``, and notes. A data set without any lists is used whole."""
    lists = [path.stem for path in sorted(home.glob("*.txt")) if path.stem.lower() in SPLIT_NAMES]
    if split is None:
        return list(tags), []
    for path in (home / f"{split}.txt", Path(split)):
        if path.suffix and is_file(path):
            wanted = {line.strip().replace("\\", "/") for line in read_text(path).splitlines()} - {""}
            chosen = [name for name in tags if name in wanted]
            if not chosen:
                raise InputError(f"{path}: names no image of {source}; give file names relative to {home}")
            missing = sorted(wanted - set(chosen))
            return chosen, [f"{len(missing)} lines of {path.name} name no tagged image"] if missing else []
    if lists:
        raise InputError(f"{source}: no split {split!r}; available are {listing(lists)}, or give a text file")
    return list(tags), [f"{source} has no splits: all its images are used as {split!r}"]


def _read_csv(path: Path) -> tuple[dict[str, frozenset[str]], list[str]]:
    try:
        rows = list(csv.reader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise InputError(f"{path}: no valid CSV ({error}); save it again as file,tags") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if "file" not in header or "tags" not in header:
        raise InputError(f"{path}: its first line must be file,tags, but is {','.join(header)[:60]!r}")
    file, tag = header.index("file"), header.index("tags")
    tags: dict[str, frozenset[str]] = {}
    problems = []
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        name = row[file].strip().replace("\\", "/") if len(row) > file else ""
        if not name:
            problems.append(f"{path}: row {number} names no file")
            continue
        if name in tags:
            problems.append(f"{path}: row {number} names {name[:80]} again; the tags are put together")
        cell = row[tag] if len(row) > tag else ""
        tags[name] = tags.get(name, frozenset()) | tag_set(cell.split(";"))
    return tags, brief(problems, "rows look odd")


def _read_tags_json(path: Path) -> tuple[dict[str, frozenset[str]], list[str]]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f'{path}: expected {{"file": ["tag", ...], ...}}; write one object with a list for each file')
    tags: dict[str, frozenset[str]] = {}
    problems = []
    for name, values in content.items():
        if isinstance(values, str):
            values = values.split(";")
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            problems.append(f"{path}: the tags of {name[:80]} are no list of names; it is passed over")
        else:
            tags[name.replace("\\", "/")] = tag_set(values)
    return tags, brief(problems, "files have no list of tags")


def _image_files(folder: Path) -> list[str]:
    """Names of the image files that lie directly in a folder, in order; hidden ones are left out."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file()]
    return sorted(name for name in names if not name.startswith("."))
