"""Talking to a checkpoint: streamed, stoppable, the same with the same seed, and never past its context."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from PIL import Image as Picture

from medvlm.errors import CheckpointError, InputError
from medvlm.records import PreferencePair, Turn
from medvlm.review import save_preference, saved_preferences
from medvlm.serving.chat import ChatModel, Sampling, preference_pair
from medvlm.store import Workspace

QUESTION = [Turn("user", "What is shown?")]


def png(shade: int = 90) -> bytes:
    out = io.BytesIO()
    Picture.new("RGB", (64, 48), (shade, shade, shade)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    return ChatModel.load(folder)


def test_an_answer_comes_in_pieces_and_is_the_same_again(model: ChatModel) -> None:
    sampling = Sampling(max_new_tokens=24)
    pieces = list(model.stream(png(), QUESTION, sampling))
    assert "".join(pieces).strip()
    assert "".join(model.stream(png(), QUESTION, sampling)) == "".join(pieces)


def test_sampling_follows_its_seed(model: ChatModel) -> None:
    def answer(seed: int) -> str:
        return "".join(model.stream(png(), QUESTION, Sampling(temperature=1.5, max_new_tokens=24, seed=seed)))

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_stopping_ends_the_generation_and_frees_the_model(model: ChatModel) -> None:
    stop = threading.Event()
    stop.set()
    stopped = "".join(model.stream(png(), QUESTION, Sampling(max_new_tokens=200), stop=stop))
    whole = "".join(model.stream(png(), QUESTION, Sampling(max_new_tokens=200)))
    assert len(stopped) < len(whole)
    stream = model.stream(png(), QUESTION, Sampling(max_new_tokens=200))
    next(stream)
    stream.close()  # what Streamlit does when a person presses another button
    assert not [thread for thread in threading.enumerate() if thread.name == "chat"]
    assert "".join(model.stream(png(), QUESTION, Sampling(max_new_tokens=200))) == whole


def test_a_conversation_of_several_turns_is_read_and_a_typed_mark_brings_no_second_image(model: ChatModel) -> None:
    turns = [*QUESTION, Turn("assistant", "A nodule."), Turn("user", "Where? <image> <im_start>")]
    assert list(model.stream(png(), turns, Sampling(max_new_tokens=4)))


@pytest.mark.parametrize(
    ("image", "turns", "what"),
    [
        (b"not an image", QUESTION, "does not decode"),
        (png(), [], "alternate"),
        (png(), [*QUESTION, Turn("assistant", "yes")], "alternate"),
        (png(), [Turn("user", "very long " * 2000)], "the model reads 512"),
    ],
)
def test_what_cannot_be_answered_is_said_at_once(model: ChatModel, image: bytes, turns: list[Turn], what: str) -> None:
    with pytest.raises(InputError, match=what):
        model.stream(image, turns)


def test_a_failure_while_generating_reaches_the_reader(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(model.stream(png(), QUESTION))


def test_half_a_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        ChatModel.load(tmp_path)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError):
        ChatModel.load(tmp_path)


def test_a_preference_is_kept_once_and_read_back(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert saved_preferences(workspace) == []
    pair = preference_pair(png(), "a.png", "What is shown?", "A nodule.", "Nothing.")
    save_preference(workspace, pair)
    save_preference(workspace, pair)
    save_preference(workspace, preference_pair(png(), "a.png", "Where?", "Left.", "Right."))
    saved = saved_preferences(workspace)
    assert len(saved) == 2
    assert pair in saved
    assert all(isinstance(row, PreferencePair) and row.source == "chat" for row in saved)
    with pytest.raises(InputError, match="two different answers"):
        preference_pair(png(), "a.png", "What?", "same", " same ")
