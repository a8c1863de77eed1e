"""Writes the tables of docs/scaling.md: LLaVA-Med on 8, 64 and 512 GPUs, as `medvlm plan` reckons it.

    python scripts/scaling_tables.py           # write them anew
    python scripts/scaling_tables.py --decode FOLDER   # measure: ms of a core for a figure of FOLDER, once

The document says where each constant comes from.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from medvlm.config import load_recipe
from medvlm.training.footprint import Setup, load_of_step, model_shape
from medvlm.training.hardware import parse_hardware
from medvlm.training.plan import StagePlanned, make_plan

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
RECIPE, DEVICE = "llava-med", "A100-80G"
PAIRS = (600_000, 15_000_000)
PUBLISHED, TUNED = 0.16, 0.45
"""Shares of the nominal peaks: of the published LLaVA-Med runs, and of LLaVA-1.5's scripts."""
NODE_GPUS = 8
NODE_CORES = 128
NODE_NETWORK_GB_S = 8 * 25.0
"""Eight ports of 200 Gbit/s."""
FIGURE_KB = 98.0
FIGURES_PER_S = 217.8
"""Fetched, checked and hashed on two cores."""
DECODE_MS = 4.5
FEATURE_BYTES = 257 * 1024 * 2
RANGE_MB = 8.0
"""Of a request for a part of a shard."""


@dataclass(frozen=True)
class Case:
    """A stage on so many GPUs."""

    gpus: int
    stage: str
    batch: int
    micro: int
    zero: int = 2


# 128 sequences do not split over 512 GPUs: there the batch grows with them.
ALIGN = (Case(8, "align", 128, 2), Case(64, "align", 128, 2), Case(512, "align", 1024, 2))
INSTRUCT = (
    Case(8, "instruct", 128, 1, zero=3),
    Case(8, "instruct", 128, 8, zero=3),
    Case(8, "instruct", 128, 8, zero=2),
    Case(64, "instruct", 128, 2, zero=3),
    Case(512, "instruct", 512, 1, zero=3),
)


def planned(case: Case, pairs: int, mfu: float) -> StagePlanned:
    """A stage as `medvlm plan` reckons it."""
    values = {"global_batch": case.batch, "micro_batch": case.micro, "zero_stage": case.zero}
    overrides = [f"stages.{case.stage}.{field}={value}" for field, value in values.items()]
    # The other stages are planned with it and must split too.
    overrides += [f"stages.{name}.global_batch=512" for name in ("align", "instruct", "finetune") if name != case.stage]
    recipe, hardware = load_recipe(RECIPE, overrides), parse_hardware(f"{case.gpus}x{DEVICE}")
    samples = {"align": pairs} if case.stage == "align" else {}
    plan = make_plan(recipe, hardware, mfu=mfu, samples=samples)
    return next(stage for stage in plan.stages if stage.stage == case.stage)


def main() -> None:
    """Write the tables, or measure one constant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", type=Path, metavar="FOLDER", help="Of JPEG figures.")
    arguments = parser.parse_args()
    if arguments.decode:
        measure_decode(arguments.decode)
        return
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))


def with_tables(text: str) -> str:
    """The document with its tables written anew."""
    tables = {"align": align(), "instruct": instruct(), "supply": supply(), "sizes": sizes(), "memory": memory()}
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        assert marked.search(text), f"docs/scaling.md has no place for the table {name}"
        text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def rows(*lines: tuple[str, ...]) -> str:
    """A Markdown table; the first line is its head."""
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def align() -> str:
    """Hours and pairs a second of stage 1."""
    lines: list[tuple[str, ...]] = [
        ("pairs", "GPUs", "global batch", "steps", f"time at {PUBLISHED}", f"time at {TUNED}", "GiB a GPU")
    ]
    for pairs in PAIRS:
        for case in ALIGN:
            slow, fast = planned(case, pairs, PUBLISHED), planned(case, pairs, TUNED)
            hours = (hours_text(slow.hours), hours_text(fast.hours))
            lines.append(
                (f"{pairs:,}", str(case.gpus), split(slow), f"{slow.steps:,}", *hours, f"{slow.gib_per_gpu:.1f}")
            )
    return rows(*lines)


def instruct() -> str:
    """Hours of stage 2, and what a step of it is made of: arithmetic, NVLink or the network."""
    head = ("GPUs", "ZeRO", "global batch", "steps", f"time at {PUBLISHED}", f"time at {TUNED}", "GiB a GPU")
    head += ("arithmetic, a step", "sent by a GPU, a step", "over NVLink", "over InfiniBand")
    lines: list[tuple[str, ...]] = [head]
    link = parse_hardware(DEVICE).device.link_gb_s
    for case in INSTRUCT:
        slow, fast = planned(case, 0, PUBLISHED), planned(case, 0, TUNED)
        seconds, sent = step(case, fast)
        network = f"{sent / NODE_NETWORK_GB_S / TUNED:.2f} s" if case.gpus > NODE_GPUS else ""
        plan = (
            split(slow),
            f"{slow.steps:,}",
            hours_text(slow.hours),
            hours_text(fast.hours),
            f"{slow.gib_per_gpu:.1f}",
        )
        parts = (f"{seconds:.2f} s", f"{sent:.0f} GB", f"{sent / link / TUNED:.2f} s", network)
        lines.append((str(case.gpus), str(case.zero), *plan, *parts))
    return rows(*lines)


def step(case: Case, stage: StagePlanned) -> tuple[float, float]:
    """Of an optimiser step: seconds of arithmetic at ``TUNED``, and GB that a GPU sends."""
    recipe, device = load_recipe(RECIPE), parse_hardware(DEVICE).device
    _, of_recipe = recipe.stage(case.stage)
    again = stage.gradient_checkpointing
    setup = Setup(device, case.gpus, case.micro, case.zero, "full", again, offload_optimizer=False)
    load = load_of_step(recipe, of_recipe, model_shape(recipe, of_recipe), setup, stage.tokens_per_sequence)
    seconds = stage.accumulation * load.operations / (device.tflops * 1e12 * TUNED)
    return seconds, (stage.accumulation * load.sent + load.sent_a_step) / 1e9


def supply() -> str:
    """What stage 1 asks of store, network and processors, where it runs as fast as it can."""
    head = ("GPUs", "pairs/s", "images of all", "requests/s, an image each", f"requests/s, {RANGE_MB:g} MB each")
    head += ("images, a node", "cores to decode, a node", f"of its {NODE_CORES}", "features instead, a node")
    lines: list[tuple[str, ...]] = [head]
    for case in ALIGN:
        stage = planned(case, PAIRS[1], TUNED)
        rate = stage.sequences / (stage.hours * 3600)
        nodes = case.gpus / NODE_GPUS
        megabytes, cores = rate * FIGURE_KB / 1e3, rate / nodes * DECODE_MS / 1e3
        everywhere = (f"{rate:,.0f}", f"{megabytes:,.0f} MB/s", f"{rate:,.0f}", f"{megabytes / RANGE_MB:,.0f}")
        a_node = (f"{megabytes / nodes:.0f} MB/s", f"{cores:.1f}", f"{cores / NODE_CORES:.1%}")
        lines.append((str(case.gpus), *everywhere, *a_node, f"{rate / nodes * FEATURE_BYTES / 1e6:.0f} MB/s"))
    return rows(*lines)


def sizes() -> str:
    """Bytes of the pairs, and how long two cores fetch them."""
    lines: list[tuple[str, ...]] = [("pairs", "images", "features of CLIP ViT-L/14", "fetched on two cores in")]
    for pairs in PAIRS:
        images, features = pairs * FIGURE_KB / 1e6, pairs * FEATURE_BYTES / 1e9
        lines.append(
            (f"{pairs:,}", f"{images:,.0f} GB", f"{features:,.0f} GB", hours_text(pairs / FIGURES_PER_S / 3600))
        )
    return rows(*lines)


def memory() -> str:
    """GiB of stage 2's parts on a GPU by ZeRO stage."""
    recipe = load_recipe(RECIPE)
    _, stage = recipe.stage("instruct")
    shape = model_shape(recipe, stage)
    lines: list[tuple[str, ...]] = [("GPUs", *(f"ZeRO-{zero}" for zero in range(4)))]
    learned = shape.parts["language_model"] + shape.parts["projector"]
    for gpus in (1, 8, 64, 512):
        cells: list[str] = []
        for zero in range(4):
            share = [1 / gpus if zero >= level else 1.0 for level in (3, 2, 1)]
            weights, gradients, states = (
                size * part / 2**30
                for size, part in zip((2 * shape.total, 2 * learned, 12 * learned), share, strict=True)
            )
            cells.append(f"{weights + gradients + states:.1f} (states {states:.1f})")
        lines.append((str(gpus), *cells))
    return rows(*lines)


def split(stage: StagePlanned) -> str:
    """The global batch and how it is split."""
    return f"{stage.sequences // stage.steps} ({stage.micro_batch} x {stage.accumulation} a GPU)"


def hours_text(hours: float) -> str:
    """Hours, in minutes where they are few."""
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def measure_decode(folder: Path) -> None:
    """Print what a figure costs a core: opened, decoded, resized, normalised."""
    import torch

    from medvlm.models.vision import ImageProcessor

    torch.set_num_threads(1)
    processor = ImageProcessor.of(load_recipe(RECIPE).model.vision_tower)
    pictures = [data for path in sorted(folder.rglob("*.jpg")) if len(data := path.read_bytes()) not in {0, 262144}]
    if not pictures:
        sys.exit(f"no figures in {folder}")
    for data in pictures:
        processor(data)
    spent: list[float] = []
    for _ in range(5):
        started = time.process_time()
        for data in pictures:
            processor(data)
        spent.append((time.process_time() - started) / len(pictures) * 1e3)
    mean = sum(map(len, pictures)) / len(pictures) / 1e3
    sys.stdout.write(
        f"{len(pictures)} figures of {mean:.0f} KB: {min(spent):.1f} to {max(spent):.1f} ms of a core each\n"
    )


if __name__ == "__main__":
    main()
