"""What chaos tests are made of: real servers, real callers and networks of their own, each a process that can be hit.

```python
with running(3) as servers, Load(servers) as load:
    load.more(100)                  # returns after 100 further answers
    servers[0].kill()
    load.more(200)
    report = load.stop()            # see `tests.chaos.load.Report`
report.check_exactly_once()
```

Servers are `benchmarks.synthetic_server`, callers `tests.chaos.load`. A `Namespace` is a network with nothing but a
loopback device, where packets can be dropped and names mean what a test wants. Whatever is started ends with the test
process, however that ends; the namespaces that a killed one left are removed by the next.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest

from tests.chaos.load import Plan, Report
from tests.servers import ROOT, environment

FULL = os.environ.get("STILLHOUSE_CHAOS") == "full"
"""Whether there is time: more load, and for longer."""

# About 120 sequences a second from three servers: enough to notice, little enough for two busy cores.
COST_MODEL = ("--tokens-per-s", "15000", "--overhead-ms", "5", "--max-batch-tokens", "1500")

_PREFIX = "stillhouse-chaos"
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
_HOSTS = Path("/etc/netns")
_numbers = itertools.count()


def more_when_full(short: float, full: float) -> float:
    """`short`, or `full` if there is time."""
    return full if FULL else short


def figure(promised: float, busy: float) -> float:
    """A bound that the project promises; in the short form, which runs on machines that do other things beside, one
    that still tells right from wrong."""
    return promised if FULL else busy


only_when_full = pytest.mark.skipif(not FULL, reason="only with STILLHOUSE_CHAOS=full")


def told(report: Report) -> Report:
    """The report, once it was said what it measured."""
    say(
        sequences=report.answered,
        longest_gap_s=report.longest_gap_s(),
        longest_latency_s=float(report.latencies_s().max()),
        retries=str(report.retries),
    )
    return report


def tool(name: str) -> str:
    """Path of a program; skips the test, naming it, if there is none."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        pytest.skip(f"needs {name}: scripts/install_test_tools.sh installs it")
    return found


def command(*words: str) -> str:
    """Runs a command that has to work; its output."""
    done = subprocess.run([tool(words[0]), *words[1:]], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


class Namespace:
    """A network of its own, made for one test. Skips the test where none can be made."""

    def __init__(self) -> None:
        tool("ip")
        if os.geteuid() != 0:
            pytest.skip("needs root: makes network namespaces")
        _remove_stale()
        self.name = f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
        made = subprocess.run([tool("ip"), "netns", "add", self.name], capture_output=True, text=True)
        if made.returncode != 0:
            pytest.skip(f"needs the right to make network namespaces: {made.stderr.strip()}")
        # `ip netns exec` shows this file as /etc/hosts; it must exist when a process starts there.
        self._hosts = _HOSTS / self.name / "hosts"
        self._hosts.parent.mkdir(parents=True)
        self.names({})
        self.run("ip", "link", "set", "lo", "up")

    @property
    def prefix(self) -> tuple[str, ...]:
        """Words before a command that is to run inside; the process is then the command's own."""
        return tool("ip"), "netns", "exec", self.name

    def run(self, *words: str) -> str:
        """Runs a command inside; its output."""
        return command(*self.prefix, tool(words[0]), *words[1:])

    def names(self, addresses: dict[str, Sequence[str]]) -> None:
        """What the resolver inside says from now on."""
        lines = [f"{address} {name}\n" for name, all_of_it in addresses.items() for address in all_of_it]
        # In place, since processes inside have this very file mounted, and never empty: the end goes last.
        with self._hosts.open("r+" if self._hosts.exists() else "w") as file:
            file.write("127.0.0.1 localhost\n" + "".join(lines))
            file.truncate()

    def filter(self, *rules: str) -> None:
        """Packets that come in are treated by these rules of nft from now on, and by no others."""
        chain = ["chain input {", "type filter hook input priority 0; policy accept;", *rules, "}"]
        table = ["table inet chaos {}", "delete table inet chaos", "table inet chaos {", *chain, "}"]
        text = "\n".join(table) + "\n"
        done = subprocess.run([*self.prefix, tool("nft"), "-f", "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def dropped(self) -> int:
        """Packets that a rule with `counter drop` dropped so far."""
        listed = json.loads(self.run("nft", "--json", "list", "table", "inet", "chaos"))
        rules = [entry["rule"]["expr"] for entry in listed["nftables"] if "rule" in entry]
        return sum(part["counter"]["packets"] for rule in rules for part in rule if "counter" in part)

    def close(self) -> None:
        """Removes it. Processes inside keep it alive, unseen, until they end."""
        _remove(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _remove(name: str) -> None:
    subprocess.run([tool("ip"), "netns", "delete", name], capture_output=True)
    shutil.rmtree(_HOSTS / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        _HOSTS.rmdir()  # unless somebody else's are in it


def _remove_stale() -> None:
    """Removes the namespaces of test processes that are gone; what ran in them ended with its parent."""
    left = {path.name for path in (*_HOSTS.glob(f"{_PREFIX}-*"), *Path("/run/netns").glob(f"{_PREFIX}-*"))}
    for name in left:
        if not psutil.pid_exists(int(name.split("-")[2])):
            _remove(name)


def ends_with_this_process() -> tuple[str, ...]:
    """Words before a command: the kernel kills it when this process ends, also by SIGKILL."""
    found = shutil.which("setpriv", path=_PATH)
    return (found, "--pdeathsig", "KILL") if found else ()


def goes_first() -> tuple[str, ...]:
    """Words before a command: it does not wait for the processor while others of this machine are busy.

    For what measures short times and takes little; nothing if that is not allowed.
    """
    return (tool("nice"), "-n", "-15") if os.geteuid() == 0 else ()


class PoolServer:
    """One synthetic server. Its address stays its own when it is started again."""

    def __init__(
        self,
        *options: str,
        listen: str = "127.0.0.1:0",
        namespace: Namespace | None = None,
        variables: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.address = listen
        self._options = options
        self._prefix = (*(namespace.prefix if namespace else ()), *prefix)
        self._variables = variables or {}
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.process: subprocess.Popen[str]
        self.metrics_url = ""

    @property
    def log(self) -> str:
        """What it wrote to standard error so far, over all starts."""
        return Path(self._log.name).read_text(errors="replace")

    @property
    def metrics(self) -> str:
        """The page that Prometheus reads; not from inside a namespace."""
        with urllib.request.urlopen(self.metrics_url, timeout=30) as page:
            return page.read().decode()

    def begin(self) -> None:
        """Starts the process; `wait_until_ready` has to follow."""
        words = (*self._prefix, *ends_with_this_process(), sys.executable, "-m", "benchmarks.synthetic_server")
        self.process = subprocess.Popen(
            [*words, "--listen", self.address, *COST_MODEL, *self._options],
            env=environment(**self._variables),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Returns once it serves."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("teacher-server ready: "), f"not ready: {line!r}\n{self.log}"
        said = dict(word.split("=", 1) for word in line.split()[2:])
        self.address, self.metrics_url = said["listen"], said["metrics"]

    def start(self) -> None:
        """Starts it and waits until it serves."""
        self.begin()
        self.wait_until_ready()

    def kill(self) -> None:
        """SIGKILL: every connection is gone at once."""
        self.process.kill()
        self._reap()

    def drain(self) -> None:
        """SIGTERM, as Kubernetes sends it; returns when the server has ended by itself, without an error."""
        self.process.terminate()
        assert self.process.wait(timeout=60) == 0, self.log
        self._reap()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Kills what is left of it."""
        if hasattr(self, "process"):
            self.kill()
        self._log.close()

    def _reap(self) -> None:
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def running(
    number: int | Sequence[PoolServer],
    *options: str,
    namespace: Namespace | None = None,
    variables: dict[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> Iterator[list[PoolServer]]:
    """So many servers with these options, or those given, ready; killed at the end."""
    servers = (
        [PoolServer(*options, namespace=namespace, variables=variables, prefix=prefix) for _ in range(number)]
        if isinstance(number, int)
        else list(number)
    )
    try:
        for server in servers:
            server.begin()
        for server in servers:
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers:
            server.end()


class Load:
    """Callers that send from construction to `stop`. The keywords are the fields of `Plan`; `module` is the program."""

    def __init__(
        self,
        servers: Sequence[PoolServer] | Sequence[str],
        *,
        module: str = "tests.chaos.load",
        namespace: Namespace | None = None,
        variables: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        **plan: Any,
    ) -> None:
        addresses = tuple(server if isinstance(server, str) else server.address for server in servers)
        self.plan = Plan(addresses, **plan)
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                *(namespace.prefix if namespace else ()),
                *ends_with_this_process(),
                *prefix,
                *(sys.executable, "-m", module, json.dumps(dataclasses.asdict(self.plan))),
            ],
            env=environment(**(variables or {})),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._changed = threading.Condition()
        self._answered = self._sent = 0
        self._report: Report | None = None
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def answered(self) -> int:
        """Sequences answered so far, as last heard."""
        return self._answered

    @property
    def sent(self) -> int:
        """Sequences sent so far, as last heard."""
        return self._sent

    def more(self, answers: int, within_s: float = 60.0) -> float:
        """Returns after so many further answers: how long that took, seconds."""
        started_s = time.monotonic()
        with self._changed:
            target = self._answered + answers
            there = self._changed.wait_for(lambda: self._answered >= target or self._ended, within_s)
        assert there and not self._ended, f"{self._answered} of {target} answers came in {within_s} s\n{self.log}"
        return time.monotonic() - started_s

    def go_on_for(self, seconds: float) -> None:
        """Lets it run; fails if the program ends."""
        with self._changed:
            assert not self._changed.wait_for(lambda: self._ended, seconds), self.log

    @property
    def log(self) -> str:
        """What the program wrote to standard error so far."""
        return Path(self._log.name).read_text(errors="replace")

    def stop(self) -> Report:
        """Sends no more, waits for what is in flight; how it went."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._reader.join(self.plan.deadline_s + 30.0)
        assert self._report is not None, f"no report\n{self.log}"
        self.process.wait(timeout=30)
        return self._report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self._log.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            with self._changed:
                if "report" in said:
                    self._report = Report(**said["report"])
                else:
                    self._answered, self._sent = said["answered"], said["sent"]
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def say(**measured: float | str) -> None:
    """Prints figures that a test measured, for whoever runs it with `-rP`."""
    texts = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in measured.items()
    ]
    print("MEASURED", "; ".join(texts))
