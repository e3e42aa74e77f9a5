"""Many photographs on a GPU go through the network together, each as if it were alone."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from labelpenet.data.dataset import TaggedImage
from labelpenet.errors import InputError
from labelpenet.instances import Instances
from labelpenet.training.photographs import TOGETHER, WINDOW, find_instances, find_one_by_one
from tests.device import DEVICE, move, pretended
from tests.models.test_cascade import photograph
from tests.test_device import MOST, build, same

CPU = torch.device("cpu")
SIZES = [(64, 80), (48, 96), (64, 80), (80, 64)]


@pytest.fixture
def images(tmp_path: Path) -> list[TaggedImage]:
    """More than one window of photographs of three sizes, the sixth of them damaged."""
    found = []
    for number in range(WINDOW + 6):
        path = tmp_path / f"{number}.png"
        cv2.imwrite(str(path), photograph(*SIZES[number % len(SIZES)], seed=number))
        found.append(TaggedImage(path.name, path, (number % 3,)))
    found[5].path.write_bytes(b"no photograph")
    return found


def nothing(pixels: np.ndarray) -> Instances:
    return Instances.empty((pixels.shape[0], pixels.shape[1]), with_masks=True)


def test_photographs_of_one_size_go_together_and_come_back_in_order(images):
    calls = []

    def infer(some, pixels):
        assert [one.shape[:2] for one in pixels] == [SIZES[int(image.path.stem) % len(SIZES)] for image in some]
        calls.append([one.shape for one in pixels])
        return [nothing(one) for one in pixels]

    answers = list(find_instances(infer, images, lambda pixels: pixels.shape, DEVICE))
    assert [image for image, _, _ in answers] == images
    for (image, found, note), size in zip(answers, SIZES * len(images), strict=False):
        if image is images[5]:
            assert found is None and note.startswith(f"skipped: {image.path}")
        else:
            assert found is not None and found.image_size == size and not note
    assert all(len(set(call)) == 1 and len(call) <= TOGETHER for call in calls)
    assert max(map(len, calls)) == TOGETHER and len(calls) < len(images) / 2
    assert list(find_instances(infer, [], lambda pixels: pixels.shape, DEVICE)) == []
    alone = list(find_instances(infer, images, lambda pixels: pixels.shape, CPU))
    assert [(image, note) for image, _, note in alone] == [(image, note) for image, _, note in answers]


def test_what_does_not_fit_into_memory_together_goes_one_by_one(images):
    """And so do those among which one is refused."""

    def infer(some, pixels):
        if images[8] in some:
            raise InputError("no proposals")
        if len(some) > 1 or some[0] is images[2]:
            raise RuntimeError("CUDA error: out of memory")
        return [nothing(pixels[0])]

    answers = list(find_instances(infer, images, lambda pixels: pixels.shape, DEVICE))
    lost = {image.id: note for image, found, note in answers if found is None}
    assert lost.keys() == {images[2].id, images[5].id, images[8].id} and lost[images[8].id] == "skipped: no proposals"
    assert "does not fit into memory" in lost[images[2].id]


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), ValueError("memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("device", [DEVICE, CPU])
def test_another_error_ends_it(images, device, error):
    def infer(some, pixels):
        raise error

    with pytest.raises(type(error)):
        list(find_instances(infer, images, lambda pixels: pixels.shape, device))


def test_one_that_reads_by_itself_may_refuse_a_photograph(images):
    def infer(image):
        if image is images[1]:
            raise InputError("too small")
        return Instances.empty((1, 1))

    answers = list(find_one_by_one(infer, images, CPU))
    assert [image for image, _, _ in answers] == images
    assert [note for _, found, note in answers if found is None] == ["skipped: too small"]


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_photographs_instances_do_not_depend_on_its_neighbours(number, tagged, images):
    """Answers and labels of the cascade."""
    host, other, some = build(), build(), images[:12]
    other.load_state_dict(host.state_dict())

    def finding(network):
        def infer(own, pixels):
            return network.predict_batch(pixels, number, None, [image.tags for image in own] if tagged else None)

        return infer

    alone = list(find_instances(finding(host), some, host.input_size, CPU))
    with pretended() as waits:
        move(other)
        together = list(find_instances(finding(other), some, other.input_size, DEVICE))
        assert sum(waits.values()) <= MOST * len(some), waits.most_common()
    assert [(image, note) for image, _, note in together] == [(image, note) for image, _, note in alone]
    assert sum(found is None for _, found, _ in alone) == 1
    same([found for _, found, _ in together if found], [found for _, found, _ in alone if found])
