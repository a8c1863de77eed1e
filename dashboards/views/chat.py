"""A conversation with one checkpoint, or two side by side; thumbs and corrections feed the next preference set."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from dashboards.access import allowed_to_write, person
from dashboards.frame import empty, escaped, foreign_text, results, show, stamp, zoomable
from medvlm.errors import InputError, MedVLMError
from medvlm.records import Turn
from medvlm.results import Results
from medvlm.review import save_preference

if TYPE_CHECKING:
    from medvlm.serving.chat import ChatModel, Sampling

NONE = "none"
KINDS = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "dcm", "dicom"]


@dataclass
class Conversation:
    """What was said about one image, by one or two models."""

    image: bytes
    name: str
    models: tuple[str, ...]
    questions: list[str] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)
    """For each question one answer a model; shorter while an answer is being made."""
    judged: dict[int, str] = field(default_factory=dict)
    """Question number → what was said about its answers."""
    other: dict[int, str] = field(default_factory=dict)
    """Question number → a second answer of the only model, drawn to be compared with the first."""

    def turns(self, model: int) -> list[Turn]:
        """The conversation as one model has seen it, up to the open question."""
        turns: list[Turn] = []
        for question, given in zip(self.questions, self.answers, strict=True):
            turns.append(Turn("user", question))
            if model < len(given):
                turns.append(Turn("assistant", given[model]))
        return turns


@st.cache_resource(max_entries=2, show_spinner="Loading the checkpoint …")
def _model(folder: str, changed: int) -> ChatModel:
    del changed
    from medvlm.serving.chat import ChatModel

    return ChatModel.load(Path(folder))


@st.cache_data(max_entries=8, show_spinner="Finding images …")
def _examples(at: str, root: str, source: str) -> list[str]:
    del at
    table = Results(Path(root)).source(source)
    return table.ids(limit=200) if table else []


def loaded(label: str) -> ChatModel:
    """The model of a checkpoint; loaded anew when the checkpoint has changed."""
    folder = results().checkpoints()[label]
    return _model(str(folder), (folder / "metadata.json").stat().st_mtime_ns)


def _image() -> tuple[bytes, str] | None:
    """The image to talk about: an uploaded one, or one of the workspace."""
    origin = st.segmented_control(
        "Image", ["From the workspace", "Upload"], default="From the workspace", required=True, key="origin"
    )
    if origin == "Upload":
        return _uploaded()
    reader = results()
    names = [source.name for source in reader.sources() if source.kind in ("items", "figures")]
    if not names:
        st.caption("The workspace has no images yet.")
        return None
    name = st.selectbox("Of", names, key="example-source")
    example = st.selectbox("Which", _examples(stamp(), str(reader.workspace.root), name), key=f"example-{name}")
    source = reader.source(name)
    row = source.by_id([example]).get(example) if source and example else None
    if row and row.get("split") == "test":
        st.caption("An image to test with: the next preference dataset leaves out what is said about it.")
    return (row["image"]["bytes"], str(row["image"]["path"])) if row else None


def _uploaded() -> tuple[bytes, str] | None:
    """An uploaded image, held in memory only; of a DICOM file nothing but the picture."""
    from medvlm.serving.uploads import MAX_UPLOAD_BYTES, open_upload

    file = st.file_uploader(
        "An image, without patient names on it",
        type=KINDS,
        key="upload",
        max_upload_size=MAX_UPLOAD_BYTES // 2**20,
        help="Of a DICOM file only the pixels are kept; every other tag is dropped.",
    )
    if file is None:
        return None
    opened: tuple[str, bytes] | None = st.session_state.get("opened-upload")
    if opened is None or opened[0] != file.file_id:
        try:
            with st.spinner("Reading the image …"):
                opened = (file.file_id, open_upload(file.getvalue(), "the upload"))
        except InputError as error:
            st.warning(escaped(f"{error.what}. Next: {error.hint}."))
            return None
        st.session_state["opened-upload"] = opened
    # A file's own name may hold a patient's; it goes no further than the browser.
    return opened[1], "upload"


def _sampling() -> Sampling:
    from medvlm.serving.chat import Sampling

    with st.expander("Sampling"):
        temperature = st.slider("Temperature", 0.0, 1.5, 0.0, 0.1, key="temperature", help="0 takes the likeliest word")
        top_p = st.slider("Top p", 0.1, 1.0, 1.0, 0.05, key="top-p", disabled=temperature == 0)
        tokens = st.slider("Longest answer, tokens", 8, 512, 128, 8, key="tokens")
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="seed", disabled=temperature == 0)
    return Sampling(temperature, top_p, tokens, int(seed))


def _conversation(image: tuple[bytes, str], models: tuple[str, ...]) -> Conversation:
    """The one that is going on; another image or other models begin a new one."""
    current: Conversation | None = st.session_state.get("conversation")
    if current is None or (current.image, current.models) != (image[0], models):
        current = Conversation(image[0], image[1], models)
        st.session_state["conversation"] = current
    return current


def _answer(
    talk: Conversation, number: int, sampling: Sampling, places: Sequence[st.delta_generator.DeltaGenerator]
) -> None:
    """Let each model answer, word by word. A press of Stop ends the script here; what was said stays."""
    for model, place in enumerate(places):
        if model < len(talk.answers[number]):
            continue
        with place, st.spinner("Thinking …"):
            chat = loaded(talk.models[model])
            stop = threading.Event()
            stream = chat.stream(talk.image, talk.turns(model), sampling, stop=stop)
        talk.answers[number].append("")
        line = place.empty()
        try:
            for piece in stream:
                talk.answers[number][model] += piece
                line.text(talk.answers[number][model])
        finally:
            stop.set()
            stream.close()
        line.empty()


def _draw_other(talk: Conversation, number: int, sampling: Sampling, place: st.delta_generator.DeltaGenerator) -> None:
    """A second answer of the same model by chance: somebody liked the first, and a pair needs two."""
    from medvlm.serving.chat import Sampling

    drawn = Sampling(max(0.8, sampling.temperature), 0.95, sampling.max_new_tokens, sampling.seed + 1)
    before = Conversation(talk.image, talk.name, talk.models, talk.questions[:number], talk.answers[:number])
    turns = [*before.turns(0), Turn("user", talk.questions[number])]
    with place, st.spinner("Another answer, to compare …"):
        stream = loaded(talk.models[0]).stream(talk.image, turns, drawn, stop=threading.Event())
    line = place.empty()
    try:
        for piece in stream:
            talk.other[number] += piece
            line.text(talk.other[number])
    finally:
        stream.close()


def _like(talk: Conversation, number: int) -> None:
    talk.other[number] = ""


def _prefer(talk: Conversation, number: int, chosen: str, rejected: str, said: str) -> None:
    from medvlm.serving.chat import preference_pair

    try:
        allowed_to_write()
        pair = preference_pair(talk.image, talk.name, talk.questions[number], chosen, rejected)
        save_preference(results().workspace, pair)
    except MedVLMError as error:
        st.session_state["chat-refused"] = error
        return
    talk.judged[number] = said
    st.toast("Saved for the next preference dataset")


def _correct(talk: Conversation, number: int, rejected: str) -> None:
    better = str(st.session_state.get(f"better-{number}", ""))
    _prefer(talk, number, better, rejected, "You wrote a better answer; it was saved.")


def _judge(talk: Conversation, number: int, sampling: Sampling) -> None:
    """Which answer is better, or a better one still."""
    given = talk.answers[number]
    if number in talk.judged:
        st.caption(talk.judged[number])
        return
    if not person().may_write:
        return
    if number in talk.other:
        with st.container(gap="xxsmall"):
            st.caption("The same model, another time")
            if not talk.other[number]:
                _draw_other(talk, number, sampling, st.container())
                st.rerun()
            foreign_text(talk.other[number])
    pairs = _pairs(talk, number)
    with st.container(horizontal=True):
        for key, (label, chosen, rejected, said) in pairs.items():
            arguments = (talk, number, chosen, rejected, said)
            st.button(label, key=f"thumb-{number}-{key}", on_click=_prefer, args=arguments)
        if len(given) == 1 and number not in talk.other:
            up = {"icon": ":material/thumb_up:", "help": "Compare it with another answer of this model"}
            st.button("Good", key=f"like-{number}", on_click=_like, args=(talk, number), **up)
        with st.popover("Write a better answer", icon=":material/thumb_down:"):
            st.text_area("Better answer", key=f"better-{number}")
            for model, text in enumerate(given):
                label = "Save" if len(given) == 1 else f"Save as better than {'left' if model == 0 else 'right'}"
                st.button(label, key=f"save-{number}-{model}", on_click=_correct, args=(talk, number, text))


def _pairs(talk: Conversation, number: int) -> dict[str, tuple[str, str, str, str]]:
    """Key → label, better answer, worse answer, and what is said of it."""
    given = talk.answers[number]
    if len(given) == 2:
        first, second, names = given[0], given[1], ("Left is better", "Right is better")
        said = [f"You preferred: {escaped(model)}" for model in talk.models]
    elif talk.other.get(number):
        first, second, names = given[0], talk.other[number], ("The first is better", "The second is better")
        said = ["You preferred the first answer.", "You preferred the second answer."]
    else:
        return {}
    if first.strip().lower() == second.strip().lower():
        st.caption("Both say the same.")
        return {}
    return {"0": (names[0], first, second, said[0]), "1": (names[1], second, first, said[1])}


def _history(talk: Conversation, sampling: Sampling) -> None:
    for number, question in enumerate(talk.questions):
        with st.container(border=True):
            with st.container(gap="xxsmall"):
                st.caption("You")
                foreign_text(question)
            stopper = st.empty()  # above the answers: a button that moves as they grow is hard to press
            columns = [column.container(gap="xxsmall") for column in st.columns(len(talk.models))]
            for column, label in zip(columns, talk.models, strict=True):
                column.caption(escaped(label))
            if len(talk.answers[number]) < len(talk.models):
                stopper.button("Stop", key=f"stop-{number}", on_click=_stopped, args=(talk, number))
                _answer(talk, number, sampling, columns)
                stopper.empty()
                st.rerun()
            for column, text in zip(columns, talk.answers[number], strict=True):
                with column:
                    foreign_text(text or "(nothing)")
            _judge(talk, number, sampling)


def _stopped(talk: Conversation, number: int) -> None:
    """What has been said is the answer; a model that had not begun said nothing."""
    talk.answers[number] += [""] * (len(talk.models) - len(talk.answers[number]))


def body() -> None:
    """Settings on the left, the conversation on the right."""
    checkpoints = list(results().checkpoints())
    if not checkpoints:
        empty("There is no checkpoint to talk to yet.")
        return
    left, right = st.columns([2, 5], gap="large")
    with left:
        first = st.selectbox("Checkpoint", checkpoints, key="first-model")
        second = st.selectbox("Beside it", [NONE, *(c for c in checkpoints if c != first)], key="second-model")
        image = _image()
        sampling = _sampling()
        if st.button("New conversation", width="stretch"):
            st.session_state.pop("conversation", None)
    with right:
        if image is None:
            st.info("Choose or upload an image to begin.")
            return
        talk = _conversation(image, (first,) if second == NONE else (first, second))
        with st.container(width=420):
            zoomable(talk.image, key="chat", max_px=640, alt=talk.name)
        said = st.container()
        question = st.chat_input("Ask about this image", max_chars=4000)
        if question:
            talk.questions.append(question)
            talk.answers.append([])
        with said:
            refused = st.session_state.pop("chat-refused", None)
            if refused:
                st.error(f"**{escaped(refused.what)}** Next: {escaped(refused.hint)}.")
            try:
                _history(talk, sampling)
            except InputError:
                # The question could not be asked: it does not stay in the conversation.
                talk.questions.pop()
                talk.answers.pop()
                raise


show("Chat", "Talk to a checkpoint about an image. What you prefer becomes training data for the next model.", body)
