"""Writes ``fixtures/crf_*.npz``: what pydensecrf computes for a few small generated images.

    pip install pydensecrf2==1.1 && python tests/calibration/make_crf_fixtures.py

Seconds. Each file holds ``image`` (H, W, 3) uint8, ``probabilities`` (K, H, W) float16, ``marginals`` (K, H, W) float32
and the parameters, under the names that `labelpenet.calibration.crf.dense_crf` gives them. The files in the repository
were made by pydensecrf2 1.1 (built by GCC with its default flags on x86-64, so its SSE2 lattice) with NumPy 2.4.

The images are sums of smooth waves, a disc and noise; `noise` and `narrow` are noise alone, `flat` is one colour, where
every colour coordinate ties. pydensecrf pads the pixels to a multiple of four with black ones at the origin, which may
add lattice vertices that no pixel needs; `odd` has 891 pixels and is not touched by that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydensecrf.densecrf as peer
from pydensecrf.utils import unary_from_softmax

FIXTURES = Path(__file__).parent / "fixtures"
DEFAULTS: dict[str, Any] = {
    "iterations": 10,
    "sxy_gaussian": 3.0,
    "compat_gaussian": 3.0,
    "sxy_bilateral": 80.0,
    "srgb": 13.0,
    "compat_bilateral": 10.0,
}


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: smooth waves, a disc of another colour, noise."""
    y, x = np.mgrid[:height, :width]
    waves = sum(
        rng.uniform(10, 30, 3) * np.sin(x[..., None] * rng.uniform(-0.2, 0.2) + y[..., None] * rng.uniform(-0.2, 0.2))
        for _ in range(4)
    )
    disc = ((x - 0.6 * width) ** 2 + (y - 0.4 * height) ** 2 < (0.3 * height) ** 2)[..., None]
    colour = np.where(disc, rng.uniform(150, 220, 3), rng.uniform(40, 110, 3))
    return np.clip(colour + waves + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def guesses(rng: np.random.Generator, labels: int, height: int, width: int) -> np.ndarray:
    """(K, H, W) float16 probabilities: a softmax over smooth random maps."""
    y, x = np.mgrid[:height, :width]
    centres = rng.uniform(0, 1, (labels, 2)) * (height, width)
    distances = np.stack([np.hypot(y - cy, x - cx) for cy, cx in centres]) / height
    scores = np.exp(-4 * distances + rng.normal(0, 0.3, distances.shape))
    return (scores / scores.sum(0)).astype(np.float16)


def marginals(image: np.ndarray, probabilities: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    """(K, H, W) float32: pydensecrf's."""
    labels, height, width = probabilities.shape
    crf = peer.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(unary_from_softmax(probabilities.astype(np.float32)))
    crf.addPairwiseGaussian(parameters["sxy_gaussian"], parameters["compat_gaussian"])
    crf.addPairwiseBilateral(parameters["sxy_bilateral"], parameters["srgb"], image, parameters["compat_bilateral"])
    return np.array(crf.inference(parameters["iterations"])).reshape(probabilities.shape)


def main() -> None:
    rng = np.random.default_rng(7)
    costs = np.array([[0, 4, 9], [2, -1, 5], [9, 5, 0]], np.float32)
    cases: dict[str, tuple[np.ndarray, int, dict[str, Any]]] = {
        "defaults": (photograph(rng, 72, 96), 2, {}),
        "labels": (photograph(rng, 40, 50), 5, {"sxy_gaussian": 2.0, "sxy_bilateral": 30.0, "srgb": 7.0}),
        "odd": (photograph(rng, 33, 27), 3, {"compat_gaussian": costs / 3, "compat_bilateral": costs}),
        "noise": (rng.integers(0, 256, (40, 30, 3), dtype=np.uint8), 2, {}),
        "narrow": (rng.integers(0, 256, (24, 30, 3), dtype=np.uint8), 4, {"sxy_bilateral": 2.0, "srgb": 0.5}),
        "flat": (np.full((32, 17, 3), 255, np.uint8), 2, {}),
        "tall": (photograph(rng, 300, 4), 2, {"iterations": 3}),
    }
    FIXTURES.mkdir(exist_ok=True)
    for name, (image, labels, changes) in cases.items():
        parameters = DEFAULTS | changes
        probabilities = guesses(rng, labels, *image.shape[:2])
        expected = marginals(image, probabilities, parameters)
        np.savez_compressed(
            FIXTURES / f"crf_{name}.npz", image=image, probabilities=probabilities, marginals=expected, **parameters
        )


if __name__ == "__main__":
    main()
