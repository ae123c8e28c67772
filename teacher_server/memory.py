"""How much memory there is and how much of it is used: of the container or the machine, and of each GPU.

Cheap enough for every scrape. What only caches files counts as free, since the kernel gives it up before it kills:
weights on a CPU that are read as they are stored are such a cache.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HOST = "host"


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one device, bytes."""

    used: int
    limit: int

    @property
    def free(self) -> int:
        """What is left."""
        return self.limit - self.used


def devices() -> dict[str, Memory]:
    """`host`, which is the container if that has a limit or else the machine (Linux only), and `cuda:0` and so on."""
    found = next(host_levels(), None)
    return ({} if found is None else {HOST: found}) | gpus()


def host_free() -> int | None:
    """What this process may still take: a limit may also stand above its own container's. None: not known."""
    return min((level.free for level in host_levels()), default=None)


def host_levels(root: Path = Path("/")) -> Iterator[Memory]:
    """Whatever limits this process, from the inside out: its cgroup, those above it, the machine."""
    with contextlib.suppress(FileNotFoundError):
        fields = (line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        sizes = {name: 1024 * int(value.split()[0]) for name, value in fields}
        machine = Memory(sizes["MemTotal"] - sizes["MemAvailable"], sizes["MemTotal"])
        yield from (level for level in _cgroups(root) if level.limit < machine.limit)  # "none" is a huge number in v1
        yield machine


def _cgroups(root: Path) -> Iterator[Memory]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used, prefix = "", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mount, limit, used, prefix = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        top = root / "sys/fs/cgroup" / mount
        level = top / path.lstrip("/")
        if ".." in level.parts or not level.is_dir():  # the path is the host's, and the mount is our own group
            level = top
        while True:
            with contextlib.suppress(FileNotFoundError):  # version 2 has no limit at the top, nor a file for it
                text = (level / limit).read_text().strip()
                if text != "max":
                    stat = dict(row.split() for row in (level / "memory.stat").read_text().splitlines())
                    cached = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
                    yield Memory(int((level / used).read_text()) - cached, int(text))
            if level == top:
                break
            level = level.parent


def gpus() -> dict[str, Memory]:
    """Each CUDA device that this process may use, by NVML: torch would take some of a device's memory to ask it."""
    nvml = _nvml()
    if nvml is None:
        return {}
    found: dict[str, Memory] = {}
    with contextlib.suppress(nvml.NVMLError):  # CUDA too sees no device from the first wrong name on
        for index, handle in enumerate(_visible(nvml)):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            found[f"cuda:{index}"] = Memory(int(memory.used), int(memory.total))
    return found


def _visible(nvml: Any) -> Iterator[Any]:
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        names = ",".join(map(str, range(nvml.nvmlDeviceGetCount())))
    for name in filter(None, map(str.strip, names.split(","))):
        if name.startswith("-"):
            return
        by_index = name.isdigit()
        yield nvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else nvml.nvmlDeviceGetHandleByUUID(name)


@cache
def _nvml() -> Any | None:
    """NVML's binding, started; None without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
