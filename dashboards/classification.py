"""Confusion matrices: which classes a model takes for which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

NO_CLASS = "no class"
"""An answer that names none of the classes, or several."""


def confusion_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """One row for each pair of a true class and an answered one, with their ``count`` and its ``share`` of the class.

    Args:
        values: As ``Results.classifications`` gives them.
    """
    labels = list(values["labels"])
    rows = [
        {"true": true, "answered": answered, "count": count, "share": count / max(1, sum(counts))}
        for true, counts in zip(labels, values["confusion"], strict=True)
        for answered, count in zip([*labels, NO_CLASS], counts, strict=True)
    ]
    return pd.DataFrame(rows, columns=["true", "answered", "count", "share"])


def show_classification(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracy, macro-F1 and the confusion matrix of a recipe, and how well it tells each class.

    Args:
        found: Recipe → its last stage's classification.
    """
    st.subheader("Classes", anchor=False)
    recipe = str(st.selectbox("Model", list(found), key="classes")) if len(found) > 1 else next(iter(found))
    values = found[recipe]
    for place, (name, text) in zip(
        st.columns(4),
        {
            "Accuracy": f"{values['accuracy']:.1f}",
            "Macro-F1": f"{values['macro_f1']:.1f}",
            "Images": f"{values['n']:,}",
            "Answers without a class": f"{values['unanswered']:,}",
        }.items(),
        strict=True,
    ):
        place.metric(name, text)
    left, right = st.columns([3, 2], gap="large")
    labels = list(values["labels"])
    base = alt.Chart(confusion_table(values)).encode(
        x=alt.X("answered:N", sort=[*labels, NO_CLASS], title="answered"),
        y=alt.Y("true:N", sort=labels, title="true"),
        tooltip=["true:N", "answered:N", alt.Tooltip("count:Q", format=","), alt.Tooltip("share:Q", format=".1%")],
    )
    # Between white and green; the default way from one to the other leads over cyan.
    shades = alt.Scale(domain=[0, 1], range=["#ffffff", "#0f766e"], interpolate="rgb")
    colour = alt.Color("share:Q", scale=shades, legend=None)
    dark = alt.when(alt.datum.share > 0.5).then(alt.value("white")).otherwise(alt.value("#1f2937"))
    numbers = base.transform_filter("datum.count > 0").mark_text().encode(text="count:Q", color=dark)
    chart = base.mark_rect().encode(color=colour) + numbers
    left.altair_chart(chart.properties(height=80 + 28 * len(labels)), alt=f"Confusion matrix of {recipe}")
    table = [{"Class": label, **values["by_label"][label]} for label in labels]
    shares = {name: st.column_config.NumberColumn(name, format="%.1f") for name in ("precision", "recall", "f1")}
    right.dataframe(
        pd.DataFrame(table),
        hide_index=True,
        height="content",
        column_order=["Class", *shares, "support"],
        column_config=shares | {"support": st.column_config.NumberColumn("images")},
    )
