"""Wrong values: both Helms refuse them before anything is installed, name the value, and say what to write."""

import json
from typing import Any

import pytest

from tests.deploy.rendering import CHART, Refused, Values, render, render_3
from tests.deploy.value_sets import HUB, MINIMAL, RUN, TENANTS, run, teacher

A_COMMIT = "the 40 hexadecimal digits"
TLS = {"tls": {"secret": "teacher-tls"}}


def tenant(**settings: Any) -> Values:
    """One tenant, who has a credential unless told otherwise."""
    return MINIMAL | TLS | {"access": {"tenants": {"research": TENANTS["research"] | settings}}}


def scaled(**settings: Any) -> Values:
    return teacher(autoscaling=settings)


NOTHING = "give at least one, for example --set teachers.NAME.model.claim=CLAIM"
QUANTITY = "is not a quantity; give"
NAME = "is not a name; give"

# What, values, and pieces of the message: the value's name first.
WRONG: list[tuple[str, Values, tuple[str, ...]]] = [
    ("nothing at all", {}, ("teachers: {} and runs: {}", NOTHING)),
    # keys that do not exist, at every level
    ("section", MINIMAL | {"teacher": {}}, ("teacher", "teachers")),
    ("key of images", MINIMAL | {"images": {"repository": "x"}}, ("images", "repository", "registry")),
    ("key of a teacher", teacher(gpu=2), ("teachers", "qwen", "'gpu' | gpu ", "gpus")),
    ("key of the defaults", MINIMAL | {"teacherDefaults": {"replica": 2}}, ("teacherDefaults", "replicas")),
    ("key of a model", teacher(model=HUB | {"revision": "main"}), ("teachers", "model", "revision", "commit")),
    ("key of autoscaling", scaled(kind="hpa", min=1), ("autoscaling", "min", "minReplicas")),
    ("key of the cache", MINIMAL | {"modelCache": {"pvc": "a"}}, ("modelCache", "pvc", "claim")),
    ("key of tls", MINIMAL | {"tls": {"secretName": "a"}}, ("tls", "secretName", "clientCertificates")),
    ("key of access", MINIMAL | {"access": {"tenant": {}}}, ("access", "tenant", "tenants")),
    ("key of a tenant", tenant(token_sha256=["a"]), ("research", "token_sha256", "tokens_sha256")),
    ("key of the network", MINIMAL | {"networkPolicy": {"enable": True}}, ("networkPolicy", "enable", "enabled")),
    ("key of a run", run(gpus=8), ("runs", "first", "gpus", "gpusPerNode")),
    ("key of monitoring", MINIMAL | {"monitoring": {"alerts": True}}, ("monitoring", "alerts", "rules")),
    ("key of the class", MINIMAL | {"priorityClass": {"name": "a"}}, ("priorityClass", "name", "create")),
    # other types, other ranges
    ("text for a number", teacher(gpus="4"), ("gpus", "string", "integer")),
    ("half a replica", teacher(replicas=1.5), ("replicas", "integer")),
    ("fewer than no GPUs", teacher(gpus=-1), ("gpus", "0")),
    ("text for a switch", MINIMAL | {"tls": {"clientCertificates": "yes"}}, ("clientCertificates", "boolean")),
    ("a list of teachers", {"teachers": [{"name": "a"}]}, ("teachers", "array", "object")),
    ("null for a number", teacher(replicas=None), ("replicas", "null", "integer")),
    ("a list as an option", teacher(options={"max-top-k": [1]}), ("max-top-k", "array", "string")),
    ("a number as a name", teacher(model={"claim": 5}), ("claim", "string")),
    ("a teacher on no node", teacher(nodes=0), ("nodes", "1")),
    ("a drain of no time", teacher(drainSeconds=0), ("drainSeconds", "1")),
    ("a drain of two days", teacher(drainSeconds=172800), ("drainSeconds", "86400 | 86,400 | 86_400")),
    ("a window that is too long", scaled(kind="hpa", scaleDownSeconds=7200), ("scaleDownSeconds", "3600 | 3,600")),
    ("root", MINIMAL | {"runAsUser": 0}, ("runAsUser", "1")),
    ("an address", MINIMAL | {"listenAddress": "127.0.0.1"}, ("listenAddress", "0.0.0.0", "[::]")),
    ("another engine", teacher(engine="sglang"), ("engine", "vllm", "torch")),
    ("another scaler", scaled(kind="vpa"), ("kind", "none", "hpa", "keda")),
    ("another rollout", teacher(rollout="recreate"), ("rollout", "surge", "replace")),
    ("a pull policy", MINIMAL | {"images": {"pullPolicy": "always"}}, ("pullPolicy", "IfNotPresent")),
    ("a mode of access", MINIMAL | {"modelCache": {"accessMode": "RWX"}}, ("accessMode", "ReadWriteMany")),
    # how they are written
    ("gigabytes", teacher(memory="32GB"), ('teachers.qwen.memory: "32GB"', QUANTITY)),
    ("words", teacher(cpu="four"), ('teachers.qwen.cpu: "four"', QUANTITY)),
    ("no memory at all", teacher(memory=""), ("teachers.qwen.memory: is empty", "give a quantity")),
    ("a run's memory", run(memory="64 Gi"), ('runs.first.memory: "64 Gi"', QUANTITY)),
    ("the cache's size", MINIMAL | {"modelCache": {"size": "1 TB"}}, ('modelCache.size: "1 TB"', "give for example")),
    ("a GPU's name", teacher(gpuResource="h100"), ('teachers.qwen.gpuResource: "h100"', "nvidia.com/gpu")),
    ("a teacher's name", {"teachers": {"Qwen_3": MINIMAL["teachers"]["qwen"]}}, ('teachers: "Qwen_3"', NAME)),
    ("a run's name", {"runs": {"a.b": RUN["runs"]["first"]}}, ('runs: "a.b"', NAME)),
    ("a long name", {"teachers": {"x" * 60: MINIMAL["teachers"]["qwen"]}}, ("x" * 60, "too long; give at most 48")),
    ("a claim's name", teacher(model={"claim": "My Models"}), ('teachers.qwen.model.claim: "My Models"', NAME)),
    ("a Secret's name", MINIMAL | {"tls": {"secret": "TLS"}}, ('tls.secret: "TLS"', NAME)),
    ("a pull Secret's name", MINIMAL | {"images": {"pullSecrets": ["A"]}}, ('images.pullSecrets: "A"', NAME)),
    ("a queue's name", run(queue="Research"), ('runs.first.queue: "Research"', NAME)),
    ("a variable's name", teacher(env={"MY-VAR": "1"}), ('teachers.qwen.env: "MY-VAR"', "letters, digits and _")),
    ("a URL", scaled(kind="keda", prometheus="prometheus:9090"), ('prometheus: "prometheus:9090"', "http://HOST:PORT")),
    ("an interval", MINIMAL | {"monitoring": {"interval": "15"}}, ('monitoring.interval: "15"', "15s")),
    (
        "runbooks",
        MINIMAL | {"monitoring": {"runbookBase": "https://a"}},
        ('monitoring.runbookBase: "https://a"', "add"),
    ),
    # models
    (
        "no model",
        {"teachers": {"qwen": {}}},
        ("qwen.model: is missing", "give repository and commit, or claim"),
    ),
    ("both models", teacher(model=HUB | {"claim": "a"}), ("teachers.qwen.model", "give one of them")),
    ("no commit", teacher(model={"repository": "a/b"}), ('teachers.qwen.model.commit: ""', A_COMMIT)),
    ("a branch", teacher(model={"repository": "a/b", "commit": "main"}), ('model.commit: "main"', A_COMMIT)),
    ("half a commit", teacher(model=HUB | {"commit": "0123456"}), ('model.commit: "0123456"', A_COMMIT)),
    ("a path of the hub", teacher(model=HUB | {"path": "x"}), ('teachers.qwen.model.path: "x"', "leave one out")),
    ("a commit of a volume", teacher(model={"claim": "a", "commit": "x"}), ('model.commit: "x"', "give revision")),
    ("a URL of the hub", teacher(model=HUB | {"repository": "https://hf.co/a"}), ("model.repository", "OWNER/NAME")),
    ("an option as repository", teacher(model=HUB | {"repository": "--x"}), ('repository: "--x"', "OWNER/NAME")),
    ("out of the volume", teacher(model={"claim": "a", "path": "../b"}), ('model.path: "../b"', "volume's root")),
    ("a short digest", teacher(revision="abc"), ('teachers.qwen.revision: "abc"', "64 hexadecimal digits")),
    (
        "a model for all",
        MINIMAL | {"teacherDefaults": {"model": HUB}},
        ("teacherDefaults.model", "teachers.NAME.model"),
    ),
    # what does not go together
    ("engine", teacher(engine="torch", gpus=4), ("teachers.qwen.gpus: 4", "give engine: vllm, or gpus: 1")),
    ("vLLM on CPUs", teacher(engine="vllm", gpus=0), ("teachers.qwen.engine", "give gpus, or engine: torch")),
    ("torch on nodes", teacher(engine="torch", nodes=2), ("teachers.qwen.nodes: 2", "give engine: vllm")),
    (
        "the chart's option",
        teacher(options={"listen": "a"}),
        ("qwen.options.listen", "use the value that is for it"),
    ),
    ("an option's name", teacher(options={"--max-top-k": 1}), ('options: "--max-top-k"', "without the --")),
    ("most below least", scaled(kind="hpa", minReplicas=9), ("autoscaling.maxReplicas: 4", "give at least as many")),
    ("hpa from none", scaled(kind="hpa", minReplicas=0), ("autoscaling.minReplicas: 0", "give 1 or more")),
    ("keda without Prometheus", scaled(kind="keda"), ("autoscaling.prometheus: is missing", "give the URL")),
    ("one name twice", MINIMAL | {"runs": {"qwen": RUN["runs"]["first"]}}, ("runs.qwen", "give another")),
    ("a name of the pool", {"runs": {"tenants": RUN["runs"]["first"]}}, ("runs.tenants", "give another")),
    # who may use it
    (
        "certificates of nobody",
        MINIMAL | {"tls": {"clientCertificates": True}},
        ("tls.clientCertificates", "tls.secret"),
    ),
    (
        "certificates for nothing",
        MINIMAL | {"tls": {"secret": "a", "clientCertificates": True}},
        ("tls.clientCertificates", "give access.tenants"),
    ),
    ("two files", MINIMAL | TLS | {"access": {"secret": "a", "tenants": TENANTS}}, ("access", "give one of them")),
    (
        "tokens in the open",
        MINIMAL | {"access": {"tenants": TENANTS}},
        ("access: without tls.secret", "plaintextTokens"),
    ),
    ("reviews for nobody", MINIMAL | {"access": {"tokenReview": True}}, ("access.tokenReview", "give access.tenants")),
    (
        "a tenant's name",
        MINIMAL | TLS | {"access": {"tenants": {"R&D": TENANTS["research"]}}},
        ('"R&D"', "give up to 63"),
    ),
    ("no models", tenant(models=[]), ("models", "1")),
    ("a tenant without credential", tenant(certificates=[]), ("access.tenants.research: has no credential", "give")),
    ("weight of nothing", tenant(weight=0), ("weight", "0")),
    ("an account's name", tenant(service_accounts=["trainer"]), ('service_accounts: "trainer"', "give NAMESPACE/NAME")),
    ("accounts unasked", tenant(service_accounts=["a/b"]), ("service_accounts", "give access.tokenReview: true")),
    # runs
    ("no configuration", {"runs": {"first": {"runsClaim": "runs"}}}, ("runs.first.config: is missing", "give")),
    ("no volume", {"runs": {"first": {"config": {"a": 1}}}}, ("runs.first.runsClaim: is missing", "give")),
    ("the chart's key", run(config={"run_dir": "/a"}), ("runs.first.config.run_dir", "leave it out")),
    ("two tokens", run(tokenSecret="a", serviceAccountToken=True), ("runs.first", "leave one out")),
    ("no nodes", run(nodes=0), ("nodes", "1")),
]


@pytest.mark.parametrize("helm", [render, render_3], ids=["helm 4", "helm 3"])
@pytest.mark.parametrize(("values", "pieces"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG])
def test_a_wrong_value_is_refused_by_name_with_what_to_write(
    helm: Any, values: Values, pieces: tuple[str, ...]
) -> None:
    with pytest.raises(Refused) as refusal:
        helm(values)
    said = str(refusal.value)
    for piece in pieces:  # "a | b": one of them
        assert any(each.strip() in said for each in piece.split(" | ")), said


@pytest.mark.parametrize("helm", [render, render_3], ids=["helm 4", "helm 3"])
@pytest.mark.parametrize("release", ["1pool", "po.ol", "x" * 53])
def test_a_release_whose_objects_could_not_be_named_is_refused(helm: Any, release: str) -> None:
    with pytest.raises(Refused, match=r"release name: .*; give|invalid release name"):
        helm(MINIMAL, release=release)


@pytest.mark.parametrize("helm", [render, render_3], ids=["helm 4", "helm 3"])
def test_a_token_that_was_written_in_place_of_its_hash_is_not_repeated(helm: Any) -> None:
    with pytest.raises(Refused) as refusal:
        helm(tenant(tokens_sha256=["5eSam-Open"]))
    assert "access.tenants.research.tokens_sha256" in str(refusal.value)
    assert "sha256sum" in str(refusal.value)
    assert "5eSam" not in str(refusal.value)


def test_every_key_that_the_schema_lists_is_one_that_it_describes() -> None:
    def objects(schema: Any) -> list[dict[str, Any]]:
        if isinstance(schema, list):
            return [found for each in schema for found in objects(each)]
        if not isinstance(schema, dict):
            return []
        own = [schema] if schema.get("additionalProperties") is False else []
        return own + [found for each in schema.values() for found in objects(each)]

    closed = objects(json.loads((CHART / "values.schema.json").read_text()))
    assert closed
    for each in closed:
        assert each["propertyNames"]["enum"] == list(each["properties"])
