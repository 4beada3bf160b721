"""One request, watched: what is decided after each of its tokens, then the reply as it grows. The page at `/` shows it."""

from collections.abc import Iterator

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from so8t import streaming
from so8t.agent import Reply
from so8t.labels import LABELS
from so8t.serving.service import Service, decided, events
from so8t.serving.wire import EVENT_STREAM, Decided, Text, WireError
from so8t.streaming import TokenDecision


class WatchedRequest(BaseModel):
    """`POST /v1/decisions/stream`."""

    request: Text
    context: Text | None = None


class TokenSeen(BaseModel):
    """The text that a token adds, and what is decided after it."""

    text: str
    label: str
    probabilities: dict[str, float]


class TokenEvent(BaseModel):
    """Comes once a token, before any reply."""

    token: TokenSeen


class ReplySeen(BaseModel):
    """The whole reply so far."""

    text: str
    finished: bool
    so8t: Decided


class ReplyEvent(BaseModel):
    """Comes whenever the reply has grown; the first has the decision on the request."""

    reply: ReplySeen


def token_routes(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/decisions/stream")
    async def watch(asked: WatchedRequest) -> StreamingResponse:
        """Tokens are looked at in one pass, after the decision on the whole request was taken and written down."""
        if not asked.request.strip():
            raise WireError(400, "request: there is no text to decide", param="request")
        agent = service.agent
        tokens: list[TokenDecision] = []

        def begin() -> Iterator[Reply]:
            replies = agent.stream(asked.request, asked.context)
            first = next(replies)
            tokens.extend(streaming.stream(agent.agent, asked.request, asked.context))
            yield first
            yield from replies

        def shown(reply: Reply) -> Iterator[BaseModel]:
            for token in tokens:
                probabilities = dict(zip(LABELS, token.probabilities, strict=True))
                yield TokenEvent(token=TokenSeen(text=token.text, label=token.label.name, probabilities=probabilities))
            tokens.clear()
            told = decided(reply.verdict, reply)
            yield ReplyEvent(reply=ReplySeen(text=reply.text, finished=reply.finished, so8t=told))

        replies = service.answer(begin)
        first = await anext(replies)
        return StreamingResponse(events(first, replies, shown), media_type=EVENT_STREAM)

    return routes
