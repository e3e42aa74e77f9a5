"""The cascade on a device that is not the host's: rules obeyed, the same answers, few waits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from labelpenet.instances import Instances
from labelpenet.models.cascade import LabelPEnet
from labelpenet.training.curriculum import backward, forward
from labelpenet.training.pretrain import Sample
from tests.device import DEVICE, There, move, pretended
from tests.models.test_cascade import CLASSES, photograph, some_boxes, tiny_recipe
from tests.models.test_student import lesson, untaught
from tests.models.tiny import TinyBackbone

MOST = 30
"""Waits of the host for the device, a photograph and module."""

IMAGES = [photograph(64, 80), photograph(48, 96, seed=1)]
TAGS = [(0, 2), (1,)]
BOXES = [some_boxes(64, 80), some_boxes(48, 96)]


def build() -> LabelPEnet:
    return LabelPEnet(TinyBackbone(), CLASSES, tiny_recipe("modules.*.score_threshold=0.01"))


@pytest.fixture(scope="module")
def host() -> LabelPEnet:
    return build()


@pytest.fixture
def there(host: LabelPEnet) -> Iterator[tuple[LabelPEnet, dict[str, int]]]:
    """The same network on the device, and the waits."""
    other = build()
    other.load_state_dict(host.state_dict())
    with pretended() as waits:
        move(other)
        yield other, waits


def targets() -> list[Instances]:
    found = []
    for image, tags in zip(IMAGES, TAGS, strict=True):
        height, width = image.shape[:2]
        masks = torch.zeros(len(tags), height, width, dtype=torch.bool)
        masks[:, 10:40, 15:60] = True
        boxes = torch.tensor([[15.0, 10, 60, 40]]).repeat(len(tags), 1)
        found.append(Instances(boxes, torch.tensor(tags), torch.full((len(tags),), 0.7), (height, width), masks))
    return found


def same(ours: list[Instances], theirs: list[Instances]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert len(other) and one.labels.tolist() == other.labels.tolist()
        torch.testing.assert_close(one.boxes, other.boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(one.weights, other.weights, atol=1e-5, rtol=1e-4)
        assert one.masks is not None and other.masks is not None and torch.equal(one.masks, other.masks)


def test_the_pretended_device_obeys_a_gpus_rules():
    with pretended() as waits:
        one = torch.arange(6.0).to(DEVICE)
        assert isinstance(one, There) and isinstance(torch.zeros(2, device=DEVICE), There)
        with pytest.raises(RuntimeError, match="host"):
            one + torch.ones(6)
        with pytest.raises((TypeError, RuntimeError), match="numpy"):
            one.numpy()
        one[one > 2] = 0.0  # fills without counting
        one[torch.tensor([0, 1])] * 2 + torch.tensor(3.0)  # indices and single numbers of the host are welcome
        assert not waits
        for wait in (
            lambda: one.sum().item(), lambda: bool((one > 1).any()), lambda: one[one > 1], one.cpu, one.tolist,
            lambda: torch.where(one > 1), one.unique,
        ):  # fmt: skip
            before = sum(waits.values())
            wait()
            assert sum(waits.values()) == before + 1
        weight = torch.ones(3, requires_grad=True, device=DEVICE)
        (weight * one[:3]).sum().backward()
        assert isinstance(weight.grad, There) and weight.grad.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_answers_and_labels(number, host, there):
    """Prediction with the vote of the earlier modules, and labels of photographs with tags, in batches."""
    proposals = BOXES if number == 1 else None
    answers = host.predict_batch(IMAGES, number, proposals)
    labels = [found for found, _ in host.infer(number, host.batch(IMAGES, TAGS, proposals))]
    other, waits = there
    same(other.predict_batch(IMAGES, number, proposals), answers)
    assert sum(waits.values()) <= MOST * len(IMAGES), waits.most_common()
    waits.clear()
    same([found for found, _ in other.infer(number, other.batch(IMAGES, TAGS, proposals))], labels)
    assert sum(waits.values()) <= MOST * len(IMAGES), waits.most_common()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_losses(number, host, there):
    """The losses and the gradients of a step."""

    def learn(network: LabelPEnet) -> tuple[dict[str, float], torch.Tensor]:
        torch.manual_seed(0)
        network.train()
        losses = network.losses(IMAGES, targets(), number, BOXES if number == 1 else None)
        sum(losses.values()).backward()
        waited = sum(waits.values())
        gradients = [p.grad.cpu().flatten() for p in network.module(number).parameters() if p.grad is not None]
        network.eval()
        network.zero_grad()
        assert waited <= MOST * len(IMAGES), waits.most_common()
        return {name: value.item() for name, value in losses.items()}, torch.cat(gradients)

    other, waits = there
    found, gradients = learn(other)
    waits.clear()
    expected, wanted = learn(host)
    assert found == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(gradients, wanted, atol=1e-4, rtol=1e-3)


def test_a_students_answers():
    """With what the photograph as a whole shows, and of known tags."""
    host, other = untaught(), untaught()
    for student in (host, other):
        student.tags.weight.copy_(torch.linspace(-1, 1, student.tags.weight.numel()).view_as(student.tags.weight))
    expected = [[host.predict(image), host.predict_pixels(image, tags=(0, 1))] for image in IMAGES]
    with pretended() as waits:
        move(other)
        for image, (answer, labels) in zip(IMAGES, expected, strict=True):
            for ask, wanted in ((other.predict, answer), (lambda one: other.predict_pixels(one, tags=(0, 1)), labels)):
                waits.clear()
                same([ask(image)], [wanted])
                assert sum(waits.values()) <= MOST, waits.most_common()


def test_a_students_losses():
    """Lessons are made on the host."""
    lessons = [lesson([[5, 5, 40, 60]], [[20, 20, 64, 64]]), lesson([[10, 10, 50, 50], [0, 30, 30, 60]])]
    host, other = untaught().train(), untaught().train()
    with pretended() as waits:
        move(other)
        torch.manual_seed(0)
        losses = other.losses(lessons, limit=4.0)
        sum(losses.values()).backward()
        assert sum(waits.values()) <= MOST * len(lessons), waits.most_common()
        found = {name: value.item() for name, value in losses.items()}
    torch.manual_seed(0)
    assert found == pytest.approx({name: value.item() for name, value in host.losses(lessons, 4.0).items()}, rel=1e-4)


@pytest.mark.parametrize("phase", [forward, backward])
def test_forward_backward_learning(phase, host, there):
    """A phase infers three times and has the losses of three or four modules."""

    def learn(network: LabelPEnet) -> dict[str, float]:
        torch.manual_seed(0)
        network.train()
        samples = [
            Sample(np.ascontiguousarray(image), network.view(image), tags, boxes)
            for image, tags, boxes in zip(IMAGES, TAGS, BOXES, strict=True)
        ]
        terms = phase(network, samples)
        sum(terms.values()).backward()
        waited = sum(waits.values())
        network.eval()
        network.zero_grad()
        assert waited <= MOST * len(IMAGES) * 4, waits.most_common()
        return {name: value.item() for name, value in terms.items()}

    other, waits = there
    found = learn(other)
    waits.clear()
    assert found == pytest.approx(learn(host), rel=1e-3)
