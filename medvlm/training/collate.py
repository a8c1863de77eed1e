"""Conversations to token ids and labels, and sequences to batches.

Shape letters: N images, P placeholders of an image, V tower width, H and W pixels.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from medvlm.errors import InputError
from medvlm.models.template import IMAGE_MARK, TEMPLATES, Segment, render
from medvlm.models.tokenizer import IM_END, IM_START, special_marks
from medvlm.recipe_schema import Recipe, TemplateName
from medvlm.records import Turn
from medvlm.training.packing import IGNORED, Encoded, Packing, pack_rows, packed_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["IGNORED", "ConversationEncoder", "Encoded", "collate", "self_questions"]


class ConversationEncoder:
    """Conversations to token ids, the way a recipe's template says.

    Args:
        recipe: Gives the placeholders of an image and its frame.
        tokenizer: A fast one.
        template: Name of the template.
        max_length: Of a sequence, in tokens.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, template: TemplateName, max_length: int
    ) -> None:
        marks: Any = tokenizer  # its attributes are typed as anything that could be set
        self.tokenizer = marks
        self.template = TEMPLATES[template]
        self.max_length = max_length
        self.image_tokens = recipe.model.image_tokens
        self.image_text = f"{IM_START}{IMAGE_MARK}{IM_END}" if recipe.model.mm_use_im_start_end else IMAGE_MARK
        self.image_first = recipe.model.image_first
        self.image_id: int = marks.convert_tokens_to_ids(IMAGE_MARK)
        self.eos: str = marks.eos_token or ""
        # Phi's and StableLM's tokenizers name one mark for both ends, and put none in front.
        self.bos: str = marks.bos_token if marks.bos_token and marks.bos_token != self.eos else ""
        self.reserved: list[str] = [m for m in (*special_marks(recipe), self.bos, self.eos, marks.pad_token) if m]

    def encode(self, turns: Sequence[Turn], sample_id: str, asked: Collection[int] = ()) -> Encoded:
        """Ids and labels of a conversation that ends with an answer; answers and asked questions carry loss.

        Where it is longer than ``max_length``, the oldest question-answer pairs go first (the image
        moves to the first question that stays), then the end of the last answer. Never the image.

        Args:
            turns: User and assistant in turn.
            sample_id: Named in errors.
            asked: Indices of user turns that the model learns to ask itself (``self_questions``). The
                first turn brings the image and is never one.

        Raises:
            InputError: The image is not there exactly once, turns do not alternate, or even one
                question leaves no room for an answer.
        """
        self._check(turns, sample_id)
        asked = {index for index in asked if index}
        ids, labels = self._tokens(turns, asked)
        whole, pairs = len(ids), len(turns) // 2
        if whole > self.max_length and pairs > 1:
            # Halving, as each try tokenises what is left: a conversation of hundreds of questions took seconds.
            fits = bisect_left(
                range(1, pairs), True, key=lambda gone: len(self._without(turns, asked, gone)[0]) <= self.max_length
            )
            ids, labels = self._without(turns, asked, min(fits + 1, pairs - 1))
        cut = whole - len(ids)
        if len(ids) > self.max_length:
            cut += len(ids) - self.max_length
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        if ids.count(self.image_id) != self.image_tokens or all(label == IGNORED for label in labels):
            raise InputError(
                f"the question alone fills {self.max_length} tokens",
                where=f"sample {sample_id}",
                hint="raise the stage's max_length, or shorten the question",
            )
        return Encoded(ids, labels, cut)

    def _without(self, turns: Sequence[Turn], asked: Collection[int], pairs: int) -> tuple[list[int], list[int]]:
        """Ids and labels without the oldest question-answer pairs; the image goes to the first question that stays."""
        gone = 2 * pairs
        kept = [Turn("user", f"{IMAGE_MARK}\n{turns[gone].text}"), *turns[gone + 1 :]]
        return self._tokens(kept, {index - gone for index in asked if index > gone})

    def prompt(self, text: str | Sequence[Turn]) -> list[int]:
        """Ids up to where the answer begins.

        Args:
            text: One question, or a conversation that ends with one. ``<image>`` stands in it once, or
                not at all where no image belongs to it.
        """
        return self._tokens([Turn("user", text)] if isinstance(text, str) else text)[0]

    def asking_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation that ends with an answer, up to where the model asks a question itself.

        Args:
            turns: User and assistant in turn; the template must have a role that asks.
        """
        # As it stands in training, with a question that is then cut off: the same tokens up to it.
        ids, labels = self._tokens([*turns, Turn("user", "")], {len(turns)})
        return ids[: _last_run(labels)]

    def _check(self, turns: Sequence[Turn], sample_id: str) -> None:
        roles = [turn.role for turn in turns]
        if not turns or len(turns) % 2 or roles != ["user", "assistant"] * (len(turns) // 2):
            raise InputError(
                f"turns do not alternate between user and assistant: {', '.join(roles) or 'none'}",
                where=f"sample {sample_id}",
                hint="check the step that built the dataset",
            )
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
        if marks != 1 or IMAGE_MARK not in turns[0].text:
            raise InputError(
                f"{IMAGE_MARK} stands {marks} times in the user turns, not once in the first",
                where=f"sample {sample_id}",
                hint="check the step that built the dataset",
            )

    def _tokens(self, turns: Sequence[Turn], asked: Collection[int] = ()) -> tuple[list[int], list[int]]:
        segments = render(
            self.template,
            self._ordered(turns),
            image=self.image_text,
            bos=self.bos,
            eos=self.eos,
            reserved=self.reserved,
            asked=asked,
        )
        # The whole text at once, as a tokenizer joins across segments; offsets tell what is learned.
        text = "".join(segment.text for segment in segments)
        encoding: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = _learned_spans(segments)
        ids: list[int] = [self.tokenizer.bos_token_id] if self.bos and not text.startswith(self.bos) else []
        labels: list[int] = [IGNORED] * len(ids)
        span = 0
        for token, (start, _) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            while span < len(learned) and start >= learned[span][1]:
                span += 1
            count = self.image_tokens if token == self.image_id else 1
            inside = span < len(learned) and start >= learned[span][0]
            ids += [token] * count
            labels += [token if inside else IGNORED] * count
        return ids, labels

    def _ordered(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns, the image before the first question where the recipe wants it there."""
        if not self.image_first or not turns or IMAGE_MARK not in turns[0].text:
            return turns
        question = turns[0].text.replace(IMAGE_MARK, "", 1).strip()
        return [Turn(turns[0].role, f"{IMAGE_MARK}{question}"), *turns[1:]]


def _last_run(labels: Sequence[int]) -> int:
    """Where the last run of learned tokens begins."""
    end = max(index for index, label in enumerate(labels) if label != IGNORED)
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return start


def self_questions(turns: int, sample_id: str, epoch: int, *, ratio: float, seed: int) -> frozenset[int]:
    """Which user turns the model learns to ask itself: a pure function, so that a resumed run draws the same.

    Each user turn after the first is one with probability ``ratio``, drawn anew in each epoch (SQ-LLaVA's
    ``sq_r``). The answers are learned either way.

    Args:
        turns: Length of the conversation, user and assistant in turn.
        sample_id: Of the conversation.
        epoch: 0 for the first.
        ratio: 0 to 1.
        seed: Of the recipe.
    """
    return frozenset(index for index in range(2, turns, 2) if _chance(f"{seed}/{epoch}/{index}/{sample_id}") < ratio)


def _chance(key: str) -> float:
    """A number from 0 to below 1 that looks random and follows from the key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64


def _learned_spans(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    place = 0
    for segment in segments:
        if segment.learned:
            spans.append((place, place + len(segment.text)))
        place += len(segment.text)
    return spans


def collate(rows: Sequence[dict[str, Any]], pad_id: int, *, packing: Packing = "off") -> dict[str, Any]:
    """A batch, padded on the right.

    Args:
        rows: Each with ``sequences`` (``Encoded``, of one image), ``pixels`` (3, H, W) or ``features`` (P, V), and
            ``sample_ids``.
        pad_id: Fills; never attended, never learned.
        packing: How sequences share a row; none sees another.

    Returns:
        ``input_ids``, ``labels`` and what ``packed_batch`` adds; ``pixel_values`` (N, 3, H, W) or ``image_features``
        (N, P, V), one for each sequence in reading order; ``sample_ids``, a list for each of ``rows``; ``spans``, for
        each row of the batch which of ``rows`` its stretches of tokens are of and how long they are; and, of
        preference pairs, whose two answers are a row's sequences, ``reference`` (rows, 2) where it is known.
    """
    import torch

    sequences = [(sequence, row) for row in rows for sequence in row["sequences"]]
    places = pack_rows([len(sequence.ids) for sequence, _ in sequences], packing)
    batch: dict[str, Any] = packed_batch([[sequences[i][0] for i in row] for row in places], pad_id, packing)
    images = [sequences[i][1] for row in places for i in row]
    owners = [index for index, row in enumerate(rows) for _ in row["sequences"]]
    source, name = ("features", "image_features") if "features" in rows[0] else ("pixels", "pixel_values")
    if "reference" in rows[0]:
        batch["reference"] = torch.tensor([row["reference"] for row in rows])
    return {
        **batch,
        name: torch.stack([row[source] for row in images]),
        "sample_ids": [row["sample_ids"] for row in rows],
        "spans": [[(owners[i], len(sequences[i][0].ids)) for i in row] for row in places],
    }
