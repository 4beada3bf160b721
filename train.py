"""SO8T's main job: `python train.py`, `python train.py +hw=rtx3060`, `python train.py -m hparams_search=pet seed=0,1,2`.

Composes the configuration in `conf/` with Hydra, then `so8t.training.train` tells the story. `--help` lists the groups.
"""

import os

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from so8t.config import composition_error
from so8t.console import reported
from so8t.errors import ConfigError
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
    with reported():
        try:
            main()
        except (HydraException, OmegaConfBaseException) as error:
            raise composition_error(error) from None
        except ValueError as error:
            if not str(error).startswith("Config group override must be"):  # Hydra's words for GROUP=null
                raise
            raise ConfigError("configuration: a group cannot be null: choose one of its options, such as gate=none") from None


if __name__ == "__main__":
    run()
