"""The instruction dataset: conversations about figures, published or generated."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from medvlm.data.conversations import (
    decisions,
    joined_samples,
    prompt_text,
    sample_or_drop,
    samples_of_figures,
    usable_figures,
    write_dataset,
)
from medvlm.data.endpoint import ChatClient
from medvlm.data.official import official_state
from medvlm.data.official_texts import official_files, read_officials
from medvlm.data.offline_instruct import offline_turns
from medvlm.data.readers.source import Dropped
from medvlm.data.self_instruct import ask_in_order, written_turns
from medvlm.records import Figure, Sample
from medvlm.store import Report, Workspace

__all__ = ["build_instruct"]


def build_instruct(
    workspace: Workspace,
    *,
    official: Path | Sequence[Path] = (),
    figures: Path | None = None,
    client: ChatClient | None = None,
    seed: int = 0,
    keep_leaked: bool = False,
) -> Report:
    """Write the instruction samples of the fetched figures.

    Args:
        workspace: Gets ``samples("instruct")`` and its report.
        official: LLaVA-Med's instruction JSON or ChiMed-VL's, or several files, or a folder of them,
            joined by ``pair_id``; English and Chinese make one dataset.
            Without, the conversations are written from captions and mentions: by rules, or by ``client``.
        figures: Shards of figures; the workspace's by default.
        client: Asks a chat endpoint. Refused and malformed answers are dropped with their reason;
            its cache makes a second run go on where the first one stopped.
        seed: Decides the wording where rules write, and is passed to the endpoint.
        keep_leaked: Keep images that a benchmark of this workspace tests with, and those that look like one.

    Raises:
        InputError: The official file is malformed, or no sample came out.
        EndpointError: The endpoint cannot be reached, or refuses everything.
        WorkspaceError: No figures have been fetched.
    """
    started = time.monotonic()
    folder = figures or workspace.figure_shards
    decided = decisions(workspace, "figures")
    files = official_files(official)
    if files:
        rows = joined_samples(folder, read_officials(files), dataset="instruct", decided=decided)
        return write_dataset(
            workspace,
            "instruct",
            rows,
            started=started,
            details={"files": [official_state(file) for file in files]},
            keep_leaked=keep_leaked,
        )
    figures_wanted = usable_figures(folder, decided)
    if client:
        prompt_sha256 = hashlib.sha256(prompt_text("self_instruct").encode()).hexdigest()
        return write_dataset(
            workspace,
            "instruct",
            _generated(figures_wanted, client, seed),
            started=started,
            details={"prompt_sha256": prompt_sha256, "model": client.endpoint.model},
            seed=seed,
            made_with=(prompt_sha256, client.endpoint.model),
            keep_leaked=keep_leaked,
        )
    rows = samples_of_figures(
        figures_wanted, lambda figure: offline_turns(figure, seed), dataset="instruct", source="generated-offline"
    )
    return write_dataset(workspace, "instruct", rows, started=started, details={}, seed=seed, keep_leaked=keep_leaked)


def _generated(figures: Iterable[Figure | Dropped], client: ChatClient, seed: int) -> Iterator[Sample | Dropped]:
    """Samples in the figures' order; each answer is on disk before the next step, so a stopped run goes on."""
    source = f"generated:{client.endpoint.model}"

    def write(figure: Figure | Dropped) -> Sample | Dropped:
        turns = figure if isinstance(figure, Dropped) else written_turns(client, figure, seed)
        return sample_or_drop(figure, turns, dataset="instruct", source=source)

    yield from ask_in_order(write, figures, client.settings.concurrency)
