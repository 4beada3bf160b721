"""Perplexity of answers behind the gates and without them: of which tokens, of which rows, and of which not."""

import pytest
import torch

from so8t import capability
from so8t.capability import task_perplexity
from so8t.data.records import Record
from so8t.data.tokenise import Template
from so8t.labels import Label
from so8t.placement import AbsentHead
from tests.test_gates import turned

ANSWERED = [Record(f"how do I bake {n * 'rye '}bread", Label.ALLOW, task_output="mix flour" + n * ", wait") for n in range(5)]
OTHERS = [Record("forge a pass", Label.REFUSE), Record("sell all", Label.ESCALATE, task_output="")]


@pytest.fixture
def template(tiny_model) -> Template:
    turned(tiny_model)
    return Template(tiny_model.base.tokenizer, system_prompt=None, max_length=160)


@torch.no_grad()
def losses(model, template, record) -> torch.Tensor:
    """Of every token of a row's answer and of the end of its turn, by the base's own forward on the row alone."""
    prompt = template.encode_target(record, "", rationale=False).tokens[:-1]
    answer = [*template.tokenizer(record.task_output)["input_ids"], template.tokenizer.eos_token_id]
    assert len(answer) == len(record.task_output) + 1, "the tiny base reads bytes"
    logits = model.base.causal_lm(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer), reduction="none")


def test_perplexity_is_of_every_token_of_the_answers_with_all_gates_and_with_none(tiny_model, template):
    with tiny_model.task_path():
        gated = torch.cat([losses(tiny_model, template, record) for record in ANSWERED])
    with tiny_model.without_gates():
        alone = torch.cat([losses(tiny_model, template, record) for record in ANSWERED])
    told = task_perplexity(tiny_model, [*ANSWERED, *OTHERS], template, batch_size=8)
    expected = {"task_perplexity": gated.mean().exp(), "task_perplexity_base": alone.mean().exp()}
    assert told == {name: pytest.approx(float(value), rel=1e-4) for name, value in expected.items()}
    assert abs(told["task_perplexity"] / told["task_perplexity_base"] - 1) > 0.01, "turned gates can be told from none"


def test_of_many_answers_the_same_few_are_read_each_time(tiny_model, template, monkeypatch):
    read = []
    encode = Template.encode_target
    monkeypatch.setattr(
        Template, "encode_target", lambda self, record, *a, **k: read.append(record) or encode(self, record, *a, **k)
    )
    monkeypatch.setattr(capability, "ROWS", 3)
    told = [task_perplexity(tiny_model, ANSWERED, template, batch_size=32) for _ in range(2)]
    assert told[0] == told[1]
    assert read[:3] == read[3:]
    assert len(set(map(id, read))) == 3


def test_without_answers_or_without_an_lm_head_there_is_no_perplexity(tiny_model, template):
    assert task_perplexity(tiny_model, OTHERS, template, batch_size=8) == {}
    tiny_model.base.causal_lm.lm_head = AbsentHead()
    assert task_perplexity(tiny_model, ANSWERED, template, batch_size=8) == {}
