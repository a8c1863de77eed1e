"""A checkpoint's answers in this process: batched, greedy, each image read once.

Shape letters: B batch, L sequence, P placeholders (patches) of an image, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from medvlm.errors import InputError
from medvlm.evaluation.prompts import PromptStyle, options_of, prompt_style
from medvlm.records import Prediction, Turn, VQAItem

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.models.checkpoint import Checkpoint

__all__ = ["BATCH", "Answerer", "mean_image"]

BATCH = 64
IMAGES_A_BATCH = 32
"""Images encoded at once."""
IMAGES_AT_ONCE = 32
"""Images whose questions are sorted by length together, and whose features and keys are kept: some
4 GB for a 7B model in bfloat16 with 256 patches."""
_BLIND = "blind"
_DECIMALS = 2
"""Of a log-probability: finer ones depend on what else is in the batch."""

T = TypeVar("T")


def mean_image(checkpoint: Checkpoint, images: Iterable[bytes]) -> Tensor:
    """Mean of the pixels that the tower would see, (3, H, W): what a blind model is shown.

    Args:
        checkpoint: Its processor makes the pixels.
        images: Encoded images, at least one.
    """
    total: Any = 0
    count = 0
    for image in images:
        total = total + checkpoint.processor(image).double()
        count += 1
    return (total / count).float()


class Answerer:
    """Greedy answers of one checkpoint. What prompts share is read once, as long as their image lasts.

    Args:
        checkpoint: In evaluation mode from here on, on this process's GPU where there is one.
        stage: Its stage's name, for the records.
        style: How prompts are made; None takes each benchmark's own.
        batch_size: Questions answered at once.
        mean: Pixels (3, H, W) that a blind model is shown.
        likelihoods: Whether the likelihood of each option of a closed set is recorded too.
        model: The name in the records; None takes the recipe's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        stage: str,
        *,
        style: PromptStyle | None = None,
        batch_size: int = BATCH,
        mean: Tensor | None = None,
        likelihoods: bool = False,
        model: str | None = None,
    ) -> None:
        from medvlm.evaluation.decode import GreedyDecoder
        from medvlm.training.collate import ConversationEncoder

        self._checkpoint = checkpoint
        self._stage = stage
        self._style = style
        self._batch_size = batch_size
        self._mean = mean
        self._likelihoods = likelihoods
        self._name = model or checkpoint.recipe.name
        moved: Any = checkpoint.model  # transformers' own types contradict each other here
        self._model = moved.eval().to(_device())
        _, spec = checkpoint.recipe.stage(stage)
        positions = checkpoint.recipe.model.language_model.max_positions
        self._encoder = ConversationEncoder(checkpoint.recipe, checkpoint.tokenizer, spec.template, positions)
        tokenizer: Any = checkpoint.tokenizer
        self._decoder = GreedyDecoder(
            self._model,
            pad_id=tokenizer.pad_token_id,
            end_ids=_end_ids(self._model, tokenizer),
            max_new_tokens=checkpoint.recipe.decoding.max_new_tokens,
            prefixes_kept=IMAGES_AT_ONCE,
        )
        self._features: dict[str, Tensor] = {}
        self._option_ids: dict[tuple[str, str], list[int]] = {}

    def batches(self, items: Sequence[VQAItem]) -> list[list[VQAItem]]:
        """Batches of prompts of like length; each item once, each image within one run of batches."""
        by_image: dict[str, list[VQAItem]] = {}
        for item in items:
            by_image.setdefault(item.image_sha256, []).append(item)
        batches: list[list[VQAItem]] = []
        for images in _chunks(list(by_image.values()), IMAGES_AT_ONCE):
            questions = [item for group in images for item in group]
            questions.sort(key=lambda item: (len(self._prompt_ids(item)), item.item_id))
            batches += _chunks(questions, self._batch_size)
        return batches

    def answer(self, items: Sequence[VQAItem], *, blind: bool = False) -> list[Prediction]:
        """One greedy answer an item, in their order.

        Args:
            items: A batch.
            blind: Show the mean image in place of every item's own.

        Raises:
            InputError: An image does not decode; the item is named.
        """
        by_image = {item.image_sha256: item for item in items}
        choices = [options_of(item) if self._likelihoods else () for item in items]
        variants = [_variants(options) for options in choices]
        decoded = self._decoder.decode(
            [self._prompt_ids(item) for item in items],
            [_BLIND if blind else item.image_sha256 for item in items],
            lambda names: self._image_features(names, by_image),
            options=[[self._ids_of(item, text) for text in texts] for item, texts in zip(items, variants, strict=True)],
        )
        texts = self._checkpoint.tokenizer.batch_decode([one.ids for one in decoded], skip_special_tokens=True)
        return [
            Prediction(
                item_id=item.item_id,
                benchmark=item.benchmark,
                model=self._name,
                stage=self._stage,
                blind=blind,
                prompt=self._prompt(item),
                text=text.strip(),
                options=options,
                option_logprobs=_joined(options, one.option_logprobs),
            )
            for item, options, one, text in zip(items, choices, decoded, texts, strict=True)
        ]

    def _prompt(self, item: VQAItem) -> str:
        return (self._style or prompt_style(item.benchmark)).prompt(item)

    def _prompt_ids(self, item: VQAItem) -> list[int]:
        return self._encoder.prompt(self._prompt(item))

    def _ids_of(self, item: VQAItem, answer: str) -> list[int]:
        """Ids of an answer as the model learned to give it, with its end mark."""
        prompt = self._prompt(item)
        # What a prompt ends with decides how the answer's first word is cut into tokens.
        key = (prompt[-1:], answer)
        if key not in self._option_ids:
            turns = [Turn("user", prompt), Turn("assistant", answer)]
            self._option_ids[key] = self._encoder.encode(turns, item.item_id).ids[len(self._prompt_ids(item)) :]
        return self._option_ids[key]

    def _image_features(self, names: Sequence[str], by_image: dict[str, VQAItem]) -> Tensor:
        """Projected features (N, P, D) of named images, one encoding each."""
        import torch

        new = [name for name in dict.fromkeys(names) if name not in self._features]
        for group in _chunks(new, IMAGES_A_BATCH):
            features_NPD = self._encoded([self._pixels(name, by_image) for name in group])
            self._features |= dict(zip(group, features_NPD, strict=True))
        stacked = torch.stack([self._features[name] for name in names])
        for old in list(self._features)[: max(0, len(self._features) - IMAGES_AT_ONCE)]:
            del self._features[old]
        return stacked

    def _pixels(self, name: str, by_image: dict[str, VQAItem]) -> Tensor:
        if name == _BLIND:
            assert self._mean is not None, "a blind answer needs the mean image"
            return self._mean
        item = by_image[name]
        try:
            return self._checkpoint.processor(item.image.bytes)
        except InputError as error:
            where = f"item {item.item_id} of {item.benchmark}, image {item.image_id}"
            raise InputError(error.what, where=where, hint=error.hint) from error

    def _encoded(self, pixels: Sequence[Tensor]) -> Tensor:
        import torch

        pixels_NCHW = torch.stack(list(pixels)).to(self._model.device, self._model.dtype)
        features: Any = self._model.get_image_features(pixel_values=pixels_NCHW)
        features = getattr(features, "pooler_output", features)
        return torch.stack(list(features)) if isinstance(features, list | tuple) else features


def _device() -> str:
    """This process's GPU, or the CPU."""
    import os

    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return sorted({*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def _variants(options: Sequence[str]) -> list[str]:
    """Each option in small letters and with a capital: releases spell an answer both ways."""
    return [text for option in options for text in (option, option[:1].upper() + option[1:])]


def _joined(options: Sequence[str], logprobs: Sequence[float]) -> tuple[float, ...]:
    """Log-probability of each option in either spelling."""
    joined: list[float] = []
    for place, option in enumerate(options):
        one, other = logprobs[2 * place : 2 * place + 2]
        # A Chinese word has one spelling, which is not counted twice.
        both = one if option[:1].upper() == option[:1] else max(one, other) + math.log1p(math.exp(-abs(one - other)))
        joined.append(round(both, _DECIMALS))
    return tuple(joined)


def _chunks(values: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])
