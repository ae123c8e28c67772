"""A second copy of a call that takes unusually long, at another server; the first good answer counts.

At most a share of the calls is sent twice, however slow all of them become: a general slow-down must not make
itself worse.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

MAX_SHARE = 0.1
_REMEMBERED = 512  # answers
_NEEDED = 64  # answers, before anything can be called unusual
_BURST = 4.0  # calls sent twice in a row, after many that were not


class Hedging:
    """How long is unusually long, and whether one more call may be sent twice. `share`: 0 (never) .. 0.1."""

    def __init__(self, share: float) -> None:
        if not 0.0 <= share <= MAX_SHARE:
            raise ValueError(f"hedge_share is {share}; it must be 0 (no hedging) .. {MAX_SHARE}")
        self._share = share
        self._times_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._fresh = 0  # answers since the quantile was taken
        self._usual_s: float | None = None
        self._saved = 0.0

    @property
    def after_s(self) -> float | None:
        """After how long to send a second copy: the (1 - share) quantile of recent answers; None for never."""
        if not self._share or len(self._times_s) < _NEEDED:
            return None
        if self._usual_s is None or self._fresh >= 16:
            ordered = sorted(self._times_s)
            self._usual_s = ordered[math.ceil((1.0 - self._share) * len(ordered)) - 1]
            self._fresh = 0
        return self._usual_s

    def called(self) -> None:
        """One more call, of which `share` may be sent twice."""
        self._saved = min(_BURST, self._saved + self._share)

    def answered(self, duration_s: float) -> None:
        """One copy was answered after so long."""
        self._times_s.append(duration_s)
        self._fresh += 1

    def take(self) -> bool:
        """Whether one more second copy is within the share; if so it is counted as sent."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True


async def first_answer(
    first: Coroutine[Any, Any, T], after_s: float, second: Callable[[], Coroutine[Any, Any, T] | None]
) -> tuple[T, bool]:
    """The answer of `first`, or of `second()`, begun after `after_s`, if that is there earlier: (answer, second's?).

    What fails is waited out with the other; if both fail, the second's error is raised. The loser is cancelled.
    """
    copies = [asyncio.create_task(first)]
    try:
        await asyncio.wait(copies, timeout=after_s)
        if not copies[0].done() and (other := second()) is not None:
            copies.append(asyncio.create_task(other))
        pending = set(copies)
        while pending:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for copy in copies:
                if copy.done() and copy.exception() is None:
                    return copy.result(), copy is not copies[0]
        return copies[-1].result(), False  # raises
    finally:
        for copy in copies:
            copy.cancel()
        await asyncio.gather(*copies, return_exceptions=True)
