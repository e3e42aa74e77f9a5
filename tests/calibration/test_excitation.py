"""Excitation backprop against dense closed forms written out here, its properties, and the forms of use it promises."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual, mobilenet_v2
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from labelpenet.calibration.excitation import (
    excitation_backprop,
    forward_with_activations,
)

R = 5


def dense_rule(matrix: Tensor, a: Tensor, signal: Tensor) -> Tensor:
    """The formula of the paper for one input vector and one matrix, term by term in plain Python."""
    weight, a = matrix.clamp(min=0), a.clamp(min=0)
    out = torch.zeros_like(a)
    for unit in range(len(weight)):
        contributions = weight[unit] * a
        total = contributions.sum()
        if total > 0:
            out += contributions / total * signal[unit]
    return out


def unrolled(layer: nn.Module, shape: Sequence[int]) -> Tensor:
    """The matrix of a layer that is linear but for its bias, found by feeding it the unit vectors."""
    size = int(torch.tensor(shape).prod())
    with torch.no_grad():
        units = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
        return (layer(units) - layer(torch.zeros_like(units))).flatten(1).T


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).double().eval()
    values = {name: torch.randn(channels) for name in ("weight", "bias", "running_mean")}
    norm.load_state_dict({**norm.state_dict(), **values, "running_var": torch.rand(channels) + 0.5})
    return norm


def check_against_dense(layer: nn.Module, shape: Sequence[int], signed: bool = False) -> None:
    """One layer (or conv and batch norm) against `dense_rule` on its unrolled matrix, float64 and float32."""
    x = torch.randn(R, *shape, dtype=torch.float64)
    x = x if signed else x.relu()
    matrix = unrolled(layer, shape)
    with torch.no_grad():
        top = torch.rand_like(layer(x))
    expected = torch.stack([dense_rule(matrix, a, p) for a, p in zip(x.flatten(1), top.flatten(1), strict=True)])
    got = excitation_backprop([layer], x, top)
    assert got.dtype == torch.float64
    assert got.shape == x.shape
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-10, atol=1e-10)
    single = excitation_backprop([layer.float()], x.float(), top.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double().flatten(1), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class TestClosedForm:
    def test_linear(self) -> None:
        check_against_dense(nn.Linear(23, 11).double(), (23,))

    def test_negative_inputs_do_not_excite(self) -> None:
        check_against_dense(nn.Linear(23, 11).double(), (23,), signed=True)

    @pytest.mark.parametrize(
        "options",
        [
            {"kernel_size": 1},
            {"kernel_size": 3, "padding": 1},
            {"kernel_size": 3, "stride": 2},
            {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
            {"kernel_size": 3, "dilation": 2, "padding": 2},
            {"kernel_size": 3, "padding": 1, "groups": 2},
            {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
            {"kernel_size": 3, "padding": "same", "dilation": 2},
            {"kernel_size": 3, "padding": "valid", "bias": False},
            {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        ],
        ids=str,
    )
    def test_convolution(self, options: dict) -> None:
        check_against_dense(nn.Conv2d(4, 8, **options).double(), (4, 6, 7))

    @pytest.mark.parametrize("groups", [1, 4])
    def test_batch_norm_is_folded_into_the_convolution_before_it(self, groups: int) -> None:
        layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=groups).double(), random_norm(8)).eval()
        check_against_dense(layers, (4, 5, 6))

    def test_frozen_batch_norm_is_the_same_as_one_in_eval_mode(self) -> None:
        norm, frozen = random_norm(6), FrozenBatchNorm2d(6).double()
        frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"})
        convolution = nn.Conv2d(3, 6, 3).double()
        x, top = torch.rand(R, 3, 5, 5).double(), torch.rand(R, 6, 3, 3).double()
        torch.testing.assert_close(
            excitation_backprop([convolution, frozen], x, top), excitation_backprop([convolution, norm], x, top)
        )

    def test_batch_norm_is_folded_into_a_linear_layer(self) -> None:
        linear, norm = nn.Linear(7, 5).double(), nn.BatchNorm1d(5).double().eval()
        with torch.no_grad():
            norm.weight.normal_()
        check_against_dense(nn.Sequential(linear, norm).eval(), (7,))

    def test_batch_norm_on_its_own(self) -> None:
        check_against_dense(random_norm(6), (6, 3, 4), signed=True)

    def test_shifting_batch_norm_passes_the_signal_of_active_inputs_on(self) -> None:
        norm = nn.BatchNorm2d(3).eval()
        nn.init.constant_(norm.bias, 0.7)
        x, top = torch.rand(R, 3, 4, 4) + 0.1, torch.rand(R, 3, 4, 4)
        torch.testing.assert_close(excitation_backprop([norm], x, top), top)

    @pytest.mark.parametrize(
        "layer",
        [
            nn.AvgPool2d(2),
            nn.AvgPool2d(3, stride=2, padding=1),
            nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False, ceil_mode=True),
            nn.AdaptiveAvgPool2d(1),
            nn.AdaptiveAvgPool2d((3, 4)),
        ],
        ids=str,
    )
    def test_average_pooling(self, layer: nn.Module) -> None:
        check_against_dense(layer, (3, 6, 7))

    @pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.MaxPool2d(3, stride=2, padding=1)], ids=str)
    def test_max_pooling_gives_all_to_the_largest_entry(self, layer: nn.MaxPool2d) -> None:
        x = torch.rand(R, 3, 6, 8, dtype=torch.float64)
        top = torch.rand_like(layer(x))
        _, where = nn.functional.max_pool2d(x, layer.kernel_size, layer.stride, layer.padding, return_indices=True)
        expected = torch.zeros(R, 3, 48, dtype=torch.float64)
        expected.scatter_add_(2, where.flatten(2), top.flatten(2))
        torch.testing.assert_close(excitation_backprop([layer], x, top).flatten(2), expected)

    @pytest.mark.parametrize(
        "layer", [nn.ReLU(), nn.ReLU6(), nn.Dropout(0.9), nn.Dropout2d(0.9), nn.Identity()], ids=str
    )
    def test_passing_layers_change_nothing(self, layer: nn.Module) -> None:
        x, top = 10 * torch.randn(R, 3, 4, 4), torch.rand(R, 3, 4, 4)
        assert torch.equal(excitation_backprop([layer], x, top), top)

    def test_flatten_gives_the_signal_its_shape_back(self) -> None:
        x, top = torch.rand(R, 3, 4, 2), torch.rand(R, 24)
        assert torch.equal(excitation_backprop([nn.Flatten()], x, top), top.reshape(R, 3, 4, 2))

    def test_chain_is_the_rule_layer_by_layer(self) -> None:
        first, second, third = nn.Linear(18, 12).double(), nn.Linear(12, 9).double(), nn.Linear(9, 4).double()
        x = torch.rand(R, 2, 3, 3, dtype=torch.float64)
        with torch.no_grad():
            a1 = first(x.flatten(1)).relu()
            a2 = second(a1).relu()
        top = torch.eye(4, dtype=torch.float64)[torch.tensor([0, 3, 1, 1, 2])]
        expected = []
        for r in range(R):
            p = dense_rule(third.weight.detach(), a2[r], top[r])
            p = dense_rule(second.weight.detach(), a1[r], p)
            expected.append(dense_rule(first.weight.detach(), x[r].flatten(), p).reshape(2, 3, 3))
        layers = [nn.Flatten(), first, nn.ReLU(), nn.Dropout().eval(), second, nn.ReLU(inplace=True), third]
        torch.testing.assert_close(excitation_backprop(layers, x, top), torch.stack(expected), rtol=1e-10, atol=1e-10)


class TestResidual:
    def test_split_in_the_ratio_of_the_positive_contributions(self) -> None:
        block = InvertedResidual(4, 4, 1, expand_ratio=2).double().eval()
        x = torch.randn(R, 4, 5, 5, dtype=torch.float64)
        top = torch.rand_like(x)
        with torch.no_grad():
            straight, branch = x.relu(), block.conv(x).relu()
        total = straight + branch
        share = torch.where(total > 0, straight / total, 0.0)
        other = torch.where(total > 0, branch / total, 0.0)
        expected = share * top + excitation_backprop([block.conv], x, other * top)
        torch.testing.assert_close(excitation_backprop([block], x, top), expected, rtol=1e-10, atol=1e-12)

    def test_block_without_a_shortcut_is_its_branch(self) -> None:
        block = InvertedResidual(4, 6, 2, expand_ratio=2).eval()
        x = torch.rand(R, 4, 6, 6)
        top = torch.rand(R, 6, 3, 3)
        assert torch.equal(excitation_backprop([block], x, top), excitation_backprop(block.conv, x, top))

    def test_conservation_where_both_branches_are_active(self) -> None:
        block = InvertedResidual(4, 4, 1, expand_ratio=2).double().eval()
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.uniform_(module.weight, 0.1, 1)
        x, top = torch.rand(R, 4, 5, 5).double() + 0.1, torch.rand(R, 4, 5, 5).double()
        got = excitation_backprop([block], x, top)
        torch.testing.assert_close(got.sum((1, 2, 3)), top.sum((1, 2, 3)))


def head(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small network with every kind of layer that MobileNetV2 and VGG-16 hold."""
    return (
        nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU6(inplace=True),
            InvertedResidual(8, 8, 1, expand_ratio=2),
            InvertedResidual(8, 12, 2, expand_ratio=2),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(48, 10),
            nn.ReLU(inplace=True),
            nn.Linear(10, 3),
        )
        .to(dtype)
        .eval()
    )


class TestProperties:
    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 2**20),
        sizes=st.lists(st.integers(1, 12), min_size=2, max_size=5),
        proposals=st.integers(1, 6),
        scale=st.floats(1e-6, 1e6),
    )
    def test_the_sum_is_kept_where_some_excitatory_input_is_active(
        self, seed: int, sizes: list[int], proposals: int, scale: float
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(sizes):
            linear = nn.Linear(size_in, size_out).double()
            with torch.no_grad():
                linear.weight.copy_(torch.randn(size_out, size_in, generator=generator))
                linear.weight[:, 0] = linear.weight[:, 0].abs() + 0.1
                linear.bias.fill_(0.5)
            layers += [linear, nn.ReLU()]
        x = scale * (torch.rand(proposals, sizes[0], generator=generator, dtype=torch.float64) + 0.01)
        with torch.no_grad():
            # The first unit of each layer excites every unit of the next: nothing can be lost while it is active.
            reached = all(bool((nn.Sequential(*layers[:i])(x)[:, 0] > 0).all()) for i in range(0, len(layers), 2))
        top = torch.rand(proposals, sizes[-1], generator=generator, dtype=torch.float64)
        got = excitation_backprop(layers, x, top)
        assert bool((got >= 0).all())
        if reached:
            torch.testing.assert_close(got.sum(1), top.sum(1))
        else:
            assert bool((got.sum(1) <= top.sum(1) * (1 + 1e-9)).all())

    def test_never_negative_and_never_more_than_the_signal(self) -> None:
        x = torch.randn(R, 4, 8, 8, dtype=torch.float64).relu()
        top = torch.rand(R, 3, dtype=torch.float64)
        got = excitation_backprop(head(), x, top)
        assert bool((got >= 0).all())
        assert bool((got[x == 0] == 0).all())
        assert bool((got.sum((1, 2, 3)) <= top.sum(1) * (1 + 1e-9)).all())

    def test_proposals_do_not_touch_one_another(self) -> None:
        x = torch.rand(R, 4, 8, 8, dtype=torch.float64)
        top = torch.rand(R, 3, dtype=torch.float64)
        layers = head()
        together = excitation_backprop(layers, x, top)
        alone = torch.cat([excitation_backprop(layers, x[r : r + 1], top[r : r + 1]) for r in range(R)])
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)

    def test_linear_in_the_signal(self) -> None:
        x, one, two = torch.rand(R, 4, 8, 8).double(), torch.rand(R, 3).double(), torch.rand(R, 3).double()
        layers = head()
        torch.testing.assert_close(
            excitation_backprop(layers, x, 2 * one + two),
            2 * excitation_backprop(layers, x, one) + excitation_backprop(layers, x, two),
        )

    def test_single_precision_stays_within_a_hundred_thousandth(self) -> None:
        layers, x, top = head(), torch.rand(R, 4, 8, 8).double(), torch.rand(R, 3).double()
        exact = excitation_backprop(layers, x, top)
        single = excitation_backprop(layers.float(), x.float(), top.float()).double()
        assert float((single - exact).abs().max()) <= 1e-5 * float(exact.max())

    def test_mobilenet_head_keeps_most_of_the_signal(self) -> None:
        network = mobilenet_v2().eval()
        layers = [network.features[16:], nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.classifier]
        x = torch.rand(2, 160, 5, 5)
        top = torch.zeros(2, 1000)
        top[:, 7] = 1
        with torch.no_grad():
            y, activations = forward_with_activations(layers, x)
            pooled = network.features[16:](x).mean((2, 3))
            torch.testing.assert_close(y, network.classifier(pooled))
        got = excitation_backprop(layers, x, top, activations)
        assert got.shape == x.shape
        assert bool((got >= 0).all())
        assert bool((got.sum((1, 2, 3)) > 0.5).all())


class TestActivations:
    def test_reusing_them_changes_nothing(self) -> None:
        layers, x, top = head(), torch.rand(R, 4, 8, 8).double(), torch.rand(R, 3).double()
        y, activations = forward_with_activations(layers, x)
        assert torch.equal(y, layers(x))
        assert torch.equal(excitation_backprop(layers, x, top, activations), excitation_backprop(layers, x, top))
        assert len(activations) == len(forward_with_activations(layers, x)[1])  # not used up

    def test_no_layer_runs_twice(self) -> None:
        calls: list[str] = []
        layers = head()
        for name, module in layers.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(lambda *_, name=name: calls.append(name))
        x, top = torch.rand(R, 4, 8, 8).double(), torch.rand(R, 3).double()
        _, activations = forward_with_activations(layers, x)
        ran = list(calls)
        assert len(ran) == len(set(ran))
        excitation_backprop(layers, x, top, activations)
        assert calls == ran

    def test_the_output_of_the_last_layer_is_not_computed(self) -> None:
        calls: list[str] = []
        layers = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU())
        layers[2].register_forward_hook(lambda *_: calls.append("last"))
        excitation_backprop(layers, torch.rand(R, 4), torch.rand(R, 2))
        assert not calls

    def test_some_of_the_proposals(self) -> None:
        layers, x, top = head(), torch.rand(R, 4, 8, 8).double(), torch.rand(R, 3).double()
        _, activations = forward_with_activations(layers, x)
        keep = torch.tensor([3, 1])
        some = excitation_backprop(layers, x[keep], top[keep], [a[keep] for a in activations])
        torch.testing.assert_close(some, excitation_backprop(layers, x, top)[keep])

    def test_training_step_can_be_reused(self) -> None:
        layers, x = head(torch.float32), torch.rand(R, 4, 8, 8)
        y, activations = forward_with_activations(layers, x)
        got = excitation_backprop(layers, x, torch.rand(R, 3), activations)
        assert not got.requires_grad
        y.sum().backward()
        assert layers[0].weight.grad is not None

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_any_grad_mode(self, mode) -> None:
        layers, x, top = head(), torch.rand(R, 4, 8, 8).double(), torch.rand(R, 3).double()
        expected = excitation_backprop(layers, x, top)
        with mode():
            made_inside = x.clone()
            _, activations = forward_with_activations(layers, made_inside)
            assert torch.equal(excitation_backprop(layers, made_inside, top, activations), expected)
            assert torch.equal(excitation_backprop(layers, made_inside, top), expected)

    def test_half_precision_activations_are_raised_to_single(self) -> None:
        layers, x, top = head(torch.float32), torch.rand(R, 4, 8, 8), torch.rand(R, 3)
        exact = excitation_backprop(layers, x, top)
        with torch.autocast("cpu", torch.bfloat16):
            _, activations = forward_with_activations(layers, x)
            got = excitation_backprop(layers, x, top, activations)
        assert got.dtype == torch.float32
        assert float((got - exact).abs().sum()) < 0.2 * float(exact.sum())

    @pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: [*a, a[-1]]])
    def test_those_of_other_layers_are_refused(self, change) -> None:
        layers, x, top = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.rand(R, 3), torch.rand(R, 3)
        _, activations = forward_with_activations(layers, x)
        with pytest.raises(ValueError, match="activations"):
            excitation_backprop(layers, x, top, change(activations))


class TestDegenerate:
    def test_no_proposal(self) -> None:
        got = excitation_backprop(head(), torch.zeros(0, 4, 8, 8).double(), torch.zeros(0, 3).double())
        assert got.shape == (0, 4, 8, 8)

    def test_all_zero_activations_give_zero(self) -> None:
        x = torch.zeros(R, 4, 8, 8).double()
        assert torch.equal(excitation_backprop(head(), x, torch.ones(R, 3).double()), x)

    def test_no_positive_weight_gives_zero(self) -> None:
        linear = nn.Linear(4, 3)
        nn.init.constant_(linear.weight, -1)
        assert torch.equal(excitation_backprop([linear], torch.rand(R, 4), torch.rand(R, 3)), torch.zeros(R, 4))

    @pytest.mark.parametrize("tiny", [1e-20, 1e-38, 1e-44])
    def test_tiny_activations_do_not_overflow(self, tiny: float) -> None:
        linear = nn.Linear(4, 3)
        got = excitation_backprop([linear], torch.full((R, 4), tiny), torch.rand(R, 3))
        assert bool(torch.isfinite(got).all()) and bool((got >= 0).all())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_stays_in_its_proposal_and_stays_visible(self, bad: float) -> None:
        layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        for weight in (parameter for parameter in layers.parameters() if parameter.ndim == 2):
            nn.init.uniform_(weight, 0.1, 1)
        x, top = torch.rand(R, 6).double(), torch.rand(R, 3).double()
        expected = excitation_backprop(layers, x, top)
        x[2, 1] = bad
        got = excitation_backprop(layers, x, top)
        others = torch.tensor([0, 1, 3, 4])
        assert bool(got[2].isnan().any())
        torch.testing.assert_close(got[others], expected[others])

    def test_nan_in_the_signal_stays_visible(self) -> None:
        top = torch.rand(R, 3)
        top[1, 0] = float("nan")
        got = excitation_backprop([nn.Linear(6, 3)], torch.rand(R, 6), top)
        assert got.isnan().any(1).tolist() == [False, True, False, False, False]


class TestErrors:
    @pytest.mark.parametrize("layer", [nn.SiLU(), nn.GroupNorm(1, 4), MultiScaleRoIAlign(["0"], 7, 2)], ids=str)
    def test_layer_without_a_rule_is_named(self, layer: nn.Module) -> None:
        with pytest.raises(TypeError, match=rf"{type(layer).__name__}.*Conv2d.*Linear.*ReLU"):
            excitation_backprop([nn.Identity(), nn.Sequential(layer)], torch.rand(R, 4), torch.rand(R, 4))

    def test_sequential_with_a_forward_of_its_own_is_refused(self) -> None:
        class Odd(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + 1

        with pytest.raises(TypeError, match="Odd"):
            excitation_backprop(Odd(nn.Linear(4, 4)), torch.rand(R, 4), torch.rand(R, 4))

    def test_batch_norm_in_training_mode_is_refused(self) -> None:
        with pytest.raises(ValueError, match="eval"):
            excitation_backprop([nn.BatchNorm2d(3)], torch.rand(R, 3, 2, 2), torch.rand(R, 3, 2, 2))

    @pytest.mark.parametrize("shape", [(R, 4), (3, R), (R + 1, 3)])
    def test_signal_of_the_wrong_shape(self, shape: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="signal"):
            excitation_backprop([nn.Linear(6, 3)], torch.rand(R, 6), torch.rand(shape))
