"""A student in ONNX Runtime: the same answers as in torch, also by the page that shows how, without torch."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import labelpenet
from labelpenet import cli, config
from labelpenet.calibration.calibrate import enclosing_boxes, resize_masks
from labelpenet.data.images import read_image
from labelpenet.errors import InputError
from labelpenet.instances import masks_to_boxes
from labelpenet.models.onnx import Fixed, export_onnx, parse_size, survivors, tight_boxes
from labelpenet.models.student import Student, build_body
from tests.students import SIDE, small_student

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "voc-animals" / "VOCdevkit" / "VOC2012" / "JPEGImages"


def pixels(photo: Path) -> torch.Tensor:
    return torch.from_numpy(read_image(photo).copy()).permute(2, 0, 1).float() / 255


@torch.no_grad()
def assert_the_same(student: Student, image: torch.Tensor, answer) -> int:
    boxes, labels, scores, masks = (torch.as_tensor(one) for one in answer)
    expected = student.answer(image)
    assert len(boxes) == len(expected[0])
    torch.testing.assert_close(scores, expected[2], rtol=0, atol=1e-3)
    assert torch.equal(labels.sort()[0], expected[1].sort()[0])
    assert masks.shape == (len(boxes), *image.shape[1:])
    if not len(boxes):
        return 0
    gaps = (expected[2][:-1] - expected[2][1:] > 1e-5).tolist()
    # which of two equal scores comes first is not certain
    certain = torch.tensor([all(gaps[max(i - 1, 0) : i + 1]) for i in range(len(boxes))])
    boxes, labels, masks, expected = boxes[certain], labels[certain], masks[certain], [one[certain] for one in expected]
    assert len(labels) >= 0.2 * len(scores) and torch.equal(labels, expected[1])
    drawn = resize_masks(expected[3], tuple(image.shape[1:]))
    for mask, one in zip(masks, drawn, strict=True):
        assert (mask & one).sum() >= 0.99 * (mask | one).sum()
    some = drawn.any(2).any(1)
    reaching = enclosing_boxes(expected[0][some], masks_to_boxes(drawn[some]))
    torch.testing.assert_close(boxes[some], reaching, rtol=0, atol=0.1)
    torch.testing.assert_close(boxes[~some], expected[0][~some], rtol=0, atol=0.1)
    return len(scores)


@functools.cache
def exported() -> Path:
    path = Path(tempfile.mkdtemp(prefix="labelpenet-onnx")) / "student.onnx"
    with contextlib.redirect_stderr(io.StringIO()) as said:
        cli.main(["export", str(small_student()[0]), "--to", "onnx", "--out", str(path), "--size", f"{SIDE}x{SIDE}"])
    assert not said.getvalue()  # torch.export would print its graphs
    return path


def test_onnx_runtime_answers_as_torch_does_on_scenes():
    runtime = pytest.importorskip("onnxruntime")
    folder, year = small_student()
    student = labelpenet.load(folder)
    session = runtime.InferenceSession(exported(), providers=["CPUExecutionProvider"])
    found = 0
    for photo in sorted(Path(year, "JPEGImages").glob("*.jpg"))[:8]:
        image = pixels(photo)
        found += assert_the_same(student, image, session.run(None, {"image": image.numpy()}))
    assert found > 20


@pytest.mark.parametrize(("objectness", "found"), [(0.2, 20), (1.0, 0)])  # of an untaught RPN's boxes all, and none
def test_a_roi_head_of_pretrained_stages_answers_in_onnx_runtime_as_in_torch(tmp_path, objectness, found):
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    choices = ["network.mask_depth=1", "network.detections=20", "images.test_side=64"]
    choices.append(f"network.objectness={objectness}")
    body, normalisation = build_body("mobilenet_v2", pretrained=False)
    recipe = config.override(config.StudentRecipe(), choices)
    student = Student(body, ("a", "b"), recipe, "mobilenet_v2", normalisation)
    export_onnx(student, tmp_path / "student.onnx", (64, 96))
    session = runtime.InferenceSession(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    image = torch.rand(3, 64, 96)
    assert assert_the_same(student, image, session.run(None, {"image": image.numpy()})) == found


@pytest.mark.photographs
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not beside the project")
def test_onnx_runtime_answers_as_torch_does_on_photographs():
    runtime = pytest.importorskip("onnxruntime")
    folder, _ = small_student()
    student = labelpenet.load(folder)
    session = runtime.InferenceSession(exported(), providers=["CPUExecutionProvider"])
    for photo in sorted(PHOTOGRAPHS.glob("*.jpg"))[:6]:
        whole = pixels(photo)[None]
        image = torch.nn.functional.interpolate(whole, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0]
        assert_the_same(student, image, session.run(None, {"image": image.numpy()}))


def test_boxes_around_masks_are_those_of_instances_and_an_empty_mask_widens_none():
    masks = torch.zeros(4, 7, 11, dtype=torch.bool)
    masks[0, 2:5, 3:10] = masks[1] = masks[2, 6, 0] = True
    assert torch.equal(tight_boxes(masks)[:3], masks_to_boxes(masks[:3]))
    box = torch.tensor([[2.5, 1, 4, 6]])
    assert torch.equal(enclosing_boxes(box, tight_boxes(masks)[3:]), box)
    assert tight_boxes(masks[:0]).shape == (0, 4)


def test_the_page_runs_without_torch(tmp_path):
    pytest.importorskip("onnxruntime")
    folder, year = small_student()
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text(), re.DOTALL)[1]
    photo = min(Path(year, "JPEGImages").glob("*.jpg"))
    code = code.replace("student.onnx", str(exported()))
    flat = tmp_path / "flat.png"
    Image.new("RGB", (1200, 1)).save(flat)
    for path in (flat, photo):
        script = f"import sys\nsys.modules['torch'] = sys.modules['labelpenet'] = None\n{code}"
        script = script.replace("photo.jpg", str(path))
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    student = labelpenet.load(folder)
    best = student.predict(photo)[0]
    assert run.stdout.startswith(student.classes[int(best.labels)])
    assert f" {round(float(best.weights), 2)} " in run.stdout.splitlines()[0]


def test_nothing_found_is_no_error():
    student = labelpenet.load(small_student()[0])
    student.network.roi_heads.score_thresh = 1.0
    boxes, labels, scores, masks = Fixed(student, (SIDE, SIDE))(torch.zeros(3, SIDE, SIDE))
    assert (len(boxes), len(labels), len(scores), masks.shape) == (0, 0, 0, (0, SIDE, SIDE))


def test_survivors_are_the_best_of_each_group():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [5, 5, 5, 9.0]])
    scores = survivors(boxes, torch.tensor([0.5, 0.9, 0.4, 0.8]), torch.tensor([0, 0, 1, 0]), 0.5, 1.0, 10)
    assert scores.tolist() == pytest.approx([-1, 0.9, 0.4, -1])


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    assert parse_size("480x640") == (480, 640) and parse_size(None) is None
    for text in ("480", "x", "-1x5", "²x96", "320000x320000"):
        with pytest.raises(InputError, match="480x640"):
            parse_size(text)
    student = labelpenet.load(small_student()[0])
    with pytest.raises(InputError, match="multiples of 32"):
        export_onnx(student, tmp_path / "student.onnx", (100, 96))
    assert not list(tmp_path.iterdir())
