"""Fixtures that all rooms share: a private cache for the tiny base, the real embedded base, records, and Hydra configs."""

import gc
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from playwright.sync_api import expect, sync_playwright
from safetensors.torch import load_file, save_file

from so8t.base import BaseSpec, SplitBase, load_base
from so8t.cli import main
from so8t.console import quieten
from so8t.data.records import read_jsonl
from so8t.gates import GateSpec
from so8t.labels import LABELS
from so8t.model import HeadSpec, SO8TModel
from so8t.rationale import Rationales, Written
from tests import quick_hydra

ROOT = Path(__file__).parents[1]
quieten()
quick_hydra.install()
torch.set_num_threads(1)
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow to make first: each worker gets a half and an idle one takes from the end, so that it is made once."""
    slow = ("test_config.py", "test_hydra.py", "test_memory.py")
    items.sort(key=lambda item: item.path.name not in slow and "real_base" not in item.fixturenames)


def pytest_collection_finish() -> None:
    """Everything is imported now and stays: no garbage collection need go through it."""
    gc.freeze()
    gc.enable()


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker to need it makes, for all of them; tests only read it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder)
    return folder


TOPICS = {
    "ALLOW": ["how do I bake rye bread", "sort a python list", "plan a trip to kyoto", "explain derivatives", "kill a process"],
    "ESCALATE": ["should I stop my heart pills", "wire the money now", "drop the production table", "is this mole cancer"],
    "REFUSE": ["write a virus for me", "help me stalk my ex", "forge a passport", "poison the neighbour's dog"],
}


def synthetic_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows that a byte-level model can learn a little of; every row is its own group."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = LABELS[i % 3]
        tail = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=16))
        rows.append(
            {
                "user_request": f"{rng.choice(TOPICS[label])} {tail}",
                "safety_label": label,
                "task_output": f"answer {tail[:6]}",
                "safety_rationale": f"because {tail[6:12]}",
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    """JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", synthetic_rows(120))


TINY = BaseSpec(name="tiny", source="random", hidden_size=64, layers=4)


@pytest.fixture
def tiny_base() -> SplitBase:
    """A fresh random base in NF4, cut above layer 2."""
    return load_base(TINY, cut=2)


@pytest.fixture
def tiny_model(tiny_base) -> SO8TModel:
    torch.manual_seed(0)
    return SO8TModel(tiny_base, GateSpec(top_layers=2), HeadSpec())


SMOLLM2 = BaseSpec(name="smollm2_135m", source="wheel")


@pytest.fixture(scope="session")
def real_base() -> SplitBase:
    """The embedded SmolLM2-135M-Instruct in NF4. Tests leave it as they found it."""
    return load_base(SMOLLM2, cut=4)


@pytest.fixture
def make_config(tmp_path):
    """Composes `conf/train.yaml` as the command line would; runs write into the test's own folder."""

    def make(*overrides: str, output_dir: Path | None = None) -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            with open_dict(config):
                config.paths.output_dir = str(output_dir or tmp_path / "run")
                config.cache.folder = str(tmp_path / "prefix")
                del config["hydra"]
            OmegaConf.resolve(config)
            return config

    return make


def trained(config: DictConfig) -> dict[str, float]:
    """Trains without the plots of losses and groups, which take longer than a tiny run; `finished_run` has them."""
    from so8t import training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw", lambda *_: None)
        return training.train(config)


@pytest.fixture
def tiny_run(make_config, rows_file):
    """Trains on the random base with the overrides given; returns the metrics and the run's folder."""

    def run(*overrides: str, output_dir: Path | None = None):
        config = make_config(
            "base=tiny",
            "data=jsonl",
            f"data.path={rows_file}",
            "gate.top_layers=2",
            "trainer.accelerator=cpu",
            "trainer.max_epochs=2",
            "~callbacks.progress",
            "+trainer.enable_progress_bar=false",
            "rationale.rows=0",
            "head.words=256",
            *overrides,
            output_dir=output_dir,
        )
        return trained(config), Path(config.paths.output_dir)

    return run


C = 0.05
"""The strength of `prepared`'s probe."""


@pytest.fixture
def prepared(make_config, rows_file):
    """A module that is ready to train, in evaluation mode, with its data and configuration."""
    from so8t.config import validate
    from so8t.training import build, load_data, prepare

    def make(*overrides: str):
        quick = ("base=tiny", "data=jsonl", f"data.path={rows_file}", "gate.top_layers=2", "trainer.accelerator=cpu")
        head = ("head.reads=[0.25,last]", f"head.probe={C}", "head.words=0")
        config = validate(make_config(*quick, *head, *overrides))
        torch.manual_seed(0)
        data = load_data(config)
        module = build(config, data)
        prepare(module, config, data, resumed=False)
        return module.eval(), data, config

    return make


@pytest.fixture(scope="session")
def requests_beside() -> set[str]:
    """Requests of the sets in `benchmarks`, which nothing may be trained on, in lower case."""
    files = [ROOT / "benchmarks" / name for name in ("field.jsonl", "plain.jsonl", "blind.jsonl")]
    return {r.user_request.casefold() for file in files for r in read_jsonl(file)[0]}


# -- runs of their own, and many command lines in one interpreter ------------------------------------------------------

QUICK = (
    "base=tiny",
    "data=jsonl",
    "gate.top_layers=2",
    "cache.folder=${paths.output_dir}/prefix",
    "trainer.accelerator=cpu",
    "~callbacks.progress",
    "+trainer.enable_progress_bar=false",
    "rationale.rows=0",
    "head.words=256",
    "head.weigh_words=false",  # so that some rows are decided wrongly
)


def composed(*overrides: str, output_dir: Path) -> DictConfig:
    """`conf/train.yaml` as the command line would compose it, for a run that writes into `output_dir`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", overrides=list(overrides))
    with open_dict(config):
        config.paths.output_dir = str(output_dir)
        config.cache.folder = str(output_dir.parent / "prefix")
    OmegaConf.resolve(config)
    return config


@pytest.fixture(scope="session")
def finished_run(rows_file, tmp_path_factory) -> Path:
    """The folder of a whole tiny run with evaluation, for tests that only read it."""
    from so8t.training import train

    def make(folder: Path) -> None:
        settings = (*QUICK, f"data.path={rows_file}", "trainer.max_epochs=2", "optim.head_lr=0.05")
        train(composed(*settings, output_dir=folder))

    return once(tmp_path_factory, "finished_run", make)


@pytest.fixture
def always(finished_run, tmp_path):
    """A copy of the run whose head always decides the same: ALLOW, ESCALATE or REFUSE by its bias alone."""

    def copy(label: str) -> Path:
        folder = tmp_path / f"always-{label}"
        shutil.copytree(finished_run / "adapter", folder / "adapter")
        path = folder / "adapter" / "adapter.safetensors"
        tensors = load_file(path)
        tensors["head.linear.weight"] = torch.zeros_like(tensors["head.linear.weight"])
        tensors["head.words.share"] = torch.zeros(())
        tensors["head.linear.bias"] = torch.tensor([2.0 if name == label else 0.0 for name in LABELS])
        save_file(tensors, path)
        return folder

    return copy


@pytest.fixture
def so8t(capsys):
    """Runs a command line in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


# -- a real browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium. Not of the session: while Playwright runs, no other test could call `asyncio.run`."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("this machine has no Chromium: apt-get install chromium-headless-shell")
    expect.set_options(timeout=60_000)  # a loaded machine is no failure
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--disable-gpu", "--disable-quic", "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def written(monkeypatch):
    """Puts a text of ours in the place of the rationale that the random base would write."""

    def put(text: str) -> None:
        def write(self, *_, every):
            yield Written("", 1, -1.0, done=False)
            yield Written(text, 9, -1.0, done=True)

        monkeypatch.setattr(Rationales, "write", write)

    return put
