"""Group `release`: the card and bundle of a scored model, and the one that others may use."""

import dagster as dg

from medvlm.errors import MedVLMError, ReleaseRefused
from orchestration.assets.benchmarks import benchmark_scores
from orchestration.assets.datasets import leakage_report
from orchestration.assets.training import stage3_checkpoint
from orchestration.metadata import materialized
from orchestration.partitions import recipes
from orchestration.resources import DvcProject


@dg.asset(
    group_name="release",
    kinds={"markdown"},
    owners=["team:models"],
    partitions_def=recipes,
    deps=[stage3_checkpoint, leakage_report, benchmark_scores],
)
def model_card(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """What a stranger must know: data with licences, leakage, recipe, hardware, scores, use and limits."""
    # It reads Parquet files; loading the definitions shall not.
    from medvlm.release.card import model_card as write_card

    try:
        text = write_card(project.workspace, context.partition_key)
    except MedVLMError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    return dg.MaterializeResult(metadata={"card": dg.MetadataValue.md(text.split("---\n", 2)[-1])})


@dg.asset(
    group_name="release",
    kinds={"safetensors"},
    owners=["team:models"],
    partitions_def=recipes,
    deps=[model_card, stage3_checkpoint],
)
def release_bundle(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Checkpoint, card, attribution of every figure, bill of materials of the data, and checksums."""
    run = project.reproduce(context, f"release@{context.partition_key}")
    return materialized(run, project.workspace.release(context.partition_key))


@dg.asset(
    group_name="release",
    kinds={"mlflow"},
    owners=["team:models"],
    partitions_def=recipes,
    deps=[release_bundle],
)
def promoted_model(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """The release that others may use: every check holds and a person approved it on the dashboard.

    Registered in MLflow's model registry where MLFLOW_TRACKING_URI is set.
    """
    from medvlm.release.promote import promote

    try:
        promotion = promote(project.workspace, context.partition_key)
    except ReleaseRefused as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    return dg.MaterializeResult(
        metadata={
            "approved by": promotion.who,
            "fingerprint": promotion.fingerprint,
            "registered": promotion.registered or "no registry is configured",
            "bundle": dg.MetadataValue.path(promotion.bundle),
        }
    )
