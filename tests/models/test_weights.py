"""Weights that others made: none of them runs code, and what is no weight is refused in one line."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from labelpenet.errors import InputError
from labelpenet.models import weights
from labelpenet.models.build import build_backbone
from labelpenet.models.weights import load_weights, torchvision_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_weights(network(), path, "mobilenet_v2")
    line = str(caught.value)
    assert str(path) in line and "\n" not in line and "weights_only=False" not in line
    return line


STATE = network().state_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.weight": torch.full((2, 1, 1, 1), float("nan"))}, "NaN"),
        ({"1.running_var": torch.tensor([1.0, float("inf")])}, "infinite"),
        ({"0.weight": torch.ones(2, 1, 1, 1, dtype=torch.int64)}, "type int64"),
        ({"0.weight": torch.ones(2, 1, 1, 1, dtype=torch.complex64)}, "type complex64"),
        ({"1.num_batches_tracked": torch.tensor(1.5)}, "type float32"),
        ({"0.weight": torch.ones(2, 1, 1, 1).to_sparse()}, "named dense tensors"),
        ({"0.weight": torch.ones(2, 1, 1, 1, device="meta")}, "named dense tensors|cannot be read"),
        ({0: torch.ones(1)}, "named dense tensors"),
        ({"0.weight": [1.0, 2.0]}, "named dense tensors"),
        ({"0.weight": Evil()}, "more than tensors"),
    ],
)
def test_what_is_no_weight_is_refused(tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    torch.save({**STATE, **change}, path)
    assert any(one in refusal(path) for one in words.split("|"))
    assert not Path("ran").exists()


def test_what_is_a_weight_is_taken(tmp_path):
    torch.save(
        {name: one.double() if one.is_floating_point() else one for name, one in STATE.items()}, tmp_path / "w.pt"
    )
    one = network()
    load_weights(one, tmp_path / "w.pt", "mobilenet_v2")
    assert all(torch.equal(one.state_dict()[name], value) for name, value in STATE.items())


class Published:
    """torchvision as far as it says where weights are, with a file in the hub folder instead of the network."""

    def __init__(self, monkeypatch, folder: Path, content: bytes, digest: str | None = None) -> None:
        digest = (digest or hashlib.sha256(content).hexdigest())[:8]
        self.path = folder / "checkpoints" / f"small-{digest}.pth"
        self.path.parent.mkdir()
        self.path.write_bytes(content)
        self.url = f"https://nowhere.invalid/{self.path.name}"
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
        monkeypatch.setattr(weights.torchvision.models, "get_model_weights", lambda name: {"IMAGENET1K_V1": self})


def test_published_weights_are_used_only_if_they_are_those_published(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    published = Published(monkeypatch, tmp_path, whole)
    assert all(torch.equal(value, STATE[name]) for name, value in torchvision_weights("small").items())
    for content in (whole[:-9], b"", whole.replace(b"weight", b"weighs", 1)):
        published.path.write_bytes(content)
        with pytest.raises(InputError, match=r"not what torchvision published .* delete it"):
            torchvision_weights("small")


def test_a_prepared_file_in_the_hub_folder_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(Evil())
    published = Published(monkeypatch, tmp_path, content, "0" * 64)
    with pytest.raises(InputError, match="not what torchvision published"):
        build_backbone("mobilenet_v2")
    published.path.rename(published.path.with_name(f"small-{hashlib.sha256(content).hexdigest()[:8]}.pth"))
    published.url = f"https://nowhere.invalid/small-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with pytest.raises(InputError, match="cannot be read as weights"):
        build_backbone("mobilenet_v2")
    assert not Path("ran").exists()


def test_weights_that_cannot_be_downloaded_are_one_line(tmp_path, monkeypatch):
    published = Published(monkeypatch, tmp_path, b"")
    published.path.unlink()

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(InputError, match=r"mobilenet_v2 could not be downloaded \(no network\).*--weights"):
        build_backbone("mobilenet_v2")
