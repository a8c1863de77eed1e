"""What the domain router learns from: hidden states of labelled images, as stage 3 will route them.

Shape letters: B batch, L sequence, T states, D model width, N upcycled layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medvlm.data.watched import watched
from medvlm.errors import InputError
from medvlm.recipe_schema import MoE, Recipe
from medvlm.training.data import StageSample

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.models.checkpoint import Checkpoint
    from medvlm.training.collate import ConversationEncoder

__all__ = ["RouterStates", "by_modality", "collect_states", "labelled"]

HELD_OUT = 0.2
"""Share of each domain's images that accuracy is measured on."""
STATES_PER_IMAGE = 128
"""Hidden states of an image that are kept, over all layers: 1,000 images of Phi-2 take 1.3 GB."""
_BATCH_IMAGES = 16


@dataclass(frozen=True, slots=True)
class RouterStates:
    """Hidden states of labelled images."""

    states: Tensor
    """(T, D)."""
    domain: Tensor
    """(T,), of its image."""
    image: Tensor
    """(T,), which image a state is of, counted from 0."""
    layer: Tensor
    """(T,), which upcycled layer reads it, counted from 0."""
    images: int

    def first(self, images: int) -> RouterStates:
        """Those of the first images."""
        kept = self.image < images
        return RouterStates(
            self.states[kept], self.domain[kept], self.image[kept], self.layer[kept], min(images, self.images)
        )


def labelled(samples: Sequence[StageSample], moe: MoE, seed: int) -> tuple[list[StageSample], list[StageSample]]:
    """Images to learn from, the domains in turn so that any beginning is balanced, and held-out images.

    Args:
        samples: The first one of each image stands for it; those without a domain's modality are left out.
        moe: The domains, and how many labels may be learned from.
        seed: Of the draw. No image is in both lists.

    Raises:
        InputError: A domain has fewer than two images.
    """
    domain_of = {modality: index for index, domain in enumerate(moe.domains) for modality in domain}
    first: dict[str, StageSample] = {}
    for sample in samples:
        if sample.modality in domain_of:
            first.setdefault(sample.image_sha256, sample)
    rng = np.random.default_rng((seed, 0x0D0))
    train: list[list[StageSample]] = []
    held_out: list[StageSample] = []
    for index, domain in enumerate(moe.domains):
        of_domain = sorted((s for s in first.values() if domain_of[s.modality] == index), key=lambda s: s.image_sha256)
        if len(of_domain) < 2:
            raise InputError(
                f"{len(of_domain)} images are labelled {' or '.join(domain)}; at least 2 are needed, one to learn "
                "from and one to measure with",
                where="the instruction samples",
                hint="use a list with that modality, or take it out of model.moe.domains",
            )
        order = [of_domain[i] for i in rng.permutation(len(of_domain))]
        count = max(1, round(HELD_OUT * len(order)))
        held_out += order[:count]
        train.append(order[count:])
    in_turn = [queue[i] for i in range(max(map(len, train))) for queue in train if i < len(queue)]
    return in_turn[: moe.router.labels], held_out


def by_modality(samples: Sequence[StageSample]) -> dict[str, int]:
    """How many samples each modality has."""
    names = [sample.modality for sample in samples]
    return {name: names.count(name) for name in sorted(set(names))}


def collect_states(
    start: Checkpoint, recipe: Recipe, moe: MoE, samples: Sequence[StageSample], what: str
) -> RouterStates:
    """States of images, as the frozen model gives them at the inputs of the modules to be upcycled.

    Args:
        start: Stage 2's checkpoint.
        recipe: Gives the prompt's template and the seed that draws states.
        moe: Which layers, and which modality is whose.
        samples: One an image, each with the modality of a domain.
        what: Named in the progress.

    Raises:
        InputError: An image does not decode; the sample is named.
    """
    import torch

    from medvlm.training.collate import ConversationEncoder, Encoded, collate
    from medvlm.training.data import PixelStore

    instruct = recipe.stages[-2]
    encoder = ConversationEncoder(recipe, start.tokenizer, instruct.template, instruct.max_length)
    pixels = PixelStore(start.processor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = start.model.eval()
    model.to(device)
    domain_of = {modality: index for index, domain in enumerate(moe.domains) for modality in domain}
    rng = np.random.default_rng((recipe.seed, len(samples)))
    parts: list[tuple[Tensor, Tensor]] = []
    pad_id: Any = start.tokenizer.pad_token_id
    batches = [samples[begin : begin + _BATCH_IMAGES] for begin in range(0, len(samples), _BATCH_IMAGES)]
    for batch in watched(batches, len(batches), f"batches of images ({what})"):
        ids = [_prompt(encoder, sample) for sample in batch]
        rows = [
            {"sequences": [Encoded(tokens, tokens, 0)], "pixels": pixels(sample), "sample_ids": [sample.sample_id]}
            for tokens, sample in zip(ids, batch, strict=True)
        ]
        inputs = collate(rows, pad_id)
        for name in ("sample_ids", "spans", "labels"):
            del inputs[name]
        layers = _layer_inputs(model, {key: value.to(device) for key, value in inputs.items()}, moe.every)
        for index, tokens in enumerate(ids):
            parts.append(_drawn([layer[index] for layer in layers], tokens, encoder.image_id, rng))
    model.to("cpu")
    sizes = torch.tensor([len(states) for states, _ in parts])
    domains = torch.tensor([domain_of[sample.modality] for sample in samples])
    return RouterStates(
        states=torch.cat([states for states, _ in parts]),
        domain=domains.repeat_interleave(sizes),
        image=torch.arange(len(samples)).repeat_interleave(sizes),
        layer=torch.cat([layers for _, layers in parts]),
        images=len(samples),
    )


def _prompt(encoder: ConversationEncoder, sample: StageSample) -> list[int]:
    """Ids of a sample's first question, as training has it, up to where the answer begins."""
    from medvlm.training.collate import IGNORED

    encoded = encoder.encode(sample.turns[:2], sample.sample_id)
    return encoded.ids[: next(i for i, label in enumerate(encoded.labels) if label != IGNORED)]


def _layer_inputs(model: Any, inputs: dict[str, Any], every: int) -> list[Tensor]:
    """Inputs (B, L, D) of every ``every``-th feed-forward module."""
    import torch

    seen: list[Tensor] = []

    def keep(module: Any, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0].float().cpu())

    hooks = [layer.mlp.register_forward_pre_hook(keep) for layer in list(model.model.language_model.layers)[::every]]
    try:
        with torch.inference_mode():
            model.model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [layer.clone() for layer in seen]


def _drawn(layers: Sequence[Tensor], tokens: Sequence[int], image_id: int, rng: Any) -> tuple[Tensor, Tensor]:
    """States of one image, half of them at its placeholders and half behind them, the same number of each layer."""
    import torch

    first = tokens.index(image_id)
    at_image = [i for i, token in enumerate(tokens) if token == image_id]
    behind = [i for i in range(first, len(tokens)) if tokens[i] != image_id]
    share = max(1, STATES_PER_IMAGE // (2 * len(layers)))
    states: list[Tensor] = []
    places: list[int] = []
    for index, layer_LD in enumerate(layers):
        chosen = [i for group in (at_image, behind) for i in rng.permutation(group)[:share]]
        states.append(layer_LD[torch.tensor(chosen, dtype=torch.int64)])
        places += [index] * len(chosen)
    return torch.cat(states), torch.tensor(places)
