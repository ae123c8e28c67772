"""What is known at start fails at start; a run's scores are of the pinned revision and vocabulary."""

import contextlib
import dataclasses
import io
import itertools
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import yaml

from stillhouse.codec import Scores
from stillhouse.errors import (
    DeadlineExceeded,
    EngineFailed,
    ModelRevisionMismatch,
    Overloaded,
    PermissionDenied,
    SequenceTooLong,
    Unauthenticated,
    Unavailable,
)
from stillhouse.vocabulary import vocabulary_digest
from student_trainer.batch import Rollout
from student_trainer.config import ConfigError, RunConfig
from student_trainer.prompts import Prompt
from student_trainer.score import _gather
from student_trainer.scoring import Scorer, check_lengths, connect
from student_trainer.stopping import Stopped
from tests.fakes import BigramTeacher, FakeServer

VOCABULARY = {f"w{index}": index for index in range(19)}


class _Tokenizer:
    def get_vocab(self) -> dict[str, int]:
        return VOCABULARY


class _Teacher(BigramTeacher):
    """The bigram teacher with the tokenizer's vocabulary, and anything else a test wants it to say."""

    def __init__(self, **says: Any) -> None:
        super().__init__()
        self._says = {"vocabulary_digest": vocabulary_digest(VOCABULARY)} | says

    def describe(self):
        return dataclasses.replace(super().describe(), **self._says)


def _config(address: str, extra: str = "") -> RunConfig:
    text = f"""
    run_dir: x
    steps: 1
    student: {{model: m}}
    prompts: {{source: reasoning_gym, dataset: chain_sum}}
    objective: {{recipe: reverse_kl, temperature: 1.0}}
    teacher: {{addresses: ["{address}"], top_k: 4, candidates: 2, start_deadline_s: 60.0}}
    """
    data = yaml.safe_load(text)
    for key, value in yaml.safe_load(extra or "{}").items():
        data[key] |= value
    return RunConfig.model_validate(data)


def _connect(teacher: BigramTeacher, extra: str = "") -> Any:
    with FakeServer(teacher) as server:
        config = _config(server.address, extra)
        assert config.teacher is not None
        scorer = connect(config, config.teacher, _Tokenizer())
        scorer.close()
        return scorer


ROLLOUT = Rollout(
    prompt=Prompt("p", "p", None, (3, 4), None, {}),
    response_ids=np.array([5, 6, 7], np.int32),
    sampler_logprobs=np.zeros(3, np.float32),
    candidate_ids=np.array([[1, 2], [6, 2], [1, 2]], np.int32),
    text="",
    finished=True,
)
LATE = dataclasses.replace(ROLLOUT, text="late")


def test_a_fitting_teacher_is_accepted():
    assert _connect(_Teacher()).teacher.model == "bigram"


@pytest.mark.parametrize(
    ("says", "extra", "parts"),
    [
        ({"vocabulary_digest": "other"}, "", ("student.model", "do not mean what they mean to teacher 'bigram'")),
        ({"vocabulary_digest": ""}, "", ("against none",)),
        ({"max_top_k": 3}, "", ("teacher.top_k: 4", "server's 3")),
        ({"max_candidates": 2}, "", ("teacher.candidates: 2", "server's 2", "--max-candidates")),
        ({"max_temperature": 1.5}, "objective: {temperature: 2.0}", ("objective.temperature: 2.0", "1.5")),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_at_start(says, extra, parts):
    with pytest.raises(ConfigError) as caught:
        _connect(_Teacher(**says), extra)
    for part in parts:
        assert part in str(caught.value)


def test_answers_too_long_for_the_teacher_are_refused_with_the_length_that_fits():
    check_lengths(40, 60, 100, "teacher")
    with pytest.raises(ConfigError, match="more than the teacher's 100; lower it to 60"):
        check_lengths(40, 61, 100, "teacher")


def test_no_teacher_is_a_visible_wait_and_then_a_clear_error(capsys):
    config = _config("127.0.0.1:9", "teacher: {start_deadline_s: 1.0}")
    assert config.teacher is not None
    with pytest.raises(Unavailable):
        connect(config, config.teacher, _Tokenizer())
    assert re.search(r"waiting for the teacher at 127\.0\.0\.1:9 \(\d of 1 s\): .*refused", capsys.readouterr().err)


def test_a_rollout_is_scored_from_its_first_response_token_at_its_candidates():
    with FakeServer(_Teacher()) as server:
        config = _config(server.address)
        assert config.teacher is not None
        scorer = connect(config, config.teacher, _Tokenizer())
        scores = scorer.submit(ROLLOUT).result()
        scorer.close()
        request = server.requests[0]
    assert request.score_start == 2 and request.top_k == 4
    assert request.expected_model_revision == "r1"
    assert request.expected_vocabulary_digest == vocabulary_digest(VOCABULARY)
    # The sampled token is asked for as the last candidate, so it is always part of the support.
    np.testing.assert_array_equal(scores.candidate_logprobs[:, -1], scores.sampled_logprobs)


def test_a_teacher_replaced_in_the_middle_is_a_named_error_not_a_silent_change():
    with FakeServer(_Teacher()) as server:
        config = _config(server.address)
        assert config.teacher is not None
        scorer = connect(config, config.teacher, _Tokenizer())
        server.faults.fail_at(error=ModelRevisionMismatch("another revision"))
        with pytest.raises(ModelRevisionMismatch):
            scorer.collect([ROLLOUT], [scorer.submit(ROLLOUT)])
        scorer.close()


def test_gathering_keeps_the_order_and_says_when_it_waits(monkeypatch):
    futures: list[Future] = [Future() for _ in range(3)]
    futures[2].set_result("c")
    futures[0].set_result("a")

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if "2 of 3" in text and not futures[1].done():
                futures[1].set_result("b")
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Screen())
    assert _gather(futures, note_every_s=0.1) == ["a", "b", "c"]
    assert re.search(r"waiting for the teacher's scores: 2 of 3, \d+ s", sys.stderr.getvalue())  # pyright: ignore


def test_the_first_failure_is_raised_at_once_and_the_rest_withdrawn():
    futures: list[Future] = [Future() for _ in range(3)]
    futures[1].set_exception(Unavailable("gone"))
    with pytest.raises(Unavailable, match="gone"):
        _gather(futures)
    assert futures[0].cancelled() and futures[2].cancelled()


@contextlib.contextmanager
def _scoring(server: FakeServer, **teacher: Any) -> Iterator[Scorer]:
    config = _config(server.address, yaml.safe_dump({"teacher": teacher}))
    assert config.teacher is not None
    scorer = connect(config, config.teacher, _Tokenizer())
    try:
        yield scorer
    finally:
        scorer.close()


def _collect(scorer: Scorer, count: int, **options: Any) -> list[Any]:
    return scorer.collect([ROLLOUT] * count, [scorer.submit(ROLLOUT) for _ in range(count)], **options)


def test_a_sequence_the_teacher_cannot_score_is_an_error_in_its_place_and_the_others_are_scored():
    with FakeServer(_Teacher()) as server, _scoring(server) as scorer:
        server.faults.fail_at(call=2, error=SequenceTooLong("too long"))
        results = _collect(scorer, 3)
    assert sorted(type(result).__name__ for result in results) == ["Scores", "Scores", "SequenceTooLong"]


def test_a_failure_of_the_engine_is_tried_once_more():
    with FakeServer(_Teacher()) as server, _scoring(server) as scorer:
        server.faults.fail_at(call=1, error=EngineFailed("a bug"))
        assert isinstance(_collect(scorer, 1)[0], Scores)
        server.faults.fail_at(error=EngineFailed("a bug"))
        assert isinstance(_collect(scorer, 1)[0], EngineFailed)
        assert server.calls["Score"] == 4


def test_an_outage_longer_than_a_calls_deadline_is_waited_out_and_told(capsys, monkeypatch):
    monkeypatch.setattr("student_trainer.scoring._SHOW_EVERY_S", 0.5)
    monkeypatch.setattr("student_trainer.scoring._TRIES_TOO_LATE", 1000)  # this is not about a sequence
    seen: list[float] = []
    server = FakeServer(_Teacher())
    with _scoring(server, deadline_s=0.5) as scorer:
        server.stop()
        again: list[FakeServer] = []

        def outage(seconds: float) -> None:
            seen.append(seconds)
            if seconds > 2.0 and not again:
                again.append(FakeServer(_Teacher(), port=server.port))

        scorer.on_outage = outage
        results = _collect(scorer, 2)
        again[0].stop()
    assert all(isinstance(result, Scores) for result in results)
    assert max(seen) > 2.0 and seen[-1] == 0.0 and scorer.outage_s == 0.0
    # On a busy machine the second call may be late once more after the first was answered.
    assert scorer.total_outage_s == sum(last for last, after in itertools.pairwise(seen) if after == 0.0)
    error = capsys.readouterr().err
    assert re.search(r"no teacher has answered for [1-9]\d* s, the run waits \(up to 7200 s\)", error)
    assert re.search(r"the teacher answers again after \d+ s", error)


def test_an_outage_that_lasts_too_long_ends_the_run():
    server = FakeServer(_Teacher())
    with _scoring(server, deadline_s=0.3, outage_s=1.5) as scorer:
        server.stop()
        with pytest.raises(Unavailable, match=r"no teacher has answered for \d+ s \(teacher.outage_s is 1.5\)"):
            _collect(scorer, 2)


def test_an_overloaded_pool_is_an_outage_not_a_lost_sample():
    with FakeServer(_Teacher()) as server, _scoring(server, deadline_s=0.4) as scorer:
        server.faults.fail_at(error=Overloaded("full", retry_delay_s=0.1))
        scorer.on_outage = lambda seconds: server.faults.planned.clear() if seconds > 0.6 else None
        assert isinstance(_collect(scorer, 1)[0], Scores)
        assert scorer.total_outage_s > 0.5


def test_a_sequence_that_is_always_too_late_is_given_up_once_others_are_answered():
    with FakeServer(_Teacher()) as server, _scoring(server) as scorer:
        answer = scorer.submit(ROLLOUT).result()
        sent: list[Future[Scores]] = []
        others: list[Future[Scores]] = [Future() for _ in range(4)]

        def submit(rollout: Rollout) -> Future[Scores]:
            assert rollout is LATE
            sent.append(Future())
            return sent[-1]

        def too_late() -> None:
            sent[-1].set_exception(DeadlineExceeded("no answer within 0.1 s"))

        def answered() -> None:
            next(other for other in others if not other.done()).set_result(answer)

        def away() -> None:  # does not count: it is the pool, not this sequence
            sent[-1].set_exception(Unavailable("away"))

        happens = iter([away, too_late, answered, too_late, too_late, answered, answered, answered])
        scorer.submit = submit  # pyright: ignore
        # `stop` is asked once a round.
        found = scorer.collect([LATE, *[ROLLOUT] * 4], [submit(LATE), *others], stop=lambda: next(happens)() or False)
    assert isinstance(found[0], DeadlineExceeded) and len(sent) == 4
    assert all(isinstance(result, Scores) for result in found[1:])


def test_an_outage_before_it_does_not_cost_a_failure_of_the_engine_its_second_try():
    with FakeServer(_Teacher()) as server, _scoring(server) as scorer:
        answer = scorer.submit(ROLLOUT).result()
        sent: list[Future[Scores]] = []

        def submit(rollout: Rollout) -> Future[Scores]:
            sent.append(Future())
            return sent[-1]

        happens = iter([Unavailable("away"), EngineFailed("a bug"), None])

        def stop() -> bool:  # asked once a round
            if (error := next(happens)) is not None:
                sent[-1].set_exception(error)
            else:
                sent[-1].set_result(answer)
            return False

        scorer.submit = submit  # pyright: ignore
        assert scorer.collect([ROLLOUT], [submit(ROLLOUT)], stop=stop) == [answer]


def test_waiting_for_scores_can_be_given_up():
    with FakeServer(_Teacher()) as server, _scoring(server) as scorer:
        server.faults.hang_at()
        with pytest.raises(Stopped):
            _collect(scorer, 2, stop=lambda: server.in_flight == 2)
        server.wait_for(lambda s: s.cancelled == 2)


@pytest.mark.parametrize("error", [Unauthenticated("who?"), PermissionDenied("no")])
def test_a_right_that_was_taken_away_is_waited_for_not_a_lost_sample(error, capsys, monkeypatch):
    monkeypatch.setattr("student_trainer.scoring._SHOW_EVERY_S", 0.5)
    with FakeServer(_Teacher()) as server, _scoring(server) as scorer:
        server.faults.fail_at(error=error)
        scorer.on_outage = lambda seconds: server.faults.planned.clear() if seconds > 1.5 else None
        results = _collect(scorer, 3)
        assert all(isinstance(result, Scores) for result in results)
        assert scorer.total_outage_s > 0.5
        assert server.calls["Score"] < 24 * (1 + scorer.total_outage_s), "it was asked again and again without a pause"
    assert error.message in capsys.readouterr().err


@pytest.mark.parametrize("error", [Unauthenticated("who?"), PermissionDenied("no")])
def test_a_teacher_that_does_not_know_the_run_at_its_start_refuses_it(error):
    with FakeServer(_Teacher()) as server:
        server.faults.fail_at(error=error, method="GetTeacher")
        with pytest.raises(ConfigError, match=r"teacher: .*; give teacher.token_file or teacher.tls_certificate"):
            connect(_config(server.address), _config(server.address).teacher, _Tokenizer())  # type: ignore[arg-type]


def test_a_token_is_not_sent_in_the_open_unless_somebody_says_so(tmp_path):
    token = tmp_path / "token"
    token.write_text("a" * 32)
    with FakeServer(_Teacher()) as server:
        with (
            pytest.raises(ConfigError, match=r"teacher: token_file is .* without tls"),
            _scoring(server, token_file=str(token)),
        ):
            pass
        with _scoring(server, token_file=str(token), plaintext_token=True) as scorer:
            assert isinstance(_collect(scorer, 1)[0], Scores)


class _Moving(_Teacher):
    """Serves another revision from the third sequence on."""

    def __init__(self) -> None:
        super().__init__()
        self.scored = 0

    def score(self, task):
        self.scored += 1
        return dataclasses.replace(super().score(task), model_revision="r1" if self.scored < 3 else "r2")


def test_a_run_that_follows_learns_from_the_new_revision_and_says_so(capsys):
    with FakeServer(_Moving()) as server, _scoring(server, on_new_revision="follow", max_in_flight=1) as scorer:
        results = _collect(scorer, 4)
        assert [result.model_revision for result in results] == ["r1", "r1", "r2", "r2"]
        assert {request.expected_model_revision for request in server.requests} == {""}
        assert {request.expected_vocabulary_digest for request in server.requests} != {""}
    assert capsys.readouterr().err.count("the teacher is revision r2 now") == 1
