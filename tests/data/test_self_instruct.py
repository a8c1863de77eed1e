"""Conversations from a chat endpoint: checked, cached, resumed, bounded; and an endpoint that misbehaves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, chat_server, completion
from click.testing import CliRunner
from figure_factory import figure, workspace_with
from hypothesis import given
from hypothesis import strategies as st

from medvlm.cli import cli
from medvlm.data.endpoint import ChatClient, Endpoint, EndpointSettings, TokenBudget, Unanswered
from medvlm.data.instruct import build_instruct
from medvlm.data.readers.llava_med import fault_of
from medvlm.data.response_cache import Completion, ResponseCache
from medvlm.data.self_instruct import ask_in_order, figure_request, parse_rounds, rounds_to_turns
from medvlm.errors import EndpointError, WorkspaceError
from medvlm.records import Sample
from medvlm.store import read_records, shard_paths

GOOD = json.dumps([{"question": "What is it?", "answer": "A chest X-ray."}, {"question": "Where?", "answer": "Left."}])
KEY = "sk-secret-of-the-test"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ResponseCache]:
    with ResponseCache(tmp_path / "answers.sqlite") as cache:
        yield cache


def client_of(server: ChatServer, cache: ResponseCache, **settings: Any) -> ChatClient:
    budget = TokenBudget(settings.pop("budget", None))
    fast = EndpointSettings(**({"backoff_s": 0.001, "attempts": 3, "timeout_s": 5.0} | settings))
    return ChatClient(Endpoint(server.url, "tiny", KEY), cache, budget=budget, settings=fast)


def ask(client: ChatClient, text: str = "hello") -> Completion | Unanswered:
    return client.complete([{"role": "user", "content": text}], max_tokens=10)


# --- building ---------------------------------------------------------------------------------


def test_conversations_are_written_checked_and_every_loss_has_its_reason(tmp_path: Path, cache: ResponseCache) -> None:
    answers = {
        "one": GOOD,
        "two": "I'm sorry, I can't help with that.",
        "three": '[{"question": "What?"',
        "four": json.dumps([{"question": "What does the caption say?", "answer": "A nodule."}]),
        "six": f"Here it is:\n```json\n{GOOD}\n```",
    }

    def answer(body: dict[str, Any], number: int) -> str | Reply:
        said = body["messages"][1]["content"]
        if "five" in said:
            return 200, {}, completion(GOOD[:30], finish_reason="length")
        if "seven" in said:
            return 400, {}, {"error": f"content policy {KEY}"}
        return next(text for word, text in answers.items() if f"caption {word}" in said)

    words = ("one", "two", "three", "four", "five", "six", "seven")
    workspace = workspace_with(
        tmp_path, *(figure(number, caption=f"CT, caption {word}") for number, word in enumerate(words))
    )
    with chat_server(answer) as server:
        report = build_instruct(workspace, client=client_of(server, cache))
    samples = read_records(workspace.samples("instruct"), Sample)
    assert [sample.sample_id for sample in samples] == ["10_F0", "10_F5"]
    assert {sample.source for sample in samples} == {"generated:tiny"}
    assert fault_of(samples[0].turns) is None
    assert {reason: lost["count"] for reason, lost in report.details["dropped"].items()} == {
        "refused": 1,
        "malformed": 1,
        "mentions_source": 1,
        "truncated": 1,
        "endpoint_refused": 1,
    }
    assert server.requests[0]["path"] == "/v1/chat/completions"
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps(report.details)
    assert (report.details["model"], len(report.details["prompt_sha256"])) == ("tiny", 64)


def test_a_second_run_asks_nothing_and_gives_the_same_bytes(tmp_path: Path, cache: ResponseCache) -> None:
    workspace = workspace_with(tmp_path, *(figure(number) for number in range(6)))

    def bytes_of_run(server: ChatServer) -> list[bytes]:
        build_instruct(workspace, client=client_of(server, cache))
        return [path.read_bytes() for path in shard_paths(workspace.samples("instruct"))]

    # All captions are equal, and the endpoint says something else each time it is asked.
    with chat_server(lambda body, number: GOOD.replace("Left", f"Left {number}")) as server:
        first = bytes_of_run(server)
        asked = len(server.requests)
        assert bytes_of_run(server) == first
        assert len(server.requests) == asked
    assert len({sample.turns[1:] for sample in read_records(workspace.samples("instruct"), Sample)}) == 1


def test_a_run_that_broke_off_goes_on_where_it_was(tmp_path: Path, cache: ResponseCache) -> None:
    workspace = workspace_with(tmp_path, *(figure(number, caption=f"CT scan number {number}") for number in range(9)))
    broken = True

    def answer(body: dict[str, Any], number: int) -> str | Reply:
        return (500, {}, {}) if broken and number >= 5 else GOOD

    with chat_server(answer) as server:
        with pytest.raises(EndpointError, match="500 Internal Server Error") as error:
            build_instruct(workspace, client=client_of(server, cache, concurrency=1))
        assert "finished answers are kept" in error.value.hint
        assert not workspace.samples("instruct").exists()
        asked, broken = len(server.requests), False
        report = build_instruct(workspace, client=client_of(server, cache, concurrency=1))
        assert report.counts["samples"] == 9
        assert len(server.requests) - asked == 4


def test_the_budget_is_never_exceeded_and_a_larger_one_goes_on(tmp_path: Path, cache: ResponseCache) -> None:
    workspace = workspace_with(tmp_path, *(figure(number, caption=f"CT scan number {number}") for number in range(12)))
    with chat_server(lambda body, number: (200, {}, completion(GOOD, tokens=500))) as server:
        client = client_of(server, cache, budget=8_000, concurrency=4)
        report = build_instruct(workspace, client=client)
        assert 0 < client.budget.spent <= 8_000
        assert report.details["dropped"]["budget_spent"]["count"] == 12 - client.budget.spent // 1_500
        assert build_instruct(workspace, client=client_of(server, cache)).counts["samples"] == 12
        assert len(server.requests) == 12


def test_requests_run_side_by_side_and_results_keep_their_order(tmp_path: Path, cache: ResponseCache) -> None:
    workspace = workspace_with(tmp_path, *(figure(number, caption=f"CT scan number {number}") for number in range(8)))

    def slow(body: dict[str, Any], number: int) -> str:
        time.sleep(0.05 if number % 2 else 0.2)
        return GOOD

    with chat_server(slow) as server:
        build_instruct(workspace, client=client_of(server, cache, concurrency=4))
        assert 2 <= server.most_at_once <= 4
    samples = read_records(workspace.samples("instruct"), Sample)
    assert [sample.sample_id for sample in samples] == [f"10_F{number}" for number in range(8)]


# --- the endpoint -----------------------------------------------------------------------------


def test_what_passes_by_itself_is_tried_again_and_retry_after_is_obeyed(cache: ResponseCache) -> None:
    replies: list[Reply | str] = [(429, {"Retry-After": "1"}, {}), (503, {}, {}), "fine"]
    with chat_server(lambda body, number: replies[number]) as server:
        started = time.monotonic()
        answer = ask(client_of(server, cache))
        assert isinstance(answer, Completion)
        assert answer.text == "fine"
        assert time.monotonic() - started >= 1
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "message", "asked"),
    [
        ((401, {}, {"error": "bad key"}), "401", 1),
        ((302, {"Location": "http://127.0.0.1:1/"}, {}), "302", 1),
        ((200, {}, b"<html>"), "no chat completion", 1),
        ((200, {}, {"choices": []}), "no chat completion", 1),
        ((500, {}, {}), "no answer in 3 attempts: 500", 3),
        ((200, {"Content-Length": "500"}, b"{"), "no answer in 3 attempts", 3),
    ],
)
def test_an_endpoint_that_refuses_or_lies_is_one_error_without_the_key(
    cache: ResponseCache, reply: Reply, message: str, asked: int
) -> None:
    with chat_server(lambda body, number: reply) as server:
        with pytest.raises(EndpointError, match=message) as error:
            ask(client_of(server, cache, timeout_s=0.3))
        assert len(server.requests) == asked
    assert KEY not in str(error.value)
    assert KEY not in repr(client_of(server, cache).endpoint)


def test_an_endpoint_that_is_not_there_is_one_error(cache: ResponseCache) -> None:
    client = ChatClient(
        Endpoint("http://127.0.0.1:9", "m"), cache, settings=EndpointSettings(attempts=2, backoff_s=0.001)
    )
    with pytest.raises(EndpointError, match="no answer in 2 attempts"):
        ask(client)


def test_other_settings_are_other_questions_to_the_cache(cache: ResponseCache) -> None:
    with chat_server(lambda body, number: str(number)) as server:
        client = client_of(server, cache)
        messages = [{"role": "user", "content": "x"}]
        texts = [client.complete(messages, max_tokens=5, seed=seed) for seed in (1, 2, 1)]
    assert [text.text for text in texts if isinstance(text, Completion)] == ["0", "1", "0"]


def test_the_verb_reads_the_environment_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace_with(tmp_path, figure(1))
    command = ["--workspace", str(tmp_path), "dataset", "build", "instruct", "--endpoint", "--json"]
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"MEDVLM_ENDPOINT_{name}", raising=False)
    missing = CliRunner().invoke(cli, command)
    assert isinstance(missing.exception, EndpointError)
    monkeypatch.setenv("MEDVLM_ENDPOINT_MODEL", "tiny")
    monkeypatch.setenv("MEDVLM_ENDPOINT_URL", "file:///etc")
    assert isinstance(CliRunner().invoke(cli, command).exception, EndpointError)
    with chat_server(lambda body, number: GOOD) as server:
        monkeypatch.setenv("MEDVLM_ENDPOINT_URL", server.url)
        done = CliRunner().invoke(cli, command)
    assert json.loads(done.stdout)["counts"]["samples"] == 1
    assert "Authorization" not in server.headers[0]


# --- parsing ----------------------------------------------------------------------------------


@given(
    rounds=st.lists(st.tuples(st.text("ab ?.", min_size=1), st.text("ab ?.", min_size=1)), min_size=1, max_size=8),
    fence=st.sampled_from(["{}", "```json\n{}\n```", "Sure:\n{}"]),
    first=st.booleans(),
)
def test_written_rounds_come_back_and_make_sound_turns(rounds: list[tuple[str, str]], fence: str, first: bool) -> None:
    text = fence.format(json.dumps([{"question": question, "answer": answer} for question, answer in rounds]))
    parsed = parse_rounds(Completion(text, "stop", 1, 1))
    if all(question.strip() and answer.strip() for question, answer in rounds):
        assert parsed == [(question.strip(), answer.strip()) for question, answer in rounds]
        assert fault_of(rounds_to_turns(parsed, image_first=first)) is None
    else:
        assert isinstance(parsed, Unanswered)


@given(st.text() | st.recursive(st.none() | st.integers(), lambda x: st.lists(x), max_leaves=4).map(json.dumps))
def test_any_other_text_is_a_reason(text: str) -> None:
    parsed = parse_rounds(Completion(text, "stop", 1, 1))
    assert isinstance(parsed, Unanswered)
    assert parsed.reason in ("malformed", "refused")


def test_the_request_holds_caption_and_mentions_but_no_image() -> None:
    system, user = figure_request(figure(1))
    assert "JSON array" in system["content"]
    assert user["content"] == (
        "Caption: Chest X-ray with a large nodule in the left lung.\n\nPassages:\n- The nodule had grown (Fig. 1)."
    )


def test_a_failing_call_stops_the_rest() -> None:
    asked: list[int] = []

    def call(number: int) -> int:
        asked.append(number)
        if number == 3:
            raise EndpointError("x", where="y", hint="z")
        return number

    with pytest.raises(EndpointError):
        list(ask_in_order(call, range(1_000), 2))
    assert len(asked) < 50


def test_a_caller_that_stops_half_way_waits_for_the_calls_under_way() -> None:
    entered, leave, ended = threading.Event(), threading.Event(), threading.Event()

    def call(number: int) -> int:
        if number:
            entered.set()
            leave.wait(30)
            ended.set()
        return number

    asking = ask_in_order(call, range(2), 2)
    assert next(asking) == 0 and entered.wait(30)
    threading.Timer(0.05, leave.set).start()
    asking.close()
    assert ended.is_set()


def test_a_closed_cache_answers_with_an_error(tmp_path: Path) -> None:
    with ResponseCache(tmp_path / "answers.sqlite") as cache:
        pass
    with pytest.raises(WorkspaceError, match="closed"):
        cache.get("key")
    with pytest.raises(WorkspaceError, match="closed"):
        cache.put("key", Completion("yes", "stop", 1, 1))
