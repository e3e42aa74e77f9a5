"""What was found, drawn on the photograph: instances, proposals, maps.

Every function takes an image (H, W, 3) uint8 RGB, returns a new picture of that shape and leaves its arguments alone.
An image of another shape or type is a `ValueError`.

Shape letters: ``H, W`` height and width of the image in pixels, ``N`` instances, ``R`` proposals.
"""

import functools
import io
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from labelpenet.data.files import inside, write_bytes
from labelpenet.instances import Instances

# Okabe and Ito's palette, without black: distinct in the three common kinds of colour blindness.
PALETTE = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (204, 121, 167), (86, 180, 233), (240, 228, 66),
)  # fmt: skip
_TINTS = (0.0, 0.45, -0.35)  # towards white, or black: what sets apart instances of one class
_FILL, _HEAT = 0.45, 0.65  # opacity of a mask, of a map
Box = tuple[int, int, int, int]


def instance_colours(labels: Tensor | Sequence[int]) -> np.ndarray:
    """Colours (N, 3) uint8 RGB of class indices (N,): a hue for each class, lighter or darker for others of the same.

    Hues repeat after the seventh class, where only the written label tells.
    """
    colours = np.zeros((len(labels), 3), np.uint8)
    seen: dict[int, int] = {}
    for index, label in enumerate(int(label) for label in labels):
        place = seen.get(label, 0)
        seen[label] = place + 1
        tint = _TINTS[(place + label // len(PALETTE)) % len(_TINTS)]
        base = np.array(PALETTE[label % len(PALETTE)], np.float64)
        colours[index] = np.round(base + (255 - base) * tint if tint >= 0 else base * (1 + tint))
    return colours


def draw_instances(
    image: np.ndarray, instances: Instances, classes: Sequence[str] | None = None, min_score: float = 0.0
) -> np.ndarray:
    """The instances on their photograph: translucent masks with a contour, boxes, class and score; the best one on top.

    Of one of weight 0, which is doubtful, the box alone is drawn: its mask may be nothing but that box.

    Args:
        instances: of an image of this size, else a `ValueError`.
        classes: names by label, or None to leave the labels out.
        min_score: instances of a smaller weight are not drawn.
    """
    picture = _checked(image)
    if tuple(instances.image_size) != picture.shape[:2]:
        raise ValueError(f"image must be {tuple(instances.image_size)} as its instances are, but is {image.shape[:2]}")
    shown = instances.to("cpu")
    shown = shown[shown.weights >= min_score]
    shown = shown[shown.weights.argsort(descending=True, stable=True)]
    colours = instance_colours(shown.labels)
    width = _line_width(picture)
    boxes = [_pixels(box, picture.shape) for box in shown.boxes.tolist()]
    masks = shown.compact_masks
    for index in reversed(range(len(shown))):  # the best one last, and so on top
        if masks is not None and masks.crops[index].size and shown.weights[index] > 0:
            crop, (x, y) = masks.crops[index], masks.corners[index]
            _fill(picture[y : y + crop.shape[0], x : x + crop.shape[1]], crop, colours[index], width)
        _frame(picture, boxes[index], colours[index], width)
    if classes is None:
        return picture
    texts = [
        f"{_one_line(classes[label])} {weight:.2f}"
        for label, weight in zip(shown.labels.tolist(), shown.weights.tolist(), strict=True)
    ]
    return _write_labels(picture, boxes, texts, colours)


def draw_mask(image: np.ndarray, mask: np.ndarray | Tensor) -> np.ndarray:
    """One mask (H, W) bool on its photograph, translucent with a contour."""
    picture = _checked(image)
    array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.shape != picture.shape[:2]:
        raise ValueError(f"mask must be {picture.shape[:2]} as its image is, but is {array.shape}")
    _fill(picture, array.astype(bool), np.array(PALETTE[0], np.uint8), _line_width(picture))
    return picture


def draw_boxes(image: np.ndarray, boxes: np.ndarray | Tensor, limit: int = 60) -> np.ndarray:
    """Boxes on their photograph, as thin lines: yellow for the first one shown, through to purple for the last.

    Args:
        boxes: (R, 4) ``x1, y1, x2, y2`` in pixels, best first.
        limit: only the first ones are drawn; the first of all lies on top.
    """
    picture = _checked(image)
    rows = np.asarray(boxes.cpu() if isinstance(boxes, Tensor) else boxes, np.float64).reshape(-1, 4)[:limit]
    place = np.linspace(255, 40, max(len(rows), 1))
    colours = _colour_map(place.astype(np.uint8)[None], cv2.COLORMAP_PLASMA)[0]
    width = max(1, _line_width(picture) // 2)
    for box, colour in reversed(list(zip(rows.tolist(), colours, strict=False))):
        _frame(picture, _pixels(box, picture.shape), colour, width)
    return picture


def draw_map(image: np.ndarray, values: np.ndarray | Tensor) -> np.ndarray:
    """A map (h, w) of any size as colours (black, purple, orange, yellow from 0 to 1) over the greyed photograph,
    resized bilinearly to it. Values outside [0, 1] are clipped, NaN is 0.
    """
    picture = _checked(image)
    array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float32)
    if array.ndim != 2:
        raise ValueError(f"values must be (h, w), but got {array.shape}")
    array = np.nan_to_num(array.astype(np.float32), posinf=1.0, neginf=0.0)
    if not array.size:
        array = np.zeros((1, 1), np.float32)
    height, width = picture.shape[:2]
    array = cv2.resize(np.ascontiguousarray(array), (width, height), interpolation=cv2.INTER_LINEAR).clip(0, 1)
    heat = _colour_map(np.round(array * 255).astype(np.uint8), cv2.COLORMAP_INFERNO).astype(np.float32)
    grey = (picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    return np.round((1 - _HEAT) * grey + _HEAT * heat).clip(0, 255).astype(np.uint8)


def write_overlay(path: Path, image: np.ndarray, instances: Instances, classes: Sequence[str]) -> Path:
    """Writes what `draw_instances` draws to a path of `overlay_paths`: PNG for ``.png``, else JPEG; `InputError` where
    the file cannot be written.
    """
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    return write_bytes(path, encode_picture(draw_instances(image, instances, classes), kind))


def overlay_paths(folder: Path, image_ids: Iterable[str]) -> dict[str, Path]:
    """Where the overlay of each image goes: a file of its own inside the folder; `InputError` where a link leads out.

    An id with folders in it keeps them. One that names no JPEG or PNG file gets ``.jpg`` appended; one whose name is
    taken, also where only case differs, gets ``-2`` and so on.
    """
    taken: set[str] = set()
    paths: dict[str, Path] = {}
    for image_id in image_ids:
        given = PureWindowsPath(image_id.replace("\0", ""))  # knows both kinds of slash, and drives
        path = Path(*[part for part in given.parts if part not in (given.anchor, "..", ".")] or ["unnamed"])
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            path = path.with_name(path.name + ".jpg")
        plain, number = path, 1
        while str(path).casefold() in taken:
            number += 1
            path = plain.with_stem(f"{plain.stem}-{number}")
        taken.add(str(path).casefold())
        paths[image_id] = inside(folder, str(path))
    return paths


def encode_picture(picture: np.ndarray, kind: str = "JPEG", quality: int = 88) -> bytes:
    """A picture (H, W, 3) uint8 as the bytes of a ``JPEG`` (of a quality up to 95) or ``PNG`` file."""
    buffer = io.BytesIO()
    options = {"quality": quality, "optimize": True} if kind == "JPEG" else {}
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def _checked(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image must be (H, W, 3) uint8, but got {image.shape} {image.dtype}")
    return image.copy()


def _line_width(picture: np.ndarray) -> int:
    return max(1, round(min(picture.shape[:2]) / 180))


def _one_line(text: str) -> str:
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def _pixels(box: Sequence[float], shape: tuple[int, ...]) -> Box:
    """The pixels that a box covers, at least one, inside the image: half-open x1, y1, x2, y2."""
    x1, y1, x2, y2 = np.round(np.nan_to_num(np.asarray(box, np.float64))).astype(np.int64).tolist()
    x1, y1 = min(max(x1, 0), shape[1] - 1), min(max(y1, 0), shape[0] - 1)
    return x1, y1, max(x1 + 1, min(x2, shape[1])), max(y1 + 1, min(y2, shape[0]))


def _fill(picture: np.ndarray, mask: np.ndarray, colour: np.ndarray, width: int) -> None:
    """Tints a mask (H, W) bool and draws its contour, both inside the mask."""
    tinted = np.round((1 - _FILL) * np.arange(256)[:, None] + _FILL * colour).astype(np.uint8)
    for channel in range(3):
        picture[..., channel][mask] = tinted[:, channel][picture[..., channel][mask]]
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    inner = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    picture[mask & (inner == 0)] = colour


def _frame(picture: np.ndarray, box: Box, colour: np.ndarray, width: int) -> None:
    """Draws a rectangle whose lines lie inside the box."""
    x1, y1, x2, y2 = box
    width = max(1, min(width, (x2 - x1) // 2, (y2 - y1) // 2))
    picture[y1 : y1 + width, x1:x2] = colour
    picture[y2 - width : y2, x1:x2] = colour
    picture[y1:y2, x1 : x1 + width] = colour
    picture[y1:y2, x2 - width : x2] = colour


def _write_labels(picture: np.ndarray, boxes: Sequence[Box], texts: Sequence[str], colours: np.ndarray) -> np.ndarray:
    """Plates with text at the corners of the boxes, the best instance's first: later ones give way where they can."""
    height, width = picture.shape[:2]
    size = int(np.clip(min(height, width) / 21, 10, 28))
    if height < 2 * size or width < 2 * size:  # a stamp: nothing could be read
        return picture
    font = _font(size)
    canvas = Image.fromarray(picture)
    pen = ImageDraw.Draw(canvas)
    pad = max(1, size // 6)
    plates: list[Box] = []
    for box, text, colour in zip(boxes, texts, colours, strict=True):
        ascent, descent = font.getmetrics()
        wide, high = round(pen.textlength(text, font=font)) + 2 * pad, ascent + descent + pad
        plate = _place(box, (wide, high), (width, height), plates)
        plates.append(plate)
        pen.rectangle((plate[0], plate[1], plate[2] - 1, plate[3] - 1), fill=tuple(colour.tolist()))
        ink = (0, 0, 0) if _luminance(colour) > 0.3 else (255, 255, 255)
        pen.text((plate[0] + pad, plate[1] + pad // 2), text, fill=ink, font=font)
    return np.array(canvas)


def _place(box: Box, plate: tuple[int, int], image: tuple[int, int], taken: Sequence[Box]) -> Box:
    """Where a plate (width, height) goes: above the box, inside its top, below, inside its bottom; the first free."""
    wide, high = plate
    x = max(0, min(box[0], image[0] - wide))
    options = [y for y in (box[1] - high, box[1], box[3], box[3] - high) if 0 <= y <= image[1] - high]
    places = [(x, y, x + wide, y + high) for y in options or [max(0, min(box[1], image[1] - high))]]
    return next((place for place in places if not any(_meet(place, other) for other in taken)), places[0])


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _luminance(colour: np.ndarray) -> float:
    """Relative luminance in [0, 1] of an sRGB colour (3,) uint8."""
    linear = (colour / 255.0) ** 2.2
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font knows little beyond ASCII; matplotlib brings DejaVu, which knows most alphabets.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _colour_map(values: np.ndarray, name: int) -> np.ndarray:
    """(h, w) uint8 as (h, w, 3) uint8 RGB."""
    return np.ascontiguousarray(cv2.applyColorMap(np.ascontiguousarray(values), name)[..., ::-1])
