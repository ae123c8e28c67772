"""The client of a pool of teachers: `TeacherClient` (blocking) and `AsyncTeacherClient` (asyncio).

Who waits for whom: a call first waits for one of `max_in_flight` places, then goes through its attempts
(`stillhouse.attempts`) at the servers that `stillhouse.pool` picks. Its deadline runs from the moment it has
its place and covers every retry. Scoring is idempotent, so neither a retry nor a second copy can ever be
counted twice. Closing the client ends every call that still waits, wherever it waits, with `Cancelled`.

A request is checked and copied before `score` or `submit_score` returns; the caller may reuse its arrays at
once.
"""

import asyncio
import concurrent.futures
import math
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
from numpy.typing import ArrayLike

from stillhouse.attempts import Attempts, Call
from stillhouse.attempts import ClientStats as ClientStats
from stillhouse.codec import (
    Scores,
    ScoreTask,
    Teacher,
    decode_response,
    decode_teacher,
    encode_request,
)
from stillhouse.errors import (
    Cancelled,
    DeadlineExceeded,
    StillhouseError,
    Unavailable,
)
from stillhouse.hedging import Hedging
from stillhouse.loop_thread import LoopThread
from stillhouse.pool import CHANNEL_OPTIONS as CHANNEL_OPTIONS
from stillhouse.pool import MAX_MESSAGE_BYTES as MAX_MESSAGE_BYTES
from stillhouse.pool import Backoff, Pool
from stillhouse.pool import ServerState as ServerState
from stillhouse.request import ScoreOptions, make_task
from stillhouse.security import Security
from stillhouse.security import Tls as Tls
from stillhouse.v1 import teacher_pb2 as pb

T = TypeVar("T")


class ClientOptions(TypedDict, total=False):
    """What a client takes besides addresses; see `AsyncTeacherClient`."""

    model: str
    max_in_flight: int
    backoff: Backoff | None
    credentials: grpc.ChannelCredentials | None
    tls: Tls | None
    token_file: Path | None
    plaintext_token: bool
    balancing: str
    max_servers: int
    hedge_share: float


class AsyncTeacherClient:
    """Scores sequences with a pool of servers of one model. Use it from one event loop, and close it.

    addresses: "host:port" of every server, or "dns:///host:port" for all that the name stands for, looked up again
    every 5 s. model: "" for the servers' only model.
    max_in_flight: sequences on the wire at once; further calls wait.
    tls: files to connect with, read again when they change; None for plaintext. credentials: gRPC's own instead.
    token_file: holds what is sent as "authorization: Bearer ..."; read again when it changes. Needs TLS, or
    plaintext_token=True behind a proxy that encrypts.
    balancing: a name of `stillhouse.balancing.POLICIES`. max_servers: how many of the addresses are used at once.
    hedge_share: 0 .. 0.1, which share of the slowest calls is sent to a second server too; only of those that pin
    revision and compute dtype.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        model: str = "",
        max_in_flight: int = 64,
        backoff: Backoff | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        tls: Tls | None = None,
        token_file: Path | None = None,
        plaintext_token: bool = False,
        balancing: str = "least_expected_wait",
        max_servers: int = 32,
        hedge_share: float = 0.0,
    ) -> None:
        if isinstance(addresses, str) or not addresses:
            raise ValueError(f'addresses is {addresses!r}; give a list such as ["127.0.0.1:50051"]')
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight is {max_in_flight}; it must be at least 1")
        self._addresses = tuple(addresses)
        self._model = model
        self._places = asyncio.Semaphore(max_in_flight)
        security = Security(credentials=credentials, tls=tls, token_file=token_file, plaintext_token=plaintext_token)
        self._pool = Pool(addresses, security, balancing=balancing, max_servers=max_servers)
        self.stats = ClientStats()
        self._attempts = Attempts(self._pool, security, backoff or Backoff(), Hedging(hedge_share), self.stats)
        self._calls: set[asyncio.Task[Any]] = set()
        self._closed = False

    @property
    def servers(self) -> tuple[ServerState, ...]:
        """Every server known now and what this client knows of it, for metrics and for finding faults."""
        return self._pool.servers

    def score(
        self, token_ids: ArrayLike, *, score_start: int, top_k: int, **options: Unpack[ScoreOptions]
    ) -> Coroutine[Any, Any, Scores]:
        """Scores `token_ids[score_start:]` given everything before each of them. Await what it returns.

        token_ids: int [L]. score_start: 1 .. L - 1. top_k: 0 or more. Options:
        candidate_ids: int [L - score_start, M], ids to score at each position; default none.
        temperature: default 1. Log-probabilities are in nats over the whole vocabulary at it, float32.
        deadline_s: default 30, retries included.
        half_precision: the top-k and the candidates travel as float16; default False.
        expected_model_revision, expected_vocabulary_digest, expected_compute_dtype: what `get_teacher` promised;
        default not checked.
        priority: -100 .. 100, which of this tenant's requests go first while they wait; default 0.

        Raises ValueError for arguments that can never be right, when called; `stillhouse.errors` when
        awaited.
        """
        deadline_s = options.get("deadline_s", 30.0)
        _check_deadline(deadline_s)
        task = make_task(self._model, token_ids, score_start, top_k, options)
        request = encode_request(task)
        return self._until_closed(lambda: self._score(task, request, deadline_s))

    async def get_teacher(self, *, deadline_s: float = 10.0) -> Teacher:
        """What the pool serves and what it can do. Raises `stillhouse.errors`."""
        _check_deadline(deadline_s)
        return await self._until_closed(lambda: self._get_teacher(deadline_s))

    async def wait_until_ready(
        self, *, deadline_s: float, on_wait: Callable[[float, StillhouseError], None] | None = None
    ) -> Teacher:
        """Asks until a server answers; `on_wait(elapsed_s, error)` is called after each failed try.

        Raises Unavailable once `deadline_s` has passed, and at once an error that waiting cannot cure.
        """
        _check_deadline(deadline_s)
        return await self._until_closed(lambda: self._wait_until_ready(deadline_s, on_wait))

    async def close(self) -> None:
        """Closes the connections. Calls that still wait raise Cancelled. Closing twice does nothing."""
        self._closed = True
        calls = tuple(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._pool.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _until_closed(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs `work` as a task that `close` can cancel without cancelling the caller's own."""
        if self._closed:
            raise RuntimeError("the client is closed; make a new one")
        begun = False

        async def begin() -> T:
            nonlocal begun
            begun = True
            return await work()

        call = asyncio.create_task(begin())
        self._calls.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            if not begun:  # cancelled before its first step: nothing else counts it
                self.stats.cancelled += 1
            caller = asyncio.current_task()
            if self._closed and not (caller and caller.cancelling()):
                raise Cancelled("the client was closed while the call waited") from None
            raise
        finally:
            self._calls.discard(call)

    async def _score(self, task: ScoreTask, request: pb.ScoreRequest, deadline_s: float) -> Scores:
        call: Call[pb.ScoreResponse] = Call(
            lambda stub: stub.Score,
            request,
            deadline_s,
            cost_tokens=len(task.token_ids),
            revision=task.expected_model_revision,
            one_model=bool(task.expected_model_revision and task.expected_compute_dtype),
        )
        with _Ended(self.stats, call):
            async with self._places:
                response = await self._attempts.answer(call)
            return decode_response(task, response)

    async def _get_teacher(self, deadline_s: float) -> Teacher:
        request = pb.GetTeacherRequest(model=self._model)
        call: Call[pb.GetTeacherResponse] = Call(lambda stub: stub.GetTeacher, request, deadline_s)
        with _Ended(self.stats, call):
            return decode_teacher(await self._attempts.answer(call))

    async def _wait_until_ready(
        self, deadline_s: float, on_wait: Callable[[float, StillhouseError], None] | None
    ) -> Teacher:
        start_s = time.monotonic()
        while True:
            try:
                return await self._get_teacher(min(3.0, start_s + deadline_s - time.monotonic()))
            except StillhouseError as error:
                if not (error.retryable or isinstance(error, DeadlineExceeded)):
                    raise
                elapsed_s = time.monotonic() - start_s
                if on_wait is not None:
                    on_wait(elapsed_s, error)
                if deadline_s - elapsed_s <= 0.5:
                    raise Unavailable(
                        f"no teacher is ready at {', '.join(self._addresses)} after {elapsed_s:.1f} s; "
                        f"last answer: {error}"
                    ) from error
            await asyncio.sleep(0.5)


class TeacherClient:
    """The same pool, blocking, with `submit_score` to keep many calls in flight. Safe from any thread.

    Takes the arguments of `AsyncTeacherClient`, which it runs on a thread of its own. Close it, or use it in
    a `with` block. Callbacks (`on_wait`, a future's) run on that thread and must not wait for the client.
    """

    def __init__(self, addresses: Sequence[str], **options: Unpack[ClientOptions]) -> None:
        self._client = AsyncTeacherClient(addresses, **options)
        self._thread = LoopThread("teacher-client")
        # For a client that is dropped without being closed. Not at exit: the thread ends with the process.
        dropped = weakref.finalize(self, self._thread.stop, self._client.close, join=False)
        dropped.atexit = False

    @property
    def stats(self) -> ClientStats:
        """What the client has done so far."""
        return self._client.stats

    @property
    def servers(self) -> tuple[ServerState, ...]:
        """See `AsyncTeacherClient.servers`."""
        return self._client.servers

    def score(self, token_ids: ArrayLike, *, score_start: int, top_k: int, **options: Unpack[ScoreOptions]) -> Scores:
        """See `AsyncTeacherClient.score`."""
        return self._thread.wait(self._client.score(token_ids, score_start=score_start, top_k=top_k, **options))

    def submit_score(
        self, token_ids: ArrayLike, *, score_start: int, top_k: int, **options: Unpack[ScoreOptions]
    ) -> concurrent.futures.Future[Scores]:
        """Starts a `score` and returns its future; calls beyond `max_in_flight` wait inside."""
        return self._thread.submit(self._client.score(token_ids, score_start=score_start, top_k=top_k, **options))

    def get_teacher(self, *, deadline_s: float = 10.0) -> Teacher:
        """See `AsyncTeacherClient.get_teacher`."""
        return self._thread.wait(self._client.get_teacher(deadline_s=deadline_s))

    def wait_until_ready(
        self, *, deadline_s: float, on_wait: Callable[[float, StillhouseError], None] | None = None
    ) -> Teacher:
        """See `AsyncTeacherClient.wait_until_ready`."""
        return self._thread.wait(self._client.wait_until_ready(deadline_s=deadline_s, on_wait=on_wait))

    def close(self) -> None:
        """Closes the connections and ends the thread. Calls that still wait raise Cancelled."""
        self._thread.stop(self._client.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Ended:
    """Counts how the call inside the `with` block ends, and makes its error say which call it was."""

    def __init__(self, stats: ClientStats, call: Call[Any]) -> None:
        self._stats = stats
        self._call = call

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None:
            self._stats.answered += 1
        elif isinstance(value, StillhouseError):
            self._stats.failures[value.reason] += 1
            self._call.name(value)
        elif isinstance(value, asyncio.CancelledError):
            self._stats.cancelled += 1


def _check_deadline(deadline_s: float) -> None:
    if not math.isfinite(deadline_s):
        raise ValueError(f"deadline_s is {deadline_s}; give a finite number of seconds")
