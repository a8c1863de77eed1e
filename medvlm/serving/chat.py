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

__all__ = ["ChatModel", "Sampling", "preference_pair"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; published systems chat at 0.2 to 0.7."""
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    """The same seed gives the same answer."""


class ChatModel:
    """A checkpoint that answers. Several threads may ask; they are answered one after the other.

    Args:
        checkpoint: From ``load_checkpoint``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._model: Any = checkpoint.model  # transformers' own types contradict each other here
        stage = _stage(checkpoint)
        positions = int(self._model.config.text_config.max_position_embeddings)
        self._encoder = ConversationEncoder(checkpoint.recipe, checkpoint.tokenizer, stage.template, positions)
        self._positions = positions
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: Path) -> ChatModel:
        """The model of a finished checkpoint, on the GPU where there is one.

        Raises:
            CheckpointError: The checkpoint is absent, incomplete, or does not fit the model.
        """
        import torch

        checkpoint = load_checkpoint(folder)
        chat = cls(checkpoint)
        chat._model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return chat

    def stream(
        self,
        image: bytes,
        turns: Sequence[Turn],
        sampling: Sampling | None = None,
        *,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """Pieces of the answer to the last question, as they are made.

        Closing the iterator, or setting ``stop``, ends the generation at the next token.

        Args:
            image: Encoded; the first question is about it.
            turns: Question, answer, …, question. ``<image>`` marks are added where the first has none.
            sampling: How tokens are chosen.
            stop: Set it to end early.

        Raises:
            InputError: The image does not decode, turns do not alternate, or the conversation leaves no
                room for an answer.
        """
        chosen, ended = sampling or Sampling(), stop or threading.Event()
        ids, budget = self._prompt(turns, chosen)
        pixels = self._checkpoint.processor(image)
        return self._generate(ids, pixels, budget, chosen, ended)

    def _prompt(self, turns: Sequence[Turn], sampling: Sampling) -> tuple[list[int], int]:
        """Token ids and how many tokens the answer may have."""
        roles = [turn.role for turn in turns]
        if roles != (["user", "assistant"] * len(turns))[: len(turns)] or len(turns) % 2 == 0:
            raise InputError(
                f"turns do not alternate from question to question: {', '.join(roles) or 'none'}",
                where="the conversation",
                hint="begin and end with a question",
            )
        # Only the first question may bring the image in; a mark typed later is taken apart.
        first = f"{IMAGE_MARK}\n{_without_marks(turns[0].text)}"
        clean = [Turn("user", first), *(Turn(turn.role, _without_marks(turn.text)) for turn in turns[1:])]
        ids = self._encoder.prompt(clean)
        room = self._positions - len(ids)
        if room < 1:
            raise InputError(
                f"the conversation has {len(ids)} tokens, the model reads {self._positions}",
                where="the conversation",
                hint="begin a new one, or shorten the question",
            )
        return ids, min(room, sampling.max_new_tokens)

    def _generate(
        self, ids: list[int], pixels: Any, budget: int, sampling: Sampling, stop: threading.Event
    ) -> Iterator[str]:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        class Ended(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

        model, tokenizer = self._model, self._checkpoint.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments: dict[str, Any] = {"max_new_tokens": budget, "do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            arguments |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        failure: list[BaseException] = []

        def work() -> None:
            try:
                with self._lock, torch.random.fork_rng(), torch.inference_mode():
                    torch.manual_seed(sampling.seed)
                    batch = torch.tensor([ids], device=model.device)
                    model.generate(
                        input_ids=batch,
                        attention_mask=torch.ones_like(batch),
                        pixel_values=pixels[None].to(model.device),
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
