"""The submission files of the VOC 2012 test server."""

import gzip
import io
import itertools
import tarfile
from collections.abc import Mapping

import numpy as np

from labelpenet.data.dataset import VOC_CLASSES
from labelpenet.data.files import brief, safe_name
from labelpenet.data.images import palette_png
from labelpenet.errors import InputError
from labelpenet.evaluation.semantic import paint
from labelpenet.formats.selection import Export, exporter, stems


@exporter("voc-submission")
def export_voc_submission(job: Export) -> None:
    """Writes ``out/results.tar.gz`` for the VOC 2012 test server, and the same files unpacked under ``out/results``.

    ``results/VOC2012/Main/comp3_det_test_<class>.txt`` holds a line a detection, ``image score xmin ymin xmax ymax``
    (pixels from 1, inclusive); ``results/VOC2012/Segmentation/comp5_test_cls/<image>.png`` the class map of each image,
    if the predictions have masks. The archive is the same byte for byte for the same predictions.

    Arguments and errors as `export`; the images' ids must be VOC's, and every image of the test set have a prediction.
    ``outside_data`` enters the competitions for methods that learned from more than VOC's own images: comp4 and comp6
    instead of comp3 and comp5.
    """
    classes = job.classes
    detection, segmentation = ("comp4", "comp6") if job.outside_data else ("comp3", "comp5")
    for name, other in itertools.combinations(classes, 2):
        if safe_name(name) == safe_name(other):
            raise InputError(f"the classes {name!r} and {other!r} would share the file {safe_name(name)}; rename one")
    names = stems(job.images)
    lines: dict[int, list[str]] = {label: [] for label in range(len(classes))}
    files: dict[str, bytes] = {}
    # VOC's class maps count the twenty classes in their own order, whatever order the labels have.
    values = np.array([0] + [VOC_CLASSES.index(name) + 1 if name in VOC_CLASSES else 0 for name in classes])
    class_maps: dict[str, bytes] = {}
    missing_images: list[str] = []
    with_masks = False
    for image in job.images:
        found = job.predictions.get(image.id)
        if found is None:
            missing_images.append(f"{image.id}: no prediction")
            continue
        boxes = found.boxes.double().cpu().numpy() + np.array([1, 1, 0, 0])
        for label, score, box in zip(found.labels.tolist(), found.weights.tolist(), boxes.tolist(), strict=True):
            lines[label].append(f"{names[image.id]} {score:.10f} " + " ".join(f"{value:.4f}" for value in box))
        path = f"Segmentation/{segmentation}_test_cls/{names[image.id]}.png"
        class_maps[path] = palette_png(values[paint(found)])
        with_masks |= found.masks is not None
    for label, name in enumerate(classes):
        text = "".join(f"{line}\n" for line in lines[label])
        files[f"Main/{detection}_det_test_{safe_name(name)}.txt"] = text.encode()
    if with_masks:
        files |= class_maps
    files = {f"results/VOC2012/{path}": content for path, content in sorted(files.items())}
    for path, content in {**files, "results.tar.gz": _tar_gz(files)}.items():
        job.write(path, content)
    job.notes += brief(missing_images, "images without a prediction")
    strangers = [name for name in classes if name not in VOC_CLASSES]
    if strangers:
        job.notes.append(f"the server knows no class {', '.join(strangers)}")
    missing = [name for name in VOC_CLASSES if name not in classes]
    if missing:
        job.notes.append(f"the server expects {', '.join(missing)} too")


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
