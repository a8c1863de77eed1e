"""Who answers: a checkpoint in this process, a server that others run, or a file of stored answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol

from medvlm.data.endpoint import ChatClient, Unanswered
from medvlm.data.images import decode_image
from medvlm.data.response_cache import Completion
from medvlm.data.self_instruct import ask_in_order
from medvlm.data.watched import watched
from medvlm.errors import EndpointError, PredictionMismatch
from medvlm.evaluation.answers import Missing, join_answers, read_predictions
from medvlm.evaluation.journal import AnswerJournal
from medvlm.evaluation.prompts import PromptStyle
from medvlm.models.template import IMAGE_MARK
from medvlm.records import Prediction, VQAItem

__all__ = ["Backend", "Refused", "ReplayBackend", "ServerBackend", "answer_all", "mean_picture"]

Refused = Literal["error", "wrong"]
_MEAN_SIDE_PX = 224


class Backend(Protocol):
    """Gives answers, a batch at a time."""

    def batches(self, items: Sequence[VQAItem]) -> list[list[VQAItem]]:
        """The items in batches, each item once, in the order that suits this backend."""
        ...

    def answer(self, items: Sequence[VQAItem], *, blind: bool = False) -> list[Prediction]:
        """One answer an item, in their order; ``blind`` without its image."""
        ...


class ServerBackend:
    """Any OpenAI-compatible server that takes images: vLLM, SGLang, llama.cpp and others.

    Args:
        client: Asks it, with retries.
        name: Of the model, for the records.
        style: How prompts are made.
        max_tokens: Of an answer.
        mean: PNG that a blind model is shown.
        refused: Whether an item that the server refuses stops the run, or counts as an empty answer.
    """

    STAGE = "served"

    def __init__(
        self,
        client: ChatClient,
        name: str,
        *,
        style: PromptStyle,
        max_tokens: int,
        mean: bytes,
        refused: Refused = "error",
    ) -> None:
        self._client = client
        self._name = name
        self._style = style
        self._max_tokens = max_tokens
        self._mean = mean
        self._refused = refused
        self.refusals: dict[str, str] = {}
        """What the server said of each item that it refused."""

    def batches(self, items: Sequence[VQAItem]) -> list[list[VQAItem]]:
        """As many as are asked at once, four times over, so that the last of a batch rarely waits alone."""
        size = 4 * self._client.settings.concurrency
        return [list(items[start : start + size]) for start in range(0, len(items), size)]

    def answer(self, items: Sequence[VQAItem], *, blind: bool = False) -> list[Prediction]:
        """One answer an item, asked for concurrently.

        Raises:
            EndpointError: The server cannot be reached, refuses everything, or refuses an item.
        """
        messages = [self._messages(item, blind) for item in items]
        answers: list[Prediction] = []
        with closing(
            ask_in_order(
                lambda message: self._client.complete(message, max_tokens=self._max_tokens),
                messages,
                self._client.settings.concurrency,
            )
        ) as replies:
            for item, reply in zip(items, replies, strict=True):
                if isinstance(reply, Unanswered):
                    self._refuse(item, reply)
                answers.append(self._prediction(item, reply, blind))
        return answers

    def _prediction(self, item: VQAItem, reply: Completion | Unanswered, blind: bool) -> Prediction:
        return Prediction(
            item_id=item.item_id,
            benchmark=item.benchmark,
            model=self._name,
            stage=self.STAGE,
            blind=blind,
            prompt=self._style.prompt(item),
            text="" if isinstance(reply, Unanswered) else reply.text.strip(),
        )

    def _refuse(self, item: VQAItem, reply: Unanswered) -> None:
        self.refusals[item.item_id] = f"{reply.reason}: {reply.detail}"
        if self._refused == "error":
            raise EndpointError(
                f"the server does not answer item {item.item_id}: {reply.reason}, {reply.detail}",
                where=self._client.endpoint.url,
                hint="mend the request (does the model take images?), or count such items as wrong with "
                "--refused wrong; finished answers are kept",
            )

    def _messages(self, item: VQAItem, blind: bool) -> list[dict[str, Any]]:
        data = self._mean if blind else item.image.bytes
        url = f"data:{_media_type(data)};base64,{base64.b64encode(data).decode()}"
        image = {"type": "image_url", "image_url": {"url": url}}
        before, _, after = self._style.prompt(item).partition(IMAGE_MARK)
        parts = [{"type": "text", "text": text.strip()} for text in (before, after)]
        content = [part for part in (parts[0], image, parts[1]) if part.get("text") != ""]
        return [{"role": "user", "content": content}]


def _media_type(data: bytes) -> str:
    """Media type by the first bytes; servers refuse a data URL whose type is another."""
    known = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}
    return next((kind for mark, kind in known.items() if data.startswith(mark)), "application/octet-stream")


def mean_picture(images: Iterable[bytes]) -> bytes:
    """PNG of the mean of some images, each brought to one square: what a served blind model is shown.

    Args:
        images: Encoded images, at least one.

    Raises:
        InputError: One does not decode.
    """
    import numpy as np
    from PIL import Image

    total = np.zeros((_MEAN_SIDE_PX, _MEAN_SIDE_PX, 3))
    count = 0
    for data in images:
        total += np.asarray(decode_image(data).convert("RGB").resize((_MEAN_SIDE_PX, _MEAN_SIDE_PX)), dtype=float)
        count += 1
    buffer = io.BytesIO()
    Image.fromarray((total / count).round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class ReplayBackend:
    """Stored answers, such as those that the authors of a system published.

    Args:
        path: As ``read_predictions`` reads it; of one model and stage.
        name: Of the model, for the records.
        items: Of the test split. The stored answers must join them one to one.
        missing: As in ``join_answers``.

    Raises:
        InputError: The file is not in its format.
        PredictionMismatch: The answers do not join the items, or are of several stages.
    """

    STAGE = "replayed"

    def __init__(
        self, path: Path, name: str, *, benchmark: str, items: Sequence[VQAItem], missing: Missing = "error"
    ) -> None:
        stored = read_predictions(path, benchmark=benchmark)
        stages = sorted({answer.stage for answer in stored})
        if len(stages) > 1:
            raise PredictionMismatch(
                f"the answers are of several stages: {', '.join(stages)}",
                where=str(path),
                hint="give a file of one stage's answers",
            )
        self._name = name
        self._answers: dict[tuple[str, bool], Prediction] = {}
        self.kinds = tuple(kind for kind in (False, True) if any(answer.blind == kind for answer in stored))
        """Whether there are seeing answers (False), blind ones (True), or both."""
        for kind in self.kinds:
            given = [answer for answer in stored if answer.blind == kind]
            joined = join_answers(items, given, missing=missing, where=str(path))
            for item, answer in zip(joined.items, joined.predictions, strict=True):
                if answer is not None:
                    self._answers[item.item_id, kind] = answer

    def batches(self, items: Sequence[VQAItem]) -> list[list[VQAItem]]:
        """All of them at once."""
        return [list(items)] if items else []

    def answer(self, items: Sequence[VQAItem], *, blind: bool = False) -> list[Prediction]:
        """The stored answer of each item; an empty one where it has none and ``missing`` allows it."""
        answers: list[Prediction] = []
        for item in items:
            stored = self._answers.get((item.item_id, blind))
            answers.append(
                Prediction(
                    item_id=item.item_id,
                    benchmark=item.benchmark,
                    model=self._name,
                    stage=self.STAGE,
                    blind=blind,
                    prompt=stored.prompt if stored and stored.prompt else item.question,
                    text=stored.text if stored else "",
                    options=stored.options if stored else (),
                    option_logprobs=stored.option_logprobs if stored else (),
                )
            )
        return answers


def answer_all(
    backend: Backend,
    items: Sequence[VQAItem],
    journal: AnswerJournal,
    *,
    kinds: Sequence[bool],
    what: str,
    shown: bool = True,
) -> None:
    """Have a backend answer what a journal does not hold yet.

    Args:
        backend: Answers.
        items: All of them.
        journal: Knows which are answered.
        kinds: Seeing (False), blind (True), or both.
        what: Stands beside the progress bar.
        shown: Whether there is one; of several processes one reports for all.
    """
    for blind in kinds:
        batches = backend.batches(journal.todo(items, blind=blind))
        for batch in watched(batches, len(batches), f"{what}{', blind' if blind else ''}") if shown else batches:
            journal.append(backend.answer(batch, blind=blind))
