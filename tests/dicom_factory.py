"""DICOM files for tests, with a made-up patient on them."""

from __future__ import annotations

import io

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset


def dicom(**tags: object) -> bytes:
    """A 12-bit slice with a patient on it."""
    dataset = Dataset()
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "12345"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 24, 32, 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PhotometricInterpretation, dataset.Modality = "MONOCHROME2", "CT"
    dataset.PixelData = (np.arange(24 * 32, dtype=np.uint16) % 4096).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
    out = io.BytesIO()
    pydicom.dcmwrite(out, dataset, enforce_file_format=True, implicit_vr=False, little_endian=True)
    return out.getvalue()
