"""Coefficients that change over the run: one mechanism, points joined by straight lines."""

from collections.abc import Mapping

Schedule = float | dict[int, float]
"""A constant, or `{step: value, ...}`: linear between the points, constant before the first and after the last.

`{0: 0.005, 80: 0.001}` anneals over 80 steps (KDRL); `{60: 0, 61: 1}` switches on after step 60 (OPD then RL).
"""


def value_at(schedule: float | Mapping[int, float], step: int) -> float:
    """The coefficient at `step` (the first step is 0)."""
    if not isinstance(schedule, Mapping):
        return float(schedule)
    points = sorted(schedule.items())
    before = [point for point in points if point[0] <= step]
    after = [point for point in points if point[0] > step]
    if not before:
        return float(after[0][1])
    if not after:
        return float(before[-1][1])
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 + (y1 - y0) * (step - x0) / (x1 - x0)


def is_always_zero(schedule: float | Mapping[int, float]) -> bool:
    """True for a term that is never used, so that nothing need be computed or asked for on its behalf."""
    values = schedule.values() if isinstance(schedule, Mapping) else (schedule,)
    return all(value == 0 for value in values)
