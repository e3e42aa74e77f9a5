"""Which images a step sees, and every seed."""

import itertools
import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labelpenet.engine.sampler import batches, seed_step, stream_seed


@given(
    n=st.integers(1, 40), share=st.integers(1, 5), world=st.integers(1, 4), step=st.integers(0, 60), seed=st.integers()
)
@settings(max_examples=60, deadline=None)
def test_the_shares_of_all_processes_are_the_batch_of_one(n, share, world, step, seed):
    whole = batches(n, share * world, seed, "m", step)
    shares = [batches(n, share * world, seed, "m", step, rank, world) for rank in range(world)]
    assert list(itertools.chain(*shares)) == whole
    assert all(len(part) == share for part in shares)


@given(n=st.integers(1, 30), size=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_epoch_shows_every_image_once(n, size, seed):
    epochs = 3
    steps = -(-epochs * n // size)
    seen = list(itertools.chain(*(batches(n, size, seed, "m", step) for step in range(steps))))
    for epoch in range(epochs):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_order_depends_on_seed_stage_and_epoch():
    settings = itertools.product((0, 1), ("module1", "module2"), (0, 1))
    orders = {tuple(batches(30, 30, *setting)) for setting in settings}
    assert len(orders) == 8


def test_seeding_reaches_every_generator_and_depends_on_every_argument():
    def draw(*args) -> tuple:
        seed_step(*args)
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    assert draw(0, "m", 3, 1) == draw(0, "m", 3, 1)
    different = {
        draw(*args) for args in [(0, "m", 3, 1), (1, "m", 3, 1), (0, "n", 3, 1), (0, "m", 4, 1), (0, "m", 3, 2)]
    }
    assert len(different) == 5 and all(len(set(column)) == 5 for column in zip(*different, strict=True))
    assert len({stream_seed(1, "11", 1), stream_seed(11, "1", 1), stream_seed(1, "1", 11)}) == 3


def test_seeding_a_step_draws_what_torchs_own_seeding_draws():
    for value in (0, 7, 2**40):
        seed_step(value, "stage", 3)
        drawn = torch.rand(5), torch.randperm(9)
        torch.manual_seed(stream_seed(value, "stage", 3))
        assert torch.equal(torch.rand(5), drawn[0]) and torch.equal(torch.randperm(9), drawn[1])
