"""The contract of scores: per cents with honest intervals, a blind baseline and a clean slice."""

from __future__ import annotations

from data_contracts.contract import (
    Contract,
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
from data_contracts.predictions import recipes_and_benchmarks
from medvlm.records import Score, VQAItem
from medvlm.store import Workspace


def _targets(workspace: Workspace, selection: Selection) -> list[Target]:
    folder = workspace.scores("x", "y").parent.parent
    found = recipes_and_benchmarks(
        folder, selection, what="scores", hint="run 'medvlm score', or 'dvc repro' for all that is missing"
    )
    return [
        Target(
            f"{recipe}/{benchmark}",
            (
                Table("scores", workspace.scores(recipe, benchmark) / "scores", Score, files="scores*.parquet"),
                Table("items", workspace.items(benchmark), VQAItem),
            ),
        )
        for recipe, benchmark in found
    ]


_KEY = "concat_ws('/', model, stage, CASE WHEN blind THEN 'blind' ELSE 'seeing' END, slice, answer_type, rule)"

CONTRACT = Contract(
    name="scores",
    title="Scores",
    targets=_targets,
    frame=f"""
        SELECT {_KEY} AS row_id, benchmark, model, stage, slice, answer_type, rule, value, n,
               coalesce(low::VARCHAR, '') || '..' || coalesce(high::VARCHAR, '') AS interval
        FROM scores
        ORDER BY row_id, value
    """,  # noqa: S608
    rules=(
        Limit(name="not_empty", text="there is at least one score", query="SELECT count(*) FROM scores", minimum=1),
        unique(
            "one_value",
            "a rule has one value for a model, stage, slice and answer type",
            f"(SELECT *, {_KEY} AS key FROM scores)",  # noqa: S608
            "key",
            row_id="key",
        ),
        between("per_cent", "a score lies between 0 and 100", "value", 0, 100),
        Rows(
            name="number",
            text="a score is a number",
            query=f"SELECT {_KEY} AS row_id, value::VARCHAR AS value FROM scores WHERE NOT isfinite(value)",  # noqa: S608
        ),
        between("items", "a score has at least one item below it", "n", 1, None),
        in_set("answer_type", "the answer type is open or closed", "answer_type", ("open", "closed")),
        matches("slice", "the slice is 'all' or 'field=value'", "slice", r"^(all|[a-z_]+=.+)$"),
        matches("rule", "the rule is named", "rule", r"^\S"),
        Rows(
            name="interval",
            text="an interval holds its score and lies between 0 and 100; both ends are there or none",
            query=f"""SELECT {_KEY} AS row_id, concat_ws(' ', low, value, high) AS value FROM scores
                      WHERE (low IS NULL) != (high IS NULL) OR low > value + 1e-6 OR high < value - 1e-6
                      OR low < -1e-6 OR high > 100 + 1e-6""",  # noqa: S608
        ),
        Rows(
            name="blind_baseline",
            text="every stage's scores have their blind baseline beside them",
            query="""SELECT concat_ws('/', model, stage, answer_type) AS row_id, 'no blind scores' AS value
                     FROM scores GROUP BY model, stage, answer_type HAVING NOT bool_or(blind)""",
            severity="warn",
        ),
        Rows(
            name="clean_slice",
            text="a score on leaked items has the clean slice beside it, and both make up the whole",
            query="""SELECT concat_ws('/', model, stage, blind, answer_type, rule) AS row_id,
                            concat_ws(' + ', touched, clean) || ' of ' || whole AS value
                     FROM (SELECT model, stage, blind, answer_type, rule, max(n) FILTER (slice = 'all') AS whole,
                                  coalesce(max(n) FILTER (slice = 'leaked=true'), 0) AS touched,
                                  coalesce(max(n) FILTER (slice = 'leaked=false'), 0) AS clean
                           FROM scores GROUP BY ALL)
                     WHERE whole IS NULL OR (touched > 0 AND touched + clean != whole)""",
        ),
        Rows(
            name="whole_benchmark",
            text="a score on 'all' has no more items than the test split, and some rule has them all",
            query="""SELECT concat_ws('/', model, stage, blind, s.answer_type) AS row_id,
                            max(s.n) || ' of ' || coalesce(max(i.n), 0) AS value
                     FROM scores s LEFT JOIN (SELECT answer_type, count(*) AS n FROM items WHERE split = 'test'
                     GROUP BY answer_type) i ON i.answer_type = s.answer_type
                     WHERE slice = 'all' GROUP BY model, stage, blind, s.answer_type
                     HAVING max(s.n) != coalesce(max(i.n), 0)""",
        ),
    ),
)
