"""What is told about a step: means over tokens, a row for metrics.jsonl, gauges for Prometheus, a line to read."""

import math
from collections import defaultdict
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Gauge, start_http_server
from torch import Tensor

from student_trainer.batch import Batch, Sample
from student_trainer.logprobs import Support
from student_trainer.objective import TokenLosses


class TokenMeter:
    """Means over the response tokens of a step, gathered micro-batch by micro-batch."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._extremes: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Takes part in the mean `name` with every element of `values`."""
        self._sums[name] += values.detach().double().sum().item()
        self._counts[name] += values.numel()

    def lowest(self, name: str, values: Tensor) -> None:
        """Keeps the smallest value."""
        if values.numel():
            self._extremes[name] = min(values.min().item(), self._extremes.get(name, math.inf))

    def highest(self, name: str, values: Tensor) -> None:
        """Keeps the largest value."""
        if values.numel():
            self._extremes[name] = max(values.max().item(), self._extremes.get(name, -math.inf))

    def values(self) -> dict[str, float]:
        """All means and extremes."""
        means = {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        return means | self._extremes


@torch.no_grad()
def observe(
    meter: TokenMeter,
    batch: Batch,
    support: Support,
    policy_logprobs: Tensor,
    token: TokenLosses,
    *,
    first_update: bool,
) -> None:
    """Adds what is worth knowing of a micro-batch to `meter`. Nats.

    first_update: the student has not been updated since it sampled, so any gap to the sampler is an error.
    """
    meter.add("entropy", support.entropy)
    gap = (policy_logprobs - batch.sampler_logprobs).abs()
    name = "sampler_gap" if first_update else "off_policy_gap"
    meter.add(name, gap)
    meter.highest(f"{name}_max", gap)
    for name, values in token.terms.items():
        meter.add(f"term_{name}", values)
    if token.clipped is not None:
        meter.add("clipped_share", token.clipped.float())
    if batch.teacher_logprobs is None:
        return
    assert batch.teacher_sampled is not None and batch.teacher_entropy is not None
    assert batch.teacher_log_tail is not None
    student = support.logprobs.gather(1, batch.target_column[:, None]).squeeze(1)
    meter.add("kl", student - batch.teacher_sampled)  # sampled reverse KL, k1
    meter.add("teacher_entropy", batch.teacher_entropy)
    teacher_mass = -torch.expm1(batch.teacher_log_tail)
    meter.add("teacher_mass_on_support", teacher_mass)
    meter.lowest("teacher_mass_on_support_min", teacher_mass)
    meter.add("student_mass_on_support", -torch.expm1(support.log_tail))


def describe_samples(samples: list[Sample]) -> dict[str, float]:
    """Figures of a step's answers."""
    lengths = [len(sample.rollout.response_ids) for sample in samples]
    count = len(samples)
    figures = {
        "reward": sum(sample.reward for sample in samples) / count,
        "pass_rate": sum(sample.passed for sample in samples) / count,
        "response_tokens": sum(lengths),
        "response_length": sum(lengths) / count,
        "truncated_share": sum(not sample.rollout.finished for sample in samples) / count,
        "prompt_weight": sum(sample.prompt_weight for sample in samples) / count,
        "weightless_share": sum(sample.prompt_weight == 0 for sample in samples) / count,
    }
    scores = [sample.scores for sample in samples if sample.scores is not None]
    if scores:
        figures["teacher_queue_wait_ms"] = sum(score.queue_wait_ms for score in scores) / len(scores)
        figures["teacher_engine_ms"] = sum(score.engine_ms for score in scores) / len(scores)
        figures["top_k_overlap"] = sum(_overlap(sample) for sample in samples) / count
    return figures


def _overlap(sample: Sample) -> float:
    """Share of the student's candidates that are among the teacher's top k, mean over the answer's tokens."""
    assert sample.scores is not None
    candidates, top = sample.rollout.candidate_ids, sample.scores.top_ids
    if not candidates.size or not top.size:
        return 0.0
    return float((candidates[:, :, None] == top[:, None, :]).any(axis=2).mean())


class Exporter:
    """The Prometheus endpoint: each figure of the last step as a gauge `stillhouse_student_<name>`."""

    def __init__(self, port: int) -> None:
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=self._registry)
        self.url = f"http://127.0.0.1:{self._server.server_port}/metrics"

    def show(self, row: dict[str, Any]) -> None:
        """Sets a gauge for every number of `row`."""
        for name, value in row.items():
            if isinstance(value, int | float):
                if name not in self._gauges:
                    self._gauges[name] = Gauge(
                        f"stillhouse_student_{name}", f"{name} of the last step", registry=self._registry
                    )
                self._gauges[name].set(value)

    def close(self) -> None:
        """Stops the endpoint."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def progress_line(row: dict[str, Any], steps: int) -> str:
    """One line a person reads while the run goes on."""
    seconds = row["step_s"]
    teacher = f"kl {row['kl']:.3f}  " if "kl" in row else ""
    return (
        f"step {row['step']:>{len(str(steps))}}/{steps}  reward {row['reward']:.3f}  pass {row['pass_rate']:.3f}  "
        f"{teacher}entropy {row['entropy']:.3f}  loss {row['loss']:+.4f}  grad {row['grad_norm']:.2f}  "
        f"len {row['response_length']:.0f}  {row['tokens_per_s']:,.0f} tok/s  {seconds:.2f} s "
        f"(rollout {row['rollout_s'] / seconds:.0%}, reward {row['reward_s'] / seconds:.0%}, "
        f"scoring {row['scoring_s'] / seconds:.0%}, training {row['training_s'] / seconds:.0%})"
    )
