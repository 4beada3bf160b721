"""What each part of the default run is worth: the default without it, or with another in its place, on the same rows and seeds.

    .venv/bin/python -m benchmarks.ablations [--variants none pet_off ...] [--seeds 0 1 2] [--jobs 2] [OVERRIDE ...]

Every run is `train.py` in a process of its own, one thread each, into `multirun/ablations/VARIANT/SEED`; runs that are there
already are not run again, so it can be stopped and goes on. The task loss, on which no decision depends by default, and the
rationales are left out, and decisions along a request are not smoothed, to see what PET does for them. All but `small_steps`
and `original_recipe` take steps ten times as large as the default's (`optim=large_steps`): with small ones gates hardly turn,
and what they do could not be told apart. `so8t compare` then tells the variants apart. Writes `results/ablations.json` and
`.png`; of variants whose runs are not on this machine the file keeps what it says. A question each, the same are Hydra sweeps:
`hparams_search`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from benchmarks.gates import RESULTS, ROOT, composed, machine
from so8t.compare import Comparison, compare, flat_settings
from so8t.compare_view import as_json, plot_comparison, print_comparison
from so8t.console import quieten, reported
from so8t.errors import SO8TError
from so8t.files import write_json

BASELINE = "default"
COMMON = (
    "optim.gate_lr=0.02",
    "optim.head_lr=0.0003",
    "loss.task_weight=0",
    "rationale.rows=0",
    "head.smoothing=0",
    "logger=csv",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    # where gates are
    "none": ("gate=none",),
    "last_only": ("gate.interior=none",),
    "interior_only": ("gate.last=false",),
    "both_inside": ("gate.interior=both",),
    "o_proj": ("gate.sites=[o_proj]",),
    "down_proj": ("gate.sites=[down_proj]",),
    "k_1": ("gate.top_layers=1",),
    "k_8": ("gate.top_layers=8",),
    # what gates are
    "shared": ("gate.blocks=shared",),
    "leading": ("gate.blocks=leading",),
    "cayley": ("gate.map=cayley",),
    "triality": ("gate.triality=true",),
    # what the head reads, and where it begins
    "commutator": ("head.commutator=true",),
    "reads_last": ("head.reads=[last]",),
    "random_head": ("head.probe=0", "head.words=0"),  # beside no_words: words need the probe
    "no_words": ("head.words=0",),
    "not_folded": ("head.fold_words=false",),
    "no_limit": ("head.familiar=0",),
    "smoothed": ("head.smoothing=0.8",),
    # PET
    "pet_off": ("pet=none",),
    "inertia_only": ("pet.weight=0",),
    "temporal_only": ("pet.inertia_weight=0",),
    "pet_stronger": ("pet.weight=0.3", "pet.max_share=0.3"),
    "pet_strong": ("pet.weight=1", "pet.max_share=0.5"),
    "pet_constant": ("experiment=pet_schedule/constant",),
    "pet_late": ("experiment=pet_schedule/late",),
    "pet_hidden": ("pet.target=hidden",),
    # steps, losses, data, recipe
    "small_steps": ("optim.gate_lr=0.002", "optim.head_lr=0.00003"),
    "no_costs": ("experiment=costs/none",),
    "strict_costs": ("experiment=costs/strict",),
    "task_all": ("loss.task_weight=0.1", "loss.task_reaches=all"),  # where it reaches R_cmd alone, no decision depends on it
    "no_path": ("loss.path_weight=0",),
    "not_framed": ("data.framed=0",),
    "framed_more": ("data.framed=0.3",),
    "not_coded": ("data.coded=0",),
    "no_decision_prompt": ("data.decision_prompt=null", "data.max_length=160"),
    "not_reweighed": ("data.reweigh_languages=false",),
    "original_recipe": ("experiment=recipe/original", "optim.gate_lr=0.00003", "optim.head_lr=0.000015"),
}
"""By name: what is set besides the default."""
KEPT = ("name", "seeds", "trained_parameters", "figures", "helps")
"""Of what `so8t compare --json` says."""


def folder_of(name: str, seed: int) -> Path:
    """Where a run is kept."""
    return ROOT / "multirun" / "ablations" / name / str(seed)


def settings(name: str, seed: int, overrides: list[str]) -> list[str]:
    """What is asked of a run, as overrides."""
    return [*COMMON, f"seed={seed}", *VARIANTS[name], f"tags=[{name}]", *overrides]


def other_settings(folder: Path, name: str, seed: int, overrides: list[str]) -> list[str]:
    """Settings in which a run that is there differs from what is asked for now: it was run by another version, or with other
    overrides, and is compared as it is."""
    configs = composed(settings(name, seed, overrides), folder), OmegaConf.load(folder / "config.yaml")
    asked, had = (flat_settings(OmegaConf.to_container(config, resolve=True)) for config in configs)
    return sorted(key for key in asked.keys() | had.keys() if asked.get(key) != had.get(key))


def one_run(name: str, seed: int, overrides: list[str]) -> None:
    """Trains and evaluates in a process of its own, unless that was done before.

    Raises:
        SO8TError: it failed; its log says why.
    """
    folder = folder_of(name, seed)
    if (folder / "metrics.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *settings(name, seed, overrides)]
    begun = time.monotonic()
    with (folder / "stdout.log").open("w") as log:
        done = subprocess.run(
            [*command, f"hydra.run.dir={folder}"],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SO8TError(f"{name}, seed {seed}: exit code {done.returncode}: see {folder / 'stdout.log'}")
    Console(stderr=True).print(f"{name}, seed {seed}: {time.monotonic() - begun:.0f} s")


def finished(seeds: list[int]) -> Iterator[tuple[str, list[Path]]]:
    """Variants all of whose runs are there, with their folders."""
    for name in VARIANTS:
        folders = [folder_of(name, seed) for seed in seeds]
        if all((folder / "metrics.json").is_file() for folder in folders):
            yield name, folders


def told(comparison: Comparison, seeds: list[int], overrides: list[str]) -> dict[str, object]:
    """What the file says: what was there of other variants with the same settings, and these."""
    path, common = RESULTS / "ablations.json", [*COMMON, *overrides]
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = before["variants"] if before.get("common") == common else []
    variants = {variant["name"]: variant for variant in kept}
    for variant in as_json(comparison)["variants"]:
        name = variant["name"]
        variants[name] = {"set": VARIANTS[name], "machine": machine()} | {k: variant[k] for k in KEPT}
    ordered = [variants[name] for name in VARIANTS if name in variants]
    return {"baseline": BASELINE, "seeds": seeds, "common": common, "variants": ordered}


def main() -> None:
    """Runs what is missing, then compares what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, a thread each (default 2)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every run")
    args = parser.parse_intermixed_args()
    quieten()
    with reported():
        wanted = [(name, seed) for name in dict.fromkeys([BASELINE, *args.variants]) for seed in args.seeds]
        with ThreadPoolExecutor(args.jobs) as pool:
            for running in [pool.submit(one_run, name, seed, args.overrides) for name, seed in wanted]:
                running.result()
        found = dict(finished(args.seeds))
        for name, folders in found.items():
            if other := other_settings(folders[0], name, args.seeds[0], args.overrides):
                line = f"{name}: compared as it was run, with another {', '.join(other)}; to run it again, delete "
                Console(stderr=True).print(f"[yellow]{escape(line)}{folders[0].parent}[/]")
        comparison = compare([folder for folders in found.values() for folder in folders], baseline=BASELINE)
        print_comparison(comparison, Console(width=200))
        plot_comparison(comparison, RESULTS / "ablations.png")
        write_json(RESULTS / "ablations.json", told(comparison, args.seeds, args.overrides))


if __name__ == "__main__":
    main()
