"""Which photographs a person should look at first: those whose labels the modules do not agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pycocotools import mask as rle

from labelpenet.data.dataset import TaggedImage
from labelpenet.training.inferred import Inferred, Rows


def rank(images: Sequence[TaggedImage], found: Mapping[int, Inferred]) -> list[tuple[TaggedImage, float]]:
    """The photographs with their doubt, the most doubtful first; equal ones in the order of the data set.

    Args:
        images: the photographs.
        found: by number of module, what it inferred; the last module's labels are judged by those before it. A
            photograph that it has not labelled is left out.
    """
    last = max(found)
    others = [found[number] for number in sorted(found) if number != last]
    known = [image for image in images if image.id in found[last]]
    judged = [
        (image, doubt(image.tags, found[last].rows(image.id), [other.rows(image.id) for other in others]))
        for image in known
    ]
    return sorted(judged, key=lambda pair: -pair[1])


def doubt(tags: Sequence[int], rows: Rows, others: Sequence[Rows]) -> float:
    """How little the labels of a photograph can be trusted, in [0, 1]: one minus the mean trust of its tags.

    An instance's trust is the geometric mean of its weight and its agreement, the mean over the other modules of the
    best IoU with an instance of its class. A tag's is the mean over its instances, and 0 where there is none.

    Args:
        tags: of the photograph, class indices.
        rows: its N instances as COCO rows (category 1 is class 0), others: those that other modules found.
    """
    if not tags:
        return 0.0
    agreement = np.mean([best_overlaps(rows, other) for other in others], 0) if others else np.ones(len(rows))
    trust = np.sqrt(np.array([row["score"] for row in rows]) * agreement)
    labels = np.array([row["category_id"] - 1 for row in rows])
    return 1 - float(np.mean([trust[labels == tag].mean() if (labels == tag).any() else 0.0 for tag in tags]))


def best_overlaps(rows: Rows, others: Rows) -> np.ndarray:
    """(N,) each instance's best IoU with one of its class among ``others``: of masks, else of boxes."""
    if not rows or not others:
        return np.zeros(len(rows))
    kind = "segmentation" if all(row.get("segmentation") for row in (*rows, *others)) else "bbox"
    overlap = rle.iou([row[kind] for row in rows], [row[kind] for row in others], [False] * len(others))
    same = np.array([[row["category_id"] == other["category_id"] for other in others] for row in rows])
    return np.where(same, overlap, 0.0).max(1)
