"""A frozen base without its weights: the right tensors in the right places, filled with arbitrary numbers.

Built from a configuration alone. On the `meta` device it costs nothing and is what `so8t.memory` plans with; on a GPU it is
what `benchmarks/memory.py` measures.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from so8t.base import BaseSpec, SplitBase, compute_dtype, dequantise_once
from so8t.placement import HostEmbedding, placement, settle


class PackedLinear(nn.Module):
    """An NF4 layer made of arbitrary packed numbers: the same tensors and the same product as `Linear4bit`, no weights."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, width: int, rows: int, *, bias: bool, dtype: torch.dtype, double: bool, device: torch.device):
        super().__init__()
        blocks = -(-width * rows // 64)
        self.register_buffer("weight", torch.randint(0, 256, (-(-width * rows // 2), 1), dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.zeros(rows, dtype=dtype, device=device) if bias else None)
        scales, outer = torch.full((blocks,), 0.02, device=device), None
        if double:
            scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
            code = torch.linspace(-1, 1, 256, device=device)
            outer = QuantState(
                torch.full((-(-blocks // 256),), 0.01, device=device), code=code, blocksize=256, dtype=torch.float32
            )
        self.weight.quant_state = QuantState(  # type: ignore[attr-defined]  # where bitsandbytes has it
            scales,
            shape=torch.Size((rows, width)),
            code=torch.zeros(16, device=device),
            blocksize=64,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.tensor(0.02, device=device) if double else None,
            state2=outer,
        )

    @property
    def state(self) -> QuantState:
        """Scales and shape."""
        return self.weight.quant_state  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width] -> [..., rows]`."""
        return matmul_4bit(x, self.weight, quant_state=self.state, bias=self.bias)

    def tensors(self) -> Iterator[Tensor]:
        """What the layer stores in 4 bits: codes, scales, scales of scales, tables."""
        yield from (self.weight, self.state.absmax, self.state.code)
        if self.state.nested:
            yield from (self.state.offset, self.state.state2.absmax, self.state.state2.code)


def blank_base(
    spec: BaseSpec,
    config: PreTrainedConfig,
    *,
    cut: int,
    device: torch.device,
    on_gpu: bool,
    with_head: bool,
    linear: Callable[..., nn.Module] = PackedLinear,
) -> SplitBase:
    """A `SplitBase` of this shape with arbitrary weights, placed as `load_base` places it; it has no tokenizer. `linear` makes
    its 4-bit layers, from what `PackedLinear` takes.

    Raises:
        BaseModelError: `cut` is more than the layers there are.
        GroupError: the hidden size is not a multiple of 8.
    """
    dtype = compute_dtype(spec, torch.device("cuda" if on_gpu else "cpu"))
    packed = partial(linear, dtype=dtype, double=spec.double_quantization, device=device)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tied = bool(config.tie_word_embeddings)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and spec.quantization == "nf4" and name != "lm_head":
            model.set_submodule(name, packed(module.in_features, module.out_features, bias=module.bias is not None))
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            filled = torch.empty_like(parameter, device=device).normal_(std=0.02)
            setattr(module, key, nn.Parameter(filled, requires_grad=False))
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    base = SplitBase(spec, model, None, cut)
    where = placement(on_gpu=on_gpu, tied=tied, quantize_head=spec.quantize_head, with_head=with_head)

    def quantized(weight: Tensor) -> nn.Module:
        rows, width = weight.shape
        return packed(width, rows, bias=False)

    settle(model, where, quantized)
    if not on_gpu:
        dequantise_once(list(base.decoder.layers), spec.dense_gib)
    return base


def weights_by_part(base: SplitBase, within: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a blank base (or of a module of it) that is on the run's device, with its part."""
    for name, module in within.named_modules():
        if isinstance(module, HostEmbedding):
            continue
        head = within is base.causal_lm and name.startswith("lm_head")
        if isinstance(module, PackedLinear):
            for tensor in module.tensors():
                yield "weights_head" if head else "weights_4bit", tensor
            if module.bias is not None:
                yield "weights_other", module.bias
            dense = getattr(module, "dense", None)
            if dense is not None:
                yield "weights_dense", dense
            continue
        own = "weights_embedding" if module is base.decoder.embed_tokens else "weights_head" if head else "weights_other"
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            yield own, tensor


__all__ = ["PackedLinear", "blank_base", "weights_by_part"]
