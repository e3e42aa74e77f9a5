"""Proposals: what is found, that it is the same each time, the cache under every mishap, and the recall measure."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from labelpenet.config import Proposals as Settings
from labelpenet.data import proposals as module
from labelpenet.data.dataset import TaggedImage
from labelpenet.data.proposals import (
    compute_proposals,
    propose,
)
from labelpenet.errors import InputError
from labelpenet.evaluation import box_iou
from labelpenet.evaluation.recall import recall

REPOSITORY = Path(__file__).parents[2]
METHODS = ("selective-search-fast", "selective-search-quality", "edge-boxes")
QUICK = Settings(side=80)
OBJECTS = np.array([[10, 12, 50, 48], [64, 30, 88, 74]])


def scene(seed: int = 0, height: int = 80, width: int = 100) -> np.ndarray:
    """(H, W, 3) uint8: two evenly coloured rectangles (`OBJECTS`) on grey, under a little noise."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 120.0)
    for (x1, y1, x2, y2), colour in zip(OBJECTS, [(220, 40, 40), (30, 60, 220)], strict=True):
        image[y1:y2, x1:x2] = colour
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def photographs(folder: Path, number: int) -> list[TaggedImage]:
    folder.mkdir(exist_ok=True)
    images = []
    for i in range(number):
        path = folder / f"{i:03}.png"
        Image.fromarray(scene(i)).save(path)
        images.append(TaggedImage(path.stem, path, ()))
    return images


def same(first: module.Proposals, second: module.Proposals) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[name], second[name]) for name in first)


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.npy"))


# --- One image ---


@pytest.mark.parametrize("method", METHODS)
def test_boxes_are_valid_and_cover_the_objects(method: str) -> None:
    image = scene()
    boxes = propose(image, Settings(method, side=None))
    assert boxes.dtype == np.float32 and boxes.shape[1] == 4
    assert (boxes >= 0).all() and (boxes <= [100, 80, 100, 80]).all()
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 0.02 * 100
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    assert box_iou(boxes, OBJECTS).max(0).min() > (0.7 if method == "edge-boxes" else 0.8)


def test_selective_search_gives_the_exact_half_open_rectangle_of_a_region() -> None:
    image = np.full((80, 100, 3), 120, np.uint8)
    x1, y1, x2, y2 = OBJECTS[0]
    image[y1:y2, x1:x2] = (220, 40, 40)
    smooth = Settings(side=None)
    best = box_iou(propose(image, smooth), OBJECTS[:1]).max()
    assert best > 0.9  # its segmentation blurs the edges a little
    assert any(np.array_equal(box, [0, 0, 100, 80]) for box in propose(image, smooth))


@pytest.mark.parametrize("method", METHODS)
def test_the_result_does_not_depend_on_what_the_process_did_before(method: str) -> None:
    image = scene(3)
    chosen = replace(QUICK, method=method)
    first = propose(image, chosen)
    libc = ctypes.CDLL(None)
    for seed in (1, 12345):
        libc.srand(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        cv2.setRNGSeed(seed)
        assert np.array_equal(propose(image, chosen), first)


def test_edge_boxes_reach_all_four_borders() -> None:
    # OpenCV's own corners run from 1 to the last column: a pixel is missing on two sides
    image = np.random.default_rng(0).integers(0, 255, (10, 12, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    boxes = propose(image, Settings("edge-boxes", side=None))
    assert (*boxes.min(0)[:2], *boxes.max(0)[2:]) == (0, 0, 120, 100)


def test_boxes_scale_with_the_photograph() -> None:
    image = scene(1)
    small = propose(image, Settings(side=100))
    large = propose(image.repeat(4, 0).repeat(4, 1), Settings(side=100))
    np.testing.assert_allclose(large, 4 * small, rtol=1e-6)


def test_only_the_first_are_kept_and_the_thin_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    image = scene(2)
    monkeypatch.setattr(module, "MIN_SIZE", 0.0)
    everything = propose(image, QUICK)
    monkeypatch.setattr(module, "MOST", 5)
    assert np.array_equal(propose(image, QUICK), everything[:5])
    monkeypatch.undo()
    monkeypatch.setattr(module, "MIN_SIZE", 0.3)
    sides = (everything[:, 2:] - everything[:, :2]).min(1)
    assert np.array_equal(propose(image, QUICK), everything[sides >= 30])


def test_the_first_boxes_are_spread_over_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_SIZE", 0.0)
    image = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    boxes = propose(image, Settings(side=None))
    overlap = box_iou(boxes, boxes)
    clear = [bool((overlap[i, :i] <= 0.8).all()) for i in range(len(boxes))]
    first_repeated = clear.index(False) if False in clear else len(boxes)
    assert not any(clear[first_repeated:])  # all that repeat an earlier box come after all that do not


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (1, 500), (700, 2), (9, 9), (40, 30)])
def test_tiny_flat_and_narrow_images_have_their_whole_area_at_least(method: str, shape: tuple[int, int]) -> None:
    height, width = shape
    for image in (np.full((*shape, 3), 7, np.uint8), np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)):
        boxes = propose(image, replace(QUICK, method=method))
        assert 1 <= len(boxes) <= module.MOST
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes <= [width, height, width, height]).all()
    flat = propose(np.full((*shape, 3), 7, np.uint8), replace(QUICK, method=method))
    assert [0, 0, width, height] in flat.tolist()


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_what_is_no_image_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\) uint8"):
        propose(wrong, QUICK)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="known are selective-search-fast, selective-search-quality, edge-boxes"):
        propose(scene(), Settings("fast"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="side must be from 16"):
        Settings(side=4)
    with pytest.raises(InputError, match="only for the method edge-boxes"):
        propose(scene(), QUICK, tmp_path)
    with pytest.raises(InputError, match="no such structured-edge model"):
        compute_proposals([], Settings("edge-boxes"), tmp_path, model=tmp_path / "model.yml.gz")
    model = tmp_path / "model.yml.gz"
    model.write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"model\.yml\.gz"):
        propose(scene(), Settings("edge-boxes"), model)


def test_thinning_keeps_ridges_as_a_loop_over_pixels_does() -> None:
    rng = np.random.default_rng(0)
    magnitude = rng.random((13, 17)).astype(np.float32)
    angle = (rng.random((13, 17)) * np.pi).astype(np.float32)
    expected = np.zeros_like(magnitude)
    for y in range(13):
        for x in range(17):
            dx, dy = [(1, 0), (1, 1), (0, 1), (-1, 1)][int(np.round(angle[y, x] / (np.pi / 4))) % 4]
            neighbours = [(x + dx, y + dy), (x - dx, y - dy)]
            values = [magnitude[v, u] for u, v in neighbours if 0 <= u < 17 and 0 <= v < 13]
            if all(magnitude[y, x] >= value for value in values):
                expected[y, x] = magnitude[y, x]
    assert np.array_equal(module._thin(magnitude, angle), expected)


# --- Many images ---


def test_processes_and_cache_give_what_propose_gives(tmp_path: Path) -> None:
    images = photographs(tmp_path / "images", 5)
    alone = compute_proposals(images, QUICK, tmp_path / "one", workers=1)
    several = compute_proposals(images, QUICK, tmp_path / "two", workers=2, progress=True)
    assert same(alone, several) and same(alone, compute_proposals(images, QUICK, tmp_path / "two", workers=2))
    for i, image in enumerate(images):
        assert np.array_equal(alone[image.id], propose(scene(i), QUICK))
    assert alone.notes == () and len(alone) == 5 and "000" in alone and "none" not in alone


def test_only_what_is_new_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        module, "propose", lambda image, chosen, model: calls.append("") or propose(image, chosen, model)
    )
    images, cache = photographs(tmp_path / "images", 3), tmp_path / "cache"

    def count(chosen: Settings = QUICK) -> int:
        calls.clear()
        compute_proposals(images, chosen, cache, workers=1)
        return len(calls)

    assert (count(), count()) == (3, 0)
    assert (count(replace(QUICK, side=70)), count(replace(QUICK, side=70)), count()) == (3, 0, 0)
    images[1].path.rename(tmp_path / "images" / "moved.png")  # the content counts, not the name
    images[1] = replace(images[1], path=tmp_path / "images" / "moved.png")
    assert count() == 0
    Image.fromarray(scene(99)).save(images[0].path)
    assert count() == 1


def test_a_damaged_cache_file_is_computed_again_and_named_when_read(tmp_path: Path) -> None:
    images, cache = photographs(tmp_path / "images", 2), tmp_path / "cache"
    before = compute_proposals(images, QUICK, cache, workers=1)
    expected = {name: before[name] for name in before}
    files(cache)[0].write_bytes(b"\x93NUMPY half")
    with pytest.raises(InputError, match=r"\.npy.*damaged or gone"):
        [before[name] for name in before]
    after = compute_proposals(images, QUICK, cache, workers=1)
    assert all(np.array_equal(after[name], expected[name]) for name in expected)


def test_alike_files_are_computed_once(tmp_path: Path) -> None:
    images = photographs(tmp_path / "images", 1)
    twin = tmp_path / "images" / "twin.png"
    twin.write_bytes(images[0].path.read_bytes())
    found = compute_proposals([*images, TaggedImage("twin", twin, ())], QUICK, tmp_path / "cache", workers=1)
    assert np.array_equal(found["000"], found["twin"]) and len(files(tmp_path / "cache")) == 1


def test_bad_images_are_skipped_named_and_counted(tmp_path: Path) -> None:
    images = photographs(tmp_path / "images", 2)
    whole = images[0].path.read_bytes()
    for name, content in (
        ("cut.png", whole[: len(whole) // 2]),
        ("cut-twin.png", whole[: len(whole) // 2]),
        ("no.jpg", b"x"),
    ):
        (tmp_path / "images" / name).write_bytes(content)
    bad = [TaggedImage(n, tmp_path / "images" / n, ()) for n in ("cut.png", "cut-twin.png", "no.jpg", "missing.jpg")]
    found = compute_proposals([bad[0], images[0], *bad[1:], images[1]], QUICK, tmp_path / "cache", workers=1)
    assert list(found) == ["000", "001"] and len(files(tmp_path / "cache")) == 2
    assert found.notes[-1].startswith("4 ") and len(found.notes) == 5
    for name in ("cut.png", "no.jpg", "missing.jpg"):
        assert any(name in note for note in found.notes)
    assert not any("\n" in note for note in found.notes)


def test_no_images_at_all(tmp_path: Path) -> None:
    found = compute_proposals([], QUICK, tmp_path / "cache", workers=2, progress=True)
    assert len(found) == 0 and found.notes == ()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*the proposal cache"):
        compute_proposals(photographs(tmp_path / "images", 1), QUICK, occupied, workers=1)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, cache = photographs(tmp_path / "images", 1), tmp_path / "cache"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    compute_proposals([], QUICK, cache, workers=1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device.*free some space"):
        compute_proposals(images, QUICK, cache, workers=1)
    assert not files(cache) and not list(cache.rglob("*.tmp"))
    monkeypatch.undo()
    assert len(compute_proposals(images, QUICK, cache, workers=1)["000"]) > 1


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    images, cache = photographs(tmp_path / "images", 1), tmp_path / "cache"
    compute_proposals(images, QUICK, cache, workers=1)
    (path,) = files(cache)
    path.rename(path.with_name(path.name + ".tmp"))
    compute_proposals(images, QUICK, cache, workers=1)
    assert files(cache) == [path] and not list(cache.rglob("*.tmp"))


def test_a_complete_cache_may_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, cache = photographs(tmp_path / "images", 2), tmp_path / "cache"
    before = compute_proposals(images, QUICK, cache, workers=1)

    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    assert same(compute_proposals(images, QUICK, cache, workers=1), before)


@pytest.mark.parametrize("where", [0, 70, 200, -1])
def test_a_flipped_bit_is_found_and_told(tmp_path: Path, where: int) -> None:
    images, cache = photographs(tmp_path / "images", 1), tmp_path / "cache"
    before = compute_proposals(images, QUICK, cache, workers=1)["000"]
    (path,) = files(cache)
    content = bytearray(path.read_bytes())
    content[where] ^= 4
    path.write_bytes(content)
    after = compute_proposals(images, QUICK, cache, workers=1)
    assert np.array_equal(after["000"], before) and any(f"{path} was damaged" in note for note in after.notes)


RUN = """
import multiprocessing, os, signal, sys, threading, time
from pathlib import Path
from labelpenet.data import proposals
from labelpenet.data.dataset import TaggedImage
from labelpenet.config import Proposals
from labelpenet.errors import InputError

folder, cache, workers, propose = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), proposals.propose

def held_up(*arguments):  # half-way, so that no machine is too fast and no test too slow
    while len(list(cache.rglob("*.npy"))) > 9:
        time.sleep(0.01)
    return propose(*arguments)

def kill_a_worker():
    while not list(cache.rglob("*.npy")):
        time.sleep(0.01)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

proposals.propose = held_up
if __name__ == "__mp_main__" and "interrupt" in sys.argv:  # a worker that has hardly begun
    folder.with_name("interrupted").touch()
    os.killpg(os.getpgrp(), signal.SIGINT)
if __name__ == "__main__":
    if "kill" in sys.argv:
        threading.Thread(target=kill_a_worker, daemon=True).start()
    images = [TaggedImage(path.stem, path, ()) for path in sorted(folder.glob("*.png"))]
    try:
        proposals.compute_proposals(images, Proposals(side=80), cache, workers)
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        sys.exit(f"InputError: {error}")
"""
PATIENCE = 300  # seconds until a test takes a process for stuck


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process, in a group of its own, that computes the proposals of a folder and is held up after ten."""
    processes: list[subprocess.Popen] = []

    def start(folder: Path, cache: Path, *arguments: str) -> subprocess.Popen:
        script = tmp_path / "run.py"
        script.write_text(RUN)
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(cache), *arguments],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # a background shell ignores it for its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:  # where a test has failed
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_files(process: subprocess.Popen, cache: Path, number: int) -> None:
    while len(files(cache)) < number:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def ends(group: int) -> bool:
    """Whether every process of the group goes."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("name", "workers"), [("SIGINT", "2"), ("SIGKILL", "1")])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, start, name: str, workers: str) -> None:
    number, cache = 60, tmp_path / "cache"
    images = photographs(tmp_path / "images", number)
    process = start(tmp_path / "images", cache, workers)
    wait_for_files(process, cache, 3)
    os.killpg(process.pid, getattr(signal, name))  # the whole group, as Ctrl-C in a terminal does
    output, errors = process.communicate(timeout=PATIENCE)
    done = files(cache)
    assert 3 <= len(done) < number and all(module._load(path) is not None for path in done)
    if name == "SIGINT":
        assert (process.returncode, output, errors) == (130, "", "")
        assert not list(cache.rglob("*.tmp"))
    assert ends(process.pid)
    times = {path: path.stat().st_mtime_ns for path in done}
    resumed = compute_proposals(images, QUICK, cache, workers=1)
    assert times == {path: path.stat().st_mtime_ns for path in done}
    assert same(resumed, compute_proposals(images, QUICK, tmp_path / "fresh", workers=1))


def test_an_interruption_while_workers_start_is_silent(tmp_path: Path, start) -> None:
    photographs(tmp_path / "images", 40)
    process = start(tmp_path / "images", tmp_path / "cache", "2", "interrupt")
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output, errors) == (130, "", "")
    assert (tmp_path / "interrupted").exists() and ends(process.pid)


def test_an_interruption_waits_until_a_process_is_known(request: pytest.FixtureRequest) -> None:
    """Also one that another thread takes, as it may where the main one blocks it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell lets its children ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    go, taken, known = threading.Event(), threading.Event(), False

    def take() -> None:
        go.wait()
        signal.raise_signal(signal.SIGINT)
        taken.set()

    other = threading.Thread(target=take)
    other.start()
    with pytest.raises(KeyboardInterrupt), module._starting():
        go.set()
        taken.wait()
        other.join()
        known = True
    assert known and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_workers_do_not_outlive_a_main_process_that_is_killed(tmp_path: Path, start, name: str) -> None:
    cache = tmp_path / "cache"
    photographs(tmp_path / "images", 60)
    process = start(tmp_path / "images", cache, "2")
    wait_for_files(process, cache, 1)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=PATIENCE)
    assert ends(process.pid)
    assert all(module._load(path) is not None for path in files(cache))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a signal to the main process alone", "a worker that is killed"])
def test_workers_end_with_the_run(tmp_path: Path, start, how: str) -> None:
    cache = tmp_path / "cache"
    photographs(tmp_path / "images", 60)
    process = start(tmp_path / "images", cache, "2", *(["kill"] if "killed" in how else []))
    if "signal" in how:
        wait_for_files(process, cache, 1)
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    if "signal" in how:
        assert (process.returncode, errors) == (130, "")
    else:
        assert process.returncode == 1 and errors.startswith("InputError: a process that computes proposals died")
        assert "Traceback" not in errors
    assert ends(process.pid)
    assert all(module._load(path) is not None for path in files(cache))


# --- Photographs ---

PHOTOGRAPHS = REPOSITORY.parent / "shared/data/voc-animals/VOCdevkit/VOC2012"


@pytest.mark.photographs
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not here")
def test_the_default_covers_nearly_all_animals(tmp_path: Path) -> None:
    from labelpenet.formats import open_annotated

    annotated = open_annotated(PHOTOGRAPHS, "val", ["cat", "cow", "dog", "horse", "person", "sheep"])
    images = annotated.tagged.images[::30]
    found = compute_proposals(images, Settings(side=250), tmp_path, workers=1)
    row = recall(found, {image.id: annotated.read(image.id) for image in images}, annotated.tagged.classes)["rows"][-1]
    assert row["recall@0.5"] >= 0.85 and row["ABO"] >= 0.7
