"""The contract of preference pairs: two different answers to one question about one image."""

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
    matches,
    unique,
)
from medvlm.errors import WorkspaceError
from medvlm.records import PreferencePair
from medvlm.store import Workspace

MAX_LENGTH_RATIO = 3.0
"""Chosen answers three times as long as rejected ones, over all pairs, teach length and not content."""


def _targets(workspace: Workspace, selection: Selection) -> list[Target]:
    recipes = workspace.preference_recipes() if selection.recipe is None else [selection.recipe]
    if not recipes:
        raise WorkspaceError(
            "the workspace holds no preference pairs",
            where=str(workspace.dataset("preference")),
            hint="run 'medvlm dataset build-preference --recipe NAME', or 'dvc repro' for all that is missing",
        )
    return [Target(name, (Table("pairs", workspace.preference_pairs(name), PreferencePair),)) for name in recipes]


CONTRACT = Contract(
    name="preference",
    title="Preference pairs",
    targets=_targets,
    frame="""
        SELECT pair_id AS row_id, image_sha256, image_phash, group_id, source, source AS mix,
               length(trim(replace(question, '<image>', ''))) AS question_length,
               length(trim(chosen)) AS chosen_length, length(trim(rejected)) AS rejected_length,
               CASE WHEN trim(lower(chosen)) = trim(lower(rejected)) THEN 'equal' ELSE 'different' END AS answers,
               md5(question || chosen || rejected) AS text_md5
        FROM pairs
        ORDER BY row_id, text_md5
    """,
    rules=(
        Limit(name="not_empty", text="there is at least one pair", query="SELECT count(*) FROM pairs", minimum=1),
        unique("pair_unique", "no pair id is used twice", "pairs", "pair_id", row_id="pair_id"),
        between("question_length", "the question has 1 to 5,000 characters", "question_length", 1, 5_000),
        between("chosen_length", "the chosen answer has 1 to 20,000 characters", "chosen_length", 1, 20_000),
        between("rejected_length", "the rejected answer has 1 to 20,000 characters", "rejected_length", 1, 20_000),
        matches("answers_differ", "chosen and rejected differ in more than case", "answers", r"^different$"),
        matches("source", "the judge is stated", "source", r"^(judge:.+|chat|official|review)$"),
        matches("group", "the group is stated, so that splits can keep it whole", "group_id", r"^\S"),
        matches("sha256_form", "the SHA-256 is 64 hex digits", "image_sha256", r"^[0-9a-f]{64}$"),
        matches("phash_form", "the perceptual hash is 16 hex digits", "image_phash", r"^[0-9a-f]{16}$"),
        Rows(
            name="no_contradiction",
            text="no answer is chosen over another and rejected against it for the same image and question",
            query="""SELECT a.pair_id AS row_id, 'against ' || b.pair_id AS value FROM pairs a JOIN pairs b
                     ON a.image_sha256 = b.image_sha256 AND a.question = b.question
                     AND a.chosen = b.rejected AND a.rejected = b.chosen""",
            # People disagree; a set that does so often teaches nothing.
            tolerated=0.02,
        ),
        Limit(
            name="length_ratio",
            text="chosen answers are not simply longer than rejected ones",
            query="SELECT sum(length(chosen)) / greatest(sum(length(rejected)), 1) FROM pairs",
            maximum=MAX_LENGTH_RATIO,
            severity="warn",
        ),
    ),
    images=ImageRules(id_column="pair_id", sha_column="image_sha256"),
    drift=DriftRules(length="chosen_length", mix="mix"),
)
