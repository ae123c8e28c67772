"""The pods of the chart, run as they are rendered: they come up, serve, drain, fail and stop as the manifest promises.

Each test takes the pod template that Helm renders and runs its command, variables, volumes, probes and hooks as the
kubelet would (`tests.deploy.pod_process`).
"""

import contextlib
import http.client
import json
import signal
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stillhouse.client import TeacherClient, Tls
from stillhouse.errors import StillhouseError
from tests.certificates import Authority
from tests.chaos.pool_under_test import Load, Namespace
from tests.deploy.pod_network import PodNetwork
from tests.deploy.pod_process import PodProcess
from tests.deploy.pod_references import Sources
from tests.deploy.rendering import Object
from tests.deploy.small_pool import (
    CLIENT,
    MODELS,
    SERVICE,
    TEACHER,
    client_secret,
    container_of,
    pod_of,
    render,
    server_secret,
    small_run,
    sooner,
    tls_files,
    values,
)
from tests.deploy.teacher_load import EXPECTED, MODULE, write_expected
from tests.servers import serving


@dataclass
class Cluster:
    """What the pods of this module share: a network, and what the cluster would hold for them."""

    network: PodNetwork
    sources: Sources
    authority: Authority
    tls: Tls
    revision: str
    expected: Path

    def run(self, pod: Object, **options: Any) -> PodProcess:
        return PodProcess(pod, network=self.network, sources=self.sources, **options)

    def client(self, pod: PodProcess, **options: Any) -> TeacherClient:
        return TeacherClient([f"{pod.address}:50051"], **({"tls": self.tls} | options))


def config_maps(objects: list[Object]) -> dict[str, dict[str, bytes]]:
    found = (each for each in objects if each["kind"] == "ConfigMap")
    return {each["metadata"]["name"]: {k: v.encode() for k, v in each["data"].items()} for each in found}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("pods")
    objects = render(values())
    with PodNetwork() as network:
        authority = Authority(directory / "pki")
        client = authority.client(CLIENT)
        tls = Tls(authority.certificate, client.certificate, client.key, SERVICE)
        expected = directory / "expected.json"
        # The right answers are those of a server that was started by hand.
        with serving(MODELS / "teacher", "--name", TEACHER, "--max-batch-tokens", "1") as server:
            with TeacherClient([server.said["listen"]]) as teacher:
                write_expected(teacher, expected)
            revision = server.said["revision"]
        secrets = {"teacher-tls": server_secret(authority, "server")}
        sources = Sources(secrets, config_maps(objects), {"models": MODELS})
        yield Cluster(network, sources, authority, tls, revision, expected)


@pytest.fixture(scope="module")
def pods(cluster: Cluster) -> Iterator[list[PodProcess]]:
    """Two pods of the Deployment, exactly as rendered."""
    pod = pod_of(render(values(revision=cluster.revision, replicas=2)))
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(cluster.run(pod)) for _ in range(2)]


def test_pods_become_ready_as_their_probes_promise(pods: list[PodProcess]) -> None:
    page(pods[0]).until("stillhouse_teacher_ready 0.0")  # there to be scraped while it loads
    assert not pods[0].ready
    for pod in pods:
        pod.wait_for(lambda pod=pod: pod.ready, "readiness")
        page(pod).until("stillhouse_teacher_ready 1.0")
        assert pod.status["containerStatuses"][0]["restartCount"] == 0
        assert any(event.startswith("Unhealthy: startupProbe") for event in pod.events), "it was never asked too early"


def test_they_score_like_a_server_started_by_hand(cluster: Cluster, pods: list[PodProcess]) -> None:
    pods[0].wait_for(lambda: pods[0].ready, "readiness")
    again = cluster.expected.with_name("again.json")
    with cluster.client(pods[0]) as teacher:
        write_expected(teacher, again)
    assert again.read_text() == cluster.expected.read_text()
    page(pods[0]).until('tenant="team"')


def test_only_tenants_are_let_in(cluster: Cluster, pods: list[PodProcess]) -> None:
    pods[0].wait_for(lambda: pods[0].ready, "readiness")
    stranger = cluster.authority.client("spiffe://pool/stranger", name="stranger")
    tls = Tls(cluster.authority.certificate, stranger.certificate, stranger.key, SERVICE)
    with cluster.client(pods[0], tls=tls) as client, pytest.raises(StillhouseError, match="this server knows"):
        client.score([2, 5, 14], score_start=1, top_k=1, deadline_s=20)


def test_a_secret_that_is_renewed_is_served_without_a_restart(cluster: Cluster, pods: list[PodProcess]) -> None:
    pods[0].wait_for(lambda: pods[0].ready, "readiness")
    cluster.sources.secrets["teacher-tls"] = server_secret(cluster.authority, "renewed")

    def renewed() -> bool:
        with cluster.client(pods[0]) as client, contextlib.suppress(StillhouseError):
            client.wait_until_ready(deadline_s=20)  # servers look at their files when somebody connects
        return page(pods[0]).has('stillhouse_teacher_reloads_total{result="ok",what="tls"} 1.0')

    pods[0].wait_for(renewed, "the new certificate")
    assert pods[0].status["containerStatuses"][0]["restartCount"] == 0


def test_a_pod_that_is_deleted_under_load_costs_no_answer(cluster: Cluster, pods: list[PodProcess]) -> None:
    """As behind the headless service: the one that goes leaves the name when it is deleted, and is ended after that."""
    for pod in pods:
        pod.wait_for(lambda pod=pod: pod.ready, "readiness")
    staying, leaving = pods
    with Namespace() as callers:
        cluster.network.add(callers)
        callers.names({SERVICE: [pod.address for pod in pods]})
        load = Load(
            [f"dns:///{SERVICE}:50051"],
            module=MODULE,
            variables={EXPECTED: str(cluster.expected)},
            namespace=callers,
            tls=tls_files(cluster.tls),
        )
        with load:
            load.more(200)
            for pod in pods:
                page(pod).until('stillhouse_teacher_scored_tokens_total{model="small",tenant="team"}')
            callers.names({SERVICE: [staying.address]})
            leaving.delete()
            load.more(200)
            report = load.stop()
    report.check_exactly_once()
    assert ending(leaving)["exitCode"] == 0, leaving.log
    assert not [event for event in leaving.events if event.startswith("Killed")]  # it ended by itself


@pytest.mark.parametrize(
    ("reason", "changes", "spoil", "said"),
    [
        ("tls", {}, lambda sources: sources.secrets.pop("teacher-tls"), "--tls-certificate"),
        ("revision", {"revision": "0" * 64}, None, "--expect-revision"),
        ("model", {"model": {"claim": "models", "path": "absent"}}, None, "/models/absent"),
    ],
)
def test_what_is_missing_is_said_and_the_pod_is_never_ready(
    cluster: Cluster, reason: str, changes: dict[str, Any], spoil: Callable[[Sources], Any] | None, said: str
) -> None:
    sources = Sources(dict(cluster.sources.secrets), dict(cluster.sources.config_maps), dict(cluster.sources.claims))
    if spoil is not None:
        spoil(sources)
    pod = sooner(pod_of(render(values(**changes, holdFailedSeconds=3))))
    with PodProcess(pod, network=cluster.network, sources=sources, backoff_s=60) as running:
        page(running).until(f'stillhouse_teacher_start_failed{{reason="{reason}"}} 1.0')
        first_lines = running.log.splitlines()[:5]
        assert any(said in line for line in first_lines), first_lines
        container = running.containers[0]
        running.wait_for(lambda: container.last_state, "its end")
        assert not container.started
        ended = container.last_state["terminated"]
        assert ended["exitCode"] in (1, 2)
        assert said in ended["message"]  # what `kubectl describe` shows
        assert not running.ready


def test_a_program_that_hangs_is_started_anew(cluster: Cluster) -> None:
    pod = sooner(pod_of(render(values())))
    pod["spec"]["terminationGracePeriodSeconds"] = 2  # what hangs does not drain
    container_of(pod)["livenessProbe"]["timeoutSeconds"] = 1
    with cluster.run(pod) as running:
        running.wait_for(lambda: running.ready, "readiness")
        container = running.containers[0]
        starts = container.starts
        container.signal(signal.SIGSTOP)
        running.wait_for(lambda: container.starts > starts, "its end")
        assert container.last_state["terminated"]["exitCode"] == 128 + signal.SIGKILL
        running.wait_for(lambda: running.ready, "readiness after the restart")


def test_a_run_that_is_stopped_is_saved_and_its_next_pod_completes_it(
    cluster: Cluster, pods: list[PodProcess], tmp_path: Path
) -> None:
    teacher = pods[0]
    teacher.wait_for(lambda: teacher.ready, "readiness")
    metrics = tmp_path / "first/metrics.jsonl"

    def run(steps: int) -> PodProcess:
        objects = render(values() | {"runs": {"first": small_run(steps=steps)}})
        secrets = {"run-tls": client_secret(cluster.tls)}
        sources = Sources(secrets, config_maps(objects), {"models": MODELS, "runs": tmp_path})
        names = {SERVICE: [teacher.address]}
        return PodProcess(pod_of(objects, "Job"), network=cluster.network, sources=sources, names=names)

    with run(steps=100_000) as first:
        first.wait_for(lambda: steps_of(metrics) or first.ended.is_set(), "the first step")
        first.delete()
        assert ending(first)["exitCode"] == 75, first.log  # what the Job's podFailurePolicy ignores
        steps = len(steps_of(metrics)) + 3
    with run(steps) as second:
        second.wait_for(second.ended.is_set, "its end")
        assert second.phase == "Succeeded", second.log
    assert steps_of(metrics) == list(range(1, steps + 1))  # each once
    assert (tmp_path / "first/checkpoints/latest").exists()


def steps_of(metrics: Path) -> list[int]:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines]


def ending(pod: PodProcess) -> dict[str, Any]:
    (status,) = pod.status["containerStatuses"]
    return status["state"]["terminated"]


@dataclass
class Page:
    """The page that Prometheus reads."""

    pod: PodProcess

    def text(self) -> str:
        try:
            with urllib.request.urlopen(f"http://{self.pod.address}:9464/metrics", timeout=5) as page:
                return page.read().decode()
        except (OSError, http.client.HTTPException):
            return ""

    def has(self, text: str) -> bool:
        return text in self.text()

    def until(self, line: str) -> None:
        self.pod.wait_for(lambda: self.has(line), line)


def page(pod: PodProcess) -> Page:
    return Page(pod)
