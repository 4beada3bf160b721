"""Fine-tuning a trained agent: a run begins with another's gates and head, on some labels, under the guard's eyes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from so8t.adapter import _tensors
from so8t.config import validate
from so8t.errors import ArtefactError
from so8t.labels import LABELS
from so8t.training import build, load_data, prepare, train
from tests.conftest import QUICK, composed, trained


@pytest.fixture
def tuned(finished_run, rows_file, tmp_path):
    """The configuration of a run that goes on from the finished one, into a folder of its own."""

    def make(*overrides: str, start: object = None):
        options = (*QUICK, f"data.path={rows_file}", f"init_from={start or finished_run}", *overrides)
        return composed(*options, output_dir=tmp_path / "run")

    return make


def test_it_begins_with_the_gates_and_the_head_of_the_run_bit_for_bit(tuned, finished_run):
    config = validate(tuned("seed=5"))
    data = load_data(config)
    module = build(config, data)
    prepare(module, config, data, resumed=False)
    stored = load_file(finished_run / "adapter" / "adapter.safetensors")
    begun = _tensors(module.model)
    assert begun.keys() == stored.keys()
    assert all(torch.equal(begun[name], stored[name]) for name in stored), "standardisation included"
    assert float(module.inertia(module.model.gates).detach()) < 1e-10, "inertia pulls to where the run begins"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("gate.map=cayley", r"gate\.map=exp: set the same"),
        ("gate.top_layers=1", r"gate\.top_layers=2: set the same"),
        ("head.pooling=token", r"head\.pooling=both: set the same"),
        ("head.fold_words=false", r"head\.fold_words=True: set the same"),
        ("head.weigh_words=true", r"head\.weigh_words=False: set the same"),
        ("data.decision_prompt=Judge", r'data\.decision_prompt="": set the same'),
        ("base.seed=1", "trained on another tiny"),
        ("base.hidden_size=128", "trained on another tiny"),
    ],
)
def test_an_adapter_that_does_not_fit_is_told_in_one_line_and_nothing_is_written(tuned, tmp_path, override, told):
    with pytest.raises(ArtefactError, match=told) as error:
        train(tuned(override))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_without_adapter_or_with_other_labels_is_told(tuned, finished_run, tmp_path):
    with pytest.raises(ArtefactError, match="no adapter here"):
        train(tuned(start=tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(finished_run / "adapter", copy / "adapter")
    meta = json.loads((copy / "adapter" / "adapter.json").read_text())
    (copy / "adapter" / "adapter.json").write_text(json.dumps(meta | {"labels": list(reversed(LABELS))}))
    with pytest.raises(ArtefactError, match="labels are"):
        train(tuned(start=copy))


def test_only_the_training_rows_are_chosen_by_label(tuned):
    whole, some = (load_data(validate(tuned(*o))) for o in ((), ("data.train_labels=[ALLOW]",)))
    assert [r for r in whole.train if r.safety_label.name == "ALLOW"] == some.train
    assert (whole.val, whole.test, whole.unseen) == (some.val, some.test, some.unseen)


def test_the_guard_knows_how_safe_the_agent_was_before_the_first_step(tuned, finished_run, tmp_path, caplog):
    """Trained on ALLOW rows hard enough, an agent forgets to refuse before its first validation; the guard brings back what the
    run began with."""
    collapsing = ("data.train_labels=[ALLOW]", "optim.head_lr=0.5", "optim.warmup_steps=0", "trainer.max_epochs=1")
    trained(tuned(*collapsing, "~callbacks.best", "evaluate=false"))
    assert "best gates restored" in caplog.text
    begun, kept = (load_file(run / "adapter" / "adapter.safetensors") for run in (finished_run, tmp_path / "run"))
    assert all(torch.equal(begun[name], kept[name]) for name in begun)


def test_the_language_model_loss_alone_may_train_an_agent_that_has_learnt_to_decide(tuned, finished_run, tmp_path):
    alone = ("loss.safety_weight=0", "loss.path_weight=0", "loss.cost_weight=0", "loss.task_weight=1", "data.task_rows=2")
    trained(tuned(*alone, "loss.task_reaches=all", "pet=none", "trainer.max_epochs=1", "~callbacks.best", "evaluate=false"))
    begun, kept = (load_file(run / "adapter" / "adapter.safetensors") for run in (finished_run, tmp_path / "run"))
    changed = {name.split(".")[0] for name in begun if not torch.equal(begun[name], kept[name])}
    assert changed == {"gates"}, "nothing teaches the head, so it stays bit for bit what it was"
