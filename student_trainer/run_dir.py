"""The directory of a run: everything it leaves behind.

config.yaml            the configuration as it was resolved
metrics.jsonl          a line a step
samples.jsonl          some rollouts of each step, with log-probabilities per token
checkpoints/step-N/    the student after N steps, in Hugging Face format
summary.json           the outcome, written at the end
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from student_trainer.batch import Sample
from student_trainer.config import ConfigError, RunConfig, dump_config


class RunDir:
    """Appends to the files of one run; every line is on disk before the next step."""

    def __init__(self, config: RunConfig) -> None:
        self.path = config.run_dir
        self._keep = config.checkpoints.keep
        self._samples_per_step = config.samples_per_step
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir: {self.path} cannot be made ({error.strerror}); choose another") from error
        (self.path / "config.yaml").write_text(dump_config(config))
        self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1)
        self._samples = (self.path / "samples.jsonl").open("a", buffering=1)

    def metrics(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl. Not a number is no JSON: a value that is not finite is refused."""
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")

    def samples(self, step: int, samples: list[Sample], student_logprobs: list[list[float]]) -> None:
        """Lines of samples.jsonl for the first `samples_per_step`; `student_logprobs` runs along `samples`."""
        for sample, logprobs in list(zip(samples, student_logprobs, strict=True))[: self._samples_per_step]:
            self._samples.write(json.dumps(_sample_row(step, sample, logprobs)) + "\n")

    def checkpoint(self, step: int, model: Any, tokenizer: Any) -> Path:
        """Saves the student after `step` steps; a crash while saving leaves no half checkpoint under its name."""
        folder = self.path / "checkpoints"
        final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, final)
        saved = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        for old in saved[: -self._keep]:
            shutil.rmtree(old)
        return final

    def summary(self, content: dict[str, Any]) -> None:
        """Writes summary.json, whole or not at all."""
        write_json(self.path / "summary.json", content)

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
        self._samples.close()


def refuse_used(path: Path) -> None:
    """Raises ConfigError if `path` holds anything: a run is never written over."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"run_dir: {path} is not empty; choose another directory or remove it")


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
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]
