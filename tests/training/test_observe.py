"""What a run shows of itself: that it is right, that it is there, and that training never notices."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from labelpenet.config import RunOptions
from labelpenet.data import AnnotatedImages, TaggedImages, read_image, write_scenes
from labelpenet.engine.log import MetricsLog, read_metrics
from labelpenet.errors import InputError
from labelpenet.evaluation import evaluate
from labelpenet.formats import open_annotated, open_tagged
from labelpenet.models.cascade import MODULES, LabelPEnet
from labelpenet.training import observe
from labelpenet.training.features import evaluating
from labelpenet.training.observe import Observer, check_held_out
from labelpenet.training.pretrain import Training, pretrain, stage
from tests.models.tiny import lively_tiny
from tests.training.test_pretrain import boxes_of, results, tiny_recipe

UNTIL = 3
# A random network finds nothing that is sure; these let something through, so that there is something to measure.
RECIPE = tiny_recipe(
    "modules.2.schedule.steps=3", "modules.*.score_threshold=0.01",
    *(f"modules.{number}.predict.{one}" for number in (2, 3) for one in ("min_score=0", "side=40", "iterations=1")),
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=6, val=5, size=(96, 96), seed=3)


def a_training(year: Path, run: Path, resume: bool = False) -> Training:
    images = open_tagged(year, "train")
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    network = LabelPEnet(lively_tiny(7), images.classes, RECIPE)
    return Training(network, images, boxes_of(images), run, fabric, RunOptions(resume, checkpoint_minutes=0.0))


def held_out(year: Path) -> tuple[AnnotatedImages, dict[str, np.ndarray]]:
    annotated = open_annotated(year, "val", open_tagged(year, "train").classes)
    return annotated, boxes_of(annotated.tagged)


@pytest.fixture(scope="module")
def observed(scenes, tmp_path_factory) -> Training:
    """A run that is looked at after every step."""
    training = a_training(scenes, tmp_path_factory.mktemp("observed") / "run")
    pretrain(training, UNTIL, Observer(training, 0.0, *held_out(scenes)))
    return training


def rows_of(run: Path, part: str, number: int = 2) -> list[dict]:
    return [row for row in read_metrics(run) if f"{part}/images" in row and row["stage"] == MODULES[number - 1]]


def test_training_does_not_notice(scenes, observed, tmp_path):
    """Bit for bit the weights and instances of a run that nothing looks at."""
    training = a_training(scenes, tmp_path / "run")
    pretrain(training, UNTIL)
    assert results(training.run) == results(observed.run)
    assert not (tmp_path / "run/metrics.jsonl").read_text().count("val")


def test_every_part_is_in_its_mode_again(scenes, tmp_path):
    training = a_training(scenes, tmp_path)
    network = training.network
    network.detection.train()
    network.detection.head.eval()
    network.refinement.rpn.train()
    before = [part.training for part in network.modules()]
    log = SimpleNamespace(write=lambda row: None, picture=lambda *picture: None)
    torch.manual_seed(5)
    Observer(training, 0.0, *held_out(scenes)).look([2, 3], 1, log)
    assert [part.training for part in network.modules()] == before
    with pytest.raises(InputError), evaluating(network):
        raise InputError("something went wrong")
    assert [part.training for part in network.modules()] == before


def test_figures_are_those_of_the_finished_module(scenes, observed):
    """Once a stage is done; measured anew here, image by image, from the run folder's weights."""
    network = LabelPEnet(lively_tiny(7), observed.images.classes, RECIPE)
    for part in ("stem", *MODULES[:UNTIL]):
        assert network.load_part(observed.run, part)
    annotated, boxes = held_out(scenes)
    truths = annotated.truths()
    for number in range(1, UNTIL + 1):
        found = {}
        for image in annotated.tagged.images:
            pixels = read_image(image.path)
            proposals = network.select(torch.from_numpy(boxes[image.id]), pixels.shape)
            found[image.id] = network.predict(pixels, number, proposals)
        expected = evaluate(found, truths, network.classes, "voc12")
        [row] = rows_of(observed.run, "val", number)
        assert row["val/images"] == 5 and row["val/box_mAP@0.5"] == pytest.approx(expected["box"]["mAP"])
        assert row["val/mask_mAP@0.5"] == pytest.approx(expected["mask"]["mAP@0.5"])
    assert any(row["val/box_mAP@0.5"] > 0 for number in (1, 2, 3) for row in rows_of(observed.run, "val", number))


def test_there_are_figures_within_a_stage_and_at_its_end(observed):
    assert [row["step"] for row in rows_of(observed.run, "val_part")] == [1, 2, 3, 3]
    assert [row["step"] for row in rows_of(observed.run, "val")] == [3]
    for row in rows_of(observed.run, "val_part"):
        assert all(0 <= row[f"val_part/{name}"] <= 1 for name in ("box_mAP@0.5", "mask_mAP@0.5"))


def events(run: Path, name: str) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard" / name), {"images": 0, "scalars": 0})
    found.Reload()
    return found


def test_tensorboard_has_the_pictures_and_the_figures(observed):
    for number in range(1, UNTIL + 1):
        board = events(observed.run, MODULES[number - 1])
        shown = board.Tags()["images"]
        ids = {image.id for image in observed.images.images if image.tags}
        assert len(shown) == observe.PICTURES
        assert {name.removeprefix(f"module{number}/") for name in shown} <= ids
        steps = 3 if number == 2 else 2
        assert all({event.step for event in board.Images(name)} == set(range(1, steps + 1)) for name in shown)
        assert {"val/box_mAP@0.5", "val_part/mask_mAP@0.5"} <= set(board.Tags()["scalars"])


def test_the_images_are_chosen_by_the_seed_and_have_tags(scenes, tmp_path):
    training = a_training(scenes, tmp_path)
    images = training.images.images
    bare = (*images[:1], *(type(image)(image.id, image.path, ()) for image in images[1:3]), *images[3:])
    training.images = TaggedImages(training.images.classes, bare)
    first, again = Observer(training), Observer(training)
    assert first.shown == again.shown == sorted(set(first.shown)) and len(first.shown) == observe.PICTURES
    assert not {1, 2} & set(first.shown)
    choices = set()
    training.images = TaggedImages(training.images.classes, images)
    for seed in range(8):
        training.options = RunOptions(seed=seed)
        choices.add(tuple(Observer(training).shown))
    assert len(choices) > 1


def test_unreadable_images_cost_only_themselves(tmp_path):
    year = write_scenes(tmp_path / "scenes", train=6, val=5, size=(96, 96), seed=3)
    training, one = a_training(year, tmp_path / "run"), held_out(year)
    watcher = Observer(training, 0.0, *one)
    training.images.images[watcher.shown[0]].path.write_bytes(b"no image")
    one[0].tagged.images[2].path.write_bytes(b"no image")
    log = MetricsLog(tmp_path / "run", "detection", [])
    watcher.look([2], 1, log)
    log.close()
    assert len(events(tmp_path / "run", "detection").Tags()["images"]) == observe.PICTURES - 1
    [row] = rows_of(tmp_path / "run", "val_part")
    assert row["val_part/images"] == 4 and math.isfinite(row["val_part/box_mAP@0.5"])


def test_held_out_photographs_that_cannot_be_read_are_no_misses(tmp_path):
    year = write_scenes(tmp_path / "scenes", train=6, val=4, size=(96, 96), seed=3)
    training, one = a_training(year, tmp_path / "run"), held_out(year)
    watcher, images = Observer(training, 0.0, *one), one[0].tagged.images
    truths = one[0].truths()
    lines = [(i.id, truths[i.id].instances.image_size, truths[i.id].instances.to_coco(i.id)) for i in images]
    perfect = watcher._measure("val", lines, range(4))
    for image in images[1:]:
        content = image.path.read_bytes()
        image.path.write_bytes(content[: len(content) // 2])  # its size can be read still, and so its truth
    assert [line[0] for line in watcher._predict(2, range(4))] == [images[0].id]
    alone = watcher._measure("val", lines[:1], range(4))
    assert alone == {**perfect, "val/images": 1} and perfect["val/box_mAP@0.5"] == pytest.approx(1)
    assert watcher._measure("val", [], range(4)) == {"val/images": 0}


def test_without_a_held_out_split_there_are_pictures_alone(scenes, tmp_path):
    training = a_training(scenes, tmp_path / "run")
    log = MetricsLog(tmp_path / "run", "refinement", [])
    Observer(training).look([2, 3], 4, log)
    log.close()
    shown = events(tmp_path / "run", "refinement").Tags()["images"]
    assert {name.split("/")[0] for name in shown} == {"module2", "module3"} and not read_metrics(tmp_path / "run")


def test_after_an_interruption_the_figures_are_there_once(scenes, tmp_path, monkeypatch):
    """Interrupted between the end of a stage and what it says of itself."""
    conclude, run = Observer.conclude, tmp_path / "run"

    def torn(self, one, numbers):
        conclude(self, one, numbers)
        raise KeyboardInterrupt

    training = a_training(scenes, run)
    monkeypatch.setattr(Observer, "conclude", torn)
    with pytest.raises(KeyboardInterrupt):
        pretrain(training, 1, Observer(training, 60.0, *held_out(scenes)))
    before = read_metrics(run)
    monkeypatch.setattr(Observer, "conclude", conclude)
    training = a_training(scenes, run, resume=True)
    pretrain(training, 1, Observer(training, 60.0, *held_out(scenes)))
    after = read_metrics(run)
    assert len(rows_of(run, "val", 1)) == 1
    assert [{**row, "time": 0} for row in after] == [{**row, "time": 0} for row in before]


def test_processes_share_the_work_and_the_first_one_writes(scenes, observed, tmp_path, monkeypatch):
    run, shares = tmp_path / "run", []
    training = a_training(scenes, run)
    for part in ("stem", *MODULES[:UNTIL]):
        assert training.network.load_part(observed.run, part)

    def gather(world, lines):
        shares.append(lines)
        return shares

    monkeypatch.setattr(observe, "gather", gather)
    one = stage(a_training(scenes, observed.run), 2)
    fabric = training.fabric
    for rank in (1, 0):
        training.fabric = SimpleNamespace(
            global_rank=rank, world_size=2, device=fabric.device, autocast=fabric.autocast
        )
        assert not read_metrics(run)
        Observer(training, 0.0, *held_out(scenes)).conclude(one, [2])
    assert [len(share) for share in shares] == [2, 3]
    [row], [expected] = rows_of(run, "val"), rows_of(observed.run, "val")
    assert {**row, "time": 0} == {**expected, "time": 0}


def test_a_split_that_is_trained_on_is_refused(scenes, tmp_path):
    images, annotated = open_tagged(scenes, "train"), open_annotated(scenes, "val")
    check_held_out(images, annotated)
    with pytest.raises(InputError, match=r"6 of the 6 images to --evaluate on are trained on, such as train_00000"):
        check_held_out(images, open_annotated(scenes, "train"))
    # under another name, behind a link
    (tmp_path / "link").symlink_to(scenes, target_is_directory=True)
    other = annotated.tagged.images[3]
    linked = type(other)("alias", tmp_path / "link" / other.path.relative_to(scenes), other.tags)
    with pytest.raises(InputError, match=r"1 of the 5 images .* such as val_00003; choose a split"):
        check_held_out(TaggedImages(images.classes, (*images.images, linked)), annotated)
    fewer = AnnotatedImages(TaggedImages(images.classes[:1], annotated.tagged.images), annotated.read, (1,))
    with pytest.raises(InputError, match="other classes"):
        check_held_out(images, fewer)


def test_what_trains_has_no_way_to_the_held_out_annotation(scenes, observed):
    """Everything that can be reached from what stages are made of."""
    seen: set[int] = set()
    waiting: list[object] = [observed]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (torch.Tensor, np.ndarray, Fabric)):
            continue
        seen.add(id(value))
        assert not isinstance(value, (AnnotatedImages, Observer))
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        waiting += vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
