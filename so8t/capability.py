"""What the gates leave of the base: perplexity a token of answers, behind all of them and of the base alone."""

import random
from collections.abc import Sequence

import torch

from so8t.data.datamodule import task_batch
from so8t.data.records import Record
from so8t.data.tokenise import Template
from so8t.losses import language_model_loss
from so8t.model import SO8TModel
from so8t.placement import AbsentHead

ROWS = 16
"""Answers that are read at most: about 1,000 tokens of the starter set, for SmolLM2 16 s of a core that others use, too."""
CHUNK = 256
"""Tokens whose logits exist at once."""


@torch.no_grad()
def task_perplexity(model: SO8TModel, records: Sequence[Record], template: Template, *, batch_size: int) -> dict[str, float]:
    """Of a token of the rows' `task_output` and of the turn's end: `task_perplexity` behind all gates, `task_perplexity_base`
    without them. Of more than `ROWS` rows with an answer those are read that a draw without a run's seed takes, so that runs
    on one split read the same. Empty where no row has an answer or the base no lm_head."""
    base = model.base
    rows = [record for record in records if record.task_output]
    if not rows or isinstance(base.causal_lm.lm_head, AbsentHead):
        return {}
    rows = random.Random(0).sample(rows, min(ROWS, len(rows)))  # noqa: S311
    encoded = [template.encode_target(record, record.task_output or "", rationale=False) for record in rows]
    encoded.sort(key=lambda target: len(target.tokens))
    size = max(1, batch_size // 4)  # with its answer a prompt is up to twice as long, and the logits come on top
    gated = alone = torch.zeros((), device=base.device)
    for k in range(0, len(encoded), size):
        batch = task_batch(encoded[k : k + size], int(template.tokenizer.pad_token_id or 0))
        mask, targets = batch.mask.to(base.device), batch.targets.to(base.device)
        hidden = model.prefix(batch.tokens.to(base.device), mask)
        loss, count = language_model_loss(model.trunk(hidden, mask)[0], targets, model.task_logits, chunk=CHUNK)
        gated = gated + count * loss
        with model.without_gates():
            state = model.trunk(hidden, mask)[0]
        alone = alone + count * language_model_loss(state, targets, base.causal_lm.lm_head, chunk=CHUNK)[0]
    tokens = sum(len(target.tokens) - target.start for target in encoded)
    return {"task_perplexity": float((gated / tokens).exp()), "task_perplexity_base": float((alone / tokens).exp())}
