"""Backbones against torchvision's own networks, and what is said about weights that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vgg import VGG, cfgs, make_layers

from labelpenet.errors import InputError
from labelpenet.models.backbones import VGG16, FullPrecisionConv2d, MobileNetV2, fix_batch_norm, for_training
from labelpenet.models.build import build_backbone

SHARED = Path(__file__).parents[2] / "../shared/weights/mobilenet_v2_imagenet.safetensors"


class SmallVGG(VGG):
    """VGG-16 with fc6 and fc7 of 12 units: a hundredth of the weights, the same convolutions."""

    def __init__(self):
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.features = make_layers(cfgs["D"])
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 49, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 12), nn.ReLU(True), nn.Dropout(),
            nn.Linear(12, 5),
        )  # fmt: skip
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.eval()


@pytest.fixture(scope="module")
def vgg() -> SmallVGG:
    return SmallVGG()


@pytest.fixture(scope="module")
def mobilenet() -> torchvision.models.MobileNetV2:
    """Random weights, and batch norms that do something."""
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            layer.weight.data.uniform_(0.8, 1.2)
            layer.bias.data.normal_(0, 0.1)
    return network


# ------------------------------------------------------------------------------------------------------------- VGG-16


@torch.no_grad()
def test_vgg_on_a_whole_image_is_torchvisions(vgg):
    """Stem, pool4, conv5 without dilation, pool5 and the RoI head are the network itself at 224 x 224."""
    plug = VGG16(vgg)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    stem = plug.stem.module(x)
    pool4 = plug.detection_tail().module(stem)
    pool5 = vgg.features[30](vgg.features[24:30](pool4))
    head, _ = plug.roi_head()
    expected = vgg.classifier[:6](vgg.avgpool(vgg.features(x)).flatten(1))
    torch.testing.assert_close(head.eval()(pool5), expected)
    assert float(expected.abs().max()) > 0


@torch.no_grad()
def test_vgg_strides_and_channels(vgg):
    plug = VGG16(vgg)
    stem = plug.stem.module(torch.randn(1, 3, 64, 80))
    assert stem.shape == (1, plug.stem.channels, 8, 10) and plug.stem.stride == 8
    assert plug.stem.channels == 512
    assert plug.stem.offset == plug.detection_tail().offset == 0  # pooled by 2 x 2
    for part in (plug.region_tail(), plug.mask_tail()):  # no pool4
        assert part.module(stem).shape == (1, part.channels, 8, 10) and part.stride == 8
        assert not any(isinstance(layer, nn.MaxPool2d) for layer in part.module)
        assert [layer.dilation for layer in part.module if isinstance(layer, nn.Conv2d)] == [(2, 2)] * 3
    detection = plug.detection_tail()
    assert detection.module(stem).shape == (1, detection.channels, 4, 5) and detection.stride == 16
    assert torch.equal(detection.module(stem), nn.functional.max_pool2d(stem, 2))
    late = plug.late()
    assert late.module(stem).shape == (1, late.channels, 4, 5) and late.stride == 16
    assert plug.fine.stride == 8 and len(plug.fine.module) == len(plug.stem.module)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_vgg_dilated_conv5_is_conv5_on_every_second_cell(vgg, size):
    """What dilation 2 is for: each of the four interleaved grids is treated as conv5 treats the pooled map."""
    tail = VGG16(vgg).region_tail().module
    x = torch.randn(1, 512, *size, generator=torch.Generator().manual_seed(2))
    conv5 = vgg.features[24:30]
    for row in (0, 1):
        for column in (0, 1):
            torch.testing.assert_close(tail(x)[..., row::2, column::2], conv5(x[..., row::2, column::2]))


def test_vgg_parts_start_equal_and_share_nothing(vgg):
    plug = VGG16(vgg)
    original = vgg.features[24].weight.detach().clone()
    first, second = plug.region_tail().module, plug.region_tail().module
    assert torch.equal(first[0].weight, second[0].weight) and torch.equal(first[0].weight, original)
    heads = [plug.roi_head()[0] for _ in range(2)]
    for one, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
    assert torch.equal(heads[0][1].weight, vgg.classifier[0].weight)
    with torch.no_grad():
        first[0].weight.zero_()
        heads[0][1].weight.zero_()
    assert torch.equal(second[0].weight, original) and torch.equal(vgg.features[24].weight, original)
    assert heads[1][1].weight.any() and vgg.features[24].dilation == (1, 1)
    assert not any(layer.inplace for layer in heads[0] if isinstance(layer, nn.ReLU))


# -------------------------------------------------------------------------------------------------------- MobileNetV2


@torch.no_grad()
def test_mobilenet_on_a_whole_image_is_torchvisions(mobilenet):
    """Also with its batch norms folded into the convolutions."""
    plug = MobileNetV2(copy.deepcopy(mobilenet))
    x = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    head, features = plug.roi_head()
    stem = plug.stem.module(x)
    assert stem.shape == (2, plug.stem.channels, 6, 4)
    assert plug.stem.offset == plug.region_tail().offset == plug.mask_tail().offset == -7.5
    fine, late = plug.fine, plug.late()
    assert (fine.stride, fine.offset, late.stride, late.offset) == (8, -3.5, 32, -15.5)
    torch.testing.assert_close(late.module(stem), mobilenet.features[:18](x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fine.module(x), mobilenet.features[:7](x), atol=1e-4, rtol=1e-4)
    expected = mobilenet.features(x).mean((2, 3))
    torch.testing.assert_close(head(stem), expected, atol=1e-4, rtol=1e-4)
    assert expected.shape == (2, features) and float(expected.std()) > 1e-3


@torch.no_grad()
def test_mobilenet_cells_average_to_the_whole(mobilenet):
    plug = MobileNetV2(copy.deepcopy(mobilenet))
    pooled = torch.rand(3, 96, plug.pool_size, plug.pool_size)
    (one, features), (seven, many) = plug.roi_head(), plug.roi_head(7)
    assert many == 49 * features
    cells = seven(pooled)
    assert cells.shape == (3, many)
    torch.testing.assert_close(cells.reshape(3, features, 49).mean(2), one(pooled), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_mobilenet_mask_tail_is_its_last_stage_at_twice_the_resolution(mobilenet, size):
    plug = MobileNetV2(copy.deepcopy(mobilenet))
    tail = plug.mask_tail()
    x = torch.rand(1, 96, *size, generator=torch.Generator().manual_seed(2))
    fine = tail.module(x)
    assert fine.shape == (1, tail.channels, *size) and tail.stride == plug.stem.stride == 16
    torch.testing.assert_close(fine[..., ::2, ::2], mobilenet.features[14:18](x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "kernel"), [((8, 10), 3), ((7, 9), 3), ((9, 8), 5), ((1, 2), 3)])
def test_a_dilated_convolution_is_the_same_in_training(size, kernel):
    """Outputs and gradients are those of the plain convolution, whatever the parity of the map."""
    plain = nn.Conv2d(6, 6, kernel, padding=kernel - 1, dilation=2, groups=6)
    ours = FullPrecisionConv2d.like(plain)
    x = torch.randn(2, 6, *size, requires_grad=True)
    upstream = torch.randn(2, 6, *size)
    expected, got = plain(x), ours(x)
    torch.testing.assert_close(got, expected)
    for one, other in zip(
        torch.autograd.grad(got, (x, *ours.parameters()), upstream),
        torch.autograd.grad(expected, (x, *plain.parameters()), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "slow"), [(3, 1, 1, False), (3, 2, 1, True), (3, 1, 2, True), (5, 1, 1, True)]
)
def test_depthwise_convolutions_that_bfloat16_trains_slowly_are_trained_in_float32(kernel, stride, dilation, slow):
    """Under autocast their outputs and gradients are those of float32 to the bit."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.Conv2d(8, 8, kernel, stride, dilation * (kernel // 2), dilation, groups=8)
    ours = for_training(plain)
    assert (ours is not None) == slow
    x = torch.randn(3, 8, 7, 9, generator=generator, requires_grad=True)
    expected = (ours or plain)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = (ours or plain)(x)
    assert got.dtype == (torch.float32 if slow else torch.bfloat16)
    if slow:
        upstream = torch.randn(expected.shape, generator=generator)
        for one, other in zip(
            torch.autograd.grad(got, (x, *ours.parameters()), upstream),
            torch.autograd.grad(expected, (x, *ours.parameters()), upstream),
            strict=True,
        ):
            assert torch.equal(one, other)
    assert for_training(nn.Conv2d(8, 8, kernel, stride, dilation * (kernel // 2), dilation)) is None


@torch.no_grad()
def test_folding_leaves_no_batch_norm_that_training_could_move(mobilenet):
    x = torch.rand(2, 3, 64, 64)
    expected = mobilenet.features(x)
    folded = copy.deepcopy(mobilenet)
    fix_batch_norm(folded.eval(), x)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded.train().features(x), expected, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- weights files


def test_weights_come_back_from_either_format(tmp_path, mobilenet):
    state = mobilenet.state_dict()
    save_file(state, tmp_path / "own.safetensors")
    torch.save(state, tmp_path / "own.pt")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = mobilenet.features[:14](x)
        for name in ("own.safetensors", "own.pt"):
            plug = build_backbone("mobilenet_v2", tmp_path / name)
            torch.testing.assert_close(plug.stem.module(x), expected, atol=1e-4, rtol=1e-4)
            assert plug.mean == (0.485, 0.456, 0.406) and plug.std == (0.229, 0.224, 0.225)  # torchvision's


def test_folded_weights_get_their_own_normalisation(tmp_path):
    """Identity batch norms mark weights that were converted from an 8-bit model, which expects [-1, 1]."""
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "folded.pth")
    plug = build_backbone("mobilenet_v2", tmp_path / "folded.pth")
    assert plug.mean == (0.5, 0.5, 0.5) and plug.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("case", ["missing", "folder", "garbage.pt", "garbage.safetensors", "object", "other", "list",
                                  "tensor", "number", "truncated.pt", "truncated.safetensors"])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, case):
    path = tmp_path / (case if "." in case else f"{case}.pt")
    state = torchvision.models.mobilenet_v2().state_dict() if case.startswith("truncated") else {}
    if case == "folder":
        path.mkdir()
    elif case.startswith("garbage"):
        path.write_bytes(b"\x80\x04garbage" * 50)
    elif case == "object":
        torch.save(nn.Linear(2, 2), path)
    elif case == "other":
        torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    elif case in ("list", "tensor", "number"):
        torch.save({"list": [1, 2], "tensor": torch.zeros(3), "number": 3}[case], path)
    elif case == "truncated.pt":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif case == "truncated.safetensors":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError) as caught:
        build_backbone("mobilenet_v2", path)
    message = str(caught.value)
    assert str(path) in message and "mobilenet_v2" in message and "\n" not in message


def test_an_unknown_backbone_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match="vgg16, mobilenet_v2"):
        build_backbone("resnet50", pretrained=False)


@pytest.mark.photographs
@pytest.mark.skipif(not SHARED.is_file(), reason="the shared ImageNet weights are not beside the project")
@torch.no_grad()
def test_the_shared_imagenet_weights_load_as_torchvision_reads_them():
    from safetensors.torch import load_file

    network = torchvision.models.mobilenet_v2().eval()
    network.load_state_dict(load_file(SHARED))
    plug = build_backbone("mobilenet_v2", SHARED)
    assert plug.mean == plug.std == (0.5, 0.5, 0.5)
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    head, _ = plug.roi_head()
    torch.testing.assert_close(head(plug.stem.module(x)), network.features(x).mean((2, 3)), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_the_whole_vgg_has_the_papers_head():
    head, features = build_backbone("vgg16", pretrained=False).roi_head()
    assert features == 4096
    assert [layer.weight.shape for layer in head if isinstance(layer, nn.Linear)] == [(4096, 25088), (4096, 4096)]
