"""Each page's logic: what a person reads on a workspace with results, and on an empty one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streamlit.testing.v1 import AppTest
from workspace_builder import HOSTILE, build_workspace

from dashboards.frame import count, escaped
from medvlm import RESEARCH_USE_ONLY
from medvlm.data.benchmarks import build_benchmark
from medvlm.errors import WorkspaceError
from medvlm.failures import record_failure
from medvlm.results import Results
from medvlm.store import Workspace, read_json, write_json

DASHBOARDS = Path(__file__).resolve().parents[2] / "dashboards"
PAGES = sorted(path.stem for path in (DASHBOARDS / "views").glob("*.py"))


def open_page(name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, **state: object) -> AppTest:
    monkeypatch.setenv("MEDVLM_WORKSPACE", str(workspace))
    page = AppTest.from_file(str(DASHBOARDS / "views" / f"{name}.py"), default_timeout=30)
    for key, value in state.items():
        page.session_state[key] = value
    page.run()
    assert not page.exception
    return page


def everything(page: AppTest) -> str:
    """All that the page says, tables included."""
    kinds = (page.title, page.subheader, page.markdown, page.caption, page.text, page.error, page.warning, page.info)
    words = [str(element.value) for kind in kinds for element in kind]
    words += [f"{metric.label} {metric.value} {metric.delta}" for metric in page.metric]
    words += [element.label for element in page.expander]
    words += [element.value.to_csv() for element in page.dataframe]
    return "\n".join(words)


@pytest.mark.parametrize("name", PAGES)
def test_every_page_shows_the_notice_and_says_what_to_run_when_empty(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(name, tmp_path / "nothing", monkeypatch)
    assert RESEARCH_USE_ONLY in everything(page)
    assert [code.value for code in page.code] == ["make demo"]
    assert not page.error


@pytest.mark.parametrize("section", ["Fetch", "Contracts", "Pictures"])
def test_every_section_of_data_says_what_to_run_when_empty(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page("data", tmp_path, monkeypatch, section=section)
    assert [code.value for code in page.code] == ["make demo"]


def test_the_overview_says_where_the_pipeline_stands(built_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVLM_WORKSPACE", str(built_workspace))
    page = AppTest.from_file(str(DASHBOARDS / "app.py"), default_timeout=30).run()  # its default page
    assert not page.exception
    shown = {metric.label: metric.value for metric in page.metric}
    assert (shown["Figures"], shown["Training samples"], shown["Benchmark questions"]) == ("40", "120", "80")
    assert shown["Contracts"] == "1 broken"
    assert "instruct" in page.error[0].value
    steps = page.dataframe[0].value.set_index("Step")
    assert steps.loc["corpus", "State"] == "– not run yet"
    assert steps.loc["figures", "State"] == "✓ fresh"
    assert steps.loc["figures", "What came out"] == "72 rows, 40 figures"
    scores = page.dataframe[2].value
    assert len(scores) == 8
    assert scores["gain"].to_list() == [33] * 8


def test_a_contract_that_could_not_be_checked_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = build_workspace(tmp_path)
    error = WorkspaceError("a shard is damaged", where="part-00000.parquet", hint="dvc checkout")
    record_failure(tmp_path, ("contract", "preference", "tiny-stllava-med"), error)
    monkeypatch.setenv("MEDVLM_WORKSPACE", str(workspace.root))
    page = AppTest.from_file(str(DASHBOARDS / "app.py"), default_timeout=30).run()
    assert any("contract preference/tiny\\-stllava\\-med could not be checked" in m.value for m in page.markdown)
    assert "a shard is damaged\nWhere: part-00000.parquet\nNext:  dvc checkout" in [text.value for text in page.text]


def test_fetch_counts_every_row_and_lists_the_lost_ones_by_reason(
    built_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page("data", built_workspace, monkeypatch)
    shown = {metric.label: metric.value for metric in page.metric}
    assert (shown["Rows in the list"], shown["Figures kept"], shown["Lost, with a reason"]) == ("72", "40", "32")
    page.selectbox(key="fetch_status").select("timeout").run()
    lost = page.dataframe[0].value
    assert len(lost) == 8
    assert set(lost["detail"].str.split().str[0]) == {"timeout"}


def test_contracts_show_the_broken_one_first_and_open_with_its_quarantine(
    built_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page("data", built_workspace, monkeypatch, section="Contracts")
    assert [("instruct" in e.label, e.proto.expanded) for e in page.expander] == [
        (True, True),
        (False, False),
        (False, False),
    ]
    checks, quarantine = page.dataframe[0].value, page.dataframe[1].value
    assert checks.loc[checks["Broken rows"] > 0, "Rule"].to_list() == ["no image of a benchmark's test split"]
    assert quarantine["row_id"].to_list() == ["instruct-0000", "instruct-0001", "instruct-0002"]


def test_pictures_are_searched_filtered_and_paged(built_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page("data", built_workspace, monkeypatch, section="Pictures")
    assert sum("Axial view" in text.value for text in page.text) == 11  # of 12: one caption is hostile
    page.text_input(key="search").set_value("view 17 ").run()
    assert [text.value for text in page.text] == [
        "Axial view 17 shows a rounded bright lesion in the left lobe, 14 mm across."
    ]
    page.text_input(key="search").set_value("no such words").run()
    assert "No row fits" in page.info[0].value
    page.text_input(key="search").set_value("").run()
    page.session_state["page-figures"] = 4
    page.run()
    assert sum("Axial view" in text.value for text in page.text) == 4
    page.multiselect(key="figures-licence").select("CC0").run()  # 14 rows: page 4 is no more
    assert not page.exception
    assert 1 <= sum("Axial view" in text.value for text in page.text) <= 12


def test_real_questions_and_images_are_browsed(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_benchmark(Workspace(tmp_path), "vqa-rad", real_data / "vqa-rad")
    page = open_page("data", tmp_path, monkeypatch, section="Pictures")
    assert any("2,248 rows" in caption.value for caption in page.caption)
    assert not page.warning  # every picture on the page decodes
    page.text_input(key="search").set_value("aortic ANEURYSM").run()
    said = [text.value for text in page.text]
    assert said
    assert all("aortic aneurysm" in question.lower() for question in said[::2])
    page.multiselect(key="benchmark/vqa-rad-split").select("test").run()
    assert 0 < len(page.text) < len(said)


def test_real_slake_is_browsed_and_reviewed(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_benchmark(Workspace(tmp_path), "slake", real_data / "slake")
    page = open_page("data", tmp_path, monkeypatch, section="Pictures")
    assert not page.warning
    assert len(page.text) > 12
    page = open_page("review", tmp_path, monkeypatch, reviewer="ann")
    assert not page.error
    next(button for button in page.button if button.label == "Accept").click().run()
    assert not page.exception
    (decision,) = Results(tmp_path).journal.read()
    assert (decision.action, decision.source) == ("accept", "benchmark/slake")
    assert len(decision.before) == 2  # question and answer


def test_leakage_shows_pairs_side_by_side_by_the_way_they_are_alike(
    built_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page("data", tmp_path, monkeypatch, section="Leakage")
    assert [code.value for code in page.code] == ["medvlm leakage"]
    page = open_page("data", built_workspace, monkeypatch, section="Leakage")
    assert page.dataframe[0].value["leaked_items"].to_list() == [2]
    page.session_state["way"] = "phash"
    page.run()
    said = "\n".join(caption.value.replace("\\", "") for caption in page.caption)
    assert "test: slake slake-2" in said
    assert "instruct: instruct-0002 · 2 bits apart" in said


def test_leakage_opens_on_a_way_that_touches_something(
    built_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built_workspace, tmp_path / "copy")
    report = Workspace(tmp_path / "copy").leakage / "report.json"
    assert (
        open_page("data", tmp_path / "copy", monkeypatch, section="Leakage").segmented_control(key="way").value
        == "bytes"
    )
    values = read_json(report)
    values["details"]["comparisons"][0]["ways"]["bytes"] = {"images": 0, "items": 0}
    write_json(report, values)
    page = open_page("data", tmp_path / "copy", monkeypatch, section="Leakage")
    assert page.segmented_control(key="way").value == "phash"
    assert page.segmented_control(key="way").options[0] == "the same image (0)"


def test_whole_tables_can_be_taken_along_as_csv(built_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def buttons(name: str, **state: object) -> list[str]:
        page = open_page(name, built_workspace, monkeypatch, **state)
        return [button.proto.label for button in page.get("download_button")]

    assert buttons("data", section="Fetch") == ["Download as CSV"]
    assert buttons("data", section="Contracts") == ["Download the quarantine as CSV"]
    assert buttons("data", section="Leakage") == ["Download as CSV"]
    assert buttons("benchmarks") == ["Download as CSV", "Download the wrong answers as CSV"]


@pytest.mark.parametrize(
    ("name", "section"), [("data", "Contracts"), ("data", "Pictures"), ("benchmarks", None), ("runs", None)]
)
def test_foreign_text_is_never_markup(
    name: str, section: str | None, built_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(name, built_workspace, monkeypatch, **({"section": section} if section else {}))
    for element in [*page.markdown, *page.caption, *page.expander, *page.error, *page.info]:
        words = element.label if hasattr(element, "label") else element.value
        assert "<script" not in words
        assert "](http" not in words
        assert not getattr(element.proto, "allow_html", False)
    if section == "Pictures" or name == "benchmarks":
        assert HOSTILE in [text.value for text in page.text]


def test_a_picture_that_does_not_decode_is_said_on_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = build_workspace(tmp_path)
    shard = workspace.figure_shards / "part-00000.parquet"
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:200]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard)
    page = open_page("data", tmp_path, monkeypatch, section="Pictures")
    assert ["does not decode" in warning.value for warning in page.warning] == [True]


def test_a_damaged_shard_is_one_readable_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path)
    workspace.figure_shards.mkdir(parents=True)
    (workspace.figure_shards / "part-00000.parquet").write_bytes(b"PAR1 half a file")
    page = open_page("data", tmp_path, monkeypatch, section="Pictures")
    assert "cannot be read" in page.error[0].value
    assert "dvc checkout" in page.text[0].value


def test_runs_open_on_the_newest_recipe_and_lay_others_over(
    built_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page("runs", built_workspace, monkeypatch)
    page.multiselect(key="recipes").set_value(["tiny-llava-med", "tiny-cliva-med-phi2"]).run()
    table = page.dataframe[0].value
    assert len(table) == 8
    assert set(table["For"]) == {"all", "slake", "vqa-rad"}
    assert (table["Last"] < table["First"]).all()
    page.session_state["stage"] = "3"
    page.run()
    assert set(page.dataframe[0].value["Stage"]) == {3}


def test_benchmarks_put_the_blind_baseline_beside_each_score(
    built_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page("benchmarks", built_workspace, monkeypatch)
    closed = page.dataframe[0].value
    assert closed["label"].to_list() == ["tiny-llava-med", "tiny-cliva-med-phi2"]
    assert closed["value"].to_list() == [84, 77]
    assert closed["blind_value"].to_list() == [51, 44]
    assert closed["gain"].to_list() == [33, 33]
    assert closed["interval"].to_list() == ["78.0 to 89.0", "71.0 to 82.0"]


def test_published_numbers_stand_beside_ours_with_a_warning_where_they_do_not_compare(
    built_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page("benchmarks", built_workspace, monkeypatch)
    assert page.selectbox(key="published-closed").value == "llava_med_batch"
    table = page.dataframe[2].value
    known = table[table["model"] == "LLaVA-Med (From LLaVA)"].iloc[0]
    assert (known["kind"], known["closed"], known["open"]) == ("published", 85.34, 83.08)  # its table, SLAKE
    assert "do not compare" in page.warning[0].value


def test_wrong_answers_of_two_models_stand_side_by_side(built_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page("benchmarks", built_workspace, monkeypatch)
    said = [text.value for text in page.text]
    question = "Which organ is shown? <b>bold</b>"
    place = said.index(question)
    assert said[place : place + 5] == [question, "liver", "the lung", "unclear", "the lung"]
    page.selectbox(key="wrong-beside").select("none").run()
    said = [text.value for text in page.text]
    place = said.index(question)
    assert said[place : place + 4] == [question, "liver", "the lung", "unclear"]
    assert said[place + 4] != "the lung"


def test_escaping_leaves_no_mark_that_markdown_reads() -> None:
    shown = escaped(HOSTILE)
    assert "<script" not in shown.replace("\\<", "")
    assert "://" not in shown.replace("\\", "")
    assert escaped("figures") == "figures"


@pytest.mark.parametrize(
    ("number", "unit", "text"), [(1234567, "", "1,234,567"), (999, "B", "999 B"), (1_234_000, "B", "1.2 MB")]
)
def test_numbers_for_people(number: float, unit: str, text: str) -> None:
    assert count(number, unit) == text
