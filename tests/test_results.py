"""What the dashboards read: pages of big tables, tolerant of what is missing, clear about what is broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_factory import hundred_samples, sample

from medvlm.data.leakage import LeakedItem
from medvlm.data.privacy import PrivacyFlag
from medvlm.errors import WorkspaceError
from medvlm.failures import record_failure
from medvlm.records import (
    Figure,
    Image,
    Prediction,
    PreferencePair,
    QuarantinedRow,
    Sample,
    VQAItem,
    to_row,
)
from medvlm.results import Results, Step, score_board
from medvlm.store import Report, Workspace, write_json, write_records, write_report


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return hundred_samples(tmp_path)


def test_an_empty_workspace_is_empty_everywhere(tmp_path: Path) -> None:
    results = Results(tmp_path / "absent")
    assert results.sources() == []
    assert results.fetch_outcomes().empty
    assert results.contracts() == []
    assert results.quarantine("figures").total == 0
    assert results.curves() == []
    assert results.scores().empty
    assert results.wrong_answers("r", "b").rows == []
    assert results.answers("r", "b", ["1"]) == {}
    assert results.leaderboard() == []
    assert not (tmp_path / "absent").exists()


def test_the_stamp_changes_when_a_step_replaced_its_output(workspace: Workspace) -> None:
    results = Results(workspace.root)
    before = results.stamp()
    assert results.stamp() == before
    write_records(workspace.samples("instruct"), Sample, [sample(1)])
    assert results.stamp() != before


def write_step(folder: Path, created_at: str) -> None:
    write_json(folder / "report.json", {"step": "s", "counts": {"rows": 3}, "created_at": created_at})


def test_a_step_is_out_of_date_when_what_it_reads_is_newer(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_step(workspace.figures, "2026-01-03T00:00:00+00:00")
    write_step(workspace.dataset("alignment"), "2026-01-02T00:00:00+00:00")
    write_step(workspace.dataset("instruct"), "2026-01-04T00:00:00+00:00")
    write_step(workspace.benchmark("slake"), "2026-01-01T00:00:00+00:00")
    write_step(workspace.stage("tiny", 1), "2026-01-05T00:00:00+00:00")
    write_step(workspace.predictions("tiny", "slake"), "2026-01-06T00:00:00+00:00")
    results = Results(tmp_path)
    assert {step.name: step.state for step in results.data_steps()} == {
        "corpus": "missing",
        "figures": "done",
        "alignment": "stale",
        "instruct": "done",
        "slake": "done",
        "leakage": "missing",
    }
    assert results.recipes() == ["tiny"]
    assert {step.name: step.state for step in results.recipe_steps("tiny")} == {
        "stage 1": "done",
        "stage 2": "missing",
        "stage 3": "missing",
        "answers to slake": "done",
        "scores on slake": "missing",
    }
    write_step(workspace.dataset("alignment"), "2026-01-07T00:00:00+00:00")
    assert results.recipe_steps("tiny")[0].state == "stale"


def test_disk_use_is_counted_by_folder(workspace: Workspace) -> None:
    (workspace.root / "scratch").mkdir()
    (workspace.root / "scratch" / "big").write_bytes(b"0" * 10_000_000)
    use = Results(workspace.root).disk_use()
    assert list(use) == ["scratch", "datasets"]
    assert use["scratch"] == 10_000_000


def test_contracts_come_broken_first(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    check = {
        "name": "c",
        "rule": "r",
        "success": True,
        "severity": "warn",
        "observed": 0.98765,
        "expected": None,
        "broken_rows": 1,
        "examples": [{"row_id": "x", "value": "y"}],
    }
    for name, success, severity in (("a", True, "warn"), ("b", False, "fail")):
        checks = [{**check, "success": False, "severity": severity}]
        result = {"contract": name, "success": success, "checks": checks, "rows": 7}
        write_json(workspace.contract(name) / "result.json", result)
    contracts = Results(tmp_path).contracts()
    assert [contract.name for contract in contracts] == ["b", "a"]
    assert [check.name for check in contracts[0].failed] == ["c"]
    assert contracts[0].warned == ()
    assert contracts[1].failed == ()
    (seen,) = contracts[1].warned
    assert (seen.observed, seen.expected, seen.examples, seen.blocks) == ("0.9877", "", ("x: y",), False)


def test_leaked_items_come_with_both_images(workspace: Workspace) -> None:
    assert Results(workspace.root).leakage() == []
    assert Results(workspace.root).leaked_pairs(way="phash").total == 0
    item = VQAItem("q1", "slake", "test", Image(b"test", ""), "", "", "", "?", "a", "closed", False, "", "", "", "en")
    write_records(workspace.items("slake"), VQAItem, [item])
    leaked = [
        LeakedItem("slake", "q1", "i", "instruct", "phash", "s000007", 2),
        LeakedItem("slake", "q1", "i", "slake:train", "phash", "gone", 1),
        LeakedItem("slake", "q1", "i", "instruct", "bytes", "s000001", None),
    ]
    write_records(workspace.leaked_items, LeakedItem, leaked)
    page = Results(workspace.root).leaked_pairs(way="phash")
    assert page.total == 2
    assert [row["distance"] for row in page.rows] == [1, 2]
    assert page.rows[0]["train"] is None
    assert page.rows[1]["train"]["image"]["bytes"] == b"bytes of image 7"
    assert page.rows[1]["test"]["image"]["bytes"] == b"test"


def test_the_board_joins_the_blind_score_and_tells_stages_apart() -> None:
    columns = {"slice": "all", "answer_type": "closed", "rule": "r", "low": None, "high": None, "n": 4}
    rows = [("a", "2", False, 50.0), ("a", "3", False, 70.0), ("a", "3", True, 40.0), ("b", "3", False, 60.0)]
    scores = pd.DataFrame([{"model": m, "stage": s, "blind": b, "value": v, **columns} for m, s, b, v in rows])
    scores = pd.concat([scores, scores.assign(slice="modality=ct", value=0.0), scores.assign(rule="other", value=99.0)])
    board = score_board(scores, {"closed": "r"})
    assert board["label"].to_list() == ["a · 3", "b", "a · 2"]
    assert board["gain"].isna().to_list() == [False, True, True]
    assert board["gain"][0] == 30


def test_wrong_answers_come_in_pages_with_their_images(tmp_path: Path) -> None:
    folder = Workspace(tmp_path).scores("tiny", "slake") / "scores"
    folder.mkdir(parents=True)
    image = {"bytes": b"picture", "path": "a.png"}
    rows = [{"item_id": f"q{n}", "prediction": "no", "image": image} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "wrong_answers.parquet")
    page = Results(tmp_path).wrong_answers("tiny", "slake", offset=3, limit=10)
    assert page.total == 5
    assert [row["item_id"] for row in page.rows] == ["q3", "q4"]
    assert bytes(page.rows[0]["image"]["bytes"]) == b"picture"
    whole = Results(tmp_path).wrong_answer_table("tiny", "slake")
    assert (list(whole), whole["item_id"].to_list()) == (["item_id", "prediction"], [f"q{n}" for n in range(5)])
    assert Results(tmp_path).wrong_answer_table("tiny", "vqa-rad").empty


def answer(item_id: str, text: str, *, model: str = "one", blind: bool = False) -> Prediction:
    return Prediction(item_id, "slake", model, "finetune", blind, "", text)


def test_answers_are_the_last_stages_with_the_image_and_disagreements_compare_them(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    items = [
        VQAItem(f"q{n}", "slake", "test", Image(b"", ""), "", "", "", "?", "a", "closed", False, "", "", "", "en")
        for n in range(3)
    ]
    write_records(workspace.items("slake"), VQAItem, items)
    one = [answer("q0", "early"), answer("q0", "yes"), answer("q0", "blind", blind=True), answer("q1", "No ")]
    write_records(workspace.predictions("one", "slake") / "answers", Prediction, one)
    two = [answer("q0", "no"), answer("q1", "no"), answer("q2", "only two")]
    write_records(workspace.predictions("two", "slake") / "answers", Prediction, two)
    results = Results(tmp_path)
    source = results.source("benchmark/slake")
    assert source is not None
    assert results.models("slake") == ["one", "two"]
    assert results.answers("one", "slake", ["q0", "q1", "q2"]) == {"q0": "yes", "q1": "No "}
    assert results.disagreements(source, "one", "two") == ["q0"]


def test_a_contract_was_checked_when_its_report_says_however_new_the_file_is(tmp_path: Path) -> None:
    folder = Workspace(tmp_path).contract("figures")
    write_json(folder / "result.json", {"contract": "figures", "success": True, "rows": 1, "checks": []})
    (bare,) = Results(tmp_path).contracts()
    assert bare.checked_at == (folder / "result.json").stat().st_mtime
    write_json(folder / "report.json", {"step": "contract", "created_at": "2026-01-02T03:04:05+00:00"})
    (one,) = Results(tmp_path).contracts()
    assert one.checked_at == pd.Timestamp("2026-01-02T03:04:05Z").timestamp()


def test_flagged_rows_are_those_in_quarantine_each_once(workspace: Workspace) -> None:
    results = Results(workspace.root)
    source = results.source("instruct")
    assert source is not None and results.flagged(source) == []
    folder = workspace.contract("instruct")
    folder.mkdir(parents=True)
    rows = [QuarantinedRow("instruct", rule, row, "") for rule, row in [("a", "s2"), ("a", "s1"), ("b", "s2")]]
    pq.write_table(pa.Table.from_pylist([to_row(row) for row in rows]), folder / "quarantine.parquet")
    assert results.flagged(source) == ["s2", "s1"]


def figure(figure_id: str, sha256: str, caption: str, *mentions: str) -> Figure:
    where = ("PMC1", 1, None, "key", "https://pmc.example/1", "CC BY", "", "An article", False)
    return Figure(figure_id, *where, Image(b"", ""), 1, 1, sha256, "", "Fig. 1", caption, mentions)


def test_the_figure_behind_a_text_is_the_one_it_is_named_after(workspace: Workspace) -> None:
    results = Results(workspace.root)
    source = results.source("instruct")
    assert source is not None
    row = {"sample_id": "20_F1#2", "image_sha256": "same"}
    assert results.figure_behind(row, source) is None
    figures = [figure("10_F1", "same", "Repeated."), figure("20_F1", "same", "Its own.", "a", "b")]
    write_records(workspace.figure_shards, Figure, [*figures, figure("30_F1", "other", "Another.")])
    found = results.figure_behind(row, source)
    assert found is not None
    assert (found["caption"], found["mentions"], found["source_url"]) == (
        "Its own.",
        ["a", "b"],
        "https://pmc.example/1",
    )
    assert results.figure_behind({"sample_id": "20_F1", "image_sha256": "absent"}, source) is None
    shown = results.source("figures")
    assert shown is not None and results.figure_behind({"figure_id": "20_F1", "sha256": "same"}, shown) is None


def test_pictures_flagged_for_print_are_queued_once_in_every_table_that_shows_them(tmp_path: Path) -> None:
    workspace, results = Workspace(tmp_path), Results(tmp_path)
    write_records(workspace.samples("instruct"), Sample, (sample(n, image_sha256=f"sha{n // 2}") for n in range(8)))
    source = results.source("instruct")
    assert source is not None and results.privacy_flagged(source) == [] and results.privacy_flags("sha1") == []
    before = results.stamp()
    flags = [
        PrivacyFlag("figures", "f", "sha1", "text_in_corner", "top_left", 5, 0, 0, 9, 9),
        PrivacyFlag("figures", "f", "sha1", "text_in_corner", "top_right", 7, 0, 0, 9, 9),
        PrivacyFlag("benchmarks/slake", "q", "sha3", "text_in_corner", "top_left", 40, 0, 0, 9, 9),
        PrivacyFlag("figures", "g", "elsewhere", "undecodable", "", 0, 0, 0, 0, 0),
    ]
    write_records(workspace.privacy_flags, PrivacyFlag, flags)
    assert results.privacy_flagged(source) == ["s000006", "s000002"]
    assert [flag["corner"] for flag in results.privacy_flags("sha1")] == ["top_right", "top_left"]
    write_report(workspace.privacy, Report(step="privacy"), started=0.0)
    assert results.stamp() != before


def test_the_pairs_of_each_recipe_are_a_table(tmp_path: Path) -> None:
    pair = PreferencePair("p1", Image(b"", ""), "", "", "g", "Where?", "Left.", "Right.", "chat")
    write_records(Workspace(tmp_path).preference_pairs("tiny"), PreferencePair, [pair])
    (source,) = Results(tmp_path).sources()
    assert (source.name, source.kind, source.rows) == ("preference/tiny", "pairs", 1)
    assert source.page(search="RIGHT").rows[0]["pair_id"] == "p1"


def test_a_step_that_failed_says_why_until_it_has_a_result(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_step(workspace.stage("tiny", 1), "2026-01-05T00:00:00+00:00")
    error = WorkspaceError("the disk is full", where="/data", hint="free some space")
    record_failure(tmp_path, ["train", "--recipe", "tiny", "--stage", "1"], error)
    record_failure(tmp_path, ["train", "--recipe", "other", "--stage", "2"], ValueError("a bug"))
    record_failure(tmp_path, ["fetch", "--urls", "x"], error)
    record_failure(tmp_path, ["chat", "--checkpoint", "x"], error)  # no step
    results = Results(tmp_path)
    steps = {step.name: step for step in results.recipe_steps("tiny")}
    assert {name: step.state for name, step in steps.items()} == {
        "stage 1": "failed",
        "stage 2": "missing",
        "stage 3": "missing",
    }
    assert steps["stage 1"].failure is not None
    assert steps["stage 1"].failure.what == "the disk is full"
    assert (steps["stage 1"].asset, steps["stage 1"].partition) == ("stage1_checkpoint", "tiny")
    assert next(step for step in results.data_steps() if step.name == "figures").state == "failed"
    write_step(workspace.stage("tiny", 1), "2999-01-01T00:00:00+00:00")
    assert results.recipe_steps("tiny")[0].state == "done"
    assert len(list(workspace.scratch("failed").iterdir())) == 3


KILLED = """
import sys
from pathlib import Path
from medvlm.failures import underway
with underway(Path(sys.argv[1]), ["train", "--recipe", "tiny", "--stage", "1"]):
    print("begun", flush=True)
    sys.stdin.read()
"""


def test_a_step_that_was_killed_says_so_and_one_that_runs_does_not(tmp_path: Path) -> None:
    results = Results(tmp_path)

    def stage() -> Step:
        return results.recipe_steps("tiny")[0]

    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stdout.readline() == "begun\n"
        assert stage().state == "missing"
        while_it_ran = results.stamp()
        running.kill()
    assert stage().state == "failed"
    assert stage().failure is not None and "ended without a word" in stage().failure.what
    assert results.stamp() != while_it_ran, "pages are drawn anew"

    done = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    assert done.stdout == "begun\n"
    assert stage().state == "missing", "the same command came to its end"


def test_a_router_and_preferences_stand_before_the_last_stage_where_there_are_any(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_step(workspace.stage("tiny", 3), "2026-01-05T00:00:00+00:00")
    write_step(workspace.router("tiny"), "2026-01-06T00:00:00+00:00")
    write_step(workspace.preference("tiny"), "2026-01-04T00:00:00+00:00")
    steps = {step.name: step.state for step in Results(tmp_path).recipe_steps("tiny")}
    assert list(steps) == ["stage 1", "stage 2", "router", "preferences", "stage 3"]
    assert steps["stage 3"] == "stale"
    assert steps["router"] == steps["preferences"] == "done"


def test_where_there_is_no_workspace_no_failure_makes_one(tmp_path: Path) -> None:
    record_failure(tmp_path / "none", ["fetch"], ValueError("x"))
    assert not (tmp_path / "none").exists()
