"""How long 600,000 rows take under a contract: ours, and the same twelve rules in pandera and in raw DuckDB.

    python benchmarks/contracts.py [--rows 600000]

Each engine runs in a process of its own, so that its memory is its own. "ours" is the whole command
`python -m data_contracts alignment`: start-up, 24 checks, pictures included. The peers judge twelve
column rules of the same contract, on the same narrow columns, and nothing else. pandera and polars
are not dependencies of this project: `pip install pandera polars` to have them compared.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

TARGET_S, TARGET_MB = 20.0, 2048
PNG_SIDE = 32
RULES = 12


def main() -> None:
    """Compare all engines, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--frame", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        broken = ENGINES[arguments.engine](arguments.frame)
        assert broken == [0] * RULES, f"the made-up rows are sound, yet {arguments.engine} finds {broken}"
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), arguments.rows)


def compare(folder: Path, rows: int) -> None:
    """Print a line an engine; exit 1 if ours misses its target."""
    frame = write_rows(folder, rows)
    print(f"{rows:,} alignment samples; seconds and peak memory of the whole process")
    ours_s, ours_cpu, ours_mb = measure("-m", "data_contracts", "alignment", "--workspace", str(folder))
    print(f"  {'ours: whole contract, 24 checks':44} {ours_s:6.1f} s {ours_cpu:6.1f} s cpu {ours_mb:6.0f} MB")
    for name, engine in ENGINES.items():
        if name == "pandera" and not (importlib.util.find_spec("pandera") and importlib.util.find_spec("polars")):
            print(f"  {'pandera on polars, 12 rules':44} not installed")
            continue
        seconds, cpu, megabytes = measure(__file__, "--engine", name, "--frame", str(frame))
        label = f"{(engine.__doc__ or '').splitlines()[0]}"
        ratio = f"ours / this: {ours_s / seconds:.1f}"
        print(f"  {label:44} {seconds:6.1f} s {cpu:6.1f} s cpu {megabytes:6.0f} MB   {ratio}")
    met = ours_s < TARGET_S and ours_mb < TARGET_MB
    print(f"target under {TARGET_S:g} s and {TARGET_MB} MB: {'met' if met else 'MISSED'}")
    sys.exit(not met)


def measure(*arguments: str) -> tuple[float, float, float]:
    """Seconds, seconds of processor time, and peak MB of a Python process."""
    watcher = (
        "import resource, subprocess, sys, time; t = time.monotonic();"
        "p = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL); s = time.monotonic() - t;"
        "u = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(s, u.ru_utime + u.ru_stime, u.ru_maxrss / 1024); sys.exit(p.returncode)"
    )
    run = subprocess.run([sys.executable, "-c", watcher, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    seconds, processor, megabytes = map(float, run.stdout.split())
    return seconds, processor, megabytes


def write_rows(root: Path, rows: int) -> Path:
    """Sound samples as the alignment step writes them, and the contract's narrow columns as one Parquet file."""
    import duckdb
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from data_contracts.alignment import CONTRACT
    from medvlm.records import Sample, schema_of
    from medvlm.store import Workspace

    buffer = io.BytesIO()
    Image.new("L", (PNG_SIDE, PNG_SIDE)).save(buffer, "PNG")
    pictures = [buffer.getvalue() + bytes([i]) for i in range(256)]
    digests = [hashlib.sha256(picture).hexdigest() for picture in pictures]
    folder = Workspace(root).samples("alignment")
    folder.mkdir(parents=True)
    schema = schema_of(Sample)
    lengths = np.random.default_rng(0).integers(5, 120, rows)
    with pq.ParquetWriter(folder / "part-00000.parquet", schema, compression="zstd") as writer:
        for start in range(0, rows, 20_000):
            part = range(start, min(start + 20_000, rows))
            table = {
                "sample_id": [f"{i}_F1" for i in part],
                "dataset": ["alignment"] * len(part),
                "image": [{"bytes": pictures[i % 256], "path": "f.png"} for i in part],
                "image_sha256": [digests[i % 256] for i in part],
                "image_phash": [f"{i:016x}" for i in part],
                "group_id": [f"PMC{i % 256}" for i in part],
                "turns": [
                    [
                        {"role": "user", "text": "Describe the image.\n<image>"},
                        {"role": "assistant", "text": f"Figure {i}: " + "a finding " * int(lengths[i])},
                    ]
                    for i in part
                ],
                "modality": ["ct"] * len(part),
                "language": ["en"] * len(part),
                "licence": ["CC BY"] * len(part),
                "source": ["caption"] * len(part),
            }
            writer.write_table(pa.table(table, schema=schema))
    frame = root / "frame.parquet"
    database = duckdb.connect(":memory:")
    database.read_parquet(str(folder / "*.parquet")).create_view("samples")
    database.execute(f"COPY ({CONTRACT.frame}) TO '{frame}'")
    return frame


# Column, and what holds for it, twelve times: the column rules of the contract.
SETS = {
    "dataset": ["alignment"],
    "language": ["en", "zh"],
    "script_language": ["en/en", "zh/zh"],
    "modality": ["chest_xray", "ct", "mri", "histology", "gross", "unknown"],
}
PATTERNS = {
    "roles": r"^user,assistant$",
    "source": r"^(caption|official|review|generated-offline|generated:.+)$",
    "group_id": r"^\S",
    "image_sha256": r"^[0-9a-f]{64}$",
    "image_phash": r"^[0-9a-f]{16}$",
}
BOUNDS = {"slots_first": (1, 1), "shortest_turn": (1, 20_000), "longest_turn": (1, 20_000)}


def great_expectations(frame: Path) -> list[int]:
    """Great Expectations on pandas, 12 rules"""
    import pandas as pd

    from data_contracts.contract import between, in_set, matches
    from data_contracts.expectations import validate

    rules = [in_set(c, c, c, tuple(v)) for c, v in SETS.items()]
    rules += [matches(c, c, c, p) for c, p in PATTERNS.items()]
    rules += [between(c, c, c, low, high) for c, (low, high) in BOUNDS.items()]
    columns = ["row_id", *SETS, *PATTERNS, *BOUNDS]
    _, broken = validate("benchmark", pd.read_parquet(frame, columns=columns), rules)
    return [len(rows) for rows in broken.values()]


def pandera(frame: Path) -> list[int]:
    """pandera on polars, 12 rules"""
    import pandera.polars as pa
    import polars as pl

    columns = {c: pa.Column(str, pa.Check.isin(v)) for c, v in SETS.items()}
    columns |= {c: pa.Column(str, pa.Check.str_matches(p)) for c, p in PATTERNS.items()}
    columns |= {c: pa.Column(pl.Int64, pa.Check.in_range(*b)) for c, b in BOUNDS.items()}
    pa.DataFrameSchema(columns).validate(pl.read_parquet(frame, columns=list(columns)), lazy=True)
    return [0] * RULES


def raw_duckdb(frame: Path) -> list[int]:
    """DuckDB SQL by hand, 12 rules"""
    import duckdb

    counts = [f"count(*) FILTER ({c} NOT IN ({', '.join(repr(v) for v in values)}))" for c, values in SETS.items()]
    counts += [f"count(*) FILTER (NOT regexp_matches({c}, '{p}'))" for c, p in PATTERNS.items()]
    counts += [f"count(*) FILTER ({c} NOT BETWEEN {low} AND {high})" for c, (low, high) in BOUNDS.items()]
    row = duckdb.connect(":memory:").execute(f"SELECT {', '.join(counts)} FROM '{frame}'").fetchone()
    assert row is not None
    return [int(value) for value in row]


ENGINES: dict[str, Callable[[Path], list[int]]] = {
    "great_expectations": great_expectations,
    "pandera": pandera,
    "duckdb": raw_duckdb,
}


if __name__ == "__main__":
    main()
