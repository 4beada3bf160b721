"""Decisions along the tokens of a request or an answer: what was decided after each, how soon, how steadily and how falsely.

Everything the head reads is causal, so one pass gives what is decided after each token. The decision proper is read behind the
template's closing tokens; along the way decisions are smoothed (`head.smoothing`), so that what streams does not flicker.
Promises of a policy are made for the decision proper alone, and only there a request can be too strange to be allowed.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from so8t.adapter import Agent
from so8t.conversation import with_answer
from so8t.data.framing import openers
from so8t.data.records import Record
from so8t.data.tokenise import Encoded, Template
from so8t.labels import Label
from so8t.model import Decisions, decide

CUT = " […] "
"""Stands for the middle of a long request in the prompt that has room for its beginning and its end alone."""


@dataclass
class Stream:
    """By row, `[N]` each: `tokens` on the path; `detection`, how many of them were read when the decision left ALLOW for
    good (NaN: it ends on ALLOW); `alarms`, how often it left ALLOW."""

    tokens: Tensor
    detection: Tensor
    alarms: Tensor

    def figures(self, labels: Tensor) -> dict[str, float]:
        """Over rows with `labels` `[N]`: of the risky ones the share detected by the end and the mean tokens until then, of
        the ALLOW ones the alarms per 1,000 tokens. NaN where there are no such rows."""
        risky = labels != Label.ALLOW
        found = ~self.detection[risky].isnan()
        return {
            "detected": float(found.float().mean()),
            "time_to_detection": float(self.detection[risky].nanmean()),
            "false_alarms_per_1000_tokens": float(1000 * self.alarms[~risky].sum() / self.tokens[~risky].sum()),
        }

    def chosen(self, rows: Tensor) -> "Stream":
        """Some of the rows."""
        return Stream(self.tokens[rows], self.detection[rows], self.alarms[rows])


def along(logits: Tensor, path: Tensor, *, min_confidence: float = 0.0) -> Stream:
    """Decides at every token of the path, failing closed: `[B, T, 3], [B, T] ->` a row each. Tokens off the path are passed
    over, not counted."""
    labels = decide(logits.reshape(-1, logits.shape[-1]), min_confidence=min_confidence).labels.view(path.shape)
    tokens, detection, alarms = [], [], []
    for row, on in zip(labels, path.bool(), strict=True):
        alarmed = row[on] != Label.ALLOW
        n = len(alarmed)
        left = alarmed & ~torch.cat([alarmed.new_zeros(1), alarmed])[:n]
        ends_alarmed = n > 0 and bool(alarmed[-1])
        detection.append(float(left.nonzero()[-1, 0]) + 1 if ends_alarmed else float("nan"))
        tokens.append(float(n))
        alarms.append(float(left.sum()))
    return Stream(torch.tensor(tokens), torch.tensor(detection), torch.tensor(alarms))


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> Iterator[str]:
    """The text that each token adds. A character spread over several tokens comes with its last one."""
    shown = ""
    for end in range(1, len(tokens) + 1):
        text = str(tokenizer.decode(list(tokens[:end]), clean_up_tokenization_spaces=False))
        if end < len(tokens):
            text = text.rstrip("\ufffd")
        yield text[len(shown) :]
        shown = text


@dataclass(frozen=True)
class TokenDecision:
    """What one token adds to the request, and what is decided after it; `probabilities` in the order of the labels."""

    text: str
    label: Label
    probabilities: tuple[float, ...]


def streams(
    agent: Agent, request: str, context: str | None = None, *, prefix: Callable[[Tensor, Tensor], Tensor] | None = None
) -> list[Iterator[TokenDecision]]:
    """One for each prompt that a request is decided in, the context before it: of a long one its beginning and end, `CUT`
    between them, and behind that all of it in windows that overlap, unless they are too many. By the agent's policy where it
    has one. `prefix`: of a cache, in the place of the model's own."""
    (first, *whole), _ = agent.windows(request, context)
    half = None if agent.template.reads_whole(request, context) else agent.template.room // 2
    prompts = [(first, half), *((window, None) for window in whole)]
    return [_along_prompt(agent, prompt, cut, prefix or agent.model.prefix) for prompt, cut in prompts]


@torch.no_grad()
def _along_prompt(
    agent: Agent, prompt: Encoded, cut: int | None, prefix: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[TokenDecision]:
    """`cut`: how many tokens of the request stand before what is left out of it."""
    tokens = torch.tensor([prompt.tokens], device=agent.model.base.device)
    mask = torch.ones_like(tokens)
    begin, end = prompt.span
    path = torch.zeros_like(mask)
    path[:, begin:end] = 1
    logits = agent.model.smoothed_logits(agent.model(prefix(tokens, mask), tokens, mask), path)[0, begin:end]
    decided: Decisions = decide(logits, min_confidence=agent.model.head.spec.min_confidence)
    if agent.policy is not None:
        decided = agent.policy.apply(decided)
    read, tokenizer = prompt.tokens[begin:end], agent.template.tokenizer
    texts = list(pieces(tokenizer, read[:cut]))
    if cut is not None:
        after = list(pieces(tokenizer, read[cut:]))
        texts += [CUT + after[0], *after[1:]]
    for text, label, probabilities in zip(texts, decided.labels.tolist(), decided.probabilities.tolist(), strict=True):
        yield TokenDecision(text, Label(label), tuple(probabilities))


def stream(
    agent: Agent, request: str, context: str | None = None, *, prefix: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Iterator[TokenDecision]:
    """The first of `streams`: decides after each token of a request, of a long one after those of its beginning and end."""
    return streams(agent, request, context, prefix=prefix)[0]


def request_tokens(
    agent: Agent, record: Record, *, prefix: Callable[[Tensor, Tensor], Tensor] | None = None
) -> list[TokenDecision]:
    """What is decided after each token of a row's request, behind its context; none where the head does not read all of it."""
    if not agent.template.reads_whole(record.user_request, record.context):
        return []
    tokens = list(stream(agent, record.user_request, record.context, prefix=prefix))
    return tokens[ending([token.text for token in tokens], record.user_request) :]


def ending(texts: Sequence[str], text: str) -> int:
    """Where in the pieces of a text its end, another text, begins. Pieces without text begin the character behind them."""
    begin, left = len(texts), len(text)
    while begin and (left > 0 or not texts[begin - 1]):
        begin -= 1
        left -= len(texts[begin])
    return begin


def answered(rows: Sequence[Record]) -> list[Record]:
    """Rows with the answers that they are to be read with, as training reads answers (`framing.py`): an ALLOW row with its own,
    any other as if it were the answer to a short ALLOW row's request in its language; the same for the same rows. Those with
    neither are not among them."""
    draw = random.Random("answers")  # noqa: S311  (a string seeds the same way in every process)
    short = openers(rows)
    own = [row for row in rows if row.safety_label is Label.ALLOW and (row.task_output or "").strip()]
    return own + [
        replace(row, user_request=draw.choice(short[row.language]), task_output=row.user_request)
        for row in rows
        if row.safety_label is not Label.ALLOW and row.language in short
    ]


def answer_prompt(template: Template, row: Record) -> tuple[Record, tuple[int, int]] | None:
    """The row with its answer in the place of a request, and the span of the answer's tokens in the prompt; nothing where the
    head does not read all of it."""
    answer = row.task_output or ""
    text = with_answer(row.user_request, answer)
    if not template.reads_whole(text, row.context):
        return None
    prompt = template.encode(text, row.context)
    begin, end = prompt.span
    place = ending(list(pieces(template.tokenizer, prompt.tokens[begin:end])), answer)
    return replace(row, user_request=text, task_output=None), (begin + place, end)
