"""What every page shares: heading, notice, empty state, readable errors, and foreign text shown as text.

Captions, questions and answers come from strangers. They reach a page through ``foreign_text`` or a
table's cells, never through Markdown or HTML.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import streamlit as st

from dashboards.access import require_log_in
from medvlm import RESEARCH_USE_ONLY
from medvlm.errors import InputError, MedVLMError
from medvlm.results import Page, Profile, Results, Source, thumbnail

__all__ = [
    "choose_page",
    "count",
    "download_csv",
    "empty",
    "escaped",
    "foreign_text",
    "page_of",
    "picture",
    "profile_of",
    "results",
    "show",
    "stamp",
    "tidy",
    "turns_of",
    "web_link",
    "without_mark",
    "zoomable",
]

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~:$&])")


def results() -> Results:
    """The workspace named by MEDVLM_WORKSPACE."""
    return Results(Path(os.environ.get("MEDVLM_WORKSPACE", "workspace")))


def stamp() -> str:
    """Changes when a step replaced its output: the key of everything that pages cache."""
    return results().stamp()


def show(title: str, about: str, body: Callable[[], None]) -> None:
    """Draw a page: heading, notice, then ``body``; a deliberate error becomes a readable message."""
    require_log_in()
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.title(title, anchor=False, width="content")
        st.badge(RESEARCH_USE_ONLY, color="orange")
    st.caption(about)
    try:
        body()
    except MedVLMError as error:
        st.error(f"**{escaped(error.what)}**")
        st.text(f"Where: {error.where}\nNext:  {error.hint}")


def empty(what: str, command: str = "make demo") -> None:
    """Say that there is nothing yet, and which command makes it."""
    with st.container(border=True, horizontal_alignment="center", gap="small"):
        st.space("small")
        st.markdown(f"#### {what}", width="content")
        st.markdown("Run this in the project's folder, then reload the page:", width="content")
        st.code(command, language="bash", width=360)
        st.space("small")


def escaped(text: str) -> str:
    """Foreign text for a place that renders Markdown, such as a label: every mark is made literal."""
    # Bare addresses become links even where every mark is escaped: a zero-width space keeps them text.
    broken = re.sub(r"(?i)(?<=:)(?=//)|(?<=www)(?=\.)|(?<=@)", "\u200b", " ".join(text.split()))
    return _MARKDOWN.sub(r"\\\1", broken)


def foreign_text(text: str, *, limit: int = 4000) -> None:
    """Show text that came from data, exactly as it is."""
    st.text(text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)")


def without_mark(text: str) -> str:
    """A turn's text without the mark that says where the image goes; the image is shown beside it."""
    return text.replace("<image>", "").strip()


def web_link(label: str, url: str) -> None:
    """A link to a foreign address, if it is one of the web; anything else is shown as text."""
    if re.fullmatch(r"https?://[\w.\-]+(:\d+)?(/[\w.\-~/%?=&+]*)?", url):
        st.link_button(label, url)
    elif url:
        st.text(url)


def picture(data: bytes, *, max_px: int = 448, alt: str = "", width: int | Literal["stretch"] = "stretch") -> None:
    """Show foreign image bytes, decoded behind the same guard as figures; say so if they do not decode."""
    try:
        st.image(_thumbnail(data, max_px), width=width, alt=alt or None)
    except InputError as error:
        st.warning(escaped(error.what))


@st.cache_data(max_entries=512, show_spinner=False)
def _thumbnail(data: bytes, max_px: int, zoom: float = 1.0, centre: tuple[float, float] = (0.5, 0.5)) -> bytes:
    return thumbnail(data, max_px=max_px, zoom=zoom, centre=centre)


def zoomable(data: bytes, *, key: str, max_px: int = 1024, alt: str = "") -> None:
    """Foreign image bytes with a zoom: the part that is shown is cut out of the picture at its full size."""
    place = st.container()
    zoom = st.select_slider("Zoom", (1, 2, 3, 4, 6, 8), key=f"zoom-{key}", format_func=lambda x: f"{x} x")
    centre = (0.5, 0.5)
    if zoom > 1:
        left, right = st.columns(2)
        across = left.slider("Left to right", 0, 100, 50, 5, key=f"across-{key}", format="%d %%")
        down = right.slider("Top to bottom", 0, 100, 50, 5, key=f"down-{key}", format="%d %%")
        centre = (across / 100, down / 100)
    with place:
        try:
            st.image(_thumbnail(data, max_px, float(zoom), centre), width="stretch", alt=alt or None)
        except InputError as error:
            st.warning(escaped(error.what))


@st.cache_data(max_entries=64, show_spinner="Reading rows …")
def page_of(
    at: str,
    root: str,
    source: str,
    where: tuple[tuple[str, tuple[str, ...]], ...] = (),
    search: str = "",
    offset: int = 0,
    limit: int = 24,
) -> Page:
    """Rows of a source, cached for as long as the workspace stays at stamp ``at``."""
    del at
    table = Results(Path(root)).source(source)
    if table is None:
        return Page(0, [])
    return table.page(where=dict(where), search=search, offset=offset, limit=limit)


@st.cache_data(max_entries=16, show_spinner="Counting …")
def profile_of(at: str, root: str, source: str) -> Profile:
    """What the rows of a source are like, cached for as long as the workspace stays at stamp ``at``."""
    del at
    table = Results(Path(root)).source(source)
    return table.profile() if table else Profile({}, pd.DataFrame(columns=["characters", "width", "rows"]))


def choose_page(total: int, size: int, *, key: str) -> int:
    """A pager below a table; returns the offset of the first row to show."""
    pages = max(1, -(-total // size))
    # A filter that leaves fewer pages than the chosen one would be refused by the widget.
    if st.session_state.get(key, 1) > pages:
        st.session_state[key] = 1
    if pages == 1:
        return 0
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        number = st.pagination(pages, key=key, width=360)
        first = (number - 1) * size
        st.caption(f"{first + 1:,} to {min(total, first + size):,} of {total:,}", width="content")
    return first


def download_csv(label: str, table: Callable[[], pd.DataFrame], name: str, *, help: str = "") -> None:
    """A button that brings a whole table, not its page alone; the table is made when somebody asks for it."""
    st.download_button(
        label,
        lambda: table().to_csv(index=False).encode(),
        file_name=f"{name.replace('/', '-')}.csv",
        mime="text/csv",
        on_click="ignore",
        key=f"csv-{name}",
        help=help or None,
    )


def count(number: float, unit: str = "") -> str:
    """A number for people: thousands separated, bytes in their largest unit."""
    if unit != "B":
        return f"{number:,.0f}"
    for name in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {name}" if name == "B" else f"{number:,.1f} {name}"
        number /= 1000
    return f"{number:,.1f} TB"


def tidy(name: str) -> str:
    """A field's or rule's name as words: ``md5_mismatch`` → ``md5 mismatch``."""
    return name.replace("_", " ")


def turns_of(row: dict[str, Any], source: Source) -> Sequence[tuple[str, str]]:
    """The text of a row as (speaker, text) pairs, whatever kind of table it is from."""
    if source.kind == "samples":
        return [(turn["role"], turn["text"]) for turn in row["turns"]]
    if source.kind == "items":
        return [("question", row["question"]), ("answer", row["answer"])]
    if source.kind == "pairs":
        return [("question", row["question"]), ("chosen", row["chosen"]), ("rejected", row["rejected"])]
    return [("caption", row["caption"]), *(("mention", mention) for mention in row["mentions"])]
