"""Where a person says that a release may be used, or takes it back; what else stands in its way is beside it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from dashboards.access import allowed_to_write, person
from dashboards.frame import escaped, results, stamp
from medvlm.approval import Word, approval, approvals, approve
from medvlm.errors import MedVLMError
from medvlm.release.promote import obstacles, promoted
from medvlm.results import Results

__all__ = ["release_section"]


@st.cache_data(max_entries=8, show_spinner="Checking the release …")
def _obstacles(at: str, root: str, recipe: str) -> list[str]:
    del at
    return obstacles(Results(Path(root)).workspace, recipe)


def release_section(recipe: str) -> None:
    """The built release of a recipe: what stands in its way, who approved it, and the place to do so."""
    workspace = results().workspace
    report = results().release(recipe)
    st.subheader("Release", anchor=False)
    if report is None:
        st.caption("No release of this recipe has been built yet.")
        st.code(f"medvlm release build --recipe {recipe}", language="bash", width=480)
        return
    with st.container(border=True):
        st.text(f"Bundle {report.fingerprint}, built {report.created_at[:16].replace('T', ' ')} UTC")
        refused = st.session_state.pop("approval-refused", None)
        if refused:
            st.error(f"**{escaped(refused.what)}** Next: {escaped(refused.hint)}.")
        given = approval(workspace, recipe, report.fingerprint)
        use = promoted(workspace, recipe)
        if use and use.fingerprint == report.fingerprint:
            st.success(f"Promoted, on the word of {escaped(use.who)}.")
        elif given:
            st.info(f"Approved by {escaped(given.who)}; to be promoted with: medvlm release promote")
        # Approvals change without a step running, so what they say is not taken from the cache.
        words = (line for line in _obstacles(stamp(), str(workspace.root), recipe) if "nobody has approved" not in line)
        for line in words:
            st.markdown(f":orange[**!**] {escaped(line)}")
        _give(recipe, report.fingerprint, approved=given is not None)
        rows = [row for row in approvals(workspace, recipe) if row.fingerprint == report.fingerprint]
        if rows:
            table = [
                {"Who": r.who, "When": r.when[:16].replace("T", " "), "Word": r.word, "Note": r.note} for r in rows
            ]
            st.dataframe(pd.DataFrame(table), hide_index=True, placeholder="")


def _give(recipe: str, fingerprint: str, *, approved: bool) -> None:
    who = person()
    if not who.may_write:
        st.caption("You may look, not decide.")
        return
    left, middle, right = st.columns([2, 4, 2], vertical_alignment="bottom")
    if not who.logged_in:
        left.text_input("Your name", key="reviewer", placeholder="signs the approval", persist_state="session")
    else:
        left.text_input("Your name", who.name, disabled=True, key="approver-logged-in")
    middle.text_input("Note", key=f"approval-note-{recipe}", placeholder="what you looked at, or why you withdraw it")
    word: Word = "withdraw" if approved else "approve"
    label = "Withdraw the approval" if approved else "Approve this release"
    right.button(label, on_click=_say, args=(recipe, fingerprint, word), key=f"{word}-{recipe}", width="stretch")


def _say(recipe: str, fingerprint: str, word: Word) -> None:
    try:
        who = allowed_to_write()
        name = who.name if who.logged_in else str(st.session_state.get("reviewer", ""))
        note = str(st.session_state.get(f"approval-note-{recipe}", ""))
        approve(results().workspace, recipe, fingerprint, who=name, word=word, note=note)
    except MedVLMError as error:
        st.session_state["approval-refused"] = error
        return
    st.session_state[f"approval-note-{recipe}"] = ""
    st.toast("Saved")
