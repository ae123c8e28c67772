"""What is rendered: taken by strict Kubernetes servers, by linters and a policy scan; what is kept beside the chart."""

import json
import subprocess
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from helm_python import chart as helm_4

from student_trainer.config import load_config
from tests.deploy.goldens import BASES, KUSTOMIZE, contents
from tests.deploy.rendering import (
    CHART,
    Object,
    container_of,
    environment_of,
    helm_3,
    in_order,
    kubectl,
    load,
    of_kind,
    render,
    render_3,
)
from tests.deploy.schemas import NEWEST, OLDEST, faults
from tests.deploy.value_sets import ALL, MINIMAL, example
from tests.servers import ROOT

EXAMPLES = ROOT / "deploy/examples"


# Schemas


@pytest.mark.parametrize("name", ALL)
def test_kubernetes_takes_every_field_of_what_is_rendered(name: str) -> None:
    for kubernetes in (OLDEST, NEWEST):
        objects = render_3(ALL[name], kubernetes=f"{kubernetes}.0")
        assert [fault for each in objects for fault in faults(each, kubernetes)] == []


def test_every_kind_that_the_chart_can_make_is_among_them() -> None:
    kinds = {each["kind"] for values in ALL.values() for each in render(values)}
    written = set()
    for path in (CHART / "templates").glob("*.yaml"):
        written |= {line.split()[1] for line in path.read_text().splitlines() if line.startswith("kind: ")}
    assert kinds == written


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"kind": "Deploymnt"}, "is not known to Kubernetes"),
        ({"apiVersion": "apps/v1beta1"}, "is not known to Kubernetes"),
        ({"spec": {"replica": 1}}, "'replica' was unexpected"),
        ({"spec": {"replicas": "1"}}, "'1' is not of type 'integer'"),
    ],
)
def test_a_fault_in_a_kind_of_kubernetes_is_found(change: Object, fault: str) -> None:
    found = of_kind(render(MINIMAL), "Deployment")
    found |= change if "spec" not in change else {"spec": found["spec"] | change["spec"]}
    assert fault in str(faults(found, NEWEST))


def test_a_fault_in_a_kind_of_another_project_and_in_its_pods_is_found() -> None:
    (jobset,) = [each for each in load(EXAMPLES / "jobset.yaml") if each["kind"] == "JobSet"]
    assert faults(jobset, NEWEST) == []
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["imag"] = "a"
    assert "'imag' was unexpected" in str(faults(jobset, NEWEST))
    jobset["spec"]["suspended"] = True
    assert "'suspended' was unexpected" in str(faults(jobset, NEWEST))
    del jobset["spec"]["failurePolicy"]["rules"][0]["action"]
    assert "'action' is a required property" in str(faults(jobset, NEWEST))


# Lint


@pytest.mark.parametrize("name", ALL)
def test_helm_finds_nothing_to_say_about_the_chart(name: str) -> None:
    report = helm_4.lint(CHART, ALL[name], strict=True, namespace="distillation")
    assert report["errors"] == []
    assert [each["error"] for each in report["messages"]] == ["icon is recommended"]


def test_helm_3_finds_nothing_to_say_about_the_chart() -> None:
    command = [helm_3(), "lint", "--strict", CHART, "--values", "-"]
    for values in (MINIMAL, example("pool"), example("run")):
        done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_of_the_chart_renders_the_same(tmp_path: Path) -> None:
    archive = helm_4.package(CHART, destination=tmp_path)
    with helm_python.Chart.load(archive) as packed:
        texts = packed.render(MINIMAL, name="pool", namespace="distillation")
        assert {each["name"] for each in packed.files} >= {"files/rules/pool.yaml", "files/dashboards/pool.json"}
    objects = [each for path, text in texts.items() if "NOTES" not in path for each in yaml.safe_load_all(text) if each]
    assert in_order(objects) == in_order(render(MINIMAL))


# Policy

EXCEPTIONS = {
    "CKV_K8S_11": "No CPU limit: the scheduler's throttling would make latency and save nothing; memory is limited.",
    "CKV_K8S_15": "IfNotPresent: tags are versions, which never move; a registry that is away must not stop a restart.",
    "CKV_K8S_38": "Only with access.tokenReview, where the server asks the API server whose a token is.",
    "CKV_K8S_43": "A digest is the user's to give, in images.teacher and images.trainer: he builds the images.",
}


def test_a_policy_scan_finds_what_was_thought_about_and_nothing_else(tmp_path: Path) -> None:
    program = ROOT / ".venv-checkov/bin/checkov"
    if not program.exists():
        pytest.skip("checkov is missing: make .venv-checkov/installed")
    for name in ("minimal", "pool", "runs"):
        (tmp_path / f"{name}.yaml").write_text((ROOT / f"tests/deploy/chart/{name}.yaml").read_text())
    for name in ("jobset", "trainjob"):
        for each in load(EXAMPLES / f"{name}.yaml"):
            # The scan knows neither kind: their pods, as Jobs.
            for template in templates_in(each):
                each = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}}
                each["spec"] = {"template": template}
            each["metadata"]["namespace"] = name
            (tmp_path / f"{name}-{each['kind']}.yaml").write_text(yaml.safe_dump(each))
    command = [program, "--directory", tmp_path, "--framework", "kubernetes", "--output", "json", "--skip-download"]
    done = subprocess.run([*command, "--soft-fail"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 300
    assert report["summary"]["parsing_errors"] == 0
    found = {each["check_id"]: each for each in report["results"]["failed_checks"]}
    assert {key: f"{found[key]['check_name']}, {found[key]['resource']}" for key in set(found) - set(EXCEPTIONS)} == {}
    assert set(EXCEPTIONS) <= set(found), "an exception that is no longer needed"


def templates_in(found: Any) -> list[Object]:
    """Every template of pods, however deep."""
    if isinstance(found, list):
        return [template for each in found for template in templates_in(each)]
    if not isinstance(found, dict):
        return []
    if "containers" in found.get("spec", {}):
        return [found]
    return [template for each in found.values() for template in templates_in(each)]


# What is kept beside the chart


@pytest.mark.parametrize("path", contents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_kept_is_what_the_chart_renders(path: Path) -> None:
    assert path.exists(), "make render"
    assert path.read_text() == contents()[path], "make render"


def test_nothing_else_is_kept_in_the_bases() -> None:
    kept = {path for base in BASES for path in (KUSTOMIZE / base).iterdir()}
    assert kept == {path for path in contents() if path.parent.parent == KUSTOMIZE}


def kustomized(path: str) -> list[Object]:
    command = [kubectl(), "kustomize", KUSTOMIZE / path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


@pytest.mark.parametrize("path", [*BASES, "overlays/example"])
def test_kustomize_builds_what_kubernetes_takes(path: str) -> None:
    objects = kustomized(path)
    assert [fault for each in objects for fault in faults(each, NEWEST)] == []


def test_the_overlay_sets_volume_image_and_namespace() -> None:
    objects = kustomized("overlays/example")
    assert {each["metadata"]["namespace"] for each in objects} == {"distillation"}
    base = {each["metadata"]["name"]: each for each in kustomized("base") if each["kind"] == "Deployment"}
    deployment = of_kind(objects, "Deployment")
    container = container_of(deployment)
    assert container["image"].startswith("registry.example/")
    assert container["args"][0] == "--model=/models/qwen3-4b"
    assert container["args"][1:] == container_of(base[deployment["metadata"]["name"]])["args"][1:]
    for kind in ("Deployment", "Job"):
        volumes = of_kind(objects, kind)["spec"]["template"]["spec"]["volumes"]
        assert [each["persistentVolumeClaim"]["claimName"] for each in volumes if each["name"] == "models"] == [
            "weights"
        ]


# Examples


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_taken(path: Path) -> None:
    if path.name.endswith("-values.yaml"):
        assert render(yaml.safe_load(path.read_text()))
    else:
        assert [fault for each in load(path) for fault in faults(each, NEWEST)] == []


def the_charts_run() -> Object:
    return of_kind(render(example("run"), "run"), "Job", "run-large")


def parts(template: Object) -> tuple[list[str], Object]:
    """What follows the launcher in the command; the rest of the pod, without what each controller gives it."""
    template = json.loads(json.dumps(template))
    spec = template["spec"]
    (container,) = spec["containers"]
    command = container.pop("args", [])
    container.pop("command", None)
    container.pop("name")
    container["env"] = environment_of(container)
    spec.pop("subdomain", None)
    return [text.replace('"', "") for text in command[command.index("--") + 1 :]] if command else [], spec


def jobset() -> Object:
    return of_kind(load(EXAMPLES / "jobset.yaml"), "JobSet")["spec"]


def runtime() -> Object:
    return of_kind(load(EXAMPLES / "trainjob.yaml"), "TrainingRuntime")["spec"]["template"]["spec"]


def test_the_jobset_is_the_charts_run() -> None:
    (job,) = jobset()["replicatedJobs"]
    assert parts(job["template"]["spec"]["template"]) == parts(the_charts_run()["spec"]["template"])
    for key in ("completionMode", "parallelism", "completions"):
        assert job["template"]["spec"][key] == the_charts_run()["spec"][key]


def test_the_trainjob_is_the_charts_run() -> None:
    (job,) = runtime()["replicatedJobs"]
    command, spec = parts(the_charts_run()["spec"]["template"])
    assert parts(job["template"]["spec"]["template"])[1] == spec
    trainjob = of_kind(load(EXAMPLES / "trainjob.yaml"), "TrainJob")["spec"]
    assert trainjob["trainer"]["command"] + trainjob["trainer"]["args"] == ["student-trainer", "launch", "--", *command]
    assert trainjob["trainer"]["numNodes"] == the_charts_run()["spec"]["parallelism"]
    assert (
        trainjob["runtimeRef"]["name"]
        == of_kind(load(EXAMPLES / "trainjob.yaml"), "TrainingRuntime")["metadata"]["name"]
    )


@pytest.mark.parametrize("of", [jobset, runtime])
def test_exit_statuses_mean_the_same_to_other_controllers(of: Any) -> None:
    def rules(job: Object) -> list[Any]:
        return [
            (each["action"], each.get("onPodConditions") or [], each.get("onExitCodes", {}).get("values"))
            for each in job["podFailurePolicy"]["rules"]
        ]

    (job,) = of()["replicatedJobs"]
    spec = job["template"]["spec"]
    assert rules(spec) == rules(the_charts_run()["spec"])
    name = spec["template"]["spec"]["containers"][0]["name"]
    for each in spec["podFailurePolicy"]["rules"]:
        assert each.get("onExitCodes", {}).get("containerName", name) == name
    policy = of()["failurePolicy"]
    assert policy["maxRestarts"] == 6
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_pods_of_a_jobset_meet_at_a_name_that_it_makes() -> None:
    found = of_kind(load(EXAMPLES / "jobset.yaml"), "JobSet")
    (job,) = found["spec"]["replicatedJobs"]
    network = found["spec"]["network"]
    assert network["enableDNSHostnames"] is True
    first = f"{found['metadata']['name']}-{job['name']}-0-0.{network['subdomain']}"
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert f"--rdzv-endpoint={first}:29400" in container["args"]


def test_the_launcher_takes_from_kubeflows_variables_what_the_command_does_not_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.distributed import run as torchrun

    for name, value in (
        ("NNODES", "2"),
        ("NPROC_PER_NODE", "8"),
        ("NODE_RANK", "1"),
        ("MASTER_ADDR", "large-node-0-0.large"),
        ("MASTER_PORT", "29500"),
    ):
        monkeypatch.setenv(f"PET_{name}", value)
    trainjob = of_kind(load(EXAMPLES / "trainjob.yaml"), "TrainJob")["spec"]["trainer"]["args"]
    options = torchrun.parse_args([*trainjob[1 : trainjob.index("--")], "program"])
    config, _, _ = torchrun.config_from_args(options)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert config.rdzv_configs["rank"] == 1
    assert (options.master_addr, options.master_port) == ("large-node-0-0.large", 29500)


@pytest.mark.parametrize("name", ["jobset", "trainjob", "kustomize"])
def test_the_configurations_of_the_examples_are_whole(name: str, tmp_path: Path) -> None:
    if name == "kustomize":
        text = (KUSTOMIZE / "overlays/example/run.yaml").read_text()
    else:
        text = of_kind(load(EXAMPLES / f"{name}.yaml"), "ConfigMap")["data"]["run.yaml"]
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml", ["run_dir=/runs/large"])
    if name != "kustomize":
        values = of_kind(render(example("run"), "run"), "ConfigMap", "run-large")["data"]["run.yaml"]
        (tmp_path / "values.yaml").write_text(values)
        assert config == load_config(tmp_path / "values.yaml", ["run_dir=/runs/large"])


def test_examples_wait_in_a_queue_that_the_example_of_kueue_makes() -> None:
    kueue = load(EXAMPLES / "kueue.yaml")
    queues = {each["metadata"]["name"] for each in kueue if each["kind"] == "LocalQueue"}
    clusters = {each["metadata"]["name"] for each in kueue if each["kind"] == "ClusterQueue"}
    flavors = {each["metadata"]["name"] for each in kueue if each["kind"] == "ResourceFlavor"}
    assert {each["spec"]["clusterQueue"] for each in kueue if each["kind"] == "LocalQueue"} <= clusters
    for each in kueue:
        if each["kind"] == "ClusterQueue":
            assert {one["name"] for group in each["spec"]["resourceGroups"] for one in group["flavors"]} <= flavors
    for path, kind in (("jobset", "JobSet"), ("trainjob", "TrainJob")):
        found = of_kind(load(EXAMPLES / f"{path}.yaml"), kind)
        assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] in queues
        assert found["spec"]["suspend"] is True
    assert the_charts_run()["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] in queues
