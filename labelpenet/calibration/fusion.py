"""Labels of several models put together: what they agree on is surer than what one of them believes alone.

The cascade's last module and a student that it taught make different errors: the cascade draws one outline around
animals that stand together, the student tells them apart but ranks parts above wholes. Not in the paper.

Shape letters: ``N, M`` instances, ``P`` models.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from labelpenet.calibration.nms import nms_groups
from labelpenet.instances import Instances

AGREE = 0.5
"""IoU from which another model's instance of the class supports one."""

SAME = 0.45
"""IoU over which two supported instances of a class are one."""

OUTLINE = 0.6
"""IoU from which an instance gets the outline that an earlier model has drawn for it."""


def fuse(opinions: Sequence[Instances], tags: Collection[int]) -> Instances:
    """The instances of a photograph from P models' opinions of it, classes of its tags alone.

    An instance's weight is the mean of its own and, for every other model, of the weight of that model's best
    supporting instance of its class times their IoU; then class-wise NMS. The outline of a kept instance, box and mask,
    is that of the first model that has one for it.

    Args:
        opinions: N instances of each model, on the CPU, weights in [0, 1]; the better a model's outlines the earlier.
        tags: indices of the photograph's classes.

    Returns:
        M instances, best first, with masks if all that are chosen have one.

    Raises:
        ValueError: no opinion, or opinions of photographs of different sizes.
    """
    if not opinions or len({one.image_size for one in opinions}) > 1:
        raise ValueError("opinions must be of one photograph, and at least one")
    wanted = torch.tensor(sorted(tags), dtype=torch.long)
    opinions = [one[torch.isin(one.labels, wanted)] for one in opinions]
    if not any(len(one) for one in opinions):
        return opinions[0]
    boxes, labels = torch.cat([one.boxes for one in opinions]), torch.cat([one.labels for one in opinions])
    model = torch.cat([torch.full((len(one),), index) for index, one in enumerate(opinions)])
    overlap = box_iou(boxes, boxes) * (labels[:, None] == labels)
    weights = supported(torch.cat([one.weights for one in opinions]), overlap, model, len(opinions))
    kept, _ = nms_groups(boxes, weights, labels, SAME)
    drawn: dict[int, float] = {}  # whose outlines, and how sure: of two with the same the surer one
    for index in kept.tolist():
        drawn.setdefault(outline(index, overlap, model), float(weights[index]))
    return _rows(opinions, list(drawn)).weighted(torch.tensor(list(drawn.values())))


def _rows(parts: Sequence[Instances], rows: list[int]) -> Instances:
    """Those rows of the parts' rows one after the other; only their masks are decoded."""
    starts = torch.tensor([0, *(len(one) for one in parts)]).cumsum(0)
    wanted = torch.tensor(rows, dtype=torch.long)
    owner = torch.searchsorted(starts, wanted, right=True) - 1
    order = owner.argsort(stable=True)
    picked = [one[wanted[owner == index] - starts[index]] for index, one in enumerate(parts)]
    return Instances.cat([one for one in picked if len(one)] or picked[:1])[order.argsort()]


def supported(weights: Tensor, overlap: Tensor, model: Tensor, models: int) -> Tensor:
    """(N,) each instance's mean weight over the ``models``; overlap (N, N) is 0 between classes, model (N,)."""
    support = torch.where(overlap >= AGREE, overlap * weights, 0.0)
    others = [support.masked_fill(model != other, 0.0).amax(1) for other in range(models)]
    by_model = torch.stack(others, 1)
    by_model[torch.arange(len(weights)), model] = weights
    return by_model.mean(1)


def outline(index: int, overlap: Tensor, model: Tensor) -> int:
    """The instance whose outline a kept one gets: its closest one of the first model that has one so close."""
    close = torch.where((overlap[index] >= OUTLINE) & (model < model[index]))[0]
    if not len(close):
        return index
    first = close[model[close] == model[close].min()]
    return int(first[overlap[index, first].argmax()])
