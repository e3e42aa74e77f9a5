"""Label Studio's export of a choices project, ``JSON`` or ``JSON-MIN``: every choice of a task is a tag of its image.

Tasks that nobody has annotated are left out (nothing is known of them); an annotation without a choice makes a
negative. Where several people annotated one task, their tags are put together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np

from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.files import brief, inside, is_file, read_json, write_text
from labelpenet.data.images import SUFFIXES
from labelpenet.errors import InputError
from labelpenet.formats.folder import tag_names, tag_set
from labelpenet.formats.polygons import joined, rings
from labelpenet.formats.predictions import file_name
from labelpenet.formats.selection import Exported, clipped_boxes, mask_arrays, selected
from labelpenet.instances import Instances

LOCAL_FILES = "/data/local-files/?d="

# Label Studio puts eight hexadecimal digits and a dash before the name of an uploaded file.
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")
# Columns of JSON-MIN that are about the work, not the answer.
_ABOUT = {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time"}


def is_label_studio(content: Any) -> bool:
    """Whether parsed JSON is laid out as a Label Studio export: a list of tasks, each with the address of an image."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(task, dict) for task in content)
        and any(_address(task) is not None for task in content)
    )


def open_tagged(
    path: Path, split: str | None = None, classes: Sequence[str] | None = None, images: Path | None = None
) -> TaggedImages:
    """The tagged images of an export.

    Args:
        path: the exported JSON file.
        split: a name for which ``SPLIT.txt`` lies beside the images, or a text file of file names.
        classes: names of the classes, in label order; None: all choices that occur, in alphabetical order.
        images: the folder with the images; None: ``images`` beside the file, or the file's own folder.

    Raises:
        InputError: the file is no such export, a class is unknown, or no image can be used.
    """
    content = read_json(path)
    if not is_label_studio(content):
        raise InputError(f"{path}: no Label Studio export; export the project as JSON or JSON-MIN")
    home = images or (path.parent / "images" if (path.parent / "images").is_dir() else path.parent)
    tags: dict[str, frozenset[str]] = {}
    problems, waiting = [], 0
    for task in content:
        address = _address(task)
        if address is None:
            problems.append(f"{path}: task {str(task.get('id'))[:40]} names no image")
            continue
        choices = _choices(task)
        if choices is None:
            waiting += 1
            continue
        name = next((name for name in _names(address) if _exists(home, name)), None)
        if name is None:
            problems.append(f"{path}: the image of task {str(task.get('id'))[:40]} ({address[:80]}) is not in {home}")
            continue
        tags[name] = tags.get(name, frozenset()) | choices
    if not tags:
        reason = problems[0] if problems else f"{path}: no task has an annotation; annotate some and export again"
        raise InputError(reason)
    notes = brief(problems, "tasks are skipped")
    if waiting:
        notes.append(f"{waiting} tasks have no annotation yet; they are not used")
    return tag_names(tags, home, path, split, classes, notes)


def _address(task: dict[str, Any]) -> str | None:
    """The address of a task's image: the first text among its data that ends like an image file."""
    data = task.get("data") if isinstance(task.get("data"), dict) else task
    assert isinstance(data, dict)
    for value in data.values():
        if isinstance(value, str) and any(name.lower().endswith(SUFFIXES) for name in _names(value)):
            return value
    return None


def _choices(task: dict[str, Any]) -> frozenset[str] | None:
    """The choices of a task, or None where nobody has annotated it."""
    if "annotations" in task or "data" in task:
        rows = task.get("annotations")
        rows = rows if isinstance(rows, list) else []
        done = [row for row in rows if isinstance(row, dict) and not row.get("was_cancelled")]
        if not done:
            return None
        return frozenset().union(*(tag_set(_results(row.get("result"))) for row in done))
    found: list[Any] = []
    for key, value in task.items():  # JSON-MIN: a column for each control, "a" or {"choices": ["a", "b"]}
        if key in _ABOUT or value == _address(task):
            continue
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict) and isinstance(value.get("choices"), list):
            found += [choice for choice in value["choices"] if isinstance(choice, str)]
    return tag_set(found)


def _results(results: Any) -> Iterator[str]:
    for result in results if isinstance(results, list) else []:
        value = result.get("value") if isinstance(result, dict) and result.get("type") == "choices" else None
        choices = value.get("choices") if isinstance(value, dict) else None
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, str):
                yield choice


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
    path = PurePosixPath(unquote(local[0] if local else parts.path).replace("\\", "/"))
    pieces = [piece for piece in path.parts if piece not in ("/", "//", "..", ".")][-8:]
    names = ["/".join(pieces[start:]) for start in range(len(pieces))]
    plain = _UPLOAD.sub("", pieces[-1]) if pieces else ""
    return [*names, plain] if plain and plain not in names else names


def _exists(home: Path, name: str) -> bool:
    try:
        return is_file(inside(home, name))
    except InputError:
        return False


def export_label_studio(
    predictions: Mapping[str, Instances],
    images: Sequence[TaggedImage],
    classes: Sequence[str],
    out: Path | str,
    *,
    url: str = LOCAL_FILES,
    min_score: float = 0.0,
) -> Exported:
    """Writes ``out/tasks.json`` (import it) and ``out/labels.xml`` (the project's labelling interface).

    An instance with a mask becomes a polygon, one without a rectangle; each has its score. What a polygon cannot hold:
    several outlines (parts and holes are joined by bridges of no width).

    Args:
        predictions: by image id.
        images: the photographs; those without a prediction are left out.
        classes: names of the C classes, in label order.
        out: the folder.
        url: what comes before an image's name (percent-encoded) in its task; by default Label Studio's local storage.
        min_score: instances below are left out.

    Raises:
        InputError: a file cannot be written.
    """
    done, out = Exported(), Path(out)
    tasks: list[dict[str, Any]] = []
    bridged = 0
    for image, found in selected(predictions, images, min_score, done.notes):
        results = []
        for index, (label, score, box, mask) in enumerate(
            zip(
                found.labels.tolist(),
                found.weights.tolist(),
                clipped_boxes(found).numpy(),
                mask_arrays(found),
                strict=True,
            )
        ):
            outline = None if mask is None else rings(mask)
            bridged += outline is not None and len(outline) > 1
            results.append(_shape(f"instance{index + 1}", classes[label], score, outline, box, found.image_size))
        prediction: dict[str, Any] = {"model_version": "Label-PEnet", "result": results}
        if len(found):
            prediction["score"] = float(found.weights.mean())
        tasks.append({"data": {"image": url + quote(file_name(image))}, "predictions": [prediction]})
    done.paths.append(write_text(out / "tasks.json", json.dumps(tasks)))
    done.paths.append(write_text(out / "labels.xml", labelling_interface(classes)))
    done.notes.append(f"photographs are addressed as {url}NAME; change the addresses if they are stored elsewhere")
    if bridged:
        done.notes.append(f"{bridged} masks of several parts or with holes became one outline with bridges")
    return done


def labelling_interface(classes: Sequence[str]) -> str:
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
    name: str, label: str, score: float, outline: list[np.ndarray] | None, box: np.ndarray, size: tuple[int, int]
) -> dict[str, Any]:
    percent = 100 / np.array([size[1], size[0]], dtype=np.float64)
    if outline is not None:
        kind = "polygon"
        value: dict[str, Any] = {"points": (joined(outline) * percent).tolist(), "closed": True}
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
