"""`predictions.json`: what a model found, as the COCO results list together with its categories and images.

``{"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}], "annotations": [{"id",
"image_id", "category_id", "bbox": [x, y, width, height], "score", "segmentation", "area", "iscrowd"}]}``. A run's
``instances/moduleK.json`` is one, too; there each image has its id in the data set as ``image`` and the whole a
``checksum``. Reading also takes the bare list of a COCO results file, and a COCO annotation file.

Shape letters: ``N`` instances, ``C`` classes.
"""

import json
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.files import brief, listing, read_json, write_text
from labelpenet.data.images import image_size
from labelpenet.errors import InputError, told
from labelpenet.formats.parquet import Groups, parquet_lists
from labelpenet.formats.parts import in_order, read_parts
from labelpenet.formats.review import accepted
from labelpenet.formats.rows import (
    Lines,
    Predictions,
    Row,
    Rows,
    check_id,
    check_same_size,
    check_size,
    coco_annotation,
    coco_file,
    coco_lists,
    file_names,
    image_numbers,
    match_categories,
    match_images,
    read_entries,
    read_rows,
)
from labelpenet.instances import Instances


def write_predictions(
    path: Path | str,
    predictions: Mapping[str, Instances] | Iterable[tuple[str, Instances]],
    images: TaggedImages | Sequence[TaggedImage],
    classes: Sequence[str],
    category_ids: Sequence[int] | None = None,
) -> Path:
    """Writes predictions.json, whole or not at all.

    Args:
        predictions: for each image id what was found there; as pairs they may come from a generator, and each image's
            masks are encoded before the next is asked for.
        images: the photographs that the ids belong to.
        classes: names of the C classes, in label order.
        category_ids: (C,) the ids in the file; None for 1..C.

    Raises:
        InputError: the file cannot be written, or a score or box is not finite.
        ValueError: an image id that is not among ``images``, or not one category id a class.
    """
    images = images.images if isinstance(images, TaggedImages) else images
    if category_ids is not None and len(set(category_ids)) != len(classes):
        raise ValueError(f"category_ids must be {len(classes)} different numbers, but got {list(category_ids)}")
    known = {image.id for image in images}
    pairs = predictions.items() if isinstance(predictions, Mapping) else predictions

    def rows() -> Iterator[tuple[str, tuple[int, int], list[Row]]]:
        for name, instances in pairs:
            if name not in known:
                raise ValueError(f"prediction for {name!r}, which is not among the {len(known)} images")
            yield name, instances.image_size, instances.to_coco(0, category_ids)

    return write_text(Path(path), coco_text(rows(), images, classes, category_ids))


def coco_text(
    found: Iterable[tuple[str, tuple[int, int], list[Row]]],
    images: Sequence[TaggedImage],
    classes: Sequence[str],
    category_ids: Sequence[int] | None = None,
    with_ids: bool = False,
) -> str:
    """The text of a predictions file, a line for each image, category and instance.

    Args:
        found: image id, (H, W) and rows of COCO's results list, whose ``image_id`` does not matter.
        images, classes, category_ids: as `write_predictions` takes them; errors, too.
        with_ids: each image has its id in the data set, too, as ``image``.
    """
    numbers, files = image_numbers(images), file_names(images)
    entries: list[str] = []
    annotations: list[str] = []
    for name, (height, width), rows in found:
        entry = {"id": numbers[name], "file_name": files[name], "width": width, "height": height}
        entries.append(json.dumps({**entry, "image": name} if with_ids else entry))
        with told(f"{name}: a score or box is NaN or infinite; remove it", ValueError):
            for row in rows:
                whole = {"id": len(annotations) + 1, **coco_annotation(row), "image_id": numbers[name]}
                annotations.append(json.dumps(whole, allow_nan=False))
    ids = category_ids or range(1, len(classes) + 1)
    categories = [json.dumps({"id": i, "name": name}) for i, name in zip(ids, classes, strict=True)]
    return "".join(coco_file({"images": entries, "categories": categories, "annotations": annotations}))


def read_content(path: Path) -> Any:
    """The content of a JSON file, or the same of a ``.parquet``; the annotations of a predictions file that was written
    here stay there until they are asked for. `InputError` as `read_json` and `parquet_lists`.
    """
    lists = parquet_lists(path) if path.suffix == ".parquet" else coco_lists(path)
    return read_json(path) if lists is None else lists


def class_names(path: Path) -> list[str]:
    """The categories that a predictions file names, in its order; `InputError` where it has none, as a bare list."""
    if path.is_dir():
        return in_order([path])[1]["classes"]
    content = read_content(path)
    entries = read_entries(path, content, "categories") if isinstance(content, dict) else None
    if not entries or not all(isinstance(entry.get("name"), str) for entry in entries):
        raise InputError(f"{path}: names no classes, and neither do the photographs; give a data set with tags")
    return [entry["name"] for entry in entries]


def read_predictions(
    path: Path | str,
    images: TaggedImages | Sequence[TaggedImage],
    classes: Sequence[str],
    category_ids: Sequence[int] | None = None,
    others: Sequence[int] = (),
) -> Predictions:
    """Reads predictions.json or .parquet, a folder of parts, a bare COCO results list or a COCO annotation file.

    Of a review only the photographs that were accepted are read, with scores of 1.

    Images are matched by ``file_name`` (the id, the name or the stem of an image's file) where the file lists its
    images, else by ``image_id``: the image's COCO number, its id, file name or stem, or the digits of the stem.
    Categories are matched by name where the file lists its categories, else by ``category_ids``. In a file that lists
    them, images and categories that are not asked for are left out, and said so.

    A row without ``score`` counts 1; one without ``bbox`` gets the tight box of its mask. Scores outside [0, 1] are
    mapped linearly onto it, all alike, which changes no order.

    Args:
        path: the file, or a folder with all parts of `predict --shard`. Lines of these, and of a file that was written
            here, are read when they are asked for, those of a ``.parquet`` by group; another file is in memory as a
            whole.
        images: the photographs that predictions are wanted for.
        classes: names of the C classes, in label order.
        category_ids: (C,) the id of each class where the file names no categories; None for 1..C.
        others: ids of classes that are not asked for, which are left out there.

    Returns:
        `Instances` by image id, in the order of ``images``: of the images that the file lists (or has rows for).

    Raises:
        InputError: the file cannot be read or has another structure; a row names an unknown image or category, or holds
            a box, score or mask that is none, or is not of this image. Names the file and row.
    """
    path = Path(path)
    images = images.images if isinstance(images, TaggedImages) else images
    if path.is_dir():
        return read_parts(path, images, classes)
    content, notes = accepted(path, read_content(path))
    listed = isinstance(content, dict)
    rows = content.get("annotations") if listed else content
    stored = isinstance(rows, Lines | Groups)
    if not stored and (not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows)):
        raise InputError(f"{path}: expected a COCO results list, or an object with images, categories and annotations")
    take = rows.take if stored else partial(map, rows.__getitem__)
    entries = read_entries(path, content, "images") if listed else None
    names = match_images(path, images, entries, notes)
    categories = read_entries(path, content, "categories") if listed else None
    labels = match_categories(path, classes, category_ids, categories, notes)
    if categories is None:
        labels |= dict.fromkeys(set(others) - set(labels))
    kept: dict[str, array[int]] = defaultdict(lambda: array("Q"))  # numbers of rows
    known = listing(map(str, labels))
    for index, row in enumerate(rows):
        name = _lookup(names, row.get("image_id"), f"{path}: row {index}: image_id", "the images of the data set")
        label = _lookup(labels, row.get("category_id"), f"{path}: row {index}: category_id", known)
        if name is not None and label is not None:
            kept[name].append(index)
    sizes = _sizes(path, entries, names)
    asked: dict[str, tuple[array[int], tuple[int, int], int]] = {}
    scores, bare, outside = array("d"), 0, 0
    unreadable: list[str] = []
    for image in images:
        own, size = kept[image.id], sizes.get(image.id)
        if own or (size is None and image.id in sizes):
            try:
                true = image_size(image.path)
            except InputError as error:
                unreadable.append(str(error))
                continue
            check_same_size(path, image, true if size is None else size, true)  # before a mask of any size is decoded
            size = true
        if size is not None:
            one = read_rows(path, list(zip(own, take(own), strict=True)), labels, image.id, size)
            asked[image.id] = own, size, len(scores)
            scores.extend(one.scores)
            bare += one.segmentations.count(None)
            limit = [size[1] + 1, size[0] + 1]
            outside += int(((one.boxes[:, :2] < -1) | (one.boxes[:, 2:] > limit)).any(1).sum())
    notes += brief(unreadable, "photographs cannot be read; what was found in them is left out")
    if 0 < bare < len(scores):
        notes.append(f"{path}: {bare} of {len(scores)} instances have a box only, no mask")
    if outside:
        notes.append(f"{path}: {outside} boxes leave their photograph; is their bbox x, y, width, height?")
    scaled = _rescaled(np.array(scores), notes)

    def read(name: str, known: tuple[Sequence[int], tuple[int, int], int]) -> Rows:
        own, size, first = known
        found = read_rows(path, list(zip(own, take(own), strict=True)), labels, name, size)
        return replace(found, scores=scaled[first : first + len(own)])

    return Predictions(tuple(classes), tuple(notes), asked, read)


def _sizes(path: Path, entries: list[Row] | None, names: Mapping[Any, str | None]) -> dict[str, tuple[int, int] | None]:
    """The size (H, W) of each image that the file lists, None where it gives no size."""
    sizes: dict[str, tuple[int, int] | None] = {}
    for entry in entries or []:
        name = names[entry["id"]]
        if name is None:
            continue
        known = entry.get("height") is not None and entry.get("width") is not None
        sizes[name] = check_size(entry["height"], entry["width"], f"{path}: image {entry['id']}") if known else None
    return sizes


def _rescaled(scores: np.ndarray, notes: list[str]) -> np.ndarray:
    """Scores in [0, 1], in their order also as float32."""
    low, high = scores.min(initial=0.0), scores.max(initial=1.0)
    mapped = scores
    if low < 0 or high > 1:
        notes.append(f"scores between {low:.4g} and {high:.4g} are mapped onto [0, 1]; their order is as it was")
        mapped = (scores / 2 - low / 2) / (high / 2 - low / 2)  # halves: 1e308 must not overflow
    before, place = np.unique(scores, return_inverse=True)
    single = mapped.astype(np.float32)  # as `Instances` has them, where scores that differ may not
    if len(before) == len(np.unique(single)):
        return mapped
    order = np.zeros(len(before), np.float32)
    order[place] = single
    for index in range(len(order) - 2, -1, -1):
        order[index] = min(order[index], np.nextafter(order[index + 1], np.float32(-1)))
    if order[0] < 0:  # too many near nothing
        order = np.linspace(0, 1, len(order), dtype=np.float32)
    return order[place]


def _lookup(table: Mapping[Any, Any], value: Any, where: str, known: str) -> Any:
    if check_id(value, where) not in table:
        raise InputError(
            f"{where} {str(value)[:80]!r} is unknown; known are {known} (a file that lists its images and categories "
            "is matched by their names)"
        )
    return table[value]
