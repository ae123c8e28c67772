"""The directory of a run: everything it leaves behind.

config.yaml            the configuration as it was resolved
metrics.jsonl          a line a step
samples.jsonl          some rollouts of each step, with log-probabilities per token
checkpoints/step-N/    the student after N steps, in Hugging Face format, and the state to resume from
summary.json           the outcome, written at the end
lock                   who uses the directory now
"""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any, TextIO

from student_trainer.batch import Sample
from student_trainer.config import ConfigError, RunConfig, dump_config

_LOCK = "lock"


class RunDir:
    """Appends to the files of one run; every line is on disk before the next step.

    With several processes only the main one has files (`writes`); what the others append goes nowhere.
    """

    def __init__(self, config: RunConfig, *, writes: bool = True) -> None:
        self.path = config.run_dir
        self._config = config
        self._writes = writes
        self._metrics: TextIO | None = None
        self._samples: TextIO | None = None

    def begin(self, *, after_step: int = 0) -> None:
        """Writes the configuration and opens the files. after_step: the step that the run goes on from; what older
        attempts wrote of later steps is removed."""
        if not self._writes:
            return
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(dump_config(self._config))
        (self.path / "summary.json").unlink(missing_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            _cut_after(self.path / name, after_step)
        self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1)
        self._samples = (self.path / "samples.jsonl").open("a", buffering=1)

    def metrics(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl. Not a number is no JSON: a value that is not finite is refused."""
        if self._metrics is not None:
            self._metrics.write(json.dumps(row, allow_nan=False) + "\n")

    def samples(self, step: int, samples: list[Sample], student_logprobs: list[list[float]]) -> None:
        """Lines of samples.jsonl for the first `samples_per_step`; `student_logprobs` runs along `samples`."""
        if self._samples is None:
            return
        for sample, logprobs in list(zip(samples, student_logprobs, strict=True))[: self._config.samples_per_step]:
            self._samples.write(json.dumps(_sample_row(step, sample, logprobs)) + "\n")

    def summary(self, content: dict[str, Any]) -> None:
        """Writes summary.json, whole or not at all."""
        if self._writes:
            write_json(self.path / "summary.json", content)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._metrics, self._samples):
            if file is not None:
                file.close()


class Claim:
    """This process's right to a run directory, until it is released or the process ends, however it ends.

    Raises ConfigError if another process has it, or if there is a run and `resume` is false. Makes the directory.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run_dir: {path} is a file; choose a directory")
        self._path, self._made = path, not path.exists()
        # What a start leaves that was killed before it wrote anything is no run.
        holds = path.is_dir() and any(
            entry.name != _LOCK and not (entry.name == "checkpoints" and entry.is_dir() and not any(entry.iterdir()))
            for entry in path.iterdir()
        )
        if holds and not resume:
            hint = "go on with it by --resume, or " if (path / "config.yaml").is_file() else ""
            raise ConfigError(f"run_dir: {path} is not empty; {hint}choose another directory or remove it")
        if holds and not (path / "config.yaml").is_file():
            raise ConfigError(f"run_dir: {path} holds something, but no run to resume; choose another directory")
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._file = (path / _LOCK).open("a+")
        except OSError as error:
            raise ConfigError(f"run_dir: {path} cannot be made ({error.strerror}); choose another") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(
                f"run_dir: {path} is in use by {owner}; wait for it, stop it, or choose another directory"
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Lets others have it. Removes what was made here if no run came of it."""
        if not (self._path / "config.yaml").exists():
            (self._path / _LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: not ours
                (self._path / "checkpoints").rmdir()
                if self._made:
                    self._path.rmdir()
        self._file.close()


def _cut_after(path: Path, step: int) -> None:
    """Removes the lines of later steps, and a last line that a crash left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def _sample_row(step: int, sample: Sample, student_logprobs: list[float]) -> dict[str, Any]:
    rollout = sample.rollout
    scores = sample.scores
    return {
        "step": step,
        "prompt_key": rollout.prompt.key,
        "prompt": rollout.prompt.text,
        "answer": rollout.text,
        "reward": sample.reward,
        "passed": sample.passed,
        "advantage": round(sample.advantage, 6),
        "prompt_weight": round(sample.prompt_weight, 6),
        "finished": rollout.finished,
        "token_ids": rollout.response_ids.tolist(),
        "sampler_logprobs": _rounded(rollout.sampler_logprobs),
        "student_logprobs": _rounded(student_logprobs),
        "teacher_logprobs": None if scores is None else _rounded(scores.sampled_logprobs),
        "teacher_revision": None if scores is None else scores.model_revision,
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]
