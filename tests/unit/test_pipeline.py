"""Which student makes which batch, who waits, and what is left when somebody stops."""

import threading
import time

import pytest

from student_trainer.experience import InFlight
from student_trainer.pipeline import Pipeline
from student_trainer.processes import Processes
from student_trainer.stopping import Stopped, never


class Maker:
    """Makes batches and notes which student made them."""

    def __init__(self, stop=never) -> None:
        self.made: list[tuple[int, int]] = []
        self.threads: set[str] = set()
        self._stop = stop

    def __call__(self, step: int, student_step: int) -> InFlight:
        if self._stop():
            raise Stopped("half-way")
        self.made.append((step, student_step))
        self.threads.add(threading.current_thread().name)
        return InFlight(step, student_step, [])


def _pipeline(maker: Maker, ahead: int, steps: int = 6, background: bool = False, stop=never, restored=()) -> Pipeline:
    return Pipeline(
        maker,
        ahead=ahead,
        steps=steps,
        in_background=background,
        processes=Processes(),
        stop=stop,
        restored=list(restored),
    )


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("ahead", "made"),
    [
        (0, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (1, [(0, 0), (1, 0), (2, 1), (3, 2)]),
        (2, [(0, 0), (1, 0), (2, 0), (3, 1)]),
        (9, [(0, 0), (1, 0), (2, 0), (3, 0)]),
    ],
)
def test_a_batch_is_as_old_as_it_may_be_and_no_older(ahead, made, background):
    maker = Maker()
    pipeline = _pipeline(maker, ahead, steps=4, background=background)
    for step in range(4):
        pipeline.fill(step)
        assert pipeline.take(step).step == step
        pipeline.settle()
        pipeline.drop(step)
    pipeline.close()
    assert maker.made == made
    assert maker.threads == ({"rollouts_0"} if background else {"MainThread"})


def test_a_resumed_pipeline_makes_what_an_undisturbed_one_makes():
    maker = Maker()
    pipeline = _pipeline(maker, 2)
    for step in range(3):
        pipeline.fill(step)
        pipeline.take(step)
        pipeline.drop(step)
    left = pipeline.whole()
    assert [(batch.step, batch.student_step) for batch in left] == [(3, 1), (4, 2)]
    again = Maker()
    resumed = _pipeline(again, 2, restored=left)
    resumed.fill(3)
    assert again.made == [(5, 3)] and resumed.take(3) is left[0]


def test_in_the_background_the_trainer_waits_only_for_the_batch_whose_turn_it_is(monkeypatch):
    waits = [threading.Event(), threading.Event()]

    class Clock:
        """Each batch takes 0.3 s, from when somebody waits for it."""

        now_s, reads = 0.0, 0

        def monotonic(self) -> float:
            now_s, self.reads = self.now_s, self.reads + 1
            if self.reads % 2:
                waits[self.reads // 2].set()
            return now_s

    clock = Clock()

    def slow(step: int, student_step: int) -> InFlight:
        assert waits[step].wait(100)
        clock.now_s += 0.3
        return InFlight(step, student_step, [])

    monkeypatch.setattr("student_trainer.pipeline.time", clock)
    pipeline = _pipeline(slow, 1, background=True)  # pyright: ignore
    pipeline.fill(0)
    pipeline.take(0)
    assert pipeline.waited_s == pytest.approx(0.3) and not waits[1].is_set()
    pipeline.settle()
    assert pipeline.waited_s == pytest.approx(0.6)
    pipeline.close()


def test_a_stop_leaves_the_batches_that_were_finished():
    asked = threading.Event()
    maker = Maker(stop=lambda: len(maker.made) >= 2)
    pipeline = _pipeline(maker, 3, stop=asked.is_set)
    asked.set()
    with pytest.raises(Stopped):
        pipeline.fill(0)
    assert [batch.step for batch in pipeline.whole()] == [0, 1]


@pytest.mark.parametrize("commits", [True, False])
def test_what_is_being_made_when_a_step_is_learnt_is_finished_and_otherwise_given_up(commits):
    """A batch of an older student could not be made again once the student has moved on."""
    asked, may_end = threading.Event(), threading.Event()

    def slow(step: int, student_step: int) -> InFlight:
        while step == 1:
            ended = may_end.is_set()
            if pipeline.stopping():
                raise Stopped("half-way")
            if ended:
                break
            time.sleep(0.01)
        return InFlight(step, student_step, [])

    pipeline = _pipeline(slow, 1, background=True, stop=asked.is_set)  # pyright: ignore
    pipeline.fill(0)
    pipeline.take(0)
    if commits:
        assert pipeline.commit()
    asked.set()
    if commits:
        threading.Timer(0.1, may_end.set).start()
    with pytest.raises(Stopped):
        pipeline.settle()
    assert pipeline.commit() is False
    assert [batch.step for batch in pipeline.whole()] == ([0, 1] if commits else [0])
    pipeline.close()


def test_an_error_while_generating_in_the_background_is_raised_when_its_batch_is_taken():
    def broken(step: int, student_step: int) -> InFlight:
        raise RuntimeError("the engine is gone")

    pipeline = _pipeline(broken, 1, background=True)  # pyright: ignore
    pipeline.fill(0)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        pipeline.take(0)
    pipeline.close()
