import errno
import io
import os
import resource
from pathlib import Path

import pytest
import torch

from labelpenet.data.files import write_bytes
from labelpenet.engine.checkpoint import (
    check_configuration,
    checkpoints,
    git_revision,
    load_checkpoint,
    plain,
    save_checkpoint,
    versions,
)
from labelpenet.errors import InputError


def state(step: int) -> dict:
    return {
        "step": step,
        "model": {"weight": torch.full((1000,), float(step))},
        "metrics": [{"step": step, "loss": 0.5}],
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_and_two_files_stay(tmp_path):
    for step in (5, 10, 15):
        save_checkpoint(tmp_path / "stage", step, state(step))
    assert names(tmp_path / "stage") == ["step-00000010.pt", "step-00000015.pt"]
    loaded, notes = load_checkpoint(tmp_path / "stage")
    assert notes == []
    assert loaded["step"] == 15 and loaded["metrics"] == state(15)["metrics"]
    assert torch.equal(loaded["model"]["weight"], state(15)["model"]["weight"])


def test_no_checkpoint_is_no_error(tmp_path):
    assert load_checkpoint(tmp_path / "nothing") == (None, [])


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, state(step))
    assert load_checkpoint(tmp_path)[0]["step"] == 100_000_000


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"\x00\x00\x70\x41" * 4) + 2] ^= 1  # within the weights, 15.0 each: still a readable archive
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty])
def test_a_damaged_file_is_passed_over_and_named(tmp_path, damage):
    for step in (10, 15):
        save_checkpoint(tmp_path, step, state(step))
    damage(tmp_path / "step-00000015.pt")
    loaded, notes = load_checkpoint(tmp_path)
    assert loaded["step"] == 10
    assert len(notes) == 1 and "step-00000015.pt is damaged" in notes[0] and "\n" not in notes[0]
    # Training goes on from 10: what it saves displaces the damaged file, not the good one.
    save_checkpoint(tmp_path, 12, state(12))
    assert names(tmp_path) == ["step-00000010.pt", "step-00000012.pt"]


def test_nothing_but_damaged_files_is_an_error(tmp_path):
    for step in (10, 15):
        save_checkpoint(tmp_path, step, state(step))
        truncate(tmp_path / f"step-{step:08d}.pt")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        load_checkpoint(tmp_path)


def test_only_plain_content_is_loaded(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})
    torch.save({"step": 2, "path": Path("x")}, tmp_path / "step-00000002.pt")
    loaded, notes = load_checkpoint(tmp_path)
    assert loaded == {"step": 1} and "step-00000002.pt" in notes[0]


def test_a_write_that_breaks_off_leaves_the_earlier_file_and_no_other(tmp_path):
    """A real failure in the middle of torch.save: the system refuses to let a file grow beyond 64 KiB."""
    save_checkpoint(tmp_path, 1, state(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(InputError, match=r"step-00000002\.pt: cannot be written .*--resume") as caught:
            save_checkpoint(tmp_path, 2, {"weight": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001.pt"]
    assert load_checkpoint(tmp_path)[0]["step"] == 1


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_checkpoint(tmp_path, 1, state(1))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_checkpoint(tmp_path, 2, state(2))
    assert names(tmp_path) == ["step-00000001.pt"]


def test_an_interruption_in_the_middle_of_a_write_stays_one(tmp_path):
    """A second Ctrl-C comes while torch.save writes, which answers with an error of its own."""

    class Interrupted(io.BytesIO):
        def write(self, content):
            if self.tell() > 1000:
                raise KeyboardInterrupt
            return super().write(content)

    save_checkpoint(tmp_path, 1, state(1))
    with pytest.raises(KeyboardInterrupt):
        write_bytes(
            tmp_path / "step-00000002.pt", lambda file: torch.save({"weight": torch.zeros(20_000)}, Interrupted())
        )
    assert names(tmp_path) == ["step-00000001.pt"]


def test_an_error_of_the_program_is_not_blamed_on_the_disk(tmp_path):
    with pytest.raises((TypeError, AttributeError)):
        save_checkpoint(tmp_path, 2, {"loss": lambda: 0})
    assert names(tmp_path) == []


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / "step-00000007.pt.tmp").write_bytes(b"half")
    assert checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, 8, state(8))
    assert names(tmp_path) == ["step-00000008.pt"]


def test_a_changed_configuration_names_the_keys(tmp_path):
    saved = {"run": {"size": (480, 576), "until": 4, "data": Path("voc")}, "seed": 0}
    check_configuration(saved, {"seed": 0, "run": {"size": [480, 576], "until": 4, "data": "voc"}}, tmp_path)
    changed = {"run": {"size": (480,), "until": 4, "data": Path("voc"), "beta": 0.5}, "seed": 1}
    with pytest.raises(InputError) as caught:
        check_configuration(saved, changed, tmp_path)
    message = str(caught.value)
    assert "run.size was [480, 576], is [480]" in message
    assert "run.beta was not set, is 0.5" in message
    assert "seed was 0, is 1" in message
    assert "until" not in message and "\n" not in message


def test_a_key_that_is_none_differs_from_no_key(tmp_path):
    with pytest.raises(InputError, match="ema"):
        check_configuration({"ema": None}, {}, tmp_path)


def test_plain_is_what_json_holds():
    assert plain({"a": (1, 2), "b": {"c": Path("x/y")}}) == {"a": [1, 2], "b": {"c": str(Path("x/y"))}}


def test_versions_and_revision():
    assert versions()["torch"] == str(torch.__version__).split("+")[0] or versions()["torch"] == torch.__version__
    revision = git_revision()
    assert revision is None or len(revision.removesuffix("-dirty")) >= 7
