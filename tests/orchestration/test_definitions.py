"""What Dagster loads: every asset described, every contract a blocking check, nothing costly switched on."""

from __future__ import annotations

import os
import subprocess
import sys

import dagster as dg
import pytest
import yaml

from medvlm.config import recipe_names
from orchestration.definitions import PROJECT_ROOT, defs


@pytest.fixture(scope="module")
def graph() -> dg.AssetGraph:  # type: ignore[name-defined]
    return defs.resolve_asset_graph()


def test_the_lineage_runs_from_the_corpus_to_the_leaderboard(graph: object) -> None:
    def parents(name: str) -> set[str]:
        return {key.to_user_string() for key in graph.get(dg.AssetKey(name)).parent_keys}  # type: ignore[attr-defined]

    assert parents("figures") == {"sample_corpus", "figure_parts"}
    assert parents("alignment_dataset") == parents("instruct_dataset") == {"figures", "benchmark_items"}
    assert parents("leakage_report") == {"alignment_dataset", "instruct_dataset", "benchmark_items"}
    assert parents("stage1_checkpoint") == {"alignment_dataset"}
    assert parents("stage2_checkpoint") == {"stage1_checkpoint", "instruct_dataset"}
    assert parents("domain_router") == parents("preference_dataset") == {"stage2_checkpoint", "instruct_dataset"}
    made_before_stage3 = {"stage2_checkpoint", "benchmark_items", "domain_router", "preference_dataset"}
    assert parents("stage3_checkpoint") == made_before_stage3
    assert parents("benchmark_predictions") == {"stage3_checkpoint", "benchmark_items"}
    assert parents("benchmark_scores") == {"benchmark_predictions", "benchmark_items"}
    assert parents("leaderboard") == {"benchmark_scores"}
    assert parents("model_card") == {"stage3_checkpoint", "benchmark_scores", "leakage_report"}
    assert parents("release_bundle") == {"model_card", "stage3_checkpoint"}
    assert parents("promoted_model") == {"release_bundle"}


def test_every_asset_has_a_description_a_group_an_owner_kinds_tags_and_a_code_version(graph: object) -> None:
    for node in graph.asset_nodes:  # type: ignore[attr-defined]
        assert node.description, node.key
        assert node.group_name in {"ingest", "datasets", "training", "benchmarks", "release"}, node.key
        assert node.owners, node.key
        assert node.kinds, node.key
        assert node.tags["compute"] == ("gpu" if node.pools == {"gpu"} else "cpu"), node.key
        assert node.tags["use"] == "research-only", node.key
        assert node.code_version, node.key


def test_each_contract_and_a_fallen_score_block(graph: object) -> None:
    checks = {key.name: graph.get_check_spec(key) for key in graph.asset_check_keys}  # type: ignore[attr-defined]
    assert set(checks) == {
        "figures_contract",
        "alignment_contract",
        "instruct_contract",
        "benchmark_items_contract",
        "preference_contract",
        "licences_are_recent",
        "no_leaked_images",
        "scores_hold",
        "experts_balance",
        "router_tells_apart",
    }
    only_tell = {"licences_are_recent", "no_leaked_images", "experts_balance", "router_tells_apart"}
    assert {name for name, spec in checks.items() if not spec.blocking} == only_tell


def test_training_is_partitioned_by_recipe_and_takes_turns(graph: object) -> None:
    for name in ("stage1_checkpoint", "stage2_checkpoint", "domain_router", "preference_dataset", "stage3_checkpoint"):
        node = graph.get(dg.AssetKey(name))  # type: ignore[attr-defined]
        assert node.partitions_def.get_partition_keys() == recipe_names()
        assert node.pools == {"gpu"}


def test_every_stage_that_an_asset_names_is_in_dvc_yaml() -> None:
    stages = set(yaml.safe_load((PROJECT_ROOT / "dvc.yaml").read_text("utf-8"))["stages"])
    assert stages >= {"corpus", "figures", "alignment", "instruct", "benchmark", "recipe", "leaderboard", "leakage"}
    assert stages >= {"stage1", "stage2", "router", "preference", "stage3", "predict", "score"}
    assert stages >= {
        f"contract-{name}" for name in ("figures", "alignment", "instruct", "benchmark-items", "preference")
    }


def test_no_schedule_spends_gpu_hours_unasked() -> None:
    for schedule in defs.schedules or ():
        assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED


def test_sensors_that_start_runs_are_off_and_those_that_only_tell_are_on() -> None:
    status = {sensor.name: sensor.default_status for sensor in defs.sensors or ()}
    running, stopped = dg.DefaultSensorStatus.RUNNING, dg.DefaultSensorStatus.STOPPED
    assert status == {
        "inbox_lists": running,
        "review_decisions": stopped,
        "failed_runs": running,
        "failed_checks": running,
        "dvc_made": running,
    }


def test_loading_the_definitions_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "deepspeed", "great_expectations", "streamlit", "dvc", "matplotlib", "pandas")
    heavy += ("boto3", "numpy", "pyarrow", "PIL", "lxml", "duckdb")
    code = f"import sys, orchestration.definitions; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"
