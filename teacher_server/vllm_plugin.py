"""What every process of a vLLM engine runs first, through vLLM's `vllm.general_plugins` entry point.

It does nothing in a vLLM that teacher-server did not start. In one that it did, it makes the served architecture
a scoring model (see `vllm_adapter`), and in the engine's child processes it sees to three things:

- they die with their parent, even with one that was killed: the kernel sends the signal;
- the terminal's Ctrl-C reaches the server alone, which drains first;
- what made one of them fail goes to a file, so that the server can name it in one line.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

FAILURES_VARIABLE = "STILLHOUSE_VLLM_FAILURES"
"""Path of the file that collects what made a child process fail; its presence marks our own engines."""
SERVER_VARIABLE = "STILLHOUSE_VLLM_SERVER"
"""Process id of the server."""

_PR_SET_PDEATHSIG = 1


def register() -> None:
    """The entry point. May run more than once in a process."""
    if FAILURES_VARIABLE not in os.environ:
        return
    if os.getpid() != int(os.environ[SERVER_VARIABLE]):
        die_with_parent()
        _report_failures(os.environ[FAILURES_VARIABLE])
    from teacher_server import vllm_adapter

    vllm_adapter.register_models()


def die_with_parent() -> None:
    """In a process of the engine: dies as soon as its parent is gone, and leaves the terminal's foreground group."""
    server = int(os.environ.get(SERVER_VARIABLE, "0"))
    if not server or os.getpid() == server or not sys.platform.startswith("linux"):
        return
    if os.getpgrp() == os.getpgid(os.getppid()):
        os.setpgid(0, 0)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if server not in _ancestors():  # it died before this was asked for
        os._exit(1)


def _ancestors() -> Iterator[int]:
    """Process ids of the parent, its parent, and so on."""
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            # The name in parentheses may hold anything; state and parent follow the last of them.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return


def _report_failures(path: str) -> None:
    logger = logging.getLogger("vllm")
    if not any(isinstance(handler, _FailureFile) for handler in logger.handlers):
        logger.addHandler(_FailureFile(path))


class _FailureFile(logging.Handler):
    """Appends the exception of every error that is logged with one, a line each."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if not record.exc_info or record.exc_info[1] is None:
            return
        error = record.exc_info[1]
        line = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            self.handleError(record)
