"""Which photographs a person should look at first: those whose labels the modules do not agree on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.errors import InputError
from labelpenet.formats.rows import best_overlaps
from labelpenet.training.inferred import Inferred, Rows, read_inferred


def rank(images: Sequence[TaggedImage], found: Mapping[int, Inferred]) -> list[tuple[TaggedImage, float]]:
    """The photographs with their doubt, the most doubtful first; equal ones in the order of the data set.

    By number of module, ``found`` is what it inferred; the last module's labels are judged by those before it. A
    photograph that it has not labelled is left out.
    """
    last = max(found)
    others = [found[number] for number in sorted(found) if number != last]
    judged = []
    for image in images:
        if image.id in found[last]:
            opinions = [other.rows(image.id) for other in others if image.id in other]
            judged.append((image, doubt(image.tags, found[last].rows(image.id), opinions)))
    return sorted(judged, key=lambda pair: -pair[1])


def rank_run(run: Path, images: TaggedImages, last: int = 4) -> tuple[list[tuple[TaggedImage, float]], Inferred]:
    """`rank` of what the modules of a run up to ``last`` inferred, and what the last of these did; `InputError` where
    none has labelled the photographs, or these are others of the same names.
    """
    numbers = [number for number in run_folder.labelled(run) if number <= last]
    if not numbers:
        raise InputError(f"{run}: no module has labelled the training photographs yet; train it first")
    run_folder.check_own(run, {image.id: image.path for image in images.images})
    found = {number: read_inferred(run, f"module{number}", len(images.classes)) for number in numbers}
    ranked = rank(images.images, found)
    if not ranked:
        raise InputError(f"{run}: has labelled none of these photographs; give the data that it was trained on")
    return ranked, found[numbers[-1]]


def doubt(tags: Sequence[int], rows: Rows, others: Sequence[Rows]) -> float:
    """How little the labels of a photograph can be trusted, in [0, 1]: one minus the mean trust of its tags.

    An instance's trust is the geometric mean of its weight and its agreement, the mean over the other modules of the
    best IoU with an instance of its class. A tag's is the mean over its instances, and 0 where there is none. ``rows``
    are the N instances as COCO rows (category 1 is class 0), ``others`` those that other modules found.
    """
    if not tags:
        return 0.0
    agreement = np.mean([best_overlaps(rows, other) for other in others], 0) if others else np.ones(len(rows))
    trust = np.sqrt(np.array([row["score"] for row in rows]) * agreement)
    labels = np.array([row["category_id"] - 1 for row in rows])
    return 1 - float(np.mean([trust[labels == tag].mean() if (labels == tag).any() else 0.0 for tag in tags]))
