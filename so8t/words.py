"""What the words of a prompt say by themselves: a linear map of the n-grams of its tokens, beside the states of the base.

A base that knows little of a language, as the embedded one does of Japanese, still spells it in tokens, and which tokens stand
there tells much. Fitted once, where the head begins; gates and head never learn from it, nor it from them. Tokens can be
folded: read without upper case and spaces, and those that are no word not at all. And how much the words count can go by how a
text is spelt: a base that has no token for a language's characters knows little of what they say.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from so8t.labels import LABELS

LONGEST = 3
"""Tokens of the longest n-grams; a Japanese character is one to three tokens of a base that spells it in bytes."""
LEAST = 2
"""Training rows that an n-gram stands in, at least."""
SHARE = 0.5
"""Of the words in what is decided, by cross-validation on the default's training rows (the log, entry 50)."""
SHARES_BY_SPELLING = (0.4, 0.9)
"""The same of a text whose characters are tokens or parts of some, and of one that is spelt in parts of characters; in between
by how much of it is (the log, entry 62)."""
STRENGTH = 10.0
"""`C` of the logistic regression, on vectors of length 1."""

NO_WORD = -1
"""Stands for a token that is no word, such as punctuation and control tokens."""
WHOLE, PART = 0, 1
"""A token that is a word, or some characters of one, and one that is a part of a character."""

_PLACE = 1_000_003  # larger than any vocabulary: three tokens and a length are one number of 63 bits
_NONE = torch.iinfo(torch.int64).max


def _before(x: Tensor) -> Tensor:
    """What stood at the token before, nothing at the first: `[B, T] -> [B, T]`."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def _of_a_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")


def folded(spelt: Sequence[tuple[str, int]], size: int) -> Tensor:
    """By token, the first one that spells the same but for upper case and spaces around it, or `NO_WORD` where it has no
    letter, digit or mark on one: `[size]`. How a request is typed is a matter of style, which differs from source to source. A
    part of a character stands for itself; signs inside a token of letters, as in "'s", stay."""
    first: dict[str, int] = {}
    out = torch.arange(size, dtype=torch.int32)
    for token, (text, kind) in enumerate(spelt):
        out[token] = NO_WORD if kind == NO_WORD else token if kind == PART else first.setdefault(text.strip().lower(), token)
    return out


def _spelt(tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[tuple[str, int]]:
    """Token by token what it decodes to, and whether that is `WHOLE`, `PART` or `NO_WORD`."""
    special = set(tokenizer.all_special_ids)
    for token, text in enumerate(tokenizer.batch_decode([[token] for token in range(min(size, len(tokenizer)))])):
        if token in special:
            yield text, NO_WORD
        elif "\N{REPLACEMENT CHARACTER}" in text:
            yield text, PART
        else:
            yield text, WHOLE if any(map(_of_a_word, text.lower())) else NO_WORD


def spelling(spelt: Sequence[tuple[str, int]], size: int) -> Tensor:
    """By token of those `spelt`, `WHOLE`, `PART` of a character, or `NO_WORD`: `[size]`."""
    out = torch.full((size,), WHOLE, dtype=torch.int8)
    for token, (_, kind) in enumerate(spelt):
        out[token] = kind
    return out


def grams(tokens: Tensor, mask: Tensor, opening: int = 0) -> tuple[Tensor, Tensor]:
    """All n-grams of real tokens as numbers, token by token where they end (1-gram first), and which of them end behind the
    `opening` tokens of their row and are there for the first time: `[B, T], [B, T] -> [B, T * LONGEST]` twice."""
    number, real = tokens + 1, mask.bool()
    behind = real & (mask.cumsum(1) > opening)
    numbers, there = [number * LONGEST], [behind]
    for n in range(1, LONGEST):  # an n-gram ends where a shorter one ended a token before
        number, real = _before(number) * _PLACE + tokens + 1, _before(real) & mask.bool()
        numbers.append(number * LONGEST + n)
        there.append(real & behind)
    valid = torch.stack(there, -1).flatten(1)
    found = torch.where(valid, torch.stack(numbers, -1).flatten(1), _NONE)
    ordered, places = found.sort(dim=1, stable=True)
    new = torch.ones_like(valid)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return found, torch.zeros_like(valid).scatter(1, places, new) & valid


def _find(known: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Where n-grams stand in the sorted known ones, and which of them do: `[count], [...] -> [...]` twice."""
    place = torch.searchsorted(known, numbers).clamp(max=len(known) - 1)
    return place, known[place] == numbers


class Words(nn.Module):
    """Log-probabilities from the distinct n-grams so far that are known, at most `count`, each weighted by its inverse document
    frequency, together a vector of length 1. What stands in every prompt weighs nothing; so that a prompt there does not take
    the weight of its words in a request, nothing counts that ends in the `opening` tokens. `share` is theirs in what is
    decided: none before they were fitted. Where they are `weighed`, `share` is theirs in a text of whole characters,
    `share_of_parts` in one that is spelt in parts of characters.

    Args:
        count: of n-grams, at most.
        vocabulary: how many tokens the base has.
        folded: whether tokens are read as `fold` says; each stands for itself otherwise.
        weighed: whether what the words say counts by how the text is spelt.
    """

    fold: Tensor | None
    kind: Tensor | None
    known: Tensor
    idf: Tensor
    table: Tensor
    bias: Tensor
    share: Tensor
    share_of_parts: Tensor | None

    def __init__(self, count: int, vocabulary: int = 0, *, folded: bool = False, weighed: bool = False):
        super().__init__()
        self.vocabulary = vocabulary
        self.register_buffer("fold", torch.arange(vocabulary, dtype=torch.int32) if folded else None)
        self.register_buffer("kind", torch.full((vocabulary,), WHOLE, dtype=torch.int8) if weighed else None)
        self.register_buffer("share_of_parts", torch.tensor(0.0) if weighed else None)
        self.register_buffer("known", torch.full((count,), _NONE))  # sorted
        self.register_buffer("idf", torch.zeros(count))
        self.register_buffer("table", torch.zeros(count, len(LABELS)))
        self.register_buffer("bias", torch.zeros(len(LABELS)))
        self.register_buffer("share", torch.tensor(0.0))
        self.opening = 0

    @torch.no_grad()
    def learn_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes what `folded` and `spelling` say of a tokenizer; before anything is measured."""
        spelt = list(_spelt(tokenizer, self.vocabulary))
        for buffer, read in ((self.fold, folded), (self.kind, spelling)):
            if buffer is not None:
                buffer.copy_(read(spelt, self.vocabulary))

    def shares(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The words' share in what is decided at every token, by how the text up to it is spelt: `[B, T], [B, T] -> [B, T]`."""
        if self.kind is None or self.share_of_parts is None:
            return self.share.expand(tokens.shape)
        kind = self.kind[tokens]
        counted = (kind != NO_WORD) & mask.bool() & (mask.cumsum(1) > self.opening)
        parts = (counted & (kind == PART)).cumsum(1) / counted.cumsum(1).clamp(min=1)
        return self.share + (self.share_of_parts - self.share) * parts

    def read(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`grams`, of folded tokens where they are: no n-gram goes across what is no word."""
        if self.fold is not None:
            behind = mask.cumsum(1) > self.opening
            tokens = self.fold[tokens].long()
            mask = mask.bool() & ((tokens != NO_WORD) | ~behind)
        return grams(tokens, mask, self.opening)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """At every token, of what stands up to it: `[B, T], [B, T] -> [B, T, 3]`."""
        found, new = self.read(tokens, mask)
        row, known = _find(self.known, found)
        weight = torch.where(new & known, self.idf[row], 0.0)
        by_token = (*tokens.shape, LONGEST)
        scores = (weight[..., None] * self.table[row]).view(*by_token, -1).sum(2).cumsum(1)
        length = weight.square().view(by_token).sum(2).cumsum(1).sqrt()
        return (scores / length.clamp(min=1e-6)[..., None] + self.bias).log_softmax(-1)

    def pooled(self, logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The logarithmic opinion pool (Genest and Zidek 1986, doi:10.1214/ss/1177013825) of a classifier of the same prompts
        and the words: `[B, T, 3], [B, T], [B, T] -> [B, T, 3]`. What is not finite in a row stays so."""
        share = self.shares(tokens, mask)[..., None]
        return (1 - share) * logits.log_softmax(-1) + share * self(tokens, mask)

    @torch.no_grad()
    def measure(self, prompts: Iterable[tuple[Tensor, Tensor]]) -> csr_matrix:
        """Chooses the n-grams to know, those in the most rows, and gives the rows' vectors of length 1: batches of tokens and
        mask, `[B, T]` each, to `[N, count]`."""
        rows: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        for tokens, mask in prompts:
            found, new = (x.cpu() for x in self.read(tokens.to(self.known.device), mask.to(self.known.device)))
            rows += [row[counted].numpy() for row, counted in zip(found, new, strict=True)]
        numbers, times = np.unique(np.concatenate(rows), return_counts=True)
        most = np.argsort(-times, kind="stable")[: len(self.known)]
        chosen = np.sort(most[times[most] >= LEAST])
        known, idf = numbers[chosen], np.log((1 + len(rows)) / (1 + times[chosen]))  # sorted, as np.unique gives them
        for buffer, values, rest in ((self.known, known, _NONE), (self.idf, idf, 0.0)):
            buffer.fill_(rest)
            buffer[: len(values)] = torch.from_numpy(values)
        table = self.known.cpu()
        places = (_find(table, torch.from_numpy(row)) for row in rows)
        columns = [place[known].sort().values.numpy() for place, known in places]
        weights = [idf[k] / max(np.linalg.norm(idf[k]), 1e-6) for k in columns]
        ends = np.cumsum([0, *map(len, columns)])
        return csr_matrix((np.concatenate(weights), np.concatenate(columns), ends), shape=(len(rows), len(self.known)))

    @torch.no_grad()
    def begin_with(self, weights: Tensor, bias: Tensor) -> None:
        """A linear map of such vectors, `[3, count]` and `[3]`; from now on the words have their share."""
        self.table.copy_(weights.T)
        self.bias.copy_(bias)
        if self.share_of_parts is None:
            self.share.fill_(SHARE)
        else:
            for share, told in zip((self.share, self.share_of_parts), SHARES_BY_SPELLING, strict=True):
                share.fill_(told)
