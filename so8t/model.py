"""Base + gates + safety head: the prefix's hidden states in, token-level safety logits and the task path out."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from so8t.base import SplitBase, layer_at, shared_lead
from so8t.errors import ConfigError
from so8t.gates import GateSet, GateSpec, TrialityGate
from so8t.labels import FAIL_CLOSED, LABELS, Label
from so8t.so8 import block_count
from so8t.specs import Count, Fraction, NotNegative, PositiveInt, ProperFraction, spec
from so8t.words import Words


@spec
class HeadSpec:
    """What the safety head reads.

    `reads`: `last` (the `R_safe` view of the final norm), and fractions of the base's depth whose layer's output is read (0.6:
    layer 18 of 30); below the cut they are frozen. `commutator`: how much the order of the last pair matters to each block of
    the state. With `gate.triality` it reads the authority as well: the form of state, safety view and authority's view of the
    mean state so far. `pooling`: the token itself, the mean of all tokens up to it, or both; all of them causal. `standardise`
    brings every feature to mean 0 and standard deviation 1 over some training rows, measured once before training: a few
    outlier dimensions of the base would otherwise drown the rest. `probe`: the head begins as a logistic regression on what it
    reads of the frozen base, and gates and head go on from there (linear probing, then fine-tuning: Kumar et al.
    2022, arXiv:2202.10054); its `C`, the inverse strength of L2. 0: small random weights. `words`: how many n-grams of
    tokens, at most, decide beside the states; fitted with the probe, then left alone. `fold_words`: they
    are read without upper case, spaces and punctuation. `weigh_words`: they count less than half, and more the more a text is
    spelt in parts of characters. `longest`: the regression on states leaves out rows whose request has more tokens. `familiar`:
    of texts like the validation rows labelled ALLOW, the share that is no stranger to the head than what may be allowed. 0:
    nothing is too strange. `smoothing`: how much of what is decided along a request's tokens comes from the tokens before. The
    decision proper, behind the request, is not smoothed.
    """

    reads: tuple[Fraction | Literal["last"], ...] = ("last",)
    commutator: bool = False
    pooling: Literal["token", "mean", "both"] = "both"
    standardise: bool = True
    probe: NotNegative = 0.0
    words: Count = 0
    fold_words: bool = False
    weigh_words: bool = False
    longest: PositiveInt | None = None
    familiar: Fraction = 0.0
    smoothing: ProperFraction = 0.0
    dropout: ProperFraction = 0.0
    min_confidence: ProperFraction = 0.0


@dataclass
class SafetyOutput:
    """`logits` `[B, T, 3]`; `safe_view` `[B, T, D]`, the state after `R_safe` that the task path goes on from; `strangeness`
    `[B, T]`, the mean square of what the head reads, standardised: it means something at a decision alone; none in training."""

    logits: Tensor
    safe_view: Tensor
    strangeness: Tensor | None


@dataclass
class Decisions:
    """`probabilities` `[B, 3]`, `labels` `[B]`; `failed` rows could not be scored, `unsure` ones were under
    `head.min_confidence` or a policy's thresholds, or too strange to be allowed: both are ESCALATE."""

    probabilities: Tensor
    labels: Tensor
    failed: Tensor
    unsure: Tensor


def causal_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of all real positions up to each one: `[B, T, D], [B, T] -> [B, T, D]`, in float32."""
    weight = mask.float()[..., None]
    return (x.float() * weight).cumsum(1) / weight.cumsum(1).clamp(min=1)


def unit_rms(x: Tensor) -> Tensor:
    """Scales each vector to root mean square 1 (no weights): `[..., D] -> [..., D]`, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def smoothed(logits: Tensor, path: Tensor, smoothing: float) -> Tensor:
    """Exponential smoothing along the tokens of a path (Brown 1959): `[B, T, 3], [B, T] -> [B, T, 3]`, in log-probabilities,
    `s[t] = smoothing s[t-1] + (1 - smoothing) z[t]`, `s` beginning at the first token. Tokens off the path, and those
    whose logits are not finite, keep their probabilities and are passed over. Causal; a smoothing of 0 changes nothing.
    """
    if not smoothing:
        return logits
    now = logits.float().log_softmax(-1)
    counted = path.bool() & now.isfinite().all(-1)
    out, state, begun = now.clone(), torch.zeros_like(now[:, 0]), torch.zeros_like(counted[:, 0])
    for t in counted.any(0).nonzero()[:, 0].tolist():
        on = counted[:, t]
        weight = torch.where(begun, smoothing, 0.0)[:, None]
        state = torch.where(on[:, None], weight * state + (1 - weight) * now[:, t], state)
        out[:, t] = torch.where(on[:, None], state, now[:, t])
        begun = begun | on
    return out


def at_position(x: Tensor, position: Tensor) -> Tensor:
    """Picks one position a row: `[B, T, ...], [B] -> [B, ...]`."""
    return x[torch.arange(x.shape[0], device=x.device), position]


def decide(logits: Tensor, *, min_confidence: float = 0.0, too_strange: Tensor | None = None) -> Decisions:
    """Logits at the decision position to decisions, failing closed: `[B, 3] ->`.

    A row with a logit that is not finite is ESCALATE and `failed`; one whose largest probability is below
    `min_confidence`, or shared by two labels, or that would be ALLOW and is `too_strange` `[B]`, is ESCALATE and `unsure`.
    """
    logits = logits.float()
    failed = ~torch.isfinite(logits).all(-1)
    probabilities = torch.where(failed[:, None], 1 / len(LABELS), logits.nan_to_num(0, 0, 0).softmax(-1))
    top, labels = probabilities.max(-1)
    tied = (probabilities == top[:, None]).sum(-1) > 1
    unsure = ~failed & ((top < min_confidence) | tied)
    if too_strange is not None:
        unsure |= ~failed & too_strange & (labels == Label.ALLOW)
    labels = torch.where(failed | unsure, int(FAIL_CLOSED), labels)
    return Decisions(probabilities, labels, failed, unsure)


class SafetyHead(nn.Module):
    """One linear map from what it reads, shifted and scaled per feature, to three logits; `words` are pooled with it.

    Args:
        width: of each state that is read.
        more: how many figures of the last gate are read behind the states, all reads together.
        vocabulary: tokens of the base.
    """

    shift: Tensor
    scale: Tensor
    limit: Tensor

    def __init__(self, width: int, spec: HeadSpec, more: int = 0, vocabulary: int = 0):
        super().__init__()
        self.spec = spec
        count = (len(spec.reads) * width + more) * (2 if spec.pooling == "both" else 1)
        self.linear = nn.Linear(count, len(LABELS))
        nn.init.normal_(self.linear.weight, std=0.001 if spec.standardise else 0.01)
        nn.init.zeros_(self.linear.bias)
        self.words = None
        if spec.words:
            self.words = Words(spec.words, vocabulary, folded=spec.fold_words, weighed=spec.weigh_words)
        self.register_buffer("shift", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))
        self.register_buffer("limit", torch.tensor(math.inf))  # of the strangeness of what may be allowed

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Measures shift and scale on rows at their decision positions: `[N, features]`. A feature that varies by less than a
        hundredth of its mean is left as wide as it is: what would be widened is rounding, above all in bfloat16."""
        mean, deviation = features.mean(0), features.std(0, correction=0)
        least = (0.01 * mean.abs()).clamp(min=1e-4)
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(deviation > least, 1 / deviation.clamp(min=1e-4), 1.0))

    @torch.no_grad()
    def begin_with(self, weights: Tensor, bias: Tensor) -> None:
        """A linear map of shifted and scaled features: `[3, features]` and `[3]`."""
        self.linear.weight.copy_(weights)
        self.linear.bias.copy_(bias)

    FEATURES = 1
    """Raised where what `features_at` gives of the same states changes: it is kept on disk."""

    def _columns(self, reads: list[Tensor], mask: Tensor) -> Iterator[Tensor]:
        """The features read by read: `[B, T, width]` each, float32."""
        for index, read in enumerate(reads):
            scaled = unit_rms if index < len(self.spec.reads) else Tensor.float  # figures of a gate have a scale of their own
            state = scaled(read)
            if self.spec.pooling != "mean":
                yield state
            if self.spec.pooling != "token":
                yield scaled(causal_mean(state, mask))

    def _kept(self, rows: int, width: int) -> Tensor:
        """Dropout of the same features at every token of a row (Gal and Ghahramani 2016, arXiv:1512.05287): `[B, 1, width]`.
        Drawn anew for each token it would be noise along the request, and PET would smooth that."""
        return nn.functional.dropout(self.shift.new_ones(rows, 1, width), self.spec.dropout)

    def features_at(self, reads: list[Tensor], mask: Tensor, position: Tensor) -> Tensor:
        """What is shifted and scaled for the linear map at one position a row: list of `[B, T, width]`, `[B, T]` and `[B]` to
        `[B, features]`, float32."""
        return torch.cat([at_position(columns, position) for columns in self._columns(reads, mask)], dim=-1)

    def forward(self, reads: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token-level logits, and in evaluation the strangeness, the mean square of the shifted and scaled features: list of
        `[B, T, width]` and `[B, T]` to `[B, T, 3]` and `[B, T]`. Read by read: all features of all tokens at once would take
        more memory than the suffix."""
        logits: Tensor = self.linear.bias
        squares, begin = mask.new_zeros(mask.shape, dtype=torch.float32), 0
        for columns in self._columns(reads, mask):
            part = slice(begin, begin := begin + columns.shape[-1])
            turned = (columns - self.shift[part]) * self.scale[part]
            if self.training and self.spec.dropout:
                turned = turned * self._kept(len(columns), columns.shape[-1])
            elif not self.training:
                squares += torch.linalg.vector_norm(turned, dim=-1).square()
            logits = logits + nn.functional.linear(turned, self.linear.weight[:, part])
        return logits, None if self.training else squares / begin


class SO8TModel(nn.Module):
    """A frozen base with gates in its suffix, a safety head on the `R_safe` view and the base's own lm_head behind
    `R_cmd`.

    Raises:
        ConfigError: the head reads nothing, a layer twice, or a last gate that is not there.
    """

    def __init__(self, base: SplitBase, gate: GateSpec, head: HeadSpec):
        super().__init__()
        layers = [None if read == "last" else layer_at(read, base.depth) for read in head.reads]
        if not layers or len(set(layers)) < len(layers):
            raise ConfigError(f"head.reads={list(head.reads)}: name 'last' or fractions of the depth, each layer once")
        self.layers = layers
        self.below = tuple(layer for layer in layers if layer is not None and layer < base.depth - base.cut)
        self.base = base
        self.gates = GateSet(gate, base, command_is_read=head.commutator).to(base.device)
        turned = 1 if gate.blocks == "leading" else block_count(base.hidden_size)
        vocabulary = int(base.causal_lm.config.get_text_config().vocab_size)
        self.head = SafetyHead(base.hidden_size, head, (gate.triality + head.commutator) * turned, vocabulary).to(base.device)
        self.gates.attach(base)

    def prompts_open_with(self, tokens: Sequence[int]) -> None:
        """With these tokens the chat template begins every prompt: the prefix reads them once, and the words do not count what
        ends among them."""
        self.base.remember_opening(tokens)
        if self.head.words is not None:
            self.head.words.opening = len(tokens)

    def safety_side(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that decisions depend on: every gate but those of the command side, and the head."""
        wanted = {id(p) for p in self.gates.safety_parameters()} | {id(p) for p in self.head.parameters()}
        return ((name, p) for name, p in self.named_parameters() if id(p) in wanted)

    def gates_computed_once(self) -> AbstractContextManager[None]:
        """One batched map for all gates of a step, where no layer is run again in the backward pass."""
        return nullcontext() if self.base.checkpoint_suffix else self.gates.computed_once()

    def prefix(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The frozen part: `[B, T] -> [B, T, (1 + n) D]`, the state at the cut and those of the `n` layers below it that the
        head reads."""
        return self.base.prefix(tokens, mask, self.below)

    def trunk(self, hidden: Tensor, mask: Tensor, *, lead: int = 0) -> tuple[Tensor, list[Tensor]]:
        """From what `prefix` gave to the tap: `[B, T, (1 + n) D] ->` the safe view `[B, T, D]` and what the head reads. `lead`
        is how many tokens all rows begin with."""
        at_cut, *below = torch.split(hidden, self.base.hidden_size, dim=-1)
        first = self.base.depth - self.base.cut
        keep = tuple(layer - first for layer in self.layers if layer is not None and layer >= first)
        with self.gates_computed_once():
            top, kept = self.base.suffix(at_cut, mask, keep, lead=lead)
            state = self.base.final_norm(top)
            last, of_gate = self.gates.last if self.gates.attached else None, []
            safe = last.tap(state) if last is not None else state
            if isinstance(last, TrialityGate):
                of_gate.append(last.authority_form(state, safe, causal_mean(state, mask)))
            if last is not None and self.head.spec.commutator:
                of_gate.append(last.commutator(state))
        states = dict(zip(self.below, below, strict=True)) | {first + k: state for k, state in kept.items()}
        return safe, [safe if layer is None else states[layer] for layer in self.layers] + of_gate

    def forward(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> SafetyOutput:
        """Safety pass from the prefix's output and the tokens it is of: `[B, T, (1 + n) D], [B, T], [B, T] ->`. In training the
        logits are those of the states alone, or what the words know already would not be learnt."""
        safe, reads = self.trunk(hidden, mask, lead=shared_lead(tokens, mask))
        logits, strangeness = self.head(reads, mask)
        if self.head.words is not None and not self.training:
            logits = self.head.words.pooled(logits, tokens, mask)
        return SafetyOutput(logits, safe, strangeness)

    def decide(self, output: SafetyOutput, position: Tensor, *, limited: Tensor | None = None) -> Decisions:
        """The decision at each row's last real prompt token. Of `limited` rows `[B]`, by default all, what is stranger than the
        head's limit is not allowed."""
        too_strange = None
        if output.strangeness is not None:
            too_strange = at_position(output.strangeness, position) > self.head.limit
            too_strange = too_strange if limited is None else too_strange & limited
        logits = at_position(output.logits, position)
        return decide(logits, min_confidence=self.head.spec.min_confidence, too_strange=too_strange)

    def smoothed_logits(self, output: SafetyOutput, path: Tensor) -> Tensor:
        """Logits of what is decided after each token of a path, smoothed as the head's spec says: `[B, T] -> [B, T, 3]`."""
        return smoothed(output.logits, path, self.head.spec.smoothing)

    def task_logits(self, safe_view: Tensor) -> Tensor:
        """The task path: `R_cmd`, then the frozen lm_head: `[..., D] -> [..., V]`."""
        state = self.gates.last.command(safe_view) if self.gates.last is not None else safe_view
        return self.base.causal_lm.lm_head(state)

    @contextmanager
    def task_path(self) -> Iterator[None]:
        """Inside, the base's own forward and `generate` run behind all gates, `R_cmd R_safe` included."""
        if self.gates.last is None:
            yield
            return
        last = self.gates.last
        handle = self.base.decoder.norm.register_forward_hook(lambda _m, _i, out: last(out)[1])
        try:
            with self.gates.computed_once():
                yield
        finally:
            handle.remove()

    @contextmanager
    def without_gates(self) -> Iterator[None]:
        """Inside, the base is what it was before any gate was attached, and the last gate turns nothing either."""
        attached = self.gates.attached
        self.gates.detach()
        try:
            yield
        finally:
            if attached:
                self.gates.attach(self.base)
