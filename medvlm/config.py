"""Recipes by name or file: read, merged with what they extend, and refused early if wrong."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from medvlm.errors import RecipeError
from medvlm.recipe_fields import field_model, field_role
from medvlm.recipe_schema import (
    Checkpoints,
    Decoding,
    LanguageModel,
    Model,
    MoE,
    Projector,
    Recipe,
    Router,
    Stage,
    Tokenizer,
    VisionTower,
)
from medvlm.store import Workspace, atomic_folder

__all__ = [
    "Checkpoints",
    "Decoding",
    "LanguageModel",
    "MoE",
    "Model",
    "Projector",
    "Recipe",
    "Router",
    "Stage",
    "Tokenizer",
    "VisionTower",
    "load_recipe",
    "override",
    "recipe_differences",
    "recipe_names",
    "recipe_yaml",
    "router_yaml",
    "stage_yaml",
    "twin_violations",
    "write_stage_files",
]

RECIPES = Path(__file__).parent / "recipes"

Path_ = tuple[str, ...]
"""Keys that lead to a field, a stage by its name."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with medvlm, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe with everything that it inherits.

    Args:
        name_or_path: One of ``recipe_names()``, or a YAML file (anything with a ``/`` or ending in ``.yaml``).
        overrides: ``a.b=value`` each, as of ``--set``; ``stages.align.epochs=2``.

    Raises:
        RecipeError: No such recipe, or it does not validate: with file, field and what is allowed.
    """
    path = _recipe_path(name_or_path, "--recipe")
    layers = _layers(path, ())
    for text in overrides:
        layers.append((f"--set {text}", override(text)))
    merged: dict[str, Any] = {}
    for _, values in layers:
        merged = _merge(merged, values)
    return _validated(merged, layers)


def override(text: str) -> dict[str, Any]:
    """``a.b=value`` as nested mappings; the value is read as YAML.

    Raises:
        RecipeError: It has no ``=`` or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip("."):
        raise RecipeError(f"{text!r} is not an override", where="--set", hint="write --set stages.align.epochs=2")
    nested: Any = _parse(value, f"--set {text}")
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _recipe_path(name_or_path: str | Path, where: str, folder: Path | None = None) -> Path:
    text = str(name_or_path)
    if "/" in text or text.endswith((".yaml", ".yml")):
        path = (folder or Path()) / text
        if not path.is_file():
            raise RecipeError("the recipe file does not exist", where=str(path), hint="check the path")
        return path
    path = RECIPES / f"{text}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"there is no recipe {text!r}{_did_you_mean(text, recipe_names())}",
            where=where,
            hint=f"choose from {', '.join(recipe_names())}, or give a YAML file",
        )
    return path


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2e-5 is a number and ``on`` is a word, as in YAML 1.2, and a key cannot stand twice."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", key_node.start_mark)
        seen.add(key)
    return cast("dict[str, Any]", loader.construct_mapping(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"this is not YAML: {error}", where=where, hint="mend the line") from error


def _layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Files from the base to ``path``, with their values."""
    if path in seen:
        chain = " → ".join(p.name for p in (*seen, path))
        raise RecipeError(f"recipes extend each other in a circle: {chain}", where=str(path), hint="cut the circle")
    try:
        values = _parse(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError("the recipe is not UTF-8", where=str(path), hint="save it as UTF-8") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError("a recipe is a mapping of fields", where=str(path), hint="see 'medvlm recipe show llava-med'")
    parent = values.pop("extends", None)
    if parent is None:
        return [(str(path), values)]
    base = _recipe_path(str(parent), f"{path}, field extends", path.parent)
    return [*_layers(base, (*seen, path)), (str(path), values)]


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge deeply, anything else replaces; null takes an inherited mapping away."""
    merged = dict(base)
    for key, value in values.items():
        if isinstance(value, dict):
            inherited = merged.get(key)
            merged[key] = _merge(inherited if isinstance(inherited, dict) else {}, value)
        elif value is None and isinstance(merged.get(key), dict):
            del merged[key]
        else:
            merged[key] = value
    return merged


def _validated(merged: dict[str, Any], layers: list[tuple[str, dict[str, Any]]]) -> Recipe:
    stages = merged.get("stages")
    names = list(stages) if isinstance(stages, dict) else []
    values = dict(merged)
    if isinstance(stages, dict):
        values["stages"] = [{"name": n, **s} if isinstance(s, dict) else s for n, s in stages.items()]
    try:
        return Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        raise _refusal(first, names, layers) from error


def _refusal(error: Any, stage_names: list[str], layers: list[tuple[str, dict[str, Any]]]) -> RecipeError:
    path: Path_ = tuple(str(part) for part in error["loc"])
    if len(path) > 1 and path[0] == "stages" and path[1].isdigit() and int(path[1]) < len(stage_names):
        path = ("stages", stage_names[int(path[1])], *path[2:])
    file = next((name for name, values in reversed(layers) if _holds(values, path)), layers[-1][0])
    field, last = ".".join(path), str(error["loc"][-1]) if error["loc"] else ""
    where = f"{file}, field {field}" if field else file
    if error["type"] == "extra_forbidden":
        owner = field_model(path[:-1])
        allowed = list(owner.model_fields) if owner else []
        return RecipeError(
            f"there is no field {last!r}{_did_you_mean(last, allowed)}",
            where=where,
            hint=f"allowed are {', '.join(allowed)}",
        )
    if error["type"] == "missing":
        return RecipeError(f"the field {field} is missing", where=where, hint=f"add {last}, or extend a recipe")
    if field == "stages" and error["type"] in ("too_short", "too_long", "tuple_type"):
        return RecipeError(
            f"a recipe has three stages, this one has {len(stage_names)}: {', '.join(stage_names)}",
            where=where,
            hint="write stages as a mapping by name; null takes an inherited stage away",
        )
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f" (it is {error['input']!r})"
    return RecipeError(f"{message[0].lower()}{message[1:]}{shown}", where=where, hint="change the field in that file")


def _holds(values: Any, path: Path_) -> bool:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _plain(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    values["stages"] = {stage.pop("name"): stage for stage in values["stages"]}
    return values


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that ``load_recipe`` reads back."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True)


def stage_yaml(recipe: Recipe, number: int) -> str:
    """What one stage depends on: the model, the seed and the stage; the other stages are left out."""
    values = _plain(recipe)
    stage = recipe.stages[number - 1].name
    model = values["model"]
    if stage != "moe_tune":
        # Experts and router come into being after this stage.
        model = {name: value for name, value in model.items() if name != "moe"}
    kept = {"name": recipe.name, "seed": recipe.seed, "language": recipe.language, "model": model}
    if recipe.stages[number - 1].data == "benchmarks":
        kept["benchmarks"] = values["benchmarks"]
    return yaml.safe_dump({**kept, "stages": {stage: values["stages"][stage]}}, sort_keys=False, allow_unicode=True)


def router_yaml(recipe: Recipe) -> str:
    """What the domain router depends on: the model and the seed; the template that its prompts have."""
    values = _plain(recipe)
    instruct = recipe.stages[-2]
    kept = {"name": recipe.name, "seed": recipe.seed, "language": recipe.language, "model": values["model"]}
    prompt = {"template": instruct.template, "max_length": instruct.max_length}
    return yaml.safe_dump({**kept, "prompt": prompt}, sort_keys=False, allow_unicode=True)


def write_stage_files(workspace: Workspace, recipe: Recipe) -> Path:
    """Write ``stage1.yaml`` to ``stage3.yaml`` (see ``stage_yaml``) and return their folder.

    A recipe with a domain router has ``router.yaml`` beside them.

    Raises:
        WorkspaceError: The disk is full or read-only.
    """
    with atomic_folder(workspace.recipe(recipe.name)) as folder:
        for number in range(1, len(recipe.stages) + 1):
            (folder / f"stage{number}.yaml").write_text(stage_yaml(recipe, number), "utf-8")
        if recipe.model.moe is not None:
            (folder / "router.yaml").write_text(router_yaml(recipe), "utf-8")
    return workspace.recipe(recipe.name)


def recipe_differences(recipe: Recipe, base: Recipe) -> dict[Path_, tuple[Any, Any]]:
    """Fields that differ, each with the base's value and the recipe's."""
    ours, theirs = _leaves(_plain(recipe)), _leaves(_plain(base))
    return {
        path: (theirs.get(path), ours.get(path))
        for path in sorted(set(ours) | set(theirs))
        if ours.get(path) != theirs.get(path)
    }


def _leaves(values: Any, path: Path_ = ()) -> dict[Path_, Any]:
    if not isinstance(values, dict):
        return {path: values}
    return {leaf: value for key, inner in values.items() for leaf, value in _leaves(inner, (*path, key)).items()}


def twin_violations(recipe: Recipe, base: Recipe) -> list[str]:
    """Fields in which a twin differs from its system although they are neither size nor source."""
    differing = recipe_differences(recipe, base)
    return [".".join(path) for path in differing if field_role(path) is None]
