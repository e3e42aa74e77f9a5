"""What a person said of a run's labels on the review page: COCO instances with a status for each photograph.

Beside COCO's keys an image has ``status`` and ``image`` (its id in the data set), and an annotation ``instance``: which
of the run's instances it was. Photographs that nobody has touched are not listed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import listing, nfc, read_json, write_text
from labelpenet.errors import InputError, told
from labelpenet.formats.rows import check_size, coco_annotation, file_names, image_numbers, read_rows
from labelpenet.instances import Instances

Status = Literal["accepted", "rejected", "dropped", "open"]
KIND = "labels checked on the review page of Label-PEnet"


@dataclass(frozen=True)
class Reviewed:
    """What was said of one photograph.

    Attributes:
        status: ``accepted``: ``rows`` are its objects, all of them; ``rejected``: its labels are wrong, its tags may be
            used; ``dropped``: it is of no use; ``open``: not judged yet, ``rows`` are as changed so far.
        size: (H, W) of the photograph.
        rows: its objects as COCO rows, category 1 being class 0; empty where it is rejected or dropped.
    """

    status: Status
    size: tuple[int, int]
    rows: list[dict[str, Any]]

    def instances(self, classes: int) -> Instances:
        """The objects, weights 1; `InputError` where a box or mask is damaged."""
        rows = [{**row, "score": 1.0} for row in self.rows]
        if not rows:
            return Instances.empty(self.size, with_masks=True)
        return Instances.from_coco(rows, self.size, range(1, classes + 1)).validate(classes)


def is_review(content: Any) -> bool:
    """Whether parsed JSON is such a file."""
    info = content.get("info") if isinstance(content, dict) else None
    return isinstance(info, dict) and info.get("description") == KIND


def accepted(path: Path, content: Any) -> tuple[Any, list[str]]:
    """Parsed JSON, of a review without photographs that were not accepted, of which it says nothing; and notes."""
    if not is_review(content) or not isinstance(content.get("images"), list):
        return content, []
    images = [one for one in content["images"] if isinstance(one, dict) and one.get("status") == "accepted"]
    kept = {str(one.get("id")) for one in images}
    rows = content.get("annotations")
    rows = [
        {**row, "score": 1.0}
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and str(row.get("image_id")) in kept
    ]
    if not images:
        raise InputError(f"{path}: no photograph was accepted in this review; accept some first")
    others = len(content["images"]) - len(images)
    notes = [f"{path}: {others} photographs of the review are not accepted; they are left out"] * bool(others)
    return {**content, "images": images, "annotations": rows}, notes


def write_review(
    path: Path, reviewed: Mapping[str, Reviewed], images: Sequence[TaggedImage], classes: Sequence[str]
) -> Path:
    """Writes what was said of the photographs, by image id, whole or not at all (else an `InputError`)."""
    numbers, names = image_numbers(images), file_names(images)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in images:
        if image.id not in reviewed:
            continue
        one = reviewed[image.id]
        file = {"id": numbers[image.id], "file_name": names[image.id], "height": one.size[0], "width": one.size[1]}
        entries.append({**file, "image": image.id, "status": one.status})
        for row in one.rows:
            numbered = {"id": len(annotations) + 1, "image_id": numbers[image.id]}
            annotations.append({**coco_annotation(row), **numbered})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    content = {
        "info": {"description": KIND}, "images": entries, "categories": categories, "annotations": annotations
    }  # fmt: skip
    return write_text(path, json.dumps(content))


def read_review(
    path: Path, images: Sequence[TaggedImage], classes: Sequence[str]
) -> tuple[dict[str, Reviewed], list[str]]:
    """What was said, by image id, and notes on what is not ours; `InputError` of what no review page writes."""
    content = read_json(path)
    if not is_review(content):
        raise InputError(f"{path}: not written by the review page; choose another file")
    known = {image.id for image in images}
    label = {nfc(name): number for number, name in enumerate(classes, 1)}
    found: dict[str, Reviewed] = {}
    strangers: set[str] = set()

    def again(error: InputError) -> str:  # its remedy is one for predictions
        return f"{str(error).rpartition('; ')[0] or error}; correct it again or take it out of the file"

    said = f"{path}: damaged"
    kinds = (KeyError, TypeError, ValueError, AttributeError)
    with told(lambda error: f"{said} ({type(error).__name__} {error}); restore it or review again", *kinds):
        category = {row["id"]: label.get(nfc(row["name"])) for row in content["categories"]}
        strangers = {row["name"] for row in content["categories"] if category[row["id"]] is None}
        rows: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
        for index, row in enumerate(content["annotations"]):
            if type(row.get("instance", index)) is not int:
                raise ValueError(f"row {index} is of no instance of the run")
            if category[row["category_id"]] is not None:
                own = {**row, "category_id": category[row["category_id"]]}
                rows.setdefault(row["image_id"], []).append((index, own))
        labels = {number: number - 1 for number in label.values()}
        for entry in content["images"]:
            if entry["status"] not in get_args(Status):
                raise ValueError(f"unknown status {str(entry['status'])[:40]!r} of {entry['image']!r}")
            name, own_rows = str(entry["image"]), rows.get(entry["id"], [])
            size = check_size(entry["height"], entry["width"], f"{path}: image {name}")
            with told(again, InputError):
                read_rows(path, own_rows, labels, name, size)  # refuses what is no box or mask
            found[name] = Reviewed(entry["status"], size, [row for _, row in own_rows])
    notes = [f"{path}: its classes {listing(sorted(strangers))} are not asked for"] if strangers else []
    absent = [name for name in found if name not in known]
    if absent:
        notes.append(f"{path}: {len(absent)} photographs are not in the data set, such as {absent[0]}")
    return {name: one for name, one in found.items() if name in known}, notes
