"""What a workspace is built from: the typed form of params.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medvlm.errors import InputError
from medvlm.store import atomic_path

__all__ = [
    "BENCHMARKS",
    "Evaluation",
    "FigureSettings",
    "PipelineItems",
    "RecipeItem",
    "Settings",
    "read_settings",
    "write_settings",
]

BENCHMARKS = ("vqa-rad", "slake", "slake-zh", "pathvqa")

_HEADER = """\
# What this workspace is built from. Change it by hand, or with `medvlm configure`.
# `alignment` and `instruct` say where the text comes from: an official file (LLaVA-Med's
# JSON, ChiMed-VL's JSONL) or a folder of such, joined to the figures by pair_id, or the figure shards
# themselves (captions for alignment, rule-based conversations for instruct).
# `items` follows from `recipes`: what dvc.yaml repeats its stages over. After a change of `recipes` by
# hand, run `medvlm configure`.
"""


class FigureSettings(BaseModel):
    """Which figures are fetched, from where, under which licences."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    urls: str
    store: str
    policy: Literal["research", "commercial", "any-oa"] = "research"


class RecipeItem(BaseModel):
    """What stage 3 of a recipe reads beside the checkpoint of stage 2."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage3_data: str
    """The result of the contract on its data: the data's fingerprint stands in it."""
    stage3_part: str
    """The trained router of a mixture of experts; for other recipes a file that stage 3 reads anyway."""


class Evaluation(BaseModel):
    """One recipe on one benchmark."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    benchmark: str


class PipelineItems(BaseModel):
    """What dvc.yaml repeats its stages over; made by ``medvlm.pipeline``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipes: dict[str, RecipeItem] = {}
    routers: list[str] = []
    """Recipes with a domain router."""
    preferences: list[str] = []
    """Recipes that learn from preferences over their own answers."""
    evaluations: dict[str, Evaluation] = {}
    """By ``RECIPE-BENCHMARK``: each recipe on the benchmarks that it names."""


class Settings(BaseModel):
    """The sources of one workspace. The defaults are the synthetic sample corpus."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workspace: str = "workspace"
    bucket: str = ""
    """``s3://bucket/prefix`` that the workspace is the local copy of, for Dagster's runs; empty for none."""
    seed: int = 0
    figures: FigureSettings
    alignment: str
    instruct: str
    benchmarks: dict[Literal["vqa-rad", "slake", "slake-zh", "pathvqa"], str]
    recipes: list[str] = Field(min_length=1)
    review_threshold: int = Field(default=50, ge=1)
    """New review decisions that start a rebuild of the datasets, where that sensor is on."""
    items: PipelineItems = PipelineItems()

    @classmethod
    def sample(cls, workspace: str = "workspace", recipes: list[str] | None = None) -> Settings:
        """Settings that build everything from the synthetic sample corpus."""
        corpus = f"{workspace}/corpus"
        return cls(
            workspace=workspace,
            figures=FigureSettings(
                urls=f"{corpus}/llava_med_image_urls.jsonl",
                store=f"{corpus}/bucket/pmc-oa-opendata",
            ),
            alignment=f"{corpus}/alignment",
            instruct=f"{corpus}/instruct",
            # One release holds SLAKE in both languages.
            benchmarks={name: f"{corpus}/{name.removesuffix('-zh')}" for name in BENCHMARKS},
            recipes=recipes or ["tiny-llava-med"],
        )


def read_settings(path: Path) -> Settings:
    """The settings of a project folder.

    Args:
        path: Its params.yaml.

    Raises:
        InputError: It is missing, not YAML, or has an unknown key or a wrong type, with the key.
    """
    try:
        values: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
        return Settings.model_validate(values)
    except FileNotFoundError as error:
        raise InputError("the settings do not exist", where=str(path), hint="run 'medvlm configure'") from error
    except yaml.YAMLError as error:
        raise InputError(f"the settings are not YAML: {error}", where=str(path), hint="mend the line") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{field or 'the file'}: {first['msg']}",
            where=str(path),
            hint="mend the key, or write the file again with 'medvlm configure'",
        ) from error


def write_settings(path: Path, settings: Settings) -> None:
    """Write settings as params.yaml, atomically and only if they differ (DVC looks at its time).

    Raises:
        WorkspaceError: The folder cannot be written.
    """
    values = settings.model_dump()
    if not settings.bucket:
        del values["bucket"]
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    text = _HEADER + body
    if path.exists() and path.read_text("utf-8") == text:
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")
