"""Packing: the one place that shifts tokens to targets."""

import numpy as np
import pytest
import torch

from stillhouse.codec import Scores
from student_trainer.batch import Rollout, Sample, candidates_for_teacher, micro_batches, pack
from student_trainer.prompts import Prompt


def make_sample(
    prompt: list[int], response: list[int], *, seed: int = 0, top_k: int = 3, candidates: int = 2, scored: bool = True
) -> Sample:
    """A sample whose teacher arrays are random but consistent: every id of the support is below 50."""
    rng = np.random.default_rng(seed)
    n = len(response)
    top_ids = np.stack([rng.choice(50, top_k, replace=False) for _ in range(n)]).astype(np.int32)
    candidate_ids = np.stack([rng.choice(50, candidates, replace=False) for _ in range(n)]).astype(np.int32)
    rollout = Rollout(
        prompt=Prompt(f"p{seed}", "text", None, tuple(prompt), None, {}),
        response_ids=np.array(response, np.int32),
        sampler_logprobs=rng.normal(-1, 0.1, n).astype(np.float32),
        candidate_ids=candidate_ids,
        text="answer",
        finished=True,
    )
    table = np.log(rng.dirichlet(np.ones(50), size=n)).astype(np.float32)  # the teacher, whole
    asked = candidates_for_teacher(rollout)
    support = [sorted({*top_ids[i], *asked[i]}) for i in range(n)]
    scores = Scores(
        top_ids=top_ids,
        top_logprobs=np.take_along_axis(table, top_ids, 1),
        sampled_logprobs=table[np.arange(n), rollout.response_ids],
        candidate_logprobs=np.take_along_axis(table, asked, 1),
        log_tail=np.zeros(n, np.float32),
        log_support_tail=np.array(
            [np.log1p(-np.exp(table[i, ids]).sum()) for i, ids in enumerate(support)], np.float32
        ),
        entropy=np.ones(n, np.float32),
        log_normalizer=np.zeros(n, np.float32),
    )
    return Sample(rollout, 0, 1.0, True, False, 0.5, 1.0, scores if scored else None)


def _pack(samples: list[Sample], packed: bool = False):
    weights = [np.ones(len(sample.rollout.response_ids)) for sample in samples]
    return pack(samples, weights, eos_ids={9}, pad_id=0, packed=packed)


SAMPLES = [
    make_sample([1, 2, 3], [4, 5, 9], seed=1),
    make_sample([7], [8, 9], seed=2),
    make_sample([1] * 5, [6], seed=3),
]


def test_each_row_is_the_token_before_its_target():
    batch = _pack(SAMPLES)
    width = batch.input_ids.shape[1]
    for row, target, sequence in zip(batch.rows, batch.targets, batch.sequence, strict=True):
        assert row // width == sequence
        assert batch.input_ids.flatten()[row + 1] == target
    assert batch.targets.tolist() == [4, 5, 9, 8, 9, 6]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1, 2]
    # The first response token is predicted by the prompt's last.
    assert batch.input_ids.flatten()[batch.rows].tolist() == [3, 4, 5, 7, 8, 1]


def test_sequences_are_padded_on_the_right():
    assert _pack(SAMPLES).input_ids.tolist() == [[1, 2, 3, 4, 5, 9], [7, 8, 9, 0, 0, 0], [1, 1, 1, 1, 1, 6]]


def test_only_end_tokens_of_the_response_count_as_such():
    assert _pack(SAMPLES).is_eos.tolist() == [False, False, True, False, True, False]


def test_each_id_of_the_support_is_present_exactly_once():
    batch = _pack(SAMPLES)
    for ids, present in zip(batch.support_ids.tolist(), batch.support_present.tolist(), strict=True):
        shown = [i for i, there in zip(ids, present, strict=True) if there]
        assert sorted(shown) == sorted(set(ids))


def test_the_target_stands_where_target_column_says():
    batch = _pack(SAMPLES)
    column = batch.target_column[:, None]
    assert torch.equal(batch.support_ids.gather(1, column).squeeze(1), batch.targets)
    assert batch.support_present.gather(1, column).all()
    assert batch.teacher_logprobs is not None and batch.teacher_sampled is not None
    torch.testing.assert_close(batch.teacher_logprobs.gather(1, column).squeeze(1), batch.teacher_sampled)


def test_support_and_tail_of_the_teacher_sum_to_one():
    batch = _pack(SAMPLES)
    assert batch.teacher_logprobs is not None and batch.teacher_log_tail is not None
    mass = batch.teacher_logprobs.exp().sum(1) + batch.teacher_log_tail.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass))
    assert torch.isinf(batch.teacher_logprobs[~batch.support_present]).all()


def test_without_a_teacher_the_support_is_the_target():
    batch = _pack([make_sample([1, 2], [3, 4], scored=False)])
    assert batch.support_ids.tolist() == [[3], [4]] and batch.support_present.all()
    assert batch.teacher_logprobs is None and batch.teacher_log_tail is None


def test_a_batch_with_and_without_scores_is_a_bug():
    with pytest.raises(AssertionError, match="some samples"):
        _pack([SAMPLES[0], make_sample([1], [2], scored=False)])


@pytest.mark.parametrize("limit", [1, 6, 7, 12, 13, 1000])
def test_micro_batches_hold_every_sample_once_within_the_limit(limit):
    samples = [make_sample([1] * n, [2] * m, seed=n * 10 + m) for n in (1, 3, 5) for m in (1, 2)]
    lots = micro_batches(samples, limit)
    assert sorted(id(s) for lot in lots for s in lot) == sorted(map(id, samples))
    for lot in lots:
        padded = len(lot) * max(len(sample.rollout.token_ids) for sample in lot)
        assert padded <= limit or len(lot) == 1


def test_the_sampled_token_is_the_last_candidate():
    rollout = SAMPLES[0].rollout
    asked = candidates_for_teacher(rollout)
    assert np.array_equal(asked[:, -1], rollout.response_ids)
    assert np.array_equal(asked[:, :-1], rollout.candidate_ids)


def test_packed_sequences_stand_behind_each_other_and_say_where_each_begins():
    batch, padded = _pack(SAMPLES, packed=True), _pack(SAMPLES)
    assert batch.input_ids.shape[0] == 1 and batch.position_ids is not None and padded.position_ids is None
    sizes = [len(sample.rollout.token_ids) for sample in SAMPLES]
    assert batch.position_ids[0].tolist() == [place for size in sizes for place in range(size)]
    flat = [int(token) for sample in SAMPLES for token in sample.rollout.token_ids]
    assert batch.input_ids[0].tolist() == flat
    # The same tokens are predicted from the same places of their sequences, and all else is the same.
    assert batch.input_ids[0][batch.rows + 1].tolist() == padded.targets.tolist()
    for name in ("targets", "sequence", "support_ids", "support_present", "target_column", "positions"):
        assert torch.equal(getattr(batch, name), getattr(padded, name))


@pytest.mark.parametrize("limit", [1, 6, 7, 13, 1000])
def test_packed_micro_batches_count_no_padding(limit):
    samples = [make_sample([1] * n, [2] * m, seed=n * 10 + m) for n in (1, 3, 5) for m in (1, 2)]
    lots = micro_batches(samples, limit, packed=True)
    assert sorted(id(s) for lot in lots for s in lot) == sorted(map(id, samples))
    sizes = [sum(len(sample.rollout.token_ids) for sample in lot) for lot in lots]
    assert all(size <= limit or len(lot) == 1 for size, lot in zip(sizes, lots, strict=True))
    if limit == 1000:
        assert len(lots) == 1


def test_the_overlap_marks_the_teachers_top_tokens_that_are_candidates_of_the_student():
    batch = _pack(SAMPLES)
    assert batch.overlap is not None
    row = 0
    for sample in SAMPLES:
        assert sample.scores is not None
        for position in range(len(sample.rollout.response_ids)):
            top = sample.scores.top_ids[position].tolist()
            candidates = sample.rollout.candidate_ids[position].tolist()
            wanted = [token in candidates for token in top]
            found = batch.overlap[row].tolist()
            assert found[: len(top)] == wanted and not any(found[len(top) :])
            row += 1
