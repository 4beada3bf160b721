"""What `+hw=rtx3060` does to a step, on the CPU: bfloat16 activations, and a suffix that is run again in the backward pass."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from so8t.base import load_base, weights_digest
from so8t.data.datamodule import Batch, TaskBatch, pad_rows
from so8t.gates import GateSpec
from so8t.lightning_module import LossSpec, SO8TModule
from so8t.losses import IGNORE, LossTerms
from so8t.model import HeadSpec, SO8TModel
from so8t.optim import OptimSpec
from so8t.pet import PetSpec
from tests.conftest import TINY

LAYERS = 2
"""Above the cut."""


def ready(dtype: str, dense_gib: float = 0.0) -> SO8TModule:
    """Ready to train on the random base in NF4: two rotations at every site, of a visible size, a head that reads a layer on
    either side of the cut, and losses that all go through the suffix."""
    base = load_base(replace(TINY, compute_dtype=dtype, dense_gib=dense_gib), cut=LAYERS)
    torch.manual_seed(0)
    gate = GateSpec(top_layers=LAYERS, interior="both", init_std=0.3)
    model = SO8TModel(base, gate, HeadSpec(reads=(0.25, 0.75, "last")))
    torch.nn.init.normal_(model.head.linear.weight, std=0.1)
    loss, pet = LossSpec(task_reaches="all"), PetSpec(target="hidden")
    return SO8TModule(model, loss, pet, OptimSpec(), class_counts=(1, 1, 1)).train()


def batch(lead: int) -> Batch:
    """Three rows of different lengths that begin with the same `lead` tokens."""
    rows = [[*range(9, 9 + lead), *range(20 + 30 * k, 30 + 30 * k - 2 * k)] for k in range(3)]
    tokens, mask = pad_rows(rows, 0)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, 2:5] = 7
    kind = torch.arange(3)
    return Batch(tokens, mask, mask.bool(), mask.sum(1) - 1, kind, torch.ones(3), kind, TaskBatch(tokens, mask, targets))


def stepped(module: SO8TModule, *, again: bool, lead: int) -> tuple[LossTerms, dict[str, torch.Tensor]]:
    """The terms of one micro-batch and the gradient of each parameter, as a training step of the project has them."""
    module.model.base.checkpoint_suffix = again
    module.zero_grad()
    rows = batch(lead)
    with module.model.gates_computed_once():
        terms = module.loss_terms(rows, module(rows), progress=1.0)
    terms.total().backward()
    return terms, {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_suffix_that_is_run_again_gives_the_same_bits(monkeypatch, dtype):
    """Gates that turn in place what was run again included."""
    # one batched map for all gates rounds otherwise than one map each, and where layers are run again there is only the latter
    monkeypatch.setattr(SO8TModel, "gates_computed_once", lambda _: nullcontext())
    module, runs = ready(dtype), Counter()
    for layer in module.model.base.suffix_layers:
        layer.register_forward_pre_hook(lambda *_: runs.update(["layer"]))
    for gate in module.model.gates.interior.values():
        gate.register_forward_pre_hook(lambda *_: runs.update(["gate"]))
    kept, gradients = stepped(module, again=False, lead=0)
    assert runs == {"layer": 2 * LAYERS, "gate": 4 * LAYERS}, "the request, and the answer"
    runs.clear()
    recomputed, others = stepped(module, again=True, lead=0)
    assert runs == {"layer": 4 * LAYERS, "gate": 8 * LAYERS}, "and each once more"
    assert kept.terms.keys() == recomputed.terms.keys() == {"safety", "cost", "task", "pet", "inertia"}
    for name, term in kept.terms.items():
        assert torch.equal(term, recomputed.terms[name]), name
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, others[name]), name


@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-5), ("bfloat16", 2**-6)])
def test_a_step_of_a_checkpointed_suffix_differs_by_rounding_from_one_that_reads_the_lead_once(dtype, bar):
    """The two as they run in training: with all maps at once and the lead as one row, and with neither."""
    module = ready(dtype)
    (kept, gradients), (recomputed, others) = (stepped(module, again=again, lead=3) for again in (False, True))
    assert float(recomputed.total().detach()) == pytest.approx(float(kept.total().detach()), rel=bar)
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() < bar * gradient.norm(), name


@pytest.mark.parametrize(("again", "dense_gib"), [(True, 0.0), (False, 0.5)])
def test_a_step_with_bfloat16_activations_moves_every_group_and_no_bit_of_the_base(again, dense_gib):
    module = ready("bfloat16", dense_gib)
    base = module.model.base
    linears = [m for m in base.modules() if isinstance(m, Linear4bit)]
    assert len(linears) == 4 * 7
    assert {m.compute_dtype for m in linears} == {torch.bfloat16}
    assert {m.dense.dtype for m in linears if hasattr(m, "dense")} == ({torch.bfloat16} if dense_gib else set())
    seen = []
    for layer in base.decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    digest, optimizer = weights_digest(base), module.make_optimizer()
    terms, gradients = stepped(module, again=again, lead=3)
    assert set(seen) == {torch.bfloat16}
    assert all(term.isfinite() for term in terms.terms.values()), terms.terms
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    before = {name: [p.detach().clone() for p in group] for name, group in module.parameter_groups().items()}
    optimizer.step()
    for name, group in module.parameter_groups().items():
        assert group, name
        for parameter, old in zip(group, before[name], strict=True):
            assert parameter.grad.abs().max() > 0, name
            assert parameter.dtype == torch.float32, "what is trained is kept in full"
            assert not torch.equal(parameter, old), name
    assert weights_digest(base) == digest
    figures = module.model.gates.invariants()
    assert max(f["orthogonality"] for f in figures.values() if "orthogonality" in f) < 1e-12
