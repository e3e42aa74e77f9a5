"""From objects as files describe them to `Truth`: one place for what is cut, left out and said."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labelpenet.data.dataset import Truth
from labelpenet.data.files import excerpt, listing
from labelpenet.data.images import image_size
from labelpenet.errors import InputError
from labelpenet.instances import Instances, decode_mask, masks_to_boxes

PROBE = 50  # images by which an image folder is judged


@dataclass(frozen=True)
class Shape:
    """One object as a file describes it; nothing of it is checked.

    Attributes:
        name: the class.
        where: how messages call it, such as ``annotation 5``.
        box: ``x1, y1, x2, y2`` in pixels, half-open; None for the tight box of the mask.
        mask: COCO polygons or RLE, or (H, W) bool; None where there is none.
        difficult, crowd: as in `Truth`.
    """

    name: str
    where: str
    box: Any = None
    mask: Any = None
    difficult: bool = False
    crowd: bool = False


def read_truth(
    shapes: Iterable[Shape],
    size: tuple[int, int],
    classes: Sequence[str],
    source: object,
    semantic: np.ndarray | None = None,
    notes: Sequence[str] = (),
    masked: bool = True,
) -> Truth:
    """The truth of one image of ``size`` (H, W).

    A box that overhangs is cut at the border. An object without area, or without a box that can be read, is left out. A
    mask that cannot be read costs the image its masks, not its boxes. All that is said in the truth's notes, with
    ``source``; what overhangs by no more than a pixel is not worth a word. Masks are kept where every object has one:
    an image that shows none of the classes has all masks, none, and what is found in it is wrong.

    Args:
        classes: those that are asked for, in label order; other objects are skipped.
        semantic, notes: taken over; masked: whether objects of the image would have masks.
    """
    label = {name: index for index, name in enumerate(classes)}
    said = list(notes)
    kept: list[Shape] = []
    boxes: list[np.ndarray] = []
    masks: list[torch.Tensor] = []
    damaged, complete = False, True
    for shape in shapes:
        if shape.name not in label:
            continue
        mask = None
        try:
            if isinstance(shape.mask, np.ndarray):
                mask = torch.from_numpy(shape.mask)
            elif shape.mask:
                mask = decode_mask(shape.mask, size)
        except InputError as error:
            damaged = True
            said.append(f"{source}: {shape.where}: {error}; no mask of its photograph is used")
        try:
            box, word = _box(shape.box, mask, size)
        except InputError as error:
            said.append(f"{source}: {shape.where}: {error}; it is left out")
            complete = False
            continue
        if word:
            said.append(f"{source}: {shape.where}: {word}")
        kept.append(shape)
        boxes.append(box)
        if mask is not None:
            masks.append(mask)
    if 0 < len(masks) < len(kept) and not damaged:
        said.append(f"{source}: {len(kept) - len(masks)} of {len(kept)} objects have no mask; only boxes are used")
    whole = len(masks) == len(kept) and (bool(kept) or (masked and complete and not damaged))
    instances = Instances(
        torch.from_numpy(np.array(boxes, np.float32).reshape(-1, 4)),
        torch.tensor([label[shape.name] for shape in kept], dtype=torch.long),
        torch.ones(len(kept)),
        size,
        torch.stack([torch.zeros(size, dtype=torch.bool), *masks])[1:] if whole else None,
    )
    return Truth(
        instances,
        difficult=torch.tensor([shape.difficult for shape in kept], dtype=torch.bool),
        crowd=torch.tensor([shape.crowd for shape in kept], dtype=torch.bool),
        semantic=semantic,
        notes=tuple(said),
        complete=complete,
    )


def _box(box: Any, mask: torch.Tensor | None, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """(4,) float32 within the image, and what was done to it. `InputError`: no box of any area can be made of it."""
    try:
        if isinstance(box, list) and any(isinstance(side, (str, bool)) for side in box):
            raise ValueError  # of text, numpy would make numbers
        values = np.array([np.nan] * 4 if box is None else box, np.float64)
    except (TypeError, ValueError, OverflowError):
        values = np.zeros(0)
    readable = values.shape == (4,) and bool(np.isfinite(values).all())
    limits = np.array([size[1], size[0]] * 2, np.float64)
    cut = values.clip(0, limits).astype(np.float32) if readable else np.zeros(4, np.float32)
    if not (cut[2:] > cut[:2]).all() and mask is not None and bool(mask.any()):
        word = "" if box is None else "its box has no area; the mask's is used"
        return masks_to_boxes(mask[None])[0].numpy(), word
    if not readable:
        raise InputError(f"it needs a box of four numbers, but has {excerpt(box)}" if box is not None else "no pixel")
    corners = [round(float(value), 2) for value in values]
    if not (values[2:] > values[:2]).all():
        raise InputError(f"its box {corners} has no area")
    if not (cut[2:] > cut[:2]).all():
        raise InputError(f"its box {corners} lies outside the {size[1]} x {size[0]} pixels of the image")
    overhangs = bool((values < -1).any() or (values > limits + 1).any())
    return cut, f"its box {corners} leaves the {size[1]} x {size[0]} pixels and is cut there" if overhangs else ""


def checked_size(path: Path, said: tuple[Any, Any], source: object) -> tuple[int, int]:
    """(H, W) of an image as it is read, checked against the ``(height, width)`` that the annotation says, if it does.

    Args:
        path: the image; said: what the annotation says; source: the annotation, for messages.

    Raises:
        InputError: the image cannot be read, is too large, or the annotation was drawn on an image of another size.
    """
    size = image_size(path)
    # some tools write numbers as floats or texts
    sides = tuple(int(one) if isinstance(one, str) and one.isdecimal() and len(one) < 10 else one for one in said)
    if all(type(side) in (int, float) for side in sides) and sides != size:
        raise InputError(
            f"{source}: annotated at {said[1]} x {said[0]} pixels, but {path.name} has {size[1]} x {size[0]} "
            "(upright); use the image that was annotated"
        )
    return size


def image_folder(held: Mapping[Path, int], source: Path) -> tuple[Path, list[str]]:
    """Of folders, each with the number of the data set's first images that it holds, the one with most.

    Returns:
        The folder, of several the first, and a note where others hold as many.

    Raises:
        InputError: none holds any (the folders looked at are listed).
    """
    best = max(held, key=lambda folder: held[folder], default=source.parent)
    if not held.get(best):
        raise InputError(f"{source}: its images are in none of {listing(map(str, held))}; give their folder (images)")
    others = [str(folder) for folder in held if folder != best and held[folder] == held[best]]
    note = f"{source.name}: its images are taken from {best}; {listing(others)} holds files of these names, too"
    return best, [note] if others else []
