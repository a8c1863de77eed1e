"""How a contract runs: what it writes, what it refuses, what it says, and that it says the same twice."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sound_records
import yaml

import data_contracts.images
from data_contracts.contract import Selection
from data_contracts.run import run_contract
from medvlm.errors import WorkspaceError
from medvlm.records import Image, PreferencePair
from medvlm.results import Results
from medvlm.store import Workspace, read_json, read_report, write_records


def command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_contracts", *arguments, "--workspace", str(root)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"MEDVLM_CONTRACT_DOCS": ""},
    )


def broken_alignment(root: Path) -> None:
    records = sound_records.sound("alignment")
    records[3] = dataclasses.replace(records[3], image=Image(b"", "lost.png"))  # type: ignore[type-var]
    sound_records.write(Workspace(root), "alignment", records)


def test_the_command_says_what_broke_where_and_exits_1(tmp_path: Path) -> None:
    broken_alignment(tmp_path)
    sound_records.write(Workspace(tmp_path), "instruct", sound_records.sound("instruct"))
    run = command(tmp_path, "alignment", "instruct")
    assert run.returncode == 1, run.stderr
    assert "contract 'alignment' is BROKEN" in run.stdout
    assert re.search(r"BROKEN +image_present.*\n.*observed: 1 of 4 rows.*\n +s3: lost.png", run.stdout)
    assert "contract 'instruct' holds" in run.stdout
    assert run.stderr == ""


def test_a_check_that_ends_with_an_error_leaves_a_note_until_there_is_a_verdict(tmp_path: Path) -> None:
    Workspace(tmp_path).ensure()
    run = command(tmp_path, "alignment")
    assert run.returncode == 1 and run.stderr.startswith("error: ")
    (failure,) = Results(tmp_path).unchecked_contracts()
    assert failure.command == ("contract", "alignment")
    assert failure.what in run.stderr and failure.hint in run.stderr
    broken_alignment(tmp_path)
    run_contract(Workspace(tmp_path), "alignment")  # a broken contract is known, not unchecked
    assert Results(tmp_path).unchecked_contracts() == []


def test_json_is_one_object_and_the_written_result(tmp_path: Path) -> None:
    broken_alignment(tmp_path)
    run = command(tmp_path, "alignment", "--json")
    assert run.returncode == 1, run.stderr
    printed = json.loads(run.stdout)
    assert printed["success"] is False
    assert printed == json.loads((Workspace(tmp_path).contract("alignment") / "result.json").read_text())


def test_the_report_counts_and_stays_small(tmp_path: Path) -> None:
    records = [dataclasses.replace(sound_records.sample(i), modality="x-ray") for i in range(30)]
    sound_records.write(Workspace(tmp_path), "alignment", records)
    run_contract(Workspace(tmp_path), "alignment")
    report = read_report(Workspace(tmp_path).contract("alignment"))
    assert report is not None
    assert report.counts == {"rows": 30, "checks": 24, "broken": 1, "warnings": 0, "quarantined": 30}
    (check,) = report.details["broken"]
    assert (check["name"], check["broken_rows"], len(check["examples"])) == ("modality", 30, 10)
    assert "great_expectations" in report.versions


def test_a_step_that_has_not_run_is_an_error_with_the_next_step(tmp_path: Path) -> None:
    run = command(tmp_path, "figures")
    assert run.returncode == 1
    assert "dvc repro" in run.stderr
    assert "Traceback" not in run.stderr


def test_equal_data_gives_equal_bytes_however_often_it_is_checked(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    sound_records.write(workspace, "alignment", sound_records.sound("alignment"))
    seen: set[bytes] = set()
    for _ in range(3):
        run_contract(workspace, "alignment")
        seen.add((workspace.contract("alignment") / "result.json").read_bytes())
    sound_records.write(workspace, "alignment", sound_records.sound("alignment", 8))
    second: set[bytes] = set()
    for _ in range(2):
        run_contract(workspace, "alignment")
        second.add((workspace.contract("alignment") / "result.json").read_bytes())
    assert len(seen) == len(second) == 1
    assert seen != second


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    records = sound_records.sound("alignment")
    sound_records.write(workspace, "alignment", records)
    first = run_contract(workspace, "alignment").fingerprint
    sound_records.write(workspace, "alignment", list(reversed(records)))
    assert run_contract(workspace, "alignment").fingerprint == first
    records[0] = dataclasses.replace(records[0], group_id="PMC9")  # type: ignore[type-var]
    sound_records.write(workspace, "alignment", records)
    assert run_contract(workspace, "alignment").fingerprint != first


def test_a_table_of_another_schema_names_the_columns(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    sound_records.write(workspace, "alignment", sound_records.sound("alignment"))
    (shard,) = workspace.samples("alignment").glob("*.parquet")
    table = pq.read_table(shard)
    table = table.drop_columns(["turns", "modality", "licence"])
    table = table.append_column("modality", pa.array([1] * len(table)))
    for _ in range(2):
        table = table.append_column("licence", pa.array(["CC BY"] * len(table)))
    pq.write_table(table, shard)
    result = run_contract(workspace, "alignment")
    assert [(row.row_id, row.value) for row in result.broken[0].broken] == [
        ("part-00000.parquet:turns", "missing"),
        ("part-00000.parquet:modality", "int64, expected string"),
        ("part-00000.parquet:licence", "there twice or more"),
    ]
    assert (workspace.contract("alignment") / "result.json").exists()


def test_a_damaged_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    sound_records.write(workspace, "alignment", sound_records.sound("alignment"))
    (shard,) = workspace.samples("alignment").glob("*.parquet")
    run_contract(workspace, "alignment")
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(WorkspaceError, match=r"part-00000\.parquet"):
        run_contract(workspace, "alignment")
    # The old verdict is not left lying on data that can no longer be read.
    assert not (workspace.contract("alignment") / "result.json").exists()


def test_null_in_a_foreign_table_breaks_the_column_rule(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    sound_records.write(workspace, "alignment", sound_records.sound("alignment"))
    (shard,) = workspace.samples("alignment").glob("*.parquet")
    table = pq.read_table(shard)
    index = table.schema.get_field_index("modality")
    table = table.set_column(index, "modality", pa.array(["ct", None, "ct", "ct"]))
    pq.write_table(table, shard)
    result = run_contract(workspace, "alignment")
    assert [(check.name, check.broken[0].row_id) for check in result.broken] == [("modality", "s1")]


def test_one_benchmark_has_a_result_of_its_own(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    sound_records.write(workspace, "benchmark-items", sound_records.sound("benchmark-items"))
    run_contract(workspace, "benchmark-items", selection=Selection(benchmark="vqa-rad"))
    assert (workspace.contract("benchmark-items") / "vqa-rad" / "result.json").exists()
    with pytest.raises(WorkspaceError, match="slake"):
        run_contract(workspace, "benchmark-items", selection=Selection(benchmark="slake"))


def test_no_tool_reports_home() -> None:
    code = "import os, data_contracts.expectations; print(os.environ['GX_ANALYTICS_ENABLED'])"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("GX_")}
    repository = Path(__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository, env=bare
    )
    assert shown.stdout.strip() == "false"
    assert "analytics = false" in (repository / ".dvc" / "config").read_text()
    assert yaml.safe_load((repository / "orchestration" / "dagster.yaml").read_text())["telemetry"] == {
        "enabled": False
    }
    settings = tomllib.loads((repository / "dashboards" / ".streamlit" / "config.toml").read_text())
    assert settings["browser"]["gatherUsageStats"] is False


def test_docs_are_whole_pages_that_fetch_nothing(tmp_path: Path) -> None:
    broken_alignment(tmp_path)
    run_contract(Workspace(tmp_path), "alignment", docs=True)
    docs = Workspace(tmp_path).contract("alignment") / "docs"
    index = (docs / "index.html").read_text("utf-8")
    assert "lost.png" in index
    assert "is broken" in index
    pages = re.findall(r'href="([^"]+)"', index)
    assert pages == ["expectations-alignment.html"]
    page = (docs / pages[0]).read_text("utf-8")
    assert "values must belong to this set" in page
    assert "modality" in page
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+https?://", page)
    assert "<script" not in page  # the library's own need what a CDN brings
    assert "Failed Only" not in page and "__none__" not in page
    assert "Table of Contents" in page and "Statistics" in page


def test_the_result_names_its_pages_and_old_ones_go(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    sound_records.write(workspace, "alignment", sound_records.sound("alignment"))
    folder = workspace.contract("alignment")
    done = command(tmp_path, "alignment")
    assert f"pages: {folder / 'docs' / 'index.html'}" in done.stdout
    result = read_json(folder / "result.json")
    assert (folder / result["docs"]).is_file()
    before = (folder / "docs" / "index.html").read_bytes(), (folder / "result.json").read_bytes()
    run_contract(workspace, "alignment", docs=True)
    assert ((folder / "docs" / "index.html").read_bytes(), (folder / "result.json").read_bytes()) == before
    run_contract(workspace, "alignment")
    assert read_json(folder / "result.json")["docs"] == ""
    assert not (folder / "docs").exists()


def test_large_tables_get_a_seeded_sample_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_contracts.images, "EVERY_IMAGE_UP_TO", 8)
    monkeypatch.setattr(data_contracts.images, "SAMPLED_IMAGES", 3)
    workspace = Workspace(tmp_path)
    monkeypatch.setattr("medvlm.shards.ROW_GROUP_BYTES", 1)
    sound_records.write(workspace, "alignment", sound_records.sound("alignment", 9))
    checks = {check.name: check for check in run_contract(workspace, "alignment").checks}
    assert checks["image_decodable"].observed == "0 of 3 rows break it (a seeded sample of 9)"


def test_a_workspace_path_may_hold_odd_characters(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "it's [a] *?")
    sound_records.write(workspace, "alignment", sound_records.sound("alignment"))
    assert run_contract(workspace, "alignment").success


def test_shards_are_read_as_one_table(tmp_path: Path) -> None:
    from medvlm.records import Sample

    workspace = Workspace(tmp_path)
    records = [sound_records.sample(index) for index in range(6)]
    write_records(workspace.samples("alignment"), Sample, [*records, records[0]], shard_bytes=1)
    result = run_contract(workspace, "alignment")
    assert result.rows == 7
    assert {check.name for check in result.broken} == {"sample_unique", "no_repeats"}


def test_pairs_are_checked_recipe_by_recipe(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(WorkspaceError, match="build-preference"):
        run_contract(workspace, "preference")
    sound_records.write(workspace, "preference", sound_records.sound("preference"))
    write_records(workspace.preference_pairs("empty"), PreferencePair, [])
    assert run_contract(workspace, "preference").targets == ("empty", "tiny")
    assert run_contract(workspace, "preference", selection=Selection(recipe="tiny")).success
    assert read_json(workspace.contract("preference/tiny") / "result.json")["success"] is True
    assert read_json(workspace.contract("preference") / "result.json")["success"] is False
    with pytest.raises(WorkspaceError):
        run_contract(workspace, "preference", selection=Selection(recipe="other"))
