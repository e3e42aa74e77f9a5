"""Which classes a photograph shows: a linear classifier of the whole of it, taught by the tags alone.

Detectors learn what an object looks like from labels that may be wrong, and one box at a time. The tags are right, and
pretrained features of a whole photograph tell its classes well: so answers are believed less where the photograph as a
whole does not look like one of their class. Not in the paper, whose module 1 classifies a photograph by its proposals.

Shape letters: ``M`` photographs, ``N`` instances, ``K`` channels, ``h, w`` cells, ``C`` foreground classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PENALTY = 0.01
"""Of the squared weights (of features of deviation 1), beside the mean binary cross-entropy."""

ITERATIONS = 100
"""Of L-BFGS at most."""


class TagClassifier(nn.Module):
    """Logistic regression, class by class, on the mean and the maximum of each channel of a feature map.

    Its weights are buffers: they are fitted at once (`fit`), not trained step by step. Until then every class has a
    probability of one half.

    Args:
        channels: K; num_classes: C.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_classes, 2 * channels))
        self.register_buffer("bias", torch.zeros(num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """The probabilities (C,) in [0, 1] that a photograph with this map (K, h, w) shows the classes."""
        # no product of matrices: autocast would round thousands of terms, some of which cancel, to bfloat16
        return torch.sigmoid((self.weight * describe(features)).sum(1) + self.bias)

    def fit(self, described: Tensor, present: Tensor) -> None:
        """Sets the weights to those that fit photographs best.

        Args:
            described: (M, 2 K) of each as `describe` gives it, M >= 1.
            present: (M, C) 1 for the classes among its tags, else 0.
        """
        rows, wanted = described.double(), present.double()
        weight, bias = fit_logistic(rows, wanted, torch.full_like(wanted, 1 / wanted.numel()), PENALTY)
        self.weight.copy_(weight)
        self.bias.copy_(bias)


def fit_logistic(rows: Tensor, wanted: Tensor, weights: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Logistic regressions: weights (C, K) and biases (C,) that make the sum of the weighted binary cross-entropies,
    and half the penalty times the squared weights of features brought to deviation 1, smallest; a class without
    weights gets zeros.

    Args:
        rows: (M, K) features, M >= 1, in whose precision it is computed.
        wanted: (M, C) 0 or 1; weights: (M, C) not negative, of each answer.
    """
    mean, deviation = rows.mean(0), rows.std(0, correction=0).clamp(min=1e-6)
    rows = (rows - mean) / deviation
    weight = rows.new_zeros(wanted.shape[1], rows.shape[1], requires_grad=True)
    bias = rows.new_zeros(wanted.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        error = F.binary_cross_entropy_with_logits(rows @ weight.T + bias, wanted, weights, reduction="sum")
        total = error + penalty / 2 * (weight**2).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimiser.step(loss)
    own = weight.detach() / deviation
    return own, bias.detach() - own @ mean


def describe(features: Tensor) -> Tensor:
    """(2 K,) float32: of each channel of a map (K, h, w) the mean and the maximum over its cells."""
    values = features.float()
    return torch.cat([values.mean((1, 2)), values.amax((1, 2))])


def weigh(scores: Tensor, labels: Tensor, shown: Tensor, power: float) -> Tensor:
    """Scores (N,) of instances of the classes ``labels`` (N,), times the probability that the photograph shows their
    class, of ``shown`` (C,), to a ``power`` of at least 0.
    """
    return scores * shown[labels] ** power
