"""COCO's ``instances.json`` with its image folder.

Tags come from the categories of an image's annotations. A crowd region (``iscrowd``) gives no tag: it marks a group in
which no single object can be told, often at the edge of sight. In the truth it is kept, flagged as crowd.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from labelpenet.data.dataset import (
    AnnotatedImages,
    Classes,
    NamedImage,
    TaggedImage,
    TaggedImages,
    Truth,
    tag_images,
    with_truth,
)
from labelpenet.data.files import brief, counted, excerpt, inside, is_file, listing, nfc, read_json, read_names
from labelpenet.errors import InputError, collected, told
from labelpenet.formats.folder import exists, list_file
from labelpenet.formats.polygons import coco_polygons
from labelpenet.formats.review import accepted
from labelpenet.formats.rows import Row, coco_annotation, file_names, image_numbers, name_numbers
from labelpenet.formats.selection import Export, exporter, mask_arrays, stems
from labelpenet.formats.shapes import PROBE, Shape, checked_size, image_folder, read_truth

# COCO, datumaro, CVAT and our own; Roboflow, FiftyOne (beside data), Label Studio's COCO export, our own of 0.1.
_NAMES = (
    "instances.json",
    "instances_*.json",
    "_annotations.coco.json",
    "labels.json",
    "result.json",
    "annotations.json",
)
_LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class _File:
    """What an ``instances.json`` says, checked as far as tags need it."""

    path: Path
    names: dict[int, str]  # of the categories
    images: dict[int | str, Row]  # in the order of the file; each has a ``file_name``
    annotations: dict[int | str, list[Row]]  # of each image; each has a known ``category_id``
    problems: list[str]  # one line for each row that cannot be used
    notes: list[str]


def is_coco(content: Any) -> bool:
    """Whether parsed JSON means to be an ``instances.json``; what it lacks, reading says."""
    return isinstance(content, dict) and sum(isinstance(content.get(key), list) for key in _LISTS) > 1


def is_predicted(content: Any) -> bool:
    """Whether it holds predictions: annotations with scores."""
    return is_coco(content) and any(
        isinstance(row, dict) and "score" in row for row in content.get("annotations") or ()
    )


def json_files(data: Path) -> list[Path]:
    """The instances files of a folder, under the names that tools give them, also below ``annotations``."""
    folders = [folder for folder in (data, data / "annotations") if folder.is_dir()]
    return [path for folder in folders for name in _NAMES for path in sorted(folder.glob(name)) if path.is_file()]


def choose_file(files: Sequence[Path], split: str | None, data: Path) -> Path:
    """Of instances files the one of a split, as ``instances_val2017.json`` of ``val``; `InputError` where none is."""
    if len(files) == 1:
        return files[0]
    splits = {path: _split_of(path) for path in files}
    fitting = [path for path in files if splits[path] == split] or [
        path for path in files if split and splits[path].rstrip("0123456789") == split
    ]
    if len(fitting) != 1:
        wrong = "holds several splits; name one" if split is None else f"no single split {split!r}"
        raise InputError(f"{data}: {wrong}; available are {listing(splits.values())}")
    return fitting[0]


def open_annotated(
    path: Path, split: str | None = None, classes: Classes = None, images: Path | None = None, content: Any = None
) -> AnnotatedImages:
    """The images of an instances file, with a tag for each category of their annotations that are no crowds, and truth.

    Args:
        path, classes: as `open.open_tagged` takes them; errors, too.
        split: a text file of image ids or file names to restrict to; any other name is taken for that of the file.
        images: the image folder; None: ``images``, ``data`` or ``<split>2017`` beside the file or beside its folder,
            or the file's own folder.
        content: the parsed file, where the caller has it already.
    """
    instances = _read(path, content)
    tagged = _tagged(instances, split, classes, images)
    number = {name: category for category, name in instances.names.items()}
    keys = {_image_id(row): key for key, row in instances.images.items()}

    def truth(image: TaggedImage) -> Truth:
        row = instances.images[keys[image.id]]
        source = f"{path}: image {image.id}"
        size = checked_size(image.path, (row.get("height"), row.get("width")), source)
        shapes = (_shape(one, instances.names) for one in instances.annotations.get(keys[image.id], []))
        return read_truth(shapes, size, tagged.classes, source)

    own = [number[name] for name in tagged.classes]
    asked = set(own)
    others = tuple(category for category in instances.names if category not in asked)
    return replace(with_truth(tagged, path, truth, own), others=others)


def _read(path: Path, content: Any) -> _File:
    content, notes = accepted(path, read_json(path) if content is None else content)
    lacking = [key for key in _LISTS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise InputError(
            f"{path}: no COCO instances file; it needs the lists {listing(_LISTS)}, but lacks {listing(lacking)}"
        )
    problems: list[str] = []
    names: dict[int, str] = {}
    taken: set[str] = set()
    rows = (row for row in content["annotations"] if isinstance(row, dict))
    used = {row["category_id"] for row in rows if _is_id(row.get("category_id"))}
    doubles = Counter(nfc(str(row.get("name"))) for row in content["categories"] if isinstance(row, dict))
    for row in content["categories"]:
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name.strip() or not _is_id(row.get("id")):
            raise InputError(f"{path}: a category needs an integer id and a name, but got {excerpt(row)}; mend it")
        name = nfc(name)
        if doubles[name] > 1 and row["id"] not in used and row.get("supercategory") == "none":
            continue  # Roboflow's name of all its categories, which may be that of the only one
        if row["id"] in names or name in taken:
            raise InputError(f"{path}: category {row['id']} {name!r} stands there twice; merge the two")
        taken.add(name)
        names[row["id"]] = name
    images: dict[int | str, Row] = {}
    seen: dict[str, int | str] = {}
    same: dict[int | str, int | str] = {}  # the second id of an image that is listed under two
    called = Counter(_image_id(row) for row in content["images"] if _is_image(row))
    for row in content["images"]:
        key: Any = row.get("id") if isinstance(row, dict) else None
        if not _is_image(row):
            problems.append(f"{path}: an image without id or file_name: {excerpt(row)}")
        elif called[_image_id(row)] > 1 and _leads_out(row["file_name"]):
            problems.append(f"{path}: {row['file_name'][:80]} may be another {_image_id(row)[:80]}; rename one")
        elif key in images or _image_id(row) in seen:
            twice = f"image id {excerpt(key)}" if key in images else f"image {_image_id(row)[:80]}"
            problems.append(f"{path}: {twice} stands there twice; the first is used")
            if key not in images:
                same[key] = seen[_image_id(row)]
        else:
            seen[_image_id(row)] = key
            images[key] = row
    annotations: dict[int | str, list[Row]] = defaultdict(list)
    by_datumaro = content.get("licenses") == [{"name": "", "id": 0, "url": ""}]
    painted = 0
    for row in content["annotations"]:
        key = row.get("image_id") if isinstance(row, dict) else None
        image: Any = same.get(key, key) if _is_key(key) else None  # type: ignore[arg-type]
        if image is None:
            problems.append(f"{path}: an annotation without image_id: {excerpt(row)}")
        elif image not in images:
            problems.append(
                f"{path}: annotation {excerpt(row.get('id'))} belongs to no image ({excerpt(row['image_id'])})"
            )
        elif not _is_id(row.get("category_id")) or row["category_id"] not in names:
            problems.append(f"{path}: annotation {excerpt(row.get('id'))} has no known category")
        else:
            single = by_datumaro and _is_crowd(row)
            painted += single
            annotations[image].append({**row, "iscrowd": 0} if single else row)
    writers = f"CVAT and datumaro, which wrote {path.name}, write every mask so"
    notes += counted((painted, f"masks with iscrowd 1 are taken for single objects: {writers}"))
    return _File(path, names, images, dict(annotations), problems, notes)


def _tagged(content: _File, split: str | None, classes: Sequence[str] | None, images: Path | None) -> TaggedImages:
    chosen, notes = _chosen(content, split)
    folder, said = _image_folder(content, images)
    notes += said
    found, problems, only_crowd = [], list[str](), 0
    for key in chosen:
        rows = content.annotations.get(key, [])
        single = frozenset(content.names[row["category_id"]] for row in rows if not _is_crowd(row))
        only_crowd += any(content.names[row["category_id"]] not in single for row in rows)
        with collected(problems):
            path = inside(folder, _image_id(content.images[key]))
            if not is_file(path):
                raise InputError(f"{path}: no such image; add it or remove it from {content.path.name}")
            number = key if isinstance(key, int) else None
            found.append(NamedImage(_image_id(content.images[key]), path, single, number))
    notes += [*brief(content.problems, "rows are skipped"), *content.notes]
    out = sum(_leads_out(content.images[key]["file_name"]) for key in chosen)
    notes += counted(
        (out, f"names of {content.path.name} lead elsewhere; the files of these names in {folder} are used")
    )
    if only_crowd and not any(one.names for one in found):
        raise InputError(f"{content.path}: holds crowds alone; set iscrowd to 0 where they are single objects")
    notes += counted((only_crowd, "images show a class only as a crowd, which gives no tag"))
    occurring = {name for one in found for name in one.names}
    known = content.names.values() if classes is not None else occurring
    return tag_images(found, classes, known, problems, content.path, notes)


def _chosen(content: _File, split: str | None) -> tuple[list[int | str], list[str]]:
    """The ids of the images of a split, and notes. One file is one split, so only a text file restricts it."""
    if split is None:
        return list(content.images), []
    path = list_file(split, [content.path.parent], content.path)
    if path is not None:
        names = {
            key: set(map(nfc, (str(key), row["file_name"], _image_id(row), _image_id(row).rsplit(".", 1)[0])))
            for key, row in content.images.items()
        }
        times = Counter(name for own in names.values() for name in own)
        wanted = set(map(nfc, read_names(path, lambda name: nfc(name) in times)))
        ids = [key for key in names if names[key] & wanted]
        for name in wanted:
            if times[name] > 1:
                raise InputError(
                    f"{path}: {name[:80]} may be several images of {content.path.name} (by id, by file name); "
                    "give whole file names"
                )
        if not ids:
            raise InputError(f"{path}: names no image of {content.path}; give image ids or file names")
        absent = len(wanted.difference(*(names[key] for key in ids)))
        return ids, counted((absent, f"lines of {path.name} name no image of {content.path.name}"))
    if split in (_split_of(content.path), *re.split(r"[\W\d_]+", content.path.stem)):
        return list(content.images), []
    return list(content.images), [f"{content.path.name} has no splits: all its images are used as {split!r}"]


def _image_folder(content: _File, images: Path | None) -> tuple[Path, list[str]]:
    """The folder that holds most of the first images, and notes; errors as `image_folder`."""
    home, own = content.path.parent, _split_of(content.path) or "images"
    homes = [home, home.parent] if home.name == "annotations" else [home]
    inner = (f"images/{own}", own, "images", f"data/{own}", "data", ".")
    folders = [images] if images else [root / name for root in homes for name in inner]
    names = [_image_id(row) for row in list(content.images.values())[:PROBE]]
    held = {
        folder: sum(is_file(folder / name) or exists(folder, name) for name in names)
        for folder in folders
        if folder.is_dir()
    }
    return image_folder(held, content.path)


def _split_of(path: Path) -> str:
    """``val2017`` of ``instances_val2017.json``, else nothing."""
    return path.stem.removeprefix("instances").lstrip("_") if path.stem.startswith("instances") else ""


def _image_id(row: dict[str, Any]) -> str:
    """The path of a photograph below its folder; of a name that leads out, as Label Studio's do, the last part."""
    name = row["file_name"].replace("\\", "/").removeprefix("./")
    return name.rsplit("/", 1)[-1] if _leads_out(name) else name


def _leads_out(name: str) -> bool:
    return bool(PureWindowsPath(name).anchor) or ".." in PureWindowsPath(name).parts


def _shape(row: dict[str, Any], names: dict[int, str]) -> Shape:
    box = row.get("bbox")
    if isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box):
        box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]  # what are no numbers will be called so
    mask = row.get("segmentation")
    where = f"annotation {excerpt(row.get('id'), 40)}"
    return Shape(names[row["category_id"]], where, box, mask, crowd=_is_crowd(row))


def _is_crowd(row: dict[str, Any]) -> bool:
    return row.get("iscrowd") in (1, "1")


def _is_image(row: Any) -> bool:
    return isinstance(row, dict) and _is_key(row.get("id")) and isinstance(row.get("file_name"), str)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_key(value: Any) -> bool:
    return _is_id(value) or isinstance(value, str)


@exporter("coco")
def export_coco(job: Export) -> None:
    """Writes ``out/annotations/instances_default.json``: images, categories and annotations with unique ids.

    That is where CVAT and datumaro look for it, datumaro only beside ``images`` (``copy_images``). CVAT takes the file
    as "COCO 1.0" (with ``polygons``, as it reads RLE as crowd masks), and so does everything else that reads COCO's
    instance annotation. Every annotation has ``score`` beside COCO's keys, which most readers pass over: what is
    doubtful (of score 0) is left out. Polygons run along pixel borders and are rasterised to the same mask; a mask with
    holes becomes one polygon with bridges of no width.

    Arguments and errors as `export`, and ``polygons``: segmentations as polygons instead of RLE. Copies of the
    photographs lie in ``out/images``, and the file calls them as these. A score or box that is not finite is an
    `InputError`, too.
    """
    numbers, names, plain = image_numbers(job.images), file_names(job.images), stems(job.images, folders=True)
    ids = range(1, len(job.classes) + 1) if job.category_ids is None else job.category_ids
    entries: list[Row] = []
    annotations: list[Row] = []
    for image, found in job.selected(doubt=False):
        height, width = found.image_size
        number, name = numbers[image.id], names[image.id]
        if job.copy_images:
            home = job.folder / "images"
            name = job.copy(image, home / plain[image.id]).relative_to(home).as_posix()
        entries.append({"id": number, "file_name": name, "width": width, "height": height})
        for row, mask in zip(found.to_coco(number, job.category_ids), mask_arrays(found), strict=True):
            row.setdefault("segmentation", [])
            whole = {"id": len(annotations) + 1, **coco_annotation(row)}
            if job.polygons and mask is not None:
                whole["segmentation"] = coco_polygons(mask, job.tolerance)
            annotations.append(whole)
    content = {
        "info": {"description": "pseudo-labels by Label-PEnet"},
        "licenses": [],
        "images": entries,
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in zip(ids, job.classes, strict=True)],
        "annotations": annotations,
    }
    job.write("annotations/instances_default.json", _finite_json(content, job.out))


@exporter("coco-results")
def export_coco_results(job: Export) -> None:
    """Writes ``out/results.json``: the bare list that pycocotools' ``loadRes`` and evaluation servers take.

    Arguments as `export`, errors as `export_coco`. What the list cannot hold: the names of images and classes.
    """
    own = all(image.number is not None for image in job.images)
    digits = {} if own else name_numbers(job.images)  # by which such a list is read, too
    numbers = digits or image_numbers(job.images)
    found = job.selected(as_labels=False)
    rows = [row for image, one in found for row in one.to_coco(numbers[image.id], job.category_ids)]
    job.write("results.json", _finite_json(rows, job.out))
    if job.category_ids is None or not own:
        which = "images have the digits of their names, classes" if digits else "images and classes"
        job.notes.append(f"the data set has no COCO ids of its own: {which} are numbered from 1, in order")


def _finite_json(content: Any, out: Path) -> str:
    with told(f"{out}: a score or box is NaN or infinite; remove it from the predictions", ValueError):
        return json.dumps(content, allow_nan=False)
