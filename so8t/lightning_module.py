"""`SO8TModule`: one training step, its optimiser groups, and what goes into a checkpoint (never the base)."""

import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from so8t.base import shared_lead
from so8t.baselines import Linear, fit_linear
from so8t.data.cache import PrefixCache
from so8t.data.datamodule import Batch, TaskBatch
from so8t.data.store import PrefixStore, row_key
from so8t.errors import ArtefactError, ConfigError, DataError
from so8t.labels import LABELS
from so8t.losses import IGNORE, LossTerms, expected_cost, language_model_loss, path_loss, safety_loss
from so8t.metrics import SafetyMetrics, flicker
from so8t.model import SafetyOutput, SO8TModel, at_position
from so8t.optim import OptimSpec, cosine_with_warmup
from so8t.pet import GroupInertia, PetSpec, centred, temporal_consistency
from so8t.specs import NotNegative, PositiveInt, ProperFraction, spec
from so8t.words import STRENGTH

log = logging.getLogger(__name__)


@spec
class LossSpec:
    """What `conf/loss` says; a weight of 0 turns its term off. `costs[label][decision]`."""

    safety_weight: NotNegative = 1.0
    class_weights: tuple[NotNegative, ...] | Literal["balanced"] | None = "balanced"
    focal_gamma: NotNegative = 0.0
    label_smoothing: ProperFraction = 0.0
    path_weight: NotNegative = 0.0
    cost_weight: NotNegative = 0.5
    costs: tuple[tuple[NotNegative, ...], ...] = ((0.0, 0.5, 1.0), (1.5, 0.0, 0.5), (3.0, 0.5, 0.0))
    task_weight: NotNegative = 0.1
    task_reaches: Literal["cmd", "all"] = "cmd"
    task_chunk: PositiveInt = 256


class _Means(nn.ModuleDict):
    """Running means by name."""

    def __getitem__(self, key: str) -> MeanMetric:
        mean = super().__getitem__(key)
        assert isinstance(mean, MeanMetric)
        return mean


class SO8TModule(L.LightningModule):
    """Trains gates and head of one `SO8TModel`.

    Args:
        class_counts: training rows per label, for `loss.class_weights=balanced`.
        cache: where the prefix's output is kept; none by default.

    Raises:
        ConfigError: a cost matrix or class weights of the wrong size, or nothing to train.
    """

    strict_loading = False
    costs: Tensor
    class_weights: Tensor

    def __init__(
        self,
        model: SO8TModel,
        loss: LossSpec,
        pet: PetSpec,
        optim: OptimSpec,
        *,
        class_counts: tuple[int, ...],
        cache: PrefixCache | None = None,
    ):
        super().__init__()
        n = len(LABELS)
        if len(loss.costs) != n or any(len(row) != n for row in loss.costs):
            raise ConfigError(f"loss.costs must be {n} rows of {n} numbers, one per label in the order {LABELS}")
        self.model = model
        self.loss_spec, self.pet_spec, self.optim_spec = loss, pet, optim
        self.register_buffer("costs", torch.tensor(loss.costs))
        self.register_buffer("class_weights", _class_weights(loss, class_counts))
        self.inertia = GroupInertia(model.gates, pet.inertia_decay)
        self.cache = PrefixCache(model.base, keep=model.below) if cache is None else cache
        self._random_state: tuple[Tensor | None, Tensor | None] = (None, None)
        self.val_metrics = SafetyMetrics()
        self.means = _Means({kind: MeanMetric() for kind in ("lm", "flicker", "decision_changes", "loss")})

    # -- forward -------------------------------------------------------------------------------------------------------

    def cpu(self) -> Self:
        """Does nothing. Lightning calls this when a fit or a validation is over, and the evaluation behind it would run on the
        host; what a run no longer needs on a GPU goes with its process."""
        return self

    def forward(self, batch: Batch) -> SafetyOutput:
        """Safety logits `[B, T, 3]` of a right-padded batch, through the cache and the gates."""
        hidden = self.cache.prefix(batch.tokens, batch.mask)
        return self.model(hidden, batch.tokens, batch.mask)

    def task_loss(self, task: TaskBatch) -> tuple[Tensor, int]:
        """Language-model loss of answers and rationales; by default only the command side is reached, and where
        there is none the loss is measured and trains nothing."""
        frozen_side = self.loss_spec.task_reaches == "cmd"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_side):
            hidden = self.model.prefix(task.tokens, task.mask)
            safe = self.model.trunk(hidden, task.mask)[0]
        trains = not frozen_side or bool(self.model.gates.command_parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            return language_model_loss(safe, task.targets, self.model.task_logits, chunk=self.loss_spec.task_chunk)

    # -- training ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_head(
        self, batches: Iterable[Batch], last_states: PrefixStore | None = None, found: PrefixStore | None = None
    ) -> None:
        """Measures on training rows what the head shifts and scales by, and fits the logistic regression that it begins with
        and that of the words, as its spec says; call once, before training from scratch. Their features are together in the
        host's memory. Rows whose request is longer than `head.longest` teach the words alone. Where no figure of a gate is
        among the features they are the frozen base's: both stores keep what is computed, and a row that both have is not
        computed again.

        Raises:
            DataError: every row is longer than that.
        """
        model, head, columns, prompts, labels, weights = self.model, self.model.head, [], [], [], []
        read: list[Tensor] = []  # which rows the regression on states sees
        frozen = not model.gates.command_is_read
        if not frozen:
            last_states = found = None
        fresh: list[tuple[PrefixStore, bytes, Tensor]] = []
        with model.without_gates() if frozen else nullcontext(), _filling(last_states), _filling(found):
            for batch in batches:
                prompts.append((batch.tokens, batch.mask))  # without answers, which would tell the labels
                labels.append(batch.labels)
                weights.append(self.class_weights.cpu()[batch.labels] * batch.weights)
                read.append(short := batch.path.sum(1) <= (head.spec.longest or math.inf))
                if short.any():
                    rows = (batch.tokens[short], batch.mask[short], batch.position[short])
                    columns.append(self._read_where_decided(*rows, last_states, found, fresh))
            for store, key, row in fresh:  # not before: a prompt that comes twice is read twice, as without a store
                store.put(key, row)
        if not columns:
            raise DataError(f"head.longest={head.spec.longest}: every training row is longer, so the head has none to begin on")
        features, label, weight, seen = (torch.cat(parts) for parts in (columns, labels, weights, read))
        if head.spec.standardise:
            head.standardise(features)
        if not head.spec.probe:
            return
        counted = weight > 0
        if min(len(set(label[rows].tolist())) for rows in (counted, counted & seen)) < len(LABELS):
            log.warning(
                "the head begins with small random weights: its %d rows lack a label, so no probe and no words were fitted",
                int((counted & seen).sum()),
            )
            return

        def fit(features: Any, rows: Tensor, c: float) -> Linear:  # noqa: ANN401  (a matrix, dense or sparse)
            return fit_linear(features, label[rows].tolist(), c=c, weights=weight[rows].double().numpy())

        turned = (features[counted[seen]] - head.shift.cpu()) * head.scale.cpu()
        fitted = fit(turned.numpy(), counted & seen, head.spec.probe)
        head.begin_with(torch.from_numpy(fitted.weights), torch.from_numpy(fitted.bias))
        if head.words is not None:
            head.words.learn_tokens(model.base.tokenizer)
            fitted = fit(head.words.measure(prompts)[counted.numpy()], counted, STRENGTH)
            head.words.begin_with(torch.from_numpy(fitted.weights), torch.from_numpy(fitted.bias))

    def _read_where_decided(
        self,
        tokens: Tensor,
        mask: Tensor,
        position: Tensor,
        last_states: PrefixStore | None,
        found: PrefixStore | None,
        fresh: list[tuple[PrefixStore, bytes, Tensor]],
    ) -> Tensor:
        """What the head reads at each row's decision, `[B, features]` on the host. What `found` or `last_states`, the states
        there, lack is appended to `fresh`."""
        keys = [row_key(row[there.bool()]) for row, there in zip(tokens, mask, strict=True)]
        stores = [store for store in (last_states, found) if store is not None]
        todo = [i for i, key in enumerate(keys) if found is None or any(key not in store for store in stores)]
        rows: dict[int, Tensor] = {}
        if todo:
            tokens, mask, position = (x[todo].to(self.model.base.device) for x in (tokens, mask, position))
            state, reads = self.model.trunk(self.cache.prefix(tokens, mask), mask, lead=shared_lead(tokens, mask))
            features = self.model.head.features_at(reads, mask, position).cpu()
            rows = dict(zip(todo, features, strict=True))
            for store, kept in ((last_states, at_position(state, position).cpu()), (found, features)):
                if store is not None:
                    fresh += [(store, keys[i], row[None]) for i, row in zip(todo, kept, strict=True)]
        return torch.stack([found.get(key)[0] if found is not None and key in found else rows[i] for i, key in enumerate(keys)])

    @property
    def progress(self) -> float:
        """How much of the planned optimiser steps is done, 0 to 1."""
        return min(1.0, self.global_step / max(1, self.total_steps))

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    def loss_terms(self, batch: Batch, output: SafetyOutput, progress: float) -> LossTerms:
        """All weighted terms of one step."""
        spec, pet = self.loss_spec, self.pet_spec
        logits = at_position(output.logits, batch.position)
        terms = LossTerms()
        terms.add(
            "safety",
            safety_loss(
                logits,
                batch.labels,
                class_weights=self.class_weights,
                focal_gamma=spec.focal_gamma,
                row_weights=batch.weights,
                smoothing=spec.label_smoothing,
            ),
            spec.safety_weight,
        )
        if spec.path_weight:
            along = path_loss(
                output.logits, batch.labels, batch.path, class_weights=self.class_weights, row_weights=batch.weights
            )
            terms.add("path", along, spec.path_weight)
        if spec.cost_weight:
            terms.add("cost", expected_cost(logits, batch.labels, self.costs, row_weights=batch.weights), spec.cost_weight)
        if spec.task_weight and batch.task is not None:
            terms.add("task", self.task_loss(batch.task)[0], spec.task_weight)
        weight = pet.weight * pet.factor(progress)
        if weight:
            path = centred(output.logits) if pet.target == "logits" else output.safe_view
            terms.add_capped("pet", temporal_consistency(path, batch.path, pet.penalty), weight, pet.max_share)
        # after PET: inertia knows R_cmd, and a cap that saw it would let the task text reach the safety side
        if pet.inertia_weight and next(self.model.gates.rotations(), None) is not None:
            terms.add("inertia", self.inertia(self.model.gates), pet.inertia_weight)
        return terms

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch: the total loss, every term and its share logged."""
        with self.model.gates_computed_once():
            terms = self.loss_terms(batch, self(batch), self.progress)
        total = terms.total()
        if not torch.isfinite(total):
            names = {name: float(v.detach()) for name, v in terms.terms.items()}
            raise ConfigError(f"the loss is not finite at step {self.global_step}: {names}; lower optim.gate_lr or head_lr")
        size = batch.labels.shape[0]
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=size)
        self.log_dict({f"train/{n}": v.detach() for n, v in terms.terms.items()}, batch_size=size)
        self.log_dict({f"train/share_{n}": v for n, v in terms.shares().items()}, batch_size=size)
        self.log("train/pet_phase", self.pet_spec.factor(self.progress), batch_size=size)
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """One optimiser step; afterwards the inertia's averages follow the rotations."""
        super().optimizer_step(*args, **kwargs)
        with self.model.gates.computed_once():
            self.inertia.update(self.model.gates)

    # -- validation ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the metrics, its loss included, of what is decided: words and states."""
        output = self(batch)
        decisions = self.model.decide(output, batch.position)
        self.val_metrics.update(decisions.probabilities, decisions.labels, batch.labels, decisions.failed, decisions.unsure)
        steadiness, changes = flicker(self.model.smoothed_logits(output, batch.path), batch.path)
        self.means["flicker"].update(steadiness[~steadiness.isnan()])
        self.means["decision_changes"].update(changes[~changes.isnan()])
        logits = at_position(output.logits, batch.position)
        good = ~decisions.failed
        if good.any():
            loss = safety_loss(logits[good], batch.labels[good], class_weights=self.class_weights)
            self.means["loss"].update(loss, weight=int(good.sum()))
        if batch.task is not None and self.loss_spec.task_weight:
            loss, count = self.task_loss(batch.task)
            if count:
                self.means["lm"].update(loss, weight=count)

    def _results(self) -> dict[str, float]:
        means = {kind: self.means[kind].compute() for kind in self.means if self.means[kind].update_called}
        if "lm" in means:
            means["task_perplexity"] = means.pop("lm").exp()
        return self.val_metrics.compute() | {name: float(mean) for name, mean in means.items()}

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self.log_dict({f"val/{name}": value for name, value in self._results().items()})
        self.val_metrics.reset()
        for kind in self.means:
            self.means[kind].reset()

    # -- optimisation --------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by clip group. The task side is clipped on its own, or its norm would leak into the
        safety side."""
        return {
            "gates_safe": self.model.gates.safety_parameters(),
            "gates_cmd": self.model.gates.command_parameters(),
            "head": list(self.model.head.parameters()),
        }

    def make_optimizer(self) -> torch.optim.AdamW:
        """AdamW with two groups: gates, safety head."""
        spec, groups = self.optim_spec, self.parameter_groups()
        wanted = [
            {"name": "gates", "params": groups["gates_safe"] + groups["gates_cmd"], "lr": spec.gate_lr},
            {"name": "head", "params": groups["head"], "lr": spec.head_lr},
        ]
        wanted = [
            {**group, "weight_decay": spec.weight_decay if group["name"] == "head" else spec.gate_weight_decay}
            for group in wanted
            if group["params"]
        ]
        return torch.optim.AdamW(wanted, betas=spec.betas)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a cosine schedule with warm-up, per optimiser step."""
        spec, optimizer = self.optim_spec, self.make_optimizer()
        schedule = cosine_with_warmup(optimizer, warmup=spec.warmup_steps, total=self.total_steps, floor=spec.final_lr_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each group's norm by itself, and logs the norms before clipping."""
        for name, parameters in self.parameter_groups().items():
            if parameters and self.optim_spec.clip:
                norm = nn.utils.clip_grad_norm_(parameters, self.optim_spec.clip)
                self.log(f"grad_norm/{name}", norm)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]  # noqa: ANN401
        """Gates, head and inertia averages only: a megabyte or two, whatever the base."""
        state: dict[str, Tensor] = {}
        for name, module in (("model.gates", self.model.gates), ("model.head", self.model.head), ("inertia", self.inertia)):
            state.update(module.state_dict(prefix=f"{name}."))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Loads what `state_dict` gave.

        Raises:
            ArtefactError: the checkpoint is of other gates, another head or another base size.
        """
        own = self.state_dict()
        state_dict = {"model.head.limit": torch.tensor(math.inf), **state_dict}  # checkpoints from before it had one
        if own.keys() != state_dict.keys():
            odd = sorted(own.keys() ^ state_dict.keys())[:4]
            raise ArtefactError(f"the checkpoint does not fit this model: {', '.join(odd)}, ... differ (gate or head settings)")
        for name, tensor in own.items():
            if tensor.shape != state_dict[name].shape:
                raise ArtefactError(
                    f"the checkpoint does not fit: {name} is {tuple(state_dict[name].shape)}, expected {tuple(tensor.shape)}"
                )
            with torch.no_grad():
                tensor.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Labels travel with every artefact; the random state, so that dropout goes on where it was."""
        checkpoint["so8t_labels"] = list(LABELS)
        checkpoint["so8t_random_state"] = torch.get_rng_state()
        if self.device.type == "cuda":
            checkpoint["so8t_cuda_random_state"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint whose labels have another order."""
        if tuple(checkpoint.get("so8t_labels", ())) != LABELS:
            raise ArtefactError(f"the checkpoint's labels are {checkpoint.get('so8t_labels')}, expected {list(LABELS)}")
        self._random_state = checkpoint.get("so8t_random_state"), checkpoint.get("so8t_cuda_random_state")

    def on_train_start(self) -> None:
        """A resumed run draws the numbers that the interrupted one would have drawn."""
        cpu, cuda = self._random_state
        if cpu is not None:
            torch.set_rng_state(cpu.cpu())
        if cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda.cpu(), self.device)


def _filling(store: PrefixStore | None) -> AbstractContextManager[None]:
    return nullcontext() if store is None else store.filling()


def _class_weights(loss: LossSpec, counts: tuple[int, ...]) -> Tensor:
    n = len(LABELS)
    if loss.class_weights is None:
        return torch.ones(n)
    if loss.class_weights == "balanced":
        filled = torch.tensor([max(1, c) for c in counts], dtype=torch.float32)
        return filled.sum() / (n * filled)
    if len(loss.class_weights) != n:
        raise ConfigError(f"loss.class_weights must be {n} numbers, in the order {LABELS}")
    return torch.tensor([float(w) for w in loss.class_weights])


__all__ = ["IGNORE", "LossSpec", "SO8TModule"]
