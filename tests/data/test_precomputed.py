"""Proposals of other tools: every format with its convention, names, bad files, and pickles that want to run code."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.precomputed import read_proposals, unpickle_arrays
from labelpenet.errors import InputError
from labelpenet.instances import CompactMasks
from tests.formats.kits import matlab

SIZE = (60, 80)  # (H, W) of every image
BOXES = {
    "2008_000002": np.array([[0, 0, 80, 60], [5, 6, 25, 36]], np.float32),
    "000005": np.array([[10, 20, 30, 40], [1, 2, 3, 4], [70, 50, 80, 60]], np.float32),
}
EXPECTED = [(name, np.dtype(np.float32), boxes.tolist()) for name, boxes in BOXES.items()]


@pytest.fixture
def images(tmp_path: Path) -> list[TaggedImage]:
    folder = tmp_path / "JPEGImages"
    folder.mkdir()
    for name in BOXES:
        Image.new("RGB", SIZE[::-1]).save(folder / f"{name}.jpg")
    return [TaggedImage(name, folder / f"{name}.jpg", (0,), number) for number, name in enumerate(BOXES, 71)]


def read(path: Path, images: list[TaggedImage]) -> list[tuple[str, np.dtype, list[list[float]]]]:
    """The proposals of each image as they are read, without a note."""
    found = read_proposals(path, images)
    assert found.notes == ()
    return [(name, boxes.dtype, boxes.tolist()) for name, boxes in found.items()]


def write(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content) if path.suffix == ".pkl" else json.dumps(content).encode())
    return path


def inclusive(boxes: np.ndarray) -> np.ndarray:
    return boxes - [0, 0, 1, 1]


def coco(boxes: np.ndarray) -> list[list[float]]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()


# --- Formats ---


def test_npz(tmp_path: Path, images: list[TaggedImage]) -> None:
    np.savez(tmp_path / "boxes.npz", **BOXES)
    assert read(tmp_path / "boxes.npz", images) == EXPECTED


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_boxes_by_name(tmp_path: Path, images: list[TaggedImage], suffix: str) -> None:
    path = write(tmp_path / f"boxes{suffix}", {name: boxes.tolist() for name, boxes in BOXES.items()})
    assert read(path, images) == EXPECTED


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
def test_mat_of_fast_rcnn(tmp_path: Path, images: list[TaggedImage], order: str, compressed: bool) -> None:
    boxes = [inclusive(value)[:, [1, 0, 3, 2]] + 1 for value in BOXES.values()]
    content = matlab(order, compressed, other=["text"], boxes=boxes, images=list(BOXES))
    (tmp_path / "boxes.mat").write_bytes(content)
    assert read(tmp_path / "boxes.mat", images) == EXPECTED
    for stop in (0, 100, 130, 200, len(content) // 2, len(content) - 30):
        (tmp_path / "boxes.mat").write_bytes(content[:stop])
        with pytest.raises(InputError, match=r"boxes.mat"):
            read_proposals(tmp_path / "boxes.mat", images)


def test_mat_as_scipy_writes_it(tmp_path: Path, images: list[TaggedImage]) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    for shape, compressed in (((2, 1), True), ((1, 2), False)):
        boxes, names = np.empty(shape, object), np.empty(shape, object)
        boxes.ravel()[:] = [inclusive(value)[:, [1, 0, 3, 2]] + 1 for value in BOXES.values()]
        names.ravel()[:] = list(BOXES)
        savemat(tmp_path / "boxes.mat", {"boxes": boxes, "images": names}, do_compression=compressed)
        assert read(tmp_path / "boxes.mat", images) == EXPECTED


@pytest.mark.parametrize("key", ["indexes", "ids", "images"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_table_of_detectron_in_every_protocol(
    tmp_path: Path, images: list[TaggedImage], key: str, protocol: int
) -> None:
    scores = [np.array([0.1, 0.9]), np.array([0.2, 0.3, 0.1])]
    table = {
        "boxes": [
            inclusive(BOXES["2008_000002"]).astype(np.float32)[::-1].copy(),
            inclusive(BOXES["000005"])[[1, 0, 2]],
        ],
        "scores": scores,
        key: [np.int64(2008000002), np.str_("000005")] if key == "indexes" else [2008000002, "5"],
    }
    path = tmp_path / "boxes.pkl"
    path.write_bytes(pickle.dumps(table, protocol=protocol))
    assert read(path, images) == EXPECTED


def test_coco_rows_by_score_and_by_file_name(tmp_path: Path, images: list[TaggedImage]) -> None:
    rows = [
        {"image_id": image.number, "bbox": box, "score": 1 - i / 10}
        for image in images
        for i, box in enumerate(coco(BOXES[image.id]))
    ]
    assert read(write(tmp_path / "rows.json", rows[::-1]), images) == EXPECTED
    named = [{"id": 900 + image.number, "file_name": f"train/{image.path.name}"} for image in images]
    moved = [{**row, "image_id": 900 + row["image_id"]} for row in rows]
    assert read(write(tmp_path / "file.json", {"images": named, "annotations": moved}), images) == EXPECTED


def masks(boxes: np.ndarray) -> torch.Tensor:
    result = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(result, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = True
    return result


def test_masks_as_run_lengths(tmp_path: Path, images: list[TaggedImage]) -> None:
    rows = [
        {"image_id": image.number, "segmentation": row}
        for image in images
        for row in CompactMasks.of(SIZE, masks(BOXES[image.id]).numpy()).encode()
    ]
    assert read(write(tmp_path / "masks.json", rows), images) == EXPECTED
    folder = tmp_path / "each"
    folder.mkdir()
    for image in images:
        write(folder / f"{image.id}.json", [row for row in rows if row["image_id"] == image.number])
    assert read(folder, images) == EXPECTED


@pytest.mark.parametrize("mode", ["grey", "palette", "16 bits", "colours", "folders"])
def test_masks_as_png(tmp_path: Path, images: list[TaggedImage], mode: str) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    truth = {"2008_000002": BOXES["2008_000002"][1:], "000005": BOXES["000005"]}  # label maps cannot overlap
    for name, boxes in truth.items():
        layers = masks(boxes).numpy()
        if mode == "folders":
            (folder / name).mkdir()
            for i, layer in enumerate(layers):
                Image.fromarray(layer.astype(np.uint8) * 255).save(folder / name / f"{i}.png")
            continue
        labels = sum(layer.astype(np.int64) * (i + 1) for i, layer in enumerate(layers))
        if mode == "16 bits":
            Image.fromarray((labels * 300).astype(np.uint16)).save(folder / f"{name}.png")
            continue
        labels[0, :3] = 255  # void
        picture = Image.fromarray(labels.astype(np.uint8))
        if mode == "palette":
            picture.putpalette([7 * i % 256 for i in range(768)])
        if mode == "colours":
            colours = np.array([[0, 0, 0], [0, 0, 255], [0, 128, 0], [128, 0, 0]])
            picture = Image.fromarray(colours[np.where(labels == 255, 0, labels)].astype(np.uint8))
        picture.save(folder / f"{name}.png")
    found = read_proposals(folder, images)
    for name, boxes in truth.items():
        assert sorted(found[name].tolist()) == sorted(boxes.tolist())


def test_255_alone_is_an_object(tmp_path: Path, images: list[TaggedImage]) -> None:
    layer = masks(BOXES["000005"][:1]).numpy()[0]
    (tmp_path / "masks").mkdir()
    Image.fromarray(layer.astype(np.uint8) * 255).save(tmp_path / "masks" / "000005.png")
    assert read_proposals(tmp_path / "masks", images)["000005"].tolist() == [[10, 20, 30, 40]]


def test_255_beside_larger_numbers_is_an_object(tmp_path: Path, images: list[TaggedImage]) -> None:
    labels = sum(one.astype(np.uint16) * (i + 254) for i, one in enumerate(masks(BOXES["000005"]).numpy()))
    (tmp_path / "masks").mkdir()
    Image.fromarray(labels).save(tmp_path / "masks" / "000005.png")
    assert read_proposals(tmp_path / "masks", images)["000005"].tolist() == BOXES["000005"].tolist()


def test_two_files_of_one_image_are_refused(tmp_path: Path, images: list[TaggedImage]) -> None:
    (tmp_path / "masks").mkdir()
    Image.new("L", SIZE[::-1], 1).save(tmp_path / "masks" / "000005.png")
    write(tmp_path / "masks" / "000005.json", [{"bbox": [1, 2, 3, 4]}])
    with pytest.raises(InputError, match=r"000005\.png and another file or folder are of image 000005; keep one"):
        read_proposals(tmp_path / "masks", images)


# --- Names and values ---


def test_missing_images_are_named_and_left_out(tmp_path: Path, images: list[TaggedImage]) -> None:
    np.savez(tmp_path / "boxes.npz", **{"000005": BOXES["000005"], "other": np.zeros((0, 4))})
    found = read_proposals(tmp_path / "boxes.npz", images)
    assert list(found) == ["000005"]
    assert "2008_000002" in found.notes[0] and found.notes[-1] == "1 images have no proposals"


def test_ambiguous_names_are_not_guessed(tmp_path: Path, images: list[TaggedImage]) -> None:
    path = write(tmp_path / "boxes.json", {"a/000005.jpg": [[0, 0, 1, 1]], "b/000005.jpg": [[0, 0, 2, 2]]})
    with pytest.raises(InputError, match=r"names none of the images; it has a/000005\.jpg.*they are 2008_000002"):
        read_proposals(path, images)


def test_no_image_takes_the_boxes_of_another(tmp_path: Path) -> None:
    """Numbers as CVAT counts, one more than in the names; the same name in two folders."""
    for name in ("000000.jpg", "000001.jpg", "000002.jpg", "a/x.jpg", "b/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(tmp_path / name)
    counted = [TaggedImage(f"{i:06}.jpg", tmp_path / f"{i:06}.jpg", (0,), i + 1) for i in range(3)]
    boxes = {i: [[0, 0, 10 + i, 10]] for i in range(3)}
    np.savez(tmp_path / "by-stem.npz", **{f"{i:06}": boxes[i] for i in range(3)})
    rows = [{"image_id": i + 1, "bbox": boxes[i][0]} for i in range(3)]
    for path in (tmp_path / "by-stem.npz", write(tmp_path / "by-number.json", rows)):
        assert {name: one.tolist() for name, one in read_proposals(path, counted).items()} == {
            f"{i:06}.jpg": boxes[i] for i in range(3)
        }
    either = write(tmp_path / "either.json", {"1": boxes[0], "000000": boxes[1]})
    with pytest.raises(InputError, match=r"either\.json: 1 and 000000 may both be 000000\.jpg"):
        read_proposals(either, counted)
    twins = [TaggedImage(name, tmp_path / name, (0,)) for name in ("a/x.jpg", "b/x.jpg")]
    with pytest.raises(InputError, match=r"x\.jpg may be image a/x\.jpg or b/x\.jpg"):
        read_proposals(write(tmp_path / "twins.json", {"x.jpg": boxes[0]}), twins)


def test_limit_repetitions_edges_and_nothing(tmp_path: Path, images: list[TaggedImage]) -> None:
    rows = [[-0.5, 0, 80.9, 60], [0, 0, 80, 60], [3, 3, 3, 9], [1, 1, 2, 2], [4, 4, 9, 9]]
    path = write(tmp_path / "boxes.json", {"000005": rows, "2008_000002": []})
    found = read_proposals(path, images, limit=2)
    assert found["000005"].tolist() == [[0, 0, 80, 60], [1, 1, 2, 2]]
    assert found["2008_000002"].tolist() == [[0, 0, 80, 60]]


@pytest.mark.parametrize(
    "box", [[0, 0, 82, 60], [-3, 0, 4, 4], [0, 0, 60, 80], [0, 0, float("nan"), 4], [0, 0, 4, 1e400]]
)
def test_a_box_outside_its_image_is_an_error(tmp_path: Path, images: list[TaggedImage], box: list) -> None:
    np.savez(tmp_path / "boxes.npz", **{"000005": np.array([[0, 0, 1, 1], box])})
    with pytest.raises(InputError, match=r"boxes\.npz: image 000005: box .* leaves its 80 x 60 pixels"):
        read_proposals(tmp_path / "boxes.npz", images)


# --- Bad files ---


@pytest.mark.parametrize("name", ["missing.npz", "bad.npz", "bad.json", "bad.pkl", "bad.mat", "bad.txt", "empty"])
def test_bad_files_are_named(tmp_path: Path, images: list[TaggedImage], name: str) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif name != "missing.npz":
        path.write_bytes(b"\x80\x04not what it says")
    with pytest.raises(InputError, match=name) as caught:
        read_proposals(path, images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        3,
        "boxes",
        {"000005": "boxes"},
        {"000005": [[1, 2, 3]]},
        {"000005": {"a": 1}},
        {"boxes": [[[0, 0, 1, 1]]], "ids": ["000005", "2"]},
        {"boxes": 3, "ids": 3},
        {"boxes": [[[0, 0, 1, 1]]], "ids": ["000005"], "scores": [["high"]]},
        {"boxes": [[[0, 0, 1, 1], [0, 0, 2, 2]]], "ids": ["000005"], "scores": [[0.1, 0.2, 0.3]]},
        {"000005": [[0, 0, 1, 10**400]]},
        [{"image_id": "000005", "bbox": [0, 0, 1, 10**400]}],
        [[1, 2, 3, 4]],
        [{"bbox": [0, 0, 1, 1]}],
        [{"image_id": "000005", "bbox": [0, 0, 1]}],
        [{"image_id": "000005", "bbox": "none"}],
        [{"image_id": "000005"}],
        [{"image_id": "000005", "bbox": [0, 0, 1, 1], "score": "high"}],
        [{"image_id": "000005", "segmentation": {"size": [3, 3], "counts": [9]}}],
        {"annotations": [{"image_id": []}], "images": [3]},
        {"annotations": [], "images": []},
    ],
)
def test_odd_content_is_an_error_of_one_line(tmp_path: Path, images: list[TaggedImage], content: object) -> None:
    for suffix in (".json", ".pkl"):
        with pytest.raises(InputError) as caught:
            read_proposals(write(tmp_path / f"odd{suffix}", content), images)
        assert f"odd{suffix}" in str(caught.value) and "\n" not in str(caught.value)


def test_masks_of_another_size_are_an_error(tmp_path: Path, images: list[TaggedImage]) -> None:
    (tmp_path / "masks").mkdir()
    Image.new("L", (10, 10), 1).save(tmp_path / "masks" / "000005.png")
    with pytest.raises(InputError, match=r"000005\.png: a mask of size \(10, 10\)"):
        read_proposals(tmp_path / "masks", images)


def test_an_npz_of_objects_is_refused(tmp_path: Path, images: list[TaggedImage]) -> None:
    np.savez(tmp_path / "objects.npz", **{"000005": np.array([Bomb(tmp_path / "boom")], object)})
    with pytest.raises(InputError, match=r"objects\.npz"):
        read_proposals(tmp_path / "objects.npz", images)
    assert not (tmp_path / "boom").exists()


# --- Pickles ---


class Bomb:
    """Creates a folder when it is unpickled by the book."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def assembled(*instructions: bytes) -> bytes:
    return b"".join(instructions) + b"."


def hostile(target: Path) -> dict[str, bytes]:
    """Pickles that run code, or try to get hold of something that does."""
    made = f"__import__('os').mkdir({str(target)!r})".encode()
    return {
        "reduce": pickle.dumps({"000005": Bomb(target)}),
        "inside an array": pickle.dumps(np.array([Bomb(target)], object)),
        "eval": assembled(b"cbuiltins\neval\n(V" + made + b"\ntR"),
        "python 2's eval": assembled(b"c__builtin__\neval\n(V" + made + b"\ntR"),
        "inst": assembled(b"(V" + made + b"\nibuiltins\nexec\n"),
        "dotted name": assembled(b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93"),
        "numpy's own loader": assembled(b"cnumpy\nload\n(V/etc/passwd\ntR"),
        "numpy's runner": assembled(b"cnumpy.testing._private.utils\nrunstring\n(V" + made + b"\n}tR"),
        "codec": assembled(b"c_codecs\nencode\n(Vabc\nVzip\ntR"),
        "extension": assembled(b"\x82\x01"),
        "persistent": assembled(b"Pfile\n"),
        "objects from bytes": assembled(
            b"cnumpy\ndtype\n(VO8\ntRcnumpy.core.multiarray\nscalar\n(", b"cnumpy\ndtype\n(VO8\ntR", b"VAAAAAAAA\ntR"
        ),
        "flags of a type": assembled(b"cnumpy\ndtype\n(VV8\ntR"),
        "state of a function": assembled(b"cnumpy\ndtype\n}(V__globals__\n}u\x86b"),
    }


def nested() -> list:
    value: list = [0.0]
    for _ in range(60):
        value = [value, value]
    return value


def test_no_pickle_asks_for_much_memory_or_time(tmp_path: Path) -> None:
    path = tmp_path / "large.pkl"
    for blob in (
        pickle.dumps({"000005": nested()}),  # 2 ** 60 values in a few hundred bytes
        b"\x80\x05K\x01r\xff\xff\xff\x7f\x96" + (2**40).to_bytes(8, "little") + b"x.",  # far memo, long buffer
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    ):
        path.write_bytes(blob)
        with pytest.raises(InputError, match="not a pickle of plain arrays"):
            unpickle_arrays(path)


@pytest.mark.parametrize("how", list(hostile(Path("x"))))
def test_no_pickle_runs_code(tmp_path: Path, how: str) -> None:
    target, path = tmp_path / "boom", tmp_path / "evil.pkl"
    path.write_bytes(hostile(target)[how])
    with pytest.raises(InputError, match=r"evil\.pkl: not a pickle of plain arrays"):
        unpickle_arrays(path)
    assert not target.exists()


def test_the_bomb_would_work(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(tmp_path: Path, protocol: int) -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.random((3, 4)),
        np.asfortranarray(rng.random((3, 4)).astype(np.float32)),
        rng.integers(0, 9, (2, 3, 4)).astype(">i4"),
        np.zeros((0, 4), np.uint16),
        np.array([True, False]),
        np.array(["cat", "sheep"]),
        np.array(3.5),
        rng.random((6, 4))[::2],
    ]
    path = tmp_path / "values.pkl"
    values = {"a": [1, 2.5, None, True, "x", b"y", (1, "z")], "b": OrderedDict(k=np.float32(0.5)), "c": np.int64(7)}
    path.write_bytes(pickle.dumps({"arrays": arrays, **values}, protocol=protocol))
    back = unpickle_arrays(path)
    for array, got in zip(arrays, back["arrays"], strict=True):
        assert got.dtype == array.dtype and np.array_equal(got, array)
    assert back["a"] == values["a"] and back["b"] == {"k": 0.5} and back["c"] == 7


def test_python_2_arrays_come_back(tmp_path: Path) -> None:
    # what Python 2 wrote: str for bytes, numpy.core.multiarray, protocol 2
    raw = np.arange(4, dtype="<f4").tobytes()
    blob = assembled(
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR",
        b"(K\x01K\x01K\x04\x86cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        b"\x89U" + bytes([len(raw)]) + raw + b"tb",
    )
    pickletools.dis(blob, out=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    path = tmp_path / "python2.pkl"
    path.write_bytes(blob)
    assert np.array_equal(unpickle_arrays(path), [[0, 1, 2, 3]])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_pickles_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    blob = bytearray(pickle.dumps({"a": np.arange(12.0).reshape(3, 4), "b": [np.float32(1), "text"]}, protocol=2))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    blob = blob[: data.draw(st.integers(0, len(blob)))] if data.draw(st.booleans()) else blob
    path = tmp_path_factory.mktemp("pickles") / "damaged.pkl"
    path.write_bytes(bytes(blob))
    try:
        assert is_plain(unpickle_arrays(path))
    except InputError as error:
        assert "damaged.pkl" in str(error)


def is_plain(value: object) -> bool:
    if type(value) in (dict, list, tuple):
        return all(map(is_plain, [*value, *value.values()] if isinstance(value, dict) else value))
    return isinstance(value, (np.ndarray, str, bytes, bytearray, int, float, type(None)))


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["boxes", "ids", "images", "scores", "annotations", "image_id", "bbox", "segmentation", "size"]
                )
                | st.sampled_from(["counts", "000005", "score", "id", "file_name"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    folder = tmp_path_factory.mktemp("json")
    Image.new("RGB", SIZE[::-1]).save(folder / "000005.jpg")
    path = write(folder / "any.json", content)
    try:
        found = read_proposals(path, [TaggedImage("000005", folder / "000005.jpg", ())])
    except InputError as error:
        assert "any.json" in str(error) and "\n" not in str(error)
    else:
        assert len(found["000005"]) >= 1


@pytest.mark.parametrize(
    "boxes",
    [
        np.zeros(4), np.zeros((2, 5)), np.zeros((1, 2, 4)), np.float64(3), np.zeros((2, 4), complex),
        np.array([["a"] * 4]), np.zeros(2, [("x", float), ("y", int)]), np.zeros((2, 4), "datetime64[D]"),
    ],
)  # fmt: skip
def test_arrays_of_another_shape_or_type(tmp_path: Path, images: list[TaggedImage], boxes: np.ndarray) -> None:
    np.savez(tmp_path / "boxes.npz", **{"000005": boxes})
    with pytest.raises(InputError, match=r"boxes\.npz: the boxes of image 000005"):
        read_proposals(tmp_path / "boxes.npz", images)


@pytest.mark.parametrize(
    "content",
    [
        {"boxes": np.array(3.0), "indexes": ["000005"]},
        {"boxes": [np.zeros((1, 4))], "indexes": np.array("000005")},
        {"boxes": [np.zeros((1, 4))], "indexes": ["000005"], "scores": np.array(1.0)},
        {"boxes": [np.zeros((1, 4))], "indexes": [10**6000]},
        {10**6000: [[0, 0, 1, 1]]},
        {"000005": [[0, 0, 1, 10**6000]]},
        [{"image_id": 10**6000, "bbox": [0, 0, 1, 1]}],
        {"000005": np.array(None, object)},
    ],
)
def test_pickles_of_odd_values(tmp_path: Path, images: list[TaggedImage], content: object) -> None:
    with pytest.raises(InputError, match=r"boxes\.pkl"):
        read_proposals(write(tmp_path / "boxes.pkl", content), images)
