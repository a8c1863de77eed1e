"""A broken contract is seen in Dagster and stops what is downstream in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from medvlm.store import write_json
from orchestration.assets.datasets import alignment_dataset, instruct_dataset
from orchestration.assets.ingest import sample_corpus
from orchestration.checks import contract_checks
from orchestration.launchers import TrainingLauncher
from orchestration.resources import DvcProject, StageRun

ASSETS = [alignment_dataset, instruct_dataset, sample_corpus]


class Broken(DvcProject):
    """A project whose stages do nothing, except that contracts named here do not hold."""

    contracts: list[str]

    def reproduce(self, context: Any, stage: str, *, watch: bool = False) -> StageRun:
        if stage.startswith("contract-"):
            name = stage.removeprefix("contract-")
            holds = name not in self.contracts
            check = {
                "name": "captions are not empty",
                "success": holds,
                "observed": "3 | <script>",
                "expected": 0,
                "broken_rows": 3,
            }
            write_json(
                self.workspace.contract(name) / "result.json",
                {"contract": name, "success": holds, "rows": 10, "checks": [check]},
            )
            if not holds:
                raise dg.Failure(f"DVC stage {stage} ended with exit code 1:\n3 captions are empty")
        return StageRun(stage, ran=True, data_version="abc")


@pytest.fixture
def downstream() -> dg.AssetsDefinition:
    @dg.asset(name="stage1", deps=[alignment_dataset])
    def stage1() -> None: ...

    return stage1


def run(folder: Path, broken: list[str], downstream: dg.AssetsDefinition) -> dg.ExecuteInProcessResult:
    write_settings(folder / "params.yaml", with_items(Settings.sample()))
    assets = [alignment_dataset, downstream]
    checks = [c for c in contract_checks if next(iter(c.check_keys)).asset_key == dg.AssetKey("alignment_dataset")]
    return dg.materialize(
        [*assets, *checks],
        resources={"project": Broken(root=str(folder), launcher=TrainingLauncher(), contracts=broken)},
        raise_on_error=False,
    )


def test_a_broken_contract_stops_what_is_downstream(tmp_path: Path, downstream: dg.AssetsDefinition) -> None:
    result = run(tmp_path, ["alignment"], downstream)
    assert not result.success
    (evaluation,) = result.get_asset_check_evaluations()
    assert not evaluation.passed
    assert "3 captions are empty" in (evaluation.description or "")
    table = evaluation.metadata["checks"].value
    assert "captions are not empty" in table
    assert "<script>" not in table, "foreign text is not HTML in the UI"
    assert [e.asset_key.to_user_string() for e in result.get_asset_materialization_events()] == ["alignment_dataset"]


def test_a_contract_that_holds_lets_it_through(tmp_path: Path, downstream: dg.AssetsDefinition) -> None:
    result = run(tmp_path, [], downstream)
    assert result.success
    assert {e.asset_key.to_user_string() for e in result.get_asset_materialization_events()} == {
        "alignment_dataset",
        "stage1",
    }
