"""The dashboard's entrance: ``streamlit run dashboards/app.py`` with MEDVLM_WORKSPACE set."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from dashboards.access import person, require_log_in
from dashboards.frame import escaped, results

# Not "pages": Streamlit runs the files of a folder of that name by themselves, without this frame,
# when somebody opens the address of a page right after the server's start.
VIEWS = Path(__file__).parent / "views"

st.set_page_config(page_title="medvlm", layout="wide", initial_sidebar_state=220)
require_log_in()
chosen = st.navigation(
    [
        st.Page(VIEWS / "overview.py", title="Overview", default=True),
        st.Page(VIEWS / "data.py", title="Data"),
        st.Page(VIEWS / "review.py", title="Review"),
        st.Page(VIEWS / "runs.py", title="Runs"),
        st.Page(VIEWS / "benchmarks.py", title="Benchmarks"),
        st.Page(VIEWS / "chat.py", title="Chat"),
    ]
)
with st.sidebar:
    workspace = results().workspace.root.resolve()
    st.caption("Workspace")
    st.text(workspace.name, help=escaped(str(workspace)))
    who = person()
    if who.logged_in:
        st.caption("Reviewer" if who.may_write else "Viewer")
        st.text(who.name)
        st.button("Log out", on_click=st.logout)
chosen.run()
