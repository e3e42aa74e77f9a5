"""Full and mixed supervision: what is learnt from true objects, and that nothing of them is known where none may be."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image

from labelpenet import config
from labelpenet.cli import main
from labelpenet.config import Calibration, CascadeOptions, override, recipe
from labelpenet.data import AnnotatedImages, TaggedImage, TaggedImages, Truth, write_scenes
from labelpenet.errors import InputError
from labelpenet.evaluation import evaluate
from labelpenet.formats import open_annotated, open_tagged
from labelpenet.formats.coco import export_coco
from labelpenet.formats.corrected import Corrected
from labelpenet.formats.review import Reviewed, write_review
from labelpenet.instances import Instances, masks_to_boxes
from labelpenet.models.cascade import LabelPEnet
from labelpenet.training.inferred import read_inferred
from labelpenet.training.predict import Predictor
from labelpenet.training.pretrain import Training, load_samples, module_loss
from labelpenet.training.run import train_run
from labelpenet.training.supervised import (
    fully_supervised,
    masks_in_boxes,
    match,
    open_supervision,
    presentations,
    read_corrections,
    read_supervision,
    true_objects,
    with_masks,
)
from tests.formats.corpus import coco, photographs, write
from tests.models.tiny import lively_tiny
from tests.test_cli import SIDES, one_line, train_arguments
from tests.training.test_pretrain import boxes_of, results, tiny_recipe

CLASSES = 4
MASKED, BOXED = ("train_00000", "train_00001", "train_00002"), ("train_00003", "train_00004")
SUPERVISED = (*MASKED, *BOXED)
FULL = ("--supervision", "full", "--set", *SIDES, "modules.4.label.vote=true")


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Path:
    """Eight scenes: three with masks, two with boxes only, and three whose annotation nobody may look at."""
    year = write_scenes(tmp_path_factory.mktemp("kit") / "scenes", train=8, val=4, size=(96, 96), seed=3)
    for name in BOXED:
        for folder in ("SegmentationObject", "SegmentationClass"):
            (year / folder / f"{name}.png").unlink()
    return year


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    (path / "supervised.txt").write_text("\n".join([*SUPERVISED[:-1], f"{SUPERVISED[-1]}.jpg", "elsewhere"]))
    return path


@pytest.fixture(scope="module")
def tags_run(kit, folder) -> Path:
    """A run that would fail if it opened more than the names of the objects."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("annotation was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("labelpenet.formats.voc.read_objects", refuse)
        patch.setattr("labelpenet.formats.voc.read_index_map", refuse)
        main(train_arguments(kit, folder / "tags"))
    return folder / "tags"


@pytest.fixture(scope="module")
def mixed_run(kit, folder) -> Path:
    main(train_arguments(kit, folder / "mixed", *mixed(folder)))
    return folder / "mixed"


@pytest.fixture(scope="module")
def full_run(kit, folder) -> Path:
    main(train_arguments(kit, folder / "full", *FULL))
    return folder / "full"


def mixed(folder: Path) -> tuple[str, ...]:
    return ("--supervision", "mixed", "--supervised", str(folder / "supervised.txt"))


def objects(year: Path, split: str = "train") -> dict[str, Instances]:
    """The true objects of every image, read for comparison."""
    annotated = open_annotated(year, split)
    return {image.id: annotated.read(image.id).instances for image in annotated.tagged.images}


# ------------------------------------------------------------------------------------- what may be looked at


def watched(annotated: AnnotatedImages, opened: list[str]) -> AnnotatedImages:
    def read(image_id: str) -> Truth:
        opened.append(image_id)
        return annotated.read(image_id)

    return AnnotatedImages(annotated.tagged, read, annotated.categories)


def test_the_strongest_annotation_of_each_image_is_found(kit):
    found = read_supervision("mixed", open_annotated(kit, "train"))
    truths = objects(kit)
    assert list(found.truths) == list(truths)
    for name, truth in truths.items():
        own = found.truths[name]
        assert torch.equal(own.boxes, truth.boxes) and torch.equal(own.labels, truth.labels)
        assert own.weights.tolist() == [1.0] * len(truth)
        if name in BOXED:
            assert own.masks is None
        else:
            assert torch.equal(own.masks, truth.masks)
    assert "6 images with masks, 2 with boxes only, 0 with tags only" in found.notes[-1]


def test_only_listed_annotation_is_read(kit):
    opened: list[str] = []
    found = read_supervision("mixed", watched(open_annotated(kit, "train"), opened), [*SUPERVISED, "elsewhere"])
    assert opened == list(found.truths) == list(SUPERVISED)
    assert found.notes[0].startswith("1 of the 6 images")
    assert "3 images with masks, 2 with boxes only, 3 with tags only" in found.notes[-1]
    with pytest.raises(InputError, match="none of the images"):
        read_supervision("mixed", open_annotated(kit, "train"), ["elsewhere"])


def test_a_listed_name_that_fits_several_images_is_refused_and_an_id_is_that_image_alone(tmp_path):
    for folder, names in (("one", ("x/1.jpg", "y/1.jpg")), ("two", ("1.jpg", "sub/1.jpg"))):
        photographs(tmp_path / folder / "images", *names)
        write(tmp_path / folder / "instances.json", coco(names))
    several = open_annotated(tmp_path / "one")
    with pytest.raises(InputError, match=r"1\.jpg may be several images of the split; list them by their ids"):
        read_supervision("mixed", several, ["1.jpg"])
    assert list(read_supervision("mixed", several, ["x/1.jpg"]).truths) == ["x/1.jpg"]
    assert list(read_supervision("mixed", open_annotated(tmp_path / "two"), ["1.jpg"]).truths) == ["1.jpg"]


def test_objects_without_a_box_leave_an_image_with_its_tags(kit, tmp_path):
    year = Path(shutil.copytree(kit, tmp_path / "kit"))
    path = year / "Annotations" / "train_00006.xml"
    path.write_text(re.sub(r"<bndbox>.*?</bndbox>", "", path.read_text(), flags=re.DOTALL))
    assert "train_00006" in read_supervision("mixed", open_annotated(year, "train")).truths  # boxes of the masks
    for folder in ("SegmentationObject", "SegmentationClass"):
        (year / folder / "train_00006.png").unlink(missing_ok=True)
    images = open_tagged(year, "train")
    assert images == open_annotated(year, "train").tagged and images.images[6].tags
    some = read_supervision("mixed", open_annotated(year, "train"))
    assert "train_00006" not in some.truths and len(some.truths) == 7
    assert some.images(images) == images and any("train_00006" in note for note in some.notes)
    all_of_it = read_supervision("full", open_annotated(year, "train"))
    assert [image.id for image in all_of_it.images(images).images] == list(some.truths)


def test_difficult_objects_are_learnt_and_crowds_are_neither_object_nor_background():
    masks = torch.zeros(4, 10, 10, dtype=torch.bool)
    masks[:, 2:5, 2:6] = True
    boxes = torch.tensor([[2.0, 2, 6, 5], [2, 2, 6, 5], [2, 2, 6, 5], [9, 9, 9, 10]])
    found = Instances(boxes, torch.tensor([0, 1, 2, 3]), torch.full((4,), 0.5), (10, 10), masks)
    difficult, crowd = torch.tensor([True, False, False, False]), torch.tensor([False, True, False, False])
    kept = true_objects(Truth(found, difficult, crowd))
    assert kept.labels.tolist() == [0, 1, 2] and kept.weights.tolist() == [1, 0, 1], "a box without area is none"
    assert torch.equal(kept.masks, masks[:3])
    masks[1] = False
    assert true_objects(Truth(found, difficult, crowd)).masks is not None
    masks[2] = False  # an object that the masks do not show
    assert true_objects(Truth(found, difficult, crowd)).masks is None


def test_a_crowd_competes_for_no_pixel_and_gives_no_tag():
    size, image = (48, 64), np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    boxes = torch.tensor([[4.0, 4, 28, 28], [0, 0, 64, 48]])
    truth = Instances(boxes, torch.tensor([0, 1]), torch.tensor([1.0, 0]), size)
    nothing, settings = Instances.empty(size, with_masks=True), Calibration(threshold=0.5)
    alone, both = (with_masks(one, nothing, image, settings) for one in (truth[:1], truth))
    assert torch.equal(both.masks[0], alone.masks[0]) and bool(both.masks[1].all())
    assert both.weights.tolist() == [1, 0]
    found = TaggedImages(("cat", "dog"), (TaggedImage("a", Path("a.jpg"), (0, 1)),))
    none = torch.zeros(2, dtype=torch.bool)
    read = Corrected({"a": lambda: Truth(truth, none, truth.weights == 0)}, frozenset(), ())
    assert read_corrections(found, read).tags == {"a": (0,)}


def test_full_supervision_has_as_many_presentations_as_the_weak_detectors_together():
    changed = ["modules.4.schedule.batch_size=3", "modules.2.schedule.batch_size=8"]
    for one in (config.best(), override(config.demo(), changed)):
        full = fully_supervised(one)
        schedule = full.modules[3].schedule
        assert abs(schedule.steps * schedule.batch_size - presentations(one)) <= schedule.batch_size / 2
        assert replace(full.modules[3], schedule=one.modules[3].schedule) == one.modules[3]
        assert replace(full, modules=one.modules) == one and full.modules[:3] == one.modules[:3]
    later = [module.schedule for module in config.best().modules[1:]]
    assert presentations(config.best()) == sum(one.steps * one.batch_size for one in later)


# ------------------------------------------------------------------------------------- images with boxes only


def test_an_image_with_boxes_only_teaches_boxes_and_no_masks(kit, tmp_path):
    images = open_tagged(kit, "train")
    network = LabelPEnet(lively_tiny(7), images.classes, tiny_recipe())
    training = Training(network, images, boxes_of(images), tmp_path, Fabric(accelerator="cpu", devices=1))
    truths = read_supervision("full", open_annotated(kit, "train")).truths
    load, loss = load_samples(training, truths, masks=True), module_loss(training, 4)
    for index, image in enumerate(images.images[:5]):
        torch.manual_seed(0)
        network.zero_grad()
        terms = loss(load([index], torch.Generator().manual_seed(0)), 0)
        sum(terms.values()).backward()
        learnt = [p.grad is not None and bool(p.grad.any()) for p in network.segmentation.mask_head.parameters()]
        assert min(terms["class"], terms["box"], terms["rpn_objectness"]) > 0
        if image.id in BOXED:
            assert terms["mask"] == 0 and not any(learnt)
        else:
            assert terms["mask"] > 0 and any(learnt)


def square(size: tuple[int, int], x1: int, y1: int, x2: int, y2: int) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


def test_a_true_box_takes_the_mask_that_was_inferred_for_it_or_what_the_crf_finds_in_it():
    size = (48, 64)
    image = np.full((*size, 3), 90, np.uint8)
    disc = torch.from_numpy((np.mgrid[:48, :64][0] - 24) ** 2 + (np.mgrid[:48, :64][1] - 48) ** 2 < 11**2)
    image[disc.numpy()] = (250, 30, 30)
    boxes = torch.tensor([[4.0, 4, 28, 28], [36, 12, 60, 36], [2, 40, 10, 46]])
    truth = Instances(boxes, torch.tensor([0, 1, 2]), torch.ones(3), size)
    own = square(size, 6, 6, 30, 24)  # reaches beyond its box
    masks = torch.stack([own, square(size, 36, 12, 60, 36), square(size, 0, 0, 5, 5)])
    # the second is of another class than the box that it fits, the third of the right one elsewhere
    found = Instances(masks_to_boxes(masks), torch.tensor([0, 2, 1]), torch.rand(3), size, masks)
    settings = Calibration(threshold=0.5, sxy_bilateral=20.0, srgb=8.0, compat_bilateral=5.0)
    result = with_masks(truth, found, image, settings)
    assert torch.equal(result.boxes, boxes) and torch.equal(result.labels, truth.labels)
    assert result.weights.tolist() == [1, 1, 1]
    assert torch.equal(result.masks[0], own & square(size, 4, 4, 28, 28))
    iou = (result.masks[1] & disc).sum() / (result.masks[1] | disc).sum()
    assert iou > 0.9  # the box alone has 0.64
    assert result.masks[2].any() and not (result.masks[2] & ~square(size, 2, 40, 10, 46)).any()
    # an inferred instance of weight 0, whose mask fills its box, has no say
    found = Instances(
        boxes, truth.labels, torch.zeros(3), size, torch.stack([square(size, *map(int, box)) for box in boxes])
    )
    doubtful, alone = (with_masks(truth, one, image, settings) for one in (found, found[:0]))
    assert torch.equal(doubtful.masks, alone.masks)


@pytest.mark.parametrize("count", [0, 3])
def test_true_boxes_are_kept_whatever_was_inferred(count):
    rng = np.random.default_rng(count)
    image = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
    corner = torch.from_numpy(rng.uniform(0, 25, (3, 2))).float()
    truth = Instances(torch.cat([corner, corner + 12.5], 1), torch.tensor([0, 1, 1]), torch.ones(3), (40, 50))
    found = Instances.empty((40, 50), with_masks=True)
    if count:  # masks that lie elsewhere than the boxes that they come with
        found = Instances(truth.boxes, truth.labels, torch.ones(3), (40, 50), torch.zeros(3, 40, 50, dtype=torch.bool))
    result = with_masks(truth, found, image, Calibration(iterations=1))
    assert torch.equal(result.boxes, truth.boxes) and result.masks.flatten(1).any(1).all()
    tight = masks_to_boxes(result.masks)
    assert (tight[:, :2] >= truth.boxes[:, :2].floor()).all() and (tight[:, 2:] <= truth.boxes[:, 2:].ceil()).all()
    assert len(with_masks(truth[:0], found, image, Calibration())) == 0
    assert match(truth, found)[1].tolist() == [bool(count)] * 3


# ------------------------------------------------------------------------------------- mixed supervision


def test_true_objects_stand_in_exactly_where_they_may_be_known(kit, tags_run, mixed_run):
    truths = objects(kit)
    for number in range(1, 5):
        found = read_inferred(mixed_run, f"module{number}", CLASSES)
        for name, truth in truths.items():
            own = found[name]
            if name in SUPERVISED:
                assert torch.equal(own.boxes, truth.boxes) and own.labels.tolist() == truth.labels.tolist()
                assert own.weights.tolist() == [1.0] * len(truth) and own.masks is not None
            if name in MASKED:
                assert np.packbits(own.masks).tobytes() == np.packbits(truth.masks).tobytes()
    # module 1 learns from tags in both runs: where nothing else is known, both infer the same
    one, other = (read_inferred(run, "module1", CLASSES) for run in (tags_run, mixed_run))
    for name in truths:
        same = one[name].boxes.shape == other[name].boxes.shape and torch.equal(one[name].masks, other[name].masks)
        assert same == (name not in SUPERVISED)


def test_annotation_that_is_not_listed_makes_no_difference(kit, folder, mixed_run, tmp_path):
    year = Path(shutil.copytree(kit, tmp_path / "kit"))
    for name in ("train_00005", "train_00006", "train_00007"):
        path = year / "Annotations" / f"{name}.xml"
        path.write_text(re.sub(r"<(xmin|ymin|xmax|ymax)>\d+<", r"<\g<1>>7<", path.read_text()))
        for maps in ("SegmentationObject", "SegmentationClass"):
            Image.fromarray(np.full((5, 5), 255, np.uint8)).save(year / maps / f"{name}.png")
    main(train_arguments(year, tmp_path / "run", "--until", "2", *mixed(folder)))
    before = results(mixed_run)
    assert all(before[name] == content for name, content in results(tmp_path / "run").items())


def test_a_run_on_tags_opens_no_annotation_and_says_nothing_of_supervision(tags_run):
    assert not {"supervision", "truth"} & set(json.loads((tags_run / "run.json").read_text()))


# ------------------------------------------------------------------------------------- full supervision


def test_a_fully_supervised_run_is_a_run(kit, full_run, tmp_path, capsys):
    assert set(results(full_run)) == {
        "weights/stem.safetensors", "weights/segmentation.safetensors", "instances/module4.json"
    }  # fmt: skip
    tagged = {image.id: image.tags for image in open_tagged(kit, "train").images}
    found = read_inferred(full_run, "module4", CLASSES)
    assert set(found) == set(tagged)
    assert all(set(found[name].labels.tolist()) <= set(tags) for name, tags in tagged.items())
    main(["predict", str(full_run), "--data", str(kit), "--split", "val", "--out", str(tmp_path / "p.json")])
    assert "module 2 is not trained" in one_line(
        ["predict", str(full_run), str(kit / "JPEGImages/val_00000.jpg"), "--module", "2"], capsys
    )
    main(["measure", str(full_run), str(kit), "--device", "cpu", "--cache", str(full_run.parent / "cache")])
    measured = json.loads((full_run / "results.json").read_text())
    assert set(measured["train"]) == set(measured["val"]) == {"4"} and "uncalibrated" not in measured
    main(["report", str(full_run), "--images", "1"])
    page = (full_run / "report.html").read_text()
    assert "is not trained yet" not in page and "alone." not in page.split("<table")[0].split("Report of")[0]


def test_modules_that_nobody_trained_have_no_vote(kit, full_run):
    """Neither in the labels that a fully supervised run keeps nor when it is read again."""
    kept, again = read_inferred(full_run, "module4", CLASSES), Predictor(full_run, "cpu", tagged=True)
    images = open_tagged(kit, "train").images
    assert sum(len(kept[image.id]) for image in images) > len(images)
    for image, expected, _ in again.find(images, 4):
        own = kept[image.id].weights.sort(descending=True).values
        torch.testing.assert_close(own, expected.weights, atol=1e-3, rtol=0)


def test_a_run_is_not_continued_under_other_supervision(kit, folder, full_run, tags_run, mixed_run, capsys):
    def refused(run: Path, *more: str) -> str:
        return one_line(train_arguments(kit, run, "--resume", *more), capsys)

    full = FULL[:2]
    on_tags = refused(full_run, *FULL[2:]), refused(mixed_run)
    for line in (*on_tags, refused(tags_run, *full), refused(tags_run, *mixed(folder))):
        assert "was started with another" in line and "supervision" in line
    assert "another truth;" in refused(mixed_run, *mixed(folder)[:2])
    before = results(mixed_run), results(full_run)
    main(train_arguments(kit, mixed_run, "--resume", *mixed(folder)))
    main(train_arguments(kit, full_run, "--resume", *FULL))
    assert (results(mixed_run), results(full_run)) == before


def test_what_does_not_go_together_is_refused(kit, folder, tmp_path, capsys):
    listed, full = mixed(folder)[2:], ("--supervision", "full")
    out = tmp_path / "run"
    assert "--supervision mixed" in one_line(train_arguments(kit, out, *listed), capsys)
    assert "--supervision mixed" in one_line(train_arguments(kit, out, *full, *listed), capsys)
    assert "--until" in one_line(train_arguments(kit, out, *full, "--until", "3"), capsys)
    missing = ("--supervision", "mixed", "--supervised", str(tmp_path / "missing.txt"))
    assert "missing.txt" in one_line(train_arguments(kit, out, *missing), capsys)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        shutil.copy(kit / "JPEGImages/val_00000.jpg", tmp_path / "photos" / name)
    assert "no boxes or masks" in one_line(train_arguments(tmp_path / "photos", out, *full), capsys)
    assert not out.exists()


@pytest.mark.slow
def test_full_supervision_learns(tmp_path):
    year = write_scenes(tmp_path / "scenes", train=40, val=16, size=(96, 96), seed=1)
    annotated, held_out = open_annotated(year, "train"), open_annotated(year, "val")
    changes = ["images.sides=96", "images.test_side=96", "warm_up.steps=60", "modules.4.schedule.steps=120"]
    one = override(recipe("demo"), [*changes, "modules.2.schedule.steps=1", "modules.3.schedule.steps=1"])
    network = train_run(
        annotated.tagged, tmp_path / "run", one, backbone="tiny",
        supervision=read_supervision("full", annotated), options=CascadeOptions(device="cpu", cache=tmp_path / "cache"),
    )  # fmt: skip
    found = {image.id: network.predict(image.path) for image in held_out.tagged.images}
    result = evaluate(found, held_out.truths(), held_out.tagged.classes)
    assert result["mask"]["mAP@0.5"] > 0.15  # 0.33 when this was written; 0.01 after a single step


# --------------------------------------------------------------------------------------------- what was corrected


def reviewed(kit: Path, path: Path, said: dict[str, str], label: int | None = None) -> Path:
    """A file of the review page with the true objects of the accepted photographs; all of class ``label`` if given."""
    images = open_tagged(kit, "train")
    rows = {}
    for name, status in said.items():
        one = objects(kit)[name]
        categories = [label + 1] * CLASSES if label is not None else range(1, CLASSES + 1)
        kept = one.to_coco(name, categories) if status == "accepted" else []
        rows[name] = Reviewed(status, one.image_size, kept)  # type: ignore[arg-type]
    return write_review(path, rows, images.images, images.classes)


def test_corrected_objects_and_tags_are_learnt_dropped_photographs_are_not_and_rejected_ones_go_by_their_tags(
    kit, tmp_path
):
    said = dict(zip(("train_00005", "train_00006", "train_00007"), ("accepted", "rejected", "dropped"), strict=True))
    file = reviewed(kit, tmp_path / "review.json", said, label=2)
    images = open_tagged(kit, "train")
    found = open_supervision("mixed", kit, "train", images, None, [file])
    assert found is not None and set(found.truths) == {"train_00005"}  # DATA's own annotation is not read
    truth = objects(kit)["train_00005"]
    assert found.truths["train_00005"].labels.tolist() == [2] * len(truth)
    assert found.truths["train_00005"].masks is not None and truth.masks is not None
    assert bool((found.truths["train_00005"].masks == truth.masks).all())
    used = found.images(images)
    tags = {image.id: image.tags for image in used.images}
    assert len(tags) == 7 and "train_00007" not in tags and tags["train_00005"] == (2,)
    assert tags["train_00006"] == next(image.tags for image in images.images if image.id == "train_00006")
    text = "\n".join(found.notes)
    assert "1 images with masks, 0 with boxes only, 6 with tags only" in text  # of eight, one of which is dropped
    assert "1 images are left out" in text and "of 1 of which the tags change" in text


def test_a_correction_stands_in_for_annotation_and_all_else_is_as_listed(kit, folder, tmp_path):
    file = reviewed(kit, tmp_path / "review.json", {MASKED[0]: "accepted", MASKED[1]: "dropped"}, label=1)
    found = open_supervision("mixed", kit, "train", open_tagged(kit, "train"), folder / "supervised.txt", [file])
    assert found is not None and set(found.truths) == {MASKED[0], MASKED[2], *BOXED}
    assert set(found.truths[MASKED[0]].labels.tolist()) == {1}


def test_corrections_of_other_tools_are_matched_by_file_and_their_classes_by_name(kit, tmp_path):
    images = open_tagged(kit, "train")
    chosen = images.images[2:4]
    truth = {image.id: objects(kit)[image.id] for image in chosen if image.id in MASKED}
    turned = {
        name: Instances(one.boxes, CLASSES - 1 - one.labels, one.weights, one.image_size, one.masks)
        for name, one in truth.items()
    }
    export_coco(turned, chosen, images.classes[::-1], tmp_path / "labels")
    found = open_supervision(
        "mixed", kit, "train", images, None, [tmp_path / "labels/annotations/instances_default.json"]
    )
    assert found is not None and set(found.truths) == set(truth)
    for name, one in truth.items():
        assert found.truths[name].labels.tolist() == one.labels.tolist()
        assert bool((found.truths[name].masks == one.masks).all())


def test_what_cannot_be_meant_is_refused_in_one_line(kit, tmp_path, capsys):
    file = reviewed(kit, tmp_path / "review.json", {MASKED[0]: "accepted"})
    twin = reviewed(kit, tmp_path / "twin.json", {MASKED[0]: "dropped"})
    none = reviewed(kit, tmp_path / "none.json", {MASKED[0]: "dropped"})
    stranger = tmp_path / "stranger.json"
    stranger.write_text(file.read_text().replace(MASKED[0], "elsewhere"))
    torn = tmp_path / "torn.json"
    torn.write_text(file.read_text().replace('"status"', '"state"'))
    small = tmp_path / "small.json"
    small.write_text(file.read_text().replace('"height": 96', '"height": 95'))
    train = train_arguments(kit, tmp_path / "run")
    mixed = ("--supervision", "mixed", "--corrected")
    for options, message in (
        (("--corrected", str(file)), "goes with --supervision mixed"),
        ((*mixed, str(file), str(twin)), "leave one of them out"),
        ((*mixed, str(none)), "nothing was accepted"),
        ((*mixed, str(stranger)), "says nothing of the photographs"),
        ((*mixed, str(torn)), "damaged"),
        ((*mixed, str(small)), "correct it again or take it out"),
        ((*mixed, str(tmp_path / "missing.json")), "no such file"),
    ):
        assert message in one_line([*train, *options], capsys), options
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [1, 2, 4])
def test_masks_made_of_boxes_share_no_pixel(number):
    boxes = torch.zeros(2, 40, 60, dtype=torch.bool)
    boxes[0, 5:35, :35] = boxes[1, 5:35, 25:] = True
    settings = recipe("best").modules[number - 1].label
    image = np.full((40, 60, 3), 90, np.uint8)
    image[5:35] = 200, 30, 30  # one colour in both
    masks = masks_in_boxes(boxes, image, settings)
    assert masks.flatten(1).any(1).all() and not (masks[0] & masks[1]).any()
