"""The contract of predictions: every test item answered once a stage, with and without its image."""

from __future__ import annotations

from pathlib import Path

from data_contracts.contract import (
    Contract,
    DriftRules,
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
from medvlm.records import Prediction, VQAItem
from medvlm.store import Workspace

__all__ = ["CONTRACT", "recipes_and_benchmarks"]

MAX_EMPTY = 0.05
"""Share of answers that may be empty: a model may decline, a broken decoding declines always."""
MAX_SAME_PERCENT = 95.0
"""One answer to nearly everything is a collapsed model, not a wrong file: it warns."""


def recipes_and_benchmarks(folder: Path, selection: Selection, *, what: str, hint: str) -> list[tuple[str, str]]:
    """Recipe and benchmark of every step folder ``<recipe>/<benchmark>`` below ``folder``, in order.

    Raises:
        WorkspaceError: There is none, or none of those asked for.
    """
    pairs = sorted((path.parent.name, path.name) for path in folder.glob("*/*") if path.is_dir())
    found = [
        (recipe, benchmark)
        for recipe, benchmark in pairs
        if selection.recipe in (None, recipe) and selection.benchmark in (None, benchmark)
        if not recipe.startswith(".") and not benchmark.startswith(".")
    ]
    if not found:
        asked = " / ".join(name for name in (selection.recipe, selection.benchmark) if name)
        raise WorkspaceError(
            f"the workspace holds no {what}" + (f" of {asked}" if asked else ""), where=str(folder), hint=hint
        )
    return found


def _targets(workspace: Workspace, selection: Selection) -> list[Target]:
    folder = workspace.predictions("x", "y").parent.parent
    found = recipes_and_benchmarks(
        folder, selection, what="predictions", hint="run 'medvlm predict', or 'dvc repro' for all that is missing"
    )
    return [
        Target(
            f"{recipe}/{benchmark}",
            (
                Table("predictions", workspace.predictions(recipe, benchmark) / "answers", Prediction),
                Table("items", workspace.items(benchmark), VQAItem),
            ),
        )
        for recipe, benchmark in found
    ]


_KEY = "concat_ws('/', item_id, model, stage, CASE WHEN blind THEN 'blind' ELSE 'seeing' END)"

CONTRACT = Contract(
    name="predictions",
    title="Predictions",
    targets=_targets,
    frame=f"""
        SELECT {_KEY} AS row_id, stage AS mix, model, stage, length(prompt) AS prompt_length,
               length(trim(text)) AS text_length,
               CASE WHEN regexp_matches(text, '<image>|</?s>|<\\|[a-z_]+\\|>') THEN text ELSE 'clean' END AS special,
               md5(prompt || chr(10) || text) AS text_md5
        FROM predictions
        ORDER BY row_id, text_md5
    """,  # noqa: S608
    rules=(
        Limit(
            name="not_empty",
            text="there is at least one answer that saw the image",
            query="SELECT count(*) FROM predictions WHERE NOT blind",
            minimum=1,
        ),
        unique(
            "answered_once",
            "an item is answered once by each stage, with and without its image",
            f"(SELECT *, {_KEY} AS key FROM predictions)",  # noqa: S608
            "key",
            row_id="key",
        ),
        Rows(
            name="every_item_answered",
            text="every test item has an answer of every stage",
            query="""SELECT concat_ws('/', i.item_id, r.model, r.stage, CASE WHEN r.blind THEN 'blind' ELSE 'seeing'
                     END) AS row_id, 'no answer' AS value
                     FROM (SELECT DISTINCT model, stage, blind FROM predictions) r
                     CROSS JOIN (SELECT item_id FROM items WHERE split = 'test') i
                     ANTI JOIN predictions p ON p.item_id = i.item_id AND p.model = r.model
                     AND p.stage = r.stage AND p.blind = r.blind""",
        ),
        Rows(
            name="known_items",
            text="every answer is to a test item of the benchmark",
            query=f"""SELECT {_KEY} AS row_id, benchmark AS value FROM predictions
                      WHERE item_id NOT IN (SELECT item_id FROM items WHERE split = 'test')
                      OR benchmark NOT IN (SELECT benchmark FROM items)""",  # noqa: S608
        ),
        Rows(
            name="blind_baseline",
            text="every stage was also asked without the image",
            query="""SELECT model || '/' || stage AS row_id, 'no blind answers' AS value FROM predictions
                     GROUP BY model, stage HAVING NOT bool_or(blind)""",
            severity="warn",
        ),
        matches("model_stated", "the model is stated", "model", r"^\S"),
        matches("stage_stated", "the stage is stated", "stage", r"^\S"),
        between("prompt_length", "the prompt is stated", "prompt_length", 1, None),
        between("answer_not_empty", "the answer is not empty", "text_length", 1, None, tolerated=MAX_EMPTY),
        between("answer_length", "the answer is at most 20,000 characters", "text_length", None, 20_000),
        matches("no_special_tokens", "the answer holds no special tokens", "special", r"^clean$"),
        Limit(
            name="same_answer_percent",
            text="the model does not give one answer to nearly everything",
            query="""SELECT 100.0 * max(n) / sum(n) FROM
                     (SELECT lower(trim(text)) AS answer, count(*) AS n FROM predictions WHERE NOT blind GROUP BY 1)""",
            maximum=MAX_SAME_PERCENT,
            severity="warn",
        ),
    ),
    drift=DriftRules(length="text_length", mix="mix"),
)
