"""``<im_start>`` and ``<im_end>`` learn alone: two rows of the input embedding, every other row as it was.

LLaVA v1's ``--tune_mm_mlp_adapter`` with ``--mm_use_im_start_end``: the original lets the whole input embedding learn
and puts the old rows back before each forward pass; the output embedding stays. Here the two rows are a parameter of
their own for the stage, so that gradients, optimiser states and ZeRO's shards are of two rows and not of the table.

Shape letters: B batch, L sequence, M marks, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from medvlm.models.tokenizer import IM_END, IM_START

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from medvlm.recipe_schema import Recipe, Stage

__all__ = ["MARKS", "MarkedEmbedding", "attach_marks", "detach_marks", "is_mark_rows", "mark_parameters", "take_marks"]

MARKS = (IM_START, IM_END)
_TABLE = "model.language_model.embed_tokens"
_ROWS = f"{_TABLE}.mark_rows"


def is_mark_rows(name: str) -> bool:
    """Whether a parameter is the marks' rows, by its name in the model."""
    return name == _ROWS


class MarkedEmbedding(nn.Module):
    """An embedding of which a few rows are a parameter of their own.

    Args:
        table: Looked up for every other token. Kept as ``base_layer``, as peft names what it stands before.
        token_ids: Of the marks.
    """

    def __init__(self, table: nn.Embedding, token_ids: list[int]) -> None:
        super().__init__()
        self.base_layer = table
        self.token_ids = token_ids
        self.mark_rows = nn.Parameter(table.weight.detach()[token_ids].clone())

    @property
    def weight(self) -> Tensor:
        """The table as it was before the stage."""
        return self.base_layer.weight

    def forward(self, input_ids_BL: Tensor) -> Tensor:
        """Embeddings (B, L, D)."""
        text_BLD = self.base_layer(input_ids_BL)
        marks_M = torch.tensor(self.token_ids, device=input_ids_BL.device)
        equal_BLM = input_ids_BL.unsqueeze(-1) == marks_M
        # The rows are read for every token, so that they have a gradient, if only zero, on every process.
        marks_BLD = functional.embedding(equal_BLM.int().argmax(-1), self.mark_rows)
        return torch.where(equal_BLM.any(-1, keepdim=True), marks_BLD.to(text_BLD.dtype), text_BLD)


def attach_marks(model: Any, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, stage: Stage) -> None:
    """Give the marks' rows a parameter of their own, where the model has marks and the stage trains them.

    Args:
        model: A ``MedVLMForConditionalGeneration``. Changed in place; its outputs stay as they are.
        tokenizer: Gives the marks' ids.
        recipe: Says whether the model has marks.
        stage: Of it.
    """
    if "image_marks" not in stage.trains or not recipe.model.mm_use_im_start_end:
        return
    ids: Any = tokenizer.convert_tokens_to_ids(list(MARKS))
    model.model.language_model.embed_tokens = MarkedEmbedding(model.model.language_model.embed_tokens, ids)


def take_marks(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model with the learned rows in their table, under the names of a plain model.

    Args:
        model: As ``attach_marks`` left it; gives the marks' ids.
        state: Of that model, whole; not changed.
    """
    if _ROWS not in state:
        return dict(state)
    weights = {name.replace(f"{_TABLE}.base_layer.", f"{_TABLE}."): value for name, value in state.items()}
    rows_MD = weights.pop(_ROWS)
    table_VD = weights[f"{_TABLE}.weight"].clone()
    table_VD[model.model.language_model.embed_tokens.token_ids] = rows_MD.to(table_VD)
    return {**weights, f"{_TABLE}.weight": table_VD}


def detach_marks(model: Any) -> None:
    """Put the plain table back; its rows are those from before the stage."""
    table = model.model.language_model.embed_tokens
    if isinstance(table, MarkedEmbedding):
        model.model.language_model.embed_tokens = table.base_layer


def mark_parameters(recipe: Recipe) -> int:
    """How many parameters the marks' rows have; 0 where the model has no marks."""
    return recipe.model.mm_use_im_start_end * len(MARKS) * recipe.model.language_model.hidden_size
