"""Backbones from timm against timm's own networks: eight families with random weights."""

from __future__ import annotations

import copy
import json
import logging
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from labelpenet import config
from labelpenet.calibration.excitation import excitation_backprop, layer_without_rule
from labelpenet.data.images import read_image
from labelpenet.data.transforms import Batch
from labelpenet.errors import InputError
from labelpenet.formats.open import open_tagged
from labelpenet.models.attention import roi_attention
from labelpenet.models.backbones import SameConv2d
from labelpenet.models.build import build_backbone
from labelpenet.models.cascade import LabelPEnet
from labelpenet.models.detection import rcnn_loss
from labelpenet.models.segmentation import crop_masks, mask_loss
from labelpenet.models.timm_backbones import Staged

SHARED = Path(__file__).parents[2] / "../shared"
RELU = ["tf_efficientnet_lite0", "mobilenetv2_050", "mobilenetv4_conv_small_050", "resnet10t", "regnetx_002"]
PLAIN = [*RELU, "convnext_atto"]  # no layer looks at the whole map
FAMILIES = [*PLAIN, "mobilenetv3_small_050", "tf_efficientnet_b0"]  # and squeeze-and-excitation


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def network(name: str) -> nn.Module:
    """timm's network with random weights, and batch norms that keep the signal's size and do something beyond."""
    torch.manual_seed(0)
    one = timm.create_model(name, pretrained=False, num_classes=0)
    norms = [layer for layer in one.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over what it sees
        norm.weight.data.uniform_(0.8, 1.2)
        norm.bias.data.normal_(0, 0.1)
    for key, value in one.named_parameters():
        if key.endswith("gamma"):
            nn.init.constant_(value, 0.5)
    with torch.no_grad():
        one.train()(rand(4, 3, 96, 96))
    return one.eval()


@cache
def plug(name: str) -> Staged:
    return Staged(copy.deepcopy(network(name)), f"timm/{name}")


# ------------------------------------------------------------------------------------------------------------ the cut


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_whole_image_it_is_timms(name):
    """Cut, folded and unfolded it computes what it did before, and training moves no statistics."""
    x = rand(2, 3, 64, 96)
    head, features = plug(name).roi_head()
    stem = plug(name).stem.module(x)
    expected = network(name)(x)
    assert stem.shape == (2, plug(name).stem.channels, 4, 6)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in [*plug(name).stem.module.modules(), *head.modules()])
    pooled = stem.clone()
    torch.testing.assert_close(head.train()(pooled), expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)
    assert torch.equal(pooled, stem) and expected.shape == (2, features) and float(expected.std()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_odd_sizes_and_cells(name):
    """A map has ceil(size / 16) cells, and a size between two multiples of 16 is the one above with zeros."""
    x = rand(1, 3, 75, 101)
    stem = plug(name).stem.module(x)
    assert torch.equal(stem, plug(name).stem.module(F.pad(x, (0, 11, 0, 5)))) and stem.shape[2:] == (5, 7)
    tail = plug(name).mask_tail()
    assert tail.module(stem).shape == (1, tail.channels, 5, 7) and tail.stride == plug(name).stem.stride == 16
    fine, late = plug(name).fine, plug(name).late()  # of a feature pyramid
    assert fine.module(x).shape == (1, fine.channels, 10, 14) and fine.stride == 8
    assert late.module(stem).shape in ((1, late.channels, 3, 4), (1, late.channels, 2, 3)) and late.stride == 32
    head, features = plug(name).roi_head(3)
    assert head(rand(2, plug(name).stem.channels, 14, 14)).shape == (2, features) == (2, 9 * plug(name).roi_head()[1])


@pytest.mark.parametrize("name", PLAIN)
def test_the_stride_is_true(name):
    """The cell five further right and three further down looks 80 and 48 pixels further, about where it should."""
    image = rand(1, 3, 240, 304).requires_grad_()
    stem = plug(name).stem.module(image)

    def looks(row: int, column: int) -> Tensor:
        (change,) = torch.autograd.grad(stem[0, :, row, column].square().sum(), image, retain_graph=True)
        weight = change.square().sum((0, 1)) ** 2
        rows, columns = torch.meshgrid(torch.arange(240.0), torch.arange(304.0), indexing="ij")
        return torch.stack([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum() + 0.5

    first, second = looks(6, 7), looks(9, 12)
    torch.testing.assert_close(second - first, torch.tensor([80.0, 48.0]), atol=12, rtol=0)
    assert float((first - torch.tensor([7.5 * 16, 6.5 * 16])).abs().max()) < 16


@pytest.mark.parametrize("name", PLAIN)
def test_the_offset_is_where_a_cell_looks(name):
    """The middle of what moves a cell, weighted by how much, lies beside the cell's own middle by the offset."""
    images = rand(4, 3, 320, 320).requires_grad_()
    stem, places, looks = plug(name).stem.module(images), torch.arange(320) + 0.5, []
    for cell in (7, 10, 13):
        seen = stem[:, :, cell, cell]
        (change,) = torch.autograd.grad((seen * rand(*seen.shape, seed=cell)).sum(), images, retain_graph=True)
        weight = change.abs().sum((0, 1))
        looks += [(weight.sum(axis) * places).sum() / weight.sum() - (cell + 0.5) * 16 for axis in (0, 1)]
    assert plug(name).stem.offset == {"tf_efficientnet_lite0": 7.5, "convnext_atto": 0.0}.get(name, -7.5)
    assert abs(float(torch.stack(looks).mean()) - plug(name).stem.offset) < 2
    # its window of 2 x 2 cells, which no longer halves the map, reaches to the right and below
    beyond = 8 if name == "convnext_atto" else 0
    assert plug(name).mask_tail().offset == plug(name).stem.offset + beyond


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 10), (7, 9)])
@pytest.mark.parametrize("name", PLAIN)
def test_the_mask_tail_is_the_last_stage_at_twice_the_resolution(name, size):
    if name == "convnext_atto" and size[0] % 2:
        pytest.skip("its last stage drops the odd cell")
    one = plug(name)
    x = rand(1, one.stem.channels, *size)
    fine, coarse = one.mask_tail().module(x), one._cut.stages(x)
    # TensorFlow starts at the second cell of an even map
    start = 1 if name.startswith("tf_") and size[0] % 2 == 0 else 0
    torch.testing.assert_close(fine[..., start::2, start::2], coarse, atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("size", [(7, 9), (8, 8), (1, 2)])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 2), (2, 1, 1), (2, 2, 1)])
def test_padding_is_tensorflows(size, kernel, stride, dilation):
    theirs = timm.layers.Conv2dSame(4, 4, kernel, stride, 0, dilation, groups=4)
    ours = SameConv2d.like(theirs, True)
    x = rand(2, 4, *size)
    assert torch.equal(ours(x), theirs(x)) and ours(x).shape[2:] == tuple(-(-side // stride) for side in size)


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("name", RELU)
def test_excitation_reaches_the_roi_through_residual_sums(name):
    """The signal's sum is kept but for what meets no excitation, and lies where the RoI is active."""
    head, features = plug(name).roi_head()
    pooled = rand(2, plug(name).stem.channels, 14, 14).clamp(min=0)
    pooled[..., :4, :] = 0
    got = excitation_backprop(head, pooled, torch.ones(2, features))
    share = got.sum((1, 2, 3)) / features
    assert float(share.min()) > 0.3 and float(share.max()) < 1 + 1e-3
    assert float(got.min()) >= 0 and float(got[..., :4, :].abs().max()) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_attention_works_everywhere(name):
    head, features = plug(name).roi_head()
    classifier = nn.Linear(features, 3)
    classifier.weight.data.abs_()  # evidence for every class
    pooled = rand(3, plug(name).stem.channels, 14, 14)
    maps = roi_attention(head, classifier, pooled, torch.tensor([0, 1, 2]), torch.ones(3), "gradient")
    assert maps.shape == (3, 7, 7) and float(maps.min()) >= 0 and float(maps.sum((1, 2)).min()) > 0


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050", "tf_efficientnet_b0"])
def test_excitation_that_cannot_pass_is_refused_before_anything_is_trained(name):
    assert layer_without_rule(plug(name).roi_head()[0]) is not None
    with pytest.raises(InputError, match=r"attention=gradient") as caught:
        LabelPEnet(plug(name), ("cat", "dog"), config.recipe("paper"))
    assert name in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- training


def small_recipe() -> config.Recipe:
    small = ("mask_width=16", "mask_depth=1", "rois=8", "anchor_sides=32,64", "rpn_post_nms_top_n_test=20")
    return config.override(config.recipe("best"), [f"modules.*.{one}" for one in small])


@pytest.mark.parametrize("pyramid", ["true", "false"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_along_the_gradient_lowers_the_loss_of_modules_1_and_3(name, pyramid):
    torch.manual_seed(0)
    recipe = config.override(small_recipe(), [f"modules.*.pyramid={pyramid}"])
    cascade = LabelPEnet(plug(name), ("cat", "dog"), recipe)
    view = cascade.view((rand(80, 107, 3).abs() * 80).clamp(0, 255).byte().numpy(), side=80)
    # random weights let some signals grow a hundredfold, and softmax with them
    stem, fine = (seen.detach() / seen.std() for seen in cascade.stem_maps(view))
    boxes = torch.tensor([[0.0, 0, 107, 80], [10, 10, 60, 70], [50, 20, 100, 75]])
    batch = Batch([view], stem, tags=[(1,)], proposals=[boxes])
    one, two = cascade.classification, cascade.refinement
    labels, weights = torch.tensor([0, 2, 1]), torch.ones(3)
    masks = torch.zeros(1, 80, 107, dtype=torch.bool)
    masks[:, 12:68, 12:58] = True

    def first_loss() -> Tensor:
        return one.losses(batch)["multi_label"]

    def third_loss() -> Tensor:
        logits, deltas = two.classify(two.head(two.pool(two.tail(stem), [boxes])))
        inside = two.mask_head(two.mask_pool(two.mask_features(stem, fine), [boxes[1:2]]))[:, 1]
        mask = mask_loss(inside, crop_masks(masks, boxes[1:2], torch.zeros(1, dtype=torch.long), 28), weights[:1])
        return sum(rcnn_loss(logits, deltas, labels, rand(3, 4), weights)) + mask

    one.requires_grad_(True)
    for module, loss, left_out in ((one, first_loss, "nothing"), (two, third_loss, "rpn")):
        learning = [
            value for key, value in module.named_parameters() if value.requires_grad and not key.startswith(left_out)
        ]
        before = loss()
        gradients = torch.autograd.grad(before, learning)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        rate = 0.02 * before.detach() / sum(gradient.square().sum() for gradient in gradients)
        with torch.no_grad():
            for value, gradient in zip(learning, gradients, strict=True):
                value -= rate * gradient
        assert 0.95 < float(loss().detach() / before.detach()) < 0.995


def test_a_run_folder_is_read_again_without_weights_of_the_backbone(tmp_path):
    state = timm.create_model("mobilenetv2_050", pretrained=False).state_dict()
    save_file(state, tmp_path / "own.safetensors")
    recipe = small_recipe()
    before = LabelPEnet(build_backbone("timm/mobilenetv2_050", tmp_path / "own.safetensors"), ("cat", "dog"), recipe)
    before.untrained = ("detection", "refinement")
    run = tmp_path / "run"
    (run / "weights").mkdir(parents=True)
    facts = {"classes": ["cat", "dog"], "backbone": before.backbone_name, "recipe": config.to_dict(recipe),
             "normalisation": before.normalisation}  # fmt: skip
    (run / "run.json").write_text(json.dumps(facts))
    for part in ("stem", "classification", "segmentation"):
        state = {key: value.contiguous() for key, value in getattr(before, part).state_dict().items()}
        save_file(state, run / f"weights/{part}.safetensors")
    after = LabelPEnet.from_run(run)
    image = (rand(50, 70, 3).abs() * 80).clamp(0, 255).byte().numpy()
    assert torch.equal(after.batch([image]).stem, before.batch([image]).stem)
    one, other = (cascade.predict(image, 4) for cascade in (before, after))
    assert torch.equal(one.boxes, other.boxes) and after.normalisation == before.normalisation


# ------------------------------------------------------------------------------------------------- names and weights


@pytest.mark.parametrize(
    ("name", "expected"),
    [("timm/tf_eficientnet_lite2", "timm/tf_efficientnet_lite2"), ("timm/", "timm.list_models"),
     ("timm/resnet50.nonsense", "resnet50"), ("timm/vit_tiny_patch16_224", "cannot be cut"),
     ("timm/hrnet_w18_small", "cannot be cut"), ("timm/mambaout_femto", "cannot be cut")],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_line(name, expected):
    with pytest.raises(InputError) as caught:
        build_backbone(name, pretrained=False)
    assert expected in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_network_the_answer_is_weights_and_nothing_else(monkeypatch, caplog):
    def offline(*args, pretrained: bool, **kwargs):
        assert pretrained
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"no route to host.*--weights"):
        build_backbone("timm/resnet18")
    with pytest.raises(InputError, match=r"no pretrained weights.*--weights"):
        build_backbone("timm/efficientnet_l2")
    assert not caplog.records


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors: not the weights of timm/resnet10t.*timm's resnet10t"):
        build_backbone("timm/resnet10t", tmp_path / "other.safetensors")


@pytest.mark.photographs
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
@torch.no_grad()
def test_real_weights_know_cats_from_dogs(name):
    """Stem and RoI head with timm's classifier on top find ImageNet's cats in photographs of cats, and its dogs."""
    weights, photographs = SHARED / f"weights/{name}.safetensors", SHARED / "data/voc-animals"
    if not weights.is_file() or not photographs.is_dir():
        pytest.skip("the shared weights and photographs are not beside the project")
    one = build_backbone(f"timm/{name}", weights)
    assert one.mean == one.std == (0.5, 0.5, 0.5)
    state, (head, _) = load_file(weights), one.roi_head()
    right = []
    images = open_tagged(photographs, "val", ["cat", "dog", "person"]).images
    for tag, group in enumerate((range(281, 286), range(151, 269))):
        for path in [image.path for image in images if image.tags == (tag,)][:6]:
            pixels = torch.from_numpy(np.ascontiguousarray(read_image(path))).permute(2, 0, 1)[None] / 127.5 - 1
            side = min(pixels.shape[2:])
            top, left = (pixels.shape[2] - side) // 2, (pixels.shape[3] - side) // 2
            square = pixels[..., top : top + side, left : left + side]
            square = F.interpolate(square, (256, 256), mode="bilinear", antialias=True)
            logits = F.linear(head(one.stem.module(square)), state["classifier.weight"], state["classifier.bias"])
            right.append(int(logits.argmax()) in group)
    assert len(right) == 12 and sum(right) >= 9
