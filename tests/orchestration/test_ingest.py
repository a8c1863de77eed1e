"""A long list in parts, and the nightly look for retractions: which commands they run, and how often."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from orchestration.assets.ingest import figure_parts, sample_corpus
from orchestration.jobs import rebuild_data, recheck_figures
from orchestration.partitions import PARTS, list_parts
from orchestration.resources import DvcProject

ran: list[list[str]] = []


class Recording(DvcProject):
    """A project that runs nothing and remembers what it would have run."""

    def run(self, context: Any, arguments: list[str], *, watch: bool = False) -> None:
        ran.append(arguments)


@pytest.fixture
def project(tmp_path: Path) -> Recording:
    ran.clear()
    write_settings(tmp_path / "params.yaml", with_items(Settings.sample()))
    return Recording(root=str(tmp_path))


def test_each_part_of_the_list_is_fetched_by_a_partition_of_its_own(project: Recording) -> None:
    keys = list_parts.get_partition_keys()
    assert len(keys) == PARTS
    for key in (keys[0], keys[-1]):
        result = dg.materialize(
            [sample_corpus, figure_parts], selection=[figure_parts], partition_key=key, resources={"project": project}
        )
        assert result.success
    settings = project.settings.figures
    common = ["medvlm", "--workspace", "workspace", "fetch", "--urls", settings.urls, "--store", settings.store]
    common += ["--policy", "research", "--shard"]
    assert ran == [[*common, f"1/{PARTS}"], [*common, f"{PARTS}/{PARTS}"]]


def test_a_short_list_needs_no_parts() -> None:
    from orchestration.definitions import defs

    names = {key.to_user_string() for key in rebuild_data.selection.resolve(defs.resolve_asset_graph())}
    assert "figures" in names
    assert "figure_parts" not in names


def test_the_recheck_tells_dvc_that_figures_left_on_purpose(project: Recording) -> None:
    assert recheck_figures.execute_in_process(resources={"project": project}).success
    (recheck, commit) = ran
    assert recheck[:4] == ["medvlm", "--workspace", "workspace", "recheck"]
    assert commit == ["python", "-m", "dvc", "commit", "--force", "figures"]
