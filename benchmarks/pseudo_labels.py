"""Quality of what a trained module passes on, for several settings of its inference, against withheld annotation.

    python benchmarks/pseudo_labels.py runs/voc-animals VOCdevkit/VOC2012 --module 1 --images 150 \
        --variants infer1.background=0.2 infer1.background=0.3 infer1.combine=product,infer1.background=0.15

The annotation is used for analysis only. Prints, for each variant, CorLoc of the best instance of each tag, mean IoU of
its mask with the best object of its class (both averaged over the classes), the fraction of further instances that are
right, and how often the instances are right by quartile of their weight.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch

from labelpenet import config
from labelpenet.data import open_annotated, read_image
from labelpenet.data.dataset import Truth
from labelpenet.data.proposals import compute_proposals, default_cache
from labelpenet.evaluation import box_iou, mask_iou
from labelpenet.instances import Instances, encode_masks
from labelpenet.models.cascade import proposal_settings
from labelpenet.training.predict import Predictor


def judge(found: Instances, truth: Truth, tags: tuple[int, ...]) -> list[dict[str, float]]:
    """For each tag and instance: class, whether it is the best of its class, box right, mask IoU, weight."""
    rows = []
    for label in tags:
        objects = truth.instances[truth.instances.labels == label]
        mine = found[found.labels == label]
        mine = mine[mine.weights.argsort(descending=True, stable=True)]
        if not len(mine):
            rows.append({"label": label, "first": 1, "right": 0, "iou": 0.0, "weight": 0.0})
        if not len(mine) or not len(objects):
            continue
        right = box_iou(mine.boxes.numpy(), objects.boxes.numpy()).max(1) >= 0.5
        assert mine.masks is not None and objects.masks is not None
        overlap = mask_iou(encode_masks(mine.masks), encode_masks(objects.masks)).max(1)
        rows += [
            {"label": label, "first": int(i == 0), "right": int(right[i]), "iou": overlap[i], "weight": weight}
            for i, weight in enumerate(mine.weights.tolist())
        ]
    return rows


def summary(rows: list[dict[str, float]]) -> str:
    """One line: CorLoc, mask IoU, further instances, right by quartile of the weight."""
    classes = sorted({row["label"] for row in rows})
    first = [row for row in rows if row["first"]]
    corloc = np.mean([np.mean([row["right"] for row in first if row["label"] == c]) for c in classes])
    iou = np.mean([np.mean([row["iou"] for row in first if row["label"] == c]) for c in classes])
    further = [row["right"] for row in rows if not row["first"]]
    ordered = sorted(rows, key=lambda row: row["weight"])
    quarters = [np.mean([row["right"] for row in part]) for part in np.array_split(np.array(ordered), 4)]
    more = f"{np.mean(further):.2f} of {len(further)}" if further else "none"
    by_weight = " ".join(f"{quarter:.2f}" for quarter in quarters)
    return f"CorLoc {corloc:.3f}  mask IoU {iou:.3f}  further right {more}  right by quartile of weight {by_weight}"


def main() -> None:
    """Parses, runs every variant on the same images, prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--module", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--images", type=int, default=150, help="drawn from those that have instance masks; 0 for all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--variants", nargs="*", default=[], help="settings separated by commas, as for train --set")
    one = parser.parse_args()
    predictor = Predictor(one.run, "cpu")
    network = predictor.network
    annotated = open_annotated(one.data, one.split, network.classes)
    images = list(annotated.tagged.images)
    random.Random(one.seed).shuffle(images)
    chosen = []
    for image in images:
        truth = annotated.read(image.id)
        if truth.instances.masks is not None and image.tags:
            chosen.append((image, truth))
        if one.images and len(chosen) == one.images:
            break
    boxes = compute_proposals([image for image, _ in chosen], proposal_settings(network.recipe), default_cache())
    base = network.recipe
    for variant in ["", *one.variants]:
        network.recipe = config.override(base, [part for part in variant.split(",") if part])
        began, rows = time.perf_counter(), []
        for image, truth in chosen:
            pixels = read_image(image.path)
            proposals = network.select(torch.from_numpy(boxes[image.id].copy()), pixels.shape)
            with predictor.fabric.autocast():
                found, _ = network.infer(one.module, pixels, proposals, image.tags)
            rows += judge(found, truth, image.tags)
        seconds = (time.perf_counter() - began) / len(chosen)
        print(f"{variant or 'as trained':50} {summary(rows)}  {seconds:.2f} s/image", flush=True)


if __name__ == "__main__":
    main()
