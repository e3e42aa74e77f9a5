"""What a photograph as a whole shows: the fit against another optimiser, and whose scores it moves."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import labelpenet
from labelpenet import config
from labelpenet.config import RunOptions, recipe
from labelpenet.data import run_folder
from labelpenet.data.files import read_tensors, write_tensors
from labelpenet.data.images import read_image
from labelpenet.data.run_folder import TAGS
from labelpenet.data.scenes import write_scenes
from labelpenet.engine.distributed import build_fabric
from labelpenet.errors import InputError
from labelpenet.formats import open_annotated, open_tagged
from labelpenet.models.cascade import LabelPEnet
from labelpenet.models.student import Student
from labelpenet.models.tags import PENALTY, TagClassifier, describe, weigh
from labelpenet.training.distill import distill
from labelpenet.training.supervised import read_supervision
from labelpenet.training.tags import fit_tags
from tests.models.test_cascade import build, photograph, some_boxes
from tests.models.test_student import untaught
from tests.students import CHOICES, small_student


def test_a_map_is_described_by_the_mean_and_the_maximum_of_each_channel():
    features = torch.tensor([[[1.0, 5.0], [0.0, 2.0]], [[-3.0, -1.0], [-2.0, -2.0]]])
    assert describe(features).tolist() == [2.0, -2.0, 5.0, -1.0]
    assert describe(features.bfloat16()).dtype == torch.float32


def test_the_fit_is_that_of_newtons_method():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 8, generator=generator) * torch.logspace(-3, 3, 8) + 5
    rows[:, 3] = 7.0  # a channel that says nothing
    wanted = (torch.rand(60, 2, generator=generator) < torch.tensor([0.5, 0.1])).float()
    classifier = TagClassifier(4, 2)
    classifier.fit(rows, wanted)
    x = rows.double()
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)
    x = torch.cat([x, torch.ones(60, 1, dtype=x.dtype)], 1)
    ridge = torch.full((9,), PENALTY, dtype=x.dtype)
    ridge[-1] = 0
    for label in range(2):  # each class by itself; the mean is over both
        beta = torch.zeros(9, dtype=x.dtype)
        for _ in range(50):
            p = torch.sigmoid(x @ beta)
            gradient = x.T @ (p - wanted[:, label]) / 120 + ridge * beta
            curvature = (x.T * (p * (1 - p))) @ x / 120 + torch.diag(ridge) + 1e-12 * torch.eye(9)
            beta -= torch.linalg.solve(curvature, gradient)
        found = torch.sigmoid(rows @ classifier.weight[label] + classifier.bias[label])
        torch.testing.assert_close(found, torch.sigmoid(x @ beta).float(), atol=2e-3, rtol=0)


def test_classes_that_all_or_no_photographs_show_stay_finite():
    classifier = TagClassifier(2, 3)
    classifier.fit(torch.rand(5, 4), torch.tensor([[1.0, 0.0, 1.0]]).repeat(5, 1))
    shown = classifier(torch.rand(2, 3, 3))
    assert shown.isfinite().all() and shown[0] > 0.9 and shown[1] < 0.1


def test_terms_that_cancel_are_summed_in_full_precision_under_autocast():
    classifier = TagClassifier(600, 2)
    classifier.weight.copy_(torch.randn(2, 1200, generator=torch.Generator().manual_seed(0)))
    features = torch.rand(600, 3, 4, generator=torch.Generator().manual_seed(1)) + 10
    classifier.bias.copy_(-(classifier.weight.double() @ describe(features).double()) + torch.tensor([0.3, -2.0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shown = classifier(features)
    torch.testing.assert_close(shown, torch.tensor([0.3, -2.0]).sigmoid(), atol=1e-3, rtol=0)


def test_a_score_is_multiplied_by_its_own_class():
    shown = torch.tensor([0.0625, 1.0])
    scores = weigh(torch.tensor([0.8, 0.4, 0.0]), torch.tensor([0, 1, 0]), shown, 0.25)
    torch.testing.assert_close(scores, torch.tensor([0.4, 0.4, 0.0]))


def sure(network: LabelPEnet | Student) -> LabelPEnet | Student:
    """The network with a tag classifier that says something, and is never quite sure."""
    image = photograph(64, 64)
    with torch.no_grad():
        if isinstance(network, Student):
            classifier, seen = network.tags, network.whole(image)
        else:
            classifier, seen = network.classification.tags, network.classification.whole(network.batch([image]))[0]
    drawn = torch.randn(classifier.weight.shape, generator=torch.Generator().manual_seed(0))
    classifier.weight.copy_(drawn / describe(seen).norm())
    return network


@pytest.mark.parametrize("module", [1, 2, 4])
def test_answers_of_the_later_modules_alone_are_weighed_and_labels_are_not(module):
    plain, own = build("modules.1.tag_power=0"), sure(build("modules.1.tag_power=0.5"))
    images, boxes = [photograph(48, 100), photograph(64, 64, 1)], [some_boxes(48, 100), some_boxes(64, 64)]
    before = plain.predict_batch(images, module, boxes)
    after = own.predict_batch(images, module, boxes)
    with torch.no_grad():
        shown = [own.classification.tags(one) for one in own.classification.whole(own.batch(images))]
    for one, two, p in zip(before, after, shown, strict=True):
        assert len(one) and p.max() - p.min() > 0.1
        expected = one.weights * p[one.labels] ** 0.5 if module > 1 else one.weights
        torch.testing.assert_close(two.weights, expected.sort(descending=True).values, atol=1e-5, rtol=1e-4)
        assert torch.equal(two.labels, one.labels[expected.argsort(descending=True, stable=True)])
    known = [(0,), (1, 2)]
    labels = (net.predict_batch(images, module, boxes, known) for net in (plain, own))
    assert all(torch.equal(one.weights, two.weights) for one, two in zip(*labels, strict=True))


def test_a_photograph_padded_to_another_shows_what_it_shows_alone():
    network = sure(build())
    images = [photograph(40, 100), photograph(100, 40, 1), photograph(64, 64, 2)]
    together = network.classification.whole(network.batch(images))
    alone = [network.classification.whole(network.batch([one]))[0] for one in images]
    assert [one.shape for one in together] == [one.shape for one in alone]
    for one, two in zip(together, alone, strict=True):  # but for the last cells, which see the padding
        torch.testing.assert_close(one[:, :-3, :-3], two[:, :-3, :-3])


def test_a_cascade_whose_first_module_is_not_there_answers_as_without():
    network = sure(build())
    before = network.predict(photograph(64, 64), 4)
    network.untrained = ("classification",)
    plain = build("modules.1.tag_power=0")
    plain.untrained = ("classification",)
    expected = plain.predict(photograph(64, 64), 4)
    assert torch.equal(network.predict(photograph(64, 64), 4).weights, expected.weights)
    assert not torch.equal(before.weights, expected.weights)


def test_the_paper_weighs_nothing():
    assert [config.recipe(name).modules[0].tag_power for name in ("paper", "demo", "best")] == [0.0, 0.0, 0.25]
    assert "tags" not in dict(build("modules.1.tag_power=0").classification.named_children())


def test_a_run_of_before_answers_as_before():
    values = config.to_dict(recipe("best"))
    del values["modules"][0]["tag_power"]
    assert config.from_dict(values).modules[0].tag_power == 0.0
    assert config.from_dict(config.to_dict(recipe("best"))) == recipe("best")


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "timm/tf_efficientnet_lite0", "tiny"])
def test_a_student_weighs_by_the_whole_photograph(backbone):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    plain, own = untaught(backbone, "network.tag_power=0"), sure(untaught(backbone, "network.tag_power=1"))
    image = photograph(70, 64)
    with torch.no_grad():
        before, after = ([*net.answer(net._values(image))] for net in (plain, own))
        shown = own.tags(own.whole(image))
        expected = before[2] * shown[before[1]]  # of a decay by better masks of the same class alone
    assert len(before[2]) and abs(float(shown[0] - shown[1])) > 0.01
    torch.testing.assert_close(after[2], expected.sort(descending=True).values, atol=1e-5, rtol=1e-4)


def test_tags_teach_what_a_photograph_shows(tmp_path):
    train = open_tagged(write_scenes(tmp_path / "a", 60, 0, size=(96, 96), seed=1), "train")
    held = open_tagged(write_scenes(tmp_path / "b", 40, 0, size=(96, 96), seed=2), "train")
    network = build("images.test_side=96")
    network.classes = train.classes

    fabric = build_fabric("cpu", 1, 1, "32-true")

    def features(pixels: np.ndarray) -> torch.Tensor:
        return network.classification.whole(network.batch([pixels]))[0]

    classifier = TagClassifier(network.classification.tags.weight.shape[1] // 2, len(train.classes))
    fit_tags(classifier, train.images, features, fabric)
    with torch.no_grad():
        shown = torch.stack([classifier(features(read_image(one.path))) for one in held.images])
    truth = torch.tensor([[float(label in one.tags) for label in range(len(held.classes))] for one in held.images])
    ahead = shown[truth == 1].mean() - shown[truth == 0].mean()
    assert ahead > 0.1 and F.binary_cross_entropy(shown, truth) < 0.69


def test_a_photograph_that_cannot_be_read_is_left_out(tmp_path):
    data = open_tagged(write_scenes(tmp_path / "a", 6, 0, size=(64, 64), seed=1), "train")
    images, classes = data.images, len(data.classes)
    images[2].path.write_bytes(b"no picture")

    fabric, seen = build_fabric("cpu", 1, 1, "32-true"), []

    def features(pixels: np.ndarray) -> torch.Tensor:
        seen.append(pixels)
        return torch.from_numpy(pixels[:8, :8, :2].copy()).permute(2, 0, 1).float()

    classifier = TagClassifier(2, classes)
    fit_tags(classifier, images, features, fabric)
    assert len(seen) == 5 and classifier.weight.abs().sum() > 0
    again = TagClassifier(2, classes)
    fit_tags(again, [one for one in images if one is not images[2]], features, fabric)
    assert torch.equal(classifier.weight, again.weight)
    untouched = TagClassifier(2, classes)
    fit_tags(untouched, [], features, fabric)
    assert not untouched.weight.any()


def test_a_student_whose_file_of_tags_is_damaged_or_gone_is_refused_by_that_files_name(tmp_path):
    run = shutil.copytree(small_student()[0], tmp_path / "student")
    path = run_folder.weights(run, TAGS)
    assert labelpenet.load(run).tags.weight.abs().sum() > 0
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"tags\.safetensors: damaged.*resume"):
        labelpenet.load(run)
    path.unlink()
    with pytest.raises(InputError, match=r"tags\.safetensors: gone.*resume"):
        labelpenet.load(run)


def test_a_file_of_tags_that_was_deleted_is_made_again(tmp_path):
    trained, year = small_student()
    run = shutil.copytree(trained, tmp_path / "student")
    path = run_folder.weights(run, TAGS)
    before, network = path.read_bytes(), run_folder.weights(run, "student").read_bytes()
    path.unlink()
    annotated = open_annotated(year, "train")
    truths = read_supervision("full", annotated).truths
    recipe = config.override(config.StudentRecipe(), CHOICES)
    distill(annotated.tagged, truths, run, recipe, backbone="tiny", options=RunOptions(resume=True, device="cpu"))
    assert path.read_bytes() == before and run_folder.weights(run, "student").read_bytes() == network


@pytest.mark.parametrize("part", [TAGS, "student"])
def test_a_damaged_file_of_a_student_is_named_and_made_again(tmp_path, caplog, part):
    trained, year = small_student()
    run = shutil.copytree(trained, tmp_path / "student")
    path = run_folder.weights(run, part)
    before = path.read_bytes()
    annotated = open_annotated(year, "train")
    truths = read_supervision("full", annotated).truths
    recipe = config.override(config.StudentRecipe(), CHOICES)
    again = {"backbone": "tiny", "options": RunOptions(resume=True, device="cpu")}
    for damaged in (before[: len(before) // 2], b"", before[:-9] + bytes([before[-9] ^ 4]) + before[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{part}\.safetensors: damaged.*distill \.\.\. --resume"):
            labelpenet.load(run)
        distill(annotated.tagged, truths, run, recipe, **again)
        assert path.read_bytes() == before and f"{path} is damaged; it is made again" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("part", [TAGS, "student"])
def test_a_students_weights_that_are_no_numbers_are_refused(tmp_path, part):
    run = shutil.copytree(small_student()[0], tmp_path / "student")
    path = run_folder.weights(run, part)
    state = read_tensors(path)
    name = next(key for key in state if key.endswith("weight"))
    write_tensors(path, {**state, name: state[name] * float("nan")})
    with pytest.raises(InputError, match=rf"{part}\.safetensors: .* NaN"):
        labelpenet.load(run)


def test_the_state_of_a_student_knows_its_tags(tmp_path):
    run = shutil.copytree(small_student()[0], tmp_path / "student")
    known = run_folder.state(run)
    path = run_folder.weights(run, TAGS)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert run_folder.is_outdated(known, run_folder.state(run), "student")


def test_a_student_weighs_nothing_where_tags_are_known():
    plain, own = untaught("mobilenet_v2", "network.tag_power=0"), sure(untaught("mobilenet_v2", "network.tag_power=1"))
    image = photograph(70, 64)
    before, after = (net.predict_pixels(image, tags=(1,)) for net in (plain, own))
    assert len(after) and set(after.labels.tolist()) == {1}
    assert torch.equal(before.weights, after.weights) and torch.equal(before.boxes, after.boxes)
    known = plain.predict(image)
    assert torch.equal(before.weights, known.weights[known.labels == 1])
