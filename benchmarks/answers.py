"""How long an answer takes, photograph by photograph, and where the time goes.

    python benchmarks/answers.py runs/voc-animals runs/student VOCdevkit/VOC2012/JPEGImages --images 10 --threads 2

Module 4 with the vote of modules 1 and 2, module 4 alone, the student in torch, the student in ONNX Runtime (pip
install 'labelpenet[onnx]'), and torchvision's own Mask R-CNN (`maskrcnn_resnet50_fpn_v2` at its sides 800 to 1333,
random weights: only its time is measured). They take turns at each photograph, so that what else the machine does hits
all alike. Medians of milliseconds on the clock and of user + system time; the parts are shares of the latter, each
without what is inside others.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from onnx_predict import OnnxStudent  # beside this script
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

from labelpenet import models
from labelpenet.calibration import DenseCRF
from labelpenet.config import MODULES
from labelpenet.data import read_image
from labelpenet.data.images import find_images
from labelpenet.models.cascade import LabelPEnet
from labelpenet.models.student import Student

Answer = Callable[[np.ndarray], Any]
Place = tuple[Any, str]
"""A function that is looked up on its owner each time it is called."""


def processor_seconds() -> float:
    """User + system time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Parts:
    """Seconds by named part, each without those of the parts inside it.

    Args:
        now: the clock.
    """

    def __init__(self, now: Callable[[], float] = processor_seconds):
        self.now, self.seconds, self._inside = now, defaultdict[str, float](float), [0.0]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to a part."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole, inside = self.now() - began, self._inside.pop()
                self.seconds[name] += whole - inside
                self._inside[-1] += whole

        return call

    @contextmanager
    def watch(self, places: dict[str, Sequence[Place]]) -> Iterator[None]:
        """Times these functions while it lasts."""
        with ExitStack() as stack:
            for name, found in places.items():
                for owner, attribute in found:
                    stack.enter_context(patch.object(owner, attribute, self.timed(name, getattr(owner, attribute))))
            yield


@dataclass
class Contender:
    """One way to an answer.

    Attributes:
        name: of it; answer: from pixels (H, W, 3) to instances; places: the functions whose time is told apart.
        wall, processor: seconds of each answer so far; parts: processor seconds by part.
    """

    name: str
    answer: Answer
    places: dict[str, Sequence[Place]] = field(default_factory=dict)
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    parts: Parts = field(default_factory=Parts)

    def ask(self, pixels: np.ndarray) -> None:
        """One answer, timed."""
        with self.parts.watch(self.places), torch.no_grad():
            wall, processor = time.perf_counter(), processor_seconds()
            self.answer(pixels)
            self.wall.append(time.perf_counter() - wall)
            self.processor.append(processor_seconds() - processor)

    def row(self) -> str:
        """The contender's line of the table."""
        whole = sum(self.processor)
        shares = {name: seconds / whole for name, seconds in self.parts.seconds.items()}
        told = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda one: -one[1]))
        rest = f", other {1 - sum(shares.values()):.0%}" if shares else ""
        wall, processor = (1000 * statistics.median(one) for one in (self.wall, self.processor))
        return f"| {self.name} | {wall:.0f} | {processor:.0f} | {told}{rest} |"


def cascade(network: LabelPEnet, vote: bool) -> Contender:
    """Module 4 of a cascade."""
    module = network.segmentation
    settings = replace(module.settings, predict=replace(module.settings.predict, vote=vote))

    def answer(pixels: np.ndarray) -> Any:
        module.settings = settings
        return network.predict(pixels)

    heads: list[Place] = [(getattr(network, name).head, "forward") for name in MODULES]
    places: dict[str, Sequence[Place]] = {
        "stem": [(network, "stem_maps")],
        "RPN": [(module, "propose")],
        "RoI head": heads[3:],
        "masks": [(module, "mask_features"), (module, "masks")],
        "dense CRF": [(DenseCRF, "__init__"), (DenseCRF, "__call__")],
    }
    if vote:
        places["RoI heads that vote"] = heads[:2]
    return Contender(f"module 4{' with vote' if vote else ''}", answer, places)


def mask_rcnn(name: str, network: Any, answer: Answer) -> Contender:
    """A network of torchvision's kind."""
    heads = network.roi_heads
    boxes = [(heads.box_roi_pool, "forward"), (heads.box_head, "forward"), (heads.box_predictor, "forward")]
    masks = [(heads.mask_roi_pool, "forward"), (heads.mask_head, "forward"), (heads.mask_predictor, "forward")]
    backbone = [(network.backbone.body, "forward"), (network.backbone.fpn, "forward")]
    places = {"backbone": backbone, "RPN": [(network.rpn, "forward")], "RoI head": boxes}
    drawing = [(network.transform, "postprocess"), (models.student, "sharpen"), (models.student, "to_instances")]
    return Contender(name, answer, {**places, "masks": masks, "drawing masks": drawing})


def in_onnxruntime(student: Student, folder: Path, threads: int) -> Contender:
    """The student's ONNX file, photographs scaled and padded to its size as `docs/onnx.md` shows."""
    exported = OnnxStudent(student, folder / "student.onnx", threads=threads)
    height, width = exported.size
    return Contender(f"student in ONNX Runtime ({height} x {width})", exported.run)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("student", type=Path, nargs="?", help="a folder of `labelpenet distill`; left out without")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    network = LabelPEnet.from_run(args.run)
    contenders = [cascade(network, True), cascade(network, False)]
    found = find_images([args.photos])
    photos = [read_image(path) for _, path in found[:: max(1, len(found) // args.images)][: args.images]]
    with tempfile.TemporaryDirectory() as folder:
        if args.student is not None:
            student = Student.from_run(args.student)
            contenders.append(mask_rcnn("student in torch", student.network, student.predict))
            contenders.append(in_onnxruntime(student, Path(folder), args.threads))
        standard = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).eval()

        def answer(pixels: np.ndarray) -> Any:
            return standard([torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255])

        contenders.append(mask_rcnn("torchvision's maskrcnn_resnet50_fpn_v2", standard, answer))
        for one in contenders:  # a first time costs more
            one.answer(photos[0])
        for pixels in photos:
            for one in contenders:
                one.ask(pixels)
    sides = sorted({f"{one.shape[1]} x {one.shape[0]}" for one in photos})
    print(f"{len(photos)} photographs ({sides[0]} to {sides[-1]}), {args.threads} threads, torch {torch.__version__}\n")
    print("| | ms a photograph | processor ms | where the time goes |\n|---|---|---|---|")
    for one in contenders:
        print(one.row())


if __name__ == "__main__":
    main()
