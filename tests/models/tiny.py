"""Backbones without pretrained weights, for tests of what is built on top of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torchvision
from torch import nn

from labelpenet.models.backbones import VGG16, Backbone, MobileNetV2, Part, Tiny, TinyNetwork

CHANNELS, FEATURES, POOL = 6, 10, 4
WIDE, HIDDEN = 64, 32  # of the narrow VGG-16: its stem's channels, its hidden units


def lively_mobilenet(seed: int) -> MobileNetV2:
    """MobileNetV2 with random weights that keep the signal's size; with torchvision's it all but vanishes."""
    torch.manual_seed(seed)
    network = torchvision.models.mobilenet_v2(weights=None)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
    return MobileNetV2(network)


def lively_tiny(seed: int) -> Tiny:
    """The package's own smallest backbone with random weights: what is trained on it takes a third of the time."""
    torch.manual_seed(seed)
    return Tiny(TinyNetwork())


class TinyBackbone(Backbone):
    """Stem of stride 16, tails of one convolution, and a RoI head of a convolution, an average and a linear layer."""

    name = "tiny"
    mean = std = (0.5, 0.5, 0.5)
    pool_size = POOL

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        self.stem = Part(nn.Sequential(nn.Conv2d(3, CHANNELS, 16, stride=16), nn.ReLU()), CHANNELS, 16)

    def region_tail(self) -> Part:
        return Part(nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()), CHANNELS, 16)

    detection_tail = mask_tail = region_tail

    def late(self) -> Part:
        return Part(nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1), nn.ReLU()), CHANNELS, 32)

    def roi_head(self, cells: int = 1) -> tuple[nn.Sequential, int]:
        convolution = nn.Sequential(nn.Conv2d(CHANNELS, FEATURES, 3, padding=1), nn.ReLU())
        return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(cells), nn.Flatten()), FEATURES * cells**2


class NarrowVGG(nn.Module):
    """torchvision's VGG-16, an eighth as wide and with random weights, under the same names."""

    def __init__(self, weights: None = None) -> None:
        super().__init__()
        cfg = [one if one == "M" else int(one) // 8 for one in torchvision.models.vgg.cfgs["D"]]
        self.features = torchvision.models.vgg.make_layers(cfg)
        hidden = (
            nn.Linear(WIDE * 7 * 7, HIDDEN),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(True),
        )
        self.classifier = nn.Sequential(*hidden, nn.Dropout(), nn.Linear(HIDDEN, 1000))
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


class NarrowPlug(VGG16):
    """The backbone `vgg16`, which says how wide it is."""

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self.stem = replace(self.stem, channels=WIDE)

    def region_tail(self) -> Part:
        return replace(super().region_tail(), channels=WIDE)

    def detection_tail(self) -> Part:
        return replace(super().detection_tail(), channels=WIDE)

    def late(self) -> Part:
        return replace(super().late(), channels=WIDE)

    def roi_head(self, cells: int = 1) -> tuple[nn.Sequential, int]:
        return super().roi_head(cells)[0], HIDDEN
