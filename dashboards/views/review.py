"""One record at a time: accept, reject with a reason, edit, flag; every key press is a saved decision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards.access import allowed_to_write, person
from dashboards.frame import (
    empty,
    escaped,
    foreign_text,
    profile_of,
    results,
    show,
    stamp,
    tidy,
    turns_of,
    web_link,
    without_mark,
    zoomable,
)
from dashboards.reviewers import reviewers_section
from medvlm.errors import InputError, MedVLMError
from medvlm.results import Results, Source
from medvlm.review import Action, Decision, standing

# Key → label and why a record is rejected. One key press is one decision.
REASONS = {
    "1": ("text", "the text does not fit the image"),
    "2": ("not medical", "not a medical image"),
    "3": ("panels", "several panels in one image"),
    "4": ("cut off", "unreadable or cut off"),
    "5": ("wrong", "a wrong or unsafe statement"),
}
QUEUES = {
    "random": "Random order",
    "flagged": "Flagged by the contract",
    "privacy": "Perhaps print in the picture",
    "opinion": "Second opinion: judged by others",
    "disagree": "Two models disagree",
}


@st.cache_data(max_entries=16, show_spinner="Drawing the queue …")
def _ids(at: str, root: str, source: str, where: tuple[tuple[str, tuple[str, ...]], ...]) -> list[str]:
    del at
    table = Results(Path(root)).source(source)
    return table.ids(where=dict(where)) if table else []


@st.cache_data(max_entries=2, show_spinner="Reading the decisions …")
def _decisions(at: tuple[int, int], root: str) -> list[Decision]:
    del at
    return Results(Path(root)).journal.read()


@st.cache_data(max_entries=8, show_spinner="Comparing the answers …")
def _disagreements(at: str, root: str, source: str, first: str, second: str) -> list[str]:
    del at
    reader = Results(Path(root))
    table = reader.source(source)
    return reader.disagreements(table, first, second) if table else []


@st.cache_data(max_entries=64, show_spinner="Opening the record …")
def _record(at: str, root: str, source: str, record_id: str) -> dict[str, Any] | None:
    del at
    table = Results(Path(root)).source(source)
    return table.by_id([record_id]).get(record_id) if table else None


@st.cache_data(max_entries=8, show_spinner="Finding the flagged pictures …")
def _printed(at: str, root: str, source: str) -> list[str]:
    del at
    reader = Results(Path(root))
    table = reader.source(source)
    return reader.privacy_flagged(table) if table else []


@st.cache_data(max_entries=64, show_spinner="Opening the article's figure …")
def _around(at: str, root: str, source: str, record_id: str) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The figure that a record was written about, and where its picture looks as if it held print."""
    row, reader = _record(at, root, source, record_id), Results(Path(root))
    table = reader.source(source)
    if row is None or table is None:
        return None, []
    return reader.figure_behind(row, table), reader.privacy_flags(str(row.get("image_sha256") or row.get("sha256")))


def reviewer() -> str:
    """Who decides: whoever is logged in, else the name that was typed in, kept for the session."""
    who = person()
    if who.logged_in:
        st.text_input("Your name", who.name, disabled=True, key="reviewer-logged-in")
        return who.name if who.may_write else ""
    return st.text_input(
        "Your name", key="reviewer", placeholder="signs every decision", persist_state="session"
    ).strip()


def texts_shown(row: dict[str, Any], source: Source) -> tuple[str, ...]:
    """The texts a decision is about: a caption, or each turn. Mentions are context, not judged."""
    return tuple(text for speaker, text in turns_of(row, source) if speaker != "mention")


def decide(who: str, source: str, record_id: str, action: Action, before: Sequence[str], reason: str = "") -> None:
    """Save one decision; what goes wrong is shown on the page, and the record stays where it is."""
    reader = results()
    heard = standing(_decisions(reader.journal.stamp(), str(reader.workspace.root)))
    if any((d.who, d.source, d.record_id) == (who, source, record_id) for d in heard):
        # A second key, pressed before the next record was on the screen, is not a word on this one.
        st.toast(f"{escaped(record_id)} was judged already; that key was not counted.")
        return
    note = str(st.session_state.get("note", "")).strip()
    words = ": ".join(part for part in (reason, note) if part)
    after: tuple[str, ...] = ()
    try:
        allowed_to_write()
        if action == "edit":
            after = tuple(str(st.session_state[f"edit-{record_id}-{n}"]) for n in range(len(before)))
            _check_marks(before, after)
            if source.startswith("preference/") and after[1].strip().lower() == after[2].strip().lower():
                same = "both answers of the pair would be the same"
                raise InputError(same, where="the text above", hint="reject the pair instead")
        results().journal.decide(who, source, record_id, action, reason=words, before=before, after=after)
    except MedVLMError as error:
        st.session_state["refused"] = error
        return
    st.session_state["note"] = ""
    st.session_state["editing"] = st.session_state["focus"] = None
    st.toast(f"Saved: {tidy(action)} {escaped(record_id)}")


def _check_marks(before: Sequence[str], after: Sequence[str]) -> None:
    for old, new in zip(before, after, strict=True):
        if old.count("<image>") != new.count("<image>"):
            raise InputError(
                "the edit adds or removes an <image> mark", where="the text above", hint="leave <image> where it was"
            )
        if old.strip() and not new.strip():
            raise InputError("the edit leaves an empty text", where="the text above", hint="reject the record instead")


def undo(who: str) -> None:
    """Take the reviewer's last decision back and show its record again."""
    try:
        allowed_to_write()
        last = results().journal.undo(who)
    except MedVLMError as error:
        st.session_state["refused"] = error
        return
    if last:
        st.session_state["focus"] = last.record_id
        st.session_state.setdefault("skipped", set()).discard((last.source, last.record_id))
        st.toast(f"Taken back: {tidy(last.action)} {escaped(last.record_id)}")
    else:
        st.toast("There is nothing to take back.")


def skip(source: str, record_id: str) -> None:
    """Leave a record for later in this session."""
    st.session_state.setdefault("skipped", set()).add((source, record_id))
    st.session_state["editing"] = st.session_state["focus"] = None


def edit(record_id: str | None) -> None:
    """Open the text of a record for editing, or close it."""
    st.session_state["editing"] = record_id


def _choose(sources: dict[str, Source]) -> tuple[str, Source, list[str]]:
    """Reviewer, table and queue."""
    reader, root, at = results(), str(results().workspace.root), stamp()
    left, middle, right = st.columns([2, 3, 3], vertical_alignment="bottom")
    with left:
        who = reviewer()
    preferred = next((i for i, name in enumerate(sources) if name == "instruct"), 0)
    name = middle.selectbox(
        "Table",
        list(sources),
        index=preferred,
        key="review-table",
        bind="query-params",
    )
    source = sources[name]
    models = reader.models(name.removeprefix("benchmark/")) if source.kind == "items" else []
    kinds = [kind for kind in QUEUES if kind != "disagree" or len(models) > 1]
    kind = right.selectbox("Queue", kinds, format_func=QUEUES.__getitem__, key="queue")
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()
    if kind == "flagged":
        return who, source, reader.flagged(source)
    if kind == "privacy":
        if not reader.workspace.privacy_flags.is_dir():
            empty("Nobody has looked for print in the pictures yet.", "medvlm privacy flag")
        return who, source, _printed(at, root, name)
    if kind == "opinion":
        heard = standing(_decisions(reader.journal.stamp(), root))
        return who, source, list(dict.fromkeys(d.record_id for d in heard if d.source == name and d.who != who))
    if kind == "disagree":
        pair = st.multiselect("Models", models, default=models[:2], max_selections=2, key="pair")
        return who, source, _disagreements(at, root, name, *pair) if len(pair) == 2 else []
    with st.expander("Only a slice"), st.container(horizontal=True):
        for column, table in profile_of(at, root, name).facets.items():
            values = [str(value) for value in table["value"]]
            if len(values) > 1:
                picked = st.multiselect(tidy(column).capitalize(), values, key=f"slice-{name}-{column}")
                where += ((column, tuple(picked)),)
    return who, source, _ids(at, root, name, where)


def body() -> None:
    """The chosen queue's next record."""
    sources = {source.name: source for source in results().sources()}
    if not sources:
        empty("There is nothing to review yet.")
        return
    who, source, queue = _choose(sources)
    root = str(results().workspace.root)
    heard = _decisions(results().journal.stamp(), root)
    mine = {d.record_id for d in standing(heard) if d.who == who and d.source == source.name}
    skipped = {record for table, record in st.session_state.get("skipped", set()) if table == source.name}
    done = sum(record in mine for record in queue)
    if source.kind == "items":
        st.caption("A benchmark stays as it was published: what is said about its questions is kept, and changes none.")
    if queue:
        st.progress(done / len(queue), f"{done:,} of {len(queue):,} judged by you")
    # One place for messages, so that what stands below keeps its place whether there is one or not.
    with st.container():
        refused = st.session_state.pop("refused", None)
        if refused:
            st.error(f"**{escaped(refused.what)}** Next: {escaped(refused.hint)}.")
        if not who:
            looks = person().logged_in
            st.info("You may look, not decide." if looks else "Enter your name to begin: it signs every decision.")
    focus = st.session_state.get("focus")
    waiting = (record for record in queue if record not in mine and record not in skipped)
    record_id = focus if focus in queue and focus not in mine else next(waiting, None)
    row = _record(stamp(), root, source.name, record_id) if record_id else None
    if record_id is None:
        st.success("This queue is done." if queue else "This queue is empty.")
        if skipped and st.button(f"Go through the {len(skipped):,} skipped ones"):
            st.session_state["skipped"] = set()
            st.rerun()
    elif row is None:
        st.warning(f"The record {escaped(record_id)} is no longer in this table.")
        st.button("Skip", on_click=skip, args=(source.name, record_id), shortcut="s")
    else:
        _show_record(who, source, record_id, row)
    if row is None:
        st.button("Undo", shortcut="u", on_click=undo, args=(who,), disabled=not who, key="undo-alone")
    reviewers_section(heard, source)


def _show_record(who: str, source: Source, record_id: str, row: dict[str, Any]) -> None:
    before = texts_shown(row, source)
    editing = st.session_state.get("editing") == record_id
    # The buttons come first and keep their place, however long the text of a record is.
    with st.container():
        if not editing:
            _buttons(who, source, record_id, before)
    image, words = st.columns([5, 6], gap="large")
    with image:
        zoomable(row["image"]["bytes"], key=record_id, alt=record_id)
    figure, flags = _around(stamp(), str(results().workspace.root), source.name, record_id)
    with words:
        _facts({**row, **{name: (figure or row).get(name) for name in ("source_url", "retracted")}}, record_id)
        if flags:
            places = dict.fromkeys(tidy(flag["corner"] or flag["reason"]) for flag in flags)
            st.warning(f"Perhaps print: {', '.join(places)}. Zoom in; flag privacy if it names somebody.")
        if editing:
            _editor(who, source, record_id, row, before)
        else:
            _words(row, source)
        if figure:
            _figure(figure)


def _facts(row: dict[str, Any], record_id: str) -> None:
    names = ("modality", "licence", "language", "source", "dataset", "pmcid", "label", "split", "answer_type")
    facts = [record_id, *(tidy(str(row[name])) for name in names if row.get(name))]
    st.caption(escaped(" · ".join(facts)))
    if row.get("retracted"):
        st.error("This article was retracted.")
    if row.get("source_url"):
        web_link("Open the article", str(row["source_url"]))


def _words(row: dict[str, Any], source: Source) -> None:
    pairs = turns_of(row, source)
    with st.container(border=True, gap="small"):
        for speaker, text in pairs:
            if speaker != "mention":
                who, said = st.columns([1, 6], gap="small")
                who.caption(speaker)
                with said:
                    foreign_text(without_mark(text))
    mentions = [text for speaker, text in pairs if speaker == "mention"]
    if mentions:
        with st.expander(f"Mentions in the article ({len(mentions)})", expanded=True):
            for text in mentions:
                foreign_text(text)


def _figure(figure: dict[str, Any]) -> None:
    """What the article says about the picture of a conversation: context, not judged."""
    with st.expander("The figure in its article", expanded=True):
        st.caption(escaped(" · ".join(str(figure[name]) for name in ("label", "article_title") if figure[name])))
        foreign_text(str(figure["caption"]) or "(no caption)")
        for mention in figure["mentions"]:
            st.caption("mention")
            foreign_text(mention)


def _buttons(who: str, source: Source, record_id: str, before: tuple[str, ...]) -> None:
    off = not who
    common = {"on_click": decide, "disabled": off, "width": "stretch"}
    first = st.columns(5)
    args = (who, source.name, record_id)
    first[0].button("Accept", shortcut="a", type="primary", args=(*args, "accept", before), **common)
    first[1].button("Edit", shortcut="e", on_click=edit, args=(record_id,), disabled=off, width="stretch")
    first[2].button(
        "Flag privacy",
        shortcut="p",
        args=(*args, "flag_privacy", before),
        help="The picture may name somebody: it stays out of every dataset until this is taken back",
        **common,
    )
    first[3].button("Skip", shortcut="s", on_click=skip, args=(source.name, record_id), width="stretch")
    first[4].button(
        "Undo",
        shortcut="u",
        on_click=undo,
        args=(who,),
        disabled=off,
        width="stretch",
        help="Take back your last decision",
    )
    for cell, (key, (label, reason)) in zip(st.columns(5), REASONS.items(), strict=True):
        cell.button(
            f"Reject: {label}",
            shortcut=key,
            help=reason,
            args=(*args, "reject", before, reason),
            key=f"why-{key}",
            **common,
        )
    note, alone = st.columns([4, 1], vertical_alignment="bottom")
    written = note.text_input(
        "Note", key="note", placeholder="a note that goes with the decision", label_visibility="collapsed"
    )
    alone.button(
        "Reject: note",
        args=(*args, "reject", before),
        key="why-note",
        disabled=off or not written.strip(),
        on_click=decide,
        width="stretch",
        help="The note is the reason",
    )


def _editor(who: str, source: Source, record_id: str, row: dict[str, Any], before: tuple[str, ...]) -> None:
    speakers = [speaker for speaker, _ in turns_of(row, source) if speaker != "mention"]
    for n, (speaker, text) in enumerate(zip(speakers, before, strict=True)):
        height = min(320, max(80, 28 * (1 + len(text) // 60 + text.count("\n"))))
        st.text_area(speaker.capitalize(), text, key=f"edit-{record_id}-{n}", height=height)
    save, cancel = st.columns(2)
    args = (who, source.name, record_id, "edit", before)
    save.button("Save and accept", shortcut="ctrl+enter", type="primary", on_click=decide, args=args, width="stretch")
    cancel.button("Cancel", shortcut="escape", on_click=edit, args=(None,), width="stretch")


show("Review", "One record at a time. Every decision is saved at once and the next dataset obeys it.", body)
