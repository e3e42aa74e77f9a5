"""One stretch of training as the engine sees it: a module, a loss, images, and how the parameters are moved."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from labelpenet.config import Schedule
from labelpenet.engine.log import MetricsLog
from labelpenet.errors import InputError

T = TypeVar("T")


def load_each(
    images: Sequence[T], load: Callable[[T, torch.Generator], Any]
) -> Callable[[list[int], torch.Generator], list[Any]]:
    """What `Stage.load` is where images are loaded one after the other."""
    return lambda indices, generator: [load(images[index], generator) for index in indices]


def learning_rate(schedule: Schedule, step: int) -> float:
    """The learning rate of a step (the first is 0)."""
    factor = 1.0
    for share, value in sorted(schedule.decay):
        if step >= round(schedule.steps * share):
            factor = value
    return schedule.lr * factor * min(1.0, (step + 1) / (schedule.warmup + 1))


def build_optimiser(schedule: Schedule, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The schedule's optimiser over the parameters."""
    decay = schedule.weight_decay
    if schedule.kind == "sgd":
        return torch.optim.SGD(parameters, schedule.lr, momentum=schedule.momentum, weight_decay=decay)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if schedule.kind not in kinds:
        raise InputError(f"unknown optimiser {schedule.kind!r}; known are sgd, adam and adamw")
    return kinds[schedule.kind](parameters, schedule.lr, weight_decay=decay)


@dataclass
class Stage:
    """One stretch of training, as the loop sees it.

    Attributes:
        name: unique within the run, usable as a folder name.
        module: what is trained (its parameters with ``requires_grad``) and saved (its whole ``state_dict``).
        schedule: how long and how its parameters are moved.
        images: the name of each training image, by index.
        loss: ``loss(batch, step)`` gives the named terms, each a mean over the images given; their sum is minimised.
            ``batch`` is what `load` returned. Terms may be absent. The global random generators (torch, numpy, Python)
            are seeded before every call.
        micro_batch: images that `loss` gets at a time.
        load: ``load(indices, generator)`` reads and augments the images of a micro-batch ahead of time, in a thread;
            all its random numbers must come from ``generator``. After an `InputError` it is asked for each image by
            itself, and the step goes without those that cannot be read. By default it returns the indices.
        repeat: consecutive steps that see the same batch with the same augmentation (the phases of an iteration).
        ema: decay of a moving average of the trained parameters (0.999, say), moved after every `repeat` steps, which
            the module holds once the stage is done; None keeps the parameters themselves.
        ema_from_start: whether the parameters that the stage began with have a share in the average. Where they are
            random they must not: after 640 steps at .998 they would still be 28 % of it.
        teacher: a copy of `module` that holds that average all the time, for `loss` to ask; None for none.
        observe: ``observe(step, metrics)`` is called every `observe_minutes` without gradients, on the first process
            alone, to show what the module now does.
        guard: called in all processes, after every `guard_steps` steps and the last one, without gradients: figures for
            the metrics, and None or a line that ends the stage. It then goes back to the parameters, or their average,
            that passed last; those that it began with count as passed.
    """

    name: str
    module: nn.Module
    schedule: Schedule
    images: Sequence[str]
    loss: Callable[[Any, int], Mapping[str, Tensor]]
    micro_batch: int = 1
    load: Callable[[list[int], torch.Generator], Any] = lambda indices, generator: indices
    repeat: int = 1
    ema: float | None = None
    ema_from_start: bool = True
    teacher: nn.Module | None = None
    observe: Callable[[int, MetricsLog], None] | None = None
    observe_minutes: float = 5.0
    guard: Callable[[], tuple[dict[str, float], str | None]] | None = None
    guard_steps: int = 100

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.schedule.steps

    @property
    def batch_size(self) -> int:
        """Images per optimiser step, over all processes."""
        return self.schedule.batch_size

    def check(self, world: int) -> None:
        """Refuses what ``world`` processes cannot train: no image, or a batch that cannot be cut into micro-batches."""
        unit = world * self.micro_batch
        if self.micro_batch < 1 or self.batch_size < 1 or self.batch_size % unit:
            raise InputError(
                f"a batch of {self.batch_size} cannot be cut into micro-batches of {self.micro_batch} for {world} "
                f"process(es); make it a multiple of {max(unit, 1)}"
            )
        if not self.images:
            raise InputError(f"stage {self.name} has no training image; check the data set and the classes asked for")

    def facts(self, seed: int, precision: str) -> dict[str, Any]:
        """What decides the result, besides the module, the loss and the images' content."""
        optimiser = asdict(self.schedule)
        steps, size, decay = (optimiser.pop(name) for name in ("steps", "batch_size", "decay"))
        optimiser["milestones"] = [(round(steps * share), factor) for share, factor in decay]
        names = hashlib.blake2b("\0".join(self.images).encode(), digest_size=4).hexdigest()
        return {
            "name": self.name,
            "steps": steps,
            "images": f"{len(self.images)} ({names})",
            "batch_size": size,
            "images_per_pass": self.micro_batch,  # as checkpoints have always called it
            "repeat": self.repeat,
            "optimiser": optimiser,
            "ema": self.ema,
            "seed": seed,
            "precision": precision,
        }
