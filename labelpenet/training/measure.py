"""Measures every module of a finished run. The only place beside `evaluate` where annotation is read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labelpenet.data import read_image
from labelpenet.data.dataset import TaggedImage
from labelpenet.data.proposals import compute_proposals, default_cache
from labelpenet.evaluation import cascade_table, classification_ap, evaluate
from labelpenet.formats import open_annotated, open_tagged, read_predictions, write_predictions
from labelpenet.instances import Instances
from labelpenet.models.cascade import LabelPEnet, proposal_settings, read_run
from labelpenet.models.student import Student, weights_path
from labelpenet.training.checkpoint import write_atomically
from labelpenet.training.inferred import path_of, read_inferred
from labelpenet.training.logging import Progress
from labelpenet.training.machine import map_images
from labelpenet.training.predict import Predictor
from labelpenet.training.pretrain import Boxes


def measure_run(
    run: Path,
    data: Path,
    split: str = "val",
    train_split: str | None = "train",
    modules: Sequence[int] = (1, 2, 3, 4),
    protocol: str = "voc12",
    device: str = "auto",
    cache: Path | None = None,
) -> str:
    """Predicts a held-out split with every module and measures it, and the instances of the training images.

    Writes ``RUN/predictions/SPLIT-moduleK.json`` (kept if it is there) and ``RUN/results.json``. Of a student only the
    held-out split is measured; it stands in the place of module 4.

    Returns:
        The table, one row a module; the first row is module 1 before calibration.
    """
    facts = read_run(run)
    classes = facts["classes"]
    predictor = Predictor(run, device)
    student = isinstance(predictor.network, Student)
    modules = (4,) if student else modules
    held_out = open_annotated(data, split, classes)
    train = open_annotated(data, train_split, classes)
    images = held_out.tagged.images
    boxes: Boxes = {}
    if isinstance(predictor.network, LabelPEnet):
        settings = proposal_settings(predictor.network.recipe)
        boxes = compute_proposals(images, settings, cache or default_cache(), progress=True)
    truths, _ = held_out.readable_truths()
    train_truths, _ = train.readable_truths()
    results: dict[str, Any] = {"split": split, "protocol": protocol, "train": {}, "val": {}}
    for number in modules:
        inferred = path_of(run, f"module{number}")
        if not student and not inferred.is_file():
            continue
        if not student:
            labels = read_inferred(run, f"module{number}", len(classes))
            results["train"][str(number)] = evaluate(labels, train_truths, classes, "voc12")
        path = run / "predictions" / f"{Path(split).stem}-module{number}.json"
        made_of = weights_path(run) if student else inferred
        if not path.is_file() or path.stat().st_mtime < made_of.stat().st_mtime:
            path.parent.mkdir(exist_ok=True)
            pairs = ((image.id, found) for image, found in predictor.run(images, number, [], boxes))
            write_predictions(path, pairs, images, classes)
        found = read_predictions(path, images, classes, list(range(1, len(classes) + 1)))
        results["val"]["student" if student else str(number)] = evaluate(found, truths, classes, protocol)  # type: ignore[arg-type]
    if isinstance(predictor.network, LabelPEnet) and 1 in modules and path_of(run, "module1").is_file():
        readable = [image for image in images if image.id in boxes]
        ranked, probabilities = rank_images(predictor, readable, boxes)
        tags = np.array([[label in image.tags for label in range(len(classes))] for image in readable])
        results["classification_mAP"] = float(np.nanmean(classification_ap(probabilities, tags)))
        training = open_tagged(data, train_split, classes).images
        train_boxes = compute_proposals(
            training, proposal_settings(predictor.network.recipe), cache or default_cache(), progress=True
        )
        learnt = [image for image in training if image.id in train_boxes]
        top, _ = rank_images(predictor, learnt, train_boxes, run / "cache" / "features")
        results["uncalibrated"] = {
            "train": evaluate(top, train_truths, classes, "voc12"),
            "val": evaluate(ranked, truths, classes, protocol),  # type: ignore[arg-type]
        }
    write_atomically(run / "results.json", json.dumps(results, indent=1))
    return render(results)


def rank_images(
    predictor: Predictor, images: Sequence[TaggedImage], boxes: Boxes, features: Path | None = None
) -> tuple[dict[str, Instances], np.ndarray]:
    """Module 1 before calibration: ranked proposals by image id, and class probabilities (I, C).

    Args:
        features: folder of the training images' cached RoI features, in their order; used where complete.
    """
    network = predictor.network
    assert isinstance(network, LabelPEnet)
    cached = features is not None and features.is_dir() and len(list(features.glob("*.npy"))) == len(images)

    def rank(index: int) -> tuple[Instances, np.ndarray]:
        image = images[index]
        pixels = read_image(image.path)
        chosen = network.select(torch.from_numpy(boxes[image.id].copy()), pixels.shape)
        known = None
        if cached and features is not None:
            known = torch.from_numpy(np.load(features / f"{index}.npy")).float().to(network.device)
        with predictor.fabric.autocast():
            found, share = network.rank_proposals(pixels, chosen, None, known)
        return found, share.cpu().numpy()

    ranked, probabilities = {}, []
    with (
        Progress("module 1 ranks proposals", len(images), 0) as progress,
        contextlib.closing(map_images(rank, range(len(images)), network.device)) as results,
    ):
        for done, (found, share) in enumerate(results):
            ranked[images[done].id] = found
            probabilities.append(share)
            progress.show(done + 1, {})
    return ranked, np.array(probabilities)


def render(results: dict[str, Any]) -> str:
    """The table of a run's results as text."""
    train, val = dict(results["train"]), dict(results["val"])
    if "uncalibrated" in results:
        train = {"1, top proposals": results["uncalibrated"]["train"], **train}
        val = {"1, top proposals": results["uncalibrated"]["val"], **val}
    lines = [cascade_table(train, val).render("text")]
    if "classification_mAP" in results:
        lines.append(f"module 1 classifies images at mAP {100 * results['classification_mAP']:.1f}")
    return "\n".join(lines)
