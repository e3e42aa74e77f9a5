"""Which pixels look like a class: a linear classifier of the cells of a network's maps, taught by labels and tags.

A mask head sees boxes of its class alone. What lies behind every cat, and is drawn into many cats' labels, is cat to
it: nothing tells it that the same sofa stands where no cat is. So each class's cells are told from those of all
photographs, above all from those whose tags do not name the class, and where a student labels photographs whose tags
are known, its masks believe both (`calibration.sharpen`). Not in the paper, whose background is what lies around an
object (section 3.2).

Shape letters: ``M`` cells, ``K`` channels of all maps together, ``H, W`` cells of the finest map, ``C`` foreground
classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelpenet.calibration.sharpen import resized
from labelpenet.models.tags import fit_logistic

PENALTY = 0.02
"""Of the squared weights (of features of deviation 1), beside each class's mean binary cross-entropy."""

SUREST = 4.0
"""Log-odds that count at most: .98 for an object or against it."""


class PixelClassifier(nn.Module):
    """Logistic regression, class by class, on the channels of one or more maps where they lie.

    Its weights are buffers, fitted at once (`fit`). Until then, and of a class that no cell showed, its log-odds are 0.

    Args:
        channels: of each map; num_classes: C.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: Sequence[int], num_classes: int):
        super().__init__()
        self.channels = list(channels)
        self.register_buffer("weight", torch.zeros(num_classes, sum(channels)))
        self.register_buffer("bias", torch.zeros(num_classes))

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Log-odds (C, *size) of the classes against all else, between -`SUREST` and `SUREST`.

        Not for autocast, as `calibration.sharpen`.

        Args:
            maps: (K_i, h_i, w_i) each, which cover the same pixels.
            size: rows and columns of the result, over these pixels.
        """
        odds = self.bias[:, None, None]
        for weight, own in zip(self.weight.split(self.channels, 1), maps, strict=True):
            odds = odds + resized((weight @ own.float().flatten(1)).unflatten(1, own.shape[1:]), size)
        return odds.clamp(-SUREST, SUREST)

    def fit(self, cells: Tensor, shown: Tensor) -> None:
        """Sets the weights; objects and background of a class weigh the same, however many cells there are of each.

        Args:
            cells: (M, K) float32 features as `stack` gives them.
            shown: (M, C) 1 where a cell shows the class, 0 where it does not, -1 where nothing is known.
        """
        known = [[(shown[:, label] == value) for value in (0, 1)] for label in range(shown.shape[1])]
        weights = torch.zeros(shown.shape)
        for label, parts in enumerate(known):
            if all(part.any() for part in parts):
                for part in parts:
                    weights[part, label] = 0.5 / part.sum()
        weight, bias = fit_logistic(cells, (shown == 1).float(), weights, PENALTY)
        self.weight.copy_(weight)
        self.bias.copy_(bias)


def stack(maps: Sequence[Tensor]) -> Tensor:
    """Maps (K_i, h_i, w_i) as one of float32 (K, H, W), of the first one's size; the others are interpolated."""
    size = maps[0].shape[-2:]
    finest, *coarser = (own.float()[None] for own in maps)
    return torch.cat([finest, *(F.interpolate(own, size, mode="bilinear") for own in coarser)], 1)[0]
