"""OpenAI's endpoints: chat completions whole and streamed, moderations, models. Their clients work unchanged.

Any model's name is taken; the answer says who gave it. System messages are the context of the decision and of the answer.
"""

import time
from collections.abc import Callable, Iterator

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from so8t.agent import Reply
from so8t.conversation import Exchange, Prompt
from so8t.serving.service import Service, decided, events, last
from so8t.serving.wire import (
    EVENT_STREAM,
    Answer,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    FinishReason,
    Moderation,
    ModerationRequest,
    ModerationResult,
    Part,
    Usage,
    WireError,
    new_id,
)


def check_possible(request: ChatRequest) -> None:
    """Refuses what this server cannot do and a client would miss (400). Sampling settings are taken: answers are greedy.

    Raises:
        WireError: with the parameter's name.
    """
    asked = {
        "n": (request.n or 1) > 1,
        "stop": bool(request.stop),
        "tools": bool(request.tools),
        "functions": bool(request.functions),
        "response_format": (request.response_format or {}).get("type", "text") != "text",
        "logprobs": bool(request.logprobs),
        "logit_bias": bool(request.logit_bias),
        "modalities": any(kind != "text" for kind in request.modalities or []),
    }
    for name, wanted in asked.items():
        if wanted:
            raise WireError(
                400, f"{name}: this server gives one plain text an answer", param=name, code="unsupported_parameter"
            )


def prompt_of(request: ChatRequest) -> Prompt:
    """The conversation of a request. Turns of the same side that follow one another are one; what stands before the user's
    first turn, and exchanges without a text on either side, are left out.

    Raises:
        WireError: a turn is no text, is a tool's, or the last is not the user's.
    """
    context: list[str] = []
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(request.messages):
        where = f"messages.{number}"
        if message.other_parts:
            raise WireError(400, f"{where}: {message.other_parts[0]} is not read here, only text", param=where)
        if message.role in ("tool", "function"):
            raise WireError(400, f"{where}: there are no tools here", param=where)
        if message.role in ("system", "developer"):
            context.append(message.text)
        elif turns and turns[-1][0] == message.role:
            turns[-1] = (message.role, f"{turns[-1][1]}\n\n{message.text}")
        elif turns or message.role == "user":
            turns.append((message.role, message.text))
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise WireError(400, "messages: the last one must be the user's, and not blank", param="messages")
    pairs = zip(turns[::2], turns[1::2], strict=False)
    earlier = [Exchange(asked, told) for (_, asked), (_, told) in pairs if asked.strip() and told.strip()]
    return Prompt(turns[-1][1], "\n\n".join(context) or None, tuple(earlier))


def finish_reason(reply: Reply) -> FinishReason:
    """`content_filter` where nothing was answered or the answer was stopped."""
    if reply.stopped or not reply.read:
        return "content_filter"
    return "length" if reply.cut else "stop"


def usage(reply: Reply) -> Usage:
    """The base's tokens; none where it was not asked."""
    return Usage(prompt_tokens=reply.read, completion_tokens=reply.written, total_tokens=reply.read + reply.written)


def chunks(model: str, *, with_usage: bool) -> Callable[[Reply], Iterator[ChatChunk]]:
    """The chunks of a streamed answer, reply by reply. A character that is not whole yet waits for its last token."""
    name, created, sent = new_id("chatcmpl"), int(time.time()), None

    def chunk(*choices: ChunkChoice, reply: Reply | None = None, used: Usage | None = None) -> ChatChunk:
        told = None if reply is None else decided(reply.verdict, reply)
        return ChatChunk(id=name, created=created, model=model, choices=list(choices), usage=used, so8t=told)

    def shown(reply: Reply) -> Iterator[ChatChunk]:
        nonlocal sent
        if sent is None:
            sent = ""
            yield chunk(ChunkChoice(delta=Delta(role="assistant", content="")), reply=reply)
        text = reply.text if reply.finished else reply.text.rstrip("\ufffd")
        if len(text) > len(sent):
            yield chunk(ChunkChoice(delta=Delta(content=text[len(sent) :])))
            sent = text
        if reply.finished:
            yield chunk(ChunkChoice(delta=Delta(), finish_reason=finish_reason(reply)), reply=reply)
            if with_usage:
                yield chunk(used=usage(reply))

    return shown


def texts_of(request: ModerationRequest) -> list[str]:
    """The inputs of a moderation request; parts are one input.

    Raises:
        WireError: a part is no text.
    """
    if isinstance(request.input, str):
        return [request.input]
    parts = [part for part in request.input if isinstance(part, Part)]
    if any(part.type != "text" for part in parts):
        raise WireError(400, "input: only text is read here", param="input")
    if parts:
        return ["\n".join(part.text or "" for part in parts)]
    return [text for text in request.input if isinstance(text, str)]


def openai_routes(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat(request: ChatRequest) -> ChatCompletion | StreamingResponse:
        check_possible(request)
        prompt = prompt_of(request)
        lengths = [most for most in (request.max_tokens, request.max_completion_tokens) if most is not None]
        most = min(lengths, default=None)
        replies = service.answer(
            lambda: service.agent.stream(prompt.request, prompt.context, prompt.earlier, max_new_tokens=most)
        )
        if request.stream:
            first = await anext(replies)
            told = request.stream_options is not None and request.stream_options.include_usage
            return StreamingResponse(events(first, replies, chunks(service.model, with_usage=told)), media_type=EVENT_STREAM)
        reply = await last(replies)
        return ChatCompletion(
            model=service.model,
            choices=[Choice(message=Answer(content=reply.text), finish_reason=finish_reason(reply))],
            usage=usage(reply),
            so8t=decided(reply.verdict, reply),
        )

    @routes.post("/v1/moderations")
    async def moderate(request: ModerationRequest) -> Moderation:
        verdicts = await service.decide([(text, None) for text in texts_of(request)])
        return Moderation(model=service.model, results=[ModerationResult.of(decided(verdict)) for verdict in verdicts])

    def described() -> dict[str, str | int]:
        return {
            "id": service.model,
            "object": "model",
            "created": service.created,
            "owned_by": "so8t",
            "adapter_sha256": service.agent.digest,
        }

    @routes.get("/v1/models")
    async def models() -> dict[str, str | list[dict[str, str | int]]]:
        return {"object": "list", "data": [described()]}

    @routes.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, str | int]:
        if name != service.model:
            raise WireError(404, f"there is no model {name!r} here, only {service.model!r}", code="model_not_found")
        return described()

    return routes
