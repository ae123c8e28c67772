"""Long work says where it is."""

import sys
import time


class Heartbeat:
    """A line on stderr at most every `every_s` seconds while work goes on: "rollouts: 512 of 2048, 31 s"."""

    def __init__(self, what: str, total: int, *, every_s: float = 10.0) -> None:
        self._what = what
        self._total = total
        self._every_s = every_s
        self._done = 0
        self._start_s = self._shown_s = time.monotonic()

    def advance(self, done: int = 0) -> None:
        """Counts `done` more, and says so if it is time and something is left."""
        self._done += done
        now_s = time.monotonic()
        if self._done < self._total and now_s - self._shown_s >= self._every_s:
            self._shown_s = now_s
            elapsed_s = now_s - self._start_s
            print(f"{self._what}: {self._done} of {self._total}, {elapsed_s:.0f} s", file=sys.stderr, flush=True)
