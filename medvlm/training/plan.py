"""What a recipe needs: parameters, memory, steps, tokens, hours and cost on given hardware, before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from medvlm.recipe_schema import Recipe, Stage
from medvlm.store import Workspace
from medvlm.training.engine import split_batch
from medvlm.training.footprint import (
    LORA_RANK,
    Load,
    Setup,
    Shape,
    Tuning,
    load_of_step,
    memory_by_part,
    model_shape,
    own_tuning,
    recomputes,
    trained_parameters,
)
from medvlm.training.hardware import DEVICES, Hardware
from medvlm.training.workload import Workload, stage_workload

__all__ = ["UTILISATION", "Choice", "Plan", "StagePlanned", "make_plan"]

UTILISATION = 0.16
"""Share of the nominal peaks (of arithmetic and of the link) that the published LLaVA-Med runs reached.

Their hours, 8 A100-40G, paper table 3b: stage 1 of 600,000 pairs 6.8; stage 2 of 60,017 conversations 8.0 (3 epochs)
and 2.6 (1 epoch), of 10,712 conversations 1.8 and 0.6. With 0.16 the plan says 6.8; 8.3 and 2.8; 1.5 and 0.5. They
ran micro-batches of 2 and 1 sequences and loaded images in the training process. LLaVA-1.5's scripts, with 32 and 16
sequences and four loading processes, reached some 0.45 on the same GPUs (3.5 hours for 558,000 pairs, README).
"""
_USABLE = 0.97
"""Of a device's memory: the driver keeps the rest (an A100-40G shows 39.4 GiB)."""
_HOST_GB_S = 16.0
"""Between a device and its host's memory: PCIe 3 x16, one way."""
_TUNINGS: tuple[Tuning, ...] = ("full", "lora", "qlora")


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a stage, and the memory that it needs."""

    zero_stage: int
    tuning: Tuning
    gradient_checkpointing: bool
    gib_per_gpu: float
    fits: bool


@dataclass(frozen=True, slots=True)
class StagePlanned:
    """One stage as the recipe sets it, and the other choices."""

    stage: str
    trains: tuple[str, ...]
    trained: int
    tuning: Tuning
    zero_stage: int
    gradient_checkpointing: bool
    micro_batch: int
    accumulation: int
    samples: int
    sequences: int
    steps: int
    tokens: int
    """Of the whole stage, image and template included."""
    tokens_per_sequence: float
    operations: float
    """Floating-point operations of the whole stage, recomputation included."""
    hours: float
    cost: float | None
    gib_per_gpu: float
    fits: bool
    memory_gib: dict[str, float]
    """By part; see ``memory_by_part``."""
    advice: str
    """What to change where it does not fit; empty where it does."""
    data: dict[str, str]
    """Where the number of samples comes from, by target."""
    choices: list[Choice] = field(default_factory=list[Choice])


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe on given hardware."""

    recipe: str
    hardware: str
    gib_available: float
    mfu: float
    price_per_gpu_hour: float | None
    parameters: dict[str, Any]
    stages: list[StagePlanned]
    hours: float
    cost: float | None
    fits: bool


def make_plan(
    recipe: Recipe,
    hardware: Hardware,
    *,
    mfu: float = UTILISATION,
    price: float | None = None,
    workspace: Workspace | None = None,
    samples: Mapping[str, int] | None = None,
    tuning: Tuning | None = None,
) -> Plan:
    """Parameters, memory, steps, tokens, hours and cost of every stage.

    Args:
        recipe: Any; nothing is downloaded.
        hardware: See ``parse_hardware``.
        mfu: Share of the nominal peak that is reached, in arithmetic (recomputed operations count as done) and on the
            link between devices.
        price: Of a device and hour, in any currency; None: no cost.
        workspace: Its datasets are counted where they are; else the published sizes stand in.
        samples: By stage name, instead of what is counted or published.
        tuning: How the language model learns, in every stage that trains it; None: as the recipe says.

    Raises:
        TrainingError: A stage's global batch does not split over so many devices.
    """
    dense, shape = model_shape(recipe), model_shape(recipe, recipe.stages[-1])
    shapes = [dense] * (len(recipe.stages) - 1) + [shape]
    stages = [
        _planned(recipe, number, of_stage, hardware, mfu, price, workspace, dict(samples or {}), tuning)
        for number, of_stage in enumerate(shapes, start=1)
    ]
    hours = sum(stage.hours for stage in stages)
    return Plan(
        recipe=recipe.name,
        hardware=str(hardware),
        gib_available=hardware.device.gib,
        mfu=mfu,
        price_per_gpu_hour=price,
        parameters={
            "total": shape.total,
            "active": shape.total - shape.idle,
            "trained": {stage.stage: stage.trained for stage in stages},
            **shape.parts,
        },
        stages=stages,
        hours=round(hours, 2),
        cost=_cost(hours, hardware, price),
        fits=all(stage.fits for stage in stages),
    )


def _planned(
    recipe: Recipe,
    number: int,
    shape: Shape,
    hardware: Hardware,
    mfu: float,
    price: float | None,
    workspace: Workspace | None,
    samples: dict[str, int],
    tuning: Tuning | None,
) -> StagePlanned:
    stage = recipe.stages[number - 1]
    micro_batch, accumulation = split_batch(recipe, stage, hardware.count)
    # Adapters stand beside the language model only; a stage that leaves it frozen has none.
    own: Tuning = (tuning or own_tuning(stage)) if "language_model" in stage.trains else "full"
    setup = Setup(
        device=hardware.device,
        processes=hardware.count,
        micro_batch=micro_batch,
        zero_stage=_zero_stage(stage.zero_stage, own),
        tuning=own,
        gradient_checkpointing=False,
        offload_optimizer=stage.offload_optimizer,
    )
    setup = dataclasses.replace(setup, gradient_checkpointing=recomputes(recipe, stage, shape, setup))
    loads = [
        stage_workload(recipe, number, target, workspace=workspace, samples=samples.get(stage.name))
        for target in recipe.targets(number)
    ]
    seconds = sum(_seconds(recipe, stage, shape, setup, load, accumulation, mfu) for load in loads)
    sequences = sum(load.steps for load in loads) * stage.global_batch
    tokens = sum(load.steps * load.tokens for load in loads) * stage.global_batch
    parts = {name: size / 2**30 for name, size in memory_by_part(recipe, stage, shape, setup).items()}
    needed, available = sum(parts.values()), hardware.device.gib * _USABLE
    return StagePlanned(
        stage=stage.name,
        trains=stage.trains,
        trained=trained_parameters(shape, stage, own),
        tuning=own,
        zero_stage=setup.zero_stage,
        gradient_checkpointing=setup.gradient_checkpointing,
        micro_batch=micro_batch,
        accumulation=accumulation,
        samples=sum(load.samples for load in loads),
        sequences=sequences,
        steps=sum(load.steps for load in loads),
        tokens=round(tokens),
        tokens_per_sequence=round(tokens / sequences, 1),
        operations=sum(_operations(recipe, stage, shape, setup, load) for load in loads),
        hours=round(seconds / 3600, 4 if seconds < 360 else 2),
        cost=_cost(seconds / 3600, hardware, price),
        gib_per_gpu=round(needed, 2),
        fits=needed <= available,
        memory_gib={name: round(size, 3) for name, size in parts.items()},
        advice="" if needed <= available else _advice(recipe, stage, shape, setup, available),
        data={load.target: load.source for load in loads},
        choices=list(_choices(recipe, stage, shape, setup, available)),
    )


def _seconds(
    recipe: Recipe, stage: Stage, shape: Shape, setup: Setup, work: Workload, accumulation: int, mfu: float
) -> float:
    load: Load = load_of_step(recipe, stage, shape, setup, work.tokens)
    link = setup.device.link_gb_s * 1e9 * mfu
    micro = load.operations / (setup.device.tflops * 1e12 * mfu) + load.sent / link
    return work.steps * (accumulation * micro + load.sent_a_step / link + load.host / (_HOST_GB_S * 1e9))


def _operations(recipe: Recipe, stage: Stage, shape: Shape, setup: Setup, work: Workload) -> float:
    load = load_of_step(recipe, stage, shape, setup, work.tokens)
    return load.operations / setup.micro_batch * work.steps * stage.global_batch


def _choices(recipe: Recipe, stage: Stage, shape: Shape, setup: Setup, available: float) -> Iterator[Choice]:
    tunings = _TUNINGS if "language_model" in stage.trains else ("full",)
    for tuning in tunings:
        for checkpointing in (False, True):
            for zero in range(_zero_stage(3, tuning) + 1):
                other = dataclasses.replace(setup, tuning=tuning, gradient_checkpointing=checkpointing, zero_stage=zero)
                gib = _gib(recipe, stage, shape, other)
                yield Choice(zero, tuning, checkpointing, round(gib, 2), gib <= available)


def _zero_stage(wanted: int, tuning: Tuning) -> int:
    """4-bit weights are not split over processes, so ZeRO-3 is not for them."""
    return min(wanted, 2) if tuning == "qlora" else wanted


def _gib(recipe: Recipe, stage: Stage, shape: Shape, setup: Setup) -> float:
    return sum(memory_by_part(recipe, stage, shape, setup).values()) / 2**30


def _advice(recipe: Recipe, stage: Stage, shape: Shape, setup: Setup, available: float) -> str:
    """The first settings, in the order of what they cost in speed and quality, with which the stage fits."""
    name, now = f"stages.{stage.name}", setup
    settings: list[str] = []
    gib = _gib(recipe, stage, shape, now)
    steps: list[tuple[str, dict[str, Any], bool]] = [
        (f"--set {name}.gradient_checkpointing=on", {"gradient_checkpointing": True}, not now.gradient_checkpointing),
        (f"--set {name}.micro_batch=1", {"micro_batch": 1}, now.micro_batch > 1),
        (f"--set {name}.zero_stage=2", {"zero_stage": 2}, now.zero_stage < 2 and now.processes > 1),
        (f"--set {name}.zero_stage=3", {"zero_stage": 3}, now.zero_stage < 3 and now.processes > 1),
        (f"--set {name}.offload_optimizer=true", {"offload_optimizer": True}, not now.offload_optimizer),
    ]
    if "language_model" in stage.trains:
        undone = {"offload_optimizer": now.offload_optimizer}
        steps += [
            (f"LoRA (rank {LORA_RANK})", {"tuning": "lora", **undone}, now.tuning == "full"),
            (
                f"QLoRA (4-bit weights: --set {name}.lora.quantisation=nf4)",
                {"tuning": "qlora"},
                now.tuning != "qlora",
            ),
        ]
    for words, change, useful in steps:
        if not useful or (words.startswith("--set") and "offload" in words and not now.device.is_gpu):
            continue
        if change.get("tuning") == "qlora":
            change = {**change, "zero_stage": _zero_stage(now.zero_stage, "qlora")}
            words += f" and --set {name}.zero_stage=2" if now.zero_stage == 3 else ""
        now = dataclasses.replace(now, **change)
        if "zero_stage" in change:
            settings = [word for word in settings if "zero_stage" not in word]
        if change.get("tuning") == "lora":
            settings = [word for word in settings if "offload" not in word]
        if change.get("tuning") == "qlora":
            settings = [word for word in settings if "LoRA" not in word]
        settings.append(words)
        gib = _gib(recipe, stage, shape, now)
        if gib <= available:
            return f"fits in {gib:.1f} GiB with {' and '.join(settings)}"
    larger = next((d for d in sorted(DEVICES.values(), key=lambda d: d.gib) if d.gib * _USABLE >= gib), None)
    bigger = f"a device of {larger.gib:.0f} GiB, such as {larger.name}" if larger else "more devices with zero_stage=3"
    return f"even {' and '.join(settings)} needs {gib:.1f} GiB: take {bigger}" if settings else f"take {bigger}"


def _cost(hours: float, hardware: Hardware, price: float | None) -> float | None:
    return None if price is None else round(hours * hardware.count * price, 2)
