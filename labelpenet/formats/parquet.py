"""`predictions.parquet`, as `labelpenet merge` writes it: a row for each instance, and one of a photograph alone where
nothing was found in it, so that the file names all that were predicted.

The classes stand in the file's metadata, as ``{"classes": [name, ...]}`` under ``labelpenet``. Pages carry checksums.
"""

import functools
import itertools
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from labelpenet.data.files import is_file, write_bytes
from labelpenet.errors import InputError, reason, told

ROWS_A_GROUP = 1_000  # what a reader holds at a time: about 1 MB
_PHOTOGRAPH = {"image": "string", "file_name": "string", "width": "int32", "height": "int32"}
_FOUND = {"category": "string", **dict.fromkeys(("score", "x", "y", "w", "h"), "double")}


def write_parquet(out: Path, rows: Iterable[dict[str, Any]], classes: Sequence[str]) -> None:
    """Writes a file of rows, whole or not at all.

    Args:
        rows: of each instance ``image`` (the photograph's id), ``file_name``, ``width`` and ``height`` (pixels),
            ``category`` (a name in ``classes``), ``score`` in [0, 1], ``x, y, w, h`` (the box, in pixels), and
            ``counts`` (its mask as compressed RLE, column-major, as COCO's; None without one). The first four alone of
            a photograph in which nothing was found. Rows of a photograph follow one another.
        classes: names of all C classes, in label order.

    Raises:
        InputError: pyarrow is missing, a photograph's name is no UTF-8, or the file cannot be written.
    """
    pa, pq = _pyarrow(out)
    schema = _schema(pa).with_metadata({"labelpenet": json.dumps({"classes": list(classes)})})

    def said(error: UnicodeEncodeError) -> str:
        return f"{out}: {error.object} is no UTF-8, as Parquet's text is; merge into .json"

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:
            left = iter(rows)
            while group := list(itertools.islice(left, ROWS_A_GROUP)):
                with told(said, UnicodeEncodeError):
                    table = pa.Table.from_pylist(group, schema)
                writer.write_table(table)

    write_bytes(out, write)


def parquet_lists(path: Path) -> dict[str, Any]:
    """The lists of COCO's that such a file holds, the annotations as `Groups`; photographs and classes have their names
    as ids. `InputError`: pyarrow is missing, `write_parquet` has not written the file, or it is damaged.
    """
    pa, pq = _pyarrow(path)
    if not is_file(path):
        raise InputError(f"{path}: no such file; check the path")
    with _readable(path):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        own = json.loads((file.schema_arrow.metadata or {}).get(b"labelpenet", b"null"))
        if not isinstance(own, dict) or not isinstance(own.get("classes"), list):
            raise InputError(f"{path}: labelpenet merge has not written this; give its file, or the folder of parts")
        groups = Groups(path, file)
        small = max(groups.sizes, default=0) <= ROWS_A_GROUP
        if not file.schema_arrow.equals(_schema(pa)) or not small or sum(groups.sizes) != file.metadata.num_rows:
            raise ValueError("other columns or groups")
        images: list[dict[str, Any]] = []
        for number, row in groups.each():
            missing = [row[key] is None for key in _FOUND]
            if any(missing) and not (all(missing) and row["counts"] is None):
                raise ValueError("a row lacks a value")
            if not any(missing):
                groups.rows.append(number)
            entry = {"id": row["image"], **{key: row[key] for key in ("file_name", "width", "height")}}
            if not images or entry != images[-1]:
                images.append(entry)
    categories = [{"id": name, "name": name} for name in own["classes"]]
    return {"images": images, "categories": categories, "annotations": groups}


class Groups:
    """The instances of such a file as COCO's rows, read when asked for; memory holds which rows of the file they are,
    and one group of these.

    Attributes:
        sizes: the number of rows of each group; rows: of each instance its row in the file.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self.rows = path, array("Q")
        self.sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        self._firsts = [0, *itertools.accumulate(self.sizes)][:-1]
        self._table = functools.lru_cache(maxsize=1)(functools.partial(file.read_row_group, use_threads=False))

    def each(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of the file, numbered."""
        return enumerate(row for number in range(len(self.sizes)) for row in self._table(number).to_pylist())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.take(range(len(self.rows)))

    def take(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The instances of these numbers."""
        places = (self.rows[number] for number in numbers)
        for group, own in itertools.groupby(places, lambda row: bisect_right(self._firsts, row) - 1):
            rows = [row - self._firsts[group] for row in own]
            with _readable(self._path):
                read = self._table(group).slice(min(rows), max(rows) - min(rows) + 1).to_pylist()
            for one in (read[row - min(rows)] for row in rows):
                found = {"image_id": one["image"], "category_id": one["category"], "score": one["score"]}
                found["bbox"] = [one[key] for key in "xywh"]
                if one["counts"] is not None:
                    found["segmentation"] = {"size": [one["height"], one["width"]], "counts": one["counts"]}
                yield found


def _pyarrow(path: Path) -> tuple[Any, Any]:
    with told(f"{path}: Parquet needs pyarrow; pip install 'labelpenet[parquet]'", ImportError):
        import pyarrow
        import pyarrow.parquet
    return pyarrow, pyarrow.parquet


def _schema(pa: Any) -> Any:
    columns = [pa.field(name, kind, nullable=False) for name, kind in _PHOTOGRAPH.items()]
    return pa.schema([*columns, *_FOUND.items(), ("counts", "string")])


def _readable(path: Path) -> AbstractContextManager[None]:
    """What pyarrow says of a file that it cannot read becomes an `InputError`."""
    kinds = (OSError, ValueError, RecursionError, MemoryError, _pyarrow(path)[0].ArrowException)
    return told(lambda error: f"{path}: damaged ({reason(error)}); merge the parts again", *kinds)
