"""The demo on a few scenes: it learns, survives an interruption, and starts from the weights that the warm-up left."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from labelpenet import config, demo
from labelpenet.data import proposals, run_folder
from labelpenet.demo import run_demo
from labelpenet.engine.checkpoint import load_checkpoint
from labelpenet.errors import InputError
from labelpenet.models.backbones import Tiny, TinyNetwork
from labelpenet.models.build import build_backbone
from labelpenet.models.cascade import LabelPEnet

TRAIN, HELD_OUT = 24, 8


def small_recipe() -> config.Recipe:
    changes = ["warm_up.steps=110", "modules.1.schedule.steps=80"]
    for number in (2, 3, 4):
        changes += [f"modules.{number}.schedule.steps=45", f"modules.{number}.schedule.warmup=5"]
    return config.override(config.demo(), changes)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A demo that was interrupted before its results were measured, then continued: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proposals, "_usable_cores", lambda: 1)  # starting processes would take longer than the work
        patch.setattr(demo, "write_report", lambda run, report, *data, images: report.write_text("report"))
        with patch.context() as interrupted:
            interrupted.setattr(demo, "measure_run", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                run_demo(out, recipe=small_recipe(), train=TRAIN, held_out=HELD_OUT)
        weights = {path: path.stat().st_mtime_ns for path in (out / "run" / "weights").iterdir()}
        printed = run_demo(out, recipe=small_recipe(), train=TRAIN, held_out=HELD_OUT)
        after = {path: path.stat().st_mtime_ns for path in weights}
        assert after == weights, "what was trained before the interruption is not trained again"
    return out, printed


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def results_of(out) -> dict:
    return json.loads((out / "run" / "results.json").read_text())


def test_it_learns_from_tags_alone(small):
    results = results_of(small[0])
    assert results["classification_mAP"] > 0.7, "chance is about 0.4"
    train = results["train"]
    assert train["1"]["box"]["CorLoc"] > 0.4 and train["1"]["mask"]["mAP@0.25"] > 0.35
    assert results["val"]["2"]["mask"]["mAP@0.25"] > 0.25
    for number in ("2", "3", "4"):  # few steps: modules 3 and 4 only begin to learn here (the slow test goes on)
        assert train[number]["mask"]["mAP@0.25"] > 0.15, f"module {number}"


def test_it_says_what_there_is_to_see(small):
    out, printed = small
    assert str(out / "report.html") in printed and "minutes" in printed
    assert (out / "report.html").is_file()


def test_all_it_writes_lies_in_its_folder(small):
    out, _ = small
    assert {path.name for path in out.iterdir()} == {"scenes", "run", "cache", "report.html"}
    assert sum(path.is_file() for path in (out / "cache").rglob("*")) >= TRAIN + HELD_OUT


def test_a_finished_demo_is_only_shown_again(small, monkeypatch):
    out, printed = small
    monkeypatch.setattr(demo, "train_run", _interrupt)
    again = run_demo(out, recipe=small_recipe(), train=TRAIN, held_out=HELD_OUT)
    table = printed[: printed.index(str(out / "report.html"))]
    assert again.startswith(table) and "finished before" in again


def test_a_demo_of_another_seed_is_not_touched(small):
    out, _ = small
    before = results_of(out)
    with pytest.raises(InputError, match="scenes"):
        run_demo(out, seed=1, train=TRAIN, held_out=HELD_OUT)
    assert results_of(out) == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="something else"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_demo_that_was_killed_while_it_wrote_scenes_goes_on(tmp_path, monkeypatch):
    (tmp_path / ".scenes.part" / "VOCdevkit").mkdir(parents=True)

    class WentOn(Exception):
        pass

    def train_run(*arguments, **options):
        raise WentOn

    monkeypatch.setattr("labelpenet.demo.train_run", train_run)
    with pytest.raises(WentOn):
        run_demo(tmp_path, train=2, held_out=1)


def test_the_cascade_starts_from_the_warmed_up_weights(small):
    out, _ = small
    state, _ = load_checkpoint(run_folder.checkpoints(out / "run", "warmup"))
    assert state is not None and state["step"] == small_recipe().warm_up.steps
    stem = load_file(out / "run" / "weights" / "stem.safetensors")
    head = load_file(out / "run" / "weights" / "classification.safetensors")
    for name, value in stem.items():
        assert torch.equal(value, state["model"][f"network.stem.{name}"]), "the cascade leaves the stem as it is"
    for name in ("0.weight", "0.bias"):
        assert torch.equal(head[f"head.{name}"], state["model"][f"network.last.{name}"])


def test_a_run_of_an_unpretrained_backbone_predicts(small):
    out, _ = small
    found = LabelPEnet.from_run(out / "run").predict(min((out / "scenes").rglob("val_*.jpg")))
    assert found.masks is not None and found.masks.shape[1:] == (160, 160)


def test_every_module_gets_a_copy_of_the_networks_last_block():
    plug = build_backbone("tiny")
    assert isinstance(plug.untrained, TinyNetwork)
    network = LabelPEnet(plug, ("a", "b"), config.demo())
    blocks = [network.classification.head[0], network.detection.head[0], network.refinement.mask_tail[0]]
    for block in blocks:
        assert torch.equal(block.weight, plug.untrained.last[0].weight) and block is not plug.untrained.last[0]


def test_the_parts_of_tiny_make_up_the_network():
    """On a map of the pooling's size, tail, RoI head and stem compute what the network with an average does."""
    network = TinyNetwork().eval()
    plug = Tiny(network)
    head, width = plug.roi_head()
    side = plug.pool_size * plug.stem.stride
    images = torch.randn(2, 3, side, side)
    stem = plug.stem.module(images)
    assert stem.shape == (2, plug.stem.channels, plug.pool_size, plug.pool_size)
    torch.testing.assert_close(head(plug.region_tail().module(stem)), network(images).mean((2, 3)))
    assert head(stem).shape == (2, width)
    assert plug.mask_tail().module(stem).shape == (2, plug.mask_tail().channels, plug.pool_size, plug.pool_size)


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    printed = run_demo(tmp_path / "demo")
    results = results_of(tmp_path / "demo")
    masks = [results["val"][str(number)]["mask"]["mAP@0.5"] for number in (1, 2, 3, 4)]
    assert masks[3] >= 0.5
    assert masks[0] < masks[1] < masks[3]
    report = tmp_path / "demo" / "report.html"
    assert report.stat().st_size > 10_000 and str(report) in printed
