"""Forward-backward learning on a few generated scenes: who learns from whom, and that a run can be interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor

from labelpenet import cli
from labelpenet.config import CascadeOptions
from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImages
from labelpenet.data.images import read_image
from labelpenet.data.run_folder import start_run
from labelpenet.data.scenes import write_scenes
from labelpenet.data.transforms import Batch
from labelpenet.engine.log import read_metrics
from labelpenet.errors import InputError
from labelpenet.evaluation import box_iou
from labelpenet.formats import open_tagged, write_predictions
from labelpenet.instances import Instances
from labelpenet.models.cascade import MODULES, LabelPEnet
from labelpenet.models.classification import present_classes
from labelpenet.models.detection import Detector
from labelpenet.models.hub import save_pretrained
from labelpenet.training import curriculum
from labelpenet.training.curriculum import (
    STAGE,
    Phase,
    backward,
    forward,
    forward_backward,
    proposal_labels,
    read_anchors,
)
from labelpenet.training.labels import Given
from labelpenet.training.pretrain import Sample, Training, pretrain, run_facts, to_batch
from labelpenet.training.validated import validate
from tests.models.tiny import lively_tiny
from tests.training.test_pretrain import boxes_of, results, tiny_recipe

CHANGES = (
    "forward_backward.schedule.steps=3",
    "forward_backward.schedule.batch_size=2",
    "forward_backward.schedule.warmup=0",
    "forward_backward.schedule.lr=0.001",
    "forward_backward.train_stem=true",
    "forward_backward.drift=none",
)
INFERRED = "forward_backward.labels=inferred"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=4, val=0, size=(96, 96), seed=3)


@pytest.fixture(scope="module")
def images(scenes) -> TaggedImages:
    return open_tagged(scenes, "train")


@pytest.fixture(scope="module")
def start(images, tmp_path_factory) -> Path:
    """A cascade trained for two steps a module."""
    return cascade(images, tmp_path_factory.mktemp("start") / "run", 4)


def cascade(images: TaggedImages, run: Path, until: int) -> Path:
    network = LabelPEnet(lively_tiny(7), images.classes, tiny_recipe(*CHANGES))
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    facts = run_facts(network, images, 0, "32-true")
    start_run(run, facts, False)
    pretrain(Training(network, images, boxes_of(images), run, fabric, facts=facts), until)
    return run


def improve(images: TaggedImages, start: Path, run: Path, *changes: str, resume: bool = False) -> LabelPEnet:
    recipe = tiny_recipe(*CHANGES, *changes)
    options = CascadeOptions(
        resume, device="cpu", precision="32-true", checkpoint_minutes=0.0, cache=start.parent / "cache"
    )
    return forward_backward(images, start, run, recipe, options=options)


@pytest.fixture(scope="module")
def improved(images, start, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("improved") / "run"
    improve(images, start, run)
    return run


def sample(network: LabelPEnet, images: TaggedImages, number: int = 0) -> Sample:
    one = images.images[number]
    pixels = read_image(one.path)
    boxes = torch.from_numpy(boxes_of(images)[one.id])
    return Sample(pixels, network.view(pixels, 80), one.tags, boxes)


def spy(monkeypatch, network: LabelPEnet) -> dict[int, Instances]:
    """What modules 2 to 4 are trained on, by module."""
    seen: dict[int, Instances] = {}
    for number in (2, 3, 4):
        module = network.module(number)

        def losses(batch: Batch, targets: list[Instances], own=module, number=number):
            assert own.training and batch.stem.requires_grad
            (seen[number],) = targets
            return type(own).losses(own, batch, targets)

        monkeypatch.setattr(module, "losses", losses)
    return seen


def trainable(start: Path) -> LabelPEnet:
    network = LabelPEnet.from_run(start)
    network.train()
    network.stem.requires_grad_(True)
    return network


def learning(network: LabelPEnet) -> set[str]:
    """The parts that have got a gradient."""
    return {
        part
        for part in ("stem", *MODULES)
        if any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in getattr(network, part).parameters())
    }


def same(one: Instances, other: Instances) -> bool:
    equal = torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)
    return equal and torch.equal(one.weights, other.weights)


def test_forward_each_module_learns_what_the_one_before_infers(start, images, monkeypatch):
    network = trainable(start)
    one = sample(network, images)
    seen = spy(monkeypatch, network)
    torch.manual_seed(0)
    terms = forward(network, [one])
    assert set(terms) == {"forward_1", "forward_2", "forward_3", "forward_4"}
    torch.stack(list(terms.values())).sum().backward()
    assert learning(network) == {"stem", *MODULES}
    network.eval()
    for number in (2, 3, 4):
        ((found, _),) = network.infer(number - 1, to_batch(network, [one]))
        assert same(seen[number], one.view.instances(found))
        assert (seen[number].masks is None) == (number == 2)


def test_backward_each_module_learns_what_the_next_one_infers(start, images, monkeypatch):
    network = trainable(start)
    one = sample(network, images)
    seen = spy(monkeypatch, network)
    terms = backward(network, [one])
    assert set(terms) == {"backward_3", "backward_2", "backward_1_multi", "backward_1_single"}
    torch.stack(list(terms.values())).sum().backward()
    assert learning(network) == {"stem", "classification", "detection", "refinement"}  # module 4 only infers
    network.eval()
    batch = to_batch(network, [one])
    from_four = one.view.instances(network.infer(4, batch)[0][0])
    assert same(seen[3], replace(from_four, weights=torch.ones(len(from_four))))
    from_three = one.view.instances(network.infer(3, batch)[0][0])
    assert same(seen[2], from_three) and seen[2].masks is None
    ((found, _),) = network.infer(2, batch)
    x_c, x_p = network.classification(network.classification.features(batch)[0])
    labels = proposal_labels(one.proposals, found, 0.5)
    expected = torch.nn.functional.cross_entropy(x_c, labels)
    torch.testing.assert_close(terms["backward_1_single"], expected)
    torch.testing.assert_close(
        terms["backward_1_multi"], network.classification.loss(x_c, x_p, present_classes(one.tags, len(images.classes)))
    )


def training_on(start: Path, images: TaggedImages, *changes: str) -> Training:
    network = LabelPEnet.from_run(start, recipe=tiny_recipe(*CHANGES, *changes))
    return Training(network, images, boxes_of(images), start, Fabric(accelerator="cpu", devices=1))


def test_validated_labels_teach_whom_inferred_ones_would(start, images, monkeypatch):
    """The teacher labels the photograph as it is, however the network sees it, and says the same to both phases."""
    training, anchors = training_on(start, images), read_anchors(start, images)
    network, one = training.network, curriculum.stage(training, read_anchors(start, images))
    draws = (one.load([0], torch.Generator().manual_seed(draw))[0] for draw in range(20))
    shown = next(sample for sample in draws if sample.view.flipped)
    pixels = read_image(images.images[0].path)
    assert np.array_equal(shown.image, pixels) and shown.view.size not in {(64, 64), (80, 80)}
    torch.testing.assert_close(shown.view.pixels, network.view(pixels, shown.view.size[0], True).pixels, atol=1, rtol=0)
    batch = one.teacher.batch([pixels], [shown.tags], [shown.proposals])
    expected = []
    for number in range(1, 5):
        anchor, ((found, _),) = anchors[number - 1]["train_00000"], one.teacher.infer(number, batch)
        together = Instances.cat([anchor, found])
        voted = together if number > 2 else one.teacher.vote(number, [together], batch)[0]  # modules 3 and 4 have voted
        expected.append(shown.view.instances(validate(anchor, found, voted.weights, 0.6, 0.7)))
    network.train()
    seen = spy(monkeypatch, network)
    one.loss([shown], 0)
    assert all(same(seen[number], expected[number - 2]) for number in (2, 3, 4))
    with torch.no_grad():  # as the optimiser would between the two
        network.detection.classifier.weight.add_(1.0)
    one.loss([shown], 1)
    assert same(seen[3], expected[3].weighted((expected[3].weights > 0).float())) and same(seen[2], expected[2])


def test_labels_that_drift_are_told_without_annotation(start, images):
    training, anchors = training_on(start, images, "forward_backward.drift=1.6"), read_anchors(start, images)
    figures, problem = curriculum.guard(training, training.network, anchors)()
    kinds = ("area", "number", "agreement")
    assert figures == {f"drift/module{number}_{kind}": pytest.approx(1) for number in (2, 3, 4) for kind in kinds}
    assert problem is None

    class Halved(dict):
        def __missing__(self, name: str) -> Instances:
            one = anchors[2][name]
            assert one.masks is not None
            half = one.masks.clone()
            half[:, ::2] = False
            return Instances(one.boxes, one.labels, one.weights, one.image_size, half)

    figures, problem = curriculum.guard(training, training.network, (*anchors[:2], Halved(), anchors[3]))()
    assert figures["drift/module3_area"] == pytest.approx(2, rel=0.1) and "module 3 (refinement)" in str(problem)


def test_drift_is_looked_for_in_the_precision_that_the_labels_have(start, images, monkeypatch):
    training, anchors = training_on(start, images), read_anchors(start, images)
    training.fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    infer, seen = training.network.infer, []

    def watched(*given):
        seen.append(torch.is_autocast_enabled("cpu"))
        return infer(*given)

    monkeypatch.setattr(training.network, "infer", watched)
    figures, _ = curriculum.guard(training, training.network, anchors)()
    assert all(seen) and len(seen) == 3 * len(images.images) and not torch.is_autocast_enabled("cpu")
    assert len(figures) == 9


def test_a_photograph_of_another_size_than_its_labels_is_not_watched(start, images, tmp_path):
    """One that was turned or scaled meanwhile, say: whoever loads it for training says so."""
    turned = tmp_path / "turned.png"
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(turned)
    first, *others = images.images
    changed = replace(images, images=(replace(first, path=turned), *others))
    given = "forward_backward.drift=1.6"
    anchors = read_anchors(start, images)
    left, same = training_on(start, replace(images, images=tuple(others)), given), training_on(start, changed, given)
    assert curriculum.guard(same, same.network, anchors)() == curriculum.guard(left, left.network, anchors)()


def test_doubtful_instances_are_no_drift(start, images, monkeypatch):
    training, anchors = training_on(start, images, "forward_backward.drift=1.6"), read_anchors(start, images)
    infer = training.network.infer

    def doubting(*given):
        found = infer(*given)
        return [(Instances.cat([one, one.weighted(torch.zeros(len(one)))]), trace) for one, trace in found]

    monkeypatch.setattr(training.network, "infer", doubting)
    figures, problem = curriculum.guard(training, training.network, anchors)()
    assert list(figures.values()) == [pytest.approx(1)] * 9 and problem is None


def test_the_background_of_module_one_learns_only_backward(start, images):
    network = trainable(start)
    bias = network.classification.classifier.bias
    forward(network, [sample(network, images)])["forward_1"].backward()
    assert bias.grad is not None and bias.grad[0] == 0
    backward(network, [sample(network, images)])["backward_1_single"].backward()
    assert bias.grad[0] != 0


def test_inference_in_a_phase_is_without_dropout_and_gradients(start, images):
    network = trainable(start)
    phase = Phase(network, [sample(network, images)])
    modes = []
    handle = network.refinement.register_forward_hook(lambda *_: modes.append(network.refinement.training))
    found = [phase.infer(3)[0] for _ in range(2)]
    handle.remove()
    assert same(*found) and not found[0].boxes.requires_grad and network.training


@pytest.mark.parametrize("learns", [False, True])
def test_both_phases_share_features_that_do_not_change(start, images, learns):
    network = trainable(start)
    network.stem.requires_grad_(learns)
    labels = [tuple(anchors[one.id] for anchors in read_anchors(start, images)) for one in images.images[:1]]
    shown, passes = sample(network, images), []
    network.classification.tail.register_forward_hook(lambda *_: passes.append(1))
    forward(network, [shown], labels)
    losses = []
    for one in (shown, sample(network, images)):
        torch.manual_seed(1)
        losses.append({name: value.item() for name, value in backward(network, [one], labels).items()})
    assert losses[0] == losses[1]
    assert len(passes) == 2 + learns, "a stem that learns gives the second phase other features"


def test_modules_that_voted_learn_in_half_precision_too(start, images):
    # shown by torch 2.9, whose autocast hands the losses the weights that it has cast for the vote, without gradients
    network = trainable(start)
    assert network.recipe.modules[3].label.vote
    with torch.autocast("cpu", torch.bfloat16):
        losses = backward(network, [sample(network, images)])
    torch.stack(list(losses.values())).sum().backward()
    for layer in (network.classification.classifier, network.detection.classifier, network.detection.regressor):
        assert layer.weight.grad is not None


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_proposal_labels_against_a_loop(beta):
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 60, (80, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (80, 2))], 1).astype(np.float32)
    proposals, objects = boxes[:70], boxes[70:]
    classes = rng.integers(0, 4, 10)
    found = Instances(torch.from_numpy(objects), torch.from_numpy(classes), torch.ones(10), (100, 100))
    expected = []
    for proposal in proposals:
        overlaps = [float(box_iou(proposal[None], one[None])[0, 0]) for one in objects]
        best = int(np.argmax(overlaps))
        expected.append(classes[best] + 1 if overlaps[best] > beta else 0)
    assert 0 in expected and max(expected) > 0
    assert proposal_labels(torch.from_numpy(proposals), found, beta).tolist() == expected
    assert proposal_labels(torch.from_numpy(proposals), found[:0], beta).tolist() == [0] * 70
    doubted = found.weighted(torch.tensor([0.0] * 5 + [1.0] * 5))
    rest = proposal_labels(torch.from_numpy(proposals), found[5:], beta)
    for proposal, label, plain in zip(
        proposals, proposal_labels(torch.from_numpy(proposals), doubted, beta), rest, strict=True
    ):
        x1, y1, x2, y2 = (
            np.maximum(proposal, objects[:5]).T[:2].tolist() + np.minimum(proposal, objects[:5]).T[2:].tolist()
        )
        within = np.maximum(np.subtract(x2, x1), 0) * np.maximum(np.subtract(y2, y1), 0)
        hidden = (within >= 0.5 * np.prod(proposal[2:] - proposal[:2])).any()
        assert label == (-1 if plain == 0 and hidden else plain)


def test_mirrored_photographs_carry_their_proposals_along(start, images):
    fabric = Fabric(accelerator="cpu", devices=1)
    boxes = boxes_of(images)
    seen = set()
    for flip in ("true", "false"):
        network = LabelPEnet(lively_tiny(7), images.classes, tiny_recipe(f"images.flip={flip}", INFERRED))
        load = curriculum.load(Training(network, images, boxes, start, fabric), ())
        for draw in range(6):
            (one,) = load([1], torch.Generator().manual_seed(draw))
            pixels = read_image(images.images[1].path)
            mirrored = not np.array_equal(one.image, pixels)
            assert np.array_equal(one.image, pixels[:, ::-1] if mirrored else pixels)
            own = network.select(torch.from_numpy(boxes[images.images[1].id]), pixels.shape)
            x1, y1, x2, y2 = own.T
            expected = torch.stack([96 - x2, y1, 96 - x1, y2], 1) if mirrored else own
            assert torch.equal(one.proposals, expected)
            assert one.view.pixels.shape[-2:] in {(64, 64), (80, 80)} and not one.view.flipped
            seen.add((flip, mirrored))
    assert seen == {("true", True), ("true", False), ("false", False)}


def test_a_run_of_its_own_comes_out(improved, start, images):
    assert set(results(improved)) == set(results(start))
    before, after = LabelPEnet.from_run(start), LabelPEnet.from_run(improved)
    for part in ("stem", *MODULES):
        old, new = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert any(not torch.equal(old[name], new[name]) for name in old), part
    rows = read_metrics(improved)
    assert {row["stage"] for row in rows} == {STAGE} and rows[-1]["step"] == 6  # two updates an iteration


def test_both_phases_of_an_iteration_see_the_same_photographs(start, images, tmp_path, monkeypatch):
    seen: list[tuple[str, bytes]] = []
    for phase in (forward, backward):

        def recorded(network: LabelPEnet, samples: list[Sample], labels, phase=phase) -> dict[str, Tensor]:
            seen.extend((phase.__name__, one.view.pixels.numpy().tobytes()) for one in samples)
            return phase(network, samples, labels)

        monkeypatch.setattr(curriculum, phase.__name__, recorded)
    improve(images, start, tmp_path / "run")
    names = [name for name, _ in seen]
    assert names == (["forward"] * 2 + ["backward"] * 2) * 3
    for at in range(0, 12, 4):
        assert seen[at][1] == seen[at + 2][1] and seen[at + 1][1] == seen[at + 3][1]
    assert len({pixels for _, pixels in seen}) > 2


@pytest.mark.parametrize("count", [3, 8])
def test_interrupted_and_resumed_it_ends_the_same(improved, start, images, tmp_path, monkeypatch, count):
    left = [count]
    real = Detector.losses  # of module 2: called once a photograph and phase, 12 times in all

    def losses(self, *arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Detector, "losses", losses)
    with pytest.raises(KeyboardInterrupt):
        improve(images, start, tmp_path / "run")
    monkeypatch.undo()
    improve(images, start, tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == results(improved)


def test_a_photograph_that_the_cascade_could_not_label_is_left_out(start, images, tmp_path, caplog):
    run, lost = tmp_path / "start", images.images[0]
    shutil.copytree(start, run)
    run_folder.check_photographs(run, dict.fromkeys(image.id for image in images.images))
    for number in range(1, 5):
        path = run_folder.instances(run, f"module{number}")
        content = json.loads(path.read_text())
        del content["checksum"], content["images"][0]
        left = {image["id"] for image in content["images"]}
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in left]
        path.write_text(json.dumps(content))
    improve(images, run, tmp_path / "run")
    assert f"note: 1 photographs have no labels ({lost.id}): not learnt" in caplog.messages
    assert run_folder.read_facts(tmp_path / "run")["images"] == len(images.images) - 1


@pytest.mark.parametrize(("phases", "still"), [("backward", {"segmentation"}), ("forward", set())])
def test_single_phases_and_a_frozen_stem(start, images, tmp_path, phases, still):
    improve(images, start, tmp_path / "run", f"forward_backward.phases={phases}", "forward_backward.train_stem=false")
    before, after = LabelPEnet.from_run(start), LabelPEnet.from_run(tmp_path / "run")
    unmoved = {
        part
        for part in ("stem", *MODULES)
        if all(torch.equal(value, getattr(after, part).state_dict()[name])
               for name, value in getattr(before, part).state_dict().items())
    }  # fmt: skip
    assert unmoved == {"stem"} | still


def test_the_average_of_the_weights_moves_less(improved, start, images, tmp_path):
    improve(images, start, tmp_path / "run", "forward_backward.share=none", INFERRED)
    first, averaged, plain = (LabelPEnet.from_run(run) for run in (start, improved, tmp_path / "run"))

    def distance(one: LabelPEnet) -> float:
        old = first.state_dict()
        return sum(float((value - old[name]).abs().sum()) for name, value in one.state_dict().items())

    assert 0 < distance(averaged) < distance(plain)


def test_what_it_cannot_start_from_is_named(improved, start, images, tmp_path):
    part = cascade(images, tmp_path / "part", 2)
    with pytest.raises(InputError, match="module 3 is not trained"):
        improve(images, part, tmp_path / "run")
    more = TaggedImages(images.classes, (*images.images, replace(images.images[0], id="other")))
    with pytest.raises(InputError, match="no labels of 1 of the photographs, such as other"):
        improve(more, start, tmp_path / "run")
    with pytest.raises(InputError, match="need a teacher"):
        improve(images, start, tmp_path / "none", "forward_backward.share=none")
    assert not (tmp_path / "none").exists(), "nothing is half written"
    with pytest.raises(InputError, match="not a run folder"):
        improve(images, tmp_path, tmp_path / "run")
    other = TaggedImages(images.classes[::-1], images.images)
    with pytest.raises(InputError, match="same classes"):
        improve(other, start, tmp_path / "run")
    with pytest.raises(InputError, match="--resume"):
        improve(images, start, improved)
    mixed = cascade(images, tmp_path / "mixed", 1)
    facts = json.loads((mixed / "run.json").read_text())
    (mixed / "run.json").write_text(json.dumps(facts | {"supervision": "mixed"}))
    with pytest.raises(InputError, match="tags alone"):
        improve(images, mixed, tmp_path / "run")
    with pytest.raises(InputError, match="another recipe"):
        improve(images, start, improved, "forward_backward.schedule.steps=4", resume=True)
    assert not (tmp_path / "run").exists()


def objects(images: TaggedImages, masks: bool = True, weight: float = 0.8) -> dict[str, Instances]:
    """Labels that a person might give: in each photograph its first tag's object, and a doubtful one inside it."""
    boxes = torch.tensor([[10.0, 12.0, 70.0, 80.0], [20.0, 20.0, 40.0, 40.0]])
    drawn = torch.zeros(2, 96, 96, dtype=torch.bool)
    drawn[0, 12:80, 10:70], drawn[1, 20:40, 20:40] = True, True
    found = {}
    for image in images.images:
        classes = torch.tensor([image.tags[0]] * 2)
        weights = torch.tensor([weight, weight / 4])
        found[image.id] = Instances(boxes, classes, weights, (96, 96), drawn if masks else None)
    return found


@pytest.fixture
def told(images, start, tmp_path):
    """Trains on given labels in a run folder of the test's."""

    def train(labels, *changes: str, photographs: TaggedImages = images, resume: bool = False) -> Path:
        options = CascadeOptions(resume, device="cpu", precision="32-true", cache=start.parent / "cache")
        recipe = tiny_recipe(*CHANGES, *changes)
        forward_backward(photographs, start, tmp_path / "told", recipe, labels=labels, options=options)
        return tmp_path / "told"

    return train


def test_given_labels_are_what_all_modules_learn(start, images, monkeypatch):
    """Both phases; the doubtful one is ignored; and nothing is inferred for another module."""
    labels = objects(images)
    training = training_on(start, images, "forward_backward.labels=given")
    network, one = training.network, curriculum.stage(training, (Given(labels),) * 4)
    (shown,) = one.load([0], torch.Generator().manual_seed(1))
    expected = shown.view.instances(labels["train_00000"].weighted(torch.tensor([0.8, 0.0])))
    monkeypatch.setattr(LabelPEnet, "infer", None)
    network.train()
    seen = spy(monkeypatch, network)
    one.loss([shown], 0)
    assert all(same(seen[number], expected) for number in (2, 3, 4))
    seen.clear()
    terms = one.loss([shown], 1)
    assert same(seen[3], expected.weighted(torch.tensor([1.0, 0.0]))) and same(seen[2], expected)
    x_c, _ = network.classification(network.classification.features(to_batch(network, [shown]))[0])
    own = proposal_labels(shown.proposals, labels["train_00000"].weighted(torch.tensor([0.8, 0.0])), 0.5)
    torch.testing.assert_close(
        terms["backward_1_single"], network.classification.single_label_loss(x_c, own), atol=1e-4, rtol=1e-4
    )


def test_a_cascade_comes_nearer_to_given_labels(told, start, images):
    """Its own labels of the photographs, against those that it was given."""
    labels = objects(images)

    def overlap(run: Path) -> float:
        """The best box IoU with the object, mean over modules 2 to 4 and the photographs."""
        found = [read_anchors(run, images)[number][image.id] for number in (1, 2, 3) for image in images.images]
        wanted = [labels[image.id].boxes[:1].numpy() for _ in (1, 2, 3) for image in images.images]
        ious = [box_iou(one.boxes.numpy(), other) for one, other in zip(found, wanted, strict=True)]
        return float(np.mean([iou.max(initial=0) for iou in ious]))

    after = told(labels, "forward_backward.schedule.steps=40", "forward_backward.share=none")
    assert overlap(after) > overlap(start) + 0.1


def test_given_labels_choose_the_photographs(told, start, images):
    """Those that have some; one that the cascade has not seen may be among them."""
    new = replace(images.images[0], id="new")
    labels = {name: one for name, one in objects(images).items() if name != images.images[1].id}
    labels["new"] = labels["train_00000"]
    more = TaggedImages(images.classes, (*images.images, new))
    run = told(labels, photographs=more)
    assert set(read_anchors(run, TaggedImages(images.classes, (new,)))[3]) == set(labels)
    assert json.loads((run / "run.json").read_text())["recipe"]["forward_backward"]["labels"] == "given"
    with pytest.raises(InputError, match="with another labels"):
        told(labels | {"new": objects(images, weight=0.7)["train_00000"]}, photographs=more, resume=True)


def test_a_cascade_that_learnt_given_labels_learns_others_but_goes_back_to_no_inferred_ones(
    told, start, images, tmp_path
):
    run, options = (
        told(objects(images)),
        CascadeOptions(device="cpu", precision="32-true", cache=start.parent / "cache"),
    )
    recipe = tiny_recipe(*CHANGES)
    with pytest.raises(InputError, match="labels supervision"):
        forward_backward(images, run, tmp_path / "again", recipe, options=options)
    assert not (tmp_path / "again").exists()
    forward_backward(images, run, tmp_path / "again", recipe, labels=objects(images, weight=0.7), options=options)
    first, second = (json.loads((path / "run.json").read_text()) for path in (run, tmp_path / "again"))
    assert first["supervision"] == second["supervision"] == "labels" and first["start"] != second["start"]


def test_given_labels_that_cannot_be_learnt_are_named(told, images, tmp_path):
    for labels, what in (
        ({}, "no photograph has a label"),
        (objects(images, weight=0.0), "no photograph has a label surer than 0"),
        (objects(images, masks=False), "train_00000: its labels have no masks"),
        (None, "give them with --labels"),
    ):
        with pytest.raises(InputError, match=what):
            told(labels, *(["forward_backward.labels=given"] if labels is None else []))
    assert not (tmp_path / "told").exists()


def test_a_file_of_labels_on_the_command_line(start, scenes, images, tmp_path, capsys):
    for name, weight in (("a.json", 0.8), ("b.json", 0.4)):
        write_predictions(tmp_path / name, objects(images, weight=weight).items(), images.images, images.classes)
    words = ["forward-backward", start, scenes, "--split", "train", "--out", tmp_path / "run"]
    words += ["--cache", start.parent / "cache", "--device", "cpu", "--shorten", "0.34"]
    words += ["--labels", tmp_path / "a.json", tmp_path / "b.json"]
    words = [str(word) for word in words]

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, *more])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "forward_backward.drift does nothing" in refused("--set", "forward_backward.drift=2")
    assert "--labels says what is learnt" in refused("--set", "forward_backward.labels=validated")
    gone = [*words[:-1], str(tmp_path / "c.json")]
    with pytest.raises(SystemExit):
        cli.main(gone)
    assert "c.json: not there; check the path" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    cli.main(words)
    assert set(results(tmp_path / "run")) == set(results(start))
    before, after = (json.loads((run / "run.json").read_text())["recipe"] for run in (start, tmp_path / "run"))
    steps = [one["forward_backward"]["schedule"]["steps"] for one in (before, after)]
    assert steps == [3, 1] and after["modules"] == before["modules"], "those that the modules were trained by"
    card = (save_pretrained(tmp_path / "run", tmp_path / "hub") / "README.md").read_text()
    assert "and then from labels that were given" in card, "not from tags alone"
    words.pop()
    assert "with another labels" in refused("--resume"), "one file says something else than two put together"


@pytest.mark.parametrize("learns", [False, True])
def test_module_1_labels_without_dropout_after_its_losses(start, images, learns):
    """What `classify` computed in training mode must not become what module 1 infers."""
    network = trainable(start)
    network.classification.head.insert(0, torch.nn.Dropout(0.5))
    network.classification.head.requires_grad_(learns)
    one = sample(network, images)
    phase = Phase(network, [one])
    torch.manual_seed(1)
    ((x_c, _),) = phase.classify()
    network.eval()
    ((expected, _),) = network.infer(1, replace(phase.batch, stem=phase.batch.stem.detach()))
    network.train()
    assert same(phase.infer(1)[0], expected)
    with torch.no_grad():
        network.eval()
        quiet, _ = network.classification(network.classification.features(to_batch(network, [one]))[0])
    assert torch.allclose(x_c, quiet, atol=1e-5) != learns  # a head that learns does drop out in its losses
