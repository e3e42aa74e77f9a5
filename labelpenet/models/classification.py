"""Module 1, multi-label classification of an image by its proposals (equations 1 and 2 of the paper).

Shape letters: ``N`` images, ``R`` proposals of an image, ``C`` foreground classes, ``D`` features of a RoI.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelpenet import config
from labelpenet.calibration.calibrate import Candidates, Trace, calibrate, choose_instances, proposal_candidates
from labelpenet.data.transforms import Batch, stacked_size
from labelpenet.instances import Instances
from labelpenet.models.attention import attention_offset, explain_rois, roi_attention, roi_evidence
from labelpenet.models.backbones import Backbone
from labelpenet.models.layers import RoIPooling, by_rois, initialise
from labelpenet.models.tags import TagClassifier


class Classification(nn.Module):
    """Two linear branches over the RoI features: class logits ``x^c`` and proposal weights ``x^p``.

    Args:
        backbone: names tail and RoI head.
        num_classes: C.
    """

    needs_proposals, needs_masks = True, False

    def __init__(self, backbone: Backbone, num_classes: int, settings: config.Classification):
        super().__init__()
        self.num_classes, self.settings = num_classes, settings
        tail = backbone.region_tail()
        self.tail = tail.module
        self.pool = RoIPooling(backbone.pool_size, tail.stride, settings.pool, tail.offset)
        self.head, features = backbone.roi_head()
        self.attention_offset = attention_offset(self.head, tail.channels, self.pool, settings.attention)
        if settings.freeze_head:
            self.tail.requires_grad_(False)
            self.head.requires_grad_(False)
        self.classifier = nn.Linear(features, num_classes + 1)
        self.proposal_weights = nn.Linear(features, num_classes)
        initialise(self.classifier, self.proposal_weights, std=0.01 if settings.initialiser == "gaussian" else None)
        if settings.tag_power:
            channels = self.convolutions(torch.zeros(1, tail.channels, 2, 2)).shape[1]
            self.tags = TagClassifier(channels, num_classes)

    def features(self, batch: Batch) -> list[Tensor]:
        """RoI features (R, D) of each image's proposals, computed where the batch does not hold them."""
        if batch.features is not None:
            return list(batch.features)
        regions = self._regions(batch)
        pooled = self.pool(self.tail(batch.stem), regions)
        return list(by_rois(self.head, pooled).split([len(boxes) for boxes in regions]))

    def convolutions(self, features: Tensor) -> Tensor:
        """What the RoI head's layers before its pooling make, (N, K, h, w), of whole maps (N, D, h', w')."""
        for layer in self.head:
            if isinstance(layer, (nn.AdaptiveAvgPool2d, nn.Flatten)):
                break
            features = layer(features)
        return features

    @torch.no_grad()
    def whole(self, batch: Batch) -> list[Tensor]:
        """The last map (K, h, w) of each photograph as a whole, without what pads it, for `models.tags`."""
        maps = self.convolutions(self.tail(batch.stem))
        height, width = stacked_size(batch.views)
        cells = ((-(-h * maps.shape[-2] // height), -(-w * maps.shape[-1] // width)) for h, w in batch.sizes)
        return [one[:, :rows, :columns] for one, (rows, columns) in zip(maps, cells, strict=True)]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """``x^c`` (R, C + 1), the background first, and ``x^p`` (R, C), from RoI features (R, D)."""
        return self.classifier(features).float(), self.proposal_weights(features).float()

    def scores(self, x_c: Tensor, x_p: Tensor) -> Tensor:
        """The proposals' scores ``x`` (R, C); their sum over the proposals is the image's score, before the softmax."""
        return x_c[:, 1:] * x_p.softmax(0)

    def image_probabilities(self, x_c: Tensor, x_p: Tensor) -> Tensor:
        """Class probabilities (C,) of the image."""
        return self.scores(x_c, x_p).sum(0).softmax(0)

    def loss(self, x_c: Tensor, x_p: Tensor, present: Tensor) -> Tensor:
        """Equation 2, in log space.

        Args:
            x_c: (R, C + 1).
            x_p: (R, C).
            present: (C,) 1 for the classes among the image's tags, else 0.
        """
        return -(self.scores(x_c, x_p).sum(0).log_softmax(0) * present).sum()

    def single_label_loss(self, x_c: Tensor, labels: Tensor) -> Tensor:
        """Section 3.3, backward phase: cross-entropy of each proposal.

        Args:
            x_c: (R, C + 1).
            labels: (R,) 0 for background, -1 for what is left out, 1 + class index otherwise.
        """
        return F.cross_entropy(x_c, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp(min=1)

    def losses(self, batch: Batch, targets: Sequence[Instances] | None = None) -> dict[str, Tensor]:
        """Equation 2, a mean over the images; it learns from ``batch.tags`` alone and reads no target."""
        return {"multi_label": self.multi_label([self(one) for one in self.features(batch)], batch.tags)}

    def multi_label(self, scores: Sequence[tuple[Tensor, Tensor]], tags: Sequence[tuple[int, ...] | None]) -> Tensor:
        """Equation 2 for the ``x^c`` and ``x^p`` of each image, a mean over the images."""
        pairs = zip(scores, tags, strict=True)
        present = (present_classes(own, self.num_classes).to(x_c.device) for (x_c, _), own in pairs)
        return torch.stack([self.loss(*one, own) for one, own in zip(scores, present, strict=True)]).mean()

    def infer(self, batch: Batch, settings: config.AttentionCalibration) -> list[tuple[Instances, Trace]]:
        """One instance for each tag of each image, and the maps behind them.

        Where tags are not known every class gets an instance, its weight multiplied by the image's probability of it.
        """
        kind, heat = self.settings.attention, self.settings.heat == "all"
        tail, regions = self.tail(batch.stem), self._regions(batch)
        known = batch.features
        if known is None:
            features, maps = roi_evidence(self.head, self.pool(tail, regions), kind)
            known = features.split([len(boxes) for boxes in regions])
            evidence = maps.split([len(boxes) for boxes in regions])
        scored = [self._candidates(*one) for one in zip(known, batch.proposals, batch.tags, strict=True)]
        chosen = [choose_instances(candidates, settings, each_class=True) for candidates, _, _ in scored]
        which = [one.rois[own.mapped].to(tail.device) for (one, _, _), own in zip(scored, chosen, strict=True)]
        labels, weights = (
            torch.cat([getattr(one, name)[own.mapped] for (one, _, _), own in zip(scored, chosen, strict=True)])
            for name in ("labels", "scores")
        )
        if batch.features is None:
            parts = torch.cat([own[rois] for own, rois in zip(evidence, which, strict=True)])
            attention = explain_rois(self.head, self.classifier, parts, labels + 1, weights, kind)
        else:
            pooled = self.pool(tail, [own[rois] for own, rois in zip(regions, which, strict=True)])
            attention = roi_attention(self.head, self.classifier, pooled, labels + 1, weights, kind)
        found = []
        for index, maps in enumerate(attention.split([len(rois) for rois in which])):
            candidates, scores, probabilities = scored[index]
            heated = (batch.proposals[index].cpu(), scores) if heat else None
            instances, trace = calibrate(
                batch.images[index], candidates, chosen[index], maps, settings, heated, self.attention_offset
            )
            if batch.tags[index] is None:
                instances = instances.weighted(instances.weights * probabilities[instances.labels])
            found.append((instances, trace))
        return found

    def _candidates(
        self, features: Tensor, boxes: Tensor, tags: tuple[int, ...] | None
    ) -> tuple[Candidates, Tensor, Tensor]:
        """Of an image's proposals (R, 4) the candidates, the class scores (R, C) and the image's probabilities (C,)."""
        x_c, x_p = self(features)
        both = torch.cat([x_c[:, 1:].softmax(1), self.image_probabilities(x_c, x_p)[None]]).cpu()
        classes = tuple(range(self.num_classes)) if tags is None else tags
        return proposal_candidates(boxes.cpu(), both[:-1], classes), both[:-1], both[-1]

    def _regions(self, batch: Batch) -> list[Tensor]:
        """The proposals (R, 4) of each image in pixels of its view."""
        return [view.boxes(boxes) for view, boxes in zip(batch.views, batch.proposals, strict=True)]


def present_classes(tags: tuple[int, ...] | None, num_classes: int) -> Tensor:
    """(C,) float, 1 for the classes among an image's tags."""
    present = torch.zeros(num_classes)
    present[list(tags or ())] = 1
    return present
