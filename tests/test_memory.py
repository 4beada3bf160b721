"""`so8t plan`: predicted peaks against what real steps allocate, the sizes of the bases, the bars, what the command says."""

import json
import sys
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers import AutoModelForCausalLM

import benchmarks.memory
from so8t import memory, training
from so8t.base import load_base, weights_digest
from so8t.cli import main
from so8t.config import Config, compose_train, validate
from so8t.errors import BaseModelError, ConfigError, HardwareError
from so8t.losses import language_model_loss
from so8t.memory import GIB, MARGIN, Plan, plan
from so8t.placement import AbsentHead, HostEmbedding, SlicedHead, placement, quantize_linears, quantized_linear, settle
from so8t.remedies import changed, changes, remedies
from so8t.shapes import SHAPES, base_config
from so8t.tracker import ByteTracker
from tests.conftest import SMOLLM2, TINY

CPU = ("trainer.accelerator=cpu",)
SMALL = ("base=tiny", "gate.top_layers=2", *CPU)
CARD = ("+hw=rtx3060", "base=qwen2.5_0.5b", "data.max_length=512")


@cache
def config(*overrides: str) -> Config:
    return validate(compose_train(overrides))


@cache
def planned(*overrides: str) -> Plan:
    return plan(config(*overrides))


# -- against reality ---------------------------------------------------------------------------------------------------


def test_the_plan_is_within_a_tenth_of_what_a_real_nf4_step_allocates(real_base):
    settings = config(*CPU, "data.max_length=64", "data.batch_size=2", "data.eval_batch_size=3")
    guess = plan(settings)
    there, above = benchmarks.memory.measure_cpu(settings, real_base)
    for phase, parts in guess.phases.items():
        total = sum(parts.values())
        assert total == pytest.approx(there + above[phase], rel=0.1), phase
        # the weights are easy: what comes and goes is right by itself, too
        assert total - there == pytest.approx(above[phase], rel=0.1), phase


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss.task_weight=0",),
        ("loss.task_reaches=all", "pet.target=hidden"),
        ("gate.triality=true", "head.commutator=true"),
    ],
)
def test_it_is_so_for_other_losses_and_a_random_base(overrides):
    settings = config(*SMALL, "data.max_length=64", "data.batch_size=4", "data.eval_batch_size=4", *overrides)
    there, above = benchmarks.memory.measure_cpu(settings, load_base(settings.base, cut=2))
    for phase, parts in plan(settings).phases.items():
        assert sum(parts.values()) - there == pytest.approx(above[phase], rel=0.1), phase


# -- facts about every plan --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), CARD], ids=["cpu", "card"])
def test_a_head_without_gates_is_planned_too(more):
    assert planned(*(more or SMALL), "gate=none", "loss.task_weight=0").peak_gib > 0


def test_the_parts_add_up_to_the_peak_and_the_peak_is_that_of_the_larger_phase():
    for result in (planned(*SMALL), planned(*CARD)):
        assert sum(result.parts.values()) == pytest.approx(result.peak_gib)
        assert result.peak_gib == max(sum(parts.values()) for parts in result.phases.values())
        assert all(size >= 0 for parts in result.phases.values() for size in parts.values())
        assert result.parts["weights_4bit"] > 0
        assert result.parts["trained"] > 0


@pytest.mark.parametrize("key", ["gate.top_layers", "data.max_length", "data.batch_size"])
def test_the_training_step_grows_with_k_and_sequence_and_batch(key):
    common = {"gate.top_layers": 1, "data.max_length": 64, "data.batch_size": 2}
    sizes = []
    for times in (1, 2, 4):
        values = {**common, key: common[key] * times}
        result = planned("base=tiny", *CPU, "loss.task_weight=0", *(f"{k}={v}" for k, v in values.items()))
        sizes.append(sum(result.phases["training step"].values()))
    assert sizes == sorted(set(sizes)), "strictly"


def test_checkpointing_lowers_the_activations():
    on, off = (planned(*CARD, "loss.task_weight=0", f"hw.checkpoint_suffix={value}") for value in ("true", "false"))
    assert on.phases["training step"]["activations"] < 0.7 * off.phases["training step"]["activations"]
    assert on.parts["weights_4bit"] == off.parts["weights_4bit"]


def test_checkpoints_are_paid_for_only_where_the_plan_does_not_fit_without():
    settings = (*CARD, "loss.task_weight=0")
    on, off, auto = (planned(*settings, f"hw.checkpoint_suffix={value}") for value in ("true", "false", "auto"))
    assert (on.checkpointed, off.checkpointed) == (True, False)
    assert auto == off, "it fits without"
    between = (on.needed_gib + off.needed_gib) / 2
    tight = config(*settings, "hw.checkpoint_suffix=auto", f"hw.memory_budget_gib={between}")
    assert plan(tight).checkpointed
    assert plan(tight) == plan(replace(tight, hw=replace(tight.hw, checkpoint_suffix=True)))
    roomy = config(*settings, "hw.checkpoint_suffix=auto")
    assert plan(roomy, card_gib=between).checkpointed, "what is free on the card counts, too"


@pytest.mark.parametrize(("budget", "again"), [(8.0, False), (1e-3, True)])
def test_a_run_takes_what_the_plan_says_of_checkpoints(budget, again, make_config):
    overrides = ("+hw=rtx4090", "base=tiny", "data=starter", "gate.top_layers=2", "trainer.accelerator=cpu")
    settings = validate(make_config(*overrides, f"hw.memory_budget_gib={budget}"))
    assert settings.hw.checkpoint_suffix == "auto"
    module = training.build(settings, training.load_data(settings))
    assert module.model.base.checkpoint_suffix is again


def test_without_the_task_loss_there_are_no_logits_and_on_a_gpu_no_lm_head():
    with_task, without = planned(*CARD), planned(*CARD, "loss.task_weight=0")
    assert with_task.phases["training step"]["logits"] > 0
    assert with_task.parts["weights_head"] > 0
    assert all(parts["logits"] == parts["weights_head"] == parts["weights_embedding"] == 0 for parts in without.phases.values())


@pytest.mark.parametrize("reads", ["[last]", "[0.2,0.5,0.9,last]"])
def test_two_layers_below_the_cut_stand_for_all_of_them(monkeypatch, reads):
    tiny = ("+hw=rtx3060", "base=tiny", "base.layers=9", "gate.top_layers=3", "data.max_length=128")
    settings = config(*tiny, f"head.reads={reads}")
    short = plan(settings)
    monkeypatch.setattr(memory, "_shortened", lambda config, shape: (config, shape, 0))
    whole = plan(settings)
    # what dies a moment earlier or later may differ by a row of the mask
    assert short.peak_gib == pytest.approx(whole.peak_gib, rel=0.002)
    for phase, parts in whole.phases.items():
        assert short.phases[phase] == pytest.approx(parts, rel=0.002)


def test_the_embedding_counts_on_the_cpu_and_not_on_a_gpu():
    assert planned(*SMALL).parts["weights_embedding"] * GIB == 260 * 64 * 4
    assert planned(*CARD).parts["weights_embedding"] == 0


# -- the bars ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "bar"),
    [
        (("+hw=rtx3060", "base=qwen2.5_7b", "data.max_length=1024"), 4.5),
        (("+hw=rtx3060", "base=qwen2.5_14b", "data.max_length=1024"), 8.0),
        (("+hw=rtx3060", "data.max_length=2048"), 6.0),
    ],
)
def test_a_7b_base_plans_below_four_and_a_half_gib_a_14b_below_eight_and_the_profile_well_below_eight(overrides, bar):
    settings = config(*overrides)
    assert settings.data.batch_size == 1
    assert settings.gate.top_layers == 4
    assert settings.loss.task_weight > 0
    result = planned(*overrides)
    assert result.peak_gib <= bar
    # by hand, 7B: 28 layers of q, o 3584 x 3584, k, v 3584 x 512, three of 3584 x 18944, at 4.127 bits
    if settings.base.name == "qwen2.5_7b":
        numbers = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
        assert result.parts["weights_4bit"] * GIB * 8 / numbers == pytest.approx(4.127, abs=0.01)
        assert result.fits


# -- the sizes of the bases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # what the models' own pages give for their weights
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
    ],
)
def test_the_shipped_sizes_make_as_many_parameters_as_the_models_have(name, parameters):
    kind, sizes = SHAPES[name]
    whole = kind(**sizes)
    two = kind(**{**sizes, "num_hidden_layers": 2})
    one = kind(**{**sizes, "num_hidden_layers": 1})
    with torch.device("meta"):
        counts = [sum(p.numel() for p in AutoModelForCausalLM.from_config(c).parameters()) for c in (one, two)]
    assert counts[0] + (whole.num_hidden_layers - 1) * (counts[1] - counts[0]) == parameters


def test_the_shipped_sizes_of_the_embedded_base_are_those_of_the_base_itself(real_base):
    shipped, real = base_config(SMOLLM2), real_base.causal_lm.config
    for key in SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"][1]:
        assert getattr(shipped, key) == getattr(real, key), key


def test_a_local_folder_is_read_for_its_own_sizes(tmp_path):
    shape = base_config(config(*SMALL).base)
    shape.vocab_size = 512
    shape.save_pretrained(tmp_path)
    local = replace(TINY, source="hub", model_id=str(tmp_path))
    assert base_config(local).vocab_size == 512
    nowhere = replace(TINY, name="mine", source="hub", model_id=str(tmp_path / "nowhere"))
    with pytest.raises(BaseModelError, match=r"base mine: no config.json for .*nowhere.*base.model_id"):
        base_config(nowhere)


def test_more_top_layers_than_the_base_has_is_told():
    with pytest.raises(BaseModelError, match=r"gate.top_layers=5: tiny has 4 layers"):
        plan(config("base=tiny", "gate.top_layers=5", *CPU))


# -- spending less -----------------------------------------------------------------------------------------------------


def test_the_lm_loss_and_its_backward_never_hold_all_logits():
    length, width, vocabulary, chunk = 512, 16, 4096, 64
    weight = torch.randn(vocabulary, width)
    targets = torch.randint(vocabulary, (1, length))

    def most(size: int) -> float:
        """Largest bytes of logits at once, over those of one chunk of logits."""
        hidden = torch.randn(1, length, width, requires_grad=True)
        tracker = ByteTracker(vocabulary=vocabulary)
        logits = []
        with tracker:
            mark = tracker._mark
            tracker._mark = lambda: (mark(), logits.append(tracker.live.get("logits", 0)))
            language_model_loss(hidden, targets, lambda x: x @ weight.T, chunk=size)[0].backward()
        assert hidden.grad is not None
        return max(logits) / (size * vocabulary * 4)

    assert most(chunk) <= 4, "logits, their log-probabilities and the gradients of both, of one chunk"
    assert 4 * chunk < length, "so never all of them"
    assert most(length) > 1, "the measure sees what is there"


def test_where_each_part_of_a_base_goes():
    def put(**given: bool):
        where = placement(**{"on_gpu": True, "tied": False, "quantize_head": False, "with_head": True, **given})
        return where.embedding, where.head

    assert put() == ("host", "plain")
    assert put(quantize_head=True) == ("host", "nf4")
    assert put(with_head=False) == ("host", "absent")
    assert put(tied=True) == ("device", "tied"), "the head needs it there anyway"
    assert put(tied=True, quantize_head=True) == ("host", "nf4")
    assert put(on_gpu=False, with_head=False) == ("device", "plain"), "on the CPU nothing is left out"


def test_an_embedding_on_the_host_gives_the_same_rows_and_stays_there():
    plain = nn.Embedding(50, 8)
    host = HostEmbedding(plain.weight)
    tokens = torch.randint(50, (2, 5))
    assert torch.equal(host(tokens), plain(tokens))
    model = nn.Sequential(host, nn.Linear(8, 8)).to("meta")
    assert model[0].weight.device.type == "cpu"
    assert model[1].weight.device.type == "meta"
    assert not list(host.parameters()), "transformers asks the first parameter where a model is"


def test_a_base_settled_as_on_a_gpu_gives_the_same_states(tiny_base):
    tokens, mask = torch.randint(4, 260, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    before = tiny_base.suffix(tiny_base.prefix(tokens, mask), mask)[0]
    settle(tiny_base.causal_lm, placement(on_gpu=True, tied=True, quantize_head=False, with_head=False), lambda w: None)
    tiny_base.to("cpu")
    assert isinstance(tiny_base.decoder.embed_tokens, HostEmbedding)
    assert torch.equal(tiny_base.suffix(tiny_base.prefix(tokens, mask), mask)[0], before)
    tiny_base.check_split()
    with pytest.raises(BaseModelError, match="without its lm_head"):
        tiny_base.causal_lm.lm_head(before)
    assert isinstance(tiny_base.causal_lm.lm_head, AbsentHead)


def test_a_base_quantised_layer_by_layer_is_the_one_that_transformers_quantises(tiny_base):
    plain = load_base(replace(TINY, quantization="none"), cut=2)
    quantize_linears(plain.causal_lm, partial(quantized_linear, dtype=torch.float32, double=True, device=torch.device("cpu")))
    assert weights_digest(plain) == weights_digest(tiny_base)


def test_biases_are_kept_when_a_layer_is_quantised():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    bias, x = model[0].bias.clone(), torch.randn(2, 64)
    quantize_linears(model, partial(quantized_linear, dtype=torch.float32, double=True, device=torch.device("cpu")))
    assert torch.equal(model[0](torch.zeros(2, 64)), bias.expand(2, 64))
    assert model[1].bias is None
    assert model(x).shape == (2, 64)


def test_an_nf4_lm_head_is_its_slices_and_the_base_still_speaks():
    base = load_base(replace(TINY, quantize_head=True), cut=2)
    head = base.causal_lm.lm_head
    assert isinstance(head, SlicedHead)
    assert [part.weight.quant_state.quant_type for part in head.slices] == ["nf4"] * 3
    assert max(part.out_features for part in head.slices) <= base.causal_lm.config.intermediate_size
    dense = torch.cat([dequantize_4bit(part.weight.data, part.weight.quant_state) for part in head.slices])
    state = torch.randn(3, 64)
    assert torch.allclose(head(state), state @ dense.T, atol=1e-5)
    exact = base.decoder.embed_tokens.weight
    error = ((dense - exact).norm() / exact.norm()).item()
    assert 0.01 < error < 0.15, "coarser than the embedding it was tied to, and no more"
    spoken = base.causal_lm.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert spoken.shape[1] > 3


# -- what fits ---------------------------------------------------------------------------------------------------------


def test_a_plan_fits_when_the_peak_with_its_margin_is_within_the_budget():
    parts = {"phase": {"activations": 4.0}}
    assert Plan(parts, 4.0 * (1 + MARGIN) + 1e-9, 12).fits is True
    assert Plan(parts, 4.0 * (1 + MARGIN) - 1e-9, 12).fits is False
    assert Plan(parts, None, None).fits is None
    assert plan(config(*SMALL), card_gib=1e-4).fits is False, "the card at hand counts without a profile, too"


def test_what_would_make_it_fit_is_planned_and_does():
    crowded = (*CARD, "data.batch_size=4", "data.eval_batch_size=1", "loss.task_weight=0")
    settings = config(*crowded)
    first = planned(*crowded)
    assert first.phase == "training step"
    # a little less than it needs: some single changes are enough
    tight = changed(settings, {"hw.memory_budget_gib": first.needed_gib * 0.9})
    found = remedies(tight, plan(tight))
    assert found[0].overrides == ("data.batch_size=1", "trainer.accumulate_grad_batches=128"), "the cheapest that helps"
    order = [next(iter(change)) for change in changes(tight)]
    named = [r.overrides[0].split("=")[0] for r in found]
    assert named == sorted(named, key=order.index)
    for remedy in found:
        assert remedy.plan.fits
    again = planned(*crowded, *found[0].overrides)
    assert again.peak_gib == found[0].plan.peak_gib, "what the command line would get"
    assert remedies(settings, first) == [], "nothing to mend"


def test_a_base_that_is_too_large_is_answered_with_the_largest_that_fits():
    too_large = changed(config("+hw=rtx3060", "data.max_length=128", "loss.task_weight=0"), {"hw.memory_budget_gib": 1.5})
    found = remedies(too_large, plan(too_large))
    assert [r.overrides for r in found] == [("base=qwen2.5_1.5b",)]
    assert found[0].plan.fits


def test_a_run_that_cannot_fit_stops_before_anything_is_read_or_downloaded(monkeypatch):
    never = []
    monkeypatch.setattr(training, "check_hardware", lambda config: None)
    monkeypatch.setattr(training, "device_of", lambda config: torch.device("cuda", 0))
    monkeypatch.setattr(training, "remedies", lambda *a, **k: [])
    monkeypatch.setattr(training, "cap_memory", lambda config, device: None)
    monkeypatch.setattr(training, "SafetyData", lambda *a, **k: never.append("data"))
    monkeypatch.setattr(training, "load_base", lambda *a, **k: never.append("base"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(0.001 * GIB), 12 * GIB))
    with pytest.raises(HardwareError, match=r"does not fit"):
        training.train(compose_train([*SMALL]))
    assert not never


def test_what_is_free_on_the_card_counts_and_what_would_fit_is_told():
    settings = config(*CARD, "loss.task_weight=0")
    assert training.check_memory(settings, card_gib=11.0).startswith("planned: fits")
    with pytest.raises(HardwareError) as error:
        training.check_memory(settings, card_gib=planned(*CARD, "loss.task_weight=0").needed_gib * 0.99)
    told = str(error.value)
    assert "qwen2.5_0.5b on rtx3060" in told
    assert "does not fit" in told
    assert "cheapest first" in told


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def so8t_plan(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            main(["plan", *(str(a) for a in arguments)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_command_prints_the_parts_the_verdict_and_draws_a_picture(so8t_plan, tmp_path):
    picture = tmp_path / "pictures" / "mine.png"
    code, out, _ = so8t_plan(*CARD, "--plot", picture)
    assert code == 0
    assert "planned, not measured: qwen2.5_0.5b on rtx3060: batch 1, sequence 512, K = 4, task loss on" in out
    for part in ("weights, 4-bit", "weights, lm_head", "activations", "logits", "optimiser state", "together"):
        assert part in out
    assert "fits:" in out
    assert "the budget is 8 GiB, of a card of 12 GiB" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_where_no_picture_can_be_written_the_plan_is_told_all_the_same(so8t_plan, tmp_path):
    (tmp_path / "file").touch()
    code, out, err = so8t_plan(*CARD, "--plot", tmp_path / "file" / "plan.png")
    assert code == 2
    assert "fits:" in out
    assert " ".join(err.split()) == f"error: {tmp_path / 'file'}: File exists"


def test_the_command_speaks_json_to_programs(so8t_plan, tmp_path):
    code, out, _ = so8t_plan(*CARD, "--json")
    assert code == 0
    told = json.loads(out)
    assert {"peak_gib", "fits", "parts"} <= told.keys()
    assert told["fits"] is True
    assert told["peak_gib"] == pytest.approx(sum(told["parts"].values()))
    assert told["peak_gib"] == planned(*CARD).peak_gib
    assert not list(tmp_path.rglob("*.png")), "a picture only where one was asked for"


def test_without_a_profile_nothing_is_claimed(so8t_plan, tmp_path):
    code, out, _ = so8t_plan(*SMALL)
    assert code == 0
    assert "tiny on the CPU" in out
    assert "no hardware profile" in out
    assert (tmp_path / "outputs" / "plan.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("gate.top_layer=4",), "Could not override 'gate.top_layer'"),
        (("gate.top_layers=four",), "gate.top_layers='four'"),
        (("base=qwen3_1t",), "Could not find 'base/qwen3_1t'"),
        (("+hw=abacus",), "Could not find 'hw/abacus'"),
        (("base=qwen2.5_0.5b", "base.model_id=/no/such/folder"), "no config.json for '/no/such/folder'"),
        (("--plot", "picture.jpg"), "--plot picture.jpg: the picture is a PNG"),
    ],
)
def test_a_mistake_is_told_in_one_line(so8t_plan, arguments, says):
    code, out, err = so8t_plan(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_what_composition_refuses_is_a_configuration_error():
    with pytest.raises(ConfigError, match="configuration: "):
        compose_train(["no_such_group=1"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_the_benchmark_on_a_gpu_says_that_it_needs_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memory"])
    with pytest.raises(HardwareError, match=r"CUDA GPU and torch sees none.*--cpu"):
        benchmarks.memory.main()


def test_the_allocator_is_held_to_the_budget_of_the_profile(monkeypatch):
    held = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=12 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: held.append(share))
    training.cap_memory(config(*CARD), torch.device("cuda", 0))
    training.cap_memory(config(*SMALL), torch.device("cuda", 0))
    assert held == [pytest.approx(8 / 12)], "and without a profile to nothing"
