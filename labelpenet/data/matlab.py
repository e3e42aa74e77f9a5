"""Cells of MATLAB files of versions 5 to 7, read without trusting them.

scipy's reader ends the process (a segmentation fault) on some damaged files; this one raises.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from labelpenet.errors import InputError, reason, told

_LIMIT = 2**31  # bytes of a variable: 2,000 proposals of each of VOC 2012's photographs take 0.7 GB
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
            16: "u1", 17: "u2", 18: "u4"}  # fmt: skip
_MATRIX, _COMPRESSED = 14, 15
_CELL, _CHAR, _DENSE = 1, 4, range(6, 16)


def read_cells(path: Path, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """The cell arrays of these names (else `InputError`): for each cell a number array, a text, or a list of cells."""
    kinds = (OSError, ValueError, LookupError, StopIteration, struct.error, zlib.error, RecursionError)
    with told(lambda error: f"{path}: no readable MATLAB file ({reason(error)}); download it again", *kinds):
        data = path.read_bytes()
        if data.startswith(b"MATLAB 7.3"):
            raise InputError(f"{path}: a MATLAB 7.3 file; save it with save(.., '-v7')")
        order = {b"IM": "<", b"MI": ">"}[data[126:128]]
        found = {}
        for kind, content in _elements(memoryview(data)[128:], order):
            if kind == _COMPRESSED:
                stream = zlib.decompressobj()
                inside = stream.decompress(content, _LIMIT)
                if not stream.eof:
                    raise ValueError("a variable is cut off or too large")
                kind, content = next(_elements(memoryview(inside), order))
            if kind == _MATRIX:
                name, value = _variable(content, order, names)
                found[name] = value
    for name in names:
        if not isinstance(found.get(name), list):
            raise InputError(f"{path}: has no cell array {name!r}; expected {' and '.join(map(repr, names))}")
    return {name: found[name] for name in names}


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of the data elements that stand one behind another."""
    while len(data):
        kind, size = struct.unpack_from(f"{order}II", data)
        start, end = 8, 8 + size + (-size % 8 if kind != _COMPRESSED else 0)
        if kind >> 16:  # up to four bytes stand in the tag itself
            kind, size, start, end = kind & 0xFFFF, kind >> 16, 4, 8
        if size > len(data) - start or (start == 4 and size > 4):
            raise ValueError("cut off")
        yield kind, data[start : start + size]
        data = data[end:]


def _variable(content: memoryview, order: str, wanted: tuple[str, ...] = ()) -> tuple[str, Any]:
    """Name and value of a matrix; None for one that is not wanted, or no cell, text or dense number array."""
    if not len(content):
        return "", np.zeros((0, 0))
    parts = _elements(content, order)
    (_, flags), (_, sizes), (_, letters) = next(parts), next(parts), next(parts)
    kind, name = struct.unpack(f"{order}II", flags)[0] & 0xFF, bytes(letters).decode("ascii", "replace")
    shape = np.frombuffer(sizes, f"{order}i4")
    if (wanted and name not in wanted) or kind not in (_CELL, _CHAR, *_DENSE):
        return name, None
    if kind == _CELL:
        return name, [_variable(inside, order)[1] for _, inside in parts]
    code, raw = next(parts)
    values = np.frombuffer(raw, order + _NUMBERS[code])
    if kind == _CHAR:
        return name, "".join(map(chr, values.tolist()))
    if shape.min(initial=0) < 0 or np.prod(shape, dtype=object) != len(values):
        raise ValueError("an array of another size than it says")
    return name, values.reshape(shape, order="F")
