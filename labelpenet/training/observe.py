"""What a run shows of itself while it trains: pictures of a few training images, and figures of a held-out split.

Nothing here moves a weight: modules infer as they do at inference, without gradients, and find themselves in the mode
in which they were; the loop seeds every pass anew, so that nothing drawn here could reach it either.

The held-out split's boxes and masks are seen by the `Observer` alone. What trains, `Training`, has no way to it.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from labelpenet.data.dataset import AnnotatedImages, TaggedImage, TaggedImages
from labelpenet.data.images import read_image
from labelpenet.engine.distributed import gather
from labelpenet.engine.log import MetricsLog, read_metrics
from labelpenet.engine.sampler import stream_seed
from labelpenet.engine.stage import Stage
from labelpenet.errors import InputError
from labelpenet.evaluation import evaluate
from labelpenet.instances import Instances
from labelpenet.models.layers import evaluating
from labelpenet.training.inferred import Inferred
from labelpenet.training.photographs import find_instances
from labelpenet.training.predict import predict_photographs
from labelpenet.training.pretrain import Boxes, Training
from labelpenet.visualize import draw_instances

PICTURES = 4  # training images that are shown
PART = 40  # images of the held-out split that are measured within a stage

# One image's predictions: id, size (H, W) and COCO rows.
_Line = tuple[str, tuple[int, int], list[dict[str, Any]]]


def check_held_out(images: TaggedImages, annotated: AnnotatedImages | None) -> None:
    """Refuses to measure on images that are trained on, or of other classes; None is to measure on none."""
    if annotated is None:
        return
    trained = {image.path.resolve() for image in images.images}
    shared = [image.id for image in annotated.tagged.images if image.path.resolve() in trained]
    if shared:
        raise InputError(
            f"{len(shared)} of the {len(annotated.tagged.images)} images to --evaluate on are trained on, such as "
            f"{shared[0]}; choose a split that shares no image with --split"
        )
    if annotated.tagged.classes != images.classes:
        raise InputError("the split to --evaluate on has other classes than the one to train on; choose with --classes")


class Observer:
    """Shows what the modules believe while they are trained, in TensorBoard and ``RUN/metrics.jsonl``.

    Pictures are of `PICTURES` training images that the seed chooses, with what a module infers for them from their
    tags. Figures are of the held-out split, on which a module predicts as it does on those of a user: ``val_part/...``
    of `PART` images every few minutes, ``val/...`` of all images once a stage is done: ``box_mAP@0.5`` and
    ``mask_mAP@0.5``, fractions in [0, 1] by protocol ``voc12``, and ``images``, their number.

    Args:
        training: the run; its network may still be replaced.
        minutes: between two looks.
        held_out: images that are not trained on, to measure on; None to show pictures alone.
        proposals: of the held-out images, by image id.
    """

    def __init__(
        self,
        training: Training,
        minutes: float = 5.0,
        held_out: AnnotatedImages | None = None,
        proposals: Boxes | None = None,
    ) -> None:
        self.training, self.minutes, self.held_out, self.proposals = training, minutes, held_out, proposals or {}
        tagged = [index for index, image in enumerate(training.images.images) if image.tags]
        self.shown = self._choose(tagged, PICTURES)
        count = 0 if held_out is None else len(held_out.tagged.images)
        self.part = self._choose(range(count), PART)

    def watch(self, stage: Stage, numbers: Sequence[int]) -> Stage:
        """The stage, with a look every few minutes at the modules ``numbers``; the last one is measured."""
        return replace(stage, observe=partial(self.look, numbers), observe_minutes=self.minutes)

    def look(self, numbers: Sequence[int], step: int, metrics: MetricsLog) -> None:
        """Pictures of every module in ``numbers`` and, of the last one, the figures of a part of the held-out split."""
        with evaluating(self.training.network):
            self._draw(numbers, step, metrics)
            if self.held_out is not None:
                lines = list(self._predict(numbers[-1], self.part))
                metrics.write({"step": step, **self._measure("val_part", lines, self.part)})

    def conclude(self, stage: Stage, numbers: Sequence[int]) -> None:
        """As `look`, for a stage that is done, and with the figures of all held-out images; called by all processes.

        The work is shared by the processes. It may be repeated, after an interruption.
        """
        fabric = self.training.fabric
        lines: list[_Line] = []
        with evaluating(self.training.network):
            if self.held_out is not None:
                count = len(self.held_out.tagged.images)
                own = list(self._predict(numbers[-1], range(fabric.global_rank, count, fabric.world_size)))
                lines = [line for share in gather(fabric.world_size, own) for line in share]
            if fabric.global_rank:
                return
            rows = [row for row in read_metrics(self.training.run) if row.get("stage") == stage.name]
            rows = [row for row in rows if "val/images" not in row]
            metrics = MetricsLog(self.training.run, stage.name, rows, stage.steps)
            with contextlib.closing(metrics):
                self._draw(numbers, stage.steps, metrics)
                if self.held_out is not None:
                    part = self._measure("val_part", lines, self.part)
                    whole = self._measure("val", lines, range(count))
                    metrics.write({"step": stage.steps, **part, **whole})

    def _choose(self, indices: Sequence[int], count: int) -> list[int]:
        """So many of the indices, the same ones in every run of this seed."""
        generator = random.Random(stream_seed(self.training.options.seed, "observe", 0))
        return sorted(generator.sample(list(indices), min(count, len(indices))))

    def _draw(self, numbers: Sequence[int], step: int, metrics: MetricsLog) -> None:
        training = self.training
        for index in self.shown:
            image = training.images.images[index]
            try:
                pixels = read_image(image.path)
            except InputError:  # whoever loads it for training says so
                continue
            for number in numbers:
                (found,) = training.infer(number, [image], [pixels])
                picture = draw_instances(pixels, found, training.images.classes)
                metrics.picture(f"module{number}/{image.id}", picture, step)

    def _predict(self, number: int, indices: Sequence[int]) -> Iterator[_Line]:
        """What module ``number`` predicts for held-out images; an image that cannot be read is left out."""
        training = self.training
        assert self.held_out is not None
        network, images = training.network, self.held_out.tagged.images

        def infer(images: Sequence[TaggedImage], pixels: Sequence[np.ndarray]) -> list[Instances]:
            return predict_photographs(network, images, pixels, number, self.proposals, training.fabric)

        chosen = [images[index] for index in indices]
        with contextlib.closing(find_instances(infer, chosen, network.input_size, training.fabric.device)) as answers:
            for image, found, _ in answers:
                if found is not None:
                    yield image.id, found.image_size, found.to_coco(image.id)

    def _measure(self, name: str, lines: Sequence[_Line], indices: Sequence[int]) -> dict[str, float]:
        """Figures of the held-out images ``indices``, of which ``lines`` hold the predictions."""
        assert self.held_out is not None
        classes, part = self.training.images.classes, {self.held_out.tagged.images[index].id for index in indices}
        measured = part.intersection(line[0] for line in lines)
        if not measured:
            return {f"{name}/images": 0}
        truths, _ = self.held_out.where(lambda image: image.id in measured).readable_truths()
        found = Inferred({line[0]: line[2] for line in lines}, {line[0]: line[1] for line in lines}, len(classes))
        result = evaluate(found, truths, classes, "voc12")
        figures: dict[str, float] = {f"{name}/images": len(truths)}
        if "box" in result:
            figures[f"{name}/box_mAP@0.5"] = result["box"]["mAP"]
        if "mask" in result:
            figures[f"{name}/mask_mAP@0.5"] = result["mask"]["mAP@0.5"]
        return figures
