"""Weekly retraining of what changed, else a skip with its reason; fetches that are tried again with patience."""

import importlib
from datetime import datetime
from pathlib import Path

import dagster as dg
import pytest
import yaml

from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from orchestration.assets.ingest import figure_parts, figures
from orchestration.definitions import PROJECT_ROOT, defs
from orchestration.instance import SETTINGS
from orchestration.launchers import TrainingLauncher
from orchestration.resources import DvcProject
from orchestration.schedules import weekly_retraining

RECIPES = ["tiny-llava-med", "tiny-stllava-med"]


@pytest.fixture
def project(tmp_path: Path) -> DvcProject:
    """Two recipes, trained on the alignment data as it is."""
    write_settings(tmp_path / "params.yaml", with_items(Settings.sample(recipes=RECIPES)))
    data = {"path": "workspace/datasets/alignment/samples", "md5": "old"}
    stages = {"alignment": {"outs": [dict(data)]}}
    stages |= {f"stage1@{name}": {"deps": [dict(data)], "outs": []} for name in RECIPES}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    return DvcProject(root=str(tmp_path), launcher=TrainingLauncher())


def tick(project: DvcProject) -> list[dg.RunRequest | dg.SkipReason]:
    with dg.build_schedule_context(
        scheduled_execution_time=datetime(2026, 11, 21, 2), resources={"project": project}
    ) as context:
        return list(weekly_retraining(context))  # type: ignore[call-overload]


def test_nothing_changed_is_a_skip_that_says_so(project: DvcProject) -> None:
    (skipped,) = tick(project)
    assert isinstance(skipped, dg.SkipReason)
    assert "no recipe of params.yaml has changed inputs" in (skipped.skip_message or "")


def test_changed_data_trains_the_recipes_that_read_it_once(project: DvcProject) -> None:
    lock = yaml.safe_load(project.lock_file.read_text())
    lock["stages"]["alignment"]["outs"][0]["md5"] = "new"
    lock["stages"][f"stage1@{RECIPES[1]}"]["deps"][0]["md5"] = "new"
    project.lock_file.write_text(yaml.safe_dump(lock))
    (asked,) = tick(project)
    assert isinstance(asked, dg.RunRequest)
    assert asked.partition_key == RECIPES[0]
    assert asked.tags["medvlm/changed"] == "workspace/datasets/alignment/samples"
    assert tick(project)[0].run_key == asked.run_key, "one tick asks for one run"  # type: ignore[union-attr]


@pytest.mark.parametrize("asset", [figures, figure_parts])
def test_a_fetch_is_tried_again_with_growing_pauses(asset: dg.AssetsDefinition) -> None:
    policy = asset.op.retry_policy
    assert policy is not None and policy.max_retries == 3
    pauses = [[policy.calculate_delay(attempt) for _ in range(50)] for attempt in (1, 2, 3)]
    for attempt, found in enumerate(pauses):
        assert all(0 <= pause <= 2 * 30 * 2 ** (attempt + 1) for pause in found)
    means = [sum(found) / len(found) for found in pauses]
    assert means[0] < means[1] < means[2]


def test_the_helm_values_load_these_definitions_on_one_volume_and_free_the_pool() -> None:
    values = yaml.safe_load((PROJECT_ROOT / "deploy" / "values.yaml").read_text("utf-8"))
    (deployment,) = values["dagster-user-deployments"]["deployments"]
    option, module = deployment["dagsterApiGrpcArgs"]
    assert option == "--module-name" and importlib.import_module(module).defs is defs
    launched = values["runLauncher"]["config"]["k8sRunLauncher"]
    assert deployment["volumes"] == launched["volumes"] and deployment["volumeMounts"] == launched["volumeMounts"]
    monitoring = yaml.safe_load(SETTINGS.read_text("utf-8"))["run_monitoring"]
    freed = values["dagsterDaemon"]["runMonitoring"]["freeSlotsAfterRunEndSeconds"]
    assert freed == monitoring["free_slots_after_run_end_seconds"], "as without Kubernetes"
