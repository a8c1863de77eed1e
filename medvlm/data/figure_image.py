"""A published figure file as an image to store: decoded for real, upright, 8-bit, of bounded size."""

from __future__ import annotations

import functools
import hashlib
import io
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage
from PIL import ImageOps

from medvlm.data.images import MAX_PIXELS

__all__ = ["StoredImage", "TooManyPixels", "bomb_limit", "perceptual_hash", "prepare_figure"]

JPEG_QUALITY = 95
ORIENTATION_TAG = 0x0112
LARGE_PIXELS = 16 * 2**20

_large_image = threading.Lock()


class TooManyPixels(Exception):  # never leaves the fetch worker, which writes the row
    """The header promises more pixels than are ever decoded."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image as it goes into a shard."""

    bytes: bytes
    width_px: int
    height_px: int
    sha256: str
    phash: str


@contextmanager
def bomb_limit() -> Generator[None]:
    """Let ``prepare_figure`` alone judge the size of images, in every thread.

    Pillow's own warning cannot be caught per thread; its error above 179 megapixels stays.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PillowImage.DecompressionBombWarning)
        yield


def prepare_figure(data: bytes, *, max_side_px: int) -> StoredImage:
    """A figure's image to store, with its hashes.

    The published bytes are kept where they already are an upright 8-bit JPEG or PNG, grey or RGB,
    of bounded size. Everything else (TIFF, CMYK, 16 bit, palette, alpha, rotated by EXIF, too
    large) becomes an RGB JPEG; transparency becomes white, as on the page.

    Args:
        data: The file as published.
        max_side_px: Longest side of the stored image.

    Raises:
        TooManyPixels: It has more than ``MAX_PIXELS`` pixels.
        Exception: Whatever Pillow raises for a broken or truncated file.
    """
    try:
        image: PillowImage.Image = PillowImage.open(io.BytesIO(data))
    except PillowImage.DecompressionBombError as error:
        raise TooManyPixels(str(error)) from error
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise TooManyPixels(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    if pixels <= LARGE_PIXELS:
        return _prepare(image, data, max_side_px)
    with _large_image:  # one at a time: each takes hundreds of megabytes
        return _prepare(image, data, max_side_px)


def _prepare(image: PillowImage.Image, data: bytes, max_side_px: int) -> StoredImage:
    keep = _storable(image) and max(image.size) <= max_side_px
    image.load()
    if not keep:
        picture = _rgb(ImageOps.exif_transpose(image))
        picture.thumbnail((max_side_px, max_side_px), PillowImage.Resampling.LANCZOS)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        data = stream.getvalue()
        image = PillowImage.open(io.BytesIO(data))
    return StoredImage(
        bytes=data,
        width_px=image.width,
        height_px=image.height,
        sha256=hashlib.sha256(data).hexdigest(),
        phash=perceptual_hash(image),
    )


def _storable(image: PillowImage.Image) -> bool:
    if image.format not in {"JPEG", "PNG"} or image.mode not in {"L", "RGB"} or getattr(image, "n_frames", 1) > 1:
        return False
    if image.format == "PNG" and ("transparency" in image.info or any("16" in str(tile) for tile in _tiles(image))):
        return False
    return image.getexif().get(ORIENTATION_TAG, 1) == 1


def _tiles(image: PillowImage.Image) -> list[Any]:
    """Raw modes of the file: 48-bit PNGs say RGB as their mode and ``RGB;16B`` here."""
    return [tile[3] for tile in getattr(image, "tile", [])]


def _rgb(image: PillowImage.Image) -> PillowImage.Image:
    if image.mode.startswith(("I", "F")):
        return PillowImage.fromarray(_eight_bit(np.asarray(image))).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        layered = image.convert("RGBA")
        page = PillowImage.new("RGBA", layered.size, "white")
        return PillowImage.alpha_composite(page, layered).convert("RGB")
    return image.convert("RGB")


def _eight_bit(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Grey levels of 0 to 255. The range is the file's own: scanners store 10 or 12 bits in 16."""
    finite = np.nan_to_num(values.astype(np.float32))
    low, high = min(float(finite.min()), 0.0), float(finite.max())
    if low >= 0 and high <= 255:
        return finite.astype(np.uint8)
    return ((finite - low) * (255.0 / (high - low))).round().astype(np.uint8)


def perceptual_hash(image: PillowImage.Image) -> str:
    """64-bit DCT hash as 16 hex digits, equal to ``imagehash.phash`` of the RGB picture."""
    rgb = image if image.mode in {"L", "RGB"} else image.convert("RGB")
    grey = rgb.convert("L").resize((32, 32), PillowImage.Resampling.LANCZOS)
    basis = _cosines()
    frequencies = (basis @ np.asarray(grey, np.float64) @ basis.T).ravel()
    bits = frequencies > np.median(frequencies)
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


@functools.cache
def _cosines() -> npt.NDArray[np.float64]:
    """The first eight rows of the 32-point DCT-II, as scipy scales it."""
    k, n = np.arange(8)[:, None], np.arange(32)[None, :]
    return 2 * np.cos(np.pi * k * (2 * n + 1) / 64)
