"""Recipes: every choice of a run in one typed, frozen value.

``paper`` is the literal reading, ``best`` what measured best on real photographs, ``demo`` a tiny schedule for
generated scenes. `docs/paper-notes.md` has a row for each choice.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from labelpenet.errors import InputError
from labelpenet.old_recipe import completed_modules, inferred_second_stage, modernise

Pool = typing.Literal["max", "align", "centred"]
Attention = typing.Literal["excitation", "gradient"]
Method = typing.Literal["selective-search-fast", "selective-search-quality", "edge-boxes"]
Device = typing.Literal["auto", "cpu", "cuda"]
Format = typing.Literal[  # of an export
    "coco", "coco-polygons", "coco-results", "voc", "yolo", "labelme", "label-studio", "voc-submission"
]
Precision = typing.Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
_FIXED = {"fixed": True}  # of what says who a thing is and cannot be set


_SIDE, _SHARE, _COUNT, _WIDTH = (16, 20_000), (0, 1), (1, 1_000_000), (1e-3, 1e4)
RANGES: dict[str, tuple[float, float]] = {
    "sides": _SIDE, "longest": _SIDE, "test_side": _SIDE, "side": _SIDE, "limit": _COUNT, "min_area": _SHARE,
    "nms": _SHARE, "per_class": _COUNT, "min_score": _SHARE, "threshold": (1e-6, 1 - 1e-6), "sxy_gaussian": _WIDTH,
    "compat_gaussian": (0, 1e4), "sxy_bilateral": _WIDTH, "srgb": _WIDTH, "compat_bilateral": (0, 1e4),
    "sfeatures": _WIDTH, "compat_features": (0, 1e4),
    "iterations": (0, 1000), "min_component": _SHARE, "mask_nms": _SHARE, "rescore": (0, 1000),
    "max_attention": _COUNT, "max_masks": _COUNT,
    "steps": (1, 1e9), "lr": (0, 100), "momentum": _SHARE, "weight_decay": (0, 100), "decay": (0, 100),
    "warmup": (0, 1e9), "clip": (1e-9, 1e9), "batch_size": (1, 100_000), "anchor_sides": (1, 20_000), "rois": _COUNT,
    "roi_cells": (2, 28),
    "rpn_pre_nms_top_n_train": _COUNT, "rpn_pre_nms_top_n_test": _COUNT, "rpn_post_nms_top_n_train": _COUNT,
    "rpn_post_nms_top_n_test": _COUNT, "cells": (1, 28), "score_threshold": _SHARE, "mask_width": (1, 8192),
    "mask_depth": (0, 64), "mask_margin": (0, 4), "beta": _SHARE, "ema": _SHARE, "share": (1e-6, 1),
    "enter": _SHARE, "doubt": _SHARE, "zoom": (1, 4), "colours": _SHARE, "drift": (1, 1e6), "width": (1, 8192),
    "proposals": _COUNT, "detections": _COUNT, "keep": _SHARE, "nested": _SHARE, "Noise.limit": (0, 1e6),
    "limit_from": _SHARE, "Sharpening.cells": (1, 16_384), "StudentNetwork.pool": (2, 28), "freeze": (0, 1024),
    "StudentNetwork.mask_depth": (1, 64), "objectness": _SHARE, "tag_power": (0, 100),
    "margin": (0, 1), "beyond": _SHARE, "evidence": (0, 100),
    "shorten": (1e-6, 100), "seed": (0, 2**63 - 1), "devices": (1, 1024), "nodes": (1, 4096), "workers": (1, 256),
    "checkpoint_minutes": (0, 1e5), "observe_minutes": (0, 1e5), "tolerance": (0, 1e4), "port": (0, 65535),
    "top": (1, 1e9), "Report.images": (0, 10_000), "modules": (1, 4), "module": (1, 4), "until": (1, 4),
}  # fmt: skip
"""What each number of settings and of the command line, or each in a tuple, may be, both ends included."""


def check_ranges(settings: Any, spell: Callable[[str], str] = str) -> None:
    """Refuses a number among the fields of ``settings`` that is not in its range; NaN and infinity are in none.

    Args:
        spell: from a field's name to what a message calls it.

    Raises:
        InputError: names the field, its range and the number.
    """
    for name, value in vars(settings).items():
        for number in _numbers(value):
            low, high = RANGES.get(f"{type(settings).__name__}.{name}") or RANGES[name]
            if not low <= number <= high:
                raise InputError(f"{spell(name)} must be from {low:g} to {high:g}, but got {number}")


class _Ranged:
    """Settings whose numbers are checked wherever they are made."""

    def __post_init__(self) -> None:
        check_ranges(self)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value of the settings: itself, those of a tuple, or none."""
    if isinstance(value, tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


@dataclass(frozen=True)
class Images(_Ranged):
    """How photographs are presented.

    Attributes:
        sides: shorter sides in pixels, one drawn for each presentation.
        longest: cap of the longer side.
        flip: whether half of the presentations are mirrored.
        test_side: shorter side at inference; None for the image at its original size.
    """

    sides: tuple[int, ...] = (480, 576, 688, 864, 1024)
    longest: int = 1200
    flip: bool = True
    test_side: int | None = None


@dataclass(frozen=True)
class Proposals(_Ranged):
    """Which proposals module 1 gets.

    Attributes:
        method: ``selective-search-fast``, ``selective-search-quality`` or ``edge-boxes``.
        side: longer side of the image that they are computed on; None for its own.
        limit: proposals kept for each image, best first.
        min_area: proposals smaller than this fraction of the image are dropped.
    """

    method: Method = "selective-search-fast"
    side: int | None = None
    limit: int = 1600
    min_area: float = 0.0


@dataclass(frozen=True)
class Calibration(_Ranged):
    """From scored boxes to instances with masks (section 3.2, figure 2); the defaults are the literal reading.

    Attributes:
        nms: IoU above which boxes of a class suppress one another.
        per_class: instances kept for each class, at most.
        min_score: an instance needs this score; where the tags are known, and in module 1, the first of each class is
            kept in any case.
        threshold: confidence at which a pixel is equally likely object or background, in (0, 1); None for the paper's
            background map ``max(0, 1 - sum of the attention maps)``.
        compete: with whom an instance competes for a pixel in the CRF: with all other ``instances`` and the background,
            as the paper says; with the background and the instances of other ``classes``, as far as their scores reach
            its own; or with the ``background`` alone.
        side: longer side of the canvas that maps and CRF live on, in pixels; None for the image's own, up to 640.
        sxy_gaussian, compat_gaussian, sxy_bilateral, srgb, compat_bilateral, iterations: of `calibration.DenseCRF`, the
            widths in pixels of the canvas. Zero iterations leave the CRF out.
        box: where the box comes from: tight around the ``mask``, that of the kept ``proposal``, or the smallest box
            that encloses ``both``.
        empty: what becomes of an instance whose mask has no pixel: its ``proposal`` stands in for the mask; or it is
            ``doubtful`` besides, of weight 0: neither object nor background to learn.
        min_component: components of a mask smaller than this fraction of its largest one are dropped; None keeps all.
        vote: whether modules 1 and 2, as far as they came before, have a say in the weights (`LabelPEnet.vote`); what
            follows goes by these weights then.
        mask_nms: IoU above which masks of a class suppress one another; None keeps all.
        rescore: an instance's weight is multiplied by the square of its mask's mean probability, and decays so fast
            where the mask lies on a better one of its class (``decay`` of `calibration.nms.score_masks`); one whose
            mask has no pixel is dropped. None leaves the weights as they are.
        keep: an instance is dropped if its weight is below this fraction of the best one's of its class in its image.
        nested: an instance of whose box this fraction lies inside a better one of its class is dropped; None keeps all.
    """

    nms: float = 0.3
    per_class: int = 20
    min_score: float = 0.5
    threshold: float | None = None
    compete: typing.Literal["instances", "classes", "background"] = "instances"
    side: int | None = None
    sxy_gaussian: float = 3.0
    compat_gaussian: float = 3.0
    sxy_bilateral: float = 80.0
    srgb: float = 13.0
    compat_bilateral: float = 10.0
    iterations: int = 10
    box: typing.Literal["mask", "proposal", "both"] = "mask"
    empty: typing.Literal["proposal", "doubtful"] = "proposal"
    min_component: float | None = None
    vote: bool = False
    mask_nms: float | None = None
    rescore: float | None = None
    keep: float = 0.0
    nested: float | None = None


@dataclass(frozen=True)
class AttentionCalibration(Calibration):
    """Calibration of modules 1 and 2, by attention and heat-maps.

    Attributes:
        combine: how instance attention map and heat-map become the confidence map.
        members: whose attention maps make up an instance's: those of the proposals that it ``suppressed``, or of all
            proposals of its ``class`` (for one instance a class).
        max_attention: proposals of each class, best first, whose attention map is computed.
    """

    combine: typing.Literal["product", "mean"] = "product"
    members: typing.Literal["suppressed", "class"] = "suppressed"
    max_attention: int = 1000


@dataclass(frozen=True)
class MaskCalibration(Calibration):
    """Calibration of modules 3 and 4, by predicted masks.

    Attributes:
        max_masks: masks predicted for an image, those of the best detections; a kept detection's is in any case.
    """

    max_masks: int = 1000


@dataclass(frozen=True)
class Schedule(_Ranged):
    """How a stage is trained (4.2).

    Attributes:
        steps: optimiser steps.
        lr: learning rate for the whole batch; scale it with ``batch_size``, not with the number of processes.
        kind: ``sgd``, ``adam`` or ``adamw``.
        momentum: of SGD.
        weight_decay: L2 (``sgd``, ``adam``) or decoupled (``adamw``).
        decay: (fraction of the steps, factor) pairs: from there on the learning rate is ``lr * factor``.
        warmup: number of steps over which the learning rate rises linearly to its value.
        clip: largest norm of all gradients together; None leaves them.
        batch_size: images a step, over all processes.
    """

    steps: int = 50_000
    lr: float = 1e-3
    kind: typing.Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay: tuple[tuple[float, float], ...] = ((0.8, 0.1),)
    warmup: int = 0
    clip: float | None = None
    batch_size: int = 2


@dataclass(frozen=True)
class Classification(_Ranged):
    """Module 1, multi-label classification.

    Attributes:
        pool: RoI pooling as Fast R-CNN's (``max``), RoIAlign (``align``), or RoIAlign of what cells really see
            (``centred``; attention maps and anchors lie there, too).
        freeze_head: whether tail and RoI head keep their pretrained weights.
        attention: ``excitation`` (excitation backprop) or ``gradient`` (activation times gradient of the class logit at
            the last spatial layer of the RoI head).
        heat: whose class scores a heat-map sums where one instance a class is sought: those of the proposals whose best
            class (among the tags, where they are known) it is (``class``), as the paper says, or of ``all``.
        initialiser: of the two branches: He's, which is the paper's [18], or a ``gaussian`` of deviation .01.
        tag_power: answers of modules 2 to 4 have their scores multiplied by the probability that the photograph shows
            their class, to this power (`models.tags`); 0: they have not, as in the paper.
        schedule: of its training.
        label: how it labels training images, whose tags are known.
        predict: its predictions for photographs, whose tags are not known.
    """

    name: str = field(default="classification", metadata=_FIXED)
    pool: Pool = "max"
    freeze_head: bool = False
    attention: Attention = "excitation"
    heat: typing.Literal["class", "all"] = "class"
    initialiser: typing.Literal["he", "gaussian"] = "he"
    tag_power: float = 0.0
    schedule: Schedule = Schedule()
    label: AttentionCalibration = AttentionCalibration(per_class=1)
    predict: AttentionCalibration = AttentionCalibration(per_class=1, compete="background")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label.vote or self.predict.vote:
            raise InputError("no module comes before module 1 that could vote on its instances")


@dataclass(frozen=True)
class Detector(_Ranged):
    """What modules 2 to 4 share: RPN and R-CNN head.

    Attributes:
        anchor_sides: square roots of the anchors' areas in pixels of the network's input.
        rois: RoIs sampled for each image in training, a quarter of them positive at most.
        rpn_pre_nms_top_n_*, rpn_post_nms_top_n_*: boxes of the RPN that enter its NMS, and that it passes on.
        pool: as for `Classification`.
        cells: cells per side of the pooling behind a convolutional RoI head (`Backbone.roi_head`).
        roi_cells: cells per side of RoI pooling before it, at most those that the backbone wants; fewer take less time.
        weighted: whether the instances' weights enter the losses.
        score_threshold: a detection needs this softmax score to be a candidate.
    """

    name: str = field(metadata=_FIXED)
    anchor_sides: tuple[int, ...] = (128, 256, 512)
    rois: int = 128
    rpn_pre_nms_top_n_train: int = 12_000
    rpn_pre_nms_top_n_test: int = 6000
    rpn_post_nms_top_n_train: int = 2000
    rpn_post_nms_top_n_test: int = 300
    pool: Pool = "max"
    cells: int = 1
    roi_cells: int = 14
    weighted: bool = True
    score_threshold: float = 0.05
    schedule: Schedule = Schedule()


@dataclass(frozen=True)
class Detection(Detector):
    """Module 2, object detection; ``attention``, ``label`` and ``predict`` as for `Classification`."""

    name: str = field(default="detection", metadata=_FIXED)
    attention: Attention = "excitation"
    label: AttentionCalibration = AttentionCalibration()
    predict: AttentionCalibration = AttentionCalibration(min_score=0.05, box="proposal", compete="background")


@dataclass(frozen=True)
class Segmentation(Detector):
    """Modules 3 and 4, instance refinement and segmentation; ``label`` and ``predict`` as for `Classification`.

    Attributes:
        mask_width: channels of the mask branch.
        mask_depth: convolutions of the mask head before its deconvolution.
        mask_margin: a RoI is enlarged by this fraction of its side before its mask is predicted; with 0 no mask can
            leave the detected box, and boxes tight around masks shrink from module to module.
        pyramid: whether masks are pooled from a feature pyramid of strides 8, 16 and 32, as far as the backbone has
            them, instead of the mask tail's atrous spatial pyramid.
        start: whose weights training begins with: the ``backbone``'s, and new layers random; or, of every layer that
            the two share, those of the module ``before``, if it was trained (`training.pretrain.start_from_before`).
    """

    name: str = field(default="segmentation", metadata=_FIXED)
    mask_width: int = 256
    mask_depth: int = 4
    mask_margin: float = 0.0
    pyramid: bool = False
    start: typing.Literal["backbone", "before"] = "backbone"
    label: MaskCalibration = MaskCalibration()
    predict: MaskCalibration = MaskCalibration(min_score=0.05, box="proposal", compete="background")


Modules = tuple[Classification, Detection, Segmentation, Segmentation]
MODULES = ("classification", "detection", "refinement", "segmentation")  # of attributes, stages and files


@dataclass(frozen=True)
class ForwardBackward(_Ranged):
    """Forward-backward learning (3.3).

    Attributes:
        phases: what an iteration does: ``both``, or ``forward`` or ``backward`` alone, to see what each is good for.
        beta: IoU with a detection of module 2 above which a proposal of module 1 gets its class, else background.
        train_stem: whether the stem, frozen in the cascade, is trained too.
        labels: what the modules learn from: instances as another module has just ``inferred`` them, as the paper says,
            or ``validated`` ones (`training.validated`); ``given`` ones come from elsewhere (``--labels``).
        enter, doubt: validated labels: belief from which an instance that the cascade had not is learnt, and below
            which one of the cascade that the teacher does not confirm is ignored.
        zoom, colours: labels that are not inferred: the side of the photograph is changed by up to this factor either
            way, and its brightness, contrast and saturation by up to this fraction.
        share: the part of the cascade's weights that their moving average still holds at the end; the average is the
            result, and the teacher of validated labels. None for the weights themselves.
        drift: factor by which the labels' median area and number may leave the cascade's before the stage ends with the
            weights that were within it; None only shows them (see `training.validated.drift`).
        schedule: a step is an iteration, that is, one update a phase.
    """

    phases: typing.Literal["both", "forward", "backward"] = "both"
    beta: float = 0.5
    train_stem: bool = True
    labels: typing.Literal["inferred", "validated", "given"] = "inferred"
    enter: float = 0.6
    doubt: float = 0.7
    zoom: float = 1.25
    colours: float = 0.2
    share: float | None = None
    drift: float | None = None
    schedule: Schedule = Schedule(steps=80_000, lr=1e-4, decay=())


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, but for data, seed and backbone.

    Attributes:
        name: of the recipe that this one started from.
        images: how photographs are presented.
        proposals: which proposals module 1 gets.
        warm_up: of the warm-up on whole images, which only a backbone without pretrained weights needs.
        modules: modules 1 to 4 in order: each is trained on the labels of the one before; module 4's labels are the
            result, and in forward-backward learning they teach module 3.
        forward_backward: forward-backward learning.
    """

    name: str = field(default="paper", metadata=_FIXED)
    images: Images = Images()
    proposals: Proposals = Proposals()
    warm_up: Schedule = Schedule(steps=2000, lr=1e-3, kind="adam", weight_decay=0.0, batch_size=8, warmup=50)
    modules: Modules = (
        Classification(),
        Detection(),
        Segmentation("refinement"),
        Segmentation("segmentation", weighted=False),
    )
    forward_backward: ForwardBackward = ForwardBackward()


@dataclass(frozen=True)
class StudentNetwork(_Ranged):
    """The student's network (see `models.student`).

    Attributes:
        head: what classifies RoIs: ``stages``, a copy of the backbone's pretrained stages behind stride 16, or two new
            ``layers``. A backbone without such stages, or of more than 256 channels before them, has ``layers``.
        pool: cells per side of a RoI that the stages see.
        freeze: the backbone's layers up to this stride keep their pretrained weights; a RoI head of stages learns, and
            so does the whole of a backbone that has none (``tiny``).
        width: channels of the feature pyramid and of the mask head, where the RoI head is ``layers``; else those of the
            backbone's map of stride 16. mask_depth: the mask head's convolutions.
        rois: sampled from each image in training.
        proposals, objectness: in prediction the RPN passes on so many boxes at most, those that are an object with this
            probability, in [0, 1], at least; every one of them costs time.
        detections: instances of an image at most.
        tag_power: a score is multiplied by the probability that the photograph shows its class, to this power
            (`models.tags`); 0: it is not.
    """

    head: typing.Literal["stages", "layers"] = "stages"
    pool: int = 8
    freeze: int = 32
    width: int = 128
    mask_depth: int = 4
    rois: int = 64
    proposals: int = 150
    objectness: float = 0.2
    detections: int = 50
    tag_power: float = 0.25


@dataclass(frozen=True)
class Noise(_Ranged):
    """What a student does about labels that may be wrong (see `training.distill`).

    Attributes:
        keep: an instance is taught if its confidence is at least this fraction of the best one's of its class in its
            image, as the best one itself is unless it is 0; the others are doubtful.
        nested: an instance of which this fraction of the box lies inside a better one of its class is doubtful too;
            None for none.
        weighted: whether confidences weigh the losses.
        limit: a RoI whose class or box loss exceeds it is left out, after the fraction ``limit_from`` of the steps.
        ema: decay of the averaged weights, which are the result; lower where the steps are few, so that they look back
            over an eighth of them at most; None for the last ones.
    """

    keep: float = 0.5
    nested: float | None = 0.85
    weighted: bool = True
    limit: float | None = 4.0
    limit_from: float = 0.2
    ema: float | None = 0.998


@dataclass(frozen=True)
class Sharpening(_Ranged):
    """The dense CRF that a student's masks go through in its answers (see `calibration.sharpen`).

    Attributes:
        iterations: of the mean field; 0 leaves the CRF out, and scores are the classes' alone.
        cells: of the grid that it runs on, about so many; half of them take half of the time, for coarser edges.
        threshold: probability of the mask head at which a pixel is equally likely object or background, in (0, 1).
        margin: around a box, so many of its sides wide, the mask head has no say, and the object's probability is
            ``beyond``: labels cut off legs and tails, and so do a student's boxes. 0 ends masks at their boxes.
        sxy_gaussian, sxy_bilateral: standard deviations in place, in sides of the photograph (the root of its area), of
            the smoothness kernel, and of the kernels of colours and of features.
        srgb: standard deviation of the kernel of colours, in grey levels of 0..255.
        sfeatures: standard deviation of the kernel of the network's features, in theirs over the photograph.
        compat_gaussian, compat_bilateral, compat_features: weights of the kernels; 0 leaves one out.
        evidence: where tags are known (``predict --tagged``), the weight of the log-odds with which a cell of the
            network's maps looks like the class (`models.pixels`), beside those of the mask head; 0 leaves them out.
    """

    iterations: int = 5
    cells: int = 2048
    threshold: float = 0.38
    margin: float = 0.25
    beyond: float = 0.3
    sxy_gaussian: float = 0.014
    compat_gaussian: float = 3.0
    sxy_bilateral: float = 0.185
    srgb: float = 5.0
    compat_bilateral: float = 5.0
    sfeatures: float = 0.5
    compat_features: float = 10.0
    evidence: float = 0.5


@dataclass(frozen=True)
class StudentRecipe:
    """Everything that decides a student, but for labels, seed and backbone; the defaults fit photographs."""

    network: StudentNetwork = field(default_factory=StudentNetwork)
    noise: Noise = field(default_factory=Noise)
    masks: Sharpening = field(default_factory=Sharpening)
    images: Images = Images(sides=(320, 360, 400, 440, 480, 520), longest=800, test_side=480)
    schedule: Schedule = Schedule(
        steps=1600, lr=3e-4, kind="adamw", weight_decay=1e-2, batch_size=2, warmup=100, clip=10.0,
        decay=((0.6, 0.3), (0.85, 0.1)),
    )  # fmt: skip


def student_recipe(true: bool = False) -> StudentRecipe:
    """The student's choices; of ``true`` objects none is doubtful, no RoI is left out for its loss, and the mask head,
    which true masks have taught, is believed alone.
    """
    once = StudentRecipe()
    return replace(once, noise=Noise(nested=None, limit=None), masks=Sharpening(evidence=0.0)) if true else once


@dataclass(frozen=True)
class RunOptions:
    """How a training runs, whatever it trains."""

    resume: bool = False
    """Continue what the folder to write holds."""
    seed: int = 0
    """Of everything random."""
    device: Device = "auto"
    """Where to train."""
    devices: int = 1
    """Processes on this machine (one per GPU)."""
    nodes: int = 1
    """Machines."""
    precision: Precision = "auto"
    """auto: bf16-mixed where the hardware has it, else 32-true."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; 0 for one after every step."""


@dataclass(frozen=True)
class CascadeOptions(RunOptions):
    """How the training of a cascade runs."""

    observe_minutes: float = 5.0
    """Minutes between pictures (and measurements) of the module that is being trained, for TensorBoard."""
    cache: Path | None = None
    """Folder of the proposals' cache. Default: the user's cache folder."""
    proposals: Path | None = None
    """Another tool's instead of our own: a .mat, .npz, .pkl or .json file, or a folder of masks (docs/proposals.md)."""


def best() -> Recipe:
    """What measured best on real photographs (`docs/paper-notes.md`)."""
    crf: dict[str, Any] = {
        "side": 250, "sxy_bilateral": 40.0, "srgb": 5.0, "compat_bilateral": 5.0, "min_component": 0.2,
        "threshold": 0.35,
    }  # fmt: skip
    schedule = Schedule(
        steps=1200, lr=2e-4, kind="adamw", weight_decay=1e-2, batch_size=2, warmup=50, clip=10.0,
        decay=((0.6, 0.3), (0.85, 0.1)),
    )  # fmt: skip
    detector: dict[str, Any] = {
        "anchor_sides": (64, 128, 256), "rois": 64, "pool": "centred", "cells": 3,
        "rpn_pre_nms_top_n_train": 2000, "rpn_pre_nms_top_n_test": 1000,
        "rpn_post_nms_top_n_train": 200, "rpn_post_nms_top_n_test": 200,
    }  # fmt: skip
    label = AttentionCalibration(combine="mean", members="class", per_class=1, max_attention=120, **crf)
    # Not all instances against one another: parts and doubles would take the object's pixels from it.
    several: dict[str, Any] = {"per_class": 20, "min_score": 0.05, "compete": "background"}
    # of what is passed on; a rider's mask does not take the horse, and a box without a mask does not teach one
    sure: dict[str, Any] = {"keep": 0.5, "nested": 0.85, "compete": "classes", "empty": "doubtful"}
    detect = AttentionCalibration(combine="mean", max_attention=80, **several, **crf)
    masks = MaskCalibration(nms=0.4, mask_nms=0.5, max_masks=100, vote=True, **several, **crf | {"threshold": 0.38})
    # Answers teach nothing, so a mask that lies on a better one may stay, if its score says so.
    answer = replace(masks, mask_nms=0.8, rescore=4.0)
    segmenter: dict[str, Any] = {
        **detector, "roi_cells": 8, "pyramid": True, "mask_width": 128, "mask_depth": 2, "mask_margin": 0.15,
        "start": "before", "schedule": replace(schedule, steps=1600),
        # lower than module 3's: legs come back, and with them the boxes around the masks
        "label": replace(masks, **sure | {"threshold": 0.25}), "predict": replace(answer, threshold=0.2),
    }  # fmt: skip
    # What attention maps enlarged is cut back once, where it is first passed on as a mask.
    refiner = segmenter | {"label": replace(masks, **sure | {"threshold": 0.42}), "predict": answer}
    return Recipe(
        name="best",
        images=Images(sides=(480,), longest=800, flip=True, test_side=480),
        proposals=Proposals(side=250, limit=300, min_area=0.015),
        modules=(
            Classification(
                pool="centred", freeze_head=True, attention="gradient", heat="all", initialiser="gaussian",
                tag_power=0.25,
                schedule=Schedule(steps=1200, lr=1e-3, kind="adam", weight_decay=0.0, batch_size=8),
                label=label, predict=replace(label, compete="background"),
            ),
            Detection(
                **detector, attention="gradient", schedule=schedule,
                # lower, attention maps reach over the object's edge, and so do all masks that are learnt from them
                label=replace(detect, mask_nms=0.5, threshold=0.4, **sure),
                predict=replace(detect, vote=True, box="proposal"),
            ),
            Segmentation("refinement", **refiner),
            Segmentation("segmentation", **segmenter, weighted=False),
        ),
        forward_backward=ForwardBackward(
            train_stem=False, labels="validated", share=0.4, drift=1.6,
            schedule=replace(schedule, steps=800, lr=1e-4, warmup=20),
        ),
    )  # fmt: skip


def demo() -> Recipe:
    """A tiny schedule for generated scenes of about 160 pixels and the backbone `tiny`: minutes on two cores."""
    crf: dict[str, Any] = {
        "sxy_bilateral": 30.0, "srgb": 8.0, "compat_bilateral": 5.0, "iterations": 5, "threshold": 0.45,
        "min_component": 1.0, "mask_nms": 0.5,
    }  # fmt: skip
    schedule = Schedule(
        steps=200, lr=1e-3, kind="adamw", weight_decay=1e-2, batch_size=4, warmup=20, clip=10.0,
        decay=((0.6, 0.3), (0.85, 0.1)),
    )  # fmt: skip
    detector: dict[str, Any] = {
        "anchor_sides": (48, 80, 112), "rois": 32, "pool": "align", "cells": 3, "schedule": schedule,
        "rpn_pre_nms_top_n_train": 400, "rpn_pre_nms_top_n_test": 400,
        "rpn_post_nms_top_n_train": 60, "rpn_post_nms_top_n_test": 60,
    }  # fmt: skip
    label = AttentionCalibration(combine="mean", members="class", per_class=1, max_attention=40, **crf)
    detect = AttentionCalibration(combine="mean", per_class=4, max_attention=40, **crf)
    masks = MaskCalibration(per_class=4, max_masks=40, **crf)
    answer: dict[str, Any] = {"per_class": 20, "min_score": 0.05, "box": "proposal", "compete": "background"}
    segmenter: dict[str, Any] = {
        **detector, "mask_width": 48, "mask_depth": 1, "label": masks, "predict": replace(masks, **answer),
        "start": "before", "schedule": replace(schedule, steps=100),
    }  # fmt: skip
    return Recipe(
        name="demo",
        images=Images(sides=(160,), longest=240, flip=True, test_side=160),
        proposals=Proposals(side=128, limit=100, min_area=0.02),
        warm_up=Schedule(
            steps=280, lr=2e-3, kind="adam", weight_decay=0.0, batch_size=8, warmup=20, decay=((0.6, 0.3), (0.85, 0.1))
        ),
        modules=(
            Classification(
                pool="align", freeze_head=True, attention="gradient", heat="all", initialiser="gaussian",
                schedule=Schedule(steps=300, lr=3e-3, kind="adam", weight_decay=0.0, batch_size=8),
                label=label, predict=replace(label, compete="background"),
            ),
            Detection(**detector, attention="gradient", label=detect, predict=replace(detect, **answer)),
            Segmentation("refinement", **segmenter),
            Segmentation("segmentation", **segmenter, weighted=False),
        ),
        forward_backward=ForwardBackward(schedule=replace(schedule, steps=60, lr=2e-5)),
    )  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        InputError: there is none of that name.
    """
    known = {"paper": Recipe, "best": best, "demo": demo}
    if name not in known:
        raise InputError(f"unknown recipe {name!r}; choose from {', '.join(known)}")
    return known[name]()


def change(recipe: Recipe, number: int, **changes: Any) -> Recipe:
    """The recipe with fields of module ``number``, 1 to 4, changed."""
    modules: list[Any] = list(recipe.modules)
    modules[number - 1] = replace(modules[number - 1], **changes)
    return replace(recipe, modules=tuple(modules))  # type: ignore[arg-type]


R = typing.TypeVar("R", Recipe, StudentRecipe)


def shorten(recipe: R, factor: float) -> R:
    """The recipe with every stage's steps multiplied by ``factor``, at least one step each."""
    if not factor > 0:
        raise InputError(f"--shorten must be positive, but got {factor}")
    return _shortened(recipe, factor)


def _shortened(value: Any, factor: float) -> Any:
    if isinstance(value, Schedule):
        return replace(value, steps=max(1, round(value.steps * factor)), warmup=round(value.warmup * factor))
    if isinstance(value, tuple):
        return tuple(_shortened(item, factor) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = dataclasses.fields(value)
        return replace(value, **{part.name: _shortened(getattr(value, part.name), factor) for part in parts})
    return value


class _UnknownChoiceError(ValueError):
    """There is no choice of that name."""


def override(recipe: R, assignments: Iterable[str]) -> R:
    """The recipe with single choices changed.

    Args:
        assignments: ``images.sides=480,576``, ``modules.2.schedule.steps=800`` (modules count from 1 to 4) or
            ``modules.*.schedule.batch_size=8`` (every module that has this choice).

    Raises:
        InputError: an unknown choice (the message lists the known ones), or a value of the wrong type.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        try:
            if not equals:
                raise ValueError("expected choice=value, such as modules.2.schedule.steps=800")
            recipe = _assign(recipe, key.split("."), text, "a recipe")
        except ValueError as error:
            raise InputError(f"--set {assignment}: {error}") from error
    return recipe


def _assign(owner: Any, path: Sequence[str], text: str, where: str) -> Any:
    """The owner with the choice at ``path`` set to what ``text`` says."""
    name, *rest = path
    if isinstance(owner, tuple):
        return _assign_modules(owner, name, rest, text)
    known = [choice.name for choice in dataclasses.fields(owner) if "fixed" not in choice.metadata]
    if name not in known:
        raise _UnknownChoiceError(f"{where} has no {name!r}; choose from {', '.join(known)}")
    value = getattr(owner, name)
    if dataclasses.is_dataclass(value) or name == "modules":
        if not rest:
            raise ValueError(f"expected {name}.choice=value, such as modules.2.schedule.steps=800")
        return replace(owner, **{name: _assign(value, rest, text, name)})
    if rest:
        raise _UnknownChoiceError(f"{name} has no {rest[0]!r}; it takes a value")
    return replace(owner, **{name: _parse(text, typing.get_type_hints(type(owner))[name])})


def _assign_modules(modules: tuple[Any, ...], which: str, rest: Sequence[str], text: str) -> tuple[Any, ...]:
    numbers = [str(number) for number in range(1, len(modules) + 1)]
    if which not in (*numbers, "*") or not rest:
        raise ValueError(f"expected modules.N.choice=value, where N is {', '.join(numbers)} or *")
    changed, unknown = list(modules), []
    chosen = range(len(modules)) if which == "*" else [int(which) - 1]
    for index in chosen:
        try:
            changed[index] = _assign(modules[index], rest, text, f"module {index + 1}")
        except _UnknownChoiceError as error:
            unknown.append(error)
    if len(unknown) == len(chosen):
        raise unknown[0]
    return tuple(changed)


def to_dict(recipe: Recipe | StudentRecipe) -> dict[str, Any]:
    """The recipe as plain values, for ``run.json`` and checkpoints."""
    return dataclasses.asdict(recipe)


def from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of `to_dict`, also after a round trip through JSON.

    A choice that did not exist yet when a run was made is that of the recipe of its name.

    Raises:
        InputError: an entry is unknown, or the recipe's name (the run was made by another version).
    """
    try:
        base = recipe(values["name"])
        if "modules" not in values:
            known = [(set(vars(module)), set(vars(module.label))) for module in base.modules]
            values = modernise(values, known)
        learning = inferred_second_stage(values.get("forward_backward", {}))
        return _build(base, {**values, "modules": completed_modules(values["modules"]), "forward_backward": learning})
    except (TypeError, KeyError, AttributeError, ValueError, InputError) as error:
        raise InputError(f"the run's recipe cannot be read ({error}); it was made by another version") from error


def student_from_dict(values: dict[str, Any]) -> StudentRecipe:
    """As `from_dict`, for the recipe of a student."""
    try:
        once = StudentNetwork(head="layers", objectness=0.0, tag_power=0.0)  # as all had before these were choices
        return _build(replace(StudentRecipe(), network=once, masks=Sharpening(evidence=0.0)), values)
    except (TypeError, AttributeError) as error:
        raise InputError(f"the student's recipe cannot be read ({error}); it was made by another version") from error


def _build(base: Any, values: dict[str, Any]) -> Any:
    changes, hints = {}, typing.get_type_hints(type(base))
    for key, value in values.items():
        own = getattr(base, key)
        if key == "modules":
            changes[key] = tuple(_build(one, other) for one, other in zip(own, value, strict=True))
        else:
            changes[key] = _build(own, value) if dataclasses.is_dataclass(own) else _tupled(value)
            if not _fits(changes[key], hints[key]) or (key == "name" and value != own):
                raise TypeError(f"{key} is {str(value)[:40]}")
    return replace(base, **changes)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read from a file is of a setting's type."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in inside
    if origin is tuple:
        kinds = inside[:1] * len(value) if isinstance(value, tuple) and inside[-1] is ... else inside
        return isinstance(value, tuple) and len(kinds) == len(value) and all(map(_fits, value, kinds))
    if inside:
        return any(_fits(value, one) for one in inside)
    return type(value) in (int, float) if hint is float else type(value) is hint


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, (list, tuple)) else value


def _parse(text: str, hint: Any) -> Any:
    """A value of a setting's type from what is written: several are separated by commas, pairs are as 0.8:0.1."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in inside:
        return None if text.lower() == "none" else _parse(text, inside[0])
    if text.lower() == "none":
        raise ValueError("None is not allowed here")
    if origin is typing.Literal:
        if text not in inside:
            raise ValueError(f"expected one of {', '.join(inside)}, but got {text!r}")
        return text
    if origin is tuple:
        several = inside[-1] is ...
        parts = [part for part in text.split("," if several else ":") if part]
        if not several and len(parts) != len(inside):
            raise ValueError(f"expected pairs such as 0.8:0.1,0.9:0.01, but got {text!r}")
        if not parts and typing.get_origin(inside[0]) is None:
            raise ValueError("expected at least one value")
        return tuple(_parse(part, inside[0]) for part in parts)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"expected true or false, but got {text!r}")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"expected a value of type {hint.__name__}, but got {text!r}") from None
