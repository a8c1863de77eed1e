"""`medvlm chat` and `medvlm serve`, as a person or a process manager calls them."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import openai
import pytest
from click.testing import CliRunner, Result
from dicom_factory import dicom
from PIL import Image as Picture
from PIL.PngImagePlugin import PngInfo
from test_chat import png

from medvlm.cli import cli
from medvlm.errors import InputError, MedVLMError
from medvlm.serving.uploads import MAX_UPLOAD_BYTES, open_upload

NAME = "tiny-llava-med"


def run(*arguments: str, given: str = "") -> Result:
    return CliRunner().invoke(cli, arguments, input=given, catch_exceptions=True)


@pytest.fixture
def image(tmp_path: Path) -> str:
    (tmp_path / "scan.png").write_bytes(png())
    return str(tmp_path / "scan.png")


def test_one_question_is_answered_on_standard_output(folder: Path, image: str) -> None:
    asked = ("chat", "--checkpoint", str(folder), "--image", image, "--question", "What is shown?", "--max-tokens", "9")
    plain, as_json = run(*asked), run(*asked, "--json")
    assert plain.exit_code == as_json.exit_code == 0
    assert "Research use only" in plain.stderr
    said = json.loads(as_json.stdout)
    assert (said["model"], said["image"]) == (NAME, image)
    assert [turn["role"] for turn in said["turns"]] == ["user", "assistant"]
    assert said["turns"][0]["text"] == "What is shown?"
    assert said["turns"][1]["text"] == plain.stdout.strip()
    assert said["turns"][1]["text"]


def test_questions_from_a_pipe_are_one_conversation(folder: Path, image: str) -> None:
    result = run(
        *("chat", "--checkpoint", str(folder), "--image", image, "--max-tokens", "5", "--json"),
        given="What is shown?\n\nWhere?\n",
    )
    turns = json.loads(result.stdout)["turns"]
    assert [turn["text"] for turn in turns[::2]] == ["What is shown?", "Where?"]
    assert len(turns) == 4


@pytest.mark.parametrize(
    ("content", "question", "what"),
    [
        (b"<svg onload=alert(1)>", "What?", "does not decode"),
        (None, "What?", "cannot be read"),
        (png(), "very long " * 2000, "the model reads 512"),
        (bytes(MAX_UPLOAD_BYTES + 1), "What?", "more than 20,971,520"),
    ],
)
def test_what_cannot_be_talked_about_is_said(
    folder: Path, tmp_path: Path, content: bytes | None, question: str, what: str
) -> None:
    path = tmp_path / "scan.png"
    if content is not None:
        path.write_bytes(content)
    result = run("chat", "--checkpoint", str(folder), "--image", str(path), "--question", question)
    assert isinstance(result.exception, MedVLMError)
    assert what in str(result.exception)


def test_dicom_is_read_without_its_patient() -> None:
    picture = open_upload(dicom(), "Doe_Jane.dcm")
    assert picture.startswith(b"\x89PNG")
    assert b"Doe" not in picture
    assert b"12345" not in picture


def written(form: str) -> bytes:
    """A grey ramp of that form whose file names a patient."""
    ramp = Picture.linear_gradient("L").resize((40, 30))
    more: dict[str, object] = {}
    if form == "PNG":
        more["pnginfo"] = PngInfo()
        more["pnginfo"].add_text("Patient", "Jane Doe")
    elif form == "JPEG":
        exif = Picture.Exif()
        exif[0x010E] = "Jane Doe"
        more["exif"] = exif
    elif form == "TIFF":
        more["description"] = "Jane Doe"
    else:
        more["comment"] = b"Jane Doe"
    out = io.BytesIO()
    ramp.save(out, form, **more)
    return out.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "GIF", "WEBP"])
def test_what_is_written_beside_a_picture_does_not_go_on(form: str) -> None:
    if form == "WEBP":
        exif = Picture.Exif()
        exif[0x010E] = "Jane Doe"
        out = io.BytesIO()
        Picture.new("RGB", (8, 8), "teal").save(out, "WEBP", exif=exif)
        data = out.getvalue()
    else:
        data = written(form)
    assert b"Jane" in data
    bare = open_upload(data, "scan")
    assert b"Jane" not in bare
    before, after = (Picture.open(io.BytesIO(part)).convert("RGB") for part in (data, bare))
    assert before.tobytes() == after.tobytes()
    assert open_upload(bare, "scan") == bare  # a picture alone goes on as it is


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (dicom(BurnedInAnnotation="YES"), "burned into its pixels"),
        (dicom(Rows=60_000, Columns=60_000), "60000 x 60000 pixels"),
        (dicom(NumberOfFrames=1_000_000), "1000000 frames"),
        (dicom()[:300], "DICOM"),
        (dicom().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99", 1), "deflated"),
        (bytes(128) + b"DICM" + b"\xff" * 99, "DICOM"),
    ],
)
def test_dicom_that_is_not_safe_or_sound_is_refused(data: bytes, what: str) -> None:
    with pytest.raises(InputError, match=what):
        open_upload(data, "a.dcm")


def test_serving_to_other_machines_needs_a_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDVLM_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        result = run("serve", "--checkpoint", str(folder), "--host", host)
        assert "no API key is set" in str(result.exception)


def test_a_missing_checkpoint_is_said_before_anything_is_served(tmp_path: Path) -> None:
    result = run("serve", "--checkpoint", str(tmp_path))
    assert "there is no finished checkpoint" in str(result.exception)


def started(command: Sequence[str], **environment: str) -> tuple[subprocess.Popen[str], str]:
    """The process and the address that it says."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert process.stderr
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return process, found.group()
    raise AssertionError("".join(lines))


def test_sigterm_lets_the_answer_that_is_streamed_come_to_its_end(folder: Path) -> None:
    command = [sys.executable, "-m", "medvlm.cli", "serve", "--checkpoint", str(folder), "--port", "0"]
    process, url = started(command, MEDVLM_API_KEY="k")
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            stream = iter(
                client.chat.completions.create(
                    model=NAME, messages=[{"role": "user", "content": "What?"}], max_tokens=300, stream=True
                )
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            last = list(stream)[-1]
        assert last.choices[0].finish_reason == "length"
        assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn passes the signal on when all is done
    finally:
        process.kill()
        process.communicate()
