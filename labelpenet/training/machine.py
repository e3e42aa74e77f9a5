"""Which device, which precision: one Fabric for a run."""

from __future__ import annotations

import atexit
import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric

from labelpenet.errors import InputError

T = TypeVar("T")
S = TypeVar("S")

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


def build_fabric(device: str = "auto", devices: int = 1, nodes: int = 1, precision: str = "auto") -> Fabric:
    """A launched Fabric.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        devices: processes on each machine; nodes: machines.
        precision: ``auto`` is bf16-mixed where the hardware multiplies bfloat16, else 32-true.

    Raises:
        InputError: there is no such device, or an unknown precision.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {device!r}; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available here; use --device cpu")
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "bf16-mixed" if _multiplies_bfloat16(device) else "32-true"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # what it says, run.json and environment.json say
    try:
        fabric = Fabric(accelerator=device, devices=devices, num_nodes=nodes, precision=precision)  # type: ignore[arg-type]
        fabric.launch()
    except (RuntimeError, ValueError) as error:  # among them Lightning's own about Slurm's and torchrun's settings
        line = " ".join(str(error).split())
        raise InputError(f"--devices {devices} --nodes {nodes} cannot be started ({line})") from error
    if fabric.world_size > 1:
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Ends the process group, whose threads would else abort the process now and then while Python shuts down."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
