"""Learning to write rationales after the agent is trained: examples for the prompt, and a rotation of the intact base's states.

The base is read once without gates; the states before each target token are kept, and `R_cmd` of the rationales is trained on
them with the language-model loss. No gate and no head is touched, so no decision can change.
"""

import logging
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from so8t.base import shared_lead
from so8t.conversation import Exchange
from so8t.data.records import Record
from so8t.data.tokenise import Template, pad_rows
from so8t.labels import Label
from so8t.model import SO8TModel
from so8t.placement import AbsentHead
from so8t.rationale import ASKED, MOST_TOKENS, Examples, Rationales, Script, fault, script
from so8t.specs import Count, Positive, PositiveInt, spec

log = logging.getLogger(__name__)

ByKind = dict[tuple[Script, Label], list[Record]]
"""Rows by language and label."""

CANDIDATES = 64
"""Examples are drawn from so many of the shortest rows of a language and a decision: every prompt pays for them."""


@spec
class RationaleSpec:
    """What `conf/rationale` says; `rows=0` leaves rationales out. `examples` a language and a decision. Before anything is
    learned a rationale is written for up to `tried` rows of each (`spoken_well`); 0 takes every language."""

    rows: Count = 0
    tried: Count = 0
    examples: PositiveInt = 4
    epochs: PositiveInt = 2
    lr: Positive = 0.03


def explained(records: Sequence[Record]) -> ByKind:
    """Rows that are not ALLOW and whose rationale is in the request's language, by language and label."""
    found: ByKind = {}
    for record in records:
        kind = script(record.user_request)
        if record.safety_label not in ASKED or kind is None or not record.safety_rationale:
            continue
        if script(record.safety_rationale) == kind:
            found.setdefault((kind, record.safety_label), []).append(record)
    return found


def chosen_examples(by_kind: ByKind, template: Template, count: int) -> dict[Script, dict[Label, tuple[Exchange, ...]]]:
    """A few short rows for every language and decision, without a context; none where there are not twice as many rows."""
    chosen: dict[Script, dict[Label, tuple[Exchange, ...]]] = {}
    for (kind, label), records in by_kind.items():
        pairs = [Exchange(r.user_request, r.safety_rationale or "") for r in records if not r.context]
        pairs.sort(key=lambda pair: (template.length(pair.request + pair.answer), pair.request))
        if len(pairs) >= 2 * count:
            rows = random.Random(0).sample(pairs[:CANDIDATES], count)  # noqa: S311
            chosen.setdefault(kind, {})[label] = tuple(rows)
    return chosen


def encoded(rationales: Rationales, record: Record, template: Template) -> tuple[list[int], int]:
    """The tokens of prompt, rationale and end, and where the rationale begins."""
    prompt = rationales.prompt(template, record.user_request, record.context, record.safety_label)
    target = template.tokenizer(record.safety_rationale, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*prompt, *target, template.tokenizer.eos_token_id], len(prompt)


@torch.no_grad()
def states(
    model: SO8TModel, template: Template, rationales: Rationales, records: Sequence[Record], *, batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """What the intact base makes of rows, a batch each: the states before the targets `[n, D]`, and the targets `[n]`.

    Rows of one language and label go together: they begin with the same examples, which then are read once a batch.
    """
    base, batches = model.base, []
    for rows in explained(records).values():
        sequences = sorted((encoded(rationales, record, template) for record in rows), key=lambda pair: len(pair[0]))
        with model.without_gates():
            for k in range(0, len(sequences), batch_size):
                part = sequences[k : k + batch_size]
                tokens, mask = pad_rows([row for row, _ in part], int(template.tokenizer.pad_token_id or 0))
                tokens, mask = tokens.to(base.device), mask.to(base.device)
                lead = shared_lead(tokens, mask)
                top = base.final_norm(base.suffix(base.prefix(tokens, mask), mask, lead=lead)[0])
                place = torch.arange(tokens.shape[1] - 1, device=base.device)
                begins = torch.tensor([begin for _, begin in part], device=base.device)
                wanted = (place >= begins[:, None] - 1) & mask[:, 1:].bool()
                batches.append((top[:, :-1][wanted], tokens[:, 1:][wanted]))
    return batches


def loss(model: SO8TModel, rationales: Rationales | None, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token cross-entropy of states `[n, D]` behind the rotation, or without it."""
    turned = hidden if rationales is None else rationales.rotation(hidden)
    return F.cross_entropy(model.base.causal_lm.lm_head(turned).float(), targets)


@torch.no_grad()
def perplexity(model: SO8TModel, rationales: Rationales | None, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Of the targets, over all tokens."""
    total = sum(float(loss(model, rationales, *batch)) * len(batch[1]) for batch in batches)
    return float(torch.tensor(total / sum(len(targets) for _, targets in batches)).exp())


def not_shown(by_kind: ByKind, examples: Examples) -> ByKind:
    """The rows of languages and decisions that have examples, but for the examples."""
    shown = {example.request for by_label in examples.values() for pairs in by_label.values() for example in pairs}
    return {
        (kind, label): [r for r in records if r.user_request not in shown]
        for (kind, label), records in by_kind.items()
        if label in examples.get(kind, {})
    }


def spoken_well(
    model: SO8TModel,
    template: Template,
    rationales: Rationales,
    by_kind: ByKind,
    tried: int,
    *,
    seed: int,
) -> Examples:
    """The examples of those languages and decisions for which half or more of up to `tried` rationales pass the checks: a small
    base that cannot write a language says nothing in it. Stops as soon as it is known."""
    kept: dict[Script, dict[Label, tuple[Exchange, ...]]] = {}
    for (kind, label), others in not_shown(by_kind, rationales.examples).items():
        examples = rationales.examples[kind][label]
        rows = random.Random(seed).sample(others, min(tried, len(others)))  # noqa: S311
        passed = failed = 0
        for record in rows:
            request, context = record.user_request, record.context
            *_, written = rationales.write(model, template, request, context, label, every=MOST_TOKENS)
            good = fault(written.text, request, context, examples) is None
            passed, failed = passed + good, failed + (not good)
            if 2 * max(passed, failed) > len(rows):
                break
        log.info("rationales in %s script for %s: %d pass the checks, %d do not", kind, label.name, passed, failed)
        if passed >= failed:
            kept.setdefault(kind, {})[label] = examples
    return kept


def learn(
    model: SO8TModel, template: Template, records: Sequence[Record], spec: RationaleSpec, *, batch_size: int, seed: int
) -> Rationales | None:
    """Chooses examples among training rows and trains the rotation on others; `None` where there is nothing to learn from, or
    nothing to speak with. The random numbers of the run stay as they were."""
    if not spec.rows or isinstance(model.base.causal_lm.lm_head, AbsentHead):
        return None
    by_kind = explained(records)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rationales = Rationales(model.base.hidden_size, chosen_examples(by_kind, template, spec.examples)).to(model.base.device)
        if spec.tried:
            rationales.examples = spoken_well(model, template, rationales, by_kind, spec.tried, seed=seed)
        if not rationales.examples:
            return None
        rows = [record for part in not_shown(by_kind, rationales.examples).values() for record in part]
        rows = random.Random(seed).sample(rows, min(spec.rows, len(rows)))  # noqa: S311
        batches = states(model, template, rationales, rows, batch_size=batch_size)
        optimizer = torch.optim.AdamW(rationales.parameters(), lr=spec.lr, weight_decay=0.0)
        steps = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, spec.epochs * len(batches))
        for _ in range(spec.epochs):
            for k in torch.randperm(len(batches)).tolist():
                optimizer.zero_grad()
                loss(model, rationales, *batches[k]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                steps.step()
    log.info("rationales learned from %d rows", len(rows))
    return rationales.requires_grad_(False)


__all__ = ["RationaleSpec", "chosen_examples", "explained", "learn", "perplexity", "spoken_well", "states"]
