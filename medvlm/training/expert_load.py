"""How many tokens each expert gets, by layer and by modality, over a whole run.

Shape letters: B batch, L sequence, M modalities, N upcycled layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from medvlm.models.moe import MoELayer, moe_layers
from medvlm.store import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ExpertLoad", "balance"]

_FILE = "expert_load.json"


def balance(shares: Sequence[float]) -> float:
    """Entropy of the experts' shares over its maximum: 1 where each gets the same, 0 where one gets all."""
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return entropy / math.log(len(shares))


class ExpertLoad(TrainerCallback):
    """Counts of tokens by modality, layer and expert; padding is left out.

    They are part of each checkpoint, so that a resumed run's counts are those of the unbroken one.

    Args:
        model: An upcycled one.
        modalities: Modality of every sample, by its id.
    """

    def __init__(self, model: Any, modalities: Mapping[str, str]) -> None:
        layers = dict(moe_layers(model))
        self._layers: dict[int, MoELayer] = layers
        self._modality_of = modalities
        self.modalities = sorted(set(modalities.values()))
        experts = next(iter(layers.values())).router.weight.shape[0]
        self._own = torch.zeros((len(self.modalities), len(layers), experts), dtype=torch.int64)
        self._own_dropped = torch.zeros(1, dtype=torch.int64)
        # Of the run before it was stopped: all processes' counts.
        self._before = torch.zeros_like(self._own)
        self._before_dropped = torch.zeros_like(self._own_dropped)
        self._logged = torch.zeros_like(self._own)

    def add(self, spans: Sequence[Sequence[tuple[int, int]]], sample_ids: Sequence[Sequence[str]]) -> None:
        """Count the choices of the forward pass that just ran.

        Args:
            spans: For each row of the batch which of ``sample_ids`` its stretches are of, and their tokens; what
                is behind them is padding.
            sample_ids: Those that share an image and so a modality.
        """
        experts = self._own.shape[-1]
        modality = [self.modalities.index(self._modality_of[ids[0]]) for ids in sample_ids]
        for index, layer in enumerate(self._layers.values()):
            if layer.choice_BL is None:
                continue
            choice_BL = layer.choice_BL.cpu()
            place_BL = _places(spans, modality, choice_BL.shape)
            kept_BL = place_BL >= 0
            counts = torch.bincount(
                place_BL[kept_BL] * experts + choice_BL[kept_BL], minlength=len(self.modalities) * experts
            )
            self._own[:, index] += counts.view(-1, experts)
            self._own_dropped += layer.dropped

    def recent(self) -> dict[str, float]:
        """Balance of the experts since the last call, on this process; for the log."""
        new_NE = (self._own - self._logged).sum(0)
        self._logged = self._own.clone()
        return {"expert_balance": round(_mean_balance(new_NE), 4)}

    def resume(self, checkpoint: Path) -> None:
        """Go on from the counts of a checkpoint."""
        values = read_json(checkpoint / _FILE)
        self._before = torch.tensor(values["counts"])
        self._before_dropped = torch.tensor([values["dropped"]])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the counts into the checkpoint; every process takes part."""
        counts, dropped = self._total()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / _FILE, {"counts": counts.tolist(), "dropped": int(dropped)})

    def _total(self) -> tuple[Tensor, Tensor]:
        own = torch.cat([self._own.flatten(), self._own_dropped])
        if dist.is_initialized() and dist.get_world_size() > 1:
            own = own.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(own)
        summed = own.cpu()
        return self._before + summed[:-1].view_as(self._before), self._before_dropped + summed[-1]

    def summary(self) -> dict[str, Any]:
        """``expert_load`` (layer → expert → share), the same by modality, ``expert_balance`` and dropped tokens.

        Every process takes part.
        """
        counts_MNE, dropped = self._total()
        return {
            "expert_load": self._shares(counts_MNE.sum(0)),
            "expert_load_by_modality": {
                modality: self._shares(counts_MNE[index])
                for index, modality in enumerate(self.modalities)
                if counts_MNE[index].any()
            },
            "expert_balance": round(_mean_balance(counts_MNE.sum(0)), 6),
            "tokens_routed": int(counts_MNE.sum()),
            "tokens_dropped": int(dropped),
        }

    def _shares(self, counts_NE: Tensor) -> dict[str, dict[str, float]]:
        shares_NE = counts_NE / counts_NE.sum(-1, keepdim=True).clamp(min=1)
        return {
            str(layer): {str(expert): round(share, 6) for expert, share in enumerate(shares_NE[index].tolist())}
            for index, layer in enumerate(self._layers)
        }


def _places(spans: Sequence[Sequence[tuple[int, int]]], modality: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Modality of each token, (B, L), -1 at padding."""
    # Without a mask all rows stand in one, behind each other.
    rows = spans if len(spans) == shape[0] else [[span for row in spans for span in row]]
    place_BL = torch.full(tuple(shape), -1, dtype=torch.int64)
    for row, stretches in enumerate(rows):
        begin = 0
        for owner, length in stretches:
            place_BL[row, begin : begin + length] = modality[owner]
            begin += length
    return place_BL


def _mean_balance(counts_NE: Tensor) -> float:
    totals = counts_NE.sum(-1, keepdim=True)
    if not totals.all():
        return 0.0
    return sum(balance(shares) for shares in (counts_NE / totals).tolist()) / len(counts_NE)
