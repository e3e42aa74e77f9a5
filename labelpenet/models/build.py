"""A backbone by its name, with pretrained weights."""

from collections.abc import Callable
from pathlib import Path

import torchvision
from torch import Tensor, nn

from labelpenet.errors import InputError
from labelpenet.models.backbones import VGG16, Backbone, MobileNetV2, Tiny, TinyNetwork
from labelpenet.models.weights import load_weights, torchvision_weights

BACKBONES: dict[str, tuple[Callable[..., nn.Module], type[Backbone]]] = {
    "vgg16": (torchvision.models.vgg16, VGG16),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, MobileNetV2),
    "tiny": (TinyNetwork, Tiny),
}


def build_backbone(name: str, weights: Path | None = None, pretrained: bool = True) -> Backbone:
    """The backbone called ``name`` with ImageNet weights.

    Args:
        name: one of `BACKBONES`, or ``timm/NAME``.
        weights: a state dict of torchvision's or timm's model of that name (``.safetensors``, or a ``.pt`` / ``.pth``
            that holds tensors only). Without it, the library's own weights are used, which it downloads once.
        pretrained: False for random weights (tests, speed).

    Raises:
        InputError: unknown name; a network that cannot be cut; weights that are missing, unreadable or of another one.
    """
    if name.startswith("timm/"):
        from labelpenet.models.timm_backbones import build_timm  # takes a second to import

        return build_timm(name, weights, pretrained)
    network = whole_network(name, weights, pretrained)
    kind = BACKBONES[name][1]
    own_statistics = name == "mobilenet_v2" and not _is_folded(network)
    backbone = kind(network)
    if own_statistics:
        backbone.mean, backbone.std = VGG16.mean, VGG16.std
    if weights is None and not (pretrained and kind.imagenet):
        backbone.untrained = network
    return backbone


def whole_network(name: str, weights: Path | None, pretrained: bool) -> nn.Module:
    """The whole network behind one of `BACKBONES`; arguments and errors as `build_backbone`."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}; choose from {', '.join(BACKBONES)} and timm/NAME (any of timm's)")
    build, kind = BACKBONES[name]
    network = build(weights=None)
    if weights is not None:
        load_weights(network, weights, name)
    elif pretrained and kind.imagenet:
        network.load_state_dict(torchvision_weights(name))
    return network


def _is_folded(network: nn.Module) -> bool:
    """Whether all batch norms are identities plus a bias, as in weights converted from an 8-bit model.

    Those, and MobileNetV2's random ones here, expect inputs in [-1, 1]; torchvision's own expect ImageNet's mean and
    standard deviation.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    return all(bool((layer.running_mean == 0).all()) for layer in norms if isinstance(layer.running_mean, Tensor))
