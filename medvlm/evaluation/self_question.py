"""A checkpoint that asks and answers by sampling: what preference pairs are made of.

Shape letters: B batch, L sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medvlm.data.preference import GenerationRequest
from medvlm.errors import InputError
from medvlm.models.template import IMAGE_MARK
from medvlm.records import Turn

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.models.checkpoint import Checkpoint

__all__ = ["DESCRIBE", "SelfQuestioner", "ask"]

DESCRIBE = "Can you describe the image in detail?"
"""What STLLaVA-Med has the model answer before it asks: in training, a question of its own never comes first."""

_BATCH = 32
_QUESTION_TOKENS = 64


def ask(
    checkpoint: Checkpoint,
    images: Sequence[bytes],
    *,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 0.95,
) -> list[str]:
    """A question of the model's own for each image, as it was written: it may not be a question at all.

    The model describes the image first, greedily, and is then given the role that asks. STLLaVA-Med samples
    at temperature 1.2 and top-p 0.95.

    Args:
        checkpoint: Trained with ``self_question_ratio`` above 0, in a template that has that role.
        images: Encoded.
        seeds: Of the sampling, one an image: the same seed and image give the same question in any batch.
        temperature: Higher asks more various things.
        top_p: Tokens outside this share of probability are never taken.

    Raises:
        InputError: The model was not taught to ask, or an image does not decode.
    """
    writer = SelfQuestioner(checkpoint, temperature=temperature, top_p=top_p)
    if not writer.can_ask:
        raise InputError(
            "this model was not taught to ask questions",
            where=f"recipe {checkpoint.recipe.name}, stage {checkpoint.metadata['stage']}",
            hint="take a recipe with self_question_ratio, such as stllava-med, or ask questions of a dataset",
        )
    numbers = range(len(images)) if seeds is None else seeds
    requests = [GenerationRequest(image, "", seed) for image, seed in zip(images, numbers, strict=True)]
    return writer.ask(requests)


class SelfQuestioner:
    """A checkpoint that samples: ``answer`` and ``ask`` both take requests and give a text for each.

    Args:
        checkpoint: In evaluation mode from here on, on the GPU where there is one.
        temperature: 0 takes the likeliest token.
        top_p: Tokens outside this share of probability are never taken.
        max_new_tokens: Of an answer.
        batch_size: Requests at once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        temperature: float = 0.8,
        top_p: float = 1.0,
        max_new_tokens: int = 128,
        batch_size: int = _BATCH,
    ) -> None:
        import torch

        from medvlm.training.collate import ConversationEncoder

        self._checkpoint = checkpoint
        model: Any = checkpoint.model  # transformers' own types contradict each other here
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        _, stage = checkpoint.recipe.stage(checkpoint.metadata["stage"])
        positions = checkpoint.recipe.model.language_model.max_positions
        self._encoder = ConversationEncoder(checkpoint.recipe, checkpoint.tokenizer, stage.template, positions)
        self._positions = positions
        self._temperature = temperature
        self._top_p = top_p
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size

    @property
    def can_ask(self) -> bool:
        """Whether the model knows the role that asks."""
        return bool(self._encoder.template.asks)

    def answer(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """An answer to each request's prompt.

        Raises:
            InputError: An image does not decode.
        """
        prompts = [self._encoder.prompt(request.prompt) for request in requests]
        return self._written(requests, prompts, self._temperature, self._max_new_tokens)

    def ask(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """A question of the model's own about each request's image.

        The prompts are for a model that has no role that asks: they ask it, as a user would, for a question.

        Raises:
            InputError: An image does not decode.
        """
        if not self.can_ask:
            return self.answer(requests)
        first = f"{IMAGE_MARK}\n{DESCRIBE}"
        opening = [self._encoder.prompt(first)] * len(requests)
        described = self._written(requests, opening, 0.0, self._max_new_tokens)
        prompts = [self._encoder.asking_prompt([Turn("user", first), Turn("assistant", text)]) for text in described]
        return self._written(requests, prompts, self._temperature, _QUESTION_TOKENS)

    def _written(
        self, requests: Sequence[GenerationRequest], prompts: Sequence[list[int]], temperature: float, tokens: int
    ) -> list[str]:
        # Prompts of like length share a batch; the texts come back in the order of the requests.
        order = sorted(range(len(requests)), key=lambda index: (len(prompts[index]), index))
        texts: dict[int, str] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            rows = self._batch([requests[i] for i in batch], [prompts[i] for i in batch], temperature, tokens)
            texts |= dict(zip(batch, rows, strict=True))
        return [texts[index] for index in range(len(requests))]

    def _batch(
        self, requests: Sequence[GenerationRequest], prompts: Sequence[list[int]], temperature: float, tokens: int
    ) -> list[str]:
        import torch
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        model, tokenizer = self._model, self._checkpoint.tokenizer
        length = max(map(len, prompts))
        pad: Any = tokenizer.pad_token_id
        ids_BL = torch.tensor([[pad] * (length - len(ids)) + ids for ids in prompts], device=model.device)
        mask_BL = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        images = {request.image: self._checkpoint.processor(request.image) for request in requests}
        pixels = torch.stack([images[request.image] for request in requests])
        chosen = LogitsProcessorList()
        if temperature > 0:
            chosen += [TemperatureLogitsWarper(temperature), TopPLogitsWarper(self._top_p)]
            chosen.append(_seeded_noise([request.seed for request in requests]))
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                pixel_values=pixels.to(model.device, model.dtype),
                max_new_tokens=max(1, min(tokens, self._positions - length)),
                do_sample=False,
                logits_processor=chosen,
            )
        return [text.strip() for text in tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)]


def _seeded_noise(seeds: Sequence[int]) -> Any:
    """Turns taking the likeliest token into sampling, with a seed for each row (the Gumbel-max trick).

    So a text depends on its own seed and not on what else is in its batch.
    """
    import torch
    from transformers import LogitsProcessor

    class SeededNoise(LogitsProcessor):
        def __init__(self) -> None:
            self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            rows = [torch.rand(scores.shape[-1], generator=one, dtype=torch.float64) for one in self.generators]
            # rand can give 0, whose logarithm is infinite.
            uniform_BV = torch.stack(rows).clamp(min=1e-300)
            return scores + (-(-uniform_BV.log()).log()).to(scores)

    return SeededNoise()
