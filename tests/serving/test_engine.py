"""Answers made together: the same as made alone, whoever comes and goes; none is lost, none waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest
from test_chat import png

from medvlm.records import Turn
from medvlm.serving.chat import ChatModel, Sampling
from medvlm.serving.engine import Closed, Engine, Event, QueueFull

QUESTIONS = ["What is shown?", "Where?", "Is there a nodule in the chest radiograph, and where is it?", "Why not?"]


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatModel:
    return ChatModel.load(folder)


@pytest.fixture
def engine(chat: ChatModel) -> Generator[Engine]:
    engine = Engine(chat, max_batch=3, queue_limit=8)
    yield engine
    engine.close()


def asked(engine: Engine, n: int, tokens: int, **sampling: float) -> str:
    turns = [Turn("user", QUESTIONS[n % len(QUESTIONS)])]
    question = engine.chat.prepare(png(40 * n % 250) if n % 3 else None, turns, tokens)
    return "".join(engine.stream(question, Sampling(max_new_tokens=tokens, seed=n, **sampling)))


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_an_answer_made_among_others_is_the_one_made_alone(engine: Engine, temperature: float) -> None:
    # More questions than places, of unequal lengths: rows join and leave the batch all the time.
    lengths = [4, 30, 11, 18, 7, 25, 3, 16]
    alone = [asked(engine, n, tokens, temperature=temperature) for n, tokens in enumerate(lengths)]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(asked, engine, n, tokens, temperature=temperature) for n, tokens in enumerate(lengths)]
        together = [job.result(timeout=120) for job in jobs]
    assert together == alone
    assert len(set(alone)) > 4


def test_the_batch_answers_as_transformers_generates(engine: Engine) -> None:
    for image in (png(), None):
        turns = [Turn("user", QUESTIONS[0]), Turn("assistant", "A nodule."), Turn("user", "Where?")]
        sampling = Sampling(max_new_tokens=20)
        reference = "".join(engine.chat.stream(image, turns, sampling)).strip()
        ours = "".join(engine.stream(engine.chat.prepare(image, turns, 20), sampling)).strip()
        assert ours == reference.removesuffix("\ufffd")  # half a character at the end is not shown


def events_of(engine: Engine, tokens: int = 400, **settings: object) -> tuple[SimpleQueue[Event], object]:
    events: SimpleQueue[Event] = SimpleQueue()
    question = engine.chat.prepare(None, [Turn("user", "What?")], tokens)
    return events, engine.submit(question, Sampling(max_new_tokens=tokens), events.put, **settings)


def ended(events: SimpleQueue[Event]) -> tuple[str, Event]:
    text = ""
    while (event := events.get(timeout=60)).finish is None:
        text += event.text
    return text + event.text, event


def test_an_answer_ends_before_a_stop_text_even_where_it_comes_in_pieces(engine: Engine) -> None:
    whole, event = ended(events_of(engine, 40)[0])
    assert (event.finish, event.tokens) == ("length", 40)
    stop = whole[10:14]
    text, event = ended(events_of(engine, 40, stops=[stop])[0])
    assert (text, event.finish) == (whole[: whole.index(stop)], "stop")
    text, event = ended(events_of(engine, 40, stops=[whole[-3:] + "never said"])[0])
    assert (text, event.finish) == (whole, "length")  # what was held back is part of the answer


def test_a_cancelled_and_a_late_answer_end_and_free_their_places(engine: Engine) -> None:
    events, answer = events_of(engine)
    assert events.get(timeout=60).finish is None
    answer.cancel()
    assert ended(events)[1].finish == "cancelled"
    assert ended(events_of(engine, time_limit_s=0.0)[0])[1].finish == "time"
    assert (engine.running, engine.waiting) == (0, 0)


def test_a_full_queue_takes_no_more_and_a_closed_one_finishes_what_it_took(
    chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(chat, max_batch=1, queue_limit=2)
    held, forward = threading.Event(), chat.model.forward

    def slow(*args: object, **named: object) -> object:
        held.wait(60)
        return forward(*args, **named)

    monkeypatch.setattr(chat.model, "forward", slow)
    streams = [events_of(engine, 5)[0]]
    deadline = time.monotonic() + 60
    while engine.running + engine.waiting and not engine.running and time.monotonic() < deadline:
        pass  # the first one gets its place
    streams += [events_of(engine, 5)[0] for _ in range(2)]
    assert engine.full
    with pytest.raises(QueueFull):
        events_of(engine, 5)
    held.set()
    engine.close()
    assert [ended(events)[1].finish for events in streams] == ["length"] * 3
    assert not engine.alive
    with pytest.raises(Closed):
        events_of(engine, 5)


def test_a_failure_of_the_model_reaches_its_askers_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = asked(engine, 0, 6)
    forward, calls = engine.chat.model.forward, []

    def broken(*args: object, **named: object) -> object:
        calls.append(1)
        if len(calls) in (1, 5):  # once while a question is read, once while answers are made
            raise RuntimeError("out of memory")
        return forward(*args, **named)

    monkeypatch.setattr(engine.chat.model, "forward", broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            asked(engine, 0, 6)
    assert asked(engine, 0, 6) == sound
