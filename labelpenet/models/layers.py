"""Parts that several modules share: RoI pooling, greedy NMS that remembers who suppressed whom, initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, nms, roi_align, roi_pool


class RoIPooling(nn.Module):
    """RoI pooling of one feature map.

    Args:
        size: output cells per side.
        stride: of the feature map, in pixels.
        kind: ``max`` is RoI pooling as Fast R-CNN defines it (and the paper uses); ``align`` is RoIAlign with one
            bilinear sample a cell.
    """

    def __init__(self, size: int, stride: int, kind: str = "max"):
        super().__init__()
        if kind not in ("max", "align"):
            raise ValueError(f"pooling must be 'max' or 'align', but got {kind!r}")
        self.size, self.stride, self.kind = size, stride, kind

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """(1, D, h, w) and (R, 4) boxes in pixels of the network's input to (R, D, size, size)."""
        # bfloat16 would round the boxes to several pixels, and RoI pooling does not know it on a CPU
        features, rois = features.float(), [boxes.float()]
        if self.kind == "max":
            pooled = roi_pool(features, rois, self.size, 1 / self.stride)
        else:
            pooled = roi_align(features, rois, self.size, 1 / self.stride, sampling_ratio=1, aligned=True)
        return pooled.contiguous(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}, kind={self.kind}"


def nms_groups(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Class-wise greedy NMS that also tells which kept box suppressed each box.

    Args:
        boxes: (R, 4); scores: (R,); labels: (R,); threshold: boxes of a class with a larger IoU suppress one another.

    Returns:
        keep: (K,) indices of the kept boxes, by descending score; group: (R,) the position in ``keep`` of the box that
        suppressed each one, its own position for a kept box.
    """
    if not len(boxes):
        return labels.new_zeros(0), labels.new_zeros(0)
    boxes, scores = boxes.float(), scores.float()
    # Class by class: batched_nms shifts the classes apart, which rounds the corners and so moves overlaps across the
    # threshold; in double precision, as NMS itself compares, for the same reason.
    ours = [torch.where(labels == label)[0] for label in labels.unique()]
    keep = torch.cat([own[nms(boxes[own], scores[own], threshold)] for own in ours])
    keep = keep[scores[keep].argsort(descending=True, stable=True)]
    suppresses = box_iou(boxes, boxes[keep]).double() > threshold
    suppresses &= labels[:, None] == labels[keep][None]
    group = suppresses.float().argmax(1)  # the first that holds is the best scored: the one greedy NMS meets first
    group[keep] = torch.arange(len(keep), device=keep.device)
    return keep, group


def initialise(*layers: nn.Module, std: float = 0.01) -> None:
    """Weights from N(0, std), zero biases (section 4.1)."""
    for layer in layers:
        for child in layer.modules():
            if isinstance(child, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
                nn.init.normal_(child.weight, std=std)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
