"""Long work is heard of; short work is not."""

import pytest

from student_trainer import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_comes_only_after_a_while_and_not_at_the_end(clock, capsys):
    heartbeat = progress.Heartbeat("rollouts", 30)
    for now_s, done in ((4.0, 10), (12.0, 10), (15.0, 5), (40.0, 5)):
        clock[0] = now_s
        heartbeat.advance(done)
    assert capsys.readouterr().err == "rollouts: 20 of 30, 12 s\n"


def test_work_that_stands_still_is_heard_of_too(clock, capsys):
    heartbeat = progress.Heartbeat("scores", 3, every_s=1.0)
    for now_s in (1.0, 2.0):
        clock[0] = now_s
        heartbeat.advance()
    assert capsys.readouterr().err == "scores: 0 of 3, 1 s\nscores: 0 of 3, 2 s\n"
