"""Shards: whatever is killed, the merged result is that of one process, nothing twice, nothing missing."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from labelpenet.cli import main
from labelpenet.config import MODULES
from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.files import sealed
from labelpenet.data.scenes import render_scene
from labelpenet.errors import InputError
from labelpenet.formats import read_predictions
from labelpenet.formats.parts import Part, merge_parts, parse_shard, share
from labelpenet.formats.predictions import class_names
from labelpenet.instances import Instances, masks_to_boxes
from labelpenet.training.labels import read_labels
from labelpenet.training.shards import BatchPredictor
from tests.formats.kits import photograph
from tests.formats.test_reader_fuzz import ODD, deadline, mutated, paths_of
from tests.students import random_run

FACTS = {"weights": "w", "module": 4}
CLASSES = ("cat", "dog")


def photographs(count: int) -> list[TaggedImage]:
    return [TaggedImage(f"sub/{i}.jpg", Path(f"sub/{i}.jpg"), ()) for i in range(count)]


def found(index: int) -> Instances:
    masks = torch.zeros(index % 3, 12, 16, dtype=torch.bool)
    for k in range(len(masks)):
        masks[k, k : 6 + k, 2 : 9 + k] = True
    weights = torch.linspace(0.9, 0.3, len(masks))
    return Instances(masks_to_boxes(masks), torch.arange(len(masks)) % 2, weights, (12, 16), masks)


def write(folder: Path, images: list[TaggedImage], n: int, stop: int | None = None, bad: tuple[int, ...] = ()) -> None:
    """All shards, each left after ``stop`` photographs."""
    for i in range(1, n + 1):
        with Part(folder, (i, n), FACTS, images, CLASSES) as part:
            left = part.left()
            for image in left if stop is None else left[:stop]:
                index = images.index(image)
                part.add(image, None if index in bad else found(index))
            if stop is None:
                part.finish()


@pytest.mark.parametrize(("count", "n"), [(0, 3), (1, 1), (7, 3), (3, 7), (10, 5)])
def test_shards_in_order_are_the_list(count: int, n: int) -> None:
    images = photographs(count)
    assert [image for i in range(n) for image in share(images, (i + 1, n))] == images


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/4", "1/9999999"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="i/n"):
        parse_shard(text)
    assert parse_shard("3/100") == (3, 100)


def test_parts_go_on_where_they_stopped_and_merge_to_what_one_writes(tmp_path: Path) -> None:
    images = photographs(11)
    write(tmp_path / "one", images, 1, bad=(4,))
    counts = merge_parts([tmp_path / "one"], tmp_path / "one.json")
    assert counts == (10, sum(i % 3 for i in range(11) if i != 4))
    write(tmp_path / "many", images, 4, stop=1, bad=(4,))
    with pytest.raises(InputError, match="no part"):
        merge_parts([tmp_path / "many"], tmp_path / "many.json")
    for partial in (tmp_path / "many").glob("*.partial"):  # a line that was cut off by the kill
        partial.write_bytes(partial.read_bytes() + b'{"image": "sub/10.jpg", "num')
    write(tmp_path / "many", images, 4, bad=(4,))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "many").iterdir()}
    assert sorted(path.name for path in before) == [f"part-0000{i}-of-00004.jsonl" for i in range(1, 5)]
    write(tmp_path / "many", images, 4)  # finished: left alone
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "many").iterdir()} == before
    assert merge_parts([tmp_path / "many"], tmp_path / "many.json") == counts
    assert (tmp_path / "many.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_parts_that_do_not_belong_together_are_refused_by_name(tmp_path: Path) -> None:
    images = photographs(6)
    write(tmp_path / "a", images, 3)
    parts = sorted((tmp_path / "a").iterdir())
    out = tmp_path / "out.json"
    with pytest.raises(InputError, match="1 of 3 shards are missing"):
        merge_parts(parts[:2], out)
    write(tmp_path / "few", photographs(30), 30)
    with pytest.raises(InputError, match=r"22 of 30 shards are missing \(1, 2, .*, 20, \.\.\. \(22 in all\)\)"):
        merge_parts(sorted((tmp_path / "few").iterdir())[22:], out)
    with pytest.raises(InputError, match="suffix"):
        merge_parts(parts, tmp_path / "out.csv")
    with pytest.raises(InputError, match="give each once"):
        merge_parts([*parts, parts[1]], out)
    with (
        pytest.raises(InputError, match=r"\(module, weights changed\)"),
        Part(tmp_path / "a", (1, 3), {"module": 3}, images, CLASSES),
    ):
        pass
    other = tmp_path / "b" / parts[0].name
    with Part(other.parent, (1, 3), {"weights": "x", "module": 4}, images, CLASSES) as part:
        for image in part.left():
            part.add(image, found(1))
        part.finish()
    with pytest.raises(InputError, match="another prediction"):
        merge_parts([other, *parts[1:]], out)
    lines = parts[2].read_bytes().splitlines(keepends=True)
    parts[2].write_bytes(b"".join([*lines[:-1], lines[-1][:-9] + b"\n"]))
    with pytest.raises(InputError, match="line 3 is damaged"):
        merge_parts(parts, out)
    assert not out.exists()


@pytest.mark.parametrize("count", [60, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["damaged", "forged"])
def test_a_part_that_is_not_as_it_was_written_is_refused(tmp_path: Path, kind: str, count: int) -> None:
    """Any damage gives one line or no other result; rows of anybody's making, with a right checksum, no traceback."""
    images, rng = photographs(5), random.Random(kind)
    write(tmp_path / "parts", images, 2)
    merge_parts([tmp_path / "parts"], tmp_path / "out.json")
    whole = (tmp_path / "out.json").read_bytes()
    parts, refused = sorted((tmp_path / "parts").iterdir()), 0
    for _ in range(count):
        part = rng.choice(parts)
        good = part.read_bytes()
        if kind == "damaged":
            part.write_bytes(mutated(good, rng))
        else:
            lines = good.decode().splitlines()
            index = rng.randrange(len(lines))
            row = {key: value for key, value in json.loads(lines[index]).items() if key != "checksum"}
            *way, last = rng.choice(list(paths_of(row))[1:])
            home: Any = row
            for key in way:
                home = home[key]
            home[last] = rng.choice(ODD)
            lines[index] = sealed(json.dumps(row))
            part.write_text("\n".join(lines) + "\n")
        with deadline():
            try:
                merge_parts([tmp_path / "parts"], tmp_path / "out.json")
                assert kind == "forged" or (tmp_path / "out.json").read_bytes() == whole
            except InputError as error:
                refused += 1
                assert str(error).isprintable()
        part.write_bytes(good)
    assert refused > count / 2


@pytest.mark.parametrize("key", ["number", "image", "skipped"])
def test_an_odd_value_in_a_line_ends_in_no_traceback_and_loses_no_photograph(tmp_path: Path, key: str) -> None:
    """Also with a right checksum, and where the shard goes on behind it."""
    images = photographs(4)
    for value in (*ODD, False, 0, ""):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write(folder, images, 1)
        (part,) = folder.iterdir()
        rows = part.read_text().splitlines()
        row = {name: one for name, one in json.loads(rows[2]).items() if name != "checksum"}
        rows[2] = sealed(json.dumps({**row, key: value}))
        part.write_text("\n".join(rows) + "\n")
        try:
            assert merge_parts([folder], folder / "out.json")[0] == 4 - (key == "skipped" and value is True)
        except InputError as error:
            assert "line 3 is damaged" in str(error) and key != "skipped"
        write(folder, images, 1)  # the shard's command again


def test_a_finished_part_that_is_damaged_is_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = photographs(6)
    write(tmp_path, images, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, content in before.items():
        path.write_bytes(content[: len(content) * 2 // 3])
    write(tmp_path, images, 2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert all(f"{path} is damaged" in caplog.text for path in before)


def test_a_photograph_twice_in_a_part_is_refused_and_made_good(tmp_path: Path) -> None:
    images = photographs(4)
    write(tmp_path / "a", images, 1)
    path, out = tmp_path / "a" / "part-00001-of-00001.jsonl", tmp_path / "out.json"
    merge_parts([path], out)
    whole, lines = path.read_bytes(), path.read_bytes().splitlines(keepends=True)
    for copied in ([*lines[:2], lines[1], *lines[3:]], [*lines, lines[-1]]):
        path.write_bytes(b"".join(copied))
        with pytest.raises(InputError, match="damaged"):
            merge_parts([path], tmp_path / "again.json")
        write(tmp_path / "a", images, 1)
        assert path.read_bytes() == whole


def test_skipped_photographs_are_counted_again_and_said_in_merging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = photographs(5)
    write(tmp_path / "a", images, 1, bad=(1, 3))
    with Part(tmp_path / "a", (1, 1), FACTS, images, CLASSES) as part:
        assert part.skipped == {images[1].id, images[3].id} and part.before == 5
    with caplog.at_level("WARNING", "labelpenet"):
        assert merge_parts([tmp_path / "a"], tmp_path / "out.json")[0] == 3
    assert "2 photographs could not be read when they were predicted" in caplog.text


@pytest.mark.parametrize("kind", ["parts", "merged.parquet"])
def test_parts_and_parquet_are_read_like_the_json_that_they_merge_to(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("labelpenet.formats.parquet.ROWS_A_GROUP", 2)  # so that groups end within photographs
    images = [TaggedImage(f"sub/{i}.png", tmp_path / f"sub/{i}.png", (0, 2)) for i in range(9)]
    for image in images:
        photograph(image.path, (12, 16))
    parts, merged = tmp_path / "parts", tmp_path / "merged.json"
    write(parts, images, 3, bad=(4,))
    merge_parts([parts], merged)
    merge_parts([parts], tmp_path / "merged.parquet")
    asked, classes = images[::-2], ("dog", "bird", "cat")
    lazy, whole = (read_predictions(path, asked, classes, (1, 2, 3)) for path in (tmp_path / kind, merged))
    assert class_names(tmp_path / kind) == class_names(merged) == list(CLASSES)
    assert list(lazy) == list(whole) == [image.id for image in asked if image != images[4]]
    assert [note.split(": ")[1] for note in lazy.notes] == [note.split(": ")[1] for note in whole.notes]
    labels = [read_labels(tmp_path, [path], TaggedImages(classes, tuple(asked))) for path in (tmp_path / kind, merged)]
    assert [note.split(": ")[-1] for note in labels[0][1]] == [note.split(": ")[-1] for note in labels[1][1]]
    for name, one in [*whole.items(), *labels[1][0].items()]:
        for other in (lazy[name], labels[0][0][name]):
            assert torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)
            assert torch.equal(one.weights, other.weights) and one.image_size == other.image_size
            assert one.masks is None or torch.equal(one.masks, other.masks)
    photograph(images[8].path, (12, 17))
    with pytest.raises(InputError, match="12"):
        read_predictions(tmp_path / kind, asked, classes, (1, 2, 3))["sub/8.png"]


@pytest.mark.parametrize("merged", ["", ".json", ".parquet"])
def test_what_memory_holds_does_not_grow_with_what_was_found(tmp_path: Path, merged: str) -> None:
    pytest.importorskip("pyarrow.parquet")
    images, held = [TaggedImage(one.id, tmp_path / one.path, ()) for one in photographs(200)], list[int]()
    masks = torch.rand(40, 12, 16) > 0.5
    for image in images if merged else ():
        photograph(image.path, (12, 16))
    for count in (1, 40):
        folder = tmp_path / str(count)
        some = Instances(masks_to_boxes(masks), torch.zeros(40).long(), torch.ones(40), (12, 16), masks)[:count]
        with Part(folder, (1, 1), FACTS, images, CLASSES) as part:
            for image in images:
                part.add(image, some)
            part.finish()
        if merged:
            merge_parts([folder], folder.with_suffix(merged))
        tracemalloc.start()
        kept = read_predictions(folder.with_suffix(merged), images, CLASSES, (1, 2))
        gc.collect()  # what waits to be collected is not held
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(kept) == 200
    # Python's free lists move it by some 200 bytes a photograph, and of a merged file memory holds three numbers for
    # each instance; 39 instances more would be 17,000 bytes
    assert held[1] < held[0] + 200 * (2000 if merged else 400)


def test_one_part_has_one_writer(tmp_path: Path) -> None:
    images = photographs(2)
    with (
        Part(tmp_path, (1, 1), FACTS, images, CLASSES),
        pytest.raises(InputError, match="another process"),
        Part(tmp_path, (1, 1), FACTS, images, CLASSES),
    ):
        pass


def test_parquet_has_a_row_for_each_instance_and_one_where_nothing_was_found(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    images = photographs(7)
    write(tmp_path / "parts", images, 2)
    assert merge_parts([tmp_path / "parts"], tmp_path / "out.parquet") == (7, 6)
    every = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert list(dict.fromkeys(row["image"] for row in every)) == [image.id for image in images]
    rows = [row for row in every if row["category"] is not None]
    assert len(rows) == 6 and rows[0]["category"] == "cat" and rows[2]["category"] == "dog"
    assert (rows[0]["x"], rows[0]["y"], rows[0]["w"], rows[0]["h"]) == (2, 0, 7, 6)
    assert all(row["counts"] for row in rows)
    nothing = [row for row in every if row["category"] is None]
    assert [row["image"] for row in nothing] == [images[i].id for i in (0, 3, 6)]
    assert {row[key] for row in nothing for key in ("score", *"xywh", "counts")} == {None}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A Parquet file, with the photographs in ``sub`` beside it."""
    pytest.importorskip("pyarrow")
    images = [TaggedImage(f"{i}.png", tmp_path / f"sub/{i}.png", ()) for i in range(5)]
    for image in images:
        photograph(image.path, (12, 16))
    write(tmp_path / "parts", images, 1)
    merge_parts([tmp_path / "parts"], tmp_path / "found.parquet")
    return tmp_path / "found.parquet"


def refusal(merged: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `labelpenet export` says of the file; it must say a line, and write nothing."""
    out = merged.parent / "out"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(merged), str(merged.parent / "sub"), "--to", "coco-results", "--out", str(out)])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert stop.value.code == 2 and len(lines) == 1 and str(merged) in lines[0] and not out.exists()
    return lines[0]


ROW = 1  # of photograph 1, the only one; those of 2 are rows 2 and 3
FORGED = {
    "score": [None, float("nan"), float("inf")],
    "x": [None, float("nan"), 16.0, -1e9],
    "w": [None, -1.0, 1e300],
    "category": [None, "cow", ""],
    "counts": ["", "0", "nonsense", "\U0001f600"],
    "width": [0, -1, 2**31 - 1, 17],
    "height": [0, 13],
    "image": ["0.png", "2.png"],
    "file_name": ["2.png"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in FORGED.items() for value in values])
def test_a_forged_value_in_a_parquet_file_ends_in_one_line(
    merged: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(merged)
    rows = table.to_pylist()
    rows[ROW][key] = value
    pq.write_table(pa.Table.from_pylist(rows, table.schema), merged)
    assert refusal(merged, capsys).startswith(f"labelpenet: {merged}: ")


def test_a_parquet_file_of_another_make_ends_in_one_line(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good, table = merged.read_bytes(), pq.read_table(merged)
    for name in table.column_names:
        pq.write_table(table.drop([name]), merged)
        assert "other columns" in refusal(merged, capsys)
        number = table.column_names.index(name)
        pq.write_table(table.set_column(number, name, pa.array([True] * len(table))), merged)
        assert "other columns" in refusal(merged, capsys)
    pq.write_table(table.take([0, 1, 2, 4, 3, *range(5, len(table))]), merged)  # rows of 2.png in two places
    assert "2.png" in refusal(merged, capsys)
    pq.write_table(pa.concat_tables([table] * 300).combine_chunks(), merged)
    assert "groups" in refusal(merged, capsys)
    for made in (
        None,
        b"x",
        b"[]",
        b'{"classes": 3}',
        b'{"classes": [3]}',
        b'{"classes": ["cat", "cat"]}',
        b"[" * 10**5,
    ):
        pq.write_table(table.replace_schema_metadata(made and {"labelpenet": made}), merged)
        refusal(merged, capsys)
    for content in (b"", b"PAR1", good[:-9], good[: len(good) // 2], b'{"images": []}', bytes(1000)):
        merged.write_bytes(content)
        refusal(merged, capsys)
    merged.unlink()
    refusal(merged, capsys)
    merged.mkdir()
    refusal(merged, capsys)


def test_no_flipped_bit_of_a_parquet_file_changes_a_result_in_silence(merged: Path) -> None:
    images = [TaggedImage(f"{i}.png", merged.parent / f"sub/{i}.png", ()) for i in range(5)]

    def read() -> list[Any]:
        found = read_predictions(merged, images, CLASSES)
        return [(name, one.boxes.tolist(), one.labels.tolist(), one.weights.tolist()) for name, one in found.items()]

    good, whole = bytearray(merged.read_bytes()), read()
    refused = 0
    counts = [place for place, byte in enumerate(good) if byte == 2 * 6]  # the file has six rows
    for place in (*range(0, len(good), 7), *counts):
        good[place] ^= 8
        merged.write_bytes(good)
        with deadline():
            try:
                assert read() == whole
            except InputError as error:
                refused += 1
                assert str(error).isprintable()
        good[place] ^= 8
    assert refused > 50


def test_without_pyarrow_parquet_ends_in_one_line(
    merged: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'labelpenet[parquet]'" in refusal(merged, capsys)


def test_a_name_that_parquet_cannot_hold_ends_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    name = os.fsdecode(b"a\xff.png")
    write(tmp_path / "parts", [TaggedImage(name, tmp_path / name, ())], 1)
    with pytest.raises(InputError, match="UTF-8"):
        merge_parts([tmp_path / "parts"], tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("run") / "run", CLASSES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        Image.fromarray(render_scene(np.random.default_rng(i), (48, 64)).image).save(folder / f"{i:02d}.png")
    (folder / "04.png").write_bytes(b"no image")
    return folder


def command(run: Path, photos: Path, *more: str) -> list[str]:
    return ["predict", str(run), str(photos), "--module", "3", "--device", "cpu", *more]


def lines(path: Path) -> int:
    """Whole lines of a file that another process writes, and may rename at any moment."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_a_killed_shard_goes_on_and_the_result_is_that_of_one_process(run: Path, photos: Path, tmp_path: Path) -> None:
    parts, expected, merged = tmp_path / "parts", tmp_path / "one.json", tmp_path / "merged.json"
    main(command(run, photos, "--out", str(expected)))
    first = command(run, photos, "--out", str(parts), "--shard", "1/2")
    process = subprocess.Popen([sys.executable, "-m", "labelpenet", *first], env={**os.environ, "OMP_NUM_THREADS": "1"})
    partial = parts / "part-00001-of-00002.jsonl.partial"
    while process.poll() is None and lines(partial) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    main(first)
    main(command(run, photos, "--out", str(parts), "--shard", "2/2"))
    main(["merge", str(parts), "--out", str(merged)])
    assert merged.read_bytes() == expected.read_bytes()
    assert len(json.loads(merged.read_text())["images"]) == 5
    assert sorted(path.name for path in parts.iterdir()) == ["part-00001-of-00002.jsonl", "part-00002-of-00002.jsonl"]


def test_shards_of_a_run_of_two_modules_belong_together(run: Path, photos: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(run, half)
    for part in MODULES[2:]:
        run_folder.weights(half, part).unlink()
    for seed, shard in enumerate(("1/2", "2/2")):
        torch.manual_seed(seed)  # of the modules that the run has no weights for
        main(
            [
                "predict",
                str(half),
                str(photos),
                "--module",
                "2",
                "--shard",
                shard,
                "--out",
                str(tmp_path / "parts"),
                "--device",
                "cpu",
            ]
        )
    main(["merge", str(tmp_path / "parts"), "--out", str(tmp_path / "found.json")])
    assert len(json.loads((tmp_path / "found.json").read_text())["images"]) == 5, "all but the damaged one"


def test_shards_of_other_photographs_or_another_recipe_do_not_go_together(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, changed = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, other)
    for index, path in enumerate(sorted(other.iterdir())):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    shutil.copytree(run, changed)
    facts = json.loads(run_folder.facts(changed).read_text())
    facts.pop("checksum", None)
    facts["recipe"]["modules"][3]["predict"]["per_class"] = 2
    run_folder.facts(changed).write_text(json.dumps(facts))
    out = tmp_path / "parts"
    main([*command(run, photos), "--out", str(out), "--shard", "1/2"])
    for one, folder, what in ((run, other, "list"), (changed, photos, "recipe")):
        with pytest.raises(SystemExit):
            main([*command(one, folder), "--out", str(out), "--shard", "1/2"])
        assert f"another prediction ({what} changed)" in capsys.readouterr().err
    # a shard that begins beside it, of another prediction or of another number of shards, which merge would refuse
    for one, folder, shard, what in (
        (run, other, "2/2", "list"), (changed, photos, "2/2", "recipe"), (run, photos, "2/3", "shard"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*command(one, folder), "--out", str(out), "--shard", shard])
        assert f"part-00001-of-00002.jsonl: belongs to another prediction ({what} changed)" in capsys.readouterr().err
    main([*command(run, photos), "--out", str(out), "--shard", "2/2"])
    assert sorted(path.name for path in out.glob("*.jsonl*")) == [
        "part-00001-of-00002.jsonl",
        "part-00002-of-00002.jsonl",
    ]


def test_a_shard_of_tagged_photographs_does_not_go_on_with_other_tags(run: Path, photos: Path, tmp_path: Path) -> None:
    def write_tags(last: str) -> None:
        names = sorted(path.name for path in photos.iterdir())
        rows = [f"{name},cat" for name in names[:-1]] + [f"{names[-1]},{last}"]
        (tmp_path / "tags.csv").write_text("\n".join(["file,tags", *rows]))

    def label(*options: str) -> None:
        data = [str(photos), "--data", str(tmp_path / "tags.csv"), "--shard", "1/1", "--out", str(tmp_path / "parts")]
        main(["predict", str(run), *data, "--device", "cpu", *options])

    write_tags("dog")
    label("--tagged")
    write_tags("cat")
    for options in (("--tagged",), ()):
        with pytest.raises(SystemExit) as left:
            label(*options)
        assert left.value.code == 2
    write_tags("dog")
    label("--tagged")


def test_batches_of_columns_give_the_same_instances(run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.json"
    main(command(run, photos, "--out", str(out)))
    content = json.loads(out.read_text())
    paths = np.array([str(photos / f"{i:02d}.png") for i in range(6)], object)
    found = BatchPredictor(str(run), 3, 0.0, "cpu")({"path": paths})
    assert len({len(column) for column in found.values()}) == 1
    good = found["error"] == ""
    assert [path[-6:] for path in found["path"][~good]] == ["04.png"]
    assert good.sum() == len(content["annotations"])
    counts = sorted(row["segmentation"]["counts"] for row in content["annotations"])
    assert sorted(found["counts"][good]) == counts


class Mortal(BatchPredictor):
    """Its process is killed once, in the batch with the fourth photograph, before it gives its answer."""

    def __init__(self, run: str, killed: str):
        super().__init__(run, 3, 0.0, "cpu")
        self.killed = Path(killed)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = super().__call__(batch)
        if any(path.endswith("03.png") for path in batch["path"]) and not self.killed.exists():
            self.killed.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return found


@pytest.mark.slow
def test_two_ray_workers_of_which_one_is_killed_give_what_one_process_gives(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    paths, killed = [{"path": str(path)} for path in sorted(photos.iterdir())], tmp_path / "killed"
    alone = BatchPredictor(str(run), 3, 0.0, "cpu")({"path": np.array([one["path"] for one in paths], object)})
    columns = [column.tolist() for column in alone.values()]
    expected = [dict(zip(alone, row, strict=True)) for row in zip(*columns, strict=True)]
    ray.init(
        num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}}
    )
    try:
        found = ray.data.from_items(paths, override_num_blocks=3).map_batches(
            Mortal,
            fn_constructor_args=(str(run), str(killed)),
            batch_size=2,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=1,
        )
        rows = found.take_all()
    finally:
        ray.shutdown()
    assert killed.exists() and sum(bool(row["error"]) for row in rows) == 1

    def order(row: dict[str, Any]) -> tuple:
        return tuple(str(row[name]) for name in sorted(row))

    assert sorted(map(order, rows)) == sorted(map(order, expected))
