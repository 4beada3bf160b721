"""OpenAI's shapes on the wire, as far as we speak them: chat completions whole and streamed, moderations, errors.

Requests keep fields that are not named here (`model_extra`), so that they can be handed on; what a server cannot do is for the
server to refuse. Ours beside theirs: an answer's field `so8t` says what was decided. Knows nothing of models or servers.
"""

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, SerializerFunctionWrapHandler, model_serializer

from so8t.errors import SO8TError
from so8t.labels import Label

FinishReason = Literal["stop", "length", "content_filter", "tool_calls", "function_call"]


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
"""JSON can spell half of a surrogate pair, which no tokenizer and no file takes."""

# -- requests ----------------------------------------------------------------------------------------------------------


class Part(BaseModel):
    """One part of a message's content; `text` where `type` is `text`."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: Text | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[Part] | None = None

    @property
    def text(self) -> str:
        """All text of the turn, parts joined by line ends; empty where there is none."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text or "" for part in self.content if part.type == "text")

    @property
    def other_parts(self) -> list[str]:
        """Types of the parts that are not text (`image_url`, `input_audio`, `file`, ...)."""
        return [] if isinstance(self.content, str | None) else [part.type for part in self.content if part.type != "text"]


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    tools: list[JsonValue] | None = None
    functions: list[JsonValue] | None = None
    response_format: dict[str, JsonValue] | None = None
    logprobs: bool | None = None
    logit_bias: dict[str, float] | None = None
    modalities: list[str] | None = None


class ModerationRequest(BaseModel):
    """`POST /v1/moderations`; a list of parts is one input, a list of texts is one each."""

    model_config = ConfigDict(extra="allow")
    input: Text | list[Text] | list[Part]
    model: str | None = None


# -- answers -----------------------------------------------------------------------------------------------------------


class Decided(BaseModel):
    """Our own field: the decision, probabilities by label, whether it failed (then it stands for ESCALATE), whether the text is
    too long to be read whole (then it is ESCALATE at least), whether an answer was stopped after it had begun, the number in
    the queue of escalations, and where a guard holds the request, the ticket under which its completion can be retrieved."""

    decision: str
    probabilities: dict[str, float]
    failed: bool = False
    unread: bool = False
    stopped: bool = False
    escalation: int | None = None
    ticket: str | None = None


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """The assistant's turn. `refusal` holds what is said where nothing was answered."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


class Choice(BaseModel):
    """The one choice of an answer."""

    index: int = 0
    message: Answer
    logprobs: None = None
    finish_reason: FinishReason


def new_id(kind: str) -> str:
    """A fresh id such as `chatcmpl-1f0c...`."""
    return f"{kind}-{uuid.uuid4().hex}"


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str = Field(default_factory=lambda: new_id("chatcmpl"))
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: Usage
    so8t: Decided


class Delta(BaseModel):
    """What a chunk adds; only that is on the wire."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None

    @model_serializer(mode="wrap")
    def _added(self, handler: SerializerFunctionWrapHandler) -> dict[str, str]:
        return {name: value for name, value in handler(self).items() if value is not None}


class ChunkChoice(BaseModel):
    """The one choice of a chunk."""

    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A piece of a streamed answer; `id` and `created` are the same in all. The last has no choice where usage is told."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    so8t: Decided | None = None


class ModerationResult(BaseModel):
    """One input's. Categories and their scores are ESCALATE and REFUSE: a client may take every category that scores high for
    a reason to block, so ALLOW is told in `so8t` alone."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    so8t: Decided

    @classmethod
    def of(cls, decided: Decided) -> Self:
        """Flagged is whatever is not ALLOW."""
        names = [label.name for label in Label if label is not Label.ALLOW]
        return cls(
            flagged=decided.decision != Label.ALLOW.name,
            categories={name: decided.decision == name for name in names},
            category_scores={name: decided.probabilities[name] for name in names},
            so8t=decided,
        )


class Moderation(BaseModel):
    """The answer to a moderation request, a result an input."""

    id: str = Field(default_factory=lambda: new_id("modr"))
    model: str
    results: list[ModerationResult]


# -- server-sent events ------------------------------------------------------------------------------------------------

EVENT_STREAM = "text/event-stream"
DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


def sse(data: BaseModel) -> bytes:
    """One event: the JSON on one line."""
    return f"data: {data.model_dump_json()}\n\n".encode()


# -- errors ------------------------------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field of the request, `code` a word for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class WireError(SO8TError):
    """An error with its HTTP status, as OpenAI's clients know it: from 500 up it is a `server_error`, below an
    `invalid_request_error`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))
