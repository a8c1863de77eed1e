"""`make bench` runs every script, each says how it is used, and what they print gets into the README."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
README = """# Speed benchmarks

Words of people.

## Good

What people say of it.

## Bad

| an old table |

## Unasked

Left alone.
"""


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = load(FOLDER / "run.py")


def test_make_bench_runs_every_script() -> None:
    assert set(SCRIPTS) - {"run"} <= set(bench.BENCHMARKS), "add it to BENCHMARKS of benchmarks/run.py"
    makefile = (REPOSITORY / "Makefile").read_text()
    assert "\nbench:" in makefile and "python benchmarks/run.py" in makefile


def test_every_script_says_how_it_is_used() -> None:
    # All at once: importing torch and its like takes some of them seconds.
    running = {
        name: subprocess.Popen(
            [sys.executable, str(FOLDER / f"{name}.py"), "--help"],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in SCRIPTS
    }
    for name, process in running.items():
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {errors}"
        assert output.lower().startswith("usage:") and f"{name}.py" in output


def script(folder: Path, name: str, body: str) -> None:
    (folder / f"{name}.py").write_text(body)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    script(tmp_path, "good", "import sys\nprint('| a |\\n|---|\\n| ' + ' '.join(sys.argv[1:]) + ' |')")
    script(tmp_path, "bad", "raise ValueError('no such tower')")
    script(tmp_path, "missed", "import sys\nprint('target 3 x: MISSED')\nsys.exit(1)")
    return tmp_path


def section(readme: Path, title: str) -> str:
    return readme.read_text().split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_outputs_get_into_the_readme_and_a_failure_is_named(folder: Path) -> None:
    readme = folder / "README.md"
    benchmarks = {
        "good": bench.Benchmark("Good", (("--fast",), ("{data}/x", "{scratch}"))),
        "bad": bench.Benchmark("Bad"),
        "missed": bench.Benchmark("Missed"),
        "absent": bench.Benchmark("Absent", needs=("slake",)),
    }
    failed = bench.collect(benchmarks, folder, folder / "data", timeout_s=60)

    assert failed == ["bad", "absent"]
    head = readme.read_text().split("## Good")[0]
    assert "Words of people." in head and "- Machine: " in head and f"Python {sys.version.split()[0]}" in head
    good = section(readme, "Good")
    assert "What people say of it." in good and "| --fast |" in good and f"| {folder / 'data'}/x " in good
    assert "    python benchmarks/good.py --fast\n" in good
    assert "    python benchmarks/good.py DATA/x SCRATCH\n" in good
    bad = section(readme, "Bad")
    assert "| an old table |" in bad and "exit code 1: `ValueError: no such tower`" in bad
    assert "Left alone." in section(readme, "Unasked")
    missed = section(readme, "Missed")
    assert "a target was missed" in missed and "```text\ntarget 3 x: MISSED\n```" in missed
    assert f"there is no {folder / 'data' / 'slake'}" in section(readme, "Absent")


def test_a_later_run_replaces_numbers_and_a_later_failure_keeps_them(folder: Path) -> None:
    readme, good = folder / "README.md", {"good": bench.Benchmark("Good", (("first",),))}
    assert bench.collect(good, folder, folder, timeout_s=60) == []
    assert bench.collect({"good": bench.Benchmark("Good", (("second",),))}, folder, folder, timeout_s=60) == []
    assert "| second |" in section(readme, "Good") and "first" not in section(readme, "Good")

    script(folder, "good", "import sys\nsys.exit(3)")
    for _ in range(2):
        assert bench.collect(good, folder, folder, timeout_s=60) == ["good"]
        assert "| second |" in section(readme, "Good") and section(readme, "Good").count("**Failed on ") == 1

    script(folder, "good", "print('| third |')")
    assert bench.collect(good, folder, folder, timeout_s=60) == []
    assert "| third |" in section(readme, "Good") and "Failed" not in section(readme, "Good")
    assert readme.read_text().count("- Machine: ") == 1


def test_a_run_that_hangs_is_ended(folder: Path) -> None:
    script(folder, "good", "import threading\nthreading.Event().wait()")
    assert bench.collect({"good": bench.Benchmark("Good")}, folder, folder, timeout_s=0.5) == ["good"]
    assert "ran out of time" in section(folder / "README.md", "Good")


def test_the_tables_of_the_scaling_document_are_those_of_the_plan() -> None:
    document = REPOSITORY / "docs" / "scaling.md"
    tables = load(REPOSITORY / "scripts" / "scaling_tables.py")
    assert tables.with_tables(document.read_text()) == document.read_text(), "run: python scripts/scaling_tables.py"
