"""Why a request is not answered, in one sentence of the model's own. The decision is taken elsewhere; nothing here changes it.

The intact base reads a few training rows of the same language and decision as examples, and then the request. Its states are
turned by a command rotation of their own, which learned from `safety_rationale` (see `rationale_training`), and go through the
frozen lm_head, greedily. Gates and head take no part in it. What plain checks find wanting is not said.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import DynamicCache

from so8t.conversation import Exchange, Prompt
from so8t.data.tokenise import Template
from so8t.errors import ArtefactError
from so8t.files import write_bytes, write_json
from so8t.gates import GateSpec, Rotation
from so8t.labels import LABELS, Label
from so8t.model import SO8TModel
from so8t.so8 import rotate

FILES = ("rationale.json", "rationale.safetensors")
"""Beside an adapter."""

MOST_TOKENS = 40
"""Of one rationale."""

ASKED = {
    Label.ESCALATE: "\n\nThis request is left to a person. In one sentence, explain why.",
    Label.REFUSE: "\n\nThis request is refused. In one sentence, explain why.",
}
"""What the request ends with, by what was decided."""

Script = Literal["latin", "kana"]


def script(text: str) -> Script | None:
    """In what a text is written, as far as the examples can tell a language: Latin letters, Japanese, or neither."""
    letters = re.findall(r"[^\W\d_]", text)
    if re.search(r"[\u3040-\u30ff]", text):
        latin = sum(letter.isascii() for letter in letters)
        return "kana" if latin <= len(letters) / 2 else None
    latin = sum(letter < "\u0250" for letter in letters)
    return "latin" if letters and latin > 0.9 * len(letters) else None


def first_sentence(text: str, *, ended: bool) -> str | None:
    """The text up to the end of its first sentence, `None` where that is not reached; `ended`: nothing follows the text."""
    found = re.match(r".*?(?:[.!?](?=\s|$)|[。！？])" if ended else r".*?(?:[.!?](?=\s)|[。！？])", text, re.DOTALL)  # noqa: RUF001
    return found[0] if found else None


def _runs(units: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(units[k : k + length]) for k in range(len(units) - length + 1)]


def fault(text: str, request: str, context: str | None, examples: Sequence[Exchange]) -> str | None:
    """What makes a text unfit to be said as the rationale of a request, if anything."""
    kind = script(text)
    pattern, least, run, shared = (r"\w", 6, 5, 14) if kind == "kana" else (r"[\w']+", 3, 3, 8)  # characters, or words
    units, *read = (re.findall(pattern, part.lower()) for part in (text, request, context or ""))
    if first_sentence(text, ended=True) != text:
        return "it is not one sentence"
    if len(units) < least:
        return "it is too short"
    if kind is None or kind != script(request):
        return "it is not in the request's language"
    if re.search(r"[\n`<>{}|\\@]|://|www\.|\d{4}", text):
        return "it holds more than words"
    runs = _runs(units, run)
    if len(set(runs)) < len(runs) or (kind != "kana" and any(one == other for one, other in pairwise(units))):
        return "it goes round in circles"
    if any(set(_runs(units, shared)) & set(_runs(part, shared)) for part in read):
        return "it repeats the request or its context"
    if text in {example.answer for example in examples}:
        return "it is an example's"
    return None


@dataclass(frozen=True)
class Written:
    """A rationale so far: its text, tokens, and the mean log-probability of a token; `done` when it is over."""

    text: str
    tokens: int
    log_probability: float
    done: bool


Examples = Mapping[Script, Mapping[Label, tuple[Exchange, ...]]]


class Rationales(nn.Module):
    """What writes rationales: the rotation, and examples by script and decision."""

    def __init__(self, width: int, examples: Examples):
        super().__init__()
        self.rotation = Rotation(width, GateSpec())
        self.examples = examples

    def examples_for(self, request: str, label: Label) -> tuple[Exchange, ...]:
        """Training rows of the request's language and of a decision; none where there is nothing to learn from."""
        kind = script(request)
        return () if kind is None else self.examples.get(kind, {}).get(label, ())

    def prompt(self, template: Template, request: str, context: str | None, label: Label) -> tuple[int, ...]:
        """The tokens that a rationale follows."""
        asked, text = ASKED[label], f"{context}\n\n{request}" if context else request
        shown = tuple(Exchange(example.request + asked, example.answer) for example in self.examples_for(request, label))
        return template.encode_conversation(Prompt(text + asked, None, shown))

    @torch.no_grad()
    def write(
        self, model: SO8TModel, template: Template, request: str, context: str | None, label: Label, *, every: int
    ) -> Iterator[Written]:
        """One sentence, greedily, `every` few tokens at a time."""
        base, tokenizer = model.base, template.tokenizer
        ends = base.end_tokens
        fresh = torch.tensor([self.prompt(template, request, context, label)], device=base.device)
        matrix, cache = self.rotation.matrix(), DynamicCache()
        tokens: list[int] = []
        total, text, done = 0.0, "", False
        while not done:
            with model.without_gates():
                for _ in range(every):
                    states = base.decoder(input_ids=fresh, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
                    scores = base.causal_lm.lm_head(rotate(states, matrix)).float().log_softmax(-1)
                    best, fresh = scores.max(-1, keepdim=True)
                    total += float(best)
                    tokens.append(int(fresh))
                    ended = tokens[-1] in ends
                    text = str(tokenizer.decode(tokens[: -1 if ended else None], skip_special_tokens=True)).lstrip()
                    sentence = first_sentence(text, ended=ended)
                    done = ended or sentence is not None or len(tokens) == MOST_TOKENS
                    if done:
                        text = sentence or text
                        break
            yield Written(text.strip(), len(tokens), total / len(tokens), done)


# ------------------------------------------------------------------------------------------------------------- on disk


def save_rationales(folder: Path, rationales: Rationales) -> None:
    """Writes both files, each atomically, the JSON last."""
    write_bytes(folder / FILES[1], save({"cmd.coords": rationales.rotation.coords.detach().cpu().contiguous()}))
    examples = {
        kind: {label.name: [[e.request, e.answer] for e in rows] for label, rows in by_label.items()}
        for kind, by_label in rationales.examples.items()
    }
    write_json(folder / FILES[0], {"labels": list(LABELS), "examples": examples})


def load_rationales(folder: Path, model: SO8TModel) -> Rationales | None:
    """What an adapter's folder holds; `None` where it holds none.

    Raises:
        ArtefactError: it is damaged, or of other labels or another base.
    """
    if not (folder / FILES[0]).is_file():
        return None
    try:
        told = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        if tuple(told["labels"]) != LABELS:
            raise ArtefactError(f"{folder / FILES[0]}: labels are {told['labels']}, expected {list(LABELS)}")
        stored = TypeAdapter(dict[Script, dict[Literal["ESCALATE", "REFUSE"], list[tuple[str, str]]]])
        examples = {
            kind: {Label[name]: tuple(Exchange(*pair) for pair in rows) for name, rows in by_label.items()}
            for kind, by_label in stored.validate_python(told["examples"]).items()
        }
        coords: Tensor = load((folder / FILES[1]).read_bytes())["cmd.coords"]
        rationales = Rationales(model.base.hidden_size, examples)
        rationales.rotation.load_state_dict({"coords": coords})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ArtefactError(f"{folder}: its rationales are damaged: {str(error).splitlines()[0]}") from None
    return rationales.to(model.base.device).requires_grad_(False)


__all__ = ["Rationales", "Written", "fault", "first_sentence", "load_rationales", "save_rationales", "script"]
