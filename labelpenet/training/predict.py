"""A trained run applied to many photographs, by one process or shared by many."""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.proposals import compute_proposals
from labelpenet.engine.distributed import build_fabric, gather, peers, together
from labelpenet.errors import InputError
from labelpenet.formats import read_predictions, write_predictions
from labelpenet.instances import Instances
from labelpenet.models.cascade import LabelPEnet, read_run
from labelpenet.models.student import Student, load
from labelpenet.progress import Progress, silent
from labelpenet.training.photographs import Answer, find_instances
from labelpenet.training.pretrain import Boxes

_log = logging.getLogger(__name__)


class Predictor:
    """The cascade or student of a run folder on a device, in the precision that ``auto`` stands for there.

    ``device, devices, nodes`` are as `build_fabric` takes them. With ``tagged`` the photographs' tags are known, and
    they are labelled as training photographs are.
    """

    def __init__(self, run: Path, device: str = "auto", devices: int = 1, nodes: int = 1, tagged: bool = False):
        read_run(run)
        self.tagged = tagged
        self.fabric = build_fabric(device, devices, nodes)
        self.network = load(run, self.fabric.device)

    @property
    def cascade(self) -> LabelPEnet:
        """The network, where it is no student."""
        if isinstance(self.network, Student):
            raise InputError("this needs the modules of a cascade, but the folder holds a student")
        return self.network

    @property
    def first(self) -> bool:
        """Whether this is the first process, the one that speaks for all."""
        return self.fabric.global_rank == 0

    def find(
        self, images: Sequence[TaggedImage], module: int, boxes: Boxes | None = None
    ) -> Generator[Answer, None, None]:
        """The instances of each photograph, best first, in order (`find_instances`). Its proposals in ``boxes`` were
        computed before; without them they are computed now, where the module needs them.
        """

        def infer(some: Sequence[TaggedImage], pixels: Sequence[np.ndarray]) -> list[Instances]:
            return predict_photographs(self.network, some, pixels, module, boxes or {}, self.fabric, self.tagged)

        return find_instances(infer, images, self.network.input_size, self.fabric.device)

    def run(
        self, images: Sequence[TaggedImage], module: int, skipped: list[str], boxes: Boxes | None = None
    ) -> Iterator[tuple[TaggedImage, Instances]]:
        """One photograph after the other; a bad one is reported, its id added to ``skipped``, and left out."""
        self.network.require(module)

        work = "predicting" if isinstance(self.network, Student) else f"module {module} predicts"
        with (
            Progress(work, len(images), 0, None if self.first else silent) as progress,
            contextlib.closing(self.find(images, module, boxes)) as answers,
        ):
            for image, found, note in progress.tracked(answers):
                if found is not None:
                    yield image, found
                    continue
                progress.say(note) if self.first else _log.warning("%s", note)
                skipped.append(image.id)

    def proposals(self, images: Sequence[TaggedImage], module: int, cache: Path | None = None) -> Boxes | None:
        """The photographs' proposals, on all of this process's cores; None where the module needs none."""
        if isinstance(self.network, Student) or not self.network.module(module).needs_proposals:
            return None
        settings = self.network.recipe.proposals
        # Of several processes on a machine each has its share of the cores, which Fabric or torchrun told torch.
        workers = torch.get_num_threads() if self.fabric.world_size > 1 else None
        return compute_proposals(images, settings, cache, workers, progress=self.first)


def predict_photographs(
    network: LabelPEnet | Student,
    images: Sequence[TaggedImage],
    pixels: Sequence[np.ndarray],
    module: int,
    boxes: Boxes,
    fabric: Fabric,
    tagged: bool = False,
) -> list[Instances]:
    """What a network predicts for photographs of these ``pixels`` (H, W, 3) uint8, with their proposals in ``boxes``
    where they are there, and of their tags alone where these are known."""
    proposals = None
    if isinstance(network, LabelPEnet) and all(image.id in boxes for image in images):
        pairs = zip(images, pixels, strict=True)
        proposals = [network.select(boxes[image.id], own.shape) for image, own in pairs]
    with fabric.autocast():
        return network.predict_batch(pixels, module, proposals, [image.tags for image in images] if tagged else None)


def predict_images(
    predictor: Predictor,
    images: Sequence[TaggedImage],
    module: int,
    out: Path,
    *,
    keep: Callable[[TaggedImage, Instances], Instances] = lambda image, found: found,
    cache: Path | None = None,
) -> list[str]:
    """Predicts the photographs and writes one predictions file, whole or not at all.

    Every process predicts each ``world``-th photograph into a file of its own beside ``out``; the first one puts these
    together in the order of the photographs. The file is the same for any number of processes.

    Args:
        predictor: the run; its processes must all see the folder of ``out``.
        keep: what is written of the instances found in a photograph.
        cache: folder of the proposals' cache; None for the user's.

    Returns:
        The ids of the photographs that could not be read, in every process.

    Raises:
        InputError: the module is not trained, no photograph can be read, or the file cannot be written; in every
            process. A file that was there before is left then.
    """
    predictor.network.require(module)
    rank, world = predictor.fabric.global_rank, predictor.fabric.world_size
    classes = predictor.network.classes
    share = images[rank::world]
    skipped: list[str] = []

    def predict(path: Path) -> None:
        boxes = predictor.proposals(share, module, cache)
        found = ((image.id, keep(image, one)) for image, one in predictor.run(share, module, skipped, boxes))
        write_predictions(path, _some(found) if world == 1 else found, images, classes)

    if world == 1:
        predict(out)
        return skipped
    parts = [out.with_name(f"{out.name}.part{other}") for other in range(world)]
    written: list[Path] = []  # by this process: what lay there before is not its own to remove

    def predict_part() -> None:
        predict(parts[rank])
        written.append(parts[rank])

    with peers(world):
        try:
            together(world, predict_part)
            together(world, lambda: _join(parts, out, images, classes) if predictor.first else None)
        finally:  # also where another process failed, or Ctrl-C ended the wait for it
            for part in written:
                part.unlink(missing_ok=True)
        return [name for one in gather(world, skipped) for name in one]


def _join(parts: Sequence[Path], out: Path, images: Sequence[TaggedImage], classes: Sequence[str]) -> None:
    """Puts the processes' files together in the order of the photographs."""
    read = [read_predictions(part, images, classes) for part in parts]
    owners = ((image.id, read[index % len(parts)]) for index, image in enumerate(images))
    write_predictions(out, _some((name, one[name]) for name, one in owners if name in one), images, classes)


def _some(found: Iterable[tuple[str, Instances]]) -> Iterator[tuple[str, Instances]]:
    """The same, but an `InputError` where there is nothing, so that no file is written."""
    nothing = True
    for one in found:
        nothing = False
        yield one
    if nothing:
        raise InputError("no image could be read; see the lines above")
