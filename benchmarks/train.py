"""Training throughput: ours beside the plain stack, each lever alone, in alternating trials.

    python benchmarks/train.py [--data FOLDER] [--case NAME …] [--trials 3] [--parts FOLDER]

The plain stack is what a careful user writes today: transformers' ``LlavaForConditionalGeneration`` and ``Trainer``,
with batches padded to their longest sequence. Every row begins with the same weights and trains one epoch of the same
samples with the stock Trainer, AdamW and `OMP_NUM_THREADS` threads, in a process of its own, for its own peak memory.

``ours`` has every lever on but length groups, which change the order of the samples and have a row of their own;
``only X`` has one lever on, ``without X`` all but one; these two are measured in the first trial only. Ratios are of
the plain stack's time in the same trial, by the clock and by processor time, which is the steadier one where others
use the machine too. The feature cache is full when an epoch begins; what filling it took stands below the table.
Losses are compared step by step where the order is the same; exit code 1 where they differ by more than 1e-3 or a
target is missed.

Whatever the levers, both stacks have the same fused AdamW. Below each table are a count of operations (matrix products
and attention) and a profile of one epoch, and the most that the operations allow: their time at the best rate of a
2048 x 2048 matrix product in the same run.

With ``--parts``, each trial is kept in that folder, and one that is there is not run again: what was cut short goes on
where it stopped.
Without ``--data``, texts are drawn, and the cases of real questions are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAIN = "plain"
TOLERANCE = 1e-3
LEVERS = ("onednn", "feature_cache", "loss_at_labels", "packing", "length_groups")
LOOKS = (PLAIN, "ours")
REORDERED = ("ours, length groups too", "only length_groups")

# A LLaVA of about 30 million parameters: a tower of CLIP ViT's shape, and a Llama.
SMALL = (
    "model.vision_tower.hidden_size=384", "model.vision_tower.layers=6", "model.vision_tower.heads=6",
    "model.vision_tower.mlp_size=1536", "model.vision_tower.image_px=224", "model.vision_tower.patch_px=16",
    "model.projector.kind=mlp2x_gelu", "model.language_model.hidden_size=384", "model.language_model.layers=8",
    "model.language_model.heads=6", "model.language_model.kv_heads=6", "model.language_model.mlp_size=1024",
    "model.language_model.max_positions=2048", "model.tokenizer.vocab_size=4096",
)  # fmt: skip
# CLIP ViT-L/14 at 224 px (304 M parameters, 256 patches), with random weights.
VIT_L = (
    "model.vision_tower.architecture=clip", "model.vision_tower.weights=random", "model.vision_tower.hidden_size=1024",
    "model.vision_tower.layers=24", "model.vision_tower.heads=16", "model.vision_tower.mlp_size=4096",
    "model.vision_tower.patch_px=14", "model.vision_tower.feature_layer=-2", "model.vision_tower.reference_width=1024",
)  # fmt: skip
WIDE = "model.tokenizer.vocab_size=49152"


@dataclass(frozen=True)
class Case:
    """A model, a stage and samples, in the rows that are measured."""

    title: str
    stage: int
    samples: str
    """``vqa-rad`` or ``slake``: real questions; ``captions``; ``conversations``."""
    rows: tuple[str, ...]
    smol: bool = False
    """SmolLM2-135M of smol-llava-med, else about 30 million parameters."""
    model: tuple[str, ...] = ()
    steps: int = 3
    batch: int = 8
    per_image: int = 1
    max_length: int = 2048
    longest: int = 16
    """Questions of a conversation."""
    precision: str = "fp32"
    trials: int | None = None
    """Fewer than asked for, where one says it all."""
    target: tuple[str, float] | None = None
    """``speed``, ``speed over 3 epochs with the fill`` or ``memory``, and how much."""


ALONE = tuple(f"only {lever}" for lever in LEVERS)
WITHOUT = tuple(f"without {lever}" for lever in LEVERS[:4])
EVERY = (PLAIN, "ours", "ours, length groups too", "levers off", *ALONE, *WITHOUT, "ours, bf16 features")
FEW = (PLAIN, "ours", "ours, length groups too", *ALONE)
EACH_TIME = (PLAIN, "ours", "ours, length groups too")
MEMORY = (PLAIN, "ours", "without loss_at_labels", "ours, checkpointing")
CASES = {
    "small-align": Case("30 M, stage 1, VQA-RAD", 1, "vqa-rad", EVERY, model=SMALL, steps=2, batch=4),
    "small-instruct": Case(
        "30 M, stage 2, long conversations", 2, "conversations", (*EVERY, "ours, compiled", "ours, checkpointing"),
        model=SMALL, steps=2, batch=8, target=("speed", 2),
    ),
    "small-shared": Case(
        "30 M, stage 2, SLAKE, six questions of each image", 2, "slake", (PLAIN, "ours", "without shared_prefix"),
        model=SMALL, steps=2, batch=2, per_image=6,
    ),
    "small-vit-l": Case(
        "30 M's language model and a tower of CLIP ViT-L/14's size, stage 1, captions", 1, "captions",
        (PLAIN, "ours"), model=(*SMALL, *VIT_L), steps=2, batch=2, target=("fill", 2),
    ),
    "smol-vit-l": Case(
        "SmolLM2-135M and a tower of CLIP ViT-L/14's size, stage 1, captions", 1, "captions",
        (PLAIN, "ours"), smol=True, model=VIT_L, steps=2, batch=2, target=("fill", 2),
    ),
    "smol-vit-l-shared": Case(
        "SmolLM2-135M and a tower of CLIP ViT-L/14's size, stage 1, SLAKE, four questions of each image", 1, "slake",
        (PLAIN, "ours"), smol=True, model=VIT_L, steps=1, batch=2, per_image=4, target=("fill", 2),
    ),
    "smol-align": Case("smol-llava-med, stage 1, SLAKE", 1, "slake", FEW, smol=True, steps=2, batch=4),
    "smol-instruct": Case(
        "smol-llava-med, stage 2, conversations of up to eight questions", 2, "conversations", FEW, smol=True, steps=2,
        batch=4, longest=8, target=("speed", 2),
    ),
    "small-memory": Case(
        "30 M, 2,048 tokens and a vocabulary of 49,152, stage 2", 2, "conversations", MEMORY, model=(*SMALL, WIDE),
        steps=1, batch=3, longest=10**6, trials=1, target=("memory", 0.6),
    ),
    "smol-memory": Case(
        "smol-llava-med, 2,048 tokens and a vocabulary of 49,152, stage 2", 2, "conversations", MEMORY, smol=True,
        steps=1, batch=2, longest=10**6, trials=1, target=("memory", 0.6),
    ),
}  # fmt: skip


def main() -> None:
    """Run the trials and print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of vqa-rad, slake and llava-med as they were released")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--parts", type=Path, help="keeps each trial; what is there is not run again")
    parser.add_argument("--rows", nargs="+", help="only these rows now; with --parts others can follow")
    parser.add_argument("--show", action="store_true", help="print what --parts has and run nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        parts: Path = arguments.parts or Path(scratch)
        parts.mkdir(parents=True, exist_ok=True)
        missed = False
        for name in arguments.case:
            case, path = CASES[name], parts / f"{name}.json"
            if case.samples in ("vqa-rad", "slake") and not arguments.data and not arguments.show:
                print(f"### {case.title}\n\nNot run: it needs --data.\n")
                continue
            found = json.loads(path.read_text()) if path.exists() else {}
            if not arguments.show:
                measure(case, arguments, found, path)
            if found.get("rows", {}).get(PLAIN) and found["rows"]["ours"]:
                missed |= report(case, found)
    sys.exit(int(missed))


def alone(function: Callable[..., Any], *values: Any) -> Any:
    """A function's result from a process of its own, whose libraries are imported already."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *values).result()


def measure(case: Case, arguments: argparse.Namespace, found: dict[str, Any], path: Path) -> None:
    """Every row once a trial; then the plain stack and ours once more, watched. What was found before stays."""
    sys.path.insert(0, str(Path(__file__).parent))
    # Before any library is imported, in whose server the trials' processes begin.
    os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"})
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["training.trial", "transformers.trainer"])
    from training import trial

    kept: dict[str, list[Any]] = found.setdefault("rows", {row: [] for row in case.rows})
    looks: dict[str, Any] = found.setdefault("looks", {})
    trials = range(min(arguments.trials, case.trials or arguments.trials))
    wanted = [(number, row) for number in trials for row in case.rows if number == 0 or row in EACH_TIME]
    wanted = [(number, row) for number, row in wanted if len(kept[row]) <= number]
    wanted = [(number, row) for number, row in wanted if not arguments.rows or row in arguments.rows]
    if not wanted and len(looks) == len(LOOKS):
        return
    folder = path.with_suffix("")
    if "what" not in found:
        folder.mkdir(parents=True, exist_ok=True)
        found["what"] = alone(trial.prepare, case, str(folder), arguments.data)
        found["peak"] = alone(trial.peak, case.precision)
        path.write_text(json.dumps(found, indent=1))
    for number, row in wanted:
        print(f"{case.title}: trial {number + 1}, {row}", file=sys.stderr, flush=True)
        kept[row].append(alone(trial.trial, case, row, str(folder)))
        path.write_text(json.dumps(found, indent=1))
    for row in (row for row in LOOKS if row not in looks and not arguments.rows):
        looks[row] = alone(trial.look, case, row, str(folder))
        path.write_text(json.dumps(found, indent=1))
    if not arguments.parts:
        shutil.rmtree(folder)


def report(case: Case, found: dict[str, Any]) -> bool:
    """Print a case; whether losses disagree or its target is missed."""
    rows: dict[str, list[dict[str, Any]]] = {row: trials for row, trials in found["rows"].items() if trials}
    plain = rows[PLAIN]
    print(f"### {case.title}\n\n{found['what']}, {found['peak']['threads']} threads, {len(plain)} trials.\n")
    print(
        "| row | samples/s | plain / this, clock | plain / this, processor | peak MB | of plain | waits | loss off by |"
    )
    print("|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for row, trials in rows.items():
        off = _apart(trials, plain)
        # Features in bf16 are not the same numbers: their row measures by how much.
        worst = max(worst, 0.0 if row in REORDERED or row.endswith("bf16 features") else off)
        rate = statistics.median(t["samples"] / t["clock_s"] for t in trials)
        wait = statistics.median(t["wait_s"] / t["clock_s"] for t in trials)
        print(
            f"| {row} | {rate:.2f} | {_ratio(plain, trials, 'clock_s')} | {_ratio(plain, trials, 'cpu_s')} "
            f"| {_peak(trials):,.0f} | {_peak(trials) / _peak(plain):.0%} | {wait:.1%} "
            f"| {'other order' if row in REORDERED else f'{off:.0e}'} |"
        )
    print(f"\nLosses of the plain stack: {', '.join(f'{loss:.4f}' for loss in plain[0]['losses'])}; ", end="")
    print(f"of ours: {', '.join(f'{loss:.4f}' for loss in rows['ours'][0]['losses'])}.\n")
    held = [f"losses of the same order equal to {TOLERANCE:g}: {_word(worst <= TOLERANCE)} ({worst:.0e})"]
    missed = worst > TOLERANCE
    for words, good in _targets(case, rows):
        held.append(f"{words}: {_word(good)}")
        missed |= not good
    print("\n".join(f"- {line}" for line in [*_filled(rows), *held]) + "\n")
    _roofline(found)
    return missed


def _word(good: bool) -> str:
    return "held" if good else "**missed**"


def _apart(trials: list[dict[str, Any]], plain: list[dict[str, Any]]) -> float:
    return max(abs(a - b) for t in trials for a, b in zip(t["losses"], plain[0]["losses"], strict=True))


def _peak(trials: list[dict[str, Any]]) -> float:
    return statistics.median(t["peak_mb"] for t in trials)


def _ratios(plain: list[dict[str, Any]], trials: list[dict[str, Any]], name: str) -> list[float]:
    return sorted(p[name] / t[name] for t, p in zip(trials, plain, strict=False))


def _ratio(plain: list[dict[str, Any]], trials: list[dict[str, Any]], name: str) -> str:
    ratios = _ratios(plain, trials, name)
    spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if trials is not plain and len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{spread}"


def _fill(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The one trial that filled the cache: others found it full."""
    return max((t for row in rows if row != PLAIN for t in rows[row]), key=lambda t: t["fill_cpu_s"])


def _filled(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    fill = _fill(rows)
    return [f"cache: {fill['fill_images']} images in {fill['fill_s']:.1f} s ({fill['fill_cpu_s']:.1f} s of processor)"]


def _targets(case: Case, rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, bool]]:
    """The case's targets, by processor time, with the best of ours that has every lever."""
    if case.target is None:
        return []
    kind, bound = case.target
    plain = rows[PLAIN]
    if kind == "memory":
        name = min((row for row in rows if row.startswith("ours")), key=lambda row: _peak(rows[row]))
        share = _peak(rows[name]) / _peak(plain)
        return [(f"peak memory at most {bound:.0%} of the plain stack's: {share:.0%} ({name})", share <= bound)]
    name = max(
        (row for row in rows if row.startswith("ours") and not row.endswith("bf16 features")),
        key=lambda row: statistics.median(_ratios(plain, rows[row], "cpu_s")),
    )
    speed = statistics.median(_ratios(plain, rows[name], "cpu_s"))
    if kind == "speed":
        return [(f"at least {bound:g} times the plain stack: {speed:.2f} ({name})", speed >= bound)]
    ours, whole = (statistics.median(t["cpu_s"] for t in rows[row]) for row in (name, PLAIN))
    three = 3 * whole / (3 * ours + _fill(rows)["fill_cpu_s"])
    return [
        (f"at least 3 times from the second epoch on: {speed:.2f} ({name})", speed >= 3),
        (f"at least {bound:g} times over 3 epochs with the fill: {three:.2f}", three >= bound),
    ]


def _roofline(found: dict[str, Any]) -> None:
    """Operations, what they take at the best rate of a matrix product, and the profile of the rest."""
    best, looks = found["peak"], found["looks"]
    print(
        f"A matrix product reaches {best['gflops']:.0f} GFLOP/s by the clock and {best['gflops_cpu']:.0f} in a second "
        "of processor time.\n\n| row | GFLOP a sample | at that rate | measured, processor | share of it | profile |"
    )
    print("|---|---|---|---|---|---|")
    for row, seen in looks.items():
        flop = seen["gflop"] / seen["samples"]
        cpu = statistics.median(t["cpu_s"] / t["samples"] for t in found["rows"][row])
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in seen["share"].items() if share >= 0.02)
        print(
            f"| {row} | {flop:.1f} | {flop / best['gflops_cpu']:.3f} s | {cpu:.3f} s "
            f"| {flop / best['gflops_cpu'] / cpu:.0%} | {shares} |"
        )
    if len(looks) < len(LOOKS):
        return
    limit = looks[PLAIN]["gflop"] / looks["ours"]["gflop"]
    print(f"\nThe plain stack does {limit:.2f} times the operations of ours.\n")


if __name__ == "__main__":
    main()
