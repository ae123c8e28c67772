"""What a `teacher-server` shows while it starts, when it cannot, and when it is stopped before it is ready."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from safetensors import safe_open
from safetensors.torch import save_file

from stillhouse.client import TeacherClient
from tests.certificates import Authority
from tests.chaos.attacked import CHECK, Attacked, attacked, wait_for
from tests.models import save_model
from tests.servers import VLLM_SHAPE, arguments, environment, interpreter, vllm_arguments

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
STARTED = re.compile(r"alive and not ready: metrics=(http://\S+) health_port=(\d+)")
HELD = ("--hold-failed-s", "3600")


@dataclass(frozen=True)
class Starting:
    """A process that is not waited for."""

    process: subprocess.Popen[str]
    log_path: Path

    @property
    def log(self) -> str:
        """What it wrote to standard error so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, condition: Callable[[], Any], within_s: float = 120.0) -> Any:
        """The first value that is true; the process must live."""
        end_s = time.monotonic() + within_s
        while not (found := condition()):
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.log}"
            assert time.monotonic() < end_s, f"waited {within_s:g} s\n{self.log}"
            time.sleep(0.02)
        return found

    @property
    def page(self) -> str:
        """The metrics page."""
        url = self.wait_for(lambda: STARTED.search(self.log))[1]
        with urllib.request.urlopen(url, timeout=20) as page:
            return page.read().decode()

    def metric(self, name: str) -> float:
        """Value of one series, for example `ready`."""
        found = re.search(rf"^stillhouse_teacher_{re.escape(name)} (\S+)$", self.page, re.MULTILINE)
        assert found, name
        return float(found[1])

    def health(self, service: str) -> int:
        """What the health port says."""
        port = self.wait_for(lambda: STARTED.search(self.log))[2]
        return health(int(port), service)

    @property
    def failed(self) -> list[str]:
        """The reasons that the metrics page gives."""
        return re.findall(r'^stillhouse_teacher_start_failed\{reason="(\w+)"\} 1\.0$', self.page, re.MULTILINE)


def health(port: int, service: str) -> int:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = HealthCheckRequest(service=service).SerializeToString()
        return HealthCheckResponse.FromString(channel.unary_unary(CHECK)(request, timeout=20)).status


@contextlib.contextmanager
def starting(*given: str, engine: str = "torch", before: tuple[str, ...] = ()) -> Iterator[Starting]:
    """The program with these arguments, below the command `before`; killed at the end."""
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        process = subprocess.Popen(
            [*before, interpreter(engine), "-m", "teacher_server.cli", *given, "--health-listen", "127.0.0.1:0"],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=log,
            text=True,
        )
        try:
            yield Starting(process, Path(log.name))
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "oak", **VLLM_SHAPE)


@pytest.fixture
def slow_model(model: Path) -> Path:
    """Minutes pass before all of it is read: a terabyte of holes counts for the revision, and is not loaded."""
    with (model / "more.safetensors").open("wb") as file:
        file.truncate(2**40)
    return model


# While it loads


def test_metrics_and_health_are_there_before_the_model_and_say_that_it_is_not(slow_model: Path) -> None:
    with starting(*arguments(slow_model)) as server:
        assert server.metric("ready") == 0
        assert (server.health(""), server.health("liveness")) == (NOT_SERVING, SERVING)
        assert server.failed == []
        server.wait_for(lambda: "revision: reading bytes=1099" in server.log)
        assert "process_start_time_seconds " in server.page
        assert server.metric('memory_used_bytes{device="host"}') < server.metric('memory_limit_bytes{device="host"}')
        log = server.log
        assert log.index("alive and not ready") < log.index("revision: reading")
        assert server.metric("ready") == 0
        assert server.health("") == NOT_SERVING


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it_at_once_with_zero(slow_model: Path, number: signal.Signals) -> None:
    with starting(*arguments(slow_model)) as server:
        server.wait_for(lambda: "revision: reading bytes" in server.log)
        server.process.send_signal(number)
        assert server.process.wait(60) == 0
        assert server.log.splitlines()[-1].endswith(f"stopped before it was ready: signal={number.name}")


def test_a_signal_ends_it_also_as_process_1_of_a_container(slow_model: Path) -> None:
    unshare = ("unshare", "--fork", "--pid", "--kill-child")
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a namespace of process ids")
    with starting(*arguments(slow_model), before=unshare) as server:
        (first,) = server.wait_for(lambda: psutil.Process(server.process.pid).children())
        server.wait_for(lambda: "alive and not ready" in server.log)  # torch is being imported
        assert "\t1\n" in re.search(r"NSpid:.*\n", Path(f"/proc/{first.pid}/status").read_text())[0]
        first.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert "signal=SIGTERM" in server.log


def test_a_signal_while_vllm_loads_ends_its_processes_too(model: Path) -> None:
    with starting(*vllm_arguments(model), engine="vllm") as server:
        parent = psutil.Process(server.process.pid)
        server.wait_for(lambda: "EngineCore" in server.log)
        children = parent.children(recursive=True)
        assert children
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        end_s = time.monotonic() + 60
        while any(is_running(child) for child in children):
            assert time.monotonic() < end_s, children
            time.sleep(0.05)


def is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


# When it cannot start


def no_directory(model: Path) -> list[str]:
    return arguments(model / "gone")


def cut_weights(model: Path) -> list[str]:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return arguments(model)


def impossible_config(model: Path) -> list[str]:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 63, "num_attention_heads": 2}))
    return arguments(model)


def wrong_weights(model: Path) -> list[str]:
    with safe_open(model / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if "layers.1" not in name}  # noqa: SIM118
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return arguments(model)


def too_large(model: Path) -> list[str]:
    """A terabyte of weights, none of which is there to be read."""
    size = 2**40
    header = json.dumps({"huge": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return arguments(model)


def missing_tenants(model: Path) -> list[str]:
    return [*arguments(model), "--plaintext-tokens", "--access", str(model.parent / "secret" / "tenants.yaml")]


def broken_tenants(model: Path) -> list[str]:
    file = model.parent / "tenants.yaml"
    file.write_text("tenants:\n  oak: {models: [oak], colour: red}\n")
    return [*arguments(model), "--plaintext-tokens", "--access", str(file)]


def missing_key(model: Path) -> list[str]:
    certificate = Authority(model.parent / "pki").server().certificate
    return [
        *arguments(model),
        "--tls-certificate",
        str(certificate),
        "--tls-key",
        str(model.parent / "tls" / "tls.key"),
    ]


def foreign_key(model: Path) -> list[str]:
    authority = Authority(model.parent / "pki")
    pair, other = authority.server(), authority.server(name="other")
    return [*arguments(model), "--tls-certificate", str(pair.certificate), "--tls-key", str(other.key)]


def without_service_account(model: Path) -> list[str]:
    file = model.parent / "tenants.yaml"
    file.write_text("tenants:\n  oak: {models: [oak], service_accounts: [a/b]}\n")
    review = ("--token-review", "--token-review-credentials", str(model.parent / "serviceaccount"))
    return [*arguments(model), "--plaintext-tokens", "--access", str(file), *review]


FAILURES = [
    (lambda model: [*arguments(model), "--drain-s", "-1"], "options", 2, "--drain-s -1.0: give 0 .. 86400 seconds"),
    (lambda model: [*arguments(model), "--max-sequence-tokens", "999"], "options", 2, "the model's positions end at"),
    (no_directory, "model", 2, "gone: no such directory"),
    (cut_weights, "model", 1, "model.safetensors is missing or damaged"),
    (impossible_config, "model", 1, "not a multiple of the number of attention heads"),
    (wrong_weights, "model", 1, "the weights lack"),
    (missing_tenants, "access", 2, "secret may be missing, or have no key tenants.yaml"),
    (broken_tenants, "access", 2, "tenants.oak.colour: is no known key"),
    (without_service_account, "access", 2, "serviceaccount may be missing, or have no key token"),
    (missing_key, "tls", 2, "tls may be missing, or have no key tls.key"),
    (foreign_key, "tls", 2, "does not belong to the first certificate"),
    (lambda model: [*arguments(model), "--expect-revision", "ab" * 32], "revision", 2, f"{'ab' * 32}: the digest of"),
    (too_large, "memory", 1, "the weights as float32 need 1099645845504 bytes"),
]


@pytest.mark.parametrize(
    ("spoil", "reason", "code", "says"), FAILURES, ids=lambda part: getattr(part, "__name__", None)
)
def test_a_start_that_failed_says_why_at_once_and_stays_to_be_scraped(
    model: Path, spoil: Callable[[Path], list[str]], reason: str, code: int, says: str
) -> None:
    with starting(*spoil(model), *HELD) as server:
        server.wait_for(lambda: server.failed)
        assert server.failed == [reason]
        assert server.metric("ready") == 0
        assert (server.health(""), server.health("liveness")) == (NOT_SERVING, SERVING)
        errors = [line for line in server.log.splitlines() if " ERROR " in line]
        assert len(errors) == 1 and says in errors[0], server.log
        assert "Traceback" not in server.log and "usage" not in server.log
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == code
        last = server.log.splitlines()[-1]
        assert last.startswith("teacher-server: error: ")
        assert errors[0].endswith(last.removeprefix("teacher-server: error: "))


@pytest.mark.parametrize(
    ("options", "changes", "reason", "says"),
    [
        ((), {"architectures": ["OakForCausalLM"]}, "engine", "no model of architecture OakForCausalLM"),
        (("--kv-cache-bytes", str(2**15)), {}, "memory", "--kv-cache-bytes"),
    ],
)
def test_an_engine_of_vllm_that_does_not_come_up_is_held_too(
    model: Path, options: tuple[str, ...], changes: dict[str, Any], reason: str, says: str
) -> None:
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with starting(*vllm_arguments(model, *options), *HELD, engine="vllm") as server:
        server.wait_for(lambda: server.failed, 200)
        assert server.failed == [reason]
        children = psutil.Process(server.process.pid).children(recursive=True)
        commands = [" ".join(child.cmdline()) for child in children if is_running(child)]
        assert all("multiprocessing.resource_tracker" in command for command in commands), commands
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 1
        assert says in server.log.splitlines()[-1]


def test_vllm_on_a_cpu_refuses_weights_that_do_not_fit_before_it_starts(model: Path) -> None:
    too_large(model)
    with starting(*vllm_arguments(model), engine="vllm") as server:
        assert server.process.wait(120) == 1
        assert "the weights as float32 need 1099645845504 bytes" in server.log.splitlines()[-1]
        assert "EngineCore" not in server.log


def test_a_hold_that_is_over_ends_with_the_same_code_and_line(model: Path) -> None:
    with starting(*no_directory(model), "--hold-failed-s", "0.5") as server:
        assert server.process.wait(60) == 2
        assert "held: reason=model seconds=0.5 exit_code=2" in server.log
        assert server.log.splitlines()[-1].startswith("teacher-server: error: --model ")


STOPPED_WHEN_SEEN = """
import os, signal, sys
from teacher_server.cli import main
from teacher_server.metrics import Metrics
shown = Metrics.start_failed
def show(self, reason):
    shown(self, reason)
    os.kill(os.getpid(), signal.SIGTERM)
Metrics.start_failed = show
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_in_the_moment_the_page_shows_the_failure_ends_with_its_code_and_line(model: Path) -> None:
    command = [sys.executable, "-c", STOPPED_WHEN_SEEN, *no_directory(model), *HELD]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("teacher-server: error: --model ")


def test_a_page_that_cannot_be_opened_holds_nothing(model: Path) -> None:
    with starting(*arguments(model), "--metrics-port", "65536", *HELD) as server:
        assert server.process.wait(60) == 2
        assert server.log.splitlines()[-1] == "teacher-server: error: --metrics-port 65536: give 0 .. 65535"


def test_the_right_digest_is_served(model: Path) -> None:
    with starting(*no_directory(model)) as server:
        server.process.wait(60)
    with starting(*arguments(model), "--expect-revision", "00" * 32) as server:
        assert server.process.wait(60) == 2
        found = re.search(rf"the digest of the files in {model} is ([0-9a-f]{{64}})", server.log)
        assert found
    with starting(*arguments(model), "--expect-revision", found[1].upper()) as server:
        server.wait_for(lambda: server.metric("ready"))


# What does not fit a container


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A cgroup of this limit; processes enter it by its file cgroup.procs."""
    name = f"stillhouse-{os.getpid()}"
    for top, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(top) / name
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield group
        finally:
            end_s = time.monotonic() + 20
            while group.exists() and time.monotonic() < end_s:
                with contextlib.suppress(OSError):  # its last process is not quite gone
                    group.rmdir()
                time.sleep(0.05)
        return
    pytest.skip("needs the right to make a cgroup that limits memory")


def inside(group: Path) -> tuple[str, ...]:
    return ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")


def test_a_container_that_is_too_small_is_refused_instead_of_killed(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    model = save_model(tmp_path / "oak", **shape, dtype=torch.bfloat16)  # 0.4 GB in float32
    limit = 700 * 2**20  # where the kernel kills it if it goes on
    with memory_group(limit) as group, starting(*arguments(model), *HELD, before=inside(group)) as server:
        server.wait_for(lambda: server.failed)
        assert server.failed == ["memory"]
        assert server.metric('memory_limit_bytes{device="host"}') == limit
        assert server.metric('memory_used_bytes{device="host"}') > 100 * 2**20
        assert re.search(r"the weights as float32 need 5\d{8} bytes .* has [34]\d{8} bytes free", server.log)
    with memory_group(1500 * 2**20) as group, starting(*arguments(model), before=inside(group)) as server:
        server.wait_for(lambda: server.metric("ready"))


# While it serves


def test_ready_follows_the_health_port_through_stalls_and_a_drain(tmp_path: Path) -> None:
    options = ("--health-listen", "127.0.0.1:0", "--pause-share", "1")

    def shows(server: Attacked, ready: bool) -> bool:
        health_now = health(int(server.said["health_port"]), "")
        return (server.metric("ready"), health_now) == (ready, SERVING if ready else NOT_SERVING)

    with (
        attacked(tmp_path, *options, "--pause-ms", "6000", "--stall-s", "1") as server,
        TeacherClient([server.address]) as client,
    ):
        wait_for(lambda: shows(server, True), "ready", 60.0)
        stalled = False
        for _ in range(5):  # a machine that pauses may not see the whole stall
            call = client.submit_score([1, 2, 3], score_start=1, top_k=1)
            while not stalled and not call.done():
                stalled = shows(server, False)
            call.result()
            wait_for(lambda: shows(server, True), "ready again", 60.0)
            if stalled:
                break
        assert stalled
    # Here nothing counts as a stall: what is seen is the drain.
    with (
        attacked(tmp_path, *options, "--pause-ms", "10000", "--stall-s", "300") as server,
        TeacherClient([server.address]) as client,
    ):
        call = client.submit_score([1, 2, 3], score_start=1, top_k=1)
        wait_for(lambda: server.metric("requests_in_flight") == 1, "the call", 60.0)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: shows(server, False), "not ready", 60.0)
        assert "the engine stalls" not in server.log
        call.result()
        assert server.process.wait(60) == 0


@pytest.mark.parametrize("spoil", [None, no_directory, cut_weights, broken_tenants])
def test_every_line_on_standard_error_is_json_if_asked_for(
    model: Path, spoil: Callable[[Path], list[str]] | None
) -> None:
    with starting(*(spoil or arguments)(model), "--log-format", "json", "--log-level", "debug") as server:
        if spoil is None:
            server.wait_for(lambda: server.metric("ready"))
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == {None: 0, cut_weights: 1}.get(spoil, 2)
        lines = [json.loads(line) for line in server.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    if spoil is None:
        assert any(line["level"] == "WARNING" and "NO AUTHENTICATION" in line["message"] for line in lines)
    else:
        assert lines[-1]["level"] == "ERROR"
        assert lines[-1]["message"].startswith(("--model ", "cannot serve ", str(model.parent)))
