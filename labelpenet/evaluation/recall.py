"""How well proposals cover the true objects: recall and average best overlap by their number. Pure NumPy.

Shape letters: ``R`` proposals and ``G`` true objects of an image, ``C`` classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from labelpenet.data.dataset import Truth
from labelpenet.evaluation.detection import box_iou


def recall(
    proposals: Mapping[str, np.ndarray],
    truths: Mapping[str, Truth],
    classes: Sequence[str],
    counts: Sequence[int] = (100, 300, 1000, 2000),
) -> dict[str, Any]:
    """How well the proposals cover the true objects, as a function of their number.

    Args:
        proposals: by image id, (R, 4) pixels, best first. An image without an entry has none: its objects are missed.
        truths: by image id; difficult objects and crowds do not count.
        counts: numbers of proposals per image, from the best on; an image that has fewer gives all of its own.

    Returns:
        ``{"images": .., "objects": {class: number}, "rows": [..]}`` with one row for each count: ``{"count", "boxes"
        (mean number used per image), "recall@0.5", "recall@0.7", "ABO" (average best overlap), "per_class": {class:
        {"recall@0.5", "recall@0.7", "ABO"}}}``, fractions in [0, 1]. A row's figures are the means over the classes
        that have objects; without any they are NaN.
    """
    best: list[list[np.ndarray]] = [[] for _ in classes]  # for each class and image (number of counts, G)
    used = np.zeros(len(counts))
    for image_id, truth in truths.items():
        boxes = proposals.get(image_id, np.zeros((0, 4), np.float32))
        used += np.minimum(counts, len(boxes))
        valid = ~(truth.difficult | truth.crowd).numpy()
        objects, labels = truth.instances.boxes.numpy()[valid], truth.instances.labels.numpy()[valid]
        overlap = box_iou(boxes, objects)
        top = np.stack([overlap[:count].max(0, initial=0.0) for count in counts])
        for label in np.unique(labels):
            best[label].append(top[:, labels == label])
    overlaps = {name: np.concatenate(parts, 1) for name, parts in zip(classes, best, strict=True) if parts}
    rows = []
    for i, count in enumerate(counts):
        per_class = {name: _coverage(values[i]) for name, values in overlaps.items()}
        mean = {key: _mean([row[key] for row in per_class.values()]) for key in ("recall@0.5", "recall@0.7", "ABO")}
        rows.append({"count": count, "boxes": used[i] / max(len(truths), 1), **mean, "per_class": per_class})
    objects_of = {name: overlaps[name].shape[1] if name in overlaps else 0 for name in classes}
    return {"images": len(truths), "objects": objects_of, "rows": rows}


def _coverage(best: np.ndarray) -> dict[str, float]:
    """The figures of one class from the best overlap of each of its (G,) objects."""
    return {
        "recall@0.5": float((best >= 0.5).mean()),
        "recall@0.7": float((best >= 0.7).mean()),
        "ABO": float(best.mean()),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def recall_table(result: Mapping[str, Any]) -> str:
    """What `recall` returns as text: a line per class (``recall@0.5 recall@0.7 ABO`` for each count) and their mean."""
    rows = result["rows"]
    head = "".join(f"{'first ' + str(row['count']) + ' (' + format(row['boxes'], '.0f') + ')':>24}" for row in rows)
    lines = [f"proposals of {result['images']} images, in brackets how many there are on average", f"{'':24}{head}"]
    lines.append(f"{'class':16}{'objects':>8}" + f"{'R@0.5':>10}{'R@0.7':>7}{'ABO':>7}" * len(rows))
    for name, number in result["objects"].items():
        figures = "".join(_cells(row["per_class"][name]) for row in rows) if number else "  no objects"
        lines.append(f"{name:16}{number:8}{figures}")
    lines.append(f"{'mean':16}{sum(result['objects'].values()):8}" + "".join(_cells(row) for row in rows))
    return "\n".join(lines)


def _cells(figures: Mapping[str, Any]) -> str:
    return f"{figures['recall@0.5']:10.3f}{figures['recall@0.7']:7.3f}{figures['ABO']:7.3f}"
