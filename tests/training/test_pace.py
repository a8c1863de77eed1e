"""The clock of a training: points by step, one rate over all of them, and what is left of it after a kill."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from medvlm.training.pace import Pace, pace_metrics


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times that the clock shows, one after the other."""
    times: list[float] = []
    monkeypatch.setattr("medvlm.training.pace.time.monotonic", lambda: times.pop(0))
    return times


def test_points_give_the_rate_since_the_one_before(clock: list[float]) -> None:
    clock += [100.0, 102.0, 103.0, 110.0]
    pace = Pace(global_batch=32)
    assert not pace.begun
    pace.begin(10)
    pace.add(11)
    pace.add(13)
    pace.add(13)  # the last log of a run repeats its step
    assert [(point["step"], point["samples_per_second"]) for point in pace.points] == [(11, 16.0), (13, 64.0)]
    assert all(point["memory_mb"] > 0 and point["wait_share"] == 0 for point in pace.points)


def test_waiting_for_data_is_a_share_of_the_time(clock: list[float]) -> None:
    clock += [0.0, 1.0, 2.0, 4.0, 5.0, 5.5, 8.0]
    pace = Pace(global_batch=1)
    pace.begin(0)
    with pace.waiting():
        pass
    pace.add(1)
    with pace.waiting():
        pass
    pace.add(2)
    assert [point["wait_share"] for point in pace.points] == [0.25, 0.125]


def test_the_rate_of_a_stage_is_that_of_all_its_steps() -> None:
    assert pace_metrics([]) == pace_metrics([[]]) == {}
    runs = [
        [{"step": 1, "samples_per_second": 10.0, "wait_share": 0.2, "memory_mb": 100}],
        [{"step": 1, "samples_per_second": 30.0, "wait_share": 0.0, "memory_mb": 300}],
    ]
    # 32 samples in 3.2 s and 32 in 1.07 s: 15 a second.
    assert pace_metrics(runs) == {"samples_per_second": 15.0, "data_wait_share": 0.15, "peak_memory_mb": 300}


def test_a_point_of_many_steps_weighs_more_than_one_of_few() -> None:
    points = [
        {"step": 1, "samples_per_second": 1.0, "memory_mb": 1},
        {"step": 4, "samples_per_second": 3.0, "memory_mb": 1},
    ]
    assert pace_metrics([points])["samples_per_second"] == 2.0


def test_a_resumed_run_has_the_pace_of_the_whole_training(tmp_path: Path, clock: list[float]) -> None:
    clock += [0.0, 2.0, 100.0, 104.0]
    state = SimpleNamespace(global_step=2, is_world_process_zero=True)
    killed = Pace(global_batch=4)
    killed.begin(0)
    killed.on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)

    resumed = Pace(global_batch=4)
    resumed.resume(tmp_path / "checkpoint-2")
    assert resumed.points == killed.points and not resumed.begun
    resumed.begin(2)
    resumed.add(4)
    assert [(point["step"], point["samples_per_second"]) for point in resumed.points] == [(2, 4.0), (4, 2.0)]

    without = Pace(global_batch=4)
    without.resume(tmp_path / "checkpoint-1")  # of a version that wrote none
    assert without.points == []
