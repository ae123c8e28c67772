"""A small pool, a run and a real Prometheus that scrapes them: what rules and dashboards are tried on.

| who | what happens to him |
|---|---|
| teacher `sums`, pods `sums-0`, `sums-1` | serve three tenants over TLS; their file of rights changes |
| teacher `wrong`, pod `wrong-0` | its weights are not those it was told to expect: it cannot start |
| run `first`, of tenant `research` | trains towards `sums`, one batch ahead, with an archive |
| run `second` | finds no teacher: it fails, and stays to say so |
| tenant `product` | scores all the time; some of its requests are invalid, or name another model |
| tenant `capped` | asks for more than its quota |
| nobody's | calls with a wrong token |

`LiveStack.seen_s` is a moment at which all of this had been scraped for a while, and no scrape was missed. Tests ask
Prometheus about that moment, so it does not matter what other tests do to the programs afterwards.
"""

import contextlib
import datetime
import hashlib
import http.client
import json
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stillhouse.client import TeacherClient
from stillhouse.errors import StillhouseError
from stillhouse.security import Tls
from tests.certificates import Authority, replace
from tests.chaos.pool_under_test import ends_with_this_process, tool
from tests.servers import ROOT, environment

RULES = ROOT / "deploy/helm/stillhouse/files/rules"
TEACHERS, RUNS = "teachers", "research-runs"
"""The namespaces."""

PROVOKED = {
    "TeacherServerNotReady",  # wrong-0
    "TeacherStartFailed",  # wrong-0
    "TenantQuotaExceeded",  # capped
    "TenantInvalidRequests",  # product
    "TeacherAccessRefused",  # strangers
    "RunFailed",  # second
}
"""The alerts that are true because of all this."""

_EXAMPLE = ROOT / "examples/chain_sum"
_VOCABULARY, _LONGEST = 17, 64
_SCRAPE_EVERY_S = 1
_STEPS = 100_000  # it is ended by a signal
_SEEN_AFTER_STEPS = 12  # two checkpoints, and all that the guards compare with
_SEEN_AFTER_S = 20.0  # of everybody's work: as many scrapes of every series
_PROGRAMS = 5
_PATIENCE_S = 180.0

Sample = tuple[dict[str, str], float]


class Prometheus:
    """A real one, and its HTTP API."""

    def __init__(self, folder: Path, jobs: list[dict[str, Any]]) -> None:
        settings = {
            "global": {"scrape_interval": f"{_SCRAPE_EVERY_S}s", "evaluation_interval": f"{_SCRAPE_EVERY_S}s"},
            "rule_files": [str(RULES / "*.yaml")],
            "scrape_configs": jobs,
        }
        configuration = folder / "prometheus.yml"
        configuration.write_text(yaml.safe_dump(settings))
        self.url = f"http://{free_address()}"
        self._log = folder / "prometheus.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *ends_with_this_process(),
                    tool("prometheus"),
                    f"--config.file={configuration}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=log,
            )
        wait_until(self._is_ready, "Prometheus is not ready", self)

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return self._log.read_text(errors="replace")

    def get(self, path: str, **parameters: str | list[str]) -> Any:
        """`data` of an answer; a query that Prometheus refuses fails the test with its words."""
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {json.load(error)['error']}") from None

    def query(self, expression: str, at_s: float | None = None) -> list[Sample]:
        """What an expression is at a moment, now if none is given: labels and value of each series."""
        moment = {} if at_s is None else {"time": f"{at_s:.3f}"}
        data = self.get("query", query=expression, **moment)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(sample["metric"], float(sample["value"][1])) for sample in data["result"]]

    def query_range(self, expression: str, from_s: float, to_s: float, step_s: float) -> list[Any]:
        """The series of an expression over a time, as a panel shows them."""
        period = {"start": f"{from_s:.3f}", "end": f"{to_s:.3f}", "step": f"{step_s:g}"}
        return self.get("query_range", query=expression, **period)["result"]

    def wait_for(self, expression: str, within_s: float = _PATIENCE_S) -> list[Sample]:
        """What the expression is as soon as it is something."""
        found: list[Sample] = []

        def there() -> bool:
            found[:] = self.query(expression)
            return bool(found)

        wait_until(there, f"stays empty: {expression}", self, within_s=within_s)
        return found

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return answer.status == 200
        except (OSError, http.client.HTTPException):
            return False


@dataclass
class Program:
    """One of ours, and where its metrics are."""

    name: str
    process: subprocess.Popen[bytes]
    log_file: Path
    listen: str = ""
    metrics: str = ""

    @property
    def log(self) -> str:
        """What it wrote so far, to both outputs."""
        return self.log_file.read_text(errors="replace")

    def page(self) -> str:
        """What Prometheus is told."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=30) as page:
            return page.read().decode()


@dataclass
class LiveStack:
    """Everything that runs."""

    folder: Path
    authority: Authority
    prometheus: Prometheus = field(init=False)
    servers: list[Program] = field(default_factory=list)
    wrong: Program = field(init=False)
    run: Program = field(init=False)
    failed: Program = field(init=False)
    seen_s: float = 0.0

    def client(self, tenant: str, **options: Any) -> TeacherClient:
        """A client of the pool with the tenant's token."""
        addresses, tls = [server.listen for server in self.servers], Tls(ca=self.authority.certificate)
        return TeacherClient(addresses, tls=tls, token_file=self.token_file(tenant), **options)

    def token_file(self, tenant: str) -> Path:
        """Where the tenant's token is; made when it is first asked for."""
        path = self.folder / f"{tenant}.token"
        if not path.exists():
            path.write_text(secrets.token_hex(32))
        return path


@contextlib.contextmanager
def live_stack(folder: Path) -> Iterator[LiveStack]:
    """Starts everything, waits until it was seen at work, and ends it."""
    tool("prometheus")
    authority = Authority(folder / "pki")
    stack = LiveStack(folder, authority)
    with contextlib.ExitStack() as ends:
        certificate = authority.server()
        tenants = _write_tenants(stack)
        secure = ["--access", tenants, "--tls-certificate", certificate.certificate, "--tls-key", certificate.key]
        stack.servers = [_teacher(ends, folder, f"sums-{number}", *secure) for number in range(2)]
        refused = ["--expect-revision", "0" * 64, "--hold-failed-s", "3600"]
        stack.wrong = _teacher(ends, folder, "wrong-0", *secure, *refused)
        stack.run = _run(ends, stack, "first", *_work(stack))
        nobody = [f"teacher.addresses=[{free_address()}]", "teacher.start_deadline_s=1", "metrics_hold_s=3600"]
        stack.failed = _run(ends, stack, "second", *nobody)
        stack.prometheus = Prometheus(folder, _scrape_jobs(stack))
        ends.callback(stack.prometheus.close)
        for server in stack.servers:
            wait_until(lambda server=server: "teacher-server ready" in server.log, "not ready", server)
        stopping = threading.Event()
        for work in (_product, _capped, _strangers, _mistakes):
            thread = threading.Thread(target=work, args=(stack, stopping))
            thread.start()
            ends.callback(thread.join)
        ends.callback(stopping.set)
        started_s = time.monotonic()
        stack.prometheus.wait_for(f'stillhouse_student_step{{run="first"}} >= {_SEEN_AFTER_STEPS}')
        stack.prometheus.wait_for('stillhouse_student_failed{run="second"} == 1')
        stack.prometheus.wait_for('stillhouse_teacher_start_failed{teacher="wrong"} == 1')
        _change_rights(stack, tenants)
        time.sleep(max(0.0, started_s + _SEEN_AFTER_S - time.monotonic()))
        stack.seen_s = _whole_moment(stack.prometheus)
        assert stack.run.process.poll() is None, f"the run was over too soon\n{stack.run.log}"
        yield stack


def wait_until(true: Any, what: str, program: Any, within_s: float = _PATIENCE_S) -> None:
    """Returns once `true()`; fails with `what` and the program's log if it ended, or the time is over."""
    end_s = time.monotonic() + within_s
    while not true():
        alive = program.process.poll() is None
        assert alive and time.monotonic() < end_s, f"{what}\n{program.log[-4000:]}"
        time.sleep(0.1)


_given_out: set[int] = set()


def free_address() -> str:
    """An address that nobody listens on, another one each time."""
    while True:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]
        if port not in _given_out:
            _given_out.add(port)
            return f"127.0.0.1:{port}"


def _whole_moment(prometheus: Prometheus) -> float:
    """A moment at which nothing is missing.

    A page that takes longer than a second, on a machine that has other things to do, is a missed scrape, and every
    series of that program is gone until the next.
    """
    moment_s = 0.0

    def is_whole() -> bool:
        nonlocal moment_s
        evaluated = [group["lastEvaluation"] for group in prometheus.get("rules")["groups"]]
        evaluated_s = [datetime.datetime.fromisoformat(moment).timestamp() for moment in evaluated]
        moment_s = max(evaluated_s)
        time.sleep(_SCRAPE_EVERY_S)  # what was begun before has ended, well or not
        scraped = prometheus.query("min_over_time(up[5s]) == 1", moment_s)
        told = {labels["alertname"] for labels, _ in prometheus.query("ALERTS", moment_s)}
        up_to_date = moment_s - min(evaluated_s) < 3 * _SCRAPE_EVERY_S
        return len(scraped) == _PROGRAMS and up_to_date and told >= PROVOKED

    wait_until(is_whole, "there was no moment at which all was well scraped", prometheus)
    return moment_s


def _write_tenants(stack: LiveStack) -> Path:
    entries: dict[str, dict[str, Any]] = {
        "research": {"weight": 2},
        "product": {"weight": 1},
        "capped": {"weight": 1, "tokens_per_s": 5, "burst_tokens": _LONGEST},
    }
    for tenant, entry in entries.items():
        digest = hashlib.sha256(stack.token_file(tenant).read_bytes()).hexdigest()
        entry.update(models=["*"], tokens_sha256=[digest])
    path = stack.folder / "tenants.yaml"
    path.write_text(yaml.safe_dump({"tenants": entries}))
    return path


def _program(ends: contextlib.ExitStack, folder: Path, name: str, module: str, *words: object) -> Program:
    log = folder / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*ends_with_this_process(), sys.executable, "-m", module, *map(str, words)],
            env=environment(),
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )

    def end() -> None:
        process.kill()
        process.wait()

    ends.callback(end)
    return Program(name, process, log)


def _teacher(ends: contextlib.ExitStack, folder: Path, pod: str, *options: object) -> Program:
    listen, metrics = free_address(), free_address()
    program = _program(
        ends, folder, pod, "teacher_server.cli",
        *("--model", _EXAMPLE / "models/teacher", "--name", "sums", "--device", "cpu"),
        *("--listen", listen, "--metrics-port", metrics.rpartition(":")[2], *options),
    )  # fmt: skip
    program.listen, program.metrics = listen, metrics
    return program


def _run(ends: contextlib.ExitStack, stack: LiveStack, name: str, *keys: str) -> Program:
    metrics = free_address()
    program = _program(
        ends, stack.folder, name, "student_trainer.cli", "train", _EXAMPLE / "chain_sum.yaml",
        f"run_dir={stack.folder / 'runs' / name}", f"metrics_port={metrics.rpartition(':')[2]}",
        f"teacher.tls_ca={stack.authority.certificate}", f"teacher.token_file={stack.token_file('research')}", *keys,
    )  # fmt: skip
    program.metrics = metrics
    return program


def _work(stack: LiveStack) -> list[str]:
    """What the run does: a little of everything that shows in metrics, and hardly learning, so that it stays as it is
    at the start."""
    return [
        f"teacher.addresses={json.dumps([server.listen for server in stack.servers])}",
        f"teacher.archive={{url: '{(stack.folder / 'archive').as_uri()}'}}",
        *(f"steps={_STEPS}", "evaluation=null", "checkpoints.every_steps=5"),
        *("rollout.prompts_per_step=4", "rollout.answers_per_prompt=8", "rollout.batches_ahead=1"),
        *("teacher.start_deadline_s=180", "optimizer.updates_per_step=2", "optimizer.learning_rate=1e-6"),
    ]


def _scrape_jobs(stack: LiveStack) -> list[dict[str, Any]]:
    """What the chart's PodMonitors do by relabelling."""

    def target(program: Program, pod: str, **labels: str) -> dict[str, Any]:
        return {"targets": [program.metrics], "labels": {"pod": pod, **labels}}

    teachers = [target(server, server.name, namespace=TEACHERS, teacher="sums") for server in stack.servers]
    teachers.append(target(stack.wrong, stack.wrong.name, namespace=TEACHERS, teacher="wrong"))
    runs = [target(run, f"{run.name}-0", namespace=RUNS, run=run.name) for run in (stack.run, stack.failed)]
    return [
        {"job_name": "stillhouse-teacher", "static_configs": teachers},
        {"job_name": "stillhouse-run", "static_configs": runs},
    ]


def _product(stack: LiveStack, stopping: threading.Event) -> None:
    """A steady load, a little at a time."""
    rng = np.random.default_rng(0)
    with stack.client("product") as client:
        while not stopping.wait(0.2):
            calls = [client.submit_score(_tokens(rng), score_start=8, top_k=4, deadline_s=5.0) for _ in range(4)]
            for call in calls:
                with contextlib.suppress(StillhouseError):
                    call.result()


def _capped(stack: LiveStack, stopping: threading.Event) -> None:
    """Far more than the quota: a server lets one answer pass in 13 s, and says so to whoever would wait for 5 s."""
    rng = np.random.default_rng(1)
    with stack.client("capped") as client:
        while not stopping.wait(0.1):
            calls = [
                client.submit_score(_tokens(rng, _LONGEST), score_start=8, top_k=4, deadline_s=5.0) for _ in "1234"
            ]
            for call in calls:
                with contextlib.suppress(StillhouseError):
                    call.result()


def _strangers(stack: LiveStack, stopping: threading.Event) -> None:
    """Nobody's token."""
    with stack.client("stranger") as client:
        while not stopping.wait(0.2):
            with contextlib.suppress(StillhouseError):
                client.get_teacher(deadline_s=2.0)


def _mistakes(stack: LiveStack, stopping: threading.Event) -> None:
    """Requests that are wrong in themselves; many, so that they are a share of the tenant's at any speed."""
    with stack.client("product") as client, stack.client("product", model="another") as lost:
        wrong = ((client, [3, 4, _VOCABULARY + 1]), (client, [3] * (_LONGEST + 1)), (lost, [3, 4, 5]))
        while not stopping.wait(0.5):
            calls = [
                asked.submit_score(tokens, score_start=1, top_k=4, deadline_s=5.0)
                for asked, tokens in wrong
                for _ in range(4)
            ]
            for call in calls:
                with contextlib.suppress(StillhouseError):
                    call.result()


def _tokens(rng: np.random.Generator, length: int = 40) -> np.ndarray:
    return rng.integers(3, _VOCABULARY, length).astype(np.int32)


def _change_rights(stack: LiveStack, tenants: Path) -> None:
    """The file of rights is changed, broken and mended; each is noticed before the next."""
    right = tenants.read_bytes()
    versions = (("ok", right + b"# looked over\n"), ("failed", b"tenants: {"), ("ok", right))
    counted = 'stillhouse_teacher_reloads_total{{what="access",result="{}"}}'
    for result, text in versions:
        name = counted.format(result)
        before = sum(value for _, value in stack.prometheus.query(name))
        replace(tenants, text)
        wait_until(
            lambda name=name, before=before: sum(v for _, v in stack.prometheus.query(name)) >= before + 2,
            f"a change of {tenants} was not noticed by both servers ({name})",
            stack.prometheus,
        )
