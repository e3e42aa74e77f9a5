"""RoI pooling, NMS with groups and initialisation against literal loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from labelpenet.calibration.nms import nms_groups
from labelpenet.models import layers
from labelpenet.models.backbones import SameConv2d
from labelpenet.models.layers import RoIPooling, by_rois, cell_offset, initialise


def slow_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def slow_nms(boxes: list[list[float]], scores: list[float], labels: list[int], threshold: float):
    """Greedy NMS as it is told: the best box is kept and strikes out those of its class that it overlaps."""
    left = sorted(range(len(boxes)), key=lambda i: -scores[i])
    keep, suppressor = [], {}
    while left:
        best, *rest = left
        keep.append(best)
        suppressor[best] = best
        left = []
        for other in rest:
            if labels[other] == labels[best] and slow_iou(boxes[best], boxes[other]) > threshold:
                suppressor[other] = best
            else:
                left.append(other)
    return keep, [keep.index(suppressor[i]) for i in range(len(boxes))]


box = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 30), st.integers(1, 30)).map(
    lambda b: [float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3])]
)


# Thresholds that boxes with whole corners can hit exactly are left out here: whether 3 / 10 exceeds 0.3 is a matter of
# the number type. The next test asks only for what must hold then as well.
@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(box, st.integers(0, 2)), min_size=1, max_size=25), st.sampled_from([0.3001, 0.4999, 0.07]))
def test_nms_groups_is_greedy_nms(found, threshold):
    boxes, labels = [b for b, _ in found], [c for _, c in found]
    scores = torch.linspace(0.9, 0.1, len(found))[
        torch.randperm(len(found), generator=torch.Generator().manual_seed(3))
    ]
    keep, leader = nms_groups(torch.tensor(boxes), scores, torch.tensor(labels), threshold)
    expected = slow_nms(boxes, scores.tolist(), labels, threshold)
    assert keep.tolist() == expected[0]
    assert leader.tolist() == [expected[0][place] for place in expected[1]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(box, st.integers(0, 2)), min_size=1, max_size=25), st.sampled_from([0.3, 0.5, 0.25, 0.2]))
@example([([0.0, 0.0, 10.0, 10.0], 1), ([0.0, 0.0, 10.0, 3.0], 0), ([0.0, 0.0, 10.0, 10.0], 0)], 0.3)
def test_a_suppressed_box_belongs_to_an_overlapping_box_of_its_class(found, threshold):
    boxes, labels = torch.tensor([b for b, _ in found]), torch.tensor([c for _, c in found])
    scores = torch.linspace(0.9, 0.1, len(found))
    keep, kept = nms_groups(boxes, scores, labels, threshold)
    assert (labels[kept] == labels).all()
    assert (scores[kept] >= scores).all()
    assert all(slow_iou(boxes[i].tolist(), boxes[k].tolist()) > threshold - 1e-6 for i, k in enumerate(kept))
    assert torch.equal(kept[keep], keep)


def test_classes_far_from_the_origin_do_not_disturb_one_another():
    """Shifting the classes apart (as batched NMS does) costs precision; groups must not come from it."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(150, 2, generator=generator) * 1000
    boxes = torch.cat([corner, corner + 20 + torch.rand(150, 2, generator=generator) * 300], 1)
    labels = torch.randint(0, 80, (150,), generator=generator)
    scores = torch.rand(150, generator=generator)
    keep, leader = nms_groups(boxes, scores, labels, 0.3)
    assert (labels[leader] == labels).all()
    assert (scores[keep].diff() <= 0).all()


def test_nms_of_nothing():
    keep, leader = nms_groups(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.5)
    assert keep.shape == leader.shape == (0,) and keep.dtype == torch.long


def slow_roi_max_pool(features: Tensor, box: Tensor, size: int, stride: int) -> Tensor:
    """Fast R-CNN's RoI max pooling: corners rounded to cells, both inclusive; bins from floor to ceil; empty bins 0."""
    x1, y1, x2, y2 = (math.floor(float(v) / stride + 0.5) for v in box)
    width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    out = torch.zeros(features.shape[1], size, size)
    for i in range(size):
        for j in range(size):
            top = min(max(y1 + math.floor(i * height / size), 0), features.shape[2])
            bottom = min(max(y1 + math.ceil((i + 1) * height / size), 0), features.shape[2])
            left = min(max(x1 + math.floor(j * width / size), 0), features.shape[3])
            right = min(max(x1 + math.ceil((j + 1) * width / size), 0), features.shape[3])
            if bottom > top and right > left:
                out[:, i, j] = features[0, :, top:bottom, left:right].amax((1, 2))
    return out


@pytest.mark.parametrize("stride", [8, 16])
def test_max_pooling_is_fast_rcnns(stride):
    features = torch.randn(1, 3, 9, 11, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor(
        [[0, 0, 80, 64], [10, 5, 70, 60], [30, 30, 31, 31], [3, 3, 100, 20], [60, 40, 88, 72], [-21, -9, 30, 200]]
    ).float()
    pooled = RoIPooling(4, stride, "max")(features, [boxes])
    for own, box in zip(pooled, boxes, strict=True):
        assert torch.equal(own, slow_roi_max_pool(features, box, 4, stride))


def test_align_samples_a_linear_map_at_the_cells_centres():
    """Bilinear sampling of a map that is linear in x and y is exact: the value at each cell's centre."""
    stride, size = 8, 3
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    features = torch.stack([(x + 0.5) * stride, (y + 0.5) * stride])[None]  # each cell holds its centre in pixels
    box = torch.tensor([[21.0, 33.0, 90.0, 75.0]])
    pooled = RoIPooling(size, stride, "align")(features, [box])[0]
    steps = (torch.arange(size) + 0.5) / size
    torch.testing.assert_close(pooled[0], (21 + 69 * steps).expand(size, size))
    torch.testing.assert_close(pooled[1], (33 + 42 * steps)[:, None].expand(size, size))


@pytest.mark.parametrize("kind", ["max", "align", "centred"])
def test_pooling_no_box_gives_no_row_and_an_unknown_kind_is_refused(kind):
    assert RoIPooling(7, 8, kind)(torch.zeros(1, 5, 6, 6), [torch.zeros(0, 4)]).shape == (0, 5, 7, 7)
    with pytest.raises(ValueError, match="align"):
        RoIPooling(7, 8, "mean")


def test_centred_pooling_samples_what_the_cells_see():
    """A map whose cells hold the middle of what they see, 3.5 pixels left of and above their own: exact again."""
    stride, size, offset = 8, 3, -3.5
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    features = torch.stack([(x + 0.5) * stride, (y + 0.5) * stride])[None] + offset
    box = torch.tensor([[21.0, 33.0, 90.0, 75.0]])
    pooled = RoIPooling(size, stride, "centred", offset)(features, [box])[0]
    steps = (torch.arange(size) + 0.5) / size
    torch.testing.assert_close(pooled[0], (21 + 69 * steps).expand(size, size))
    torch.testing.assert_close(pooled[1], (33 + 42 * steps)[:, None].expand(size, size))
    plain = RoIPooling(size, stride, "align", offset)(features, [box])[0]
    torch.testing.assert_close(plain, pooled + offset)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), nn.Conv2d(1, 1, 3, 1, 1), nn.Conv2d(1, 1, 5, 2, 2)), -1.5),
        (nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 1, 3, 1, 1), nn.AvgPool2d(2)), 0.0),
        (nn.Sequential(SameConv2d(1, 1, 3, 2), SameConv2d(1, 1, 5, 2)), 1.5),
        (nn.Sequential(nn.Conv2d(1, 1, 1, 2)), -0.5),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"), nn.Conv2d(1, 1, 2, 2, padding="valid")), 0.0),
        (nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), SameConv2d(1, 1, 2)), 0.5),
        (nn.Sequential(nn.Conv2d(1, 1, 3, 1, 1), nn.Flatten()), 0.0),
    ],
)
def test_where_cells_see(network, expected):
    assert cell_offset(network, torch.zeros(1, 1, 16, 16)) == expected


def test_initialise_is_normal_with_the_papers_deviation_and_zero_biases():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(300, 200), nn.Conv2d(30, 40, 3), nn.ReLU())
    initialise(layers)
    for layer in (layers[0], layers[1]):
        assert abs(float(layer.weight.data.std()) - 0.01) < 5e-4 and abs(float(layer.weight.data.mean())) < 5e-4
        assert not layer.bias.any()
    initialise(layers[0], std=0.001)
    assert float(layers[0].weight.data.std()) < 0.0015
    assert F.relu(layers[0](torch.ones(1, 300))).isfinite().all()


@pytest.mark.parametrize("kind", ["max", "align"])
def test_pooling_of_bfloat16_features_does_not_round_the_boxes(kind: str) -> None:
    features = torch.randn(1, 3, 60, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    boxes = torch.tensor([[0.0, 0.0, 100.0, 80.0], [517.3, 301.7, 611.1, 395.9]])
    pool = RoIPooling(7, 8, kind)
    assert torch.equal(pool(features, [boxes]), pool(features.float(), [boxes]))


@pytest.mark.parametrize("rois", [0, 3, 8])
def test_rois_a_part_at_a_time(rois, monkeypatch):
    monkeypatch.setattr(layers, "AT_A_TIME", 3)
    torch.manual_seed(0)
    head, pooled = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()), torch.rand(rois, 2, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(by_rois(head, pooled), head(pooled))
    assert by_rois(head, pooled).requires_grad
