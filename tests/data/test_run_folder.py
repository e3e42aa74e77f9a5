"""The run folder: whose it is, what it was made from, and the moments in which a process may die."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from labelpenet.data import TaggedImage, TaggedImages, run_folder
from labelpenet.data.files import hash_file
from labelpenet.data.run_folder import check_photographs, claimed, start_run
from labelpenet.errors import InputError
from labelpenet.review.doubt import rank_run
from labelpenet.training.labels import read_labels

FACTS = {"classes": ["a", "b"], "seed": 0, "recipe": {"images": {"sides": (480, 576)}}}


def begin(run: Path, facts: dict = FACTS, resume: bool = False) -> None:
    with claimed(run):
        start_run(run, facts, resume)


def test_a_run_folder_is_made_and_taken_up_again(tmp_path):
    run = tmp_path / "some" / "run"
    begin(run)
    assert run_folder.read_facts(run) == json.loads(json.dumps(FACTS))
    begin(run, resume=True)
    begin(tmp_path / "other", resume=True)  # --resume where nothing was begun is a start
    (tmp_path / "empty").mkdir()
    begin(tmp_path / "empty")


def test_a_run_folder_in_use_is_left_alone(tmp_path):
    begin(tmp_path / "run")
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(InputError, match="--resume"):
        begin(tmp_path / "run")
    with pytest.raises(InputError, match="another seed, recipe"):
        begin(tmp_path / "run", FACTS | {"seed": 1, "recipe": {}}, resume=True)
    with pytest.raises(InputError, match=r"another seed, backbone \(backbone was None, is vgg16\);"):
        begin(tmp_path / "run", FACTS | {"seed": 1, "backbone": "vgg16"}, resume=True)
    assert (tmp_path / "run/run.json").read_bytes() == before
    modules = [{"steps": 1}, {"steps": 2, "vote": True}]
    begin(tmp_path / "four", FACTS | {"recipe": {"modules": modules}})
    with pytest.raises(
        InputError, match=r"recipe \(modules.2.steps was 2, is 3, modules.2.vote was True, is not set\)"
    ):
        begin(tmp_path / "four", FACTS | {"recipe": {"modules": [{"steps": 1}, {"steps": 3}]}}, resume=True)
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="choose another --out"):
        begin(foreign)
    assert [path.name for path in foreign.iterdir()] == ["cat.jpg"]


def test_a_run_that_was_killed_before_run_json_had_its_name_can_be_started(tmp_path):
    begin(tmp_path)
    (tmp_path / "run.json").rename(tmp_path / "run.json.tmp")
    begin(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", ".lock"}


@pytest.mark.parametrize("content", [b'{"classes": [', b"[1]", b"3", b"", b"\xff\xfe"])
def test_a_damaged_run_file_is_named(tmp_path, content):
    begin(tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError, match=r"run\.json: damaged"):
        begin(tmp_path, resume=True)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="choose another --out"):
            begin(run)


HOLD = """
import sys
from pathlib import Path
from labelpenet.data.run_folder import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_and_the_lock_dies_with_its_process(tmp_path):
    run = tmp_path / "run"
    command, pipe = [sys.executable, "-c", HOLD, str(run)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is working on it"):
            begin(run)
        other.kill()
        other.wait()
        begin(run)


def test_photographs_may_change_until_something_is_trained(tmp_path):
    assert check_photographs(tmp_path, {"a": "1", "b": None}) == ""
    assert check_photographs(tmp_path, {"a": "1", "b": None}) == ""
    assert "1 photographs have changed (b)" in check_photographs(tmp_path, {"a": "1", "b": "2"})
    path = run_folder.weights(tmp_path, "classification")
    path.parent.mkdir()
    path.write_bytes(b"")
    assert check_photographs(tmp_path, {"a": "1", "b": "2"}) == ""
    with pytest.raises(InputError, match=r"1 photographs have changed since it was started \(a\)"):
        check_photographs(tmp_path, {"a": "3", "b": "2"})
    run_folder.photographs(tmp_path).write_text('{"a": ')
    with pytest.raises(InputError, match=r"images\.json: damaged"):
        check_photographs(tmp_path, {"a": "1", "b": "2"})


def test_photographs_of_the_same_names_are_not_taken_for_those_of_the_run(tmp_path):
    files = {name: tmp_path / f"{name}.jpg" for name in ("a", "b", "new")}
    for name, path in files.items():
        path.write_text(name)
    assert run_folder.others(tmp_path, files) == []  # a run of version 0.1 says nothing of their content
    run_folder.check_photographs(tmp_path, {"a": hash_file(files["a"]), "b": hash_file(files["b"])})
    run_folder.check_own(tmp_path, files)
    files["b"].write_text("another")
    assert run_folder.others(tmp_path, files) == ["b"]
    images = TaggedImages(("cat",), tuple(TaggedImage(name, path, (0,)) for name, path in files.items()))
    for use in (lambda: read_labels(tmp_path, (), images), lambda: rank_run(tmp_path, images)):
        (tmp_path / "instances").mkdir(exist_ok=True)
        (tmp_path / "instances/module4.json").write_text("{}")
        with pytest.raises(InputError, match=r"1 photographs have the names .* but are others \(b\)"):
            use()
