"""Every sweep in conf/hparams_search: composed, valid, each job another variant; one is really run."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from so8t.config import validate
from tests.conftest import QUICK, ROOT, synthetic_rows, write_rows

SWEEPS = sorted(p.stem for p in (ROOT / "conf/hparams_search").glob("*.yaml") if p.stem != "optuna")


def jobs(name: str) -> list[list[str]]:
    """The overrides of every job, as Hydra's own sweeper splits them."""
    parameters = yaml.safe_load((ROOT / f"conf/hparams_search/{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    axes = []
    for override in OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in parameters.items()]):
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        axes.append([f"{override.get_key_element()}={value}" for value in values])
    return [list(job) for job in itertools.product(*axes)]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_job_of_a_sweep_is_valid_and_no_two_are_the_same(name):
    seen = []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for job in jobs(name):
            config = compose("train", overrides=[f"hparams_search={name}", *job, "data=starter", "paths.output_dir=x"])
            validate(config)
            with open_dict(config):
                del config["tags"]
            seen.append(OmegaConf.to_yaml(config, resolve=True))
    assert len(seen) > 1
    assert len(set(seen)) == len(seen)


def test_what_a_sweep_is_measured_against_is_the_default_run():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plain = compose("train", overrides=["data=starter", "paths.output_dir=x"])
        for experiment in ("task/cmd", "pet_schedule/three_phases", "costs/default", "recipe/default"):
            config = compose("train", overrides=[f"experiment={experiment}", "data=starter", "paths.output_dir=x", "tags=[]"])
            assert config == plain, experiment


def test_a_real_sweep_shows_that_a_task_loss_on_the_command_side_changes_no_decision(tmp_path, so8t):
    rows = write_rows(tmp_path / "rows.jsonl", synthetic_rows(90))
    command = [
        sys.executable, "train.py", "-m", "hparams_search=task", "experiment=task/none,task/cmd", *QUICK, f"data.path={rows}",
        "trainer.max_epochs=1", "data.test_fraction=0.3", "data.task_rows=1", f"hydra.sweep.dir={tmp_path}/sweep",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    code, out, _ = so8t("compare", "--sweep", tmp_path / "sweep", "--json")
    assert code == 0
    none, cmd = json.loads(out)["variants"]
    assert (none["name"], cmd["name"]) == ("task/none", "task/cmd")
    assert cmd["helps"] is False
    assert cmd["figures"]["test/macro_f1"]["gain_95"] == [0.0, 0.0]
    assert cmd["figures"]["test/ece"]["by_seed"] == none["figures"]["test/ece"]["by_seed"]
    weights = [yaml.safe_load((tmp_path / f"sweep/{job}/config.yaml").read_text())["loss"]["task_weight"] for job in (0, 1)]
    assert weights == [0.0, 0.1]
