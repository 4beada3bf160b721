"""`@spec`: a frozen dataclass that configuration files fill. Unknown keys are errors; ranges stand in the annotations.

Lower rooms declare what they can be told; `so8t.config` validates it once at the edge, and from then on it is trusted.
"""

import math
from dataclasses import dataclass
from typing import Annotated, TypeVar, dataclass_transform

from annotated_types import Ge, Interval

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
