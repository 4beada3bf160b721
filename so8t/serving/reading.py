"""What a chat request says, read once and all of it: the same bytes must not mean another thing to the upstream.

A conversation is the user's turns, each with what followed it up to the next (answers, tool calls, what tools gave). What
stands before or outside of them is context: system turns, and the definitions of tools and formats. Knows nothing of models.
"""

import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import cast

from pydantic import JsonValue, ValidationError

from so8t.conversation import Exchange, Prompt, with_answer
from so8t.serving.strict_json import parse
from so8t.serving.watched import Garbled, strings
from so8t.serving.wire import ChatRequest, WireError

OUTSIDE = ("system", "developer")
"""Roles whose turns are context wherever they stand."""
READ = ("tools", "functions", "response_format")
"""Fields beside the messages that the upstream's model reads, and so does the head, as context."""
HANDED_ON = {
    *("model", "messages", "stop", "stream_options", "tool_choice", "function_call", "logit_bias", "modalities"),
    *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "reasoning_effort", "verbosity"),
}
"""Fields that may hold words for the server. All others hold numbers at most, or they could bring in text unread."""


@dataclass(frozen=True)
class Chat:
    """A chat request. `prompt` is its conversation: its request is the last user turn, `asked`, with what follows it already.
    `turns` says at which messages each exchange of `prompt.earlier` begins and ends; `body` is to be sent."""

    request: ChatRequest
    prompt: Prompt
    asked: str
    turns: tuple[tuple[int, int], ...]
    body: bytes

    def unstreamed(self) -> str:
        """The body that asks for the same answer in one piece."""
        parsed = json.loads(self.body)
        return json.dumps({k: v for k, v in parsed.items() if k not in ("stream", "stream_options")}, ensure_ascii=False)

    def without(self, left_out: Collection[int]) -> "Chat":
        """The chat without some of its earlier exchanges."""
        if not left_out:
            return self
        gone = {place for k in left_out for place in range(*self.turns[k])}
        parsed = json.loads(self.body)
        parsed["messages"] = [
            message for place, message in enumerate(parsed["messages"]) if place not in gone or message["role"] in OUTSIDE
        ]
        kept = tuple(exchange for k, exchange in enumerate(self.prompt.earlier) if k not in left_out)
        body = json.dumps(parsed, ensure_ascii=False).encode()
        return replace(self, prompt=replace(self.prompt, earlier=kept), turns=(), body=body)


def read_chat(body: bytes) -> Chat:
    """Reads a request's body.

    Raises:
        WireError: 400 for what is no chat request, can be read in two ways, or holds what the head cannot read.
    """
    try:
        parsed = parse(body)
    except ValueError as error:
        raise WireError(400, f"the body is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(parsed, dict):
        raise WireError(400, "the body is not a JSON object")
    try:
        request = ChatRequest.model_validate(parsed)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise WireError(400, f"{field or 'body'}: {first['msg']}", param=field or None) from None
    _check(request, parsed)
    raw_messages = cast(list[dict[str, JsonValue]], parsed["messages"])
    context: list[str] = []
    users: list[tuple[int, str]] = []
    followed: list[list[str]] = []
    for place, (message, raw) in enumerate(zip(request.messages, raw_messages, strict=True)):
        try:
            text = "\n".join(text for _, text in strings({name: value for name, value in raw.items() if name != "role"}))
        except Garbled as error:
            raise WireError(400, f"messages.{place}: {error}", param="messages") from None
        if message.role == "user":
            if not text.strip():
                raise WireError(400, f"messages.{place}: the request is empty", param="messages")
            users.append((place, text))
            followed.append([])
        elif text:
            (context if message.role in OUTSIDE or not users else followed[-1]).append(text)
    if not users:
        raise WireError(400, "messages: no user's turn to decide", param="messages")
    context += [json.dumps(parsed[name], ensure_ascii=False) for name in READ if name in parsed and any(strings(parsed[name]))]
    answers = ["\n\n".join(texts) for texts in followed]
    starts = [place for place, _ in users]
    return Chat(
        request,
        Prompt(
            with_answer(users[-1][1], answers[-1]),
            "\n\n".join(context) or None,
            tuple(Exchange(text, answer) for (_, text), answer in zip(users[:-1], answers[:-1], strict=True)),
        ),
        users[-1][1],
        tuple(itertools.pairwise(starts)),
        body,
    )


def _check(request: ChatRequest, parsed: dict[str, JsonValue]) -> None:
    """What cannot be read is refused."""
    for place, message in enumerate(request.messages):
        odd = [part for part in message.other_parts if part != "refusal"]
        if odd:
            raise WireError(400, f"messages.{place}: a part of type {odd[0]!r} cannot be read: send text", param="messages")
    if request.logprobs or parsed.get("top_logprobs"):
        raise WireError(400, "logprobs: tokens beside the answer cannot be watched: leave it out", param="logprobs")
    if set(request.modalities or ["text"]) != {"text"}:
        raise WireError(400, "modalities: only text can be watched", param="modalities")
    for name, value in parsed.items():
        if name not in HANDED_ON and name not in READ and not isinstance(value, int | float | None):
            raise WireError(400, f"{name}: a field of this name may hold a number, but nothing that is not read", param=name)
