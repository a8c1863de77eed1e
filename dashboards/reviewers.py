"""Who has judged how much of a table, and how far two reviewers agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pandas as pd
import streamlit as st

from dashboards.frame import download_csv
from medvlm.results import Source
from medvlm.review import Decision, agreement, standing

__all__ = ["reviewers_section"]


def reviewers_section(heard: list[Decision], source: Source) -> None:
    """Decisions by reviewer, agreement of every two, and every decision as a file."""
    here = [d for d in standing(heard) if d.source == source.name]
    if not here:
        return
    st.subheader("Reviewers", anchor=False)
    counts = Counter((d.who, d.action) for d in here)
    people = sorted({d.who for d in here})
    names = {"accept": "Accepted", "edit": "Edited", "reject": "Rejected", "flag_privacy": "Privacy"}
    left, right = st.columns(2, gap="large")
    table = [{"Reviewer": p, **{title: counts[p, action] for action, title in names.items()}} for p in people]
    left.dataframe(pd.DataFrame(table), hide_index=True)
    pairs = agreement(heard, source.name)
    if pairs:
        right.dataframe(
            pd.DataFrame(
                {
                    "Reviewers": [f"{pair.first} and {pair.second}" for pair in pairs],
                    "Both judged": [pair.records for pair in pairs],
                    "Agree": [100 * pair.observed for pair in pairs],
                    "Cohen's kappa": [pair.kappa for pair in pairs],
                }
            ),
            hide_index=True,
            placeholder="",
            column_config={
                "Agree": st.column_config.NumberColumn(format="%.0f %%"),
                "Cohen's kappa": st.column_config.NumberColumn(
                    format="%.2f", help="Agreement beyond chance, 1 is full"
                ),
            },
        )
    else:
        right.caption("Agreement appears here once two reviewers have judged the same record.")
    said = [d for d in heard if d.source == source.name]
    download_csv("Download the decisions as CSV", lambda: pd.DataFrame(map(asdict, said)), f"decisions-{source.name}")
