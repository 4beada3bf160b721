"""The prefix's output on disk: the same results, shared by processes, bounded, and safe against torn writes."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import so8t.training
from so8t.base import BaseSpec, LeadKeys, load_base, shared_lead
from so8t.cli import main
from so8t.data import store as store_module
from so8t.data.cache import PrefixCache
from so8t.data.datamodule import RecordDataset, pad_rows
from so8t.data.records import Record
from so8t.data.store import CacheSpec, PrefixStore, clear_stores, row_key, store_root, stores, used_bytes
from so8t.data.tokenise import Template
from so8t.errors import BaseModelError, ConfigError
from so8t.gates import GateSpec
from so8t.labels import Label
from so8t.lightning_module import LossSpec, SO8TModule
from so8t.model import HeadSpec, SO8TModel
from so8t.optim import OptimSpec
from so8t.pet import PetSpec
from tests.conftest import TINY, synthetic_rows, write_rows
from tests.spies import Spy

WIDTH = 16
SPY = "+callbacks.spy._target_=tests.spies.Spy"


def opened(folder, max_bytes: int = 2**20, dtype: torch.dtype = torch.float32) -> PrefixStore:
    return PrefixStore(folder / "tiny-k2-x", dtype=dtype, max_bytes=max_bytes)


def states(seed: int, length: int = 5) -> torch.Tensor:
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(seed))


def key(n: int) -> bytes:
    return row_key(torch.tensor([n]))


# -- the store ---------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back_bit_for_bit_by_another_store(tmp_path):
    first = opened(tmp_path)
    for n in range(4):
        assert first.put(key(n), states(n, length=n + 1))
    first.flush()
    second = opened(tmp_path)
    assert len(second) == 4
    for n in range(4):
        assert torch.equal(second.get(key(n)), states(n, length=n + 1))
    assert key(9) not in second


def test_bfloat16_takes_half_the_room_and_rounds(tmp_path):
    halves = opened(tmp_path, dtype=torch.bfloat16)
    halves.put(key(0), states(0))
    halves.flush()
    assert torch.equal(opened(tmp_path, dtype=torch.bfloat16).get(key(0)), states(0).bfloat16())


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty"])
def test_a_damaged_segment_is_told_deleted_and_its_rows_are_missing(tmp_path, caplog, damage):
    first = opened(tmp_path)
    first.put(key(0), states(0))
    first.flush()
    first.put(key(1), states(1))
    first.flush()
    torn = sorted(first.folder.glob("*.safetensors"))[0]
    content = bytearray(torn.read_bytes())
    content[-1] ^= 1
    torn.write_bytes({"cut short": content[:-8], "one bit": content, "empty": b""}[damage])
    again = opened(tmp_path)
    assert len(again) == 1, "the other segment is read"
    assert not torn.exists()
    assert "damaged" in caplog.text
    assert str(torn) in caplog.text


def test_a_write_that_is_killed_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    first = opened(tmp_path)
    first.put(key(0), states(0))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        first.flush()
    monkeypatch.undo()
    assert list(first.folder.glob("*.safetensors")) == []
    first.flush()
    assert len(opened(tmp_path)) == 1, "nothing was lost"


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), room=st.integers(0, 3000))
@settings(max_examples=30, deadline=None)
def test_the_bound_holds_whatever_is_put(tmp_path_factory, lengths, room):
    folder = tmp_path_factory.mktemp("bound")
    bounded = opened(folder, max_bytes=room)
    kept = [bounded.put(key(n), states(n, length)) for n, length in enumerate(lengths)]
    assert sum(n * WIDTH * 4 for n, k in zip(lengths, kept, strict=True) if k) <= room
    for n, k in enumerate(kept):
        assert (key(n) in bounded) == k


def test_the_bound_counts_what_other_bases_take(tmp_path):
    other = PrefixStore(tmp_path / "other-k4-x", dtype=torch.float32, max_bytes=2**20)
    other.put(key(0), states(0, length=50))
    other.flush()
    assert used_bytes(tmp_path) > 50 * WIDTH * 4
    assert not opened(tmp_path, max_bytes=50 * WIDTH * 4).put(key(1), states(1))


WRITER = """
import sys, torch
from pathlib import Path
from so8t.data.store import PrefixStore, row_key
store = PrefixStore(Path(sys.argv[1]), dtype=torch.float32, max_bytes=2**20)
for n in range(int(sys.argv[2]), int(sys.argv[3])):
    store.put(row_key(torch.tensor([n])), torch.full((3, 16), float(n)))
    store.flush()
"""


def test_processes_write_into_one_store_at_once(tmp_path):
    folder = tmp_path / "tiny-k2-x"
    command = [sys.executable, "-c", WRITER, str(folder)]
    writers = [subprocess.Popen([*command, str(a), str(b)]) for a, b in ((0, 20), (10, 30))]
    assert [w.wait(timeout=120) for w in writers] == [0, 0]
    store = opened(tmp_path)
    assert len(store) == 30
    for n in range(30):
        assert torch.equal(store.get(key(n)), torch.full((3, WIDTH), float(n)))


def test_a_store_sees_what_another_process_wrote_since(tmp_path):
    here, there = opened(tmp_path), opened(tmp_path)
    there.put(key(0), states(0))
    there.flush()
    assert key(0) not in here
    with here.filling():
        assert key(0) in here


def test_a_full_disk_is_told_and_the_run_goes_on_in_memory(tmp_path, monkeypatch, caplog):
    store = opened(tmp_path)
    store.put(key(0), states(0))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "save_file", full)
    store.flush()
    assert "No space left on device" in caplog.text
    assert torch.equal(store.get(key(0)), states(0))
    assert not store.put(key(1), states(1)), "nothing more is stored"
    assert list(store.folder.glob("*.part-*")) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache\.folder: cannot write into .*file.*cache\.max_gib=0"):
        PrefixStore(tmp_path / "file" / "tiny-k2-x", dtype=torch.float32, max_bytes=100)


def test_rows_that_cannot_be_read_back_are_still_right(tiny_base, tmp_path, monkeypatch):
    store = PrefixStore.of(tiny_base, CacheSpec(folder=str(tmp_path)))
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(PrefixStore, "_read", lambda *_: None)
    tokens = torch.arange(10).reshape(2, 5) + 4
    mask = torch.ones_like(tokens)
    hidden = PrefixCache(tiny_base, store=store).prefix(tokens, mask)
    assert torch.equal(hidden, tiny_base.prefix(tokens, mask))


# -- what all rows begin with -------------------------------------------------------------------------------------------


def test_the_states_of_the_lead_are_kept_once_and_change_nothing_else(tiny_base, tmp_path):
    """Rows behind a lead, one that is the lead alone, and one that begins otherwise."""
    lead = [9, 8, 7, 6]
    rows = [[*lead, 5, 4], [*lead, 3, 3, 3], lead, [5, *lead]]
    tokens, mask = pad_rows(rows, 0)
    plain = PrefixCache(tiny_base).prefix(tokens, mask)
    stored = PrefixStore.of(tiny_base, CacheSpec(folder=str(tmp_path)))
    cache = PrefixCache(tiny_base, store=stored, lead=lead)
    first = cache.prefix(tokens, mask)
    assert torch.allclose(first[mask.bool()], plain[mask.bool()], atol=1e-5)
    cache.flush()
    again = PrefixCache(tiny_base, store=PrefixStore.of(tiny_base, CacheSpec(folder=str(tmp_path))), lead=lead)
    assert torch.equal(again.prefix(tokens, mask), first), "in another process, bit for bit"
    kept = [len(stored.get(cache.key(torch.tensor(row)))) for row in rows]
    assert kept == [2, 3, 4, 5]


def test_rows_with_and_without_their_lead_are_not_taken_for_each_other(tiny_base, tmp_path):
    store = PrefixStore.of(tiny_base, CacheSpec(folder=str(tmp_path)))
    tokens = torch.tensor([[9, 8, 7, 6, 5]])
    caches = [PrefixCache(tiny_base, store=store, lead=lead) for lead in ([], [9, 8], [9, 8, 7])]
    for cache in (*caches, *caches):
        assert torch.allclose(
            cache.prefix(tokens, torch.ones_like(tokens)), tiny_base.prefix(tokens, torch.ones_like(tokens)), atol=1e-5
        )
    assert len(store) == 5, "three, and two leads"


# -- whose rows they are -----------------------------------------------------------------------------------------------


def folder_of(tmp_path, *, cut: int = 2, spec: CacheSpec | None = None, **changes) -> str:
    tiny = BaseSpec(**{"name": "tiny", "source": "random", "hidden_size": 64, "layers": 4} | changes)
    spec = spec or CacheSpec(folder=str(tmp_path))
    return PrefixStore.of(load_base(tiny, cut=cut), spec).folder.name


def test_another_base_quantisation_cut_or_format_has_another_folder(tmp_path, monkeypatch):
    usual = folder_of(tmp_path)
    assert usual == folder_of(tmp_path)
    monkeypatch.setenv("SO8T_CACHE", str(tmp_path / "elsewhere"))
    assert usual == folder_of(tmp_path), "where the base's files lie is no part of it"
    others = [
        folder_of(tmp_path, seed=1),
        folder_of(tmp_path, quantization="none"),
        folder_of(tmp_path, double_quantization=False),
        folder_of(tmp_path, cut=1),
        folder_of(tmp_path, spec=CacheSpec(folder=str(tmp_path), dtype="bfloat16")),
    ]
    assert len({usual, *others}) == 6


# -- runs --------------------------------------------------------------------------------------------------------------

STEPS = (
    "evaluate=false",
    "data.batch_size=4",
    "data.eval_batch_size=4",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=20",
    SPY,
)


def own(folder):
    """Where a run with `cache.folder=FOLDER` has its stores."""
    return store_root(str(folder))


def losses(tiny_run, folder, name: str, *settings: str) -> list[float]:
    tiny_run(*STEPS, f"cache.folder={folder}", *settings, output_dir=folder.parent / name)
    return [float(loss) for loss in Spy.last.losses]


def test_the_losses_of_twenty_steps_are_the_same_with_and_without_it(tiny_run, tmp_path):
    folder = tmp_path / "prefix"
    without = losses(tiny_run, folder, "without", "cache.max_gib=0")
    assert len(without) == 20
    assert stores(own(folder)) == []
    cold = losses(tiny_run, folder, "cold")
    warm = losses(tiny_run, folder, "warm")
    assert cold == without, "float32 states: bit for bit"
    assert warm == without
    rounded = losses(tiny_run, folder, "rounded", "cache.dtype=bfloat16")
    assert rounded != without
    assert rounded == pytest.approx(without, rel=2**-6), "bf16 keeps 8 bits"
    assert [s.rows for s in stores(own(folder))] == [106, 106, 91, 91], (
        "two stores: 91 training rows, 14 of validation, and what all begin with, once; and two of where the head begins"
    )


def test_on_the_real_base_steps_from_kept_states_differ_from_steps_without_by_rounding(real_base, tmp_path):
    """Each row comes twice, the second time beside another, whose length pads it otherwise."""
    requests = ["Kill it.", "Wire all of my savings to this account tonight.", "Forge a passport for me."]
    records = [Record(request, Label(k)) for k, request in enumerate(requests)]
    rows = RecordDataset(records, Template(real_base.tokenizer, system_prompt="", max_length=64))

    def losses(store: PrefixStore | None) -> list[float]:
        torch.manual_seed(0)
        model = SO8TModel(real_base, GateSpec(top_layers=4), HeadSpec(reads=(0.5, "last")))
        cache = PrefixCache(real_base, store=store, keep=model.below)
        module = SO8TModule(model, LossSpec(), PetSpec(), OptimSpec(), class_counts=(1, 1, 1), cache=cache)
        optimizer, found = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01), []
        try:
            for pair in ([0, 1], [1, 2], [2, 0]):
                batch = rows[pair]
                total = module.loss_terms(batch, module(batch), progress=1.0).total()
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                found.append(float(total.detach()))
        finally:
            model.gates.detach()
        cache.flush()
        return found

    without = losses(None)
    assert len(set(without)) == 3, "the steps are felt"
    assert losses(opened(tmp_path / "whole")) == pytest.approx(without, rel=1e-4)
    halves = tmp_path / "halves"
    rounded = losses(opened(halves, dtype=torch.bfloat16))
    assert rounded != without
    assert rounded == pytest.approx(without, rel=2**-6), "bf16 keeps 8 bits"
    assert losses(opened(halves, dtype=torch.bfloat16)) == rounded, "a second run, from what the first wrote: bit for bit"
    assert len(opened(tmp_path / "whole")) == len(opened(halves, dtype=torch.bfloat16)) == 3


def test_a_second_run_computes_no_prefix_of_a_row_that_the_first_has_stored(tiny_run, tmp_path, monkeypatch):
    # without answers: behind their prompts they are other rows, which no cache holds
    unanswered = [row | {"task_output": None} for row in synthetic_rows(120)]
    rows = write_rows(tmp_path / "unanswered.jsonl", unanswered)
    settings = ("trainer.max_epochs=1", f"cache.folder={tmp_path}/prefix", "loss.task_weight=0", f"data.path={rows}")
    tiny_run(*settings, output_dir=tmp_path / "first")

    def no_prefix(*_: object) -> None:
        raise AssertionError("the prefix ran")

    monkeypatch.setattr("so8t.base.SplitBase.prefix_layers", property(no_prefix))
    monkeypatch.setattr(PrefixStore, "of", classmethod(lambda cls, *_: opened_at(own(tmp_path / "prefix"))))
    monkeypatch.setattr("so8t.base.SplitBase.check_split", lambda _: None)
    metrics, _ = tiny_run(*settings, output_dir=tmp_path / "second")
    assert metrics["test/rows"] > 0


def opened_at(root) -> PrefixStore:
    (folder,) = (p for p in root.glob("*-k2-float32-*") if p.is_dir())
    return PrefixStore(folder, dtype=torch.float32, max_bytes=2**30)


def test_too_little_room_is_said_before_filling_and_the_run_goes_on(tiny_run, tmp_path, capfd):
    tiny_run("evaluate=false", "trainer.max_epochs=1", "cache.max_gib=0.0002", f"cache.folder={tmp_path}/prefix")
    said = " ".join(capfd.readouterr().err.split())
    assert "that is too little" in said
    assert "cache.max_gib" in said
    assert 0 < used_bytes(own(tmp_path / "prefix")) < 0.0003 * 2**30


def test_with_gates_in_every_layer_nothing_is_cached_and_this_is_said(tiny_run, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="so8t.training"):
        tiny_run(*STEPS, "trainer.limit_train_batches=1", "gate.top_layers=4", f"cache.folder={tmp_path}/prefix")
    assert Spy.last.module.cache.store is None
    assert "gate.top_layers=4 leaves no frozen prefix: nothing to cache" in caplog.text


@pytest.mark.parametrize("name", ["embed_tokens", "layers.1.mlp", "layers.2.input_layernorm"])
def test_a_base_that_trains_below_the_cut_is_refused_and_one_that_trains_above_it_is_not(prepared, name):
    module, data, config = prepared()
    part = module.model.base.decoder.get_submodule(name)
    (part.down_proj if name.endswith("mlp") else part).register_parameter("added", torch.nn.Parameter(torch.zeros(1)))
    if name.startswith("layers.2"):
        so8t.training.prepare(module, config, data, resumed=True)
        return
    with pytest.raises(BaseModelError, match=rf"tiny: model\.{name}.* is trainable and lies below the cut.*gate\.top_layers"):
        so8t.training.prepare(module, config, data, resumed=True)


# -- so8t cache --------------------------------------------------------------------------------------------------------


def test_cache_info_counts_and_clear_deletes_stores_and_nothing_else(tmp_path, capsys):
    root = store_root(str(tmp_path))
    store = opened(root)
    store.put(key(0), states(0))
    store.flush()
    for mine in (tmp_path / "my-kernels" / "model.safetensors", root / "my-keys" / "model.safetensors"):
        mine.parent.mkdir(parents=True)
        mine.write_text("kept")
    main(["cache", "info", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "tiny-k2-x" in shown
    assert "my-ke" not in shown
    assert [s.rows for s in stores(root)] == [1]
    main(["cache", "clear", "--folder", str(tmp_path)])
    assert "GiB freed" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.rglob("*.safetensors")) == ["model.safetensors"] * 2
    assert clear_stores(root) == 0
    store.put(key(1), states(1))
    store.flush()  # a run that was going on while it was cleared
    assert len(opened(root)) == 1


# -- what makes it cheap: the leading tokens, once ---------------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=6), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_the_lead_is_the_longest_common_beginning_of_real_tokens(rows):
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    lead = shared_lead(tokens, mask)
    if len(rows) == 1:
        assert lead == 0
        return
    columns = list(zip(*rows, strict=False))
    common = next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(columns))
    assert lead == min(common, width - 1)


def test_running_the_lead_once_gives_every_row_what_it_gets_alone(tiny_model):
    base = tiny_model.base
    torch.nn.init.normal_(tiny_model.gates.interior["3_o_proj"].safe.coords, std=0.5)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12, 0], [5, 6, 7, 13, 0, 0]])
    mask = torch.tensor([[1] * 6, [1] * 5 + [0], [1] * 4 + [0, 0]])
    lead = shared_lead(tokens, mask)
    assert lead == 3
    hidden = base.prefix(tokens, mask)
    together, kept = base.suffix(hidden, mask, (0, 1), lead=lead)
    apart, kept_apart = base.suffix(hidden, mask, (0, 1))
    real = mask.bool()
    assert torch.allclose(together[real], apart[real], atol=1e-5)
    assert torch.allclose(kept[1][real], kept_apart[1][real], atol=1e-5)
    for i, n in enumerate(mask.sum(1).tolist()):
        alone = base.prefix(tokens[i : i + 1, :n], mask[i : i + 1, :n])
        assert torch.allclose(alone[0], hidden[i, :n], atol=1e-5)


@pytest.mark.parametrize("cut", [2, 4])
def test_an_opening_that_was_read_before_changes_nothing_and_is_not_read_again(cut):
    base = load_base(TINY, cut=cut)
    opening = [9, 8, 7]
    batches = [
        pad_rows([[*opening, 5, 4], [*opening, 3, 3, 3, 3]], 0),  # some, one, one that goes on as another batch did
        pad_rows([[*opening, 5]], 0),
        pad_rows([[*opening, 5, 4]], 0),
        pad_rows([[*opening, *range(10, 40), k] for k in range(4)], 0),  # they share much more
        pad_rows([opening], 0),  # nothing follows, it is another, it is behind padding
        pad_rows([[9, 8, 6, 5], [*opening, 5]], 0),
        (torch.tensor([[0, *opening, 5]]), torch.tensor([[0, 1, 1, 1, 1]])),
    ]
    keep = (0, 1) if cut == 2 else (0,)
    before = [base.prefix(tokens, mask, keep) for tokens, mask in batches]
    base.remember_opening(opening)
    base.prefix(*batches[0], keep)
    ran = []
    for layer in base.prefix_layers:
        layer.register_forward_pre_hook(lambda _module, inputs: ran.append(inputs[0].shape[1]))
    for (tokens, mask), expected in zip(batches, before, strict=True):
        real = mask.bool()
        assert torch.allclose(base.prefix(tokens, mask, keep)[real], expected[real], atol=1e-5)
    assert ran[: 3 * len(base.prefix_layers)] == [n for n in (4, 1, 2) for _ in base.prefix_layers], "what follows alone"
    base.remember_opening([])
    assert base.opening is None


def test_running_the_lead_once_gives_the_gates_the_same_gradient(tiny_model):
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12, 0]])
    mask = torch.tensor([[1] * 6, [1] * 5 + [0]])
    hidden = tiny_model.base.prefix(tokens, mask)
    gradients = []
    for lead in (0, 3):
        tiny_model.zero_grad()
        logits, _ = tiny_model.head(tiny_model.trunk(hidden, mask, lead=lead)[1], mask)
        (logits * torch.linspace(-1, 1, logits.numel()).reshape(logits.shape) * mask[..., None]).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in tiny_model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-3), name


def test_lead_keys_are_kept_for_one_layer_and_put_before_every_row():
    keys = LeadKeys()
    lead, own = torch.ones(1, 2, 3, 4), torch.zeros(5, 2, 1, 4)
    assert keys.update(lead, lead, 7)[0] is lead
    both = keys.update(own, own, 7)[0]
    assert both.shape == (5, 2, 4, 4)
    assert both[:, :, :3].eq(1).all()


def test_dequantised_copies_change_no_decision_and_no_stored_weight(tmp_path):
    spec = {"name": "tiny", "source": "random", "hidden_size": 64, "layers": 4}
    tokens = torch.arange(12).reshape(2, 6) + 4
    outputs = []
    for gib in (0.0, 0.5):
        base = load_base(BaseSpec(**spec, dense_gib=gib), cut=2)
        assert base.decoder.layers[0].mlp.down_proj.weight.dtype == torch.uint8, "what is stored stays 4-bit"
        outputs.append(base.prefix(tokens, torch.ones_like(tokens)))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert json.loads(base.describe())["quantization"] == "nf4"
