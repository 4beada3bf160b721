"""What is unlike everything the head has seen is never allowed: measured, kept with the adapter, and told by exports too."""

import base64
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from so8t.adapter import load_agent
from so8t.base import shared_lead
from so8t.config import validate
from so8t.conversation import Prompt, readings
from so8t.data.datamodule import RecordDataset
from so8t.data.sources import load_shipped
from so8t.data.tokenise import Template
from so8t.errors import ArtefactError, ConfigError
from so8t.export import export_hf
from so8t.exported import SafetyHead
from so8t.gates import GateSpec
from so8t.intervals import conformal_quantile
from so8t.labels import LABELS, Label
from so8t.model import HeadSpec, SO8TModel, at_position, decide
from so8t.training import limit_strangeness, train
from tests.conftest import TINY
from tests.test_export import LARGE, PROBES, REQUESTS, forget, make_agent

LOGITS = st.lists(st.tuples(*[st.floats(-20, 20)] * 3), min_size=1, max_size=8)


@given(logits=LOGITS, seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_what_is_too_strange_is_never_allowed_and_nothing_else_changes(logits, seed):
    rows = torch.tensor(logits)
    strange = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < 0.5
    before, after = decide(rows), decide(rows, too_strange=strange)
    assert not (after.labels[strange] == Label.ALLOW).any()
    held = strange & (before.labels == Label.ALLOW)
    assert (after.labels[held] == Label.ESCALATE).all()
    assert after.unsure[held].all()
    assert torch.equal(after.labels[~held], before.labels[~held])
    assert torch.equal(after.unsure[~held], before.unsure[~held])
    assert torch.equal(after.probabilities, before.probabilities)


def test_a_failure_that_is_strange_is_counted_once_as_a_failure():
    decided = decide(torch.full((1, 3), math.nan), too_strange=torch.tensor([True]))
    assert decided.failed.all()
    assert not decided.unsure.any()


def test_the_limit_is_what_the_asked_share_of_new_benign_rows_is_under(prepared):
    module, data, config = prepared("head.familiar=0.8")
    data.val = data.train  # more rows
    assert module.model.head.limit == math.inf, "before it is measured nothing is too strange"
    limit_strangeness(module, data, config)
    found = []
    with torch.no_grad():
        for batch in data.val_dataloader():
            reads = module.model.trunk(module.cache.prefix(batch.tokens, batch.mask), batch.mask)[1]
            head = module.model.head
            turned = (head.features_at(reads, batch.mask, batch.position) - head.shift) * head.scale
            found += turned[batch.labels == Label.ALLOW].square().mean(1).tolist()
    limit = float(module.model.head.limit)
    assert min(abs(limit - x) for x in found) < 1e-4 * limit, "it is one of them"
    within = sum(x <= limit * (1 + 1e-4) for x in found)
    assert within - 1 < 0.8 * (len(found) + 1) <= within


@given(st.lists(st.floats(0, 9), min_size=1, max_size=80, unique=True), st.floats(0.05, 0.999))
@settings(max_examples=100, deadline=None)
def test_a_new_value_is_under_the_conformal_quantile_with_the_asked_probability(values, share):
    # leave each out in turn: of n + 1 exchangeable values at least the share is under the quantile of the others
    under = sum(x <= conformal_quantile([y for y in values if y != x] or [math.nan], share) for x in values)
    if len(values) > 1:
        assert under >= math.floor(share * len(values))


def test_a_share_that_few_rows_cannot_speak_of_is_no_limit():
    assert conformal_quantile([1.0] * 48, 0.98) == math.inf
    assert conformal_quantile([1.0] * 49, 0.98) == 1.0


@pytest.mark.parametrize("why", ["no share", "no benign rows", "too few rows", "a run on parts of its rows"])
def test_where_nothing_can_be_measured_there_is_no_limit(prepared, why):
    overrides = {"no share": ["head.familiar=0"], "too few rows": ["head.familiar=0.999"]}.get(why, ["head.familiar=0.8"])
    overrides += ["trainer.limit_val_batches=1"] if why == "a run on parts of its rows" else []
    module, data, config = prepared(*overrides)
    if why != "too few rows":
        data.val = data.train
    if why == "no benign rows":
        data.val = [record for record in data.val if record.safety_label != Label.ALLOW]
    module.model.head.limit.fill_(0.5)  # of an adapter that the run began with
    limit_strangeness(module, data, config)
    assert module.model.head.limit == math.inf


def test_a_trained_agent_has_its_limit_and_a_run_that_begins_with_it_measures_its_own(make_config, rows_file, tmp_path):
    def run(name, *overrides):
        quick = ("base=tiny", "data=jsonl", f"data.path={rows_file}", "trainer.limit_train_batches=1", "evaluate=false")
        train(make_config(*quick, *overrides, output_dir=tmp_path / name))
        return load_agent(tmp_path / name).model.head.limit

    assert run("first", "head.familiar=0.5").isfinite()
    assert run("second", f"init_from={tmp_path / 'first'}", "head.familiar=0") == math.inf


def test_training_rows_have_a_mean_strangeness_of_one(prepared):
    module, data, _ = prepared()
    with torch.no_grad():
        found = torch.cat([at_position(module(b).strangeness, b.position) for b in data.sample(10**6, batch_size=16)])
    scaled = (module.model.head.scale != 1).float().mean()
    assert float(found.mean()) == pytest.approx(float(scaled), abs=0.02), "features that hardly vary add next to nothing"


def test_features_that_are_not_standardised_have_no_strangeness(make_config, rows_file):
    with pytest.raises(ConfigError, match=r"set head\.standardise=true, or head\.familiar=0"):
        validate(make_config("base=tiny", "data=jsonl", f"data.path={rows_file}", "head.standardise=false"))


# -- kept with the adapter ---------------------------------------------------------------------------------------------


def strangeness(agent, request: str) -> float:
    tokens = torch.tensor([agent.template.encode(request).tokens])
    with torch.no_grad():
        return float(
            agent.model(agent.model.prefix(tokens, torch.ones_like(tokens)), tokens, torch.ones_like(tokens)).strangeness[0, -1]
        )


def limited(folder, limit: float, *, always: Label | None = None):
    """The agent in a folder, with another limit; a head that always gives one label, if asked."""
    path = folder / "adapter" / "adapter.safetensors"
    tensors = load_file(path) | {"head.limit": torch.tensor(limit)}
    if always is not None:
        tensors["head.linear.weight"] = torch.zeros_like(tensors["head.linear.weight"])
        tensors["head.linear.bias"] = 2.0 * (torch.arange(len(LABELS)) == int(always))
    save_file(tensors, path)
    return load_agent(folder)


def test_an_agent_allows_what_is_within_its_limit_and_escalates_what_is_not(tmp_path):
    agent = make_agent(tmp_path, TINY, GateSpec(**LARGE))
    told = sorted((strangeness(agent, request), request) for request in (*REQUESTS, *PROBES))
    half = len(told) // 2
    agent = limited(tmp_path, (told[half - 1][0] + told[half][0]) / 2, always=Label.ALLOW)
    decided = agent.decide_many([(request, None) for _, request in told if len(request) < 100])
    wanted = [int(Label.ALLOW if k < half else Label.ESCALATE) for k, (_, request) in enumerate(told) if len(request) < 100]
    assert decided.labels.tolist() == wanted
    assert decided.unsure.tolist() == [label != Label.ALLOW for label in wanted]
    refusing = limited(tmp_path, 0.0, always=Label.REFUSE)
    assert refusing.decide("bake bread").labels.tolist() == [int(Label.REFUSE)], "it is no reason to be less strict"


def test_an_adapter_from_before_there_was_a_limit_has_none(tmp_path):
    make_agent(tmp_path, TINY, GateSpec(**LARGE))
    path = tmp_path / "adapter" / "adapter.safetensors"
    tensors = load_file(path)
    del tensors["head.limit"]
    save_file(tensors, path)
    with pytest.raises(ArtefactError, match=r"head\.limit"):
        load_agent(tmp_path)
    forget(tmp_path, "familiar")
    assert load_agent(tmp_path).model.head.limit == math.inf


def test_an_adapter_from_before_decisions_were_smoothed_smooths_none(tmp_path):
    make_agent(tmp_path, TINY, GateSpec(**LARGE))
    forget(tmp_path, "smoothing")
    assert load_agent(tmp_path).model.head.spec.smoothing == 0


def test_an_answer_may_be_strange(tmp_path):
    make_agent(tmp_path, TINY, GateSpec(**LARGE))
    agent = limited(tmp_path, 0.0, always=Label.ALLOW)
    asked = readings(Prompt("bake bread"), "", lambda *_: True)
    answered = readings(Prompt("bake bread"), "0x4f, 0x5a", lambda *_: True)
    assert agent.read([*asked, *answered]).labels.tolist() == [Label.ESCALATE, Label.ALLOW]


# -- and told by exports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "head"),
    [
        ("independent", HeadSpec(reads=(0.25, "last"), pooling="both")),
        ("shared", HeadSpec()),
        ("leading", HeadSpec(pooling="token")),
    ],
)
def test_an_export_escalates_what_its_agent_finds_too_strange(tmp_path, blocks, head):
    agent = make_agent(tmp_path, TINY, GateSpec(blocks=blocks, **LARGE), head)
    told = sorted(strangeness(agent, request) for request in (*REQUESTS, *PROBES))
    half = len(told) // 2
    agent = limited(tmp_path, (told[half - 1] + told[half]) / 2, always=Label.ALLOW)
    export_hf(agent, tmp_path / "hf")
    reader = SafetyHead(
        tmp_path / "hf",
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    for request in (*REQUESTS, *PROBES):
        expected = LABELS[int(agent.look([agent.template.encode(request)]).labels[0])]
        assert (
            reader.decide(request)[0]
            == expected
            == ("ALLOW" if strangeness(agent, request) <= agent.model.head.limit else "ESCALATE")
        )


def test_an_export_without_a_limit_carries_nothing_for_it(tmp_path):
    agent = make_agent(tmp_path, TINY, GateSpec(**LARGE))
    export_hf(agent, tmp_path / "hf")
    assert set(load_file(tmp_path / "hf" / "safety_head.safetensors")) == {"weight", "bias"}


# -- on the real base --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_requests_in_a_code_are_stranger_to_the_real_base_than_requests_in_words(real_base):
    english = [r for r in load_shipped("starter") if r.language == "en" and not r.context and 30 < len(r.user_request) < 90]
    known, new = english[:40], english[400:412]
    coded = [dataclasses.replace(r, user_request=base64.b64encode(r.user_request.encode()).decode()) for r in new]
    model = SO8TModel(real_base, GateSpec(interior="none", last=False), HeadSpec(reads=(0.25, 0.5)))
    template = Template(real_base.tokenizer, system_prompt="", max_length=160)

    def features(records):
        dataset, columns = RecordDataset(records, template), []
        for k in range(0, len(records), 32):
            batch = dataset[list(range(k, min(k + 32, len(records))))]
            hidden = model.prefix(batch.tokens, batch.mask)
            reads = model.trunk(hidden, batch.mask, lead=shared_lead(batch.tokens, batch.mask))[1]
            columns.append(model.head.features_at(reads, batch.mask, batch.position))
        return torch.cat(columns)

    model.head.standardise(features(known))
    words, codes = (((features(rows) - model.head.shift) * model.head.scale).square().mean(1) for rows in (new, coded))
    assert codes.quantile(0.1) > words.max()
