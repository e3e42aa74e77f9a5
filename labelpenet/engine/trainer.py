"""The training loop, for any module and loss.

The batch of a step is cut into micro-batches of `Stage.micro_batch` images; their gradients are accumulated, then
summed over the processes. Where the cut does not depend on the number of processes (on CPUs, see
`distributed.images_together`), neither does the result, but for rounding.
"""

import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from labelpenet.config import RunOptions
from labelpenet.data import run_folder
from labelpenet.engine.checkpoint import (
    check_configuration,
    checkpoints,
    git_revision,
    load_checkpoint,
    plain,
    save_checkpoint,
    versions,
)
from labelpenet.engine.distributed import Machine, gather, together
from labelpenet.engine.log import MetricsLog, Row, memory_mb, write_environment
from labelpenet.engine.sampler import MicroBatch, draw, micro_batches, seed_step
from labelpenet.engine.stage import Stage, build_optimiser, learning_rate
from labelpenet.errors import InputError
from labelpenet.progress import Progress, silent

MAX_SKIPPED_IN_A_ROW = 20


def train_stage(
    stage: Stage,
    run_dir: Path,
    options: RunOptions = RunOptions(),
    *,
    config: Mapping[str, Any] | None = None,
    fabric: Fabric | None = None,
    log_every: int = 20,
    log: Callable[[str], None] | None = None,
) -> None:
    """Trains a stage to its end, or continues it; ``stage.module`` then holds the result.

    Writes ``RUN/checkpoints/STAGE``, ``RUN/metrics.jsonl``, ``RUN/tensorboard/STAGE`` and ``RUN/environment.json``.
    With several processes all must see the same run folder.

    Args:
        options: with ``resume`` it continues from the newest checkpoint, and starts where there is none; a finished
            stage is only loaded. What they say of devices is the fabric's.
        config: the run's configuration, plain values; kept in the checkpoint, and a resumed run must have the same.
        fabric: a launched Fabric: device, precision (``32-true``, ``bf16-mixed`` or ``16-mixed``), processes; None for
            one process on the CPU.
        log_every: steps between rows of metrics.
        log: where messages and plain lines of progress go; None for the terminal.

    Raises:
        InputError: nothing can be trained with these arguments, the configuration has changed, every checkpoint is
            damaged, the disk is full, or `MAX_SKIPPED_IN_A_ROW` steps in a row failed (the state is saved).
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the step was finished and the state saved.
    """
    trainer = _Trainer(stage, Path(run_dir), options.seed, config or {}, Machine(fabric), log_every)
    notes = trainer.restore(options.resume)
    with Progress(stage.name, stage.steps, trainer.step, silent if trainer.machine.rank else log) as progress:
        for note in notes:
            progress.say(note)
        if trainer.step < stage.steps:
            trainer.train(options.checkpoint_minutes, progress)
    trainer.finish()


@dataclass(frozen=True)
class _Outcome:
    """What became of a step: a line for each micro-batch that gave nothing to learn from (any skips the step), whether
    the processes agreed to stop and to save, whether the gradient left the range of half precision, which skips
    it too, and a line for each image that the step went without.
    """

    problems: list[str]
    stop: bool
    save: bool
    overflow: bool = False
    lost: Sequence[str] = ()


class _Trainer:
    """A stage while it is being trained: what is saved, how it comes back, and one step."""

    def __init__(
        self, stage: Stage, run_dir: Path, seed: int, config: Mapping[str, Any], machine: Machine, log_every: int
    ) -> None:
        stage.check(machine.world)
        self.stage, self.run_dir, self.seed, self.machine, self.log_every = stage, run_dir, seed, machine, log_every
        self.folder = run_folder.checkpoints(run_dir, stage.name)
        self.source = {"versions": versions(), "git": git_revision()}
        self.config = plain({"run": config, "stage": stage.facts(seed, machine.precision)})
        stage.module.to(machine.device)
        self.parameters = [p for p in stage.module.parameters() if p.requires_grad]
        self.optimiser = build_optimiser(stage.schedule, self.parameters)
        trained = {id(p) for p in self.parameters}
        named = {name: p.detach() for name, p in stage.module.named_parameters() if id(p) in trained}
        taught = {} if stage.teacher is None else dict(stage.teacher.to(machine.device).named_parameters())
        self.average = {} if stage.ema is None else {
            name: taught[name].detach() if taught else value.clone() for name, value in named.items()
        }  # fmt: skip
        self.result = self.average or named  # what the stage is for
        self.kept = {name: value.clone() for name, value in self.result.items()} if stage.guard else {}
        self.step = 0
        self.skipped = 0
        self.averaged = 0  # updates that the average has seen, as skipped steps make none
        self.rows: list[Row] = []
        # Sums since the last row of metrics; in the checkpoint, so that a row does not depend on interruptions.
        self.window: Counter[str] = Counter()
        self.clock = {"steps": 0.0, "seconds": 0.0, "waited": 0.0}

    def restore(self, resume: bool) -> list[str]:
        """Takes up the newest checkpoint, if there is one; returns what there is to say about it."""
        if not resume and checkpoints(self.folder):
            raise InputError(
                f"{self.run_dir} already holds checkpoints of {self.stage.name}; continue with --resume, "
                "or start in another folder"
            )
        state, notes = load_checkpoint(self.folder)
        if state is None:
            self.machine.share([*self.stage.module.parameters(), *self.stage.module.buffers()])
            return notes
        state["config"]["stage"].pop("groups", None)  # of checkpoints that knew groups of images, and had none
        check_configuration(state["config"], self.config, self.run_dir)
        try:
            self.stage.module.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            for name, value in self.average.items():
                value.copy_(state["average"][name])
            for name, value in self.kept.items():
                value.copy_(state["kept"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"the newest checkpoint in {self.folder} does not fit this model; use the version and settings "
                "that it was made with, or start in another folder"
            ) from error
        if state["scaler"]:
            self.machine.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped, self.rows = state["step"], state["skipped"], state["metrics"]
        self.averaged = state.get("averaged", self.step // self.stage.repeat)  # earlier versions did not say
        if self.machine.rank == 0:
            self.window = Counter(state["window"])
        old, new = state["source"]["versions"], versions()
        changes = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
        if changes:
            notes.append(f"{self.stage.name} was saved under other versions: {', '.join(changes)}")
        if 0 < self.step < self.stage.steps:
            notes.append(f"{self.stage.name} continues after step {self.step} of {self.stage.steps}")
        return notes

    def save(self) -> None:
        """Writes a checkpoint (first process); if that fails, every process raises the `InputError`."""
        self._gather_window()
        state = {
            "stage": self.stage.name,
            "step": self.step,
            "model": self.stage.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.machine.scaler.state_dict(),
            "average": self.average,
            "kept": self.kept,
            "skipped": self.skipped,
            "averaged": self.averaged,
            "window": dict(self.window),
            "metrics": self.rows,
            "config": self.config,
            "source": self.source,
        }
        together(self.machine.world, lambda: self.machine.rank or save_checkpoint(self.folder, self.step, state))

    def finish(self) -> None:
        """Puts the averaged weights into the module, where there are any."""
        with torch.no_grad():
            for name, parameter in self.stage.module.named_parameters():
                if name in self.average:
                    parameter.copy_(self.average[name])

    def train(self, checkpoint_minutes: float, progress: Progress) -> None:
        """Trains from the current step to the last one."""
        stage = self.stage
        metrics: MetricsLog | None = None
        if self.machine.rank == 0:
            write_environment(self.run_dir, self.machine.device, self.machine.world)
            metrics = MetricsLog(self.run_dir, stage.name, self.rows, self.step)
            self.rows = metrics.rows
        checkpoint, observation = _Timer(checkpoint_minutes), _Timer(stage.observe_minutes)
        in_a_row = 0
        outcome = _Outcome([], stop=False, save=False)
        stage.module.train()
        try:
            feed = micro_batches(stage, self.seed, self.machine.rank, self.machine.world, self.step)
            with _signals() as interrupted, feed as steps:
                for share in steps:
                    began = time.monotonic()
                    outcome = self.advance(share, interrupted.is_set, checkpoint.over)
                    self.clock["seconds"] += time.monotonic() - began
                    for line in dict.fromkeys(outcome.lost):
                        progress.say(f"{stage.name}: step {self.step} goes without {line}")
                    for problem in outcome.problems:
                        progress.say(f"{stage.name}: step {self.step} skipped, {problem}")
                    in_a_row = in_a_row + 1 if outcome.problems or outcome.overflow else 0
                    if self.step % self.log_every == 0 or self.step == stage.steps:
                        self._write_row(metrics)
                    # an observer's rows, between those of the losses, have no speed to tell the time left from
                    progress.show(self.step, next((row for row in reversed(self.rows) if "images_per_s" in row), {}))
                    ended = self._guard(metrics)
                    if ended is not None:
                        progress.say(f"{stage.name}: {ended}")
                        self.step = stage.steps
                    hopeless = in_a_row >= MAX_SKIPPED_IN_A_ROW
                    if outcome.save or outcome.stop or hopeless or self.step == stage.steps:
                        self.save()
                        checkpoint.restart()
                    if hopeless:
                        raise InputError(_hopeless(stage.name, self.step, in_a_row, outcome))
                    if outcome.stop or ended is not None:
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

    def advance(self, share: Sequence[MicroBatch], stop: Callable[[], bool], save: Callable[[], bool]) -> _Outcome:
        """One optimiser step.

        Args:
            share: this process's part of the batch.
            stop, save: asked once the gradient is there: whether this process wants to stop, to save.
        """
        self.optimiser.zero_grad(set_to_none=True)
        terms: Counter[str] = Counter()
        problem = None
        unread: list[str] = []
        for micro_batch in share:
            problem = self._accumulate(micro_batch, terms, unread)
            if problem is not None:
                break
        # Whether to save is for the first process to say: the clocks of the others may differ.
        flags = [problem is not None, stop(), save() and self.machine.rank == 0, len(unread)]
        counts = self.machine.count([*flags, *(p.grad is not None for p in self.parameters)])
        failed, stopping, saving = (count > 0 for count in counts[:3])
        missing = counts[3]
        lost = [line for lines in gather(self.machine.world, unread) for line in lines] if missing else []
        problems, overflow = [], False
        if failed:
            problems = [line for line in gather(self.machine.world, problem) if line is not None]
        elif missing == self.stage.batch_size:
            problems, lost = [f"none of its images can be read: {line}" for line in lost[:1]], []
        else:
            used = [p for p, count in zip(self.parameters, counts[4:], strict=True) if count]
            scale = self.stage.batch_size / (self.stage.batch_size - missing)  # the mean is over those that were read
            norm = self._update(used, scale)
            if math.isfinite(norm):
                self.window.update({f"loss/{name}": value * scale for name, value in terms.items()})
                if self.machine.rank == 0:
                    self.window.update({"steps": 1.0, "gradient_norm": norm})
            elif self.machine.scaler.is_enabled():
                overflow = True  # the usual way in which the scaler finds its scale: not worth a report
            else:
                names = self._names(draw(self.stage, self.seed, self.step))
                problems = [f"the gradient is not finite: {names}"]
        self.skipped += bool(problems)
        self.clock["steps"] += 1
        self.step += 1
        return _Outcome(problems, stopping, saving, overflow, lost)

    def _accumulate(self, micro_batch: MicroBatch, terms: Counter[str], unread: list[str]) -> str | None:
        """Adds a micro-batch's gradient and loss terms, in proportion to its share of the batch; or says why not.

        A line for each image that cannot be read goes to ``unread``.
        """
        began = time.monotonic()
        loaded = micro_batch.batch()
        self.clock["waited"] += time.monotonic() - began
        unread += loaded.lost
        if not loaded.indices:
            return None
        seed_step(self.seed, self.stage.name, self.step, micro_batch.position)
        with self.machine.autocast():
            losses = {name: value.float() for name, value in self.stage.loss(loaded.content, self.step).items()}
        if not losses:
            return None
        total = torch.stack(list(losses.values())).sum()
        values = torch.stack([total, *losses.values()]).tolist()
        if not all(math.isfinite(value) for value in values):
            bad = [name for name, value in zip(losses, values[1:], strict=True) if not math.isfinite(value)]
            return f"the loss is not finite ({', '.join(bad) or 'total'}): {self._names(loaded.indices)}"
        share = len(loaded.indices) / self.stage.batch_size
        if total.requires_grad:  # it does not where nothing in these images can be learnt from
            self.machine.scaler.scale(total * share).backward()
        terms.update({name: value * share for name, value in zip(["total", *losses], values, strict=True)})
        return None

    def _update(self, used: list[nn.Parameter], scale: float) -> float:
        """Moves the parameters that any process has a gradient for, their gradients times ``scale``; returns the norm.

        Where the norm is not finite, nothing moves.
        """
        if not used:
            return 0.0
        machine, step, schedule = self.machine, self.step, self.stage.schedule
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        machine.sum_gradients(used)
        for parameter in used if scale != 1 else ():
            assert parameter.grad is not None
            parameter.grad *= scale
        machine.scaler.unscale_(self.optimiser)
        total = torch.nn.utils.get_total_norm([p.grad for p in used if p.grad is not None])
        norm = float(total)
        if math.isfinite(norm):
            if schedule.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(used, schedule.clip, total)
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(schedule, step)
        if math.isfinite(norm) or machine.scaler.is_enabled():
            machine.scaler.step(self.optimiser)  # which moves nothing where it finds an overflow
            machine.scaler.update()
        if math.isfinite(norm):
            self._update_average()
        if machine.world > 1:
            machine.share(b for b in self.stage.module.buffers() if b.is_floating_point())
        return norm

    def _guard(self, metrics: MetricsLog | None) -> str | None:
        """Lets the stage's guard look; keeps the parameters that pass, or goes back to those kept and says why."""
        stage, step = self.stage, self.step
        if stage.guard is None or (step % stage.guard_steps and step < stage.steps):
            return None
        with torch.no_grad():
            figures, problem = stage.guard()
        stage.module.train()
        if metrics is not None:
            metrics.write({"step": step, **figures})
        source, target = (self.result, self.kept) if problem is None else (self.kept, self.result)
        for name, value in target.items():
            value.copy_(source[name])
        return problem

    def _update_average(self) -> None:
        ema = self.stage.ema
        if ema is None or (self.step + 1) % self.stage.repeat:
            return
        share, self.averaged = 1 - ema, self.averaged + 1
        if not self.stage.ema_from_start:
            share /= 1 - ema**self.averaged  # the first update replaces the start, and the shares of all add up to 1
        for name, parameter in self.stage.module.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.detach(), share)

    def _names(self, indices: Sequence[int]) -> str:
        return ", ".join(self.stage.images[index] for index in indices)

    def _gather_window(self) -> None:
        """Brings what all processes have summed up to the first one."""
        windows = gather(self.machine.world, self.window)
        self.window = Counter()
        for window in windows if self.machine.rank == 0 else ():
            self.window.update(window)

    def _write_row(self, metrics: MetricsLog | None) -> None:
        self._gather_window()
        window, clock = self.window, self.clock
        self.window, self.clock = Counter(), dict.fromkeys(clock, 0.0)
        if metrics is None:
            return
        learnt = window.pop("steps", 0.0)
        row: Row = {"step": self.step} | {key: window[key] / learnt for key in sorted(window)}
        row["lr"] = learning_rate(self.stage.schedule, self.step - 1)
        row["images_per_s"] = round(clock["steps"] * self.stage.batch_size / max(clock["seconds"], 1e-9), 3)
        row["data_s"] = round(clock["waited"] / max(clock["steps"], 1), 5)
        row["memory_mb"] = memory_mb(self.machine.device)
        row["skipped"] = self.skipped
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


def _hopeless(name: str, step: int, in_a_row: int, outcome: _Outcome) -> str:
    last = outcome.problems[0] if outcome.problems else "the gradient overflows in half precision"
    return (
        f"{name} stopped after step {step}: {in_a_row} steps in a row gave nothing to learn from (last: {last}); "
        "the state is saved; lower the learning rate, clip the gradient or repair the images"
    )
