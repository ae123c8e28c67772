"""What is rendered from the chart and kept beside it: `make render` writes it, a test compares.

The goldens show in a review what a change of the chart does to what is installed. `deploy/kustomize` is for those
without Helm.
"""

import copy
import sys
from pathlib import Path

import yaml

from tests.deploy.rendering import Object, as_yaml, in_order, render
from tests.deploy.value_sets import MINIMAL, Values, example
from tests.servers import ROOT

GOLDENS = Path(__file__).parent / "chart"
KUSTOMIZE = ROOT / "deploy/kustomize"
BASES = ("base", "run")

_RUN: Values = {"runs": {"first": {"runsClaim": "runs", "modelsClaim": "models", "config": {"steps": 200}}}}
_TEACHER: Values = {"teachers": {"teacher": {"model": {"claim": "models", "path": "teacher"}}}}


def contents() -> dict[Path, str]:
    """Every file that is rendered, with what belongs in it."""
    files = {
        GOLDENS / "minimal.yaml": as_yaml(_without_dashboards(render(MINIMAL))),
        GOLDENS / "pool.yaml": as_yaml(_without_dashboards(render(example("pool"), "pool", "teachers"))),
        GOLDENS / "runs.yaml": as_yaml(_without_dashboards(render(example("run"), "runs", "research"))),
    }
    for base, values in zip(BASES, (_TEACHER, _RUN), strict=True):
        for each in in_order(_without_helm(render(values, "stillhouse"))):
            path = KUSTOMIZE / base / f"{each['kind'].lower()}.yaml"
            assert path not in files
            files[path] = as_yaml([each])
        names = sorted(path.name for path in files if path.parent == KUSTOMIZE / base)
        files[KUSTOMIZE / base / "kustomization.yaml"] = _NOTE + yaml.safe_dump(
            {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": names}
        )
    return files


_NOTE = "# Rendered from deploy/helm/stillhouse by `make render`. Change it in an overlay: ../overlays/example.\n"


def _without_helm(objects: list[Object]) -> list[Object]:
    """The same for `kubectl apply`: of no release, and of whichever namespace the overlay names."""
    objects = copy.deepcopy(objects)
    for each in objects:
        metadata = each["metadata"]
        metadata.pop("namespace", None)
        for label in ("app.kubernetes.io/managed-by", "helm.sh/chart"):
            del metadata["labels"][label]
    return objects


def _without_dashboards(objects: list[Object]) -> list[Object]:
    """Rules and dashboards are files of their own, tested as such."""
    return [
        each
        for each in objects
        if each["kind"] != "PrometheusRule" and "grafana_dashboard" not in each["metadata"]["labels"]
    ]


def main() -> None:
    for path, text in contents().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for base in BASES:
        for path in (KUSTOMIZE / base).glob("*.yaml"):
            if path not in contents():
                path.unlink()
    print(f"wrote {len(contents())} files")


if __name__ == "__main__":
    sys.exit(main())
