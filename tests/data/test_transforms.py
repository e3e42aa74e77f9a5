"""How views come together in a batch."""

from __future__ import annotations

import torch

from labelpenet.data import transforms
from labelpenet.data.transforms import View, divisible, stack


def view(height: int, width: int) -> View:
    return View(torch.rand(1, 3, height, width) + 1, (1.0, 1.0))


def test_views_of_a_batch_are_padded_to_the_largest():
    views = [view(30, 41), view(37, 20)]
    together = stack(views)
    assert together.shape == (2, 3, 37, 41)
    for own, one in zip(together, views, strict=True):
        height, width = one.size
        assert torch.equal(own[:, :height, :width], one.pixels[0])
        assert not own[:, height:].any() and not own[:, :, width:].any()
    assert torch.equal(stack(views[:1]), views[0].pixels), "one alone is not padded"


def test_on_a_gpu_sizes_are_few(monkeypatch):
    assert divisible(torch.device("cuda")) == divisible(torch.device("cuda"), 32) == transforms.GRID
    assert divisible(torch.device("cpu")) == 1 and divisible(torch.device("cpu"), 32) == 32
    monkeypatch.setattr(transforms, "divisible", lambda device: 128)
    assert {stack([view(480, width)]).shape[-2:] for width in range(641, 769, 9)} == {(512, 768)}
    assert stack([view(512, 640)]).shape[-2:] == (512, 640)
