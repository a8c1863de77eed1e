"""The clock of a training: points by step, and one rate over all of them."""

from __future__ import annotations

import pytest

from medvlm.training.pace import Pace, pace_metrics


def test_points_give_the_rate_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 103.0, 110.0])
    monkeypatch.setattr("medvlm.training.pace.time.monotonic", lambda: next(clock))
    pace = Pace(global_batch=32)
    assert not pace.begun
    pace.begin(10)
    pace.add(11)
    pace.add(13)
    pace.add(13)  # the last log of a run repeats its step
    assert [(point["step"], point["samples_per_second"]) for point in pace.points] == [(11, 16.0), (13, 64.0)]
    assert all(point["memory_mb"] > 0 for point in pace.points)


def test_the_rate_of_a_stage_is_that_of_all_its_steps() -> None:
    assert pace_metrics([]) == pace_metrics([[]]) == {}
    runs = [
        [{"step": 1, "samples_per_second": 10.0, "memory_mb": 100}],
        [{"step": 1, "samples_per_second": 30.0, "memory_mb": 300}],
    ]
    # 32 samples in 3.2 s and 32 in 1.07 s: 15 a second.
    assert pace_metrics(runs) == {"samples_per_second": 15.0, "peak_memory_mb": 300}
