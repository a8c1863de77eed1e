"""What a workspace is built from: the typed form of params.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medvlm.errors import InputError
from medvlm.store import atomic_path

__all__ = ["BENCHMARKS", "FigureSettings", "Settings", "read_settings", "write_settings"]

BENCHMARKS = ("vqa-rad", "slake", "pathvqa")

_HEADER = """\
# What this workspace is built from. Change it by hand, or with `medvlm configure`.
# `alignment` and `instruct` say where the text comes from: an official LLaVA-Med JSON file, joined
# to the figures by pair_id, or the figure shards themselves (captions for alignment, rule-based
# conversations for instruct).
"""


class FigureSettings(BaseModel):
    """Which figures are fetched, from where, under which licences."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    urls: str
    store: str
    policy: Literal["research", "commercial", "any-oa"] = "research"


class Settings(BaseModel):
    """The sources of one workspace. The defaults are the synthetic sample corpus."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workspace: str = "workspace"
    seed: int = 0
    figures: FigureSettings
    alignment: str
    instruct: str
    benchmarks: dict[Literal["vqa-rad", "slake", "pathvqa"], str]
    recipes: list[str] = Field(min_length=1)

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
            alignment=f"{corpus}/llava-med/alignment.json",
            instruct=f"{corpus}/llava-med/instruct.json",
            benchmarks={name: f"{corpus}/{name}" for name in BENCHMARKS},
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
    body = yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True)
    text = _HEADER + body
    if path.exists() and path.read_text("utf-8") == text:
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")
