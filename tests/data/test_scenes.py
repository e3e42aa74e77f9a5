"""Generated scenes: seeded, exact, of moderate difficulty, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from labelpenet import InputError
from labelpenet.data import read_image, write_scenes
from labelpenet.data import scenes as module
from labelpenet.data.files import unfinished
from labelpenet.data.scenes import CLASSES, render_scene
from labelpenet.formats import open_annotated, open_tagged
from labelpenet.instances import masks_to_boxes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_seed_gives_the_same_files_whatever_their_number(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", 3, 2, (64, 80), seed=5)
    write_scenes(tmp_path / "b", 3, 2, (64, 80), seed=5)
    write_scenes(tmp_path / "c", 4, 2, (64, 80), seed=5)
    write_scenes(tmp_path / "d", 3, 2, (64, 80), seed=6)
    a, c, d = contents(tmp_path / "a"), contents(tmp_path / "c"), contents(tmp_path / "d")
    assert a == contents(tmp_path / "b")
    image = "VOCdevkit/VOC2012/JPEGImages/train_00002.jpg"
    assert a[image] == c[image]
    assert a[image] != d[image]


def test_the_road_of_real_data(tmp_path: Path) -> None:
    year = write_scenes(tmp_path / "scenes", 12, 3)
    assert [len(open_tagged(year, split).images) for split in ("train", "val")] == [12, 3]
    annotated = open_annotated(tmp_path / "scenes", "train", CLASSES)
    for image, truth in zip(annotated.tagged.images, annotated.truths().values(), strict=True):
        assert truth.instances.masks is not None
        assert 1 <= len(truth.instances) <= 4
        assert set(truth.instances.labels.tolist()) == set(image.tags)
        assert torch.equal(masks_to_boxes(truth.instances.masks), truth.instances.boxes)
        assert not (truth.instances.masks.sum(0) > 1).any()
        painted = torch.zeros(160, 160, dtype=torch.long)
        for mask, label in zip(truth.instances.masks, truth.instances.labels, strict=True):
            painted[mask] = label + 1
        assert np.array_equal(painted.numpy(), truth.semantic)  # type: ignore[arg-type]
        assert read_image(image.path).shape == (160, 160, 3)


def test_objects_are_large_enough_to_learn_and_of_every_class() -> None:
    drawn = [render_scene(np.random.default_rng(seed)) for seed in range(40)]
    shares = np.concatenate([np.bincount(one.instances.ravel(), minlength=1)[1:] / 25600 for one in drawn])
    assert shares.min() > 0.015
    assert shares.max() < 0.45
    assert 0.06 < np.median(shares) < 0.2
    assert {label for one in drawn for label in one.labels} == set(range(len(CLASSES)))
    assert {len(one.labels) for one in drawn} >= {1, 2, 3}


def test_some_scenes_overlap_and_some_classes_stand_twice() -> None:
    drawn = [render_scene(np.random.default_rng(seed), objects=3) for seed in range(25)]
    assert any(len(set(one.labels)) < len(one.labels) for one in drawn)
    touching = 0
    for one in drawn:
        left, right = one.instances[:, :-1], one.instances[:, 1:]
        touching += bool(((left != right) & (left > 0) & (right > 0)).any())
    assert touching >= 3


def test_a_plain_colour_and_texture_rule_finds_objects_but_not_all() -> None:
    """Saturated colour tells objects from most of the ground: learnable, but no solution."""
    hits, false = [], []
    for seed in range(20):
        one = render_scene(np.random.default_rng(seed))
        pixels = one.image.astype(int)
        saturated = np.ptp(pixels, axis=2) > 90
        hits.append(saturated[one.instances > 0].mean())
        false.append(saturated[one.instances == 0].mean())
    assert np.mean(hits) > 2 * np.mean(false)
    assert np.mean(hits) < 0.95


def test_the_same_scenes_are_not_written_twice_and_others_not_over_them(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    write_scenes(out, 2, 1, (64, 64))
    stamp = (out / "scenes.json").stat().st_mtime_ns
    write_scenes(out, 2, 1, (64, 64))
    assert (out / "scenes.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="already holds something else"):
        write_scenes(out, 3, 1, (64, 64))
    (tmp_path / "empty").mkdir()
    write_scenes(tmp_path / "empty", 1, 0, (64, 64))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="already holds"):
        write_scenes(tmp_path / "file", 1, 0, (64, 64))


def test_nothing_is_left_of_a_run_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_annotation", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        write_scenes(tmp_path / "scenes", 2, 1, (64, 64))
    monkeypatch.setattr(module, "_annotation", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", 2, 1, (64, 64))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    left = unfinished(tmp_path / "scenes")
    (left / "VOCdevkit").mkdir(parents=True)
    (left / "scenes.json").write_text("half")
    year = write_scenes(tmp_path / "scenes", train=1, val=0, size=(48, 48))
    assert len(list((year / "JPEGImages").iterdir())) == 1 and [one.name for one in tmp_path.iterdir()] == ["scenes"]


@pytest.mark.parametrize(
    "arguments", [(0, 1, (64, 64), 0), (1, -1, (64, 64), 0), (1, 1, (20, 64), 0), (1, 1, (64, 64), -1)]
)
def test_settings_that_make_no_scenes(tmp_path: Path, arguments: tuple) -> None:
    with pytest.raises(InputError, match="scenes need"):
        write_scenes(tmp_path / "x", *arguments)
    assert not (tmp_path / "x").exists()
