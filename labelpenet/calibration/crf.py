"""Dense conditional random field: fully connected, with Gaussian edge potentials, in pure PyTorch.

The model is Kraehenbuehl and Koltun's (*Efficient inference in fully connected CRFs with Gaussian edge potentials*,
NIPS 2011), which the paper applies to instance confidence maps in section 3.2; the Gaussian filter is the permutohedral
lattice of Adams, Baek and Davis (2010). Conventions (kernel widths, symmetric normalisation, clipping) are those of
pydensecrf, whose marginals these equal up to the rounding of float32.

One filter is a product of sparse matrices, ``slice . blur_D ... blur_0 . splat``, so that one mean field iteration is a
dozen sparse products, whatever the number of instances: those of one image are further columns. On a GPU, building the
lattices and checking the input wait for the device; the iterations do not.

Shape letters: ``M`` instances, ``K`` labels, ``H, W`` height and width of the image, ``N = H * W`` pixels,
``D`` dimensions of a feature space, ``V`` vertices of a lattice, ``J = K - 1``.
"""

import functools
import math
import warnings
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from labelpenet.errors import InputError

#: Probabilities are clipped to [CLIP, 1] before their logarithm is taken, as pydensecrf's `unary_from_softmax` does.
CLIP = 1e-5

#: Instances are filtered together up to this many values (N * M * J), which bounds the memory to a few times 256 MiB.
MAX_VALUES = 2**26

#: Pixels of an image whose smoothness kernel is kept for the next image of its size.
MAX_KEPT = 2**20

TOO_NARROW = "a kernel of the CRF is too narrow for this image; widen sxy_gaussian, sxy_bilateral or srgb"

#: Tensor in, tensor out; NumPy array in, NumPy array out.
Values = TypeVar("Values", Tensor, NDArray[Any])

#: How a kernel weighs the labels of two pixels: a number, or a (K, K) matrix.
Compatibility = float | Tensor | NDArray[np.floating]


def dense_crf(
    image: Tensor | NDArray[np.uint8],
    probabilities: Values,
    iterations: int = 10,
    sxy_gaussian: float = 3,
    compat_gaussian: Compatibility = 3,
    sxy_bilateral: float = 80,
    srgb: float = 13,
    compat_bilateral: Compatibility = 10,
) -> Values:
    """Mean field marginals of one labelling of an image; for several of one image see `DenseCRF`.

    Args:
        image: (H, W, 3) uint8.
        probabilities: (K, H, W) with K >= 2, in [0, 1]: what a classifier says of each pixel.
        iterations: of the mean field; 0 returns the clipped probabilities, normalised.
        sxy_gaussian, compat_gaussian, sxy_bilateral, srgb, compat_bilateral: see `DenseCRF`.

    Returns:
        (K, H, W) float32 marginals, which sum to one over the labels: a NumPy array if the probabilities are one,
        else a tensor on their device.

    Raises:
        ValueError: wrong shape or type, K < 2, NaN, probabilities outside [0, 1], a width that is not positive.
    """
    if probabilities.ndim != 3:
        raise ValueError(f"probabilities must be (K, H, W), but got {tuple(probabilities.shape)}")
    if isinstance(probabilities, Tensor):
        image = _tensor(image).to(probabilities.device)
    crf = DenseCRF(image, sxy_gaussian, compat_gaussian, sxy_bilateral, srgb, compat_bilateral)
    return crf(probabilities, iterations)


class DenseCRF:
    """The dense CRF of one image: its lattices are built once and then serve every instance of the image.

    The energy of a labelling is the sum of the unaries, -log of the probabilities, and for every pair of pixels of

    - ``compat_gaussian * exp(-|p_i - p_j|^2 / (2 sxy_gaussian^2))`` and
    - ``compat_bilateral * exp(-|p_i - p_j|^2 / (2 sxy_bilateral^2) - |I_i - I_j|^2 / (2 srgb^2))``

    where the labels of the two differ; each kernel is normalised symmetrically.

    Args:
        image: (H, W, 3) uint8, any size from 1 x 1. As a tensor, its device is the one that everything runs on.
        sxy_gaussian: standard deviation of the smoothness kernel, in pixels.
        compat_gaussian: its weight (Potts model), or a (K, K) matrix of the costs that a pair of labels has, of which
            the symmetric part counts.
        sxy_bilateral: standard deviation of the appearance kernel, in pixels.
        srgb: standard deviation of the appearance kernel, in grey levels of 0..255.
        compat_bilateral: weight or (K, K) costs of the appearance kernel.

    Raises:
        ValueError: an image of another shape or type, a width that is not positive and finite.
    """

    def __init__(
        self,
        image: Tensor | NDArray[np.uint8],
        sxy_gaussian: float = 3,
        compat_gaussian: Compatibility = 3,
        sxy_bilateral: float = 80,
        srgb: float = 13,
        compat_bilateral: Compatibility = 10,
    ) -> None:
        pixels = _tensor(image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.numel() == 0 or pixels.dtype != torch.uint8:
            raise ValueError(f"image must be (H, W, 3) uint8, but got {tuple(pixels.shape)} {pixels.dtype}")
        for name, width in (("sxy_gaussian", sxy_gaussian), ("sxy_bilateral", sxy_bilateral), ("srgb", srgb)):
            if not (math.isfinite(width) and width > 0):
                raise ValueError(f"{name} must be positive, but got {width}")
        self.image_size: tuple[int, int] = (pixels.shape[0], pixels.shape[1])
        self.device = pixels.device
        colours = pixels.reshape(-1, 3).T.float()
        positions = _positions(self.image_size, self.device)
        bilateral = torch.cat([positions / sxy_bilateral, colours / srgb])
        # A canvas's kernel is kept; that of a camera's whole photograph would hold a gigabyte until the process ends.
        smoothness = _smoothness if positions.shape[1] <= MAX_KEPT else _smoothness.__wrapped__
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self._kernels = [
                (smoothness(self.image_size, sxy_gaussian, self.device), _compatibility(compat_gaussian, self.device)),
                (_Kernel(bilateral), _compatibility(compat_bilateral, self.device)),
            ]

    def __call__(self, probabilities: Values, iterations: int = 10) -> Values:
        """Mean field marginals of M independent labellings of the image.

        Args:
            probabilities: (M, K, H, W), or (K, H, W) for one labelling; K >= 2, in [0, 1].
            iterations: of the mean field.

        Returns:
            float32 marginals of the same shape; a NumPy array if the probabilities are one, else a tensor on the
            image's device.

        Raises:
            ValueError: another shape, K < 2, NaN, or probabilities outside [0, 1].
        """
        p = _tensor(probabilities).to(self.device)
        if p.ndim not in (3, 4) or p.shape[-2:] != self.image_size or p.shape[-3] < 2:
            height, width = self.image_size
            raise ValueError(
                f"probabilities must be (K, H, W) or (M, K, H, W) with K >= 2, H = {height} and W = {width}, "
                f"but got {tuple(p.shape)}"
            )
        # Rounding may leave a softmax a little above one.
        if not bool(((p > -1e-3) & (p < 1 + 1e-3)).all()):
            raise ValueError("probabilities must be in [0, 1], but some are not, or are NaN")
        flat = p.reshape(-1, p.shape[-3], self.image_size[0] * self.image_size[1])
        together = max(1, MAX_VALUES // (flat.shape[2] * (flat.shape[1] - 1)))
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            parts = [self._mean_field(part, iterations) for part in flat.split(together)]
        marginals = torch.cat(parts).reshape(p.shape)
        return marginals if isinstance(probabilities, Tensor) else marginals.cpu().numpy()

    def _mean_field(self, probabilities: Tensor, iterations: int) -> Tensor:
        """(M, K, N) probabilities to (M, K, N) marginals.

        The marginals of a pixel sum to one and the filters are linear, so K - 1 columns tell everything: what follows
        are logits against label 0, and marginals less that of label 0, (N, M, K - 1) each. With two labels that halves
        the work; the difference also rounds better than its two terms.
        """
        k = probabilities.shape[1]
        exact = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
        logs = exact.clamp(CLIP, 1).log().float()
        unary = (logs[:, 1:] - logs[:, :1]).permute(2, 0, 1).contiguous()
        logits = unary.clone()
        messages = []
        for kernel, costs in self._kernels:
            if isinstance(costs, Tensor):
                costs, constant = _against_label_0(costs, k)
                unary -= kernel.filter_ones()[:, :, None] * constant
            messages.append((kernel, costs))
        for _ in range(iterations):
            differences = _softmax_less_first(logits)
            logits = unary.clone()
            for kernel, costs in messages:
                kernel.add_message(logits, differences, costs)
        logits = logits.permute(1, 2, 0).contiguous()
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1).softmax(1)


def _tensor(values: Tensor | NDArray[Any]) -> Tensor:
    """A tensor as it is, an array as a copy (the view of a read-only array would draw a warning)."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, order="C"))


def _compatibility(value: Compatibility, device: torch.device) -> float | Tensor:
    """A number, or the symmetric part of a (K, K) float32 matrix."""
    costs = torch.as_tensor(value, dtype=torch.float32)
    if not bool(costs.isfinite().all()):
        raise ValueError("a compatibility must be finite, but some values are not")
    if costs.ndim == 0:
        return float(costs)
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1]:
        raise ValueError(f"a compatibility must be a number or (K, K), but got {tuple(costs.shape)}")
    return ((costs + costs.T) / 2).to(device)


def _against_label_0(costs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What (K, K) costs become where columns are differences with label 0.

    Returns:
        a (K - 1, K - 1) matrix, with the sign of a logit, and a (K - 1,) constant, with the sign of an energy.

    Let q_l be the filtered marginals and F their sum. The message to l is ``-sum_l' costs[l, l'] q_l'``. Subtract that
    to label 0, put ``q_l' = g_l' + q_0`` and ``q_0 = (F - sum of the g_l') / K``: the differences g_l' get the matrix
    and F gets the constant.
    """
    if costs.shape != (k, k):
        raise ValueError(f"a compatibility must be a number or ({k}, {k}), but got {tuple(costs.shape)}")
    difference = costs[1:] - costs[:1]
    constant = difference.sum(1) / k
    return constant[:, None] - difference[:, 1:], constant


def _softmax_less_first(logits: Tensor) -> Tensor:
    """Softmax over the last axis and an implied first logit of 0; of each share, the difference with the first's."""
    if logits.shape[-1] == 1:
        return logits.sigmoid().mul_(2).sub_(1)
    # PyTorch's softmax over a short last axis is slow.
    largest = logits.amax(-1, keepdim=True).clamp_(min=0)
    shares, first = (logits - largest).exp_(), (-largest).exp_()
    return (shares - first) / (shares.sum(-1, keepdim=True) + first)


class _Kernel:
    """Normalised Gaussian filtering of N pixels with (D, N) features of unit standard deviation."""

    def __init__(self, features: Tensor) -> None:
        d, n = features.shape
        keys, weights, deltas = _simplices(features)
        # One sort serves twice: it makes keys vertices, and brings the entries of the splat into the order of its rows.
        ordered, order = torch.sort(keys.flatten(), stable=True)
        vertices, vertex, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
        v = len(vertices)
        vertex_of_entry = torch.empty_like(vertex, dtype=torch.int32).scatter_(0, order, vertex.int())
        pixel = order.int().floor_divide_(d + 1)
        splat_rows = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        slice_rows = torch.arange(0, n * (d + 1) + 1, d + 1, dtype=torch.int32, device=features.device)
        splat_weights = weights.flatten().index_select(0, order)
        # Blurring raises a constant; Adams et al. divide by this factor to undo it.
        weights *= 1 / (1 + 2.0**-d)
        self._blurs = [_blur(vertices, delta) for delta in deltas]
        self._splat = _csr(splat_rows, pixel, splat_weights, (v, n))
        self._slice = _csr(slice_rows, vertex_of_entry, weights.flatten(), (n, v))
        norm = (self.filter_ones() + 1e-20).rsqrt()
        # The matrices hold these two tensors themselves.
        splat_weights *= norm[:, 0].index_select(0, pixel)
        weights *= norm

    def filter_ones(self) -> Tensor:
        """(N, 1): the filter's answer to all ones."""
        return self._slice @ self._blurred(self._splat @ torch.ones(self._splat.shape[1], 1, device=self._splat.device))

    def add_message(self, logits: Tensor, differences: Tensor, costs: float | Tensor) -> None:
        """Adds to (N, M, J) logits the filtered (N, M, J) differences times a number or a (J, J) matrix, in place."""
        n, m, j = differences.shape
        blurred = self._blurred(self._splat @ differences.view(n, m * j))
        if isinstance(costs, Tensor):
            weighted = (blurred.view(-1, m, j) @ costs.T).view(-1, m * j)
        else:
            weighted = blurred * costs
        flat = logits.view(n, m * j)
        torch.addmm(flat, self._slice, weighted, out=flat)

    def _blurred(self, values: Tensor) -> Tensor:
        for blur in self._blurs:
            values = blur @ values
        return values


def _positions(size: tuple[int, int], device: torch.device) -> Tensor:
    """(2, H W) float32: x and y of every pixel."""
    y, x = (torch.arange(one, dtype=torch.float32, device=device) for one in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy")).flatten(1)


@functools.lru_cache(maxsize=4)  # the photographs of a set come in few sizes
def _smoothness(size: tuple[int, int], width: float, device: torch.device) -> _Kernel:
    """The smoothness kernel, which knows nothing of an image but its size."""
    return _Kernel(_positions(size, device) / width)


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The lattice simplex that holds each pixel.

    The permutohedral lattice lies in the hyperplane of R^(D+1) whose coordinates sum to zero; the coordinates of one of
    its points are integers that are congruent to each other modulo D + 1.

    Args:
        features: (D, N).

    Returns:
        (N, D + 1) keys, one integer a vertex (int32 if they fit, else int64); (N, D + 1) barycentric weights; for each
        of the D + 1 axes of the lattice the difference of key between a vertex and its neighbour.

    Raises:
        InputError: the kernel is so narrow against the features' range that float32 or keys of 63 bits do not do.
    """
    d, n = features.shape
    elevated = _elevate(features)
    # Beyond, float32 does not tell where in its simplex a pixel lies.
    if not bool((elevated.abs() < 2**22).all()):
        raise InputError(TOO_NARROW)
    inverse = float(np.float32(1 / (d + 1)))
    multiples = torch.round(elevated * inverse)
    ranks, multiples = _ranks(torch.add(elevated, multiples, alpha=-d - 1), multiples)
    residues = torch.empty_like(elevated).scatter_(0, ranks, elevated.sub_(multiples, alpha=d + 1).mul_(inverse))
    weights = torch.empty(n, d + 1, device=features.device)
    weights[:, 0] = 1 + residues[d] - residues[0]
    for i in range(d):
        weights[:, d - i] = residues[i] - residues[i + 1]

    # A vertex c is told by the integers c_0 and e_i = (c_i - c_0) / (D + 1), i = 1..D-1 (c_D follows from the sum of
    # zero); its key is linear in them. From one vertex of the simplex to the next every c_i rises by 1, and the one
    # whose turn it is, lowest residue first, drops by D + 1; to the neighbour along axis i likewise.
    coordinates = multiples[:d].clone()
    coordinates[1:] -= coordinates[0]
    coordinates[0] *= d + 1
    lows, strides, size = _key_layout(coordinates)
    dtype = torch.int32 if size < 2**31 else torch.int64
    key = torch.zeros(n, dtype=dtype, device=features.device)
    for coordinate, low, stride in zip(coordinates, lows, strides, strict=True):
        key += (coordinate - low).to(dtype) * stride
    drops = [sum(strides[1:]) - (d + 1) * strides[0], *(-stride for stride in strides[1:]), 0]
    steps = [strides[0] + drop for drop in drops]
    step = torch.tensor(steps, dtype=dtype, device=features.device)[:, None].expand(d + 1, n)
    by_rank = torch.empty(d + 1, n, dtype=dtype, device=features.device).scatter_(0, ranks, step)
    keys = torch.empty(n, d + 1, dtype=dtype, device=features.device)
    keys[:, 0] = key
    for i in range(d, 0, -1):
        key += by_rank[i]
        keys[:, d + 1 - i] = key
    return keys, weights, steps


def _elevate(features: Tensor) -> Tensor:
    """(D, N) features to the (D + 1, N) hyperplane, scaled so that the lattice's blur has unit standard deviation."""
    d, n = features.shape
    # Rounded where pydensecrf rounds: a tie between two coordinates decides which vertices exist.
    scale = float(np.float32(math.sqrt(2 / 3) * (d + 1)))
    elevated = torch.empty(d + 1, n, device=features.device)
    total = torch.zeros(n, device=features.device)
    for i in range(d, 0, -1):
        value = features[i - 1] * (1 / math.sqrt(i * (i + 1)) * scale)
        elevated[i] = total - i * value
        total = total + value
    elevated[0] = total
    return elevated


def _ranks(residues: Tensor, multiples: Tensor) -> tuple[Tensor, Tensor]:
    """The rank of each of (D + 1, N) residues, largest first, and the multiples of D + 1, corrected to sum to zero.

    Rounding each coordinate to the nearest multiple may leave the hyperplane; those that were rounded furthest then
    go to the next multiple, which moves their rank to the other end.
    """
    size = len(residues)
    ranks = multiples.sum(0).to(torch.int8).repeat(size, 1)
    for i in range(size):
        for j in range(i + 1, size):
            smaller = (residues[i] < residues[j]).view(torch.int8)
            ranks[i] += smaller
            ranks[j] += 1 - smaller
    shift = (ranks < 0).view(torch.int8) - (ranks >= size).view(torch.int8)
    return (ranks + size * shift).long(), multiples + shift


def _key_layout(coordinates: Tensor) -> tuple[list[int], list[int], int]:
    """How D integer coordinates make a key from 0: the origin and the stride of each, and the number of keys.

    ``coordinates`` (D, N) are those of one vertex of each simplex; keys are also there for the others, and for the
    neighbours of all.
    """
    d = len(coordinates)
    lows, highs = torch.stack([coordinates.amin(1), coordinates.amax(1)]).long().tolist()
    # How far c_0, and each e_i, goes over the simplex, and as much again to a neighbour.
    margins = [2 * d] + [2] * (d - 1)
    sizes = [high - low + 2 * margin + 1 for low, high, margin in zip(lows, highs, margins, strict=True)]
    if math.prod(sizes) >= 2**63:
        raise InputError(TOO_NARROW)
    strides = [math.prod(sizes[i + 1 :]) for i in range(d)]
    return [low - margin for low, margin in zip(lows, margins, strict=True)], strides, math.prod(sizes)


def _blur(vertices: Tensor, step: int) -> Tensor:
    """The (V, V) sparse matrix of weights 1/2, 1, 1/2 along one axis of the lattice; a missing neighbour counts 0."""
    v = len(vertices)
    own = torch.arange(v, device=vertices.device)
    wanted = vertices + step
    up = torch.searchsorted(vertices, wanted).clamp_(max=v - 1)
    found = vertices.index_select(0, up) == wanted
    # The inverse relation; slot V takes what has no neighbour.
    down = torch.arange(v + 1, device=vertices.device).scatter_(0, torch.where(found, up, v), own)[:v]
    columns = torch.stack([torch.where(found, up, own), own, down], 1).int()
    weights = torch.stack([found * 0.5, torch.ones_like(found, dtype=torch.float32), (down != own) * 0.5], 1)
    rows = torch.arange(0, 3 * v + 1, 3, dtype=torch.int32, device=vertices.device)
    return _csr(rows, columns.flatten(), weights.flatten(), (v, v))


def _csr(rows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        # PyTorch announces at the first use that compressed rows are in beta; products with them are all we need.
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(rows, columns, values, size, check_invariants=False)
