"""Rotation gates: one trainable `Rotation`, the `NonCommutativeGate` after the final norm, and gates inside a base.

Interior gates turn the output of `o_proj` and `down_proj` in the top layers: frozen non-linear layers follow them, so
they cannot be absorbed into a trainable one. They are attached as forward hooks, act on a layer's output (so they never
need to know how the layer is stored), and leave the base bit for bit as it was when they are detached.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from so8t.base import SplitBase
from so8t.errors import ConfigError
from so8t.so8 import COORDS, DIM, MAPS, block_count, commutator_norm, determinant_drift, orthogonality_defect, rotate
from so8t.specs import Positive, PositiveInt, spec

Blocks = Literal["independent", "shared", "leading"]
MapName = Literal["exp", "cayley"]
Interior = Literal["safe", "both", "none"]
Site = Literal["o_proj", "down_proj"]

_PARENT = {"o_proj": "self_attn", "down_proj": "mlp"}


@spec
class GateSpec:
    """What `conf/gate` says: where the gates are and how they are parametrised. `last=false` and `interior=none`
    together is the head without gates."""

    interior: Interior = "safe"
    last: bool = True
    top_layers: PositiveInt = 4
    sites: tuple[Site, ...] = ("o_proj", "down_proj")
    blocks: Blocks = "independent"
    map: MapName = "exp"
    init_std: Positive = 1e-3


class Rotation(nn.Module):
    """One trainable block-diagonal rotation of a `width`-dimensional activation.

    `blocks=independent` has `width/8` blocks (28 numbers each), `shared` uses one block everywhere, `leading` turns the
    first eight dimensions only. Coordinates start small but never at exactly zero, where `R_safe` and `R_cmd` commute.
    """

    def __init__(self, width: int, spec: GateSpec):
        super().__init__()
        count = block_count(width) if spec.blocks == "independent" else 1
        self.width = width
        self.leading = spec.blocks == "leading"
        self.map = MAPS[spec.map]
        self.coords = nn.Parameter(torch.randn(count, COORDS) * spec.init_std)
        self._computed: Tensor | None = None

    def matrix(self) -> Tensor:
        """`R`: `[n, 8, 8]` in float64, differentiable in the coordinates."""
        return self.map(self.coords) if self._computed is None else self._computed

    def forward(self, x: Tensor, *, in_place: bool = False) -> Tensor:
        """`y = R x`: `[..., D] -> [..., D]`, in the dtype of `x`."""
        if not self.leading:
            return rotate(x, self.matrix(), in_place=in_place)
        return torch.cat([rotate(x[..., :DIM], self.matrix()), x[..., DIM:]], dim=-1)


class NonCommutativeGate(nn.Module):
    """`R_safe`, a tap, `R_cmd`: the safety head reads the tap, the task path goes on. The order is fixed."""

    def __init__(self, width: int, spec: GateSpec):
        super().__init__()
        self.safe = Rotation(width, spec)
        self.cmd = Rotation(width, spec)

    def tap(self, x: Tensor) -> Tensor:
        """The safety view `R_safe x`: `[..., D] -> [..., D]`."""
        return self.safe(x)

    def command(self, tapped: Tensor) -> Tensor:
        """The command view `R_cmd (R_safe x)` from the tapped one: `[..., D] -> [..., D]`."""
        return self.cmd(tapped)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both views of `x`: `([..., D], [..., D])`."""
        tapped = self.tap(x)
        return tapped, self.command(tapped)


class InteriorGate(nn.Module):
    """A gate on the output of one frozen projection: `R_safe`, or `R_cmd R_safe` with `interior=both`."""

    def __init__(self, width: int, spec: GateSpec):
        super().__init__()
        self.safe = Rotation(width, spec)
        self.cmd = Rotation(width, spec) if spec.interior == "both" else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D] -> [..., D]`; `x` is overwritten, because nothing else reads a projection's output."""
        y = self.safe(x, in_place=not self.safe.leading)
        return y if self.cmd is None else self.cmd(y)


class GateSet(nn.Module):
    """All gates of one agent, by name (`interior.26_o_proj`, `last`), and the hooks that put them into a base.

    Raises:
        ConfigError: no known site is named, or more layers are asked for than the base has.
    """

    def __init__(self, spec: GateSpec, base: SplitBase):
        super().__init__()
        if spec.interior != "none" and (not spec.sites or set(spec.sites) - set(_PARENT)):
            raise ConfigError(f"gate.sites={list(spec.sites)}: choose from {sorted(_PARENT)}")
        self.spec = spec
        self.interior = nn.ModuleDict()
        if spec.interior != "none":
            for layer in range(base.depth - spec.top_layers, base.depth):
                for site in spec.sites:
                    self.interior[f"{layer}_{site}"] = InteriorGate(base.hidden_size, spec)
        self.last = NonCommutativeGate(base.hidden_size, spec) if spec.last else None
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the interior gates act on a base at present."""
        return bool(self._handles)

    def attach(self, base: SplitBase) -> None:
        """Hooks every interior gate onto its projection. Attaching twice is an error of the caller."""
        if self._handles:
            raise ConfigError("these gates are attached already: detach them first")
        for name, gate in self.interior.items():
            layer, site = name.split("_", 1)
            module = getattr(getattr(base.decoder.layers[int(layer)], _PARENT[site]), site)
            self._handles.append(module.register_forward_hook(lambda _m, _i, out, gate=gate: gate(out)))

    def detach(self) -> None:
        """Takes every hook off; the base is again what it was, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def computed_once(self) -> Iterator[None]:
        """Inside, every rotation of the safety side keeps the matrix that it has at the entrance, all of them from one batched
        map: for a step, or an answer, during which no coordinate changes. Not around checkpointed layers, whose second run
        comes when this is over. The last `R_cmd` stays out: nothing of the task side enters what the safety side computes."""
        safety = {id(p) for p in self.safety_parameters()}
        rotations = [r for _, r in self.rotations() if id(r.coords) in safety and r._computed is None]
        if rotations:
            matrices = rotations[0].map(torch.cat([r.coords for r in rotations]))
            for rotation, matrix in zip(rotations, torch.split(matrices, [len(r.coords) for r in rotations]), strict=True):
                rotation._computed = matrix
        try:
            yield
        finally:
            for rotation in rotations:
                rotation._computed = None

    def rotations(self) -> Iterator[tuple[str, Rotation]]:
        """Every rotation by name."""
        for name, module in self.named_modules():
            if isinstance(module, Rotation):
                yield name, module

    def safety_parameters(self) -> list[nn.Parameter]:
        """Coordinates that safety decisions depend on: all but the last gate's `R_cmd`."""
        return [r.coords for name, r in self.rotations() if name != "last.cmd"]

    def command_parameters(self) -> list[nn.Parameter]:
        """Coordinates of the last gate's `R_cmd`, the only ones that the task loss reaches by default."""
        return [self.last.cmd.coords] if self.last is not None else []

    @torch.no_grad()
    def invariants(self) -> dict[str, dict[str, float]]:
        """Worst defects of each rotation (float64, and as applied in float32) and each pair's smallest commutator."""
        table: dict[str, dict[str, float]] = {}
        for name, rotation in self.rotations():
            matrix = rotation.matrix()
            applied = matrix.float()
            table[name] = {
                "orthogonality": orthogonality_defect(matrix).max().item(),
                "determinant": determinant_drift(matrix).max().item(),
                "orthogonality_float32": orthogonality_defect(applied).max().item(),
                "determinant_float32": determinant_drift(applied).max().item(),
                "angle": matrix_angle(matrix).max().item(),
            }
        for name, module in self.named_modules():
            if isinstance(module, NonCommutativeGate | InteriorGate) and module.cmd is not None:
                pair = commutator_norm(module.cmd.matrix(), module.safe.matrix())
                table[name] = {"commutator": pair.min().item(), "commutator_mean": pair.mean().item()}
        return table


def matrix_angle(rotation: Tensor) -> Tensor:
    """How far a block turns: `||R - I||_F`, `[..., 8, 8] -> [...]`, from 0 to `2 sqrt(8)`."""
    eye = torch.eye(DIM, dtype=rotation.dtype, device=rotation.device)
    return torch.linalg.matrix_norm(rotation - eye)
