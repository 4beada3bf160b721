"""The agent: what the head reads, decisions that fail closed, and the task path behind the gates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.errors import ConfigError
from so8t.gates import GateSpec
from so8t.labels import LABELS, Label
from so8t.model import HeadSpec, SafetyHead, SO8TModel, at_position, causal_mean, decide, unit_rms
from tests.test_gates import MASK, TOKENS, turned

NAN, INF = math.nan, math.inf


def logits_of(model: SO8TModel, tokens=TOKENS, mask=MASK) -> torch.Tensor:
    with torch.no_grad():
        return model(model.prefix(tokens, mask), tokens, mask).logits


def decision_of(model: SO8TModel):
    with torch.no_grad():
        output = model(model.base.prefix(TOKENS, MASK), TOKENS, MASK)
    return model.decide(output, torch.tensor([TOKENS.shape[1] - 1]))


# -- decisions ---------------------------------------------------------------------------------------------------------


def test_a_decision_is_the_most_probable_class_and_probabilities_are_the_softmax():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    decisions = decide(p.log())
    assert [LABELS[k] for k in decisions.labels] == ["ALLOW", "ESCALATE", "REFUSE"]
    assert torch.allclose(decisions.probabilities, p)
    assert not decisions.failed.any()
    assert not decisions.unsure.any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_logit_that_is_not_finite_is_escalate_and_a_failure_and_touches_no_other_row(bad, place):
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    logits[1, place] = bad
    decisions = decide(logits)
    assert decisions.labels.tolist() == [Label.ALLOW, Label.ESCALATE, Label.REFUSE]
    assert decisions.failed.tolist() == [False, True, False]
    assert not decisions.unsure.any(), "counted once, as a failure"
    assert torch.isfinite(decisions.probabilities).all()
    assert torch.allclose(decisions.probabilities[1], torch.full((3,), 1 / 3)), "it claims to know nothing"


def test_logits_of_any_finite_size_are_decided():
    decisions = decide(torch.tensor([[1e30, 0.0, -1e30], [-1e30, -1e30, 1e4]]))
    assert decisions.labels.tolist() == [Label.ALLOW, Label.REFUSE]
    assert not decisions.failed.any()


def test_low_confidence_is_escalate_and_counted_as_unsure():
    p = torch.tensor([[0.55, 0.25, 0.20], [0.20, 0.25, 0.55], [0.75, 0.15, 0.10], [0.1, 0.45, 0.45]])
    plain, strict = decide(p.log()), decide(p.log(), min_confidence=0.6)
    assert plain.labels.tolist()[:3] == [Label.ALLOW, Label.REFUSE, Label.ALLOW]
    assert strict.labels.tolist() == [Label.ESCALATE, Label.ESCALATE, Label.ALLOW, Label.ESCALATE]
    assert strict.unsure.tolist() == [True, True, False, True]
    assert not strict.failed.any(), "being unsure is no failure"
    assert torch.equal(strict.probabilities, plain.probabilities)


@given(seed=st.integers(0, 2**32 - 1), low=st.floats(0, 0.99), high=st.floats(0, 0.99))
@settings(max_examples=40, deadline=None)
def test_a_higher_threshold_only_turns_decisions_into_escalate(seed, low, high):
    low, high = sorted((low, high))
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed)) * 2
    before, after = decide(logits, min_confidence=low), decide(logits, min_confidence=high)
    changed = before.labels != after.labels
    assert (after.labels[changed] == Label.ESCALATE).all()
    assert (after.unsure | ~before.unsure).all()
    allowed = after.labels == Label.ALLOW
    assert (after.probabilities[allowed, Label.ALLOW] >= high).all()


def test_the_threshold_of_the_settings_changes_the_models_decision(tiny_base):
    decisions = {}
    for threshold in (0.0, 0.9):
        torch.manual_seed(0)
        model = SO8TModel(tiny_base, GateSpec(top_layers=2), HeadSpec(min_confidence=threshold))
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.zero_()
            next(p for p in model.head.parameters() if p.numel() == 3).copy_(torch.tensor([0.5, 0.0, 0.0]))
        decisions[threshold] = decision_of(model)
        model.gates.detach()
    # softmax of (0.5, 0, 0): e^0.5 / (e^0.5 + 2) = 0.452
    assert decisions[0.0].probabilities[0, 0].item() == pytest.approx(0.452, abs=1e-3)
    assert decisions[0.0].labels.item() == Label.ALLOW
    assert decisions[0.9].labels.item() == Label.ESCALATE
    assert decisions[0.9].unsure.all()


@pytest.mark.parametrize("name", ["last.safe", "interior.2_o_proj.safe"])
def test_a_failing_gate_is_escalate_and_a_failure(tiny_model, name):
    with torch.no_grad():
        dict(tiny_model.gates.rotations())[name].coords[0, 0] = NAN
    decisions = decision_of(tiny_model)
    assert decisions.labels.item() == Label.ESCALATE
    assert decisions.failed.all()


def test_a_failing_command_gate_does_not_touch_the_decision(tiny_model):
    before = decision_of(tiny_model)
    with torch.no_grad():
        tiny_model.gates.last.cmd.coords.fill_(NAN)
    after = decision_of(tiny_model)
    assert torch.equal(after.probabilities, before.probabilities)
    assert not after.failed.any()


def test_the_decision_is_read_at_the_given_position_of_each_row():
    x = torch.arange(24.0).reshape(2, 4, 3)
    assert at_position(x, torch.tensor([3, 1])).tolist() == [[9.0, 10.0, 11.0], [15.0, 16.0, 17.0]]


# -- the head ----------------------------------------------------------------------------------------------------------


def test_the_causal_mean_is_that_of_the_real_tokens_so_far():
    x = torch.tensor([[[2.0], [4.0], [100.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0, 1]])
    assert causal_mean(x, mask).flatten().tolist() == [2.0, 3.0, 3.0, 4.0]
    left = torch.tensor([[0, 1, 0, 1]])
    assert causal_mean(x, left).flatten().tolist() == [0.0, 4.0, 4.0, 5.0], "before the first real token there is nothing"


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.1, 1e4))
@settings(max_examples=20, deadline=None)
def test_unit_rms_takes_the_size_and_keeps_the_direction(seed, scale):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    y = unit_rms(x * scale)
    assert torch.allclose(y.pow(2).mean(-1), torch.ones(4), atol=1e-2)
    assert torch.allclose(torch.nn.functional.cosine_similarity(x, y), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("pooling", ["token", "mean", "both"])
@pytest.mark.parametrize("reads", [("last",), (0.5, "last")])
def test_the_head_gives_three_logits_at_every_token_from_every_read(pooling, reads):
    torch.manual_seed(0)
    head = SafetyHead(16, HeadSpec(reads=reads, pooling=pooling))
    states = [torch.randn(2, 5, 16) for _ in reads]
    mask = torch.ones(2, 5, dtype=torch.long)
    plain, _ = head(states, mask)
    assert plain.shape == (2, 5, 3)
    assert plain.dtype == torch.float32
    for k in range(len(reads)):
        other = [s + torch.randn_like(s) if i == k else s for i, s in enumerate(states)]
        assert (head(other, mask)[0] - plain).abs().max() > 1e-6
    bf16, _ = head([s.bfloat16() for s in states], mask)
    assert torch.allclose(bf16, plain, atol=0.02)


@pytest.mark.parametrize("reads", [(), (0.5, 0.55), ("last", "last")])
def test_a_head_that_reads_nothing_or_a_layer_twice_is_refused(tiny_base, reads):
    with pytest.raises(ConfigError, match=r"head\.reads=.*each layer once"):
        SO8TModel(tiny_base, GateSpec(top_layers=2), HeadSpec(reads=reads))


def test_a_read_is_the_output_of_the_layer_it_names_below_the_cut_and_above(tiny_base):
    model = SO8TModel(tiny_base, GateSpec(top_layers=2), HeadSpec(reads=(0.5, 0.75, 1, "last", 0.25, 0)))
    assert model.below == (1, 0)
    turned(model)
    with torch.no_grad():
        hidden = model.prefix(TOKENS, MASK)
        assert hidden.shape[-1] == 3 * model.base.hidden_size
        safe, reads = model.trunk(hidden, MASK)
        whole = model.base.decoder(input_ids=TOKENS, output_hidden_states=True).hidden_states
    # hidden_states: embedding, then the output of each layer, the last one after the final norm
    assert torch.allclose(reads[0], whole[2], atol=1e-5)
    assert torch.allclose(reads[1], whole[3], atol=1e-5)
    assert torch.allclose(model.base.final_norm(reads[2]), whole[4], atol=1e-5)
    assert torch.allclose(reads[3], model.gates.last.safe(whole[4]), atol=1e-5)
    with model.without_gates():
        plain = model.base.decoder(input_ids=TOKENS, output_hidden_states=True).hidden_states
    assert torch.allclose(reads[4], plain[1], atol=1e-5)
    assert torch.allclose(reads[5], plain[0], atol=1e-5)
    assert torch.equal(reads[3], safe), "the last read is R_safe's output, not the state before it"


# -- which side a parameter is on --------------------------------------------------------------------------------------


def test_every_trainable_parameter_is_on_the_safety_side_but_the_last_command_rotation(tiny_base):
    model = SO8TModel(tiny_base, GateSpec(top_layers=2, interior="both"), HeadSpec())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    safe = {name for name, _ in model.safety_side()}
    assert trainable - safe == {"gates.last.cmd.coords"}
    assert safe <= trainable
    assert not any(name.startswith("base.") for name in trainable), "the base is frozen"


def test_without_gates_the_head_reads_the_frozen_base(tiny_base):
    model = SO8TModel(tiny_base, GateSpec(interior="none", last=False, top_layers=2), HeadSpec())
    assert not list(model.gates.parameters())
    with torch.no_grad():
        output = model(model.base.prefix(TOKENS, MASK), TOKENS, MASK)
        frozen = model.base.decoder(input_ids=TOKENS).last_hidden_state
        assert torch.allclose(output.safe_view, frozen, atol=1e-5)
        plain = model.base.causal_lm(input_ids=TOKENS).logits
        assert torch.allclose(model.task_logits(output.safe_view), plain, atol=1e-4)
        with model.task_path():
            assert torch.equal(model.base.causal_lm(input_ids=TOKENS).logits, plain)


# -- the task path -----------------------------------------------------------------------------------------------------


def test_the_task_path_is_lm_head_of_r_cmd_of_r_safe(tiny_model):
    turned(tiny_model)
    with torch.no_grad():
        safe = tiny_model(tiny_model.base.prefix(TOKENS, MASK), TOKENS, MASK).safe_view
        want = tiny_model.base.causal_lm.lm_head(tiny_model.gates.last.cmd(safe))
        assert torch.equal(tiny_model.task_logits(safe), want)
        with tiny_model.task_path():
            whole = tiny_model.base.causal_lm(input_ids=TOKENS).logits
        assert torch.allclose(whole, want, atol=1e-4)


def test_the_head_of_the_task_path_is_the_bases_own_and_frozen(tiny_model):
    lm_head = tiny_model.base.causal_lm.lm_head
    assert not lm_head.weight.requires_grad
    assert sum(p.numel() for p in tiny_model.parameters() if p.requires_grad) < lm_head.weight.numel() * 2


@pytest.mark.parametrize("inside", ["task_path", "without_gates"])
def test_an_error_inside_leaves_the_model_as_it_was(tiny_model, inside):
    turned(tiny_model)
    hooks = sum(len(m._forward_hooks) for m in tiny_model.base.modules())
    before = logits_of(tiny_model)
    with pytest.raises(KeyboardInterrupt), getattr(tiny_model, inside)():
        raise KeyboardInterrupt
    assert sum(len(m._forward_hooks) for m in tiny_model.base.modules()) == hooks
    assert torch.equal(logits_of(tiny_model), before)


def test_generation_goes_through_the_gates_and_is_the_greedy_walk_over_task_logits(tiny_model):
    turned(tiny_model)
    generate = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), tiny_model.task_path():
        answer = tiny_model.base.causal_lm.generate(TOKENS, attention_mask=MASK, **generate)
    end = tiny_model.base.tokenizer.eos_token_id
    walked = TOKENS
    with torch.no_grad():
        for _ in range(4):
            mask = torch.ones_like(walked)
            safe = tiny_model(tiny_model.base.prefix(walked, mask), walked, mask).safe_view
            logits = tiny_model.task_logits(safe)[:, -1]
            logits[:, end] = -INF  # min_new_tokens
            walked = torch.cat([walked, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(answer, walked)


def test_fresh_gates_leave_what_the_real_base_says_as_it_was(real_base):
    """Attaching starts near the identity: SmolLM2 still says Paris, and after detaching it is itself again."""
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    tokens = real_base.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    arguments = {**tokens, "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        plain = real_base.causal_lm(**tokens).logits
        torch.manual_seed(0)
        model = SO8TModel(real_base, GateSpec(top_layers=4), HeadSpec())
        try:
            with model.task_path():
                gated = real_base.causal_lm(**tokens).logits
                said = real_base.tokenizer.decode(real_base.causal_lm.generate(**arguments)[0, tokens["input_ids"].shape[1] :])
        finally:
            model.gates.detach()
        assert "Paris" in said
        assert 0 < (gated - plain).abs().max() < 0.1 * plain.abs().max()
        assert torch.equal(real_base.causal_lm(**tokens).logits, plain)


def test_dropout_leaves_out_the_same_features_at_all_tokens_of_a_row():
    torch.manual_seed(0)
    head = SafetyHead(64, HeadSpec(reads=("last",), pooling="token", dropout=0.5)).train()
    state = torch.randn(64).expand(4, 7, 64)  # the same everywhere
    logits, _ = head([state], torch.ones(4, 7, dtype=torch.long))
    assert (logits - logits[:, :1]).abs().max() < 1e-6, "along a row"
    assert len({row[0, 0].item() for row in logits}) == 4, "and others in every row"
