"""Which steps of the pipeline have a result, which are out of date, and which have failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medvlm.failures import Failure, failures
from medvlm.store import Report, Workspace, read_report

__all__ = ["Step", "data_steps", "names_in", "recipe_steps"]


@dataclass(frozen=True)
class Step:
    """One step of the pipeline and whether its result is there."""

    name: str
    state: Literal["done", "stale", "missing", "failed"]
    """``stale``: a step that it reads from has a newer result. ``failed``: its last run ended with an error."""
    report: Report | None
    asset: str = ""
    """Its name in the lineage."""
    partition: str = ""
    """Its key there, where it is made several times; the parts of a key in the order of their dimensions' names."""
    failure: Failure | None = None


@dataclass(frozen=True)
class _Plan:
    """Where a step's result lies, and what it is called elsewhere."""

    name: str
    folder: Path
    asset: str
    command: tuple[str, ...]
    partition: str = ""
    inputs: tuple[str, ...] = ()


def data_steps(workspace: Workspace) -> list[Step]:
    """The steps that all recipes share, in the order of the pipeline.

    Raises:
        InputError: A report is damaged.
    """
    plan = [
        _Plan("corpus", workspace.corpus, "sample_corpus", ("corpus",)),
        _Plan("figures", workspace.figures, "figures", ("fetch",), inputs=("corpus",)),
    ]
    for name in ("alignment", "instruct"):
        command = ("dataset", "build", name)
        plan.append(_Plan(name, workspace.dataset(name), f"{name}_dataset", command, inputs=("figures",)))
    for name in names_in(workspace.benchmark("_").parent):
        command = ("dataset", "build-benchmark", name)
        plan.append(_Plan(name, workspace.benchmark(name), "benchmark_items", command))
    plan.append(_Plan("leakage", workspace.leakage, "leakage_report", ("leakage",), inputs=("alignment", "instruct")))
    return _steps(workspace, plan)


def recipe_steps(workspace: Workspace, recipe: str) -> list[Step]:
    """The steps of one recipe, from the first stage to the scores.

    Raises:
        InputError: A report is damaged.
    """
    plan = [_Plan(name, workspace.dataset(name), "", ()) for name in ("alignment", "instruct")]
    for number, inputs in ((1, ("alignment",)), (2, ("instruct", "stage 1"))):
        plan.append(_stage(workspace, recipe, number, inputs))
    above = ("stage 2",)
    for name, folder, asset, command in (
        ("router", workspace.router(recipe), "domain_router", ("train-router", recipe)),
        ("preferences", workspace.preference(recipe), "preference_dataset", ("dataset", "build-preference", recipe)),
    ):
        # Most recipes have neither.
        if read_report(folder):
            plan.append(_Plan(name, folder, asset, command, recipe, ("stage 2",)))
            above += (name,)
    plan.append(_stage(workspace, recipe, 3, above))
    for name in names_in(workspace.benchmark("_").parent):
        # Dagster writes a key of two dimensions in the order of their names.
        key = f"{name}|{recipe}"
        items, answers = f"{name} items", f"answers to {name}"
        plan.append(_Plan(items, workspace.benchmark(name), "", ()))
        for step, folder, verb, asset, inputs in (
            (answers, workspace.predictions(recipe, name), "predict", "benchmark_predictions", ("stage 3", items)),
            (f"scores on {name}", workspace.scores(recipe, name), "score", "benchmark_scores", (answers,)),
        ):
            plan.append(_Plan(step, folder, asset, (verb, recipe, name), key, inputs))
    return [step for step in _steps(workspace, plan) if step.asset]


def _stage(workspace: Workspace, recipe: str, number: int, inputs: tuple[str, ...]) -> _Plan:
    command = ("train", recipe, "--stage", str(number))
    return _Plan(
        f"stage {number}", workspace.stage(recipe, number), f"stage{number}_checkpoint", command, recipe, inputs
    )


def _steps(workspace: Workspace, plan: Sequence[_Plan]) -> list[Step]:
    reports = {step.name: read_report(step.folder) for step in plan}
    broken = failures(workspace)
    found: list[Step] = []
    for step in plan:
        report = reports[step.name]
        made = report.created_at if report else ""
        # A result that is newer than a failure shows that the failure is over.
        failure = next((f for f in reversed(broken) if step.command and f.is_of(*step.command) and f.when > made), None)
        above = [reports[other] for other in step.inputs]
        stale = any(other is not None and other.created_at > made for other in above)
        state = "failed" if failure else "missing" if report is None else "stale" if stale else "done"
        found.append(Step(step.name, state, report, step.asset, step.partition, failure))
    return found


def names_in(folder: Path) -> list[str]:
    """Sub-folders that a step made; temporary ones begin with a dot."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
