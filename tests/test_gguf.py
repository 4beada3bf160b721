"""`so8t export --to gguf`: transformers reads the same agent back out of the file; what GGUF cannot tell is refused."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from so8t import gguf_file
from so8t.adapter import Agent, load_agent
from so8t.base import BaseSpec, load_base, smollm2_folder
from so8t.errors import ArtefactError
from so8t.export import PROBES, export_gguf, export_hf
from so8t.exported import SafetyHead
from so8t.gates import GateSpec
from so8t.gguf_file import check_writable, read_llama, rotary_halves, rotary_order
from so8t.labels import LABELS
from so8t.model import HeadSpec
from tests.conftest import TINY
from tests.test_export import LARGE, REQUESTS, left, make_agent

PROMPTS = (*REQUESTS, *PROBES)


def read(file: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(file)


def value(reader: gguf.GGUFReader, key: str) -> object:
    return reader.fields[key].contents()


def loaded(file: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@torch.no_grad()
def spoken(model: PreTrainedModel, agent: Agent, request: str) -> list[int]:
    """12 greedy tokens, whatever they are."""
    tokens = torch.tensor([agent.template.encode(request).tokens])
    return model.generate(tokens, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, tokens.shape[1] :].tolist()


def check_same(agent: Agent, file: Path, plain: Path, requests: tuple[str, ...] = PROMPTS) -> None:
    """Greedy tokens are those of the `--to hf` export, decisions and probabilities the agent's own."""
    model, twin = loaded(file), AutoModelForCausalLM.from_pretrained(plain).eval()
    head = SafetyHead(file.parent, model, AutoTokenizer.from_pretrained(file.parent))
    for request in requests:
        assert spoken(model, agent, request) == spoken(twin, agent, request), request
        ours = agent.look([agent.template.encode(request)])
        label, probabilities = head.decide(request)
        assert label == LABELS[int(ours.labels[0])]
        assert list(probabilities.values()) == pytest.approx(ours.probabilities[0].tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Agent, Path, Path]:
    """An agent on the tiny base, its export as GGUF in float32, and as a plain checkpoint; read only."""
    place = tmp_path_factory.mktemp("gguf")
    agent = make_agent(place / "run", TINY, GateSpec(interior="both", **LARGE))
    export_gguf(agent, place / "gguf" / "model-f32.gguf")
    export_hf(agent, place / "hf")
    return agent, place / "gguf" / "model-f32.gguf", place / "hf"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> BaseSpec:
    """A Qwen2 with attention biases that matter, and its own kind of tokenizer with two merges."""
    folder = tmp_path_factory.mktemp("bases") / "qwen"
    torch.manual_seed(4)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=300, num_key_value_heads=2, eos_token_id=0, tie_word_embeddings=True, **sizes)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet, "th", "the"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[("t", "h"), ("th", "e")])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return BaseSpec(name="qwen", source="hub", model_id=str(folder))


# -- the file is the agent ---------------------------------------------------------------------------------------------


def test_a_llama_is_read_back_as_the_same_agent(exported):
    agent, file, plain = exported
    check_same(agent, file, plain)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("last", [True, False])
def test_a_llama_is_read_as_transformers_reads_it(tmp_path, kind, last):
    agent = make_agent(tmp_path / "run", TINY, GateSpec(last=last, **LARGE))
    file = tmp_path / "gguf" / "a.gguf"
    export_gguf(agent, file, kind=kind)
    ours, theirs = read_llama(file, torch.float32), loaded(file)
    assert ours.config.tie_word_embeddings is not last, "a last gate gives the output a matrix of its own"
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    of_file = {k: v for k, v in theirs.config.to_dict().items() if v is not None and not k.startswith("_")}
    unread = {"architectures", "dtype", "quantization_config", "transformers_version", "unk_token_id"}
    assert {k: v for k, v in ours.config.to_dict().items() if k in of_file.keys() - unread} == {
        k: v for k, v in of_file.items() if k not in unread
    }


def test_without_a_last_gate_the_output_stays_tied_and_the_agent_the_same(tmp_path):
    agent = make_agent(tmp_path / "run", TINY, GateSpec(last=False, **LARGE))
    export_gguf(agent, tmp_path / "gguf" / "a.gguf")
    export_hf(agent, tmp_path / "hf")
    assert "output.weight" not in {t.name for t in read(tmp_path / "gguf" / "a.gguf").tensors}
    check_same(agent, tmp_path / "gguf" / "a.gguf", tmp_path / "hf")


def test_a_qwen2_with_attention_biases_is_read_back_as_the_same_agent(qwen, tmp_path):
    agent = make_agent(tmp_path / "run", qwen, GateSpec(**LARGE))
    export_gguf(agent, tmp_path / "gguf" / "a.gguf")
    export_hf(agent, tmp_path / "hf")
    check_same(agent, tmp_path / "gguf" / "a.gguf", tmp_path / "hf")
    reader = read(tmp_path / "gguf" / "a.gguf")
    assert value(reader, "general.architecture") == "qwen2"
    assert {"blk.0.attn_q.bias", "blk.2.attn_v.bias", "output.weight"} <= {t.name for t in reader.tensors}
    assert value(reader, "tokenizer.ggml.pre") == "qwen2"
    assert value(reader, "tokenizer.ggml.merges") == ["t h", "th e"]
    assert value(reader, "tokenizer.ggml.eos_token_id") == 0
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert (len(tokens), len(types)) == (300, 300), "as many as rows in the embedding"
    assert (tokens[258], types[258], tokens[259], types[259]) == ("the", 1, "<tool>", 4)
    assert (tokens[0], types[0], tokens[299], types[299]) == ("<|endoftext|>", 3, "[PAD299]", 5)


def test_the_real_base_is_told_by_what_its_tokenizer_does():
    # SmolLM's own tokenizer cuts digits one by one; the one that transformers reads out of the embedded file does not
    folder = smollm2_folder()
    assert check_writable(AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)) == "gpt-2"


@pytest.mark.parametrize(("kind", "bits", "worst"), [("f16", 16, 2e-3), ("bf16", 16, 2e-2), ("q8_0", 8.5, 3e-2)])
def test_rounded_types_are_smaller_and_differ_by_rounding(exported, tmp_path, kind, bits, worst):
    agent, _, _ = exported
    told = export_gguf(agent, tmp_path / kind / "a.gguf", kind=kind)
    assert 1e-5 < told.relative < worst
    for tensor in read(tmp_path / kind / "a.gguf").tensors:
        matrix = len(tensor.shape) == 2
        assert tensor.tensor_type.name == (kind.upper() if matrix else "F32"), tensor.name
        assert 8 * tensor.n_bytes / tensor.n_elements == (bits if matrix else 32)


def test_rows_that_are_not_whole_blocks_stay_in_float16(tmp_path):
    agent = make_agent(tmp_path / "run", dataclasses.replace(TINY, hidden_size=48), GateSpec(**LARGE))
    export_gguf(agent, tmp_path / "gguf" / "a.gguf", kind="q8_0")
    types = {t.name: t.tensor_type.name for t in read(tmp_path / "gguf" / "a.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "F16", "48 is not a multiple of 32"
    assert types["blk.0.ffn_down.weight"] == "Q8_0", "96 is"


def test_rotary_pairs_become_neighbours():
    weight = torch.arange(8.0)[:, None].expand(8, 3)  # two heads of four
    assert rotary_order(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(rotary_halves(rotary_order(weight, 2), 2), weight)


def test_the_file_tells_what_the_configuration_and_the_tokenizer_tell(exported):
    agent, file, _ = exported
    reader, config = read(file), agent.model.base.causal_lm.config
    for key, expected in (
        ("llama.block_count", 4),
        ("llama.embedding_length", 64),
        ("llama.feed_forward_length", 128),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.rope.dimension_count", 16),
        ("llama.context_length", 1024),
        ("llama.vocab_size", 260),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "gpt-2"),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
        ("tokenizer.ggml.padding_token_id", 0),
        ("tokenizer.ggml.add_bos_token", False),
        ("tokenizer.chat_template", agent.template.tokenizer.chat_template),
    ):
        assert value(reader, key) == expected, key
    assert value(reader, "llama.rope.freq_base") == config.rope_parameters["rope_theta"]
    assert value(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(config.rms_norm_eps)
    assert value(reader, "tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1], "control tokens, and bytes"


def test_the_code_on_the_card_runs_where_so8t_is_not(exported):
    agent, file, _ = exported
    card = (file.parent / "README.md").read_text(encoding="utf-8")
    code = "import sys\nsys.modules['so8t'] = None  # importing it would fail\n" + card.split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=file.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    decision, probabilities = done.stdout.strip().split(" ", 1)
    ours = agent.decide("how do I kill a python process?")
    assert decision == LABELS[int(ours.labels[0])]
    told = json.loads(probabilities.replace("'", '"'))
    assert list(told.values()) == pytest.approx(ours.probabilities[0].tolist(), abs=1e-4)


def test_the_card_reads_the_head_by_llama_cpp_where_its_states_suffice(exported, tmp_path):
    _, file, _ = exported
    assert (
        'Llama(f"{folder}/model-f32.gguf", embedding=True, logits_all=True, n_ctx=160'
        in (file.parent / "README.md").read_text()
    )
    agent = make_agent(tmp_path / "run", TINY, GateSpec(**LARGE), HeadSpec(reads=(0.5, "last")))
    export_gguf(agent, tmp_path / "gguf" / "a.gguf")
    assert "llama_cpp" not in (tmp_path / "gguf" / "README.md").read_text()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (MistralConfig(), "architecture mistral"),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rotary embedding linear"),
        (LlamaConfig(attention_bias=True), "a Llama with biases"),
        (Qwen2Config(use_sliding_window=True), "sliding-window attention"),
    ],
    ids=["architecture", "rope", "biases", "window"],
)
def test_what_would_be_read_as_something_else_is_refused(tiny_base, config, told):
    with pytest.raises(ArtefactError, match=told):
        check_writable(config, tiny_base.tokenizer)


@pytest.mark.parametrize("cut", ["smollm", "gpt-2", None])
def test_the_pre_tokenizer_is_told_by_what_it_does(tiny_base, cut):
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False)
    stages = {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_alone]),
        "gpt-2": bytes_alone,
        None: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d+"), "isolated"), bytes_alone]),
    }
    tokenizer = copy.deepcopy(tiny_base.tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = stages[cut]
    if cut:
        assert check_writable(tiny_base.causal_lm.config, tokenizer) == cut
    else:
        with pytest.raises(ArtefactError, match="a tokenizer that is not gpt-2, smollm or qwen2"):
            check_writable(tiny_base.causal_lm.config, tokenizer)


def test_a_base_that_gguf_cannot_tell_is_one_line_and_leaves_nothing(so8t, tmp_path):
    torch.manual_seed(3)
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True)).save_pretrained(tmp_path / "base")
    load_base(TINY, cut=2).tokenizer.save_pretrained(tmp_path / "base")
    make_agent(tmp_path / "run", BaseSpec(name="biased", source="hub", model_id=str(tmp_path / "base")), GateSpec(**LARGE))
    code, _, err = so8t("export", tmp_path / "run", "--to", "gguf", tmp_path / "gguf")
    assert code == 2
    assert err.strip() == "error: cannot be written as GGUF: a Llama with biases; export with --to hf"
    assert left(tmp_path) == ["base", "run"]


def test_rows_in_the_wrong_order_are_found_and_leave_nothing(exported, tmp_path, monkeypatch):
    agent, _, _ = exported
    monkeypatch.setattr(gguf_file, "rotary_order", lambda weight, heads: weight)
    with pytest.raises(ArtefactError, match="differs from the gated one"):
        export_gguf(agent, tmp_path / "gguf" / "a.gguf")
    assert left(tmp_path) == []


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_names_the_file_after_its_type_or_as_it_is_told(so8t, finished_run, tmp_path):
    code, out, err = so8t("export", finished_run, "--to", "gguf", tmp_path / "a", "--gguf-type", "f16")
    assert code == 0, err
    assert "compared with the gated agent" in out
    assert left(tmp_path / "a") == [
        "README.md", "chat_template.jinja", "model-f16.gguf", "safety_head.json", "safety_head.py", "safety_head.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "in f16 for llama.cpp" in (tmp_path / "a" / "README.md").read_text()
    assert so8t("export", finished_run, "--to", "gguf", tmp_path / "b" / "agent.gguf")[0] == 0
    assert (tmp_path / "b" / "agent.gguf").is_file()
    agent = load_agent(finished_run)
    head = SafetyHead(tmp_path / "b", loaded(tmp_path / "b" / "agent.gguf"), AutoTokenizer.from_pretrained(tmp_path / "b"))
    assert head.decide(PROBES[0])[0] == LABELS[int(agent.decide(PROBES[0]).labels[0])]
    code, _, err = so8t("export", finished_run, "--to", "gguf", tmp_path / "b" / "other.gguf")
    assert code == 2
    assert "nothing is overwritten" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--to", "hf", "--gguf-type", "f16"), "--gguf-type belongs to --to gguf, not to --to hf"),
        (("--to", "gguf", "--dtype", "bfloat16"), "--dtype belongs to --to hf, not to --to gguf"),
    ],
)
def test_an_option_of_another_kind_of_export_is_an_error(so8t, finished_run, tmp_path, arguments, told):
    code, _, err = so8t("export", finished_run, *arguments, tmp_path / "out")
    assert code == 2
    assert told in err
    assert left(tmp_path) == []
