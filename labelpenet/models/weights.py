"""Pretrained weights from files that others made: nothing in them is run, and what no network can use is refused."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from labelpenet.errors import InputError, reason


def read_weights(path: Path, of: str) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file, or in a ``.pt`` / ``.pth`` that holds tensors only.

    Raises:
        InputError: the file is damaged, would have to run code, or holds something else than named dense tensors; the
            message says ``of`` what weights are expected.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may make the reader raise almost anything
        # torch would have the user turn off the protection
        unsafe = "weights_only" in str(error).lower() or "weights only" in str(error).lower()
        why = "it holds more than tensors" if unsafe else reason(error)
        raise InputError(f"{path}: cannot be read as weights ({why}); expected a state dict of {of}") from error
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    tensors = named and all(isinstance(one, Tensor) for one in state.values())
    if not tensors or any(one.layout != torch.strided or one.is_meta or one.is_quantized for one in state.values()):
        raise InputError(f"{path}: holds something else than named dense tensors; expected a state dict of {of}")
    return dict(state)


def check_weights(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuses tensors that have a name of the network's, but are no weights: NaN, infinite or what `check_types`
    refuses.
    """
    try:
        check_types(network, state)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    check_finite({name: state[name] for name in network.state_dict() if name in state}, path)


def check_types(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`ValueError` where a tensor holds integer or complex numbers, and the network's of that name real ones."""
    for name, own in network.state_dict().items():
        value = state.get(name, own)
        if value.is_complex() or value.is_floating_point() != own.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{name} holds numbers of type {kind}; give the weights as floating-point numbers")


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuses tensors with NaN or infinite numbers."""
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {name} holds NaN or infinite numbers; download or train the weights again")


def load_weights(network: nn.Module, path: Path, name: str) -> None:
    """Loads a state dict into ``network``; `InputError` where it is missing, damaged or another network's."""
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; give the state dict of {_library(name)} with --weights")
    state = read_weights(path, name)
    own = network.state_dict()
    wrong = [key for key, value in own.items() if key not in state or getattr(state[key], "shape", None) != value.shape]
    if wrong:
        raise InputError(
            f"{path}: not the weights of {name} ({len(wrong)} of {len(own)} entries missing or of another shape, "
            f"such as {wrong[0]}); give the state dict of {_library(name)}"
        )
    check_weights(network, state, path)
    network.load_state_dict(state, strict=False)


def _library(name: str) -> str:
    return f"timm's {name.removeprefix('timm/')}" if name.startswith("timm/") else f"torchvision.models.{name}"


def torchvision_weights(name: str) -> dict[str, Tensor]:
    """torchvision's own ImageNet weights, downloaded once into torch's hub folder; by hash those that it published.

    Raises:
        InputError: they cannot be downloaded, or the file there is another one.
    """
    url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    published = torch.hub.HASH_REGEX.findall(path.name)[-1]
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), published)
    except (OSError, RuntimeError) as error:  # RuntimeError: of another hash
        raise InputError(
            f"ImageNet weights of {name} could not be downloaded ({reason(error)}); give a file with --weights"
        ) from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(published):
        raise InputError(f"{path}: not what torchvision published (wrong hash); delete it to download it again")
    return read_weights(path, f"torchvision.models.{name}")
