"""Parts that several modules share: RoI pooling, initialisation."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align, roi_pool

AT_A_TIME = 64


class RoIPooling(nn.Module):
    """RoI pooling of one feature map.

    Args:
        size: output cells per side.
        stride: of the feature map, in pixels.
        kind: ``max`` is RoI pooling as Fast R-CNN defines it (and the paper uses); ``align`` is RoIAlign; ``centred``
            is the same, of what the cells really see.
        offset: of ``centred``: see `cell_offset`, in pixels.
        samples: of ``align`` and ``centred``, so many squared are averaged in a cell.
    """

    def __init__(self, size: int, stride: int, kind: str = "max", offset: float = 0.0, samples: int = 1):
        super().__init__()
        if kind not in ("max", "align", "centred"):
            raise ValueError(f"pooling must be 'max', 'align' or 'centred', but got {kind!r}")
        self.size, self.stride, self.kind = size, stride, kind
        self.offset, self.samples = offset if kind == "centred" else 0.0, samples

    def forward(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """(N, D, h, w) maps and (R_n, 4) boxes of each image, in pixels of the view, to (R, D, size, size)."""
        # bfloat16 would round the boxes to several pixels, and RoI pooling does not know it on a CPU
        features, rois = features.float(), [one.float() - self.offset for one in boxes]
        if self.kind == "max":
            pooled = roi_pool(features, rois, self.size, 1 / self.stride)
        else:
            pooled = roi_align(features, rois, self.size, 1 / self.stride, sampling_ratio=self.samples, aligned=True)
        return pooled.contiguous(memory_format=torch.channels_last)


class PyramidPooling(nn.Module):
    """RoI pooling of the maps of a pyramid: each RoI of the coarsest one on which it has ``size`` cells still (which is
    what equation 1 of FPN says for 14 cells), or of the finest.

    Args:
        size, kind: as of `RoIPooling`; of several maps a cell is the mean of 2 x 2 samples.
        strides, offsets: of the maps, the finest first.
    """

    def __init__(self, size: int, strides: Sequence[int], kind: str, offsets: Sequence[float]):
        super().__init__()
        self.size, self.strides, samples = size, strides, min(2, len(strides))
        maps = zip(strides, offsets, strict=True)
        self.pools = nn.ModuleList(RoIPooling(size, stride, kind, offset, samples) for stride, offset in maps)

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """(N, D, h, w) maps and (R_n, 4) boxes of each image, in pixels of the view, to (R, D, size, size)."""
        pooled = self.pools[0](maps[0], boxes)
        sides = torch.cat([(one[:, 2:] - one[:, :2]).float().clamp(min=0).prod(1).sqrt() for one in boxes])
        # all RoIs of all maps: to sort them would make the host wait for a GPU, and costs as much on a CPU
        for stride, features, pool in zip(self.strides[1:], maps[1:], self.pools[1:], strict=True):
            coarse = sides >= self.size * stride
            pooled = torch.where(coarse[:, None, None, None], pool(features, boxes), pooled)
        return pooled


@torch.no_grad()
def cell_offset(layers: nn.Module, image: Tensor) -> float:
    """How far right of and below a cell's middle lies the middle of what the cell sees, in pixels of the input.

    A convolution of stride 2 that pads on both sides sees pixels around the upper left corner of its cell (of stride s
    in all, ``(1 - s) / 2``), one that pads as TensorFlow does around the lower right one, 2 x 2 pooling its middle.
    What counts is the first layer that makes each map smaller (a shortcut beside it mostly sees the same place; that of
    ResNet-D does not), and every one with an even window that keeps the map's size.

    Args:
        layers: that see ``image``, and halve its sides as often as they like.
        image: (N, D, P, P).
    """
    offset = 0.0
    strides = {image.shape[-1]: 1}  # of the maps, by their side

    def ran(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal offset
        before, after = inputs[0].shape[-1], output.shape[-1]
        kernel, step, padding, dilation = (
            _single(getattr(layer, name, 1)) for name in ("kernel_size", "stride", "padding", "dilation")
        )
        if (before > after and after in strides) or (before == after and kernel % 2) or before not in strides:
            return
        if getattr(layer, "same", False):
            padding = max(0, (after - 1) * step + (kernel - 1) * dilation + 1 - before) // 2
        offset += strides[before] * ((kernel - 1) * dilation / 2 - padding - (step - 1) / 2)
        strides.setdefault(after, strides[before] * step)

    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    handles = [layer.register_forward_hook(ran) for layer in layers.modules() if isinstance(layer, kinds)]
    layers(image)
    for handle in handles:
        handle.remove()
    return offset


def _single(value: Any) -> int:
    """A layer's number for both axes; its padding may be a word: ``valid``, or ``same``, which keeps the map's size."""
    return 0 if isinstance(value, str) else int(value[0] if isinstance(value, tuple) else value)


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; afterwards every part of it is in the mode in which it was."""
    before = [(part, part.training) for part in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def by_rois(layers: nn.Module, pooled: Tensor) -> Tensor:
    """Layers that see each RoI by itself, applied without gradients to RoIs (R, ...), `AT_A_TIME` or a multiple of it.

    On a CPU the maps of so many RoIs are made in memory that is used again; those of hundreds are fetched from the
    system and given back, which costs a third of the time (64 of MobileNetV2's RoIs 246 ms, 128 at once 720 ms). On a
    GPU a number that was not seen before costs more than the layers: cuDNN plans every convolution anew.
    """
    if torch.is_grad_enabled():
        return layers(pooled)
    if pooled.is_cuda and len(pooled):
        return layers(F.pad(pooled, [0] * (2 * pooled.dim() - 1) + [-len(pooled) % AT_A_TIME]))[: len(pooled)]
    if len(pooled) <= AT_A_TIME:
        return layers(pooled)
    return torch.cat([layers(part) for part in pooled.split(AT_A_TIME)])


def initialise(*layers: nn.Module, std: float | None = 0.01, mode: Literal["fan_in", "fan_out"] = "fan_in") -> None:
    """Weights from N(0, std), or He's initialiser, of that ``mode``, if None, and zero biases (section 4.1)."""
    for layer in layers:
        for child in layer.modules():
            if isinstance(child, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
                if std is None:
                    nn.init.kaiming_normal_(child.weight, mode=mode, nonlinearity="relu")
                else:
                    nn.init.normal_(child.weight, std=std)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
