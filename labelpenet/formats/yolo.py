"""YOLO text labels: one polygon (YOLO-seg) or box a line."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from labelpenet.data.dataset import AnnotatedImages, NamedImage, TaggedImage, Truth, tag_images, with_truth
from labelpenet.data.files import counted, inside, is_file, listing, nfc, read_text, safe_name
from labelpenet.data.images import find_images
from labelpenet.errors import InputError, collected, reason, told
from labelpenet.formats.folder import beside, disk_form, exists, image_files, plain_split
from labelpenet.formats.polygons import contours, joined, outline, straight
from labelpenet.formats.selection import Export, exporter, objects, stems
from labelpenet.formats.shapes import Shape, checked_size, read_truth


@exporter("yolo", extend=True)
def export_yolo(job: Export) -> None:
    """Writes ``out/labels/<split>/<image>.txt`` and ``out/data.yaml``.

    A line is ``class x1 y1 x2 y2 ...`` (the outline of a mask) or, where there are no masks, ``class x y width height``
    (centre and sides of a box), as fractions of the image's width and height. Outlines run through the
    outermost pixels, so that OpenCV, with which Ultralytics and supervision draw them, gives the mask back. The
    photographs belong into ``out/images/<split>`` under the names of the labels. What YOLO cannot hold: scores; several
    outlines of an instance (parts and holes are joined by bridges, drawn one pixel wide).

    A folder that holds the same classes already gets the split beside those that it has. Arguments and errors as
    `export`.
    """
    bridged, split, names = 0, safe_name(job.split), stems(job.images)
    labels = job.folder / "labels" / split
    job.check_new_split([labels])
    labels.mkdir(parents=True)
    for image, found in job.selected(doubt=False):
        lines = []
        scale = np.array([found.image_size[1], found.image_size[0]], np.float64)
        for label, _, box, mask in objects(found):
            if mask is None:
                values = np.concatenate([(box[:2] + box[2:]) / 2 / scale, (box[2:] - box[:2]) / scale])
            else:
                parts = outline(mask, centres=True, single=True, tolerance=job.tolerance)
                bridged += len(parts) > 1 or len(contours(mask)) > 1
                values = (_with_sides(straight(joined(parts))) / scale).flatten()
            lines.append(" ".join([str(label), *(f"{value:.6f}" for value in values.tolist())]) + "\n")
        job.write(labels / f"{names[image.id]}.txt", "".join(lines))
        if job.copy_images:
            job.copy(image, job.folder / "images" / split / names[image.id])
    job.write("data.yaml", _settings(job.folder, job.classes))
    if not job.copy_images:
        place = f"images/{split} under the names of the labels"
        job.notes.append(f"put the photographs into {place}, or export with copies")
    bridges = "became one outline with bridges, without what has fewer pixels than its bridge"
    job.notes += ["YOLO labels hold no scores", *counted((bridged, f"masks of several parts or with holes {bridges}"))]


def _with_sides(ring: np.ndarray) -> np.ndarray:
    """The ring of a line one pixel wide, or of one pixel, with a box that has sides, inside the same pixels.

    FiftyOne divides by the sides, and Ultralytics drops boxes without an area.
    """
    return ring if np.ptp(ring, 0).all() else np.concatenate([ring[:-1], ring[-1:] + 0.2])


def _settings(folder: Path, classes: Sequence[str]) -> str:
    """``data.yaml``. It names no ``path``: Ultralytics then takes the folder that the file lies in."""
    splits = sorted(path.name for path in (folder / "labels").iterdir())
    train = "train" if "train" in splits else splits[0]
    val = next((name for name in ("val", "test") if name in splits), train)
    # JSON texts are YAML texts, whatever a class is called.
    names = "".join(f"  {label}: {json.dumps(name, ensure_ascii=False)}\n" for label, name in enumerate(classes))
    places = {"train": train, "val": val} | {name: name for name in splits}
    return "".join(f"{key}: images/{name}\n" for key, name in places.items()) + f"names:\n{names}"


# -- reading ---------------------------------------------------------------------------------------------------------

_LISTS = ("data.yaml", "data.yml", "dataset.yaml", "obj.data")


def settings_file(data: Path) -> Path | None:
    """What describes a folder of YOLO labels: data.yaml, darknet's obj.data, or a list of classes beside ``labels``
    or among photographs and their labels."""
    lists = [data / name for name in _LISTS]
    own = (beside(data / one, ".txt") for one in image_files(data))
    labelled = (data / "labels").is_dir() or any(map(is_file, own))
    names = [data / name for name in ("classes.txt", "obj.names") if labelled]
    return next((path for path in [*lists, *names] if path.is_file()), None)


def open_annotated(
    path: Path, split: str | None = None, classes: Sequence[str] | None = None, images: Path | None = None
) -> AnnotatedImages:
    """The images of a YOLO data set, with a tag for each class of their label files; without such a file, a negative.

    Outlines are drawn as Ultralytics draws them.

    Args:
        path: ``data.yaml``, ``obj.data``, ``classes.txt`` or ``obj.names``; all paths in it stay inside its folder.
        split: ``train``, ``val``, ``test`` as the file calls them; None: all but ``test``.
        classes: as `open.open_tagged` takes them; errors, too.
        images: the folder that the file's paths are relative to, where it is another one; labels may lie beside either.
    """
    names, places, pose = _settings_of(path, images)
    root = images or path.parent
    listed = {name: one for name, one in places.items() if name != "test" or split == "test"}
    if split is not None:
        listed = {name: one for name, one in places.items() if plain_split(name) == plain_split(split)}
        if not listed:
            raise InputError(f"{path}: no split {split!r}; available are {listing(places)}")
    found: list[NamedImage] = []
    problems: list[str] = []
    bare: set[str] = set()
    photographs = [one for places in listed.values() for place in places for one in _photographs(root, place, path)]
    own = any(is_file(disk_form(one)) for photograph in photographs for one in _own_labels(path, photograph, images))
    files = {photograph: _labels(path, photograph, images, own) for photograph in photographs}
    shared = {labels for labels, count in Counter(files.values()).items() if count > 1}
    for photograph, labels in files.items():
        with collected(problems):
            inside(root, photograph.relative_to(root).as_posix())
            if labels in shared and is_file(labels):
                raise InputError(f"{labels}: may be of {photograph.name} or another of that name; rename one of them")
            if not is_file(labels):
                if is_file(other := beside(photograph, ".xml")):
                    raise InputError(f"{other}: lies there, but no {labels.name}; keep one kind")
                bare.add(photograph.relative_to(root).as_posix())
            indices = {index for index, _ in _rows(labels, len(names), pose).values()}
            tags = frozenset(names[index] for index in indices)
            found.append(NamedImage(photograph.relative_to(root).as_posix(), photograph, tags))
    if found and len(bare) == len(found):
        raise InputError(f"{path}: none of {len(found)} images has a label file ({files[found[0].path]}); add them")
    occurring = {name for one in found for name in one.names}
    if problems and not occurring:
        raise InputError(problems[0])
    notes = counted((len(bare), "images have no label file; as in YOLO, they show none of the classes"))
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        notes.append(f"{path.name} names {listing(twice)} more than once; taken for one class")
    if split is None and len(places) > 1:
        notes.append(f"no split is named: used are {listing(listed)} of {listing(places)}")
    tagged = tag_images(found, classes, occurring if classes is None else names, problems, path, notes)
    number = {name: index for index, name in reversed(list(enumerate(names, 1)))}

    def truth(image: TaggedImage) -> Truth:
        labels = files[image.path]
        size = checked_size(image.path, (None, None), labels)
        shapes = [_shape(line, row, size, names) for line, row in _rows(labels, len(names), pose).items()]
        return read_truth(shapes, size, tagged.classes, labels)

    return replace(with_truth(tagged, path, truth, [number[name] for name in tagged.classes]), unlisted=frozenset(bare))


def _shape(line: int, row: tuple[int, np.ndarray], size: tuple[int, int], names: Sequence[str]) -> Shape:
    """What a line of a label file describes in an image of ``size`` (H, W)."""
    index, points = row
    scale = np.array([size[1], size[0]], np.float64)
    corners = points * scale
    if len(points) == 2:  # centre and sides
        box = [*(corners[0] - corners[1] / 2), *(corners[0] + corners[1] / 2)]
        return Shape(names[index], f"line {line}", box)
    mask = np.zeros(size, np.uint8)
    cv2.fillPoly(mask, [corners.clip(-10, 10 + scale).astype(np.int32)], 1)
    return Shape(names[index], f"line {line}", None, mask.astype(bool))


def _settings_of(path: Path, images: Path | None) -> tuple[list[str], dict[str, list[str]], bool]:
    """The classes, the places of the images by split (folders and lists), and whether labels hold key points."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return _yaml(path, images)
    content: dict[str, str] = {}
    if path.name == "obj.data":
        lines = (line.partition("=") for line in read_text(path).splitlines())
        content = {key.strip(): value.strip() for key, _, value in lines}
        listed = content.get("names", "obj.names").removeprefix("data/")
        names = _class_lines(inside(path.parent, listed))
        places = {key: [content[key].removeprefix("data/")] for key in ("train", "valid", "test") if content.get(key)}
        return names, {plain_split(key): value for key, value in places.items()}, False
    root = images or path.parent
    return _class_lines(path), {"all": ["images" if (root / "images").is_dir() else "."]}, False


def _class_lines(path: Path) -> list[str]:
    lines = [nfc(line.strip()) for line in read_text(path).rstrip().splitlines()]
    if not lines or not all(lines):
        raise InputError(f"{path}: a line without a class; name a class on every line")
    return lines


def _yaml(path: Path, images: Path | None) -> tuple[list[str], dict[str, list[str]], bool]:
    kinds = (yaml.YAMLError, ValueError, RecursionError, OverflowError)
    with told(lambda error: f"{path}: no valid YAML ({reason(error)[:160]}); mend it", *kinds):
        content = yaml.safe_load(read_text(path, 2**18))
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or not all(type(name) in (str, int) for name in names):
        raise InputError(f"{path}: names must list the classes from 0 on, such as names: [cat, dog]")
    places: dict[str, list[str]] = {}
    for split in ("train", "val", "test", "valid"):
        value = content.get(split)
        values = value if isinstance(value, list) else [value]
        if value and all(isinstance(one, str) for one in values):
            places[plain_split(split)] = [_place(path, content.get("path"), one, images) for one in values]
        elif value:
            raise InputError(f"{path}: {split} must name a folder or list of images, but is a {type(value).__name__}")
    if not places:
        raise InputError(f"{path}: names no images; add train: images/train")
    return [nfc(str(name)) for name in names], places, "kpt_shape" in content


def _place(path: Path, base: Any, place: str, images: Path | None) -> str:
    """A place relative to the data set's folder. ``path`` is where its author had it: what exists here counts."""
    root = images or path.parent
    bases = [base] if isinstance(base, str) and base not in (".", "./") else []
    # Roboflow writes ../train/images for what lies beside the file.
    plain = re.sub(r"^(\.\.?/)+", "", place.replace("\\", "/"))
    return next((one for one in (*(f"{one}/{plain}" for one in bases), plain) if exists(root, one, Path.exists)), plain)


def _photographs(root: Path, place: str, source: Path) -> list[Path]:
    """The images of a folder, or those that a list names, a path a line."""
    if place != "." and not exists(root, place, Path.exists):
        raise InputError(
            f"{source}: {place[:80]!r} is not in {root}; put the images there, mend the file, or give their folder "
            "(images)"
        )
    path = root if place == "." else inside(root, place)
    if path.is_dir():
        return [one for _, one in find_images([path])]
    if path.suffix.lower() != ".txt":
        raise InputError(f"{source}: {place[:80]!r} is neither a folder nor a list (.txt) of images; mend it")
    names = [line.strip().replace("\\", "/").removeprefix("./") for line in read_text(path).splitlines()]
    found = []
    for name in filter(None, names):  # darknet's and CVAT's lists begin with data/, which is the data set's folder
        with told(lambda error: f"{path}: {error}", InputError):
            tried = [inside(root, name), inside(root, name.removeprefix("data/"))]
        found.append(next(filter(is_file, tried), tried[-1]))
    return found


def _labels(path: Path, photograph: Path, images: Path | None, own: bool) -> Path:
    """The label file of a photograph, beside it; where any has ``own`` labels beside the file ``path``, there."""
    if own:
        tried = _own_labels(path, photograph, images)
    else:
        tried = [_label_file(photograph)]
        if not tried[0].parent.is_dir():  # labelImg writes them beside the photographs, whatever their folder is called
            tried.append(photograph.with_suffix(".txt"))
    return next((one for one in map(disk_form, tried) if is_file(one)), tried[0])


def _own_labels(path: Path, photograph: Path, images: Path | None) -> list[Path]:
    """Where the labels of a photograph may lie beside the file ``path``, if the photographs lie in ``images``."""
    if images is None:
        return []
    below = photograph.relative_to(images)
    return [_label_file(path.parent / below), (path.parent / "labels" / below).with_suffix(".txt")]


def _label_file(image: Path) -> Path:
    """``labels/train/a.txt`` of ``images/train/a.jpg``; where no folder is called images, beside the image."""
    parts = list(image.parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _rows(path: Path, classes: int, pose: bool) -> dict[int, tuple[int, np.ndarray]]:
    """By line number the class and (2, 2) centre and sides, or (P, 2) corners, as fractions of the image. `InputError`:
    a line is not of that form; it costs its image, lest a tag be lost unseen.
    """
    found = {}
    for number, line in enumerate(read_text(path).splitlines() if is_file(path) else (), 1):
        if not (words := line.split()):
            continue
        try:
            index = int(float(words[0]))
        except (ValueError, OverflowError):
            index = -1
        if not 0 <= index < classes or str(index) != words[0].removesuffix(".0"):
            raise InputError(f"{path}: line {number}: {words[0][:20]!r} is none of the {classes} classes; mend it")
        values: list[float] = []
        for word in words[1:5] if pose else words[1:]:
            try:
                values.append(float(word))
            except ValueError as error:
                remedy = "decimals need a point, not a comma" if "," in word[:20] else "mend it"
                raise InputError(f"{path}: line {number}: {word[:20]!r} is no number; {remedy}") from error
        if len(values) not in (4, *range(6, len(values) + 1, 2)) or not (np.abs(values) < 10).all():
            raise InputError(
                f"{path}: line {number}: {len(values)} numbers; expected x y width height, or x y of three corners and "
                "more, as fractions of the image"
            )
        found[number] = index, np.reshape(values, (-1, 2))
    return found
