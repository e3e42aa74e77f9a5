"""The cascade: views, what each module answers for odd images, and run folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from labelpenet.calibration.nms import confident
from labelpenet.config import Recipe, override, recipe, to_dict
from labelpenet.data.transforms import View
from labelpenet.errors import InputError
from labelpenet.instances import Instances, masks_to_boxes
from labelpenet.models.cascade import LabelPEnet
from labelpenet.training.pretrain import run_facts, save_part
from tests.models.tiny import lively_tiny

CLASSES = ("ball", "box", "star")


def tiny_recipe(*changes: str) -> Recipe:
    assignments = [
        "images.sides=64", "images.test_side=64", "images.longest=128", "proposals.limit=12", "proposals.side=64",
    ]  # fmt: skip
    assignments += ["modules.*.anchor_sides=16,32,64", "modules.*.rois=8", "modules.*.cells=1"]
    assignments += ["modules.*.rpn_post_nms_top_n_train=6", "modules.*.rpn_post_nms_top_n_test=6"]
    assignments += ["modules.*.mask_width=8", "modules.*.mask_depth=1"]
    assignments += [f"modules.*.{part}.{one}" for part in ("label", "predict") for one in ("side=40", "iterations=1")]
    assignments += [f"modules.{number}.{part}.per_class=2" for number in (2, 3, 4) for part in ("label", "predict")]
    return override(recipe("best"), [*assignments, *changes])


def build(*changes: str, seed: int = 0) -> LabelPEnet:
    return LabelPEnet(lively_tiny(seed), CLASSES, tiny_recipe(*changes))


@pytest.fixture(scope="module")
def network() -> LabelPEnet:
    return build()


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def some_boxes(height: int, width: int, n: int = 10) -> Tensor:
    corner = torch.rand(n, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([width, height]) * 0.6
    return torch.cat([corner, corner + torch.tensor([width, height]) * 0.4], 1)


# -------------------------------------------------------------------------------------------------------------- views


def test_a_view_is_the_photograph_scaled_and_normalised(network):
    image = photograph(48, 100)
    view = network.view(image, 64)
    assert view.pixels.shape == (1, 3, 61, 128)  # the longer side is capped at 128
    assert view.scale == (128 / 100, 61 / 48)
    view = network.view(image, 48)
    mean, std = (torch.tensor(network.normalisation[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(view.pixels[0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(network.view(image, 48, flip=True).pixels, view.pixels.flip(-1))
    assert network.view(image).pixels.shape == network.view(image, 64).pixels.shape


def test_without_a_side_the_photograph_keeps_its_size():
    one = build("images.test_side=none")
    assert one.view(photograph(70, 45)).pixels.shape == (1, 3, 70, 45)


@settings(max_examples=40, deadline=None)
@given(st.integers(33, 90), st.integers(33, 90), st.integers(33, 90), st.integers(33, 90), st.booleans())
def test_boxes_go_to_the_view_and_back(h, w, height, width, flipped):
    view = View(torch.zeros(1, 3, h, w), (w / width, h / height), flipped)
    boxes = some_boxes(height, width)
    there = view.boxes(boxes)
    assert (there >= -1e-3).all() and (there[:, 2] <= w + 1e-3).all() and (there[:, 3] <= h + 1e-3).all()
    assert (there[:, 2:] > there[:, :2]).all()
    plain = replace(view, flipped=False)
    unflipped = there[:, [2, 1, 0, 3]].mul(torch.tensor([-1, 1, -1, 1])).add(torch.tensor([w, 0, w, 0]))
    torch.testing.assert_close(plain.back(unflipped if flipped else there), boxes, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("factor", [1, 2, 0.5])
def test_an_instances_mask_and_box_stay_together_in_a_view(flipped, factor):
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 4:20, 6:30] = masks[1, 10:40, 50:60] = True
    one = Instances(masks_to_boxes(masks), torch.tensor([0, 2]), torch.tensor([0.4, 1.0]), (40, 60), masks)
    h, w = int(40 * factor), int(60 * factor)
    view = View(torch.zeros(1, 3, h, w), (factor, factor), flipped)
    seen = view.instances(one)
    assert seen.image_size == (h, w)
    assert torch.equal(seen.boxes, masks_to_boxes(seen.masks)) and torch.equal(seen.boxes, view.boxes(one.boxes))
    assert torch.equal(seen.labels, one.labels) and torch.equal(seen.weights, one.weights)
    if factor == 1:
        assert torch.equal(seen.masks, masks.flip(-1) if flipped else masks)
    assert view.instances(Instances(one.boxes, one.labels, one.weights, (40, 60))).masks is None
    assert len(view.instances(one[[]])) == 0


@pytest.mark.parametrize(("height", "width"), [(27, 41), (93, 139), (61, 50)])
def test_a_mask_keeps_its_place_at_odd_factors(height, width):
    """On average over many masks neither edge moves against the box: nearest pixels are sought from the centres."""
    rng = np.random.default_rng(0)
    shifts = []
    for _ in range(200):
        (y1, y2), (x1, x2) = (np.sort(rng.choice(size + 1, 2, replace=False)) for size in (40, 60))
        if min(y2 - y1, x2 - x1) < 4:
            continue
        masks = torch.zeros(1, 40, 60, dtype=torch.bool)
        masks[0, y1:y2, x1:x2] = True
        one = Instances(masks_to_boxes(masks), torch.tensor([0]), torch.tensor([1.0]), (40, 60), masks)
        seen = View(torch.zeros(1, 3, height, width), (width / 60, height / 40)).instances(one)
        shifts.append(masks_to_boxes(seen.masks)[0] - seen.boxes[0])
    moved = torch.stack(shifts)
    assert moved.mean(0).abs().max() < 0.15
    assert moved.abs().max() <= 0.5 * max(1, width / 60, height / 40) + 1e-3


def test_the_whole_image_is_the_first_proposal_and_the_rest_are_the_recipes(network):
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 100, 50], [10, 10, 60, 40], [5, 5, 95, 45]])
    chosen = network.select(boxes, (50, 100))
    assert chosen.tolist() == [[0, 0, 100, 50], [10, 10, 60, 40], [5, 5, 95, 45]]
    many = torch.tensor([[1.0, 1, 60, 40]]) + torch.arange(50)[:, None] * 0.1
    assert len(network.select(many, (50, 100))) == 13
    assert network.select(boxes[:0], (50, 100)).tolist() == [[0, 0, 100, 50]]


# ------------------------------------------------------------------------------------------------- what modules infer


@pytest.mark.parametrize("module", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 97), (61, 2), (50, 77)])
def test_predict_answers_for_images_of_any_size(network, module, size):
    found = network.predict(photograph(*size), module)
    assert found.image_size == size and found.masks is not None and found.masks.shape[1:] == size
    found.validate(len(CLASSES))
    assert (found.weights.diff() <= 0).all() and not found.boxes.requires_grad
    assert found.boxes.device.type == "cpu"


def test_a_network_that_is_being_trained_answers_as_a_trained_one_and_trains_on():
    network = build()
    network.classification.head = torch.nn.Sequential(*network.classification.head, torch.nn.Dropout(0.9))
    network.eval()
    pixels, boxes = photograph(64, 80), some_boxes(64, 80)
    expected = network.predict(pixels, 1, boxes)
    network.train()
    found = network.predict(pixels, 1, boxes.numpy())
    assert torch.equal(found.weights, expected.weights) and torch.equal(found.boxes, expected.boxes)
    assert network.training and network.classification.head[-1].training
    with pytest.raises(InputError, match="those of one photograph"):
        network.predict([pixels, pixels], 1, boxes)


def test_targets_that_are_not_there_teach_nothing_in_silence(network):
    pixels = photograph(64, 80)
    none = Instances.empty((64, 80), with_masks=True)
    one = Instances(torch.tensor([[1.0, 1, 9, 9]]), torch.tensor([3]), torch.ones(1), (64, 80))
    for targets, module, words in (
        ([none], 0, "no module 0"),
        ([none], 5, "no module 5"),
        ([Instances.empty((80, 64))], 2, r"targets on \(80, 64\) pixels .* photograph of \(64, 80\)"),
        ([one], 2, "a target of class 3, but there are 3, from 0"),
    ):
        with pytest.raises(InputError, match=words):
            network.losses([pixels], targets, module)


@pytest.mark.parametrize("module", [2, 3])
def test_a_detector_without_a_single_roi_finds_nothing(module, monkeypatch):
    network = build()
    monkeypatch.setattr(network.module(module), "propose", lambda _, sizes: ([torch.zeros(0, 4) for _ in sizes], {}))
    assert len(network.predict(photograph(64, 80), module)) == 0


def test_predict_reads_files_of_any_kind(network, tmp_path):
    grey = photograph(40, 56)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    from_file = network.predict(tmp_path / "grey.png", 4)
    from_array = network.predict(np.repeat(grey[..., None], 3, 2), 4)
    assert torch.equal(from_file.boxes, from_array.boxes) and torch.equal(from_file.masks, from_array.masks)
    (tmp_path / "no.png").write_bytes(b"nothing")
    for path in (tmp_path / "no.png", str(tmp_path / "missing.jpg")):
        with pytest.raises(InputError, match=str(path)):
            network.predict(path)


def test_there_are_four_modules(network):
    for number in (0, 5):
        with pytest.raises(InputError, match="1, 2, 3 or 4"):
            network.predict(photograph(40, 40), number)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("tags", [(), (1,), (0, 2)])
def test_only_tags_are_passed_on(network, number, tags):
    for seed in range(2):
        image = photograph(48, 70, seed)
        ((found, trace),) = network.infer(number, network.batch([image], [tags], [some_boxes(48, 70)]))
        found.validate(len(CLASSES))
        assert set(found.labels.tolist()) <= set(tags)
        if number == 1:
            assert found.labels.tolist() == list(tags)
        assert found.masks is not None and len(trace.marginals) == len(found)
        assert not found.weights.requires_grad


@pytest.mark.parametrize("number", [1, 2])
def test_the_attention_may_be_either_kind(number):
    """Both are valid, and they are not the same maps."""
    marginals = []
    for kind in ("excitation", "gradient"):
        one = build(f"modules.1.attention={kind}", f"modules.2.attention={kind}")
        ((found, trace),) = one.infer(number, one.batch([photograph(48, 70)], [(0, 1)], [some_boxes(48, 70)]))
        found.validate(len(CLASSES))
        assert len(found) == len(trace.marginals) > 0
        marginals.append(trace.marginals)
    assert marginals[0].shape != marginals[1].shape or not torch.allclose(marginals[0], marginals[1])


def test_every_kept_detection_has_a_mask_of_its_own():
    """However few masks are asked for: one that many better detections precede must not fall back to its box."""
    choices = ("max_masks=1", "per_class=50", "min_score=0.01", "iterations=0", "threshold=0.01", "min_component=none",
               "mask_nms=none", "box=proposal")  # fmt: skip
    choices = ["modules.4.mask_margin=0", *(f"modules.4.predict.{choice}" for choice in choices)]
    one = build("modules.4.score_threshold=0.01", *choices)
    with torch.no_grad():  # masks of the left half of each box
        one.segmentation.masks = lambda features, boxes, labels: (  # type: ignore[method-assign]
            torch.cat([torch.ones(len(labels), 28, 14), torch.zeros(len(labels), 28, 14)], 2)
        )
    found = one.predict(photograph(60, 60), proposals=some_boxes(60, 60, 30))
    assert len(found) > 2
    area = (found.boxes[:, 2] - found.boxes[:, 0]) * (found.boxes[:, 3] - found.boxes[:, 1])
    assert (found.masks.sum((1, 2)) < 0.75 * area).all()


@pytest.mark.parametrize("module", [3, 4])
def test_each_module_labels_and_answers_by_its_own_choice(module):
    """Only the module in question takes the detector's boxes; the other's are tight around its masks."""
    low = ["modules.*.predict.min_score=0.01", "modules.*.score_threshold=0.01"]
    one = build(f"modules.{module}.label.box=proposal", f"modules.{module}.predict.box=proposal", *low)
    image = photograph(60, 60)
    for number in (3, 4):
        for found in (one.infer(number, one.batch([image], [(0, 1)]))[0][0], one.predict(image, number)):
            assert len(found)
            assert torch.equal(found.boxes, masks_to_boxes(found.masks)) == (number != module)


def guesses(height: int, width: int) -> Instances:
    """Instances without masks whose classes and weights differ."""
    boxes = some_boxes(height, width, 5)
    weights = torch.tensor([0.9, 0.6, 0.3, 0.2, 0.05])
    return Instances(boxes, torch.tensor([0, 2, 1, 0, 1]), weights, (height, width))


@pytest.mark.parametrize("number", [2, 3, 4])
def test_modules_1_and_2_have_a_say_in_a_weight(network, number):
    """The geometric mean, one instance after the other; a module does not vote on its own answer."""
    image, found = photograph(48, 70), guesses(48, 70)
    batch = network.batch([image])
    weights = []
    for index in range(len(found)):
        box, label = found.boxes[index : index + 1], int(found.labels[index])
        x_c, _ = network.classification(network.classification.features(replace(batch, proposals=[box]))[0])
        product, count = found.weights[index] * torch.softmax(x_c[0, 1:], 0)[label], 2
        if number > 2:
            (opinion,) = network.detection.probabilities(batch, [batch.views[0].boxes(box)])
            product, count = product * opinion[0, label], 3
        weights.append(product ** (1 / count))
    (voted,) = network.vote(number, [found], batch)
    torch.testing.assert_close(voted.weights, torch.stack(weights), rtol=1e-4, atol=1e-6)
    assert torch.equal(voted.boxes, found.boxes) and torch.equal(voted.labels, found.labels)


def test_the_vote_decides_what_is_passed_on():
    """Labels are what is left of all candidates once the vote has weighed them: neither doubtful nor nested."""
    low = ["modules.*.score_threshold=0.01", "modules.3.label.min_score=0.01", "modules.3.label.mask_nms=none"]
    whole = build(*low, "modules.3.label.keep=0", "modules.3.label.nested=none")
    image = photograph(60, 60)
    ((candidates, maps),) = whole.infer(3, whole.batch([image], [(0, 1)]))
    assert len(candidates) == len(maps.marginals) > 2
    best = torch.stack([candidates.weights[candidates.labels == label].max() for label in candidates.labels])
    keep = (float((candidates.weights / best).min()) + 1) / 2  # the most doubtful one goes, whatever the weights are
    strict = [*low, f"modules.3.label.keep={keep}", "modules.3.label.nested=0.4"]
    ((found, trace),) = build(*strict).infer(3, whole.batch([image], [(0, 1)]))
    sure = confident(candidates, keep, 0.4)
    assert 0 < int(sure.sum()) < len(candidates)
    assert torch.equal(found.boxes, candidates.boxes[sure]) and torch.equal(found.weights, candidates.weights[sure])
    assert torch.equal(trace.marginals, maps.marginals[sure])
    ((alone, _),) = build(*strict, "modules.3.label.vote=false").infer(3, whole.batch([image], [(0, 1)]))
    assert not torch.equal(alone.weights.sort()[0], found.weights.sort()[0])


def test_modules_without_weights_abstain():
    one = build()
    seen = one.batch([photograph(48, 70)])
    found = guesses(48, 70)
    one.untrained = ("classification", "detection")
    assert torch.equal(one.vote(4, [found], seen)[0].weights, found.weights)
    one.untrained = ("detection",)
    torch.testing.assert_close(one.vote(4, [found], seen)[0].weights, one.vote(2, [found], seen)[0].weights)


def test_the_recipe_decides_whether_there_is_a_vote():
    """Only the order and the weights of what is found may differ."""
    boxes = some_boxes(60, 60, 30)
    choices = ["modules.4.score_threshold=0.01", "modules.4.predict.min_score=0.01", "modules.4.predict.per_class=4"]
    alone, voted = (
        build(*choices, f"modules.4.predict.vote={vote}").predict(photograph(60, 60), proposals=boxes)
        for vote in ("false", "true")
    )
    assert len(alone) == len(voted) > 1
    for one in (alone, voted):
        assert (one.weights[1:] <= one.weights[:-1]).all()
    assert not torch.allclose(alone.weights, voted.weights)
    assert sorted(alone.boxes.tolist()) == sorted(voted.boxes.tolist())


# -------------------------------------------------------------------------------------------------------- run folders


def write_run(run: Path, network: LabelPEnet, parts=("stem", "classification", "segmentation")) -> None:
    from labelpenet.data.dataset import TaggedImages

    run.mkdir()
    facts = run_facts(network, TaggedImages(CLASSES, ()), 0, "32-true")
    (run / "run.json").write_text(json.dumps(facts))
    for part in parts:
        save_part(network, run, part)


def test_a_run_predicts_what_it_predicted_before_it_was_saved(tmp_path, network):
    write_run(tmp_path / "run", network, ("stem", "classification", "detection", "refinement", "segmentation"))
    loaded = LabelPEnet.from_run(tmp_path / "run")
    assert loaded.classes == CLASSES and to_dict(loaded.recipe) == to_dict(network.recipe)
    image, boxes = photograph(50, 66), some_boxes(50, 66)
    for module in (1, 2, 3, 4):
        before, after = (one.predict(image, module, boxes) for one in (network, loaded))
        assert len(before) and torch.equal(before.labels, after.labels)
        assert torch.equal(before.boxes, after.boxes) and torch.equal(before.weights, after.weights)
        assert torch.equal(before.masks, after.masks)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def damage(run: Path, how: str) -> None:
    weights, facts = run / "weights", run / "run.json"
    if how == "no folder":
        facts.unlink()
    elif how == "torn facts":
        facts.write_text(facts.read_text()[:-30])
    elif how == "other facts":
        facts.write_text("[1, 2]")
    elif how == "old facts":
        facts.write_text(json.dumps({"classes": ["a"]}))
    elif how == "other recipe":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"recipe": {"name": "x"}}))
    elif how == "other classes":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"classes": ["a", "b"]}))
    elif how == "no stem":
        (weights / "stem.safetensors").unlink()
    elif how == "no module":
        (weights / "classification.safetensors").unlink()
    elif how == "torn weights":
        path = weights / "classification.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "empty weights":
        (weights / "classification.safetensors").write_bytes(b"")
    elif how == "garbage":
        facts.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("how", ["no folder", "torn facts", "other facts", "old facts", "other recipe", "other classes",
                                 "no stem", "no module", "torn weights", "empty weights", "garbage"])  # fmt: skip
def test_a_damaged_run_is_named_in_one_line(tmp_path, network, how):
    run = tmp_path / "run"
    write_run(run, network, ("stem", "classification"))
    damage(run, how)
    with pytest.raises(InputError) as caught:
        LabelPEnet.from_run(run)
    assert "\n" not in str(caught.value)
    if how != "other recipe":
        assert str(run) in str(caught.value)


def test_a_run_that_is_not_finished_answers_with_what_it_has(tmp_path, network):
    write_run(tmp_path / "run", network, ("stem", "classification"))
    loaded = LabelPEnet.from_run(tmp_path / "run")
    image, boxes = photograph(40, 40), some_boxes(40, 40)
    assert torch.equal(loaded.predict(image, 1, boxes).boxes, network.predict(image, 1, boxes).boxes)
    with pytest.raises(InputError, match=r"segmentation|module 4"):
        loaded.predict(image, 4)


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("module", [1, 2, 3, 4])
def test_photographs_that_go_through_together_are_answered_as_alone(network, module):
    """Of one size exactly, but for rounding; of several sizes each within its own picture."""
    images, boxes = [photograph(48, 70, seed) for seed in range(2)], [some_boxes(48, 70)] * 2
    together = network.predict_batch(images, module, boxes)
    for image, own, found in zip(images, boxes, together, strict=True):
        alone = network.predict(image, module, own)
        assert torch.equal(found.labels, alone.labels)
        torch.testing.assert_close(found.weights, alone.weights, atol=1e-4, rtol=1e-3)
    sizes = [(48, 70), (61, 40)]
    for size, found in zip(sizes, network.predict_batch([photograph(*size) for size in sizes], module), strict=True):
        assert found.image_size == size
        found.validate(len(CLASSES))


@pytest.mark.parametrize("module", [1, 2, 3, 4])
def test_a_photograph_of_unknown_tags_among_others_is_answered_as_alone(module):
    network = build(f"modules.{module}.label.threshold=0.9")  # of what is labelled alone
    images, boxes = [photograph(48, 70, seed) for seed in range(2)], [some_boxes(48, 70)] * 2
    unknown, known = network.predict_batch(images, module, boxes, [None, (0,)])
    for one, alone in (
        (unknown, network.predict(images[0], module, boxes[0])),
        (known, network.predict_batch(images[1:], module, boxes[1:], [(0,)])[0]),
    ):
        assert torch.equal(one.boxes, alone.boxes) and torch.equal(one.weights, alone.weights)


def test_a_stranger_trains_with_a_loop_of_their_own():
    """The README's ten lines: photographs of several sizes, their instances, an optimiser; each module's loss falls."""
    network = build()
    images = [photograph(64, 80, 1), photograph(72, 64, 2)]
    masks = [torch.zeros(1, *image.shape[:2], dtype=torch.bool) for image in images]
    for label, mask in enumerate(masks):
        mask[0, 10:50, 12 + 8 * label : 52] = True
    targets = [
        Instances(masks_to_boxes(mask), torch.tensor([label]), torch.ones(1), image.shape[:2], mask)
        for label, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    boxes = [some_boxes(*image.shape[:2]) for image in images]
    for module in (1, 2, 3, 4):
        network.train()
        optimiser = torch.optim.Adam([p for p in network.module(module).parameters() if p.requires_grad], 1e-3)
        seen = []
        for _ in range(8):
            torch.manual_seed(0)
            losses = network.losses(images, targets, module, boxes)
            total = torch.stack(list(losses.values())).sum()
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            seen.append(float(total.detach()))
        assert seen[-1] < 0.9 * seen[0], (module, seen)
        network.eval()
        for found in network.predict_batch(images, module, boxes):
            found.validate(len(CLASSES))
