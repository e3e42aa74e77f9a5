"""The ranking: what the modules agree on and are sure of comes last."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labelpenet.cli import main
from labelpenet.data import TaggedImage, run_folder
from labelpenet.formats import open_tagged
from labelpenet.review.doubt import best_overlaps, doubt, rank
from labelpenet.training.inferred import Inferred, Rows, infer_all
from tests.report.test_html import square

SIZE = (40, 40)


def rows(*squares: tuple[int, int, int, float]) -> Rows:
    """Squares of 10 pixels a side: x, y, label, weight."""
    return [
        row
        for x, y, label, weight in squares
        for row in square(x, y, x + 10, y + 10, label, weight, SIZE).to_coco("a", [1, 2, 3])
    ]


def test_a_photograph_is_certain_where_all_modules_agree_and_are_sure() -> None:
    one = rows((0, 0, 0, 1.0), (20, 20, 1, 1.0))
    assert doubt((0, 1), one, [one, list(reversed(one))]) == pytest.approx(0)
    assert doubt((0, 1), one, []) == pytest.approx(0)
    assert doubt((), [], [one]) == 0


def test_disagreement_low_weights_and_tags_without_an_instance_each_raise_the_doubt() -> None:
    sure = rows((0, 0, 0, 1.0))
    half = rows((0, 5, 0, 1.0))  # IoU of 1/3
    assert doubt((0,), sure, [sure, half]) == pytest.approx(1 - ((1 + 1 / 3) / 2) ** 0.5)
    assert doubt((0,), rows((0, 0, 0, 0.25)), [sure]) == pytest.approx(0.5)
    assert doubt((0, 2), sure, [sure]) == pytest.approx(0.5)
    assert doubt((0,), [], [sure]) == 1
    other_class = rows((0, 0, 1, 1.0))
    assert doubt((0,), sure, [other_class]) == 1


def test_overlaps_are_those_of_masks_and_of_boxes_where_a_mask_is_missing() -> None:
    one, other = rows((0, 0, 0, 1.0)), rows((0, 5, 0, 1.0), (30, 30, 0, 1.0))
    np.testing.assert_allclose(best_overlaps(one, other), [1 / 3])
    without = [{key: value for key, value in row.items() if key != "segmentation"} for row in one]
    np.testing.assert_allclose(best_overlaps(without, other), [1 / 3])
    assert best_overlaps(one, []).tolist() == [0] and best_overlaps([], other).shape == (0,)


def test_what_a_module_could_not_label_is_no_disagreement() -> None:
    image, one = TaggedImage("a", Path("a"), (0,)), rows((0, 0, 0, 1.0))
    sure, other = Inferred({"a": one}, {"a": SIZE}, 3), Inferred({}, {"b": SIZE}, 3)
    assert rank([image], {1: other, 2: sure, 4: sure})[0][1] == pytest.approx(0)
    assert rank([image], {1: Inferred({}, {"a": SIZE}, 3), 4: sure})[0][1] == 1, "it found nothing"


def test_the_command_exports_the_most_doubtful_first_of_photographs_that_lie_elsewhere(tmp_path, capsys):
    rows = [{"id": n, "file_name": f"{n}.png", "height": 40, "width": 40} for n in (1, 2, 3)]
    found = [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 0} for n in (1, 2, 3)]
    categories = [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}]
    (tmp_path / "data").mkdir()
    data = tmp_path / "data" / "labels.json"
    data.write_text(json.dumps({"images": rows, "annotations": found, "categories": categories}))
    (tmp_path / "photographs").mkdir()
    for n in (1, 2, 3):
        Image.new("RGB", SIZE).save(tmp_path / "photographs" / f"{n}.png")
    images = open_tagged(data, images=tmp_path / "photographs")
    run, sure = tmp_path / "run", {"1.png": 0.9, "2.png": 0.2, "3.png": 0.5}
    for number in (1, 4):
        infer_all(
            run,
            f"module{number}",
            images,
            lambda some: ((image, square(0, 0, 9, 9, 0, sure[image.id], SIZE), "") for image in some),
        )
    labels, elsewhere = str(run_folder.instances(run, "module4")), ["--images", str(tmp_path / "photographs")]
    main(["export", labels, str(data), *elsewhere, "--top", "2", "--out", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out/annotations/instances_default.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["2.png", "3.png"]
    main(["evaluate", labels, str(data), *elsewhere])
    copy = tmp_path / "labels.json"
    copy.write_bytes(Path(labels).read_bytes())
    for wrong in ([str(copy), "--top", "2"], [labels, "--top", "0"]):
        with pytest.raises(SystemExit):
            main(["export", wrong[0], str(data), *elsewhere, *wrong[1:], "--out", str(tmp_path / "no")])
    said = capsys.readouterr().err.splitlines()[-2:]
    assert "give RUN/instances/module4.json" in said[0] and "--top must be from 1" in said[1]


def test_the_ranking_is_by_doubt_then_in_the_order_of_the_data_set() -> None:
    images = [TaggedImage(name, Path(name), (0,)) for name in ("sure", "none", "also none", "unsure", "not labelled")]
    sizes = dict.fromkeys(("sure", "none", "also none", "unsure"), SIZE)
    four = Inferred({"sure": rows((0, 0, 0, 1.0)), "unsure": rows((0, 0, 0, 0.5))}, sizes, 3)
    one = Inferred({"sure": rows((0, 0, 0, 1.0)), "unsure": rows((0, 1, 0, 1.0))}, sizes, 3)
    ranked = rank(images, {1: one, 4: four})
    assert [image.id for image, _ in ranked] == ["none", "also none", "unsure", "sure"]
