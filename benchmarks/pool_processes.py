"""Servers, clients and probes as processes of this machine: started together, measured over the same time, ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.pool_workload import Outcome, Server, Work

ROOT = Path(__file__).parent.parent
HEALTH = "/grpc.health.v1.Health/Check"
PING = "/floor/Ping"


@dataclass(frozen=True)
class Running:
    """A server process."""

    process: subprocess.Popen[str]
    address: str
    health_address: str

    @property
    def cpu_s(self) -> float:
        """CPU seconds so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def rss_bytes(self) -> int:
        """Resident memory."""
        return psutil.Process(self.process.pid).memory_info().rss


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    """`python -m module arguments`, with pipes."""
    paths = [str(ROOT / "proto"), str(ROOT)]
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """What is put into the list ends with the block."""
    started: list[subprocess.Popen[str]] = []
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in started:
            process.communicate()


@contextlib.contextmanager
def servers(
    specs: Sequence[Server], *arguments: str, module: str = "benchmarks.synthetic_server"
) -> Iterator[list[Running]]:
    """Synthetic servers, one a spec, ready."""
    with processes() as started:
        for spec in specs:
            options = ["--health-listen", "127.0.0.1:0", "--log-level", "error", *spec.arguments(), *arguments]
            started.append(start(module, *options))
        yield [ready(process) for process in started]


def ready(process: subprocess.Popen[str]) -> Running:
    """Waits for the line in which a server says where it listens."""
    assert process.stdout is not None
    found: dict[str, str] = {}
    while "listen" not in found:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a server ended with {process.wait()} before it was ready")
        found |= dict(part.split("=", 1) for part in line.split() if "=" in part)
    return Running(process, found["listen"], f"127.0.0.1:{found['health_port']}" if "health_port" in found else "")


@dataclass(frozen=True)
class Measured:
    """One real run: an outcome a group of clients, what the servers used, what the probe saw."""

    outcomes: list[Outcome]
    server_cpu_s: float
    probe: dict[str, Any]


def run(
    running: Sequence[Running],
    works: Sequence[Work],
    *,
    warm_s: float,
    duration_s: float,
    tokens: dict[str, str] | None = None,
    client_processes: int = 1,
    probe: str = "",
    module: str = "benchmarks.pool_client",
) -> Measured:
    """Lets every group work at the same servers at the same time.

    tokens: bearer tokens by tenant. client_processes: that the clients of each group share. probe: a method
    to ask every 20 ms meanwhile, of the first server.
    """
    addresses = [server.address for server in running]
    with processes() as started:
        groups: list[list[subprocess.Popen[str]]] = []
        for work in works:
            count = min(client_processes, work.clients)
            shares = [work.clients // count + (index < work.clients % count) for index in range(count)]
            config = {
                "addresses": addresses,
                "token": (tokens or {}).get(work.tenant, ""),
                "warm_s": warm_s,
                "duration_s": duration_s,
            }
            groups.append([])
            for share in shares:
                process = start(module)
                started.append(process)
                groups[-1].append(process)
                _say(process, json.dumps(config | {"seed": len(started), "work": asdict(replace(work, clients=share))}))
        prober = None
        if probe:
            prober = start("benchmarks.pool_probe")
            started.append(prober)
            ports = {"main": addresses[0], "health": running[0].health_address}
            _say(prober, json.dumps({"ports": ports, "method": probe, "warm_s": warm_s, "duration_s": duration_s}))
        for process in started:
            _hear(process, "ready")
        for process in started:
            _say(process, "go")
        time.sleep(warm_s)
        cpu_s = sum(server.cpu_s for server in running)
        time.sleep(duration_s)
        cpu_s = sum(server.cpu_s for server in running) - cpu_s
        outcomes: list[Outcome] = []
        for group in groups:
            outcome = Outcome()
            for process in group:
                outcome.add(Outcome(**json.loads(_hear(process))))
            outcomes.append(outcome)
        return Measured(outcomes, cpu_s, json.loads(_hear(prober)) if prober else {})


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str], expected: str = "") -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line or (expected and line != expected):
        raise RuntimeError(f"{process.args} said {line!r} and ended with {process.poll()}")
    return line
