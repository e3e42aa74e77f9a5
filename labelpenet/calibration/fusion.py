"""Labels of several models put together: what they agree on is surer than what one of them believes alone.

The cascade's last module and a student that it taught make different errors: the cascade draws one outline around
animals that stand together, the student tells them apart but ranks parts above wholes. Not in the paper.

Shape letters: ``N, M`` instances, ``P`` models.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

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
        M instances, best first, weights in [0, 1]; with masks if any of these has an outline, empty for a box alone.

    Raises:
        ValueError: no opinion, or instances in photographs of different sizes.
    """
    if not opinions:
        raise ValueError("there must be at least one opinion")
    wanted = torch.tensor(sorted(tags), dtype=torch.long)
    seen = [(index, one[torch.isin(one.labels, wanted)]) for index, one in enumerate(opinions) if len(one)]
    seen = [(index, one) for index, one in seen if len(one)]
    if not seen:
        return Instances.empty(opinions[0].image_size, with_masks=True)
    if any(one.compact_masks is not None for _, one in seen):  # one model's boxes must not cost the others' outlines
        seen = [(index, _with_masks(one)) for index, one in seen]
    every = Instances.cat([one for _, one in seen])
    model = torch.cat([torch.full((len(one),), index) for index, one in seen])
    overlap = box_iou(every.boxes, every.boxes) * (every.labels[:, None] == every.labels)
    weights = supported(every.weights, overlap, model, len(opinions))
    kept, _ = nms_groups(every.boxes, weights, every.labels, SAME)
    known = every.weights > 0
    if every.masks is not None:
        known &= every.masks.flatten(1).any(1)
    drawn: dict[int, float] = {}  # whose outlines, and how sure: of two with the same the surer one
    for index in kept.tolist():
        drawn.setdefault(outline(index, overlap, model, known), float(weights[index]))
    found = every[torch.tensor(list(drawn))].weighted(torch.tensor(list(drawn.values())))
    return found if found.masks is None or bool(found.masks.any()) else replace(found, masks=None)


def _with_masks(one: Instances) -> Instances:
    """The instances of a model that found boxes alone with empty masks."""
    if one.compact_masks is not None:
        return one
    return replace(one, masks=torch.zeros(len(one), *one.image_size, dtype=torch.bool))


def supported(weights: Tensor, overlap: Tensor, model: Tensor, models: int) -> Tensor:
    """(N,) each instance's mean weight over the ``models``; overlap (N, N) is 0 between classes, model (N,)."""
    support = torch.where(overlap >= AGREE, overlap * weights, 0.0)
    others = [support.masked_fill(model != other, 0.0).amax(1) for other in range(models)]
    by_model = torch.stack(others, 1)
    by_model[torch.arange(len(weights)), model] = weights
    return by_model.mean(1)


def outline(index: int, overlap: Tensor, model: Tensor, known: Tensor) -> int:
    """The instance whose outline a kept one gets: its closest one of the first model that has one so close.

    ``known`` (N,) says which instances have an outline: beside masks an empty one is that of a box alone, and that of
    an instance of weight 0 fills its box.
    """
    before = model < model[index] if known[index] else model != model[index]
    close = torch.where((overlap[index] >= OUTLINE) & before & known)[0]
    if not len(close):
        return index
    first = close[model[close] == model[close].min()]
    return int(first[overlap[index, first].argmax()])
