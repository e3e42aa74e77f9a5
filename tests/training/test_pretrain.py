"""Cascaded pre-training on a few small generated scenes: the chain, its interruption, and what it may look at."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from labelpenet.config import CascadeOptions, Recipe, RunOptions, override, recipe
from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.images import read_image
from labelpenet.data.run_folder import claimed, start_run
from labelpenet.data.scenes import write_scenes
from labelpenet.engine.stage import Stage
from labelpenet.engine.trainer import train_stage
from labelpenet.errors import InputError
from labelpenet.formats import open_tagged
from labelpenet.instances import Instances
from labelpenet.models.cascade import MODULES, LabelPEnet
from labelpenet.training.inferred import read_inferred
from labelpenet.training.pretrain import Training, cached_loss, pretrain, run_facts, start_from_before
from labelpenet.training.run import open_training, train_run
from tests.models.tiny import lively_mobilenet

N = 6


def tiny_recipe(*changes: str) -> Recipe:
    assignments = ["images.sides=64,80", "images.test_side=64", "images.longest=128", "proposals.limit=6"]
    assignments += [f"modules.*.schedule.{one}" for one in ("steps=2", "warmup=0", "batch_size=2")]
    assignments += ["modules.*.anchor_sides=16,32,64", "modules.*.rois=8", "modules.*.cells=1"]
    assignments += ["modules.*.rpn_post_nms_top_n_train=4", "modules.*.rpn_post_nms_top_n_test=4"]
    assignments += ["modules.*.mask_width=8", "modules.*.mask_depth=1"]
    for number in range(1, 4):
        few = "max_attention=4" if number < 3 else "max_masks=4"
        assignments += [f"modules.{number}.label.{one}" for one in ("side=40", "iterations=1", few)]
    return override(recipe("best"), [*assignments, *changes])


def boxes_of(images: TaggedImages) -> dict[str, np.ndarray]:
    """Some boxes an image that depend on its size and place in the list alone."""
    found = {}
    for number, image in enumerate(images.images):
        rng = np.random.default_rng(number)
        corner = rng.uniform(0, 40, (6, 2))
        found[image.id] = np.concatenate([corner, corner + rng.uniform(20, 50, (6, 2))], 1).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=N, val=0, size=(96, 96), seed=3)


def train(year: Path, run: Path, *changes: str, until: int = 4, resume: bool = False, seed: int = 0) -> LabelPEnet:
    images = open_tagged(year, "train")
    network = LabelPEnet(lively_mobilenet(7), images.classes, tiny_recipe(*changes))
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    facts = run_facts(network, images, seed, "32-true")
    with claimed(run):
        start_run(run, facts, resume)
    options = RunOptions(resume, seed, checkpoint_minutes=0.0)
    training = Training(network, images, boxes_of(images), run, fabric, options, facts)
    pretrain(training, until)
    return network


@pytest.fixture(scope="module")
def straight(scenes, tmp_path_factory) -> Path:
    """A run from beginning to end without interruption."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(scenes, run)
    return run


def results(run: Path) -> dict[str, bytes]:
    """What a run leaves: weights and instances of every module."""
    return {str(path.relative_to(run)): path.read_bytes() for part in ("weights", "instances")
            for path in sorted((run / part).iterdir())}  # fmt: skip


def test_the_chain_trains_every_module_on_what_the_one_before_inferred(straight, scenes):
    assert set(results(straight)) == {
        *(f"weights/{part}.safetensors" for part in ("stem", *MODULES)),
        *(f"instances/module{number}.json" for number in range(1, 5)),
    }
    images = open_tagged(scenes, "train")
    for number in range(1, 5):
        found = read_inferred(straight, f"module{number}", len(images.classes))
        for image in images.images:
            own = found[image.id].validate(len(images.classes))
            assert own.image_size == read_image(image.path).shape[:2]
            assert set(own.labels.tolist()) <= set(image.tags)
            if number == 1:
                assert own.labels.tolist() == list(image.tags)


def test_the_trained_run_can_be_loaded_and_used(straight, scenes):
    network = LabelPEnet.from_run(straight)
    for part in ("stem", *MODULES):
        kept = load_file(straight / "weights" / f"{part}.safetensors")
        loaded = getattr(network, part).state_dict()
        assert kept.keys() == loaded.keys() and all(torch.equal(kept[name], loaded[name]) for name in kept)
    image = open_tagged(scenes, "train").images[0]
    for module in (2, 4):
        found = network.predict(image.path, module, torch.tensor([[0.0, 0, 50, 50]]))
        found.validate(len(network.classes))
        assert found.image_size == read_image(image.path).shape[:2]


def test_training_moves_each_module_and_never_the_stem(straight, scenes):
    images = open_tagged(scenes, "train")
    start = LabelPEnet(lively_mobilenet(7), images.classes, tiny_recipe())
    trained = LabelPEnet.from_run(straight)

    def moved(part: str) -> list[str]:
        before, after = getattr(start, part).state_dict(), getattr(trained, part).state_dict()
        return [name for name in before if not torch.equal(before[name], after[name])]

    assert not moved("stem")
    own = set(moved("classification")) - {"proposal_weights.bias"}  # which the softmax over the proposals cancels
    assert own == {"classifier.weight", "classifier.bias", "proposal_weights.weight", "tags.weight", "tags.bias"}
    for part in MODULES[1:]:
        names = moved(part)
        assert any(name.startswith("head.") for name in names) and "classifier.weight" in names
    assert any(name.startswith("mask_head.") for name in moved("segmentation"))


def equal_layers(network: LabelPEnet, one: str, other: str) -> tuple[set[str], set[str]]:
    """The names of the tensors that two modules share, and of those that are equal."""
    left, right = getattr(network, one).state_dict(), getattr(network, other).state_dict()
    shared = set(left) & set(right)
    return shared, {name for name in shared if torch.equal(left[name], right[name])}


def test_modules_three_and_four_begin_with_what_the_one_before_has_learnt(scenes, tmp_path):
    still = "modules.*.schedule.lr=0"  # so that what a module ends with is what it began with
    begun = train(scenes, tmp_path / "before", still)
    shared, equal = equal_layers(begun, "detection", "refinement")
    assert equal == shared and {"rpn.head.objectness.weight", "classifier.weight", "regressor.bias"} <= shared
    shared, equal = equal_layers(begun, "refinement", "segmentation")
    assert equal == shared == set(begun.segmentation.state_dict())
    alone = train(scenes, tmp_path / "backbone", still, "modules.4.start=backbone")
    shared, equal = equal_layers(alone, "refinement", "segmentation")
    assert "classifier.weight" not in equal and "mask_head.logits.weight" not in equal


def test_a_module_whose_predecessor_was_not_trained_begins_with_the_backbone(scenes):
    images = open_tagged(scenes, "train")
    network = LabelPEnet(lively_mobilenet(7), images.classes, tiny_recipe())
    before = {name: value.clone() for name, value in network.segmentation.state_dict().items()}
    network.untrained = MODULES[:3]
    start_from_before(network, 4)
    assert all(torch.equal(before[name], value) for name, value in network.segmentation.state_dict().items())
    network.untrained = ()
    start_from_before(network, 4)
    shared, equal = equal_layers(network, "refinement", "segmentation")
    assert equal == shared


class Interrupter:
    """Ctrl-C at the n-th image that passes through the stem, wherever in the chain that may be."""

    def __init__(self, monkeypatch) -> None:
        self.left = 10**9
        real = LabelPEnet.stem_maps

        def stem_maps(network: LabelPEnet, *views: object) -> tuple[Tensor, Tensor]:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return real(network, *views)

        monkeypatch.setattr(LabelPEnet, "stem_maps", stem_maps)


def test_a_run_that_is_interrupted_again_and_again_ends_as_if_it_had_not_been(straight, scenes, tmp_path, monkeypatch):
    interrupter, run, interruptions = Interrupter(monkeypatch), tmp_path / "run", 0
    while True:
        # Too few for any phase to pass at once, so that each of them is torn somewhere.
        interrupter.left = 4 + interruptions % 4
        try:
            train(scenes, run, resume=interruptions > 0)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert interruptions < 40, "no progress"
    assert interruptions >= 5
    assert results(run) == results(straight)


def test_resuming_a_finished_run_changes_nothing(straight, scenes, monkeypatch):
    before = results(straight)
    Interrupter(monkeypatch).left = 0  # not an image is looked at again
    train(scenes, straight, resume=True)
    assert results(straight) == before


def test_a_module_whose_roi_features_were_deleted_labels_by_the_same_ones(straight, scenes, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(run_folder.features(run).parent)
    run_folder.instances(run, "module1").unlink()
    train(scenes, run, resume=True)
    assert results(run) == results(straight)


def test_a_resumed_run_keeps_the_stem_that_it_began_with(scenes, tmp_path):
    """Even if it is resumed with other weights by mistake."""
    run = tmp_path / "run"
    train(scenes, run, until=0)
    stem = (run / "weights/stem.safetensors").read_bytes()
    images = open_tagged(scenes, "train")
    other = LabelPEnet(lively_mobilenet(1234), images.classes, tiny_recipe())
    fabric = Fabric(accelerator="cpu", devices=1)
    pretrain(Training(other, images, boxes_of(images), run, fabric, RunOptions(resume=True)), 0)
    assert (run / "weights/stem.safetensors").read_bytes() == stem
    expected = LabelPEnet(lively_mobilenet(0), images.classes, tiny_recipe())
    expected.load_part(run, "stem")
    assert all(torch.equal(a, b) for a, b in zip(other.stem.parameters(), expected.stem.parameters(), strict=True))


def garble(year: Path) -> None:
    """Wrong boxes, wrong flags and wrong masks; the names of the objects stay."""
    for number, path in enumerate(sorted((year / "Annotations").glob("*.xml"))):
        text = re.sub(r"<(xmin|ymin|xmax|ymax)>\d+<", rf"<\g<1>>{number + 1}<", path.read_text())
        path.write_text(text.replace("<difficult>0<", "<difficult>1<"))
    for folder in ("SegmentationObject", "SegmentationClass"):
        for path in (year / folder).glob("*.png"):
            Image.fromarray(np.full((5, 5), 255, np.uint8)).save(path)


def test_only_tags_supervise(straight, tmp_path):
    """Bit for bit the same run on annotation of which nothing but the class names is right."""
    year = write_scenes(tmp_path / "scenes", train=N, val=0, size=(96, 96), seed=3)
    garble(year)
    train(year, tmp_path / "run")
    assert results(tmp_path / "run") == results(straight)


def test_the_seed_matters(straight, scenes, tmp_path):
    train(scenes, tmp_path / "run", until=1, seed=1)
    key = "weights/classification.safetensors"
    assert results(tmp_path / "run")[key] != results(straight)[key]


@pytest.mark.parametrize("changes", [
    ("modules.1.freeze_head=false",),
    ("modules.1.freeze_head=false", "modules.1.pool=max"),
])  # fmt: skip
def test_module_one_is_also_trained_through_its_head(scenes, tmp_path, changes):
    train(scenes, tmp_path / "run", *changes, "modules.1.schedule.steps=1", until=1)
    assert not (tmp_path / "run/cache").exists()
    assert (tmp_path / "run/instances/module1.json").is_file()


def test_a_damaged_image_costs_only_itself(tmp_path):
    year = write_scenes(tmp_path / "scenes", train=N, val=0, size=(96, 96), seed=3)
    images = open_tagged(year, "train")
    damaged = images.images[2]
    damaged.path.write_bytes(damaged.path.read_bytes()[:900])
    train(year, tmp_path / "run", until=2)
    for name in ("module1", "module2"):
        found = read_inferred(tmp_path / "run", name, len(images.classes))
        assert len(found) >= N - 1 and (damaged.id not in found or len(found[damaged.id]) == 0)
        assert sum(len(found[image.id]) for image in images.images if image != damaged) > 0


def test_a_photograph_that_a_module_could_not_label_is_no_negative_of_the_next(scenes, tmp_path, monkeypatch, caplog):
    images = open_tagged(scenes, "train")
    lost, infer, taught = images.images[2], Training.infer, []

    def failing(self: Training, number: int, some: list[TaggedImage], pixels: list[np.ndarray]) -> list[Instances]:
        if number == 1 and lost in some:
            raise InputError(f"{lost.path}: gone for a moment")
        return infer(self, number, some, pixels)

    def watched(stage: Stage, *args: Any, **options: Any) -> None:
        taught.append(set(stage.images))
        train_stage(stage, *args, **options)

    monkeypatch.setattr(Training, "infer", failing)
    monkeypatch.setattr("labelpenet.training.pretrain.train_stage", watched)
    train(scenes, tmp_path / "run", until=1)
    train(scenes, tmp_path / "run", until=3, resume=True)
    everything = {image.id for image in images.images}
    assert taught == [everything, everything - {lost.id}, everything]
    assert f"note: 1 photographs have no labels ({lost.id}): not learnt" in caplog.messages
    found = [read_inferred(tmp_path / "run", f"module{number}", len(images.classes)) for number in (1, 2)]
    assert lost.id not in found[0] and found[1][lost.id].labels.tolist(), "what can be read again comes back"


def test_nothing_is_learnt_from_an_image_that_could_not_be_read(tmp_path):
    year = write_scenes(tmp_path / "scenes", train=N, val=0, size=(96, 96), seed=3)
    images = open_tagged(year, "train")
    images.images[2].path.write_bytes(b"no image")
    network = LabelPEnet(lively_mobilenet(7), images.classes, tiny_recipe())
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    training = Training(network, images, boxes_of(images), tmp_path / "run", fabric)
    training.features.compute_all(images.images)
    loss = cached_loss(training)
    assert loss([2], 0) == {}
    for others in ([1], [1, 4]):
        assert torch.equal(loss([*others, 2], 0)["multi_label"], loss(others, 0)["multi_label"])


def test_a_class_that_no_readable_photograph_shows_is_named(tmp_path, caplog):
    year = write_scenes(tmp_path / "scenes", train=3, val=0, size=(96, 96), seed=3)
    images = open_tagged(year, "train")
    images.images[0].path.write_bytes(b"no image")
    tagged = [replace(image, tags=tags) for image, tags in zip(images.images, ((0, 1), (1,), (1, 2)), strict=True)]
    images = TaggedImages(images.classes, tuple(tagged))
    network = LabelPEnet(lively_mobilenet(7), images.classes, tiny_recipe())
    fabric, options = Fabric(accelerator="cpu", devices=1), CascadeOptions(device="cpu", cache=tmp_path / "cache")
    facts = run_facts(network, images, 0, "32-true")
    with open_training(network, images, tmp_path / "run", fabric, options, facts, None) as training:
        assert training.images.images == images.images[1:]
    assert [line for line in caplog.messages if "no photograph that can be read" in line] == [
        f"note: no photograph that can be read shows {images.classes[0]}, so nothing is learnt of it"
    ]


def test_a_run_learns_from_the_proposals_of_another_tool_and_resumes_with_no_others(scenes, tmp_path):
    images = open_tagged(scenes, "train")
    boxes, files = boxes_of(images), (tmp_path / "boxes.npz", tmp_path / "other.npz")
    np.savez(files[0], **boxes)
    np.savez(files[1], **{name: one[::-1] for name, one in boxes.items()})

    def start(given: Path | None, resume: bool = True) -> None:
        options = CascadeOptions(resume, device="cpu", proposals=given, cache=tmp_path / "cache")
        train_run(images, tmp_path / "run", tiny_recipe("warm_up.steps=1"), backbone="tiny", until=1, options=options)

    start(files[0], resume=False)
    assert not (tmp_path / "cache").exists(), "none of our own were computed"
    before = results(tmp_path / "run")
    start(files[0])
    assert results(tmp_path / "run") == before
    for other in (files[1], None):
        with pytest.raises(InputError, match="another proposals"):
            start(other)
