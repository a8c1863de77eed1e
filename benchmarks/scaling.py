"""Two processes against one, on one host and on two: sequences per second, and what the network costs.

    python benchmarks/scaling.py [--trials 3] [--steps 12] [--keep rows.jsonl] [--no-hosts]

Every row is a whole `medvlm train` of a LLaVA with random weights whose projector and language model learn under
ZeRO-2, as stage 2 does. *Strong*: the same global batch, shared by two. *Weak*: twice the batch, so that each process
does what the one did. A process has one thread. The two hosts are network namespaces joined by a veth link, each with
an ssh server; DeepSpeed's launcher starts a process on each, and they talk gloo over the link, which `tc` can hold to
a rate. They share the two cores that the others have too: what they add is the network stack, not a second machine.

The rows of a trial follow each other, so that a busy machine is busy for all of them; efficiency is a row's speed over
twice that of one process in the same trial, its speed that of the fastest quarter of the steps after the first two:
slower ones were slowed by something else. Processor time, of the first process times their number, is what remains
comparable on a busy machine. With ``--keep``, trials of earlier calls are read from the file and the new ones added.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "training"))

from two_hosts import ADDRESSES, INTERFACE, Hosts, HostsMissing, two_hosts  # noqa: E402

NAME = "scaled"
BATCH = 16
WARM_UP = 2
NOTE = "MEDVLM_SCALING_NOTE"
"""Where a run's first process writes what ``listen`` saw."""


@dataclass(frozen=True)
class Setup:
    """One way to run the same training."""

    name: str
    processes: int = 2
    batch: int = BATCH
    threads: int = 1
    hosts: bool = False
    rate: str | None = None
    """Of the link, as ``tc`` writes it."""


ONE = Setup("one process", processes=1)
SETUPS = (
    ONE,
    Setup("one process, two threads", processes=1, threads=2),
    Setup("two processes, strong"),
    Setup("two processes, weak", batch=2 * BATCH),
    Setup("two hosts, strong", hosts=True),
    Setup("two hosts, weak", batch=2 * BATCH, hosts=True),
    Setup("two hosts at 1 Gbit/s, strong", hosts=True, rate="1gbit"),
    Setup("two hosts at 100 Mbit/s, strong", hosts=True, rate="100mbit"),
)
Row = dict[str, Any]


def main() -> None:
    """Run the trials and print the tables; exit 1 where two processes do not learn what one learns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of a run")
    parser.add_argument("--hidden", type=int, default=256, help="width of the language model")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--keep", type=Path, help="a file of rows: those in it count, new ones are added")
    parser.add_argument("--only", nargs="+", help="rows by name; one process is always among them")
    parser.add_argument("--no-hosts", action="store_true", help="without the rows that need root and Debian's ssh")
    arguments = parser.parse_args()
    # An end by signal is an orderly one: the hosts are taken away.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rows = read_rows(arguments.keep)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hosts = None
        if arguments.trials and not arguments.no_hosts:
            (folder / "hosts").mkdir()
            try:
                hosts = stack.enter_context(two_hosts(folder / "hosts"))
            except HostsMissing as missing:
                print(f"Without two hosts: {missing}.\n")
        recipe = prepare(folder, arguments.hidden, arguments.layers) if arguments.trials else folder
        first = max((row["trial"] for row in rows), default=-1) + 1
        for trial in range(first, first + arguments.trials):
            for setup in SETUPS:
                if arguments.only and setup.name not in (ONE.name, *arguments.only):
                    continue
                if not setup.hosts or hosts:
                    rows.append({"trial": trial, "setup": setup.name, **run(folder, recipe, setup, hosts, arguments)})
                    if arguments.keep:
                        arguments.keep.write_text("".join(json.dumps(row) + "\n" for row in rows))
    show(rows)
    sys.exit(not same_losses(rows))


def read_rows(path: Path | None) -> list[Row]:
    """The rows of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def prepare(folder: Path, hidden: int, layers: int) -> Path:
    """Write the recipe and the samples."""
    import yaml
    from golden_case import fill_golden

    from medvlm.config import load_recipe
    from medvlm.store import Workspace

    path = folder / f"{NAME}.yaml"
    heads = max(1, hidden // 64)
    decoder = {"hidden_size": hidden, "layers": layers, "heads": heads, "kv_heads": heads, "mlp_size": 3 * hidden}
    stage = {"trains": ["projector", "language_model"], "epochs": 1000, "zero_stage": 2, "learning_rate": 2e-4}
    recipe = {"extends": "tiny-llava-med", "name": NAME, "title": "A model to scale", "benchmarks": ["vqa-rad"]}
    path.write_text(yaml.safe_dump({**recipe, "model": {"language_model": decoder}, "stages": {"align": stage}}))
    fill_golden(Workspace(folder / "workspace"), load_recipe(path))
    return path


def run(folder: Path, recipe: Path, setup: Setup, hosts: Hosts | None, arguments: argparse.Namespace) -> Row:
    """One training: its speed, losses, load of the machine, and what ``listen`` noted."""
    workspace, note = folder / "workspace", folder / "note.json"
    note.unlink(missing_ok=True)
    command = [sys.executable, "-m", "medvlm.cli", "--workspace", str(workspace), "train", "--recipe", str(recipe)]
    command += ["--stage", "1", "--fresh", "--set", "checkpoints.every=1"]
    for field, value in (("max_steps", arguments.steps), ("global_batch", setup.batch), ("micro_batch", BATCH)):
        command += ["--set", f"stages.align.{field}={value}"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": str(setup.threads), "PYTHONPATH": paths}
    environment |= {"MEDVLM_PROGRESS": "scaling:listen", NOTE: str(note)}
    if setup.hosts:
        assert hosts
        hosts.limit(setup.rate)
        lines = [f"{address} slots=1" for address in ADDRESSES]
        environment |= {**hosts.environment, "MEDVLM_LAUNCHER": "hostfile", "MEDVLM_HOSTFILE": hosts.hostfile(*lines)}
        command = hosts.on(0, command)
    else:
        command += ["--processes", str(setup.processes)]
    load = os.getloadavg()[0]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{setup.name} failed:\n{done.stderr[-3000:]}")
    details = json.loads((workspace / "checkpoints" / NAME / "stage1" / "report.json").read_text())["details"]
    speeds = [point["samples_per_second"] for point in details["pace"]["all"][WARM_UP:]]
    speed = statistics.quantiles(speeds, n=8)[-1]  # the middle of the fastest quarter
    losses = [point["loss"] for point in details["curves"]["all"]]
    row = {"speed": speed, "mean_step_s": statistics.fmean(setup.batch / s for s in speeds), "losses": losses}
    print(f"{setup.name}: {row['speed']:.1f} sequences/s, load {load:.1f}", file=sys.stderr, flush=True)
    return row | {"load": round(load, 1), **json.loads(note.read_text())}


_begun: dict[str, float] = {}


def listen(event: Mapping[str, Any]) -> None:
    """Called in the first process of a run: notes the link's bytes and the time in collectives, a step.

    From the first step's end to the last one's: neither start nor saving is in it.
    """
    if "step" not in event:
        return  # the feature cache tells how far it is, too
    import psutil
    from deepspeed import comm

    link = psutil.net_io_counters(pernic=True).get(INTERFACE)
    sent, times = link.bytes_sent if link else 0, psutil.Process().cpu_times()
    spent = times.user + times.system
    if event["step"] == 1:
        comm.configure(enabled=True, prof_all=True, prof_ops=[], verbose=False, debug=False)
        _begun.update(sent=sent, processor_s=spent)
    if event["step"] == event["steps"]:
        logged: Callable[[], dict[str, dict[int, Any]]] = comm.comm.comms_logger.get_raw_data
        steps = event["steps"] - 1
        operations = {
            name: {
                "calls": sum(entry[0] for entry in sizes.values()) / steps,
                "bytes": sum(size * entry[0] for size, entry in sizes.items()) / steps,
                # Each entry is DeepSpeed's timer of that name, which is never set back: the greatest is the sum.
                "ms": max(max(entry[1]) for entry in sizes.values()) / steps,
            }
            for name, sizes in logged().items()
        }
        note = {"sent_bytes": (sent - _begun["sent"]) / steps if link else None, "collectives": operations}
        note["processor_s"] = (spent - _begun["processor_s"]) / steps
        Path(os.environ[NOTE]).write_text(json.dumps(note))


def same_losses(rows: list[Row]) -> bool:
    """Whether every run with the batch of one process has its losses, to 1e-4."""
    strong = {setup.name for setup in SETUPS if setup.batch == BATCH}
    reference = next(row["losses"] for row in rows if row["setup"] == ONE.name)
    return all(
        abs(a - b) < 1e-4
        for row in rows
        if row["setup"] in strong
        for a, b in zip(row["losses"], reference, strict=True)
    )


def show(rows: list[Row]) -> None:
    """Print both tables as Markdown."""
    base = {row["trial"]: row["speed"] for row in rows if row["setup"] == ONE.name}
    print(f"{len(base)} trials, load {min(r['load'] for r in rows):g} to {max(r['load'] for r in rows):g}.\n")
    print("| | batch | sequences/s | speed / one process | efficiency | processor time a sequence |")
    print("|---|---|---|---|---|---|")
    for setup in SETUPS:
        own = [row for row in rows if row["setup"] == setup.name]
        if not own:
            continue
        ratios = [row["speed"] / base[row["trial"]] for row in own]
        cores = max(setup.processes, setup.threads)
        efficiency = f"{statistics.median(ratios) / cores:.0%}" if cores > 1 else ""
        speed = statistics.median(row["speed"] for row in own)
        spent = statistics.median(row["processor_s"] for row in own) * setup.processes / setup.batch
        print(
            f"| {setup.name} | {setup.batch} | {speed:.1f} | {spread(ratios)} | {efficiency} | {spent * 1e3:.1f} ms |"
        )
    print("\n| | sent by a host, a step | in collectives, a step | of a step |\n|---|---|---|---|")
    for setup in SETUPS:
        own = [row for row in rows if row["setup"] == setup.name]
        if not own or setup.processes == 1:
            continue
        spent = [sum(one["ms"] for one in row["collectives"].values()) for row in own]
        shares = [ms / row["mean_step_s"] / 1000 for ms, row in zip(spent, own, strict=True)]
        sent = f"{own[0]['sent_bytes'] / 1e6:.1f} MB" if own[0]["sent_bytes"] is not None else ""
        share = f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
        print(f"| {setup.name} | {sent} | {statistics.median(spent):.0f} ms | {share} |")
    verdict = "met" if same_losses(rows) else "MISSED"
    print(f"\nTarget, the losses of one process in every row with its batch, to 1e-4: {verdict}.")


def spread(values: list[float]) -> str:
    """Median, and least and greatest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
