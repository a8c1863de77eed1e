"""Promotion: a release that checks and a person agree on becomes the model that others may use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medvlm.approval import approval
from medvlm.config import load_recipe
from medvlm.errors import ReleaseRefused
from medvlm.evaluation.accepted import fallen_scores
from medvlm.recipe_schema import Recipe
from medvlm.release.bundle import verify_release
from medvlm.release.card import dataset_names
from medvlm.store import Workspace, read_json, read_report, write_json

__all__ = ["Promotion", "obstacles", "promote", "promoted"]

REGISTRY_VARIABLE = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True, slots=True)
class Promotion:
    """Which release of a recipe may be used, and who said so."""

    recipe: str
    fingerprint: str
    """Of the release bundle: over the SHA-256 of each of its files."""
    bundle: str
    who: str
    when: str
    """UTC, ISO 8601."""
    registered: str
    """``name/version`` in MLflow's model registry; empty where none is configured."""


def promoted(workspace: Workspace, name: str) -> Promotion | None:
    """The release of a recipe that may be used; None where there is none yet."""
    path = workspace.release(name) / "promoted.json"
    return Promotion(**read_json(path)) if path.is_file() else None


def obstacles(workspace: Workspace, name: str) -> list[str]:
    """Everything that stands between a recipe's release and its promotion; empty where nothing does.

    Args:
        workspace: With the release built.
        name: The recipe.

    Raises:
        WorkspaceError: The release has not been built.
        RecipeError: There is no such recipe.
    """
    recipe = load_recipe(name)
    found = [f"the bundle's {path} is not as it was made" for path in verify_release(_bundle(workspace, name))]
    found += _broken_contracts(workspace, recipe)
    for benchmark in recipe.benchmarks:
        found += [f"{benchmark}: {fallen}" for fallen in fallen_scores(workspace, name, benchmark)]
    found += _leaks(workspace, recipe)
    if approval(workspace, name, _fingerprint(workspace, name)) is None:
        found.append("nobody has approved this release on the dashboard")
    return found


def promote(workspace: Workspace, name: str, *, registry: str | None = None) -> Promotion:
    """Make a recipe's release the one that may be used.

    Args:
        workspace: With the release built and approved.
        name: The recipe.
        registry: MLflow address to register it at; by default that of the environment, none if it is not set.

    Raises:
        ReleaseRefused: A check fails, or nobody approved it.
        WorkspaceError: The release has not been built.
    """
    found = obstacles(workspace, name)
    given = approval(workspace, name, _fingerprint(workspace, name))
    if found or given is None:
        raise ReleaseRefused(
            f"{name} is not promoted: {'; '.join(found)}",
            where=str(workspace.release(name)),
            hint="mend what is named, build the release again and have it approved",
        )
    registry = registry if registry is not None else os.environ.get(REGISTRY_VARIABLE, "")
    promotion = Promotion(
        recipe=name,
        fingerprint=_fingerprint(workspace, name),
        bundle=str(_bundle(workspace, name)),
        who=given.who,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        registered=_register(registry, workspace, name) if registry else "",
    )
    write_json(workspace.release(name) / "promoted.json", {n: getattr(promotion, n) for n in Promotion.__slots__})
    return promotion


def _bundle(workspace: Workspace, name: str) -> Path:
    return workspace.release(name) / "bundle"


def _fingerprint(workspace: Workspace, name: str) -> str:
    report = read_report(workspace.release(name))
    return report.fingerprint if report else ""


def _broken_contracts(workspace: Workspace, recipe: Recipe) -> list[str]:
    names = ["figures", "benchmark-items", *dataset_names(recipe)]
    found: list[str] = []
    for name in names:
        result = workspace.contract(name) / "result.json"
        if not result.is_file():
            found.append(f"the contract {name} was never checked")
        elif not read_json(result).get("success"):
            found.append(f"the contract {name} is broken")
    return found


def _leaks(workspace: Workspace, recipe: Recipe) -> list[str]:
    report = read_report(workspace.leakage)
    if report is None:
        return ["leakage was never measured"]
    tested = {f"{name}:test" for name in recipe.benchmarks}
    return [
        f"{row['leaked_images']} test images of {row['test']} are in {row['train']}"
        for row in report.details.get("comparisons", [])
        if row["train"] in dataset_names(recipe) and row["test"] in tested and row["leaked_images"]
    ]


def _register(registry: str, workspace: Workspace, name: str) -> str:
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise ReleaseRefused(
            "MLflow is not installed", where=REGISTRY_VARIABLE, hint="pip install mlflow-skinny, or unset the variable"
        ) from error
    make: Any = MlflowClient
    client = make(tracking_uri=registry, registry_uri=registry)
    try:
        try:
            client.get_registered_model(name)
        except MlflowException:
            client.create_registered_model(name)
        tags = {"fingerprint": _fingerprint(workspace, name), "research_use_only": "true"}
        version = client.create_model_version(name, source=str(_bundle(workspace, name)), tags=tags)
        client.set_registered_model_alias(name, "promoted", version.version)
    except MlflowException as error:
        raise ReleaseRefused(
            f"the model registry refused: {error}", where=registry.split("@")[-1], hint="check the registry and repeat"
        ) from error
    return f"{name}/{version.version}"
