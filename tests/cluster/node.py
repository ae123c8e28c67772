"""Nodes of a cluster: takes the pods that the scheduler bound to them and runs them for real, as processes.

What a kubelet does beside `tests.deploy.pod_process`: a node with a heartbeat, status and readiness of pods, deletion
with its grace, tokens by TokenRequest, claims through their volumes. `ClusterNames` stands in for the cluster's DNS:
/etc/hosts of pods and callers follows the Endpoints.
"""

import base64
import contextlib
import datetime
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.chaos.pool_under_test import Namespace
from tests.cluster.control_plane import Api, ApiError
from tests.cluster.old_api import restored
from tests.deploy.pod_network import PodNetwork
from tests.deploy.pod_process import PodProcess
from tests.deploy.pod_references import Sources

LOOK_EVERY_S = 0.2
_HEARTBEAT_S = 5.0
_RENEW_TOKEN_S = 1800.0


@dataclass(frozen=True)
class Ended:
    """What is left of a pod that was deleted."""

    status: dict[str, Any]
    events: list[str]
    log: str

    @property
    def exit_code(self) -> int:
        (container,) = self.status["containerStatuses"]
        return container["state"]["terminated"]["exitCode"]


class ApiSources(Sources):
    """What the pods of one namespace refer to, from the API server."""

    def __init__(self, api: Api, namespace: str) -> None:
        super().__init__()
        self._api, self._namespace = api, namespace
        self._tokens: dict[tuple[str, str], tuple[float, bytes]] = {}

    def _find(self, kind: str, name: str) -> dict[str, Any] | None:
        return self._api.find(f"/api/v1/namespaces/{self._namespace}/{kind}/{name}")

    def secret(self, name: str) -> dict[str, bytes] | None:
        found = self._find("secrets", name)
        return None if found is None else {k: base64.b64decode(v) for k, v in found.get("data", {}).items()}

    def config_map(self, name: str) -> dict[str, bytes] | None:
        found = self._find("configmaps", name)
        return None if found is None else {k: v.encode() for k, v in found.get("data", {}).items()}

    def claim(self, name: str) -> Path | None:
        claim = self._find("persistentvolumeclaims", name)
        if claim is None or claim["status"].get("phase") != "Bound":
            return None
        volume = self._api.get(f"/api/v1/persistentvolumes/{claim['spec']['volumeName']}")
        return Path(volume["spec"]["hostPath"]["path"])

    def token(self, pod: dict[str, Any], audience: str, expiration_s: int) -> bytes:
        key = pod["metadata"]["uid"], audience
        made_s, token = self._tokens.get(key, (0.0, b""))
        if not token or time.monotonic() - made_s > _RENEW_TOKEN_S:
            bound = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
            account = pod["spec"]["serviceAccountName"]
            spec = {"expirationSeconds": expiration_s, "boundObjectRef": bound}
            token = self._api.token(self._namespace, account, audience, **spec).encode()
            self._tokens[key] = time.monotonic(), token
        return token


class Repeating:
    """Something that is done again and again in a thread; errors of one round are printed and the next is tried."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def round(self) -> None:
        raise NotImplementedError

    def _repeat(self) -> None:
        while not self._stopped.is_set():
            try:
                self.round()
            except Exception:
                traceback.print_exc()
            self._stopped.wait(self._every_s)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


class ClusterNames(Repeating):
    """SERVICE.NAMESPACE.svc, in every pod and caller, is what its Endpoints say now."""

    def __init__(self, api: Api) -> None:
        super().__init__(LOOK_EVERY_S)
        self._api = api
        self.addresses: dict[str, list[str]] = {}
        self.tell: list[Callable[[dict[str, list[str]]], None]] = []

    def round(self) -> None:
        addresses = {}
        for each in self._api.get("/api/v1/endpoints")["items"]:
            name = f"{each['metadata']['name']}.{each['metadata']['namespace']}.svc"
            ready = [address["ip"] for subset in each.get("subsets") or () for address in subset.get("addresses", ())]
            addresses[name] = sorted(ready)
        if addresses != self.addresses:
            self.addresses = addresses
            for tell in list(self.tell):
                tell(addresses)

    @contextlib.contextmanager
    def known_to(self, caller: Namespace) -> Iterator[None]:
        """As long as this lasts, the resolver inside `caller` says what is so."""
        caller.names(self.addresses)
        self.tell.append(caller.names)
        try:
            yield
        finally:
            self.tell.remove(caller.names)


class Node(Repeating):
    """One node, from entry to exit of the context; what runs on it ends with it."""

    def __init__(self, name: str, api: Api, network: PodNetwork, names: ClusterNames) -> None:
        super().__init__(LOOK_EVERY_S)
        self.name = name
        self._api, self._network, self._names = api, network, names
        self.running: dict[str, PodProcess] = {}
        self.ended: dict[str, Ended] = {}
        self._said: dict[str, dict[str, Any]] = {}
        self._ending: dict[str, threading.Thread] = {}
        self._heartbeat_s = 0.0

    def __enter__(self) -> Self:
        labels = {"kubernetes.io/hostname": self.name, "topology.kubernetes.io/zone": self.name}
        body = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": self.name, "labels": labels}}
        self._api.call("POST", "/api/v1/nodes", body)
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for pod in self.running.values():
            pod.close()
        for thread in self._ending.values():
            thread.join()

    def round(self) -> None:
        if time.monotonic() - self._heartbeat_s > _HEARTBEAT_S:
            self._heartbeat()
        bound = self._api.get("/api/v1/pods", fieldSelector=f"spec.nodeName={self.name}")["items"]
        for pod in bound:
            uid = pod["metadata"]["uid"]
            if uid not in self.running and uid not in self._ending and "deletionTimestamp" not in pod["metadata"]:
                self._take(pod)
            if uid in self.running:
                if "deletionTimestamp" in pod["metadata"] and uid not in self._ending:
                    self._ending[uid] = threading.Thread(target=self._end, args=(pod, self.running[uid]), daemon=True)
                    self._ending[uid].start()
                self._say(pod, self.running[uid])
            elif "deletionTimestamp" in pod["metadata"] and uid not in self._ending:
                self._remove(pod)  # it never ran
        there = {pod["metadata"]["uid"] for pod in bound}
        for uid in [uid for uid in self.running if uid not in there and uid not in self._ending]:
            self.running.pop(uid).close()  # removed by force

    def _take(self, pod: dict[str, Any]) -> None:
        namespace = pod["metadata"]["namespace"]
        sources = ApiSources(self._api, namespace)
        running = PodProcess(restored(pod), network=self._network, sources=sources, names=self._names.addresses)
        self.running[pod["metadata"]["uid"]] = running
        self._names.tell.append(running.names)
        running.names(self._names.addresses)

    def _end(self, pod: dict[str, Any], running: PodProcess) -> None:
        running.delete(pod["metadata"].get("deletionGracePeriodSeconds", 30))
        with contextlib.suppress(ApiError):
            self._say(pod, running)
        uid = pod["metadata"]["uid"]
        self._names.tell.remove(running.names)
        self.ended[pod["metadata"]["name"]] = Ended(running.status, running.events, running.log)
        self.running.pop(uid, None)
        self._remove(pod)
        running.close()

    def _remove(self, pod: dict[str, Any]) -> None:
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        with contextlib.suppress(ApiError):
            self._api.call("DELETE", _path(pod), body)

    def _say(self, pod: dict[str, Any], running: PodProcess) -> None:
        uid, status = pod["metadata"]["uid"], running.status
        before = {each["type"]: each for each in self._said.get(uid, {}).get("conditions", ())}
        for condition in status["conditions"]:
            old = before.get(condition["type"], {})
            same = old.get("status") == condition["status"]
            condition["lastTransitionTime"] = old["lastTransitionTime"] if same else _now()
        status["hostIP"] = self._network.host
        if status != self._said.get(uid):
            self._api.merge(f"{_path(pod)}/status", {"status": status})
            self._said[uid] = status

    def _heartbeat(self) -> None:
        conditions = [{"type": "Ready", "status": "True", "reason": "Ready", "lastHeartbeatTime": _now()}]
        size = {"cpu": "8", "memory": "64Gi", "pods": "20"}
        status = {"conditions": conditions, "capacity": size, "allocatable": size}
        self._api.merge(f"/api/v1/nodes/{self.name}/status", {"status": status})
        self._heartbeat_s = time.monotonic()


def _path(pod: dict[str, Any]) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
