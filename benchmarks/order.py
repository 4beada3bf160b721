"""What the order of the last pair is worth: trained agents read as if `R_cmd` came first, for the analysis alone.

    .venv/bin/python -m benchmarks.order RUN [RUN ...] [--part test] [--name order]

In the agent the head reads `R_safe h` and the lm_head `R_cmd R_safe h`. Reversed, `R_cmd` turns first, then `R_safe`, and both
read what comes out, `R_safe R_cmd h`. Told over a split's rows: decisions that change, figures of both orders, and, at the
decision position, how far the two orders are apart (`|R_safe R_cmd h - R_cmd R_safe h| / |h|`), the KL divergence of the next
token (nats) and how often its most likely one is another. Train with a task loss: without one `R_cmd` is what it began as.
Writes `results/NAME.json`.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.gates import RESULTS, machine, spread
from so8t.adapter import Agent, load_agent
from so8t.console import quieten, reported
from so8t.data.cache import PrefixCache
from so8t.data.datamodule import LengthSampler, RecordDataset
from so8t.data.records import Record
from so8t.errors import SO8TError
from so8t.files import write_json
from so8t.gates import NonCommutativeGate
from so8t.labels import Label
from so8t.metrics import SafetyMetrics
from so8t.model import at_position
from so8t.training import data_of

BATCH = 32


@contextmanager
def reversed_order(gate: NonCommutativeGate) -> Iterator[None]:
    """Inside, `R_cmd` comes first and the tap after both."""
    gate.tap = lambda x: gate.safe(gate.cmd(x))  # type: ignore[method-assign]
    gate.command = lambda tapped: tapped  # type: ignore[method-assign]
    try:
        yield
    finally:
        del gate.tap, gate.command


@torch.no_grad()
def measured(agent: Agent, records: list[Record]) -> dict[str, float]:
    """The figures of one agent.

    Raises:
        SO8TError: it has no last pair of its own.
    """
    model, last = agent.model.eval(), agent.model.gates.last
    if last is None or model.gates.spec.triality:
        raise SO8TError(f"{agent.folder}: there is no last pair whose order could be reversed (gate.last, gate.triality)")
    cache, dataset = PrefixCache(model.base, keep=model.below), RecordDataset(records, agent.template)
    sampler = LengthSampler([dataset.length(i) for i in range(len(dataset))], BATCH, seed=0, shuffle=False)
    metrics = {order: SafetyMetrics() for order in ("ours", "reversed")}
    changed, apart, divergence, moved = 0, 0.0, 0.0, 0
    for rows in track(sampler, description=agent.folder.parent.name, console=Console(stderr=True), transient=True):
        batch = dataset[rows]
        hidden = cache.prefix(batch.tokens, batch.mask)
        truth = torch.tensor([int(records[i].safety_label) for i in rows])
        ours = model(hidden, batch.tokens, batch.mask)
        with reversed_order(last):
            other = model(hidden, batch.tokens, batch.mask)
        decided = {}
        for order, output in (("ours", ours), ("reversed", other)):
            taken = decided[order] = model.decide(output, batch.position)
            metrics[order].update(taken.probabilities, taken.labels, truth, taken.failed, taken.unsure)
        changed += int((decided["ours"].labels != decided["reversed"].labels).sum())
        a = last.command(at_position(ours.safe_view, batch.position))
        b = at_position(other.safe_view, batch.position)
        apart += float((torch.linalg.vector_norm(a - b, dim=-1) / torch.linalg.vector_norm(a, dim=-1)).sum())
        p, q = (model.base.causal_lm.lm_head(x).float().log_softmax(-1) for x in (a, b))
        divergence += float((p.exp() * (p - q)).sum())
        moved += int((p.argmax(-1) != q.argmax(-1)).sum())
    tables = {order: table.compute() for order, table in metrics.items()}
    return {
        "decisions_changed": changed / len(records),
        **{f"{key}_{order}": tables[order][key] for key in ("macro_f1", "false_allow_rate") for order in tables},
        "states_apart": apart / len(records),
        "next_token_kl_nats": divergence / len(records),
        "next_tokens_changed": moved / len(records),
    }


def main() -> None:
    """Prints a table over all runs, and keeps each run's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--part", choices=("test", "unseen"), default="test")
    parser.add_argument("--name", default="order", help="of the file of results (default order)")
    args = parser.parse_args()
    quieten()
    found = []
    for run in args.runs:
        records = getattr(data_of(run), args.part)
        if not any(record.safety_label != Label.ALLOW for record in records):
            raise SO8TError(f"{run}: no rows of the {args.part} split could let something through")
        found.append({"run": run.name, "rows": len(records), **measured(load_agent(run, device="cpu"), records)})
    table = Table("figure", f"mean ± s.d. of {len(found)} runs", title=f"{args.part} split; {machine()}", title_justify="left")
    for key in list(found[0])[2:]:
        table.add_row(key.replace("_", " "), spread([run[key] for run in found]))
    Console().print(table)
    write_json(RESULTS / f"{args.name}.json", {"machine": machine(), "part": args.part, "runs": found})


if __name__ == "__main__":
    with reported():
        main()
