"""Recipes: single choices, round trips through JSON, and messages that say what would have been valid."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from labelpenet import config
from labelpenet.config import Recipe, from_dict, override, recipe, shorten, to_dict
from labelpenet.errors import InputError
from labelpenet.models.build import build_backbone
from labelpenet.models.cascade import LabelPEnet
from tests.formats.test_reader_fuzz import forged

NAMES = ("paper", "best", "demo")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_json(name):
    one = recipe(name)
    assert one.name == name
    assert from_dict(json.loads(json.dumps(to_dict(one)))) == one


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_can_be_set_to_what_it_is(name):
    """Writing each field of each part as text and reading it back changes nothing: no field is out of reach."""
    one = recipe(name)
    keys = list(every_choice(one))
    assert len(keys) == len({key for key, _ in keys}) > 100
    for key, value in keys:
        assert override(one, [f"{key}={as_text(value)}"]) == one, key


def every_choice(owner, prefix: str = ""):
    """(key, value) of every choice in a recipe, but names."""
    for choice in dataclasses.fields(owner):
        value, key = getattr(owner, choice.name), prefix + choice.name
        if choice.name == "modules":
            for number, module in enumerate(value, 1):
                yield from every_choice(module, f"{key}.{number}.")
        elif dataclasses.is_dataclass(value):
            yield from every_choice(value, f"{key}.")
        elif choice.name != "name":
            yield key, value


def as_text(value) -> str:
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return str(value)


def test_every_choice_of_the_paper_recipe():
    """The literal reading, choice by choice: docs/paper-notes.md has a row for each; change both."""
    sgd = {"kind": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "warmup": 0, "clip": None, "batch_size": 2}
    schedule = {"steps": 50_000, "lr": 1e-3, "decay": ((0.8, 0.1),), **sgd}
    chain = {
        "nms": 0.3, "per_class": 20, "min_score": 0.5, "threshold": None, "compete": "instances", "side": None,
        "sxy_gaussian": 3.0, "compat_gaussian": 3.0, "sxy_bilateral": 80.0, "srgb": 13.0, "compat_bilateral": 10.0,
        "iterations": 10, "box": "mask", "empty": "proposal", "min_component": None, "vote": False, "mask_nms": None,
        "rescore": None, "keep": 0.0, "nested": None,
    }  # fmt: skip
    attention = chain | {"combine": "product", "members": "suppressed", "max_attention": 1000}
    masks = chain | {"max_masks": 1000}
    answer = {"min_score": 0.05, "compete": "background", "box": "proposal"}
    faster_rcnn = {
        "anchor_sides": (128, 256, 512), "rois": 128, "rpn_pre_nms_top_n_train": 12_000, "rpn_pre_nms_top_n_test": 6000,
        "rpn_post_nms_top_n_train": 2000, "rpn_post_nms_top_n_test": 300, "pool": "max", "cells": 1,
        "roi_cells": 14, "weighted": True, "score_threshold": 0.05, "schedule": schedule,
    }  # fmt: skip
    mask_rcnn = faster_rcnn | {
        "mask_width": 256,
        "mask_depth": 4,
        "mask_margin": 0.0,
        "pyramid": False,
        "start": "backbone",
        "label": masks,
        "predict": masks | answer,
    }
    single = attention | {"per_class": 1}
    adam = {"kind": "adam", "weight_decay": 0.0, "warmup": 50, "batch_size": 8}
    assert to_dict(recipe("paper")) == {
        "name": "paper",
        "images": {"sides": (480, 576, 688, 864, 1024), "longest": 1200, "flip": True, "test_side": None},
        "proposals": {"method": "selective-search-fast", "side": None, "limit": 1600, "min_area": 0.0},
        "warm_up": schedule | adam | {"steps": 2000},
        "modules": (
            {"name": "classification", "pool": "max", "freeze_head": False, "attention": "excitation",
             "heat": "class", "initialiser": "he", "tag_power": 0.0, "schedule": schedule,
             "label": single, "predict": single | {"compete": "background"}},
            {"name": "detection", **faster_rcnn, "attention": "excitation",
             "label": attention, "predict": attention | answer},
            {"name": "refinement", **mask_rcnn},
            {"name": "segmentation", **mask_rcnn, "weighted": False},
        ),
        "forward_backward": {"phases": "both", "beta": 0.5, "train_stem": True, "labels": "inferred",
                             "enter": 0.6, "doubt": 0.7, "zoom": 1.25, "colours": 0.2, "share": None, "drift": None,
                             "schedule": {"steps": 80_000, "lr": 1e-4, "decay": (), **sgd}},
    }  # fmt: skip


def test_override_changes_one_choice_and_leaves_the_rest():
    before = recipe("paper")
    after = override(
        before,
        [
            "modules.2.schedule.steps=800",
            "images.sides=480,576",
            "images.flip=false",
            "images.test_side=320",
            "modules.1.label.threshold=0.25",
            "modules.3.schedule.decay=0.5:0.1,0.9:0.01",
            "modules.3.schedule.kind=adamw",
        ],
    )
    assert after.modules[1].schedule.steps == 800
    assert after.images.sides == (480, 576) and after.images.flip is False and after.images.test_side == 320
    assert after.modules[0].label.threshold == 0.25
    assert after.modules[2].schedule.decay == ((0.5, 0.1), (0.9, 0.01)) and after.modules[2].schedule.kind == "adamw"
    assert after.modules[3] == before.modules[3] and after.modules[0].schedule == before.modules[0].schedule
    assert override(after, ["images.test_side=none"]).images.test_side is None
    assert before == recipe("paper")


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps=3", "choose from images, proposals, warm_up, modules, forward_backward"),
        ("modules.2.schedule.steps", "choice=value"),
        ("schedule2.steps=3", "modules"),
        ("modules.2.schedule.step=3", "steps"),
        ("modules.2.schedule.kind=lion", "adamw"),
        ("modules.2.schedule.steps=many", "int"),
        ("modules.2.schedule.steps=none", "None"),
        ("modules.2.schedule.lr=fast", "float"),
        ("images.flip=perhaps", "true or false"),
        ("images.sides=480,big", "big"),
        ("images.sides=", "at least one"),
        ("modules.2.schedule.decay=0.8", "pairs"),
        ("name=mine", "choose from"),
        ("modules.1.name=mine", "choose from pool"),
        ("modules.0.pool=max", "1, 2, 3, 4 or *"),
        ("modules.5.pool=max", "1, 2, 3, 4 or *"),
        ("modules.2=3", "1, 2, 3, 4 or *"),
        ("modules=3", "modules.2.schedule.steps=800"),
        ("modules.2.schedule=3", "modules.2.schedule.steps=800"),
        ("images.flip.x=true", "takes a value"),
        ("modules.1.predict.vote=true", "no module comes before"),
        ("modules.1.label.max_masks=3", "max_attention"),
        ("modules.3.label.combine=mean", "max_masks"),
        ("modules.4.attention=gradient", "mask_width"),
        ("modules.2.mask_depth=2", "rois"),
        ("modules.*.steps=3", "module 1 has no 'steps'"),
        ("modules.1.pool=mean", "align"),
        ("modules.1.attention=grad", "gradient"),
        ("modules.2.pool=mean", "align"),
        ("modules.1.label.combine=sum", "product"),
        ("modules.1.label.members=all", "suppressed"),
        ("modules.1.label.box=masks", "proposal"),
        ("proposals.method=mcg", "edge-boxes"),
    ],
)
def test_a_wrong_assignment_is_answered_with_what_would_be_right(assignment, expected):
    with pytest.raises(InputError) as caught:
        override(recipe("best"), [assignment])
    message = str(caught.value)
    assert assignment in message and expected in message
    assert "\n" not in message


def test_an_unknown_recipe_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match="paper, best, demo"):
        recipe("papr")


def schedules(one: Recipe) -> list[config.Schedule]:
    return [one.warm_up, *(module.schedule for module in one.modules), one.forward_backward.schedule]


def test_an_asterisk_sets_every_module_that_has_the_choice():
    after = override(recipe("best"), ["modules.*.schedule.batch_size=8", "modules.*.mask_width=16"])
    assert [module.schedule.batch_size for module in after.modules] == [8] * 4
    assert after.modules[2].mask_width == after.modules[3].mask_width == 16


def test_shorten_scales_every_schedule_and_keeps_one_step():
    one = recipe("best")
    half = shorten(one, 0.5)
    for before, after in zip(schedules(one), schedules(half), strict=True):
        assert after.steps == round(before.steps / 2) and after.warmup == round(before.warmup / 2)
        assert dataclasses.replace(after, steps=before.steps, warmup=before.warmup) == before
    assert shorten(one, 1) == one
    assert shorten(one, 1e-9).modules[2].schedule.steps == 1
    for factor in (0, -1, float("nan")):
        with pytest.raises(InputError, match="positive"):
            shorten(one, factor)


def test_a_recipe_of_another_version_is_refused():
    values = to_dict(recipe("best"))
    unknown = values | {"novelty": 1}
    nested = values | {"images": values["images"] | {"novelty": 1}}
    for damaged in (unknown, nested, values | {"images": 3}, values | {"name": "worst"}, {}):
        with pytest.raises(InputError, match="another version"):
            from_dict(damaged)


def test_a_recipe_with_any_odd_value_is_refused_or_builds_a_network():
    rng, refused = random.Random(0), 0
    values = [json.loads(json.dumps(to_dict(recipe(name)))) for name in NAMES]
    odd = [forged(rng.choice(values), rng) for _ in range(30)]
    for key, value in (
        ("anchor_sides", [16, [32]]),
        ("anchor_sides", 16),
        ("name", "x"),
        ("schedule", 3),
        ("rois", "9"),
    ):
        odd.append(json.loads(json.dumps(values[0])))
        odd[-1]["modules"][1][key] = value
    for one in odd:
        try:
            LabelPEnet(build_backbone("tiny", pretrained=False), ("cat", "dog"), from_dict(one))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 30


OLD = json.loads((Path(__file__).parent / "recipe-0.1.json").read_text())


def test_runs_of_version_0_1_are_read():
    """Their recipes had schedules and calibrations beside the modules, some under other names."""
    one = from_dict(OLD)
    assert (one.name, one.warm_up.steps, one.forward_backward.schedule.lr) == ("best", 2000, 2e-5)
    for number, module in enumerate(one.modules, 1):
        label, predict = OLD[f"infer{number}"], OLD.get(f"predict{number}", OLD[f"infer{number}"] | {"joint": False})
        assert dataclasses.asdict(module.schedule) == OLD[f"schedule{number}"] | {"decay": module.schedule.decay}
        for ours, theirs in ((module.label, label), (module.predict, predict)):
            assert (ours.threshold, ours.mask_nms) == (theirs["background"], theirs["duplicate"])
            assert ours.min_component == theirs["part"]
            assert ours.compete == ("instances" if theirs["joint"] else "background")
            assert (ours.vote, ours.keep, ours.nested) == (theirs["vote"], 0, None)
            assert getattr(ours, "max_attention" if number < 3 else "max_masks") == theirs["attended"]
    assert (
        one.modules[0].freeze_head
        and one.modules[3].predict.vote
        and one.modules[3].mask_margin == 0
        and one.modules[1].rpn_post_nms_top_n_test == 200
    )


@pytest.mark.parametrize(
    ("part", "gone"), [("detection", {"extra_proposals": True}), ("infer1", {"weight": "overlap"})]
)
def test_a_choice_that_is_gone_is_refused_where_it_did_something(part, gone):
    with pytest.raises(InputError, match=f"{next(iter(gone))}.*another version"):
        from_dict(OLD | {part: OLD[part] | gone})


def test_a_choice_that_a_run_does_not_know_yet_is_that_of_its_recipe():
    values = to_dict(override(recipe("best"), ["images.sides=320", "modules.4.schedule.steps=7"]))
    del values["forward_backward"], values["images"]["flip"]
    assert from_dict(values) == override(recipe("best"), ["images.sides=320", "modules.4.schedule.steps=7"])


def test_a_recipe_from_before_labels_had_a_vote_says_what_it_said_then():
    """No choice of today slips into a run that knew another: its masks never left their boxes."""
    values = to_dict(recipe("best"))
    for module in values["modules"][1:]:
        for part in ("label", "predict"):
            for name in ("vote", "keep", "nested"):
                del module[part][name]
        module.pop("mask_margin", None)
        module["vote"] = True
    values["forward_backward"] = values["forward_backward"] | {"ema": 0.99}
    for name in ("labels", "share", "drift"):
        del values["forward_backward"][name]
    one = from_dict(json.loads(json.dumps(values)))
    for module in one.modules[1:]:
        assert (module.label.vote, module.predict.vote) == (False, True)
        assert (module.label.keep, module.label.nested) == (module.predict.keep, module.predict.nested) == (0, None)
    assert [module.mask_margin for module in one.modules[2:]] == [0, 0]
    learning = one.forward_backward
    assert (learning.labels, learning.drift) == ("inferred", None)
    assert learning.share == pytest.approx(0.99 ** (2 * learning.schedule.steps), abs=1e-6)


def test_a_run_of_before_keeps_its_scores_and_where_its_training_began():
    values = json.loads(json.dumps(to_dict(recipe("best"))))
    for module in values["modules"]:
        module.pop("start", None)
        for part in ("label", "predict"):
            del module[part]["rescore"], module[part]["empty"]
    answers = [module.predict.rescore for module in from_dict(values).modules]
    assert answers == [None] * 4
    assert [module.predict.rescore for module in recipe("best").modules] == [None, None, 4.0, 4.0]
    assert {module.label.rescore for module in recipe("best").modules} == {None}
    assert {module.label.empty for module in from_dict(values).modules} == {"proposal"}
    assert [module.label.empty for module in recipe("best").modules] == ["proposal"] + ["doubtful"] * 3
    assert [module.predict.rescore for module in from_dict(OLD).modules] == [None] * 4
    assert [module.start for module in from_dict(values).modules[2:]] == ["backbone"] * 2
    assert [module.start for module in recipe("best").modules[2:]] == ["before"] * 2


def test_recipes_are_values():
    assert Recipe() == recipe("paper") != recipe("best")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("best").name = "other"
    assert config.best() == config.best()


def test_best_cuts_masks_at_these_thresholds():
    """Of labels and of answers: `docs/studies.md` says what they do to the area that is passed on."""
    thresholds = [(m.label.threshold, m.predict.threshold) for m in recipe("best").modules]
    assert thresholds == [(0.35, 0.35), (0.4, 0.35), (0.42, 0.38), (0.25, 0.2)]
    assert {choice.threshold for m in recipe("paper").modules for choice in (m.label, m.predict)} == {None}


@pytest.mark.parametrize(
    "change",
    [
        "images.sides=-5", "images.sides=480,0", "images.test_side=1", "proposals.limit=-1", "proposals.side=0",
        "modules.1.schedule.lr=nan", "modules.2.schedule.steps=0", "modules.2.schedule.lr=inf",
        "modules.3.schedule.batch_size=0", "modules.*.schedule.decay=0.5:nan", "modules.4.predict.threshold=1",
        "modules.4.predict.nms=1.5", "modules.1.label.iterations=-1", "modules.2.rois=0", "modules.3.mask_width=0",
        "warm_up.momentum=2", "forward_backward.share=0", "modules.2.anchor_sides=0",
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_with_the_range(change: str) -> None:
    with pytest.raises(InputError, match=r"must be from .* to ") as refused:
        override(recipe("best"), [change])
    assert change.partition("=")[0].rsplit(".", 1)[1] in str(refused.value)


def test_a_number_out_of_its_range_in_a_file_is_refused() -> None:
    values = to_dict(recipe("demo"))
    values["modules"][1]["schedule"]["lr"] = float("nan")
    with pytest.raises(InputError, match="lr must be from"):
        from_dict(values)
