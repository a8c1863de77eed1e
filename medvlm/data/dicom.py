"""DICOM made safe to train on: only the tags that a picture needs are kept, everything else is dropped.

An allow-list, not a block-list: a tag that nobody thought of (a private one, a comment, a device
name) cannot slip through. Pixels are not looked at here; burned-in text is what ``privacy`` flags.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from medvlm.data.images import MAX_PIXELS
from medvlm.errors import InputError
from medvlm.records import Image

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = [
    "KEPT_TAGS",
    "Deidentified",
    "deidentify",
    "dicom_picture",
    "identifying_tags",
    "read_dicom",
    "read_dicom_image",
]

# PS3.3 image pixel, modality LUT and VOI LUT modules, and what of the exam a model may know.
KEPT_TAGS = frozenset(
    (
        *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
        *("PixelSpacing", "PixelAspectRatio", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
        *("SmallestImagePixelValue", "LargestImagePixelValue", "PixelPaddingValue", "PixelData", "FloatPixelData"),
        *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
        *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
        *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
        *("RescaleIntercept", "RescaleSlope", "RescaleType", "WindowCenter", "WindowWidth", "VOILUTFunction"),
        *("PresentationLUTShape", "Modality", "BodyPartExamined", "ViewPosition", "Laterality", "ImageLaterality"),
        *("SliceThickness", "SOPClassUID", "SpecificCharacterSet", "BurnedInAnnotation"),
        *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
    )
)
_WRITTEN_HERE = frozenset(("SOPInstanceUID", "PatientIdentityRemoved", "DeidentificationMethod"))
# What pydicom raises on files that are damaged or made to be.
_PARSE_ERRORS = (
    *(OSError, EOFError, ValueError, KeyError, AttributeError, NotImplementedError, TypeError, IndexError),
    *(struct.error, RecursionError, OverflowError, MemoryError),
)
_DEFLATED = b"1.2.840.10008.1.2.1.99"
METHOD = "medvlm allow-list of image tags"


@dataclass(frozen=True)
class Deidentified:
    """A dataset that holds image tags only, and the names of what was dropped."""

    dataset: Dataset
    dropped: tuple[str, ...]


def identifying_tags(dataset: Dataset) -> list[str]:
    """Names of the tags that may identify somebody, in the dataset's order: every one that is not allowed.

    Args:
        dataset: With or without file meta information.
    """
    kept = KEPT_TAGS | _WRITTEN_HERE
    names = [element.keyword or str(element.tag) for element in dataset if element.keyword not in kept]
    if "SOPInstanceUID" in dataset and str(dataset.SOPInstanceUID) != _uid(dataset):
        names.append("SOPInstanceUID")
    return names


def deidentify(dataset: Dataset) -> Deidentified:
    """A copy that holds image tags only: no dates, names, ids, comments, sequences or private tags.

    Args:
        dataset: Not modified.

    Returns:
        The copy, whose instance UID follows from its pixels, and what was dropped.

    Raises:
        InputError: The dataset says that identifiers are burned into its pixels, or it has none.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID

    if "PixelData" not in dataset and "FloatPixelData" not in dataset:
        raise InputError("the DICOM file has no pixels", where="PixelData", hint="give image files only")
    if str(dataset.get("BurnedInAnnotation", "NO")).upper() == "YES":
        raise InputError(
            "the DICOM file says that text is burned into its pixels, which dropping tags does not remove",
            where="BurnedInAnnotation",
            hint="blank the text in the pixels first, then set the tag to NO",
        )
    dropped = tuple(identifying_tags(dataset))
    copy = Dataset()
    for element in dataset:
        if element.keyword in KEPT_TAGS:
            copy.add(element)
    copy.SOPInstanceUID = UID(_uid(copy))
    copy.PatientIdentityRemoved = "YES"
    copy.DeidentificationMethod = METHOD
    meta = FileMetaDataset()
    given: Any = getattr(dataset, "file_meta", {})
    # Of the file's own header only how the pixels are encoded: it can name the sending station.
    meta.TransferSyntaxUID = given.get("TransferSyntaxUID", "1.2.840.10008.1.2")
    meta.MediaStorageSOPClassUID = copy.get("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7")
    meta.MediaStorageSOPInstanceUID = UID(_uid(copy))
    copy.file_meta = meta
    return Deidentified(copy, dropped)


def _uid(dataset: Dataset) -> str:
    """A UID under the root for hashes (2.25) that follows from the pixels and says nothing else."""
    pixels = bytes(dataset.get("PixelData", b"") or b"") or bytes(dataset.get("FloatPixelData", b"") or b"")
    return f"2.25.{int.from_bytes(hashlib.sha256(pixels).digest()[:16])}"


def read_dicom(path: Path) -> Dataset:
    """A DICOM file's dataset.

    Raises:
        InputError: It is no DICOM file, or is damaged.
    """
    return _parsed(path, str(path))


def _parsed(source: Path | BinaryIO, where: str) -> Dataset:
    import pydicom
    from pydicom.errors import BytesLengthException, InvalidDicomError
    from pydicom.uid import AllTransferSyntaxes

    try:
        dataset = pydicom.dcmread(source)
        # Elements are parsed when they are first asked for: asked here, a damaged one fails here.
        list(dataset)
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if syntax not in AllTransferSyntaxes:
            raise ValueError(f"its transfer syntax is {syntax!r}, which the standard does not know")
        return dataset
    except (InvalidDicomError, BytesLengthException, *_PARSE_ERRORS) as error:
        raise InputError(
            f"the file is not readable DICOM: {error}", where=where, hint="give DICOM files with their preamble"
        ) from error


def dicom_picture(data: bytes, name: str) -> Image:
    """The picture of a DICOM file that somebody gave, as PNG: de-identified on the way, never written down.

    Args:
        data: The whole file.
        name: Of the file, for messages only: it may hold a patient's name.

    Raises:
        InputError: It is no DICOM file, is too large for a picture, has no pixels, or says that text is
            burned into them.
    """
    # Inflated, a small file may become a very large one, before anything in it can be looked at.
    if _DEFLATED in data:
        raise InputError(
            "the DICOM file is deflated", where=name, hint="convert it to an uncompressed transfer syntax first"
        )
    dataset = _parsed(io.BytesIO(data), name)
    pixels = [int(dataset.get(tag, 1) or 1) for tag in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")]
    if math.prod(pixels) > MAX_PIXELS:
        raise InputError(
            f"the DICOM file has {pixels[0]} x {pixels[1]} pixels in {pixels[2]} frames, more than {MAX_PIXELS}",
            where=name,
            hint="give a single slice",
        )
    return _picture(deidentify(dataset).dataset, "upload")


def read_dicom_image(path: Path) -> Image:
    """The picture of a de-identified DICOM file as PNG, windowed as the file says.

    Raises:
        InputError: Tags that may identify somebody are left, or the pixels cannot be decoded.
    """
    dataset = read_dicom(path)
    left = identifying_tags(dataset)
    if left or str(dataset.get("BurnedInAnnotation", "NO")).upper() == "YES":
        raise InputError(
            f"the DICOM file is not de-identified: it holds {', '.join(left[:8]) or 'burned-in text'}"
            + (f" and {len(left) - 8} more tags" if len(left) > 8 else ""),
            where=str(path),
            hint="run 'medvlm privacy deidentify' on it first",
        )
    return _picture(dataset, path.stem)


def _picture(dataset: Dataset, stem: str) -> Image:
    """The picture of a dataset: of several frames the middle one."""
    import numpy as np
    from PIL import Image as PillowImage
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    try:
        pixels: Any = dataset.pixel_array
    except (RuntimeError, *_PARSE_ERRORS) as error:
        raise InputError(
            f"the pixels cannot be decoded: {error}",
            where=stem,
            hint="convert it to an uncompressed transfer syntax, for example with dcmdjpeg or gdcmconv --raw",
        ) from error
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
        pixels = pixels[len(pixels) // 2]
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        pixels = pixels >> 8 if pixels.dtype.itemsize > 1 else pixels
    elif int(dataset.get("SamplesPerPixel", 1)) == 1:
        values = np.asarray(apply_voi_lut(apply_modality_lut(pixels, dataset), dataset), dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        grey = (values - low) / max(high - low, 1e-9) * 255
        inverted = dataset.get("PhotometricInterpretation") == "MONOCHROME1"
        pixels = (255 - grey if inverted else grey).round().astype(np.uint8)
    elif int(dataset.get("BitsStored", 8)) > 8:
        pixels = np.asarray(pixels) >> (int(dataset.BitsStored) - 8)
    buffer = io.BytesIO()
    PillowImage.fromarray(np.asarray(pixels, dtype=np.uint8)).save(buffer, "PNG")
    return Image(buffer.getvalue(), f"{stem}.png")
