"""The client against real servers in this process: what it sends, when it waits, what it raises."""

import asyncio
import gc
import threading
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from stillhouse.client import AsyncTeacherClient, Backoff, ClientStats, TeacherClient
from stillhouse.codec import ScoreTask, encode_request
from stillhouse.errors import (
    BY_REASON,
    DeadlineExceeded,
    ModelRevisionMismatch,
    Overloaded,
    StillhouseError,
    Unavailable,
    WrongAnswer,
)
from stillhouse.v1 import teacher_pb2 as pb
from tests.calls import TOKENS, record_sleeps, score, until
from tests.fakes import (
    BigramTeacher,
    FakeServer,
    garbage,
    one_nan,
    wrong_digest,
    wrong_shape,
)

# --- what is sent and what comes back


def test_the_request_on_the_wire_is_exactly_what_was_asked(server: FakeServer) -> None:
    candidates = [[1, 2], [3, 4], [5, 6]]
    with TeacherClient([server.address], model="bigram") as client:
        client.score(
            TOKENS,
            score_start=2,
            top_k=3,
            candidate_ids=candidates,
            temperature=0.5,
            half_precision=True,
            expected_model_revision="r1",
            expected_vocabulary_digest="v1",
        )
        client.score(np.array(TOKENS, np.int64), score_start=4, top_k=0)
    expected = [
        pb.ScoreRequest(
            model="bigram",
            token_ids=pb.Array(dtype=1, shape=[5], data=np.array(TOKENS, "<i4").tobytes()),
            score_start=2,
            top_k=3,
            candidate_ids=pb.Array(dtype=1, shape=[3, 2], data=np.array(candidates, "<i4").tobytes()),
            temperature=0.5,
            expected_model_revision="r1",
            expected_vocabulary_digest="v1",
            logprob_dtype=3,
        ),
        pb.ScoreRequest(
            model="bigram",
            token_ids=pb.Array(dtype=1, shape=[5], data=np.array(TOKENS, "<i4").tobytes()),
            score_start=4,
            temperature=1.0,
            logprob_dtype=2,
        ),
    ]
    assert server.requests == expected


def test_scores_are_the_teachers_distribution(client: TeacherClient) -> None:
    teacher = BigramTeacher()
    candidates = np.array([[1, 0], [3, 4], [5, 6]])
    scores = client.score(TOKENS, score_start=2, top_k=4, candidate_ids=candidates, temperature=2.0)
    for row, (last, token) in enumerate([(1, 4), (4, 1), (1, 5)]):
        logits = teacher.logits[last] / 2.0
        probabilities = np.exp(logits) / np.exp(logits).sum()
        with np.errstate(divide="ignore"):
            logprobs = np.log(probabilities)
        best = np.argsort(-probabilities)[:4]
        assert list(scores.top_ids[row]) == list(best)
        np.testing.assert_allclose(scores.top_logprobs[row], logprobs[best], rtol=1e-6)
        np.testing.assert_allclose(scores.sampled_logprobs[row], logprobs[token], rtol=1e-6)
        assert scores.candidate_logprobs is not None
        np.testing.assert_allclose(scores.candidate_logprobs[row], logprobs[candidates[row]], rtol=1e-6)
        np.testing.assert_allclose(np.exp(scores.log_tail[row]), 1 - probabilities[best].sum(), rtol=1e-5)
        outside = np.setdiff1d(np.arange(19), np.concatenate([best, candidates[row]]))
        np.testing.assert_allclose(np.exp(scores.log_support_tail[row]), probabilities[outside].sum(), rtol=1e-5)
        np.testing.assert_allclose(scores.entropy[row], -(probabilities[1:] * logprobs[1:]).sum(), rtol=1e-5)
        np.testing.assert_allclose(scores.log_normalizer[row], np.log(np.exp(logits).sum()), rtol=1e-6)
    assert (scores.model, scores.model_revision, scores.temperature) == ("bigram", "r1", 2.0)
    assert (scores.queue_wait_ms, scores.engine_ms, scores.batch_sequences) == (0.5, 1.5, 1)


def test_the_blocking_and_the_asyncio_client_get_the_same_answer(server: FakeServer, client: TeacherClient) -> None:
    async def ask() -> tuple[Any, Any]:
        async with AsyncTeacherClient([server.address]) as other:
            return await other.score(TOKENS, score_start=2, top_k=3), await other.get_teacher()

    scores, teacher = asyncio.run(ask())
    mine = client.score(TOKENS, score_start=2, top_k=3)
    for name in ("top_ids", "top_logprobs", "sampled_logprobs", "log_tail", "entropy", "log_normalizer"):
        assert getattr(scores, name).tobytes() == getattr(mine, name).tobytes()
    assert teacher == client.get_teacher() == BigramTeacher().describe()


def test_arrays_may_be_reused_as_soon_as_the_call_is_submitted(server: FakeServer, client: TeacherClient) -> None:
    server.faults.hang_at(call=1)
    tokens, candidates = np.array(TOKENS, np.int32), np.array([[1], [2], [3]], np.int32)
    future = client.submit_score(tokens, score_start=2, top_k=2, candidate_ids=candidates)
    tokens[:] = 0
    candidates[:] = 0
    server.release()
    assert future.result(timeout=20).model == "bigram"
    task = ScoreTask("", np.array(TOKENS, np.int32), 2, 2, np.array([[1], [2], [3]], np.int32))
    assert server.requests == [encode_request(task)]


# --- arguments that can never be right


BAD_ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("token_ids", {"token_ids": [[1, 2], [3, 4]]}),
    ("token_ids", {"token_ids": 3}),
    ("token_ids", {"token_ids": [1.0, 2.0, 3.0]}),
    ("token_ids", {"token_ids": ["a", "b", "c"]}),
    ("token_ids", {"token_ids": [True, False, True]}),
    ("token_ids", {"token_ids": [1, -1, 2]}),
    ("token_ids", {"token_ids": [1, 2**31, 2]}),
    ("token_ids", {"token_ids": [1, 2**64, 2]}),
    ("score_start", {"score_start": 0}),
    ("score_start", {"score_start": -1}),
    ("score_start", {"score_start": 5}),
    ("score_start", {"token_ids": [], "score_start": 1}),
    ("score_start", {"token_ids": [1], "score_start": 1}),
    ("score_start", {"score_start": 2.0}),
    ("top_k", {"top_k": -1}),
    ("top_k", {"top_k": 2**31}),
    ("top_k", {"top_k": 2.5}),
    ("candidate_ids", {"candidate_ids": [1, 2, 3]}),
    ("candidate_ids", {"candidate_ids": [[1], [2]]}),
    ("candidate_ids", {"candidate_ids": [[1], [2], [-3]]}),
    ("candidate_ids", {"candidate_ids": [[0.5], [2.0], [3.0]]}),
    ("temperature", {"temperature": 0.0}),
    ("temperature", {"temperature": -1.0}),
    ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": float("inf")}),
    ("deadline_s", {"deadline_s": float("inf")}),
    ("deadline_s", {"deadline_s": float("nan")}),
]


@pytest.mark.parametrize(("field", "arguments"), BAD_ARGUMENTS)
def test_a_wrong_argument_is_a_value_error_that_names_it_and_nothing_is_sent(
    server: FakeServer, client: TeacherClient, field: str, arguments: dict[str, Any]
) -> None:
    call: dict[str, Any] = {"token_ids": TOKENS, "score_start": 2, "top_k": 2, **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ask in (client.score, client.submit_score):
            with pytest.raises(ValueError, match=field):
                ask(**call)
        gc.collect()
    assert server.requests == []


@pytest.mark.parametrize("kind", [TeacherClient, AsyncTeacherClient])
def test_a_client_needs_a_list_of_addresses_and_a_place(kind: type[Any]) -> None:
    threads = threading.active_count()
    for arguments in ({"addresses": []}, {"addresses": "host:1"}, {"addresses": ["h:1"], "max_in_flight": 0}):
        with pytest.raises(ValueError, match=r"addresses|max_in_flight"):
            kind(**arguments)
    assert threading.active_count() == threads


# --- deadlines


@pytest.mark.parametrize("method", ["Score", "GetTeacher"])
def test_a_server_that_hangs_ends_in_deadline_exceeded(server: FakeServer, client: TeacherClient, method: str) -> None:
    server.faults.hang_at(method=method)

    def cancelled() -> bool:
        with pytest.raises(DeadlineExceeded):
            if method == "Score":
                score(client, deadline_s=0.2)
            else:
                client.get_teacher(deadline_s=0.2)
        return server.cancelled > 0 or method == "GetTeacher"

    until(cancelled)  # a call may end before the server has seen it


def test_every_call_carries_its_deadline_to_the_server(server: FakeServer, client: TeacherClient) -> None:
    seen: list[float | None] = []
    answer = server._answer

    async def look(method: str, right: Callable[[], Any], context: Any) -> Any:
        seen.append(context.time_remaining())
        return await answer(method, right, context)

    server._answer = look
    score(client)
    score(client, deadline_s=7.0)
    client.get_teacher()
    client.wait_until_ready(deadline_s=100)
    assert all(s is not None for s in seen)
    limits = [30.0, 7.0, 10.0, 3.0]
    # `wait_until_ready` may have asked twice.
    assert all(0 < s <= limit + 0.5 for s, limit in zip(seen[:4], limits, strict=True) if s is not None)


def test_a_deadline_that_has_passed_already_sends_nothing(server: FakeServer, client: TeacherClient) -> None:
    for deadline_s in (0.0, -1.0):
        with pytest.raises(DeadlineExceeded):
            score(client, deadline_s=deadline_s)
    assert server.requests == []


def test_the_deadline_covers_all_retries_and_the_error_says_why_they_were_needed(
    server: FakeServer, client: TeacherClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    answer = server._answer
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 20.0 * len(seen))
    monkeypatch.setattr("stillhouse.attempts.time", clock)

    async def take_20_s(method: str, right: Callable[[], Any], context: Any) -> Any:
        seen.append(context.time_remaining())
        return await answer(method, right, context)

    server._answer = take_20_s
    server.faults.fail_at(call=1, error=Unavailable("the cellar is flooded"))
    server.faults.fail_at(call=2, code=grpc.StatusCode.DEADLINE_EXCEEDED)
    with pytest.raises(DeadlineExceeded, match="the cellar is flooded"):
        score(client, deadline_s=30.0)
    assert len(seen) == 2
    assert seen[1] <= 10.0 + 0.5


# --- retries


@pytest.mark.parametrize("retryable", [kind for kind in BY_REASON.values() if kind.retryable])
def test_a_retryable_error_is_sent_again_with_the_same_bytes(
    server: FakeServer, client: TeacherClient, retryable: type[StillhouseError]
) -> None:
    server.faults.fail_at(call=1, error=retryable("come again"))
    server.faults.fail_at(call=2, error=retryable("come again"))
    assert score(client).model == "bigram"
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[1] == server.requests[2]
    assert client.stats == ClientStats(answered=1, retries=client.stats.retries)
    assert dict(client.stats.retries) == {retryable.reason: 2}


@pytest.mark.parametrize("final", [kind for kind in BY_REASON.values() if not kind.retryable])
def test_any_other_error_is_raised_at_once(
    server: FakeServer, client: TeacherClient, final: type[StillhouseError]
) -> None:
    server.faults.fail_at(call=1, error=final("no", retry_delay_s=0.0))
    with pytest.raises(final):
        score(client)
    assert len(server.requests) == 1
    assert dict(client.stats.failures) == {final.reason: 1}
    assert not client.stats.retries


def test_bare_unavailable_and_bare_cancelled_are_sent_again(server: FakeServer, client: TeacherClient) -> None:
    # What a killed server and one that stops without draining look like.
    server.faults.fail_at(call=1, code=grpc.StatusCode.UNAVAILABLE)
    server.faults.fail_at(call=2, code=grpc.StatusCode.CANCELLED)
    assert score(client).model == "bigram"
    assert dict(client.stats.retries) == {"UNAVAILABLE": 1, "CANCELLED": 1}


def test_the_delay_that_the_server_asks_for_is_waited(
    server: FakeServer, client: TeacherClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = record_sleeps(monkeypatch)
    server.faults.fail_at(call=1, error=Overloaded("full", retry_delay_s=0.2))
    server.faults.fail_at(call=2, error=Overloaded("full", retry_delay_s=0.3))
    score(client)
    assert 0.2 <= waits[0] <= 0.2 + 0.01
    assert 0.3 <= waits[1] <= 0.3 + 0.02


def test_a_server_that_asks_for_no_delay_is_not_hammered(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = record_sleeps(monkeypatch)
    for call in range(1, 6):
        server.faults.fail_at(call=call, error=Overloaded("full", retry_delay_s=0.0))
    with TeacherClient([server.address], backoff=Backoff(initial_s=0.01, max_s=1.0)) as client:
        score(client)
    assert len(waits) == 5
    assert sum(waits) > 0


def test_a_delay_beyond_the_deadline_is_not_waited_for(server: FakeServer, client: TeacherClient) -> None:
    server.faults.fail_at(error=Overloaded("full", retry_delay_s=3600.0))
    with pytest.raises(Overloaded) as caught:
        score(client, deadline_s=60.0)
    assert caught.value.retry_delay_s == 3600.0
    assert len(server.requests) == 1


def test_backoff_doubles_up_to_its_limit_and_is_random() -> None:
    backoff = Backoff(initial_s=0.1, max_s=1.0)
    for attempt, limit in [(0, 0.1), (1, 0.2), (3, 0.8), (4, 1.0), (10_000, 1.0)]:
        draws = [backoff.delay_s(attempt) for _ in range(500)]
        assert 0 <= min(draws) < 0.2 * limit
        assert 0.8 * limit < max(draws) <= limit


def test_the_client_does_not_draw_from_the_programs_random_numbers(server: FakeServer, client: TeacherClient) -> None:
    import random

    server.faults.fail_at(call=1, error=Unavailable("again"))
    random.seed(5)
    expected = random.random()
    random.seed(5)
    score(client)
    assert random.random() == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (wrong_digest, "request_digest"),
        (wrong_shape, "entropy"),
        (one_nan, "entropy"),
        (garbage, "message"),
        (lambda response: b"", "request_digest"),
    ],
)
def test_a_wrong_answer_is_refused_counted_and_not_asked_for_again(
    server: FakeServer, client: TeacherClient, change: Callable[[Any], Any], field: str
) -> None:
    server.faults.answer_at(change, call=1)
    with pytest.raises(WrongAnswer) as caught:
        score(client)
    assert caught.value.fields == {"field": field}
    assert len(server.requests) == 1
    assert client.stats == ClientStats(failures=client.stats.failures)
    assert dict(client.stats.failures) == {"WRONG_ANSWER": 1}
    assert score(client).model == "bigram"


def test_a_description_that_is_garbage_is_refused(server: FakeServer, client: TeacherClient) -> None:
    server.faults.answer_at(lambda _: b"\xff\xff", method="GetTeacher", call=1)
    server.faults.answer_at(lambda _: b"", method="GetTeacher", call=2)
    for _ in range(2):
        with pytest.raises(WrongAnswer):
            client.get_teacher()


def test_an_answer_from_another_revision_than_the_pinned_one_is_refused(
    server: FakeServer, client: TeacherClient
) -> None:
    with pytest.raises(WrongAnswer) as caught:  # the fake does not check the pin; the client does
        score(client, expected_model_revision="r0")
    assert caught.value.fields == {"field": "model_revision"}
    server.faults.fail_at(error=ModelRevisionMismatch("r1 here"))
    with pytest.raises(ModelRevisionMismatch):
        score(client, expected_model_revision="r0")
