"""How fast excitation backprop is: 1,600 proposals through fc7 and fc6 of VGG-16's sizes.

    python benchmarks/excitation.py                     about five minutes on one core, 3 GB of memory
    python benchmarks/excitation.py --proposals 200     seconds

prints the medians of one run, interleaved so that a busy machine slows all alike, of

- the head's own forward pass (flatten, fc6, ReLU, fc7, ReLU). Excitation backprop needs two matrix products a layer,
  each as large as the forward pass's one, so that 2.0 is the floor of the ratio;
- excitation backprop of the whole batch, with the activations of that forward pass;
- TorchRay doing the same, if it is there: ``pip install --no-deps --target DIR torchray`` (non-commercial licence) and
  DIR on PYTHONPATH. It has to run the head forward itself, since its rules
  act on the backward pass of patched layers. Biases are left out for all, the formula ignores them;
- one pass per proposal, by ours, over a few proposals.

The weights are random (the speed does not depend on them), the features as sparse as VGG's after max pooling.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from labelpenet.calibration.excitation import excitation_backprop, forward_with_activations

CHANNELS, SIDE, HIDDEN = 512, 7, 4096


def head() -> nn.Sequential:
    """VGG-16's classifier up to relu7, untrained, without dropout and biases."""
    fc6, fc7 = nn.Linear(CHANNELS * SIDE**2, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
    return nn.Sequential(nn.Flatten(), fc6, nn.ReLU(), fc7, nn.ReLU()).eval().requires_grad_(False)


def peer() -> Callable[[nn.Sequential, Tensor, Tensor], Tensor] | None:
    """Excitation backprop by TorchRay, or None where it is not installed."""
    try:
        from torchray.attribution.excitation_backprop import ExcitationBackpropContext
    except ImportError:
        return None

    def backprop(layers: nn.Sequential, x: Tensor, top: Tensor) -> Tensor:
        with torch.enable_grad(), ExcitationBackpropContext():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(layers(x), x, top)[0]

    return backprop


def clock(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds by the wall clock and seconds of CPU time (all threads) of one call, up to the end of its device work."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposals", type=int, default=1600)
    parser.add_argument("--single", type=int, default=5, help="proposals of the one-by-one pass")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device = torch.device(args.device)
    layers = head().to(device)
    x = (torch.randn(args.proposals, CHANNELS, SIDE, SIDE) - 0.5).relu().to(device)
    y, activations = forward_with_activations(layers, x)
    top = y / y.sum(1, keepdim=True)  # what the class layer hands down has the same support

    def one_by_one() -> None:
        for r in range(args.single):
            row = slice(r, r + 1)
            excitation_backprop(layers, x[row], top[row], [a[row] for a in activations])

    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: layers(x),
        "ours": lambda: excitation_backprop(layers, x, top, activations),
        "ours, forward included": lambda: excitation_backprop(layers, x, top),
        "one by one": one_by_one,
    }
    theirs = peer()
    if theirs is None:
        print("TorchRay is not installed")
    else:
        runs["TorchRay"] = partial(theirs, layers, x, top)
        expected = excitation_backprop(layers, x, top, activations)
        difference = (theirs(layers, x, top) - expected).abs().max() / expected.max()
        print(f"largest difference to TorchRay: {float(difference):.1e} of the maximum")

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(args.rounds):
        for name, run in runs.items():
            seconds[name].append(clock(run, device))

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.proposals} proposals through fc7 and fc6, float32, torch {torch.__version__}, {where}")
    print(f"medians of {args.rounds} rounds; one by one: {args.single} proposals, scaled up")
    for kind, label in enumerate(("wall clock", "CPU time (steadier where the machine is shared)")):
        medians = {name: statistics.median(pair[kind] for pair in pairs) for name, pairs in seconds.items()}
        medians["one by one"] *= args.proposals / args.single
        print(label)
        for name, median in medians.items():
            ratio, ours = median / medians["forward"], median / medians["ours"]
            print(f"  {name:24s}{median:9.3f} s {ratio:8.2f} x forward {ours:8.2f} x ours")


if __name__ == "__main__":
    main()
