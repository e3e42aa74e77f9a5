"""A trained run applied to many photographs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.images import read_image
from labelpenet.errors import InputError
from labelpenet.instances import Instances
from labelpenet.models.cascade import LabelPEnet, read_run
from labelpenet.training.logging import Progress
from labelpenet.training.machine import build_fabric, map_images
from labelpenet.training.pretrain import Boxes


class Predictor:
    """The cascade of a run folder on a device, in the precision that it was trained in where the device has it."""

    def __init__(self, run: Path, device: str = "auto"):
        read_run(run)
        self.fabric = build_fabric(device)
        self.network = LabelPEnet.from_run(run, self.fabric.device)

    def one(self, image: TaggedImage, module: int, boxes: Boxes | None = None) -> Instances:
        """The instances of one photograph, best first.

        Args:
            boxes: its proposals, computed before; None to compute them where the module needs them.
        """
        pixels = read_image(image.path)
        proposals = None
        if boxes is not None and image.id in boxes and self.network.needs_proposals(module):
            proposals = self.network.select(torch.from_numpy(boxes[image.id].copy()), pixels.shape)
        with self.fabric.autocast():
            return self.network.predict(pixels, module, proposals)

    def run(
        self, images: Sequence[TaggedImage], module: int, skipped: list[str], boxes: Boxes | None = None
    ) -> Iterator[tuple[TaggedImage, Instances]]:
        """One photograph after the other; a bad one is reported, its id added to ``skipped``, and left out."""
        self.network.require(module)

        def attempt(image: TaggedImage) -> tuple[TaggedImage, Instances | None, str]:
            try:
                return image, self.one(image, module, boxes), ""
            except InputError as error:
                return image, None, f"skipped: {error}"

        with (
            Progress(f"module {module} predicts", len(images), 0) as progress,
            contextlib.closing(map_images(attempt, images, self.fabric.device)) as results,
        ):
            for done, (image, found, note) in enumerate(results):
                if found is None:
                    progress.say(note)
                    skipped.append(image.id)
                    continue
                yield image, found
                progress.show(done + 1, {})
