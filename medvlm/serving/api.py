"""A checkpoint behind OpenAI's chat completions: batched, limited in every direction, and countable.

Nothing a request says is ever fetched, run or written to a disk; remote images are off by default.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from medvlm.errors import InputError
from medvlm.serving.chat import Prepared, Sampling
from medvlm.serving.engine import Closed, Engine, Event, QueueFull
from medvlm.serving.meters import Meters
from medvlm.serving.protocol import ApiError, ChatRequest, conversation, read_request, sampling
from medvlm.serving.remote import fetch_image

__all__ = ["Limits", "create_app"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may cost."""

    body_bytes: int = 20 * 2**20
    upload_s: float = 30.0
    """For the request to arrive."""
    answer_s: float = 120.0
    """For the answer, with the time in the queue."""
    answer_tokens: int = 1024
    images_at_once: int = 4
    """Images that are decoded at the same time: each may take a few hundred MB for a moment."""


@dataclass(frozen=True, slots=True)
class _Service:
    engine: Engine
    meters: Meters
    limits: Limits
    name: str
    key: str
    remote_images: bool
    decoding: asyncio.Semaphore
    started: int = field(default_factory=lambda: int(time.time()))


def create_app(
    engine: Engine,
    meters: Meters,
    *,
    name: str,
    limits: Limits | None = None,
    key: str = "",
    remote_images: bool = False,
) -> FastAPI:
    """The application, for uvicorn or a test client. Closing it closes the engine.

    Args:
        engine: Answers.
        meters: Counted in, and shown under ``/metrics``.
        name: Of the model, as requests call it.
        limits: On requests.
        key: Requests must bear it; empty lets everybody in.
        remote_images: Fetch images from public addresses that requests name.
    """
    bounds = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await run_in_threadpool(engine.close)

    # Pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="medvlm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = _Service(
        engine, meters, bounds, name, key, remote_images, asyncio.Semaphore(bounds.images_at_once)
    )
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _unrouted)
    app.add_exception_handler(Exception, _broken)
    app.add_api_route("/healthz", _health)
    app.add_api_route("/metrics", _metrics)
    app.add_api_route("/v1/models", _models)
    app.add_api_route("/v1/models/{name:path}", _model)
    app.add_api_route("/v1/chat/completions", _completions, methods=["POST"])
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    _service(request).meters.answers.labels(str(error.status)).inc()
    return JSONResponse(error.body, error.status, error.headers)


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"there is no {request.method} {request.url.path}: {error.detail}"
    return await _refused(request, ApiError(error.status_code, what, code="not_found"))


async def _broken(request: Request, error: Exception) -> Response:
    return await _refused(request, ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error"))


def _service(request: Request) -> _Service:
    return request.app.state.service


def _authorised(request: Request) -> _Service:
    service = _service(request)
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if service.key and not (
        scheme.lower() == "bearer" and secrets.compare_digest(given.encode(), service.key.encode())
    ):
        raise ApiError(
            401, "the API key is missing or wrong", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
        )
    return service


async def _health(request: Request) -> Response:
    alive = _service(request).engine.alive
    return PlainTextResponse("ok" if alive else "shutting down", 200 if alive else 503)


async def _metrics(request: Request) -> Response:
    service = _service(request)
    service.meters.waiting.set(service.engine.waiting)
    service.meters.running.set(service.engine.running)
    return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)


def _card(service: _Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.started, "owned_by": "medvlm"}


async def _models(request: Request) -> Any:
    return {"object": "list", "data": [_card(_authorised(request))]}


async def _model(request: Request, name: str) -> Any:
    service = _authorised(request)
    _check_name(service, name)
    return _card(service)


def _check_name(service: _Service, name: str) -> None:
    if name != service.name:
        raise ApiError(404, f"there is no model {name!r}, only {service.name!r}", code="model_not_found", param="model")


async def _completions(request: Request) -> Response:
    service = _authorised(request)
    asked = read_request(await _body(request, service.limits))
    _check_name(service, asked.model)
    _check_queue(service)
    chosen = sampling(asked, service.limits.answer_tokens)
    question = await _prepared(service, asked, chosen)
    service.meters.prompt_tokens.inc(len(question.ids))
    events = _events(service, asked, question, chosen)
    # The first event is waited for, so that a full queue is a status and not half an answer.
    first = await anext(events)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    if asked.stream:
        chunks = _chunks(service, asked, question, head, first, events)
        return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    body = asyncio.ensure_future(_whole(service, question, head, first, events))
    gone = asyncio.ensure_future(request.receive())
    try:
        # After the body, all that a client can say is that it is gone.
        await asyncio.wait((body, gone), return_when=asyncio.FIRST_COMPLETED)
        if not body.done():
            service.meters.answers.labels("499").inc()
            return Response(status_code=499)
        return JSONResponse(body.result())
    finally:
        for task in (body, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await task
        await events.aclose()


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, if it is small enough and arrives in time."""
    if not request.headers.get("content-type", "application/json").startswith("application/json"):
        # Also keeps a foreign web page from asking: a browser sends JSON only after asking the server.
        raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
    too_long = ApiError(413, f"the request has more than {limits.body_bytes} bytes", code="request_too_large")
    if int(request.headers.get("content-length") or 0) > limits.body_bytes:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(limits.upload_s):
            async for piece in request.stream():
                data += piece
                if len(data) > limits.body_bytes:
                    raise too_long
    except TimeoutError as error:
        raise ApiError(408, f"the request took longer than {limits.upload_s:g} s", code="request_timeout") from error
    return bytes(data)


async def _prepared(service: _Service, asked: ChatRequest, chosen: Sampling) -> Prepared:
    """The question as the model reads it, its image decoded behind the guard that figures have."""
    talk = conversation(asked)
    if talk.remote and not service.remote_images:
        raise ApiError(
            400,
            "images are not fetched from addresses here; send the image itself as data:image/png;base64,…",
            code="remote_images_off",
            param="messages",
        )
    try:
        image = talk.image
        if talk.remote:
            image = await fetch_image(talk.remote, max_bytes=service.limits.body_bytes, timeout_s=10.0)
        async with service.decoding:
            return await run_in_threadpool(
                service.engine.chat.prepare, image, talk.turns, chosen.max_new_tokens, image_turn=talk.image_turn
            )
    except InputError as error:
        long = "the model reads" in error.what
        code = "context_length_exceeded" if long else "invalid_value"
        raise ApiError(400, error.what, code=code, param="messages") from error


def _check_queue(service: _Service) -> None:
    # Looked at before the image is decoded, which is what costs most.
    if service.engine.full:
        raise ApiError(429, "too many requests wait already", code="queue_full", headers={"Retry-After": "1"})


async def _events(service: _Service, asked: ChatRequest, question: Prepared, chosen: Sampling) -> AsyncGenerator[Event]:
    """What the engine says about an answer; the answer is given up when nobody listens any more."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event] = asyncio.Queue()
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    begun, limits = time.monotonic(), service.limits

    def deliver(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and who listened with it
            loop.call_soon_threadsafe(queue.put_nowait, event)

    try:
        answer = service.engine.submit(question, chosen, deliver, stops=stops, time_limit_s=limits.answer_s)
    except QueueFull:
        _check_queue(service)
        raise ApiError(429, "too many requests wait already", code="queue_full") from None
    except Closed:
        raise ApiError(503, "the server is shutting down", code="shutting_down") from None
    try:
        event = await queue.get()
        service.meters.first_token.observe(time.monotonic() - begun)
        while event.finish is None:
            yield event
            event = await queue.get()
        service.meters.seconds.observe(time.monotonic() - begun)
        service.meters.answer_tokens.inc(event.tokens)
        if event.finish == "time":
            raise ApiError(504, f"the answer took longer than {limits.answer_s:g} s", code="timeout")
        if event.finish == "error":
            raise ApiError(500, f"the model failed: {event.error}", code="model_failed")
        yield event
    finally:
        answer.cancel()


def _usage(question: Prepared, event: Event) -> dict[str, int]:
    asked, said = len(question.ids), event.tokens
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


async def _whole(
    service: _Service, question: Prepared, head: dict[str, Any], first: Event, events: AsyncGenerator[Event]
) -> dict[str, Any]:
    """The answer in one piece."""
    text, last = first.text, first
    async for last in events:
        text += last.text
    message = {"role": "assistant", "content": text.strip()}
    choice = {"index": 0, "message": message, "finish_reason": last.finish, "logprobs": None}
    service.meters.answers.labels("200").inc()
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(question, last)}


async def _chunks(
    service: _Service,
    asked: ChatRequest,
    question: Prepared,
    head: dict[str, Any],
    first: Event,
    events: AsyncGenerator[Event],
) -> AsyncGenerator[str]:
    """The answer as server-sent events."""

    def chunk(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _sent({**head, "object": "chat.completion.chunk", "choices": [choice]})

    status = "499"
    try:
        yield chunk({"role": "assistant", "content": ""})
        event = first
        while event.finish is None:
            yield chunk({"content": event.text})
            event = await anext(events)
        if event.text:
            yield chunk({"content": event.text})
        yield chunk({}, event.finish)
        if asked.stream_options and asked.stream_options.include_usage:
            usage = _usage(question, event)
            yield _sent({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        status = "200"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        status = str(error.status)
        yield _sent(error.body)
    finally:
        service.meters.answers.labels(status).inc()
        await events.aclose()


def _sent(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
