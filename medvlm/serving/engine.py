"""Answers to many questions at once: a queue before a batch that rows join and leave between two tokens."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal

from medvlm.serving.chat import ChatModel, Prepared, Sampling
from medvlm.serving.decoding import Batch, Row

__all__ = ["Answer", "Closed", "Engine", "Event", "Finish", "QueueFull"]

Finish = Literal["stop", "length", "time", "cancelled", "error"]


class QueueFull(Exception):
    """So many questions wait already that one more is not taken."""


class Closed(Exception):
    """The engine takes no more questions."""


@dataclass(frozen=True, slots=True)
class Event:
    """What an answer says as it is made: pieces of text, and last of all how it ended."""

    text: str = ""
    finish: Finish | None = None
    tokens: int = 0
    """Of the answer so far."""
    error: str = ""


@dataclass(eq=False, slots=True)
class Answer:
    """One question's place in the engine."""

    row: Row
    text: _Text
    deliver: Callable[[Event], None]
    deadline: float
    """By ``time.monotonic``."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody reads the answer any more: it ends at the next token."""
        self.cancelled.set()


class Engine:
    """Decodes up to ``max_batch`` answers together in one thread of its own.

    A question that arrives while others are being answered joins them at the next token. The answer
    to a question, sampled or not, does not depend on who is answered beside it, but for the rounding
    of sums in another order.

    Args:
        chat: Its model is used by this engine alone.
        max_batch: Answers at once.
        queue_limit: Questions that may wait for a place.
        observe: Told after each step how many answers it went on with.
    """

    def __init__(
        self,
        chat: ChatModel,
        *,
        max_batch: int = 16,
        queue_limit: int = 64,
        observe: Callable[[int], None] | None = None,
    ) -> None:
        self.chat = chat
        self._max_batch, self._queue_limit = max_batch, queue_limit
        self._observe = observe
        self._batch = Batch(chat.model)
        end: Any = chat.model.generation_config.eos_token_id
        self._ends = set(end) if isinstance(end, list) else {end}
        self._waiting: deque[Answer] = deque()
        self._running: dict[Row, Answer] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    @property
    def waiting(self) -> int:
        """Questions without a place yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being made."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether it takes questions."""
        return self._worker.is_alive() and not self._closed

    @property
    def full(self) -> bool:
        """Whether ``submit`` would raise ``QueueFull``."""
        return len(self._waiting) >= self._queue_limit

    def submit(
        self,
        question: Prepared,
        sampling: Sampling,
        deliver: Callable[[Event], None],
        *,
        stops: Sequence[str] = (),
        time_limit_s: float = 3600.0,
    ) -> Answer:
        """Put a question into the queue.

        Args:
            question: From ``ChatModel.prepare``.
            sampling: How its tokens are chosen.
            deliver: Called in the engine's thread with each event, the last with ``finish``; must not block.
            stops: The answer ends before the first of these texts.
            time_limit_s: From now on; the answer ends as it is when they are over.

        Raises:
            QueueFull: ``queue_limit`` questions wait already.
            Closed: The engine is shutting down.
        """
        answer = Answer(
            Row(question, sampling), _Text(self.chat.tokenizer, stops), deliver, time.monotonic() + time_limit_s
        )
        with self._changed:
            if self._closed:
                raise Closed
            if self.full:
                raise QueueFull
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def stream(self, question: Prepared, sampling: Sampling) -> Generator[str]:
        """Pieces of one answer, for a caller that waits for them.

        Raises:
            RuntimeError: The model failed.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        answer = self.submit(question, sampling, events.put)
        try:
            while (event := events.get()).finish is None:
                yield event.text
        finally:
            answer.cancel()
        if event.finish == "error":
            raise RuntimeError(event.error)
        yield event.text

    def close(self, timeout_s: float = 30.0) -> None:
        """Take no more questions, finish those that were taken, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join(timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed and not (self._waiting or self._running):
                    return
                new = self._admitted()
            self._advance(new)

    def _admitted(self) -> list[Answer]:
        """Those that get a place now; who gave up waiting goes."""
        over = [answer for answer in self._waiting if _over(answer)]
        for answer in over:
            self._waiting.remove(answer)
            _end(answer, _over(answer) or "cancelled")
        free = min(self._max_batch - len(self._running), len(self._waiting))
        return [self._waiting.popleft() for _ in range(free)]

    def _advance(self, new: list[Answer]) -> None:
        """One token for everybody; the first one for those that are new."""
        try:
            if self._running:
                self._batch.step()
                self._hear(list(self._running.values()))
        except Exception as error:  # noqa: BLE001  # handed to those who wait for the answers
            self._fail(list(self._running.values()), error)
            self._running, self._batch = {}, Batch(self.chat.model)
        if not new:
            return
        self._running |= {answer.row: answer for answer in new}
        try:
            self._batch.add([answer.row for answer in new])
        except Exception as error:  # noqa: BLE001  # handed to those who wait for the answers
            for answer in new:
                del self._running[answer.row]
            self._fail(new, error)
            return
        self._hear(new)

    def _hear(self, answers: Sequence[Answer]) -> None:
        """Pass the newest token of each on, and let the finished ones go."""
        if self._observe:
            self._observe(len(answers))
        done: list[Row] = []
        for answer in answers:
            finish = self._finish(answer)
            if finish:
                done.append(answer.row)
                del self._running[answer.row]
                _end(answer, finish)
        self._batch.drop(done)

    def _finish(self, answer: Answer) -> Finish | None:
        """How the answer ended with its newest token, if it did; else the token's text is delivered."""
        row = answer.row
        if over := _over(answer):
            return over
        if row.ids[-1] in self._ends:
            return "stop"
        piece = answer.text.add(row.ids[-1])
        if piece:
            answer.deliver(Event(text=piece, tokens=len(row.ids)))
        if answer.text.stopped:
            return "stop"
        return "length" if len(row.ids) >= row.question.budget else None

    @staticmethod
    def _fail(answers: Sequence[Answer], error: Exception) -> None:
        for answer in answers:
            what = f"{type(error).__name__}: {error}"
            answer.deliver(Event(finish="error", tokens=len(answer.row.ids), error=what))


def _over(answer: Answer) -> Finish | None:
    if answer.cancelled.is_set():
        return "cancelled"
    return "time" if time.monotonic() > answer.deadline else None


def _end(answer: Answer, finish: Finish) -> None:
    answer.deliver(Event(text=answer.text.rest(), finish=finish, tokens=len(answer.row.ids)))


class _Text:
    """Tokens to text, a piece at a time, up to the first of the texts that end an answer."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._begun = False
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now; a character's first bytes, or a stop's first letters, wait."""
        text = self._held + (self._stream.step(self._tokenizer, token) or "")
        if not self._begun:
            # Templates put a blank before an answer; it is no part of it.
            text = text.lstrip()
            self._begun = bool(text)
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back and turned out to be part of the answer."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
