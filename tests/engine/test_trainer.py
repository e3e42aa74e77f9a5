"""The loop. Runs of several processes and runs that get killed start from one fresh interpreter, which forks: this
process has threads, and starting an interpreter for each would take seconds."""

import copy
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from labelpenet.config import RunOptions, Schedule
from labelpenet.data import run_folder
from labelpenet.engine import sampler, trainer
from labelpenet.engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from labelpenet.engine.log import read_metrics
from labelpenet.engine.sampler import batches, seed_step, stream_seed
from labelpenet.engine.stage import Stage, learning_rate
from labelpenet.errors import InputError

N = 12
IMAGES = [f"photo{i:02d}.jpg" for i in range(N)]
QUIET = {"log": lambda message: None}


def train_stage(stage: Stage, folder: Path, *, log=None, log_every=20, config=None, fabric=None, **options) -> None:
    own = RunOptions(**options)
    trainer.train_stage(stage, folder, own, config=config, fabric=fabric, log_every=log_every, log=log)


class Net(nn.Module):
    """Dropout, so that draws matter; batch norm, so that buffers do; and a layer that not every image uses."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, width).requires_grad_(False)
        self.norm = nn.BatchNorm1d(width)
        self.body = nn.Linear(width, 3)
        self.extra = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.norm(self.stem(x)), 0.3, self.training)


def pixels(index: int) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(index))


def make_stage(steps: int = 12, net: nn.Module | None = None, **options) -> Stage:
    net = net or Net()
    schedule = {"lr": 0.05, "warmup": 3, "decay": ((8 / steps, 0.1),), "batch_size": 4}
    schedule |= {name: options.pop(name) for name in list(options) if hasattr(Schedule, name)}

    def loss(indices: list[int], step: int) -> dict[str, torch.Tensor]:
        features = net(torch.cat([pixels(index) for index in indices]))
        losses = {"body": net.body(features).square().mean(), "noise": torch.rand(()) * net.body.weight.mean()}
        if indices[0] % 3 == 0:
            losses["extra"] = net.extra(features).square().mean()
        return losses

    return Stage("module1", net, Schedule(steps, **schedule), IMAGES, **({"loss": loss} | options))


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(run_dir: Path) -> list[dict]:
    """The rows of metrics without what depends on the clock and the machine."""
    clock = {"images_per_s", "data_s", "memory_mb", "time"}
    return [{key: value for key, value in row.items() if key not in clock} for row in read_metrics(run_dir)]


def test_learning_rate():
    schedule = Schedule(100, lr=0.1, warmup=4, decay=((0.1, 0.1), (0.2, 0.01)))
    assert [learning_rate(schedule, step) for step in range(5)] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    rates = [learning_rate(schedule, step) for step in (9, 10, 19, 20, 500)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.001])


# What a step does.


def reference(net: Net, steps: int, kind: str, clip: float | None, ema: float | None) -> dict[str, torch.Tensor]:
    """Training as one would write it down for one process, without any of the loop's code but seeds and batches."""
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if kind == "sgd":
        optimiser = torch.optim.SGD(trained.values(), 0.05, momentum=0.9, weight_decay=5e-4)
    else:
        optimiser = torch.optim.AdamW(trained.values(), 0.05, weight_decay=5e-4)
    average = {name: p.detach().clone() for name, p in trained.items()}
    net.train()
    for step in range(steps):
        optimiser.zero_grad()
        chosen = batches(N, 4, 3, "module1", step)
        for position in (0, 2):
            indices = chosen[position : position + 2]
            seed_step(3, "module1", step, position)
            features = net(torch.cat([pixels(index) for index in indices]))
            loss = net.body(features).square().mean() + torch.rand(()) * net.body.weight.mean()
            if indices[0] % 3 == 0:
                loss = loss + net.extra(features).square().mean()
            (loss / 2).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip)
        optimiser.param_groups[0]["lr"] = 0.05 * min(1, (step + 1) / 4) * (0.1 if step >= 8 else 1)
        optimiser.step()
        if ema is not None:
            for name, p in trained.items():
                average[name] = ema * average[name] + (1 - ema) * p.detach()
    result = weights(net)
    return result | average if ema is not None else result


@pytest.mark.parametrize(
    ("kind", "clip", "ema"), [("sgd", None, None), ("sgd", 0.05, None), ("sgd", None, 0.5), ("adamw", None, None)]
)
def test_a_stage_trains_as_a_plain_loop_does(tmp_path, kind, clip, ema):
    stage = make_stage(micro_batch=2, kind=kind, clip=clip, ema=ema)
    train_stage(stage, tmp_path, seed=3, **QUIET)
    expected = reference(Net(), 12, kind, clip, ema)
    for name, value in stage.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(stage.module.stem.weight, Net().stem.weight)


def test_the_cut_into_micro_batches_does_not_matter_where_nothing_is_random(tmp_path):
    results = []
    for size in (1, 2, 4):
        net = nn.Linear(4, 1)
        nn.init.ones_(net.weight)
        nn.init.zeros_(net.bias)

        def loss(indices, step, net=net):
            return {"square": torch.stack([net(pixels(i)).square().mean() for i in indices]).mean()}

        stage = Stage("m", net, Schedule(8, 0.01, decay=(), batch_size=4), IMAGES, loss, micro_batch=size)
        train_stage(stage, tmp_path / str(size), log_every=4, **QUIET)
        results.append((net.weight, [row["loss/square"] for row in read_metrics(tmp_path / str(size))]))
    for weight, losses in results[1:]:
        torch.testing.assert_close(weight, results[0][0])
        assert losses == pytest.approx(results[0][1])


def test_a_row_holds_the_means_since_the_last(tmp_path):
    net = nn.Linear(1, 1)
    stage = Stage(
        "m",
        net,
        Schedule(10, lr=0.5, decay=((0.7, 0.1),)),
        IMAGES,
        lambda indices, step: {"a": net.weight.sum() * 0 + step, "b": torch.tensor(2.0)},
    )
    train_stage(stage, tmp_path, log_every=4, **QUIET)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 10]
    assert [row["loss/a"] for row in rows] == [1.5, 5.5, 8.5]
    assert [row["loss/b"] for row in rows] == [2.0, 2.0, 2.0]
    assert [row["loss/total"] for row in rows] == [3.5, 7.5, 10.5]
    assert [row["lr"] for row in rows] == pytest.approx([0.5, 0.05, 0.05])
    assert {"stage", "images_per_s", "data_s", "memory_mb", "time", "gradient_norm"} <= rows[0].keys()


def test_images_with_nothing_to_learn_from_are_no_error(tmp_path):
    net = nn.Linear(2, 1)
    before = weights(net)
    losses = [{}, {"none": torch.tensor(0.0)}]
    stage = Stage("m", net, Schedule(2, weight_decay=0.1), IMAGES, lambda indices, step: losses[step])
    train_stage(stage, tmp_path, **QUIET)
    assert same(weights(net), before) and read_metrics(tmp_path)[0]["skipped"] == 0


def test_what_cannot_be_trained_is_named(tmp_path):
    with pytest.raises(InputError, match="make it a multiple of 3"):
        train_stage(make_stage(micro_batch=3), tmp_path)
    with pytest.raises(InputError, match="known are sgd, adam and adamw"):
        train_stage(make_stage(kind="lamb"), tmp_path)


# Loading ahead.


@pytest.mark.parametrize("workers", [1, 4])
def test_loaded_images_and_their_draws_are_those_of_the_step(tmp_path, workers, monkeypatch):
    seen = {}

    def load(indices, generator):
        time.sleep(random.random() * 0.002)
        return indices, torch.rand(2, generator=generator)

    net = nn.Linear(1, 1)

    def loss(batch, step):
        seen.setdefault(step, []).append((batch[0], batch[1].tolist()))
        return {"a": net.weight.sum()}

    stage = Stage("m", net, Schedule(9, batch_size=4), IMAGES, loss, micro_batch=2, load=load)
    monkeypatch.setattr(sampler, "LOADERS", workers)
    train_stage(stage, tmp_path, seed=5, **QUIET)
    draws = set()
    for step in range(9):
        assert list(itertools.chain(*(indices for indices, _ in seen[step]))) == batches(N, 4, 5, "m", step)
        for position, (_, draw) in zip((0, 2), seen[step], strict=True):
            generator = torch.Generator().manual_seed(stream_seed(5, "m", step, position, "load"))
            assert draw == torch.rand(2, generator=generator).tolist()
            draws.add(tuple(draw))
    assert len(draws) == 18


def test_repeated_steps_see_the_same_batch_and_draws_loaded_once(tmp_path):
    seen, loaded = [], []

    def load(indices: list[int], generator: torch.Generator) -> tuple[tuple[int, ...], float]:
        loaded.append(tuple(indices))
        return tuple(indices), float(torch.rand((), generator=generator))

    net = Net()

    def loss(batch, step: int) -> dict[str, torch.Tensor]:
        seen.append((step, batch))
        return {"body": net.body.weight.square().mean()}

    train_stage(make_stage(6, net, load=load, loss=loss, repeat=2, micro_batch=4), tmp_path, **QUIET)
    assert [step for step, _ in seen] == list(range(6))
    batches_seen = [batch for _, batch in seen]
    assert batches_seen[0::2] == batches_seen[1::2] and len(set(batches_seen)) == 3
    expected = [tuple(batches(N, 4, 0, "module1", k)) for k in range(3)]
    assert [indices for indices, _ in batches_seen[::2]] == expected == sorted(loaded, key=expected.index)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_an_image_that_cannot_be_read_costs_itself_alone_and_is_named(tmp_path, micro_batch):
    """The step's other images are learnt, as if the batch held them alone."""
    said, taught = [], []

    def build(load, net):
        def loss(indices, step):
            taught.append((step, tuple(indices)))
            return {"body": net.body(torch.cat([pixels(i) for i in indices])).square().mean()}

        return make_stage(steps=3, net=net, loss=loss, load=load, micro_batch=micro_batch)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(4, 3)

    def broken(indices, generator):
        if 3 in indices:
            raise InputError("photo03.jpg is truncated; replace it")
        return indices

    net = Plain()
    train_stage(build(broken, net), tmp_path / "broken", log=said.append, log_every=1)
    step = next(step for step in range(3) if 3 in batches(N, 4, 0, "module1", step))
    assert [line for line in said if "photo03" in line] == [
        f"module1: step {step + 1} goes without photo03.jpg: photo03.jpg is truncated; replace it"
    ]
    rows = read_metrics(tmp_path / "broken")
    assert rows[-1]["skipped"] == 0 and not any("skipped" in line for line in said)
    assert sorted(i for _, indices in taught for i in indices) == [i for i in range(N) if i != 3]

    other = Plain()
    optimiser = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    stage = build(broken, other)
    for number in range(3):
        read = [i for i in batches(N, 4, 0, "module1", number) if i != 3]
        optimiser.zero_grad()
        loss = torch.stack([other.body(pixels(i)).square().mean() for i in read]).mean()
        loss.backward()
        assert rows[number]["loss/body"] == pytest.approx(float(loss.detach()), rel=1e-5)
        optimiser.param_groups[0]["lr"] = learning_rate(stage.schedule, number)
        optimiser.step()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_an_image_that_comes_and_goes_is_not_asked_for_without_end(tmp_path):
    said = []

    def load(indices, generator):
        if len(indices) > 1:
            raise InputError("too many open files")
        return indices

    with pytest.raises(InputError, match="20 steps in a row"):
        train_stage(make_stage(load=load, micro_batch=4, steps=40), tmp_path, log=said.append)
    assert sum("none of its images can be read: photo" in line for line in said) == 20


# Steps that fail.


def poisoned(stage: Stage, bad: set[int], how: str = "loss") -> Stage:
    healthy = stage.loss

    def loss(batch, step):
        losses = dict(healthy(batch, step))
        if step in bad:
            if how == "loss":
                losses["body"] = losses["body"] / 0
            else:  # the square root of zero: a finite value with an infinite gradient
                losses["body"] = (stage.module.body.weight * 0).sum().abs().sqrt()
        return losses

    stage.loss = loss
    return stage


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_reported(tmp_path, how):
    said = []
    body = nn.Linear(4, 1)
    stage = make_stage(net=nn.ModuleDict({"body": body}))
    stage.loss = lambda batch, step: {"body": body(pixels(batch[0])).square().mean()}
    poisoned(stage, {4, 5}, how)
    before = {}
    inner = stage.loss

    def watched(batch, step):
        before.setdefault(step, weights(body))
        return inner(batch, step)

    stage.loss = watched
    train_stage(stage, tmp_path, log=said.append, log_every=4)
    assert same(before[4], before[6]) and not same(before[3], before[4]) and not same(before[6], before[7])
    lines = [line for line in said if "skipped, " in line]
    assert len(lines) == 2 and "not finite" in lines[0]
    assert lines[0].startswith("module1: step 5 skipped") and IMAGES[batches(N, 4, 0, "module1", 4)[0]] in lines[0]
    rows = read_metrics(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 2, 2] and all(np.isfinite(row["loss/total"]) for row in rows)


def test_many_failures_in_a_row_stop_the_run_with_the_state_saved(tmp_path):
    stage = poisoned(make_stage(steps=100), set(range(5, 100)))
    with pytest.raises(InputError, match=r"20 steps in a row .*photo.*state is saved") as caught:
        train_stage(stage, tmp_path, **QUIET)
    assert "\n" not in str(caught.value)
    state, _ = load_checkpoint(run_folder.checkpoints(tmp_path, "module1"))
    assert state["step"] == 25 and state["skipped"] == 20
    assert same({name: state["model"][name] for name in weights(stage.module)}, weights(stage.module))
    assert all(torch.isfinite(value).all() for value in state["model"].values())


# Going on.


def interrupting(stage: Stage, step: int, number: int = signal.SIGTERM, times: int = 1) -> Stage:
    inner, left = stage.loss, [number] * times

    def loss(batch, now):
        if now == step and left:
            signal.raise_signal(left.pop())
        return inner(batch, now)

    stage.loss = loss
    return stage


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_saves_and_goes_on_bit_for_bit(tmp_path, number):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    options = {"micro_batch": 2, "ema": 0.9}
    whole = make_stage(**options)
    train_stage(whole, tmp_path / "whole", log_every=5, **QUIET)
    with pytest.raises(KeyboardInterrupt, match="module1 stopped after step 7 of 12; continue with --resume"):
        train_stage(interrupting(make_stage(**options), 6, number), tmp_path / "cut", log_every=5, **QUIET)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    again = make_stage(**options)
    said = []
    train_stage(again, tmp_path / "cut", resume=True, log_every=5, log=said.append)
    assert "module1 continues after step 7 of 12" in said
    assert same(weights(whole.module), weights(again.module))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


def test_a_second_interrupt_does_not_wait(tmp_path):
    stage = interrupting(make_stage(micro_batch=2), 6, times=2)
    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, tmp_path, **QUIET)
    assert checkpoints(run_folder.checkpoints(tmp_path, "module1")) == []


def test_an_interrupt_during_the_last_save_is_not_lost(tmp_path, monkeypatch):
    def save(folder, step, state):
        signal.raise_signal(signal.SIGINT)
        return save_checkpoint(folder, step, state)

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 12 of 12"):
        train_stage(make_stage(), tmp_path, **QUIET)
    assert load_checkpoint(run_folder.checkpoints(tmp_path, "module1"))[0]["step"] == 12


def test_a_finished_stage_is_only_loaded(tmp_path):
    done = make_stage(ema=0.9)
    train_stage(done, tmp_path, **QUIET)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    again = make_stage(ema=0.9)
    inner = again.loss
    again.loss = lambda batch, step: pytest.fail("the stage was trained again") or inner(batch, step)
    train_stage(again, tmp_path, resume=True, **QUIET)
    assert same(weights(done.module), weights(again.module))
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_resume_starts_where_there_is_nothing_yet(tmp_path):
    a, b = make_stage(), make_stage()
    train_stage(a, tmp_path / "a", **QUIET)
    train_stage(b, tmp_path / "b", resume=True, **QUIET)
    assert same(weights(a.module), weights(b.module))


def test_a_run_is_not_overwritten(tmp_path):
    train_stage(make_stage(), tmp_path, **QUIET)
    with pytest.raises(InputError, match="already holds checkpoints of module1; continue with --resume"):
        train_stage(make_stage(), tmp_path, **QUIET)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 2}, "stage.batch_size was 4, is 2"),
        ({"lr": 0.01}, "stage.optimiser.lr was 0.05, is 0.01"),
        ({"steps": 20}, "stage.steps was 12, is 20"),
    ],
)
def test_a_changed_configuration_is_refused(tmp_path, changed, named):
    train_stage(make_stage(), tmp_path, config={"size": (480,)}, **QUIET)
    train_stage(make_stage(), tmp_path, config={"size": [480]}, resume=True, **QUIET)
    with pytest.raises(InputError) as caught:
        train_stage(make_stage(**changed), tmp_path, config={"size": [576]}, resume=True, **QUIET)
    assert named in str(caught.value) and "run.size was [480], is [576]" in str(caught.value)


def test_other_images_are_another_configuration(tmp_path):
    train_stage(make_stage(), tmp_path, **QUIET)
    stage = make_stage()
    stage.images = [*IMAGES[:-1], "other.jpg"]
    with pytest.raises(InputError, match=r"stage\.images was 12 \("):
        train_stage(stage, tmp_path, resume=True, **QUIET)


def test_another_model_is_refused(tmp_path):
    train_stage(make_stage(), tmp_path, **QUIET)
    with pytest.raises(InputError, match="does not fit this model") as caught:
        train_stage(make_stage(net=Net(width=9)), tmp_path, resume=True, **QUIET)
    assert "\n" not in str(caught.value)


def test_a_corrupt_last_checkpoint_falls_back_and_ends_the_same(tmp_path):
    done = make_stage()
    train_stage(done, tmp_path, checkpoint_minutes=0, log_every=3, **QUIET)
    rows = timeless(tmp_path)
    newest, before = checkpoints(run_folder.checkpoints(tmp_path, "module1"))
    newest.write_bytes(newest.read_bytes()[:-50])
    said = []
    again = make_stage()
    train_stage(again, tmp_path, resume=True, log_every=3, log=said.append)
    assert any(newest.name in line and "damaged" in line for line in said)
    assert "module1 continues after step 11 of 12" in said and before.name == "step-00000011.pt"
    assert same(weights(done.module), weights(again.module)) and timeless(tmp_path) == rows


def test_a_full_disk_stops_with_one_line_and_the_checkpoint_before(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError, match=r"No space left on device.*--resume") as caught:
        train_stage(make_stage(), tmp_path, checkpoint_minutes=0, **QUIET)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    folder = run_folder.checkpoints(tmp_path, "module1")
    assert len(checkpoints(folder)) == 2 and not list(folder.glob("*.tmp"))
    whole, again = make_stage(), make_stage()
    train_stage(whole, tmp_path / "whole", **QUIET)
    train_stage(again, tmp_path, resume=True, **QUIET)
    assert same(weights(whole.module), weights(again.module))


def test_observing_changes_nothing(tmp_path):
    seen = []

    def observe(step, metrics):
        seen.append(step)
        watched.module.eval()
        torch.rand(3)
        metrics.picture("a", np.zeros((2, 2, 3), np.uint8), step)
        assert not torch.is_grad_enabled()

    watched, alone = make_stage(observe=observe, observe_minutes=0), make_stage()
    train_stage(watched, tmp_path / "watched", **QUIET)
    train_stage(alone, tmp_path / "alone", **QUIET)
    assert seen == list(range(1, 13)) and same(weights(watched.module), weights(alone.module))


# Precision, processes, kills.


def guarded(ema: float | None, fails_at: int) -> tuple[Stage, list[dict[str, torch.Tensor]]]:
    """A stage whose guard passes but for one time; and the state that the guard saw each time."""
    stage, seen = make_stage(ema=ema, guard_steps=3), []
    if ema is not None:
        stage.teacher = copy.deepcopy(stage.module)

    def guard() -> tuple[dict[str, float], str | None]:
        seen.append(weights(stage.teacher or stage.module))
        return {"calls": float(len(seen))}, "too far" if len(seen) == fails_at else None

    stage.guard = guard
    return stage, seen


@pytest.mark.parametrize("ema", [None, 0.6])
def test_a_guard_ends_a_stage_with_the_weights_that_passed_last(tmp_path, ema):
    said: list[str] = []
    stage, seen = guarded(ema, fails_at=3)
    train_stage(stage, tmp_path, log=said.append)
    trained = [name for name, parameter in stage.module.named_parameters() if parameter.requires_grad]
    assert len(seen) == 3 and "module1: too far" in said
    for name in trained:
        assert torch.equal(stage.module.state_dict()[name], seen[1][name])
        assert not torch.equal(stage.module.state_dict()[name], seen[2][name])
    rows = [row for row in read_metrics(tmp_path) if "calls" in row]
    assert [(row["step"], row["calls"]) for row in rows] == [(3, 1), (6, 2), (9, 3)]
    again, called = guarded(ema, fails_at=0)
    train_stage(again, tmp_path, resume=True, **QUIET)  # it is done, so it is only loaded
    assert not called and same(weights(again.module), weights(stage.module))


def test_the_teacher_is_the_average_and_what_passed_survives_an_interruption(tmp_path):
    whole, seen = guarded(0.6, fails_at=4)
    train_stage(whole, tmp_path / "whole", **QUIET)
    with pytest.raises(KeyboardInterrupt):
        train_stage(interrupting(guarded(0.6, 0)[0], 10), tmp_path / "parts", **QUIET)
    rest, later = guarded(0.6, fails_at=1)
    train_stage(rest, tmp_path / "parts", resume=True, **QUIET)
    assert len(later) == 1 and same(later[0], seen[3])
    assert same(weights(rest.module), weights(whole.module))
    plain = make_stage(ema=0.6, steps=12)
    train_stage(plain, tmp_path / "plain", **QUIET)
    for name, parameter in plain.module.named_parameters():
        assert torch.equal(parameter, seen[3][name])  # looking changed nothing


def test_the_average_moves_once_for_repeated_steps(tmp_path):
    """After every two steps that see the same batch, so that a teacher says the same to both."""
    stage, states = make_stage(ema=0.6, repeat=2), []
    stage.teacher = copy.deepcopy(stage.module)
    loss = stage.loss

    def recorded(indices: list[int], step: int) -> dict[str, torch.Tensor]:
        states.append(stage.teacher.body.weight.clone())
        return loss(indices, step)

    stage.loss = recorded
    train_stage(stage, tmp_path, **QUIET)
    each = states[:: len(states) // 12]
    assert all(torch.equal(each[step], each[step + 1]) for step in range(0, 12, 2))
    assert not any(torch.equal(each[step], each[step + 1]) for step in range(1, 11, 2))


@pytest.mark.parametrize("lost", [0, 2])
def test_the_start_has_no_share_in_an_average_that_leaves_it_out(tmp_path, lost):
    """Of random parameters .9 ** 12 = 28 % would be left after twelve steps; the first ones may give nothing."""
    ema, states = 0.9, {}

    def trained(folder: Path, **options) -> Stage:
        stage = make_stage(**options)
        loss = stage.loss

        def recorded(indices: list[int], step: int) -> dict[str, torch.Tensor]:
            states.setdefault((folder.name, step), weights(stage.module))
            return {name: one * (np.nan if step < lost else 1) for name, one in loss(indices, step).items()}

        stage.loss = recorded
        train_stage(stage, folder, **QUIET)
        return stage

    stage = trained(tmp_path / "averaged", ema=ema, ema_from_start=False)
    plain = trained(tmp_path / "plain")
    after = [*(states["averaged", step] for step in range(lost + 1, 12)), weights(plain.module)]  # what each step left
    shares = [(1 - ema) * ema ** (11 - step) / (1 - ema ** (12 - lost)) for step in range(lost, 12)]
    assert len(after) == 12 - lost and sum(shares) == pytest.approx(1)
    for name, parameter in stage.module.named_parameters():
        expected = sum(share * state[name] for share, state in zip(shares, after, strict=True))
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)


def test_half_precision_on_the_cpu(tmp_path):
    from lightning_fabric import Fabric

    net = nn.Linear(4, 4)
    types = []

    def loss(indices, step):
        out = net(pixels(indices[0]))
        types.append(out.dtype)
        return {"a": out.square().mean()}

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    train_stage(Stage("m", net, Schedule(2), IMAGES, loss), tmp_path / "bf16", fabric=fabric, **QUIET)
    assert set(types) == {torch.bfloat16} and net.weight.dtype == torch.float32
    with pytest.raises(InputError, match="choose 32-true, bf16-mixed or 16-mixed"):
        double = Fabric(accelerator="cpu", devices=1, precision="64-true")
        train_stage(Stage("m", net, Schedule(2), IMAGES, loss), tmp_path / "64", fabric=double, **QUIET)


class HalfFabric:
    """A Fabric in half precision with a loss scaler, which Fabric itself has on a GPU only."""

    device, global_rank, world_size = torch.device("cpu"), 0, 1

    def __init__(self) -> None:
        from lightning_fabric.plugins import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
        self.strategy = SimpleNamespace(precision=MixedPrecision("16-mixed", "cpu", scaler))


def test_the_loss_scale_finds_its_value_and_survives_an_interruption(tmp_path):
    options = {"decay": (), "warmup": 0, "clip": 0.1, "micro_batch": 2}
    said = []
    whole = make_stage(**options)
    train_stage(whole, tmp_path / "whole", fabric=HalfFabric(), log=said.append)
    with pytest.raises(KeyboardInterrupt):
        cut = interrupting(make_stage(**options), 6)
        train_stage(cut, tmp_path / "cut", fabric=HalfFabric(), **QUIET)
    again = make_stage(**options)
    train_stage(again, tmp_path / "cut", fabric=HalfFabric(), resume=True, **QUIET)
    assert same(weights(whole.module), weights(again.module))
    assert not torch.equal(whole.module.body.weight, Net().body.weight)
    state, _ = load_checkpoint(run_folder.checkpoints(tmp_path / "whole", "module1"))
    assert 1 <= state["scaler"]["scale"] < 2.0**24
    assert not any("skipped" in line for line in said), "an overflow is no fault of the images"


def in_fresh_interpreter(function: str, *args) -> dict:
    """Calls one of the functions below in an interpreter that has no threads yet, and returns its answer."""
    root = Path(__file__).parents[2]
    code = f"import json; from tests.engine import test_trainer as t; print(json.dumps(t.{function}(*{args!r})))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def prepare_to_fork() -> None:
    """Imports what torch puts off until it is used, which takes seconds, once instead of in every fork."""
    import torch.utils.tensorboard

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)], 0.1).step()


def two_process_stage() -> Stage:
    """No batch norm, whose statistics are each process's own; a step that fails on the second process alone, one of
    which the second process can read nothing, and one of which none can.
    """
    net = Net()
    net.norm = nn.Identity()
    stage = make_stage(net=net, ema=0.9)
    lost = {*batches(N, 4, 0, stage.name, 6)[2:], *batches(N, 4, 0, stage.name, 9)}

    def load(indices, generator):
        if lost.intersection(indices):
            raise InputError("damaged")
        return indices

    stage.load = load
    return poisoned_for(stage, 4, position=3)


def poisoned_for(stage: Stage, bad: int, position: int) -> Stage:
    inner = stage.loss
    victim = batches(N, 4, 0, stage.name, bad)[position]

    def loss(batch, step):
        losses = inner(batch, step)
        return {"body": losses["body"] / 0} if step == bad and victim in batch else losses

    stage.loss = loss
    return stage


def run_fabric(run_dir: str, devices: int) -> None:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto")
    fabric.launch(_train_on, run_dir)


def _train_on(fabric, run_dir: str) -> None:
    for resume in (False, True):
        stage = two_process_stage()
        if fabric.global_rank:
            nn.init.zeros_(stage.module.body.weight)  # every process must get the first one's weights
        try:
            if not resume and fabric.global_rank == fabric.world_size - 1:
                interrupting(stage, 7)
            train_stage(stage, Path(run_dir), fabric=fabric, resume=resume, log_every=5, log=print)
        except KeyboardInterrupt:
            assert not resume
    torch.save(stage.module.state_dict(), Path(run_dir) / f"rank{fabric.global_rank}.pt")


def one_and_two_processes(folder: str) -> dict:
    prepare_to_fork()
    for devices in (1, 2):
        run_fabric(f"{folder}/{devices}", devices)
    return {}


def test_two_processes_learn_what_one_does(tmp_path):
    """Gloo on the CPU; with failing images, an interruption and a resume on the way."""
    in_fresh_interpreter("one_and_two_processes", str(tmp_path))
    one, two, other = (torch.load(tmp_path / name) for name in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt"))
    assert same(two, other)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-7, msg=name)
    rows, others = timeless(tmp_path / "1"), timeless(tmp_path / "2")
    assert len(rows) == len(others) == 3 and rows[-1]["skipped"] == 2, "one not finite, one without any image"
    for row, other_row in zip(rows, others, strict=True):
        assert row.pop("stage") == other_row.pop("stage")
        assert row == pytest.approx(other_row, rel=1e-5)


def killed_stage() -> Stage:
    # the net is wide, so that writing it takes a while
    return make_stage(steps=36, net=Net(width=5000), ema=0.9, clip=0.1, decay=(), warmup=0)


def train_killed(run_dir: str, resume: bool, fatal: tuple[str, int] | None = None) -> None:
    """Trains in a fork; ``fatal`` names a function of the operating system in whose n-th call the process dies."""
    if fatal is not None:
        name, n = fatal
        real, calls = getattr(os, name), []

        def deadly(*args):
            calls.append(args)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(os, name, deadly)
    stage = killed_stage()
    train_stage(stage, Path(run_dir), resume=resume, checkpoint_minutes=0, log_every=7, log=lambda message: None)
    torch.save(stage.module.state_dict(), Path(run_dir) / "result.pt")


def kill_often(folder: str, kills: int, seed: int) -> dict:
    """An uninterrupted run, and others that are killed ``kills`` times in all, then left to finish.

    The first two kills come when a checkpoint is written, but not yet there under its name; the others at random
    moments. A run that finishes before it is killed is followed by a new one.
    """
    import multiprocessing

    prepare_to_fork()
    fork = multiprocessing.get_context("fork")
    draw = random.Random(seed)
    steps, half_written, run = [], 0, 0

    def start(name: str, *args):
        process = fork.Process(target=train_killed, args=(f"{folder}/{name}", *args))
        process.start()
        return process

    def newest() -> int:
        found = checkpoints(run_folder.checkpoints(Path(folder) / f"killed{run}", "module1"))
        return int(found[0].stem.removeprefix("step-")) if found else 0

    whole = start("whole", False)
    whole.join()
    exits = [whole.exitcode]
    while len(steps) < kills:
        writing = len(steps) < 2
        process = start(f"killed{run}", True, ("fsync", 5) if writing else None)
        goal = newest() + draw.randint(0, 2)
        while process.is_alive() and (writing or newest() < goal):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            steps.append(newest())
            half_written += bool(list(Path(folder).glob(f"killed{run}/checkpoints/*/*.tmp")))
        else:
            exits.append(process.exitcode)
            run += 1
    last = start(f"killed{run}", True)
    last.join()
    return {"steps": steps, "half_written": half_written, "exits": [*exits, last.exitcode]}


def check_kills(tmp_path: Path, kills: int, seed: int) -> list[int]:
    report = in_fresh_interpreter("kill_often", str(tmp_path), kills, seed)
    assert set(report["exits"]) == {0} and report["half_written"] >= 2, report
    whole = torch.load(tmp_path / "whole" / "result.pt")
    runs = sorted(tmp_path.glob("killed*"))
    assert len(runs) == len(report["exits"]) - 1
    for run in runs:
        assert same(whole, torch.load(run / "result.pt"))
        assert timeless(tmp_path / "whole") == timeless(run)
        assert not list(run.glob("checkpoints/*/*.tmp"))
    return report["steps"]


def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path):
    """Two kills in the middle of writing a checkpoint, two at random moments."""
    assert len(check_kills(tmp_path, 4, 0)) == 4


@pytest.mark.slow
def test_killed_at_twenty_two_moments(tmp_path):
    steps = check_kills(tmp_path, 22, 1)
    assert len(set(steps)) >= 5, steps
