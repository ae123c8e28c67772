"""One teacher on two nodes, each a process tree of its own: its scores, and what one node does when the other ends.

In one test the nodes share nothing but a wire: the follower has a network, IPC and /dev/shm of its own.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stillhouse.client import TeacherClient
from stillhouse.codec import ScoreTask, encode_request
from stillhouse.errors import Unavailable, from_rpc_error
from stillhouse.v1 import teacher_pb2_grpc as pb_grpc
from tests.chaos.pool_under_test import Namespace, only_when_full, tool
from tests.models import VOCABULARY_SIZE, reference_scores, save_model
from tests.servers import VLLM_SHAPE, environment, interpreter, vllm_arguments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOLERANCE = 2e-4  # nats, as on one node
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
START_S = 400.0  # of a busy machine
LOADING = "world_size=2 rank="  # a worker has begun
LAYOUTS = {
    # One worker a node, which together hold each layer; and two a node, which share its half of the layers.
    "layers shared by nodes": ("qwen3", ("--tensor-parallel-size", "2")),
    "layers shared inside nodes": ("llama", ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2")),
}


@dataclass(frozen=True)
class Node:
    """One node's process, and what it said."""

    process: subprocess.Popen[str]
    log_file: IO[str]

    @property
    def log(self) -> str:
        return Path(self.log_file.name).read_text(encoding="utf-8", errors="replace")

    def said(self, what: str) -> dict[str, str]:
        """The line of standard output that begins so, by key; waits for it."""
        found: list[re.Match[str]] = []

        def here() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.log}"
            found.extend(re.finditer(rf"^teacher-server {what}: (.*)$", self.log, re.MULTILINE))
            return bool(found)

        try:
            wait_for(here, START_S)
        except AssertionError:
            print(self.log)
            raise
        return dict(part.split("=", 1) for part in shlex.split(found[0][1]))

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]


@dataclass(frozen=True)
class Group:
    """A leader and its follower."""

    leader: Node
    follower: Node
    directory: Path

    def tree(self) -> list[psutil.Process]:
        return self.leader.tree() + self.follower.tree()

    def codes(self) -> tuple[int, int]:
        """How both ended."""
        return self.leader.process.wait(60), self.follower.process.wait(60)


def free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def node(directory: Path, *options: str, prefix: Sequence[str] = ()) -> Iterator[Node]:
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        given = vllm_arguments(directory, "--health-listen", "127.0.0.1:0", *options)
        process = subprocess.Popen(
            [*prefix, interpreter("vllm"), "-m", "teacher_server.cli", *given],
            env=environment(),
            stdout=log,
            stderr=log,
            text=True,
        )
        try:
            yield Node(process, log)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def group(
    tmp_path: Path, layout: str = "layers shared by nodes", *, address: str = "127.0.0.1", prefix: Sequence[str] = ()
) -> Iterator[Group]:
    """Both started, at once as a cluster would. layout: of LAYOUTS."""
    family, shape = LAYOUTS[layout]
    directory = save_model(tmp_path / family, family, **VLLM_SHAPE)
    common = (*shape, "--nodes", "2", "--leader-address", f"{address}:{free_port(address)}")
    with (
        node(directory, *common) as leader,
        node(directory, *common, "--node-rank", "1", prefix=prefix) as follower,
    ):
        yield Group(leader, follower, directory)


@contextlib.contextmanager
def far_away() -> Iterator[tuple[str, list[str]]]:
    """This machine's address on a wire to a machine of its own, and the words that run a command there."""
    with Namespace() as other:
        ours, theirs = f"node{os.getpid()}a", f"node{os.getpid()}b"
        ip = tool("ip")
        for words in (
            ("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", other.name),
            ("address", "add", "198.18.77.1/30", "dev", ours),
            ("link", "set", ours, "up"),
            ("-netns", other.name, "address", "add", "198.18.77.2/30", "dev", theirs),
            ("-netns", other.name, "link", "set", theirs, "up"),
        ):
            subprocess.run([ip, *words], check=True)
        script = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        yield "198.18.77.1", [*other.prefix, tool("unshare"), "--ipc", "--mount", "sh", "-c", script, "sh"]


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, f"not within {seconds} s"
        time.sleep(0.05)


def gone(processes: list[psutil.Process]) -> bool:
    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return not any(map(runs, processes))


def health(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            return health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status
        except grpc.RpcError:
            return NOT_SERVING


def make_task(seed: int, length: int, start: int, *, k: int, m: int = 0, temperature: float = 1.0) -> ScoreTask:
    rng = np.random.default_rng(seed)
    return ScoreTask(
        model="",
        token_ids=rng.integers(0, VOCABULARY_SIZE, length).astype(np.int32),
        score_start=start,
        top_k=k,
        candidate_ids=rng.integers(0, VOCABULARY_SIZE, (length - start, m)).astype(np.int32) if m else None,
        temperature=temperature,
    )


def assert_right(directory: Path, client: TeacherClient) -> None:
    """Scores of several kinds of request are those of the float64 reference."""
    worst = 0.0
    for seed, temperature in enumerate((1.0, 0.5)):
        tasks = [
            make_task(seed, 40, 9, k=8, m=6, temperature=temperature),
            make_task(seed + 10, 128, 1, k=0, m=1, temperature=temperature),
            make_task(seed + 20, 2, 1, k=VOCABULARY_SIZE, temperature=temperature),
        ]
        for task in tasks:
            wanted: dict[str, Any] = {
                "score_start": task.score_start,
                "top_k": task.top_k,
                "candidate_ids": task.candidate_ids,
                "temperature": task.temperature,
            }
            scores = client.score(task.token_ids, **wanted)
            for name, expected in reference_scores(directory, task.token_ids, **wanted).items():
                if name != "top_ids" and expected.size:
                    finite = np.isfinite(expected)
                    found = getattr(scores, name)
                    assert np.array_equal(np.isfinite(found), finite), name
                    difference = np.abs(found[finite] - expected[finite]).max(initial=0.0)
                    worst = max(worst, float(difference) * min(1.0, temperature))
    print(f"max_abs_error={worst:.2e}")
    assert worst <= TOLERANCE


def calls_in_flight(channel: grpc.Channel, workers: list[psutil.Process]) -> list[Any]:
    """Calls that stand still with the engine until its processes may go on."""
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    stub = pb_grpc.TeacherServiceStub(channel)
    calls = [stub.Score.future(encode_request(make_task(seed, 100, 1, k=8)), timeout=120) for seed in range(4)]
    time.sleep(1.0)
    assert not any(call.done() for call in calls)
    return calls


@only_when_full
def test_two_nodes_score_as_one_and_a_follower_that_is_asked_to_stop_drains_both(tmp_path: Path) -> None:
    with group(tmp_path) as it:
        ready, follows = it.leader.said("ready"), it.follower.said("follows")
        with TeacherClient([ready["listen"]]) as client:
            assert_right(it.directory, client)
        # To its supervisor the follower is alive and ready, but nobody could take it for a teacher.
        assert (follows["node"], follows["of"]) == ("1", "2")
        port = f"127.0.0.1:{follows['health_port']}"
        assert health(port) == health(port, "liveness") == SERVING
        with urllib.request.urlopen(follows["metrics"], timeout=10) as page:
            series = page.read().decode()
        assert "stillhouse_teacher_memory_used_bytes{" in series and "process_start_time_seconds" in series
        assert "stillhouse_teacher_ready" not in series and "stillhouse_teacher_model_info{" not in series
        assert "listen" not in follows

        processes = it.tree()
        worker = it.follower.tree()[-1]
        with grpc.insecure_channel(ready["listen"]) as channel:
            calls = calls_in_flight(channel, [worker])
            it.follower.process.terminate()
            wait_for(lambda: health(ready["listen"]) == NOT_SERVING, 20)
            assert it.follower.process.poll() is None, "it holds a part of the model that is in use"
            worker.send_signal(signal.SIGCONT)
            for call in calls:
                call.result()
        assert it.codes() == (0, 0)
        wait_for(lambda: gone(processes), 20)
        assert "node 1 was asked to stop" in it.leader.log


def test_two_machines_score_as_one_and_a_follower_that_is_killed_ends_both(tmp_path: Path) -> None:
    layout = "layers shared inside nodes"
    with far_away() as (address, prefix), group(tmp_path, layout, address=address, prefix=prefix) as it:
        ready, _ = it.leader.said("ready"), it.follower.said("follows")
        with TeacherClient([ready["listen"]]) as client:
            assert_right(it.directory, client)
        processes = it.tree()
        with grpc.insecure_channel(ready["listen"]) as channel:
            calls = calls_in_flight(channel, [it.follower.tree()[-1]])
            it.follower.process.kill()
            wait_for(lambda: health(f"127.0.0.1:{ready['health_port']}") == NOT_SERVING, 20)
            for call in calls:
                with pytest.raises(grpc.RpcError) as raised:
                    call.result()
                assert type(from_rpc_error(raised.value)) is Unavailable
        assert it.codes() == (3, -signal.SIGKILL)
        wait_for(lambda: gone(processes), 20)
        last = it.leader.log.splitlines()[-1]
        assert last == "teacher-server: error: the vLLM engine died: node 1 of 2 is gone"


@only_when_full
def test_a_leader_that_is_killed_ends_its_follower(tmp_path: Path) -> None:
    with group(tmp_path) as it:
        it.leader.said("ready")
        processes = it.tree()
        it.leader.process.kill()
        assert it.codes() == (-signal.SIGKILL, 3)
        wait_for(lambda: gone(processes), 20)
        last = it.follower.log.splitlines()[-1]
        assert re.fullmatch(r"teacher-server: error: the leader at 127\.0\.0\.1:\d+ is gone", last)


@only_when_full
@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_a_node_that_is_killed_while_it_loads_ends_the_other(tmp_path: Path, victim: str) -> None:
    with group(tmp_path) as it:
        doomed, other = (it.leader, it.follower) if victim == "leader" else (it.follower, it.leader)
        wait_for(lambda: LOADING in other.log, START_S)
        processes = it.tree()
        doomed.process.kill()
        assert other.process.wait(60) == 3
        wait_for(lambda: gone(processes), 20)
        last = other.log.splitlines()[-1]
        assert last.startswith("teacher-server: error: ") and last.endswith(" is gone")


@only_when_full
def test_a_follower_that_never_comes_is_named_while_the_leader_waits(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "qwen3", **VLLM_SHAPE)
    options = ("--tensor-parallel-size", "2", "--nodes", "2", "--nodes-wait-s", "2")
    port = free_port("127.0.0.1")
    with node(directory, *options, "--leader-address", f"127.0.0.1:{port}") as leader:
        wait_for(lambda: "waiting for nodes=1 of=2" in leader.log, START_S)
        assert leader.process.poll() is None
        assert leader.process.wait(60) == 3
        last = leader.log.splitlines()[-1]
    assert last.startswith(f"teacher-server: error: of 2 nodes 1 did not come to port {port} within 2 s")
