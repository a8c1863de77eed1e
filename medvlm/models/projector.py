"""Projectors: patch features of the tower → embeddings of the language model. One class a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["PROJECTORS", "LinearProjector", "MLPProjector"]


class LinearProjector(nn.Module):
    """One linear layer: LLaVA v1 and LLaVA-Med v1."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features_NPV: Tensor) -> Tensor:
        """Embeddings (N, P, D) of patch features (N, P, V)."""
        return self.linear(features_NPV)


class MLPProjector(nn.Module):
    """Two linear layers with GELU between: LLaVA v1.5, Med-MoE, Qilin-Med-VL.

    Its names are those of transformers' LLaVA, so that a checkpoint exports without renaming.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features_NPV: Tensor) -> Tensor:
        """Embeddings (N, P, D) of patch features (N, P, V)."""
        return self.linear_2(self.act(self.linear_1(features_NPV)))


PROJECTORS: dict[str, Callable[[Any], nn.Module]] = {"linear": LinearProjector, "mlp2x_gelu": MLPProjector}
"""A kind's name in the recipe and in config.json → what builds it from the model's configuration."""
