"""`@spec`: a frozen dataclass that configuration files fill. Unknown keys are errors; ranges stand in the annotations.

Lower rooms declare what they can be told; `so8t.config` validates it once at the edge, and from then on it is trusted.
"""

import math
from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Annotated, TypeVar, dataclass_transform

from annotated_types import Ge, Interval

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

Positive = Annotated[float, Interval(gt=0, lt=math.inf)]
NotNegative = Annotated[float, Interval(ge=0, lt=math.inf)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
ProperFraction = Annotated[float, Interval(ge=0, lt=1)]
Count = Annotated[int, Ge(0)]
PositiveInt = Annotated[int, Ge(1)]


@dataclass_transform(frozen_default=True)
def spec(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass whose unknown keys are refused when it is validated."""
    made = dataclass(frozen=True)(cls)
    made.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return made


def set_beside(told: "DataclassInstance", read: Collection[str]) -> list[str]:
    """Keys of a spec that say something else than their default though they are not among those `read`."""
    untouched = {f.name for f in fields(told) if f.default is MISSING or getattr(told, f.name) == f.default}
    return [f.name for f in fields(told) if f.name not in untouched | set(read)]
