"""Module 2: equations 3 and 4 written out, torchvision's own losses where all weights are 1, and the candidates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, clip_boxes_to_image

from labelpenet import config
from labelpenet.data.transforms import Batch, View
from labelpenet.instances import Instances
from labelpenet.models.build import build_backbone
from labelpenet.models.detection import ANCHOR_RATIOS, Detection, StrideAnchors, rcnn_loss
from tests.models.tiny import CHANNELS, TinyBackbone

C, H, W = 3, 96, 128


def detector(**options) -> Detection:
    backbone = TinyBackbone()
    values = {
        "anchor_sides": (16, 32, 64),
        "rois": 16,
        "rpn_post_nms_top_n_train": 20,
        "rpn_post_nms_top_n_test": 20,
    } | options
    torch.manual_seed(1)
    return Detection(backbone, C, config.Detection(**values))


def target(weights=(1.0, 1.0)) -> Instances:
    boxes = torch.tensor([[10.0, 12, 60, 70], [70, 20, 120, 60]])
    return Instances(boxes, torch.tensor([0, 2]), torch.tensor(weights), (H, W))


def stem_map() -> torch.Tensor:
    return torch.rand(1, CHANNELS, H // 16, W // 16, generator=torch.Generator().manual_seed(2))


IMAGE = torch.zeros(1, 3, H, W)
VIEW = View(IMAGE, (1.0, 1.0))


def batch(count: int = 1) -> Batch:
    return Batch([VIEW] * count, stem_map().expand(count, -1, -1, -1))


def smooth_l1(difference: float) -> float:
    """Faster R-CNN's, with its bend at 1/9."""
    size, beta = abs(difference), 1 / 9
    return 0.5 * size**2 / beta if size < beta else size - 0.5 * beta


# -------------------------------------------------------------------------------------------------------- equation 3


def test_rpn_loss_by_hand():
    """Few enough anchors that the sampler takes all: the sums are those of equation 3."""
    rpn = detector().rpn
    objectness = torch.tensor([0.3, -1.2, 2.0, 0.1, -0.4, 5.0])
    labels = torch.tensor([0.7, 0.0, 1.0, -1.0, 0.25, 0.0])  # weights of positives, 0 background, -1 left out
    deltas = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    found_objectness, found_box = rpn.compute_loss(objectness[:, None], deltas, [labels], [targets])
    sampled = [i for i in range(6) if labels[i] >= 0]
    cross_entropy = distance = 0.0
    for i in sampled:
        p, w = 1 / (1 + math.exp(-float(objectness[i]))), float(labels[i])
        cross_entropy -= w * math.log(p) + (1 - w) * math.log(1 - p)
        distance += w * sum(smooth_l1(float(deltas[i, k] - targets[i, k])) for k in range(4))
    assert float(found_objectness) == pytest.approx(cross_entropy / len(sampled), rel=1e-5)
    assert float(found_box) == pytest.approx(distance / len(sampled), rel=1e-5)


def test_with_weights_of_one_the_rpn_is_torchvisions():
    own = detector()
    one = own.rpn
    plain = RegionProposalNetwork(
        one.anchor_generator, one.head, 0.7, 0.3, 256, 0.5,
        {"training": 2000, "testing": 1000}, {"training": 20, "testing": 20}, 0.7,
    ).train()  # fmt: skip
    features = own.tail(stem_map())
    torch.manual_seed(3)
    proposals, losses = own.propose(features, [(H, W)], [target()])
    torch.manual_seed(3)
    expected_boxes, expected = plain(ImageList(IMAGE, [(H, W)]), {"0": features}, [{"boxes": target().boxes}])
    torch.testing.assert_close(proposals[0], expected_boxes[0])
    torch.testing.assert_close(losses["rpn_objectness"], expected["loss_objectness"])
    torch.testing.assert_close(losses["rpn_box"], expected["loss_rpn_box_reg"])


def test_an_anchors_label_is_the_weight_of_the_instance_that_it_fits_best():
    one = detector()
    anchors = one.rpn.anchor_generator(ImageList(IMAGE, [(H, W)]), [stem_map()])
    weights = torch.tensor([0.3, 0.8])
    labels, boxes = one.rpn.assign_targets_to_anchors(anchors, [{"boxes": target().boxes, "weights": weights}])
    plain, plain_boxes = RegionProposalNetwork.assign_targets_to_anchors(one.rpn, anchors, [{"boxes": target().boxes}])
    assert torch.equal(boxes[0], plain_boxes[0])
    positive = plain[0] > 0
    assert positive.sum() >= 2 and torch.equal(labels[0][~positive], plain[0][~positive])
    matched = box_iou(target().boxes, anchors[0][positive]).argmax(0)
    assert torch.equal(labels[0][positive], weights[matched])
    assert set(labels[0][positive].tolist()) == set(weights.tolist())


def test_anchors_are_no_coarser_where_the_network_runs_in_half():
    anchors = StrideAnchors((64, 128), (0.5, 1.0, 2.0), 16)
    images = ImageList(torch.zeros(1, 3, 480, 640), [(480, 640)])
    half, full = (
        anchors(images, [torch.zeros(1, 8, 30, 40, dtype=kind)])[0] for kind in (torch.bfloat16, torch.float32)
    )
    assert half.dtype == torch.float32 and torch.equal(half, full)


def test_the_rpn_learns_from_an_image_without_instances():
    one = detector()
    empty = Instances.empty((H, W))
    _, losses = one.propose(one.tail(stem_map()), [(H, W)], [empty])
    assert float(losses["rpn_objectness"]) > 0 and float(losses["rpn_box"]) == 0


# ------------------------------------------------------------------------------------------------- doubtful instances


@pytest.mark.parametrize("weighted", [True, False])
def test_doubtful_instances_are_neither_object_nor_background(weighted):
    """As if they were not there, but for the background that lies in them, which is ignored."""
    one = detector(weighted=weighted)
    anchors = one.rpn.anchor_generator(ImageList(IMAGE, [(H, W)]), [stem_map()])
    both, alone = target((0.6, 0.0)), target((0.6, 0.0))[:1]

    def labels(instances: Instances) -> torch.Tensor:
        given = [{"boxes": instances.boxes, "weights": one._weights(instances)}]
        return one.rpn.assign_targets_to_anchors(anchors, given)[0][0]

    x1, y1, x2, y2 = anchors[0].T
    width, height = (
        (torch.minimum(x2, torch.tensor(120.0)) - x1.clamp(min=70)).clamp(min=0),
        (torch.minimum(y2, torch.tensor(60.0)) - y1.clamp(min=20)).clamp(min=0),
    )
    within = width * height / ((x2 - x1) * (y2 - y1)) >= 0.5
    plain = labels(alone)
    assert torch.equal(labels(both), torch.where((plain == 0) & within, -1, plain))
    assert ((plain == 0) & within).sum() > 3 and ((plain == 0) & ~within).sum() > 3

    proposals = torch.tensor([[12.0, 12, 60, 66], [70, 20, 118, 60], [75, 22, 100, 50], [0, 80, 30, 96]])
    boxes, classes, _, _, matched = one.sample(proposals, both)
    found = {tuple(box): (label, which) for box, label, which in zip(
        boxes.tolist(), classes.tolist(), matched.tolist(), strict=True)}  # fmt: skip
    assert found == {(12, 12, 60, 66): (1, 0), (0, 80, 30, 96): (0, 0), (10, 12, 60, 70): (1, 0)}


def test_where_all_is_doubtful_the_rest_is_background():
    one = detector()
    proposals = torch.tensor([[70.0, 20, 118, 60], [0, 80, 30, 96], [12, 12, 58, 60]])
    boxes, labels, _, weights, _ = one.sample(proposals, target((0.0, 0.0)))
    assert boxes.tolist() == [[0, 80, 30, 96]] and labels.tolist() == [0] and weights.tolist() == [1]
    everywhere = Instances(torch.tensor([[0.0, 0, W, H]]), torch.tensor([1]), torch.zeros(1), (H, W))
    losses = one.losses(batch(), [everywhere])
    assert all(float(losses[name].detach()) == 0 for name in ("class", "box"))
    torch.stack(list(losses.values())).sum().backward()


# -------------------------------------------------------------------------------------------------------- equation 4


def rois(seed: int = 0, n: int = 8):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, C + 1, generator=generator)
    deltas = torch.randn(n, 4 * (C + 1), generator=generator) * 0.2
    labels = torch.randint(0, C + 1, (n,), generator=generator)
    targets = torch.randn(n, 4, generator=generator) * 0.2
    return logits, deltas, labels, targets, torch.rand(n, generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_rcnn_loss_by_hand(seed):
    logits, deltas, labels, targets, weights = rois(seed)
    classification = regression = 0.0
    for i, label in enumerate(labels.tolist()):
        p = logits[i].double().softmax(0)[label]
        classification -= float(weights[i]) * math.log(float(p))
        if label:
            own = deltas[i, 4 * label : 4 * label + 4]
            regression += float(weights[i]) * sum(smooth_l1(float(own[k] - targets[i, k])) for k in range(4))
    found = rcnn_loss(logits, deltas, labels, targets, weights)
    assert float(found[0]) == pytest.approx(classification / 8, rel=1e-5)
    assert float(found[1]) == pytest.approx(regression / 8, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_with_weights_of_one_the_rcnn_loss_is_torchvisions(seed):
    logits, deltas, labels, targets, _ = rois(seed)
    found = rcnn_loss(logits, deltas, labels, targets, torch.ones(8))
    expected = fastrcnn_loss(logits, deltas, [labels], [targets])
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_an_instance_of_weight_zero_teaches_nothing():
    logits, deltas, labels, targets, weights = rois()
    labels[:4] = torch.tensor([1, 2, 3, 0])
    weights[:4] = 0
    logits.requires_grad_()
    deltas.requires_grad_()
    sum(rcnn_loss(logits, deltas, labels, targets, weights)).backward()
    assert not logits.grad[:4].any() and not deltas.grad[:4].any()
    assert logits.grad[4:].any(1).all()


def test_no_roi_gives_a_loss_of_zero():
    logits, deltas, labels, targets, weights = (x[:0] for x in rois())
    assert [float(x) for x in rcnn_loss(logits, deltas, labels, targets, weights)] == [0, 0]


# ---------------------------------------------------------------------------------------------------- samples, losses


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_sample_carries_the_weight_of_the_instance_that_it_overlaps_most(seed):
    one = detector(rois=200)  # more than there are: all negatives are taken
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(25, 2, generator=generator) * 90
    proposals = torch.cat([corner, corner + 5 + torch.rand(25, 2, generator=generator) * 60], 1)
    given = target(weights=(0.25, 0.75))
    boxes, labels, encoded, weights, matched = one.sample(proposals, given)
    assert len(boxes) == 27  # the instances themselves join the proposals
    for box, label, code, weight, match in zip(boxes, labels, encoded, weights, matched, strict=True):
        overlap = box_iou(box[None], given.boxes)[0]
        best = int(overlap.argmax())
        assert float(weight) == (float(given.weights[best]) if overlap[best] > 0 else 1.0)
        assert int(label) == (int(given.labels[best]) + 1 if overlap[best] >= 0.5 else 0)
        if label:
            assert int(match) == best
            torch.testing.assert_close(one.coder.decode_single(code[None], box[None])[0], given.boxes[best])
    assert (labels > 0).sum() >= 2


def test_a_sample_is_at_most_a_quarter_positive():
    one = detector(rois=16)
    proposals = torch.cat([target().boxes.repeat(20, 1), torch.tensor([[0.0, 75, 9, 90]]).repeat(30, 1)])
    _, labels, _, _, _ = one.sample(proposals, target())
    assert len(labels) == 16 and (labels > 0).sum() == 4


def test_without_weights_every_sample_counts_alike():
    one = detector(weighted=False)
    _, _, _, weights, _ = one.sample(torch.rand(30, 4).cumsum(1) * 30, target(weights=(0.1, 0.2)))
    assert (weights == 1).all()


def test_a_sample_of_an_image_without_instances_is_background():
    one = detector(rois=8)
    proposals = torch.rand(30, 4).cumsum(1) * 30
    boxes, labels, encoded, weights, _ = one.sample(proposals, Instances.empty((H, W)))
    assert boxes.shape == encoded.shape == (8, 4)
    assert not labels.any() and (weights == 1).all()
    assert len(boxes.unique(dim=0)) == 8
    assert len(one.sample(proposals[:3], Instances.empty((H, W)))[0]) == 3


@pytest.mark.parametrize("which", ["two", "none", "weightless"])
def test_losses_are_finite_and_reach_every_layer_that_is_trained(which):
    one = detector()
    given = {"two": target((0.5, 0.9)), "none": Instances.empty((H, W)), "weightless": target((0.0, 0.0))}[which]
    losses = one.losses(batch(), [given])
    assert set(losses) == {"rpn_objectness", "rpn_box", "class", "box"}
    assert all(torch.isfinite(value) and value >= 0 for value in losses.values())
    sum(losses.values()).backward()
    assert one.rpn.head.objectness.weight.grad.any()
    if which == "two":
        layers = (one.classifier, one.regressor, one.rpn.head.regression, one.rpn.head.shared, one.tail[0])
        assert all(layer.weight.grad.any() for layer in layers)


# --------------------------------------------------------------------------------------------------------- candidates


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, (), (1,), (0, 2)]), st.sampled_from([0.05, 0.3]))
def test_candidates(seed, tags, threshold):
    one = detector(score_threshold=threshold)
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(30, 2, generator=generator) * 90
    boxes = torch.cat([corner, corner + 1 + torch.rand(30, 2, generator=generator) * 60], 1)
    scores = (torch.randn(30, C + 1, generator=generator) * 3).softmax(1)[:, 1:]
    regressed = boxes[:, None] + torch.randn(30, C, 4, generator=generator) * 8
    found, seen = one.candidates(boxes, scores, regressed, replace(VIEW, scale=(2.0, 0.5)), tags, limit=20)
    torch.testing.assert_close(found.boxes * torch.tensor([2.0, 0.5, 2.0, 0.5]), seen)
    torch.testing.assert_close(found.regions * torch.tensor([2.0, 0.5, 2.0, 0.5]), boxes[found.rois])
    assert len(found.boxes) <= 20 + len(tags or ())
    sure = found.scores > threshold
    if tags is not None:
        assert set(found.labels.tolist()) <= set(tags)
        kept = set(zip(found.rois.tolist(), found.labels.tolist(), strict=True))
        for tag in tags:  # unless its box has no size, the best of a known tag is there however doubtful
            best = int(scores[:, tag].argmax())
            box = clip_boxes_to_image(regressed[best, tag], (H, W))
            assert (best, tag) in kept or float((box[2:] - box[:2]).min()) < 1
            sure |= (found.rois == best) & (found.labels == tag)
    assert (seen >= 0).all() and (seen[:, 2] <= W).all() and (seen[:, 3] <= H).all()
    assert ((seen[:, 2:] - seen[:, :2]) >= 1).all()
    own = scores[found.rois, found.labels]
    torch.testing.assert_close(found.scores, torch.where(own > threshold, own, 0.0))
    assert sure.all() and (found.scores.diff() <= 0).all()


def test_answers_need_the_score_that_is_asked_for_and_known_tags_do_not(monkeypatch):
    """Module 2 with unknown tags gave the best of every class, however low its score."""
    one = detector(score_threshold=0.05, attention="gradient").eval()
    boxes = torch.tensor([[20.0, 20, 60, 60], [50, 30, 90, 80]])
    logits = torch.tensor([[2.0, 1, 0, -4], [2, 0, 1, -4]])
    monkeypatch.setattr(one, "propose", lambda features, sizes: ([boxes], {}))
    monkeypatch.setattr(one, "classify", lambda features: (logits, torch.zeros(2, 4 * (C + 1))))
    settings = replace(config.AttentionCalibration(), min_score=0.9, iterations=0)
    images = [np.zeros((H, W, 3), np.uint8)]
    for tags, expected in ((None, []), ((1,), [1]), ((0, 2), [0, 2])):
        ((found, _),) = one.infer(replace(batch(), images=images, tags=[tags]), settings)
        assert found.labels.tolist() == expected
        assert [weight > 0 for weight in found.weights.tolist()] == [label < 2 for label in expected]  # 2 is doubtful


def test_detections_take_the_box_of_their_class(monkeypatch):
    one = detector().eval()
    boxes = torch.tensor([[20.0, 20, 60, 60]])
    deltas = torch.zeros(1, C + 1, 4)
    deltas[0, 2] = torch.tensor([1.0, 0, 0, 0])  # a tenth of the width to the right, the coder's weights being 10 and 5
    monkeypatch.setattr(one, "propose", lambda features, sizes: ([boxes], {}))
    monkeypatch.setattr(one, "classify", lambda features: (torch.tensor([[0.0, 0, 9, 0]]), deltas.flatten(1)))
    (found,), (seen,), _ = one.detect(replace(batch(), tags=[None]))
    torch.testing.assert_close(found.boxes, torch.tensor([[24.0, 20, 64, 60]]))
    assert torch.equal(seen, found.boxes) and torch.equal(found.regions, boxes)
    assert found.labels.tolist() == [1] and found.rois.tolist() == [0]


def test_a_batch_is_its_images_one_by_one():
    """Detections of images that share a batch, padded or not, are those of each alone."""
    one = detector(score_threshold=0.2).eval()
    with torch.no_grad():
        alone = one.detect(Batch([VIEW], stem_map(), tags=[None]))
        small = View(torch.zeros(1, 3, H - 16, W - 32), (1.0, 1.0))
        found, seen, pooled = one.detect(Batch([VIEW, small], stem_map().expand(2, -1, -1, -1), tags=[None, (1,)]))
    torch.testing.assert_close(found[0].boxes, alone[0][0].boxes)
    torch.testing.assert_close(pooled[0], alone[2][0])
    assert set(found[1].labels.tolist()) <= {1}
    assert (seen[1][:, 2] <= W - 32).all() and (seen[1][:, 3] <= H - 16).all()


def test_losses_of_a_batch_are_finite_means():
    """Twice the same image has about its losses; the samples drawn differ."""
    one = detector()
    torch.manual_seed(0)
    alone = one.losses(batch(), [target()])
    both = one.losses(batch(2), [target(), target()])
    assert set(alone) == set(both)
    for name in alone:
        assert float(both[name].detach()) == pytest.approx(float(alone[name].detach()), rel=0.7, abs=0.05)


def test_training_and_inference_leave_the_layers_alone():
    one = detector()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    one.train()
    one.losses(batch(), [target()])
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("mobilenet_v2", (97, 143)),
        ("mobilenet_v2", (65, 100)),
        ("tiny", (80, 129)),
        ("tiny", (33, 47)),
        ("vgg16", (65, 100)),
    ],
)
def test_anchors_stand_where_the_map_looks(backbone, size):
    """Whatever the photograph's sides, the anchors of a cell are centred where a step of the map says."""
    parts = build_backbone(backbone, pretrained=False)
    for tail in (parts.region_tail(), parts.detection_tail()):
        image = torch.zeros(1, 3, *size)
        with torch.no_grad():
            features = tail.module(parts.stem.module(image))
        rows, columns = features.shape[-2:]
        anchors_of = StrideAnchors((16, 32), ANCHOR_RATIOS, tail.stride)
        (anchors,) = anchors_of(ImageList(image, [size]), [features])
        moved = StrideAnchors((16, 32), ANCHOR_RATIOS, tail.stride, 4.5)(ImageList(image, [size]), [features])[0]
        torch.testing.assert_close(moved, anchors + 4.5)
        centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).reshape(rows, columns, -1, 2)
        x = torch.arange(columns) * float(tail.stride)
        y = torch.arange(rows) * float(tail.stride)
        assert torch.equal(centres[..., 0], x[None, :, None].expand(rows, columns, 6))
        assert torch.equal(centres[..., 1], y[:, None, None].expand(rows, columns, 6))
        # the last cells look at the photograph's far edge, not beyond and not short of it
        assert 0 <= size[1] - x[-1] < 2 * tail.stride and 0 <= size[0] - y[-1] < 2 * tail.stride


def test_on_an_even_grid_the_anchors_are_torchvisions():
    own = detector()
    plain = AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),))
    images = ImageList(IMAGE, [(H, W)])
    assert torch.equal(own.rpn.anchor_generator(images, [stem_map()])[0], plain(images, [stem_map()])[0])
