"""torchelastic's agent, which passes signals on, restarts only what is worth it, and knows how its workers ended."""

import signal
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException

from student_trainer.failures import FAILED, LOST, REFUSED
from student_trainer.stopping import SIGNALS


class Agent(LocalElasticAgent):
    """The agent of one node."""

    began = False
    """Workers were started."""
    _starting = False
    _told: signal.Signals | None = None

    def tell(self, number: signal.Signals) -> None:
        """Passes a signal on to the workers, which then end by themselves; called by a signal handler.

        Raises torchelastic's SignalException if there is none yet.
        """
        self._remaining_restarts = 0
        self._told = number
        if self._starting:
            return  # they are told when all of them are there
        if not self.began:
            # Of all exceptions the one after which the other nodes may still find each other.
            raise SignalException("told to stop before any worker was started", sigval=number)
        for process in self._processes():
            process.send_signal(number)  # does nothing to one that has ended

    def exit_codes(self) -> list[int | None]:
        """Of the workers, by local rank; negative: killed by that signal; None: runs, or cannot be ended."""
        return [process.poll() for process in self._processes()]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._starting = True
        # A worker that cannot listen yet would die of a signal; it begins with them blocked, and looks when it can.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            started = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]  # no types
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.began, self._starting = True, False
        if self._told is not None:
            self.tell(self._told)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = self.exit_codes()
        if None in codes and any(map(_is_stop, codes)):
            return RunResult(state=WorkerState.HEALTHY)  # torchelastic would give the others 30 s
        result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        # --max-restarts is for what is lost, not for what would come again or was stopped.
        if result.is_failed() and any(code in (FAILED, REFUSED) or _is_stop(code) for code in self.exit_codes()):
            self._remaining_restarts = 0
        return result

    def _processes(self) -> list[Any]:
        context: Any = self._pcontext
        return [handler.proc for handler in context.subprocess_handlers.values()] if context else []


def _is_stop(code: int | None) -> bool:
    """Whether a worker that ended so was stopped and saved, as all of them are then: by Ctrl-C, or its own status."""
    return code is not None and code > 0 and code not in (FAILED, REFUSED, LOST)
