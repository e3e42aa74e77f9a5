"""Backbones: a shared stem, and the tails and RoI heads that each module copies for itself (section 4.1).

Shape letters: ``N`` images, ``R`` RoIs, ``D`` features of a RoI, ``H, W`` height and width in pixels.

A backbone names seven parts. The *stem* is shared by the four modules. Every module calls the factories for parts of
its own, which start from the same pretrained weights:

=====================  =============================================  ===========================================
part                   vgg16                                          mobilenet_v2
=====================  =============================================  ===========================================
stem                   conv1_1 to relu4_3, stride 8                   features 0 to 13, stride 16
region tail (1, 2)     conv5_1..3, dilation 2, stride 8               none: RoIs are pooled from the stem
detection tail (3, 4)  pool4, stride 16                               none
mask tail (3, 4)       conv5_1..3, dilation 2, stride 8               features 14 to 17, dilated, stride 16
late (pyramid, 3, 4)   pool4, conv5_1..3, stride 16                   features 14 to 17, stride 32
RoI pooling            7 x 7                                          14 x 14
RoI head               fc6, relu, dropout, fc7, relu, dropout: 4096   features 14 to 18 and a pooling: 1280 a cell
=====================  =============================================  ===========================================

MobileNetV2 has no pretrained fully connected layers; its last blocks, applied to each RoI, are their analogue. `Tiny`
is a third backbone for generated scenes, which no one has pretrained: a run trains it on the tags first.

``timm/NAME`` is any network of timm that is a chain of convolutional stages, cut as MobileNetV2 is: the stem ends with
the last stage of stride 16, and what follows it becomes RoI head and, dilated, mask tail (`Staged`).
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, TypeVar, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from labelpenet.models.layers import cell_offset, initialise

_Module = TypeVar("_Module", bound=nn.Module)

FINE = 8
"""Stride of the finest map of a feature pyramid: one of 4 would double a step's time on a CPU."""


@dataclass(frozen=True)
class Part:
    """A stretch of network, and what comes out of it; ``offset`` as of `layers.cell_offset`, in pixels of the image."""

    module: nn.Module
    channels: int
    stride: int
    offset: float = 0.0


class Backbone:
    """A stem and the factories of the parts that follow it.

    Attributes:
        name: as given to ``--backbone``.
        mean, std: normalisation of RGB in [0, 1].
        stem: the shared part; (N, 3, H, W) to (N, channels, H / stride, W / stride).
        pool_size: side of the RoI pooling that the RoI head expects.
        imagenet: whether torchvision has ImageNet weights of it.
        untrained: the network behind the parts while it has no trained weights (`training.warmup` trains it and builds
            the backbone anew); None otherwise.
    """

    name: str
    imagenet: bool = True
    untrained: nn.Module | None = None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stem: Part
    pool_size: int

    def __init__(self, network: Any) -> None:
        self._network = network

    @cached_property
    def fine(self) -> Part:
        """The stem up to its last map of stride 8, or all of it where it has none."""
        layers, x, found = cast(nn.Sequential, self.stem.module), torch.zeros(1, 3, 64, 64), self.stem
        with torch.no_grad():
            for count, layer in enumerate(layers, 1):
                x = layer(x)
                if x.shape[-1] == 64 // FINE:
                    found = Part(layers[:count], x.shape[1], FINE)
        return dataclasses.replace(found, offset=cell_offset(found.module, torch.zeros(1, 3, 64, 64)))

    def region_tail(self) -> Part:
        """From the stem to the map that modules 1 and 2 pool RoIs from (here the stem's own); ``stride`` is relative to
        the image."""
        return Part(nn.Identity(), self.stem.channels, self.stem.stride, self.stem.offset)

    def detection_tail(self) -> Part:
        """From the stem to the map that the detection part of modules 3 and 4 works on (here the stem's own)."""
        return self.region_tail()

    def mask_tail(self) -> Part:
        """From the stem to the map that the mask branch's spatial pyramid reads."""
        raise NotImplementedError

    def late(self) -> Part:
        """The pretrained stages behind the stem as they are, to the coarsest map that a feature pyramid reads."""
        raise NotImplementedError

    def roi_head(self, cells: int = 1) -> tuple[nn.Sequential, int]:
        """The RoI head, (R, channels, pool_size, pool_size) to (R, D), and D.

        Args:
            cells: where the network ends in an average over the RoI, average over ``cells`` x ``cells`` cells
                instead and keep them all, so that a box regression can tell left from right.
        """
        raise NotImplementedError


class VGG16(Backbone):
    """VGG-16 as in section 4.1 of the paper."""

    name = "vgg16"
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    pool_size = 7

    def __init__(self, network: torchvision.models.VGG):
        self._network = network
        self.stem = Part(copy.deepcopy(network.features[:23]), 512, 8)

    def region_tail(self) -> Part:
        conv5 = copy.deepcopy(self._network.features[24:30])
        for layer in conv5:
            if isinstance(layer, nn.Conv2d):
                layer.dilation = layer.padding = (2, 2)
        return Part(conv5, 512, 8)

    def detection_tail(self) -> Part:
        return Part(copy.deepcopy(self._network.features[23]), 512, 16)

    def mask_tail(self) -> Part:
        return self.region_tail()

    def late(self) -> Part:
        return Part(copy.deepcopy(self._network.features[23:30]), 512, 16)

    def roi_head(self, cells: int = 1) -> tuple[nn.Sequential, int]:
        layers = copy.deepcopy(self._network.classifier[:6])
        for layer in layers:
            if isinstance(layer, nn.ReLU):  # excitation backprop reads the activations that an in-place ReLU destroys
                layer.inplace = False
        return nn.Sequential(nn.Flatten(), *layers), 4096


class MobileNetV2(Backbone):
    """MobileNetV2: far fewer multiplications than VGG-16, hence the one for machines without a GPU."""

    name = "mobilenet_v2"
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    pool_size = 14

    def __init__(self, network: torchvision.models.MobileNetV2):
        fix_batch_norm(network.eval(), torch.zeros(1, 3, 32, 32))
        self._network = network
        stem = copy.deepcopy(network.features[:14])
        self.stem = Part(stem, 96, 16, cell_offset(stem, torch.zeros(1, 3, 64, 64)))

    def mask_tail(self) -> Part:
        blocks = copy.deepcopy(self._network.features[14:18])
        for number, block in enumerate(blocks):
            depthwise = block.conv[1][0]
            depthwise.stride = (1, 1)
            if number > 0:  # the first block's input is still at the stem's resolution
                depthwise.dilation = depthwise.padding = (2, 2)
        return Part(replace(blocks, for_training), 320, 16, self.stem.offset)

    def late(self) -> Part:
        stages, seen = copy.deepcopy(self._network.features[14:18]), torch.zeros(1, self.stem.channels, 4, 4)
        return Part(stages, 320, 32, self.stem.offset + self.stem.stride * cell_offset(stages, seen))

    def roi_head(self, cells: int = 1) -> tuple[nn.Sequential, int]:
        blocks = copy.deepcopy(self._network.features[14:19])
        return nn.Sequential(
            *replace(blocks, for_training), nn.AdaptiveAvgPool2d(cells), nn.Flatten()
        ), 1280 * cells * cells


class TinyNetwork(nn.Module):
    """Six convolutions without normalisation: a stem of stride 8, and one convolution as the start of a RoI head."""

    channels = 128

    def __init__(self, weights: None = None):
        super().__init__()
        self.stem = nn.Sequential(
            *_convolution(3, 24, 2), *_convolution(24, 48, 2), *_convolution(48, 48), *_convolution(48, 96, 2),
            *_convolution(96, 96),
        )  # fmt: skip
        self.last = nn.Sequential(*_convolution(96, self.channels))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, channels, H / 8, W / 8)."""
        return self.last(self.stem(images))


class Tiny(Backbone):
    """A small network for generated scenes and tests, 0.2 million parameters; too small for photographs."""

    name = "tiny"
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    pool_size = 7
    imagenet = False

    def __init__(self, network: TinyNetwork):
        self._network = network
        stem = copy.deepcopy(network.stem)
        self.stem = Part(stem, 96, 8, cell_offset(stem, torch.zeros(1, 3, 64, 64)))

    def mask_tail(self) -> Part:
        return Part(copy.deepcopy(self._network.last), self._network.channels, 8, self.stem.offset)

    def late(self) -> Part:
        return self.mask_tail()

    def roi_head(self, cells: int = 1) -> tuple[nn.Sequential, int]:
        head = nn.Sequential(*copy.deepcopy(self._network.last), nn.AdaptiveAvgPool2d(cells), nn.Flatten())
        return head, self._network.channels * cells * cells


def replace(module: _Module, make: Callable[[nn.Module], nn.Module | None]) -> _Module:
    """Puts what ``make`` returns in place of each layer inside the module, unless it is None; the same module."""
    for name, child in list(module.named_children()):
        other = make(child)
        if other is None:
            replace(child, make)
        elif other is not child:
            setattr(module, name, other)
    return module


def for_training(layer: nn.Module) -> nn.Module | None:
    """A depthwise convolution with a stride, a dilation or a wide kernel in the form that trains fast; else None."""
    if not isinstance(layer, nn.Conv2d) or type(layer) not in (nn.Conv2d, SameConv2d):
        return None
    depthwise = layer.groups == layer.in_channels > 1
    slow = max(layer.kernel_size) > 3 or max(*layer.stride, *layer.dilation) > 1
    return FullPrecisionConv2d.like(layer) if depthwise and slow else None


def _convolution(channels: int, width: int, stride: int = 1) -> tuple[nn.Conv2d, nn.ReLU]:
    layer = nn.Conv2d(channels, width, 3, stride, 1)
    initialise(layer, std=None)
    return layer, nn.ReLU()


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow's ``same`` does: to ``ceil(size / stride)``, the odd pixel at the end."""

    same = True

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.same:
            return super()._conv_forward(input, weight, bias)
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            input.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(input, pads), weight, bias, self.stride, 0, self.dilation, self.groups)

    @classmethod
    def like(cls, other: nn.Conv2d, same: bool | None = None) -> Self:
        """The same convolution, with the same parameters, that pads as TensorFlow does if ``same``; None: as ``other``
        does.
        """
        one = cls(
            other.in_channels,
            other.out_channels,
            other.kernel_size,  # type: ignore[arg-type]
            other.stride,  # type: ignore[arg-type]
            other.padding,  # type: ignore[arg-type]
            other.dilation,  # type: ignore[arg-type]
            other.groups,
            other.bias is not None,
        )
        one.same = getattr(other, "same", False) if same is None else same
        one.load_state_dict(other.state_dict())
        return one


class FullPrecisionConv2d(SameConv2d):
    """A convolution that is trained in float32 also under autocast.

    The backward pass of a strided or dilated depthwise convolution in bfloat16 is 6 to 25 times slower than in float32
    on a CPU with torch 2.15 (207 against 8 ms for 64 RoIs on one core): it was two thirds of a training step.
    That of a plain one of 5 x 5 is slow for its weight's gradient (torch 2.14, 128 RoIs of 1,152 channels: 359 against
    118 ms).
    The dilated one is slow in float32 too (oneDNN lacks a kernel for its gradients), but each grid of every second
    cell is an ordinary convolution: forward and backward 16 against 54 ms (3 x 3), 54 against 163 ms (5 x 5).
    """

    def forward(self, input: Tensor) -> Tensor:
        """(R, D, h, w) to the same, in float32 where gradients are wanted."""
        if not torch.is_grad_enabled():
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            if input.device.type == "cpu" and self._is_interleaved():
                return self._by_grids(input.float())
            return super().forward(input.float())

    def _is_interleaved(self) -> bool:
        """Whether the output's cells, each in its own grid of every n-th cell, are those of a padded convolution."""
        whole = all(p == d * (k // 2) for p, d, k in zip(self.padding, self.dilation, self.kernel_size, strict=True))
        return self.dilation[0] > 1 and self.stride == (1, 1) and whole and not self.same

    def _by_grids(self, x: Tensor) -> Tensor:
        images, channels, height, width = x.shape
        rows, columns = self.dilation
        x = F.pad(x, (0, -width % columns, 0, -height % rows)).permute(0, 2, 3, 1)
        h, w = x.shape[1] // rows, x.shape[2] // columns
        x = x.reshape(images, h, rows, w, columns, channels).permute(2, 4, 0, 1, 3, 5)
        x = x.reshape(-1, h, w, channels).permute(0, 3, 1, 2)
        padding = [kernel // 2 for kernel in self.kernel_size]
        y = F.conv2d(x, self.weight, self.bias, 1, padding, 1, self.groups).permute(0, 2, 3, 1)
        y = y.reshape(rows, columns, images, h, w, -1).permute(2, 3, 0, 4, 1, 5)
        return y.reshape(images, h * rows, w * columns, -1)[:, :height, :width].permute(0, 3, 1, 2)


@torch.no_grad()
def fix_batch_norm(network: nn.Module, image: Tensor, kinds: tuple[type[nn.Conv2d], ...] = (nn.Conv2d,)) -> None:
    """Folds every batch norm into the convolution whose output it alone reads, and freezes the others, in place.

    Statistics of a few images would ruin pretrained ones, so batch norms stay fixed in every module; folded, they cost
    nothing (unfolded, a third of a RoI head's time on a CPU). Which convolution a norm reads shows when the network, in
    evaluation mode, runs on an image (1, 3, H, W): there are too many kinds of blocks for names to tell. An activation
    that belongs to the norm stays. ``kinds`` are those of the convolutions that may be folded into.
    """
    convolutions = [layer for layer in network.modules() if type(layer) in kinds]
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    made: list[tuple[nn.Module, Tensor]] = []
    read: list[tuple[nn.Module, nn.Module]] = []

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.extend((norm, maker) for maker, output in made if output is inputs[0])

    handles = [
        layer.register_forward_hook(lambda layer, _, output: made.append((layer, output))) for layer in convolutions
    ]
    handles += [norm.register_forward_pre_hook(note) for norm in norms]
    network(image)
    for handle in handles:
        handle.remove()
    runs = Counter(maker for maker, _ in made)
    readers = Counter(maker for _, maker in read)
    folded = {norm: maker for norm, maker in read if runs[maker] == readers[maker] == 1}

    def fixed(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, nn.BatchNorm2d):
            return None
        act = getattr(layer, "act", nn.Identity())
        if layer not in folded:
            frozen = FrozenBatchNorm2d(layer.num_features, layer.eps)
            frozen.load_state_dict(layer.state_dict(), strict=False)
            return nn.Sequential(frozen, act)
        convolution: Any = folded[layer]
        plain = nn.BatchNorm2d(layer.num_features, layer.eps).eval()
        plain.load_state_dict(layer.state_dict(), strict=False)
        fused = fuse_conv_bn_eval(convolution, plain)
        convolution.weight, convolution.bias = fused.weight, fused.bias
        return act

    replace(network, fixed)
