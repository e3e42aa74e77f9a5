"""The COCO reader."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from labelpenet import InputError
from labelpenet.cli import main
from labelpenet.evaluation import evaluate
from labelpenet.formats import open_annotated, open_tagged
from tests.formats.kits import coco_content, coco_set, photograph

MINI = Path(__file__).parents[2] / "../shared/data/coco-mini"


def test_tags_numbers_and_notes(tmp_path: Path) -> None:
    path = coco_set(tmp_path)
    images = open_tagged(path)
    assert images == open_tagged(tmp_path)
    assert images.classes == ("cat",)
    assert [(image.id, image.number, image.tags) for image in images.images] == [
        ("x.jpg", 7, (0,)),
        ("sub/y.jpg", 9, ()),
    ]
    assert any("only as a crowd" in note for note in images.notes)
    assert open_tagged(path, classes=["person", "cat"]).images[0].tags == (1,)
    with pytest.raises(InputError, match="unknown class 'cow'; known are cat, dog, person"):
        open_tagged(path, classes=["cow"])


def test_a_split_names_photographs_whose_names_hold_blanks(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "x 1.jpg"
    coco_set(tmp_path, content)
    photograph(tmp_path / "images" / "x 1.jpg")
    content["images"][1]["file_name"] = "./sub\\y.jpg"
    coco_set(tmp_path, content)
    (tmp_path / "few.txt").write_text("# mine\nx 1.jpg\nsub/y.jpg  -1\nz.jpg\n")
    few = open_tagged(tmp_path, "few")
    assert [image.id for image in few.images] == ["x 1.jpg", "sub/y.jpg"]
    assert "1 lines of few.txt name no image of instances.json" in few.notes


def test_truth_polygons_run_lengths_and_crowd(tmp_path: Path) -> None:
    annotated = open_annotated(coco_set(tmp_path), classes=["person", "cat"])
    assert annotated.categories == (8, 5)
    truth = annotated.read("x.jpg")
    assert truth.instances.labels.tolist() == [1, 0]
    assert truth.instances.boxes.tolist() == [[2, 3, 12, 11], [0, 0, 2, 24]]
    assert truth.crowd.tolist() == [False, True]
    assert truth.difficult.tolist() == [False, False]
    assert truth.instances.masks is not None
    polygon = rle.decode(rle.merge(rle.frPyObjects(coco_content()["annotations"][0]["segmentation"], 24, 32)))
    assert np.array_equal(truth.instances.masks[0].numpy(), polygon.astype(bool))
    assert truth.instances.masks[1].sum() == 48
    assert truth.instances.masks[1][:, :2].all()
    assert len(annotated.read("sub/y.jpg").instances) == 0


@pytest.mark.parametrize("protocol", ["voc12", "coco"])
def test_what_is_found_in_a_photograph_without_objects_is_wrong_of_masks_too(tmp_path: Path, protocol: str) -> None:
    truths = open_annotated(coco_set(tmp_path), classes=["cat"]).truths()
    cat = truths["x.jpg"].instances
    sure = replace(cat, weights=torch.tensor([0.9]))
    found = {"x.jpg": replace(cat, weights=torch.tensor([0.5])), "sub/y.jpg": sure}
    result = evaluate(found, truths, ["cat"], protocol)
    assert [result["box"]["mAP"], result["mask"]["mAP@0.5"]] == pytest.approx([0.5, 0.5])
    assert open_annotated(tmp_path, classes=["cat"]).read("x.jpg").instances.labels.tolist() == [0]


def test_the_official_layout_and_its_splits(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        for name in ("x.jpg", "sub/y.jpg"):
            photograph(tmp_path / split / name)
        path = tmp_path / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco_content()))
    for split in ("val", "val2017"):
        assert open_tagged(tmp_path, split).images[0].path == tmp_path / "val2017" / "x.jpg"
    with pytest.raises(InputError, match="train2017, val2017"):
        open_tagged(tmp_path)


def test_a_split_of_a_single_file(tmp_path: Path) -> None:
    path = coco_set(tmp_path)
    assert "instances.json has no splits: all its images are used as 'val'" in open_tagged(path, "val").notes
    (tmp_path / "some.txt").write_text("9\n")
    assert [image.id for image in open_tagged(path, str(tmp_path / "some.txt"), ["cat"]).images] == ["sub/y.jpg"]
    assert [image.id for image in open_tagged(path, "some", ["cat"]).images] == ["sub/y.jpg"]


@pytest.mark.parametrize(
    ("name", "split", "whole"),
    [("trainval", "val", True), ("val2017", "train", True), ("val2017", "val", False), ("val2017", "val2017", False)],
)
def test_it_is_said_where_a_single_file_is_not_of_the_split(tmp_path: Path, name: str, split: str, whole: bool) -> None:
    path = coco_set(tmp_path).rename(tmp_path / f"instances_{name}.json")
    note = f"{path.name} has no splits: all its images are used as {split!r}"
    assert (note in open_tagged(tmp_path, split).notes) == whole


def test_a_line_of_a_split_that_may_be_two_images_is_refused_and_stems_will_do(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "9.jpg"  # and 9 is the id of the other
    coco_set(tmp_path, content)
    photograph(tmp_path / "images" / "9.jpg")
    (tmp_path / "few.txt").write_text("9\n")
    with pytest.raises(InputError, match=r"few\.txt: 9 may be several images of instances\.json"):
        open_tagged(tmp_path, "few")
    for lines, expected in (("9.jpg\n", ["9.jpg"]), ("7\nsub/y\n", ["9.jpg", "sub/y.jpg"])):
        (tmp_path / "few.txt").write_text(lines)
        assert [image.id for image in open_tagged(tmp_path, "few", ["cat"]).images] == expected


def test_cocos_measure_takes_images_in_the_order_of_their_ids(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    box = {"category_id": 1, "bbox": [2, 2, 8, 8], "iscrowd": 0, "area": 64}
    content = {
        "images": [{"id": 2, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}],
        "annotations": [{"id": number, "image_id": number, **box} for number in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    annotated = open_annotated(tmp_path)
    assert [image.id for image in annotated.tagged.images] == ["a.jpg", "b.jpg"]
    assert [image.id for image in annotated.by_number().tagged.images] == ["b.jpg", "a.jpg"]
    found = [{**box, "image_id": 2, "score": 0.5}, {**box, "bbox": [12, 12, 5, 5], "image_id": 1, "score": 0.5}]
    (tmp_path / "found.json").write_text(json.dumps(found))
    main(["evaluate", str(tmp_path / "found.json"), str(tmp_path / "instances.json"), "--protocol", "coco",
          "--json", str(tmp_path / "out.json")])  # fmt: skip
    truth = COCO(str(tmp_path / "instances.json"))
    reference = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
    for step in (reference.evaluate, reference.accumulate, reference.summarize):
        step()
    assert json.loads((tmp_path / "out.json").read_text())["box"]["mAP"] == pytest.approx(reference.stats[0])


def test_an_image_under_two_ids_has_the_annotations_of_both(tmp_path: Path) -> None:
    content = coco_content()
    content["images"].append({**content["images"][0], "id": 8})
    content["annotations"].append({"id": 3, "image_id": 8, "category_id": 3, "bbox": [12, 2, 5, 5]})
    annotated = open_annotated(coco_set(tmp_path, content), classes=["cat", "dog"])
    assert [(image.id, image.tags) for image in annotated.tagged.images] == [("x.jpg", (0, 1)), ("sub/y.jpg", ())]
    assert annotated.read("x.jpg").instances.labels.tolist() == [0, 1]
    assert any("image x.jpg stands there twice" in note for note in annotated.tagged.notes)


def test_a_category_of_no_use_may_be_called_as_the_only_class(tmp_path: Path) -> None:
    content = coco_content()
    cat = {"id": 5, "name": "cat", "supercategory": "cat"}
    content["categories"] = [{"id": 0, "name": "cat", "supercategory": "none"}, cat, content["categories"][2]]
    path = coco_set(tmp_path, content)
    assert open_tagged(path).classes == ("cat",) and open_annotated(path).categories == (5,)
    content["annotations"][1]["category_id"] = 0
    with pytest.raises(InputError, match="category 5 'cat' stands there twice; merge the two"):
        open_tagged(coco_set(tmp_path, content))


def test_an_image_folder_elsewhere(tmp_path: Path) -> None:
    path = coco_set(tmp_path / "here")
    (tmp_path / "here/images").rename(tmp_path / "there")
    with pytest.raises(InputError, match="give their folder"):
        open_tagged(path)
    assert len(open_tagged(path, images=tmp_path / "there").images) == 2
    with pytest.raises(InputError, match="no such image folder"):
        open_tagged(path, images=tmp_path / "nowhere")


def test_damaged_rows_cost_themselves(tmp_path: Path) -> None:
    content = coco_content()
    content["images"] += [
        {"id": 11, "file_name": "gone.jpg"},
        {"file_name": "x.jpg"},
        {"id": 7, "file_name": "again.jpg"},
        {"id": 12, "file_name": "../../x.jpg"},
        None,
    ]
    content["annotations"] += [{"image_id": 99, "category_id": 3}, {"image_id": 7, "category_id": 77}, 5, {}]
    images = open_tagged(coco_set(tmp_path, content))
    assert [image.id for image in images.images] == ["x.jpg", "sub/y.jpg"]
    assert "8 rows are skipped" in images.notes
    assert "1 of 3 images are skipped" in images.notes


@pytest.mark.parametrize(
    ("change", "words", "box"),
    [
        ({"bbox": [0, 0, 99, 5]}, "leaves the 32 x 24 pixels and is cut there", [0, 0, 32, 5]),
        ({"bbox": [0, 0, 0, 5]}, "has no area; the mask's is used", [2, 3, 12, 11]),
        ({"bbox": [40, 0, 5, 5]}, "has no area; the mask's is used", [2, 3, 12, 11]),
        ({"bbox": [0, 0, 0, 5], "segmentation": None}, "has no area; it is left out", None),
        ({"bbox": [40, 0, 5, 5], "segmentation": []}, "outside the 32 x 24 pixels of the image; it is left out", None),
        ({"bbox": [0, 0, float("nan"), 5], "segmentation": []}, "needs a box of four numbers", None),
        ({"bbox": [0, 0, 10**400, 5], "segmentation": []}, "needs a box of four numbers", None),
        ({"bbox": "box", "segmentation": []}, "needs a box of four numbers", None),
        ({"bbox": ["1", "2", "3", "4"], "segmentation": []}, "needs a box of four numbers", None),
        (
            {"segmentation": {"size": [24, 32], "counts": [5]}},
            "damaged RLE.*no mask of its photograph",
            [2, 3, 12, 11],
        ),
        ({"segmentation": [[0, 0, 1]]}, "polygon.*no mask of its photograph", [2, 3, 12, 11]),
        ({"segmentation": [[10**400] * 6]}, "a polygon must be.*no mask of its photograph", [2, 3, 12, 11]),
        ({"segmentation": {"size": [10**6, 10**6], "counts": [10**12]}}, "RLE of size", [2, 3, 12, 11]),
    ],
)
def test_damaged_truth_costs_itself_and_is_said(tmp_path: Path, change: dict[str, Any], words: str, box: Any) -> None:
    content = coco_content()
    content["annotations"][0].update(change)
    truths, notes = open_annotated(coco_set(tmp_path, content), None, ["cat", "person"]).readable_truths()
    assert list(truths) == ["x.jpg", "sub/y.jpg"]
    found = truths["x.jpg"].instances
    assert found.boxes.tolist() == ([] if box is None else [box]) + [[0, 0, 2, 24]]
    assert (found.masks is None) == ("no mask" in words or "RLE of size" in words)
    assert re.search(f"instances.json: image x.jpg: annotation 1: .*{words}", notes[0])
    assert notes[-1] == "1 objects or masks are cut or left out"


def test_an_image_of_another_size_than_annotated(tmp_path: Path) -> None:
    path = coco_set(tmp_path)
    Image.new("RGB", (24, 32)).save(tmp_path / "images/x.jpg")
    with pytest.raises(InputError, match=r"annotated at 32 x 24 pixels, but x\.jpg has 24 x 32"):
        open_annotated(path).read("x.jpg")


def test_sizes_and_flags_that_are_written_as_floats_or_texts(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [{**row, "iscrowd": str(row.get("iscrowd", 0))} for row in content["annotations"]]
    path = coco_set(tmp_path, content)
    assert open_annotated(path, classes=["cat", "person"]).read("x.jpg").crowd.tolist() == [False, True]
    assert open_tagged(path).classes == ("cat",)
    for width in (31.0, "31"):
        content["images"][0]["width"] = width
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match="annotated at 31"):
            open_annotated(path).read("x.jpg")


@pytest.mark.parametrize(
    "content",
    [
        {"images": [], "annotations": [], "categories": []},
        {**coco_content(), "categories": [{"id": 1}]},
        {**coco_content(), "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]},
        {**coco_content(), "images": [{"id": 1, "file_name": "none.jpg"}]},
        {**coco_content(), "images": {}},
        [],
        [1, 2],
        {},
        None,
        "text",
    ],
)
def test_what_is_no_instances_file(tmp_path: Path, content: Any) -> None:
    path = coco_set(tmp_path)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError):
        open_tagged(path)


@pytest.mark.skipif(not MINI.is_dir(), reason="needs the real photographs")
@pytest.mark.photographs
def test_coco_mini_as_pycocotools_reads_it() -> None:
    annotated = open_annotated(MINI)
    content = json.loads((MINI / "instances.json").read_text())
    assert len(annotated.tagged.images) == 80
    seen = 0
    for image in annotated.tagged.images[:25]:
        truth = annotated.read(image.id)
        rows = [row for row in content["annotations"] if row["image_id"] == image.number]
        rows = [row for row in rows if row["category_id"] in annotated.categories]
        assert len(truth.instances) == len(rows)
        for i, row in enumerate(rows):
            height, width = truth.instances.image_size
            encoded = rle.frPyObjects(row["segmentation"], height, width)
            mask = rle.decode(rle.merge(encoded) if isinstance(encoded, list) else encoded)
            assert truth.instances.masks is not None
            assert torch.equal(truth.instances.masks[i], torch.from_numpy(mask.astype(bool)))
            assert annotated.categories[int(truth.instances.labels[i])] == row["category_id"]
            seen += 1
    assert seen > 100


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_and_lists_in_the_other_form_of_unicode(tmp_path: Path, forms: tuple[str, str]) -> None:
    ours, disk = (unicodedata.normalize(form, "größe é.jpg") for form in forms)
    content = coco_content()
    content["images"] = [{**content["images"][0], "file_name": ours}]
    photograph(coco_set(tmp_path, content).parent / "images" / disk)
    (tmp_path / "few.txt").write_text(f"{disk}\n")
    images = open_tagged(tmp_path, "few")
    assert [image.tags for image in images.images] == [(0,)]
    assert images.images[0].path == tmp_path / "images" / disk
