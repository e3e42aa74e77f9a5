"""Folders as tools write them: the same two photographs, a.jpg and sub/b.jpg, in every layout that is read.

`LAYOUTS` holds for each layout what writes it into a folder and what must come out. In a.jpg are a cat in the box
(4, 6, 20, 18) and, where the layout can say so, a dog in (10, 2, 30, 22); b.jpg shows nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.formats.kits import SIZE, photograph

HEIGHT, WIDTH = SIZE
CAT, DOG = (4, 6, 20, 18), (10, 2, 30, 22)
CLASSES = ["cat", "dog"]


@dataclass(frozen=True)
class Layout:
    """What is written, and how it is opened.

    Attributes:
        write: fills a folder and returns what the user gives as DATA.
        split: the split to ask for.
        tags: by image id the names that must come out.
        boxes, masks: whether the truth holds them.
    """

    write: Callable[[Path], Path]
    split: str | None = None
    tags: dict[str, tuple[str, ...]] | None = None
    boxes: bool = False
    masks: bool = False
    classes: tuple[str, ...] | None = None


def photographs(root: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        photograph(root / name, seed=seed)


def corners(box: tuple[int, int, int, int]) -> list[int]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---------------------------------------------------------------------------------------------------------------- COCO


def coco(names: tuple[str, str], first: int = 1) -> dict[str, Any]:
    rows = [
        {"id": index, "image_id": 1, "category_id": index + first - 1, "iscrowd": 0,
         "area": 1, "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "segmentation": [corners(box)]}
        for index, box in enumerate((CAT, DOG), 1)
    ]  # fmt: skip
    images = [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(names, 1)]
    categories = [{"id": index + first, "name": name} for index, name in enumerate(CLASSES)]
    return {"images": images, "annotations": rows, "categories": categories, "info": {}, "licenses": []}


def coco_layout(file: str, images: str, given: str = ".", names: tuple[str, str] = ("a.jpg", "b.jpg")) -> Any:
    def fill(root: Path) -> Path:
        photographs(root / images, *(name.replace("\\", "/") for name in names))
        write(root / file, coco(names))
        return root / given

    return fill


def label_studio_coco(root: Path) -> Path:
    """Label Studio's: names lead from a folder on its server to its uploads, also where the export holds the images."""
    photographs(root / "images", "a.jpg", "b.jpg")
    write(root / "result.json", coco(("../../media/upload/3/a.jpg", "..\\..\\media\\upload\\3\\b.jpg")))
    return root


def brushed(root: Path) -> Path:
    """Masks as CVAT and datumaro write them: run lengths, every one with iscrowd 1."""
    photographs(root / "images/default", "a.jpg", "b.jpg")
    content = coco(("a.jpg", "b.jpg")) | {"licenses": [{"name": "", "id": 0, "url": ""}]}
    for row, box in zip(content["annotations"], (CAT, DOG), strict=True):
        x1, y1, x2, y2 = box
        runs = [HEIGHT * x1 + y1, *[y2 - y1, HEIGHT - y2 + y1] * (x2 - x1)]
        runs[-1] += HEIGHT * (WIDTH - x2) - y1
        row |= {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs}}
    write(root / "annotations/instances_default.json", content)
    return root


def crowds(root: Path) -> Path:
    brushed(root)
    path = root / "annotations/instances_default.json"
    write(path, json.loads(path.read_text()) | {"licenses": []})
    return root


def roboflow(root: Path) -> Path:
    for split in ("train", "valid"):
        photographs(root / split, "a.jpg", "b.jpg")
        content = coco(("a.jpg", "b.jpg"), 1)
        content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
        write(root / split / "_annotations.coco.json", content)
    write(root / "README.roboflow.txt", "hello")
    return root


def datumaro(root: Path) -> Path:
    for split in ("train", "val"):
        photographs(root / "images" / split, "a.jpg", "b.jpg")
        write(root / f"annotations/instances_{split}.json", coco(("a.jpg", "b.jpg")))
    return root


# ---------------------------------------------------------------------------------------------------------------- YOLO


def yolo_box(index: int, box: tuple[int, int, int, int]) -> str:
    x1, y1, x2, y2 = box
    values = (x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT
    return " ".join([str(index), *(f"{value:.8f}" for value in values)]) + "\n"


def yolo_outline(index: int, box: tuple[int, int, int, int]) -> str:
    x1, y1, x2, y2 = box
    points = corners((x1, y1, x2 - 1, y2 - 1))  # through the centres of the outermost pixels, as OpenCV draws
    values = [(value + 0.1) / side for value, side in zip(points, [WIDTH, HEIGHT] * 4, strict=True)]
    return " ".join([str(index), *(f"{value:.8f}" for value in values)]) + "\n"


def yolo(
    settings: str, images: str = "images/{}", labels: str = "labels/{}", given: str = ".", draw: Any = yolo_box
) -> Any:
    def fill(root: Path) -> Path:
        for split in ("train", "val"):
            photographs(root / images.format(split), "a.jpg", "b.jpg")
            write(root / labels.format(split) / "a.txt", draw(0, CAT) + draw(1, DOG))
            write(root / labels.format(split) / "b.txt", "")
        write(root / "data.yaml", settings)
        return root / given

    return fill


ULTRALYTICS = "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
ELSEWHERE = (
    "path: ../datasets/pets  # where its author had it\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
)
ROBOFLOW = "train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['cat', 'dog']\n"


def darknet(root: Path) -> Path:
    """CVAT's YOLO 1.1, and darknet's own."""
    photographs(root / "obj_train_data", "a.jpg", "b.jpg")
    write(root / "obj_train_data/a.txt", yolo_box(0, CAT) + yolo_box(1, DOG))
    write(root / "obj_train_data/b.txt", "")
    write(root / "obj.names", "cat\ndog\n")
    write(root / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    write(root / "train.txt", "data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n")
    return root


def cvat_yolo(root: Path) -> Path:
    photographs(root / "images/train", "a.jpg", "b.jpg")
    write(root / "labels/train/a.txt", yolo_outline(0, CAT) + yolo_outline(1, DOG))
    write(root / "data.yaml", "names:\n  0: cat\n  1: dog\npath: .\ntrain: train.txt\n")
    write(root / "train.txt", "data/images/train/a.jpg\ndata/images/train/b.jpg\n")
    return root


def plain_yolo(root: Path) -> Path:
    """Label Studio's YOLO export, labelImg's."""
    photographs(root / "images", "a.jpg", "b.jpg")
    write(root / "labels/a.txt", yolo_box(0, CAT) + yolo_box(1, DOG))
    write(root / "labels/b.txt", "")
    write(root / "classes.txt", "cat\ndog\n")
    write(root / "notes.json", {"categories": []})
    return root


def flat_yolo(root: Path) -> Path:
    """labelImg's, everything in one folder."""
    photographs(root, "a.jpg", "b.jpg")
    write(root / "a.txt", yolo_box(0, CAT) + yolo_box(1, DOG))
    write(root / "classes.txt", "\ufeffcat\r\ndog\r\n")
    return root


# ------------------------------------------------------------------------------------------- Labelme and X-AnyLabeling


def labelme(shapes: bool) -> Any:
    """Photographs that were classified (flags), or drawn on."""

    def fill(root: Path) -> Path:
        photographs(root, "a.jpg", "b.jpg")
        drawn = [(name, corners((x1, y1, x2 - 1, y2 - 1))) for name, (x1, y1, x2, y2) in zip(CLASSES, (CAT, DOG),
                                                                                            strict=True)]  # fmt: skip
        objects = [
            {"label": name, "points": list(zip(points[::2], points[1::2], strict=True)), "shape_type": "polygon",
             "flags": {}} for name, points in drawn
        ]  # fmt: skip
        for name, flag in (("a", True), ("b", False)):
            flags = {"blurred": flag} if shapes else dict.fromkeys(CLASSES, flag)
            content = {"flags": flags, "shapes": objects if flag and shapes else [], "imagePath": f"{name}.jpg"}
            write(root / f"{name}.json", {"version": "5.5.0", "imageData": None, **content})
        return root

    return fill


# -------------------------------------------------------------------------------------------------------- Label Studio


def studio_value(kind: str, name: str, box: tuple[int, int, int, int]) -> dict[str, Any]:
    x, y, width, height = (100 * value / side for value, side in zip(
        (box[0], box[1], box[2] - box[0], box[3] - box[1]), (WIDTH, HEIGHT) * 2, strict=True))  # fmt: skip
    if kind == "polygon":
        value: dict[str, Any] = {"points": [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]}
    elif kind == "brush":
        value = {"format": "rle", "rle": brush(box)}
    else:
        value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}
    return {**value, f"{kind}labels": [name]}


def brush(box: tuple[int, int, int, int]) -> list[int]:
    """A box as a brush: runs of bytes of RGBA pixels, by the format's description; every run repeats one byte."""
    pixels = [255 if box[0] <= x < box[2] and box[1] <= y < box[3] else 0 for y in range(HEIGHT) for x in range(WIDTH)]
    bits = f"{len(pixels) * 4:032b}" + f"{7:05b}" + "".join(f"{width - 1:04b}" for width in (3, 4, 8, 16))
    values = [value for value in pixels for _ in range(4)]
    start = 0
    while start < len(values):
        stop = start
        while stop < len(values) and values[stop] == values[start]:
            stop += 1
        bits += "1" + "11" + f"{stop - start - 1:016b}" + f"{values[start]:08b}"
        start = stop
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def studio(*results: dict[str, Any], minimal: bool = False) -> Any:
    """An export of two tasks: the results, and an annotation without any."""

    def fill(root: Path) -> Path:
        photographs(root / "images", "a.jpg", "b.jpg")
        addresses = ("/data/upload/3/0a1b2c3d-a.jpg", "/data/upload/3/0a1b2c3d-b.jpg")
        if minimal:
            return write(root / "export.json", [
                {"image": addresses[0], "id": 1, "annotator": 1, "annotation_id": 2, "lead_time": 3.5,
                 **{key: value for result in results for key, value in result.items()}},
                {"image": addresses[1], "id": 2, "annotator": 1},
            ])  # fmt: skip
        annotations = [[{"result": list(results), "was_cancelled": False}], [{"result": []}]]
        return write(root / "export.json", [
            {"id": i, "data": {"image": address}, "annotations": one}
            for i, (address, one) in enumerate(zip(addresses, annotations, strict=True), 1)
        ])  # fmt: skip

    return fill


def shape(kind: str, name: str, box: tuple[int, int, int, int]) -> dict[str, Any]:
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return {"type": f"{kind}labels", "value": studio_value(kind, name, box), **size}


def studio_csv(cell: str, mark: str = ",") -> Any:
    def fill(root: Path) -> Path:
        photographs(root / "images", "a.jpg", "b.jpg")
        quoted = '"' + cell.replace('"', '""') + '"'
        rows = (["annotation_id", "annotator", "choice", "created_at", "id", "image", "lead_time", "updated_at"],
                ["1", "1", quoted, "now", "1", "/data/upload/1/0a1b2c3d-a.jpg", "2.5", "now"],
                ["2", "1", "", "now", "2", "/data/upload/1/0a1b2c3d-b.jpg", "2.5", "now"])  # fmt: skip
        return write(
            root / ("export.tsv" if mark == "\t" else "export.csv"), "".join(mark.join(row) + "\n" for row in rows)
        )

    return fill


CHOICES = {"type": "choices", "value": {"choices": ["cat", "dog"]}}
TAXONOMY = {"type": "taxonomy", "value": {"taxonomy": [["pets", "cat"], ["pets", "dog"]]}}


# ------------------------------------------------------------------------------------------------------------ tag files


def table(name: str, text: str, *images: str, given: str = ".", folder: str = ".") -> Any:
    def fill(root: Path) -> Path:
        photographs(root / folder, *(images or ("a.jpg", "sub/b.jpg")))
        write(root / name, text)
        return root / given

    return fill


def class_folders(*names: str) -> Any:
    def fill(root: Path) -> Path:
        photographs(root, *names)
        return root

    return fill


def photograph_in_two_folders(root: Path) -> Path:
    """A photograph of two classes, as CVAT's and datumaro's ImageNet has it; and another that is called as one is."""
    photographs(root, "cat/a.jpg", "cat/b.jpg", "dog/b.jpg")
    shutil.copy(root / "cat/a.jpg", root / "dog/a.jpg")
    return root


def two_files(root: Path) -> Path:
    photographs(root, "a.jpg")
    for name in ("one.csv", "two.csv"):
        write(root / name, "file,tags\na.jpg,cat\n")
    return root


FLAT = {"a.jpg": ("cat", "dog"), "b.jpg": ()}
DEEP = {"a.jpg": ("cat", "dog"), "sub/b.jpg": ()}
TRAIN = {"images/train/a.jpg": ("cat", "dog"), "images/train/b.jpg": ()}
WHOLE: dict[str, Any] = {"tags": FLAT, "boxes": True, "masks": True}

LAYOUTS: dict[str, Layout] = {
    "COCO, instances.json and images": Layout(coco_layout("instances.json", "images"), **WHOLE),
    "COCO, photographs in sub-folders": Layout(
        coco_layout("instances.json", "images", names=("a.jpg", "sub/b.jpg")), tags=DEEP, boxes=True, masks=True
    ),
    "COCO, photographs in sub-folders, by Windows": Layout(
        coco_layout("instances.json", "images", names=("a.jpg", "sub\\b.jpg")), tags=DEEP, boxes=True, masks=True
    ),
    "COCO by CVAT": Layout(coco_layout("annotations/instances_default.json", "images"), **WHOLE),
    "COCO by CVAT, images of a subset": Layout(
        coco_layout("annotations/instances_default.json", "images/default"), **WHOLE
    ),
    "COCO by CVAT, brushed": Layout(brushed, **WHOLE),
    "COCO by datumaro": Layout(datumaro, split="train", **WHOLE),
    "COCO by FiftyOne": Layout(coco_layout("labels.json", "data"), **WHOLE),
    "COCO by Roboflow": Layout(roboflow, split="train", **WHOLE),
    "COCO by Roboflow, valid": Layout(roboflow, split="val", **WHOLE),
    "COCO by Label Studio": Layout(
        coco_layout("result.json", ".", names=("images/a.jpg", "images/b.jpg")),
        tags={"images/a.jpg": ("cat", "dog"), "images/b.jpg": ()}, boxes=True, masks=True,
    ),
    "COCO by Label Studio, images where its server has them": Layout(label_studio_coco, **WHOLE),
    "COCO by our own export": Layout(coco_layout("annotations.json", "images"), **WHOLE),
    "COCO under a name of its own": Layout(coco_layout("my export.json", "images"), **WHOLE),
    "YOLO boxes, data.yaml": Layout(yolo(ULTRALYTICS), split="train", tags=TRAIN, boxes=True),
    "YOLO boxes, the yaml given": Layout(yolo(ULTRALYTICS, given="data.yaml"), split="train", tags=TRAIN, boxes=True),
    "YOLO, path of its author": Layout(yolo(ELSEWHERE), split="train", tags=TRAIN, boxes=True),
    "YOLO polygons": Layout(yolo(ULTRALYTICS, draw=yolo_outline), split="train", tags=TRAIN, boxes=True, masks=True),
    "YOLO by Roboflow": Layout(
        yolo(ROBOFLOW, "{}/images", "{}/labels"),
        split="train", tags={"train/images/a.jpg": ("cat", "dog"), "train/images/b.jpg": ()}, boxes=True,
    ),
    "YOLO by CVAT": Layout(cvat_yolo, split="train", tags=TRAIN, boxes=True, masks=True),
    "YOLO 1.1 by CVAT, darknet": Layout(
        darknet, split="train", tags={"obj_train_data/a.jpg": ("cat", "dog"), "obj_train_data/b.jpg": ()}, boxes=True
    ),
    "YOLO by labelImg": Layout(flat_yolo, tags=FLAT, boxes=True),
    "YOLO by Label Studio": Layout(plain_yolo, tags={"images/a.jpg": ("cat", "dog"), "images/b.jpg": ()}, boxes=True),
    "Labelme": Layout(labelme(shapes=True), **WHOLE),
    "X-AnyLabeling, photographs classified": Layout(labelme(shapes=False), tags=FLAT),
    "Label Studio choices": Layout(studio(CHOICES), tags=FLAT),
    "Label Studio taxonomy": Layout(studio(TAXONOMY), tags=FLAT),
    "Label Studio rectangles": Layout(studio(shape("rectangle", "cat", CAT), shape("rectangle", "dog", DOG)), tags=FLAT,
                                      boxes=True),
    "Label Studio polygons": Layout(studio(shape("polygon", "cat", CAT), shape("polygon", "dog", DOG)), **WHOLE),
    "Label Studio brushes": Layout(studio(shape("brush", "cat", CAT), shape("brush", "dog", DOG)), **WHOLE),
    "Label Studio, choices beside shapes": Layout(
        studio({"type": "choices", "value": {"choices": ["dog"]}}, shape("polygon", "cat", CAT)), tags=FLAT
    ),
    "Label Studio JSON-MIN choice": Layout(studio({"choice": {"choices": ["cat", "dog"]}}, minimal=True), tags=FLAT),
    "Label Studio JSON-MIN taxonomy": Layout(studio({"taxonomy": [["pets", "cat"], ["dog"]]}, minimal=True), tags=FLAT),
    "Label Studio JSON-MIN shapes": Layout(
        studio({"label": [studio_value("polygon", "cat", CAT), studio_value("polygon", "dog", DOG)]}, minimal=True),
        **WHOLE,
    ),
    "Label Studio CSV": Layout(studio_csv('{"choices": ["cat", "dog"]}'), tags=FLAT),
    "Label Studio TSV": Layout(studio_csv('{"choices": ["cat", "dog"]}', "\t"), tags=FLAT),
    "Label Studio CSV of shapes": Layout(
        studio_csv(json.dumps([studio_value("brush", "cat", CAT), studio_value("brush", "dog", DOG)])), **WHOLE
    ),
    "CSV file,tags": Layout(table("tags.csv", "file,tags\na.jpg,cat;dog\nsub/b.jpg,\n"), tags=DEEP),
    "CSV, tags after commas": Layout(table("tags.csv", "file,tags\na.jpg,cat,dog\nsub/b.jpg,\n"), tags=DEEP),
    "CSV, tags in quotes": Layout(table("tags.csv", 'file,tags\na.jpg,"cat, dog"\nsub/b.jpg,\n'), tags=DEEP),
    "CSV, tags between bars": Layout(table("tags.csv", "filename,labels\na.jpg,cat|dog\nsub/b.jpg,\n"), tags=DEEP),
    "CSV with semicolons": Layout(table("tags.csv", "image;label\na.jpg;cat,dog\nsub/b.jpg;\n"), tags=DEEP),
    "CSV with tabs": Layout(table("tags.tsv", "file\ttags\na.jpg\tcat;dog\nsub/b.jpg\t\n"), tags=DEEP),
    "CSV of lists": Layout(table("tags.csv", "file,tags\na.jpg,\"['cat', 'dog']\"\nsub/b.jpg,[]\n"), tags=DEEP),
    "CSV, a row a tag": Layout(table("tags.csv", "image_id,label\na.jpg,cat\na.jpg,dog\nsub/b.jpg,\n"), tags=DEEP),
    "CSV, names without suffix": Layout(table("tags.csv", "image_id,tags\na,cat;dog\nsub/b,\n"), tags=DEEP),
    "CSV, a column a class": Layout(table("tags.csv", "filename,cat,dog\na.jpg,1,1\nsub/b.jpg,0,0\n"), tags=DEEP),
    "CSV, a column a class, by Roboflow": Layout(
        table("train/_classes.csv", "filename, cat, dog\na.jpg, 1, 1\nb.jpg, 0, 0\n", "a.jpg", "b.jpg", folder="train"),
        split="train", tags=FLAT,
    ),
    "CSV beside the folder of its images": Layout(
        table("train.csv", "file,tags\na.jpg,cat;dog\nb.jpg,\n", "a.jpg", "b.jpg", given="train.csv", folder="train"),
        tags=FLAT,
    ),
    "CSV of boxes": Layout(
        table("boxes.csv", "image,xmin,ymin,label\na.jpg,1,2,cat\na.jpg,3,4,dog\n", given="boxes.csv"),
        tags={"a.jpg": ("cat", "dog")},
    ),
    "tags.json": Layout(table("tags.json", '{"a.jpg": ["cat", "dog"], "sub/b.jpg": []}'), tags=DEEP),
    "Hugging Face, metadata.csv": Layout(
        table("metadata.csv", "file_name,labels\na.jpg,cat;dog\nsub/b.jpg,\n"), tags=DEEP
    ),
    "Hugging Face, metadata.jsonl": Layout(
        table("metadata.jsonl", '{"file_name": "a.jpg", "labels": ["cat", "dog"]}\n'
                                '{"file_name": "sub/b.jpg", "labels": []}\n'),
        tags=DEEP,
    ),
    "Hugging Face, metadata.jsonl of a split": Layout(
        table("train/metadata.jsonl", '{"file_name": "a.jpg", "objects": {"bbox": [], "categories": ["cat", "dog"]}}\n',
              "a.jpg", folder="train"),
        split="train", tags={"a.jpg": ("cat", "dog")},
    ),
    "a sub-folder a class": Layout(
        class_folders("cat/a.jpg", "dog/b.jpg"), tags={"cat/a.jpg": ("cat",), "dog/b.jpg": ("dog",)}
    ),
    "a sub-folder a class, and deeper": Layout(
        class_folders("cat/a.jpg", "cat/old/a.jpg", "dog/b.jpg"),
        tags={"cat/a.jpg": ("cat",), "cat/old/a.jpg": ("cat",), "dog/b.jpg": ("dog",)},
    ),
    "nested class folders, lower": Layout(
        class_folders("pets/cat/a.jpg", "pets/dog/b.jpg"), classes=("cat", "dog"),
        tags={"pets/cat/a.jpg": ("cat",), "pets/dog/b.jpg": ("dog",)},
    ),
    "nested class folders, upper": Layout(
        class_folders("cat/2020/a.jpg", "dog/2021/b.jpg"), classes=("cat", "dog"),
        tags={"cat/2020/a.jpg": ("cat",), "dog/2021/b.jpg": ("dog",)},
    ),
    "a sub-folder a class, by split": Layout(
        class_folders("train/cat/a.jpg", "train/dog/b.jpg", "test/dog/b.jpg"), split="train",
        tags={"cat/a.jpg": ("cat",), "dog/b.jpg": ("dog",)},
    ),
    "a sub-folder a class, by datumaro and CVAT": Layout(
        class_folders("cat/a.jpg", "dog/b.jpg", "no_label/c.jpg", "@eaDir/a.jpg"),
        tags={"cat/a.jpg": ("cat",), "dog/b.jpg": ("dog",)}
    ),
    "a sub-folder a class, by FiftyOne": Layout(
        class_folders("cat/a.jpg", "_unlabeled/c.jpg"), tags={"cat/a.jpg": ("cat",)}
    ),
    "a sub-folder a class, a photograph of two": Layout(
        photograph_in_two_folders, tags={"cat/a.jpg": ("cat", "dog"), "cat/b.jpg": ("cat",), "dog/b.jpg": ("dog",)}
    ),
    "a single class": Layout(class_folders("cat/a.jpg"), classes=("cat",), tags={"cat/a.jpg": ("cat",)}),
}  # fmt: skip

# What is not clear, or damaged: (what writes it, split, words of the one line).
REFUSED: dict[str, tuple[Callable[[Path], Path], str | None, str]] = {
    "FiftyOne without its labels": (class_folders("data/a.jpg"), None, "no data set recognised"),
    "CVAT's YOLO without its lists": (class_folders("obj_train_data/a.jpg"), None, "no data set recognised"),
    "photographs alone": (class_folders("a.jpg", "b.jpg"), None, "2 photographs, but no tags; write .*a.jpg,cat;dog"),
    "KITTI's photographs": (class_folders("image_2/a.jpg", "image_2/b.jpg"), None, "in one sub-folder, image_2; to"),
    "CamVid by datumaro": (class_folders("default/a.png", "defaultannot/a.png"), None, "no data set recognised"),
    "photographs beside masks": (class_folders("img/a.jpg", "gt/a.jpg"), None, "no data set recognised"),
    "a tag, or two with a blank": (table("tags.csv", "file,tags\na.jpg,cat dog\nsub/b.jpg,cat;dog\n"), None,
                                   "'cat dog' may be one tag or several, for cat, dog are tags, too"),
    "a tag, or two joined": (table("tags.json", '{"a.jpg": ["cat and dog"], "sub/b.jpg": ["cat", "dog"]}'), None,
                             "'cat and dog' may be one tag or several"),
    "lists by NumPy": (table("tags.csv", "file,tags\na.jpg,['cat' 'dog']\n"), None, "line 2: no list of tags"),
    "COCO without annotations": (table("instances.json", '{"images": [], "categories": []}'), None,
                                 "needs the lists images, annotations, categories, but lacks annotations"),
    "a comma within a tag of a list": (table("tags.json", '{"a.jpg": ["cat, dog"], "sub/b.jpg": ["cat", "dog"]}'), None,
                                       "'cat, dog' may be one tag or several"),
    "COCO, crowds alone": (crowds, None, "holds crowds alone; set iscrowd to 0"),
    "two kinds of mark": (table("tags.csv", "file,tags\na.jpg,cat;dog\nsub/b.jpg,cat|dog\n"), None,
                          r"tags.csv: tags are separated by ';' \(line 2\) and '\|' \(line 3\); use ; alone"),
    "tags in the middle, one too many": (table("tags.csv", "tags,file\ncat,a.jpg,dog\n"), None,
                                         "line 2 has 3 cells for 2 columns; put several tags in quotes"),
    "two columns of tags": (table("tags.csv", "file,tags,label\na.jpg,cat,dog\n"), None,
                            "several columns could hold the tags"),
    "a column that is no class": (table("tags.csv", "file,cat,width\na.jpg,1,640\n"), None,
                                  "line 2: column 'width' holds '640', not 0 or 1"),
    "no header": (table("tags.csv", "a.jpg,cat\n"), None, "first line must name the columns"),
    "a name that fits two files": (table("tags.csv", "file,tags\na,cat\n", "a.jpg", "a.png"), None,
                                  "a may be a.jpg, a.png"),
    "nested class folders": (class_folders("pets/cat/a.jpg", "farm/cow/b.jpg"), None,
                             r"classes, of the upper folders \(farm, pets\) or of the lower ones \(cat, cow\)"),
    "two files": (two_files, None, "holds one.csv, two.csv; give the file that holds the annotation"),
    "lines of JSON without tags": (table("metadata.jsonl", '{"file_name": "a.jpg", "text": "a cat"}\n'), None,
                                   "line 1: it must name one file and its tags once"),
    "damaged JSON lines": (table("metadata.jsonl", '{"file_name": "a.jpg", "label": "cat"}\n{"file'), None,
                           "metadata.jsonl: line 2: not valid JSON"),
    "numbers where lists should be": (table("metadata.jsonl", '{"file_name": "a.jpg", "label": {"a": 1}}'), None,
                                      "line 1: tags must be names"),
    "YOLO outside": (yolo("train: /data/images\nnames: [cat, dog]\n"), None, r"'/data/images' is not in .*\(images\)"),
    "YOLO without names": (yolo("train: images/train\nnc: 2\n"), None, "names must list the classes"),
    "YOLO with names that YAML reads as no": (yolo("train: images/train\nnames: [yes, no]\n"), None, "names must list"),
    "YOLO without such a split": (yolo(ULTRALYTICS), "test", "no split 'test'; available are train, val"),
    "YOLO, class beyond the names": (yolo("train: images/train\nnames: [cat]\n", draw=lambda _, box: yolo_box(7, box)),
                                     "train", r"a.txt: line 1: '7' is none of the 1 classes"),
    "YOLO, a number too few": (yolo(ULTRALYTICS, draw=lambda _, box: "0 .5 .5 .1\n"), "train",
                               "a.txt: line 1: 3 numbers"),
    "YOLO with decimal commas": (yolo(ULTRALYTICS, draw=lambda _, box: "0 0,5 0,5 0,1 0,1\n"), "train",
                                 "a.txt: line 1: '0,5' is no number; decimals need a point, not a comma"),
    "Label Studio taxonomy with a name twice": (
        studio({"type": "taxonomy", "value": {"taxonomy": [["pets", "other"], ["farm", "other"]]}}), None,
        "farm / other and pets / other end alike"),
    "Label Studio JSON-MIN, two texts": (studio({"animal": "cat", "place": "indoors"}, minimal=True), None,
                                         "animal, place could each be the tag"),
    "Label Studio, nothing annotated": (studio_csv("["), None, "line 2: .*; export the project again"),
    "two splits, none named": (datumaro, None, "holds several splits; name one; available are train, val"),
    "Roboflow, none named": (roboflow, None, "has sub-folders for splits; name one; available are train, valid"),
}  # fmt: skip
