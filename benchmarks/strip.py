"""The README's picture: a photograph, what modules 1 to 4 label in it and the truth, from a finished `labelpenet demo`.

    labelpenet demo --out demo
    python benchmarks/strip.py demo --out docs/strip.png

Generated scenes alone, so the picture may be passed on. One row a scene: the first training scenes with two tags and
three objects; none was picked by how well it went.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from labelpenet.data.files import write_bytes
from labelpenet.data.images import read_image
from labelpenet.formats import open_annotated
from labelpenet.instances import Instances
from labelpenet.training.inferred import read_inferred
from labelpenet.visualize import draw_instances

TITLES = ("photograph and tags", "module 1", "module 2", "module 3", "module 4", "true objects (never used)")
SIDE, GAP, HEAD = 200, 8, 26  # pixels
COLOURS = 128  # of the PNG's palette: a third of the bytes


def row(photograph: np.ndarray, columns: list[Instances]) -> np.ndarray:
    """A photograph and what was found in it, side by side: (SIDE, 6 * SIDE + 5 * GAP, 3)."""
    pictures = [photograph, *(draw_instances(photograph, one) for one in columns)]
    cells = [cv2.resize(one, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for one in pictures]
    gap = np.full((SIDE, GAP, 3), 255, np.uint8)
    return np.hstack([part for cell in cells for part in (cell, gap)][:-1])


def strip(demo: Path, rows: int) -> Image.Image:
    """The whole picture, of few colours: a title above each column, the tags in each photograph."""
    annotated = open_annotated(demo / "scenes" / "VOCdevkit" / "VOC2012", "train")
    classes = annotated.tagged.classes
    found = [read_inferred(demo / "run", f"module{number}", len(classes)) for number in (1, 2, 3, 4)]
    truths = annotated.truths()
    images = [one for one in annotated.tagged.images if len(one.tags) == 2 and len(truths[one.id].instances) == 3][
        :rows
    ]
    lines = []
    for image in images:
        columns = [one[image.id] for one in found]
        lines.append(row(read_image(image.path), [*columns, truths[image.id].instances]))
    canvas = Image.new("RGB", (lines[0].shape[1], HEAD + len(lines) * (SIDE + GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 14)
    for place, title in enumerate(TITLES):
        pen.text((place * (SIDE + GAP), 4), title, fill="black", font=font)
    for place, (image, line) in enumerate(zip(images, lines, strict=True)):
        top = HEAD + place * (SIDE + GAP)
        canvas.paste(Image.fromarray(line), (0, top))
        tags = ", ".join(classes[tag] for tag in image.tags)
        box = pen.textbbox((6, top + SIDE - 22), tags, font=font)
        pen.rectangle((box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3), fill="white")
        pen.text((6, top + SIDE - 22), tags, fill="black", font=font)
    return canvas.quantize(COLOURS, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of labelpenet demo")
    parser.add_argument("--out", type=Path, default=Path("docs/strip.png"))
    parser.add_argument("--rows", type=int, default=2)
    options = parser.parse_args()
    buffer = io.BytesIO()
    strip(options.demo, options.rows).save(buffer, "PNG", optimize=True)
    print(write_bytes(options.out, buffer.getvalue()), len(buffer.getvalue()), "bytes")


if __name__ == "__main__":
    main()
