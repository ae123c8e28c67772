"""One container of a pod that `tests.deploy.pod_process` runs: its starts, probes, hooks and end."""

import contextlib
import datetime
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.chaos.pool_under_test import Namespace
from tests.deploy.pod_references import Missing, References
from tests.deploy.pod_root import entering, starting

SYNC_S = 0.5
"""Between two looks at what a pod refers to: a kubelet takes a minute."""
_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@dataclass(frozen=True)
class Surroundings:
    """What a container has of its pod."""

    pod: dict[str, Any]
    network: Namespace
    address: str
    references: References
    directory: Path
    deleting: threading.Event
    event: Callable[[str], None]
    backoff_s: float


class Container:
    """One container, over its restarts."""

    def __init__(self, spec: dict[str, Any], around: Surroundings, *, init: bool = False) -> None:
        self.spec, self._around, self._init = spec, around, init
        self.name: str = spec["name"]
        self.starts = 0
        self.ready = self.started = False
        self.state: dict[str, Any] = {}
        self.last_state: dict[str, Any] = {}
        self.exit_code: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._starting, self._stopping = threading.Lock(), threading.Lock()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of its program, as this machine counts. Raises IndexError or psutil's errors if there is none."""
        assert self._process is not None
        return psutil.Process(self._process.pid).children()[0].pid

    def status(self, waits: tuple[str, str]) -> dict[str, Any]:
        """As the API has it. waits: reason and message, while it did not start."""
        return {
            "name": self.name,
            "image": self.spec.get("image", ""),
            "imageID": "",
            "ready": self.ready,
            "started": self.started,
            "restartCount": max(0, self.starts - 1),
            "state": self.state or {"waiting": {"reason": waits[0], "message": waits[1]}},
            "lastState": self.last_state,
        }

    # Its starts

    def run(self) -> int | None:
        """Starts it, again and again as restartPolicy says; its last exit code, None if it never ran."""
        policy = self._around.pod["spec"].get("restartPolicy", "Always")
        backoff_s = self._around.backoff_s
        deleting = self._around.deleting
        while not deleting.is_set():
            try:
                variables = self._around.references.variables(self.spec)
            except Missing as error:
                self.state = {"waiting": {"reason": "CreateContainerConfigError", "message": str(error)}}
                self._around.event(f"Failed: {error}")
                deleting.wait(SYNC_S)
                continue
            self._run_once(variables)
            stays_over = policy == "Never" or (self.exit_code == 0 and (self._init or policy == "OnFailure"))
            if stays_over or deleting.is_set():
                break
            self.last_state = self.state
            self.state = {"waiting": {"reason": "CrashLoopBackOff", "message": f"back-off {backoff_s:g}s"}}
            deleting.wait(backoff_s)
            backoff_s = min(2 * backoff_s, 300.0)
        return self.exit_code

    def _run_once(self, variables: dict[str, str]) -> None:
        number, self.starts = self.starts, self.starts + 1
        stem, began = self._around.directory / f"{self.name}-{number}", now()
        log, message, work = stem.with_suffix(".log"), stem.with_suffix(".message"), stem.with_suffix(".root")
        work.mkdir()
        message.touch()
        message.chmod(0o666)
        around = self._around
        words = starting(
            *(around.network, around.pod, self.spec),
            **{"variables": variables, "volumes": around.references.volumes, "message": message, "work": work},
        )
        self._killed = False
        with self._starting, log.open("wb") as file:
            if around.deleting.is_set():
                return
            self._process = subprocess.Popen(words, env=variables, cwd="/", stdout=file, stderr=subprocess.STDOUT)
        while self.running and not self._inside():
            time.sleep(0.005)
        self.state = {"running": {"startedAt": began}}
        over = threading.Event()
        self.started = "startupProbe" not in self.spec
        self.ready = self.started and "readinessProbe" not in self.spec
        for kind in _PROBES:
            if kind in self.spec:
                threading.Thread(target=self._probe, args=(kind, over), daemon=True).start()
        code = self._process.wait()
        over.set()
        self.ready = self.started = False
        # Older versions of unshare end with 1 when what they started was killed.
        status = 137 if self._killed else 128 - code if code < 0 else code
        text = message.read_text(errors="replace")
        if not text and status and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            text = "\n".join(log.read_text(errors="replace")[-2048:].splitlines()[-80:])
        ending = {"exitCode": status, "reason": "Error" if status else "Completed"}
        self.state = {"terminated": {**ending, "message": text[-4096:], "startedAt": began, "finishedAt": now()}}
        self.exit_code = status

    def _inside(self) -> bool:
        """Whether its root is made, and it is the program by now."""
        with contextlib.suppress(IndexError, OSError, psutil.Error):
            return os.readlink(f"/proc/{self.pid}/root") != "/"
        return False

    # What happens inside

    def execute(self, *words: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[bytes]:
        """Runs a command inside, as `kubectl exec` does."""
        enter = entering(self.pid, self._around.pod, self.spec)
        variables = self._around.references.variables(self.spec)
        return subprocess.run([*enter, *words], env=variables, capture_output=True, timeout=timeout_s)

    def signal(self, number: int) -> None:
        """Sends it to the program, from outside."""
        with contextlib.suppress(IndexError, ProcessLookupError, psutil.Error):
            pid = self.pid
            self._killed |= number == signal.SIGKILL
            os.kill(pid, number)

    # Probes

    def _probe(self, kind: str, over: threading.Event) -> None:
        probe, good, bad = self.spec[kind], 0, 0
        over.wait(probe.get("initialDelaySeconds", 0))
        while not over.is_set():
            if not self.started and kind != "startupProbe":
                over.wait(0.05)
                continue
            cause = self._check(probe)
            if over.is_set():
                return
            good, bad = (0, bad + 1) if cause else (good + 1, 0)
            if cause:
                self._around.event(f"Unhealthy: {kind}: {cause}")
            enough_good = good >= probe.get("successThreshold", 1)
            if self._judge(kind, enough_good, bad >= probe.get("failureThreshold", 3)):
                return
            over.wait(probe.get("periodSeconds", 10))

    def _judge(self, kind: str, good: bool, bad: bool) -> bool:
        """What follows from a probe; whether it is over."""
        if kind == "readinessProbe":
            self.ready = good or (self.ready and not bad)
        elif kind == "startupProbe" and good:
            self.started = True
            self.ready = "readinessProbe" not in self.spec
            return True
        elif bad and not self._around.deleting.is_set():
            self._around.event(f"Killing: {self.name} failed {kind}, will be restarted")
            grace_s = self._around.pod["spec"].get("terminationGracePeriodSeconds", 30)
            self.stop(self.spec[kind].get("terminationGracePeriodSeconds", grace_s))
            return True
        return False

    def _check(self, probe: dict[str, Any]) -> str:
        """Why a probe fails; "" if it does not."""
        timeout_s, address = probe.get("timeoutSeconds", 1), self._around.address
        try:
            match probe:
                case {"grpc": {"port": int(port), **others}}:
                    return _check_health(f"{address}:{port}", others.get("service", ""), timeout_s)
                case {"exec": {"command": words}}:
                    status = self.execute(*words, timeout_s=timeout_s).returncode
                    return "" if status == 0 else f"exit status {status}"
                case {"httpGet": {"port": int(port), "path": path}}:
                    with urllib.request.urlopen(f"http://{address}:{port}{path}", timeout=timeout_s):
                        return ""
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        raise NotImplementedError(f"probe {probe}")

    # Its end

    def stop(self, grace_s: float) -> None:
        """preStop, SIGTERM, and SIGKILL when the grace is over; returns when it has ended."""
        with self._stopping:
            with self._starting:
                if not self.running:
                    return
            assert self._process is not None
            end_s = time.monotonic() + grace_s
            if grace_s:
                self._run_hook(grace_s)
                self.signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(max(2.0, end_s - time.monotonic()))
            if self.running and grace_s:
                self._around.event(f"Killed: {self.name} did not end within {grace_s:g} s")
            while self.running:  # it may not be the program yet
                self.signal(signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.1)

    def _run_hook(self, grace_s: float) -> None:
        match self.spec.get("lifecycle", {}).get("preStop"):
            case None:
                pass
            case {"sleep": {"seconds": seconds}}:
                time.sleep(min(seconds, grace_s))
            case {"exec": {"command": words}}:
                try:
                    done = self.execute(*words, timeout_s=grace_s)
                    if done.returncode:
                        self._around.event(f"FailedPreStopHook: status {done.returncode}: {done.stderr.decode()}")
                except (subprocess.TimeoutExpired, IndexError, psutil.Error) as error:
                    self._around.event(f"FailedPreStopHook: {error}")
            case hook:
                raise NotImplementedError(f"preStop {hook}")


def _check_health(address: str, service: str, timeout_s: float) -> str:
    """By grpc.health.v1, over a connection of its own, as a kubelet asks."""
    try:
        with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"service unhealthy (responded with {answer.status})"


def now() -> str:
    """As the API writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
