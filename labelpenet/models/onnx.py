"""A student as an ONNX file, which runs without torch (`docs/onnx.md`).

torchvision's detectors do not export as they are (pytorch/vision issue 9462): their resizing, NMS and pasting of masks
have shapes that depend on the data at every turn. `Fixed` computes the same for photographs of one size, in shapes that
do so only where much work is saved: scores of what is suppressed or too small become -1, the best so many are taken,
and those above a threshold are chosen of them, first of the RPN's boxes, then of the detections.

Shape letters: ``H, W`` the input, ``R`` RoIs, ``C`` foreground classes, ``K`` anchors or candidates, ``N`` detections.
"""

import contextlib
import io
import json
import logging
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms

from labelpenet.calibration.calibrate import enclosing_boxes
from labelpenet.calibration.sharpen import rescore, resized, sharpen
from labelpenet.data.files import write_bytes
from labelpenet.errors import InputError
from labelpenet.models.student import Student
from labelpenet.models.tags import weigh

OUTPUTS = ["boxes", "labels", "scores", "masks"]
MULTIPLE = 32  # of which the input's sides are multiples: the stride of the coarsest map of the backbone


class Fixed(nn.Module):
    """A student's answer to photographs of H x W pixels, in operations that ONNX has; it shares the student's
    parameters.
    """

    anchors: Tensor

    def __init__(self, student: Student, size: tuple[int, int]):
        super().__init__()
        self.network, self.masks, self.size = student.network, student.recipe.masks, size
        self.stride, self.power = student.levels.strides[0], student.recipe.network.tag_power
        self.tags = student.tags if self.power else None
        image = torch.zeros(1, 3, *size)
        with torch.no_grad():
            maps = list(self.network.backbone(image).values())
            heights = [objectness.shape[1:] for objectness in self.network.rpn.head(maps)[0]]
        self.counts = [shape[0] * shape[1] * shape[2] for shape in heights]
        anchors = self.network.rpn.anchor_generator(ImageList(image, [size]), maps)[0]
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Instances of the image (3, H, W), RGB in [0, 1], best first.

        Returns:
            Boxes (N, 4) in pixels of the image, labels (N,) from 0, scores (N,), masks (N, H, W) bool.
        """
        transform, heads = self.network.transform, self.network.roi_heads
        mean, std = torch.tensor(transform.image_mean), torch.tensor(transform.image_std)
        backbone: Any = self.network.backbone
        body = backbone.body(((image - mean[:, None, None]) / std[:, None, None])[None])
        maps = backbone.fpn(body)
        rois = self._propose(maps)
        pooled = heads.box_roi_pool(maps, [rois], [self.size])
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        boxes, labels, scores = self._detect(logits, deltas, rois)
        features = heads.mask_head(heads.mask_roi_pool(maps, [boxes], [self.size]))
        every = heads.mask_predictor(features).sigmoid()
        index = (labels + 1)[:, None, None, None].expand(-1, 1, every.shape[2], every.shape[3])
        finest = next(iter(maps.values()))[0]
        drawn = sharpen(image, every.gather(1, index)[:, 0], boxes, self.masks, finest, self.stride)
        if self.tags is not None:
            scores = weigh(scores, labels, self.tags(list(body.values())[-1][0]), self.power)
        scores, order = rescore(scores, labels, drawn, self.masks)
        masks = resized(drawn[order], self.size) > 0.5
        return enclosing_boxes(boxes[order], tight_boxes(masks)), labels[order], scores, masks

    def _propose(self, maps: OrderedDict[str, Tensor]) -> Tensor:
        """The RPN's boxes (R, 4), best first."""
        rpn = self.network.rpn
        objectness, deltas = rpn.head(list(maps.values()))
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        boxes = rpn.box_coder.decode(deltas, [self.anchors])[:, 0]
        scores, chosen, levels = [], [], []
        first = 0
        for level, (count, own) in enumerate(zip(self.counts, objectness[:, 0].split(self.counts), strict=True)):
            best, index = own.topk(min(rpn.pre_nms_top_n(), count))
            scores.append(best.sigmoid())
            chosen.append(index + first)
            levels.append(torch.full_like(best, level))
            first += count
        boxes = clip_boxes_to_image(boxes[torch.cat(chosen)], self.size)
        score = survivors(boxes, torch.cat(scores), torch.cat(levels), rpn.nms_thresh, rpn.min_size, max(self.size))
        best, index = score.topk(min(rpn.post_nms_top_n(), len(score)))
        return boxes[index[torch.where(best >= rpn.score_thresh)[0]]]

    def _detect(self, logits: Tensor, deltas: Tensor, rois: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, 4), labels (N,) from 0 and scores (N,)."""
        heads = self.network.roi_heads
        # decode() asks how many RoIs there are, which no graph can answer
        boxes = heads.box_coder.decode_single(deltas, rois).unflatten(1, (-1, 4))[:, 1:]
        boxes = clip_boxes_to_image(boxes.reshape(-1, 4), self.size)
        own = logits.softmax(1)[:, 1:]
        labels = torch.arange(own.shape[1]).expand(own.shape).reshape(-1)
        scores = survivors(boxes, own.reshape(-1), labels, heads.nms_thresh, 1e-2, max(self.size))
        best, index = scores.topk(min(heads.detections_per_img, len(scores)))
        index = index[torch.where(best > heads.score_thresh)[0]]
        return boxes[index], labels[index], scores[index]


def tight_boxes(masks: Tensor) -> Tensor:
    """The boxes (N, 4) of bool masks (N, H, W) in pixels, as `instances.masks_to_boxes` gives them, in operations that
    ONNX has; of an empty mask inside out, so that no box grows around it.
    """
    corners = []
    for line in (masks.any(1), masks.any(2)):  # of columns, and of rows
        length = line.shape[1]
        place = torch.arange(1, length + 1, device=masks.device)
        corners.append((length - (line * place.flip(0)).amax(1), (line * place).amax(1)))
    (left, right), (top, bottom) = corners
    return torch.stack([left, top, right, bottom], 1).float()


def survivors(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float, side: float, extent: int) -> Tensor:
    """Scores (K,) after NMS within each group: -1 for what is suppressed or has a side below ``side``.

    Args:
        boxes: (K, 4) in [0, extent]; scores: (K,); groups: (K,) whole numbers.
    """
    apart = boxes + (groups.to(boxes) * (extent + 1))[:, None]
    kept = torch.zeros_like(scores).scatter(0, nms(apart, scores, iou), 1.0)
    large = ((boxes[:, 2:] - boxes[:, :2]) >= side).all(1)
    return torch.where((kept > 0) & large, scores, -1.0)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(H, W) from a text such as 480x640, else an `InputError`; None from None."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,4})[xX]([0-9]{1,4})", text)
    if not found:
        raise InputError(f"--size {text}: expected height x width in pixels, at most 9999, such as 480x640")
    return int(found[1]), int(found[2])


def export_onnx(student: Student, path: Path, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Writes a student as an ONNX file, whole or not at all; the classes are in its metadata under ``classes``.

    Args:
        size: (H, W) of the photographs that the file takes, multiples of 32. None: the student's shorter side, 4:3.

    Returns:
        The size.

    Raises:
        InputError: a size that does not fit, or the packages of the extra ``onnx`` are missing.
    """
    if size is None:
        side = student.recipe.images.test_side
        assert side is not None  # of no student
        size = (side // MULTIPLE * MULTIPLE, round(side * 4 / 3 / MULTIPLE) * MULTIPLE)
    if min(size) < 2 * MULTIPLE or any(side % MULTIPLE for side in size):
        raise InputError(f"--size {size[0]}x{size[1]}: height and width must be multiples of {MULTIPLE}, 64 at least")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'labelpenet[onnx]'") from error
    fixed = Fixed(student.to("cpu").eval(), size).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # torch.export prints the whole graph of each way that fails before it finds one that does not.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            fixed,
            (torch.rand(3, *size),),
            dynamo=True,
            input_names=["image"],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    model = program.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = "classes", json.dumps(student.classes)
    write_bytes(path, model.SerializeToString())
    return size
