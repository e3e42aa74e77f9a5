"""PASCAL VOC annotation (XML and PNG), and the submission files of the VOC 2012 test server."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import brief
from labelpenet.data.voc import VOC_CLASSES
from labelpenet.evaluation.semantic import paint
from labelpenet.export.files import Exported, safe_name, stems, write_bytes, write_text
from labelpenet.export.selection import check_class_count, clipped_boxes, copy_photographs, selected
from labelpenet.instances import Instances


def export_voc(
    predictions: Mapping[str, Instances],
    images: Sequence[TaggedImage],
    classes: Sequence[str],
    out: Path | str,
    *,
    split: str = "train",
    copy_images: bool = False,
    min_score: float = 0.0,
) -> Exported:
    """Writes the folders of a VOC year: Annotations, SegmentationClass, SegmentationObject and ImageSets.

    With masks also ``classes.txt`` and, for CVAT, ``labelmap.txt``: the classes in the order of the class maps' values.

    The photographs belong into ``out/JPEGImages`` under the names of the XML files. What VOC cannot hold: scores; parts
    of boxes beyond whole pixels (corners are rounded); overlaps of masks (where two overlap, the higher score is on
    top); more than 254 masks in an image (the highest scores stay).

    Args:
        predictions: by image id.
        images: the photographs; those without a prediction are left out.
        classes: names of the C classes, in label order.
        out: the folder.
        split: name of the list in ``ImageSets``.
        copy_images: copies the photographs, too.
        min_score: instances below are left out.

    Raises:
        InputError: a file cannot be written, or there are more than 254 classes and masks.
    """
    done, out = Exported(), Path(out)
    names = stems(images)
    listed: dict[str, list[str]] = {"Main": [], "Segmentation": []}
    written: list[TaggedImage] = []
    rounded = covered = 0
    for image, found in selected(predictions, images, min_score, done.notes):
        name = names[image.id]
        if found.masks is not None and len(found) > 254:
            done.notes.append(f"{image.id}: {len(found)} masks, of which the 254 of highest score are kept")
            found = found[torch.sort(found.weights.argsort(descending=True, stable=True)[:254]).values]
        boxes = voc_boxes(found)
        rounded += int((found.boxes != found.boxes.round()).any(1).sum())
        xml = annotation_xml(f"{name}{image.path.suffix}", found, boxes, classes)
        done.paths.append(write_bytes(out / "Annotations" / f"{name}.xml", xml))
        if found.masks is not None:
            check_class_count(classes)
            objects = paint_objects(found)
            covered += len(found) - len(np.unique(objects[objects > 0]))
            for folder, pixels in (("SegmentationClass", paint(found)), ("SegmentationObject", objects)):
                done.paths.append(write_bytes(out / folder / f"{name}.png", palette_png(pixels)))
            listed["Segmentation"].append(name)
        listed["Main"].append(name)
        written.append(image)
    for folder, lines in listed.items():
        if lines:
            text = "".join(f"{line}\n" for line in lines)
            done.paths.append(write_text(out / "ImageSets" / folder / f"{safe_name(split)}.txt", text))
    if listed["Segmentation"]:
        plain = [" ".join(name.split()) for name in classes]
        done.paths.append(write_text(out / "classes.txt", "".join(f"{name}\n" for name in plain)))
        done.paths.append(write_text(out / "labelmap.txt", label_map(plain)))
    if copy_images:
        copy_photographs(written, names, out / "JPEGImages", done)
        odd = sum(image.path.suffix.lower() not in (".jpg", ".jpeg") for image in written)
        if odd:
            done.notes.append(f"{odd} photographs are no JPEG files, which VOC's tools expect")
    else:
        done.notes.append("put the photographs into JPEGImages under the names of the XML files, or export with copies")
    done.notes.append("VOC holds no scores")
    if rounded:
        done.notes.append(f"{rounded} boxes are rounded to whole pixels")
    if listed["Segmentation"]:
        done.notes.append(f"masks that overlap are cut by the one of higher score; {covered} are covered entirely")
    return done


def voc_boxes(instances: Instances) -> np.ndarray:
    """(N, 4) int64 ``xmin, ymin, xmax, ymax`` as VOC counts: from 1, inclusive, inside the image, at least a pixel."""
    height, width = instances.image_size
    boxes = clipped_boxes(instances).round().long().numpy()
    low = np.minimum(boxes[:, :2] + 1, [width, height])
    return np.concatenate([low, np.maximum(boxes[:, 2:], low)], 1)


def annotation_xml(filename: str, instances: Instances, boxes: np.ndarray, classes: Sequence[str]) -> bytes:
    """One image's annotation; the k-th object is the one with value k in the SegmentationObject PNG."""
    height, width = instances.image_size
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, tag: str, text: object = None) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, tag)
        # XML has no way to write control characters.
        element.text = (
            None if text is None else re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", str(text))
        )
        return element

    add(root, "filename", filename)
    size = add(root, "size")
    for tag, value in (("width", width), ("height", height), ("depth", 3)):
        add(size, tag, value)
    add(root, "segmented", int(instances.masks is not None))
    for label, box in zip(instances.labels.tolist(), boxes.tolist(), strict=True):
        item = add(root, "object")
        add(item, "name", classes[label])
        for tag, default in (("pose", "Unspecified"), ("truncated", "0"), ("difficult", "0")):
            add(item, tag, default)
        corners = add(item, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            add(corners, tag, value)
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def paint_objects(instances: Instances) -> np.ndarray:
    """(H, W) uint8, 0 background, k the k-th of at most 254 instances; painted in ascending order of score."""
    painted = np.zeros(instances.image_size, dtype=np.uint8)
    if instances.masks is not None:
        masks = instances.masks.cpu().numpy()
        for index in np.argsort(instances.weights.cpu().numpy(), kind="stable"):
            painted[masks[index]] = index + 1
    return painted


def voc_palette() -> list[int]:
    """VOC's 256 colours as 768 numbers R, G, B: the bits of the index, dealt to the channels from the top bit down."""
    index = np.arange(256)
    channels = [
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8) if 3 * bit + channel < 8)
        for channel in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], 1).flatten().tolist()


def label_map(classes: Sequence[str]) -> str:
    """CVAT's list of classes and their colours; a colon, which separates its fields, becomes a space."""
    colours = np.reshape(voc_palette(), (256, 3)).tolist()
    lines = ["# label:color_rgb:parts:actions"]
    for name, colour in zip(["background", *classes], colours, strict=False):
        lines.append(f"{name.replace(':', ' ')}:{','.join(map(str, colour))}::")
    return "\n".join(lines) + "\n"


def palette_png(pixels: np.ndarray) -> bytes:
    """(H, W) values 0..255 as an indexed PNG in VOC's colours."""
    image = Image.fromarray(pixels.astype(np.uint8), mode="P")
    image.putpalette(voc_palette())
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def export_voc_submission(
    predictions: Mapping[str, Instances],
    images: Sequence[TaggedImage],
    classes: Sequence[str],
    out: Path | str,
    *,
    outside_data: bool = False,
) -> Exported:
    """Writes ``out/results.tar.gz`` for the VOC 2012 test server, and the same files unpacked under ``out/results``.

    ``results/VOC2012/Main/comp3_det_test_<class>.txt`` holds a line a detection, ``image score xmin ymin xmax ymax``
    (pixels from 1, inclusive); ``results/VOC2012/Segmentation/comp5_test_cls/<image>.png`` the class map of each image,
    if the predictions have masks. The archive is the same byte for byte for the same predictions.

    Args:
        predictions: by image id, of every image of the test set.
        images: the photographs; their ids are VOC's.
        classes: VOC's class names, in the order of the labels.
        out: the folder.
        outside_data: enter the competitions for methods that learned from more than VOC's own images: comp4 and comp6
            instead of comp3 and comp5.

    Raises:
        InputError: a file cannot be written.
    """
    done, out = Exported(), Path(out)
    detection, segmentation = ("comp4", "comp6") if outside_data else ("comp3", "comp5")
    names = stems(images)
    lines: dict[int, list[str]] = {label: [] for label in range(len(classes))}
    files: dict[str, bytes] = {}
    # VOC's class maps count the twenty classes in their own order, whatever order the labels have.
    values = np.array([0] + [VOC_CLASSES.index(name) + 1 if name in VOC_CLASSES else 0 for name in classes])
    class_maps: dict[str, bytes] = {}
    missing_images: list[str] = []
    with_masks = False
    for image in images:
        found = predictions.get(image.id)
        if found is None:
            missing_images.append(f"{image.id}: no prediction")
            continue
        boxes = found.boxes.double().cpu().numpy() + np.array([1, 1, 0, 0])
        for label, score, box in zip(found.labels.tolist(), found.weights.tolist(), boxes.tolist(), strict=True):
            lines[label].append(f"{names[image.id]} {score:.10f} " + " ".join(f"{value:.4f}" for value in box))
        path = f"Segmentation/{segmentation}_test_cls/{names[image.id]}.png"
        class_maps[path] = palette_png(values[paint(found)])
        with_masks |= found.masks is not None
    done.notes += brief(missing_images, "images without a prediction")
    for label, name in enumerate(classes):
        text = "".join(f"{line}\n" for line in lines[label])
        files[f"Main/{detection}_det_test_{safe_name(name)}.txt"] = text.encode()
    if with_masks:
        files |= class_maps
    strangers = [name for name in classes if name not in VOC_CLASSES]
    if strangers:
        done.notes.append(f"the server knows no class {', '.join(strangers)}")
    missing = [name for name in VOC_CLASSES if name not in classes]
    if missing:
        done.notes.append(f"the server expects {', '.join(missing)} too")
    files = {f"results/VOC2012/{path}": content for path, content in sorted(files.items())}
    done.paths += [write_bytes(out / path, content) for path, content in files.items()]
    done.paths.append(write_bytes(out / "results.tar.gz", _tar_gz(files)))
    return done


def _tar_gz(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=content, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for path, data in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return content.getvalue()
