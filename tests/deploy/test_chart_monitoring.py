"""What the chart gives to Prometheus and Grafana."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.rendering import (
    CHART,
    of_kind,
    render,
)
from tests.deploy.value_sets import ALL, MINIMAL, RUN

Object = dict[str, Any]


def test_monitoring_is_off_until_it_is_asked_for() -> None:
    kinds = {each["kind"] for each in render(MINIMAL | RUN)}
    assert not kinds & {"PodMonitor", "PrometheusRule"}


def test_prometheus_scrapes_by_the_names_that_rules_and_dashboards_ask_by() -> None:
    objects = render(MINIMAL | RUN | {"monitoring": {"podMonitors": True, "interval": "30s", "labels": {"a": "b"}}})
    for component in ("teacher", "run"):
        monitor = of_kind(objects, "PodMonitor", f"pool-{component}")
        assert monitor["metadata"]["labels"]["a"] == "b"
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert (endpoint["port"], endpoint["interval"]) == ("metrics", "30s")
        by_name = [each for each in endpoint["relabelings"] if "regex" not in each]
        assert by_name == [
            {"targetLabel": "job", "replacement": f"stillhouse-{component}"},
            {"sourceLabels": [f"__meta_kubernetes_pod_label_stillhouse_dev_{component}"], "targetLabel": component},
        ]


def test_pods_that_follow_a_leader_are_no_servers_that_are_not_ready() -> None:
    objects = render(MINIMAL | {"monitoring": {"podMonitors": True}})
    (endpoint,) = of_kind(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    first, follower, *_ = endpoint["relabelings"]
    assert (first["targetLabel"], follower["targetLabel"]) == ("job", "job"), "the later one wins"
    assert follower["sourceLabels"] == ["__meta_kubernetes_pod_label_leaderworkerset_sigs_k8s_io_worker_index"]
    follows = [index for index in ("", "0", "1", "9", "10", "31") if re.fullmatch(follower["regex"], index)]
    assert follows == ["1", "9", "10", "31"]
    assert follower["replacement"] != first["replacement"]


def test_a_release_of_runs_alone_watches_no_teachers() -> None:
    monitors = [each for each in render(ALL["monitoring of a run"]) if each["kind"] == "PodMonitor"]
    assert [each["metadata"]["name"] for each in monitors] == ["pool-run"]


def rules_of(values: Object) -> dict[str, Object]:
    objects = render(values)
    return {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "PrometheusRule"}


def test_rules_are_those_of_the_files() -> None:
    found = rules_of(MINIMAL | {"monitoring": {"rules": True}})
    files = sorted((CHART / "files/rules").glob("*.yaml"))
    assert files
    assert found == {f"pool-{path.stem}": yaml.safe_load(path.read_text()) for path in files}


def test_promtool_accepts_the_rules_and_the_templates_of_their_texts(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing: scripts/install_test_tools.sh")
    values = MINIMAL | {"monitoring": {"rules": True, "runbookBase": "https://docs.example/runbooks/"}}
    for name, spec in rules_of(values).items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec))
        done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_name_runbooks_where_they_are_published() -> None:
    values = MINIMAL | {"monitoring": {"rules": True, "runbookBase": "https://docs.example/x/"}}
    rules = [rule for spec in rules_of(values).values() for group in spec["groups"] for rule in group["rules"]]
    alerts = [rule for rule in rules if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["annotations"]["runbook_url"] == f"https://docs.example/x/{alert['alert']}.md"


def test_dashboards_arrive_whole() -> None:
    objects = render(MINIMAL | {"monitoring": {"dashboards": True, "labels": {"a": "b"}}})
    files = sorted((CHART / "files/dashboards").glob("*.json"))
    assert files
    for path in files:
        found = of_kind(objects, "ConfigMap", f"pool-dashboard-{path.stem}")
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(found["data"][f"stillhouse-{path.name}"]) == json.loads(path.read_text())
