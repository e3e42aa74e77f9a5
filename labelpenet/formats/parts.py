"""Predictions in parts: JSON lines, one photograph a line, which independent processes write and one stream merges.

The first line of a part says what it belongs to: ``{"labelpenet": "part", "shard": [i, n], "images": N, ...}``. Each
further line is a photograph: ``{"image": id, "number": k, "file_name", "width", "height", "instances": [{"category_id",
"bbox", "score", "segmentation"}]}``, or ``{"image": id, "skipped": true}`` where it could not be read. Every line ends
with its checksum. A part is called ``part-00001-of-00008.jsonl`` once it is whole and ``.jsonl.partial`` before.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import is_file, json_line, listing, locked, sealed, write_bytes, writing
from labelpenet.data.images import image_size
from labelpenet.errors import InputError, reason, told
from labelpenet.formats.parquet import write_parquet
from labelpenet.formats.rows import (
    Predictions,
    Rows,
    check_same_size,
    check_size,
    coco_annotation,
    coco_file,
    file_names,
    image_numbers,
    match_categories,
    match_images,
    read_rows,
)  # fmt: skip
from labelpenet.instances import Instances
from labelpenet.progress import log_notes


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` as (i, n), 1 <= i <= n; `InputError` for anything else."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--shard {text}: expected i/n with 1 <= i <= n, such as 3/100")
    return int(found[1]), int(found[2])


def share(images: Sequence[TaggedImage], shard: tuple[int, int]) -> Sequence[TaggedImage]:
    """The shard's photographs: the i-th of n stretches of the list, so that all stretches in order are the list."""
    i, n = shard
    return images[len(images) * (i - 1) // n : len(images) * i // n]


class Part:
    """One part while it is written; what a process before has written of it is kept, but for a broken last line.

    Args:
        facts: what decides the predictions (weights, module, settings, list of photographs), the same in all parts.
        images: all photographs, in order.

    Attributes:
        done, skipped: ids of the photographs that it holds, and of those among them that could not be read.
        before: how many an earlier process has written.

    Raises:
        InputError: the part, or one beside it, was begun with other facts, another process is writing it, or it cannot
            be written.
    """

    def __init__(
        self,
        folder: Path,
        shard: tuple[int, int],
        facts: dict[str, Any],
        images: Sequence[TaggedImage],
        classes: Sequence[str],
    ):
        self.path = folder / f"part-{shard[0]:05d}-of-{shard[1]:05d}.jsonl"
        self.partial = self.path.with_suffix(".jsonl.partial")
        self.images = share(images, shard)
        self.done: set[str] = set()
        self.skipped: set[str] = set()
        self._numbers, self._names = image_numbers(images), file_names(images)
        self._header = {
            "labelpenet": "part", "shard": list(shard), "images": len(images), "classes": list(classes), **facts,
        }  # fmt: skip

    def __enter__(self) -> Part:
        with writing(self.path), contextlib.ExitStack() as opened:
            if not self.path.exists() and not self.partial.exists():
                self._check_beside()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not opened.enter_context(locked(self.path.with_suffix(".lock"))):
                raise InputError(f"{self.path}: another process is writing this part; give each its own --shard")
            there = self.path if self.path.exists() else self.partial
            length = self._already(there) if there.exists() else 0
            self.before = len(self.done)
            self.finished = there == self.path and not self.left() and there.stat().st_size == length
            if not self.finished:
                if there == self.path:
                    log_notes(f"{self.path} is damaged; what is missing is made again")
                    self.path.replace(self.partial)
                self._file: BinaryIO = opened.enter_context(self.partial.open("ab"))
                self._file.truncate(length)
                if not length:
                    self._write(self._header)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def left(self) -> list[TaggedImage]:
        """The shard's photographs that the part does not hold yet."""
        return [image for image in self.images if image.id not in self.done]

    def add(self, image: TaggedImage, found: Instances | None) -> None:
        """Appends what was found in a photograph, None if it could not be read."""
        row: dict[str, Any] = {"image": image.id, "skipped": True}
        if found is not None:
            height, width = found.image_size
            rows = found.to_coco(self._numbers[image.id])
            row = {"image": image.id, "number": self._numbers[image.id], "file_name": self._names[image.id]}
            row |= {"width": width, "height": height}
            row["instances"] = [{key: value for key, value in one.items() if key != "image_id"} for one in rows]
        else:
            self.skipped.add(image.id)
        self._write(row)
        self.done.add(image.id)

    def finish(self) -> None:
        """Gives the part its final name; every photograph of the shard must be in it."""
        if not self.finished:
            os.fsync(self._file.fileno())
            self.partial.replace(self.path)
            self.finished = True
        self.path.with_suffix(".lock").unlink(missing_ok=True)

    def _write(self, row: dict[str, Any]) -> None:
        with writing(self.partial):
            self._file.write(sealed(json.dumps(row, allow_nan=False)).encode() + b"\n")
            self._file.flush()

    def _already(self, path: Path) -> int:
        """Takes up what a part holds; returns its length up to the last line that is whole and of a photograph more."""
        ids, length = {image.id for image in self.images}, 0
        with path.open("rb") as file:
            for number, line in enumerate(file):
                row = _row(line) if line.endswith(b"\n") else None
                name = row and row.get("image")
                if row is None or (number and not (isinstance(name, str) and name in ids and name not in self.done)):
                    break
                if number == 0:
                    self._compare(path, row)
                if number:
                    self.done.add(row["image"])
                    if row.get("skipped") is True:
                        self.skipped.add(row["image"])
                length += len(line)
        return length

    def _check_beside(self) -> None:
        """`InputError` where a part that lies there could not be merged with this one."""
        for path in itertools.islice(self.path.parent.glob("part-*.jsonl*"), 1):
            with path.open("rb") as file:
                row = _row(file.readline())
            own, count = self._header["shard"]
            if row is not None and isinstance(shard := row.get("shard"), list) and len(shard) == 2:
                self._compare(path, {**row, "shard": [own, count] if shard[1] == count else shard})

    def _compare(self, path: Path, header: dict[str, Any]) -> None:
        """`InputError` where the header of a part is not this one's."""
        if header != self._header:
            keys = sorted(self._header.keys() | header.keys())
            changed = ", ".join(key for key in keys if header.get(key) != self._header.get(key))
            raise InputError(f"{path}: belongs to another prediction ({changed} changed); give another --out")


def merge_parts(paths: Sequence[Path], out: Path) -> tuple[int, int]:
    """Puts parts, or folders of parts, together as one COCO ``.json`` (a predictions file) or ``.parquet``, line by
    line.

    Memory does not grow with the number of photographs. The ``.json`` is byte for byte what one process would have
    written; the ``.parquet`` is that of `write_parquet`.

    Returns:
        The numbers of photographs and of instances.

    Raises:
        InputError: a part is missing, twice, unfinished, damaged or of another prediction; nothing is written then.
    """
    parts, header = in_order(paths)
    if out.suffix not in (".json", ".parquet"):
        raise InputError(f"{out}: the suffix must be .json or .parquet")
    counts = [0, 0]
    if out.suffix == ".parquet":
        write_parquet(out, _flat(parts, header["classes"], counts), header["classes"])
    else:
        write_bytes(out, lambda file: _write_coco(parts, header, file, counts))
    if skipped := header["images"] - counts[0]:
        log_notes(f"{skipped} photographs could not be read when they were predicted and are left out")
    return counts[0], counts[1]


def read_parts(folder: Path, images: Sequence[TaggedImage], classes: Sequence[str]) -> Predictions:
    """The predictions of a folder of parts, of which memory holds nothing but where each photograph's line begins.

    Arguments, matching and errors are those of `read_predictions`; a photograph of another size than it was predicted
    with is refused when it is asked for.
    """
    parts, header = in_order([folder])
    notes: list[str] = []
    named = [{"id": number, "name": name} for number, name in enumerate(header["classes"], 1)]
    found = [(part, place, row["file_name"]) for part in parts for place, row in _photographs(part)]
    entries = [{"id": number, "file_name": name} for number, (_, _, name) in enumerate(found)]
    names = match_images(folder, images, entries, notes)
    labels = match_categories(folder, classes, (), named, notes)
    lines = {names[number]: (part, place) for number, (part, place, _) in enumerate(found)}
    asked = {image.id: (image, *lines[image.id]) for image in images if image.id in lines}

    def read(name: str, known: tuple[TaggedImage, Path, int]) -> Rows:
        image, part, place = known
        row = _row_at(part, place)
        if row is None or row.get("file_name") is None:
            raise InputError(f"{part}: has changed while it was read; start again")
        size = check_size(row["height"], row["width"], str(part))
        check_same_size(part, image, size, image_size(image.path))
        asked = [one for one in enumerate(row["instances"]) if labels.get(one[1]["category_id"]) is not None]
        return read_rows(part, asked, labels, name, size)

    return Predictions(tuple(classes), tuple(notes), asked, read)


def in_order(paths: Sequence[Path]) -> tuple[list[Path], dict[str, Any]]:
    """The parts by shard, and the first one's header."""
    files = [file for path in paths for file in (sorted(path.glob("part-*.jsonl")) if path.is_dir() else [path])]
    if not files:
        raise InputError(f"{', '.join(map(str, paths))}: no part (part-*.jsonl) here; give the --out of the shards")
    headers: dict[int, tuple[Path, dict[str, Any]]] = {}
    for file in files:
        header = _header(file)
        index = header["shard"][0]
        if index in headers:
            raise InputError(f"{file}: is shard {index}, and so is {headers[index][0]}; give each once")
        headers[index] = file, header
    first = headers[min(headers)][1]
    for file, header in headers.values():
        if {**header, "shard": 0} != {**first, "shard": 0} or header["shard"][1] != first["shard"][1]:
            raise InputError(f"{file}: belongs to another prediction than {headers[min(headers)][0]}; merge them apart")
    missing = [i for i in range(1, first["shard"][1] + 1) if i not in headers]
    if missing:
        named = listing(map(str, missing), 20)
        raise InputError(f"{len(missing)} of {first['shard'][1]} shards are missing ({named}); run them first")
    return [headers[index][0] for index in sorted(headers)], first


def _header(path: Path) -> dict[str, Any]:
    """The first line of a part, checked."""
    if not is_file(path):
        raise InputError(f"{path}: no such file; give files that predict --shard wrote")
    header = _row_at(path, 0) or {}
    shard, classes, total = header.get("shard", 0), header.get("classes", 0), header.get("images", -1)
    whole = isinstance(shard, list) and [type(one) for one in (*shard, total)] == [int, int, int]
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if header.get("labelpenet") != "part" or not (whole and named and 1 <= shard[0] <= shard[1] < 10**6 and total >= 0):
        raise InputError(f"{path}: no part of a prediction; give files that predict --shard wrote")
    return header


def _photographs(part: Path, check: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """The photographs of a part that could be read, in order, each with the place of its line in the file. Without
    ``check``, as their content was checked before, their checksums are looked at all the same.
    """
    header = _header(part)
    (i, n), total, number = header["shard"], header["images"], 1
    labels = dict(enumerate(range(len(header["classes"])), 1))
    seen: set[int] = set()
    with part.open("rb") as file:
        place = len(next(file))
        for number, line in enumerate(file, 2):
            row = _row(line)
            skipped = row is not None and row.get("skipped") is True
            if row is None or not (
                skipped or ((not check or _is_photograph(part, row, labels)) and row.get("number") not in seen)
            ):
                raise InputError(f"{part}: line {number} is damaged; delete the part and run its shard again")
            if not skipped:
                seen.add(row["number"])
                yield place, row
            place += len(line)
    if number - 1 != total * i // n - total * (i - 1) // n:
        raise InputError(f"{part}: damaged, holds {number - 1} photographs; run its shard again")


def _rows_of(parts: Iterable[Path], check: bool = True) -> Iterator[dict[str, Any]]:
    return (row for part in parts for _, row in _photographs(part, check))


def _is_photograph(part: Path, row: dict[str, Any], labels: Mapping[Any, int]) -> bool:
    try:
        size = check_size(row["height"], row["width"], "")
        rows = read_rows(part, list(enumerate(row["instances"])), labels, "", size)
        scored = all(one["bbox"] and 0 <= one["score"] <= 1 for one in row["instances"])
        named = isinstance(row["image"], str) and isinstance(row["file_name"], str) and type(row["number"]) is int
        return named and scored and len(rows.scores) == len(row["instances"])
    except (InputError, LookupError, TypeError, AttributeError):
        return False


def _write_coco(parts: Sequence[Path], header: dict[str, Any], file: BinaryIO, counts: list[int]) -> None:
    def images() -> Iterator[str]:
        for counts[0], row in enumerate(_rows_of(parts), 1):
            image = {key: row[key] for key in ("file_name", "width", "height")}
            yield json.dumps({"id": row["number"], **image})

    def annotations() -> Iterator[str]:
        found = ({"image_id": row["number"], **one} for row in _rows_of(parts, check=False) for one in row["instances"])
        for counts[1], row in enumerate(found, 1):
            yield json.dumps({"id": counts[1], **coco_annotation(row)})

    categories = (json.dumps({"id": number, "name": name}) for number, name in enumerate(header["classes"], 1))
    for piece in coco_file({"images": images(), "categories": categories, "annotations": annotations()}):
        file.write(piece.encode())


def _flat(parts: Sequence[Path], classes: Sequence[str], counts: list[int]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file."""
    for counts[0], row in enumerate(_rows_of(parts), 1):
        shared = {key: row[key] for key in ("image", "file_name", "width", "height")}
        counts[1] += len(row["instances"])
        if not row["instances"]:
            yield shared
        for one in row["instances"]:
            box = dict(zip("xywh", one["bbox"], strict=True))
            mask = (one.get("segmentation") or {}).get("counts")
            yield {**shared, "category": classes[one["category_id"] - 1], "score": one["score"], **box, "counts": mask}


def _row_at(part: Path, place: int) -> dict[str, Any] | None:
    """What `_row` makes of the line at a place of a part; of what is no part it reads no more than 2^27 bytes."""
    with (
        told(lambda error: f"{part}: cannot be read ({reason(error)}); check the path", OSError),
        part.open("rb") as file,
    ):
        file.seek(place)
        return _row(file.readline(2**27))


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as it was written, without its checksum; None if it is damaged."""
    row = json_line(line)
    return None if row is None or row.pop("checksum", None) is None else row
