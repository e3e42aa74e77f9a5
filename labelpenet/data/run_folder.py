"""The run folder: every path in it, whose it is, and which photographs it was made from.

It lies this low in the house because everyone reads from it: a network its weights, a report the instances.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from labelpenet.config import MODULES
from labelpenet.data.files import hash_file, hash_files, listing, locked, read_json, write_json, writing
from labelpenet.errors import InputError, told

_LOCK = ".lock"

TAGS, PIXELS = FITTED = ("tags", "pixels")
"""A student's linear classifiers, each in a file of its own (`models.tags`, `models.pixels`)."""


def facts(run: Path) -> Path:
    """Classes, backbone, recipe and all else that a resumed run must share."""
    return run / "run.json"


def photographs(run: Path) -> Path:
    """The content hash of each training photograph."""
    return run / "images.json"


def weights(run: Path, part: str) -> Path:
    """The weights of the stem or a module."""
    return run / "weights" / f"{part}.safetensors"


def instances(run: Path, module: str) -> Path:
    """What a module inferred for the training photographs."""
    return run / "instances" / f"{module}.json"


def labelled(run: Path) -> list[int]:
    """The numbers of the modules that have labelled the training photographs."""
    return [number for number in range(1, len(MODULES) + 1) if instances(run, f"module{number}").is_file()]


def review(run: Path) -> Path:
    """What a person said of the labels on the review page."""
    return run / "review.json"


def predictions(run: Path, split: str, number: int) -> Path:
    """What module ``number`` predicts for a held-out split."""
    return run / "predictions" / f"{Path(split).stem}-module{number}.json"


def origin(predictions: Path) -> Path:
    """What is written beside a predictions file about its making: a hash of all that it was made from, its own, and
    the content hash of each photograph and the `state` of the run."""
    return predictions.with_suffix(".made-from.json")


def features(run: Path) -> Path:
    """The folder of module 1's RoI features."""
    return run / "cache" / "features"


def checkpoints(run: Path, stage: str) -> Path:
    """The folder of a stage's checkpoints."""
    return run / "checkpoints" / stage


def tensorboard(run: Path, stage: str) -> Path:
    """The folder of a stage's scalars and pictures."""
    return run / "tensorboard" / stage


def metrics(run: Path) -> Path:
    """The rows of all stages."""
    return run / "metrics.jsonl"


def environment(run: Path) -> Path:
    """Versions, machine and command line."""
    return run / "environment.json"


def results(run: Path) -> Path:
    """What `measure` found."""
    return run / "results.json"


@contextlib.contextmanager
def claimed(run: Path) -> Iterator[None]:
    """The folder, made where it is missing, for this process alone; the claim ends with the process at the latest.
    `InputError`: it holds something else than a run, cannot be made, or another process works on it.
    """
    check_out(run, True)
    with writing(run, "choose another --out"):
        run.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        free = lock.enter_context(locked(run / _LOCK))
    with lock:
        if not free:
            raise InputError(f"{run}: another process is working on it; wait until it ends or choose another --out")
        yield


def check_out(run: Path, resume: bool) -> None:
    """`InputError` where a run cannot be written: the folder holds something else or, without ``resume``, a run."""
    with writing(run, "choose another --out"):
        inside = {path.name for path in run.iterdir()} if run.exists() else set()
    # a run that was killed before run.json had its name left these
    if inside - {_LOCK, f"{facts(run).name}.tmp"} and facts(run).name not in inside:
        raise InputError(f"{run}: is not empty and holds no run; choose another --out")
    if facts(run).name in inside and not resume:
        raise InputError(f"{run}: holds a run already; continue it with --resume or choose another --out")


def start_run(run: Path, given: Mapping[str, Any], resume: bool) -> None:
    """Writes the facts of a new run, or checks that the run there has the same; the caller has `claimed` the folder.
    `InputError`: there is a run and ``resume`` is not asked for, it has other facts, or its facts are damaged.
    """
    path = facts(run)
    if not path.is_file():
        write_json(path, given, "choose another --out", indent=1)
        return
    check_out(run, resume)
    check_same(run, {**given, **{key: given.get(key) for key in ("supervision", "proposals")}})


def check_same(run: Path, given: Mapping[str, Any]) -> None:
    """`InputError` where a run was started with other facts than those given, or its facts are damaged."""
    saved = read_facts(run)
    # where the images were read from may be spelt differently; which images they are may not differ
    # and a run on tags says nothing of its supervision, one on our own proposals nothing of those
    given = json.loads(json.dumps({**given, "source": saved.get("source")}))
    differing = [key for key in given if json.dumps(saved.get(key)) != json.dumps(given[key])]
    if differing:
        shown = [key for key in differing if key in ("backbone", "recipe")]
        old, new = ({key: one.get(key) for key in shown} for one in (saved, given))
        chosen = [change.removeprefix("recipe.") for change in changes(old, new)]
        which = f" ({listing(chosen, 3)})" if chosen else ""
        raise InputError(
            f"{run}: was started with another {', '.join(differing)}{which}; resume with the same settings or choose "
            "another --out"
        )


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In which values two configurations, as JSON holds them, differ: for each its key and both values, by key."""
    before, after = flat(saved), flat(now)
    missing = object()
    return [
        f"{key} was {before.get(key, 'not set')}, is {after.get(key, 'not set')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, missing) != after.get(key, missing)
    ]


def read_facts(run: Path) -> dict[str, Any]:
    """The facts of a run folder; `InputError` where it is none, or damaged."""
    path = facts(run)
    if not path.is_file():
        raise InputError(f"{run}: not a run folder (no {path.name}); give what labelpenet train wrote with --out")
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise InputError(f"holds a {type(found).__name__}")
    except InputError as error:
        line = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: damaged ({line}); train again into a new folder") from error
    return found


def state(run: Path) -> dict[str, str]:
    """What the run's network is now: content hashes of its facts and of each part's weights."""
    given = {name: value for name, value in read_facts(run).items() if name != "source"}
    files = sorted(weights(run, "stem").parent.glob("*.safetensors"))
    found = hashlib.blake2b(json.dumps(given).encode(), digest_size=16).hexdigest()
    return {"facts": found} | {path.stem: hash_file(path) for path in files}


def box_map_50(result: Mapping[str, Any]) -> Any:
    """Box mAP at IoU 0.5 of a module's entry in ``results.json``, None where there is none."""
    box = result.get("box") or {}
    return box.get("AP50", box.get("mAP"))  # by COCO's protocol mAP is the mean over IoU 0.5 to 0.95


def is_outdated(known: Any, now: Mapping[str, str], name: str) -> bool:
    """Whether a module (its number) or the student was another in the state ``known``; not where nothing is known."""
    parts = ("stem", *MODULES[: int(name)]) if name.isdigit() else (name, *FITTED)
    return isinstance(known, dict) and any(known.get(part) != now.get(part) for part in ("facts", *parts))


def up_to_date(run: Path, results: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What `measure` found of the network that the run holds now, and notes on the rest."""
    if results and "state" not in results:
        return results, ["results.json does not say which weights were measured; measure again if they are others now"]
    now, known = state(run), results.get("state")
    parts = {key: results[key] for key in ("train", "val") if isinstance(results.get(key), dict)}
    old = [name for name in parts.get("val", {}) if is_outdated(known, now, name)]
    if not old:
        return results, []
    kept = {key: {name: one for name, one in part.items() if name not in old} for key, part in parts.items()}
    of_module_1 = ("uncalibrated", "classification_mAP")
    rest = {key: one for key, one in results.items() if key not in of_module_1 or "1" not in old}
    names = listing(f"module {name}" if name.isdigit() else name for name in old)
    return {**rest, **kept}, [f"results.json: {names} had other weights when measured; left out, measure again"]


def others(run: Path, images: Mapping[str, Path]) -> list[str]:
    """Of photographs by id those that are not what the run was trained on under the same id, by content."""
    path = photographs(run)
    return differing(read_json(path) if path.is_file() else {}, images)


def differing(known: Mapping[str, str | None], images: Mapping[str, Path]) -> list[str]:
    """Of photographs by id those whose content is not what the hash ``known`` of the same id says, where it has one."""
    hashes = hash_files(file for name, file in images.items() if known.get(name))
    return [name for name, file in images.items() if hashes.get(file) not in (None, known.get(name))]


def check_own(run: Path, images: Mapping[str, Path]) -> None:
    """`InputError` where one of the `others` is among the photographs: the run's labels are not theirs."""
    if foreign := others(run, images):
        raise InputError(
            f"{run}: {len(foreign)} photographs have the names of those that it was trained on, but are others "
            f"({listing(foreign, 3)}); give the data that it was trained on"
        )


def check_photographs(run: Path, contents: Mapping[str, str | None]) -> str:
    """Compares the photographs with those that the run was started with, by content.

    As long as nothing is trained, other photographs are taken up: what is cached is named after their content.

    Args:
        contents: by image id the content's hash; None for a file that cannot be read.

    Returns:
        A note, empty where nothing has changed.

    Raises:
        InputError: photographs have changed and modules are trained on the old ones.
    """
    path = photographs(run)
    before = {}
    if path.is_file():
        said = f"{path}: damaged; delete it if the photographs are still those that the run was started with"
        with told(said, InputError):
            before = read_json(path)
    changed = [name for name, content in contents.items() if before and before.get(name) != content]
    trained = [one for one in (run / "weights").glob("*.safetensors") if one != weights(run, "stem")]
    if changed and (trained or any((run / "checkpoints").glob("*/*.pt"))):
        raise InputError(
            f"{run}: {len(changed)} photographs have changed since it was started ({listing(changed, 3)}) and modules "
            "are trained on the old ones; put those back to resume, or train into another --out"
        )
    if changed or not before:
        write_json(path, contents)
    return f"{len(changed)} photographs have changed ({listing(changed, 3)}): taken as they are now" if changed else ""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What nested objects, and lists of them (from 1), hold, by dotted name, in order."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            value = {str(number): one for number, one in enumerate(value, 1)}  # modules, as --set names them
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
