"""OpenAI's chat completions, as far as one image and text go: what is asked, what is answered, what is refused.

The shapes are those of https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from medvlm.records import Turn
from medvlm.serving.chat import Sampling

__all__ = ["ApiError", "ChatRequest", "Conversation", "conversation", "read_request", "sampling"]


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form.

    Args:
        status: Of HTTP.
        message: What is wrong, with the offending value.
        code: For programs.
        param: The field of the request, if it is one's fault.
        headers: Further ones of the answer.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Address(BaseModel):
    url: str
    detail: str = "auto"


class _ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: _Address


class _Spoken(BaseModel):
    role: Literal["system", "developer", "assistant"]
    content: str | list[_Part]


class _Asked(BaseModel):
    role: Literal["user"]
    content: str | list[Annotated[_Part | _ImagePart, Field(discriminator="type")]]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a request. What would change the answer and is not known here is refused, not ignored."""

    model: str
    messages: list[Annotated[_Spoken | _Asked, Field(discriminator="role")]] = Field(min_length=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0, the likeliest answer, unless asked for otherwise: OpenAI's own default is 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    tools: list[Any] | None = Field(default=None, max_length=0)
    functions: list[Any] | None = Field(default=None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of a request and its image, still encoded."""

    turns: list[Turn]
    image: bytes | None
    remote: str
    """Address of an image that is not in the request; else empty."""
    image_turn: int


def read_request(body: bytes) -> ChatRequest:
    """The request of a body.

    Raises:
        ApiError: 400; it is not JSON, or a field is wrong, unknown in its value, or missing.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        # The names of the variants of a union are ours, not fields of the request.
        field = ".".join(str(part) for part in first["loc"] if part not in ("user", "text", "image_url"))
        raise ApiError(
            400, f"{field or 'the body'}: {first['msg']}", code="invalid_value", param=field or None
        ) from error


def sampling(request: ChatRequest, most: int) -> Sampling:
    """How the answer's tokens are chosen.

    Args:
        request: As it came.
        most: Tokens that an answer may have at all.
    """
    wanted = request.max_completion_tokens or request.max_tokens or most
    # torch takes seeds of 64 bits and no more.
    return Sampling(request.temperature, request.top_p, min(wanted, most), (request.seed or 0) % 2**63)


def conversation(request: ChatRequest) -> Conversation:
    """The turns of a request; a system message is put before the first question, as templates have their own.

    Raises:
        ApiError: 400; there is more than one image, a data URL is broken, or its media type is no image.
    """
    system: list[str] = []
    turns: list[Turn] = []
    images: list[tuple[str, int]] = []
    for message in request.messages:
        if isinstance(message, _Asked):
            parts = [] if isinstance(message.content, str) else message.content
            images += [(part.image_url.url, len(turns)) for part in parts if isinstance(part, _ImagePart)]
        text = _text(message.content)
        if message.role in ("system", "developer"):
            system.append(text)
        else:
            turns.append(Turn("user" if message.role == "user" else "assistant", text))
    if turns and system:
        turns[0] = Turn(turns[0].role, "\n".join((*system, turns[0].text)))
    if len(images) > 1:
        raise ApiError(400, f"there are {len(images)} images; this model reads one", code="too_many_images")
    address, place = images[0] if images else ("", 0)
    if address.lower().startswith(("http://", "https://")):
        return Conversation(turns, None, address, place)
    return Conversation(turns, _data(address) if images else None, "", place)


def _text(content: str | Sequence[_Part | _ImagePart]) -> str:
    return content if isinstance(content, str) else "\n".join(p.text for p in content if isinstance(p, _Part))


def _data(address: str) -> bytes:
    """The bytes of ``data:image/…;base64,…``."""
    head, comma, body = address.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise ApiError(
            400,
            f"image_url must begin with data:image/…;base64, and begins with {address[:30]!r}",
            code="invalid_image_url",
            param="messages",
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, f"the image is not base64: {error}", code="invalid_base64_image", param="messages"
        ) from error
