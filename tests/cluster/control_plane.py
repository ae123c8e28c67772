"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler, real, and clients of theirs.

The binaries are what `scripts/build_kubernetes.sh` made. The server listens at the pods' network, port 443, by the name
that pods know it by: kubernetes.default.svc.
"""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.certificates import Authority
from tests.chaos.pool_under_test import ends_with_this_process
from tests.deploy.pod_network import PodNetwork

BINARIES = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "stillhouse/kubernetes-1.20.2/bin"


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status


class Api:
    """The REST API as one user. Each call is a connection of its own, so threads may share one."""

    def __init__(self, address: str, authority: Path, token: str) -> None:
        self._address, self._token = address, token
        self._tls = ssl.create_default_context(cafile=str(authority))

    def call(
        self, method: str, path: str, body: Any = None, *, kind: str = "application/json", **query: str
    ) -> dict[str, Any]:
        """The answer. Raises ApiError."""
        connection = http.client.HTTPSConnection(self._address, 443, timeout=30, context=self._tls)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
        content = None if body is None else json.dumps(body)
        with contextlib.closing(connection):
            connection.request(method, f"{path}?{urlencode(query)}" if query else path, content, headers)
            response = connection.getresponse()
            answer = json.loads(response.read() or b"{}")
        if response.status >= 300:
            raise ApiError(response.status, answer.get("reason", ""), answer.get("message", ""))
        return answer

    def get(self, path: str, **query: str) -> dict[str, Any]:
        return self.call("GET", path, **query)

    def find(self, path: str) -> dict[str, Any] | None:
        """The object, or None if there is none."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    def merge(self, path: str, body: Any) -> dict[str, Any]:
        """A merge patch."""
        return self.call("PATCH", path, body, kind="application/merge-patch+json")

    def token(self, namespace: str, account: str, audience: str, **spec: Any) -> str:
        """A token of a service account, as the kubelet asks for it."""
        body = {"spec": {"audiences": [audience] if audience else [], "expirationSeconds": 3600, **spec}}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        return self.call("POST", path, body)["status"]["token"]


class ControlPlane:
    """The four programs, from entry to exit of the context."""

    def __init__(self, network: PodNetwork) -> None:
        missing = [name for name in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
                   if not (BINARIES / name).exists()]  # fmt: skip
        if missing:
            pytest.skip(f"needs {', '.join(missing)}: scripts/build_kubernetes.sh builds them")
        if shutil.which("kubectl") is None:
            pytest.skip("needs kubectl")
        self._network = network
        self.directory = Path(tempfile.mkdtemp(prefix="stillhouse-cluster-"))
        self.authority = Authority(self.directory / "pki")
        self._token = secrets.token_hex(16)
        self.api = Api(network.host, self.authority.certificate, self._token)
        self.kubeconfig = self.directory / "kubeconfig"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        shutil.rmtree(self.directory)

    def kubectl(self, *words: str, given: Any = None, timeout_s: float = 120.0) -> str:
        """What it prints; fails the test if it fails."""
        done = self.try_kubectl(*words, given=given, timeout_s=timeout_s)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_kubectl(self, *words: str, given: Any = None, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """`given` is for its standard input, as JSON."""
        command = ["kubectl", "--kubeconfig", str(self.kubeconfig), "--cache-dir", str(self.directory), *words]
        content = None if given is None else json.dumps(given)
        return subprocess.run(command, input=content, capture_output=True, text=True, timeout=timeout_s)

    def apply(self, objects: list[dict[str, Any]]) -> None:
        """kubectl apply."""
        self.kubectl("apply", "--filename", "-", given={"apiVersion": "v1", "kind": "List", "items": objects})

    def log(self, program: str) -> str:
        return (self.directory / f"{program}.log").read_text(errors="replace")

    def _start(self) -> None:
        pair = self.authority.server("kubernetes.default.svc", "localhost", self._network.host, name="apiserver")
        tokens = self.directory / "tokens.csv"
        tokens.write_text(f"{self._token},admin,admin,system:masters\n")
        key = self.directory / "accounts.key"
        made = rsa.generate_private_key(65537, 2048)
        key.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
        self._write_kubeconfig()
        client, peer = (f"http://127.0.0.1:{_free_port()}" for _ in range(2))
        store = {"listen-client-urls": client, "advertise-client-urls": client, "listen-peer-urls": peer}
        store |= {"initial-advertise-peer-urls": peer, "initial-cluster": f"default={peer}"}
        self._run("etcd", data_dir=self.directory / "etcd", **store)
        self._run(
            "kube-apiserver",
            etcd_servers=client,
            bind_address=self._network.host,
            advertise_address=self._network.host,
            secure_port=443,
            tls_cert_file=pair.certificate,
            tls_private_key_file=pair.key,
            token_auth_file=tokens,
            authorization_mode="RBAC",
            service_account_key_file=key,
            service_account_signing_key_file=key,
            service_account_issuer="https://kubernetes.default.svc",
            service_cluster_ip_range="10.96.0.0/16",
        )
        self._wait_for("/readyz")
        common = {"kubeconfig": self.kubeconfig, "leader_elect": "false", "port": 0}
        self._run(
            "kube-controller-manager",
            **common,
            secure_port=0,
            service_account_private_key_file=key,
            root_ca_file=self.authority.certificate,
        )
        self._run("kube-scheduler", **common, secure_port=0)
        self._wait_for("/api/v1/namespaces/default/serviceaccounts/default")  # the controllers are at work

    def _run(self, program: str, **options: object) -> None:
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        with (self.directory / f"{program}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [*ends_with_this_process(), str(BINARIES / program), *words], stdout=log, stderr=subprocess.STDOUT
                )
            )

    def _wait_for(self, path: str, within_s: float = 120.0) -> None:
        end_s = time.monotonic() + within_s
        while True:
            for process in self._processes:
                assert process.poll() is None, f"{process.args} ended"
            try:
                self.api.get(path)
                return
            except json.JSONDecodeError:
                return  # /readyz says ok
            except (OSError, ApiError) as error:
                assert time.monotonic() < end_s, f"no {path} in {within_s:g} s: {error}\n{self.log('kube-apiserver')}"
            time.sleep(0.2)

    def _write_kubeconfig(self) -> None:
        cluster = {
            "server": f"https://{self._network.host}:443",
            "certificate-authority": str(self.authority.certificate),
        }
        named = {
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": self._token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        }
        self.kubeconfig.write_text(
            json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "test", **named})
        )


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]
