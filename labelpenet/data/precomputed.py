"""Proposals that another tool has computed: boxes in the files of the field, and masks, taken as boxes.

What is read, and how its coordinates are meant (``x1, y1, x2, y2`` unless it says otherwise):

========================  ==========================================================================================
``.mat``                  Fast R-CNN and Selective Search: cells ``boxes`` (``y1, x1, y2, x2``, from 1, inclusive) and
                          ``images`` (names); MATLAB v5 to v7
``.pkl``                  Detectron, OICR, PCL, wetectron: ``{"boxes": [..], "indexes" or "ids" or "images": [..],
                          "scores": [..]}``, from 0, inclusive; or ``{name: boxes}``, half-open
``.npz``                  an array for each image name, half-open
``.json``                 ``{name: boxes}``, half-open; what ``.pkl`` may hold; COCO results (``bbox`` is x, y, width,
                          height; without one, the box of ``segmentation``), as a list or under ``annotations``
folder                    label maps ``NAME.png`` (0 is background; 255 is void, unless it is the only value or there
                          are larger ones), one folder ``NAME/*.png`` of masks (other than 0), or COCO rows in
                          ``NAME.json``
========================  ==========================================================================================

An image's name is its id, its file name with or without suffix, or its COCO number; zeros and underscores of a number
do not matter (``2008_000002`` is 2008000002).

Shape letters: ``R`` proposals, ``H, W`` height and width of the image in pixels.
"""

import io
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import brief, excerpt, listing, read_json
from labelpenet.data.images import PIXEL_LIMIT, SUFFIXES, image_size
from labelpenet.data.matlab import read_cells
from labelpenet.data.proposals import Proposals, within
from labelpenet.errors import InputError, reason, told
from labelpenet.instances import decode_mask, masks_to_boxes

_NO_NUMBER = (TypeError, ValueError, OverflowError)  # what numpy and float say of it
Raw = np.ndarray | list | Path  # boxes (R, 4), rows as in a COCO file, or a file or folder of masks


def read_proposals(path: Path | str, images: Sequence[TaggedImage], limit: int | None = None) -> Proposals:
    """The proposals of the images from a file or folder of another tool (see the top of this module).

    Args:
        path: ``.mat``, ``.pkl``, ``.npz``, ``.json``, or a folder of masks.
        images: the photographs to find proposals for.
        limit: most proposals kept per image, the first ones (by score, where there are scores); None for all.

    Returns:
        By image id (R, 4) float32, half-open, in pixels, R >= 1, inside the image, no two alike. An image that the file
        does not name, or that cannot be read, has none and is named in the ``notes``; one that is named without any
        box has its whole area as its proposal.

    Raises:
        InputError: the file is missing, damaged, of an unknown kind or holds code; a box leaves its image by more than
            a pixel; no image is named.
    """
    path = Path(path)
    raw = _read(path)
    lookup = _lookup(raw)
    found: dict[str, np.ndarray] = {}
    owners: dict[str, str] = {}
    notes = []
    for image in images:
        key = _key(image, raw, lookup, path)
        if key is None:
            notes.append(f"{path}: names no proposals for image {image.id}")
            continue
        if owners.setdefault(key, image.id) != image.id:
            raise InputError(f"{path}: {key} may be image {owners[key]} or {image.id}; call them by these names there")
        try:
            size = image_size(image.path)
        except InputError as error:
            notes.append(str(error))
            continue
        try:
            found[image.id] = _checked(_boxes(raw[key], size), size)[:limit]
        except InputError as error:
            raise InputError(f"{path}: image {key}: {error}") from error
    if images and not found:
        raise InputError(
            f"{path}: names none of the images; it has {listing(raw, 5)}, they are {listing([i.id for i in images], 5)}"
        )
    return Proposals(found, brief(notes, "images have no proposals"))


def _read(path: Path) -> dict[str, Raw]:
    """What a file or folder holds, by image name as written there."""
    if path.is_dir():
        return _read_folder(path)
    readers: dict[str, Callable[[Path], dict[str, Raw]]] = {
        ".mat": _read_mat,
        ".pkl": lambda path: _from_object(unpickle_arrays(path), path),
        ".npz": _read_npz,
        ".json": lambda path: _from_object(read_json(path), path),
    }
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder of proposals; check the path")
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: proposals must be {', '.join(readers)} or a folder of masks")
    return readers[path.suffix.lower()](path)


# --- Names ---


def _lookup(names: Iterable[str]) -> dict[str, str]:
    """For each way to write a name the name itself; names as they are written come first, ambiguous ways are out."""
    result: dict[str, str] = {name: name for name in names}
    written = set(result)
    shorter: dict[str, str | None] = {}
    for name in written:
        for alias in set(_aliases(name)) - written:
            shorter[alias] = None if shorter.get(alias, name) != name else name
    return result | {alias: name for alias, name in shorter.items() if name is not None}


def _aliases(name: str) -> list[str]:
    """The name without folder, without suffix, and as a plain number."""
    file = re.split(r"[/\\]", name)[-1]
    stem = file[: -len(Path(file).suffix)] if Path(file).suffix.lower() in SUFFIXES else file
    number = [str(int(stem.replace("_", "")))] if re.fullmatch(r"[0-9][0-9_]{0,30}", stem) else []
    return [file, stem, *number]


def _key(image: TaggedImage, raw: Mapping[str, Raw], lookup: Mapping[str, str], path: Path) -> str | None:
    """The name of an image in the file, one as it is written before any other way to write it: the number of one image
    is not what another's name ends in. `InputError` where both are there; COCO's rows count by number.
    """
    stem, number = image.path.stem, str(image.number)
    exact = [name for name in (image.id, image.path.name, number, stem) if name in raw]
    if exact[:2] == [number, stem] and number != stem and not isinstance(raw[number], list):
        raise InputError(f"{path}: {number} and {stem} may both be {image.id}; call images by their file names there")
    loose = (name for name in (*_aliases(image.id), *_aliases(image.path.name)) if name in lookup)
    return exact[0] if exact else lookup.get(next(loose, ""))


# --- Files ---


def _read_npz(path: Path) -> dict[str, Raw]:
    said = f"{path}: no readable .npz archive of plain arrays"
    with (
        told(lambda error: f"{said} ({reason(error)}); save it again", Exception),  # zip, zlib, numpy: each its own
        np.load(path, allow_pickle=False) as archive,
    ):
        arrays = {name: archive[name] for name in archive.files}
    return {name: _numbers(boxes, path, name) for name, boxes in arrays.items()}


def _read_mat(path: Path) -> dict[str, Raw]:
    cells = read_cells(path, ("boxes", "images"))
    boxes, names = cells["boxes"], [_text(name) for name in cells["images"]]
    if len(boxes) != len(names):
        raise InputError(f"{path}: {len(boxes)} cells of boxes for {len(names)} images; there must be one each")
    return {
        name: _numbers(value, path, name)[:, [1, 0, 3, 2]] - np.array([1, 1, 0, 0])
        for name, value in zip(names, boxes, strict=True)
    }


def _text(value: Any) -> str:
    """A name that may stand in an array or cell of its own."""
    while (isinstance(value, np.ndarray) and value.size == 1) or (isinstance(value, list) and len(value) == 1):
        value = value.item() if isinstance(value, np.ndarray) else value[0]
    return str(value)


def _from_object(content: Any, path: Path) -> dict[str, Raw]:
    """What a pickle or a JSON file holds."""
    rows = content.get("annotations") if isinstance(content, dict) else content
    if isinstance(rows, list):
        files = {}
        if isinstance(content, dict) and isinstance(content.get("images"), list):
            images = [image for image in content["images"] if isinstance(image, dict)]
            files = {str(image.get("id")): str(image.get("file_name")) for image in images}
        return _by_image(rows, files, path)
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected {{name: boxes}}, a table of boxes or COCO rows, but it holds a {type(content).__name__}"
        )
    names = next((content[key] for key in ("indexes", "ids", "images") if key in content and "boxes" in content), None)
    if names is None:
        return {str(name): _numbers(value, path, name) for name, value in content.items()}
    columns = [names, content["boxes"], content.get("scores")]
    if columns[2] is None and _is_column(names):
        columns[2] = [None] * len(names)
    if not all(map(_is_column, columns)) or len(set(map(len, columns))) > 1:
        raise InputError(f"{path}: boxes, names and scores must be lists of one length, with an entry for each image")
    return {
        _text(name): _by_score(_numbers(boxes, path, name) + np.array([0, 0, 1, 1]), scores, path)
        for name, boxes, scores in zip(*columns, strict=True)
    }


def _is_column(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _by_score(boxes: np.ndarray, scores: Any, path: Path) -> np.ndarray:
    """(R, 4) boxes by descending score, where there is one score a box."""
    with told(f"{path}: a score that is no number; correct it", *_NO_NUMBER):
        values = np.zeros(0) if scores is None else np.asarray(scores, np.float64).ravel()
    if len(values) not in (0, len(boxes)):
        raise InputError(f"{path}: {len(values)} scores for {len(boxes)} boxes of an image; there must be one a box")
    return boxes[np.argsort(-values, kind="stable")] if len(values) else boxes


def _by_image(rows: list, files: Mapping[str, str], path: Path) -> dict[str, Raw]:
    """COCO rows by the image's file name where ``files`` has it, else by its id, in descending order of score."""
    groups: dict[str, list] = {}
    for row in rows:
        if not isinstance(row, dict) or "image_id" not in row:
            raise InputError(f"{path}: a row without image_id; expected the rows of a COCO file")
        groups.setdefault(files.get(str(row["image_id"]), str(row["image_id"])), []).append(row)
    return {name: _sorted_rows(group, path) for name, group in groups.items()}


def _sorted_rows(rows: list, path: Path) -> list:
    with told(f"{path}: a row whose score is no number; correct it", *_NO_NUMBER):
        return sorted(rows, key=lambda row: -float(row.get("score", row.get("predicted_iou", 0))))


def _numbers(value: Any, path: Path, name: object) -> np.ndarray:
    """(R, 4) float64 from whatever a file holds for an image."""
    with told(f"{path}: the boxes of image {name} are no numbers; expected (R, 4)", *_NO_NUMBER):
        if isinstance(value, np.ndarray) and value.dtype.kind not in "biufO":
            raise TypeError
        boxes = np.asarray(value, np.float64)
    boxes = boxes.reshape(0, 4) if boxes.size == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError(f"{path}: the boxes of image {name} must be (R, 4), but are {boxes.shape}")
    return boxes


def _read_folder(folder: Path) -> dict[str, Raw]:
    """Label maps, folders of masks and JSON files by name."""
    found: dict[str, Raw] = {}
    for entry in sorted(folder.iterdir()):
        is_file = entry.suffix.lower() in (".png", ".json") and entry.is_file()
        if is_file or (entry.is_dir() and any(entry.glob("*.png"))):
            name = entry.stem if is_file else entry.name
            if name in found:
                raise InputError(f"{folder}: {entry.name} and another file or folder are of image {name}; keep one")
            found[name] = entry
    if not found:
        raise InputError(f"{folder}: holds no label maps (NAME.png), folders of masks (NAME/*.png) or NAME.json")
    return found


# --- Boxes ---


def _boxes(raw: Raw, size: tuple[int, int]) -> np.ndarray:
    """(R, 4) float64 half-open boxes of what was read for an image of ``size`` (H, W)."""
    if isinstance(raw, np.ndarray):
        return raw
    if isinstance(raw, list):
        return _row_boxes(raw, size)
    if raw.is_dir():
        parts = [_map_boxes(_read_map(file, size) != 0) for file in sorted(raw.glob("*.png"))]
        return np.concatenate(parts)
    if raw.suffix.lower() == ".png":
        labels = _read_map(raw, size)
        if labels.max() == 255 and ((labels != 0) & (labels != 255)).any():  # beside larger ones it is a number
            labels[labels == 255] = 0
        return _map_boxes(labels)
    rows = read_json(raw)
    rows = rows.get("annotations") if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{raw}: expected a list of COCO rows with 'bbox' or 'segmentation'")
    return _row_boxes(_sorted_rows(rows, raw), size)


def _row_boxes(rows: list, size: tuple[int, int]) -> np.ndarray:
    """(R, 4) boxes of COCO rows: their ``bbox``, else the tight box of their ``segmentation``."""
    boxes = np.zeros((len(rows), 4))
    for i, row in enumerate(rows):
        if row.get("bbox") is not None:
            said = f"a bbox must be four numbers x, y, width, height, but is {excerpt(row['bbox'])}"
            with told(said, *_NO_NUMBER):
                x, y, width, height = map(float, row["bbox"])
            boxes[i] = x, y, x + width, y + height
        elif row.get("segmentation"):
            boxes[i] = masks_to_boxes(decode_mask(row["segmentation"], size)[None])[0].numpy()
        else:
            raise InputError("a row has neither bbox nor segmentation; remove it or add one")
    return boxes


def _read_map(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W) int64 labels of a PNG: grey values or palette indices; of a coloured one, a number for each colour."""
    with (  # damaged files raise whatever the decoder stumbles over
        told(lambda error: f"{path}: no readable PNG mask ({reason(error)}); replace the file", Exception),
        Image.open(path, formats=("PNG",)) as image,
    ):
        if image.width * image.height > PIXEL_LIMIT:
            raise InputError(f"{path}: more than {PIXEL_LIMIT // 10**6} million pixels; make it smaller")
        values = np.asarray(image if len(image.getbands()) == 1 else image.convert("RGB")).astype(np.int64)
    if values.ndim == 3:
        grey = (values == values[:, :, :1]).all()
        values = values[:, :, 0] if grey else values @ np.array([1 << 24, 1 << 16, 1 << 8])
    if values.shape != size:
        raise InputError(
            f"{path}: a mask of size {values.shape} lies on an image of size {size}; (height, width) must agree"
        )
    return values


def _map_boxes(labels: np.ndarray) -> np.ndarray:
    """(R, 4) tight boxes of the values other than 0 in an (H, W) map, in ascending order of value."""
    y, x = np.nonzero(labels)
    values, group = np.unique(labels[y, x], return_inverse=True)
    pixels, boxes = np.stack([x, y], 1), np.tile([np.inf, np.inf, 0, 0], (len(values), 1))
    np.minimum.at(boxes[:, :2], group, pixels)
    np.maximum.at(boxes[:, 2:], group, pixels + 1)
    return boxes


def _checked(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The boxes as `within` has them; `InputError` where one is not finite or leaves the image by more than a pixel."""
    height, width = size
    low, high = boxes.min(1, initial=0.0), (boxes - [width, height, width, height]).max(1, initial=0.0)
    wrong = np.flatnonzero(~np.isfinite(boxes).all(1) | (low < -1) | (high > 1))
    if len(wrong):
        box = [round(float(value), 2) for value in boxes[wrong[0]]]
        raise InputError(f"box {box} leaves its {width} x {height} pixels; check the order of the coordinates")
    return within(boxes, size)


# --- Pickles ---
#
# A pickle is a program. This one may build lists, dictionaries, strings, numbers and arrays, and nothing else: numpy's
# names lead to the stand-ins below, which check what they are given, so that not even numpy's own code is called with
# values that a hostile file has chosen.


def unpickle_arrays(path: Path) -> Any:
    """Reads a pickle of plain values and numpy arrays, and runs no code of it.

    Returns:
        Dictionaries, lists, tuples, strings, bytes, numbers and arrays of bool, integers, floats or text.

    Raises:
        InputError: the file cannot be read, is damaged or asks for anything else.
    """
    said = "save the boxes as .npz instead"
    # a damaged pickle raises nearly anything
    with told(lambda error: f"{path}: not a pickle of plain arrays ({reason(error)}); {said}", Exception):
        content = Path(path).read_bytes()
        # No honest value takes less than a byte; lists that hold one another many times over do.
        return _plain(_ArraysOnly(io.BytesIO(content), encoding="latin1").load(), iter(range(len(content))))


class _ArraysOnly(pickle._Unpickler):
    # Python's own implementation: the one in C sets aside whatever memory a damaged file asks for.
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def load_bytearray8(self: Any) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str) -> Any:
        # Functions made anew, never a class: attributes that a file may set on what it is given end with the file.
        numpy = re.fullmatch(r"numpy(\._?core\.(multiarray|numeric))?", module)
        made: dict[tuple[str, str], Any] = {
            ("numpy", "_reconstruct"): lambda *_: _Array(),
            ("numpy", "dtype"): lambda code, *_: _Dtype(code),
            ("numpy", "scalar"): lambda dtype, raw: _scalar(dtype, raw),
            ("numpy", "_frombuffer"): lambda raw, dtype, shape, order: _from_buffer(raw, dtype, shape, order),
            ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
            ("_codecs", "encode"): lambda text, code: _bytes(text) if code in ("latin1", "latin-1") else _refuse(code),
            ("collections", "OrderedDict"): lambda: {},
            ("builtins", "bytes"): lambda: b"",  # how the old protocols write it
            ("__builtin__", "bytes"): lambda: b"",
        }
        known = ("numpy" if numpy else module, name)
        return made[known] if known in made else _refuse(f"{module}.{name}")


def _refuse(what: object) -> Any:
    raise pickle.UnpicklingError(f"it asks for {what}, which is refused")


class _Dtype:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU][0-9]{1,6}|O8?", code):
            _refuse(f"the array type {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">", "=") else "="

    def decode(self, raw: Any) -> np.ndarray:
        """The flat array of a buffer; of a list, where the elements are objects."""
        if self.code.startswith("O"):
            flat = np.empty(len(raw), object)
            flat[:] = list(raw) if isinstance(raw, list) else _refuse("objects from a buffer")
            return flat
        return np.frombuffer(_bytes(raw), np.dtype(self.order + self.code))


class _Array:
    """Stands for an array that is still without values (numpy's ``_reconstruct``)."""

    def __init__(self, values: np.ndarray | None = None) -> None:
        self.values = np.zeros(0) if values is None else values

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.values = _from_buffer(raw, dtype, shape, "F" if fortran else "C").values


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    if not isinstance(dtype, _Dtype) or order not in ("C", "F"):
        _refuse("an array without a type")
    return _Array(dtype.decode(raw).reshape(shape, order=order))


def _scalar(dtype: Any, raw: Any) -> Any:
    values = _from_buffer(raw, dtype, (-1,)).values
    return values[0].item() if len(values) == 1 else _refuse("a number of many values")


def _bytes(raw: Any) -> bytes:
    """The bytes of a buffer, which Python 2 wrote as a string."""
    return raw.encode("latin1") if isinstance(raw, str) else bytes(memoryview(raw))


def _plain(value: Any, budget: Iterator[int]) -> Any:
    """Replaces the stand-ins inside a value; ``budget`` runs out after as many values as there may be."""
    if next(budget, None) is None:
        return _refuse("more values than it has bytes")
    if isinstance(value, _Array):
        value = value.values
        return [_plain(item, budget) for item in value.ravel()] if value.dtype == object else value
    if isinstance(value, dict):
        return {_plain(key, budget): _plain(item, budget) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, budget) for item in value)
    if isinstance(value, int) and abs(value) >= 2**64:
        return _refuse("a number of too many digits")
    if value is None or isinstance(value, (str, bytes, bytearray, int, float)):
        return value
    return _refuse(f"a {type(value).__name__}")
