"""What the tests of the cluster do with it: install the chart, call its teachers, watch its pods."""

import base64
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stillhouse.client import TeacherClient, Tls
from tests.certificates import Authority
from tests.chaos.pool_under_test import Load, Namespace
from tests.cluster.control_plane import ControlPlane
from tests.cluster.node import ClusterNames, Ended, Node, Repeating
from tests.cluster.old_api import for_old_api
from tests.deploy.pod_network import PodNetwork
from tests.deploy.pod_process import PodProcess
from tests.deploy.rendering import RELEASE
from tests.deploy.small_pool import CLIENT, MODELS, TEACHER, render, server_secret, tls_files
from tests.deploy.teacher_load import EXPECTED, MODULE, write_expected
from tests.servers import serving

DEPLOYMENT = f"{RELEASE}-{TEACHER}"


class Cluster:
    """See the module's text."""

    def __init__(
        self, network: PodNetwork, plane: ControlPlane, names: ClusterNames, nodes: list[Node], directory: Path
    ) -> None:
        self.network, self.plane, self.names, self.nodes, self.directory = network, plane, names, nodes, directory
        self.authority = Authority(directory / "pki")
        client = self.authority.client(CLIENT)
        self.tls = Tls(self.authority.certificate, client.certificate, client.key)
        self.expected = directory / "expected.json"
        # The right answers are those of a server that was started by hand.
        with (
            serving(MODELS / "teacher", "--name", TEACHER, "--max-batch-tokens", "1") as server,
            TeacherClient([server.said["listen"]]) as teacher,
        ):
            write_expected(teacher, self.expected)

    # Installing

    def prepare(self, namespace: str, **claims: Path) -> None:
        """A namespace with volumes and the teachers' certificate."""
        self.plane.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}])
        for name, path in {"models": MODELS, **claims}.items():
            self.plane.apply(_volume(namespace, name, path))
        pair = server_secret(self.authority, f"server-{namespace}", service(namespace))
        self.add_secret(namespace, "teacher-tls", pair)

    def add_secret(self, namespace: str, name: str, data: dict[str, bytes]) -> None:
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        metadata = {"name": name, "namespace": namespace}
        self.plane.apply([{"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": encoded}])

    def install(self, namespace: str, values: dict[str, Any]) -> None:
        """What `helm upgrade --install` would do."""
        self.plane.apply(for_old_api(render(values, namespace)))

    def wait_for_rollout(self, namespace: str, within_s: int = 300) -> None:
        words = ("rollout", "status", f"deployment/{DEPLOYMENT}", "--namespace", namespace, f"--timeout={within_s}s")
        self.plane.kubectl(*words, timeout_s=within_s + 30)

    def wait_for_job(self, namespace: str, name: str, within_s: float = 240.0) -> None:
        """Returns when it has completed."""
        path, end_s = f"/apis/batch/v1/namespaces/{namespace}/jobs/{name}", time.monotonic() + within_s
        while not (status := self.plane.api.get(path)["status"]).get("succeeded"):
            if time.monotonic() > end_s:
                pods = self.pods(namespace, f"job-name={name}")
                told = "\n".join(self.process(pod).log for pod in pods)
                raise AssertionError(f"{name} has not completed: {status}\n{told}")
            time.sleep(0.2)

    # Looking

    def pods(self, namespace: str, selector: str = f"stillhouse.dev/teacher={TEACHER}") -> list[dict[str, Any]]:
        """Those that are not being deleted."""
        found = self.plane.api.get(f"/api/v1/namespaces/{namespace}/pods", labelSelector=selector)["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def process(self, pod: dict[str, Any]) -> PodProcess:
        """The pod as it runs."""
        uid = pod["metadata"]["uid"]
        wait_for(lambda: any(uid in node.running for node in self.nodes), f"a node for {pod['metadata']['name']}")
        return next(node.running[uid] for node in self.nodes if uid in node.running)

    def ended(self, name: str) -> Ended:
        """A deleted pod, once it has ended."""
        wait_for(lambda: any(name in node.ended for node in self.nodes), f"the end of {name}")
        return next(node.ended[name] for node in self.nodes if name in node.ended)

    @contextlib.contextmanager
    def load(self, namespace: str) -> Iterator[Load]:
        """Callers that find the teachers by their name, from an address of their own."""
        with Namespace() as callers:
            self.network.add(callers)
            with self.names.known_to(callers):
                where = {"module": MODULE, "variables": {EXPECTED: str(self.expected)}, "namespace": callers}
                with Load([f"dns:///{service(namespace)}:50051"], tls=tls_files(self.tls), **where) as load:
                    yield load

    def evict(self, pod: dict[str, Any]) -> None:
        """Raises ApiError, 429 where a disruption budget forbids it."""
        metadata = {key: pod["metadata"][key] for key in ("name", "namespace")}
        body = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": metadata}
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/eviction"
        self.plane.api.call("POST", path, body)


class Fewest(Repeating):
    """The fewest addresses that a service had while this lasted, as its clients would see it."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        super().__init__(0.1)
        self._api = cluster.plane.api
        self._path = f"/api/v1/namespaces/{namespace}/endpoints/{DEPLOYMENT}"
        self.addresses = 2**31
        self.looks = 0

    def round(self) -> None:
        subsets = self._api.get(self._path).get("subsets") or ()
        self.addresses = min(self.addresses, sum(len(subset.get("addresses", ())) for subset in subsets))
        self.looks += 1


def service(namespace: str) -> str:
    """The name of the teachers of a release there."""
    return f"{DEPLOYMENT}.{namespace}.svc"


def wait_for(condition: Callable[[], Any], what: str, within_s: float = 240.0) -> None:
    """Returns once `condition()` holds; fails the test when it does not in time."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {within_s:g} s for {what}"
        time.sleep(0.2)


def _volume(namespace: str, name: str, path: Path) -> list[dict[str, Any]]:
    """A claim, and the directory that it gets."""
    size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
    claimed = {"namespace": namespace, "name": name}
    volume = {"capacity": size, "accessModes": modes, "hostPath": {"path": str(path)}, "claimRef": claimed}
    claim = {
        "accessModes": modes,
        "resources": {"requests": size},
        "storageClassName": "",
        "volumeName": f"{namespace}-{name}",
    }
    return [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{namespace}-{name}"}, "spec": volume},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": claimed, "spec": claim},
    ]
