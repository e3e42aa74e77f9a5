"""A student's answers as its ONNX files give them, for `labelpenet evaluate`.

    python benchmarks/onnx_predict.py runs/student VOCdevkit/VOC2012 --split val --out onnx.json
    labelpenet evaluate onnx.json VOCdevkit/VOC2012 --split val

Two files are exported, for photographs that are wide and such that are high; each photograph goes to its own, scaled
and padded as `docs/onnx.md` shows. Needs pip install 'labelpenet[onnx]'.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from labelpenet.data import read_image
from labelpenet.data.files import check_outputs
from labelpenet.errors import InputError
from labelpenet.formats import open_annotated, write_predictions
from labelpenet.instances import Instances
from labelpenet.models.onnx import export_onnx
from labelpenet.models.student import Student
from labelpenet.progress import Progress


class OnnxStudent:
    """A student's ONNX file in ONNX Runtime.

    Args:
        student: what is exported; path: the file to write.
        size: (H, W) of the photographs that it takes; None as for `export_onnx`.
        threads: of the runtime.
    """

    def __init__(self, student: Student, path: Path, size: tuple[int, int] | None = None, threads: int = 1):
        import onnxruntime  # type: ignore[import-not-found, unused-ignore]

        self.size = export_onnx(student, path, size)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, pixels: np.ndarray) -> tuple[list[Any], tuple[int, int]]:
        """The file's outputs for a photograph (H, W, 3) uint8, and the (h, w) that it was scaled to."""
        height, width = self.size
        photo = Image.fromarray(pixels)
        scale = min(width / photo.width, height / photo.height)
        scaled = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
        canvas = Image.new("RGB", (width, height), (124, 124, 124))
        canvas.paste(photo.resize(scaled, Image.Resampling.BILINEAR))
        image = np.asarray(canvas, np.float32).transpose(2, 0, 1) / 255
        return self.session.run(None, {"image": image}), (scaled[1], scaled[0])

    def predict(self, pixels: np.ndarray) -> Instances:
        """The instances of a photograph (H, W, 3) uint8 in its pixels, best first, without what lies in the padding."""
        (boxes, labels, scores, masks), (h, w) = self.run(pixels)
        height, width = pixels.shape[:2]
        found = torch.from_numpy(boxes) * torch.tensor([width / w, height / h] * 2)
        found = torch.minimum(found.clamp(min=0), torch.tensor([width, height] * 2))
        inside = (found[:, 2:] > found[:, :2]).all(1)
        drawn = torch.from_numpy(masks)[inside, None, :h, :w].float()
        whole = interpolate(drawn, (height, width), mode="bilinear")[:, 0] > 0.5
        labels, scores = torch.from_numpy(labels)[inside], torch.from_numpy(scores)[inside]
        return Instances(found[inside], labels, scores, (height, width), whole)


def predict(run: Path, data: Path, split: str | None, out: Path, threads: int) -> None:
    """Writes what a student's ONNX files find in the photographs of a data set.

    Raises:
        InputError: no student, no annotated data set, or ``out`` cannot be written.
    """
    student = Student.from_run(run)
    images = open_annotated(data, split, student.classes).tagged
    with tempfile.TemporaryDirectory() as folder:
        wide = OnnxStudent(student, Path(folder) / "wide.onnx", threads=threads)
        high = OnnxStudent(student, Path(folder) / "high.onnx", wide.size[::-1], threads)
        with Progress("ONNX files answer", len(images.images), log=partial(print, file=sys.stderr)) as progress:

            def answers() -> Iterator[tuple[str, Instances]]:
                for image in progress.tracked(images.images):
                    pixels = read_image(image.path)
                    yield image.id, (wide if pixels.shape[1] >= pixels.shape[0] else high).predict(pixels)

            write_predictions(out, answers(), images, student.classes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="a folder of `labelpenet distill`")
    parser.add_argument("data", type=Path, help="the annotated data set")
    parser.add_argument("--split", default=None)
    parser.add_argument("--out", type=Path, required=True, help="the predictions to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    try:
        check_outputs([args.out], [args.student, args.data], args.overwrite)
        predict(args.student, args.data, args.split, args.out, args.threads)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
