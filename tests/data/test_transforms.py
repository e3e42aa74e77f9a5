"""How views come together in a batch."""

from __future__ import annotations

import math

import torch

from labelpenet.config import Images
from labelpenet.data import transforms
from labelpenet.data.transforms import View, divisible, random_view, stack


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


def test_a_photographs_side_is_zoomed_by_up_to_a_factor_either_way():
    """Log-uniformly, whether it is mirrored or not; of a factor of 1 nothing is drawn, as before there was one."""
    choice, generator = Images(sides=(400,), zoom=1.25), torch.Generator().manual_seed(0)
    views = [random_view(choice, generator) for _ in range(2000)]
    for flipped in (False, True):
        steps = torch.tensor([math.log(side / 400, 1.25) for side, flip in views if flip is flipped])
        assert len(steps) > 900 and steps.abs().max() < 1.01
        counts = steps.histc(4, -1, 1)
        assert counts.min() > 0.8 * len(steps) / 4 and counts.max() < 1.2 * len(steps) / 4
    plain = Images(sides=(400, 300))
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(20):
        side, flip = random_view(plain, one)
        assert side == plain.sides[int(torch.randint(2, (1,), generator=other))]
        assert flip == (float(torch.rand((), generator=other)) < 0.5)
