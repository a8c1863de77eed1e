"""The contract of benchmark items: each question is answerable, and its image is there."""

from __future__ import annotations

from data_contracts.contract import (
    Contract,
    DriftRules,
    ImageRules,
    Limit,
    Rows,
    Selection,
    Table,
    Target,
    between,
    in_set,
    matches,
    unique,
)
from medvlm.errors import WorkspaceError
from medvlm.records import VQAItem
from medvlm.store import Workspace

__all__ = ["CONTRACT", "benchmark_names"]


def benchmark_names(workspace: Workspace, only: str | None) -> list[str]:
    """Benchmarks that the workspace holds, in order.

    Raises:
        WorkspaceError: There is none, or not the one asked for.
    """
    folder = workspace.benchmark("x").parent
    found = sorted(path.parent.name for path in folder.glob("*/items") if not path.parent.name.startswith("."))
    if only is not None:
        found = [name for name in found if name == only]
    if not found:
        raise WorkspaceError(
            "the workspace holds no benchmark items" + (f" of '{only}'" if only else ""),
            where=str(folder),
            hint="build them: 'medvlm dataset build-benchmark --help' shows how, 'dvc repro' does all that is missing",
        )
    return found


def _targets(workspace: Workspace, selection: Selection) -> list[Target]:
    names = benchmark_names(workspace, selection.benchmark)
    return [Target(name, (Table("items", workspace.items(name), VQAItem),)) for name in names]


CONTRACT = Contract(
    name="benchmark-items",
    title="Benchmark items",
    targets=_targets,
    frame="""
        SELECT item_id AS row_id, benchmark, split, image_id, image_sha256, image_phash, answer_type, language,
               modality AS mix, length(trim(question)) AS question_length, length(trim(answer)) AS answer_length,
               CASE WHEN regexp_matches(question, '[\u4e00-\u9fff]') THEN 'zh' ELSE 'en' END || '/' || language
                   AS script_language,
               question LIKE '%<image>%' AS holds_slot, md5(question || chr(10) || answer) AS text_md5
        FROM items
        ORDER BY row_id, text_md5
    """,
    rules=(
        Limit(
            name="test_split",
            text="there is at least one test item",
            query="SELECT count(*) FROM items WHERE split = 'test'",
            minimum=1,
        ),
        unique("item_unique", "no item id is used twice", "items", "item_id", row_id="item_id"),
        Limit(
            name="one_benchmark",
            text="all items are of one benchmark",
            query="SELECT count(DISTINCT benchmark) FROM items",
            maximum=1,
        ),
        in_set("split", "the split is train, validation or test", "split", ("train", "validation", "test")),
        in_set("answer_type", "the answer type is open or closed", "answer_type", ("open", "closed")),
        between("question_length", "the question has 3 to 2,000 characters", "question_length", 3, 2_000),
        between("answer_length", "the answer has 1 to 2,000 characters", "answer_length", 1, 2_000),
        in_set("no_slot", "the question holds no <image> of its own", "holds_slot", (False,)),
        in_set("language", "the language is en or zh", "language", ("en", "zh")),
        in_set(
            "script",
            "the question is written in its language",
            "script_language",
            ("en/en", "zh/zh"),
            tolerated=0.02,
        ),
        matches("image_id", "the image is named", "image_id", r"^\S"),
        matches("sha256_form", "the SHA-256 is 64 hex digits", "image_sha256", r"^[0-9a-f]{64}$"),
        matches("phash_form", "the perceptual hash is 16 hex digits", "image_phash", r"^[0-9a-f]{16}$"),
        Rows(
            name="image_named_once",
            text="an image name stands for one picture",
            query="""SELECT min(item_id) AS row_id, image_id || ' is ' || count(DISTINCT image_sha256) || ' pictures'
                     AS value FROM items GROUP BY image_id HAVING count(DISTINCT image_sha256) > 1""",
        ),
        Rows(
            name="test_question_in_train",
            text="no test question is asked about the same image in train",
            query="""SELECT t.item_id AS row_id, 'as train item ' || min(o.item_id) AS value
                     FROM items t JOIN items o ON o.image_sha256 = t.image_sha256
                     AND lower(trim(o.question)) = lower(trim(t.question))
                     WHERE t.split = 'test' AND o.split = 'train' GROUP BY t.item_id""",
            # Published releases do this (VQA-RAD once). The leakage report and the clean slice deal with it.
            severity="warn",
        ),
        Rows(
            name="closed_answers_short",
            text="a closed question's answer is at most six words",
            query="""SELECT item_id AS row_id, answer AS value FROM items
                     WHERE answer_type = 'closed' AND len(string_split(trim(answer), ' ')) > 6""",
            tolerated=0.05,
            severity="warn",
        ),
    ),
    images=ImageRules(id_column="item_id", sha_column="image_sha256"),
    drift=DriftRules(length="question_length", mix="mix"),
)
