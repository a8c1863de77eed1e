"""Group `training`: the three checkpoints of a recipe, each made by a DeepSpeed job."""

import dagster as dg

from orchestration.assets.datasets import alignment_dataset, benchmark_items, instruct_dataset
from orchestration.metadata import loss_plot, materialized, picture
from orchestration.partitions import recipes
from orchestration.resources import DvcProject

GPU_POOL = "gpu"
"""One training job at a time: every stage takes this pool's single slot."""

every_benchmark = dg.AllPartitionMapping()


def _train(context: dg.AssetExecutionContext, project: DvcProject, stage: int) -> dg.MaterializeResult:
    from medvlm.results import loss_curves

    recipe = context.partition_key
    if recipe not in project.settings.recipes:
        raise dg.Failure(
            f"the recipe {recipe} is not in params.yaml; run: medvlm configure --recipe {recipe}",
            allow_retries=False,
        )
    project.reproduce(context, f"recipe@{recipe}")
    run = project.reproduce(context, f"stage{stage}@{recipe}", watch=True)
    curves = loss_curves(project.workspace, recipe, stage)
    return materialized(run, project.workspace.stage(recipe, stage), {"loss": picture(loss_plot(curves), "loss")})


@dg.asset(
    group_name="training",
    kinds={"deepspeed", "pytorch"},
    owners=["team:models"],
    partitions_def=recipes,
    deps=[alignment_dataset],
    pool=GPU_POOL,
)
def stage1_checkpoint(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Concept alignment: only the projector learns, on figures and their captions."""
    return _train(context, project, 1)


@dg.asset(
    group_name="training",
    kinds={"deepspeed", "pytorch"},
    owners=["team:models"],
    partitions_def=recipes,
    deps=[stage1_checkpoint, instruct_dataset],
    pool=GPU_POOL,
)
def stage2_checkpoint(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Instruction tuning on conversations about figures."""
    return _train(context, project, 2)


@dg.asset(
    group_name="training",
    kinds={"deepspeed", "pytorch"},
    owners=["team:models"],
    partitions_def=recipes,
    deps=[stage2_checkpoint, benchmark_items],
    pool=GPU_POOL,
)
def stage3_checkpoint(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Fine-tuning on the train splits of medical VQA sets, one checkpoint a set or one for all."""
    return _train(context, project, 3)
