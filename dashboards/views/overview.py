"""Where the pipeline stands: what is there, what is out of date, the latest scores, the contracts, the disk."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import altair as alt
import pandas as pd
import streamlit as st

from dashboards.frame import count, empty, escaped, results, show, stamp, tidy
from dashboards.release import release_section
from medvlm.evaluation.metrics import HEADLINE
from medvlm.failures import Failure
from medvlm.results import Results, Step, score_board

STATES = {"done": "✓ fresh", "stale": "↻ stale", "missing": "– not run yet", "failed": "✗ failed"}
DAGSTER = os.environ.get("MEDVLM_DAGSTER_URL", "http://127.0.0.1:3000")


@st.cache_data(max_entries=4, show_spinner="Reading the reports …")
def _data_steps(at: str, root: str) -> list[Step]:
    del at
    return Results(Path(root)).data_steps()


@st.cache_data(max_entries=16, show_spinner="Reading the reports …")
def _recipe_steps(at: str, root: str, recipe: str) -> list[Step]:
    del at
    return Results(Path(root)).recipe_steps(recipe)


@st.cache_data(max_entries=4, show_spinner="Reading the scores …")
def _scores(at: str, root: str) -> pd.DataFrame:
    del at
    return Results(Path(root)).scores()


@st.cache_data(max_entries=4, show_spinner="Measuring the disk …")
def _disk(at: str, root: str) -> dict[str, int]:
    del at
    return Results(Path(root)).disk_use()


def step_table(steps: list[Step]) -> pd.DataFrame:
    """One row a step: state, when, how long, and what came out."""
    rows: list[dict[str, object]] = []
    for step in steps:
        report = step.report
        counts = sorted((report.counts if report else {}).items(), key=lambda pair: -pair[1])
        counted = [f"{number:,} {tidy(name)}" for name, number in counts if number]
        rows.append(
            {
                "Step": step.name,
                "State": STATES[step.state],
                "Finished": datetime.fromisoformat(ended) if (ended := _ended(step)) else None,
                "Seconds": report.duration_s if report else None,
                "What came out": step.failure.what if step.failure else ", ".join(counted[:4]),
                "Lineage": dagster_link(step),
            }
        )
    return pd.DataFrame(rows)


def _ended(step: Step) -> str:
    """When the step's last run ended, well or not."""
    return step.failure.when if step.failure else step.report.created_at if step.report else ""


def dagster_link(step: Step) -> str:
    """The asset's page in Dagster, at the step's own partition."""
    chosen = f"?partition={quote(step.partition, safe='')}" if step.partition else ""
    return f"{DAGSTER}/assets/{step.asset}{chosen}"


def _table(steps: list[Step]) -> None:
    st.dataframe(
        step_table(steps),
        hide_index=True,
        placeholder="",
        column_config={
            "Step": st.column_config.TextColumn(width=150),
            "State": st.column_config.TextColumn(width=150),
            "Finished": st.column_config.DatetimeColumn(format="D MMM, HH:mm", width=110),
            "Seconds": st.column_config.NumberColumn(format="%.1f", width=80),
            "What came out": st.column_config.TextColumn(width="large"),
            "Lineage": st.column_config.LinkColumn("Lineage", display_text="Dagster", width=70),
        },
    )
    for step in steps:
        if step.failure:
            _failure(f"{step.name} failed", step.failure)


def _failure(title: str, failure: Failure) -> None:
    with st.container(border=True, gap="xxsmall"):
        st.markdown(f":red[**✗ {escaped(title)}**]")
        st.text(f"{failure.what}\nWhere: {failure.where}\nNext:  {failure.hint}".rstrip())


def _numbers(root: str) -> None:
    reader = results()
    sources = reader.sources()
    contracts = reader.contracts()
    broken = sum(not contract.success for contract in contracts)
    with st.container(horizontal=True):
        for label, kind in (("Figures", "figures"), ("Training samples", "samples"), ("Benchmark questions", "items")):
            number = sum(source.rows for source in sources if source.kind == kind)
            st.metric(label, count(number), border=True, height="stretch")
        state = "none checked" if not contracts else "all hold" if not broken else f"{broken} broken"
        st.metric("Contracts", state, border=True, height="stretch")
        st.metric("Disk", count(sum(_disk(stamp(), root).values()), "B"), border=True, height="stretch")


@st.cache_data(max_entries=4, show_spinner="Reading the scores …")
def _history(at: str, root: str) -> pd.DataFrame:
    del at
    return Results(Path(root)).score_history()


def with_change(board: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """The board with ``change`` (points since the scores before) and ``course`` (all scores so far).

    Args:
        board: Rows of the last stage, with ``model``, ``benchmark`` and ``answer_type``.
        history: As ``Results.score_history`` gives it.
    """
    courses: list[list[float]] = []
    for row in board.itertuples():
        mine = history[
            (history["recipe"] == row.model)
            & (history["benchmark"] == row.benchmark)
            & (history["metric"] == f"{row.answer_type}.{HEADLINE[row.answer_type]}")
        ]
        courses.append(mine.sort_values("when", kind="stable")["value"].astype(float).to_list())
    change = [course[-1] - course[-2] if len(course) > 1 else None for course in courses]
    return board.assign(change=pd.array(change, dtype="Float64"), course=courses)


def _latest_scores(root: str) -> None:
    scores = _scores(stamp(), root)
    st.subheader("Latest scores", anchor=False)
    if scores.empty:
        st.caption("No benchmark has been scored yet.")
        return
    board = pd.concat(score_board(part, HEADLINE) for _, part in scores.groupby("benchmark", sort=True))
    # Stages are written in the order of training: the last row of a model is its last stage.
    last = board.groupby(["model", "benchmark", "answer_type"], sort=True)["stage"].transform("last")
    board = board[board["stage"] == last]
    board = with_change(board, _history(stamp(), root))
    columns = ["model", "benchmark", "answer_type", "value", "change", "course", "blind_value", "gain", "n"]
    if not board["change"].notna().any():
        columns = [column for column in columns if column not in ("change", "course")]
    shown = board[columns]
    st.dataframe(
        shown.sort_values(["model", "benchmark", "answer_type"]),
        hide_index=True,
        placeholder="",
        column_config={
            "model": "Model",
            "benchmark": "Benchmark",
            "answer_type": "Questions",
            "value": st.column_config.NumberColumn("Score", format="%.1f"),
            "change": st.column_config.NumberColumn(
                "Change", format="%+.1f", help="Points since the scores before; empty until there are two"
            ),
            "course": st.column_config.LineChartColumn("So far", width=80),
            "blind_value": st.column_config.NumberColumn("Blind", format="%.1f", help="Without the image"),
            "gain": st.column_config.NumberColumn("Gain", format="%+.1f", help="Points above blind"),
            "n": st.column_config.NumberColumn("Number", format="localized"),
        },
    )
    st.caption(f"Per cent, by {HEADLINE['closed']} for closed and {HEADLINE['open']} for open questions.")


def _disk_chart(root: str) -> None:
    st.subheader("Disk", anchor=False)
    sizes = _disk(stamp(), root)
    table = pd.DataFrame({"folder": list(sizes), "MB": [size / 1e6 for size in sizes.values()]}).head(10)
    base = alt.Chart(table).encode(
        y=alt.Y("folder:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False)),
        x=alt.X("MB:Q", axis=None),
    )
    bars = base.mark_bar(color="#0f766e", cornerRadiusEnd=3, height={"band": 0.68})
    numbers = base.mark_text(align="left", dx=5).encode(text=alt.Text("MB:Q", format=",.1f"))
    st.altair_chart((bars + numbers).properties(height=max(60, 30 * len(table))), alt="Megabytes by folder")
    st.caption("Megabytes by folder of the workspace.")


def body() -> None:
    """Numbers, the shared steps, each recipe's steps, scores and disk."""
    root = str(results().workspace.root)
    steps = _data_steps(stamp(), root)
    if all(step.report is None for step in steps):
        empty("This workspace is empty.")
        return
    _numbers(root)
    broken = [contract for contract in results().contracts() if not contract.success]
    if broken:
        st.error(
            "Broken: " + "; ".join(f"**{escaped(c.name)}** ({len(c.failed)} of {len(c.checks)} checks)" for c in broken)
        )
        st.page_link("views/data.py", label="See the contracts", query_params={"section": "Contracts"})
    for failure in results().unchecked_contracts():
        _failure(f"contract {'/'.join(failure.command[1:])} could not be checked", failure)
    st.subheader("Data", anchor=False)
    _table(steps)
    recipes = results().recipes()
    if recipes:
        st.subheader("Recipe", anchor=False)
        recipe = st.segmented_control(
            "Recipe", recipes, default=recipes[0], required=True, key="recipe", label_visibility="collapsed"
        )
        _table(_recipe_steps(stamp(), root, str(recipe)))
        release_section(str(recipe))
    else:
        st.caption("No recipe has been trained yet.")
    left, right = st.columns([3, 2], gap="large")
    with left:
        _latest_scores(root)
    with right:
        _disk_chart(root)
    st.link_button("Open the lineage in Dagster", DAGSTER, help="Start it with: make dev")


show("Overview", "Where the pipeline stands, from the URL list to the scores.", body)
