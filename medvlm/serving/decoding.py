"""The decoding of several answers at once: rows come and go between two tokens.

Every row has its own length; all are padded on the left, so that a step reads one token of each.
Transformers' own continuous batching takes token ids only and cannot bring in an image, which is
why the few tensor operations that it needs stand here.

Shape letters: B rows, L tokens so far with padding, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medvlm.serving.chat import Prepared, Sampling

if TYPE_CHECKING:
    from torch import Generator, Tensor

__all__ = ["Batch", "Row"]


@dataclass(eq=False, slots=True)
class Row:
    """One answer that is being made."""

    question: Prepared
    sampling: Sampling
    ids: list[int] = field(default_factory=list[int])
    """Tokens of the answer so far."""
    generator: Generator | None = None
    """The row's own chance, so that its answer does not depend on who is answered beside it."""

    @property
    def length(self) -> int:
        """Tokens of question and answer that are in the cache."""
        return len(self.question.ids) + max(0, len(self.ids) - 1)


class Batch:
    """Rows that are decoded together.

    Args:
        model: A LLaVA-like model in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self.rows: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Read new rows' questions, all in one pass; each gets its first token.

        Args:
            rows: At least one.
        """
        import torch

        with torch.inference_mode():
            cache, logits_BV = self._read(rows)
            for row in rows:
                row.generator = torch.Generator("cpu").manual_seed(row.sampling.seed)
            _choose(rows, logits_BV)
            self._cache = cache if not self.rows else _joined(self._cache, cache)
            self.rows += rows

    def step(self) -> None:
        """One more token for every row."""
        import torch

        with torch.inference_mode():
            device = self._model.device
            lengths = [row.length for row in self.rows]
            longest = max(lengths)
            mask_BL = torch.tensor([[0] * (longest - n) + [1] * (n + 1) for n in lengths], device=device)
            out = self._model(
                input_ids=torch.tensor([[row.ids[-1]] for row in self.rows], device=device),
                attention_mask=mask_BL,
                position_ids=torch.tensor([[n] for n in lengths], device=device),
                past_key_values=self._cache,
                use_cache=True,
            )
            _choose(self.rows, out.logits[:, -1])

    def drop(self, gone: Sequence[Row]) -> None:
        """Take finished rows out, and the padding that only they had needed.

        Args:
            gone: Among ``rows``.
        """
        import torch

        stay = [index for index, row in enumerate(self.rows) if row not in gone]
        if len(stay) == len(self.rows):
            return
        before = max(row.length for row in self.rows)
        self.rows = [self.rows[index] for index in stay]
        if not stay:
            self._cache = None
            return
        padding = before - max(row.length for row in self.rows)
        places = torch.tensor(stay, device=self._model.device)
        self._cache = _cache((k[places, :, padding:], v[places, :, padding:]) for k, v in _layers(self._cache))

    def _read(self, rows: Sequence[Row]) -> tuple[Any, Tensor]:
        """The cache of new rows, and the logits (B, V) after their questions."""
        import torch
        from transformers import DynamicCache

        model = self._model
        prompts = [row.question.ids for row in rows]
        longest = max(map(len, prompts))
        # Any token does for padding: it is never attended. But an image's mark would want an image.
        pad = next(token for token in range(2) if token != model.config.image_token_id)
        ids_BL = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
        mask_BL = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        pixels = [row.question.pixels for row in rows if row.question.pixels is not None]
        images = {"pixel_values": torch.stack(pixels).to(model.device, model.dtype)} if pixels else {}
        cache = DynamicCache()
        out = model(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            position_ids=(mask_BL.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **images,
        )
        return cache, out.logits[:, -1]


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cache(layers: Any) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def _joined(first: Any, second: Any) -> Any:
    """Two caches as one, the rows of the second after those of the first, padded on the left."""
    import torch
    from torch.nn.functional import pad

    length = max(first.get_seq_length(), second.get_seq_length())

    def padded(states: Tensor) -> Tensor:
        return pad(states, (0, 0, length - states.shape[-2], 0))

    pairs = zip(_layers(first), _layers(second), strict=True)
    return _cache(
        (torch.cat([padded(k1), padded(k2)]), torch.cat([padded(v1), padded(v2)])) for (k1, v1), (k2, v2) in pairs
    )


def _choose(rows: Sequence[Row], logits_BV: Tensor) -> None:
    """Each row's next token: the likeliest, or drawn as its sampling says."""
    greedy: list[int] = logits_BV.argmax(-1).tolist()
    for index, row in enumerate(rows):
        row.ids.append(_drawn(logits_BV[index], row) if row.sampling.temperature > 0 else greedy[index])


def _drawn(logits_V: Tensor, row: Row) -> int:
    """A token by temperature and nucleus (Holtzman et al. 2020)."""
    import torch

    shares_V, order_V = (logits_V.float().cpu() / row.sampling.temperature).softmax(-1).sort(descending=True)
    # The token that crosses the limit is kept, so that at least one is.
    shares_V[shares_V.cumsum(-1) - shares_V >= row.sampling.top_p] = 0
    return int(order_V[torch.multinomial(shares_V, 1, generator=row.generator)])
