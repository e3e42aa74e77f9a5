"""The command line: parses, calls, prints. Everything else lives in the rooms below.

A command is a class, its options, and a function below (`COMMANDS`), which raises `InputError` for what cannot be used.
Exit status: 0 done; 2 the input cannot be used (one line on standard error says why and what to do); 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro
from tyro.conf import Positional, arg, subcommand

from labelpenet import __version__, config
from labelpenet.config import CascadeOptions, R, RunOptions, check_ranges
from labelpenet.errors import InputError, one_line

if TYPE_CHECKING:
    from labelpenet.data import AnnotatedImages, TaggedImages, Truth


def _optional(metavar: str, help: str | None = None) -> Any:
    """Of an option that may be left out: its help says what happens then, "(default: None)" does not."""
    return arg(metavar=metavar, help=help, help_behavior_hint="")


OptionalPath = Annotated[Path | None, _optional("PATH")]
Data = Positional[Annotated[Path, arg(metavar="DATA")]]
RunFolder = Positional[Annotated[Path, arg(metavar="RUN", help="Run folder of `labelpenet train`.")]]
CascadeFolder = Positional[Annotated[Path, arg(metavar="RUN", help="Run folder of the cascade.")]]
Classes = Annotated[str | None, _optional("A,B,...", "Only these classes, in this order. Default: all.")]
Split = Annotated[
    str | None, _optional("NAME", "train, val, test, ... or a file of image names. Default: all but VOC's test.")
]
TrainingSplit = Annotated[
    str | None,
    _optional("NAME", "train, val, ... or a file of image names. Default: VOC's train where there is one, else all."),
]
ImageFolder = Annotated[Path | None, _optional("PATH", "Folder of the photographs, where DATA's file lies elsewhere.")]
HeldOut = Annotated[
    str | None,
    _optional(
        "NAME", "A split of DATA that is held out and annotated: measure the modules on it while they are trained."
    ),
]
Labels = Annotated[
    tuple[Path, ...],
    _optional(
        "[FILE ...]",
        "Predictions (.json, .parquet, folders of parts) or COCO files to learn from; several are put together. "
        "Default: those in RUN/instances.",
    ),
]
Shorten = Annotated[float, arg(help="Multiply every stage's number of steps.")]
Device = Annotated[config.Device, arg(help="Where to compute.")]
Cache = Annotated[Path | None, _optional("PATH", "Folder of the proposals' cache. Default: the user's cache folder.")]
Protocol = Annotated[
    Literal["voc07", "voc12", "coco"],
    arg(help="voc07: 11 points; voc12: area under the curve; coco: also AP over IoU .5 to .95."),
]
Overwrite = Annotated[bool, arg(help="Replace what is there already; never a photograph or a file of the run.")]


@dataclass
class Train:
    """Train the cascade on photographs and tags.

    DATA is a VOCdevkit year folder, a COCO instances.json, a folder with tags.csv or one sub-folder per class, or what
    other tools write (docs/data.md). Only the tags are read, unless --supervision asks for more. What is finished stays
    in the folder --out: after Ctrl-C, a crash or a power cut, the same command with --resume continues and ends as if
    nothing had happened.

    Try:
      labelpenet train VOCdevkit/VOC2012 --out runs/voc --backbone mobilenet_v2 --classes cat,dog
      labelpenet train photos/ --out runs/mine --weights mobilenet_v2.safetensors --until 2
      labelpenet train photos/ --out runs/mine --resume
      labelpenet train VOCdevkit/VOC2012 --out runs/voc --evaluate val
      labelpenet train photos/ --out runs/quick --shorten 0.1 --set images.sides=320 images.test_side=320
      labelpenet train VOCdevkit/VOC2012 --out runs/voc-full --supervision full
      labelpenet train VOCdevkit/VOC2012 --out runs/voc-mixed --supervision mixed --supervised annotated.txt
      labelpenet train photos/ --out runs/better --supervision mixed --corrected runs/mine/review.json
    """

    data: Data
    """Photographs with tags."""
    out: Path
    """Run folder to write."""
    recipe: str = "best"
    """paper (the literal reading), best (what measures best) or demo (tiny)."""
    backbone: str = "mobilenet_v2"
    """mobilenet_v2, vgg16 or timm/NAME (any of timm's)."""
    weights: OptionalPath = None
    """ImageNet weights of the backbone (.safetensors or .pth); without it torchvision downloads its own."""
    split: TrainingSplit = None
    images: ImageFolder = None
    evaluate: HeldOut = None
    classes: Classes = None
    until: Literal[1, 2, 3, 4] = 4
    """Last module to train."""
    supervision: Literal["tags", "full", "mixed"] = "tags"
    """tags alone; full, a yardstick: module 4 on true boxes and masks; mixed: the best that each photograph has."""
    supervised: OptionalPath = None
    """mixed: a file of image names, one a line; the other photographs count as tagged only. Default: all."""
    corrected: Annotated[
        tuple[Path, ...],
        _optional(
            "[PATH ...]",
            "mixed: files or folders of corrected labels (of labelpenet review or an annotation tool): the truth of "
            "their photographs. DATA's own annotation is then read only for --supervised.",
        ),
    ] = ()
    shorten: Shorten = 1.0
    set: Annotated[tuple[str, ...], _optional("[PART.FIELD=VALUE ...]")] = ()
    """Change single choices of the recipe: part.field=value ..."""
    training: CascadeOptions = CascadeOptions()


@dataclass
class ForwardBackward:
    """Train a cascade further by forward-backward learning, the second stage of the paper.

    Takes the run folder of `labelpenet train` and writes a new one, which every other command reads like the first: all
    four modules, trained together, and the instances that they now infer for the photographs. Recipe `paper` trains
    the stem too and learns what the modules infer; `best` learns labels that were validated, and stops if they drift.
    With --labels all four modules learn what the files say instead: better labels than the cascade's own, such as
    those that students gave the photographs, or a person. Labels are what bounds the gain: with its own `best` took
    module 4 from 73 to 75 mask mAP@.5, with true ones to 87 (docs/forward-backward.md).

    Try:
      labelpenet forward-backward runs/voc VOCdevkit/VOC2012 --out runs/voc-fb
      labelpenet forward-backward runs/voc VOCdevkit/VOC2012 --out runs/voc-fb --resume
      labelpenet forward-backward runs/mine photos/ --out runs/mine-fb --set forward_backward.labels=inferred
      labelpenet forward-backward runs/mine photos/ --out runs/mine-fb --labels student.json module4.json
    """

    run: CascadeFolder
    data: Data
    """The photographs with tags that it was trained on; with --labels, any that these name."""
    out: Path
    """Run folder to write."""
    labels: Labels = ()
    split: TrainingSplit = None
    images: ImageFolder = None
    evaluate: HeldOut = None
    shorten: Shorten = 1.0
    set: Annotated[tuple[str, ...], _optional("[PART.FIELD=VALUE ...]")] = ()
    """Change single choices of the run's recipe: part.field=value ..."""
    training: CascadeOptions = CascadeOptions()


@dataclass
class Distill:
    """Train a student on a run's labels: a small standard detector that other programs can load.

    The student is torchvision's Mask R-CNN with a feature pyramid. It learns what the run's last module found in the
    photographs that the run was trained on, or what a file says that somebody corrected. Every command that takes a run
    takes the student's folder, too.

    Try:
      labelpenet distill runs/voc VOCdevkit/VOC2012 --out runs/student --weights mobilenet_v2.safetensors
      labelpenet distill runs/voc photos/ --out runs/student --labels corrected.json
      labelpenet distill runs/voc photos/ --out runs/student --backbone timm/tf_efficientnet_lite2
      labelpenet distill runs/voc photos/ --out runs/student --resume
      labelpenet distill runs/voc VOCdevkit/VOC2012 --out runs/yardstick --supervision full
    """

    run: CascadeFolder
    data: Data
    """The photographs that it was trained on."""
    out: Path
    """Folder to write."""
    labels: Labels = ()
    supervision: Literal["labels", "full"] = "labels"
    """labels: the run's. full, a yardstick: the true boxes and masks of DATA."""
    backbone: Annotated[str | None, _optional("NAME")] = None
    """mobilenet_v2, vgg16 or timm/NAME. Default: the run's."""
    weights: OptionalPath = None
    """ImageNet weights of the backbone, as for `train`."""
    split: TrainingSplit = None
    images: ImageFolder = None
    shorten: Shorten = 1.0
    set: Annotated[tuple[str, ...], _optional("[PART.FIELD=VALUE ...]")] = ()
    """Change single choices: network, noise, masks, images or schedule, as schedule.steps=800 noise.ema=0.99 ..."""
    training: RunOptions = RunOptions()


@dataclass
class Predict:
    """Find the instances in photographs.

    Try:
      labelpenet predict runs/voc photo.jpg --out predictions.json --overlays overlays/
      labelpenet predict runs/voc photos/ --out predictions.json --module 2
      labelpenet predict runs/voc --data VOCdevkit/VOC2012 --split val --out predictions.json
      labelpenet predict runs/voc photos/ --shard 3/100 --out parts/
      labelpenet predict runs/voc --data more-photos/ --tagged --out labels.json
    """

    run: RunFolder
    images: Positional[Annotated[tuple[Path, ...], _optional("[PHOTOS ...]")]] = ()
    """Photographs, or folders of photographs."""
    out: Path = Path("predictions.json")
    """Predictions file to write."""
    module: Literal[1, 2, 3, 4] = 4
    """Which module predicts."""
    overlays: OptionalPath = None
    """Folder for pictures with the instances drawn in that have a score of 0.3 or more, or of --min-score."""
    min_score: float = 0.0
    """Instances below are left out of file and pictures."""
    shard: Annotated[str | None, _optional("I/N")] = None
    """Only the I-th of N parts, into the folder --out; see labelpenet merge."""
    overwrite: Overwrite = False
    data: OptionalPath = None
    """Instead of PHOTOS: a data set; its photographs lie in the folder PHOTOS, where that is given."""
    split: Split = None
    tagged: bool = False
    """The tags of --data are known: only their classes, found as in training photographs."""
    device: Device = "auto"
    devices: int = 1
    """Processes on this machine (one per GPU), which share the photographs."""
    nodes: int = 1
    """Machines."""
    cache: Cache = None


@dataclass
class Merge:
    """Put the parts of predict --shard together, as a stream.

    Try:
      labelpenet merge parts/ --out predictions.json
      labelpenet merge parts/ --out predictions.parquet
    """

    parts: Positional[Annotated[tuple[Path, ...], arg(metavar="PARTS ...", help_behavior_hint="(required)")]]
    """Parts, or folders of parts."""
    out: Path = Path("predictions.json")
    """File to write: .json (COCO, as predict writes it) or .parquet (a row for each instance, and one of a photograph
    alone where nothing was found in it)."""
    overwrite: Overwrite = False


@dataclass
class Evaluate:
    """Measure predictions against annotation, as VOC or COCO define it.

    Try:
      labelpenet evaluate predictions.json VOCdevkit/VOC2012 --split val --protocol voc12
      labelpenet evaluate predictions.json VOCdevkit/VOC2007 --split test --protocol voc07 --json out.json --table text
    """

    predictions: Positional[Annotated[Path, arg(metavar="PREDICTIONS")]]
    """predictions.json or .parquet, the folder of parts of predict --shard, or another tool's COCO results list."""
    data: Data
    """The annotated data set."""
    split: Split = None
    images: ImageFolder = None
    protocol: Protocol = "voc12"
    classes: Classes = None
    json: OptionalPath = None
    """File for the result."""
    overwrite: Overwrite = False
    table: Annotated[Literal["text", "markdown", "latex"] | None, _optional("{text,markdown,latex}")] = None
    """Print ours beside the paper's tables in this form."""


@dataclass
class Proposals:
    """Compute (and cache) the proposals of a data set; with --recall measure them.

    Try:
      labelpenet proposals photos/
      labelpenet proposals VOCdevkit/VOC2012 --split val --recall --method selective-search-quality
    """

    data: Data
    """Photographs."""
    split: Split = None
    images: ImageFolder = None
    classes: Classes = None
    method: config.Method = "selective-search-fast"
    """How."""
    side: int | None = 250
    """Longer side of the image that they are computed on; None for the image as it is."""
    model: OptionalPath = None
    """OpenCV's structured-edge model, for edge-boxes."""
    workers: Annotated[int | None, _optional("INT")] = None
    """Processes. Default: one per core."""
    cache: Cache = None
    recall: bool = False
    """Measure recall and average best overlap against the annotation."""


@dataclass
class Export:
    """Write predictions or a run's labels for other tools, or a student as ONNX.

    Try:
      labelpenet export runs/student --to onnx --out student.onnx
      labelpenet export predictions.json photos/ --to coco --out labels/
      labelpenet export runs/mine/instances/module4.json photos/ --to labelme --top 100 --tolerance 2 --copy-images
      labelpenet export runs/voc/instances/module4.json VOCdevkit/VOC2012 --split train --to yolo --out labels/
    """

    predictions: Positional[Annotated[Path, arg(metavar="PREDICTIONS")]]
    """predictions.json or .parquet, or the folder of parts of predict --shard; for onnx a student's folder."""
    data: Positional[Annotated[Path | None, _optional("[DATA]")]] = None
    """The data set, or the folder of photographs, that the predictions belong to; none for onnx."""
    out: Path = Path("labels")
    """Folder to write; for onnx the file."""
    to: Literal[config.Format, "onnx"] = "coco"
    """Format; coco-polygons is also for CVAT, labelme for X-AnyLabeling, onnx for programs without torch."""
    size: Annotated[str | None, _optional("HxW")] = None
    """onnx: HxW in pixels of the photographs that the file takes, multiples of 32. Default: the student's, 4:3."""
    split: Split = None
    classes: Classes = None
    min_score: float = 0.0
    """Instances below are left out."""
    copy_images: bool = False
    """Copy the photographs beside the labels, upright (not for coco-results and label-studio)."""
    images: ImageFolder = None
    top: Annotated[int | None, _optional("N")] = None
    """Only the N most doubtful photographs, first those that a person should check first; for RUN/instances/*.json."""
    tolerance: float = 0.0
    """Pixels by which polygons may differ from the masks, for corners that a person can drag (2 is a good start)."""
    overwrite: bool = False
    """Replace an earlier export that nobody has changed; an ONNX file in any case."""


@dataclass
class Measure:
    """Measure every module of a run: predictions on a held-out split, CorLoc of the training images.

    Writes RUN/results.json and RUN/predictions/SPLIT-moduleK.json, prints a table. What results.json holds of modules
    that are not measured now is kept where it is still true; else a note says what is dropped.

    Try:
      labelpenet measure runs/voc VOCdevkit/VOC2012 --split val
    """

    run: RunFolder
    data: Data
    """The annotated data set."""
    split: str = "val"
    """Held-out split."""
    train_split: str = "train"
    """The split that the run was trained on."""
    images: ImageFolder = None
    modules: tuple[int, ...] = (1, 2, 3, 4)
    """Which modules."""
    protocol: Protocol = "voc12"
    device: Device = "auto"
    cache: Cache = None


@dataclass
class Review:
    """Look at a run's labels in the browser, the doubtful first; accept, correct or drop them.

    Serves a page on this machine's loopback address until Ctrl-C. Every verdict is saved at once.

    Try:
      labelpenet review runs/mine photos/
      labelpenet train photos/ --out runs/better --supervision mixed --corrected runs/mine/review.json
    """

    run: RunFolder
    data: Data
    """The photographs that it was trained on."""
    out: OptionalPath = None
    """File of the verdicts; an earlier one is continued. Default: RUN/review.json."""
    split: TrainingSplit = None
    images: ImageFolder = None
    port: int = 8765
    """Of 127.0.0.1; 0 for any free one."""


@dataclass
class Report:
    """Write RUN/report.html: one self-contained page with table, loss curves and picture strips.

    Try:
      labelpenet report runs/voc --data VOCdevkit/VOC2012
      labelpenet report runs/voc --data VOCdevkit/VOC2012 --predictions parts/
    """

    run: RunFolder
    data: OptionalPath = None
    """The data set. Default: the one that the run was trained on."""
    split: str = "val"
    """Held-out split."""
    out: OptionalPath = None
    """The page. Default: RUN/report.html, which is replaced."""
    overwrite: Overwrite = False
    images: int = 6
    """Strips of each kind."""
    predictions: OptionalPath = None
    """What the last module found in --split: predictions.json or .parquet, or the folder of parts of predict --shard.
    Default: those that labelpenet measure left in the run."""


@dataclass
class Demo:
    """Train all modules on generated scenes, print the table, write a report. Five minutes on two cores.

    Try:
      labelpenet demo --out demo
    """

    out: Path = Path("demo")
    """Folder to write."""
    seed: int = 0
    """Of scenes and training."""


def overview() -> str:
    """``labelpenet --help``: a line a command."""
    lines = [f"  {name:<18}{(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    head = "usage: labelpenet COMMAND ...\n\nInstance segmentation from image tags alone.\n\n"
    end = "\n\nlabelpenet COMMAND --help has options and examples; --version prints the version."
    return head + "\n".join(lines) + end


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``labelpenet``."""
    try:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed before we began; what is for one must not go to the other
                setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        # A name that the terminal's encoding does not have must not end a command that has done its work.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with _library_speaks():
            _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # here, where a pipe that was closed still ends quietly
    except InputError as error:
        _end(2, str(error))
    except KeyboardInterrupt as interrupt:
        _end(130, str(interrupt) or "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it shuts down
        sys.exit(1)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
        _end(2, f"{error.filename or 'standard output or a file'}: {error.strerror or error}; {remedy}")


@contextlib.contextmanager
def _library_speaks() -> Iterator[None]:
    """What the library logs, progress included, goes to standard error, a line each."""
    logger, handler = logging.getLogger("labelpenet"), logging.StreamHandler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _run(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        print(f"labelpenet {__version__}")
        return
    if arguments in ([], ["-h"], ["--help"]):
        print(overview())
        return
    command = _at_home(_parsed(arguments))
    _check_repeats(command, arguments)
    for part in (command, getattr(command, "training", None)):
        if part is not None:
            check_ranges(part, _spelt)
    RUN[type(command)](command)


def _check_repeats(command: Any, arguments: Sequence[str]) -> None:
    """`InputError` where an option of several values is given twice, of which tyro keeps what stands behind the last
    one alone, or ``--set`` sets a choice twice."""
    given = [one.partition("=")[0].replace("_", "-") for one in arguments]
    for name, value in vars(command).items():
        if isinstance(value, tuple) and given.count(_spelt(name)) > 1:
            raise InputError(f"{_spelt(name)} is given twice; give it once, with all values behind it")
    choices = [one.partition("=")[0] for one in getattr(command, "set", ())]
    if twice := [one for one in choices if choices.count(one) > 1]:
        raise InputError(f"--set sets {twice[0]} twice; leave one of them out")


def _at_home(value: Any) -> Any:
    """The options with ``~`` of paths read as the home folder: of ``--out=~/runs`` a shell leaves that to the program,
    and a folder called ~ would be a trap for who wants to remove it."""
    if isinstance(value, Path):
        with contextlib.suppress(RuntimeError):  # there is no such home
            return value.expanduser()
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _at_home(one) for name, one in vars(value).items()})
    return value


def _spelt(field: str) -> str:
    """An option as it is given."""
    return f"--{field.replace('_', '-')}"


def _parsed(arguments: list[str]) -> Any:
    """The command that is asked for, with its options.

    Raises:
        InputError: what tyro says of the arguments, in one line instead of its box; SystemExit: the help was printed.
    """
    if any("\0" in one for one in arguments):
        raise InputError("an argument holds a NUL, which no path and no name can; leave it out")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Command,
                prog="labelpenet",
                description="Instance segmentation from image tags alone.",
                args=arguments,
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    rows = [row.strip("│| ") for row in said.getvalue().splitlines()[1:-1]]
    rows = rows[not rows[0].strip("─-") :]  # without the rule under the title, where the encoding has no box
    end = next((number for number, row in enumerate(rows) if not row.strip("─-")), len(rows))
    meant = re.search(r"Perhaps you meant:\s+(--[\w-]+)", " ".join(rows[end:]))
    line = " ".join(rows[:end]).rstrip(". ")
    line = line if len(line) < 400 else f"{line[:400]}..."
    help_of = f" {arguments[0]}" if arguments[0] in COMMANDS else ""
    raise InputError(f"{line}{f' (perhaps {meant[1]})' if meant else ''}; see labelpenet{help_of} --help")


def _end(status: int, line: str) -> NoReturn:
    """Ends the command with a line on standard error, if there still is one."""
    with contextlib.suppress(OSError, ValueError):
        print(f"labelpenet: {one_line(line)}", file=sys.stderr, flush=True)
    sys.exit(status)


def _is_first() -> bool:
    """Whether this is the only process of a command on this machine, or the first of several: it speaks for all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _say(*notes: str) -> None:
    for note in notes if _is_first() else ():
        with contextlib.suppress(OSError):  # standard error is full or gone, which must not cost the work
            print(f"note: {one_line(note)}", file=sys.stderr)


def _say_trained(out: Path) -> None:
    if _is_first():
        print(f"trained: {out} - next: labelpenet predict {shlex.quote(str(out))} PHOTOS --out predictions.json")


def _open_training(
    args: Train | ForwardBackward | Distill | Review, classes: Sequence[str] | None
) -> tuple[TaggedImages, dict[str, Any]]:
    """The photographs of a training, and where they and given labels come from; says what there is to say of them."""
    from labelpenet.data.files import listing
    from labelpenet.formats import open_tagged, training_split

    split = args.split or training_split(args.data)
    images = open_tagged(args.data, split, classes, args.images)
    counts = Counter(tag for image in images.images for tag in image.tags)
    held = listing(f"{name} in {counts[label]}" for label, name in enumerate(images.classes))
    _say(*images.notes, f"{len(images.images)} photographs of {args.data}: {held}")
    labels = " ".join(map(str, getattr(args, "labels", ())))
    more = {"images": str(args.images) if args.images else "", "labels": labels}
    return images, {"data": str(args.data), "split": split} | {name: one for name, one in more.items() if one}


def _check_out(args: Train | ForwardBackward | Distill) -> None:
    """Looks at the folder before anything else: data, weights and processes may take minutes."""
    from labelpenet.data import run_folder

    run_folder.check_out(args.out, args.training.resume)
    asked = getattr(args, "backbone", None)
    if asked and run_folder.facts(args.out).is_file():  # before the weights of another network are asked for
        run_folder.check_same(args.out, {"backbone": asked})


def _changed(recipe: R, args: Train | Distill) -> R:
    """The recipe shortened, and then with single choices changed: what is set is as it is set."""
    return config.override(config.shorten(recipe, args.shorten), args.set)


def _open_held_out(args: Train | ForwardBackward, images: TaggedImages) -> AnnotatedImages | None:
    from labelpenet.formats import open_annotated

    return open_annotated(args.data, args.evaluate, images.classes, args.images) if args.evaluate else None


def train(args: Train) -> None:
    """Trains the cascade, or with full supervision module 4 alone."""
    _check_out(args)
    recipe = _changed(config.recipe(args.recipe), args)
    images, source = _open_training(args, _names(args.classes))
    held_out = _open_held_out(args, images)
    from labelpenet.training.run import train_run  # loads torch, for which a mistake above need not wait
    from labelpenet.training.supervised import open_supervision

    where = args.data, source["split"], images
    supervision = open_supervision(args.supervision, *where, args.supervised, args.corrected, args.images)
    _say(*(supervision.notes if supervision is not None else ()))
    train_run(
        images,
        args.out,
        recipe,
        backbone=args.backbone,
        weights=args.weights,
        until=args.until,
        source=source,
        supervision=supervision,
        held_out=held_out,
        options=args.training,
    )
    _say_trained(args.out)


def forward_backward(args: ForwardBackward) -> None:
    """The second stage (section 3.3), from a trained cascade into a run folder of its own."""
    from labelpenet.models.cascade import read_cascade
    from labelpenet.training import curriculum
    from labelpenet.training.labels import read_labels

    _check_out(args)
    if args.labels and any(choice.startswith("forward_backward.labels=") for choice in args.set):
        raise InputError("--labels says what is learnt; leave forward_backward.labels out of --set")
    facts = read_cascade(args.run)
    recipe = config.from_dict(facts["recipe"])
    # the modules' own schedules stay those that they were trained by
    shorter = replace(recipe, forward_backward=config.shorten(recipe, args.shorten).forward_backward)
    recipe = config.override(shorter, args.set)
    learnt = "given" if args.labels else recipe.forward_backward.labels
    unused = {"given": ("drift", "enter", "doubt"), "inferred": ("zoom", "colours", "enter", "doubt")}.get(learnt, ())
    for choice in args.set:
        name = choice.partition("=")[0]
        idle = re.match(r"warm_up\.|modules\..*\.schedule\.", name) or name in map("forward_backward.{}".format, unused)
        if idle:
            raise InputError(f"--set {name} does nothing in this forward-backward learning; leave it out")
    images, source = _open_training(args, facts["classes"])
    held_out = _open_held_out(args, images)
    labels, notes = read_labels(args.run, args.labels, images) if args.labels else (None, ())
    _say(*notes)
    curriculum.forward_backward(
        images, args.run, args.out, recipe, labels=labels, source=source, held_out=held_out, options=args.training
    )
    _say_trained(args.out)


def distill(args: Distill) -> None:
    """Trains a student on a run's labels, on those of files, or on true objects."""
    from labelpenet.formats import open_annotated
    from labelpenet.models.cascade import read_run
    from labelpenet.training import distill as training
    from labelpenet.training.labels import read_labels
    from labelpenet.training.supervised import read_supervision

    _check_out(args)
    facts = read_run(args.run)
    recipe = _changed(config.student_recipe(args.supervision == "full"), args)
    images, source = _open_training(args, facts["classes"])
    if args.supervision == "full":
        if args.labels:
            raise InputError("--labels and --supervision full exclude each other: the labels are DATA's own")
        truth = read_supervision("full", open_annotated(args.data, source["split"], images.classes, args.images))
        labels, notes = truth.truths, truth.notes
    else:
        labels, notes = read_labels(args.run, args.labels, images)
    _say(*notes)
    training.distill(
        images,
        labels,
        args.out,
        recipe,
        backbone=args.backbone or facts["backbone"],
        weights=args.weights,
        source={**source, "teacher": str(args.run), "teacher_supervision": facts.get("supervision", "tags")},
        supervision=args.supervision,
        options=args.training,
    )
    _say_trained(args.out)


def predict(args: Predict) -> None:
    """Predicts photographs or the photographs of a data set, whole or one shard of them; draws overlays."""
    from labelpenet.data import TaggedImage, read_image
    from labelpenet.data.files import check_outputs, real_path
    from labelpenet.data.images import find_images, linked, unread
    from labelpenet.formats import open_tagged
    from labelpenet.formats.parts import parse_shard
    from labelpenet.instances import MIN_SCORE, Instances
    from labelpenet.models.cascade import read_run
    from labelpenet.training.predict import Predictor, predict_images
    from labelpenet.training.shards import predict_shard
    from labelpenet.visualize import overlay_paths, write_overlay

    if args.shard and (args.devices, args.nodes) != (1, 1):
        raise InputError("--shard is for one process each; leave --devices and --nodes out")
    if args.shard and args.out.suffix == ".json":
        raise InputError(f"--shard writes a folder of parts, but --out is {args.out}; give a folder: --out parts/")
    if not args.shard and args.out.suffix.lower() not in ("", ".json"):
        raise InputError(f"{args.out}: predict writes .json; for Parquet use --shard and then labelpenet merge")
    if not args.images and not args.data:
        raise InputError("give photographs (or folders of them) or --data DATA")
    if args.split and not args.data:
        raise InputError("--split is of a data set; give that with --data, or leave --split out")
    if args.tagged and not args.data:
        raise InputError("--tagged reads tags from a data set; give that with --data, or leave --tagged out")
    if args.data and len(args.images) > 1:
        raise InputError("with --data, at most one folder is given: that of DATA's photographs")
    classes = read_run(args.run)["classes"]
    if args.data:
        # a data set need not show every class of the run, and may name more
        found = open_tagged(args.data, args.split, None, *args.images)
        tagged = found.with_classes(classes)
        _say(*(tagged if args.tagged else found).notes)
        images: Sequence[TaggedImage] = tagged.images
    else:
        images = [TaggedImage(name, path, ()) for name, path in find_images(args.images)]
        _say(*(note for path in args.images for note in (*unread(path), *linked(path))))
    reads = [args.run, *([args.data] if args.data else args.images), *(image.path for image in images)]
    check_outputs([] if args.shard else [args.out], reads, args.overwrite)
    pictures = overlay_paths(args.overlays, [image.id for image in images]) if args.overlays else {}
    check_outputs(pictures.values(), [*reads, args.out], args.overwrite)
    for folder in (path for path in reads if path.is_dir()):
        if args.overlays and real_path(args.overlays).is_relative_to(real_path(folder)):
            raise InputError(f"{args.overlays}: lies in {folder}, which is read; choose a folder outside for overlays")
    predictor = Predictor(args.run, args.device, args.devices, args.nodes, args.tagged)

    def keep(image: TaggedImage, instances: Instances) -> Instances:
        instances = instances[instances.weights >= args.min_score]
        if pictures:
            shown = instances[instances.weights >= (args.min_score or MIN_SCORE)]
            write_overlay(pictures[image.id], read_image(image.path), shown, classes)
        return instances

    if args.shard:
        choices = {"min_score": args.min_score}
        shard = parse_shard(args.shard)
        part, skipped = predict_shard(
            predictor, images, args.module, args.out, shard, keep=keep, choices=choices, cache=args.cache
        )
        if pictures and part.before:
            _say(f"{part.before} photographs were predicted before; overlays are drawn of the others alone")
        if len(part.skipped) > len(skipped):
            _say(f"{part.path}: to try photographs again that were skipped before, delete it")
        done = len(part.images) - len(part.skipped)
        print(f"{part.path}: {done} images" + (f", {len(part.skipped)} skipped" if part.skipped else ""))
        return
    try:
        skipped = predict_images(predictor, images, args.module, args.out, keep=keep, cache=args.cache)
    except KeyboardInterrupt as interrupt:
        line = f"interrupted; {args.out} is not written; with --shard 1/1 --out FOLDER an interrupted command goes on"
        raise KeyboardInterrupt(line) from interrupt
    if predictor.first:
        print(f"{args.out}: {len(images) - len(skipped)} images" + (f", {len(skipped)} skipped" if skipped else ""))


def merge(args: Merge) -> None:
    """Puts the parts of ``predict --shard`` together."""
    from labelpenet.data.files import check_outputs
    from labelpenet.formats.parts import merge_parts

    if not args.parts:
        raise InputError("give the folder of the parts: the --out of predict --shard")
    check_outputs([args.out], args.parts, args.overwrite)
    photographs, instances = merge_parts(args.parts, args.out)
    print(f"{args.out}: {photographs} images, {instances} instances")


def evaluate(args: Evaluate) -> None:
    """Prints what predictions measure against the true objects, by protocol; writes it as JSON."""
    from labelpenet.data.files import check_outputs, write_bytes
    from labelpenet.evaluation import evaluate as measure
    from labelpenet.evaluation import paper_tables, summary_table, uncounted
    from labelpenet.formats import open_annotated, read_predictions

    if args.table and args.protocol == "coco":
        raise InputError("the paper's tables are by VOC's protocols; leave --table out, or measure by voc07 or voc12")
    check_outputs([args.json] if args.json else [], [args.predictions, args.data], args.overwrite)
    annotated = open_annotated(args.data, args.split, _names(args.classes), args.images)
    annotated = annotated.by_number() if args.protocol == "coco" else annotated
    tagged = annotated.tagged
    predictions = read_predictions(args.predictions, tagged, tagged.classes, annotated.categories, annotated.others)
    notes: list[str] = []
    absent = 0

    def truths() -> Iterator[tuple[str, Truth]]:
        nonlocal absent
        for name, truth in annotated.each(notes):
            absent += name not in predictions
            yield name, truth

    result = measure(predictions, truths(), tagged.classes, args.protocol)
    if absent:
        notes.append(f"{absent} of {len(tagged.images)} images are not in {args.predictions}; their objects are missed")
    _say(*tagged.notes, *predictions.notes, *notes, *uncounted(result, tagged.classes))
    if not result:
        raise InputError(f"{args.data}: no object to measure by; check --split and --classes")
    if args.json:
        write_bytes(args.json, json.dumps(result, indent=1).encode())
    print(summary_table(result).render("text"))
    if args.table:
        for table in paper_tables(result, args.protocol):
            print("\n" + table.render(args.table))


def proposals(args: Proposals) -> None:
    """Computes and caches proposals; prints their recall."""
    from labelpenet.data.proposals import compute_proposals, default_cache
    from labelpenet.evaluation.recall import recall, recall_table
    from labelpenet.formats import open_annotated, open_tagged
    from labelpenet.formats.open import NotRecognised, open_photographs

    try:
        images = open_tagged(args.data, args.split, _names(args.classes), args.images)
    except NotRecognised:
        images = open_photographs(args.data, (), args.split, args.images)  # proposals need no tags
    annotated = open_annotated(args.data, args.split, _names(args.classes), args.images) if args.recall else None
    settings = config.Proposals(args.method, args.side)
    cache = args.cache or default_cache()
    boxes = compute_proposals(images.images, settings, cache, args.workers, progress=True, model=args.model)
    _say(*images.notes, *boxes.notes)
    if not boxes:
        raise InputError("no image has proposals; see the notes above")
    mean = sum(map(len, boxes.values())) / len(boxes)
    print(f"{len(boxes)} images, {mean:.0f} proposals each on average, cached in {cache}")
    if annotated is not None:
        truths, notes = annotated.readable_truths()
        _say(*notes)
        print(recall_table(recall(boxes, truths, annotated.tagged.classes)))


def export(args: Export) -> None:
    """Writes predictions or a run's labels for other tools, or a student as an ONNX file."""
    from labelpenet.data.dataset import AnnotatedImages, only_tagged
    from labelpenet.data.files import check_new_folder, check_outputs
    from labelpenet.formats import export as write
    from labelpenet.formats import read_predictions

    if args.to == "onnx":
        from labelpenet.models.onnx import export_onnx, parse_size
        from labelpenet.models.student import Student

        plain = Export(args.predictions, out=args.out, to="onnx", size=args.size, overwrite=args.overwrite)
        of_labels = [name for name, value in vars(args).items() if value != getattr(plain, name)]
        if of_labels:
            raise InputError(
                f"--to onnx writes a network, no labels; leave {'DATA' if args.data else _spelt(of_labels[0])} out"
            )
        check_outputs([args.out], [args.predictions], args.overwrite)
        height, width = export_onnx(Student.from_run(args.predictions), args.out, parse_size(args.size))
        print(f"{args.out}: takes photographs of {height} x {width} pixels (height x width)")
        return
    if args.size is not None:
        raise InputError("--size is for --to onnx; labels have the size of their photographs")
    if args.data is None:
        raise InputError(f"{args.predictions}: name the data set that the predictions belong to, too")
    check_new_folder(args.out, [args.data, args.predictions])
    found = _exported(args)
    images = only_tagged(found)
    # a bare results list without names says nothing of a data set without ids
    ids = found.categories if isinstance(found, AnnotatedImages) else ()
    _say(*images.notes)
    if args.top is not None:
        images = _doubtful(args, images)
    predictions = read_predictions(args.predictions, images, images.classes, ids)
    written = write(
        predictions,
        images,
        images.classes,
        args.out,
        args.to,
        category_ids=ids or None,
        split=Path(args.split or "train").stem,
        min_score=args.min_score,
        copy_images=args.copy_images,
        tolerance=args.tolerance,
        overwrite=args.overwrite,
    )
    _say(*predictions.notes, *written.notes)
    print(f"{args.out}: {len(written.paths)} files")


def _exported(args: Export) -> AnnotatedImages | TaggedImages:
    """The photographs of an export, with the classes asked for, else those of the predictions, where the data set knows
    them: a class that a split happens not to show is no reason to drop it, or to number the others anew. A folder whose
    sub-folders are no such classes holds photographs without tags."""
    from labelpenet.formats.folder import class_folders
    from labelpenet.formats.open import NotRecognised, open_data, open_photographs
    from labelpenet.formats.predictions import class_names

    assert args.data is not None
    asked = known = _names(args.classes)
    if asked is None:
        with contextlib.suppress(InputError):  # a bare list names none
            known = class_names(args.predictions)
    try:
        return open_data(args.data, args.split, known, args.images)
    except NotRecognised:
        pass
    except InputError:
        sorted_otherwise = args.split is None and args.data.is_dir() and class_folders(args.data)
        if asked is not None or known is None or not sorted_otherwise:
            return open_data(args.data, args.split, asked, args.images)
    return open_photographs(args.data, known or class_names(args.predictions), args.split, args.images)


def _doubtful(args: Export, images: TaggedImages) -> TaggedImages:
    """The photographs that a person should look at first, the most doubtful first."""
    from labelpenet.data import run_folder
    from labelpenet.formats import open_tagged
    from labelpenet.formats.predictions import class_names
    from labelpenet.review.doubt import rank_run

    run, name = args.predictions.parent.parent, args.predictions.stem
    if name not in ("module1", "module2", "module3", "module4") or run_folder.instances(run, name) != args.predictions:
        raise InputError(f"{args.predictions}: --top asks the modules of a run: give RUN/instances/module4.json")
    tagged = open_tagged(args.data or run, args.split, class_names(args.predictions), args.images)
    ranked, _ = rank_run(run, tagged, int(name[-1]))
    own = {image.id: image for image in images.images}
    return replace(images, images=tuple(own[image.id] for image, _ in ranked if image.id in own)[: args.top])


def measure(args: Measure) -> None:
    """Measures what the modules of a run, or a student, predict for annotated photographs."""
    from labelpenet.training.measure import measure_run

    if not args.modules:
        raise InputError("--modules names no module; give some of 1, 2, 3, 4")
    print(measure_run(**vars(args)))


def review(args: Review) -> None:
    """Serves the page on which a person accepts, corrects or drops a run's labels, until it is interrupted."""
    from labelpenet.data import run_folder
    from labelpenet.models.cascade import read_run
    from labelpenet.review import serve

    images, _ = _open_training(args, read_run(args.run)["classes"])
    serve(args.run, images, args.out or run_folder.review(args.run), args.port)


def report(args: Report) -> None:
    """Writes a run's report as one HTML file."""
    from labelpenet.data.dataset import only_tagged
    from labelpenet.data.files import check_outputs, real_path
    from labelpenet.formats.open import open_data
    from labelpenet.models.cascade import read_run
    from labelpenet.report import write_report

    facts = read_run(args.run)
    source = facts.get("source") or {}
    learnt = Path(source["data"]) if source.get("data") else None
    data = args.data or learnt
    own_data = data is not None and learnt is not None and real_path(data) == real_path(learnt)
    images = source.get("images") if own_data else None  # of other data, the photographs lie elsewhere
    if data is not None and data != args.data and not data.exists():
        _say(f"no pictures: {data}, which the run was trained on, is not there (seen from this folder); give --data")
        data = None
    if args.out and real_path(args.out) != real_path(args.run / "report.html"):
        reads = [args.run, *(path for path in (data, args.predictions) if path)]
        check_outputs([args.out], reads, args.overwrite)

    training = held_out = None
    try:
        training = None if data is None else open_data(data, source.get("split"), facts["classes"], images)
    except InputError as error:
        _say(f"no pictures of the training photographs ({error})")
    if data is not None and training is not None and args.split != source.get("split"):
        own = {image.path for image in only_tagged(training).images}
        try:
            held_out = open_data(data, args.split, facts["classes"], images).where(lambda image: image.path not in own)
            if not only_tagged(held_out).images:
                raise InputError(f"{data}: has no photographs but those that the run was trained on")
        except InputError as error:
            _say(f"no held-out strips ({error})")
            held_out = None
    print(write_report(args.run, args.out, training, held_out, images=args.images, predictions=args.predictions))


def demo(args: Demo) -> None:
    """Makes generated scenes and trains a small cascade on them."""
    # before torch is loaded: between the tiny layers, threads would spin longer than they compute
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from labelpenet.demo import run_demo

    print(run_demo(args.out, args.seed))


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("--classes names no class; give them separated by commas, such as --classes cat,dog")
    if len(set(names)) < len(names):
        raise InputError(f"--classes names {next(one for one in names if names.count(one) > 1)} twice; name each once")
    return names


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "train": (Train, train),
    "forward-backward": (ForwardBackward, forward_backward),
    "distill": (Distill, distill),
    "predict": (Predict, predict),
    "merge": (Merge, merge),
    "evaluate": (Evaluate, evaluate),
    "proposals": (Proposals, proposals),
    "export": (Export, export),
    "measure": (Measure, measure),
    "review": (Review, review),
    "report": (Report, report),
    "demo": (Demo, demo),
}
RUN = dict(COMMANDS.values())
Command: Any = reduce(or_, (Annotated[kind, subcommand(name)] for name, (kind, _) in COMMANDS.items()))
