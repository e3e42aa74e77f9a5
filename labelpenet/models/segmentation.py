"""Modules 3 and 4, instance refinement and segmentation: Mask R-CNN with an atrous spatial pyramid in its mask branch.

Shape letters: ``R`` RoIs, ``C`` foreground classes, ``K`` detections, ``S`` side of a predicted mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from labelpenet import config
from labelpenet.instances import Instances
from labelpenet.models.backbones import Backbone
from labelpenet.models.detection import Detector, rcnn_loss
from labelpenet.models.layers import RoIPooling, initialise

MASK_POOL = 14
MASK_SIDE = 2 * MASK_POOL
PYRAMID_DILATIONS = (1, 2, 4, 6)


class SpatialPyramid(nn.Module):
    """Atrous spatial pyramid pooling (section 4.1): parallel 3x3 convolutions, concatenated and mixed by a 1x1 one."""

    def __init__(self, channels: int, width: int, dilations: tuple[int, ...] = PYRAMID_DILATIONS):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation) for dilation in dilations
        )
        self.mix = nn.Conv2d(width * len(dilations), width, 1)
        _he(self)

    def forward(self, features: Tensor) -> Tensor:
        """(1, D, h, w) to (1, width, h, w)."""
        return F.relu(self.mix(torch.cat([F.relu(branch(features)) for branch in self.branches], 1)))


class MaskHead(nn.Module):
    """Mask R-CNN's: convolutions, one deconvolution to 28 x 28, and a logit for every class."""

    def __init__(self, width: int, num_classes: int, depth: int):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        _he(self)
        self.logits = nn.Conv2d(width, num_classes, 1)
        initialise(self.logits)

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, width, 14, 14) to logits (R, C, 28, 28)."""
        for convolution in self.convolutions:
            pooled = F.relu(convolution(pooled))
        return self.logits(F.relu(self.up(pooled)))


class Segmenter(Detector):
    """A `Detector` with a mask branch: tail, spatial pyramid, RoI pooling 14 x 14 and mask head of its own."""

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        settings: config.Segmentation,
    ):
        super().__init__(backbone, num_classes, backbone.detection_tail(), settings)
        tail = backbone.mask_tail()
        self.mask_tail = tail.module
        self.pyramid = SpatialPyramid(tail.channels, settings.mask_width)
        self.mask_pool = RoIPooling(MASK_POOL, tail.stride, settings.pool)
        self.mask_head = MaskHead(settings.mask_width, num_classes, settings.mask_depth)

    def mask_features(self, stem: Tensor) -> Tensor:
        """The pyramid's map (1, width, h, w)."""
        return self.pyramid(self.mask_tail(stem))

    def masks(self, mask_features: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        """Mask probabilities (R, 28, 28) of each box for its class index; boxes (R, 4), labels (R,)."""
        if not len(boxes):
            return boxes.new_zeros(0, MASK_SIDE, MASK_SIDE)
        logits = self.mask_head(self.mask_pool(mask_features, boxes))
        return logits[torch.arange(len(boxes), device=boxes.device), labels].float().sigmoid()

    def losses(self, stem: Tensor, image: Tensor, target: Instances) -> dict[str, Tensor]:
        """As `Detector.losses`, and the masks' weighted binary cross-entropy over the positive RoIs."""
        features = self.features(stem)
        proposals, losses = self.propose(features, image, target)
        boxes, labels, encoded, weights, matched = self.sample(proposals, target)
        logits, deltas = self.classify(self.head(self.pool(features, boxes)))
        losses["class"], losses["box"] = rcnn_loss(logits, deltas, labels, encoded, weights)
        positive = torch.where(labels > 0)[0]
        mask_features = self.mask_features(stem)
        if len(positive) and target.masks is not None:
            chosen = self.mask_head(self.mask_pool(mask_features, boxes[positive]))
            own = chosen[torch.arange(len(positive), device=boxes.device), labels[positive] - 1]
            losses["mask"] = mask_loss(own, boxes[positive], target.masks, matched[positive], weights[positive])
        else:  # keeps the graph of every parameter, which distributed training needs
            losses["mask"] = mask_features.float().sum() * 0
        return losses


def mask_loss(logits: Tensor, boxes: Tensor, masks: Tensor, matched: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean binary cross-entropy between predicted masks and the instances' masks inside the RoIs.

    Args:
        logits: (R, S, S); boxes: (R, 4) RoIs in pixels of the masks; masks: (N, H, W) bool; matched: (R,) the instance
        of each RoI; weights: (R,) in [0, 1].
    """
    rois = torch.cat([matched[:, None].to(boxes), boxes], 1)
    target = roi_align(masks[:, None].float(), rois, logits.shape[-1], 1.0, sampling_ratio=2, aligned=True)[:, 0]
    each = F.binary_cross_entropy_with_logits(logits.float(), (target >= 0.5).float(), reduction="none").mean((1, 2))
    return (each * weights).sum() / len(logits)


def _he(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)
