"""What a process of a run says outside of the meetings: that it was asked to stop, what it failed of, that it waits.

A meeting is too late for the first two. A process that is asked to stop (its node is drained) while another waits out
an outage of the teachers would wait with it; and one that fails where no meeting checks leaves the others in theirs.
Notices lie in the store through which torch.distributed found its processes. A thread of each process looks there,
on a connection of its own; it also says how long the process has waited in a meeting.
"""

import dataclasses
import datetime
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from student_trainer.failures import Failure, failure_of
from student_trainer.processes import PeerFailed, Processes
from student_trainer.stopping import StopRequest

_LOOK_S = 0.5
_TELL_S = 10.0
_STORE_TIMEOUT_S = 10.0
_STOP, _FAILURE = "stillhouse/stop", "stillhouse/failure"


class Notices:
    """The notices of a run, from construction to `close`; of a single process there are none.

    on_failure: called from another thread with what any process says it failed of.
    """

    def __init__(
        self, processes: Processes, stop: StopRequest, on_failure: Callable[[Failure], None] = lambda failure: None
    ) -> None:
        self._store: Any = None
        self._closed = threading.Event()
        if processes.count == 1:
            return
        self._processes = processes
        self._rank, self._count = processes.rank, processes.count
        self._told_wait_s = 0.0
        # Not the store itself: who waits in it for another process keeps every other thread out.
        shared: Any = dist.distributed_c10d._get_default_store()
        self._store = shared.clone()
        self._store.set_timeout(datetime.timedelta(seconds=_STORE_TIMEOUT_S))
        self._stop = stop
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._look, name="notices", daemon=True)
        self._thread.start()

    def explained(self, error: Exception) -> Exception:
        """`error`, and the others hear of it; or, if it only says that another process is gone, what that one failed
        of."""
        if self._store is None:
            return error
        failure = failure_of(error)
        try:
            if failure.reason != "peer":
                text = failure.message or f"{type(error).__name__}: {error}"
                notice = [self._rank, dataclasses.asdict(dataclasses.replace(failure, message=text))]
                self._store.compare_set(_FAILURE, "", json.dumps(notice))  # the first one stands
                return error
            found = self._read()
        except RuntimeError:  # the store is gone, with the process that had it
            return error
        if found is None:
            return error
        rank, failure = found
        return PeerFailed(
            f"process {rank} of {self._count} failed: {failure.message}", reason=failure.reason, status=failure.status
        )

    def close(self) -> None:
        """Looks no more."""
        self._closed.set()
        if self._store is not None:
            self._thread.join()

    def _look(self) -> None:
        told = failed = False
        try:
            while not self._closed.wait(_LOOK_S):
                self._tell_wait()
                if not told and self._stop.arrived():
                    self._store.set(_STOP, "")
                    told = True
                if not self._stop.heard and self._store.check([_STOP]):
                    self._stop.heard = True
                if not failed and (found := self._read()) is not None:
                    failed = True
                    self._on_failure(found[1])
        except RuntimeError:  # the store is gone: then the run is, too, and its meetings say so
            return

    def _tell_wait(self) -> None:
        since_s, now_s = self._processes.meeting_since_s, time.monotonic()
        if since_s is not None and now_s - max(since_s, self._told_wait_s) >= _TELL_S:
            self._told_wait_s = now_s
            print(f"waiting for the other processes of the run, {now_s - since_s:.0f} s", file=sys.stderr, flush=True)

    def _read(self) -> tuple[int, Failure] | None:
        if not self._store.check([_FAILURE]):
            return None
        rank, failure = json.loads(self._store.get(_FAILURE))
        return rank, Failure(**failure)
