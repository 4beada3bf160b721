"""From a record to tokens: the chat template, the request's span, the decision position, the language-model targets.

The template is rendered once around a placeholder and the request is tokenised on its own, with control tokens read as
plain text: a request that contains `<|im_end|>` cannot end its own turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from so8t.conversation import Prompt
from so8t.data.records import Record
from so8t.errors import ConfigError

_PLACEHOLDER = "\u2063REQUEST\u2063"

_LEAST = 8
"""Tokens of a request that are always kept."""

RATIONALE_INSTRUCTION = "\n\nIn one sentence, explain the safety decision for this request."
"""What a prompt ends with when the target is the rationale instead of the answer."""


@dataclass(frozen=True)
class Encoded:
    """One prompt: `tokens[span[0]:span[1]]` is the request; the decision is read at the last token."""

    tokens: tuple[int, ...]
    span: tuple[int, int]


@dataclass(frozen=True)
class EncodedTarget:
    """Prompt and answer in one sequence; only `tokens[start:]` are targets."""

    tokens: tuple[int, ...]
    start: int


def read_behind(system_prompt: str | None, decision_prompt: str | None) -> str | None:
    """The system turn that the head reads a request behind."""
    return system_prompt if decision_prompt is None else decision_prompt


class Template:
    """The base's chat template around one request: as the head reads it, and as the base answers it.

    Args:
        system_prompt: text of the system turn that the base answers behind; `None` leaves out the turn where the template
            lets us.
        decision_prompt: text of the system turn that the head reads a request behind; `None` takes the same as for an answer.
        max_length: tokens of a prompt; a longer request keeps its beginning and its end, or is read in `windows`.

    Raises:
        ConfigError: the tokenizer has no chat template, or `max_length` leaves no room for the request.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None,
        decision_prompt: str | None = None,
        max_length: int,
    ):
        if not tokenizer.chat_template:
            raise ConfigError("the base's tokenizer has no chat template: choose an instruct model")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.system_prompt, self.decision_prompt = system_prompt, decision_prompt
        self.before, self.after = self._around(1, read_behind(system_prompt, decision_prompt))
        self._answered = self._around(1, system_prompt)
        self.room = max_length - max(sum(map(len, around)) for around in ((self.before, self.after), self._answered))
        if self.room < _LEAST:
            raise ConfigError(
                f"data.max_length={max_length} leaves {self.room} tokens for the request beside the "
                f"{max_length - self.room} of the chat template and its system turn: raise it"
            )

    def _around(self, turns: int, system: str | None) -> list[list[int]]:
        """The tokens before, between and behind the texts of so many turns, user's and assistant's by turns; `system` is the
        text of the turn before them."""
        opening = [] if system is None else [{"role": "system", "content": system}]
        roles = [("user", "assistant")[k % 2] for k in range(turns)]
        rendered = self.tokenizer.apply_chat_template(
            [*opening, *({"role": role, "content": _PLACEHOLDER} for role in roles)],
            tokenize=False,
            add_generation_prompt=True,
        )
        return [self._ids(piece) for piece in str(rendered).split(_PLACEHOLDER)]

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"])

    def _request(self, text: str, room: int) -> list[int]:
        ids = self._ids(text, plain=True)
        if len(ids) > room:
            head = room // 2
            ids = ids[:head] + ids[len(ids) - (room - head) :]
        return ids

    def encode(self, request: str, context: str | None = None) -> Encoded:
        """The prompt that the head reads of one request; `context` stands before it in the same turn."""
        body = self._body(request, context)
        start = len(self.before)
        return Encoded(tuple(self.before + body + self.after), (start, start + len(body)))

    def _body(self, request: str, context: str | None, suffix: str = "") -> list[int]:
        text = f"{context}\n\n{request}" if context else request
        tail = self._ids(suffix, plain=True) if suffix else []
        return self._request(text, max(_LEAST, self.room - len(tail))) + tail

    def windows(self, request: str, context: str | None = None) -> list[Encoded]:
        """`encode`'s prompt, and if that has no room for the middle, prompts of all of it in windows that overlap by half: what
        is no longer than half of the room stands whole in one of them."""
        found = [self.encode(request, context)]
        ids = self._ids(f"{context}\n\n{request}" if context else request, plain=True)
        start, last, step = len(self.before), len(ids) - self.room, self.room // 2
        if last > 0:
            for begin in [*range(0, last, step), last]:
                body = ids[begin : begin + self.room]
                found.append(Encoded((*self.before, *body, *self.after), (start, start + len(body))))
        return found

    def reads_whole(self, request: str, context: str | None = None) -> bool:
        """Whether nothing of it is cut out."""
        return self.length(f"{context}\n\n{request}" if context else request) <= self.room

    def length(self, text: str) -> int:
        """Tokens of a text of its own."""
        return len(self._ids(text, plain=True))

    def encode_conversation(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt of a request after others, for an answer; the context stands before the first of them. Every turn is cut
        as a request is; the whole may be longer than `max_length`."""
        texts = [*(text for exchange in prompt.earlier for text in (exchange.request, exchange.answer)), prompt.request]
        if prompt.context:
            texts[0] = f"{prompt.context}\n\n{texts[0]}"
        first, *pieces = self._around(len(texts), self.system_prompt)
        tokens = list(first)
        for text, piece in zip(texts, pieces, strict=True):
            tokens += self._request(text, self.room) + piece
        return tuple(tokens)

    def encode_target(self, record: Record, target: str, *, rationale: bool) -> EncodedTarget:
        """The prompt that the base answers + target + end of turn; at most `max_length` tokens of target."""
        before, after = self._answered
        prompt = [*before, *self._body(record.user_request, record.context, RATIONALE_INSTRUCTION if rationale else ""), *after]
        answer = self._ids(target, plain=True)[: self.max_length]
        return EncodedTarget((*prompt, *answer, self.tokenizer.eos_token_id), len(prompt))


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-pads: tokens and mask, `[B, T]` each."""
    length = max(len(row) for row in rows)
    tokens = torch.full((len(rows), length), value, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return tokens, mask
