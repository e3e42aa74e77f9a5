"""The chain of proposal calibration on scenes whose answer is known, and what must hold of any answer."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from labelpenet.calibration.calibrate import (
    Trace,
    box_mask,
    drop_components,
    instance_heat,
    project_members,
    resize_masks,
    rivals,
    segment,
    select_instances,
    to_instances,
    unaries,
    working_canvas,
)
from labelpenet.calibration.maps import normalise
from labelpenet.calibration.nms import mask_nms
from labelpenet.config import AttentionCalibration
from labelpenet.instances import Instances, masks_to_boxes
from tests.calibration.chain import choose, run_chain

SIZE = (48, 64)
PLAIN = AttentionCalibration(per_class=1, iterations=0, threshold=0.4)
SQUARE = (10, 8, 30, 32)  # x1, y1, x2, y2


def scene(*boxes: tuple[int, int, int, int]) -> tuple[np.ndarray, Tensor]:
    """A noisy grey image with evenly coloured rectangles, and their masks."""
    rng = np.random.default_rng(0)
    image = rng.integers(90, 110, (*SIZE, 3)).astype(np.uint8)
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2] = (220, 30 + 60 * i, 40)
        masks[i, y1:y2, x1:x2] = True
    return image, masks


def around(box: tuple[int, int, int, int], n: int = 8, seed: int = 0) -> Tensor:
    """The box and jittered versions of it."""
    jitter = torch.randint(-3, 4, (n, 4), generator=torch.Generator().manual_seed(seed)).float()
    jitter[0] = 0
    return torch.tensor(box).float() + jitter


def full(index: Tensor, labels: Tensor) -> Tensor:
    return torch.ones(len(index), 7, 7)


def iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def falling(n: int, top: float = 0.95) -> Tensor:
    return torch.linspace(top, top - 0.3, n)


# ------------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("combine", ["product", "mean"])
@pytest.mark.parametrize("compete", ["instances", "classes", "background"])
def test_an_object_is_recovered_from_proposals_around_it(combine, compete):
    image, (truth,) = scene(SQUARE)
    boxes = around(SQUARE)
    scores = torch.stack([torch.zeros(8), falling(8)], 1)
    choice = AttentionCalibration(
        per_class=1, combine=combine, compete=compete, iterations=5, threshold=0.3, sxy_bilateral=30
    )
    found, trace = run_chain(image, boxes, scores, (1,), full, choice)
    assert found.labels.tolist() == [1] and found.weights.tolist() == pytest.approx([0.95])
    assert iou(found.masks[0], truth) > 0.9
    assert (found.boxes[0] - torch.tensor(SQUARE)).abs().max() <= 2
    assert torch.equal(found.boxes, masks_to_boxes(found.masks))
    for maps in (trace.attention, trace.heat, trace.confidence, trace.marginals):
        assert maps.shape == (1, *SIZE) and maps.dtype == torch.float32
        assert float(maps.max()) > 0


def test_the_attention_decides_where_the_heat_cannot():
    """Every proposal covers the whole image; only the attention maps know the object."""
    image, (truth,) = scene((32, 0, 64, 48))
    boxes = torch.tensor([[0.0, 0, 64, 48]]).repeat(3, 1)

    def attend(index: Tensor, labels: Tensor) -> Tensor:
        maps = torch.zeros(len(index), 6, 8)
        maps[:, :, 4:] = 1
        return maps

    for combine in ("product", "mean"):
        choice = replace(PLAIN, combine=combine, threshold=0.6)
        found, _ = run_chain(image, boxes, falling(3)[:, None], (0,), attend, choice)
        assert iou(found.masks[0], truth) > 0.9


def test_each_tag_gets_one_instance_whatever_the_scores():
    image, masks = scene(SQUARE, (40, 20, 60, 44))
    boxes = torch.cat([around(SQUARE), around((40, 20, 60, 44))])
    scores = torch.zeros(16, 3)
    scores[:8, 2] = falling(8)
    scores[8:, 0] = falling(8, 0.31)  # under min_score
    found, _ = run_chain(image, boxes, scores, (0, 2), full, PLAIN)
    assert found.labels.tolist() == [0, 2]
    assert iou(found.masks[0], masks[1]) > 0.8 and iou(found.masks[1], masks[0]) > 0.8
    assert found.weights.tolist() == pytest.approx([0.31, 0.95])


def test_a_tag_that_no_proposal_prefers_is_still_found():
    image, _ = scene(SQUARE)
    scores = torch.stack([falling(8), falling(8) / 2], 1)
    found, _ = run_chain(image, around(SQUARE), scores, (0, 1), full, PLAIN)
    assert found.labels.tolist() == [0, 1] and found.weights.tolist() == pytest.approx([0.95, 0.475])


def test_classes_that_are_no_tags_do_not_take_proposals_away():
    """A proposal's class is the best one among the tags, not among all classes."""
    image, (truth,) = scene(SQUARE)
    scores = torch.stack([torch.full((8,), 0.99), falling(8, 0.5)], 1)
    found, _ = run_chain(image, around(SQUARE), scores, (1,), full, PLAIN)
    assert found.labels.tolist() == [1] and iou(found.masks[0], truth) > 0.8


def test_module_two_keeps_several_of_a_class():
    places = (SQUARE, (40, 4, 60, 20), (36, 28, 56, 46))
    image, masks = scene(*places)
    boxes = torch.cat([around(place) for place in places])
    scores = torch.cat([falling(8, 0.9), falling(8, 0.8), falling(8, 0.4)])[:, None]
    choice = replace(PLAIN, per_class=5, min_score=0.5)
    found, _ = run_chain(image, boxes, scores, (0,), full, choice)
    assert found.weights.tolist() == pytest.approx([0.9, 0.8])  # the third is too weak
    assert all(iou(own, mask) > 0.7 for own, mask in zip(found.masks, masks, strict=False))
    for more, count in ((replace(choice, min_score=0.2), 3), (replace(choice, per_class=1), 1)):
        assert len(run_chain(image, boxes, scores, (0,), full, more)[0]) == count
    several, _ = run_chain(image, boxes, scores, (0,), full, replace(choice, compete="background"))
    assert len(several) == 2


def test_unknown_tags_are_answered_by_strong_instances_only():
    image, _ = scene(SQUARE)
    scores = torch.stack([falling(8), torch.full((8,), 0.01)], 1)
    found, _ = run_chain(image, around(SQUARE), scores, None, full, replace(PLAIN, per_class=3))
    assert found.labels.tolist() == [0]
    assert len(run_chain(image, around(SQUARE), scores / 9, None, full, PLAIN)[0]) == 0


def test_members_of_the_class_or_only_of_those_suppressed():
    """Two far objects of one class: the class's attention map holds both, the kept proposal's only its own."""
    second = (40, 24, 60, 44)
    boxes = torch.cat([around(SQUARE), around(second)])
    scores = torch.cat([falling(8, 0.9), falling(8, 0.6)])[:, None]
    for members, both in (("suppressed", False), ("class", True)):
        choice = replace(PLAIN, members=members)
        found, chosen = choose(boxes, scores, (0,), choice)
        assert chosen.kept.tolist() == [0] and found.labels[chosen.kept].tolist() == [0]
        assert chosen.member[0].tolist() == [True] * 8 + [both] * 8
        maps = torch.ones(len(chosen.mapped), 7, 7)
        attention = project_members(maps, found, chosen, torch.ones(4), SIZE)[0]
        assert attention[20, 20] > 0 and bool(attention[34, 50] > 0) == both


def test_a_proposal_whose_overlap_is_the_threshold_belongs_to_whom_suppressed_it():
    """3 / 10 as a float32 is more than 0.3: NMS suppresses it, and so it must count as suppressed by that box."""
    boxes = torch.tensor([[40.0, 0, 60, 10], [0, 0, 10, 10], [0, 0, 10, 3]])
    scores = torch.tensor([[0.9], [0.8], [0.7]])
    _, chosen = choose(boxes, scores, (0,), replace(PLAIN, per_class=3, nms=0.3))
    assert chosen.kept.tolist() == [0, 1]
    assert chosen.member.tolist() == [[True, False, False], [False, True, True]]


def test_only_the_best_are_attended_and_always_the_kept_one():
    boxes = torch.cat([around(SQUARE), around((40, 24, 60, 44))])
    scores = torch.cat([falling(8, 0.9), falling(8, 0.55)])[:, None]
    choice = replace(PLAIN, per_class=2, min_score=0.1, max_attention=3)
    asked: list[int] = []

    def attend(index: Tensor, labels: Tensor) -> Tensor:
        asked.extend(index.tolist())
        return full(index, labels)

    image, _ = scene(SQUARE)
    found, _ = run_chain(image, boxes, scores, (0,), attend, choice)
    assert len(found) == 2 and sorted(asked) == [0, 1, 2, 8]


def test_an_instances_heat_is_its_own_where_there_are_several():
    boxes = torch.cat([around(SQUARE), around((40, 24, 60, 44))])
    scores = torch.cat([falling(8, 0.9), falling(8, 0.8)])[:, None]
    several = replace(PLAIN, per_class=2)
    device = torch.device("cpu")
    found, chosen = choose(boxes, scores, (0,), several)
    heat = instance_heat(found, chosen, None, torch.ones(4), SIZE, several, device)
    assert len(chosen.kept) == 2 and heat[0, 34, 50] == 0 and heat[1, 20, 20] == 0
    assert heat.amax((1, 2)).tolist() == pytest.approx([1, 1])
    found, chosen = choose(boxes, scores, (0,), PLAIN)
    single = instance_heat(found, chosen, None, torch.ones(4), SIZE, PLAIN, device)
    assert single[0, 34, 50] > 0.5 and single[0, 20, 20] > 0.5


def test_the_heat_is_that_of_the_class_or_of_all_proposals():
    """Two proposals of class 0 and one of class 1, which also has some score for 0."""
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 20], [40, 20, 60, 40]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    found, chosen = choose(boxes, scores, (0, 1), PLAIN)
    for heat, beyond in ((None, 0.0), ((boxes, scores), 0.3 / 1.7)):
        maps = instance_heat(found, chosen, heat, torch.ones(4), SIZE, PLAIN, torch.device("cpu"))
        assert float(maps[0, 10, 10]) == 1 and float(maps[0, 30, 50]) == pytest.approx(beyond)


def test_regions_are_where_the_attention_lies():
    image, _ = scene(SQUARE)
    boxes = torch.tensor([[0.0, 0, 64, 48]])
    region = torch.tensor([[32.0, 24, 64, 48]])
    found, trace = run_chain(image, boxes, torch.tensor([[0.9]]), (0,), full, PLAIN, regions=region)
    assert found.boxes[0].tolist() == region[0].tolist()
    assert not trace.attention[0, :24].any() and trace.heat[0].all()


def test_duplicates_of_a_class_are_one():
    masks = torch.zeros(4, 10, 10, dtype=torch.bool)
    masks[0, :6] = masks[1, :5] = masks[2, :6] = masks[3, 5:] = True
    found = Instances(
        masks_to_boxes(masks), torch.tensor([0, 0, 1, 0]), torch.tensor([0.5, 0.9, 0.4, 0.3]), (10, 10), masks
    )
    assert mask_nms(found, 0.5).tolist() == [1, 2, 3]  # the better of two alike; another class may lie there too
    assert mask_nms(found, 0.9).tolist() == mask_nms(found, None).tolist() == [0, 1, 2, 3]


def rescored(weights: list[float], decay: float | None) -> tuple[Instances, Trace]:
    """Five instances of probabilities whose scores are easy to say; the last one's mask has no pixel."""
    p = torch.zeros(5, 300, 400)
    p[0, :200], p[1, :200], p[2, 200:], p[3, :200] = 0.8, 0.9, 1.0, 1.0  # the fourth is of another class
    p[1, :100] = 0.4
    p[4] = 0.49
    masks = p > 0.5
    masks[4, :10] = True  # its proposal stands in
    labels = torch.tensor([0, 0, 0, 1, 0])
    found = Instances(masks_to_boxes(masks), labels, torch.tensor(weights), (300, 400), masks)
    choice = AttentionCalibration(rescore=decay, mask_nms=None)
    return select_instances(found, Trace(p, p, p, p), choice)


def test_a_weight_knows_the_mask_and_what_lies_on_a_better_one_decays():
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode()):
        with context:  # an area of 40,000 pixels is no number in 16 bits
            found, trace = rescored([0.9, 0.6, 0.5, 0.4, 0.7], 4.0)
        assert found.labels.tolist() == [0, 0, 0, 1] and len(trace.marginals) == 4
        expected = [0.9 * 0.64, 0.6 * 0.81 * np.exp(-4 * 0.5**2), 0.5, 0.4]
        np.testing.assert_allclose(found.weights, expected, rtol=1e-5)
    assert rescored([0.9, 0.6, 0.5, 0.4, 0.7], None)[0].weights.tolist() == pytest.approx([0.9, 0.6, 0.5, 0.4, 0.7])


def test_an_instance_without_a_pixel_teaches_nothing_where_it_is_doubtful():
    p, boxes = torch.full((2, *SIZE), 0.4), torch.tensor([[4.0, 5, 20, 30], [8, 8, 24, 24]])
    p[1, 10:20, 10:20] = 0.9
    for empty, expected in (("proposal", [0.8, 0.7]), ("doubtful", [0.0, 0.7])):
        found = to_instances(
            p, boxes, torch.tensor([0, 1]), torch.tensor([0.8, 0.7]), SIZE, AttentionCalibration(empty=empty)
        )
        assert found.weights.tolist() == pytest.approx(expected)
        assert found.boxes[0].tolist() == boxes[0].tolist() and found.masks is not None
        assert int(found.masks[0].sum()) == 16 * 25 and int(found.masks[1].sum()) == 100


def test_what_is_doubtful_stays_so_when_weights_are_made_anew():
    found, _ = rescored([0.9, 0.0, 0.5, 0.4, 0.0], 4.0)
    np.testing.assert_allclose(found.weights, [0.9 * 0.64, 0, 0.5, 0.4, 0], rtol=1e-5)
    none, _ = select_instances(
        Instances.empty(SIZE, with_masks=True), Trace(*[torch.zeros(0, *SIZE)] * 4), AttentionCalibration(rescore=4.0)
    )
    assert len(none) == 0


def test_small_parts_of_a_mask_are_dropped():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[0:10, 0:10] = mask[12:16, 12:16] = mask[19, 19] = True
    big = torch.zeros_like(mask)
    big[0:10, 0:10] = True
    assert torch.equal(drop_components(mask, 0.2), big)
    middle = mask.clone()
    middle[19, 19] = False
    assert torch.equal(drop_components(mask, 0.1), middle)
    assert torch.equal(drop_components(mask, None), mask)
    assert not drop_components(torch.zeros_like(mask), 0.5).any()


def test_the_box_may_be_the_proposals_or_reach_as_far_as_the_mask():
    image, _ = scene(SQUARE)
    boxes = around(SQUARE) + 0.25
    scores = falling(8)[:, None]
    found, _ = run_chain(image, boxes, scores, (0,), full, replace(PLAIN, box="proposal"))
    assert torch.equal(found.boxes[0], boxes[0])
    tight, _ = run_chain(image, boxes, scores, (0,), full, PLAIN)
    both, _ = run_chain(image, boxes, scores, (0,), full, replace(PLAIN, box="both"))
    assert torch.equal(both.boxes[0, :2], torch.minimum(boxes[0, :2], tight.boxes[0, :2]))
    assert torch.equal(both.boxes[0, 2:], torch.maximum(boxes[0, 2:], tight.boxes[0, 2:]))


def test_a_smaller_canvas_gives_nearly_the_same():
    image, (truth,) = scene(SQUARE)
    scores = falling(8)[:, None]
    found, trace = run_chain(image, around(SQUARE), scores, (0,), full, replace(PLAIN, side=32))
    assert trace.confidence.shape == (1, 24, 32)
    assert found.masks.shape == (1, *SIZE) and iou(found.masks[0], truth) > 0.8
    canvas, scale = working_canvas(image, 33)
    assert canvas.shape[:2] == (25, 33) and scale == (33 / 64, 25 / 48)
    assert working_canvas(image, 1000)[1] == (1.0, 1.0)
    assert working_canvas(np.zeros((1, 300, 3), np.uint8), 30)[0].shape == (1, 30, 3)


# --------------------------------------------------------------------------------------------- what must always hold


def test_nothing_comes_of_nothing():
    image, _ = scene(SQUARE)
    for boxes, scores, tags in (
        (torch.zeros(0, 4), torch.zeros(0, 2), (0, 1)),
        (around(SQUARE), torch.rand(8, 2), ()),
        (torch.zeros(0, 4), torch.zeros(0, 2), None),
    ):
        found, trace = run_chain(image, boxes, scores, tags, full, PLAIN)
        assert len(found) == 0 and found.masks.shape == (0, *SIZE) and found.image_size == SIZE
        assert trace.marginals.shape == (0, *SIZE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(bad):
    image, _ = scene(SQUARE)
    scores, boxes = torch.rand(8, 2), around(SQUARE)
    worse = scores.clone()
    worse[3, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        run_chain(image, boxes, worse, (0,), full, PLAIN)
    boxes[2, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        run_chain(image, boxes, scores, (0,), full, PLAIN)


def test_attention_of_zero_falls_back_to_the_proposal():
    image, _ = scene(SQUARE)
    found, _ = run_chain(
        image, around(SQUARE), falling(8)[:, None], (0,), lambda i, c: torch.zeros(len(i), 7, 7), PLAIN
    )
    assert found.boxes[0].tolist() == list(SQUARE) and found.masks[0].sum() == 20 * 24


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([(0,), (0, 2), (1, 2), (0, 1, 2), None]),
    st.sampled_from(["product", "mean"]),
    st.sampled_from(["suppressed", "class"]),
    st.sampled_from(["instances", "classes", "background"]),
    st.sampled_from([None, 20]),
    st.sampled_from([None, 0.3]),
)
def test_whatever_comes_out_can_be_used(seed, tags, combine, members, compete, side, background):
    generator = torch.Generator().manual_seed(seed)
    n = 15
    corner = torch.rand(n, 2, generator=generator) * 50 - 3
    boxes = torch.cat([corner, corner + 0.5 + torch.rand(n, 2, generator=generator) * 40], 1)
    scores = torch.rand(n, 3, generator=generator).softmax(1)

    def attend(index: Tensor, labels: Tensor) -> Tensor:
        return torch.rand(len(index), 4, 4, generator=generator) * scores[index, labels][:, None, None]

    choice = AttentionCalibration(
        combine=combine, members=members, compete=compete, side=side, threshold=background, per_class=3, min_score=0.34,
        iterations=1, min_component=0.2, mask_nms=0.7,
    )  # fmt: skip
    image = np.random.default_rng(seed).integers(0, 256, (37, 45, 3)).astype(np.uint8)
    found, trace = run_chain(image, boxes, scores, tags, attend, choice)
    found.validate(3)
    allowed = {0, 1, 2} if tags is None else set(tags)
    assert set(found.labels.tolist()) <= allowed
    assert tags is None or set(found.labels.tolist()) == allowed
    assert found.labels.bincount(minlength=3).max() <= 3
    assert torch.equal(found.boxes, masks_to_boxes(found.masks)) and found.masks.flatten(1).any(1).all()
    assert all(bool(((maps >= 0) & (maps <= 1)).all()) for maps in vars(trace).values())
    assert len(trace.marginals) == len(found)
    for label in allowed:
        assert (found.weights[found.labels == label].diff() <= 0).all()  # best first


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([(6, 7), (13, 17), (23, 9)]), st.booleans())
def test_competing_instances_never_share_a_pixel(seed, k, size, coarse):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(k, 6, 7, generator=generator)
    if coarse:  # many ties
        confidence = (confidence * 3).round() / 3
    canvas = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    for background in (None, 0.3):
        choice = AttentionCalibration(per_class=1, threshold=background, iterations=seed % 2)
        marginals = segment(canvas, confidence, choice)
        assert (resize_masks(marginals, size).sum(0) <= 1).all()


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
def test_object_and_background_can_be_equally_sure(threshold):
    """The unaries are log-odds against the threshold: sigmoid(logit(c) - logit(t)), whoever the object's rivals are."""
    confidence = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(1))
    expected = torch.sigmoid(torch.logit(confidence) - torch.logit(torch.tensor(threshold)))
    alone = unaries(confidence, AttentionCalibration(per_class=1, threshold=threshold, compete="background"))
    torch.testing.assert_close(alone[:, 1], expected)
    torch.testing.assert_close(alone[:, 0], 1 - expected)
    joint = unaries(confidence, AttentionCalibration(per_class=1, threshold=threshold))[0]
    torch.testing.assert_close(joint.sum(0), torch.ones(5, 6))
    torch.testing.assert_close(joint[1:] / (joint[1:] + joint[0]), expected)
    certain = unaries(torch.tensor([[[0.0, 1.0]]]), AttentionCalibration(per_class=1, threshold=0.5))[0]
    torch.testing.assert_close(certain[1, 0, 0], certain[0, 0, 1])  # no lopsided ends
    assert torch.isfinite(certain.log()).all()


def test_an_instance_keeps_the_pixels_in_which_no_other_class_is_surer():
    confidence = torch.tensor([[[0.9, 0.6, 0.6, 0.2]], [[0.5, 0.8, 0.6, 0.1]], [[0.95, 0.95, 0.1, 0.6]]])
    choice = AttentionCalibration(threshold=0.3, iterations=0, compete="classes")

    def masks(scores: list[float], labels: list[int]) -> list[list[bool]]:
        against = rivals(torch.tensor(labels), torch.tensor(scores), choice)
        return (segment(np.zeros((1, 4, 3), np.uint8), confidence, choice, None, against)[:, 0] >= 0.5).tolist()

    yes, no = True, False
    assert masks([0.9, 0.9, 0.9], [0, 1, 1]) == [[no, no, yes, no], [no, yes, yes, no], [yes, yes, no, yes]]
    # a doubtful one of another class takes nothing, one of the same class never does
    assert masks([0.9, 0.9, 0.01], [0, 1, 1]) == [[yes, no, yes, no], [no, yes, yes, no], [yes, yes, no, yes]]
    assert masks([0.9, 0.9, 0.9], [1, 1, 1]) == [[yes, yes, yes, no], [yes, yes, yes, no], [yes, yes, no, yes]]


def test_the_papers_background_is_what_the_attention_leaves():
    attention = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(2)) * 7
    confidence = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(3))
    background = (1 - (attention / attention.amax((1, 2), keepdim=True)).sum(0)).clamp(min=0)
    alone = unaries(confidence, AttentionCalibration(per_class=1, threshold=None, compete="background"), attention)
    for index, one in enumerate(alone):  # as if the others were not there
        only = AttentionCalibration(per_class=1, threshold=None, compete="instances")
        assert torch.equal(one, unaries(confidence[index : index + 1], only, attention[index : index + 1])[0])
    p = unaries(confidence, AttentionCalibration(per_class=1, threshold=None), attention)[0]
    torch.testing.assert_close(p, torch.cat([background[None], confidence]) / (background + confidence.sum(0)))


def test_calibration_gives_the_crf_the_attention_maps(monkeypatch):
    seen = []
    monkeypatch.setattr(
        sys.modules[unaries.__module__], "unaries", lambda c, s, a, r: seen.append((c, a)) or unaries(c, s, a, r)
    )
    boxes = torch.tensor([[4.0, 4, 30, 30], [5.0, 5, 40, 40]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    image = np.zeros((*SIZE, 3), np.uint8)
    choice = AttentionCalibration(per_class=1, iterations=0, combine="product")
    run_chain(image, boxes, scores, (0,), lambda index, labels: torch.rand(len(index), 3, 3), choice)
    ((confidence, attention),) = seen
    assert attention is not None and not torch.equal(normalise(attention), confidence)


def test_without_a_crf_a_lone_instance_is_its_confidence_against_the_background():
    confidence = torch.rand(1, 6, 7, generator=torch.Generator().manual_seed(0))
    canvas = np.zeros((6, 7, 3), np.uint8)
    for compete in ("instances", "classes", "background"):
        choice = AttentionCalibration(per_class=1, threshold=0.3, iterations=0, compete=compete)
        assert torch.equal(segment(canvas, confidence, choice)[0] > 0.5, confidence[0] > 0.3)
    literal = AttentionCalibration(per_class=1, iterations=0)
    assert torch.equal(segment(canvas, confidence, literal)[0] > 0.5, confidence[0] > 0.5)


@pytest.mark.parametrize("box", [[-9.0, -9, -2, -2], [70, 60, 80, 90], [3.2, 4.7, 3.4, 4.9], [0, 0, 64, 48]])
def test_a_boxs_mask_is_never_empty(box):
    mask = box_mask(torch.tensor(box), SIZE)
    assert mask.any()
    if box[2] - box[0] == 64:
        assert mask.all()


def settle_dense(marginals: Tensor, proposals: Tensor, size: tuple[int, int], part: float | None) -> Tensor:
    """The masks that `to_instances` stands for, all of them at the image's size at once."""
    masks = torch.stack([drop_components(mask, part) for mask in resize_masks(marginals, size)])
    for index in range(len(masks)):
        if not masks[index].any():
            masks[index] = box_mask(proposals[index], size)
    return masks


def distinct_dense(found: Instances, duplicate: float) -> list[int]:
    """`distinct` by the product of all masks."""
    flat = found.masks.flatten(1).float()
    inter = flat @ flat.T
    area = flat.sum(1)
    overlap = inter / (area[:, None] + area[None] - inter).clamp(min=1)
    alive: list[int] = []
    for index in found.weights.argsort(descending=True, stable=True).tolist():
        if not any(overlap[index, other] > duplicate and found.labels[other] == found.labels[index] for other in alive):
            alive.append(index)
    return sorted(alive)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(30, 40), (61, 83), (20, 17), (90, 200)]), st.booleans())
def test_masks_as_crops_are_the_masks_at_full_size(seed: int, size: tuple[int, int], smooth: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    marginals = torch.rand(8, 30, 40, generator=generator)
    if smooth:
        marginals = torch.nn.functional.avg_pool2d(marginals[None], 7, 1, 3)[0]
    marginals[0], marginals[1], marginals[2] = 0.5, 0.1, 0.9  # at the threshold, nothing, everything
    y1, x1 = torch.randint(0, 20, (2, 8), generator=generator).float()
    proposals = torch.stack([x1, y1, x1 + 9.5, y1 + 0.5], 1)
    labels, weights = torch.randint(0, 2, (8,), generator=generator), torch.rand(8, generator=generator)
    for part, duplicate in ((None, 0.3), (0.2, 0.1), (1.0, 0.5)):
        choice = AttentionCalibration(min_component=part, mask_nms=duplicate)
        found = to_instances(marginals, proposals, labels, weights, size, choice)
        dense = settle_dense(marginals, proposals, size, part)
        assert torch.equal(found.masks, dense)
        assert torch.equal(found.boxes, masks_to_boxes(dense))
        assert mask_nms(found, duplicate).tolist() == distinct_dense(found, duplicate)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), *[st.integers(1, 40)] * 2, *[st.integers(1, 300)] * 2)
def test_masks_are_resized_as_torch_does_it(seed: int, h: int, w: int, height: int, width: int) -> None:
    probabilities = torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed))
    expected = torch.nn.functional.interpolate(
        probabilities[None].double(), size=(height, width), mode="bilinear", align_corners=False
    )[0]
    clear = (expected - 0.5).abs() > 1e-6
    assert torch.equal(resize_masks(probabilities, (height, width))[clear], (expected > 0.5)[clear])


def test_of_a_cameras_photograph_only_what_the_objects_fill_is_drawn() -> None:
    size, marginals = (2000, 3000), torch.zeros(30, 60, 90)
    marginals[:, 20:26, 30:37] = 1.0
    boxes = torch.tensor([[1000.0, 600, 1200, 900]] * 30)
    labels, weights = torch.zeros(30, dtype=torch.long), torch.ones(30)

    # the allocator's own count: what the process holds depends on the libraries' pages and on the heap before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        found = to_instances(marginals, boxes, labels, weights, size, AttentionCalibration())
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    changes = [event.nbytes() for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert len(found) == 30
    assert 0 < max(accumulate(changes)) < size[0] * size[1]  # not even one mask at the photograph's size


def test_a_cameras_photograph_is_worked_on_at_the_size_of_a_canvas() -> None:
    image = np.zeros((3000, 4000, 3), np.uint8)
    canvas, scale = working_canvas(image, None)
    assert (canvas.shape[:2], scale) == ((480, 640), (0.16, 0.16))
    ordinary = np.zeros((640, 600, 3), np.uint8)
    assert working_canvas(ordinary, None)[0].shape == ordinary.shape
