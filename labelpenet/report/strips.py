"""A photograph's way through the cascade as a strip of small pictures.

Nothing here trains or chooses anything: the truth, where the caller can read it, is only drawn and measured.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from labelpenet.calibration import Trace
from labelpenet.calibration.calibrate import resize_masks, rivals, segment
from labelpenet.config import AttentionCalibration
from labelpenet.data.dataset import TaggedImage, TaggedImages, Truth
from labelpenet.data.images import read_image
from labelpenet.data.transforms import View
from labelpenet.errors import InputError
from labelpenet.formats.rows import best_overlaps
from labelpenet.instances import MIN_SCORE, Instances
from labelpenet.models.cascade import LabelPEnet
from labelpenet.models.student import Student
from labelpenet.visualize import draw_boxes, draw_instances, draw_map, draw_mask

ReadTruth = Callable[[str], Truth]
_MAPPED = 2  # instances whose maps are shown, at most


@dataclass(frozen=True)
class Panel:
    """One small picture, (h, w, 3) uint8, with a title and a line that says what it shows."""

    title: str
    caption: str
    picture: np.ndarray


@dataclass(frozen=True)
class PanelRow:
    """Panels side by side under a title, or without one; ``wide`` ones are shown larger."""

    title: str
    panels: tuple[Panel, ...]
    wide: bool = False


@dataclass(frozen=True)
class Strip:
    """All pictures of one photograph, with its id, the names of its tags and a line below these, or none."""

    name: str
    tags: tuple[str, ...]
    rows: tuple[PanelRow, ...]
    remark: str = ""


@dataclass(frozen=True)
class Source:
    """What strips of one split are made from.

    Attributes:
        network: the trained cascade or student, or None where no module is trained.
        trained: numbers of the modules that are trained.
        found: for each number of a module what it is known to have found, by image id; a module that is not there
            predicts now.
        truth: reads the annotation of an image, or None.
        training: whether the photographs are those of the training.
        used: whether some of the annotation was used in training.
        proposed: whether another tool made the proposals that the run was trained on; ours would not be those.
        side: longer side of a panel in pixels.
    """

    images: TaggedImages
    network: LabelPEnet | Student | None = None
    trained: tuple[int, ...] = ()
    found: Mapping[int, Mapping[str, Instances]] = field(default_factory=dict)
    truth: ReadTruth | None = None
    training: bool = True
    used: bool = False
    proposed: bool = False
    side: int = 400


def choose_images(images: TaggedImages, count: int) -> list[TaggedImage]:
    """A few images: the first of each class, then the second of each class, and so on; in the order of the data set."""
    queues = [[image for image in images.images if label in image.tags] for label in range(len(images.classes))]
    chosen: dict[str, TaggedImage] = {}
    while len(chosen) < count and any(queues):
        for queue in queues:
            while queue and queue[0].id in chosen:
                queue.pop(0)
            if queue and len(chosen) < count:
                image = queue.pop(0)
                chosen[image.id] = image
    return [image for image in images.images if image.id in chosen]


def mean_best_overlap(found: Instances, truth: Truth) -> float | None:
    """Mean over the true objects of their best IoU with what was found of their class; None if there is no object, or
    one of the two is of an image of another size.

    IoU of masks where the image has true masks, else of boxes; crowd regions are left out.
    """
    if tuple(found.image_size) != tuple(truth.instances.image_size):
        return None
    objects = truth.instances[~truth.crowd].to_coco(0)
    return float(best_overlaps(objects, found.to_coco(0)).mean()) if objects else None


def worst_images(
    images: Sequence[TaggedImage], found: Mapping[str, Instances], read: ReadTruth, count: int
) -> list[tuple[TaggedImage, float]]:
    """The images with the lowest `mean_best_overlap`, worst first; those that cannot be measured are skipped."""
    measured = []
    for image in images:
        if image.id not in found:
            continue
        with suppress(InputError):  # a damaged annotation costs its image only
            value = mean_best_overlap(found[image.id], read(image.id))
            if value is not None:
                measured.append((image, value))
    return sorted(measured, key=lambda pair: pair[1])[:count]


def make_strip(source: Source, image: TaggedImage) -> Strip:
    """The strip of one photograph; `InputError` where it cannot be read."""
    photograph = read_image(image.path)
    canvas = _canvas(photograph, source.side)
    names = tuple(source.images.classes[label] for label in image.tags)
    caption = f"tagged {', '.join(names)}" if names else "no tag"
    first = [Panel("photograph", caption if source.training else f"{caption} (not shown to the network)", canvas)]
    rows: list[PanelRow] = []
    results = {number: of[image.id] for number, of in source.found.items() if image.id in of}
    if isinstance(source.network, Student):
        if not source.training:
            results.setdefault(4, source.network.predict(photograph))
    elif source.network is not None and not (source.training and source.proposed):
        proposals = source.network.proposals(photograph)
        first.append(_proposals_panel(canvas, photograph, proposals))
        if 1 in source.trained:
            found, trace = _first_module(source.network, photograph, proposals, image, source.training)
            results.setdefault(1, found)
            rows += _map_rows(source, canvas, found, trace)
        for number in source.trained:
            if number not in results and not source.training:
                results[number] = source.network.predict(photograph, number, proposals)
    merged = [PanelRow(rows[0].title, (*first, *rows[0].panels)), *rows[1:]] if rows else [PanelRow("", tuple(first))]
    last = _module_panels(source, canvas, image, results)
    if last:
        title = "What the student found" if isinstance(source.network, Student) else "What each module found"
        merged.append(PanelRow(title if results else "", tuple(last), wide=True))
    return Strip(image.id, names, tuple(merged))


def make_short_strip(source: Source, image: TaggedImage, number: int, overlap: float) -> Strip:
    """Photograph, what module ``number`` found and the truth, for an image with a mean best IoU of ``overlap``;
    `InputError` where the photograph cannot be read.
    """
    canvas = _canvas(read_image(image.path), source.side)
    names = tuple(source.images.classes[label] for label in image.tags)
    panels = [Panel("photograph", f"tagged {', '.join(names)}" if names else "no tag", canvas)]
    panels += _module_panels(source, canvas, image, {number: source.found[number][image.id]})
    return Strip(image.id, names, (PanelRow("", tuple(panels), wide=True),), f"mean best IoU {overlap:.2f}")


def _canvas(photograph: np.ndarray, side: int) -> np.ndarray:
    height, width = photograph.shape[:2]
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(photograph, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def _on_canvas(found: Instances, canvas: np.ndarray) -> Instances:
    """The instances of a photograph, on the CPU, in pixels of its small picture (h, w, 3)."""
    (height, width), (h, w) = found.image_size, canvas.shape[:2]
    return View(torch.empty(1, 0, h, w), (w / width, h / height)).instances(found)


def _proposals_panel(canvas: np.ndarray, photograph: np.ndarray, proposals: Tensor) -> Panel:
    shown = min(60, len(proposals))
    factor = np.array([canvas.shape[1] / photograph.shape[1], canvas.shape[0] / photograph.shape[0]] * 2)
    picture = draw_boxes(canvas, proposals.numpy() * factor, limit=shown)
    return Panel("proposals", f"the first {shown} of {len(proposals)}, yellow to purple by rank", picture)


@torch.no_grad()
def _first_module(
    network: LabelPEnet, photograph: np.ndarray, proposals: Tensor, image: TaggedImage, training: bool
) -> tuple[Instances, Trace]:
    """Module 1's instances, those of the tags alone for a training image, and their maps; the best one first."""
    batch = network.batch([photograph], [image.tags if training else None], [proposals])
    ((found, trace),) = network.classification.infer(batch, _settings(network, training))
    order = found.weights.argsort(descending=True, stable=True)
    maps = (one[order].cpu() for one in (trace.attention, trace.heat, trace.confidence, trace.marginals))
    return found[order].to("cpu"), Trace(*maps)


def _settings(network: LabelPEnet, training: bool) -> AttentionCalibration:
    module = network.recipe.modules[0]
    return module.label if training else module.predict


def _map_rows(source: Source, canvas: np.ndarray, found: Instances, trace: Trace) -> list[PanelRow]:
    """Attention map, heat-map, confidence and masks of module 1's best instances: a row each."""
    if not len(found) or source.network is None or isinstance(source.network, Student) or found.masks is None:
        return []
    settings = replace(_settings(source.network, source.training), iterations=0)
    blank = np.zeros((*trace.confidence.shape[-2:], 3), np.uint8)  # without iterations the CRF's image is not looked at
    against = rivals(found.labels, found.weights, settings)
    rough = resize_masks(segment(blank, trace.confidence, settings, trace.attention, against), found.image_size)
    before, after = (_on_canvas(one, canvas).masks for one in (replace(found, masks=rough), found))
    assert before is not None and after is not None
    shown = [
        index
        for index in range(min(len(found), _MAPPED))
        if not index or source.training or found.weights[index] >= MIN_SCORE
    ]
    rows = []
    for index in shown:
        panels = (
            Panel("attention map", "what the class rests on", draw_map(canvas, trace.attention[index])),
            Panel("heat-map", "class scores of the proposals, summed", draw_map(canvas, trace.heat[index])),
            Panel("confidence", "attention and heat combined", draw_map(canvas, trace.confidence[index])),
            Panel("mask before the CRF", "confidence beats background and rivals", draw_mask(canvas, before[index])),
            Panel("mask after the CRF", "aligned with the picture's edges", draw_mask(canvas, after[index])),
        )
        name = source.images.classes[int(found.labels[index])]
        rows.append(PanelRow(f"How module 1 finds “{name}”, confidence {found.weights[index]:.2f}", panels))
    return rows


def _module_panels(
    source: Source, canvas: np.ndarray, image: TaggedImage, results: Mapping[int, Instances]
) -> list[Panel]:
    truth = _truth(source, image)
    classes = source.images.classes
    panels = []
    for number, found in sorted(results.items()):
        caption = _count(found, source.training)
        overlap = None if truth is None else mean_best_overlap(found, truth)
        if overlap is not None:
            caption += f"; mean best IoU {overlap:.2f}"
        least = 0.0 if source.training else MIN_SCORE
        picture = draw_instances(canvas, _on_canvas(found, canvas), classes, least)
        title = "student" if isinstance(source.network, Student) else f"module {number}"
        panels.append(Panel(title, caption, picture))
    if truth is not None:
        picture = draw_instances(canvas, _on_canvas(truth.instances, canvas))
        names = ", ".join(classes[label] for label in truth.instances.labels.tolist()) or "none"
        title = "true objects" if source.used else "true objects, never used in training"
        panels.append(Panel(title, names, picture))
    return panels


def _count(found: Instances, training: bool) -> str:
    if training:
        return f"{len(found)} instance{'' if len(found) == 1 else 's'}"
    return f"{int((found.weights >= MIN_SCORE).sum())} of {len(found)} with score ≥ {MIN_SCORE}"


def _truth(source: Source, image: TaggedImage) -> Truth | None:
    with suppress(InputError):  # a damaged annotation costs one panel
        return None if source.truth is None else source.truth(image.id)
    return None
