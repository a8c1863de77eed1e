"""What was fetched, what the contracts say about it, and the pictures themselves."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

from dashboards.contracts import contract_section
from dashboards.frame import (
    choose_page,
    count,
    download_csv,
    empty,
    escaped,
    foreign_text,
    page_of,
    picture,
    profile_of,
    results,
    show,
    stamp,
    tidy,
    turns_of,
    without_mark,
)
from medvlm.results import Page, Profile, Results, Source

PICTURES_A_PAGE = 12
OK, LOST = "#0f766e", "#c2570c"


@st.cache_data(max_entries=8, show_spinner="Reading the fetch outcomes …")
def _outcomes(at: str, root: str) -> pd.DataFrame:
    del at
    return Results(Path(root)).fetch_outcomes()


def _bars(table: pd.DataFrame, value: str, colour: alt.Color | alt.ColorValue, title: str) -> alt.LayerChart:
    base = alt.Chart(table).encode(
        y=alt.Y(f"{value}:N", sort=None, title=None, axis=alt.Axis(labelLimit=240, ticks=False, domain=False)),
        x=alt.X("rows:Q", title=None, axis=None),
        tooltip=[alt.Tooltip(f"{value}:N", title=title), alt.Tooltip("rows:Q", title="rows", format=",")],
    )
    numbers = base.mark_text(align="left", dx=5, fontSize=12).encode(text=alt.Text("rows:Q", format=","))
    return (base.mark_bar(cornerRadiusEnd=3, height={"band": 0.68}).encode(color=colour) + numbers).properties(
        height=max(60, 30 * len(table))
    )


def fetch_section() -> None:
    """One bar for each status, and the rows behind the one that is chosen."""
    reader, root = results(), str(results().workspace.root)
    outcomes = _outcomes(stamp(), root)
    if outcomes.empty:
        empty("Nothing has been fetched yet.")
        return
    rows, kept = int(outcomes["rows"].sum()), int(outcomes.loc[outcomes["status"] == "ok", "rows"].sum())
    report = reader.fetch_report()
    with st.container(horizontal=True):
        st.metric("Rows in the list", count(rows), border=True, height="stretch")
        st.metric(
            "Figures kept",
            count(kept),
            f"{kept / rows:.1%} of the rows",
            "off",
            delta_arrow="off",
            border=True,
            height="stretch",
        )
        st.metric("Lost, with a reason", count(rows - kept), border=True, height="stretch")
        st.metric("Read", count(float(outcomes["bytes"].sum()), "B"), border=True, height="stretch")
        if report:
            st.metric("Duration", f"{report.duration_s:,.1f} s", border=True, height="stretch")
    left, right = st.columns([2, 3], gap="large")
    with left:
        st.subheader("Outcome of each row", anchor=False)
        table = outcomes.assign(what=outcomes["status"].map(tidy))
        colour = alt.condition("datum.status == 'ok'", alt.value(OK), alt.value(LOST))
        st.altair_chart(_bars(table, "what", colour, "outcome"), alt="Rows by fetch outcome")
    with right:
        st.subheader("Rows that were lost", anchor=False)
        lost = [status for status in outcomes["status"] if status != "ok"]
        if not lost:
            st.success("Every row became a figure.")
            return
        status = st.selectbox("Reason", lost, format_func=tidy, key="fetch_status")
        total = int(outcomes.loc[outcomes["status"] == status, "rows"].iloc[0])
        first = choose_page(total, 50, key="fetch_page")
        st.dataframe(
            reader.fetch_rows(status, offset=first),
            hide_index=True,
            column_config={
                "row": st.column_config.NumberColumn("Line", width="small"),
                "pmcid": st.column_config.TextColumn("Article"),
                "detail": st.column_config.TextColumn("Detail"),
                "attempts": st.column_config.NumberColumn("Tries", width="small"),
                "seconds": st.column_config.NumberColumn("Seconds", format="%.2f", width="small"),
                "licence": st.column_config.TextColumn("Licence"),
            },
        )
        download_csv("Download as CSV", lambda: reader.fetch_rows(status, limit=total), f"fetch-{status}")


def picture_section() -> None:
    """The rows of one table as cards, chosen by facet and by words."""
    reader, root, at = results(), str(results().workspace.root), stamp()
    sources = {source.name: source for source in reader.sources()}
    if not sources:
        empty("There are no pictures yet.")
        return
    top = st.columns([2, 3])
    name = top[0].selectbox("Table", list(sources), key="table", bind="query-params")
    search = top[1].text_input(
        "Search in the text", key="search", placeholder="a word of the caption, question or answer"
    )
    source = sources[name]
    st.caption(f"{source.rows:,} rows, {count(source.bytes, 'B')} in {escaped(source.folder.name)}")
    profile = profile_of(at, root, name)
    where: list[tuple[str, tuple[str, ...]]] = []
    with st.container(horizontal=True):
        for column in source.facets:
            values = profile.facets[column]
            if len(values) > 1:
                picked = st.multiselect(tidy(column).capitalize(), list(values["value"]), key=f"{name}-{column}")
                where.append((column, tuple(picked)))
    offset_key = f"page-{name}"
    chosen = st.session_state.get(offset_key, 1)
    page = page_of(at, root, name, tuple(where), search, offset=(chosen - 1) * PICTURES_A_PAGE, limit=PICTURES_A_PAGE)
    if page.total and not page.rows:
        # The filter left fewer pages than the one that was open.
        st.session_state[offset_key] = 1
        page = page_of(at, root, name, tuple(where), search, limit=PICTURES_A_PAGE)
    if not page.rows:
        st.info("No row fits. Take a filter or a word away.")
        return
    for start in range(0, len(page.rows), 4):
        for cell, row in zip(st.columns(4), page.rows[start : start + 4], strict=False):
            with cell.container(border=True, height="stretch"):
                _card(row, source)
    choose_page(page.total, PICTURES_A_PAGE, key=offset_key)
    _distributions(profile)


def _card(row: dict, source: Source) -> None:
    picture(row["image"]["bytes"], alt=str(row[source.key]))
    pairs = turns_of(row, source)
    for speaker, text in pairs[: 1 if source.kind == "figures" else 4]:
        with st.container(gap="xxsmall"):
            if speaker != "caption":
                st.caption(speaker)
            foreign_text(without_mark(text), limit=320)
    if source.kind != "figures" and len(pairs) > 4:
        st.caption(f"and {len(pairs) - 4} more turns")
    facts = [str(row[column]) for column in ("licence", "modality", "split", "answer_type") if row.get(column)]
    st.caption(escaped(" · ".join([str(row[source.key]), *map(tidy, facts)])))


def _distributions(profile: Profile) -> None:
    st.subheader("Distributions", anchor=False)
    lengths = profile.lengths
    # Modality and licence first: what a mix is judged by.
    tables = sorted(profile.facets.items(), key=lambda pair: pair[0] not in ("modality", "licence"))
    shown = [(column, table) for column, table in tables if len(table) > 1][:2]
    for cell, (column, table) in zip(st.columns(3, gap="large"), [*shown, ("length", lengths)], strict=False):
        with cell:
            if column == "length":
                st.markdown("**Text length**, characters")
                bars = alt.Chart(lengths.assign(end=lengths["characters"] + lengths["width"])).mark_bar(color=OK)
                chart = bars.encode(
                    x=alt.X("characters:Q", title=None, bin="binned"),
                    x2="end:Q",
                    y=alt.Y("rows:Q", title=None),
                    tooltip=[alt.Tooltip("characters:Q", title="from"), alt.Tooltip("rows:Q", format=",")],
                )
                st.altair_chart(chart.properties(height=220), alt="Histogram of text lengths")
            else:
                st.markdown(f"**{tidy(column).capitalize()}**, rows")
                chart = _bars(table.head(8), "value", alt.value(OK), tidy(column))
                st.altair_chart(chart, alt=f"Rows by {tidy(column)}")


WAYS = {
    "bytes": "the same image",
    "image_id": "the same image name",
    "phash": "nearly the same image",
    "case_id": "another image of the same case",
    "question": "the same question",
}


def leakage_section() -> None:
    """What training sets share with test items, counted and seen side by side."""
    found = results().leakage()
    if not found:
        empty("Nobody has looked for leakage yet.", "medvlm leakage")
        return
    table = pd.DataFrame(found)
    shown = table[["train", "test", "test_items", "leaked_items", "clean_items", "near_images"]]
    st.dataframe(
        shown.sort_values("leaked_items", ascending=False, kind="stable"),
        hide_index=True,
        column_config={
            "train": "Training set",
            "test": "Test items of",
            "test_items": st.column_config.NumberColumn("Test items", format="localized"),
            "leaked_items": st.column_config.NumberColumn(
                "Leaked", format="localized", help="Their image is trained on"
            ),
            "clean_items": st.column_config.NumberColumn("Clean", format="localized"),
            "near_images": st.column_config.NumberColumn("Near images", format="localized", help="Perhaps the same"),
        },
    )
    download_csv("Download as CSV", lambda: shown, "leakage")
    items = {way: sum(one.get("ways", {}).get(way, {}).get("items", 0) for one in found) for way in WAYS}
    # What is there to be looked at comes first.
    way = st.segmented_control(
        "Shared",
        list(WAYS),
        default=next((way for way in WAYS if items[way]), "bytes"),
        required=True,
        format_func=lambda way: f"{WAYS[way]} ({items[way]:,})",
        key="way",
    )
    key = f"leak-{way}"
    size = 4
    page = _pairs(stamp(), str(results().workspace.root), str(way), (st.session_state.get(key, 1) - 1) * size, size)
    if not page.rows:
        st.info("No test item is touched in this way.")
        return
    for start in range(0, len(page.rows), 2):
        for cell, row in zip(st.columns(2), page.rows[start : start + 2], strict=False):
            with cell.container(border=True, height="stretch"):
                _pair(row)
    choose_page(page.total, size, key=key)


@st.cache_data(max_entries=16, show_spinner="Finding the pairs …")
def _pairs(at: str, root: str, way: str, offset: int, limit: int) -> Page:
    del at
    return Results(Path(root)).leaked_pairs(way=way, offset=offset, limit=limit)


def _pair(row: dict) -> None:
    distance = "" if pd.isna(row["distance"]) else f" · {int(row['distance'])} bits apart"
    sides = (
        (f"test: {row['benchmark']} {row['item_id']}", "test"),
        (f"{row['training_set']}: {row['example']}", "train"),
    )
    for column, (label, side) in zip(st.columns(2), sides, strict=True):
        with column:
            st.caption(escaped(label) + (distance if side == "train" else ""))
            if row[side] is None:
                st.text("(no longer there)")
            else:
                picture(row[side]["image"]["bytes"], alt=label)
                if row[side].get("question"):
                    foreign_text(str(row[side]["question"]), limit=200)


SECTIONS = {
    "Fetch": fetch_section,
    "Contracts": contract_section,
    "Pictures": picture_section,
    "Leakage": leakage_section,
}


def body() -> None:
    """The chosen section; only that one is read."""
    section = st.segmented_control(
        "Section",
        list(SECTIONS),
        default="Fetch",
        required=True,
        key="section",
        label_visibility="collapsed",
        bind="query-params",
    )
    SECTIONS[section]()


show("Data", "What was fetched, what the contracts say about it, and the pictures with their words.", body)
