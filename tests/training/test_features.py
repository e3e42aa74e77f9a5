"""What a run keeps is named after, or compared with, what it was made from; what is damaged is made again and told."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.files import hash_file, write_json
from labelpenet.data.scenes import write_scenes
from labelpenet.formats import open_tagged
from labelpenet.models.cascade import LabelPEnet
from labelpenet.training.features import RoIFeatures
from labelpenet.training.measure import is_kept, made_from
from tests.models.tiny import lively_tiny
from tests.training.test_pretrain import boxes_of, results, tiny_recipe, train

N = 4


@pytest.fixture
def images(tmp_path) -> TaggedImages:
    return open_tagged(write_scenes(tmp_path / "scenes", train=N, val=0, size=(64, 80), seed=3), "train")


def kept(run: Path, images: TaggedImages, boxes: dict, seed: int = 7) -> tuple[RoIFeatures, dict[str, torch.Tensor]]:
    """The features of all images in a new process, which knows nothing but the run folder."""
    network = LabelPEnet(lively_tiny(seed), images.classes, tiny_recipe())
    features = RoIFeatures(run, network, boxes, Fabric(accelerator="cpu", devices=1, precision="32-true"))
    features.compute_all(images.images)
    return features, {image.id: features.kept(image) for image in images.images}


def test_no_image_gets_the_features_of_another(tmp_path, images):
    boxes = boxes_of(images)
    damaged, replaced, last = (images.images[i] for i in (1, 2, 3))
    photograph = damaged.path.read_bytes()
    damaged.path.write_bytes(b"no image")
    first, before = kept(tmp_path / "run", images, boxes)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert before[damaged.id] is None and len(times) == N
    # the damaged photograph is replaced, another one too, and the list is read in another order
    damaged.path.write_bytes(photograph)
    replaced.path.write_bytes(last.path.read_bytes())
    order = TaggedImages(images.classes, images.images[::-1])
    second, after = kept(tmp_path / "run", order, boxes)
    _, anew = kept(tmp_path / "anew", images, boxes)
    assert all(torch.equal(after[name], anew[name]) for name in anew)
    assert not torch.equal(after[replaced.id], before[replaced.id])
    same = {path for path in second.folder.iterdir() if times.get(path) == path.stat().st_mtime_ns}
    assert (
        same == {second.path(image) for image in (images.images[0], last)} and len(list(second.folder.iterdir())) == N
    )


def test_other_weights_and_proposals_have_other_features(tmp_path, images):
    boxes = boxes_of(images)
    first, _ = kept(tmp_path, images, boxes)
    other, _ = kept(tmp_path, images, boxes, seed=8)
    moved, _ = kept(tmp_path, images, {name: one + np.float32(1) for name, one in boxes.items()})
    image = images.images[0]
    assert len({first.path(image), other.path(image), moved.path(image)}) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_damaged_features_are_computed_again_and_told(tmp_path, images, caplog, damage):
    features, before = kept(tmp_path, images, boxes_of(images))
    for image in images.images[:2]:
        garble(features.path(image), damage)
    features.network.train()
    found = features.known(images.images[0])
    assert torch.equal(found, before[images.images[0].id]) and features.network.classification.training
    _, after = kept(tmp_path, images, boxes_of(images))
    assert all(torch.equal(after[name], before[name]) for name in before)
    said = caplog.text
    assert all(f"{features.path(image)} is damaged" in said for image in images.images[:2])


def garble(path: Path, damage: str, where: float = 0.6) -> None:
    content = bytearray(path.read_bytes())
    place = int(where * len(content))
    if damage == "flip":
        content[place] ^= 16
    path.write_bytes(b"" if damage == "empty" else content if damage == "flip" else content[:place])


def test_a_finished_module_that_is_damaged_comes_back_bit_for_bit(tmp_path, caplog):
    year = write_scenes(tmp_path / "scenes", train=N, val=0, size=(64, 80), seed=3)
    run = tmp_path / "run"
    train(year, run, until=1)
    whole = results(run)
    for name, damage in (
        ("weights/classification.safetensors", "flip"),
        ("weights/stem.safetensors", "cut"),
        ("instances/module1.json", "flip"),
    ):
        garble(run / name, damage)
        train(year, run, until=1, resume=True)
        assert results(run) == whole
        assert f"{run / name} is damaged" in caplog.text


def test_predictions_are_kept_for_what_they_were_made_from_alone(tmp_path, images):
    run, precision = tmp_path / "run", "32-true"
    write_json(run_folder.facts(run), {"classes": list(images.classes), "recipe": {"a": 1}, "source": "x"})
    for part in ("stem", "detection"):
        path = run_folder.weights(run, part)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(part.encode())

    def key_of(precision: str, images: Sequence[TaggedImage]) -> str:
        return made_from(run_folder.state(run), precision, {image.id: hash_file(image.path) for image in images})

    key = key_of(precision, images.images)
    path = run_folder.predictions(run, "val", 2)
    write_json(path, {"annotations": []})
    assert not is_kept(path, key)
    write_json(path.with_suffix(".made-from.json"), {"made_from": key, "content": hash_file(path)})
    assert is_kept(path, key) and not is_kept(path, key[::-1])
    assert key_of(precision, images.images) == key
    assert key_of("bf16-mixed", images.images) != key
    assert key_of(precision, images.images[1:]) != key
    write_json(run_folder.facts(run), {"classes": list(images.classes), "recipe": {"a": 2}})
    assert key_of(precision, images.images) != key
    write_json(run_folder.facts(run), {"classes": list(images.classes), "recipe": {"a": 1}})
    assert key_of(precision, images.images) == key  # wherever the data lay
    run_folder.weights(run, "detection").write_bytes(b"other")
    assert key_of(precision, images.images) != key
    run_folder.weights(run, "detection").write_bytes(b"detection")
    shutil.copy(images.images[1].path, images.images[0].path)
    assert key_of(precision, images.images) != key
    garble(path, "flip")
    assert not is_kept(path, key)
