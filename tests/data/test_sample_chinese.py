"""The Chinese side of the sample corpus: ChiMed-VL's files, and answers as SLAKE's Chinese part gives them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from medvlm.data.benchmarks import build_benchmark, read_benchmark
from medvlm.data.conversations import joined_samples
from medvlm.data.figures import fetch_figures
from medvlm.data.official_texts import read_official
from medvlm.data.readers.llava_med import Conversation
from medvlm.data.sample import TINY, build_corpus
from medvlm.data.sample_questions import CLOSED, Asked
from medvlm.records import Sample, VQAItem
from medvlm.store import Workspace, iterate_records


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("chinese"))
    build_corpus(workspace, seed=0, scale=TINY)
    return workspace


@pytest.mark.parametrize(
    ("path", "turns"),
    [("alignment/ChiMed-VL-Alignment.jsonl", {2}), ("instruct/ChiMed-VL-Instruction.jsonl", set(range(2, 30, 2)))],
)
def test_chimed_files_hold_a_chinese_row_for_each_figure(workspace: Workspace, path: str, turns: set[int]) -> None:
    lines = (workspace.corpus / "llava_med_image_urls.jsonl").read_text().splitlines()
    listed = {json.loads(line)["pair_id"] for line in lines}
    rows = list(read_official(workspace.corpus / path))
    assert {row.pair_id for row in rows if isinstance(row, Conversation)} == listed and len(rows) == len(listed)
    for row in rows:
        assert isinstance(row, Conversation) and len(row.turns) in turns
        for turn in row.turns[::2]:
            assert any("\u4e00" <= letter <= "\u9fff" for letter in turn.text), turn.text


def test_a_chinese_conversation_that_ends_in_ct_is_chinese(workspace: Workspace) -> None:
    corpus = workspace.corpus
    store = str(corpus / "bucket" / "pmc-oa-opendata")
    fetch_figures(corpus / "llava_med_image_urls.jsonl", store, workspace.figures)
    rows = list(read_official(workspace.corpus / "instruct" / "ChiMed-VL-Instruction.jsonl"))
    assert any(isinstance(row, Conversation) and row.turns[-1].text in ("CT", "MRI") for row in rows)
    samples = [s for s in joined_samples(workspace.figure_shards, rows, dataset="instruct") if isinstance(s, Sample)]
    assert len(samples) > 30 and {sample.language for sample in samples} == {"zh"}


def test_the_two_languages_of_a_dataset_lie_side_by_side(workspace: Workspace) -> None:
    for name in ("alignment", "instruct"):
        suffixes = sorted(path.suffix for path in (workspace.corpus / name).iterdir())
        assert suffixes == [".json", ".jsonl"]


def test_slake_zh_is_built_from_the_same_release(workspace: Workspace) -> None:
    for name in ("slake", "slake-zh"):
        build_benchmark(workspace, name, workspace.corpus / "slake")
    english, chinese = (list(iterate_records(workspace.items(name), VQAItem)) for name in ("slake", "slake-zh"))
    assert {item.language for item in chinese} == {"zh"} and {item.benchmark for item in chinese} == {"slake-zh"}
    for split in ("train", "validation", "test"):
        ours = [item for item in chinese if item.split == split]
        theirs = [item for item in english if item.split == split]
        assert {item.image_sha256 for item in ours} == {item.image_sha256 for item in theirs}
        assert Counter(item.answer_type for item in ours) == Counter(item.answer_type for item in theirs)


def test_a_chinese_yes_or_no_takes_up_the_verb() -> None:
    said = {}
    for question in CLOSED:
        for wording, (_, chinese) in enumerate(question.wordings):
            said[chinese] = tuple(Asked(0, question, wording, a, "closed").short_answer("zh") for a in ("yes", "no"))
    assert said["图中有病变吗?"] == ("有", "没有")
    assert said["图像中存在病变吗?"] == ("存在", "不存在")
    assert said["图片中包含肝脏吗?"] == ("包含", "不包含")
    assert said["病变大吗?"] == said["这是CT图像吗?"] == ("是的", "不是")


def test_closed_answers_are_among_those_of_the_real_slake(workspace: Workspace, real_data: Path) -> None:
    def forms(root: Path) -> set[str]:
        return {i.answer for i in read_benchmark("slake-zh", root, images=False) if i.answer_type == "closed"}

    assert forms(workspace.corpus / "slake") <= forms(real_data / "slake")
