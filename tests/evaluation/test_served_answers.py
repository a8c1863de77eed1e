"""A benchmark answered over HTTP by our own server: the answers that the same checkpoint gives in process."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import uvicorn
from checkpoint_factory import RECIPE, pictured_item, tiny_checkpoint
from click.testing import CliRunner

from medvlm.cli import cli
from medvlm.evaluation.predict import predict_benchmark
from medvlm.models.checkpoint import save_checkpoint
from medvlm.records import Prediction, VQAItem
from medvlm.serving.api import create_app
from medvlm.serving.chat import ChatModel
from medvlm.serving.engine import Engine
from medvlm.serving.meters import Meters
from medvlm.store import Workspace, read_records, write_records


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    save_checkpoint(workspace.checkpoint(RECIPE.name, 3, "vqa-rad"), tiny_checkpoint())
    write_records(workspace.items("vqa-rad"), VQAItem, [pictured_item(i) for i in range(6)])
    return workspace


@pytest.fixture
def address(workspace: Workspace) -> Generator[str]:
    chat = ChatModel.load(workspace.checkpoint(RECIPE.name, 3, "vqa-rad"))
    app = create_app(Engine(chat, max_batch=4, queue_limit=64), Meters(), name="tiny")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(60)


def test_a_server_gives_the_answers_of_its_checkpoint(workspace: Workspace, address: str) -> None:
    arguments = ["--workspace", str(workspace.root), "predict", "--backend", "server", "--name", "tiny-served"]
    arguments += ["--benchmark", "vqa-rad", "--base-url", address, "--model", "tiny", "--prompt", "image_first"]
    tokens = str(RECIPE.decoding.max_new_tokens)
    result = CliRunner().invoke(cli, [*arguments, "--max-tokens", tokens, "--no-blind", "--concurrency", "3"])
    assert result.exception is None, result.exception
    predict_benchmark(workspace, RECIPE, "vqa-rad", prompt="image_first")

    def said(name: str) -> dict[str, str]:
        answers = read_records(workspace.predictions(name, "vqa-rad") / "answers", Prediction)
        # The server does not send parts of characters at the end.
        return {a.item_id: a.text.rstrip("\ufffd").strip() for a in answers if not a.blind}

    assert said("tiny-served") == said(RECIPE.name)
    assert len(set(said("tiny-served").values())) > 2
