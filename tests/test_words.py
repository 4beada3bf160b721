"""What the words say beside the states: n-grams of tokens, causal, fitted once, pooled where something is decided."""

import copy
import json
import re
import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from so8t.adapter import load_agent
from so8t.base import load_base
from so8t.config import validate
from so8t.errors import ArtefactError, ConfigError
from so8t.export import export_hf
from so8t.gates import GateSpec
from so8t.model import HeadSpec, at_position
from so8t.streaming import stream
from so8t.words import LONGEST, NO_WORD, PART, SHARE, SHARES_BY_SPELLING, STRENGTH, WHOLE, Words, grams
from tests.fixtures import TINY
from tests.test_export import LARGE, REQUESTS, check_decisions, forget, make_agent

prompts = st.lists(st.integers(0, 50_000), min_size=1, max_size=40)
few = st.lists(st.integers(0, 4), min_size=1, max_size=40)  # so that n-grams come back


def told(count: int = 97, *, folded: bool = False) -> Words:
    """Words that know n-grams of small numbers, and say something about each; `folded`, with some that are no words."""
    draw = torch.Generator().manual_seed(0)
    words, prompts = Words(count, 50_001, folded=folded), torch.randint(0, 260, (50, 12), generator=draw) % 5
    if folded:
        words.fold[[0, 1, 2, 3]] = torch.tensor([NO_WORD, 1, 1, 3], dtype=torch.int32)
    words.measure([(prompts, torch.ones_like(prompts))])
    words.begin_with(torch.randn(3, count, generator=draw), torch.randn(3, generator=draw))
    return words


def row(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt alone: tokens and mask, `[1, T]`."""
    return torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.long)


@given(tokens=prompts | few)
def test_an_n_gram_counts_once_where_it_first_ends(tokens):
    found, new = grams(*row(tokens))
    seen: set[tuple[int, ...]] = set()
    for end in range(1, len(tokens) + 1):
        here = {tuple(tokens[end - n : end]) for n in range(1, min(LONGEST, end) + 1)}
        assert int(new.view(-1, LONGEST)[end - 1].sum()) == len(here - seen)
        seen |= here
    assert len(set(found[new].tolist())) == len(seen), "different n-grams are different numbers"


@given(left=prompts, right=prompts)
def test_the_same_n_gram_is_the_same_number_wherever_it_stands(left, right):
    def numbers(tokens):
        found, new = grams(*row(tokens))
        return set(found[new].tolist())

    assert numbers(left) <= numbers(left + right)
    assert numbers(right) <= numbers(left + right)


@given(opening=few, rest=few, pad=st.integers(0, 3))
def test_what_ends_in_the_opening_of_every_prompt_counts_where_it_comes_again(opening, rest, pad):
    tokens = torch.tensor([[9] * pad + opening + rest])
    mask = torch.tensor([[0] * pad + [1] * len(opening + rest)])
    found, new = grams(tokens, mask, len(opening))
    whole = opening + rest
    ends = range(len(opening) + 1, len(whole) + 1)
    expected = {tuple(whole[end - n : end]) for end in ends for n in range(1, min(LONGEST, end) + 1)}
    assert int(new.sum()) == len(expected)
    assert not new.view(-1, LONGEST)[: pad + len(opening)].any()
    alone, first = grams(*row(rest))
    assert set(alone[first].tolist()) <= set(found[new].tolist())


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(few | prompts, min_size=1, max_size=4), pad=st.integers(0, 5), side=st.sampled_from(["left", "right"]),
    folded=st.booleans(),
)  # fmt: skip
def test_padding_and_company_change_nothing_and_what_comes_later_neither(tokens, pad, side, folded):
    words, width = told(folded=folded), max(map(len, tokens)) + pad
    blank = [[9] * (width - len(t)) for t in tokens]
    ids = torch.tensor([t + b if side == "right" else b + t for t, b in zip(tokens, blank, strict=True)])
    real = [[1] * len(t) for t in tokens]
    gone = [[0] * len(b) for b in blank]
    mask = torch.tensor([r + g if side == "right" else g + r for r, g in zip(real, gone, strict=True)])
    together = words(ids, mask)
    for k, prompt in enumerate(tokens):
        for end in range(1, len(prompt) + 1):
            alone = words(*row(prompt[:end]))[0, -1]
            place = end - 1 if side == "right" else width - len(prompt) + end - 1
            assert torch.allclose(together[k, place], alone, atol=1e-5)


def test_what_stands_in_every_prompt_weighs_nothing_and_what_stands_in_one_is_not_known():
    rows = [row([1, 2, 3, *more, 7]) for more in ([40], [50, 51], [60, 40], [70])]
    words = Words(64)
    vectors = words.measure(rows)
    assert vectors.shape == (4, 64)
    assert np.sqrt(np.asarray(vectors.multiply(vectors).sum(1))).ravel() == pytest.approx([1, 0, 1, 0])
    everywhere, once, twice = (set(grams(*row(tokens))[0].flatten().tolist()) for tokens in ([1, 2, 3], [50, 51], [40]))
    weight = dict(zip(words.known.tolist(), words.idf.tolist(), strict=True))
    assert all(weight.get(number, 0) == 0 for number in everywhere)
    assert not once & weight.keys() - {torch.iinfo(torch.int64).max}
    assert weight[(40 + 1) * LONGEST] == pytest.approx(np.log(5 / 3)), "in two of four"
    assert twice & weight.keys()


def test_where_there_are_more_n_grams_than_words_may_know_those_in_the_most_rows_stay():
    rows = [row([n for n in range(1, 30) if k % n == 0]) for k in range(1, 60)]
    few, all_of_them = Words(5), Words(4096)
    few.measure(rows)
    all_of_them.measure(rows)
    assert few.idf.max() <= all_of_them.idf[all_of_them.idf > 0].sort().values[5]
    assert few.known.tolist() == sorted(few.known.tolist())


def spelt(text: str) -> set[tuple[str, ...]]:
    """By hand, what the words of a text are on the byte-level base: runs of up to three letters and digits, in lower case."""
    runs = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(run[k : k + n]) for run in runs for n in range(1, LONGEST + 1) for k in range(len(run) - n + 1)}


@pytest.fixture(scope="module")
def tiny_tokenizer():
    """That of the byte-level base."""
    return load_base(TINY, cut=2).tokenizer


ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(text=ascii_text)
def test_folded_words_are_read_without_upper_case_spaces_and_punctuation(tiny_tokenizer, text):
    words = Words(8, len(tiny_tokenizer), folded=True)
    words.learn_tokens(tiny_tokenizer)
    found, new = words.read(*row(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]))
    letter = {c: int(tiny_tokenizer(c, add_special_tokens=False)["input_ids"][0]) for c in string.printable}
    first = {c: min(letter[c], letter[c.upper()]) for c in string.ascii_lowercase + string.digits}
    expected = {tuple(first[c] for c in gram) for gram in spelt(text)}
    assert int(new.sum()) == len(expected)
    numbers = set()
    for gram in expected:
        number = 0
        for token in gram:
            number = number * 1_000_003 + token + 1
        numbers.add(number * LONGEST + len(gram) - 1)
    assert set(found[new].tolist()) == numbers


def test_the_real_base_s_tokens_fold_to_one_word_however_it_is_typed(real_base):
    tokenizer = real_base.tokenizer
    words = Words(8, len(tokenizer), folded=True)
    words.learn_tokens(tokenizer)

    def read(text):
        found, new = words.read(*row(tokenizer(text, add_special_tokens=False)["input_ids"]))
        return set(found[new].tolist())

    assert read("How do I bake bread?") == read("how do i bake bread") == read(" how do I bake bread!!")
    assert len(read(" make bread")) == 3
    assert read(" make, bread") == read(" make") | read(" bread"), "none goes across a comma"
    assert not read("?! ... <|im_end|>\n")
    parts = [
        t
        for t in tokenizer("鬱", add_special_tokens=False)["input_ids"]
        if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([t])
    ]
    assert parts, "this base spells it in bytes"
    assert {(part + 1) * LONGEST for part in parts} <= read("鬱"), "which stand for themselves"


def told_of_kinds() -> Words:
    """Words of a vocabulary of which 0 is no word, 1 and 2 are whole, 3 and 4 parts of characters."""
    words = Words(8, 5, weighed=True)
    words.kind.copy_(torch.tensor([NO_WORD, WHOLE, WHOLE, PART, PART]))
    words.share.fill_(0.4)
    words.share_of_parts.fill_(0.9)
    words.opening = 2
    return words


@given(tokens=few)
def test_the_words_count_by_how_much_of_the_text_so_far_is_spelt_in_parts_of_characters(tokens):
    words = told_of_kinds()
    shares = words.shares(*row(tokens))[0]
    for end in range(1, len(tokens) + 1):
        spelt = [token for token in tokens[2:end] if token]
        of_parts = sum(token >= 3 for token in spelt) / max(1, len(spelt))
        assert float(shares[end - 1]) == pytest.approx(0.4 + 0.5 * of_parts)


def test_padding_does_not_change_what_the_words_count():
    words, tokens = told_of_kinds(), torch.tensor([[1, 2, 3, 1, 4]])
    padded = torch.tensor([[3, 3, 1, 2, 3, 1, 4]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    assert torch.equal(words.shares(*padded)[:, 2:], words.shares(tokens, torch.ones_like(tokens)))


def test_the_real_base_spells_japanese_in_parts_and_english_not(real_base):
    words = Words(8, len(real_base.tokenizer), weighed=True)
    words.learn_tokens(real_base.tokenizer)
    words.begin_with(torch.zeros(3, 8), torch.zeros(3))

    def share(text):
        return float(words.shares(*row(real_base.tokenizer(text, add_special_tokens=False)["input_ids"]))[0, -1])

    assert share("How do I bake bread, please?") == pytest.approx(SHARES_BY_SPELLING[0])
    assert share("薬の量を倍にしても大丈夫ですか") > 0.75
    assert SHARES_BY_SPELLING[0] < share("Translate 薬の量 into English for my doctor, please") < 0.75


def test_an_adapter_from_before_words_were_weighed_counts_them_as_it_did(tmp_path):
    make_agent(tmp_path, TINY, GateSpec(**LARGE), HeadSpec(words=64))
    forget(tmp_path, "weigh_words")
    words = load_agent(tmp_path).model.head.words
    words.begin_with(torch.zeros(3, 64), torch.zeros(3))
    assert torch.equal(words.shares(*row([200, 201, 202])), torch.full((1, 3), SHARE))


# -- in a run ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("weighed", [False, True])
def test_a_decision_is_the_probes_and_the_words_own_regression_by_their_shares(prepared, weighed):
    module, data, _ = prepared("head.words=4096", "loss.class_weights=balanced", f"head.weigh_words={weighed}")
    without, *_ = prepared()
    words = module.model.head.words
    batches = data.sample(10**6, batch_size=16)
    labels = torch.cat([b.labels for b in batches])
    vectors = copy.deepcopy(words).measure([(b.tokens, b.mask) for b in batches])
    wanted = LogisticRegression(C=STRENGTH, max_iter=2000, class_weight="balanced").fit(vectors, labels)
    alone = torch.cat([at_position(words(b.tokens, b.mask), b.position) for b in batches])
    assert alone.exp().numpy() == pytest.approx(wanted.predict_proba(vectors), abs=5e-3)
    for batch in batches:
        ours, states = (at_position(m(batch).logits, batch.position) for m in (module, without))
        theirs = at_position(words(batch.tokens, batch.mask), batch.position)
        share = SHARES_BY_SPELLING[0] if weighed else SHARE  # these rows are English
        assert torch.allclose(ours, (1 - share) * states.log_softmax(-1) + share * theirs, atol=1e-5)


def test_gates_and_head_learn_the_same_with_words_or_without(prepared):
    gradients = []
    for count in (0, 4096):
        module, data, _ = prepared(f"head.words={count}", "head.dropout=0")
        module.train()
        batch = data.sample(8, batch_size=8)[0]
        module.loss_terms(batch, module(batch), 1.0).total().backward()
        gradients.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_an_agent_keeps_its_words(tiny_run):
    _, run = tiny_run("head.words=512", "evaluate=false", "trainer.max_epochs=1")
    agent = load_agent(run)
    words = agent.model.head.words
    assert (float(words.share), float(words.share_of_parts)) == pytest.approx(SHARES_BY_SPELLING)
    assert agent.model.head.words.table.abs().sum() > 0
    path = run / "adapter" / "adapter.json"
    meta = json.loads(path.read_text())
    del meta["head"]["words"]
    path.write_text(json.dumps(meta))
    with pytest.raises(ArtefactError, match="tensors do not fit"):
        load_agent(run)


@pytest.mark.parametrize(("fold", "weigh"), [(False, False), (True, False), (True, True)])
def test_an_export_reads_the_same_words(tmp_path, fold, weigh):
    agent = make_agent(tmp_path / "run", TINY, GateSpec(**LARGE), HeadSpec(words=300, fold_words=fold, weigh_words=weigh))
    words = agent.model.head.words
    words.learn_tokens(agent.model.base.tokenizer)
    told = [torch.tensor([agent.template.encode(request).tokens]) for request in (*REQUESTS, *REQUESTS, "bake a cake")]
    words.measure([(tokens, torch.ones_like(tokens)) for tokens in told])
    words.begin_with(torch.randn(3, 300), torch.randn(3))
    found = [torch.isin(words.known[words.idf > 0], words.read(t, torch.ones_like(t))[0]).sum() for t in told]
    assert len(set(map(int, found))) >= 4, "prompts know different n-grams"
    assert {int(number) % LONGEST for number in words.known[words.idf > 0]} == {0, 1, 2}, "of every length"
    export_hf(agent, tmp_path / "hf")
    check_decisions(agent, tmp_path / "hf")
    check_decisions(agent, tmp_path / "hf", ("ÿ", "zzz qqq", "パンを焼く bake a cake"))


def test_an_adapter_from_before_words_were_folded_reads_them_as_it_did(tmp_path):
    make_agent(tmp_path, TINY, GateSpec(**LARGE), HeadSpec(words=64))
    forget(tmp_path, "fold_words")
    words = load_agent(tmp_path).model.head.words
    assert words.fold is None
    tokens, mask = row([5, 6, 7])
    assert all(torch.equal(a, b) for a, b in zip(words.read(tokens, mask), grams(tokens, mask, words.opening), strict=True))


def test_an_adapter_from_before_there_were_words_has_none(tmp_path):
    make_agent(tmp_path, TINY, GateSpec(**LARGE))
    forget(tmp_path, "words")
    assert load_agent(tmp_path).model.head.words is None


def test_what_is_streamed_is_what_is_decided_of_the_text_so_far(tiny_run):
    _, run = tiny_run("evaluate=false", "trainer.max_epochs=1", "head.smoothing=0")
    agent = load_agent(run)
    request = "please delete the backup of the payroll server tonight"
    streamed = list(stream(agent, request))
    encoded = agent.template.encode(request)
    with torch.no_grad():
        for k in (0, 5, len(streamed) - 1):
            tokens = torch.tensor([encoded.tokens[: encoded.span[0] + k + 1]])
            logits = agent.model(agent.model.prefix(tokens, torch.ones_like(tokens)), tokens, torch.ones_like(tokens)).logits
            assert streamed[k].probabilities == pytest.approx(logits[0, -1].softmax(-1).tolist(), abs=1e-4)


def test_rows_that_lack_a_label_give_the_words_no_say(prepared):
    module, *_ = prepared("head.words=64", "data.train_labels=[ALLOW]")
    assert not module.model.head.words.share


def test_words_are_fitted_with_the_probe(make_config):
    with pytest.raises(ConfigError, match=r"head\.words are fitted where the head begins: set head\.probe"):
        validate(make_config("base=tiny", "head.probe=0"))
    validate(make_config("base=tiny", "head.probe=0", "init_from=run"))  # whose words are those of that run


@torch.no_grad()
def test_words_that_were_never_fitted_have_no_say():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(10).view(2, 5)
    assert torch.allclose(Words(64).pooled(logits, tokens, torch.ones_like(tokens)), logits.log_softmax(-1))
    logits[1, 2, 0] = torch.inf
    assert not told().pooled(logits, tokens, torch.ones_like(tokens))[1, 2].isfinite().any(), "a failure stays one"
