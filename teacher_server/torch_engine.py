"""Scores with a Hugging Face causal LM in this process, on a CPU or a GPU.

Who waits for whom: `score` (event loop) puts a task into the queue and awaits its future; the gate in front of the
engine keeps that queue a batch or two long. One worker thread owns the model; whenever it is idle it
takes the oldest task and those that fit it best (`batching.pick_batch`) and scores them. A task cancelled
before that moment leaves the queue at once and never reaches the model.

A failure belongs to its batch: out of memory halves the batch until it fits; any other exception fails the
tasks of the batch and the worker goes on. Only an error of the accelerator itself is the end: after it every
operation on the device fails.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from stillhouse.codec import Scores, ScoreTask, Teacher
from stillhouse.errors import OutOfMemory, StillhouseError, Unavailable
from teacher_server.batching import pick_batch
from teacher_server.engine import SelfCheckFailed
from teacher_server.failures import engine_failed
from teacher_server.loading import ServedModel
from teacher_server.scoring import score_tasks, whole_logprobs

SELF_CHECK_TIMEOUT_S = 600.0
_TOLERANCE = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.5}
"""Nats. In half precision the same sequence in another batch is rounded otherwise, layer by layer."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One batch that was scored, for the metrics."""

    sequences: int
    tokens: int
    padded_tokens: int
    engine_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    task: ScoreTask
    arrived_s: float


Future = concurrent.futures.Future[Scores]


class TorchEngine:
    """See the module's text. Make it anywhere, use it from one event loop.

    on_batch is called on the worker thread after each batch.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        max_batch_tokens: int,
        logits_slice_bytes: int,
        on_batch: Callable[[BatchReport], None],
    ) -> None:
        self._model = model
        self._max_batch_tokens = max_batch_tokens
        self._logits_slice_bytes = logits_slice_bytes
        self._on_batch = on_batch
        self._changed = threading.Condition()  # guards everything below
        self._queue: dict[Future, _Waiting] = {}  # oldest first
        self._running: list[Future] = []
        self._pending_tokens = 0
        self._closed = False
        self._death: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._work, name="torch-engine", daemon=True)
        self._thread.start()

    def describe(self) -> Teacher:
        """What this engine serves and can do."""
        return self._model.teacher

    @property
    def pending_tokens(self) -> int:
        """Tokens taken on and neither scored nor withdrawn."""
        return self._pending_tokens

    async def score(self, task: ScoreTask) -> Scores:
        """Scores of one task. Raises OutOfMemory, NonFiniteScores, EngineFailed, Unavailable."""
        return await asyncio.wrap_future(self._submit(task))

    async def check(self) -> float:
        """Scores a known sequence in company and compares with the whole logits of the model, one sequence alone.

        Raises SelfCheckFailed, or returns the largest difference, nats.
        """
        rng = np.random.default_rng(0)
        teacher = self.describe()
        length = min(64, teacher.max_sequence_tokens)
        ids = rng.integers(0, teacher.vocabulary_size, (3, length)).astype(np.int32)
        tasks = [
            ScoreTask("", row[:end], 1, min(8, teacher.max_top_k))
            for row, end in zip(ids, (length, max(2, length - 7), length), strict=True)
        ]
        try:
            async with asyncio.timeout(SELF_CHECK_TIMEOUT_S):
                scores = (await asyncio.gather(*[self.score(task) for task in tasks]))[0]
        except TimeoutError:
            raise SelfCheckFailed(f"no answer within {SELF_CHECK_TIMEOUT_S:g} s") from None
        except StillhouseError as error:
            raise SelfCheckFailed(error.message) from error
        expected = await asyncio.to_thread(whole_logprobs, self._model, tasks[0])
        sampled = np.take_along_axis(expected, tasks[0].token_ids[1:, None].astype(np.int64), axis=1)[:, 0]
        top = np.take_along_axis(expected, scores.top_ids.astype(np.int64), axis=1)
        with np.errstate(invalid="ignore"):
            difference = max(
                float(np.abs(scores.sampled_logprobs - sampled).max()),
                float(np.abs(scores.top_logprobs - top).max(initial=0.0)),
            )
        tolerance = _TOLERANCE[teacher.compute_dtype]
        if not difference <= tolerance:  # "not <=": NaN fails too
            raise SelfCheckFailed(
                f"scores and the model's own logits differ by {difference:.3g} nats (tolerance {tolerance:g}, "
                f"{teacher.compute_dtype}): this model cannot be served on this machine"
            )
        return difference

    async def died(self) -> str:
        """Returns when the device has failed."""
        return await asyncio.shield(asyncio.wrap_future(self._death))

    async def close(self) -> None:
        """Fails all work not yet done with Unavailable, and waits a moment for the batch that is running."""
        with self._changed:
            self._closed = True
            left = [*self._queue, *self._running]
            self._queue.clear()
            self._changed.notify()
        for future in left:
            _fail(future, Unavailable("the server is stopping"))
        await asyncio.to_thread(self._thread.join, 5.0)

    def _submit(self, task: ScoreTask) -> Future:
        tokens = len(task.token_ids)
        future = Future()
        with self._changed:
            if self._death.done():
                raise Unavailable("the engine's device has failed; the server is restarting")
            if self._closed:
                raise Unavailable("the server is stopping")
            self._pending_tokens += tokens
            self._queue[future] = _Waiting(task, time.monotonic())
            self._changed.notify()
        future.add_done_callback(lambda _: self._release(future, tokens))
        return future

    def _release(self, future: Future, tokens: int) -> None:
        with self._changed:
            self._pending_tokens -= tokens
            self._queue.pop(future, None)  # it is still there if it was cancelled

    def _work(self) -> None:
        while (batch := self._take_batch()) is not None:
            try:
                self._run(batch, time.monotonic())
            except Exception as error:  # not the model's: a thread that died here would leave all waiting
                failure = engine_failed(error)
                for future in batch:
                    _fail(future, failure)
            with self._changed:
                self._running.clear()

    def _take_batch(self) -> dict[Future, _Waiting] | None:
        """The next batch, its futures marked as running. None once closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return None
                waiting = list(self._queue.items())
                picked = pick_batch([item.task for _, item in waiting], self._max_batch_tokens)
                batch: dict[Future, _Waiting] = {}
                for index in picked:
                    future, item = waiting[index]
                    del self._queue[future]
                    # False: cancelled between its cancellation and its removal from the queue.
                    if future.set_running_or_notify_cancel():
                        batch[future] = item
                if batch:
                    self._running = list(batch)
                    return batch

    def _run(self, batch: dict[Future, _Waiting], started_s: float) -> None:
        """Scores a batch, in halves if the memory does not suffice, and answers all of its futures."""
        tasks = [item.task for item in batch.values()]
        compute_s = time.monotonic()
        try:
            results = score_tasks(self._model, tasks, self._logits_slice_bytes)
        except Exception as error:
            results = None
            failure = None if _is_out_of_memory(error) else engine_failed(error)
            if _is_lost_device(error) and not self._death.done():
                self._death.set_result(f"the device has failed: {error}")
                failure = Unavailable("the engine's device has failed; the server is restarting")
        else:
            failure = None
        # Outside of the except block, whose traceback would keep the tensors of the failed attempt alive.
        if failure is not None:
            for future in batch:
                _fail(future, failure)
        elif results is None:
            self._run_halves(batch, started_s)
        else:
            engine_s = time.monotonic() - compute_s
            self._report(tasks, engine_s)
            for (future, item), result in zip(batch.items(), results, strict=True):
                if isinstance(result, StillhouseError):
                    _fail(future, result)
                    continue
                timed = replace(
                    result,
                    queue_wait_ms=1e3 * (started_s - item.arrived_s),
                    engine_ms=1e3 * engine_s,
                    batch_sequences=len(batch),
                )
                with contextlib.suppress(concurrent.futures.InvalidStateError):  # failed by close()
                    future.set_result(timed)

    def _run_halves(self, batch: dict[Future, _Waiting], started_s: float) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        items = list(batch.items())
        if len(items) > 1:
            middle = len(items) // 2
            self._run(dict(items[:middle]), started_s)
            self._run(dict(items[middle:]), started_s)
            return
        future, item = items[0]
        tokens = len(item.task.token_ids)
        _fail(
            future,
            OutOfMemory(
                f"{tokens} tokens alone do not fit the server's memory; send shorter sequences or lower the "
                "server's --logits-slice-bytes",
                field="token_ids",
                value=tokens,
            ),
        )

    def _report(self, tasks: Sequence[ScoreTask], engine_s: float) -> None:
        lengths = [len(task.token_ids) for task in tasks]
        self._on_batch(BatchReport(len(tasks), sum(lengths), len(tasks) * max(lengths), engine_s))


def _fail(future: Future, error: StillhouseError) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # already answered, failed or cancelled
        future.set_exception(error)


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator raises a bare RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _is_lost_device(error: Exception) -> bool:
    # What CUDA reports once (an illegal access, a failed assertion) it reports for ever after.
    kind = getattr(torch, "AcceleratorError", None)
    return kind is not None and isinstance(error, kind) and not _is_out_of_memory(error)
