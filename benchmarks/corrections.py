"""How much corrected photographs lift module 4: 25, 50, 100 of them, chosen by the ranking and at random.

    python benchmarks/corrections.py voc-animals/VOCdevkit/VOC2012 --out runs/corrections --shorten 0.1 \
        --weights mobilenet_v2_imagenet.safetensors --classes cat,cow,dog,horse,person,sheep

True masks stand in for the person's. Trains a cascade on tags, then one for each row by mixed supervision, all of the
same seed and schedule, and measures module 4 on held-out photographs. Only photographs with true masks are chosen from,
for both kinds of choice. Every run and every measurement is kept: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labelpenet import config
from labelpenet.config import MODULES
from labelpenet.data import AnnotatedImages, TaggedImages, run_folder
from labelpenet.data.files import read_json, write_json, write_text
from labelpenet.errors import InputError
from labelpenet.formats import open_annotated
from labelpenet.formats.review import Reviewed, write_review
from labelpenet.instances import Instances
from labelpenet.review import rank
from labelpenet.training.inferred import read_inferred
from labelpenet.training.measure import measure_run
from labelpenet.training.run import train_run
from labelpenet.training.supervised import Supervision, open_supervision, true_objects


def with_masks(annotated: AnnotatedImages) -> dict[str, Instances]:
    """The true objects, by image id, of the photographs in which every object has a mask."""
    found = {}
    for image in annotated.tagged.images:
        try:
            one = true_objects(annotated.read(image.id))
        except InputError:  # a damaged annotation costs its photograph
            continue
        if len(one) and one.masks is not None:
            found[image.id] = one
    return found


def choose(kind: str, base: Path, images: TaggedImages, known: dict[str, Instances], seed: int) -> list[str]:
    """The ids in the order in which a person would correct them."""
    if kind == "at random":
        return np.random.default_rng(seed).permutation(sorted(known)).tolist()
    found = {number: read_inferred(base, f"module{number}", len(images.classes)) for number in (1, 2, 3, 4)}
    return [image.id for image, _ in rank(images.images, found) if image.id in known]


def correct(path: Path, chosen: Sequence[str], images: TaggedImages, known: dict[str, Instances]) -> Path:
    """A file of the review page in which the chosen photographs were accepted with their true objects."""
    categories = list(range(1, len(images.classes) + 1))
    said = {
        name: Reviewed("accepted", known[name].image_size, known[name].to_coco(name, categories)) for name in chosen
    }
    return write_review(path, said, images.images, images.classes)


def thinned(annotated: AnnotatedImages, every: int, path: Path) -> str:
    """A file that lists every n-th photograph of a split, as the name of a split."""
    return str(write_text(path, "".join(f"{image.id}\n" for image in annotated.tagged.images[::every])))


def begin(base: Path, run: Path, supervision: Supervision) -> None:
    """A run that has what tags alone have taught ``base``; training it fails where the corrections change a tag."""
    run_folder.check_out(run, False)
    # first of all, so that one that is interrupted here is a run, which trains itself what it lacks
    write_json(run_folder.facts(run), run_folder.read_facts(base) | supervision.facts())
    shutil.copytree(run_folder.features(base), run_folder.features(run))
    for part in ("stem", MODULES[0]):
        run_folder.weights(run, part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run_folder.weights(base, part), run_folder.weights(run, part))


def row(options: argparse.Namespace, run: Path, images: TaggedImages, split: str, file: Path | None) -> dict[str, Any]:
    """Trains and measures one run, where that has not been done; what module 4 reaches on held-out photographs."""
    if not run_folder.results(run).is_file():
        supervision = open_supervision("mixed", options.data, split, images, None, [file]) if file is not None else None
        if supervision is not None and not run_folder.facts(run).is_file():
            begin(options.out / "tags", run, supervision)
        train_run(
            images,
            run,
            config.override(config.shorten(config.recipe(options.recipe), options.shorten), options.set),
            backbone=options.backbone,
            weights=options.weights,
            supervision=supervision,
            options=config.CascadeOptions(run_folder.facts(run).is_file(), options.seed, cache=options.cache),
        )
        held_out = str(options.out / "held-out.txt")
        measure_run(run, options.data, held_out, None, [4], cache=options.cache)
    return read_json(run_folder.results(run))["val"]["4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="VOC year folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--classes", type=lambda text: text.split(","))
    parser.add_argument("--counts", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--every", type=int, default=1, help="train on every n-th photograph")
    parser.add_argument("--every-held-out", type=int, help="measure on every n-th one; default: as --every")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--shorten", type=float, default=0.1)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    held_out = open_annotated(options.data, "val", options.classes)
    thinned(held_out, options.every_held_out or options.every, options.out / "held-out.txt")
    split = thinned(open_annotated(options.data, "train", options.classes), options.every, options.out / "train.txt")
    annotated = open_annotated(options.data, split, options.classes)
    images, known = annotated.tagged, with_masks(annotated)
    base = options.out / "tags"
    rows = [("tags alone", row(options, base, images, split, None))]
    for kind in ("by the ranking", "at random"):
        order = choose(kind, base, images, known, options.seed)
        for count in (count for count in options.counts if count <= len(order)):
            name = f"{kind.split()[-1]}-{count}"
            file = correct(options.out / f"{name}.json", order[:count], images, known)
            rows.append((f"{count} corrected, {kind}", row(options, options.out / name, images, split, file)))
    title = f"{len(images.images)} photographs, {len(known)} with masks"
    print(f"| {title} | box mAP@.5 | mask mAP@.25 | @.5 | @.75 | ABO | mIoU |\n|---|---|---|---|---|---|---|")
    for title, result in rows:
        box, mask = result["box"]["mAP"], result["mask"]
        values = (box, *(mask[name] for name in ("mAP@0.25", "mAP@0.5", "mAP@0.75", "ABO")), result["semantic"]["mIoU"])
        print(f"| {title} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")


if __name__ == "__main__":
    main()
