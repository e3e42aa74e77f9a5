"""A pretended device: its tensors compute on the CPU, but mix with the host's as badly as a GPU's do.

``with pretended() as waits:`` makes "meta" such a device (one that every build of torch knows, whose backward pass
runs on the calling thread). A tensor there that meets one of the host raises; what would make the host wait for a GPU
is counted in ``waits`` by the line of this package that asked for it. What it cannot show: streams, memory, speed.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::unique_consecutive", "aten::unique_dim", "aten::bincount", "torchvision::nms",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class There(torch.Tensor):
    """A tensor on the pretended device; ``here`` holds its values, and shares memory where the tensors do."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        strided = here.layout == torch.strided
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride() if strided else None,
            storage_offset=here.storage_offset() if strided else None,
            dtype=here.dtype,
            device=DEVICE,
        )

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = DEVICE, **options: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())


class _Device(TorchDispatchMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.waits)


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    name = func._schema.name
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    there = {id(one.here): one for one in tensors if isinstance(one, There)}
    to = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if there:
        away = [one for one in tensors if not isinstance(one, There) and one.dim()]
        copies = name in ("aten::copy_", "aten::_to_copy")
        if away and not copies and not (name in INDEXING and isinstance(args[0], There)):
            raise RuntimeError(f"{func}: tensors of the device and of the host, {[tuple(one.shape) for one in away]}")
        home = (to is not None and to.type == "cpu") or (name == "aten::copy_" and not isinstance(args[0], There))
        if name in WAITING or home or (name in INDEXING and _by_mask(args)):
            waits[f"{name.partition('::')[2]} at {_asked_by()}"] += 1
    unwrapped_args, unwrapped_kwargs = tree_map_only(There, lambda one: one.here, (args, kwargs))
    if to is not None:
        unwrapped_kwargs["device"] = torch.device("cpu")
    out = func(*unwrapped_args, **unwrapped_kwargs)
    if not (to == DEVICE if to is not None else bool(there)) or name == "aten::_local_scalar_dense":
        return out
    if name == "aten::copy_" and not isinstance(args[0], There):
        return args[0]
    # what was changed in place is the tensor that was given
    return tree_map_only(torch.Tensor, lambda one: there[id(one)] if id(one) in there else There(one), out)


def _by_mask(args: Any) -> bool:
    """Whether tensors are indexed by a mask, whose True values a GPU has to count; it fills with one value without."""
    masked = any(isinstance(one, There) and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return masked and not (len(args) > 2 and args[2].dim() == 0)


def _asked_by() -> str:
    frames = [one for one in traceback.extract_stack() if "/labelpenet/" in one.filename]
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "?"


def move(module: nn.Module) -> None:
    """Puts a module's parameters and buffers on the pretended device."""
    for part in module.modules():
        for name, one in part._parameters.items():
            if one is not None:
                part._parameters[name] = nn.Parameter(There(one.detach()), one.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else There(buffer)


@contextlib.contextmanager
def pretended() -> Iterator[Counter[str]]:
    """The pretended device while it lasts; counts the waits of the host by place."""
    waits: Counter[str] = Counter()
    plain = contextlib.nullcontext()
    autocast, tensor = torch.autocast, torch.tensor

    def make(data: Any, dtype: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
        """Else torch would make it without telling, and without values."""
        given = isinstance(data, torch.Tensor)
        return (data if given else tensor(data, **options)).to(
            device=device or (data.device if given else "cpu"), dtype=dtype
        )

    with (
        patch("torch.autocast", lambda device, *a, **k: plain if device == "meta" else autocast(device, *a, **k)),
        patch("torch.tensor", make),
        patch("torch.as_tensor", make),
        _Device(waits),
    ):
        yield waits
