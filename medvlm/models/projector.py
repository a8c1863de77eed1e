"""Projectors: patch features of the tower → embeddings of the language model. One class a kind.

Shape letters: N images, P patches, V tower width, K prototypes, D model width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["PROJECTORS", "ClusterProjector", "LinearProjector", "MLPProjector", "PooledClusterProjector"]


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

    Args:
        config: ``projector_standardised`` says whether features are standardised first, by ``mean`` and ``spread``
            (V,), which are set once (``medvlm.training.projector_start``) and never learn.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, tower = config.text_config.hidden_size, config.vision_config.hidden_size
        self.standardised: bool = config.projector_standardised
        if self.standardised:
            self.register_buffer("mean", torch.zeros(tower))
            self.register_buffer("spread", torch.ones(tower))
        self.linear_1 = nn.Linear(tower, width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features_NPV: Tensor) -> Tensor:
        """Embeddings (N, P, D) of patch features (N, P, V)."""
        if self.standardised:
            # Some engines keep buffers in float32 where weights are bfloat16.
            standard_NPV = (features_NPV.float() - self.mean) / self.spread
            features_NPV = standard_NPV.to(self.linear_1.weight.dtype)
        return self.linear_2(self.act(self.linear_1(features_NPV)))


class ClusterProjector(nn.Module):
    """Prototype extractor, then two linear layers: SQ-LLaVA and STLLaVA-Med.

    Learned prototypes gather the patches that resemble them and give back what they gathered, so that a
    patch knows of the others of its kind before it is projected. From the description in SQ-LLaVA (Sun et
    al. 2024, section 3.3) and ClusterFormer (Liang et al. 2023, section 3.1): cross-attention in which patches
    choose among centres, a few rounds of it, then dispatch by similarity. Our own implementation; its weights
    are not those of the published files, for which there is ``PooledClusterProjector``.

    Shapes: features (N, P, V) → K centres (N, K, V) → features (N, P, V) → embeddings (N, P, D). A permutation
    of an image's patches permutes its embeddings and changes nothing else; images do not see each other.

    Args:
        config: ``projector_prototypes`` is K; V and D are the widths of tower and language model.
    """

    rounds = 3
    """How often centres gather; ClusterFormer's number."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        tower, width = config.vision_config.hidden_size, config.text_config.hidden_size
        # Drawn like every other weight from the seed of whoever builds the model.
        self.prototypes = nn.Parameter(torch.randn(config.projector_prototypes, tower))
        self.norm = nn.LayerNorm(tower)
        self.query = nn.Linear(tower, tower, bias=False)
        self.key = nn.Linear(tower, tower, bias=False)
        self.value = nn.Linear(tower, tower, bias=False)
        # exp of it multiplies cosines: 10 tells centres apart from the start without being a hard choice.
        self.log_sharpness = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.linear_1 = nn.Linear(tower, width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features_NPV: Tensor) -> Tensor:
        """Embeddings (N, P, D) of patch features (N, P, V)."""
        given_NPV = self.dispatch(features_NPV, self.centres(features_NPV))
        return self.linear_2(self.act(self.linear_1(features_NPV + given_NPV)))

    def centres(self, features_NPV: Tensor) -> Tensor:
        """What each prototype gathered from an image's patches, (N, K, V)."""
        normed_NPV = self.norm(features_NPV)
        keys_NPV, values_NPV = self.key(normed_NPV), self.value(normed_NPV)
        centres_NKV = self.prototypes.expand(features_NPV.shape[0], -1, -1)
        for _ in range(self.rounds):
            choice_NPK = self._similarity(keys_NPV, self.query(centres_NKV)).softmax(-1)
            # A mean over the patches that chose a centre, whatever their number.
            weight_NPK = choice_NPK / (choice_NPK.sum(1, keepdim=True) + 1e-6)
            centres_NKV = self.prototypes + weight_NPK.transpose(1, 2) @ values_NPV
        return centres_NKV

    def dispatch(self, features_NPV: Tensor, centres_NKV: Tensor) -> Tensor:
        """What each patch gets back: the centres, by their likeness to it, (N, P, V)."""
        likeness_NPK = self._similarity(self.key(self.norm(features_NPV)), self.query(centres_NKV)).softmax(-1)
        return likeness_NPK @ centres_NKV

    def _similarity(self, patches_NPV: Tensor, centres_NKV: Tensor) -> Tensor:
        """Cosines (N, P, K), sharpened."""
        cosine_NPK = functional.normalize(patches_NPV, dim=-1) @ functional.normalize(centres_NKV, dim=-1).mT
        return cosine_NPK * self.log_sharpness.exp()


class PooledClusterProjector(nn.Module):
    """The function that the published weights of SQ-LLaVA's and STLLaVA-Med's ``cluster`` projector belong to.

    Written anew from what heliossun/STLLaVA-Med computes (``llava/model/multimodal_projector/cluster.py`` at 9113c41,
    MIT), which is not what the paper describes: centres begin as pooled stretches of the patches' row and not as
    learned prototypes, the cosine between centres and patches is normalised along the patches on one side and along
    the channels on the other, and a patch is dispatched from its most similar centre alone. A stored layer norm
    (``ln_1``) is read by nothing there, and is not here.

    Args:
        config: ``projector_prototypes`` is K; V and D are the widths of tower and language model.
    """

    rounds = 2

    def __init__(self, config: Any) -> None:
        super().__init__()
        tower, width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.prototypes: int = config.projector_prototypes
        self.likeness_scale = nn.Parameter(torch.ones(1, 1, 1))
        self.likeness_shift = nn.Parameter(torch.zeros(1, 1, 1))
        self.centre = nn.Linear(tower, tower)
        self.key = nn.Linear(tower, tower)
        self.value = nn.Linear(tower, tower)
        self.linear_1 = nn.Linear(tower, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features_NPV: Tensor) -> Tensor:
        """Embeddings (N, P, D) of patch features (N, P, V)."""
        values_NPV = self.value(features_NPV)
        likeness_NKP = self._dispatched(self.centres(features_NPV, values_NPV), features_NPV)
        members_NK1 = (likeness_NKP > 0).sum(-1, keepdim=True)
        # A mean over a centre's members and over what was pooled where it began.
        gathered_NKV = (likeness_NKP @ values_NPV + self._pooled(values_NPV)) / (members_NK1 + 1.0)
        hidden_NPD = self.linear_1(features_NPV + likeness_NKP.mT @ gathered_NKV)
        # The sigmoid's approximation of GELU, CLIP's.
        return self.linear_2(hidden_NPD * torch.sigmoid(1.702 * hidden_NPD))

    def centres(self, features_NPV: Tensor, values_NPV: Tensor) -> Tensor:
        """What each centre gathered, (N, K, V)."""
        # Each channel has length 1 over the patches: so published, where each patch was to be expected.
        keys_NVP = functional.normalize(self.key(features_NPV).mT, dim=-1)
        centres_NKV = self._pooled(features_NPV)
        for _ in range(self.rounds):
            queries_NKV = functional.normalize(self.centre(centres_NKV), dim=-1)
            centres_NKV = (queries_NKV @ keys_NVP).softmax(-2) @ values_NPV
        return centres_NKV

    def _dispatched(self, centres_NKV: Tensor, features_NPV: Tensor) -> Tensor:
        """Likeness of each patch to its centre, above 0, and 0 to every other centre: (N, K, P)."""
        cosine_NKP = functional.normalize(centres_NKV, dim=-1) @ functional.normalize(features_NPV, dim=-1).mT
        likeness_NKP = torch.sigmoid(self.likeness_shift + self.likeness_scale * cosine_NKP)
        nearest_NKP = torch.zeros_like(likeness_NKP).scatter_(1, likeness_NKP.argmax(1, keepdim=True), 1.0)
        return likeness_NKP * nearest_NKP

    def _pooled(self, rows_NPV: Tensor) -> Tensor:
        """K means over stretches of the patches' row that cover it evenly, (N, K, V)."""
        return functional.adaptive_avg_pool1d(rows_NPV.mT, self.prototypes).mT


PROJECTORS: dict[str, Callable[[Any], nn.Module]] = {
    "linear": LinearProjector,
    "mlp2x_gelu": MLPProjector,
    "cluster": ClusterProjector,
    "cluster_pooled": PooledClusterProjector,
}
"""A kind's name in the recipe and in config.json → what builds it from the model's configuration."""
