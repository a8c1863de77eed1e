"""Scores with intervals beside their blind baselines, slices, and the answers that were wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from dashboards.classification import show_classification
from dashboards.frame import (
    choose_page,
    download_csv,
    empty,
    escaped,
    foreign_text,
    picture,
    results,
    show,
    stamp,
    tidy,
)
from medvlm.evaluation.metrics import HEADLINE
from medvlm.results import Page, Results, score_board

SIGHT, BLIND = "#0f766e", "#9aa5ab"
ANSWERS_A_PAGE = 5


@st.cache_data(max_entries=4, show_spinner="Reading the scores …")
def _scores(at: str, root: str) -> pd.DataFrame:
    del at
    return Results(Path(root)).scores()


@st.cache_data(max_entries=64, show_spinner="Reading the answers …")
def _wrong(at: str, root: str, recipe: str, benchmark: str, offset: int) -> Page:
    del at
    return Results(Path(root)).wrong_answers(recipe, benchmark, offset=offset, limit=ANSWERS_A_PAGE)


@st.cache_data(max_entries=64, show_spinner="Reading the answers …")
def _answers(at: str, root: str, recipe: str, benchmark: str, ids: tuple[str, ...]) -> dict[str, str]:
    del at
    return Results(Path(root)).answers(recipe, benchmark, ids)


def _chart(table: pd.DataFrame) -> alt.LayerChart:
    scale = alt.Scale(domain=[0, 100])
    base = alt.Chart(table).encode(
        y=alt.Y("label:N", sort=list(dict.fromkeys(table["label"])), title=None, axis=alt.Axis(labelLimit=260))
    )
    tooltip = [
        alt.Tooltip("label:N", title="model"),
        alt.Tooltip("value:Q", title="with the image", format=".1f"),
        alt.Tooltip("low:Q", title="95 % from", format=".1f"),
        alt.Tooltip("high:Q", title="to", format=".1f"),
        alt.Tooltip("blind_value:Q", title="blind", format=".1f"),
        alt.Tooltip("n:Q", title="questions", format=","),
    ]
    link = base.mark_rule(strokeDash=[2, 3], color=BLIND).encode(x=alt.X("blind_value:Q", scale=scale), x2="value:Q")
    bars = base.mark_rule(strokeWidth=3, color=SIGHT, opacity=0.45).encode(x=alt.X("low:Q", scale=scale), x2="high:Q")
    key = alt.Scale(domain=["with the image", "blind"], range=[SIGHT, BLIND])
    shape = alt.Scale(domain=["with the image", "blind"], range=["circle", "diamond"])

    def dots(column: str, name: str) -> alt.Chart:
        return (
            base.transform_calculate(what=f"'{name}'")
            .mark_point(filled=True, size=130, opacity=1)
            .encode(
                x=alt.X(f"{column}:Q", scale=scale, title="per cent"),
                color=alt.Color("what:N", scale=key, title=None, legend=alt.Legend(orient="bottom")),
                shape=alt.Shape("what:N", scale=shape, title=None),
                tooltip=tooltip,
            )
        )

    layers = link + bars + dots("blind_value", "blind") + dots("value", "with the image")
    return layers.properties(height=150 + 36 * table["label"].nunique())


def _rules(scores: pd.DataFrame) -> dict[str, str]:
    chosen: dict[str, str] = {}
    kinds = [kind for kind in ("closed", "open") if kind in set(scores["answer_type"])]
    for cell, kind in zip(st.columns(2, gap="large"), kinds, strict=False):
        names = list(dict.fromkeys(scores.loc[scores["answer_type"] == kind, "rule"]))
        first = names.index(HEADLINE[kind]) if HEADLINE[kind] in names else 0
        chosen[kind] = cell.selectbox(
            f"Rule for {kind} questions", names, index=first, key=f"rule-{kind}", help="Every rule was scored."
        )
    return chosen


def _leaderboard(table: pd.DataFrame, benchmark: str) -> None:
    kinds = [kind for kind in ("closed", "open") if kind in set(table["answer_type"])]
    for cell, kind in zip(st.columns(2, gap="large"), kinds, strict=False):
        part = table[table["answer_type"] == kind]
        with cell:
            st.subheader(f"{kind.capitalize()} questions", anchor=False)
            st.altair_chart(_chart(part), alt=f"{kind} scores with intervals and blind baselines")
            interval = [
                f"{low:.1f} to {high:.1f}" if pd.notna(low) else ""
                for low, high in zip(part["low"], part["high"], strict=True)
            ]
            shown = part.assign(interval=interval)[["label", "value", "interval", "blind_value", "gain", "n"]]
            st.dataframe(shown, hide_index=True, column_config=_columns())
    download_csv("Download as CSV", lambda: table.drop(columns="label"), f"{benchmark}-scores")


def _columns() -> dict[str, Any]:
    def number(title: str, text: str = "") -> Any:
        return st.column_config.NumberColumn(title, format="%.1f", width=60, help=text or None)

    return {
        "label": st.column_config.TextColumn("Model"),
        "value": number("Score", "Per cent, with the image"),
        "interval": st.column_config.TextColumn("95 % interval", width=95, alignment="right"),
        "blind_value": number("Blind", "The same model, each image replaced by the mean image"),
        "gain": st.column_config.NumberColumn("Gain", format="%+.1f", width=60, help="Score less blind, in points"),
        "n": st.column_config.NumberColumn("Questions", format="localized", width=75),
    }


def _slices(scores: pd.DataFrame, rules: dict[str, str], table: pd.DataFrame) -> None:
    """Bars of the best checkpoint of each model: those of all its stages would be stacked."""
    part = scores[
        (scores["slice"] != "all") & ~scores["blind"] & (scores["rule"] == scores["answer_type"].map(rules))
    ].copy()
    if part.empty:
        return
    part[["field", "is"]] = part["slice"].str.split("=", n=1, expand=True)
    st.subheader("By slice", anchor=False)
    fields = list(dict.fromkeys(part["field"]))
    with st.container(horizontal=True):
        field = st.segmented_control(
            "By", fields, default=fields[0], required=True, format_func=tidy, key="slice-field"
        )
        kinds = [kind for kind in ("closed", "open") if kind in set(part["answer_type"])]
        kind = st.segmented_control("Questions", kinds, default=kinds[0], required=True, key="slice-kind")
    best = table[table["answer_type"] == kind].drop_duplicates("model")[["model", "stage", "label"]]
    part = part[(part["field"] == field) & (part["answer_type"] == kind)].merge(best, on=["model", "stage"])
    # The slices with most questions first: the small ones at the end are mostly noise.
    order = part.groupby("is")["n"].max().sort_values(ascending=False, kind="stable").index.to_list()[:25]
    part = part[part["is"].isin(order)].assign(name=lambda t: t["is"].map(tidy) + " (" + t["n"].astype(str) + ")")
    names = [name for value in order for name in part.loc[part["is"] == value, "name"].unique()]
    base = alt.Chart(part).encode(
        y=alt.Y("name:N", sort=names, title=None, axis=alt.Axis(labelLimit=260)),
        yOffset=alt.YOffset("label:N"),
        color=alt.Color("label:N", title=None, legend=alt.Legend(orient="bottom", labelLimit=300)),
    )
    bars = base.mark_bar(cornerRadiusEnd=2).encode(
        x=alt.X("value:Q", title="per cent", scale=alt.Scale(domain=[0, 100])),
        tooltip=["label:N", alt.Tooltip("name:N", title="slice"), alt.Tooltip("value:Q", format=".1f"), "n:Q"],
    )
    height = 150 + (16 + 14 * part["model"].nunique()) * len(names)
    st.altair_chart(bars.properties(height=height), alt=f"Scores by {tidy(str(field))}")


@st.cache_data(max_entries=4, show_spinner="Reading the leaderboard …")
def _leaderboard_rows(at: str, root: str) -> pd.DataFrame:
    del at
    return pd.DataFrame(Results(Path(root)).leaderboard())


def beside_published(rows: pd.DataFrame, rules: dict[str, str]) -> pd.DataFrame:
    """One row a model, ours and published: its score under one rule for closed and one for open questions.

    Args:
        rows: Leaderboard rows of one benchmark.
        rules: Answer type → rule.
    """
    part = rows[rows["headline"] & (rows["rule"] == rows["answer_type"].map(rules))]
    keys = ["kind", "model", "training", "test_split", "source", "note"]
    wide = part.pivot_table(index=keys, columns="answer_type", values="value", aggfunc="first").reset_index()
    wide = wide.reindex(columns=[*keys, "closed", "open"])
    wide["best"] = wide[["closed", "open"]].max(axis=1)
    return wide.sort_values(["kind", "best"], ascending=[True, False], kind="stable").drop(columns="best")


def _published(benchmark: str) -> None:
    rows = _leaderboard_rows(stamp(), str(results().workspace.root))
    if rows.empty:
        return
    rows = rows[rows["benchmark"] == benchmark]
    theirs = rows[rows["kind"] == "published"]
    if theirs.empty:
        return
    st.subheader("Beside the published numbers", anchor=False)
    chosen: dict[str, str] = {}
    for cell, kind in zip(st.columns(2, gap="large"), ("closed", "open"), strict=True):
        frequent = theirs.loc[theirs["answer_type"] == kind, "rule"].value_counts().index.to_list()
        if frequent:
            chosen[kind] = cell.selectbox(f"Published rule, {kind} questions", frequent, key=f"published-{kind}")
    ours = rows[rows["kind"] == "ours"]
    if not (ours["test_split"] == "official").all():
        st.warning("Ours was scored on another test split than the published one: the numbers do not compare.")
    st.dataframe(
        beside_published(rows, chosen),
        hide_index=True,
        placeholder="",
        column_order=["kind", "model", "training", "closed", "open", "test_split", "note", "source"],
        column_config={
            "kind": st.column_config.TextColumn("", width=80),
            "model": st.column_config.TextColumn("Model"),
            "training": st.column_config.TextColumn("Training", width=90),
            "closed": st.column_config.NumberColumn("Closed", format="%.1f", width=70),
            "open": st.column_config.NumberColumn("Open", format="%.1f", width=70),
            "test_split": st.column_config.TextColumn("Test split", width=130),
            "note": st.column_config.TextColumn("Note"),
            "source": st.column_config.TextColumn("Source"),
        },
    )


@st.cache_data(max_entries=8, show_spinner="Reading the classes …")
def _classifications(at: str, root: str, benchmark: str) -> dict[str, dict[str, Any]]:
    del at
    return Results(Path(root)).classifications(benchmark)


def _classes(benchmark: str) -> None:
    """Of a benchmark that is a classification; nothing on any other's page."""
    found = _classifications(stamp(), str(results().workspace.root), benchmark)
    if found:
        show_classification(found)


@st.cache_data(max_entries=8, show_spinner="Reading the calibration …")
def _calibrations(at: str, root: str, benchmark: str) -> dict[str, dict[str, Any]]:
    del at
    return Results(Path(root)).calibration(benchmark)


def _calibration(benchmark: str) -> None:
    """Confidence against accuracy: on the diagonal a model knows how often it is right."""
    found = _calibrations(stamp(), str(results().workspace.root), benchmark)
    if not found:
        return
    st.subheader("Calibration", anchor=False)
    bins = pd.DataFrame([{"model": model, **one} for model, row in found.items() for one in row["bins"]])
    left, right = st.columns([3, 2], gap="large")
    scale = alt.Scale(domain=[0, 1])
    line = pd.DataFrame({"confidence": [0.0, 1.0], "accuracy": [0.0, 1.0]})
    base = alt.Chart(bins).encode(
        x=alt.X("confidence:Q", scale=scale, axis=alt.Axis(format=".0%")),
        y=alt.Y("accuracy:Q", scale=scale, axis=alt.Axis(format=".0%")),
        color=alt.Color("model:N", title=None, legend=alt.Legend(orient="bottom", labelLimit=300)),
        tooltip=[
            "model:N",
            alt.Tooltip("confidence:Q", format=".1%"),
            alt.Tooltip("accuracy:Q", format=".1%"),
            alt.Tooltip("n:Q", title="questions", format=","),
        ],
    )
    diagonal = alt.Chart(line).mark_line(color=BLIND, strokeDash=[3, 3]).encode(x="confidence:Q", y="accuracy:Q")
    dots = base.mark_circle(opacity=0.85).encode(size=alt.Size("n:Q", legend=None, scale=alt.Scale(range=[40, 400])))
    chart = diagonal + base.mark_line(opacity=0.4) + dots
    left.altair_chart(chart.properties(height=320), alt="Accuracy by confidence, one line a model")
    table = [
        {"Model": model, **{k: row.get(k) for k in ("ece", "confidence", "accuracy", "n")}}
        for model, row in found.items()
    ]
    right.dataframe(
        pd.DataFrame(table),
        hide_index=True,
        placeholder="",
        column_config={
            "ece": st.column_config.NumberColumn("ECE", format="%.1f", help="Mean distance in points; 0 is perfect"),
            "confidence": st.column_config.NumberColumn("Confidence", format="%.1f"),
            "accuracy": st.column_config.NumberColumn("Accuracy", format="%.1f"),
            "n": st.column_config.NumberColumn("Questions", format="localized"),
        },
    )
    right.caption(
        "By the likelihoods of the answers to choose from: above the line a model is better than it believes."
    )


def _wrong_answers(benchmark: str, models: list[str]) -> None:
    st.subheader("Wrong answers", anchor=False)
    left, right = st.columns(2)
    first = left.selectbox("Of the model", models, key="wrong-model")
    others = [model for model in models if model != first]
    second = right.selectbox("Beside", ["none", *others], index=min(1, len(others)), key="wrong-beside")
    root, at, key = str(results().workspace.root), stamp(), f"wrong-{benchmark}-{first}"
    offset = (int(st.session_state.get(key, 1)) - 1) * ANSWERS_A_PAGE
    page = _wrong(at, root, first, benchmark, offset)
    if not page.total:
        st.info("No wrong answers are listed for this model.")
        return
    ids = tuple(str(row["item_id"]) for row in page.rows)
    beside = _answers(at, root, second, benchmark, ids) if second != "none" else {}
    for row in page.rows:
        shown = [("Right answer", str(row["answer"])), (first, str(row["prediction"]))]
        if row.get("blind_prediction") is not None:
            shown.append((f"{first}, blind", str(row["blind_prediction"])))
        if second != "none":
            shown.append((second, beside.get(str(row["item_id"]), "(no answer)")))
        _wrong_answer(row, shown)
    choose_page(page.total, ANSWERS_A_PAGE, key=key)
    reader = results()
    download_csv(
        "Download the wrong answers as CSV",
        lambda: _beside(reader, first, second if second != "none" else "", benchmark),
        f"{benchmark}-{first}-wrong-answers",
    )


def _beside(reader: Results, first: str, second: str, benchmark: str) -> pd.DataFrame:
    """Every wrong answer of one model, with the other's answer in a column of its own."""
    table = reader.wrong_answer_table(first, benchmark)
    if not second:
        return table
    theirs = reader.answers(second, benchmark, [str(item) for item in table["item_id"]])
    return table.assign(**{f"prediction of {second}": table["item_id"].map(theirs)})


def _wrong_answer(row: dict[str, Any], shown: list[tuple[str, str]]) -> None:
    with st.container(border=True):
        image, words = st.columns([1, 4], gap="medium")
        with image:
            picture(bytes(row["image"]["bytes"]), max_px=320, alt=str(row["item_id"]))
        with words.container(gap="small"):
            names = ("item_id", "answer_type", "question_type", "modality", "organ")
            st.caption(escaped(" · ".join(tidy(str(row[name])) for name in names if row.get(name))))
            foreign_text(str(row["question"]))
            for column, (who, text) in zip(st.columns(len(shown)), shown, strict=True):
                with column.container(gap="xxsmall"):
                    st.caption(escaped(who))
                    foreign_text(text or "(nothing)", limit=600)


def body() -> None:
    """Leaderboard of one benchmark, its slices and its wrong answers."""
    scores = _scores(stamp(), str(results().workspace.root))
    if scores.empty:
        empty("No benchmark has been scored yet.")
        return
    names = sorted(scores["benchmark"].unique())
    benchmark = st.segmented_control(
        "Benchmark", names, default=names[0], required=True, key="benchmark", bind="query-params"
    )
    part = scores[scores["benchmark"] == benchmark]
    rules = _rules(part)
    table = score_board(part, rules)
    _leaderboard(table, str(benchmark))
    _classes(str(benchmark))
    _slices(part, rules, table)
    _published(str(benchmark))
    _calibration(str(benchmark))
    _wrong_answers(str(benchmark), list(dict.fromkeys(table["model"])))


show("Benchmarks", "Scores with 95 % intervals beside the same model without the image, and where it goes wrong.", body)
