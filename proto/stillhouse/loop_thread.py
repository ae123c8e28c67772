"""An event loop on a thread of its own, for blocking programs that want asyncio's concurrency.

Any thread submits coroutines and waits for their futures; only `stop` ends the loop. Every future handed out
ends: with the coroutine's result, its exception, or, when the loop stops first, cancelled.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """A running event loop. Safe from any thread but its own, where waiting would wait for itself."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()  # between the check of `_open` and what relies on it
        self._open = True
        self._end: concurrent.futures.Future[None] | None = None
        self._thread = threading.Thread(target=_run, args=(self._loop,), name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts `work` on the loop. Raises RuntimeError if the loop is stopped, or was left in a parent
        process by fork."""
        with self._lock:
            if self._open and self._thread.is_alive():
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise RuntimeError(
            "the client is closed; make a new one"
            if not self._open
            else "the client's thread does not exist in this process (after fork); make a client here"
        )

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` on the loop and returns its result; cancels it if the caller is interrupted."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a callback of the client must not wait for the client; use another thread")
        try:
            return self.submit(work).result()
        except BaseException:
            # Not by the future: an interrupt may come before `submit` has returned it.
            with contextlib.suppress(RuntimeError):  # the loop is closed, and what ran on it has ended
                if self._thread.is_alive():
                    self._loop.call_soon_threadsafe(_cancel, work)
            raise

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]], *, join: bool = True) -> None:
        """Runs `last`, cancels what still runs, ends the thread. Further calls only wait for that."""
        if join and threading.current_thread() is self._thread:
            raise RuntimeError("a callback of the client must not close the client; use another thread")
        with self._lock:
            if self._open and self._thread.is_alive():
                self._end = asyncio.run_coroutine_threadsafe(_finish(last()), self._loop)
            self._open = False
        if join:
            self._thread.join()
            if self._end is not None:
                self._end.result()  # raises what `last` raised


def _cancel(work: Coroutine[Any, Any, Any]) -> None:
    """Does nothing to work that is done."""
    for task in asyncio.all_tasks():
        if task.get_coro() is work:
            task.cancel()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _finish(last: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    try:
        await last
    finally:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        loop.call_soon(loop.stop)  # not at once: the futures of what ended here still have to be told
