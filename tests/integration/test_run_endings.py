"""How a run ends, seen from outside: its exit status, and what its metrics page says while there still is one."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import ROOT, FakeServer, child_environment
from tests.toy import ToyTeacher, write_config

LIMIT_S = 250  # for anything to happen at all
FOR_EVER = "metrics_hold_s=36000"
TRAIN = ("train",)
TWO_ON_ONE_NODE = ("launch", "--standalone", "--nproc-per-node=2", "--", "train")


@pytest.fixture
def teacher():
    with FakeServer(ToyTeacher()) as server:
        yield server


class Run:
    """A program that trains, in a process of its own, and its page."""

    def __init__(self, config: Path, *overrides: str, command: tuple[str, ...] = TRAIN) -> None:
        self.log_path = config.with_suffix(".log")
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "student_trainer.cli", *command, str(config), "metrics_port=0", *overrides],
                cwd=ROOT,
                env=child_environment() | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *unused: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # a launcher takes its workers with it
            self.process.wait(LIMIT_S)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def page(self) -> str:
        """What Prometheus would read now."""
        (url,) = re.findall(r"^metrics at (\S+)$", self.until(lambda: "metrics at" in self.log and self.log), re.M)
        return urllib.request.urlopen(url, timeout=20).read().decode()

    def metric(self, name: str) -> float | None:
        found = re.search(rf"^stillhouse_student_{re.escape(name)} (\S+)$", self.page(), re.M)
        return float(found[1]) if found else None

    def reasons(self) -> list[str]:
        return re.findall(r'^stillhouse_student_failed\{reason="(\w+)"\} 1\.0$', self.page(), re.M)

    def until(self, condition: Callable[[], Any]) -> Any:
        end_s = time.monotonic() + LIMIT_S
        while not (found := condition()):
            assert time.monotonic() < end_s, f"it never happened:\n{self.log}"
            assert self.process.poll() is None, f"it ended:\n{self.log}"
            time.sleep(0.05)
        return found

    def status(self) -> int:
        return self.process.wait(LIMIT_S)


def test_a_run_that_is_stopped_ends_with_the_status_it_was_given(teacher, tmp_path):
    with Run(write_config(tmp_path, teacher.address), "steps=100000", "--stopped-status", "75") as run:
        run.until(lambda: run.metric("step"))
        run.process.terminate()
        assert run.status() == 75 and "stopped by SIGTERM: saved" in run.log
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_signal_to_a_program_that_is_about_to_end_does_not_change_its_status(teacher, tmp_path):
    """Torchelastic sends one to a worker when another node's launcher is gone, which may have been quicker."""
    slow = "prompts.verifier.function=tests.integration.test_run_endings:slow_to_leave"
    with Run(write_config(tmp_path, teacher.address), slow, "steps=1") as run:
        run.until(lambda: "leaving" in run.log)
        run.process.terminate()
        assert run.status() == 0


def slow_to_leave(completion: str, answer: Any, entry: dict[str, Any]) -> float:
    """Leaves something that Python ends last of all, when its handlers of signals are gone."""
    program = vars(sys.modules["__main__"])
    program["left"] = program.get("left") or _Slow()
    return 1.0


class _Slow:
    def __del__(self, write: Callable[[int, bytes], int] = os.write, sleep: Callable[[float], None] = time.sleep):
        write(2, b"leaving\n")
        sleep(3.0)


@pytest.mark.parametrize("status", ["1", "2", "3", "-1", "256", "seventy"])
def test_a_status_that_means_something_else_is_refused(tmp_path, status):
    done = subprocess.run(
        [sys.executable, "-m", "student_trainer.cli", "train", "config.yaml", f"--stopped-status={status}"],
        env=child_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 2 and re.search(r"(means that a run failed|is no exit status); choose", done.stderr)


def test_the_page_is_there_before_the_teacher_and_says_how_long_it_has_been_missing(tmp_path):
    config = write_config(tmp_path, "127.0.0.1:9")
    with Run(config, "teacher.start_deadline_s=36000", "teacher.model=oak", "--stopped-status=75") as run:
        run.until(lambda: run.metric("teacher_outage_now_s"))
        page = run.page()
        assert 'recipe="reverse_kl_rewards",teacher_model="oak",teacher_revision=""' in page
        assert run.metric("steps") == 10 and run.metric("step") == 0 and run.reasons() == []
        run.process.terminate()
        assert run.status() == 75


def test_the_page_of_a_run_that_goes_on(tmp_path):
    with FakeServer(ToyTeacher()) as teacher:
        teacher.faults.hang_at(method="GetTeacher")
        config = write_config(tmp_path, teacher.address, steps=100_000)
        with Run(config, "checkpoints.every_steps=3", "teacher.start_deadline_s=600") as run:
            begun_s = run.metric("last_checkpoint_timestamp_seconds")
            assert begun_s is not None and run.metric("last_step_timestamp_seconds") == pytest.approx(begun_s, abs=1)
            teacher.release()
            run.until(lambda: run.metric("last_checkpoint_timestamp_seconds") > begun_s)
            assert run.metric("step") >= 3 and run.metric("last_step_timestamp_seconds") > begun_s
            assert 'teacher_model="bigram",teacher_revision="r1"' in run.page()
            assert run.metric("teacher_outage_now_s") == 0.0 and run.metric("kl") is not None


def test_a_resumed_runs_checkpoint_is_as_old_as_it_is(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address, steps=2)
    with Run(config) as run:
        assert run.status() == 0
    sealed = tmp_path / "run" / "checkpoints" / "step-2" / "checksums.json"
    os.utime(sealed, (1e9, 1e9))
    with Run(config, "--resume", "steps=9", "teacher.addresses=['127.0.0.1:9']", "teacher.start_deadline_s=999") as run:
        run.until(lambda: run.metric("teacher_outage_now_s"))
        assert run.metric("last_checkpoint_timestamp_seconds") == 1e9 and run.metric("step") == 2


def test_a_run_that_failed_stays_to_be_read_until_it_is_told_to_end(teacher, tmp_path):
    broken = "prompts.verifier.function=tests.toy:broken_verifier"
    with Run(write_config(tmp_path, teacher.address), broken, FOR_EVER) as run:
        assert run.until(run.reasons) == ["verifier"]
        run.until(lambda: "the sandbox is gone" in run.log and "stays for 36000 s so that http" in run.log)
        run.process.terminate()
        assert run.status() == 1


def test_it_stays_no_longer_than_it_was_told_to(tmp_path):
    config = write_config(tmp_path, "127.0.0.1:9")
    with Run(config, "teacher.start_deadline_s=1", "metrics_hold_s=1") as run:
        assert run.status() == 3
    assert "the teacher: UNAVAILABLE" in run.log and "stays for 1 s" in run.log


@pytest.mark.parametrize("override", ["stepz=1", "student.model=nowhere"])
def test_a_configuration_that_is_refused_is_read_on_the_page_too(teacher, tmp_path, override):
    with Run(write_config(tmp_path, teacher.address), override, FOR_EVER) as run:
        assert run.until(run.reasons) == ["config"]
        run.process.terminate()
        assert run.status() == 2


def test_a_run_that_was_told_to_stop_and_then_failed_does_not_stay(teacher, tmp_path):
    """The teacher's revision changes while the last answers are on their way; nobody will come to read why."""
    slow = "prompts.verifier.function=tests.integration.test_run_endings:told_to_stop_and_broken"
    with Run(write_config(tmp_path, teacher.address), slow, FOR_EVER) as run:
        assert run.status() == 1 and "stays for" not in run.log


def told_to_stop_and_broken(completion: str, answer: Any, entry: dict[str, Any]) -> float:
    os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError("the sandbox is gone")


@pytest.mark.parametrize("where", ["broken_verifier", "broken_update"])
def test_the_main_process_says_why_another_one_failed_and_the_launcher_lets_it(teacher, tmp_path, where):
    """In a meeting, and where no meeting checks: there the main process waits in a sum that never comes."""
    function = f"prompts.verifier.function=tests.integration.test_run_endings:{where}"
    with Run(write_config(tmp_path, teacher.address), function, FOR_EVER, command=TWO_ON_ONE_NODE) as run:
        assert run.until(run.reasons) == ["verifier" if where == "broken_verifier" else "unexpected"]
        time.sleep(2)  # long enough for torchelastic to notice a worker that has ended
        assert run.process.poll() is None and run.reasons()
        run.process.terminate()
        assert run.status() == 1, run.log
    with pytest.raises(urllib.error.URLError):
        run.page()


def broken_verifier(completion: str, answer: Any, entry: dict[str, Any]) -> float:
    if os.environ["RANK"] == "1":
        raise RuntimeError("the sandbox is gone")
    return 1.0


def broken_update(completion: str, answer: Any, entry: dict[str, Any]) -> float:
    """A verifier that breaks something else, in one of the processes."""
    import student_trainer.loop

    def train_step(*arguments: Any) -> None:
        raise KeyError("a bug")

    if os.environ["RANK"] == "1":
        vars(student_trainer.loop)["train_step"] = train_step
    return 1.0
