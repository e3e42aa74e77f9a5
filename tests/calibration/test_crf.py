"""The dense CRF against pydensecrf's marginals, against all pairs of pixels, and its behaviour at the edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from labelpenet.calibration import crf as module
from labelpenet.calibration.crf import DenseCRF, dense_crf
from labelpenet.errors import InputError

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("crf_*.npz"))
PHOTOGRAPHS = Path(__file__).parents[2] / "../shared/data/voc-animals/VOCdevkit/VOC2012/JPEGImages"


def example(
    labels: int = 2, height: int = 9, width: int = 11, instances: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A noise image (H, W, 3) uint8 and float32 probabilities (K, H, W), or (M, K, H, W)."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    shape = (labels, height, width) if instances is None else (instances, labels, height, width)
    p = rng.random(shape).astype(np.float32) + 0.05
    return image, p / p.sum(-3, keepdims=True)


# --- pydensecrf -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_equals_stored_pydensecrf_marginals(path: Path) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    image, p, expected = (arrays.pop(name) for name in ("image", "probabilities", "marginals"))
    parameters: dict[str, Any] = {name: value if value.ndim else value.item() for name, value in arrays.items()}
    got = dense_crf(image, p.astype(np.float32), **parameters)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_there_are_fixtures() -> None:
    assert len(FIXTURES) == 7


@pytest.mark.photographs
@pytest.mark.parametrize("index", [0, 7])
def test_equals_pydensecrf_on_a_photograph(index: int) -> None:
    pytest.importorskip("pydensecrf")
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("the photographs are not there")
    from tests.calibration.make_crf_fixtures import DEFAULTS, marginals

    with Image.open(sorted(PHOTOGRAPHS.glob("2007_*.jpg"))[index]) as photograph:
        image = np.array(photograph.convert("RGB"))
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    object_ = 0.02 + 0.9 * np.exp(-((x / image.shape[1] - 0.5) ** 2 + (y / image.shape[0] - 0.6) ** 2) / 0.1)
    p = np.stack([1 - object_, object_]).astype(np.float32)
    np.testing.assert_allclose(dense_crf(image, p), marginals(image, p, DEFAULTS), rtol=0, atol=1e-4)


# --- all pairs of pixels ----------------------------------------------------------------------------------------------


def gaussian_matrix(features: np.ndarray) -> np.ndarray:
    """(N, N) symmetrically normalised Gaussian weights of (N, D) features, every pair by itself (float64)."""
    distances = ((features[:, None] - features[None]) ** 2).sum(-1)
    weights = np.exp(-distances / 2)
    norm = 1 / np.sqrt(weights.sum(1))
    return norm[:, None] * weights * norm


def positions(image: np.ndarray) -> np.ndarray:
    """(N, 2) x and y of each pixel."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.stack([x.ravel(), y.ravel()], 1).astype(float)


def bilateral(image: np.ndarray, sxy: float, srgb: float) -> np.ndarray:
    """(N, 5) features of the appearance kernel."""
    return np.concatenate([positions(image) / sxy, image.reshape(-1, 3) / srgb], 1)


def all_pairs(image: np.ndarray, sxy_gaussian: float, sxy_bilateral: float, srgb: float) -> list[np.ndarray]:
    """The two kernels (N, N) of an image."""
    return [gaussian_matrix(positions(image) / sxy_gaussian), gaussian_matrix(bilateral(image, sxy_bilateral, srgb))]


def mean_field(p: np.ndarray, kernels: list[np.ndarray], costs: list[np.ndarray], iterations: int) -> np.ndarray:
    """(K, H, W) marginals with dense kernels (N, N) and label costs (K, K), as the formula reads (float64)."""
    unary = -np.log(np.clip(p.reshape(len(p), -1).astype(float), 1e-5, 1))

    def softmax(energy: np.ndarray) -> np.ndarray:
        shares = np.exp(energy.min(0) - energy)
        return shares / shares.sum(0)

    q = softmax(unary)
    for _ in range(iterations):
        q = softmax(unary + sum(cost @ q @ kernel for kernel, cost in zip(kernels, costs, strict=True)))
    return q.reshape(p.shape)


def lattice_matrices(image: np.ndarray, *widths: float) -> list[np.ndarray]:
    """The two filters of a `DenseCRF` as (N, N) matrices: their answers to each pixel alone."""
    n = image.shape[0] * image.shape[1]
    answers = []
    for kernel, _ in DenseCRF(image, widths[0], 1, widths[1], widths[2], 1)._kernels:
        answer = torch.zeros(n, n, 1)
        kernel.add_message(answer, torch.eye(n)[:, :, None].contiguous(), 1.0)
        answers.append(answer[:, :, 0].double().numpy())
    return answers


@pytest.mark.parametrize("labels", [2, 4])
def test_mean_field_follows_the_formula(labels: int) -> None:
    """With the lattice's own filters put into the formula, marginals are equal: Potts, and any costs."""
    image, p = example(labels)
    widths = (3.0, 20.0, 60.0)
    costs = np.random.default_rng(1).normal(size=(labels, labels)).astype(np.float32)
    filters = [matrix.T for matrix in lattice_matrices(image, *widths)]
    expected = mean_field(p, filters, [-2 * np.eye(labels), (costs + costs.T) / 2], 4)
    got = dense_crf(image, p, 4, widths[0], 2, widths[1], widths[2], costs)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_within_the_lattice_error_of_all_pairs(seed: int) -> None:
    """Marginals are as close to those over all pairs of pixels as the filters' own error allows.

    With two labels a mean field step is d -> tanh(u + sum of w/2 * filter(d)), d in [-1, 1]. If the row sums of the
    filters are at most r, it contracts by rho = r * sum(w) / 2 < 1; a filter error of e (maximal row sum of the
    difference) moves its argument by at most e * w / 2, hence the fixed point by the sum of these over 1 - rho, and a
    marginal by half that.
    """
    image, p = example(seed=seed)
    image = (image // 4 + 90).astype(np.uint8)
    p[1] = 0.6 * p[1] + np.linspace(0, 0.4, 11, dtype=np.float32)
    p[0] = 1 - p[1]
    widths, weights = (3.0, 20.0, 60.0), (0.5, 0.8)
    exact, lattice = all_pairs(image, *widths), lattice_matrices(image, *widths)
    errors = [abs(a - b).sum(1).max() for a, b in zip(exact, lattice, strict=True)]
    assert max(errors) < 0.2
    rho = sum(weights) / 2 * max(matrix.sum(1).max() for matrix in exact)
    bound = sum(weight * error for weight, error in zip(weights, errors, strict=True)) / 2 / (1 - rho) / 2
    expected = mean_field(p, exact, [-weight * np.eye(2) for weight in weights], 30)
    got = dense_crf(image, p, 30, widths[0], weights[0], widths[1], widths[2], weights[1])
    assert abs(got - expected).max() <= bound + 1e-6
    assert abs(got - expected).max() < abs(p - expected).max() / 5


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 12), width=st.integers(1, 12), labels=st.integers(2, 5), instances=st.integers(0, 3),
    iterations=st.integers(0, 6), seed=st.integers(0, 99),
)  # fmt: skip
def test_marginals_of_any_size(
    height: int, width: int, labels: int, instances: int, iterations: int, seed: int
) -> None:
    image, p = example(labels, height, width, instances, seed)
    got = DenseCRF(image)(p, iterations)
    assert got.shape == p.shape and got.dtype == np.float32
    assert np.isfinite(got).all() and (got >= 0).all() and (got <= 1).all()
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("labels", [2, 3])
def test_instances_do_not_influence_each_other(labels: int) -> None:
    image, p = example(labels, 20, 30, instances=4)
    crf = DenseCRF(image)
    together = crf(p)
    for one, alone in zip(together, p, strict=True):
        np.testing.assert_allclose(one, crf(alone), atol=1e-5)
        np.testing.assert_allclose(one, dense_crf(image, alone), atol=1e-5)


def test_more_instances_than_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    image, p = example(3, 8, 7, instances=5)
    expected = DenseCRF(image)(p)
    monkeypatch.setattr(module, "MAX_VALUES", 2 * 2 * 8 * 7)
    np.testing.assert_allclose(DenseCRF(image)(p), expected, atol=1e-5)
    monkeypatch.setattr(module, "MAX_VALUES", 1)
    np.testing.assert_allclose(DenseCRF(image)(p), expected, atol=1e-5)


@pytest.mark.parametrize("labels", [2, 4])
def test_order_of_labels_does_not_matter(labels: int) -> None:
    image, p = example(labels)
    order = np.roll(np.arange(labels), 1)
    np.testing.assert_allclose(dense_crf(image, p[order]), dense_crf(image, p)[order], atol=1e-4)


@pytest.mark.parametrize("labels", [2, 4])
def test_potts_number_equals_its_matrix(labels: int) -> None:
    """A cost of 3 where labels differ, or of -3 where they agree, up to what the filters lack of keeping a constant."""
    image, p = example(labels)
    expected = dense_crf(image, p, compat_gaussian=3, compat_bilateral=10)
    agree = np.eye(labels, dtype=np.float32)
    got = dense_crf(image, p, compat_gaussian=-3 * agree, compat_bilateral=torch.tensor(-10 * agree))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    got = dense_crf(image, p, compat_gaussian=3 * (1 - agree), compat_bilateral=10 * (1 - agree))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_no_iterations_and_no_weight_return_the_clipped_probabilities() -> None:
    image, p = example(3)
    p[:, 0, 0] = (0, 0, 1)
    clipped = np.clip(p, 1e-5, 1)
    expected = clipped / clipped.sum(0)
    np.testing.assert_allclose(dense_crf(image, p, iterations=0), expected, atol=1e-6)
    np.testing.assert_allclose(dense_crf(image, p, compat_gaussian=0, compat_bilateral=0), expected, atol=1e-6)


def test_undecided_pixels_stay_undecided() -> None:
    image, p = example(4)
    np.testing.assert_allclose(dense_crf(image, np.full_like(p, 0.25)), 0.25, atol=1e-5)


def test_cleans_a_noisy_mask_up_to_the_edge_of_the_object() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((40, 50), bool)
    mask[10:30, 15:40] = True
    image = np.where(mask[..., None], (200, 60, 40), (40, 90, 160)) + rng.normal(0, 5, (40, 50, 3))
    seen = np.clip(np.where(mask, 0.6, 0.4) + rng.normal(0, 0.2, mask.shape), 0.02, 0.98).astype(np.float32)
    assert ((seen > 0.5) != mask).mean() > 0.2
    got = dense_crf(image.clip(0, 255).astype(np.uint8), np.stack([1 - seen, seen]))
    assert ((got[1] > 0.5) != mask).mean() < 0.005


def test_keys_of_64_bits_give_what_keys_of_32_bits_give() -> None:
    """A last row of another colour stretches the range of the keys beyond 32 bits; the other pixels cannot feel it."""
    image, p = example(2, 12, 12)
    image = image // 8
    more = np.concatenate([image, np.full((1, 12, 3), 255, np.uint8)])
    q = np.concatenate([p, np.full((2, 1, 12), 0.5, np.float32)], 1)
    types = [module._simplices(torch.tensor(bilateral(i, 3.0, 0.2).T).float())[0].dtype for i in (image, more)]
    assert types == [torch.int32, torch.int64]
    narrow: dict[str, Any] = {"compat_gaussian": 0, "sxy_bilateral": 3.0, "srgb": 0.2}
    np.testing.assert_allclose(dense_crf(more, q, **narrow)[:, :12], dense_crf(image, p, **narrow), atol=1e-5)


# --- arrays, tensors, devices -----------------------------------------------------------------------------------------


def test_tensor_in_tensor_out() -> None:
    image, p = example()
    expected = dense_crf(image, p)
    got = dense_crf(torch.from_numpy(image), torch.from_numpy(p))
    assert isinstance(got, Tensor) and got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), expected)
    assert isinstance(dense_crf(image, torch.from_numpy(p)), Tensor)
    assert isinstance(dense_crf(torch.from_numpy(image), p), np.ndarray)


def test_any_memory_layout_and_type_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    image, p = example()
    expected = dense_crf(image, p)
    image.setflags(write=False)
    p.setflags(write=False)
    np.testing.assert_array_equal(dense_crf(image, p), expected)
    flipped = dense_crf(image[::-1, ::-1][::-1, ::-1], p[:, ::-1][:, ::-1])
    np.testing.assert_array_equal(flipped, expected)
    columns = np.asfortranarray(p)
    np.testing.assert_array_equal(dense_crf(np.asfortranarray(image), columns), expected)
    np.testing.assert_allclose(dense_crf(image, p.astype(np.float64)), expected, atol=1e-4)
    np.testing.assert_allclose(dense_crf(image, p.astype(np.float16)), expected, atol=0.05)
    channels_last = torch.tensor(p).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    np.testing.assert_array_equal(dense_crf(torch.tensor(image), channels_last).numpy(), expected)
    assert not [warning.message for warning in recwarn]


def test_input_is_left_alone() -> None:
    image, p = example(2, instances=2)
    tensors = torch.tensor(image), torch.tensor(p)
    DenseCRF(tensors[0])(tensors[1])
    assert torch.equal(tensors[0], torch.tensor(image)) and torch.equal(tensors[1], torch.tensor(p))


def test_inside_training_code() -> None:
    """Gradients, autocast and inference mode around it change nothing."""
    image, p = example()
    expected = dense_crf(image, p)
    tensor = torch.tensor(p, requires_grad=True)
    got = dense_crf(image, tensor)
    assert not got.requires_grad
    np.testing.assert_array_equal(got.numpy(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(dense_crf(image, p), expected)
    with torch.inference_mode():
        crf = DenseCRF(image)
    np.testing.assert_array_equal(crf(p), expected)


def test_images_of_one_size_share_a_kernel_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what each gives alone, also where the shared kernel was made in inference mode."""
    examples = [example(seed=seed) for seed in (0, 1)] + [example(3, 11, 9)]
    alone = []
    for image, p in examples:
        module._smoothness.cache_clear()
        alone.append(dense_crf(image, p))
    module._smoothness.cache_clear()
    with torch.inference_mode():
        dense_crf(*example(seed=2))
    for (image, p), expected in zip(examples, alone, strict=True):
        np.testing.assert_array_equal(dense_crf(image, p), expected)
        np.testing.assert_array_equal(dense_crf(image, p, sxy_gaussian=5), dense_crf(image, p, sxy_gaussian=5.0))
    assert not np.array_equal(dense_crf(image, p, sxy_gaussian=5), expected)
    before = module._smoothness.cache_info().currsize
    monkeypatch.setattr(module, "MAX_KEPT", 8)
    np.testing.assert_array_equal(dense_crf(image, p, sxy_gaussian=7), dense_crf(image, p, sxy_gaussian=7))
    assert module._smoothness.cache_info().currsize == before  # of a large image nothing is kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("labels", [2, 4])
def test_gpu_equals_cpu(labels: int) -> None:
    image, p = example(labels, 60, 80, instances=3)
    got = DenseCRF(torch.tensor(image, device="cuda"))(torch.tensor(p, device="cuda"))
    assert got.is_cuda
    np.testing.assert_allclose(got.cpu().numpy(), DenseCRF(image)(p), atol=1e-4)


# --- degenerate and wrong input ---------------------------------------------------------------------------------------


def test_a_single_pixel() -> None:
    """Nothing but itself: each filter's answer is the pixel's own marginal."""
    p = np.array([0.3, 0.7], np.float32).reshape(2, 1, 1)
    got = dense_crf(np.zeros((1, 1, 3), np.uint8), p, iterations=1, compat_gaussian=3, compat_bilateral=10)
    logit = np.log(0.7 / 0.3) + 13 * 0.4
    np.testing.assert_allclose(got[1, 0, 0], 1 / (1 + np.exp(-logit)), atol=1e-5)


@pytest.mark.parametrize("colour", [0, 255])
def test_one_colour(colour: int) -> None:
    """The appearance kernel is then as wide as the image: the majority wins everywhere."""
    _, p = example(2, 30, 20)
    p[1] = 0.4 + 0.3 * p[1]
    p[0] = 1 - p[1]
    got = dense_crf(np.full((30, 20, 3), colour, np.uint8), p)
    assert (got[1] > 0.99).all()


def test_no_instance() -> None:
    image, _ = example()
    assert DenseCRF(image)(np.zeros((0, 2, 9, 11), np.float32)).shape == (0, 2, 9, 11)


def test_certain_probabilities() -> None:
    """0 and 1 are clipped, so that nothing is infinite."""
    image, p = example()
    got = dense_crf(image, (p > 0.5).astype(np.float32))
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 9), r"must be \(K, H, W\), but got \(2, 9\)"),
        ((1, 2, 9, 11), r"must be \(K, H, W\), but got \(1, 2, 9, 11\)"),
        ((2, 11, 9), r"H = 9 and W = 11, but got \(2, 11, 9\)"),
        ((1, 9, 11), r"K >= 2.* but got \(1, 9, 11\)"),
    ],
)
def test_wrong_shapes(shape: tuple[int, ...], message: str) -> None:
    image, _ = example()
    with pytest.raises(ValueError, match=f"probabilities .*{message}"):
        dense_crf(image, np.full(shape, 0.5, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 7.0])
def test_values_that_are_no_probabilities(value: float) -> None:
    image, p = example()
    p[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\]"):
        dense_crf(image, p)


def test_rounding_above_one_is_no_error() -> None:
    image, p = example()
    p[:, 0, 0] = (1 + 1e-6, -1e-6)
    assert np.isfinite(dense_crf(image, p)).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((9, 11), np.uint8),
        np.zeros((3, 9, 11), np.uint8),
        np.zeros((9, 11, 4), np.uint8),
        np.zeros((9, 11, 3), np.float32),
        np.zeros((0, 11, 3), np.uint8),
    ],
)
def test_wrong_images(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\) uint8, but got \("):
        DenseCRF(image)


@pytest.mark.parametrize("name", ["sxy_gaussian", "sxy_bilateral", "srgb"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_widths(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        DenseCRF(example()[0], **{name: value})


@pytest.mark.parametrize("widths", [{"srgb": 1e-4}, {"sxy_bilateral": 1e-6}, {"sxy_gaussian": 1e-9}, {"srgb": 1e-44}])
def test_kernels_too_narrow_for_float32(widths: dict[str, float]) -> None:
    with pytest.raises(InputError, match="too narrow for this image; widen"):
        DenseCRF(example()[0], **widths)


def test_bright_colours_in_a_narrow_kernel() -> None:
    """Keys count from the lowest coordinate, so that a narrow range far from 0 does not overflow them."""
    _, p = example(2, 6, 6)
    dark, bright = (np.full((6, 6, 3), colour, np.uint8) for colour in (0, 255))
    dark[2:4], bright[2:4] = 1, 254
    expected = dense_crf(dark, p, srgb=0.005)
    np.testing.assert_allclose(dense_crf(bright, p, srgb=0.005), expected, atol=0.1)


@pytest.mark.parametrize("costs", [np.zeros(2), np.zeros((2, 3)), np.zeros((3, 3)), np.full((2, 2), np.nan), np.nan])
def test_wrong_costs(costs: Any) -> None:
    image, p = example()
    with pytest.raises(ValueError, match="a compatibility must be"):
        dense_crf(image, p, compat_bilateral=costs)
