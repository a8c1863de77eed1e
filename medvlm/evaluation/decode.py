"""Greedy decoding of many prompts: what they share is read once, and finished answers leave the batch.

Shape letters: B batch, N images, L sequence, D model width, P placeholders of an image, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from medvlm.models.packed import PackedLinears
from medvlm.models.vlm import merge_image_features

__all__ = ["Decoded", "GreedyDecoder", "common_prefix"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a model says to one prompt."""

    ids: list[int]
    """Without the end mark."""
    option_logprobs: tuple[float, ...]
    """Log-probability of each option as the whole answer, its end mark included, in nats."""


def common_prefix(prompts: Sequence[list[int]], image_id: int) -> int:
    """How many first tokens are read once for all prompts.

    Where all prompts begin alike up to their image, the image is the end: so one image has one
    prefix, whatever its questions begin with. Else as many as are the same; never a whole prompt.
    """
    first, last = min(prompts), max(prompts)
    length = 0
    longest = min(map(len, prompts)) - 1
    while length < longest and first[length] == last[length]:
        length += 1
    places = [place for place, token in enumerate(first) if token == image_id]
    if not places or length <= places[0]:
        return length
    return places[-1] + 1 if length > places[-1] else places[0]


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer, written into memory that is taken once.

    transformers' own layer copies everything that it holds for each new token.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._all_keys: Any = None
        self._all_values: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._all_keys = key_states.new_empty((*key_states.shape[:2], self._room, key_states.shape[3]))
        self._all_values = value_states.new_empty((*value_states.shape[:2], self._room, value_states.shape[3]))
        self.is_initialized = True
        self.cut(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys: Any = self.keys
        start, end = keys.shape[2], keys.shape[2] + key_states.shape[2]
        self._all_keys[:, :, start:end] = key_states
        self._all_values[:, :, start:end] = value_states
        self.cut(end)
        filled: Any = (self.keys, self.values)
        return filled

    def cut(self, length: int) -> None:
        """Forget all but the first ``length`` places."""
        self.keys, self.values = self._all_keys[:, :, :length], self._all_values[:, :, :length]

    def keep(self, rows_B: Tensor) -> None:
        """Forget all but some sequences."""
        length = self.get_seq_length()
        self._all_keys, self._all_values = self._all_keys[rows_B], self._all_values[rows_B]
        self.cut(length)


class GreedyDecoder:
    """Answers prompts with one image each, greedily.

    Args:
        model: In evaluation mode, on its device.
        pad_id: Fills; never attended.
        end_ids: Any of them ends an answer.
        max_new_tokens: Of an answer.
        prefixes_kept: Images whose read prefix is kept for later batches.
    """

    def __init__(
        self, model: Any, *, pad_id: int, end_ids: Sequence[int], max_new_tokens: int, prefixes_kept: int
    ) -> None:
        self._model = model
        self._pad_id = pad_id
        self._ends = torch.tensor(list(end_ids), device=model.device)
        self._max_new_tokens = max_new_tokens
        self._prefixes_kept = prefixes_kept
        self._linears = PackedLinears()
        self._layers: int = model.config.get_text_config().num_hidden_layers
        self._read: dict[tuple[str, tuple[int, ...]], list[tuple[Tensor, Tensor]]] = {}

    @torch.inference_mode()
    def decode(
        self,
        prompts: Sequence[list[int]],
        images: Sequence[str],
        features: Callable[[Sequence[str]], Tensor],
        *,
        options: Sequence[Sequence[list[int]]] | None = None,
    ) -> list[Decoded]:
        """Greedy answers, in the order of the prompts; the same whatever else is in the batch.

        Args:
            prompts: Token ids, each with its image's placeholders once.
            images: A name for each prompt's image; equal names are one image.
            features: Gives the projected features (N, P, D) of named images.
            options: For each prompt the ids of the answers whose likelihood is wanted, end mark included.
        """
        image_id: int = self._model.config.image_token_id
        shared = common_prefix(prompts, image_id)
        options = options or [()] * len(prompts)
        longest = max((len(ids) for row in options for ids in row), default=0)
        width = max(len(ids) for ids in prompts) - shared
        room = shared + width + max(longest, self._max_new_tokens)
        layers = [_RoomyLayer(room) for _ in range(self._layers)]
        seen = image_id in prompts[0][:shared]  # the prefix holds the image: it is read once an image
        if shared:
            self._fill(layers, prompts[0][:shared], images if seen else [""] * len(prompts), features)
        logits_BV, mask_BL = self._read_rest([ids[shared:] for ids in prompts], shared, layers, images, features, seen)
        scored = self._score(options, logits_BV, mask_BL, layers)
        answers = self._extend(logits_BV, mask_BL, layers)
        return [Decoded(ids, logprobs) for ids, logprobs in zip(answers, scored, strict=True)]

    def _fill(
        self, layers: list[_RoomyLayer], prefix: list[int], images: Sequence[str], features: Callable[..., Tensor]
    ) -> None:
        """Put the read prefix of each prompt's image in place, reading those that are new."""
        key = tuple(prefix)
        new = [name for name in dict.fromkeys(images) if (name, key) not in self._read]
        if new:
            ids_NL = torch.tensor([prefix] * len(new), device=self._model.device)
            embeddings_NLD = self._embed(ids_NL, features(new) if new != [""] else None)
            cache = DynamicCache()
            with self._linears:
                self._model.model.language_model(inputs_embeds=embeddings_NLD, past_key_values=cache, use_cache=True)
            read: list[Any] = list(cache.layers)
            for row, name in enumerate(new):
                self._read[name, key] = [(layer.keys[row], layer.values[row]) for layer in read]
        for place, layer in enumerate(layers):
            layer.update(
                torch.stack([self._read[name, key][place][0] for name in images]),
                torch.stack([self._read[name, key][place][1] for name in images]),
            )
        for old in list(self._read)[: max(0, len(self._read) - self._prefixes_kept)]:
            del self._read[old]

    def _read_rest(
        self,
        rest: Sequence[list[int]],
        shared: int,
        layers: list[_RoomyLayer],
        images: Sequence[str],
        features: Callable[..., Tensor],
        seen: bool,
    ) -> tuple[Tensor, Tensor]:
        """Read what is each prompt's own, padded on the left so that all answers begin at one place.

        Returns:
            Logits of the first token of each answer (B, V), and the attention mask so far (B, L).
        """
        device = self._model.device
        width = max(map(len, rest))
        ids_BL = torch.tensor([[self._pad_id] * (width - len(ids)) + ids for ids in rest], device=device)
        own_BL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rest], device=device)
        mask_BL = torch.cat([own_BL.new_ones((len(rest), shared)), own_BL], dim=1)
        features_BPD = None
        if not seen:
            names = list(dict.fromkeys(images))
            features_BPD = features(names)[[names.index(name) for name in images]]
        logits_BV = self._forward(self._embed(ids_BL, features_BPD), mask_BL, layers)[:, -1]
        return logits_BV, mask_BL

    def _embed(self, ids_BL: Tensor, features_BPD: Tensor | None) -> Tensor:
        text_BLD: Tensor = self._model.get_input_embeddings()(ids_BL)
        if features_BPD is None:
            return text_BLD
        return merge_image_features(text_BLD, features_BPD, ids_BL, image_token_id=self._model.config.image_token_id)

    def _forward(self, embeddings_BLD: Tensor, mask_BL: Tensor, layers: list[_RoomyLayer], *, keep: int = 1) -> Tensor:
        """Logits (B, keep, V) of the last ``keep`` places; the layers take in the keys and values."""
        width = embeddings_BLD.shape[1]
        position_BL = (mask_BL.cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        cache: Any = Cache(layers=list(layers))
        with self._linears:
            hidden_BLD = self._model.model.language_model(
                inputs_embeds=embeddings_BLD,
                attention_mask=mask_BL,
                position_ids=position_BL,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            return self._model.lm_head(hidden_BLD[:, -keep:])

    def _score(
        self,
        options: Sequence[Sequence[list[int]]],
        logits_BV: Tensor,
        mask_BL: Tensor,
        layers: list[_RoomyLayer],
    ) -> list[tuple[float, ...]]:
        """Log-probability of each option; the layers are left as they were."""
        scored: list[list[float]] = [[] for _ in options]
        first_BV = logits_BV.float().log_softmax(dim=-1)
        length = layers[0].get_seq_length()
        for place in range(max(map(len, options))):
            rows = [row for row, given in enumerate(options) if place < len(given)]
            width = max(len(options[row][place]) for row in rows)
            # A row without this option takes padding along: splitting the batch would cost a copy of it.
            ids_BL = torch.full((len(options), width), self._pad_id, device=mask_BL.device)
            for row in rows:
                ids_BL[row, : len(options[row][place])] = ids_BL.new_tensor(options[row][place])
            logprob_BLV = first_BV[:, None]
            if width > 1:
                new_BL = mask_BL.new_ones((len(options), width - 1))
                text_BLD = self._embed(ids_BL[:, :-1], None)
                later_BLV = self._forward(text_BLD, torch.cat([mask_BL, new_BL], 1), layers, keep=width - 1)
                logprob_BLV = torch.cat([logprob_BLV, later_BLV.float().log_softmax(dim=-1)], dim=1)
                for layer in layers:
                    layer.cut(length)
            token_BL = logprob_BLV.gather(2, ids_BL[..., None])[..., 0]
            for row in rows:
                scored[row].append(float(token_BL[row, : len(options[row][place])].sum()))
        return [tuple(values) for values in scored]

    def _extend(self, logits_BV: Tensor, mask_BL: Tensor, layers: list[_RoomyLayer]) -> list[list[int]]:
        """Greedy ids from the first logits on; a sequence that has ended is computed no further."""
        answers: list[list[int]] = [[] for _ in range(len(logits_BV))]
        row_B = torch.arange(len(logits_BV), device=logits_BV.device)
        going_B = torch.ones_like(row_B, dtype=torch.bool)
        for step in range(self._max_new_tokens):
            token_B = logits_BV.argmax(dim=-1)
            going_B &= ~torch.isin(token_B, self._ends)
            for row, token, going in zip(row_B.tolist(), token_B.tolist(), going_B.tolist(), strict=True):
                if going:
                    answers[row].append(token)
            if step + 1 == self._max_new_tokens or not bool(going_B.any()):
                break
            if int(going_B.sum()) * 2 <= len(going_B):  # each move copies what stays, so not at every step
                kept_B = going_B.nonzero()[:, 0]
                row_B, token_B, mask_BL, going_B = (values[kept_B] for values in (row_B, token_B, mask_BL, going_B))
                for layer in layers:
                    layer.keep(kept_B)
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones((len(mask_BL), 1))], dim=1)
            logits_BV = self._forward(self._embed(token_B[:, None], None), mask_BL, layers)[:, -1]
        return answers
