"""How fast a GPU trains, labels and predicts, how much of it is used, and what the paper's whole schedule would take.

    python benchmarks/gpu.py                                            # generated scenes, random weights
    python benchmarks/gpu.py VOCdevkit/VOC2012 --run runs/voc-animals   # a trained cascade, as it labels and predicts

For each backbone: photographs a second of every stage, in the loops of `benchmarks/training.py`; the share of the
card's peak (the stage's matrix products and convolutions over the time, against a product of two 8192 x 8192 matrices
in the same precision); the share of the time in which the card works at all; the three largest costs, from a second
pass in which each part waits for the card. For vgg16, which gets the recipe ``paper``, the hours of the paper's
schedule on the 5,011 images of VOC 2007 trainval. Without ``--run`` weights are random: what modules find is then not
what they would find, and so is the time of labels and answers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent))
import training as loops

from labelpenet.instances import Instances
from labelpenet.training.photographs import find_instances
from labelpenet.training.predict import predict_photographs


@dataclass
class Row:
    """A line of the table: photographs a second; shares of the peak and of the time; parts by their share."""

    backbone: str
    name: str
    rate: float
    peak: float
    busy: float
    costs: dict[str, float]


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of dense matrix products and convolutions.

    torch's own `FlopCounterMode` cannot see gradients that `torch.autograd.grad` takes.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        dense = all(one.layout == torch.strided for one in args if isinstance(one, torch.Tensor))
        if count is not None and dense:
            self.total += count(*args, **(kwargs or {}), out_val=found)
        return found


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize(device)
    return 20 * 2 * 8192**3 / (time.perf_counter() - began)


def measured(work: Callable[[], Any], images: int, peak: float) -> tuple[float, float, float]:
    """Of work on so many images: images a second, share of the peak, share of the time that the card works.

    It is done four times: to warm up, timed, with its operations counted, and profiled.
    """
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    with Operations() as counted:
        work()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
    return images / seconds, counted.total / seconds / peak, busy / seconds


def training_row(setting: loops.Setting, number: int, steps: int, peak: float) -> Row:
    """A stage's training, in the plain loop."""
    device, one = setting.fabric.device, setting.stage(number, steps)

    def work() -> None:
        loops.plain_loop(one, setting.fabric, loops.Clock(device, parts=False))

    found = measured(work, one.batch_size * steps, peak)
    clock = loops.Clock(device)
    with loops.watched(setting.network, clock):
        seconds = loops.plain_loop(one, setting.fabric, clock)[1:]
    setting.network.eval()
    name = "forward-backward, a phase" if number == 5 else f"module {number} trains"
    return Row(setting.backbone.name, name, *found, loops.fractions(clock.take(), sum(seconds)))


def working_row(setting: loops.Setting, name: str, work: Callable[[], Any], peak: float) -> Row:
    """What is done once for every photograph."""
    device = setting.fabric.device
    found = measured(work, len(setting.training.images.images), peak)
    clock = loops.Clock(device)
    with loops.watched(setting.network, clock):
        began = clock.now()
        work()
        seconds = clock.now() - began
    return Row(setting.backbone.name, name, *found, loops.fractions(clock.take(), seconds))


def finding(setting: loops.Setting, number: int, tagged: bool) -> Callable[[], None]:
    """Module ``number``'s labels of the photographs, whose tags are known, or its answers; their proposals are known,
    of labels the RoI features, too.
    """
    training, network = setting.training, setting.network
    ids = list(range(1, len(network.classes) + 1))

    def infer(images: Sequence[Any], pixels: Sequence[Any]) -> list[Instances]:
        if tagged:
            return training.infer(number, images, pixels)
        return predict_photographs(network, images, pixels, number, training.proposals, training.fabric)

    def work() -> None:
        for image, found, _ in find_instances(infer, training.images.images, network.input_size, network.device):
            if found is not None:
                found.to("cpu").to_coco(image.id, ids)

    return work


def measure(one: argparse.Namespace, setting: loops.Setting, peak: float) -> Iterator[Row]:
    """The stages of a backbone."""
    recipe = setting.recipe
    if recipe.modules[0].freeze_head:
        setting.training.features.folder.mkdir(parents=True, exist_ok=True)
        images = setting.training.images.images
        yield working_row(setting, "RoI features", lambda: [*map(setting.training.features.compute, images)], peak)
    for number in (1, 2, 3, 4):
        yield working_row(setting, f"module {number} labels", finding(setting, number, tagged=True), peak)
        yield working_row(setting, f"module {number} answers", finding(setting, number, tagged=False), peak)
        yield training_row(setting, number, one.steps, peak)
    yield training_row(setting, 5, one.steps, peak)


def hours(setting: loops.Setting, found: Sequence[Row]) -> float:
    """Of the recipe's whole schedule on VOC 2007 trainval: training, and the labels of all modules after each stage."""
    rates = {row.name: row.rate for row in found}
    last = setting.recipe.forward_backward.schedule
    seconds = 2 * last.steps * last.batch_size / rates["forward-backward, a phase"]
    for number in (1, 2, 3, 4):
        schedule = setting.schedule(number)
        seconds += schedule.steps * schedule.batch_size / rates[f"module {number} trains"]
        seconds += 2 * loops.VOC07 / rates[f"module {number} labels"]
    return seconds / 3600


def line(row: Row) -> str:
    """A line of the table, with the three largest costs."""
    costs = sorted(row.costs.items(), key=lambda part: -part[1])[:3]
    shown = ", ".join(f"{name} {100 * share:.0f} %" for name, share in costs)
    return f"{row.backbone:24}{row.name:32}{row.rate:9.2f}{100 * row.peak:8.2f} %{100 * row.busy:7.0f} %   {shown}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="photographs; default: generated scenes of 500 x 375 pixels")
    parser.add_argument("--run", type=Path, help="a trained run: its backbone, recipe and weights")
    parser.add_argument("--backbones", nargs="*", default=["mobilenet_v2", "timm/tf_efficientnet_lite0", "vgg16"])
    parser.add_argument("--images", type=int, default=32, help="photographs")
    parser.add_argument("--steps", type=int, default=16, help="of each training")
    parser.add_argument("--precision", default="auto", choices=("auto", "32-true", "bf16-mixed"))
    parser.add_argument("--cache", type=Path, help="of proposals; default: the user's")
    one = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is available here")
    device = torch.device("cuda")
    peak = peak_rate(device, torch.float32 if one.precision == "32-true" else torch.bfloat16)
    table, footer = [], []
    for backbone in one.backbones if one.run is None else ["run"]:
        recipe = "paper" if backbone == "vgg16" else "best"
        own = argparse.Namespace(**vars(one), device="cuda", backbone=backbone, weights=None, recipe=recipe, set=[])
        with tempfile.TemporaryDirectory() as folder:
            setting = loops.prepare(own, Path(folder))
            found = []
            for row in measure(one, setting, peak):
                found.append(row)
                print(line(row), flush=True)
        table += found
        name = f"{setting.backbone.name}, recipe {setting.recipe.name}"
        footer.append(f"{name}: {hours(setting, found):.2f} hours on VOC 2007")
    print(
        f"\n{torch.cuda.get_device_name(device)}, {setting.fabric._precision.precision}, torch {torch.__version__}, "
        f"{one.images} images, {one.steps} steps, {'trained' if one.run else 'random'} weights; "
        f"peak measured: {peak / 1e12:.0f} TFLOP/s\n"
    )
    print(f"{'':56}{'images/s':>9}{'of peak':>10}{'busy':>9}   largest costs")
    print("\n".join([*map(line, table), "", *footer]))


if __name__ == "__main__":
    main()
