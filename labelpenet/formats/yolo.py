"""YOLO text labels: one polygon (YOLO-seg) or box a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import safe_name, write_text
from labelpenet.errors import InputError
from labelpenet.formats.polygons import joined, outline, straight
from labelpenet.formats.selection import (
    Exported,
    clipped_boxes,
    copy_photograph,
    mask_arrays,
    new_export,
    selected,
    stems,
)
from labelpenet.instances import Instances


def export_yolo(
    predictions: Mapping[str, Instances],
    images: Sequence[TaggedImage],
    classes: Sequence[str],
    out: Path | str,
    *,
    split: str = "train",
    copy_images: bool = False,
    tolerance: float = 0.0,
    min_score: float = 0.0,
    overwrite: bool = False,
) -> Exported:
    """Writes ``out/labels/<split>/<image>.txt`` and ``out/data.yaml``.

    A line is ``class x1 y1 x2 y2 ...`` (the outline of a mask) or, where there are no masks, ``class x y width height``
    (centre and sides of a box), as fractions of the image's width and height. Outlines run through the centres of the
    outermost pixels, so that OpenCV, with which Ultralytics and supervision draw them, gives the mask back. The
    photographs belong into ``out/images/<split>`` under the names of the labels. What YOLO cannot hold: scores; several
    outlines of an instance (parts and holes are joined by bridges, drawn one pixel wide).

    A folder that holds the same classes already gets the split beside those that it has.

    Args:
        predictions: by image id.
        images: the photographs; those without a prediction are left out, those with an empty one get an empty file.
        classes: names of the C classes, in label order.
        out: the folder: new, empty, or an export of other splits.
        split: name of the sub-folders.
        copy_images: copies the photographs, too.
        tolerance: pixels by which outlines may differ from the mask's, for fewer corners.
        min_score: instances below are left out.
        overwrite: replaces an earlier export.

    Raises:
        InputError: ``out`` is taken, or a file cannot be written.
    """
    bridged, split = 0, safe_name(split)
    with new_export(out, images, overwrite, {"format": "yolo", "classes": list(classes)}, True) as (folder, done):
        labels = folder / "labels" / split
        if labels.exists():
            raise InputError(f"{out}: already holds the split {split}; choose another folder, or overwrite it")
        labels.mkdir(parents=True)
        names = stems(images)
        for image, found in selected(predictions, images, min_score, done.notes):
            lines = []
            for label, box, mask in zip(
                found.labels.tolist(), clipped_boxes(found).numpy(), mask_arrays(found), strict=True
            ):
                scale = np.array([found.image_size[1], found.image_size[0]], np.float64)
                if mask is None:
                    values = np.concatenate([(box[:2] + box[2:]) / 2 / scale, (box[2:] - box[:2]) / scale])
                else:
                    parts = outline(mask, centres=True, tolerance=tolerance)
                    bridged += len(parts) > 1
                    values = (straight(joined(parts)) / scale).flatten()
                lines.append(" ".join([str(label), *(f"{value:.6f}" for value in values.tolist())]) + "\n")
            done.paths.append(write_text(labels / f"{names[image.id]}.txt", "".join(lines)))
            if copy_images:
                copy_photograph(image, folder / "images" / split / names[image.id], done)
        done.paths.append(write_text(folder / "data.yaml", _settings(folder, classes)))
    if not copy_images:
        done.notes.append(
            f"put the photographs into images/{split} under the names of the labels, or export with copies"
        )
    done.notes.append("YOLO labels hold no scores")
    if bridged:
        done.notes.append(f"{bridged} masks of several parts or with holes became one outline with bridges")
    return done


def _settings(folder: Path, classes: Sequence[str]) -> str:
    """``data.yaml``. It names no ``path``: Ultralytics then takes the folder that the file lies in."""
    splits = sorted(path.name for path in (folder / "labels").iterdir())
    train = "train" if "train" in splits else splits[0]
    val = next((name for name in ("val", "test") if name in splits), train)
    # JSON texts are YAML texts, whatever a class is called.
    names = "".join(f"  {label}: {json.dumps(name, ensure_ascii=False)}\n" for label, name in enumerate(classes))
    places = {"train": train, "val": val} | {name: name for name in splits}
    return "".join(f"{key}: images/{name}\n" for key, name in places.items()) + f"names:\n{names}"
