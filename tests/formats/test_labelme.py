"""Labelme files: written, drawn as Labelme draws, corrected, read back; and what an export may write over: nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from labelpenet.cli import main
from labelpenet.data.dataset import TaggedImage
from labelpenet.errors import InputError
from labelpenet.formats import (
    export,
    export_labelme,
    export_voc,
    export_yolo,
    open_annotated,
    open_tagged,
    read_predictions,
    write_predictions,
)
from labelpenet.formats.polygons import contours, drawn, outline
from labelpenet.instances import Instances, masks_to_boxes

from .corpus import labelme, write
from .photographs import CLASSES, photographs, predictions

NAMES = ("a.jpg", "b.jpg", "sub/a.png")


def round_mask(size: tuple[int, int]) -> np.ndarray:
    picture = Image.new("1", size[::-1])
    ImageDraw.Draw(picture).ellipse((10, 5, 60, 40), fill=1)
    mask = np.array(picture)
    mask[20:25, 30:36] = False
    mask[45:48, 5:9] = True
    return mask


def test_contours_are_exact_where_opencv_draws_them():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        mask = rng.random(rng.integers(1, 15, 2)) < rng.random()
        assert (drawn(contours(mask), mask.shape) == mask).all()


def test_a_tolerance_gives_few_corners_and_keeps_the_mask():
    mask = round_mask((60, 80))
    for centres in (False, True):
        parts = outline(mask, centres=centres, tolerance=1)
        assert sum(map(len, parts)) < 0.3 * sum(map(len, outline(mask, centres=centres)))


def test_corrected_files_are_read_back_and_others_wait(tmp_path):
    images = photographs(tmp_path / "in", NAMES)
    mask = torch.from_numpy(round_mask((60, 80)))
    Image.new("RGB", (80, 60)).save(images.images[0].path)
    found = predictions(images)
    one = Instances(masks_to_boxes(mask[None]), torch.tensor([1]), torch.tensor([0.5]), (60, 80), mask[None])
    found[images.images[0].id] = one
    out = tmp_path / "out"
    export_labelme(found, images.images, CLASSES, out, copy_images=True)
    with pytest.raises(InputError, match="none of its 3 files is checked, or known to be changed"):
        open_tagged(out)
    content = json.loads((out / "a.json").read_text())
    assert [shape["group_id"] for shape in content["shapes"]] == [1, 1]  # the disc with its hole, and the speck
    assert content["flags"] == {"checked": False, "cat": True, "dog": False, "emu": False}
    content["flags"]["checked"] = True
    (out / "a.json").write_text(json.dumps(content))
    annotated = open_annotated(out)
    assert [image.tags for image in annotated.tagged.images] == [(0, 1)]
    truth = annotated.read(annotated.tagged.images[0].id).instances
    assert truth.labels.tolist() == [annotated.tagged.classes.index("dog")]
    assert truth.masks is not None
    both, any_of = truth.masks[0] & mask, truth.masks[0] | mask
    assert both.sum() >= 0.98 * any_of.sum()  # the bridge into the hole
    with pytest.raises(InputError, match=r"a\.json: was added or changed since the export"):
        export_labelme(found, images.images, CLASSES, out, overwrite=True)


def test_a_class_called_checked_is_never_lost_in_silence(tmp_path):
    images = photographs(tmp_path / "in", NAMES)
    classes = ("checked", *CLASSES[1:])
    with pytest.raises(InputError, match="'checked' has the name of the flag"):
        export_labelme(predictions(images), images.images, classes, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for image, flag in zip(images.images[:2], ("checked", "other"), strict=True):
        content = {"flags": {flag: True, "cat": True}, "shapes": [], "imagePath": image.path.name}
        image.path.with_suffix(".json").write_text(json.dumps(content))
    notes = open_tagged(tmp_path / "in").notes
    assert "the flag 'checked', which 1 files set, is no tag; rename it if it is a class" in notes


def test_an_export_writes_over_nothing(tmp_path):
    images = photographs(tmp_path / "in", NAMES)
    found = predictions(images)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "annotations.json").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no export of labelpenet"):
            export(found, images, CLASSES, theirs, "coco", overwrite=overwrite)
        with pytest.raises(InputError, match="which is read"):
            export(found, images, CLASSES, tmp_path / "in", "coco", overwrite=overwrite)
    assert [path.read_text() for path in theirs.iterdir()] == ["mine"]
    (tmp_path / "link").symlink_to(theirs)
    with pytest.raises(InputError, match="file or link"):
        export(found, images, CLASSES, tmp_path / "link", "coco")
    out = tmp_path / "out"
    export(found, images, CLASSES, out, "coco")
    with pytest.raises(InputError, match="already holds an export"):
        export(found, images, CLASSES, out, "label-studio")
    export(found, images, CLASSES, out, "label-studio", overwrite=True)
    assert {path.name for path in out.iterdir()} == {".labelpenet", "tasks.json", "labels.xml"}


def test_a_failed_export_leaves_nothing(tmp_path):
    images = photographs(tmp_path / "in", NAMES)
    found = predictions(images)
    images.images[1].path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"in/b\.jpg"):
        export(found, images, CLASSES, tmp_path / "out", "voc", copy_images=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_second_split_lies_beside_the_first(tmp_path):
    images = photographs(tmp_path / "in", NAMES)
    found, out = predictions(images), tmp_path / "out"
    export_yolo(found, images.images[:1], CLASSES, out)
    with pytest.raises(InputError, match="already holds the split train"):
        export_yolo(found, images.images[1:], CLASSES, out)
    export_yolo(found, images.images[1:], CLASSES, out, split="val")
    assert sorted(path.name for path in out.rglob("*.txt")) == ["a.txt", "b.txt", "sub_a.txt"]
    assert (out / "data.yaml").read_text().startswith("train: images/train\nval: images/val\nnames:\n")
    with pytest.raises(InputError, match="already holds an export"):
        export_yolo(found, images.images[1:], ("other",) * 3, out, split="test")


def test_turned_photographs_are_copied_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    image = TaggedImage("turned.jpg", tmp_path / "turned.jpg", ())
    export_yolo({"turned.jpg": Instances.empty((20, 10))}, [image], CLASSES, tmp_path / "out", copy_images=True)
    with Image.open(tmp_path / "out/images/train/turned.jpg") as copy:
        assert (copy.size, copy.getexif().get(0x0112, 1)) == ((10, 20), 1)


def test_copies_that_are_encoded_again_are_told_in_one_line(tmp_path):
    images = photographs(tmp_path / "photos", tuple(f"{index}.png" for index in range(12)))
    done = export_voc(predictions(images), images.images, CLASSES, tmp_path / "out", copy_images=True)
    again = [note for note in done.notes if "again" in note]
    assert len(again) == 1 and "0.png as JPG" in again[0] and "(12 in all)" in again[0]


def test_photographs_without_tags_are_exported_and_a_bare_list_of_theirs_is_refused(tmp_path, capsys):
    images = photographs(tmp_path / "photos", ("a.jpg", "b.jpg"))
    images = replace(images, images=tuple(TaggedImage(one.path.name, one.path, ()) for one in images.images))
    file = write_predictions(tmp_path / "p.json", predictions(images), images, CLASSES)
    main(["export", str(file), str(tmp_path / "photos"), "--out", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out/annotations/instances_default.json").read_text())
    assert [row["name"] for row in content["categories"]] == list(CLASSES)
    file.write_text(json.dumps(json.loads(file.read_text())["annotations"]))
    with pytest.raises(SystemExit):
        main(["export", str(file), str(tmp_path / "photos"), "--out", str(tmp_path / "again")])
    assert "names no classes" in capsys.readouterr().err


def test_a_tilde_that_the_shell_has_left_is_the_home_folder(tmp_path, monkeypatch):
    images = photographs(tmp_path / "photos", ("a.jpg",))
    write_predictions(tmp_path / "p.json", predictions(images), images, CLASSES)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    main(["export", "~/p.json", "~/photos", "--out=~/out"])
    assert (tmp_path / "out/annotations/instances_default.json").is_file() and not list(Path().iterdir())


def test_photographs_sorted_into_folders_that_are_no_classes_are_exported_too(tmp_path):
    images = photographs(tmp_path / "photos", ("2020/a.jpg", "2021/b.jpg", "b.jpg"))
    images = replace(images, images=(*images.images[:2], TaggedImage("b.jpg", images.images[2].path, ())))
    file = write_predictions(tmp_path / "p.json", predictions(images), images, CLASSES)
    main(["export", str(file), str(tmp_path / "photos"), "--out", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out/annotations/instances_default.json").read_text())
    assert [row["name"] for row in content["categories"]] == list(CLASSES)
    assert [row["file_name"] for row in content["images"]] == ["2020/a.jpg", "2021/b.jpg", "b.jpg"]


def test_a_bare_list_takes_the_ids_of_its_coco_data_set(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg")
    box = {"image_id": 7, "category_id": 18, "bbox": [1, 1, 5, 5]}
    truth = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 10, "width": 20}],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [{**box, "id": 1, "area": 25, "iscrowd": 0}],
    }
    data = tmp_path / "instances.json"
    data.write_text(json.dumps(truth))
    (tmp_path / "list.json").write_text(json.dumps([{**box, "score": 0.5}]))
    out = tmp_path / "out"
    main(["export", str(tmp_path / "list.json"), str(data), "--to", "coco-results", "--out", str(out)])
    (row,) = json.loads((out / "results.json").read_text())
    assert (row["image_id"], row["category_id"], row["score"]) == (7, 18, 0.5)


@pytest.mark.parametrize("size", [(10_000, 10_000), (11, 14)])
def test_a_size_that_is_not_the_photographs_is_refused(tmp_path, size):
    images = photographs(tmp_path, ("a.jpg",))
    entry = {"id": 1, "file_name": "a.jpg", "height": size[0], "width": size[1]}
    row = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1}
    row["segmentation"] = {"size": list(size), "counts": [size[0] * size[1]]}  # type: ignore[assignment]
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"images": [entry], "annotations": [row]}))
    with pytest.raises(InputError, match=r"but .* has 14 x 10"):
        read_predictions(file, images, CLASSES, (1, 2, 3))


def test_huge_scores_and_names_in_two_folders(tmp_path):
    images = photographs(tmp_path / "in", ("sub/a.jpg", "a.jpg"))
    top, below = images.images[1], images.images[0]
    images = replace(images, images=(below, TaggedImage("a.jpg", top.path, ())))
    rows = [
        {"image_id": number, "category_id": 1, "bbox": [1, 1, 2, 2], "score": score}
        for number, score in ((1, 1e308), (2, -1e308))
    ]
    entries = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "sub/a.jpg"}]
    Path(tmp_path / "p.json").write_text(json.dumps({"images": entries, "annotations": rows}))
    read = read_predictions(tmp_path / "p.json", images, CLASSES, (1, 2, 3))
    assert {name: one.weights.tolist() for name, one in read.items()} == {"sub/a.jpg": [0.0], "a.jpg": [1.0]}


def test_a_list_of_photographs_makes_a_split(tmp_path):
    images = photographs(tmp_path / "in", NAMES)
    export_labelme(predictions(images), images.images, CLASSES, tmp_path / "out", copy_images=True)
    for path in (tmp_path / "out").rglob("*.json"):
        path.write_text(path.read_text().replace('"checked": false', '"checked": true'))
    (tmp_path / "out" / "val.txt").write_text("b.jpg\n")
    assert [image.id for image in open_tagged(tmp_path / "out", "val").images] == ["b.jpg"]
    assert len(open_tagged(tmp_path / "out").images) == len(NAMES)
    with pytest.raises(InputError, match="no split 'test'; available are val"):
        open_tagged(tmp_path / "out", "test")


def test_files_of_an_export_that_lie_elsewhere_wait_until_they_are_checked(tmp_path):
    images = photographs(tmp_path / "in", NAMES[:2])
    out, copy = tmp_path / "out", tmp_path / "copy"
    export_labelme(predictions(images), images.images, CLASSES, out, copy_images=True)
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns(".labelpenet"))
    content = json.loads((out / "a.json").read_text()) | {"version": "saved again"}
    for folder in (out, copy):
        write(folder / "a.json", content)
    assert [image.path.name for image in open_tagged(out).images] == ["a.jpg"]
    with pytest.raises(InputError, match="none of its 2 files is checked"):
        open_tagged(copy)
    content["flags"]["checked"] = True
    write(copy / "a.json", content)
    again = open_tagged(copy)
    assert [image.path.name for image in again.images] == ["a.jpg"]
    assert any("1 files are neither checked nor known to be changed" in note for note in again.notes)


def test_a_file_about_another_photograph_than_that_beside_it_is_left_out(tmp_path):
    labelme(shapes=True)(tmp_path)
    (tmp_path / "b.json").rename(tmp_path / "c.json")
    assert [image.id for image in open_tagged(tmp_path).images] == ["a.jpg", "b.jpg"]
    shutil.copy(tmp_path / "b.jpg", tmp_path / "c.jpg")
    images = open_tagged(tmp_path)
    assert [image.id for image in images.images] == ["a.jpg"]
    assert any("c.json: is about b.jpg, but lies beside c.jpg; rename one" in note for note in images.notes)


def test_hidden_files_are_left_out_and_the_data_may_lie_in_a_hidden_folder(tmp_path):
    data = labelme(shapes=True)(tmp_path / ".kept/photos")
    shutil.copy(data / "a.json", data / ".a.json")
    assert [image.id for image in open_tagged(data).images] == ["a.jpg", "b.jpg"]


def test_what_x_anylabeling_calls_difficult_is_so(tmp_path):
    content = json.loads((labelme(shapes=True)(tmp_path) / "a.json").read_text())
    content["shapes"][1]["difficult"] = True
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert open_annotated(tmp_path).read("a.jpg").difficult.tolist() == [False, True]


def test_sub_folders_for_splits_are_told_apart(tmp_path):
    labelme(shapes=True)(tmp_path / "train"), labelme(shapes=True)(tmp_path / "val")
    with pytest.raises(InputError, match="has sub-folders for splits; name one; available are train, val"):
        open_tagged(tmp_path)
    assert [image.path for image in open_tagged(tmp_path, "val").images] == [tmp_path / f"val/{n}.jpg" for n in "ab"]
    content = json.loads((tmp_path / "val/a.json").read_text())
    write(tmp_path / "val/a.json", {**content, "shapes": content["shapes"][:1]})
    assert open_annotated(tmp_path, "val", ["dog", "cat"]).read("a.jpg").instances.labels.tolist() == [1]
    with pytest.raises(InputError, match="unknown class 'cow'; known are cat, dog"):
        open_annotated(tmp_path, "val", ["cow"])


def test_the_folders_of_an_export_are_no_splits(tmp_path):
    images = photographs(tmp_path / "in", ("train/a.jpg", "val/b.jpg"))
    export_labelme(predictions(images), images.images, CLASSES, tmp_path / "out", copy_images=True)
    for path in (tmp_path / "out").rglob("*.json"):
        write(path, {**json.loads(path.read_text()), "flags": {"checked": True}})
    assert [image.id for image in open_tagged(tmp_path / "out").images] == ["train/a.jpg", "val/b.jpg"]


def test_a_list_need_not_show_every_class_that_is_asked_for(tmp_path):
    labelme(shapes=True)(tmp_path)
    write(tmp_path / "val.txt", "b.jpg\n")
    assert [image.tags for image in open_annotated(tmp_path, "val", ["cat", "dog"]).tagged.images] == [()]
    with pytest.raises(InputError, match="unknown class 'blurred'; known are cat, dog"):
        open_annotated(tmp_path, "val", ["blurred"])
