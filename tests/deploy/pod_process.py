"""A Pod as processes of this machine, run as the kubelet would run it.

```python
with PodNetwork() as network, PodProcess(pod, network=network, sources=Sources(claims={"models": path})) as running:
    running.wait_for(lambda: running.ready, "ready")
    running.address                     # of its own network
    running.delete()                    # preStop, SIGTERM, and SIGKILL after the grace
```

A pod has an address and a host name, and each container a process tree and a root: this machine's files, read-only
where the manifest says so, with its volumes at their paths, an empty /tmp and /run, and the manifest's user, groups
and capabilities. Secrets, ConfigMaps and tokens are exchanged under way, by the symbolic links of a kubelet. Probes,
restarts, hooks, grace and status are a kubelet's; only the pause before a restart is shorter.

Not there: images (programs are those of this checkout's environment, variables those of the Dockerfile), limits of
memory and CPU, seccomp, DNS (`names` stands in for it), subPath, and whatever else raises NotImplementedError.

Needs root, and util-linux and iproute2; tests that make a `PodNetwork` skip without. The parts: `pod_network`,
`pod_references` (volumes and variables), `pod_root` (how a program is started), `pod_container` (starts, probes, end).
"""

import contextlib
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from tests.chaos.pool_under_test import Namespace
from tests.deploy.pod_container import SYNC_S, Container, Surroundings, now
from tests.deploy.pod_network import PodNetwork
from tests.deploy.pod_references import Missing, References, Sources

_numbers = itertools.count()


class PodProcess:
    """One pod, from construction to `delete`; see the module's text. `pod` is an object of kind Pod, or a template."""

    def __init__(
        self,
        pod: dict[str, Any],
        *,
        network: PodNetwork,
        sources: Sources,
        names: dict[str, Sequence[str]] | None = None,
        backoff_s: float = 0.2,
    ) -> None:
        metadata = {"name": f"pod-{next(_numbers)}", "namespace": "default", "uid": "", **pod.get("metadata", {})}
        self.pod: dict[str, Any] = {**pod, "metadata": metadata}
        self.name: str = metadata["name"]
        self.events: list[str] = []
        self.deleting, self.ended = threading.Event(), threading.Event()
        self._directory = Path(tempfile.mkdtemp(prefix="stillhouse-pod-"))
        self._namespace = Namespace()
        self.address = network.add(self._namespace)
        self.names(names or {})
        self.references = References(self.pod, sources, self._directory / "volumes", self.address)
        around = Surroundings(
            *(self.pod, self._namespace, self.address, self.references, self._directory, self.deleting),
            *(self._note, backoff_s),
        )
        spec = pod["spec"]
        self.init_containers = [Container(each, around, init=True) for each in spec.get("initContainers", ())]
        self.containers = [Container(each, around) for each in spec["containers"]]
        self._began = now()
        self._initialized = not self.init_containers
        self._waits = "ContainerCreating", ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # What it is

    @property
    def ready(self) -> bool:
        """Whether it would be sent requests."""
        return self._initialized and all(container.ready for container in self.containers)

    @property
    def phase(self) -> str:
        """Pending, Running, Succeeded or Failed."""
        if self.ended.is_set():
            of = [*self.init_containers, *self.containers]
            return "Succeeded" if all(container.exit_code == 0 for container in of) else "Failed"
        return "Running" if all(container.starts for container in self.containers) else "Pending"

    @property
    def log(self) -> str:
        """What its containers said, over all restarts."""
        return "".join(path.read_text(errors="replace") for path in sorted(self._directory.glob("*.log")))

    @property
    def status(self) -> dict[str, Any]:
        """As the API has it."""
        conditions = {
            "Initialized": self._initialized,
            "Ready": self.ready,
            "ContainersReady": self.ready,
            "PodScheduled": True,
        }
        return {
            "phase": self.phase,
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "startTime": self._began,
            "conditions": [{"type": kind, "status": str(value)} for kind, value in conditions.items()],
            "initContainerStatuses": [container.status(self._waits) for container in self.init_containers],
            "containerStatuses": [container.status(self._waits) for container in self.containers],
        }

    def wait_for(self, condition: Callable[[], Any], what: str = "the condition", within_s: float = 300.0) -> None:
        """Returns once `condition()` holds; fails with the pod's log when it does not in time."""
        end_s = time.monotonic() + within_s
        while not condition():
            told = "\n".join([*self.events, self.log])
            assert time.monotonic() < end_s, f"waited {within_s:g} s for {what} of {self.name}\n{told}"
            time.sleep(0.05)

    # What is done to it

    def names(self, addresses: dict[str, Sequence[str]]) -> None:
        """What the resolver inside says from now on."""
        self._namespace.names({self.name: [self.address], **addresses})

    def delete(self, grace_s: float | None = None) -> None:
        """Ends it as a deleted pod ends; returns when nothing of it runs."""
        self.deleting.set()
        grace_s = self.pod["spec"].get("terminationGracePeriodSeconds", 30) if grace_s is None else grace_s
        stopping = [threading.Thread(target=c.stop, args=(grace_s,)) for c in (*self.init_containers, *self.containers)]
        for thread in stopping:
            thread.start()
        for thread in (*stopping, self._thread):
            thread.join()

    def close(self) -> None:
        """Kills what is left, and removes all that was made for it."""
        if not self.ended.is_set():
            self.delete(0)
        self._namespace.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Its life

    def _run(self) -> None:
        mounted = self._until_there(self.references.mount)
        stop = threading.Event()
        syncing = threading.Thread(target=self._sync, args=(stop,), daemon=True)
        if mounted:
            syncing.start()
        if mounted and all(container.run() == 0 for container in self.init_containers):
            self._initialized = True
            threads = [threading.Thread(target=container.run, daemon=True) for container in self.containers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        stop.set()
        self.ended.set()

    def _sync(self, stop: threading.Event) -> None:
        while not stop.wait(SYNC_S):
            with contextlib.suppress(Missing):
                self.references.mount()

    def _until_there(self, make: Callable[[], None]) -> bool:
        """Tries until nothing is missing any more; False if the pod was deleted before."""
        while not self.deleting.is_set():
            try:
                make()
                return True
            except Missing as error:
                self._waits = "ContainerCreating", str(error)
                self._note(f"FailedMount: {error}")
            self.deleting.wait(SYNC_S)
        return False

    def _note(self, text: str) -> None:
        """Notes what `kubectl describe` would show; the same thing once."""
        if text not in self.events:
            self.events.append(text)
