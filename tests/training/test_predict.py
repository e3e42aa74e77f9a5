"""Prediction shared by several processes: the same file as by one, whatever happens to single photographs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from labelpenet.config import override, recipe, to_dict
from labelpenet.data.dataset import TaggedImage
from labelpenet.data.images import read_image
from labelpenet.engine.distributed import build_fabric
from labelpenet.errors import InputError
from labelpenet.formats import write_predictions
from labelpenet.instances import Instances
from labelpenet.models.build import build_backbone
from labelpenet.models.cascade import MODULES, LabelPEnet
from labelpenet.training.predict import Predictor, _join, predict_images
from tests.students import small_student

N = 5
CLASSES = ("cat", "dog", "sheep")
SETTINGS = (
    *(
        "images.test_side=64",
        "modules.*.rpn_post_nms_top_n_test=12",
        "modules.2.predict.max_attention=4",
    ),
    *(
        "modules.4.predict.max_masks=4",
        "modules.2.predict.iterations=1",
        "modules.4.predict.iterations=1",
        "modules.1.predict.iterations=1",
    ),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder of four modules with random weights."""
    folder = tmp_path_factory.mktemp("run") / "run"
    torch.manual_seed(0)
    chosen = override(recipe("demo"), SETTINGS)
    network = LabelPEnet(build_backbone("tiny", pretrained=False), CLASSES, chosen)
    (folder / "weights").mkdir(parents=True)
    for part in ("stem", *MODULES):
        state = {key: value.contiguous() for key, value in getattr(network, part).state_dict().items()}
        save_file(state, folder / "weights" / f"{part}.safetensors")
    facts = {"classes": CLASSES, "backbone": "tiny", "normalisation": network.normalisation}
    (folder / "run.json").write_text(json.dumps({**facts, "recipe": to_dict(chosen)}))
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Five photographs of different sizes, of which one is damaged."""
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(N):
        pixels = np.random.default_rng(index).integers(0, 255, (48 + 4 * index, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 96)).save(folder / f"photo{index}.jpg")
    (folder / "photo2.jpg").write_bytes(b"no image")
    return folder


def predict(run: Path, photographs: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command in processes of its own; Fabric starts the second one by calling the command again."""
    command = [sys.executable, "-m", "labelpenet", "predict", str(run), str(photographs), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(out.parent / "cache")}
    done = subprocess.run(
        [*command, "--device", "cpu", *options], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode in (0, 2), done.stderr
    return done


def listed(images: Path) -> list[TaggedImage]:
    return [TaggedImage(path.name, path, ()) for path in sorted(images.iterdir())]


def test_two_processes_write_what_one_writes(run, photographs, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    skipped = predict_images(Predictor(run, "cpu"), listed(photographs), 1, one, cache=tmp_path / "cache")
    assert skipped == ["photo2.jpg"]
    done = predict(run, photographs, two, "--module", "1", "--devices", "2")
    assert done.returncode == 0, done.stderr
    assert two.read_bytes() == one.read_bytes()
    content = json.loads(one.read_text())
    assert [image["file_name"] for image in content["images"]] == [f"photo{i}.jpg" for i in (0, 1, 3, 4)]
    assert len({row["image_id"] for row in content["annotations"]}) > 1, "nothing was found that could differ"
    said = [line for line in done.stdout.strip().splitlines() if not line.startswith("[Gloo]")]  # torch 2.8 does
    assert said == [f"{two}: 4 images, 1 skipped"], "one process speaks for both"
    assert done.stderr.count("photo2.jpg") == 1
    assert not list(tmp_path.glob("*.part*"))


def test_what_one_process_cannot_write_ends_both_in_a_line(run, photographs, tmp_path):
    (tmp_path / "two.json.part1").mkdir()
    done = predict(run, photographs, tmp_path / "two.json", "--devices", "2")
    assert done.returncode == 2
    assert "two.json.part1: cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.glob("two.json*")] == ["two.json.part1"], "the first one's part stays behind"


def test_where_nothing_can_be_read_an_earlier_file_stays(run, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(b"no image")
    out, images = tmp_path / "found.json", listed(tmp_path / "photos")
    out.write_text("earlier")
    with pytest.raises(InputError, match="no image could be read"):
        predict_images(Predictor(run, "cpu"), images, 4, out)
    parts = [write_predictions(tmp_path / f"found.json.part{rank}", {}, images, CLASSES) for rank in range(2)]
    with pytest.raises(InputError, match="no image could be read"):  # what two processes end with
        _join(parts, out, images, CLASSES)
    assert out.read_text() == "earlier"


def test_only_what_is_kept_is_written(run, photographs, tmp_path):
    out = tmp_path / "some.json"

    def keep(image: TaggedImage, found: Instances) -> Instances:
        return found[: image.id == "photo1.jpg"]

    predict_images(Predictor(run, "cpu"), listed(photographs), 4, out, keep=keep)
    content = json.loads(out.read_text())
    assert len(content["images"]) == N - 1 and len(content["annotations"]) == 1


def test_an_untrained_module_writes_nothing(run, photographs, tmp_path):
    predictor = Predictor(run, "cpu")
    predictor.network.untrained = ("segmentation",)
    with pytest.raises(InputError, match="module 4 is not trained"):
        predict_images(predictor, listed(photographs), 4, tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def in_one(predictor: Predictor, image: TaggedImage) -> Instances:
    """What module 4, or a student, finds in a photograph."""
    ((_, found, note),) = predictor.find([image], 4)
    assert found is not None, note
    return found


def test_photographs_whose_tags_are_known_are_labelled_as_training_photographs_are(run, photographs, tmp_path):
    pixels = read_image(photographs / "photo1.jpg")
    network = LabelPEnet.from_run(run)
    for tags in ((1,), (0, 2)):
        image = TaggedImage("photo1.jpg", photographs / "photo1.jpg", tags)
        found = in_one(Predictor(run, "cpu", tagged=True), image)
        with build_fabric("cpu").autocast():  # in bfloat16 where the processor has it
            ((expected, _),) = network.infer(4, network.batch([pixels], [tags]))
        assert set(found.labels.tolist()) == set(tags), "at least one instance a tag"
        assert torch.equal(found.weights, expected.weights.sort(descending=True).values)
        assert sorted(found.boxes.tolist()) == sorted(expected.boxes.tolist())


def test_a_student_told_the_tags_names_nothing_else():
    folder, year = small_student()
    photo = min(Path(year, "JPEGImages").glob("*.jpg"))
    every = in_one(Predictor(folder, "cpu"), TaggedImage("a", photo, ()))
    label = int(every.labels[0])
    both = in_one(Predictor(folder, "cpu", tagged=True), TaggedImage("a", photo, (0, 1, 2, 3)))
    found = in_one(Predictor(folder, "cpu", tagged=True), TaggedImage("a", photo, (label,)))
    assert torch.equal(found.boxes, both.boxes[both.labels == label]) and 0 < len(found) < len(every) == len(both)


def test_the_command_reads_tags_of_a_data_set(run, photographs, tmp_path):
    rows = [f"photo{index}.jpg,{CLASSES[index % 3]}" for index in (0, 1, 3, 4)]
    (tmp_path / "tags.csv").write_text("\n".join(["file,tags", *rows]))
    out = tmp_path / "labels.json"
    done = predict(run, photographs, out, "--data", str(tmp_path / "tags.csv"), "--tagged")
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    names = {one["id"]: one["name"] for one in content["categories"]}
    files = {one["id"]: one["file_name"] for one in content["images"]}
    found = {(files[one["image_id"]], names[one["category_id"]]) for one in content["annotations"]}
    assert found == {tuple(row.split(",")) for row in rows}
    refused = predict(run, photographs, out, "--tagged")
    assert refused.returncode == 2 and "--tagged reads tags" in refused.stderr
