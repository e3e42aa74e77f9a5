"""The student: torchvision's Mask R-CNN with a feature pyramid, which the cascade's labels teach and which leaves home.

The network is torchvision's own, so that its weights load in torchvision alone (`docs/student.md`). Ours is what noisy
labels need while it learns: doubtful instances are neither object nor background, confidences weigh the losses, and
RoIs that contradict the network too much are left out.

Two forms of the same network: *plain*, with batch norms, is what is saved; *folded* is what trains and predicts here: a
batch norm whose statistics stay as they are is part of the convolution before it, which saves its time.

Shape letters: ``R`` RoIs, ``C`` foreground classes, ``N`` instances, ``M`` doubtful ones, ``h, w`` the network's input.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.ops.poolers import initLevelMapper

from labelpenet import config
from labelpenet.calibration.calibrate import to_instances
from labelpenet.calibration.maps import full_precision
from labelpenet.calibration.sharpen import rescore, sharpen
from labelpenet.config import MaskCalibration, StudentNetwork, StudentRecipe
from labelpenet.data import run_folder
from labelpenet.data.files import read_tensors
from labelpenet.data.run_folder import PIXELS, TAGS
from labelpenet.data.transforms import divisible, resize_image, scaled_size, shrink
from labelpenet.errors import DamagedError, InputError, reason
from labelpenet.instances import Instances
from labelpenet.models.build import BACKBONES, build_backbone, whole_network
from labelpenet.models.cascade import LabelPEnet, Network, Tags, read_run
from labelpenet.models.detection import ANCHOR_RATIOS, DoubtingRPN, covered, rcnn_loss
from labelpenet.models.layers import evaluating, initialise
from labelpenet.models.pixels import PixelClassifier, stack
from labelpenet.models.segmentation import crop_masks, mask_loss
from labelpenet.models.tags import TagClassifier, weigh
from labelpenet.models.weights import check_finite, check_types

KIND = "student"  # what ``run.json`` says of such a folder, and the name of its weights
STRIDES = (8, 16, 32)  # of the pyramid's maps; the last one, subsampled, is the fourth
_HEAD = 16  # stride of the map that the pretrained RoI head works on
_CELLS = 2  # per side of the average at its end, so that a box regression can tell left from right
_WIDEST = 256  # channels of that map: a wider pyramid costs more than the head is worth
_BOXES = MaskCalibration(box="both")  # the detector's, as far as its masks reach beyond them
_ANCHOR = 6  # an anchor's side over its map's stride: 48, 96, 192 and 384 pixels


@dataclass
class Lesson:
    """What one training image teaches, in pixels of the network's input.

    Attributes:
        pixels: (3, h, w) RGB in [0, 1].
        target: the N instances with their masks; a weight scales the losses of what is matched to the instance.
        doubtful: (M, 4) boxes that teach nothing: neither object nor background.
    """

    pixels: Tensor
    target: Instances
    doubtful: Tensor

    def to(self, device: torch.device) -> Lesson:
        """The same on another device."""
        return Lesson(self.pixels.to(device), self.target.to(device), self.doubtful.to(device))


@dataclass(frozen=True)
class Levels:
    """How a body becomes a pyramid.

    Attributes:
        layers: for each child of the body whose map enters the pyramid the map's name there.
        channels: of these maps.
        strides: of these maps, and of the last one subsampled.
        every: of each child the stride of its map.
        late: the children of stride 32 behind a map of stride 16, which can be a RoI head.
    """

    layers: dict[str, str]
    channels: list[int]
    strides: list[int]
    every: dict[str, int]
    late: list[str]


class Student(Network):
    """torchvision's Mask R-CNN in its folded form, and its losses for noisy labels.

    Args:
        body: the backbone's stages in order, as children, plain and with their weights (`build_body`).
        classes: names of the C foreground classes.
        recipe: every choice.
        backbone: the name that ``body`` was built by.
        normalisation: ``mean`` and ``std`` of RGB in [0, 1].
        state: weights of the plain network, and of what is `fitted`; first ones if None.
    """

    recipe: StudentRecipe

    def __init__(
        self,
        body: nn.Module,
        classes: Sequence[str],
        recipe: StudentRecipe,
        backbone: str,
        normalisation: Mapping[str, Sequence[float]],
        state: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.classes, self.recipe, self.backbone_name = tuple(classes), recipe, backbone
        self.normalisation = {"mean": list(normalisation["mean"]), "std": list(normalisation["std"])}
        self.levels = measure_levels(body)
        description = self.description()
        self.network = build_network(body, description)
        set_first_weights(self.network, description["head"])
        deep = [stride >= _HEAD for stride in self.levels.strides[:-1]]
        self.deep = deep.index(True) if any(deep) else 0  # the first map that `pixels` reads, and all behind it
        names, channels = fitted(recipe), self.levels.channels
        self.tags = TagClassifier(channels[-1], len(self.classes)) if TAGS in names else None
        self.pixels = PixelClassifier(channels[self.deep :], len(self.classes)) if PIXELS in names else None
        if state is not None:
            plain = dict(state)
            for name in names:
                part = self.get_submodule(name)
                _load(part, {key: plain.pop(f"{name}.{key}") for key in part.state_dict()})
            _load(self.network, plain)
        self.network.rpn = DoubtingRPN.like(self.network.rpn)
        set_scales(self.network, self.levels.strides)
        for layers in (self.network.rpn.head, self.network.roi_heads.box_predictor):
            layers.register_forward_hook(_in_full_precision)
        body = cast(nn.ModuleDict, self.network.backbone.body).eval()
        self.folded = fold_norms(body, 3, "backbone.body.")
        if description["head"]:
            self.folded += fold_norms(
                self.network.roi_heads.box_head.eval(), description["width"], "roi_heads.box_head."
            )
        known = backbone.startswith("timm/") or BACKBONES[backbone][1].imagenet
        frozen = [name for name in body if known and self.levels.every[name] <= recipe.network.freeze]
        for module in [*(body[name] for name in frozen), *_norms(self.network)]:
            module.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.eval()

    def _stages(self) -> dict[str, Any] | None:
        """The RoI head of pretrained stages: the pyramid's level that it reads, its channels, and what it is made of;
        None where the backbone has no such stages, or too many channels before them.
        """
        if not self.levels.late:
            return None
        level = self.levels.strides.index(_HEAD)
        channels, last = self.levels.channels[level : level + 2]
        one = {"level": str(level), "channels": channels, "stages": self.levels.late}
        one |= {"pool": self.recipe.network.pool, "cells": _CELLS, "features": last * _CELLS**2}
        return one if channels <= _WIDEST else None

    def description(self) -> dict[str, Any]:
        """What torchvision needs to build the plain network (`build_network`), as plain values for ``run.json``."""
        network, images = self.recipe.network, self.recipe.images
        head = self._stages() if network.head == "stages" else None
        if images.test_side is None:
            raise InputError("images.test_side: a student answers at one size; give the shorter side in pixels, as 480")
        width = head["channels"] if head else network.width
        idle = "width" if head else "pool"
        if getattr(network, idle) != getattr(StudentNetwork, idle):
            kind = f"stages has a pyramid of {width} channels, as the backbone's map" if head else "layers pools 7 x 7"
            raise InputError(f"network.{idle} does nothing here: a RoI head of {kind}; leave it out")
        return {
            "layers": self.levels.layers,
            "channels": self.levels.channels,
            "width": width,
            "head": head,
            "anchors": [[_ANCHOR * stride] for stride in self.levels.strides],
            "mask_layers": [width] * network.mask_depth,
            "num_classes": len(self.classes) + 1,
            "options": {
                "min_size": images.test_side,
                "max_size": images.longest,
                "image_mean": self.normalisation["mean"],
                "image_std": self.normalisation["std"],
                "rpn_pre_nms_top_n_train": 1000,
                "rpn_post_nms_top_n_train": 500,
                "rpn_pre_nms_top_n_test": 500,
                "rpn_post_nms_top_n_test": network.proposals,
                "rpn_score_thresh": network.objectness,
                "box_batch_size_per_image": network.rois,
                "box_detections_per_img": network.detections,
            },
        }

    def train(self, mode: bool = True) -> Student:
        """As usual, but the batch norms that could not be folded keep their statistics."""
        super().train(mode)
        for norm in _norms(self):
            norm.eval()
        return self

    def plain_state(self) -> dict[str, Tensor]:
        """The weights as torchvision's plain network takes them, on the CPU."""
        state = {key: value.detach().cpu().contiguous() for key, value in self.network.state_dict().items()}
        for convolution, norm, eps in self.folded:
            bias = state.pop(f"{convolution}.bias")
            state[f"{norm}.weight"] = torch.full_like(bias, (1 + eps) ** 0.5)
            state[f"{norm}.bias"] = bias
            state[f"{norm}.running_mean"], state[f"{norm}.running_var"] = torch.zeros_like(bias), torch.ones_like(bias)
            state[f"{norm}.num_batches_tracked"] = torch.zeros((), dtype=torch.long)
        return state

    # -- learning ----------------------------------------------------------------------------------------------------

    def losses(self, lessons: Sequence[Lesson], limit: float | None = None) -> dict[str, Tensor]:
        """The losses of RPN, boxes, classes and masks, over the RoIs of all images.

        Args:
            limit: a RoI whose class or box loss exceeds it is left out (`trusted`); None for none.
        """
        network = self.network
        lessons = [lesson.to(self.device) for lesson in lessons]
        images = [network.transform.normalize(lesson.pixels) for lesson in lessons]
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        together = network.transform.batch_images(images, divisible(self.device, network.transform.size_divisible))
        batch = ImageList(together.contiguous(memory_format=torch.channels_last), sizes)
        maps = {name: features.float() for name, features in network.backbone(batch.tensors).items()}
        targets = [{"boxes": one.target.boxes, "doubtful": one.doubtful} for one in lessons]
        proposals, found = network.rpn(batch, maps, targets)
        losses = {"rpn_objectness": found["loss_objectness"], "rpn_box": found["loss_rpn_box_reg"]}
        return losses | self._roi_losses(maps, proposals, lessons, sizes, limit)

    def _roi_losses(
        self,
        maps: dict[str, Tensor],
        proposals: Sequence[Tensor],
        lessons: Sequence[Lesson],
        sizes: list[tuple[int, int]],
        limit: float | None,
    ) -> dict[str, Tensor]:
        heads = self.network.roi_heads
        rois = [self._sample(own, lesson) for own, lesson in zip(proposals, lessons, strict=True)]
        boxes, labels = [one.boxes for one in rois], torch.cat([one.labels for one in rois])
        weights, encoded = torch.cat([one.weights for one in rois]), torch.cat([one.encoded for one in rois])
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, sizes)))
        if limit is not None:
            weights = weights * trusted(roi_loss(logits.detach(), deltas.detach(), labels, encoded), labels > 0, limit)
        losses = dict(zip(("class", "box"), rcnn_loss(logits, deltas, labels, encoded, weights), strict=True))
        masks = []
        kept = weights.split([len(one) for one in boxes])
        for index, (one, lesson, weight) in enumerate(zip(rois, lessons, kept, strict=True)):
            positive = torch.where(one.labels > 0)[0]
            own = {name: features[index : index + 1] for name, features in maps.items()}
            masks.append(self._mask_loss(own, one, lesson, positive, weight[positive], sizes[index]))
        return losses | {"mask": torch.stack(masks).mean()}

    def _mask_loss(
        self,
        maps: dict[str, Tensor],
        rois: Rois,
        lesson: Lesson,
        positive: Tensor,
        weights: Tensor,
        size: tuple[int, int],
    ) -> Tensor:
        heads, boxes = self.network.roi_heads, rois.boxes[positive]
        if not len(positive) or lesson.target.masks is None:
            return sum((features.sum() * 0 for features in maps.values()), boxes.new_zeros(()))
        logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, [boxes], [size])))
        own = logits[torch.arange(len(positive), device=boxes.device), rois.labels[positive]]
        matched = rois.matched[positive]
        inside = crop_masks(lesson.target.masks, boxes, matched, own.shape[-1])
        known = lesson.target.masks.flatten(1).any(1)  # not of a box alone, beside instances with masks
        return mask_loss(own, inside, weights * known[matched])

    @torch.no_grad()
    def _sample(self, proposals: Tensor, lesson: Lesson) -> Rois:
        heads, target = self.network.roi_heads, lesson.target
        boxes = torch.cat([proposals, target.boxes])
        labels, weights = torch.zeros(len(boxes), dtype=torch.long), torch.ones(len(boxes))
        labels, weights = labels.to(boxes.device), weights.to(boxes.device)
        matched = torch.zeros_like(labels)
        if len(target):
            overlap, matched = box_iou(target.boxes, boxes).max(0)
            labels = torch.where(overlap >= 0.5, target.labels[matched] + 1, 0)
            weights = torch.where(overlap >= 0.5, target.weights[matched], 1.0)
        labels[(labels == 0) & covered(boxes, lesson.doubtful)] = -1
        positive, negative = heads.fg_bg_sampler([labels])
        chosen = torch.where((positive[0] + negative[0]) > 0)[0]
        boxes, matched = boxes[chosen], matched[chosen]
        encoded = torch.zeros_like(boxes)
        if len(target):
            encoded = heads.box_coder.encode([target.boxes[matched]], [boxes])[0]
        return Rois(boxes, labels[chosen], weights[chosen], encoded, matched)

    # -- predicting --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_batch(
        self,
        images: Sequence[np.ndarray],
        module: int = 4,
        proposals: Sequence[Tensor] | None = None,
        tags: Sequence[Tags] | None = None,
    ) -> list[Instances]:
        """As `Network.predict_batch`; a student stands for module 4 alone, without proposals."""
        self.require(module)
        known = [None] * len(images) if tags is None else tags
        return [self._predict(pixels, own) for pixels, own in zip(images, known, strict=True)]

    def _predict(self, pixels: np.ndarray, tags: Tags) -> Instances:
        size, values = (pixels.shape[0], pixels.shape[1]), self._values(pixels)
        with evaluating(self):
            boxes, labels, scores, masks = (value.cpu() for value in self.answer(values, tags is not None))
        boxes = resize_boxes(boxes, list(values.shape[-2:]), list(size))
        found = to_instances(masks, boxes, labels, scores, size, _BOXES)
        return found if tags is None else found[torch.isin(found.labels, torch.tensor(tags, dtype=torch.long))]

    def _values(self, pixels: np.ndarray) -> Tensor:
        """A photograph (H, W, 3) uint8 RGB as `answer` takes it, on the device."""
        views = self.recipe.images
        # before it becomes floats: a camera's photograph would fill memory with them
        seen = scaled_size(pixels.shape, views.test_side, views.longest)
        small, (height, width) = shrink(pixels, seen), pixels.shape[:2]
        if min(height, width) * views.longest < min(seen) * max(height, width):
            small = resize_image(small, seen)  # so flat that torchvision's transform may leave no pixel
        return torch.from_numpy(np.ascontiguousarray(small)).to(self.device).permute(2, 0, 1).float().div_(255)

    def whole(self, pixels: np.ndarray) -> Tensor:
        """The backbone's last map (K, h, w) of a photograph (H, W, 3) uint8 RGB as a whole, for `models.tags`."""
        return self._maps(self._values(pixels))[1]

    def cells(self, image: Tensor) -> tuple[Tensor, int]:
        """The features (K, h, w) of the cells of an image (3, H, W), RGB in [0, 1], for `models.pixels`; the stride."""
        batch, _, deep, _ = self._maps(image)
        (height, width), stride = batch.image_sizes[0], self.levels.strides[self.deep]
        return stack(deep)[:, : -(-height // stride), : -(-width // stride)], stride

    def _maps(self, image: Tensor) -> tuple[ImageList, Tensor, list[Tensor], dict[str, Tensor]]:
        """An image (3, H, W) as the network takes it, the backbone's last map without what pads it, the maps that
        `pixels` reads, and the pyramid.
        """
        batch, _ = self.network.transform([image])
        backbone = cast(BackboneWithFPN, self.network.backbone)
        maps = backbone.body(batch.tensors)
        every, (height, width) = [own[0] for own in maps.values()], batch.image_sizes[0]
        stride = batch.tensors.shape[-1] // every[-1].shape[-1]
        whole = every[-1][:, : -(-height // stride), : -(-width // stride)]
        pyramid = {name: features.float() for name, features in backbone.fpn(maps).items()}
        return batch, whole, every[self.deep :], pyramid

    @torch.no_grad()
    def answer(self, image: Tensor, tagged: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The network's own answer to an image (3, H, W), RGB in [0, 1].

        Args:
            tagged: whether the image's tags are known: then its masks know what cells look like (`models.pixels`), for
                the mask head may have learnt a wrong outline of this very image; else scores know what the whole of it
                shows (`models.tags`).

        Returns:
            Boxes (N, 4) in pixels of the image, best first, labels (N,) from 0, scores (N,) of class, photograph
            (`models.tags`) and mask (`rescore`), and masks (N, h, w) as probabilities on a smaller canvas
            (`calibration.sharpen`).
        """
        network = self.network
        batch, whole, deep, maps = self._maps(image)
        proposals, _ = network.rpn(batch, maps)
        found = network.roi_heads(maps, proposals, batch.image_sizes)[0][0]
        height, width = batch.image_sizes[0]
        mean, std = (torch.tensor(self.normalisation[name], device=self.device) for name in ("mean", "std"))
        seen = batch.tensors[0, :, :height, :width].float() * std[:, None, None] + mean[:, None, None]
        with full_precision(self.device):
            drawn, finest = (found["masks"][:, 0], found["boxes"].float()), next(iter(maps.values()))[0]
            scores, labels = found["scores"].float(), found["labels"] - 1
            evidence = None
            if tagged and self.pixels is not None:
                evidence = self.pixels(deep, (finest.shape[-2], finest.shape[-1]))[labels]
            masks = sharpen(seen, *drawn, self.recipe.masks, finest, self.levels.strides[0], evidence)
            if not tagged and self.tags is not None:
                scores = weigh(scores, labels, self.tags(whole), self.recipe.network.tag_power)
            scores, order = rescore(scores, labels, masks, self.recipe.masks)
        boxes = resize_boxes(found["boxes"], [height, width], list(image.shape[-2:]))
        return boxes[order], labels[order], scores, masks[order]

    def require(self, number: int) -> None:
        """Raises InputError unless the module asked for is the last one, in whose place a student stands."""
        if number != 4:
            raise InputError(f"a student has no module {number}; leave --module out")

    # -- folders -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_run(cls, run: str | Path, device: str | torch.device = "cpu") -> Student:
        """The trained student of a folder that ``labelpenet distill`` wrote, ready to `predict`; `InputError` where
        there is no such folder, it is unfinished, or its weights are damaged or no numbers.
        """
        run = Path(run)
        facts = read_run(run)
        if facts.get("kind") != KIND:
            raise InputError(f"{run}: holds a cascade, no student; labelpenet distill makes one of it")
        path = run_folder.weights(run, KIND)
        if not path.is_file():
            raise InputError(f"{run}: the student is not trained yet; finish it with labelpenet distill ... --resume")
        state = read_state(run)
        try:
            return cls.from_facts(facts, state).to(device)
        except Exception as error:
            raise InputError(
                f"{path}: does not fit this run ({reason(error)}); delete it and train with --resume"
            ) from error

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> Student:
        """The student that ``run.json`` describes, with its weights."""
        body, _ = build_body(facts["backbone"], pretrained=False)
        recipe = config.student_from_dict(facts["recipe"])
        return cls(body, facts["classes"], recipe, facts["backbone"], facts["normalisation"], state)


def fitted(recipe: StudentRecipe) -> list[str]:
    """The names of the linear classifiers that are fitted once the network is trained, which torchvision's has not."""
    pixels = recipe.masks.evidence and recipe.masks.iterations
    return [TAGS] * bool(recipe.network.tag_power) + [PIXELS] * bool(pixels)


def read_state(run: Path) -> dict[str, Tensor]:
    """The weights of a student's folder as `Student` takes them: the network's, and those of what is `fitted`.

    `DamagedError` names the file that is gone or not as it was written; `InputError` where one holds NaN.
    """
    state = _read_part(run, KIND)
    for part in fitted(config.student_from_dict(read_run(run)["recipe"])):
        state |= {f"{part}.{key}": value for key, value in _read_part(run, part).items()}
    return state


def _read_part(run: Path, part: str) -> dict[str, Tensor]:
    path, remedy = run_folder.weights(run, part), "labelpenet distill ... --resume restores it"
    if not path.is_file():
        raise DamagedError(f"{path}: gone; {remedy}")
    try:
        state = read_tensors(path)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path}: {reason(error)}; {remedy}") from error
    check_finite(state, path)
    return state


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    check_types(module, state)  # torch would take them and round, or leave out what is imaginary
    module.load_state_dict(state)


def load(run: str | Path, device: str | torch.device = "cpu") -> LabelPEnet | Student:
    """What a run folder holds, ready to `predict`; errors as `LabelPEnet.from_run` and `Student.from_run`."""
    facts = read_run(Path(run))
    return (Student if facts.get("kind") == KIND else LabelPEnet).from_run(run, device)


@dataclass
class Rois:
    """Sampled RoIs of an image: boxes (R, 4); labels (R,), 0 background; weights (R,); encoded targets (R, 4); the
    instance that each was matched to (R,)."""

    boxes: Tensor
    labels: Tensor
    weights: Tensor
    encoded: Tensor
    matched: Tensor


def roi_loss(logits: Tensor, deltas: Tensor, labels: Tensor, encoded: Tensor) -> Tensor:
    """(R,) the larger one of each RoI's class and box loss; arguments as `rcnn_loss`."""
    classification = F.cross_entropy(logits.float(), labels, reduction="none")
    own = deltas.float().reshape(len(labels), -1, 4)[torch.arange(len(labels), device=labels.device), labels]
    distance = F.smooth_l1_loss(own, encoded, beta=1 / 9, reduction="none").sum(1) * (labels > 0)
    return torch.maximum(classification, distance)


def trusted(loss: Tensor, positive: Tensor, limit: float) -> Tensor:
    """(R,) whether a RoI stays in the loss: those up to ``limit``, and the better half of the ``positive`` ones.

    Without that half, a network that is sure of nothing but background would leave out all that contradicts it.
    """
    kept = loss <= limit
    if bool(positive.any()):
        kept |= positive & (loss <= loss[positive].median())
    return kept


# -- the network -----------------------------------------------------------------------------------------------------


def build_network(body: nn.Module, description: Mapping[str, Any]) -> MaskRCNN:
    """torchvision's Mask R-CNN on a plain body (see `Student.description`)."""
    one, roi = description, description.get("head")
    head: dict[str, Any] = {}
    if roi:
        stages = (copy.deepcopy(body.get_submodule(name)) for name in roi["stages"])
        head = {
            "box_roi_pool": MultiScaleRoIAlign([roi["level"]], roi["pool"], 2),
            "box_head": nn.Sequential(*stages, nn.AdaptiveAvgPool2d(roi["cells"]), nn.Flatten()),
        }
    backbone = BackboneWithFPN(body, one["layers"], one["channels"], one["width"])
    classes, pooled = one["num_classes"], one["mask_layers"][-1]
    return MaskRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(one["anchors"], [ANCHOR_RATIOS] * len(one["anchors"])),
        **head,
        box_predictor=FastRCNNPredictor(roi["features"] if roi else 1024, classes),
        mask_head=MaskRCNNHeads(one["width"], one["mask_layers"], 1),
        mask_predictor=MaskRCNNPredictor(pooled, pooled, classes),
        **one["options"],
    )


def build_body(
    name: str, weights: Path | None = None, pretrained: bool = True
) -> tuple[nn.Module, dict[str, Sequence[float]]]:
    """A backbone as a chain of children without its classifier, batch norms as they are; and its normalisation.

    Arguments and errors as `build_backbone`; a network of timm must be a chain of stages.
    """
    if name.startswith("timm/"):
        return _timm_body(name, weights, pretrained)
    backbone, network = build_backbone(name, weights, pretrained), whole_network(name, weights, pretrained)
    body: Any = getattr(network, "features", network)
    if name == "mobilenet_v2":
        body = body[:-1]  # the last layer serves the classifier alone
    return body, {"mean": backbone.mean, "std": backbone.std}


def _timm_body(name: str, weights: Path | None, pretrained: bool) -> tuple[nn.Module, dict[str, Sequence[float]]]:
    from labelpenet.models.timm_backbones import timm_network  # takes a second to import

    network = timm_network(name, weights, pretrained)
    body = timm_features(name.removeprefix("timm/"))
    full = network.state_dict()
    body.load_state_dict({key: full[_timm_key(network, key)] for key in body.state_dict()})
    settings: Any = network.pretrained_cfg
    return body, {"mean": settings["mean"], "std": settings["std"]}


def timm_features(name: str) -> nn.Module:
    """A model of timm as a chain of its stages, without weights."""
    import timm

    choices: tuple[dict[str, Any], ...] = ({"feature_cfg": {"flatten_sequential": True}}, {})
    for options in choices:
        try:
            body = timm.create_model(name, features_only=True, **options)
        except Exception:  # each family takes one of the two, and says no in its own way
            continue
        if len(list(body.named_children())) > 3:
            return body
    raise InputError(f"timm/{name}: is no chain of convolutional stages, so no pyramid can be built on it")


def _timm_key(network: nn.Module, key: str) -> str:
    """The key of the whole network for one of its chain of stages, where ``blocks.0`` is called ``blocks_0``."""
    child, _, rest = key.partition(".")
    return key if hasattr(network, child) else f"{child.replace('_', '.', 1)}.{rest}"


@torch.no_grad()
def measure_levels(body: nn.Module) -> Levels:
    """Which children's maps enter the pyramid: the last one of each of `STRIDES`."""
    side = 8 * STRIDES[-1]
    x = torch.zeros(1, 3, side, side)
    last: dict[int, tuple[str, int]] = {}
    every = {}
    body.eval()
    for name, child in body.named_children():
        x = child(x)
        stride = side // x.shape[-1]
        last[stride] = (name, x.shape[1])
        every[name] = stride
    strides = [stride for stride in STRIDES if stride in last]
    if not strides:
        raise InputError(f"a network with maps of strides {sorted(last)} carries no pyramid; it needs 8, 16 or 32")
    late = [name for name, stride in every.items() if stride == 2 * _HEAD] if _HEAD in last else []
    layers = {last[stride][0]: str(level) for level, stride in enumerate(strides)}
    return Levels(layers, [last[stride][1] for stride in strides], [*strides, 2 * strides[-1]], every, late)


def set_scales(network: MaskRCNN, strides: Sequence[int]) -> None:
    """Tells RoI pooling the strides of the pyramid's maps, which torchvision infers from the first image that it sees:
    wrongly where that is padded to half as much again.
    """
    heads: Any = network.roi_heads
    names = [*map(str, range(len(strides) - 1)), "pool"]
    for pooler in (heads.box_roi_pool, heads.mask_roi_pool):
        used = [stride for name, stride in zip(names, strides, strict=True) if name in pooler.featmap_names]
        pooler.scales = [1 / stride for stride in used]
        least, most = (round(math.log2(stride)) for stride in (used[0], used[-1]))
        pooler.map_levels = initLevelMapper(least, most, pooler.canonical_scale, pooler.canonical_level)


def _in_full_precision(layers: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Scores and regressions as float32: torchvision gives boxes the type of these, and bfloat16 has steps of 4 pixels
    from 512 on.
    """
    return tuple([one.float() for one in part] if isinstance(part, list) else part.float() for part in outputs)


@torch.no_grad()
def set_first_weights(network: MaskRCNN, head: Mapping[str, Any] | None) -> None:
    """First weights, in place: the last layers say next to nothing, as in Fast R-CNN; with a RoI head of pretrained
    stages the pyramid's level that it reads is the backbone's own map, which it knows, until it learns to be another.
    """
    heads: Any = network.roi_heads
    initialise(heads.box_predictor.cls_score, heads.mask_predictor.mask_fcn_logits)
    initialise(heads.box_predictor.bbox_pred, std=0.001)
    if head:
        pyramid, level = cast(BackboneWithFPN, network.backbone).fpn, int(head["level"])
        for blocks in (pyramid.inner_blocks, pyramid.layer_blocks):
            nn.init.dirac_(blocks[level][0].weight)
        for above in pyramid.inner_blocks[level + 1 :]:
            nn.init.zeros_(above[0].weight)


@torch.no_grad()
def fold_norms(network: nn.Module, channels: int = 3, parent: str = "") -> tuple[tuple[str, str, float], ...]:
    """Folds batch norms into the convolutions before them, in place: the names of both, and the norm's epsilon.

    Where the order of a module's children is not that in which they compute, the outputs differ and nothing is folded.

    Args:
        network: in evaluation mode; takes (N, channels, h, w), returns maps by name or one.
        parent: what comes before the names, as `backbone.body.`.
    """
    pairs = [
        (f"{prefix}." if prefix else "", module, first, second)
        for prefix, module in network.named_modules()
        for (first, convolution), (second, norm) in itertools.pairwise(module.named_children())
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        if convolution.bias is None and convolution.out_channels == norm.num_features
    ]
    probe = torch.rand(1, channels, 64, 64, generator=torch.Generator().manual_seed(0))
    before = _named(network(probe))
    plain = [(module, name, module._modules[name]) for _, module, *names in pairs for name in names]
    folded = []
    for dot, module, first, second in pairs:
        convolution, norm = module._modules[first], module._modules[second]
        module._modules[first] = fuse_conv_bn_eval(convolution, norm)
        module._modules[second] = getattr(norm, "act", nn.Identity())  # timm's norms hold the activation
        folded.append((f"{parent}{dot}{first}", f"{parent}{dot}{second}", norm.eps))
    after = _named(network(probe))
    if all(
        torch.allclose(after[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))
        for name, value in before.items()
    ):
        return tuple(folded)
    for module, name, child in plain:
        module._modules[name] = child
    return ()


def _named(output: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"": output} if isinstance(output, Tensor) else output


def _norms(network: nn.Module) -> Iterator[nn.Module]:
    return (module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
