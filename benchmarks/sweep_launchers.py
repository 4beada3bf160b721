"""A small sweep under every launcher that is installed: how long it takes, and whether its results equal the basic launcher's.

    .venv/bin/python -m benchmarks.sweep_launchers [--launchers basic joblib ray submitit_local ray_cluster]

Three variants and two seeds of `base=tiny` on part of the starter set, one thread a process, one prefix cache for all jobs of a
launcher; two workers with joblib and Ray, all jobs at once with submitit. Equal means: the same metrics and the same
predictions, byte for byte. Times tell nothing where other processes were running: the load before each is kept beside them.
`ray_cluster` alone has to be asked for: it wants one that is there (`ray start --head --num-cpus=2`).
Writes `results/sweep_launchers.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gates import RESULTS, ROOT, machine
from so8t.files import write_json

LAUNCHERS = {
    "basic": ("hydra-core", []),
    "joblib": ("hydra-joblib-launcher", ["hydra.launcher.n_jobs=2"]),
    "ray": ("hydra-ray-launcher", ["+hydra.launcher.ray.init.num_cpus=2"]),
    "submitit_local": ("hydra-submitit-launcher", []),
    "ray_cluster": ("hydra-ray-launcher", ["hydra.launcher.ray.remote.num_gpus=0", "hydra.launcher.ray.remote.num_cpus=1"]),
}
"""The package that brings it, and what makes two workers of it."""
SWEEP = ["hparams_search=task", "seed=0,1"]
ROWS = 120
"""Of the starter set, spread over all of it."""


def starter_rows(file: Path) -> None:
    """Part of the starter set, in both languages."""
    lines = [
        line for part in sorted((ROOT / "so8t/data/starter").glob("*.jsonl")) for line in part.read_text("utf-8").splitlines()
    ]
    file.write_text("\n".join(lines[:: len(lines) // ROWS][:ROWS]) + "\n", encoding="utf-8")


def sweep(launcher: str, settings: list[str], folder: Path) -> float | str:
    """Runs it in a process of its own; seconds of wall time, imports included, or the last line of what went wrong."""
    command = [
        sys.executable, "train.py", "-m", *SWEEP, f"hydra/launcher={launcher}", *settings, f"hydra.sweep.dir={folder}/sweep",
        "base=tiny", "gate.top_layers=2", "data=jsonl", f"data.path={folder.parent}/rows.jsonl", f"cache.folder={folder}",
        "trainer.accelerator=cpu", "trainer.max_epochs=1", "~callbacks.progress", "+trainer.enable_progress_bar=false",
    ]  # fmt: skip
    begun = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no output")
    return time.perf_counter() - begun


def results(folder: Path) -> dict[str, tuple[object, str]]:
    """Metrics and predictions by the job's number."""
    found = {}
    for job in sorted(p for p in (folder / "sweep").iterdir() if (p / "metrics.json").is_file()):
        metrics = json.loads((job / "metrics.json").read_text(encoding="utf-8"))
        found[job.name] = (metrics, (job / "test_predictions.jsonl").read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    unasked = [name for name in LAUNCHERS if name != "ray_cluster"]
    parser.add_argument("--launchers", nargs="+", choices=sorted(LAUNCHERS), default=unasked)
    parser.add_argument("--folder", type=Path, help="where the sweeps are kept, an empty or new one (default: nowhere)")
    args = parser.parse_args()
    table = Table(title=f"{' '.join(SWEEP)} on base=tiny; {machine()}", title_justify="left")
    for column in ("launcher", "package", "load before", "jobs", "seconds", "equal to basic"):
        table.add_column(column)
    out: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = (args.folder or Path(name)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        starter_rows(root / "rows.jsonl")
        basic = None
        for launcher in dict.fromkeys(["basic", *args.launchers]):
            package, settings = LAUNCHERS[launcher]
            try:
                installed = f"{package} {version(package)}"
            except PackageNotFoundError:
                table.add_row(launcher, f"{package} is not installed", "", "", "", "")
                continue
            load = os.getloadavg()[0]
            seconds = sweep(launcher, settings, root / launcher)
            out[launcher] = {"package": installed, "load_before": round(load, 1)}
            if isinstance(seconds, str):
                out[launcher]["failed"] = seconds
                table.add_row(launcher, installed, f"{load:.1f}", "", "", f"failed: {seconds}")
            else:
                found = results(root / launcher)
                basic = basic or found
                out[launcher] |= {"jobs": len(found), "seconds": round(seconds, 1), "equal": found == basic}
                table.add_row(launcher, installed, f"{load:.1f}", str(len(found)), f"{seconds:.1f}", str(found == basic))
            write_json(RESULTS / "sweep_launchers.json", {"machine": machine(), "sweep": SWEEP, "rows": ROWS, "launchers": out})
    Console().print(table)


if __name__ == "__main__":
    main()
