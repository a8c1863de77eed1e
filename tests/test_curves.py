"""Loss curves of finished and unfinished stages."""

from __future__ import annotations

import time
from pathlib import Path

from medvlm.results import Results
from medvlm.store import Report, Workspace, write_json, write_report


def test_a_stage_with_a_model_for_each_benchmark_has_a_curve_for_each(tmp_path: Path) -> None:
    points = [{"step": 1, "loss": 2.0, "lr": 0.1}]
    details = {"curves": {"slake": points, "vqa-rad": points, "pathvqa": []}}
    write_report(Workspace(tmp_path).stage("tiny", 3), Report("train", details=details), started=time.monotonic())
    write_report(
        Workspace(tmp_path).stage("tiny", 1), Report("train", details={"curves": {"all": points}}), started=0.0
    )
    curves = Results(tmp_path).curves()
    assert [curve.name for curve in curves] == ["tiny · stage 1", "tiny · stage 3 · slake", "tiny · stage 3 · vqa-rad"]
    assert curves[1].points["loss"].to_list() == [2.0]


def test_an_unfinished_run_is_known_up_to_its_last_complete_checkpoint(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    folder = workspace.scratch("train", "tiny", "stage2", "all")
    for step, complete in ((9, True), (10, True), (11, False)):
        history = [{"step": n, "loss": 3.0 - n / 10, "learning_rate": 0.1} for n in range(1, step + 1)]
        write_json(folder / f"checkpoint-{step}" / "trainer_state.json", {"log_history": [*history, {"step": step}]})
        if complete:
            write_json(folder / f"checkpoint-{step}" / "complete.json", {"step": step})
    (curve,) = Results(tmp_path).curves()
    assert (curve.name, curve.finished) == ("tiny · stage 2 · unfinished", False)
    assert curve.points["step"].to_list() == list(range(1, 11))
