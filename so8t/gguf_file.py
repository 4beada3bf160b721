"""A plain checkpoint as one GGUF file for llama.cpp, laid out as llama.cpp's own `convert_hf_to_gguf.py` does; and a Llama of
such a file as a plain model."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict, read_gguf_metadata

from so8t.errors import ArtefactError

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""What matrices are stored in; vectors stay float32."""

_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "gpt-2": [{**_BYTES, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False},
        {**_BYTES, "use_regex": False},
    ],
}
"""llama.cpp's name of what cuts a text before byte-pair merges, and how `tokenizer.json` tells it. A wrong name goes unnoticed:
it only makes other tokens of some texts."""


def check_writable(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the tokenizer's pre-tokenizer.

    Raises:
        ArtefactError: an architecture, a setting or a tokenizer that llama.cpp, or what reads the file back, would take for
            another.
    """
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    stages = told["pre_tokenizer"] or {"type": "none"}
    stages = [{k: v for k, v in stage.items() if k != "trim_offsets"} for stage in stages.get("pretokenizers", [stages])]
    names = [name for name, known in PRE_TOKENIZERS.items() if stages == known]
    rope = config.rope_parameters["rope_type"]
    for wrong, what in (
        (config.model_type not in ARCHITECTURES, f"architecture {config.model_type} (only {', '.join(ARCHITECTURES)})"),
        (rope != "default", f"rotary embedding {rope} (only default)"),
        (config.model_type == "llama" and (config.attention_bias or config.mlp_bias), "a Llama with biases"),
        (config.to_dict().get("use_sliding_window"), "sliding-window attention"),
        (told["model"]["type"] != "BPE" or not names, "a tokenizer that is not gpt-2, smollm or qwen2"),
    ):
        if wrong:
            raise ArtefactError(f"cannot be written as GGUF: {what}; export with --to hf")
    return names[0]


def rotary_order(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q_proj or k_proj in the order of llama.cpp's Llama, which pairs neighbours where transformers pairs halves of
    a head: `[H * d, D] -> [H * d, D]`."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """The other way round: llama.cpp's order to that of transformers."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def stored(shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """What a tensor is stored in: vectors in float32, rows that are not whole blocks in float16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, kind: str, name: str) -> None:
    """Writes `model` beside its tokenizer's files, which are in `path`'s folder already. One tensor at a time exists twice.

    Raises:
        ArtefactError: it cannot be told in GGUF.
    """
    config = model.config
    pre = check_writable(config, tokenizer)
    wanted, file_type = TYPES[kind]
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer, tokenizer, path.parent, pre, config.vocab_size)

    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == gguf.MODEL_ARCH.LLAMA and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = rotary_order(tensor, heads if "q_proj" in theirs else kv_heads)
        tensors[names.get_name(theirs, try_suffixes=(".weight", ".bias"))] = tensor
    for ours, tensor in tensors.items():
        kept = stored(tuple(tensor.shape), wanted)
        block, size = gguf.GGML_QUANT_SIZES[kept]
        writer.add_tensor_info(ours, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        numbers = tensor.to(torch.float32).contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(numbers, stored(numbers.shape, wanted)))
    writer.close()


def read_llama(path: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """The Llama in a GGUF file, dequantised. transformers reads one, too, but takes the file apart three times, names each
    tensor four hundred times, and refuses to save what comes of it."""
    facts, stored_names = read_gguf_metadata(str(path))
    config = LlamaConfig(
        vocab_size=facts["tokenizer.ggml.tokens"],
        max_position_embeddings=facts["llama.context_length"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        head_dim=facts["llama.rope.dimension_count"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings="output.weight" not in stored_names,
        bos_token_id=facts.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=facts.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=facts.get("tokenizer.ggml.padding_token_id"),
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    header = GgufHeader.from_file(str(path))
    kinds, tensors = header.ggml_types, load_gguf_state_dict(header)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    read: dict[str, Tensor] = {}
    for theirs in model.state_dict():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            read[theirs] = read["model.embed_tokens.weight"]
            continue
        ours = names.get_name(theirs, try_suffixes=(".weight",))
        raw, kind = tensors[ours][:], GGMLQuantizationType(kinds[ours])
        tensor = raw if raw.is_floating_point() else torch.from_numpy(gguf.dequantize(raw.numpy(), kind))
        if theirs.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = rotary_halves(tensor, config.num_attention_heads if "q_proj" in theirs else config.num_key_value_heads)
        read[theirs] = tensor.to(dtype)
    model.load_state_dict(read, assign=True)
    model.tie_weights()
    return model


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, folder: Path, pre: str, vocab_size: int
) -> None:
    """Tokens, merges, special tokens and the chat template. Nothing is put before a text: the chat template has it all."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(vocab_size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif index in added:
            types.append(gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)
