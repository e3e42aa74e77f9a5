"""Label Studio's exports, ``JSON``, ``JSON-MIN`` and ``CSV``: choices, taxonomy entries and labels of shapes are tags.

Rectangles, polygons, ellipses and brushes are the truth. Tasks that nobody has annotated are left out (nothing is known
of them); an annotation without any result makes a negative. Where several people annotated one task, their tags are put
together, and the truth is what is marked as ground truth, else the last annotation.
"""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np

from labelpenet.data.dataset import Classes, Opened, TaggedImage, Truth, with_truth
from labelpenet.data.files import brief, counted, excerpt, listing, read_json, read_text
from labelpenet.data.images import SUFFIXES
from labelpenet.errors import InputError, told
from labelpenet.formats.folder import exists, tag_names, tag_set
from labelpenet.formats.polygons import joined, outline
from labelpenet.formats.rows import Row, file_names
from labelpenet.formats.selection import Export, exporter, objects
from labelpenet.formats.shapes import Shape, checked_size, read_truth

# Label Studio puts eight hexadecimal digits and a dash before the name of an uploaded file.
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")
# Columns of JSON-MIN that are about the work, not the answer.
_ABOUT = {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time"}
_TAG_COLUMNS = {"choice", "choices", "label", "labels", "tag", "tags", "class", "category"}


def is_label_studio(content: Any) -> bool:
    """Whether parsed JSON is laid out as a Label Studio export: a list of tasks, each with the address of an image."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(task, dict) for task in content)
        and any(_addresses(task) for task in content)
    )


def is_csv(text: str) -> bool:
    """Whether a CSV file has the columns that Label Studio writes."""
    return {"annotation_id", "lead_time"} <= {name.strip('"\r') for name in re.split("[,\t]", text.split("\n", 1)[0])}


def open_data(path: Path, split: str | None = None, classes: Classes = None, images: Path | None = None) -> Opened:
    """The images of an export (JSON or CSV) with the shapes that were drawn on them; tags alone where there is no
    shape.

    Args:
        path, classes: as `open.open_tagged` takes them; errors, too.
        split: a name for which ``SPLIT.txt`` lies beside the images, or a text file of file names.
        images: the folder with the images; None: ``images`` beside the file, or the file's own folder.
    """
    home, tags, found, notes = _read(path, images)
    tagged = tag_names(tags, home, path, split, classes, notes)
    if not any(_drawn(result) for results in found.values() for result in results):
        return tagged

    def truth(image: TaggedImage) -> Truth:
        results = [result for result in found[image.id] if _drawn(result)]
        source = f"{path}: image {image.id}"
        size = checked_size(image.path, (None, None), source)
        for result in results:
            checked_size(image.path, (result.get("original_height"), result.get("original_width")), source)
            if result.get("image_rotation"):
                raise InputError(
                    f"{source}: its shapes were drawn on the turned photograph; turn it back in Label Studio"
                )
        shapes = [shape for index, result in enumerate(results, 1) for shape in _shapes(result, size, f"shape {index}")]
        return read_truth(shapes, size, tagged.classes, source)

    return with_truth(tagged, path, truth)


def _read(path: Path, images: Path | None) -> tuple[Path, dict[str, frozenset[str]], dict[str, list[Row]], list[str]]:
    """The folder of the images, by image name its tags and the results that are its truth, and notes."""
    content = _csv_rows(path) if path.suffix.lower() != ".json" else read_json(path)
    if not is_label_studio(content):
        raise InputError(f"{path}: no Label Studio export; export the project as JSON, JSON-MIN or CSV")
    home = images or (path.parent / "images" if (path.parent / "images").is_dir() else path.parent)
    tagged, found, called = dict[str, frozenset[str]](), dict[str, list[Row]](), dict[str, str]()
    problems, waiting, silent, several = [], 0, 0, 0
    column = _text_column(content, path)
    entries: dict[str, str] = {}
    for task in content:
        where = f"{path}: task {excerpt(task.get('id'), 40)}"
        addresses = _addresses(task)
        alike = len({_names(value)[-1] for value in addresses.values()}) < 2
        # of several the one that is called image, for only the labelling interface, which no export holds, tells them
        address = next(iter(addresses.values()), None) if alike else addresses.get("image")
        if address is None:
            several_images = f"has several images ({listing(sorted(addresses))}); export tasks of one image each"
            problems.append(f"{where} {several_images if addresses else 'names no image'}")
            continue
        annotations = _annotations(task, column)
        if not annotations:
            waiting += 1
            continue
        tags = tag_set(word for results in annotations for result in results for word in _words(result, entries, where))
        if not tags and any(annotations):
            silent += 1
            continue
        name = next((name for name in _names(address) if exists(home, name)), None)
        if name is None or called.setdefault(name, address) != address:
            reason = f"may be {name}, as may be {called[name][:80]}" if name else f"is not in {home}"
            problems.append(f"{where}: its image ({address[:80]}) {reason}")
            continue
        several += len(annotations) > 1 or name in tagged
        tagged[name] = tagged.get(name, frozenset()) | tags
        found[name] = annotations[-1]
    if not tagged:
        raise InputError(problems[0] if problems else f"{path}: no task has an annotation; annotate and export again")
    notes = brief(problems, "tasks are skipped") + counted(
        (waiting, "tasks have no annotation yet; they are not used"),
        (silent, "tasks have neither choices nor shapes with labels; they are not used"),
        (several, "tasks have several annotations: their tags are put together, and the shapes of one are the truth"),
    )
    return home, tagged, found, notes


def _csv_rows(path: Path) -> list[Row]:
    """The rows of a CSV export as those of JSON-MIN: cells that hold JSON are read, empty ones are left out."""
    text = read_text(path)
    delimiter = "\t" if "\t" in text.split("\n", 1)[0] else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = []
    kinds = (csv.Error, ValueError, RecursionError)
    with told(lambda error: f"{path}: line {reader.line_num}: {error}; export the project again", *kinds):
        for row in reader:
            cells = {key: cell for key, cell in row.items() if isinstance(key, str) and isinstance(cell, str) and cell}
            rows.append({key: json.loads(cell) if cell[0] in "[{" else cell for key, cell in cells.items()})
    return rows


def _annotations(task: dict[str, Any], column: str | None) -> list[list[Row]]:
    """The results of each annotation of a task, that of the truth last; none where nobody has annotated it."""
    if "annotations" in task or "data" in task:
        rows = task.get("annotations")
        done = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        done = sorted(
            (row for row in done if not row.get("was_cancelled")), key=lambda row: bool(row.get("ground_truth"))
        )
        return [[one for one in row.get("result") or [] if isinstance(one, dict)] for row in done
                if isinstance(row.get("result") or [], list)]  # fmt: skip
    values: list[Any] = []
    for key, value in task.items():  # JSON-MIN: a column for each control
        if key in _ABOUT:
            continue
        if isinstance(value, str):
            values += [{"choices": [value]}] if key == column else []
        elif isinstance(value, dict):
            values.append(value)
        elif isinstance(value, list):
            if value and all(isinstance(one, list) for one in value):
                values.append({"taxonomy": value})
            values += [one for one in value if isinstance(one, dict)]
            values.append({"choices": [one for one in value if isinstance(one, str)]})
    return [[{**value, "value": value} for value in values if any(value.values())]]


def _text_column(content: Sequence[dict[str, Any]], path: Path) -> str | None:
    """Where JSON-MIN has a single choice, among other texts of the project; `InputError` where it may be in several."""
    texts = {
        key
        for task in content
        if "annotations" not in task and "data" not in task
        for key, value in task.items()
        if isinstance(value, str) and key not in _ABOUT | set(_addresses(task)) and "://" not in value
    }
    # columns with shapes, taxonomy entries or several choices
    cells = [(key, value) for task in content for key, value in task.items()]
    lists = {key for key, value in cells if isinstance(value, list) and value}
    answers = lists | {key for key, value in cells if isinstance(value, dict) and "choices" in value}
    # where there are other answers, a text is one only by its name, or where other tasks have several choices there
    chosen = texts & (_TAG_COLUMNS | answers) if len(texts) > 1 or answers else texts
    if len(chosen) > 1 or (len(texts) > 1 and not chosen and not answers):
        raise InputError(f"{path}: {listing(sorted(texts))} could each be the tag; export the project as JSON")
    return next(iter(chosen), None)


def _words(result: Mapping[str, Any], entries: dict[str, str], where: str) -> list[str]:
    """The choices, taxonomy entries (the last level; ``entries`` remembers where it stands) and labels of a result."""
    value = result.get("value")
    if not isinstance(value, dict):
        return []
    words = _labels(value) + [one for one in _list(value, "choices") if isinstance(one, str)]
    for entry in _list(value, "taxonomy"):
        levels = [level for level in entry if isinstance(level, str)] if isinstance(entry, list) else []
        if levels:
            whole = " / ".join(levels)
            if entries.setdefault(levels[-1], whole) != whole:
                raise InputError(f"{where}: {whole} and {entries[levels[-1]]} end alike; rename one in the taxonomy")
            words.append(levels[-1])
    return words


def _labels(value: Mapping[str, Any]) -> list[str]:
    """The names in ``rectanglelabels``, ``polygonlabels``, ``brushlabels``, ``labels`` ..."""
    keys = [key for key in value if isinstance(key, str) and key.endswith("labels")]
    return list(tag_set(one for key in keys for one in _list(value, key) if isinstance(one, str)))


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    return found if isinstance(found, list) else []


def _drawn(result: Mapping[str, Any]) -> bool:
    """Whether a result is a shape with a label."""
    value = result.get("value")
    return isinstance(value, dict) and bool(_labels(value)) and any(key in value for key in ("points", "rle", "x"))


def _shapes(result: Mapping[str, Any], size: tuple[int, int], where: str) -> list[Shape]:
    """A shape for each label of a result."""
    value: dict[str, Any] = result["value"]
    scale = np.array([size[1], size[0]]) / 100
    box: Any = None
    mask: Any = None
    try:
        if "rle" in value:
            mask = _brush(value["rle"], size)
        elif "points" in value:
            mask = [(np.array(value["points"], np.float64).reshape(-1, 2) * scale).flatten().tolist()]
        else:
            angle = math.radians(float(value.get("rotation") or 0))
            turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
            ellipse = "radiusX" in value
            sides = [value["radiusX"], value["radiusY"]] if ellipse else [value["width"], value["height"]]
            around = np.linspace(0, 2 * np.pi, 73)[:-1]
            ring = (
                np.stack([np.cos(around), np.sin(around)], 1) if ellipse else np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
            )
            corners = np.array([value["x"], value["y"]], np.float64) * scale
            corners = corners + ring * (np.array(sides, np.float64) * scale) @ turn
            box = [*corners.min(0), *corners.max(0)]
            mask = [corners.flatten().tolist()] if ellipse else None
    except (TypeError, ValueError, OverflowError, KeyError):
        box = value  # which reading calls unreadable
    return [Shape(name, where, box, mask) for name in _labels(value)]


def _brush(numbers: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a brush: the opacity of RGBA pixels, packed as runs.

    After 32 bits for the number of bytes follow the width of a byte and of four kinds of counts, less 1; then for each
    run whether it repeats one byte, the kind of its count, its count less 1, and the byte or bytes. `ValueError`: the
    runs are damaged or of another size.
    """
    bits = "".join(f"{value:08b}" for value in bytes(numbers))
    place = 0

    def read(width: int) -> int:
        nonlocal place
        place += width
        return int(bits[place - width : place], 2)

    total, width = read(32), read(5) + 1
    kinds = [read(4) + 1 for _ in range(4)]
    if total != size[0] * size[1] * 4 or width > 8:
        raise ValueError("of another size")
    parts: list[np.ndarray] = []
    done = 0
    while done < total:
        repeats = read(1)
        count = read(kinds[read(2)]) + 1
        if place + width > len(bits) or done + count > total:
            raise ValueError("damaged")
        values = [read(width)] if repeats else [read(width) for _ in range(count)]
        parts.append(np.full(count, values[0], np.uint8) if repeats else np.array(values, np.uint8))
        done += count
    return np.concatenate(parts).reshape(*size, 4)[..., 3] > 0


def _addresses(task: dict[str, Any]) -> dict[str, str]:
    """By name the texts among a task's data that end like image files."""
    data = task.get("data") if isinstance(task.get("data"), dict) else task
    assert isinstance(data, dict)
    texts = ((key, value) for key, value in data.items() if isinstance(value, str))
    return {key: value for key, value in texts if any(name.lower().endswith(SUFFIXES) for name in _names(value))}


def _names(address: str) -> list[str]:
    """The relative file names that an address may mean, the longest first.

    ``/data/upload/3/1a2b3c4d-cat.jpg`` may lie here as it is called there, or as ``cat.jpg``, as it was uploaded;
    ``/data/local-files/?d=pets/cat.jpg`` as ``pets/cat.jpg`` or ``cat.jpg``.
    """
    try:
        parts = urlsplit(address)
        local = parse_qs(parts.query).get("d")
    except ValueError:
        return []
    path = PurePosixPath((local[0] if local else unquote(parts.path)).replace("\\", "/"))  # a query is unquoted already
    pieces = [piece for piece in path.parts if piece not in ("/", "//", "..", ".")][-8:]
    names = ["/".join(pieces[start:]) for start in range(len(pieces))]
    plain = _UPLOAD.sub("", pieces[-1]) if pieces else ""
    return [*names, plain] if plain and plain not in names else names


@exporter("label-studio")
def export_label_studio(job: Export) -> None:
    """Writes ``out/tasks.json`` (import it) and ``out/labels.xml`` (the project's labelling interface).

    An instance with a mask becomes a polygon, one without or of score 0 a rectangle; each has its score. What a polygon
    cannot hold: several outlines (parts and holes are joined by bridges of no width).

    Arguments and errors as `export`, and ``url``: what comes before an image's name (percent-encoded) in its task; by
    default Label Studio's local storage.
    """
    tasks: list[Row] = []
    bridged, names = 0, file_names(job.images)
    for image, found in job.selected():
        results: list[Row] = []
        for label, score, box, mask in objects(found):
            parts = None if mask is None else outline(mask, tolerance=job.tolerance)
            bridged += parts is not None and len(parts) > 1
            name = f"instance{len(results) + 1}"
            results.append(_shape(name, job.classes[label], score, parts, box, found.image_size))
        prediction: dict[str, Any] = {"model_version": "Label-PEnet", "result": results}
        if len(found):
            prediction["score"] = float(found.weights.mean())
        tasks.append({"data": {"image": job.url + quote(names[image.id])}, "predictions": [prediction]})
    job.write("tasks.json", json.dumps(tasks))
    job.write("labels.xml", _labelling_interface(job.classes))
    job.notes.append(f"photographs are addressed as {job.url}NAME; change the addresses if they are stored elsewhere")
    job.notes += counted((bridged, "masks of several parts or with holes became one outline with bridges"))


def _labelling_interface(classes: Sequence[str]) -> str:
    """The labelling interface that the tasks belong to, as Label Studio's XML."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    for tag, name in (("PolygonLabels", "polygon"), ("RectangleLabels", "rectangle")):
        labels = ElementTree.SubElement(view, tag, name=name, toName="image")
        for label in classes:
            ElementTree.SubElement(labels, "Label", value=label)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _shape(
    name: str, label: str, score: float, parts: list[np.ndarray] | None, box: np.ndarray, size: tuple[int, int]
) -> dict[str, Any]:
    percent = 100 / np.array([size[1], size[0]], dtype=np.float64)
    if parts is not None:
        kind = "polygon"
        value: dict[str, Any] = {"points": (joined(parts) * percent).tolist(), "closed": True}
    else:
        kind = "rectangle"
        (x, y), (width, height) = (box[:2] * percent).tolist(), ((box[2:] - box[:2]) * percent).tolist()
        value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}
    return {
        "id": name,
        "type": f"{kind}labels",
        "from_name": kind,
        "to_name": "image",
        "original_width": size[1],
        "original_height": size[0],
        "image_rotation": 0,
        "value": {**value, f"{kind}labels": [label]},
        "score": score,
    }
