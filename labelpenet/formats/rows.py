"""The rows of COCO files: checked as they are read, matched to photographs and classes, decoded when asked for.

Shape letters: ``N`` instances, ``C`` classes.
"""

import json
import math
import os
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from pycocotools import mask as rle

from labelpenet.data.dataset import ByImage, TaggedImage
from labelpenet.data.files import brief, listing, nfc, safe_name
from labelpenet.data.images import PIXEL_LIMIT
from labelpenet.errors import InputError
from labelpenet.instances import Instances, check_segmentation, decode_mask, masks_to_boxes

Row = dict[str, Any]  # an entry of one of COCO's lists
_COORDINATE_LIMIT = 1e6  # pixels; beyond, float32 loses whole pixels


def coco_annotation(row: Mapping[str, Any]) -> Row:
    """A row of a COCO results list with what readers of annotations ask for, too: ``area`` and ``iscrowd``."""
    mask = row.get("segmentation")
    area = int(rle.area(mask)) if mask else row["bbox"][2] * row["bbox"][3]
    return {**row, "area": area, "iscrowd": 0}


def best_overlaps(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(N,) each row's best IoU with one of its category among ``others``: of masks if all have them, else of boxes."""
    if not rows or not others:
        return np.zeros(len(rows))
    kind = "segmentation" if all(row.get("segmentation") for row in (*rows, *others)) else "bbox"
    overlap = rle.iou([row[kind] for row in rows], [row[kind] for row in others], [False] * len(others))
    same = np.array([[row["category_id"] == other["category_id"] for other in others] for row in rows])
    return np.where(same, overlap, 0.0).max(1)


def coco_file(lists: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """The text of a predictions file, piece by piece, from the lines of each of its lists."""
    before = "{\n"
    for key, lines in lists.items():
        yield f'{before}"{key}": [\n'
        for number, line in enumerate(lines):
            yield f",\n{line}" if number else line
        yield "\n]"
        before = ",\n"
    yield "\n}\n"


class Lines:
    """A list of a file that `coco_file` laid out; memory holds where its lines begin, and where the last one ends.

    The file stays open, so that one that takes its place, or its removal, changes nothing.
    """

    def __init__(self, path: Path, file: BinaryIO, places: Sequence[int]) -> None:
        self._path, self._places, self._state = path, places, _state(file.fileno())
        self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)

    def __iter__(self) -> Iterator[Row]:
        return self.take(range(len(self._places) - 1))

    def take(self, numbers: Iterable[int]) -> Iterator[Row]:
        """The entries of these numbers, read now; `InputError` where the file has been written to since."""
        for number in numbers:
            first, end = self._places[number], self._places[number + 1]
            line = os.pread(self._file, end - first, first)
            if _state(self._file) != self._state:
                raise InputError(f"{self._path}: has changed while it was read; start again")
            yield json.loads(line.rstrip(b",\n"))


def coco_lists(path: Path) -> dict[str, Any] | None:
    """The lists of a file that `coco_file` wrote, the annotations as `Lines`; None where it is laid out otherwise."""
    try:
        if not path.is_file() or not hasattr(os, "pread"):  # as on Windows
            return None
        with path.open("rb") as file:
            head = file.readline(3)
            images = [entry for _, entry in _entries(file, "images")]
            between = file.readline(4)
            categories = [entry for _, entry in _entries(file, "categories")]
            between += file.readline(4)
            places = array("Q", (place for place, _ in _entries(file, "annotations")))
            places.append(file.tell())
            if (head, between, file.read(6)) != (b"{\n", b"],\n],\n", b"]\n}\n"):
                return None
            return {"images": images, "categories": categories, "annotations": Lines(path, file, places)}
    except (OSError, ValueError, RecursionError):
        return None


def _entries(file: BinaryIO, key: str) -> Iterator[tuple[int, Row]]:
    """Each entry, to the last, of the list that begins here and the place of its line; ValueError: no such layout."""
    more = file.readline(99) == f'"{key}": [\n'.encode()
    if not more:
        raise ValueError(f"no list of {key}")
    while more:
        place, line = file.tell(), file.readline(2**27)
        more = line.endswith(b",\n")
        if line == b"\n":  # the list is empty
            return
        entry = json.loads(line.removesuffix(b"\n").removesuffix(b","))
        if not isinstance(entry, dict):
            raise ValueError("no object")
        yield place, entry


def _state(file: int) -> tuple[int, int]:
    """What is another of an open file that was written to."""
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


def image_numbers(images: Sequence[TaggedImage]) -> dict[str, int]:
    """For each image id its number in COCO files: its own where every image has a different one, else 1, 2, ..."""
    own = [image.number for image in images if image.number is not None]
    if len(set(own)) == len(images):
        return {image.id: number for image, number in zip(images, own, strict=True)}
    return {image.id: position + 1 for position, image in enumerate(images)}


def name_numbers(images: Sequence[TaggedImage]) -> dict[str, int]:
    """For each image id the digits of its file's name, as 2008000001 of 2008_000001.jpg, which VOC converters use as a
    number; of images that do not all have different ones, none.
    """
    digits = {image.id: image.path.stem.replace("_", "") for image in images}
    plain = {one: text for one, text in digits.items() if text.isascii() and text.isdigit() and len(text) < 19}
    numbers = {one: int(text) for one, text in plain.items()}
    return numbers if len(set(numbers.values())) == len(images) else {}


def file_names(images: Sequence[TaggedImage]) -> dict[str, str]:
    """For each image id the name of its file in what is written, different for every image.

    The image's id where that is a path, else the file's own; where two images have the same one, the path below the
    folder that all lie in.
    """
    names = {image.id: image.id if image.id.endswith(image.path.name) else image.path.name for image in images}
    if len(set(names.values())) == len(names):
        return names
    paths = {image.id: Path(os.path.abspath(image.path)) for image in images}  # noqa: PTH100 links stay as they are
    home = os.path.commonpath([path.parent for path in paths.values()])
    return {name: path.relative_to(home).as_posix() for name, path in paths.items()}


@dataclass(frozen=True)
class Rows:
    """What was found in one image, not yet decoded."""

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    segmentations: list[Any]


@dataclass(frozen=True)
class Predictions(ByImage[Instances]):
    """The content of a predictions file by image id: a read-only mapping that decodes an image's masks when asked.

    So thousands of images fit into memory; hold on to one image's `Instances` at a time.

    Attributes:
        classes: names of the C classes that the labels count.
        notes: one line each about what was left out or changed in reading.
    """

    classes: tuple[str, ...]
    notes: tuple[str, ...]
    _known: Mapping[str, Any] = field(repr=False)  # where the rows of each image are
    _read: Callable[[str, Any], Rows] = field(repr=False)  # these, by the image's id and that

    def labels(self, image: str) -> np.ndarray:
        """(N,) int64 class indices of an image's instances, without decoding their masks."""
        return self._read(image, self._known[image]).labels

    def __getitem__(self, image: str) -> Instances:
        rows = self._read(image, self._known[image])
        masks = None
        if any(segmentation is not None for segmentation in rows.segmentations):
            empty = torch.zeros(rows.size, dtype=torch.bool)
            masks = torch.stack([empty if one is None else decode_mask(one, rows.size) for one in rows.segmentations])
        boxes = torch.from_numpy(rows.boxes).float()
        missing = torch.isnan(boxes[:, 0])
        if masks is not None and bool(missing.any()):
            boxes[missing] = masks_to_boxes(masks[missing])
        return Instances(boxes, torch.from_numpy(rows.labels), torch.from_numpy(rows.scores).float(), rows.size, masks)


def read_rows(
    path: Path, rows: list[tuple[int, Row]], labels: Mapping[Any, int | None], image_id: str, size: tuple[int, int]
) -> Rows:
    """The numbered rows of one image of size (H, W), checked: an `InputError` names file, row and fault. ``labels``
    are those of each ``category_id``.
    """
    boxes, scores, segmentations = np.zeros((len(rows), 4)), np.ones(len(rows)), []
    for i, (index, row) in enumerate(rows):
        where = f"{path}: row {index} (image {image_id})"
        segmentation = row.get("segmentation") or None
        if segmentation is not None:
            try:
                check_segmentation(segmentation, size)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
        segmentations.append(segmentation)
        if row.get("bbox") is not None:
            boxes[i] = _box(row["bbox"], size, where)
        elif segmentation is not None:
            boxes[i] = np.nan  # the mask's tight box, once it is decoded
        else:
            raise InputError(f"{where}: neither bbox nor segmentation; give at least one")
        if row.get("score") is not None:
            scores[i] = _number(row["score"], f"{where}: score")
    found = np.array([labels[row["category_id"]] for _, row in rows], dtype=np.int64)
    return Rows(size, boxes, found, scores, segmentations)


def check_same_size(path: Path, image: TaggedImage, size: tuple[int, int], true: tuple[int, int]) -> None:
    """Raises InputError if the size (H, W) that the file gives an image is not that of the photograph."""
    if size != true:
        raise InputError(
            f"{path}: says {size[1]} x {size[0]} pixels of {image.id}, but {image.path} has "
            f"{true[1]} x {true[0]} (upright); predict on this photograph, or give the one that was predicted"
        )


def read_entries(path: Path, content: dict[str, Any], key: str) -> list[Row] | None:
    """The images or categories that the file lists, None if it does not."""
    entries = content.get(key)
    if entries is None:
        return None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise InputError(f"{path}: {key} must be a list of objects with an id")
    ids = [check_id(entry["id"], f"{path}: {key}: id") for entry in entries]
    for double in _doubles(ids):
        raise InputError(f"{path}: two {key} have the id {double}; ids must differ")
    return entries


def match_images(
    path: Path, images: Sequence[TaggedImage], entries: list[Row] | None, notes: list[str]
) -> dict[Any, str | None]:
    """For every ``image_id`` that a row may carry the image it means; None for one that is not asked for."""
    by_id = {image.id: image for image in images}
    by_path = {image.path.as_posix(): image for image in images}  # as predictions of several folders may call it
    by_file = by_path | {name: by_id[one] for one, name in file_names(images).items()}
    by_name = _unique(*((image.path.name, image) for image in images))
    by_stem = _unique(*((image.path.stem, image) for image in images))
    by_number = _unique(*((image.number, image) for image in images if image.number is not None))
    if entries is None:
        # of images with numbers of their own, that another's name ends in the digits says nothing
        digits = {} if by_number else {number: by_id[one] for one, number in name_numbers(images).items()}
        return {key: image.id for key, image in (digits | by_stem | by_name | by_id | by_number).items()}
    by_copy = _unique(*((copy_name(image), image) for image in images))
    copies: dict[str, list[tuple[Any, str]]] = {}
    exact: dict[Any, TaggedImage] = {}
    called: dict[Any, TaggedImage] = {}
    alike: dict[Any, TaggedImage] = {}
    for entry in entries:
        key, name = entry["id"], entry.get("file_name")
        if name is not None and not isinstance(name, str):
            raise InputError(f"{path}: file_name of image {key} is no text")
        whole = str(key) if name is None else name.replace("\\", "/")
        base = whole if name is None else whole.rsplit("/", 1)[-1]
        stem = base if name is None else base.rsplit(".", 1)[0]
        if same := (by_number.get(key) if name is None else None) or by_id.get(whole) or by_file.get(whole):
            exact[key] = same
        elif (like := by_name.get(base)) and _may_be(whole, like):
            called[key] = like
        elif not like and (like := by_stem.get(stem)) and _may_be(whole, like):
            alike[key] = like
        elif (plain := plain_name(whole.rsplit(".", 1)[0])) in by_copy and name is not None:
            copies.setdefault(plain, []).append((key, name))
    taken, said = {image.id for image in (*exact.values(), *called.values(), *alike.values())}, []
    for plain, ((key, name), *more) in copies.items():
        if not more and by_copy[plain].id not in taken:
            alike[key] = by_copy[plain]
            said.append(f"{path}: {name} is taken for {by_copy[plain].id}, whose copy an export calls so")
    notes += brief(said, "photographs are told by their copies' names")
    # The whole path first: beside a/x.jpg, x.jpg is a photograph of its own; then the name: beside x.jpg, x.png is one.
    found = exact
    for less in (called, alike):
        named = {image.id for image in found.values()}
        found = found | {key: image for key, image in less.items() if image.id not in named}
    matched = {entry["id"]: found[entry["id"]].id if entry["id"] in found else None for entry in entries}
    for double in _doubles([name for name in matched.values() if name is not None]):
        raise InputError(
            f"{path}: two of its images are both {double}; list every image once, or give the folder that all lie in"
        )
    strangers = [str(entry.get("file_name", entry["id"])) for entry in entries if matched[entry["id"]] is None]
    if strangers and len(strangers) == len(entries):
        raise InputError(f"{path}: none of its images (first: {strangers[0]}) is in the data set; check data and split")
    if strangers:
        notes.append(f"{path}: {len(strangers)} of its {len(entries)} images are not asked for and left out")
    return matched


def match_categories(
    path: Path, classes: Sequence[str], category_ids: Sequence[int] | None, entries: list[Row] | None, notes: list[str]
) -> dict[Any, int | None]:
    """For every ``category_id`` that a row may carry the label it means; None for one that is not asked for."""
    ids = range(1, len(classes) + 1) if category_ids is None else category_ids
    by_id = {category: label for label, category in enumerate(ids)}
    if entries is None:
        named = (f"{number} {classes[label]}" for number, label in by_id.items())
        notes.append(f"{path}: names no categories; their numbers are taken as {listing(named)}")
        return dict(by_id)
    index = {nfc(name): label for label, name in enumerate(classes)}
    matched: dict[Any, int | None] = {}
    for entry in entries:
        name = entry.get("name")
        if name is not None and not isinstance(name, str):
            raise InputError(f"{path}: the name of category {entry['id']} is no text")
        matched[entry["id"]] = by_id.get(entry["id"]) if name is None else index.get(nfc(name))
    strangers = [str(entry.get("name", entry["id"])) for entry in entries if matched[entry["id"]] is None]
    if strangers and len(strangers) == len(entries):
        raise InputError(f"{path}: none of its categories ({listing(strangers)}) is among {listing(classes)}")
    heard = {nfc(str(entry.get("name"))) for entry in entries}
    unheard = [name for name in classes if nfc(name) not in heard]
    if unheard and any("name" in entry for entry in entries):
        notes.append(f"{path}: has no category {listing(unheard)}: nothing can have been found of these")
    notes += brief([f"{path}: category {name} is not asked for, left out" for name in strangers], "categories left out")
    return matched


def _box(value: Any, size: tuple[int, int], where: str) -> list[float]:
    if not isinstance(value, list) or len(value) != 4:
        raise InputError(f"{where}: bbox must be four numbers [x, y, width, height]")
    x, y, width, height = (_number(part, f"{where}: bbox") for part in value)
    if width < 0 or height < 0:
        raise InputError(f"{where}: bbox {value} has a negative side; give [x, y, width, height]")
    if max(abs(x), abs(y), width, height) > _COORDINATE_LIMIT:
        raise InputError(f"{where}: bbox {value} is far outside the image of {size[1]} x {size[0]} pixels")
    if width and height and not (x < size[1] and y < size[0] and x + width > 0 and y + height > 0):
        raise InputError(f"{where}: bbox {value} lies outside the image of {size[1]} x {size[0]} pixels")
    return [x, y, x + width, y + height]


def check_size(height: Any, width: Any, where: str) -> tuple[int, int]:
    """(H, W), if that is a photograph's size; else raises InputError, which starts with ``where``."""
    if type(height) is not int or type(width) is not int or height < 1 or width < 1 or height * width > PIXEL_LIMIT:
        raise InputError(f"{where}: height {height!r} and width {width!r} are no size of an image in pixels")
    return height, width


def _number(value: Any, where: str) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # JSON's integers have no limit
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{where}: {str(value)[:40]!r} is no finite number")
    return number


def check_id(value: Any, where: str) -> int | str:
    """The value, if it can be the id of an image or category; else raises InputError, which starts with ``where``."""
    if type(value) not in (int, str):
        raise InputError(f"{where}: {str(value)[:40]!r} is neither a whole number nor text")
    return value


def _may_be(name: str, image: TaggedImage) -> bool:
    """Whether a path of the image's name may mean it: of the folders before the name, those that both tell agree."""
    own = image.id if image.id.endswith(image.path.name) else image.path.name
    return all(a == b for a, b in zip(name.split("/")[-2::-1], own.split("/")[-2::-1], strict=False))


def _unique(*pairs: tuple[Any, TaggedImage]) -> dict[Any, TaggedImage]:
    """The pairs as a table, without the keys that mean several images."""
    table: dict[Any, TaggedImage | None] = {}
    for key, image in pairs:
        table[key] = image if table.setdefault(key, image) is image else None
    return {key: image for key, image in table.items() if image is not None}


def copy_name(image: TaggedImage) -> str:
    """The name, without suffix, of the copy of a photograph in an export, folders included."""
    return plain_name(image.id.removesuffix(image.path.suffix))


def plain_name(name: str) -> str:
    """A name as exports spell it, in one case."""
    return safe_name(name).casefold()


def _doubles(values: Sequence[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]
