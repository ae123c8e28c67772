"""Coefficients over the run."""

import pytest

from student_trainer.schedules import is_always_zero, value_at


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_a_number_is_the_same_at_every_step(step):
    assert value_at(0.25, step) == 0.25


@pytest.mark.parametrize(("step", "expected"), [(0, 5e-3), (1, 4.95e-3), (40, 3e-3), (80, 1e-3), (280, 1e-3)])
def test_annealing_falls_linearly_and_then_stays(step, expected):
    """KDRL: 5e-3, 5e-5 less a step, not below 1e-3."""
    assert value_at({0: 5e-3, 80: 1e-3}, step) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (59, 0.0), (60, 1.0), (61, 1.0)])
def test_neighbouring_points_make_a_switch(step, expected):
    assert value_at({59: 0.0, 60: 1.0}, step) == expected


def test_the_value_before_the_first_point_is_that_of_the_first():
    assert value_at({10: 2.0, 20: 4.0}, 3) == 2.0


def test_points_may_be_given_in_any_order():
    assert value_at({20: 4.0, 10: 2.0}, 15) == 3.0


def test_only_a_schedule_that_never_rises_from_zero_is_always_zero():
    assert is_always_zero(0) and is_always_zero({0: 0.0, 5: 0.0})
    assert not is_always_zero(0.1) and not is_always_zero({0: 0.0, 5: 1e-9})
