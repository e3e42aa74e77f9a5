"""Every layout of the corpus is read as meant, or refused in one line."""

from __future__ import annotations

import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from labelpenet import InputError
from labelpenet.formats import open_annotated, open_tagged
from tests.formats.corpus import (
    CAT,
    DOG,
    LAYOUTS,
    REFUSED,
    coco,
    flat_yolo,
    photographs,
    plain_yolo,
    write,
    yolo,
    yolo_box,
)
from tests.formats.kits import voc_xml


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    data = layout.write(tmp_path)
    images = open_tagged(data, layout.split, layout.classes)
    assert {one.id: tuple(images.classes[tag] for tag in one.tags) for one in images.images} == layout.tags
    assert all(one.path.as_posix().endswith(one.id) for one in images.images)
    if not layout.boxes:
        if "beside shapes" not in name:
            with pytest.raises(InputError, match="holds tags but no boxes or masks"):
                open_annotated(data, layout.split, layout.classes)
        return
    annotated = open_annotated(data, layout.split)
    assert annotated.tagged == images
    truths, notes = annotated.readable_truths()
    assert notes == ()
    first, second = (truth.instances for truth in truths.values())
    assert first.labels.tolist() == [0, 1]
    assert first.boxes.flatten().tolist() == pytest.approx([*CAT, *DOG], abs=1e-3)
    assert len(second) == 0
    assert (first.masks is not None) == layout.masks
    if first.masks is not None:
        for mask, (x1, y1, x2, y2) in zip(first.masks, (CAT, DOG), strict=True):
            assert int(mask.sum()) == int(mask[y1:y2, x1:x2].sum()) == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    write, split, words = REFUSED[name]
    with pytest.raises(InputError) as caught:
        open_tagged(write(tmp_path), split)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("fill", [plain_yolo, yolo("train: images/train\nnames: [cat, dog]\n")])
def test_yolo_labels_may_lie_beside_the_file_and_the_photographs_elsewhere(tmp_path: Path, fill: Any) -> None:
    data, elsewhere = fill(tmp_path / "data"), tmp_path / "elsewhere"
    shutil.move(data / "images", elsewhere / "images" if fill is not plain_yolo else elsewhere)
    annotated = open_annotated(data, None, None, elsewhere)
    (first,) = (one for one in annotated.tagged.images if one.path.name == "a.jpg")
    assert first.tags == (0, 1) and len(annotated.read(first.id).instances) == 2


def test_yolo_labels_beside_their_photographs_whatever_the_folder_is_called(tmp_path: Path) -> None:
    images = open_tagged(flat_yolo(tmp_path / "images"))
    assert {image.id: image.tags for image in images.images} == {"a.jpg": (0, 1), "b.jpg": ()}


def test_photographs_of_one_name_that_coco_has_elsewhere_are_not_mixed_up(tmp_path: Path) -> None:
    photographs(tmp_path / "images", "a.jpg", "b.jpg")
    write(tmp_path / "result.json", coco(("/home/one/a.jpg", "/home/two/a.jpg")))
    with pytest.raises(InputError, match="its images are in none of"):
        open_tagged(tmp_path)
    write(tmp_path / "result.json", coco(("/home/one/a.jpg", "b.jpg")))
    images = open_tagged(tmp_path)
    assert [one.id for one in images.images] == ["a.jpg", "b.jpg"] and "1 names of result.json" in images.notes[0]


def test_labels_beside_a_given_file_come_before_the_photographs_own(tmp_path: Path) -> None:
    data = plain_yolo(tmp_path / "data")
    write(data / "labels/b.txt", yolo_box(0, CAT))
    write(tmp_path / "fix/classes.txt", "cat\ndog\n")
    write(tmp_path / "fix/labels/a.txt", yolo_box(1, DOG))
    annotated = open_annotated(tmp_path / "fix", images=data / "images")
    assert annotated.tagged.classes == ("dog",)
    assert {one.id: one.tags for one in annotated.tagged.images} == {"a.jpg": (0,), "b.jpg": ()}
    assert annotated.read("a.jpg").instances.boxes.flatten().tolist() == pytest.approx(DOG, abs=1e-3)
    assert "1 images have no label file; as in YOLO, they show none of the classes" in annotated.tagged.notes


def test_a_photograph_with_an_xml_file_but_no_yolo_labels_is_no_negative(tmp_path: Path) -> None:
    write(flat_yolo(tmp_path) / "b.xml", voc_xml([("dog", (2, 2, 9, 9), 0)]))
    images = open_tagged(tmp_path)
    assert [one.id for one in images.images] == ["a.jpg"]
    assert any("b.xml: lies there, but no b.txt; keep one kind" in note for note in images.notes)


def test_a_yolo_label_file_is_not_given_to_two_photographs(tmp_path: Path) -> None:
    data = plain_yolo(tmp_path)
    shutil.copy(data / "images/a.jpg", data / "images/a.png")
    write(data / "labels/b.txt", yolo_box(0, CAT))
    images = open_tagged(data)
    assert [one.id for one in images.images] == ["images/b.jpg"]
    assert any("a.txt: may be of a.jpg or another of that name; rename one of them" in note for note in images.notes)


def test_a_class_that_yolo_names_twice_is_one_class_and_that_is_said(tmp_path: Path) -> None:
    images = open_tagged(yolo("train: images/train\nnames: [cat, cat]\n")(tmp_path))
    assert images.classes == ("cat",) and images.images[0].tags == (0,)
    assert "data.yaml names cat more than once; taken for one class" in images.notes


def test_a_split_of_yolo_that_lies_elsewhere_costs_itself_alone(tmp_path: Path) -> None:
    places = "".join(f"{split}: images/{split}\n" for split in ("train", "val", "test"))
    data = yolo(f"{places}names: [cat, dog]\n")(tmp_path)
    assert len(open_tagged(data, "train").images) == 2 and len(open_tagged(data).images) == 4
    with pytest.raises(InputError, match=r"data\.yaml: 'images/test' is not in"):
        open_tagged(data, "test")


def test_a_line_of_a_yolo_list_that_leads_out_is_named_with_its_file(tmp_path: Path) -> None:
    data = yolo("train: train.txt\nnames: [cat, dog]\n")(tmp_path)
    (data / "train.txt").write_text("./images/train/a.jpg\n/content/images/train/b.jpg\n")
    with pytest.raises(InputError, match=r"train\.txt: '/content/images/train/b\.jpg' is no path inside"):
        open_tagged(data)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_yolo_label_file_in_the_other_form_of_unicode_is_the_photographs(
    tmp_path: Path, forms: tuple[str, str]
) -> None:
    photo, label = (unicodedata.normalize(form, "größe é") for form in forms)
    flat_yolo(tmp_path)
    (tmp_path / "a.jpg").rename(tmp_path / f"{photo}.jpg")
    (tmp_path / "a.txt").rename(tmp_path / f"{label}.txt")
    annotated = open_annotated(tmp_path)
    assert {one.id: one.tags for one in annotated.tagged.images} == {"b.jpg": (), f"{photo}.jpg": (0, 1)}
    assert annotated.read(f"{photo}.jpg").instances.labels.tolist() == [0, 1]
