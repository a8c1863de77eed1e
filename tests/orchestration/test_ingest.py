"""A long list in parts, and the nightly look for retractions: which commands they run, and how often."""

import tempfile
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlm.errors import InputError
from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from orchestration.assets.ingest import figure_parts, sample_corpus
from orchestration.jobs import nightly, rebuild_data
from orchestration.launchers import TrainingLauncher
from orchestration.partitions import PART_ROWS, keys_of_list, part_of_key
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
    return Recording(root=str(tmp_path), launcher=TrainingLauncher())


def fetch_parts(project: Recording, *keys: str) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("list_parts", list(keys))
        for key in keys:
            assert dg.materialize(
                [sample_corpus, figure_parts],
                selection=[figure_parts],
                partition_key=key,
                resources={"project": project},
                instance=instance,
            ).success


def test_each_part_of_a_list_is_fetched_by_a_partition_of_its_own(project: Recording) -> None:
    inbox = project.workspace.inbox
    inbox.mkdir(parents=True)
    (inbox / "more.txt").write_text("PMC1\n")
    fetch_parts(project, "llava_med_image_urls.jsonl:1-of-16", "llava_med_image_urls.jsonl:16-of-16", "more.txt:1-of-1")
    wanted = project.settings.figures
    rest = ["--store", wanted.store, "--policy", "research", "--shard"]
    common = ["medvlm", "--workspace", "workspace", "fetch", "--urls"]
    assert ran == [
        [*common, wanted.urls, *rest, "1/16"],
        [*common, wanted.urls, *rest, "16/16"],
        [*common, "workspace/inbox/more.txt", *rest, "1/1"],
    ]


@given(st.integers(1, 400_000))
@settings(max_examples=20, deadline=None)
def test_the_parts_of_a_list_are_about_even_and_their_keys_read_back(rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        path.write_bytes(b"PMC1\n\n" * rows)
        keys = keys_of_list(path)
    assert rows / len(keys) <= 1.5 * PART_ROWS
    assert [part_of_key(key) for key in keys] == [("list.txt", f"{i + 1}/{len(keys)}") for i in range(len(keys))]


@pytest.mark.parametrize("key", ["list.txt", "list.txt:3", "../list.txt:1-of-2", "a b:1-of-2", ""])
def test_a_key_that_names_no_part_is_refused(key: str) -> None:
    with pytest.raises(InputError, match="part of a list"):
        part_of_key(key)


def test_a_short_list_needs_no_parts() -> None:
    from orchestration.definitions import defs

    names = {key.to_user_string() for key in rebuild_data.selection.resolve(defs.resolve_asset_graph())}
    assert "figures" in names
    assert "figure_parts" not in names


def test_the_recheck_tells_dvc_that_figures_left_on_purpose(project: Recording) -> None:
    assert nightly.execute_in_process(resources={"project": project}).success
    (recheck, commit) = ran
    assert recheck[:4] == ["medvlm", "--workspace", "workspace", "recheck"]
    assert commit == ["python", "-m", "dvc", "commit", "--force", "figures"]
