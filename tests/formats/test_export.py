"""Every annotation format, read back by an independent reader: what it can hold comes back exactly."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
import types
import unicodedata
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import safe_name
from labelpenet.errors import InputError
from labelpenet.formats import coco as coco_format
from labelpenet.formats import (
    export,
    export_coco,
    export_voc,
    export_voc_submission,
    export_yolo,
    from_supervision,
    open_annotated,
    read_predictions,
    to_supervision,
    voc,
    write_predictions,
)
from labelpenet.formats.polygons import coco_polygons, contours, drawn, joined, outline, rings, signed_area
from labelpenet.formats.selection import stems
from labelpenet.instances import Instances, masks_to_boxes

from .photographs import CLASSES, assert_same, instances, photographs, predictions

NAMES = ("2008_000001.jpg", "2008_000002.jpg", "2009_000007.jpg", "2009_000008.jpg")


def rasterised(ring: list[float], size: tuple[int, int]) -> np.ndarray:
    return rle.decode(rle.frPyObjects([ring], *size)[0]).astype(bool)


def overlap(one: np.ndarray, other: object) -> float:
    return float((one & np.asarray(other)).sum() / (one | np.asarray(other)).sum())


def masks_of(one: Instances) -> torch.Tensor:
    assert one.masks is not None
    return one.masks


@given(st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_polygons_are_exact(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 15, 2))
    mask = rng.random((height, width)) < rng.random()
    mask[0, 0] |= not mask.any()
    found = rings(mask)
    assert sum(map(signed_area, found)) == mask.sum()
    assert (rasterised(joined(found).flatten().tolist(), (height, width)) == mask).all()
    polygons = coco_polygons(mask)
    assert (rle.decode(rle.merge(rle.frPyObjects(polygons, height, width))).astype(bool) == mask).all()


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_coco_round_trip(tmp_path, polygons, masks):
    images = photographs(tmp_path, NAMES)
    found = predictions(images, masks)
    done = export(found, images, CLASSES, tmp_path / "out", "coco-polygons" if polygons else "coco")
    assert done.paths == [tmp_path / "out/annotations/instances_default.json"]
    coco = COCO(str(done.paths[0]))
    ids = [row["id"] for row in coco.dataset["annotations"]]
    assert len(set(ids)) == len(ids) == sum(map(len, found.values()))
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == dict(enumerate(CLASSES, 1))
    assert all(row["iscrowd"] == 0 for row in coco.dataset["annotations"])
    for row in coco.dataset["annotations"] if masks else ():
        assert coco.annToMask(row).sum() == row["area"]
    read = read_predictions(done.paths[0], images, CLASSES, (1, 2, 3))
    for name in found:
        assert_same(read[name], found[name])


def test_a_coco_export_with_copies_is_a_data_set(tmp_path):
    images = photographs(tmp_path / "in", ("a/x.jpg", "b/x.png", 'odd: "name".jpg'))
    found = predictions(images)
    export(found, images, CLASSES, tmp_path / "out", "coco", copy_images=True)
    again = coco_format.open_annotated(tmp_path / "out/annotations/instances_default.json", classes=CLASSES)
    assert [image.id for image in again.tagged.images] == ["a/x.jpg", "b/x.png", "odd___name.jpg"]
    for old, new in zip(images.images, again.tagged.images, strict=True):
        assert new.path.read_bytes() == old.path.read_bytes()
        assert torch.equal(again.read(new.id).instances.labels, found[old.id].labels)


def read_voc_box(item: ElementTree.Element) -> list[int]:
    xmin, ymin, xmax, ymax = (int(item.findtext(f"bndbox/{tag}") or 0) for tag in ("xmin", "ymin", "xmax", "ymax"))
    return [xmin - 1, ymin - 1, xmax, ymax]


def test_voc_round_trip(tmp_path):
    images = photographs(tmp_path, NAMES)
    found = predictions(images)
    done = export_voc(found, images.images, CLASSES, tmp_path / "out")
    out = tmp_path / "out" / "VOCdevkit" / "VOC2012"
    names = [image.id for image in images.images]
    assert (out / "ImageSets/Main/train.txt").read_text().split() == names
    assert (out / "ImageSets/Segmentation/train.txt").read_text().split() == names
    assert (out / "classes.txt").read_text().split() == list(CLASSES)
    assert (out / "labelmap.txt").read_text().splitlines()[1:3] == ["background:0,0,0::", "cat:128,0,0::"]
    for name, one in found.items():
        root = ElementTree.parse(out / "Annotations" / f"{name}.xml").getroot()
        assert root.findtext("filename") == f"{name}.jpg"
        assert (int(root.findtext("size/height") or 0), int(root.findtext("size/width") or 0)) == one.image_size
        objects = root.findall("object")
        assert [CLASSES.index(item.findtext("name") or "") for item in objects] == one.labels.tolist()
        assert [read_voc_box(item) for item in objects] == one.boxes.tolist()
        pixels = np.array(Image.open(out / "SegmentationObject" / f"{name}.png"))
        classes = np.array(Image.open(out / "SegmentationClass" / f"{name}.png"))
        hidden = torch.zeros(one.image_size, dtype=torch.bool)
        for index in one.weights.argsort(descending=True).tolist():
            visible = masks_of(one)[index] & ~hidden  # the surer instance lies on top
            assert (pixels == index + 1).tolist() == visible.tolist()
            assert set(classes[visible.numpy()]) <= {int(one.labels[index]) + 1}
            hidden |= masks_of(one)[index]
        assert not classes[~hidden.numpy()].any()
    assert any("no scores" in note for note in done.notes)
    assert any("overlap" in note for note in done.notes)


def test_voc_export_is_a_data_set_that_the_reader_takes(tmp_path):
    images = photographs(tmp_path / "in", NAMES)
    one = instances((10, 14), 5, 1)
    found = {image.id: Instances.empty((10 + k, 14), with_masks=True) for k, image in enumerate(images.images)}
    found["2008_000001"] = one
    out = tmp_path / "VOC2012"
    done = export(found, images, CLASSES, out, "voc", copy_images=True)
    assert (out / "JPEGImages/2008_000001.jpg").read_bytes() == images.images[0].path.read_bytes()
    assert not any("put the photographs" in note for note in done.notes)
    truth = voc.open_annotated(out, "train", [CLASSES[int(one.labels[0])]]).read("2008_000001")
    one.weights, one.labels = torch.ones(1), torch.zeros(1, dtype=torch.long)
    assert_same(truth.instances, one)
    assert (truth.semantic > 0).tolist() == masks_of(one)[0].tolist()


def test_voc_boxes_are_rounded_and_stay_inside(tmp_path):
    images = photographs(tmp_path, NAMES[:1])
    boxes = torch.tensor([[-3.0, 0.4, 2.6, 3.4], [13.9, 9.9, 14.0, 10.0], [5.0, 5.0, 5.0, 9.0]])
    one = Instances(boxes, torch.tensor([0, 1, 2]), torch.ones(3), (10, 14))
    done = export_voc({"2008_000001": one}, images.images, CLASSES, tmp_path / "out")
    root = ElementTree.parse(tmp_path / "out/VOCdevkit/VOC2012/Annotations/2008_000001.xml").getroot()
    assert [read_voc_box(item) for item in root.findall("object")] == [[0, 0, 3, 3], [13, 9, 14, 10]]
    assert "1 instances without area, or without a mask where others have one, are left out" in done.notes
    assert not (tmp_path / "out/VOCdevkit/VOC2012/SegmentationClass").exists()


def test_more_masks_than_a_png_holds(tmp_path):
    images = photographs(tmp_path, NAMES[:1])
    one = instances((10, 14), 1, 300)
    export_voc({"2008_000001": one}, images.images, CLASSES, tmp_path / "out")
    kept = ElementTree.parse(tmp_path / "out/VOCdevkit/VOC2012/Annotations/2008_000001.xml").getroot().findall("object")
    best = one[one.weights >= one.weights.sort(descending=True).values[253]]
    assert [read_voc_box(item) for item in kept] == best.boxes.tolist()


def test_yolo_round_trip(tmp_path):
    images = photographs(tmp_path, NAMES)
    found = predictions(images)
    out = tmp_path / "out"
    done = export(found, images, CLASSES, out, "yolo", copy_images=True)
    for image in images.images:
        one = found[image.id]
        lines = (out / f"labels/train/{image.id}.txt").read_text().splitlines()
        assert (out / f"images/train/{image.id}.jpg").read_bytes() == image.path.read_bytes()
        assert [int(line.split()[0]) for line in lines] == one.labels.tolist()
        for line, mask in zip(lines, masks_of(one), strict=True):
            values = np.array(line.split()[1:], dtype=float)
            assert ((values >= 0) & (values <= 1)).all()
            ring = values.reshape(-1, 2) * one.image_size[::-1]
            every = drawn([joined(contours(mask.numpy()))], one.image_size)
            assert overlap(drawn([ring], one.image_size), mask) >= overlap(every, mask)
            if len(contours(mask.numpy())) == 1:
                assert drawn([ring], one.image_size).tolist() == mask.tolist()
    yaml = (out / "data.yaml").read_text()
    assert re.findall(r'  (\d): "(\w+)"', yaml) == [("0", "cat"), ("1", "dog"), ("2", "emu")]
    assert "YOLO labels hold no scores" in done.notes


def test_a_speck_is_left_out_where_its_bridge_would_be_longer_and_a_hole_stays(tmp_path):
    mask = np.zeros((40, 60), bool)
    mask[5:25, 5:25], mask[12:16, 12:16], mask[38, 58] = True, False, True
    (ring,) = [joined(outline(mask, centres=True, single=True))]
    speck = np.zeros_like(mask)
    speck[38, 58] = True
    assert (drawn([ring], mask.shape) == (mask & ~speck)).all()
    mask[30:40, 40:60] = True
    again = drawn([joined(outline(mask, centres=True, single=True))], mask.shape)
    assert not (mask & ~again).any() and overlap(again, mask) > 0.95
    near = drawn([joined(outline(mask, centres=True, single=True, tolerance=2))], mask.shape)
    assert overlap(near, mask) >= min(0.97, overlap(again, mask))


def test_a_line_of_pixels_has_a_box_with_sides_in_yolo(tmp_path):
    images = photographs(tmp_path, NAMES[:1])
    masks = torch.zeros(3, 10, 14, dtype=torch.bool)
    masks[0, 9, 13] = masks[1, 4, 2:9] = masks[2, 1:8, 0] = True  # FiftyOne divides by the sides of an outline's box
    one = Instances(masks_to_boxes(masks), torch.tensor([0, 1, 2]), torch.ones(3), (10, 14), masks)
    export_yolo({"2008_000001": one}, images.images, CLASSES, tmp_path / "out")
    for line, mask in zip((tmp_path / "out/labels/train/2008_000001.txt").open(), masks, strict=True):
        ring = np.array(line.split()[1:], float).reshape(-1, 2) * (14, 10)
        assert np.ptp(ring, 0).min() > 0.1
        assert drawn([ring], (10, 14)).tolist() == drawn([ring.round()], (10, 14)).tolist() == mask.tolist()


def test_yolo_boxes(tmp_path):
    images = photographs(tmp_path, NAMES)
    found = predictions(images, masks=False)
    export_yolo(found, images.images, CLASSES, tmp_path / "out", split="val")
    for name, one in found.items():
        rows = [line.split() for line in (tmp_path / f"out/labels/val/{name}.txt").read_text().splitlines()]
        centre = np.array([row[1:] for row in rows], dtype=float).reshape(-1, 4)
        scale = np.array([*one.image_size[::-1]])
        low, high = (centre[:, :2] - centre[:, 2:] / 2) * scale, (centre[:, :2] + centre[:, 2:] / 2) * scale
        np.testing.assert_allclose(np.hstack([low, high]), one.boxes, atol=1e-4)


@pytest.mark.parametrize("masks", [False, True])
def test_label_studio_round_trip(tmp_path, masks):
    images = photographs(tmp_path / "in", ("cat/a b.png", "dog/ü.png", "x.png"))
    found = predictions(images, masks)
    done = export(found, images, CLASSES, tmp_path / "out", "label-studio")
    tasks = json.loads(done.paths[0].read_text())
    interface = ElementTree.parse(done.paths[1]).getroot()
    controls = {element.get("name"): [item.get("value") for item in element] for element in interface}
    names = [unquote(task["data"]["image"]).removeprefix("/data/local-files/?d=") for task in tasks]
    assert names == ["cat/a b.png", "dog/ü.png", "x.png"]
    for task, (_, one) in zip(tasks, found.items(), strict=True):
        results = task["predictions"][0]["result"]
        assert len({item["id"] for item in results}) == len(results) == len(one)
        for item, label, score, box, k in zip(
            results, one.labels.tolist(), one.weights.tolist(), one.boxes.tolist(), range(len(one)), strict=True
        ):
            value, size = item["value"], (item["original_height"], item["original_width"])
            assert size == one.image_size
            assert item["score"] == score
            assert value[item["type"]] == [CLASSES[label]]
            assert CLASSES[label] in controls[item["from_name"]]
            if masks:
                ring = np.array(value["points"]) * [size[1] / 100, size[0] / 100]
                assert rasterised(ring.flatten().tolist(), size).tolist() == masks_of(one)[k].tolist()
            else:
                x, width = value["x"] * size[1] / 100, value["width"] * size[1] / 100
                y, height = value["y"] * size[0] / 100, value["height"] * size[0] / 100
                assert [x, y, x + width, y + height] == pytest.approx(box)


def test_submission_for_the_voc_server(tmp_path):
    images = photographs(tmp_path, NAMES)
    found = predictions(images)
    done = export(found, images, ("dog", "cat", "emu"), tmp_path / "out", "voc-submission")
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        files = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
    assert all(name.startswith("results/VOC2012/") for name in files)
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in files.items())
    for label, name in enumerate(("dog", "cat")):
        rows = [line.split() for line in files[f"results/VOC2012/Main/comp3_det_test_{name}.txt"].decode().splitlines()]
        expected = [
            [image, float(score), box[0] + 1, box[1] + 1, box[2], box[3]]
            for image, one in found.items()
            for score, box, own in zip(one.weights, one.boxes.tolist(), one.labels.tolist(), strict=True)
            if own == label
        ]
        assert [row[0] for row in rows] == [row[0] for row in expected]
        numbers = np.array([row[1:] for row in rows], dtype=float)
        np.testing.assert_allclose(numbers, np.array([row[1:] for row in expected], dtype=float), atol=1e-6)
    for image, one in found.items():
        png = files[f"results/VOC2012/Segmentation/comp5_test_cls/{image}.png"]
        pixels = np.array(Image.open(io.BytesIO(png)))
        assert pixels.shape == one.image_size
        assert set(np.unique(pixels)) <= {0, 12, 8}  # VOC's own numbers of dog and cat; it has no emu
    assert any("knows no class emu" in note for note in done.notes)
    again = export_voc_submission(found, images.images, ("dog", "cat", "emu"), tmp_path / "again")
    assert again.paths[-1].read_bytes() == done.paths[-1].read_bytes()
    other = export_voc_submission(found, images.images, ("dog", "cow", "cat"), tmp_path / "outside", outside_data=True)
    assert {path.name[:14] for path in other.paths if "Main" in path.parts} == {"comp4_det_test"}
    with pytest.raises(InputError, match="'dog' and 'dog ' would share the file"):
        export_voc_submission(found, images.images, ("dog", "dog ", "cat"), tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_minimum_score(tmp_path):
    images = photographs(tmp_path, NAMES)
    found = predictions(images)
    for to in ("coco", "voc", "yolo", "label-studio"):
        export(found, images, CLASSES, tmp_path / to, to, min_score=0.5)  # type: ignore[arg-type]
    kept = {name: one[one.weights >= 0.5] for name, one in found.items()}
    assert 0 < sum(map(len, kept.values())) < sum(map(len, found.values()))
    read = read_predictions(tmp_path / "coco/annotations/instances_default.json", images, CLASSES, (1, 2, 3))
    for name, one in kept.items():
        assert_same(read[name], one)
        assert len((tmp_path / f"yolo/labels/train/{name}.txt").read_text().splitlines()) == len(one)
        annotation = tmp_path / f"voc/VOCdevkit/VOC2012/Annotations/{name}.xml"
        assert len(ElementTree.parse(annotation).findall("object")) == len(one)


def test_a_doubtful_instance_is_no_object_where_readers_know_no_doubt(tmp_path):
    images = photographs(tmp_path, NAMES)
    found = predictions(images)
    doubtful = NAMES[0].removesuffix(".jpg")
    count = len(found[doubtful])
    assert count
    found[doubtful] = found[doubtful].weighted(torch.zeros(count))
    silent, scored = ("coco", "coco-polygons", "voc", "yolo"), ("coco-results", "voc-submission")
    done = {to: export(found, images, CLASSES, tmp_path / to, to) for to in (*silent, *scored)}  # type: ignore[arg-type]
    assert (tmp_path / f"yolo/labels/train/{doubtful}.txt").read_text() == ""
    annotation = tmp_path / f"voc/VOCdevkit/VOC2012/Annotations/{doubtful}.xml"
    assert not ElementTree.parse(annotation).findall("object")
    for to in ("coco", "coco-polygons"):
        # pycocotools and training tools pass over the score: its mask, the filled box, would be a true outline
        content = json.loads((tmp_path / to / "annotations/instances_default.json").read_text())
        assert len(content["images"]) == len(NAMES), "the photograph stays"
        assert len(content["annotations"]) == sum(map(len, found.values())) - count
        assert all(row["score"] > 0 for row in content["annotations"])
    for to in silent:
        assert sum(note.startswith(f"{count} instances of score 0") for note in done[to].notes) == 1
    read = read_predictions(tmp_path / "coco-results/results.json", images, CLASSES)
    assert read[doubtful].weights.tolist() == [0.0] * count
    assert not any("score 0" in note for to in scored for note in done[to].notes)


def test_annotation_tools_show_a_doubtful_instance_as_a_box(tmp_path):
    images = photographs(tmp_path, NAMES)
    found = predictions(images)
    name, one = next((name, one) for name, one in found.items() if len(one) > 1)
    found = {name: one.weighted(torch.tensor([0.0] + [0.5] * (len(one) - 1)))}
    tasks = json.loads(export(found, images, CLASSES, tmp_path / "studio", "label-studio").paths[0].read_text())
    kinds = [shape["type"] for shape in tasks[0]["predictions"][0]["result"]]
    assert kinds == ["rectanglelabels"] + ["polygonlabels"] * (len(one) - 1)
    (path,) = (
        path for path in export(found, images, CLASSES, tmp_path / "me", "labelme").paths if path.suffix == ".json"
    )
    shapes = json.loads(path.read_text())["shapes"]
    assert [shape["shape_type"] == "rectangle" for shape in shapes] == [True] + [False] * (len(shapes) - 1)


def test_photographs_without_a_prediction_are_counted(tmp_path):
    images = photographs(tmp_path / "in", ("a.jpg", "b.jpg", "c.jpg"))
    found = predictions(images)
    assert not any("left out" in note for note in export(found, images, CLASSES, tmp_path / "all", "yolo").notes)
    del found["a"]
    said = "1 of 3 photographs are not in the predictions; they are left out"
    assert said in export(found, images, CLASSES, tmp_path / "few", "yolo").notes


def test_what_a_format_cannot_take_is_an_input_error(tmp_path):
    images = photographs(tmp_path, NAMES)
    with pytest.raises(InputError, match="unknown format csv; valid are coco, coco-polygons, coco-results, voc"):
        export({}, images, CLASSES, tmp_path / "out", "csv")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="coco-results holds no photographs"):
        export({}, images, CLASSES, tmp_path / "out", "coco-results", copy_images=True)
    with pytest.raises(InputError, match="takes every score"):
        export({}, images, CLASSES, tmp_path / "out", "voc-submission", min_score=0.1)
    many = [f"class {i}" for i in range(300)]
    with pytest.raises(InputError, match="300 classes do not fit"):
        export(predictions(images), images, many, tmp_path / "out", "voc")
    with pytest.raises(InputError, match="NaN or infinite"):
        bad = instances((10, 14), 0)
        bad.weights[0] = float("inf")
        export_coco({"2008_000001": bad}, images.images, CLASSES, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.json"))


EVIL = ("../../outside", "/etc/passwd", "a/../../b", "..", ".", "", "C:\\x", "a\0b", "x" * 400, "CAT", "cat", "nul\n")


@pytest.mark.parametrize("to", ["coco", "voc", "yolo", "labelme", "label-studio"])
def test_classes_are_told_in_either_form_of_unicode(tmp_path, to):
    """Labels of a run whose classes macOS named, exported, and read where somebody typed their names."""
    typed, spelt = ([unicodedata.normalize(form, f"{one} é") for one in CLASSES] for form in ("NFC", "NFD"))
    images = photographs(tmp_path / "photos", NAMES)
    found = predictions(images)
    options = {} if to == "label-studio" else {"copy_images": True}
    data = export(found, images, spelt, tmp_path / "out", to, **options).paths[0]
    if to == "label-studio":
        tasks = json.loads(data.read_text())
        data.write_text(json.dumps([{**task, "annotations": task["predictions"]} for task in tasks]))
    for path in (tmp_path / "out").rglob("*.json") if to == "labelme" else ():
        path.write_text(json.dumps({**json.loads(path.read_text()), "flags": {"checked": True}}))
    place = {"voc": tmp_path / "out/VOCdevkit/VOC2012", "label-studio": data}.get(to, tmp_path / "out")
    home = tmp_path / "photos" if to == "label-studio" else None
    for asked in (typed, spelt):
        read = open_annotated(place, None, asked[:2], home)  # no emu is found
        assert read.tagged.classes == tuple(typed[:2])
        for image, one in zip(images.images, read.tagged.images, strict=True):
            assert read.read(one.id).instances.labels.tolist() == found[image.id].labels.tolist()
    path = write_predictions(tmp_path / "p.json", found, images, spelt)
    for image in images.images:
        assert read_predictions(path, images, typed)[image.id].labels.tolist() == found[image.id].labels.tolist()


def test_voc_refuses_classes_that_it_cannot_tell_apart(tmp_path):
    images = photographs(tmp_path / "photos", NAMES)
    with pytest.raises(InputError, match="such as 'cat'"):
        export_voc(predictions(images), images.images, ("cat", "cat ", "dog"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["coco", "coco-polygons", "voc", "yolo", "label-studio", "voc-submission"])
def test_nothing_is_written_outside_the_folder(tmp_path, to):
    photograph = photographs(tmp_path / "in", ("x.jpg",)).images[0].path
    images = [TaggedImage(name, photograph, ()) for name in EVIL]
    found = {image.id: instances((10, 14), 3) for image in images}
    out = tmp_path / "deep" / "er" / "out"
    before = set(tmp_path.rglob("*"))
    done = export(found, images, ("../../cat", "/dog", "\0"), out, to)
    new = set(tmp_path.rglob("*")) - before - {out, *out.parents}
    assert all(path.is_relative_to(out) for path in new)
    assert {path for path in new if path.is_file()} == {*done.paths, out / ".labelpenet"}
    assert len(set(done.paths)) == len(done.paths)
    for path in done.paths:
        if path.suffix == ".xml" and to == "voc":
            ElementTree.parse(path)


@given(st.lists(st.text(max_size=12), unique=True, max_size=8))
def test_stems_are_plain_and_differ(names):
    made = stems([TaggedImage(name, Path("x.jpg"), ()) for name in names])
    assert len({stem.casefold() for stem in made.values()}) == len(names)
    for stem in made.values():
        assert stem == safe_name(stem)
        assert Path(stem).name == stem not in ("", ".", "..")
        assert not stem.startswith(".")


class FakeDetections:
    """As much of `supervision.Detections` as the adapter touches; its own checks of the shapes included."""

    def __init__(self, xyxy: Any, mask: Any, confidence: Any, class_id: Any, data: Any) -> None:
        n = len(xyxy)
        assert isinstance(xyxy, np.ndarray)
        assert xyxy.shape == (n, 4)
        assert mask is None or (mask.dtype == bool and mask.ndim == 3 and len(mask) == n)
        assert confidence.shape == class_id.shape == (n,)
        assert len(data["class_name"]) == n
        self.xyxy, self.mask, self.confidence, self.class_id, self.data = xyxy, mask, confidence, class_id, data


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("count", [0, 3])
def test_supervision_round_trip(monkeypatch, masks, count):
    if "supervision" not in sys.modules:
        try:
            import supervision  # noqa: F401
        except ImportError:
            fake = types.ModuleType("supervision")
            monkeypatch.setattr(fake, "Detections", FakeDetections, raising=False)
            monkeypatch.setitem(sys.modules, "supervision", fake)
    one = instances((10, 14), 2, count, masks)
    detections = to_supervision(one, CLASSES)
    assert list(detections.data["class_name"]) == [CLASSES[label] for label in one.labels.tolist()]
    assert_same(from_supervision(detections, (10, 14)), one)


def test_supervision_is_asked_for_only_when_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match="pip install supervision"):
        to_supervision(instances((10, 14), 2), CLASSES)


@pytest.mark.parametrize(
    "names",
    [tuple(sorted(f"{k}.jpg" for k in range(1, 13))), tuple(f"{k}.jpg" for k in range(5)), NAMES],
    ids=["1 10 11", "0 to 4", "2008_000001"],
)
def test_a_results_list_is_read_back_onto_its_photographs(tmp_path, names):
    images = photographs(tmp_path / "in", names)
    found = predictions(images)
    export(found, images, CLASSES, tmp_path / "out", "coco-results")
    read = read_predictions(tmp_path / "out/results.json", images, CLASSES)
    assert set(read) == {name for name, one in found.items() if len(one)}
    for name, one in read.items():
        assert_same(one, found[name])


@pytest.mark.parametrize("names", [("a.jpg", "b.jpg"), ("a.jpg", "1.jpg", "2.jpg")])
def test_a_results_list_of_photographs_without_numbers_is_not_read_onto_others(tmp_path, names):
    images = photographs(tmp_path / "in", names)
    export(predictions(images, masks=False), images, CLASSES, tmp_path / "out", "coco-results")
    with pytest.raises(InputError, match="image_id '1' is unknown"):
        read_predictions(tmp_path / "out/results.json", images, CLASSES)


def test_a_number_behind_a_name_takes_no_other_photographs_name():
    images = [TaggedImage(name, Path(name), ()) for name in ("photo.jpg", "photo.png", "photo-2.jpg")]
    assert list(stems(images).values()) == ["photo", "photo-3", "photo-2"]


@pytest.mark.parametrize("masks", [True, False])
def test_a_photograph_without_objects_has_empty_maps_where_others_have_masks(tmp_path, masks):
    images = photographs(tmp_path / "in", NAMES[:2])
    found = {"2008_000001": instances((10, 14), 1, 2, masks), "2008_000002": Instances.empty((11, 14))}
    export_voc(found, images.images, CLASSES, tmp_path / "VOC2012")
    lists = {path.parent.name: path.read_text().split() for path in tmp_path.glob("VOC2012/ImageSets/*/train.txt")}
    maps = sorted(path.stem for path in tmp_path.glob("VOC2012/Segmentation*/*.png"))
    assert lists == {kind: list(found) for kind in ("Main", "Segmentation")[: 1 + masks]}
    assert maps == [name for name in found for _ in range(2)] * masks
    for kind in ("Class", "Object") if masks else ():
        pixels = np.array(Image.open(tmp_path / f"VOC2012/Segmentation{kind}/2008_000002.png"))
        assert pixels.shape == (11, 14) and not pixels.any()


@pytest.mark.parametrize("folders", [False, True])
@pytest.mark.parametrize("names", [("a b.jpg", "a_b.jpg"), ("sub/x.jpg", "sub_x.jpg"), ("d d/x.jpg", "d_d/x.jpg")])
def test_no_copy_is_called_as_another_photograph(names, folders):
    images = [TaggedImage(name, Path(name), ()) for name in names]
    assert f"{stems(images, folders=folders)[names[0]]}.jpg" not in names[1:]
    assert stems(images, folders=True)[names[1]] == names[1].removesuffix(".jpg")
