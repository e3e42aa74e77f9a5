"""The report of a run: one HTML file that needs nothing but itself."""

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup

from labelpenet.data import run_folder
from labelpenet.data.dataset import AnnotatedImages, TaggedImage, TaggedImages
from labelpenet.data.files import hash_file, read_json, read_text, write_text
from labelpenet.engine.log import Row, read_metrics
from labelpenet.errors import InputError, collected
from labelpenet.evaluation import Table, cascade_table, summary_table
from labelpenet.formats import read_predictions
from labelpenet.instances import MIN_SCORE, Instances
from labelpenet.models.cascade import MODULES, read_run
from labelpenet.models.student import KIND as STUDENT
from labelpenet.models.student import Student, load
from labelpenet.progress import Progress
from labelpenet.report.plots import Curves, curves, loss_plot, number_of
from labelpenet.report.strips import Panel, Source, Strip, choose_images, make_short_strip, make_strip, worst_images
from labelpenet.training.inferred import read_inferred
from labelpenet.visualize import encode_picture

T = TypeVar("T")
S = TypeVar("S")
Found = dict[int, Mapping[str, Instances]]  # by number of a module and image id

_PURPOSES = (
    "multi-label classification, calibrated",
    "object detection, calibrated",
    "instance refinement",
    "instance segmentation",
)
_MEANINGS = {
    "train CorLoc": "training images whose top box of a tagged class overlaps an object of it by IoU 0.5 or more",
    "box mAP": "average precision of boxes at IoU 0.5, mean over classes, held-out images",
    "mask mAP .25": "average precision of masks at IoU 0.25: roughly the right place",
    "mask mAP .5": "average precision of masks at IoU 0.5: most of the object",
    "mask mAP .75": "average precision of masks at IoU 0.75: close outlines",
    "ABO": "each true object's best IoU with a mask of its class, whatever its score; mean over objects, then classes",
    "mIoU": "IoU of the painted class map, mean over background and classes",
}
_COCO = {"box mAP": "COCO's average precision of boxes, mean over IoU 0.5 to 0.95 and classes, held-out images"}
_LEARNT_FROM = {
    "labels": "the labels of a run on image tags, or of a file",
    "full": "true boxes and masks, as a yardstick for what tags can reach",
    "mixed": "image tags and, where they are known, true boxes and masks",
}
_BYTES = 13_000_000  # of pictures; with the rest the file stays below 15 MB


@dataclass(frozen=True)
class Facts:
    """What a run folder holds: its JSON files (empty where they are missing), the numbers of the modules that are
    trained and of those that have labelled the training images, and a line for each thing that is not there."""

    run: dict[str, Any]
    environment: dict[str, Any]
    results: dict[str, Any]
    trained: tuple[int, ...]
    labelled: tuple[int, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Strips under a heading (with ``key`` as its anchor) and what says how they were chosen."""

    key: str
    title: str
    lead: str
    strips: tuple[Strip, ...]


def write_report(
    run: Path | str,
    out: Path | str | None = None,
    data: TaggedImages | AnnotatedImages | None = None,
    held_out: TaggedImages | AnnotatedImages | None = None,
    images: int = 6,
    predictions: Path | None = None,
) -> Path:
    """Writes the report of a run, finished or not: what is missing is named in it.

    Numbers, losses and labels are those of the run folder; so are predictions of held-out images, where
    ``RUN/predictions`` has them. Everything else is inferred now, a few seconds a photograph on a CPU.

    Args:
        out: the file to write; ``RUN/report.html`` if None.
        data, held_out: the training photographs with their tags, and others; each part is left out if None. Annotation,
            where they have it, is only drawn and measured.
        images: how many strips of each split, and how many worst images.
        predictions: what the run's last module found in the held-out images, as `read_predictions` takes it, in place
            of ``RUN/predictions``.

    Raises:
        InputError: no run folder, predictions that cannot be used, or the file cannot be written.
    """
    run = Path(run)
    facts = gather(run)
    problems: list[str] = []
    if predictions is not None and (held_out is None or not facts.trained):
        raise InputError(f"{predictions}: is of no held-out images of a trained run; check the run, --data and --split")
    network = next(iter(_made(load, [run] if facts.trained else [], problems)), None)
    classes = tuple(facts.run["classes"])
    sources = []
    for name, split in (("training", data), ("held-out", held_out)):
        given, read = (split.tagged, split.read) if isinstance(split, AnnotatedImages) else (split, None)
        if given is None:
            problems.append(f"{name} images: the data was not given, so no photograph of them is shown")
        elif given.classes != classes:
            problems.append(f"{name} images: their classes are not those of the run, so none of them is shown")
        else:
            training = name == "training"
            given = _own(run, given, problems) if training else given
            if training:
                found = _labels(run, facts, given, problems)
            elif predictions is None:
                found = _predictions(run, facts, given, problems)
            else:
                found = {facts.trained[-1]: _given(predictions, given, problems)}
            used = training and "supervision" in facts.run
            proposed = "proposals" in facts.run
            if training and proposed:
                problems.append(
                    "training images: the run had another tool's proposals; these and module 1's maps are left out"
                )
            sources.append(Source(given, network, facts.trained, found, read, training, used, proposed))
            if read is None:
                problems.append(f"{name} images: no annotation was given, so their true objects are not shown")
    sources = [replace(source, side=_panel_side(images * len(sources))) for source in sources]
    chosen = [choose_images(source.images, images) for source in sources]
    with Progress("report", sum(map(len, chosen)), 0) as progress:
        sections = [
            _strips(source, some, problems, progress, sum(map(len, chosen[:place])))
            for place, (source, some) in enumerate(zip(sources, chosen, strict=True))
        ]
    measurable = [source for source in sources if source.found and source.truth is not None]
    if measurable:  # held-out images come last, and are the better measure
        sections.append(_worst(measurable[-1], images, problems))
    return write_text(Path(out) if out is not None else run / "report.html", _render(run, facts, sections, problems))


def gather(run: Path) -> Facts:
    """Reads what the run folder holds; `InputError` where it is none (no readable ``run.json``)."""
    facts = read_run(run)
    missing: list[str] = []
    if facts.get("kind") == STUDENT:
        trained: tuple[int, ...] = (len(MODULES),) if run_folder.weights(run, STUDENT).is_file() else ()
        labelled: tuple[int, ...] = ()
        if not trained:
            missing.append("the student is not trained yet; go on with labelpenet distill ... --resume")
    else:
        trained = tuple(k for k, name in enumerate(MODULES, 1) if run_folder.weights(run, name).is_file())
        labelled = tuple(run_folder.labelled(run))
        last = len(MODULES)
        for number in (last,) if facts.get("supervision") == "full" else range(1, last + 1):
            name = MODULES[number - 1]
            if number not in trained:
                missing.append(f"module {number} ({name}) is not trained yet; go on with labelpenet train ... --resume")
            elif number not in labelled:
                missing.append(f"module {number} ({name}) is trained but has not labelled all training images yet")
    environment = _optional(run_folder.environment(run), "the environment of the run is not known", missing)
    results, notes = run_folder.up_to_date(
        run, _optional(run_folder.results(run), "the run is not measured yet", missing)
    )
    missing += notes
    if results.get("trained_on"):
        missing.append(
            f"{results['trained_on']} of the photographs that the run was measured on are no held-out ones: it was "
            "trained on them"
        )
    return Facts(facts, environment, results, trained, labelled, tuple(missing))


def marked(table: Table) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The rows of a table as text, each number with whether it is the best of its column, where there are several."""
    best = [
        max((one for one in column if one is not None), default=None)
        for column in zip(*(values for _, values in table.rows), strict=True)
    ]
    several = len(table.rows) > 1

    def cell(value: float | None, top: float | None) -> tuple[str, bool]:
        return ("–", False) if value is None else (f"{value:.1f}", several and value == top)

    return [(name, list(map(cell, values, best))) for name, values in table.rows]


def module_table(results: Mapping[str, Any]) -> Table | None:
    """The table per module from ``results.json``, with a row for each module that is missing; None if nothing is there.

    Module 1 before calibration, where it was measured, is the first row.
    """
    train, val = _by_module(results.get("train")), _by_module(results.get("val"))
    if not train and not val:
        return None
    if STUDENT in val:
        return cascade_table({}, {STUDENT: val[STUDENT]})
    names = {str(k): f"{k}  {purpose}" for k, purpose in enumerate(_PURPOSES, 1)}
    before = results.get("uncalibrated")
    if isinstance(before, dict) and before:
        train, val = ({"0": before.get(split) or {}} | of for split, of in (("train", train), ("val", val)))
        names = {"0": "1  multi-label classification, before calibration"} | names
    return cascade_table(*({name: of.get(number, {}) for number, name in names.items()} for of in (train, val)))


def class_table(results: Mapping[str, Any]) -> Table | None:
    """Class by class, what the last measured module reaches on held-out images; None if nothing is measured."""
    val = {number: result for number, result in _by_module(results.get("val")).items() if result}
    if not val:
        return None
    number = max(val)
    title = f"{number if number == STUDENT else f'module {number}'} class by class on held-out images, in %"
    return summary_table(val[number], title)


def _by_module(part: Any) -> dict[str, Any]:
    return {str(key): value for key, value in part.items() if isinstance(value, dict)} if isinstance(part, dict) else {}


def _optional(path: Path, what: str, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        missing.append(f"{path.name} is not there: {what}")
        return {}
    try:
        content = read_json(path)
    except InputError as error:
        missing.append(str(error))
        return {}
    if not isinstance(content, dict):
        missing.append(f"{path.name} holds no object: {what}")
        return {}
    return content


def _made(make: Callable[[T], S], items: Iterable[T], problems: list[str]) -> list[S]:
    """What ``make`` makes of each item; where it cannot, ``problems`` says why."""
    found = []
    for item in items:
        with collected(problems):
            found.append(make(item))
    return found


def _own(run: Path, images: TaggedImages, problems: list[str]) -> TaggedImages:
    """The images without those that are others than the run was trained on under the same names."""
    others = run_folder.others(run, {image.id: image.path for image in images.images})
    if others:
        problems.append(f"training images: {len(others)} are others than those of the same names then; not shown")
    return images.where(lambda image: image.id not in others)


def _labels(run: Path, facts: Facts, images: TaggedImages, problems: list[str]) -> Found:
    """What each module passed on for the training images."""

    def read(number: int) -> tuple[int, Mapping[str, Instances]]:
        return number, read_inferred(run, f"module{number}", len(images.classes))

    return dict(_made(read, facts.labelled, problems))


def _predictions(run: Path, facts: Facts, images: TaggedImages, problems: list[str]) -> Found:
    """What each module was found to predict for the held-out split when the run was measured; nothing where it or the
    photograph is another now."""
    now, student = run_folder.state(run), facts.run.get("kind") == STUDENT
    paths = {number: run_folder.predictions(run, str(facts.results.get("split")), number) for number in facts.trained}

    def read(number: int) -> tuple[int, Mapping[str, Instances]]:
        path = run_folder.origin(paths[number])
        found = read_json(path) if path.is_file() else None
        made = found if isinstance(found, dict) else {}
        replaced = made.get("content") not in (None, hash_file(paths[number]))
        if replaced or run_folder.is_outdated(made.get("state"), now, STUDENT if student else str(number)):
            raise InputError(f"{paths[number]}: not of the run's present weights; predicted anew, measure again")
        others = run_folder.differing(made.get("photographs") or {}, {image.id: image.path for image in images.images})
        if others:
            whose = "the student" if student else f"module {number}"
            problems.append(
                f"held-out images: {len(others)} are others than those of the same names that {whose} was "
                "measured on; its predictions of those are made now, and not measured"
            )
        same = images.where(lambda image: image.id not in others)
        return number, read_predictions(paths[number], same, images.classes)

    return dict(_made(read, (number for number, path in paths.items() if path.is_file()), problems))


def _given(path: Path, images: TaggedImages, problems: list[str]) -> Mapping[str, Instances]:
    """What a file, or a folder of parts, says of the held-out images."""
    found = read_predictions(path, images, images.classes)
    problems.append(
        f"held-out images: what was found is taken from {path}; that this run's weights made it is not checked"
    )
    if absent := sum(image.id not in found for image in images.images):
        problems.append(f"held-out images: {absent} are not in {path}; those are predicted now, and not measured")
    return found


def _strips(
    source: Source, chosen: Sequence[TaggedImage], problems: list[str], progress: Progress, done: int
) -> Section:
    strips = _made(partial(make_strip, source), progress.tracked(chosen, done), problems)
    if source.training and not source.found and (source.network is None or isinstance(source.network, Student)):
        lead = "The photographs and, where they are known, their true objects: nothing has labelled them here."
    elif source.training:
        lead = "What the modules passed on: instances of the image's tags alone, all of them drawn."
    else:
        lead = (
            f"The network sees the photograph alone, no tags. Instances with a score of {MIN_SCORE} or more are drawn."
        )
    lead += " The images are the first of each class in the data set, then the second, and so on: none was picked."
    name = "training" if source.training else "held-out"
    return Section(name, f"{name.capitalize()} images", lead, tuple(strips))


def _worst(source: Source, count: int, problems: list[str]) -> Section:
    assert source.truth is not None
    number = max(source.found)
    worst = worst_images(source.images.images, source.found[number], source.truth, count)
    strips = _made(lambda one: make_short_strip(source, one[0], number, one[1]), worst, problems)
    whose = "the student" if isinstance(source.network, Student) else f"module {number}"
    lead = (
        f"The {'training' if source.training else 'held-out'} images in which {whose} does worst: those with "
        "the lowest mean, over their true objects, of the best IoU with an instance of the object's class."
    )
    return Section("worst", "Worst images", lead, tuple(strips))


def _panel_side(strips: int) -> int:
    """Longer side of the panels in pixels: at most 420, and less where many would make the file too large."""
    area = _BYTES * 3 / 4 / (20 * max(1, strips)) / 0.23  # base64 adds a third; 20 panels a strip, 0.23 bytes a pixel
    return max(120, min(420, round(area**0.5)))


def _render(run: Path, facts: Facts, sections: Sequence[Section], problems: Sequence[str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = _picture
    recipe = facts.run["recipe"]
    script = read_text(Path(__file__).parent / "report.js")
    rows = read_metrics(run)
    stages = curves(rows)
    return environment.get_template("report.html").render(
        folder=run.resolve().name,
        learnt=_learnt(facts.run["classes"]),
        trained=_trained(facts),
        learnt_from=_LEARNT_FROM.get(facts.run.get("supervision", "tags"), "image tags alone"),
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        missing=[*facts.missing, *problems],
        table=module_table(facts.results),
        student=facts.run.get("kind") == STUDENT,
        by_class=class_table(facts.results),
        split=facts.results.get("split"),
        protocol=facts.results.get("protocol"),
        key_figures=_key_figures(facts),
        stages=[(one, Markup(loss_plot(one)), _stage_line(one)) for one in stages],
        drift=_drift(rows),
        labels=_label_counts(run, facts),
        sections=sections,
        facts=flatten({key: value for key, value in facts.run.items() if key != "recipe"}),
        environment=flatten(facts.environment),
        recipe_name=recipe.get("name", "") if isinstance(recipe, dict) else "",
        recipe=_recipe_parts(recipe),
        written=time.strftime("%Y-%m-%d %H:%M"),
        marked=marked,
        meanings=_MEANINGS | (_COCO if facts.results.get("protocol") == "coco" else {}),
    )


def _picture(panel: Panel) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(encode_picture(panel.picture, quality=78)).decode("ascii")


def _key_figures(facts: Facts) -> list[tuple[str, str]]:
    run, results = facts.run, facts.results
    figures = [
        ("student", "torchvision's Mask R-CNN")
        if run.get("kind") == STUDENT
        else ("modules trained", f"{len(facts.trained)} of {len(MODULES)}"),
        ("training images", str(run.get("images", "?"))),
        ("classes", str(len(run["classes"]))),
        ("backbone", str(run["backbone"])),
        ("seed", str(run.get("seed", "?"))),
    ]
    measured = {number: result for number, result in _by_module(results.get("val")).items() if result}
    last = max(measured, default="")
    best = measured.get(last, {})
    masks = (best.get("mask") or {}).get("mAP@0.5")
    for title, value in (("mask mAP .5", masks), ("box mAP .5", run_folder.box_map_50(best))):
        if isinstance(value, (int, float)):
            whose = "the student" if last == STUDENT else f"module {last}"
            figures.insert(0, (f"{title} of {whose}, %", f"{100 * value:.1f}"))
    accuracy = results.get("classification_mAP")
    if isinstance(accuracy, (int, float)):
        figures.insert(2, ("classification mAP, %", f"{100 * accuracy:.1f}"))
    return figures


def _learnt(classes: Sequence[str], limit: int = 6) -> str:
    """The classes as a title: ``cat, dog and sheep``."""
    names = list(classes) if len(classes) <= limit else [*classes[: limit - 1], f"{len(classes) - limit + 1} more"]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _trained(facts: Facts) -> str:
    """Which modules on which backbone, in words."""
    numbers = facts.trained
    if facts.run.get("kind") == STUDENT:
        return f"a student on {facts.run['backbone']}{'' if numbers else ', not trained yet'}"
    if not numbers:
        return f"no module trained yet, backbone {facts.run['backbone']}"
    several = f"modules {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"module {numbers[0]}"
    return f"{several} on {facts.run['backbone']}"


def _stage_line(one: Curves) -> str:
    parts = [f"{int(one.steps[-1])} steps"]
    if one.last is not None:
        parts.append(f"loss {one.last:.3g} over the last tenth")
    if one.images_per_s:
        parts.append(f"{one.images_per_s:.3g} images/s")
    return ", ".join(parts)


def _drift(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """How far the labels of modules 2 to 4 have left the cascade's: each time the step, then module by module."""
    names = [[f"drift/module{number}_{key}" for key in ("area", "number", "agreement")] for number in (2, 3, 4)]
    return [
        (str(row["step"]), *(" / ".join(f"{number_of(row.get(name)):.2f}" for name in own) for own in names))
        for row in rows
        if any(key.startswith("drift/") for key in row) and "step" in row
    ]


def _label_counts(run: Path, facts: Facts) -> list[tuple[str, str, str, str]]:
    """For each module that labelled the training images: its number, images covered, instances, mean weight."""
    rows = []
    for number in facts.labelled:
        try:
            content = read_json(run_folder.instances(run, f"module{number}"))
            scores = [float(row["score"]) for row in content["annotations"]]
            covered = len({row["image_id"] for row in content["annotations"]})
        except (InputError, KeyError, TypeError, ValueError):  # a damaged file is named where it is read for the strips
            continue
        mean = f"{sum(scores) / len(scores):.2f}" if scores else "–"
        rows.append((f"module {number}", str(covered), str(len(scores)), mean))
    return rows


def flatten(content: Any) -> list[tuple[str, str]]:
    """Nested dictionaries, and lists of them (from 1), as (dotted name, value as text) pairs, in order."""
    return [(name, _value(value)) for name, value in run_folder.flat(content).items()]


def _recipe_parts(recipe: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """The parts of a recipe, each a table of its own."""
    parts = dict(recipe) if isinstance(recipe, Mapping) else {}
    modules = parts.pop("modules", None)
    parts |= {f"module {number}": one for number, one in enumerate(modules if isinstance(modules, list) else [], 1)}
    return [(str(key), flatten(value)) for key, value in parts.items() if isinstance(value, Mapping)]


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Iterable):
        return ", ".join(_value(one) if not isinstance(one, (list, tuple)) else json.dumps(one) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
