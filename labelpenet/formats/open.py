"""Opens every kind of data set: DATA is recognised by what it holds."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from labelpenet.data.dataset import AnnotatedImages, Opened, TaggedImage, TaggedImages, only_tagged
from labelpenet.data.files import listing, nfc, read_json, read_text
from labelpenet.data.images import find_images, linked, unread
from labelpenet.errors import InputError, told
from labelpenet.formats import coco, folder, label_studio, labelme, voc, yolo

KINDS = (
    "a VOC year folder (Annotations, JPEGImages, ImageSets) or VOC's XML beside each photograph, COCO JSON, YOLO "
    "(data.yaml, obj.data, or classes.txt beside labels), tags.csv (file,tags), tags.json, metadata.jsonl, one "
    "sub-folder of images per class, Labelme or X-AnyLabeling files, or a Label Studio export; docs/data.md shows each"
)
_TAGS = ("tags.csv", "tags.json", "metadata.csv", "metadata.jsonl")


class NotRecognised(InputError):
    """A folder or file that exists, but is no data set."""


def open_tagged(
    data: Path | str, split: str | None = None, classes: Sequence[str] | None = None, images: Path | str | None = None
) -> TaggedImages:
    """The photographs and tags of a data set: all that a weakly supervised run may know.

    Args:
        data: a folder or a file; docs/data.md shows every layout.
        split: a name (``train``, ``val``, ``Segmentation/val``) or a text file of image ids. None: everything but VOC's
            ``test``. A data set without any splits is used whole, and the notes say so.
        classes: names of the classes, in label order; None: those that occur, in alphabetical order.
        images: the image folder of a COCO, YOLO, Label Studio or tags file that lies elsewhere.

    Raises:
        InputError: the data set is not recognised or damaged, the split or a class is unknown (the known ones are
            listed), or no image can be used; ``images`` for a data set that is itself the folder of its photographs.
    """
    return only_tagged(open_data(data, split, classes, images))


def open_annotated(
    data: Path | str, split: str | None = None, classes: Sequence[str] | None = None, images: Path | str | None = None
) -> AnnotatedImages:
    """The same images with their truth, for measuring. Arguments as `open_tagged`.

    Raises:
        InputError: as there; also for a data set that holds tags only.
    """
    found = open_data(data, split, classes, images)
    if isinstance(found, TaggedImages):
        raise InputError(
            f"{data}: holds tags but no boxes or masks; those need a VOC, COCO, YOLO, Labelme or Label Studio data set"
        )
    return found


def open_data(
    data: Path | str, split: str | None = None, classes: Sequence[str] | None = None, images: Path | str | None = None
) -> AnnotatedImages | TaggedImages:
    """The same images with their truth where the data set holds any. Arguments and errors as `open_tagged`."""
    if images is not None and not Path(images).is_dir():
        raise InputError(f"{images}: no such image folder; check the path")
    classes = None if classes is None else [nfc(name) for name in classes]
    with _readable(data):
        found = _recognise(Path(data), split, classes, None if images is None else Path(images))
        return _noted(found, *unread(Path(data if images is None else images)))


def open_photographs(
    data: Path, classes: Sequence[str], split: str | None = None, images: Path | None = None
) -> TaggedImages:
    """A photograph, or all in a folder and below, without tags, as `labelpenet predict` takes them. `InputError`: as
    `find_images`; an unknown ``split``; ``images``, as the folder is that of its photographs.
    """
    _check_own(data, images)
    if split is not None and (data / split).is_dir():
        data, split = data / split, None
    files = dict(find_images([data]))
    names, notes = folder.restrict(files, data, data, split)
    found = tuple(TaggedImage(name, files[name], ()) for name in names)
    notes = [f"{data}: no tags are known of its {len(found)} photographs", *unread(data), *linked(data), *notes]
    return TaggedImages(tuple(classes), found, tuple(notes))


def training_split(data: Path | str) -> str | None:
    """``train`` for a VOC data set that has such a list, so that nothing is trained on what is held out; else None."""
    with _readable(data):
        year = voc.year_folder(Path(data))
        return "train" if year is not None and "train" in voc.splits(year) else None


def _readable(data: Path | str) -> AbstractContextManager[None]:
    """Says of a folder that may not be read, or a disk that fails, what the user can do."""
    return told(
        lambda error: f"{error.filename or data}: cannot be read ({error.strerror}); check its permissions", OSError
    )


def _recognise(data: Path, split: str | None, classes: Sequence[str] | None, images: Path | None) -> Opened:
    if data.is_file():
        return _recognise_file(data, split, classes, images)
    if not data.is_dir():
        raise InputError(f"{data}: no such file or folder; give {KINDS}")
    year = voc.year_folder(data)
    if year is not None:
        _check_own(data, images)
        return voc.open_annotated(year, split, classes)
    files = coco.json_files(data)
    settings = yolo.settings_file(data)
    tags_files = [data / name for name in _TAGS if (data / name).is_file()]
    kinds = [[coco.choose_file(files, split, data)] if files else [], [settings] if settings else [], tags_files]
    described = [path for kind in kinds for path in kind]
    if len(described) > 1:
        raise InputError(
            f"{data}: holds {listing(path.relative_to(data).as_posix() for path in described)}; give the file that "
            "holds the annotation"
        )
    if described:
        if described[0].parent == data and folder.class_folders(data):
            _check_not_predicted(described[0])
        found = _recognise_file(described[0], split, classes, images)
        for kind in (voc, labelme) if tags_files else ():  # somebody may be correcting there, so it is not refused
            if kind.lies_beside(data):
                name = "XML" if kind is voc else "Labelme's"
                found = _noted(found, f"{tags_files[0].name} is read, {name} files beside the photographs are not")
        return found
    if voc.lies_beside(data):
        _check_own(data, images)
        return voc.open_beside(data, split, classes)
    below = sorted(path.name for path in data.iterdir() if path.is_dir() and path.name.lower() in folder.SPLIT_NAMES)
    if labelme.json_files(data) and not (below and labelme.lies_in(data, below)):
        return labelme.open_data(data, split, classes, images)
    if below:
        same = [name for name in below if split is not None and folder.plain_split(name) == folder.plain_split(split)]
        fitting = [split] if split in below else same
        if len(fitting) != 1:
            wrong = "has sub-folders for splits; name one" if split is None else f"no split {split!r}"
            raise InputError(f"{data}: {wrong}; available are {', '.join(below)}")
        return _recognise(data / str(fitting[0]), None, classes, images)
    lone = [
        path for path in sorted(data.iterdir()) if path.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".yaml")
    ]
    if len(lone) > 1:
        raise InputError(
            f"{data}: holds {listing(path.name for path in lone)}; give the file that holds the annotation"
        )
    held = folder.class_folders(data)
    if lone and lone[0].is_file():
        _check_not_predicted(lone[0])
        found = _recognise_file(lone[0], split, classes, images)
        said = f"{lone[0].name} says what the photographs show; the names of their folders are not taken for classes"
        return _noted(found, said) if held else found
    lone_class = next(iter(held)) if len(held) == 1 and classes is None else ""
    if lone_class and any(name.count("/") == 1 for name in held[lone_class]):
        raise NotRecognised(
            f"{data}: its photographs all lie in one sub-folder, {lone_class}; to train, add a sub-folder for a second "
            f"class or tags.csv (file,tags); elsewhere, if that is their class, give --classes {lone_class}"
        )
    if held:
        _check_own(data, images)
        return _noted(folder.open_class_folders(data, split, classes), *linked(data))
    loose = folder.image_files(data)
    if loose:
        raise NotRecognised(
            f"{data}: no data set recognised: {len(loose)} photographs, but no tags; write tags.csv beside them (first "
            f"line file,tags, then lines such as {loose[0]},cat;dog) or put them into a sub-folder for each class"
        )
    raise NotRecognised("; ".join([f"{data}: no data set recognised", *unread(data), f"looked for {KINDS}"]))


def _recognise_file(path: Path, split: str | None, classes: Sequence[str] | None, images: Path | None) -> Opened:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml") or path.name in ("obj.data", "obj.names", "classes.txt"):
        return yolo.open_annotated(path, split, classes, images)
    content = read_json(path) if suffix == ".json" else None
    if coco.is_coco(content):
        return coco.open_annotated(path, split, classes, images, content)
    if label_studio.is_label_studio(content) or (suffix in (".csv", ".tsv") and label_studio.is_csv(read_text(path))):
        return label_studio.open_data(path, split, classes, images)
    tags = isinstance(content, dict) and bool(content) and all(isinstance(one, list) for one in content.values())
    if suffix in (".csv", ".tsv", ".jsonl") or path.name == "tags.json" or tags:
        return folder.open_tags_file(path, split, classes, images)
    raise NotRecognised(f"{path}: no data set recognised; give {KINDS}")


def _check_not_predicted(path: Path) -> None:
    """What `labelpenet predict` left in a folder of photographs is no annotation of theirs."""
    if path.suffix.lower() == ".json" and coco.is_predicted(read_json(path)):
        raise InputError(
            f"{path}: holds predictions (scores); move it elsewhere, or give the file if it is the annotation"
        )


def _noted(found: Opened, *notes: str) -> Opened:
    if isinstance(found, AnnotatedImages):
        return replace(found, tagged=replace(found.tagged, notes=(*notes, *found.tagged.notes)))
    return replace(found, notes=(*notes, *found.notes))


def _check_own(data: Path, images: Path | None) -> None:
    if images is not None:
        raise InputError(f"{data}: its photographs are its own; leave the image folder {images} out")
