"""How much memory there is: of containers as Kubernetes and others make them, of machines, of GPUs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from teacher_server import memory
from teacher_server.memory import Memory, gpus, host_levels

MACHINE = Memory(used=600 * 1024, limit=1000 * 1024)
NO_LIMIT = 9223372036854771712  # what version 1 says where there is none


def make_tree(root: Path, own: str, files: dict[str, dict[str, object]]) -> Path:
    """/proc and /sys/fs/cgroup with these groups, by path below the mount points."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        "MemTotal:  1000 kB\nMemFree:  7 kB\nMemAvailable:  400 kB\nHugePages_Total: 0\n"
    )
    (root / "proc/self/cgroup").write_text(own)
    (root / "sys/fs/cgroup").mkdir(parents=True)
    for group, contents in files.items():
        directory = root / "sys/fs/cgroup" / group
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in contents.items():
            (directory / name).write_text(f"{value}\n")
    return root


def v2(limit: object, used: int, *, inactive: int = 0, active: int = 0) -> dict[str, object]:
    stat = f"anon 1\ninactive_file {inactive}\nactive_file {active}\nslab 3"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def v1(limit: int, used: int, *, inactive: int = 0, active: int = 0) -> dict[str, object]:
    stat = f"cache 5\ninactive_file 99999\ntotal_inactive_file {inactive}\ntotal_active_file {active}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


V1 = "12:pids:/a\n4:cpu,memory:{}\n0::/\n"
V2 = "0::{}\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        pytest.param(V2.format("/"), {"": v2(5000, 900, inactive=100, active=50)}, [Memory(750, 5000)], id="v2 pod"),
        pytest.param(V2.format("/"), {}, [], id="v2, the root of a machine"),
        pytest.param(
            V2.format("/slice/pod"),
            {"slice": v2(8000, 7900), "slice/pod": v2("max", 900)},
            [Memory(7900, 8000)],
            id="v2, the limit stands above",
        ),
        pytest.param(
            V2.format("/slice/pod"),
            {"slice": v2(8000, 7900), "slice/pod": v2(5000, 900)},
            [Memory(900, 5000), Memory(7900, 8000)],
            id="v2, two limits",
        ),
        pytest.param(V2.format("/../other"), {"": v2(5000, 900)}, [Memory(900, 5000)], id="v2, outside its namespace"),
        pytest.param(
            V1.format("/kubepods/pod1"),
            {"memory": v1(5000, 900, inactive=100, active=50)},
            [Memory(750, 5000)],
            id="v1 pod, whose mount is its own group",
        ),
        pytest.param(
            V1.format("/slice/pod"),
            {"memory": v1(NO_LIMIT, 10**6), "memory/slice": v1(8000, 7900), "memory/slice/pod": v1(5000, 900)},
            [Memory(900, 5000), Memory(7900, 8000)],
            id="v1, two limits",
        ),
        pytest.param(V1.format("/"), {"memory": v1(NO_LIMIT, 10**6)}, [], id="v1 without limits"),
    ],
)
def test_levels_are_the_limited_groups_from_the_inside_out_and_then_the_machine(
    tmp_path: Path, own: str, files: dict[str, dict[str, object]], expected: list[Memory]
) -> None:
    assert list(host_levels(make_tree(tmp_path, own, files))) == [*expected, MACHINE]


def test_a_limit_above_what_the_machine_has_is_none(tmp_path: Path) -> None:
    assert list(host_levels(make_tree(tmp_path, V2.format("/"), {"": v2(10**9, 900)}))) == [MACHINE]


def test_a_machine_without_proc_is_not_known(tmp_path: Path) -> None:
    assert list(host_levels(tmp_path)) == []


def test_the_host_is_the_innermost_level_and_what_is_free_the_least_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "gpus", lambda: {})
    monkeypatch.setattr(memory, "host_levels", lambda: iter([Memory(1, 10), Memory(19, 20), Memory(1, 99)]))
    assert memory.devices() == {"host": Memory(1, 10)}
    assert memory.host_free() == 1
    monkeypatch.setattr(memory, "host_levels", lambda: iter([]))
    assert memory.devices() == {}
    assert memory.host_free() is None


def test_this_machine_says_something_that_can_be() -> None:
    for level in host_levels():
        assert 0 < level.used < level.limit
    assert memory.devices()["host"].limit <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class FakeNvml:
    """Two GPUs of 100 bytes; UUIDs are GPU-a and GPU-b."""

    class NVMLError(Exception):
        pass

    def __init__(self, driver: bool = True) -> None:
        self.driver = driver
        self.starts = 0

    def nvmlInit(self) -> None:
        self.starts += 1
        if not self.driver:
            raise self.NVMLError

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise self.NVMLError
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        if name not in ("GPU-a", "GPU-b"):
            raise self.NVMLError
        return "ab".index(name[-1])

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=10 + handle, free=90 - handle, total=100)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    memory._nvml.cache_clear()
    yield fake
    memory._nvml.cache_clear()


FIRST, SECOND = Memory(10, 100), Memory(11, 100)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [FIRST, SECOND]),
        ("0,1", [FIRST, SECOND]),
        ("1, 0", [SECOND, FIRST]),
        ("1", [SECOND]),
        ("GPU-b", [SECOND]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [FIRST]),
        ("1,7,0", [SECOND]),  # as CUDA does it
        ("GPU-nobody", []),
    ],
)
def test_gpus_are_those_that_the_process_may_use_in_its_own_order(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[Memory]
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for _ in range(2):
        assert gpus() == {f"cuda:{index}": found for index, found in enumerate(expected)}
    assert nvml.starts == 1


def test_without_a_driver_there_are_no_gpus_and_it_is_asked_for_once(nvml: FakeNvml) -> None:
    nvml.driver = False
    assert [gpus(), gpus()] == [{}, {}]
    assert nvml.starts == 1
