"""What the gates are compared with: PEFT adapters on the same frozen NF4 base, under the same head, data and loss."""

from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from so8t.lightning_module import SO8TModule

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

NO_GATES = ("gate=none", "loss.task_weight=0")
# whatever steps rotations take: 1e-3 is at the upper end of what LoRA is trained with
ADAPTER_RATE = ("optim.gate_lr=0.001", "optim.gate_weight_decay=0.0")


@dataclass(frozen=True)
class Peer:
    """One thing that can be trained under the head. `adapter` makes a PEFT configuration for some layers; with
    `every_layer` these are all of the base's, which leaves no frozen prefix."""

    title: str
    overrides: tuple[str, ...] = ()
    adapter: Callable[[list[int]], PeftConfig] | None = None
    every_layer: bool = False
    cached: bool = True

    def settings(self, depth: int) -> list[str]:
        """Hydra overrides for a base of `depth` layers."""
        cut = [f"gate.top_layers={depth}"] if self.every_layer else []
        return [*self.overrides, *cut, *([] if self.cached else ["cache.max_gib=0"])]


def lora(rank: int) -> Callable[[list[int]], PeftConfig]:
    """LoRA (Hu et al. 2021, arXiv:2106.09685); over an NF4 base it is QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""
    return lambda layers: LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=LINEARS, layers_to_transform=layers, layers_pattern="layers"
    )


def oft(block: int | None = None) -> Callable[[list[int]], PeftConfig]:
    """OFT (Qiu et al. 2023, arXiv:2306.07280), blocks of `block` or PEFT's default size, in PEFT's default parametrisation."""
    size = {} if block is None else {"oft_block_size": block}
    return lambda layers: OFTConfig(target_modules=LINEARS, layers_to_transform=layers, layers_pattern="layers", **size)


class AdaptedModule(SO8TModule):
    """The same head on the same base, adapted by PEFT."""

    def inject(self, config: PeftConfig) -> None:
        """Puts the adapter into the base."""
        inject_adapter_in_model(config, self.model.base.causal_lm)

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters: all else in the base is frozen."""
        return {n: p for n, p in self.model.base.named_parameters() if p.requires_grad}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {**super().parameter_groups(), "gates_safe": list(self.adapter().values())}

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        return super().state_dict() | {f"adapter.{n}": p for n, p in self.adapter().items()}
