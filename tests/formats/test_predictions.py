"""predictions.json: round trips, what other tools write, and every way it can be wrong."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO

from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.images import find_images
from labelpenet.errors import InputError
from labelpenet.formats import Predictions, read_predictions, write_predictions
from labelpenet.formats.rows import coco_lists
from labelpenet.instances import CompactMasks, Instances, check_segmentation

from .photographs import CLASSES, assert_same, instances, photographs, predictions
from .test_reader_fuzz import forged, mutated

NAMES = ("2008_000001.jpg", "2008_000002.jpg", "2009_000007.jpg")
IDS = (17, 3, 5)


def saved(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("names", [NAMES, ("cat/1.png", "dog/1.png", "dog/2.png")])
@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_what_is_written_is_read(tmp_path, names, numbers, masks):
    images = photographs(tmp_path, names, numbers)
    found = predictions(images, masks)
    path = write_predictions(tmp_path / "new" / "predictions.json", found, images, CLASSES, IDS)
    read = read_predictions(path, images, CLASSES, IDS)
    assert list(read) == list(found)
    assert read.notes == ()
    for name in found:
        assert_same(read[name], found[name])
    assert [entry.name for entry in path.parent.iterdir()] == ["predictions.json"]  # no temporary file is left


def test_a_generator_can_be_written_and_the_order_of_classes_may_differ_in_reading(tmp_path):
    images = photographs(tmp_path, NAMES)
    found = predictions(images)
    path = write_predictions(tmp_path / "p.json", ((name, one) for name, one in found.items()), images, CLASSES)
    turned = read_predictions(path, images, CLASSES[::-1], (1, 2, 3))
    for name in found:
        assert (2 - turned[name].labels).tolist() == found[name].labels.tolist()


def test_a_photograph_of_its_own_name_is_not_taken_for_one_of_that_name_in_a_folder(tmp_path):
    images = photographs(tmp_path, ("sub/a.jpg", "b/a.jpg"))
    every = (*images.images, TaggedImage("a.jpg", images.images[0].path, ()))
    found = {image.id: instances((10 + k % 2, 14), k) for k, image in enumerate(every)}
    path = write_predictions(tmp_path / "p.json", found, every, CLASSES)
    read = read_predictions(path, images.images[:1], CLASSES)
    assert list(read) == ["sub/a.jpg"] and "2 of its 3 images are not asked for" in read.notes[0]
    assert_same(read["sub/a.jpg"], found["sub/a.jpg"])


def test_a_photograph_of_its_own_name_is_not_taken_for_one_of_another_suffix_in_a_folder(tmp_path):
    """Two photographs, told by their suffix, and a data set that calls the first by its folder."""
    images = photographs(tmp_path, ("sub/a.jpg",))
    every = [TaggedImage(name, images.images[0].path.with_name(name), ()) for name in ("a.png", "a.jpg", "a.webp")]
    found = {image.id: instances((10, 14), k) for k, image in enumerate(every)}
    path = write_predictions(tmp_path / "p.json", found, every, CLASSES)
    read = read_predictions(path, images, CLASSES)
    assert list(read) == ["sub/a.jpg"] and "2 of its 3 images are not asked for" in read.notes[0]
    assert_same(read["sub/a.jpg"], found["a.jpg"])
    path = write_predictions(tmp_path / "q.json", {"a.png": found["a.png"]}, every[:1], CLASSES)
    assert list(read_predictions(path, images, CLASSES)) == ["sub/a.jpg"], "it may have been converted"


def test_of_folders_that_share_a_name_no_photograph_gets_the_labels_of_the_others(tmp_path, monkeypatch):
    """What `labelpenet predict RUN A B` writes, asked for one of the folders, as cameras count in each anew."""
    monkeypatch.chdir(tmp_path)
    for folder in ("A", "B"):
        photographs(tmp_path / folder, ("1.jpg",))
    every = [TaggedImage(name, path, ()) for name, path in find_images([Path("A"), Path("B")])]
    found = {image.id: instances((10, 14), k) for k, image in enumerate(every)}
    path = write_predictions(tmp_path / "p.json", found, every, CLASSES)
    for image in every:
        one = TaggedImage("1.jpg", image.path, ())
        assert_same(read_predictions(path, [one], CLASSES)["1.jpg"], found[image.id])
    moved = (tmp_path / "B").rename(tmp_path / "C") / "1.jpg"
    with pytest.raises(InputError, match=r"both 1\.jpg; .* the folder that all lie in"):
        read_predictions(path, [TaggedImage("1.jpg", moved, ())], CLASSES)


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("images/train/1.jpg", False),
        ("train/1.jpg", False),
        ("1.jpg", True),
        ("val/1.jpg", True),
        ("C:\\me\\images\\val\\1.jpg", True),
        ("/home/me/images/val/1.jpg", True),
    ],
)
def test_of_a_path_the_folders_must_be_those_of_the_photograph(tmp_path, name, fits):
    images = photographs(tmp_path, ("images/val/1.jpg",))
    row = {"image_id": 1, "category_id": 17, "bbox": [1, 1, 2, 2], "score": 0.5}
    path = saved(tmp_path / "p.json", {"images": [{"id": 1, "file_name": name}], "annotations": [row]})
    if fits:
        assert list(read_predictions(path, images, CLASSES, IDS)) == ["images/val/1.jpg"]
    else:
        with pytest.raises(InputError, match="none of its images"):
            read_predictions(path, images, CLASSES, IDS)


def read_or_refused(path, images):
    """What there is to know of a file: why it is refused, or its notes and all instances."""
    try:
        found = read_predictions(path, images, CLASSES)
    except InputError as error:
        return str(error)
    parts = [(one.boxes, one.labels, one.weights, one.masks) for one in found.values()]
    plain = [[value if value is None else value.tolist() for value in part] for part in parts]
    return list(found), found.notes, [one.image_size for one in found.values()], plain


def test_a_file_whose_rows_are_read_when_asked_for_says_what_it_says_as_a_whole(tmp_path, monkeypatch):
    """Also where it was edited or damaged: a line cut, doubled or moved, a value replaced."""
    images, rng = photographs(tmp_path, NAMES), random.Random(3)
    path = write_predictions(tmp_path / "p.json", predictions(images), images, CLASSES)
    good, refused, by_line = path.read_bytes(), 0, 0
    for case in range(150):
        lines = good.splitlines(keepends=True)
        number = rng.randrange(len(lines))
        if case % 3 == 1:
            lines[number] = b"".join([lines[number]] * rng.choice([0, 2]))
        elif case % 3 == 2 and lines[number].startswith(b"{") and len(lines[number]) > 2:
            row = forged(json.loads(lines[number].rstrip(b",\n")), rng)
            lines[number] = json.dumps(row).encode() + lines[number][len(lines[number].rstrip(b",\n")) :]
        elif case:
            rng.shuffle(lines) if case % 2 else lines.sort()
        path.write_bytes(b"".join(lines) if case % 6 else mutated(good, rng) if case else good)
        by_line += coco_lists(path) is not None
        lazy = read_or_refused(path, images)
        with monkeypatch.context() as patched:
            patched.setattr("labelpenet.formats.predictions.coco_lists", lambda path: None)
            assert read_or_refused(path, images) == lazy
        refused += isinstance(lazy, str)
    assert refused > 20 and 20 < by_line < 140


def test_a_file_may_be_replaced_or_removed_while_it_is_read_but_not_written_to(tmp_path):
    images = photographs(tmp_path, NAMES)
    path = write_predictions(tmp_path / "p.json", predictions(images), images, CLASSES)
    found, good = read_predictions(path, images, CLASSES), path.read_bytes()
    path.write_bytes(good.replace(b'"score"', b' "score"'))
    with pytest.raises(InputError, match="has changed while it was read; start again"):
        list(found.values())
    path.write_bytes(good)
    found = read_predictions(path, images, CLASSES)
    known = list(found.values())
    write_predictions(path, {}, images, CLASSES)  # another one takes its place
    for before, after in zip(known, found.values(), strict=True):
        assert_same(before, after)
    path.unlink()
    for before, after in zip(known, found.values(), strict=True):
        assert_same(before, after)


def test_pycocotools_reads_the_file(tmp_path):
    images = photographs(tmp_path, NAMES)
    found = predictions(images)
    path = write_predictions(tmp_path / "p.json", found, images, CLASSES)
    content = json.loads(path.read_text())
    for i, row in enumerate(content["annotations"]):
        row["id"] = i + 1
    coco = COCO(str(saved(tmp_path / "q.json", content)))
    for image in coco.loadImgs(coco.getImgIds()):
        name = image["file_name"].removesuffix(".jpg")
        rows = coco.loadAnns(coco.getAnnIds(image["id"]))
        masks: Any = found[name].masks
        assert masks is not None
        assert all((coco.annToMask(row) == mask.numpy()).all() for row, mask in zip(rows, masks, strict=True))


@pytest.mark.parametrize("kind", ["number", "id", "file name", "digits"])
def test_bare_results_list_of_another_tool(tmp_path, kind):
    images = photographs(tmp_path, NAMES, numbers=kind == "number")
    found = predictions(images)
    keys: Any = {
        "number": [100, 101, 102],
        "id": ["2008_000001", "2008_000002", "2009_000007"],
        "file name": list(NAMES),
        "digits": [2008000001, 2008000002, 2009000007],
    }[kind]
    rows = [row for key, one in zip(keys, found.values(), strict=True) for row in one.to_coco(key, IDS)]
    read = read_predictions(saved(tmp_path / "r.json", rows), images, CLASSES, IDS)
    assert list(read) == ["2008_000001", "2008_000002"]  # no row speaks of the third
    assert f"their numbers are taken as 17 {CLASSES[0]}, 3 {CLASSES[1]}, 5 {CLASSES[2]}" in read.notes[0]
    for name in read:
        assert_same(read[name], found[name])
    if kind == "number":  # that another photograph's name has the digits says nothing
        with pytest.raises(InputError, match="image_id '2008000001' is unknown"):
            read_predictions(saved(tmp_path / "r.json", [{**rows[0], "image_id": 2008000001}]), images, CLASSES, IDS)


def test_sizes_come_from_the_photograph_where_the_file_has_none(tmp_path):
    images = photographs(tmp_path, NAMES)
    row = {"image_id": "2008_000002", "category_id": 3, "bbox": [1, 2, 3, 4]}
    read = read_predictions(saved(tmp_path / "r.json", [row]), images, CLASSES, IDS)["2008_000002"]
    assert (read.image_size, read.masks, read.weights.tolist()) == ((11, 14), None, [1.0])
    assert (read.boxes.tolist(), read.labels.tolist()) == ([[1, 2, 4, 6]], [1])


def test_masks_without_boxes_polygons_and_uncompressed_runs(tmp_path):
    images = photographs(tmp_path, NAMES)
    mask = torch.zeros(1, 10, 14, dtype=torch.bool)
    mask[0, 2:5, 3:9] = True
    flat = mask[0].numpy().flatten(order="F")
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat.astype(int))) + 1), flat.size]).tolist()
    for segmentation in (
        CompactMasks.of((10, 14), mask.numpy()).encode()[0],
        [[3, 2, 9, 2, 9, 5, 3, 5]],
        {"size": [10, 14], "counts": runs},
    ):
        row = {"image_id": "2008_000001", "category_id": 17, "score": 0.5, "segmentation": segmentation}
        read = read_predictions(saved(tmp_path / "r.json", [row]), images, CLASSES, IDS)["2008_000001"]
        assert read.masks is not None
        assert torch.equal(read.masks, mask)
        assert read.boxes.tolist() == [[3, 2, 9, 5]]


def test_how_many_have_a_box_only_beside_masks_is_said(tmp_path):
    images = photographs(tmp_path, NAMES)
    box = {"image_id": NAMES[0], "category_id": 17, "score": 0.5, "bbox": [3, 2, 6, 3]}
    mask = {**box, "segmentation": [[3, 2, 9, 2, 9, 5, 3, 5]]}
    for rows, said in (([box, mask, box], True), ([box, box], False), ([mask], False)):
        notes = read_predictions(saved(tmp_path / "r.json", rows), images, CLASSES, IDS).notes
        assert any("2 of 3 instances have a box only, no mask" in note for note in notes) == said


def test_images_and_categories_that_are_not_asked_for_are_left_out_and_named(tmp_path):
    images = photographs(tmp_path, NAMES)
    found = predictions(images)
    path = write_predictions(tmp_path / "p.json", found, images, CLASSES)
    few = TaggedImages(("emu", "cat"), images.images[1:])
    read = read_predictions(path, few, ("emu", "cat"), (1, 2))
    assert list(read) == ["2008_000002", "2009_000007"]
    assert read["2008_000002"].labels.tolist() == [
        {0: 1, 2: 0}[label] for label in found["2008_000002"].labels.tolist() if label != 1
    ]
    assert "1 of its 3 images" in " ".join(read.notes)
    assert "category dog is not asked for" in " ".join(read.notes)


def test_scores_beyond_one_keep_their_order(tmp_path):
    images = photographs(tmp_path, NAMES)
    rows = [
        {"image_id": "2008_000001", "category_id": 17, "bbox": [1, 1, 2, 2], "score": score}
        for score in (-1, 0.5, 7, 3)
    ]
    read = read_predictions(saved(tmp_path / "r.json", rows), images, CLASSES, IDS)
    assert read["2008_000001"].weights.tolist() == pytest.approx([0, 1.5 / 8, 1, 0.5])
    assert "mapped onto [0, 1]" in read.notes[-1]


@pytest.mark.parametrize(
    "scores", [(-1.2e-5, -1.1e-5, -900), (0.99999998, 0.99999999, 0.5), (1e-46, 2e-46, 0), (1e308, 1e308 * 0.999999, 0)]
)
def test_scores_that_float32_does_not_tell_apart_keep_their_order(tmp_path, scores):
    images = photographs(tmp_path, NAMES)
    rows = [
        {"image_id": "2008_000001", "category_id": 17, "bbox": [1, 1, 2, 2], "score": score} for score in (*scores, 0.5)
    ]
    weights = read_predictions(saved(tmp_path / "r.json", rows), images, CLASSES, IDS)["2008_000001"].weights
    assert weights.dtype == torch.float32 and float(weights.min()) >= 0 and float(weights.max()) <= 1
    before, after = np.array([row["score"] for row in rows]), weights.numpy()
    assert (np.sign(before[:, None] - before) == np.sign(after[:, None] - after)).all()


def test_a_results_list_may_hold_categories_that_are_not_asked_for(tmp_path):
    images = photographs(tmp_path, NAMES)
    row = {"image_id": "2008_000001", "category_id": 17, "bbox": [1, 1, 2, 2], "score": 0.5}
    path = saved(tmp_path / "r.json", [row, {**row, "category_id": 90}])
    with pytest.raises(InputError, match="category_id '90' is unknown"):
        read_predictions(path, images, CLASSES, IDS)
    assert len(read_predictions(path, images, CLASSES, IDS, others=[90])["2008_000001"]) == 1


def test_boxes_that_leave_their_photograph_are_announced(tmp_path):
    images = photographs(tmp_path, NAMES)
    height, width = next(iter(predictions(images).values())).image_size
    for box, count in (([0, 0, width, height], 0), ([5, 5, width, height], 1)):  # the latter was x1, y1, x2, y2
        path = saved(tmp_path / "p.json", [{"image_id": NAMES[0], "category_id": 1, "bbox": box}])
        notes = read_predictions(path, images, CLASSES).notes
        assert any(f"{count} boxes leave their photograph" in note for note in notes) == bool(count)


def test_a_prediction_without_area_survives(tmp_path):
    """An empty mask has the box 0, 0, 0, 0; it must count as a wrong detection, so it may not vanish."""
    images = photographs(tmp_path, NAMES)
    nothing = Instances(
        torch.zeros(1, 4), torch.tensor([1]), torch.tensor([0.5]), (10, 14), torch.zeros(1, 10, 14).bool()
    )
    path = write_predictions(tmp_path / "p.json", {"2008_000001": nothing}, images, CLASSES)
    assert_same(read_predictions(path, images, CLASSES, (1, 2, 3))["2008_000001"], nothing)


RUNS = CompactMasks.of((10, 14), np.ones((1, 10, 14), bool)).encode()[0]
GOOD = {"image_id": "2008_000001", "category_id": 17, "bbox": [1, 1, 2, 2], "score": 0.5, "segmentation": RUNS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "nobody"}, "row 1: image_id 'nobody' is unknown"),
        ({"image_id": None}, "neither a whole number nor text"),
        ({"image_id": [1]}, "neither a whole number nor text"),
        ({"category_id": 99}, r"row 1: category_id '99' is unknown; known are 17, 3, 5"),
        ({"category_id": {}}, "neither a whole number nor text"),
        ({"bbox": [1, 2, 3]}, "bbox must be four numbers"),
        ({"bbox": "1 2 3 4"}, "bbox must be four numbers"),
        ({"bbox": [1, 2, None, 4]}, "'None' is no finite number"),
        ({"bbox": [1, 2, float("nan"), 4]}, "'nan' is no finite number"),
        ({"bbox": [1, 2, 10**400, 4]}, "no finite number"),
        ({"bbox": [1, 2, -3, 4]}, "negative side"),
        ({"bbox": [14, 2, 3, 4]}, "outside the image of 14 x 10 pixels"),
        ({"bbox": [1, 2, 1e9, 4]}, "far outside"),
        ({"score": float("nan")}, "score: 'nan' is no finite number"),
        ({"score": "high"}, "score: 'high' is no finite number"),
        ({"score": True}, "score: 'True' is no finite number"),
        ({"segmentation": {"size": [10, 13], "counts": RUNS["counts"]}}, r"RLE of size \[10, 13\] on an image of"),
        ({"segmentation": {"size": [10, 14], "counts": "11"}}, "damaged RLE"),
        ({"segmentation": {"size": [10, 14], "counts": "zzzz"}}, "damaged RLE"),
        ({"segmentation": {"size": [10, 14], "counts": "ä"}}, "damaged RLE"),
        ({"segmentation": {"size": [10, 14], "counts": [0, -140, 280]}}, "damaged RLE"),
        ({"segmentation": {"counts": RUNS["counts"]}}, "RLE of size None"),
        ({"segmentation": "mask.png"}, "polygons, or RLE"),
        ({"segmentation": [[1, 2, 3]]}, "a polygon must be"),
        ({"segmentation": [[1, 2, 3, 4, 1e12, 3]]}, "a polygon leaves the image"),
        ({"bbox": None, "segmentation": None}, "neither bbox nor segmentation"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    images = photographs(tmp_path, NAMES)
    path = saved(tmp_path / "r.json", [GOOD, {**GOOD, **change}])
    with pytest.raises(InputError, match=message) as caught:
        read_predictions(path, images, CLASSES, IDS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("3", "expected a COCO results list"),
        ("[3]", "expected a COCO results list"),
        ("{}", "expected a COCO results list"),
        ('{"annotations": [], "images": 3}', "images must be a list of objects with an id"),
        ('{"annotations": [], "images": [{"id": 1}, {"id": 1}]}', "two images have the id 1"),
        ('{"annotations": [], "images": [{"id": 1, "file_name": 3}]}', "file_name of image 1 is no text"),
        ('{"annotations": [], "images": [{"id": 1, "file_name": "x.jpg"}]}', "none of its images .first: x.jpg. is in"),
        (
            '{"annotations": [], "categories": [{"id": 1, "name": "gnu"}]}',
            "none of its categories .gnu. is among cat, dog",
        ),
        ('{"annotations": [], "categories": [{"id": 1, "name": 2}]}', "name of category 1 is no text"),
        (
            '{"annotations": [], "images": [{"id": 1, "file_name": "2008_000001.jpg", "width": 0, "height": 3}]}',
            "no size of an image",
        ),
        (
            '{"annotations": [], "images": [{"id": 1, "file_name": "y/2008_000001.jpg"}, {"id": 2, "file_name": '
            '"x/2008_000001.jpg"}]}',
            "two of its images are both 2008_000001",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    images = photographs(tmp_path, NAMES)
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_predictions(path, images, CLASSES, IDS)
    assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        read_predictions(tmp_path / "missing.json", images, CLASSES, IDS)


def test_writing_never_leaves_half_a_file(tmp_path):
    images = photographs(tmp_path, NAMES)
    path = write_predictions(tmp_path / "p.json", predictions(images), images, CLASSES)
    before = path.read_bytes()
    bad = instances((10, 14), 0)
    bad.weights[0] = float("nan")
    with pytest.raises(InputError, match=r"2008_000001: .*NaN"):
        write_predictions(path, {"2008_000001": bad}, images, CLASSES)
    with pytest.raises(ValueError, match="not among the 3 images"):
        write_predictions(path, {"nobody": bad}, images, CLASSES)
    assert path.read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_predictions(tmp_path / "file" / "p.json", {}, images, CLASSES)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from([*GOOD, "size", "counts"]), inner),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_does_anything_but_read_or_raise_an_input_error(tmp_path, data):
    """Any key of a good file replaced by junk, or removed."""
    images = TaggedImages(CLASSES, (TaggedImage("a", tmp_path / "a.jpg", (0,), 1),))
    content: Any = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 14, "height": 10}],
        "categories": [{"id": 17, "name": "cat"}],
        "annotations": [{**copy.deepcopy(GOOD), "image_id": 1}],
    }
    for _ in range(data.draw(st.integers(1, 2))):
        spot = content
        while isinstance(spot, (dict, list)) and len(spot):
            key = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
            if not isinstance(spot[key], (dict, list)) or not spot[key] or data.draw(st.booleans()):
                spot[key] = data.draw(junk)
                break
            spot = spot[key]
    if data.draw(st.booleans()):
        content = content["annotations"]
    try:
        read = read_predictions(saved(tmp_path / "r.json", content), images, CLASSES, (17, 3, 5))
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(read, Predictions)
    for one in read.values():
        assert bool(torch.isfinite(one.boxes).all())
        assert bool(((one.weights >= 0) & (one.weights <= 1)).all())


@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_run_totals_are_those_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 60, 2)
    mask = rng.random((height, width)) < rng.random() ** 2
    if rng.random() < 0.3:  # long runs, whose differences need several digits
        mask = np.repeat(np.repeat(mask, 40, 0), 40, 1)
    counts = rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    runs = check_segmentation({"size": [*mask.shape], "counts": counts}, mask.shape)
    assert runs is not None and runs.sum() == mask.size
    with pytest.raises(InputError, match="damaged RLE"):
        check_segmentation({"size": [*mask.shape], "counts": counts[:-1]}, mask.shape)
