"""Generated scenes: photograph-like images with exact masks, for the demo, for tests, and for a first try without data.

Four classes, each a shape with a texture and colours of its own, lie in front of a cluttered background, overlap,
leave the frame, throw shadows. Distractors are not annotated: the same shapes without texture, other shapes in the
textures of the classes but other colours, and now and then a thin strip of a real texture. They keep a model from
getting by with colour alone or shape alone.

Shape letters: ``H, W`` height and width of an image; ``P`` its objects.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from labelpenet.data.files import whole_folder
from labelpenet.data.images import palette_png
from labelpenet.errors import InputError

CLASSES = ("ball", "box", "star", "tent")
VERSION = 1  # of the pictures: raise it when a seed gives others
_LEAST_VISIBLE = 0.6  # of an object's own area; otherwise the objects are drawn again, sometimes fewer

Rng = np.random.Generator
Field = np.ndarray  # (H, W) float32


@dataclass(frozen=True)
class Scene:
    """A generated image and its truth.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        instances: (H, W) uint8; 0 background, i the i-th object (from 1), nearer objects hide farther ones.
        labels: for each of the P objects its index into `CLASSES`.
    """

    image: np.ndarray
    instances: np.ndarray
    labels: tuple[int, ...]


def render_scene(rng: Rng, size: tuple[int, int] = (160, 160), objects: int | None = None) -> Scene:
    """Draws one scene.

    Args:
        rng: source of all that is random; the same state gives the same scene.
        size: (H, W) in pixels, at least 48 each.
        objects: how many objects, 1 to 4; None: drawn at random, fewer being likelier.
    """
    wanted = objects or int(rng.choice([1, 2, 3, 4], p=[0.35, 0.35, 0.2, 0.1]))
    backdrop = _background(rng, size)
    for _ in range(rng.integers(0, 4)):
        backdrop = _distractor(rng, backdrop)
    while True:
        canvas = backdrop
        # Two classes an image at most: tags that always come together cannot be told apart by anyone.
        palette = rng.choice(len(CLASSES), size=min(2, wanted), replace=False)
        labels = tuple(int(rng.choice(palette)) for _ in range(wanted))
        instances = np.zeros(size, np.uint8)
        areas = []
        for number, label in enumerate(labels, 1):
            canvas, inside, area = _object(rng, canvas, label, crowd=wanted)
            instances[inside] = number
            areas.append(area)
        visible = np.bincount(instances.ravel(), minlength=wanted + 1)[1:]
        if (visible >= _LEAST_VISIBLE * np.array(areas)).all():
            return Scene(_photograph(rng, canvas), instances, labels)
        wanted = max(1, wanted - int(rng.random() < 0.2))


def write_scenes(
    out: Path | str, train: int = 200, val: int = 50, size: tuple[int, int] = (160, 160), seed: int = 0
) -> Path:
    """Writes generated scenes as a VOCdevkit. 250 images of 160 x 160 take about seven seconds.

    The folder appears complete or not at all. One that already holds exactly these scenes is used as it is.

    Args:
        out: the folder to make.
        train, val: numbers of images in these splits.
        size: (H, W) in pixels, at least 48 each.
        seed: scene i of a split depends on the seed, the split and i alone.

    Returns:
        The year folder, ``out/VOCdevkit/VOC2012``.

    Raises:
        InputError: a number is too small, ``out`` holds something else, or it cannot be written.
    """
    out = Path(out)
    if train < 1 or val < 0 or min(size) < 48 or seed < 0:
        got = f"{train}, {val}, {seed} and {size[1]} x {size[0]}"
        raise InputError(f"scenes need train >= 1, val >= 0, seed >= 0 and at least 48 x 48 pixels, but got {got}")
    settings = {"version": VERSION, "train": train, "val": val, "size": list(size), "seed": seed}
    year = Path("VOCdevkit", "VOC2012")
    if out.exists():
        if _settings(out) == settings:
            return out / year
        if not out.is_dir() or any(out.iterdir()):
            raise InputError(f"{out}: already holds something else; choose another folder or remove it")
    with whole_folder(out) as made:
        _write_kit(made / year, {"train": train, "val": val}, size, seed)
        (made / "scenes.json").write_text(json.dumps(settings))
    return out / year


# ---------------------------------------------------------------------------------------------------------- the parts


def _background(rng: Rng, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32 in [0, 255]: two muted colours mixed by smooth noise, a gradient, grain and random lines."""
    first, second = _muted(rng), _muted(rng)
    mix = np.clip(0.5 + 0.8 * _noise(rng, size, 5) + 0.3 * _noise(rng, size, 14), 0, 1)[..., None]
    canvas = first * mix + second * (1 - mix)
    canvas += (rng.uniform(5, 18) * _noise(rng, size, int(rng.integers(20, 50))))[..., None]
    y, x = _grid(size)
    for _ in range(rng.integers(0, 7)):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.5, 0.5) * min(size)
        across = (x - size[1] / 2) * np.cos(angle) + (y - size[0] / 2) * np.sin(angle) - offset
        canvas = _blend(canvas, _muted(rng), _edge(np.abs(across) - rng.uniform(0.5, 2.5)) * rng.uniform(0.4, 0.9))
    return canvas.astype(np.float32)


def _object(rng: Rng, canvas: np.ndarray, label: int, crowd: int) -> tuple[np.ndarray, np.ndarray, int]:
    """One object painted over the canvas: the new canvas, (H, W) bool where it lies, and its area within the frame."""
    size = canvas.shape[:2]
    # More objects, smaller ones: a lone one covers 6 to 40 % of the frame, one of four 4 to 13 %.
    largest = {1: 0.36, 2: 0.30, 3: 0.25, 4: 0.21}[crowd]
    radius = rng.uniform(0.19 if crowd < 3 else 0.165, largest) * min(size)
    u, v = _frame(rng, size, radius, margin=0.8)
    distance = _SHAPES[label](rng, u, v, radius)
    texture = _TEXTURES[label](rng, u, v, min(size) / 160, _colours(rng, label))
    inside = distance < 0
    return _paint(rng, canvas, distance, texture, radius), inside, int(inside.sum())


def _distractor(rng: Rng, canvas: np.ndarray) -> np.ndarray:
    """Something that is not annotated though it resembles a class by its shape, its texture or its colours."""
    size = canvas.shape[:2]
    kind = rng.choice(["plain", "recoloured", "strip"], p=[0.5, 0.35, 0.15])
    label = int(rng.integers(len(CLASSES)))
    scale = min(size) / 160
    radius = rng.uniform(0.10, 0.24) * min(size)
    u, v = _frame(rng, size, radius, margin=0.3)
    if kind == "plain":  # the shape of a class in one muted colour
        distance, texture = _SHAPES[label](rng, u, v, radius), np.broadcast_to(_muted(rng), (*size, 3))
    elif kind == "recoloured":  # the texture of a class in muted colours, on a shape of no class
        distance = _foreign_shape(rng, u, v, radius)
        texture = _TEXTURES[label](rng, u, v, scale, (_muted(rng), _muted(rng)))
    else:  # a thin strip of the real texture in the real colours
        distance = np.maximum(np.abs(u) - radius, np.abs(v) - 0.16 * radius)
        texture = _TEXTURES[label](rng, u, v, scale, _colours(rng, label))
    return _paint(rng, canvas, distance, texture, radius)


def _photograph(rng: Rng, canvas: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: the canvas under uneven light of some tint, seen by a sensor with noise."""
    size = canvas.shape[:2]
    y, x = _grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    slope = ((x / size[1] - 0.5) * np.cos(angle) + (y / size[0] - 0.5) * np.sin(angle)) * rng.uniform(0, 0.5)
    light = rng.uniform(0.75, 1.15) * (1 + slope + 0.08 * _noise(rng, size, 3))
    tint = rng.uniform(0.92, 1.08, 3).astype(np.float32)
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(2, 7))
    noisy = canvas * light[..., None] * tint + grain
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def _paint(rng: Rng, canvas: np.ndarray, distance: Field, texture: np.ndarray, radius: float) -> np.ndarray:
    """The canvas with a soft shadow and, where ``distance`` (pixels, negative inside) says so, the shaded texture."""
    shift = round(0.12 * radius)
    shadow = np.pad(distance, ((shift, 0), (shift, 0)), mode="edge")[: distance.shape[0], : distance.shape[1]]
    canvas = canvas * (1 - 0.45 * np.clip(0.5 - shadow / (0.3 * radius), 0, 1))[..., None]
    depth = np.clip(-distance / radius, 0, 1)
    shading = rng.uniform(0.6, 0.85) + 0.55 * np.sqrt(depth)
    return _blend(canvas, texture * np.clip(shading, 0, 1.15)[..., None], _edge(distance))


# ------------------------------------------------- shapes: (H, W) pixels from the outline, negative inside the shape


def _ball(rng: Rng, u: Field, v: Field, radius: float) -> Field:
    return np.hypot(u, v * rng.uniform(1.0, 1.15)) - radius


def _box(rng: Rng, u: Field, v: Field, radius: float) -> Field:
    corner = 0.12 * radius
    half_u, half_v = 0.92 * radius - corner, rng.uniform(0.62, 0.85) * radius - corner
    du, dv = np.abs(u) - half_u, np.abs(v) - half_v
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0) - corner


def _star(rng: Rng, u: Field, v: Field, radius: float) -> Field:
    ripple = np.cos(5 * np.arctan2(v, u))
    return (np.hypot(u, v) - radius * (0.86 + rng.uniform(0.18, 0.24) * ripple)) * 0.8


def _tent(rng: Rng, u: Field, v: Field, radius: float) -> Field:
    """A triangle with a furry outline."""
    inner = 0.58 * radius
    sides = [u * np.cos(turn) + v * np.sin(turn) for turn in (np.pi / 2, np.pi * 7 / 6, np.pi * 11 / 6)]
    fur = _noise(rng, u.shape, max(8, int(0.4 * max(u.shape)))) * 0.06 * radius
    return np.maximum.reduce(sides) - inner + fur


def _foreign_shape(rng: Rng, u: Field, v: Field, radius: float) -> Field:
    """A ring, a bar or a cross: what no class looks like."""
    kind = rng.integers(3)
    if kind == 0:
        return np.abs(np.hypot(u, v) - 0.75 * radius) - 0.2 * radius
    bar = np.maximum(np.abs(u) - radius, np.abs(v) - 0.25 * radius)
    return bar if kind == 1 else np.minimum(bar, np.maximum(np.abs(v) - radius, np.abs(u) - 0.25 * radius))


# ------------------------------------------------------------- textures: (H, W, 3) colours in the frame of the object


def _stripes(rng: Rng, u: Field, v: Field, scale: float, colours: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    wave = np.sin(2 * np.pi * u / (rng.uniform(9, 12) * scale))
    return _two(wave, colours)


def _checks(rng: Rng, u: Field, v: Field, scale: float, colours: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    period = rng.uniform(13, 17) * scale
    return _two(np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period) * 2, colours)


def _spots(rng: Rng, u: Field, v: Field, scale: float, colours: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    period = rng.uniform(8, 10) * scale
    row = np.round(v / period)
    across = u / period + 0.5 * (row % 2)
    return _two((0.3 - np.hypot(across - np.round(across), v / period - row)) * 4, colours)


def _fur(rng: Rng, u: Field, v: Field, scale: float, colours: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    fine = _noise(rng, u.shape, max(8, int(max(u.shape) / (3 * scale))))
    return _two(1.2 * fine + 0.4 * np.sin(2 * np.pi * v / (6 * scale) + 2 * fine), colours, hardness=1.5)


_Shape = Callable[[Rng, Field, Field, float], Field]
_Texture = Callable[[Rng, Field, Field, float, tuple[np.ndarray, np.ndarray]], np.ndarray]
_SHAPES: tuple[_Shape, ...] = (_ball, _box, _star, _tent)
_TEXTURES: tuple[_Texture, ...] = (_stripes, _checks, _spots, _fur)
_COLOURS = (  # of each class: the two that its texture alternates between
    ((205, 45, 45), (240, 232, 222)),
    ((45, 75, 180), (235, 205, 70)),
    ((25, 75, 40), (95, 185, 80)),
    ((110, 60, 25), (222, 150, 78)),
)


def _colours(rng: Rng, label: int) -> tuple[np.ndarray, np.ndarray]:
    dark, light = (np.array(colour, np.float32) + rng.uniform(-18, 18, 3) for colour in _COLOURS[label])
    return dark.astype(np.float32), light.astype(np.float32)


def _muted(rng: Rng) -> np.ndarray:
    """(3,) float32: a colour of little saturation."""
    return (rng.uniform(60, 200) + rng.uniform(-32, 32, 3)).astype(np.float32)


def _two(wave: Field, colours: tuple[np.ndarray, np.ndarray], hardness: float = 3.0) -> np.ndarray:
    share = (0.5 + 0.5 * np.tanh(hardness * wave))[..., None]
    return colours[0] * (1 - share) + colours[1] * share


def _blend(canvas: np.ndarray, over: np.ndarray, alpha: Field) -> np.ndarray:
    return canvas + (over - canvas) * alpha[..., None]


def _edge(distance: Field) -> Field:
    """Coverage in [0, 1] of pixels at a distance from an outline: half on it, none from half a pixel outside."""
    return np.clip(0.5 - distance, 0, 1)


def _grid(size: tuple[int, int]) -> tuple[Field, Field]:
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32) + np.float32(0.5)
    return y, x


def _frame(rng: Rng, size: tuple[int, int], radius: float, margin: float) -> tuple[Field, Field]:
    """Pixel coordinates in the frame of an object: centred at least ``margin`` radii from the border, turned."""
    low = min(margin * radius, min(size) / 2 - 1)
    cy, cx = rng.uniform(low, size[0] - low), rng.uniform(low, size[1] - low)
    y, x = _grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    y, x = y - np.float32(cy), x - np.float32(cx)
    return x * cos + y * sin, y * cos - x * sin


def _noise(rng: Rng, size: Sequence[int], cells: int) -> Field:
    """Smooth noise of about unit range with ``cells`` cells along the longer side."""
    height, width = size[0], size[1]
    step = max(height, width) / cells
    coarse = rng.uniform(-1, 1, (max(2, round(height / step)) + 1, max(2, round(width / step)) + 1))
    return np.asarray(Image.fromarray(coarse.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))


# ------------------------------------------------------------------------------------------------- the kit's files


def _write_kit(year: Path, counts: dict[str, int], size: tuple[int, int], seed: int) -> None:
    folders = ["JPEGImages", "Annotations", "SegmentationObject", "SegmentationClass"]
    for folder in [*folders, "ImageSets/Main", "ImageSets/Segmentation"]:
        (year / folder).mkdir(parents=True)
    (year / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    for number, (split, count) in enumerate(counts.items()):
        names = [f"{split}_{index:05d}" for index in range(count)]
        for index, name in enumerate(names):
            scene = render_scene(np.random.default_rng([seed, number, index]), size)
            classes = np.array([0, *(label + 1 for label in scene.labels)], np.uint8)[scene.instances]
            Image.fromarray(scene.image).save(year / "JPEGImages" / f"{name}.jpg", quality=92)
            (year / "SegmentationObject" / f"{name}.png").write_bytes(palette_png(scene.instances))
            (year / "SegmentationClass" / f"{name}.png").write_bytes(palette_png(classes))
            (year / "Annotations" / f"{name}.xml").write_text(_annotation(name, scene))
        for folder in ("Main", "Segmentation"):
            (year / "ImageSets" / folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def _annotation(name: str, scene: Scene) -> str:
    height, width = scene.instances.shape
    lines = [
        f"<annotation><folder>VOC2012</folder><filename>{name}.jpg</filename>",
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size><segmented>1</segmented>",
    ]
    for number, label in enumerate(scene.labels, 1):
        ys, xs = np.nonzero(scene.instances == number)
        corners = {"xmin": xs.min() + 1, "ymin": ys.min() + 1, "xmax": xs.max() + 1, "ymax": ys.max() + 1}
        box = "".join(f"<{side}>{int(value)}</{side}>" for side, value in corners.items())
        lines.append(
            f"<object><name>{CLASSES[label]}</name><pose>Unspecified</pose><truncated>0</truncated>"
            f"<difficult>0</difficult><bndbox>{box}</bndbox></object>"
        )
    return "\n".join([*lines, "</annotation>\n"])


def _settings(out: Path) -> dict[str, object] | None:
    """The settings that the scenes in a folder were written with; None where it holds no scenes."""
    try:
        return json.loads((out / "scenes.json").read_text())
    except (OSError, ValueError):
        return None
