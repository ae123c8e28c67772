"""Podman for the tests of the images: storage of its own, nothing of the machine's, and all of it gone at the end."""

import contextlib
import functools
import http.server
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.servers import ROOT

# Of podman's defaults: crun refuses the older cgroups, and limits above the machine's own are refused to root too.
_CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=1024:4096"]
netns = "host"
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
RESTRICTED = ("--read-only", "--cap-drop=all", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp")
"""How Kubernetes runs them: the chart's security context."""


class Engine:
    """`podman` with a storage of its own below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "containers.conf").write_text(_CONFIGURATION)
        self.environment = {**os.environ, "CONTAINERS_CONF": str(directory / "containers.conf")}
        self.driver = self._driver()

    def _driver(self) -> str:
        """overlay where the kernel and the file system have it; vfs copies every layer whole."""
        probe = [*self._command("overlay"), "info"]
        works = subprocess.run(probe, env=self.environment, capture_output=True).returncode == 0
        if not works:
            shutil.rmtree(self.directory / "storage", ignore_errors=True)
        return "overlay" if works else "vfs"

    def _command(self, driver: str) -> list[str]:
        storage = ("--root", str(self.directory / "storage"), "--runroot", str(self.directory / "run"))
        return ["podman", *storage, f"--storage-driver={driver}"]

    @property
    def command(self) -> list[str]:
        return self._command(self.driver)

    def __call__(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.command, *arguments], env=self.environment, text=True, capture_output=True, **options
        )
        assert not check or done.returncode == 0, (
            f"{shlex.join(done.args)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def remove(self) -> None:
        """Every container, image and file of this engine."""
        self("rm", "--all", "--force", "--time", "0", check=False)
        self("rmi", "--all", "--force", check=False)
        self("system", "reset", "--force", check=False)
        shutil.rmtree(self.directory)


def debian(engine: Engine) -> str:
    """A Debian 12 as its own installer makes it, by digest: here there need be no registry."""
    name = "localhost/debian"
    if engine("image", "exists", f"{name}:bookworm", check=False).returncode:
        root = engine.directory / "debian"
        shutil.rmtree(root, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", "bookworm", str(root), "http://deb.debian.org/debian"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for rest in (*(root / "var/lib/apt/lists").iterdir(), *(root / "var/cache/apt").iterdir()):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as packed:
            engine("import", "-", f"{name}:bookworm", stdin=packed.stdout)
        shutil.rmtree(root)
    digest = engine("image", "inspect", "--format", "{{.Digest}}", f"{name}:bookworm").stdout.strip()
    return f"{name}@{digest}"


@contextlib.contextmanager
def pip_configuration(directory: Path) -> Iterator[dict[str, str]]:
    """This machine's pip configuration for a build: variables of scripts/build_images.sh.

    What it names by a path is served on the loopback while the build runs, so that nothing has to be mounted.
    """
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^(?:global|:env:)\.(find-links|extra-index-url|index-url|cert)='(.*)'$", listed, re.M))
    authorities = found.pop("cert", os.environ.get("SSL_CERT_FILE", ""))
    handler = functools.partial(_Quiet, directory="/")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        lines = ["[global]", "trusted-host = 127.0.0.1", "timeout = 180"]
        lines += [f"{key} = {_served(value, url)}" for key, value in found.items()]
        variables = {}
        if authorities:
            variables["CA"] = authorities
            lines.append("cert = /run/secrets/ca")
        path = directory / "pip.conf"
        path.write_text("\n".join(lines) + "\n")
        yield {**variables, "PIP_CONF": str(path)}
        server.shutdown()


def _served(value: str, url: str) -> str:
    """Paths among the words of `value`, with or without `file:`, as they are served below `url`."""
    words = (word.removeprefix("file://") for word in value.split())
    return " ".join(f"{url}{word.rstrip('/')}/" if word.startswith("/") else word for word in words)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def build(engine: Engine, base: str, variables: dict[str, str], *names: str) -> None:
    """Builds images by the script that everybody uses: today's Debian packages, PyTorch from where pip is told."""
    given = {
        "ENGINE": shlex.join(engine.command),
        "BASE_IMAGE": base,
        "DEBIAN_SNAPSHOT": "",
        "TORCH_CPU_INDEX": "",
        "TAG": "test",
        "OUTPUT": str(engine.directory / "bills"),
    }
    command = ["nice", "scripts/build_images.sh", *names, "--", "--network", "host"]
    environment = {**engine.environment, **given, **variables}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-8000:]
