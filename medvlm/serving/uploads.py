"""Image files that people give: decoded behind the guard that figures have, DICOM without its patient."""

from __future__ import annotations

from medvlm.data.dicom import dicom_picture
from medvlm.data.images import decode_image
from medvlm.errors import InputError

__all__ = ["MAX_UPLOAD_BYTES", "open_upload"]

MAX_UPLOAD_BYTES = 20 * 2**20


def open_upload(data: bytes, name: str) -> bytes:
    """An image that a model may read: the bytes as they are, or a DICOM file's picture as PNG.

    Nothing is written down, and of a DICOM file nothing but its pixels goes on.

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
        decode_image(data)
    except InputError as error:
        raise InputError(error.what, where=name, hint="give a PNG, JPEG, TIFF or DICOM file") from error
    return data
