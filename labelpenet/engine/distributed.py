"""Devices, precision and processes: one Fabric for a run, work shared by cores, gradients summed over processes.

Gradients are summed here, not by ``DistributedDataParallel``: a loss may then use the module as it likes (several
forwards, inference in between, parameters left out), and a process may drop a step without the others waiting for it.
"""

import atexit
import contextlib
import logging
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor, nn

from labelpenet.config import Device, Precision
from labelpenet.errors import InputError, reason

T = TypeVar("T")
S = TypeVar("S")

_BUCKET = 16 * 2**20  # numbers in one message when gradients are summed over processes

_REMEDY = "what is finished is kept: see what the process said, then run the command again, with --resume if it trains"

PRECISIONS = get_args(Precision)


def build_fabric(device: str = "auto", devices: int = 1, nodes: int = 1, precision: str = "auto") -> Fabric:
    """A launched Fabric.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        devices: processes on each machine, on a CPU no more than it has cores; nodes: machines.
        precision: ``auto`` is bf16-mixed where the hardware multiplies bfloat16, else 32-true.

    Raises:
        InputError: there is no such device, an unknown precision, or more processes than cores.
    """
    if device not in get_args(Device):
        raise InputError(f"unknown device {device!r}; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available here; use --device cpu")
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = os.cpu_count() or 1
    if device == "cpu" and devices > max(cores, 2):
        raise InputError(f"--devices {devices}: this machine has {cores} cores; choose at most so many processes")
    if precision == "auto":
        precision = "bf16-mixed" if _multiplies_bfloat16(device) else "32-true"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # what it says, run.json and environment.json say
    observer = logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script")
    observer.setLevel(logging.INFO)  # says that it ends this process, because another one has died
    observer.addFilter(_say_what_to_do)
    try:
        fabric = Fabric(accelerator=device, devices=devices, num_nodes=nodes, precision=precision)  # type: ignore[arg-type]
        fabric.launch()
    except (RuntimeError, ValueError) as error:  # among them Lightning's own about Slurm's and torchrun's settings
        raise InputError(f"--devices {devices} --nodes {nodes} cannot be started ({reason(error)})") from error
    if fabric.world_size > 1:
        atexit.register(_leave)
    return fabric


def precision_of(fabric: Fabric) -> str:
    """What a Fabric computes in, such as ``bf16-mixed``."""
    return str(fabric.strategy.precision.precision)


def _leave() -> None:
    """Ends the process group, whose threads would else abort the process now and then while Python shuts down."""
    if dist.is_initialized():
        dist.destroy_process_group()


def images_together(batch_size: int, fabric: Fabric) -> int:
    """Images of a batch that go through the network at a time in training: one on a CPU, on a GPU all of a process.

    So on GPUs the result depends on the number of processes, by what is drawn for these images and averaged over them,
    and a stage is resumed with the same number alone.
    """
    share, rest = divmod(batch_size, fabric.world_size)
    return 1 if fabric.device.type == "cpu" or rest else share


class Machine:
    """Where a process computes, and its place among the processes."""

    def __init__(self, fabric: Fabric | None) -> None:
        fabric = fabric or Fabric(accelerator="cpu", devices=1)
        self.device, self.rank, self.world = fabric.device, fabric.global_rank, fabric.world_size
        precision = fabric.strategy.precision
        self.precision, self.autocast = precision_of(fabric), precision.forward_context
        if self.precision not in PRECISIONS[1:]:
            raise InputError(f"precision {self.precision} is not supported; choose 32-true, bf16-mixed or 16-mixed")
        self.scaler = getattr(precision, "scaler", None) or torch.amp.GradScaler(self.device.type, enabled=False)

    def count(self, flags: Sequence[int]) -> list[int]:
        """For each flag the number of processes that raise it; of numbers the sum over the processes."""
        counts = [int(flag) for flag in flags]
        if self.world == 1:
            return counts
        message = torch.tensor(counts, dtype=torch.int32, device=self.device)
        dist.all_reduce(message)
        return message.tolist()

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


def gather(world: int, value: T) -> list[T]:
    """The values of all ``world`` processes, by rank."""
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value)
    return found


def _say_what_to_do(record: logging.LogRecord) -> bool:
    record.msg, record.args = f"{record.getMessage().partition('. Forcefully')[0]}; {_REMEDY}", None
    return True


@contextlib.contextmanager
def peers(world: int) -> Iterator[None]:
    """Turns the end of another of the ``world`` processes, which breaks a message to it, into one line.

    Raises:
        InputError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        frames = traceback.walk_tb(error.__traceback__)
        if world == 1 or not any("torch/distributed" in Path(f.f_code.co_filename).as_posix() for f, _ in frames):
            raise
        raise InputError(f"another process of this command has ended (killed, or out of memory?); {_REMEDY}") from error


def together(world: int, work: Callable[[], object]) -> None:
    """Does this process's work and waits for that of the others; what one of them cannot do is raised in all."""
    problem = None
    try:
        work()
    except InputError as error:
        problem = str(error)
    for one in gather(world, problem):
        if one is not None:
            _let_the_others_end()
            gather(world, None)  # so that none ends before the first one lets it
            raise InputError(one)


def _let_the_others_end() -> None:
    """Stops Lightning from killing this process because another one, which this one started, ends with an error too."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            getattr(thread, "_child_processes", []).clear()


def _multiplies_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # newer than the oldest torch that we run on
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def map_images(function: Callable[[T], S], items: Sequence[T], device: torch.device) -> Generator[S, None, None]:
    """``function`` of each item, in order; on the CPU several items at a time, each on one core.

    An image is small work: one core each is about 1.5 times as fast as all cores on one image after the other.
    """
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    if workers == 1:
        yield from map(function, items)
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        running: deque[Future[S]] = deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) >= 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(workers)


def _sum_together(tensors: Sequence[Tensor]) -> None:
    """Sums tensors of one type over the processes, in place, in one message."""
    if not tensors:
        return
    message = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(message)
    for tensor, part in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
