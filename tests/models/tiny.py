"""Backbones without pretrained weights, for tests of what is built on top of one."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

from labelpenet.models.backbones import Backbone, MobileNetV2, Part

CHANNELS, FEATURES, POOL = 6, 10, 4


def lively_mobilenet(seed: int) -> MobileNetV2:
    """MobileNetV2 with random weights that keep the signal's size; with torchvision's it all but vanishes."""
    torch.manual_seed(seed)
    network = torchvision.models.mobilenet_v2(weights=None)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
    return MobileNetV2(network)


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

    def roi_head(self, cells: int = 1) -> tuple[nn.Sequential, int]:
        convolution = nn.Sequential(nn.Conv2d(CHANNELS, FEATURES, 3, padding=1), nn.ReLU())
        return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(cells), nn.Flatten()), FEATURES * cells**2
