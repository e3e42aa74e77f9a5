"""Labelme's and X-AnyLabeling's JSON, one file a photograph: to be corrected by hand, and read back.

An instance is a polygon, or several of one ``group_id``; without masks, or of score 0, a rectangle. The photograph's
tags are its ``flags``, and one more flag, ``checked``, is for the person: once it is set, or the file is changed in
another way, the file is truth. Files that other hands made are truth as they are, and their flags are none of our
business.
"""

import base64
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from labelpenet.data.dataset import Classes, NamedImage, Opened, Truth, tag_images, with_truth
from labelpenet.data.files import MANIFEST, changed, counted, inside, is_file, is_hidden, listing, nfc, read_json
from labelpenet.data.images import SUFFIXES
from labelpenet.errors import InputError, collected, told
from labelpenet.formats.folder import beside, image_files, known_beside, restrict
from labelpenet.formats.polygons import drawn, joined, outline, signed_area, straight
from labelpenet.formats.rows import file_names
from labelpenet.formats.selection import Export, exporter, objects, stems
from labelpenet.formats.shapes import Shape, checked_size, read_truth
from labelpenet.instances import Instances, masks_to_boxes

CHECKED = "checked"
_OURS = "labelpenet"  # the key by which an exported file is known: the photograph's name in the data set


@exporter("labelme")
def export_labelme(job: Export) -> None:
    """Writes ``out/<image>.json`` for each photograph, in the sub-folders that the photographs lie in.

    Polygons run through the outermost pixels, as Labelme draws them. What they cannot hold: holes (they
    are joined to the outline by bridges of no width).

    A class that is called ``checked`` is an `InputError`: its flag would be the person's. Other arguments and errors as
    `export`; copies of the photographs lie beside the files, where both programs look for them.
    """
    if CHECKED in job.classes:
        raise InputError(f"the class {CHECKED!r} has the name of the flag by which a person accepts a file; rename it")
    names, files = stems(job.images, folders=True), file_names(job.images)
    for image, found in job.selected():
        photograph = image.path.name
        if job.copy_images:
            photograph = job.copy(image, job.folder / names[image.id]).name
        content = {
            "version": "5.5.0",
            "flags": {CHECKED: False} | {name: label in image.tags for label, name in enumerate(job.classes)},
            "shapes": _shapes(found, job.classes, job.tolerance),
            "imagePath": photograph,
            "imageData": None,
            "imageHeight": found.image_size[0],
            "imageWidth": found.image_size[1],
            _OURS: files[image.id],
        }
        job.write(f"{names[image.id]}.json", json.dumps(content, ensure_ascii=False, indent=1))
    if not job.copy_images:
        job.notes.append("Labelme and X-AnyLabeling look for the photographs beside the files: export with copies")


def _shapes(found: Instances, classes: Sequence[str], tolerance: float) -> list[dict[str, Any]]:
    shapes = []
    for index, (label, score, box, mask) in enumerate(objects(found)):
        if mask is None:
            pieces = [box.reshape(2, 2).tolist()]
        else:
            pieces = [straight(piece).tolist() for piece in _pieces(outline(mask, centres=True, tolerance=tolerance))]
        for points in pieces:
            shape = {"label": classes[label], "score": score, "points": points, "description": "", "flags": {}}
            group = index + 1 if len(pieces) > 1 else None
            shapes.append({**shape, "group_id": group, "shape_type": "rectangle" if mask is None else "polygon"})
    return shapes


def _pieces(parts: list[np.ndarray]) -> list[np.ndarray]:
    """One ring a part, its holes joined to it."""
    holes = [ring for ring in parts if signed_area(ring) < 0]
    outer = [ring for ring in parts if signed_area(ring) >= 0]
    owned: dict[int, list[np.ndarray]] = defaultdict(list)
    for hole in holes:
        x, y = hole[0].tolist()
        depth = [cv2.pointPolygonTest(ring[:, None].astype(np.float32), (x, y), True) for ring in outer]
        within = [index for index, one in enumerate(depth) if one >= 0] or [int(np.argmax(depth))]
        owned[min(within, key=lambda index: signed_area(outer[index]))].append(hole)
    return [joined([ring, *owned[index]]) for index, ring in enumerate(outer)]


def json_files(folder: Path) -> list[Path]:
    """The files of a folder, and of those below, that are laid out as Labelme's; at most the first is opened."""
    files = sorted(path for path in folder.rglob("*.json") if not any(map(is_hidden, path.relative_to(folder).parts)))
    return files if files and _is_labelme(files[0]) else []


def lies_beside(data: Path) -> bool:
    """Whether the file of the same name beside a photograph of the folder is laid out as Labelme's."""
    files = (path for name in image_files(data) if is_file(path := beside(data / name, ".json")))
    return any(map(_is_labelme, itertools.islice(files, 1)))


def lies_in(data: Path, parts: Sequence[str]) -> bool:
    """Whether all JSON of a folder lies in these sub-folders for splits, which in an export of ours are none."""
    files = (path.relative_to(data).parts[0] for path in json_files(data))
    return not (data / MANIFEST).is_file() and set(parts).issuperset(files)


def _is_labelme(path: Path) -> bool:
    with suppress(InputError):
        return is_labelme(read_json(path, 2**26))
    return False


def is_labelme(content: Any) -> bool:
    """Whether parsed JSON is one photograph's file."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def open_data(data: Path, split: str | None = None, classes: Classes = None, images: Path | None = None) -> Opened:
    """The photographs of a folder of such files; tags are the labels of their shapes, and ours' flags.

    Of an export of ours only the files that were checked or changed are used. Where no file has a shape, the flags that
    are set are tags, as classifying in either program leaves them; the photographs then come without truth.

    ``split`` is a text file of photographs' names, or a name for which ``SPLIT.txt`` lies there; without ``images``
    each photograph lies beside its file. Other arguments and errors as `open.open_tagged`.
    """
    found: list[NamedImage] = []
    files: dict[str, Path] = {}
    problems: list[str] = []
    flagged: dict[str, frozenset[str]] = {}
    waiting = drawn_on = ambiguous = 0
    edited = changed(data)
    for path in json_files(data):
        with collected(problems):
            content = _content(path)
            if _OURS in content and not _flags(content).get(CHECKED) and path not in edited:
                waiting += 1
                continue
            name, photograph = _photograph(content, path, data, images)
            if name in files:
                raise InputError(f"{path}: {name} has another file already; remove one")
            tags = {str(shape.get("label")) for shape in content["shapes"]}
            flags = frozenset(flag for flag, value in _flags(content).items() if value is True and flag != CHECKED)
            ambiguous += _OURS not in content and _flags(content).get(CHECKED) is True
            drawn_on += bool(tags) or _OURS in content
            if _OURS in content:
                tags |= flags
            else:
                flagged[name] = flags
            files[name] = path
            found.append(NamedImage(name, photograph, frozenset(tags)))
    if waiting and not found and not problems:
        raise InputError(
            f"{data}: none of its {waiting} files is checked, or known to be changed; correct some where they were "
            f"exported to, or set their flag {CHECKED!r}"
        )
    asked, said = restrict(files, data, data, split) if found else ([], [])
    by_name = {one.id: one for one in found}
    shown = frozenset().union(*(one.names for one in found))
    found = [by_name[name] for name in asked]
    left = "files are neither checked nor known to be changed since their export; left out"
    notes = [*said, *counted((waiting, left))]
    flags = frozenset().union(*flagged.values())
    if flags and not drawn_on:
        found = [replace(one, names=flagged[one.id]) for one in found]
        notes.append(f"no file has a shape: the flags that are set ({listing(sorted(flags))}) are the tags")
        if ambiguous:
            notes.append(f"the flag {CHECKED!r}, which {ambiguous} files set, is no tag; rename it if it is a class")
    elif flags:
        notes.append(f"flags that are set ({listing(sorted(flags))}) are no tags, for there are shapes")
    known = {name for one in found for name in one.names}
    if classes is not None:  # of those that are asked for a small split need not show every one
        known = known_beside(data, classes, shown if drawn_on else flags, open_data)
    tagged = tag_images(found, classes, known, problems, data, notes)
    if flags and not drawn_on:
        return tagged
    return with_truth(tagged, data, lambda image: _truth(files[image.id], image.path, tagged.classes))


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path, 2**28)
    if not is_labelme(content):
        raise InputError(f"{path}: no Labelme file; it needs shapes and imagePath")
    if not all(isinstance(shape, dict) and isinstance(shape.get("label"), str) for shape in content["shapes"]):
        raise InputError(f"{path}: a shape without a label; name it or remove it")
    for shape in content["shapes"]:
        shape["label"] = nfc(shape["label"])
    return content


def _flags(content: Mapping[str, Any]) -> dict[str, Any]:
    flags = content.get("flags")
    return {nfc(flag): value for flag, value in flags.items()} if isinstance(flags, dict) else {}


def _photograph(content: Mapping[str, Any], path: Path, data: Path, images: Path | None) -> tuple[str, Path]:
    """The id and the file of the photograph that a file is about."""
    named = str(content["imagePath"]).replace("\\", "/")
    own = content.get(_OURS)
    if images is None:
        photograph = inside(data, (PurePosixPath(path.parent.relative_to(data).as_posix()) / named).as_posix())
        if not is_file(photograph):
            raise InputError(
                f"{photograph}: not there, but {path.name} is about it; add it, or give the images' folder"
            )
        other = next((one for suffix in SUFFIXES if is_file(one := beside(path, suffix))), photograph)
        if photograph.stem != path.stem and other != photograph:
            raise InputError(f"{path}: is about {photograph.name}, but lies beside {other.name}; rename one of them")
        return own if isinstance(own, str) else photograph.relative_to(data).as_posix(), photograph
    for name in (own, named, named.rsplit("/", 1)[-1]):
        if isinstance(name, str) and ".." not in name and is_file(images / name):
            return name, inside(images, name)
    raise InputError(f"{path}: its photograph {named[:80]} is not in {images}; add it or give another folder")


def _truth(path: Path, photograph: Path, classes: Sequence[str]) -> Truth:
    content = _content(path)
    size = checked_size(photograph, (content.get("imageHeight"), content.get("imageWidth")), path)
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for index, shape in enumerate(content["shapes"]):
        if shape["label"] in classes:
            group = shape.get("group_id")
            groups[(shape["label"], group) if isinstance(group, (int, str)) else index].append(shape)
    found: list[Shape] = []
    for shapes in groups.values():
        drawing = np.logical_or.reduce([_drawn(shape, size, path) for shape in shapes])
        if not drawing.any():
            raise InputError(f"{path}: a {shapes[0]['label']} without a pixel inside the photograph; remove it")
        boxed = any(shape.get("shape_type") == "rectangle" for shape in shapes)
        box = masks_to_boxes(torch.from_numpy(drawing)[None])[0].tolist() if boxed else None
        difficult = any(shape.get("difficult") is True for shape in shapes)  # X-AnyLabeling's, as VOC's
        found.append(Shape(shapes[0]["label"], f"object {len(found) + 1}", box, None if boxed else drawing, difficult))
    return read_truth(found, size, classes, path)


def _drawn(shape: Mapping[str, Any], size: tuple[int, int], path: Path) -> np.ndarray:
    """The (H, W) bool mask of one shape, as Labelme draws it; of a rectangle the pixels that it covers half or more."""
    kind = shape.get("shape_type") or "polygon"
    try:
        points = np.asarray(shape.get("points"), np.float64)
    except (TypeError, ValueError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all() or np.abs(points).max() > 1e6:
        raise InputError(f"{path}: the points of a {shape['label']} are no list of x, y; mend or remove it")
    low, high = points.min(0), points.max(0)
    mask = np.zeros(size, bool)
    if kind == "polygon" and len(points) > 2:
        mask = drawn([points], size)
    elif kind == "rectangle":  # two corners, or X-AnyLabeling's four
        (x1, y1), (x2, y2) = np.round(low).clip(0).astype(int), np.round(high).clip(0).astype(int)
        mask[y1:y2, x1:x2] = True
    elif kind == "mask":
        (x, y), pixels = np.round(low).astype(int), _mask(shape, path)
        if x < 0 or y < 0 or y + pixels.shape[0] > size[0] or x + pixels.shape[1] > size[1]:
            raise InputError(f"{path}: the mask of a {shape['label']} leaves the photograph; draw it again")
        mask[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    else:
        raise InputError(f"{path}: a {shape['label']} is a {kind} of {len(points)} points; draw it as a polygon")
    return mask


def _mask(shape: Mapping[str, Any], path: Path) -> np.ndarray:
    said = f"{path}: the mask of a {shape['label']} is no PNG; draw it again"
    with told(said, Exception):  # damaged bytes raise whatever the decoder stumbles over
        png = io.BytesIO(base64.b64decode(str(shape.get("mask")), validate=True))
        with Image.open(png, formats=["PNG"]) as image:
            if image.width * image.height > 10**8:
                raise ValueError("too large")
            return np.asarray(image.convert("L")) > 0
