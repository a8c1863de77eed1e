"""`medvlm plan`: memory, hours and cost of a recipe on given hardware, before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from medvlm.cli import print_json

if TYPE_CHECKING:
    from medvlm.training.footprint import Tuning
    from medvlm.training.plan import Plan, StagePlanned

__all__ = ["plan"]

_PARTS = {
    "weights": "blue",
    "gradients": "cyan",
    "optimizer_states": "magenta",
    "activations": "yellow",
    "logits": "green",
    "overhead": "bright_black",
}
_BAR = 40


def _samples(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    parsed: dict[str, int] = {}
    for value in values:
        stage, equals, number = value.partition("=")
        digits = number.replace("_", "").replace(",", "")
        if not equals or not digits.isdigit() or not int(digits):
            raise click.BadParameter(f"{value!r} is not STAGE=NUMBER, such as align=600000")
        parsed[stage] = int(digits)
    return parsed


@click.command()
@click.option("--recipe", required=True, metavar="NAME", help="A recipe's name, or a YAML file.")
@click.option(
    "--hardware",
    default="8xA100-40G",
    show_default=True,
    metavar="NxDEVICE",
    help="Such as 8xA100-40G, 4xH100, 1x3090, V100-32G, L40S or CPU (this machine).",
)
@click.option(
    "--mfu",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the nominal peak that is reached, recomputation included.  [default: 0.16, which the published "
    "LLaVA-Med runs reached; LLaVA-1.5's larger micro-batches reached some 0.45]",
)
@click.option("--price", type=click.FloatRange(min=0), help="Of a device and hour. Without it no cost is reckoned.")
@click.option(
    "--samples",
    multiple=True,
    callback=_samples,
    metavar="STAGE=N",
    help="Samples of a stage, instead of those in the workspace or the published number.",
)
@click.option(
    "--tuning",
    type=click.Choice(["full", "lora", "qlora"]),
    help="The whole language model, adapters (of the recipe's rank, else 128), or adapters over 4-bit weights.  "
    "[default: as the recipe says]",
)
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Change a field of the recipe.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Also draw memory and hours as PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
@click.pass_obj
def plan(
    workspace: str,
    recipe: str,
    hardware: str,
    mfu: float | None,
    price: float | None,
    samples: dict[str, int],
    tuning: str | None,
    overrides: tuple[str, ...],
    picture: Path | None,
    as_json: bool,
) -> None:
    """Reckon memory, hours and cost of a recipe's stages; nothing is downloaded or run.

    Memory is that of the fullest moment, with sequences of the stage's max_length; hours are for the mean length.
    Datasets in the workspace are counted (a full-size recipe does not take the synthetic sample corpus); where there
    is none, the published sizes stand in, and the plan says so.

    \b
    Examples:
      medvlm plan --recipe llava-med --hardware 8xA100-40G
      medvlm plan --recipe llava-med-v15 --hardware 4xH100 --mfu 0.4 --price 2.5
      medvlm plan --recipe llava-med --hardware 1x4090 --tuning qlora --picture plan.png
      medvlm plan --recipe llava-med --samples align=600000 --set stages.align.micro_batch=8 --json
    """
    from medvlm.config import load_recipe
    from medvlm.store import Workspace
    from medvlm.training.hardware import parse_hardware

    loaded, machine = load_recipe(recipe, overrides), parse_hardware(hardware)
    for name in samples:
        loaded.stage(name)
    from medvlm.training.plan import UTILISATION, make_plan

    made = make_plan(
        loaded,
        machine,
        mfu=mfu or UTILISATION,
        price=price,
        workspace=Workspace(Path(workspace)),
        samples=samples,
        tuning=cast("Tuning | None", tuning),
    )
    if picture is not None:
        _draw(made, picture)
    if as_json:
        print_json(dataclasses.asdict(made))
    else:
        _show(made)


def _show(made: Plan) -> None:
    from rich.console import Console

    console = Console(width=max(110, Console().width), highlight=False)
    counts = made.parameters
    console.print(
        f"[bold]{made.recipe}[/bold] on [bold]{made.hardware}[/bold], utilisation {made.mfu:g}\n"
        f"{_billions(counts['total'])} parameters: tower {_billions(counts['vision_tower'])}, projector "
        f"{_billions(counts['projector'])}, language model {_billions(counts['language_model'])}; "
        f"{_billions(counts['active'])} active for a token"
    )
    console.print(_stage_table(made))
    for stage in made.stages:
        console.print(_memory_bar(stage, made.gib_available))
        if stage.advice:
            console.print(f"  [red]{stage.stage} does not fit in {made.gib_available:g} GiB[/red]: {stage.advice}")
    console.print(" ".join(f"[{colour}]█[/{colour}] {part.replace('_', ' ')}" for part, colour in _PARTS.items()))
    for stage in made.stages:
        console.print(_choice_table(stage))
    console.print("Samples and lengths:")
    for source in dict.fromkeys(source for stage in made.stages for source in stage.data.values()):
        console.print(f"  {source}", style="dim")


def _stage_table(made: Plan) -> Any:
    from rich.table import Table

    table = Table()
    for heading in ("stage", "learns", "setting", "samples", "steps", "tokens", "GiB a GPU", "fits", "hours", "cost"):
        table.add_column(heading, justify="left" if heading in ("stage", "learns", "setting") else "right")
    for stage in made.stages:
        checkpointing = ", ckpt" if stage.gradient_checkpointing else ""
        table.add_row(
            stage.stage,
            f"{_billions(stage.trained)} {', '.join(stage.trains).replace('language_model', 'LM')}",
            f"{stage.tuning}, ZeRO-{stage.zero_stage}, {stage.micro_batch} x {stage.accumulation}{checkpointing}",
            f"{stage.samples:,}",
            f"{stage.steps:,}",
            f"{stage.tokens / 1e6:,.0f} M",
            f"{stage.gib_per_gpu:.1f}",
            "[green]yes[/green]" if stage.fits else "[red]no[/red]",
            f"{stage.hours:g}",
            "-" if stage.cost is None else f"{stage.cost:,.2f}",
        )
    table.add_section()
    total = "-" if made.cost is None else f"{made.cost:,.2f}"
    table.add_row("all", *[""] * 6, "yes" if made.fits else "[red]no[/red]", f"{made.hours:g}", total)
    return table


def _memory_bar(stage: StagePlanned, available: float) -> str:
    scale = _BAR / max(available, stage.gib_per_gpu)
    bar = "".join(f"[{_PARTS[p]}]{'█' * round(gib * scale)}[/]" for p, gib in stage.memory_gib.items())
    drawn = sum(round(gib * scale) for gib in stage.memory_gib.values())
    rest = "░" * max(0, round(available * scale) - drawn)
    return f"{stage.stage:<9} {bar}{rest} {stage.gib_per_gpu:.1f} of {available:g} GiB"


def _choice_table(stage: StagePlanned) -> Any:
    from rich.table import Table

    table = Table(title=f"{stage.stage}: GiB a GPU for other choices", title_justify="left")
    table.add_column("")
    for zero in range(4):
        table.add_column(f"ZeRO-{zero}", justify="right")
    rows: dict[str, list[str]] = {}
    for choice in stage.choices:
        name = f"{choice.tuning}, activations {'recomputed' if choice.gradient_checkpointing else 'kept'}"
        colour = "green" if choice.fits else "red"
        rows.setdefault(name, []).append(f"[{colour}]{choice.gib_per_gpu:.1f}[/{colour}]")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _draw(made: Plan, path: Path) -> None:
    from matplotlib.figure import Figure

    from medvlm.store import atomic_path

    figure = Figure(figsize=(9, 1.4 + 0.7 * len(made.stages)), layout="constrained")
    axes: Any = figure.add_subplot()
    names = [f"{s.stage}\n{s.hours:g} h" for s in made.stages]
    left = [0.0] * len(names)
    for part in _PARTS:
        sizes = [stage.memory_gib[part] for stage in made.stages]
        axes.barh(names, sizes, left=left, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.axvline(made.gib_available, color="black", linestyle="--", label=f"{made.gib_available:g} GiB")
    axes.invert_yaxis()
    axes.set_xlabel("GiB a GPU")
    axes.set_title(f"{made.recipe} on {made.hardware}")
    axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
