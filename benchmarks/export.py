"""What it costs to quantise an exported checkpoint again, or to store it in bf16: logits, language and decisions.

    .venv/bin/python -m benchmarks.export RUN [--data FILE.jsonl] [--rows N]
    .venv/bin/python -m benchmarks.export RUN --data RUN/test_predictions.jsonl --rows 740 --kinds float32 --name export_test

Exports the run in float32 into a temporary folder, reads that folder with transformers as it is, in NF4 (double quantisation,
the embedding and the lm_head left as they are) and in bf16 weights computed in float32, and compares each with the gated agent
on the same rows: largest logit difference, mean KL divergence of the next-token distributions over all prompt tokens (nats),
share of tokens whose most likely next token changed, and share of rows whose decision (the policy's, where there is one)
changed. By default the rows are drawn from those of the run's unseen source; the second line is about a whole test split.
Writes `results/export.json`.
"""

import argparse
import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.gates import RESULTS, machine
from so8t.adapter import Agent, load_agent
from so8t.base import BaseSpec, load_base
from so8t.console import quieten, reported
from so8t.data.records import Record, read_jsonl
from so8t.export import export_hf
from so8t.exported import SafetyHead
from so8t.files import write_json
from so8t.labels import LABELS
from so8t.metrics import SafetyMetrics

KINDS = {"float32": "float32, as exported", "bf16": "bf16 weights", "nf4": "NF4 again"}


def loaded(folder: Path, kind: str) -> PreTrainedModel:
    """The exported checkpoint in one of the three forms; all of them compute in float32."""
    if kind == "nf4":
        spec = BaseSpec(name="exported", source="hub", model_id=str(folder), compute_dtype="float32")
        return load_base(spec, cut=1).causal_lm
    rounded = torch.bfloat16 if kind == "bf16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, dtype=rounded).float().eval()


@torch.no_grad()
def compared(agent: Agent, folder: Path, records: Sequence[Record], kind: str) -> dict[str, float]:
    """The figures of one form of the checkpoint over all rows."""
    model = loaded(folder, kind)
    head = SafetyHead(folder, model, AutoTokenizer.from_pretrained(folder))
    largest, divergence, moved, tokens_seen, probability, changed = 0.0, 0.0, 0, 0, 0.0, 0
    metrics = {"gated": SafetyMetrics(), "folder": SafetyMetrics()}
    no = torch.zeros(1, dtype=torch.bool)
    for record in track(records, description=KINDS[kind], console=Console(stderr=True), transient=True):
        tokens = torch.tensor([agent.template.encode(record.user_request, record.context).tokens])
        mask = torch.ones_like(tokens)
        output = agent.model(agent.model.prefix(tokens, mask), tokens, mask)
        ours, theirs = agent.model.task_logits(output.safe_view)[0], model(input_ids=tokens).logits[0]
        largest = max(largest, (ours - theirs).abs().max().item())
        p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        moved += int((ours.argmax(-1) != theirs.argmax(-1)).sum())
        tokens_seen += len(ours)
        decided = agent.model.decide(output, torch.tensor([tokens.shape[1] - 1]))
        if agent.policy is not None:
            decided = agent.policy.apply(decided)
        label, by_label = head.decide(record.user_request, record.context)
        probabilities = torch.tensor([list(by_label.values())])
        probability = max(probability, (probabilities - decided.probabilities).abs().max().item())
        changed += label != LABELS[int(decided.labels[0])]
        truth = torch.tensor([int(record.safety_label)])
        metrics["gated"].update(decided.probabilities, decided.labels, truth, no, no)
        metrics["folder"].update(probabilities, torch.tensor([LABELS.index(label)]), truth, no, no)
    figures = {who: table.compute() for who, table in metrics.items()}
    return {
        "largest_logit_difference": largest,
        "mean_kl_nats": divergence / tokens_seen,
        "share_of_next_tokens_changed": moved / tokens_seen,
        "largest_probability_difference": probability,
        "share_of_decisions_changed": changed / len(records),
        "macro_f1_gated": figures["gated"].get("macro_f1", math.nan),
        "macro_f1": figures["folder"].get("macro_f1", math.nan),
        "false_allow_rate_gated": figures["gated"].get("false_allow_rate", math.nan),
        "false_allow_rate": figures["folder"].get("false_allow_rate", math.nan),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--data", type=Path, help="JSONL rows (default: RUN/unseen_predictions.jsonl)")
    parser.add_argument("--rows", type=int, default=100, help="rows drawn from them, seed 0 (default 100)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--name", default="export", help="name of the file in benchmarks/results")
    args = parser.parse_args()
    with reported():
        quieten()
        data = args.data or args.run / "unseen_predictions.jsonl"
        records, _ = read_jsonl(data)
        chosen = random.Random(0).sample(records, min(args.rows, len(records)))
        agent = load_agent(args.run, device="cpu")
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "hf"
            export_hf(agent, folder)
            results = {KINDS[kind]: compared(agent, folder, chosen, kind) for kind in args.kinds}
    table = Table(title=f"{agent.model.base.spec.name}, {len(chosen)} rows of {data.name}, against the gated agent")
    table.add_column("checkpoint")
    for key in next(iter(results.values())):
        table.add_column(key.replace("_", " "), justify="right")
    for kind, figures in results.items():
        table.add_row(kind, *(f"{value:.3g}" for value in figures.values()))
    Console(width=200).print(table)
    write_json(
        RESULTS / f"{args.name}.json",
        {"base": agent.model.base.spec.name, "rows": len(chosen), "data": data.name, "machine": machine(), "results": results},
    )


if __name__ == "__main__":
    main()
