"""What a request waits at before it reaches the engine: `FairQueue` on the event loop.

Who waits for whom: `turn` admits or refuses at once; then the caller sleeps until `FairQueue.take` gives its entry,
which is tried whenever one arrives or leaves. A caller that is cancelled (it gave up, or its deadline passed) leaves
the queue in the same moment, so its work never reaches the engine.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable

from stillhouse.errors import StillhouseError, Unavailable
from teacher_server.access import Tenant
from teacher_server.fair_queue import Bounds, Entry, FairQueue


class Gate:
    """See the module's text. Use it from one event loop. clock: monotonic seconds."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        self.queue = FairQueue(bounds, _drop)
        self._clock = clock
        self._closed = False
        self._no_progress_s = 0.0

    @contextlib.asynccontextmanager
    async def turn(
        self, tenant: Tenant, *, tokens: int, size_bytes: int, priority: int = 0, remaining_s: float | None = None
    ) -> AsyncGenerator[float]:
        """Inside, the engine may be asked; gives the time waited for that, seconds. remaining_s: of the deadline.

        Raises Overloaded, QuotaExceeded, DeadlineExceeded, Unavailable.
        """
        if self._closed:
            raise Unavailable("the server is stopping")
        now_s = self._clock()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = self.queue.admit(
            tenant,
            tokens=tokens,
            size_bytes=size_bytes,
            priority=priority,
            now_s=now_s,
            deadline_s=None if remaining_s is None else now_s + remaining_s,
            payload=future,
        )
        scored, ended = False, True
        try:
            self._pump()
            await future
            yield entry.started_s - entry.arrived_s
            scored = True
        except asyncio.CancelledError:
            ended = False
            raise
        finally:
            self.queue.leave(entry, self._clock(), scored=scored, ended=ended)
            self._pump()

    def no_progress_s(self) -> float:
        """How long the engine has had work and ended none of it."""
        self._no_progress_s = self.queue.no_progress_s(self._clock())
        return self._no_progress_s

    def last_no_progress_s(self) -> float:
        """What `no_progress_s` last said; safe from any thread."""
        return self._no_progress_s

    def close(self) -> None:
        """From now on `turn` raises Unavailable; what was admitted goes on."""
        self._closed = True

    def _pump(self) -> None:
        while (entry := self.queue.take(self._clock())) is not None:
            if not entry.payload.done():
                entry.payload.set_result(None)
            # else: cancelled a moment ago; its own `turn` takes it out


def _drop(entry: Entry, error: StillhouseError) -> None:
    if not entry.payload.done():
        entry.payload.set_exception(error)
