"""Recipes as earlier versions wrote them into run.json: in 0.1 schedules and calibrations stood beside the modules."""

from collections.abc import Mapping, Sequence
from typing import Any

# Choices that are gone, and the only value of each that can still be followed.
_GONE = {
    "form": "paper", "contrast": False, "score": "softmax", "extra_proposals": False, "weight": "score",
    "affiliated": True,
}  # fmt: skip
# Choices that did not exist yet, and what was done then.
_BEFORE = {"keep": 0.0, "nested": None, "vote": False, "rescore": None, "empty": "proposal"}
_BEFORE_OF_MODULE_1 = {"tag_power": 0.0}
_BEFORE_OF_MASKS = {"start": "backbone", "mask_margin": 0.0, "pyramid": False, "roi_cells": 14}
_RENAMED = {"background": "threshold", "part": "min_component", "duplicate": "mask_nms"}


def modernise(old: dict[str, Any], known: Sequence[tuple[set[str], set[str]]]) -> dict[str, Any]:
    """The values of `config.to_dict` that say what those of version 0.1 say, but for choices that it did not know.

    Args:
        old: what run.json holds.
        known: for each module the choices that it has, and those of its calibration.

    Raises:
        ValueError: a choice that is gone did something; KeyError: it is no such recipe.
    """
    for part in old.values():
        for key, value in part.items() if isinstance(part, dict) else ():
            if key in _GONE and value != _GONE[key]:
                raise ValueError(f"{key}={value} is no choice any more")
    modules = []
    for number, (choices, calibration) in enumerate(known, 1):
        own = dict(old[("classification", "detection", "segmentation", "segmentation")[number - 1]])
        label = _competing(old[f"infer{number}"])
        predict = _competing(old.get(f"predict{number}", old[f"infer{number}"] | {"joint": False}))
        if number == 1:
            own |= {"heat": "all", "initialiser": "gaussian"}
        else:
            own |= {"rpn_pre_nms_top_n_train": 2000, "rpn_pre_nms_top_n_test": 1000}
            own |= {"score_threshold": predict["score_threshold"]}
            own |= dict.fromkeys(("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test"), own["rpn_proposals"])
            if own.get("freeze_head"):
                raise ValueError("a frozen RoI head is no choice of modules 2 to 4 any more")
        renamed = _RENAMED | {"attended": "max_attention" if number < 3 else "max_masks"}
        parts = {
            name: {new: value for key, value in part.items() if (new := renamed.get(key, key)) in calibration}
            for name, part in (("label", label), ("predict", predict))
        }
        own = {key: value for key, value in own.items() if key in choices}
        modules.append({**own, "schedule": old[f"schedule{number}"], **parts})
    together = {key: old[key] for key in ("name", "images", "proposals")}
    learning = {**old["forward_backward"], "schedule": old["schedule5"]}
    return {**together, "warm_up": old["schedule0"], "modules": modules, "forward_backward": learning}


def _competing(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """A calibration of a time when ``joint`` said whether all instances compete for pixels, or none do."""
    own = dict(calibration)
    return {"compete": "instances" if own.pop("joint") else "background", **own} if "joint" in own else own


def completed_modules(modules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The modules as they are written now, of a time when a module had one choice of a vote, for its predictions, or
    none of what a choice above says."""
    found = []
    for number, module in enumerate(modules, 1):
        before = _BEFORE_OF_MODULE_1 if number == 1 else _BEFORE_OF_MASKS if "mask_width" in module else {}
        own = {**before, **module}
        voted = {"vote": own.pop("vote")} if "vote" in own else {}
        own["label"] = _BEFORE | _competing(own["label"])
        own["predict"] = _BEFORE | voted | _competing(own["predict"])
        found.append(own)
    return found


def inferred_second_stage(learning: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of forward-backward learning from a time when it had no validated labels, and ``ema`` was a decay."""
    if "ema" not in learning:
        return dict(learning)
    own = dict(learning)
    decay, updates = own.pop("ema"), own["schedule"]["steps"] * (2 if own["phases"] == "both" else 1)
    share = None if decay is None else min(1.0, max(1e-6, decay**updates))
    return {**own, "labels": "inferred", "drift": None, "share": share}
