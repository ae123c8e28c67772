"""A teacher is replaced while it serves: real servers of both engines, two real checkpoints, a link that moves."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.client import TeacherClient
from stillhouse.codec import Scores
from stillhouse.errors import ModelRevisionMismatch
from tests.models import VOCABULARY_SIZE, reference_scores, save_model
from tests.servers import ENGINES, VLLM_SHAPE, ServerProcess, serving

TOKENS = np.random.default_rng(5).integers(3, VOCABULARY_SIZE, 24).astype(np.int32)
START = 8
ATOL = {"torch": 1e-4, "vllm": 1e-3}


def wait_for(condition: Callable[[], Any], server: ServerProcess, limit_s: float = 120.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, server.log
        assert server.process.poll() is None, server.log
        time.sleep(0.05)


def point(link: Path, target: Path) -> None:
    """Lets `link` point elsewhere, in one step, as Kubernetes and the trainer do."""
    partial = link.with_name(f".{link.name}.partial")
    partial.symlink_to(target)
    os.replace(partial, link)


def expected(directory: Path) -> np.ndarray:
    return reference_scores(directory, TOKENS, score_start=START, top_k=3)["sampled_logprobs"]


class Caller:
    """Scores the same sequence again and again on a thread, until stopped."""

    def __init__(self, address: str, **options: Any) -> None:
        self.answers: list[Scores] = []
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._client = TeacherClient([address])
        self._options = options
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def revisions(self) -> list[str]:
        """In the order in which they first answered."""
        return list(dict.fromkeys(answer.model_revision for answer in list(self.answers)))

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                waiting = [
                    self._client.submit_score(TOKENS, score_start=START, top_k=3, **self._options) for _ in range(4)
                ]
                self.answers += [future.result() for future in waiting]
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        self._client.close()


@pytest.fixture
def checkpoints(tmp_path: Path, engine: str) -> tuple[Path, Path]:
    shape = VLLM_SHAPE if engine == "vllm" else {}
    return tuple(save_model(tmp_path / name, "llama", seed=seed, **shape) for seed, name in enumerate(("a", "b")))  # type: ignore[return-value]


@pytest.fixture
def server(tmp_path: Path, engine: str, checkpoints: tuple[Path, Path]) -> Iterator[ServerProcess]:
    link = tmp_path / "current"
    point(link, checkpoints[0])
    with serving(link, "--name", "teacher", "--follow", engine=engine) as running:
        yield running


@pytest.mark.parametrize("engine", ENGINES)
def test_a_link_that_moves_replaces_the_teacher_without_an_error_and_every_score_says_who_made_it(
    server: ServerProcess, checkpoints: tuple[Path, Path], tmp_path: Path, engine: str
) -> None:
    caller = Caller(server.said["listen"])
    first = server.said["revision"]
    wait_for(lambda: caller.revisions == [first] or caller.error, server)
    point(tmp_path / "current", checkpoints[1])
    wait_for(lambda: len(caller.revisions) == 2 or caller.error, server)
    second = caller.revisions[-1]
    count = len(caller.answers)
    wait_for(lambda: len(caller.answers) > count + 20 or caller.error, server)
    caller.stop()
    assert caller.error is None
    right = {first: expected(checkpoints[0]), second: expected(checkpoints[1])}
    assert np.abs(right[first] - right[second]).max() > 0.1, "the test cannot tell the two apart"
    for answer in caller.answers:
        np.testing.assert_allclose(answer.sampled_logprobs, right[answer.model_revision], atol=ATOL[engine])
    order = [answer.model_revision for answer in caller.answers]
    assert order == sorted(order, key=[first, second].index), "the old revision answered after the new one"
    wait_for(lambda: f"switched: revision={second}" in server.log, server)
    assert server.metric('stillhouse_teacher_reloads_total{result="ok",what="model"}') == 1
    with TeacherClient([server.said["listen"]]) as client:
        assert client.get_teacher().model_revision == second


@pytest.mark.parametrize("engine", ["torch"])
def test_a_pinned_caller_gets_the_named_error_and_never_another_revision(
    server: ServerProcess, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    first = server.said["revision"]
    caller = Caller(server.said["listen"], expected_model_revision=first)
    wait_for(lambda: caller.answers, server)
    point(tmp_path / "current", checkpoints[1])
    wait_for(lambda: caller.error, server)
    caller.stop()
    assert isinstance(caller.error, ModelRevisionMismatch)
    assert caller.error.fields["value"] == first
    assert caller.revisions == [first]


@pytest.mark.parametrize("engine", ["torch"])
def test_a_model_that_cannot_be_loaded_leaves_the_old_one_in_service(
    server: ServerProcess, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = save_model(tmp_path / "c", "llama", seed=3)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    caller = Caller(server.said["listen"])
    failed = 'stillhouse_teacher_reloads_total{result="failed",what="model"}'
    point(tmp_path / "current", broken)
    wait_for(lambda: "cannot be served, the old model stays" in server.log, server)
    assert server.metric(failed) == 1  # counted before it is logged
    count = len(caller.answers)
    wait_for(lambda: len(caller.answers) > count + 8, server)
    assert caller.revisions == [server.said["revision"]]
    point(tmp_path / "current", checkpoints[1])  # mended
    wait_for(lambda: len(caller.revisions) == 2, server)
    caller.stop()
    assert caller.error is None
    assert server.metric(failed) == 1, "tried again although nothing had changed"


@pytest.mark.parametrize("engine", ["torch"])
def test_sighup_looks_at_once_and_the_same_model_is_no_switch(
    server: ServerProcess, checkpoints: tuple[Path, Path]
) -> None:
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "the same revision, nothing to switch" in server.log, server)
    with TeacherClient([server.said["listen"]]) as client:
        scores = client.score(TOKENS, score_start=START, top_k=3)
    np.testing.assert_allclose(scores.sampled_logprobs, expected(checkpoints[0]), atol=1e-4)


@pytest.mark.parametrize("engine", ["torch"])
def test_sigterm_in_the_middle_of_a_switch_still_ends_with_zero(
    server: ServerProcess, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    point(tmp_path / "current", checkpoints[1])
    wait_for(lambda: "another model is asked for" in server.log, server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0, server.log
    assert "Traceback" not in server.log
