"""How a container's program is started: in namespaces of its own, with a root of its own, as the manifest's user.

The root is this machine's below a layer in memory: what is made there for mounts is gone with the container.
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from tests.chaos.pool_under_test import Namespace, ends_with_this_process, tool
from tests.deploy.pod_references import expand, image
from tests.servers import ROOT

_DEVICES = ("null", "zero", "full", "random", "urandom")
_NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child")


def starting(
    network: Namespace,
    pod: dict[str, Any],
    container: dict[str, Any],
    *,
    variables: dict[str, str],
    volumes: dict[str, Path],
    message: Path,
    work: Path,
) -> list[str]:
    """Words that become `unshare`, whose only child is the program.

    message: the file that the program sees as its terminationMessagePath; work: an empty directory.
    """
    program = [expand(word, variables) for word in (*container["command"], *container.get("args", ()))]
    root = _Root(work)
    root.add_system()
    root.add_file(message, container.get("terminationMessagePath", "/dev/termination-log"))
    root.add_file(Path("/etc/hosts"), "/etc/hosts")  # the network's own
    memory = {each["name"]: each["emptyDir"] for each in pod["spec"].get("volumes", ()) if "emptyDir" in each}
    for mounted in container.get("volumeMounts", ()):
        if "subPath" in mounted or "subPathExpr" in mounted:
            raise NotImplementedError("subPath")
        name = mounted["name"]
        if memory.get(name, {}).get("medium"):
            root.add_memory(mounted["mountPath"], memory[name].get("sizeLimit", "64Mi"))
        else:
            root.add_volume(volumes[name], mounted["mountPath"], read_only=mounted.get("readOnly", False))
    root.uncover(ROOT.resolve())
    security = security_of(pod, container)
    if security.get("readOnlyRootFilesystem"):
        root.seal()
    directory = container.get("workingDir", image()[1])
    enter = [tool("chroot"), root.path, *user(security), "env", f"--chdir={directory}"]
    script = f"""
before="$PATH"
PATH=/usr/sbin:/usr/bin:/sbin:/bin
hostname {shlex.quote(pod["metadata"]["name"])}
{root.script}
PATH="$before"
exec {shlex.join(enter)} "$@"
"""
    own = [tool("unshare"), *_NAMESPACES, "/bin/sh", "-euc", script, "sh"]
    return [*network.prefix, *ends_with_this_process(), *own, *program]


def entering(pid: int, pod: dict[str, Any], container: dict[str, Any]) -> list[str]:
    """Words before a command that run it beside a container's program."""
    into = ("--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd")
    return [tool("nsenter"), f"--target={pid}", *into, *user(security_of(pod, container))]


def security_of(pod: dict[str, Any], container: dict[str, Any]) -> dict[str, Any]:
    """The security context of a container, with what it has of its pod."""
    return {**pod["spec"].get("securityContext", {}), **container.get("securityContext", {})}


def user(security: dict[str, Any]) -> list[str]:
    """Words before a command that make it the manifest's user."""
    number = security.get("runAsUser", 0)
    assert not (security.get("runAsNonRoot") and number == 0), "container has runAsNonRoot and image will run as root"
    words = [tool("setpriv"), f"--reuid={number}", f"--regid={security.get('runAsGroup', 0)}", "--pdeathsig=KILL"]
    words.append(f"--groups={security['fsGroup']}" if "fsGroup" in security else "--clear-groups")
    if "ALL" in security.get("capabilities", {}).get("drop", ()):
        words += ["--bounding-set=-all", "--inh-caps=-all"]
    if security.get("allowPrivilegeEscalation") is False:
        words.append("--no-new-privs")
    return [*words, "--"]


class _Root:
    """A shell script that makes a root. It runs as root, in mount and process namespaces of its own."""

    def __init__(self, work: Path) -> None:
        self.path = f"{work}/root"
        self._work = work
        self._lines: list[str] = []
        self._sealed = ["/tmp", "/run", "/dev"]
        self._covered = [*self._sealed]

    @property
    def script(self) -> str:
        return "\n".join(self._lines)

    def add_system(self) -> None:
        """This machine's files, an empty /tmp and /run, the usual devices."""
        self._mount("--make-rprivate", "/")
        self._mount("-t", "tmpfs", "tmpfs", self._work)
        self._do("mkdir", f"{self._work}/upper", f"{self._work}/work", self.path)
        layers = f"lowerdir=/,upperdir={self._work}/upper,workdir={self._work}/work"
        self._mount("-t", "overlay", "-o", layers, "overlay", self.path)
        # In this layer alone: where others may not enter root's home, the pod's user would not find its Python.
        used = (ROOT.resolve(), Path(ROOT / ".venv/bin/python").resolve())
        parents = {parent for path in used for parent in path.parents if parent != Path("/")}
        self._do("chmod", "a+rx", *sorted(f"{self.path}{parent}" for parent in parents))
        if used[0].stat().st_dev != os.stat("/").st_dev:
            self._bind(used[0], str(used[0]), read_only=True)
        for path, mode in (("/tmp", "1777"), ("/run", "755"), ("/dev", "755")):
            self._mount("-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", self.path + path)
        self._mount("-t", "proc", "proc", f"{self.path}/proc")
        self._mount("--rbind", "/sys", f"{self.path}/sys")
        for device in _DEVICES:
            self.add_file(Path(f"/dev/{device}"), f"/dev/{device}")
        self._do("ln", "-s", "/proc/self/fd", f"{self.path}/dev/fd")
        self.add_memory("/dev/shm", "64Mi")

    def add_file(self, source: Path, target: str) -> None:
        """One file, that both sides can write."""
        self._do("touch", self.path + target)
        self._bind(source, target)

    def add_volume(self, source: Path, target: str, *, read_only: bool) -> None:
        """A directory."""
        self._bind(source, self._directory(target), read_only=read_only)

    def add_memory(self, target: str, size: str) -> None:
        """A directory in memory. size: as Kubernetes writes it."""
        target = self._directory(target)
        self._mount("-t", "tmpfs", "-o", f"mode=1777,size={_bytes(size)}", "tmpfs", self.path + target)

    def uncover(self, source: Path) -> None:
        """A directory of this machine, where a mount has hidden it: /tmp is a place for checkouts, too."""
        if any(source.is_relative_to(covered) for covered in self._covered):
            self._do("mkdir", "-p", self.path + str(source))
            self._bind(source, str(source), read_only=True)

    def seal(self) -> None:
        """Everything but what was added is read-only from here on."""
        for path in self._sealed:
            self._mount("-o", "remount,ro", self.path + path)
        self._mount("-o", "remount,ro", self.path)

    def _directory(self, target: str) -> str:
        # Links on the way (/var/run) are this machine's; they must not lead out of the root.
        target = os.path.realpath(target)
        self._do("mkdir", "-p", self.path + target)
        self._covered.append(target)
        if target in self._sealed:
            self._sealed.remove(target)
        return target

    def _bind(self, source: Path, target: str, *, read_only: bool = False) -> None:
        self._mount("--bind", source, self.path + target)
        if read_only:
            self._mount("-o", "remount,bind,ro", self.path + target)

    def _mount(self, *words: object) -> None:
        self._do("mount", *map(str, words))

    def _do(self, *words: str) -> None:
        self._lines.append(shlex.join(words))


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMGT]i?)?", str(quantity)).groups()  # type: ignore[union-attr]
    return int(number) * (1 if unit is None else (1024 if unit.endswith("i") else 1000) ** ("KMGT".index(unit[0]) + 1))
