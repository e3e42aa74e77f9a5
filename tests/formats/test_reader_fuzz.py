"""Damaged and hostile files against every reader.

A good data set is written, one of its files is damaged at random, and the data set is read whole: tags, truth and
pictures. The only exception that may come out is an `InputError` of one line; nothing may take long, nothing may be
written, and no image may lie outside the data set. A few hundred cases run by default, several thousand as ``slow``.
"""

from __future__ import annotations

import json
import pickle
import random
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from safetensors.torch import save_file

from labelpenet import InputError
from labelpenet.data import AnnotatedImages, TaggedImages, read_image
from labelpenet.data.dataset import TaggedImage
from labelpenet.data.images import image_size, read_index_map
from labelpenet.data.precomputed import read_proposals
from labelpenet.engine.log import read_metrics
from labelpenet.formats import coco, open_annotated, open_tagged, read_predictions
from labelpenet.formats.corrected import read_corrected
from labelpenet.formats.parquet import write_parquet
from labelpenet.formats.review import KIND
from labelpenet.formats.rows import coco_file
from labelpenet.instances import decode_mask
from labelpenet.models.weights import load_weights
from tests.formats.corpus import LAYOUTS
from tests.formats.kits import SIZE, coco_content, coco_set, matlab, photograph, voc_kit

SECONDS_A_CASE = 20  # of this process; fifteen times as many by the clock, for one that waits
PROFILES = [
    pytest.param(settings(max_examples=20), id="quick"),
    pytest.param(settings(max_examples=500, derandomize=False), id="thorough", marks=pytest.mark.slow),
]

# ------------------------------------------------------------------------------------------------------ what damages

TOKENS = [
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b'"', b"<", b">", b"&", b"]]>", b"<![CDATA[", b"<!--", b"&#0;"),
    *(
        b"../",
        b"..\\",
        b"/etc/passwd",
        b"C:\\",
        b"file:///etc/passwd",
        b"nan",
        b"-inf",
        b"1e999",
        b"-1",
        b"99999999999",
    ),
    *(
        b"<object>",
        b"</object>",
        b"<bndbox/>",
        b"<name></name>",
        b"{",
        b"}",
        b"[" * 500,
        b"null",
        b"true",
        b"NaN",
        b"{}",
    ),
    *(b";", b",", b'\\u0000"', b"\\ud800", b"#", b"%00", b" " * 300, b"9" * 5000),
    b'<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;">]>',
]


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """The good bytes after one to four of: cut off, piece removed, piece doubled, bytes replaced, a nasty token."""
    data = good
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 60)))
        kind = draw(st.sampled_from(["cut", "remove", "double", "replace", "token", "token", "bytes"]))
        if kind == "cut":
            data = data[:start]
        elif kind == "remove":
            data = data[:start] + data[stop:]
        elif kind == "double":
            data = data[:stop] + data[start:stop] * draw(st.integers(1, 3)) + data[stop:]
        elif kind == "token":
            data = data[:start] + draw(st.sampled_from(TOKENS)) + data[stop if draw(st.booleans()) else start :]
        else:
            piece = draw(st.binary(max_size=8))
            data = data[:start] + piece + data[start + (len(piece) if kind == "replace" else 0) :]
    return data


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["../x.jpg", "/etc/passwd", "\0", "..", ".", "", "x" * 5000, "\ud800", "C:\\x.jpg"]),
    st.lists(st.one_of(st.floats(), st.integers(-5, 40)), max_size=8),
    st.builds(dict),
    st.builds(lambda: [[]]),
)


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the parts of a JSON value are."""
    yield here
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from paths_of(value[key], (*here, key))


@st.composite
def rebuilt(draw: st.DrawFn, good: bytes) -> bytes:
    """The good JSON with one to three of its parts replaced by something odd, or removed."""
    value = json.loads(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(paths_of(value))[1:] or [()]))
        if not path:
            return json.dumps(draw(ODD_VALUES)).encode()
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.integers(0, 4)) == 0:
            del parent[path[-1]]
        else:
            parent[path[-1]] = draw(ODD_VALUES)
    return json.dumps(value).encode()


# ------------------------------------------------------------------------------------------------------ what must hold


@contextmanager
def deadline() -> Iterator[None]:
    """Ends a case that hangs."""

    def late(*_: object) -> None:
        raise TimeoutError(f"a case took more than {SECONDS_A_CASE} s")

    before = signal.signal(signal.SIGALRM, late), signal.signal(signal.SIGPROF, late)
    signal.alarm(15 * SECONDS_A_CASE)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_A_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGPROF, before[1])


def refused(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, or None where it says in one line why not."""
    try:
        return function(*args)
    except InputError as error:
        assert str(error)
        assert str(error).isprintable()
        return None


def read_whole(data: Path, split: str | None) -> None:
    """Reads everything of a data set, as training, prediction and evaluation together would."""
    tagged: TaggedImages | None = refused(open_tagged, data, split)
    if tagged is not None:
        assert tagged.images
        assert all(note.isprintable() for note in tagged.notes)
        assert all(name.isprintable() for name in (*tagged.classes, *(image.id for image in tagged.images)))
        root = (data if data.is_dir() else data.parent).resolve()
        for image in tagged.images:
            assert image.path.resolve().is_relative_to(root)
            assert list(image.tags) == sorted(set(image.tags))
            assert all(0 <= tag < len(tagged.classes) for tag in image.tags)
            pixels = refused(read_image, image.path)
            assert pixels is None or (pixels.dtype == np.uint8 and pixels.ndim == 3)
    annotated: AnnotatedImages | None = refused(open_annotated, data, split)
    if annotated is not None:
        truths, _ = refused(annotated.readable_truths) or ({}, ())
        for truth in truths.values():
            truth.instances.validate(len(annotated.tagged.classes))
            assert len(truth.difficult) == len(truth.crowd) == len(truth.instances)


def listing(root: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_size) for path in root.rglob("*"))


def fuzz(
    root: Path,
    target: Path,
    cases: Callable[[bytes], st.SearchStrategy[bytes]],
    read: Callable[[], object],
    profile: settings,
) -> int:
    """Damages ``target`` again and again; returns how many cases ran."""
    good = target.read_bytes()
    ran = 0

    @settings(profile, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(good))
    def case(data: bytes) -> None:
        nonlocal ran
        ran += 1
        target.write_bytes(data)
        before = listing(root)
        with deadline():
            read()
        assert listing(root) == before

    try:
        case()
    finally:
        target.write_bytes(good)
    return ran


# ------------------------------------------------------------------------------------------------------------ the cases

STUDIO = [
    {"id": 1, "data": {"image": "/data/upload/3/0a1b2c3d-x.jpg"}, "annotations": [
        {"result": [{"type": "choices", "value": {"choices": ["cat", "dog"]}}], "was_cancelled": False}]},
    {"id": 2, "data": {"image": "/data/local-files/?d=sub/y.jpg"}, "annotations": [{"result": []}]},
]  # fmt: skip


def tagged_folder(root: Path, name: str, text: str) -> Path:
    for seed, file in enumerate(("x.jpg", "sub/y.jpg")):
        photograph(root / file, seed=seed)
    (root / name).write_text(text)
    return root / name


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "target",
    [
        "Annotations/a.xml",
        "ImageSets/Main/train.txt",
        "JPEGImages/a.jpg",
        "SegmentationObject/a.png",
        "SegmentationClass/a.png",
        "classes.txt",
    ],
)
def test_a_damaged_voc_kit(tmp_path: Path, target: str, profile: settings) -> None:
    year = voc_kit(tmp_path)
    names = ["c1", "c2", "c3", "c4", "c5", "c6", "c7", "cat", "c9", "c10", "c11", "dog"]
    (year / "classes.txt").write_text("\n".join(names))
    assert fuzz(tmp_path, year / target, damaged, lambda: read_whole(year, "train"), profile) >= 15


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("cases", [damaged, rebuilt])
def test_a_damaged_coco_file(tmp_path: Path, cases: Any, profile: settings) -> None:
    path = coco_set(tmp_path)
    assert fuzz(tmp_path, path, cases, lambda: read_whole(path, None), profile) >= 15


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("name", "text", "cases"),
    [
        ("tags.csv", 'file,tags\nx.jpg,cat;dog\n"sub/y.jpg",\n', damaged),
        ("tags.json", '{"x.jpg": ["cat", "dog"], "sub/y.jpg": []}', damaged),
        ("tags.json", '{"x.jpg": ["cat", "dog"], "sub/y.jpg": []}', rebuilt),
        ("export.json", json.dumps(STUDIO), damaged),
        ("export.json", json.dumps(STUDIO), rebuilt),
    ],
)
def test_a_damaged_tags_file(tmp_path: Path, name: str, text: str, cases: Any, profile: settings) -> None:
    path = tagged_folder(tmp_path, name, text)
    read_whole(path, None)
    assert fuzz(tmp_path, path, cases, lambda: read_whole(path, None), profile) >= 15


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "kind", ["jpg", "exif.jpg", "png", "palette.png", "deep.png", "gif", "webp", "tif", "bmp", "ppm"]
)
def test_a_damaged_picture(tmp_path: Path, kind: str, profile: settings) -> None:
    y, x = np.mgrid[:24, :32]
    image: Image.Image = Image.fromarray(np.stack([x * 8, y * 9, x + y], -1).astype(np.uint8))
    more: dict[str, Any] = {}
    if kind == "exif.jpg":
        more["exif"] = Image.Exif()
        more["exif"][0x0112], more["exif"][0x010E] = 6, "text"
    elif kind == "palette.png":
        image = image.convert("P")
    elif kind == "deep.png":
        image = Image.fromarray((x * 2000).astype(np.uint16))
    elif kind in ("gif", "webp", "tif"):
        more = {"save_all": True, "append_images": [image.rotate(90)]}
    stream = BytesIO()
    suffix = kind.split(".")[-1]
    image.save(stream, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **more)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(stream.getvalue())

    def read() -> None:
        size, pixels = refused(image_size, path), refused(read_image, path)
        assert pixels is None or (pixels.shape == (*size, 3) and pixels.dtype == np.uint8)
        refused(read_index_map, path)

    assert fuzz(tmp_path, path, damaged, read, profile) >= 15


def mutated(good: bytes, rng: random.Random) -> bytes:
    """The good bytes after one to four accidents: `damaged`, without hypothesis, which is ten times slower."""
    data = good
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(data))
        stop = min(len(data), start + rng.randint(0, 60))
        piece = rng.choice([b"", data[start:stop] * 2, rng.randbytes(rng.randint(0, 8)), *[rng.choice(TOKENS)] * 3])
        data = data[:start] + piece + (data[stop:] if rng.random() < 0.9 else b"")
    return data


@pytest.mark.parametrize(
    "cases", [pytest.param(5, id="quick"), pytest.param(2000, id="thorough", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_damaged_layout(tmp_path: Path, name: str, cases: int) -> None:
    """Over all layouts, 100,000 damaged files when thorough."""
    data, split = LAYOUTS[name].write(tmp_path), LAYOUTS[name].split
    rng = random.Random(name)
    targets = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".jpg")
    targets = targets or sorted(tmp_path.rglob("*.jpg"))
    for _ in range(cases):
        target = rng.choice(targets)
        good = target.read_bytes()
        target.write_bytes(mutated(good, rng))
        before = listing(tmp_path)
        with deadline():
            read_whole(data, split)
        assert listing(tmp_path) == before
        target.write_bytes(good)


ODD = (10**400, -(10**400), 1e308, float("nan"), float("inf"), "x", [[[]]], {"a": {}}, None, True, -1, 10**9)


def forged(row: Any, rng: random.Random) -> Any:
    """A JSON value of which one part is replaced by something odd."""
    row = json.loads(json.dumps(row))
    *way, last = rng.choice(list(paths_of(row))[1:])
    home = row
    for key in way:
        home = home[key]
    home[last] = rng.choice(ODD)
    return row


def own_file(kind: str, root: Path) -> tuple[Path, Callable[[], object]]:
    """A file that is no data set, and what reads all of it and checks what comes out."""
    content = coco_content()
    coco_set(root)
    images = [TaggedImage(name, root / "images" / name, ()) for name in ("sub/y.jpg", "x.jpg")]
    tagged = TaggedImages(("dog", "cat", "person"), tuple(images))
    path, suffix = root / kind, kind.split(".")[-1]
    boxes = {image.id: np.array([[0, 0, 8, 8], [2, 3, 20, 20]], np.float32) for image in images}
    network = torch.nn.Linear(2, 3)
    shown = [{**entry, "image": entry["file_name"], "status": "accepted"} for entry in content["images"]]
    json_of = {
        "predictions.json": content, "rows.json": [{**row, "image_id": "x.jpg"} for row in content["annotations"]],
        "review.json": {
            "info": {"description": KIND}, "images": shown, "categories": content["categories"],
            "annotations": [{**row, "instance": index} for index, row in enumerate(content["annotations"])],
        },
        "proposals.json": [{"image_id": "x.jpg", "bbox": [1, 2, 3, 4], "score": 0.5}] * 3,
        "metrics.jsonl": {"stage": "module1", "step": 1, "loss": 0.5},
    }  # fmt: skip
    if kind == "predictions.lines.json":
        path.write_text("".join(coco_file({key: map(json.dumps, content[key]) for key in LISTS})))
    elif kind in json_of:
        path.write_text(json.dumps(json_of[kind]) + "\n")
    elif suffix == "parquet":
        pytest.importorskip("pyarrow")
        where = {"file_name": "x.jpg", "height": SIZE[0], "width": SIZE[1]}
        whole = {"x": 0.0, "y": 0.0, "w": float(SIZE[1]), "h": float(SIZE[0])}
        whole["counts"] = rle.encode(np.asfortranarray(np.eye(*SIZE, dtype=np.uint8)))["counts"].decode()
        found = [{"image": "x.jpg", **where, "category": "cat", "score": 0.5, **whole}] * 40
        write_parquet(path, [*found, {"image": "sub/y.jpg", **where, "file_name": "sub/y.jpg"}], tagged.classes)
    elif suffix == "npz":
        np.savez(path, **{name.replace("/", " "): value for name, value in boxes.items()}, x=boxes["x.jpg"])
    elif suffix == "pkl":
        path.write_bytes(
            pickle.dumps({"indexes": ["x", "y"], "boxes": list(boxes.values()), "scores": [[1, 2], [3, 1]]})
        )
    elif suffix == "mat":
        path.write_bytes(matlab(boxes=list(boxes.values()), images=["x", "y"]))
    elif suffix == "pth":
        torch.save(network.state_dict(), path)
    elif suffix == "safetensors":
        save_file(network.state_dict(), path)

    def predictions() -> None:
        for name, found in read_predictions(path, images, tagged.classes, (3, 5, 8)).items():
            assert found.validate(3).image_size == SIZE and ((found.weights >= 0) & (found.weights <= 1)).all(), name

    def corrected() -> None:
        for read in read_corrected([path], tagged).truths.values():
            truth = refused(read)
            assert truth is None or truth.instances.validate(3).image_size == SIZE

    def proposals() -> None:
        for found in read_proposals(path, images).values():
            assert np.isfinite(found).all() and (found[:, 2:] > found[:, :2]).all() and found.min() >= 0
            assert (found[:, 2] <= SIZE[1]).all() and (found[:, 3] <= SIZE[0]).all()

    def weights() -> None:
        load_weights(network, path, "network")
        assert all(torch.isfinite(value).all() for value in network.state_dict().values())

    read = {"predictions": predictions, "rows": predictions, "review": corrected, "proposals": proposals}
    return path, {**read, "weights": weights, "metrics": lambda: read_metrics(root)}[kind.split(".")[0]]


LISTS = ("images", "categories", "annotations")
OWN = ("predictions.json", "predictions.lines.json", "predictions.parquet", "rows.json", "review.json",
       "proposals.json", "proposals.npz", "proposals.pkl", "proposals.mat", "weights.pth", "weights.safetensors",
       "metrics.jsonl")  # fmt: skip


@pytest.mark.parametrize(
    "cases", [pytest.param(30, id="quick"), pytest.param(2000, id="thorough", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", OWN)
def test_a_damaged_file_that_is_no_data_set(tmp_path: Path, kind: str, cases: int) -> None:
    path, read = own_file(kind, tmp_path)
    good, rng = path.read_bytes(), random.Random(kind)
    read()
    for index in range(cases):
        json_too = path.suffix.startswith(".json") and index % 2
        path.write_bytes(json.dumps(forged(json.loads(good), rng)).encode() if json_too else mutated(good, rng))
        before = listing(tmp_path)
        with deadline():
            refused(read)
        assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "key", ["id", "image_id", "category_id", "bbox", "segmentation", "iscrowd", "width", "file_name"]
)
def test_odd_values_in_a_coco_file(tmp_path: Path, key: str) -> None:
    path = coco_set(tmp_path)
    for value in ODD:
        content = coco_content()
        for rows in content.values():
            rows[0][key] = value
        path.write_text(json.dumps(content))
        read_whole(tmp_path, None)
        content = coco_content()
        content["annotations"][0]["bbox"] = [value, 0, value, 5]
        content["annotations"][1]["segmentation"]["counts"] = [value]
        path.write_text(json.dumps(content))
        read_whole(tmp_path, None)


def test_rows_nested_deep(tmp_path: Path) -> None:
    deep = "[" * 900 + "]" * 900
    text = json.dumps(coco_content())
    for key in ('"id": 1', '"bbox": [2, 3, 10, 8]', '"iscrowd": 0', '"file_name": "x.jpg"', '"name": "cat"'):
        path = coco_set(tmp_path)
        assert key in text
        path.write_text(text.replace(key, key.split(":")[0] + f": {deep}"))
        read_whole(path, None)


def test_fifty_thousand_classes_take_no_more_than_linear_time(tmp_path: Path) -> None:
    """Counted by comparisons of names, not by a clock."""

    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

    count = 50_000
    content = coco_content()
    content["categories"] = [{"id": i, "name": Name(f"class {i}")} for i in range(1, count + 1)]
    path = coco_set(tmp_path)
    annotated = coco.open_annotated(path, None, [row["name"] for row in content["categories"]], None, content)
    assert len(annotated.tagged.classes) == count
    assert annotated.read("x.jpg").instances.labels.tolist() == [4, 7]
    assert Name.compared < 20 * count


def test_numbers_of_categories_are_compared_no_more_often_than_names(tmp_path: Path) -> None:
    class Number(int):
        compared = 0
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            Number.compared += 1
            return int.__eq__(self, other)

    count = 1_000
    content = coco_content()
    content["categories"] = [{"id": Number(i), "name": f"class {i}"} for i in range(1, count + 1)]
    annotated = coco.open_annotated(coco_set(tmp_path), None, None, None, content)
    assert len(annotated.tagged.classes) + len(annotated.others) == count
    classes = [row["name"] for row in content["categories"]]
    assert coco.open_annotated(coco_set(tmp_path), None, classes, None, content).others == ()
    assert Number.compared < 20 * count


SEGMENTATIONS = st.one_of(
    st.lists(
        st.lists(st.one_of(st.floats(), st.floats(-50, 100), st.integers(-(2**40), 2**40)), max_size=12), max_size=3
    ),
    st.fixed_dictionaries(
        {
            "size": st.one_of(st.just([24, 32]), st.lists(st.integers(-2, 2**40), max_size=3), st.none()),
            "counts": st.one_of(
                st.lists(st.integers(-10, 800), max_size=8),
                st.lists(st.integers(), max_size=4),
                st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30),
                st.text(max_size=8),
                st.binary(max_size=8),
                st.none(),
            ),
        }
    ),
    ODD_VALUES,
)


@pytest.mark.parametrize("profile", PROFILES)
def test_damaged_segmentations(profile: settings) -> None:
    @settings(profile, deadline=None, database=None)
    @given(SEGMENTATIONS)
    def case(segmentation: Any) -> None:
        with deadline():
            mask = refused(decode_mask, segmentation, (24, 32))
        assert mask is None or mask.shape == (24, 32)

    case()


def test_a_billion_laughs_are_not_laughed(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<!DOCTYPE b [<!ENTITY l0 "lol">{entities}]><annotation><object><name>&l9;</name></object></annotation>'
    (year / "Annotations/c.xml").write_text(bomb)
    tracemalloc.start()
    try:
        with deadline(), pytest.raises(InputError, match="document type or entity"):
            open_tagged(year, "val")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_files_that_are_too_large_or_too_deep(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    path = year / "Annotations/c.xml"
    for text in ("<a>" * 1_000_000, "<annotation>" + " " * 9_000_000 + "</annotation>"):
        path.write_text(text)
        with deadline(), pytest.raises(InputError):
            open_tagged(year, "val")
