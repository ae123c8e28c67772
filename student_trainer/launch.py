"""`student-trainer launch`: torchrun's own code in this process, for a supervisor that reads exit statuses.

torchrun ends with 1 whatever its workers ended with. And on SIGTERM it gives them 30 s, does not say what became of
them, and makes the launchers of other nodes wait for it. Here the workers are told and the launcher goes on watching
until they have ended by themselves; who runs it decides how long that may take. Ctrl-C is passed on likewise.
"""

import os
import signal
import sys
from types import FrameType
from typing import Any

from student_trainer.failures import FAILED, LOST, REFUSED


def launch(torchrun_options: list[str], trainer_arguments: list[str], stopped_status: int) -> int:
    """Runs `student-trainer *trainer_arguments` in every worker; returns the exit status that `outcome` gives."""
    told = _Told()
    try:
        return _launch(torchrun_options, trainer_arguments, stopped_status, told)
    except _NothingBegan:
        return 130 if told.signal == signal.SIGINT else stopped_status


def _launch(torchrun_options: list[str], trainer_arguments: list[str], stopped_status: int, told: "_Told") -> int:
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api

    from student_trainer.launch_agent import Agent

    options: Any = run.parse_args([*torchrun_options, "--module", "student_trainer.cli", *trainer_arguments])
    options.signals_to_handle = "SIGHUP,SIGQUIT"  # the others are ours
    agents: list[Agent] = []

    def make_agent(*arguments: Any, **more: Any) -> Agent:
        agents.append(Agent(*arguments, **more))
        told.agent = agents[-1]
        return agents[-1]

    module: Any = api
    module.LocalElasticAgent = make_agent  # the name by which torchrun makes it
    why = None
    try:
        run.run(options)
    except ChildFailedError:
        pass  # torchelastic has logged it, and the worker has said why
    except (SignalException, RendezvousError, DistError) as error:
        why = error
    except (ValueError, AssertionError) as error:
        if not agents:
            print(f"student-trainer: nothing was started:\n{error}", file=sys.stderr)
            return REFUSED
        raise
    if told.signal is not None and (not agents or not agents[-1].began):
        raise _NothingBegan
    if why is not None:
        print(f"student-trainer: launch: {why}", file=sys.stderr)
    codes = agents[-1].exit_codes() if agents else []
    status = outcome(codes, stopped_status, told=told.signal is not None)
    return LOST if why is not None and status in (0, 128 + signal.SIGTERM) and not told.signal else status


def outcome(codes: list[int | None], stopped_status: int, *, told: bool) -> int:
    """The exit status of a launcher whose workers ended with `codes` (negative: by that signal; None: not at all).

    That of the worker that has the cause: one that failed, then one that was killed (128 + the signal), then those
    that only lost the others. Workers that SIGTERM killed were told to end: because others had ended before them, or
    (told) because the launcher was, so early that nothing had begun.
    """

    def weight(code: int | None) -> int:
        if code in (FAILED, REFUSED):
            return 5
        if code is None:
            return 2
        if code < 0:
            return 1 if code == -signal.SIGTERM else 4
        if code == LOST:
            return 3
        return 2 if code else 0

    worst = max(codes, key=weight, default=LOST)
    if worst is None:
        return LOST
    if worst == -signal.SIGTERM and told:
        return stopped_status
    return worst if worst >= 0 else 128 - worst


class _NothingBegan(BaseException):
    """Told to stop before there was a worker."""


class _Told:
    """Listens to SIGTERM and SIGINT for as long as the program runs, and passes them on."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.agent: Any = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        os.write(2, f"student-trainer: {self.signal.name} is passed on to the workers\n".encode())
        if self.agent is None:
            raise _NothingBegan
        self.agent.tell(signal.Signals(number))
