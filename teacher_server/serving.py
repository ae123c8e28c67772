"""The engine that answers, and its replacement by another without a gap.

A request keeps the engine it was checked against until it is answered, also while it waits for its turn; so a switch
changes nothing for what was admitted. The old engine is closed once its last request is answered, or `drain_s` after
the switch; what is left then fails as Unavailable and is sent again, to the new one.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Generator

from stillhouse.codec import Teacher
from teacher_server.engine import Engine

logger = logging.getLogger(__name__)


class Serving:
    """See the module's text. Use it from one event loop.

    on_switch: called with the description of the engine that answers from now on.
    """

    def __init__(self, engine: Engine, *, on_switch: Callable[[Teacher], None] = lambda teacher: None) -> None:
        self._engine = engine
        self._in_use: dict[Engine, int] = {engine: 0}
        self._switched = asyncio.Event()
        self._on_switch = on_switch

    def describe(self) -> Teacher:
        """What the engine that answers now serves and can do."""
        return self._engine.describe()

    @contextlib.contextmanager
    def engine(self) -> Generator[Engine]:
        """The engine that answers now; it stays open inside the `with` block."""
        engine = self._engine
        self._in_use[engine] += 1
        try:
            yield engine
        finally:
            self._in_use[engine] -= 1

    async def switch(self, engine: Engine, drain_s: float) -> None:
        """Answers with `engine` from now on; returns once the old one is closed."""
        old, self._engine = self._engine, engine
        self._in_use[engine] = 0
        self._on_switch(engine.describe())
        self._switched.set()
        self._switched = asyncio.Event()
        end_s = time.monotonic() + drain_s
        while self._in_use[old] and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
        if self._in_use[old]:
            logger.warning("drain time of the old revision is over: failing in_flight=%d", self._in_use[old])
        await old.close()
        while self._in_use[old]:  # those are failing now
            await asyncio.sleep(0.02)
        del self._in_use[old]

    async def died(self) -> str:
        """Waits until the engine that answers can never score again, and says why."""
        while True:
            death = asyncio.ensure_future(self._engine.died())
            switched = asyncio.ensure_future(self._switched.wait())
            try:
                await asyncio.wait({death, switched}, return_when=asyncio.FIRST_COMPLETED)
                if not switched.done():
                    return death.result()
            finally:
                death.cancel()
                switched.cancel()

    async def close(self) -> None:
        """Stops every engine; what is not yet scored fails as Unavailable."""
        for engine in list(self._in_use):
            await engine.close()
