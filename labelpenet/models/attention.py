"""Proposal attention maps: where in a RoI the evidence for its class lies (section 3.2).

Shape letters: ``R`` RoIs, ``D`` channels, ``P`` side of the RoI features, ``a`` side of the attention map.
"""

import torch
from torch import Tensor, nn

from labelpenet.calibration import excitation_backprop, forward_with_activations
from labelpenet.models.layers import RoIPooling, by_rois, cell_offset

CHUNK = 64


def roi_attention(
    head: nn.Sequential, classifier: nn.Linear, pooled: Tensor, outputs: Tensor, scores: Tensor, kind: str
) -> Tensor:
    """Attention maps (R, a, a) >= 0 of RoIs, each for one output of the classifier.

    Args:
        head: the RoI head, ending in (R, D') features.
        classifier: the class branch on top of it.
        pooled: (R, D, P, P) from the RoI pooling.
        outputs: (R,) index of the classifier's output that each map explains.
        scores: (R,) the activation vector's entry: the class score of the RoI, >= 0.
        kind: ``excitation``: excitation backprop to the RoI features, summed over channels (a = P); ``gradient``:
            activation times gradient of the logit at the head's last spatial layer, summed over channels, negative
            sums cut off; for a linear classifier on averaged features these are its exact contributions.
    """
    if kind not in _KINDS:
        raise ValueError(f"attention must be 'excitation' or 'gradient', but got {kind!r}")
    with torch.no_grad():
        evidence = roi_evidence(head, pooled, kind)[1]
    return explain_rois(head, classifier, evidence, outputs, scores, kind)


def roi_evidence(head: nn.Sequential, pooled: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """RoI features (R, D'), and what `explain_rois` explains them by.

    Args:
        head: the RoI head, ending in (R, D') features.
        pooled: (R, D, P, P) from the RoI pooling.
        kind: see `roi_attention`.
    """
    if kind == "excitation":
        return by_rois(head, pooled), pooled
    split = _last_spatial(head)
    maps = by_rois(head[:split], pooled)
    return head[split:](maps), maps


def explain_rois(
    head: nn.Sequential, classifier: nn.Linear, evidence: Tensor, outputs: Tensor, scores: Tensor, kind: str
) -> Tensor:
    """As `roi_attention`, from the evidence (R, ...) of `roi_evidence`."""
    outputs = outputs.to(evidence.device)
    parts = [
        _KINDS[kind](head, classifier, evidence[start : start + CHUNK], outputs[start : start + CHUNK])
        for start in range(0, len(evidence), CHUNK)
    ]
    if not parts:
        return evidence.new_zeros(0, evidence.shape[-2], evidence.shape[-1])
    return torch.cat(parts) * scores.to(parts[0])[:, None, None]


def attention_offset(head: nn.Sequential, channels: int, pool: RoIPooling, kind: str) -> float:
    """How far right of and below their middles the cells of an attention map look, as a fraction of the RoI's side.

    They look beside them where a RoI head, which takes (R, D, P, P) of D ``channels``, halves the cells
    (`cell_offset`). 0 behind pools that are not ``centred``, which leave maps where they come, and
    for the kind ``excitation``, which goes back to the P x P cells.
    """
    if pool.kind != "centred" or kind == "excitation":
        return 0.0
    return cell_offset(head[: _last_spatial(head)], torch.zeros(1, channels, pool.size, pool.size)) / pool.size


def _last_spatial(head: nn.Sequential) -> int:
    """Where in a RoI head the layers end that keep the RoI's cells apart."""
    return next(i for i, layer in enumerate(head) if isinstance(layer, (nn.Flatten, nn.AdaptiveAvgPool2d)))


def _excitation(head: nn.Sequential, classifier: nn.Linear, pooled: Tensor, outputs: Tensor) -> Tensor:
    layers = [*head, classifier]
    logits, activations = forward_with_activations(layers, pooled.float())
    top = torch.zeros_like(logits)
    top[torch.arange(len(top), device=top.device), outputs] = 1
    return excitation_backprop(layers, pooled.float(), top, activations).sum(1)


def _gradient(head: nn.Sequential, classifier: nn.Linear, maps: Tensor, outputs: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = maps.detach().float().requires_grad_()
        logits = classifier(head[_last_spatial(head) :](leaf))
        chosen = logits[torch.arange(len(logits), device=logits.device), outputs].sum()
        (gradient,) = torch.autograd.grad(chosen, leaf)
    return (leaf.detach() * gradient).sum(1).clamp(min=0)


_KINDS = {"excitation": _excitation, "gradient": _gradient}
