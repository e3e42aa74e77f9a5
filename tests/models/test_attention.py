"""Attention maps of RoIs: what they attribute, and that RoIs do not see one another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from labelpenet.models import attention
from labelpenet.models.attention import attention_offset, roi_attention
from labelpenet.models.layers import RoIPooling

R, D, P, F, C = 7, 3, 4, 5, 3


def head() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(D, F, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def parts():
    layers, classifier = head(), nn.Linear(F, C)
    generator = torch.Generator().manual_seed(1)
    pooled = torch.rand(R, D, P, P, generator=generator)
    outputs = torch.randint(0, C, (R,), generator=generator)
    return layers, classifier, pooled, outputs, torch.rand(R, generator=generator)


def test_gradient_maps_of_positive_evidence_sum_to_the_logit():
    """Activation times gradient splits the logit of a linear classifier on averaged features over the cells."""
    layers, classifier, pooled, outputs, scores = parts()
    classifier.weight.data.abs_()
    found = roi_attention(layers, classifier, pooled, outputs, scores, "gradient")
    logits = classifier(layers(pooled)) - classifier.bias
    expected = logits[torch.arange(R), outputs] * scores
    torch.testing.assert_close(found.sum((1, 2)), expected.detach())


def test_gradient_maps_cut_negative_evidence_off_cell_by_cell():
    layers, classifier, pooled, outputs, scores = parts()
    found = roi_attention(layers, classifier, pooled, outputs, scores, "gradient")
    spatial = layers[:2](pooled).detach()
    for r in range(R):
        cells = torch.einsum("f,fij->ij", classifier.weight[outputs[r]].detach(), spatial[r]) / P**2
        torch.testing.assert_close(found[r], cells.clamp(min=0) * scores[r])
    assert not found.requires_grad and all(p.grad is None for p in layers.parameters())


def test_excitation_maps_keep_the_top_signal():
    """Excitation backprop hands on all of a signal that any excitatory connection can carry."""
    layers, classifier, pooled, outputs, scores = parts()
    found = roi_attention(layers, classifier, pooled, outputs, scores, "excitation")
    assert found.shape == (R, P, P) and (found >= 0).all()
    carried = found.sum((1, 2))
    excited = carried > 0
    assert excited.any()
    torch.testing.assert_close(carried[excited], scores[excited], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gradient", "excitation"])
def test_rois_do_not_see_one_another(kind, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 3)
    layers, classifier, pooled, outputs, scores = parts()
    together = roi_attention(layers, classifier, pooled, outputs, scores, kind)
    for r in range(R):
        part = slice(r, r + 1)
        alone = roi_attention(layers, classifier, pooled[part], outputs[part], scores[part], kind)
        torch.testing.assert_close(together[part], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gradient", "excitation"])
def test_maps_can_be_had_where_gradients_are_off(kind):
    layers, classifier, pooled, outputs, scores = parts()
    expected = roi_attention(layers, classifier, pooled, outputs, scores, kind)
    with torch.no_grad():
        assert torch.equal(roi_attention(layers, classifier, pooled, outputs, scores, kind), expected)


def test_no_roi_and_an_unknown_kind():
    layers, classifier, pooled, outputs, scores = parts()
    assert roi_attention(layers, classifier, pooled[:0], outputs[:0], scores[:0], "gradient").shape == (0, P, P)
    with pytest.raises(ValueError, match="excitation"):
        roi_attention(layers, classifier, pooled, outputs, scores, "gradcam")


def test_attention_lies_where_the_cells_left_over_look():
    """Behind a convolution of stride 2 the cells of a RoI look half a cell of 4 left of and above their middle."""
    layers = nn.Sequential(nn.Conv2d(D, F, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    centred, aligned = RoIPooling(P, 8, "centred", -3.5), RoIPooling(P, 8, "align")
    assert attention_offset(layers, D, centred, "gradient") == -0.5 / P
    assert attention_offset(layers, D, aligned, "gradient") == attention_offset(layers, D, centred, "excitation") == 0
    assert attention_offset(head(), D, centred, "gradient") == 0
