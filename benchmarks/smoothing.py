"""How steady decisions along a request are under other smoothings than the one that a run was trained with.

    .venv/bin/python -m benchmarks.smoothing RUN [RUN ...] [--smoothing 0 0.5 0.8 0.9]

`head.smoothing` changes nothing of what is trained and nothing of the decision behind a request, so runs that are there are
read again: one pass over the validation rows, where a smoothing may be chosen, and the test rows. Runs with the same tags are
one variant's seeds. Writes `results/smoothing.json`.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.gates import RESULTS, machine, spread
from so8t.adapter import Agent, load_agent
from so8t.console import quieten, reported
from so8t.data.cache import PrefixCache
from so8t.data.datamodule import LengthSampler, RecordDataset
from so8t.data.records import Record
from so8t.data.store import CacheSpec, PrefixStore
from so8t.evaluation import ALONG
from so8t.files import write_json
from so8t.metrics import flicker
from so8t.model import smoothed
from so8t.run_folder import read_run
from so8t.streaming import Stream, along
from so8t.training import data_of

BATCH = 32
AGREES = "agrees"
"""Share of rows whose last token is decided as the whole request is."""


@torch.no_grad()
def measured(agent: Agent, records: list[Record], smoothings: list[float], title: str) -> dict[float, dict[str, float]]:
    """Figures along the tokens, by smoothing."""
    model, dataset = agent.model.eval(), RecordDataset(records, agent.template)
    store = PrefixStore.of(model.base, CacheSpec(), model.below)
    cache = PrefixCache(model.base, store=store, keep=model.below, lead=agent.template.before)
    labels: list[Tensor] = []
    seen: dict[float, list[tuple[Stream, Tensor, Tensor]]] = defaultdict(list)
    sampler = LengthSampler([dataset.length(i) for i in range(len(dataset))], BATCH, seed=0, shuffle=False)
    for rows in track(sampler, description=title, console=Console(stderr=True), transient=True):
        batch = dataset[rows]
        output = model(cache.prefix(batch.tokens, batch.mask), batch.tokens, batch.mask)
        behind = output.logits[torch.arange(len(rows)), batch.position].argmax(-1)
        labels.append(batch.labels)
        places = torch.arange(batch.path.shape[1])
        last = torch.where(batch.path, places, -1).amax(1)
        for smoothing in smoothings:
            logits = smoothed(output.logits, batch.path, smoothing)
            agree = logits[torch.arange(len(rows)), last].argmax(-1) == behind
            seen[smoothing].append((along(logits, batch.path), flicker(logits, batch.path)[1], agree[last >= 0]))
    truth = torch.cat(labels)
    told = {}
    for smoothing, parts in seen.items():
        streams, changes, agree = zip(*parts, strict=True)
        whole = Stream(*(torch.cat([getattr(s, name) for s in streams]) for name in ("tokens", "detection", "alarms")))
        told[smoothing] = {
            **whole.figures(truth),
            "decision_changes": float(torch.cat(changes).nanmean()),
            AGREES: float(torch.cat(agree).float().mean()),
        }
    return told


def main() -> None:
    """Reads the runs, prints a table a set, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--smoothing", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9])
    args = parser.parse_args()
    quieten()
    with reported():
        told = []
        for run in args.runs:
            agent, data, tags = load_agent(run, with_policy=False), data_of(run), read_run(run).setting("tags")
            variant = ", ".join(map(str, tags)) if isinstance(tags, list) and tags else "default"
            for part in ("val", "test", "unseen"):
                if records := getattr(data, part):
                    by_smoothing = measured(agent, records, args.smoothing, f"{run}: {part}")
                    told += [{"set": part, "variant": variant, "smoothing": s, **f} for s, f in by_smoothing.items()]
        write_json(RESULTS / "smoothing.json", {"machine": machine(), "runs": told})
        table = Table("set", "variant", "smoothing", "runs", *(head for _, head, _ in ALONG), "last token decided as the whole")
        groups: dict[tuple[object, ...], list[dict[str, Any]]] = defaultdict(list)
        for one in told:
            groups[one["set"], one["variant"], one["smoothing"]].append(one)
        for key, runs in groups.items():
            figures = ([one[figure] for one in runs] for figure in (*(figure for figure, *_ in ALONG), AGREES))
            table.add_row(*map(str, key), str(len(runs)), *map(spread, figures))
        Console(width=160).print(table)


if __name__ == "__main__":
    main()
