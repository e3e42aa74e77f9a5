"""The commands of docs/reproduce.md, as they stand there, on a miniature VOCdevkit of generated scenes.

Shortened to a few iterations on small images with a narrow VGG-16 of random weights; that the commands run, and that
what they write can be read, is all that this shows.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from labelpenet.cli import main
from labelpenet.data import proposals, write_scenes
from labelpenet.data.dataset import VOC_CLASSES
from labelpenet.formats import export_voc, open_annotated, open_tagged, read_predictions
from labelpenet.models import build
from tests.models.tiny import NarrowPlug, NarrowVGG

PAGE = Path(__file__).parents[1] / "docs" / "reproduce.md"
RUNS = ("voc07", "voc07-fb", "voc12", "voc12-fb", "voc12seg", "voc12seg-fb")
SUBSET = ("bottle", "chair", "diningtable", "tvmonitor")  # what the four kinds of scenes' objects are called
SMALL = [
    *("images.sides=96,112", "images.longest=128", "proposals.limit=24"),
    *(f"modules.*.{one}" for one in ("rois=16", "rpn_post_nms_top_n_train=24", "rpn_post_nms_top_n_test=24")),
    *("modules.*.anchor_sides=16,32,64", "modules.*.mask_width=16", "modules.*.mask_depth=1"),
    *(f"modules.*.{part}.iterations=2" for part in ("label", "predict")),
    *(f"modules.*.{part}.{one}=12" for part in ("label", "predict") for one in ("max_attention", "max_masks")),
    *(f"modules.{number}.{part}.per_class=2" for number in (2, 3, 4) for part in ("label", "predict")),
]
# What is added to the commands of the page: another machine, and a schedule of two to three iterations.
ADDED = {
    "train": ["--device", "cpu", "--precision", "32-true", "--shorten", "0.00004", "--set", *SMALL],
    "forward-backward": ["--device", "cpu", "--precision", "32-true"],
    "predict": ["--device", "cpu"],
}
# Stands in for the programs that need what earlier ones write: notes them down, while bash does the loops.
NOTED = r"""
set -eu
labelpenet() { printf '%s\0' labelpenet "$@" $'\1'; }
tar() { printf '%s\0' tar "$@" $'\1'; }
"""


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder in which every command of the page has run, and the text of each command."""
    home = tmp_path_factory.mktemp("reproduce")
    write_kit(home)
    torch.manual_seed(0)
    torch.save(NarrowVGG().state_dict(), home / "vgg16-397923af.pth")
    commands = noted(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setitem(build.BACKBONES, "vgg16", (NarrowVGG, NarrowPlug))
        patch.setattr(proposals, "_usable_cores", lambda: 1)  # starting processes would take longer than the work
        for command in commands:
            run(command)
    return home, [shlex.join(command) for command in commands]


def run(command: list[str]) -> None:
    """Runs a command of the page; of ours in this process, which has loaded torch already."""
    if command[0] != "labelpenet":
        subprocess.run(command, check=True)
        return
    try:
        main([*command[1:], *ADDED.get(command[1], [])])
    except SystemExit as end:
        pytest.fail(f"{shlex.join(command)} ended with status {end.code}")


def noted(home: Path) -> list[list[str]]:
    """The commands of the page's bash blocks, in order, with variables and loops resolved."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    done = subprocess.run(["bash", "-c", NOTED + "".join(blocks)], cwd=home, capture_output=True, text=True, check=True)
    return [part.strip("\0").split("\0") for part in done.stdout.split("\1") if part.strip("\0")]


def write_kit(home: Path) -> None:
    """VOCdevkit/VOC2007 and VOC2012 under ``home``; like the real one, VOC2012 has no annotation of its test split."""
    scenes = open_annotated(write_scenes(home / "scenes", train=20, val=0, size=(96, 112), seed=5))
    labels = torch.tensor([VOC_CLASSES.index(name) for name in SUBSET])
    truths = {
        name: replace(truth.instances, labels=labels[truth.instances.labels]) for name, truth in scenes.truths().items()
    }
    images = scenes.tagged.images
    for year, split, part in (
        *(("VOC2007", "trainval", images[:6]), ("VOC2007", "test", images[6:9])),
        *(("VOC2012", "train", images[9:14]), ("VOC2012", "val", images[14:17]), ("VOC2012", "test", images[17:])),
    ):
        found = {image.id: truths[image.id] for image in part}
        export_voc(found, part, VOC_CLASSES, home / "VOCdevkit" / year, split=split, copy_images=True)
    year = home / "VOCdevkit" / "VOC2012"
    lists = year / "ImageSets"
    (lists / "Main/trainval.txt").write_text(
        "".join((lists / f"Main/{name}.txt").read_text() for name in ("train", "val"))
    )
    (lists / "Segmentation/test.txt").write_text(f"{images[17].id}\n{images[18].id}\n")
    known = "".join(f"<object><name>{name}</name></object>" for name in VOC_CLASSES)
    (year / "Annotations" / "of_no_list.xml").write_text(f"<annotation>{known}</annotation>")  # all twenty occur
    for image in images[17:]:
        (year / "Annotations" / f"{image.id}.xml").unlink()
        for folder in ("SegmentationClass", "SegmentationObject"):
            (year / folder / f"{image.id}.png").unlink()


@pytest.mark.slow
def test_every_run_is_whole(reproduced):
    home, _ = reproduced
    for name, split in zip(
        RUNS, ("trainval", "trainval", "trainval", "trainval", *2 * ["Segmentation/train"]), strict=True
    ):
        folder = home / "runs" / name
        assert json.loads((folder / "run.json").read_text())["backbone"] == "vgg16"
        parts = {path.stem for path in (folder / "weights").iterdir()}
        assert parts == {"stem", "classification", "detection", "refinement", "segmentation"}
        year = home / "VOCdevkit" / ("VOC2007" if "07" in name else "VOC2012")
        tagged = open_tagged(year, split)
        for module in range(1, 5):
            labels = folder / "instances" / f"module{module}.json"
            assert list(read_predictions(labels, tagged, tagged.classes, range(1, len(tagged.classes) + 1))) == [
                image.id for image in tagged.images
            ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measured", "parts"),
    [
        *((f"{run}/test-module{k}-measured", {"box", "mask", "semantic"}) for run in RUNS[:2] for k in range(1, 5)),
        *((f"{run}/trainval-corloc", {"box", "mask", "semantic"}) for run in ("voc07-fb", "voc12-fb")),
        ("voc12seg-fb/val-measured", {"box", "mask", "semantic"}),
    ],
)
def test_every_table_has_its_numbers(reproduced, measured, parts):
    home, _ = reproduced
    result = json.loads((home / "results" / f"{measured}.json").read_text())
    assert set(result) == parts
    for number in (result["box"]["mAP"], result["box"]["CorLoc"], result["mask"]["ABO"], result["semantic"]["mIoU"]):
        assert 0 <= number <= 1


@pytest.mark.slow
def test_submissions_hold_what_the_server_expects(reproduced):
    home, _ = reproduced
    for module in range(1, 5):
        with tarfile.open(home / "results" / "voc12-fb" / f"comp4-module{module}.tar.gz") as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
        assert set(files) == {f"results/VOC2012/Main/comp4_det_test_{name}.txt" for name in VOC_CLASSES}
        lines = b"".join(files.values()).decode().splitlines()
        tested = (home / "VOCdevkit/VOC2012/ImageSets/Main/test.txt").read_text().split()
        assert lines and {line.split()[0] for line in lines} <= set(tested)
    with tarfile.open(home / "results" / "voc12seg-fb" / "comp6.tar.gz") as archive:
        painted = {
            Path(member.name).stem: Image.open(archive.extractfile(member)) for member in archive if member.isfile()
        }
        assert {picture.size for picture in painted.values()} == {(112, 96)}
        assert all("/comp6_test_cls/" in member.name for member in archive if member.isfile())
    assert set(painted) == set((home / "VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt").read_text().split())


@pytest.mark.slow
def test_the_page_shows_the_options_that_matter(reproduced):
    _, commands = reproduced
    trained = [command for command in commands if command.startswith("labelpenet train")]
    assert len(trained) == 3 and all("--recipe paper --backbone vgg16" in command for command in trained)
    assert sum(command.startswith("labelpenet forward-backward") for command in commands) == 3
