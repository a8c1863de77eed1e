"""Image files that people give: decoded behind the guard that figures have, without what is written in their tags."""

from __future__ import annotations

import io

from PIL import Image as PillowImage

from medvlm.data.dicom import dicom_picture
from medvlm.data.images import decode_image
from medvlm.errors import InputError

__all__ = ["MAX_UPLOAD_BYTES", "open_upload"]

MAX_UPLOAD_BYTES = 20 * 2**20

# What a decoder says of how pixels are stored. Anything else in a file is text, and may name somebody.
_OF_THE_PICTURE = {
    "adobe", "adobe_transform", "aspect", "background", "compression", "dpi", "duration", "extension", "gamma",
    "icc_profile", "interlace", "jfif", "jfif_density", "jfif_unit", "jfif_version", "loop", "progression",
    "progressive", "srgb", "chromaticity", "timestamp", "transparency", "version",
}  # fmt: skip


def open_upload(data: bytes, name: str) -> bytes:
    """An image that a model may read: the bytes as they are where they hold a picture alone, else its pixels as PNG.

    Nothing is written down. Of a DICOM file, and of one with EXIF, comments or other text, only the pixels go on.

    Args:
        data: The whole file.
        name: Of the file, for messages.

    Raises:
        InputError: It is no image, is damaged, or is too large.
    """
    if len(data) > MAX_UPLOAD_BYTES:
        raise InputError(
            f"the file has {len(data):,} bytes, more than {MAX_UPLOAD_BYTES:,}", where=name, hint="shrink it first"
        )
    if data[128:132] == b"DICM":
        return dicom_picture(data, name).bytes
    try:
        image = decode_image(data)
    except InputError as error:
        raise InputError(error.what, where=name, hint="give a PNG, JPEG, TIFF or DICOM file") from error
    # A TIFF's tags are in no list that could be gone through: none of them goes on.
    return data if image.format != "TIFF" and image.info.keys() <= _OF_THE_PICTURE else _pixels(image)


def _pixels(image: PillowImage.Image) -> bytes:
    """The picture as PNG, with nothing that a file can say beside it."""
    kept = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
    bare = image.copy() if image.mode in kept else image.convert("RGB")
    bare.info = {name: value for name, value in image.info.items() if name == "transparency"}
    out = io.BytesIO()
    bare.save(out, "PNG")
    return out.getvalue()
