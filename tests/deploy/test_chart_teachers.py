"""A teacher's objects: its command, probes and volumes, who may use it, how it grows."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Gauge

from teacher_server.metrics import Metrics
from teacher_server.options import build_parser
from tests.deploy.rendering import (
    CHART,
    NAMESPACE,
    container_of,
    environment_of,
    notes,
    of_kind,
    option,
    pod,
    pods_of,
    render,
    volume,
)
from tests.deploy.value_sets import ALL, COMMIT, HUB, MINIMAL, RUN, example, run, teacher

Object = dict[str, Any]

# The teacher's command


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (16384, "16384"),
        (1_000_000, "1000000"),
        (40_000_000_000, "40000000000"),
        (9_007_199_254_740_991, "9007199254740991"),
        (0, "0"),
        (0.9, "0.9"),
        ("awq", "awq"),
        ("", ""),
        ("a 'b' \"c\" $(d) {e}: #f", "a 'b' \"c\" $(d) {e}: #f"),
        ("1e3", "1e3"),
        (True, ""),
        (False, None),
        ({"max_num_seqs": 64, "a": {"b": [1.5, "c", None]}}, '{"a":{"b":[1.5,"c",null]},"max_num_seqs":64}'),
    ],
)
def test_an_option_arrives_as_it_was_written(value: Any, text: str | None) -> None:
    assert option(teacher(options={"any-option": value}), "any-option") == text


@pytest.mark.parametrize(
    ("value", "text"), [("yes", "yes"), (0, "0"), (1, "1"), (True, "true"), ("", ""), (2.5, "2.5")]
)
def test_a_variable_arrives_as_it_was_written(value: Any, text: str) -> None:
    values = teacher(env={"ANY": value, "HF_HUB_OFFLINE": value}) | run(env={"ANY": value, "HF_HUB_OFFLINE": value})
    for kind in ("Deployment", "Job"):
        environment = environment_of(container_of(of_kind(render(values), kind)))
        assert environment["ANY"] == environment["HF_HUB_OFFLINE"] == text


def test_the_server_neither_calls_the_hub_nor_reports_its_use() -> None:
    environment = environment_of(container_of(of_kind(render(MINIMAL), "Deployment")))
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].get("teachers")])
def test_the_server_knows_every_option_that_it_is_given(name: str) -> None:
    for each in render(ALL[name]):
        if each["kind"] in ("Deployment", "LeaderWorkerSet"):
            for spec in pods_of([each]):
                parse(build_parser(), [re.sub(r"\$\((\w+)\)", "0", text) for text in spec["containers"][0]["args"]])


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    known, rest = parser.parse_known_args(arguments)
    assert not [each for each in rest if each.startswith("-")], rest
    return known


def test_the_server_knows_every_option_that_the_chart_keeps_for_itself() -> None:
    checks = (CHART / "templates/check.yaml").read_text()
    kept = re.search(r"has \$option \(list ([^)]*)\)", checks)
    assert kept is not None
    known = {text for action in build_parser()._actions for text in action.option_strings}
    for name in kept[1].split():
        assert f"--{json.loads(name)}" in known


def test_options_that_the_chart_sets_cannot_be_set_twice() -> None:
    kept = re.search(r"has \$option \(list ([^)]*)\)", (CHART / "templates/check.yaml").read_text())
    assert kept is not None
    names = {json.loads(each) for each in kept[1].split()}
    for values in ALL.values():
        for each in render(values):
            if each["kind"] == "Deployment" and each["metadata"]["labels"].get("stillhouse.dev/teacher"):
                own = values["teachers"][each["metadata"]["labels"]["stillhouse.dev/teacher"]].get("options", {})
                given = {text[2:].partition("=")[0] for text in container_of(each)["args"]}
                assert given - set(own) - {"tensor-parallel-size"} <= names


def test_the_weights_that_are_expected_are_told_to_the_server() -> None:
    assert option(MINIMAL, "expect-revision") is None
    assert option(teacher(revision="a" * 64), "expect-revision") == "a" * 64


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ({"claim": "models", "path": "a/b"}, "/models/a/b"),
        ({"claim": "models", "path": "/a"}, "/models/a"),
        ({"claim": "models"}, "/models/"),
        (HUB, f"/models/Qwen/Qwen3-32B/{COMMIT}"),
    ],
)
def test_where_the_weights_are(model: Object, path: str) -> None:
    assert option(teacher(model=model), "model") == path


# Probes, stopping, placing


def test_probes_ask_the_plaintext_port() -> None:
    container = container_of(of_kind(render(ALL["certificates"]), "Deployment"))
    assert container["startupProbe"]["grpc"] == container["readinessProbe"]["grpc"] == {"port": 8080}
    assert container["livenessProbe"]["grpc"] == {"port": 8080, "service": "liveness"}
    assert option(ALL["certificates"], "health-listen") == "0.0.0.0:8080"
    assert {"name": "health", "containerPort": 8080} in container["ports"]


@pytest.mark.parametrize("seconds", [1, 9, 10, 11, 3600, 86400])
def test_a_server_has_as_long_to_load_as_it_was_given(seconds: int) -> None:
    probe = container_of(of_kind(render(teacher(loadSeconds=seconds)), "Deployment"))["startupProbe"]
    assert seconds <= probe["failureThreshold"] * probe["periodSeconds"] < seconds + 10


@pytest.mark.parametrize("seconds", [1, 120, 86400])
def test_a_pod_may_stay_until_the_drain_is_over(seconds: int) -> None:
    values = teacher(drainSeconds=seconds)
    assert option(values, "drain-s") == str(seconds)
    (_, before) = container_of(of_kind(render(values), "Deployment"))["lifecycle"]["preStop"]["exec"]["command"]
    assert pod(values)["terminationGracePeriodSeconds"] > int(before) + seconds


def test_a_rollout_waits_for_the_new_pod_or_makes_room_for_it() -> None:
    def strategy(values: Object) -> Object:
        return of_kind(render(values), "Deployment")["spec"]["strategy"]["rollingUpdate"]

    assert strategy(MINIMAL) == {"maxSurge": 1, "maxUnavailable": 0}
    assert strategy(teacher(rollout="replace")) == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_rollout_is_not_given_up_while_pods_may_load() -> None:
    spec = of_kind(render(teacher(loadSeconds=5000)), "Deployment")["spec"]
    assert spec["progressDeadlineSeconds"] > 5000


def test_one_pod_at_a_time_may_be_evicted_and_one_that_is_not_ready_always() -> None:
    spec = of_kind(render(MINIMAL), "PodDisruptionBudget")["spec"]
    assert (spec["maxUnavailable"], spec["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


def test_pods_are_spread_over_zones_and_nodes_where_that_is_possible() -> None:
    constraints = pod(MINIMAL)["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in constraints] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    for each in constraints:
        assert each["whenUnsatisfiable"] == "ScheduleAnyway"
        assert each["labelSelector"]["matchLabels"]["stillhouse.dev/teacher"] == "qwen"


def test_where_pods_go_is_passed_on() -> None:
    spec = pod(ALL["everything about nodes"])
    assert spec["nodeSelector"] == {"pool": "true"}
    assert spec["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert spec["priorityClassName"] == "high"


def test_a_priority_class_is_made_on_request_and_used_by_teachers_that_name_none() -> None:
    assert "priorityClassName" not in pod(MINIMAL)
    objects = render(ALL["priority class"])
    made = of_kind(objects, "PriorityClass")
    assert made["value"] == -5
    assert of_kind(objects, "Deployment")["spec"]["template"]["spec"]["priorityClassName"] == made["metadata"]["name"]
    assert pod(teacher(priorityClassName="own") | {"priorityClass": {"create": True}})["priorityClassName"] == "own"


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_shared_memory_is_a_volume_of_the_size_that_was_given(kind: str) -> None:
    values = teacher(sharedMemory="2Gi") | run(sharedMemory="3Gi")
    size = {"Deployment": "2Gi", "Job": "3Gi"}[kind]
    assert volume(values, "shm", kind)["emptyDir"] == {"medium": "Memory", "sizeLimit": size}


def test_the_platform_may_choose_users() -> None:
    for spec in pods_of(render(ALL["the platform chooses users"])):
        assert set(spec["securityContext"]) == {"runAsNonRoot", "seccompProfile"}
    for spec in pods_of(render(MINIMAL | RUN | {"runAsUser": 1_000_650_000})):
        context = spec["securityContext"]
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 1_000_650_000


def test_everything_listens_on_ipv6_when_told() -> None:
    values = ALL["IPv6"]
    assert option(values, "listen") == "[::]:50051"
    assert option(values, "health-listen") == "[::]:8080"
    assert 'metrics_host="::"' in container_of(of_kind(render(values), "Job"))["args"]


# Network


def test_clients_see_every_pod() -> None:
    service = of_kind(render(MINIMAL), "Service")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["ports"] == [
        {"name": "grpc", "port": 50051, "targetPort": "grpc", "appProtocol": "grpc"},
    ]
    assert not service["spec"].get("publishNotReadyAddresses")


def ingress(values: Object, name: str = "pool-qwen") -> dict[str, Any]:
    """Port -> who may come, None for everybody."""
    rules = of_kind(render(values), "NetworkPolicy", name)["spec"]["ingress"] or []
    return {port["port"]: rule.get("from") for rule in rules for port in rule.get("ports", [])}


def test_only_the_namespace_may_ask_and_anybody_scrape_unless_told_otherwise() -> None:
    assert ingress(MINIMAL) == {"grpc": [{"podSelector": {}}], "metrics": [{"namespaceSelector": {}}], "health": None}
    peers = [{"namespaceSelector": {"matchLabels": {"team": "a"}}}]
    changed = ingress(MINIMAL | {"networkPolicy": {"clients": peers, "monitoring": peers}})
    assert changed == {"grpc": peers, "metrics": peers, "health": None}


def test_an_empty_list_of_clients_lets_nobody_in() -> None:
    assert ingress(ALL["nobody may come"]) == {"health": None}
    assert ingress(ALL["nobody may come"], "pool-first") == {}


def egress(values: Object) -> set[int]:
    rules = of_kind(render(values), "NetworkPolicy", "pool-qwen")["spec"]["egress"]
    return {port["port"] for rule in rules for port in rule.get("ports", [])}


def test_teachers_may_call_names_and_what_they_need() -> None:
    assert egress(MINIMAL) == {53}
    assert egress(teacher(model=HUB)) == {53, 443}
    assert egress(ALL["a mesh encrypts"]) == {53, 443, 6443}


def test_network_policies_can_be_left_to_others() -> None:
    assert not [each for each in render(ALL["no network policy"]) if each["kind"] == "NetworkPolicy"]


# Who may use it


SECURITY = ("tls-certificate", "tls-key", "tls-client-ca", "access", "plaintext-tokens", "token-review")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("minimal", set()),
        ("TLS alone", {"tls-certificate", "tls-key"}),
        ("certificates", {"tls-certificate", "tls-key", "tls-client-ca", "access"}),
        ("tenants in a Secret", {"tls-certificate", "tls-key", "access"}),
        ("a mesh encrypts", {"access", "plaintext-tokens", "token-review"}),
    ],
)
def test_the_server_gets_the_options_of_its_security_and_the_files_that_they_name(name: str, given: set[str]) -> None:
    values = ALL[name]
    assert {each for each in SECURITY if option(values, each) is not None} == given
    mounts = [each["mountPath"] for each in container_of(of_kind(render(values), "Deployment"))["volumeMounts"]]
    for each in given - {"plaintext-tokens", "token-review"}:
        path = option(values, each)
        assert path is not None and str(Path(path).parent) in mounts


@pytest.mark.parametrize(
    ("name", "of", "kind"),
    [
        ("TLS alone", "tls", "Deployment"),
        ("tenants in a Secret", "access", "Deployment"),
        ("run, with a certificate", "tls", "Job"),
        ("run, with a token", "token", "Job"),
    ],
)
def test_a_secret_that_is_missing_is_said_by_the_program(name: str, of: str, kind: str) -> None:
    secret = volume(ALL[name], of, kind)["secret"]
    assert secret["optional"] is True
    assert secret["defaultMode"] == 0o440


def test_secrets_are_mounted_as_folders_so_that_they_are_renewed() -> None:
    for values in ALL.values():
        for spec in pods_of(render(values)):
            assert not [mount for each in spec["containers"] for mount in each["volumeMounts"] if "subPath" in mount]


def test_tenants_arrive_as_they_were_written() -> None:
    values = example("pool")
    text = of_kind(render(values), "ConfigMap", "pool-tenants")["data"]["tenants.yaml"]
    assert yaml.safe_load(text) == {"tenants": values["access"]["tenants"]}


def test_the_server_understands_the_tenants(tmp_path: Path) -> None:
    from teacher_server.access import load_access

    text = of_kind(render(example("pool")), "ConfigMap", "pool-tenants")["data"]["tenants.yaml"]
    (tmp_path / "tenants.yaml").write_text(text)
    load_access(tmp_path / "tenants.yaml")


def test_a_token_review_is_all_that_the_api_server_may_be_asked_for() -> None:
    objects = render(example("pool"))
    assert of_kind(objects, "ClusterRole")["rules"] == [
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
    ]
    binding = of_kind(objects, "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == of_kind(objects, "ClusterRole")["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "pool-teacher", "namespace": NAMESPACE}]
    assert not [each for each in objects if each["kind"] in ("Role", "RoleBinding")]


def test_without_token_reviews_pods_have_no_token_and_no_rights() -> None:
    objects = render(ALL["certificates"] | RUN)
    assert not [each for each in objects if "Role" in each["kind"]]
    assert [spec["automountServiceAccountToken"] for spec in pods_of(objects)] == [False, False]
    accounts = [each for each in objects if each["kind"] == "ServiceAccount"]
    assert [each["automountServiceAccountToken"] for each in accounts] == [False, False]
    assert pod(example("pool") | {"teachers": MINIMAL["teachers"]})["automountServiceAccountToken"] is True


def test_who_installs_is_told_that_nobody_is_kept_out() -> None:
    assert "NO AUTHENTICATION" in notes(MINIMAL)
    assert "dns:///pool-qwen.distillation.svc:50051" in notes(MINIMAL)
    assert "NO AUTHENTICATION" not in notes(ALL["certificates"])
    assert "NO AUTHENTICATION" not in notes(RUN)


# Scaling


def test_without_autoscaling_the_number_of_pods_is_said_and_zero_is_a_number() -> None:
    assert of_kind(render(teacher(replicas=0)), "Deployment")["spec"]["replicas"] == 0


@pytest.mark.parametrize("name", ["hpa", "keda, from none"])
def test_with_autoscaling_the_number_of_pods_is_left_to_it(name: str) -> None:
    objects = render(ALL[name])
    deployment = of_kind(objects, "Deployment")
    assert "replicas" not in deployment["spec"]
    scaler = next(each for each in objects if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"))
    assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "pool-qwen"}


def test_the_autoscaler_counts_tokens_that_wait() -> None:
    values = teacher(autoscaling={"kind": "hpa", "minReplicas": 2, "queuedTokensPerReplica": 5_000_000})
    spec = of_kind(render(values), "HorizontalPodAutoscaler")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 4)
    assert spec["metrics"] == [
        {
            "type": "Pods",
            "pods": {
                "metric": {"name": "stillhouse_teacher_pending_tokens"},
                "target": {"type": "AverageValue", "averageValue": "5000000"},
            },
        }
    ]


def test_keda_asks_prometheus_for_the_tokens_that_wait_for_this_teacher() -> None:
    settings = {"kind": "keda", "prometheus": "http://prometheus:9090", "queuedTokensPerReplica": 1_000_000}
    spec = of_kind(render(teacher(autoscaling=settings)), "ScaledObject")["spec"]
    (trigger,) = spec["triggers"]
    assert trigger["metadata"] == {
        "serverAddress": "http://prometheus:9090",
        "query": 'sum(stillhouse_teacher_pending_tokens{namespace="distillation",teacher="qwen"})',
        "threshold": "1000000",
    }
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")


def test_the_metric_that_scales_exists() -> None:
    gauges = [each for each in vars(Metrics()).values() if isinstance(each, Gauge)]
    assert "stillhouse_teacher_pending_tokens" in [each.describe()[0].name for each in gauges]


@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_pods_that_are_too_many_go_slowly_and_never_all_of_them_unless_told(kind: str) -> None:
    settings = {"kind": kind, "scaleDownSeconds": 900, "prometheus": "http://prometheus:9090"}
    objects = render(teacher(autoscaling=settings))
    if kind == "hpa":
        spec = of_kind(objects, "HorizontalPodAutoscaler")["spec"]
        behavior, least = spec["behavior"], spec["minReplicas"]
    else:
        spec = of_kind(objects, "ScaledObject")["spec"]
        behavior, least = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"], spec["minReplicaCount"]
    assert least == 1
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == 900
    assert behavior["scaleDown"]["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 300}]


def test_keda_keeps_the_pods_while_prometheus_is_away() -> None:
    settings = {"kind": "keda", "minReplicas": 2, "prometheus": "http://prometheus:9090"}
    spec = of_kind(render(teacher(replicas=3, autoscaling=settings)), "ScaledObject")["spec"]
    assert spec["fallback"]["replicas"] == 3


def test_a_teacher_on_several_nodes_is_a_group_of_which_the_leader_alone_is_asked() -> None:
    objects = render(ALL["nodes"])
    group = of_kind(objects, "LeaderWorkerSet")
    template = group["spec"]["leaderWorkerTemplate"]
    assert (template["size"], template["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")
    assert "leaderTemplate" not in template, "one template: LWS_WORKER_INDEX says which pod it is"
    (container,) = template["workerTemplate"]["spec"]["containers"]
    options = dict(each.removeprefix("--").partition("=")[::2] for each in container["args"])
    assert (options["tensor-parallel-size"], options["pipeline-parallel-size"]) == ("8", "2")
    assert options["nodes"] == "$(LWS_GROUP_SIZE)"
    assert options["node-rank"] == "$(LWS_WORKER_INDEX)"
    assert options["leader-address"] == "$(LWS_LEADER_ADDRESS)"
    service = of_kind(objects, "Service")
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    assert service["metadata"]["name"] != group["metadata"]["name"], "the controller makes a service of its own name"
    policy = of_kind(objects, "NetworkPolicy")["spec"]
    own = {"podSelector": policy["podSelector"]}
    assert {"from": [own]} in policy["ingress"] and {"to": [own]} in policy["egress"]


def test_a_group_is_scaled_as_a_whole() -> None:
    objects = render(ALL["nodes, from the hub, scaled"])
    group = of_kind(objects, "LeaderWorkerSet")
    assert "replicas" not in group["spec"]
    target = of_kind(objects, "ScaledObject")["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": group["apiVersion"],
        "kind": group["kind"],
        "name": group["metadata"]["name"],
    }
