"""The pieces of detection measuring, by hand-computed cases and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labelpenet.evaluation import average_precision, box_iou, classification_ap, match_detections, precision_recall

from . import reference


@pytest.mark.parametrize(
    ("found", "points"), [(1, 2), (2, 3), (3, 3), (4, 5), (5, 6), (6, 6), (7, 7), (8, 9), (10, 11)]
)
def test_voc07_misses_the_points_that_the_kit_misses(found, points):
    """The kit's 0:0.1:1 holds 0.30000000000000004, 0.6000000000000001 and 0.7000000000000001: 3 / 10 is less than that.

    ``found`` of ten objects, without a mistake. The kit, run by Octave, gives 27.27 for three.
    """
    right = np.ones(found, bool)
    precision, recall = precision_recall(right, ~right, 10)
    assert average_precision(precision, recall, "voc07") == pytest.approx(points / 11)
    assert average_precision(precision, recall, "voc12") == pytest.approx(found / 10)


def test_average_precision_by_hand():
    right = np.array([True, False, True, False])  # of three objects
    precision, recall = precision_recall(right, ~right, 3)
    np.testing.assert_allclose(precision, [1, 1 / 2, 2 / 3, 2 / 4])
    np.testing.assert_allclose(recall, [1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert average_precision(precision, recall, "voc12") == pytest.approx(1 / 3 + 2 / 9)
    assert average_precision(precision, recall, "voc07") == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert average_precision(np.zeros(0), np.zeros(0), "voc07") == 0.0


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 20))
def test_average_precision_stays_in_bounds_and_grows_when_wrong_ones_vanish(right, extra):
    right = np.array(right, dtype=bool)
    positives = int(right.sum()) + extra
    for interpolation in ("voc07", "voc12"):
        value = average_precision(*precision_recall(right, ~right, positives), interpolation)
        clean = average_precision(*precision_recall(right, np.zeros_like(right), positives), interpolation)
        assert 0 <= value <= clean + 1e-12 <= 1 + 1e-9


def test_match_detections_keeps_the_order_of_equal_scores():
    scores = np.array([0.5, 0.5, 0.9])
    right, wrong = match_detections(scores, np.array([0.6, 0.9, 0.1]), np.array([0, 0, 0]), np.zeros(1, bool), 0.5)
    assert right.tolist() == [False, True, False]
    assert wrong.tolist() == [True, False, True]


@given(st.integers(0, 10**6))
def test_box_iou_is_that_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 6, (2, 5, 2)).astype(float)
    a, b = np.concatenate([corner, corner + rng.integers(0, 6, (2, 5, 2))], -1)
    expected = [[reference.box_iou(one, other) for other in b] for one in a]
    np.testing.assert_allclose(box_iou(a, b), expected)
    assert box_iou(a[:0], b).shape == (0, 5)


def test_classification_ap():
    scores = np.array([[0.9, 0.1, 0.3], [0.8, 0.2, 0.1], [0.7, 0.3, 0.2]])
    labels = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0]])
    ap = classification_ap(scores, labels)
    np.testing.assert_allclose(ap, [1 / 2 + 1 / 2 * 2 / 3, 1.0, np.nan])
    with pytest.raises(ValueError, match=r"must both be \(I, C\)"):
        classification_ap(scores, labels[:, :2])
