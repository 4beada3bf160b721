"""Which frozen layer to read, and how to pool it: linear probes on the base's states, mixed split and whole sources left out.

    .venv/bin/python -m benchmarks.reads [OVERRIDE ...]

No gate is trained here. Every reading is a set of layers (`18`, or `last` for the final norm), each with the last token, the
mean of all tokens up to it, or both. Its regularisation is chosen on validation rows. TF-IDF, fitted on the same rows, stands
beside. Writes `results/reads.json` and `results/reads.png`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import f1_score

from benchmarks.gates import RESULTS, ROOT, composed, machine
from so8t.base import load_base
from so8t.baselines import ProbeBaseline, TfidfBaseline, full_text
from so8t.config import validate
from so8t.console import quieten
from so8t.data.datamodule import RecordDataset, SafetyData
from so8t.data.records import Record
from so8t.evaluation import token_batches
from so8t.files import write_json
from so8t.model import at_position, causal_mean, unit_rms
from so8t.training import load_data

LAYERS = (8, 15, 18, 23, 26)
READINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "last norm, token": (("last", "token"),),
    "last norm, mean": (("last", "mean"),),
    "last norm, both": (("last", "both"),),
    **{f"layer {n}, both": ((str(n), "both"),) for n in LAYERS},
    "layer 18, token": (("18", "token"),),
    "layer 18 and last norm, both": (("18", "both"), ("last", "both")),
    "layers 8, 15, 23, both": (("8", "both"), ("15", "both"), ("23", "both")),
    "layers 8, 15, 23 and last norm, both": (("8", "both"), ("15", "both"), ("23", "both"), ("last", "both")),
}
PROBE_STRENGTHS = (3e-4, 1e-3, 3e-3)
TFIDF_STRENGTHS = (3.0, 10.0, 30.0)
"""`C` of the logistic regressions."""

Floats = NDArray[np.floating]
Labels = NDArray[np.int64]
Rows = NDArray[np.int64]
Fit = Callable[[Rows, float], Callable[[Rows], Floats]]
"""Learns from some rows, with a strength; what it returns gives probabilities `[n, 3]` of others."""


@torch.no_grad()
def pooled_states(data: SafetyData, rows: list[Record], config: object) -> dict[str, dict[str, Floats]]:
    """By layer and pooling, `[N, D]`, at each row's decision position."""
    base = load_base(config.base, cut=1)  # type: ignore[attr-defined]
    data.use_tokenizer(base.tokenizer)
    dataset = RecordDataset(rows, data.template)
    names = [*map(str, LAYERS), "last"]
    out = {name: {k: np.zeros((len(rows), base.hidden_size), np.float32) for k in ("token", "mean")} for name in names}
    order = sorted(range(len(rows)), key=dataset.length)
    for chosen in track(token_batches(order, dataset), description="frozen base", console=Console(stderr=True), transient=True):
        batch = dataset[chosen]
        at_cut, *kept = torch.split(base.prefix(batch.tokens, batch.mask, LAYERS), base.hidden_size, dim=-1)
        top = base.final_norm(base.suffix(at_cut, batch.mask)[0])
        for name, state in zip(names, [*kept, top], strict=True):
            scaled = unit_rms(state)
            out[name]["token"][chosen] = at_position(scaled, batch.position).numpy()
            out[name]["mean"][chosen] = at_position(unit_rms(causal_mean(scaled, batch.mask)), batch.position).numpy()
    return out


def features(states: dict[str, dict[str, Floats]], reading: tuple[tuple[str, str], ...]) -> Floats:
    """The columns of one reading: `[N, F]`."""
    columns = []
    for layer, pooling in reading:
        columns += [states[layer][kind] for kind in (("token", "mean") if pooling == "both" else (pooling,))]
    return np.concatenate(columns, axis=1)


def macro_f1(labels: Labels, probabilities: Floats) -> float:
    """Over the classes that the rows have: a source of refusals alone has one."""
    present = sorted(set(labels.tolist()))
    return float(f1_score(labels, probabilities.argmax(-1), average="macro", labels=present))


def judged(fit: Fit, strengths: tuple[float, ...], y: Labels, source: NDArray[np.str_], parts: dict[str, Rows]) -> dict:
    """Macro-F1 on each part of what `fit` learns from `train`, its strength chosen on `val`; and on each source when that is
    left out of training, with the strength in the middle: nothing of it is looked at."""
    best: dict = {}
    for strength in strengths:
        probabilities = fit(parts["train"], strength)
        found = {p: macro_f1(y[rows], probabilities(rows)) for p, rows in parts.items() if p != "train"} | {"C": strength}
        if not best or found["val"] > best["val"]:
            best = found
    middle = strengths[len(strengths) // 2]
    left_out = {}
    for name in sorted(set(source.tolist())):
        unseen = np.flatnonzero(source == name)
        left_out[name] = macro_f1(y[unseen], fit(np.flatnonzero(source != name), middle)(unseen))
    return best | {"left_out": left_out}


def probe_fit(x: Floats, y: Labels) -> Fit:
    def fit(rows: Rows, strength: float) -> Callable[[Rows], Floats]:
        probe = ProbeBaseline.fit(x[rows], y[rows].tolist(), c=strength)
        return lambda others: probe.probabilities(x[others])

    return fit


def tfidf_fit(texts: list[str], y: Labels) -> Fit:
    def fit(rows: Rows, strength: float) -> Callable[[Rows], Floats]:
        words = TfidfBaseline.fit([texts[i] for i in rows], y[rows].tolist(), c=strength)
        return lambda others: words.probabilities([texts[i] for i in others])

    return fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides")
    overrides = parser.parse_args().overrides
    quieten()
    config = validate(composed(["data.coded=0", *overrides], ROOT / "outputs"))
    data = load_data(config)
    sets = {"train": data.train, "val": data.val, "test": data.test, "unseen": data.unseen}
    rows = [record for part in sets.values() for record in part]
    ends = np.cumsum([0, *(len(part) for part in sets.values())])
    parts = {name: np.arange(a, b) for name, a, b in zip(sets, ends, ends[1:], strict=False)}
    y = np.array([int(r.safety_label) for r in rows])
    source = np.array([r.source for r in rows])
    states = pooled_states(data, rows, config)
    results = {}
    for name, reading in track(READINGS.items(), description="fitting", console=Console(stderr=True), transient=True):
        results[name] = judged(probe_fit(features(states, reading), y), PROBE_STRENGTHS, y, source, parts)
    results["TF-IDF"] = judged(tfidf_fit([full_text(r) for r in rows], y), TFIDF_STRENGTHS, y, source, parts)
    counts = {name: len(part) for name, part in sets.items()}
    write_json(RESULTS / "reads.json", {"machine": machine(), "overrides": overrides, "rows": counts, "readings": results})
    report(results)
    plot(results, RESULTS / "reads.png")


def report(results: dict) -> None:
    """Mixed split and unseen source, then every source left out in turn."""
    names = list(next(iter(results.values()))["left_out"])
    table = Table(title=f"macro-F1 of linear probes on frozen states; {machine()}", title_justify="left")
    for column in ("reading", "val", "mixed test", "unseen", *(f"without {n}" for n in names), "their mean"):
        table.add_column(column, justify="left" if column == "reading" else "right")
    for reading, found in results.items():
        out = [found["left_out"][n] for n in names]
        table.add_row(reading, *(f"{v:.3f}" for v in (found["val"], found["test"], found["unseen"], *out, np.mean(out))))
    Console(width=200).print(table)


def plot(results: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    from so8t.plots import COLOURS

    figure, axis = plt.subplots(figsize=(9, 4.5))
    means = {name: float(np.mean(list(found["left_out"].values()))) for name, found in results.items()}
    for k, (name, found) in enumerate(results.items()):
        axis.scatter([found["test"]], [k], color=COLOURS[0], zorder=3, label="mixed test split" if not k else None)
        axis.scatter(
            [means[name]], [k], color=COLOURS[1], marker="s", zorder=3, label="mean of sources left out" if not k else None
        )
        axis.scatter([found["unseen"]], [k], color=COLOURS[2], marker="^", zorder=3, label="unseen source" if not k else None)
    axis.set_yticks(range(len(results)), list(results))
    axis.invert_yaxis()
    axis.set(xlabel="macro-F1", title="Linear probes on the frozen base: what each reading gives")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
