"""Hostile values for every option, hostile files in every place: one line and exit status 2, or they are harmless.

Every command is called in this process on a small run, data set and predictions, of which one or two arguments are
replaced: first each alone by each hostile value, in a random order, then pairs. A refused command must leave everything
as it was; an accepted one must have been given numbers within their ranges. ``LABELPENET_FUZZ=5000 pytest -m slow
tests/test_cli_fuzz.py`` tries so many a command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import shutil
import stat
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labelpenet import cli
from labelpenet.data.scenes import write_scenes
from labelpenet.formats import open_tagged
from labelpenet.training import distill, pretrain
from tests.formats.test_reader_fuzz import TOKENS, deadline, mutated
from tests.students import random_run

MANY = int(os.environ.get("LABELPENET_FUZZ", "400"))
VALUES = (
    *("nan", "inf", "-inf", "-1", "0", "1", "0.5", "1e999", "1000000", str(10**40), "", " ", ",", "a,,b", "x\0y"),
    *("\u2603", "../../x", "/proc/self/mem", "x" * 5000, "--help-me", "%s%n", "$(false)", "\x1b[2J", "none", "True"),
    *("0/0", "3/2", "1/0", "-1/2", "1/2", "HxW", "32x32", "0x0", "99999999x32", "timm/x", "\udcff", "~", "ball,ball"),
    *("9" * 5000, "1e-400", "-0.0", "0x10", "1_000", "1e3", "1,5", "0.1.2", "\u0663", "\u22125", "\u00b2", " 5", "+5"),
    *("null", "{}", "[]", "a\nb", "a\r\x1b[1Ab", "e\u0301", "\u202egpj.exe", "file:///x", "--", "-", ".", ".."),
)  # fmt: skip
SETTINGS = (
    *("images.sides=-5", "modules.9.rois=1", "modules.*.schedule.lr=nan", "=", "a=b=c", "proposals.limit=-1"),
    *("modules.2.schedule.steps=0", "schedule.steps=nan", "modules.1.label.side=1e9", "images.test_side=99999999999"),
    *("modules.*.anchor_sides=", "modules.*.anchor_sides=0,0", "forward_backward.schedule.steps=-1", "images.flip=7"),
    *("network.rois=0", "network.width=-1", "noise.ema=2", "modules.1.label.iterations=-3", "__class__=x"),
    *("images=1", "modules=1"),
)  # fmt: skip
CONTENTS = {
    "empty": b"", "zeros": bytes(1000), "binary": bytes(range(256)) * 4, "nested.json": b"[" * 100_000,
    "list.json": b'[{"image_id": 1}]', "numbers.json": b'{"images": [{"id": 1e400}], "annotations": NaN}',
    "tags.csv": b"\xff\xfe,\n\0", "a.jpg": b"\xff\xd8\xff\xe0JFIF", "a.npz": b"PK\x03\x04",
    "a.safetensors": b"\xff" * 9,
    "a.pth": b"PK\x03\x04" + bytes(99), "a.pkl": b"cos\nsystem\n(S'false'\ntR.", "part-0.jsonl": b'{"x": ',
    "part-1.jsonl": b'{"labelpenet": "part"}\n', "names.txt": b"train_0000\n../../x\n\0\n",
}  # fmt: skip
COMMANDS = {member.__metadata__[0].name: member.__origin__ for member in typing.get_args(cli.Command)}


class Reached(Exception):
    """A command has taken its arguments and would now work for long."""


def reached(*_: object, **__: object) -> typing.NoReturn:
    raise Reached


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a command can be given, good and bad."""
    world = tmp_path_factory.mktemp("world")
    year = write_scenes(world / "scenes", train=2, val=1, size=(48, 64), seed=1)
    run = random_run(world / "run", open_tagged(year, "train").classes)
    photos, parts = world / "photos", world / "parts"
    shutil.copytree(year / "JPEGImages", photos)
    predict = ["predict", str(run), "--data", str(year), "--split", "train", "--min-score", "0.6", "--device", "cpu"]
    cli.main([*predict, "--out", str(world / "found.json")])
    cli.main([*predict, "--out", str(parts), "--shard", "1/1"])
    (run / "instances").mkdir()
    for number in (1, 2, 3, 4):
        shutil.copy(world / "found.json", run / "instances" / f"module{number}.json")
    hostile = world / "hostile"
    (hostile / "sub").mkdir(parents=True)
    for name, content in CONTENTS.items():
        (hostile / name).write_bytes(content)
        (hostile / "sub" / name).write_bytes(content)
    (hostile / "loop").symlink_to(hostile / "loop")
    (hostile / "out").symlink_to(photos)
    os.mkfifo(hostile / "fifo")
    with contextlib.suppress(PermissionError):  # root may, and what root replaces is gone for everyone
        os.mknod(hostile / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(hostile / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    shutil.copytree(run, hostile / "run")
    (hostile / "run" / "run.json").write_bytes(b'{"recipe": 3, "classes": "x"}')
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(hostile / "one.png")
    (world / "a" / "b").mkdir(parents=True)
    return world


def state(world: Path) -> dict[str, int]:
    """Everything in the world but what a command may make anew: content by size and time, links as they are."""
    found = (path for path in world.rglob("*") if not path.relative_to(world).parts[0].startswith("new"))
    return {
        str(path): one.st_mode if stat.S_ISCHR(one.st_mode) else one.st_mtime_ns * 2**20 + one.st_size
        for path, one in ((path, path.lstat()) for path in found if not path.is_dir())
    }


def good(name: str, world: Path) -> tuple[list[str], dict[str, str | None]]:
    """Positional arguments and options of a command that works."""
    run, year, new = str(world / "run"), str(world / "scenes" / "VOCdevkit" / "VOC2012"), str(world / "new")
    cache, device = {"cache": str(world / "new-cache")}, {"device": "cpu"}
    small = {"out": new, "shorten": "0.01", **device}
    found = str(world / "found.json")
    return {
        "train": ([year], {**small, **cache, "recipe": "demo", "backbone": "tiny"}),
        "forward-backward": ([run, year], {**small, **cache}),
        "distill": ([run, year], small),
        "predict": ([run, str(world / "photos")], {"out": f"{new}.json", **cache, **device, "min-score": "0.9"}),
        "merge": ([str(world / "parts")], {"out": f"{new}.json"}),
        "evaluate": ([found, year], {"split": "train"}),
        "proposals": ([year], {**cache, "workers": "1"}),
        "export": ([found, year], {"out": new, "split": "train"}),
        "measure": ([run, year], {**cache, **device}),
        "review": ([run, year], {"out": f"{new}.json", "port": "0"}),
        "report": ([run], {"data": year, "out": f"{new}.html"}),
        "demo": ([], {"out": new}),
    }[name]


def places_of(world: Path) -> list[str]:
    """Hostile files and folders, and good ones of another kind."""
    names = (*CONTENTS, "sub", "loop", "out", "fifo", "null", "zero", "run", "one.png", "missing")
    good = ("run", "photos", "found.json", "parts", "scenes", "")
    return [str(world / "hostile" / name) for name in names] + [str(world / name) for name in good]


def hostile_value(option: str, hint: object, world: Path, rng: random.Random) -> str:
    if option == "set" and rng.random() < 0.8:
        return (
            rng.choice(SETTINGS) if rng.random() < 0.7 else mutated(rng.choice(SETTINGS).encode(), rng).decode("latin1")
        )
    if "Path" in str(hint) and rng.random() < 0.7:
        return rng.choice(places_of(world))
    if rng.random() < 0.15:
        return rng.choice(TOKENS).decode("latin1")
    return rng.choice(VALUES)


def options_of(command: type) -> dict[str, object]:
    """The type of each option that a command takes, also of those that several commands share."""
    found: dict[str, object] = {}
    hints = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= options_of(hints[field.name])
        elif "Positional" not in str(field.type):
            found[field.name.replace("_", "-")] = hints[field.name]
    return found


Call = tuple[list[str], dict[str, str | None]]


def replaced(name: str, world: Path) -> Iterator[Call]:
    """Every place and option of a command replaced by every value, one at a time."""
    values = [*VALUES, *places_of(world)]
    for place in range(len(good(name, world)[0])):
        for value in values:
            places, options = good(name, world)
            places[place] = value
            yield places, options
    for option, hint in options_of(COMMANDS[name]).items():
        if option != "overwrite":  # with it, files that are given by name may be replaced
            for value in [None] if hint is bool else [*values, *(SETTINGS if option == "set" else ())]:
                places, options = good(name, world)
                yield places, {**options, option: value}


def calls(name: str, world: Path, rng: random.Random, count: int) -> Iterator[Call]:
    """``count`` calls of a command: one argument replaced, all such in turn, then two."""
    alone = list(replaced(name, world))
    rng.shuffle(alone)
    yield from alone[:count]
    hints = options_of(COMMANDS[name])
    for _ in range(count - len(alone)):
        places, options = good(name, world)
        for _ in range(2):
            if places and rng.random() < 0.25:
                places[rng.randrange(len(places))] = hostile_value("", Path, world, rng)
            else:
                option = rng.choice([one for one in hints if one != "overwrite"])
                options[option] = None if hints[option] is bool else hostile_value(option, hints[option], world, rng)
        yield places, options


def several(options: dict[str, str | None]) -> bool:
    """Whether a call would start further processes, each of which would be this test."""
    try:
        return any(int(options.get(option) or 1) in range(2, 1025) for option in ("devices", "nodes"))
    except ValueError:
        return False


def attack(name: str, call: Call, world: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """One call; how it ended."""
    hints, (places, options) = options_of(COMMANDS[name]), call
    given = [part for option, value in options.items() for part in (f"--{option}", *([] if value is None else [value]))]
    arguments, before = [name, *places, *given], state(world)
    capsys.readouterr()
    try:
        with deadline():
            cli.main(arguments)
        ended = "done"
    except Reached:
        ended = "done"
    except SystemExit as stop:
        said = capsys.readouterr()
        ended = "help" if stop.code == 0 and "usage" in said.out else "refused"
        lines = said.err.strip().split("\n")
        if ended == "refused":
            assert stop.code == 2, (arguments, said)
            assert lines[-1].startswith("labelpenet: ") and lines[-1].isprintable(), (arguments, said)
        assert "Traceback" not in said.err and "weights_only" not in said.err, (arguments, said)
        assert said.err.count("labelpenet: ") <= 1, (arguments, said)
    except BaseException as error:
        raise AssertionError(f"{arguments}: {type(error).__name__}: {error}") from error
    if ended == "done":
        numbers = {option: value for option, value in options.items() if hints[option] in (int, float, int | None)}
        assert all(value is None or 0 <= float(value) < math.inf for value in numbers.values()), arguments
    after = state(world)
    made = [Path(path) for path in after.keys() - before.keys()]
    cached = [path for path in made if path.suffix == ".npy" or path.name == "settings.json"]
    mine = () if ended == "refused" else (str(world / "run" / "results.json"), str(world / "run" / "predictions"))
    lost = [path for path in before if after.get(path) != before[path] and not path.startswith((*mine, "\0"))]
    assert not lost and (ended == "done" or set(made) == set(cached)), (arguments, lost, made)
    for path in made:
        path.unlink()
    for path in world.glob("new*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return ended


@pytest.mark.parametrize("count", [pytest.param(6, id="quick"), pytest.param(MANY, id="many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_values_end_in_one_line_or_do_no_harm(
    name: str, count: int, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world / "a" / "b")
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "new-cache"))
    for room in (pretrain, distill):
        monkeypatch.setattr(room, "train_stage", reached)
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", reached)
    monkeypatch.setattr("labelpenet.demo.write_scenes", reached)
    rng, ends = random.Random(f"{name} {count}"), Counter[str]()
    for call in (one for one in calls(name, world, rng, count) if not several(one[1])):
        ends[attack(name, call, world, capsys)] += 1
    print(f"{name}: {ends.total()} tried, {dict(ends)}")
    assert ends["refused"] > ends["done"] or count < MANY


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("predict RUN PHOTOS --split val", "--split"),
        ("predict RUN PHOTOS --shard 1/2 --devices 2", "--shard --devices"),
        ("predict RUN PHOTOS --out NEW --device cpu --devices 1000", "--devices"),
        ("predict RUN PHOTOS PHOTOS --data YEAR", "--data"),
        ("predict RUN PHOTOS --data YEAR", "PHOTOS"),
        ("predict RUN PHOTOS --overlays PHOTOS/drawn", "PHOTOS/drawn"),
        ("export FOUND YEAR --size 64x64", "--size"),
        ("export RUN YEAR --to onnx", "leave DATA out"),
        ("export RUN --to onnx --top 3", "--top"),
        ("export RUN --to onnx --out FOUND", "FOUND --overwrite"),
        ("export RUN --to onnx --out RUN/run.json --overwrite", "RUN/run.json"),
        ("export FOUND YEAR --top 3 --split train", "--top"),
        ("export FOUND YEAR --to coco-results --copy-images --split train", "coco-results"),
        ("export FOUND YEAR --to voc --tolerance 2 --split train", "tolerance"),
        ("train YEAR --out NEW --supervision full --until 2", "--until"),
        ("train YEAR --out NEW --supervised FOUND", "--supervised"),
        ("train YEAR --out NEW --corrected FOUND", "--corrected"),
        ("train YEAR --out NEW --images PHOTOS", "PHOTOS"),
        ("train YEAR --out NEW --evaluate train", "train"),
        ("distill RUN YEAR --out NEW --labels FOUND --supervision full", "--labels"),
        ("proposals YEAR --model FOUND", "FOUND"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_by_name(
    command: str, names: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "never"))
    known = {"RUN": "run", "PHOTOS": "photos", "YEAR": "scenes/VOCdevkit/VOC2012", "FOUND": "found.json", "NEW": "new"}

    def spelt(text: str) -> list[str]:
        for word, path in known.items():
            text = text.replace(word, str(world / path))
        return text.split()

    before = state(world)
    with pytest.raises(SystemExit) as stop:
        cli.main(spelt(command))
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said.split("\n")[-1].startswith("labelpenet: ") and "Traceback" not in said
    assert all(name in said.split("\n")[-1] for name in spelt(names)), said
    assert state(world) == before and not (world / "new").exists() and not (world / "never").exists()
