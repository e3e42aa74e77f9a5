"""Networks in the hub's folders: what comes back answers as what was saved, offline, and the card is filled in."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import labelpenet
from labelpenet import config
from labelpenet.data import run_folder
from labelpenet.data.files import write_json, write_tensors
from labelpenet.errors import InputError
from labelpenet.models import hub
from labelpenet.models.build import build_backbone
from labelpenet.models.cascade import MODULES, LabelPEnet
from labelpenet.models.hub import from_pretrained, model_card, save_pretrained
from tests.students import small_student

RESULTS = {"split": "val", "protocol": "voc12", "val": {"4": {"box": {"mAP": 0.512}, "mask": {"mAP@0.5": 0.25}}}}


def cascade_run(run: Path) -> LabelPEnet:
    """A run of which module 4 is not trained."""
    torch.manual_seed(0)
    network = LabelPEnet(build_backbone("tiny", pretrained=False), ("cat", "dog"), config.demo())
    facts = {"classes": ["cat", "dog"], "backbone": "tiny", "normalisation": network.normalisation, "images": 7}
    run.mkdir()
    write_json(run_folder.facts(run), {**facts, "recipe": config.to_dict(network.recipe)})
    for part in ("stem", *MODULES[:3]):
        write_tensors(run_folder.weights(run, part), getattr(network, part).state_dict())
    return network


def test_a_cascade_comes_back_with_its_card(tmp_path):
    network = cascade_run(tmp_path / "run")
    write_json(run_folder.results(tmp_path / "run"), RESULTS)
    folder = save_pretrained(tmp_path / "run", tmp_path / "hub", licence="apache-2.0")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    found = from_pretrained(folder)
    assert isinstance(found, LabelPEnet) and found.untrained == ("segmentation",)
    for part in ("stem", *MODULES[:3]):
        expected = getattr(network, part).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(found, part).state_dict().items())
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\n') and "cat, dog" in card and "7 photographs" in card
    assert "module 4: box mAP@.5 51.2, mask mAP@0.5 25.0" in card


def test_weights_of_version_0_1_come_back(tmp_path):
    network, path = cascade_run(tmp_path / "run"), run_folder.weights(tmp_path / "run", "classification")
    before = {key.replace("proposal_weights.", "weigher."): value for key, value in load_file(path).items()}
    write_tensors(path, before)
    found = from_pretrained(save_pretrained(tmp_path / "run", tmp_path / "hub"))
    assert isinstance(found, LabelPEnet)
    pair = found.classification.proposal_weights.weight, network.classification.proposal_weights.weight
    assert "weigher.weight" in before and torch.equal(*pair)


def test_the_card_has_no_figures_of_earlier_weights(tmp_path, caplog):
    network, run = cascade_run(tmp_path / "run"), tmp_path / "run"
    figures = {number: {"box": {"mAP": int(number) / 10}} for number in "123"}
    write_json(run_folder.results(run), {**RESULTS, "val": figures, "state": run_folder.state(run)})
    before = (save_pretrained(run, tmp_path / "hub") / "README.md").read_text()
    assert all(f"module {number}: box" in before for number in "123") and not caplog.records
    state = network.detection.state_dict()
    write_tensors(run_folder.weights(run, "detection"), {key: value + 1 for key, value in state.items()})
    after = (save_pretrained(run, tmp_path / "hub") / "README.md").read_text()
    assert "module 1: box" in after and "module 2" not in after and "module 3" not in after
    assert "module 2, module 3 had other weights when measured" in caplog.text


def test_the_card_claims_no_more_than_is_known(tmp_path):
    cascade_run(tmp_path / "run")
    facts = json.loads(run_folder.facts(tmp_path / "run").read_text())
    del facts["checksum"]
    facts |= {"supervision": "mixed", "source": {"data": "/home/me/pets"}}
    write_json(run_folder.facts(tmp_path / "run"), facts)
    card = (save_pretrained(tmp_path / "run", tmp_path / "hub") / "README.md").read_text()
    assert "7 photographs of pets from image tags and, for some of them, true or corrected boxes and masks" in card
    assert "image tags alone" not in card and "ImageNet" not in card and "every" not in card and "/home" not in card
    assert "Not measured." in card and "was not measured" in card
    student = {"kind": "student", "classes": ["cat"], "backbone": "vgg16", "images": 3, "supervision": "labels"}
    assert "a cascade that learnt from image tags alone" in model_card(student, {}, "mit")
    assert "a cascade that learnt from true boxes" in model_card({**student, "teacher": "full"}, {}, "mit")
    assert "a cascade that learnt from labels that were" in model_card({**student, "teacher": "labels"}, {}, "mit")
    assert "3 photographs from a file of labels" in model_card({**student, "labels_file": "c.json"}, {}, "mit")
    results = {"split": "train", "trained_on": 3, "val": {"student": {"box": {"mAP": 0.5}}}}
    assert "Split `train` (3 of its photographs were trained on)" in model_card(student, results, "mit")
    results = {"split": "val", "protocol": "coco", "val": {"student": {"box": {"mAP": 0.3, "AP50": 0.5}}}}
    assert "student: box mAP@.5 50.0" in model_card(student, results, "mit")


def test_pushing_uploads_the_three_files_and_nothing_else_of_the_folder(tmp_path, monkeypatch):
    cascade_run(tmp_path / "run")
    (tmp_path / "secret.txt").write_text("mine")
    uploads = []
    hub = SimpleNamespace(create_repo=lambda *_, **__: None, upload_folder=lambda **options: uploads.append(options))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    folder = save_pretrained(tmp_path / "run", tmp_path, push="me/model")
    (options,) = uploads
    assert set(options["allow_patterns"]) == {"config.json", "model.safetensors", "README.md"}
    assert (options["repo_id"], options["folder_path"]) == ("me/model", folder)


@pytest.mark.parametrize(
    ("name", "text"), [("README.md", "# mine\n"), ("config.json", '{"model_type": "bert"}'), ("model.safetensors", "x")]
)
def test_files_of_others_are_not_replaced(tmp_path, name, text):
    cascade_run(tmp_path / "run")
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: is there already"):
        save_pretrained(tmp_path / "run", folder)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, text)]
    (folder / name).unlink()
    save_pretrained(tmp_path / "run", folder)
    save_pretrained(tmp_path / "run", folder, licence="mit")  # its own it replaces
    assert 'license: "mit"' in (folder / "README.md").read_text()


def test_a_card_that_somebody_has_changed_is_not_replaced(tmp_path):
    cascade_run(tmp_path / "run")
    card = save_pretrained(tmp_path / "run", tmp_path / "hub") / "README.md"
    card.write_text(card.read_text() + "\nOur own notes.\n")
    before = {path: path.read_bytes() for path in card.parent.iterdir()}
    with pytest.raises(InputError, match=r"README\.md: was changed since it was written; move it away"):
        save_pretrained(tmp_path / "run", tmp_path / "hub", licence="mit")
    assert {path: path.read_bytes() for path in card.parent.iterdir()} == before
    card.rename(tmp_path / "notes.md")
    save_pretrained(tmp_path / "run", tmp_path / "hub", licence="mit")
    assert 'license: "mit"' in card.read_text()


@pytest.mark.parametrize("step", ["write_json", "write_tensors", "write_text"])
def test_a_save_that_was_killed_leaves_no_weights_of_another_network(tmp_path, monkeypatch, step):
    """The same layers with other classes would answer with wrong names."""
    cascade_run(tmp_path / "run")
    other = cascade_run(tmp_path / "other")
    facts = json.loads(run_folder.facts(tmp_path / "other").read_text())
    del facts["checksum"]
    write_json(run_folder.facts(tmp_path / "other"), {**facts, "classes": ["dog", "cat"]})
    state = {key: value + 1 for key, value in other.detection.state_dict().items()}
    write_tensors(run_folder.weights(tmp_path / "other", "detection"), state)
    folder = save_pretrained(tmp_path / "run", tmp_path / "hub")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, step, killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path / "other", folder)
    monkeypatch.undo()
    assert not (folder / "README.md").exists()
    if step == "write_text":  # network and configuration are both the new one's
        found = from_pretrained(folder)
        assert found.classes == ("dog", "cat")
        assert all(torch.equal(value, state[key]) for key, value in found.detection.state_dict().items())
    else:
        with pytest.raises(InputError, match=r"holds no config\.json and model\.safetensors"):
            from_pretrained(folder)
    save_pretrained(tmp_path / "other", folder)  # and it may be written again
    assert from_pretrained(folder).classes == ("dog", "cat")


def test_a_student_comes_back_and_answers_as_before(tmp_path):
    run, _ = small_student()
    folder = save_pretrained(run, tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    before, after = labelpenet.load(run).predict(image), from_pretrained(folder).predict(image)
    assert torch.equal(before.boxes, after.boxes) and torch.equal(before.masks, after.masks)
    assert torch.equal(before.weights, after.weights)
    kept = load_file(folder / "model.safetensors").keys()
    own = {f"{part}.{name}" for part in ("tags", "pixels") for name in ("weight", "bias")}
    assert kept - load_file(run_folder.weights(run, "student")).keys() == own


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    cascade_run(tmp_path / "run")
    for source in (tmp_path / "run", small_student()[0]):
        folder = save_pretrained(source, tmp_path / source.name)
        state = load_file(folder / "model.safetensors")
        name = next(key for key in state if key.endswith("weight"))
        save_file({**state, name: state[name] * float("nan")}, folder / "model.safetensors")
        with pytest.raises(InputError, match=r"model\.safetensors: .* NaN"):
            from_pretrained(folder)
        for kind in (torch.int32, torch.complex64):
            save_file({**state, name: state[name].to(kind)}, folder / "model.safetensors")
            with pytest.raises(InputError, match=f"cannot be read .*{name} holds .*{str(kind).removeprefix('torch.')}"):
                from_pretrained(folder)


@pytest.mark.parametrize("part", ["student", "tags", "pixels"])
def test_integer_weights_in_a_students_folder_are_refused(tmp_path, part):
    path = run_folder.weights(shutil.copytree(small_student()[0], tmp_path / "student"), part)
    save_file({name: one.int() for name, one in load_file(path).items()}, path)
    with pytest.raises(InputError, match=r"does not fit this run .*type int32"):
        labelpenet.load(path.parents[1])


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no config"):
        from_pretrained(tmp_path)
    cascade_run(tmp_path / "run")
    folder = save_pretrained(tmp_path / "run", tmp_path / "hub")
    weights = load_file(folder / "model.safetensors")
    save_file({key: one for key, one in weights.items() if not key.startswith("stem.")}, tmp_path / "stemless")
    (tmp_path / "stemless").replace(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"cannot be read.*stem"):
        from_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    del content["classes"], content["checksum"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="cannot be read"):
        from_pretrained(folder)
    with pytest.raises(InputError, match="not a run folder"):
        save_pretrained(tmp_path / "hub", tmp_path / "again")
