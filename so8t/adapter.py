"""The trained agent on disk: `adapter.safetensors` (gates, head, words it knows: a megabyte) and `adapter.json` (the rest).

`load_agent` puts an adapter back onto its base, with the policy of `so8t calibrate` where there is one. Labels, base and shapes
are checked; nothing is unpickled.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from so8t.base import BaseSpec, identity, load_base
from so8t.conversation import Prompt, Reading
from so8t.data.cache import PrefixCache
from so8t.data.tokenise import Encoded, Template, pad_rows, read_behind
from so8t.errors import ArtefactError
from so8t.files import write_bytes, write_json
from so8t.gates import GateSpec
from so8t.labels import FAIL_CLOSED, LABELS, Label
from so8t.model import Decisions, HeadSpec, SO8TModel
from so8t.policy import Policy, load_policy
from so8t.rationale import Rationales, load_rationales, save_rationales
from so8t.specs import PositiveInt, spec

FORMAT = 2

REPETITION_PENALTY = 1.1
"""A small base that answers greedily goes round in circles without one."""

OF_HEAD = ("reads", "pooling", "standardise", "words", "fold_words", "weigh_words")
"""Settings of the head under which its numbers mean what they do; of the gates all but where they begin do."""
MOST_WINDOWS = 64
"""Prompts that a text is read in. With the default room of about 150 tokens these are about 4,700."""
AT_ONCE = 64
"""Prompts in one pass at most."""


@spec
class TemplateSpec:
    """How requests became tokens in training."""

    max_length: PositiveInt
    system_prompt: str | None = None
    decision_prompt: str | None = None


def _tensors(model: SO8TModel) -> dict[str, torch.Tensor]:
    state = {**model.gates.state_dict(prefix="gates."), **model.head.state_dict(prefix="head.")}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_adapter(folder: Path, model: SO8TModel, template: Template, rationales: Rationales | None = None) -> None:
    """Writes both files, and those of the rationales, each atomically, the JSON last: an adapter with a JSON is whole."""
    if rationales is not None:
        save_rationales(folder, rationales)
    write_bytes(folder / "adapter.safetensors", save(_tensors(model)))
    write_json(
        folder / "adapter.json",
        {
            "format": FORMAT,
            "labels": list(LABELS),
            "base": dataclasses.asdict(model.base.spec),
            "base_identity": identity(model.base),
            "gate": dataclasses.asdict(model.gates.spec),
            "head": dataclasses.asdict(model.head.spec),
            "template": {name: getattr(template, name) for name in ("system_prompt", "decision_prompt", "max_length")},
        },
    )


@dataclass
class TextDecisions(Decisions):
    """Decisions on whole texts; `unread` ones would take more than `MOST_WINDOWS` and are ESCALATE at least, by their beginning
    and end."""

    unread: torch.Tensor


@dataclass
class Agent:
    """A loaded adapter on its base. With a `policy`, decisions and probabilities are the policy's. `rationales` write why a
    request is not answered."""

    model: SO8TModel
    template: Template
    folder: Path
    policy: Policy | None = None
    rationales: Rationales | None = None

    def decide(self, request: str, context: str | None = None) -> TextDecisions:
        """The decision on one request, one row."""
        return self.decide_many([(request, context)])

    def decide_many(self, requests: Sequence[tuple[str, str | None]]) -> TextDecisions:
        """The decisions on requests with their contexts, a row each, of whatever length."""
        return self.read([Reading(request, context) for request, context in requests])

    def windows(self, text: str, context: str | None = None) -> tuple[list[Encoded], bool]:
        """The prompts that a text is decided in, its beginning and end first; of one that would take more than `MOST_WINDOWS`
        that one alone, and True."""
        windows = self.template.windows(text, context)
        unread = len(windows) > MOST_WINDOWS
        return (windows[:1] if unread else windows), unread

    def read(self, readings: Sequence[Reading]) -> TextDecisions:
        """The decisions on texts, a row each: of several windows the strictest. What several texts begin with is read once."""
        places: dict[tuple[Encoded, bool], int] = {}
        windows_of: list[list[int]] = []
        unread: list[bool] = []
        for r in readings:
            windows, too_many = [self.template.encode(r.text, r.context)], False
            if r.whole:
                windows, too_many = self.windows(r.text, r.context)
            unread.append(too_many)
            windows_of.append([places.setdefault((window, r.request), len(places)) for window in windows])
        rows = list(places)
        passes = [self.look(*zip(*rows[k : k + AT_ONCE], strict=True)) for k in range(0, len(rows), AT_ONCE)]
        probabilities, labels, failed, unsure = (
            torch.cat([getattr(decided, field.name) for decided in passes]) for field in dataclasses.fields(Decisions)
        )
        strictness = list(zip(labels.tolist(), failed.tolist(), (-probabilities[:, Label.ALLOW]).tolist(), strict=True))
        kept = [max(places_of, key=strictness.__getitem__) for places_of in windows_of]
        too_long = torch.tensor(unread, device=labels.device)
        strict = torch.where(too_long, labels[kept].clamp(min=int(FAIL_CLOSED)), labels[kept])
        return TextDecisions(probabilities[kept], strict, failed[kept], unsure[kept], too_long)

    @torch.no_grad()
    def look(self, rows: Sequence[Encoded], requests: Sequence[bool] | None = None) -> Decisions:
        """The decisions on prompts, a row each, in one pass. Only `requests`, by default all, can be too strange."""
        tokens, mask = pad_rows([row.tokens for row in rows], int(self.template.tokenizer.pad_token_id or 0))
        tokens, mask = tokens.to(self.model.base.device), mask.to(self.model.base.device)
        output = self.model(self.model.prefix(tokens, mask), tokens, mask)
        limited = None if requests is None else torch.tensor(requests, device=mask.device)
        decided = self.model.decide(output, mask.sum(1) - 1, limited=limited)
        return decided if self.policy is None else self.policy.apply(decided)

    @torch.no_grad()
    def answer(self, request: str, context: str | None = None, *, max_new_tokens: int = 128, gated: bool = False) -> str:
        """What the agent says, greedy, with the base's own `generate`: the intact base, or behind all gates (`gated`).

        Behind large interior rotations the base loses its language, and `R_cmd` alone cannot bring it back.
        """
        prompt = self.template.encode_conversation(Prompt(request, context))
        tokens = torch.tensor([prompt], device=self.model.base.device)
        tokenizer = self.template.tokenizer
        with self.model.task_path() if gated else self.model.without_gates():
            out = self.model.base.causal_lm.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=REPETITION_PENALTY,
                pad_token_id=tokenizer.pad_token_id,
            )
        return str(tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)).strip()


def find_adapter(folder: Path) -> Path:
    """The adapter's folder: the one given, or `adapter/` in a run's.

    Raises:
        ArtefactError: there is none.
    """
    for place in (folder / "adapter", folder):
        if (place / "adapter.json").is_file() and (place / "adapter.safetensors").is_file():
            return place
    raise ArtefactError(f"{folder}: no adapter here; give a run's folder, such as outputs/<date>/<time>, that has adapter/")


@dataclass(frozen=True)
class Stored:
    """A trained adapter as it lies on disk, read and checked as far as that goes without its base."""

    folder: Path
    base: BaseSpec
    trained: dict[str, str]
    gate: GateSpec
    head: HeadSpec
    template: TemplateSpec
    tensors: dict[str, torch.Tensor]

    def put_on(self, model: SO8TModel) -> None:
        """Gates and head take the stored values.

        Raises:
            ArtefactError: the model is another base's, or has other gates or another head.
        """
        loaded = identity(model.base)
        compared = ["unquantized", *(["quantized"] if self.trained["device"] == loaded["device"] else [])]
        if any(self.trained[part] != loaded[part] for part in compared):
            raise ArtefactError(
                f"{self.folder}: was trained on another {self.base.name} than the one loaded now (weights differ): "
                "decisions would not be those that were measured"
            )
        expected = _tensors(model)
        odd = [
            n
            for n in expected.keys() | self.tensors.keys()
            if n not in self.tensors or n not in expected or self.tensors[n].shape != expected[n].shape
        ]
        if odd:
            raise ArtefactError(f"{self.folder}: tensors do not fit the settings: {', '.join(sorted(odd)[:4])}")
        for name, module in (("gates.", model.gates), ("head.", model.head)):
            module.load_state_dict({k.removeprefix(name): v for k, v in self.tensors.items() if k.startswith(name)})


def read_adapter(run: Path) -> Stored:
    """Reads a run's adapter.

    Raises:
        ArtefactError: it is missing, damaged, of another version or of other labels.
    """
    folder = find_adapter(Path(run))
    try:
        meta = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ArtefactError(
                f"{folder}: format {meta['format']} of another version of SO8T, expected {FORMAT}: train it again"
            )
        if tuple(meta["labels"]) != LABELS:
            raise ArtefactError(f"{folder}: labels are {meta['labels']}, expected {list(LABELS)}")
        tensors = load((folder / "adapter.safetensors").read_bytes())
        if "familiar" not in meta["head"]:  # adapters from before there was a limit
            tensors.setdefault("head.limit", torch.tensor(math.inf))
        return Stored(
            folder,
            TypeAdapter(BaseSpec).validate_python(meta["base"]),
            {part: meta["base_identity"][part] for part in ("unquantized", "quantized", "device")},
            TypeAdapter(GateSpec).validate_python(meta["gate"]),
            TypeAdapter(HeadSpec).validate_python(meta["head"]),
            TypeAdapter(TemplateSpec).validate_python(meta["template"]),
            tensors,
        )
    except (ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
        raise ArtefactError(f"{folder}: the adapter is damaged: {str(error).splitlines()[0]}") from None


def adapter_to_start_from(run: Path, gate: GateSpec, head: HeadSpec, template: TemplateSpec) -> Stored:
    """`init_from`: a run's adapter that the gates and the head of a new run can take up.

    Raises:
        ArtefactError: as `read_adapter`, or its settings mean another function of the same numbers.
    """
    stored = read_adapter(run)
    ours = {**dataclasses.asdict(gate), **{key: getattr(head, key) for key in OF_HEAD}}
    theirs = {**dataclasses.asdict(stored.gate), **{key: getattr(stored.head, key) for key in OF_HEAD}}
    other = [key for key in ours if key != "init_std" and ours[key] != theirs[key]]
    told = [f"{'head' if key in OF_HEAD else 'gate'}.{key}={theirs[key]}" for key in other]
    asked, used = (read_behind(t.system_prompt, t.decision_prompt) for t in (template, stored.template))
    if asked != used:
        told.append(f"data.decision_prompt={json.dumps(used)}")
    if told:
        raise ArtefactError(f"init_from={run}: its adapter has {', '.join(told)}: set the same")
    return stored


def load_agent(run: Path, *, device: str | None = None, with_policy: bool = True) -> Agent:
    """Loads base, gates and head of a run, its rationales and its policy; `with_policy=False` leaves `calibration.json` unread.

    Raises:
        ArtefactError: the adapter is missing, damaged, of other labels, or made for another base; or its policy is,
            or its rationales are.
    """
    folder = find_adapter(Path(run))
    policy = load_policy(folder) if with_policy else None
    stored = read_adapter(folder)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(stored.base, cut=stored.gate.top_layers, device=where)
    model = SO8TModel(base, stored.gate, stored.head)
    stored.put_on(model)
    model.requires_grad_(False).eval()
    template = Template(base.tokenizer, **dataclasses.asdict(stored.template))
    model.prompts_open_with(template.before)
    return Agent(model, template, folder, policy, load_rationales(folder, model))


def cache_for(agent: Agent) -> PrefixCache:
    """A cache that keeps rows while one evaluation reads them twice (gates on, gates off)."""
    return PrefixCache(agent.model.base, 2.0, keep=agent.model.below, lead=agent.template.before)
