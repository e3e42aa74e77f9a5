"""Masks drawn to the photograph's edges: against all pairs of cells, torchvision's pasting, and by what they do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_iou

from labelpenet.calibration.nms import matrix_nms
from labelpenet.calibration.sharpen import (
    draw,
    grid_size,
    joint_bilateral_upsampling,
    mean_field,
    pixels_per_cell,
    rescore,
    resized,
    sharpen,
)
from labelpenet.config import Sharpening
from labelpenet.errors import InputError
from tests.calibration import test_crf

PLAIN = Sharpening(iterations=0, threshold=0.5)


def disc(side: int, radius: float, centre: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    y, x = torch.meshgrid((torch.arange(side) + 0.5) / side, (torch.arange(side) + 0.5) / side, indexing="ij")
    return (y - centre[1]) ** 2 + (x - centre[0]) ** 2 < radius**2


def iou(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_the_mean_field_is_that_of_all_pairs_of_cells():
    image, p = test_crf.example(2, 9, 13, instances=3)
    settings = Sharpening(iterations=5, sxy_gaussian=0.1, sxy_bilateral=0.4, srgb=60, compat_bilateral=4)
    side = (9 * 13) ** 0.5
    kernels = test_crf.all_pairs(image, 0.1 * side, 0.4 * side, 60)
    costs = [3 * (1 - np.eye(2)), 4 * (1 - np.eye(2))]
    unary = torch.from_numpy(np.log(p[:, 1] / p[:, 0]))
    found = mean_field(torch.from_numpy(image).permute(2, 0, 1) / 255, unary, settings).sigmoid()
    for one, own in zip(found, p, strict=True):
        expected = test_crf.mean_field(own, kernels, costs, 5)[1]
        np.testing.assert_allclose(one, expected, rtol=0, atol=2e-5)


def test_masks_are_drawn_where_torchvision_pastes_them():
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 60, (20, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(15, 60, (20, 2), generator=generator)], 1).float()
    masks = torch.rand(20, 4, 4, generator=generator)
    # torchvision rounds the box that its margin makes to pixels, and its last pixel is one more than the box
    expected = paste_masks_in_image(masks[:, None], boxes - torch.tensor([0, 0, 1, 1]), (120, 120))[:, 0]
    found = draw(masks, boxes, (120, 120))
    assert (found - expected).abs().mean() < 0.01
    assert draw(masks[:0], boxes[:0], (7, 9)).shape == (0, 7, 9)


def test_a_mask_drawn_at_another_scale_covers_the_same_place():
    mask = disc(28, 0.4)[None].float()
    boxes = torch.tensor([[12.3, 7.7, 68.1, 71.9]])
    small, large = (draw(mask, boxes * scale, (80 * scale, 90 * scale)) > 0.5 for scale in (1, 4))
    shrunk = torch.nn.functional.avg_pool2d(large.float(), 4) > 0.5
    assert iou(small[0], shrunk[0]) > 0.97


def test_a_blurred_mask_finds_the_edge_of_its_object():
    object_ = disc(240, 0.3)
    image = torch.where(object_, 0.8, 0.2).expand(3, -1, -1)
    blurred = torch.nn.functional.interpolate(
        disc(240, 0.26, (0.52, 0.5))[None, None].float(), size=(12, 12), mode="area"
    )
    blurred = torch.nn.functional.interpolate(blurred, size=(28, 28), mode="bilinear")[0]
    box = torch.tensor([[0.0, 0, 240, 240]])
    plain, found = (sharpen(image, blurred, box, one)[0] > 0.5 for one in (PLAIN, Sharpening()))
    assert found.shape == plain.shape == (180, 180)  # 2,025 cells of 4 x 4 pixels
    truth = torch.nn.functional.interpolate(object_[None, None].float(), size=found.shape, mode="area")[0, 0] > 0.5
    assert iou(plain, truth) < 0.8 and iou(found, truth) > 0.9


def test_maps_are_resized_as_torch_resizes_them():
    maps = torch.rand(3, 7, 11)
    for size in ((7, 11), (28, 44), (5, 30)):
        expected = torch.nn.functional.interpolate(maps[None], size=size, mode="bilinear")[0]
        torch.testing.assert_close(resized(maps, size), expected)


def test_what_a_cell_is_goes_to_the_pixels_of_its_colour():
    fine = torch.full((3, 20, 28), 0.2)
    fine[:, :, 13:] = 0.9  # an edge inside the fourth cell, of which a quarter is dark
    colours = torch.nn.functional.avg_pool2d(fine, 4)
    maps = torch.tensor([-4.0, -4, -4, 4, 4, 4, 4]).expand(2, 5, 7) * torch.tensor([1.0, 3])[:, None, None]
    found = joint_bilateral_upsampling(maps, colours, fine)
    assert found.shape == (2, 20, 28)
    assert bool((found[:, :, :13] < 0).all()) and bool((found[:, :, 13:] > 0).all())
    assert not torch.equal(resized(maps, (20, 28)) > 0, found > 0)  # which goes by place alone
    torch.testing.assert_close(found[1], 3 * found[0])
    flat = torch.full((1, 5, 7), 0.7)
    torch.testing.assert_close(joint_bilateral_upsampling(flat, colours, fine), torch.full((1, 20, 28), 0.7))
    assert joint_bilateral_upsampling(maps[:0], colours, fine).shape == (0, 20, 28)
    assert bool(
        torch.isfinite(joint_bilateral_upsampling(maps, torch.rand(3, 5, 7), 1 - fine)).all()
    )  # no cell is like the pixel


@pytest.mark.parametrize("k", [4, 5])
def test_a_pixel_follows_the_nine_cells_around_it(k):
    generator = torch.Generator().manual_seed(0)
    maps, colours = torch.rand(1, 4, 5, generator=generator), torch.rand(3, 4, 5, generator=generator) * 0.2
    fine = torch.rand(3, 4 * k, 5 * k, generator=generator) * 0.2
    found = joint_bilateral_upsampling(maps, colours, fine)
    for y, x in ((0, 0), (7, 9), (15, 19), (6, 0)):
        summed = total = 0.0
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                row, column = y // k + down, x // k + right
                inside = min(max(row, 0), 3), min(max(column, 0), 4)
                near = ((y + 0.5) / k - row - 0.5) ** 2 + ((x + 0.5) / k - column - 0.5) ** 2
                unlike = float(((fine[:, y, x] - colours[:, inside[0], inside[1]]) ** 2).sum()) * (255 / 20) ** 2
                weight = np.exp(-(near + unlike) / 2)
                summed, total = summed + weight * float(maps[0, inside[0], inside[1]]), total + weight
        assert float(found[0, y, x]) == pytest.approx(summed / total, abs=1e-5)


def test_objects_of_one_colour_are_told_apart_by_features():
    generator = torch.Generator().manual_seed(0)
    object_ = disc(240, 0.3)
    image = torch.full((3, 240, 240), 0.5)
    blurred = torch.nn.functional.avg_pool2d(disc(280, 0.24, (0.53, 0.5))[None].float(), 10)  # too small
    box = torch.tensor([[0.0, 0, 240, 240]])
    direction = torch.randn(6, 1, 1, generator=generator)
    features = direction * torch.nn.functional.avg_pool2d(object_[None].float(), 8)
    padded = torch.nn.functional.pad(features, (0, 3, 0, 5), value=9.0)  # as a batch is
    blind, found, beyond, scaled, off = (
        sharpen(image, blurred, box, settings, maps, 8)[0] > 0.5
        for settings, maps in (
            (Sharpening(), None),
            (Sharpening(), features),
            (Sharpening(), padded),
            (Sharpening(), 100 * features + 7),
            (Sharpening(compat_features=0), features),
        )
    )
    truth = torch.nn.functional.interpolate(object_[None, None].float(), size=found.shape, mode="area")[0, 0] > 0.5
    assert iou(blind, truth) < 0.6 and iou(found, truth) > 0.75
    assert torch.equal(found, beyond) and torch.equal(found, scaled) and torch.equal(blind, off)
    flat = sharpen(image, blurred, box, Sharpening(), torch.ones(6, 30, 30), 8)
    assert bool(torch.isfinite(flat).all())


def test_the_kernel_of_features_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    image, features = torch.rand(3, 4, 5, generator=generator), torch.rand(7, 4, 5, generator=generator)
    unary = torch.randn(2, 4, 5, generator=generator)
    settings = Sharpening(iterations=1, compat_gaussian=0, compat_bilateral=0)
    place = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")).flatten(1)
    values = features.flatten(1)
    spread = values.var(1, correction=0).sum().sqrt()
    apart = torch.cdist(place.T, place.T) ** 2 / (settings.sxy_bilateral**2 * 20)
    apart = apart + torch.cdist(values.T, values.T) ** 2 / (settings.sfeatures * spread) ** 2
    kernel = (-apart / 2).exp()
    kernel = kernel / (kernel.sum(0) * kernel.sum(1)[:, None]).sqrt()
    expected = unary + settings.compat_features * ((2 * unary.sigmoid() - 1).flatten(1) @ kernel).view_as(unary)
    torch.testing.assert_close(mean_field(image, unary, settings, features), expected, rtol=1e-4, atol=1e-4)


def test_a_small_mask_keeps_its_shape():
    image = torch.full((3, 240, 320), 0.5)
    boxes = torch.tensor([[100.0, 100, 124, 130]])
    masks = torch.full((1, 28, 28), 0.99)
    image[:, 100:130, 100:124] = 0.9
    found = sharpen(image, masks, boxes, Sharpening())[0] > 0.5
    y, x = torch.where(found)
    scale = torch.tensor([320 / found.shape[1], 240 / found.shape[0]] * 2)
    drawn = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])[None] * scale
    assert box_iou(drawn, boxes) > 0.85


def test_a_mask_in_doubt_takes_from_its_score():
    masks = torch.zeros(4, 6, 8)
    masks[0, 1:3], masks[1, 1:3], masks[1, 4:] = 1.0, 0.6, 0.49  # below one half nothing counts
    masks[2, 0, 0], masks[2, 0, 1] = 1.0, 0.8
    scores, labels = torch.tensor([0.5, 0.6, 0.5, 0.5]), torch.tensor([0, 1, 0, 0])
    found, order = rescore(scores, labels, masks, Sharpening())
    assert order.tolist() == [0, 2, 1, 3]
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5 * 0.81, 0.6 * 0.36, 0.0]))
    found, order = rescore(scores, labels, masks, PLAIN)
    assert torch.equal(found, scores[order]) and order[0] == 1
    assert [len(one) for one in rescore(scores[:0], labels[:0], masks[:0], Sharpening())] == [0, 0]


def test_matrix_nms_is_that_of_its_paper():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(12, 1, generator=generator) > torch.rand(12, 40, generator=generator)).float()
    masks[5] = masks[2]
    labels = torch.randint(0, 2, (12,), generator=generator)
    labels[5] = labels[2]
    overlap = np.zeros((12, 12))
    for i in range(12):
        for j in range(i + 1, 12):
            if labels[i] == labels[j]:
                overlap[i, j] = iou(masks[i] > 0, masks[j] > 0)
    expected = []
    for j in range(12):
        decays = [np.exp(-2 * overlap[i, j] ** 2) / np.exp(-2 * overlap[:i, i].max(initial=0) ** 2) for i in range(j)]
        expected.append(min([1.0, *decays]))
    found = matrix_nms(masks, labels, 2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert float(found[0]) == 1 and float(found[5]) < 1
    torch.testing.assert_close(matrix_nms(masks, labels, 5.0), found**2.5)  # a faster decay is a power of it
    assert matrix_nms(masks, labels, 0.0).tolist() == [1] * 12


def test_the_worse_of_two_that_share_their_pixels_decays():
    masks = torch.zeros(3, 4, 10)
    masks[:, :, :7] = 1
    masks[1, :, 7] = 1
    found, order = rescore(torch.tensor([0.8, 0.9, 0.7]), torch.tensor([3, 3, 4]), masks, Sharpening())
    assert order.tolist() == [1, 2, 0]  # the third is of another class
    torch.testing.assert_close(found, torch.tensor([0.9, 0.7, 0.8 * np.exp(-2 * (7 / 8) ** 2)]).float())


def test_an_object_that_its_box_cuts_off_is_followed_as_far_as_the_margin():
    image = torch.full((3, 240, 320), 0.4)
    image[:, 60:200, 100:220] = 0.8
    boxes, masks = torch.tensor([[100.0, 60, 220, 170]]), torch.full((1, 28, 28), 0.95)  # 30 rows less than the object
    reach = []
    for settings in (Sharpening(margin=0), Sharpening(), Sharpening(iterations=0)):
        found = sharpen(image, masks, boxes, settings)[0] > 0.5
        y, x = torch.where(found)
        scale = 240 / found.shape[0], 320 / found.shape[1]
        reach.append(float(y.max() + 1) * scale[0])
        assert float(x.min()) * scale[1] > 92 and float(x.max() + 1) * scale[1] < 228 and float(y.min()) * scale[0] > 52
    assert reach[0] == pytest.approx(170, abs=6) and reach[2] == pytest.approx(170, abs=6)
    assert reach[1] == pytest.approx(170 + 0.25 * 110, abs=6)


def test_a_coarser_grid_draws_masks_as_finely():
    sizes = [cells * pixels_per_cell(cells) ** 2 for cells in (1, 100, 512, 1024, 2048)]
    assert sizes[-1] == 2**15 and all(0.8 < size / sizes[-1] < 1.2 for size in sizes)
    assert pixels_per_cell(16_384) == 4


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (33, 21), (480, 640), (1000, 20)])
def test_photographs_of_every_shape(shape):
    cells = Sharpening().cells
    rows, columns = grid_size(*shape, cells)
    assert rows * columns <= 1.13 * cells
    masks, boxes = torch.rand(2, 28, 28), torch.tensor([[0, 0, shape[1], shape[0]], [0, 0, 0.5, 0.5]])
    found = sharpen(torch.rand(3, *shape), masks, boxes, Sharpening())
    k = pixels_per_cell(cells)
    assert found.shape == (2, rows * k, columns * k)
    assert bool(torch.isfinite(found).all()) and float(found.min()) >= 0 and float(found.max()) <= 1
    assert len(sharpen(torch.rand(3, *shape), masks[:0], boxes[:0].float(), Sharpening())) == 0


def test_a_grid_without_end_is_refused():
    with pytest.raises(InputError, match="cells must be"):
        replace(Sharpening(), cells=10**6)
