"""Answers in flight and random states come back from a file as they were, for as many processes as there are."""

import random

import numpy as np
import pytest
import torch

from student_trainer.batch import Rollout
from student_trainer.experience import InFlight, Judged
from student_trainer.in_flight import random_state, read_batches, restore_random_state, write_process
from student_trainer.policy import CPU
from student_trainer.prompts import Prompt

PROMPTS = {key: Prompt(key, key, None, (3, 4), None, {}) for key in ("a", "b", "c")}


def _judged(key: str, group: int, length: int, seed: int) -> Judged:
    generator = np.random.default_rng(seed)
    rollout = Rollout(
        prompt=PROMPTS[key],
        response_ids=generator.integers(0, 50, length).astype(np.int32),
        sampler_logprobs=-generator.exponential(1.0, length).astype(np.float32),
        candidate_ids=generator.integers(0, 50, (length, 3)).astype(np.int32),
        text=f'{key} "quoted" \n ü {seed}',
        finished=bool(seed % 2),
    )
    return Judged(rollout, group, generator.random())


def _batches() -> list[InFlight]:
    first = [_judged("a", 0, 4, 1), _judged("a", 0, 1, 2), _judged("b", 1, 7, 3)]
    return [InFlight(5, 3, first, dropped=2), InFlight(6, 4, [_judged("c", 0, 2, 4)])]


def _sorted(judged: list[Judged]) -> list[Judged]:
    return sorted(judged, key=lambda one: (one.group, one.rollout.response_ids.tolist()))


def _assert_same(one: Judged, other: Judged) -> None:
    assert (one.group, one.reward, one.rollout.text) == (other.group, other.reward, other.rollout.text)
    assert one.rollout.prompt is other.rollout.prompt and one.rollout.finished == other.rollout.finished
    for name in ("response_ids", "sampler_logprobs", "candidate_ids"):
        ours, theirs = getattr(one.rollout, name), getattr(other.rollout, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_answers_in_flight_come_back_bit_for_bit(tmp_path):
    write_process(tmp_path / "process-0.npz", _batches(), random_state(CPU))
    found = read_batches([tmp_path / "process-0.npz"], PROMPTS, 0, 1)
    assert [(batch.step, batch.student_step, batch.dropped) for batch in found] == [(5, 3, 2), (6, 4, 0)]
    for batch, wanted in zip(found, _batches(), strict=True):
        for one, other in zip(batch.answers, _sorted(wanted.answers), strict=True):
            _assert_same(one, other)


def test_nothing_in_flight_comes_back_as_nothing(tmp_path):
    write_process(tmp_path / "p.npz", [], random_state(CPU))
    assert read_batches([tmp_path / "p.npz"], PROMPTS, 0, 1) == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups_find_their_process_whatever_the_number_that_saved_them(tmp_path, count):
    """Process r of n has the groups g with g % n == r."""
    whole = _batches()
    for rank in range(2):
        mine = [
            InFlight(b.step, b.student_step, [j for j in b.answers if j.group % 2 == rank], b.dropped if rank else 0)
            for b in whole
        ]
        write_process(tmp_path / f"process-{rank}.npz", mine, random_state(CPU))
    files = [tmp_path / f"process-{rank}.npz" for rank in range(2)]
    parts = [read_batches(files, PROMPTS, rank, count) for rank in range(count)]
    for index, batch in enumerate(whole):
        found = [(rank, judged) for rank, part in enumerate(parts) for judged in part[index].answers]
        assert all(judged.group % count == rank for rank, judged in found)
        for (_, one), other in zip(
            sorted(found, key=lambda pair: (pair[1].group, pair[1].rollout.response_ids.tolist())),
            _sorted(batch.answers),
            strict=True,
        ):
            _assert_same(one, other)
        assert sum(part[index].dropped for part in parts) == batch.dropped


def test_every_generator_goes_on_from_where_it_was(tmp_path):
    def draw() -> tuple:
        return torch.rand(3).tolist(), np.random.random(3).tolist(), random.random(), random.gauss(0, 1)

    draw()
    random.gauss(0, 1)  # keeps a second number back
    write_process(tmp_path / "p.npz", [], random_state(CPU))
    wanted = draw()
    draw()
    restore_random_state(tmp_path / "p.npz", CPU)
    assert draw() == wanted
