"""The network of pods that `tests.deploy.pod_process` runs."""

import itertools
import json
import os
import subprocess
from typing import Self

from tests.chaos.pool_under_test import Namespace, command, tool

_numbers = itertools.count()


class PodNetwork:
    """A bridge between pods and this machine, whose own address in it is `host`."""

    def __init__(self) -> None:
        for needed in ("unshare", "nsenter", "setpriv", "mount", "chroot"):
            tool(needed)
        self._bridge = Namespace()
        taken = {route["dst"].rpartition(".")[0] for route in json.loads(command("ip", "-json", "-4", "route"))}
        number = os.getpid() * 7 + next(_numbers)
        while (prefix := f"10.{200 + number // 250 % 50}.{number % 250}") in taken:
            number += 1
        self._prefix, self._hosts = prefix, itertools.count(2)
        self.host = f"{prefix}.1"
        self._link = f"sh{number % 10**9}"
        inside = self._bridge.name
        try:
            self._bridge.run("ip", "link", "add", "bridge", "type", "bridge")
            self._bridge.run("ip", "link", "set", "bridge", "up")
            command("ip", "link", "add", self._link, "type", "veth", "peer", "name", "host", "netns", inside)
            self._bridge.run("ip", "link", "set", "host", "master", "bridge", "up")
            command("ip", "address", "add", f"{self.host}/24", "dev", self._link)
            command("ip", "link", "set", self._link, "up")
        except BaseException:
            self.close()
            raise

    def add(self, pod: Namespace) -> str:
        """Connects a network namespace; its address."""
        number = next(self._hosts)
        address = f"{self._prefix}.{number}"
        ends = ("eth0", "type", "veth", "peer", "name", f"pod{number}", "netns", self._bridge.name)
        pod.run("ip", "link", "add", *ends)
        self._bridge.run("ip", "link", "set", f"pod{number}", "master", "bridge", "up")
        pod.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        pod.run("ip", "link", "set", "eth0", "up")
        pod.run("ip", "route", "add", "default", "via", self.host)
        return address

    def close(self) -> None:
        """Removes it."""
        subprocess.run([tool("ip"), "link", "delete", self._link], capture_output=True)
        self._bridge.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
