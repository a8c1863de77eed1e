"""A workspace that looks as after a whole road, for tests of what leaves the house."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from medvlm.config import load_recipe
from medvlm.records import Score
from medvlm.store import Report, Workspace, write_records, write_report

RECIPE = "tiny-llava-med"


def finished_workspace(folder: Path) -> Workspace:
    """Reports and scores of a finished recipe, without the hours that they took."""
    made = Workspace(folder / "w").ensure()
    recipe = load_recipe(RECIPE)
    counts = {"samples": 7, "steps": 3, "parameters": 1000, "parameters_trained": 10}
    for number in (1, 2, 3):
        details = {"engine": "8 processes on cuda, bf16"}
        report = Report(step="train", counts=counts, metrics={"loss": 0.5}, details=details, fingerprint="f00d")
        write_report(made.stage(RECIPE, number), report, started=0.0)
    for target in recipe.targets(3):
        folder = made.checkpoint(RECIPE, 3, target)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(target.encode())
    for name in ("alignment", "instruct"):
        details = {"by": {"licence": {"CC BY": 5, "CC BY-NC": 2}}}
        write_report(made.dataset(name), Report(step="build", counts={"samples": 7}, details=details), started=0.0)
        (made.dataset(name) / "samples").mkdir()
        (made.dataset(name) / "samples" / "part-00000.parquet").write_bytes(b"rows")
    leak = {"train": "vqa-rad:train", "test": "vqa-rad:test", "test_images": 203}
    leak |= {"leaked_images": 202, "near_images": 203}
    write_report(made.leakage, Report(step="leakage", details={"comparisons": [leak]}), started=0.0)
    for name in recipe.benchmarks:
        made.items(name).mkdir(parents=True)
        (made.items(name) / "part-00000.parquet").write_bytes(b"items")
        write_report(made.benchmark(name), Report(step="build", counts={"items": 9}), started=0.0)
        seen = Score(name, RECIPE, "finetune", False, "all", "closed", "whole_word", 81.0, 76.0, 86.0, 272)
        blind = dataclasses.replace(seen, blind=True, value=53.3, low=47.0, high=59.0)
        clean = dataclasses.replace(seen, slice="leaked=false", value=61.0, n=1)
        folder = made.scores(RECIPE, name) / "scores"
        write_records(folder, Score, [seen, blind, clean])
        next(folder.glob("*.parquet")).rename(folder / "scores.parquet")
    return made
