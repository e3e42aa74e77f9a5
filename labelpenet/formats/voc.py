"""PASCAL VOC's development kit: ``VOCdevkit/VOC2007``, ``VOC2012`` and data sets laid out like them.

Tags come from the names of an image's objects alone (difficult ones included). Boxes, flags and maps are read by
`open_annotated` only, when the truth of an image is asked for.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

from labelpenet.data.dataset import VOC_CLASSES, AnnotatedImages, NamedImage, TaggedImage, Truth, tag_images, with_truth
from labelpenet.data.files import (
    bare_name,
    counted,
    inside,
    is_file,
    listing,
    nfc,
    read_names,
    read_text,
    read_xml,
    safe_name,
)
from labelpenet.data.images import SUFFIXES, palette_png, read_index_map, voc_palette
from labelpenet.errors import InputError, collected
from labelpenet.evaluation.semantic import IGNORE, paint
from labelpenet.formats.folder import beside, image_files, known_beside, restrict
from labelpenet.formats.selection import Export, clipped_boxes, exporter, stems
from labelpenet.formats.shapes import Shape, checked_size
from labelpenet.formats.shapes import read_truth as read_shapes
from labelpenet.instances import Instances


def year_folder(data: Path) -> Path | None:
    """The year folder that ``data`` is, or holds also in a VOCdevkit; `InputError` where it holds several."""
    if (data / "Annotations").is_dir() and ((data / "JPEGImages").is_dir() or (data / "ImageSets").is_dir()):
        return data
    years = sorted(path.parent for path in data.glob("*/Annotations") if (path.parent / "JPEGImages").is_dir())
    if len(years) > 1:
        raise InputError(f"{data}: holds {listing(year.name for year in years)}; give the folder of one year")
    if years:
        return years[0]
    return year_folder(data / "VOCdevkit") if (data / "VOCdevkit").is_dir() else None


def splits(year: Path) -> list[str]:
    """Names of the image lists: those of ImageSets/Main, and those of other folders as ``Segmentation/val``."""
    sets = year / "ImageSets"
    names = {path.stem for path in (sets / "Main").glob("*.txt")}
    # "cat_val" beside "val" is the list of one class, with a sign a line.
    main = {name for name in names if "_" not in name or name.rsplit("_", 1)[1] not in names}
    others = {f"{path.parent.name}/{path.stem}" for path in sets.glob("*/*.txt") if path.parent.name != "Main"}
    return sorted(main) + sorted(others)


def split_ids(year: Path, split: str | None) -> list[str]:
    """The image ids of a split, in the order of its list.

    Args:
        split: a list of ImageSets/Main (``train``), of another folder (``Segmentation/val``) or a text file of the
            user's; ``trainval`` is put together where only its halves exist; None: every image that a list of
            ImageSets/Main other than ``test`` names, or every annotated one where there is no list.

    Raises:
        InputError: there is no such list (the available ones are listed), or it is empty.
    """
    known = splits(year)
    main = [name for name in known if "/" not in name]
    if split is None:
        chosen = [name for name in main if name != "test"]
        if not known:
            return sorted(path.stem for path in (year / "Annotations").glob("*.xml"))
    elif split == "trainval" and split not in main and {"train", "val"} <= set(main):
        chosen = ["train", "val"]
    else:
        chosen = [split]
    files = [_list_file(year, one, known) for one in chosen]
    ids = list(dict.fromkeys(one for file in files for one in read_names(file, partial(_is_photograph, year))))
    if not ids:
        raise InputError(f"{year}: the list {split or listing(chosen)} names no image; available are {listing(known)}")
    return ids


def open_annotated(year: Path, split: str | None = None, classes: Sequence[str] | None = None) -> AnnotatedImages:
    """The images of a split: a tag for every class that the XML names, whatever its boxes and flags; and their truth.

    A list ``test`` may name images without annotation, as VOC 2012's does: they are there to be predicted. Arguments
    and errors as `open.open_tagged`.
    """
    for_test = split is not None and split.rpartition("/")[2] == "test"
    found, problems, bare = [], list[str](), 0
    ids = split_ids(year, split)
    for name in ids:
        with collected(problems):
            image, names = _image(year, name), []
            if for_test and not is_file(year / "Annotations" / f"{name}.xml"):
                bare += 1
            else:
                names = object_names(_annotation(year, name))
            found.append(NamedImage(name, image, frozenset(names)))
    occurring = {name for one in found for name in one.names}
    if bare or (classes is not None and not set(classes) <= occurring):
        # A class may be missing from a small split and yet be known; a folder of test images alone knows none.
        occurring |= _all_names(year) or set(classes or ())
    notes = counted((bare, f"images of {split} have no annotation; they can be predicted, not measured"))
    if split is None and splits(year):
        notes = [f"no split is named: the images of all lists but test are used; available are {listing(splits(year))}"]
    if numbered := [name for name in ids if bare_name(name) != name and _is_photograph(year, bare_name(name))]:
        notes.append(
            f"{listing(numbered, 3)}: taken for photographs of that name, not {bare_name(numbered[0])} with a number"
        )
    tagged = tag_images(found, classes, occurring, problems, year, notes)
    order = cache(lambda: map_classes(year))
    return with_truth(tagged, year, lambda image: read_truth(year, image, tagged.classes, order))


def lies_beside(data: Path) -> bool:
    """Whether a folder holds photographs and, beside one of them, its XML."""
    return any(is_file(beside(data / name, ".xml")) for name in image_files(data))


def open_beside(data: Path, split: str | None = None, classes: Sequence[str] | None = None) -> AnnotatedImages:
    """The photographs of a folder in which the XML of each lies beside it, as labelImg and Roboflow leave them; one
    without XML has not been looked at and is not used. ``split`` is as in `folder.restrict`; other arguments and errors
    as `open.open_tagged`.
    """
    photographs: dict[str, list[str]] = {}
    for name in image_files(data):
        photographs.setdefault(nfc(Path(name).stem), []).append(name)
    found: dict[str, NamedImage] = {}
    problems: list[str] = []
    for path in sorted(data.glob("*.xml")):
        own = photographs.pop(nfc(path.stem), [])
        with collected(problems):
            if len(own) != 1:
                raise InputError(f"{path}: must have one photograph of its name beside, not {listing(own) or 'none'}")
            if read_xml(path).tag != "annotation":
                raise InputError(f"{path}: no annotation as VOC writes it; take it out of the folder")
            found[own[0]] = NamedImage(own[0], inside(data, own[0]), frozenset(object_names(path)))
    chosen, notes = restrict(found, data, data, split) if found else ([], [])
    bare = sum(map(len, photographs.values()))
    notes += counted((bare, "photographs have no XML beside them; they are not used"))
    known = known_beside(data, classes, {name for one in found.values() for name in one.names}, open_beside)
    tagged = tag_images([found[name] for name in chosen], classes, known, problems, data, notes)

    def truth(image: TaggedImage) -> Truth:
        path = beside(image.path, ".xml")
        objects, said = read_objects(path)
        return read_shapes(objects, checked_size(image.path, said, path), tagged.classes, path, masked=False)

    return with_truth(tagged, data, truth)


def object_names(path: Path) -> list[str]:
    """The class name of each object of an annotation, in its order; nothing else of it is looked at."""
    return [_name(one, path) for one in read_xml(path).findall("object")]


def read_objects(path: Path) -> tuple[list[Shape], tuple[int | None, int | None]]:
    """The objects of an annotation, in the order of the file, and the (height, width) that it says of its image.

    VOC's ``xmin..xmax`` (1-based, inclusive) becomes the interval ``[xmin - 1, xmax]``; what are no four numbers, NaN.
    `InputError`: the XML cannot be read, or an object has no name.
    """
    objects, root = [], read_xml(path)
    for number, one in enumerate(root.findall("object"), 1):
        corners = [one.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(corner) for corner in corners)
        except ValueError:
            x1 = y1 = x2 = y2 = math.nan
        difficult = one.findtext("difficult", "0").strip().lower() in ("1", "1.0", "true")
        objects.append(Shape(_name(one, path), f"object {number}", (x1 - 1, y1 - 1, x2, y2), difficult=difficult))
    said = [root.findtext(f"size/{side}", "").strip().removesuffix(".0") for side in ("height", "width")]
    height, width = (int(side) if side.isascii() and side.isdigit() and len(side) < 10 else 0 for side in said)
    return objects, (height or None, width or None)  # tools that do not know it write 0


def read_truth(year: Path, image: TaggedImage, classes: Sequence[str], order: Callable[[], tuple[str, ...]]) -> Truth:
    """The annotation of one image, restricted to ``classes``.

    Args:
        order: gives the class names in the order of the indices of SegmentationClass; called only if there is a map.

    Returns:
        Boxes, labels and flags from the XML. Masks from SegmentationObject, where index i is the i-th object of the
        XML. The class map from SegmentationClass, where classes that are not chosen become background. Maps that are
        damaged, or contradict the XML or one another, are not used, and the truth's notes say so.

    Raises:
        InputError: the XML is damaged or about an image of another size, or the image cannot be read.
    """
    annotation = _annotation(year, image.id)
    objects, said = read_objects(annotation)
    size = checked_size(image.path, said, annotation)
    instance_map = class_map = None
    notes = []
    try:
        instance_map = _map(year, "SegmentationObject", image.id, size)
        class_map = _map(year, "SegmentationClass", image.id, size)
        if instance_map is not None:
            _check_instance_map(instance_map, objects, f"{year.name}/SegmentationObject/{image.id}.png")
        if instance_map is not None and class_map is not None:
            _check_class_map(class_map, instance_map, objects, order(), f"{year.name}/SegmentationClass/{image.id}.png")
    except InputError as error:
        instance_map = class_map = None
        notes.append(f"{error}; only the boxes of {image.id} are used")
    if instance_map is not None:
        objects = [replace(one, mask=instance_map == number) for number, one in enumerate(objects, 1)]
    semantic = None if class_map is None else _chosen_classes(class_map, order(), classes)
    return read_shapes(objects, size, classes, annotation, semantic, notes, masked=instance_map is not None)


def map_classes(year: Path) -> tuple[str, ...]:
    """The class names in the order of the indices 1, 2, ... of SegmentationClass.

    From ``classes.txt`` (a name a line) or ``labelmap.txt`` (as CVAT writes it) in the year folder; without these,
    VOC's twenty where all annotations use only those, else the names of all annotations in alphabetical order.
    `InputError`: the file is damaged or holds more than 254 classes.
    """
    if (year / "classes.txt").is_file():
        lines = [nfc(line.strip()) for line in read_text(year / "classes.txt").splitlines()]
        names = tuple(line for line in lines if line and not line.startswith("#"))
    elif (year / "labelmap.txt").is_file():
        lines = [nfc(line.split(":")[0].strip()) for line in read_text(year / "labelmap.txt").splitlines()]
        names = tuple(line for line in lines if line and not line.startswith("#") and line != "background")
    else:
        found = _all_names(year)
        names = VOC_CLASSES if found <= set(VOC_CLASSES) else tuple(sorted(found))
    if len(names) >= IGNORE:
        raise InputError(
            f"{year}: {len(names)} classes, but a class map can hold 254; remove the SegmentationClass maps"
        )
    return names


def _list_file(year: Path, split: str, known: Sequence[str]) -> Path:
    """The file of a split that the user named: a list of the data set, or a file of the user's own."""
    if split in known:
        folder = year / "ImageSets" if "/" in split else year / "ImageSets" / "Main"
        return folder / f"{split}.txt"
    own = Path(os.path.expanduser(split))  # noqa: PTH111 as in `folder.list_file`
    if own.suffix and is_file(own):
        return own
    in_main = year / "ImageSets" / "Main" / f"{split}.txt"
    if "/" not in split and is_file(in_main):  # the list of one class, such as cat_val
        return in_main
    raise InputError(f"{year}: no split {split!r}; available are {listing(known)}, or give a text file of image ids")


def _annotation(year: Path, name: str) -> Path:
    path = inside(year, f"Annotations/{name}.xml")
    if not is_file(path):
        raise InputError(f"{path}: no such annotation; add it or take {name} out of the split")
    return path


def _is_photograph(year: Path, name: str) -> bool:
    with suppress(InputError):
        return bool(_image(year, name))
    return False


def _image(year: Path, name: str) -> Path:
    for suffix in SUFFIXES:
        for spelled in (suffix, suffix.upper()):
            path = year / "JPEGImages" / f"{name}{spelled}"
            if is_file(path):
                return inside(year, f"JPEGImages/{name}{spelled}")
    raise InputError(f"{year / 'JPEGImages' / name}.jpg: no such image; add it or take {name} out of the split")


def _name(one: object, path: Path) -> str:
    name = nfc(" ".join((one.findtext("name") or "").split()))  # type: ignore[attr-defined]
    if not name:
        raise InputError(f"{path}: an object without a name; name it or remove it")
    return name


def _all_names(year: Path) -> set[str]:
    """Every class name that an annotation of the year uses; unreadable annotations are skipped."""
    names: set[str] = set()
    for path in (year / "Annotations").glob("*.xml"):
        with suppress(InputError):
            names.update(object_names(path))
    return names


def _map(year: Path, folder: str, name: str, size: tuple[int, int]) -> np.ndarray | None:
    """(H, W) uint8 indices of a map of the image, or None where there is none."""
    path = inside(year, f"{folder}/{name}.png")
    if not is_file(path):
        return None
    indices = read_index_map(path)
    if indices.shape != size:
        shape = f"{indices.shape[1]} x {indices.shape[0]}"
        raise InputError(f"{path}: {shape} pixels, but its image has {size[1]} x {size[0]}; replace the map")
    return indices


def _check_instance_map(indices: np.ndarray, objects: Sequence[Shape], name: str) -> None:
    """Refuses a map whose indices cannot be the numbers of the XML's objects: unknown, or outside their boxes."""
    counts = np.bincount(indices.ravel(), minlength=256)
    counts[[0, IGNORE]] = 0
    last = int(counts.nonzero()[0].max(initial=0))
    if last > len(objects):
        raise InputError(f"{name}: holds object {last}, but the XML names {len(objects)} objects; mend one of them")
    for number, one in enumerate(objects, 1):
        if not np.isfinite(one.box).all():
            continue
        x1, y1, x2, y2 = (max(0, round(corner)) for corner in one.box)
        within = int((indices[y1:y2, x1:x2] == number).sum())
        if 2 * within < counts[number]:
            raise InputError(
                f"{name}: object {number} lies outside its box in the XML; number the objects as the XML does"
            )


def _check_class_map(
    classes: np.ndarray, indices: np.ndarray, objects: Sequence[Shape], order: Sequence[str], name: str
) -> None:
    """Refuses a class map that calls an object's pixels another class than the XML does."""
    index = {one: number for number, one in enumerate(order, 1)}
    for number, one in enumerate(objects, 1):
        values = classes[(indices == number) & (classes != IGNORE)]
        if len(values) and 2 * int((values == index.get(one.name, -1)).sum()) < len(values):
            raise InputError(
                f"{name}: the pixels of object {number} are not {one.name!r} by the class order {listing(order, 5)}; "
                "put a classes.txt with the map's class names, in order, beside ImageSets"
            )


def _chosen_classes(class_map: np.ndarray, order: Sequence[str], classes: Sequence[str]) -> np.ndarray | None:
    """(H, W) uint8: the map with the chosen classes as 1..C, others as background, 255 kept; None for C > 254."""
    if len(classes) >= IGNORE:
        return None
    table = np.zeros(256, np.uint8)
    table[IGNORE] = IGNORE
    label = {name: index for index, name in enumerate(classes)}
    for number, name in enumerate(order, 1):
        table[number] = label[name] + 1 if name in label else 0
    return table[class_map]


@exporter("voc", extend=True)
def export_voc(job: Export) -> None:
    """Writes the folders of a VOC year: Annotations, SegmentationClass, SegmentationObject and ImageSets.

    They lie in ``out/VOCdevkit/VOC2012``, where torchvision and the development kit look, or in ``out`` itself where
    that is called ``VOC`` and a year. With masks also ``classes.txt`` and, for CVAT, ``labelmap.txt``: the classes in
    the order of the class maps' values. A folder that holds the same classes already gets the split beside those that
    it has.

    The photographs belong into ``JPEGImages`` under the names of the XML files, as JPEG. What VOC cannot hold: scores;
    parts of boxes beyond whole pixels (corners are rounded); overlaps of masks (where two overlap, the higher score is
    on top); more than 254 masks in an image (the highest scores stay). Arguments and errors as `export`; masks of more
    than 254 classes are an `InputError`, too.
    """
    listed: dict[str, list[str]] = {"Main": [], "Segmentation": []}
    rounded, covered, classes = 0, 0, job.classes
    plain = [" ".join(name.split()) for name in classes]
    if twice := [name for name in plain if plain.count(name) > 1]:
        raise InputError(f"VOC tells no classes apart that differ in blanks alone, such as {twice[0]!r}; rename one")
    year = job.folder if re.fullmatch(r"VOC\d{4}", job.out.name) else job.folder / "VOCdevkit" / "VOC2012"
    lists = [year / "ImageSets" / name / f"{safe_name(job.split)}.txt" for name in listed]
    job.check_new_split(lists)
    names = stems(job.images, (path.stem for path in (year / "Annotations").glob("*.xml")))
    home = job.out.name if year == job.folder else year.name
    masked = any(one.masks is not None and len(one) for one in job.predictions.values())
    for image, found in job.selected(doubt=False):
        name = names[image.id]
        if masked and not len(found):  # its maps say that it shows nothing
            found = Instances.empty(found.image_size, with_masks=True)
        if found.masks is not None and len(found) > 254:
            job.notes.append(f"{image.id}: {len(found)} masks, of which the 254 of highest score are kept")
            found = found[torch.sort(found.weights.argsort(descending=True, stable=True)[:254]).values]
        rounded += int((found.boxes != found.boxes.round()).any(1).sum())
        file = f"{name}{image.path.suffix}"
        if job.copy_images:
            file = job.copy(image, year / "JPEGImages" / name, jpeg=True).name
        job.write(year / "Annotations" / f"{name}.xml", _annotation_xml(home, file, found, classes))
        if found.masks is not None:
            if len(classes) > 254:
                raise InputError(
                    f"{len(classes)} classes do not fit an 8-bit PNG, which holds 254; export fewer, or to coco"
                )
            objects = paint(found, range(1, len(found) + 1))
            covered += len(found) - len(np.unique(objects[objects > 0]))
            for kind, pixels in (("SegmentationClass", paint(found)), ("SegmentationObject", objects)):
                job.write(year / kind / f"{name}.png", palette_png(pixels))
            listed["Segmentation"].append(name)
        listed["Main"].append(name)
    for path, lines in zip(lists, listed.values(), strict=True):
        if lines:
            job.write(path, "".join(f"{line}\n" for line in lines))
    if listed["Segmentation"]:
        job.write(year / "classes.txt", "".join(f"{name}\n" for name in plain))
        job.write(year / "labelmap.txt", _label_map(plain))
    if not job.copy_images:
        job.notes.append(
            "put the photographs into JPEGImages under the names of the XML files, as JPEG, or export with copies"
        )
    if colons := [name for name in classes if ":" in name]:
        job.notes.append(
            f"labelmap.txt cannot hold the colon of {listing(colons)}: CVAT and datumaro know no such class"
        )
    job.notes += ["VOC holds no scores", *counted((rounded, "boxes are rounded to whole pixels"))]
    if listed["Segmentation"]:
        job.notes.append(f"masks that overlap are cut by the one of higher score; {covered} are covered entirely")


def voc_boxes(instances: Instances) -> np.ndarray:
    """(N, 4) int64 ``xmin, ymin, xmax, ymax`` as VOC counts: from 1, inclusive, inside the image, at least a pixel."""
    height, width = instances.image_size
    boxes = clipped_boxes(instances).round().long().numpy()
    low = np.minimum(boxes[:, :2] + 1, [width, height])
    return np.concatenate([low, np.maximum(boxes[:, 2:], low)], 1)


def _annotation_xml(folder: str, filename: str, instances: Instances, classes: Sequence[str]) -> bytes:
    """One image's annotation; the k-th object is the one with value k in the SegmentationObject PNG."""
    height, width = instances.image_size
    objects = [
        [
            ("name", classes[label]),
            *(("pose", "Unspecified"), ("truncated", 0), ("difficult", 0)),
            ("bndbox", list(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))),
        ]
        for label, box in zip(instances.labels.tolist(), voc_boxes(instances).tolist(), strict=True)
    ]
    content = [
        *(("folder", folder), ("filename", filename)),
        # the development kit's reader asks for it
        ("source", [("database", "Label-PEnet"), ("annotation", "Label-PEnet"), ("image", "unknown")]),
        ("size", [("width", width), ("height", height), ("depth", 3)]),
        ("segmented", int(instances.masks is not None)),
        *(("object", one) for one in objects),
    ]
    root = _element("annotation", content)
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def _element(tag: str, content: object) -> ElementTree.Element:
    element = ElementTree.Element(tag)
    if isinstance(content, list):
        element.extend(_element(*one) for one in content)
    else:  # XML has no way to write control characters
        element.text = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", str(content))
    return element


def _label_map(classes: Sequence[str]) -> str:
    """CVAT's list of classes and their colours; a colon, which separates its fields, becomes a space."""
    colours = zip(["background", *classes], voc_palette().tolist(), strict=False)
    lines = (f"{name.replace(':', ' ')}:{','.join(map(str, colour))}::\n" for name, colour in colours)
    return "".join(["# label:color_rgb:parts:actions\n", *lines])
