"""Gates in a base: attached without touching it, in SO(8), in the right order, and nothing absorbed."""

import copy
from dataclasses import replace

import pytest
import torch

from so8t.base import identity, load_base, stored_tensors
from so8t.errors import BaseModelError, ConfigError, GroupError
from so8t.gates import GateSet, GateSpec, InteriorGate, NonCommutativeGate, Rotation
from so8t.model import HeadSpec, SO8TModel, at_position
from so8t.so8 import rotate
from tests.conftest import TINY

TOKENS = torch.tensor([[5, 17, 40, 33, 90, 12, 7, 61]])
MASK = torch.ones_like(TOKENS)


def turned(model: SO8TModel, only: str | None = None, size: float = 0.5) -> None:
    """Gives rotations coordinates of a visible size."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, rotation in model.gates.rotations():
            if only is None or only in name:
                rotation.coords.copy_(torch.randn_like(rotation.coords) * size)


def decide(model: SO8TModel, tokens=TOKENS, mask=MASK) -> torch.Tensor:
    with torch.no_grad():
        return model(model.prefix(tokens, mask), tokens, mask).logits


@pytest.mark.parametrize("blocks", ["independent", "shared", "leading"])
@pytest.mark.parametrize("map_name", ["exp", "cayley"])
def test_every_kind_of_rotation_keeps_norms_and_starts_near_the_identity(blocks, map_name):
    torch.manual_seed(0)
    spec = GateSpec(blocks=blocks, map=map_name)
    rotation = Rotation(64, spec)
    assert rotation.coords.numel() == 28 * (8 if blocks == "independent" else 1)
    assert (rotation.coords != 0).all(), "at exactly 0 the pair would commute"
    x = torch.randn(2, 3, 64)
    assert torch.allclose(rotation(x), x, atol=0.05)
    with torch.no_grad():
        rotation.coords.normal_(std=1.0)
    y = rotation(x)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    if blocks == "leading":
        assert torch.equal(y[..., 8:], x[..., 8:])
        assert not torch.allclose(y[..., :8], x[..., :8])
    else:
        assert not torch.allclose(y[..., 8:16], x[..., 8:16])


def test_the_pair_is_safe_first_then_command_with_the_tap_between():
    torch.manual_seed(0)
    gate = NonCommutativeGate(16, GateSpec())
    with torch.no_grad():
        for rotation in (gate.safe, gate.cmd):
            rotation.coords.normal_()
    x = torch.randn(3, 16)
    tap, out = gate(x)
    assert torch.allclose(tap, rotate(x, gate.safe.matrix()))
    assert torch.allclose(out, rotate(rotate(x, gate.safe.matrix()), gate.cmd.matrix()))
    swapped = rotate(rotate(x, gate.cmd.matrix()), gate.safe.matrix())
    assert (swapped - out).abs().max() > 0.1


def test_no_option_swaps_the_order():
    import dataclasses

    assert {f.name for f in dataclasses.fields(GateSpec)} == {
        "interior", "last", "top_layers", "sites", "blocks", "map", "init_std", "triality",
    }  # fmt: skip


@pytest.mark.parametrize("interior", ["safe", "both", "none"])
@pytest.mark.parametrize("sites", [("o_proj",), ("o_proj", "down_proj")])
def test_gates_sit_where_the_settings_say(tiny_base, interior, sites):
    gates = GateSet(GateSpec(interior=interior, sites=sites, top_layers=2), tiny_base)
    expected = set() if interior == "none" else {f"{layer}_{site}" for layer in (2, 3) for site in sites}
    assert set(gates.interior) == expected
    assert all((gate.cmd is not None) == (interior == "both") for gate in gates.interior.values())


def test_an_unknown_site_is_refused(tiny_base):
    with pytest.raises(ConfigError, match=r"gate\.sites"):
        GateSet(GateSpec(sites=("q_proj",), top_layers=2), tiny_base)


def test_detaching_restores_the_base_bit_for_bit():
    base = load_base(TINY, cut=2)
    tensors = {name: t.clone() for name, t in stored_tensors(base)}
    with torch.no_grad():
        before = base.causal_lm(input_ids=TOKENS).logits
        hidden = base.suffix(base.prefix(TOKENS, MASK), MASK)[0]
    hooks = sum(len(m._forward_hooks) for m in base.modules())
    model = SO8TModel(base, GateSpec(top_layers=2), HeadSpec())
    turned(model)
    with torch.no_grad():
        assert not torch.equal(base.suffix(base.prefix(TOKENS, MASK), MASK)[0], hidden), "the gates act"
    model.gates.detach()
    with torch.no_grad():
        assert torch.equal(base.causal_lm(input_ids=TOKENS).logits, before)
        assert torch.equal(base.suffix(base.prefix(TOKENS, MASK), MASK)[0], hidden)
    assert sum(len(m._forward_hooks) for m in base.modules()) == hooks
    assert all(torch.equal(t, tensors[name]) for name, t in stored_tensors(base))


def test_attaching_twice_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="attached already"):
        tiny_model.gates.attach(tiny_model.base)


def test_inside_without_gates_the_base_is_plain_and_afterwards_gated_again(tiny_model):
    turned(tiny_model)
    gated = decide(tiny_model)
    with tiny_model.without_gates():
        assert not tiny_model.gates.attached
        plain = tiny_model.base.suffix(tiny_model.base.prefix(TOKENS, MASK), MASK)[0]
    assert tiny_model.gates.attached
    assert torch.equal(decide(tiny_model), gated)
    assert not torch.equal(plain, tiny_model.base.suffix(tiny_model.base.prefix(TOKENS, MASK), MASK)[0])


@pytest.mark.parametrize("name", ["interior.2_o_proj.safe", "interior.3_down_proj.safe", "last.safe"])
def test_safety_logits_change_when_a_safe_rotation_changes(tiny_model, name):
    before = decide(tiny_model)
    turned(tiny_model, name)
    assert (decide(tiny_model) - before).abs().max() > 1e-6


def test_safety_logits_do_not_change_when_only_the_command_side_does(tiny_model):
    before = decide(tiny_model)
    with torch.no_grad():
        safe = tiny_model(tiny_model.base.prefix(TOKENS, MASK), TOKENS, MASK).safe_view
        task = tiny_model.task_logits(safe)
    turned(tiny_model, "last.cmd")
    assert torch.equal(decide(tiny_model), before)
    with torch.no_grad():
        assert (tiny_model.task_logits(safe) - task).abs().max() > 1e-6


def test_the_task_path_of_generate_is_the_task_path_of_training(tiny_model):
    turned(tiny_model)
    base = tiny_model.base
    with torch.no_grad():
        ours = tiny_model.task_logits(tiny_model(base.prefix(TOKENS, MASK), TOKENS, MASK).safe_view)
        with tiny_model.task_path():
            theirs = base.causal_lm(input_ids=TOKENS).logits
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert not torch.allclose(base.causal_lm(input_ids=TOKENS).logits, theirs, atol=1e-3), "the hook is gone"


def test_two_rotations_with_nothing_between_them_are_one():
    torch.manual_seed(0)
    pair = InteriorGate(16, GateSpec(interior="both"))
    one = copy.deepcopy(pair)
    one.cmd = None
    x = torch.randn(4, 16)
    product = pair.cmd.matrix() @ pair.safe.matrix()
    assert torch.allclose(pair(x.clone()), rotate(x, product), atol=1e-6), "which is why the last pair has a tap"


def test_a_gate_before_a_trainable_linear_layer_is_absorbed_by_it():
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    rotation = torch.linalg.matrix_exp(torch.randn(2, 8, 8, dtype=torch.float64).triu(1) * 0.5)
    rotation = torch.linalg.qr(rotation)[0]
    head = torch.nn.Linear(16, 3)
    absorbed = head.weight @ torch.block_diag(*rotation.float())
    assert torch.allclose(head(rotate(x, rotation)), x @ absorbed.T + head.bias, atol=1e-5)


def test_invariants_name_every_gate_and_the_pairs_commutator(tiny_model):
    table = tiny_model.gates.invariants()
    assert set(table) == {name for name, _ in tiny_model.gates.rotations()} | {"last"}
    assert table["last"]["commutator"] > 0
    assert table["last.safe"]["orthogonality"] < 1e-12


def test_a_base_whose_hidden_size_is_not_a_multiple_of_eight_is_refused():
    with pytest.raises(GroupError, match="hidden size 60 is not a multiple of 8"):
        load_base(replace(TINY, hidden_size=60), cut=2)


def test_a_base_is_the_same_whatever_its_compute_dtype_and_head_and_another_one_is_not():
    plain = identity(load_base(TINY, cut=2))
    assert plain == identity(load_base(TINY, cut=1)), "the cut is no part of it"
    in_bf16 = identity(load_base(replace(TINY, compute_dtype="bfloat16"), cut=2))
    with_head = identity(load_base(replace(TINY, quantize_head=True), cut=2))
    assert plain["unquantized"] == in_bf16["unquantized"] == with_head["unquantized"]
    assert plain["quantized"] == with_head["quantized"]
    other = identity(load_base(replace(TINY, seed=1), cut=2))
    assert other["unquantized"] != plain["unquantized"]
    assert other["quantized"] != plain["quantized"]
    coarser = identity(load_base(replace(TINY, double_quantization=False), cut=2))
    assert coarser["unquantized"] == plain["unquantized"]
    assert coarser["quantized"] != plain["quantized"]


def test_more_layers_than_the_base_has_are_refused():
    with pytest.raises(BaseModelError, match=r"gate\.top_layers=9: tiny has 4 layers"):
        load_base(TINY, cut=9)


@pytest.mark.parametrize("pooling", ["token", "mean", "both"])
@pytest.mark.parametrize("reads", [("last",), (0.25, 0.5, 0.75, "last")])
def test_decisions_do_not_depend_on_padding_or_on_the_rest_of_the_batch(tiny_base, pooling, reads):
    torch.manual_seed(0)
    model = SO8TModel(tiny_base, GateSpec(top_layers=2), HeadSpec(reads=reads, pooling=pooling))
    turned(model)
    n = TOKENS.shape[1]
    alone = at_position(decide(model), torch.tensor([n - 1]))[0]
    longer = torch.randint(4, 200, (1, n + 9))
    for left in (0, 4, 9):
        tokens, mask = torch.zeros(2, n + 9, dtype=torch.long), torch.zeros(2, n + 9, dtype=torch.long)
        tokens[0, left : left + n], mask[0, left : left + n] = TOKENS[0], 1
        tokens[1], mask[1] = longer[0], 1
        logits = decide(model, tokens, mask)
        assert torch.allclose(at_position(logits, torch.tensor([left + n - 1, 0]))[0], alone, atol=2e-5), left


def test_later_tokens_do_not_change_earlier_logits(tiny_base):
    model = SO8TModel(tiny_base, GateSpec(top_layers=2), HeadSpec(reads=(0.25, 0.5, "last"), pooling="both"))
    whole = decide(model)
    part = decide(model, TOKENS[:, :5], MASK[:, :5])
    assert torch.allclose(whole[:, :5], part, atol=1e-5)


def test_a_layer_without_the_projection_that_a_gate_wants_is_told(tiny_base):
    del tiny_base.decoder.layers[-1].mlp.down_proj  # as in a mixture of experts
    with pytest.raises(BaseModelError, match=r"layer 3 has no mlp\.down_proj.*leave it out of gate\.sites"):
        GateSet(GateSpec(top_layers=2), tiny_base)
    assert len(GateSet(GateSpec(top_layers=2, sites=("o_proj",)), tiny_base).interior) == 2
