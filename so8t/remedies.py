"""What to change when a plan does not fit: every proposal is planned before it is made.

Changes come in the order of what they cost a user: first settings that change no result, then time, then what the agent sees or
learns, then the base.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from so8t.config import Config
from so8t.memory import Plan, plan
from so8t.shapes import NAMED

Change = dict[str, Any]
"""Values by dotted key, such as `{"data.batch_size": 1}`."""


@dataclass(frozen=True)
class Remedy:
    """Overrides for the command line, and the plan that they lead to."""

    overrides: tuple[str, ...]
    plan: Plan


def changes(config: Config) -> Iterator[Change]:
    """Changes that may save memory, cheapest first; those that would change nothing are left out."""
    data, loss = config.data, config.loss
    if data.eval_batch_size > 1:  # costs seconds a validation
        yield {"data.eval_batch_size": 1}
    if loss.task_weight and loss.task_chunk > 64:  # costs more passes over the lm_head
        yield {"loss.task_chunk": 64}
    if config.hw is not None and not config.hw.checkpoint_suffix:  # costs a second forward pass of the top layers
        yield {"hw.checkpoint_suffix": True}
    if data.batch_size > 1:  # the same batch in more pieces: costs speed
        pieces = int(config.trainer.get("accumulate_grad_batches", 1)) * data.batch_size
        yield {"data.batch_size": 1, "trainer.accumulate_grad_batches": pieces}
    if loss.task_weight and config.base.quantization == "nf4" and not config.base.quantize_head:  # costs a coarser lm_head
        yield {"base.quantize_head": True}
    if config.base.quantization == "none":  # costs a coarser base
        yield {"base.quantization": "nf4"}
    if config.gate.top_layers > 2:  # costs gates
        yield {"gate.top_layers": 2}
    for share in (2, 4):  # costs the middle of long requests
        if data.max_length // share >= 128:
            yield {"data.max_length": data.max_length // share}
    if loss.task_weight:  # costs all that R_cmd learns
        yield {"loss.task_weight": 0.0}


def changed(config: Config, change: Change) -> Config:
    """The configuration with other values."""
    for key, value in change.items():
        section, name = key.split(".")
        node: Any = getattr(config, section)
        node = {**node, name: value} if isinstance(node, dict) else replace(node, **{name: value})
        sections: Change = {section: node}
        config = replace(config, **sections)
    return config


def remedies(config: Config, first: Plan, *, card_gib: float | None = None) -> list[Remedy]:
    """Settings that make a plan fit, cheapest first.

    Single changes, where one is enough; else the cheapest changes that are enough together; else the largest of the named
    bases that fits as everything else is. Empty when the plan fits, or when nothing makes it fit.
    """
    if first.budget_gib is None or first.fits:
        return []
    single: dict[str, Plan] = {}
    enough: list[Remedy] = []
    for change in changes(config):
        key = next(iter(change))
        if key in single and single[key].fits:
            continue  # half the length was enough already
        single[key] = plan(changed(config, change), card_gib=card_gib)
        if single[key].fits:
            enough.append(_remedy(change, single[key]))
    if enough:
        return enough
    everything = changed(config, {key: value for change in changes(config) for key, value in change.items()})
    if plan(everything, card_gib=card_gib).fits:
        together = _together(config, first, card_gib)
        if together is not None:
            return [together]
    names = list(NAMED)
    for name in names[names.index(config.base.name) + 1 :] if config.base.name in NAMED else names:
        base = replace(config.base, name=name, source="hub", model_id=NAMED[name])
        smaller = plan(replace(config, base=base), card_gib=card_gib)
        if smaller.fits:
            return [Remedy((f"base={name}",), smaller)]
    return []


def _together(config: Config, best: Plan, card_gib: float | None) -> Remedy | None:
    """Adds change to change, cheapest first, leaving out those that do not help, until it fits."""
    taken: Change = {}
    for _ in range(2):  # what did not help before another part shrank may help after
        for change in changes(changed(config, taken)):
            tried = plan(changed(config, taken | change), card_gib=card_gib)
            if tried.peak_gib < best.peak_gib:
                taken, best = taken | change, tried
            if best.fits:
                return _remedy(taken, best)
    return None


def _remedy(change: Change, result: Plan) -> Remedy:
    return Remedy(tuple(f"{key}={str(value).lower()}" for key, value in change.items()), result)


__all__ = ["Remedy", "changed", "changes", "remedies"]
