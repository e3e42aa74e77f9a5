"""Every rule by which the teacher's instances are checked against the cascade's, and the figures of a drift."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labelpenet.instances import Instances, masks_to_boxes
from labelpenet.training.validated import beyond, compare, drift, pairs, recolour, validate

H, W = 20, 40


def rectangles(*rows: tuple[int, float, int, int, int, int]) -> Instances:
    """Instances (class, weight, x1, y1, x2, y2) whose masks fill their boxes."""
    masks = torch.zeros(len(rows), H, W, dtype=torch.bool)
    for mask, (_, _, x1, y1, x2, y2) in zip(masks, rows, strict=True):
        mask[y1:y2, x1:x2] = True
    labels = torch.tensor([row[0] for row in rows], dtype=torch.long)
    return Instances(masks_to_boxes(masks), labels, torch.tensor([float(row[1]) for row in rows]), (H, W), masks)


def outcome(anchor: Instances, found: Instances, belief: list[float], enter=0.6, doubt=0.3) -> list[tuple]:
    """(class, weight, box) of what is learnt and, of weight 0, what is ignored."""
    one = validate(anchor, found, torch.tensor(belief), enter, doubt)
    assert one.masks is not None and torch.equal(masks_to_boxes(one.masks), one.boxes)
    rows = zip(one.labels.tolist(), one.weights.tolist(), one.boxes.tolist(), strict=True)
    return [(label, round(weight, 3), tuple(map(int, box))) for label, weight, box in rows]


ANCHOR = (0, 0.9, 0, 0, 10, 10)


@pytest.mark.parametrize(
    ("teacher", "belief", "expected"),
    [
        ((0, 0.7, 0, 0, 12, 10), [0.5, 0.6], [(0, 0.7, (0, 0, 12, 10))]),  # the same object, believed more: replaced
        ((0, 0.7, 0, 0, 12, 10), [0.6, 0.6], [(0, 0.9, (0, 0, 10, 10))]),  # no more: stays, and the other is nothing
        ((0, 0.7, 0, 0, 12, 10), [0.01, 0.0], [(0, 0.9, (0, 0, 10, 10))]),  # confirmed, so no doubt
        # IoU one half is not more than one half, and a part is no new object however much it is believed
        ((0, 0.7, 0, 0, 5, 10), [0.5, 1.0], [(0, 0.9, (0, 0, 10, 10)), (0, 0, (0, 0, 5, 10))]),
        # elsewhere, and another class at the same place: learnt from ``enter`` on, ignored below
        ((0, 0.7, 20, 0, 30, 10), [0.5, 0.6], [(0, 0.9, (0, 0, 10, 10)), (0, 0.7, (20, 0, 30, 10))]),
        ((0, 0.7, 20, 0, 30, 10), [0.5, 0.59], [(0, 0.9, (0, 0, 10, 10)), (0, 0, (20, 0, 30, 10))]),
        ((1, 0.7, 0, 0, 10, 10), [0.5, 0.9], [(0, 0.9, (0, 0, 10, 10)), (1, 0.7, (0, 0, 10, 10))]),
        # not confirmed and not believed: ignored, though it may be the last one of its class
        ((0, 0.7, 20, 0, 30, 10), [0.29, 0.6], [(0, 0.7, (20, 0, 30, 10)), (0, 0, (0, 0, 10, 10))]),
        ((0, 0.7, 20, 0, 30, 10), [0.29, 0.5], [(0, 0, (0, 0, 10, 10)), (0, 0, (20, 0, 30, 10))]),
    ],
)
def test_one_of_the_cascade_and_one_of_the_teacher(teacher, belief, expected):
    assert outcome(rectangles(ANCHOR), rectangles(teacher), belief) == expected


def test_several():
    anchor = rectangles((0, 0.9, 0, 0, 10, 10), (0, 0.8, 12, 0, 20, 10), (1, 0.5, 22, 0, 30, 10))
    found = rectangles((0, 0.6, 12, 0, 21, 10), (0, 0.7, 12, 1, 20, 10), (0, 0.95, 30, 10, 40, 20))
    # the teacher's second one overlaps the anchor's second most, but is believed less; its first one is then a part
    belief = [0.2, 0.7, 0.1, 0.9, 0.5, 0.8]
    assert outcome(anchor, found, belief) == [
        (0, 0.8, (12, 0, 20, 10)),
        (0, 0.95, (30, 10, 40, 20)),
        (0, 0, (0, 0, 10, 10)),
        (1, 0, (22, 0, 30, 10)),
        (0, 0, (12, 0, 21, 10)),
    ]


def test_of_two_new_ones_in_each_other_the_more_believed_is_learnt():
    found = rectangles((0, 0.6, 20, 0, 40, 20), (0, 0.6, 20, 0, 30, 10))
    assert outcome(rectangles(ANCHOR), found, [0.5, 0.7, 0.8])[1:] == [
        (0, 0.6, (20, 0, 30, 10)),
        (0, 0, (20, 0, 40, 20)),
    ]


def test_without_any():
    nothing, one = rectangles(), rectangles(ANCHOR)
    assert outcome(nothing, nothing, []) == []
    assert outcome(one, nothing, [0.3]) == [(0, 0.9, (0, 0, 10, 10))]
    assert outcome(nothing, one, [0.6]) == [(0, 0.9, (0, 0, 10, 10))]
    assert outcome(nothing, one, [0.5]) == [(0, 0, (0, 0, 10, 10))]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_nothing_is_invented_or_lost(seed):
    """A teacher that says the same changes nothing; what is believed stays, replaced at most."""
    rng = np.random.default_rng(seed)

    def some(count: int) -> Instances:
        corner = rng.integers(0, (30, 12), (count, 2))
        size = rng.integers(2, (10, 8), (count, 2))
        labels, weights = rng.integers(0, 2, count).tolist(), rng.uniform(0.1, 1, count).tolist()
        return rectangles(*((a, b, *c, *d) for a, b, c, d in zip(
            labels, weights, corner.tolist(), (corner + size).tolist(), strict=True)))  # fmt: skip

    anchor, found = some(int(rng.integers(1, 4))), some(int(rng.integers(0, 4)))
    belief = torch.from_numpy(rng.uniform(0, 1, len(anchor) + len(found)))
    one = validate(anchor, found, belief, 0.6, 0.3)
    learnt = one[one.weights > 0]
    assert set(learnt.labels.tolist()) >= set(anchor.labels[belief[: len(anchor)] >= 0.3].tolist())
    given_boxes = {tuple(box) for box in torch.cat([anchor.boxes, found.boxes]).tolist()}
    assert {tuple(box) for box in one.boxes.tolist()} <= given_boxes and len(one) <= len(anchor) + len(found)
    same = validate(anchor, anchor, belief[: len(anchor)].repeat(2), 0.6, 0.0)
    assert torch.equal(same[same.weights > 0].boxes, anchor.boxes)


def test_pairs_are_found_best_first():
    iou = torch.tensor([[0.6, 0.9, 0.0], [0.55, 0.8, 0.5], [0.0, 0.0, 0.5]])
    assert pairs(iou).tolist() == [1, 0, -1]
    assert pairs(torch.zeros(2, 0)).tolist() == [-1, -1]


# -------------------------------------------------------------------------------------------------------------- drift


def test_labels_that_are_the_cascades_have_not_drifted():
    one = rectangles(ANCHOR, (1, 0.5, 20, 0, 30, 10))
    figures = drift([compare(one, one)] * 3)
    assert figures == {"area": 1, "number": 1, "agreement": 1}
    assert beyond(4, figures, 1.6) is None


def test_shrunken_moved_and_multiplied_labels_have():
    anchor = rectangles(ANCHOR, (0, 0.1, 30, 0, 40, 10))  # the one of less weight has no say in area and agreement
    small, moved = rectangles((0, 0.9, 0, 0, 5, 10)), rectangles((0, 0.9, 10, 0, 20, 10))
    many = rectangles(*(ANCHOR,) * 4)
    assert compare(small, anchor) == (1, 2, [(0.5, 0.5)])
    assert compare(moved, anchor) == (1, 2, [(1.0, 0.0)])
    assert compare(rectangles(), anchor) == (0, 2, [(0.0, 0.0)])
    shrunken = drift([compare(small, anchor[:1]), compare(small, anchor[:1]), compare(anchor[:1], anchor[:1])])
    assert shrunken == {"area": 0.5, "number": 1.0, "agreement": pytest.approx(2 / 3)}
    line = beyond(3, shrunken, 1.6)
    assert line is not None and "module 3 (refinement) have 0.50 times the area" in line
    assert beyond(3, shrunken, 2.1) is None
    assert "2.00 times as many" in str(beyond(4, drift([compare(many, anchor)]), 1.6))
    assert "overlap the cascade's by 0.00 only" in str(beyond(4, drift([compare(moved, anchor[:1])]), 1.6))
    assert drift([(0, 0, [])]) == {"area": 1, "number": 1, "agreement": 1}


def test_colours_change_within_their_strength():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    assert np.array_equal(recolour(image, 0.0, torch.Generator()), image)
    seen = [recolour(image, 0.2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[0], seen[2])
    means = [recolour(image, 0.2, torch.Generator().manual_seed(seed)).mean() / image.mean() for seed in range(20)]
    assert 0.75 < min(means) < 0.95 and 1.02 < max(means) < 1.2 and seen[0].dtype == np.uint8
