"""What proposals cost and cover: recall and average best overlap against seconds per image, and images per second.

    python benchmarks/proposals.py VOCdevkit/VOC2012 --split val --images 80
    python benchmarks/proposals.py VOCdevkit/VOC2012 --split val --images 80 --throughput

Seconds are processor time of one thread in `propose` (the image is already decoded), so that other work on the machine
distorts them little; images per second are wall time of `compute_proposals` with an empty cache, reading and starting
the processes included. The images are evenly spaced over the split. docs/proposals.md has the results.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import cv2

from labelpenet.config import Proposals
from labelpenet.data import proposals as proposals_module
from labelpenet.data.dataset import TaggedImage, Truth
from labelpenet.data.images import read_image
from labelpenet.data.proposals import compute_proposals, propose
from labelpenet.evaluation.recall import recall
from labelpenet.formats import open_annotated

COUNTS = (100, 300, 1000, 10**6)
GRID = [  # settings and the scale of selective search
    *((Proposals("selective-search-fast", side), scale) for side in (200, 250, 300, 400, None) for scale in (150, 100)),
    *((Proposals("selective-search-quality", side), 150) for side in (200, 300)),
    *((Proposals("edge-boxes", side), 100) for side in (200, 300, None)),
]


def coverage(images: list[TaggedImage], truths: dict[str, Truth], classes: tuple[str, ...]) -> None:
    """Prints a Markdown table: for each setting seconds per image and, for each count, recall and overlap."""
    cv2.setNumThreads(1)
    pixels = {image.id: read_image(image.path) for image in images}
    print("| method | side | scale | s / image | boxes | first 100 | first 300 | first 1000 | all |")
    print("|---|---|---|---|---|---|---|---|---|")
    for settings, proposals_module.SCALE in GRID:
        proposals_module.MOST = 2000 if settings.method == "edge-boxes" else 10**6
        start = time.process_time()
        proposals = {name: propose(image, settings) for name, image in pixels.items()}
        seconds = (time.process_time() - start) / len(pixels)
        rows = recall(proposals, truths, classes, COUNTS)["rows"]
        cells = [f"{row['recall@0.5']:.3f} / {row['recall@0.7']:.3f} / {row['ABO']:.3f}" for row in rows]
        head = [
            settings.method,
            settings.side or "full",
            proposals_module.SCALE if "search" in settings.method else "-",
        ]
        print("|", " | ".join(map(str, [*head, f"{seconds:.3f}", f"{rows[-1]['boxes']:.0f}", *cells])), "|", flush=True)


def throughput(images: list[TaggedImage]) -> None:
    """Prints images per second of the default settings for 1, 2, 4, ... processes."""
    print("| processes | images / s |\n|---|---|")
    for workers in (1, 2, 4, 8, 16):
        if workers > (len(images) + 1) // 2:
            break
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            compute_proposals(images, Proposals(side=250), Path(cache), workers)
            print(f"| {workers} | {len(images) / (time.perf_counter() - start):.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data set with boxes")
    parser.add_argument("--split", default="val")
    parser.add_argument("--classes", default="cat,cow,dog,horse,person,sheep", help="comma-separated")
    parser.add_argument("--images", type=int, default=80, help="how many, evenly spaced over the split")
    parser.add_argument("--throughput", action="store_true", help="images per second over processes instead")
    arguments = parser.parse_args()
    annotated = open_annotated(arguments.data, arguments.split, arguments.classes.split(","))
    everything = annotated.tagged.images
    number = min(arguments.images, len(everything))
    images = [everything[i * len(everything) // number] for i in range(number)]
    if arguments.throughput:
        throughput(images)
    else:
        coverage(images, {image.id: annotated.read(image.id) for image in images}, annotated.tagged.classes)


if __name__ == "__main__":
    main()
