"""Values that the chart is rendered with: what must hold for every rendering is tried with all of them."""

import copy
from typing import Any

import yaml

from tests.servers import ROOT

Values = dict[str, Any]

MINIMAL: Values = {"teachers": {"qwen": {"model": {"claim": "models", "path": "qwen3"}}}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = {"repository": "Qwen/Qwen3-32B", "commit": COMMIT}
TENANTS = {"research": {"models": ["*"], "certificates": ["research.example"]}}
RUN: Values = {"runs": {"first": {"runsClaim": "runs", "config": {"steps": 20}}}}


def teacher(**settings: Any) -> Values:
    """One teacher, `qwen`, from a volume unless told otherwise."""
    return {"teachers": {"qwen": {"model": {"claim": "models", "path": "qwen3"}} | settings}}


def run(**settings: Any) -> Values:
    """One run, `first`."""
    values = copy.deepcopy(RUN)
    values["runs"]["first"] |= settings
    return values


def example(name: str) -> Values:
    """The values of a file of `deploy/examples`."""
    return yaml.safe_load((ROOT / f"deploy/examples/{name}-values.yaml").read_text())


ALL: dict[str, Values] = {
    "minimal": MINIMAL,
    "pool": example("pool"),
    "runs": example("run"),
    "on CPUs": teacher(gpus=0),
    "transformers on a GPU": teacher(engine="torch"),
    "four GPUs": teacher(gpus=4, gpuResource="amd.com/gpu", rollout="replace", replicas=3),
    "nodes": teacher(gpus=8, nodes=2),
    "nodes, from the hub, scaled": teacher(
        model=HUB, gpus=8, nodes=2, autoscaling={"kind": "keda", "prometheus": "http://prometheus:9090"}
    ),
    "root of a volume": {"teachers": {"qwen": {"model": {"claim": "models"}}}},
    "from the hub": teacher(model=HUB),
    "from the hub, with a token": teacher(model=HUB, tokenSecret="hub"),
    "a cache that is there": teacher(model=HUB) | {"modelCache": {"claim": "weights"}},
    "a cache that is made": teacher(model=HUB) | {"modelCache": {"size": "1Ti", "accessMode": "ReadWriteOnce"}},
    "TLS alone": MINIMAL | {"tls": {"secret": "teacher-tls"}},
    "certificates": MINIMAL
    | {"tls": {"secret": "teacher-tls", "clientCertificates": True}, "access": {"tenants": TENANTS}},
    "tenants in a Secret": MINIMAL | {"tls": {"secret": "teacher-tls"}, "access": {"secret": "tenants"}},
    "a mesh encrypts": MINIMAL
    | {"access": {"secret": "tenants", "plaintextTokens": True, "tokenReview": True, "audience": "a: b #c"}},
    "hpa": teacher(autoscaling={"kind": "hpa", "minReplicas": 2}),
    "keda, from none": teacher(
        autoscaling={"kind": "keda", "minReplicas": 0, "prometheus": "https://prometheus.example/api"}
    ),
    "everything about nodes": teacher(
        priorityClassName="high",
        nodeSelector={"pool": "true"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
        env={"A": "yes", "B": 1, "C": True, "D": ""},
        loadSeconds=1,
        drainSeconds=1,
    ),
    "no network policy": MINIMAL | {"networkPolicy": {"enabled": False}},
    "nobody may come": MINIMAL | RUN | {"networkPolicy": {"clients": [], "monitoring": []}},
    "IPv6": MINIMAL | RUN | {"listenAddress": "[::]"},
    "the platform chooses users": MINIMAL | RUN | {"runAsUser": None},
    "priority class": MINIMAL | {"priorityClass": {"create": True, "value": -5}},
    "monitoring of a run": RUN | {"monitoring": {"podMonitors": True, "labels": {"release": "on"}}},
    "images": MINIMAL | RUN | {"images": {"teacher": "a/b@sha256:0", "trainer": "c:1", "pullSecrets": ["registry"]}},
    "names like numbers": {
        "teachers": {"70": {"model": {"claim": "1e3", "path": "0x10:"}, "tokenSecret": "12"}},
        "runs": {
            "on": {"runsClaim": "1", "modelsClaim": "2", "tokenSecret": "3", "tlsSecret": "4", "config": {"a": 1}}
        },
        "tls": {"secret": "5"},
    },
    "run, a GPU": RUN,
    "run, no GPU": run(gpusPerNode=0, cpu=2, memory="1.5Gi"),
    "run, eight GPUs": run(gpusPerNode=8),
    "run, four nodes": run(nodes=4, gpusPerNode=8, queue="research", priorityClassName="low", retries=0),
    "run, with a certificate": run(tlsSecret="run-tls"),
    "run, with a token": run(tokenSecret="run-token", tlsSecret="run-tls"),
    "run, with its account's token": run(serviceAccountToken=True, serviceAccountName="trainer"),
}
