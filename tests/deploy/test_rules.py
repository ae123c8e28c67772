"""Recording rules, alerts, their pages, and the examples of Prometheus and Alertmanager: by promtool, amtool and both
programs themselves."""

import ast
import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from stillhouse.errors import BY_REASON
from student_trainer import failures
from student_trainer.config import MetricsPage, _known_keys
from student_trainer.exporter import Exporter
from teacher_server import start_failures
from teacher_server.metrics import Metrics

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy/helm/stillhouse/files/rules").glob("*.yaml"))
PROMETHEUS = ROOT / "deploy/prometheus"
RUNBOOKS = ROOT / "docs/runbooks"
CASES = Path(__file__).parent / "rules"
UNIT_TESTS = [CASES / f"{name}.yaml" for name in ("pool", "certificates", "run")]
PROGRAMS = [ROOT / name for name in ("teacher_server", "student_trainer", "proto/stillhouse")]
SECTIONS = ["What it means", "See it", "Check, in this order", "Do", "Do not", "Back to bed when"]
VLLM_METRICS = {"vllm:kv_cache_usage_perc", "vllm:num_requests_waiting", "vllm:num_preemptions_total"}

WORDS_OF_PROMQL = {
    *("and", "bool", "by", "group_left", "ignoring", "offset", "on", "or", "unless", "without"),
    *("abs", "changes", "clamp_min", "histogram_quantile", "increase", "label_replace", "rate", "resets", "time"),
    *("avg", "count", "max", "min", "sum", "timestamp", "topk"),
    *("avg_over_time", "count_over_time", "last_over_time", "max_over_time", "min_over_time", "sum_over_time"),
}


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


ALL = [rule for path in RULES for group in loaded(path)["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in ALL if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in ALL if "record" in rule}


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: scripts/install_test_tools.sh installs it")
    return found


def run(*command: Any) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- what the files say


def test_there_is_no_alert_twice():
    assert len(ALERTS) + len(RECORDED) == len(ALL)
    assert len(ALERTS) > 40


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_urgent_it_is_and_what_to_do(name):
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("page", "warning", "info")
    annotations = rule["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url"}
    assert "{{" in annotations["summary"] and "$labels" in annotations["summary"] + annotations["description"]
    assert not annotations["summary"].endswith(".") and annotations["description"].endswith(".")
    assert annotations["runbook_url"] == f"docs/runbooks/{name}.md"
    page = (ROOT / annotations["runbook_url"]).read_text()
    assert page.startswith(f"# {name}\n")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == SECTIONS


def test_every_page_has_its_alert():
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == ALERTS.keys()


def test_the_table_of_alerts_has_each_with_its_severity():
    rows = re.findall(
        r"^\| \[(\w+)\]\(runbooks/(\w+)\.md\) \| (\w+) \|", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE
    )
    assert {name: severity for name, page, severity in rows if name == page} == {
        name: rule["labels"]["severity"] for name, rule in ALERTS.items()
    }
    assert len(rows) == len(ALERTS)


def test_every_alert_has_a_reason_for_its_threshold():
    for path in RULES:
        lines = path.read_text().splitlines()
        alerts = [number for number, line in enumerate(lines) if line.strip().startswith("- alert:")]
        bare = {lines[number].split()[-1] for number in alerts if not lines[number - 1].strip().startswith("#")}
        # These share the comment of the alert before them.
        assert bare <= {"RunRunaway", "RunLengthBlowUp", "RunTruncated"}


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_has_a_case_that_fires_and_one_that_does_not(name):
    checks = [
        check
        for path in UNIT_TESTS
        for case in loaded(path)["tests"]
        for check in case.get("alert_rule_test", [])
        if check["alertname"] == name
    ]
    assert any(check["exp_alerts"] for check in checks), "no case fires"
    assert any(not check["exp_alerts"] for check in checks), "no case stays silent"


# ---- what they name


@cache
def strings_of_the_programs() -> set[str]:
    """Every string in their source; one that is put together from several lines, up to each value inside, is one."""
    nodes = (
        node for folder in PROGRAMS for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
    )
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@cache
def metrics_of_the_programs() -> set[str]:
    found = set(VLLM_METRICS) | {"up"}
    exporter = Exporter(MetricsPage("127.0.0.1", 0, 0.0))
    exporter.close()
    for registry in (Metrics().registry, exporter._registry):
        for family in registry.collect():
            ends = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
            found |= {family.name + end for end in ends}
    # A figure of a step becomes a gauge of its name.
    return found | {f"stillhouse_student_{text}" for text in strings_of_the_programs() if re.fullmatch(r"\w+", text)}


def names_in(expression: str) -> set[str]:
    """Metrics and recorded rules that an expression reads."""
    text = re.sub(r'"[^"]*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on|without|group_left|ignoring)\s*\([^)]*\)", " ", text)
    return set(re.findall(r"(?<![\w.:])[a-zA-Z_][\w:]*", text)) - WORDS_OF_PROMQL


def test_names_are_found_in_expressions():
    assert names_in('sum by (a) (rate(x_total{b="c d"}[5m] offset 2m)) / on (a) group_left () y:z > 1e-9') == {
        "x_total",
        "y:z",
    }


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.get("alert") or rule["record"])
def test_what_an_expression_reads_is_recorded_or_there(rule):
    names = names_in(rule["expr"])
    assert names
    assert names - RECORDED.keys() <= metrics_of_the_programs()


def test_what_is_recorded_is_read_or_meant_for_others():
    for_others = {
        "tenant:used_tokens:increase1h",
        "tenant:servers:share5m",
        "teacher:queued_tokens_per_replica",
        "server:vllm_waiting:sum",
    }
    read = {name for rule in ALL for name in names_in(rule["expr"])}
    assert RECORDED.keys() - read == for_others


def test_what_expressions_ask_of_labels_is_what_programs_say():
    known = {
        "reason": {"", *BY_REASON, *start_failures.REASONS, *failures.REASONS},
        "code": {code.name for code in grpc.StatusCode},
        "job": {"stillhouse-teacher", "stillhouse-run"},
        "method": {"Score"},
        "result": {"ok", "failed"},
        "device": {"host"},
    }
    asked = set()
    for rule in ALL:
        for label, value in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', rule["expr"]):
            for word in value.split("|"):
                assert word in known[label], f"{rule}: {label} is never {word!r}"
                asked.add(label)
    assert asked == known.keys()


def test_vllm_has_the_series_that_are_read_of_it():
    packages = list(ROOT.glob(".venv-vllm/lib/python3*/site-packages/vllm/v1/metrics"))
    if not packages:
        pytest.skip("vllm is not installed: make deps does it")
    source = "\n".join(path.read_text() for path in packages[0].glob("*.py"))
    for name in VLLM_METRICS:  # its counters get their ending from prometheus_client
        assert f'"{name.removesuffix("_total")}"' in source


# ---- what the pages say

PAGES = sorted(RUNBOOKS.glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_asks_for_what_there_is(page):
    queries = blocks(page, "promql")
    assert queries
    for query in queries:
        assert names_in(query) - RECORDED.keys() <= metrics_of_the_programs() | {"ALERTS"}
    text = page.read_text()
    named = set(re.findall(r"stillhouse_(?:teacher|student)_\w+", text)) | set(
        re.findall(r"\b(?:server|tenant|teacher|run|reason):\w+:\w+|teacher:queued_tokens_per_replica", text)
    )
    assert named <= RECORDED.keys() | metrics_of_the_programs()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_quotes_what_the_programs_write(page):
    """In a block of text; `...` stands for what differs."""
    pieces = [
        piece.strip() for block in blocks(page, "text") for line in block.splitlines() for piece in line.split("...")
    ]
    for piece in filter(None, pieces):
        assert any(piece in text for text in strings_of_the_programs()), piece


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_points_at_a_panel_that_there_is(page):
    dashboards = (json.loads(path.read_text()) for path in (RULES[0].parents[1] / "dashboards").glob("*.json"))
    panels = {dashboard["title"]: {panel["title"] for panel in dashboard["panels"]} for dashboard in dashboards}
    [(dashboard, panel)] = re.findall(r"Dashboard \*([^*]+)\*,\s\*([^*]+)\*", page.read_text())
    assert panel in panels[dashboard]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs/alerts.md"], ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_options_and_keys_on_the_pages_are_those_of_the_programs():
    text = "\n".join(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL) for page in PAGES)
    spans = [span for span in re.findall(r"`([^`]+)`", text) if not span.startswith(("kubectl", "helm"))]
    options = {option for span in spans for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}
    assert "--stall-s" in options
    assert options - {"--force", "--grace-period"} <= strings_of_the_programs()  # those are kubectl's
    keys = {
        found[0]
        for span in spans
        if (
            found := re.match(
                r"(teacher|rollout|optimizer|checkpoints|evaluation|student|objective|guards)(\.\w+)+", span
            )
        )
    }
    assert "teacher.outage_s" in keys
    for key in keys:
        *above, last = key.split(".")
        assert last in _known_keys(tuple(above)), key


# ---- promtool


def test_rules_are_valid():
    run(tool("promtool"), "check", "rules", *RULES)


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_rules_do_what_their_cases_say(path):
    run(tool("promtool"), "test", "rules", path)


@pytest.mark.parametrize("scene", loaded(CASES / "silent.yaml")["scenes"], ids=lambda scene: scene["name"])
def test_nothing_fires_while_all_is_as_it_should_be(scene, tmp_path):
    every, until = (int(scene[key].removesuffix("m")) for key in ("every", "until"))
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        yaml.safe_dump(
            {
                "rule_files": [str(path) for path in RULES],
                "evaluation_interval": "1m",
                "group_eval_order": [group["name"] for path in RULES for group in loaded(path)["groups"]],
                "tests": [
                    {
                        "interval": scene["interval"],
                        "input_series": scene["input_series"],
                        "alert_rule_test": [
                            {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": []}
                            for minute in range(every, until + 1, every)
                            for name in ALERTS
                        ],
                    }
                ],
            }
        )
    )
    run(tool("promtool"), "test", "rules", rules)


# ---- Prometheus without the operator


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


@contextlib.contextmanager
def started(*command: Any, ready: str) -> Iterator[None]:
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(ready, timeout=5):
                break
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        else:
            raise AssertionError(f"{command[0]} does not answer")
        yield
    finally:
        process.terminate()
        process.communicate(timeout=60)


def with_pods(pods: list[dict[str, str]]) -> dict[str, Any]:
    """The example for Kubernetes with these pods in place of what the API would say: Debian's Prometheus cannot ask
    it. Everything else stays."""
    config = loaded(PROMETHEUS / "prometheus.yml")
    for job in config["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        job["static_configs"] = [
            {
                "targets": [f"127.0.0.1:{9 + index}"],
                "labels": {f"__meta_kubernetes_{name}": value for name, value in pod.items()},
            }
            for index, pod in enumerate(pods)
        ]
    config["rule_files"] = [str(path) for path in RULES]
    return config


def pod(component: str, name: str, *, port: str = "metrics", phase: str = "Running", app: str = "stillhouse") -> Any:
    return {
        "namespace": "pool",
        "pod_name": name,
        "pod_phase": phase,
        "pod_container_port_name": port,
        "pod_label_app_kubernetes_io_name": app,
        "pod_label_app_kubernetes_io_component": component,
        f"pod_label_stillhouse_dev_{component}": "big",
    }


def test_prometheus_takes_the_pods_of_the_chart_with_the_labels_that_rules_need(tmp_path):
    pods = [
        pod("teacher", "big-0"),
        pod("teacher", "big-0", port="grpc"),
        pod("teacher", "big-old", phase="Succeeded"),
        pod("run", "first-0"),
        pod("run", "first-old", phase="Failed"),
        pod("teacher", "other", app="other"),
    ]
    config = tmp_path / "prometheus.yml"
    config.write_text(yaml.safe_dump(with_pods(pods)))
    run(tool("promtool"), "check", "config", config)
    port = free_port()
    with started(
        tool("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        ready=f"http://127.0.0.1:{port}/-/ready",
    ):
        for _ in range(300):  # pods are looked at some seconds after the start
            targets = get(f"http://127.0.0.1:{port}/api/v1/targets")["data"]["activeTargets"]
            if len(targets) >= 2:
                break
            time.sleep(0.1)
        labels = [{key: value for key, value in found["labels"].items() if key != "instance"} for found in targets]
        assert sorted(labels, key=str) == [
            {"job": "stillhouse-run", "namespace": "pool", "pod": "first-0", "run": "big"},
            {"job": "stillhouse-teacher", "namespace": "pool", "pod": "big-0", "teacher": "big"},
        ]
        rules = get(f"http://127.0.0.1:{port}/api/v1/rules")["data"]["groups"]
        assert sum(len(group["rules"]) for group in rules) == len(ALL)


def test_the_example_without_kubernetes_is_valid_and_gives_the_same_labels():
    run(tool("promtool"), "check", "config", PROMETHEUS / "prometheus-static.yml")
    jobs = {job["job_name"]: job for job in loaded(PROMETHEUS / "prometheus-static.yml")["scrape_configs"]}
    for job, label in (("stillhouse-teacher", "teacher"), ("stillhouse-run", "run")):
        for target in jobs[job]["static_configs"]:
            assert target["labels"].keys() == {"namespace", "pod", label}


# ---- Alertmanager

ALERTMANAGER = PROMETHEUS / "alertmanager.yml"


def test_alertmanager_takes_the_example():
    run(tool("amtool"), "check-config", ALERTMANAGER)


def test_secrets_are_in_files():
    text = ALERTMANAGER.read_text()
    assert re.findall(r"(?:api_url|routing_key|password|token)\w*", text) == ["api_url_file", "routing_key_file"]


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ("severity=page alertname=TeacherDown namespace=pool teacher=big", "pager"),
        ("severity=page alertname=RunStalled namespace=team-a run=first", "pager"),
        ("severity=warning alertname=TeacherRevisionSkew namespace=pool teacher=big", "pool-chat"),
        ("severity=warning alertname=RunFailed namespace=team-a run=first reason=config", "team-a-chat"),
        ("severity=warning alertname=RunFailed namespace=team-b run=second reason=config", "pool-chat"),
        ("severity=warning alertname=TenantInvalidRequests namespace=pool tenant=team-a", "team-a-chat"),
        ("severity=warning alertname=TenantQuotaExceeded namespace=pool tenant=team-b", "pool-chat"),
    ],
)
def test_an_alert_goes_to_who_can_do_something(labels, receiver):
    told = run(tool("amtool"), "config", "routes", "test", f"--config.file={ALERTMANAGER}", *labels.split())
    assert told.strip() == receiver


def test_what_follows_of_something_else_is_not_told(tmp_path):
    pool, other, stuck = ({"namespace": "pool", "teacher": name} for name in ("big", "small", "stuck"))
    first = {"namespace": "team-a", "run": "first"}
    stands = [  # told
        {"alertname": "TeacherDown"} | pool,
        {"alertname": "TeacherStartFailed", "pod": "big-0", "reason": "memory"} | pool,
        {"alertname": "TeacherReloadFailed", "pod": "big-0"} | pool,
        {"alertname": "TenantQueueWait", "tenant": "a"} | other,
        {"alertname": "TeacherServerNotReady", "pod": "small-0"} | other,
        {"alertname": "RunTeacherOutage", "namespace": "team-a", "run": "second", "teacher": "small"},
        {"alertname": "RunStalled", "namespace": "team-a", "run": "third"},
        {"alertname": "RunRunaway", "reason": "runaway"} | first,
        {"alertname": "RunTruncated"} | first,
        {"alertname": "RunsFailing", "reason": "archive"},
        {"alertname": "RunFailed", "namespace": "team-a", "run": "fourth", "reason": "config"},
        {"alertname": "TeacherScoringFails", "model": "small", "reason": "ENGINE_FAILED"} | other,
        {"alertname": "TeacherScoringErrors", "model": "small", "reason": "OUT_OF_MEMORY"} | other,
        {"alertname": "TeacherCertificateEnds"} | other,
        {"alertname": "TeacherStuck"} | stuck,
    ]
    follows = [  # not told
        {"alertname": "TeacherStuck"} | pool,
        {"alertname": "TenantQueueWait", "tenant": "a"} | pool,
        {"alertname": "TeacherServerNotReady", "pod": "big-0"} | pool,
        {"alertname": "TeacherRestarts", "pod": "big-0"} | pool,
        {"alertname": "TeacherEngineStalled", "pod": "stuck-0"} | stuck,
        {"alertname": "RunTeacherOutage", "namespace": "team-b", "run": "sixth", "teacher": "stuck"},
        {"alertname": "TeacherScoringErrors", "model": "small", "reason": "ENGINE_FAILED"} | other,
        {"alertname": "TeacherCertificateExpires"} | other,
        {"alertname": "RunTeacherOutage", "teacher": "big"} | first,
        {"alertname": "RunStalled", "teacher": "big"} | first,
        {"alertname": "RunKlRising"} | first,
        {"alertname": "RunCheckpointOld", "namespace": "team-a", "run": "second"},
        {"alertname": "RunFailed", "namespace": "team-a", "run": "fifth", "reason": "archive"},
    ]
    for alert in stands + follows:
        assert alert["alertname"] in ALERTS
    port = free_port()
    url = f"http://127.0.0.1:{port}/api/v2"
    with started(
        tool("prometheus-alertmanager"),
        f"--config.file={ALERTMANAGER}",
        f"--storage.path={tmp_path}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
        ready=f"http://127.0.0.1:{port}/-/ready",
    ):
        body = json.dumps(
            [
                {"labels": labels | {"severity": ALERTS[labels["alertname"]]["labels"]["severity"]}}
                for labels in stands + follows
            ]
        )
        request = urllib.request.Request(
            f"{url}/alerts", body.encode(), {"Content-Type": "application/json"}, method="POST"
        )
        urllib.request.urlopen(request, timeout=10).close()
        found: list[dict[str, Any]] = []

        def of(suppressed: bool) -> list[str]:
            chosen = (alert["labels"] for alert in found if bool(alert["status"]["inhibitedBy"]) == suppressed)
            return sorted(
                json.dumps({key: labels[key] for key in sorted(labels) if key != "severity"}) for labels in chosen
            )

        def written(alerts: list[dict[str, str]]) -> list[str]:
            return sorted(json.dumps(dict(sorted(alert.items()))) for alert in alerts)

        # Alertmanager takes alerts in at once, and finds what they inhibit on a thread of its own.
        end_s = time.monotonic() + 60.0
        while time.monotonic() < end_s:
            found = get(f"{url}/alerts")
            if (of(False), of(True)) == (written(stands), written(follows)):
                break
            time.sleep(0.1)
    assert of(False) == written(stands)
    assert of(True) == written(follows)


def test_inhibitions_and_routes_name_alerts_that_there_are():
    config = loaded(ALERTMANAGER)
    matchers = [
        matcher
        for rule in config["inhibit_rules"]
        for matcher in rule["source_matchers"] + rule["target_matchers"]
        + [matcher for route in config["route"]["routes"] for matcher in route["matchers"]]
        if matcher.startswith("alertname")
    ]  # fmt: skip
    for matcher in matchers:
        for name in re.split(r"\|", matcher.split('"')[1]):
            assert any(re.fullmatch(name, alert) for alert in ALERTS), name
