"""Group `ingest`: from the URL list to figures with licences and captions."""

from datetime import timedelta
from pathlib import Path

import dagster as dg

from medvlm.store import Workspace, read_report
from orchestration.metadata import markdown_table, materialized, picture
from orchestration.partitions import list_parts, part_of_key
from orchestration.resources import DvcProject

CONTACT_SHEET_FIGURES = 40
NETWORK_RETRIES = dg.RetryPolicy(max_retries=3, delay=30, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)
"""A store that is away may come back; what was fetched is kept, so a retry goes on."""


@dg.asset(group_name="ingest", kinds={"python"}, owners=["team:data"])
def sample_corpus(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Synthetic phantoms in every published format, drawn by code from a seed. Not medical data.

    A bucket in the layout of the PMC Cloud Service, a URL list and texts in LLaVA-Med's formats,
    and question sets in the official formats of VQA-RAD, SLAKE and PathVQA.
    """
    run = project.reproduce(context, "corpus")
    return materialized(run, project.workspace.corpus)


@dg.asset(
    group_name="ingest",
    kinds={"s3"},
    owners=["team:data"],
    deps=[sample_corpus],
    partitions_def=list_parts,
    retry_policy=NETWORK_RETRIES,
    automation_condition=dg.AutomationCondition.on_missing(),
)
def figure_parts(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """One part of a long URL list, fetched ahead. Not needed for a short one.

    A backfill spreads the parts over the workers of any executor that share the workspace. They
    wait in scratch until `figures` puts them in place without fetching anything again. A list put
    into the workspace's inbox folder becomes parts too; `medvlm configure --urls` makes it the one
    that `figures` are fetched of.
    """
    settings = project.settings
    name, part = part_of_key(context.partition_key)
    waiting = project.workspace.inbox / name
    urls = str(waiting.relative_to(project.root)) if waiting.is_file() else settings.figures.urls
    if Path(urls).name != name:
        raise dg.Failure(f"the list {name} is neither in the inbox nor in params.yaml", allow_retries=False)
    arguments = ["fetch", "--urls", urls, "--store", settings.figures.store, "--policy", settings.figures.policy]
    project.run(context, project.medvlm(*arguments, "--shard", part), watch=True)
    return dg.MaterializeResult(metadata={"list": urls, "part": part})


@dg.asset(
    group_name="ingest",
    kinds={"parquet", "s3"},
    owners=["team:data"],
    deps=[sample_corpus, figure_parts],
    retry_policy=NETWORK_RETRIES,
    # Licences and retractions change: a fetch or recheck older than this should be looked at.
    freshness_policy=dg.FreshnessPolicy.time_window(fail_window=timedelta(days=60), warn_window=timedelta(days=30)),
)
def figures(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Figures of the URL list with caption, mentions, licence and provenance; one outcome a row.

    Fetched from the store that params.yaml names, by the layout that PMC has had since August
    2026. A figure that cannot be had is a row with its reason.
    """
    run = project.reproduce(context, "figures", watch=True)
    workspace = project.workspace
    report = read_report(workspace.figures)
    details = report.details if report else {}
    return materialized(
        run,
        workspace.figures,
        {
            "outcomes": markdown_table(("status", "rows"), list(details.get("by_status", {}).items())),
            "licences": markdown_table(("licence", "figures"), list(details.get("by_licence", {}).items())),
            "contact sheet": picture(contact_sheet(workspace), "The first figures"),
        },
    )


def contact_sheet(workspace: Workspace) -> bytes:
    """PNG of the first figures of the shards."""
    # Pillow is not for the loading of the definitions.
    from medvlm.data.contact_sheet import sheet_of_shards

    return sheet_of_shards(workspace.figure_shards, most=CONTACT_SHEET_FIGURES)
