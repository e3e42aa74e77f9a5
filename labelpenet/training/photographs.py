"""What a network finds in many photographs: one a core on a CPU, several at a time on a GPU."""

from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch

from labelpenet.data.dataset import TaggedImage
from labelpenet.data.images import read_image
from labelpenet.engine.distributed import map_images
from labelpenet.errors import InputError
from labelpenet.instances import Instances

Answer = tuple[TaggedImage, Instances | None, str]
"""A photograph with what was found in it, or with None and a note why nothing could be."""

Infer = Callable[[Sequence[TaggedImage], Sequence[np.ndarray]], Sequence[Instances]]
"""From photographs and their pixels, (H, W, 3) uint8 RGB each, to the instances of each."""

TOGETHER, WINDOW, READERS = 8, 32, 4
"""Photographs that go through a network on a GPU at a time; among so many that follow one another those are looked for
that fit together; threads that read the next ones meanwhile."""


def find_instances(
    infer: Infer, images: Sequence[TaggedImage], size: Callable[[np.ndarray], Hashable], device: torch.device
) -> Generator[Answer, None, None]:
    """What ``infer`` finds in each photograph, in order.

    On a GPU those go together that have the same size, as the network sees them: none is padded for another's sake, so
    the instances are those of a photograph by itself, but for rounding.

    What cannot be read, is refused by an `InputError` of ``infer`` or does not fit into memory has a note instead; any
    other error is raised.

    Args:
        infer: of photographs that go together; alone on a CPU.
        size: from pixels to what photographs share that may go together.
        device: of the network.
    """
    if device.type == "cpu":
        yield from find_one_by_one(lambda image: _alone(infer, image, read_image(image.path)), images, device)
        return
    windows = [images[start : start + WINDOW] for start in range(0, len(images), WINDOW)]
    with ThreadPoolExecutor(READERS) as readers:
        coming = [readers.map(_read, window) for window in windows[:1]]
        for number, window in enumerate(windows):
            read = list(coming.pop())
            coming += [readers.map(_read, after) for after in windows[number + 1 : number + 2]]
            groups: dict[Hashable, list[int]] = {}
            for index, pixels in enumerate(read):
                # what cannot be read goes alone, too, and says why
                alike = index if isinstance(pixels, InputError) else (size(pixels),)
                groups.setdefault(alike, []).append(index)
            found: dict[int, Answer] = {}
            for group in groups.values():
                for start in range(0, len(group), TOGETHER):
                    some = group[start : start + TOGETHER]
                    own = _several(infer, [window[index] for index in some], [read[index] for index in some])
                    found.update(zip(some, own, strict=True))
            yield from (found[index] for index in range(len(window)))


def find_one_by_one(
    infer: Callable[[TaggedImage], Instances], images: Sequence[TaggedImage], device: torch.device
) -> Generator[Answer, None, None]:
    """As `find_instances`, one photograph after the other (`map_images`), of an ``infer`` that reads it."""

    def attempt(image: TaggedImage) -> Answer:
        try:
            return image, infer(image), ""
        except InputError as error:
            return image, None, f"skipped: {error}"

    yield from map_images(attempt, images, device)


def _read(image: TaggedImage) -> np.ndarray | InputError:
    try:
        return read_image(image.path)
    except InputError as error:
        return error


def _several(
    infer: Infer, images: Sequence[TaggedImage], read: Sequence[np.ndarray | InputError]
) -> Generator[Answer, None, None]:
    """What is found in photographs that go together; one by one where they do not fit into memory at once, or one of
    them is refused."""
    found: Sequence[Instances | None] = [None] * len(images)
    pixels = [one for one in read if isinstance(one, np.ndarray)]
    if len(pixels) > 1:
        try:
            found = infer(images, pixels)
        except (InputError, MemoryError, RuntimeError, cv2.error) as error:
            if not isinstance(error, InputError) and not _is_of_memory(error):
                raise
    for image, one, own in zip(images, read, found, strict=True):
        try:
            if isinstance(one, InputError):
                raise one
            yield image, _alone(infer, image, one) if own is None else own, ""
        except InputError as error:
            yield image, None, f"skipped: {error}"


def _alone(infer: Infer, image: TaggedImage, pixels: np.ndarray) -> Instances:
    try:
        return infer([image], [pixels])[0]
    except (MemoryError, RuntimeError, cv2.error) as error:
        if not _is_of_memory(error):
            raise
        raise InputError(f"{image.path}: does not fit into memory; make it smaller") from error


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error)
