"""What is told about a step: means over tokens, a row for metrics.jsonl, a line to read."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from student_trainer.batch import Batch, Sample
from student_trainer.logprobs import Support
from student_trainer.losses import forward_kl, reverse_kl
from student_trainer.objective import TokenLosses

POSITION_EDGES = (0, 16, 64, 256, 1024, 4096)
"""Where the position buckets of an answer begin, in tokens."""

_QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


class TokenMeter:
    """Means, extremes and quantiles of a step, gathered micro-batch by micro-batch and process by process.

    Values stay on their device until `state`, so that measuring does not make the host wait for it.
    """

    def __init__(self) -> None:
        self._means: dict[str, tuple[Tensor | float, Tensor | float]] = {}  # total, count
        self._by_position: dict[str, tuple[Tensor, Tensor]] = {}  # totals, counts, a bucket each
        self._lowest: dict[str, Tensor] = {}
        self._highest: dict[str, Tensor] = {}
        self._values: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, values: Tensor) -> None:
        """Takes part in the mean `name` with every element of `values`."""
        self.add_total(name, values.detach().double().sum(), values.numel())

    def add_total(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Takes part in the mean `name` with `count` values that sum to `total`; or with a sum of weights."""
        total_before, count_before = self._means.get(name, (0.0, 0.0))
        self._means[name] = (total_before + total, count_before + count)

    def add_by_position(self, name: str, values: Tensor, positions: Tensor) -> None:
        """One mean `name_from_<edge>` for each bucket of `positions` [R] within the answers."""
        edges = torch.tensor(POSITION_EDGES[1:], device=positions.device)
        bucket = torch.bucketize(positions, edges, right=True)
        totals = torch.zeros(len(POSITION_EDGES), dtype=torch.float64, device=values.device)
        totals.index_add_(0, bucket, values.detach().double())
        counts = torch.bincount(bucket, minlength=len(POSITION_EDGES))
        before = self._by_position.get(name)
        self._by_position[name] = (totals, counts) if before is None else (before[0] + totals, before[1] + counts)

    def lowest(self, name: str, values: Tensor) -> None:
        """Keeps the smallest value."""
        if values.numel():
            least = values.detach().min()
            self._lowest[name] = torch.minimum(self._lowest.get(name, least), least)

    def highest(self, name: str, values: Tensor) -> None:
        """Keeps the largest value."""
        if values.numel():
            most = values.detach().max()
            self._highest[name] = torch.maximum(self._highest.get(name, most), most)

    def spread(self, name: str, values: Tensor) -> None:
        """Takes part in the quantiles `name_p05`, `name_p50`, `name_p95`."""
        self._values[name].append(values.detach().float())

    def state(self) -> dict[str, Any]:
        """What was gathered here, as plain numbers and numpy arrays, for `merged`."""
        means = {name: (float(total), float(count)) for name, (total, count) in self._means.items()}
        for name, (totals, counts) in self._by_position.items():
            for edge, total, count in zip(POSITION_EDGES, totals.tolist(), counts.tolist(), strict=True):
                means[f"{name}_from_{edge}"] = (total, count)
        return {
            "means": means,
            "lowest": {name: value.item() for name, value in self._lowest.items()},
            "highest": {name: value.item() for name, value in self._highest.items()},
            "values": {name: torch.cat(parts).cpu().numpy() for name, parts in self._values.items()},
        }


def merged(states: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of a step from the `TokenMeter.state` of every process."""
    figures: dict[str, float] = {}
    for name in _names(states, "means"):
        parts = [state["means"][name] for state in states if name in state["means"]]
        count = sum(part[1] for part in parts)
        if count:
            figures[name] = sum(part[0] for part in parts) / count
    for kind, choose in (("lowest", min), ("highest", max)):
        for name in _names(states, kind):
            figures[name] = choose(state[kind][name] for state in states if name in state[kind])
    for name in _names(states, "values"):
        values = np.concatenate([state["values"][name] for state in states if name in state["values"]])
        if values.size:
            found = np.quantile(values, list(_QUANTILES.values()))
            figures |= {f"{name}_{label}": float(value) for label, value in zip(_QUANTILES, found, strict=True)}
    return figures


def _names(states: list[dict[str, Any]], kind: str) -> list[str]:
    """In the order of their first appearance, each once."""
    return list(dict.fromkeys(name for state in states for name in state[kind]))


@torch.no_grad()
def observe(
    meter: TokenMeter,
    batch: Batch,
    support: Support,
    policy_logprobs: Tensor,
    token: TokenLosses,
    *,
    on_policy: bool,
) -> None:
    """Adds what is worth knowing of a micro-batch to `meter`. Nats.

    on_policy: the student has not been updated since it sampled, so any gap to the sampler is the engine's.
    """
    meter.add("entropy", support.entropy)
    gap = (policy_logprobs - batch.sampler_logprobs).abs()
    name = "sampler_gap" if on_policy else "off_policy_gap"
    meter.add(name, gap)
    meter.highest(f"{name}_max", gap)
    for name, values in token.terms.items():
        meter.add(f"term_{name}", values)
    if token.clipped is not None:
        meter.add("clipped_share", token.clipped.float())
    if token.importance is not None:
        meter.add("importance_ratio", token.importance.ratio)
        meter.highest("importance_ratio_max", token.importance.ratio)
        meter.add("importance_bounded_share", token.importance.affected.float())
    if batch.teacher_logprobs is not None:
        _observe_teacher(meter, batch, support)


def _observe_teacher(meter: TokenMeter, batch: Batch, support: Support) -> None:
    assert batch.teacher_logprobs is not None and batch.teacher_log_tail is not None
    assert batch.teacher_sampled is not None and batch.teacher_entropy is not None and batch.overlap is not None
    student = support.logprobs.gather(1, batch.target_column[:, None]).squeeze(1)
    log_ratio = student - batch.teacher_sampled
    meter.add("kl", log_ratio)  # sampled reverse KL, k1
    meter.spread("teacher_advantage", -log_ratio)
    sides = (support.logprobs, batch.teacher_logprobs, support.log_tail, batch.teacher_log_tail)
    for name, divergence in (("reverse_kl", reverse_kl), ("forward_kl", forward_kl)):
        values = divergence(*sides)
        meter.add(name, values)
        meter.add_by_position(name, values, batch.positions)
    meter.add("teacher_entropy", batch.teacher_entropy)
    meter.add("entropy_gap", support.entropy - batch.teacher_entropy)
    for name, log_tail in (("teacher", batch.teacher_log_tail), ("student", support.log_tail)):
        mass = -torch.expm1(log_tail)
        meter.add(f"{name}_mass_on_support", mass)
        meter.lowest(f"{name}_mass_on_support_min", mass)
    shared = batch.overlap
    mine = torch.where(shared, support.logprobs.exp(), 0.0)
    advantage = torch.where(shared, batch.teacher_logprobs - support.logprobs, 0.0)
    meter.add("overlap_student_mass", mine.sum(1))
    meter.add("overlap_teacher_mass", torch.where(shared, batch.teacher_logprobs.exp(), 0.0).sum(1))
    # A mean over the shared tokens as the student weighs them.
    meter.add_total("overlap_advantage", (mine * advantage).double().sum(), mine.double().sum())
    candidates = batch.samples[0].rollout.candidate_ids.shape[1]
    meter.add_total("top_k_overlap", shared.double().sum(), candidates * len(shared))


def observe_samples(meter: TokenMeter, samples: list[Sample]) -> None:
    """Adds the figures of a step's answers."""

    def mean(name: str, values: list[float] | list[bool]) -> None:
        meter.add_total(name, float(sum(values)), len(values))

    rollouts = [sample.rollout for sample in samples]
    mean("reward", [sample.reward for sample in samples])
    mean("pass_rate", [sample.passed for sample in samples])
    mean("response_length", [float(len(rollout.response_ids)) for rollout in rollouts])
    mean("truncated_share", [not rollout.finished for rollout in rollouts])
    mean("repetition", [repetition(rollout.response_ids) for rollout in rollouts])
    mean("prompt_weight", [sample.prompt_weight for sample in samples])
    mean("weightless_share", [sample.prompt_weight == 0 for sample in samples])
    meter.spread("advantage", torch.tensor([sample.advantage for sample in samples]))
    scores = [sample.scores for sample in samples if sample.scores is not None]
    if scores:
        mean("teacher_queue_wait_ms", [score.queue_wait_ms for score in scores])
        mean("teacher_engine_ms", [score.engine_ms for score in scores])


def repetition(tokens: NDArray[np.int32], n: int = 4) -> float:
    """Share of the n-grams of an answer that it already had further left; 0 below n tokens."""
    count = len(tokens) - n + 1
    if count < 1:
        return 0.0
    codes = np.zeros(count, np.uint64)
    for offset in range(n):  # a polynomial hash, modulo 2^64
        codes = codes * np.uint64(1_000_003) + tokens[offset : offset + count].astype(np.uint64)
    return 1.0 - len(np.unique(codes)) / count


def progress_line(row: dict[str, Any], steps: int) -> str:
    """One line a person reads while the run goes on."""
    seconds = row["step_s"]
    teacher = f"kl {row['kl']:.3f}  " if "kl" in row else ""
    judged = f"reward {row['reward']:.3f}  pass {row['pass_rate']:.3f}  " if "reward" in row else ""
    raised = [name.removeprefix("alarm_") for name in row if name.startswith("alarm_") and row[name]]
    alarms = "".join(f"  ALARM {name}" for name in raised)
    return (
        f"step {row['step']:>{len(str(steps))}}/{steps}  {judged}"
        f"{teacher}entropy {row['entropy']:.3f}  loss {row['loss']:+.4f}  grad {row['grad_norm']:.2f}  "
        f"len {row['response_length']:.0f}  {row['tokens_per_s']:,.0f} tok/s  {seconds:.2f} s "
        f"(rollout {row['rollout_s'] / seconds:.0%}, reward {row['reward_s'] / seconds:.0%}, "
        f"waiting {row['waiting_share']:.0%}, training {row['training_s'] / seconds:.0%}){alarms}"
    )
