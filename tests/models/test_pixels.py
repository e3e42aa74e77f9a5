"""Which pixels look like a class: what is learnt of cells, where it lies, and what it does to a student's masks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import labelpenet
from labelpenet import config
from labelpenet.calibration.sharpen import sharpen
from labelpenet.config import Sharpening, StudentRecipe
from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.images import read_image
from labelpenet.data.run_folder import PIXELS
from labelpenet.engine.distributed import build_fabric
from labelpenet.errors import InputError
from labelpenet.formats import open_annotated
from labelpenet.instances import Instances
from labelpenet.models.pixels import SUREST, PixelClassifier, stack
from labelpenet.training.distill import ALONE, cells_of
from labelpenet.training.supervised import read_supervision
from labelpenet.training.tags import fit_pixels
from tests.models.test_cascade import photograph
from tests.models.test_student import untaught
from tests.students import small_student


def random_classifier(channels: list[int], classes: int, scale: float = 0.2) -> PixelClassifier:
    classifier = PixelClassifier(channels, classes)
    generator = torch.Generator().manual_seed(0)
    for part in (classifier.weight, classifier.bias):
        part.copy_(torch.randn(part.shape, generator=generator) * scale)
    return classifier


def test_log_odds_are_those_of_the_stacked_maps_and_no_surer_than_said():
    maps = [torch.randn(3, 6, 10), torch.randn(4, 3, 5)]
    classifier = random_classifier([3, 4], 2, 2.0)
    expected = torch.einsum("ck,khw->chw", classifier.weight, stack(maps)) + classifier.bias[:, None, None]
    assert expected.abs().max() > SUREST
    torch.testing.assert_close(classifier(maps, (6, 10)), expected.clamp(-SUREST, SUREST))
    quiet = random_classifier([3, 4], 2, 0.2)
    expected = torch.einsum("ck,khw->chw", quiet.weight, stack(maps)) + quiet.bias[:, None, None]
    larger = F.interpolate(expected[None], (12, 20), mode="bilinear")[0]
    close = (quiet(maps, (12, 20)) - larger).abs()
    assert close[:, 2:-2, 2:-2].mean() < 0.1  # of the coarser map one interpolation, not two after another


def test_what_is_labelled_wrong_in_one_class_but_seen_without_it_is_not_believed():
    """Half of the sofas in photographs of cats are labelled cat; sofas are in photographs of dogs, too."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 3, (6000,), generator=generator)  # cat, dog, sofa
    cells = F.one_hot(kinds, 3).float() + 0.1 * torch.randn(6000, 3, generator=generator)
    of_cats = torch.rand(6000, generator=generator) < 0.5  # the photograph's only class
    kinds[(kinds < 2)] = torch.where(of_cats[kinds < 2], 0, 1)
    cells = F.one_hot(kinds, 3).float() + 0.1 * torch.randn(6000, 3, generator=generator)
    mislabelled = (kinds == 2) & (torch.rand(6000, generator=generator) < 0.5)
    shown = torch.zeros(6000, 2)
    shown[of_cats & ((kinds == 0) | mislabelled), 0] = 1
    shown[~of_cats & ((kinds == 1) | mislabelled), 1] = 1
    classifier = PixelClassifier([3], 2)
    classifier.fit(cells, shown)
    cat, dog, sofa = classifier([torch.eye(3)[:, None]], (1, 3))[0, 0]
    assert cat > 1 and sofa < -0.2 and dog < sofa


def test_what_is_unknown_teaches_nothing_and_a_class_that_no_cell_shows_has_no_say():
    generator = torch.Generator().manual_seed(1)
    cells = torch.randn(400, 5, generator=generator)
    shown = torch.stack([(cells[:, 0] > 0).float(), torch.zeros(400), torch.full((400,), -1.0)], 1)
    shown[300:, 0] = -1
    classifier = PixelClassifier([5], 3)
    classifier.fit(cells, shown)
    assert classifier.weight[0, 0] > 1 and not classifier.weight[1:].any() and not classifier.bias[1:].any()
    few = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]
    other_cells = torch.tensor([[3.0], [2.9], [-1.0], [-1.2]])
    one, three = PixelClassifier([1], 1), PixelClassifier([1], 1)
    one.fit(other_cells, few)
    three.fit(torch.cat([other_cells[:2], other_cells[2:].repeat(3, 1)]), torch.cat([few[:2], few[2:].repeat(3, 1)]))
    middle = [one([torch.tensor([[[value]]])], (1, 1)).item() for value in (3.0, -1.1)]
    assert middle[0] > 0 > middle[1] and abs(middle[0] + middle[1]) < 0.3  # both sides weigh the same
    same = [three([torch.tensor([[[value]]])], (1, 1)).item() for value in (3.0, -1.1)]
    assert same[0] > 0 > same[1]


def test_evidence_moves_a_masks_border_and_none_of_it_nothing():
    torch.manual_seed(0)
    image, masks = torch.full((3, 64, 96), 0.5), torch.full((1, 28, 28), 0.6)
    boxes, settings = torch.tensor([[16.0, 8.0, 80.0, 56.0]]), Sharpening(margin=0.0)
    plain = sharpen(image, masks, boxes, settings)
    nothing = sharpen(image, masks, boxes, settings, stride=8, evidence=torch.zeros(1, 8, 12))
    torch.testing.assert_close(nothing, plain, atol=1e-5, rtol=0)
    evidence = torch.full((1, 8, 12), SUREST)
    evidence[:, :, 6:] = -SUREST  # the right half of the image does not look like it
    moved = sharpen(image, masks, boxes, settings, stride=8, evidence=evidence)
    half = moved.shape[-1] // 2
    inside = plain[0] > 0.5
    assert inside[:, half + 4 :].any() and not (moved[0] > 0.5)[:, half + 4 :].any()
    assert ((moved[0] > 0.5) | ~inside)[:, : half - 4].all()
    assert (
        not (moved[0] > 0.5)[:, : half // 4].any() and not (moved[0] > 0.5)[: inside.shape[0] // 16].any()
    )  # nor beyond
    short = sharpen(image, masks.bfloat16(), boxes, settings, stride=8, evidence=evidence.bfloat16())  # of autocast
    assert ((short > 0.5) != (moved > 0.5)).float().mean() < 0.02
    ignored = sharpen(image, masks, boxes, replace(settings, evidence=0.0), stride=8, evidence=evidence)
    torch.testing.assert_close(ignored, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "timm/tf_efficientnet_lite0", "tiny", "vgg16"])
def test_a_students_labels_know_what_its_cells_look_like(backbone):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    plain, own = untaught(backbone, "masks.evidence=0"), untaught(backbone)
    image = plain._values(photograph(70, 64))
    assert plain.pixels is None
    with torch.no_grad():
        before, same = plain.answer(image, True), own.answer(image, True)
        assert len(before[0]) and torch.equal(before[3], same[3])  # nothing is fitted yet
        own.pixels.bias.copy_(torch.tensor([-SUREST, SUREST]))
        after = own.answer(image, True)
        for one, two in zip(plain.answer(image), own.answer(image), strict=True):
            assert torch.equal(one, two)  # of a photograph whose tags nobody knows
    for label, sign in ((0, -1), (1, 1)):
        one, two = (found[3][found[1] == label].mean() for found in (before, after))
        assert sign * (two - one) > 0.02


def test_cells_are_taught_where_the_labels_lie(tmp_path):
    student = untaught("mobilenet_v2")
    side = student.recipe.images.test_side
    size = (3 * side, 4 * side - 10)
    Image.fromarray(photograph(*size)).save(tmp_path / "a.png")
    masks = torch.zeros(2, *size, dtype=torch.bool)
    masks[0, : 3 * side // 2] = True  # class 0 fills the upper half, class 1 a thin line on its right edge
    masks[1, :, -4:] = True
    bottom, right = map(float, size)
    boxes = torch.tensor([[0.0, 0.0, right, bottom / 2], [right - 4, 0.0, right, bottom]])
    labels = Instances(boxes, torch.tensor([0, 1]), torch.ones(2), size, masks)
    images = TaggedImages(("one", "two"), (TaggedImage("a", tmp_path / "a.png", (0, 1)),))
    features, shown = cells_of(student, images, {"a": labels})(images.images[0])
    rows, columns = shown.shape[1:]
    assert features.shape == (sum(student.pixels.channels), rows, columns)
    assert (shown[0, : rows // 2 - 1, :-1] == 1).all() and (shown[0, rows // 2 + 1 :] == 0).all()
    assert (shown[1, :, :-1] == 0).all() and (shown[1] != 1).all()
    alone = [TaggedImage(str(number), tmp_path / "a.png", (0,)) for number in range(ALONE)]
    many = TaggedImages(images.classes, (*images.images, *alone))
    _, doubted = cells_of(student, many, {"a": labels, "0": labels})(images.images[0])
    assert (doubted[0, : rows // 2 - 1, :-1] == -1).all() and torch.equal(doubted[1], shown[1])
    _, sure = cells_of(student, many, {"a": labels, "0": labels})(alone[0])
    assert torch.equal(sure[0], shown[0])
    for own in (None, torch.stack([masks[0], torch.zeros(size, dtype=torch.bool)])):  # an instance has a box alone
        boxed = Instances(boxes, labels.labels, labels.weights, size, own)
        assert cells_of(student, images, {"a": boxed})(images.images[0]) is None
    assert not cells_of(student, images, {"a": Instances.empty(size)})(images.images[0])[1].any()


def test_photographs_of_which_nothing_is_known_are_left_out():
    images = [TaggedImage(str(number), None, (0,)) for number in range(5)]
    fabric = build_fabric("cpu", 1, 1, "32-true")

    def cells(image: TaggedImage) -> tuple[torch.Tensor, torch.Tensor] | None:
        if image.id == "1":
            raise InputError("no picture")
        if image.id == "3":
            return None
        features = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(int(image.id)))
        return features, (features[:1] > 0).float()

    classifier, again, untouched = (PixelClassifier([2], 1) for _ in range(3))
    fit_pixels(classifier, images, cells, fabric)
    fit_pixels(again, images, cells, fabric)
    assert classifier.weight[0, 0] > 1 and torch.equal(classifier.weight, again.weight)
    fit_pixels(untouched, [], cells, fabric)
    fit_pixels(untouched, [images[3]], cells, fabric)
    assert not untouched.weight.any()


def test_a_student_that_was_trained_has_learnt_what_its_cells_look_like():
    run, year = small_student()
    student = labelpenet.load(run)
    annotated = open_annotated(year, "train")
    truths = read_supervision("full", annotated).truths
    ahead = []
    for image in annotated.tagged.images:
        with torch.no_grad():
            seen = cells_of(student, annotated.tagged, truths)(image)
            features, shown = seen
            odds = student.pixels.weight @ features.flatten(1) + student.pixels.bias[:, None]
        for own, value in zip(odds, shown.flatten(1), strict=True):
            if (value == 1).any():
                ahead.append(float(own[value == 1].mean() - own[value == 0].mean()))
    assert len(ahead) > 8 and sum(ahead) / len(ahead) > 0.5


def test_a_student_of_before_needs_no_such_file_and_answers_as_before(tmp_path):
    run = shutil.copytree(small_student()[0], tmp_path / "student")
    year = small_student()[1]
    pixels = read_image(open_annotated(year, "train").tagged.images[0].path)
    path = run_folder.weights(run, PIXELS)
    with_evidence = labelpenet.load(run)
    path.unlink()
    with pytest.raises(InputError, match=r"pixels\.safetensors: gone.*resume"):
        labelpenet.load(run)
    facts = json.loads((run / "run.json").read_text())
    del facts["recipe"]["masks"]["evidence"], facts["checksum"]
    (run / "run.json").write_text(json.dumps(facts))
    older = labelpenet.load(run)
    assert older.pixels is None and older.recipe.masks.evidence == 0
    with_evidence.pixels = None
    labels = [student.predict_pixels(pixels, tags=(0, 1, 2)).masks for student in (older, with_evidence)]
    assert len(labels[0]) and torch.equal(*labels)


def test_true_objects_teach_the_mask_head_alone():
    assert config.student_recipe(true=True).masks.evidence == 0 and StudentRecipe().masks.evidence > 0
