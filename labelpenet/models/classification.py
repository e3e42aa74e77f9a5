"""Module 1, multi-label classification of an image by its proposals (equations 1 and 2 of the paper).

Shape letters: ``R`` proposals, ``C`` foreground classes, ``D`` features of a RoI.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelpenet.models.backbones import Backbone
from labelpenet.models.layers import RoIPooling, initialise

FRAME = 1.8  # side of the frame that the contrast looks at, relative to the proposal's


class Classification(nn.Module):
    """Two linear branches over the RoI features: class logits ``x^c`` and proposal weights ``x^p``.

    Args:
        backbone: names tail and RoI head.
        num_classes: C.
        pool: kind of RoI pooling, ``max`` or ``align``.
        form: ``paper``, equations 1 and 2: the image's scores are the weighted sum of logits, then a softmax over the
            classes and cross-entropy over the present ones; ``wsddn``: softmax over the classes before the weighted
            sum, and binary cross-entropy over all classes.
        contrast: the weight branch sees the difference between a proposal's features and those of the frame of
            `FRAME` times its size, so that a part of an object cannot outweigh the whole.
        freeze_head: whether the RoI head keeps its pretrained weights.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        pool: str = "max",
        form: str = "paper",
        contrast: bool = False,
        freeze_head: bool = False,
    ):
        super().__init__()
        if form not in ("paper", "wsddn"):
            raise ValueError(f"form must be 'paper' or 'wsddn', but got {form!r}")
        self.num_classes, self.form, self.contrast = num_classes, form, contrast
        tail = backbone.region_tail()
        self.tail = tail.module
        self.pool = RoIPooling(backbone.pool_size, tail.stride, pool)
        self.head, features = backbone.roi_head()
        if freeze_head:
            self.tail.requires_grad_(False)
            self.head.requires_grad_(False)
        self.classifier = nn.Linear(features, num_classes + 1)
        self.weigher = nn.Linear(features, num_classes)
        initialise(self.classifier, self.weigher)

    def features(self, stem: Tensor, boxes: Tensor) -> Tensor:
        """RoI features (R, D) of the proposals (R, 4), in pixels of the network's input."""
        return self.head(self.pool(self.tail(stem), boxes))

    def forward(self, features: Tensor, frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x^c`` (R, C + 1), the background first, and ``x^p`` (R, C), from RoI features (R, D).

        Args:
            features: of the proposals; frames: of their frames (`frame_boxes`), needed if ``contrast``.
        """
        weighed = features - frames if self.contrast and frames is not None else features
        return self.classifier(features).float(), self.weigher(weighed).float()

    def scores(self, x_c: Tensor, x_p: Tensor) -> Tensor:
        """The proposals' scores ``x`` (R, C); their sum over the proposals is the image's score, before the softmax."""
        own = x_c[:, 1:]
        if self.form == "wsddn":
            own = own.softmax(1)
        return own * x_p.softmax(0)

    def image_probabilities(self, x_c: Tensor, x_p: Tensor) -> Tensor:
        """Class probabilities (C,) of the image."""
        score = self.scores(x_c, x_p).sum(0)
        return score.clamp(0, 1) if self.form == "wsddn" else score.softmax(0)

    def loss(self, x_c: Tensor, x_p: Tensor, present: Tensor) -> Tensor:
        """Equation 2, in log space.

        Args:
            present: (C,) 1 for the classes among the image's tags, else 0.
        """
        if self.form == "paper":
            return -(self.scores(x_c, x_p).sum(0).log_softmax(0) * present).sum()
        log_weight = x_p.log_softmax(0)
        log_score = torch.logsumexp(x_c[:, 1:].log_softmax(1) + log_weight, 0)
        log_absent = torch.logsumexp(log_other_classes(x_c[:, 1:]) + log_weight, 0)
        return -(log_score * present + log_absent * (1 - present)).sum()

    def single_label_loss(self, x_c: Tensor, labels: Tensor) -> Tensor:
        """Section 3.3, backward phase: cross-entropy of each proposal.

        Args:
            x_c: (R, C + 1); labels: (R,) 0 for background, 1 + class index otherwise.
        """
        return F.cross_entropy(x_c, labels)


def log_other_classes(logits: Tensor) -> Tensor:
    """``log(1 - softmax(logits))``, (R, C) to (R, C) for C > 1; exact also where the softmax rounds to 1."""
    best = logits.argmax(1, keepdim=True)
    # The likeliest class has the others' share, summed as it stands; of any other one at least half is left.
    rest = logits.scatter(1, best, -torch.inf)
    rest_of_best = rest.logsumexp(1, keepdim=True) - logits.logsumexp(1, keepdim=True)
    unlikely = logits.log_softmax(1).scatter(1, best, -torch.inf)
    return torch.log1p(-unlikely.exp()).scatter(1, best, rest_of_best)


def frame_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The boxes (R, 4) scaled by `FRAME` about their centres and clipped to the image of (H, W)."""
    height, width = image_size
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * (FRAME / 2)
    frames = torch.cat([centre - half, centre + half], 1)
    limit = frames.new_tensor([width, height, width, height])
    return frames.clamp(min=0).minimum(limit)
