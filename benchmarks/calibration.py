"""Proposal calibration: excitation backprop, dense CRF, and the whole of one image, timed in one run.

    python benchmarks/calibration.py ../shared/data/voc-animals/VOCdevkit/VOC2012 --run runs/voc-animals

Prints the tables of `benchmarks/excitation.py` and `benchmarks/crf.py` and, given a run, median seconds of each step
from RoI features to instances (module 1, the photographs at their own size).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from labelpenet.data import open_tagged, read_image
from labelpenet.data.proposals import compute_proposals, default_cache
from labelpenet.models.cascade import proposal_settings
from labelpenet.training.predict import Predictor


def whole_image(run: Path, data: Path, images: int) -> str:
    """Median seconds of RoI features and of calibration (attention, maps, CRF, masks) of module 1."""
    predictor = Predictor(run, "cpu")
    network = predictor.network
    chosen = open_tagged(data, "train", network.classes).images[:images]
    boxes = compute_proposals(chosen, proposal_settings(network.recipe), default_cache())
    features_s, calibration_s = [], []
    for image in chosen:
        pixels = read_image(image.path)
        proposals = network.select(torch.from_numpy(boxes[image.id].copy()), pixels.shape)
        with torch.no_grad(), predictor.fabric.autocast():
            began = time.perf_counter()
            view = network.view(pixels)
            features = network.classification.features(network.stem_map(view), view.boxes(proposals)).float()
            middle = time.perf_counter()
            network.infer_classification(pixels, proposals, image.tags, features)
            calibration_s.append(time.perf_counter() - middle)
            features_s.append(middle - began)
    return (
        f"one image, module 1, median of {len(chosen)}: RoI features {statistics.median(features_s):.3f} s, "
        f"calibration from them {statistics.median(calibration_s):.3f} s"
    )


def main() -> None:
    """Runs the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--run", type=Path, help="a trained run, for the whole of one image")
    parser.add_argument("--images", type=int, default=20)
    one = parser.parse_args()
    here = Path(__file__).parent
    for script in ("excitation.py", "crf.py"):
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, str(here / script)], check=True)
    if one.run:
        print("== whole image", flush=True)
        print(whole_image(one.run, one.data, one.images))


if __name__ == "__main__":
    main()
