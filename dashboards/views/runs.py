"""Loss and learning rate of training runs, laid over each other."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

from dashboards.frame import count, empty, results, show, stamp
from medvlm.results import Curve, Report, Results

# Steps drawn for one run; longer runs are thinned, for the chart only.
POINTS = 600


@st.cache_data(max_entries=4, show_spinner="Reading the training reports …")
def _curves(at: str, root: str) -> list[Curve]:
    del at
    return Results(Path(root)).curves()


def smoothed(points: pd.DataFrame, column: str, weight: float) -> pd.Series:
    """Exponential moving average, corrected for its start, as TensorBoard draws it.

    Args:
        points: One run.
        column: What to smooth.
        weight: 0 leaves it as it is; near 1 smooths strongly.
    """
    if weight <= 0:
        return points[column].astype(float)
    # adjust=True divides by the sum of the weights: the first value is not favoured.
    return points[column].astype(float).ewm(alpha=1 - weight, adjust=True).mean()


def _long(curves: list[Curve], column: str, weight: float) -> pd.DataFrame:
    parts: list[pd.DataFrame] = []
    for curve in curves:
        if column not in curve.points:
            continue
        part = pd.DataFrame(
            {
                "step": curve.points["step"],
                "value": smoothed(curve.points, column, weight),
                "raw": curve.points[column].astype(float),
                "run": curve.name,
            }
        )
        parts.append(part.iloc[:: max(1, len(part) // POINTS)])
    return pd.concat(parts) if parts else pd.DataFrame(columns=["step", "value", "raw", "run"])


def _lines(
    table: pd.DataFrame,
    title: str,
    names: list[str],
    *,
    height: int,
    log: bool = False,
    raw: bool = False,
    legend: bool = True,
) -> alt.LayerChart:
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    pick = alt.selection_point(fields=["run"], bind="legend")
    hover = alt.selection_point(fields=["step", "run"], nearest=True, on="pointerover", empty=False)
    base = alt.Chart(table).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(grid=False, format=",d")),
        color=alt.Color(
            "run:N",
            title=None,
            sort=names,
            scale=alt.Scale(domain=names),
            legend=alt.Legend(
                orient="bottom", columns=3, labelLimit=360, symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1
            )
            if legend
            else None,
        ),
        opacity=alt.condition(pick, alt.value(1.0), alt.value(0.12)),
    )
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("value:Q", title=title, scale=scale)).add_params(pick)
    points = base.mark_point(size=60, filled=True).encode(
        y="value:Q",
        opacity=alt.condition(hover, alt.value(1.0), alt.value(0.0)),
        tooltip=[
            alt.Tooltip("run:N", title="run"),
            alt.Tooltip("step:Q", format=",d"),
            alt.Tooltip("raw:Q", title=title, format=".4g"),
        ],
    )
    layers = [line, points.add_params(hover)]
    if raw:
        layers.insert(0, base.mark_line(strokeWidth=1).encode(y="raw:Q", opacity=alt.value(0.3)))
    return alt.layer(*layers).properties(height=height)


def _table(curves: list[Curve]) -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    for curve in curves:
        loss, metrics = curve.points["loss"].astype(float), curve.report.metrics
        tail = loss.tail(max(1, len(loss) // 20))
        rows.append(
            {
                "Recipe": curve.recipe,
                "Stage": curve.stage,
                "For": curve.target or "all",
                "State": "✓ finished" if curve.finished else "unfinished",
                "Loss": list(loss.iloc[:: max(1, len(loss) // 60)]),
                "First": float(loss.iloc[0]),
                "Last": float(tail.mean()),
                "Steps": int(curve.points["step"].iloc[-1]),
                "Samples/s": metrics.get("samples_per_second"),
                "Peak memory, MB": metrics.get("peak_memory_mb"),
                "Stage, s": curve.report.duration_s or None,
                "Finished": pd.to_datetime(curve.report.created_at, errors="coerce"),
            }
        )
    return pd.DataFrame(rows).dropna(axis="columns", how="all")


def _choose(curves: list[Curve]) -> list[Curve]:
    recipes = list(dict.fromkeys(curve.recipe for curve in curves))
    # A run without a finish is the one that somebody is waiting for.
    newest = max(curves, key=lambda curve: (not curve.finished, curve.report.created_at)).recipe
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    picked = left.multiselect("Recipes", recipes, default=[newest], key="recipes", bind="query-params")
    stages = sorted({curve.stage for curve in curves})
    stage = right.segmented_control(
        "Stage",
        ["every", *map(str, stages)],
        default="every",
        required=True,
        format_func=lambda s: "Every stage" if s == "every" else f"Stage {s}",
        key="stage",
        bind="query-params",
    )
    return [c for c in curves if c.recipe in picked and stage in ("every", str(c.stage))]


def body() -> None:
    """Choice of runs, their curves, and a table of what each came to."""
    curves = _curves(stamp(), str(results().workspace.root))
    if not curves:
        empty("No training run has reached a checkpoint yet.")
        return
    chosen = _choose(curves)
    if not chosen:
        st.info("Choose at least one recipe.")
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="large"):
        weight = st.slider("Smoothing", 0.0, 0.98, 0.6, 0.02, key="smoothing", width=260)
        log = st.toggle("Logarithmic", value=False, key="log")
    names = [curve.name for curve in chosen]
    loss = _long(chosen, "loss", weight)
    st.subheader("Loss", anchor=False)
    st.altair_chart(
        _lines(loss, "loss", names, height=440, log=log, raw=weight > 0),
        alt="Training loss by step, one line a run",
    )
    st.caption("Click a run in the legend to see it alone. Loss values of different stages are not comparable.")
    st.subheader("What each run came to", anchor=False)
    st.dataframe(
        _table(chosen),
        hide_index=True,
        placeholder="",
        column_config={
            "Loss": st.column_config.LineChartColumn(width=110),
            "Stage": st.column_config.NumberColumn(width="small"),
            "First": st.column_config.NumberColumn("First loss", format="%.3f", width="small"),
            "Last": st.column_config.NumberColumn(
                "Last loss", format="%.3f", width="small", help="Mean of the last twentieth of the steps"
            ),
            "Steps": st.column_config.NumberColumn(format="localized", width="small"),
            "Samples/s": st.column_config.NumberColumn(format="%.1f", width="small"),
            "Peak memory, MB": st.column_config.NumberColumn(format="localized", width="small"),
            "Stage, s": st.column_config.NumberColumn(
                format="%.1f", width="small", help="Of the whole stage, every target and the start included"
            ),
            "Finished": st.column_config.DatetimeColumn(format="D MMM, HH:mm", width="small"),
        },
    )
    _further(chosen, names)
    _experts(chosen)
    if any(not curve.finished for curve in chosen):
        _look_again()


@st.fragment(run_every=5)
def _look_again() -> None:
    """While a run is unfinished, look for its next checkpoint every five seconds."""
    now = stamp()
    if st.session_state.setdefault("runs-stamp", now) != now:
        st.session_state["runs-stamp"] = now
        st.rerun()


def _further(chosen: list[Curve], names: list[str]) -> None:
    known = {
        "lr": "Learning rate",
        "samples_per_second": "Samples a second",
        "tokens_per_second": "Tokens a second",
        "grad_norm": "Gradient norm",
        "memory_mb": "Memory, MB",
        "expert_balance": "Balance of the experts",
        "preference_accuracy": "Preference accuracy",
        "reward_margin": "Reward margin",
    }
    shown = [(column, title) for column, title in known.items() if any(column in c.points for c in chosen)]
    for start in range(0, len(shown), 2):
        for cell, (column, title) in zip(st.columns(2, gap="large"), shown[start : start + 2], strict=False):
            with cell:
                st.subheader(title, anchor=False)
                # A clock is noisy; a rate is drawn as it is, on a scale that shows the small ones too.
                table = _long(chosen, column, 0.9 if column.endswith("per_second") else 0)
                if column == "lr":
                    table = table[table["value"] > 0]
                chart = _lines(table, title.lower(), names, height=240, legend=False, log=column == "lr")
                st.altair_chart(chart, alt=f"{title} by step")


def expert_table(report: Report) -> pd.DataFrame:
    """Share of the tokens that each expert of each layer got: ``modality``, ``layer``, ``expert``, ``share``.

    Empty for models without experts. ``all`` is every modality together.
    """
    loads = {"all": report.details.get("expert_load") or {}, **(report.details.get("expert_load_by_modality") or {})}
    rows = [
        {"modality": modality, "layer": int(layer), "expert": int(expert), "share": float(share)}
        for modality, layers in loads.items()
        for layer, experts in layers.items()
        for expert, share in experts.items()
    ]
    return pd.DataFrame(rows, columns=["modality", "layer", "expert", "share"])


def _experts(chosen: list[Curve]) -> None:
    """Where tokens go in a mixture of experts, by layer and modality."""
    routed = {f"{c.recipe} · stage {c.stage}": c.report for c in chosen if c.report.details.get("expert_load")}
    if not routed:
        return
    st.subheader("Expert load", anchor=False)
    name = st.segmented_control("Run", list(routed), default=next(iter(routed)), required=True, key="expert-run")
    report, table = routed[str(name)], expert_table(routed[str(name)])
    with st.container(horizontal=True):
        st.metric("Tokens routed", count(report.details.get("tokens_routed", 0)), border=True)
        st.metric("Tokens dropped", count(report.details.get("tokens_dropped", 0)), border=True)
        balance = report.details.get("expert_balance")
        if balance is not None:
            st.metric("Balance", f"{balance:.2f}", border=True, help="1: every expert gets the same; 0: one gets all")
    modalities = list(dict.fromkeys(table["modality"]))
    base = alt.Chart(table).encode(
        x=alt.X("expert:O", title="expert", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("layer:O", title="layer"),
        tooltip=["modality:N", "layer:O", "expert:O", alt.Tooltip("share:Q", format=".1%")],
    )
    cells = base.mark_rect(stroke="white").encode(
        color=alt.Color(
            "share:Q",
            title="share of the tokens",
            scale=alt.Scale(domain=[0, 1], scheme="teals"),
            legend=alt.Legend(orient="bottom", format=".0%", gradientLength=240),
        )
    )
    words = base.mark_text(fontSize=11).encode(
        text=alt.Text("share:Q", format=".0%"),
        color=alt.condition("datum.share > 0.55", alt.value("white"), alt.value("#1f2937")),
    )
    layers = table["layer"].nunique()
    grid = (cells + words).properties(width=200, height=max(48, 30 * layers))
    st.altair_chart(
        grid.facet(facet=alt.Facet("modality:N", title=None, sort=modalities), columns=4),
        width="content",
        alt="Share of tokens by expert, layer and modality",
    )


show("Runs", "Training runs over each other: loss, learning rate and what each run came to.", body)
