"""A fetch that is stopped, repeated, divided, or runs out of disk loses nothing."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bucket_server import BucketServer, Fault, article, llava_row, picture
from failures.reliability import held
from fetch_case import QUICK, ROW, figures, many, outcomes, report_of, shard_bytes, write_list

from medvlm.data import journal
from medvlm.data.articles import FetchSettings
from medvlm.data.figures import fetch_figures, hold_lock
from medvlm.data.objects import StoreLimits
from medvlm.errors import InputError, WorkspaceError
from medvlm.store import atomic_folder, read_report

# --- stopping and going on


KILLED = """
import sys
from pathlib import Path
from medvlm.data.figures import fetch_figures, hold_lock
from medvlm.data.objects import StoreLimits
fetch_figures(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), block_rows=8, limits=StoreLimits(concurrency=4))
"""


def test_a_killed_run_goes_on_without_fetching_a_finished_figure_again(tmp_path: Path) -> None:
    objects, rows = many(60)
    path = write_list(tmp_path, rows)
    report_of(tmp_path, objects, rows, "whole", block_rows=8)
    with BucketServer(objects, latency_s=0.02) as server:
        child = [sys.executable, "-c", KILLED, str(path), server.url, str(tmp_path / "out")]
        for wait_for in (10, 30):
            process = subprocess.Popen(child)
            while sum(count for key, count in server.requests.items() if key.endswith(".jpg")) < wait_for:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert not (tmp_path / "out" / "shards").exists()
        subprocess.run(child, check=True)
        twice = [key for key, count in server.requests.items() if key.endswith(".jpg") and count > 1]
        # Only what was in flight at a kill may be asked for again.
        assert len(twice) <= 8
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    assert [row.row for row in outcomes(tmp_path / "out")] == list(range(60))
    assert list((tmp_path / ".out.fetch").iterdir()) == [tmp_path / ".out.fetch" / "lock"]
    held(
        "kill -9 of the fetcher, twice",
        lost="what was in flight: at most as many figures as requests at once",
        saw="no shard is in place yet, so nothing downstream reads half a corpus",
        rerun="asks for no finished figure again; shards are those of an unbroken run, byte for byte",
    )


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 200])
def test_a_torn_journal_loses_only_its_last_result(tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, rows = many(6)
    monkeypatch.setattr("medvlm.data.figures._put_in_place", stop)
    monkeypatch.setattr("medvlm.data.blocks.Blocks.finish", lambda self, block: None)
    with pytest.raises(InterruptedError):
        report_of(tmp_path, objects, rows, "out")
    (written,) = (tmp_path / ".out.fetch").rglob("*.journal")
    monkeypatch.undo()
    os.truncate(written, written.stat().st_size - cut)
    path = tmp_path / "list.jsonl"
    with BucketServer(objects) as server:
        # The address is part of what makes two runs the same one.
        monkeypatch.setattr("medvlm.data.figures.fingerprint", lambda *parts: written.parent.parent.name)
        fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
        assert sum(count for key, count in server.requests.items() if key.endswith(".jpg")) == 1
    assert len(figures(tmp_path / "out")) == 6


def stop(*_: object) -> None:
    raise InterruptedError


def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, rows = many(20)
    path = write_list(tmp_path, rows)
    real_write, room = os.write, [30_000]

    def write(descriptor: int, data: Any) -> int:
        # A disk that fills up takes part of the last write.
        taken = min(len(data), room[0])
        if not taken:
            raise OSError(28, "No space left on device")
        room[0] -= taken
        return real_write(descriptor, bytes(data)[:taken])

    with BucketServer(objects) as server:
        monkeypatch.setattr(journal.os, "write", write)
        with pytest.raises(WorkspaceError, match="No space left"):
            fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
        monkeypatch.undo()
        done = sum(count for key, count in server.requests.items() if key.endswith(".jpg"))
        assert done
        fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
    assert [row.status for row in outcomes(tmp_path / "out")] == ["ok"] * 20
    assert len(figures(tmp_path / "out")) == 20


def test_a_disk_that_fills_up_while_a_shard_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, rows = many(6)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with BucketServer(objects) as server:
        path = write_list(tmp_path, rows)
        with monkeypatch.context() as patched:
            patched.setattr("medvlm.data.blocks.pq.ParquetWriter.write_table", full)
            with pytest.raises(WorkspaceError, match="No space left"):
                fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
        server.requests.clear()
        fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
        assert not any(key.endswith(".jpg") for key in server.requests)
    assert len(figures(tmp_path / "out")) == 6


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    objects, rows = many(16)
    path = write_list(tmp_path, rows)
    with BucketServer(objects, latency_s=0.1) as server:
        child = [sys.executable, "-c", KILLED, str(path), server.url, str(tmp_path / "out")]
        process = subprocess.Popen(child)
        while not server.total:
            time.sleep(0.01)
        with pytest.raises(WorkspaceError, match="another fetch"):
            fetch_figures(path, server.url, tmp_path / "out")
        with pytest.raises(WorkspaceError, match="another fetch"):
            fetch_figures(path, server.url, tmp_path / "out", part=(1, 2))
        assert process.wait() == 0
    assert len(figures(tmp_path / "out")) == 16


def test_parts_fetched_apart_make_the_same_shards(tmp_path: Path) -> None:
    objects, rows = many(20)
    rows.insert(7, "neither JSON nor a PMCID")
    path = write_list(tmp_path, rows)
    report_of(tmp_path, objects, rows, "whole", block_rows=4)
    with BucketServer(objects) as server:
        options: dict[str, Any] = {"limits": QUICK, "block_rows": 4}
        counts = [
            fetch_figures(path, server.url, tmp_path / "out", part=(part, 3), **options).counts["rows"]
            for part in (3, 1, 2)
        ]
        assert sum(counts) == 21
        assert not (tmp_path / "out").exists()
        server.requests.clear()
        report = fetch_figures(path, server.url, tmp_path / "out", **options)
        assert not any(key.endswith(".jpg") for key in server.requests)
    assert report.details["by_status"] == {"bad_row": 1, "ok": 20}
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


def test_a_second_run_fetches_only_what_has_changed(tmp_path: Path) -> None:
    objects, rows = many(10)
    path = write_list(tmp_path, rows)
    with BucketServer(objects, faults={"PMC7037.1/fig0.jpg": Fault("reset", times=3)}) as server:
        run: dict[str, Any] = {"limits": QUICK, "block_rows": 4}
        first = fetch_figures(path, server.url, tmp_path / "out", **run)
        assert first.details["by_status"] == {"ok": 9, "store_error": 1}
        for key, body in article("PMC7000", {"fig0.jpg": picture(0)}, pmid=1, is_retracted=True).items():
            server.put(key, body)
        for key, body in article("PMC7074", {"fig0.jpg": picture(77)}, pmid=3).items():
            server.put(key, body)
        server.requests.clear()
        second = fetch_figures(path, server.url, tmp_path / "out", **run)
        asked = {key for key in server.requests if key.endswith(".jpg")}
        assert asked == {"PMC7037.1/fig0.jpg", "PMC7074.1/fig0.jpg"}
        assert second.details["by_status"] == {"ok": 9, "retracted": 1}
        assert second.fingerprint != first.fingerprint
        again = fetch_figures(path, server.url, tmp_path / "fresh", **run)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "fresh")
    assert again.fingerprint == second.fingerprint


def test_another_policy_drops_what_it_does_not_admit(tmp_path: Path) -> None:
    objects = article("PMC100", {"a.jpg": picture(1)}, pmid=5, license_code="CC BY-NC") | article(
        "PMC101", {"a.jpg": picture(2)}, pmid=6, license_code="CC BY-ND"
    )
    rows = [ROW, llava_row("PMC101", "a.jpg", "6_F1")]
    kept = {}
    for policy in ("research", "commercial", "any-oa"):
        report_of(tmp_path, objects, rows, "out", settings=FetchSettings(policy=policy))
        kept[policy] = [figure.licence for figure in figures(tmp_path / "out")]
    assert kept == {"research": ["CC BY-NC"], "commercial": [], "any-oa": ["CC BY-NC", "CC BY-ND"]}
    with pytest.raises(InputError, match="no policy"):
        report_of(tmp_path, objects, rows, "out", settings=FetchSettings(policy="all"))


def test_no_more_requests_are_in_flight_than_allowed(tmp_path: Path) -> None:
    objects, rows = many(40)
    with BucketServer(objects, latency_s=0.02) as server:
        fetch_figures(write_list(tmp_path, rows), server.url, tmp_path / "out", limits=StoreLimits(concurrency=5))
        assert server.most_in_flight == 5
        assert server.connections <= 10


def test_the_rate_is_kept(tmp_path: Path) -> None:
    objects, rows = many(10)
    with BucketServer(objects) as server:
        started = time.monotonic()
        fetch_figures(write_list(tmp_path, rows), server.url, tmp_path / "out", limits=StoreLimits(requests_per_s=50))
        assert server.total / (time.monotonic() - started) <= 51


def test_the_report_and_the_progress(tmp_path: Path) -> None:
    objects, rows = many(3)
    events: list[Any] = []
    report = report_of(tmp_path, objects, [*rows, "PMC1"], "out", listen=events.append)
    assert events[-1] == {"done": 4, "total": 4, "by_status": {"article_absent": 1, "ok": 3}}
    assert read_report(tmp_path / "out") == report
    assert report.counts == {"rows": 4, "figures": 3, "figures_with_caption": 3}
    assert report.details["by_licence"] == {"CC BY": 3}


def test_a_run_killed_while_it_puts_its_work_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, rows = many(5)
    path = write_list(tmp_path, rows)
    report_of(tmp_path, objects, rows, "whole")
    with BucketServer(objects) as server:
        for name in ("shards", "outcomes"):
            # Killed before the first folder is moved, then before the second one.
            with monkeypatch.context() as patched:
                patched.setattr("medvlm.data.figures.atomic_folder", killer_of(name))
                with pytest.raises(InterruptedError):
                    fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
        server.requests.clear()
        report = fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
        assert not server.total
    assert report.details["by_status"] == {"ok": 5}
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


def killer_of(name: str) -> Any:
    """An ``atomic_folder`` that dies at one folder."""

    def folder(path: Path) -> Any:
        return stop() if path.name == name else atomic_folder(path)

    return folder


def test_a_scratch_folder_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, rows = many(3)
    real_rename = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if Path(target).name.startswith(".tmp-"):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real_rename(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    report = report_of(tmp_path, objects, rows, "out", scratch=tmp_path / "scratch")
    assert report.counts["figures"] == len(figures(tmp_path / "out")) == 3
    assert not any(path.is_dir() for path in (tmp_path / "scratch").iterdir())


def test_parts_of_another_number_do_not_run_beside_these(tmp_path: Path) -> None:
    with (
        hold_lock(tmp_path / "s", (1, 3)),
        hold_lock(tmp_path / "s", (2, 3)),
        pytest.raises(WorkspaceError),
        hold_lock(tmp_path / "s", (1, 2)),
    ):
        pass
    with (
        hold_lock(tmp_path / "s", (1, 2)),
        pytest.raises(WorkspaceError, match="another fetch"),
        hold_lock(tmp_path / "s", (1, 2)),
    ):
        pass


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_passing_trouble_leaves_no_trace_in_the_shards(tmp_path: Path, seed: int) -> None:
    objects, rows = many(25, media=2)
    report_of(tmp_path, objects, rows, "calm", block_rows=8)
    dice = random.Random(seed)
    kinds = ["reset", "html", "long", "short", "status"]
    faults = {
        key: Fault(dice.choice(kinds), dice.choice([500, 502, 503, 429]), times=dice.choice([1, 2]))
        for key in objects
        if dice.random() < 0.4
    } | {"?list": Fault("reset", times=2)}
    with BucketServer(objects, faults=faults) as server:
        limits = StoreLimits(concurrency=dice.choice([1, 7, 64]), timeout_s=2, attempts=4, backoff_s=0.01)
        report = fetch_figures(tmp_path / "list.jsonl", server.url, tmp_path / "storm", limits=limits, block_rows=8)
    assert report.details["by_status"] == {"ok": 50}
    assert report.metrics["retries"] > 5
    assert shard_bytes(tmp_path / "storm") == shard_bytes(tmp_path / "calm")


def test_a_list_that_has_changed_drops_what_it_no_longer_asks_for(tmp_path: Path) -> None:
    objects, rows = many(4)
    with BucketServer(objects) as server:
        fetch_figures(write_list(tmp_path, rows), server.url, tmp_path / "out", limits=QUICK)
        fetch_figures(write_list(tmp_path, rows[2:]), server.url, tmp_path / "out", limits=QUICK)
    assert [figure.figure_id for figure in figures(tmp_path / "out")] == ["3_F1", "4_F1"]
    assert [row.row for row in outcomes(tmp_path / "out")] == [0, 1]
