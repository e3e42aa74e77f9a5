"""Recipe `paper` with VGG-16 from tags to labels, in miniature: its choices as they are, but small in size and number.

The network is torchvision's VGG-16 cut where the paper cuts it, an eighth as wide and with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from labelpenet import config
from labelpenet.data import proposals
from labelpenet.data.images import read_image
from labelpenet.data.scenes import write_scenes
from labelpenet.engine.log import read_metrics
from labelpenet.formats import open_tagged
from labelpenet.models import build
from labelpenet.models.cascade import MODULES, LabelPEnet, read_run
from labelpenet.training.curriculum import STAGE, forward_backward
from labelpenet.training.inferred import read_inferred
from labelpenet.training.run import train_run
from tests.models.tiny import NarrowPlug, NarrowVGG

STEPS = 40
SMALL = [
    *("images.sides=64,80", "images.longest=112", "proposals.limit=12"),
    *(f"modules.*.{one}" for one in ("rois=16", "rpn_post_nms_top_n_train=24", "rpn_post_nms_top_n_test=24")),
    *("modules.*.anchor_sides=16,32,64", "modules.*.mask_width=8", "modules.*.mask_depth=1"),
    "modules.*.score_threshold=0.001",
    *(f"modules.*.{part}.{one}=6" for part in ("label", "predict") for one in ("max_attention", "max_masks")),
    *(f"modules.*.schedule.steps={STEPS}", "modules.*.schedule.batch_size=1"),
    *("forward_backward.schedule.steps=1", "forward_backward.schedule.batch_size=1"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, LabelPEnet]:
    """The folder of scenes, cascade and second stage; and the cascade as it came out of training."""
    home = tmp_path_factory.mktemp("paper")
    (home / "year").symlink_to(write_scenes(home / "scenes", train=4, val=0, size=(64, 80), seed=5))
    images = open_tagged(home / "year", "train")
    torch.manual_seed(0)
    torch.save(NarrowVGG().state_dict(), home / "vgg16.pth")
    threads = torch.get_num_threads()
    recipe = config.override(config.recipe("paper"), SMALL)
    options = config.CascadeOptions(device="cpu", precision="32-true", cache=home / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.BACKBONES, "vgg16", (NarrowVGG, NarrowPlug))
        patch.setattr(proposals, "_usable_cores", lambda: 1)  # starting processes would take longer than the work
        torch.set_num_threads(1)
        network = train_run(images, home / "run", recipe, backbone="vgg16", weights=home / "vgg16.pth", options=options)
        forward_backward(images, home / "run", home / "fb", options=options)
        torch.set_num_threads(threads)
    return home, network


def test_the_choices_are_the_papers(trained):
    home, network = trained
    used, paper = read_run(home / "run")["recipe"], json.loads(json.dumps(config.to_dict(config.recipe("paper"))))
    small = {one.split("=")[0].split(".")[-1] for one in SMALL}

    def differing(one: Any, other: Any, name: str) -> set[str]:
        if isinstance(one, dict):
            return set().union(*(differing(one[key], other[key], key) for key in one))
        if name == "modules":
            return set().union(*(differing(a, b, "") for a, b in zip(one, other, strict=True)))
        return set() if one == other else {name}

    assert differing(used, paper, "") == small
    assert network.recipe.modules[0].attention == "excitation" and not network.recipe.modules[3].weighted
    rows = read_metrics(home / "run")
    for name in MODULES:
        assert [row["lr"] for row in rows if row["stage"] == name] == pytest.approx([1e-3, 1e-4])  # from 80 % on
    assert {row["lr"] for row in read_metrics(home / "fb") if "lr" in row} == {1e-4}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_learns(trained, name):
    rows = [row for row in read_metrics(trained[0] / "run") if row["stage"] == name]
    first, last = (  # the loss of boxes grows while more RoIs are taken for objects
        sum(row.get(f"loss/{term}", 0) for term in ("multi_label", "rpn_objectness", "class")) for row in rows
    )
    assert last < 0.9 * first and rows[-1]["skipped"] == 0


@pytest.mark.parametrize("run", ["run", "fb"])
def test_every_module_labels_photographs_with_their_tags_alone(trained, run):
    home, _ = trained
    images = open_tagged(home / "year", "train")
    for number in range(1, 5):
        labels = read_inferred(home / run, f"module{number}", len(images.classes))
        for image in images.images:
            found = labels[image.id].validate(len(images.classes))
            assert set(found.labels.tolist()) <= set(image.tags) and (number > 1 or len(found) == len(image.tags))
            assert found.masks is not None and bool(found.masks.any((1, 2)).all())
        assert any(len(labels[image.id]) for image in images.images)


def test_the_weights_come_back_as_they_were_trained(trained):
    home, network = trained
    image = open_tagged(home / "year", "train").images[0]
    pixels = read_image(image.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.BACKBONES, "vgg16", (NarrowVGG, NarrowPlug))
        loaded = LabelPEnet.from_run(home / "run")
    boxes = loaded.select(torch.tensor([[5.0, 5, 40, 50], [20, 10, 70, 60]]), pixels.shape)
    for number in range(1, 5):
        one, other = (
            each.eval().infer(number, each.batch([pixels], [image.tags], [boxes]))[0][0] for each in (network, loaded)
        )
        assert len(one) and torch.equal(one.boxes, other.boxes) and torch.equal(one.weights, other.weights)


def test_the_second_stage_moves_all_layers(trained):
    home, network = trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.BACKBONES, "vgg16", (NarrowVGG, NarrowPlug))
        later = LabelPEnet.from_run(home / "fb")
    before = dict(network.named_parameters())
    moved = {name for name, value in later.named_parameters() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"stem", *MODULES}
    assert "stem.0.weight" in moved and "classification.head.1.weight" in moved
    terms = {key.removeprefix("loss/") for row in read_metrics(home / "fb") if row["stage"] == STAGE for key in row}
    assert terms >= {"forward_1", "forward_2", "forward_3", "forward_4", "backward_1_single", "backward_3"}
