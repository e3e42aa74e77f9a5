"""What the paper leaves open in proposal calibration, measured on the training photographs of a run.

    python benchmarks/pseudo_labels.py runs/voc-animals VOCdevkit/VOC2012 --module 1 --out study1.npz

Every variant of `classification_variants` or `detection_variants` labels the same photographs; what they have in common
(stem, RoI features, attention maps, projections, lattices) is computed once an image. Printed as Markdown:

- for each variant CorLoc (the best instance of each tag, on all images), mean IoU of its mask with the best object of
  its class (on the images that have instance masks), both averaged over the classes, the difference of CorLoc to the
  recipe with its standard error and on either half of the images, and how many further instances there are and the
  fraction of them that is right;
- for the recipe's own setting, how well candidates for the instance's weight tell right from wrong: area under the ROC
  curve, expected calibration error, and the fraction that is right in ten bins of the value.

The annotation is used for analysis only. ``--out`` keeps the rows behind the tables: the same command goes on from
there, with ``--minutes 0`` it prints what is there after one more photograph. A photograph takes about 1 s of one core
for module 1 and .7 s for module 2.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labelpenet.calibration import Candidates, calibrate, choose_instances, proposal_candidates
from labelpenet.config import AttentionCalibration
from labelpenet.data import read_image
from labelpenet.data.dataset import TaggedImage, Truth
from labelpenet.data.proposals import compute_proposals
from labelpenet.engine.distributed import map_images
from labelpenet.errors import InputError
from labelpenet.evaluation import box_iou, mask_iou
from labelpenet.evaluation.records import run_lengths
from labelpenet.formats import open_annotated
from labelpenet.instances import Instances
from labelpenet.models.attention import roi_attention
from labelpenet.models.cascade import LabelPEnet
from labelpenet.training.features import RoIFeatures
from labelpenet.training.predict import Predictor

RECIPE = "recipe"
"""The name of the variant that all others are compared with."""


@dataclass(frozen=True)
class Variant:
    """One way from scores to instances.

    Attributes:
        name: as printed.
        settings: of calibration.
        kind: of the attention maps, see `roi_attention`.
        every: measured on every so many-th photograph only.
    """

    name: str
    settings: AttentionCalibration
    kind: str = "gradient"
    every: int = 1


@dataclass
class Scene:
    """What all variants of one photograph start from. R proposals, C classes.

    Attributes:
        image: (H, W, 3) uint8.
        proposals: (R, 4) in pixels of the photograph, and their scores (R, C) in [0, 1]: what heat-maps are made of.
        found: the candidates.
        tags: the classes that get instances.
        attend: kind and (n,) candidates to (n, a, a) attention maps.
        share: (R, C) the proposals' shares in the image's score of each class, summing to one.
        probabilities: (C,) of the image's classes, by module 1.
    """

    image: np.ndarray
    proposals: Tensor
    scores: Tensor
    found: Candidates
    tags: tuple[int, ...]
    attend: Callable[[str, Tensor], Tensor]
    share: Tensor
    probabilities: Tensor


@dataclass
class Result:
    """Instances of one variant, and the maps behind them (K, h, w)."""

    found: Instances
    confidence: Tensor
    marginals: Tensor


# -- the variants ----------------------------------------------------------------------------------------------------


def vary(base: Variant, name: str, thresholds: tuple[float, ...] = (), **changes: Any) -> list[Variant]:
    """The variant with fields of its own or of its settings changed, one for each threshold if there are any."""
    own = {key: value for key, value in changes.items() if key in ("kind", "every")}
    settings = replace(base.settings, **{key: value for key, value in changes.items() if key not in own})
    one = replace(base, name=name, settings=settings, **own)
    return [
        replace(one, name=f"{name}, threshold {t:g}", settings=replace(settings, threshold=t)) for t in thresholds
    ] or [one]


PYDENSECRF = {"sxy_bilateral": 80.0, "srgb": 13.0, "compat_bilateral": 10.0}


def classification_variants(settings: AttentionCalibration, sample: int) -> list[Variant]:
    """Module 1. The excitation variants are measured on every ``sample``-th photograph: each costs seconds."""
    base = Variant(RECIPE, settings)
    some = vary(base, f"{RECIPE}, every {sample}th", every=sample)
    excited: dict[str, Any] = {"kind": "excitation", "every": sample}
    return [
        base,
        *vary(base, "threshold", (0.25, 0.35, 0.4)),
        *vary(base, "1 - sum", threshold=None),
        *vary(base, "product", (0.05, 0.1, 0.15), combine="product"),
        *vary(base, "product, 1 - sum", combine="product", threshold=None),
        *vary(base, "members suppressed, NMS .3", (0.3, 0.4), members="suppressed", nms=0.3),
        *vary(base, "members suppressed, NMS .5", (0.3, 0.4), members="suppressed", nms=0.5),
        *vary(base, "best 40 attended", max_attention=40),
        *vary(base, "no CRF", (0.3, 0.4), iterations=0),
        *vary(base, "CRF of pydensecrf's widths", (0.3,), **PYDENSECRF),
        *vary(base, "each instance alone", compete="background"),
        *vary(base, "box of the proposal", box="proposal"),
        *vary(base, "all parts of the mask", min_component=None),
        *some,
        *vary(base, "excitation, mean", (0.3, 0.4), **excited),
        *vary(base, "excitation, product", (0.05,), combine="product", **excited),
    ]


def detection_variants(settings: AttentionCalibration, sample: int) -> list[Variant]:
    """Module 2."""
    base = Variant(RECIPE, settings)
    some = vary(base, f"{RECIPE}, every {sample}th", every=sample)
    excited: dict[str, Any] = {"kind": "excitation", "every": sample}
    return [
        base,
        *vary(base, "threshold", (0.3, 0.35, 0.45, 0.5)),
        *vary(base, "1 - sum", threshold=None),
        *vary(base, "product", (0.05, 0.1, 0.15, 0.2), combine="product"),
        *vary(base, "product, 1 - sum", combine="product", threshold=None),
        *vary(base, "members class, one each", (0.4,), members="class", per_class=1),
        *vary(base, "NMS .5", nms=0.5),
        *vary(base, "further from .2", min_score=0.2),
        *vary(base, "further from .3", min_score=0.3),
        *vary(base, "further from .7", min_score=0.7),
        *vary(base, "one each", per_class=1),
        *vary(base, "best 20 attended", max_attention=20),
        *vary(base, "no CRF", (0.4,), iterations=0),
        *vary(base, "CRF of pydensecrf's widths", (0.4,), **PYDENSECRF),
        *vary(base, "each instance alone", compete="background"),
        *vary(base, "box of the proposal", box="proposal"),
        *vary(base, "all parts of the mask", min_component=None),
        *some,
        *vary(base, "excitation, mean", (0.4,), **excited),
        *vary(base, "excitation, product", (0.05,), combine="product", **excited),
    ]


# -- what the variants start from ------------------------------------------------------------------------------------


def classified(network: LabelPEnet, pixels: np.ndarray, proposals: Tensor, known: Tensor, image: TaggedImage) -> Scene:
    """Module 1's scores of the proposals (R, 4) with RoI features (R, D)."""
    one = network.classification
    batch = network.batch([pixels], [image.tags], [proposals])
    tail, regions = one.tail(batch.stem), batch.views[0].boxes(proposals)
    x_c, x_p = one(known)
    positive = x_c[:, 1:].clamp(min=0) * x_p.softmax(0)
    scores = x_c[:, 1:].softmax(1)
    found = proposal_candidates(proposals, scores, image.tags)

    def attend(kind: str, index: Tensor) -> Tensor:
        pooled = one.pool(tail, [regions[found.rois[index]]])
        return roi_attention(one.head, one.classifier, pooled, found.labels[index] + 1, found.scores[index], kind)

    share = positive / positive.sum(0).clamp(min=1e-9)
    return Scene(pixels, proposals, scores, found, image.tags, attend, share, one.image_probabilities(x_c, x_p))


def detected(network: LabelPEnet, pixels: np.ndarray, proposals: Tensor, known: Tensor, image: TaggedImage) -> Scene:
    """Module 2's detections; module 1 only says how sure it is of each tag."""
    one, two = network.classification, network.detection
    batch = network.batch([pixels], [image.tags])
    (found,), _, _ = two.detect(batch)
    tail = two.tail(batch.stem)
    scores = torch.zeros(len(found.scores), len(network.classes))
    scores[torch.arange(len(scores)), found.labels] = found.scores

    def attend(kind: str, index: Tensor) -> Tensor:
        pooled = two.pool(tail, [batch.views[0].boxes(found.regions[index])])
        return roi_attention(two.head, two.classifier, pooled, found.labels[index] + 1, found.scores[index], kind)

    tags = tuple(sorted(set(found.labels.tolist())))
    share = scores / scores.sum(0).clamp(min=1e-9)
    return Scene(pixels, found.boxes, scores, found, tags, attend, share, one.image_probabilities(*one(known)))


def label(scene: Scene, variants: list[Variant]) -> list[Result]:
    """The instances of every variant; attention maps are computed once for each kind and choice."""
    maps: dict[Any, Tensor] = {}
    results = []
    for variant in variants:
        settings = variant.settings
        chosen = choose_instances(scene.found, settings, each_class=True)
        key = variant.kind, chosen.mapped.numpy().tobytes()
        if key not in maps:
            maps[key] = scene.attend(variant.kind, chosen.mapped)
        heat = scene.proposals, scene.scores
        found, trace = calibrate(scene.image, scene.found, chosen, maps[key], settings, heat)
        results.append(Result(found, trace.confidence, trace.marginals))
    return results


# -- against the annotation ------------------------------------------------------------------------------------------

ROW = [("variant", "i2"), ("image", "i4"), ("label", "i2"), ("first", "?"), ("right", "?"), ("iou", "f4")]
"""An instance, or a tag without one: ``iou`` of the mask, NaN where the image has no masks."""


def judge(found: Instances, truth: Truth, tags: tuple[int, ...]) -> list[tuple[int, bool, bool, float]]:
    """Label, whether it is the best of its class, box right, mask IoU; for each tag, best first, none as wrong."""
    rows = []
    for tag in tags:
        objects = truth.instances[truth.instances.labels == tag]
        mine = found[found.labels == tag]
        if not len(mine):
            rows.append((tag, True, False, 0.0 if truth.instances.masks is not None else np.nan))
        if not len(mine) or not len(objects):
            continue
        right = box_iou(mine.boxes.numpy(), objects.boxes.numpy()).max(1) >= 0.5
        overlap = np.full(len(mine), np.nan)
        if objects.masks is not None and mine.masks is not None:
            overlap = mask_iou(run_lengths(mine.masks), run_lengths(objects.masks)).max(1)
        rows += [(tag, i == 0, bool(right[i]), float(overlap[i])) for i in range(len(mine))]
    return rows


def candidates_for_weight(result: Result, scene: Scene) -> dict[str, Tensor]:
    """What might tell whether an instance is right: by name, (K,) in [0, 1]."""
    found = result.found
    labels = found.labels
    inside = result.marginals > 0.5
    confidence, eps = result.confidence, 1e-6

    def mean(maps: Tensor, where: Tensor) -> Tensor:
        return (maps * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=eps)

    overlap = torch.from_numpy(box_iou(found.boxes.numpy(), scene.proposals.numpy())).float()
    score = scene.scores[:, labels].T
    masks = found.masks
    assert masks is not None
    return {
        "score of the kept proposal": found.weights,
        "image probability": scene.probabilities[labels],
        "share of the proposals that its box matches": (scene.share[:, labels].T * (overlap >= 0.5)).sum(1),
        "mean score of the proposals that its box matches": (score * (overlap >= 0.5)).sum(1)
        / (overlap >= 0.5).sum(1).clamp(min=1),
        "best IoU of its box with a proposal": overlap.amax(1),
        "confidence inside less outside": (mean(confidence, inside) - mean(confidence, ~inside)).clamp(min=0),
        "confidence inside": mean(confidence, inside),
        "marginal inside": mean(result.marginals, inside),
        "mask's share of its box": masks.sum((1, 2))
        / ((found.boxes[:, 2] - found.boxes[:, 0]) * (found.boxes[:, 3] - found.boxes[:, 1])).clamp(min=1),
        "box's share of the image": (found.boxes[:, 2] - found.boxes[:, 0])
        * (found.boxes[:, 3] - found.boxes[:, 1])
        / (scene.image.shape[0] * scene.image.shape[1]),
    }


def corloc(rows: np.ndarray, what: str = "right") -> float:
    """CorLoc, or with ``what="iou"`` mean mask IoU, of the best instances, averaged over the classes."""
    rows = rows[rows["first"] & ~np.isnan(rows[what].astype(float))]
    return float(np.mean([rows[what][rows["label"] == c].mean() for c in np.unique(rows["label"])]))


def paired(rows: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """CorLoc of ``rows`` less that of ``base``, of the same images and tags, and the difference's standard error."""
    own, other = (
        np.sort(part[part["first"]], order=["label", "image"])[["label", "image", "right"]] for part in (rows, base)
    )
    gain = own["right"].astype(float) - other["right"]
    classes = [gain[own["label"] == c] for c in np.unique(own["label"])]
    error = np.sqrt(sum(part.var() / len(part) for part in classes)) / len(classes)
    return float(np.mean([part.mean() for part in classes])), float(error)


def variants_table(rows: np.ndarray, variants: list[Variant]) -> str:
    """A line a variant."""
    lines = ["| variant | CorLoc | mask IoU | CorLoc less the recipe's | on either half | further, right |"]
    lines.append("|---|---|---|---|---|---|")
    base = rows[rows["variant"] == 0]
    for number, variant in enumerate(variants):
        own = rows[rows["variant"] == number]
        same = base[np.isin(base["image"], own["image"])]
        gain, error = paired(own, same)
        halves = [
            paired(*(part[part["image"] // variant.every % 2 == half] for part in (own, same)))[0] for half in (0, 1)
        ]
        more = own[~own["first"]]
        further = f"{len(more)}, {more['right'].mean():.2f}" if len(more) else ""
        lines.append(
            f"| {variant.name} | {corloc(own):.3f} | {corloc(own, 'iou'):.3f} | {gain:+.3f} +- {error:.3f} "
            f"| {halves[0]:+.3f} {halves[1]:+.3f} | {further} |"
        )
    return "\n".join(lines)


def roc_area(values: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right instance has the larger value, ties counting half."""
    wrong = np.sort(values[~right])
    below, upto = np.searchsorted(wrong, values[right]), np.searchsorted(wrong, values[right], side="right")
    return float((below + upto).mean() / (2 * len(wrong)))


def calibration_error(values: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error over ten bins of equal width."""
    place = np.minimum((values * 10).astype(int), 9)
    gaps = [abs(values[place == b].mean() - right[place == b].mean()) * (place == b).sum() for b in np.unique(place)]
    return float(sum(gaps) / len(values))


def weights_table(values: dict[str, np.ndarray], right: np.ndarray) -> str:
    """A line a candidate, then the ten best geometric means of two; the curve is over tenths of the instances."""
    values = {name: np.clip(v, 0, 1) for name, v in values.items()}
    means = {f"{a} x {b}": np.sqrt(values[a] * values[b]) for a, b in itertools.combinations(values, 2)}
    best = sorted(means, key=lambda name: -roc_area(means[name], right))[:10]
    lines = ["| weight | AUC | ECE | mean value: fraction right, by tenths of the instances |", "|---|---|---|---|"]
    for name, value in [*values.items(), *((name, means[name]) for name in best)]:
        tenths = np.array_split(np.argsort(value, kind="stable"), 10)
        curve = " ".join(f"{value[part].mean():.2f}:{right[part].mean():.2f}" for part in tenths)
        lines.append(f"| {name} | {roc_area(value, right):.3f} | {calibration_error(value, right):.3f} | {curve} |")
    return "\n".join(lines)


def main() -> None:
    """Parses, labels the photographs, prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="train", help="the split that the run was trained on")
    parser.add_argument("--module", type=int, default=1, choices=(1, 2))
    parser.add_argument("--images", type=int, default=0, help="drawn at random; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command with --out goes on")
    parser.add_argument("--sample", type=int, default=10, help="excitation backprop on every so many-th of them")
    parser.add_argument("--cache", type=Path, help="folder of computed proposals")
    parser.add_argument("--out", type=Path, help="keeps the rows behind the tables (.npz) and goes on from there")
    one = parser.parse_args()
    predictor = Predictor(one.run, "cpu")
    network = predictor.cascade
    annotated = open_annotated(one.data, one.split, network.classes)
    images = annotated.tagged.images
    boxes = compute_proposals(images, network.recipe.proposals, one.cache)
    features = RoIFeatures(one.run, network, boxes, predictor.fabric)
    chosen = [index for index, image in enumerate(images) if image.tags]
    random.Random(one.seed).shuffle(chosen)  # what is there after any time is a fair sample
    chosen = chosen[: one.images or None]
    if one.module == 1:
        variants = classification_variants(network.recipe.modules[0].label, one.sample)
    else:
        variants = detection_variants(network.recipe.modules[1].label, one.sample)

    def measure(place: int) -> dict[str, np.ndarray]:
        image = images[chosen[place]]
        truth = annotated.read(image.id)
        pixels = read_image(image.path)
        proposals = network.select(boxes[image.id], pixels.shape)
        known = features.kept(image)
        if known is None:
            raise InputError(f"{one.run} does not hold the RoI features of {image.id}; choose the run's --split")
        mine = [number for number, variant in enumerate(variants) if place % variant.every == 0]
        with torch.no_grad(), predictor.fabric.autocast():
            scene = (classified if one.module == 1 else detected)(network, pixels, proposals, known, image)
            if not scene.tags:
                return {"rows": np.array([(n, place, tag, 1, 0, np.nan) for n in mine for tag in image.tags], ROW)}
            results = label(scene, [variants[number] for number in mine])
        rows = []
        for number, result in zip(mine, results, strict=True):
            order = result.found.weights.argsort(descending=True, stable=True)
            rows += [(number, place, *row) for row in judge(result.found[order], truth, image.tags)]
        first = results[0]
        judged = [judge(first.found[i], truth, (int(first.found.labels[i]),)) for i in range(len(first.found))]
        keep = [i for i, row in enumerate(judged) if row]
        return {
            "rows": np.array(rows, ROW),
            "judged": np.array([(0, place, *judged[i][0]) for i in keep], ROW),
            **{name: value.numpy()[keep] for name, value in candidates_for_weight(first, scene).items()},
        }

    kept = read_rows(one.out, [v.name for v in variants])
    missing = [place for place in range(len(chosen)) if place not in set(kept["rows"]["image"].tolist())]
    began = saved = time.monotonic()
    with contextlib.closing(map_images(measure, missing, network.device)) as results:
        for done, part in enumerate(results, 1):
            for name, more in part.items():
                kept[name] = np.concatenate([kept[name], more]) if name in kept else more
            now = time.monotonic()
            over = done == len(missing) or (one.minutes is not None and now - began > 60 * one.minutes)
            if over or now - saved > 30:
                print(f"{done} of {len(missing)}, {now - began:.0f} s", flush=True)
                saved = now
                if one.out:
                    write_rows(one.out, kept)
            if over:
                break
    rows, judged = kept.pop("rows"), kept.pop("judged")
    kept.pop("names")
    count = len(np.unique(rows["image"]))
    print(f"\nmodule {one.module}, {count} images of {one.split}\n\n{variants_table(rows, variants)}\n")
    print(f"{len(judged)} instances, {judged['right'].mean():.3f} right\n\n{weights_table(kept, judged['right'])}")


def read_rows(path: Path | None, names: list[str]) -> dict[str, np.ndarray]:
    """What an earlier call kept in ``path``, or nothing: rows, instances, and their candidates for the weight by name.

    Raises:
        SystemExit: the file is of other variants.
    """
    kept = {"rows": np.zeros(0, ROW), "judged": np.zeros(0, ROW), "names": np.array(names)}
    if path is not None and path.is_file():
        with np.load(path) as file:
            kept = {name: file[name] for name in file.files}
        if kept["names"].tolist() != names:
            raise SystemExit(f"{path}: was written for other variants; give another --out or delete it")
    return kept


def write_rows(path: Path, kept: dict[str, np.ndarray]) -> None:
    """Writes what `read_rows` reads, whole or not at all."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **kept)  # type: ignore[arg-type]
    temporary.replace(path)


if __name__ == "__main__":
    main()
