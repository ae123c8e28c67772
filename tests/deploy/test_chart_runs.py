"""A run as a Job: how it is started, what comes of its exit statuses, that its configuration arrives."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from student_trainer.cli import _parser as trainer_parser
from student_trainer.config import load_config
from tests.deploy.rendering import (
    container_of,
    of_kind,
    pod,
    render,
    render_3,
    volume,
)
from tests.deploy.value_sets import ALL, RUN, run

Object = dict[str, Any]


def test_a_run_is_a_job_with_a_volume() -> None:
    objects = render(RUN)
    assert {each["kind"] for each in objects} == {"Job", "ConfigMap", "ServiceAccount", "NetworkPolicy"}
    job = of_kind(objects, "Job", "pool-first")
    container = container_of(job)
    assert container["args"][:4] == ["train", "/etc/stillhouse/run/run.yaml", "--resume", "--stopped-status=75"]
    assert "run_dir=/runs/first" in container["args"]
    assert volume(RUN, "runs", "Job")["persistentVolumeClaim"] == {"claimName": "runs"}
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == 1
    assert "completionMode" not in job["spec"]


def test_several_gpus_are_started_by_the_launcher() -> None:
    arguments = container_of(of_kind(render(ALL["run, eight GPUs"]), "Job"))["args"]
    launcher = arguments[: arguments.index("--")]
    assert launcher == [
        "launch",
        "--nnodes=1",
        "--nproc-per-node=8",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]


def test_several_nodes_meet_at_the_first_one() -> None:
    objects = render(ALL["run, four nodes"])
    job = of_kind(objects, "Job")
    spec = job["spec"]
    assert (spec["completionMode"], spec["parallelism"], spec["completions"]) == ("Indexed", 4, 4)
    service = of_kind(objects, "Service", "pool-first")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    arguments = container_of(job)["args"]
    assert "--nnodes=4" in arguments and "--nproc-per-node=8" in arguments
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    (port,) = service["spec"]["ports"]
    assert f"--rdzv-endpoint={host}:{port['port']}" in arguments
    rules = of_kind(objects, "NetworkPolicy")["spec"]["ingress"]
    own = {"podSelector": {"matchLabels": service["spec"]["selector"]}}
    assert {"from": [own]} in rules


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].get("runs")])
def test_the_trainer_knows_every_option_that_it_is_given(name: str) -> None:
    for each in render(ALL[name]):
        if each["kind"] == "Job":
            words = container_of(each)["args"]
            train = words[words.index("--") + 1 :] if "--" in words else words
            known, rest = trainer_parser().parse_known_args(train)
            assert known.command == "train"
            assert not [word for word in rest if word.startswith("-")]


@pytest.mark.parametrize("name", ["run, eight GPUs", "run, four nodes"])
def test_torchrun_knows_every_option_that_the_launcher_is_given(name: str) -> None:
    from torch.distributed import run as torchrun

    words = container_of(of_kind(render(ALL[name]), "Job"))["args"]
    options = torchrun.parse_args([*words[1 : words.index("--")], "program"])
    assert options.nproc_per_node == "8"
    torchrun.config_from_args(options)


def test_drained_pods_do_not_count_and_faults_of_the_code_are_not_tried_again() -> None:
    spec = of_kind(render(RUN), "Job")["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"
    rules = (
        [
            (each["action"], each.get("onExitCodes", {}).get("values"), each["onPodConditions"])
            for each in spec["podFailurePolicy"]["rules"]
        ]
        if all("onPodConditions" in each for each in spec["podFailurePolicy"]["rules"])
        else []
    )
    assert rules == [
        ("Ignore", None, [{"type": "DisruptionTarget", "status": "True"}]),
        ("Ignore", [75], []),
        ("FailJob", [1, 2], []),
    ]
    container = container_of(of_kind(render(RUN), "Job"))["name"]
    for each in spec["podFailurePolicy"]["rules"]:
        assert each.get("onExitCodes", {}).get("containerName", container) == container


def test_the_exit_statuses_are_the_programs() -> None:
    from student_trainer import failures

    values = [
        each["onExitCodes"]["values"]
        for each in of_kind(render(RUN), "Job")["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in each
    ]
    assert values[1] == [failures.FAILED, failures.REFUSED]
    assert failures.LOST not in values[0] + values[1]


@pytest.mark.parametrize(("retries", "nodes", "limit"), [(6, 1, 6), (0, 4, 0), (3, 4, 12)])
def test_pods_that_break_together_count_as_one_retry(retries: int, nodes: int, limit: int) -> None:
    assert of_kind(render(run(retries=retries, nodes=nodes)), "Job")["spec"]["backoffLimit"] == limit


def test_clusters_older_than_the_field_are_not_asked_for_it() -> None:
    def spec(kubernetes: str) -> Object:
        return of_kind(render_3(RUN, kubernetes=kubernetes), "Job")["spec"]

    assert "podReplacementPolicy" not in spec("1.27.0")
    assert "podReplacementPolicy" not in spec("1.28.15")
    assert spec("1.29.0-eks-1234")["podReplacementPolicy"] == "Failed"


def test_a_run_has_time_to_save() -> None:
    job = of_kind(render(run(saveSeconds=1200)), "Job")
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 1200


def test_a_run_shows_its_token_or_its_certificate() -> None:
    def shown(name: str) -> set[str]:
        arguments = container_of(of_kind(render(ALL[name]), "Job"))["args"]
        return {each.partition("=")[0].removeprefix("teacher.") for each in arguments if each.startswith("teacher.")}

    assert shown("run, a GPU") == set()
    assert shown("run, with a certificate") == {"tls_ca", "tls_certificate", "tls_key"}
    assert shown("run, with a token") == {"tls_ca", "token_file"}
    assert shown("run, with its account's token") == {"token_file"}


def test_a_run_has_the_token_of_its_account_for_teachers_alone() -> None:
    values = run(serviceAccountToken=True, audience="pool.example")
    (source,) = volume(values, "token", "Job")["projected"]["sources"]
    assert source == {
        "serviceAccountToken": {"audience": "pool.example", "expirationSeconds": 3600, "path": "token"},
    }
    assert pod(values, "Job")["automountServiceAccountToken"] is False


def test_a_run_has_an_account_of_its_own_unless_one_is_named() -> None:
    assert of_kind(render(RUN), "ServiceAccount")["metadata"]["name"] == "pool-first"
    assert pod(RUN, "Job")["serviceAccountName"] == "pool-first"
    named = ALL["run, with its account's token"]
    assert pod(named, "Job")["serviceAccountName"] == "trainer"
    assert not [each for each in render(named) if each["kind"] == "ServiceAccount"]


def test_kueue_finds_the_queue_and_models_are_mounted_read_only() -> None:
    values = run(queue="research", modelsClaim="models")
    job = of_kind(render(values), "Job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in container_of(job)["volumeMounts"]


AWKWARD = {
    "steps": 5_000_000,
    "student": {"model": "/models/été 学生", "dtype": "bfloat16"},
    "teacher": {"addresses": ["dns:///pool-qwen.teachers.svc:50051"], "model": "yes", "top_k": 64, "candidates": 16},
    "prompts": {
        "source": "jsonl",
        "path": "/models/1e3",
        "system": "First line.\n  {metadata[expression]} and {{braces}}: #5 'a' \"b\"\n\nLast \\n line\n",
        "verifier": {"kind": "regex", "pattern": r"^\s*(\d+)\.0*$"},
    },
    "rollout": {"prompts_per_step": 64, "answers_per_prompt": 8, "max_new_tokens": 1024},
    "objective": {"recipe": "reverse_kl_rewards"},
    "optimizer": {"learning_rate": 1.0e-6},
}


def test_the_configuration_means_what_it_meant_in_the_values(tmp_path: Path) -> None:
    paths = {}
    for name, text in (
        ("values", yaml.safe_dump(AWKWARD, allow_unicode=True)),
        ("helm 4", of_kind(render(run(config=AWKWARD)), "ConfigMap")["data"]["run.yaml"]),
        ("helm 3", of_kind(render_3(run(config=AWKWARD)), "ConfigMap")["data"]["run.yaml"]),
    ):
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(text)
    configs = {name: load_config(path, ["run_dir=/runs/first"]) for name, path in paths.items()}
    assert configs["values"].optimizer.learning_rate == 1e-6
    assert configs["values"].steps == 5_000_000
    assert configs["helm 4"] == configs["helm 3"] == configs["values"]


TEXTS = (
    "yes", "on", "null", "~", "1e3", "1_000", "0x10", "0o7", "12:30:45", "2024-01-01", ".5", "", " a ", "{a}", "- b",
    "a: b", "# c", "*d", "&e", "!f", "%g", "@h", "`i`", "a\tb", "two\n\n  lines \n", "\n", "é漢😀", "'", '"', "\\n",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_the_configuration_stays_that_text(text: str) -> None:
    data = of_kind(render(run(config={"a": text, "b": [text], text or "c": 1, "z": 2})), "ConfigMap")["data"][
        "run.yaml"
    ]
    assert yaml.safe_load(data) == {"a": text, "b": [text], text or "c": 1, "z": 2}


def test_the_keys_that_the_chart_gives_are_keys_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(AWKWARD))
    for name in ("run, a GPU", "run, with a certificate", "run, with a token", "IPv6"):
        words = container_of(of_kind(render(ALL[name]), "Job"))["args"]
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        config = load_config(tmp_path / "run.yaml", overrides)
        assert str(config.run_dir) == "/runs/first"
        assert config.metrics_host == ("::" if name == "IPv6" else "0.0.0.0")
