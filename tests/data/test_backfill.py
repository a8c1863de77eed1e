"""Several parts of a list are fetched at once by runs of their own; `fetch` then puts them in place, asking nothing."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from bucket_server import BucketServer
from fetch_case import many, write_list

from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from medvlm.store import Workspace, read_report
from orchestration.instance import ensure_home

ROWS = 45
PARTS = [f"list.jsonl:{part}-of-3" for part in (1, 2, 3)]


@pytest.mark.timeout(600)
def test_three_parts_at_once_leave_nothing_to_fetch(tmp_path: Path) -> None:
    import dagster as dg

    objects, rows = many(ROWS)
    (tmp_path / "inbox").mkdir()
    listed = write_list(tmp_path / "inbox", rows)
    urls = listed.rename(tmp_path / "list.jsonl")
    home = ensure_home(tmp_path / "home").parent
    with BucketServer(objects, latency_s=0.02) as server:
        sample = Settings.sample()
        figures = sample.figures.model_copy(update={"urls": urls.name, "store": server.url})
        write_settings(tmp_path / "params.yaml", with_items(sample.model_copy(update={"figures": figures})))
        environment = {**os.environ, "DAGSTER_HOME": str(home), "MEDVLM_PROJECT": str(tmp_path)}
        with dg.DagsterInstance.from_config(str(home)) as instance:
            instance.add_dynamic_partitions("list_parts", PARTS)
        command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "orchestration.definitions"]
        running = [
            subprocess.Popen(
                [*command, "-j", "fetch_parts", "--tags", json.dumps({"dagster/partition": part})],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for part in PARTS
        ]  # fmt: skip
        said = [process.communicate(timeout=500)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0, 0], "\n".join(said)[-4000:]

        with dg.DagsterInstance.from_config(str(home)) as instance:
            key = dg.AssetKey("figure_parts")
            assert instance.get_materialized_partitions(key) == set(PARTS)
            stats = [instance.get_run_stats(run.run_id) for run in instance.get_runs()]
        assert max(s.start_time for s in stats) < min(s.end_time for s in stats), "they ran beside each other"

        before = Counter(server.requests)
        fetch = [sys.executable, "-m", "medvlm.cli", "--workspace", str(tmp_path / "workspace"), "fetch"]
        fetch += ["--urls", str(urls), "--store", server.url, "--policy", figures.policy]
        done = subprocess.run(fetch, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        again = Counter(server.requests) - before
        assert not [name for name in again if name.endswith(".jpg")], "no figure is asked for again"
    report = read_report(Workspace(tmp_path / "workspace").figures)
    assert report is not None
    assert report.details["by_status"] == {"ok": ROWS}
