"""YOLO text labels: one polygon (YOLO-seg) or box a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import write_text
from labelpenet.formats.polygons import joined, rings
from labelpenet.formats.selection import Exported, clipped_boxes, copy_photographs, mask_arrays, selected, stems
from labelpenet.instances import Instances


def export_yolo(
    predictions: Mapping[str, Instances],
    images: Sequence[TaggedImage],
    classes: Sequence[str],
    out: Path | str,
    *,
    split: str = "train",
    copy_images: bool = False,
    min_score: float = 0.0,
) -> Exported:
    """Writes ``out/labels/<split>/<image>.txt`` and ``out/data.yaml``.

    A line is ``class x1 y1 x2 y2 ...`` (the outline of a mask) or, where there are no masks, ``class x y width height``
    (centre and sides of a box), as fractions of the image's width and height. The photographs belong into
    ``out/images/<split>`` under the names of the labels. What YOLO cannot hold: scores; several outlines of an instance
    (parts and holes are joined by bridges of no width).

    Args:
        predictions: by image id.
        images: the photographs; those without a prediction are left out, those with an empty one get an empty file.
        classes: names of the C classes, in label order.
        out: the folder.
        split: name of the sub-folders.
        copy_images: copies the photographs, too.
        min_score: instances below are left out.

    Raises:
        InputError: a file cannot be written.
    """
    done, out = Exported(), Path(out)
    names = stems(images)
    written: list[TaggedImage] = []
    bridged = 0
    for image, found in selected(predictions, images, min_score, done.notes):
        lines = []
        for label, box, mask in zip(
            found.labels.tolist(), clipped_boxes(found).numpy(), mask_arrays(found), strict=True
        ):
            outline = None if mask is None else rings(mask)
            bridged += outline is not None and len(outline) > 1
            values = _fractions(outline, box, found.image_size)
            lines.append(" ".join([str(label), *(f"{value:.6f}" for value in values.tolist())]) + "\n")
        done.paths.append(write_text(out / "labels" / split / f"{names[image.id]}.txt", "".join(lines)))
        written.append(image)
    # JSON texts are YAML texts, whatever a class is called.
    listed = "".join(f"  {label}: {json.dumps(name, ensure_ascii=False)}\n" for label, name in enumerate(classes))
    done.paths.append(
        write_text(out / "data.yaml", f"path: .\ntrain: images/{split}\nval: images/{split}\nnames:\n{listed}")
    )
    if copy_images:
        copy_photographs(written, names, out / "images" / split, done)
    else:
        done.notes.append(
            f"put the photographs into images/{split} under the names of the labels, or export with copies"
        )
    done.notes.append("YOLO labels hold no scores")
    if bridged:
        done.notes.append(f"{bridged} masks of several parts or with holes became one outline with bridges")
    return done


def _fractions(outline: list[np.ndarray] | None, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    scale = np.array([size[1], size[0]], dtype=np.float64)
    if outline is not None:
        return (joined(outline) / scale).flatten()
    return np.concatenate([(box[:2] + box[2:]) / 2 / scale, (box[2:] - box[:2]) / scale])
