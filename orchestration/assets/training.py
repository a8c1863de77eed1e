"""Group `training`: the three checkpoints of a recipe, each made by a DeepSpeed job."""

import dagster as dg

from orchestration.assets.datasets import alignment_dataset, benchmark_items, instruct_dataset
from orchestration.metadata import loss_plot, materialized, not_needed, picture
from orchestration.partitions import recipes
from orchestration.resources import DvcProject

GPU_POOL = "gpu"
"""One training job at a time: every stage takes this pool's single slot."""


def _train(context: dg.AssetExecutionContext, project: DvcProject, stage: int) -> dg.MaterializeResult:
    recipe = context.partition_key
    if recipe not in project.settings.recipes:
        raise dg.Failure(
            f"the recipe {recipe} is not in params.yaml; run: medvlm configure --recipe {recipe}",
            allow_retries=False,
        )
    project.reproduce(context, f"recipe@{recipe}")
    run = project.reproduce(context, f"stage{stage}@{recipe}", watch=True, train=True)
    return materialized(run, project.workspace.stage(recipe, stage), {"loss": loss_picture(project, recipe, stage)})


def loss_picture(project: DvcProject, recipe: str, stage: int) -> dg.MarkdownMetadataValue:
    """The loss curve of each model that a stage trained, in one plot."""
    # pandas is not for the loading of the definitions.
    from medvlm.results import Results

    curves = [c for c in Results(project.workspace.root).curves() if (c.recipe, c.stage) == (recipe, stage)]
    return picture(loss_plot({c.target or "all": c.points.to_dict("records") for c in curves}), "loss")


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
    deps=[stage2_checkpoint, instruct_dataset],
    pool=GPU_POOL,
)
def domain_router(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """The router of a mixture of experts, trained on modality labels; nothing for recipes without one.

    Frozen afterwards: stage 3 sends each token to the expert of its image's domain.
    """
    recipe = context.partition_key
    if recipe not in project.settings.items.routers:
        return not_needed(f"{recipe} has no router to train")
    run = project.reproduce(context, f"router@{recipe}", watch=True)
    return materialized(run, project.workspace.router(recipe))


@dg.asset(
    group_name="training",
    kinds={"parquet", "pytorch"},
    owners=["team:data"],
    partitions_def=recipes,
    deps=[stage2_checkpoint, instruct_dataset],
    pool=GPU_POOL,
)
def preference_dataset(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Pairs of a better and a worse answer; nothing for recipes that learn from no preferences.

    The model of stage 2 asks about an image and answers twice, a judge ranks; people's pairs from
    the dashboard's chat join them.
    """
    recipe = context.partition_key
    if recipe not in project.settings.items.preferences:
        return not_needed(f"{recipe} learns from no preferences")
    run = project.reproduce(context, f"preference@{recipe}", watch=True)
    return materialized(run, project.workspace.preference(recipe))


@dg.asset(
    group_name="training",
    kinds={"deepspeed", "pytorch"},
    owners=["team:models"],
    partitions_def=recipes,
    deps=[stage2_checkpoint, benchmark_items, domain_router, preference_dataset],
    pool=GPU_POOL,
)
def stage3_checkpoint(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """The last stage: fine-tuning on medical VQA sets, as a mixture of experts, or on preferences.

    One checkpoint a benchmark or one for all, as the recipe says.
    """
    return _train(context, project, 3)
