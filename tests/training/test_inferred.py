"""What a module inferred: whole after any interruption, the same for any number of processes."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO

from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.files import write_json
from labelpenet.errors import InputError
from labelpenet.instances import Instances
from labelpenet.training.inferred import infer_all, read_inferred
from labelpenet.training.photographs import find_one_by_one
from tests.formats.test_reader_fuzz import forged

N, C = 9, 3
IMAGES = TaggedImages(
    ("ball", "box", "star"), tuple(TaggedImage(f"photo-{i}", Path(f"{i}.jpg"), (i % C,)) for i in range(N))
)


def guess(image: TaggedImage) -> Instances:
    """A few instances that depend on the image alone; of photo-3 none."""
    number = int(image.id.split("-")[1])
    size = (20 + number, 30)
    if number == 3:
        return Instances.empty(size, with_masks=True)
    generator = torch.Generator().manual_seed(number)
    masks = torch.rand(2, *size, generator=generator) > 0.5
    boxes = torch.tensor([[0.1, 0.2, 7.3, 9.7], [3, 1, 30, 20]])
    return Instances(boxes, torch.tensor([number % C, 2]), torch.rand(2, generator=generator), size, masks)


def each(infer):
    """As `infer_all` wants it."""
    return lambda images: find_one_by_one(infer, images, torch.device("cpu"))


class Stop(Exception):
    pass


def stopping_after(count: int, error: type[BaseException] = KeyboardInterrupt):
    asked = []

    def infer(image: TaggedImage) -> Instances:
        if len(asked) == count:
            raise error
        asked.append(image.id)
        return guess(image)

    return infer, asked


def whole(run: Path, **options) -> bytes:
    infer_all(run, "module1", IMAGES, each(guess), **options)
    return run_folder.instances(run, "module1").read_bytes()


def test_what_was_inferred_comes_back(tmp_path):
    whole(tmp_path)
    found = read_inferred(tmp_path, "module1", C)
    assert list(found) == [image.id for image in IMAGES.images] and len(found) == N
    for image in IMAGES.images:
        own, expected = found[image.id], guess(image)
        assert own.image_size == expected.image_size
        torch.testing.assert_close(own.boxes, expected.boxes)
        assert torch.equal(own.labels, expected.labels) and torch.equal(own.weights, expected.weights)
        assert torch.equal(own.masks, expected.masks)


def test_the_file_is_what_readers_of_coco_take(tmp_path):
    """pycocotools indexes it, and takes its annotations as results; of version 0.1, too, the instances come back."""
    content = json.loads(whole(tmp_path))
    del content["checksum"]
    with contextlib.redirect_stdout(None):
        coco = COCO(str(run_folder.instances(tmp_path, "module1")))
        areas = [row["area"] for row in coco.dataset["annotations"]]
        results = coco.loadRes(coco.dataset["annotations"])
    assert [one["image"] for one in coco.dataset["images"]] == [image.id for image in IMAGES.images]
    assert content["categories"] == [{"id": i + 1, "name": name} for i, name in enumerate(IMAGES.classes)]
    for number, image in enumerate(IMAGES.images, 1):
        masks = guess(image).masks.numpy()
        for reader in (coco, results):
            rows = reader.loadAnns(reader.getAnnIds(number, iscrowd=False))
            assert all((reader.annToMask(row) == mask).all() for row, mask in zip(rows, masks, strict=True))
    assert areas == [int(mask.sum()) for image in IMAGES.images for mask in guess(image).masks]
    assert not list(tmp_path.rglob("*.jsonl")) and not list(tmp_path.rglob("*.tmp"))

    names = {one["id"]: one.pop("image") for one in content["images"]}
    for one in content["images"]:
        one["id"] = names[one["id"]]
    old = [{**row, "image_id": names[row["image_id"]]} for row in content["annotations"]]
    write_json(run_folder.instances(tmp_path / "old", "module1"), {**content, "annotations": old})
    before, after = read_inferred(tmp_path / "old", "module1", C), read_inferred(tmp_path, "module1", C)
    assert list(before) == list(after)
    assert all(torch.equal(before[name].masks, after[name].masks) for name in names.values())


@pytest.mark.parametrize("done", [0, 1, 5, N - 1])
def test_an_interruption_costs_a_few_images_and_changes_nothing(tmp_path, done):
    expected = whole(tmp_path / "whole")
    infer, _ = stopping_after(done)
    with pytest.raises(KeyboardInterrupt):
        infer_all(tmp_path / "torn", "module1", IMAGES, each(infer))
    assert not run_folder.instances(tmp_path / "torn", "module1").exists()
    again, asked = stopping_after(N)
    infer_all(tmp_path / "torn", "module1", IMAGES, each(again))
    assert run_folder.instances(tmp_path / "torn", "module1").read_bytes() == expected
    kept = N - len(asked)
    assert (kept == done) if torch.get_num_threads() == 1 else (kept <= done)


@pytest.mark.parametrize("cut", [1, 10, 60, 200])
def test_a_torn_line_is_done_again(tmp_path, cut):
    expected = whole(tmp_path / "whole")
    infer, _ = stopping_after(6)
    with pytest.raises(KeyboardInterrupt):
        infer_all(tmp_path, "module1", IMAGES, each(infer))
    (part,) = (tmp_path / "instances").glob("*.jsonl")
    part.write_bytes(part.read_bytes()[:-cut])
    assert whole(tmp_path) == expected


def test_a_finished_module_is_not_asked_again(tmp_path):
    whole(tmp_path)
    infer, asked = stopping_after(0, Stop)
    infer_all(tmp_path, "module1", IMAGES, each(infer))
    assert not asked


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_writes_the_same_file(tmp_path, world):
    """Threads stand for the processes; they meet at the barrier."""
    expected = whole(tmp_path / "one")
    # A run of other size was interrupted before.
    infer, _ = stopping_after(4)
    with pytest.raises(KeyboardInterrupt):
        infer_all(tmp_path / "many", "module1", IMAGES, each(infer), 0, 1)
    barrier = threading.Barrier(world, timeout=60)
    errors: list[BaseException] = []

    def process(rank: int) -> None:
        try:
            infer_all(tmp_path / "many", "module1", IMAGES, each(guess), rank, world, lambda: barrier.wait() and None)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert run_folder.instances(tmp_path / "many", "module1").read_bytes() == expected
    assert not list(tmp_path.rglob("*.jsonl"))


def damaged(*names: str):
    """`guess`, which cannot read the photographs of these names."""

    def infer(image: TaggedImage) -> Instances:
        if image.id in names:
            raise InputError(f"{image.path}: damaged; replace the file")
        return guess(image)

    return infer


def test_an_unreadable_image_is_told_and_left_out(tmp_path, caplog):
    infer_all(tmp_path, "module1", IMAGES, each(damaged("photo-4")))
    assert caplog.messages == ["skipped: 4.jpg: damaged; replace the file"]
    found = read_inferred(tmp_path, "module1", C)
    assert "photo-4" not in found and len(found) == N - 1 and len(found["photo-5"]) == 2
    assert "photo-3" in found, "where nothing was found, that is known"


def test_a_resumed_run_tries_an_unreadable_image_again(tmp_path):
    expected = whole(tmp_path / "straight")

    def infer(image: TaggedImage) -> Instances:
        if image.id == "photo-7":
            raise KeyboardInterrupt
        return damaged("photo-4")(image)

    with pytest.raises(KeyboardInterrupt):
        infer_all(tmp_path / "resumed", "module1", IMAGES, each(infer))
    assert whole(tmp_path / "resumed") == expected


def test_labels_of_no_image_are_no_labels(tmp_path):
    with pytest.raises(InputError, match="label none of the images"):
        infer_all(tmp_path, "module1", IMAGES, each(damaged(*(image.id for image in IMAGES.images))))
    assert not run_folder.instances(tmp_path, "module1").exists()
    whole(tmp_path)


def test_another_error_is_not_swallowed(tmp_path):
    infer, _ = stopping_after(2, Stop)
    with pytest.raises(Stop):
        infer_all(tmp_path, "module1", IMAGES, each(infer))
    assert not run_folder.instances(tmp_path, "module1").exists()


def test_modules_do_not_mix(tmp_path):
    infer, _ = stopping_after(4)
    with pytest.raises(KeyboardInterrupt):
        infer_all(tmp_path, "module1", IMAGES, each(infer))
    infer, asked = stopping_after(N)
    infer_all(tmp_path, "module2", IMAGES, each(infer))
    assert len(asked) == N


def test_what_is_missing_or_damaged_is_named(tmp_path):
    path = run_folder.instances(tmp_path, "module1")
    with pytest.raises(InputError, match="module1 has not labelled") as caught:
        read_inferred(tmp_path, "module1", C)
    assert str(path) in str(caught.value)
    content = whole(tmp_path)
    for damaged in (content[:-20], b"[]", b"{}", b"", b"3", b"\xff\xfe", b'{"images": [1], "annotations": []}'):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged") as caught:
            read_inferred(tmp_path, "module1", C)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    rows, rng = json.loads(content), random.Random(0)
    del rows["checksum"]
    for _ in range(40):
        path.write_text(json.dumps(forged(rows, rng)))
        with contextlib.suppress(InputError):
            for found in read_inferred(tmp_path, "module1", C).values():
                assert ((found.weights >= 0) & (found.weights <= 1) & (found.labels < C)).all()
