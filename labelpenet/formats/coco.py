"""COCO's ``instances.json`` with its image folder.

Tags come from the categories of an image's annotations. A crowd region (``iscrowd``) gives no tag: it marks a group in
which no single object can be told, often at the edge of sight. In the truth it is kept, flagged as crowd.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labelpenet.data.dataset import (
    AnnotatedImages,
    NamedImage,
    TaggedImage,
    TaggedImages,
    Truth,
    choose_classes,
    tag_images,
)
from labelpenet.data.files import brief, inside, is_file, listing, read_json, read_names, write_text
from labelpenet.data.images import PIXEL_LIMIT, image_size
from labelpenet.errors import InputError
from labelpenet.formats.polygons import coco_polygons
from labelpenet.formats.predictions import file_name, image_numbers
from labelpenet.formats.selection import Exported, mask_arrays, selected
from labelpenet.instances import Instances

_PROBE = 50  # images by which an image folder is judged


@dataclass(frozen=True)
class CocoFile:
    """What an ``instances.json`` says, checked as far as tags need it.

    Attributes:
        path: the file.
        names: category names by category id.
        images: the image rows by id, in the order of the file; each has a ``file_name``.
        annotations: the annotation rows of each image, each with a known ``category_id``.
        problems: one line for each row that cannot be used.
    """

    path: Path
    names: dict[int, str]
    images: dict[int | str, dict[str, Any]]
    annotations: dict[int | str, list[dict[str, Any]]]
    problems: tuple[str, ...]


def is_coco(content: Any) -> bool:
    """Whether parsed JSON is laid out as an ``instances.json``."""
    return isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    )


def json_files(data: Path) -> list[Path]:
    """The instances files of a folder: ``instances.json``, ``instances_*.json``, also below ``annotations``."""
    folders = [folder for folder in (data, data / "annotations") if folder.is_dir()]
    names = ("instances.json", "instances_*.json")
    return [path for folder in folders for name in names for path in sorted(folder.glob(name)) if path.is_file()]


def choose_file(files: Sequence[Path], split: str | None, data: Path) -> Path:
    """Of a folder's instances files the one of a split: ``val`` chooses ``instances_val2017.json``.

    Raises:
        InputError: several files fit, or none of several (they are listed).
    """
    if len(files) == 1:
        return files[0]
    splits = {path: path.stem.removeprefix("instances").lstrip("_") for path in files}
    fitting = [path for path in files if splits[path] == split] or [
        path for path in files if split and splits[path].rstrip("0123456789") == split
    ]
    if len(fitting) != 1:
        wrong = "holds several splits; name one" if split is None else f"no single split {split!r}"
        raise InputError(f"{data}: {wrong}; available are {listing(splits.values())}")
    return fitting[0]


def open_tagged(
    path: Path,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    images: Path | None = None,
    content: Any = None,
) -> TaggedImages:
    """The tagged images of an instances file: a tag for each category of its annotations that are no crowds.

    Args:
        path: the JSON file.
        split: a text file of image ids or file names to restrict to; any other name is taken for that of the file.
        classes: names of the classes, in label order; None: those that occur, in alphabetical order.
        images: the image folder; None: ``images`` or ``<split>2017`` beside the file, or the file's own folder.
        content: the parsed file, where the caller has it already.

    Raises:
        InputError: the file is no instances file, a class is unknown, or no image can be used.
    """
    return _tagged(_read(path, content), split, classes, images)


def open_annotated(
    path: Path,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    images: Path | None = None,
    content: Any = None,
) -> AnnotatedImages:
    """The same images with their truth, for measuring. Arguments and errors as `open_tagged`."""
    instances = _read(path, content)
    tagged = _tagged(instances, split, classes, images)
    number = {name: category for category, name in instances.names.items()}
    categories = tuple(number[name] for name in tagged.classes)
    rows = {str(key): key for key in instances.images}
    files = {image.id: image.path for image in tagged.images}

    def read(image_id: str) -> Truth:
        if image_id not in files:
            raise InputError(f"{path}: no image {image_id!r}; check the ids of the predictions")
        key = rows[image_id]
        try:
            size = _size(instances.images[key], files[image_id])
            return _truth(instances.annotations.get(key, []), size, categories)
        except InputError as error:
            raise InputError(f"{path}: image {image_id}: {error}") from error

    return AnnotatedImages(tagged, read, categories)


def _read(path: Path, content: Any) -> CocoFile:
    content = read_json(path) if content is None else content
    if not is_coco(content):
        raise InputError(f"{path}: no COCO instances file; it needs the lists images, annotations and categories")
    problems: list[str] = []
    names: dict[int, str] = {}
    for row in content["categories"]:
        if not isinstance(row, dict) or not _is_id(row.get("id")) or not isinstance(row.get("name"), str):
            raise InputError(f"{path}: a category needs an integer id and a name, but got {str(row)[:80]}")
        if row["id"] in names or row["name"] in names.values():
            raise InputError(f"{path}: category {row['id']} {row['name']!r} stands there twice; merge the two")
        names[row["id"]] = row["name"]
    images: dict[int | str, dict[str, Any]] = {}
    seen: set[str] = set()
    for row in content["images"]:
        key: Any = row.get("id") if isinstance(row, dict) else None
        if not (_is_id(key) or isinstance(key, str)) or not isinstance(row.get("file_name"), str):
            problems.append(f"{path}: an image without id or file_name: {str(row)[:80]}")
        elif str(key) in seen:  # 7 and "7" would be one id for the tags
            problems.append(f"{path}: image id {key} stands there twice; the first is used")
        else:
            seen.add(str(key))
            images[key] = row
    annotations: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
    for row in content["annotations"]:
        if not isinstance(row, dict) or not isinstance(row.get("image_id"), (int, str)):
            problems.append(f"{path}: an annotation without image_id: {str(row)[:80]}")
        elif row["image_id"] not in images:
            problems.append(f"{path}: annotation {row.get('id')} belongs to no image ({str(row['image_id'])[:40]})")
        elif not _is_id(row.get("category_id")) or row["category_id"] not in names:
            problems.append(f"{path}: annotation {row.get('id')} has no known category")
        else:
            annotations[row["image_id"]].append(row)
    return CocoFile(path, names, images, dict(annotations), tuple(problems))


def _tagged(content: CocoFile, split: str | None, classes: Sequence[str] | None, images: Path | None) -> TaggedImages:
    chosen, notes = _chosen(content, split)
    folder = _image_folder(content, images)
    found, problems, only_crowd = [], [], 0
    for key in chosen:
        rows = content.annotations.get(key, [])
        single = frozenset(content.names[row["category_id"]] for row in rows if not _is_crowd(row))
        only_crowd += any(content.names[row["category_id"]] not in single for row in rows)
        try:
            path = inside(folder, content.images[key]["file_name"])
            if not is_file(path):
                raise InputError(f"{path}: no such image; add it or remove it from {content.path.name}")
            found.append(NamedImage(str(key), path, single, key if isinstance(key, int) else None))
        except InputError as error:
            problems.append(str(error))
    notes += brief(content.problems, "rows are passed over")
    if only_crowd:
        notes.append(f"{only_crowd} images show a class only as a crowd, which gives no tag")
    occurring = {name for one in found for name in one.names}
    known = content.names.values() if classes is not None else occurring
    names = choose_classes(classes, known, content.path) if found else ()
    tagged = tag_images(found, names, problems, content.path)
    return TaggedImages(tagged.classes, tagged.images, (*notes, *tagged.notes))


def _chosen(content: CocoFile, split: str | None) -> tuple[list[int | str], list[str]]:
    """The ids of the images of a split, and notes. One file is one split, so only a text file restricts it."""
    if split is None:
        return list(content.images), []
    for list_file in (content.path.parent / f"{split}.txt", Path(split)):
        if list_file.suffix and is_file(list_file):
            wanted = set(read_names(list_file))
            ids = [key for key, row in content.images.items() if {str(key), row["file_name"]} & wanted]
            if not ids:
                raise InputError(f"{list_file}: names no image of {content.path}; give image ids or file names")
            return ids, []
    if split in content.path.stem:
        return list(content.images), []
    return list(content.images), [f"{content.path.name} has no splits: all its images are used as {split!r}"]


def _image_folder(content: CocoFile, images: Path | None) -> Path:
    """The folder that holds most of the first images.

    Raises:
        InputError: none holds any (the folders looked at are listed).
    """
    home = content.path.parent
    own = content.path.stem.removeprefix("instances").lstrip("_") or "images"
    folders = [images] if images else [home / "images", home / own, home, home.parent / own, home.parent / "images"]
    names = [row["file_name"] for row in list(content.images.values())[:_PROBE]]

    def held(folder: Path) -> int:
        return sum(is_file(folder / name) for name in names)

    best = max(folders, key=held)
    if not held(best):
        raise InputError(f"{content.path}: its images are in none of {listing(map(str, folders))}; give their folder")
    return best


def _size(row: dict[str, Any], path: Path) -> tuple[int, int]:
    """(H, W) of an image as it is read, checked against what the file says.

    Raises:
        InputError: the image cannot be read, or the annotation was drawn on an image of another size.
    """
    size = image_size(path)
    said = row.get("height"), row.get("width")
    if all(_is_id(side) for side in said) and said != size:
        raise InputError(
            f"annotated at {said[1]} x {said[0]} pixels, but {path.name} has {size[1]} x {size[0]} (upright); "
            "use the image that was annotated"
        )
    if size[0] * size[1] > PIXEL_LIMIT:
        raise InputError(f"{path.name} has more than {PIXEL_LIMIT} pixels; make it smaller")
    return size


def _truth(rows: Sequence[dict[str, Any]], size: tuple[int, int], categories: Sequence[int]) -> Truth:
    """The annotations of one image, restricted to the chosen categories.

    Raises:
        InputError: a box or a mask is damaged or leaves the image.
    """
    rows = [{**row, "score": 1.0, "bbox": _box(row)} for row in rows if row["category_id"] in categories]
    instances = Instances.from_coco(rows, size, categories).validate(len(categories))
    limits = torch.tensor([size[1], size[0], size[1], size[0]])
    instances.boxes = instances.boxes.clamp(min=0).minimum(limits)  # within the pixel that validate lets pass
    crowd = torch.tensor([_is_crowd(row) for row in rows], dtype=torch.bool)
    return Truth(instances, difficult=torch.zeros(len(rows), dtype=torch.bool), crowd=crowd)


def _box(row: dict[str, Any]) -> list[float] | None:
    """The ``bbox`` of a row, or None where its mask's tight box is to serve."""
    box = row.get("bbox")
    if box is None and row.get("segmentation"):
        return None
    try:
        values = np.array(box, np.float64)
    except (TypeError, ValueError):
        values = np.array([])
    if values.shape != (4,) or not np.isfinite(values).all():
        raise InputError(f"annotation {row.get('id')} needs a bbox of four numbers, but has {str(box)[:60]}; mend it")
    return values.tolist()


def _is_crowd(row: dict[str, Any]) -> bool:
    return row.get("iscrowd") in (1, True)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def export_coco(
    predictions: Mapping[str, Instances],
    images: Sequence[TaggedImage],
    classes: Sequence[str],
    out: Path | str,
    *,
    category_ids: Sequence[int] | None = None,
    polygons: bool = False,
    min_score: float = 0.0,
) -> Exported:
    """Writes ``out/annotations.json``: images, categories and annotations with unique ids.

    CVAT takes the file as "COCO 1.0" (with ``polygons``, as it reads RLE as crowd masks), and so does everything else
    that reads COCO's instance annotation. Every annotation has ``score`` beside COCO's keys. Polygons run along pixel
    borders and are rasterised to the same mask; a mask with holes becomes one polygon with bridges of no width.

    Args:
        predictions: by image id.
        images: the photographs; those without a prediction are not listed.
        classes: names of the C classes, in label order.
        out: the folder.
        category_ids: (C,) ids of the categories; None for 1..C.
        polygons: segmentations as polygons instead of RLE.
        min_score: instances below are left out.

    Raises:
        InputError: the file cannot be written, or a score or box is not finite.
    """
    done = Exported()
    numbers = image_numbers(images)
    ids = list(range(1, len(classes) + 1) if category_ids is None else category_ids)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, found in selected(predictions, images, min_score, done.notes):
        height, width = found.image_size
        number = numbers[image.id]
        entries.append({"id": number, "file_name": file_name(image), "width": width, "height": height})
        for row, mask in zip(found.to_coco(number, ids), mask_arrays(found), strict=True):
            area = row["bbox"][2] * row["bbox"][3] if mask is None else int(mask.sum())
            if polygons and mask is not None:
                row["segmentation"] = coco_polygons(mask)
            elif mask is None:
                row["segmentation"] = []
            annotations.append({"id": len(annotations) + 1, **row, "area": area, "iscrowd": 0})
    categories = [{"id": i, "name": name, "supercategory": ""} for i, name in zip(ids, classes, strict=True)]
    content = {
        "info": {"description": "pseudo-labels by Label-PEnet"},
        "licenses": [],
        "images": entries,
        "categories": categories,
        "annotations": annotations,
    }
    path = Path(out) / "annotations.json"
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{path}: a score or box is NaN or infinite; remove it from the predictions") from error
    done.paths.append(write_text(path, text))
    return done
