"""Proposal calibration: excitation backprop, dense CRF, and the whole of one image, timed in one run.

    pip install pydensecrf2
    python benchmarks/calibration.py VOCdevkit/VOC2012 --run runs/voc-animals            about ten minutes
    python benchmarks/calibration.py VOCdevkit/VOC2012 --run runs/voc-animals --short    a minute: does it run?

Prints the tables of `benchmarks/excitation.py` and `benchmarks/crf.py` (medians and ratios; TorchRay and pydensecrf are
compared with where they are installed) and, given a run, what module 1 takes from RoI features to instances, for the
run's own calibration and for the paper's (excitation backprop, CRF at full size).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from labelpenet import config
from labelpenet.calibration.calibrate import segment, working_canvas
from labelpenet.config import AttentionCalibration
from labelpenet.data import read_image
from labelpenet.data.dataset import TaggedImage
from labelpenet.data.proposals import compute_proposals, default_cache
from labelpenet.formats import open_tagged
from labelpenet.models.attention import roi_attention
from labelpenet.models.cascade import LabelPEnet
from labelpenet.training.predict import Predictor

T = TypeVar("T")
STEPS = ("RoI features", "calibration", "of it attention maps", "of it dense CRF")


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What the call returns, and its milliseconds by the wall clock."""
    began = time.perf_counter()
    result = run()
    return result, 1e3 * (time.perf_counter() - began)


def one_image(
    network: LabelPEnet, image: TaggedImage, proposals: Tensor, settings: AttentionCalibration, kind: str
) -> tuple[float, ...]:
    """Milliseconds of `STEPS` for module 1."""
    one, pixels = network.classification, read_image(image.path)
    batch = network.batch([pixels], [image.tags], [proposals])
    features, features_ms = timed(lambda: one.features(batch))
    known = replace(batch, features=[features[0].float()])
    attention_ms = 0.0

    def attend(head: Any, classifier: Any, pooled: Tensor, outputs: Tensor, scores: Tensor, own: str) -> Tensor:
        nonlocal attention_ms
        maps, attention_ms = timed(lambda: roi_attention(head, classifier, pooled, outputs, scores, kind))
        return maps

    with patch("labelpenet.models.classification.roi_attention", attend):
        ((_, trace),), whole_ms = timed(lambda: one.infer(known, settings))
    canvas, _ = working_canvas(pixels, settings.side)
    _, crf_ms = timed(lambda: segment(canvas, trace.confidence, settings))
    return features_ms, whole_ms, attention_ms, crf_ms


def whole_image(run: Path, data: Path, cache: Path, images: int) -> None:
    """Prints medians over the first images of the training split, one row for each of the two calibrations."""
    predictor = Predictor(run, "cpu")
    network = predictor.cascade
    recipe = network.recipe
    chosen = [image for image in open_tagged(data, "train", network.classes).images if image.tags][:images]
    boxes = compute_proposals(chosen, recipe.proposals, cache)
    paper = config.Recipe()
    kinds = {
        f"the run's ({recipe.name})": (recipe.modules[0].label, recipe.modules[0].attention),
        "the paper's": (paper.modules[0].label, paper.modules[0].attention),
    }
    print(f"milliseconds for one photograph, medians of {len(chosen)}, {recipe.proposals.limit} proposals at most")
    print(f"{'':24}" + "".join(f"{step:>22}" for step in STEPS))
    for name, (choice, kind) in kinds.items():
        times = []
        for image in chosen:
            proposals = network.select(boxes[image.id], read_image(image.path).shape)
            with torch.no_grad(), predictor.fabric.autocast():
                times.append(one_image(network, image, proposals, choice, kind))
        print(
            f"{name:24}" + "".join(f"{statistics.median(step):22.0f}" for step in zip(*times, strict=True)), flush=True
        )


def main() -> None:
    """Runs the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help=".../VOCdevkit/VOC2012")
    parser.add_argument("--run", type=Path, help="a trained run, for the whole of one image")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of computed proposals")
    parser.add_argument("--images", type=int, default=20, help="photographs of the whole")
    parser.add_argument("--short", action="store_true", help="200 proposals, one photograph, one round: does it run?")
    one = parser.parse_args()
    photographs = ["--photographs", str(one.data / "JPEGImages")]
    parts = {
        "excitation.py": ["--proposals", "200", "--rounds", "1", "--single", "2"] if one.short else [],
        "crf.py": [*photographs, *(["--images", "1", "--rounds", "1"] if one.short else [])],
    }
    for script, arguments in parts.items():
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).parent / script), *arguments], check=True)
    if one.run:
        print("== whole image", flush=True)
        whole_image(one.run, one.data, one.cache, 2 if one.short else one.images)


if __name__ == "__main__":
    main()
