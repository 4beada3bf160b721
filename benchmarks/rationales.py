"""What a run's rationales are worth, on rows of the starter set's test split that are not ALLOW.

    .venv/bin/python -m benchmarks.rationales RUN [--rows 20] [--learn 120]

Perplexity of people's rationales without what was learned (no examples, no rotation), with the examples, and with both; of what
is written for the same rows, how much is distinct, dropped and why, its length and time; and how many of the people's
own the checks would drop. Rows by language and label, `--rows` of each. A run without rationales learns them now, from its
training rows, and keeps nothing. Writes `results/rationales.json`.
"""

import argparse
import random
import statistics
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gates import RESULTS, machine
from so8t.adapter import Agent, load_agent
from so8t.agent import SafeAgent
from so8t.console import quieten
from so8t.conversation import Reading
from so8t.data.records import Record
from so8t.files import write_json
from so8t.labels import Label
from so8t.rationale import Rationales, fault
from so8t.rationale_training import RationaleSpec, explained, learn, perplexity, states
from so8t.training import data_of

BATCH = 8


def dropped(safe: SafeAgent, rationales: Rationales, record: Record, text: str) -> str | None:
    """Why the agent would not say `text`, if it would not."""
    examples = rationales.examples_for(record.user_request, record.safety_label)
    wrong = fault(text, record.user_request, record.context, examples)
    if wrong is None and safe.verdicts([Reading(text)])[0].label > record.safety_label:
        return "the head reads it as worse than the request"
    return wrong


def measured(agent: Agent, rationales: Rationales, records: list[Record]) -> dict[str, object]:
    """The figures of rows of one language and label."""
    safe, model, template = SafeAgent(agent), agent.model, agent.template
    bare = Rationales(model.base.hidden_size, {})
    plain = states(model, template, bare, records, batch_size=BATCH)
    with_examples = states(model, template, rationales, records, batch_size=BATCH)
    rows, seconds = [], []
    for record in records:
        begun = time.perf_counter()
        *_, written = rationales.write(
            model, template, record.user_request, record.context, record.safety_label, every=safe.watch_every
        )
        seconds.append(time.perf_counter() - begun)
        rows.append(
            {
                "user_request": record.user_request,
                "written": written.text,
                "tokens": written.tokens,
                "log_probability": round(written.log_probability, 3),
                "dropped": dropped(safe, rationales, record, written.text),
                "person": record.safety_rationale,
                "person_dropped": dropped(safe, rationales, record, record.safety_rationale or ""),
            }
        )
    said = [row for row in rows if row["dropped"] is None]
    return {
        "rows": len(records),
        "perplexity": {
            "without": perplexity(model, None, plain),
            "examples": perplexity(model, None, with_examples),
            "examples_and_rotation": perplexity(model, rationales, with_examples),
        },
        "said": len(said),
        "distinct": len({row["written"] for row in said}),
        "dropped": dict(Counter(str(row["dropped"]) for row in rows if row["dropped"])),
        "person_dropped": dict(Counter(str(row["person_dropped"]) for row in rows if row["person_dropped"])),
        "mean_tokens": statistics.fmean(int(str(row["tokens"])) for row in rows),
        "median_seconds": statistics.median(seconds),
        "texts": rows,
    }


def main() -> None:
    """Prints a table and what was written, and keeps both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--learn", type=int, default=120, help="training rows, for a run without rationales")
    args = parser.parse_args()
    quieten()
    console = Console(soft_wrap=True)
    agent, data = load_agent(args.run), data_of(args.run)
    rationales, learned = agent.rationales, None
    if rationales is None:
        begun = time.perf_counter()
        spec = RationaleSpec(rows=args.learn)
        rationales = learn(agent.model, agent.template, data.train, spec, batch_size=BATCH, seed=0)
        learned = time.perf_counter() - begun
    if rationales is None:
        raise SystemExit("this run's training rows have no rationales")
    table = Table("language, label", "rows", "perplexity without", "examples", "+ rotation", "said", "distinct", "tokens", "s")
    results: dict[str, dict[str, object]] = {}
    by_kind = explained([record for record in data.test if record.source == "starter"])
    for (kind, label), records in sorted(by_kind.items()):
        chosen = random.Random(0).sample(records, min(args.rows, len(records)))
        found = results[f"{kind}/{Label(label).name}"] = measured(agent, rationales, chosen)
        p = found["perplexity"]
        assert isinstance(p, dict)
        figures = [*p.values(), found["said"], found["distinct"], found["mean_tokens"], found["median_seconds"]]
        table.add_row(f"{kind} {Label(label).name}", str(found["rows"]), *(f"{figure:.4g}" for figure in figures))
        console.print(f"{kind} {Label(label).name}: dropped {found['dropped']}, of people's {found['person_dropped']}")
        for row in found["texts"]:  # type: ignore[attr-defined]
            told = f" [{row['dropped']}]" if row["dropped"] else ""
            console.print(f"  {row['user_request']!r}\n    -> {row['written']!r}{told}", markup=False, highlight=False)
    console.print(table)
    write_json(RESULTS / "rationales.json", {"machine": machine(), "seconds_to_learn": learned, "results": results})


if __name__ == "__main__":
    main()
