"""The instruction dataset: conversations about figures, published or generated."""

from __future__ import annotations

import time
from pathlib import Path

from medvlm.data.conversations import joined_samples, official_state, read_official, samples_of_figures, write_dataset
from medvlm.data.offline_instruct import offline_turns
from medvlm.store import Report, Workspace

__all__ = ["build_instruct"]


def build_instruct(
    workspace: Workspace, *, official: Path | None = None, figures: Path | None = None, seed: int = 0
) -> Report:
    """Write the instruction samples of the fetched figures.

    Args:
        workspace: Gets ``samples("instruct")`` and its report.
        official: LLaVA-Med's instruction JSON or ChiMed-VL's, joined by ``pair_id``. Without it, rules write the
            conversations from captions and mentions.
        figures: Shards of figures; the workspace's by default.
        seed: Decides the wording where rules write.

    Raises:
        InputError: The official file is malformed, or no sample came out.
        WorkspaceError: No figures have been fetched.
    """
    started = time.monotonic()
    folder = figures or workspace.figure_shards
    if official:
        rows = joined_samples(folder, read_official(official), dataset="instruct")
        return write_dataset(
            workspace, "instruct", rows, started=started, details={"official": official_state(official)}
        )
    rows = samples_of_figures(
        folder, lambda figure: offline_turns(figure, seed), dataset="instruct", source="generated-offline"
    )
    return write_dataset(workspace, "instruct", rows, started=started, details={}, seed=seed)
