"""Learning from an archive alone: the answers of an earlier run, scored then, without a teacher and without sampling.

Entries of one prompt, by its tokens, are the answers to it. A step takes prompts in the usual order and, of each, up to
`rollout.answers_per_prompt` archived answers, drawn without repetition from the seed of the step: so what a step learns
from is a function of the step, and a run can be resumed. Scores are found under the key of the request that a `Scorer`
makes of the answer, so they are those of exactly this answer, or there are none.

Nobody judges these answers: rewards are NaN, which no loss survives, and no record tells them.
"""

import base64
import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stillhouse.archive import Archive, ArchiveError, CorruptEntry, Entry
from stillhouse.archive_stores import open_store
from stillhouse.client import ClientStats
from stillhouse.codec import Scores, Teacher
from stillhouse.request import ScoreOptions, make_task
from stillhouse.vocabulary import vocabulary_digest
from student_trainer.batch import Rollout, Sample
from student_trainer.config import ConfigError, OfflineConfig, RunConfig, TeacherConfig
from student_trainer.problems import Problems
from student_trainer.progress import Heartbeat
from student_trainer.prompts import Prompt
from student_trainer.run_dir import RunDir, _sample_row
from student_trainer.sampler import stream_seed
from student_trainer.scoring import Scorer
from student_trainer.stopping import Stopped, Stopping, never

_THREADS = 8
_UNJUDGED = (
    "reward",
    "pass_rate",
    "passed",
    "advantage",
    "advantage_p05",
    "advantage_p50",
    "advantage_p95",
    "staleness",
)
"""Figures and fields that need a reward, or to know how old an answer is."""

BEFORE_THE_RUN = -1
"""The step of the student that made an archived answer, as far as this run can say."""

_KIND: tuple[str, ...] = (
    "teacher_model",
    "teacher_revision",
    "compute_dtype",
    "temperature",
    "top_k",
    "candidates",
    "wire_dtype",
    "rollout_temperature",
)
"""What all entries of a run have in common; each is a key of `offline`, too."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is remembered of an entry: enough to choose it, not what is in it."""

    key: str
    kind: tuple[Any, ...]  # along _KIND
    vocabulary: str
    prompt: bytes  # its tokens, int32
    tokens: int  # of prompt and response
    response_tokens: int


@dataclass(frozen=True, slots=True)
class Offline:
    """What a run has in place of a teacher, a sampler and prompts."""

    problems: Problems
    sampler: "ArchiveSampler"
    scorer: Scorer
    digest: str  # of which entries there are

    def close(self) -> None:
        """Ends the threads."""
        self.sampler.close()
        self.scorer.close()


def open_offline(config: RunConfig, tokenizer: Any, *, tell: bool = True, stop: Stopping = never) -> Offline:
    """Reads the whole archive once, checks every entry, and keeps of each where it is and what it answers.

    Raises ConfigError if it is not there, cannot be read, holds nothing that can be learnt from, holds more than one
    kind of entries, or does not fit the run; Stopped once `stop()`. tell: say on stderr what was found.
    """
    offline = config.offline
    assert offline is not None
    try:
        store = open_store(offline.archive)
        store.check(write=False)
        archive = Archive(store)
        found = _read_all(archive, tell, stop)
    except (ArchiveError, OSError) as error:
        raise ConfigError(f"offline.archive: {error}") from error
    answers = _of_one_kind(offline, found)
    kind = dict(zip(_KIND, answers[0].kind, strict=True))
    _check_fit(config, kind, answers, tokenizer)
    by_prompt: dict[bytes, list[str]] = defaultdict(list)
    for answer in answers:
        by_prompt[answer.prompt].append(answer.key)
    prompts = [_prompt(ids, tokenizer) for ids in by_prompt]
    keys = {prompt.key: tuple(by_prompt[ids]) for prompt, ids in zip(prompts, by_prompt, strict=True)}
    teacher = _teacher(kind, answers, tokenizer)
    if tell:
        print(
            f"{offline.archive}: {len(answers)} answers to {len(prompts)} prompts, scored by {teacher.model} "
            f"{teacher.model_revision}",
            file=sys.stderr,
            flush=True,
        )
    asked = TeacherConfig(
        addresses=(offline.archive,),
        top_k=kind["top_k"],
        candidates=kind["candidates"],
        wire_dtype=kind["wire_dtype"],
    )
    scorer = Scorer(ArchiveClient(archive, teacher), asked, teacher, kind["temperature"])
    return Offline(
        Problems(sorted(prompts, key=lambda prompt: prompt.key), lambda prompt, completion: math.nan, math.nan),
        ArchiveSampler(archive, keys, tokenizer),
        scorer,
        hashlib.sha256("\n".join(answer.key for answer in answers).encode()).hexdigest(),
    )


class ArchiveSampler:
    """A `Sampler` that hands over archived answers."""

    owns_weights = False

    def __init__(self, archive: Archive, answers: Mapping[str, tuple[str, ...]], tokenizer: Any) -> None:
        self._archive = archive
        self._answers = answers  # keys of entries by key of the prompt
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(_THREADS, "archived-answers")

    def sample(
        self, prompts: Sequence[Prompt], answers: int, *, seed: int, stop: Stopping = never
    ) -> Iterator[list[Rollout]]:
        """Up to `answers` for each prompt, others for another seed; a lot is the answers to one prompt.

        Raises ArchiveError for an entry that was there at the start and cannot be used any more.
        """
        chosen = []
        for prompt in prompts:
            keys = self._answers[prompt.key]
            order = np.random.default_rng(stream_seed(seed, prompt, 0)).permutation(len(keys))[:answers]
            chosen.append([self._threads.submit(self._rollout, prompt, keys[index]) for index in order])
        try:
            for lot in chosen:
                if stop():
                    return
                yield [future.result() for future in lot]
        finally:
            for lot in chosen:
                for future in lot:
                    future.cancel()

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _rollout(self, prompt: Prompt, key: str) -> Rollout:
        entry = _entry(self._archive, key)
        task = entry.task
        response = task.token_ids[task.score_start :]
        logprobs = _sampler_logprobs(entry)
        assert logprobs is not None and task.candidate_ids is not None  # seen when the archive was read
        return Rollout(
            prompt=prompt,
            response_ids=response,
            sampler_logprobs=logprobs,
            candidate_ids=task.candidate_ids[:, :-1],
            text=self._tokenizer.decode(response, skip_special_tokens=True),
            finished=entry.facts["finished"],
        )


class ArchiveClient:
    """What a `Scorer` asks when there is no teacher. A request that the archive does not hold ends in ArchiveError."""

    def __init__(self, archive: Archive, teacher: Teacher) -> None:
        self._archive = archive
        self._teacher = teacher
        self._threads = ThreadPoolExecutor(_THREADS, "archived-scores")
        self.stats = ClientStats()

    def submit_score(
        self, token_ids: ArrayLike, *, score_start: int, top_k: int, **options: Unpack[ScoreOptions]
    ) -> Future[Scores]:
        """The archived scores of exactly this request."""
        task = make_task(self._teacher.model, token_ids, score_start, top_k, options)

        def look_up() -> Scores:
            scores = self._archive.look_up(task)
            if scores is None:
                raise ArchiveError(_gone(self._archive, "the scores of an answer"))
            return scores

        return self._threads.submit(look_up)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class OfflineRunDir(RunDir):
    """A run directory whose records leave out what nobody knows of an archived answer."""

    def samples(self, step: int, samples: list[Sample], student_logprobs: list[list[float]]) -> None:
        """See `RunDir.samples`."""
        if self._samples is None:
            return
        for sample, logprobs in list(zip(samples, student_logprobs, strict=True))[: self._config.samples_per_step]:
            self._samples.write(json.dumps(judged(_sample_row(step, sample, logprobs)), allow_nan=False) + "\n")


def judged(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` without what nobody knows of an archived answer."""
    return {name: value for name, value in row.items() if name not in _UNJUDGED}


def _read_all(archive: Archive, tell: bool, stop: Stopping) -> list[_Answer]:
    """Every entry that is an answer with all that is needed, in the order of their keys."""
    keys = sorted(archive.keys())
    if not keys:
        raise ArchiveError(f"{archive.store.url} holds no entry")
    heartbeat = Heartbeat("reading the archive", len(keys) if tell else 0)

    def read(key: str) -> _Answer | str:
        """The answer, or why there is none."""
        try:
            entry = archive.read(key)
        except CorruptEntry as error:
            return f"corrupt: entry {key[:12]}: {error}"
        return "gone" if entry is None else _answer(key, entry) or "no archived answer"

    answers: list[_Answer] = []
    refused: list[str] = []
    with ThreadPoolExecutor(_THREADS, "archive-index") as threads:
        for found in threads.map(read, keys):
            if stop():
                threads.shutdown(wait=False, cancel_futures=True)
                raise Stopped("asked to stop while reading the archive")
            if isinstance(found, _Answer):
                answers.append(found)
            else:
                refused.append(found)
            heartbeat.advance(1)
    corrupt = [why for why in refused if why.startswith("corrupt: ")]
    left_out = (
        f"{len(corrupt)} corrupt entries{' (' + corrupt[0].removeprefix('corrupt: ') + ')' if corrupt else ''} and "
        f"{len(refused) - len(corrupt)} that a trainer did not record"
    )
    if not answers:
        raise ArchiveError(f"{archive.store.url} holds no answer to learn from, only {left_out}")
    if refused and tell:
        print(f"warning: {archive.store.url}: left out {left_out}", file=sys.stderr, flush=True)
    return answers


def _answer(key: str, entry: Entry) -> _Answer | None:
    """What to remember of an entry; None if it is not one that a trainer's `Scorer` has recorded."""
    task, facts = entry.task, entry.facts
    response = task.token_ids[task.score_start :]
    temperature = facts.get("rollout_temperature")
    asked_of_the_response = task.num_candidates > 0 and bool(
        task.candidate_ids is not None and (task.candidate_ids[:, -1] == response).all()
    )
    whole = isinstance(facts.get("finished"), bool) and isinstance(temperature, float | int)
    if not (asked_of_the_response and whole) or _sampler_logprobs(entry) is None:
        return None
    return _Answer(
        key=key,
        kind=(
            task.model,
            task.expected_model_revision,
            task.expected_compute_dtype,
            task.temperature,
            task.top_k,
            task.num_candidates - 1,
            "float16" if task.half_precision else "float32",
            temperature,
        ),
        vocabulary=task.expected_vocabulary_digest,
        prompt=task.token_ids[: task.score_start].tobytes(),
        tokens=len(task.token_ids),
        response_tokens=len(response),
    )


def _sampler_logprobs(entry: Entry) -> NDArray[np.float32] | None:
    """[N] nats, as `student_trainer.scoring.answer_facts` keeps them; None if they are not there."""
    try:
        values = np.frombuffer(base64.b64decode(entry.facts["sampler_logprobs"], validate=True), "<f4")
    except (KeyError, TypeError, ValueError):
        return None
    return values if values.shape == (entry.task.num_scored,) and np.isfinite(values).all() else None


def _of_one_kind(offline: OfflineConfig, answers: list[_Answer]) -> list[_Answer]:
    """The answers that `offline` chooses; ConfigError if there are none, or if they differ in what matters."""
    for index, name in enumerate(_KIND):
        wanted = getattr(offline, name)
        if wanted is not None:
            kept = [answer for answer in answers if answer.kind[index] == wanted]
            if not kept:
                raise ConfigError(
                    f"offline.{name}: {wanted!r} is of no entry in {offline.archive}; there are "
                    f"{_counted(answers, index)}"
                )
            answers = kept
    mixed = [
        f"offline.{name} to one of {_counted(answers, index)}"
        for index, name in enumerate(_KIND)
        if len({answer.kind[index] for answer in answers}) > 1
    ]
    if mixed:
        raise ConfigError(
            f"offline.archive: {offline.archive} holds entries of several kinds, and a run learns from one; set "
            + ", and ".join(mixed)
        )
    return answers


def _counted(answers: list[_Answer], index: int) -> str:
    counts = Counter(answer.kind[index] for answer in answers)
    return ", ".join(f"{value!r} ({count} entries)" for value, count in sorted(counts.items()))


def _check_fit(config: RunConfig, kind: dict[str, Any], answers: list[_Answer], tokenizer: Any) -> None:
    own = vocabulary_digest(tokenizer.get_vocab())
    for vocabulary in {answer.vocabulary for answer in answers}:
        if vocabulary != own:
            raise ConfigError(
                f"student.model: its token ids do not mean what they mean in the archive (vocabulary digest {own[:12]} "
                f"against {vocabulary[:12] or 'none'}); scores would be of other tokens. Use a student with the "
                "tokenizer of the one that was recorded"
            )
    if kind["temperature"] != config.distil_temperature:
        raise ConfigError(
            f"objective.temperature: {config.distil_temperature}, but the archived scores were made at "
            f"{kind['temperature']}; set it to that"
        )
    if kind["rollout_temperature"] != config.rollout.temperature:
        raise ConfigError(
            f"rollout.temperature: {config.rollout.temperature}, but the archived answers were drawn at "
            f"{kind['rollout_temperature']}; set it to that"
        )
    longest = max(answer.response_tokens for answer in answers)
    if longest > config.rollout.max_new_tokens:
        raise ConfigError(
            f"rollout.max_new_tokens: {config.rollout.max_new_tokens}, but the longest archived answer has {longest} "
            "tokens; set it to that or more"
        )


def _prompt(ids: bytes, tokenizer: Any) -> Prompt:
    tokens = tuple(np.frombuffer(ids, np.int32).tolist())
    key = f"archive/{hashlib.sha256(ids).hexdigest()[:16]}"
    return Prompt(key, tokenizer.decode(tokens), None, tokens, None, {})


def _teacher(kind: dict[str, Any], answers: list[_Answer], tokenizer: Any) -> Teacher:
    """The teacher that scored, as far as its scores say, with the archive's limits for its own."""
    vocabulary = tokenizer.get_vocab()
    return Teacher(
        model=kind["teacher_model"],
        model_revision=kind["teacher_revision"],
        vocabulary_size=len(vocabulary),
        vocabulary_digest=vocabulary_digest(vocabulary),
        max_sequence_tokens=max(answer.tokens for answer in answers),
        max_top_k=kind["top_k"],
        max_candidates=kind["candidates"] + 1,
        min_temperature=kind["temperature"],
        max_temperature=kind["temperature"],
        max_response_bytes=0,
        compute_dtype=kind["compute_dtype"],
        engine="archive",
        server_version="",
    )


def _entry(archive: Archive, key: str) -> Entry:
    try:
        entry = archive.read(key)
    except (CorruptEntry, OSError) as error:
        raise ArchiveError(_gone(archive, f"entry {key[:12]}", str(error))) from error
    if entry is None:
        raise ArchiveError(_gone(archive, f"entry {key[:12]}"))
    return entry


def _gone(archive: Archive, what: str, why: str = "it is not there any more") -> str:
    return (
        f"offline.archive: {archive.store.url} had {what} when the run began and does not give it now ({why}); put it "
        "back and resume, or start a new run"
    )
