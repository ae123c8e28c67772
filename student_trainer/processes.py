"""The processes of a run: what they tell each other besides gradients.

Every method here is a meeting: all processes have to come, in the same order. They meet through gloo, on the CPU,
so a meeting never waits for a device, and one that only waits for a slow teacher is not taken for dead as long as
`meeting_timeout_s` has not passed.
"""

import contextlib
import datetime
import time
from collections.abc import Generator
from typing import Any

import torch.distributed as dist

from student_trainer.failures import LOST, failure_of
from student_trainer.stopping import Stopped


class PeerFailed(RuntimeError):
    """Another process of the run failed; the message says which and why. reason, status: that one's own
    (`student_trainer.failures`)."""

    def __init__(self, message: str, reason: str = "peer", status: int = LOST) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


class Processes:
    """This process among `count`; with one of them every meeting is over at once.

    Call it on every process, after torch.distributed was set up (accelerate does that).
    """

    def __init__(self, meeting_timeout_s: float = 1800.0) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        self.meeting_since_s: float | None = None
        """Since when this process waits for the others (time.monotonic); None: it does not."""
        timeout = datetime.timedelta(seconds=meeting_timeout_s)
        # One for the loop, one for whoever saves in the background: their meetings must not meet each other.
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if self.count > 1 else None
        self.background_group: Any = dist.new_group(backend="gloo", timeout=timeout) if self.count > 1 else None

    @property
    def is_main(self) -> bool:
        """True for the one that writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in the order of their ranks. Values are pickled: keep them small."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        self.meeting_since_s = time.monotonic()
        try:
            dist.all_gather_object(values, value, group=self._group)
        finally:
            self.meeting_since_s = None
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return any(self.gather(flag))

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """Work that may fail on one process: then it fails on all of them, instead of leaving the others to wait.

        The others raise PeerFailed, or Stopped if that is all that happened. What is no Exception (an interrupt) goes
        its own way.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        stopped = isinstance(error, Stopped)
        failure = None if error is None or stopped else failure_of(error)
        report = failure and (f"{type(error).__name__}: {error}", failure.reason, failure.status)
        reports = self.gather((stopped, report))
        if failure is not None and error is not None:
            raise error
        for rank, (_, report) in enumerate(reports):
            if report is not None:
                text, reason, status = report
                raise PeerFailed(f"process {rank} of {self.count} failed: {text}", reason, status)
        if any(asked for asked, _ in reports):
            raise error or Stopped("asked to stop")
