"""Runs the benchmarks and writes what they print, with the machine and the versions, into benchmarks/README.md.

    python benchmarks/run.py [NAME …] [--data FOLDER] [--timeout-s 3600]      # or: make bench
    python benchmarks/run.py --list

A section of the README is prose that people write, and a block between two marks that this program writes anew; a
section that is not there yet is added. The README is written after each benchmark. One that breaks, or whose data is
not there, leaves the numbers of its last run in their place and is named, there and at the end (exit code 1). A script
that misses a target prints its numbers and exits with 1: that is a result, not a failure.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("MEDVLM_TEST_DATA", HERE.parents[1] / "shared" / "data"))
TIME_IS_UP = 124
"""The exit code of a run that was ended, as of timeout(1)."""
GRACE_S = 20.0
PACKAGES = (
    "torch", "transformers", "deepspeed", "tokenizers", "numpy", "pyarrow", "duckdb", "pandas", "great_expectations",
    "dagster", "dvc", "aiohttp", "fastapi", "openai", "faiss-cpu", "pandera", "polars",
)  # fmt: skip
"""Those that are installed are named; the last ones are peers and no dependencies."""


@dataclass(frozen=True)
class Benchmark:
    """One script, and how it is run here.

    In the options, ``{data}`` is the folder of real data, ``{scratch}`` one that is gone afterwards, and ``{model}``
    the trained checkpoint that was named, or else a folder in the latter.
    """

    title: str
    runs: tuple[tuple[str, ...], ...] = ((),)
    """Options of each run, one after the other; sized for two cores and some minutes."""
    needs: tuple[str, ...] = ()
    """Files or folders of the real data."""

    def missing(self, data: Path) -> list[str]:
        """What it needs and is not there."""
        return [str(data / name) for name in self.needs if not (data / name).exists()]


BENCHMARKS = {
    "train": Benchmark("Train", (("--data", "{data}"),), needs=("vqa-rad", "slake/Slake1.0", "llava-med")),
    "scaling": Benchmark("Scaling"),
    "overheads": Benchmark("Overheads"),
    "dvc_shards": Benchmark("DVC and many figures"),
    "contracts": Benchmark("Contracts"),
    "leakage": Benchmark("Leakage"),
    "fetch": Benchmark(
        "Fetch",
        (("speed", "--figures", "2001", "--latency", "50", "--real-data", "{data}"), ("memory",)),
        needs=("pmc_mirror",),
    ),
    "predict": Benchmark(
        "Predict",
        (
            ("model", "{model}", "--set", "decoding.max_new_tokens=3"),
            *(
                ("run", "{model}", "--slake", "{data}/slake/Slake1.0", "--part", f"{n}/4", "--out", "{scratch}/parts")
                for n in range(1, 5)
            ),
            ("sum", "{scratch}/parts"),
        ),
        needs=("slake/Slake1.0",),
    ),
    "moe": Benchmark("Mixture of experts", (("--tokens", "1024", "--trials", "5"),)),
    "serve": Benchmark("Serve", (("--requests", "32"),)),
    "dashboard": Benchmark("Dashboard"),
}
"""Every script of this folder but this one; a test sees to it."""


def main() -> None:
    """Run what is asked for, or all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Of {', '.join(BENCHMARKS)}; without any: all.")
    parser.add_argument("--data", type=Path, default=DATA, help="The real data; MEDVLM_TEST_DATA names it too.")
    parser.add_argument(
        "--model", type=Path, help="A trained smol-llava-med for predict; else one of random projector."
    )
    parser.add_argument("--timeout-s", type=float, default=3600, help="After these a run is ended and has failed.")
    parser.add_argument("--list", action="store_true", help="Print the commands and run nothing.")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    chosen = [name for name in BENCHMARKS if name in arguments.names or not arguments.names]
    if not arguments.names:
        chosen = [name for name in chosen if (HERE / f"{name}.py").exists()]
    if arguments.list:
        for name in chosen:
            print("\n".join(written(name, options) for options in BENCHMARKS[name].runs))
        return
    benchmarks = {name: BENCHMARKS[name] for name in chosen}
    failed = collect(benchmarks, HERE, arguments.data, timeout_s=arguments.timeout_s, model=arguments.model)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their last numbers are kept in {HERE / 'README.md'}")


def collect(
    benchmarks: dict[str, Benchmark], folder: Path, data: Path, *, timeout_s: float, model: Path | None = None
) -> list[str]:
    """Run benchmarks and write each into the README when it is done.

    Args:
        benchmarks: By the name of their script.
        folder: With the scripts and ``README.md``.
        data: The real data.
        timeout_s: Of one run.
        model: A trained checkpoint.

    Returns:
        The names of those that failed.
    """
    readme, failed = folder / "README.md", []
    readme.write_text(with_block(readme.read_text(), "machine", machine()))
    for name, benchmark in benchmarks.items():
        text = readme.read_text()
        missing = benchmark.missing(data)
        if missing:
            outcome, good = f"**Did not run on {today()}**: there is no {', '.join(missing)}.", False
        else:
            outcome, good = outcome_of(name, benchmark, folder, data, timeout_s, model)
        if not good:
            failed.append(name)
            before = re.sub(r"\n*\*\*(Failed|Did not run) on .*", "", block(text, name), flags=re.DOTALL)
            outcome = f"{before}\n\n{outcome}".strip()
        # Others may have written into the README in the meantime.
        readme.write_text(with_block(readme.read_text(), name, outcome, title=benchmark.title))
    return failed


def outcome_of(
    name: str, benchmark: Benchmark, folder: Path, data: Path, timeout_s: float, model: Path | None
) -> tuple[str, bool]:
    """What a benchmark's runs printed as Markdown, and whether all of them came to their end."""
    printed: list[str] = []
    load, started, missed = os.getloadavg()[0], time.monotonic(), False
    with tempfile.TemporaryDirectory() as scratch:
        for options in benchmark.runs:
            command = written(name, options)
            print(command, file=sys.stderr, flush=True)
            filled = [word.format(data=data, scratch=scratch, model=model or f"{scratch}/model") for word in options]
            code, output, errors = ended(
                [sys.executable, str(folder / f"{name}.py"), *filled], folder.parent, timeout_s
            )
            # 1 says that a target was missed; Python exits with it too, where a script breaks.
            told = code == 1 and output.strip() and "Traceback (most recent call last)" not in errors
            if code and not told:
                reason = next((line for line in reversed(errors.splitlines()) if line.strip()), "it printed nothing")
                print(errors[-3000:], file=sys.stderr)
                how = "ran out of time" if code == TIME_IS_UP else f"exit code {code}"
                return f"**Failed on {today()}**: `{command}`, {how}: `{reason.strip()[:300]}`", False
            missed |= bool(code)
            printed.append(f"    {command}\n\n{markdown(output)}")
    seconds = time.monotonic() - started
    when = f"Run on {today()}, {seconds:.0f} s, load {load:.1f} at the start"
    return "\n\n".join([f"{when}{'; **a target was missed**' if missed else ''}.", *printed]), True


def ended(command: Sequence[str], folder: Path, timeout_s: float) -> tuple[int, str, str]:
    """Exit code, output and errors of a command; it and its children are ended when time is up."""
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        output, errors = stopped(process)
        return TIME_IS_UP, output, errors
    except BaseException:
        stopped(process)
        raise
    return process.returncode, output, errors


def stopped(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a process and its children, with time to tidy up; what it had printed."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


def written(name: str, options: Sequence[str]) -> str:
    """A run as one would type it."""
    words = [word.format(data="DATA", scratch="SCRATCH", model="MODEL") for word in options]
    return shlex.join(["python", f"benchmarks/{name}.py", *words])


def markdown(output: str) -> str:
    """Output as it is where it holds a table or a list, else as a block of text."""
    output = output.strip("\n")
    if re.search(r"^(\||- |#+ )", output, flags=re.MULTILINE):
        # Headings of a script stand below that of its section.
        return re.sub(r"^#{1,3} ", "### ", output, flags=re.MULTILINE)
    return f"```text\n{output}\n```" if output else ""


def machine() -> str:
    """The machine and the versions, as a list."""
    cpu = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    git = ["git", "-C", str(HERE), "log", "-1", "--format=%h"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = [f"{name} {version}" for name in PACKAGES if (version := installed(name))]
    return "\n".join(
        [
            f"- Last run: {today()}, commit {commit or 'unknown'}.",
            f"- Machine: {len(os.sched_getaffinity(0))} cores of {cpu[1].strip() if cpu else platform.machine()}, "
            f"{memory:.0f} GiB, {platform.system()} {platform.release()}.",
            f"- Versions: Python {platform.python_version()}, {', '.join(versions)}.",
        ]
    )


def installed(package: str) -> str | None:
    """A package's version, or None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def today() -> str:
    """The date and time, in UTC."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def marks(name: str) -> tuple[str, str]:
    """What stands before and after the block of a benchmark."""
    return f"<!-- make bench: {name} -->", f"<!-- end: {name} -->"


def block(text: str, name: str) -> str:
    """What stands between the marks; nothing where there are none."""
    start, end = marks(name)
    return text.split(start, 1)[1].split(end, 1)[0].strip() if start in text and end in text else ""


def with_block(text: str, name: str, content: str, *, title: str = "") -> str:
    """The text with another block; without marks it comes at the end of its section, or as a new section."""
    start, end = marks(name)
    new = f"{start}\n{content.strip()}\n{end}"
    if start in text and end in text:
        before, rest = text.split(start, 1)
        return before + new + rest.split(end, 1)[1]
    # The block of the machine stands before the first section.
    heading = re.search(rf"^## {re.escape(title)}$", text, flags=re.MULTILINE) if title else re.search("^", text)
    if heading is None:
        return f"{text.rstrip()}\n\n## {title}\n\n{new}\n"
    following = re.compile("^## ", flags=re.MULTILINE).search(text, heading.end())
    place = following.start() if following else len(text)
    return f"{text[:place].rstrip()}\n\n{new}\n{chr(10) + text[place:] if following else ''}"


if __name__ == "__main__":
    main()
