"""Cases that take long because a server has to start, which is one process waiting for another: two at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

Case = TypeVar("Case")
Result = TypeVar("Result")


class Ahead(Generic[Case, Result]):
    """What `work` makes of each of `cases`; while one is asked for, the next is under way in a thread.

    For tests that ask in order. One that is run alone costs one case too many.
    """

    def __init__(self, work: Callable[[Case], Result], cases: Sequence[Case]) -> None:
        self._work, self._cases = work, cases
        self._pool = ThreadPoolExecutor(2)
        self._results: dict[int, Future[Result]] = {}

    def result(self, case: Case) -> Result:
        """Result of this case; raises what `work` raised."""
        at = self._cases.index(case)
        for number in range(at, min(at + 2, len(self._cases))):
            if number not in self._results:
                self._results[number] = self._pool.submit(self._work, self._cases[number])
        return self._results[at].result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
