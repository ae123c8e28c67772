"""What all contenders have in common: settings, the interface, and the processes of a server and what they used."""

import abc
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"

DTYPE = "float32"
MAX_TOKENS = 4096
MAX_BATCH_TOKENS = 8192
KV_CACHE_BYTES = 2**28
START_LIMIT_S = 300.0

Sequences = Sequence[NDArray[np.int32]]


class ContenderFailed(RuntimeError):
    """A server did not start, or did not answer; the message says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Scores of the positions of one sequence but the first, most likely ids first."""

    sampled_logprobs: NDArray[np.float32]  # [N]
    top_ids: NDArray[np.int32]  # [N, k] or fewer columns, if that is all there is
    top_logprobs: NDArray[np.float32]


class Contender(abc.ABC):
    """A running server and its client."""

    def __init__(self, pid: int) -> None:
        self.tree = Tree(pid)

    @abc.abstractmethod
    def wave(self, variant: str, sequences: Sequences, k: int) -> float:
        """Scores all sequences at once as `variant` does it; the seconds that took."""

    @abc.abstractmethod
    def answer(self, sequence: NDArray[np.int32], k: int) -> Answer:
        """Scores of one sequence."""

    def payload_bytes(self) -> int | None:
        """Size of the answer to one sequence of the last wave; None if nothing is sent."""
        return None


class Tree:
    """A process and all that descend from it."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        for process in self._processes():
            # Whoever asks for more memory than there is: a server shall end, not the programs beside it.
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")

    def cpu_s(self) -> float:
        """Processor time used so far."""
        used = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def forget_peak(self) -> None:
        """Peaks count from now on."""
        for process in self._processes():
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_mib(self) -> float:
        """Sum of the processes' largest resident sets; pages that several share count several times."""
        total = 0
        for process in self._processes():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                total += next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
        return total / 1024

    def kill(self) -> None:
        """Ends all of it at once."""
        _kill(self._processes())

    def end(self) -> None:
        """Ends the first process politely, then whatever is left; returns when nothing is."""
        processes = self._processes()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._root.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(processes, timeout=15)
        _kill(left)
        psutil.wait_procs(left, timeout=15)

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@contextlib.contextmanager
def deadline(tree: Tree, seconds: float) -> Iterator[threading.Event]:
    """Kills the processes unless the block ends in time: whoever waits for one of them then learns that it is gone.

    The event says whether it came to that.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        tree.kill()

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@contextlib.contextmanager
def process(
    command: Sequence[str], ready: Callable[[subprocess.Popen[str]], bool], *, variables: dict[str, str], **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Runs `command` until the end of the block, which starts when `ready` says so. Raises ContenderFailed."""
    options["env"] = {**os.environ, **variables, **options.get("env", {})}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        running = subprocess.Popen(command, text=True, stderr=log, **{"stdout": log, **options})
        try:
            with deadline(Tree(running.pid), START_LIMIT_S):
                while not ready(running):
                    if running.poll() is not None:
                        log.seek(0)
                        raise ContenderFailed(f"it ended with {running.returncode}: {_last_words(log.read())}")
                    time.sleep(0.2)
            yield running
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                Tree(running.pid).end()
            running.wait()


def _last_words(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # The engine's processes say what failed; what its parent says after that is only that something did.
    errors = [line for line in lines if "Error" in line and "Engine core" not in line]
    return (errors or lines or ["nothing in its log"])[-1][-500:]


def variables(threads: int) -> dict[str, str]:
    """The same for every server: a fixed number of threads on whatever processors are free, and no network."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def serve_command(module: str, model: Path, port: int) -> list[str]:
    """Command line of one of vLLM's own servers, by the module that is its program.

    `vllm serve` calls the same modules, but first asks for the version of a distribution named vllm, and the CPU build
    is named otherwise.
    """
    return [
        str(VLLM_PYTHON),
        "-m",
        module,
        f"--model={model}",
        "--served-model-name=teacher",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--dtype={DTYPE}",
        f"--max-model-len={MAX_TOKENS}",
        f"--max-num-batched-tokens={MAX_BATCH_TOKENS}",
        f"--kv-cache-memory-bytes={KV_CACHE_BYTES}",
        "--max-logprobs=-1",
        "--enforce-eager",
    ]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
