"""Module 1 against equations 1 and 2 written out with plain probabilities in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labelpenet import config
from labelpenet.data.transforms import Batch, View
from labelpenet.models.classification import Classification
from tests.models.tiny import FEATURES, TinyBackbone

C = 4


def module(**options) -> Classification:
    return Classification(TinyBackbone(), C, config.Classification(**options)).eval()


def random_logits(seed: int, proposals: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(proposals, C + 1, generator=generator) * 2, torch.randn(proposals, C, generator=generator) * 2)


def image_probabilities_by_hand(x_c: Tensor, x_p: Tensor) -> list[float]:
    """Equation 1: weights over proposals, weighted sum, softmax over classes."""
    x_c, x_p = x_c.double()[:, 1:], x_p.double()
    summed = []
    for c in range(C):
        weight = x_p[:, c].exp() / x_p[:, c].exp().sum()
        summed.append(sum(float(w) * v for w, v in zip(weight, x_c[:, c].tolist(), strict=True)))
    exponents = torch.tensor(summed, dtype=torch.float64).exp()
    return (exponents / exponents.sum()).tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tags", [(0,), (1, 3), (0, 1, 2, 3)])
def test_equation_2(seed, tags):
    x_c, x_p = random_logits(seed)
    present = torch.zeros(C)
    present[list(tags)] = 1
    p = torch.tensor(image_probabilities_by_hand(x_c, x_p), dtype=torch.float64)
    one = module()
    torch.testing.assert_close(one.image_probabilities(x_c, x_p).double(), p, atol=1e-6, rtol=1e-5)
    expected = -sum(float(p[c].log()) for c in tags)
    assert float(one.loss(x_c, x_p, present)) == pytest.approx(expected, rel=1e-5)


def test_the_background_logit_takes_no_part_in_the_multi_label_loss():
    x_c, x_p = random_logits(0)
    other = x_c.clone()
    other[:, 0] += 100
    present = torch.tensor([0.0, 1, 0, 0])
    one = module()
    assert torch.equal(one.loss(x_c, x_p, present), one.loss(other, x_p, present))


def test_the_order_of_the_proposals_does_not_matter():
    one = module()
    x_c, x_p = random_logits(5, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([1.0, 0, 1, 0])
    torch.testing.assert_close(one.loss(x_c, x_p, present), one.loss(x_c[order], x_p[order], present))
    torch.testing.assert_close(one.scores(x_c, x_p)[order], one.scores(x_c[order], x_p[order]))


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
def test_extreme_logits_give_finite_losses_and_gradients(scale):
    one = module()
    for seed in range(4):
        x_c, x_p = (x.mul(scale).requires_grad_() for x in random_logits(seed))
        for present in (torch.zeros(C), torch.ones(C), torch.tensor([1.0, 0, 0, 0])):
            loss = one.loss(x_c, x_p, present)
            assert torch.isfinite(loss) and loss >= 0
            for gradient in torch.autograd.grad(loss, (x_c, x_p)):
                assert torch.isfinite(gradient).all()


def test_an_image_without_tags_teaches_nothing():
    x_c, x_p = random_logits(1)
    assert float(module().loss(x_c, x_p, torch.zeros(C))) == 0


def test_forward_is_two_linear_branches():
    one = module()
    features = torch.rand(5, FEATURES)
    x_c, x_p = one(features)
    assert x_c.shape == (5, C + 1) and x_p.shape == (5, C)
    torch.testing.assert_close(x_c, one.classifier(features))
    torch.testing.assert_close(x_p, one.proposal_weights(features))


@pytest.mark.parametrize(("initialiser", "deviation"), [("gaussian", 0.01), ("he", (2 / FEATURES) ** 0.5)])
def test_the_new_layers_start_from_the_recipes_normal(initialiser, deviation):
    torch.manual_seed(1)
    one = Classification(TinyBackbone(), 400, config.Classification(initialiser=initialiser))
    for layer in (one.classifier, one.proposal_weights):
        assert float(layer.weight.data.std()) == pytest.approx(deviation, rel=0.1) and not layer.bias.any()


def test_gradients_reach_what_is_trained_and_nothing_else():
    boxes = torch.tensor([[0.0, 0, 64, 64], [16, 16, 80, 60]])
    for frozen in (False, True):
        one = module(freeze_head=frozen)
        stem = torch.rand(1, 6, 6, 6)
        x_c, x_p = one(one.features(Batch([View(torch.zeros(1, 3, 96, 96), (1.0, 1.0))], stem, proposals=[boxes]))[0])
        one.loss(x_c, x_p, torch.tensor([1.0, 0, 0, 0])).backward()
        assert one.classifier.weight.grad[1:].any() and one.proposal_weights.weight.grad.any()
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
    assert one.classifier.weight.grad[0].any() and one.proposal_weights.weight.grad is None
