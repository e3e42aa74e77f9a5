"""Tags only: nothing that a weakly supervised run is given leads to a box or a mask."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
import typing
from pathlib import Path

import pytest
from PIL import Image

from labelpenet.data import TaggedImages, read_image, write_scenes
from labelpenet.formats import open_tagged
from tests.formats.kits import coco_content, coco_set, voc_kit


def leaves(kind: object) -> set[object]:
    """The types without parts that a type annotation is made of, through dataclasses, tuples and unions."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return set().union(*(leaves(hints[field.name]) for field in dataclasses.fields(kind)))
    if typing.get_origin(kind) in (tuple, typing.Union, types.UnionType):
        return set().union(*(leaves(part) for part in typing.get_args(kind) if part is not ...))
    return {kind}


def test_tagged_images_are_made_of_names_and_numbers_alone() -> None:
    assert leaves(TaggedImages) == {str, int, Path, type(None)}


def test_tagged_images_cannot_be_given_anything_else(tmp_path: Path) -> None:
    images = open_tagged(voc_kit(tmp_path), "train")
    for one in (images, images.images[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.boxes = 1  # type: ignore[union-attr]
        assert set(vars(one)) == {field.name for field in dataclasses.fields(one)}
        public = {name for name in dir(type(one)) if not name.startswith("_")}
        assert public <= {"notes", "number", "where", "with_classes"}  # fields with defaults, and choices among tags
    assert images.where(lambda image: image.id == images.images[0].id) == dataclasses.replace(
        images, images=images.images[:1]
    )


@pytest.mark.parametrize("how", ["removed", "garbled"])
def test_a_voc_kit_without_truth_gives_the_same_tags(tmp_path: Path, how: str) -> None:
    year = voc_kit(tmp_path)
    before = open_tagged(year, "trainval")
    for path in (year / "Annotations").glob("*.xml"):
        text = path.read_text()
        start, end = "<difficult>", "</bndbox>"
        while start in text:
            head, rest = text.split(start, 1)
            text = (
                head + ("" if how == "removed" else "<bndbox><xmin>NaN</xmin><ymin/></bndbox>") + rest.split(end, 1)[1]
            )
        path.write_text(text)
    for folder in ("SegmentationObject", "SegmentationClass"):
        if how == "removed":
            shutil.rmtree(year / folder)
        else:
            for path in (year / folder).glob("*.png"):
                path.write_bytes(b"garbage")
    assert "bndbox" in (year / "Annotations/a.xml").read_text() or how == "removed"
    assert open_tagged(year, "trainval") == before


@pytest.mark.parametrize("how", ["removed", "garbled"])
def test_a_coco_file_without_truth_gives_the_same_tags(tmp_path: Path, how: str) -> None:
    path = coco_set(tmp_path)
    before = open_tagged(path)
    content = coco_content()
    for row in content["annotations"]:
        for key in ("bbox", "segmentation"):
            if how == "removed":
                del row[key]
            else:
                row[key] = "garbage"
    path.write_text(json.dumps(content))
    assert open_tagged(path) == before


def test_no_annotation_is_opened_but_the_names_of_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    year = write_scenes(tmp_path / "scenes", train=3, val=1)
    opened: list[str] = []
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(str(args[0])))
    images = open_tagged(year, "train")
    assert opened == []
    monkeypatch.undo()
    assert read_image(images.images[0].path).shape == (160, 160, 3)
