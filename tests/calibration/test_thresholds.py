"""Thresholds that a module finds by itself: on photographs of which the right one is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from labelpenet.calibration.calibrate import segment
from labelpenet.calibration.thresholds import CHOICES, START, choose_thresholds, judge
from labelpenet.config import Calibration, best

CRF = best().modules[2].label


def disc(radius: float = 30.0, size: tuple[int, int] = (120, 150)) -> tuple[np.ndarray, Tensor]:
    """A bright disc on dark, noisy ground, and each pixel's distance from its middle in radii."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    distance = np.hypot(y - size[0] / 2, x - size[1] / 2) / radius
    noise = np.random.default_rng(0).normal(0, 6, (*size, 3))
    canvas = np.where(distance[..., None] < 1, (210, 160, 60), (40, 60, 90)) + noise
    return canvas.clip(0, 255).astype(np.uint8), torch.from_numpy(distance).float()


@pytest.mark.parametrize("iterations", [0, 10])
@pytest.mark.parametrize("edge", [0.3, 0.5, 0.65])
def test_the_threshold_is_found_at_which_the_mask_ends_on_the_edge(edge, iterations):
    canvas, distance = disc()
    confidence = (edge - 0.6 * (distance - 1)).clamp(0, 1)[None]  # equals `edge` on the disc's border
    settings = replace(CRF, iterations=iterations)
    fits = judge(canvas, confidence, settings)
    assert fits.shape == (1, len(CHOICES)) and fits.max() == 1 and (fits > 0).all()
    chosen = choose_thresholds([(0, fits[0])], 1)
    mask = segment(canvas, confidence, replace(settings, joint=False, threshold="auto"), None, chosen)[0] > 0.5
    truth = distance < 1
    overlap = (mask & truth).sum() / (mask | truth).sum()
    assert overlap > 0.9
    if not iterations:  # the CRF alone carries most masks to so clear an edge
        assert float(chosen[0]) == pytest.approx(edge, abs=0.051)


def test_each_class_finds_its_own_threshold():
    canvas, distance = disc()
    spread = torch.stack([(edge - 0.6 * (distance - 1)).clamp(0, 1) for edge in (0.3, 0.6)])
    fits = judge(canvas, spread, replace(CRF, iterations=0))
    assert torch.allclose(fits, torch.cat([judge(canvas, one[None], replace(CRF, iterations=0)) for one in spread]))
    many = [(label, fits[label]) for label in (0, 1) for _ in range(20)]
    assert choose_thresholds(many, 3).tolist()[:2] == pytest.approx([0.3, 0.6], abs=0.051)


def test_a_class_with_few_instances_listens_to_all():
    def peak(at: int) -> Tensor:
        return torch.tensor([1 - 0.08 * abs(at - index) for index in range(len(CHOICES))])

    many, one = [(0, peak(2)) for _ in range(60)], [(1, peak(7))]
    found = choose_thresholds(many + one, 3)
    assert found[0] == pytest.approx(CHOICES[2]) and found[1] < CHOICES[7]
    assert found[2] == pytest.approx(CHOICES[2])  # without any instance of its own
    assert choose_thresholds(many + one * 60, 3)[1] == pytest.approx(CHOICES[7])
    assert choose_thresholds([], 2).tolist() == pytest.approx([START] * 2)


def test_an_empty_or_a_flat_photograph_is_no_error():
    canvas = np.full((40, 50, 3), 128, np.uint8)
    assert judge(canvas, torch.zeros(0, 40, 50), CRF).shape == (0, len(CHOICES))
    for value in (0.0, 1.0):  # a mask of nothing, and one of the whole photograph
        fits = judge(canvas, torch.full((1, 40, 50), value), CRF)
        assert bool(torch.isfinite(fits).all()) and fits.shape == (1, len(CHOICES))


def test_without_a_class_threshold_auto_is_refused():
    with pytest.raises(ValueError, match="auto"):
        segment(np.zeros((8, 8, 3), np.uint8), torch.full((1, 8, 8), 0.4), Calibration(threshold="auto", iterations=0))
