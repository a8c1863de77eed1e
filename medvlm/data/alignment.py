"""The alignment dataset: one figure, one request to describe it, one caption."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from medvlm.data.conversations import (
    decisions,
    joined_samples,
    pick,
    prompts,
    samples_of_figures,
    usable_figures,
    write_dataset,
)
from medvlm.data.official import official_state
from medvlm.data.official_texts import official_files, read_officials
from medvlm.records import Figure, Turn
from medvlm.store import Report, Workspace

__all__ = ["BRIEF_WORDS", "alignment_turns", "build_alignment"]

BRIEF_WORDS = 30
"""A caption of fewer words is asked for briefly, as LLaVA-Med does."""


def build_alignment(
    workspace: Workspace,
    *,
    official: Path | Sequence[Path] = (),
    figures: Path | None = None,
    seed: int = 0,
    keep_leaked: bool = False,
) -> Report:
    """Write the alignment samples of the fetched figures.

    Args:
        workspace: Gets ``samples("alignment")`` and its report.
        official: LLaVA-Med's alignment JSON or ChiMed-VL's, or several files, or a folder of them,
            joined by ``pair_id``; English and Chinese make one dataset.
            Without, captions are the answers.
        figures: Shards of figures; the workspace's by default.
        seed: Decides which of our 27 prompts a figure gets.
        keep_leaked: Keep images that a benchmark of this workspace tests with, and those that look like one.

    Raises:
        InputError: The official file is malformed, or no sample came out.
        WorkspaceError: No figures have been fetched.
    """
    started = time.monotonic()
    folder = figures or workspace.figure_shards
    decided = decisions(workspace, "figures")
    files = official_files(official)
    if files:
        rows = joined_samples(folder, read_officials(files), dataset="alignment", decided=decided)
        return write_dataset(
            workspace,
            "alignment",
            rows,
            started=started,
            details={"files": [official_state(file) for file in files]},
            keep_leaked=keep_leaked,
        )
    rows = samples_of_figures(
        usable_figures(folder, decided),
        lambda figure: alignment_turns(figure, seed),
        dataset="alignment",
        source="caption",
    )
    return write_dataset(workspace, "alignment", rows, started=started, details={}, seed=seed, keep_leaked=keep_leaked)


def alignment_turns(figure: Figure, seed: int) -> tuple[Turn, ...] | str:
    """One request and the caption as its answer, or why the figure gives none.

    The image slot stands before or after the request, half and half, as in the published file.
    """
    caption = " ".join(figure.caption.split()).replace("<image>", "")
    if not caption:
        return "caption_empty"
    pool = prompts("alignment_brief" if len(caption.split()) < BRIEF_WORDS else "alignment_detailed")
    number = pick(seed, figure.figure_id, 2 * len(pool))
    prompt = pool[number // 2]
    return (
        Turn("user", f"<image>\n{prompt}" if number % 2 else f"{prompt}\n<image>"),
        Turn("assistant", caption),
    )
