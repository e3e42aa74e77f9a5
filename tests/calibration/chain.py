"""The chain of calibration on given proposals, scores and attention maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from labelpenet.calibration import Candidates, Chosen, Trace, calibrate, choose_instances, proposal_candidates
from labelpenet.config import AttentionCalibration
from labelpenet.instances import Instances

Attend = Callable[[Tensor, Tensor], Tensor]
"""(n,) indices of proposals and (n,) their class indices to (n, a, a) attention maps."""


def choose(
    boxes: Tensor, scores: Tensor, tags: tuple[int, ...] | None, settings: AttentionCalibration
) -> tuple[Candidates, Chosen]:
    """The proposals (R, 4) as candidates, and which are chosen; without tags each is one for its best class alone."""
    if tags is None:
        best = scores.argmax(1) if scores.numel() else torch.zeros(len(boxes), dtype=torch.long)
        rows = torch.arange(len(boxes) if scores.shape[1] else 0)
        found = Candidates(boxes[rows], scores[rows, best[rows]], best[rows], boxes[rows], rows)
    else:
        found = proposal_candidates(boxes, scores, tags)
    return found, choose_instances(found, settings, tags is not None)


def run_chain(
    image: np.ndarray,
    boxes: Tensor,
    scores: Tensor,
    tags: tuple[int, ...] | None,
    attend: Attend,
    settings: AttentionCalibration,
    regions: Tensor | None = None,
) -> tuple[Instances, Trace]:
    """From proposals (R, 4) with scores (R, C) to instances, as module 1 goes."""
    found, chosen = choose(boxes, scores, tags, settings)
    if regions is not None:
        found = replace(found, regions=regions[found.rois])
    maps = attend(found.rois[chosen.mapped], found.labels[chosen.mapped])
    return calibrate(image, found, chosen, maps, settings, (boxes, scores))
