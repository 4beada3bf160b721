"""Predicts the peak memory of training without a GPU and without weights.

The base is built from its configuration alone (`so8t.blank`); everything else is the code that trains: `SplitBase`,
`SO8TModel`, `SO8TModule.loss_terms`, its optimiser. All tensors are on PyTorch's `meta` device: nothing is computed and nothing
allocated, but every tensor that a real step would allocate passes a `ByteTracker`, so plan and code cannot drift apart.
Left out: what CUDA takes for itself, scratch inside kernels, fragmentation. The margin is for those.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from so8t.base import SplitBase, layer_at
from so8t.blank import blank_base, weights_by_part
from so8t.config import Config
from so8t.data.datamodule import Batch, TaskBatch
from so8t.lightning_module import IGNORE, SO8TModule
from so8t.model import SafetyOutput, SO8TModel
from so8t.placement import HostEmbedding
from so8t.shapes import base_config
from so8t.tracker import ACTIVATIONS, DEQUANTISED, GRADIENTS, LOGITS, ByteTracker

GIB = 2**30
CUDA_BLOCK = 512
"""Bytes that PyTorch's CUDA allocator rounds every tensor up to."""

MARGIN = 0.1
"""Share of the peak that must be left over: how far the plan may be off, and what it leaves out."""

PARTS = {
    "weights_4bit": "weights, 4-bit",
    "weights_embedding": "weights, embedding",
    "weights_head": "weights, lm_head",
    "weights_other": "weights, norms and biases",
    "weights_dense": "weights, dequantised copies",
    "trained": "gates and safety head",
    "optimizer": "optimiser state",
    ACTIVATIONS: "activations",
    GRADIENTS: "gradients",
    LOGITS: "logits",
    DEQUANTISED: "dequantised weights",
}
"""What a peak is made of, in the order of tables and pictures."""


@dataclass(frozen=True)
class Plan:
    """Predicted peaks. `phases` has the parts (GiB) at the peak of a training step and of a validation batch; `budget_gib`
    is what a run may use of a card of `card_gib`, `None` where nothing says so; `checkpointed` says whether the layers above
    the cut run again in the backward pass."""

    phases: dict[str, dict[str, float]]
    budget_gib: float | None
    card_gib: float | None
    checkpointed: bool = False

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """What the peak is made of (GiB); adds up to `peak_gib`."""
        return self.phases[self.phase]

    @property
    def peak_gib(self) -> float:
        """Largest number of GiB alive at once."""
        return sum(self.parts.values())

    @property
    def needed_gib(self) -> float:
        """The peak with its margin."""
        return self.peak_gib * (1 + MARGIN)

    @property
    def fits(self) -> bool | None:
        """Whether the peak with its margin is within the budget."""
        return None if self.budget_gib is None else self.needed_gib <= self.budget_gib


def runs_on_gpu(config: Config) -> bool:
    """Whether this configuration trains on a GPU: it says so, or leaves it open and there is one."""
    accelerator = config.trainer.get("accelerator", "auto")
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def plan(config: Config, *, card_gib: float | None = None) -> Plan:
    """Predicts the peak of the longest step that a configuration allows.

    Args:
        card_gib: what is free on the card at hand, where one is; otherwise the profile says what a run may use.

    Raises:
        BaseModelError: the base's configuration cannot be had, or its layers do not reach for `gate.top_layers`.
    """
    config = settled(config, card_gib=card_gib)
    peaks = _peaks(config, on_gpu=runs_on_gpu(config))
    limits = [limit for limit in (config.hw.memory_budget_gib if config.hw else None, card_gib) if limit is not None]
    return Plan(
        phases={phase: {part: parts.get(part, 0) / GIB for part in PARTS} for phase, parts in peaks.items()},
        budget_gib=min(limits, default=None),
        card_gib=config.hw.memory_gib if config.hw else card_gib,
        checkpointed=runs_suffix_again(config),
    )


def settled(config: Config, *, card_gib: float | None = None) -> Config:
    """With `hw.checkpoint_suffix=auto` what the plan says of it: a second forward pass of the layers above the cut is paid for
    only where the longest step does not fit without one. Other configurations are given back as they are.

    Raises:
        BaseModelError: as `plan`.
    """
    if config.hw is None or config.hw.checkpoint_suffix != "auto":
        return config
    kept, again = (replace(config, hw=replace(config.hw, checkpoint_suffix=value)) for value in (False, True))
    return kept if plan(kept, card_gib=card_gib).fits else again


def runs_suffix_again(config: Config) -> bool:
    """Whether a run of this configuration keeps no activations above the cut."""
    hw = settled(config).hw
    return hw is not None and bool(hw.checkpoint_suffix)


def _peaks(config: Config, *, on_gpu: bool) -> dict[str, dict[str, int]]:
    """Bytes by part at the peak of each phase."""
    device = torch.device("meta")
    shape, left_out = base_config(config.base), 0
    if on_gpu:  # on a CPU the layers below the cut may differ: some of them have a dense copy of their weights
        config, shape, left_out = _shortened(config, shape)
    with_head = bool(config.loss.task_weight)
    base = blank_base(config.base, shape, cut=config.gate.top_layers, device=device, on_gpu=on_gpu, with_head=with_head)
    module = module_of(config, base).to(device)
    vocabulary = shape.get_text_config().vocab_size
    tracker = ByteTracker(vocabulary=vocabulary, granularity=CUDA_BLOCK if on_gpu else 1, assume=True)
    if isinstance(base.decoder.embed_tokens, HostEmbedding):
        tracker.ignore([base.decoder.embed_tokens.weight])
    for part, tensor in weights_by_part(base, base.causal_lm):
        tracker.add([tensor], part)
    for part, tensor in weights_by_part(base, base.prefix_layers[0]) if left_out else ():
        tracker.add_copies(tensor, left_out, part)
    tracker.add([*module.parameters(), *module.buffers()], "trained")
    peaks = {}
    with fused_attention(), tracker:
        optimizer = warm_up(module, tracker)  # stays referenced: its averages are alive in every step
        for phase, step, rows in (
            ("training step", training_step, config.data.batch_size),
            ("validation batch", validation_step, config.data.eval_batch_size),
        ):
            module.train(phase == "training step")
            batch = longest_batch(config, rows, device)
            if batch.task is not None:  # answers and the ends of their turns
                targets = batch.task.targets
                tracker.selected = {targets.shape: targets.shape[0] * (config.data.max_length + 1)}
            tracker.restart()
            step(module, batch)
            peaks[phase] = tracker.at_peak
    del optimizer
    return peaks


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention is fused although tensors have no data: on `meta` PyTorch would take the one that holds `T x T`
    weights a head. CPU and CUDA have kernels that keep the output and one number a query; this is the CPU's."""
    whole = F.scaled_dot_product_attention

    def fused(
        q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, scale: float | None, is_causal: bool, **_: object
    ) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(q.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = whole  # type: ignore[assignment]


def _shortened(config: Config, shape: PreTrainedConfig) -> tuple[Config, PreTrainedConfig, int]:
    """The same base with a few layers below the cut, which stand for all of them, and how many were left out: where layers are
    alike, those below the cut add nothing to a peak but their weights. The head goes on reading as many of them."""
    depth, cut = shape.num_hidden_layers, config.gate.top_layers
    reads = {read: layer_at(read, depth) for read in config.head.reads if read != "last"}
    below = sorted(read for read, layer in reads.items() if layer < depth - cut)
    left_out = max(0, depth - cut - 2 - len(below))
    kinds = getattr(shape, "layer_types", None)
    if not left_out or (kinds and len(set(kinds)) > 1):
        return config, shape, 0
    short = copy.deepcopy(shape)
    short.num_hidden_layers -= left_out
    if kinds:
        short.layer_types = kinds[left_out:]
    moved = {read: 1 + below.index(read) if read in below else layer - left_out for read, layer in reads.items()}
    places = tuple(read if read == "last" else moved[read] / short.num_hidden_layers for read in config.head.reads)
    return replace(config, head=replace(config.head, reads=places)), short, left_out


# -- one step, real or planned -----------------------------------------------------------------------------------------


def module_of(config: Config, base: SplitBase) -> SO8TModule:
    """Model and loss as `so8t.training` makes them."""
    base.checkpoint_suffix = runs_suffix_again(config)
    model = SO8TModel(base, config.gate, config.head)
    return SO8TModule(model, config.loss, config.pet, config.optim, class_counts=(1, 1, 1))


def longest_batch(config: Config, rows: int, device: torch.device) -> Batch:
    """The largest batch that `rows` rows can make: every prompt and every answer at `data.max_length`."""
    longest = config.data.max_length * (2 if config.pet.path == "request_and_answer" else 1)
    whole = torch.ones(rows, longest, dtype=torch.long, device=device)
    tokens = whole.clone()
    tokens[:, 1:] = torch.arange(rows, device=device)[:, None]  # no two rows are the same
    none = torch.zeros(rows, dtype=torch.long, device=device)
    task = None
    sequences = min(math.ceil(config.data.task_rows), 2 * rows)  # an answer and a rationale a row at most
    if sequences and config.loss.task_weight:
        # prompt, answer and the end of the turn
        sequence = torch.ones(sequences, 2 * config.data.max_length + 1, dtype=torch.long, device=device)
        targets = torch.full_like(sequence, IGNORE)
        targets[:, config.data.max_length - 1 : -1] = 0
        task = TaskBatch(sequence, torch.ones_like(sequence), targets)
    return Batch(tokens, whole, whole.bool(), none, none, torch.ones(rows, device=device), none, task)


def warm_up(module: SO8TModule, tracker: ByteTracker) -> torch.optim.AdamW:
    """What every step but the first finds: AdamW's averages, and the gradients of the micro-batch before."""
    optimizer = module.make_optimizer()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
            tracker.add([parameter.grad], GRADIENTS)
    with tracker.labelled("optimizer"):
        optimizer.step()
    return optimizer


def _forward(module: SO8TModule, batch: Batch) -> SafetyOutput:
    """As the module's own `forward`, past the cache."""
    hidden = module.model.prefix(batch.tokens, batch.mask)
    return module.model(hidden, batch.tokens, batch.mask)


def training_step(module: SO8TModule, batch: Batch) -> None:
    """What one micro-batch does: forward, every term of the loss with PET at full weight, backward."""
    module.loss_terms(batch, _forward(module, batch), progress=1.0).total().backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def validation_step(module: SO8TModule, batch: Batch) -> None:
    """What one validation batch does."""
    output = _forward(module, batch)
    module.model.decide(output, batch.position)
    if batch.task is not None:
        module.task_loss(batch.task)


__all__ = [
    "MARGIN",
    "PARTS",
    "Plan",
    "longest_batch",
    "module_of",
    "plan",
    "runs_on_gpu",
    "training_step",
    "validation_step",
    "warm_up",
]
