"""Labels that come back from a tool with copies of the photographs, whatever the export called these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from labelpenet.data.dataset import TaggedImage
from labelpenet.errors import InputError
from labelpenet.formats import export, open_annotated, open_tagged, read_predictions
from labelpenet.formats.corrected import read_corrected
from labelpenet.formats.open import open_photographs
from labelpenet.formats.review import Reviewed, write_review
from labelpenet.instances import Instances, masks_to_boxes

from .corpus import write
from .kits import photograph
from .photographs import CLASSES, photographs

NAMES = ("a #1.png", "sub/b c.jpg", "d.jpg", "x.jpg", "x.png")


def drawn(images: tuple[TaggedImage, ...]) -> dict[str, Instances]:
    """A rectangle of another width and class in each."""
    found = {}
    for k, image in enumerate(images):
        mask = torch.zeros(1, 10, 14, dtype=torch.bool)
        mask[:, 2:7, 1 : 4 + k] = True
        label = torch.tensor([k % len(CLASSES)])
        found[image.id] = Instances(masks_to_boxes(mask), label, torch.ones(1), (10, 14), mask)
    return found


def test_a_review_gives_accepted_photographs_alone_to_whatever_reads_it(tmp_path: Path) -> None:
    for name in NAMES[:3]:
        photographs(tmp_path / "photos", (name,))
    ours = open_photographs(tmp_path / "photos", CLASSES)
    rows = {name: one.to_coco(0) for name, one in drawn(ours.images).items()}
    first, second, third = rows
    said = {
        first: Reviewed("accepted", (10, 14), rows[first]),
        second: Reviewed("rejected", (10, 14), []),
        third: Reviewed("open", (10, 14), rows[third]),
    }
    file = write_review(tmp_path / "review.json", said, ours.images, CLASSES)
    read = read_predictions(file, ours, CLASSES)
    assert list(read) == [first] and read[first].weights.tolist() == [1]
    assert any("2 photographs of the review are not accepted" in note for note in read.notes)
    annotated = open_annotated(file, images=tmp_path / "photos")
    assert [image.id for image in annotated.tagged.images] == [first]
    assert any("2 photographs of the review are not accepted" in note for note in annotated.tagged.notes)
    write_review(file, {second: said[second]}, ours.images, CLASSES)
    with pytest.raises(InputError, match="no photograph was accepted"):
        read_predictions(file, ours, CLASSES)


@pytest.mark.parametrize(
    ("to", "back"),
    [
        ("coco", "."),
        ("coco-polygons", "annotations/instances_default.json"),
        ("yolo", "."),
        ("voc", "VOCdevkit/VOC2012"),
        ("labelme", "."),
    ],
)
@pytest.mark.parametrize("copies", [True, False])
def test_what_an_export_wrote_is_read_back_for_its_photographs_and_never_for_others(
    tmp_path: Path, to: Any, back: str, copies: bool
) -> None:
    if not copies and to in ("yolo", "voc"):
        pytest.skip("they hold their photographs")
    for name in NAMES:
        photographs(tmp_path / "photos", (name,))
    ours = open_photographs(tmp_path / "photos", CLASSES)
    truth = drawn(ours.images)
    export(truth, ours, CLASSES, tmp_path / "out", to, copy_images=copies)
    for path in (tmp_path / "out").rglob("*.json"):
        content = json.loads(path.read_text())
        if "flags" in content:
            path.write_text(json.dumps({**content, "flags": {"checked": True}}))
    found = read_corrected([tmp_path / "out" / back], ours)
    certain = {"a #1.png", "sub/b c.jpg", "d.jpg"}
    assert certain <= set(found.truths) and (copies or set(found.truths) == set(NAMES))
    for name, read in found.truths.items():
        one = read().instances
        assert one.labels.tolist() == truth[name].labels.tolist()
        assert one.masks is not None and torch.equal(one.masks, truth[name].masks)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("given", "labels"), [(".", "labels"), ("classes.txt", "labels"), ("classes.txt", ".")])
def test_of_yolo_labels_those_photographs_are_corrected_that_have_a_file(
    tmp_path: Path, own: bool, given: str, labels: str
) -> None:
    photographs(tmp_path / "data/images", ("a.jpg", "b.jpg", "c.jpg"))
    names = write(tmp_path / "fix/classes.txt", "cat\ndog\n").read_text()
    write(tmp_path / "fix" / labels / "a.txt", "1 .25 .25 .3 .3\n")
    write(tmp_path / "fix" / labels / "c.txt", "")
    if own:  # labels of the photographs' own, which are wrong
        write(tmp_path / "data/classes.txt", names)
        for index, name in enumerate("abc"):
            write(tmp_path / f"data/labels/{name}.txt", f"{index % 2} .5 .5 .2 .2\n")
    else:
        write(tmp_path / "data/tags.csv", "file,tags\na.jpg,cat\nb.jpg,dog\nc.jpg,cat\n")
    ours = open_tagged(tmp_path / "data")
    found = read_corrected([tmp_path / "fix" / given], ours)
    objects = {Path(name).name: read().instances.labels.tolist() for name, read in found.truths.items()}
    assert objects == {"a.jpg": [ours.classes.index("dog")], "c.jpg": []}


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("to", ["coco", "yolo", "voc"])
@pytest.mark.parametrize("names", [("a b.jpg", "a_b.jpg"), ("sub/x.jpg", "sub_x.jpg")])
def test_a_copy_never_brings_its_labels_to_the_photograph_of_its_name(
    tmp_path: Path, to: Any, names: Any, same: bool
) -> None:
    for number, name in enumerate(names):
        photograph(tmp_path / "photos" / name, (10, 14), seed=0 if same else number)
    ours = open_photographs(tmp_path / "photos", CLASSES)
    truth = drawn(ours.images)
    back = "VOCdevkit/VOC2012" if to == "voc" else "."
    for count in (2,) if same else (2, 1):  # all are exported, or only the one whose copy would have the other's name
        few = [one for one in ours.images if count == 2 or one.id == names[0]]
        export(truth, few, CLASSES, tmp_path / f"out{count}", to, copy_images=True)
        found = read_corrected([tmp_path / f"out{count}" / back], ours).truths
        assert set(found) == {image.id for image in few}
        for name, read in found.items():
            assert read().instances.labels.tolist() == truth[name].labels.tolist()


def test_labels_for_a_student_are_found_by_the_names_of_copies(tmp_path: Path) -> None:
    for number, name in enumerate(("my cat.JPG", "sub/it's.jpg", "a b.jpg", "a_b.jpg")):
        photograph(tmp_path / "photos" / name, (10, 14), seed=number)
    ours = open_photographs(tmp_path / "photos", CLASSES)
    truth = drawn(ours.images)
    export(truth, ours, CLASSES, tmp_path / "out", "coco", copy_images=True)
    read = read_predictions(tmp_path / "out/annotations/instances_default.json", ours, CLASSES)
    assert set(read) == {"my cat.JPG", "sub/it's.jpg", "a_b.jpg"}
    assert all(read[name].labels.tolist() == truth[name].labels.tolist() for name in read)
    assert any("my_cat.jpg is taken for my cat.JPG, whose copy an export calls so" in note for note in read.notes)
    assert any("1 of its 4 images are not asked for" in note for note in read.notes)
