"""The release bundle: checkpoints, card, credit, and a bill of materials of the data, in one folder."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import medvlm
from medvlm.config import load_recipe, recipe_yaml
from medvlm.data.attribution import write_attribution
from medvlm.errors import WorkspaceError
from medvlm.recipe_schema import Recipe
from medvlm.release.card import dataset_names, licences_of, model_card
from medvlm.store import Report, Workspace, atomic_folder, fingerprint, read_report, shard_paths, write_report

__all__ = ["build_release", "checksums", "file_sha256", "verify_release"]

SUMS = "SHA256SUMS"


def build_release(workspace: Workspace, name: str) -> Report:
    """Write ``releases/<recipe>/bundle``, whole or not at all, and its report beside it.

    The bundle holds ``checkpoints/<target>/`` of the last stage, ``README.md`` (the model card), ``recipe.yaml``,
    ``ATTRIBUTION.csv`` and ``NOTICE.txt`` (credit for the figures), ``sbom.cdx.json`` (CycloneDX 1.6: model and
    data with licences and hashes) and ``SHA256SUMS``.

    Args:
        workspace: With the recipe trained and scored.
        name: The recipe.

    Raises:
        WorkspaceError: Something that belongs into it has not been made; it says which command makes it.
    """
    started = time.monotonic()
    recipe = load_recipe(name)
    card = model_card(workspace, name)
    last = len(recipe.stages)
    with atomic_folder(workspace.release(name) / "bundle") as folder:
        for target in recipe.targets(last):
            _link_tree(workspace.checkpoint(name, last, target), folder / "checkpoints" / target)
        (folder / "README.md").write_text(card, "utf-8")
        (folder / "recipe.yaml").write_text(recipe_yaml(recipe), "utf-8")
        credited = _credit(workspace, folder)
        (folder / "sbom.cdx.json").write_text(_bill_of_materials(workspace, recipe, folder), "utf-8")
        sums = checksums(folder)
        lines = [f"{digest}  {path}\n" for path, digest in sums.items()]
        (folder / SUMS).write_text("".join(lines), "utf-8")
    report = Report(
        step=f"release {name}",
        counts={"files": len(sums), "figures_credited": credited},
        details={"recipe": name, "licences": licences_of(workspace, recipe)},
        fingerprint=fingerprint("".join(lines)),
    )
    return write_report(workspace.release(name), report, started=started, packages=())


def _link_tree(source: Path, target: Path) -> None:
    """A copy that takes no space where the disk allows it: files of a finished checkpoint never change."""
    if not source.is_dir():
        raise WorkspaceError(
            "the checkpoint does not exist", where=str(source), hint="train the last stage: medvlm train --stage 3"
        )

    def link(path: str, copy: str) -> str:
        try:
            os.link(path, copy)
        except OSError:
            shutil.copy2(path, copy)
        return copy

    shutil.copytree(source, target, copy_function=link)


def _credit(workspace: Workspace, folder: Path) -> int:
    if not workspace.figure_shards.is_dir():
        return 0
    return write_attribution(workspace.figure_shards, folder)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a bundle, by relative path, sums file left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_release(folder: Path) -> list[str]:
    """Files of a bundle that are missing, changed, or not listed; empty where all is as it was made.

    Raises:
        WorkspaceError: There is no bundle.
    """
    listed = folder / SUMS
    if not listed.is_file():
        raise WorkspaceError("there is no release", where=str(folder), hint="run: medvlm release build --recipe NAME")
    expected = dict(line.split("  ", 1)[::-1] for line in listed.read_text("utf-8").splitlines())
    found = checksums(folder)
    return sorted(path for path in {*expected, *found} if expected.get(path) != found.get(path))


def _bill_of_materials(workspace: Workspace, recipe: Recipe, folder: Path) -> str:
    """CycloneDX 1.6 JSON: the model, what it was made from, and how they hang together."""
    from cyclonedx.model.component import ComponentType

    make_bom, make_metadata = _untyped("cyclonedx.model.bom", "Bom"), _untyped("cyclonedx.model.bom", "BomMetaData")
    weights = {path: digest for path, digest in checksums(folder).items() if path.endswith(".safetensors")}
    model = _component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=recipe.name,
        version=medvlm.__version__,
        description=recipe.title,
        bom_ref=recipe.name,
        properties=_properties({f"sha256:{path}": digest for path, digest in weights.items()}),
    )
    parts = [*_datasets(workspace, recipe), *_base_weights(recipe)]
    last = read_report(workspace.stage(recipe.name, len(recipe.stages)))
    made = datetime.fromisoformat(last.created_at) if last else datetime.now(UTC)
    # Nothing drawn or read from the clock: a bundle of the same things has the same bytes.
    bom = make_bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, fingerprint(*weights.values())),
        metadata=make_metadata(component=model, timestamp=made),
        components=parts,
    )
    bom.register_dependency(model, parts)
    return _untyped("cyclonedx.output.json", "JsonV1Dot6")(bom).output_as_string(indent=2)


def _datasets(workspace: Workspace, recipe: Recipe) -> Iterator[Any]:
    from cyclonedx.model.component import ComponentType

    make_licence = _untyped("cyclonedx.model.license", "DisjunctiveLicense")
    folders = {name: (workspace.dataset(name), workspace.dataset(name) / "samples") for name in dataset_names(recipe)}
    if any(stage.data == "benchmarks" for stage in recipe.stages):
        folders |= {name: (workspace.benchmark(name), workspace.items(name)) for name in recipe.benchmarks}
    for name, (step, shards) in folders.items():
        report = read_report(step)
        by_licence: dict[str, int] = report.details.get("by", {}).get("licence", {}) if report else {}
        yield _component(
            type=ComponentType.DATA,
            name=name,
            bom_ref=f"data/{name}",
            licenses=[make_licence(name=licence) for licence in sorted(by_licence) if licence],
            properties=_properties(
                {f"sha256:{path.name}": file_sha256(path) for path in shard_paths(shards)}
                | {f"samples:{licence or 'unknown'}": str(count) for licence, count in sorted(by_licence.items())}
            ),
        )


def _base_weights(recipe: Recipe) -> Iterator[Any]:
    """What the recipe began from, unless it was drawn from a seed here."""
    from cyclonedx.model.component import ComponentType

    tower, decoder = recipe.model.vision_tower.weights, recipe.model.language_model.weights
    for part, source in (("vision tower", tower), ("language model", decoder)):
        if source != "random":
            kind = ComponentType.MACHINE_LEARNING_MODEL
            yield _component(type=kind, name=source, bom_ref=f"base/{part}", description=part)


def _component(**fields: Any) -> Any:
    return _untyped("cyclonedx.model.component", "Component")(**fields)


def _properties(values: Mapping[str, str]) -> list[Any]:
    make = _untyped("cyclonedx.model", "Property")
    return [make(name=f"medvlm:{name}", value=value) for name, value in values.items()]


def _untyped(module: str, name: str) -> Any:
    """A class of the library, whose generated constructors are unknown to type checkers."""
    return getattr(importlib.import_module(module), name)
