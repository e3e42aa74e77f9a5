"""The maps of proposal calibration against slow loops over proposals and pixels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from labelpenet.calibration import maps as module
from labelpenet.calibration.maps import background_map, confidence_map, heat_map, normalise, project_maps

NAN, INF = float("nan"), float("inf")


def slow_project(
    maps: Tensor, boxes: Tensor, size: tuple[int, int], weights: Tensor, groups: Tensor, num_groups: int
) -> Tensor:
    """Pixel by pixel, proposal by proposal: bilinear between the cells' centres, clamped to the outermost ones."""
    canvas = torch.zeros(num_groups, *size, dtype=torch.float64)
    cells = maps.tolist()
    for r, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        if not 0 <= int(groups[r]) < num_groups:
            continue
        for i in range(size[0]):
            for j in range(size[1]):
                if not (x1 <= j + 0.5 < x2 and y1 <= i + 0.5 < y2):
                    continue
                v = (i + 0.5 - y1) / (y2 - y1) * len(cells[r]) - 0.5
                u = (j + 0.5 - x1) / (x2 - x1) * len(cells[r][0]) - 0.5
                canvas[groups[r], i, j] += float(weights[r]) * _bilinear(cells[r], v, u)
    return canvas


def _bilinear(cells: list[list[float]], v: float, u: float) -> float:
    v, u = min(max(v, 0), len(cells) - 1), min(max(u, 0), len(cells[0]) - 1)
    top, left = math.floor(v), math.floor(u)
    bottom, right = min(top + 1, len(cells) - 1), min(left + 1, len(cells[0]) - 1)
    upper = cells[top][left] * (1 - u + left) + cells[top][right] * (u - left)
    lower = cells[bottom][left] * (1 - u + left) + cells[bottom][right] * (u - left)
    return upper * (1 - v + top) + lower * (v - top)


def slow_heat(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Tensor:
    heat = torch.zeros(scores.shape[1], *size, dtype=torch.float64)
    for box, score in zip(boxes.tolist(), scores.double(), strict=True):
        for i in range(size[0]):
            for j in range(size[1]):
                if box[0] <= j + 0.5 < box[2] and box[1] <= i + 0.5 < box[3]:
                    heat[:, i, j] += score
    return heat


def random_boxes(count: int, size: tuple[int, int], outside: float = 4) -> Tensor:
    """Fractional boxes, some of them partly outside the image."""
    extent = torch.tensor([size[1], size[0]]).double() + 2 * outside
    corners = torch.rand(count, 2, 2, dtype=torch.float64) * extent - outside
    return torch.cat([corners.amin(1), corners.amax(1)], 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class TestProjectMaps:
    @pytest.mark.parametrize("cells", [(7, 7), (3, 5), (1, 1)])
    def test_equals_the_slow_loop(self, cells: tuple[int, int]) -> None:
        size, count = (17, 23), 30
        maps, boxes = torch.rand(count, *cells, dtype=torch.float64), random_boxes(count, size)
        weights, groups = torch.randn(count, dtype=torch.float64), torch.randint(-1, 4, (count,))
        expected = slow_project(maps, boxes, size, weights, groups, 3)
        got = project_maps(maps, boxes, size, weights, groups, 3)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        single = project_maps(maps.float(), boxes.double(), size, weights.float(), groups, 3)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 2**20), height=st.integers(1, 12), width=st.integers(1, 12), count=st.integers(0, 6))
    def test_equals_the_slow_loop_at_any_size(self, seed: int, height: int, width: int, count: int) -> None:
        torch.manual_seed(seed)
        maps, boxes = torch.rand(count, 4, 3, dtype=torch.float64), random_boxes(count, (height, width), 2)
        expected = slow_project(maps, boxes, (height, width), torch.ones(count), torch.zeros(count).long(), 1)
        torch.testing.assert_close(project_maps(maps, boxes, (height, width)), expected, rtol=1e-9, atol=1e-9)

    def test_equals_interpolate_on_whole_pixels(self) -> None:
        maps = torch.rand(1, 7, 7)
        got = project_maps(maps, torch.tensor([[2.0, 3, 22, 14]]), (20, 30))
        expected = torch.zeros(1, 20, 30)
        expected[0, 3:14, 2:22] = F.interpolate(maps[None], (11, 20), mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(got, expected)

    def test_cells_that_look_beside_their_middles(self) -> None:
        """A map that holds where its cells look, an eighth of the side left of and above: exact, and covers the box."""
        places = (torch.arange(4.0) + 0.5) / 4 - 0.125
        maps, box = places.expand(1, 4, 4), torch.tensor([[10.0, 5, 26, 21]])
        got = project_maps(maps, box, (30, 40), offset=-0.125)[0, 5:21, 10:26]
        pixels = (torch.arange(16) + 0.5) / 16
        torch.testing.assert_close(got, pixels.clamp(places[0], places[-1]).expand(16, 16))
        ones = project_maps(torch.ones(1, 4, 4), box, (30, 40), offset=-0.125)
        assert torch.equal(ones, project_maps(torch.ones(1, 4, 4), box, (30, 40)))

    def test_chunks_add_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        maps, boxes = torch.rand(40, 7, 7, dtype=torch.float64), random_boxes(40, (20, 30))
        groups = torch.randint(0, 3, (40,))
        whole = project_maps(maps, boxes, (20, 30), None, groups, 3)
        monkeypatch.setattr(module, "CHUNK", 7)
        torch.testing.assert_close(project_maps(maps, boxes, (20, 30), None, groups, 3), whole)

    def test_the_groups_sum_to_the_whole(self) -> None:
        maps, boxes = torch.rand(40, 7, 7).double(), random_boxes(40, (20, 30))
        parts = project_maps(maps, boxes, (20, 30), None, torch.randint(0, 5, (40,)), 5)
        torch.testing.assert_close(parts.sum(0, keepdim=True), project_maps(maps, boxes, (20, 30)))

    def test_constant_map_covers_the_box_and_nothing_else(self) -> None:
        boxes = random_boxes(25, (20, 30))
        got = project_maps(torch.ones(25, 7, 7).double(), boxes, (20, 30))
        torch.testing.assert_close(got, heat_map(boxes, torch.ones(25, 1).double(), (20, 30)))

    def test_no_proposal(self) -> None:
        assert torch.equal(project_maps(torch.zeros(0, 7, 7), torch.zeros(0, 4), (5, 6)), torch.zeros(1, 5, 6))
        groups = torch.zeros(0, dtype=torch.long)
        assert project_maps(torch.zeros(0, 7, 7), torch.zeros(0, 4), (5, 6), None, groups, 0).shape == (0, 5, 6)

    def test_box_of_one_pixel_shows_the_middle_of_the_map(self) -> None:
        maps = torch.rand(1, 7, 7)
        got = project_maps(maps, torch.tensor([[3.0, 2, 4, 3]]), (5, 6))
        assert int((got != 0).sum()) == 1
        torch.testing.assert_close(got[0, 2, 3], maps[0, 3, 3])

    @pytest.mark.parametrize(
        "box",
        [
            [50, 50, 60, 60],
            [-9, -9, -1, -1],
            [3, 3, 3, 3],
            [4, 4, 2, 2],
            [2.6, 2.6, 3.4, 3.4],
            [NAN, 0, 3, 3],
            [0, 0, INF, 3],
            [-INF, 0, 3, 3],
            [-INF, -INF, INF, INF],
        ],
        ids=str,
    )
    def test_boxes_that_cover_no_pixel(self, box: list[float]) -> None:
        boxes, zero = torch.tensor([box], dtype=torch.float32), torch.zeros(1, 5, 6)
        assert torch.equal(project_maps(torch.ones(1, 7, 7), boxes, (5, 6)), zero)
        assert torch.equal(heat_map(boxes, torch.ones(1, 1), (5, 6)), zero)

    def test_all_zero_maps(self) -> None:
        got = project_maps(torch.zeros(9, 7, 7), random_boxes(9, (5, 6)), (5, 6))
        assert torch.equal(got, torch.zeros(1, 5, 6))
        assert torch.equal(normalise(got), got)

    def test_nan_in_a_map_is_seen_in_its_group_only(self) -> None:
        maps, boxes = torch.rand(4, 7, 7), torch.tensor([[0.0, 0, 6, 5]]).expand(4, 4)
        maps[1, 3, 3] = NAN
        got = project_maps(maps, boxes, (5, 6), None, torch.tensor([0, 0, 1, 1]), 2)
        assert bool(got[0].isnan().any())
        assert not bool(got[1].isnan().any())


class TestHeatMap:
    def test_equals_the_slow_loop(self) -> None:
        size = (17, 23)
        boxes, scores = random_boxes(40, size), torch.randn(40, 3, dtype=torch.float64)
        expected = slow_heat(boxes, scores, size)
        torch.testing.assert_close(heat_map(boxes, scores, size), expected, rtol=1e-10, atol=1e-10)
        single = heat_map(boxes, scores.float(), size)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)

    @settings(max_examples=30, deadline=None)
    @given(
        corners=st.lists(st.tuples(*[st.integers(-6, 26)] * 4), max_size=6),
        height=st.integers(1, 10),
        width=st.integers(1, 10),
    )
    def test_edges_on_pixel_centres_and_half_pixels(self, corners: list, height: int, width: int) -> None:
        boxes = torch.tensor(corners, dtype=torch.float64).reshape(-1, 4) / 2
        scores = torch.arange(1.0, len(boxes) + 1, dtype=torch.float64)[:, None]
        got = heat_map(boxes, scores, (height, width))
        torch.testing.assert_close(got, slow_heat(boxes, scores, (height, width)), rtol=1e-10, atol=1e-10)

    def test_exactly_zero_where_no_box_is(self) -> None:
        boxes = torch.tensor([[3.0, 3, 9, 9], [4, 4, 12, 12]])
        got = heat_map(boxes, torch.tensor([[0.1], [1e7 / 3]]), (20, 20))
        assert bool((got[0, 12:] == 0).all()) and bool((got[0, :, 12:] == 0).all())
        assert float(got[0, 3, 3]) == pytest.approx(0.1, rel=1e-5)

    def test_order_of_the_proposals_does_not_matter_to_the_last_bit(self) -> None:
        boxes, scores, order = random_boxes(50, (20, 20)), torch.rand(50, 2), torch.randperm(50)
        assert torch.equal(heat_map(boxes, scores, (20, 20)), heat_map(boxes[order], scores[order], (20, 20)))

    def test_no_proposal_and_no_class(self) -> None:
        assert torch.equal(heat_map(torch.zeros(0, 4), torch.zeros(0, 2), (4, 5)), torch.zeros(2, 4, 5))
        assert heat_map(torch.zeros(3, 4), torch.zeros(3, 0), (4, 5)).shape == (0, 4, 5)

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_score_that_is_not_finite_is_seen_in_its_class_only(self, bad: float) -> None:
        scores = torch.rand(4, 2)
        scores[2, 1] = bad
        got = heat_map(random_boxes(4, (6, 6)), scores, (6, 6))
        assert not bool(got[0].isnan().any())
        assert bool(got[1].isnan().all())


class TestConfidence:
    def test_normalise(self) -> None:
        maps = torch.stack([torch.tensor([[0.0, 2], [4, 1]]), torch.zeros(2, 2), torch.tensor([[-3.0, 1], [0, -1]])])
        expected = torch.tensor([[[0.0, 0.5], [1, 0.25]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]])
        assert torch.equal(normalise(maps), expected)
        assert bool(normalise(torch.tensor([[NAN, 1.0]])).isnan().any())
        assert normalise(torch.zeros(0, 3, 4)).shape == (0, 3, 4)

    def test_background_is_what_the_classes_leave(self) -> None:
        class_maps = torch.tensor([[[0.2, 0.9]], [[0.3, 0.8]]])
        torch.testing.assert_close(background_map(class_maps), torch.tensor([[0.5, 0.0]]))
        assert torch.equal(background_map(torch.zeros(0, 2, 3)), torch.ones(2, 3))

    def test_mean_and_product(self) -> None:
        attention, heat = torch.rand(3, 6, 7) * 40, torch.rand(3, 6, 7) * 0.01
        a, h = attention / attention.amax((1, 2), True), heat / heat.amax((1, 2), True)
        torch.testing.assert_close(confidence_map(attention, heat, "mean"), (a + h) / 2)
        torch.testing.assert_close(confidence_map(attention, heat, "product"), a * h)

    @pytest.mark.parametrize("how", ["mean", "product"])
    def test_range(self, how) -> None:
        got = confidence_map(100 * torch.randn(3, 6, 7), torch.randn(3, 6, 7), how)
        assert float(got.min()) >= 0
        assert float(got.max()) <= 1

    def test_unknown_combination(self) -> None:
        with pytest.raises(ValueError, match=r"'mean' or 'product'.*'sum'"):
            confidence_map(torch.ones(1, 2, 2), torch.ones(1, 2, 2), "sum")  # type: ignore[arg-type]


def test_nothing_waits_for_the_device() -> None:
    """Tensors on the meta device have shapes but no values: reading one would raise."""
    maps, boxes, groups = torch.rand(600, 7, 7).to("meta"), torch.rand(600, 4).to("meta"), torch.zeros(600).long()
    attention = project_maps(maps, boxes, (20, 30), torch.rand(600).to("meta"), groups.to("meta"), 3)
    heat = heat_map(boxes, torch.rand(600, 3).to("meta"), (20, 30))
    assert confidence_map(attention, heat).shape == (3, 20, 30)
    assert background_map(attention).shape == (20, 30)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_a_gpu() -> None:
    maps, boxes, scores = torch.rand(600, 7, 7), random_boxes(600, (40, 50)).float(), torch.rand(600, 3)
    groups = torch.randint(-1, 4, (600,))
    expected = project_maps(maps, boxes, (40, 50), scores[:, 0], groups, 3), heat_map(boxes, scores, (40, 50))
    cuda = [t.cuda() for t in (maps, boxes, scores, groups)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        projected = project_maps(cuda[0], cuda[1], (40, 50), cuda[2][:, 0], cuda[3], 3)
        heat = heat_map(cuda[1], cuda[2], (40, 50))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(projected.cpu(), expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(heat.cpu(), expected[1])
