"""A conversation with a checkpoint about one image, streamed word by word."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvlm.data.images import image_hashes
from medvlm.errors import CheckpointError, InputError
from medvlm.models.checkpoint import Checkpoint, load_checkpoint
from medvlm.models.template import IMAGE_MARK
from medvlm.records import Image, PreferencePair, Turn
from medvlm.training.collate import ConversationEncoder

__all__ = ["ChatModel", "Prepared", "Sampling", "preference_pair"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; published systems chat at 0.2 to 0.7."""
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    """The same seed gives the same answer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A question as the model reads it."""

    ids: list[int]
    budget: int
    """Tokens that the answer may have."""
    pixels: Any
    """(3, H, W); None where there is no image."""


class ChatModel:
    """A checkpoint that answers. Several threads may ask; they are answered one after the other.

    Args:
        checkpoint: From ``load_checkpoint``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.model: Any = checkpoint.model  # transformers' own types contradict each other here
        self.tokenizer: Any = checkpoint.tokenizer
        self.name = checkpoint.recipe.name
        stage = _stage(checkpoint)
        self.positions = int(self.model.config.text_config.max_position_embeddings)
        """Tokens that a conversation and its answer may have together."""
        self._encoder = ConversationEncoder(checkpoint.recipe, checkpoint.tokenizer, stage.template, self.positions)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: Path) -> ChatModel:
        """The model of a finished checkpoint, on the GPU where there is one.

        Raises:
            CheckpointError: The checkpoint is absent, incomplete, or does not fit the model.
        """
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        checkpoint = load_checkpoint(folder)
        chat = cls(checkpoint)
        chat.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return chat

    def stream(
        self,
        image: bytes | None,
        turns: Sequence[Turn],
        sampling: Sampling | None = None,
        *,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """Pieces of the answer to the last question, as they are made.

        Closing the iterator, or setting ``stop``, ends the generation at the next token.

        Args:
            image: Encoded; the first question is about it. None for a conversation without an image.
            turns: Question, answer, …, question.
            sampling: How tokens are chosen.
            stop: Set it to end early.

        Raises:
            InputError: The image does not decode, turns do not alternate, or the conversation leaves no
                room for an answer.
        """
        chosen, ended = sampling or Sampling(), stop or threading.Event()
        return self._generate(self.prepare(image, turns, chosen.max_new_tokens), chosen, ended)

    def prepare(
        self, image: bytes | None, turns: Sequence[Turn], max_new_tokens: int, *, image_turn: int = 0
    ) -> Prepared:
        """A conversation as the model reads it.

        Args:
            image: Encoded; None for a conversation without one.
            turns: Question, answer, …, question. ``<image>`` marks in them are taken away.
            max_new_tokens: Of the answer, at most; fewer where the context has no more room.
            image_turn: Index of the question that brings the image in.

        Raises:
            InputError: The image does not decode, turns do not alternate, or the conversation leaves no
                room for an answer.
        """
        roles = [turn.role for turn in turns]
        if roles != (["user", "assistant"] * len(turns))[: len(turns)] or len(turns) % 2 == 0:
            raise InputError(
                f"turns do not alternate from question to question: {', '.join(roles) or 'none'}",
                where="the conversation",
                hint="begin and end with a question",
            )
        clean = [Turn(turn.role, _without_marks(turn.text)) for turn in turns]
        if image is not None:
            # Only here may the image come in; a mark typed by a person was taken away.
            clean[image_turn] = Turn("user", f"{IMAGE_MARK}\n{clean[image_turn].text}")
        ids = self._encoder.prompt(clean)
        room = self.positions - len(ids)
        if room < 1:
            raise InputError(
                f"the conversation has {len(ids)} tokens, the model reads {self.positions}",
                where="the conversation",
                hint="begin a new one, or shorten the question",
            )
        pixels = None if image is None else self._checkpoint.processor(image)
        return Prepared(ids, min(room, max_new_tokens), pixels)

    def _generate(self, question: Prepared, sampling: Sampling, stop: threading.Event) -> Iterator[str]:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        class Ended(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

        model = self.model
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments: dict[str, Any] = {"max_new_tokens": question.budget, "do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            arguments |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if question.pixels is not None:
            arguments["pixel_values"] = question.pixels[None].to(model.device)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                with self._lock, torch.random.fork_rng(), torch.inference_mode():
                    torch.manual_seed(sampling.seed)
                    batch = torch.tensor([question.ids], device=model.device)
                    model.generate(
                        input_ids=batch,
                        attention_mask=torch.ones_like(batch),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Ended()]),
                        **arguments,
                    )
            except BaseException as error:  # noqa: BLE001  # handed to the reader, which raises it
                failure.append(error)
            finally:
                streamer.end()

        worker = threading.Thread(target=work, name="chat", daemon=True)
        worker.start()
        try:
            yield from (piece for piece in streamer if piece)
            if failure:
                raise failure[0]
        finally:
            stop.set()
            worker.join()


def _stage(checkpoint: Checkpoint) -> Any:
    name = checkpoint.metadata.get("stage")
    stage = next((stage for stage in checkpoint.recipe.stages if stage.name == name), None)
    if stage is None:
        raise CheckpointError(
            f"the checkpoint is of the stage {name!r}, which its recipe does not have",
            where=checkpoint.recipe.name,
            hint="train the stage again",
        )
    return stage


def _without_marks(text: str) -> str:
    return text.replace(IMAGE_MARK, "").strip()


def preference_pair(image: bytes, name: str, question: str, chosen: str, rejected: str) -> PreferencePair:
    """What a person preferred in a chat, as a row of the next preference dataset.

    Args:
        image: Encoded.
        name: File name of the image, for people.
        question: The last question.
        chosen: The better answer, or the corrected one.
        rejected: The other.

    Raises:
        InputError: The image does not decode, or the two answers are the same or empty.
    """
    if not chosen.strip() or not rejected.strip() or chosen.strip() == rejected.strip():
        raise InputError(
            "a preference needs two different answers", where="the chat", hint="write a better answer than the model's"
        )
    sha256, phash = image_hashes(image)
    mark = hashlib.sha256("\0".join((sha256, question, chosen, rejected)).encode()).hexdigest()[:16]
    return PreferencePair(
        pair_id=f"chat-{mark}",
        image=Image(image, name),
        image_sha256=sha256,
        image_phash=phash,
        group_id=sha256,
        question=question,
        chosen=chosen.strip(),
        rejected=rejected.strip(),
        source="chat",
    )
