"""What overlays change, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from labelpenet.errors import InputError
from labelpenet.instances import Instances
from labelpenet.visualize import (
    PALETTE,
    draw_boxes,
    draw_instances,
    draw_map,
    draw_mask,
    instance_colours,
    overlay_paths,
    write_overlay,
)


def photograph(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blobs(height: int, width: int, labels: list[int], weights: list[float] | None = None) -> Instances:
    """Discs inside boxes that are a little larger than they."""
    masks = torch.zeros(len(labels), height, width, dtype=torch.bool)
    boxes = torch.zeros(len(labels), 4)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    radius = max(1, min(height, width) // 6)
    for index in range(len(labels)):
        cx, cy = (index + 1) * width // (len(labels) + 1), height // 2
        masks[index] = (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
        box = [cx - radius - 2, cy - radius - 2, cx + radius + 3, cy + radius + 3]
        boxes[index] = torch.tensor([max(0, box[0]), max(0, box[1]), min(width, box[2]), min(height, box[3])])
    scores = torch.tensor(weights) if weights is not None else torch.ones(len(labels))
    return Instances(boxes, torch.tensor(labels, dtype=torch.long), scores, (height, width), masks)


def frame(box: list[float], shape: tuple[int, ...]) -> np.ndarray:
    inside = np.zeros(shape[:2], bool)
    x1, y1, x2, y2 = (round(value) for value in box)
    inside[y1:y2, x1:x2] = True
    return inside


def test_a_doubtful_instance_is_a_box_alone() -> None:
    image, size = photograph(60, 80), (60, 80)
    found = blobs(*size, [0, 1], [0.0, 0.5])
    boxes = replace(found, masks=None)
    assert np.array_equal(draw_instances(image, found[:1]), draw_instances(image, boxes[:1]))
    assert not np.array_equal(draw_instances(image, found[1:]), draw_instances(image, boxes[1:]))


@pytest.mark.parametrize("size", [(120, 160), (161, 97), (33, 200), (1, 1), (2, 7), (700, 501)])
def test_only_masks_and_box_lines_change_where_no_label_is_written(size: tuple[int, int]) -> None:
    image = photograph(*size)
    found = blobs(*size, [0, 1])
    before = image.copy()
    drawn = draw_instances(image, found)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert np.array_equal(image, before)  # the argument is left alone
    assert found.masks is not None
    touched = found.masks.any(0).numpy()
    for box in found.boxes.tolist():
        touched |= frame(box, image.shape)
    assert np.array_equal(drawn[~touched], image[~touched])


def test_inside_a_mask_the_colour_of_its_instance_comes_nearer() -> None:
    image = photograph(120, 160)
    found = blobs(120, 160, [2, 5])
    drawn = draw_instances(image, found).astype(int)
    colours = instance_colours([2, 5]).astype(int)
    assert found.masks is not None
    for mask, colour in zip(found.masks.numpy(), colours, strict=True):
        old, new = np.abs(image[mask].astype(int) - colour).sum(1), np.abs(drawn[mask] - colour).sum(1)
        assert (new <= old + 3).all() and new.mean() < 0.7 * old.mean()
        assert (drawn[mask] == colour).all(1).any()  # the contour is opaque


def test_box_lines_lie_inside_the_box_and_are_opaque() -> None:
    image = photograph(200, 300)
    found = Instances(torch.tensor([[20.0, 30, 220, 150]]), torch.tensor([3]), torch.ones(1), (200, 300))
    drawn = draw_instances(image, found)
    changed = (drawn != image).any(2)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (30, 150, 20, 220)
    assert (drawn[30, 20:220] == instance_colours([3])[0]).all()
    assert np.array_equal(drawn[60:120, 60:180], image[60:120, 60:180])


def test_a_label_stays_small_and_inside_the_image() -> None:
    image = np.full((150, 200, 3), 128, np.uint8)
    found = Instances(torch.tensor([[150.0, 0, 200, 20]]), torch.tensor([0]), torch.tensor([0.37]), (150, 200))
    bare, written = draw_instances(image, found), draw_instances(image, found, ["a <b> & Köter"])
    changed = (bare != written).any(2)
    assert changed.any() and changed.mean() < 0.2
    assert not changed[60:].any()


@pytest.mark.parametrize("name", ["", "日本", "two\nlines\t", "x" * 300, "🐕"])
def test_any_class_name_can_be_written(name: str) -> None:
    assert draw_instances(photograph(90, 130), blobs(90, 130, [0]), [name]).shape == (90, 130, 3)


def test_a_smaller_score_than_asked_for_is_not_drawn() -> None:
    image = photograph(100, 150)
    found = blobs(100, 150, [0, 1], [0.2, 0.9])
    assert np.array_equal(draw_instances(image, found, ["a", "b"], 0.5), draw_instances(image, found[[1]], ["a", "b"]))
    assert np.array_equal(draw_instances(image, found, ["a", "b"], 0.95), image)


def test_the_better_instance_lies_on_top() -> None:
    image = photograph(60, 60)
    mask = torch.zeros(2, 60, 60, dtype=torch.bool)
    mask[:, 10:50, 10:50] = True
    boxes = torch.tensor([[10.0, 10, 50, 50]]).repeat(2, 1)
    for weights, top in (([0.9, 0.1], 0), ([0.1, 0.9], 1)):
        found = Instances(boxes, torch.tensor([0, 1]), torch.tensor(weights), (60, 60), mask)
        assert (draw_instances(image, found)[10, 10] == PALETTE[top]).all()


def test_no_instance_changes_nothing() -> None:
    image = photograph(50, 70)
    assert np.array_equal(draw_instances(image, Instances.empty((50, 70)), ["a"]), image)
    assert np.array_equal(draw_instances(image, Instances.empty((50, 70), with_masks=True), ["a"]), image)
    assert np.array_equal(draw_boxes(image, np.zeros((0, 4))), image)
    assert np.array_equal(draw_mask(image, np.zeros((50, 70), bool)), image)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="image must be"):
        draw_instances(photograph(50, 70), Instances.empty((70, 50)))
    with pytest.raises(ValueError, match="uint8"):
        draw_map(np.zeros((5, 5, 3), np.float32), np.zeros((5, 5)))
    with pytest.raises(ValueError, match="mask must be"):
        draw_mask(photograph(50, 70), np.zeros((70, 50), bool))


def test_instances_of_one_class_and_classes_differ_in_colour() -> None:
    colours = {tuple(colour) for colour in instance_colours([0, 1, 2, 3, 4, 5, 6]).tolist()}
    assert colours == set(PALETTE)
    assert len({tuple(colour) for colour in instance_colours([4, 4, 4]).tolist()}) == 3
    assert len({tuple(colour) for colour in instance_colours(list(range(20))).tolist()}) == 20


def test_boxes_change_their_lines_alone_and_only_the_first_ones() -> None:
    image = photograph(80, 90)
    boxes = torch.tensor([[5.0, 5, 40, 40], [50.0, 50, 95, 90], [0.0, 60, 20, 70]])
    drawn = draw_boxes(image, boxes, limit=2)
    changed = (drawn != image).any(2)
    assert changed[5, 5:40].all() and changed[50, 50:].all()
    assert not changed[60:70, 0:20].any() and not changed[10:35, 10:35].any()


def test_map_grows_brighter_with_its_values_and_is_resized() -> None:
    image = np.full((40, 60, 3), 100, np.uint8)
    drawn = draw_map(image, np.tile(np.linspace(0, 1, 12), (7, 1)))
    assert drawn.shape == image.shape
    brightness = drawn.astype(float).sum((0, 2))
    assert (np.diff(brightness) >= 0).all() and brightness[-1] > 2 * brightness[0]
    assert np.array_equal(draw_map(image, np.array([[np.nan, -3.0]])), draw_map(image, np.zeros((1, 2))))
    assert np.array_equal(draw_map(image, torch.ones(2, 2) * 9), draw_map(image, torch.ones(2, 2)))
    assert np.array_equal(draw_map(image, np.zeros((0, 0))), draw_map(image, np.zeros((3, 3))))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2008_000001", "2008_000001.jpg"),
        ("a/b.png", "a/b.png"),
        ("a/b.PNG", "a/b.PNG"),
        ("x.bmp", "x.bmp.jpg"),
        ("../../etc/x.jpg", "etc/x.jpg"),
        ("/root/x.jpg", "root/x.jpg"),
        ("C:\\photos\\x.jpeg", "photos/x.jpeg"),
        ("", "unnamed.jpg"),
        ("..", "unnamed.jpg"),
    ],
)
def test_an_overlay_mirrors_the_name_of_its_image_and_stays_in_the_folder(name: str, expected: str) -> None:
    assert overlay_paths(Path("out"), [name]) == {name: Path("out", expected)}


def test_every_image_has_an_overlay_of_its_own(tmp_path: Path) -> None:
    names = ["a.tif", "a.tif.jpg", "../a.tif.jpg", "A.TIF.JPG", "b/c.png"]
    paths = overlay_paths(tmp_path, names)
    assert list(paths) == names
    assert [path.relative_to(tmp_path).as_posix() for path in paths.values()] == [
        "a.tif.jpg", "a.tif-2.jpg", "a.tif-3.jpg", "A.TIF-4.JPG", "b/c.png"
    ]  # fmt: skip
    assert len({str(path).casefold() for path in paths.values()}) == len(names)


def test_no_overlay_follows_a_link_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cats").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leaves"):
        overlay_paths(tmp_path / "out", ["cats/one.png"])


def test_an_overlay_is_written_whole_and_can_be_read(tmp_path: Path) -> None:
    image, found = photograph(60, 80), blobs(60, 80, [0])
    path = write_overlay(tmp_path / "new" / "cats" / "one.png", image, found, ["cat"])
    assert path == tmp_path / "new" / "cats" / "one.png"
    with Image.open(path) as read:
        assert np.array_equal(np.array(read), draw_instances(image, found, ["cat"]))
    with Image.open(write_overlay(tmp_path / "new" / "two.jpg", image, found, ["cat"])) as read:
        assert (read.format, read.size) == ("JPEG", (80, 60))
    assert sorted(file.name for file in (tmp_path / "new").rglob("*") if file.is_file()) == ["one.png", "two.jpg"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file"):
        write_overlay(tmp_path / "file" / "x.jpg", photograph(20, 20), Instances.empty((20, 20)), ["a"])
    assert (tmp_path / "file").read_text() == "in the way"
