"""Settings that change while a run is trained, as functions of the global step alone, which is what resumes and ranks know."""

from collections.abc import Mapping
from typing import TypeVar

from metalearn.base import require_range

T = TypeVar("T")


class Curriculum:
    """Stages of a whole number: ``values[s]`` before global step s, for the smallest such s; after them its last value.

    Args:
        name: of the setting, for messages.
        values: by the step at which they end, at least 1, in any order; each in ``low`` … ``high``. Empty for none.
        low: least value.
        high: greatest value.

    Raises:
        ValueError: for a step or a value out of range.
    """

    def __init__(self, name: str, values: Mapping[int, int], low: int, high: float = float("inf")):
        for step in values:
            require_range(f"a step of {name}", step, 1)
        self.name, self.low, self.stages = name, low, sorted(values.items())
        self.require_at_most(high)

    def require_at_most(self, high: float) -> None:
        """Raise ``ValueError`` for a value above ``high``, where that becomes known late, or below the least."""
        for step, value in self.stages:
            require_range(f"{self.name} before step {step}", value, self.low, high)

    def at(self, step: int | None, last: T) -> int | T:
        """The value at a step of training, or at none: ``last``, which is also what comes after all stages."""
        if step is None:
            return last
        return next((value for end, value in self.stages if step < end), last)
