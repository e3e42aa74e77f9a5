"""Reading photographs: whatever a camera, a scanner or a web site made of them."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from labelpenet import InputError
from labelpenet.data.images import as_pixels, find_images, image_size, read_image, read_index_map, voc_palette
from labelpenet.formats import open_tagged
from labelpenet.formats.open import open_photographs


def gradient(height: int = 20, width: int = 30) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 8, y * 12, 255 - x * 4], -1).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(gradient()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_image(path), gradient())
    assert read_image(str(path)).dtype == np.uint8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    with Image.open(path) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    read = read_image(path)
    assert np.array_equal(read, expected)
    assert read.flags["C_CONTIGUOUS"]
    assert image_size(path) == read.shape[:2]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(gradient())
    if mode == "I;16":
        image = Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257)
    elif mode in ("I", "F", "LA"):
        image = image.convert("L").convert(mode)
    else:
        image = image.convert(mode)
    path = tmp_path / "x.tif"
    if mode in ("HSV",):
        path = tmp_path / "x.png"
        image = image.convert("RGB")
    elif mode == "YCbCr":  # Pillow before 12 cannot read the TIFF of that mode that it writes
        path = tmp_path / "x.jpg"
    image.save(path)
    pixels = read_image(path)
    assert pixels.shape == (20, 30, 3)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 5


def test_sixteen_bits_keep_their_scale(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    expected = np.round(values / 257).astype(np.uint8)
    assert np.array_equal(read_image(tmp_path / "x.png"), np.repeat(expected[..., None], 3, 2))
    dark = np.full((4, 4), 257 * 3, np.uint16)  # a dark picture stays dark
    Image.fromarray(dark).save(tmp_path / "dark.png")
    assert (read_image(tmp_path / "dark.png") == 3).all()


def test_floating_point_and_not_a_number(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.5, 1.0, np.nan, np.inf]], np.float32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert read_image(tmp_path / "x.tif")[0, :, 0].tolist() == [0, 128, 255, 0, 0]


def test_grey_is_three_equal_channels_and_transparency_is_white(tmp_path: Path) -> None:
    Image.fromarray(gradient()[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(gradient()[..., :1], 3, 2))
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    pixels = read_image(tmp_path / "alpha.png")
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[1, 1].tolist() == [255, 255, 255]
    palette = Image.fromarray(gradient()).convert("P")
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png", transparency=0)
    assert read_image(tmp_path / "palette.png").shape == (20, 30, 3)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "x.jpg").astype(int) - [200, 40, 40]).max() < 12


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (12, 10), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.abs(read_image(path).astype(int) - [250, 0, 0]).max() < 12


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side, name in ((10_500, "large"), (60_000, "huge")):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        path = tmp_path / f"{name}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        for function in (read_image, image_size, read_index_map):
            with pytest.raises(InputError, match=f"{name}.png.*million.*smaller"):
                function(path)


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "folder.jpg").mkdir()
    Image.fromarray(gradient(200, 300)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "empty", "page", "folder", "cut", "missing", "n" * 300):
        with pytest.raises(InputError, match=rf"{name}\.jpg: .+; .+") as caught:
            read_image(tmp_path / f"{name}.jpg")
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(InputError, match="not a file"):
        read_image(tmp_path / "pipe.jpg")


def test_palette_is_the_one_of_the_development_kit() -> None:
    def colour(index: int) -> list[int]:  # as the kit's VOClabelcolormap defines it, bit by bit
        red = green = blue = 0
        for step in range(8):
            red |= ((index >> 0) & 1) << (7 - step)
            green |= ((index >> 1) & 1) << (7 - step)
            blue |= ((index >> 2) & 1) << (7 - step)
            index >>= 3
        return [red, green, blue]

    assert voc_palette().tolist() == [colour(index) for index in range(256)]
    assert voc_palette()[15].tolist() == [192, 128, 128]  # person
    assert voc_palette()[255].tolist() == [224, 224, 192]  # ignore


def test_index_maps_with_palette_grey_and_in_colour(tmp_path: Path) -> None:
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(indices)
    grey.save(tmp_path / "grey.png")
    palette = Image.fromarray(indices)
    palette.putpalette(voc_palette().tobytes())
    palette.save(tmp_path / "palette.png")
    Image.fromarray(voc_palette()[indices]).save(tmp_path / "colour.png")
    for name in ("grey", "palette", "colour"):
        assert np.array_equal(read_index_map(tmp_path / f"{name}.png"), indices)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png.*palette"):
        read_index_map(tmp_path / "odd.png")


def test_the_first_picture_of_a_stereo_photograph(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (12, 10), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert np.abs(read_image(tmp_path / "x.jpg").astype(int) - [250, 0, 0]).max() < 12


def test_a_photograph_may_be_a_file_a_picture_or_an_array(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = as_pixels(tmp_path / "turned.png")
    assert upright.shape == (6, 4, 3)
    with Image.open(tmp_path / "turned.png") as image:
        assert np.array_equal(as_pixels(image), upright)
    assert np.array_equal(as_pixels(str(tmp_path / "turned.png")), upright)
    assert as_pixels(pixels) is pixels
    assert np.array_equal(as_pixels(pixels[..., 0]), np.repeat(pixels[..., :1], 3, 2))
    for wrong in (pixels.astype(np.float32), pixels[..., :2], pixels[None], pixels[:0]):
        with pytest.raises(InputError, match="uint8 RGB"):
            as_pixels(wrong)


def test_a_photograph_that_is_given_twice_is_found_once(tmp_path: Path) -> None:
    for name in ("x.jpg", "sub/x.jpg", "sub/y.jpg", "other/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    given = [tmp_path / "sub", tmp_path, tmp_path / "x.jpg"]
    ids = {"y.jpg": "sub/y.jpg", "other/x.jpg": "other/x.jpg"}
    ids |= {str(tmp_path / name): name for name in ("sub/x.jpg", "x.jpg")}
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in find_images(given)} == ids


def test_no_photograph_is_lost_where_a_path_is_another_ones_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a.jpg", "photos/2023/a.jpg", "2023/a.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(name)
    found = dict(find_images([Path("photos"), Path("2023")]))
    below, beside = (str(tmp_path / name) for name in ("photos/2023/a.jpg", "2023/a.jpg"))
    assert set(found) == {"photos/a.jpg", below, beside}
    assert found[below] == Path("photos/2023/a.jpg")


def test_a_photograph_is_found_once_however_its_path_is_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a.jpg", "photos/@eaDir/a.jpg/SYNO_THUMB.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(name)
    Path("link").symlink_to("photos")
    Path("photos/b.jpg").symlink_to("a.jpg")
    given = [Path("photos"), tmp_path / "photos", Path("link"), Path("photos/../photos/a.jpg")]
    assert find_images(given) == [("a.jpg", Path("photos/a.jpg")), ("b.jpg", Path("photos/b.jpg"))]


def test_where_all_photographs_are_of_a_kind_that_is_not_read_that_is_said(tmp_path):
    for name in ("a.HEIC", "sub/b.heic", "c.dng"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"1 \.dng, 2 \.heic files are not read; convert them to JPEG"):
        find_images([tmp_path])


def test_links_to_folders_are_told_of_where_photographs_are_looked_for(tmp_path):
    for name in ("cat/a.png", "dog/b.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "emu").symlink_to(tmp_path)
    said = f"links to folders are not followed: {tmp_path / 'photos' / 'emu'}"
    for images in (open_tagged(tmp_path / "photos"), open_photographs(tmp_path / "photos", ())):
        assert len(images.images) == 2 and said in images.notes
