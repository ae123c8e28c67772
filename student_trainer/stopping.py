"""Being asked to stop: the first SIGTERM or SIGINT asks, and the run stops where nothing is lost.

Answers that are being made or scored are given up (they are made again on resume, the same ones); a training step
that has begun is finished. Then the run is saved. A second SIGINT (Ctrl-C) does not wait; a second SIGTERM changes
nothing, since launchers send several. Of several processes one may be asked alone, when its node is drained: the
others hear of it (`student_trainer.notices`).
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(Exception):
    """Somebody asked the run to stop; everything that was done is saved, or about to be."""


class Interrupted(Stopped):
    """The same, by Ctrl-C."""


SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Those that ask."""


class StopRequest:
    """Asked to stop or not. In a `with` block of the main thread it listens to SIGTERM and SIGINT."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.heard = False
        """Another process of the run was asked."""
        self._handlers: dict[int, Any] = {}
        self._arrivals: tuple[socket.socket, socket.socket] | None = None
        self._wakeup_before = -1
        self._arrived = False

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal is not None or self.heard

    def arrived(self) -> bool:
        """Whether a signal has come to this process; for one thread of it.

        True at once, also while the main thread waits inside PyTorch for another process. `signal` is set later, since
        Python runs a handler only when the main thread is back.
        """
        if self._arrivals is not None:
            with contextlib.suppress(BlockingIOError):
                self._arrived = any(number in SIGNALS for number in self._arrivals[0].recv(4096)) or self._arrived
        return self._arrived or self.signal is not None

    def wait(self, seconds: float) -> None:
        """Until a signal came to this process, or so many seconds have passed."""
        end_s = time.monotonic() + seconds
        while self.signal is None and (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.2))

    def outcome(self) -> Stopped:
        """What the run ends with, once it is saved."""
        if self.signal == signal.SIGINT:
            return Interrupted("stopped by SIGINT")
        return Stopped(f"stopped by {self.signal.name if self.signal else 'another process'}")

    def listen(self) -> Self:
        """Listens from now on, in the main thread; not so in any other."""
        if threading.current_thread() is threading.main_thread():
            self._arrivals = socket.socketpair()
            for end in self._arrivals:
                end.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(self._arrivals[1].fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, self._ask)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # as a launcher may have left them
        return self

    def __enter__(self) -> Self:
        return self.listen()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._arrivals is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            for end in self._arrivals:
                end.close()
            self._arrivals = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)


# A forked process has the same socket, and a signal to it is not one to this process.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

Stopping = Callable[[], bool]
"""Asked between pieces of long work: True means to give it up."""


def never() -> bool:
    """For work that nobody stops."""
    return False
