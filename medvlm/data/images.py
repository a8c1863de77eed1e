"""Foreign image bytes, decoded for real: no bomb, no truncated file, no surprise later in training."""

from __future__ import annotations

import hashlib
import io
import warnings

from PIL import Image as PillowImage

from medvlm.errors import InputError

__all__ = ["MAX_PIXELS", "decode_image", "image_hashes"]

MAX_PIXELS = 64 * 2**20
"""An image with more pixels is refused before it is decoded."""


def decode_image(data: bytes) -> PillowImage.Image:
    """The image of encoded bytes, fully decoded, in its own mode.

    Raises:
        InputError: The bytes are no image, are truncated, or hold more than ``MAX_PIXELS`` pixels.
    """
    where = f"an image of {len(data)} bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PillowImage.DecompressionBombWarning)
            image = PillowImage.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise InputError(
                f"the image has {image.width} x {image.height} pixels, more than {MAX_PIXELS}",
                where=where,
                hint="shrink it first",
            )
        image.load()
    except PillowImage.UnidentifiedImageError as error:
        raise InputError(
            "the image does not decode: its format is not known", where=where, hint="fetch it again"
        ) from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        PillowImage.DecompressionBombError,
        PillowImage.DecompressionBombWarning,
    ) as error:
        raise InputError(f"the image does not decode: {error}", where=where, hint="fetch it again") from error
    return image


def image_hashes(data: bytes) -> tuple[str, str]:
    """SHA-256 of the bytes, and the 64-bit perceptual hash of the picture as 16 hex digits.

    Raises:
        InputError: The bytes do not decode.
    """
    import imagehash

    picture = decode_image(data).convert("RGB")
    return hashlib.sha256(data).hexdigest(), str(imagehash.phash(picture))
