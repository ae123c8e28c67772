"""Load for a while: what grows with time is found by size, not by reading.

The full form adds faults, drawn from a seed: servers killed, stopped and started again, connections reset.
"""

import os
import random
import subprocess
import time

import psutil
import pytest

from tests.chaos.pool_under_test import FULL, Load, Namespace, PoolServer, more_when_full, running, say, tool

pytestmark = pytest.mark.timeout(1800 if FULL else 180)

MIB = 2**20
# Fast servers: what leaks, leaks by the request.
FAST = ("--tokens-per-s", "60000", "--overhead-ms", "2")


class Size:
    """Memory and descriptors of processes, between two moments."""

    def __init__(self, **processes: subprocess.Popen[str]) -> None:
        self._processes = {name: psutil.Process(process.pid) for name, process in processes.items()}
        self._before = self._now()

    def _now(self) -> dict[str, tuple[float, int, int]]:
        return {
            name: (process.memory_info().rss / MIB, process.num_fds(), process.num_threads())
            for name, process in self._processes.items()
        }

    def check(self) -> None:
        """Fails if one grew by more than 100 MiB, or by more descriptors and threads than come and go."""
        now = self._now()
        for name, (mib, descriptors, threads) in self._before.items():
            later_mib, later_descriptors, later_threads = now[name]
            say(
                process=name,
                mib=f"{mib:.0f} -> {later_mib:.0f}",
                descriptors=f"{descriptors} -> {later_descriptors}",
                threads=f"{threads} -> {later_threads}",
            )
            assert later_mib - mib <= 100
            assert later_descriptors - descriptors <= 10
            assert later_threads - threads <= 10


def test_nothing_grows_under_load() -> None:
    with running(1, *FAST) as (server,), Load([server], clients=2, in_flight=8, tokens=(200, 1000)) as load:
        load.go_on_for(more_when_full(4.0, 60.0))
        warm = load.answered
        size = Size(server=server.process, callers=load.process)
        load.go_on_for(more_when_full(6.0, 600.0))
        size.check()
        said = load.answered - warm
        report = load.stop()
    say(answers=str(said), p99_s=report.p99_s())
    report.check_exactly_once()
    assert not report.retries
    assert said > 100


@pytest.mark.skipif(not FULL, reason="only with STILLHOUSE_CHAOS=full: takes ten minutes")
def test_nothing_grows_and_nothing_is_lost_under_random_faults() -> None:
    seed = int(os.environ.get("STILLHOUSE_CHAOS_SEED", "0"))
    faults = random.Random(seed)
    counts = {"kill": 0, "drain": 0, "pause": 0, "reset": 0}
    with Namespace() as network:
        servers = [PoolServer(*FAST, listen=f"127.0.1.{number}:50051", namespace=network) for number in (1, 2, 3)]
        with running(servers), Load(servers, namespace=network, clients=2, in_flight=8) as load:
            load.go_on_for(60.0)
            size = Size(callers=load.process)
            end_s = time.monotonic() + float(os.environ.get("STILLHOUSE_CHAOS_SECONDS", "600"))
            while time.monotonic() < end_s:
                server, fault = faults.choice(servers), faults.choice(list(counts))
                counts[fault] += 1
                if fault == "kill":
                    server.kill()
                    load.go_on_for(faults.uniform(0.0, 5.0))
                    server.start()
                elif fault == "drain":
                    server.drain()
                    server.start()
                elif fault == "pause":
                    server.pause()
                    load.go_on_for(faults.uniform(0.0, 20.0))
                    server.resume()
                else:
                    command = [tool("ss"), "-H", "-K", "-t", "-n", "state", "established"]
                    subprocess.run([*network.prefix, *command], capture_output=True, timeout=30)
                load.go_on_for(faults.uniform(0.5, 5.0))
            load.go_on_for(15.0)  # what a fault left open is closed by then
            size.check()
            report = load.stop()
    say(seed=str(seed), faults=str(counts), answers=str(report.answered), retries=str(report.retries))
    say(longest_latency_s=float(report.latencies_s().max()), longest_gap_s=report.longest_gap_s())
    report.check_exactly_once()
