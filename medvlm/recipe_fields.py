"""The fields of a recipe by their path: the section that holds one, and whether a twin may change it."""

from __future__ import annotations

import types
import typing
from typing import Any, get_args

from pydantic import BaseModel

from medvlm.recipe_schema import Recipe, Role, Stage

__all__ = ["field_model", "field_role"]


def field_role(path: tuple[str, ...]) -> Role | None:
    """Whether a field is a ``size`` or a ``source``; None where a twin must not change it.

    Args:
        path: Such as ``("stages", "align", "epochs")``, with a stage's name as the YAML has it.

    Raises:
        KeyError: There is no such field.
    """
    owner = field_model(path[:-1])
    if owner is None or path[-1] not in owner.model_fields:
        raise KeyError(".".join(path))
    field = owner.model_fields[path[-1]]
    return next((m for m in [*field.metadata, *_nested_metadata(field.annotation)] if isinstance(m, Role)), None)


def _nested_metadata(annotation: Any) -> list[Any]:
    # `Annotated[int, SIZE] | None` keeps its metadata one level down.
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for arg in get_args(annotation) for m in getattr(arg, "__metadata__", ())]
    return []


def field_model(path: tuple[str, ...]) -> type[BaseModel] | None:
    """The section that a path of keys leads to; None where it leads to none."""
    model: type[BaseModel] = Recipe
    keys = iter(path)
    for key in keys:
        if model is Recipe and key == "stages":
            if next(keys, None) is None:
                return None
            model = Stage
            continue
        field = model.model_fields.get(key)
        section = None if field is None else _section(field.annotation)
        if section is None:
            return None
        model = section
    return model


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be null."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
