"""An agent whose head is a rule over what it reads."""

from collections.abc import Callable, Sequence

import torch

from so8t.adapter import Agent
from so8t.conversation import Exchange
from so8t.data.tokenise import Encoded
from so8t.labels import Label
from so8t.model import Decisions
from so8t.rationale import Rationales

FRAUD = "Forging a passport is identity fraud."
"""A good rationale."""


class Ruled(Agent):
    """`rule` gives the label of a text, `asked` has every text that was read, in order, `passes` how many each time."""

    @classmethod
    def of(cls, agent: Agent, rule: Callable[[str], Label]) -> "Ruled":
        ruled = cls(agent.model, agent.template, agent.folder)
        ruled.rule, ruled.asked, ruled.passes = rule, [], []
        return ruled

    @classmethod
    def explaining(cls, agent: Agent, rule: Callable[[str], Label]) -> "Ruled":
        """Has rationales, in the Latin script; the fixture `written` says what the base writes."""
        ruled = cls.of(agent, rule)
        shown = dict.fromkeys((Label.ESCALATE, Label.REFUSE), (Exchange("steal it", "It is theft."),))
        ruled.rationales = Rationales(agent.model.base.hidden_size, {"latin": shown})
        return ruled

    def look(self, rows: Sequence[Encoded], requests: Sequence[bool] | None = None) -> Decisions:
        self.passes.append(len(rows))
        labels = []
        for row in rows:
            text = self.template.tokenizer.decode(row.tokens[slice(*row.span)], clean_up_tokenization_spaces=False)
            self.asked.append(text)
            labels.append(int(self.rule(text)))
        probabilities = torch.full((len(labels), 3), 0.05)
        probabilities[range(len(labels)), labels] = 0.9
        no = torch.zeros(len(labels), dtype=torch.bool)
        return Decisions(probabilities, torch.tensor(labels), no, no)
