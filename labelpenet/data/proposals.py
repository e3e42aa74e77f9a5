"""Class-agnostic boxes that may hold an object: computed from photographs and cached.

The paper takes about 1,600 selective-search proposals per image (section 4.1). `propose` computes them for one image,
`compute_proposals` for a data set, in parallel and cached on disk; boxes of other tools are read by
`labelpenet.data.precomputed`. What the settings are worth is measured in docs/proposals.md.

Shape letters: ``R`` proposals, ``H, W`` height and width of the image in pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import cv2
import numpy as np

from labelpenet.config import Proposals as Settings
from labelpenet.data.dataset import ByImage
from labelpenet.data.files import brief, hash_file, hash_files, read_array, write_array, write_text
from labelpenet.data.images import read_image
from labelpenet.errors import InputError, reason, told
from labelpenet.progress import Progress, silent

if TYPE_CHECKING:
    from labelpenet.data.dataset import TaggedImage

_VERSION = 1  # of what `propose` and `read_image` compute; a change makes every cached file stale

LARGEST_SIDE = 640
"""Longer side in pixels of the working image where the settings name none: selective search of a camera's photograph of
24 million pixels would take minutes."""

SCALE = 100
"""Selective search: the scale ``k`` of its finest first segmentation, and the step to the coarser ones; a smaller one
gives more and smaller regions (OpenCV's default is 150)."""

MOST = 2000  # boxes kept of an image, the first by rank
MIN_SIZE = 0.02  # shortest side of a box, as a fraction of the image's longer side
LEAST_WORK = 16  # images a process, for which it is worth the seconds that it takes to start


def propose(image: np.ndarray, settings: Settings, model: Path | None = None) -> np.ndarray:
    """The proposals of one image, best rank first; the same for the same pixels and settings in any process.

    Args:
        image: (H, W, 3) uint8 RGB.
        settings: by which method, and on which side: the photograph is scaled to it (down, or up to twice).
        model: OpenCV's structured-edge model file (``model.yml.gz``) for edge boxes; None takes image gradients.

    Returns:
        (R, 4) float32 ``x1, y1, x2, y2``, half-open, in pixels, inside the image, no two alike, 1 <= R <= `MOST`: the
        whole image where nothing is found.

    Raises:
        InputError: an unknown method; the structured-edge model cannot be read, or goes with another method.
    """
    _check_method(settings, model)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image must be (H, W, 3) uint8, but got {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    working = _working_image(image, settings.side)
    if settings.method == "edge-boxes":
        corners = _edge_boxes(working, model)
    else:
        corners = _rank(_selective_search(working, settings.method))
    scale = np.array([width / working.shape[1], height / working.shape[0]] * 2)
    return within(corners * scale, (height, width), MIN_SIZE * max(height, width))[:MOST]


def _working_image(image: np.ndarray, side: int | None) -> np.ndarray:
    """The image with the longer side scaled to ``side``, as OpenCV's BGR."""
    height, width = image.shape[:2]
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    # Scaling a thumbnail up further than twice finds nothing new and costs time.
    scale = min(LARGEST_SIDE / max(height, width), 1.0) if side is None else min(side / max(height, width), 2.0)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == (width, height):
        return bgr
    return cv2.resize(bgr, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def _selective_search(image: np.ndarray, method: str) -> np.ndarray:
    """(R, 4) int corners of the regions that selective search merges, in no particular order."""
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(image)
    if method == "selective-search-quality":
        search.switchToSelectiveSearchQuality(SCALE, SCALE)
    else:
        search.switchToSelectiveSearchFast(SCALE, SCALE)
    return _corners(search.process())


def _rank(corners: np.ndarray) -> np.ndarray:
    """Orders boxes so that the first few cover much: roughly from large to small, near-repetitions at the end.

    Selective search ranks a region by its level in the grouping hierarchy (the whole image first) times a random
    number. OpenCV draws that from the C library's `rand`, so its order depends on what the process did before, and on
    the platform. The set of boxes does not: it is ranked anew here, by the position in descending order of area times a
    number from a generator with a fixed seed; boxes that overlap a better one by more than 0.8 then move to the end.
    """
    area = (corners[:, 2:] - corners[:, :2]).prod(1)
    corners = corners[np.lexsort((*corners.T, -area))]
    corners = corners[np.argsort(np.arange(len(corners)) * np.random.default_rng(0).random(len(corners)))]
    rectangles = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    scores = np.linspace(1.0, 0.5, len(corners))
    new = np.asarray(cv2.dnn.NMSBoxes(rectangles.tolist(), scores.tolist(), 0.0, 0.8), np.int64).reshape(-1)
    repeated = np.ones(len(corners), bool)
    repeated[new] = False
    return np.concatenate([corners[~repeated], corners[repeated]])


def _edge_boxes(image: np.ndarray, model: Path | None) -> np.ndarray:
    """(R, 4) int corners of edge boxes, by descending score."""
    if min(image.shape[:2]) < 16:  # no room for edges inside a box; OpenCV's integral images are not made for it
        return np.zeros((0, 4), np.int64)
    edges, orientation = _structured_edges(image, model) if model else _gradient_edges(image)
    smallest = max(MIN_SIZE * max(image.shape[:2]), 10.0)  # below, there are many boxes and no objects
    search = cv2.ximgproc.createEdgeBoxes(maxBoxes=MOST, minBoxArea=smallest**2)
    boxes, values = search.getBoundingBoxes(edges, orientation)
    corners = _corners(boxes)
    scores = np.asarray(values, np.float64).reshape(-1)[: len(corners)]
    corners[:, :2] -= 1  # OpenCV's boxes start one pixel late: its origin is 1, and its last pixel is inclusive
    return corners[np.lexsort((*corners.T, -scores))][: np.count_nonzero(scores > 0)]


def _structured_edges(image: np.ndarray, model: Path) -> tuple[np.ndarray, np.ndarray]:
    """Edge strength in [0, 1] and the direction of its normal in [0, pi), (H, W) float32 each, from OpenCV's forest."""
    with told(lambda error: f"{model}: not a structured-edge model of OpenCV ({reason(error)})", cv2.error):
        detector = cv2.ximgproc.createStructuredEdgeDetection(str(model))
    edges = detector.detectEdges(np.ascontiguousarray(image[:, :, ::-1]).astype(np.float32) / 255)
    orientation = detector.computeOrientation(edges)
    return detector.edgesNms(edges, orientation), orientation


def _gradient_edges(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `_structured_edges` returns, from the strongest colour channel's gradient, thinned to ridges."""
    smooth = cv2.GaussianBlur(image.astype(np.float32) / 255, (0, 0), 1.0)
    gx, gy = cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    strength = np.hypot(gx, gy)
    best = strength.argmax(2)[:, :, None]
    gx, gy, magnitude = (np.take_along_axis(values, best, 2)[:, :, 0] for values in (gx, gy, strength))
    # A few very strong edges must not push all others below edge boxes' threshold of 0.1.
    top = np.percentile(magnitude, 99)
    magnitude = np.clip(magnitude / top, 0, 1) if top > 0 else np.zeros_like(magnitude)
    orientation = (np.arctan2(gy, gx) % np.pi).astype(np.float32)
    return _thin(magnitude, orientation), orientation


def _thin(magnitude: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """Keeps a pixel's magnitude if neither neighbour across the edge (nearest of 4 directions) exceeds it."""
    height, width = magnitude.shape
    padded = np.pad(magnitude, 1)
    sector = np.round(orientation / (np.pi / 4)).astype(int) % 4
    ridge = np.zeros(magnitude.shape, bool)
    for direction, (dx, dy) in enumerate(((1, 0), (1, 1), (0, 1), (-1, 1))):
        ahead = padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        behind = padded[1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]
        ridge |= (sector == direction) & (magnitude >= ahead) & (magnitude >= behind)
    return np.where(ridge, magnitude, 0).astype(np.float32)


def _corners(rectangles: Any) -> np.ndarray:
    """OpenCV's (R, 4) ``x, y, width, height`` as (R, 4) int64 corners; (0, 4) for its empty tuple."""
    boxes = np.asarray(rectangles, np.int64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def within(boxes: np.ndarray, size: tuple[int, int], shortest: float = 0.0) -> np.ndarray:
    """(R, 4) float32 boxes cut to an image of ``size`` (H, W), no two alike, in order of first occurrence: those with
    an area whose sides are ``shortest`` at least, else the whole image.
    """
    height, width = size
    boxes = np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) >= max(shortest, np.finfo(np.float32).tiny)]
    boxes = boxes if len(boxes) else np.array([[0, 0, width, height]], np.float32)
    return boxes[np.sort(np.unique(boxes, axis=0, return_index=True)[1])]


class Proposals(ByImage[np.ndarray]):
    """The proposals of a data set by image id: ``proposals[id]`` is (R, 4) float32 ``x1, y1, x2, y2`` in pixels.

    Boxes that lie in cache files are read when asked for, so any number of images fits in memory.

    Attributes:
        notes: one line for each image that was skipped (the first twenty), with the reason, and their number.
    """

    def __init__(self, boxes: Mapping[str, np.ndarray | Path], notes: Sequence[str] = ()) -> None:
        self._known = dict(boxes)
        self.notes = tuple(notes)

    def __getitem__(self, image_id: str) -> np.ndarray:
        boxes = self._known[image_id]
        if isinstance(boxes, np.ndarray):
            return boxes
        stored = _load(boxes)
        if stored is None:
            raise InputError(
                f"{boxes}: the cached proposals of image {image_id} are damaged or gone; compute them again"
            )
        return stored


def compute_proposals(
    images: Sequence[TaggedImage],
    settings: Settings,
    cache: Path | None = None,
    workers: int | None = None,
    progress: bool = False,
    model: Path | None = None,
) -> Proposals:
    """The proposals of every image that can be read, in their order; those already in the cache are not computed again.

    A cache file holds the boxes of one image and is named after the image file's content; its folder, after the
    settings. So an interrupted run goes on where it was, and several runs may share a cache. An image that cannot be
    read has no proposals, and is named in the ``notes``.

    Args:
        images, settings, model: as `propose` takes them.
        cache: folder of the cache, made if it does not exist; None for the user's.
        workers: processes, 1 to compute in this process; None for one per usable core, but not for a few images, which
            are done before other processes have started.
        progress: say how far it is.

    Raises:
        InputError: as `propose`; the cache cannot be written, or a worker process died.
    """
    folder = _prepare(cache or default_cache(), settings, model)
    count = workers or _usable_cores()
    hashed = hash_files([image.path for image in images], count)
    targets = {path: folder / key[:2] / f"{key}.npy" for path, key in hashed.items() if not isinstance(key, Exception)}
    failures = {path: str(error) for path, error in hashed.items() if isinstance(error, Exception)}
    missing = {target: path for path, target in targets.items() if _load(target) is None}  # alike files: only once
    damaged = [f"{target} was damaged; the proposals were computed again" for target in missing if target.is_file()]
    processes = workers or min(count, len(missing) // LEAST_WORK)
    results = _run_all(list(missing.values()), partial(_compute, settings, model), processes)
    log = None if progress and missing else silent
    with contextlib.closing(results), Progress("proposals", len(missing), log=log) as shown:
        for path, result in shown.tracked(results):
            if isinstance(result, np.ndarray):
                write_array(targets[path], result, "free some space or name another cache, then run again")
            else:
                alike = [twin for twin, target in targets.items() if target == targets[path]]
                failures.update({twin: result.replace(str(path), str(twin)) for twin in alike})
    found = {image.id: targets[image.path] for image in images if image.path not in failures}
    skipped = [failures[image.path] for image in images if image.path in failures]
    notes = brief(damaged, "cached files were damaged") + brief(skipped, "images have no proposals")
    return Proposals(found, notes)


def default_cache() -> Path:
    """The user's cache folder for proposals: ``$XDG_CACHE_HOME/labelpenet/proposals``, else under ``~/.cache``.

    `InputError` where the user, as one of a container may, has no home.
    """
    said = "this user has no home folder to cache proposals in; give one with --cache FOLDER"
    with told(said, RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labelpenet" / "proposals"


def _check_method(settings: Settings, model: Path | None) -> None:
    if settings.method not in get_args(get_type_hints(Settings)["method"]):
        known = ", ".join(get_args(get_type_hints(Settings)["method"]))
        raise InputError(f"unknown proposal method {settings.method!r}; known are {known}")
    if model is not None and settings.method != "edge-boxes":
        raise InputError(f"the structured-edge model {model} is only for the method edge-boxes")


def _prepare(cache: Path, settings: Settings, model: Path | None) -> Path:
    """The cache's folder for these settings, with the settings as JSON."""
    _check_method(settings, model)
    if model is not None and not model.is_file():
        raise InputError(f"{model}: no such structured-edge model; give OpenCV's model.yml.gz, or none")
    key: dict[str, Any] = {"method": settings.method, "side": settings.side, "model": model and hash_file(model)}
    key |= {"scale": SCALE, "limit": MOST, "min_size": MIN_SIZE, "version": _VERSION, "opencv": cv2.__version__}
    text = json.dumps(key, indent=1, sort_keys=True)
    folder = cache / f"{settings.method}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    described = folder / "settings.json"
    if not described.is_file() or described.read_text(encoding="utf-8", errors="replace") != text:
        write_text(described, text, "name another folder for the proposal cache")
    return folder


def _load(path: Path) -> np.ndarray | None:
    """The boxes of a cache file, or None if it is missing or damaged."""
    boxes = read_array(path)
    whole = boxes is not None and boxes.dtype == np.float32 and boxes.ndim == 2 and boxes.shape[1] == 4
    return boxes if whole else None


def _compute(settings: Settings, model: Path | None, path: Path) -> np.ndarray | str:
    """The proposals of an image file, or one line that says why there are none."""
    try:
        return propose(read_image(path), settings, model)
    except InputError as error:
        return str(error)
    except (cv2.error, MemoryError) as error:
        return f"{path}: no proposals could be computed ({reason(error)}); replace or remove it"


def _run_all(
    paths: Sequence[Path], compute: Callable[[Path], np.ndarray | str], workers: int
) -> Generator[tuple[Path, np.ndarray | str]]:
    """Path and result of each, in the order in which they are ready."""
    if min(workers, len(paths)) <= 1:
        for path in paths:
            yield path, compute(path)
        return
    pool = ProcessPoolExecutor(min(workers, len(paths)), get_context("spawn"), _start_worker)
    queue = iter(paths)
    running: dict[Future[np.ndarray | str], Path] = {}
    try:
        while True:
            # Two tasks per process keep it busy; no more are handed out, so that little is lost on an interruption.
            for path in itertools.islice(queue, 2 * workers - len(running)):
                with _starting():  # the first submissions start the processes
                    running[pool.submit(compute, path)] = path
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running[future], future.result()
                del running[future]
        pool.shutdown()
    except BrokenProcessPool as error:
        raise InputError(
            f"a process that computes proposals died near {next(iter(running.values()))} (out of memory, or a script "
            "without an 'if __name__ == \"__main__\"' guard?); run again with one worker; finished images are kept"
        ) from error
    except BaseException:  # an interruption, or the caller's error: nothing to wait for
        _terminate(pool)
        raise


@contextlib.contextmanager
def _starting() -> Generator[None]:
    """Keeps Ctrl-C back until the block ends, and from their first instruction on from the processes that it starts.

    The terminal sends it to all processes; the main one terminates the others, and has to know them for that.
    """
    held: list[int] = []
    # no other thread may set a handler, and one that is not Python's could not be put back
    main = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler)
            if held:  # another thread, whose mask is its own, has taken it
                signal.raise_signal(signal.SIGINT)


def _start_worker() -> None:
    """Sets up a worker process: one thread, deaf to Ctrl-C, on which the main process terminates it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: SIGTERM or SIGKILL leave that no time to do so."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _terminate(pool: ProcessPoolExecutor) -> None:
    """Ends the pool's processes without waiting for their tasks (as `terminate_workers` of Python 3.14 does)."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
