"""The jobs, as verbs: rebuild the data, train a recipe, evaluate it, refresh the leaderboard."""

import dagster as dg

rebuild_data = dg.define_asset_job(
    "rebuild_data",
    dg.AssetSelection.groups("ingest", "datasets"),
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

all_jobs = [rebuild_data, train_recipe, evaluate, refresh_leaderboard]
