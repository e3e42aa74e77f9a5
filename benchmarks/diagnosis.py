"""Where a run loses its accuracy: what each module passes on or predicts, against withheld annotation.

    python benchmarks/diagnosis.py runs/voc-animals VOCdevkit/VOC2012 --split train
    python benchmarks/diagnosis.py runs/voc-animals VOCdevkit/VOC2012 --split val

Of a split whose images the run was trained on, it judges the instances that each module passed on
(``RUN/instances/moduleK.json``); of another one the predictions that `labelpenet measure` or `predict` left in
``RUN/predictions/SPLIT-moduleK.json``. Annotation is read for analysis only. Prints Markdown tables, in percent.

Every instance is of one *kind*, the first of these that fits its box and its class:

- **ignored**: IoU >= .5 with a difficult object or crowd of its class; left out of all shares.
- **right**: IoU >= .5 with an object of its class that no better instance has taken.
- **duplicate**: the same, but a better instance has taken the object.
- **wrong class**: IoU >= .5 with an object of another class.
- **group**: several as one: it covers at least half of each of two objects of its class, or of more.
- **part**: at least .7 of it lies inside an object of its class.
- **loose**: it covers at least .7 of an object of its class and is too large.
- **misplaced**: any other box with IoU >= .1 with an object of its class.
- **wrong class** again: any other box with IoU >= .1 with an object of another class.
- **background**: none of these.

Columns of the tables:

- *recall*: share of objects (difficult ones not) that some instance of their class meets with IoU >= .5; *best IoU*:
  mean over the objects of their best IoU; *per object*: instances for each object; *mask IoU*: mean over the instances
  of the IoU with the best object of their class, in images with masks.
- *AUC*: probability that a right instance has a larger weight than one that is not; *Q1* to *Q4*: share of right ones
  by quartile of the weight, all classes together, lowest weights first.
- *N best*: of each class the N detections of highest score, N being its number of objects (Hoiem's choice: it needs no
  threshold, and with perfect detections all would be right).
- *what if*: box mAP (or mask mAP) if one kind of decision were perfect. Ranking: right ones come first. Class: boxes
  with IoU >= .5 on an object of another class get its class. Part, loose, misplaced: these boxes become those of the
  object. Split: a group becomes one detection for each object that it covers. Boxes: all four. Duplicate, background:
  these are removed. Missed: objects that nothing overlaps are not counted. Tags: classes that the image does not show
  are removed. Where a mended detection takes an object that another has, the lower score is removed.
- *masks from true boxes*: the box itself as mask, the dense CRF of the box as confidence (module 3's), and the
  mask heads of modules 3 and 4, without and with CRF.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labelpenet.calibration import project_maps
from labelpenet.calibration.calibrate import drop_components, resize_masks, segment, working_canvas
from labelpenet.data import AnnotatedImages, Truth, read_image, run_folder
from labelpenet.data.dataset import TaggedImage
from labelpenet.data.proposals import compute_proposals
from labelpenet.engine.distributed import map_images
from labelpenet.errors import InputError
from labelpenet.evaluation import (
    Record,
    Table,
    box_iou,
    class_average_precisions,
    corloc,
    mask_iou,
    match_boxes,
    match_masks,
    record,
)
from labelpenet.evaluation.records import run_lengths
from labelpenet.formats import open_annotated, read_predictions
from labelpenet.instances import Instances
from labelpenet.models.cascade import read_run
from labelpenet.training.inferred import read_inferred
from labelpenet.training.predict import Predictor

KINDS = ("right", "duplicate", "wrong class", "group", "part", "loose", "misplaced", "background", "ignored")
RIGHT, DUPLICATE, WRONG, GROUP, PART, LOOSE, MISPLACED, BACKGROUND, IGNORED = range(len(KINDS))
HIT, COVERED, MOSTLY, NEAR = 0.5, 0.5, 0.7, 0.1

MENDS = (
    "ranking", "class", "boxes", "part", "split", "loose", "misplaced", "duplicate", "background", "missed", "tags",
)  # fmt: skip
SIZES = ("under 5 % of the image", "5 to 20 %", "over 20 %")
NUMBERS = ("1 of its class in the image", "2", "3 or more")


# -- kinds of error --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What is to be said of the D instances of an image.

    Attributes:
        kind: (D,) int64, index into `KINDS`.
        target: (D,) int64, the object that it speaks of; -1 for background.
    """

    kind: np.ndarray
    target: np.ndarray


def overlaps(boxes: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of (D, 4) boxes and (T, 4) objects: IoU, share of the box inside, share of the object covered; (D, T)."""
    sides = np.minimum(boxes[:, None, 2:], objects[None, :, 2:]) - np.maximum(boxes[:, None, :2], objects[None, :, :2])
    common = sides.clip(min=0).prod(-1)
    own, theirs = areas(boxes)[:, None], areas(objects)[None]
    return box_iou(boxes, objects), common / np.maximum(own, 1e-9), common / np.maximum(theirs, 1e-9)


def areas(boxes: np.ndarray) -> np.ndarray:
    """(N,) areas of (N, 4) boxes."""
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1)


def judge(item: Record) -> Verdict:
    """The kind of each instance of an image (see the top of this file)."""
    count = len(item.labels)
    kind, target = np.full(count, BACKGROUND), np.full(count, -1)
    if not count or not len(item.truth_labels):
        return Verdict(kind, target)
    iou, inside, covered = overlaps(item.boxes, item.truth_boxes)
    own = item.labels[:, None] == item.truth_labels[None]
    mine, foreign = np.where(own, iou, -1.0), np.where(own, -1.0, iou)
    inside, covered = np.where(own, inside, -1.0), np.where(own, covered, -1.0)
    rules = [
        (RIGHT, mine.max(1) >= HIT, mine),
        (WRONG, foreign.max(1) >= HIT, foreign),
        (GROUP, (covered >= COVERED).sum(1) >= 2, mine),
        (PART, inside.max(1) >= MOSTLY, inside),
        (LOOSE, covered.max(1) >= MOSTLY, covered),
        (MISPLACED, mine.max(1) >= NEAR, mine),
        (WRONG, foreign.max(1) >= NEAR, foreign),
    ]
    for name, fits, overlap in reversed(rules):
        kind = np.where(fits, name, kind)
        target = np.where(fits, overlap.argmax(1), target)
    ignored = (item.difficult | item.crowd)[target]
    kind[(kind == RIGHT) & ignored] = IGNORED
    hits = np.flatnonzero(kind == RIGHT)
    hits = hits[np.argsort(-item.scores[hits], kind="stable")]
    _, first = np.unique(target[hits], return_index=True)
    kind[np.delete(hits, first)] = DUPLICATE
    return Verdict(kind, target)


def best_ious(item: Record, chosen: np.ndarray | None = None) -> np.ndarray:
    """For each of the T objects its best IoU with a box of its class, (T,); only the ``chosen`` (D,) ones count."""
    usable = item.labels[:, None] == item.truth_labels[None]
    if chosen is not None:
        usable &= chosen[:, None]
    return np.where(usable, box_iou(item.boxes, item.truth_boxes), 0.0).max(0, initial=0.0)


def n_best(records: Sequence[Record], classes: int) -> list[np.ndarray]:
    """For each image which of its detections, (D,) bool, are among the N best of their class (N: its objects)."""
    scores = np.concatenate([item.scores for item in records])
    labels = np.concatenate([item.labels for item in records])
    chosen = np.zeros(len(scores), bool)
    for label in range(classes):
        number = sum(int((counted(item) & (item.truth_labels == label)).sum()) for item in records)
        mine = np.flatnonzero(labels == label)
        chosen[mine[np.argsort(-scores[mine], kind="stable")[:number]]] = True
    return np.split(chosen, np.cumsum([len(item.scores) for item in records])[:-1])


def counted(item: Record) -> np.ndarray:
    """(T,) bool: the objects that count."""
    return ~(item.difficult | item.crowd)


def auc(values: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right one has a larger value than a wrong one, ties half; NaN where either is missing.

    Args:
        values: (D,); right: (D,) bool.
    """
    good, bad = values[right], np.sort(values[~right])
    if not len(good) or not len(bad):
        return float("nan")
    below, not_above = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
    return float((below + not_above).mean() / 2 / len(bad))


def quartiles(values: np.ndarray, right: np.ndarray) -> list[float]:
    """Share of right ones by quartile of the values, lowest first: four fractions."""
    return [float(part.mean()) for part in np.array_split(right[np.argsort(values, kind="stable")], 4) if len(part)]


# -- what if -----------------------------------------------------------------------------------------------------------


def mean_ap(records: Sequence[Record], classes: int) -> float:
    """Box mAP at IoU .5, protocol voc12."""
    return _mean(class_average_precisions(match_boxes(records), classes))


def mend(item: Record, verdict: Verdict, what: str) -> Record:
    """The image's boxes with one kind of decision made perfect (see the top of this file).

    Args:
        what: one of `MENDS`.
    """
    item = replace(item, masks=None, truth_masks=None)
    kind, target = verdict.kind, verdict.target
    if what == "ranking":
        return replace(item, scores=item.scores + (kind == RIGHT))
    if what in ("duplicate", "background"):
        return _rows(item, kind != KINDS.index(what))
    if what == "tags":
        return _rows(item, np.isin(item.labels, item.truth_labels))
    if what == "missed":
        return _without_missed(item, verdict)
    source = np.arange(len(kind))
    boxes, labels = item.boxes.copy(), item.labels.copy()
    if what == "class":
        wrong = (kind == WRONG) & (box_iou(item.boxes, item.truth_boxes).max(1, initial=0.0) >= HIT)
        labels[wrong] = item.truth_labels[target[wrong]]
    else:
        moved = np.isin(kind, {"boxes": [PART, LOOSE, MISPLACED], "split": []}.get(what, [_index(what)]))
        boxes[moved] = item.truth_boxes[target[moved]]
    mended = replace(item, boxes=boxes, labels=labels)
    if what in ("boxes", "split") and (kind == GROUP).any():
        _, _, covered = overlaps(item.boxes, item.truth_boxes)
        several = (covered >= COVERED) & (item.labels[:, None] == item.truth_labels[None])
        several &= (kind == GROUP)[:, None]
        group, member = np.nonzero(several)
        others = np.flatnonzero(kind != GROUP)
        source = np.concatenate([others, group])
        mended = _rows(mended, source)
        mended.boxes[len(others) :] = item.truth_boxes[member]
    again = judge(mended).kind == DUPLICATE
    return _rows(mended, ~(again & (kind[source] != DUPLICATE)))


def _index(what: str) -> int:
    return KINDS.index(what) if what in KINDS else -1


def _rows(item: Record, rows: np.ndarray) -> Record:
    return replace(item, boxes=item.boxes[rows], labels=item.labels[rows], scores=item.scores[rows])


def _without_missed(item: Record, verdict: Verdict) -> Record:
    """Without the objects that nothing speaks of."""
    kept = np.isin(np.arange(len(item.truth_labels)), verdict.target)
    return replace(
        item,
        truth_boxes=item.truth_boxes[kept],
        truth_labels=item.truth_labels[kept],
        difficult=item.difficult[kept],
        crowd=item.crowd[kept],
    )


def what_if(records: Sequence[Record], verdicts: Sequence[Verdict], classes: int) -> list[float]:
    """Box mAP as it is, then with each of `MENDS`."""
    values = [mean_ap(records, classes)]
    for what in MENDS:
        mended = [mend(item, verdict, what) for item, verdict in zip(records, verdicts, strict=True)]
        values.append(mean_ap(mended, classes))
    return values


def mask_what_if(records: Sequence[Record], classes: int) -> list[float]:
    """Mask mAP at .5 and .75 as they are, with perfect ranking, and (one value) with true masks in all right boxes."""
    records = [item for item in records if item.truth_masks is not None]
    masks, boxes = match_masks(records), match_boxes(records)
    values = [_mean(class_average_precisions(masks, classes, threshold)) for threshold in (0.5, 0.75)]
    for threshold in (0.5, 0.75):
        ranked = replace(masks, scores=masks.scores + (masks.iou >= threshold))
        values.append(_mean(class_average_precisions(ranked, classes, threshold)))
    fits = boxes.iou >= HIT
    perfect = replace(masks, iou=np.where(fits, 1.0, masks.iou), truth=np.where(fits, boxes.truth, masks.truth))
    return [*values, _mean(class_average_precisions(perfect, classes, 0.75))]


# -- tables from files -------------------------------------------------------------------------------------------------


def passed_on_table(title: str, records: Sequence[Record], classes: Sequence[str]) -> Table:
    """What a module passed on, class by class."""
    verdicts = [judge(item) for item in records]
    kind, labels = _joined([one.kind for one in verdicts]), _joined([item.labels for item in records])
    weights = _joined([item.scores for item in records])
    truth = _joined([item.truth_labels[counted(item)] for item in records])
    best = _joined([best_ious(item)[counted(item)] for item in records])
    masks = match_masks(records)
    located = corloc(records, len(classes))
    rows = []
    for label, name in enumerate(classes):
        mine, theirs = (labels == label) & (kind != IGNORED), truth == label
        rows.append((
            f"{name} ({int(theirs.sum())} objects)",
            [
                located[label],
                _mean(best[theirs] >= HIT),
                _mean(best[theirs]),
                mine.sum() / max(theirs.sum(), 1),
                _mean(masks.iou[masks.labels == label]),
                auc(weights[mine], kind[mine] == RIGHT),
                *shares(kind[mine]),
            ],
        ))  # fmt: skip
    columns = ("CorLoc", "recall", "best IoU", "per object", "mask IoU", "AUC", *KINDS[:-1])
    return _table(title, columns, [*rows, ("mean", _column_means(rows))])


def weight_table(title: str, modules: Mapping[str, Sequence[Record]]) -> Table:
    """How well the weight of what each module passed on tells right from wrong."""
    rows = []
    for name, records in modules.items():
        kind = _joined([judge(item).kind for item in records])
        weights = _joined([item.scores for item in records])[kind != IGNORED]
        right = kind[kind != IGNORED] == RIGHT
        rows.append((name, [auc(weights, right), *quartiles(weights, right)]))
    return _table(title, ("AUC", "Q1", "Q2", "Q3", "Q4"), rows)


def predicted_table(title: str, records: Sequence[Record], classes: Sequence[str]) -> Table:
    """The kinds of the N best detections, class by class."""
    kinds = [judge(item).kind[best] for item, best in zip(records, n_best(records, len(classes)), strict=True)]
    chosen = zip(records, n_best(records, len(classes)), strict=True)
    kind, labels = _joined(kinds), _joined([item.labels[best] for item, best in chosen])
    precisions = class_average_precisions(match_boxes(records), len(classes))
    rows = [
        (name, [precisions[label], *shares(kind[(labels == label) & (kind != IGNORED)])])
        for label, name in enumerate(classes)
    ]
    return _table(title, ("AP", *KINDS[:-1]), [*rows, ("mean", _column_means(rows))])


def found_table(
    title: str, modules: Mapping[str, Sequence[Record]], sizes: Sequence[tuple[int, int]], classes: int | None
) -> Table:
    """Recall of the objects at IoU .5, by size and by number in the image.

    Args:
        modules: for each name the records of the images; sizes: of the images, (H, W); classes: their number for
        further columns with what the N best detections find, or None.
    """
    some = next(iter(modules.values()))
    where = [counted(item) for item in some]
    large = _joined([
        areas(item.truth_boxes[c]) / (h * w) for item, c, (h, w) in zip(some, where, sizes, strict=True)
    ])  # fmt: skip
    number = _joined([
        (item.truth_labels[c][:, None] == item.truth_labels[None]).sum(1) for item, c in zip(some, where, strict=True)
    ])  # fmt: skip
    groups = dict(zip(SIZES, [large < 0.05, (large >= 0.05) & (large <= 0.2), large > 0.2], strict=True))
    groups |= dict(zip(NUMBERS, [number == 1, number == 2, number >= 3], strict=True))
    columns, values = [], []
    for name, records in modules.items():
        everything: list[np.ndarray | None] = [None] * len(records)
        usable: dict[str, Sequence[np.ndarray | None]] = {name: everything}
        if classes is not None:
            usable["N best"] = n_best(records, classes)
        for how, chosen in usable.items():
            columns.append(how)
            values.append(
                _joined([best_ious(item, one)[c] for item, one, c in zip(records, chosen, where, strict=True)]) >= HIT
            )
    rows = [
        (f"{group} ({int(member.sum())} objects)", [_mean(found[member]) for found in values])
        for group, member in {**groups, "all": np.ones(len(large), bool)}.items()
    ]
    return _table(title, columns, rows)


def what_if_table(title: str, modules: Mapping[str, Sequence[Record]], classes: int) -> Table:
    """Box mAP of each module as it is and with each of `MENDS`."""
    rows = [(name, what_if(records, [judge(item) for item in records], classes)) for name, records in modules.items()]
    return _table(title, ("box mAP", *MENDS), rows)


def mask_what_if_table(title: str, modules: Mapping[str, Sequence[Record]], classes: int) -> Table:
    """Mask mAP of each module as it is and with perfect decisions; and the masks of right boxes."""
    rows = []
    for name, records in modules.items():
        annotated = [item for item in records if item.truth_masks is not None]
        kind = _joined([judge(item).kind for item in annotated])
        iou = match_masks(annotated).iou[kind == RIGHT]
        rows.append((name, [*mask_what_if(records, classes), _mean(iou), _mean(iou >= 0.5), _mean(iou >= 0.75)]))
    columns = ("mAP@.5", "mAP@.75", "ranking: .5", "ranking: .75", "true masks in right boxes")
    return _table(title, (*columns, "mask IoU of right boxes", ">= .5", ">= .75"), rows)


def shares(kind: np.ndarray) -> list[float]:
    """The share of each kind, without ignored."""
    return [_mean(kind == index) for index in range(IGNORED)]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0)


def _mean(values: np.ndarray) -> float:
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def _column_means(rows: Sequence[tuple[str, list[float]]]) -> list[float]:
    return [_mean(np.array(column)) for column in zip(*(values for _, values in rows), strict=True)]


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> Table:
    """A table in percent from fractions; NaN is an empty cell."""
    return Table(
        title,
        tuple(columns),
        tuple((name, tuple(None if np.isnan(one) else 100 * float(one) for one in values)) for name, values in rows),
    )


# -- oracles -----------------------------------------------------------------------------------------------------------


def proposal_table(title: str, found: Mapping[str, Sequence[tuple[np.ndarray, Record]]]) -> Table:
    """What the best proposal of each object is worth.

    Args:
        found: for each kind of proposals and each image the boxes (R, 4) and the record.
    """
    rows = []
    for name, pairs in found.items():
        best = [box_iou(boxes, item.truth_boxes[counted(item)]).max(0, initial=0.0) for boxes, item in pairs]
        iou = _joined(best)
        number = np.mean([len(boxes) for boxes, _ in pairs])
        rows.append((f"{name} ({number:.0f} an image)", [_mean(iou >= 0.5), _mean(iou >= 0.7), _mean(iou)]))
    return _table(title, ("recall at .5", "recall at .7", "best IoU"), rows)


def oracle_masks(predictor: Predictor, image: np.ndarray, truth: Instances) -> tuple[dict[str, np.ndarray], ...]:
    """What is possible with the true boxes of an image.

    Returns:
        For each way to a mask the IoU with each object's true mask, (T,) in [0, 1]; and for modules 2 to 4 the RPN's
        proposals, (R, 4) in pixels of the image.
    """
    network = predictor.cascade
    size = (image.shape[0], image.shape[1])
    settings = network.recipe.modules[2].label
    canvas, scale = working_canvas(image, settings.side)
    small = (canvas.shape[0], canvas.shape[1])
    with torch.no_grad(), predictor.fabric.autocast():
        view = network.view(image)
        stem, fine = network.stem_maps(view)
        boxes = view.boxes(truth.boxes)
        scaled = truth.boxes * truth.boxes.new_tensor([*scale, *scale])
        ones = torch.ones(len(truth), 2, 2)
        each = torch.arange(len(truth))

        def spread(maps: Tensor) -> Tensor:
            return project_maps(maps.float().cpu(), scaled, small, groups=each, num_groups=len(truth)).clamp(0, 1)

        confidence = {"box": spread(ones)}
        proposals = {}
        for number in (2, 3, 4):
            module: Any = network.module(number)
            (rois,), _ = module.propose(module.tail(stem), [view.size])
            proposals[f"RPN of module {number}"] = view.back(rois).float().cpu().numpy()
            if number > 2:
                masks = module.masks(module.mask_features(stem, fine), [boxes], truth.labels.to(boxes.device))
                confidence[f"mask head of module {number}"] = spread(masks)
        ious = {}
        for name, one in confidence.items():
            ious[name] = _mask_ious(resize_masks(one, size), truth)
            grown = resize_masks(segment(canvas, one, settings), size)
            ious[f"{name}, CRF"] = _mask_ious(
                torch.stack([drop_components(m, settings.min_component) for m in grown]), truth
            )
    return ious, proposals


def _mask_ious(masks: Tensor, truth: Instances) -> np.ndarray:
    assert truth.masks is not None
    return mask_iou(run_lengths(masks), run_lengths(truth.masks)).diagonal()


def oracle_table(title: str, ious: Mapping[str, np.ndarray], labels: np.ndarray, classes: Sequence[str]) -> Table:
    """Mean IoU and shares above .5 and .75 of oracle masks, and mean IoU by class."""
    rows = []
    for name, iou in ious.items():
        by_class = [_mean(iou[labels == label]) for label in range(len(classes))]
        rows.append((name, [_mean(iou), _mean(iou >= 0.5), _mean(iou >= 0.75), *by_class]))
    return _table(title, ("mask IoU", ">= .5", ">= .75", *classes), rows)


# -- the run -----------------------------------------------------------------------------------------------------------


def read_found(
    run: Path, data: AnnotatedImages, split: str, numbers: Sequence[int]
) -> tuple[bool, dict[str, Mapping[str, Instances]]]:
    """What the modules passed on for the images, or what they predict.

    Returns:
        Whether the images are those that the run was trained on; and for each module that has a file the instances
        by image id.

    Raises:
        InputError: there is no file for any module.
    """
    images, classes = data.tagged.images, data.tagged.classes
    found: dict[str, Mapping[str, Instances]] = {}
    for number in numbers:
        if run_folder.instances(run, f"module{number}").is_file():
            inferred = read_inferred(run, f"module{number}", len(classes))
            if all(image.id in inferred for image in images):
                found[f"module {number}"] = inferred
    if found:
        return True, found
    for number in numbers:
        path = run_folder.predictions(run, split, number)
        if path.is_file():
            found[f"module {number}"] = read_predictions(path, images, classes, list(range(1, len(classes) + 1)))
    if not found:
        raise InputError(
            f"{run}: holds nothing about the images of {split}; predict them with labelpenet measure {run} first"
        )
    return False, found


def file_tables(
    trained_on: bool,
    modules: Mapping[str, Sequence[Record]],
    sizes: Sequence[tuple[int, int]],
    classes: Sequence[str],
) -> list[Table]:
    """All tables that need no network."""
    c = len(classes)
    if trained_on:
        tables = [passed_on_table(f"what {name} passes on", one, classes) for name, one in modules.items()]
        tables.append(weight_table("right instances by their weight", modules))
    else:
        tables = [predicted_table(f"N best detections of {name}", one, classes) for name, one in modules.items()]
        tables.append(what_if_table("box mAP, what if", modules, c))
        tables.append(mask_what_if_table("mask mAP, what if", modules, c))
    return [*tables, found_table("recall of objects", modules, sizes, None if trained_on else c)]


def network_tables(
    run: Path,
    data: AnnotatedImages,
    truths: Mapping[str, Truth],
    device: str,
    cache: Path | None,
    number: int,
    seed: int,
) -> list[Table]:
    """Proposals of the whole split, and oracle masks of ``number`` images that have masks."""
    predictor, classes = Predictor(run, device), data.tagged.classes
    network = predictor.cascade
    images = [image for image in data.tagged.images if image.id in truths]
    boxes = compute_proposals(images, network.recipe.proposals, cache, progress=True)

    def alone(image: TaggedImage) -> Record:
        truth = truths[image.id]
        return record(Instances.empty(truth.instances.image_size), truth)

    found: dict[str, list[tuple[np.ndarray, Record]]] = {
        network.recipe.proposals.method: [
            (network.select(boxes[i.id], truths[i.id].instances.image_size).numpy(), alone(i)) for i in images
        ]
    }
    chosen = [image for image in images if truths[image.id].instances.masks is not None]
    chosen = [image for image in chosen if len(truths[image.id].instances)]
    random.Random(seed).shuffle(chosen)
    chosen = chosen[:number]

    def look(image: TaggedImage) -> tuple[dict[str, np.ndarray], ...]:
        return oracle_masks(predictor, read_image(image.path), truths[image.id].instances)

    ious: dict[str, list[np.ndarray]] = {}
    for image, (masks, rpn) in zip(chosen, map_images(look, chosen, network.device), strict=True):
        for name, values in masks.items():
            ious.setdefault(name, []).append(values)
        for name, regions in rpn.items():
            found.setdefault(name, []).append((regions, alone(image)))
    tables = [proposal_table(f"best proposal of each object (RPN: {len(chosen)} images)", found)]
    if chosen:
        labels = _joined([truths[image.id].instances.labels.numpy() for image in chosen])
        joined = {name: _joined(values) for name, values in ious.items()}
        tables.append(oracle_table(f"masks from true boxes ({len(chosen)} images)", joined, labels, classes))
    return tables


def main() -> int:
    """Parses, judges, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--module", type=int, nargs="+", default=[1, 2, 3, 4], choices=(1, 2, 3, 4))
    parser.add_argument("--images", type=int, default=100, help="for the oracles, drawn from those with masks; 0: none")
    parser.add_argument("--seed", type=int, default=1, help="of that draw")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--cache", type=Path, help="folder of the proposals' cache")
    one = parser.parse_args()
    try:
        say: Callable[[Table], None] = lambda table: print(table.render("markdown"), flush=True)  # noqa: E731
        data = open_annotated(one.data, one.split, read_run(one.run)["classes"])
        truths, _ = data.readable_truths()
        trained_on, found = read_found(one.run, data, one.split, one.module)
        empty = {image: Instances.empty(truth.instances.image_size) for image, truth in truths.items()}
        modules = {
            name: [record(instances.get(i, empty[i]), truth, every_mask=False) for i, truth in truths.items()]
            for name, instances in found.items()
        }
        sizes = [truth.instances.image_size for truth in truths.values()]
        for table in file_tables(trained_on, modules, sizes, data.tagged.classes):
            say(table)
        if one.images:
            for table in network_tables(one.run, data, truths, one.device, one.cache, one.images, one.seed):
                say(table)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
