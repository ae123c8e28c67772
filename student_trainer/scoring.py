"""The trainer's side of the teacher pool: checks at start, and rollouts in, scores out."""

import base64
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol, Unpack

from numpy.typing import ArrayLike

from stillhouse.archive import Archive, ArchivedClient, ArchiveError, ArchiveStats
from stillhouse.client import ClientStats, TeacherClient
from stillhouse.codec import Scores, Teacher
from stillhouse.errors import (
    DeadlineExceeded,
    EngineFailed,
    ModelRevisionMismatch,
    NonFiniteScores,
    PermissionDenied,
    StillhouseError,
    TransportFailed,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    VocabularyMismatch,
    WrongAnswer,
)
from stillhouse.request import ScoreOptions
from stillhouse.security import Tls
from stillhouse.vocabulary import vocabulary_digest
from student_trainer.batch import Rollout, candidates_for_teacher
from student_trainer.config import ConfigError, RunConfig, TeacherConfig
from student_trainer.progress import Heartbeat
from student_trainer.stopping import Stopped, Stopping, never

_CHANGED = (UnknownModel, ModelRevisionMismatch, VocabularyMismatch)
_WORTH_ANOTHER_TRY = (EngineFailed, NonFiniteScores, TransportFailed, WrongAnswer)
_REFUSED = (Unauthenticated, PermissionDenied)
_TRIES_TOO_LATE = 3
_POLL_S = 0.5
_SHOW_EVERY_S = 10.0


class ScoringClient(Protocol):
    """What a `Scorer` asks: the pool, the pool behind an archive, or an archive alone."""

    @property
    def stats(self) -> ClientStats:
        """What it has done so far."""
        ...

    def submit_score(
        self, token_ids: ArrayLike, *, score_start: int, top_k: int, **options: Unpack[ScoreOptions]
    ) -> Future[Scores]:
        """See `TeacherClient.submit_score`."""
        ...

    def close(self) -> None:
        """See `TeacherClient.close`."""
        ...


class Scorer:
    """Scores rollouts with the pool, against the revision and vocabulary that were checked at start.

    What goes wrong with a call is one of three things. The pool is away (nobody answers, or too late): an outage,
    which is waited out up to `outage_s`. The teacher cannot score this sequence: it is dropped, after a second try
    where that can help. The pool is not what it was at the start (another revision, another vocabulary): the run
    ends, because every further score would be of something else. A pool that does not know the run any more (a token
    or a right was taken away) is away, too: somebody may give it back.

    Unless the run follows new revisions: then each score is of the one that the pool serves at that moment, and says
    which.

    temperature: of the scores. rollout_temperature: at which answers are drawn, to be kept with them in an archive.
    """

    def __init__(
        self,
        client: ScoringClient,
        config: TeacherConfig,
        teacher: Teacher,
        temperature: float,
        *,
        rollout_temperature: float = 1.0,
    ) -> None:
        self._client = client
        self._config = config
        self._temperature = temperature
        self._rollout_temperature = rollout_temperature
        self.teacher = teacher
        self.outage_s = 0.0
        """How long nobody has answered a call that waits; 0 while the pool is up."""
        self.on_outage: Callable[[float], None] = lambda seconds: None
        """Called with `outage_s` once a second or so while it lasts, and with 0 at its end."""
        self.on_revision: Callable[[str], None] = lambda revision: None
        """Called when the pool serves another one, with a run that follows."""
        self.total_outage_s = 0.0
        """Of all outages so far."""
        self._shown_s = 0.0
        self._follows = config.on_new_revision == "follow"
        self._revision = teacher.model_revision

    def submit(self, rollout: Rollout) -> Future[Scores]:
        """Starts scoring the response of `rollout`; more calls than `max_in_flight` wait inside the client."""
        options: ScoreOptions = {
            "candidate_ids": candidates_for_teacher(rollout),
            "temperature": self._temperature,
            "deadline_s": self._config.deadline_s,
            "half_precision": self._config.wire_dtype == "float16",
            "expected_model_revision": "" if self._follows else self.teacher.model_revision,
            "expected_vocabulary_digest": self.teacher.vocabulary_digest,
            "expected_compute_dtype": self.teacher.compute_dtype,
        }
        tokens, start = rollout.token_ids, len(rollout.prompt.token_ids)
        top_k = min(self._config.top_k, self.teacher.vocabulary_size)
        if isinstance(self._client, ArchivedClient):
            facts = answer_facts(rollout, self._rollout_temperature)
            return self._client.submit_score(tokens, score_start=start, top_k=top_k, facts=facts, **options)
        return self._client.submit_score(tokens, score_start=start, top_k=top_k, **options)

    def collect(
        self, rollouts: Sequence[Rollout], futures: Sequence[Future[Scores]], *, stop: Stopping = never
    ) -> list[Scores | StillhouseError]:
        """Waits for `futures`, which `submit` gave for `rollouts`: the scores, or why there are none, in order.

        Ends early, with Stopped, once `stop()` is true. Raises what ends the run: an outage longer than `outage_s`
        (Unavailable), or a pool that changed. Everything still under way is then withdrawn.
        """
        heartbeat = Heartbeat("waiting for the teacher's scores", len(futures))
        results: list[Scores | StillhouseError | None] = [None] * len(futures)
        pending = {future: index for index, future in enumerate(futures)}
        too_late: Counter[int] = Counter()
        failed: set[int] = set()  # by the engine or on the way, once
        answers, answered_s = 0, time.monotonic()  # calls that ended in an answer, be it an error, and when the last
        late_since: dict[int, int] = {}  # answers there were when a call was first too late
        retries, away = self.retries, None
        refused: list[int] = []  # to be sent again after a moment: nobody waits before refusing
        try:
            while pending or refused:
                if stop():
                    raise Stopped("asked to stop while waiting for scores")
                if refused and not pending:
                    time.sleep(_POLL_S)
                    pending |= {self.submit(rollouts[index]): index for index in refused}
                    refused.clear()
                done, _ = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    index = pending.pop(future)
                    error = future.exception()
                    if error is None:
                        results[index] = self._noted(future.result())
                    elif not isinstance(error, StillhouseError) or isinstance(error, _CHANGED):
                        raise error
                    elif isinstance(error, DeadlineExceeded):
                        # Too late again and again while others are answered: it is this sequence, not the pool.
                        too_late[index] += 1
                        if answers > late_since.setdefault(index, answers) and too_late[index] >= _TRIES_TOO_LATE:
                            results[index] = error
                    elif isinstance(error, _REFUSED):
                        away = error
                        refused.append(index)
                        continue
                    elif isinstance(error, _WORTH_ANOTHER_TRY) and index not in failed:
                        failed.add(index)
                        pending[self.submit(rollouts[index])] = index
                        continue
                    elif not error.retryable:
                        results[index] = error
                    if results[index] is None:
                        away = error
                        pending[self.submit(rollouts[index])] = index
                    else:
                        answers, answered_s, retries, away = answers + 1, time.monotonic(), self.retries, None
                        heartbeat.advance(1)
                missing = away is not None or self.retries > retries  # the client still tries by itself
                self._note_outage(time.monotonic() - answered_s if missing else 0.0, away)
                heartbeat.advance()
        finally:
            for future in pending:
                future.cancel()
            self._note_outage(0.0, None)
        assert all(result is not None for result in results)
        return results  # pyright: ignore[reportReturnType]

    @property
    def retries(self) -> int:
        """Calls sent again so far."""
        return self._client.stats.retries.total()

    @property
    def archive_stats(self) -> ArchiveStats | None:
        """What was done with the archive so far; None without one."""
        return self._client.archive.stats if isinstance(self._client, ArchivedClient) else None

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _noted(self, scores: Scores) -> Scores:
        if scores.model_revision != self._revision:
            self._revision = scores.model_revision
            self.on_revision(self._revision)
            print(f"the teacher is revision {self._revision} now", file=sys.stderr, flush=True)
        return scores

    def _note_outage(self, seconds: float, error: StillhouseError | None) -> None:
        limit_s, why = self._config.outage_s, error or "calls fail and are sent again"
        if seconds >= limit_s:
            raise Unavailable(
                f"no teacher has answered for {seconds:.0f} s (teacher.outage_s is {limit_s:g}): {why}"
            ) from error
        if seconds - self._shown_s >= _SHOW_EVERY_S:
            self._shown_s = seconds
            print(
                f"no teacher has answered for {seconds:.0f} s, the run waits (up to {limit_s:.0f} s): {why}",
                file=sys.stderr,
                flush=True,
            )
        if self.outage_s and not seconds:
            self.total_outage_s += self.outage_s
            if self._shown_s:
                print(f"the teacher answers again after {self.outage_s:.0f} s", file=sys.stderr, flush=True)
            self._shown_s = 0.0
        if seconds or self.outage_s:
            self.on_outage(seconds)
        self.outage_s = seconds


def connect(
    config: RunConfig,
    teacher: TeacherConfig,
    tokenizer: Any,
    *,
    stop: Stopping = never,
    on_outage: Callable[[float], None] = lambda seconds: None,
) -> Scorer:
    """A scorer, once the pool is up and fits the run. on_outage: see `Scorer`; called while waiting here, too.

    Waits up to `start_deadline_s` with a line on stderr every few seconds. Raises ConfigError for what can be
    known to fail later: another vocabulary, top_k or lengths beyond the server's limits; Stopped once `stop()`.
    """
    archive = _open_archive(teacher)
    try:
        pool = TeacherClient(
            teacher.addresses,
            model=teacher.model,
            max_in_flight=teacher.max_in_flight,
            hedge_share=teacher.hedge_share,
            tls=_tls(teacher),
            token_file=teacher.token_file,
            plaintext_token=teacher.plaintext_token,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"teacher: {error}") from error
    client = pool if archive is None else ArchivedClient(pool, archive)
    shown_s = -10.0

    def on_wait(elapsed_s: float, error: StillhouseError) -> None:
        nonlocal shown_s
        if stop():
            raise Stopped("asked to stop while waiting for the teacher")
        on_outage(elapsed_s)
        if elapsed_s - shown_s >= 5:
            shown_s = elapsed_s
            where, limit_s = ", ".join(teacher.addresses), teacher.start_deadline_s
            print(
                f"waiting for the teacher at {where} ({elapsed_s:.0f} of {limit_s:.0f} s): {error}",
                file=sys.stderr,
            )

    try:
        served = client.wait_until_ready(deadline_s=teacher.start_deadline_s, on_wait=on_wait)
        _check_fit(config, teacher, served, tokenizer)
    except _REFUSED as error:
        client.close()
        raise ConfigError(
            f"teacher: {error}; give teacher.token_file or teacher.tls_certificate of a tenant that may use it",
            reason="teacher",
        ) from error
    except BaseException:
        client.close()
        raise
    on_outage(0.0)
    scorer = Scorer(client, teacher, served, config.distil_temperature, rollout_temperature=config.rollout.temperature)
    scorer.on_outage = on_outage
    return scorer


def _tls(teacher: TeacherConfig) -> Tls | None:
    files = teacher.tls_ca, teacher.tls_certificate, teacher.tls_key
    if not teacher.tls and not any(files) and teacher.tls_server_name is None:
        return None
    return Tls(*files, teacher.tls_server_name)


def _open_archive(teacher: TeacherConfig) -> Archive | None:
    config = teacher.archive
    if config is None:
        return None
    try:
        return Archive.open(
            config.url, max_bytes=config.max_bytes, mode=config.mode, on_write_failure=config.on_write_failure
        )
    except ArchiveError as error:
        raise ConfigError(f"teacher.archive: {error}") from error


def answer_facts(rollout: Rollout, rollout_temperature: float) -> dict[str, Any]:
    """What an archive keeps of an answer besides its request and its scores, for `student_trainer.offline`.

    The rest follows from the tokens. Rewards are not among it: they come after the score was asked for.
    """
    return {
        "prompt_key": rollout.prompt.key,
        "finished": rollout.finished,
        "rollout_temperature": rollout_temperature,
        # float32, little-endian, in base64: exact, and half as long as digits
        "sampler_logprobs": base64.b64encode(rollout.sampler_logprobs.astype("<f4", copy=False).tobytes()).decode(),
    }


def _check_fit(config: RunConfig, teacher: TeacherConfig, served: Teacher, tokenizer: Any) -> None:
    own = vocabulary_digest(tokenizer.get_vocab())
    if served.vocabulary_digest != own:
        raise ConfigError(
            f"student.model: its token ids do not mean what they mean to teacher {served.model!r} (vocabulary "
            f"digest {own[:12]} against {served.vocabulary_digest[:12] or 'none'}); scores would be of other "
            "tokens. Use a teacher with the student's tokenizer"
        )
    if teacher.top_k > served.max_top_k:
        raise ConfigError(f"teacher.top_k: {teacher.top_k} is above the server's {served.max_top_k}; lower it")
    if teacher.candidates + 1 > served.max_candidates:
        raise ConfigError(
            f"teacher.candidates: {teacher.candidates} and the sampled token are more than the server's "
            f"{served.max_candidates} a position; lower it or raise the server's --max-candidates"
        )
    temperature = config.distil_temperature
    if not served.min_temperature <= temperature <= served.max_temperature:
        raise ConfigError(
            f"objective.temperature: {temperature} is outside the server's {served.min_temperature} .. "
            f"{served.max_temperature}"
        )


def check_lengths(longest_prompt: int, max_new_tokens: int, limit: int, who: str) -> None:
    """Raises ConfigError if an answer of full length would not fit the `limit` tokens of `who`."""
    if longest_prompt + max_new_tokens > limit:
        raise ConfigError(
            f"rollout.max_new_tokens: {max_new_tokens} after a prompt of {longest_prompt} tokens is more than the "
            f"{who}'s {limit}; lower it to {limit - longest_prompt} or set prompts.max_prompt_tokens"
        )
