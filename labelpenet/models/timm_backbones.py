"""Backbones from timm: any network that is a chain of convolutional stages, cut at its last stage of stride 16.

``timm/NAME`` is cut as MobileNetV2 is: what comes before the cut is the shared stem, what follows is every module's RoI
head, applied to RoIs of 14 x 14 cells and averaged, and, dilated so that it keeps stride 16, its mask tail. timm names
the stages (``feature_info``); whether the network is a chain of them, what stride each has and how many channels come
out is found by running it, for that is what counts.

Shape letters: ``N`` images, ``R`` RoIs, ``D`` channels, ``h, w`` cells.
"""

import copy
import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ConvNormAct
from timm.models import _efficientnet_blocks as mobile
from timm.models import regnet, resnet
from torch import Tensor, nn

from labelpenet.calibration.excitation import Residual
from labelpenet.errors import InputError, reason
from labelpenet.models.backbones import Backbone, Part, SameConv2d, fix_batch_norm, for_training, replace
from labelpenet.models.layers import cell_offset
from labelpenet.models.weights import load_weights

STRIDE = 16
SIDE = 64  # of the image that a network is examined with

_INVERTED = (mobile.ConvBnAct, mobile.DepthwiseSeparableConv, mobile.EdgeResidual, mobile.InvertedResidual,
             mobile.UniversalInvertedResidual)  # fmt: skip
_BOTTLENECKS = (resnet.BasicBlock, resnet.Bottleneck, regnet.Bottleneck)


def build_timm(name: str, weights: Path | None, pretrained: bool) -> Backbone:
    """The backbone ``timm/NAME``; arguments and errors as `build.build_backbone`."""
    network = timm_network(name, weights, pretrained, num_classes=0)
    backbone = Staged(network, name)
    if weights is None and not pretrained:
        backbone.untrained = network
    return backbone


def timm_network(name: str, weights: Path | None, pretrained: bool, **options: Any) -> Any:
    """timm's network ``timm/NAME``, built with its ``options``; other arguments and errors as `build.build_backbone`.

    Without ``weights``, timm's own are downloaded (safetensors, or a file of tensors only) and kept in its cache.
    """
    short = name.removeprefix("timm/")
    if not timm.is_model(short):
        close = difflib.get_close_matches(short, timm.list_models(), n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(f'timm/{one}' for one in close)}?" if close else "see timm.list_models()"
        raise InputError(f"unknown backbone {name!r}: timm {timm.__version__} has no such network; {hint}")
    download = weights is None and pretrained
    if download and not timm.is_model_pretrained(short):
        raise InputError(f"timm has no pretrained weights of {name}; give a file with --weights")
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # without a network it has a line for every retry
    try:
        network = timm.create_model(short, pretrained=download, **options)
    except (OSError, RuntimeError, ValueError) as error:  # no network; an unknown tag
        remedy = "give a file with --weights" if download else "check the name"
        raise InputError(
            f"{name} could not be {'downloaded' if download else 'built'} ({reason(error)}); {remedy}"
        ) from error
    finally:
        hub.setLevel(level)
    if weights is not None:
        load_weights(network, weights, name)
    return network


class Staged(Backbone):
    """A network of timm that is a chain of convolutional stages; `InputError` where it cannot be cut.

    It must be built with ``num_classes=0``; its batch norms are folded or frozen in place.
    """

    pool_size = 14

    def __init__(self, network: Any, name: str):
        self._network, self.name = network.eval(), name
        self.mean, self.std = tuple(network.pretrained_cfg["mean"]), tuple(network.pretrained_cfg["std"])
        image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                fix_batch_norm(network, image, (nn.Conv2d, Conv2dSame))
                replace(network, lambda layer: SameConv2d.like(layer, True) if isinstance(layer, Conv2dSame) else None)
                self._cut = cut(network, image)
                self._end = end_of(network, self._cut.features)
                self._tail = dilate(copy.deepcopy(self._cut.stages), self._cut.seen)
                self._tail_channels = int(self._tail(self._cut.seen).shape[1])
                self._features = int(self._end(F.adaptive_avg_pool2d(self._cut.features, 1)).shape[1])
        except Exception as error:  # timm has a thousand networks, and each may refuse in its own way
            raise InputError(
                f"{name} cannot be cut into stem and RoI head ({reason(error)}); choose a convolutional "
                "network with stages, such as timm/tf_efficientnet_lite2, timm/resnet50 or timm/convnext_tiny"
            ) from error
        stem = nn.Sequential(PadToStride(), *copy.deepcopy(self._cut.before))
        self.stem = Part(stem, int(self._cut.seen.shape[1]), STRIDE, cell_offset(stem, image))
        self._tail_offset = self.stem.offset + STRIDE * cell_offset(self._tail, self._cut.seen)

    def mask_tail(self) -> Part:
        return Part(replace(copy.deepcopy(self._tail), for_training), self._tail_channels, STRIDE, self._tail_offset)

    def late(self) -> Part:
        stages, seen = copy.deepcopy(self._cut.stages), self._cut.seen
        map_ = stages(seen)
        offset = self.stem.offset + STRIDE * cell_offset(stages, seen)
        return Part(stages, int(map_.shape[1]), STRIDE * seen.shape[-1] // map_.shape[-1], offset)

    def roi_head(self, cells: int = 1) -> tuple[nn.Sequential, int]:
        blocks, end = copy.deepcopy(nn.Sequential(*self._cut.stages, *self._cut.final)), copy.deepcopy(self._end)
        head = nn.Sequential(*map(unfold, blocks), nn.AdaptiveAvgPool2d(cells), *end, nn.Flatten())
        return replace(head, for_training), self._features * cells * cells


class PadToStride(nn.Module):
    """Zeros at the right and the bottom, up to a multiple of the stride.

    Cell i then lies at pixel 16 i whatever the size (TensorFlow's padding puts its odd pixel first or last by the
    parity of each map), and there are ``ceil(size / 16)`` cells also where a network drops the last pixels.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to the same with H and W rounded up."""
        right, bottom = -images.shape[-1] % STRIDE, -images.shape[-2] % STRIDE
        return F.pad(images, (0, right, 0, bottom)) if right or bottom else images


@dataclass(frozen=True)
class Cut:
    """A network in two.

    Attributes:
        before, stages: layers up to the last stage of stride 16, and from there to the last stage.
        final: what makes features of its map.
        seen: the map at the cut; features: at the end; of the image that the network was examined with.
    """

    before: nn.Sequential
    stages: nn.Sequential
    final: nn.Sequential
    seen: Tensor
    features: Tensor


def cut(network: Any, image: Tensor) -> Cut:
    """Cuts a network at its last stage of stride 16; a ValueError where there is no such place."""
    expected = network.forward_features(image)
    named = list(_chain(network))
    maps: list[Tensor] = []
    for _, layer in named:
        try:
            maps.append(layer(maps[-1] if maps else image))
        except Exception as error:  # a layer that takes something else than the output of the one before
            raise ValueError("it is not a chain of stages") from error
        if maps[-1].shape == expected.shape and torch.allclose(maps[-1], expected, rtol=1e-3, atol=1e-4):
            break
    else:
        raise ValueError("it is not a chain of stages")
    coarse = [i for i, one in enumerate(maps) if one.shape[2:] == (SIDE // STRIDE, SIDE // STRIDE)]
    if not coarse:
        raise ValueError("it has no stage of stride 16")
    layers, start = [layer for _, layer in named[: len(maps)]], coarse[-1] + 1
    last = str(network.feature_info[-1]["module"])
    end = next((i + 1 for i, (name, _) in enumerate(named) if f"{last}.".startswith(f"{name}.")), len(layers))
    stages = nn.Sequential(*layers[start:end])
    if not any(True for _ in stages.parameters()):
        raise ValueError("no layer follows its last stage of stride 16")
    return Cut(nn.Sequential(*layers[:start]), stages, nn.Sequential(*layers[end:]), maps[start - 1], maps[-1])


def _chain(network: Any) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a network in order: its children, and in place of one that holds stages, the stages."""
    stages = [str(info["module"]) for info in network.feature_info]

    def parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        holds = any(stage.startswith(f"{name}.") for stage in stages)
        if holds and isinstance(module, (nn.Sequential, nn.ModuleList)):
            for child, layer in module.named_children():
                yield from parts(f"{name}.{child}", layer)
        else:
            yield name, module

    for name, module in network.named_children():
        yield from parts(name, module)


def end_of(network: Any, features: Tensor) -> nn.Sequential:
    """What a network does to its averaged features before it classifies: a convolution or a norm; mostly nothing."""
    layers: list[nn.Module] = []

    def ran(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs[0].shape[2:] == output.shape[2:] == (1, 1) and not isinstance(layer, nn.Dropout):
            layers.append(layer)

    leaves = [layer for layer in network.modules() if not any(layer.children())]
    handles = [layer.register_forward_hook(ran) for layer in leaves]
    expected = network.forward_head(features, pre_logits=True)
    for handle in handles:
        handle.remove()
    end = nn.Sequential(*layers)
    got = end(F.adaptive_avg_pool2d(features, 1)).flatten(1)
    same = got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-4)
    return end if same else nn.Sequential()


def dilate(layers: nn.Sequential, x: Tensor) -> nn.Sequential:
    """Makes layers keep the resolution of their input (1, D, h, w): what halved it no longer does, the rest is dilated.

    Cells of the fine map that the coarse one had keep their values. Changes the layers in place.

    Raises:
        ValueError: the output is still smaller, for something else than a convolution or a pooling halves the map.
    """
    sides: dict[nn.Module, int] = {}
    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs: sides.update({layer: inputs[0].shape[-1]}))
        for layer in layers.modules()
        if isinstance(layer, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d))
    ]
    layers(x)
    for handle in handles:
        handle.remove()
    side = x.shape[-1]

    def finer(layer: Any) -> nn.Module | None:
        if sides.get(layer) == side and layer.stride not in (1, (1, 1)):
            return _without_stride(layer)
        if sides.get(layer) == side // 2 and isinstance(layer, nn.Conv2d):
            layer.dilation = tuple(2 * d for d in layer.dilation)
            layer.padding = tuple(2 * int(p) for p in layer.padding)
        return None

    replace(layers, finer)
    if layers(x).shape[2:] != x.shape[2:]:
        raise ValueError("its last stage cannot be dilated to stride 16")
    return layers


def _without_stride(layer: Any) -> nn.Module:
    """The layer at every cell of its input; a window without a middle reaches one cell further at right and bottom."""
    kernel = layer.kernel_size[0] if isinstance(layer.kernel_size, tuple) else layer.kernel_size
    layer.stride = (1, 1)
    if not isinstance(layer, nn.Conv2d):
        layer.padding = kernel // 2 if kernel % 2 else 0
        return layer if kernel % 2 else nn.Sequential(nn.ReplicationPad2d((0, kernel - 1, 0, kernel - 1)), layer)
    if kernel % 2 == 0:
        return SameConv2d.like(layer, True)
    layer.padding = tuple(d * (kernel // 2) for d in layer.dilation)
    if isinstance(layer, SameConv2d):
        layer.same = False
    return layer


def unfold(block: Any) -> nn.Module:
    """A block of timm as the chain or residual sum of its layers, which excitation backprop can follow.

    Other kinds of blocks are returned as they are.
    """
    layers = {name: unfold(layer) for name, layer in block.named_children() if name != "drop_path"}
    chain = nn.Sequential(*(layer for name, layer in layers.items() if name != "downsample"))
    if type(block) in (nn.Sequential, ConvNormAct, regnet.RegStage):
        return nn.Sequential(*layers.values())
    if type(block) in _INVERTED:
        return Residual(chain, nn.Sequential()) if block.has_skip else chain
    if type(block) in _BOTTLENECKS:
        if type(block) is regnet.Bottleneck and block.downsample is None:  # there it means no shortcut
            return chain
        shortcut = nn.Sequential(layers["downsample"]) if block.downsample is not None else nn.Sequential()
        return nn.Sequential(Residual(chain[:-1], shortcut), chain[-1])  # an activation follows the sum
    return block
