"""The server as its callers see it: OpenAI's own client, and requests that nobody should send."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from image_bombs import bomb
from openai.types.chat import ChatCompletion
from PIL import Image as Picture
from test_chat import png

from medvlm.config import load_recipe
from medvlm.errors import InputError
from medvlm.serving.api import Limits, create_app
from medvlm.serving.chat import ChatModel
from medvlm.serving.engine import Engine
from medvlm.serving.meters import Meters
from medvlm.serving.remote import fetch_image, is_public

NAME = "tiny-llava-med"
KEY = "a-key-for-tests"


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def about(image: bytes | str, text: str = "What is shown?") -> list[dict[str, Any]]:
    url = image if isinstance(image, str) else data_url(image)
    return [
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]}
    ]


class Server:
    """uvicorn in a thread, on a free port."""

    def __init__(self, chat: ChatModel, **settings: Any) -> None:
        engine_settings = {name: settings.pop(name) for name in ("max_batch", "queue_limit") if name in settings}
        self.meters = Meters()
        self.engine = Engine(chat, observe=self.meters.batch.observe, **engine_settings)
        app = create_app(self.engine, self.meters, name=NAME, **settings)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        self.openai.close()
        self.http.close()

    def ask(self, messages: list[dict[str, Any]], **settings: Any) -> ChatCompletion:
        return self.openai.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 12} | settings)


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatModel:
    return ChatModel.load(folder)


@pytest.fixture(scope="module")
def server(chat: ChatModel) -> Generator[Server]:
    server = Server(chat, key=KEY, limits=Limits(body_bytes=100_000))
    yield server
    server.stop()


@pytest.fixture
def served(chat: ChatModel) -> Generator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**settings: Any) -> Server:
        servers.append(Server(chat, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_models_are_listed_and_found(server: Server) -> None:
    assert [model.id for model in server.openai.models.list()] == [NAME]
    assert server.openai.models.retrieve(NAME).owned_by == "medvlm"


def test_an_answer_is_the_same_again_and_its_image_counts(server: Server) -> None:
    answer = server.ask(about(png()))
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens > load_recipe(NAME).model.image_tokens
    assert server.ask(about(png())).choices[0].message.content == choice.message.content
    assert server.ask([{"role": "user", "content": "What is shown?"}]).usage.prompt_tokens < answer.usage.prompt_tokens


def test_a_stream_brings_the_same_text_in_pieces_and_its_usage(server: Server) -> None:
    whole = server.ask(about(png()), max_tokens=40).choices[0].message.content
    chunks = list(server.ask(about(png()), max_tokens=40, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces).strip() == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 40
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_with_a_system_message_and_several_turns(server: Server) -> None:
    turns = [
        {"role": "system", "content": "Answer briefly."},
        *about(png()),
        {"role": "assistant", "content": "A nodule."},
        {"role": "user", "content": "Where?"},
    ]
    longer = server.ask(turns).usage.prompt_tokens
    assert longer > server.ask(turns[1:]).usage.prompt_tokens > server.ask(turns[1:2]).usage.prompt_tokens
    late = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}, *about(png())]
    assert server.ask(late).choices[0].message.content


def test_sampling_follows_seed_and_stop(server: Server) -> None:
    def drawn(seed: int) -> str | None:
        return server.ask(about(png()), temperature=1.5, top_p=0.9, seed=seed, max_tokens=24).choices[0].message.content

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1
    whole = server.ask(about(png()), max_tokens=30).choices[0].message.content
    assert whole is not None
    stopped = server.ask(about(png()), max_tokens=30, stop=whole[8:11]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == whole[: whole.index(whole[8:11])].strip()


def test_requests_that_come_together_are_decoded_together(served: Callable[..., Server]) -> None:
    server = served(max_batch=8)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda n: server.ask(about(png(10 * n)), max_tokens=60), range(8)))
    alone = [server.ask(about(png(10 * n)), max_tokens=60) for n in range(8)]
    texts = [[answer.choices[0].message.content for answer in answers] for answers in (together, alone)]
    assert texts[0] == texts[1]
    metrics = server.http.get("/metrics").text
    counts = {line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if not line.startswith("#")}
    assert counts['medvlm_requests_total{status="200"}'] == 16
    assert counts["medvlm_completion_tokens_total"] == 16 * 60
    assert counts['medvlm_batch_rows_bucket{le="+Inf"}'] > counts['medvlm_batch_rows_bucket{le="1.0"}']
    assert counts["medvlm_running_requests"] == counts["medvlm_waiting_requests"] == 0
    assert server.http.get("/healthz").text == "ok"


def cut() -> bytes:
    out = io.BytesIO()
    Picture.effect_noise((64, 64), 50).save(out, "JPEG")
    return out.getvalue()[:900]


BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "gpt-4o"}, 404, "model_not_found", "there is no model 'gpt-4o', only 'tiny-llava-med'"),
    ({"messages": about(b"not an image")}, 400, "invalid_value", "the image does not decode"),
    ({"messages": about(cut())}, 400, "invalid_value", "the image does not decode"),
    ({"messages": about(bomb())}, 400, "invalid_value", "300000000 pixels"),
    ({"messages": about(data_url(png(), "text/html"))}, 400, "invalid_image_url", "must begin with data:image/"),
    ({"messages": about("data:image/png;base64,%%%")}, 400, "invalid_base64_image", "not base64"),
    ({"messages": about("http://127.0.0.1:1/a.png")}, 400, "remote_images_off", "not fetched"),
    ({"messages": about("file:///etc/passwd")}, 400, "invalid_image_url", "begins with 'file:///etc/passwd'"),
    ({"messages": [*about(png()), {"role": "assistant", "content": "a"}, *about(png())]}, 400, "too_many_images", "2"),
    ({"messages": about(png(), "very long " * 3000)}, 400, "context_length_exceeded", "the model reads 512"),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "assistant", "content": "I speak first."}]}, 400, "invalid_value", "alternate"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "messages.0"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "invalid_value", "messages.0"),
    ({"temperature": 3}, 400, "invalid_value", "temperature"),
    ({"n": 2}, 400, "invalid_value", "n"),
    ({"tools": [{"type": "function"}]}, 400, "invalid_value", "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "invalid_value", "response_format"),
    ({"messages": about(png(), "x" * 200_000)}, 413, "request_too_large", "100000 bytes"),
]


@pytest.mark.parametrize(("change", "status", "code", "words"), BAD, ids=[f"{n}-{b[2]}" for n, b in enumerate(BAD)])
def test_bad_input_gets_a_status_and_a_reason_and_the_server_goes_on(
    server: Server, change: dict[str, Any], status: int, code: str, words: str
) -> None:
    request = {"model": NAME, "messages": about(png()), "max_tokens": 4} | change
    with pytest.raises(openai.APIStatusError) as caught:
        server.openai.chat.completions.create(**request)
    assert caught.value.status_code == status
    assert caught.value.code == code
    assert words in caught.value.message
    assert server.ask(about(png()), max_tokens=2).choices[0].message.content is not None


def test_what_is_no_request_at_all_is_refused(server: Server) -> None:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    path = "/v1/chat/completions"
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"model": 1}'):
        answer = server.http.post(path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    # A web page may send text without asking the server first; JSON it may not.
    answer = server.http.post(path, content=b"{}", headers=headers | {"content-type": "text/plain"})
    assert answer.status_code == 415

    def pieces() -> Generator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    assert server.http.post(path, content=pieces(), headers=headers).status_code == 413
    assert server.http.get("/v1/nothing").status_code == 404
    assert server.http.get("/docs").status_code == 404


def test_without_the_key_nothing_is_answered_but_health_and_metrics_are(server: Server) -> None:
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError, match="API key"):
        stranger.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "?"}])
    assert server.http.get("/v1/models").status_code == 401
    assert [server.http.get(path).status_code for path in ("/healthz", "/metrics")] == [200, 200]


class Slow:
    """Holds the model until it is let go."""

    def __init__(self, chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        forward = chat.model.forward

        def slow(*args: Any, **named: Any) -> Any:
            self.go.wait(60)
            return forward(*args, **named)

        monkeypatch.setattr(chat.model, "forward", slow)


def test_a_full_queue_answers_429_and_those_that_wait_are_answered(
    served: Callable[..., Server], chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(chat, monkeypatch)
    server = served(max_batch=1, queue_limit=2)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(server.ask, about(png()))
        wait_until(lambda: server.engine.running + server.engine.waiting == 1)
        others = [pool.submit(server.ask, about(png())) for _ in range(2)]
        wait_until(lambda: server.engine.full)
        with pytest.raises(openai.RateLimitError, match="wait already") as caught:
            server.ask(about(png()))
        assert caught.value.response.headers["retry-after"] == "1"
        slow.go.set()
        assert len({job.result(60).choices[0].message.content for job in (first, *others)}) == 1


def test_an_answer_that_takes_too_long_is_given_up(
    served: Callable[..., Server], chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(chat, monkeypatch)
    server = served(limits=Limits(answer_s=0.05))
    threading.Timer(0.3, slow.go.set).start()
    with pytest.raises(openai.APIStatusError, match=r"longer than 0\.05 s") as caught:
        server.ask(about(png()))
    assert caught.value.status_code == 504
    assert server.engine.running == 0


def test_a_caller_who_leaves_frees_the_place(
    served: Callable[..., Server], chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served()
    stream = server.ask(about(png()), stream=True, max_tokens=480)
    next(iter(stream))
    stream.close()
    wait_until(lambda: server.engine.running == 0)
    slow = Slow(chat, monkeypatch)
    with pytest.raises(openai.APITimeoutError):
        server.openai.with_options(timeout=0.2).chat.completions.create(model=NAME, messages=about(png()))
    slow.go.set()
    wait_until(lambda: server.engine.running == 0)
    wait_until(lambda: 'status="499"} 2.0' in server.http.get("/metrics").text)


def test_a_failure_of_the_model_is_a_500_and_in_a_stream_an_error(
    served: Callable[..., Server], chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served()
    forward, calls = chat.model.forward, []

    def broken(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) in (1, 4):
            raise RuntimeError("out of memory")
        return forward(*args, **named)

    monkeypatch.setattr(chat.model, "forward", broken)
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        server.ask(about(png()))
    with pytest.raises(openai.APIError, match="out of memory"):
        list(server.ask(about(png()), stream=True))
    assert server.ask(about(png())).choices


def test_stopping_finishes_the_answer_that_is_being_streamed(chat: ChatModel) -> None:
    server = Server(chat)
    stream = iter(server.ask(about(png()), stream=True, max_tokens=200))
    next(stream)
    server._server.should_exit = True
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length"
    server.stop()
    assert not server.engine.alive


@pytest.fixture
def shelf(tmp_path: Path) -> Generator[str]:
    """A web server with an image, a redirect to it, and something large."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = {"/a.png": png(), "/large.png": bytes(60_000)}.get(self.path, b"")
            self.send_response(200 if body else 302)
            self.send_header("Location", "/a.png")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_remote_images_come_from_public_addresses_only(served: Callable[..., Server], shelf: str) -> None:
    server = served(remote_images=True)
    named = shelf.replace("127.0.0.1", "localhost")
    for url in (f"{shelf}/a.png", f"{named}/a.png", "http://[::1]/a.png", "http://10.0.0.1/a.png"):
        with pytest.raises(openai.BadRequestError, match=r"cannot be read|not a public one"):
            server.ask(about(url))
    assert not any(is_public(a) for a in ("127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "fe80::1", "224.0.0.1"))
    assert is_public("1.1.1.1")


def test_a_remote_image_is_read_whole_and_small_and_never_followed(shelf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr("medvlm.serving.remote.is_public", lambda address: True)

    def fetched(path: str) -> bytes:
        return asyncio.run(fetch_image(f"{shelf}{path}", max_bytes=50_000, timeout_s=10))

    assert fetched("/a.png") == png()
    for path, words in (("/large.png", "more than 50000"), ("/elsewhere", "answers with 302")):
        with pytest.raises(InputError, match=words):
            fetched(path)
    with pytest.raises(InputError, match="must be http"):
        asyncio.run(fetch_image("http://user@host/a.png", max_bytes=1, timeout_s=1))


def test_events_of_a_stream_are_what_browsers_expect(server: Server) -> None:
    body = {"model": NAME, "messages": about(png()), "max_tokens": 3, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}) as r:
        assert r.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in r.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["object"] == "chat.completion.chunk"
