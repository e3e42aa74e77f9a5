"""The VOC reader: splits, tags, truth, and what it refuses."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from labelpenet import InputError
from labelpenet.data.images import voc_palette
from labelpenet.formats import open_annotated, open_tagged
from labelpenet.instances import masks_to_boxes
from tests.formats.kits import OBJECTS, SIZE, photograph, voc_kit, voc_xml

ANIMALS = Path(__file__).parents[2] / "../shared/data/voc-animals"
SIX = ["cat", "cow", "dog", "horse", "person", "sheep"]


def test_tags_come_from_all_objects_in_the_order_of_the_classes(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    images = open_tagged(year, "train")
    assert images.classes == ("cat", "dog")
    assert [(image.id, image.tags) for image in images.images] == [("a", (0, 1)), ("b", (1,)), ("d", ())]
    assert all(image.path.is_file() for image in images.images)
    assert any("1 of 3 images show none of the classes" in note for note in images.notes)
    swapped = open_tagged(year, "train", ["dog", "cat"])
    assert [image.tags for image in swapped.images] == [(0, 1), (0,), ()]


@pytest.mark.parametrize("below", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_any_folder_on_the_way_will_do(tmp_path: Path, below: str) -> None:
    year = voc_kit(tmp_path)
    assert open_tagged(tmp_path / below, "val") == open_tagged(year, "val")


def test_two_years_in_one_kit_are_named(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    for folder in ("Annotations", "JPEGImages"):
        (year.parent / "VOC2007" / folder).mkdir(parents=True)
    with pytest.raises(InputError, match="VOC2007, VOC2012"):
        open_tagged(year.parent)


def test_splits(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    (year / "ImageSets/Segmentation").mkdir()
    (year / "ImageSets/Segmentation/val.txt").write_text("c\n")
    (year / "ImageSets/Main/test.txt").write_text("b\n")
    own = tmp_path / "own.txt"
    own.write_text("# mine\nc\n\na\na\n")

    def ids(split: str | None) -> list[str]:
        return [image.id for image in open_tagged(year, split).images]

    assert ids("trainval") == ["a", "b", "d", "c"]
    assert ids("Segmentation/val") == ["c"]
    assert ids("cat_train") == ["a", "b", "d"]
    assert ids(str(own)) == ["c", "a"]
    assert ids(None) == ["a", "b", "d", "c"]
    with pytest.raises(InputError, match="no split 'nope'; available are test, train, val, Segmentation/val"):
        open_tagged(year, "nope")


def test_a_number_in_a_name_is_no_flag_where_there_is_such_a_photograph(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    for name, number in (("a", "a 1"), ("b", "x 2 3")):
        for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
            (year / folder / f"{number}.{suffix}").write_bytes((year / folder / f"{name}.{suffix}").read_bytes())
    (year / "ImageSets/Main/own.txt").write_text("a 1\nx 2 3 -1\nb  1\nd 1 # mine\n")
    images = open_tagged(year, "own")
    assert [image.id for image in images.images] == ["a 1", "x 2 3", "b", "d"]
    (note,) = [note for note in images.notes if "number" in note]
    assert note == "a 1: taken for photographs of that name, not a with a number"  # there is a photograph a, no x


def test_unknown_and_doubled_classes(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    with pytest.raises(InputError, match="unknown class 'catt'; known are bird, cat, dog"):
        open_tagged(year, "train", ["catt"])
    with pytest.raises(InputError, match="twice"):
        open_tagged(year, "train", ["cat", "cat"])
    # Known to the data set, only not to this split.
    images = open_tagged(year, "train", ["bird", "cat"])
    assert "no image shows bird" in images.notes


def test_test_photographs_need_no_annotation(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    names = ["b", "d"]
    (year / "ImageSets/Main/test.txt").write_text("b\nd\n")
    for name in names:
        (year / f"Annotations/{name}.xml").unlink()
    annotated = open_annotated(year, "test", ["cat", "dog"])
    assert [(image.id, image.tags) for image in annotated.tagged.images] == [(name, ()) for name in names]
    assert "2 images of test have no annotation; they can be predicted, not measured" in annotated.tagged.notes
    with pytest.raises(InputError, match=r"b\.xml: no such annotation"):
        annotated.read(names[0])
    with pytest.raises(InputError, match="unknown class 'catt'"):
        open_tagged(year, "test", ["catt"])
    (year / "ImageSets/Main/val.txt").write_text("b\n")  # of another list the annotation is asked for
    with pytest.raises(InputError, match="no such annotation"):
        open_tagged(year, "val", ["cat", "dog"])
    for path in (year / "Annotations").iterdir():
        path.unlink()
    assert open_tagged(year, "test", ["dog", "cat"]).classes == ("dog", "cat"), "a folder of test images alone"


def test_truth_boxes_flags_masks_and_classes(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    annotated = open_annotated(year, "train", ["dog", "cat"])
    assert annotated.tagged == open_tagged(year, "train", ["dog", "cat"])
    truths = annotated.truths()
    a = truths["a"]
    assert a.instances.image_size == SIZE
    assert a.instances.boxes.tolist() == [[0, 0, 10, 8], [10, 4, 30, 20]]
    assert a.instances.labels.tolist() == [1, 0]
    assert a.instances.weights.tolist() == [1, 1]
    assert a.difficult.tolist() == [False, False]
    assert a.crowd.tolist() == [False, False]
    assert a.instances.masks is not None
    assert torch.equal(masks_to_boxes(a.instances.masks), a.instances.boxes)
    assert a.semantic is not None
    expected = np.zeros(SIZE, np.uint8)
    expected[0:8, 0:10], expected[4:20, 10:30], expected[8, 0:10] = 2, 1, 255
    assert np.array_equal(a.semantic, expected)
    assert truths["b"].difficult.tolist() == [True]
    assert truths["b"].instances.masks is None
    assert truths["b"].semantic is None
    assert len(truths["d"].instances) == 0


def test_an_image_of_another_size_than_its_xml_says_is_not_measured(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    xml = year / "Annotations/a.xml"
    said = xml.read_text()
    xml.write_text(said.replace("<width>32</width><height>24</height>", "<width>24</width><height>32</height>"))
    with pytest.raises(InputError, match=r"a\.xml: annotated at 24 x 32 pixels, but a\.jpg has 32 x 24 \(upright\)"):
        open_annotated(year, "train").read("a")
    xml.write_text(said.replace("<width>32</width><height>24</height>", "<width>0</width><height>0</height>"))
    assert len(open_annotated(year, "train").read("a").instances) == 2  # as tools write it that do not know it


def test_flags_and_sizes_that_are_written_otherwise(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    xml = year / "Annotations/b.xml"
    said = xml.read_text()
    assert "<difficult>1<" in said
    xml.write_text(said.replace("<difficult>1<", "<difficult>True<"))
    assert open_annotated(year, "train").read("b").difficult.tolist() == [True]
    xml.write_text(said.replace("<width>32<", "<width>64.0<"))
    with pytest.raises(InputError, match=r"b\.xml: annotated at 64 x 24 pixels"):
        open_annotated(year, "train").read("b")


def test_a_class_left_out_becomes_background(tmp_path: Path) -> None:
    birds = open_annotated(voc_kit(tmp_path), "train", ["bird"])
    assert birds.read("a").instances.masks is not None  # its map shows that there is no bird; b has no map
    assert birds.read("b").instances.masks is None
    truth = open_annotated(tmp_path, "train", ["dog"]).read("a")
    assert truth.instances.labels.tolist() == [0]
    assert truth.instances.boxes.tolist() == [[10, 4, 30, 20]]
    assert truth.instances.masks is not None
    assert truth.instances.masks[0].sum() == 320
    assert truth.semantic is not None
    assert sorted(np.unique(truth.semantic)) == [0, 1, 255]
    assert (truth.semantic == 1).sum() == 320


def test_maps_in_colour_and_class_names_of_its_own(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    truth = open_annotated(year, "train").read("a")
    for folder in ("SegmentationObject", "SegmentationClass"):
        path = year / folder / "a.png"
        Image.fromarray(voc_palette()[np.asarray(Image.open(path))]).save(path)
    coloured = open_annotated(year, "train").read("a")
    assert np.array_equal(coloured.semantic, truth.semantic)  # type: ignore[arg-type]
    # A kit with its own class order says so in classes.txt or in CVAT's labelmap.txt.
    (year / "classes.txt").write_text("dog\ncat\n")
    contrary = open_annotated(year, "train").read("a")
    assert "classes.txt" in contrary.notes[0]
    assert contrary.semantic is None
    (year / "classes.txt").unlink()
    seven = "".join(f"c{i}:{i},0,0::\n" for i in range(7))
    (year / "labelmap.txt").write_text(
        f"# label:color_rgb:parts:actions\nbackground:0,0,0::\n{seven}cat:1,2,3::\nx:::\ny:::\nz:::\ndog:4,5,6::\n"
    )
    assert np.array_equal(open_annotated(year, "train").read("a").semantic, truth.semantic)  # type: ignore[arg-type]


def test_one_damaged_annotation_among_many_costs_one_image(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    (year / "Annotations/b.xml").write_text("<annotation><object><name>dog</name>")
    images = open_tagged(year, "train")
    assert [image.id for image in images.images] == ["a", "d"]
    assert any("b.xml" in note for note in images.notes)
    assert "1 of 3 images are skipped" in images.notes
    for name in "ad":
        (year / f"Annotations/{name}.xml").unlink()
    with pytest.raises(InputError, match="no image can be used"):
        open_tagged(year, "train")


def test_how_many_images_count_for_boxes_alone_is_said(tmp_path: Path) -> None:
    annotated = open_annotated(voc_kit(tmp_path), "train")
    truths, notes = annotated.readable_truths()
    boxes_only = sum(truth.instances.masks is None for truth in truths.values())
    assert 0 < boxes_only < len(truths)
    assert f"{boxes_only} images have no true masks: what needs masks is measured on the others" in notes
    _, notes = annotated.where(lambda image: truths[image.id].instances.masks is None).readable_truths()
    assert not any("true masks" in note for note in notes)


def test_a_damaged_box_costs_itself_not_its_image(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    boxes = [(3, 4, 99, 18), (5, 5, 4, 9), (40, 1, 50, 9), (2, 2, 9, 9)]
    (year / "Annotations/b.xml").write_text(voc_xml([("dog", box, 0) for box in boxes]).replace(">50<", ">wide<"))
    truths, notes = open_annotated(year, "train").readable_truths()
    assert list(truths) == ["a", "b", "d"]
    assert truths["b"].instances.boxes.tolist() == [[2, 3, 32, 18], [1, 1, 9, 9]]
    assert [word in note for word, note in zip(("is cut there", "no area", "four numbers"), notes, strict=False)] == [
        True
    ] * 3
    assert notes[3] == "3 objects or masks are cut or left out"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("third", "holds object 3, but the XML names 2"),
        ("swapped", "outside its box"),
        ("size", "10 x 10 pixels, but its image has 32 x 24"),
        ("text", "cannot be read"),
    ],
)
def test_a_map_that_cannot_belong_to_the_xml(tmp_path: Path, change: str, words: str) -> None:
    year = voc_kit(tmp_path)
    path = year / "SegmentationObject/a.png"
    indices = np.array(Image.open(path))
    if change == "third":
        indices[0, 0] = 3
    elif change == "swapped":
        indices = np.array([0, 2, 1], np.uint8)[np.where(indices == 255, 0, indices)]
    elif change == "size":
        indices = indices[:10, :10]
    Image.fromarray(indices).save(path)
    if change == "text":
        path.write_text("no image")
    truth = open_annotated(year, "train").read("a")
    assert truth.instances.boxes.tolist() == [[0, 0, 10, 8], [10, 4, 30, 20]]
    assert truth.instances.masks is None
    assert truth.semantic is None
    assert words in truth.notes[0]


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "document type or entity"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "document type or entity"),
        ("<annotation><object><name> </name></object></annotation>", "without a name"),
        ("", "no valid XML"),
    ],
)
def test_hostile_or_empty_xml(tmp_path: Path, xml: str, words: str) -> None:
    year = voc_kit(tmp_path)
    (year / "Annotations/c.xml").write_text(xml)
    with pytest.raises(InputError, match=words):
        open_tagged(year, "val")


def test_no_name_leads_out_of_the_data_set(tmp_path: Path) -> None:
    year = voc_kit(tmp_path)
    outside = tmp_path / "secret"
    (outside).mkdir()
    (year / "JPEGImages/c.jpg").rename(outside / "c.jpg")
    for name in ("../../../secret/c", str(outside / "c"), "..\\..\\c"):
        (year / "ImageSets/Main/val.txt").write_text(f"{name}\n")
        with pytest.raises(InputError, match="no image can be used"):
            open_tagged(year, "val")
    (year / "ImageSets/Main/val.txt").write_text("c\n")
    (year / "JPEGImages/c.jpg").symlink_to(outside / "c.jpg")
    with pytest.raises(InputError, match="leaves"):
        open_tagged(year, "val")


@pytest.mark.skipif(not ANIMALS.is_dir(), reason="needs the real photographs")
@pytest.mark.photographs
def test_voc_animals() -> None:
    images = open_tagged(ANIMALS, "val", SIX)
    assert len(images.images) == 437
    assert images.classes == tuple(SIX)
    assert images.notes == ()
    annotated = open_annotated(ANIMALS, "val", SIX)
    some = [annotated.read(image.id) for image in annotated.tagged.images[:60]]
    assert any(truth.instances.masks is not None for truth in some)
    for image, truth in zip(annotated.tagged.images, some, strict=False):
        truth.instances.validate(6)
        assert set(truth.instances.labels.tolist()) <= set(image.tags)


def beside(folder: Path) -> Path:
    """The photographs a to d with their XML in one folder, as labelImg leaves them; nobody has looked at e."""
    for seed, (name, objects) in enumerate(OBJECTS.items()):
        photograph(folder / f"{name}.jpg", seed=seed)
        (folder / f"{name}.xml").write_text(voc_xml(objects))
    photograph(folder / "e.png")
    return folder


def test_xml_beside_the_photographs_is_read(tmp_path: Path) -> None:
    found = open_annotated(beside(tmp_path))
    kit = open_annotated(voc_kit(tmp_path / "kit"), "train", found.tagged.classes)
    assert found.tagged.classes == ("bird", "cat", "dog")
    tags = [("a.jpg", (1, 2)), ("b.jpg", (2,)), ("c.jpg", (0, 1)), ("d.jpg", ())]
    assert [(image.id, image.tags) for image in found.tagged.images] == tags
    assert any("1 photographs have no XML" in note for note in found.tagged.notes)
    for name in "abd":
        mine, voc = found.read(f"{name}.jpg"), kit.read(name)
        assert torch.equal(mine.instances.boxes, voc.instances.boxes) and torch.equal(mine.difficult, voc.difficult)
        assert mine.instances.masks is None
    (tmp_path / "val.txt").write_text("c.jpg\n")
    assert [image.id for image in open_tagged(tmp_path, "val").images] == ["c.jpg"]


def test_splits_in_folders_with_xml_beside_the_photographs(tmp_path: Path) -> None:
    beside(tmp_path / "train"), beside(tmp_path / "valid")
    assert open_tagged(tmp_path, "val").images[0].path == tmp_path / "valid" / "a.jpg"


def test_xml_beside_photographs_in_sub_folders_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    beside(tmp_path / "monday"), photograph(tmp_path / "tuesday" / "f.jpg", seed=9)
    found = open_tagged(tmp_path)
    assert found.classes == ("monday", "tuesday")
    assert any("4 images have an XML file beside them, which is not read" in note for note in found.notes)
    (tmp_path / "clean/cat").mkdir(parents=True), (tmp_path / "clean/dog").mkdir()
    for name in ("cat", "dog"):
        photograph(tmp_path / "clean" / name / "a.jpg")
    assert not any("XML" in note for note in open_tagged(tmp_path / "clean").notes)


def test_xml_beside_the_photographs_that_cannot_be_used_costs_its_photograph(tmp_path: Path) -> None:
    beside(tmp_path)
    (tmp_path / "gone.xml").write_text(voc_xml([]))
    (tmp_path / "e.xml").write_text("<annotations/>")
    (tmp_path / "b.xml").write_text("<annotation")
    photograph(tmp_path / "a.png")
    found = open_tagged(tmp_path)
    assert [image.id for image in found.images] == ["c.jpg", "d.jpg"]
    said = " ".join(found.notes)
    assert "4 of 6 images are skipped" in said and "a.xml: must have one photograph" in said
    (tmp_path / "a.xml").unlink()
    said = " ".join(open_tagged(tmp_path).notes)
    assert all(word in said for word in ("b.xml: no valid XML", "e.xml: no annotation", "gone.xml: must have"))


def test_a_small_part_with_xml_beside_the_photographs_need_not_show_every_class(tmp_path: Path) -> None:
    beside(tmp_path / "train"), beside(tmp_path / "valid")
    for name in "acd":
        (tmp_path / "valid" / f"{name}.xml").unlink()
    for data, split in ((tmp_path, "val"), (tmp_path / "valid", None)):
        annotated = open_annotated(data, split, ["cat", "dog"])
        assert annotated.read("b.jpg").instances.labels.tolist() == [1]
        with pytest.raises(InputError, match="unknown class 'cow'; known are bird, cat, dog"):
            open_annotated(data, split, ["cow"])


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_xml_beside_a_photograph_in_the_other_form_of_unicode(tmp_path: Path, forms: tuple[str, str]) -> None:
    photo, xml = (unicodedata.normalize(form, "größe é") for form in forms)
    photograph(tmp_path / f"{photo}.jpg")
    (tmp_path / f"{xml}.xml").write_text(voc_xml(OBJECTS["a"]))
    annotated = open_annotated(tmp_path)
    assert [image.tags for image in annotated.tagged.images] == [(0, 1)]
    assert annotated.read(f"{photo}.jpg").instances.labels.tolist() == [0, 1]
