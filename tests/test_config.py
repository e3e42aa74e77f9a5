"""Recipes: single choices, round trips through JSON, and messages that say what would have been valid."""

from __future__ import annotations

import dataclasses
import json

import pytest

from labelpenet import config
from labelpenet.config import Recipe, from_dict, override, recipe, shorten, to_dict
from labelpenet.errors import InputError

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
    for part in dataclasses.fields(one):
        owner = getattr(one, part.name)
        if not dataclasses.is_dataclass(owner):
            continue
        for choice in dataclasses.fields(owner):
            assignment = f"{part.name}.{choice.name}={as_text(getattr(owner, choice.name))}"
            assert override(one, [assignment]) == one, assignment


def as_text(value) -> str:
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return str(value)


def test_the_paper_recipe_is_the_papers_schedule():
    paper = recipe("paper")
    assert paper.images.sides == (480, 576, 688, 864, 1024) and paper.images.longest == 1200
    assert paper.proposals.limit == 1600
    one = paper.schedule1
    assert (one.steps, one.lr, one.kind, one.momentum, one.weight_decay) == (50_000, 1e-3, "sgd", 0.9, 5e-4)
    assert one.decay == ((0.8, 0.1),) and one.batch_size == 2
    assert paper.schedule1 == paper.schedule2 == paper.schedule3 == paper.schedule4


def test_override_changes_one_choice_and_leaves_the_rest():
    before = recipe("paper")
    after = override(
        before,
        [
            "schedule2.steps=800",
            "images.sides=480,576",
            "images.flip=false",
            "images.test_side=320",
            "infer1.threshold=0.25",
            "schedule3.decay=0.5:0.1,0.9:0.01",
            "schedule3.kind=adamw",
        ],
    )
    assert after.schedule2.steps == 800
    assert after.images.sides == (480, 576) and after.images.flip is False and after.images.test_side == 320
    assert after.infer1.threshold == 0.25
    assert after.schedule3.decay == ((0.5, 0.1), (0.9, 0.01)) and after.schedule3.kind == "adamw"
    assert (after.schedule1, after.schedule4, after.infer2) == (before.schedule1, before.schedule4, before.infer2)
    assert override(after, ["images.test_side=none"]).images.test_side is None
    assert before == recipe("paper")


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps=3", "part.field=value"),
        ("schedule2.steps", "part.field=value"),
        ("schedul2.steps=3", "schedule2"),
        ("schedule2.step=3", "steps"),
        ("schedule2.kind=lion", "adamw"),
        ("schedule2.steps=many", "int"),
        ("schedule2.steps=none", "None"),
        ("schedule2.lr=fast", "float"),
        ("images.flip=perhaps", "true or false"),
        ("images.sides=480,big", "big"),
        ("images.sides=", "at least one"),
        ("schedule2.decay=0.8", "pairs"),
        ("name.x=3", "choose from"),
        ("classification.pool=mean", "align"),
        ("classification.attention=grad", "gradient"),
        ("detection.pool=mean", "align"),
        ("infer1.combine=sum", "product"),
        ("infer1.members=all", "suppressed"),
        ("infer1.box=masks", "proposal"),
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


def test_shorten_scales_every_schedule_and_keeps_one_step():
    one = recipe("best")
    half = shorten(one, 0.5)
    for number in range(6):
        before, after = getattr(one, f"schedule{number}"), getattr(half, f"schedule{number}")
        assert after.steps == round(before.steps / 2) and after.warmup == round(before.warmup / 2)
        assert dataclasses.replace(after, steps=before.steps, warmup=before.warmup) == before
    assert shorten(one, 1) == one
    assert shorten(one, 1e-9).schedule3.steps == 1
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


def test_choices_that_are_gone_are_read_where_they_did_nothing():
    values = to_dict(recipe("best"))
    old = values | {"classification": values["classification"] | {"form": "paper", "contrast": False}}
    assert from_dict(old) == recipe("best")
    old["detection"] = values["detection"] | {"extra_proposals": True}
    with pytest.raises(InputError, match="extra_proposals=True"):
        from_dict(old)


def test_a_choice_that_a_run_does_not_know_yet_is_that_of_its_recipe():
    values = to_dict(override(recipe("best"), ["images.sides=320", "schedule4.steps=7"]))
    del values["forward_backward"], values["images"]["flip"]
    assert from_dict(values) == override(recipe("best"), ["images.sides=320", "schedule4.steps=7"])


def test_recipes_are_values():
    assert Recipe() == recipe("paper") != recipe("best")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("best").name = "other"
    assert config.best() == config.best()
