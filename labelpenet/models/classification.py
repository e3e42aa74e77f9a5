"""Module 1, multi-label classification of an image by its proposals (equations 1 and 2 of the paper).

Shape letters: ``R`` proposals, ``C`` foreground classes, ``D`` features of a RoI.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from labelpenet import config
from labelpenet.models.backbones import Backbone
from labelpenet.models.layers import RoIPooling, initialise


class Classification(nn.Module):
    """Two linear branches over the RoI features: class logits ``x^c`` and proposal weights ``x^p``.

    Args:
        backbone: names tail and RoI head.
        num_classes: C.
        settings: the recipe's choices.
    """

    def __init__(self, backbone: Backbone, num_classes: int, settings: config.Classification):
        super().__init__()
        self.num_classes, self.settings = num_classes, settings
        tail = backbone.region_tail()
        self.tail = tail.module
        self.pool = RoIPooling(backbone.pool_size, tail.stride, settings.pool)
        self.head, features = backbone.roi_head()
        if settings.freeze_head:
            self.tail.requires_grad_(False)
            self.head.requires_grad_(False)
        self.classifier = nn.Linear(features, num_classes + 1)
        self.weigher = nn.Linear(features, num_classes)
        initialise(self.classifier, self.weigher)

    def features(self, stem: Tensor, boxes: Tensor) -> Tensor:
        """RoI features (R, D) of the proposals (R, 4), in pixels of the network's input."""
        return self.head(self.pool(self.tail(stem), boxes))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """``x^c`` (R, C + 1), the background first, and ``x^p`` (R, C), from RoI features (R, D)."""
        return self.classifier(features).float(), self.weigher(features).float()

    def scores(self, x_c: Tensor, x_p: Tensor) -> Tensor:
        """The proposals' scores ``x`` (R, C); their sum over the proposals is the image's score, before the softmax."""
        return x_c[:, 1:] * x_p.softmax(0)

    def image_probabilities(self, x_c: Tensor, x_p: Tensor) -> Tensor:
        """Class probabilities (C,) of the image."""
        return self.scores(x_c, x_p).sum(0).softmax(0)

    def loss(self, x_c: Tensor, x_p: Tensor, present: Tensor) -> Tensor:
        """Equation 2, in log space.

        Args:
            present: (C,) 1 for the classes among the image's tags, else 0.
        """
        return -(self.scores(x_c, x_p).sum(0).log_softmax(0) * present).sum()

    def single_label_loss(self, x_c: Tensor, labels: Tensor) -> Tensor:
        """Section 3.3, backward phase: cross-entropy of each proposal.

        Args:
            x_c: (R, C + 1); labels: (R,) 0 for background, 1 + class index otherwise.
        """
        return F.cross_entropy(x_c, labels)
