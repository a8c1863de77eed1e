"""Data Docs of a contract as plain HTML files that need no network: ``docs/index.html`` first."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_contracts.result import Check, ContractResult
from medvlm.store import atomic_folder

__all__ = ["write_docs"]

# Great Expectations' pages take style and scripts from a CDN; the library's own sheet is not enough
# without it. These few rules keep its tables and verdicts readable offline.
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
td, th { border-bottom: 1px solid #8884; padding: .4rem .6rem; text-align: left; vertical-align: top; }
code { background: #8882; padding: 0 .3em; border-radius: 3px; overflow-wrap: anywhere; }
.ok { color: #178a3a; } .broken { color: #d02020; font-weight: 600; } .warn { color: #b06a00; font-weight: 600; }
.modal, .navbar-toggler, .show-less-info, nav svg, img { display: none; }
.fa-check-circle::before { content: "✓ "; } .fa-times::before { content: "✗ "; }
"""


def write_docs(folder: Path, result: ContractResult, validations: Mapping[str, Any]) -> Path:
    """Write an index of all checks, and the library's own page for each target.

    Args:
        folder: Replaced whole.
        result: What the index shows.
        validations: Great Expectations' result for each target; None where it was not asked.

    Returns:
        Path of ``index.html``.

    Raises:
        WorkspaceError: The disk is full or read-only.
    """
    with atomic_folder(folder) as temporary:
        pages: dict[str, str] = {}
        for label, validation in validations.items():
            if validation is None:
                continue
            pages[label] = f"expectations-{re.sub(r'[^A-Za-z0-9-]+', '-', label) or result.contract}.html"
            (temporary / pages[label]).write_text(_library_page(validation), "utf-8")
        (temporary / "index.html").write_text(_index(result, pages), "utf-8")
    return folder / "index.html"


def _library_page(validation: Any) -> str:
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A result that did not go through a checkpoint has no run; the page asks for its name and time.
        validation.meta.setdefault("run_id", {"run_name": "data contract", "run_time": None})
        page = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(validation))
    return _offline(page)


def _offline(page: str) -> str:
    """The page without anything that a browser would fetch from elsewhere, or that leads nowhere."""
    # Scripts need a library that is not there, and what they would do (hide rows) goes with them.
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL | re.IGNORECASE)
    page = re.sub(r"<strong>Actions</strong>.*?(?=<strong>)", "", page, flags=re.DOTALL)
    page = re.sub(r"<link\b[^>]*\bhref=[\"']?https?:[^>]*>", "", page, flags=re.IGNORECASE)
    page = re.sub(r"<img\b[^>]*\bsrc=[\"']?https?:[^>]*>", "", page, flags=re.IGNORECASE)
    page = re.sub(r"url\([\"']?https?:[^)]*\)", "none", page)
    page = re.sub(r"<footer\b.*?</footer>", "", page, flags=re.DOTALL | re.IGNORECASE)
    # Its other links lead to pages of a site that is not built: only the index is there.
    page = re.sub(r"<a\b[^>]*\bhref=\"[^\"#]*index\.html\"[^>]*>", '<a href="index.html">', page)
    page = re.sub(r"<a\b[^>]*\bhref=\"(?!#|index\.html)[^\"]*\"[^>]*>(.*?)</a>", r"\1", page, flags=re.DOTALL)
    page = re.sub(r"<iframe\b.*?</iframe>", "", page, flags=re.DOTALL | re.IGNORECASE)
    page = page.replace(" / __none__", "").replace("__none__", "none")
    return page.replace("</head>", f"<style>{_STYLE}</style></head>", 1)


def _index(result: ContractResult, pages: Mapping[str, str]) -> str:
    verdict = '<span class="ok">holds</span>' if result.success else '<span class="broken">is broken</span>'
    links = " · ".join(
        f'<a href="{page}">Great Expectations: {html.escape(label or result.contract)}</a>'
        for label, page in pages.items()
    )
    rows = "\n".join(_index_row(check) for check in sorted(result.checks, key=_worst_first))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Contract {html.escape(result.contract)}</title>
<style>{_STYLE}</style></head><body>
<h1>{html.escape(result.title)}: the contract {verdict}</h1>
<p>{result.rows:,} rows, fingerprint <code>{result.fingerprint}</code>. {links}</p>
<table><thead><tr><th>verdict</th><th>check</th><th>observed</th><th>expected</th><th>examples</th></tr></thead>
<tbody>
{rows}
</tbody></table></body></html>
"""


def _worst_first(check: Check) -> tuple[bool, bool]:
    return (check.success, not check.blocks)


def _index_row(check: Check) -> str:
    name = "ok" if check.success else "broken" if check.blocks else "warn"
    examples = "<br>".join(
        f"<code>{html.escape(row.row_id)}</code> {html.escape(row.value[:120])}" for row in check.broken[:10]
    )
    return (
        f'<tr><td class="{name}">{name}</td><td><code>{html.escape(check.name)}</code><br>{html.escape(check.rule)}'
        f"</td><td>{html.escape(check.observed)}</td><td>{html.escape(check.expected)}</td><td>{examples}</td></tr>"
    )
