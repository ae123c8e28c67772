"""Scores with vLLM: the engine's processes do the work, this one hands it over and looks after them.

vLLM's scheduler batches tokens of many sequences into each step, and a cancelled request leaves it; the gate in front
of the engine keeps what waits there to a few steps' work. What is here: the check at start, the one case in which a
sequence must be sent again (below), and noticing that the engine has died.

A sequence whose prefix was reused further than its first row to score comes back without scores. The scheduler of
`vllm_adapter` prevents that; should a version of vLLM find a way around it, the sequence is sent once more without
reuse, and counted.
"""

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stillhouse.codec import Scores, ScoreTask, Teacher
from stillhouse.errors import EngineFailed, OutOfMemory, StillhouseError, Unavailable
from teacher_server.engine import SelfCheckFailed
from teacher_server.failures import engine_failed
from teacher_server.packing import RowRequest, failure_of, row_request, unpack_answer
from teacher_server.scoring import scores_of

logger = logging.getLogger(__name__)

_WATCH_S = 0.5
"""How often the engine's processes are looked after."""
SELF_CHECK_TIMEOUT_S = 600.0


class Worker(Protocol):
    """What the engine needs of vLLM; `vllm_adapter.Vllm` has it."""

    async def encode(
        self, request_id: str, token_ids: list[int], request: RowRequest, *, read_cache: bool
    ) -> NDArray[np.int32]: ...

    @property
    def dead(self) -> bool: ...

    @property
    def cause_of_death(self) -> str: ...

    def shutdown(self) -> None: ...


class VllmEngine:
    """See the module's text. Make it anywhere, use it from one event loop.

    died_error: the exception of `worker` that means its processes are gone. on_cached: called with the number of
    prompt tokens of a sequence that were reused; on_resent: called for each sequence that was sent twice.
    """

    def __init__(
        self,
        worker: Worker,
        teacher: Teacher,
        *,
        died_error: type[Exception],
        on_cached: Callable[[int], None] = lambda tokens: None,
        on_resent: Callable[[], None] = lambda: None,
    ) -> None:
        self._worker = worker
        self._teacher = teacher
        self._died_error = died_error
        self._pending_tokens = 0
        self._on_cached = on_cached
        self._on_resent = on_resent
        self._work: set[asyncio.Task[Scores]] = set()
        self._closed = False

    def describe(self) -> Teacher:
        """What this engine serves and can do."""
        return self._teacher

    @property
    def pending_tokens(self) -> int:
        """Tokens taken on and neither scored nor withdrawn."""
        return self._pending_tokens

    async def score(self, task: ScoreTask) -> Scores:
        """Scores of one task. Raises OutOfMemory, NonFiniteScores, EngineFailed, Unavailable."""
        if self._closed:
            raise Unavailable("the server is stopping")
        tokens = len(task.token_ids)
        self._pending_tokens += tokens
        work = asyncio.create_task(self._score(task))
        self._work.add(work)
        try:
            return await work
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._closed and current is not None and not current.cancelling():
                raise Unavailable("the server is stopping") from None
            raise
        finally:
            self._work.discard(work)
            self._pending_tokens -= tokens

    async def died(self) -> str:
        """Returns within a second of the end of one of the engine's processes."""
        while not self._worker.dead or self._closed:
            await asyncio.sleep(_WATCH_S)
        return f"the vLLM engine died: {self._worker.cause_of_death}"

    async def close(self) -> None:
        """Fails all work not yet done with Unavailable and stops the engine's processes."""
        self._closed = True
        for work in self._work:
            work.cancel()
        await asyncio.sleep(0)
        await asyncio.to_thread(self._worker.shutdown)

    async def check(self) -> float:
        """Scores a known sequence in several ways. Raises SelfCheckFailed, or returns the largest difference, nats.

        By our arithmetic and by vLLM's own logits; with its prefix computed and reused; with its last token
        replaced, which must change nothing but the log-probability of that token, to what it was as a candidate;
        and with the token before it replaced, which must change the last row.
        """
        try:
            async with asyncio.timeout(SELF_CHECK_TIMEOUT_S):
                return await self._check()
        except TimeoutError:
            raise SelfCheckFailed(f"no answer within {SELF_CHECK_TIMEOUT_S:g} s") from None
        except StillhouseError as error:
            raise SelfCheckFailed(f"{error.message}: {self._worker.cause_of_death}") from error

    async def _check(self) -> float:
        task = _probe(self._teacher)
        rows = row_request(task)
        candidates = rows.candidate_ids
        plain = await self._arrays(task, plain=True)
        tolerance = _tolerance(self._teacher.compute_dtype, plain)
        worst = 0.0

        def compare(what: str, found: np.ndarray, expected: np.ndarray) -> None:
            nonlocal worst
            with np.errstate(invalid="ignore"):
                difference = np.where(found == expected, 0.0, np.abs(found - expected))
            largest = float(difference.max(initial=0.0))
            worst = max(worst, largest)
            if not largest <= tolerance:  # "not <=": NaN fails too
                raise SelfCheckFailed(
                    f"{what} differ by {largest:.3g} nats (tolerance {tolerance:.3g}, "
                    f"{self._teacher.compute_dtype}): this build of vLLM and this model cannot be served together"
                )

        for what in ("scores and those of vLLM's own logits", "scores with a reused prefix and vLLM's own"):
            ours = await self._arrays(task)
            for name in ("sampled_logprobs", "candidate_logprobs", "top_logprobs", "entropy", "log_tail"):
                compare(f"{what} ({name})", ours[name], plain[name])
        other = dataclasses.replace(task, token_ids=task.token_ids.copy())
        other.token_ids[-1] = candidates[-1, 0]
        changed = await self._arrays(other)
        compare("scores before a changed last token", changed["top_logprobs"], ours["top_logprobs"])
        compare("scores before a changed last token", changed["sampled_logprobs"][:-1], ours["sampled_logprobs"][:-1])
        compare(
            "a token's log-probability as candidate and as last token",
            changed["sampled_logprobs"][-1:],
            ours["candidate_logprobs"][-1:, 0],
        )
        earlier = dataclasses.replace(task, token_ids=task.token_ids.copy())
        earlier.token_ids[-2] = (earlier.token_ids[-2] + 1) % self._teacher.vocabulary_size
        moved = await self._arrays(earlier)
        if moved["log_normalizer"][-1] == ours["log_normalizer"][-1]:
            raise SelfCheckFailed("the scores of the last token do not depend on the token before it")
        return worst

    async def _score(self, task: ScoreTask) -> Scores:
        started_s = time.monotonic()
        try:
            counters, arrays = await self._answer(task)
        except self._died_error as error:
            logger.error("the engine died with a sequence in flight: %s", error)
            raise Unavailable("the engine died; the server is restarting") from error
        except StillhouseError:
            raise
        except Exception as error:
            raise engine_failed(error) from error
        total_s = time.monotonic() - started_s
        engine_s = min(counters.engine_us / 1e6, total_s)
        self._on_cached(counters.cached_tokens)
        scores = scores_of(self._teacher, task, arrays)
        if isinstance(scores, StillhouseError):
            raise scores
        return dataclasses.replace(
            scores,
            queue_wait_ms=1e3 * (total_s - engine_s),
            engine_ms=1e3 * engine_s,
            batch_sequences=counters.batch_sequences,
        )

    async def _arrays(self, task: ScoreTask, *, plain: bool = False) -> dict[str, np.ndarray]:
        try:
            return (await self._answer(task, plain=plain))[1]
        except self._died_error as error:
            raise SelfCheckFailed(str(error)) from error

    async def _answer(self, task: ScoreTask, *, plain: bool = False):
        request = row_request(task, plain=plain)
        token_ids = task.token_ids.tolist()
        for read_cache in (True, False):
            answer = await self._worker.encode(uuid.uuid4().hex, token_ids, request, read_cache=read_cache)
            failure = failure_of(answer)
            if failure is not None:
                raise _failure(failure, task)
            if len(answer) == 1 + task.num_scored:
                return unpack_answer(answer, request)
            logger.warning("a reused prefix hid %d rows; sending the sequence again", task.num_scored)
            self._on_resent()
        raise EngineFailed("the engine answered without the scores of some response tokens")


def _failure(text: str, task: ScoreTask) -> StillhouseError:
    kind, _, rest = text.partition(": ")
    if kind == "memory":
        tokens = len(task.token_ids)
        logger.error("out of memory: %s", rest)
        return OutOfMemory(
            f"scoring {tokens} tokens did not fit the worker's memory; lower the server's --logits-slice-bytes or "
            "--gpu-memory-utilization",
            field="token_ids",
            value=tokens,
        )
    return engine_failed(RuntimeError(rest))


def _probe(teacher: Teacher) -> ScoreTask:
    """A random sequence of 320 tokens (or what fits), the last 48 of which are scored.

    The rest is long enough for blocks of 128 tokens, the largest that vLLM reuses prefixes by.
    """
    rng = np.random.default_rng(0)
    tokens = min(320, teacher.max_sequence_tokens)
    start = max(1, tokens - 48)
    return ScoreTask(
        model="",
        token_ids=rng.integers(0, teacher.vocabulary_size, tokens).astype(np.int32),
        score_start=start,
        top_k=min(8, teacher.max_top_k),
        candidate_ids=rng.integers(0, teacher.vocabulary_size, (tokens - start, 3)).astype(np.int32),
    )


def _tolerance(compute_dtype: str, plain: dict[str, np.ndarray]) -> float:
    """How far vLLM's logits, rounded to the model's dtype, may be from ours: a few units in the last place."""
    resolution = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[compute_dtype]
    largest = max(np.abs(plain["log_normalizer"]).max(), np.abs(plain["candidate_logprobs"]).max(), 1.0)
    # In float32 the attention of a reused prefix sums in another order, which costs more than rounding.
    return float(max(4 * resolution * largest, 2e-3 if compute_dtype == "float32" else 0.0))
