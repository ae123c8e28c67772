"""What the chart renders, for the API of Kubernetes 1.20: the newest whose server can be built from Debian's packages.

Everything that is changed or left out is changed here. The chart itself needs 1.27.
"""

import copy
import json
from typing import Any

PROBES = "stillhouse.dev/probes"
"""Annotation of a pod with the probes that the old API does not know; `tests.cluster.node` runs them."""

_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def for_old_api(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same objects as 1.20 takes them."""
    return [_translated(copy.deepcopy(each)) for each in objects]


def restored(pod: dict[str, Any]) -> dict[str, Any]:
    """The pod as it was rendered, from one that the old API gave back."""
    pod = copy.deepcopy(pod)
    probes = json.loads(pod["metadata"].get("annotations", {}).get(PROBES, "{}"))
    for container in pod["spec"]["containers"]:
        container |= probes.get(container["name"], {})
    return pod


def _translated(each: dict[str, Any]) -> dict[str, Any]:
    match each["kind"]:
        case "PodDisruptionBudget":
            each["apiVersion"] = "policy/v1beta1"  # policy/v1 came with 1.21
            each["spec"].pop("unhealthyPodEvictionPolicy")  # 1.27
        case "Deployment":
            _without_grpc_probes(each["spec"]["template"])
        case "Job":
            each["spec"].pop("podFailurePolicy")  # 1.26: every failed pod counts against backoffLimit
            each["spec"].pop("podReplacementPolicy", None)  # 1.29
            _without_grpc_probes(each["spec"]["template"])
    return each


def _without_grpc_probes(template: dict[str, Any]) -> None:
    """gRPC probes came with 1.24; a probe without what to ask would be refused."""
    probes: dict[str, dict[str, Any]] = {}
    for container in template["spec"]["containers"]:
        of = {kind: container.pop(kind) for kind in _PROBES if "grpc" in container.get(kind, {})}
        if of:
            probes[container["name"]] = of
    template.setdefault("metadata", {}).setdefault("annotations", {})[PROBES] = json.dumps(probes)
