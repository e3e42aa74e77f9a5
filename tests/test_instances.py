"""Instances: shapes, values, selection, COCO rows, masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from torch import Tensor

from labelpenet import InputError, Instances
from labelpenet.instances import CompactMasks, decode_mask, masks_to_boxes


def some(n: int = 3, size: tuple[int, int] = (20, 30), seed: int = 0) -> Instances:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n, *size, dtype=torch.bool)
    for i in range(n):
        masks[i, 2 * i : 2 * i + 5, 3 * i : 3 * i + 7] = True
    return Instances(masks_to_boxes(masks), torch.arange(n) % 2, torch.rand(n, generator=generator), size, masks)


def boxes_by_loop(masks: Tensor) -> Tensor:
    """The tight boxes of masks, pixel by pixel."""
    boxes = torch.zeros(len(masks), 4)
    for i, mask in enumerate(masks):
        pixels = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
        if pixels:
            xs, ys = zip(*pixels, strict=True)
            boxes[i] = torch.tensor([min(xs), min(ys), max(xs) + 1, max(ys) + 1])
    return boxes


def equal(one: Instances, other: Instances) -> bool:
    same_masks = (
        one.masks is other.masks if one.masks is None or other.masks is None else torch.equal(one.masks, other.masks)
    )
    return (
        torch.equal(one.boxes, other.boxes)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.weights, other.weights)
        and one.image_size == other.image_size
        and same_masks
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": torch.zeros(3, 5)}, r"boxes must be \(N, 4\), but got \(3, 5\)"),
        ({"boxes": torch.zeros(4)}, r"boxes must be \(N, 4\)"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, r"labels must be \(3,\), but got \(2,\)"),
        ({"weights": torch.zeros(3, 1)}, r"weights must be \(3,\), but got \(3, 1\)"),
        ({"masks": torch.zeros(3, 20, 31, dtype=torch.bool)}, r"masks must be \(3, 20, 30\), but got \(3, 20, 31\)"),
    ],
)
def test_a_wrong_shape_is_named(change: dict[str, Tensor], words: str) -> None:
    good = some()
    fields = {"boxes": good.boxes, "labels": good.labels, "weights": good.weights, "masks": good.masks}
    with pytest.raises(ValueError, match=words):
        Instances(**{**fields, **change}, image_size=good.image_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("boxes", "labels", "weights", "words"),
    [
        ([[0, 0, float("nan"), 5]], [0], [1], "NaN"),
        ([[0, 0, float("inf"), 5]], [0], [1], "infinity"),
        ([[5, 5, 5, 9]], [0], [1], "no area"),
        ([[5, 9, 8, 5]], [0], [1], "no area"),
        ([[0, 0, 5, 5], [0, 0, 31.5, 5]], [0, 0], [1, 1], "box 1 .* leaves the image of 30 x 20 pixels"),
        ([[-2, 0, 5, 5]], [0], [1], "leaves the image"),
        ([[0, 0, 5, 5]], [2], [1], r"labels must be in \[0, 2\)"),
        ([[0, 0, 5, 5]], [-1], [1], "labels must be"),
        ([[0, 0, 5, 5]], [0], [1.5], r"weights must be in \[0, 1\]"),
        ([[0, 0, 5, 5]], [0], [float("nan")], "weights must be"),
    ],
)
def test_validate_names_what_is_wrong(boxes: list, labels: list, weights: list, words: str) -> None:
    instances = Instances(torch.tensor(boxes).float(), torch.tensor(labels), torch.tensor(weights).float(), (20, 30))
    with pytest.raises(InputError, match=words):
        instances.validate(2)


def test_validate_lets_good_ones_and_none_pass() -> None:
    good = some()
    assert good.validate(2) is good
    Instances.empty((20, 30)).validate(2)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
        (np.array([True, False, True]), [0, 2]),
        ([True, False, True], [0, 2]),
        (torch.tensor([1, 1]), [1, 1]),
        (torch.tensor(2), [2]),
        (np.int64(1), [1]),
        ([], []),
    ],
)
def test_selection_takes_the_same_rows_of_every_field(index: object, rows: list[int]) -> None:
    full = some()
    part = full[index]  # type: ignore[index]
    assert part.image_size == full.image_size
    assert len(part) == len(rows)
    for name in ("boxes", "labels", "weights", "masks"):
        assert torch.equal(getattr(part, name), getattr(full, name)[torch.tensor(rows, dtype=torch.long)])


def test_cat_is_the_inverse_of_slicing() -> None:
    full = some(5)
    assert equal(Instances.cat([full[:2], full[2:2], full[2:]]), full)


def test_cat_drops_masks_that_not_all_parts_have_and_refuses_two_images() -> None:
    full = some()
    bare = Instances(full.boxes, full.labels, full.weights, full.image_size)
    assert Instances.cat([full, bare]).masks is None
    with pytest.raises(ValueError, match="one image"):
        Instances.cat([full, some(size=(21, 30))])
    with pytest.raises(ValueError, match="at least one"):
        Instances.cat([])


def test_to_moves_every_field() -> None:
    moved = some().to("meta")
    assert {moved.boxes.device.type, moved.labels.device.type, moved.weights.device.type} == {"meta"}
    assert moved.masks is not None
    assert moved.masks.device.type == "meta"
    assert Instances.empty((4, 5)).to("cpu").masks is None


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 4), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.floats(0, 1))
def test_coco_rows_and_back(n: int, height: int, width: int, seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    masks = torch.from_numpy(rng.random((n, height, width)) < density)
    full = Instances(
        masks_to_boxes(masks),
        torch.from_numpy(rng.integers(0, 3, n)),
        torch.from_numpy(rng.random(n).astype(np.float32)),
        (height, width),
        masks,
    )
    rows = full.to_coco("image", [10, 20, 30])
    assert {row["category_id"] for row in rows} <= {10, 20, 30}
    back = Instances.from_coco(rows, (height, width), [10, 20, 30])
    if n:
        assert equal(back, full)
    else:
        assert len(back) == 0


def test_rows_without_masks_or_boxes() -> None:
    full = some()
    rows = full.to_coco(1, [4, 5])
    no_boxes = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    assert torch.equal(Instances.from_coco(no_boxes, full.image_size, [4, 5]).boxes, full.boxes)
    no_masks = [{key: value for key, value in row.items() if key != "segmentation"} for row in rows]
    assert Instances.from_coco(no_masks, full.image_size, [4, 5]).masks is None
    with pytest.raises(InputError, match=r"unknown category_id 5; known are \[4\]"):
        Instances.from_coco(rows, full.image_size, [4])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.floats(0, 1))
def test_tight_boxes_as_by_a_loop(n: int, height: int, width: int, seed: int, density: float) -> None:
    masks = torch.from_numpy(np.random.default_rng(seed).random((n, height, width)) < density)
    assert torch.equal(masks_to_boxes(masks), boxes_by_loop(masks))


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31), st.sampled_from([1, 2, 5, 23]))
def test_run_lengths_are_decoded_as_pycocotools_does(height: int, width: int, seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.random((height // block + 1, width // block + 1)) < rng.random()
    mask = np.kron(coarse, np.ones((block, block)))[:height, :width].astype(bool)
    packed = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    row = {**packed, "counts": packed["counts"].decode()}
    assert np.array_equal(decode_mask(row, (height, width)).numpy(), rle.decode(row).astype(bool))
    assert np.array_equal(decode_mask(row, (height, width)).numpy(), mask)
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    counts = [0, *runs] if flat[0] else runs
    assert np.array_equal(decode_mask({"size": [height, width], "counts": counts}, (height, width)).numpy(), mask)


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [10, 10], "counts": ""},  # pycocotools returns uninitialised memory for these two
        {"size": [10, 10], "counts": "0"},
        {"size": [10, 10], "counts": "zzzz"},
        {"size": [10, 10], "counts": "P" * 50},
        {"size": [10, 10], "counts": "é"},
        {"size": [10, 10], "counts": "\ud800"},  # JSON can hold half of a character
        {"size": [10, 10], "counts": [50, 60]},
        {"size": [10, 10], "counts": [200, -100]},
        {"size": [10, 10], "counts": [2**70]},
        {"size": [10, 11], "counts": [110]},
        {"size": [10, 10]},
        {"counts": [100]},
        [],
        [[]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [[0, 0, 1e9, 0, 1e9, 1e9]],
        [[0, 0, float("nan"), 0, 5, 5]],
        [["a", "b", "c", "d", "e", "f"]],
        [["0", "0", "9", "0", "9", "9"]],
        [[0, 0, 9, 0, 9, 10**400]],
        "rle",
        None,
        7,
    ],
)
def test_a_damaged_segmentation_is_refused(segmentation: object) -> None:
    with pytest.raises(InputError):
        decode_mask(segmentation, (10, 10))


def test_a_polygon_that_zigzags_for_ever_is_refused() -> None:
    points = [float(value) for _ in range(200_000) for value in (0, 0, 99, 99)]
    with pytest.raises(InputError, match="simplify"):
        decode_mask([points], (100, 100))


def test_polygons_are_drawn_as_pycocotools_does() -> None:
    polygons = [[2.0, 3.0, 12.5, 3.0, 12.5, 11.0, 2.0, 11.0], [14.0, 1.0, 20.0, 9.0, 16.0, 15.0]]
    expected = rle.decode(rle.merge(rle.frPyObjects(polygons, 16, 24))).astype(bool)
    assert np.array_equal(decode_mask(polygons, (16, 24)).numpy(), expected)


def random_masks(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Masks of every kind: empty, full, single pixels, rows that touch the borders, several parts."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, height, width)) < rng.choice([0, 0.02, 0.5, 0.98, 1], (count, 1, 1))
    for mask in masks:
        y, x = sorted(rng.integers(0, height + 1, 2)), sorted(rng.integers(0, width + 1, 2))
        window = np.zeros_like(mask)
        window[y[0] : y[1], x[0] : x[1]] = True
        mask &= window
    return torch.from_numpy(masks)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (17, 23), (40, 31)])
def test_compact_masks_are_the_dense_ones(size: tuple[int, int]) -> None:
    for seed in range(20):
        dense = random_masks(6, *size, seed)
        compact = CompactMasks.of(size, dense.numpy())
        assert torch.equal(compact.dense(), dense)
        assert compact.areas() == dense.flatten(1).sum(1).tolist()
        packed = np.asfortranarray(dense.numpy().astype(np.uint8).transpose(1, 2, 0))
        assert [row["counts"].encode() for row in compact.encode()] == [row["counts"] for row in rle.encode(packed)]
        shared = [[compact.overlap(a, b) for b in range(6)] for a in range(6)]
        assert shared == (dense[:, None] & dense[None]).flatten(2).sum(2).tolist()
        found = Instances(masks_to_boxes(dense), torch.arange(6), torch.rand(6), size, compact)
        chosen = found[torch.tensor([True, False, True, True, False, True])][[2, 0]]
        assert torch.equal(chosen.masks, dense[[3, 0]])
        assert torch.equal(Instances.cat([found, chosen]).masks, torch.cat([dense, dense[[3, 0]]]))
        assert replace(found, masks=None).masks is None
        assert torch.equal(replace(found, weights=torch.ones(6)).masks, dense)


def test_compact_masks_must_fit_their_instances() -> None:
    compact = CompactMasks.of((4, 5), np.ones((2, 4, 5), bool))
    with pytest.raises(ValueError, match="masks must be"):
        Instances(torch.zeros(1, 4), torch.zeros(1).long(), torch.zeros(1), (4, 5), compact)
    with pytest.raises(ValueError, match="masks must be"):
        Instances(torch.zeros(2, 4), torch.zeros(2).long(), torch.zeros(2), (5, 4), compact)
