"""What DVC takes for many figures in few shards, beside one file a figure.

    python benchmarks/dvc_shards.py --figures 100000 --files 10000

Figures are random bytes of a given size: what is measured is bookkeeping and hashing, not decoding. Each way has a
project of its own with a folder as its remote. Exits 1 where ours, for a figure, is not at least 3 times as quick.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

STEPS = ("add", "push", "status", "pull")
LEAST_RATIO = 3.0


def figures(count: int, size: int) -> Iterator[bytes]:
    """Random bytes, the same each time."""
    source = random.Random(0)
    for _ in range(count):
        yield source.randbytes(size)


def write_shards(folder: Path, count: int, size: int) -> int:
    """Write figures as the pipeline does, in shards of a few hundred megabytes; how many shards."""
    from medvlm.records import Image, PreferencePair
    from medvlm.store import shard_paths, write_records

    def records() -> Iterator[PreferencePair]:
        for number, data in enumerate(figures(count, size)):
            yield PreferencePair(f"{number}", Image(data, "a.jpg"), "", "", "", "", "", "", "bench")

    write_records(folder, PreferencePair, records())
    return len(shard_paths(folder))


def write_files(folder: Path, count: int, size: int) -> int:
    """Write one file a figure; how many files."""
    folder.mkdir(parents=True)
    for number, data in enumerate(figures(count, size)):
        (folder / f"{number}.jpg").write_bytes(data)
    return count


def measure(project: Path, write: object, count: int, size: int) -> tuple[int, dict[str, float]]:
    """Seconds of each step of DVC for these figures, and how many files they are."""
    project.mkdir()
    dvc(project, "init", "--no-scm", "-q")
    dvc(project, "remote", "add", "-d", "store", str(project.parent / f"{project.name}-remote"))
    files = write(project / "data", count, size)  # type: ignore[operator]
    found: dict[str, float] = {}
    found["add"] = dvc(project, "add", "-q", "data")
    found["push"] = dvc(project, "push", "-q")
    found["status"] = dvc(project, "status", "-q")
    subprocess.run(["rm", "-rf", "data", ".dvc/cache"], cwd=project, check=True)
    found["pull"] = dvc(project, "pull", "-q")
    return files, found


def dvc(folder: Path, *words: str) -> float:
    """Seconds of a DVC command in a process of its own."""
    began = time.monotonic()
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, env=environment, check=True, capture_output=True)
    return time.monotonic() - began


@click.command()
@click.option("--figures", "count", default=100_000, show_default=True, help="In shards.")
@click.option("--files", "singles", default=10_000, show_default=True, help="One file each: fewer, as it takes long.")
@click.option("--size", default=2_000, show_default=True, help="Bytes of a figure.")
def main(count: int, singles: int, size: int) -> None:
    """Print both ways and the ratio of the time for a figure."""
    with tempfile.TemporaryDirectory() as made:
        shards, ours = measure(Path(made) / "shards", write_shards, count, size)
        files, theirs = measure(Path(made) / "files", write_files, singles, size)
    print(f"| step | {count:,} figures in {shards} shards | {files:,} files | a figure as file / in a shard |")
    print("| --- | --- | --- | --- |")
    ratios: list[float] = []
    for step in STEPS:
        ratios.append(theirs[step] / singles / (ours[step] / count))
        print(f"| {step} | {ours[step]:.1f} s | {theirs[step]:.1f} s | {ratios[-1]:.0f} |")
    print(f"{size} bytes a figure; load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    sys.exit(min(ratios) < LEAST_RATIO)


if __name__ == "__main__":
    main()
