"""The report of a run folder: what it shows, what it names as missing, and that it needs nothing but itself."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from labelpenet import config
from labelpenet.calibration import Trace
from labelpenet.data import run_folder
from labelpenet.data.dataset import AnnotatedImages, TaggedImage, TaggedImages, Truth
from labelpenet.data.files import hash_file, write_json
from labelpenet.errors import InputError
from labelpenet.evaluation import Table, evaluate
from labelpenet.formats import Predictions, open_annotated, write_predictions
from labelpenet.formats.parts import Part, merge_parts
from labelpenet.instances import Instances
from labelpenet.models.cascade import LabelPEnet
from labelpenet.report import write_report
from labelpenet.report.html import class_table, flatten, gather, marked, module_table
from labelpenet.report.plots import curves, loss_plot, smoothed
from labelpenet.report.strips import Source, choose_images, make_strip, mean_best_overlap, worst_images
from labelpenet.visualize import draw_mask
from tests.students import small_student

CLASSES = ("cat", "<dog> & 'co\"")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Parses strictly: every element is closed in order. Keeps references, pictures, text and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.references.append(value or "")
            if name == "id" and value:
                self.ids.append(value)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data + "\n"


def square(x1: int, y1: int, x2: int, y2: int, label: int, weight: float, size: tuple[int, int]) -> Instances:
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[0, y1:y2, x1:x2] = True
    box = torch.tensor([[x1, y1, x2, y2]], dtype=torch.float)
    return Instances(box, torch.tensor([label]), torch.tensor([weight]), size, mask)


def photographs(folder: Path, count: int) -> AnnotatedImages:
    """Photographs of 48 x 64 pixels, each with one true square of its class."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    images = []
    for index in range(count):
        path = folder / f"{index} <b>&.png"
        Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
        images.append(TaggedImage(f"{index} <b>&", path, (index % 2,)))

    def read(name: str) -> Truth:
        label = int(name.split()[0]) % 2
        none = torch.zeros(1, dtype=torch.bool)
        return Truth(square(10, 10, 40, 40, label, 1.0, (48, 64)), none, none)

    return AnnotatedImages(TaggedImages(CLASSES, tuple(images)), read, (1, 2))


def found_in(image: TaggedImage, number: int = 1) -> Instances:
    """The later the image, the worse; the later the module, the better."""
    index = int(image.id.split()[0])
    return square(10, 10, max(12, 36 - 6 * index + 2 * number), 40, image.tags[0], 0.25 * number, (48, 64))


class Network:
    """Stands for a trained cascade: answers like one, at once."""

    recipe = config.recipe("best")

    def __init__(self) -> None:
        self.predicted: list[int] = []

    def proposals(self, image: np.ndarray) -> Tensor:
        return torch.tensor([[0.0, 0, image.shape[1], image.shape[0]], [5, 5, 30, 30]])

    @property
    def classification(self) -> Network:
        return self

    settings = config.recipe("best").modules[0]

    def batch(self, images: list[np.ndarray], tags: list[Any], proposals: list[Tensor]) -> Any:
        return images[0], tags[0]

    def infer(self, batch: Any, settings: Any) -> list[tuple[Instances, Trace]]:
        image, tags = batch
        labels = (0, 1) if tags is None else tags
        size = (image.shape[0], image.shape[1])
        found = Instances.cat([square(8, 8, 32, 32, label, 0.9 - 0.1 * label, size) for label in labels])
        maps = torch.rand(len(labels), 24, 32, generator=torch.Generator().manual_seed(0))
        return [(found, Trace(maps, maps, maps, maps))]

    def predict(self, image: np.ndarray, module: int, proposals: Tensor) -> Instances:
        self.predicted.append(module)
        return square(12, 12, 40, 40, 0, 0.8, (image.shape[0], image.shape[1]))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    one = Network()
    monkeypatch.setattr(LabelPEnet, "from_run", lambda run, device: one)
    return one


def make_run(run: Path, trained: int = 0, data: AnnotatedImages | None = None, results: Any = None) -> Path:
    """A run folder with ``trained`` modules, their labels and losses."""
    (run / "weights").mkdir(parents=True)
    facts = {
        "classes": list(CLASSES), "backbone": "mobilenet_v2", "normalisation": {"mean": [0, 0, 0], "std": [1, 1, 1]},
        "seed": 7, "precision": "32-true", "images": 4, "recipe": config.to_dict(config.recipe("best")),
        "source": {"data": "<i>folder</i>", "split": "train"},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(facts))
    (run / "environment.json").write_text(json.dumps({"versions": {"torch": "2.9.9"}, "command": "train --a <b>"}))
    rows = []
    for number, name in enumerate(("classification", "detection", "refinement", "segmentation")[:trained], 1):
        (run / "weights" / f"{name}.safetensors").write_bytes(b"")
        rows += [
            {"stage": name, "step": step, "loss/total": 2 / step, "loss/a<b": 1 / step, "loss/c": 1 / step}
            for step in (10, 20, 30)
        ]
        if data is not None:
            label(run, number, data.tagged.images)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    if results is not None:
        (run / "results.json").write_text(json.dumps(results))
    return run


def label(run: Path, number: int, images: Sequence[TaggedImage]) -> None:
    """Writes what module ``number`` passed on for the training images."""
    path = run_folder.instances(run, f"module{number}")
    path.parent.mkdir(exist_ok=True)
    content = {
        "images": [{"id": image.id, "file_name": image.path.name, "height": 48, "width": 64} for image in images],
        "categories": [{"id": index, "name": name} for index, name in enumerate(CLASSES, 1)],
        "annotations": [row for image in images for row in found_in(image, number).to_coco(image.id, [1, 2])],
    }
    path.write_text(json.dumps(content))


def part(box: float, mask: float) -> dict[str, Any]:
    classes = dict.fromkeys(CLASSES, box)
    return {
        "box": {"mAP": box, "per_class": classes, "CorLoc": box / 2, "CorLoc_per_class": classes},
        "mask": {
            "mAP@0.25": mask, "mAP@0.5": mask / 2, "mAP@0.75": mask / 4, "ABO": mask / 3, "per_class": classes,
            "per_class@0.25": classes, "per_class@0.75": classes, "ABO_per_class": classes,
        },
    }  # fmt: skip


def measured(**more: Any) -> dict[str, Any]:
    modules = {str(number): part(0.1 * number, 0.12 * number) for number in (1, 2, 3, 4)}
    return {"split": "val", "protocol": "voc12", "train": modules, "val": modules, **more}


def test_a_finished_run_has_its_numbers_pictures_curves_and_set_up(tmp_path: Path, network: Network) -> None:
    data, held_out = photographs(tmp_path / "train", 4), photographs(tmp_path / "val", 4)
    run = make_run(tmp_path / "my <run>", 4, data)
    write_json(run_folder.results(run), measured(classification_mAP=0.876, state=run_folder.state(run)))
    path = write_report(run, None, data, held_out, images=2)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "my <run>" in page.text and "<run>" not in text and "<b>" not in re.sub(r"<b>[^<]*</b>", "", text)
    plain = re.sub(r"base64,[^\"]*", "", text)
    assert not [one for one in ("<dog>", "<i>folder", "NaN", "nan ", "Undefined") if one in plain]
    assert "<i>folder</i>" in page.text and "--a <b>" in page.text and "2.9.9" in page.text
    for number in ("87.6", "40.0", "48.0", "24.0", "12.0", "16.0", "20.0", "adamw"):
        assert number in page.text, number
    assert page.tags.count("svg") == 4
    for stage in ("classification", "detection", "refinement", "segmentation"):
        assert f"loss curves of {stage}" in text
    assert len(page.ids) == len(set(page.ids))
    # of each split 2 strips: photograph, proposals, maps and masks of the instances, modules 1 to 4, true objects
    assert page.tags.count("img") == 2 * (2 + 5 + 5) + 2 * (2 + 10 + 5) + 2 * 3 + 1  # and the enlarged one
    figures = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd></div>", text)
    assert figures[:3] == [
        ("box mAP .5 of module 4, %", "40.0"), ("mask mAP .5 of module 4, %", "24.0"),
        ("classification mAP, %", "87.6"),
    ]  # fmt: skip
    assert "modules 1 to 4 on mobilenet_v2" in page.text and f"cat and {CLASSES[1]}" in page.text
    assert page.text.count("true objects, never used in training") == 2 + 2 + 2
    assert network.predicted == [2, 3, 4] * 2  # held out; module 1 answers with its maps
    assert "Not in this report" not in page.text


def test_what_another_tool_proposed_is_not_shown_as_ours(tmp_path: Path, network: Network) -> None:
    data = photographs(tmp_path / "train", 3)
    run = make_run(tmp_path / "run", 4, data)
    facts = json.loads((run / "run.json").read_text())
    page = [Page(write_report(run, tmp_path / "a.html", data, images=1).read_text("utf-8"))]
    (run / "run.json").write_text(json.dumps({**facts, "proposals": "0123"}))
    page.append(Page(write_report(run, tmp_path / "b.html", data, images=1).read_text("utf-8")))
    assert ["the run had another tool's proposals" in one.text for one in page] == [False, True]
    assert [one.tags.count("img") for one in page] == [3 + 1 + (2 + 5 + 5), 3 + 1 + (1 + 5)]


def test_nothing_outside_the_file_is_referred_to(tmp_path: Path, network: Network) -> None:
    data = photographs(tmp_path / "train", 3)
    text = write_report(make_run(tmp_path / "run", 2, data), tmp_path / "out" / "page.html", data).read_text("utf-8")
    page = Page(text)
    assert page.references
    for reference in page.references:
        assert reference.startswith(("data:image/jpeg;base64,", "#")), reference[:60]
        if reference.startswith("#"):
            assert reference[1:] in page.ids
    assert not {"link", "iframe", "object"} & set(page.tags) and page.tags.count("script") == 1
    assert not re.search(r"https?:|@import|//cdn", text)
    assert all(one.startswith("url(#") for one in re.findall(r"url\([^)]*", text))
    assert (tmp_path / "out" / "page.html").is_file() and not (tmp_path / "run" / "report.html").exists()


def test_an_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")).read_text("utf-8"))
    for number, name in enumerate(("classification", "detection", "refinement", "segmentation"), 1):
        assert f"module {number} ({name}) is not trained yet" in page.text
    assert "results.json is not there" in page.text and "the data was not given" in page.text
    assert page.tags.count("img") == 1 and "svg" not in page.tags


def test_photographs_that_were_trained_on_are_not_called_held_out_in_silence(tmp_path: Path) -> None:
    measured = {"split": "train", "trained_on": 3, "train": {}, "val": {"4": part(0.5, 0.5)}}
    page = Page(write_report(make_run(tmp_path / "run", results=measured)).read_text("utf-8"))
    assert "3 of the photographs that the run was measured on are no held-out ones" in page.text


def test_an_unfinished_run_shows_what_it_has(tmp_path: Path, network: Network) -> None:
    data = photographs(tmp_path / "train", 4)
    run = make_run(tmp_path / "run", 2, data)
    (run / "instances" / "module2.json").unlink()
    (run / "environment.json").unlink()
    page = Page(write_report(run, None, data.tagged, data.tagged, images=1).read_text("utf-8"))
    assert "module 2 (detection) is trained but has not labelled" in page.text
    assert "module 3 (refinement) is not trained" in page.text and "module 1 (" not in page.text
    assert "environment.json is not there" in page.text
    assert page.text.count("no annotation was given") == 2 and "true objects, never" not in page.text
    assert network.predicted == [2]  # held out; module 1 answers with its maps, and its labels are known


def test_the_labels_of_a_photograph_are_not_drawn_on_another_of_its_name(tmp_path: Path, network: Network) -> None:
    data = photographs(tmp_path / "train", 2)
    run = make_run(tmp_path / "run", 4, data)
    first, second = data.tagged.images
    run_folder.check_photographs(run, {first.id: "0" * 32, second.id: hash_file(second.path)})
    page = Page(write_report(run, None, data, images=2).read_text("utf-8"))
    assert "training images: 1 are others" in page.text
    assert first.id not in page.text and second.id in page.text


def test_the_predictions_of_a_photograph_are_not_drawn_on_another_of_its_name(tmp_path: Path, network: Network) -> None:
    held_out = photographs(tmp_path / "val", 2)
    run = make_run(tmp_path / "run", 2, results={"split": "val"})
    first, second = images = held_out.tagged.images
    path = run_folder.predictions(run, "val", 2)
    write_predictions(path, {image.id: found_in(image, 2) for image in images}, images, CLASSES)
    write_json(run_folder.origin(path), {"photographs": {first.id: "0" * 32, second.id: hash_file(second.path)}})
    page = Page(write_report(run, None, None, held_out, images=2).read_text("utf-8"))
    assert "held-out images: 1 are others" in page.text
    assert network.predicted == [2]  # of the first alone; the second's are known
    assert first.id not in page.text[page.text.index("does worst") :]


def test_what_was_measured_with_other_weights_is_not_shown(tmp_path: Path, network: Network) -> None:
    held_out = photographs(tmp_path / "val", 2)
    images, run = held_out.tagged.images, make_run(tmp_path / "run", 3)
    state = run_folder.state(run)
    write_json(run_folder.results(run), measured(classification_mAP=0.876, uncalibrated={"val": {}}, state=state))
    for number in (1, 2, 3):
        path = run_folder.predictions(run, "val", number)
        write_predictions(path, {image.id: found_in(image, number) for image in images}, images, CLASSES)
        write_json(run_folder.origin(path), {"content": hash_file(path), "state": state})

    def left() -> tuple[str, list[str]]:
        results = gather(run).results
        assert list(results["train"]) == list(results["val"])
        return "".join(results["val"]), [key for key in ("classification_mAP", "uncalibrated") if key in results]

    def report() -> Page:
        network.predicted.clear()
        return Page(write_report(run, None, None, held_out, images=1).read_text("utf-8"))

    assert "had other weights" not in report().text and not network.predicted
    module_1 = left()[1]
    assert left() == ("1234", ["classification_mAP", "uncalibrated"])
    run_folder.weights(run, "segmentation").write_bytes(b"trained since")
    assert "module 4 had other weights when measured" in report().text and left() == ("123", module_1)
    run_folder.weights(run, "detection").write_bytes(b"trained again")
    page = report()
    assert "module 2, module 3, module 4 had other weights when measured" in page.text and left() == ("1", module_1)
    assert page.text.count("not of the run's present weights") == 2 and network.predicted == [2, 3, 4]
    assert "in which module 1 does worst" in page.text
    path = run_folder.predictions(run, "val", 1)
    write_predictions(path, {images[0].id: found_in(images[0], 2)}, images, CLASSES)
    assert "val-module1.json: not of the run's present weights" in report().text
    run_folder.weights(run, "stem").write_bytes(b"another")
    assert left() == ("", [])


def test_figures_of_unknown_weights_are_shown_with_a_word(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", 4, results=measured())).read_text("utf-8"))
    assert "does not say which weights were measured" in page.text and "40.0" in page.text


def test_a_mean_over_thresholds_is_not_called_that_at_one(tmp_path: Path) -> None:
    box = {"mAP": 0.3, "AP50": 0.5, "per_class": {}, "CorLoc": 0.0, "CorLoc_per_class": {}}
    results = {"split": "val", "protocol": "coco", "val": {"4": {"box": box}}}
    text = write_report(make_run(tmp_path / "run", 4, results=results)).read_text("utf-8")
    assert re.search(r"<dt>box mAP .5 of module 4, %</dt><dd>50.0</dd>", text)
    assert "mean over IoU 0.5 to 0.95 and classes" in text and "precision of boxes at IoU 0.5," not in text


def test_damaged_parts_are_named_and_cost_only_themselves(tmp_path: Path, network: Network) -> None:
    data = photographs(tmp_path / "train", 4)
    run = make_run(tmp_path / "run", 1, data)
    (run / "results.json").write_text("{")
    (run / "instances" / "module1.json").write_text("[]")
    data.tagged.images[0].path.write_bytes(b"no image")
    page = Page(write_report(run, None, data, images=2).read_text("utf-8"))
    assert "results.json: not valid JSON" in page.text and "module1.json: damaged" in page.text
    assert "0 <b>&.png" in page.text and "1 <b>&" in page.text
    assert page.tags.count("img") == 2 + 5 + 2 + 1


def test_the_worst_images_are_those_with_the_least_overlap(tmp_path: Path, network: Network) -> None:
    data, held_out = photographs(tmp_path / "train", 4), photographs(tmp_path / "val", 5)
    run = make_run(tmp_path / "run", 1, data, {"split": "val"})
    page = Page(write_report(run, None, data, held_out, images=2).read_text("utf-8"))
    assert "The training images in which module 1 does worst" in page.text
    images = held_out.tagged.images
    found = {image.id: found_in(image) for image in images}
    (run / "predictions").mkdir()
    write_predictions(run / "predictions" / "val-module1.json", found, images, CLASSES)
    page = Page(write_report(run, None, data, held_out, images=2).read_text("utf-8"))
    assert "The held-out images in which module 1 does worst" in page.text
    worst = page.text[page.text.index("does worst") :]
    assert worst.index("4 <b>&") < worst.index("3 <b>&") and "2 <b>&" not in worst
    ranked = worst_images(images, found, held_out.read, 5)
    values = [value for _, value in ranked]
    assert values == sorted(values) and [image.id[0] for image, _ in ranked] == ["4", "3", "2", "1", "0"]


def test_a_report_decodes_one_photograph_after_another_however_its_predictions_are_laid_out(
    tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = photographs(tmp_path / "val", 12)
    run = make_run(tmp_path / "run", 1, None, {"split": "val"})
    path = run_folder.predictions(run, "val", 1)
    found = {image.id: found_in(image) for image in held_out.tagged.images}
    write_predictions(path, found, held_out.tagged.images, CLASSES)
    alive: list[weakref.ref[Instances]] = []
    at_once: list[int] = []
    decode = Predictions.__getitem__

    def counted(self: Predictions, name: str) -> Instances:
        one = decode(self, name)
        alive.append(weakref.ref(one))
        at_once.append(sum(ref() is not None for ref in alive))
        return one

    monkeypatch.setattr(Predictions, "__getitem__", counted)
    by_line = write_report(run, None, None, held_out, images=2).read_text("utf-8")
    assert len(at_once) == 12 + 2 + 2 and max(at_once) <= 2, "each once, then those that are shown"
    path.write_text(json.dumps(json.loads(path.read_text())))  # on one line, as other tools write it
    whole = write_report(run, None, None, held_out, images=2).read_text("utf-8")
    assert re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "", whole) == re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "", by_line)


@pytest.mark.parametrize("suffix", ["", ".parquet"])
def test_a_report_takes_predictions_in_any_form_and_says_where_from(
    tmp_path: Path, network: Network, suffix: str
) -> None:
    pytest.importorskip("pyarrow")
    held_out = photographs(tmp_path / "val", 8)
    run, paths = make_run(tmp_path / "run", 4), {one: tmp_path / f"found{one}" for one in (".json", suffix)}
    with Part(tmp_path / "found", (1, 1), {"module": 4}, held_out.tagged.images, CLASSES) as part:
        for image in held_out.tagged.images:
            unread = image.id[0] == "0"  # is among those that are shown, so it is predicted now
            empty = Instances.empty((48, 64), with_masks=True)
            part.add(image, None if unread else empty if image.id[0] == "1" else found_in(image, 4))
        part.finish()
    for path in paths.values():
        if path.suffix:
            merge_parts([tmp_path / "found"], path)

    def report(path: Path) -> str:
        network.predicted.clear()
        text = write_report(run, None, None, held_out, images=2, predictions=path).read_text("utf-8")
        assert network.predicted == [2, 3, 4, 2, 3]
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "", text).replace(str(path), "PATH")

    pages = [report(path) for path in paths.values()]
    assert pages[0] == pages[1] and "1 are not in PATH; those are predicted now" in pages[0]
    assert "what was found is taken from PATH" in pages[0] and "in which module 4 does worst" in pages[0]
    before = (run / "report.html").read_bytes()
    for path, split in ((paths[suffix], None), (tmp_path / "missing", held_out), (run / "run.json", held_out)):
        with pytest.raises(InputError, match=path.name):
            write_report(run, None, None, split, predictions=path)
    assert (run / "report.html").read_bytes() == before


def test_the_page_of_a_student_speaks_of_no_modules(tmp_path: Path) -> None:
    trained, year = small_student()
    run = shutil.copytree(trained, tmp_path / "student")
    data = open_annotated(year, "train")
    held_out = open_annotated(year, "val", data.tagged.classes)
    found = {image.id: held_out.read(image.id).instances[:1] for image in held_out.tagged.images}
    path = run_folder.predictions(run, "val", 4)
    write_predictions(path, found, held_out.tagged.images, held_out.tagged.classes)
    write_json(run_folder.results(run), {"split": "val", "protocol": "voc12", "val": {}})
    page = Page(write_report(run, tmp_path / "page.html", data, held_out, images=1).read_text("utf-8"))
    assert "images in which the student does worst" in page.text and "What the student found" in page.text
    assert "nothing has labelled them here" in page.text
    run_folder.weights(run, "student").unlink()
    unfinished = Page(write_report(run, tmp_path / "page.html", data, images=1).read_text("utf-8"))
    assert "nothing has labelled them here" in unfinished.text
    for text in (page.text, unfinished.text):
        assert not any(said in text for said in ("module 4", "each module", "the modules passed on", "The modules"))


def test_other_classes_than_the_runs_are_refused(tmp_path: Path) -> None:
    data = photographs(tmp_path / "train", 2)
    other = TaggedImages(("horse", "cat"), data.tagged.images)
    page = Page(write_report(make_run(tmp_path / "run"), None, other).read_text("utf-8"))
    assert "their classes are not those of the run" in page.text and page.tags.count("img") == 1


def test_a_folder_that_is_no_run_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_table_has_a_row_for_each_module_and_marks_the_best() -> None:
    table = module_table({"train": {"1": part(0.2, 0.3)}, "val": {"1": part(0.2, 0.3), "2": part(0.5, 0.1)}})
    assert table is not None
    assert [name[0] for name, _ in table.rows] == ["1", "2", "3", "4"]
    cells = {name[0]: dict(zip(table.columns, row, strict=True)) for name, row in marked(table)}
    assert cells["1"]["train CorLoc"] == ("10.0", True) and cells["2"]["train CorLoc"] == ("–", False)
    assert cells["1"]["box mAP"] == ("20.0", False) and cells["2"]["box mAP"] == ("50.0", True)
    assert cells["1"]["mask mAP .25"] == ("30.0", True) and cells["4"]["ABO"] == ("–", False)
    before = module_table({"val": {"1": part(0.2, 0.3)}, "uncalibrated": {"val": part(0.15, 0.1)}})
    assert before is not None and before.rows[0][0].endswith("before calibration")
    assert marked(before)[0][1][1][0] == "15.0"


@pytest.mark.parametrize("results", [{}, {"train": {}, "val": {}}, {"val": None}, {"val": []}])
def test_no_results_give_no_table(results: dict[str, Any]) -> None:
    assert module_table(results) is None and class_table(results) is None


def test_a_table_without_rows_or_with_one_has_no_best() -> None:
    assert marked(Table("empty", ("a", "b"), ())) == []
    assert marked(Table("one", ("a",), (("x", (1.0,)),))) == [("x", [("1.0", False)])]


def test_what_evaluate_returns_can_be_shown(tmp_path: Path) -> None:
    data = photographs(tmp_path / "train", 4)
    result = evaluate({image.id: found_in(image) for image in data.tagged.images}, data.truths(), CLASSES)
    results = {"train": {"1": result}, "val": {"1": result}}
    table, by_class = module_table(results), class_table(results)
    assert table is not None and by_class is not None
    shown = dict(zip(table.columns, (cell for cell, _ in marked(table)[0][1]), strict=True))
    assert shown["ABO"] == f"{100 * result['mask']['ABO']:.1f}"
    assert [name for name, _ in by_class.rows] == [*CLASSES, "mean"]


def test_mean_best_overlap_is_the_mean_over_objects_of_masks_or_of_boxes() -> None:
    size, none = (20, 40), torch.zeros(2, dtype=torch.bool)
    objects = Instances.cat([square(0, 0, 10, 10, 0, 1, size), square(20, 0, 30, 10, 1, 1, size)])
    found = Instances.cat([square(0, 0, 10, 5, 0, 0.1, size), square(0, 0, 10, 9, 1, 0.9, size)])
    assert mean_best_overlap(found, Truth(objects, none, none)) == pytest.approx((0.5 + 0) / 2)
    boxes = Instances(objects.boxes, objects.labels, objects.weights, size)
    assert mean_best_overlap(found, Truth(boxes, none, none)) == pytest.approx((0.5 + 0) / 2)
    crowd = torch.tensor([False, True])
    assert mean_best_overlap(found, Truth(objects, none, crowd)) == pytest.approx(0.5)
    assert mean_best_overlap(Instances.empty(size), Truth(objects, none, none)) == 0
    assert mean_best_overlap(found, Truth(objects, none, ~none)) is None


def test_chosen_images_go_round_the_classes_in_the_order_of_the_data_set() -> None:
    tags = [(0,), (0,), (0, 1), (), (1,), (2,)]
    images = TaggedImages(("a", "b", "c"), tuple(TaggedImage(str(i), Path("x"), t) for i, t in enumerate(tags)))
    assert [image.id for image in choose_images(images, 3)] == ["0", "2", "5"]
    assert [image.id for image in choose_images(images, 4)] == ["0", "1", "2", "5"]
    assert [image.id for image in choose_images(images, 99)] == ["0", "1", "2", "4", "5"]
    assert choose_images(images, 0) == []


def test_curves_are_sorted_by_stage_and_step_and_pass_over_what_is_no_loss() -> None:
    rows: list[dict[str, Any]] = [
        {"stage": "b", "step": 2, "loss/total": 3.0, "loss/x": 1.0, "loss/y": 2.0, "images_per_s": 4.0},
        {"stage": "b", "step": 1, "loss/total": None, "loss/x": 1.0, "loss/y": None},
        {"stage": "a", "step": 1, "loss/x": 5.0},
        {"stage": "a", "step": 2, "lr": 0.1},
        {"step": 3, "loss/total": 1.0},
        {"stage": "c"},
    ]
    b, a = curves(rows)
    assert (b.stage, a.stage) == ("b", "a")
    assert b.steps.tolist() == [1, 2] and np.isnan(b.total[0]) and b.total[1] == 3
    assert set(b.terms) == {"x", "y"} and b.images_per_s == 4 and b.last == 3
    assert a.total.tolist() == [5.0] and a.terms == {}


def slow_running_mean(values: list[float], window: int) -> list[float]:
    means = []
    for index in range(len(values)):
        known = [one for one in values[max(0, index - window + 1) : index + 1] if one == one]
        means.append(sum(known) / len(known) if known else float("nan"))
    return means


def test_smoothing_is_a_running_mean_over_what_is_known() -> None:
    values = [float("nan"), 1, 5, float("nan"), 2, 8, 3]
    for window in (1, 2, 3, 20):
        np.testing.assert_allclose(smoothed(np.array(values), window), slow_running_mean(values, window))


@pytest.mark.parametrize("losses", [[1.0], [float("nan"), float("nan")], [3.0, 2.0, float("nan"), -1.0]])
def test_a_plot_is_one_svg_in_the_colour_of_the_page(losses: list[float]) -> None:
    rows = [{"stage": "a$<b>$", "step": step, "loss/total": value} for step, value in enumerate(losses, 1)]
    svg = loss_plot(curves(rows)[0])
    page = Page(svg)
    assert svg.startswith("<svg viewBox=") and "currentColor" in svg and "http" not in svg and page.tags[0] == "svg"


def test_a_plots_lines_are_to_scale_and_its_axes_hold_them() -> None:
    rows = [{"stage": "a", "step": step, "loss/total": 3.7 - step} for step in (1, 2, 4)]
    svg = loss_plot(curves(rows)[0])
    drawn = [
        np.array([pair.split() for pair in re.split("[ML]", path)[1:]], float)
        for path in re.findall(r'd="(M[\d.]+ [\d.]+L[^"]*)"', svg)
    ]
    assert len(drawn) == 2  # as it is, and smoothed
    (first, second, third), (x, y) = drawn[0], drawn[0].T
    np.testing.assert_allclose((third - first), 3 * (second - first), atol=0.3)  # points have one digit
    ticks = re.findall(r'y="([\d.]+)" text-anchor="end"[^>]*>(-?[\d.]+)<', svg)
    labels = {float(text): float(place) - 3 for place, text in ticks}
    values = sorted(labels)
    np.testing.assert_allclose(np.interp([2.7, 1.7, -0.3], values, [labels[one] for one in values]), y, atol=0.2)
    assert x.min() >= 44 and x.max() <= 364


def test_flattening_keeps_order_and_names() -> None:
    content = {"a": 1, "b": {"c": None, "d": [1, (2, 3)]}, "e": True, "f": [], "g": [{"h": 1}]}
    assert flatten(content) == [
        ("a", "1"),
        ("b.c", "none"),
        ("b.d", "1, [2, 3]"),
        ("e", "yes"),
        ("f", ""),
        ("g.1.h", "1"),
    ]


def test_the_mask_before_the_crf_leaves_pixels_to_surer_classes(tmp_path: Path, network: Network) -> None:
    size = (48, 64)
    maps = torch.full((2, *size), 0.05)
    maps[0], maps[1, :, 32:] = 0.7, 0.99  # the dog is surer in the right half
    found = Instances.cat([square(0, 0, 64, 48, label, 0.9, size) for label in (0, 1)])
    network.infer = lambda batch, settings: [(found, Trace(maps, maps, maps, maps))]  # type: ignore[method-assign]
    image = TaggedImage("both", photographs(tmp_path / "train", 1).tagged.images[0].path, (0, 1))

    def before(training: bool) -> tuple[np.ndarray, np.ndarray]:
        source = Source(TaggedImages(CLASSES, (image,)), network, (1,), training=training, side=64)  # type: ignore[arg-type]
        rows = make_strip(source, image).rows
        panels = [[one for one in row.panels if one.title in ("photograph", "mask before the CRF")] for row in rows[:2]]
        return panels[0][0].picture, panels[0][1].picture

    left = torch.arange(64)[None].expand(size) < 32
    photograph, picture = before(training=True)
    np.testing.assert_array_equal(picture, draw_mask(photograph, left))
    photograph, picture = before(training=False)  # where it answers, recipe best lets no class take from another
    np.testing.assert_array_equal(picture, draw_mask(photograph, left | True))


def test_the_training_strips_never_ask_for_more_than_the_tags(tmp_path: Path, network: Network) -> None:
    data = photographs(tmp_path / "train", 4)
    asked: list[Any] = []
    infer: Callable[..., Any] = network.infer
    network.infer = lambda batch, settings: asked.append(batch[1]) or infer(batch, settings)  # type: ignore[method-assign,func-returns-value]
    write_report(make_run(tmp_path / "run", 1, data), None, data, data, images=2)
    assert asked == [(0,), (1,), None, None]
