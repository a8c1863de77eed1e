"""Training with experts spread over processes: expert parallelism, on DeepSpeed's groups.

Each group of ``Stage.expert_parallel`` processes holds every expert once. An expert's gradients come from the tokens
of its whole group, by way of the exchange, and are averaged over those processes only that hold the same expert.
DeepSpeed knows them by their marks (``allreduce``, ``group_name``), divides them as plain training does, and sums their
norms over all processes. What is written at the end has all experts, under the names of the plain mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from medvlm.errors import TrainingError
from medvlm.recipe_schema import Recipe, Stage
from medvlm.training.engine import Engine, quiet_libraries

__all__ = ["expert_groups", "spread"]


def spread(model: Any, recipe: Recipe, stage: Stage, engine: Engine) -> bool:
    """Spread a model's experts over the job's processes, where the stage has it so and there is more than one.

    Args:
        model: The same on every process, on the CPU; changed in place.
        recipe: Named in errors.
        stage: Says over how many.
        engine: Of the job.

    Returns:
        Whether they are spread.

    Raises:
        TrainingError: The processes do not split into groups of that size.
    """
    size = stage.expert_parallel
    if size == 1 or engine.processes == 1:
        return False
    if engine.processes % size:
        raise TrainingError(
            f"{engine.processes} processes do not split into groups of {size} that share the experts",
            where=f"recipe {recipe.name}, field stages.{stage.name}.expert_parallel",
            hint="use a number of processes that it divides, or set it to 1",
        )
    import deepspeed
    from accelerate import PartialState

    from medvlm.models.expert_parallel import spread_experts

    quiet_libraries()
    PartialState()  # sets the processes up, as the Trainer would; DeepSpeed takes them over
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    layers = spread_experts(model, size)
    if engine.rank == 0:
        click.echo(f"experts of {layers} layers spread over {size} processes each", err=True)
    return True


def expert_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimiser groups in which spread experts have groups of their own, as DeepSpeed wants them."""
    from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

    if not any(is_moe_param(parameter) for group in groups for parameter in group["params"]):
        return list(groups)
    named = [{**group, "name": f"group {number}"} for number, group in enumerate(groups)]
    return [group for group in split_params_into_different_moe_groups_for_optimizer(named) if group["params"]]
