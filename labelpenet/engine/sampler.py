"""Which images a step sees, and every seed.

Everything random in a step is a pure function of (seed, stage, step, position in the batch): which images it sees, how
they are augmented, what is dropped or sampled. So a run continues from model, optimiser and step alone, bit for bit on
the CPU. Any number of processes sees the same images, with the same draws where micro-batches are the same (on CPUs).
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from labelpenet.engine.stage import Stage
from labelpenet.errors import InputError

LOADERS = 2  # threads that load
STEPS_AHEAD = 2  # how many steps' images are loaded while one is trained on


@dataclass(frozen=True)
class Loaded:
    """What was loaded of a micro-batch: the content of the images ``indices`` (None where there are none), and for each
    of the others, which cannot be read, a line.
    """

    indices: list[int]
    content: Any
    lost: list[str]


@dataclass(frozen=True)
class MicroBatch:
    """Images of a batch that go through the loss together: the position of the first one in the batch of all processes,
    their indices, and what waits for what is loaded of them and gives it.
    """

    position: int
    indices: list[int]
    batch: Callable[[], Loaded]


@contextmanager
def micro_batches(stage: Stage, seed: int, rank: int, world: int, start: int) -> Iterator[Iterator[list[MicroBatch]]]:
    """A process's micro-batches of each step from ``start`` on, loaded ahead in threads; the steps that repeat a batch
    are given the same content.
    """
    pool = ThreadPoolExecutor(LOADERS, thread_name_prefix="load")

    begun: list[MicroBatch] = []

    def begin(step: int) -> list[MicroBatch]:
        if begun and step % stage.repeat:  # the batch of the step before, which need not be loaded again
            return list(begun)
        begun.clear()
        indices = draw(stage, seed, step, rank, world)
        for first in range(0, len(indices), stage.micro_batch):
            position, share = rank * len(indices) + first, indices[first : first + stage.micro_batch]
            own = stream_seed(seed, stage.name, step // stage.repeat, position, "load")
            loaded = pool.submit(_load, stage, share, own)
            begun.append(MicroBatch(position, share, loaded.result))
        return list(begun)

    def ahead(steps: range) -> Iterator[list[MicroBatch]]:
        waiting = deque(map(begin, steps[:STEPS_AHEAD]))
        for step in steps:
            if step + STEPS_AHEAD < steps.stop:
                waiting.append(begin(step + STEPS_AHEAD))
            yield waiting.popleft()

    try:
        yield ahead(range(start, stage.steps))
    finally:
        pool.shutdown(cancel_futures=True)


def _load(stage: Stage, share: list[int], seed: int) -> Loaded:
    """Loads a micro-batch, without the images that cannot be read."""
    lost: dict[int, str] = {}
    while rest := [index for index in share if index not in lost]:
        try:
            content = stage.load(rest, torch.Generator().manual_seed(seed))
            return Loaded(rest, content, [lost[index] for index in share if index in lost])
        except InputError as error:
            before, last = len(lost), error
        for index in rest if len(rest) > 1 else ():  # which of them was it?
            try:
                stage.load([index], torch.Generator().manual_seed(seed))
            except InputError as error:
                lost[index] = f"{stage.images[index]}: {error}"
        if len(lost) == before:  # it is the only one, or comes and goes: not to be asked for ever
            lost |= {index: f"{stage.images[index]}: {last}" for index in rest}
    return Loaded([], None, [lost[index] for index in share])


def draw(stage: Stage, seed: int, step: int, rank: int = 0, world: int = 1) -> list[int]:
    """The images of a step of a stage in a process, by default the whole batch."""
    size = len(stage.images), stage.batch_size
    return batches(*size, seed, stage.name, step // stage.repeat, rank, world)


def stream_seed(seed: int, stage: str, step: int, position: int = 0, use: str = "") -> int:
    """A seed in [0, 2^63) that depends on every argument and on nothing else."""
    key = f"{seed}\0{stage}\0{step}\0{position}\0{use}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def seed_step(seed: int, stage: str, step: int, position: int = 0) -> None:
    """Seeds the global generators of torch (all devices), numpy and Python.

    ``position`` is that of the micro-batch's first image in the batch of all processes; a loss that wants the draws of
    an image not to depend on its neighbours calls this for each image.
    """
    value = stream_seed(seed, stage, step, position)
    if torch.cuda.is_available():
        torch.manual_seed(value)
    else:  # which would note down where it was called from, each time, for every kind of GPU that is not here
        torch.default_generator.manual_seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - libraries that the losses call draw from the global generator
    random.seed(value)


def batches(
    n_images: int, batch_size: int, seed: int, stage: str, step: int, rank: int = 0, world: int = 1
) -> list[int]:
    """The images of a step: this process's share of the batch.

    The images come in one endless stream, a fresh permutation an epoch, so that within any epoch each image is seen
    once (a batch may reach into the next epoch).

    Args:
        batch_size: images per step over all processes, a multiple of ``world`` (see `Stage.check`).
        seed, stage, step: what the draw depends on.
        rank, world: this process and the number of processes.

    Returns:
        ``batch_size / world`` image indices; those of all ranks, one after the other, are those of one process.
    """
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, n_images)
        chosen.append(int(_permutation(n_images, seed, stage, epoch)[place]))
    share = batch_size // world
    return chosen[rank * share : (rank + 1) * share]


@lru_cache(maxsize=16)
def _permutation(n: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    return np.random.default_rng(stream_seed(seed, stage, epoch, use="images")).permutation(n)
