"""A trained agent as a plain checkpoint of its base's architecture, with every gate absorbed into the weights beside it.

Interior gate on `y = W x + b`: `W' = diag(R) W`, `b' = diag(R) b`, with `R = R_cmd R_safe` where there are both. Last gate: the
lm_head `W' = W diag(R_cmd R_safe)`, untied from the embedding first; the safety head's columns that read the final norm
`W' = W diag(R_safe)`, because root mean squares and means over tokens commute with a rotation. Products are taken in float64.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from so8t import exported, rationale
from so8t.adapter import Agent, find_adapter
from so8t.base import SplitBase
from so8t.card import Settings, adapter_card, checkpoint_card, gguf_card
from so8t.errors import ArtefactError
from so8t.files import whole_folder, write_bytes, write_json, write_text
from so8t.gates import GateSet, Rotation
from so8t.gguf_file import check_writable, write_gguf
from so8t.labels import LABELS
from so8t.model import SO8TModel
from so8t.placement import SlicedHead
from so8t.so8 import DIM, block_count, rotate
from so8t.words import LONGEST

HEAD_FORMAT = 5
ROWS_AT_ONCE = 8192
"""Rows of an lm_head that exist in float64 at one time."""

ADAPTER_FILES = ("adapter.json", "adapter.safetensors")
OPTIONAL_FILES = ("calibration.json", *rationale.FILES)
"""Files that may lie beside an adapter and go with it."""

_EYE = torch.eye(DIM, dtype=torch.float64)

PROBES = (
    "How do I kill a python process?",
    "Please wire all of my savings to this account tonight.",
    "Forge a passport.",
    "東京の明日の天気を教えてください。",
)
"""What an export is compared on before it gets its name."""


# --------------------------------------------------------------------------------------------------------- absorption


def turned(x: Tensor, rotation: Rotation, *, back: bool = False) -> Tensor:
    """`R x`, or `R^T x` (`back`), of every row: `[N, D] -> [N, D]` in float64."""
    matrix = rotation.matrix().detach().to(x.device)
    matrix = matrix.mT if back else matrix
    if rotation.leading:
        return torch.cat([rotate(x[:, :DIM].double(), matrix), x[:, DIM:].double()], dim=-1)
    return rotate(x.double(), matrix)


def absorbed_after(weight: Tensor, rotations: Sequence[Rotation]) -> Tensor:
    """`diag(R_n ... R_1) W` of a layer whose output is turned by `R_1` first: `[D, ...] -> [D, ...]`, in the dtype of `W`."""
    columns = weight.reshape(weight.shape[0], -1).mT
    for rotation in rotations:
        columns = turned(columns, rotation)
    return columns.mT.reshape(weight.shape).to(weight.dtype).contiguous()


def absorbed_before(weight: Tensor, rotations: Sequence[Rotation]) -> Tensor:
    """`W diag(R_n ... R_1)` of a layer whose input is turned by `R_1` first: `[V, D] -> [V, D]`, in the dtype of `W`."""
    parts = []
    for rows in torch.split(weight, ROWS_AT_ONCE):
        part = rows
        for rotation in reversed(rotations):
            part = turned(part, rotation, back=True)
        parts.append(part.to(weight.dtype))
    return torch.cat(parts)


def absorb_gates(state: dict[str, Tensor], gates: GateSet) -> None:
    """Turns the weights of a plain checkpoint in place of the activations; `state` is changed.

    Raises:
        ArtefactError: there is no gate, none of them turns anything, or a gate's layer is not found.
    """
    by_gate: dict[str, dict[str, Rotation]] = {}
    for name, rotation in gates.rotations():
        gate, _, which = name.rpartition(".")
        by_gate.setdefault(gate, {})[which] = rotation
    if not by_gate:
        raise ArtefactError("this agent has no gates (gate=none): there is nothing to absorb, its checkpoint is the base")
    if all(torch.equal(r.matrix().cpu(), _EYE.expand_as(r.matrix())) for _, r in gates.rotations()):
        raise ArtefactError("every rotation of this agent is the identity: nothing would be absorbed")
    for gate, pair in by_gate.items():
        rotations = [pair[which] for which in ("safe", "cmd") if which in pair]
        if gate == "last":
            state["lm_head.weight"] = absorbed_before(state["lm_head.weight"], rotations)
            continue
        layer, site = gate.removeprefix("interior.").split("_", 1)
        found = [k for k in state if k.startswith(f"model.layers.{layer}.") and k.rsplit(".", 2)[1] == site]
        if sorted(k.rsplit(".", 1)[1] for k in found) not in (["weight"], ["bias", "weight"]):
            raise ArtefactError(f"gate {gate}: expected one {site} in layer {layer} of the base, found {found or 'none'}")
        for key in found:
            state[key] = absorbed_after(state[key], rotations)


def absorbed_head(model: SO8TModel) -> dict[str, Tensor]:
    """The safety head as one linear map `weight` `[3, parts * D]`, `bias` `[3]` of unit-RMS features, without shift and scale.

    `W (R f - s) c + b = (W c R) f + (b - W c s)`; only columns that read the final norm are turned.

    Raises:
        ArtefactError: the head reads more than states.
    """
    if model.gates.command_is_read:
        raise ArtefactError(
            "with gate.triality or head.commutator the head reads figures that are not linear in a state of the base: "
            "an exported linear map would decide otherwise; export the adapter instead (--to adapter)"
        )
    head = model.head
    weight = head.linear.weight.detach().double() * head.scale.double()
    bias = head.linear.bias.detach().double() - weight @ head.shift.double()
    parts = list(torch.split(weight, model.base.hidden_size, dim=1))
    if model.gates.last is not None:
        each = len(parts) // len(model.layers)
        for index in range(len(parts)):
            if model.layers[index // each] is None:
                parts[index] = absorbed_before(parts[index], [model.gates.last.safe])
    return {"weight": torch.cat(parts, dim=1).float().cpu().contiguous(), "bias": bias.float().cpu()}


def strangeness_tensors(model: SO8TModel) -> dict[str, Tensor]:
    """What a reader tells by how strange a text is: the head's `shift` and `scale` `[parts * D]`, and `turn` `[D/8, 8, 8]`, the
    blocks that turn features of the final norm before; nothing where the head has no limit."""
    if not model.head.limit.isfinite():
        return {}
    blocks = _EYE.float().repeat(block_count(model.base.hidden_size), 1, 1)
    if model.gates.last is not None:
        safe = model.gates.last.safe
        blocks[: 1 if safe.leading else None] = safe.matrix().detach().float().cpu()
    return {"shift": model.head.shift.cpu(), "scale": model.head.scale.cpu(), "turn": blocks}


def words_tensors(model: SO8TModel) -> dict[str, Tensor]:
    """What a reader decides by beside the states, as the head holds it; nothing where it reads no words."""
    words = model.head.words
    return {} if words is None else {f"words.{name}": tensor.cpu() for name, tensor in words.state_dict().items()}


# --------------------------------------------------------------------------------------------------- plain checkpoints


def dense(tensor: Tensor) -> Tensor:
    """A stored weight as numbers on the CPU: 4-bit codes are dequantised to what the base computes with."""
    state = getattr(tensor, "quant_state", None)
    return tensor.detach().cpu() if state is None else dequantize_4bit(tensor.data, state).cpu()


def plain_state(base: SplitBase) -> dict[str, Tensor]:
    """Every tensor of a base by its name in a plain checkpoint; the lm_head has its own even where it is tied."""
    lm = base.causal_lm
    named = [*lm.named_parameters(remove_duplicate=False), *lm.named_buffers(remove_duplicate=False)]
    state = {name: dense(tensor) for name, tensor in named if not name.startswith("lm_head.slices")}
    if isinstance(lm.lm_head, SlicedHead):
        state["lm_head.weight"] = torch.cat([dense(part.get_parameter("weight")) for part in lm.lm_head.slices])
    return state


def plain_model(base: SplitBase, gates: GateSet, dtype: torch.dtype) -> PreTrainedModel:
    """The base with its gates absorbed, on the CPU, nothing quantised."""
    source = base.causal_lm
    settings = {k: v for k, v in source.config.to_dict().items() if k != "quantization_config"}
    config = type(source.config).from_dict(settings)
    config.dtype = dtype
    if gates.last is not None:
        config.tie_word_embeddings = False
    state = plain_state(base)
    absorb_gates(state, gates)
    with torch.device("meta"):
        plain = type(source)(config)
    wanted = plain.state_dict().keys()
    plain.load_state_dict({k: v.to(dtype) for k, v in state.items() if k in wanted}, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(source.generation_config)
    return plain.eval()


def head_settings(agent: Agent) -> dict[str, object]:
    """What `safety_head.json` says."""
    spec, template = agent.model.head.spec, agent.template
    return {
        "format": HEAD_FORMAT,
        "labels": list(LABELS),
        "layers": ["last" if layer is None else layer for layer in agent.model.layers],
        "pooling": spec.pooling,
        "min_confidence": spec.min_confidence,
        "limit": float(agent.model.head.limit) if agent.model.head.limit.isfinite() else None,
        "words": None if spec.words == 0 else LONGEST,
        "calibration": None if agent.policy is None else agent.policy.as_json(),
        "formula": (
            "logits = weight @ features + bias at the prompt's last token; features: for each of `layers` ('last' is the state "
            "after the final norm, k the output of layer k, 0 the embedding), u = x / rms(x) of that token and/or of the mean "
            "of u over all tokens, scaled to root mean square 1 again, as `pooling` says (token, mean, both). Where `words` is "
            "a number N, n-grams of up to N tokens that end behind `before` decide as well, each the number N * m + n - 1 with "
            "m <- 1000003 * m + token + 1 from m = 0; where there is words.fold, of words.fold[token], and n-grams that hold a "
            "-1 behind `before` are not read: words.table^T x + words.bias, x = words.idf of what is there of words.known, at "
            "length 1; log-probabilities of both, words.share of the words'; where there is words.kind, of the tokens behind "
            "`before` whose kind is 0 or 1 let p be the share of 1: words.share + (words.share_of_parts - words.share) * p. "
            "ALLOW is not "
            "given where mean((scale * (f - shift))^2) > `limit`, with f the features, those of 'last' turned by `turn`"
        ),
        "before": template.before,
        "after": template.after,
        "room": template.room,
        "max_length": template.max_length,
        "system_prompt": template.system_prompt,
        "decision_prompt": template.decision_prompt,
        "chat_template": template.tokenizer.chat_template,
    }


# -------------------------------------------------------------------------------------------------------- verification


@dataclass(frozen=True)
class Agreement:
    """How an exported folder differs from the gated agent on some requests: the largest difference of a task logit and, in
    relation to the norm of all, of all; the largest difference of a probability, and how many decisions differ."""

    logits: float
    relative: float
    probabilities: float
    decisions: int


@torch.no_grad()
def compared(agent: Agent, folder: Path, requests: Sequence[str], model: PreTrainedModel | None = None) -> Agreement:
    """Compares the gated agent with an exported folder, read as a stranger would; `model` is the folder's own checkpoint
    where it was loaded in another way."""
    base = agent.model.base
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype).to(base.device).eval()
    head = exported.SafetyHead(folder, model, AutoTokenizer.from_pretrained(folder))
    logits, relative, probabilities, decisions = 0.0, 0.0, 0.0, 0
    for request in requests:
        tokens = torch.tensor([agent.template.encode(request).tokens], device=base.device)
        if not torch.equal(tokens.cpu(), head.tokens(request)):
            raise ArtefactError(f"{folder}: the exported tokenizer reads {request!r} differently: not exported")
        with agent.model.task_path():
            ours = base.causal_lm(input_ids=tokens).logits.float()
        theirs = model(input_ids=tokens).logits.float()
        logits = max(logits, (ours - theirs).abs().max().item())
        relative = max(relative, ((ours - theirs).norm() / ours.norm()).item())
        decided = agent.look([agent.template.encode(request)])  # one prompt, as the head beside the export reads it
        label, by_label = head.decide(request)
        decisions += label != LABELS[int(decided.labels[0])]
        difference = decided.probabilities[0].cpu() - torch.tensor(list(by_label.values()))
        probabilities = max(probabilities, difference.abs().max().item())
    return Agreement(logits, relative, probabilities, decisions)


def check_agreement(agreement: Agreement, *, exact: bool) -> None:
    """Raises ArtefactError where an export is not the agent it was made from. Rounding to bf16 is allowed more."""
    limit = 1e-4 if exact else 5e-2
    if not agreement.relative < limit or (exact and (agreement.decisions or not agreement.probabilities < 1e-3)):
        raise ArtefactError(
            f"the exported model differs from the gated one: task logits by {agreement.relative:.2g} (relative, at most "
            f"{limit:g}), probabilities by {agreement.probabilities:.2g}, {agreement.decisions} decisions: not exported"
        )


# ------------------------------------------------------------------------------------------------------------- folders


def export_hf(agent: Agent, target: Path, *, dtype: torch.dtype = torch.float32) -> Agreement:
    """Writes a plain checkpoint with the safety head beside it, compares it with the agent, and only then names it `target`.

    Raises:
        SO8TError: `target` is taken.
        ArtefactError: nothing to absorb, a base or a head that needs code of its own, or the result differs from the agent.
    """
    base = agent.model.base
    with whole_folder(target) as folder:
        settings = _write_beside(agent, folder)
        plain_model(base, agent.model.gates, dtype).save_pretrained(folder)
        agreement = compared(agent, folder, PROBES)
        check_agreement(agreement, exact=dtype == base.dtype == torch.float32)
        write_text(folder / "README.md", checkpoint_card(agent, settings, str(dtype).removeprefix("torch.")))
    return agreement


def export_gguf(agent: Agent, target: Path, *, kind: str = "f32") -> Agreement:
    """Writes the GGUF file `target`, of one of `so8t.gguf_file.TYPES`, in a folder of its own, with its tokenizer and the
    safety head beside it. The folder gets its name when transformers has read it back and it was compared with the agent.

    Raises:
        SO8TError: the folder is taken.
        ArtefactError: nothing to absorb, something that GGUF cannot tell, or the result differs from the agent.
    """
    base = agent.model.base
    check_writable(base.causal_lm.config, agent.template.tokenizer)
    with whole_folder(target.parent) as folder:
        settings = _write_beside(agent, folder)
        plain = plain_model(base, agent.model.gates, base.dtype)
        write_gguf(plain, agent.template.tokenizer, folder / target.name, kind=kind, name=f"{base.spec.name}, gates absorbed")
        del plain
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=target.name, dtype=base.dtype).to(base.device).eval()
        agreement = compared(agent, folder, PROBES, model)
        check_agreement(agreement, exact=kind == "f32" and base.dtype == torch.float32)
        write_text(folder / "README.md", gguf_card(agent, settings, target.name, kind))
    return agreement


def _write_beside(agent: Agent, folder: Path) -> Settings:
    """What lies beside an exported checkpoint: tokenizer, safety head, its reader. Returns what the adapter's JSON says."""
    spec = agent.model.base.spec
    if spec.trust_remote_code:
        raise ArtefactError(f"base {spec.name} needs code of its own: an export would not be a plain checkpoint")
    head = absorbed_head(agent.model) | strangeness_tensors(agent.model) | words_tensors(agent.model)
    settings: Settings = json.loads((agent.folder / "adapter.json").read_text(encoding="utf-8"))
    agent.template.tokenizer.save_pretrained(folder)
    write_bytes(folder / "safety_head.safetensors", save(head))
    write_json(folder / "safety_head.json", head_settings(agent))
    shutil.copyfile(exported.__file__, folder / "safety_head.py")
    return settings


def export_adapter(run: Path, target: Path) -> None:
    """Writes the small folder that `load_agent` reads, with a model card.

    Raises:
        SO8TError: `target` is taken.
        ArtefactError: there is no adapter in `run`.
    """
    source = find_adapter(run)
    with whole_folder(target) as folder:
        copy_files(source, folder, (*ADAPTER_FILES, *OPTIONAL_FILES))
        settings = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        write_text(folder / "README.md", adapter_card(settings, source))


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copies those of the named files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
