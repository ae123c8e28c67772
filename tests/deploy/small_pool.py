"""A pool that a laptop can run: values of the chart, and what its pods refer to."""

import copy
import hashlib
from typing import Any

import yaml

from stillhouse.client import Tls
from tests.certificates import Authority
from tests.deploy import rendering
from tests.deploy.rendering import NAMESPACE, RELEASE, Object
from tests.servers import ROOT

MODELS = ROOT / "examples/chain_sum/models"
"""What the claim `models` is bound to."""
TEACHER = "small"
SERVICE = f"{RELEASE}-{TEACHER}.{NAMESPACE}.svc"
"""Where its callers find it, in the namespace that `render` gives it."""
TOKEN = "0d1e2f" * 8
CLIENT = "spiffe://pool/team"

_TEACHER: dict[str, Any] = {
    "model": {"claim": "models", "path": "teacher"},
    "engine": "torch",
    "gpus": 0,
    "cpu": "1",
    "memory": "2Gi",
    "sharedMemory": "64Mi",
    "drainSeconds": 20,
    "options": {"max-batch-tokens": 1},  # each sequence alone: the same scores bit for bit
}
_CLOSED: dict[str, Any] = {
    "tls": {"secret": "teacher-tls", "clientCertificates": True},
    "access": {
        "tenants": {
            "team": {
                "models": [TEACHER],
                "tokens_sha256": [hashlib.sha256(TOKEN.encode()).hexdigest()],
                "certificates": [CLIENT],
            }
        }
    },
}


def values(**changes: Any) -> dict[str, Any]:
    """Of the chart: the demo's teacher on a CPU, with TLS and tenants. `changes` are the teacher's."""
    return {"teachers": {TEACHER: {**_TEACHER, **changes}}, **copy.deepcopy(_CLOSED)}


def small_run(**config: Any) -> dict[str, Any]:
    """Of the chart's `runs`: the demo's run, made small."""
    demo = yaml.safe_load((ROOT / "examples/chain_sum/chain_sum.yaml").read_text())
    kept = {key: demo[key] for key in ("prompts", "objective")}
    own = {
        "student": {"model": "/models/student", "device": "cpu"},
        "teacher": {**demo["teacher"], "addresses": [f"dns:///{SERVICE}:50051"]},
        "rollout": {**demo["rollout"], "prompts_per_step": 4, "answers_per_prompt": 4},
        "optimizer": {**demo["optimizer"], "updates_per_step": 1},
    }
    return {
        "config": {**kept, **own, **config},
        "runsClaim": "runs",
        "modelsClaim": "models",
        "tlsSecret": "run-tls",
        "gpusPerNode": 0,
        "cpu": "1",
        "memory": "2Gi",
        "sharedMemory": "64Mi",
        "saveSeconds": 30,
    }


def render(of: dict[str, Any], namespace: str = NAMESPACE) -> list[Object]:
    """What `helm install` would send."""
    return rendering.render_3(of, namespace=namespace)


def server_secret(authority: Authority, name: str, service: str = SERVICE) -> dict[str, bytes]:
    """The Secret of a new certificate for the teacher's service, which callers' certificates belong to as well."""
    pair = authority.server(service, name=name)
    files = {"tls.crt": pair.certificate, "tls.key": pair.key, "ca.crt": authority.certificate}
    return {key: path.read_bytes() for key, path in files.items()}


def tls_files(tls: Tls) -> dict[str, str]:
    """The files by which a caller shows who it is, as `tests.chaos.load` has them."""
    return {name: str(getattr(tls, name)) for name in ("ca", "certificate", "key")}


def client_secret(tls: Tls) -> dict[str, bytes]:
    """The same as a Secret, for runs."""
    files = {"ca.crt": tls.ca, "tls.crt": tls.certificate, "tls.key": tls.key}
    return {key: path.read_bytes() for key, path in files.items() if path is not None}


def pod_of(objects: list[Object], kind: str = "Deployment") -> Object:
    """The pod that the one object of this kind makes."""
    return copy.deepcopy(rendering.of_kind(objects, kind)["spec"]["template"])


def container_of(pod: Object) -> Object:
    """Its one container."""
    (container,) = pod["spec"]["containers"]
    return container


def sooner(pod: Object) -> Object:
    """The same pod, whose probes come each second: for tests that are not about when they come."""
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        container_of(pod)[kind]["periodSeconds"] = 1
    return pod
