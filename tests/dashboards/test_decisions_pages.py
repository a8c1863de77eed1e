"""What pages say about failed steps, changed scores, experts and releases, and what may be decided there."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from test_pages import DASHBOARDS, everything, open_page
from workspace_builder import HOSTILE

from dashboards.classification import confusion_table
from medvlm.append_only import append_line
from medvlm.approval import approval, approvals
from medvlm.errors import WorkspaceError
from medvlm.evaluation.classify import classification
from medvlm.failures import record_failure
from medvlm.store import Report, Workspace, read_json, write_json, write_report

RECIPE = "tiny-llava-med"


@pytest.fixture
def workspace(built_workspace: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(built_workspace, tmp_path / "copy")
    return Workspace(tmp_path / "copy")


def overview(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    """The first page, which links to others and so needs the frame around it."""
    monkeypatch.setenv("MEDVLM_WORKSPACE", str(workspace.root))
    page = AppTest.from_file(str(DASHBOARDS / "app.py"), default_timeout=30)
    page.session_state["recipe"] = RECIPE
    page.run()
    assert not page.exception
    return page


def test_a_failed_step_says_why_and_every_step_leads_into_the_lineage(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = WorkspaceError(f"it broke at {HOSTILE}", where="row 7", hint="mend it")
    record_failure(workspace.root, ["train", "--recipe", RECIPE, "--stage", "2"], error)
    page = overview(workspace, monkeypatch)
    steps = page.dataframe[1].value.set_index("Step")
    assert steps.loc["stage 2", "State"] == "✗ failed"
    assert steps.loc["stage 1", "State"] != "✗ failed"
    assert steps.loc["stage 2", "Lineage"].endswith(f"/assets/stage2_checkpoint?partition={RECIPE}")
    assert steps.loc["scores on slake", "Lineage"].endswith(f"/assets/benchmark_scores?partition=slake%7C{RECIPE}")
    assert any("Where: row 7" in text.value and HOSTILE in text.value for text in page.text)
    assert not any("<script" in markdown.value for markdown in page.markdown)


def test_scores_show_how_they_changed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workspace.scores(RECIPE, "slake") / "history.jsonl"
    for when, value in (("2026-01-01T00:00:00+00:00", 40.0), ("2026-01-02T00:00:00+00:00", 52.5)):
        append_line(path, {"when": when, "fingerprint": when, "metrics": {"closed.whole_word": value}}, "it")
    page = overview(workspace, monkeypatch)
    scores = next(frame.value for frame in page.dataframe if "change" in frame.value)
    row = scores[(scores["model"] == RECIPE) & (scores["benchmark"] == "slake") & (scores["answer_type"] == "closed")]
    assert row["change"].to_list() == [12.5]
    assert list(row["course"].iloc[0]) == [40.0, 52.5]
    assert scores["change"].notna().sum() == 1
    path.write_text("{broken\n")
    page = overview(workspace, monkeypatch)
    assert "is not a score" in page.error[-1].value


def test_expert_load_is_shown_by_layer_and_modality(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page("runs", workspace.root, monkeypatch, recipes=["tiny-cliva-med-phi2"])
    assert "Expert load" not in [subheader.value for subheader in page.subheader]
    layers = {"1": {"0": 0.5, "1": 0.25, "2": 0.25, "3": 0.0}, "3": {"0": 0.25, "1": 0.25, "2": 0.25, "3": 0.25}}
    details = {
        "curves": {"all": [{"step": 1, "loss": 2.0, "lr": 0.1}, {"step": 2, "loss": 1.0, "lr": 0.1}]},
        "expert_load": layers,
        "expert_load_by_modality": {"ct": layers, "mri": layers},
        "expert_balance": 0.87,
        "tokens_routed": 12345,
        "tokens_dropped": 6,
    }
    folder = workspace.stage("tiny-cliva-med-phi2", 3)
    write_report(folder, Report(step="train", details=details), started=0.0)
    page = open_page("runs", workspace.root, monkeypatch, recipes=["tiny-cliva-med-phi2"])
    assert "Expert load" in [subheader.value for subheader in page.subheader]
    shown = {metric.label: metric.value for metric in page.metric}
    assert (shown["Tokens routed"], shown["Tokens dropped"], shown["Balance"]) == ("12,345", "6", "0.87")


def test_a_contract_brings_its_data_docs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page("data", workspace.root, monkeypatch, section="Contracts")
    assert not docs_buttons(page)
    folder = workspace.contract("instruct")
    (folder / "docs").mkdir()
    (folder / "docs" / "index.html").write_text("<h1>Data Docs</h1><script>alert(1)</script>")
    (folder / "docs" / "expectations-instruct.html").write_text("<h1>Expectations</h1>")
    write_json(folder / "result.json", read_json(folder / "result.json") | {"docs": "docs/index.html"})
    page = open_page("data", workspace.root, monkeypatch, section="Contracts")
    assert len(docs_buttons(page)) == 1
    assert not page.get("iframe")
    page.toggle(key="show-docs-instruct").set_value(True).run()
    # Shown from an address of its own origin, with a policy before the first word that lets nothing run or load.
    policy = b"""<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
    assert framed(page).startswith(policy)
    assert framed(page).endswith(b"</style><h1>Data Docs</h1><script>alert(1)</script>")
    page.segmented_control(key="docs-page-instruct").set_value("expectations-instruct").run()
    assert framed(page).startswith(policy) and framed(page).endswith(b"</style><h1>Expectations</h1>")
    assert "copy/contracts/instruct/docs/index.html" in [text.value for text in page.text]
    # A result that names a file elsewhere gets nobody that file.
    write_json(folder / "result.json", read_json(folder / "result.json") | {"docs": "../../../../etc/passwd"})
    page = open_page("data", workspace.root, monkeypatch, section="Contracts")
    assert not docs_buttons(page)


def docs_buttons(page: AppTest) -> list[object]:
    return [button for button in page.get("download_button") if button.proto.label == "Data Docs"]


def framed(page: AppTest) -> bytes:
    (frame,) = page.get("iframe")
    kind, data = frame.proto.src.split(",")
    assert kind == "data:text/html;charset=utf-8;base64"
    return base64.b64decode(data)


def test_a_release_is_approved_and_the_approval_withdrawn_on_the_overview(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = overview(workspace, monkeypatch)
    assert f"medvlm release build --recipe {RECIPE}" in [code.value for code in page.code]
    monkeypatch.setattr("dashboards.release.obstacles", lambda workspace, recipe: ["slake: closed fell by 3"])
    write_report(workspace.release(RECIPE), Report(step="release", fingerprint="f00d"), started=0.0)
    page = overview(workspace, monkeypatch)
    assert "slake: closed fell by 3" in everything(page).replace("\\", "")
    page.button(key=f"approve-{RECIPE}").click().run()
    assert "needs a person" in page.error[-1].value
    page.text_input(key="reviewer").set_value("ann")
    page.text_input(key=f"approval-note-{RECIPE}").set_value(f"read 50 answers {HOSTILE}")
    page.button(key=f"approve-{RECIPE}").click().run()
    given = approval(workspace, RECIPE, "f00d")
    assert given is not None
    assert given.who == "ann"
    assert any("Approved by ann" in info.value for info in page.info)
    page.button(key=f"withdraw-{RECIPE}").click().run()
    assert "needs a reason" in page.error[-1].value
    page.text_input(key=f"approval-note-{RECIPE}").set_value("unsafe on children")
    page.button(key=f"withdraw-{RECIPE}").click().run()
    assert approval(workspace, RECIPE, "f00d") is None
    assert [row.word for row in approvals(workspace)] == ["approve", "withdraw"]
    assert not any("<script" in markdown.value for markdown in page.markdown)


def test_calibration_is_shown_where_it_was_measured(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page("benchmarks", workspace.root, monkeypatch, benchmark="slake")
    assert "Calibration" not in [subheader.value for subheader in page.subheader]
    bins = [{"low": 0.5, "high": 0.6, "n": 12, "confidence": 0.55, "accuracy": 0.25}]
    row = {"n": 12, "accuracy": 25.0, "confidence": 55.0, "ece": 30.0, "bins": bins}
    folder = workspace.scores(RECIPE, "slake")
    report = Report(step="score", details={"stage": "finetune", "calibration": {"align": None, "finetune": row}})
    write_report(folder, report, started=0.0)
    page = open_page("benchmarks", workspace.root, monkeypatch, benchmark="slake")
    assert "Calibration" in [subheader.value for subheader in page.subheader]
    table = next(frame.value for frame in page.dataframe if "ece" in frame.value)
    assert table[["Model", "ece", "n"]].to_numpy().tolist() == [[RECIPE, 30.0, 12]]


def test_a_classification_shows_its_confusion_matrix(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page("benchmarks", workspace.root, monkeypatch, benchmark="slake")
    assert "Classes" not in [subheader.value for subheader in page.subheader]
    values = classification(["liver", "liver", "lung"], ["liver", "the lung", "it is unclear"], ["liver", "lung"])
    details = {"stage": "finetune", "classification": {"align": None, "finetune": values.as_json()}}
    write_report(workspace.scores(RECIPE, "slake"), Report(step="score", details=details), started=0.0)
    page = open_page("benchmarks", workspace.root, monkeypatch, benchmark="slake")
    assert not page.exception
    assert "Classes" in [subheader.value for subheader in page.subheader]
    assert {metric.label: metric.value for metric in page.metric} == {
        "Accuracy": "33.3", "Macro-F1": "33.3", "Images": "3", "Answers without a class": "1",
    }  # fmt: skip
    table = next(frame.value for frame in page.dataframe if "f1" in frame.value)
    assert table["Class"].to_list() == ["liver", "lung"]
    pairs = confusion_table(values.as_json())
    wrong = pairs[(pairs["count"] > 0) & (pairs["true"] != pairs["answered"])]
    assert wrong.to_numpy().tolist() == [["liver", "lung", 1, 0.5], ["lung", "no class", 1, 1.0]]


def test_a_workspace_of_a_newer_version_is_one_readable_message(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(workspace.contract("figures") / "result.json", {"version": 9, "verdict": {"ok": True}})
    page = open_page("data", workspace.root, monkeypatch, section="Contracts")
    assert ["another version" in error.value for error in page.error] == [True]
    report = workspace.stage(RECIPE, 1) / "report.json"
    write_json(report, read_json(report) | {"field_of_tomorrow": 1})
    assert not overview_of(workspace, monkeypatch).exception


def overview_of(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    write_json(workspace.contract("figures") / "result.json", {"success": True})
    return overview(workspace, monkeypatch)
