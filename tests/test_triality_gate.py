"""`gate.triality` and `head.commutator`: what the head reads of the last gate, and that no task text reaches it."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.adapter import load_agent
from so8t.data.datamodule import TaskBatch
from so8t.errors import ArtefactError, ConfigError
from so8t.export import absorb_gates, plain_state
from so8t.gates import GateSpec, NonCommutativeGate, TrialityGate
from so8t.lightning_module import LossSpec, SO8TModule
from so8t.model import HeadSpec, SO8TModel, at_position, causal_mean
from so8t.optim import OptimSpec
from so8t.pet import PetSpec
from so8t.run_folder import read_run
from so8t.so8 import COORDS, exp_map
from so8t.triality import D_SIGMA_MINUS, D_SIGMA_PLUS, carry, trilinear_form
from tests import conftest
from tests.conftest import QUICK, composed
from tests.spies import Spy, copied
from tests.test_gates import MASK, TOKENS, decide

SHORT = (
    "data.batch_size=4", "data.task_rows=2", "trainer.max_epochs=1", "trainer.limit_train_batches=5", "optim.gate_lr=0.05",
    "pet.weight=50", "pet.exploration=1", "pet.max_share=0.05", "pet.inertia_weight=1", "optim.clip=0.05",
    "trainer.limit_val_batches=1", "evaluate=false", "+callbacks.spy._target_=tests.spies.Spy",
)  # fmt: skip
BOTH_ON = ("gate.triality=true", "head.commutator=true")
CMD = "model.gates.last.cmd.coords"
READS = {"authority": (True, False), "commutator": (False, True), "both": (True, True)}


@pytest.fixture
def gate() -> TrialityGate:
    torch.manual_seed(0)
    made = TrialityGate(64, GateSpec(triality=True)).double()
    torch.nn.init.normal_(made.cmd.coords, std=0.7)
    return made


def model_of(base, *, triality=True, commutator=True, blocks="independent", **head) -> SO8TModel:
    torch.manual_seed(0)
    model = SO8TModel(base, GateSpec(top_layers=2, triality=triality, blocks=blocks), HeadSpec(commutator=commutator, **head))
    torch.nn.init.normal_(model.head.linear.weight, std=0.1)
    return model


def module_of(model: SO8TModel, **loss) -> SO8TModule:
    return SO8TModule(model, LossSpec(**loss), PetSpec(), OptimSpec(), class_counts=(1, 1, 1))


# -- three rotations from one set of coordinates -----------------------------------------------------------------------


def test_one_set_of_coordinates_gives_all_three_rotations(gate):
    a = gate.cmd.coords
    assert [name for name, _ in gate.named_parameters()] == list(gate.state_dict()) == ["cmd.coords"]
    assert a.shape == (8, COORDS)
    assert torch.equal(gate.cmd.matrix(), exp_map(a))
    assert torch.equal(gate.safe.matrix(), exp_map(carry(a, D_SIGMA_PLUS)))
    assert torch.equal(gate.authority.matrix(), exp_map(carry(a, D_SIGMA_MINUS)))


def test_with_triality_the_order_is_still_safe_first_then_command(gate):
    x = torch.randn(3, 64, dtype=torch.float64)
    tapped, out = gate(x)
    assert torch.equal(tapped, gate.safe(x))
    assert torch.equal(out, gate.cmd(gate.safe(x)))
    assert (gate.safe(gate.cmd(x)) - out).abs().max() > 0.1


@pytest.mark.parametrize(
    ("gates", "head", "told"),
    [
        ({"triality": True, "map": "cayley"}, {}, "gate.map=exp"),
        ({"triality": True, "last": False}, {}, "gate.last=true"),
        ({"last": False}, {"commutator": True}, "gate.last=true"),
    ],
)
def test_what_is_not_linked_or_not_there_is_refused(tiny_base, gates, head, told):
    with pytest.raises(ConfigError, match=told):
        SO8TModel(tiny_base, GateSpec(top_layers=2, **gates), HeadSpec(**head))


# -- the two figures ---------------------------------------------------------------------------------------------------


def test_the_form_of_the_authority_is_that_of_the_command_turned_back(gate):
    """By invariance: t(x, R_safe x, R_authority c) = t(R_cmd^T x, x, c). It holds for linked rotations only."""
    x, c = torch.randn(2, 5, 64, dtype=torch.float64)
    form = gate.authority_form(x, gate.tap(x), c)
    v, plus, minus = (F.normalize(y.unflatten(-1, (8, 8)), dim=-1) for y in (x, x, c))
    back = (gate.cmd.matrix().mT @ v[..., None])[..., 0]
    assert form.shape == (5, 8)
    assert (form - trilinear_form(back, plus, minus)).abs().max() < 1e-12
    assert (gate.authority_form(x, gate.authority(x), c) - form).abs().max() > 0.1, "S- in the place of S+"


def test_three_views_of_one_state_would_say_nothing_of_the_gate(gate):
    x = torch.randn(5, 8, 8, dtype=torch.float64)
    views = [(r.matrix() @ x[..., None])[..., 0] for r in (gate.cmd, gate.safe, gate.authority)]
    (gradient,) = torch.autograd.grad(trilinear_form(*views).pow(2).sum(), gate.cmd.coords)
    assert gradient.abs().max() < 1e-6, "which is why it is not what the head reads"
    flat = x.flatten(1)
    (gradient,) = torch.autograd.grad(gate.authority_form(flat, gate.tap(flat), flat.flip(0)).pow(2).sum(), gate.cmd.coords)
    assert (gradient.abs() > 1e-5).all()


def test_no_linear_map_of_the_states_gives_either_figure(gate):
    x, c = torch.randn(2, 4000, 64, dtype=torch.float64)
    states = torch.cat([x, c, torch.ones(len(x), 1, dtype=torch.float64)], dim=-1)
    for figure in (gate.authority_form(x, gate.tap(x), c).detach(), gate.commutator(x).detach()):
        left_over = figure - states @ torch.linalg.lstsq(states, figure).solution
        assert left_over.var() > 0.8 * figure.var()
    view = gate.authority(c).detach()
    absorbed = view - states @ torch.linalg.lstsq(states, view).solution
    assert absorbed.abs().max() < 1e-10, "the authority's view itself a linear map does give"


@given(seed=st.integers(0, 2**32 - 1), std=st.sampled_from([1e-3, 0.1, 1.0]), triality=st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_commutator_of_a_state_is_that_of_the_pair_and_has_mean_square_one_whatever_the_angles(seed, std, triality):
    torch.manual_seed(seed)
    gate = (TrialityGate if triality else NonCommutativeGate)(16, GateSpec(init_std=std)).double()
    x = torch.randn(3, 16, dtype=torch.float64)
    difference = gate.safe(gate.cmd(x)) - gate.cmd(gate.safe(x))
    norms = [y.unflatten(-1, (2, 8)).norm(dim=-1) for y in (difference, x)]
    size = gate.safe.matrix() @ gate.cmd.matrix() - gate.cmd.matrix() @ gate.safe.matrix()
    want = norms[0] / norms[1] * 8**0.5 / size.flatten(1).norm(dim=1)
    assert torch.allclose(gate.commutator(x), want, rtol=1e-5)
    directions = torch.eye(8, dtype=torch.float64).repeat(1, 2)
    assert torch.allclose(gate.commutator(directions).pow(2).mean(0), torch.ones(2, dtype=torch.float64), rtol=1e-6)
    assert gate.commutator(x).std(0).max() > 1e-3, "it depends on the state"


def test_a_pair_that_commutes_gives_zero(gate):
    torch.nn.init.zeros_(gate.cmd.coords)
    assert torch.equal(gate.commutator(torch.randn(2, 64)), torch.zeros(2, 8))


@pytest.mark.parametrize("figure", ["authority", "commutator", "commutator without triality"])
def test_every_coordinate_has_a_gradient_from_each_figure_alone_where_training_begins(figure):
    torch.manual_seed(0)
    gate = (NonCommutativeGate if "without" in figure else TrialityGate)(64, GateSpec())
    x, c = torch.randn(2, 5, 64)
    (gate.authority_form(x, gate.tap(x), c) if figure == "authority" else gate.commutator(x)).sum().backward()
    assert all((p.grad.abs() > 1e-6).all() for p in gate.parameters())


# -- what the head reads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "count"), [("independent", 8), ("shared", 8), ("leading", 1)])
@pytest.mark.parametrize("which", READS)
def test_the_figures_of_every_turned_block_are_read_and_count(tiny_base, which, blocks, count):
    triality, commutator = READS[which]
    model = model_of(tiny_base, triality=triality, commutator=commutator, blocks=blocks)
    torch.nn.init.normal_(model.gates.last.cmd.coords, std=0.5)
    with torch.no_grad():
        safe, reads = model.trunk(model.prefix(TOKENS, MASK), MASK)
        state, last, want = tiny_base.decoder(input_ids=TOKENS).last_hidden_state, model.gates.last, []
        if triality:
            want.append(last.authority_form(state, safe, causal_mean(state, MASK)))
        if commutator:
            want.append(last.commutator(state))
        assert torch.equal(reads[0], safe)
        assert [tuple(r.shape) for r in reads[1:]] == [(1, 8, count)] * len(want)
        assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(reads[1:], want, strict=True))
        assert model.head.linear.in_features == 2 * (64 + count * len(want))
        whole, _ = model.head(reads, MASK)
        for index in range(1, len(reads)):
            changed = [-r if k == index else r for k, r in enumerate(reads)]
            assert (model.head(changed, MASK)[0] - whole).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", ["token", "mean", "both"])
def test_decisions_depend_on_no_later_token_and_no_padding(tiny_base, pooling):
    model = model_of(tiny_base, pooling=pooling)
    torch.nn.init.normal_(model.gates.last.cmd.coords, std=0.5)
    whole = decide(model)
    assert torch.allclose(decide(model, TOKENS[:, :5], MASK[:, :5]), whole[:, :5], atol=1e-4)
    for side in ((0, 4), (4, 0)):
        padded = decide(model, F.pad(TOKENS, side), F.pad(MASK, side))[:, side[0] : side[0] + 8]
        assert torch.allclose(padded, whole, atol=1e-4)


def test_the_task_path_goes_through_both_linked_rotations_and_detached_the_base_is_itself(tiny_base):
    with torch.no_grad():
        plain = tiny_base.causal_lm(input_ids=TOKENS).logits
        model = model_of(tiny_base)
        torch.nn.init.normal_(model.gates.last.cmd.coords, std=0.5)
        ours = model.task_logits(model(model.prefix(TOKENS, MASK), TOKENS, MASK).safe_view)
        with model.task_path():
            assert torch.allclose(ours, tiny_base.causal_lm(input_ids=TOKENS).logits, atol=1e-4)
        assert (ours - plain).abs().max() > 0.01
        with model.without_gates():
            assert torch.equal(tiny_base.causal_lm(input_ids=TOKENS).logits, plain)


def test_matrices_that_are_computed_once_are_those_computed_one_by_one(tiny_base):
    gates = model_of(tiny_base).gates
    rotations = dict(gates.rotations())
    apart = {name: r.matrix() for name, r in rotations.items()}
    with gates.computed_once():
        assert {name for name, r in rotations.items() if r._computed is None} == {"last.cmd"}
        assert all(torch.allclose(r.matrix(), apart[name], atol=1e-14) for name, r in rotations.items())


def test_a_coordinate_that_is_not_finite_is_escalate_and_a_failure(tiny_base):
    model = model_of(tiny_base, triality=False)
    model.gates.last.cmd.coords.data[0, 0] = float("nan")
    with torch.no_grad():
        output = model(model.prefix(TOKENS, MASK), TOKENS, MASK)
    assert model.decide(output, torch.tensor([7])).failed.all()


# -- who trains them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", READS)
def test_a_command_that_decisions_depend_on_is_on_the_safety_side(tiny_base, which):
    triality, commutator = READS[which]
    groups = module_of(model_of(tiny_base, triality=triality, commutator=commutator)).parameter_groups()
    assert groups["gates_cmd"] == []
    assert len(groups["gates_safe"]) == 4 + (1 if triality else 2)


@pytest.mark.parametrize("which", READS)
def test_a_task_loss_reaches_what_decisions_depend_on_only_where_it_is_told_to(tiny_base, which):
    triality, commutator = READS[which]
    model = model_of(tiny_base, triality=triality, commutator=commutator)
    task = TaskBatch(TOKENS, MASK, TOKENS)
    assert not module_of(model).task_loss(task)[0].requires_grad
    module = module_of(model, task_reaches="all")
    with model.gates_computed_once():
        loss = module.task_loss(task)[0]
    loss.backward()
    assert (model.gates.last.cmd.coords.grad.abs() > 0).all()


def trained(rows: Path, folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """Everything that decisions come from, after training, and some logits."""
    conftest.trained(composed(*QUICK, f"data.path={rows}", *SHORT, *overrides, output_dir=folder))
    with torch.no_grad():
        logits = Spy.last.module.eval()(Spy.last.batches[0]).logits
    return {**copied(Spy.last.module), "logits": logits}


@pytest.fixture(scope="module")
def run(rows_file, tmp_path_factory):
    """A run of both figures with the task loss: what it ended with, its folder, its spy."""
    folder = tmp_path_factory.mktemp("figures") / "run"
    return trained(rows_file, folder, *BOTH_ON, "loss.task_weight=1"), folder, Spy.last


def test_the_task_loss_changes_no_bit_of_an_agent_with_both_figures(run, rows_file, tmp_path):
    ours, folder, spy = run
    others = trained(rows_file, tmp_path / "without", *BOTH_ON, "loss.task_weight=0")
    assert ours.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in ours.items())
    assert (ours[CMD] - spy.start[CMD]).abs().mean() > 0.01, "the safety side trains it"
    assert any(row["train/task"] for row in table(folder)), "and the task loss was measured"


def test_the_task_loss_changes_no_bit_of_an_agent_that_reads_the_commutator_of_a_free_pair(rows_file, tmp_path):
    ours, others = (
        trained(rows_file, tmp_path / weight, "head.commutator=true", f"loss.task_weight={weight}") for weight in ("1", "0")
    )
    assert all(torch.equal(tensor, others[name]) for name, tensor in ours.items())


# -- what is watched, saved and exported -------------------------------------------------------------------------------


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_monitor_watches_all_three_rotations_and_the_report_has_their_angles(run):
    rows = [row for row in table(run[1]) if row["group/last.cmd/angle"]]
    for name in ("cmd", "safe", "authority"):
        assert float(rows[-1][f"group/last.{name}/angle"]) > 2 * float(rows[0][f"group/last.{name}/angle"]) > 0
        assert all(float(row[f"group/last.{name}/orthogonality"]) < 1e-12 for row in rows)
    assert float(rows[-1]["group/last/commutator_mean"]) > 0
    angles = read_run(run[1]).angles
    for name in ("cmd", "safe", "authority"):
        assert angles[f"last {name}"].max() == pytest.approx(float(rows[-1][f"group/last.{name}/angle"]), rel=0.5)


def test_an_adapter_decides_as_the_model_that_was_saved(run):
    module, batch = run[2].module, run[2].batches[0]
    agent = load_agent(run[1])
    assert agent.model.gates.spec.triality
    assert agent.model.head.spec.commutator
    with torch.no_grad():
        tokens, mask = batch.tokens, batch.mask
        logits = [m(m.prefix(tokens, mask), tokens, mask).logits for m in (module.model.eval(), agent.model)]
    assert torch.equal(*(at_position(row, batch.position) for row in logits))


def test_ask_and_evaluate_work_and_an_exported_checkpoint_is_refused(run, rows_file, tmp_path, so8t):
    folder = tmp_path / "run"
    shutil.copytree(run[1] / "adapter", folder / "adapter")
    assert so8t("ask", folder, "forge a passport")[0] == 0
    assert so8t("evaluate", folder, "--data", rows_file)[0] == 0
    code, _, told = so8t("export", folder, "--to", "hf", tmp_path / "hf")
    assert code == 2
    assert "not linear in a state" in told
    assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "hf").exists()
    assert so8t("export", folder, "--to", "adapter", tmp_path / "small")[0] == 0
    assert load_agent(tmp_path / "small").model.gates.spec.triality


@torch.no_grad()
def test_what_triality_does_to_the_task_path_is_absorbed_exactly(run):
    agent = load_agent(run[1])
    torch.nn.init.normal_(agent.model.gates.last.cmd.coords)
    state = plain_state(agent.model.base)
    intact = state["lm_head.weight"]
    absorb_gates(state, agent.model.gates)
    x = torch.randn(5, 64)
    ours = agent.model.gates.last(x)[1] @ intact.T
    assert torch.allclose(x @ state["lm_head.weight"].T, ours, atol=1e-5)
    assert not torch.allclose(x @ intact.T, ours, atol=1e-2)


def test_a_checkpoint_restores_the_coordinates_and_fits_no_other_gates(tiny_base):
    model = model_of(tiny_base)
    saved = {name: tensor.clone() for name, tensor in module_of(model).state_dict().items()}
    assert [name for name in saved if "gates.last." in name] == [CMD]
    model.gates.detach()
    fresh = module_of(model_of(tiny_base))
    torch.nn.init.normal_(fresh.model.gates.last.cmd.coords)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.state_dict()[CMD], saved[CMD])
    fresh.model.gates.detach()
    with pytest.raises(ArtefactError, match="does not fit"):
        module_of(model_of(tiny_base, triality=False)).load_state_dict(saved)
