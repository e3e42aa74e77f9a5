"""Every export, loaded in the programs that it is meant for: does it work, and do the masks come back?

    python benchmarks/clients.py write coco-mini/instances.json --out clients   # true masks as every kind of export
    python benchmarks/clients.py read clients                                   # with every client that is installed
    OTHER/bin/python benchmarks/clients.py read clients       # clients that need an environment of their own: datumaro;
                                                              # FiftyOne; Labelme and X-AnyLabeling

VOC's development kit is tried where ``octave-cli`` is installed and its folder ``VOCcode`` lies in ``clients``.

`write` makes two data sets: the one that is given, and ``nasty`` (the same file name in two folders, turned by EXIF,
unicode, quotes, colons, PNG; holes, several parts, single pixels). `read` needs none of our package: it compares what
a client loads, object by object, with ``truth.json``, prints a line a client and export, and keeps all of them in
``results.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from pycocotools import mask as rle

FORMATS: tuple[Any, ...] = ("coco", "coco-polygons", "coco-results", "voc", "yolo", "labelme", "label-studio")
NASTY = ("a/same.jpg", "b/same.jpg", "turned.jpg", "größe 東京.png", 'it\'s: "so".jpg', "plain.PNG")
CLASSES = ('dog: "big"', "чашка", "o'neill, jr")

# Of each image's name, as the export calls it: class and (H, W) bool mask, or (4,) box x1, y1, x2, y2, of each object.
Loaded = Iterable[tuple[str, Iterable[tuple[str, np.ndarray]]]]


# -- writing ---------------------------------------------------------------------------------------------------------


def nasty_photographs(folder: Path) -> list[Any]:
    """The photographs of ``nasty``, 120 x 90 to 125 x 90 pixels as they are seen."""
    from PIL import Image

    from labelpenet.data.dataset import TaggedImage

    images = []
    for number, name in enumerate(NASTY):
        path, exif = folder / name, Image.Exif()
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (90, 120 + number, 3), dtype=np.uint8)
        if name == "turned.jpg":
            exif[0x0112] = 6  # stored lying on its side
            pixels = np.rot90(pixels)
        Image.fromarray(pixels).save(path, exif=exif)
        images.append(TaggedImage(name, path, (0, 1, 2)))
    return images


def nasty_masks(size: tuple[int, int], seed: int) -> np.ndarray:
    """(5, H, W) bool, of which none overlaps: a ring, two parts, a line one pixel wide, a pixel, a ragged blob."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    ring = np.hypot(y - 25, x - 25)
    two = ((y > 60) & (y < 80) & (x > 5) & (x < 18)) | ((y > 55) & (y < 70) & (x > 24) & (x < 50))
    blob = (np.hypot(y - 45, x - 85) < 28) & (rng.random(size) > 0.02)
    return np.stack([(ring < 22) & (ring > 9), two, (y == x + 40) & (x > 22) & (x < 40), (y == 2) & (x == 60), blob])


def write(data: Path, out: Path) -> None:
    """The exports of both data sets, and ``truth.json`` beside them."""
    import torch

    from labelpenet.formats import open_annotated
    from labelpenet.instances import Instances, masks_to_boxes

    def instances(masks: np.ndarray, labels: Any) -> Instances:
        kept = masks.any((1, 2))
        drawn, shown = torch.from_numpy(masks[kept]), torch.as_tensor(labels)[torch.from_numpy(kept)]
        scores = torch.linspace(0.95, 0.05, len(shown))
        return Instances(masks_to_boxes(drawn), shown, scores, (masks.shape[1], masks.shape[2]), drawn)

    annotated = open_annotated(data)
    found = {}
    for image in annotated.tagged.images:
        truth = annotated.read(image.id)
        one = truth.instances[~truth.crowd]
        if one.masks is not None and len(one):
            found[image.id] = instances(one.masks.numpy(), one.labels)
    tagged = annotated.tagged
    export_all(found, tagged.images, tagged.classes, annotated.categories, out / data.parent.name)
    (out / "nasty").mkdir(parents=True)
    images = nasty_photographs(out / "nasty" / "photographs")
    shown = {one.id: instances(nasty_masks((90, 120 + k), k), [0, 1, 2, 0, 1]) for k, one in enumerate(images)}
    export_all(shown, images, CLASSES, None, out / "nasty")


def export_all(found: dict[str, Any], images: Any, classes: Any, ids: Any, out: Path) -> None:
    """One data set in every format, and its truth."""
    from labelpenet.formats import export
    from labelpenet.formats.rows import file_names
    from labelpenet.formats.selection import stems

    for to in FORMATS:
        copies = to not in ("coco-results", "label-studio")
        export(found, images, classes, out / to, to, category_ids=ids, copy_images=copies)
    files, plain, nested = file_names(images), stems(images), stems(images, folders=True)
    truth = [
        {
            "file": files[image.id],
            "stem": plain[image.id],
            "nested": nested[image.id],
            "objects": [
                [classes[row["category_id"] - 1], row["segmentation"]]
                for row in found[image.id].to_coco(0, range(1, len(classes) + 1))
            ],
        }
        for image in images
        if image.id in found
    ]
    (out / "truth.json").write_text(json.dumps({"classes": list(classes), "images": truth}), encoding="utf-8")


# -- clients ---------------------------------------------------------------------------------------------------------
# Each takes the folder of a data set, and for some formats gives what it has loaded of its export.


def polygon_mask(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    return rle.decode(rle.merge(rle.frPyObjects(polygons, *size))).astype(bool)


def pycocotools(home: Path, to: str) -> Loaded:
    from pycocotools.coco import COCO

    coco = COCO(str(home / ("coco" if to == "coco-results" else to) / "annotations/instances_default.json"))
    shown = coco.loadRes(str(home / to / "results.json")) if to == "coco-results" else coco
    for key, image in coco.imgs.items():
        rows = shown.loadAnns(shown.getAnnIds(key, iscrowd=False))
        yield image["file_name"], [(coco.cats[row["category_id"]]["name"], shown.annToMask(row)) for row in rows]


def torchvision(home: Path, to: str) -> Loaded:
    from torchvision import datasets

    if to.startswith("coco"):
        read = datasets.CocoDetection(str(home / to / "images"), str(home / to / "annotations/instances_default.json"))
        for key, (picture, rows) in zip(read.ids, read, strict=True):
            image = read.coco.imgs[key]
            name = read.coco.cats
            yield image["file_name"], [(name[row["category_id"]]["name"], read.coco.annToMask(row)) for row in rows]
            del picture
        return
    boxes = datasets.VOCDetection(str(home / to), "2012", "train")
    for index, (picture, tree) in enumerate(boxes):
        assert picture.size == tuple(int(tree["annotation"]["size"][side]) for side in ("width", "height"))
        objects = tree["annotation"].get("object", [])
        corners = [[float(one["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")] for one in objects]
        shown = [np.array(box) - (1, 1, 0, 0) for box in corners]
        yield Path(boxes.images[index]).stem, list(zip((one["name"] for one in objects), shown, strict=True))


def torchvision_maps(home: Path, to: str) -> Loaded:
    """VOCSegmentation gives class maps; the object maps lie beside them, under the same names."""
    from PIL import Image
    from torchvision import datasets

    maps = datasets.VOCSegmentation(str(home / to), "2012", "train")
    names = (home / to / "VOCdevkit/VOC2012/classes.txt").read_text(encoding="utf-8").splitlines()
    plain = {" ".join(name.split()): name for name in read_truth(home)["classes"]}
    for index, (_, drawn) in enumerate(maps):
        path = Path(maps.masks[index])
        kinds = np.array(drawn)
        objects = np.array(Image.open(path.parents[1] / "SegmentationObject" / path.name))
        shown = [objects == value for value in np.unique(objects) if value not in (0, 255)]
        yield path.stem, [(plain[names[kinds[mask][0] - 1]], mask) for mask in shown]


def supervision(home: Path, to: str) -> Loaded:
    import supervision as sv

    if to == "yolo":
        labels = [str(home / to / "images/train"), str(home / to / "labels/train"), str(home / to / "data.yaml")]
        read = sv.DetectionDataset.from_yolo(*labels, force_masks=True)
    elif to == "voc":
        year = home / to / "VOCdevkit/VOC2012"
        read = sv.DetectionDataset.from_pascal_voc(str(year / "JPEGImages"), str(year / "Annotations"))
    else:
        path = str(home / to / "annotations/instances_default.json")
        read = sv.DetectionDataset.from_coco(str(home / to / "images"), path, force_masks=True)
    for path, _, found in read:
        shown = found.xyxy if found.mask is None else found.mask
        name = str(Path(path).relative_to(home / to / "images")) if to.startswith("coco") else Path(path).stem
        yield name, [(read.classes[kind], one) for kind, one in zip(found.class_id, shown, strict=True)]


def ultralytics(home: Path, to: str) -> Loaded:
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset, polygon2mask

    settings = check_det_dataset(str(home / to / "data.yaml"), autodownload=False)
    read = YOLODataset(settings["train"], data=settings, task="segment", augment=False)
    for one in read.labels:
        height, width = one["shape"]
        scale = np.array([width, height])
        shown = [polygon2mask((height, width), [(part * scale).reshape(-1)]) for part in one["segments"]]
        kinds = [settings["names"][int(kind)] for kind in one["cls"].flatten()]
        yield Path(one["im_file"]).stem, list(zip(kinds, shown, strict=True))


def datumaro(home: Path, to: str) -> Loaded:
    import datumaro as dm

    place = home / to / ("VOCdevkit/VOC2012" if to == "voc" else "")
    read = dm.Dataset.import_from(str(place), to if to in ("yolo", "voc") else "coco")
    names = read.categories()[dm.AnnotationType.label]
    for item in read:
        shown: dict[Any, tuple[str, np.ndarray]] = {}  # the polygons of an object are a group
        for number, one in enumerate(item.annotations):
            if one.type == dm.AnnotationType.mask:
                shown[f"mask {number}"] = names[one.label].name, np.asarray(one.image).astype(bool)
            elif one.type == dm.AnnotationType.polygon:
                drawn = polygon_mask([one.points], item.media.size)
                before = shown.get(one.group, ("", np.zeros_like(drawn)))[1]
                shown[one.group] = names[one.label].name, drawn | before
        yield item.id, list(shown.values())


def label_studio_sdk(home: Path, to: str) -> Loaded:
    """The tasks fit the interface, and the SDK's converter makes COCO of them once a person has accepted all."""
    from label_studio_sdk.converter import Converter
    from label_studio_sdk.label_interface import LabelInterface

    config = (home / to / "labels.xml").read_text(encoding="utf-8")
    tasks = json.loads((home / to / "tasks.json").read_text(encoding="utf-8"))
    interface = LabelInterface(config)
    for number, task in enumerate(tasks, 1):
        if wrong := [line for one in task["predictions"] for line in interface.validate_prediction(one, True)]:
            raise ValueError(wrong[0])
        task |= {"id": number, "annotations": [{"id": number, **task.pop("predictions")[0], "completed_by": 1}]}
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "tasks.json", Path(folder) / "coco"
        path.write_text(json.dumps(tasks), encoding="utf-8")
        converter = Converter(config, project_dir=folder, download_resources=False)
        converter.convert_to_coco(str(path), str(out), is_dir=False)
        content = json.loads((out / "result.json").read_text(encoding="utf-8"))
    names = {row["id"]: row["name"] for row in content["categories"]}
    for image, task in zip(content["images"], tasks, strict=True):
        size = image["height"], image["width"]
        rows = [row for row in content["annotations"] if row["image_id"] == image["id"]]
        shown = [(names[row["category_id"]], polygon_mask(row["segmentation"], size)) for row in rows]
        yield unquote(task["data"]["image"].split("?d=")[-1]), shown


def fiftyone(home: Path, to: str) -> Loaded:
    """FiftyOne's importers, which work without its database."""
    from fiftyone.utils.coco import COCODetectionDatasetImporter
    from fiftyone.utils.voc import VOCDetectionDatasetImporter
    from fiftyone.utils.yolo import YOLOv5DatasetImporter
    from PIL import Image

    folder = home / to
    if to == "yolo":
        reader = YOLOv5DatasetImporter(yaml_path=str(folder / "data.yaml"), split="train", label_type="polylines")
    elif to == "voc":
        folder /= "VOCdevkit/VOC2012"
        reader = VOCDetectionDatasetImporter(
            data_path=str(folder / "JPEGImages"), labels_path=str(folder / "Annotations")
        )
    else:
        reader = COCODetectionDatasetImporter(
            data_path=str(folder / "images"),
            labels_path=str(folder / "annotations/instances_default.json"),
            label_types=["segmentations"],
        )
    with reader:
        for path, _, found in reader:
            with Image.open(path) as picture:
                width, height = picture.size
            objects = found.polylines if to == "yolo" else found.detections
            shown: list[np.ndarray] = []
            for one in objects:
                if to == "yolo":
                    shown.append(one.to_segmentation(frame_size=(width, height)).mask > 0)
                    continue
                x, y, w, h = np.array(one.bounding_box) * (width, height, width, height)
                shown.append(np.array([x, y, x + w, y + h]))
                if one.has_mask:  # it fills the box
                    top, left = round(y), round(x)
                    drawn = np.zeros((height, width), bool)
                    drawn[top : top + one.mask.shape[0], left : left + one.mask.shape[1]] = one.mask
                    shown[-1] = drawn
            name = Path(path).relative_to(folder / "images").as_posix() if to.startswith("coco") else Path(path).stem
            yield name, list(zip((one.label for one in objects), shown, strict=True))


def voc_devkit(home: Path, to: str) -> Loaded:
    """What VOCreadrecxml says of every image of the split, in Octave."""
    script = """
    for name = strsplit(strtrim(fileread([year '/ImageSets/Main/train.txt'])), "\\n")
        rec = VOCreadrecxml([year '/Annotations/' name{1} '.xml']);
        for one = rec.objects
            printf("%s\\t%s\\t%d %d %d %d\\n", name{1}, one.class, one.bbox);
        end
    end"""
    found: dict[str, list[tuple[str, np.ndarray]]] = {}
    for line in octave(script, home / to).splitlines():
        name, kind, box = line.split("\t")
        found.setdefault(name, []).append((kind, np.array(box.split(), float) - (1, 1, 0, 0)))
    yield from found.items()


def voc_devkit_maps(home: Path, to: str) -> Loaded:
    """The class and object maps as the kit takes them: by imread, as indices."""
    script = """
    for name = strsplit(strtrim(fileread([year '/ImageSets/Segmentation/train.txt'])), "\\n")
        objects = imread([year '/SegmentationObject/' name{1} '.png']);
        classes = imread([year '/SegmentationClass/' name{1} '.png']);
        printf("%s\\t%d %d\\t%s\\t%s\\n", name{1}, size(objects), sprintf("%02x", objects), sprintf("%02x", classes));
    end"""
    names = (home / to / "VOCdevkit/VOC2012/classes.txt").read_text(encoding="utf-8").splitlines()
    for line in octave(script, home / to).splitlines():
        name, size, *maps = line.split("\t")
        objects, kinds = (
            np.frombuffer(bytes.fromhex(one), np.uint8).reshape([int(side) for side in size.split()], order="F")
            for one in maps
        )
        shown = [objects == value for value in np.unique(objects) if value not in (0, 255)]
        yield name, [(names[kinds[mask][0] - 1], mask) for mask in shown]


def octave(script: str, folder: Path) -> str:
    settings = f"addpath('{folder.parents[1] / 'VOCcode'}'); year = '{folder / 'VOCdevkit/VOC2012'}';"
    ran = subprocess.run(["octave-cli", "--eval", settings + script], capture_output=True, encoding="utf-8")
    if ran.returncode:
        raise ValueError(ran.stderr)
    return ran.stdout


def labelme(home: Path, to: str) -> Loaded:
    from labelme._label_file import LabelFile
    from labelme.utils import img_data_to_arr, shape_to_mask

    for path in sorted((home / to).rglob("*.json")):
        if path.name.startswith("."):
            continue
        read = LabelFile(str(path))
        size = img_data_to_arr(read.image_data).shape[:2]
        shown: dict[Any, tuple[str, np.ndarray]] = {}  # the polygons of an object are a group
        for number, one in enumerate(read.shapes):
            key = number if one["group_id"] is None else f"group {one['group_id']}"
            drawn = shape_to_mask(size, one["points"], one["shape_type"])
            shown[key] = one["label"], drawn | shown.get(key, ("", np.zeros(size, bool)))[1]
        yield path.relative_to(home / to).as_posix(), list(shown.values())


def x_anylabeling(home: Path, to: str) -> Loaded:
    """Its window's reader, and its converter to masks for each object."""
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    from anylabeling.views.labeling.label_converter import LabelConverter
    from anylabeling.views.labeling.label_file import LabelFile
    from PIL import Image

    for path in sorted((home / to).rglob("*.json")):
        if path.name.startswith("."):
            continue
        read = LabelFile(str(path))
        groups: dict[Any, list[dict[str, Any]]] = {}
        for number, one in enumerate(shape.to_dict() for shape in read.shapes):
            key = number if one["group_id"] is None else f"group {one['group_id']}"
            groups.setdefault(key, []).append(one)
        shown = []
        with Image.open(io.BytesIO(read.image_data)) as picture, tempfile.TemporaryDirectory() as folder:
            alone, drawn = Path(folder, "one.json"), Path(folder, "one.png")
            for shapes in groups.values():
                kind = shapes[0]["label"]
                content = {"imageWidth": picture.width, "imageHeight": picture.height, "shapes": shapes}
                alone.write_text(json.dumps(content), encoding="utf-8")
                table = {"type": "grayscale", "colors": {kind: 255}}
                LabelConverter().custom_to_mask(str(alone), str(drawn), table)
                shown.append((kind, np.array(Image.open(drawn)) > 0))
        yield path.relative_to(home / to).as_posix(), shown


CLIENTS: dict[str, tuple[str, dict[str, Callable[[Path, str], Loaded]]]] = {
    "pycocotools": ("pycocotools", dict.fromkeys(("coco", "coco-polygons", "coco-results"), pycocotools)),
    "torchvision": ("torchvision", dict.fromkeys(("coco", "coco-polygons", "voc"), torchvision)),
    "torchvision, maps": ("torchvision", {"voc": torchvision_maps}),
    "supervision": ("supervision", dict.fromkeys(("coco", "coco-polygons", "voc", "yolo"), supervision)),
    "Ultralytics": ("ultralytics", {"yolo": ultralytics}),
    "datumaro": ("datumaro", dict.fromkeys(("coco", "coco-polygons", "voc", "yolo"), datumaro)),
    "FiftyOne": ("fiftyone", dict.fromkeys(("coco", "coco-polygons", "voc", "yolo"), fiftyone)),
    "VOC devkit, Octave": ("octave", {"voc": voc_devkit}),
    "VOC devkit, maps, Octave": ("octave", {"voc": voc_devkit_maps}),
    "Labelme": ("labelme", {"labelme": labelme}),
    "X-AnyLabeling": ("x-anylabeling-cvhub", {"labelme": x_anylabeling}),
    "Label Studio's SDK": ("label-studio-sdk", {"label-studio": label_studio_sdk}),
}


# -- comparing -------------------------------------------------------------------------------------------------------


def read_truth(home: Path) -> Any:
    return json.loads((home / "truth.json").read_text(encoding="utf-8"))


def compare(home: Path, to: str, loaded: Loaded) -> tuple[list[float], bool]:
    """The IoU of every true object with its own among those loaded (0 where there is none), and whether boxes came.

    Raises:
        ValueError: other images, another number of objects, or a class that is none.
    """
    key = {"voc": "stem", "yolo": "stem", "label-studio": "file"}.get(to, "nested")
    truth = {one[key]: one["objects"] for one in read_truth(home)["images"]}
    overlaps: list[float] = []
    boxes = False
    for name, shown in loaded:
        name = next((one for one in (name, Path(name).with_suffix("").as_posix()) if one in truth), name)
        name = next((one for one in truth if Path(one).with_suffix("").as_posix() == name), name)
        if name not in truth:
            raise ValueError(f"image {name!r} is unknown or came twice")
        objects, shown = truth.pop(name), list(shown)
        if to == "voc" and any(one.ndim > 1 for _, one in shown):
            objects = visible(objects)
        if len(objects) != len(shown):
            raise ValueError(f"{name}: {len(shown)} objects instead of {len(objects)}")
        boxes |= any(one.ndim == 1 for _, one in shown)
        drawn = [x_y_sides(one) if one.ndim == 1 else rle.encode(np.asfortranarray(one, np.uint8)) for _, one in shown]
        true = [rle.toBbox(mask).tolist() if boxes else mask for _, mask in objects]
        if not objects:
            continue
        table = np.array(rle.iou(true, drawn, [False] * len(drawn)), float).reshape(len(true), len(drawn))
        table *= np.array([[kind == other for other, _ in shown] for kind, _ in objects])
        while table.size and len(table):
            row, column = np.unravel_index(table.argmax(), table.shape)
            overlaps.append(float(table[row, column]))
            table = np.delete(np.delete(table, row, 0), column, 1)
    if truth:
        raise ValueError(f"{len(truth)} images are missing, such as {next(iter(truth))!r}")
    return overlaps, boxes


def visible(objects: list[Any]) -> list[Any]:
    """What of the objects, in descending order of their scores, an index map can hold."""
    masks = rle.decode([mask for _, mask in objects]).astype(bool)
    masks &= ~(np.cumsum(masks, -1, dtype=np.int32) - masks > 0)
    drawn = rle.encode(np.asfortranarray(masks, np.uint8))
    return [[name, mask] for (name, _), mask in zip(objects, drawn, strict=True) if rle.area(mask)]


def x_y_sides(box: np.ndarray) -> list[float]:
    return [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]


def installed(package: str, out: Path) -> str | None:
    """The version that is installed here; of Octave only where the development kit is there too."""
    if package == "octave":
        if not shutil.which("octave-cli") or not (out / "VOCcode" / "VOCreadrecxml.m").is_file():
            return None
        ran = subprocess.run(["octave-cli", "--version"], capture_output=True, text=True)
        return ran.stdout.split("version ")[1].split()[0]
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def results(out: Path, clients: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A row for each client that is installed, export and data set."""
    for client in clients:
        package, formats = CLIENTS[client]
        found = installed(package, out)
        if found is None:
            continue
        for to, load in formats.items():
            for home in sorted(path.parent for path in out.glob("*/truth.json")):
                row: dict[str, Any] = {"client": client, "version": found, "export": to, "data": home.name}
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        overlaps, boxes = compare(home, to, load(home, to))
                    row |= {"kind": "boxes" if boxes else "masks", "objects": len(overlaps)}
                    row |= {"mean": float(np.mean(overlaps)), "least": min(overlaps)}
                except Exception as error:  # whatever the client stumbles over is the result
                    row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                yield row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a client and export: number of objects, mean and least IoU on each data set."""
    data = sorted({row["data"] for row in rows})
    lines = [f"| export | client | {' | '.join(data)} |", "|---" * (2 + len(data)) + "|"]
    found: dict[tuple[int, str], dict[str, str]] = {}
    for row in rows:
        figures = f"{row['objects']} {row['kind']}, {row['mean']:.4f} / {row['least']:.3f}" if "mean" in row else "no"
        key = FORMATS.index(row["export"]), f"{row['client']} {row['version']}"
        found.setdefault(key, {})[row["data"]] = figures
    for (place, client), cells in sorted(found.items()):
        lines.append(f"| `{FORMATS[place]}` | {client} | {' | '.join(cells.get(one, '') for one in data)} |")
    lines += [
        "",
        *(f"{row['client']}, {row['export']}, {row['data']}: {row['failed']}" for row in rows if "failed" in row),
    ]
    known = {row["client"] for row in rows}
    return "\n".join([*lines, *(f"{client}: not installed" for client in CLIENTS if client not in known)])


def read(out: Path, clients: Iterable[str]) -> None:
    """Tries the clients that are installed here, and prints what is known of all."""
    logging.disable(logging.WARNING)
    path = out / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    new = list(results(out, clients))
    tried = {row["client"] for row in new}
    rows = [row for row in rows if row["client"] not in tried] + [{**row, "date": time.strftime("%F")} for row in new]
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table(rows))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing, reading = commands.add_parser("write"), commands.add_parser("read")
    writing.add_argument("data", type=Path, help="COCO's instances.json with true masks")
    writing.add_argument("--out", type=Path, default=Path("clients"))
    reading.add_argument("out", type=Path)
    reading.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    one = parser.parse_args()
    if one.command == "write":
        if one.out.exists():
            sys.exit(f"{one.out}: is there already; remove it or choose another --out")
        write(one.data, one.out)
    else:
        read(one.out.resolve(), one.clients)


if __name__ == "__main__":
    main()
