"""Excitation backprop: where in a layer's input the evidence for a top-down signal lies (paper, section 3.2; its [41]).

One layer passes the signal ``P_out`` at its output down to its input by ::

    P_in = a_in * W+^T (P_out / (W+ a_in)),      W+ = max(W, 0), a_in = max(input, 0), 0/0 = 0

Biases take no part. A unit's signal is shared among the inputs that excite it, in proportion to their contribution, so
the sum is kept wherever at least one such input is active. Every rule below is this one formula: a layer only has to
say what its excitatory part ``W+`` does to an input; its transpose comes from autograd.

==============================  =====================================================================================
layer                           excitatory part
==============================  =====================================================================================
Linear, Conv2d                  positive weights (any stride, padding, dilation, groups); a batch norm that follows
                                directly is folded into the weights first
BatchNorm1d/2d, FrozenBatch-    in eval mode only: the positive per-channel scales; on its own it thus hands the signal
Norm2d                          of an active input on, and stops it where the scale is not positive
AvgPool2d, AdaptiveAvgPool2d    the averaging itself
MaxPool2d, AdaptiveMaxPool2d    the largest entry of each window, which gets the whole signal
`Residual`, InvertedResidual    ``y = g(x) + f(x)``: the signal is split between the two in the ratio of max(g(x), 0)
(torchvision; g(x) = x)         to max(f(x), 0), and each share goes on through its own layers
Sequential (hence torchvision's its layers, one after the other
Conv2dNormActivation)
ReLU, ReLU6, Flatten, Dropout,  the signal is passed on unchanged (through ReLU6 also where the value was clipped)
Identity
==============================  =====================================================================================

Activations that no ReLU has made non-negative (the linear bottlenecks of MobileNetV2) count as 0 where they are
negative: a negative input does not excite through a positive weight.

NaN or infinity in an input, a signal or a weight makes the excitation of that proposal NaN where it matters; it never
turns into a number, and never reaches another proposal. Nothing here waits for the device.

Shape letters: ``R`` proposals.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import FrozenBatchNorm2d

Layers = nn.Module | Iterable[nn.Module]
Step = tuple[nn.Module, nn.Module | None]
"""A layer and the batch norm that is folded into it."""

NORMS = (_BatchNorm, FrozenBatchNorm2d)
PASSING = (nn.ReLU, nn.ReLU6, nn.Flatten, _DropoutNd)


class Residual(nn.Module):
    """A sum of two chains of layers, ``branch(x) + shortcut(x)``; an empty shortcut passes ``x`` on."""

    def __init__(self, branch: nn.Sequential, shortcut: nn.Sequential) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(R, ...) to (R, ...)."""
        return self.branch(x) + self.shortcut(x)


def layer_without_rule(layers: Layers) -> str | None:
    """The type of the first layer that excitation backprop cannot pass, None if it passes all of them."""
    try:
        _steps(layers)
    except TypeError as error:
        return str(error).split(";")[0].removeprefix("no excitation rule for ")
    return None


def excitation_backprop(layers: Layers, x: Tensor, top: Tensor, activations: Sequence[Tensor] | None = None) -> Tensor:
    """Sends a top-down signal through a chain of layers, for all proposals at once (paper, section 3.2).

    Args:
        layers: the chain, first layer first: modules, or one nn.Sequential. See the table at the top of this module.
        x: (R, ...) input of the first layer.
        top: signal at the output of the last layer, shaped like that output, >= 0. The result is linear in it.
        activations: what `forward_with_activations` returned for the same layers and x, so that no layer runs twice.
            For some of the proposals only: ``x[keep], top[keep], [a[keep] for a in activations]``.

    Returns:
        The excitation at the input, shaped like x, >= 0, float32 (float64 if x or top is). Each proposal's sum is
        that of its signal, less what reached units without any active excitatory input.

    Raises:
        TypeError: a layer without a rule.
        ValueError: a batch norm in training mode; a top or activations that do not fit the layers.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, top.dtype), torch.float32)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        steps = _steps(layers)
        kept = _activations(steps, x.to(dtype)) if activations is None else list(activations)
        signal = _descend(steps, kept, top.to(dtype))
        if kept:
            raise ValueError(
                f"activations hold {len(kept)} tensors more than the layers use; pass those of the same layers"
            )
        if signal.numel() != x.numel():
            raise ValueError(f"top {tuple(top.shape)} does not fit the output of the layers for x {tuple(x.shape)}")
        return signal.reshape(x.shape)


def forward_with_activations(layers: Layers, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Runs a chain of layers and keeps what `excitation_backprop` will ask for.

    Gradients flow as usual, so the training step's own forward pass can be the one that is reused.

    Args:
        layers: the chain, as in `excitation_backprop`.
        x: (R, ...) input of the first layer.

    Returns:
        The output of the last layer, and the kept tensors: references to inputs of layers, no copies, each (R, ...).

    Raises:
        TypeError: a layer without a rule.
        ValueError: a batch norm in training mode.
    """
    return _forward(_steps(layers), x)


@singledispatch
def excitatory(layer: nn.Module, norm: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
    """The linear map ``a -> W+ a`` of one layer, for a non-negative input.

    Args:
        layer: the layer; the rule is chosen by its type.
        norm: the batch norm folded into it, for Linear and Conv2d.

    Raises:
        TypeError: no rule for this type; names those there are.
    """
    rules = [rule.__name__ for rule in excitatory.registry if rule is not object]
    passing = ["ReLU", "ReLU6", "Flatten", "Dropout", "Identity", "Sequential", "InvertedResidual", "Residual"]
    raise TypeError(
        f"no excitation rule for {type(layer).__name__}; there are rules for {', '.join(sorted(rules + passing))}"
    )


@excitatory.register
def _(layer: nn.Linear, norm: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
    return lambda a: F.linear(a, _positive_weight(layer, norm, a.dtype))


@excitatory.register
def _(layer: nn.Conv2d, norm: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
    # The layer's own method, since it knows how to pad (string paddings, reflection).
    return lambda a: layer._conv_forward(a, _positive_weight(layer, norm, a.dtype), None)


@excitatory.register(nn.BatchNorm1d)
@excitatory.register(nn.BatchNorm2d)
@excitatory.register(FrozenBatchNorm2d)
def _(layer: nn.Module, norm: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
    return lambda a: a * _scale(layer, a.dtype).clamp(min=0).reshape(1, -1, *[1] * (a.ndim - 2))


@excitatory.register(nn.AvgPool2d)
@excitatory.register(nn.AdaptiveAvgPool2d)
@excitatory.register(nn.MaxPool2d)
@excitatory.register(nn.AdaptiveMaxPool2d)
def _(layer: nn.Module, norm: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
    return partial(type(layer).forward, layer)


def _positive_weight(layer: nn.Linear | nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype) -> Tensor:
    weight = layer.weight.detach().to(dtype)
    if norm is not None:
        weight = weight * _scale(norm, dtype).reshape(-1, *[1] * (weight.ndim - 1))
    return weight.clamp(min=0)


def _scale(norm: Any, dtype: torch.dtype) -> Tensor:
    """The factor (channels,) by which a batch norm multiplies at test time."""
    scale = (norm.running_var.detach().to(dtype) + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach().to(dtype)


def _steps(layers: Layers) -> list[Step]:
    """The chain without nesting, each batch norm beside the Linear or Conv2d that it follows directly."""
    steps: list[Step] = []
    for layer in _flatten(layers):
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_var is None):
            raise ValueError("excitation backprop needs batch norms with fixed statistics; call eval() on the layers")
        if (
            isinstance(layer, NORMS)
            and steps
            and steps[-1][1] is None
            and isinstance(steps[-1][0], (nn.Linear, nn.Conv2d))
        ):
            steps[-1] = (steps[-1][0], layer)
        else:
            steps.append((layer, None))
    return steps


def _flatten(layers: Layers) -> Iterator[nn.Module]:
    for layer in [layers] if isinstance(layers, nn.Module) else layers:
        if isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward:
            yield from _flatten(layer.children())
        elif isinstance(layer, InvertedResidual) and not layer.use_res_connect:
            yield from _flatten(layer.conv)
        elif not isinstance(layer, nn.Identity):
            # refuses an unknown layer before any work is done
            if (summands := _summands(layer)) is not None:
                for chain in summands:
                    list(_flatten(chain))
            elif not isinstance(layer, PASSING):
                excitatory(layer)
            yield layer


def _summands(layer: nn.Module) -> tuple[Layers, Layers] | None:
    """Branch and shortcut of a residual sum; None for other layers."""
    if isinstance(layer, Residual):
        return layer.branch, layer.shortcut
    return (layer.conv, ()) if isinstance(layer, InvertedResidual) and layer.use_res_connect else None


def _forward(steps: Sequence[Step], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []
    for layer, norm in steps:
        if (summands := _summands(layer)) is not None:
            (branch, inner), (straight, outer) = (_forward(_steps(chain), x) for chain in summands)
            kept += [*inner, *outer, straight, branch]
            x = straight + branch
            continue
        if not isinstance(layer, PASSING):
            kept.append(x)
        x = layer(x)
        if norm is not None:
            x = norm(x)
    return x, kept


def _activations(steps: Sequence[Step], x: Tensor) -> list[Tensor]:
    """What `_forward` keeps, without computing the output of the last layer, which nothing needs."""
    while steps and isinstance(steps[-1][0], PASSING):
        steps = steps[:-1]
    if not steps or _summands(steps[-1][0]) is not None:
        return _forward(steps, x)[1]
    y, kept = _forward(steps[:-1], x)
    return [*kept, y]


def _descend(steps: Sequence[Step], kept: list[Tensor], signal: Tensor) -> Tensor:
    """Sends the signal from the output of the last step to the input of the first; takes its activations off ``kept``.

    Flatten needs no rule of its own: whatever lies below gives the signal the shape of its output again.
    """
    for layer, norm in reversed(steps):
        if isinstance(layer, PASSING):
            continue
        if (summands := _summands(layer)) is not None:
            branch, straight = _take(kept, signal), _take(kept, signal)
            to_straight, to_branch = _split(straight, branch, signal.reshape(straight.shape))
            outer = _descend(_steps(summands[1]), kept, to_straight)
            inner = _descend(_steps(summands[0]), kept, to_branch)
            signal = outer + inner.reshape(outer.shape)
        else:
            signal = _share(excitatory(layer, norm), _take(kept, signal), signal)
    return signal


def _take(kept: list[Tensor], signal: Tensor) -> Tensor:
    if not kept:
        raise ValueError("activations hold fewer tensors than the layers use; pass those of the same layers")
    return kept.pop().to(signal.dtype)


def _share(excite: Callable[[Tensor], Tensor], a: Tensor, signal: Tensor) -> Tensor:
    """``a * W+^T (signal / (W+ a))`` for the map ``excite: a -> W+ a``."""
    with torch.enable_grad():
        active = a.detach().clamp(min=0).requires_grad_()
        total = excite(active)
    if signal.shape[:1] != total.shape[:1] or signal.numel() != total.numel():
        raise ValueError(f"the signal is {tuple(signal.shape)}, but the output of its layer is {tuple(total.shape)}")
    (shares,) = torch.autograd.grad(total, active, _divide(signal.reshape(total.shape), total.detach()))
    return shares.mul_(active.detach())


def _split(straight: Tensor, branch: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    """The signal of ``straight + branch``, shared in the ratio of their positive parts."""
    straight, branch = straight.clamp(min=0), branch.clamp(min=0)
    ratio = _divide(signal, straight + branch)
    return straight * ratio, branch * ratio


def _divide(signal: Tensor, total: Tensor) -> Tensor:
    """``signal / total`` with 0/0 = 0. A total so small that the quotient could overflow counts as 0; NaN stays."""
    return torch.where(total <= torch.finfo(total.dtype).tiny * 1e8, 0.0, signal / total)
