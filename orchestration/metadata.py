"""What the Dagster UI shows of a step: its report as counts, tables, plots and thumbnails."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from medvlm.store import Report, read_report
from orchestration.resources import StageRun


def materialized(run: StageRun, folder: Path, extra: Mapping[str, Any] | None = None) -> dg.MaterializeResult:
    """The result of an asset: the step's report as metadata, DVC's hashes as its data version.

    Args:
        run: What DVC did.
        folder: The step's folder, which holds report.json.
        extra: Further metadata, such as plots.
    """
    return dg.MaterializeResult(
        metadata={**report_metadata(read_report(folder)), "path": dg.MetadataValue.path(folder), **(extra or {})}
        | {"ran": run.ran},
        data_version=dg.DataVersion(run.data_version),
    )


def not_needed(why: str) -> dg.MaterializeResult:
    """The result of an asset that a recipe has no use for; what is downstream goes on."""
    return dg.MaterializeResult(metadata={"ran": False, "why": why}, data_version=dg.DataVersion("none"))


def report_metadata(report: Report | None) -> dict[str, Any]:
    """Counts, metrics, seed, duration and versions of a report, as Dagster metadata."""
    if report is None:
        return {}
    return {
        **{name.replace("_", " "): value for name, value in report.counts.items()},
        **{name: round(value, 4) for name, value in report.metrics.items()},
        "duration": f"{report.duration_s:.1f} s",
        "fingerprint": report.fingerprint,
        "versions": dg.MetadataValue.json(dict(report.versions)),
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> dg.MarkdownMetadataValue:
    """A table; foreign text cannot break out of its cell."""
    lines = [header, ["---"] * len(header), *rows]
    return dg.MetadataValue.md("\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines))


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def picture(png: bytes, title: str) -> dg.MarkdownMetadataValue:
    """A PNG shown in the UI itself."""
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})")


def loss_plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """PNG of one or more loss curves.

    Args:
        curves: For each label the points, with ``step`` and ``loss``.
    """
    # Imported here: half a second that loading the definitions shall not pay.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="tight")
    axes = figure.subplots()
    for label, points in curves.items():
        axes.plot([p["step"] for p in points], [p["loss"] for p in points], label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
