"""A head begins as the logistic regression on the frozen base's states, and gates and head go on from there."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from so8t.data.store import PrefixStore
from so8t.errors import DataError
from so8t.evaluation import frozen_features
from so8t.lightning_module import SO8TModule
from so8t.model import SO8TModel, at_position
from so8t.training import prepare
from tests.fixtures import C
from tests.spies import Spy

SPY = "callbacks.spy._target_=tests.spies.Spy"


@torch.no_grad()
def read(module: SO8TModule, data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standardised features, logits and labels of all training rows at their decisions."""
    head, features, logits, labels = module.model.head, [], [], []
    with module.model.without_gates():  # which hardly turn yet
        for batch in data.sample(10**6, batch_size=16):
            reads = module.model.trunk(module.cache.prefix(batch.tokens, batch.mask), batch.mask)[1]
            features.append((head.features_at(reads, batch.mask, batch.position) - head.shift) * head.scale)
            logits.append(at_position(module(batch).logits, batch.position))
            labels.append(batch.labels)
    return torch.cat(features), torch.cat(logits), torch.cat(labels)


@pytest.mark.parametrize("weights", ["balanced", "null"])
def test_before_the_first_step_the_head_is_the_logistic_regression(prepared, weights):
    module, data, _ = prepared(f"loss.class_weights={weights}")
    features, logits, labels = read(module, data)
    balance = "balanced" if weights == "balanced" else None
    wanted = LogisticRegression(C=C, max_iter=2000, class_weight=balance).fit(features.numpy(), labels.numpy())
    expected = wanted.predict_proba(features.numpy())
    assert np.ptp(expected[:, 0]) > 0.2, "it tells rows apart"
    assert logits.softmax(-1).numpy() == pytest.approx(expected, abs=5e-3)


def lengths(data) -> list[int]:
    """Tokens of every training row's request."""
    spans = [data.template.encode(r.user_request, r.context).span for r in data.train]
    return [end - begin for begin, end in spans]


def test_rows_longer_than_the_longest_teach_the_words_alone(prepared):
    _, data, _ = prepared("cache.max_gib=0")
    longest = sorted(lengths(data))[len(data.train) // 2]
    many = ("head.words=4096", f"head.longest={longest}", "trainer.limit_train_batches=0.5")
    module, data, _ = prepared(*many, "loss.class_weights=balanced")
    short = copy.copy(data)
    short.train = [record for record, length in zip(data.train, lengths(data), strict=True) if length <= longest]
    assert len(data.train) / 3 < len(short.train) < len(data.train)
    assert len(module.cache.store) == len(short.train) + 1, "no more was read, but how every prompt opens"
    words = module.model.head.words
    module.model.head.words = None
    features, logits, labels = read(module, short)
    assert features.mean(0).abs().max() < 1e-3, "standardised over those"
    weights = module.class_weights[labels].numpy()  # of all rows
    wanted = LogisticRegression(C=C, max_iter=2000).fit(features.numpy(), labels.numpy(), sample_weight=weights)
    assert logits.softmax(-1).numpy() == pytest.approx(wanted.predict_proba(features.numpy()), abs=5e-3)
    everything, *_ = prepared("head.words=4096", "loss.class_weights=balanced")
    assert torch.equal(words.known, everything.model.head.words.known)
    assert torch.allclose(words.table, everything.model.head.words.table, atol=1e-5)


def test_a_run_none_of_whose_rows_is_short_enough_says_so(prepared):
    with pytest.raises(DataError, match=r"head\.longest=1: every training row is longer"):
        prepared("head.longest=1")


def test_features_have_mean_0_and_deviation_1_over_the_training_rows(prepared):
    features, _, _ = read(*prepared()[:2])
    assert features.mean(0).abs().max() < 1e-3
    deviation = features.std(0, correction=0)
    assert ((deviation - 1).abs() < 1e-2).float().mean() > 0.9, "but for those that hardly vary"
    assert deviation.max() < 1.01


def test_a_source_that_weighs_less_counts_less_where_the_head_begins(prepared):
    whole, data, _ = prepared()
    data.train = [replace(record, weight=0.25) for record in data.train]
    less = copy.deepcopy(whole)
    less.begin_head(data.sample(10**6, batch_size=16))
    small, large = (module.model.head.linear.weight.norm() for module in (less, whole))
    assert small < 0.8 * large, "as with a quarter of C"


def test_a_run_whose_epoch_takes_a_share_of_the_rows_begins_with_a_probe_of_all_of_them(tiny_run, monkeypatch):
    seen = []
    begin = SO8TModule.begin_head
    monkeypatch.setattr(SO8TModule, "begin_head", lambda self, batches, *_: begin(self, seen.extend(batches) or seen))
    tiny_run("evaluate=false", "trainer.max_epochs=1", f"head.probe={C}", "trainer.limit_train_batches=0.5", f"+{SPY}")
    rows, stepped = (sum(len(batch.labels) for batch in batches) for batches in (seen, Spy.last.batches))
    assert len({int(row) for batch in seen for row in batch.rows}) == rows, "each once"
    assert 0.3 * rows < stepped < 0.6 * rows


def test_a_run_on_part_of_the_rows_begins_with_a_probe_of_part_of_them(tiny_run, monkeypatch):
    seen = []
    monkeypatch.setattr("so8t.training.STANDARDISE_ROWS", 40)
    begin = SO8TModule.begin_head
    monkeypatch.setattr(SO8TModule, "begin_head", lambda self, batches, *_: begin(self, seen.extend(batches) or seen))
    tiny_run("evaluate=false", "trainer.max_epochs=1", f"head.probe={C}", "trainer.limit_train_batches=2", f"+{SPY}")
    assert 40 <= sum(len(batch.labels) for batch in seen) < 80
    assert Spy.last.start["model.head.linear.weight"].std() > 0.002, "fitted, not random"


@pytest.mark.parametrize("overrides", [("head.probe=0",), ("data.train_labels=[ALLOW]",)])
def test_without_a_probe_or_without_rows_of_every_label_the_head_begins_small_and_at_random(prepared, overrides):
    module, *_ = prepared(*overrides)
    linear = module.model.head.linear
    assert float(linear.weight.std()) == pytest.approx(0.001, rel=0.1)
    assert not linear.bias.any()


def test_a_run_that_is_resumed_or_begins_with_another_fits_no_head_again(tiny_run, tmp_path, monkeypatch):
    short = ("evaluate=false", "trainer.max_epochs=1", f"head.probe={C}", f"+{SPY}")
    first = tmp_path / "first"
    tiny_run(*short, output_dir=first)
    ended = {name: p.clone() for name, p in Spy.last.module.model.head.named_parameters()}
    monkeypatch.setattr(SO8TModule, "begin_head", lambda *_: pytest.fail("the head began anew"))
    tiny_run(*short, f"init_from={first}", output_dir=tmp_path / "second")
    assert all(torch.equal(Spy.last.start[f"model.head.{name}"], p) for name, p in ended.items())
    tiny_run(*short, "trainer.max_epochs=2", f"ckpt_path={first}", output_dir=tmp_path / "third")
    assert all(torch.equal(Spy.last.start[f"model.head.{name}"], p) for name, p in ended.items())


@torch.no_grad()
def test_the_probe_beside_an_evaluation_finds_the_frozen_states_of_the_training_rows(prepared):
    module, data, config = prepared("gate.init_std=1")
    store = PrefixStore.of_last_states(module.model.base, config.cache)
    prepare(module, config, data, resumed=False, last_states=store)
    assert len(store) == len({tuple(data.template.encode(r.user_request, r.context).tokens) for r in data.train})
    size = {"batch_size": 16, "cache": module.cache}
    kept = frozen_features(module.model, data.train, data.template, store=store, **size)
    assert kept == pytest.approx(frozen_features(module.model, data.train, data.template, **size), abs=1e-4), "gates off"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_a_head_begins_is_read_once_for_all_runs(prepared, monkeypatch, dtype):
    kept = f"cache.dtype={dtype}"
    first = prepared(kept)[0].model.head.state_dict()
    monkeypatch.setattr(SO8TModel, "trunk", lambda *_, **__: pytest.fail("it was read again"))
    again = prepared(kept, "gate.init_std=1", "seed=3")[0].model.head.state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_evaluated_run_reads_once_too_and_only_what_is_new(prepared, monkeypatch):
    module, data, config = prepared()
    prepare(module, config, data, resumed=False, last_states=PrefixStore.of_last_states(module.model.base, config.cache))
    read = []
    trunk = SO8TModel.trunk
    monkeypatch.setattr(
        SO8TModel, "trunk", lambda self, hidden, *a, **k: read.append(len(hidden)) or trunk(self, hidden, *a, **k)
    )
    last_states = PrefixStore.of_last_states(module.model.base, config.cache)
    prepare(module, config, data, resumed=False, last_states=last_states)
    assert read == []
    before = module.model.head.linear.weight.clone()
    data.train = [replace(data.train[0], user_request="something new"), *data.train[1:]]
    prepare(module, config, data, resumed=False, last_states=last_states)
    assert read == [1], "of the row's batch nothing but the row"
    assert not torch.equal(before, module.model.head.linear.weight)


def test_heads_that_read_something_else_or_a_gate_do_not_begin_where_another_did(prepared):
    stores = Path(prepared()[2].cache.folder) / "so8t-prefix"
    for more, count in (("head.reads=[0.25]", 2), ("head.pooling=token", 3), ("head.commutator=true", 3)):
        assert prepared(more)[0].model.head.linear.weight.isfinite().all()
        assert len([path for path in stores.glob("*-head-*") if path.is_dir()]) == count, more
