"""The chart on a real Kubernetes control plane: rolling updates, disruption, drained nodes, runs, and whose a token is.

Pods run for real (`tests.cluster.node`), callers are the real client and find teachers by name. What Kubernetes 1.20
cannot show: `tests.cluster.old_api`.
"""

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.client import TeacherClient, Tls
from stillhouse.errors import Unauthenticated, Unavailable
from tests.cluster.cluster_under_test import Cluster, Fewest, service, wait_for
from tests.cluster.control_plane import ApiError
from tests.deploy.rendering import of_kind
from tests.deploy.small_pool import TEACHER, client_secret, render, small_run, values

pytestmark = pytest.mark.timeout(900)

POOL, TOKENS = "distillation", "tokens"
DEPLOYED = f"deployment/pool-{TEACHER}"
REPLICAS = 2
STEPS = 12


@pytest.fixture(scope="module")
def runs_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pool(cluster: Cluster, runs_directory: Path) -> Cluster:
    """Two teachers, ready."""
    cluster.prepare(POOL, runs=runs_directory)
    cluster.install(POOL, values(replicas=REPLICAS))
    cluster.wait_for_rollout(POOL)
    return cluster


def names(pods: list[dict[str, Any]]) -> set[str]:
    return {pod["metadata"]["name"] for pod in pods}


def check_ended_by_itself(cluster: Cluster, name: str) -> None:
    ended = cluster.ended(name)
    assert ended.exit_code == 0, ended.log
    assert not [event for event in ended.events if event.startswith("Killed")]


def test_a_rolling_update_costs_no_answer_and_no_replica(pool: Cluster) -> None:
    before = names(pool.pods(POOL))
    with pool.load(POOL) as load, Fewest(pool, POOL) as fewest:
        load.more(200)
        pool.install(POOL, values(replicas=REPLICAS, env={"ROLLED": "1"}))
        pool.wait_for_rollout(POOL)
        for name in before:
            check_ended_by_itself(pool, name)
        load.more(200)
        report = load.stop()
    report.check_exactly_once()
    assert fewest.looks > 50
    assert fewest.addresses >= REPLICAS
    assert names(pool.pods(POOL)).isdisjoint(before)


def test_weights_of_a_wrong_revision_are_never_rolled_out(pool: Cluster) -> None:
    before = names(pool.pods(POOL))
    try:
        with pool.load(POOL) as load, Fewest(pool, POOL) as fewest:
            pool.install(POOL, values(replicas=REPLICAS, revision="0" * 64, holdFailedSeconds=5))
            wait_for(lambda: names(pool.pods(POOL)) - before, "a new pod")
            (new,) = [pod for pod in pool.pods(POOL) if pod["metadata"]["name"] not in before]
            process = pool.process(new)
            wait_for(lambda: 'start_failed{reason="revision"} 1.0' in page(process.address), "its metric")
            wait_for(lambda: process.containers[0].starts > 1, "its restart")
            assert "--expect-revision" in process.log
            status = pool.plane.try_kubectl("rollout", "status", "--timeout=5s", DEPLOYED, "--namespace", POOL)
            assert status.returncode != 0
            load.more(200)
            report = load.stop()
        report.check_exactly_once()
        assert fewest.addresses >= REPLICAS
    finally:
        pool.plane.kubectl("rollout", "undo", DEPLOYED, "--namespace", POOL)
        pool.wait_for_rollout(POOL)
    wait_for(lambda: names(pool.pods(POOL)) == before, "the new pod's end")


def page(address: str) -> str:
    """The metrics of a pod; "" while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://{address}:9464/metrics", timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def test_the_disruption_budget_lets_one_pod_go_at_a_time(pool: Cluster) -> None:
    first, second = pool.pods(POOL)
    with pool.load(POOL) as load, Fewest(pool, POOL) as fewest:
        load.more(100)
        pool.evict(first)
        with pytest.raises(ApiError, match="429") as refused:
            pool.evict(second)
        assert "disruption budget" in str(refused.value)
        wait_for(lambda: ready(pool) == REPLICAS, "the pod in its place")
        wait_for(lambda: allowed(pool) == 1, "the budget")
        pool.evict(second)
        wait_for(lambda: ready(pool) == REPLICAS, "the pod in its place")
        load.more(100)
        report = load.stop()
    report.check_exactly_once()
    assert fewest.addresses == REPLICAS - 1
    for pod in (first, second):
        check_ended_by_itself(pool, pod["metadata"]["name"])


def ready(cluster: Cluster) -> int:
    found = cluster.plane.api.get(f"/apis/apps/v1/namespaces/{POOL}/deployments/pool-{TEACHER}")
    return found["status"].get("readyReplicas", 0)


def allowed(cluster: Cluster) -> int:
    path = f"/apis/policy/v1beta1/namespaces/{POOL}/poddisruptionbudgets/pool-{TEACHER}"
    return cluster.plane.api.get(path)["status"]["disruptionsAllowed"]


def test_pods_of_a_drained_node_move_and_callers_see_nothing(pool: Cluster) -> None:
    assert {pod["spec"]["nodeName"] for pod in pool.pods(POOL)} == {"node-a", "node-b"}, "they were not spread"
    try:
        with pool.load(POOL) as load, Fewest(pool, POOL) as fewest:
            load.more(100)
            pool.plane.kubectl("drain", "node-a", "--delete-emptydir-data", timeout_s=240)
            wait_for(lambda: ready(pool) == REPLICAS, "the pod in its place")
            load.more(100)
            report = load.stop()
    finally:
        pool.plane.kubectl("uncordon", "node-a")
    report.check_exactly_once()
    assert {pod["spec"]["nodeName"] for pod in pool.pods(POOL)} == {"node-b"}
    assert fewest.addresses >= REPLICAS - 1


def test_a_run_whose_pod_is_evicted_goes_on_in_a_new_one(pool: Cluster, runs_directory: Path) -> None:
    metrics = runs_directory / "first/metrics.jsonl"
    pool.add_secret(POOL, "run-tls", client_secret(pool.tls))
    pool.install(POOL, values(replicas=REPLICAS) | {"runs": {"first": small_run(steps=STEPS)}})
    wait_for(lambda: steps_of(metrics), "the first step")
    (pod,) = pool.pods(POOL, "stillhouse.dev/run=first")
    pool.evict(pod)
    ended = pool.ended(pod["metadata"]["name"])
    assert ended.exit_code == 75, ended.log
    assert 0 < len(steps_of(metrics)) < STEPS
    pool.wait_for_job(POOL, "pool-first")
    assert steps_of(metrics) == list(range(1, STEPS + 1))  # each once
    (other,) = pool.pods(POOL, "stillhouse.dev/run=first")
    assert other["metadata"]["name"] != pod["metadata"]["name"]
    assert other["status"]["phase"] == "Succeeded"


def steps_of(metrics: Path) -> list[int]:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines]


# Whose a token is


@pytest.fixture(scope="module")
def by_token(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A teacher in a namespace of its own that asks the API server about tokens, and accounts of callers."""
    cluster.prepare(TOKENS, runs=tmp_path_factory.mktemp("runs"))
    for account in ("trainer", "leaver", "stranger"):
        metadata = {"name": account, "namespace": TOKENS}
        cluster.plane.apply([{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}])
    cluster.install(TOKENS, TOKEN_VALUES)
    cluster.wait_for_rollout(TOKENS)
    return cluster


TOKEN_VALUES: dict[str, Any] = {
    **values(),
    "tls": {"secret": "teacher-tls"},
    "access": {
        "tenants": {"team": {"models": [TEACHER], "service_accounts": [f"{TOKENS}/trainer", f"{TOKENS}/leaver"]}},
        "tokenReview": True,
    },
}


@contextlib.contextmanager
def caller(cluster: Cluster, token: str) -> Iterator[TeacherClient]:
    """A client that shows this token."""
    path = cluster.directory / "token"
    path.write_text(token)
    (pod,) = cluster.pods(TOKENS)
    tls = Tls(cluster.tls.ca, server_name=service(TOKENS))
    with TeacherClient([f"{pod['status']['podIP']}:50051"], tls=tls, token_file=path) as client:
        yield client


def score(cluster: Cluster, token: str) -> None:
    with caller(cluster, token) as client:
        client.score([2, 5, 14], score_start=1, top_k=1, deadline_s=15)


def test_a_token_of_an_account_that_the_tenants_name_is_accepted(by_token: Cluster) -> None:
    score(by_token, by_token.plane.api.token(TOKENS, "trainer", "stillhouse"))


def test_a_run_shows_the_token_that_the_kubelet_gave_it(by_token: Cluster) -> None:
    run = small_run(steps=2) | {"tlsSecret": "run-tls", "serviceAccountToken": True, "serviceAccountName": "trainer"}
    run["config"]["teacher"]["addresses"] = [f"dns:///{service(TOKENS)}:50051"]
    by_token.add_secret(TOKENS, "run-tls", client_secret(by_token.tls))
    by_token.install(TOKENS, TOKEN_VALUES | {"runs": {"second": run}})
    by_token.wait_for_job(TOKENS, "pool-second")
    (pod,) = by_token.pods(TOKENS)
    assert 'tenant="team"' in page(pod["status"]["podIP"])


@pytest.mark.parametrize(
    ("account", "audience"),
    [("trainer", "somebody-else"), ("trainer", ""), ("stranger", "stillhouse")],
    ids=["wrong audience", "the API server's own audience", "account of no tenant"],
)
def test_other_tokens_are_refused(by_token: Cluster, account: str, audience: str) -> None:
    with pytest.raises(Unauthenticated):
        score(by_token, by_token.plane.api.token(TOKENS, account, audience))


def test_the_default_token_of_a_pod_is_refused(by_token: Cluster) -> None:
    secrets = by_token.plane.api.get(f"/api/v1/namespaces/{TOKENS}/secrets")["items"]
    (found,) = [each for each in secrets if each["metadata"]["name"].startswith("trainer-token-")]
    token = by_token.plane.kubectl(
        *("get", "secret", found["metadata"]["name"], "--namespace", TOKENS),
        *("--output", "go-template={{.data.token | base64decode}}"),
    )
    with pytest.raises(Unauthenticated):
        score(by_token, token)


def test_a_token_of_a_deleted_account_is_refused(by_token: Cluster) -> None:
    token = by_token.plane.api.token(TOKENS, "leaver", "stillhouse")
    by_token.plane.kubectl("delete", "serviceaccount", "leaver", "--namespace", TOKENS)
    with pytest.raises(Unauthenticated):
        score(by_token, token)


def test_teachers_may_review_tokens_and_nothing_else(by_token: Cluster) -> None:
    own = rights(by_token, "pool-teacher") - rights(by_token, "trainer")  # an account without any of its own
    assert own == {"tokenreviews.authentication.k8s.io [] [] [create]"}


def rights(cluster: Cluster, account: str) -> set[str]:
    who = ("--as", f"system:serviceaccount:{TOKENS}:{account}", "--namespace", TOKENS)
    listed = cluster.plane.kubectl("auth", "can-i", "--list", "--no-headers", *who)
    return {" ".join(line.split()) for line in listed.splitlines()}


def test_nobody_is_let_in_while_the_teacher_may_not_ask(by_token: Cluster) -> None:
    binding = of_kind(render(TOKEN_VALUES, TOKENS), "ClusterRoleBinding")["metadata"]["name"]
    by_token.plane.kubectl("delete", "clusterrolebinding", binding)
    wait_for(lambda: not lets_a_stranger_in(by_token), "the end of the right to ask")
    assert not lets_a_stranger_in(by_token)
    (pod,) = by_token.pods(TOKENS)
    assert "does not answer token reviews: HTTP status 403" in by_token.process(pod).log
    by_token.install(TOKENS, TOKEN_VALUES)
    wait_for(lambda: lets_a_stranger_in(by_token), "the right to ask")


def lets_a_stranger_in(cluster: Cluster) -> bool:
    """With a good token that the teacher has not seen before."""
    try:
        score(cluster, cluster.plane.api.token(TOKENS, "trainer", "stillhouse"))
    except Unavailable:
        return False
    return True
