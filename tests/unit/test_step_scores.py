"""Scores of sequences that come in pieces: the same as whole ones, whatever shares a step with them."""

import gc
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_head import LMHead
from teacher_server.packing import RowRequest, failure_of, unpack_answer
from teacher_server.row_scores import Shard
from teacher_server.step_scores import Part, StepScorer
from tests.models import scores_of_logits

V, D = 300, 8


class State:
    """What an engine keeps for a sequence."""


class WholeHead:
    columns = V
    shard: Shard | None = None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.head = LMHead(torch.randn(V, D, generator=generator), torch.randn(V, generator=generator))
        self.error: Exception | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return self.head.logits(hidden)

    def whole_logits(self, hidden: Tensor) -> Tensor | None:
        return self.head.logits(hidden).to(torch.bfloat16)


class Sequence:
    """A random sequence of hidden states and what is asked of it."""

    def __init__(self, seed: int, length: int, *, k: int = 3, m: int = 2, temperature: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.hidden = torch.from_numpy(rng.standard_normal((length, D)).astype(np.float32))
        self.length = length
        first = int(rng.integers(0, length - 1))
        self.request = RowRequest(
            first_row=first,
            top_k=k,
            temperature=temperature,
            target_ids=rng.integers(0, V, length - 1 - first).astype(np.int32),
            candidate_ids=rng.integers(0, V, (length - 1 - first, m)).astype(np.int32),
        )
        self.state = State()

    def part(self, begin: int, end: int) -> Part:
        return Part(self.state, self.request.pack(), 0.0, begin, end, self.length)

    def assert_right(self, head: WholeHead, answer: Tensor | None) -> None:
        assert answer is not None
        _, found = unpack_answer(answer.numpy(), self.request)
        rows = self.hidden[self.request.first_row : -1].double().numpy()
        assert head.head.bias is not None
        z = rows @ head.head.weight.double().numpy().T + head.head.bias.double().numpy()
        expected = scores_of_logits(
            z,
            self.request.target_ids,
            top_k=self.request.top_k,
            candidate_ids=self.request.candidate_ids,
            temperature=self.request.temperature,
        )
        for name, want in expected.items():
            np.testing.assert_allclose(found[name], want, atol=2e-5, err_msg=name)


def scorer_of(head: WholeHead) -> StepScorer:
    return StepScorer(head, max_top_k=8, max_candidates=4, logits_slice_bytes=2**20)


def step(scorer: StepScorer, *parts: tuple[Sequence, int, int]) -> list[Tensor | None]:
    hidden = torch.cat([sequence.hidden[begin:end] for sequence, begin, end in parts])
    return scorer.step(hidden, [sequence.part(begin, end) for sequence, begin, end in parts])


@pytest.mark.parametrize("size", [1, 2, 7, 16, 40])
def test_a_sequence_in_pieces_has_the_scores_of_a_whole_one(size: int) -> None:
    head = WholeHead()
    scorer = scorer_of(head)
    for seed in range(6):
        sequence = Sequence(seed, 33, k=seed, m=seed % 3, temperature=1.0 + seed)
        edges = [*range(0, 33, size), 33]
        answers = [step(scorer, (sequence, begin, end))[0] for begin, end in itertools.pairwise(edges)]
        assert all(answer is None for answer in answers[:-1])
        sequence.assert_right(head, answers[-1])


def test_pieces_of_different_requests_share_a_step() -> None:
    head = WholeHead()
    scorer = scorer_of(head)
    sequences = [
        Sequence(seed, 20 + seed, k=[3, 0][seed % 2], m=[2, 1, 0][seed % 3], temperature=1 + seed % 2)
        for seed in range(8)
    ]
    first = step(scorer, *[(sequence, 0, 5 + index) for index, sequence in enumerate(sequences)])
    assert first == [None] * 8
    # In another order, beside one that begins only now and one that is whole.
    late, whole = Sequence(20, 12), Sequence(21, 9)
    rest = [(sequence, 5 + index, sequence.length) for index, sequence in enumerate(sequences)][::-1]
    answers = step(scorer, (late, 0, 4), *rest, (whole, 0, 9))
    assert answers[0] is None
    for (sequence, _, _), answer in zip(rest, answers[1:-1], strict=True):
        sequence.assert_right(head, answer)
    whole.assert_right(head, answers[-1])
    counters, _ = unpack_answer(answers[-1].numpy(), whole.request)  # pyright: ignore[reportOptionalMemberAccess]
    assert counters.batch_sequences == 9
    late.assert_right(head, step(scorer, (late, 4, 12))[0])


def test_a_sequence_that_lost_its_cache_starts_again() -> None:
    head = WholeHead()
    scorer = scorer_of(head)
    sequence = Sequence(3, 30)
    step(scorer, (sequence, 0, 10))
    step(scorer, (sequence, 10, 25))
    step(scorer, (sequence, 0, 8))
    sequence.assert_right(head, step(scorer, (sequence, 8, 30))[0])


def test_rows_that_nobody_computed_are_missed_not_invented() -> None:
    head = WholeHead()
    scorer = scorer_of(head)
    sequence = Sequence(4, 30)
    first = sequence.request.first_row
    (answer,) = step(scorer, (sequence, first + 1, 30))  # a prefix was reused one row too far
    assert answer is not None
    assert len(answer) == 1
    counters, _ = unpack_answer(answer.numpy(), sequence.request)
    assert counters.cached_tokens == first + 1
    again = Sequence(4, 30)
    again.assert_right(head, step(scorer, (again, first, 30))[0])


@pytest.mark.parametrize(
    ("error", "kind"),
    [(torch.OutOfMemoryError("no memory"), "memory"), (MemoryError("none"), "memory"), (KeyError("x"), "failed")],
)
def test_a_failure_belongs_to_its_sequences(error: Exception, kind: str) -> None:
    head = WholeHead()
    scorer = scorer_of(head)
    doomed, fine = Sequence(5, 20), Sequence(6, 20)
    head.error = error
    assert step(scorer, (doomed, 0, 19)) == [None]
    head.error = None
    answers = step(scorer, (doomed, 19, 20), (fine, 0, 20))
    assert answers[0] is not None
    assert (failure_of(answers[0].numpy()) or "").startswith(f"{kind}: ")
    fine.assert_right(head, answers[1])


def test_with_a_sharded_head_a_failure_is_everybodys() -> None:
    head = WholeHead()
    head.shard = Shard(0, 1, 0, lambda own: own[None])
    head.error = KeyError("x")
    with pytest.raises(KeyError):
        step(scorer_of(head), (Sequence(5, 20), 0, 20))


def test_what_is_known_of_a_withdrawn_sequence_goes_with_it() -> None:
    scorer = scorer_of(WholeHead())
    sequence = Sequence(7, 20)
    step(scorer, (sequence, 0, 10))
    assert len(scorer._known) == 1
    del sequence
    gc.collect()
    assert len(scorer._known) == 0


def test_a_rehearsal_has_the_widest_answer_of_every_row() -> None:
    packed = scorer_of(WholeHead()).rehearse(torch.randn(11, D))
    assert packed.shape == (11, 2 * 8 + 4 + 5)


def test_the_plain_way_uses_the_engines_own_logits() -> None:
    head = WholeHead()
    scorer = scorer_of(head)
    sequence = Sequence(8, 20)
    object.__setattr__(sequence.request, "plain", True)
    (answer,) = step(scorer, (sequence, 0, 20))
    assert answer is not None
    _, found = unpack_answer(answer.numpy(), sequence.request)
    with pytest.raises(AssertionError):
        sequence.assert_right(head, answer)  # they are rounded
    z = head.whole_logits(sequence.hidden[sequence.request.first_row : -1])
    assert z is not None
    expected = scores_of_logits(
        z.double().numpy(),
        sequence.request.target_ids,
        top_k=3,
        candidate_ids=sequence.request.candidate_ids,
        temperature=1.0,
    )
    for name in ("sampled_logprobs", "candidate_logprobs", "top_logprobs", "log_tail", "entropy", "log_normalizer"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)
