"""Folders with a tags file or sub-folders, Label Studio exports, and how a data set is recognised."""

from __future__ import annotations

import csv
import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from labelpenet import InputError
from labelpenet.formats import open_annotated, open_tagged
from labelpenet.formats.open import open_photographs
from tests.formats.corpus import CAT, CLASSES, class_folders, coco, labelme, photographs, studio_value, write, yolo_box
from tests.formats.kits import photograph


def pets(root: Path) -> Path:
    for name in ("one.jpg", "two.PNG", "sub/three.webp", "four.jpg"):
        photograph(root / name)
    return root


def tags_of(root: Path, *args: Any) -> dict[str, tuple[str, ...]]:
    images = open_tagged(root, *args)
    return {image.id: tuple(images.classes[tag] for tag in image.tags) for image in images.images}


def test_tags_csv(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "tags.csv").write_text('\ufefffile,tags\none.jpg,cat; dog\ntwo.PNG,\n"sub/three.webp",dog;;dog\n\n')
    expected = {"one.jpg": ("cat", "dog"), "two.PNG": (), "sub/three.webp": ("dog",)}
    assert tags_of(tmp_path) == tags_of(tmp_path / "tags.csv") == expected
    notes = open_tagged(tmp_path).notes
    assert "1 of 3 images show none of the classes; they serve as negatives" in notes
    assert any("1 images of" in note and "do not stand in tags.csv" in note for note in notes)
    assert open_tagged(tmp_path, None, ["dog"]).images[0].tags == (0,)


def test_a_name_with_accents_is_found_in_either_form_of_unicode(tmp_path: Path) -> None:
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        root = tmp_path / form
        pets(root)
        (root / "one.jpg").rename(root / unicodedata.normalize(form, "größe é.jpg"))
        name = unicodedata.normalize(other, "größe é.jpg")
        (root / "tags.csv").write_text(f"file,tags\n{name},cat\nfour.jpg,dog\n", encoding="utf-8")
        assert tags_of(root) == {name: ("cat",), "four.jpg": ("dog",)}
        assert open_tagged(root).images[0].path.is_file()


def test_columns_in_any_order_and_doubled_rows(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "tags.csv").write_text("Tags,who,File\ncat,me,one.jpg\ndog,me,one.jpg\nx\n")
    assert tags_of(tmp_path) == {"one.jpg": ("cat", "dog")}
    assert any("1 rows of tags.csv name a file again" in note for note in open_tagged(tmp_path).notes)


def test_tags_json(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "tags.json").write_text(json.dumps({"one.jpg": ["cat"], "sub\\three.webp": "dog;cat", "four.jpg": []}))
    assert tags_of(tmp_path) == {"one.jpg": ("cat",), "sub/three.webp": ("cat", "dog"), "four.jpg": ()}
    (tmp_path / "tags.json").write_text('{"one.jpg": ["cat"], "four.jpg": "dog", "one.jpg": ["dog"]}')
    assert tags_of(tmp_path) == {"one.jpg": ("cat", "dog"), "four.jpg": ("dog",)}
    assert any("1 entries of tags.json name a file again" in note for note in open_tagged(tmp_path).notes)
    (tmp_path / "tags.json").write_text(json.dumps({"one.jpg": ["cat"], "four.jpg": 7}))
    assert "1 rows look odd" in open_tagged(tmp_path).notes


def test_what_may_be_meant_otherwise_is_said(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "tags.csv").write_text("file,tags\none.jpg,Cat\ntwo.PNG,cat\nfour.jpg,NaN\n")
    notes = " ".join(open_tagged(tmp_path).notes)
    assert "'Cat' and 'cat' are two classes" in notes and "'NaN' is taken for a class" in notes
    (tmp_path / "train.txt").write_text("one.jpg\n")
    assert "no split is named: all are used, of train too" in open_tagged(tmp_path).notes
    assert not any("no split is named" in note for note in open_tagged(tmp_path, "train").notes)
    (tmp_path / "train.txt").unlink()
    rows = [{"id": number, "name": name} for number, name in enumerate(("cat", "cat ", "Cat"), 1)]
    images = [{"id": number, "file_name": name} for number, name in enumerate(("one.jpg", "two.PNG", "four.jpg"), 1)]
    marks = [{"id": one, "image_id": one, "category_id": one, "bbox": [1, 1, 5, 5]} for one in (1, 2, 3)]
    coco = tmp_path / "coco" / "instances.json"
    coco.parent.mkdir()
    coco.write_text(json.dumps({"images": images, "annotations": marks, "categories": rows}))
    notes = " ".join(open_tagged(coco, images=tmp_path).notes)
    assert "'Cat' and 'cat' are two classes" in notes and "'Cat' and 'cat ' are two classes" in notes
    (tmp_path / "tags.csv").write_text("file,tags\none.jpg,hot dog\ntwo.PNG,dog;cat\n")
    assert tags_of(tmp_path)["one.jpg"] == ("hot dog",)
    (tmp_path / "tags.csv").write_text("file,tags\none.jpg,cat & dog\ntwo.PNG,dog;cat\n")
    with pytest.raises(InputError, match="write cat;dog, or name the classes"):
        open_tagged(tmp_path)
    assert tags_of(tmp_path, None, ["cat & dog", "cat"]) == {"one.jpg": ("cat & dog",), "two.PNG": ("cat",)}


def test_a_class_is_one_class_in_either_form_of_unicode(tmp_path: Path) -> None:
    """As macOS spells the name of a folder, and as a keyboard writes it."""
    pets(tmp_path)
    typed, spelt = (unicodedata.normalize(form, "Bär") for form in ("NFC", "NFD"))
    (tmp_path / "tags.csv").write_text(f"file,tags\none.jpg,{typed}\ntwo.PNG,{spelt}\nfour.jpg,Hund\n")
    assert open_tagged(tmp_path).classes == (typed, "Hund")
    for asked in (typed, spelt):
        assert tags_of(tmp_path, None, [asked])["two.PNG"] == (typed,)
    folders = tmp_path / "folders"
    for folder, name in ((spelt, "one.jpg"), (typed, "two.PNG"), ("Hund", "four.jpg")):
        (folders / folder).mkdir(parents=True)
        (tmp_path / name).rename(folders / folder / name)
    assert open_tagged(folders).classes == (typed, "Hund")
    assert set(tags_of(folders, None, [spelt]).values()) == {(typed,), ()}


def test_a_rectangle_among_outlines_costs_the_masks_and_it_is_said(tmp_path: Path) -> None:
    labelme(shapes=True)(tmp_path)
    content = json.loads((tmp_path / "a.json").read_text())
    content["shapes"][1] |= {"shape_type": "rectangle", "points": [[10, 2], [30, 22]]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    truth = open_annotated(tmp_path).read("a.jpg")
    assert truth.instances.boxes.tolist() == [[4, 6, 20, 18], [10, 2, 30, 22]] and truth.instances.masks is None
    assert "1 of 2 objects have no mask; only boxes are used" in truth.notes[0]


def test_flags_beside_shapes_are_said_to_be_no_tags(tmp_path: Path) -> None:
    labelme(shapes=True)(tmp_path)
    assert any("flags that are set (blurred) are no tags" in note for note in open_tagged(tmp_path).notes)


def test_one_sub_folder_per_class(tmp_path: Path) -> None:
    names = ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/.hidden.jpg", "loose.jpg", "cat/deep/x.jpg")
    for seed, name in enumerate(names):
        photograph(tmp_path / name, seed=seed)
    assert tags_of(tmp_path) == {
        "cat/1.jpg": ("cat",),
        "cat/2.jpg": ("cat",),
        "cat/deep/x.jpg": ("cat",),
        "dog/1.jpg": ("dog",),
    }
    assert any(
        "1 images lie deeper; their class is the upper folder's name" in note for note in open_tagged(tmp_path).notes
    )
    assert tags_of(tmp_path, None, ["dog"])["cat/1.jpg"] == ()
    assert any("1 images lie in no class" in note for note in open_tagged(tmp_path).notes)
    (tmp_path / "cow").mkdir()
    assert "no photograph lies in cow: no class of that name" in open_tagged(tmp_path).notes


def test_sub_folders_for_splits(tmp_path: Path) -> None:
    photograph(tmp_path / "train/cat/1.jpg")
    photograph(tmp_path / "val/dog/1.jpg")
    assert tags_of(tmp_path, "val", ["dog"]) == {"dog/1.jpg": ("dog",)}
    for split in (None, "test"):
        with pytest.raises(InputError, match="available are train, val"):
            open_tagged(tmp_path, split)


def test_lists_for_splits(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "tags.csv").write_text("file,tags\none.jpg,cat\ntwo.PNG,dog\n")
    assert "has no splits" in open_tagged(tmp_path, "train").notes[-1]
    (tmp_path / "train.txt").write_text("two.PNG\nother.jpg\n")
    assert list(tags_of(tmp_path, "train")) == ["two.PNG"]
    with pytest.raises(InputError, match="no split 'val'; available are train"):
        open_tagged(tmp_path, "val")


def test_lists_lie_beside_the_tags_file_or_the_photographs(tmp_path: Path) -> None:
    pets(tmp_path / "images")
    (tmp_path / "tags.csv").write_text("file,tags\none.jpg,cat\ntwo.PNG,dog\n")
    (tmp_path / "val.txt").write_text("./two.PNG\r\n")
    (tmp_path / "images" / "test.txt").write_text("one.jpg\n")
    assert list(tags_of(tmp_path, "val")) == ["two.PNG"]
    assert list(tags_of(tmp_path, "test")) == ["one.jpg"]
    with pytest.raises(InputError, match="no split 'train'; available are val, test"):
        open_tagged(tmp_path, "train")


def test_photographs_without_tags_have_splits_too(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "val.txt").write_text("two.PNG\n")
    assert [image.id for image in open_photographs(tmp_path, ["cat"], "val").images] == ["two.PNG"]
    assert [image.id for image in open_photographs(tmp_path, ["cat"], "sub").images] == ["three.webp"]
    with pytest.raises(InputError, match="no split 'train'"):
        open_photographs(tmp_path, ["cat"], "train")
    with pytest.raises(InputError, match="its photographs are its own"):
        open_photographs(tmp_path, ["cat"], None, tmp_path / "sub")


def test_supervision_of_another_layout_is_never_taken_for_images(tmp_path: Path) -> None:
    # A VOC folder without its annotations, and a folder that holds data sets: neither has one class a sub-folder.
    photograph(tmp_path / "kit/JPEGImages/a.jpg")
    photograph(tmp_path / "kit/SegmentationClass/a.png")
    photograph(tmp_path / "coco/images/a.jpg")
    for folder in (tmp_path, tmp_path / "kit", tmp_path / "coco"):
        with pytest.raises(InputError, match="no data set recognised; looked for a VOC year folder"):
            open_tagged(folder)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tags.csv", "", "first line must name the columns"),
        ("tags.csv", "one.jpg,cat\n", "first line must name the columns"),
        ("tags.csv", "file,tags\n", "no image can be used"),
        ("tags.csv", "file,tags\ngone.jpg,cat\n", "gone.jpg: no such image"),
        ("tags.csv", "file,tags\none.jpg,\n", "no image has a tag"),
        ("tags.csv", "file,tags\n../one.jpg,cat\n", "no path inside"),
        ("tags.csv", "file,tags\n/etc/passwd,cat\n", "no path inside"),
        ("tags.csv", f"file,tags\none.jpg,{'x' * 200_000}\n", "no valid CSV"),
        ("tags.csv", "file,tags\n" + "n" * 5000 + ".jpg,cat\n", "no such image"),
        ("tags.csv", 'file,tags\none.jpg,"cat\nfour.jpg,dog\n', "line 3: a name or tag goes on in the next line"),
        ("tags.json", "{", "not valid JSON"),
        ("tags.json", "[" * 100_000, "not valid JSON"),
        ("tags.json", "[]", "recognised|expected"),
        ("tags.json", '{"one.jpg": 5}', "tags of one.jpg are no list"),
        ("tags.json", '{"C:\\\\one.jpg": ["cat"]}', "no path inside"),
    ],
)
def test_bad_tags_files(tmp_path: Path, name: str, text: str, words: str) -> None:
    pets(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        open_tagged(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_that_are_numbers_are_announced(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "tags.csv").write_text(f"file,tags\none.jpg,10;9\ntwo.PNG,²;{'7' * 5000}\n")
    assert any("by numbers: 9, ²" in note for note in open_tagged(tmp_path).notes)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "tags.csv").write_bytes("file,tags\none.jpg,Kätzchen\n".encode("latin-1"))
    with pytest.raises(InputError, match="save it as UTF-8"):
        open_tagged(tmp_path)


def test_a_linked_image_outside(tmp_path: Path) -> None:
    photograph(tmp_path / "secret.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/one.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "set/tags.csv").write_text("file,tags\none.jpg,cat\n")
    with pytest.raises(InputError, match="leaves"):
        open_tagged(tmp_path / "set")


def test_tags_alone_cannot_be_measured_against(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "tags.csv").write_text("file,tags\none.jpg,cat\n")
    with pytest.raises(InputError, match="no boxes or masks"):
        open_annotated(tmp_path)


def test_empty_folder_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data set recognised"):
        open_tagged(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        open_tagged(tmp_path / "none")


def task(number: int, image: str, choices: list[str] | None, **more: Any) -> dict[str, Any]:
    result = [] if choices is None else [{"type": "choices", "value": {"choices": choices}, "from_name": "c"}]
    return {"id": number, "data": {"image": image}, "annotations": [{"result": result, **more}]}


def studio(root: Path, tasks: Any) -> Path:
    pets(root / "images")
    (root / "export.json").write_text(json.dumps(tasks))
    return root / "export.json"


def test_label_studio_export(tmp_path: Path) -> None:
    tasks = [
        task(1, "/data/upload/3/0a1b2c3d-one.jpg", ["cat", "dog"]),
        task(2, "/data/local-files/?d=pets/sub/three.webp", ["dog"]),
        task(3, "https://host.example/a/four.jpg?x=1", None),
        {"id": 4, "data": {"image": "two.PNG"}, "annotations": []},
        task(5, "two.PNG", ["cat"], was_cancelled=True),
        task(6, "/data/upload/3/gone.jpg", ["cat"]),
    ]
    path = studio(tmp_path, tasks)
    assert tags_of(path) == {"one.jpg": ("cat", "dog"), "sub/three.webp": ("dog",), "four.jpg": ()}
    notes = open_tagged(path).notes
    assert "2 tasks have no annotation yet; they are not used" in notes
    assert "1 tasks are skipped" in notes


def test_label_studio_names_with_percent_signs_and_a_task_that_stands_there_twice(tmp_path: Path) -> None:
    twice = [task(2, "one.jpg", ["cat"]), task(3, "one.jpg", ["dog"])]
    path = studio(tmp_path, [task(1, "/data/local-files/?d=50%2520off.jpg", ["cat"]), *twice])
    for name in ("50 off.jpg", "50%20off.jpg"):
        photograph(tmp_path / "images" / name)
    assert tags_of(path) == {"50%20off.jpg": ("cat",), "one.jpg": ("cat", "dog")}
    assert any("1 tasks have several annotations" in note for note in open_tagged(path).notes)


def test_label_studio_short_export(tmp_path: Path) -> None:
    rows = [
        {"image": "/data/upload/1/0a1b2c3d-one.jpg", "id": 1, "choice": "cat", "annotator": 1, "updated_at": "now"},
        {"image": "/data/upload/1/four.jpg", "id": 2, "choice": {"choices": ["cat", "dog"]}},
        {"image": "/data/upload/1/two.PNG", "id": 3},
    ]
    assert tags_of(studio(tmp_path, rows)) == {"one.jpg": ("cat",), "four.jpg": ("cat", "dog"), "two.PNG": ()}


def test_label_studio_addresses_stay_inside(tmp_path: Path) -> None:
    photograph(tmp_path / "secret.jpg")
    path = studio(
        tmp_path / "set", [task(1, "../../secret.jpg", ["cat"]), task(2, "/data/local-files/?d=/etc/x.jpg", ["a"])]
    )
    with pytest.raises(InputError, match="is not in"):
        open_tagged(path)


def test_names_cannot_break_the_line_or_draw_on_the_terminal(tmp_path: Path) -> None:
    pets(tmp_path)
    names = {"one.jpg": ["cat"], "go\nne.jpg": ["cat"], "\x1b[2Jgone.jpg": ["cat"], "\ud800.jpg": ["cat"]}
    (tmp_path / "tags.json").write_text(json.dumps(names))
    notes = open_tagged(tmp_path).notes
    assert "3 of 4 images are skipped" in notes
    assert all(note.isprintable() for note in notes)
    (tmp_path / "tags.json").write_text(json.dumps({"one.jpg": ["c\x1b[2Jat"]}))
    with pytest.raises(InputError, match="unprintable characters; rename it") as caught:
        open_tagged(tmp_path)
    assert str(caught.value).isprintable()


def said(root: Path, words: str) -> bool:
    return any(words in note for note in open_tagged(root).notes)


@pytest.mark.parametrize("name", ["predictions.json", "labels.json"])
def test_predictions_in_a_folder_of_classes_are_not_taken_for_its_annotation(tmp_path: Path, name: str) -> None:
    class_folders("cat/a.jpg", "dog/b.jpg")(tmp_path)
    content = coco(("cat/a.jpg", "dog/b.jpg"))
    expected = {"cat/a.jpg": ("cat", "dog"), "dog/b.jpg": ()}
    write(tmp_path / name, content)
    assert tags_of(tmp_path) == expected
    content["annotations"][0]["score"] = 0.3
    write(tmp_path / name, content)
    with pytest.raises(InputError, match=rf"{name}: holds predictions \(scores\)"):
        open_tagged(tmp_path)
    assert tags_of(tmp_path / name) == expected


def test_a_lone_tags_file_beside_folders_of_classes_is_used_and_that_is_said(tmp_path: Path) -> None:
    class_folders("cat/a.jpg", "dog/b.jpg")(tmp_path)
    write(tmp_path / "mine.csv", "file,tags\ncat/a.jpg,emu\ndog/b.jpg,cow\n")
    assert tags_of(tmp_path) == {"cat/a.jpg": ("emu",), "dog/b.jpg": ("cow",)}
    assert said(tmp_path, "the names of their folders are not taken for classes")


@pytest.mark.parametrize("pair", itertools.combinations(["instances.json", "classes.txt", "tags.csv"], 2))
def test_of_two_kinds_of_annotation_in_one_folder_one_must_be_given(tmp_path: Path, pair: tuple[str, str]) -> None:
    photographs(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path / "a.txt", yolo_box(0, CAT))
    kinds = {
        "instances.json": (coco(("a.jpg", "b.jpg")), {"a.jpg": ("cat", "dog"), "b.jpg": ()}),
        "classes.txt": ("cat\ndog\n", {"a.jpg": ("cat",), "b.jpg": ()}),
        "tags.csv": ("file,tags\na.jpg,emu\n", {"a.jpg": ("emu",)}),
    }
    for name in pair:
        write(tmp_path / name, kinds[name][0])
    with pytest.raises(InputError, match=f"holds {', '.join(pair)}; give the file that holds the annotation"):
        open_tagged(tmp_path)
    for name in pair:
        assert tags_of(tmp_path / name) == kinds[name][1]


def test_of_a_label_studio_task_with_several_images_only_one_that_is_called_image_is_used(tmp_path: Path) -> None:
    before = {**task(1, "", ["cat"]), "data": {"before": "one.jpg", "after": "two.PNG"}}
    thumb = {**task(2, "", ["cat"]), "data": {"thumb": "two.PNG", "image": "four.jpg"}}
    path = studio(tmp_path, [before, thumb, task(3, "sub/three.webp", ["dog"])])
    assert tags_of(path) == {"four.jpg": ("cat",), "sub/three.webp": ("dog",)}
    assert said(path, "task 1 has several images (after, before)") and said(path, "1 tasks are skipped")


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_a_text_beside_label_studio_shapes_is_a_class_only_in_a_column_of_such_a_name(
    tmp_path: Path, suffix: str
) -> None:
    pets(tmp_path / "images")
    plain = {"annotation_id": 1, "id": 1, "image": "one.jpg", "lead_time": 2.5}
    shapes = {"drawn": [studio_value("rectangle", "cat", CAT)]}

    def tags(row: dict[str, Any]) -> tuple[str, ...]:
        path = write(tmp_path / f"export{suffix}", [row])
        if suffix == ".csv":
            cells = [json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values()]
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([list(row), cells])
        return tags_of(path)["one.jpg"]

    assert tags({**plain, **shapes, "site": "north"}) == ("cat",)
    assert tags({**plain, **shapes, "choice": "north"}) == ("cat", "north")
    assert tags({**plain, "weather": "rain"}) == ("rain",)


def test_in_label_studio_one_of_several_choices_is_a_text_whatever_the_column_is_called(tmp_path: Path) -> None:
    rows = [{"id": 1, "image": "one.jpg", "pets": "cat"}, {"id": 2, "image": "two.PNG", "pets": {"choices": CLASSES}}]
    assert tags_of(studio(tmp_path, rows)) == {"one.jpg": ("cat",), "two.PNG": ("cat", "dog")}


@pytest.mark.parametrize("kind", ["tags", "folders", "coco"])
def test_a_list_of_photographs_that_is_not_there_is_refused(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    if kind == "coco":
        photographs(tmp_path / "data", "a.jpg", "b.jpg")
        write(tmp_path / "data/instances.json", coco(("a.jpg", "b.jpg")))
    else:
        class_folders("cat/a.jpg", "dog/a.jpg")(tmp_path / "data")
    if kind == "tags":
        write(tmp_path / "data/tags.csv", "file,tags\ncat/a.jpg,cat\ndog/a.jpg,dog\n")
    name = "a.jpg" if kind == "coco" else "cat/a.jpg"
    for split in ("nosuch.txt", "lists/few", "~/few.txt"):
        with pytest.raises(InputError, match=f"{split}: no such list of photographs"):
            open_tagged(tmp_path / "data", split)
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "few.txt", name)
    assert list(tags_of(tmp_path / "data", "~/few.txt")) == [name]


def test_a_small_split_need_not_show_every_class_of_a_run(tmp_path: Path) -> None:
    class_folders("folders/train/cat/a.jpg", "folders/train/dog/b.jpg", "folders/valid/cat/c.jpg")(tmp_path)
    for part, names in (("train", ("cat", "dog")), ("valid", ("cat",))):
        rows = [f"{name}.jpg,{name}\n" for name in names]
        class_folders(*(f"csv/{part}/{name}.jpg" for name in names))(tmp_path)
        write(tmp_path / "csv" / part / "tags.csv", "".join(["file,tags\n", *rows]))
    for kind in ("folders", "csv"):
        for data, split in ((tmp_path / kind, "val"), (tmp_path / kind / "valid", None)):
            assert list(tags_of(data, split, ["dog", "cat"]).values()) == [("cat",)]
            with pytest.raises(InputError, match="unknown class 'cow'; known are cat, dog"):
                open_tagged(data, split, ["cat", "cow"])


def test_a_blank_after_the_comma_before_a_quote(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "tags.csv").write_text('file, tags\n"one.jpg", "cat;dog"\nfour.jpg, cow\n')
    assert tags_of(tmp_path) == {"one.jpg": ("cat", "dog"), "four.jpg": ("cow",)}


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_either_form_of_unicode_in_tags_and_lists(tmp_path: Path, forms: tuple[str, str]) -> None:
    ours, disk = (unicodedata.normalize(form, "größe é") for form in forms)
    photographs(tmp_path, f"{disk}.jpg", "two.jpg")
    for suffix in (".jpg", ""):
        write(tmp_path / "tags.csv", f"file,tags\n{ours}{suffix},cat\ntwo.jpg,dog\n")
        write(tmp_path / "val.txt", f"{disk if suffix else ours}.jpg\n")
        assert sorted(tags_of(tmp_path).values()) == [("cat",), ("dog",)]
        assert not said(tmp_path, "do not stand in tags.csv") and not said(tmp_path, "skipped")
        assert [image.tags for image in open_tagged(tmp_path, "val").images] == [(0,)]


def test_photographs_in_sub_folders_that_the_tags_do_not_name_are_counted(tmp_path: Path) -> None:
    pets(tmp_path)
    write(tmp_path / "tags.csv", "file,tags\none.jpg,cat\n")
    assert said(tmp_path, "3 images of") and said(tmp_path, "do not stand in tags.csv; they are not used")


def test_photographs_of_kinds_that_are_not_read_are_counted(tmp_path: Path) -> None:
    class_folders("cat/a.jpg", "dog/b.jpg")(tmp_path)
    for name in ("cat/c.HEIC", "d.heic", "dog/e.avif", "dog/b.nef", ".f.heic", "cat/@eaDir/g.heic"):
        write(tmp_path / name, "")
    words = "1 .avif, 2 .heic files are not read; convert them to JPEG"
    assert said(tmp_path, words) and words in open_photographs(tmp_path, ["cat"]).notes
    write(tmp_path / "phone/cat/a.heic", "")
    with pytest.raises(InputError, match=r"no data set recognised; 1 \.heic files are not read; convert them to JPEG"):
        open_tagged(tmp_path / "phone")


def test_of_several_tags_files_one_must_be_given(tmp_path: Path) -> None:
    pets(tmp_path)
    write(tmp_path / "tags.json", {"one.jpg": ["cat"]})
    write(tmp_path / "metadata.csv", "file_name,label\none.jpg,dog\n")
    with pytest.raises(InputError, match=r"holds tags\.json, metadata\.csv; give the file"):
        open_tagged(tmp_path)
    assert tags_of(tmp_path / "tags.json") == {"one.jpg": ("cat",)}


def test_annotation_beside_photographs_with_a_tags_file_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    labelme(shapes=True)(tmp_path)
    write(tmp_path / "tags.csv", "file,tags\na.jpg,emu\n")
    assert tags_of(tmp_path) == {"a.jpg": ("emu",)}
    assert said(tmp_path, "tags.csv is read, Labelme's files beside the photographs are not")
    assert not said(tmp_path, "XML files")
    write(tmp_path / "b.xml", "<annotation/>")
    assert said(tmp_path, "tags.csv is read, XML files beside the photographs are not")


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_annotation_in_the_other_form_of_unicode_is_not_passed_over_either(
    tmp_path: Path, forms: tuple[str, str]
) -> None:
    photo, other = (unicodedata.normalize(form, "größe é") for form in forms)
    labelme(shapes=True)(tmp_path / "beside")
    for name in ("b.jpg", "b.json"):
        (tmp_path / "beside" / name).unlink()
    (tmp_path / "beside/a.jpg").rename(tmp_path / f"beside/{photo}.jpg")
    (tmp_path / "beside/a.json").rename(tmp_path / f"beside/{other}.json")
    write(tmp_path / "beside/tags.csv", f"file,tags\n{photo}.jpg,emu\n")
    assert said(tmp_path / "beside", "tags.csv is read, Labelme's files beside the photographs are not")
    class_folders(f"cat/{photo}.jpg", "dog/b.jpg")(tmp_path / "sorted")
    write(tmp_path / f"sorted/cat/{other}.xml", "<annotation/>")
    assert said(tmp_path / "sorted", "1 images have an XML file beside them, which is not read")
