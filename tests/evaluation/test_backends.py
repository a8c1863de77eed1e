"""Answers by a server and from stored files: the same step, the same records, nothing lost."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import pictured_item
from click.testing import CliRunner
from PIL import Image

from medvlm.cli import cli
from medvlm.data.endpoint import ChatClient, Endpoint, EndpointSettings
from medvlm.data.response_cache import ResponseCache
from medvlm.errors import EndpointError, InputError, PredictionMismatch
from medvlm.evaluation.predict import predict_with_server, replay_answers
from medvlm.evaluation.score_step import score_recipe
from medvlm.records import Prediction, VQAItem
from medvlm.store import Workspace, read_records, write_records

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from chat_server import ChatServer, Reply, chat_server

ITEMS = [pictured_item(i) for i in range(6)]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    write_records(workspace.items("vqa-rad"), VQAItem, [pictured_item(50, "train"), *ITEMS])
    return workspace


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(lambda body, number: "yes") as running:
        yield running


def ask(workspace: Workspace, server: ChatServer, **options: Any) -> Any:
    settings = EndpointSettings(concurrency=2, attempts=2, backoff_s=0.01, timeout_s=30)
    with ResponseCache(workspace.scratch("served") / "answers.sqlite") as cache:
        client = ChatClient(Endpoint(server.url, "big-model"), cache, settings=settings)
        return predict_with_server(workspace, "big-model-served", "vqa-rad", client, **options)


def shown(body: dict[str, Any]) -> tuple[list[str], bytes]:
    """What kinds of parts a request holds, and its image."""
    (message,) = body["messages"]
    url = next(part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url")
    assert url.startswith("data:image/png;base64,")
    return [part["type"] for part in message["content"]], base64.b64decode(url.partition(",")[2])


def test_a_server_answers_every_item_with_and_without_its_image(workspace: Workspace, server: ChatServer) -> None:
    report = ask(workspace, server, options=True)
    answers = read_records(workspace.predictions("big-model-served", "vqa-rad") / "answers", Prediction)
    assert [(a.item_id, a.blind) for a in answers] == [(i.item_id, b) for b in (False, True) for i in ITEMS]
    assert {(a.model, a.stage, a.text) for a in answers} == {("big-model-served", "served", "yes")}
    assert report.details["served_model"] == "big-model" and report.details["prompt"] == "question_first+options"
    bodies = server.requests
    assert all(shown(body)[0] == ["text", "image_url"] for body in bodies) and server.most_at_once <= 2
    assert {shown(body)[1] for body in bodies[:6]} == {item.image.bytes for item in ITEMS}
    assert "options: [yes, no]" in bodies[0]["messages"][0]["content"][0]["text"]
    assert bodies[0]["temperature"] == 0
    # Questions of one text are one request once no image tells them apart: the server is not asked twice.
    blind = {shown(body)[1] for body in bodies[6:]}
    with Image.open(io.BytesIO(blind.pop())) as mean:
        assert not blind and mean.size == (224, 224)
    assert score_recipe(workspace, "big-model-served", "vqa-rad").metrics["closed.whole_word"] == 100


def test_the_image_stands_where_the_prompt_has_it(workspace: Workspace, server: ChatServer) -> None:
    ask(workspace, server, prompt="image_first", blind=False)
    assert all(shown(body)[0] == ["image_url", "text"] for body in server.requests) and len(server.requests) == 6


def test_a_server_that_breaks_off_is_asked_the_rest_later(workspace: Workspace, server: ChatServer) -> None:
    def break_off(body: dict[str, Any], number: int) -> Reply | str:
        return (500, {}, b"broken") if number >= 4 else "yes"

    server.answer = break_off
    with pytest.raises(EndpointError, match="500"):
        ask(workspace, server, blind=False)
    assert not workspace.predictions("big-model-served", "vqa-rad").exists()
    server.answer = lambda body, number: "no"
    before = len(server.requests)
    assert ask(workspace, server, blind=False).counts["answers"] == 6
    assert len(server.requests) - before == 2
    answers = read_records(workspace.predictions("big-model-served", "vqa-rad") / "answers", Prediction)
    assert sorted(a.text for a in answers) == ["no"] * 2 + ["yes"] * 4


def test_a_refused_item_stops_the_run_or_counts_as_wrong(workspace: Workspace, server: ChatServer) -> None:
    server.answer = lambda body, number: (422, {}, b"too large") if "in this very" in json.dumps(body) else "yes"
    with pytest.raises(EndpointError, match="does not answer item q1") as caught:
        ask(workspace, server, blind=False)
    assert "--refused wrong" in caught.value.hint
    report = ask(workspace, server, blind=False, refused="wrong")
    assert report.counts["answers"] == 6 and set(report.details["refused"]) == {"q1", "q2", "q4", "q5"}


@pytest.mark.parametrize("name", ["llava-med", "../up", "Big Model", ""])
def test_a_name_that_is_a_recipes_or_no_folders_is_refused(workspace: Workspace, name: str) -> None:
    with pytest.raises(InputError) as caught:
        replay_answers(workspace, name, "vqa-rad", Path("x"))
    assert caught.value.where == "--name"


def stored(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_stored_answers_become_a_model_like_any_other(workspace: Workspace, tmp_path: Path) -> None:
    rows = [{"question_id": item.item_id, "text": "Yes, it is", "prompt": item.question} for item in reversed(ITEMS)]
    path = stored(tmp_path / "published.jsonl", rows)
    arguments = ["--workspace", str(workspace.root), "predict", "--backend", "replay", "--benchmark", "vqa-rad"]
    result = CliRunner().invoke(cli, [*arguments, "--name", "published", "--answers", str(path), "--json"])
    assert result.exception is None, result.exception
    assert json.loads(result.stdout)["details"]["backend"] == "replay"
    answers = read_records(workspace.predictions("published", "vqa-rad") / "answers", Prediction)
    assert [a.item_id for a in answers] == [item.item_id for item in ITEMS]
    assert {(a.model, a.stage, a.text) for a in answers} == {("published", "replayed", "Yes, it is")}
    assert score_recipe(workspace, "published", "vqa-rad").metrics["closed.whole_word"] == 100


def test_stored_answers_that_do_not_join_are_refused_or_wrong(workspace: Workspace, tmp_path: Path) -> None:
    path = stored(tmp_path / "short.jsonl", [{"question_id": item.item_id, "text": "yes"} for item in ITEMS[:5]])
    with pytest.raises(PredictionMismatch, match="q5"):
        replay_answers(workspace, "short", "vqa-rad", path)
    report = replay_answers(workspace, "short", "vqa-rad", path, missing="wrong")
    assert report.counts["answers"] == 6
    assert score_recipe(workspace, "short", "vqa-rad").metrics["closed.whole_word"] == pytest.approx(500 / 6)


def test_our_own_answers_are_replayed_with_their_likelihoods(workspace: Workspace, tmp_path: Path) -> None:
    kept = [
        Prediction(i.item_id, "vqa-rad", "other", "finetune", blind, i.question, "no", ("yes", "no"), (-2.0, -0.5))
        for i in ITEMS
        for blind in (False, True)
    ]
    write_records(tmp_path / "kept", Prediction, kept)
    assert replay_answers(workspace, "again", "vqa-rad", tmp_path / "kept").counts["answers"] == 12
    assert score_recipe(workspace, "again", "vqa-rad").details["calibration"]["replayed"]["n"] == 6


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ([], "--recipe"),
        (["--backend", "server"], "--name"),
        (["--backend", "server", "--name", "x"], "--base-url"),
        (["--backend", "replay", "--name", "x"], "--answers"),
    ],
)
def test_the_verb_says_which_option_a_backend_needs(arguments: list[str], missing: str) -> None:
    result = CliRunner().invoke(cli, ["predict", "--benchmark", "vqa-rad", *arguments], env={"MEDVLM_ENDPOINT_URL": ""})
    assert result.exit_code == 2 and missing in result.output
