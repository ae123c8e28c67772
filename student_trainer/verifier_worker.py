"""A child process that runs a library's verifier under a deadline.

Why a process: math_verify and reasoning-gym work on text that the student wrote, with sympy and (some datasets) with
`eval`. Such text can ask for 9**9**9**9, which takes longer than the run, or for more memory than the machine has.
math_verify's own deadline is a signal, which Python allows in the main thread only; most of reasoning-gym has none.

Who calls whom: any thread of the trainer may call a `Worker`; calls take turns at a lock, and each waits for the
child's answer. The child serves one request after another and ends when its input closes. Its deadline is the
kernel's: an alarm that ends the process even inside C code. The next call then starts a fresh child.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY_BYTES = 4 << 30  # what one child may take on top of its imports


class WorkerError(RuntimeError):
    """The verifier raised in the child, or the child died. The text says which."""


class Worker:
    """Calls `build(*arguments)` in a child once, and then what it returned for every request.

    Args:
        build: a function at the top level of an importable module; it returns the function that serves.
        arguments: its arguments; they must pickle, and so must requests and results.
        timeout_s: seconds a request may take, by the clock.

    Raises:
        WorkerError: `build` raised.
    """

    def __init__(self, build: Callable[..., Callable[..., Any]], *arguments: Any, timeout_s: float) -> None:
        self._job = (build, arguments, timeout_s)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process, self._end = self._start()

    def __call__(self, *request: Any) -> Any:
        """The result for one request.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            WorkerError: it raised, ran out of memory, or ended the child.
        """
        data = pickle.dumps(request)  # before the lock and the pipe: what cannot be sent must not be half sent
        with self._lock:
            if not self._end.alive:
                self._process, self._end = self._start()
            return self._exchange(self._process, self._end, data)

    def close(self) -> None:
        """End the child now; otherwise it ends with the trainer."""
        with self._lock:
            self._end()

    def _start(self) -> tuple[subprocess.Popen[bytes], weakref.finalize]:
        # The child must find what this process can import, also where a path was added while running.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the trainer, which then closes the pipe
        )
        end = weakref.finalize(self, _end, process)
        try:
            self._exchange(process, end, pickle.dumps(self._job))
        except BaseException:
            end()
            raise
        return process, end

    def _exchange(self, process: subprocess.Popen[bytes], end: weakref.finalize, data: bytes) -> Any:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(data)
            process.stdin.flush()
            succeeded, value = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            status = process.wait()
            end()
            if status == -signal.SIGALRM:
                raise TimeoutError(f"it took longer than {self._timeout_s:g} s (timeout_s)") from None
            raise WorkerError(f"the end of its process, status {status} (negative: by that signal)") from None
        except BaseException:
            end()  # interrupted between question and answer: the next question must not get this one's answer
            raise
        if not succeeded:
            raise WorkerError(value)
        return value


def serve_reasoning_gym(dataset: str, options: dict[str, Any]) -> Callable[..., Any]:
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, **options).score_answer


def serve_math() -> Callable[..., bool]:
    """In the child: `serve(gold)` says whether it is usable, `serve(gold, text, extracted)` whether the text is right.

    math_verify swallows exceptions and deadlines into "wrong" unless told otherwise, and sets its deadlines by
    signals; both are turned off here, because the child has a deadline and its errors are reported.
    """
    import math_verify

    for name in ("parser", "grader"):  # each would warn, once, that its own deadline is off
        vars(sys.modules[f"math_verify.{name}"])["TIMEOUT_WARNING_SHOWN"] = True

    def parse(text: str) -> list[Any]:
        return math_verify.parse(text, parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]

    def compare(gold: list[Any], found: list[Any]) -> bool:
        return math_verify.verify(gold, found, timeout_seconds=None, raise_on_error=True)

    zero = parse("$0$")

    @functools.lru_cache(maxsize=4096)
    def parse_gold(gold: str) -> list[Any]:
        return parse(_delimited(gold))

    def serve(gold: str, text: str | None = None, extracted: bool = False) -> bool:
        expected = parse_gold(gold)
        if text is not None:
            return compare(expected, parse(_delimited(text) if extracted else text))
        compare(expected, zero)  # must not raise, as it does with 1/0: every answer would
        return any(not isinstance(part, str) for part in expected)  # a string: found, but not understood

    return serve


def _delimited(text: str) -> str:
    """An answer that stands alone, marked as mathematics: bare, `2\\pi` would be read as 2 and `x^2+1` as nothing."""
    return text if re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", text) else f"${text}$"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # closing flushes, to a child that is gone
            pipe.close()


def _main() -> None:
    # The pipes move out of reach: a verifier that prints goes to stderr, one that reads finds the end of input.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    build, arguments, timeout_s = pickle.load(requests)
    succeeded, serve = _attempt(build, arguments)
    _reply(replies, succeeded, None if succeeded else serve)
    _limit_memory()
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        succeeded, value = _attempt(serve, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, succeeded, value)


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, function(*arguments)
    except BaseException as error:  # also SystemExit: some datasets evaluate the student's text, which may say exit()
        return False, f"{type(error).__name__}: {error}"


def _reply(replies: Any, succeeded: bool, value: Any) -> None:
    pickle.dump((succeeded, value), replies)
    replies.flush()


def _limit_memory() -> None:
    if sys.platform == "linux":
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = in_use + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    _main()
