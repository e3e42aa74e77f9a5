"""Module 1 against equations 1 and 2 written out with plain probabilities in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labelpenet.models.classification import FRAME, Classification, frame_boxes
from tests.models.tiny import FEATURES, TinyBackbone

C = 4


def module(form: str = "paper", **options) -> Classification:
    return Classification(TinyBackbone(), C, form=form, **options).eval()


def random_logits(seed: int, proposals: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(proposals, C + 1, generator=generator) * 2, torch.randn(proposals, C, generator=generator) * 2)


def image_probabilities_by_hand(x_c: Tensor, x_p: Tensor, form: str) -> list[float]:
    """Equation 1: weights over proposals, weighted sum, softmax over classes (or, wsddn, before the sum)."""
    x_c, x_p = x_c.double()[:, 1:], x_p.double()
    summed = []
    for c in range(C):
        weight = x_p[:, c].exp() / x_p[:, c].exp().sum()
        if form == "wsddn":
            own = [float(row[c].exp() / row.exp().sum()) for row in x_c]
        else:
            own = x_c[:, c].tolist()
        summed.append(sum(float(w) * v for w, v in zip(weight, own, strict=True)))
    if form == "wsddn":
        return summed
    exponents = torch.tensor(summed, dtype=torch.float64).exp()
    return (exponents / exponents.sum()).tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tags", [(0,), (1, 3), (0, 1, 2, 3)])
def test_equation_2(seed, tags):
    x_c, x_p = random_logits(seed)
    present = torch.zeros(C)
    present[list(tags)] = 1
    p = torch.tensor(image_probabilities_by_hand(x_c, x_p, "paper"), dtype=torch.float64)
    one = module("paper")
    torch.testing.assert_close(one.image_probabilities(x_c, x_p).double(), p, atol=1e-6, rtol=1e-5)
    expected = -sum(float(p[c].log()) for c in tags)
    assert float(one.loss(x_c, x_p, present)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_wsddn_form(seed):
    x_c, x_p = random_logits(seed)
    present = torch.tensor([1.0, 0, 0, 1])
    p = image_probabilities_by_hand(x_c, x_p, "wsddn")
    one = module("wsddn")
    assert one.image_probabilities(x_c, x_p).tolist() == pytest.approx(p, rel=1e-5)
    expected = -sum(torch.tensor(v if on else 1 - v).log().item() for v, on in zip(p, present.tolist(), strict=True))
    assert float(one.loss(x_c, x_p, present)) == pytest.approx(expected, rel=1e-4)


def wsddn_loss_by_hand(x_c: Tensor, x_p: Tensor, present: Tensor) -> Tensor:
    """With 1 - s as the weighted sum of the other classes' probabilities, which loses nothing near s = 1."""
    p, weights = x_c[:, 1:].softmax(1), x_p.softmax(0)
    score = (p * weights).sum(0)
    absent = ((p @ (1 - torch.eye(C, dtype=p.dtype))) * weights).sum(0)
    return -(score.log() * present + absent.log() * (1 - present)).sum()


@pytest.mark.parametrize("sure", [0.0, 5.0, 12.0, 18.0, 30.0, 60.0])
def test_the_wsddn_form_and_its_gradient_near_certainty(sure):
    """A class that all proposals are sure of, absent or present: float32 against double precision."""
    x_c, x_p = random_logits(3)
    x_c[:, 2] += sure
    for present in (torch.tensor([0.0, 0, 1, 0]), torch.tensor([0.0, 1, 0, 0]), torch.zeros(C)):
        single = [x.clone().requires_grad_() for x in (x_c, x_p)]
        double = [x.double().requires_grad_() for x in (x_c, x_p)]
        loss, expected = module("wsddn").loss(*single, present), wsddn_loss_by_hand(*double, present.double())
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad(loss, single)
        for one, other in zip(gradients, torch.autograd.grad(expected, double), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)
    # The last image has no tag: what is believed and wrong must be unlearnt, however sure it is.
    assert sure < 10 or float(gradients[0][:, 2].sum()) > 0.5


def test_the_background_logit_takes_no_part_in_the_multi_label_loss():
    x_c, x_p = random_logits(0)
    other = x_c.clone()
    other[:, 0] += 100
    present = torch.tensor([0.0, 1, 0, 0])
    for form in ("paper", "wsddn"):
        one = module(form)
        assert torch.equal(one.loss(x_c, x_p, present), one.loss(other, x_p, present))


@pytest.mark.parametrize("form", ["paper", "wsddn"])
def test_the_order_of_the_proposals_does_not_matter(form):
    one = module(form)
    x_c, x_p = random_logits(5, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([1.0, 0, 1, 0])
    torch.testing.assert_close(one.loss(x_c, x_p, present), one.loss(x_c[order], x_p[order], present))
    torch.testing.assert_close(one.scores(x_c, x_p)[order], one.scores(x_c[order], x_p[order]))


@pytest.mark.parametrize("form", ["paper", "wsddn"])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
def test_extreme_logits_give_finite_losses_and_gradients(form, scale):
    one = module(form)
    for seed in range(4):
        x_c, x_p = (x.mul(scale).requires_grad_() for x in random_logits(seed))
        for present in (torch.zeros(C), torch.ones(C), torch.tensor([1.0, 0, 0, 0])):
            loss = one.loss(x_c, x_p, present)
            assert torch.isfinite(loss) and loss >= 0
            for gradient in torch.autograd.grad(loss, (x_c, x_p)):
                assert torch.isfinite(gradient).all()


def test_an_image_without_tags_teaches_the_paper_form_nothing():
    x_c, x_p = random_logits(1)
    assert float(module("paper").loss(x_c, x_p, torch.zeros(C))) == 0
    assert float(module("wsddn").loss(x_c, x_p, torch.zeros(C))) > 0


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="wsddn"):
        module("papper")


def test_forward_is_two_linear_branches_and_contrast_only_enters_the_weights():
    one = module(contrast=True)
    features, frames = torch.rand(5, FEATURES), torch.rand(5, FEATURES)
    x_c, x_p = one(features, frames)
    assert x_c.shape == (5, C + 1) and x_p.shape == (5, C)
    torch.testing.assert_close(x_c, one.classifier(features))
    torch.testing.assert_close(x_p, one.weigher(features - frames))
    plain = module()
    torch.testing.assert_close(plain(features, frames)[1], plain.weigher(features))


def test_the_new_layers_start_from_the_papers_normal():
    torch.manual_seed(1)
    one = Classification(TinyBackbone(), 400)
    for layer in (one.classifier, one.weigher):
        assert abs(float(layer.weight.data.std()) - 0.01) < 1e-3 and not layer.bias.any()


def test_gradients_reach_what_is_trained_and_nothing_else():
    boxes = torch.tensor([[0.0, 0, 64, 64], [16, 16, 80, 60]])
    for frozen in (False, True):
        one = module(freeze_head=frozen)
        stem = torch.rand(1, 6, 6, 6)
        x_c, x_p = one(one.features(stem, boxes))
        one.loss(x_c, x_p, torch.tensor([1.0, 0, 0, 0])).backward()
        assert one.classifier.weight.grad[1:].any() and one.weigher.weight.grad.any()
        assert not one.classifier.weight.grad[0].any()  # the background's row
        pretrained = [*one.tail.parameters(), *one.head.parameters()]
        assert all((p.grad is None) == frozen for p in pretrained)


def test_only_the_class_branch_learns_single_labels():
    one = module()
    features = torch.rand(6, FEATURES)
    labels = torch.tensor([0, 0, 1, 2, 4, 0])
    x_c, _ = one(features)
    loss = one.single_label_loss(x_c, labels)
    p = x_c.double().softmax(1)
    assert float(loss) == pytest.approx(-sum(float(p[i, c].log()) for i, c in enumerate(labels)) / 6, rel=1e-5)
    loss.backward()
    assert one.classifier.weight.grad[0].any() and one.weigher.weight.grad is None


def test_frame_boxes_grow_about_the_centre_and_stay_inside():
    boxes = torch.tensor([[40.0, 30, 60, 50], [0, 0, 100, 80], [90, 70, 100, 80]])
    frames = frame_boxes(boxes, (80, 100))
    grown = 20 * FRAME / 2
    torch.testing.assert_close(frames[0], torch.tensor([50 - grown, 40 - grown, 50 + grown, 40 + grown]))
    assert frames[1].tolist() == [0, 0, 100, 80]
    assert frames[2, 2:].tolist() == [100, 80] and (frames[2, :2] < boxes[2, :2]).all()
    assert frame_boxes(boxes[:0], (80, 100)).shape == (0, 4)
