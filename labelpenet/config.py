"""Recipes: every choice of a run in one typed, frozen value.

``paper`` is the literal reading, ``best`` what measured best on real photographs, ``demo`` a tiny schedule for
generated scenes. `docs/paper-notes.md` has a row for each choice.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field, replace
from typing import Any

from labelpenet.errors import InputError

Pool = typing.Literal["max", "align"]
Attention = typing.Literal["excitation", "gradient"]


@dataclass(frozen=True)
class Images:
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
class ProposalChoice:
    """Which proposals a training image gets.

    Attributes:
        method: ``selective-search-fast``, ``selective-search-quality`` or ``edge-boxes``.
        side: longer side of the image that they are computed on; None for its own.
        limit: proposals kept for each image, best first.
        min_area: proposals smaller than this fraction of the image are dropped.
    """

    method: typing.Literal["selective-search-fast", "selective-search-quality", "edge-boxes"] = "selective-search-fast"
    side: int | None = None
    limit: int = 1600
    min_area: float = 0.0


@dataclass(frozen=True)
class ClassificationChoice:
    """Module 1 (see `models.classification.Classification`).

    Attributes:
        pool, freeze_head: of `Classification`.
        attention: ``excitation`` (excitation backprop) or ``gradient`` (activation times gradient of the class logit at
            the last spatial layer of the RoI head).
    """

    pool: Pool = "max"
    freeze_head: bool = False
    attention: Attention = "excitation"


@dataclass(frozen=True)
class DetectorChoice:
    """Modules 2 to 4 (see `models.detection.DetectorSettings`; ``attention`` as in `ClassificationChoice`)."""

    anchor_sides: tuple[int, ...] = (128, 256, 512)
    rois: int = 128
    rpn_proposals: int = 300
    pool: Pool = "max"
    cells: int = 1
    mask_width: int = 256
    mask_depth: int = 4
    attention: Attention = "excitation"


@dataclass(frozen=True)
class InferenceChoice:
    """From scores to instances, for one module (see `calibration.CalibrationSettings` for all but the last two).

    Attributes:
        score_threshold: modules 2 to 4: a detection needs this softmax score to be a candidate.
        vote: answers of modules 2 to 4: whether modules 1 and 2 have a say in the weights (`LabelPEnet.vote`).
    """

    combine: typing.Literal["product", "mean"] = "product"
    members: typing.Literal["suppressed", "class"] = "suppressed"
    nms: float = 0.3
    per_class: int = 20
    min_score: float = 0.5
    attended: int = 1000
    threshold: float | None = None
    joint: bool = True
    side: int | None = None
    sxy_gaussian: float = 3.0
    compat_gaussian: float = 3.0
    sxy_bilateral: float = 80.0
    srgb: float = 13.0
    compat_bilateral: float = 10.0
    iterations: int = 10
    box: typing.Literal["mask", "proposal"] = "mask"
    part: float | None = None
    duplicate: float | None = None
    score_threshold: float = 0.05
    vote: bool = False


@dataclass(frozen=True)
class Schedule:
    """How a stage is trained (4.2).

    Attributes:
        steps: optimiser steps; decay: (fraction of the steps, factor) pairs of the learning rate.
        lr, kind, momentum, weight_decay, warmup, clip: of `engine.stage.Optimiser`.
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
class ForwardBackward:
    """Forward-backward learning (3.3).

    Attributes:
        phases: what an iteration does: ``both``, or ``forward`` or ``backward`` alone, to see what each is good for.
        beta: IoU with a detection of module 2 above which a proposal of module 1 gets its class, else background.
        train_stem: whether the stem, frozen in the cascade, is trained too.
        ema: decay of a moving average of the weights, which are the result; None for the weights themselves.
    """

    phases: typing.Literal["both", "forward", "backward"] = "both"
    beta: float = 0.5
    train_stem: bool = True
    ema: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, but for data, seed and backbone.

    Attributes:
        infer1 to infer4: how modules 1 to 4 label the training images, each for the next one; module 4's labels are the
            result, and in forward-backward learning they teach module 3.
        predict2, predict3, predict4: how modules 2 to 4 answer `predict`.
        schedule0: of the warm-up on whole images, which only a backbone without pretrained weights needs.
        schedule1 to schedule4: of cascaded pre-training.
        schedule5: of forward-backward learning; a step is an iteration, that is, one update a phase.
    """

    name: str = "paper"
    images: Images = field(default_factory=Images)
    proposals: ProposalChoice = field(default_factory=ProposalChoice)
    classification: ClassificationChoice = field(default_factory=ClassificationChoice)
    detection: DetectorChoice = field(default_factory=DetectorChoice)
    segmentation: DetectorChoice = field(default_factory=DetectorChoice)
    infer1: InferenceChoice = field(default_factory=lambda: InferenceChoice(per_class=1))
    infer2: InferenceChoice = field(default_factory=InferenceChoice)
    infer3: InferenceChoice = field(default_factory=InferenceChoice)
    infer4: InferenceChoice = field(default_factory=InferenceChoice)
    predict2: InferenceChoice = InferenceChoice(min_score=0.05, box="proposal", joint=False)
    predict3: InferenceChoice = predict2
    predict4: InferenceChoice = predict2
    schedule0: Schedule = field(
        default_factory=lambda: Schedule(steps=2000, lr=1e-3, kind="adam", weight_decay=0.0, batch_size=8, warmup=50)
    )
    schedule1: Schedule = field(default_factory=Schedule)
    schedule2: Schedule = field(default_factory=Schedule)
    schedule3: Schedule = field(default_factory=Schedule)
    schedule4: Schedule = field(default_factory=Schedule)
    forward_backward: ForwardBackward = field(default_factory=ForwardBackward)
    schedule5: Schedule = field(default_factory=lambda: Schedule(steps=80_000, lr=1e-4, decay=()))


@dataclass(frozen=True)
class StudentNetwork:
    """The student's network (see `models.student`).

    Attributes:
        width: channels of the feature pyramid and of the mask head; mask_depth: the latter's convolutions.
        rois: sampled from each image in training; proposals: boxes that the RPN passes on in answering.
        detections: instances of an image at most.
    """

    width: int = 128
    mask_depth: int = 4
    rois: int = 64
    proposals: int = 150
    detections: int = 50


@dataclass(frozen=True)
class Noise:
    """What a student does about labels that may be wrong (see `training.distill`).

    Attributes:
        keep: an instance is taught if its confidence is at least this fraction of the best one's of its class in its
            image, as the best one itself always is; the others are doubtful.
        nested: an instance of which this fraction of the box lies inside a better one of its class is doubtful too.
        weighted: whether confidences weigh the losses.
        limit: a RoI whose class or box loss exceeds it is left out, after the fraction ``limit_from`` of the steps.
        ema: decay of the averaged weights, which are the result; None for the last ones.
    """

    keep: float = 0.5
    nested: float = 0.85
    weighted: bool = True
    limit: float | None = 4.0
    limit_from: float = 0.2
    ema: float | None = 0.998


@dataclass(frozen=True)
class StudentRecipe:
    """Everything that decides a student, but for labels, seed and backbone; the defaults fit photographs."""

    network: StudentNetwork = field(default_factory=StudentNetwork)
    noise: Noise = field(default_factory=Noise)
    images: Images = Images(sides=(320, 360, 400, 440, 480, 520), longest=800, test_side=480)
    schedule: Schedule = Schedule(
        steps=1600, lr=3e-4, kind="adamw", weight_decay=1e-2, batch_size=2, warmup=100, clip=10.0,
        decay=((0.6, 0.3), (0.85, 0.1)),
    )  # fmt: skip


def best() -> Recipe:
    """What measured best on real photographs (`docs/paper-notes.md`)."""
    crf: dict[str, Any] = {
        "side": 250, "sxy_bilateral": 40.0, "srgb": 5.0, "compat_bilateral": 5.0, "part": 0.2,
    }  # fmt: skip
    detector = DetectorChoice(
        anchor_sides=(64, 128, 256), rois=64, rpn_proposals=200, pool="align", cells=3,
        mask_width=128, mask_depth=2, attention="gradient",
    )  # fmt: skip
    schedule = Schedule(
        steps=1200, lr=2e-4, kind="adamw", weight_decay=1e-2, batch_size=2, warmup=50, clip=10.0,
        decay=((0.6, 0.3), (0.85, 0.1)),
    )  # fmt: skip
    label = InferenceChoice(per_class=5, duplicate=0.5, attended=100, **crf)
    answer = InferenceChoice(min_score=0.05, nms=0.4, duplicate=0.5, joint=False, attended=100, vote=True, **crf)
    return Recipe(
        name="best",
        images=Images(sides=(480,), longest=800, flip=True, test_side=480),
        proposals=ProposalChoice(side=250, limit=300, min_area=0.015),
        classification=ClassificationChoice(pool="align", freeze_head=True, attention="gradient"),
        detection=detector,
        segmentation=detector,
        infer1=InferenceChoice(combine="mean", members="class", per_class=1, attended=120, threshold=0.3, **crf),
        infer2=InferenceChoice(combine="mean", per_class=5, attended=80, threshold=0.4, duplicate=0.5, **crf),
        infer3=replace(label, threshold=0.4),
        infer4=replace(label, threshold=0.2),
        predict2=InferenceChoice(
            combine="mean", min_score=0.05, box="proposal", joint=False, attended=80, threshold=0.4, vote=True, **crf
        ),
        predict3=replace(answer, threshold=0.3),
        predict4=replace(answer, threshold=0.2),
        schedule1=Schedule(steps=1200, lr=1e-3, kind="adam", weight_decay=0.0, batch_size=8),
        schedule2=schedule,
        schedule3=replace(schedule, steps=800),
        schedule4=replace(schedule, steps=800),
        forward_backward=ForwardBackward(ema=0.99),
        schedule5=replace(schedule, steps=100, lr=2e-5, warmup=20),
    )


def recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        InputError: there is none of that name.
    """
    known = {"paper": Recipe, "best": best, "demo": demo}
    if name not in known:
        raise InputError(f"unknown recipe {name!r}; choose from {', '.join(known)}")
    return known[name]()


def demo() -> Recipe:
    """A tiny schedule for generated scenes of about 160 pixels and the backbone `tiny`: minutes on two cores."""
    crf: dict[str, Any] = {
        "sxy_bilateral": 30.0, "srgb": 8.0, "compat_bilateral": 5.0, "iterations": 5, "threshold": 0.45, "part": 1.0,
        "attended": 40, "duplicate": 0.5,
    }  # fmt: skip
    detector = DetectorChoice(
        anchor_sides=(48, 80, 112), rois=48, rpn_proposals=60, pool="align", cells=3,
        mask_width=64, mask_depth=1, attention="gradient",
    )  # fmt: skip
    schedule = Schedule(
        steps=300, lr=1e-3, kind="adamw", weight_decay=1e-2, batch_size=4, warmup=20, clip=10.0,
        decay=((0.6, 0.3), (0.85, 0.1)),
    )  # fmt: skip
    return Recipe(
        name="demo",
        images=Images(sides=(160,), longest=240, flip=True, test_side=160),
        proposals=ProposalChoice(side=None, limit=100, min_area=0.02),
        classification=ClassificationChoice(pool="align", freeze_head=True, attention="gradient"),
        detection=detector,
        segmentation=detector,
        infer1=InferenceChoice(combine="mean", members="class", per_class=1, **crf),
        infer2=InferenceChoice(combine="mean", per_class=4, **crf),
        infer3=InferenceChoice(per_class=4, **crf),
        infer4=InferenceChoice(per_class=4, **crf),
        predict2=InferenceChoice(combine="mean", min_score=0.05, box="proposal", joint=False, **crf),
        predict3=InferenceChoice(min_score=0.05, box="proposal", joint=False, **crf),
        predict4=InferenceChoice(min_score=0.05, box="proposal", joint=False, **crf),
        schedule0=Schedule(
            steps=400, lr=2e-3, kind="adam", weight_decay=0.0, batch_size=8, warmup=20, decay=((0.6, 0.3), (0.85, 0.1))
        ),
        schedule1=Schedule(steps=300, lr=3e-3, kind="adam", weight_decay=0.0, batch_size=8),
        schedule2=schedule,
        schedule3=schedule,
        schedule4=schedule,
        schedule5=replace(schedule, steps=60, lr=2e-5),
    )


R = typing.TypeVar("R", Recipe, StudentRecipe)


def shorten(one: R, factor: float) -> R:
    """The recipe with every stage's steps multiplied by ``factor``, at least one step each."""
    if not factor > 0:
        raise InputError(f"--shorten must be positive, but got {factor}")
    changes: dict[str, typing.Any] = {
        name: replace(schedule, steps=max(1, round(schedule.steps * factor)), warmup=round(schedule.warmup * factor))
        for name, schedule in vars(one).items()
        if isinstance(schedule, Schedule)
    }
    return replace(one, **changes)


def override(one: R, assignments: typing.Iterable[str]) -> R:
    """The recipe with single choices changed.

    Args:
        assignments: ``part.field=value`` each, such as ``schedule2.steps=800`` or ``images.sides=480,576``.

    Raises:
        InputError: an unknown part or field (the message lists the known ones), or a value of the wrong type.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        part, dot, name = key.partition(".")
        if not equals or not dot:
            raise InputError(f"--set {assignment}: expected part.field=value, such as schedule2.steps=800")
        parts = [f.name for f in dataclasses.fields(one) if dataclasses.is_dataclass(getattr(one, f.name))]
        if part not in parts:
            raise InputError(f"--set {assignment}: unknown part {part!r}; choose from {', '.join(parts)}")
        owner = getattr(one, part)
        hints = typing.get_type_hints(type(owner))
        if name not in hints:
            raise InputError(f"--set {assignment}: {part} has no {name!r}; choose from {', '.join(hints)}")
        try:
            value = _parse(text, hints[name])
        except ValueError as error:
            raise InputError(f"--set {assignment}: {error}") from error
        one = replace(one, **{part: replace(owner, **{name: value})})
    return one


def to_dict(one: Recipe | StudentRecipe) -> dict[str, Any]:
    """The recipe as plain values, for ``run.json`` and checkpoints."""
    return dataclasses.asdict(one)


def from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of `to_dict`, also after a round trip through JSON.

    A choice that did not exist yet when a run was made is that of the recipe of its name.

    Raises:
        InputError: an entry is unknown, or the recipe's name (the run was made by another version).
    """
    try:
        return _build(recipe(values["name"]), values)
    except (TypeError, KeyError, AttributeError, InputError) as error:
        raise InputError(f"the run's recipe cannot be read ({error}); it was made by another version") from error


def student_from_dict(values: dict[str, Any]) -> StudentRecipe:
    """As `from_dict`, for the recipe of a student."""
    try:
        return _build(StudentRecipe(), values)
    except (TypeError, AttributeError) as error:
        raise InputError(f"the student's recipe cannot be read ({error}); it was made by another version") from error


# Choices that runs of earlier versions name, and the only value of each that can still be followed.
_GONE = {
    "form": "paper", "contrast": False, "score": "softmax", "extra_proposals": False, "freeze_head": False,
    "weight": "score", "affiliated": True,
}  # fmt: skip

_RENAMED = {"background": "threshold"}


def _build(base: Any, values: dict[str, Any]) -> Any:
    changes = {}
    for key, value in values.items():
        key = _RENAMED.get(key, key)
        if key in _GONE and not hasattr(base, key):
            if value != _GONE[key]:
                raise InputError(f"{key}={value} is no choice any more")
            continue
        own = getattr(base, key)
        changes[key] = _build(own, value) if dataclasses.is_dataclass(own) else _tupled(value)
    return replace(base, **changes)


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, (list, tuple)) else value


def _parse(text: str, hint: Any) -> Any:
    options = typing.get_args(hint)
    if text.lower() == "none":
        if type(None) in options:
            return None
        raise ValueError("None is not allowed here")
    if type(None) in options:
        hint = next(option for option in options if option is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        if text not in typing.get_args(hint):
            raise ValueError(f"expected one of {', '.join(typing.get_args(hint))}, but got {text!r}")
        return text
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if typing.get_origin(item) is tuple:  # pairs, written 0.8:0.1,0.9:0.01
            pairs = [tuple(float(number) for number in pair.split(":")) for pair in text.split(",") if pair]
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError(f"expected pairs such as 0.8:0.1,0.9:0.01, but got {text!r}")
            return tuple(pairs)
        values = tuple(item(part) for part in text.split(",") if part)
        if not values:
            raise ValueError("expected at least one value")
        return values
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"expected true or false, but got {text!r}")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"expected a value of type {hint.__name__}, but got {text!r}") from None
