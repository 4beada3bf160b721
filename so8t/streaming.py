"""Decisions along the tokens of a request: what was decided after each one, and how soon, how steadily and how falsely.

Everything the head reads is causal, so one pass gives what would have been decided had the request ended there, but for the
template's closing tokens, behind which the decision proper is read. Promises of a policy are made for that one alone, and only
there a request can be too strange to be allowed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from so8t.adapter import Agent
from so8t.data.records import Record
from so8t.labels import Label
from so8t.model import Decisions, decide


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


@torch.no_grad()
def stream(
    agent: Agent, request: str, context: str | None = None, *, prefix: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Iterator[TokenDecision]:
    """Decides after each token of a request, the context's included, by the agent's policy where it has one. `prefix`: of a
    cache, in the place of the model's own."""
    encoded = agent.template.encode(request, context)
    tokens = torch.tensor([encoded.tokens], device=agent.model.base.device)
    mask = torch.ones_like(tokens)
    begin, end = encoded.span
    logits = agent.model((prefix or agent.model.prefix)(tokens, mask), tokens, mask).logits[0, begin:end]
    decided: Decisions = decide(logits, min_confidence=agent.model.head.spec.min_confidence)
    if agent.policy is not None:
        decided = agent.policy.apply(decided)
    texts = pieces(agent.template.tokenizer, encoded.tokens[begin:end])
    for text, label, probabilities in zip(texts, decided.labels.tolist(), decided.probabilities.tolist(), strict=True):
        yield TokenDecision(text, Label(label), tuple(probabilities))


def request_tokens(
    agent: Agent, record: Record, *, prefix: Callable[[Tensor, Tensor], Tensor] | None = None
) -> list[TokenDecision]:
    """What is decided after each token of a row's request, behind its context; none where the head does not read all of it."""
    if not agent.template.reads_whole(record.user_request, record.context):
        return []
    tokens = list(stream(agent, record.user_request, record.context, prefix=prefix))
    begin, left = len(tokens), len(record.user_request)
    while begin and left > 0:
        begin -= 1
        left -= len(tokens[begin].text)
    return tokens[begin:]
