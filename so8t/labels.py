"""The three decisions. One enum for the whole project; stored in every artefact and checked when one is loaded."""

from enum import IntEnum


class Label(IntEnum):
    """ALLOW answers, ESCALATE asks a person, REFUSE declines."""

    ALLOW = 0
    ESCALATE = 1
    REFUSE = 2


LABELS: tuple[str, ...] = tuple(label.name for label in Label)
"""Names in the order of the logits."""

FAIL_CLOSED = Label.ESCALATE
"""What is decided when something inside fails."""
