"""How fast figures are fetched, against img2dataset and the script that LLaVA-Med published.

    python benchmarks/fetch.py speed  [--figures 2001] [--img2dataset PATH] [--real-data FOLDER]
    python benchmarks/fetch.py memory [--rows 721154]

``speed`` serves real figures (from the test data, repeated) over HTTP on loopback, three to an
article, with 0 and 50 ms of injected latency a round trip, and lets each contender fetch all of
them in a process of its own. ``memory`` runs a list as long as LLaVA-Med's against a bucket that
has none of its articles.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "data"))

from bucket_server import BucketServer, article, jats, llava_row  # noqa: E402

FIGURES_PER_ARTICLE = 3
XML_BYTES = 88_000
"""Mean size of the six real articles in the test data."""
MEMORY_TARGET_MB = 1000
SERIAL_ROWS = 150
"""The serial script takes minutes; its speed does not depend on the number of rows."""

SERIAL = """
import json, os, shutil, sys, tarfile, urllib.request
# What LLaVA-Med's download_images.py does: for each row, the article's package, then its members, then a copy.
rows = [json.loads(line) for line in open(sys.argv[1])]
out = sys.argv[2]
os.makedirs(out + "/images", exist_ok=True)
for row in rows:
    urllib.request.urlretrieve(row["pmc_tar_url"], os.path.join(out, os.path.basename(row["pmc_tar_url"])))
for row in rows:
    with tarfile.open(os.path.join(out, os.path.basename(row["pmc_tar_url"])), "r:gz") as tar:
        tar.extractall(out, filter="data")
for row in rows:
    shutil.copyfile(os.path.join(out, row["image_file_path"]), os.path.join(out, "images", row["pair_id"] + ".jpg"))
"""


@dataclass
class Run:
    """What one contender needed."""

    name: str
    figures: int
    seconds: float
    cpu_s: float
    peak_mb: float
    requests: int


def make_bucket(figures: int, pictures: list[bytes]) -> tuple[dict[str, bytes], list[tuple[str, str, str]]]:
    """Objects of a bucket, old packages included, and (pmcid, file, pair id) of every figure."""
    objects: dict[str, bytes] = {}
    rows: list[tuple[str, str, str]] = []
    filler = "<p>" + "The liver was of normal size and density in every one of the patients. " * 12 + "</p>"
    for n in range(-(-figures // FIGURES_PER_ARTICLE)):
        pmcid = f"PMC{7_000_000 + 31 * n}"
        names = [f"paper-{n}-g{k:03d}.jpg" for k in range(1, FIGURES_PER_ARTICLE + 1)]
        media = {name: pictures[(n * FIGURES_PER_ARTICLE + k) % len(pictures)] for k, name in enumerate(names)}
        stems = [name.rsplit(".", 1)[0] for name in names]
        xml = jats(pmcid, n + 1, stems, body=filler * (XML_BYTES // len(filler)))
        objects |= article(pmcid, media, pmid=n + 1, xml=xml)
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as tar:
            for name, content in {f"paper-{n}.nxml": xml, **media}.items():
                info = tarfile.TarInfo(f"{pmcid}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        objects[f"oa_package/{pmcid}.tar.gz"] = stream.getvalue()
        rows += [(pmcid, name, f"{n + 1}_F{k}") for k, name in enumerate(names, 1)]
    return objects, rows[:figures]


def serve(pipe: Connection, figures: int, pictures: list[bytes], latency_s: float) -> None:
    """Serve in a process of its own; answers each message with the number of requests so far."""
    objects, rows = make_bucket(figures, pictures)
    with BucketServer(objects, latency_s=latency_s) as server:
        for name in server.objects:
            server._etag(name)
        pipe.send((server.url, rows))
        while pipe.recv() is not None:
            pipe.send(server.total)


def serve_nothing(pipe: Connection) -> None:
    """Serve a bucket with one article that nobody asks for."""
    with BucketServer(article("PMC1", {})) as server:
        pipe.send(server.url)
        while pipe.recv() is not None:
            pipe.send(server.total)


def measured(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, float, float, str]:
    """Wall seconds, CPU seconds, peak MB over the process and its children, and its output."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, env={**os.environ, **(environment or {})}, cwd=tempfile.gettempdir()
        )
        peak = 0.0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, tree_mb(process.pid))
            time.sleep(0.05)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command[:4])} failed:\n{errors.read()[-3000:]}")
        return seconds, usage.ru_utime + usage.ru_stime, peak, output.read()


def tree_mb(pid: int) -> float:
    """Resident memory of a process and its descendants, in MB."""
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            todo += [int(c) for c in Path(f"/proc/{one}/task/{one}/children").read_text().split()]
        except (OSError, ValueError, IndexError):
            continue
    return total / 1e6


def speed(arguments: argparse.Namespace) -> None:
    """Print the table of contenders at each latency."""
    figures: int = arguments.figures
    files = sorted((arguments.real_data / "pmc_mirror").rglob("*.jpg"))
    pictures = [data for path in files if len(data := path.read_bytes()) not in {0, 262144}]
    mean_kb = sum(map(len, pictures)) / len(pictures) / 1000
    print(f"{figures:,} figures of {mean_kb:.0f} KB on average, {FIGURES_PER_ARTICLE} to an article; {machine()}\n")
    missed = False
    for latency_ms in arguments.latency:
        pipe, far = multiprocessing.Pipe()
        server = multiprocessing.Process(target=serve, args=(far, figures, pictures, latency_ms / 1000), daemon=True)
        server.start()
        url, rows = pipe.recv()
        runs = [run for run in contenders(arguments, url, rows, pipe) if run]
        pipe.send(None)
        server.join()
        serial = runs[-1]
        print(f"### {latency_ms:g} ms\n")
        print("| contender | figures/s | per core | requests/figure | peak MB | CPU ms/figure | x serial |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for run in runs:
            rate = run.figures / run.seconds
            cores = run.figures / run.cpu_s
            print(
                f"| {run.name} | {rate:.1f} | {cores:.0f} | {run.requests / run.figures:.2f} | {run.peak_mb:.0f} "
                f"| {1000 * run.cpu_s / run.figures:.1f} | {rate * serial.seconds / serial.figures:.1f} |"
            )
        print(flush=True)
        missed |= judged(runs, latency_ms)
    sys.exit(1 if missed else 0)


def judged(runs: list[Run], latency_ms: float) -> bool:
    """Print each target as held or missed; whether one was missed."""
    rate = {run.name: run.figures / run.seconds for run in runs}
    requests = {run.name: run.requests / run.figures for run in runs}
    targets = [
        ("at most 1.5 requests a figure, with captions", requests["medvlm fetch"] <= 1.5),
        ("at most 1.5 requests a figure, images alone", requests["medvlm fetch --no-captions"] <= 1.5),
    ]
    if latency_ms >= 50:
        targets.append(("100 times the serial script", rate["medvlm fetch"] >= 100 * rate["serial script"]))
        if "img2dataset" in rate:
            targets.append(("as fast as img2dataset", rate["medvlm fetch"] >= rate["img2dataset"]))
    for name, held in targets:
        print(f"- {'held' if held else 'MISSED'}: {name}")
    print(flush=True)
    return not all(held for _, held in targets)


def contenders(
    arguments: argparse.Namespace, url: str, rows: list[tuple[str, str, str]], pipe: Connection
) -> list[Run]:
    """Run each contender after the other on the same server; the serial script comes last."""
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        plain = [json.loads(llava_row(*row)) | {"pmc_tar_url": f"{url}/oa_package/{row[0]}.tar.gz"} for row in rows]
        (home / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
        (home / "serial.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain[:SERIAL_ROWS]))
        (home / "urls.txt").write_text("".join(f"{url}/{pmcid}.1/{name}\n" for pmcid, name, _ in rows))
        ours = [
            sys.executable,
            "-m",
            "medvlm.cli",
            "fetch",
            "--urls",
            str(home / "list.jsonl"),
            "--store",
            url,
            "--json",
        ]
        commands: list[tuple[str, list[str], int]] = [
            ("medvlm fetch", [*ours, "--out", str(home / "a")], len(rows)),
            ("medvlm fetch --no-captions", [*ours, "--no-captions", "--out", str(home / "b")], len(rows)),
        ]
        if arguments.img2dataset:
            peer = [
                str(arguments.img2dataset), "--url_list", str(home / "urls.txt"), "--output_format", "parquet",
                "--processes_count", str(os.cpu_count()), "--thread_count", "64", "--resize_mode", "no",
                "--number_sample_per_shard", "500", "--retries", "2",
            ]  # fmt: skip
            commands += [
                ("img2dataset", [*peer, "--output_folder", str(home / "c")], len(rows)),
                (
                    "img2dataset, bytes as they are",
                    [*peer, "--disable_all_reencoding", "True", "--output_folder", str(home / "d")],
                    len(rows),
                ),
            ]
        serial = [sys.executable, "-c", SERIAL, str(home / "serial.jsonl"), str(home / "e")]
        commands.append(("serial script", serial, min(SERIAL_ROWS, len(rows))))
        for name, command, count in commands:
            before = asked(pipe)
            seconds, cpu, peak, output = measured(command, {"NO_ALBUMENTATIONS_UPDATE": "1"})
            check(name, output, home, count)
            runs.append(Run(name, count, seconds, cpu, peak, asked(pipe) - before))
    return runs


def check(name: str, output: str, home: Path, count: int) -> None:
    """Make sure that a contender fetched everything."""
    import pyarrow.parquet as pq

    if name.startswith("medvlm"):
        assert json.loads(output)["by_status"] == {"ok": count}, output
    elif name.startswith("img2dataset"):
        folder = home / ("d" if "bytes" in name else "c")
        statuses = [
            s
            for path in folder.glob("*.parquet")
            for s in pq.read_table(path, columns=["status"])["status"].to_pylist()
        ]
        assert statuses.count("success") == count, statuses[:20]
    else:
        assert len(list((home / "e" / "images").iterdir())) == count


def asked(pipe: Connection) -> int:
    """Requests that the server has answered so far."""
    pipe.send("?")
    return pipe.recv()


def memory(arguments: argparse.Namespace) -> None:
    """Print time and peak memory of a list whose articles are all absent."""
    pipe, far = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve_nothing, args=(far,), daemon=True)
    server.start()
    url = pipe.recv()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.jsonl"
        with path.open("w") as stream:
            for n in range(arguments.rows):
                pmcid = f"PMC{3_000_000 + (n * 7919) % 240_000 * 19}"
                stream.write(llava_row(pmcid, f"file-{n}-g001.jpg", f"{10_000_000 + n}_F1") + "\n")
        command = [sys.executable, "-m", "medvlm.cli", "fetch", "--urls", str(path), "--store", url, "--json"]
        seconds, cpu, peak, output = measured([*command, "--out", str(Path(folder) / "out")])
        print(json.dumps(json.loads(output)["by_status"]))
        print(
            f"{arguments.rows:,} rows: {seconds:.0f} s, {cpu:.0f} s of CPU, peak {peak:.0f} MB, "
            f"{asked(pipe):,} requests; {machine()}"
        )
    pipe.send(None)
    if peak > MEMORY_TARGET_MB:
        sys.exit(f"MISSED: at most {MEMORY_TARGET_MB} MB")


def machine() -> str:
    """The machine in a line."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, {model}, Python {platform.python_version()}, load {load:.1f} at the start"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    fast = verbs.add_parser("speed")
    fast.add_argument("--figures", type=int, default=2001)
    fast.add_argument("--latency", type=float, nargs="*", default=[0.0, 50.0], help="in ms")
    fast.add_argument("--img2dataset", type=Path, help="the peer's command, in an environment of its own")
    fast.add_argument("--real-data", type=Path, default=ROOT.parent / "shared" / "data")
    fast.set_defaults(run=speed)
    long = verbs.add_parser("memory")
    long.add_argument("--rows", type=int, default=721_154)
    long.set_defaults(run=memory)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
