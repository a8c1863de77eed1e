"""Figure files of every kind that journals deposit, as images to store."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
from bucket_server import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from medvlm.data import figure_image
from medvlm.data.figure_image import TooManyPixels, prepare_figure
from medvlm.data.images import image_hashes


def encoded(image: PillowImage.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def gradient(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> PillowImage.Image:
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    return PillowImage.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1)).convert(mode)


def opened(data: bytes) -> PillowImage.Image:
    image = PillowImage.open(io.BytesIO(data))
    image.load()
    return image


SIXTEEN_BIT = PillowImage.fromarray(np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16))


@pytest.mark.parametrize(
    "data",
    [
        encoded(gradient(), "JPEG"),
        encoded(gradient("L"), "JPEG"),
        encoded(gradient(), "JPEG", progressive=True),
        encoded(gradient(), "PNG"),
        encoded(gradient("L"), "PNG"),
    ],
    ids=["jpeg", "grey jpeg", "progressive", "png", "grey png"],
)
def test_what_can_be_stored_keeps_its_bytes(data: bytes) -> None:
    stored = prepare_figure(data, max_side_px=64)
    assert stored.bytes == data
    assert (stored.width_px, stored.height_px) == (60, 40)


@pytest.mark.parametrize(
    "data",
    [
        encoded(gradient("CMYK"), "JPEG"),
        encoded(gradient(), "TIFF"),
        encoded(gradient("CMYK"), "TIFF"),
        encoded(gradient(), "TIFF", compression="tiff_lzw"),
        encoded(gradient("P"), "PNG"),
        encoded(gradient("1"), "PNG"),
        encoded(gradient("RGBA"), "PNG"),
        encoded(gradient("LA"), "PNG"),
        encoded(SIXTEEN_BIT, "PNG"),
        encoded(SIXTEEN_BIT, "TIFF"),
        encoded(gradient(), "BMP"),
        encoded(gradient(), "WEBP"),
        encoded(gradient(), "GIF"),
        encoded(PillowImage.fromarray(np.linspace(-1, 1, 2400, dtype=np.float32).reshape(40, 60)), "TIFF"),
    ],
    ids=[
        "cmyk jpeg", "tiff", "cmyk tiff", "lzw tiff", "palette", "bilevel", "alpha", "grey alpha", "16-bit png",
        "16-bit tiff", "bmp", "webp", "gif", "float tiff",
    ],
)  # fmt: skip
def test_everything_else_becomes_an_rgb_jpeg(data: bytes) -> None:
    stored = prepare_figure(data, max_side_px=64)
    image = opened(stored.bytes)
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (60, 40))
    assert np.asarray(image).std() > 5  # and is not one flat colour


def test_sixteen_bits_keep_their_range() -> None:
    for top in (65535, 4095, 1023):
        values = np.linspace(0, top, 2400).reshape(40, 60).astype(np.uint16)
        grey = np.asarray(opened(prepare_figure(encoded(PillowImage.fromarray(values), "TIFF"), max_side_px=64).bytes))
        assert grey.min() <= 3
        assert grey.max() >= 252


def rgb_png_of_16_bits() -> bytes:
    """Pillow writes none: 2 x 1 pixels, by hand."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    row = b"\0" + bytes([255, 255, 0, 0, 0, 0]) + bytes([0, 0, 255, 255, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


def test_a_48_bit_png_is_not_kept_as_it_is() -> None:
    assert opened(prepare_figure(rgb_png_of_16_bits(), max_side_px=64).bytes).format == "JPEG"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(orientation: int) -> None:
    image = PillowImage.new("RGB", (60, 40), "black")
    image.paste("red", (0, 0, 20, 20))
    exif = PillowImage.Exif()
    exif[figure_image.ORIENTATION_TAG] = orientation
    stored = opened(prepare_figure(encoded(image, "JPEG", exif=exif), max_side_px=64).bytes)
    upright = {1: "lt", 2: "rt", 3: "rb", 4: "lb", 5: "lt", 6: "rt", 7: "rb", 8: "lb"}[orientation]
    x = 5 if upright[0] == "l" else stored.width - 6
    y = 5 if upright[1] == "t" else stored.height - 6
    red, green, _ = stored.convert("RGB").getpixel((x, y))  # type: ignore[misc]
    assert red > 200 > 60 > green
    assert stored.size == ((60, 40) if orientation < 5 else (40, 60))
    assert stored.getexif().get(figure_image.ORIENTATION_TAG, 1) == 1


def test_transparency_becomes_the_white_of_the_page() -> None:
    image = PillowImage.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert min(opened(prepare_figure(encoded(image, "PNG"), max_side_px=64).bytes).getpixel((20, 20))) >= 254  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("size", "stored_size"), [((200, 100), (64, 32)), ((100, 200), (32, 64)), ((64, 64), (64, 64))]
)
def test_the_longest_side_is_bounded(size: tuple[int, int], stored_size: tuple[int, int]) -> None:
    stored = prepare_figure(encoded(gradient(size=size), "JPEG"), max_side_px=64)
    assert (stored.width_px, stored.height_px) == stored_size == opened(stored.bytes).size


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "GIF"])
@pytest.mark.parametrize("kept", [0, 1, 20, 0.5, 0.9])
def test_a_truncated_file_is_refused(form: str, kept: float) -> None:
    data = picture(3, form=form)
    with pytest.raises(Exception) as caught:
        prepare_figure(data[: int(kept * len(data)) if kept < 1 else int(kept)], max_side_px=64)
    assert not isinstance(caught.value, TooManyPixels)


def test_the_pixel_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(gradient(), "PNG")
    monkeypatch.setattr(figure_image, "MAX_PIXELS", 60 * 40 - 1)
    with pytest.raises(TooManyPixels):
        prepare_figure(data, max_side_px=64)
    monkeypatch.setattr(figure_image, "MAX_PIXELS", 60 * 40)
    assert prepare_figure(data, max_side_px=64).width_px == 60


def test_the_hash_is_imagehash_on_real_figures(real_data: Path) -> None:
    compared = 0
    for path in sorted((real_data / "pmc_mirror").rglob("*.jpg")):
        data = path.read_bytes()
        if len(data) in {0, 262144}:
            continue
        for side in (2000, 300):
            stored = prepare_figure(data, max_side_px=side)
            assert (stored.sha256, stored.phash) == image_hashes(stored.bytes)
            compared += 1
    assert compared >= 50


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_hash_is_imagehash_on_noise(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (24, 31, 3), np.uint8)
    image = PillowImage.fromarray(noise)
    assert figure_image.perceptual_hash(image) == str(imagehash.phash(image))


def test_equal_files_give_equal_bytes() -> None:
    data = encoded(gradient("CMYK"), "TIFF")
    assert prepare_figure(data, max_side_px=50) == prepare_figure(data, max_side_px=50)
