"""The trainer's side of the teacher pool: checks at start, and rollouts in, scores out."""

import sys
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from stillhouse.client import TeacherClient
from stillhouse.codec import Scores, Teacher
from stillhouse.errors import StillhouseError
from stillhouse.vocabulary import vocabulary_digest
from student_trainer.batch import Rollout, candidates_for_teacher
from student_trainer.config import ConfigError, RunConfig, TeacherConfig
from student_trainer.progress import Heartbeat


class Scorer:
    """Scores rollouts with the pool, against the revision and vocabulary that were checked at start."""

    def __init__(self, client: TeacherClient, config: TeacherConfig, teacher: Teacher, temperature: float) -> None:
        self._client = client
        self._config = config
        self._temperature = temperature
        self.teacher = teacher

    def submit(self, rollout: Rollout) -> Future[Scores]:
        """Starts scoring the response of `rollout`; more calls than `max_in_flight` wait inside the client."""
        return self._client.submit_score(
            rollout.token_ids,
            score_start=len(rollout.prompt.token_ids),
            top_k=min(self._config.top_k, self.teacher.vocabulary_size),
            candidate_ids=candidates_for_teacher(rollout),
            temperature=self._temperature,
            deadline_s=self._config.deadline_s,
            half_precision=self._config.wire_dtype == "float16",
            expected_model_revision=self.teacher.model_revision,
            expected_vocabulary_digest=self.teacher.vocabulary_digest,
        )

    @property
    def retries(self) -> int:
        """Calls sent again so far."""
        return self._client.stats.retries.total()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


def connect(config: RunConfig, teacher: TeacherConfig, tokenizer: Any) -> Scorer:
    """A scorer, once the pool is up and fits the run.

    Waits up to `start_deadline_s` with a line on stderr every few seconds. Raises ConfigError for what can be
    known to fail later: another vocabulary, top_k or lengths beyond the server's limits.
    """
    client = TeacherClient(teacher.addresses, model=teacher.model, max_in_flight=teacher.max_in_flight)
    shown_s = -10.0

    def on_wait(elapsed_s: float, error: StillhouseError) -> None:
        nonlocal shown_s
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
    except BaseException:
        client.close()
        raise
    return Scorer(client, teacher, served, config.distil_temperature)


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


def gather(futures: list[Future[Scores]], *, note_every_s: float = 10.0) -> list[Scores]:
    """Results in order; a line on stderr every `note_every_s` while any is missing.

    The first failure is raised at once and the rest withdrawn. Each call carries its own deadline, so this ends.
    """
    heartbeat = Heartbeat("waiting for the teacher's scores", len(futures), every_s=note_every_s)
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=note_every_s, return_when=FIRST_COMPLETED)
        heartbeat.advance(len(done))
        for future in done:
            if future.exception() is not None:
                for other in pending:
                    other.cancel()
                future.result()
    return [future.result() for future in futures]
