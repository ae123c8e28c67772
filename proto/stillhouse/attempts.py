"""One call through all its attempts: where each goes, what an error means for the next, when it is final.

Only errors that the table in `stillhouse.errors` marks as retryable are sent again: after a random share of an
exponential backoff, on top of the delay the server asked for if it asked for one. Three are special:

- `Overloaded` and `QuotaExceeded` are of one server: another that has not said so is asked at once.
- `ModelRevisionMismatch` may be of one server, in the middle of a rolling update: every other one is asked
  before it is final.
- `Unauthenticated` is final, unless the token or the certificate changed since the attempt began: then the call
  is sent again, once.

Every attempt carries the call's id and its own number, so that servers' logs can be put together.
"""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc

from stillhouse.errors import (
    DeadlineExceeded,
    ModelRevisionMismatch,
    Overloaded,
    QuotaExceeded,
    StillhouseError,
    Unauthenticated,
    WrongAnswer,
    from_rpc_error,
)
from stillhouse.hedging import Hedging, first_answer
from stillhouse.pool import Backoff, Pool, Server, Standing
from stillhouse.security import Security

T = TypeVar("T")


@dataclass(slots=True)
class ClientStats:
    """What the client has done so far, for the metrics of whoever uses it. A call ends in one of
    `answered`, `failures` and `cancelled`."""

    answered: int = 0
    cancelled: int = 0  # by the caller, or by closing the client
    retries: Counter[str] = field(default_factory=Counter[str])  # by reason
    failures: Counter[str] = field(default_factory=Counter[str])  # by reason, after all retries
    hedges: int = 0  # second copies sent
    hedges_won: int = 0  # of these, answered before the first


@dataclass(slots=True)
class Call(Generic[T]):
    """One call of the user's. `method` takes the stub's method out of a stub."""

    method: Callable[[Any], Callable[..., Awaitable[T | None]]]
    request: Any
    deadline_s: float
    cost_tokens: int = 1
    revision: str = ""  # pinned
    one_model: bool = False  # revision and precision are pinned: whoever answers, the scores are the same
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    asked: list[Server] = field(default_factory=list[Server])  # one entry an attempt
    waits: int = 0
    renewed: bool = False  # sent again because the credentials had changed

    def name(self, error: StillhouseError) -> None:
        """Makes `error` say which call it ended and which server was asked last."""
        error.request_id = self.request_id
        error.address = self.asked[-1].address if self.asked else ""
        error.add_note(f"request {self.request_id}, attempt {len(self.asked)}, {error.address or 'no server'}")


class Attempts:
    """Sends calls to a pool until they are answered, an error is final, or the deadline leaves no time."""

    def __init__(self, pool: Pool, security: Security, backoff: Backoff, hedging: Hedging, stats: ClientStats) -> None:
        self._pool = pool
        self._security = security
        self._backoff = backoff
        self._hedging = hedging
        self._stats = stats

    async def answer(self, call: Call[T]) -> T:
        """The answer to `call`. Raises `stillhouse.errors`."""
        end_s = time.monotonic() + call.deadline_s
        if call.one_model:
            self._hedging.called()
        last: StillhouseError | None = None
        server: Server | None = None
        while True:
            remaining_s = end_s - time.monotonic()
            if remaining_s <= 0:
                raise last or DeadlineExceeded(f"no answer within {call.deadline_s:g} s")
            version = self._security.version
            try:
                return await self._attempt(call, server, end_s)
            except StillhouseError as error:
                if isinstance(error, DeadlineExceeded) and last is not None:
                    # The last retry ran out of time: what made it necessary says more.
                    text = f"no answer within {call.deadline_s:g} s; before that: {last}"
                    raise DeadlineExceeded(text) from error.__cause__
                again = self._again(call, error, version)
                if again is None or time.monotonic() + again[1] >= end_s:
                    raise
                last = error
                self._stats.retries[error.reason] += 1
            server, delay_s = again
            if server is None:
                await asyncio.sleep(delay_s)

    def _again(self, call: Call[Any], error: StillhouseError, version: int) -> tuple[Server | None, float] | None:
        """Which server to ask at once, or (None) after how many seconds to ask any; None if the error is final."""
        if isinstance(error, Unauthenticated):
            self._security.look(at_once=True)
            if call.renewed or self._security.version == version:
                return None
            call.renewed = True
            return None, 0.0
        if isinstance(error, ModelRevisionMismatch):
            other = self._other(call, lambda standing: not standing.asked)
            if other is None and self._other(call, lambda s: not (s.refuses or s.resting)) is None:
                return None
        elif isinstance(error, (Overloaded, QuotaExceeded)):
            other = self._other(call, _nothing_against)
        elif error.retryable:
            other = None
        else:
            return None
        if other is not None:
            return other, 0.0
        # The random part also spreads the callers that one server sent away with the same delay.
        call.waits += 1
        return None, self._asked_delay_s(call, error) + self._backoff.delay_s(call.waits - 1)

    def _asked_delay_s(self, call: Call[Any], error: StillhouseError) -> float:
        """How long the server asked to wait, or less if one asked before it is free sooner."""
        if not error.retry_delay_s:
            return 0.0
        now_s = time.monotonic()
        others = [server.busy_until_s - now_s for server in call.asked if server is not call.asked[-1]]
        return min([error.retry_delay_s, *(delay_s for delay_s in others if delay_s > 0)])

    def _other(self, call: Call[Any], only: Callable[[Standing], bool]) -> Server | None:
        return self._pool.pick(call.cost_tokens, revision=call.revision, asked=call.asked, only=only)

    async def _attempt(self, call: Call[T], server: Server | None, end_s: float) -> T:
        await self._pool.ready(end_s - time.monotonic())
        server = server or self._other(call, lambda _: True)
        assert server is not None  # `ready` has seen one
        after_s = self._hedging.after_s if call.one_model else None
        if after_s is None:
            return await self._send(call, server, end_s)
        answer, won = await first_answer(self._send(call, server, end_s), after_s, lambda: self._second(call, end_s))
        self._stats.hedges_won += won
        return answer

    def _second(self, call: Call[T], end_s: float) -> Coroutine[Any, Any, T] | None:
        server = self._other(call, _nothing_against)
        if server is None or not self._hedging.take():
            return None
        self._stats.hedges += 1
        return self._send(call, server, end_s)

    async def _send(self, call: Call[T], server: Server, end_s: float) -> T:
        call.asked.append(server)
        metadata = (
            ("stillhouse-request-id", call.request_id),
            ("stillhouse-attempt", str(len(call.asked))),
            *self._security.metadata,
        )
        start_s = time.monotonic()
        try:
            with self._pool.calling(server, call.cost_tokens) as connection:
                answer = await call.method(connection.stub)(call.request, timeout=end_s - start_s, metadata=metadata)
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            self._pool.refused(server, error, call.revision)
            raise error from rpc_error
        if answer is None:  # what grpc.aio makes of bytes that it cannot parse
            raise WrongAnswer("the answer's bytes are not the message expected", field="message")
        if call.one_model:
            self._hedging.answered(time.monotonic() - start_s)
        return answer


def _nothing_against(standing: Standing) -> bool:
    return not any(standing)
