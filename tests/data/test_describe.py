"""Descriptions, splits and cards: what people see of a dataset before they use it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner
from figure_factory import figure, workspace_with
from hypothesis import given
from hypothesis import strategies as st

from medvlm.cli import cli
from medvlm.data.alignment import build_alignment
from medvlm.data.benchmarks import build_benchmark
from medvlm.data.card import write_card
from medvlm.data.describe import describe
from medvlm.data.instruct import build_instruct
from medvlm.data.leakage import compare_workspace
from medvlm.data.split import SplitRow, split_dataset, split_rows
from medvlm.errors import InputError, WorkspaceError
from medvlm.store import Report, Workspace, read_records, write_report

# --- describe ---------------------------------------------------------------------------------


def test_the_real_releases_are_recognised_and_counted(real_data: Path, tmp_path: Path) -> None:
    english, chinese = describe(Workspace(tmp_path), str(real_data / "slake"))
    assert (english.name, english.rows, english.images) == ("slake", 7032, 642)
    assert (chinese.name, chinese.by["split_answer_type"]["test_closed"]) == ("slake-zh", 420)
    assert english.dropped["answer_empty"]["count"] == 1
    public, data_rad = describe(Workspace(tmp_path), str(real_data / "vqa-rad"))
    assert (public.rows, data_rad.rows, public.licence) == (2248, 3515, "CC0 1.0")
    assert public.files[0]["official"] == "match"
    (test,) = describe(Workspace(tmp_path), str(real_data / "pathvqa" / "pvqa_test.json"))
    assert test.by["answer_type"] == {"closed": 3391, "open": 3370}


def test_the_real_texts_of_llava_med_are_counted(real_data: Path, tmp_path: Path) -> None:
    captions, questions = describe(Workspace(tmp_path), str(real_data / "llava-med"))
    assert (captions.kind, captions.rows, captions.by["mentions"]) == ("captions", 50, {"with": 46, "without": 4})
    assert (questions.kind, questions.rows, questions.images) == ("chat questions", 193, 50)
    assert questions.by["kind"] == {"conversation": 143, "detailed_description": 50}
    assert questions.by["modality"] == {"chest_xray": 37, "ct": 40, "gross": 34, "histology": 44, "mri": 38}
    assert [one.files[0]["official"] for one in (captions, questions)] == ["match", "match"]
    assert {one.licence for one in (captions, questions)} == {"CC BY-NC 4.0"}


def test_a_dataset_of_the_workspace_is_counted_without_its_images(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1), figure(2, licence="CC0", pmcid="PMC2", caption="Axial CT of it."))
    build_alignment(workspace)
    (one,) = describe(workspace, "alignment")
    assert (one.kind, one.rows, one.images, one.groups) == ("samples", 2, 2, 2)
    assert one.by["licence"] == {"CC BY": 1, "CC0": 1}
    assert one.by["modality"] == {"chest_xray": 1, "ct": 1}
    assert one.by["turns"] == {"2": 2}
    (figures,) = describe(workspace, str(workspace.figure_shards))
    assert (figures.kind, figures.by["retracted"]) == ("figures", {"false": 2})
    (named,) = describe(workspace, "figures")
    assert (named.kind, named.by) == (figures.kind, figures.by)


def test_what_a_build_dropped_is_said_of_what_it_built(tmp_path: Path) -> None:
    build_alignment(workspace_with(tmp_path, figure(1), figure(2, retracted=True)))
    (one,) = describe(Workspace(tmp_path), "alignment")
    assert (one.rows, one.dropped["retracted"]["count"]) == (1, 1)
    shown = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "dataset", "describe", "alignment"]).output
    assert "dropped, retracted: 1, such as 10_F2" in shown


def test_published_texts_are_counted_by_language_and_turns(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "肝脏"}]
    path = tmp_path / "llava_med_instruct_10k.json"
    path.write_text(json.dumps([{"id": "1", "conversations": turns}, {"id": "2", "conversations": turns[:1]}]))
    (one,) = describe(Workspace(tmp_path), str(path))
    assert (one.rows, one.by["language"], one.by["turns"]) == (1, {"zh": 1}, {"2": 1})
    assert one.dropped["turns_incomplete"]["count"] == 1
    assert one.files[0]["official"] == "mismatch"
    path.write_text(json.dumps([{"image": "1.jpg", "chosen_conversations": turns, "reject_conversations": turns}]))
    (pairs,) = describe(Workspace(tmp_path), str(path))
    assert (pairs.kind, pairs.dropped["answers_equal"]["count"]) == ("preference texts", 1)


def test_what_nobody_knows_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dataset and no path 'nothing'"):
        describe(Workspace(tmp_path), "nothing")
    with pytest.raises(InputError, match="neither shards nor a release"):
        describe(Workspace(tmp_path), str(tmp_path))


def test_the_verb_prints_counts_for_people_and_one_object_for_scripts(tmp_path: Path) -> None:
    build_alignment(workspace_with(tmp_path, figure(1)))
    base = ["--workspace", str(tmp_path), "dataset", "describe", "alignment"]
    assert "alignment: 1 samples, 1 images, 1 groups" in CliRunner().invoke(cli, base).output
    assert json.loads(CliRunner().invoke(cli, [*base, "--json"]).output)["rows"] == 1


# --- splits -----------------------------------------------------------------------------------

ROWS = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz")), max_size=30)


@given(pairs=ROWS, seed=st.integers(0, 5), order=st.randoms(use_true_random=False))
def test_no_split_cuts_through_an_article_or_an_image(pairs: list[tuple[str, str]], seed: int, order: object) -> None:
    rows = [(str(index), group, image) for index, (group, image) in enumerate(pairs)]
    splits = split_rows(rows, validation=0.3, test=0.3, seed=seed)
    for column in (1, 2):
        seen: dict[str, str] = {}
        for row in rows:
            assert seen.setdefault(row[column], splits[row[0]]) == splits[row[0]]
    shuffled = list(rows)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert split_rows(shuffled, validation=0.3, test=0.3, seed=seed) == splits


def test_shares_are_met_on_average_and_new_articles_move_no_old_ones() -> None:
    rows = [(str(number), f"PMC{number}", f"sha{number}") for number in range(5_000)]
    splits = split_rows(rows, validation=0.1, test=0.2, seed=1)
    counts = {name: list(splits.values()).count(name) for name in ("validation", "test")}
    assert counts["validation"] == pytest.approx(500, abs=75)
    assert counts["test"] == pytest.approx(1000, abs=100)
    fewer = split_rows(rows[:100], validation=0.1, test=0.2, seed=1)
    assert fewer == {row_id: splits[row_id] for row_id in fewer}
    assert split_rows(rows, validation=0.1, test=0.2, seed=2) != splits
    with pytest.raises(InputError, match=r"validation 0\.9 and test 0\.2"):
        split_rows(rows, validation=0.9, test=0.2)


def test_the_split_verb_writes_a_row_for_each_sample(tmp_path: Path) -> None:
    figures = [figure(number, pmcid=f"PMC{number // 4}") for number in range(80)]
    workspace = workspace_with(tmp_path, *figures)
    build_alignment(workspace)
    command = ["--workspace", str(tmp_path), "dataset", "split", "alignment", "--validation", "0.3", "--json"]
    report = json.loads(CliRunner().invoke(cli, command).output)
    rows = read_records(workspace.dataset("alignment") / "splits", SplitRow)
    assert [row.sample_id for row in rows] == [one.figure_id for one in figures]
    assert report["counts"]["validation"] == sum(row.split == "validation" for row in rows) > 0
    assert report["counts"]["validation"] % 4 == 0
    assert split_dataset(workspace, "alignment", validation=0.3).fingerprint == report["fingerprint"]


# --- cards ------------------------------------------------------------------------------------


def test_the_card_shows_counts_licences_losses_and_leakage(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1), figure(2, figure_id="<b>|x", retracted=True))
    build_alignment(workspace)
    folder = workspace.dataset("alignment")
    text = (folder / "README.md").read_text("utf-8")
    assert "| CC BY | 1 |" in text
    assert "| retracted | 1 | &lt;b>&#124;x (PMC1) |" in text
    assert "Not looked for yet" in text
    assert "Synthetic" not in text
    comparison = {
        "train": "alignment", "test": "slake", "test_images": 96, "leaked_images": 3, "near_images": 2,
        "clean_items": 1000,
    }  # fmt: skip
    write_report(workspace.leakage, Report("leakage", details={"comparisons": [comparison]}), started=0.0)
    write_card(workspace, "alignment")
    assert "| alignment | slake | 96 | 3 | 2 | 1,000 |" in (folder / "README.md").read_text("utf-8")
    with pytest.raises(WorkspaceError, match="'instruct' has not been built"):
        write_card(workspace, "instruct")


def test_a_leakage_report_renews_the_cards(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1))
    build_alignment(workspace)
    release = tmp_path / "release"
    (release / "images").mkdir(parents=True)
    (release / "images" / "test_1.jpg").write_bytes(figure(3).image.bytes)
    record = {"img_id": "test_1", "labelf": {"pvqa": [{"yes": 1}]}, "sentf": {"pvqa": ["Is it?"]}}
    (release / "pvqa_test.json").write_text(json.dumps([record]))
    build_benchmark(workspace, "pathvqa", release)
    cards = [folder / "README.md" for folder in (workspace.dataset("alignment"), workspace.benchmark("pathvqa"))]
    assert all("Not looked for yet" in card.read_text("utf-8") for card in cards)
    assert ["kept as published" in card.read_text("utf-8") for card in cards] == [False, True]
    metadata = (workspace.dataset("alignment") / "croissant.json").stat().st_mtime_ns
    compare_workspace(workspace)
    assert all("| alignment | pathvqa:test | 1 | 0 | " in card.read_text("utf-8") for card in cards)
    assert (workspace.dataset("alignment") / "croissant.json").stat().st_mtime_ns == metadata


def test_what_comes_of_the_sample_corpus_says_that_it_is_synthetic(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1))
    store = str(workspace.corpus / "bucket")
    write_report(workspace.figures, Report("fetch", details={"store": store}), started=0.0)
    build_instruct(workspace)
    assert "**Synthetic.**" in (workspace.dataset("instruct") / "README.md").read_text("utf-8")


@pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")  # rdflib, by mlcroissant
@pytest.mark.filterwarnings("ignore:The inplace keyword:pandas.errors.Pandas4Warning")  # mlcroissant
def test_croissant_satisfies_the_reader_of_mlcommons(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import mlcroissant

    workspace = workspace_with(tmp_path, figure(1))
    build_instruct(workspace)
    release = tmp_path / "release"
    (release / "images").mkdir(parents=True)
    (release / "images" / "test_1.jpg").write_bytes(figure(3).image.bytes)
    record = {"img_id": "test_1", "labelf": {"pvqa": [{"yes": 1}]}, "sentf": {"pvqa": ["Is it?"]}}
    (release / "pvqa_test.json").write_text(json.dumps([record]))
    build_benchmark(workspace, "pathvqa", release)
    with caplog.at_level(logging.WARNING):
        samples = mlcroissant.Dataset(jsonld=str(workspace.dataset("instruct") / "croissant.json"))
        items = mlcroissant.Dataset(jsonld=str(workspace.benchmark("pathvqa") / "croissant.json"))
        (sample,) = samples.records("records")
        (item,) = items.records("records")
    assert not caplog.records
    assert [turn["records/turns/role"] for turn in sample["records/turns"]][:2] == [b"user", b"assistant"]
    assert sample["records/image"].size == (32, 32)
    assert item["records/question"] == b"Is it?"
    assert samples.metadata.license == ["CC BY"]
