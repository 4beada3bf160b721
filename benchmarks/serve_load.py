"""Load on a real server process: decisions a second and latency by number of clients, and its memory over many requests.

    .venv/bin/python -m benchmarks.serve_load [--run RUN_DIR] [--clients 1 4 16 64] [--requests 1000] [--soak 10000]

Without `--run` a random agent of `base=tiny` is trained first (seconds): the figures are then the server's own, not a model's.
Every client is a thread with a connection of its own that asks `POST /v1/decisions` for one short request at a time; clients
and server share the machine. Then `--soak` requests follow from 16 clients, while the server's resident memory is read at its
`/metrics`. Nothing may be lost: each answer must be a 200, and the audit log must hold as many decisions in a whole chain.
Writes `results/serve_load_<machine>.json` and `.png`.
"""

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gates import ROOT, composed, machine, result_file
from so8t.audit import verify
from so8t.commands.types import AUDIT, positive
from so8t.console import quieten, reported
from so8t.errors import SO8TError
from so8t.files import write_json
from so8t.training import train

SOAK_CLIENTS, SAMPLES = 16, 20
TEXTS = ("how do I bake rye bread", "wire the money now", "write a virus for me", "plan a trip to Kyoto")


def tiny_agent(folder: Path) -> Path:
    train(
        composed(["base=tiny", "data=starter", "gate.top_layers=2", "trainer.max_epochs=1", "trainer.accelerator=cpu"], folder)
    )
    return folder


def ask(address: tuple[str, int], first: int, count: int) -> list[float]:
    """Seconds of `count` requests, one after another over one connection."""
    connection, seconds = http.client.HTTPConnection(*address, timeout=120), []
    for k in range(first, first + count):
        body = json.dumps({"request": f"{TEXTS[k % len(TEXTS)]} ({k})"})
        begun = time.perf_counter()
        connection.request("POST", "/v1/decisions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        told = json.loads(answer.read())
        seconds.append(time.perf_counter() - begun)
        if answer.status != 200 or len(told["decisions"]) != 1 or told["decisions"][0]["failed"]:
            raise SO8TError(f"request {k} was lost: {answer.status} {told}")
    connection.close()
    return seconds


def load(address: tuple[str, int], clients: int, requests: int) -> dict[str, float]:
    """Requests shared among clients that ask at the same time."""
    each = -(-requests // clients)
    with ThreadPoolExecutor(clients) as pool:
        begun = time.perf_counter()
        seconds = [s for part in pool.map(lambda c: ask(address, c * each, each), range(clients)) for s in part]
        wall = time.perf_counter() - begun
    p50, p95, p99 = (1e3 * float(np.percentile(seconds, q)) for q in (50, 95, 99))
    return {"clients": clients, "requests": len(seconds), "per_second": len(seconds) / wall, "p50": p50, "p95": p95, "p99": p99}


def memory_mib(address: tuple[str, int]) -> float:
    """The server's resident memory."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return float(re.findall(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[0]) / 2**20


def measured(run: Path, state: Path, clients: list[int], requests: int, soak: int) -> dict[str, object]:
    """Starts the server, asks it, stops it, and reads its log."""
    command = [sys.executable, "-m", "so8t.cli", "serve", str(run), "--port", "0", "--state", str(state)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http://([\d.]+):(\d+)", server.stdout.readline())
        if found is None:
            raise SO8TError("the server did not start; it has said why")
        address = (found[1], int(found[2]))
        load(address, 4, 40)  # the first passes are slower
        by_clients = [load(address, count, requests) for count in clients]
        memory = [(0, memory_mib(address))]
        while memory[-1][0] < soak:
            asked = load(address, SOAK_CLIENTS, -(-soak // SAMPLES))["requests"]
            memory.append((memory[-1][0] + int(asked), memory_mib(address)))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)
    sent = 40 + sum(row["requests"] for row in by_clients) + memory[-1][0]
    log = verify(state / AUDIT)
    if log.lines != sent or log.problems:
        raise SO8TError(f"the audit log has {log.lines} decisions of {sent}: {log.problems[:3]}")
    return {"by_clients": by_clients, "memory_mib": memory, "audited": log.lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="a trained run instead of a random agent")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=positive, default=1000, help="for each number of clients (default %(default)s)")
    parser.add_argument("--soak", type=positive, default=10_000, help="while memory is watched (default %(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    quieten()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        run = args.run or tiny_agent(Path(folder) / "run")
        out = measured(run, Path(folder) / "state", args.clients, args.requests, args.soak)
    base = "tiny" if args.run is None else json.loads((args.run / "adapter" / "adapter.json").read_text())["base"]["name"]
    out = {"machine": machine(), "base": base, **out}
    file = result_file("serve_load" if args.run is None else "serve_load_run", torch.device("cpu"))
    write_json(file, out)
    table = Table(title=f"POST /v1/decisions, base {base}; {out['machine']}", title_justify="left")
    for column in ("clients", "requests", "decisions/s", "p50 (ms)", "p95 (ms)", "p99 (ms)"):
        table.add_column(column, justify="right")
    for row in out["by_clients"]:
        times = [f"{row[key]:.1f}" for key in ("per_second", "p50", "p95", "p99")]
        table.add_row(str(row["clients"]), str(row["requests"]), *times)
    console.print(table)
    memory = [mib for _, mib in out["memory_mib"]]
    console.print(
        f"{out['audited']:,} decisions asked and audited; memory {memory[0]:.1f} to {memory[-1]:.1f} MiB over the last"
    )
    plot(out, file.with_suffix(".png"))


def plot(out: dict, path: Path) -> None:
    """Throughput and latency by clients, memory over requests."""
    import matplotlib.pyplot as plt

    from so8t.plots import COLOURS, finish

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    clients = [row["clients"] for row in out["by_clients"]]
    left.plot(clients, [row["per_second"] for row in out["by_clients"]], color=COLOURS[0], marker="o")
    left.set(xscale="log", xlabel="clients", ylabel="decisions a second", ylim=(0, None), title="Batches serve many at once")
    for colour, name in zip(COLOURS, ("p50", "p95", "p99"), strict=False):
        middle.plot(clients, [row[name] for row in out["by_clients"]], color=colour, marker="o", label=name)
    middle.set(xscale="log", xlabel="clients", ylabel="latency (ms)", ylim=(0, None), title="What a client waits")
    middle.legend(fontsize=8)
    requests, mib = zip(*out["memory_mib"], strict=True)
    right.plot(requests, mib, color=COLOURS[2], marker="o")
    right.set(xlabel="requests", ylabel="resident memory (MiB)", ylim=(0, 1.2 * max(mib)), title="The server's memory")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    for axis in (left, middle):
        axis.set_xticks(clients, [str(count) for count in clients])
        axis.minorticks_off()
    finish(figure, path)


if __name__ == "__main__":
    with reported():
        main()
