"""What direct preference optimisation compares with: the answers' log-probabilities before training.

The loss is TRL's, and a test compares the two. Its trainer (1.16) carries this model as well, with a ``LlavaProcessor``
and a second model as the reference; but for images it refuses to compute references beforehand, decodes every image
anew for each batch, takes its text from a Jinja template and makes the logits of all tokens. So the stage's own
trainer is used here too, whose cache, templates and exact resume it shares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm.store import read_json, write_json
from medvlm.training.engine import Engine

if TYPE_CHECKING:
    from medvlm.training.data import StageSample

__all__ = ["reference_log_probabilities"]

_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


def reference_log_probabilities(
    path: Path,
    model: Any,
    samples: Sequence[StageSample],
    batch_of: Callable[[Sequence[StageSample]], dict[str, Any]],
    engine: Engine,
) -> dict[str, tuple[float, float]]:
    """Log-probabilities of each pair's chosen and rejected answer under the model as it is now, by pair.

    Computed once, before the first step, so that no second model has to be held, whatever the stage trains; kept
    in a file, as a run that resumes no longer has the model that it began with. Call it on every process: each
    computes its share.

    Args:
        path: The file, in the job's scratch folder.
        model: As the stage begins, with or without fresh adapters; left in training mode, on the CPU.
        samples: Of preference pairs.
        batch_of: Makes a batch of them, as for training.
        engine: Gives device, precision, batch size and processes.
    """
    import torch.distributed as dist

    if path.is_file():
        return {name: (chosen, rejected) for name, (chosen, rejected) in read_json(path).items()}
    share = _log_probabilities(model, samples[engine.rank :: engine.processes], batch_of, engine)
    if engine.processes > 1:
        shares: list[dict[str, tuple[float, float]]] = [{} for _ in range(engine.processes)]
        dist.all_gather_object(shares, share)
        share = {name: pair for one in shares for name, pair in one.items()}
    if engine.rank == 0:
        write_json(path, share)
    if engine.processes > 1:
        dist.barrier()
    return share


def _log_probabilities(
    model: Any,
    samples: Sequence[StageSample],
    batch_of: Callable[[Sequence[StageSample]], dict[str, Any]],
    engine: Engine,
) -> dict[str, tuple[float, float]]:
    import torch

    from medvlm.training.objectives import answer_log_probabilities

    found: dict[str, tuple[float, float]] = {}
    reduced = _PRECISIONS.get(engine.precision)
    autocast = torch.autocast(engine.device, getattr(torch, reduced)) if reduced else contextlib.nullcontext()
    model.to(engine.device).eval()
    # Answers of like length together: the least padding.
    ordered = sorted(samples, key=lambda sample: len(sample.turns[1].text) + len(sample.rejected))
    with torch.inference_mode(), autocast:
        for start in range(0, len(ordered), engine.micro_batch):
            group = ordered[start : start + engine.micro_batch]
            batch = {
                key: value.to(engine.device)
                for key, value in batch_of(group).items()
                if key not in ("sample_ids", "spans")
            }
            values_P2 = answer_log_probabilities(model, batch).view(-1, 2)
            for sample, (chosen, rejected) in zip(group, values_P2.tolist(), strict=True):
                found[sample.sample_id] = (chosen, rejected)
    # Where the Trainer and DeepSpeed expect it: they move and split it themselves.
    model.train().to("cpu")
    return found
