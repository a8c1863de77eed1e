"""The command line: quick help, every verb there, errors with exit code 1 and the next step."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from medvlm import RESEARCH_USE_ONLY
from medvlm.cli import VERBS, cli
from medvlm.pipeline import with_items
from medvlm.settings import Settings, read_settings


def medvlm(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medvlm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_loads_and_shows_examples(verb: str) -> None:
    module, function = VERBS[verb][0].split(":")
    assert isinstance(getattr(importlib.import_module(module), function), click.Command)
    shown = CliRunner().invoke(cli, [verb, "--help"])
    assert shown.exit_code == 0, shown.output
    assert "medvlm" in shown.output.split("Options:")[0].replace("Usage: ", ""), "help has no example"


def test_help_names_every_verb_and_the_limits_of_use() -> None:
    shown = CliRunner().invoke(cli, ["--help"]).output
    assert all(f"  {verb} " in shown for verb in VERBS)
    assert RESEARCH_USE_ONLY.split(".")[0] in " ".join(shown.split())


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "pyarrow", "numpy", "pydantic", "lxml", "PIL", "duckdb", "transformers", "yaml")
    code = (
        "import sys; from click.testing import CliRunner; from medvlm.cli import cli;"
        f"CliRunner().invoke(cli, ['--help']); print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_an_unknown_recipe_is_one_readable_error(tmp_path: Path) -> None:
    done = medvlm("--workspace", str(tmp_path / "w"), "train", "--recipe", "tiny-lava-med", "--stage", "1")
    assert done.returncode == 1
    assert "tiny-lava-med" in done.stderr
    assert "next:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_wrong_usage_exits_with_2() -> None:
    assert medvlm("no-such-verb").returncode == 2


def test_a_file_in_the_place_of_the_workspace_is_one_readable_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = medvlm("--workspace", str(tmp_path / "file" / "w"), "corpus")
    assert done.returncode == 1
    assert "--workspace" in done.stderr
    assert "Traceback" not in done.stderr


def test_configure_writes_what_dvc_reads(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    done = medvlm("configure", "--sample", "--recipe", "tiny-llava-med", "--file", str(path), "--json")
    assert done.returncode == 0, done.stderr
    settings = read_settings(path)
    assert json.loads(done.stdout) == settings.model_dump()
    assert settings == with_items(Settings.sample())


def test_configure_with_a_list_takes_texts_from_its_own_figures(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    medvlm("configure", "--urls", "list.jsonl", "--store", "s3://pmc-oa-opendata", "--file", str(path))
    settings = read_settings(path)
    assert settings.figures.urls == "list.jsonl"
    assert settings.alignment == settings.instruct == "workspace/figures/shards"
    medvlm("configure", "--vqa-rad", "/data/vqa-rad", "--file", str(path))
    again = read_settings(path)
    assert again.figures == settings.figures, "what is not named stays"
    assert again.benchmarks["vqa-rad"] == "/data/vqa-rad"


def test_broken_settings_name_the_key(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(Settings.sample().model_dump_json().replace('"seed":0', '"sead":0'))
    done = medvlm("configure", "--file", str(path))
    assert done.returncode == 1
    assert "sead" in done.stderr


def test_the_shipped_settings_are_the_sample() -> None:
    assert read_settings(Path(__file__).parents[1] / "params.yaml") == with_items(Settings.sample())


def test_a_row_that_is_not_json_fails_by_its_line_after_the_others_were_fetched(
    tmp_path: Path, real_data: Path
) -> None:
    mirror = real_data / "pmc_mirror"
    good = (mirror / "pmc_urls.jsonl").read_text("utf-8").splitlines()[0]
    urls = tmp_path / "urls.jsonl"
    urls.write_text(f"{good}\n{{not json\n")
    command = ["--workspace", str(tmp_path / "w"), "fetch", "--urls", str(urls)]
    command += ["--store", str(mirror / "pmc-oa-opendata"), "--json"]
    done = medvlm(*command)
    assert done.returncode == 1
    assert json.loads(done.stdout)["by_status"] == {"bad_row": 1, "ok": 1}
    assert "line 2" in done.stderr and str(urls) in done.stderr and "next:" in done.stderr
    assert medvlm(*command, "--tolerate-bad-rows").returncode == 0


@pytest.mark.parametrize(
    ("store", "words"), [("/no/such/folder", "not a folder"), ("http://127.0.0.1:9", "does not answer")]
)
def test_a_store_out_of_reach_is_one_readable_error(tmp_path: Path, store: str, words: str) -> None:
    urls = tmp_path / "urls.jsonl"
    urls.write_text("PMC1\n")
    done = medvlm("--workspace", str(tmp_path / "w"), "fetch", "--urls", str(urls), "--store", store)
    assert done.returncode == 1
    assert words in done.stderr
    assert not list((tmp_path / "w").rglob("*.parquet"))


def test_an_empty_dataset_is_refused_before_training(tmp_path: Path) -> None:
    from medvlm.records import Sample
    from medvlm.store import Workspace, write_records

    write_records(Workspace(tmp_path / "w").samples("alignment"), Sample, [])
    done = medvlm("--workspace", str(tmp_path / "w"), "train", "--recipe", "tiny-llava-med", "--stage", "1")
    assert done.returncode == 1
    assert "no training samples" in done.stderr
    assert not list((tmp_path / "w").rglob("*.safetensors"))


def test_the_demo_leaves_the_shipped_settings_byte_for_byte(tmp_path: Path) -> None:
    shipped = (Path(__file__).parents[1] / "params.yaml").read_bytes()
    path = tmp_path / "params.yaml"
    assert medvlm("configure", "--sample", "--recipe", "tiny-llava-med", "--file", str(path)).returncode == 0
    assert path.read_bytes() == shipped
