"""How fast each stage trains, where the time goes, and what the machinery around the model costs.

    python benchmarks/training.py                                    # generated scenes, random weights: 3 minutes
    python benchmarks/training.py VOCdevkit/VOC2012 --run runs/voc-animals --threads 2
    python benchmarks/training.py VOCdevkit/VOC2012 --backbone vgg16 --recipe paper --device cuda --steps 30

- Each stage is trained for some steps by a plain for-loop whose parts are timed: waiting for data, the shared stem, the
  RoI heads, what is left of the forward pass, the backward pass, the optimiser. In between every module infers the
  instances of some photographs as it does for training: stem, RoI heads, dense CRF and what is left (attention maps,
  projections, NMS). Forward-backward learning does both at once.
- `train_stage`, with its sampler, metrics and checkpoints, against that plain loop on the very same steps of module 4
  (on a CPU both end with the same weights, bit for bit); and torchvision's own Mask R-CNN in the plain loop: the same
  stem, RoI head, mask branch, anchors, RoIs, image size, batch, threads and precision, as near as its API allows (it
  resizes by itself, runs the images of a batch together, padded to one size, and knows RoIAlign only). The three take
  turns, so that what else the machine does hits all of them alike.

The targets are made up (ellipses in the largest proposals), for nothing is measured but time. Without ``--run`` weights
are random, which changes what inference finds, and so what it costs. Medians; one table, printed last.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from labelpenet import config
from labelpenet.calibration import DenseCRF
from labelpenet.config import Recipe, Schedule
from labelpenet.data import TaggedImages, read_image, write_scenes
from labelpenet.data.proposals import compute_proposals
from labelpenet.engine.distributed import build_fabric, map_images
from labelpenet.engine.sampler import LOADERS, STEPS_AHEAD, batches, seed_step, stream_seed
from labelpenet.engine.stage import Stage, build_optimiser, learning_rate
from labelpenet.engine.trainer import train_stage
from labelpenet.formats import open_tagged, training_split
from labelpenet.instances import Instances
from labelpenet.models.backbones import Backbone
from labelpenet.models.build import build_backbone
from labelpenet.models.cascade import MODULES, LabelPEnet
from labelpenet.models.detection import ANCHOR_RATIOS, RPNHead
from labelpenet.models.segmentation import MASK_POOL, SpatialPyramid
from labelpenet.training import curriculum
from labelpenet.training.pretrain import Training, stage

CHECKPOINT_SECONDS = 300  # between two checkpoints of `labelpenet train`
VOC07 = 5011  # images of VOC 2007 trainval: what an inference's hours are for
PARTS = ("data", "stem", "RoI heads", "dense CRF", "other", "backward", "optimiser")


class Clock:
    """Seconds spent in named parts; on a GPU each part waits until its work is done.

    Args:
        device: where the work is done; parts: False to leave the parts alone, for the waiting costs time.
    """

    def __init__(self, device: torch.device, parts: bool = True):
        self.device, self.parts = device, parts
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def now(self) -> float:
        """Seconds, once everything asked for so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what happens inside to the part of this name."""
        if not self.parts:
            yield
            return
        began = self.now()
        try:
            yield
        finally:
            spent = self.now() - began
            with self._lock:
                self.seconds[name] += spent

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to a part."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return call

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last time."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


@dataclass
class Row:
    """A line of the table.

    Attributes:
        name: what was done; rate: images a second; parts: fraction of the time by part; hours: of the whole schedule.
    """

    name: str
    rate: float
    parts: dict[str, float]
    hours: float


# -- what is trained -------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """What all parts of the benchmark share.

    Attributes:
        training: images, proposals and network; recipe: the network's, with its own schedules.
        backbone: the backbone; targets: made-up instances by image id.
    """

    training: Training
    recipe: Recipe
    backbone: Backbone
    targets: dict[str, Instances]

    @property
    def network(self) -> LabelPEnet:
        """The cascade."""
        return self.training.network

    @property
    def fabric(self) -> Fabric:
        """Device and precision."""
        return self.training.fabric

    def schedule(self, number: int) -> Schedule:
        """The recipe's, of module ``number``, or of forward-backward learning for 5."""
        return self.recipe.forward_backward.schedule if number == 5 else self.recipe.modules[number - 1].schedule

    def stage(self, number: int, steps: int) -> Stage:
        """So many steps of module ``number``, or of forward-backward learning for 5."""
        short = replace(self.schedule(number), steps=steps, warmup=0)
        if number == 5:
            return replace(curriculum.stage(self.training, [self.targets] * 4), schedule=short, guard=None)
        self.network.recipe = config.change(self.recipe, number, schedule=short)
        return stage(self.training, number, self.targets if number > 1 else None)


def prepare(one: argparse.Namespace, folder: Path) -> Setting:
    """Images, proposals, made-up targets and the network."""
    fabric = build_fabric(one.device, 1, 1, one.precision)
    data = one.data or write_scenes(folder / "scenes", train=one.images, val=0, size=(375, 500))
    loaded = LabelPEnet.from_run(one.run) if one.run else None
    recipe = config.override(config.recipe(one.recipe) if loaded is None else loaded.recipe, one.set)
    images = open_tagged(data, training_split(data), None if loaded is None else loaded.classes)
    tagged = [image for image in images.images if image.tags]
    images = TaggedImages(images.classes, tuple(tagged[:: max(1, len(tagged) // one.images)][: one.images]))
    backbone = build_backbone(one.backbone if loaded is None else loaded.backbone_name, one.weights, pretrained=False)
    seed_step(0, "initialisation", 0)
    network = LabelPEnet(backbone, images.classes, recipe)
    if loaded is not None:
        network.load_state_dict(loaded.state_dict())
    network.to(fabric.device).stem.requires_grad_(False)
    boxes = compute_proposals(images.images, recipe.proposals, one.cache, progress=True)
    targets = {}
    for image in images.images:
        height, width = read_image(image.path).shape[:2]
        targets[image.id] = made_up(np.array(boxes[image.id]), image.tags, (height, width))
    return Setting(Training(network, images, boxes, folder / "run", fabric), recipe, backbone, targets)


def made_up(boxes: np.ndarray, tags: tuple[int, ...], size: tuple[int, int]) -> Instances:
    """Two instances: ellipses in the largest proposals (R, 4) that leave half of the image (H, W) free."""
    height, width = size
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) / (height * width)
    chosen = boxes[np.argsort(np.where(areas < 0.5, -areas, 0.0), kind="stable")[:2]]
    y, x = np.mgrid[:height, :width] + 0.5
    masks = np.stack([
        ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1 for x1, y1, x2, y2 in chosen
    ])  # fmt: skip
    labels = torch.tensor([tags[index % len(tags)] for index in range(len(chosen))])
    return Instances(torch.from_numpy(chosen), labels, torch.full((len(chosen),), 0.9), size, torch.from_numpy(masks))


# -- loops -----------------------------------------------------------------------------------------------------------


def load_ahead(one: Stage) -> Iterator[list[Future[Any]]]:
    """For each step the micro-batches, loaded in threads a little ahead of time."""

    def begin(step: int) -> list[Future[Any]]:
        drawn = step // one.repeat
        indices = batches(len(one.images), one.batch_size, 0, one.name, drawn)
        cuts = range(0, one.batch_size, one.micro_batch)
        seeds = [stream_seed(0, one.name, drawn, position, "load") for position in cuts]
        return [
            pool.submit(one.load, indices[i : i + one.micro_batch], torch.Generator().manual_seed(seed))
            for i, seed in zip(cuts, seeds, strict=True)
        ]

    with ThreadPoolExecutor(LOADERS) as pool:
        waiting = [begin(step) for step in range(min(STEPS_AHEAD, one.steps))]
        for step in range(one.steps):
            if step + STEPS_AHEAD < one.steps:
                waiting.append(begin(step + STEPS_AHEAD))
            yield waiting.pop(0)


def plain_loop(one: Stage, fabric: Fabric, clock: Clock) -> list[float]:
    """A stage trained by a for-loop as one would write it down; returns the seconds of each step.

    The images, augmentation and random numbers are those of `train_stage`. The first step's parts are not counted.
    """
    parameters = [p for p in one.module.parameters() if p.requires_grad]
    optimiser = build_optimiser(one.schedule, parameters)
    one.module.train()
    seconds = []
    began = clock.now()
    for step, futures in enumerate(load_ahead(one)):
        if step == 1:
            clock.take()
        optimiser.zero_grad(set_to_none=True)
        for number, future in enumerate(futures):
            with clock.part("data"):
                batch = future.result()
            seed_step(0, one.name, step, number * one.micro_batch)
            with clock.part("forward"), fabric.autocast():
                terms = [value.float() for value in one.loss(batch, step).values()]
            total = torch.stack(terms).sum()
            if not bool(torch.isfinite(total)):
                raise SystemExit(f"{one.name}: the loss is not finite at step {step}; try other weights")
            with clock.part("backward"):
                (total * (one.micro_batch / one.batch_size)).backward()
        with clock.part("optimiser"):
            if one.schedule.clip is not None:
                nn.utils.clip_grad_norm_(parameters, one.schedule.clip)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(one.schedule, step)
            optimiser.step()
        ended = clock.now()
        seconds.append(ended - began)
        began = ended
    return seconds


def our_loop(one: Stage, fabric: Fabric, folder: Path, clock: Clock) -> tuple[list[float], float]:
    """A stage trained by `train_stage`: the seconds from each step to the next, and those of start and end."""
    cuts = one.batch_size // one.micro_batch
    calls: list[float] = []

    def loss(batch: Any, step: int) -> Mapping[str, Tensor]:
        calls.append(clock.now() if len(calls) % cuts == 0 else 0.0)
        return one.loss(batch, step)

    began = clock.now()
    train_stage(replace(one, loss=loss), folder, fabric=fabric, log=lambda line: None)
    whole = clock.now() - began
    steps = np.diff(calls[::cuts]).tolist()
    return steps, max(0.0, whole - statistics.median(steps) * one.steps)


# -- torchvision -----------------------------------------------------------------------------------------------------


class Trunk(nn.Module):
    """Stem and detection tail; keeps the stem's map for the mask branch, which torchvision would give the other one."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        tail = backbone.detection_tail()
        self.stem, self.tail, self.out_channels = backbone.stem.module, tail.module, tail.channels
        self.stem.requires_grad_(False)
        self.stem_map = torch.zeros(0)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, D, h, w), in float32, which RoI pooling and anchors need."""
        self.stem_map = self.stem(images)
        return self.tail(self.stem_map).float()


class MaskPool(MultiScaleRoIAlign):
    """RoIAlign on the map of the mask branch."""

    def __init__(self, trunk: Trunk, tail: nn.Module, pyramid: nn.Module):
        super().__init__(["0"], MASK_POOL, 1)
        self.trunk, self.tail, self.pyramid = trunk, tail, pyramid

    def forward(self, features: Any, boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """(R, width, 14, 14) from the trunk's last stem map."""
        return super().forward({"0": self.pyramid(self.tail(self.trunk.stem_map)).float()}, boxes, sizes)


def torchvision_model(setting: Setting) -> MaskRCNN:
    """torchvision's Mask R-CNN out of the parts of module 4."""
    recipe, backbone = setting.recipe, setting.backbone
    choice = recipe.modules[3]
    trunk, classes = Trunk(backbone), len(setting.network.classes) + 1
    head, features = backbone.roi_head(choice.cells)
    mask_tail = backbone.mask_tail()
    pyramid = SpatialPyramid(mask_tail.channels, choice.mask_width)
    model = MaskRCNN(
        trunk,
        min_size=recipe.images.sides,
        max_size=recipe.images.longest,
        image_mean=list(backbone.mean),
        image_std=list(backbone.std),
        rpn_anchor_generator=AnchorGenerator((choice.anchor_sides,), (ANCHOR_RATIOS,)),
        rpn_head=RPNHead(trunk.out_channels, len(choice.anchor_sides) * len(ANCHOR_RATIOS)),
        rpn_post_nms_top_n_train=choice.rpn_post_nms_top_n_train,
        box_roi_pool=MultiScaleRoIAlign(["0"], backbone.pool_size, 1),
        box_head=head,
        box_predictor=FastRCNNPredictor(features, classes),
        box_batch_size_per_image=choice.rois,
        mask_roi_pool=MaskPool(trunk, mask_tail.module, pyramid),
        mask_head=MaskRCNNHeads(choice.mask_width, (choice.mask_width,) * choice.mask_depth, 1),
        mask_predictor=MaskRCNNPredictor(choice.mask_width, choice.mask_width, classes),
    )
    return model.to(setting.fabric.device, memory_format=torch.channels_last)


def torchvision_stage(setting: Setting, steps: int) -> Stage:
    """Its training, with module 4's images, targets and optimiser; the images of a batch go through it together."""
    model, device = torchvision_model(setting), setting.fabric.device
    images, flip = setting.training.images.images, setting.recipe.images.flip

    def load(indices: list[int], generator: torch.Generator) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        pictures, targets = [], []
        for index in indices:
            pixels = torch.from_numpy(read_image(images[index].path)).permute(2, 0, 1)
            one = setting.targets[images[index].id]
            boxes, masks = one.boxes, one.masks
            assert masks is not None
            if flip and bool(torch.rand((), generator=generator) < 0.5):
                pixels, masks = pixels.flip(-1), masks.flip(-1)
                boxes = torch.stack(
                    [one.image_size[1] - boxes[:, 2], boxes[:, 1], one.image_size[1] - boxes[:, 0], boxes[:, 3]], 1
                )
            pictures.append(pixels.to(device).float() / 255)
            target = {"boxes": boxes, "labels": one.labels + 1, "masks": masks.to(torch.uint8)}
            targets.append({name: value.to(device) for name, value in target.items()})
        return pictures, targets

    own = setting.stage(4, steps)
    return replace(
        own, name="torchvision", module=model, loss=lambda batch, step: model(*batch), load=load,
        micro_batch=own.batch_size,
    )  # fmt: skip


# -- measuring -------------------------------------------------------------------------------------------------------


@contextmanager
def watched(network: LabelPEnet, clock: Clock) -> Iterator[None]:
    """Times the stem, the RoI heads and the dense CRF wherever the network uses them."""
    heads = [
        head
        for name in MODULES
        for part in ("head", "mask_head")
        if (head := getattr(getattr(network, name), part, None))
    ]
    build, call = DenseCRF.__init__, DenseCRF.__call__
    for head in heads:
        head.forward = clock.timed("RoI heads", head.forward)
    network.stem_maps = clock.timed("stem", network.stem_maps)  # type: ignore[method-assign]
    DenseCRF.__init__ = clock.timed("dense CRF", build)  # type: ignore[method-assign]
    DenseCRF.__call__ = clock.timed("dense CRF", call)  # type: ignore[method-assign]
    try:
        yield
    finally:
        DenseCRF.__init__, DenseCRF.__call__ = build, call  # type: ignore[method-assign]
        del network.stem_maps
        for head in heads:
            del head.forward


def fractions(seconds: Mapping[str, float], whole: float) -> dict[str, float]:
    """Each part's share of ``whole`` seconds; what no part claims is ``other``."""
    parts = {name: seconds.get(name, 0.0) / whole for name in PARTS if name != "other"}
    return {**parts, "other": max(0.0, 1 - sum(parts.values()))}


def training_row(setting: Setting, number: int, steps: int, clock: Clock) -> Row:
    """A stage in the plain loop."""
    one = setting.stage(number, steps)
    plain_loop(replace(one, schedule=replace(one.schedule, steps=2)), setting.fabric, clock)  # a first time costs more
    if clock.device.type == "cuda":  # where looking at the parts takes time by itself
        seconds = plain_loop(one, setting.fabric, Clock(clock.device, parts=False))[1:]
    with watched(setting.network, clock):
        watched_seconds = plain_loop(one, setting.fabric, clock)[1:]
    if clock.device.type != "cuda":
        seconds = watched_seconds
    setting.network.eval()
    rate = one.batch_size / statistics.median(seconds)
    schedule = setting.schedule(number)
    images = schedule.steps * schedule.batch_size * one.repeat
    name = "forward-backward, a phase" if number == 5 else f"module {number}, training"
    return Row(name, rate, fractions(clock.take(), sum(watched_seconds)), images / rate / 3600)


def inference_row(setting: Setting, number: int, clock: Clock) -> Row:
    """Module ``number`` labels the photographs, as between two stages; 0: the RoI features that module 1 caches."""
    training, network = setting.training, setting.network
    images = training.images.images

    def infer(index: int) -> None:
        with clock.part("whole"):
            with clock.part("data"):
                pixels = read_image(images[index].path)
                boxes = training.boxes(images[index], pixels.shape)
            features = training.features.known(images[index]) if number == 1 else None
            proposals = [boxes] if network.module(number).needs_proposals else None
            with training.fabric.autocast():
                batch = network.batch(
                    [pixels], [images[index].tags], proposals, None if features is None else [features]
                )
                network.infer(number, batch)

    clock.take()
    began = clock.now()
    with watched(network, clock):
        if number == 0:
            training.features.compute_all(images)
        else:
            with closing(map_images(infer, range(len(images)), clock.device)) as done:
                for _ in done:
                    pass
    seconds = clock.now() - began
    parts, at_a_time = clock.take(), torch.get_num_threads() if clock.device.type == "cpu" else 1
    name = f"module {number}, labelling" if number else "module 1, RoI features"
    rate = len(images) / seconds
    return Row(name, rate, fractions(parts, parts.get("whole", seconds * at_a_time)), VOC07 / rate / 3600)


@dataclass
class Comparison:
    """Seconds of an image in each of several rounds, and of a stage's start and end with its checkpoint."""

    ours: list[float]
    plain: list[float]
    torchvision: list[float]
    ends: list[float]
    same: bool


def compare(setting: Setting, steps: int, rounds: int, clock: Clock) -> Comparison:
    """`train_stage`, the plain loop and torchvision, in turns."""
    one, other = setting.stage(4, steps), torchvision_stage(setting, steps)
    start = {name: value.clone() for name, value in one.module.state_dict().items()}
    found = Comparison([], [], [], [], same=True)
    plain_loop(replace(other, schedule=replace(other.schedule, steps=2)), setting.fabric, clock)
    for turn in range(rounds):
        ended = []
        for contender in np.roll(["ours", "plain", "torchvision"], turn):
            one.module.load_state_dict(start)
            if contender == "ours":
                seconds, ends = our_loop(one, setting.fabric, setting.training.run / f"round{turn}", clock)
                found.ends.append(ends)
            else:
                seconds = plain_loop(one if contender == "plain" else other, setting.fabric, clock)[1:]
            getattr(found, str(contender)).append(statistics.mean(seconds) / one.batch_size)
            if contender != "torchvision":
                ended.append({name: value.clone() for name, value in one.module.state_dict().items()})
        found.same &= all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())
    setting.network.eval()
    return found


# -- the table -------------------------------------------------------------------------------------------------------


def render(rows: Sequence[Row], found: Comparison) -> str:
    """The table."""
    lines = [f"{'':26}{'images/s':>9}{'hours':>8}" + "".join(f"{name:>11}" for name in PARTS)]
    for row in rows:
        cells = "".join(f"{100 * row.parts[name]:10.0f}%" if row.parts[name] else f"{'':11}" for name in PARTS)
        lines.append(f"{row.name:26}{row.rate:9.2f}{row.hours:8.2f}{cells}")
    lines.append(
        "hours: training by the recipe's whole schedule; labelling and features of 5,011 images (VOC 2007 trainval)"
    )
    lines.append("")
    lines.append(f"{'module 4':26}{'images/s':>9}{'  time against the plain loop, by round'}")
    for name in ("ours", "plain", "torchvision"):
        own = getattr(found, name)
        ratios = [a / b for a, b in zip(own, found.plain, strict=True)]
        label = {"ours": "train_stage", "plain": "plain loop", "torchvision": "torchvision's Mask R-CNN"}[name]
        shown = f"  {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if name != "plain" else ""
        lines.append(f"{label:26}{1 / statistics.median(own):9.2f}{shown}")
    loop = statistics.median([a / b for a, b in zip(found.ours, found.plain, strict=True)]) - 1
    ends = statistics.median(found.ends)
    lines.append(
        f"the machinery costs {100 * loop:.1f} % a step, and a stage's start and end with a checkpoint {ends:.1f} s: "
        f"with one every 5 minutes {100 * (loop + ends / CHECKPOINT_SECONDS):.1f} % in all"
    )
    lines.append(f"train_stage and the plain loop end with {'the same' if found.same else 'different'} weights")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="photographs; default: generated scenes of 500 x 375 pixels")
    parser.add_argument("--run", type=Path, help="a trained run: its backbone, recipe and weights")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", type=Path, help="of the backbone; random if none")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--set", nargs="*", default=[], help="part.field=value ..., as for labelpenet train")
    parser.add_argument("--images", type=int, default=12, help="photographs")
    parser.add_argument("--steps", type=int, default=6, help="of each stage, and of each contender in a round")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--threads", type=int, help="of torch; default: as many as it likes")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="auto", choices=("auto", "32-true", "bf16-mixed"))
    parser.add_argument("--cache", type=Path, help="of proposals; default: the user's")
    one = parser.parse_args()
    if one.steps < 3:
        parser.error("--steps must be at least 3")
    if one.threads:
        torch.set_num_threads(one.threads)
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(one, Path(folder))
        clock = Clock(setting.fabric.device)
        rows = []
        choice = setting.recipe.modules[0]
        for number in (1, 2, 3, 4):
            print(f"module {number} ...", flush=True)
            if number == 1 and choice.freeze_head:
                rows.append(inference_row(setting, 0, clock))
            rows.append(training_row(setting, number, one.steps, clock))
            rows.append(inference_row(setting, number, clock))
        print("the loops in turns ...", flush=True)
        found = compare(setting, one.steps, one.rounds, Clock(clock.device, parts=False))
        print("forward-backward ...", flush=True)
        rows.append(training_row(setting, 5, one.steps, clock))
        device = torch.cuda.get_device_name(clock.device) if clock.device.type == "cuda" else "cpu"
        print(
            f"\n{device}, {torch.get_num_threads()} threads, {setting.fabric._precision.precision}, "
            f"torch {torch.__version__}, {setting.network.backbone_name}, recipe {setting.recipe.name}, "
            f"{one.images} images, {one.steps} steps, {one.rounds} rounds, "
            f"{'trained' if one.run else 'random'} weights\n"
        )
        print(render(rows, found))


if __name__ == "__main__":
    main()
