"""Module 2, object detection: Faster R-CNN whose targets carry weights (equations 3 and 4 of the paper).

Shape letters: ``R`` RoIs, ``C`` foreground classes, ``A`` anchors, ``D`` RoI features, ``K`` detections kept by NMS.
Labels inside the network are 0 for background and 1 + class index otherwise; `Instances` count classes from 0.
All boxes are in pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, clip_boxes_to_image, remove_small_boxes

from labelpenet import config
from labelpenet.calibration.calibrate import Candidates, Trace, calibrate, choose_instances
from labelpenet.calibration.nms import inside
from labelpenet.data.transforms import Batch, View
from labelpenet.instances import Instances
from labelpenet.models.attention import attention_offset, explain_rois, roi_evidence
from labelpenet.models.backbones import Backbone, Part
from labelpenet.models.layers import RoIPooling, by_rois, initialise

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
    """Anchors of one map at multiples of the map's true stride, from ``first`` pixels on.

    torchvision divides the image's side by the number of cells, which is another stride where the map was rounded up:
    for 721 pixels in 46 cells 15 instead of 16, 41 pixels off at the far edge.
    """

    def __init__(self, sides: tuple[int, ...], ratios: tuple[float, ...], stride: int, first: float = 0.0):
        super().__init__((sides,), (ratios,))
        self.stride, self.first = stride, first

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors (A, 4) in pixels for each image; the same for all, as they share the map."""
        features = feature_maps[0]
        self.set_cell_anchors(torch.float32, features.device)  # bfloat16 would move them by up to a pixel
        stride = torch.tensor(self.stride, device=features.device)
        anchors = self.grid_anchors([list(features.shape[-2:])], [[stride, stride]])
        return [torch.cat(anchors) + self.first] * len(image_list.image_sizes)


class DoubtingRPN(RegionProposalNetwork):
    """torchvision's RPN whose targets may hold ``doubtful`` boxes (M, 4): negative anchors on them are ignored.

    Its ``score_thresh`` holds for answers alone: while it learns, it passes on what it does not believe, too, for at
    first it believes nothing.
    """

    @property
    def score_thresh(self) -> float:
        """Objectness in [0, 1] from which on a box is passed on."""
        return 0.0 if self.training else self.__dict__["score_thresh"]

    @score_thresh.setter
    def score_thresh(self, value: float) -> None:
        self.__dict__["score_thresh"] = value

    @classmethod
    def like(cls, other: RegionProposalNetwork) -> DoubtingRPN:
        """The same network, with the same parameters."""
        one = cls(other.anchor_generator, other.head, 0.7, 0.3, 256, 0.5, {}, {}, 0.7)
        one.__dict__.update(other.__dict__)
        return one

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (A,) 1, 0 or -1 for ignored, and matched boxes (A, 4) of every image."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for label, own, target in zip(labels, anchors, targets, strict=True):
            label[(label == 0) & covered(own, target["doubtful"])] = -1
        return labels, boxes


class WeightedRPN(DoubtingRPN):
    """torchvision's RPN with the instance's weight as soft target and regression weight (equation 3).

    The weights travel as the anchors' labels: -1 is ignored, 0 background, and a value in (0, 1] is the weight of the
    instance that a positive anchor was matched to. An instance of weight 0 is doubtful: nothing is matched to it, and
    the background that it covers is ignored.
    """

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (A,) in {-1} or [0, 1] and matched boxes (A, 4) of every image."""
        sure = [target["weights"] > 0 for target in targets]
        known = [
            {"boxes": target["boxes"][own], "doubtful": target["boxes"][~own]}
            for target, own in zip(targets, sure, strict=True)
        ]
        labels, boxes = super().assign_targets_to_anchors(anchors, known)
        for index, own in enumerate(anchors):
            objects, weights = known[index]["boxes"], targets[index]["weights"][sure[index]]
            if len(objects):
                matched = weights[box_iou(objects, own).argmax(0)].to(labels[index])
                labels[index] = torch.where(labels[index] > 0, matched, labels[index])
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


def covered(boxes: Tensor, doubtful: Tensor) -> Tensor:
    """(R,) whether half of a box (R, 4) lies inside a doubtful one (M, 4)."""
    if not len(doubtful):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    return inside(boxes, doubtful).amax(1) >= 0.5


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


class Detector(nn.Module):
    """RPN and R-CNN head on one feature map, with tail and RoI head of its own: what modules 2 to 4 share.

    Args:
        backbone: names the parts.
        num_classes: C foreground classes.
        tail: from the stem to the map that RPN and RoI pooling work on.
    """

    needs_proposals, needs_masks = False, False

    def __init__(self, backbone: Backbone, num_classes: int, tail: Part, settings: config.Detector):
        super().__init__()
        self.num_classes, self.settings = num_classes, settings
        self.tail = tail.module
        first = tail.stride / 2 + tail.offset if settings.pool == "centred" else 0.0
        self.rpn = WeightedRPN(
            StrideAnchors(settings.anchor_sides, ANCHOR_RATIOS, tail.stride, first),
            RPNHead(tail.channels, len(settings.anchor_sides) * len(ANCHOR_RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": settings.rpn_pre_nms_top_n_train, "testing": settings.rpn_pre_nms_top_n_test},
            post_nms_top_n={"training": settings.rpn_post_nms_top_n_train, "testing": settings.rpn_post_nms_top_n_test},
            nms_thresh=0.7,
        )
        self.pool = RoIPooling(min(backbone.pool_size, settings.roi_cells), tail.stride, settings.pool, tail.offset)
        self.head, features = backbone.roi_head(settings.cells)
        self.classifier = nn.Linear(features, num_classes + 1)
        self.regressor = nn.Linear(features, 4 * (num_classes + 1))
        initialise(self.classifier)
        initialise(self.regressor, std=0.001)
        self.matcher = Matcher(0.5, 0.5, allow_low_quality_matches=False)
        self.sampler = BalancedPositiveNegativeSampler(settings.rois, 0.25)
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))

    def propose(
        self, features: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Instances] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Region proposals (R, 4) of each image, and the RPN's losses if there are targets.

        Args:
            features: (N, D, h, w) the map of the detection part.
            sizes: (H, W) of each image without its padding.
            targets: of each image.
        """
        self.rpn.train(targets is not None)
        given = None
        if targets is not None:
            given = [{"boxes": one.boxes, "weights": self._weights(one)} for one in targets]
        proposals, losses = self.rpn(ImageList(features, list(sizes)), {"0": features}, given)
        if targets is None:
            return proposals, {}
        return proposals, {"rpn_objectness": losses["loss_objectness"], "rpn_box": losses["loss_rpn_box_reg"]}

    def _weights(self, target: Instances) -> Tensor:
        return target.weights if self.settings.weighted else (target.weights > 0).to(target.weights)

    def sample(self, proposals: Tensor, target: Instances) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """RoIs to train on: boxes (R, 4), labels (R,), encoded targets (R, 4), weights (R,), matched instance (R,).

        A negative RoI carries the weight of the instance that it overlaps most, or 1 if it overlaps none. Nothing is
        matched to a doubtful instance, one of weight 0, and no RoI that it covers is taken for background.
        """
        sure = torch.where(target.weights > 0)[0]
        doubtful = target.boxes[target.weights == 0]
        if not len(sure):
            proposals = proposals[~covered(proposals, doubtful)]
            count = min(len(proposals), self.settings.rois)
            chosen = proposals[torch.randperm(len(proposals), device=proposals.device)[:count]]
            zeros = torch.zeros(count, dtype=torch.long, device=chosen.device)
            return chosen, zeros, torch.zeros_like(chosen), torch.ones(count, device=chosen.device), zeros
        proposals = torch.cat([proposals, target.boxes[sure]])
        overlap = box_iou(target.boxes[sure], proposals)
        best, nearest = overlap.max(0)
        matched = sure[nearest]
        positive = self.matcher(overlap) >= 0
        labels = torch.where(positive, target.labels[matched] + 1, 0)
        labels[~positive & covered(proposals, doubtful)] = -1
        taken, left = self.sampler([labels])
        chosen = torch.where((taken[0] + left[0]) > 0)[0]
        weights = torch.where(best > 0, self._weights(target)[matched], torch.ones_like(best))
        encoded = self.coder.encode_single(target.boxes[matched[chosen]], proposals[chosen])
        return proposals[chosen], labels[chosen], encoded, weights[chosen], matched[chosen]

    def losses(self, batch: Batch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Equations 3 and 4 over the images of a batch.

        Args:
            batch: N images.
            targets: the instances of each, which the module before inferred, in pixels of its view.
        """
        return self._detector_losses(batch, targets)[0]

    def _detector_losses(
        self, batch: Batch, targets: Sequence[Instances]
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]]:
        """The losses, and what `sample` chose of each image."""
        features = self.tail(batch.stem)
        proposals, losses = self.propose(features, batch.sizes, targets)
        samples = [self.sample(boxes, target) for boxes, target in zip(proposals, targets, strict=True)]
        logits, deltas = self.classify(self.head(self.pool(features, [sample[0] for sample in samples])))
        labels, encoded, weights = (torch.cat([sample[part] for sample in samples]) for part in (1, 2, 3))
        losses["class"], losses["box"] = rcnn_loss(logits, deltas, labels, encoded, weights)
        return losses, samples

    def classify(self, roi_features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (R, C + 1), background first, and box deltas (R, 4 (C + 1)) of RoI features (R, D)."""
        return self.classifier(roi_features), self.regressor(roi_features)

    def probabilities(self, batch: Batch, boxes: Sequence[Tensor]) -> list[Tensor]:
        """Class probabilities (R, C) of boxes (R, 4) in pixels of each view."""
        logits, _ = self.classify(by_rois(self.head, self.pool(self.tail(batch.stem), list(boxes))))
        return list(logits.float().softmax(1)[:, 1:].split([len(one) for one in boxes]))

    def detect(self, batch: Batch) -> tuple[list[Candidates], list[Tensor], list[Tensor]]:
        """What the detector believes of each image before NMS.

        Returns:
            for each image its candidates, their boxes (M, 4) in pixels of the view, and what explains its RoIs
            (`roi_evidence`), where they are to be explained.
        """
        features = self.tail(batch.stem)
        rois, _ = self.propose(features, batch.sizes)
        counts = [len(boxes) for boxes in rois]
        roi_features, evidence = self.look(self.pool(features, rois))
        logits, deltas = self.classify(roi_features)
        scores = logits.float().softmax(1)[:, 1:]
        regressed = self.coder.decode(deltas.float(), rois).reshape(len(scores), self.num_classes + 1, 4)[:, 1:]
        # to the host in one piece: what follows works on a few hundred boxes
        together = torch.cat([scores, regressed.flatten(1), torch.cat(rois)], 1).cpu()
        found, boxes = [], []
        for index, part in enumerate(together.split(counts)):
            own, others, seen = part.split([self.num_classes, 4 * self.num_classes, 4], 1)
            view, tags = batch.views[index], batch.tags[index]
            candidates, seen_boxes = self.candidates(
                seen, own, others.reshape(len(own), self.num_classes, 4), view, tags
            )
            found.append(candidates)
            boxes.append(seen_boxes)
        return found, boxes, list(evidence.split(counts))

    def look(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features (R, D') of pooled RoIs (R, D, P, P), and what explains them; here nobody asks."""
        return by_rois(self.head, pooled), pooled

    def candidates(
        self, rois: Tensor, scores: Tensor, boxes: Tensor, view: View, tags: tuple[int, ...] | None, limit: int = 400
    ) -> tuple[Candidates, Tensor]:
        """The scored boxes of an image, best first, all on the CPU.

        Args:
            rois: (R, 4) in pixels of the view.
            scores: (R, C).
            boxes: (R, C, 4) regressed for each class, in pixels of the view.
            view: of the image.
            tags: where the image's tags are known, only those classes are candidates, and the best box of each is one
                however low its score; such a one gets the score 0 (doubtful): neither object nor background to learn.
            limit: boxes that enter NMS, besides the best of known tags.

        Returns:
            M candidates and their boxes (M, 4) in pixels of the view.
        """
        good, best = scores > self.settings.score_threshold, torch.zeros_like(scores, dtype=torch.bool)
        if tags is not None and len(scores):
            classes = torch.tensor(tags, dtype=torch.long)
            best[scores[:, classes].argmax(0), classes] = True
            good = best | good & torch.isin(torch.arange(self.num_classes), classes)
        boxes = clip_boxes_to_image(boxes, view.size)
        index, labels = torch.where(good)
        chosen, own = boxes[index, labels], scores[index, labels]
        own = torch.where(own > self.settings.score_threshold, own, 0.0)
        order = own.argsort(descending=True, stable=True)
        order = order[(torch.arange(len(order)) < limit) | best[index, labels][order]]
        order = order[torch.isin(order, remove_small_boxes(chosen, 1.0))]
        chosen, index = chosen[order], index[order]
        return Candidates(view.back(chosen), own[order], labels[order], view.back(rois[index]), index), chosen


class Detection(Detector):
    """Module 2: a `Detector` on the map of module 1, calibrated by attention maps."""

    settings: config.Detection

    def __init__(self, backbone: Backbone, num_classes: int, settings: config.Detection):
        tail = backbone.region_tail()
        super().__init__(backbone, num_classes, tail, settings)
        self.attention_offset = attention_offset(self.head, tail.channels, self.pool, settings.attention)

    def infer(self, batch: Batch, settings: config.AttentionCalibration) -> list[tuple[Instances, Trace]]:
        """The instances of each image, several of a class, and the maps behind them."""
        found, _, evidence = self.detect(batch)
        chosen = [
            choose_instances(candidates, settings, tags is not None)
            for candidates, tags in zip(found, batch.tags, strict=True)
        ]
        parts, labels, scores = [], [], []
        for candidates, own, seen in zip(found, chosen, evidence, strict=True):
            parts.append(seen[candidates.rois[own.mapped].to(seen.device)])
            labels.append(candidates.labels[own.mapped])
            scores.append(candidates.scores[own.mapped])
        together = torch.cat(parts), torch.cat(labels) + 1, torch.cat(scores)
        maps = explain_rois(self.head, self.classifier, *together, self.settings.attention)
        return [
            calibrate(image, candidates, own, attention, settings, offset=self.attention_offset)
            for image, candidates, own, attention in zip(
                batch.images, found, chosen, maps.split([len(part) for part in parts]), strict=True
            )
        ]

    def look(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features (R, D') of pooled RoIs (R, D, P, P), and what `explain_rois` explains them by."""
        return roi_evidence(self.head, pooled, self.settings.attention)
