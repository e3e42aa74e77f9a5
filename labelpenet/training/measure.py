"""Measures every module of a finished run. The only place beside `evaluate` where annotation is read."""

import contextlib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labelpenet.data import read_image, run_folder
from labelpenet.data.dataset import AnnotatedImages, TaggedImage, Truth
from labelpenet.data.files import hash_file, hash_files, listing, read_json, write_json
from labelpenet.engine.checkpoint import versions
from labelpenet.engine.distributed import map_images, precision_of
from labelpenet.errors import InputError
from labelpenet.evaluation import cascade_table, classification_ap, evaluate, uncounted
from labelpenet.formats import open_annotated, read_predictions, write_predictions
from labelpenet.instances import Instances
from labelpenet.models.cascade import read_run
from labelpenet.models.student import Student
from labelpenet.progress import Progress, log_notes
from labelpenet.training.features import RoIFeatures
from labelpenet.training.inferred import read_inferred
from labelpenet.training.predict import Predictor
from labelpenet.training.pretrain import Boxes


def measure_run(
    run: Path,
    data: Path,
    split: str = "val",
    train_split: str | None = "train",
    modules: Sequence[int] = (1, 2, 3, 4),
    protocol: str = "voc12",
    device: str = "auto",
    cache: Path | None = None,
    images: Path | None = None,
) -> str:
    """Predicts a held-out split with every module and measures it, and the instances of the training images.

    Writes ``RUN/predictions/SPLIT-moduleK.json``, kept where it was made from the same photographs and weights, and
    ``RUN/results.json``, which keeps what was measured there before of other modules in the same way (`with_earlier`).
    Of the training photographs those count that the run labelled; what looks odd is logged. Of a student, which stands
    in the place of module 4, the held-out split alone is measured.

    Returns:
        The table, one row a module; the first row is module 1 before calibration.

    Raises:
        InputError: the run or the data cannot be used; none of the modules is there to be measured, or no object to
            measure by.
    """
    facts = read_run(run)
    classes = facts["classes"]
    predictor = Predictor(run, device)
    student = isinstance(predictor.network, Student)
    if student and set(modules) not in ({4}, {1, 2, 3, 4}):
        raise InputError(f"{run}: holds a student, which has no modules; leave --modules out")
    labelling = run_folder.labelled(run)
    modules = (4,) if student else [number for number in dict.fromkeys(modules) if number in labelling]
    if not modules:
        raise InputError(f"{run}: none of the modules has labelled the training photographs yet; train it first")
    held_out = open_annotated(data, split, classes, images)
    held_out = held_out.by_number() if protocol == "coco" else held_out
    truths, notes = held_out.readable_truths()
    nothing = evaluate({}, truths, classes, protocol)  # type: ignore[arg-type]
    if not nothing:
        raise InputError(f"{data}: no object to measure by; check the data set and --split")
    labelled = labelled_images(run, len(classes))
    training = None if student else training_images(run, labelled, data, train_split, classes, images)
    photographs = held_out.tagged.images
    boxes = predictor.proposals(photographs, 1, cache) or {}
    hashes = hash_files([image.path for image in photographs])
    contents = {image.id: str(hashes[image.path]) for image in photographs}
    state = run_folder.state(run)
    key = made_from(state, precision_of(predictor.fabric), contents)
    if both := len(trained_on(run, labelled, photographs)):
        notes += (f"the run was trained on {both} of the {len(photographs)} photographs that it is measured on",)
    train_truths, said = training.readable_truths() if training else ({}, ())
    notes += uncounted(nothing, classes)
    log_notes(*held_out.tagged.notes, *notes, *(f"training photographs: {note}" for note in said))
    results: dict[str, Any] = {"split": split, "protocol": protocol, "trained_on": both, "train": {}, "val": {}}
    results |= {"state": state, "made_from": hash_truths(key, (truths, train_truths))}
    for number in modules:
        if training:
            labels = read_inferred(run, f"module{number}", len(classes))
            own = {name: truth for name, truth in train_truths.items() if name in labels}
            results["train"][str(number)] = evaluate(labels, own, classes, "voc12")
        path = run_folder.predictions(run, split, number)
        if not is_kept(path, key):
            pairs = ((image.id, found) for image, found in predictor.run(photographs, number, [], boxes))
            write_predictions(path, pairs, photographs, classes)
        made = {"made_from": key, "content": hash_file(path), "photographs": contents, "state": state}
        write_json(run_folder.origin(path), made)
        found = read_predictions(path, photographs, classes)
        name = "student" if student else str(number)
        if absent := sum(image not in found for image in truths):
            what = "the student" if student else f"module {number}"
            log_notes(f"{what} has no answer for {absent} photographs; their objects are missed")
        results["val"][name] = evaluate(found, truths, classes, protocol)  # type: ignore[arg-type]
    if not student and 1 in modules:
        readable = [image for image in photographs if image.id in boxes]
        ranked, probabilities = rank_images(predictor, readable, boxes)
        tags = np.array([[label in image.tags for label in range(len(classes))] for image in readable])
        precision = classification_ap(probabilities, tags)
        if not np.isnan(precision).all():  # some class is shown
            results["classification_mAP"] = float(np.nanmean(precision))
        results["uncalibrated"] = {"val": evaluate(ranked, truths, classes, protocol)}  # type: ignore[arg-type]
        if training:
            train_boxes = predictor.proposals(training.tagged.images, 1, cache) or {}
            learnt = [image for image in training.tagged.images if image.id in train_boxes]
            features = RoIFeatures(run, predictor.cascade, train_boxes, predictor.fabric)
            top, _ = rank_images(predictor, learnt, train_boxes, features)
            results["uncalibrated"]["train"] = evaluate(top, train_truths, classes, "voc12")
    results = with_earlier(results, run_folder.results(run))
    write_json(run_folder.results(run), results, indent=1)
    return render(results)


def hash_truths(key: str, parts: Sequence[Mapping[str, Truth]]) -> str:
    """A hash of all that figures depend on: what ``key`` is the hash of, and the truth of each part's images."""
    digest = hashlib.blake2b(key.encode(), digest_size=16)
    for truths in parts:
        digest.update(b"part")
        for name, truth in truths.items():
            one = truth.instances
            arrays = [one.boxes, one.labels, truth.difficult, truth.crowd, one.masks, truth.semantic]
            digest.update(repr((name, one.image_size, len(one), truth.complete)).encode())
            for values in arrays:
                digest.update(b"none" if values is None else np.asarray(values).tobytes())
    return digest.hexdigest()


def with_earlier(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """The results and, of those that the file ``path`` holds, the figures of modules that were not measured now.

    They are kept where split, protocol, weights, photographs and truth are the same; else a note says what is dropped.
    """
    try:
        before = read_json(path) if path.is_file() else {}
        what = f"split {before.get('split')}, protocol {before.get('protocol')}"
        lost = [name for name in before.get("val", {}) if name not in results["val"]]
        same = all(before.get(key) == results[key] for key in ("split", "protocol"))
        if same and before.get("made_from") == results["made_from"]:
            for part in ("train", "val"):
                results[part] = dict(sorted({**before[part], **results[part]}.items()))
            return {**before, **results}
    except (InputError, AttributeError, TypeError, KeyError):
        log_notes(f"{path} is damaged; its figures are dropped")
        return results
    if dropped := lost if same else list(before.get("val", {})):
        why = " (measured with other weights, photographs, annotation or version)" if same else ""
        names = listing(f"module {name}" if name.isdigit() else name for name in dropped)
        log_notes(f"{path} no longer holds the figures of {names} on {what}{why}")
    return results


def labelled_images(run: Path, num_classes: int) -> set[str]:
    """The ids of the photographs that the run was trained on, as its first module labelled them; of a student all."""
    if labelling := run_folder.labelled(run):
        return set(read_inferred(run, f"module{labelling[0]}", num_classes))
    path = run_folder.photographs(run)
    return set(read_json(path)) if path.is_file() else set()


def trained_on(run: Path, labelled: Collection[str], images: Sequence[TaggedImage]) -> set[str]:
    """The ids of the images that were labelled: under the same id and, where the run knows it, with the same content;
    another data set may count its photographs in the same way.
    """
    own = {image.id: image.path for image in images if image.id in labelled}
    return set(own).difference(run_folder.others(run, own))


def training_images(
    run: Path, labelled: Collection[str], data: Path, split: str | None, classes: Sequence[str], images: Path | None
) -> AnnotatedImages | None:
    """The annotated photographs of a split that were labelled; None, and a note, where ``data`` has none of them."""
    try:
        found = open_annotated(data, split, classes, images)
        own = trained_on(run, labelled, found.tagged.images)
        if own:
            return found.where(lambda image: image.id in own)
        why = f"the run was trained on none of the photographs of {data}, split {split}"
    except InputError as error:
        why = str(error)
    log_notes(f"no figures of the training photographs ({why})")
    return None


def made_from(state: Mapping[str, str], precision: str, contents: Mapping[str, str]) -> str:
    """A hash of all that predictions depend on: the run's state, precision, the photographs' content hashes by id."""
    text = json.dumps([versions()["labelpenet"], state, precision, list(contents.items())])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def is_kept(path: Path, key: str) -> bool:
    """Whether a predictions file is there, whole, and was made from what ``key`` is the hash of."""
    try:
        known = read_json(run_folder.origin(path)) if path.is_file() else None
        return isinstance(known, dict) and (known.get("made_from"), known.get("content")) == (key, hash_file(path))
    except InputError:
        return False


def rank_images(
    predictor: Predictor, images: Sequence[TaggedImage], boxes: Boxes, features: RoIFeatures | None = None
) -> tuple[dict[str, Instances], np.ndarray]:
    """Module 1 before calibration: ranked proposals by image id, and class probabilities (I, C).

    Args:
        features: the run's kept RoI features; used for the images that it has them of.
    """
    network = predictor.cascade

    def rank(index: int) -> tuple[Instances, np.ndarray]:
        image = images[index]
        pixels = read_image(image.path)
        chosen = network.select(boxes[image.id], pixels.shape)
        known = None if features is None else features.kept(image)
        with predictor.fabric.autocast():
            found, share = network.rank_proposals(pixels, chosen, known)
        return found, share.cpu().numpy()

    with (
        Progress("module 1 ranks proposals", len(images), 0) as progress,
        contextlib.closing(map_images(rank, range(len(images)), network.device)) as results,
    ):
        ranked = dict(zip((image.id for image in images), progress.tracked(results), strict=True))
    return {name: found for name, (found, _) in ranked.items()}, np.array([share for _, share in ranked.values()])


def render(results: dict[str, Any]) -> str:
    """The table of a run's results as text."""
    train, val = dict(results["train"]), dict(results["val"])
    if "uncalibrated" in results:
        train = {"1, top proposals": results["uncalibrated"].get("train", {}), **train}
        val = {"1, top proposals": results["uncalibrated"]["val"], **val}
    lines = [cascade_table(train, val).render("text")]
    if "classification_mAP" in results:
        lines.append(f"module 1 classifies images at mAP {100 * results['classification_mAP']:.1f}")
    return "\n".join(lines)
