"""The sizes of the bases that `conf/base` names, so that planning needs neither weights nor a network.

Each table is what the model's own `config.json` says (read on its public page); everything else in that file is not a size.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from so8t.base import SMOLLM2_WHEEL, BaseSpec, tiny_config
from so8t.errors import BaseModelError
from so8t.fetch import offline

_SMOLLM2_135M = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def _qwen2(hidden: int, layers: int, heads: int, kv: int, intermediate: int, vocab: int, tied: bool) -> dict[str, Any]:
    # Qwen2 has a bias on q, k and v, and none elsewhere: its class in transformers knows that
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (LlamaConfig, _SMOLLM2_135M),
    SMOLLM2_WHEEL.requirement: (LlamaConfig, _SMOLLM2_135M),
    "Qwen/Qwen2.5-0.5B-Instruct": (Qwen2Config, _qwen2(896, 24, 14, 2, 4864, 151936, True)),
    "Qwen/Qwen2.5-1.5B-Instruct": (Qwen2Config, _qwen2(1536, 28, 12, 2, 8960, 151936, True)),
    "Qwen/Qwen2.5-7B-Instruct": (Qwen2Config, _qwen2(3584, 28, 28, 4, 18944, 152064, False)),
    "Qwen/Qwen2.5-14B-Instruct": (Qwen2Config, _qwen2(5120, 48, 40, 8, 13824, 152064, False)),
}

NAMED = {
    "qwen2.5_14b": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2.5_7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5_1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5_0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
}
"""The bases that one can step down to by name, largest first."""


def is_at_hand(spec: BaseSpec) -> bool:
    """Whether `base_config` asks no network and runs no code of the base's own."""
    local = spec.source == "hub" and not spec.trust_remote_code and Path(spec.model_id).is_dir()
    return spec.source != "hub" or spec.model_id in SHAPES or local


def base_config(spec: BaseSpec) -> PreTrainedConfig:
    """The configuration of a base: shipped for those that we name, a local folder's own `config.json`, or the hub's.

    Raises:
        BaseModelError: there is no configuration to be had.
    """
    if spec.source == "random":
        return tiny_config(spec)
    name = SMOLLM2_WHEEL.requirement if spec.source == "wheel" else spec.model_id
    if name in SHAPES and not Path(name).is_dir():
        kind, sizes = SHAPES[name]
        return kind(**sizes)
    try:
        trust = {"trust_remote_code": True} if spec.trust_remote_code else {}
        return AutoConfig.from_pretrained(name, revision=spec.revision, local_files_only=offline(), **trust)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"base {spec.name}: no config.json for {name!r}: {str(error).strip().splitlines()[0]} "
            f"(sizes are shipped for {', '.join(k for k in SHAPES if '/' in k)}; for another base give its folder as "
            "base.model_id)"
        ) from error


__all__ = ["NAMED", "SHAPES", "base_config", "is_at_hand"]
