"""Files are there whole or as they were, and no single damaged bit and no cut passes for content."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labelpenet.data import files
from labelpenet.data.files import (
    check_outputs,
    is_whole,
    locked,
    read_array,
    read_json,
    read_tensors,
    sealed,
    whole_folder,
    write_array,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)
from labelpenet.errors import InputError

ARRAY = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
TENSORS = {"w": torch.linspace(0, 1, 6).view(2, 3), "n": torch.tensor(3), "e": torch.zeros(0, 2)} | {
    "h": torch.ones(3).bfloat16()
}
JSON = {"a": [1, "x", None], "n": {"v": 0.25}}


def same_tensors(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        found[name].dtype == one.dtype and torch.equal(found[name], one) for name, one in TENSORS.items()
    )


KINDS: dict[str, tuple[Callable, Callable, Any, Callable]] = {
    "npy": (write_array, read_array, ARRAY, lambda one: one.dtype == ARRAY.dtype and np.array_equal(one, ARRAY)),
    "safetensors": (write_tensors, read_tensors, TENSORS, same_tensors),
    "json": (write_json, read_json, JSON, lambda one: {name: one.get(name) for name in JSON} == JSON),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_bit_and_no_cut_is_taken_for_content(tmp_path: Path, kind: str) -> None:
    write, read, content, same = KINDS[kind]
    path = write(tmp_path / f"a.{kind}", content)
    assert same(read(path))
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))]
    for place in range(8 * len(whole)):
        one = bytearray(whole)
        one[place // 8] ^= 1 << place % 8
        damaged.append(bytes(one))
    refused = 0
    for one in damaged:
        path.write_bytes(one)
        try:
            found = read(path)
        except ValueError as error:  # InputError is one
            assert "\n" not in str(error)
            found = None
        refused += found is None
        assert found is None or same(found)
    assert refused > 0.9 * len(damaged) - 8 * 24  # a broken checksum entry alone is no harm


def test_numpy_reads_our_arrays_and_we_read_those_of_numpy(tmp_path: Path) -> None:
    assert np.array_equal(np.load(write_array(tmp_path / "a.npy", ARRAY)), ARRAY)
    np.save(tmp_path / "b.npy", ARRAY)
    assert np.array_equal(read_array(tmp_path / "b.npy"), ARRAY)
    np.save(tmp_path / "c.npy", np.array([object()]), allow_pickle=True)
    assert read_array(tmp_path / "c.npy") is None and read_array(tmp_path / "no.npy") is None


def test_lines_are_sealed_too() -> None:
    line = sealed('{"id": "é", "rows": []}')
    assert is_whole(line) and not is_whole(line.replace("é", "e")) and is_whole('{"id": 1}')


@pytest.mark.parametrize("size", [5, 500_000])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch, size: int) -> None:
    path = write_text(tmp_path / "a.txt", "old")
    if size > 100:  # a real failure: the system lets no file grow beyond 64 KiB
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    else:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    try:
        with pytest.raises(InputError, match=r"a\.txt: cannot be written \((No space|File too large).*; make room"):
            write_bytes(path, b"n" * size)
    finally:
        if size > 100:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("moment", ["fdopen", "fsync"])
def test_an_interruption_at_any_moment_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch, moment) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    path = write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_an_interruption_leaves_what_another_process_writes(tmp_path: Path, monkeypatch) -> None:
    theirs, lock = tmp_path / "a.txt.tmp", files._lock

    def interrupted(file, wait: bool) -> bool:
        if wait:
            raise KeyboardInterrupt
        return lock(file, wait)

    with locked(theirs) as alone:
        monkeypatch.setattr(files, "_lock", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_text(tmp_path / "a.txt", "new")
        assert alone and theirs.exists()


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.txt.tmp").write_text("half of a long text")
    assert write_text(tmp_path / "a.txt", "new").read_text() == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    texts = [str(number) * 100_000 for number in range(10)]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "a.txt", text), texts * 4))
    assert (tmp_path / "a.txt").read_text() in texts and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_replaced_whole_or_not_at_all_and_can_be_replaced_again(tmp_path: Path, monkeypatch) -> None:
    """Interrupted at, and killed before, each single change of the file system in turn."""

    def fill(out: Path, text: str) -> None:
        with whole_folder(out, overwrite=True) as folder:
            for name in ("a", "sub/b", "sub/c", "z"):
                write_text(folder / name, text)

    def stopped(out: Path, at: int, how: type[BaseException]) -> bool:
        left = [at]

        def counted(change: Callable) -> Callable:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0 or (left[0] < 0 and how is SystemExit):  # the dead do not tidy up
                    raise how
                return change(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "rmdir", "mkdir", "replace"):
                patch.setattr(os, name, counted(getattr(os, name)))
            with contextlib.suppress(how):
                fill(out, "new")
        return left[0] <= 0

    for how in (KeyboardInterrupt, SystemExit):
        for at in itertools.count(1):
            out = tmp_path / f"{how.__name__}{at}" / "out"
            fill(out, "old")
            again = stopped(out, at, how)
            if how is KeyboardInterrupt:
                texts = {(out / name).read_text() for name in ("a", "sub/b", "sub/c", "z")}
                assert len(texts) == 1 and texts <= {"old", "new"}
            fill(out, "last")
            assert (out / "z").read_text() == "last" and list(out.parent.iterdir()) == [out]
            if not again:
                break
        assert at > 10


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    kept = write_text(tmp_path / "kept.txt", "kept")
    for name in ("a.txt", "b.txt.tmp"):
        (tmp_path / name).symlink_to(kept)
    write_text(tmp_path / "a.txt", "new")
    with pytest.raises(InputError, match=r"b\.txt: cannot be written"):
        write_text(tmp_path / "b.txt", "new")
    assert kept.read_text() == "kept"


def test_a_long_name_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    assert write_text(path, "x").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(name.encode())
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "a-link.jpg").symlink_to(folder / "a.jpg")
    (tmp_path / "a-hard.jpg").hardlink_to(folder / "a.jpg")
    return folder


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("target", "read"),
    [
        ("photos/a.jpg", "photos/a.jpg"),
        ("link/a.jpg", "photos/a.jpg"),
        ("photos/a.jpg", "link/a.jpg"),
        ("photos/../link/b.jpg", "photos"),
        ("photos/b.jpg", "link"),
        ("a-link.jpg", "photos/a.jpg"),
        ("a-hard.jpg", "photos/a.jpg"),
        ("photos/a.jpg", "a-link.jpg"),
        ("a-link.jpg", "a-link.jpg"),
    ],
)
def test_what_is_read_is_never_written_over(photos: Path, target: str, read: str, overwrite: bool) -> None:
    root = photos.parent
    with pytest.raises(InputError, match="choose another place"):
        check_outputs([root / "new.json", root / target], [root / read], overwrite)
    assert (photos / "a.jpg").read_bytes() == b"a.jpg"


def test_what_is_there_is_replaced_only_where_it_is_asked_for(photos: Path) -> None:
    other = photos.parent / "other.json"
    check_outputs([other, photos / "new.json"], [photos])
    other.write_text("{}")
    with pytest.raises(InputError, match="--overwrite"):
        check_outputs([other], [photos])
    check_outputs([other], [photos], overwrite=True)
    dangling = photos.parent / "dangling"
    dangling.symlink_to("nowhere")
    with pytest.raises(InputError, match="--overwrite"):
        check_outputs([dangling], [photos])
    assert other.read_text() == "{}"


@pytest.mark.parametrize(
    "target",
    ["photos", "photos/a.jpg/x.json", "x\0.json", "y" * 300, "/dev/null", "/proc/x.json", "pipe", "/proc/new/x.json"],
)
def test_what_cannot_be_written_is_found_before_any_work(photos: Path, target: str) -> None:
    os.mkfifo(photos.parent / "pipe")
    with pytest.raises(InputError):
        check_outputs([photos.parent / target], [], overwrite=True)
    assert sorted(path.name for path in photos.iterdir()) == ["a.jpg", "b.jpg"]


def test_a_folder_that_was_never_filled_leaves_no_folders_above_it(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="no"), whole_folder(tmp_path / "there/new/deep/out"):
        raise InputError("no")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with whole_folder(tmp_path / "there/new/deep/out") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "there/new/deep/out/a").is_file()
