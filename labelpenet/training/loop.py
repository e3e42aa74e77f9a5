"""The training loop that cascaded pre-training and forward-backward learning share.

Everything random in a step is a pure function of (seed, stage, step, position in the batch): which images it sees, how
they are augmented, what is dropped or sampled. So a run continues from model, optimiser and step alone, bit for bit on
the CPU, and any number of processes sees the same images with the same draws.

The batch of a step is cut into *passes* of `Stage.images_per_pass` images; their gradients are accumulated, then summed
over the processes. As the cut does not depend on the number of processes, neither does the result, but for rounding.
Gradients are summed here, not by ``DistributedDataParallel``: a loss may then use the module as it likes (several
forwards, inference in between, parameters left out), and a process may drop a step without the others waiting for it.
"""

from __future__ import annotations

import hashlib
import math
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from labelpenet.errors import InputError
from labelpenet.training.checkpoint import (
    check_configuration,
    checkpoint_folder,
    checkpoints,
    git_revision,
    load_checkpoint,
    plain,
    save_checkpoint,
    versions,
)
from labelpenet.training.logging import MetricsLog, Progress, Row, memory_mb, write_environment

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MAX_SKIPPED_IN_A_ROW = 20
_BUCKET = 16 * 2**20  # numbers in one message when gradients are summed over processes

_STEPS_AHEAD = 2  # how many steps' images are loaded while one is trained on

# What gives the batch of a pass when it is called.
_Batch = Callable[[], Any]


@dataclass(frozen=True)
class Optimiser:
    """How a stage's parameters are moved; the defaults are the paper's for pre-training (4.2).

    Attributes:
        lr: learning rate for the whole batch; scale it with `Stage.batch_size`, not with the number of processes.
        kind: ``sgd``, ``adam`` or ``adamw``.
        momentum: of SGD.
        weight_decay: L2 (``sgd``, ``adam``) or decoupled (``adamw``).
        milestones: (step, factor) pairs: from this step on the learning rate is ``lr * factor``.
        warmup: number of steps over which the learning rate rises linearly to its value.
        clip: largest norm of all gradients together; None leaves them.
    """

    lr: float = 1e-3
    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[tuple[int, float], ...] = ()
    warmup: int = 0
    clip: float | None = None

    def rate(self, step: int) -> float:
        """The learning rate of a step (the first is 0)."""
        factor = 1.0
        for start, value in sorted(self.milestones):
            if step >= start:
                factor = value
        return self.lr * factor * min(1.0, (step + 1) / (self.warmup + 1))

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser over parameter groups."""
        groups = [dict(group) for group in groups]
        if self.kind == "sgd":
            return torch.optim.SGD(groups, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        if self.kind not in kinds:
            raise InputError(f"unknown optimiser {self.kind!r}; known are sgd, adam and adamw")
        return kinds[self.kind](groups, self.lr, weight_decay=self.weight_decay)


@dataclass
class Stage:
    """One stretch of training, as the loop sees it.

    Attributes:
        name: unique within the run, usable as a folder name.
        module: what is trained (its parameters with ``requires_grad``) and saved (its whole ``state_dict``).
        steps: number of optimiser steps.
        images: the name of each training image, by index.
        loss: ``loss(batch, step)`` gives the named terms, each a mean over the images of the pass; their sum is
            minimised. ``batch`` is what `load` returned, or the list of image indices where there is no `load`. Terms
            may be absent. Random numbers are to come from torch's, numpy's or Python's global generators, seeded before
            every call.
        batch_size: images per optimiser step, over all processes.
        images_per_pass: images that `loss` gets at a time.
        optimiser: see `Optimiser`.
        parameters: parameter groups; a group's ``lr_factor`` multiplies its learning rate. None: all that require a
            gradient.
        load: ``load(indices, generator)`` reads and augments the images of a pass ahead of time, in a thread; all its
            random numbers must come from ``generator``. An `InputError` skips the step.
        workers: threads that `load`.
        groups: for each image a group id (its aspect ratio, say); all images of a batch then belong to one group.
        repeat: consecutive steps that see the same batch with the same augmentation (the phases of an iteration).
        ema: decay of a moving average of the trained parameters (0.999, say), which the module holds once the stage is
            done; None keeps the parameters themselves.
        observe: ``observe(step, metrics)`` is called every `observe_minutes` without gradients, on the first process
            alone, to show what the module now does.
        observe_minutes: see `observe`.
    """

    name: str
    module: nn.Module
    steps: int
    images: Sequence[str]
    loss: Callable[[Any, int], Mapping[str, Tensor]]
    batch_size: int = 2
    images_per_pass: int = 1
    optimiser: Optimiser = field(default_factory=Optimiser)
    parameters: Sequence[dict[str, Any]] | None = None
    load: Callable[[list[int], torch.Generator], Any] | None = None
    workers: int = 2
    groups: Sequence[int] | None = None
    repeat: int = 1
    ema: float | None = None
    observe: Callable[[int, MetricsLog], None] | None = None
    observe_minutes: float = 5.0


@dataclass(frozen=True)
class _Pass:
    """Images of a batch that go through the loss together; ``position`` is that of the first one in the batch."""

    position: int
    indices: list[int]


def stream_seed(seed: int, stage: str, step: int, position: int = 0, use: str = "") -> int:
    """A seed in [0, 2^63) that depends on every argument and on nothing else."""
    key = f"{seed}\0{stage}\0{step}\0{position}\0{use}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def seed_step(seed: int, stage: str, step: int, position: int = 0) -> None:
    """Seeds the global generators of torch (all devices), numpy and Python.

    Args:
        seed: of the run.
        stage: name of the stage.
        step: from 0.
        position: of the first image of the pass in the batch of all processes; a loss that wants the draws of an image
            not to depend on its neighbours calls this for each image.
    """
    value = stream_seed(seed, stage, step, position)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - libraries that the losses call draw from the global generator
    random.seed(value)


def batches(
    n_images: int,
    batch_size: int,
    seed: int,
    stage: str,
    step: int,
    rank: int = 0,
    world: int = 1,
    groups: Sequence[int] | None = None,
) -> list[int]:
    """The images of a step: this process's share of the batch.

    Without groups the images come in one endless stream, a fresh permutation an epoch, so that within any epoch each
    image is seen once (a batch may reach into the next epoch). With groups the group of each batch is drawn in
    proportion to its size and its images come from the group's own stream: over ``n_images`` steps each image is seen
    exactly ``batch_size`` times.

    Args:
        n_images: number of training images.
        batch_size: images per step over all processes; a multiple of ``world``.
        seed, stage, step: what the draw depends on.
        rank, world: this process and the number of processes.
        groups: for each image a group id; None for one group.

    Returns:
        ``batch_size / world`` image indices; those of all ranks, one after the other, are those of one process.

    Raises:
        InputError: there is no image, or ``batch_size`` cannot be shared evenly.
    """
    if n_images < 1:
        raise InputError(f"stage {stage} has no training image; check the data set and the classes asked for")
    if batch_size < 1 or batch_size % world:
        raise InputError(
            f"a batch of {batch_size} cannot be shared by {world} processes; make it a multiple of {world}"
        )
    if groups is None:
        chosen = _stream(range(n_images), step * batch_size, batch_size, seed, stage)
    else:
        cycle, slot = divmod(step, n_images)
        order = np.asarray(groups)[_permutation(n_images, seed, stage, cycle, "group")]
        group = order[slot]
        members = np.flatnonzero(np.asarray(groups) == group).tolist()
        before = cycle * len(members) + int((order[:slot] == group).sum())
        chosen = _stream(members, before * batch_size, batch_size, seed, f"{stage}\0{group}")
    share = batch_size // world
    return chosen[rank * share : (rank + 1) * share]


def train_stage(
    stage: Stage,
    run_dir: Path,
    *,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    fabric: Fabric | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 10.0,
    log_every: int = 20,
    log: Callable[[str], None] | None = None,
) -> None:
    """Trains a stage to its end, or continues it; ``stage.module`` then holds the result.

    Writes ``RUN/checkpoints/STAGE``, ``RUN/metrics.jsonl``, ``RUN/tensorboard/STAGE`` and ``RUN/environment.json``.
    With several processes all must see the same run folder.

    Args:
        stage: what to train.
        run_dir: the run folder.
        seed: of everything random.
        config: the run's configuration, plain values; kept in the checkpoint, and a resumed run must have the same.
        fabric: a launched Fabric: device, precision (``32-true``, ``bf16-mixed`` or ``16-mixed``), processes; None for
            one process on the CPU.
        resume: continue from the newest checkpoint, start where there is none; a finished stage is only loaded.
        checkpoint_minutes: time between checkpoints; 0 for one after every step.
        log_every: steps between rows of metrics.
        log: where messages and plain lines of progress go; None for the terminal.

    Raises:
        InputError: nothing can be trained with these arguments, the configuration has changed, every checkpoint is
            damaged, the disk is full, or `MAX_SKIPPED_IN_A_ROW` steps in a row failed (the state is saved).
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the step was finished and the state saved.
    """
    trainer = _Trainer(stage, Path(run_dir), seed, config or {}, _Machine(fabric), log_every)
    notes = trainer.restore(resume)
    with Progress(stage.name, stage.steps, trainer.step, _silent if trainer.machine.rank else log) as progress:
        for note in notes:
            progress.say(note)
        if trainer.step < stage.steps:
            trainer.train(checkpoint_minutes, progress)
    trainer.finish()


class _Machine:
    """Where a process computes, and its place among the processes."""

    def __init__(self, fabric: Fabric | None) -> None:
        self.device = torch.device("cpu") if fabric is None else fabric.device
        self.rank: int = 0 if fabric is None else fabric.global_rank
        self.world: int = 1 if fabric is None else fabric.world_size
        precision = None if fabric is None else fabric.strategy.precision
        self.precision = "32-true" if precision is None else str(precision.precision)
        if self.precision not in ("32-true", "bf16-mixed", "16-mixed"):
            raise InputError(f"precision {self.precision} is not supported; choose 32-true, bf16-mixed or 16-mixed")
        self.scaler = getattr(precision, "scaler", None) or torch.amp.GradScaler(self.device.type, enabled=False)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "32-true":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16)

    def count(self, flags: Sequence[bool]) -> list[int]:
        """For each flag the number of processes that raise it."""
        counts = [int(flag) for flag in flags]
        if self.world == 1:
            return counts
        message = torch.tensor(counts, dtype=torch.int32, device=self.device)
        dist.all_reduce(message)
        return message.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients over the processes; every process has one for each of the parameters."""
        bucket: list[Tensor] = []
        for parameter in parameters if self.world > 1 else ():
            gradient = parameter.grad
            assert gradient is not None
            fits = bucket and bucket[0].dtype == gradient.dtype
            if not fits or sum(g.numel() for g in bucket) + gradient.numel() > _BUCKET:
                _sum_together(bucket)
                bucket = []
            bucket.append(gradient)
        _sum_together(bucket)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the first one's values."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor.detach(), 0)


@dataclass(frozen=True)
class _Outcome:
    """What became of a step.

    Attributes:
        problems: a line for each pass that gave nothing to learn from; if there is any, the step is skipped.
        stop, save: what the processes have agreed on.
        overflow: the gradient left the range of half precision, and the step is skipped.
    """

    problems: list[str]
    stop: bool
    save: bool
    overflow: bool = False


class _Trainer:
    """A stage while it is being trained: what is saved, how it comes back, and one step."""

    def __init__(
        self, stage: Stage, run_dir: Path, seed: int, config: Mapping[str, Any], machine: _Machine, log_every: int
    ) -> None:
        _check(stage, machine.world)
        self.stage, self.run_dir, self.seed, self.machine, self.log_every = stage, run_dir, seed, machine, log_every
        self.folder = checkpoint_folder(run_dir, stage.name)
        self.source = {"versions": versions(), "git": git_revision()}
        self.config = plain({"run": config, "stage": _facts(stage, seed, machine.precision)})
        stage.module.to(machine.device)
        default = [{"params": [p for p in stage.module.parameters() if p.requires_grad]}]
        self.optimiser = stage.optimiser.build(default if stage.parameters is None else stage.parameters)
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        trained = {id(p) for p in self.parameters}
        self.average = {
            name: p.detach().clone()
            for name, p in stage.module.named_parameters()
            if stage.ema is not None and id(p) in trained
        }
        self.step = 0
        self.skipped = 0
        self.rows: list[Row] = []
        # Sums since the last row of metrics; in the checkpoint, so that a row does not depend on interruptions.
        self.window: dict[str, float] = {}
        self.clock = {"steps": 0.0, "seconds": 0.0, "waited": 0.0}

    def restore(self, resume: bool) -> list[str]:
        """Takes up the newest checkpoint, if there is one; returns what there is to say about it.

        Raises:
            InputError: see `train_stage`.
        """
        if not resume and checkpoints(self.folder):
            raise InputError(
                f"{self.run_dir} already holds checkpoints of {self.stage.name}; continue with --resume, "
                "or start in another folder"
            )
        state, notes = load_checkpoint(self.folder)
        if state is None:
            self.machine.share([*self.stage.module.parameters(), *self.stage.module.buffers()])
            return notes
        check_configuration(state["config"], self.config, self.run_dir)
        try:
            self.stage.module.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            for name, value in self.average.items():
                value.copy_(state["average"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"the newest checkpoint in {self.folder} does not fit this model; use the version and settings "
                "that it was made with, or start in another folder"
            ) from error
        if state["scaler"]:
            self.machine.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped, self.rows = state["step"], state["skipped"], state["metrics"]
        if self.machine.rank == 0:
            self.window = state["window"]
        old, new = state["source"]["versions"], versions()
        changes = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
        if changes:
            notes.append(f"{self.stage.name} was saved under other versions: {', '.join(changes)}")
        if 0 < self.step < self.stage.steps:
            notes.append(f"{self.stage.name} continues after step {self.step} of {self.stage.steps}")
        return notes

    def save(self) -> None:
        """Writes a checkpoint (first process); if that fails, it fails in every process.

        Raises:
            InputError: the disk is full or the folder cannot be written.
        """
        self._gather_window()
        problem = None
        if self.machine.rank == 0:
            state = {
                "stage": self.stage.name,
                "step": self.step,
                "model": self.stage.module.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.machine.scaler.state_dict(),
                "average": self.average,
                "skipped": self.skipped,
                "window": self.window,
                "metrics": self.rows,
                "config": self.config,
                "source": self.source,
            }
            try:
                save_checkpoint(self.folder, self.step, state)
            except InputError as error:
                problem = str(error)
        problem = self.machine.gather(problem)[0]
        if problem is not None:
            raise InputError(problem)

    def finish(self) -> None:
        """Puts the averaged weights into the module, where there are any."""
        with torch.no_grad():
            for name, parameter in self.stage.module.named_parameters():
                if name in self.average:
                    parameter.copy_(self.average[name])

    def train(self, checkpoint_minutes: float, progress: Progress) -> None:
        """Trains from the current step to the last one."""
        stage = self.stage
        metrics = self._open_metrics()
        checkpoint, observation = _Timer(checkpoint_minutes), _Timer(stage.observe_minutes)
        in_a_row = 0
        outcome = _Outcome([], stop=False, save=False)
        stage.module.train()
        try:
            with _signals() as interrupted, self._data() as data:
                for passes, loaded in data:
                    began = time.monotonic()
                    outcome = self.advance(passes, loaded, interrupted.is_set, checkpoint.over)
                    self.clock["seconds"] += time.monotonic() - began
                    for problem in outcome.problems:
                        progress.say(f"{stage.name}: step {self.step} skipped, {problem}")
                    in_a_row = in_a_row + 1 if outcome.problems or outcome.overflow else 0
                    if self.step % self.log_every == 0 or self.step == stage.steps:
                        self._write_row(metrics)
                    # an observer's rows, between those of the losses, have no speed to tell the time left from
                    progress.show(self.step, next((row for row in reversed(self.rows) if "images_per_s" in row), {}))
                    hopeless = in_a_row >= MAX_SKIPPED_IN_A_ROW
                    if outcome.save or outcome.stop or hopeless or self.step == stage.steps:
                        self.save()
                        checkpoint.restart()
                    if hopeless:
                        raise InputError(_hopeless(stage.name, self.step, in_a_row, outcome))
                    if outcome.stop:
                        break
                    if metrics and stage.observe and observation.over():
                        with torch.no_grad():
                            stage.observe(self.step, metrics)
                        stage.module.train()
                        observation.restart()
                # Also what came too late for the last step to notice must not be lost.
                if interrupted.is_set() or outcome.stop:
                    raise KeyboardInterrupt(
                        f"{stage.name} stopped after step {self.step} of {stage.steps}; continue with --resume"
                    )
        finally:
            if metrics is not None:
                metrics.close()
        if self.skipped:
            progress.say(f"{stage.name}: {self.skipped} of {stage.steps} steps were skipped")

    def advance(
        self, passes: Sequence[_Pass], loaded: Sequence[_Batch], stop: Callable[[], bool], save: Callable[[], bool]
    ) -> _Outcome:
        """One optimiser step.

        Args:
            passes: this process's share of the batch.
            loaded: for each pass what gives its batch.
            stop, save: asked once the gradient is there: whether this process wants to stop, to save.
        """
        self.optimiser.zero_grad(set_to_none=True)
        terms: dict[str, float] = {}
        problem = None
        for part, batch in zip(passes, loaded, strict=True):
            problem = self._accumulate(part, batch, terms)
            if problem is not None:
                break
        # Whether to save is for the first process to say: the clocks of the others may differ.
        flags = [problem is not None, stop(), save() and self.machine.rank == 0]
        counts = self.machine.count([*flags, *(p.grad is not None for p in self.parameters)])
        failed, stopping, saving = (count > 0 for count in counts[:3])
        problems, overflow = [], False
        if failed:
            problems = [line for line in self.machine.gather(problem) if line is not None]
        else:
            norm = self._update([p for p, count in zip(self.parameters, counts[3:], strict=True) if count])
            if math.isfinite(norm):
                self._tally(terms, norm)
            elif self.machine.scaler.is_enabled():
                overflow = True  # the usual way in which the scaler finds its scale: not worth a report
            else:
                names = self._names(batches(*self._draw(), self.step // self.stage.repeat, groups=self.stage.groups))
                problems = [f"the gradient is not finite: {names}"]
        self.skipped += bool(problems)
        self.clock["steps"] += 1
        self.step += 1
        return _Outcome(problems, stopping, saving, overflow)

    def _accumulate(self, part: _Pass, batch: _Batch, terms: dict[str, float]) -> str | None:
        """Adds the gradient and the loss terms of a pass, in proportion to its share of the batch; or says why not."""
        began = time.monotonic()
        try:
            content = batch()
        except InputError as error:
            return f"{self._names(part.indices)} cannot be read: {error}"
        finally:
            self.clock["waited"] += time.monotonic() - began
        seed_step(self.seed, self.stage.name, self.step, part.position)
        with self.machine.autocast():
            losses = {name: value.float() for name, value in self.stage.loss(content, self.step).items()}
        if not losses:
            return None
        total = torch.stack(list(losses.values())).sum()
        values = torch.stack([total, *losses.values()]).tolist()
        if not all(math.isfinite(value) for value in values):
            bad = [name for name, value in zip(losses, values[1:], strict=True) if not math.isfinite(value)]
            return f"the loss is not finite ({', '.join(bad) or 'total'}): {self._names(part.indices)}"
        share = len(part.indices) / self.stage.batch_size
        if total.requires_grad:  # it does not where nothing in these images can be learnt from
            self.machine.scaler.scale(total * share).backward()
        for name, value in zip(["total", *losses], values, strict=True):
            terms[name] = terms.get(name, 0.0) + value * share
        return None

    def _update(self, used: list[nn.Parameter]) -> float:
        """Moves the parameters that any process has a gradient for; returns the gradient's norm.

        Where the norm is not finite, nothing moves.
        """
        if not used:
            return 0.0
        machine, step, options = self.machine, self.step, self.stage.optimiser
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        machine.sum_gradients(used)
        machine.scaler.unscale_(self.optimiser)
        total = torch.nn.utils.get_total_norm([p.grad for p in used if p.grad is not None])
        norm = float(total)
        if math.isfinite(norm):
            if options.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(used, options.clip, total)
            for group in self.optimiser.param_groups:
                group["lr"] = options.rate(step) * group.get("lr_factor", 1.0)
        if math.isfinite(norm) or machine.scaler.is_enabled():
            machine.scaler.step(self.optimiser)  # which moves nothing where it finds an overflow
            machine.scaler.update()
        if math.isfinite(norm):
            self._update_average()
        if machine.world > 1:
            machine.share(b for b in self.stage.module.buffers() if b.is_floating_point())
        return norm

    def _update_average(self) -> None:
        if self.stage.ema is None:
            return
        for name, parameter in self.stage.module.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.detach(), 1 - self.stage.ema)

    def _draw(self) -> tuple[int, int, int, str]:
        return len(self.stage.images), self.stage.batch_size, self.seed, self.stage.name

    def _names(self, indices: Sequence[int]) -> str:
        return ", ".join(self.stage.images[index] for index in indices)

    def _passes(self, step: int) -> list[_Pass]:
        rank, world, size = self.machine.rank, self.machine.world, self.stage.images_per_pass
        indices = batches(*self._draw(), step // self.stage.repeat, rank, world, self.stage.groups)
        offset = rank * len(indices)
        return [_Pass(offset + i, indices[i : i + size]) for i in range(0, len(indices), size)]

    @contextmanager
    def _data(self) -> Iterator[Iterator[tuple[list[_Pass], list[_Batch]]]]:
        """The passes of each step left, and what gives their batches; loaded ahead in threads if the stage can load."""
        steps = range(self.step, self.stage.steps)
        if self.stage.load is None:
            plans = ((self._passes(step)) for step in steps)
            yield ((passes, [partial(list, part.indices) for part in passes]) for passes in plans)
            return
        pool = ThreadPoolExecutor(max(self.stage.workers, 1), thread_name_prefix="load")
        try:
            yield self._load_ahead(pool, steps)
        finally:
            pool.shutdown(cancel_futures=True)

    def _load_ahead(self, pool: ThreadPoolExecutor, steps: range) -> Iterator[tuple[list[_Pass], list[_Batch]]]:
        load = self.stage.load
        assert load is not None

        def begin(step: int) -> tuple[list[_Pass], list[_Batch]]:
            passes = self._passes(step)
            draw = step // self.stage.repeat
            seeds = [stream_seed(self.seed, self.stage.name, draw, part.position, "load") for part in passes]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            futures = [pool.submit(load, part.indices, g) for part, g in zip(passes, generators, strict=True)]
            return passes, [future.result for future in futures]

        waiting = deque(begin(step) for step in steps[:_STEPS_AHEAD])
        for step in steps:
            if step + _STEPS_AHEAD < steps.stop:
                waiting.append(begin(step + _STEPS_AHEAD))
            yield waiting.popleft()

    def _open_metrics(self) -> MetricsLog | None:
        if self.machine.rank:
            return None
        write_environment(self.run_dir, self.machine.device, self.machine.world)
        metrics = MetricsLog(self.run_dir, self.stage.name, self.rows, self.step)
        self.rows = metrics.rows
        return metrics

    def _tally(self, terms: Mapping[str, float], norm: float) -> None:
        sums = {f"loss/{name}": value for name, value in terms.items()}
        if self.machine.rank == 0:
            sums |= {"steps": 1.0, "gradient_norm": norm}
        _add(self.window, sums)

    def _gather_window(self) -> None:
        """Brings what all processes have summed up to the first one."""
        windows = self.machine.gather(self.window)
        self.window = {}
        for window in windows if self.machine.rank == 0 else ():
            _add(self.window, window)

    def _write_row(self, metrics: MetricsLog | None) -> None:
        self._gather_window()
        window, clock = self.window, self.clock
        self.window, self.clock = {}, dict.fromkeys(clock, 0.0)
        if metrics is None:
            return
        learnt = window.pop("steps", 0.0)
        row: Row = {"step": self.step} | {key: window[key] / learnt for key in sorted(window)}
        row["lr"] = self.stage.optimiser.rate(self.step - 1)
        row["images_per_s"] = round(clock["steps"] * self.stage.batch_size / max(clock["seconds"], 1e-9), 3)
        row["data_s"] = round(clock["waited"] / max(clock["steps"], 1), 5)
        row["memory_mb"] = memory_mb(self.machine.device)
        row["skipped"] = self.skipped
        row["time"] = round(time.time(), 3)
        metrics.write(row)


class _Timer:
    """Says when a number of minutes is over."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._began = time.monotonic()

    def over(self) -> bool:
        return time.monotonic() - self._began >= self._seconds


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one interrupts at once."""
    event = threading.Event()

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():  # where Python does not let signals be handled
        yield event
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stream(members: Sequence[int], start: int, count: int, seed: int, stage: str) -> list[int]:
    """``count`` of the members from position ``start`` of their endless stream, a fresh permutation an epoch."""
    chosen = []
    for position in range(start, start + count):
        epoch, place = divmod(position, len(members))
        chosen.append(members[int(_permutation(len(members), seed, stage, epoch, "images")[place])])
    return chosen


@lru_cache(maxsize=16)
def _permutation(n: int, seed: int, stage: str, epoch: int, use: str) -> np.ndarray:
    return np.random.default_rng(stream_seed(seed, stage, epoch, use=use)).permutation(n)


def _check(stage: Stage, world: int) -> None:
    unit = world * stage.images_per_pass
    if stage.images_per_pass < 1 or stage.batch_size < 1 or stage.batch_size % unit:
        raise InputError(
            f"a batch of {stage.batch_size} cannot be cut into passes of {stage.images_per_pass} for {world} "
            f"process(es); make it a multiple of {max(unit, 1)}"
        )
    if not stage.images:
        raise InputError(f"stage {stage.name} has no training image; check the data set and the classes asked for")
    if stage.groups is not None and len(stage.groups) != len(stage.images):
        raise ValueError(f"groups must be ({len(stage.images)},), but got ({len(stage.groups)},)")


def _facts(stage: Stage, seed: int, precision: str) -> dict[str, Any]:
    """What decides the result of a stage, besides the module, the loss and the images' content."""
    return {
        "name": stage.name,
        "steps": stage.steps,
        "images": f"{len(stage.images)} ({_digest(stage.images)})",
        "batch_size": stage.batch_size,
        "images_per_pass": stage.images_per_pass,
        "repeat": stage.repeat,
        "groups": None if stage.groups is None else _digest(stage.groups),
        "optimiser": asdict(stage.optimiser),
        "ema": stage.ema,
        "seed": seed,
        "precision": precision,
    }


def _digest(values: Sequence[Any]) -> str:
    return hashlib.blake2b("\0".join(str(value) for value in values).encode(), digest_size=4).hexdigest()


def _hopeless(name: str, step: int, in_a_row: int, outcome: _Outcome) -> str:
    last = outcome.problems[0] if outcome.problems else "the gradient overflows in half precision"
    return (
        f"{name} stopped after step {step}: {in_a_row} steps in a row gave nothing to learn from (last: {last}); "
        "the state is saved; lower the learning rate, clip the gradient or repair the images"
    )


def _sum_together(tensors: Sequence[Tensor]) -> None:
    """Sums tensors of one type over the processes, in place, in one message."""
    if not tensors:
        return
    message = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(message)
    for tensor, part in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for key, value in more.items():
        sums[key] = sums.get(key, 0.0) + value


def _silent(message: str) -> None:
    """Takes what the processes other than the first would say."""
