"""What renews itself, and when: on changed data, not on every run; never what takes the GPU; off by default."""

from collections.abc import Iterator

import dagster as dg
import pytest

from orchestration.automation import renewed_with_inputs
from orchestration.definitions import defs

SCORES = dg.AssetKey("benchmark_scores")
LEADERBOARD = dg.AssetSelection.assets("leaderboard")
PARTITION = str(dg.MultiPartitionKey({"recipe": "tiny-llava-med", "benchmark": "slake"}))


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as made:
        yield made


def made(instance: dg.DagsterInstance, key: dg.AssetKey, version: str, partition: str | None = None) -> None:
    tags = {"dagster/data_version": version}
    instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=partition, tags=tags))


def checked(instance: dg.DagsterInstance, key: dg.AssetKey, name: str, passed: bool) -> None:
    instance.report_runless_asset_event(dg.AssetCheckEvaluation(asset_key=key, check_name=name, passed=passed))


class Ticks:
    """The automation sensor, tick by tick."""

    def __init__(self, instance: dg.DagsterInstance, selection: dg.AssetSelection) -> None:
        self._instance, self._selection = instance, selection
        self._result: dg.EvaluateAutomationConditionsResult | None = None

    def requested(self) -> int:
        self._result = dg.evaluate_automation_conditions(
            defs=defs,
            instance=self._instance,
            asset_selection=self._selection,
            cursor=self._result.cursor if self._result else None,
        )
        return self._result.total_requested


def test_the_leaderboard_follows_changed_scores_and_no_run_that_changed_nothing(instance: dg.DagsterInstance) -> None:
    ticks = Ticks(instance, LEADERBOARD)
    made(instance, SCORES, "a", PARTITION)
    checked(instance, SCORES, "scores_hold", True)
    ticks.requested()
    made(instance, dg.AssetKey("leaderboard"), "1")
    assert ticks.requested() == 0
    made(instance, SCORES, "a", PARTITION)
    checked(instance, SCORES, "scores_hold", True)
    assert ticks.requested() == 0, "the same data again is nothing new"
    made(instance, SCORES, "b", PARTITION)
    checked(instance, SCORES, "scores_hold", True)
    assert ticks.requested() == 1
    assert ticks.requested() == 0, "asked for once"


def test_a_fallen_score_renews_no_leaderboard(instance: dg.DagsterInstance) -> None:
    ticks = Ticks(instance, LEADERBOARD)
    made(instance, SCORES, "a", PARTITION)
    checked(instance, SCORES, "scores_hold", True)
    ticks.requested()
    made(instance, SCORES, "b", PARTITION)
    checked(instance, SCORES, "scores_hold", False)
    assert ticks.requested() == 0
    checked(instance, SCORES, "scores_hold", True)
    assert ticks.requested() == 1, "once it is accepted"


def test_nothing_that_takes_the_pool_renews_itself_and_the_sensor_is_off() -> None:
    nodes = list(defs.resolve_asset_graph().asset_nodes)
    automatic = {node.key.to_user_string() for node in nodes if node.automation_condition is not None}
    assert automatic == {"figure_parts", "leakage_report", "leaderboard"}
    assert not [node.key for node in nodes if node.pools and node.automation_condition is not None]
    condition = defs.resolve_asset_graph().get(dg.AssetKey("leakage_report")).automation_condition
    assert condition == renewed_with_inputs
    sensor = defs.get_repository_def().get_sensor_def("default_automation_condition_sensor")
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
