"""Label Studio tasks with predictions, ready to be corrected by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np

from labelpenet.data.dataset import TaggedImage
from labelpenet.export.files import Exported, write_text
from labelpenet.export.polygons import joined, rings
from labelpenet.export.predictions import file_name
from labelpenet.export.selection import clipped_boxes, mask_arrays, selected
from labelpenet.instances import Instances

LOCAL_FILES = "/data/local-files/?d="


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
            results.append(_result(f"instance{index + 1}", classes[label], score, outline, box, found.image_size))
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


def _result(
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
