"""Every sweep in conf/hparams_search: composed, valid, each job another variant; one is really run. Launchers are composed."""

import inspect
import itertools

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from benchmarks import ablations
from benchmarks.ablations import COMMON, VARIANTS
from benchmarks.gates import composed
from so8t.config import validate
from so8t.errors import SO8TError
from tests.conftest import ROOT

SWEEPS = sorted(p.stem for p in (ROOT / "conf/hparams_search").glob("*.yaml") if p.stem != "optuna")


def parameters(name: str) -> list[Override]:
    """What a sweep goes over."""
    told = yaml.safe_load((ROOT / f"conf/hparams_search/{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    return OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in told.items()])


def jobs(name: str) -> list[list[str]]:
    """The overrides of every job, as Hydra's own sweeper splits them."""
    axes = []
    for override in parameters(name):
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


# -- other launchers and sweepers, where they are installed --------------------------------------------------------------

PLUGINS = {
    "joblib": "hydra_joblib_launcher", "slurm": "hydra_submitit_launcher", "ray": "hydra_ray_launcher",
    "ray_cluster": "hydra_ray_launcher",
}  # fmt: skip


def with_hydra(*overrides: str) -> DictConfig:
    """A composed configuration, Hydra's own part included."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=["paths.output_dir=x", *overrides], return_hydra_config=True)


def test_every_launcher_of_ours_is_composed_below():
    assert {p.stem for p in (ROOT / "conf/hydra/launcher").glob("*.yaml")} <= PLUGINS.keys()


@pytest.mark.parametrize("launcher", PLUGINS)
def test_a_launcher_takes_what_its_configuration_says(launcher):
    pytest.importorskip(f"hydra_plugins.{PLUGINS[launcher]}")
    told = with_hydra(f"hydra/launcher={launcher}").hydra.launcher
    assert type(instantiate(told)).__module__.startswith(f"hydra_plugins.{PLUGINS[launcher]}")


def test_ray_takes_what_the_configuration_of_its_cluster_says():
    ray = pytest.importorskip("ray")
    told = with_hydra("hydra/launcher=ray_cluster").hydra.launcher.ray
    assert set(told.init) <= set(inspect.signature(ray.init).parameters)
    assert told.init.setdefault("object_store_memory", 1) is None, "as the launcher does"
    ray.remote(**told.remote)(lambda: None)  # an option that it does not know is an error


def test_optuna_takes_what_its_configuration_says():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    config = with_hydra("hparams_search=optuna", "data=starter")
    assert set(config.hydra.sweeper.params) == {override.key_or_group for override in parameters("optuna")}
    instantiate(config.hydra.sweeper)


def test_what_optuna_searches_is_valid_at_both_ends():
    for override in parameters("optuna"):
        assert override.is_interval_sweep(), override
        for end in (override.value().start, override.value().end):
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                validate(compose("train", overrides=[f"{override.key_or_group}={end}", "data=starter", "paths.output_dir=x"]))


# -- what sweeps and ablations are compared with -------------------------------------------------------------------------


def test_what_a_sweep_is_measured_against_is_the_default_run():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plain = compose("train", overrides=["data=starter", "paths.output_dir=x"])
        for experiment in ("task/cmd", "pet_schedule/three_phases", "costs/default", "recipe/default"):
            config = compose("train", overrides=[f"experiment={experiment}", "data=starter", "paths.output_dir=x", "tags=[]"])
            assert config == plain, experiment


def test_ablations_take_the_steps_of_the_groups_that_they_are_named_after():
    recipe = ("original_recipe", ["experiment=recipe/original"])
    for name, chosen in (("default", ["optim=large_steps"]), ("small_steps", ["optim=default"]), recipe):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            ours = compose("train", overrides=["data=starter", *COMMON, *VARIANTS[name], "paths.output_dir=x"])
            theirs = compose("train", overrides=["data=starter", *chosen, "paths.output_dir=x"])
        assert ours.optim == theirs.optim, name


def test_every_ablation_is_valid_and_no_two_are_the_same():
    seen = {}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name, overrides in VARIANTS.items():
            config = compose("train", overrides=["data=starter", *COMMON, *overrides, "tags=[]", "paths.output_dir=x"])
            validate(config)
            seen.setdefault(OmegaConf.to_yaml(config, resolve=True), []).append(name)
    assert all(len(names) == 1 for names in seen.values()), seen.values()


def test_an_ablation_that_was_run_is_not_run_again_and_one_that_failed_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)  # without a train.py
    with pytest.raises(SO8TError, match=r"none, seed 1: exit code 2: see .*stdout\.log"):
        ablations.one_run("none", 1, [])
    (ablations.folder_of("none", 1) / "metrics.json").write_text("{}")
    ablations.one_run("none", 1, [])
    assert [name for name, _ in ablations.finished([1])] == ["none"]


def test_a_run_of_other_settings_that_is_found_by_an_ablation_is_told(tmp_path):
    more = ["data=starter", "trainer.limit_train_batches=0.3"]
    saved = composed(ablations.settings("none", 1, more), tmp_path)
    OmegaConf.save(saved, tmp_path / "config.yaml", resolve=True)
    assert ablations.other_settings(tmp_path, "none", 1, more) == []
    assert ablations.other_settings(tmp_path, "none", 1, more[:1]) == ["trainer.limit_train_batches"]
    del saved.head["fold_words"]
    OmegaConf.save(saved, tmp_path / "config.yaml", resolve=True)
    assert ablations.other_settings(tmp_path, "none", 1, more) == ["head.fold_words"]
