"""The `so8t` command: `plan` a run's memory, `ask` a trained run, `evaluate` it on any JSONL file, look after the `cache`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from so8t.console import quieten, reported
from so8t.errors import SO8TError
from so8t.labels import LABELS, Label


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="so8t", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="predict the peak memory of a training run, without GPU and weights")
    plan.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="what train.py would be given, such as +hw=rtx3060 base=qwen2.5_7b"
    )
    plan.add_argument("--json", action="store_true", help="peak_gib, fits and parts as JSON on standard output")
    plan.add_argument(
        "--plot", type=Path, metavar="PNG", help="where the picture goes (default outputs/plan.png; with --json none)"
    )
    ask = commands.add_parser("ask", help="decide one request; on ALLOW the agent answers")
    ask.add_argument("run", type=Path, help="a run's folder, such as outputs/2026-01-31/12-00-00")
    ask.add_argument("request", help="the request, or - to read it from standard input")
    ask.add_argument("--context", help="what the agent knows of the setting")
    ask.add_argument("--max-new-tokens", type=_positive, default=128, help="length of the answer (default 128)")
    ask.add_argument(
        "--gated", action="store_true", help="answer behind all gates (R_cmd included) instead of from the intact base"
    )
    ask.add_argument("--json", action="store_true", help="one JSON object on standard output")
    evaluate = commands.add_parser("evaluate", help="decide every row of a JSONL file and print the metrics")
    evaluate.add_argument("run", type=Path, help="a run's folder")
    evaluate.add_argument("--data", type=Path, required=True, help="JSONL file of records (user_request, safety_label)")
    evaluate.add_argument("--out", type=Path, help="write one prediction a row, in the file's order (JSONL)")
    evaluate.add_argument("--json", action="store_true", help="metrics as JSON on standard output")
    evaluate.add_argument("--on-bad-row", choices=("error", "skip"), default="error")
    evaluate.add_argument("--batch-size", type=_positive, default=32)
    cache = commands.add_parser("cache", help="the frozen prefix's output on disk: show or delete it")
    cache.add_argument("action", choices=("info", "clear"))
    cache.add_argument("--folder", help="as cache.folder; by default `prefix` in the cache folder")
    return parser


def _plan(args: argparse.Namespace) -> None:
    from so8t.config import compose_train, validate
    from so8t.memory import plan
    from so8t.plan_view import as_json, plot_plan, print_plan
    from so8t.remedies import remedies

    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise SO8TError(f"--plot {args.plot}: the picture is a PNG, name it so")
    config = validate(compose_train([*args.overrides]))
    console = Console(stderr=args.json, soft_wrap=True)
    with console.status("planning"):
        planned = plan(config)
    with console.status("looking for settings that fit"):
        found = remedies(config, planned)
    picture = args.plot or (None if args.json else Path("outputs/plan.png"))
    if picture is not None:
        plot_plan(config, planned, picture)
    if args.json:
        print(json.dumps(as_json(planned, found)))
        return
    print_plan(config, planned, found, console)
    console.print(f"picture: {picture}")


def _ask(args: argparse.Namespace) -> None:
    from so8t.adapter import load_agent

    request = sys.stdin.read() if args.request == "-" else args.request
    if not request.strip():
        raise SO8TError("the request is empty")
    agent = load_agent(args.run)
    decisions = agent.decide(request, args.context)
    label = Label(int(decisions.labels[0]))
    probabilities = {name: float(decisions.probabilities[0, k]) for k, name in enumerate(LABELS)}
    answer = None
    if label is Label.ALLOW:
        answer = agent.answer(request, args.context, max_new_tokens=args.max_new_tokens, gated=args.gated)
    if args.json:
        out = {"user_request": request, "decision": label.name, "probabilities": probabilities, "answer": answer}
        if bool(decisions.failed[0]):
            out["failure"] = "a logit was not finite"
        print(json.dumps(out, ensure_ascii=False))
        return
    console = Console(soft_wrap=True)
    colour = {Label.ALLOW: "green", Label.ESCALATE: "yellow", Label.REFUSE: "red"}[label]
    console.print(f"[bold {colour}]{label.name}[/]   " + "  ".join(f"{k} {v:.3f}" for k, v in probabilities.items()))
    if bool(decisions.failed[0]):
        console.print("this is a failure (a logit was not finite), not a prediction")
    if answer is not None:
        console.print(escape(answer))


def _evaluate(args: argparse.Namespace) -> None:
    from so8t.adapter import cache_for, load_agent
    from so8t.baselines import Baselines
    from so8t.data.records import read_jsonl
    from so8t.evaluation import evaluate, frozen_features, predict, print_evaluation, write_predictions

    records, report = read_jsonl(args.data, on_bad_row=args.on_bad_row)
    if args.out is not None and args.out.resolve() == args.data.resolve():
        raise SO8TError(f"--out {args.out} would overwrite the data")
    if args.out is not None and args.out.is_dir():
        raise SO8TError(f"--out {args.out} is a folder: name a file")
    agent = load_agent(args.run)
    cache = cache_for(agent)
    size = {"batch_size": args.batch_size, "cache": cache}
    title = "" if args.json else args.data.name
    predictions = predict(agent.model, records, agent.template, title=title, **size)
    folder = agent.folder.parent / "baselines"
    baselines = Baselines.load(folder) if folder.is_dir() else None
    features = frozen_features(agent.model, records, agent.template, title=title, **size) if baselines else None
    result = evaluate(args.data.name, records, predictions, baselines, features)
    if args.out is not None:
        write_predictions(args.out, records, predictions)
    if args.json:
        print(json.dumps({**result.as_json(), "bad_rows": report.skipped}, ensure_ascii=False))
        return
    console = Console()
    for line in report.skipped:
        console.print(f"left out: {escape(line)}")
    print_evaluation(result, console)
    if args.out is not None:
        console.print(f"predictions: {args.out}")


def _cache(args: argparse.Namespace) -> None:
    from so8t.data.store import clear_stores, store_root, stores

    root = store_root(args.folder)
    console = Console(soft_wrap=True)
    if args.action == "clear":
        console.print(f"{clear_stores(root) / 2**30:.2f} GiB freed in {root}")
        return
    table = Table(title=f"{root}", title_justify="left")
    for column in ("base, cut and format", "rows", "GiB"):
        table.add_column(column, justify="left" if column.startswith("base") else "right", overflow="fold")
    found = stores(root)
    for info in found:
        table.add_row(info.name, f"{info.rows:,}", f"{info.bytes / 2**30:.3f}")
    table.add_row("all", f"{sum(i.rows for i in found):,}", f"{sum(i.bytes for i in found) / 2**30:.3f}", style="bold")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    args = _parser().parse_args(argv)
    with reported():
        quieten()
        {"plan": _plan, "ask": _ask, "evaluate": _evaluate, "cache": _cache}[args.command](args)


if __name__ == "__main__":
    main()
