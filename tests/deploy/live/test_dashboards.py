"""The dashboards: as generated, importable, and every query of every panel answered by a real Prometheus."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.__main__ import DASHBOARDS, FOLDER
from deploy.grafana.panels import text
from tests.deploy.live.live_stack import RULES, RUNS, TEACHERS, LiveStack
from tests.servers import ROOT

# What Grafana gives for a data source with a scrape interval of 15 s, at a range of three hours.
BUILT_IN = {"$__rate_interval": "1m0s", "$__interval": "15s", "$__range": "3h"}
ALL = dict.fromkeys(("namespace", "teacher", "tenant", "run"), ".*")
CHOSEN = {  # several values are one regular expression
    "namespace": f"({TEACHERS}|{RUNS})",
    "teacher": "(sums|wrong)",
    "tenant": "(research|capped)",
    "run": "(first|second)",
}
WITH_VLLM_ALONE = {"vllm:kv_cache_usage_perc", "vllm:num_requests_waiting"}
"""Of panels that show nothing here: the live stack has no vLLM. Its names are looked up in the package instead."""

DOCUMENTS = {name: json.loads((FOLDER / name).read_text()) for name in DASHBOARDS}


@dataclass(frozen=True)
class Query:
    """One query of one panel."""

    dashboard: str
    panel: str
    expression: str
    instant: bool

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.panel}: {self.expression}"


def panels(dashboard: str) -> list[dict[str, Any]]:
    return [panel for panel in DOCUMENTS[dashboard]["panels"] if panel["type"] != "row"]


def queries() -> Iterator[Query]:
    for dashboard in DOCUMENTS:
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield Query(dashboard, panel["title"], target["expr"], target.get("instant", False))


def substituted(expression: str, variables: dict[str, str]) -> str:
    """As Grafana sends it. Fails on a variable that the dashboard does not have."""
    for name, value in BUILT_IN.items():
        expression = expression.replace(name, value)
    return re.sub(r"\$(\w+)", lambda found: variables[found[1]], expression)


def vllm_names(expression: str) -> set[str]:
    return set(re.findall(r"vllm:\w+", expression))


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_committed_dashboard_is_the_generated_one(name: str) -> None:
    assert (FOLDER / name).read_text() == text(DASHBOARDS[name]()), "run: python -m deploy.grafana"


def test_the_program_writes_the_same_files_in_any_process(tmp_path: Path) -> None:
    """Nothing depends on the order of sets, on the time or on the machine."""
    program = "import pathlib, deploy.grafana.__main__ as m; m.FOLDER = pathlib.Path('{}'); m.main()"
    for seed in ("1", "2"):
        folder = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", program.format(folder)], check=True, cwd=ROOT, env={"PYTHONHASHSEED": seed}
        )
        for name in DASHBOARDS:
            assert (folder / name).read_text() == (FOLDER / name).read_text()


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_can_be_imported_anywhere(name: str) -> None:
    """By provisioning and by the sidecar nobody is asked for a data source: it is a variable."""
    document = DOCUMENTS[name]
    assert document["uid"] == f"stillhouse-{name.removesuffix('.json')}"
    assert document["schemaVersion"] == 36  # of Grafana 10.1; newer ones migrate it
    assert not [key for key in document if key.startswith("__")] and "id" not in document
    menus = {menu["name"]: menu for menu in document["templating"]["list"]}
    assert next(iter(menus)) == "datasource" and menus["datasource"]["type"] == "datasource"
    assert all(menu["id"] == key for key, menu in menus.items())
    asked = [*panels(name), *(menu for menu in menus.values() if menu["type"] == "query")]
    assert {json.dumps(one["datasource"], sort_keys=True) for one in asked} == {
        '{"type": "prometheus", "uid": "${datasource}"}'
    }
    used = {found for query in queries() if query.dashboard == name for found in re.findall(r"\$(\w+)", str(query))}
    assert used - {built_in[1:] for built_in in BUILT_IN} == set(menus) - {"datasource"}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_says_what_it_asks_in_which_unit_and_what_good_looks_like(name: str) -> None:
    found = DOCUMENTS[name]["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    assert len({panel["title"] for panel in found}) == len(found)
    for panel in panels(name):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len(panel["description"]) > 25, panel["title"]
        assert all(target["refId"] for target in panel["targets"]), panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24, panel["title"]


def test_alerts_that_panels_name_exist_and_have_the_threshold_that_is_drawn() -> None:
    groups = [group for path in RULES.glob("*.yaml") for group in yaml.safe_load(path.read_text())["groups"]]
    alerts = {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"] if "alert" in rule}
    for name in DASHBOARDS:
        for panel in panels(name):
            named = re.search(r"Alert: (\w+)\.$", panel["description"])
            if named is None:
                continue
            steps = panel["fieldConfig"]["defaults"].get("thresholds", {"steps": []})["steps"]
            drawn = {float(step["value"]) for step in steps if step["value"] is not None}
            compared = {float(number) for number in re.findall(r"[<>]=? (-?[\d.]+)", alerts[named[1]])}
            assert drawn <= compared, f"{panel['title']}: {drawn}, but {named[1]} has {compared}"


@pytest.mark.slow
@pytest.mark.parametrize("variables", [ALL, CHOSEN], ids=["all", "chosen"])
def test_every_query_of_every_panel_returns_data(stack: LiveStack, variables: dict[str, str]) -> None:
    empty = []
    for query in queries():
        expression = substituted(query.expression, variables)
        if query.instant:
            data = stack.prometheus.query(expression, stack.seen_s)
        else:
            data = stack.prometheus.query_range(expression, stack.seen_s - 15, stack.seen_s, 15)
        if not data and not vllm_names(expression) & WITH_VLLM_ALONE:
            empty.append(str(query))
    assert not empty, "\n".join(empty)


@pytest.mark.slow
def test_no_panel_shows_only_what_is_not_a_number(stack: LiveStack) -> None:
    """A quotient of two zeros is data and shows nothing."""
    bad = []
    for query in queries():
        data = stack.prometheus.query(substituted(query.expression, ALL), stack.seen_s)
        if data and all(value != value for _, value in data):
            bad.append(str(query))
    assert not bad, "\n".join(bad)


@pytest.mark.slow
def test_every_menu_lists_what_there_is(stack: LiveStack) -> None:
    expected = {
        "pool.json": {
            "namespace": {TEACHERS},
            "teacher": {"sums", "wrong"},
            "tenant": {"research", "product", "capped"},
        },
        "run.json": {"namespace": {RUNS}, "run": {"first", "second"}},
    }
    for name, menus in expected.items():
        found = {}
        for menu in DOCUMENTS[name]["templating"]["list"]:
            if menu["type"] == "query":
                asked = re.fullmatch(r"label_values\((.+), (\w+)\)", menu["query"])
                assert asked is not None, menu["query"]
                selector = substituted(asked[1], ALL)
                moments = {"start": str(stack.seen_s - 30), "end": str(stack.seen_s)}
                values = stack.prometheus.get(f"label/{asked[2]}/values", **{"match[]": selector}, **moments)
                found[menu["name"]] = set(values)
        assert found == menus


def test_the_names_of_vllms_series_are_in_its_package() -> None:
    sources = list((ROOT / ".venv-vllm").glob("lib/python*/site-packages/vllm/v1/metrics/*.py"))
    if not sources:
        pytest.skip("needs vLLM: `make deps` installs it into .venv-vllm")
    written = "\n".join(path.read_text() for path in sources)
    asked = {name for query in queries() for name in vllm_names(query.expression)}
    assert asked == WITH_VLLM_ALONE
    assert not [name for name in asked if f'"{name}"' not in written]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_page_for_users_explains_every_panel(name: str) -> None:
    page = " ".join((ROOT / "docs/dashboards.md").read_text().split())
    rows = [panel["title"] for panel in DOCUMENTS[name]["panels"] if panel["type"] == "row"]
    assert not [row for row in rows if f"### {row}" not in page]
    assert not [panel["title"] for panel in panels(name) if f"*{panel['title']}*" not in page]
