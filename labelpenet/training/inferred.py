"""What a module inferred for every training image: kept in the run folder, one row of COCO results an instance.

``RUN/instances/MODULE.json`` is a predictions file that `evaluate`, `export` and readers of COCO take. While a module
is still inferring, ``RUN/instances/MODULE.part0.jsonl`` grows by a line an image: an interruption costs a few images.
"""

import contextlib
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from labelpenet.data import run_folder
from labelpenet.data.dataset import ByImage, TaggedImage, TaggedImages
from labelpenet.data.files import RESUME, json_lines, read_json, sealed, write_text, writing
from labelpenet.errors import InputError
from labelpenet.formats.predictions import coco_text
from labelpenet.formats.rows import check_size, read_rows
from labelpenet.instances import Instances
from labelpenet.progress import Progress, log_notes
from labelpenet.training.photographs import Answer

Rows = list[dict[str, Any]]


class Inferred(ByImage[Instances]):
    """The instances of each image by id, decoded when asked for (masks stay run-length encoded in memory).

    An image that could not be read when it was to be labelled is not there.
    """

    def __init__(self, rows: dict[str, Rows], sizes: dict[str, tuple[int, int]], num_classes: int):
        self._rows, self._known, self._categories = rows, sizes, list(range(1, num_classes + 1))

    def __getitem__(self, image_id: str) -> Instances:
        size = self._known[image_id]
        rows = self._rows.get(image_id, [])
        found = Instances.from_coco(rows, size, self._categories)
        return found if rows else Instances.empty(size, with_masks=True)

    def rows(self, image_id: str) -> Rows:
        """The instances of an image as COCO rows, not decoded; category 1 is class 0."""
        return self._rows.get(image_id, [])

    def size(self, image_id: str) -> tuple[int, int]:
        """(H, W) of an image."""
        return self._known[image_id]


def read_inferred(run: Path, name: str, num_classes: int) -> Inferred:
    """The instances that a module inferred for the training images; `InputError` where it has not finished, or the file
    is damaged.
    """
    path = run_folder.instances(run, name)
    if not path.is_file():
        raise InputError(f"{path}: not there; module {name} has not labelled the training images yet, train it first")
    try:
        content = read_json(path)
        # Version 0.1 gave the images' ids as COCO's.
        names = {image["id"]: image.get("image", image["id"]) for image in content["images"]}
        sizes = {names[image["id"]]: (image["height"], image["width"]) for image in content["images"]}
        rows: dict[str, Rows] = {}
        for row in content["annotations"]:
            rows.setdefault(names[row["image_id"]], []).append(row)
        labels = {number + 1: number for number in range(num_classes)}
        for name, size in sizes.items():
            own = read_rows(path, list(enumerate(rows.get(name, []))), labels, name, check_size(*size, name))
            if own.scores.min(initial=0) < 0 or own.scores.max(initial=1) > 1:
                raise ValueError(f"{name}: a score is not in [0, 1]")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged; labelpenet train ... --resume makes it again") from error
    return Inferred(rows, sizes, num_classes)


def infer_all(
    run: Path,
    name: str,
    images: TaggedImages,
    find: Callable[[Sequence[TaggedImage]], Generator[Answer, None, None]],
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> None:
    """Labels every training image once, where an earlier run has not, and writes ``RUN/instances/NAME.json``.

    Args:
        find: what is found in images, in order (`training.photographs`); one with a note is left out, as what it shows
            is not known, and tried again by a resumed run.
        rank, world, barrier: this process among those that share the work.

    Raises:
        InputError: not one image could be labelled.
    """
    target = run_folder.instances(run, name)
    if target.is_file():
        try:
            read_inferred(run, name, len(images.classes))
            return
        except InputError:
            log_notes(f"{target} is damaged; it is made again")
    target.parent.mkdir(parents=True, exist_ok=True)
    done = {line["id"] for line in _read_parts(target)}
    barrier()
    share = images.images[rank::world]
    mine = [image for image in share if image.id not in done]
    before = len(share) - len(mine)
    part = target.with_suffix(f".part{rank}.jsonl")

    with (
        Progress(f"{name} labels the images", len(share), before) as progress,
        writing(part, RESUME),
        part.open("a", encoding="utf-8") as file,
        contextlib.closing(find(mine)) as answers,
    ):
        for image, found, note in progress.tracked(answers, before):
            if found is None:
                progress.say(note)
                continue
            rows = found.to("cpu").to_coco(image.id)
            file.write("\n" + sealed(json.dumps({"id": image.id, "size": list(found.image_size), "rows": rows})))
            file.flush()
    barrier()
    if rank == 0:
        by_id = {line["id"]: line for line in _read_parts(target)}
        if not by_id:
            raise InputError(f"{name} could label none of the images; see the notes above, then use --resume")
        ordered = (by_id[image.id] for image in images.images if image.id in by_id)
        lines = ((line["id"], tuple(line["size"]), line["rows"]) for line in ordered)
        text = coco_text(lines, images.images, images.classes, with_ids=True)
        write_text(target, sealed(text) + "\n", RESUME)
        for old in target.parent.glob(f"{target.stem}.part*.jsonl"):
            old.unlink()
    barrier()


def _read_parts(target: Path) -> list[dict[str, Any]]:
    """The whole lines of all part files; the image of one that an interruption has torn is done again."""
    parts = sorted(target.parent.glob(f"{target.stem}.part*.jsonl"))
    return [line for part in parts for line in json_lines(part) if "rows" in line]
