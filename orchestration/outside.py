"""What `dvc repro` made outside Dagster, told to Dagster, so that the UI shows it as it is: fresh.

Only dvc.lock and the reports are read. An event of this kind belongs to no run; it carries the data version that a run
of the asset would have given, and says which versions of its inputs it was made from, as Dagster itself does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from medvlm.settings import Settings
from medvlm.store import Workspace, read_report
from orchestration.metadata import report_metadata
from orchestration.resources import DvcProject

NOT_NEEDED = "none"
"""Data version of an asset that a recipe has no use for, as its own run gives it."""


@dataclass(frozen=True)
class Made:
    """One asset, or one partition of it, that DVC's stages make."""

    asset: str
    partition: str | None
    folder: Path
    stages: tuple[str, ...]
    """What has to be up to date for it; none where it is not needed."""
    after: str
    """The stage that must have been made for it to be worth a word."""


def made_of(settings: Settings, workspace: Workspace) -> Iterator[Made]:
    """Every asset with the stages of dvc.yaml that make it, inputs before what is made from them."""

    def one(asset: str, folder: Path, stage: str, partition: str | None = None) -> Made:
        return Made(asset, partition, folder, (stage,), stage)

    benchmarks = tuple(f"benchmark@{name}" for name in settings.benchmarks)
    yield one("sample_corpus", workspace.corpus, "corpus")
    yield one("figures", workspace.figures, "figures")
    if benchmarks:
        yield Made("benchmark_items", None, workspace.root / "benchmarks", benchmarks, benchmarks[0])
    yield one("alignment_dataset", workspace.dataset("alignment"), "alignment")
    yield one("instruct_dataset", workspace.dataset("instruct"), "instruct")
    yield one("leakage_report", workspace.leakage, "leakage")
    items = settings.items
    for recipe in items.recipes:
        yield one("stage1_checkpoint", workspace.stage(recipe, 1), f"stage1@{recipe}", recipe)
        yield one("stage2_checkpoint", workspace.stage(recipe, 2), f"stage2@{recipe}", recipe)
        for asset, folder, stage, recipes in (
            ("domain_router", workspace.router(recipe), f"router@{recipe}", items.routers),
            ("preference_dataset", workspace.preference(recipe), f"preference@{recipe}", items.preferences),
        ):
            stages = (stage,) if recipe in recipes else ()
            yield Made(asset, recipe, folder if stages else workspace.root, stages, f"stage2@{recipe}")
        yield one("stage3_checkpoint", workspace.stage(recipe, 3), f"stage3@{recipe}", recipe)
        for name, item in items.evaluations.items():
            if item.recipe == recipe:
                key = str(dg.MultiPartitionKey({"recipe": recipe, "benchmark": item.benchmark}))
                answers, scores = (
                    workspace.predictions(recipe, item.benchmark),
                    workspace.scores(recipe, item.benchmark),
                )
                yield one("benchmark_predictions", answers, f"predict@{name}", key)
                yield one("benchmark_scores", scores, f"score@{name}", key)
        # The card is part of the bundle that the stage builds.
        yield one("model_card", workspace.release(recipe), f"release@{recipe}", recipe)
        yield one("release_bundle", workspace.release(recipe), f"release@{recipe}", recipe)
    yield one("leaderboard", workspace.leaderboard, "leaderboard")


def report_made_outside(instance: dg.DagsterInstance, graph: Any, project: DvcProject) -> list[str]:
    """Report what DVC has made and Dagster does not know yet.

    What is out of date by dvc.lock is left out: it stays as Dagster knows it until it is made anew.

    Args:
        instance: Where the events go.
        graph: The asset graph of the definitions: inputs and code versions.
        project: Whose dvc.lock is read.

    Returns:
        The assets reported, with their partition.
    """
    versions = project.made_stages()
    told: list[str] = []
    for made in made_of(project.settings, project.workspace):
        version = _version(made, versions)
        key = dg.AssetKey(made.asset)
        if version is None or not made.folder.is_dir() or _is_known(instance, made, version):
            continue
        metadata = report_metadata(read_report(made.folder)) | {"made by": "dvc repro, outside Dagster"}
        tags = {"dagster/data_version": version, "dagster/data_version_is_user_provided": "true"}
        tags |= _provenance(instance, graph.get(key))
        instance.report_runless_asset_event(
            dg.AssetMaterialization(key, partition=made.partition, metadata=metadata, tags=tags)
        )
        told.append(made.asset + (f" [{made.partition}]" if made.partition else ""))
    return told


def _version(made: Made, versions: Mapping[str, str]) -> str | None:
    """The data version as the asset's own run gives it; None where something is not made or out of date."""
    if made.after not in versions or any(stage not in versions for stage in made.stages):
        return None
    return "-".join(versions[stage] for stage in made.stages) or NOT_NEEDED


def _is_known(instance: dg.DagsterInstance, made: Made, version: str) -> bool:
    def newest(asset: str) -> str | None:
        record = instance.get_latest_data_version_record(dg.AssetKey(asset), partition_key=made.partition)
        return (record.event_log_entry.tags or {}).get("dagster/data_version", "") if record else None

    if made.asset == "model_card":
        # Its own run gives it no version of DVC's: it is news with the bundle that it is part of.
        return newest("model_card") is not None and newest("release_bundle") == version
    return newest(made.asset) == version


def _provenance(instance: dg.DagsterInstance, node: Any) -> dict[str, str]:
    """The tags by which Dagster tells later whether inputs have changed since: their versions and events as of now."""
    tags = {"dagster/code_version": node.code_version} if node.code_version else {}
    for parent in node.parent_keys:
        record = instance.get_latest_data_version_record(parent)
        seen = (record.event_log_entry.tags or {}) if record else {}
        name = parent.to_user_string()
        tags[f"dagster/input_data_version/{name}"] = seen.get("dagster/data_version", "NULL")
        tags[f"dagster/input_event_pointer/{name}"] = str(record.storage_id) if record else "NULL"
    return tags
