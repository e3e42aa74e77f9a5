"""How fast the dense CRF is: an image with 1, 3, 5 and 10 instances, two labels each, 10 iterations.

    pip install pydensecrf2 && python benchmarks/crf.py      about a minute on two cores
    python benchmarks/crf.py --device cuda                   the same on a GPU; pydensecrf stays on the CPU

prints medians over real photographs of 500 x 375 pixels, interleaved so that a busy machine slows all alike, of

- ours: `DenseCRF(image)(probabilities)`, from the image to the marginals of all instances, the lattices included;
- pydensecrf with one lattice an image: its pairwise terms are added once, then each instance sets its unaries in turn;
- pydensecrf as its examples use it: a new CRF for each instance (both are left out where it is not installed);

by the wall clock and in CPU time (all threads; what the comparison would be on one core), then where our time goes and
how far that is from the time that moving the same bytes takes.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from labelpenet.calibration.crf import DenseCRF

PHOTOGRAPHS = Path(__file__).parents[1] / "../shared/data/voc-animals/VOCdevkit/VOC2012/JPEGImages"
INSTANCES = (1, 3, 5, 10)


def photographs(folder: Path, count: int) -> list[np.ndarray]:
    """The first ``count`` photographs of 500 x 375 pixels of every fifth of a folder, (H, W, 3) uint8."""
    images = []
    for path in sorted(folder.glob("*.jpg"))[::5]:
        with Image.open(path) as photograph:
            if photograph.size == (500, 375):
                images.append(np.array(photograph.convert("RGB")))
        if len(images) == count:
            break
    return images


def confidence_maps(instances: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(M, 2, H, W) float32 probabilities: background, and a smooth blob with some noise as the object."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    maps = []
    for _ in range(instances):
        cy, cx, size = rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width, rng.uniform(0.1, 0.3) * width
        blob = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * size**2)) + rng.normal(0, 0.05, (height, width))
        maps.append(np.clip(0.9 * blob, 0.02, 0.98))
    objects = np.stack(maps).astype(np.float32)
    return np.stack([1 - objects, objects], 1)


def ours(image: Tensor, probabilities: Tensor) -> Tensor:
    """Our marginals of (M, 2, H, W) probabilities."""
    return DenseCRF(image)(probabilities)


def peer(image: np.ndarray, probabilities: np.ndarray, reuse: bool) -> np.ndarray:
    """pydensecrf's marginals of (M, 2, H, W) probabilities, with one lattice for all instances or one each."""
    import pydensecrf.densecrf as densecrf
    from pydensecrf.utils import unary_from_softmax

    height, width = image.shape[:2]
    crf, marginals = None, []
    for p in probabilities:
        if crf is None or not reuse:
            crf = densecrf.DenseCRF2D(width, height, 2)
            crf.addPairwiseGaussian(3, 3)
            crf.addPairwiseBilateral(80, 13, image, 10)
        crf.setUnaryEnergy(unary_from_softmax(p))
        marginals.append(np.array(crf.inference(10)).reshape(p.shape))
    return np.stack(marginals)


def peer_is_installed() -> bool:
    """Whether there is anything to compare with."""
    return importlib.util.find_spec("pydensecrf") is not None


def clock(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds by the wall clock and of CPU time (all threads) of one call, up to the end of its device work."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def medians(runs: list[tuple[float, float]]) -> tuple[float, float]:
    wall, cpu = zip(*runs, strict=True)
    return statistics.median(wall), statistics.median(cpu)


def compare(images: list[np.ndarray], device: torch.device) -> None:
    """Prints the table of times and ratios, and the largest difference of a marginal."""
    print(
        "               ours, ms        pydensecrf, ms, lattice reused     pydensecrf, ms, new each time\n"
        "instances    wall     CPU       wall     CPU  ratio (CPU)          wall     CPU  ratio (CPU)"
    )
    difference, installed = 0.0, peer_is_installed()
    for m in INSTANCES:
        times: dict[str, list[tuple[float, float]]] = {"ours": [], "reused": [], "new": []}
        for index, image in enumerate(images):
            p = confidence_maps(m, image.shape[0], image.shape[1], seed=index)
            image_, p_ = torch.tensor(image, device=device), torch.tensor(p, device=device)
            got = ours(image_, p_).cpu().numpy()
            times["ours"].append(clock(partial(ours, image_, p_), device))
            if not installed:
                continue
            times["reused"].append(clock(partial(peer, image, p, reuse=True), device))
            times["new"].append(clock(partial(peer, image, p, reuse=False), device))
            difference = max(difference, float(abs(got - peer(image, p, reuse=True)).max()))
        wall, cpu = medians(times["ours"])
        row = f"{m:9} {wall:7.1f} {cpu:7.1f} "
        for name in ("reused", "new") if installed else ():
            other_wall, other_cpu = medians(times[name])
            row += f"   {other_wall:7.0f} {other_cpu:7.0f}  {other_wall / wall:5.1f} ({other_cpu / cpu:.1f})     "
        print(row, flush=True)
    print(f"largest difference of a marginal: {difference:.1e}" if installed else "pydensecrf2 is not installed")


def breakdown(image: np.ndarray, device: torch.device, rounds: int) -> None:
    """Prints what the lattices and an iteration cost, and the time that moving an iteration's bytes takes."""
    pixels = torch.tensor(image, device=device)
    large, other = torch.zeros(2, 2**26, device=device)
    copies = [clock(partial(large.copy_, other), device)[0] for _ in range(rounds)]
    bandwidth = 2 * large.nbytes / min(copies) / 1e6
    build = medians([clock(partial(DenseCRF, pixels), device) for _ in range(rounds)])[0]
    crf = DenseCRF(pixels)
    print(f"\nlattices of one image: {build:.1f} ms; memory bandwidth (of a copy): {bandwidth:.0f} GB/s")
    for m in INSTANCES:
        p = torch.tensor(confidence_maps(m, image.shape[0], image.shape[1]), device=device)
        few, many = (medians([clock(partial(crf, p, n), device) for _ in range(rounds)])[0] for n in (0, 20))
        moved = traffic(crf, m)
        floor = moved / bandwidth / 1e6
        print(
            f"{m:3} instances: {(many - few) / 20:6.2f} ms an iteration; its {moved / 1e6:.0f} MB take {floor:.2f} ms; "
            f"unaries and softmax {few:.1f} ms"
        )


def traffic(crf: DenseCRF, columns: int) -> int:
    """Bytes that one iteration reads and writes if every matrix entry and every vector moves once."""
    total = 0
    for kernel, _ in crf._kernels:
        for matrix in (kernel._splat, *kernel._blurs, kernel._slice):
            rows, inputs = matrix.shape
            total += 8 * matrix.values().numel() + 4 * (rows + 1) + 4 * columns * (rows + inputs)
    pixels = crf.image_size[0] * crf.image_size[1]
    return total + 4 * columns * 4 * pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photographs", type=Path, default=PHOTOGRAPHS, help="a folder of .jpg files")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="of the breakdown")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    images = photographs(args.photographs, args.images)
    if not images:
        parser.error(f"{args.photographs} holds no .jpg of 500 x 375 pixels; name a folder with --photographs")
    print(f"{len(images)} photographs of 500 x 375, {device}, {torch.get_num_threads()} threads")
    compare(images, device)
    breakdown(images[0], device, args.rounds)


if __name__ == "__main__":
    main()
