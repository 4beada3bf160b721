"""What of a frozen base a GPU run keeps on the GPU, and in which form.

The embedding stays on the host: a step looks up a few rows, and only they travel. The lm_head is left out when no term of
the loss needs it, and can be kept in NF4, in slices, so that it is never dequantised as a whole. Knows nothing of gates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from so8t.errors import BaseModelError


@dataclass(frozen=True)
class Placement:
    """`embedding`: on the run's device or on the host. `head`: `tied` is the embedding's own tensor, `plain` one of its
    own, `nf4` quantised, `absent` left out."""

    embedding: Literal["device", "host"]
    head: Literal["tied", "plain", "nf4", "absent"]


def placement(*, on_gpu: bool, tied: bool, quantize_head: bool, with_head: bool) -> Placement:
    """The cheapest place for each part. On the CPU nothing is left out: there is no second memory to save."""
    if on_gpu and not with_head:
        return Placement("host", "absent")
    head: Literal["tied", "plain", "nf4"] = "nf4" if quantize_head else "tied" if tied else "plain"
    # a tied tensor is on the GPU for the head's sake already: looking up there costs nothing more
    return Placement("host" if on_gpu and head != "tied" else "device", head)


class HostEmbedding(nn.Module):
    """The embedding on the CPU, whatever the rest of the model is moved to: `[B, T] -> [B, T, D]` on the tokens' device."""

    weight: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        # a buffer: transformers takes the first parameter's device for the device of the model
        self.register_buffer("weight", weight.detach())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostEmbedding":
        return self  # `model.to(device)` passes by

    def forward(self, tokens: Tensor) -> Tensor:
        """Looks up on the host; the rows travel."""
        return F.embedding(tokens.to(self.weight.device), self.weight).to(tokens.device)


class SlicedHead(nn.Module):
    """An lm_head in slices of the vocabulary: `[..., D] -> [..., V]`. Only one slice is ever dequantised at a time."""

    def __init__(self, slices: list[nn.Module]):
        super().__init__()
        self.slices = nn.ModuleList(slices)

    def forward(self, x: Tensor) -> Tensor:
        """All logits."""
        return torch.cat([part(x) for part in self.slices], dim=-1)


class AbsentHead(nn.Module):
    """Stands where an lm_head was left out."""

    def forward(self, x: Tensor) -> Tensor:
        """Raises BaseModelError: there are no logits here."""
        raise BaseModelError("this base was loaded without its lm_head (loss.task_weight=0): it cannot speak, load it anew")


def quantized_linear(weight: Tensor, *, dtype: torch.dtype, double: bool, device: torch.device) -> nn.Module:
    """A frozen NF4 linear layer without bias: `weight` `[out, in]` is moved to `device` and quantised there."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, width = weight.shape
    with torch.device("meta"):
        layer = Linear4bit(width, rows, bias=False, compute_dtype=dtype, compress_statistics=double, quant_type="nf4")
    packed = Params4bit(weight.detach(), requires_grad=False, compress_statistics=double, quant_type="nf4")
    layer.weight = packed.to(device)
    layer.support_avx512bf16_for_cpu = False  # its repacked layout has no backward
    return layer.eval()


def quantize_linears(causal_lm: nn.Module, quantized: Callable[[Tensor], nn.Module]) -> None:
    """Quantises every linear layer but the lm_head, one after the other, as transformers would while it loads."""
    for name, module in list(causal_lm.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = quantized(module.weight)
            layer.bias = module.bias
            causal_lm.set_submodule(name, layer)


def settle(causal_lm: Any, where: Placement, quantized: Callable[[Tensor], nn.Module]) -> None:  # noqa: ANN401
    """Puts embedding and lm_head of a transformers model into place; `quantized` makes an NF4 layer of `[rows, D]`."""
    weight, embedding = causal_lm.lm_head.weight, causal_lm.model.embed_tokens.weight
    if where.head == "nf4":
        # no taller than the MLP's projections, so that a slice's dequantised buffer is not the largest there is
        tallest = int(causal_lm.config.get_text_config().intermediate_size)
        count = -(-weight.shape[0] // tallest)
        causal_lm.lm_head = SlicedHead([quantized(part) for part in weight.split(-(-weight.shape[0] // count))])
    elif where.head == "absent":
        causal_lm.lm_head = AbsentHead()
    if where.embedding == "host":
        causal_lm.model.embed_tokens = HostEmbedding(embedding if embedding.is_meta else embedding.cpu())


__all__ = [
    "AbsentHead",
    "HostEmbedding",
    "Placement",
    "SlicedHead",
    "placement",
    "quantize_linears",
    "quantized_linear",
    "settle",
]
