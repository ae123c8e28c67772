"""The client of a pool of teachers: `TeacherClient` (blocking) and `AsyncTeacherClient` (asyncio).

Who waits for whom: a call first waits for one of `max_in_flight` places, then goes to the address with
the fewest calls outstanding. Its deadline runs from the moment it has its place and covers every retry. An
address that turns out to be down is left alone for a moment (longer each time) while others are up. Only
errors that the table in `stillhouse.errors` marks as retryable are sent again, after a random share of an
exponential backoff, or after the delay the server asked for.

Scoring is idempotent, so a retry can never be counted twice.
"""

import asyncio
import concurrent.futures
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from stillhouse.codec import (
    Scores,
    ScoreTask,
    Teacher,
    decode_response,
    decode_teacher,
    encode_request,
)
from stillhouse.errors import DeadlineExceeded, StillhouseError, Unavailable, from_rpc_error
from stillhouse.v1 import teacher_pb2 as pb
from stillhouse.v1 import teacher_pb2_grpc as pb_grpc

T = TypeVar("T")

MAX_MESSAGE_BYTES = 256 * 2**20

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A server that hangs or vanishes is noticed in about 13 s. Without ping_timeout_ms gRPC waits 60 s
    # whatever keepalive_timeout_ms says.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),  # ours know the error table; gRPC's own skip requests over 256 KiB
)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between attempts: uniform in 0 .. min(max_s, initial_s * 2^attempt) (full jitter)."""

    initial_s: float = 0.1
    max_s: float = 5.0

    def delay_s(self, attempt: int) -> float:
        return random.uniform(0.0, min(self.max_s, self.initial_s * 2.0 ** min(attempt, 30)))


@dataclass(slots=True)
class _Server:
    """One address of the pool."""

    address: str
    stub: Any
    channel: grpc.aio.Channel
    in_flight: int = 0
    failures: int = 0
    resting_until_s: float = 0.0


@dataclass(slots=True)
class ClientStats:
    """What the client has done so far, for the metrics of whoever uses it."""

    answered: int = 0
    retries: Counter[str] = field(default_factory=Counter[str])  # by reason
    failures: Counter[str] = field(default_factory=Counter[str])  # by reason, after all retries


class AsyncTeacherClient:
    """Scores sequences with a pool of servers of one model. Use it from one event loop.

    addresses: "host:port" of every server. model: "" for the servers' only model.
    max_in_flight: calls on the wire at once; further calls wait. credentials: None for plaintext.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        model: str = "",
        max_in_flight: int = 64,
        backoff: Backoff | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        if isinstance(addresses, str) or not addresses:
            raise ValueError(f'addresses is {addresses!r}; give a list such as ["127.0.0.1:50051"]')
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight is {max_in_flight}; it must be at least 1")
        self._addresses = tuple(addresses)
        self._model = model
        self._backoff = backoff or Backoff()
        self._credentials = credentials
        self._places = asyncio.Semaphore(max_in_flight)
        self._servers: list[_Server] = []
        self.stats = ClientStats()

    async def score(
        self,
        token_ids: ArrayLike,
        *,
        score_start: int,
        top_k: int,
        candidate_ids: ArrayLike | None = None,
        temperature: float = 1.0,
        deadline_s: float = 30.0,
        half_precision: bool = False,
        expected_model_revision: str = "",
        expected_vocabulary_digest: str = "",
    ) -> Scores:
        """Scores `token_ids[score_start:]` given everything before each of them.

        token_ids: int [L]. candidate_ids: int [L - score_start, M] or None. Log-probabilities come back in
        nats over the whole vocabulary at `temperature`, as float32; `half_precision` sends the top-k and the
        candidates as float16. `deadline_s` covers all retries of this call. Raises `stillhouse.errors`.
        """
        task = ScoreTask(
            model=self._model,
            token_ids=_int32(token_ids, "token_ids", 1),
            score_start=score_start,
            top_k=top_k,
            candidate_ids=None if candidate_ids is None else _int32(candidate_ids, "candidate_ids", 2),
            temperature=float(temperature),
            expected_model_revision=expected_model_revision,
            expected_vocabulary_digest=expected_vocabulary_digest,
            half_precision=half_precision,
        )
        _check_score_start(task)
        request = encode_request(task)
        async with self._places:
            response = await self._call(lambda stub: stub.Score, request, deadline_s)
        return decode_response(task, response)

    async def get_teacher(self, *, deadline_s: float = 10.0) -> Teacher:
        """What the pool serves and what it can do. Raises `stillhouse.errors`."""
        request = pb.GetTeacherRequest(model=self._model)
        return decode_teacher(await self._call(lambda stub: stub.GetTeacher, request, deadline_s))

    async def wait_until_ready(
        self, *, deadline_s: float, on_wait: Callable[[float, StillhouseError], None] | None = None
    ) -> Teacher:
        """Asks until a server answers; `on_wait(elapsed_s, error)` is called after each failed try.

        Raises the last error once `deadline_s` has passed, and at once one that waiting cannot cure.
        """
        start_s = time.monotonic()
        while True:
            try:
                return await self.get_teacher(deadline_s=min(3.0, deadline_s))
            except (Unavailable, DeadlineExceeded) as error:
                elapsed_s = time.monotonic() - start_s
                if elapsed_s >= deadline_s:
                    raise
                if on_wait is not None:
                    on_wait(elapsed_s, error)
                await asyncio.sleep(min(0.5, max(0.0, deadline_s - elapsed_s)))

    async def close(self) -> None:
        """Closes the connections; calls in flight are cancelled."""
        servers, self._servers = self._servers, []
        await asyncio.gather(*(server.channel.close() for server in servers))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(
        self, method: Callable[[Any], Callable[..., Awaitable[T]]], request: Any, deadline_s: float
    ) -> T:
        """Sends `request` until it is answered, an error is final, or the deadline is over."""
        end_s = time.monotonic() + deadline_s
        attempt = 0
        last: StillhouseError | None = None
        while True:
            remaining_s = end_s - time.monotonic()
            if remaining_s <= 0:
                self.stats.failures[last.reason if last else DeadlineExceeded.reason] += 1
                raise last or DeadlineExceeded(f"no answer within {deadline_s} s")
            try:
                async with self._server() as server:
                    answer = await method(server.stub)(request, timeout=remaining_s)
                    self.stats.answered += 1
                    return answer
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
                if isinstance(error, DeadlineExceeded) and last is not None:
                    # The last retry ran out of time: what made it necessary says more.
                    error = DeadlineExceeded(f"no answer within {deadline_s} s; before that: {last}")
                delay_s = (
                    error.retry_delay_s if error.retry_delay_s is not None else self._backoff.delay_s(attempt)
                )
                if not error.retryable or time.monotonic() + delay_s >= end_s:
                    self.stats.failures[error.reason] += 1
                    raise error from rpc_error
                last = error
                self.stats.retries[error.reason] += 1
                attempt += 1
            await asyncio.sleep(delay_s)

    @contextlib.asynccontextmanager
    async def _server(self) -> AsyncGenerator[_Server]:
        """The server with the fewest calls outstanding among those that are not resting."""
        if not self._servers:
            self._servers = [self._connect(address) for address in self._addresses]
        now_s = time.monotonic()
        awake = [server for server in self._servers if server.resting_until_s <= now_s]
        if awake:
            fewest = min(server.in_flight for server in awake)
            server = random.choice([server for server in awake if server.in_flight == fewest])
        else:
            server = min(self._servers, key=lambda server: server.resting_until_s)
        server.in_flight += 1
        try:
            yield server
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                server.failures += 1
                server.resting_until_s = time.monotonic() + min(10.0, 0.25 * 2.0 ** min(server.failures, 10))
            raise
        else:
            server.failures = 0
            server.resting_until_s = 0.0
        finally:
            server.in_flight -= 1

    def _connect(self, address: str) -> _Server:
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            channel = grpc.aio.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)
        return _Server(address, pb_grpc.TeacherServiceStub(channel), channel)


class TeacherClient:
    """The same pool, blocking, with `submit_score` to keep many calls in flight. Safe from any thread.

    Takes the arguments of `AsyncTeacherClient`, which it runs on a thread of its own. Close it, or use it in
    a `with` block.
    """

    def __init__(self, addresses: Sequence[str], **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncTeacherClient(addresses, **options)
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-client", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> ClientStats:
        """What the client has done so far."""
        return self._client.stats

    def score(self, token_ids: ArrayLike, *, score_start: int, top_k: int, **options: Any) -> Scores:
        """See `AsyncTeacherClient.score`."""
        return self.submit_score(token_ids, score_start=score_start, top_k=top_k, **options).result()

    def submit_score(
        self, token_ids: ArrayLike, *, score_start: int, top_k: int, **options: Any
    ) -> concurrent.futures.Future[Scores]:
        """Starts a `score` and returns its future; calls beyond `max_in_flight` wait inside."""
        return self._submit(self._client.score(token_ids, score_start=score_start, top_k=top_k, **options))

    def get_teacher(self, *, deadline_s: float = 10.0) -> Teacher:
        """See `AsyncTeacherClient.get_teacher`."""
        return self._submit(self._client.get_teacher(deadline_s=deadline_s)).result()

    def wait_until_ready(
        self, *, deadline_s: float, on_wait: Callable[[float, StillhouseError], None] | None = None
    ) -> Teacher:
        """See `AsyncTeacherClient.wait_until_ready`."""
        return self._submit(self._client.wait_until_ready(deadline_s=deadline_s, on_wait=on_wait)).result()

    def close(self) -> None:
        """Closes the connections and stops the thread."""
        if self._loop.is_closed():
            return
        self._submit(self._client.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _int32(values: ArrayLike, name: str, ndim: int) -> NDArray[np.int32]:
    array = np.asarray(values)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; give {ndim}-dimensional integers"
        )
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"{name} holds {array.min()} .. {array.max()}; ids are 0 .. 2^31 - 1")
    return array.astype(np.int32, copy=False)


def _check_score_start(task: ScoreTask) -> None:
    if not 1 <= task.score_start < len(task.token_ids):
        raise ValueError(
            f"score_start is {task.score_start}; with {len(task.token_ids)} tokens it must be "
            f"1 .. {len(task.token_ids) - 1}"
        )
    if task.top_k < 0:
        raise ValueError(f"top_k is {task.top_k}; it must be 0 or more")
    if task.candidate_ids is not None and len(task.candidate_ids) != task.num_scored:
        raise ValueError(
            f"candidate_ids has {len(task.candidate_ids)} rows; the response has {task.num_scored} tokens"
        )
