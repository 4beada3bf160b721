"""The report's panels in Weights & Biases: at the end of training, and again by `so8t report --wandb`, when calibration and
robustness have been measured."""

import re
from collections.abc import Sequence
from io import BytesIO

from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from so8t.errors import ArtefactError
from so8t.page import Panel
from so8t.run_folder import RunFolder

_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")


def log_panels(logger: WandbLogger, panels: Sequence[Panel]) -> None:
    """Pictures and tables; the tables of whole requests stay on this machine."""
    for panel in panels:
        if panel.pictures:
            pictures = [Image.open(BytesIO(picture.png)) for picture in panel.pictures]
            logger.log_image(key=f"report/{panel.key}", images=pictures, caption=[picture.alt for picture in panel.pictures])
        for k, table in enumerate(table for table in panel.tables if not table.texts):
            logger.log_table(key=f"report/{panel.key}_{k}", columns=table.head, data=table.rows)


def logger_of(run: RunFolder) -> WandbLogger:
    """Goes on with the Weights & Biases run that a finished run was logged to by `logger.wandb` into its own folder, offline
    where it was. Nothing is instantiated that its `config.yaml` names.

    Raises:
        ArtefactError: it was trained without that logger, or its folder `wandb/` is gone.
    """
    settings = run.setting("logger.wandb")
    if not isinstance(settings, dict):
        raise ArtefactError(f"{run.folder}: trained without Weights & Biases, so there is no run of it to go on with")
    names = [found for folder in run.folder.glob("wandb/*run-*") if (found := _FOLDER.fullmatch(folder.name))]
    if not names:
        raise ArtefactError(f"{run.folder / 'wandb'}: no run of Weights & Biases is in it, so there is none to go on with")
    newest = max(names, key=lambda found: found[1])[2]
    where = {"project": settings["project"]} if settings.get("project") else {}
    offline = bool(settings.get("offline", False))
    return WandbLogger(save_dir=run.folder, offline=offline, id=newest, entity=settings.get("entity"), **where)
