"""`supervision.Detections` and back; needs ``pip install supervision``, which nothing else here does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from labelpenet.errors import InputError, told
from labelpenet.instances import Instances


def to_supervision(instances: Instances, classes: Sequence[str]) -> Any:
    """The instances of one image as `supervision.Detections` (else `InputError`), names in ``data["class_name"]``."""
    with told("supervision is not installed; pip install supervision", ImportError):
        from supervision import Detections  # type: ignore[import-not-found, unused-ignore]
    labels = instances.labels.cpu().numpy()
    return Detections(
        xyxy=instances.boxes.cpu().numpy(),
        mask=None if instances.masks is None else instances.masks.cpu().numpy(),
        confidence=instances.weights.cpu().numpy(),
        class_id=labels,
        data={"class_name": np.array([classes[label] for label in labels.tolist()], dtype=str)},
    )


def from_supervision(detections: Any, image_size: tuple[int, int]) -> Instances:
    """`supervision.Detections` of one image of size (H, W) as instances; without confidence they weigh 1. `InputError`:
    there are detections, but no ``class_id``, which counts our classes from 0.
    """
    count = len(detections.xyxy)
    if detections.class_id is None and count:
        raise InputError("the detections have no class_id; set it to the index of each one's class")
    labels = np.zeros(0) if detections.class_id is None else detections.class_id
    weights = np.ones(count) if detections.confidence is None else detections.confidence
    masks = detections.mask
    return Instances(
        torch.as_tensor(np.asarray(detections.xyxy, dtype=np.float32)).reshape(count, 4),
        torch.as_tensor(np.asarray(labels, dtype=np.int64)),
        torch.as_tensor(np.asarray(weights, dtype=np.float32)),
        image_size,
        None if masks is None else torch.as_tensor(np.asarray(masks, dtype=bool)).reshape(count, *image_size),
    )
