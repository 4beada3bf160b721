"""Rotation gates: one trainable `Rotation`, the gate after the final norm (with or without triality), and gates inside a base.

Interior gates turn the output of `o_proj` and `down_proj` in the top layers: frozen non-linear layers follow them, so
they cannot be absorbed into a trainable one. They are attached as forward hooks, act on a layer's output (so they never
need to know how the layer is stored), and leave the base bit for bit as it was when they are detached.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from so8t.base import SplitBase
from so8t.errors import BaseModelError, ConfigError
from so8t.so8 import COORDS, DIM, MAPS, block_count, commutator_norm, determinant_drift, orthogonality_defect, rotate
from so8t.specs import Positive, PositiveInt, spec
from so8t.triality import D_SIGMA_MINUS, D_SIGMA_PLUS, carry, trilinear_form

Blocks = Literal["independent", "shared", "leading"]
MapName = Literal["exp", "cayley"]
Interior = Literal["safe", "both", "none"]
Site = Literal["o_proj", "down_proj"]

_PARENT = {"o_proj": "self_attn", "down_proj": "mlp"}


@spec
class GateSpec:
    """What `conf/gate` says: where the gates are and how they are parametrised. `last=false` and `interior=none`
    together is the head without gates; `triality` makes the last gate a `TrialityGate`."""

    interior: Interior = "safe"
    last: bool = True
    top_layers: PositiveInt = 4
    sites: tuple[Site, ...] = ("o_proj", "down_proj")
    blocks: Blocks = "independent"
    map: MapName = "exp"
    init_std: Positive = 1e-3
    triality: bool = False


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

    def coordinates(self) -> Tensor:
        """What the map is taken of: `[n, 28]`."""
        return self.coords

    def matrix(self) -> Tensor:
        """`R`: `[n, 8, 8]` in float64, differentiable in the coordinates."""
        return self.map(self.coordinates()) if self._computed is None else self._computed

    def forward(self, x: Tensor, *, in_place: bool = False) -> Tensor:
        """`y = R x`: `[..., D] -> [..., D]`, in the dtype of `x`."""
        if not self.leading:
            return rotate(x, self.matrix(), in_place=in_place)
        return torch.cat([rotate(x[..., :DIM], self.matrix()), x[..., DIM:]], dim=-1)

    def directions(self, x: Tensor) -> Tensor:
        """The blocks of `x` that this rotation turns, scaled to length 1: `[..., D] -> [..., n, 8]`, at least in float32."""
        x = x[..., :DIM] if self.leading else x
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:-1], -1, DIM), dim=-1)


class LinkedRotation(Rotation):
    """`exp(d_sigma A)` for the `A` of another rotation: the same element of Spin(8) in another representation."""

    d_sigma: Tensor

    def __init__(self, source: Rotation, d_sigma: Tensor, spec: GateSpec):
        super().__init__(source.width, spec)
        self.register_parameter("coords", None)  # it has none of its own
        self._source = (source,)  # in a tuple, so that the parameter is listed once, where it belongs
        self.register_buffer("d_sigma", d_sigma.clone(), persistent=False)

    def coordinates(self) -> Tensor:
        """`d_sigma A`: `[n, 28]` in float64."""
        return carry(self._source[0].coords, self.d_sigma)


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

    def commutator(self, x: Tensor) -> Tensor:
        """How much the order matters to each block of `x`: `|C x| / |x|` with `C = R_safe R_cmd - R_cmd R_safe`, scaled to the
        norm of the identity: `[..., D] -> [..., n]`.

        `||C||_F` is the same for every `x`; without it the mean square over all directions is 1, however small the rotations.
        """
        safe, command = self.safe.matrix(), self.cmd.matrix()
        c = safe @ command - command @ safe
        c = c * (DIM**0.5 / torch.linalg.matrix_norm(c, keepdim=True).clamp(min=1e-12))  # less than this is rounding
        x = self.safe.directions(x)
        return torch.linalg.vector_norm(torch.einsum("nij,...nj->...ni", c.to(x.dtype), x), dim=-1)


class TrialityGate(NonCommutativeGate):
    """One `A` a block for three linked rotations: `R_cmd = exp(A)` on V, `R_safe = exp(d_sigma+ A)` on S+, and the authority's
    `exp(d_sigma- A)` on S-.

    A linear reading of the authority's view would be absorbed by the head, and the invariant form of three views of one state
    does not depend on `A`. `authority_form` is neither.

    Raises:
        ConfigError: the map is not `exp`; Cayley rotations of linked coordinates are not linked.
    """

    def __init__(self, width: int, spec: GateSpec):
        if spec.map != "exp":
            raise ConfigError(f"gate.triality=true needs gate.map=exp: {spec.map} does not carry from V to S+ and S-")
        super().__init__(width, spec)
        self.safe = LinkedRotation(self.cmd, D_SIGMA_PLUS, spec)
        self.authority = LinkedRotation(self.cmd, D_SIGMA_MINUS, spec)

    def authority_form(self, x: Tensor, tapped: Tensor, context: Tensor) -> Tensor:
        """`t(x, R_safe x, R_authority c)` of directions: the state, its safety view, and the authority's view of what the state
        is held against: three `[..., D] -> [..., n]`, in [-1, 1]. By invariance it is `t(R_cmd^T x, x, c)`.
        """
        v, plus, minus = (self.cmd.directions(y) for y in (x, tapped, self.authority(context)))
        return trilinear_form(v, plus, minus)


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


def _projection(base: SplitBase, layer: int, site: str) -> nn.Module:
    try:
        projection = getattr(getattr(base.decoder.layers[layer], _PARENT[site]), site)
    except AttributeError:
        raise BaseModelError(
            f"{base.spec.name}: layer {layer} has no {_PARENT[site]}.{site} to put a gate behind (experts have none of their "
            "own): leave it out of gate.sites, or set gate.interior=none"
        ) from None
    assert isinstance(projection, nn.Module)
    return projection


class GateSet(nn.Module):
    """All gates of one agent, by name (`interior.26_o_proj`, `last`), and the hooks that put them into a base.

    Args:
        command_is_read: decisions depend on the last `R_cmd`, as they always do with triality. It is on the safety side then:
            were it only detached from the safety loss, what the task loss makes of it would still reach every decision.

    Raises:
        ConfigError: no known site is named, more layers are asked for than the base has, or there is no last gate to be read.
        BaseModelError: a layer of the base has no such site.
    """

    def __init__(self, spec: GateSpec, base: SplitBase, *, command_is_read: bool = False):
        super().__init__()
        self.command_is_read = command_is_read or spec.triality
        if self.command_is_read and not spec.last:
            raise ConfigError("gate.triality and head.commutator are about the last gate: set gate.last=true")
        if spec.interior != "none" and (not spec.sites or set(spec.sites) - set(_PARENT)):
            raise ConfigError(f"gate.sites={list(spec.sites)}: choose from {sorted(_PARENT)}")
        self.spec = spec
        self.interior = nn.ModuleDict()
        if spec.interior != "none":
            for layer in range(base.depth - spec.top_layers, base.depth):
                for site in spec.sites:
                    _projection(base, layer, site)  # or it is told that there is none
                    self.interior[f"{layer}_{site}"] = InteriorGate(base.hidden_size, spec)
        kind = TrialityGate if spec.triality else NonCommutativeGate
        self.last = kind(base.hidden_size, spec) if spec.last else None
        self.attached = False  # whether they act at present; the last gate, which hangs on nothing, asks as well
        self._handles: list[RemovableHandle] = []

    def attach(self, base: SplitBase) -> None:
        """Hooks every interior gate onto its projection. Attaching twice is an error of the caller."""
        if self.attached:
            raise ConfigError("these gates are attached already: detach them first")
        for name, gate in self.interior.items():
            layer, site = name.split("_", 1)
            module = _projection(base, int(layer), site)
            self._handles.append(module.register_forward_hook(lambda _m, _i, out, gate=gate: gate(out)))
        self.attached = True

    def detach(self) -> None:
        """Takes every hook off; the base is again what it was, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.attached = False

    @contextmanager
    def computed_once(self) -> Iterator[None]:
        """Inside, every rotation but one keeps the matrix that it has at the entrance, all of them from one batched map: for a
        step, or an answer, during which no coordinate changes. Not around checkpointed layers, whose second run comes when this
        is over. The last `R_cmd` stays out: the task loss runs it a second time too, and nothing of the task side enters what
        the safety side computes."""
        rotations = [r for name, r in self.rotations() if name != "last.cmd" and r._computed is None]
        if rotations:
            coordinates = [r.coordinates() for r in rotations]
            matrices = rotations[0].map(torch.cat(coordinates))
            for rotation, matrix in zip(rotations, torch.split(matrices, [len(c) for c in coordinates]), strict=True):
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
        """Coordinates that safety decisions depend on: all but those of the command side."""
        command = {id(p) for p in self.command_parameters()}
        return [p for p in self.parameters() if id(p) not in command]

    def command_parameters(self) -> list[nn.Parameter]:
        """The command side, all that the task loss reaches by default: the last `R_cmd`, unless decisions depend on it."""
        return [self.last.cmd.coords] if self.last is not None and not self.command_is_read else []

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
