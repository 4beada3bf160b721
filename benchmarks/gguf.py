"""A GGUF export run by llama.cpp itself, beside the `--to hf` export of the same agent.

    .venv/bin/python -m benchmarks.gguf RUN [--requests 10] [--tokens 24]

For every type of matrix: greedy tokens of llama.cpp and of transformers on the hf export, from the same prompt; and decisions
read from llama.cpp by the code on the export's own card, beside the gated agent's. For the file itself: whether llama.cpp cuts
the run's evaluated requests into the agent's tokens. Needs `llama-cpp-python` (the extra `gguf`, built from source). Writes
`results/gguf.json`.
"""

import argparse
import contextlib
import random
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.gates import RESULTS, machine
from so8t.adapter import Agent, load_agent
from so8t.console import quieten, reported
from so8t.data.records import read_jsonl
from so8t.errors import SO8TError
from so8t.export import export_gguf, export_hf
from so8t.exported import SafetyHead
from so8t.files import write_json
from so8t.gguf_file import TYPES
from so8t.labels import LABELS

try:
    import llama_cpp
except ImportError:
    llama_cpp = None


def spoken_by_transformers(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens up to the end of the turn."""
    tokens = torch.tensor([prompt])
    mask = torch.ones_like(tokens)
    return model.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()


def spoken_by_llama_cpp(file: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The same by llama.cpp."""
    llama = llama_cpp.Llama(str(file), n_ctx=max(map(len, prompts)) + count, verbose=False)
    answers = []
    for prompt in prompts:
        answer: list[int] = []
        for token in llama.generate(prompt, temp=0, repeat_penalty=1.0):
            answer.append(token)
            if len(answer) == count or token == llama.token_eos():
                break
        answers.append(answer)
    return answers


def same_tokens(file: Path, agent: Agent, texts: list[str]) -> int:
    """How many texts llama.cpp cuts as the agent does."""
    llama = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    tokenizer = agent.template.tokenizer
    ours = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    theirs = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def head_on_the_card(folder: Path) -> SafetyHead:
    """The reader that the export's card makes for llama.cpp."""
    blocks = [part.split("```")[0] for part in (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]]
    code = next(block for block in blocks if "llama_cpp" in block)
    names: dict[str, SafetyHead] = {}
    with contextlib.chdir(folder), contextlib.redirect_stdout(None):
        exec(code, names)
    return names["head"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, evaluated, whose head reads the last state alone")
    parser.add_argument("--requests", type=int, default=10, help="drawn from the mixed test split, seed 0 (default 10)")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer (default 24)")
    args = parser.parse_args()
    with reported():
        if llama_cpp is None:
            raise SO8TError(
                "llama_cpp is not importable: pip install '.[gguf]' builds it (minutes, needs cmake and a compiler)"
            )
        quieten()
        texts = [r.user_request for f in ("test", "unseen") for r in read_jsonl(args.run / f"{f}_predictions.jsonl")[0]]
        chosen = random.Random(0).sample(read_jsonl(args.run / "test_predictions.jsonl")[0], args.requests)
        agent = load_agent(args.run, device="cpu")
        prompts = [list(agent.template.encode(r.user_request, r.context).tokens) for r in chosen]
        decided = [agent.look([agent.template.encode(r.user_request, r.context)]) for r in chosen]
        results = {}
        with tempfile.TemporaryDirectory() as work:
            export_hf(agent, Path(work) / "hf")
            plain = AutoModelForCausalLM.from_pretrained(Path(work) / "hf").eval()
            expected = [spoken_by_transformers(plain, prompt, args.tokens) for prompt in prompts]
            del plain
            for kind in TYPES:
                folder = Path(work) / kind
                file = folder / "model.gguf"
                told = export_gguf(agent, file, kind=kind)
                answers = spoken_by_llama_cpp(file, prompts, args.tokens)
                head = head_on_the_card(folder)
                read = [head.decide(r.user_request, r.context) for r in chosen]
                pairs = list(zip(read, decided, strict=True))
                results[kind] = {
                    "mib": file.stat().st_size / 2**20,
                    "requests_cut_the_same": same_tokens(file, agent, texts),
                    "answers_the_same": sum(a == b for a, b in zip(answers, expected, strict=True)),
                    "decisions_the_same": sum(label == LABELS[int(d.labels[0])] for (label, _), d in pairs),
                    "largest_probability_difference": max(
                        (torch.tensor(list(p.values())) - d.probabilities[0]).abs().max().item() for (_, p), d in pairs
                    ),
                    "relative_logit_difference_in_transformers": told.relative,
                }
                file.unlink()
    table = Table(title=f"{agent.model.base.spec.name}, {len(chosen)} requests, {len(texts)} texts cut, {args.tokens} tokens")
    table.add_column("type")
    for key in results["f32"]:
        table.add_column(key.replace("_", " "), justify="right")
    for kind, figures in results.items():
        table.add_row(kind, *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in figures.values()))
    Console(width=170).print(table)
    write_json(
        RESULTS / "gguf.json",
        {
            "base": agent.model.base.spec.name,
            "requests": len(chosen),
            "texts_cut": len(texts),
            "tokens": args.tokens,
            "calibrated": agent.policy is not None,
            "llama_cpp_python": llama_cpp.__version__,
            "machine": machine(),
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
