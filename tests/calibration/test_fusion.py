"""Labels of several models put together."""

from __future__ import annotations

import pytest
import torch

from labelpenet.calibration.fusion import fuse
from labelpenet.instances import Instances

SIZE = (40, 60)
LEFT, RIGHT, BOTH = [2, 2, 22, 30], [26, 2, 46, 30], [2, 2, 46, 30]


def opinion(*instances: tuple[list[int], int, float], masks: bool = True) -> Instances:
    boxes = torch.tensor([box for box, _, _ in instances], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([label for _, label, _ in instances], dtype=torch.long)
    drawn = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(drawn, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    weights = torch.tensor([weight for _, _, weight in instances])
    return Instances(boxes, labels, weights, SIZE, drawn if masks else None)


def test_what_two_models_see_is_surer_than_what_one_believes():
    found = fuse([opinion((LEFT, 0, 0.6)), opinion((LEFT, 0, 0.8), (RIGHT, 0, 0.9))], (0,))
    assert found.boxes.tolist() == [LEFT, RIGHT]
    torch.testing.assert_close(found.weights, torch.tensor([0.7, 0.45]))


def test_two_that_stand_together_are_told_apart_where_the_surer_model_does():
    merged, apart = opinion((BOTH, 0, 0.6)), opinion((LEFT, 0, 0.9), (RIGHT, 0, 0.8), (BOTH, 0, 0.1))
    assert fuse([merged, apart], (0,)).boxes.tolist() == [LEFT, RIGHT]


def test_only_classes_of_the_tags_stay_and_classes_do_not_support_one_another():
    found = fuse([opinion((LEFT, 0, 0.5), (RIGHT, 2, 0.9)), opinion((LEFT, 1, 0.7))], (0, 1))
    assert sorted(zip(found.labels.tolist(), found.weights.tolist(), strict=True)) == [
        (0, pytest.approx(0.25)),
        (1, pytest.approx(0.35)),
    ]


def test_the_outline_is_the_first_models_and_the_weight_stays():
    near = [3, 3, 22, 30]
    found = fuse([opinion((near, 0, 0.2)), opinion((LEFT, 0, 0.9))], (0,))
    assert found.boxes.tolist() == [near] and found.masks[0].sum() == 19 * 27
    iou = 19 * 27 / (20 * 28)
    torch.testing.assert_close(found.weights, torch.tensor([(0.9 + 0.2 * iou) / 2]))


def test_a_box_alone_beside_masks_is_no_outline():
    near = [3, 3, 22, 30]
    boxed = opinion((near, 0, 0.9), (RIGHT, 0, 0.8))
    assert boxed.masks is not None
    boxed.masks[0] = False
    drawn = opinion((LEFT, 0, 0.5), (RIGHT, 0, 0.5))
    for opinions in ([boxed, drawn], [drawn, boxed]):
        found = fuse(opinions, (0,))
        assert found.boxes.tolist() == [LEFT, RIGHT] and found.masks.flatten(1).sum(1).tolist() == [20 * 28] * 2
    assert fuse([boxed], (0,)).boxes.tolist() == [near, RIGHT]  # which nobody has drawn


def test_an_instance_of_weight_zero_gives_no_outline():
    # a tag of which a cascade is sure nowhere: its mask fills its box
    near = [3, 3, 22, 30]
    for opinions in (
        [opinion((near, 0, 0.0)), opinion((LEFT, 0, 0.9))],
        [opinion((LEFT, 0, 0.9)), opinion((near, 0, 0.0))],
    ):
        found = fuse(opinions, (0,))
        assert found.boxes.tolist() == [LEFT] and found.weights.tolist() == [pytest.approx(0.45)]
    assert fuse([opinion((near, 0, 0.0))], (0,)).boxes.tolist() == [near]


def test_no_outline_is_used_twice():
    # both of the second model's lie over six tenths of the first model's, but under the NMS of one another
    first, left, right = opinion(([0, 0, 40, 10], 0, 0.1)), ([0, 0, 25, 10], 0, 0.9), ([15, 0, 40, 10], 0, 0.8)
    found = fuse([first, opinion(left, right)], (0,))
    assert found.boxes.tolist() == [[0, 0, 40, 10]]


def test_a_model_without_an_opinion_and_one_without_masks():
    nothing = Instances.empty(SIZE, with_masks=True)
    found = fuse([nothing, opinion((LEFT, 0, 0.8))], (0,))
    assert found.weights.tolist() == [pytest.approx(0.4)] and found.masks is not None
    assert len(fuse([nothing, nothing], (0,))) == len(fuse([opinion((LEFT, 0, 0.8))], ())) == 0
    assert fuse([opinion((LEFT, 0, 0.8), masks=False), nothing], (0,)).masks is None


def test_order_of_instances_does_not_matter_and_one_model_alone_keeps_its_weights():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(12, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + 8 + 12 * torch.rand(12, 2, generator=generator)], 1)
    one = Instances(boxes, torch.arange(12) % 2, torch.rand(12, generator=generator), SIZE)
    shuffled = one[torch.randperm(12, generator=generator)]
    found, again = fuse([one], (0, 1)), fuse([shuffled], (0, 1))
    assert torch.equal(found.boxes, again.boxes) and torch.equal(found.weights, again.weights)
    assert set(found.weights.tolist()) <= set(one.weights.tolist())
    assert found.weights.tolist() == sorted(found.weights.tolist(), reverse=True)


def test_opinions_of_different_photographs_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        fuse([], (0,))
    other = Instances(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([0]), torch.tensor([0.5]), (4, 4))
    with pytest.raises(ValueError, match="one image"):
        fuse([opinion((LEFT, 0, 0.8)), other], (0,))


def test_the_boxes_of_one_model_do_not_cost_the_outlines_of_another():
    boxes, masks = opinion((LEFT, 0, 0.6), (BOTH, 1, 0.9), masks=False), opinion((LEFT, 0, 0.8), (RIGHT, 0, 0.5))
    for opinions in ([boxes, masks], [masks, boxes]):
        found = fuse(opinions, (0, 1))
        assert found.masks is not None
        outlines = {tuple(box): int(mask.sum()) for box, mask in zip(found.boxes.tolist(), found.masks, strict=True)}
        # an object that a box alone knows gets the outline of the model that has drawn it, or none
        assert outlines == {tuple(map(float, LEFT)): 20 * 28, tuple(map(float, RIGHT)): 20 * 28, tuple(BOTH): 0}
    assert fuse([boxes, masks], (1,)).masks is None, "no outline of this class"
