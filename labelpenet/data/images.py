"""Photographs from disk, whatever a camera, a scanner or a web site made of them."""

import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin, WebPImagePlugin

from labelpenet.data.files import is_hidden, listing, real_path
from labelpenet.errors import InputError, reason, told

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
# Only decoders that run in this process: Pillow would hand PostScript to an external interpreter. The last two
# are not among those that Pillow registers by itself; naming their classes is what loads them. MPO goes with JPEG.
FORMATS = (
    *("JPEG", "PNG", "BMP", "GIF", "PPM"),
    TiffImagePlugin.TiffImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)
UNREAD = (".heic", ".heif", ".avif", ".raw", ".cr2", ".nef", ".dng")  # what cameras and phones write besides
PIXEL_LIMIT = 100_000_000
_ORIENTATION = 0x0112


def read_image(path: Path | str) -> np.ndarray:
    """Reads a photograph as it is meant to be seen.

    The EXIF orientation is applied. Greyscale, palette, CMYK and 16-bit images become 8-bit RGB (16-bit values are
    divided by 257), transparent pixels are laid on white, and of an animation the first frame is read.

    Args:
        path: the image file (JPEG, PNG, BMP, WebP, TIFF, GIF, PPM).

    Returns:
        (H, W, 3) uint8, RGB in [0, 255].

    Raises:
        InputError: the file is missing, truncated or no image, or has more than 100 million pixels; names the file.
    """
    path = Path(path)
    with _quiet(), _open(path) as image:
        memory = f"{path}: not enough memory for {image.width} x {image.height} pixels"
        with _decoded(path, "image"), told(memory, MemoryError):
            image.load()
            pixels = _rgb(image)
        return _upright(pixels, _orientation(image))


Photograph = np.ndarray | Image.Image | str | Path
"""A photograph in whatever form one has it (see `as_pixels`)."""


def several(image: Photograph | list[Photograph] | tuple[Photograph, ...]) -> list[Photograph] | None:
    """The photographs of a list or, in order of name (`find_images`), of a folder; None of what is one photograph."""
    if isinstance(image, (str, Path)) and Path(image).is_dir():
        return [path for _, path in find_images([Path(image)])]
    return list(image) if isinstance(image, (list, tuple)) else None


def as_pixels(image: Photograph) -> np.ndarray:
    """A photograph in whatever form one has it, as `read_image` returns it.

    Args:
        image: a file, a PIL image (its EXIF orientation is applied), or an array (H, W, 3) or (H, W) uint8.

    Raises:
        InputError: the file cannot be read; an array of another shape or type, or something else.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return _upright(_rgb(image), _orientation(image))
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"an image must be a file, a PIL image or an array (H, W, 3) uint8, not a {type(image).__name__}"
        )
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise InputError(f"an image must be (H, W, 3) uint8 RGB, but this array is {image.shape} {image.dtype}")
    return image


def image_size(path: Path | str) -> tuple[int, int]:
    """(H, W) in pixels of what `read_image` returns, from the header where the format allows it; errors as there."""
    with _quiet(), _open(Path(path)) as image:
        width, height = image.size
        if _orientation(image) < 5:
            return height, width
        if image.format == "TIFF":  # Pillow turns these itself: some of its versions the size first, the pixels later
            height, width, _ = read_image(path).shape
            return height, width
        return width, height


def upright_file(path: Path, jpeg: bool = False) -> tuple[bytes, str, bool]:
    """The content of an image file that shows the photograph upright to a program that ignores EXIF, too.

    Returns:
        The content, the suffix that belongs to it (in lower case), and whether it was encoded again: as JPEG, of
        quality 95, what was JPEG or, with ``jpeg``, any other; as PNG the others.

    Raises:
        InputError: as `read_image`.
    """
    with _quiet(), _open(path) as image:
        is_jpeg, upright = image.format in ("JPEG", "MPO"), _orientation(image) == 1
    suffix = ".jpg" if is_jpeg and path.suffix.lower() in (".jpeg", ".jfif") and jpeg else path.suffix.lower()
    if upright and (is_jpeg or not jpeg):
        with told(lambda error: f"{path}: cannot be read ({reason(error)}); check the file", OSError):
            return path.read_bytes(), suffix, False
    content = io.BytesIO()
    kind, suffix = ("JPEG", ".jpg") if is_jpeg or jpeg else ("PNG", ".png")
    Image.fromarray(read_image(path)).save(content, kind, quality=95)
    return content.getvalue(), suffix, True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Pillow's warnings from the user: our own limit refuses a bomb, and damaged metadata costs no picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decoded(path: Path, what: str) -> AbstractContextManager[None]:
    """A decoder meets damaged bytes with whatever it stumbles over."""
    return told(lambda error: f"{path}: damaged or truncated {what} ({reason(error)}); replace the file", Exception)


def _open(path: Path) -> Image.Image:
    """The image, not yet decoded, once its size is known to be harmless."""
    bomb = f"{path}: more than {PIXEL_LIMIT // 10**6} million pixels; make it smaller"
    none, remedy = "no JPEG, PNG, BMP, WebP, TIFF, GIF or PPM image", "replace or remove it"
    with (  # damaged headers raise whatever the parser stumbles over
        told(lambda error: f"{path}: damaged image header ({reason(error)}); replace the file", Exception),
        told(lambda error: f"{path}: cannot be read as an image ({error.strerror or none}); {remedy}", OSError),
        told(bomb, Image.DecompressionBombError),
    ):
        if not path.exists():
            raise InputError(f"{path}: no such image; check the path")
        if not path.is_file():
            raise InputError(f"{path}: not a file; give an image file")
        image = Image.open(path, formats=FORMATS)
    if image.width * image.height > PIXEL_LIMIT:
        size = f"{image.width} x {image.height} pixels"
        image.close()
        raise InputError(f"{path}: {size} are more than {PIXEL_LIMIT // 10**6} million; make it smaller")
    return image


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an image in any of Pillow's modes."""
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return np.repeat(_eight_bits(np.asarray(image), mode)[..., None], 3, axis=2)
    if "A" in mode or "a" in mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.array(image.convert("RGB"))


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of Pillow's modes ``I;16*`` (16 bits), ``I`` (32 bits) and ``F`` as uint8."""
    wide = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    top = wide.max(initial=0.0)
    if mode == "F":
        scale = 255.0 if top <= 1.0 else 1.0 if top <= 255.0 else 255.0 / top
    elif mode.startswith("I;16"):
        scale = 1.0 / 257.0
    else:  # "I" holds 16-bit files of older Pillow versions, and files that really have 32 bits
        scale = 1.0 if top <= 255.0 else 1.0 / 257.0 if top <= 65535.0 else 255.0 / top
    return np.clip(np.round(wide * scale), 0, 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata must not cost the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes one of the eight EXIF orientations of (H, W, 3) pixels."""
    if orientation >= 5:  # 5 to 8: rows and columns are exchanged
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def voc_palette() -> np.ndarray:
    """(256, 3) uint8: the colour of each index in VOC's class and instance maps (bit k of the index, spread)."""
    index = np.arange(256)
    colours = np.zeros((256, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def palette_png(pixels: np.ndarray) -> bytes:
    """(H, W) values 0..255 as an indexed PNG in VOC's colours."""
    image = Image.fromarray(pixels.astype(np.uint8), mode="P")
    image.putpalette(voc_palette().tobytes())
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def read_index_map(path: Path | str) -> np.ndarray:
    """Reads a class or instance map, such as VOC's SegmentationClass and SegmentationObject.

    Palette and 8-bit grey images give their stored values; RGB ones are looked up in VOC's palette.

    Returns:
        (H, W) uint8 indices.

    Raises:
        InputError: the file cannot be read, has another mode, or a colour that is not in VOC's palette.
    """
    path = Path(path)
    with _quiet(), _open(path) as image, _decoded(path, "map"):
        image.load()
        mode, pixels = image.mode, np.array(image)
    if mode in ("P", "L", "1"):
        return pixels.astype(np.uint8)
    if mode not in ("RGB", "RGBA"):
        raise InputError(f"{path}: a map of mode {mode}; save it as an 8-bit palette or grey PNG")
    weights = np.array([65536, 256, 1])
    codes = pixels[..., :3].astype(np.int64) @ weights
    known = voc_palette().astype(np.int64) @ weights
    order = np.argsort(known)
    place = np.searchsorted(known[order], codes).clip(max=255)
    if not (known[order][place] == codes).all():
        raise InputError(f"{path}: holds colours that are not in VOC's palette; save it as an 8-bit palette PNG")
    return order[place].astype(np.uint8)


def find_images(paths: Iterable[Path]) -> list[tuple[str, Path]]:
    """The image files among ``paths`` and, in order of name, in the folders among them, each once, however its path
    is spelt; files and folders that are `is_hidden` are left out.

    Returns:
        (id, file) pairs; the id is the path below the folder given, or the file's name; of images that would share one
        the whole path, of each of them, so that none can be taken for another when it is looked for by its id.

    Raises:
        InputError: a path does not exist, or there is no image at all.
    """
    found: list[tuple[str, Path]] = []
    taken: set[Path] = set()
    home = cache(real_path)  # links to files stay photographs of their own
    for path in paths:
        if path.is_dir():
            inside = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file())
            pairs = [(file.relative_to(path).as_posix(), file) for file in inside]
        elif path.is_file():
            pairs = [(path.name, path)]
        else:
            raise InputError(f"{path}: no such image or folder; check the path")
        for name, file in pairs:
            place = home(file.parent) / file.name
            if place not in taken and not any(map(is_hidden, Path(name).parts)):
                taken.add(place)
                found.append((name, file))
    if not found:
        said = "".join(f"; {note}" for path in paths for note in unread(path))
        raise InputError(f"no image in {', '.join(map(str, paths))}; known are {', '.join(sorted(SUFFIXES))}{said}")
    ids = [name for name, _ in found]
    for longer in (Path, Path.absolute):  # the path as it is given may be the path of another below its folder
        times = Counter(ids)
        ids = [str(longer(file)) if times[one] > 1 else one for one, (_, file) in zip(ids, found, strict=True)]
    return [(one, file) for one, (_, file) in zip(ids, found, strict=True)]


def linked(folder: Path) -> list[str]:
    """A note on the links to folders below a folder whose photographs are looked for: they may lead anywhere."""
    links = [Path(home, one) for home, folders, _ in os.walk(folder) for one in folders if Path(home, one).is_symlink()]
    return [f"links to folders are not followed: {listing(sorted(map(str, links)), 5)}"] if links else []


def unread(folder: Path) -> list[str]:
    """A note on a folder's photographs that cannot be read, such as HEIC, but for those with one beside that can."""
    counts: Counter[str] = Counter()
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        odd = [Path(name) for name in files if name.lower().endswith(UNREAD) and not is_hidden(name)]
        fine = {Path(name).stem for name in files if name.lower().endswith(SUFFIXES)} if odd else set()
        counts.update(file.suffix.lower() for file in odd if file.stem not in fine)
    if not counts:
        return []
    return [f"{', '.join(f'{counts[one]} {one}' for one in sorted(counts))} files are not read; convert them to JPEG"]
