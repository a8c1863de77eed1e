"""Privacy: identifiers do not survive de-identification, and print in a corner is flagged as a row."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont
from pydicom.dataset import Dataset, FileMetaDataset

from medvlm.cli import cli
from medvlm.data.corner_text import text_in_corners
from medvlm.data.dicom import KEPT_TAGS, deidentify, identifying_tags, read_dicom, read_dicom_image
from medvlm.data.privacy import PrivacyFlag, deidentify_files, flag_pictures
from medvlm.errors import InputError, WorkspaceError
from medvlm.records import Image, VQAItem
from medvlm.store import Workspace, read_records, write_records

SECRET = "DOE^JANE"


def scan(**changes: object) -> Dataset:
    """A small CT slice with everything in it that should not be."""
    dataset = Dataset()
    dataset.PatientName = SECRET
    dataset.PatientID = "4711"
    dataset.PatientBirthDate = "19610304"
    dataset.StudyDate = "20200101"
    dataset.StudyInstanceUID = "1.2.3.4711"
    dataset.SOPInstanceUID = "1.2.3.4711.1"
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.InstitutionName = "St. Elsewhere"
    dataset.ImageComments = f"{SECRET} had a fall"
    dataset.Modality = "CT"
    dataset.add_new(0x00091001, "LO", SECRET)
    inner = Dataset()
    inner.PatientName = SECRET
    dataset.RequestAttributesSequence = [inner]
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 10
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelData = pixels.tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    for name, value in changes.items():
        setattr(dataset, name, value)
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_nothing_of_a_patient_survives(tmp_path: Path) -> None:
    source = save(scan(), tmp_path / "in" / "DOE_JANE.dcm")
    dropped = deidentify_files(source.parent, tmp_path / "out")
    assert list(dropped) == ["00000.dcm"]
    expected = {"PatientName", "PatientID", "PatientBirthDate", "StudyDate", "StudyInstanceUID", "SOPInstanceUID"}
    assert expected | {"InstitutionName", "ImageComments", "RequestAttributesSequence"} < set(dropped["00000.dcm"])
    written = (tmp_path / "out" / "00000.dcm").read_bytes()
    for secret in (b"DOE", b"JANE", b"4711", b"1961", b"2020", b"Elsewhere"):
        assert secret not in written
    safe = read_dicom(tmp_path / "out" / "00000.dcm")
    assert safe.PatientIdentityRemoved == "YES"
    assert safe.Modality == "CT"
    assert identifying_tags(safe) == []


@given(st.sampled_from(sorted(set(pydicom.datadict.keyword_dict) - KEPT_TAGS)))
def test_any_tag_that_is_not_allowed_is_dropped(keyword: str) -> None:
    dataset = scan()
    tag = pydicom.datadict.tag_for_keyword(keyword)
    assert tag is not None
    if tag >> 16 <= 2 or pydicom.datadict.dictionary_has_tag(tag) is False:
        return
    dataset.add(pydicom.DataElement(tag, "LO", SECRET, validation_mode=0))
    safe = deidentify(dataset)
    kept = {element.keyword for element in safe.dataset}
    assert kept <= KEPT_TAGS | {"SOPInstanceUID", "PatientIdentityRemoved", "DeidentificationMethod"}
    assert SECRET not in str(safe.dataset)


def test_the_same_pixels_get_the_same_id_and_others_another() -> None:
    first = deidentify(scan()).dataset.SOPInstanceUID
    assert deidentify(scan(PatientName="ROE^RICHARD")).dataset.SOPInstanceUID == first
    assert deidentify(scan(PixelData=bytes(128))).dataset.SOPInstanceUID != first
    assert deidentify(deidentify(scan()).dataset).dropped == ()


def test_the_source_is_not_changed() -> None:
    dataset = scan()
    deidentify(dataset)
    assert dataset.PatientName == SECRET


def test_pictures_come_of_deidentified_files_only(tmp_path: Path) -> None:
    source = save(scan(), tmp_path / "a.dcm")
    with pytest.raises(InputError, match=r"not de-identified: it holds .*PatientName") as refused:
        read_dicom_image(source)
    assert SECRET not in str(refused.value)
    deidentify_files(source, tmp_path / "out")
    image = read_dicom_image(tmp_path / "out" / "00000.dcm")
    with PillowImage.open(io.BytesIO(image.bytes)) as picture:
        values = np.asarray(picture)
    assert (values.shape, values.dtype, values[0, 0], values[-1, -1]) == ((8, 8), np.uint8, 0, 255)
    assert image.path == "00000.png"


def test_inverted_greys_are_turned_and_the_window_is_used(tmp_path: Path) -> None:
    inverted = deidentify(scan(PhotometricInterpretation="MONOCHROME1", WindowCenter=320, WindowWidth=10)).dataset
    image = read_dicom_image(save(inverted, tmp_path / "a.dcm"))
    with PillowImage.open(io.BytesIO(image.bytes)) as picture:
        values = np.asarray(picture)
    assert values[0, 0] == 255
    assert values[-1, -1] == 0
    assert set(np.unique(values[:3])) == {255}


def test_burned_in_text_and_missing_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="burned into"):
        deidentify(scan(BurnedInAnnotation="YES"))
    without = scan()
    del without.PixelData
    with pytest.raises(InputError, match="no pixels"):
        deidentify(without)
    save(scan(), tmp_path / "in" / "a.dcm")
    save(scan(BurnedInAnnotation="YES"), tmp_path / "in" / "b.dcm")
    with pytest.raises(InputError, match="burned into"):
        deidentify_files(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not dicom", bytes(128) + b"DICM" + b"\xff" * 9])
def test_what_is_no_dicom_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.dcm|no pixels"):
        deidentify_files(path, tmp_path / "out")
    with pytest.raises(InputError, match="no DICOM file"):
        deidentify_files(tmp_path / "out", tmp_path / "out2")


@given(st.binary(min_size=1, max_size=4), st.integers(132, 900), st.integers(132, 1100))
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_damaged_file_is_refused_or_read_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int, length: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = save(scan(), folder / "a.dcm").read_bytes()
    (folder / "a.dcm").write_bytes((content[:place] + noise + content[place + len(noise) :])[:length])
    try:
        deidentify_files(folder / "a.dcm", folder / "out")
        read_dicom_image(folder / "out" / "00000.dcm")
    except InputError as error:
        assert error.hint


def phantom(width: int = 512, height: int = 512) -> PillowImage.Image:
    """A bright ellipse with blobs on black: anatomy without print."""
    rng = np.random.default_rng(width)
    noise = rng.normal(0, 6, (height, width))
    picture = PillowImage.fromarray((noise + 20).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width // 8, height // 8, width * 7 // 8, height * 7 // 8), fill=150)
    for x, y in rng.uniform(0.3, 0.7, (6, 2)):
        draw.ellipse((x * width, y * height, x * width + width // 20, y * height + width // 20), fill=220)
    return picture


def printed(text: str, corner: str, *, size: tuple[int, int] = (512, 512), fill: int = 255) -> PillowImage.Image:
    picture = phantom(*size)
    font = ImageFont.load_default(size=max(10, size[0] // 32))
    anchor = {"top_left": "la", "top_right": "ra", "bottom_left": "ld", "bottom_right": "rd"}[corner]
    place = (6 if "left" in corner else size[0] - 6, 6 if "top" in corner else size[1] - 6)
    ImageDraw.Draw(picture).text(place, text, fill=fill, font=font, anchor=anchor)
    return picture


@pytest.mark.parametrize("corner", ["top_left", "top_right", "bottom_left", "bottom_right"])
@pytest.mark.parametrize("size", [(256, 256), (512, 512), (1600, 1200)])
def test_print_in_a_corner_is_found_where_it_is(corner: str, size: tuple[int, int]) -> None:
    (region,) = text_in_corners(printed("DOE JANE 4711", corner, size=size))
    assert region.corner == corner
    assert region.letters >= 4
    left, top, right, bottom = region.box
    assert (right < size[0] * 0.5) == ("left" in corner)
    assert (bottom < size[1] * 0.25) == ("top" in corner)
    assert left < right
    assert top < bottom


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (1600, 1200), (16, 16), (1, 1), (2000, 3)])
def test_anatomy_and_tiny_pictures_are_not_print(size: tuple[int, int]) -> None:
    assert text_in_corners(phantom(*size)) == []


def test_a_side_marker_is_not_a_name() -> None:
    assert text_in_corners(printed("L", "top_right")) == []


def test_dark_print_on_light_ground_is_found() -> None:
    from PIL import ImageOps

    assert [r.corner for r in text_in_corners(ImageOps.invert(printed("DOE JANE", "top_left")))] == ["top_left"]


def item(name: str, picture: PillowImage.Image | None) -> VQAItem:
    buffer = io.BytesIO()
    if picture is not None:
        picture.save(buffer, "PNG")
    return VQAItem(
        item_id=name,
        benchmark="vqa-rad",
        split="test",
        image=Image(buffer.getvalue(), "a.png"),
        image_id=name,
        image_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        image_phash="0" * 16,
        question="What?",
        answer="yes",
        answer_type="closed",
        answer_type_derived=False,
        question_type="",
        modality="ct",
        organ="",
        language="en",
    )


def test_flags_are_rows_once_a_picture(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    named = item("named", printed("DOE JANE 4711", "bottom_left"))
    rows = [item("clean", phantom()), named, dataclasses.replace(named, item_id="again"), item("lost", None)]
    write_records(workspace.items("vqa-rad"), VQAItem, rows)
    report = flag_pictures(workspace)
    assert report.counts == {"pictures": 3, "flagged": 2}
    flags = read_records(workspace.privacy_flags, PrivacyFlag)
    assert [(flag.table, flag.row_id, flag.reason, flag.corner) for flag in flags] == [
        ("benchmarks/vqa-rad", "named", "text_in_corner", "bottom_left"),
        ("benchmarks/vqa-rad", "lost", "undecodable", ""),
    ]
    assert flag_pictures(workspace).fingerprint == report.fingerprint


def test_an_empty_workspace_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="medvlm fetch"):
        flag_pictures(Workspace(tmp_path))


def test_the_verb_prints_counts_and_tags(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    write_records(workspace.items("vqa-rad"), VQAItem, [item("clean", phantom())])
    start = ["--workspace", str(workspace.root), "privacy"]
    shown = CliRunner().invoke(cli, [*start, "flag"], catch_exceptions=False).stdout
    assert "0 of       1 pictures flagged  benchmarks/vqa-rad" in shown
    assert json.loads(CliRunner().invoke(cli, [*start, "flag", "--json"]).stdout)["pictures"] == 1
    source = save(scan(), tmp_path / "a.dcm")
    arguments = [*start, "deidentify", str(source), str(tmp_path / "out")]
    shown = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    assert "00000.dcm: " in shown
    assert SECRET not in shown
    assert json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)["files"] == 1


def test_real_pictures_are_flagged_where_people_see_print(real_data: Path) -> None:
    from medvlm.data.benchmarks import read_benchmark

    pictures = {i.image_id: i.image.bytes for i in read_benchmark("vqa-rad", real_data / "vqa-rad")}
    some = [pictures[name] for name in sorted(pictures)[:40]]
    flagged = [bool(text_in_corners(PillowImage.open(io.BytesIO(data)))) for data in some]
    # Nearly all carry the archive's name, its address and the uploader's.
    assert sum(flagged) >= 38
