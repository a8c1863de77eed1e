"""Every contract's last verdict: its checks, its Data Docs and the rows that it put into quarantine."""

from __future__ import annotations

import base64
import io
import time
import zipfile
from pathlib import Path

import pandas as pd
import streamlit as st

from dashboards.frame import choose_page, count, download_csv, empty, escaped, results, tidy
from medvlm.results import ContractResult

__all__ = ["contract_section", "sealed"]


def contract_section() -> None:
    """Every contract with its checks; broken ones first and open."""
    contracts = results().contracts()
    if not contracts:
        empty("No contract has been checked yet.")
        return
    broken = [contract for contract in contracts if not contract.success]
    with st.container(horizontal=True):
        st.metric("Contracts", len(contracts), border=True, height="stretch")
        st.metric("Held", len(contracts) - len(broken), border=True, height="stretch")
        st.metric("Broken", len(broken), border=True, height="stretch")
        st.metric("Rows in quarantine", count(sum(c.quarantined for c in contracts)), border=True, height="stretch")
    for contract in contracts:
        _contract(contract)


def _contract(contract: ContractResult) -> None:
    broken = f":red[**✗ broken**: {len(contract.failed)} of {len(contract.checks)} checks]"
    state = ":green[✓ held]" if contract.success else broken
    if contract.warned:
        state += f" · :orange[{len(contract.warned)} warned]"
    age = _age(contract.checked_at)
    label = f"**{escaped(contract.name)}** · {state} · {contract.rows:,} rows · checked {age}"
    with st.expander(label, expanded=not contract.success):
        st.dataframe(
            pd.DataFrame(
                {
                    "": ["✓" if check.success else "✗" if check.blocks else "!" for check in contract.checks],
                    "Rule": [check.rule or tidy(check.name) for check in contract.checks],
                    "Seen": [check.observed for check in contract.checks],
                    "Allowed": [check.expected for check in contract.checks],
                    "Broken rows": [check.broken_rows for check in contract.checks],
                    "Examples": ["; ".join(check.examples[:3]) for check in contract.checks],
                }
            ),
            hide_index=True,
            column_config={
                "": st.column_config.TextColumn(width=36),
                "Rule": st.column_config.TextColumn(width=380),
                "Seen": st.column_config.TextColumn(width=165),
                "Allowed": st.column_config.TextColumn(width=165),
                "Broken rows": st.column_config.NumberColumn(width="small", format="localized"),
            },
        )
        if contract.docs:
            _docs(contract, contract.docs)
        if contract.quarantined:
            _quarantine(contract)


# Written by another program around foreign values: in the page that shows it no script runs and nothing is fetched.
# Its links to other pages lead nowhere from there: the page is chosen above it.
_NO_SCRIPTS = b"""<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>a:not([href^="#"]) { pointer-events: none; color: inherit !important; text-decoration: none; }</style>"""


def sealed(page: bytes) -> str:
    """A page of the Data Docs as an address of its own origin, which can run, fetch and reach nothing."""
    return "data:text/html;charset=utf-8;base64," + base64.b64encode(_NO_SCRIPTS + page).decode()


def _docs(contract: ContractResult, first: Path) -> None:
    """The Data Docs: to look at here, and as a file."""

    def packed() -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(first.parent.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    archive.write(path, path.relative_to(first.parent))
        return out.getvalue()

    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            "Data Docs",
            packed,
            file_name=f"{contract.name.replace('/', '-')}-data-docs.zip",
            mime="application/zip",
            on_click="ignore",
            key=f"docs-{contract.name}",
            help="Great Expectations' pages of this contract as a file; open index.html",
        )
        shown = st.toggle("Show them here", key=f"show-docs-{contract.name}")
        root = results().workspace.root.resolve()
        st.text(str(first.relative_to(root.parent)))
    if shown:
        pages = {page.stem: page for page in [first, *sorted(first.parent.glob("expectations-*.html"))]}
        names = {name: tidy(name).replace("index", "All checks").replace("expectations-", "") for name in pages}
        page = st.segmented_control(
            "Page", list(pages), default=first.stem, required=True, format_func=names.__getitem__,
            key=f"docs-page-{contract.name}", label_visibility="collapsed",
        )  # fmt: skip
        chosen = pages[str(page)].resolve()
        if chosen.parent == first.parent:
            st.iframe(sealed(chosen.read_bytes()), height=640, alt=f"Data Docs of {contract.name}")


def _quarantine(contract: ContractResult) -> None:
    st.markdown(f"**Quarantine** · {contract.quarantined:,} rows")
    rules = ["every rule", *dict.fromkeys(check.name for check in contract.checks if check.broken_rows)]
    rule = st.selectbox("Rule", rules, format_func=tidy, key=f"rule-{contract.name}")
    chosen = "" if rule == "every rule" else rule
    total = results().quarantine(contract.name, rule=chosen, limit=1).total
    first = choose_page(total, 50, key=f"quarantine-{contract.name}")
    page = results().quarantine(contract.name, rule=chosen, offset=first)
    st.dataframe(
        pd.DataFrame(page.rows, columns=["rule", "row_id", "value"]),
        hide_index=True,
        column_config={
            "rule": st.column_config.TextColumn("Rule"),
            "row_id": st.column_config.TextColumn("Row"),
            "value": st.column_config.TextColumn("Offending value", width="large"),
        },
    )
    reader = results()
    download_csv(
        "Download the quarantine as CSV",
        lambda: pd.DataFrame(reader.quarantine(contract.name, rule=chosen, limit=total).rows),
        f"quarantine-{contract.name}",
    )


def _age(then: float) -> str:
    seconds = max(0, time.time() - then)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now" if seconds < 60 else "a minute ago"
