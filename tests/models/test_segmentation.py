"""Modules 3 and 4: what the mask branch is trained on and what it answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import MultiScaleRoIAlign

from labelpenet import config
from labelpenet.data.transforms import Batch, View
from labelpenet.instances import Instances
from labelpenet.models.layers import PyramidPooling
from labelpenet.models.segmentation import (
    MASK_SIDE,
    PYRAMID_DILATIONS,
    Segmentation,
    SpatialPyramid,
    crop_masks,
    enlarge,
    mask_loss,
)
from tests.models.tiny import CHANNELS, TinyBackbone, lively_mobilenet

C, H, W = 3, 96, 128
VIEW = View(torch.zeros(1, 3, H, W), (1.0, 1.0))


def segmenter(**options) -> Segmentation:
    values = {"anchor_sides": (16, 32, 64), "rois": 16, "mask_width": 5, "mask_depth": 1} | options
    torch.manual_seed(1)
    return Segmentation(TinyBackbone(), C, config.Segmentation("refinement", **values))


def target(weights=(0.5, 1.0), masks: bool = True) -> Instances:
    boxes = torch.tensor([[10.0, 12, 60, 70], [70, 20, 120, 60]])
    drawn = torch.zeros(2, H, W, dtype=torch.bool)
    drawn[0, 12:70, 10:60] = drawn[1, 20:60, 70:120] = True
    return Instances(boxes, torch.tensor([0, 2]), torch.tensor(weights), (H, W), drawn if masks else None)


def stem_map() -> torch.Tensor:
    return torch.rand(1, CHANNELS, H // 16, W // 16, generator=torch.Generator().manual_seed(2))


def random_masks() -> torch.Tensor:
    return torch.rand(2, H, W, generator=torch.Generator().manual_seed(0)) > 0.5


def test_the_mask_target_is_the_mask_inside_the_box():
    """On boxes of as many pixels as the prediction has cells, pixel for pixel, however ragged the mask."""
    side = 28
    masks, boxes = random_masks(), torch.tensor([[10.0, 12, 38, 40], [70, 20, 98, 48], [0, 0, 28, 28]])
    matched, weights = torch.tensor([0, 1, 1]), torch.tensor([0.3, 0.9, 0.0])
    logits = torch.randn(3, side, side, generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for r, (x1, y1, x2, y2) in enumerate(boxes.long().tolist()):
        inside = masks[matched[r], y1:y2, x1:x2].double()
        p = logits[r].double().sigmoid()
        entropy = -(inside * p.log() + (1 - inside) * (1 - p).log()).mean()
        expected += float(weights[r] * entropy) / 3
    assert float(mask_loss(logits, crop_masks(masks, boxes, matched, 28), weights)) == pytest.approx(expected, rel=1e-5)


def test_the_mask_target_follows_the_boxs_scale():
    """A box twice and half as large as the prediction, around a mask that keeps to the cells."""
    masks = torch.zeros(1, H, W, dtype=torch.bool)
    masks[0, 16:48, 8:36] = True
    for box, cells in (([8.0, 16, 64, 72], (16, 14)), ([22.0, 34, 36, 48], (28, 28))):
        inside = torch.zeros(28, 28)
        inside[: cells[0], : cells[1]] = 1
        logits = torch.where(inside > 0, 40.0, -40.0)[None]
        loss = mask_loss(logits, crop_masks(masks, torch.tensor([box]), torch.tensor([0]), 28), torch.ones(1))
        assert float(loss) < 1e-6


def test_a_roi_of_weight_zero_teaches_no_mask():
    logits = torch.zeros(2, 28, 28, requires_grad=True)
    boxes = torch.tensor([[10.0, 12, 38, 40], [70, 20, 98, 48]])
    crops = crop_masks(random_masks(), boxes, torch.tensor([0, 1]), 28)
    mask_loss(logits, crops, torch.tensor([0.0, 1.0])).backward()
    assert not logits.grad[0].any() and logits.grad[1].any()


def test_the_pyramid_looks_as_far_as_its_dilations_say():
    assert PYRAMID_DILATIONS == (1, 2, 4, 6)
    pyramid = SpatialPyramid(1, 1)
    impulse = torch.zeros(1, 1, 15, 15)
    impulse[0, 0, 7, 7] = 1
    for number, dilation in enumerate(PYRAMID_DILATIONS):
        with torch.no_grad():
            for i, branch in enumerate(pyramid.branches):
                branch.weight.fill_(float(i == number))
                branch.bias.zero_()
            pyramid.mix.weight.fill_(1)
            pyramid.mix.bias.zero_()
            answer = pyramid(impulse)[0, 0]
        expected = torch.zeros(15, 15)
        expected[7 - dilation : 8 + dilation : dilation, 7 - dilation : 8 + dilation : dilation] = 1
        assert torch.equal(answer, expected)


def test_each_box_gets_the_mask_of_its_class():
    one = segmenter()
    with torch.no_grad():
        one.mask_head.logits.weight.zero_()
        one.mask_head.logits.bias.copy_(torch.tensor([-2.0, 0.0, 2.0]))
    boxes = torch.tensor([[0.0, 0, 60, 60], [20, 20, 90, 90], [5, 5, 50, 50], [0, 0, 128, 96]])
    labels = torch.tensor([2, 0, 1, 2])
    found = one.masks(one.mask_features(stem_map()), [boxes], labels)
    expected = torch.tensor([-2.0, 0.0, 2.0]).sigmoid()[labels]
    torch.testing.assert_close(found, expected[:, None, None].expand(4, MASK_SIDE, MASK_SIDE))
    assert one.masks(one.mask_features(stem_map()), [boxes[:0]], labels[:0]).shape == (0, MASK_SIDE, MASK_SIDE)


def test_a_margin_lets_a_mask_leave_its_box():
    """Full masks fill the enlarged boxes, and what is learnt is the object's mask inside them."""
    grown = enlarge(torch.tensor([[10.0, 20, 30, 60]]), 0.5)
    assert grown.tolist() == [[5, 10, 35, 70]] and torch.equal(enlarge(grown, 0.0), grown)
    areas, seen = [], []
    for margin in (0.0, 0.2):
        one = segmenter(mask_margin=margin, score_threshold=0.0)
        one.masks = lambda features, boxes, labels: torch.ones(len(labels), MASK_SIDE, MASK_SIDE)  # type: ignore[method-assign]
        photograph = np.zeros((H, W, 3), np.uint8)
        batch = Batch([VIEW], stem_map(), [photograph], [(0,)])
        choice = config.MaskCalibration(per_class=1, iterations=0, threshold=0.5, min_score=0.0, nms=0.0)
        areas.append(int(one.eval().infer(batch, choice)[0][0].masks.sum()))
        one.mask_pool.register_forward_pre_hook(lambda _, given: seen.append(given[1][0]))
        torch.manual_seed(5)
        one.train().losses(Batch([VIEW], stem_map()), [target()])
    assert areas[1] > areas[0]
    assert len(seen[0]) and torch.equal(enlarge(seen[0], 0.2), seen[1])


def test_detection_and_mask_branch_have_tails_of_their_own():
    one = segmenter()
    one.masks(one.mask_features(stem_map()), [target().boxes], target().labels).sum().backward()
    assert one.mask_tail[0].weight.grad.any() and one.tail[0].weight.grad is None
    assert one.head[0][0].weight.grad is None


@pytest.mark.parametrize("which", ["masks", "boxes", "nothing", "weightless"])
def test_losses(which):
    one = segmenter()
    given = {
        "masks": target(), "boxes": target(masks=False), "nothing": Instances.empty((H, W), with_masks=True),
        "weightless": target(weights=(0.0, 0.0)),
    }[which]  # fmt: skip
    losses = one.losses(Batch([VIEW], stem_map()), [given])
    assert set(losses) == {"rpn_objectness", "rpn_box", "class", "box", "mask"}
    assert all(torch.isfinite(value) and value >= 0 for value in losses.values())
    sum(losses.values()).backward()
    learns = which == "masks"
    assert (float(losses["mask"]) > 0) == learns
    assert bool(one.pyramid.mix.weight.grad.any()) == learns
    if learns:
        assert all(layer.weight.grad.any() for layer in (one.mask_head.logits, one.mask_head.up, one.mask_tail[0]))


def test_an_empty_mask_beside_others_teaches_none():
    """That of an instance of which only the box is known; boxes and classes it teaches all the same."""
    boxed, one = target(), segmenter()
    assert boxed.masks is not None
    boxed.masks[1] = False
    losses = one.losses(Batch([VIEW], stem_map()), [boxed])
    losses["mask"].backward(retain_graph=True)
    learnt = one.mask_head.logits.weight.grad.flatten(1).any(1).tolist()
    assert learnt == [True, False, False] and losses["mask"] > 0
    losses["class"].backward()
    assert one.classifier.weight.grad[3].any()


def test_module_four_is_trained_without_weights():
    """Full supervision on the output of module 3: the weights may be anything."""
    losses = []
    for weights in ((0.1, 0.2), (1.0, 1.0)):
        one = segmenter(weighted=False)
        torch.manual_seed(4)
        losses.append(one.losses(Batch([VIEW], stem_map()), [target(weights)]))
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name])


@pytest.mark.parametrize("pyramid", [False, True])
def test_the_mask_learns_an_object(pyramid):
    """A few steps on one image bring the mask of a box close to the box's filling."""
    one = segmenter(pyramid=pyramid)
    optimiser = torch.optim.Adam([*one.pyramid.parameters(), *one.mask_head.parameters()], 0.02)
    masks = torch.zeros(1, H, W, dtype=torch.bool)
    masks[0, 20:48, 20:34] = True
    box, stem = torch.tensor([[20.0, 20, 48, 48]]), stem_map()
    for _ in range(60):
        optimiser.zero_grad()
        logits = one.mask_head(one.mask_pool(one.mask_features(stem, stem), [box]))[:, 1]
        loss = mask_loss(logits, crop_masks(masks, box, torch.tensor([0]), 28), torch.ones(1))
        loss.backward()
        optimiser.step()
    found = one.masks(one.mask_features(stem, stem), [box], torch.tensor([1]))[0] > 0.5
    expected = F.interpolate(masks[:, None, 20:48, 20:48].float(), (28, 28))[0, 0] > 0.5
    assert (found == expected).float().mean() > 0.9


def test_a_feature_pyramid_reads_pretrained_maps_and_leaves_them():
    """Of strides 8, 16 and 32 where the backbone has them; behind the stem only the pyramid's own layers learn."""
    torch.manual_seed(0)
    backbone = lively_mobilenet(0)
    settings = config.Segmentation("refinement", anchor_sides=(16, 32, 64), rois=16, mask_width=5, mask_depth=1)
    one = Segmentation(backbone, C, replace(settings, pyramid=True, roi_cells=8))
    assert one.pyramid.strides == [8, 16, 32] and one.pyramid.offsets == [-3.5, -7.5, -15.5]
    assert one.pool.size == 8
    fine = backbone.fine.module(torch.rand(1, 3, H, W)).detach().requires_grad_()
    stem = backbone.stem.module[len(backbone.fine.module) :](fine)
    features = one.mask_features(stem, fine)
    assert [map_.shape[-2:] for map_ in features] == [(12, 16), (6, 8), (3, 4)]
    losses = one.train().losses(Batch([VIEW], stem, fine=fine), [target()])
    losses["mask"].backward()
    assert fine.grad.any() and one.mask_head.logits.weight.grad.any()
    assert all(layer.weight.grad.any() for block in one.pyramid.fpn.inner_blocks for layer in block)
    assert all(value.grad is None for value in one.pyramid.late.parameters())


def test_masks_come_from_the_pyramids_map_that_fits_the_roi():
    """As torchvision's pooler of several maps, which takes each RoI's level from its area."""
    strides = [8, 16, 32]
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 4, 512 // stride, 640 // stride, generator=generator) for stride in strides]
    corners = torch.rand(60, 2, generator=generator) * 200
    sides = 8 + torch.rand(60, 2, generator=generator) ** 2 * 430
    sides[0] = torch.tensor([14 * 16, 14 * 16])  # where the coarser map begins
    boxes = torch.cat([corners, corners + sides], 1).split([25, 35])
    theirs = MultiScaleRoIAlign(["8", "16", "32"], 14, 2)
    expected = theirs(dict(zip(["8", "16", "32"], maps, strict=True)), list(boxes), [(512, 640)] * 2)
    # torchvision's pooler takes the middle of a cell for its corner
    found = PyramidPooling(14, strides, "centred", [-stride / 2 for stride in strides])(maps, boxes)
    torch.testing.assert_close(found, expected)
