"""Feature caches of a workspace: listed, bounded, and never taken from a run that reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from medvlm.cli import cli
from medvlm.models.feature_store import hold_features, kept_features, prune_features
from medvlm.store import Workspace, write_json


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Three caches of a thousand bytes, ``a`` used last and ``c`` longest ago."""
    place = Workspace(tmp_path / "ws").ensure()
    for age, key in enumerate("abc"):
        folder = place.scratch("features", key)
        hold_features(folder, f"recipe-{key}").close()
        (folder / "shard.bin").write_bytes(bytes(1000))
        write_json(folder / "shard.json", {"images": ["0" * 64, "1" * 64]})
        for path in folder.iterdir():
            os.utime(path, (1e9 - 86400 * age, 1e9 - 86400 * age))
    return place


def keys(workspace: Workspace) -> str:
    return "".join(kept.key for kept in kept_features(workspace))


def test_caches_are_listed_with_what_they_take(workspace: Workspace) -> None:
    first, *_ = kept_features(workspace)
    assert keys(workspace) == "abc" and first.images == 2 and first.bytes >= 1000
    assert first.about == "recipe-a" and not first.in_use and first.idle_s > 0
    assert kept_features(Workspace(workspace.root / "other")) == []


def test_what_was_used_longest_ago_goes_first(workspace: Workspace) -> None:
    size = kept_features(workspace)[0].bytes
    assert [one.key for one in prune_features(workspace, 2.5 * size)] == ["c"]
    assert keys(workspace) == "ab" and prune_features(workspace, 2.5 * size) == []
    assert [one.key for one in prune_features(workspace, 0, spare="b")] == ["a"]
    assert keys(workspace) == "b"


def test_a_use_counts(workspace: Workspace) -> None:
    hold_features(workspace.scratch("features", "c"), "recipe-c").close()
    assert keys(workspace) == "cab"


def test_a_cache_that_a_process_reads_stays(workspace: Workspace) -> None:
    folder = workspace.scratch("features", "c")
    code = (
        "import sys; from pathlib import Path; from medvlm.models.feature_store import hold_features\n"
        "held = hold_features(Path(sys.argv[1]), 'other'); print('holds', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "holds\n"
        assert {one.key: one.in_use for one in kept_features(workspace)} == {"a": False, "b": False, "c": True}
        assert {one.key for one in prune_features(workspace, 0)} == {"a", "b"}
        other.communicate("")
    assert keys(workspace) == "c" and prune_features(workspace, 0) and keys(workspace) == ""


def test_the_verbs(workspace: Workspace) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(cli, ["--workspace", str(workspace.root), "features", *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "recipe-b" in run("list") and "kept: 0.000 GB" in run("list")
    listed = json.loads(run("list", "--json"))
    assert [one["key"] for one in listed["kept"]] == ["a", "b", "c"] and listed["bytes"] >= 3000
    assert len(json.loads(run("prune", "--keep-gb", "0", "--json"))["removed"]) == 3
    assert "no feature cache" in run("list") and "nothing to remove" in run("prune", "--keep-gb", "0")
