"""From recipe `paper` to `best`, one choice at a time: what each is worth, by the figures of modules 2 and 4.

    python benchmarks/ablation.py VOCdevkit/VOC2012 --out runs/ablation --classes cat,cow,dog --shorten 0.25

Each rung is the one before with some choices of `best` instead of the paper's, trained from tags into a run folder of
its own and measured on ``--held-out``, which should be a split that nothing else is chosen on. The first rung is the
paper's at the size of image, number of proposals and length of schedule of `best`, for as it stands it takes days
without a GPU; the last one is `best`. What is trained or measured already is not done again. The table is printed after
each rung, and kept in ``OUT/ablation.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from labelpenet import config
from labelpenet.config import CascadeOptions, Recipe
from labelpenet.data.files import read_json, write_json
from labelpenet.errors import InputError
from labelpenet.evaluation import evaluate
from labelpenet.formats import open_annotated, open_tagged
from labelpenet.training.inferred import Inferred
from labelpenet.training.predict import Predictor
from labelpenet.training.run import train_run

RUNGS: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (name, frozenset(fields.split()))
    for name, fields in (
        ("the paper's, in the size and length of `best`",
         "name images proposals steps batch_size warm_up forward_backward"),
        ("AdamW and Adam, warm-up, clipping", "schedule"),
        ("CRF: narrower, weaker, on a small canvas; small components dropped",
         "side sxy_bilateral srgb compat_bilateral min_component"),
        ("a threshold instead of the background map", "threshold"),
        ("RoIAlign, smaller anchors, fewer RoIs and RPN proposals, cells",
         "pool anchor_sides cells rois rpn_pre_nms_top_n_train rpn_pre_nms_top_n_test rpn_post_nms_top_n_train "
         "rpn_post_nms_top_n_test mask_width mask_depth"),
        ("module 1: RoI head frozen, Gaussian initialiser", "freeze_head initialiser"),
        ("gradient instead of excitation backprop", "attention max_attention"),
        ("heat-maps of all proposals, mean instead of product, all maps of a class", "heat combine members"),
        ("a margin around the box where its mask is predicted", "mask_margin"),
        ("masks from a feature pyramid, RoIs of 8 x 8 cells in modules 3 and 4", "pyramid roi_cells"),
        ("modules 3 and 4 begin with the weights of the one before", "start"),
        ("vote", "vote"),
        ("labels and answers: number, mask NMS, scores that know the mask, box of the mask, doubtful ones dropped",
         "label predict"),
        ("answers weighed by what the whole photograph shows", "tag_power"),
    )
)  # fmt: skip
"""Each rung's name, and the fields, wherever they stand in a recipe, that it takes from `best`."""

KEYS = ("box mAP@.5", "mask mAP@.5", "mask mAP@.75", "mIoU")


def take(own: Any, other: Any, fields: Collection[str]) -> Any:
    """A recipe, or a part of it, with the fields of these names as ``other`` has them."""
    if isinstance(own, tuple) and own and dataclasses.is_dataclass(own[0]):
        return tuple(take(one, two, fields) for one, two in zip(own, other, strict=True))
    if not dataclasses.is_dataclass(own) or isinstance(own, type):
        return own
    changes = {
        one.name: getattr(other, one.name)
        if one.name in fields
        else take(getattr(own, one.name), getattr(other, one.name), fields)
        for one in dataclasses.fields(own)
    }
    return dataclasses.replace(own, **changes)


def ladder(shorten: float) -> list[tuple[str, Recipe]]:
    """Every rung's name and recipe."""
    best, recipe = config.shorten(config.recipe("best"), shorten), config.recipe("paper")
    rungs = []
    for name, fields in RUNGS:
        recipe = take(recipe, best, fields)
        rungs.append((name, recipe))
    return rungs


def measure(
    run: Path, data: Path, split: str, classes: Sequence[str], device: str, cache: Path | None
) -> dict[str, Any]:
    """Figures of modules 2 and 4 on a split, fractions in [0, 1] by `KEYS`."""
    held_out, predictor = open_annotated(data, split, classes), Predictor(run, device)
    truths, figures = held_out.readable_truths()[0], {}
    for module in (2, 4):
        rows, sizes = {}, {}
        skipped: list[Any] = []
        for image, found in predictor.run(held_out.tagged.images, module, skipped):
            rows[image.id] = found.to_coco(image.id, list(range(1, len(classes) + 1)))
            sizes[image.id] = found.image_size
        result = evaluate(Inferred(rows, sizes, len(classes)), truths, list(classes), "voc12")
        mask = result.get("mask", {})
        values = (
            result["box"]["mAP"],
            mask.get("mAP@0.5"),
            mask.get("mAP@0.75"),
            result.get("semantic", {}).get("mIoU"),
        )
        figures[f"module {module}"] = dict(zip(KEYS, values, strict=True))
    return figures


def table(results: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """The rungs measured so far as markdown, in percent: of module 2 and of module 4 the figures in `KEYS`' order."""

    def cell(figures: dict[str, float | None]) -> str:
        return " / ".join("-" if value is None else f"{100 * value:.1f}" for value in (figures[key] for key in KEYS))

    lines = [f"| one choice at a time | module 2: {' / '.join(KEYS)} | module 4 |", "|---|---|---|"]
    lines += [f"| {name} | {cell(one['module 2'])} | {cell(one['module 4'])} |" for name, one in results.items()]
    return "\n".join(lines)


def climb(one: argparse.Namespace) -> None:
    """Trains and measures every rung that is not measured yet.

    Raises:
        InputError: data, weights or a run folder cannot be used.
    """
    kept = one.out / "ablation.json"
    results = read_json(kept) if kept.is_file() else {}
    images = open_tagged(one.data, one.split, one.classes.split(",") if one.classes else None)
    for number, (name, recipe) in enumerate(ladder(one.shorten)):
        run = one.out / f"rung{number}"
        if name not in results:
            options = CascadeOptions(resume=run.is_dir(), seed=one.seed, device=one.device, cache=one.cache)
            train_run(images, run, recipe, backbone=one.backbone, weights=one.weights, options=options)
            results[name] = measure(run, one.data, one.held_out, images.classes, one.device, one.cache)
            write_json(kept, results, indent=1)
        print(table(results), flush=True)


def main() -> int:
    """Parses and climbs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--split", default="train")
    parser.add_argument("--held-out", default="val", help="split that is measured on")
    parser.add_argument("--classes")
    parser.add_argument("--shorten", type=float, default=1.0, help="of the schedule of `best`")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--cache", type=Path, help="folder of the proposals' cache")
    try:
        climb(parser.parse_args())
    except (InputError, KeyboardInterrupt) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
