"""The jobs, as verbs: rebuild the data, recheck it, train a recipe, evaluate it, refresh the leaderboard."""

import dagster as dg

from orchestration.resources import DvcProject

fetch_parts = dg.define_asset_job(
    "fetch_parts",
    dg.AssetSelection.assets("figure_parts"),
    description="Parts of long URL lists, fetched ahead: a backfill runs them beside each other.",
)

rebuild_data = dg.define_asset_job(
    "rebuild_data",
    dg.AssetSelection.groups("ingest", "datasets") - dg.AssetSelection.assets("figure_parts"),
    description="From the URL list to datasets and benchmark items, contracts included.",
)

train_recipe = dg.define_asset_job(
    "train_recipe",
    dg.AssetSelection.groups("training"),
    description="The three stages of one recipe. A killed stage resumes from its last checkpoint.",
)

evaluate = dg.define_asset_job(
    "evaluate",
    dg.AssetSelection.assets("benchmark_predictions", "benchmark_scores"),
    description="Answers and scores of one recipe on one benchmark.",
)

refresh_leaderboard = dg.define_asset_job(
    "refresh_leaderboard",
    dg.AssetSelection.assets("leaderboard"),
    description="All scores so far beside the published ones.",
)


bundle_release = dg.define_asset_job(
    "bundle_release",
    dg.AssetSelection.assets("model_card", "release_bundle"),
    description="Card and bundle of one scored recipe. Promotion is a step of its own, after a person's approval.",
)


@dg.op
def recheck_figures_op(context: dg.OpExecutionContext, project: DvcProject) -> None:
    """Take retracted and relicensed figures out of the shards, and tell DVC that this was meant."""
    project.run(context, project.medvlm("recheck", "--store", project.settings.figures.store))
    # The figures' own hash changes here, so the next build of each dataset sees changed inputs.
    dvc = ["orchestration.bucket_stage", "commit"] if project.bucket else ["dvc", "commit", "--force"]
    project.run(context, ["python", "-m", *dvc, "figures"])


@dg.job(description="Looks for retractions and licence changes since the fetch; the next dataset build obeys.")
def nightly() -> None:
    """One look at every article that figures were kept of."""
    recheck_figures_op()


all_jobs = [fetch_parts, rebuild_data, train_recipe, evaluate, refresh_leaderboard, bundle_release, nightly]
