"""Degenerate input to the whole of proposal calibration: a defined result, or one clear error.

What single parts do with it is tested beside each part (`test_excitation`, `test_maps`, `test_crf`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from labelpenet.calibration import (
    dense_crf,
    excitation_backprop,
    heat_map,
    project_maps,
)
from labelpenet.config import AttentionCalibration
from labelpenet.instances import Instances, masks_to_boxes
from tests.calibration.chain import run_chain

SIZE = (24, 32)
CHOICES = [
    AttentionCalibration(per_class=1, iterations=2),
    AttentionCalibration(
        per_class=1, iterations=2, combine="mean", members="class", threshold=0.3, side=16, min_component=0.2
    ),
    AttentionCalibration(iterations=2, combine="mean", compete="classes", per_class=3, mask_nms=0.5, min_score=0.1),
    AttentionCalibration(per_class=1, iterations=0, combine="mean", threshold=0.4, box="proposal"),
]


def picture(size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)


def ones(index: Tensor, labels: Tensor) -> Tensor:
    return torch.ones(len(index), 7, 7)


def run(boxes: Tensor, scores: Tensor, tags: tuple[int, ...] | None = (0,), **changes) -> list[Instances]:
    """The instances by every choice, each checked to be usable."""
    image, attend = changes.get("image", picture()), changes.get("attend", ones)
    results = []
    for choice in CHOICES:
        found, trace = run_chain(image, boxes, scores, tags, attend, choice)
        found.validate(scores.shape[1])
        assert found.image_size == image.shape[:2] and found.masks is not None
        assert found.masks.flatten(1).any(1).all()
        if choice.box == "mask":
            assert torch.equal(found.boxes, masks_to_boxes(found.masks))
        for maps in (trace.attention, trace.heat, trace.confidence, trace.marginals):
            assert len(maps) == len(found) and bool(((maps >= 0) & (maps <= 1)).all())
        results.append(found)
    return results


def test_no_proposal() -> None:
    for tags in ((0,), (0, 1), None, ()):
        assert all(len(found) == 0 for found in run(torch.zeros(0, 4), torch.zeros(0, 2), tags))


def test_no_tag() -> None:
    assert all(len(found) == 0 for found in run(torch.tensor([[2.0, 2, 20, 20]]), torch.ones(1, 2), ()))


def test_no_class() -> None:
    assert all(len(found) == 0 for found in run(torch.tensor([[2.0, 2, 20, 20]]), torch.ones(1, 0), None))


def test_one_proposal_serves_every_tag() -> None:
    for found in run(torch.tensor([[4.0, 3, 20, 15]]), torch.tensor([[0.9, 0.2]]), (0, 1)):
        assert found.labels.tolist() == [0, 1] and found.weights.tolist() == pytest.approx([0.9, 0.2])


def test_a_box_of_one_pixel() -> None:
    for found in run(torch.tensor([[7.0, 5, 8, 6]]), torch.tensor([[0.9]])):
        assert found.masks is not None and found.masks[0, 5, 7]


@pytest.mark.parametrize(
    "box",
    [
        [-30.0, -30, -10, -10],
        [100.0, 100, 120, 120],
        [-5.0, -5, 40, 30],
        [28.0, 20, 60, 60],
        [-9.0, 4, -1, 9],
        [3.0, 3, 3, 9],  # no area
        [9.0, 9, 3, 3],  # turned over
        [3.2, 4.7, 3.4, 4.9],  # between the pixels' centres
        [-1e30, -1e30, 1e30, 1e30],
    ],
)
def test_proposals_that_leave_the_image_or_have_no_area(box: list[float]) -> None:
    for found in run(torch.tensor([box]), torch.tensor([[0.9]])):
        assert len(found) == 1
    both = torch.tensor([box, [4.0, 3, 20, 15]])
    for found in run(both, torch.tensor([[0.9, 0.1], [0.2, 0.8]]), (0, 1)):
        assert set(found.labels.tolist()) == {0, 1}


def test_the_proposals_box_is_clipped_to_the_image() -> None:
    choice = CHOICES[3]
    found, _ = run_chain(picture(), torch.tensor([[-5.0, 2.5, 40, 12]]), torch.tensor([[0.9]]), (0,), ones, choice)
    assert found.boxes.tolist() == [[0.0, 2.5, 32.0, 12.0]]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_images_of_a_few_pixels(size: tuple[int, int]) -> None:
    height, width = size
    boxes = torch.tensor([[0.0, 0, width, height], [0.2, 0.2, 0.4, 0.4], [-3, -3, 9, 9]])
    for found in run(boxes, torch.tensor([[0.9, 0.1], [0.3, 0.6], [0.5, 0.5]]), (0, 1), image=picture(size)):
        assert set(found.labels.tolist()) == {0, 1}


@pytest.mark.parametrize("score", [0.0, 1.0, 1e-30])
def test_all_scores_alike(score: float) -> None:
    boxes = torch.tensor([[4.0, 3, 20, 15], [6.0, 3, 22, 15], [0, 0, 32, 24]])
    for found in run(boxes, torch.full((3, 2), score), (0, 1)):
        assert set(found.labels.tolist()) == {0, 1} and found.weights.tolist() == pytest.approx([score] * len(found))


def test_the_same_proposal_many_times() -> None:
    boxes = torch.tensor([[4.0, 3, 20, 15]]).repeat(50, 1)
    assert all(len(found) == 1 for found in run(boxes, torch.full((50, 1), 0.7)))


def test_attention_maps_of_zeros_and_of_one_cell() -> None:
    boxes = torch.tensor([[4.0, 3, 20, 15], [6.0, 3, 22, 15]])
    scores = torch.tensor([[0.9], [0.8]])
    for attend in (lambda i, c: torch.zeros(len(i), 7, 7), lambda i, c: torch.ones(len(i), 1, 1)):
        assert all(len(found) == 1 for found in run(boxes, scores, attend=attend))


def test_a_tag_that_every_proposal_rules_out() -> None:
    for found in run(
        torch.tensor([[4.0, 3, 20, 15], [6.0, 3, 22, 15]]), torch.tensor([[0.9, 0.0], [0.8, 0.0]]), (0, 1)
    ):
        assert set(found.labels.tolist()) == {0, 1} and float(found.weights[found.labels == 1][0]) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("choice", CHOICES)
def test_numbers_that_are_none(bad: float, choice: AttentionCalibration) -> None:
    boxes, scores = torch.tensor([[4.0, 3, 20, 15], [0, 0, 9, 9]]), torch.tensor([[0.9], [0.8]])
    with pytest.raises(ValueError, match="boxes must be finite"):
        run_chain(picture(), boxes.index_fill(1, torch.tensor([2]), bad), scores, (0,), ones, choice)
    with pytest.raises(ValueError, match="scores must be finite"):
        run_chain(picture(), boxes, scores.index_fill(0, torch.tensor([1]), bad), (0,), ones, choice)
    with pytest.raises(ValueError, match="regions must be finite"):
        regions = boxes.index_fill(1, torch.tensor([2]), bad)
        run_chain(picture(), boxes, scores, (0,), ones, choice, regions)
    with pytest.raises(ValueError, match="maps must be finite"):
        run_chain(picture(), boxes, scores, (0,), lambda i, c: torch.full((len(i), 7, 7), bad), choice)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"boxes": torch.zeros(3, 5)}, r"boxes must be \(R, 4\) and scores .* got \(3, 5\)"),
        ({"scores": torch.zeros(2, 2)}, r"scores \(R, C\), but got .* \(2, 2\)"),
        ({"tags": (0, 2)}, r"classes must be in \[0, 2\), but got \(0, 2\)"),
        ({"tags": (-1,)}, r"classes must be in \[0, 2\), but got \(-1,\)"),
        ({"image": np.zeros(SIZE, np.uint8)}, r"image must be \(H, W, 3\) uint8"),
        ({"image": np.zeros((*SIZE, 3), np.float32)}, r"image must be \(H, W, 3\) uint8"),
        ({"image": np.zeros((0, 5, 3), np.uint8)}, r"image must be \(H, W, 3\) uint8"),
        ({"attend": lambda i, c: torch.ones(len(i) + 1, 7, 7)}, r"maps must be \(3, a, a\), but got \(4, 7, 7\)"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict, message: str) -> None:
    given = {
        "image": picture(),
        "boxes": torch.tensor([[4.0, 3, 20, 15]]).repeat(3, 1),
        "scores": torch.full((3, 2), 0.5),
        "tags": (0,),
        "attend": ones,
        "settings": replace(CHOICES[1], members="class"),
    }
    with pytest.raises(ValueError, match=message):
        run_chain(**(given | changes))


def test_repeated_tags_are_one() -> None:
    boxes, scores = torch.tensor([[4.0, 3, 20, 15]]), torch.tensor([[0.9, 0.4]])
    assert all(found.labels.tolist() == [1] for found in run(boxes, scores, (1, 1)))


def test_the_parts_agree_on_nothing() -> None:
    """What each public part makes of nothing or of zeros; never NaN."""
    assert torch.equal(project_maps(torch.zeros(0, 7, 7), torch.zeros(0, 4), SIZE), torch.zeros(1, *SIZE))
    assert torch.equal(heat_map(torch.zeros(0, 4), torch.zeros(0, 2), SIZE), torch.zeros(2, *SIZE))
    layers = [nn.Flatten(), nn.Linear(8, 4), nn.ReLU()]
    assert excitation_backprop(layers, torch.zeros(0, 8), torch.zeros(0, 4)).shape == (0, 8)
    assert not excitation_backprop(layers, torch.zeros(3, 8), torch.ones(3, 4)).any()
    marginals = dense_crf(picture((1, 1)), torch.tensor([[[0.5]], [[0.5]]]))
    assert marginals.flatten().tolist() == pytest.approx([0.5, 0.5])
