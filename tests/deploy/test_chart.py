"""What the Helm chart promises for whatever it is given, seen in the objects that it renders."""

import copy
from typing import Any

import pytest
import yaml

from tests.deploy.rendering import (
    CHART,
    NAMESPACE,
    container_of,
    in_order,
    of_kind,
    option,
    pods_of,
    render,
    render_3,
)
from tests.deploy.value_sets import ALL, MINIMAL, RUN, example, teacher

Object = dict[str, Any]

VALUES: Object = yaml.safe_load((CHART / "values.yaml").read_text())
TEACHER = VALUES["teacherDefaults"]


# What is always so


@pytest.mark.parametrize("name", ALL)
def test_both_helms_render_the_same_objects(name: str) -> None:
    assert in_order(render(ALL[name])) == in_order(render_3(ALL[name]))


@pytest.mark.parametrize("name", ALL)
def test_every_object_is_of_the_namespace_and_has_the_labels_by_which_it_is_found(name: str) -> None:
    for each in render(ALL[name]):
        labels = each["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "stillhouse"
        assert labels["app.kubernetes.io/instance"] == "pool"
        whole_cluster = each["kind"] in ("ClusterRole", "ClusterRoleBinding", "PriorityClass")
        assert each["metadata"].get("namespace") == (None if whole_cluster else NAMESPACE)


@pytest.mark.parametrize("name", ALL)
def test_what_selects_pods_selects_them_and_outlives_an_upgrade(name: str) -> None:
    objects = render(ALL[name])
    workloads = [each for each in objects if each["kind"] in ("Deployment", "Job", "LeaderWorkerSet")]
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            selector = spec["selector"]
        elif each["kind"] in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
            selector = spec["selector"]["matchLabels"]
        elif each["kind"] == "NetworkPolicy":
            selector = spec["podSelector"]["matchLabels"]
        else:
            continue
        assert not {"app.kubernetes.io/version", "helm.sh/chart"} & set(selector), each["kind"]
        selected = [one for one in workloads if selector.items() <= labels_of_first_pod(one).items()]
        own = [one for one in selected if one["metadata"]["name"].removesuffix("-group") == each["metadata"]["name"]]
        assert selected if each["kind"] == "PodMonitor" else len(selected) == len(own) == 1, each["kind"]


def labels_of_first_pod(workload: Object) -> dict[str, str]:
    """Of the pod that is asked: in a group its leader, to which the controller gives an index."""
    spec = workload["spec"]
    if "leaderWorkerTemplate" not in spec:
        return spec["template"]["metadata"]["labels"]
    labels = spec["leaderWorkerTemplate"]["workerTemplate"]["metadata"]["labels"]
    return labels | {"leaderworkerset.sigs.k8s.io/worker-index": "0"}


@pytest.mark.parametrize("name", ALL)
def test_pods_run_without_rights(name: str) -> None:
    pods = pods_of(render(ALL[name]))
    assert pods
    for spec in pods:
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec)
        for container in spec.get("initContainers", []) + spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("name", ALL)
def test_containers_write_where_a_volume_is_and_every_volume_is_used(name: str) -> None:
    for spec in pods_of(render(ALL[name])):
        containers = spec.get("initContainers", []) + spec["containers"]
        mounted = {mount["name"] for each in containers for mount in each["volumeMounts"]}
        assert mounted == {each["name"] for each in spec["volumes"]}
        for each in containers:
            assert "/tmp" in {mount["mountPath"] for mount in each["volumeMounts"] if not mount.get("readOnly")}


@pytest.mark.parametrize("name", ALL)
def test_every_container_says_what_memory_it_takes_and_gets_no_cpu_limit(name: str) -> None:
    for spec in pods_of(render(ALL[name])):
        for each in spec.get("initContainers", []) + spec["containers"]:
            resources = each["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"]
            assert "cpu" in resources["requests"] and "cpu" not in resources["limits"]


@pytest.mark.parametrize("name", ALL)
def test_no_secret_stands_in_what_is_rendered(name: str) -> None:
    assert not [each for each in render(ALL[name]) if each["kind"] == "Secret"]


def test_two_releases_in_a_namespace_share_no_object() -> None:
    values = example("pool") | RUN
    names = [{(each["kind"], each["metadata"]["name"]) for each in render(values, release)} for release in ("a", "b")]
    assert not names[0] & names[1]


def test_one_release_in_two_namespaces_shares_no_object() -> None:
    values = example("pool") | RUN
    seen = []
    for namespace in ("one", "two"):
        objects = render(values, namespace=namespace)
        seen.append({(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in objects})
    assert not seen[0] & seen[1]


def test_the_names_of_the_whole_cluster_cannot_meet() -> None:
    def names(release: str, namespace: str) -> set[str]:
        objects = render(example("pool"), release, namespace)
        return {each["metadata"]["name"] for each in objects if "namespace" not in each["metadata"]}

    assert not names("a-b", "c") & names("b", "c-a")
    assert not names("a-b", "c") & names("b", "c-a")
    assert not names("b-c", "a") & names("c", "a-b")


# The smallest, and what is the default


def test_the_model_alone_is_enough() -> None:
    objects = render(MINIMAL)
    assert {each["kind"] for each in objects} == {
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "ServiceAccount",
    }
    deployment = of_kind(objects, "Deployment", "pool-qwen")
    assert deployment["spec"]["replicas"] == 1
    container = container_of(deployment)
    assert container["image"] == "stillhouse/teacher:0.1.0"
    assert container["command"] == ["teacher-server"]
    assert container["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": 1}


def test_a_default_may_be_said() -> None:
    everything = teacher(**copy.deepcopy(TEACHER)) | {
        key: value for key, value in VALUES.items() if key not in ("teachers", "runs")
    }
    assert in_order(render(everything)) == in_order(render(MINIMAL))


def test_defaults_of_teachers_are_changed_in_one_place() -> None:
    defaults = {"gpus": 2, "autoscaling": {"kind": "hpa"}, "options": {"max-top-k": 64}, "holdFailedSeconds": 0}
    together = MINIMAL | {"teacherDefaults": defaults}
    assert in_order(render(together)) == in_order(render(teacher(**defaults)))


def test_one_teacher_overrides_the_defaults_of_all() -> None:
    values = teacher(options={"max-top-k": 8}, gpus=0) | {"teacherDefaults": {"options": {"max-top-k": 64}, "gpus": 2}}
    assert option(values, "max-top-k") == "8"
    assert option(values, "engine") == "torch"


@pytest.mark.parametrize(
    ("settings", "engine", "image", "parallel"),
    [
        ({}, "vllm", "stillhouse/teacher:0.1.0", "1"),
        ({"gpus": 4}, "vllm", "stillhouse/teacher:0.1.0", "4"),
        ({"gpus": 0}, "torch", "stillhouse/teacher-cpu:0.1.0", None),
        ({"engine": "torch"}, "torch", "stillhouse/teacher:0.1.0", None),
        ({"gpus": 4, "options": {"tensor-parallel-size": 2}}, "vllm", "stillhouse/teacher:0.1.0", "2"),
    ],
)
def test_the_engine_follows_from_the_gpus(settings: Object, engine: str, image: str, parallel: str | None) -> None:
    values = teacher(**settings)
    assert option(values, "engine") == engine
    assert option(values, "tensor-parallel-size") == parallel
    container = container_of(of_kind(render(values), "Deployment"))
    assert container["image"] == image
    assert container["resources"]["limits"].get("nvidia.com/gpu") == (settings.get("gpus", 1) or None)


def test_images_are_named_as_a_whole_or_by_registry_and_tag() -> None:
    images = {"registry": "registry.example/x", "tag": "9", "trainer": "other/trainer@sha256:12", "pullSecrets": ["a"]}
    objects = render(MINIMAL | RUN | {"images": images})
    assert container_of(of_kind(objects, "Deployment"))["image"] == "registry.example/x/teacher:9"
    assert container_of(of_kind(objects, "Job"))["image"] == "other/trainer@sha256:12"
    assert [spec["imagePullSecrets"] for spec in pods_of(objects)] == [[{"name": "a"}]] * 2
