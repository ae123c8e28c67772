"""Alarms are relative to the start; a runaway halts after some steps; the best evaluation is remembered."""

import pytest

from student_trainer.config import GuardConfig
from student_trainer.guards import BestSoFar, Guards


def _row(step: int = 1, **figures: float) -> dict[str, float]:
    return {"step": step, "entropy": 2.0, "response_length": 50.0, "truncated_share": 0.0, "kl": 0.4} | figures


def _begun(config: GuardConfig, **figures: float) -> Guards:
    guards = Guards()
    for step in range(5):
        guards.alarms(_row(step, **figures), config)
        assert guards.runaway(_row(step, **figures), config) is None
    return guards


@pytest.mark.parametrize(
    ("figures", "alarm"),
    [
        ({"entropy": 0.19}, "alarm_entropy"),
        ({"entropy": 6.1}, "alarm_entropy"),
        ({"response_length": 151.0}, "alarm_length"),
        ({"truncated_share": 0.51}, "alarm_truncated"),
    ],
)
def test_an_alarm_rises_outside_its_band_and_only_there(figures, alarm):
    guards = _begun(GuardConfig())
    assert guards.alarms(_row(), GuardConfig()) == {
        "alarm_entropy": False,
        "alarm_length": False,
        "alarm_truncated": False,
    }
    raised = guards.alarms(_row(**figures), GuardConfig())
    assert [name for name, on in raised.items() if on] == [alarm]


def test_there_is_no_alarm_against_a_start_that_is_not_known_yet_nor_when_switched_off():
    assert Guards().alarms(_row(entropy=100.0), GuardConfig()) == {"alarm_truncated": False}
    off = GuardConfig(entropy_ratio=None, length_ratio=None, truncated_share=None)
    assert _begun(off).alarms(_row(entropy=100.0), off) == {}


def test_a_runaway_halts_after_some_steps_in_a_row():
    config = GuardConfig(kl_steps=3)
    guards = _begun(config)  # 10 times 0.4 nats
    assert guards.runaway(_row(6, kl=4.1), config) is None
    assert guards.runaway(_row(7, kl=4.1), config) is None
    assert guards.runaway(_row(8, kl=3.9), config) is None  # it came back
    for step in (9, 10):
        assert guards.runaway(_row(step, kl=5.0), config) is None
    message = guards.runaway(_row(11, kl=5.0), config)
    assert message is not None
    assert message.startswith("step 11: kl is 5.000 nats, and has been above 4.000 for 3 steps (guards.kl_ratio: 10")


def test_a_small_start_does_not_make_a_runaway_of_noise():
    guards = _begun(GuardConfig(kl_steps=1), kl=0.001)
    assert guards.runaway(_row(kl=0.9), GuardConfig(kl_steps=1)) is None
    assert guards.runaway(_row(kl=1.1), GuardConfig(kl_steps=1)) is not None


def test_an_absolute_limit_needs_no_start():
    config = GuardConfig(max_kl=0.3, kl_steps=1, kl_ratio=None)
    message = Guards().runaway(_row(kl=0.4), config)
    assert message is not None and "guards.max_kl" in message


def test_without_a_teacher_there_is_nothing_to_run_away_from():
    row = _row()
    del row["kl"]
    assert Guards().runaway(row, GuardConfig(max_kl=0.1, kl_steps=1)) is None


def test_guards_and_the_best_come_back_from_their_state():
    guards = _begun(GuardConfig())
    assert Guards(**guards.state()) == guards
    best = BestSoFar()
    assert best.note(10, 0.5) and not best.note(20, 0.5) and not best.note(30, 0.4) and best.without == 2
    assert BestSoFar(**best.state()) == best
    assert best.note(40, 0.6) and (best.step, best.without) == (40, 0)
