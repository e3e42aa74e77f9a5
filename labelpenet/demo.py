"""The demo: the whole cascade on generated scenes, along the road that photographs take, in minutes."""

import logging
import time
from pathlib import Path

from labelpenet import config
from labelpenet.config import CascadeOptions, Recipe
from labelpenet.data import run_folder
from labelpenet.data.files import read_json, unfinished
from labelpenet.data.scenes import write_scenes
from labelpenet.errors import InputError
from labelpenet.formats import open_annotated, open_tagged
from labelpenet.report import write_report
from labelpenet.training.measure import measure_run, render
from labelpenet.training.run import train_run

_log = logging.getLogger(__name__)
TRAIN, HELD_OUT = 200, 60
BACKBONE = "tiny"


def run_demo(
    out: Path, seed: int = 0, recipe: Recipe | None = None, train: int = TRAIN, held_out: int = HELD_OUT
) -> str:
    """Writes scenes, trains the four modules on their tags, measures them on held-out scenes and writes the report.

    ``OUT/scenes`` holds the scenes, ``OUT/run`` the run, ``OUT/cache`` the proposals, ``OUT/report.html`` the report.
    A demo that was interrupted continues; of a finished one only the results are shown. Nothing is downloaded.

    Args:
        seed: of scenes and training.
        recipe: None for the recipe ``demo``.
        train, held_out: numbers of training and held-out scenes.

    Returns:
        The table, where the report is, and how long it took.

    Raises:
        InputError: ``out`` holds something else, or a demo of another seed or size.
    """
    began = time.monotonic()
    run, report = out / "run", out / "report.html"
    inside = set(out.iterdir()) if out.is_dir() else set()
    if inside - {unfinished(out / "scenes")} and not (out / "scenes").is_dir():
        raise InputError(f"{out}: holds something else than a demo; choose another --out")
    year = write_scenes(out / "scenes", train, held_out, seed=seed)
    if report.is_file() and run_folder.results(run).is_file():
        results = read_json(run_folder.results(run))
        return f"{render(results)}\n{report}: finished before; remove {out} to start anew"
    if run_folder.facts(run).is_file():
        _log.info("%s: continued", run)
    train_run(
        open_tagged(year, "train"),
        run,
        config.recipe("demo") if recipe is None else recipe,
        backbone=BACKBONE,
        source={"data": str(year), "split": "train"},
        options=CascadeOptions(run_folder.facts(run).is_file(), seed, device="cpu", cache=out / "cache"),
    )
    table = measure_run(run, year, "val", "train", device="cpu", cache=out / "cache")
    write_report(run, report, open_annotated(year, "train"), open_annotated(year, "val"), images=4)
    minutes = (time.monotonic() - began) / 60
    return f"{table}\n{report}: open it in a browser\ndone in {minutes:.1f} minutes"
