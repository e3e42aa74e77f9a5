"""Module 2, object detection: Faster R-CNN whose targets carry weights (equations 3 and 4 of the paper).

Shape letters: ``R`` RoIs, ``C`` foreground classes, ``A`` anchors, ``D`` RoI features, ``K`` detections kept by NMS.
Labels inside the network are 0 for background and 1 + class index otherwise; `Instances` count classes from 0.
All boxes are in pixels of the network's input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, clip_boxes_to_image, remove_small_boxes

from labelpenet import config
from labelpenet.instances import Instances
from labelpenet.models.backbones import Backbone, Part
from labelpenet.models.layers import RoIPooling, initialise, nms_groups

ANCHOR_RATIOS = (0.5, 1.0, 2.0)


class RPNHead(nn.Module):
    """Three convolutions, N(0, 0.01): a shared 3x3 one, and two 1x1 for objectness and box regression."""

    def __init__(self, channels: int, anchors: int):
        super().__init__()
        hidden = min(channels * 2, 512)
        self.shared = nn.Conv2d(channels, hidden, 3, padding=1)
        self.objectness = nn.Conv2d(hidden, anchors, 1)
        self.regression = nn.Conv2d(hidden, anchors * 4, 1)
        initialise(self)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [F.relu(self.shared(features)) for features in maps]
        return [self.objectness(h).float() for h in hidden], [self.regression(h).float() for h in hidden]


class StrideAnchors(AnchorGenerator):
    """Anchors of one map at multiples of the map's true stride.

    torchvision divides the image's side by the number of cells, which is another stride where the map was rounded up:
    for 721 pixels in 46 cells 15 instead of 16, 41 pixels off at the far edge.
    """

    def __init__(self, sides: tuple[int, ...], ratios: tuple[float, ...], stride: int):
        super().__init__((sides,), (ratios,))
        self.stride = stride

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors (A, 4) in pixels for each image; the same for all, as they share the map."""
        features = feature_maps[0]
        self.set_cell_anchors(features.dtype, features.device)
        stride = torch.tensor(self.stride, device=features.device)
        anchors = self.grid_anchors([list(features.shape[-2:])], [[stride, stride]])
        return [torch.cat(anchors)] * len(image_list.image_sizes)


class WeightedRPN(RegionProposalNetwork):
    """torchvision's RPN with the instance's weight as soft target and regression weight (equation 3).

    The weights travel as the anchors' labels: -1 is ignored, 0 background, and a value in (0, 1] is the weight of the
    instance that a positive anchor was matched to.
    """

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (A,) in {-1} or [0, 1] and matched boxes (A, 4) of every image."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for index, (own, target) in enumerate(zip(anchors, targets, strict=True)):
            if len(target["boxes"]):
                weights = target["weights"][box_iou(target["boxes"], own).argmax(0)].clamp(min=1e-3)
                labels[index] = torch.where(labels[index] > 0, weights.to(labels[index]), labels[index])
        return labels, boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Equation 3: objectness and box regression loss over the sampled anchors."""
        chosen = [torch.where(label > 0, torch.ones_like(label), label) for label in labels]
        positive, negative = self.fg_bg_sampler(chosen)
        positive, negative = torch.cat(positive) > 0, torch.cat(negative) > 0
        sampled = positive | negative
        target = torch.cat(labels)
        count = sampled.sum().clamp(min=1)
        objectness = objectness.flatten()
        loss_objectness = (
            F.binary_cross_entropy_with_logits(objectness[sampled], target[sampled], reduction="sum") / count
        )
        distance = F.smooth_l1_loss(
            pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], beta=1 / 9, reduction="none"
        ).sum(1)
        return loss_objectness, (distance * target[positive]).sum() / count


def rcnn_loss(
    logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Equation 4: weighted classification and box regression loss over the sampled RoIs.

    Args:
        logits: (R, C + 1); deltas: (R, 4 (C + 1)); labels: (R,) 0 for background; targets: (R, 4) encoded boxes;
        weights: (R,) in [0, 1], of the instance that each RoI was matched to.
    """
    count = max(len(labels), 1)
    classification = (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum() / count
    positive = torch.where(labels > 0)[0]
    own = deltas.float().reshape(len(labels), deltas.shape[1] // 4, 4)[positive, labels[positive]]
    distance = F.smooth_l1_loss(own, targets[positive], beta=1 / 9, reduction="none").sum(1)
    return classification, (distance * weights[positive]).sum() / count


@dataclass
class Candidates:
    """What a detector believes of an image before and after class-wise NMS.

    Attributes:
        boxes: (M, 4) regressed boxes with a score above the threshold; scores: (M,); labels: (M,) class index from 0.
        keep: (K,) indices of those that survive NMS, best first.
        group: (M,) position in ``keep`` of the one that suppressed each.
        rois: (M,) index of the RoI that each came from.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    keep: Tensor
    group: Tensor
    rois: Tensor


class Detector(nn.Module):
    """RPN and R-CNN head on one feature map, with tail and RoI head of its own.

    Args:
        backbone: names the parts.
        num_classes: C foreground classes.
        tail: from the stem to the map that RPN and RoI pooling work on.
        settings: the recipe's choices.
    """

    def __init__(self, backbone: Backbone, num_classes: int, tail: Part, settings: config.Detector):
        super().__init__()
        self.num_classes, self.settings = num_classes, settings
        self.tail = tail.module
        self.rpn = WeightedRPN(
            StrideAnchors(settings.anchor_sides, ANCHOR_RATIOS, tail.stride),
            RPNHead(tail.channels, len(settings.anchor_sides) * len(ANCHOR_RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={
                "training": settings.rpn_pre_nms_top_n_train,
                "testing": settings.rpn_pre_nms_top_n_test,
            },
            post_nms_top_n={
                "training": settings.rpn_post_nms_top_n_train,
                "testing": settings.rpn_post_nms_top_n_test,
            },
            nms_thresh=0.7,
        )
        self.pool = RoIPooling(backbone.pool_size, tail.stride, settings.pool)
        self.head, features = backbone.roi_head(settings.cells)
        self.classifier = nn.Linear(features, num_classes + 1)
        self.regressor = nn.Linear(features, 4 * (num_classes + 1))
        initialise(self.classifier)
        initialise(self.regressor, std=0.001)
        self.matcher = Matcher(0.5, 0.5, allow_low_quality_matches=False)
        self.sampler = BalancedPositiveNegativeSampler(settings.rois, 0.25)
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))

    def features(self, stem: Tensor) -> Tensor:
        """The map (1, D, h, w) that RPN and RoI pooling work on, from the stem's."""
        return self.tail(stem)

    def propose(
        self, features: Tensor, image: Tensor, target: Instances | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Region proposals (R, 4) of the image (1, 3, H, W), and the RPN's losses if there is a target."""
        size = (image.shape[-2], image.shape[-1])
        targets = None
        self.rpn.train(target is not None)
        if target is not None:
            weights = target.weights if self.settings.weighted else torch.ones_like(target.weights)
            targets = [{"boxes": target.boxes, "weights": weights}]
        boxes, losses = self.rpn(ImageList(image, [size]), {"0": features}, targets)
        if target is None:
            return boxes[0], {}
        return boxes[0], {"rpn_objectness": losses["loss_objectness"], "rpn_box": losses["loss_rpn_box_reg"]}

    def sample(self, proposals: Tensor, target: Instances) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """RoIs to train on: boxes (R, 4), labels (R,), encoded targets (R, 4), weights (R,), matched instance (R,).

        A negative RoI carries the weight of the instance that it overlaps most, or 1 if it overlaps none.
        """
        if not len(target):
            count = min(len(proposals), self.settings.rois)
            chosen = proposals[torch.randperm(len(proposals), device=proposals.device)[:count]]
            zeros = torch.zeros(count, dtype=torch.long, device=chosen.device)
            return chosen, zeros, torch.zeros_like(chosen), torch.ones(count, device=chosen.device), zeros
        proposals = torch.cat([proposals, target.boxes])
        overlap = box_iou(target.boxes, proposals)
        best, matched = overlap.max(0)
        positive = self.matcher(overlap) >= 0
        labels = torch.where(positive, target.labels[matched] + 1, 0)
        taken, left = self.sampler([labels])
        chosen = torch.where((taken[0] + left[0]) > 0)[0]
        weights = torch.where(best > 0, target.weights[matched], torch.ones_like(best))
        if not self.settings.weighted:
            weights = torch.ones_like(weights)
        encoded = self.coder.encode_single(target.boxes[matched[chosen]], proposals[chosen])
        return proposals[chosen], labels[chosen], encoded, weights[chosen], matched[chosen]

    def losses(self, stem: Tensor, image: Tensor, target: Instances) -> dict[str, Tensor]:
        """Losses of one image: equations 3 and 4.

        Args:
            stem: the stem's map (1, D, h, w); image: (1, 3, H, W), only its size counts; target: the instances that the
            module before inferred, in pixels of ``image``.
        """
        features = self.features(stem)
        proposals, losses = self.propose(features, image, target)
        boxes, labels, encoded, weights, _ = self.sample(proposals, target)
        logits, deltas = self.classify(self.head(self.pool(features, boxes)))
        losses["class"], losses["box"] = rcnn_loss(logits, deltas, labels, encoded, weights)
        return losses

    def classify(self, roi_features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (R, C + 1), background first, and box deltas (R, 4 (C + 1)) of RoI features (R, D)."""
        return self.classifier(roi_features), self.regressor(roi_features)

    def candidates(
        self,
        boxes: Tensor,
        logits: Tensor,
        deltas: Tensor,
        image_size: tuple[int, int],
        tags: tuple[int, ...] | None = None,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.3,
        limit: int = 400,
    ) -> Candidates:
        """Regressed, scored and suppressed boxes.

        Args:
            boxes: (R, 4) RoIs; logits, deltas: as `classify` returns them; image_size: (H, W) of the network's input.
            tags: where the image's tags are known, only those classes are candidates.
            score_threshold: on the softmax score; nms_threshold: IoU; limit: boxes that enter NMS.
        """
        scores = logits.float().softmax(1)[:, 1:]
        if tags is not None:
            allowed = torch.zeros(self.num_classes, dtype=torch.bool, device=scores.device)
            allowed[list(tags)] = True
            scores = scores * allowed
        regressed = self.coder.decode(deltas.float(), [boxes]).reshape(len(boxes), -1, 4)[:, 1:]
        regressed = clip_boxes_to_image(regressed, image_size)
        rois, labels = torch.where(scores > score_threshold)
        chosen, own = regressed[rois, labels], scores[rois, labels]
        order = own.argsort(descending=True, stable=True)[:limit]
        order = order[torch.isin(order, remove_small_boxes(chosen, 1.0))]
        chosen, own, labels, rois = chosen[order], own[order], labels[order], rois[order]
        keep, group = nms_groups(chosen, own, labels, nms_threshold)
        return Candidates(chosen, own, labels, keep, group, rois)
