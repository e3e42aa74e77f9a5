"""Distillation: which labels are taught, how they are shown, and a student that learns."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import labelpenet
from labelpenet import cli, config
from labelpenet.config import Images, Noise, RunOptions
from labelpenet.data import read_image
from labelpenet.errors import InputError
from labelpenet.evaluation import evaluate
from labelpenet.formats import open_annotated, write_predictions
from labelpenet.formats.review import Reviewed, write_review
from labelpenet.instances import Instances, masks_to_boxes
from labelpenet.training import distill
from labelpenet.training.distill import lesson
from labelpenet.training.labels import Fused, read_labels, sort_out
from tests.students import CHOICES, small_student


def labels(boxes, weights, classes=None, size=(40, 60)) -> Instances:
    boxes = torch.tensor(boxes, dtype=torch.float32)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    classes = torch.zeros(len(boxes), dtype=torch.long) if classes is None else torch.tensor(classes)
    return Instances(boxes, classes, torch.tensor(weights), size, masks)


def test_the_best_of_every_tag_and_all_about_as_sure_are_taught():
    boxes = [[0, 0, 9, 9], [10, 0, 19, 9], [20, 0, 29, 9], [30, 0, 39, 9]]
    taught, doubtful = sort_out(labels(boxes, [0.8, 0.5, 0.3, 0.2], [0, 0, 0, 1]), Noise(keep=0.5))
    assert taught.boxes[:, 0].tolist() == [0, 10, 30], "the last one is unsure, but the best of its class"
    assert doubtful[:, 0].tolist() == [20]
    assert taught.weights.tolist() == pytest.approx([0.8, 0.5, 0.2])
    taught, _ = sort_out(labels(boxes, [0.8, 0.5, 0.3, 0.2], [0, 0, 0, 1]), Noise(keep=0.0, weighted=False))
    assert taught.weights.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("weighted", [True, False])
def test_a_label_of_weight_zero_is_doubtful_though_the_best_of_its_class(weighted):
    # as a cascade labels a tag of which it is sure nowhere: the RPN, whose losses have no weights, would learn it
    boxes = [[0, 0, 9, 9], [10, 0, 19, 9]]
    taught, doubtful = sort_out(labels(boxes, [0.8, 0.0], [0, 1]), Noise(weighted=weighted))
    assert taught.boxes.tolist() == boxes[:1] and doubtful.tolist() == boxes[1:]


def test_a_box_inside_a_better_one_of_its_class_is_doubtful():
    boxes = [[0, 0, 30, 30], [5, 5, 15, 15], [5, 5, 15, 15], [0, 0, 30, 30]]
    taught, doubtful = sort_out(labels(boxes, [0.8, 0.8, 0.9, 0.8], [0, 0, 1, 1]), Noise())
    assert taught.boxes.tolist() == [boxes[0], boxes[2], boxes[3]], "a part in its whole; not the whole around its part"
    assert doubtful.tolist() == [boxes[1]]
    assert len(sort_out(labels([boxes[0]] * 2, [0.7, 0.7]), Noise())[0]) == 1, "of two equal ones the first"


def test_labels_follow_their_photograph():
    one = labels([[10, 5, 30, 25], [40, 20, 60, 40]], [1.0, 1.0])
    image = (one.masks.any(0)[..., None].expand(-1, -1, 3) * 255).byte().numpy()
    seen = set()
    for seed in range(12):
        choice = Images(sides=(80, 120), longest=1000)
        found = lesson(image, one, choice, Noise(), torch.Generator().manual_seed(seed))
        height, width = found.target.image_size
        seen.add((height, float(found.target.boxes[0, 0]) > width / 3))
        assert (masks_to_boxes(found.target.masks) - found.target.boxes).abs().max() <= 1
        shown = found.pixels[0] > 0.5
        assert (shown == found.target.masks.any(0)).float().mean() > 0.98
    assert len(seen) == 4, "two sizes, mirrored or not"


def test_masks_do_not_move_against_their_boxes():
    corners = [[8 + 11 * index, 4 + 13 * index] for index in range(12)]
    one = labels([[x, y, x + 37, y + 41] for x, y in corners], [1.0] * 12, size=(200, 200))
    image = np.zeros((200, 200, 3), np.uint8)
    choice = Images(sides=(67,), longest=1000, flip=False)
    found = lesson(image, one, choice, Noise(nested=1.0), torch.Generator()).target
    moved = (masks_to_boxes(found.masks) - found.boxes).mean(0)
    assert moved.abs().max() < 0.15, "of 0.33 where the corner of a pixel stands for it"


def test_labels_without_masks_teach_no_masks(tmp_path):
    folder, year = small_student()
    annotated = open_annotated(year, "train")
    image = annotated.tagged.images[0]
    bare = replace(annotated.read(image.id).instances, masks=None)
    choice, generator = Images(sides=(96,), longest=200), torch.Generator().manual_seed(0)
    student = labelpenet.load(folder).train()
    masks = torch.zeros(len(bare), *bare.image_size, dtype=torch.bool)
    for one in (bare, replace(bare, masks=masks)):  # as of a box alone beside instances with masks
        losses = student.losses([lesson(read_image(image.path), one, choice, Noise(), generator)])
        assert losses["mask"] == 0 and losses["box"] > 0, "an empty mask would be taught as one"
    recipe = config.override(config.StudentRecipe(), CHOICES)
    with pytest.raises(InputError, match="no label has a mask"):
        distill.distill(annotated.tagged, {image.id: bare}, tmp_path / "out", recipe, backbone="tiny")
    doubtful = replace(bare, masks=masks).weighted(torch.zeros(len(bare)))
    with pytest.raises(InputError, match="no photograph has a label surer than 0"):
        distill.distill(annotated.tagged, {image.id: doubtful}, tmp_path / "out", recipe, backbone="tiny")
    assert not (tmp_path / "out").exists()


def test_labels_of_another_size_than_the_photograph_are_not_taught():
    folder, year = small_student()
    annotated = open_annotated(year, "train")
    image = annotated.tagged.images[0]
    own = annotated.read(image.id).instances
    height, width = own.image_size
    half = Instances(own.boxes / 2, own.labels, own.weights, (height // 2, width // 2))
    student = labelpenet.load(folder)
    with pytest.raises(InputError, match="has another size than its labels"):
        distill.stage(student, annotated.tagged, {image.id: half}).load([0], torch.Generator())


def test_a_student_learns_from_labels():
    folder, year = small_student()
    annotated = open_annotated(year, "train")
    student = labelpenet.load(folder)
    found = {image.id: student.predict(image.path) for image in annotated.tagged.images}
    result = evaluate(found, annotated.truths(), student.classes, "voc12")
    assert result["box"]["mAP"] > 0.35 and result["mask"]["mAP@0.25"] > 0.35


def test_a_finished_student_is_only_loaded_again_and_other_labels_are_refused(monkeypatch):
    folder, year = small_student()
    annotated = open_annotated(year, "train")
    truths = {image.id: annotated.read(image.id).instances for image in annotated.tagged.images}
    recipe = config.override(config.StudentRecipe(), CHOICES)
    monkeypatch.setattr(distill, "train_stage", None)
    again = {"backbone": "tiny", "supervision": "labels", "options": RunOptions(resume=True, device="cpu")}
    student = distill.distill(annotated.tagged, truths, folder, recipe, **again)
    assert torch.equal(
        student.plain_state()["rpn.head.cls_logits.weight"],
        labelpenet.load(folder).plain_state()["rpn.head.cls_logits.weight"],
    )
    first = next(name for name, one in truths.items() if len(one))
    pixels = truths[first].masks.flip(-1)
    assert not torch.equal(pixels, truths[first].masks)
    for other in (truths[first][:0], replace(truths[first], masks=pixels)):
        with pytest.raises(InputError, match="another labels"):
            distill.distill(annotated.tagged, {**truths, first: other}, folder, recipe, **again)


def test_averaged_weights_do_not_look_back_to_where_the_learning_rate_was_high():
    annotated = open_annotated(small_student()[1], "train")
    student = labelpenet.load(small_student()[0])
    for steps, asked, decay in (
        (4000, 0.998, 0.998),
        (1600, 0.998, 0.995),
        (1600, 0.9, 0.9),
        (5, 0.998, 0.0),
        (5, None, None),
    ):
        student.recipe = config.override(student.recipe, [f"schedule.steps={steps}"])
        student.recipe = replace(student.recipe, noise=replace(student.recipe.noise, ema=asked))
        assert distill.stage(student, annotated.tagged, {}).ema == decay


def test_a_file_that_found_nothing_may_name_another_size():
    found, nothing = labels([[1, 1, 9, 9]], [0.8]), Instances.empty((7, 7))
    for opinions in (({"a": nothing}, {"a": found}), ({"a": found}, {"a": nothing})):
        fused = Fused(opinions, {"a": (0,)})["a"]
        assert fused.image_size == found.image_size and fused.weights.tolist() == [pytest.approx(0.4)]
    assert not len(Fused(({"a": nothing},), {"a": (0,)})["a"])


def test_labels_of_classes_that_the_tags_do_not_name_are_learnt_and_announced(tmp_path):
    annotated = open_annotated(small_student()[1], "train")
    tagged, one = annotated.tagged, annotated.tagged.images[0]
    found = {one.id: annotated.read(one.id).instances}
    path = write_predictions(tmp_path / "found.json", found, [one], tagged.classes)
    assert read_labels(tmp_path, [path], tagged)[1] == ()
    images = replace(tagged, images=(replace(one, tags=()), *tagged.images[1:]))
    known, notes = read_labels(tmp_path, [path], images)
    assert len(known[one.id]) == len(found[one.id]) > 0
    assert notes == (f"{path}: 1 photographs have labels of classes that their tags do not name; they are learnt, too",)


def test_a_tag_without_a_label_is_announced(tmp_path):
    annotated = open_annotated(small_student()[1], "train")
    tagged, one = annotated.tagged, annotated.tagged.images[0]
    found = annotated.read(one.id).instances
    paths = [
        write_predictions(tmp_path / f"{count}.json", {one.id: found[:count]}, [one], tagged.classes)
        for count in (0, len(found))
    ]
    said = "1 photographs have no label of one of their tags: it is learnt as background"
    assert read_labels(tmp_path, paths[:1], tagged)[1] == (said,)
    assert read_labels(tmp_path, paths, tagged)[1] == ()


def test_a_file_of_labels_counts_once(tmp_path):
    """Given twice it would count as two models that agree."""
    annotated = open_annotated(small_student()[1], "train")
    one = annotated.tagged.images[0]
    paths = [
        write_predictions(tmp_path / name, {one.id: annotated.read(one.id).instances}, [one], annotated.tagged.classes)
        for name in ("a.json", "b.json")
    ]
    assert set(read_labels(tmp_path, paths, annotated.tagged)[0]) == {one.id}
    (tmp_path / "link.json").symlink_to(paths[0])
    for again in (paths[0], tmp_path / "link.json"):
        with pytest.raises(InputError, match=r"a\.json: given twice.*once"):
            read_labels(tmp_path, [*paths, again], annotated.tagged)


def test_what_a_person_said_of_labels_is_no_opinion_among_several(tmp_path):
    """An object that was rejected came back with another file's weight, a class that was corrected was lost."""
    annotated = open_annotated(small_student()[1], "train")
    tagged = annotated.tagged
    images = [one for one in tagged.images if len(annotated.read(one.id).instances) > 1][:4]
    found = {one.id: annotated.read(one.id).instances for one in images}
    model = write_predictions(tmp_path / "model.json", found, images, tagged.classes)
    first, second, third, fourth = (one.id for one in images)
    other = next(label for label in range(len(tagged.classes)) if label not in images[0].tags)
    (row,) = found[first][:1].to_coco(0)
    said = {
        first: Reviewed("accepted", found[first].image_size, [{**row, "category_id": other + 1, "instance": 0}]),
        second: Reviewed("rejected", found[second].image_size, []),
        third: Reviewed("dropped", found[third].image_size, []),
    }
    review = write_review(tmp_path / "review.json", said, tagged.images, tagged.classes)
    alone, _ = read_labels(tmp_path, [review], tagged)
    for paths in ([review, model], [model, review]):
        known, notes = read_labels(tmp_path, paths, tagged)
        assert set(known) == {first, fourth}
        one = known[first]
        assert (one.labels.tolist(), one.weights.tolist()) == ([other], [1.0])
        assert torch.equal(one.masks, alone[first].masks) and torch.equal(one.masks, found[first].masks[:1])
        assert len(known[fourth]) > 0
        assert f"{review}: 2 photographs of the review are not accepted; they are left out" in notes
        assert "1 photographs are learnt as a person has accepted them, whatever other files say" in notes
        assert "1 photographs have no label of one of their tags: it is learnt as background" in notes
    again = write_review(tmp_path / "again.json", said, tagged.images, tagged.classes)
    with pytest.raises(InputError, match=r"again\.json: .* in another review too"):
        read_labels(tmp_path, [review, again], tagged)


def test_from_a_file_of_labels_to_predictions_on_the_command_line(tmp_path, capsys):
    folder, year = small_student()
    teacher, out = tmp_path / "run", tmp_path / "student"
    teacher.mkdir()
    facts = json.loads((folder / "run.json").read_text())
    del facts["checksum"]
    (teacher / "run.json").write_text(json.dumps(facts))
    choices = [one for one in CHOICES if not one.startswith("schedule.steps")]
    common = ["distill", str(teacher), str(year), "--out", str(out), "--set", *choices, "schedule.steps=2"]
    with pytest.raises(SystemExit):
        cli.main(common)
    assert "module4.json: not there" in capsys.readouterr().err
    annotated = open_annotated(year, "train")
    images_of = annotated.tagged
    images = images_of.images[:4]
    found = {image.id: annotated.read(image.id).instances for image in images}
    corrected = write_predictions(tmp_path / "corrected.json", found, images, annotated.tagged.classes)
    cli.main([*common, "--labels", str(corrected)])
    assert json.loads((out / "run.json").read_text())["images"] == 4
    later = write_predictions(tmp_path / "later.json", dict(list(found.items())[2:]), images[2:], images_of.classes)
    two = tmp_path / "two"
    common[common.index(str(out))] = str(two)
    cli.main([*common, "--labels", str(corrected), str(later)])
    facts = json.loads((two / "run.json").read_text())
    assert facts["images"] == 4 and facts["source"]["labels"] == f"{corrected} {later}"
    cli.main(["measure", str(folder), str(year), "--split", "val"])
    said = capsys.readouterr()
    assert "student" in said.out and "trained on" not in said.err
    cli.main(["measure", str(folder), str(year), "--split", "train", "--modules", "4"])
    assert "photographs that it is measured on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["measure", str(folder), str(year), "--modules", "2"])
    assert "a student, which has no modules" in capsys.readouterr().err
    cli.main(["measure", str(folder), str(year), "--split", "val"])
    assert json.loads((folder / "results.json").read_text())["val"]["student"]["box"]["mAP"] >= 0
    cli.main(["report", str(folder), "--images", "1"])
    page = (folder / "report.html").read_text()
    assert "student class by class" in page and "torchvision" in page
