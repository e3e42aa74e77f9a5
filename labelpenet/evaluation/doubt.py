"""How much the modules of a cascade disagree about a photograph: where they do, a person's look is worth most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from labelpenet.evaluation.detection import box_iou
from labelpenet.evaluation.masks import mask_iou
from labelpenet.instances import Instances, encode_masks


def doubt(answers: Sequence[Instances]) -> float:
    """The disagreement of several answers for one photograph: the mean `disagreement` of each with the last.

    Args:
        answers: what each module found, the one to be trusted most last.

    Returns:
        In [0, 1]; 0 for one answer.
    """
    return float(np.mean([disagreement(one, answers[-1]) for one in answers[:-1]])) if len(answers) > 1 else 0.0


def disagreement(one: Instances, other: Instances) -> float:
    """1 - 2 S / (N + M), where S is the sum of IoU over the best pairs of one class, taken greedily.

    Of masks where both have them, else of boxes. In [0, 1]: 0 where both say the same, also where both are empty; 1
    where nothing that one found overlaps what the other found.
    """
    total = len(one) + len(other)
    if not total:
        return 0.0
    if one.masks is not None and other.masks is not None:
        iou = mask_iou(encode_masks(one.masks), encode_masks(other.masks))
    else:
        iou = box_iou(one.boxes.cpu().numpy(), other.boxes.cpu().numpy())
    iou = np.where(one.labels.cpu().numpy()[:, None] == other.labels.cpu().numpy()[None], iou, 0.0)
    agreed = 0.0
    while iou.size and (best := iou.max()) > 0:
        row, column = np.unravel_index(iou.argmax(), iou.shape)
        agreed += float(best)
        iou[row], iou[:, column] = 0.0, 0.0
    return 1 - 2 * agreed / total
