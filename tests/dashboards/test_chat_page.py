"""The chat page: streamed answers, two models side by side, and preferences that are kept."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from dicom_factory import dicom
from image_bombs import bomb
from streamlit.testing.v1 import AppTest
from test_pages import open_page
from workspace_builder import HOSTILE

from medvlm.errors import InputError
from medvlm.records import Turn
from medvlm.review import saved_preferences
from medvlm.serving.chat import Sampling
from medvlm.store import Workspace, write_json


class Parrot:
    """Stands for a checkpoint: answers with its folder's name and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.parents[1].name

    def stream(self, image: bytes, turns: Sequence[Turn], sampling: object, *, stop: threading.Event) -> Iterator[str]:
        if "too long" in turns[-1].text:
            raise InputError("the conversation has 999 tokens", where="the conversation", hint="begin a new one")
        pieces = [f"{self.name} ", f"after {len(turns)} turns: ", turns[-1].text]
        return (piece for piece in pieces)


@pytest.fixture
def workspace(built_workspace: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(built_workspace, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy")
    for stage in (2, 3):
        write_json(workspace.checkpoint("tiny-llava-med", stage) / "metadata.json", {"stage": stage})
    return workspace


@pytest.fixture
def chat(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    monkeypatch.setattr("medvlm.serving.chat.ChatModel.load", Parrot)

    def opened(**state: object) -> AppTest:
        return open_page("chat", workspace.root, monkeypatch, **state)

    return opened


def ask(page: AppTest, question: str) -> list[str]:
    page.chat_input[0].set_value(question).run()
    assert not page.exception
    return [text.value for text in page.text]


def test_a_conversation_goes_on_turn_by_turn(chat: Callable[..., AppTest]) -> None:
    page = chat()
    assert page.selectbox(key="first-model").options == ["tiny-llava-med · stage 3", "tiny-llava-med · stage 2"]
    assert ask(page, "What?") == ["What?", "stage3 after 1 turns: What?"]
    assert ask(page, HOSTILE)[2:] == [HOSTILE, f"stage3 after 3 turns: {HOSTILE}"]
    next(button for button in page.button if button.label == "New conversation").click().run()
    assert [text.value for text in page.text] == []


def test_a_corrected_answer_is_a_preference(chat: Callable[..., AppTest], workspace: Workspace) -> None:
    page = chat()
    ask(page, "What?")
    page.text_area(key="better-0").set_value("A nodule.")
    page.button(key="save-0-0").click().run()
    (pair,) = saved_preferences(workspace)
    assert (pair.question, pair.chosen, pair.rejected) == ("What?", "A nodule.", "stage3 after 1 turns: What?")
    assert pair.image.bytes.startswith(b"\x89PNG")
    assert any("it was saved" in caption.value for caption in page.caption)


def test_an_empty_correction_is_refused_on_the_page(chat: Callable[..., AppTest], workspace: Workspace) -> None:
    page = chat()
    ask(page, "What?")
    page.button(key="save-0-0").click().run()
    assert "two different answers" in page.error[0].value
    assert saved_preferences(workspace) == []


def test_a_thumb_between_two_models_is_a_preference(chat: Callable[..., AppTest], workspace: Workspace) -> None:
    page = chat()
    page.selectbox(key="second-model").select("tiny-llava-med · stage 2").run()
    assert ask(page, "What?") == ["What?", "stage3 after 1 turns: What?", "stage2 after 1 turns: What?"]
    page.button(key="thumb-0-1").click().run()
    (pair,) = saved_preferences(workspace)
    assert (pair.chosen[:6], pair.rejected[:6]) == ("stage2", "stage3")


def test_a_question_that_cannot_be_asked_is_said_and_forgotten(chat: Callable[..., AppTest]) -> None:
    page = chat()
    ask(page, "this is too long")
    assert "999 tokens" in page.error[0].value
    assert ask(page, "What?")[-1] == "stage3 after 1 turns: What?"


def test_an_upload_that_is_no_image_is_said(chat: Callable[..., AppTest]) -> None:
    page = chat(origin="Upload")
    assert "Choose or upload" in page.info[0].value
    page.file_uploader[0].set_value(("scan.png", b"<svg onload=alert(1)>", "image/png")).run()
    assert not page.exception
    assert "does not decode" in page.warning[0].value


def test_a_liked_answer_is_compared_with_another_of_the_same_model(
    chat: Callable[..., AppTest], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Sampling] = []

    def drawn(self: Parrot, image: bytes, turns: Sequence[Turn], sampling: Sampling, **_: object) -> Iterator[str]:
        calls.append(sampling)
        yield from (f"answer {len(calls)} ", f"to {len(turns)} turns")

    monkeypatch.setattr(Parrot, "stream", drawn)
    page = chat()
    ask(page, "What?")
    page.button(key="like-0").click().run()
    assert [text.value for text in page.text] == ["What?", "answer 1 to 1 turns", "answer 2 to 1 turns"]
    assert calls[0].temperature == 0 < calls[1].temperature
    page.button(key="thumb-0-0").click().run()
    (pair,) = saved_preferences(workspace)
    assert (pair.chosen, pair.rejected) == ("answer 1 to 1 turns", "answer 2 to 1 turns")
    assert "You preferred the first answer." in [caption.value for caption in page.caption]
    # The second draw was for the comparison only; the conversation goes on with the first.
    ask(page, "Where?")
    assert page.text[-1].value == "answer 3 to 3 turns"


def test_a_dicom_upload_loses_its_patient_before_anything_else(
    chat: Callable[..., AppTest], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def looked(self: Parrot, image: bytes, *_: object, **__: object) -> Iterator[str]:
        seen.append(image)
        yield "A slice."

    monkeypatch.setattr(Parrot, "stream", looked)
    page = chat(origin="Upload")
    page.file_uploader[0].set_value(("Doe_Jane_1970.dcm", dicom(), "application/dicom")).run()
    ask(page, "What?")
    page.text_area(key="better-0").set_value("A phantom.")
    page.button(key="save-0-0").click().run()
    (pair,) = saved_preferences(workspace)
    assert seen[0] == pair.image.bytes
    assert pair.image.bytes.startswith(b"\x89PNG")
    kept = b"".join(path.read_bytes() for path in workspace.review.rglob("*") if path.is_file())
    for secret in (b"Doe", b"Jane", b"12345"):
        assert secret not in pair.image.bytes + pair.image.path.encode() + kept


def test_an_upload_with_burned_in_text_is_refused(chat: Callable[..., AppTest]) -> None:
    page = chat(origin="Upload")
    data = dicom(BurnedInAnnotation="YES")
    page.file_uploader[0].set_value(("a.dcm", data, "application/dicom")).run()
    assert "burned into its pixels" in page.warning[0].value
    assert "Choose or upload" in page.info[0].value


def test_zooming_keeps_the_conversation(chat: Callable[..., AppTest]) -> None:
    page = chat()
    ask(page, "What?")
    page.select_slider(key="zoom-chat").set_value(4).run()
    page.slider(key="across-chat").set_value(100).run()
    assert not page.exception
    assert page.text[0].value == "What?"


def test_a_bomb_is_refused_and_the_page_goes_on(chat: Callable[..., AppTest]) -> None:
    page = chat(origin="Upload")
    page.file_uploader[0].set_value(("large.png", bomb(), "image/png")).run()
    assert "300000000 pixels" in page.warning[0].value
    page.segmented_control(key="origin").set_value("From the workspace").run()
    assert ask(page, "What?")[-1].endswith("What?")


def test_half_a_checkpoint_is_one_readable_message(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page("chat", workspace.root, monkeypatch)
    page.chat_input[0].set_value("What?").run()
    assert not page.exception
    assert len(page.error) == 1
    assert "checkpoint" in page.text[-1].value
