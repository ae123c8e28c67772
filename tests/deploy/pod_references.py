"""What a pod refers to: its volumes as directories of this machine, and its containers' variables."""

import functools
import os
import re
import shlex
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dockerfile_parse import DockerfileParser

from tests.servers import ROOT

DOCKERFILE = ROOT / "deploy/images/Dockerfile"


@dataclass
class Sources:
    """What the volumes and variables of pods refer to; change it under way, and pods follow."""

    secrets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    config_maps: dict[str, dict[str, bytes]] = field(default_factory=dict)
    claims: dict[str, Path] = field(default_factory=dict)

    def secret(self, name: str) -> dict[str, bytes] | None:
        return self.secrets.get(name)

    def config_map(self, name: str) -> dict[str, bytes] | None:
        return self.config_maps.get(name)

    def claim(self, name: str) -> Path | None:
        return self.claims.get(name)

    def token(self, pod: dict[str, Any], audience: str, expiration_s: int) -> bytes:
        """A token of the pod's service account."""
        return f"token-for-{audience}".encode()


@functools.cache
def image() -> tuple[dict[str, str], str]:
    """Variables and working directory of the images, but with this checkout's programs."""
    variables: dict[str, str] = {}
    directory = "/"
    for step in DockerfileParser(str(DOCKERFILE)).structure:
        if step["instruction"] == "ENV":
            variables |= dict(word.split("=", 1) for word in shlex.split(step["value"]))
        elif step["instruction"] == "WORKDIR":
            directory = step["value"]
    path = f"{ROOT}/.venv/bin:/usr/local/bin:/usr/bin:/bin"
    return {**variables, "PATH": path, "OMP_NUM_THREADS": "1"}, directory  # threads: several share this machine


class Missing(Exception):
    """Something that the pod refers to is not there (yet); the text is what `kubectl describe` would say."""


class References:
    """Those of one pod. `volumes`: where each of its volumes lies."""

    def __init__(self, pod: dict[str, Any], sources: Sources, directory: Path, address: str) -> None:
        self._pod, self._sources, self._directory, self._address = pod, sources, directory, address
        self._spec: dict[str, Any] = pod["spec"]
        self.volumes: dict[str, Path] = {}

    def variables(self, container: dict[str, Any]) -> dict[str, str]:
        """The environment of a container. Raises Missing."""
        if container.get("envFrom"):
            raise NotImplementedError("envFrom")
        variables = image()[0] | {"HOSTNAME": self._pod["metadata"]["name"]}
        for entry in container.get("env", ()):
            value = self._variable(entry, variables)
            if value is not None:
                variables[entry["name"]] = value
        return variables

    def mount(self) -> None:
        """Makes its volumes, or what changed of them. Raises Missing."""
        for volume in self._spec.get("volumes", ()):
            name, path = volume["name"], self._directory / volume["name"]
            if name in self.volumes and not {"secret", "configMap", "projected"} & set(volume):
                continue
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                found = self._sources.claim(claim)
                if found is None:
                    raise Missing(f'persistentvolumeclaim "{claim}" not found')
                self._own_by_group(found, read_only=volume["persistentVolumeClaim"].get("readOnly", False))
                self.volumes[name] = found
                continue
            if "emptyDir" in volume:
                path.mkdir(parents=True)
                path.chmod(0o777)
            else:
                _project(path, self._files(volume), self.group)
            self.volumes[name] = path

    def _own_by_group(self, path: Path, *, read_only: bool) -> None:
        """fsGroup, with fsGroupChangePolicy OnRootMismatch."""
        if self.group is None or read_only:
            return
        status = path.stat()
        if status.st_gid != self.group or status.st_mode & 0o2770 != 0o2770:
            for each in (path, *path.rglob("*")):
                os.lchown(each, -1, self.group)
                if not each.is_symlink():
                    each.chmod(each.stat().st_mode | (0o2770 if each.is_dir() else 0o660))

    @property
    def group(self) -> int | None:
        return self._spec.get("securityContext", {}).get("fsGroup")

    def _files(self, volume: dict[str, Any]) -> dict[str, tuple[bytes, int]]:
        """Content and mode of a volume's files, by path."""
        match volume:
            case {"secret": source}:
                return self._keys("secret", source["secretName"], source, source.get("defaultMode", 0o644))
            case {"configMap": source}:
                return self._keys("configmap", source["name"], source, source.get("defaultMode", 0o644))
            case {"projected": projected}:
                mode, files = projected.get("defaultMode", 0o644), {}
                for source in projected["sources"]:
                    files |= self._projected(source, mode)
                return files
        raise NotImplementedError(f"volume {volume}")

    def _projected(self, source: dict[str, Any], mode: int) -> dict[str, tuple[bytes, int]]:
        match source:
            case {"serviceAccountToken": token}:
                seconds = token.get("expirationSeconds", 3600)
                return {token["path"]: (self._sources.token(self._pod, token.get("audience", ""), seconds), mode)}
            case {"secret": inner}:
                return self._keys("secret", inner["name"], inner, mode)
            case {"configMap": inner}:
                return self._keys("configmap", inner["name"], inner, mode)
            case {"downwardAPI": inner}:
                return {
                    item["path"]: (self._field(item["fieldRef"]["fieldPath"]).encode(), mode) for item in inner["items"]
                }
        raise NotImplementedError(f"projected source {source}")

    def _keys(self, kind: str, name: str, source: dict[str, Any], mode: int) -> dict[str, tuple[bytes, int]]:
        data = self._sources.secret(name) if kind == "secret" else self._sources.config_map(name)
        if data is None:
            if source.get("optional"):
                return {}
            raise Missing(f'{kind} "{name}" not found')
        if "items" not in source:
            return {key: (content, mode) for key, content in data.items()}
        return {item["path"]: (data[item["key"]], item.get("mode", mode)) for item in source["items"]}

    def _field(self, path: str) -> str:
        """What a fieldRef refers to."""
        metadata = self._pod["metadata"]
        if found := re.fullmatch(r"metadata\.(labels|annotations)\['(.*)'\]", path):
            return metadata.get(found[1], {}).get(found[2], "")
        values = {
            "status.podIP": self._address,
            "spec.nodeName": self._spec.get("nodeName", "node"),
            "spec.serviceAccountName": self._spec.get("serviceAccountName", "default"),
            **{f"metadata.{key}": metadata[key] for key in ("name", "namespace", "uid")},
        }
        if path not in values:
            raise NotImplementedError(f"fieldRef {path}")
        return values[path]

    def _variable(self, entry: dict[str, Any], before: dict[str, str]) -> str | None:
        """Value of an entry of `env`; None if it is optional and not there."""
        match entry.get("valueFrom"):
            case None:
                return expand(entry.get("value", ""), before)
            case {"fieldRef": reference}:
                return self._field(reference["fieldPath"])
            case {"secretKeyRef": reference}:
                kind, data = "secret", self._sources.secret(reference["name"])
            case {"configMapKeyRef": reference}:
                kind, data = "configmap", self._sources.config_map(reference["name"])
            case other:
                raise NotImplementedError(f"valueFrom {other}")
        if data is None or reference["key"] not in data:
            if reference.get("optional"):
                return None
            raise Missing(f"couldn't find key {reference['key']} in {kind} {reference['name']}")
        return data[reference["key"]].decode()


def expand(text: str, variables: dict[str, str]) -> str:
    """$(NAME) as Kubernetes replaces it: what is unknown stays, $$ is one $."""
    return re.sub(
        r"\$\$|\$\(([A-Za-z_.-][\w.-]*)\)",
        lambda found: "$" if found[1] is None else variables.get(found[1], found[0]),
        text,
    )


def _project(directory: Path, files: dict[str, tuple[bytes, int]], group: int | None) -> None:
    """Makes these a volume's files, all at once, by the kubelet's links: NAME -> ..data/NAME, ..data -> ..TIME."""
    directory.mkdir(parents=True, exist_ok=True)
    link = directory / "..data"
    old = Path(os.readlink(link)) if link.is_symlink() else None
    if old and {str(p.relative_to(link)): p.read_bytes() for p in link.rglob("*") if p.is_file()} == {
        name: content for name, (content, _) in files.items()
    }:
        return
    new = directory / f"..{time.time_ns()}"
    new.mkdir(mode=0o755)
    for name, (content, mode) in files.items():
        path = new / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if group is not None:
            os.chown(path, 0, group)
        path.chmod(mode if group is None else mode | 0o440)
    temporary = directory / "..data_tmp"
    temporary.symlink_to(new.name)
    temporary.rename(link)
    tops = {Path(name).parts[0] for name in files}
    for name in tops:
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(f"..data/{name}")
    for path in directory.iterdir():
        if not path.name.startswith("..") and path.name not in tops:
            path.unlink()
    if old is not None:
        shutil.rmtree(directory / old)
