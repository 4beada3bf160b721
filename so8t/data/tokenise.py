"""From a record to tokens: the chat template, the request's span, the decision position, the language-model targets.

The template is rendered once around a placeholder and the request is tokenised on its own, with control tokens read as
plain text: a request that contains `<|im_end|>` cannot end its own turn.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

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


class Template:
    """The base's chat template around one request.

    Args:
        system_prompt: text of the system turn; `None` leaves out the turn where the template lets us.
        max_length: tokens of a prompt; a longer request keeps its beginning and its end.

    Raises:
        ConfigError: the tokenizer has no chat template, or `max_length` leaves no room for the request.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str | None, max_length: int):
        if not tokenizer.chat_template:
            raise ConfigError("the base's tokenizer has no chat template: choose an instruct model")
        self.tokenizer = tokenizer
        self.max_length = max_length
        turns = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        turns.append({"role": "user", "content": _PLACEHOLDER})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, after = str(text).split(_PLACEHOLDER)
        self.before = self._ids(before)
        self.after = self._ids(after)
        self.room = max_length - len(self.before) - len(self.after)
        if self.room < _LEAST:
            raise ConfigError(
                f"data.max_length={max_length} leaves {self.room} tokens for the request beside the chat template's "
                f"{len(self.before) + len(self.after)}: raise it"
            )

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"])

    def _request(self, text: str, room: int) -> list[int]:
        ids = self._ids(text, plain=True)
        if len(ids) > room:
            head = room // 2
            ids = ids[:head] + ids[len(ids) - (room - head) :]
        return ids

    def encode(self, request: str, context: str | None = None, suffix: str = "") -> Encoded:
        """The prompt of one request; `context` stands before it in the same turn."""
        text = f"{context}\n\n{request}" if context else request
        tail = self._ids(suffix, plain=True) if suffix else []
        body = self._request(text, max(_LEAST, self.room - len(tail))) + tail
        start = len(self.before)
        return Encoded(tuple(self.before + body + self.after), (start, start + len(body)))

    def encode_target(self, record: Record, target: str, *, rationale: bool) -> EncodedTarget:
        """Prompt + target + end of turn; at most `max_length` tokens of target."""
        prompt = self.encode(record.user_request, record.context, RATIONALE_INSTRUCTION if rationale else "")
        answer = self._ids(target, plain=True)[: self.max_length]
        return EncodedTarget((*prompt.tokens, *answer, self.tokenizer.eos_token_id), len(prompt.tokens))
