"""One image as the measures see it: its detections and its true objects as NumPy arrays and run lengths.

Shape letters: ``D`` detections, ``T`` true objects.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle

from labelpenet.data.dataset import Truth
from labelpenet.errors import InputError
from labelpenet.instances import Instances

RunLengths = list[dict[str, Any]]


@dataclass(frozen=True)
class Record:
    """The detections and the true objects of one image.

    Attributes:
        boxes, truth_boxes: (D, 4) and (T, 4) float64, ``x1, y1, x2, y2`` in pixels, half-open.
        labels, truth_labels: (D,) and (T,) int64 class indices.
        scores: (D,) float64.
        masks, truth_masks: D and T run lengths as `run_lengths` makes them, or None where that side holds boxes only.
        difficult, crowd: (T,) bool, as in `Truth`.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: RunLengths | None
    truth_boxes: np.ndarray
    truth_labels: np.ndarray
    truth_masks: RunLengths | None
    difficult: np.ndarray
    crowd: np.ndarray


def record(prediction: Instances, truth: Truth, every_mask: bool = True) -> Record:
    """Puts a prediction beside the truth of the same image; masks are encoded only where both sides have them.

    Without ``every_mask``, masks whose class does not occur in the image are spared the encoding, most of the time of
    an evaluation: they overlap no object of their class, and get an empty run length.
    """
    instances = truth.instances
    masks = prediction.masks if instances.masks is not None else None
    if masks is not None and not every_mask:
        encoded: RunLengths = [{"size": [0, 0], "counts": b""}] * len(prediction)
        wanted = torch.isin(prediction.labels, instances.labels.to(prediction.labels.device)).nonzero().flatten()
        for index, one in zip(wanted.tolist(), run_lengths(masks[wanted]), strict=True):
            encoded[index] = one
    else:
        encoded = run_lengths(masks) if masks is not None else []
    return Record(
        boxes=_array(prediction.boxes, np.float64),
        labels=_array(prediction.labels, np.int64),
        scores=_array(prediction.weights, np.float64),
        masks=encoded if masks is not None else None,
        truth_boxes=_array(instances.boxes, np.float64),
        truth_labels=_array(instances.labels, np.int64),
        truth_masks=run_lengths(instances.masks) if instances.masks is not None else None,
        difficult=_array(truth.difficult, np.bool_),
        crowd=_array(truth.crowd, np.bool_),
    )


def pairs(
    predictions: Mapping[str, Instances], truths: Mapping[str, Truth] | Iterable[tuple[str, Truth]], classes: int
) -> Iterator[tuple[Instances, Truth]]:
    """Each image's prediction (empty where there is none) beside its truth, in the order of the truths, one at a time.

    Raises:
        InputError: no image has a prediction though there are predictions; a prediction of another size than its
            image; a class index outside [0, classes); a score or box that is not finite.
    """
    annotated = matched = 0
    for image, truth in truths.items() if isinstance(truths, Mapping) else truths:
        prediction = predictions.get(image)
        annotated, matched = annotated + 1, matched + (prediction is not None)
        if prediction is None:
            prediction = Instances.empty(truth.instances.image_size)
        _check(image, prediction, truth, classes)
        yield prediction, truth
    if len(predictions) and not matched:
        raise InputError(
            f"none of the {len(predictions)} predicted images (first: {next(iter(predictions))}) is among the "
            f"{annotated} annotated ones; check the data set and the split"
        )


def run_lengths(masks: torch.Tensor) -> RunLengths:
    """(N, H, W) bool masks as N run lengths *of the transposed masks*.

    An area or an overlap does not change when both masks are transposed, and COCO's column-wise run lengths of the
    transposed mask can be read off a row-major array without copying it.
    """
    array = np.ascontiguousarray(masks.detach().cpu().numpy()).view(np.uint8)
    return rle.encode(array.transpose(2, 1, 0)) if len(array) else []


def _check(image: str, prediction: Instances, truth: Truth, classes: int) -> None:
    size, true_size = prediction.image_size, truth.instances.image_size
    if tuple(size) != tuple(true_size):
        raise InputError(
            f"{image}: the prediction is for {size[1]} x {size[0]} pixels, but the image has {true_size[1]} x "
            f"{true_size[0]}; predict on the images that you evaluate on"
        )
    if not len(prediction):
        return
    if int(prediction.labels.min()) < 0 or int(prediction.labels.max()) >= classes:
        raise InputError(f"{image}: a predicted class index lies outside [0, {classes})")
    if not bool(torch.isfinite(prediction.weights).all() and torch.isfinite(prediction.boxes).all()):
        raise InputError(f"{image}: a predicted score or box is NaN or infinite; remove it")


def _array(tensor: torch.Tensor, dtype: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(dtype)
