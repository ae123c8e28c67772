"""`student-trainer launch` as a supervisor meets it: real launchers, real workers, their exit statuses.

One node is one launcher with two workers; two nodes are two launchers with one worker each, that meet on this machine.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from student_trainer.checkpoint import saved_steps
from tests.chaos.pool_under_test import only_when_full
from tests.fakes import ROOT, FakeServer, child_environment
from tests.toy import ToyTeacher, write_config

LIMIT_S = 250  # for anything to happen at all
STOPPED = 75


@pytest.fixture
def teacher():
    with FakeServer(ToyTeacher()) as server:
        yield server


class Launcher:
    """A running `student-trainer launch`; what it and its workers say is in a file."""

    def __init__(self, options: list[str], config: Path, *arguments: str, name: str = "node") -> None:
        self.log_path = config.parent / f"{name}.log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "student_trainer.cli",
                    "launch",
                    *options,
                    "--",
                    "train",
                    str(config),
                    *arguments,
                ],
                cwd=ROOT,
                env=child_environment() | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def workers(self) -> list[psutil.Process]:
        """By rank on this node."""
        children = psutil.Process(self.process.pid).children()
        found = [child for child in children if "train" in child.cmdline()]
        return sorted(found, key=lambda child: int(child.environ()["LOCAL_RANK"]))

    def status(self) -> int:
        """Its exit status, once it has ended."""
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it never ended:\n{self.log}")


@contextlib.contextmanager
def launched(
    nodes: int,
    config: Path,
    *arguments: str,
    options: tuple[str, ...] = (),
    of_each: tuple[tuple[str, ...], ...] = ((), ()),
) -> Iterator[list[Launcher]]:
    """Two workers on one node or on two; whatever is left of them is killed at the end.

    of_each: further arguments, for each of two nodes its own.
    """
    if nodes == 1:
        launchers = [Launcher(["--standalone", "--nproc-per-node=2", *options], config, *arguments)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
        meeting += ["--rdzv-id=test", *options]
        launchers = [
            Launcher(meeting, config, *arguments, *own, name=f"node-{index}") for index, own in enumerate(of_each)
        ]
    try:
        yield launchers
    finally:
        for launcher in launchers:
            if launcher.process.poll() is None:
                for process in [*psutil.Process(launcher.process.pid).children(recursive=True), launcher.process]:
                    process.kill()
                launcher.process.wait()


def until(condition: Callable[[], Any], launchers: list[Launcher]) -> Any:
    """What `condition` gives, once it is true."""
    end_s = time.monotonic() + LIMIT_S
    while not (found := condition()):
        logs = "\n".join(launcher.log for launcher in launchers)
        assert time.monotonic() < end_s, f"it never happened:\n{logs}"
        assert all(launcher.process.poll() is None for launcher in launchers), f"a launcher ended:\n{logs}"
        time.sleep(0.05)
    return found


def wait_for_step(config: Path, step: int, launchers: list[Launcher]) -> None:
    path = config.parent / "run" / "metrics.jsonl"
    until(lambda: path.exists() and path.read_text().count("\n") >= step, launchers)


def resumable(config: Path) -> bool:
    """Whether the newest checkpoint is of the last step that was told."""
    run = config.parent / "run"
    (last,) = saved_steps(run / "checkpoints")[-1:]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return last >= steps[-1] > 0


def test_a_run_that_is_done_ends_every_launcher_with_0(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address, steps=2)
    with launched(2, config, f"--stopped-status={STOPPED}") as launchers:
        assert [launcher.status() for launcher in launchers] == [0, 0], launchers[0].log
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("nodes", "told"),
    [(2, [1]), pytest.param(1, [0], marks=only_when_full), pytest.param(2, [0], marks=only_when_full)],
)
def test_stopped_on_any_node_the_run_is_saved_as_a_whole_and_every_launcher_says_so(teacher, tmp_path, nodes, told):
    config = write_config(tmp_path, teacher.address, steps=100_000)
    with launched(nodes, config, f"--stopped-status={STOPPED}") as launchers:
        wait_for_step(config, 3, launchers)
        for index in told:
            launchers[index].process.terminate()
        assert [launcher.status() for launcher in launchers] == [STOPPED] * nodes, launchers[0].log
    assert resumable(config)


@only_when_full
def test_a_worker_that_takes_its_time_to_end_is_not_killed(teacher, tmp_path):
    """torchelastic kills what is left 30 s after the first worker ended with another status than 0."""
    config = write_config(tmp_path, teacher.address, steps=100_000)
    slow = "prompts.verifier.function=tests.integration.test_launch:slow_to_end_in_the_second_process"
    with launched(1, config, slow, f"--stopped-status={STOPPED}") as (launcher,):
        wait_for_step(config, 1, [launcher])
        launcher.process.terminate()
        assert launcher.status() == STOPPED, launcher.log


def slow_to_end_in_the_second_process(completion: str, answer: Any, entry: dict[str, Any]) -> float:
    if os.environ["RANK"] == "1":
        atexit.unregister(time.sleep)
        atexit.register(time.sleep, 35)
    return 1.0


@only_when_full
def test_stopped_with_the_default_status_no_launcher_waits_for_another(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address, steps=100_000)
    with launched(2, config) as launchers:
        wait_for_step(config, 3, launchers)
        launchers[1].process.terminate()
        assert [launcher.status() for launcher in launchers] == [0, 0], launchers[0].log
    assert resumable(config)


@pytest.mark.parametrize("told", [0, 1], ids=["that has its scores", "that waits for the teacher"])
def test_a_node_that_is_drained_in_an_outage_of_the_teachers_does_not_wait_for_its_end(tmp_path, told):
    """The outage would last for two hours, and only one of the two processes is told to stop.

    The other node's teacher is gone, so the first process waits in a meeting, where PyTorch runs no signal handler.
    """
    with FakeServer(ToyTeacher()) as teacher, FakeServer(ToyTeacher()) as lost:
        config = write_config(tmp_path, teacher.address, steps=100_000, checkpoints={"every_steps": 1})
        addresses = tuple((f"teacher.addresses=[{server.address}]",) for server in (teacher, lost))
        with launched(2, config, f"--stopped-status={STOPPED}", of_each=addresses) as launchers:
            wait_for_step(config, 3, launchers)
            lost.stop()
            until(lambda: "the run waits (up to 7200 s)" in launchers[1].log, launchers)
            until(lambda: "waiting for the other processes of the run, 1" in launchers[0].log, launchers)
            assert "the run waits" not in launchers[0].log
            launchers[told].process.terminate()
            assert [launcher.status() for launcher in launchers] == [STOPPED] * 2, launchers[0].log
    assert resumable(config)


@only_when_full
def test_a_drain_before_there_is_a_teacher_stops_the_start_everywhere(tmp_path):
    config = write_config(tmp_path, "127.0.0.1:9")
    with launched(2, config, f"--stopped-status={STOPPED}", "teacher.start_deadline_s=7200") as launchers:
        until(lambda: all("waiting for the teacher" in launcher.log for launcher in launchers), launchers)
        launchers[1].process.terminate()
        assert [launcher.status() for launcher in launchers] == [STOPPED] * 2, launchers[0].log


def test_told_when_its_worker_has_just_begun_it_ends_as_stopped_and_so_does_the_other(teacher, tmp_path):
    """A worker that imports PyTorch cannot listen yet."""
    with launched(2, write_config(tmp_path, teacher.address, steps=100_000), "--stopped-status=75") as launchers:
        until(lambda: launchers[1].workers(), launchers)
        launchers[1].process.terminate()
        assert [launcher.status() for launcher in launchers] == [STOPPED] * 2, launchers[0].log


def test_told_before_the_nodes_have_met_it_ends_as_stopped(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    alone = Launcher(options, write_config(tmp_path, None, objective={"recipe": "grpo"}), "--stopped-status=75")
    try:
        until(lambda: _listens(port), [alone])
        alone.process.terminate()
        assert alone.status() == STOPPED, alone.log
    finally:
        alone.process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_configuration_that_is_refused_ends_with_2_and_every_log_says_why(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address)
    with launched(2, config, "rollout.prompts_per_step=1") as launchers:
        assert [launcher.status() for launcher in launchers] == [2, 2], launchers[0].log
    assert all("each needs at least one prompt" in launcher.log for launcher in launchers)


@pytest.mark.parametrize("nodes", [2, pytest.param(1, marks=only_when_full)])
def test_a_verifier_that_raises_in_one_process_ends_every_launcher_with_1(teacher, tmp_path, nodes):
    config = write_config(tmp_path, teacher.address, steps=100_000)
    broken = "prompts.verifier.function=tests.integration.test_launch:broken_in_the_second_process"
    with launched(nodes, config, broken, f"--stopped-status={STOPPED}") as launchers:
        assert [launcher.status() for launcher in launchers] == [1] * nodes, launchers[0].log
    logs = "\n".join(launcher.log for launcher in launchers)
    assert "process 1 of 2 failed: VerifierError" in logs and "the sandbox is gone" in logs


def broken_in_the_second_process(completion: str, answer: Any, entry: dict[str, Any]) -> float:
    if os.environ["RANK"] == "1":
        raise RuntimeError("the sandbox is gone")
    return 1.0


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=only_when_full)])
def test_a_process_that_is_killed_ends_its_own_launcher_with_its_signal_and_the_other_with_3(teacher, tmp_path, rank):
    config = write_config(tmp_path, teacher.address, steps=100_000)
    with launched(2, config, f"--stopped-status={STOPPED}") as launchers:
        wait_for_step(config, 3, launchers)
        (victims,) = [launcher for launcher in launchers if launcher.workers()[0].environ()["RANK"] == str(rank)]
        victims.workers()[0].kill()
        others = launchers[0] if victims is launchers[1] else launchers[1]
        assert (victims.status(), others.status()) == (128 + signal.SIGKILL, 3), others.log


@only_when_full
def test_a_process_that_is_killed_beside_another_names_its_signal(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address, steps=100_000)
    with launched(1, config) as (launcher,):
        wait_for_step(config, 3, [launcher])
        launcher.workers()[1].kill()
        assert launcher.status() == 128 + signal.SIGKILL, launcher.log


def test_a_node_that_vanishes_ends_the_other_with_3(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address, steps=100_000)
    with launched(2, config, f"--stopped-status={STOPPED}") as launchers:
        wait_for_step(config, 3, launchers)
        gone, other = launchers  # the first has the rendezvous, most often
        for process in [*gone.workers(), gone.process]:
            process.kill()
        assert other.status() == 3, other.log


@only_when_full
def test_restarts_are_for_what_was_lost_and_not_for_what_would_come_again(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address, steps=100_000, checkpoints={"every_steps": 1})
    with launched(1, config, "--resume", f"--stopped-status={STOPPED}", options=("--max-restarts=3",)) as (launcher,):
        wait_for_step(config, 3, [launcher])
        launcher.workers()[0].kill()
        until(lambda: "resuming after step" in launcher.log, [launcher])
        launcher.process.terminate()
        assert launcher.status() == STOPPED, launcher.log
    assert launcher.log.count("resuming after step") == 1
    with launched(1, config, "--resume", "seed=1", options=("--max-restarts=3",)) as (launcher,):
        assert launcher.status() == 2
    assert launcher.log.count("was begun with another configuration") == 1


def test_an_option_that_torchrun_does_not_know_is_refused(tmp_path):
    config = write_config(tmp_path, None, objective={"recipe": "grpo"})
    with launched(1, config, options=("--nproc-per-knode=2",)) as (launcher,):
        assert launcher.status() == 2 and "unrecognized arguments: --nproc-per-knode=2" in launcher.log
    with launched(1, config, options=("--nproc-per-node=many",)) as (launcher,):
        assert launcher.status() == 2 and "Unsupported nproc_per_node value: many" in launcher.log
    assert not re.search("Traceback", launcher.log)
