"""Validated labels for forward-backward learning: what a teacher infers, checked against what the cascade inferred.

The teacher is a moving average of the network that starts at the cascade. It labels a photograph unflipped, at the size
of inference. The cascade's labels are the *anchor*: the teacher's instances replace them only where they agree on the
place and modules 1 and 2 believe more in the teacher's; what is doubtful is neither object nor background. Not in the
paper, whose backward phase validates by teaching back alone. No annotation is read here.

Shape letters: ``A`` instances of the anchor, ``T`` of the teacher.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from labelpenet.config import MODULES
from labelpenet.instances import Instances
from labelpenet.models.cascade import LabelPEnet

SAME = 0.5  # masks of a larger IoU are the same object
AGREEMENT = 0.4  # least mean IoU with the cascade's labels (`beyond`)

Comparison = tuple[int, int, list[tuple[float, float]]]
"""A photograph's number of instances, of the anchor's, and for each class of the anchor (area ratio, IoU)."""


@torch.no_grad()
def label(
    teacher: LabelPEnet,
    image: np.ndarray,
    tags: tuple[int, ...],
    proposals: Tensor,
    anchors: Sequence[Instances],
    enter: float,
    doubt: float,
) -> list[Instances]:
    """The validated labels of modules 1 to 4 for a photograph, in its pixels; doubtful instances have weight 0.

    Args:
        teacher: in evaluation mode.
        image: (H, W, 3) uint8 RGB; tags: its classes; proposals: (R, 4).
        anchors: what the cascade's modules inferred.
        enter, doubt: see `validate`.
    """
    batch = teacher.batch([image], [tags], [proposals])
    labels = []
    for number, anchor in enumerate(anchors, 1):
        ((found, _),) = teacher.infer(number, batch)
        together = Instances.cat([anchor, found])
        if not teacher.module(number).settings.label.vote:  # else the weights are the vote's already
            (together,) = teacher.vote(number, [together], batch)
        labels.append(validate(anchor, found, together.weights, enter, doubt))
    return labels


def validate(anchor: Instances, found: Instances, belief: Tensor, enter: float, doubt: float) -> Instances:
    """What is learnt from a photograph, and, of weight 0, what is ignored.

    - An instance of the anchor is replaced by the teacher's of its class that overlaps it by more than `SAME` (the IoU
      of their masks; best first, each once) if that one is believed more, and stays if it is not.
    - One that the teacher does not confirm stays if it is believed by at least ``doubt``, else it is ignored.
    - A further instance of the teacher is learnt if it is believed by at least ``enter`` and is no part of a learnt one
      of its class, nor the other way round (by more than `SAME` of the smaller one's area); else it is ignored.

    Args:
        anchor, found: the cascade's instances and the teacher's, with masks, on the CPU.
        belief: (A + T,) in [0, 1], of the anchor's and the teacher's.
        enter, doubt: in [0, 1].

    Returns:
        Instances with the weights that their module gave them, those of the anchor first; then the ignored ones.
    """
    count, both = len(anchor), Instances.cat([anchor, found])
    shared = shared_pixels(both)
    area = shared.diagonal()
    partner = pairs((shared / (area[:, None] + area - shared).clamp(min=1))[:count, count:])
    learnt: list[int] = []
    ignored: list[int] = []
    for index, other in enumerate(partner.tolist()):
        if other >= 0:
            learnt.append(count + other if belief[count + other] > belief[index] else index)
        else:
            (learnt if belief[index] >= doubt else ignored).append(index)
    further = [count + index for index in range(len(found)) if index not in partner.tolist()]
    for index in sorted(further, key=lambda one: -float(belief[one])):
        nested = bool((shared[index, learnt] > SAME * torch.minimum(area[index], area[learnt])).any())
        (learnt if belief[index] >= enter and not nested else ignored).append(index)
    weights = both.weights.clone()
    weights[ignored] = 0
    return both.weighted(weights)[learnt + ignored]


def shared_pixels(one: Instances) -> Tensor:
    """(N, N) the number of pixels that two masks have in common, 0 for two of different classes."""
    shared, masks, labels = torch.zeros(len(one), len(one)), one.compact_masks, one.labels.tolist()
    if masks is None:
        raise ValueError("instances without masks cannot be compared")
    for first, second in itertools.combinations_with_replacement(range(len(one)), 2):
        if labels[first] == labels[second]:
            shared[first, second] = shared[second, first] = masks.overlap(first, second)
    return shared


def pairs(iou: Tensor) -> Tensor:
    """(A,) for each row of (A, T) the column that it goes with, -1 for none: above `SAME`, best first, each once."""
    left, partner = iou.clone(), torch.full((len(iou),), -1)
    while left.numel() and float(left.max()) > SAME:
        row, column = divmod(int(left.argmax()), left.shape[1])
        partner[row] = column
        left[row], left[:, column] = 0, 0
    return partner


def recolour(image: np.ndarray, strength: float, generator: torch.Generator) -> np.ndarray:
    """The photograph (H, W, 3) uint8 with brightness, contrast and saturation changed, each by up to ``strength``."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    factors = (1 + strength * (2 * torch.rand(3, generator=generator) - 1)).tolist()
    pixels = functional.adjust_brightness(pixels, factors[0])
    pixels = functional.adjust_contrast(pixels, factors[1])
    return functional.adjust_saturation(pixels, factors[2]).permute(1, 2, 0).numpy()


# -- whether the labels drift ----------------------------------------------------------------------------------------


def compare(found: Instances, anchor: Instances) -> Comparison:
    """A photograph's labels against the anchor: of each class of the anchor the instances of most weight."""
    rows = []
    for own in anchor.labels.unique().tolist():
        one, other = _best(anchor, own), _best(found, own)
        shared = shared_pixels(Instances.cat([one, other]))
        before, now = float(shared[0, 0]), float(shared[-1, -1]) if len(other) else 0.0
        same = float(shared[0, 1]) if len(other) else 0.0
        rows.append((now / max(before, 1.0), same / max(before + now - same, 1.0)))
    return len(found), len(anchor), rows


def _best(one: Instances, own: int) -> Instances:
    of_class = torch.where(one.labels == own)[0]
    return one[of_class[one.weights[of_class].argsort(descending=True, stable=True)[:1]]]


def drift(comparisons: Iterable[Comparison]) -> dict[str, float]:
    """How far labels have left the anchor: ``area`` (median ratio), ``number`` (ratio), ``agreement`` (mean IoU)."""
    found, anchors, rows = zip(*comparisons, strict=True)
    pooled = np.array([row for photograph in rows for row in photograph]).reshape(-1, 2)
    if not len(pooled):
        return {"area": 1.0, "number": 1.0, "agreement": 1.0}
    return {
        "area": float(np.median(pooled[:, 0])),
        "number": sum(found) / max(sum(anchors), 1),
        "agreement": float(pooled[:, 1].mean()),
    }


def beyond(number: int, figures: dict[str, float], factor: float) -> str | None:
    """What is wrong with the drift of module ``number``; None if area and number are within the factor and more than
    `AGREEMENT` agrees."""
    name = f"module {number} ({MODULES[number - 1]})"
    for key, what in (("area", "have {:.2f} times the area"), ("number", "are {:.2f} times as many")):
        if not 1 / factor <= figures[key] <= factor:
            return f"the labels of {name} {what.format(figures[key])} that the cascade's had"
    if figures["agreement"] < AGREEMENT:
        return f"the labels of {name} overlap the cascade's by {figures['agreement']:.2f} only"
    return None
