"""The command line as a user meets it: one road from tags to a report, and one line for what cannot be used."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from labelpenet import Instances, LabelPEnet, cli, config
from labelpenet.cli import main
from labelpenet.data import write_scenes
from labelpenet.engine.distributed import build_fabric

SIDES = ("images.sides=96", "images.test_side=96")  # as the scenes are: less than half the time


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("kit") / "scenes", train=8, val=4, size=(96, 96), seed=3)


@pytest.fixture(scope="module")
def run(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    main(train_arguments(kit, out))
    return out


def train_arguments(kit: Path, out: Path, *more: str) -> list[str]:
    options = ["--recipe", "demo", "--backbone", "tiny", "--shorten", "0.01", "--device", "cpu"]
    own = ["--set", *SIDES] * ("--set" not in more)
    return ["train", str(kit), "--out", str(out), *options, "--cache", str(out.parent / "cache"), *own, *more]


def one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command prints: its last line on standard error; exit status 2, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def test_predict_evaluate_and_export(run: Path, kit: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    names = sorted(path.name for path in (kit / "JPEGImages").iterdir())[:3]
    for name in names:
        (photos / name).write_bytes((kit / "JPEGImages" / name).read_bytes())
    (photos / "bad.jpg").write_text("no image")
    out, overlays = tmp_path / "predictions.json", tmp_path / "overlays"
    main(["predict", str(run), str(photos), "--out", str(out), "--overlays", str(overlays), "--device", "cpu"])
    content = json.loads(out.read_text())
    assert {row["image_id"] for row in content["annotations"]} <= {image["id"] for image in content["images"]}
    assert sorted(path.name for path in overlays.iterdir()) == names  # the bad image is skipped, the others are done
    network = LabelPEnet.from_run(run)
    with build_fabric("cpu").autocast():  # in bfloat16 where the processor has it, as the command
        alone = network.predict(photos / names[0])
    assert len(alone) == sum(image["file_name"] == names[0] for image in content["images"] for row in
                             content["annotations"] if row["image_id"] == image["id"])  # fmt: skip

    held_out, result = tmp_path / "val.json", tmp_path / "results" / "val.json"  # its folder is made
    main(["predict", str(run), "--data", str(kit), "--split", "val", "--out", str(held_out), "--device", "cpu"])
    main(["evaluate", str(held_out), str(kit), "--split", "val", "--json", str(result), "--table", "markdown"])
    measured = json.loads(result.read_text())
    assert set(measured) == {"box", "mask", "semantic"}
    assert 0 <= measured["box"]["mAP"] <= 1
    main(["export", str(held_out), str(kit), "--split", "val", "--to", "yolo", "--out", str(tmp_path / "yolo")])
    assert list((tmp_path / "yolo").rglob("*.txt"))


def test_forward_backward_learning_refuses_what_it_would_not_use(
    run: Path, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["forward-backward", str(run), str(kit), "--out", str(tmp_path / "out"), "--set"]
    for choice in ("modules.*.schedule.lr=5", "warm_up.lr=9", "forward_backward.enter=0.1", "forward_backward.zoom=2"):
        assert f"--set {choice.partition('=')[0]} does nothing" in one_line([*command, choice], capsys)
    assert not (tmp_path / "out").exists()
    facts = json.loads((run / "run.json").read_text())
    del facts["checksum"]
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "proposals": "0123"}))
    command = ["forward-backward", str(tmp_path / "run"), str(kit), "--out", str(tmp_path / "out")]
    assert "another tool's proposals; give them again with --proposals" in one_line(command, capsys)
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "recipe": {"network": {}}, "kind": "student"}))
    assert f"{tmp_path / 'run'}: holds a student, but this needs the modules" in one_line(command, capsys)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_mistake_in_the_options_is_told_in_any_encoding(encoding: str) -> None:
    command = [sys.executable, "-m", "labelpenet", "proposals", "photos", "--clases", "a"]
    found = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, text=True, check=False
    )
    line = "labelpenet: Unrecognized options: --clases, a (perhaps --classes); see labelpenet proposals --help\n"
    assert (found.returncode, found.stderr) == (2, line)


def test_a_user_without_a_home_names_the_folder_of_the_cache(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a container, whom the system does not know."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    command = ["proposals", str(kit), "--split", "val"]
    assert "no home folder to cache proposals in; give one with --cache FOLDER" in one_line(command, capsys)
    main([*command, "--cache", str(tmp_path / "cache")])
    assert any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_a_closed_standard_output_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m labelpenet --version >&-", shell=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_measure_and_report(run: Path, kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["measure", str(run), str(kit), "--device", "cpu", "--cache", str(run.parent / "cache")])
    results = json.loads((run / "results.json").read_text())
    assert set(results["val"]) == set(results["train"]) == {"1", "2", "3", "4"}
    assert 0 <= results["classification_mAP"] <= 1
    options = ["--modules", "4", "--device", "cpu", "--cache", str(run.parent / "cache")]
    main(["measure", str(run), str(kit), *options])  # says nothing new, and loses nothing
    assert json.loads((run / "results.json").read_text()) == results
    main(["report", str(run), "--images", "1"])
    page = (run / "report.html").read_text()
    assert "<table" in page
    assert 'src="http' not in page
    given = ["report", str(run), "--images", "1", "--predictions", str(run / "predictions" / "val-module4.json")]
    main(given)
    assert "val-module4.json; that this run" in (run / "report.html").read_text()
    assert "val-module4.json: is of no held-out images" in one_line([*given, "--split", "train"], capsys)


def test_measure_says_which_photographs_it_cannot_judge_the_training_by(
    run: Path, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, other = shutil.copytree(run, tmp_path / "run"), shutil.copytree(kit, tmp_path / "VOC2012")
    options = ["--modules", "4", "--device", "cpu", "--cache", str(run.parent / "cache")]
    main(["measure", str(copy), str(kit), "--split", "train", *options])
    assert "trained on 8 of the 8 photographs that it is measured on" in capsys.readouterr().err
    (other / "ImageSets/Main/train.txt").unlink()  # a split that the run was not trained on, and none at all
    for choice, words in (("val", "trained on none of the photographs"), ("train", "no split 'train'")):
        main(["measure", str(copy), str(other), "--train-split", choice, *options])
        assert words in capsys.readouterr().err
        results = json.loads((copy / "results.json").read_text())
        assert (results["train"], set(results["val"])) == ({}, {"4"})  # a CorLoc of 0 would be a lie
    twin = write_scenes(tmp_path / "twin", train=8, val=4, size=(96, 96), seed=4)  # other photographs of the same names
    for split, words in (("val", "trained on none of the photographs"), ("train", "")):
        main(["measure", str(copy), str(twin), "--split", split, *options])
        said = capsys.readouterr().err
        assert words in said and "photographs that it is measured on" not in said


def test_annotation_that_is_left_out_of_figures_is_said(
    run: Path, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, other = shutil.copytree(run, tmp_path / "run"), shutil.copytree(kit, tmp_path / "VOC2012")
    cache = ["--cache", str(run.parent / "cache")]
    for split in ("train", "val"):
        name = (other / f"ImageSets/Main/{split}.txt").read_text().split()[0]
        annotation = other / f"Annotations/{name}.xml"
        annotation.write_text(annotation.read_text().replace("<width>96<", "<width>95<"))
    main(["measure", str(copy), str(other), "--modules", "4", "--device", "cpu", *cache])
    said = capsys.readouterr().err
    assert "note: training photographs: 1 images are left out" in said and "note: 1 images are left out" in said
    main(["proposals", str(other), "--split", "val", "--recall", *cache])
    assert "note: 1 images are left out because their annotation is damaged" in capsys.readouterr().err


def test_measure_says_what_has_no_answer_and_judges_a_module_by_what_it_labelled(
    run: Path, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, other = shutil.copytree(run, tmp_path / "run"), shutil.copytree(kit, tmp_path / "VOC2012")
    photograph = other / "JPEGImages" / f"{(other / 'ImageSets/Main/val.txt').read_text().split()[0]}.jpg"
    photograph.write_bytes(photograph.read_bytes()[:900])
    labels = copy / "instances/module4.json"
    content = json.loads(labels.read_text())
    lost = content["images"].pop(0)
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != lost["id"]]
    del content["checksum"]
    labels.write_text(json.dumps(content))
    options = ["--device", "cpu", "--cache", str(run.parent / "cache"), "--modules", "4"]
    main(["measure", str(copy), str(other), *options])
    assert "module 4 has no answer for 1 photographs; their objects are missed" in capsys.readouterr().err
    train = json.loads((copy / "results.json").read_text())["train"]["4"]
    (other / "ImageSets/Main/train.txt").write_text("\n".join(image["image"] for image in content["images"]) + "\n")
    main(["measure", str(copy), str(other), *options])
    assert json.loads((copy / "results.json").read_text())["train"]["4"] == train


def test_measure_names_classes_of_which_nothing_counts_and_refuses_to_measure_by_nothing(
    run: Path, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, other = shutil.copytree(run, tmp_path / "run"), shutil.copytree(kit, tmp_path / "VOC2012")
    options = ["--device", "cpu", "--cache", str(run.parent / "cache"), "--modules", "4"]
    for annotation in (other / "Annotations").glob("val*.xml"):
        annotation.write_text(annotation.read_text().replace("<difficult>0<", "<difficult>1<"))
    main(["measure", str(copy), str(other), *options])  # a box mAP of 0 in the table, of no class
    classes = json.loads((copy / "run.json").read_text())["classes"]
    assert f"no object of {', '.join(classes)} counts here: no figure of it" in capsys.readouterr().err
    images = [{"id": 1, "file_name": next(iter((kit / "JPEGImages").iterdir())).name, "width": 96, "height": 96}]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    truth = tmp_path / "instances.json"
    truth.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    before = (copy / "results.json").read_bytes()
    arguments = ["measure", str(copy), str(truth), "--images", str(kit / "JPEGImages"), *options]
    assert f"{truth}: no object to measure by" in one_line(arguments, capsys)
    assert (copy / "results.json").read_bytes() == before


def test_the_report_calls_no_photograph_held_out_that_was_trained_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("labelpenet.report.write_report", lambda run, out, *data, **_: shown.append(data))
    photos, copy = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(run, copy)
    facts = json.loads((copy / "run.json").read_text())
    del facts["checksum"]
    names = [f"{label}/a.jpg" for label in facts["classes"]]
    for index, name in enumerate(names):
        (photos / name).parent.mkdir(parents=True)
        Image.new("RGB", (64, 64), (60 * index, 0, 0)).save(photos / name)

    def report(data: Path, split: str | None) -> str:
        (copy / "run.json").write_text(json.dumps({**facts, "source": {"data": str(data), "split": split}}))
        main(["report", str(copy)])
        return capsys.readouterr().err

    assert "no held-out strips" in report(photos, None)  # a folder without lists is used whole, whatever the split
    assert len(shown[-1][0].images) == len(names) and shown[-1][1] is None
    (photos / "val.txt").write_text(names[-1])
    (photos / "train.txt").write_text("\n".join(names[:-1]))
    assert report(photos, "train") == ""
    assert [image.id for image in shown[-1][1].images] == names[-1:]
    assert "elsewhere, which the run was trained on, is not there" in report(tmp_path / "elsewhere", None)
    assert shown[-1] == (None, None)
    assert "no pictures of the training photographs" in report(photos, "moved.txt") and shown[-1] == (None, None)


def test_an_export_keeps_the_classes_that_a_split_does_not_show(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from labelpenet.formats import open_tagged, write_predictions

    known = open_tagged(kit, None).classes
    image = next(one for one in open_tagged(kit, "val").images if len(one.tags) == 1)
    only = tmp_path / "one.txt"
    only.write_text(image.id)
    found = Instances(
        torch.tensor([[1.0, 1, 9, 9]] * len(known)), torch.arange(len(known)), torch.ones(len(known)), (96, 96)
    )
    predictions = write_predictions(tmp_path / "p.json", {image.id: found}, [image], known)
    arguments = [str(predictions), str(kit), "--split", str(only)]
    main(["export", *arguments, "--to", "yolo", "--out", str(tmp_path / "yolo")])
    lines = (tmp_path / f"yolo/labels/one/{image.id}.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [str(label) for label in range(len(known))]
    main(["evaluate", *arguments])
    assert "is not asked for, left out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", *arguments, "--protocol", "coco", "--table", "text"])
    assert "leave --table out" in capsys.readouterr().err
    main(["evaluate", str(predictions), str(kit)])
    assert "of 12 images are not in" in capsys.readouterr().err


def test_an_onnx_file_replaces_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photograph = tmp_path / "a.jpg"
    photograph.write_bytes(b"photograph")
    export = ["export", str(tmp_path / "student"), "--out", str(photograph)]
    assert "is there already" in one_line([*export, "--to", "onnx"], capsys)
    assert photograph.read_bytes() == b"photograph"
    assert "is for --to onnx" in one_line([*export, "--to", "coco", "--size", "64x64"], capsys)


def test_training_tells_its_photographs_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "tags.csv").write_text("file,tags\na.jpg,cat;cta\nb.jpg,cat\n")
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path), "--out", str(tmp_path / "run"), "--backbone", "none"])
    assert f"note: 2 photographs of {tmp_path}: cat in 2, cta in 1\n" in capsys.readouterr().err


def test_measure_passes_over_photographs_that_it_cannot_read(run: Path, kit: Path, tmp_path: Path) -> None:
    data, copy = tmp_path / "VOC2012", tmp_path / "run"
    shutil.copytree(kit, data)
    shutil.copytree(run, copy)
    for split in ("train", "val"):
        name = (data / f"ImageSets/Main/{split}.txt").read_text().split()[0]
        next((data / "JPEGImages").glob(f"{name}.*")).write_bytes(b"no image")
    main(["measure", str(copy), str(data), "--device", "cpu", "--cache", str(tmp_path / "cache")])
    results = json.loads((copy / "results.json").read_text())
    assert set(results["val"]) == {"1", "2", "3", "4"}
    assert 0 <= results["classification_mAP"] <= 1


def test_the_pseudo_labels_hold_only_tags(run: Path, kit: Path) -> None:
    from labelpenet.formats import open_tagged

    images = open_tagged(kit, "train")
    tags = {image.id: {images.classes[tag] for tag in image.tags} for image in images.images}
    for number in (1, 2, 3, 4):
        content = json.loads((run / "instances" / f"module{number}.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        own = {image["id"]: image["image"] for image in content["images"]}
        assert content["annotations"]
        for row in content["annotations"]:
            assert names[row["category_id"]] in tags[own[row["image_id"]]]


def test_train_refuses_a_folder_in_use_and_changed_settings(
    run: Path, kit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--resume" in one_line(train_arguments(kit, run), capsys)
    assert "recipe" in one_line(train_arguments(kit, run, "--resume", "--set", *SIDES, "modules.2.rois=7"), capsys)
    line = one_line(train_arguments(kit, run, "--resume", "--backbone", "vgg16", "--weights", "none.pth"), capsys)
    assert "backbone was tiny, is vgg16" in line  # not that the weights of another network are missing
    main(train_arguments(kit, run, "--resume"))  # finished: nothing left to do


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--recipe", "nope"], "unknown recipe"),
        (["--backbone", "nope"], "unknown backbone"),
        (["--classes", "ball,unicorn"], "unicorn"),
        (["--classes", "ball"], "got only ball: tags tell classes apart; choose more with --classes"),
        (["--split", "nope"], "available are"),
        (["--evaluate", "nope"], "available are"),
        (["--evaluate", "train"], "choose a split that shares no image"),
        (["--weights", "nope.pth"], "no such weights file"),
        (["--set", "modules.2.schedule.stps=3"], "choose from"),
        (["--shorten", "0"], "must be from"),
        (["--device", "cuda"], "--device cpu"),
    ],
)
def test_train_names_file_and_remedy(
    change: list[str], said: str, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert said in one_line(train_arguments(kit, tmp_path / "run", *change), capsys)
    assert not (tmp_path / "run").exists()  # nothing half written


@pytest.mark.parametrize(
    "words",
    [
        ["train", "DATA", "--out", "new", "--set", "images.flip=false", "--set", "images.longest=900"],
        ["distill", "RUN", "DATA", "--out", "new", "--labels", "one.json", "--labels=two.json"],
        ["measure", "RUN", "DATA", "--modules", "1", "--modules", "2"],
    ],
)
def test_no_value_of_an_option_that_is_given_twice_is_lost(words: list[str], capsys) -> None:
    assert "is given twice; give it once" in one_line(words, capsys)
    assert "sets a.b twice" in one_line(["train", "DATA", "--out", "new", "--set", "a.b=1", "a.c=1", "a.b=2"], capsys)


def test_a_folder_that_cannot_be_written_is_named_before_data_and_weights(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    absent = str(tmp_path / "absent")
    for command in (
        ["train", absent, "--weights", "nope.pth"],
        ["forward-backward", absent, absent],
        ["distill", absent, absent],
    ):
        for out, said in (
            (run, "holds a run already"),
            (tmp_path, "holds no run"),
            (tmp_path / "file", "choose another"),
        ):
            line = one_line([*command, "--out", str(out)], capsys)
            assert f"{out}: " in line and said in line and absent not in line
        assert absent in one_line([*command, "--out", str(tmp_path / "new")], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_commands_name_file_and_remedy(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "black.png")
    assert "no run.json" in one_line(["predict", str(empty), str(tmp_path / "black.png")], capsys)
    assert "no image" in one_line(["predict", str(run), str(empty), "--out", str(tmp_path / "p.json")], capsys)
    assert "no such image" in one_line(["predict", str(run), str(tmp_path / "x.jpg")], capsys)
    assert str(empty) in one_line(["evaluate", str(tmp_path / "x.json"), str(empty)], capsys)
    assert str(empty) in one_line(["train", str(empty), "--out", str(tmp_path / "r")], capsys)
    assert not (tmp_path / "p.json").exists()


def test_predict_writes_json_under_no_other_name(run: Path, kit: Path, tmp_path: Path, capsys) -> None:
    for name in ("x.parquet", "x.csv"):
        line = one_line(["predict", str(run), str(kit / "JPEGImages"), "--out", str(tmp_path / name)], capsys)
        assert f"{tmp_path / name}: predict writes .json" in line and "labelpenet merge" in line
    assert not list(tmp_path.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_command_writes_over_what_it_reads_or_did_not_make(
    run: Path, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(kit / "JPEGImages", photos)
    photo = next(photos.iterdir())
    (tmp_path / "link").symlink_to(photos)
    old = tmp_path / "old.json"
    old.write_text("old")
    predict, new = ["predict", str(run), str(photos), "--device", "cpu"], str(tmp_path / "new.json")
    one, evaluate = ["predict", str(run), str(photo)], ["evaluate", str(old), str(kit), "--split", "val"]
    report = ["report", str(run), "--data", str(kit)]
    refused = [
        [*predict, "--out", new, "--overlays", str(photos)],
        [*predict, "--out", new, "--overlays", str(tmp_path / "link"), "--overwrite"],
        [*predict, "--out", new, "--overlays", str(photos / "sub")],
        [*predict, "--out", new, "--overlays", str(run), "--overwrite"],
        [*one, "--out", str(photo), "--overwrite"],
        [*one, "--out", new, "--overlays", str(photos), "--overwrite"],
        [*predict, "--out", str(photo)],
        [*predict, "--out", str(old)],
        [*predict, "--out", str(run / "run.json"), "--overwrite"],
        [*predict, "--out", str(photos)],
        [*predict, "--out", str(old / "new.json")],
        ["predict", str(run), "--data", str(kit), "--out", str(kit / "classes.txt"), "--overwrite"],
        [*evaluate, "--json", str(old), "--overwrite"],
        [*evaluate, "--json", str(kit / "classes.txt"), "--overwrite"],
        [*report, "--out", str(old)],
        [*report, "--predictions", str(old), "--out", str(old), "--overwrite"],
        [*report, "--out", str(run / "run.json"), "--overwrite"],
        [*report, "--out", str(kit / "classes.txt"), "--overwrite"],
    ]
    before = snapshot(tmp_path) | snapshot(run) | snapshot(kit)
    for arguments in refused:
        one_line(arguments, capsys)
        assert snapshot(tmp_path) | snapshot(run) | snapshot(kit) == before, arguments
    main([*predict, "--out", str(old), "--overwrite", "--overlays", str(tmp_path / "overlays")])
    assert len(list((tmp_path / "overlays").iterdir())) == len(list(photos.iterdir()))
    assert "annotations" in json.loads(old.read_text())


@pytest.mark.parametrize(
    "options",
    [
        ["predict", "RUN", "x.png", "--min-score", "nan"],
        ["predict", "RUN", "x.png", "--min-score", "-1"],
        ["predict", "RUN", "x.png", "--devices", "1000000"],
        ["predict", "RUN", "x.png", "--devices", "0"],
        ["measure", "RUN", "x", "--modules", "7"],
        ["train", "x", "--out", "y", "--shorten", "inf"],
        ["train", "x", "--out", "y", "--seed", "-1"],
        ["train", "x", "--out", "y", "--checkpoint-minutes", "nan"],
        ["proposals", "x", "--side", "-5"],
        ["proposals", "x", "--workers", "0"],
        ["report", "RUN", "--images", "-1"],
    ],
)
def test_numbers_out_of_range_are_refused_with_their_range(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line(options, capsys)
    assert options[-2] in line and " from " in line and options[-1] in line


def test_help_is_a_line_a_command_and_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys, labelpenet.cli as c; c.main(['--help']); c.main(['--version']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False"
    assert done.stdout.splitlines()[-2].startswith("labelpenet ")
    main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(lines) >= 9 and all(len(line) < 120 for line in lines)
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    page = capsys.readouterr().out
    assert "PREDICTIONS [DATA]\n" in page and "None" not in page  # the names that its text uses


def test_streams_that_end_or_cannot_write_a_name_cost_no_traceback(tmp_path: Path) -> None:
    def shell(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", "-c", line], capture_output=True, text=True)

    labelpenet = f"{sys.executable} -m labelpenet"
    assert "Traceback" not in shell(f"({labelpenet} train --help; {labelpenet} --help) | true").stderr
    missing = f"{labelpenet} export 'p.json' '{tmp_path}/äß☃' --out x"
    refused = shell(f"PYTHONIOENCODING=ascii {missing}")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1) and "2603" in refused.stderr
    unheard = shell(f"{missing} 2>&-")
    assert (unheard.returncode, unheard.stdout) == (2, "")
    unseen = shell(f"{labelpenet} train --help >&-")
    assert (unseen.returncode, unseen.stderr) == (0, "")
    refused = shell(f"{labelpenet} predict >&-")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert shell(f"{labelpenet} --help >/dev/full").stderr.startswith(
        "labelpenet: standard output or a file: No space left"
    )


def test_a_full_standard_error_does_not_stop_a_command(kit: Path, tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": min((kit / "JPEGImages").iterdir()).name, "width": 96, "height": 96}]
    categories = [{"id": 1, "name": "ball"}]
    found, table = tmp_path / "found.json", tmp_path / "table.json"
    found.write_text(json.dumps({"images": images, "categories": categories, "annotations": []}))
    command = [sys.executable, "-m", "labelpenet", "evaluate", str(found), str(kit), "--json", str(table)]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full, check=False).returncode == 0
    assert table.is_file()


@pytest.mark.parametrize(
    ("words", "base", "steps"),
    [
        (["train", "photos"], config.recipe("best").modules[1], "modules.2.schedule.steps=7"),
        (["distill", "run", "photos"], config.StudentRecipe(), "schedule.steps=7"),
    ],
)
def test_what_is_set_is_not_shortened(words: list[str], base: Any, steps: str) -> None:
    for change, expected in (([steps], 7), ([], base.schedule.steps // 10)):
        command = cli._parsed([*words, "--out", "new", "--shorten", "0.1", "--set", *change])
        recipe = config.StudentRecipe() if words[0] == "distill" else config.recipe("best")
        changed = cli._changed(recipe, command)
        assert (changed if words[0] == "distill" else changed.modules[1]).schedule.steps == expected


def test_a_line_to_copy_is_one_command_whatever_the_folder_is_called(capsys) -> None:
    cli._say_trained(Path("runs/it's mine"))
    command = shlex.split(capsys.readouterr().out.split("next: ")[1])
    assert command == ["labelpenet", "predict", "runs/it's mine", "PHOTOS", "--out", "predictions.json"]


def test_of_several_processes_the_first_one_of_a_machine_says_the_notes(monkeypatch, capsys) -> None:
    for rank, said in ((None, 1), ("0", 1), ("1", 0)):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        cli._say("three photographs")
        cli._say_trained(Path("runs/mine"))
        out, err = capsys.readouterr()
        assert err.count("three photographs") == out.count("trained: runs/mine") == said


def test_evaluate_names_classes_without_an_object_and_refuses_to_measure_by_none(tmp_path, capsys):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    image = {"id": 1, "file_name": "a.png", "width": 20, "height": 10}
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 8, 6], "score": 0.5}
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": [image], "annotations": [row], "categories": categories}
    predictions, truth, out = (tmp_path / name for name in ("predictions.json", "instances.json", "figures.json"))
    predictions.write_text(json.dumps(content))
    truth.write_text(json.dumps({**content, "annotations": [{**row, "iscrowd": 0}]}))
    words = ["evaluate", str(predictions), str(truth), "--json", str(out), "--classes"]
    main([*words, "cat,dog"])
    assert "no object of dog counts here: no figure of it" in capsys.readouterr().err
    assert json.loads(out.read_text())["box"]["per_class"] == {"cat": 1.0}
    out.unlink()
    with pytest.raises(SystemExit) as ended:
        main([*words, "dog"])
    assert ended.value.code == 2 and "no object to measure by; check --split and --classes" in capsys.readouterr().err
    assert not out.exists()
