"""The scripts in benchmarks/ that the figures of README and docs come from: their pure functions."""

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.ops import box_iou

import labelpenet
from labelpenet.config import Calibration, recipe, shorten
from labelpenet.data import read_image
from labelpenet.evaluation import Record
from labelpenet.formats import open_annotated, read_predictions
from labelpenet.instances import Instances
from labelpenet.models.cascade import LabelPEnet
from tests.students import random_run, small_student


def script(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))  # of a script that is run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


diagnosis, baselines, answers = script("diagnosis"), script("baselines"), script("answers")


def one_image(boxes, labels, scores, objects, classes, difficult=None) -> Record:
    return Record(
        boxes=np.array(boxes, float).reshape(-1, 4),
        labels=np.array(labels, int),
        scores=np.array(scores, float),
        masks=None,
        truth_boxes=np.array(objects, float).reshape(-1, 4),
        truth_labels=np.array(classes, int),
        truth_masks=None,
        difficult=np.zeros(len(classes), bool) if difficult is None else np.array(difficult),
        crowd=np.zeros(len(classes), bool),
    )


# Objects: two sheep (0) side by side, a big dog (1), a difficult dog far away.
OBJECTS = [[0, 0, 10, 10], [12, 0, 22, 10], [40, 0, 80, 40], [100, 100, 120, 120]]
CLASSES = [0, 0, 1, 1]
KINDS = [
    ("right", [0, 0, 10, 9], 0, 0),
    ("duplicate", [0, 0, 10, 8], 0, 0),
    ("wrong class", [41, 0, 80, 40], 0, 2),
    ("group", [-1, -4, 23, 12], 0, None),
    ("part", [45, 0, 55, 10], 1, 2),
    ("loose", [30, 0, 120, 60], 1, 2),
    ("misplaced", [60, 0, 110, 30], 1, 2),
    ("wrong class", [5, 0, 5 + 25, 10], 1, None),
    ("background", [200, 200, 220, 220], 0, -1),
    ("ignored", [100, 100, 120, 119], 1, 3),
]


def test_each_kind_of_error_is_told_apart():
    scores = np.linspace(0.9, 0.1, len(KINDS))
    item = one_image([box for _, box, _, _ in KINDS], [c for _, _, c, _ in KINDS], scores, OBJECTS, CLASSES,
                     [False, False, False, True])  # fmt: skip
    verdict = diagnosis.judge(item)
    assert [diagnosis.KINDS[kind] for kind in verdict.kind] == [name for name, *_ in KINDS]
    for (name, _, _, target), found in zip(KINDS, verdict.target, strict=True):
        assert target is None or found == target, name


def test_the_better_score_takes_the_object_whatever_the_order():
    boxes = [[0, 0, 10, 8], [0, 0, 10, 10], [0, 0, 10, 9]]
    kinds = diagnosis.judge(one_image(boxes, [0] * 3, [0.2, 0.5, 0.9], OBJECTS, CLASSES)).kind
    assert [diagnosis.KINDS[kind] for kind in kinds] == ["duplicate", "duplicate", "right"]


@pytest.mark.parametrize("objects", [[], OBJECTS])
def test_images_without_instances_or_objects(objects):
    nothing = one_image([], [], [], objects, CLASSES[: len(objects)])
    assert len(diagnosis.judge(nothing).kind) == 0
    some = one_image([[300, 300, 310, 310]], [0], [0.5], objects, CLASSES[: len(objects)])
    assert diagnosis.judge(some).kind.tolist() == [diagnosis.BACKGROUND]
    for item in (nothing, some):
        for what in diagnosis.MENDS:
            diagnosis.mend(item, diagnosis.judge(item), what)


def random_images(rng, count=30):
    images = []
    for _ in range(count):
        number = int(rng.integers(1, 5))
        corner = rng.uniform(0, 80, (number, 2))
        objects = np.concatenate([corner, corner + rng.uniform(5, 40, (number, 2))], 1)
        boxes = np.concatenate([objects, objects]) + rng.normal(0, 6, (2 * number, 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        classes = rng.integers(0, 3, number)
        labels = np.where(rng.random(2 * number) < 0.7, np.tile(classes, 2), rng.integers(0, 3, 2 * number))
        images.append(one_image(boxes, labels, rng.random(2 * number), objects, classes))
    return images


def test_right_ones_are_those_that_average_precision_counts():
    images = random_images(np.random.default_rng(0))
    verdicts = [diagnosis.judge(item) for item in images]
    right = sum(int((one.kind == diagnosis.RIGHT).sum()) for one in verdicts)
    matches = diagnosis.match_boxes(images)
    taken = set(matches.truth[matches.iou >= 0.5].tolist())
    assert right == len(taken)


def test_perfect_predictions_have_nothing_to_mend():
    images = [replace(item, boxes=item.truth_boxes.copy(), labels=item.truth_labels.copy(),
                      scores=np.linspace(0.1, 1, len(item.truth_labels)))
              for item in random_images(np.random.default_rng(1))]  # fmt: skip
    # overlapping objects of a class may take each other's box; keep the images where none does
    images = [item for item in images if (diagnosis.judge(item).kind == diagnosis.RIGHT).all()]
    assert len(images) > 10
    assert diagnosis.what_if(images, [diagnosis.judge(item) for item in images], 3) == pytest.approx(
        [1.0] * (1 + len(diagnosis.MENDS))
    )


def test_mending_never_costs_and_ranking_gives_the_recall():
    images = random_images(np.random.default_rng(2))
    verdicts = [diagnosis.judge(item) for item in images]
    values = dict(zip(("as it is", *diagnosis.MENDS), diagnosis.what_if(images, verdicts, 3), strict=True))
    assert min(values.values()) >= values["as it is"] - 1e-9
    recalls = []
    for label in range(3):
        mine = [
            (one.kind == diagnosis.RIGHT) & (item.labels == label) for item, one in zip(images, verdicts, strict=True)
        ]
        recalls.append(sum(m.sum() for m in mine) / sum((item.truth_labels == label).sum() for item in images))
    assert values["ranking"] == pytest.approx(np.mean(recalls))


def test_splitting_a_group_finds_all_that_it_covers():
    item = one_image([[-1, -4, 23, 12]], [0], [0.5], OBJECTS, CLASSES)
    mended = diagnosis.mend(item, diagnosis.judge(item), "split")
    assert sorted(mended.boxes.tolist()) == sorted(OBJECTS[:2])
    assert (diagnosis.judge(mended).kind == diagnosis.RIGHT).all()


def test_a_mended_box_gives_way_to_a_better_one_on_the_same_object():
    item = one_image([[40, 0, 80, 40], [45, 0, 55, 10]], [1, 1], [0.9, 0.5], OBJECTS, CLASSES)
    mended = diagnosis.mend(item, diagnosis.judge(item), "part")
    assert mended.scores.tolist() == [0.9]


def test_auc_against_all_pairs():
    rng = np.random.default_rng(3)
    values, right = rng.integers(0, 6, 60) / 5, rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in values[right] for b in values[~right]]
    assert diagnosis.auc(values, right) == pytest.approx(np.mean(pairs))
    assert np.isnan(diagnosis.auc(values, np.zeros(60, bool)))


def test_n_best_takes_as_many_as_there_are_objects():
    images = random_images(np.random.default_rng(4))
    chosen = diagnosis.n_best(images, 3)
    for label in range(3):
        objects = sum(int((item.truth_labels == label).sum()) for item in images)
        scores = [item.scores[(item.labels == label) & one] for item, one in zip(images, chosen, strict=True)]
        left = [item.scores[(item.labels == label) & ~one] for item, one in zip(images, chosen, strict=True)]
        assert sum(map(len, scores)) == min(objects, sum(int((item.labels == label).sum()) for item in images))
        if sum(map(len, left)):
            assert np.concatenate(scores).min() >= np.concatenate(left).max()


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_classifier_separates_what_can_be_separated():
    torch.manual_seed(0)
    present = (torch.rand(200, 3) < 0.4).float()
    features = torch.randn(200, 12) * 0.3 + 5
    features[:, :3] += present * 2
    classifier = baselines.train_classifier(features, present)
    assert ((classifier(features) > 0) == present.bool()).float().mean() > 0.97
    assert not classifier(features).requires_grad
    again = baselines.train_classifier(features, present)
    assert torch.equal(classifier.weight, again.weight)


def test_activation_is_the_pooled_classifier_spread_out():
    torch.manual_seed(0)
    features, weights = torch.rand(8, 6, 7), torch.randn(3, 8)
    maps = baselines.activation_maps([features], weights)
    assert maps.shape == (3, 6, 7) and float(maps.min()) >= 0 and float(maps.max()) <= 1
    raw = (weights @ features.flatten(1)).clamp(min=0).view(3, 6, 7)
    twice = baselines.activation_maps([features, features[:, ::2, :-1]], weights)  # a smaller map is brought to size
    assert twice.shape == maps.shape and float(twice.max()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(maps * raw.amax((1, 2), keepdim=True), raw, atol=1e-5)


def test_last_layers_undo_strides():
    class Module:
        tail = nn.Identity()
        head = nn.Sequential(
            nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    torch.manual_seed(0)
    x = torch.randn(1, 4, 12, 16)
    dense = baselines.last_layers(Module())(x)
    assert dense.shape == (1, 5, 12, 16)
    coarse = Module.head[:3](x)  # every second value of the dense map is a value of the network's own map
    assert torch.allclose(dense[..., ::2, ::2], coarse, atol=1e-5)
    assert Module.head[0].stride == (2, 2)


def test_a_cut_map_is_one_piece_with_its_tight_box():
    image = np.zeros((40, 60, 3), np.uint8)
    maps = torch.zeros(1, 40, 60)
    maps[0, 5:20, 10:30] = 1.0  # the object
    maps[0, 30:35, 50:55] = 0.9  # a smaller piece elsewhere
    maps[0, 20:30, 10:30] = 0.2  # below the threshold
    settings = Calibration(threshold=0.5, iterations=0, min_component=1.0)
    found = baselines.cut(image, maps, torch.tensor([2]), torch.tensor([0.7]), settings)
    assert found.boxes.tolist() == [[10, 5, 30, 20]]
    assert found.masks is not None and int(found.masks.sum()) == 300
    assert found.labels.tolist() == [2] and found.weights.tolist() == pytest.approx([0.7])
    assert len(baselines.cut(image, maps[:0], torch.zeros(0, dtype=torch.long), torch.zeros(0), settings)) == 0


def test_whole_image_covers_it():
    found = baselines.whole_image((20, 30), torch.tensor([1, 0]), torch.tensor([0.9, 0.2]))
    assert found.boxes.tolist() == [[0, 0, 30, 20]] * 2
    assert found.masks is not None and bool(found.masks.all())


def test_the_ladder_leads_from_paper_to_best_and_each_rung_changes_something():
    rungs = script("ablation").ladder(0.25)
    best, paper = shorten(recipe("best"), 0.25), recipe("paper")
    assert rungs[-1][1] == best
    assert all(one != other for (_, one), (_, other) in itertools.pairwise(rungs))
    first = rungs[0][1]
    assert first.modules[2].schedule.lr == paper.modules[2].schedule.lr and first.modules[2].schedule.kind == "sgd"
    assert first.modules[2].schedule.steps == best.modules[2].schedule.steps and first.images == best.images
    assert first.modules[0].attention == "excitation" and first.modules[1].label == paper.modules[1].label
    assert rungs[3][1].modules[1].label.threshold == best.modules[1].label.threshold
    assert rungs[3][1].modules[1].label.combine == paper.modules[1].label.combine


def test_the_ablation_table_shows_what_is_measured():
    ablation = script("ablation")
    values = {"box mAP@.5": 0.5, "mask mAP@.5": 0.25, "mask mAP@.75": None, "mIoU": 0.333}
    text = ablation.table({"first": {"module 2": values, "module 4": values}})
    assert text.splitlines()[-1] == "| first | 50.0 / 25.0 / - / 33.3 | 50.0 / 25.0 / - / 33.3 |"


def test_the_time_of_a_part_is_without_that_of_the_parts_inside():
    class Network:
        def stem(self):
            clock[0] += 1.0

        def whole(self):
            clock[0] += 2.0
            self.stem()
            self.stem()

    clock, network = [0.0], Network()
    parts = answers.Parts(lambda: clock[0])
    with parts.watch({"stem": [(network, "stem")], "whole": [(network, "whole")]}):
        network.whole()
        network.stem()
    network.whole()  # no longer watched
    assert dict(parts.seconds) == {"whole": 2.0, "stem": 3.0}


def test_the_parts_of_an_answer(tmp_path):
    """They are within the whole, and only an answer with vote has a part for it."""
    network = LabelPEnet.from_run(random_run(tmp_path / "run", ["ball", "box"]))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    for vote in (True, False):
        one = answers.cascade(network, vote)
        one.ask(pixels)
        assert ("RoI heads that vote" in one.parts.seconds) == vote
        assert {"stem", "RPN", "RoI head", "masks", "dense CRF"} <= set(one.parts.seconds)
        assert sum(one.parts.seconds.values()) <= one.processor[0] + 0.01
        assert one.row().count("|") == 5 and "other" in one.row()


def test_a_client_is_compared_object_by_object_and_what_is_missing_or_foreign_is_named(tmp_path):
    clients = script("clients")
    masks = np.zeros((3, 8, 9), bool)
    masks[0, :4, :4], masks[1, 2:6, 2:6], masks[2, 6:, 6:] = True, True, True
    coded = [clients.rle.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    objects = [[name, {**one, "counts": one["counts"].decode()}] for name, one in zip("aab", coded, strict=True)]
    images = [{"file": f"{n}/x.jpg", "stem": f"{n}_x", "nested": f"{n}/x", "objects": objects} for n in "pq"]
    (tmp_path / "truth.json").write_text(json.dumps({"classes": ["a", "b"], "images": images}))
    shown = [("a", masks[1]), ("b", masks[2]), ("a", masks[0])]  # in another order
    assert clients.compare(tmp_path, "coco", [("p/x.jpg", shown), ("q/x", shown)]) == ([1.0] * 6, False)
    boxes = [("a", np.array([0, 0, 4, 2.0])), ("a", np.array([2, 2, 6, 6.0])), ("a", np.array([6, 6, 9, 8.0]))]
    overlaps, are_boxes = clients.compare(tmp_path, "yolo", [("p_x", boxes), ("q_x", boxes)])
    assert are_boxes and sorted(overlaps) == [0, 0, 0.5, 0.5, 1, 1]  # another class is no match
    for wrong in ([("p/x", shown)], [("p/x", shown), ("q/x", shown[:2])], [("z", shown)]):
        with pytest.raises(ValueError, match=r"missing|2 objects instead of 3|unknown"):
            clients.compare(tmp_path, "coco", wrong)
    in_front = [masks[0], masks[1] & ~masks[0], masks[2]]  # as an index map holds them
    assert clients.compare(tmp_path, "voc", [(f"{n}_x", list(zip("aab", in_front, strict=True))) for n in "pq"])[0] == (
        [1.0] * 6
    )


def test_predictions_of_onnx_files_are_those_of_torch_in_pixels_of_the_photograph(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    folder, year = small_student()
    student, script_of = labelpenet.load(folder), script("onnx_predict")
    out = tmp_path / "onnx.json"
    words = [str(folder), str(year), "--split", "train", "--out", str(out)]
    assert script_of.main(words) == 0
    images = open_annotated(year, "train").tagged
    assert {image.id for image in images.images} == set(read_predictions(out, images, student.classes))
    assert script_of.main(words) == 2 and "is there already" in capsys.readouterr().err
    exported = script_of.OnnxStudent(student, tmp_path / "one.onnx", (96, 96))
    whole = read_image(images.images[0].path)
    padded = np.full_like(whole, 124)
    padded[:60] = whole[:60]
    on_canvas = student.predict(padded)
    inside = on_canvas[on_canvas.boxes[:, 1] < 60]
    large = whole.repeat(2, 0).repeat(2, 1)
    smaller = np.asarray(Image.fromarray(large).resize((96, 96), Image.Resampling.BILINEAR))
    for pixels, expected, scale in (
        (whole, student.predict(whole), 1),
        (whole[:60], Instances(*on_pixels(inside, 60)), 1),
        (large, student.predict(smaller), 2),
    ):
        best, known = exported.predict(np.ascontiguousarray(pixels))[:1], expected[:1]
        assert best.image_size == pixels.shape[:2] and torch.equal(best.labels, known.labels)
        assert box_iou(best.boxes, known.boxes * scale).item() > 0.99
        drawn = known.masks.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        assert (best.masks & drawn).sum() > 0.95 * (best.masks | drawn).sum()
    assert exported.predict(np.zeros((1, 1200, 3), np.uint8)).image_size == (1, 1200)  # too flat for a whole pixel


def on_pixels(found: Instances, height: int) -> tuple:
    """What is left of instances in the upper rows of their image."""
    boxes = found.boxes.clone()
    boxes[:, 3].clamp_(max=height)
    return boxes, found.labels, found.weights, (height, found.image_size[1]), found.masks[:, :height]
