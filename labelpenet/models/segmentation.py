"""Modules 3 and 4, instance refinement and segmentation: Mask R-CNN whose mask branch has an atrous spatial pyramid, as
the paper says, or a feature pyramid.

Shape letters: ``R`` RoIs, ``C`` foreground classes, ``K`` detections, ``S`` side of a predicted mask.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, roi_align

from labelpenet import config
from labelpenet.calibration.calibrate import Trace, calibrate, choose_instances
from labelpenet.data.transforms import Batch
from labelpenet.instances import Instances
from labelpenet.models.backbones import Backbone
from labelpenet.models.detection import Detector
from labelpenet.models.layers import PyramidPooling, by_rois, initialise

MASK_POOL = 14
MASK_SIDE = 2 * MASK_POOL
PYRAMID_DILATIONS = (1, 2, 4, 6)


class SpatialPyramid(nn.Module):
    """Atrous spatial pyramid pooling (section 4.1): parallel 3x3 convolutions, concatenated and mixed by a 1x1 one."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation) for dilation in PYRAMID_DILATIONS
        )
        self.mix = nn.Conv2d(width * len(PYRAMID_DILATIONS), width, 1)
        initialise(self, std=None, mode="fan_out")

    def forward(self, features: Tensor) -> Tensor:
        """(N, D, h, w) to (N, width, h, w)."""
        return F.relu(self.mix(torch.cat([F.relu(branch(features)) for branch in self.branches], 1)))


class MaskHead(nn.Module):
    """Mask R-CNN's: convolutions, one deconvolution to 28 x 28, and a logit for every class."""

    def __init__(self, width: int, num_classes: int, depth: int):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        initialise(self, std=None, mode="fan_out")
        self.logits = nn.Conv2d(width, num_classes, 1)
        initialise(self.logits)

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, width, 14, 14) to logits (R, C, 28, 28)."""
        for convolution in self.convolutions:
            pooled = F.relu(convolution(pooled))
        return self.logits(F.relu(self.up(pooled)))


class FeaturePyramid(nn.Module):
    """A feature pyramid (Lin et al., 2017) of the stem's maps and of that behind it, whose layers stay as they were
    pretrained. Not in the paper.

    Attributes:
        strides, offsets: of its maps, the finest first; offsets as of `layers.cell_offset`, in pixels.
    """

    def __init__(self, backbone: Backbone, width: int):
        super().__init__()
        late = backbone.late()
        self.late = late.module.requires_grad_(False)
        parts = list({part.stride: part for part in (backbone.fine, backbone.stem, late)}.values())
        self.strides, self.offsets = [part.stride for part in parts], [part.offset for part in parts]
        self.fpn = FeaturePyramidNetwork([part.channels for part in parts], width)

    def forward(self, fine: Tensor, stem: Tensor) -> list[Tensor]:
        """The pyramid's maps (N, width, h / stride, w / stride) of the stem's (`Batch`)."""
        with torch.no_grad():
            late = self.late(stem)
        seen = zip(map(str, self.strides), (fine, stem, late)[-len(self.strides) :], strict=True)
        return list(self.fpn(OrderedDict(seen)).values())


class Segmentation(Detector):
    """Modules 3 and 4: a `Detector` with a mask branch (tail and spatial pyramid, or a feature pyramid; RoI pooling
    14 x 14, mask head)."""

    needs_masks = True
    settings: config.Segmentation

    def __init__(self, backbone: Backbone, num_classes: int, settings: config.Segmentation):
        super().__init__(backbone, num_classes, backbone.detection_tail(), settings)
        self.pyramid: nn.Module
        if settings.pyramid:
            self.pyramid = maps = FeaturePyramid(backbone, settings.mask_width)
            self.mask_pool = PyramidPooling(MASK_POOL, maps.strides, settings.pool, maps.offsets)
        else:
            tail = backbone.mask_tail()
            self.mask_tail = tail.module
            self.pyramid = SpatialPyramid(tail.channels, settings.mask_width)
            self.mask_pool = PyramidPooling(MASK_POOL, [tail.stride], settings.pool, [tail.offset])
        self.mask_head = MaskHead(settings.mask_width, num_classes, settings.mask_depth)

    def mask_features(self, stem: Tensor, fine: Tensor | None = None) -> list[Tensor]:
        """The maps (N, width, h, w) that masks are pooled from, the finest first, of a `Batch`'s maps."""
        if isinstance(self.pyramid, FeaturePyramid):
            return self.pyramid(fine, stem)
        return [self.pyramid(self.mask_tail(stem))]

    def masks(self, mask_features: Sequence[Tensor], boxes: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Mask probabilities (R, 28, 28) of boxes (R_n, 4) of each image in pixels of its view, for their classes (R,)
        from 0.

        ``mask_features`` are those of `mask_features`.
        """
        if not len(labels):
            return torch.zeros(0, MASK_SIDE, MASK_SIDE, device=labels.device)
        logits = by_rois(self.mask_head, self.mask_pool(mask_features, boxes))
        return logits[torch.arange(len(labels), device=logits.device), labels].float().sigmoid()

    def losses(self, batch: Batch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """As `Detector.losses`, and the masks' weighted binary cross-entropy over the positive RoIs; an empty mask
        teaches none."""
        losses, samples = self._detector_losses(batch, targets)
        mask_features = self.mask_features(batch.stem, batch.fine)
        chosen, inside = [], []
        for (boxes, labels, _, weights, matched), target in zip(samples, targets, strict=True):
            positive = torch.where(labels > 0)[0]
            if target.masks is None:
                positive = positive[:0]
            regions = enlarge(boxes[positive], self.settings.mask_margin)
            known = weights[positive]
            if target.masks is not None and len(positive):
                inside.append(crop_masks(target.masks, regions, matched[positive], MASK_SIDE))
                known = known * target.masks.flatten(1).any(1)[matched[positive]]  # none of a box alone beside masks
            chosen.append((regions, labels[positive] - 1, known))
        if not inside:  # keeps the graph of every parameter, which distributed training needs
            return {**losses, "mask": torch.stack([one.float().sum() for one in mask_features]).sum() * 0}
        labels, weights = (torch.cat([one[part] for one in chosen]) for part in (1, 2))
        logits = self.mask_head(self.mask_pool(mask_features, [one[0] for one in chosen]))
        own = logits[torch.arange(len(labels), device=logits.device), labels]
        return {**losses, "mask": mask_loss(own, torch.cat(inside), weights)}

    def infer(self, batch: Batch, settings: config.MaskCalibration) -> list[tuple[Instances, Trace]]:
        """The instances of each image and the maps behind them: the masks of the detections that a kept one suppressed
        are summed into its own. All masks of the batch are predicted together."""
        detected, boxes, _ = self.detect(batch)
        margin = self.settings.mask_margin
        # masks lie in the boxes, not in the RoIs that these were regressed from
        found = [replace(one, regions=enlarge(one.boxes, margin)) for one in detected]
        chosen = [
            choose_instances(candidates, settings, tags is not None)
            for candidates, tags in zip(found, batch.tags, strict=True)
        ]
        mapped = [one.mapped for one in chosen]
        device = batch.stem.device
        regions = [enlarge(own[index], margin).to(device) for own, index in zip(boxes, mapped, strict=True)]
        labels = torch.cat([one.labels[index] for one, index in zip(found, mapped, strict=True)]).to(device)
        features = self.mask_features(batch.stem, batch.fine)
        maps = self.masks(features, regions, labels).split([len(index) for index in mapped])
        return [
            calibrate(image, candidates, own, masks, settings)
            for image, candidates, own, masks in zip(batch.images, found, chosen, maps, strict=True)
        ]


def enlarge(boxes: Tensor, margin: float) -> Tensor:
    """Boxes (R, 4) with sides ``1 + margin`` times as long about the same centres; they may leave the image."""
    grown = (boxes[:, 2:] - boxes[:, :2]) * (margin / 2)
    return torch.cat([boxes[:, :2] - grown, boxes[:, 2:] + grown], 1)


def crop_masks(masks: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
    """The instances' masks inside the RoIs, (R, side, side) bool.

    Args:
        masks: (N, H, W) bool.
        boxes: (R, 4) RoIs in pixels of the masks.
        matched: (R,) the instance of each RoI.
        side: of the crops.
    """
    rois = torch.cat([matched[:, None].to(boxes), boxes], 1)
    return roi_align(masks[:, None].float(), rois, side, 1.0, sampling_ratio=2, aligned=True)[:, 0] >= 0.5


def mask_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean binary cross-entropy between predicted masks and the instances' inside the RoIs.

    Args:
        logits: (R, S, S).
        targets: (R, S, S) bool (`crop_masks`).
        weights: (R,) in [0, 1].
    """
    each = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean((1, 2))
    return (each * weights).sum() / len(logits)
