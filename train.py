"""SO8T's main job: `python train.py`, `python train.py +hw=rtx3060`, `python train.py -m hparams_search=pet seed=0,1,2`.

Composes the configuration in `conf/` with Hydra, then `so8t.training.train` tells the story. `--help` lists the groups.
"""

import os

import hydra
from omegaconf import DictConfig

from so8t.config import composition_told
from so8t.console import reported
from so8t.training import train


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float | None:
    """Runs one training; returns the objective, for sweepers that look for the best."""
    with reported():
        metrics = train(config)
        return metrics.get(config.objective)
    return None


def run() -> None:
    """What Hydra cannot compose is told like every other error: one line, code 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands its errors on instead of printing them
    with reported(), composition_told():
        main()


if __name__ == "__main__":
    run()
