"""What a run watches in its own figures: alarms that are told, a runaway that ends it, an evaluation that got no
better."""

from dataclasses import asdict, dataclass, field
from typing import Any

from student_trainer.config import GuardConfig

_START_STEPS = 5
_WATCHED = ("kl", "entropy", "response_length")


class Runaway(ArithmeticError):
    """The student left its teacher: the run halted by itself."""


@dataclass(slots=True)
class Guards:
    """Figures of the start, and for how long something has been wrong. Part of a checkpoint."""

    start: dict[str, list[float]] = field(default_factory=dict)  # of the first steps
    runaway_steps: int = 0

    def alarms(self, row: dict[str, Any], config: GuardConfig) -> dict[str, bool]:
        """The alarms of a step, by name. Call it once a step."""
        for name in _WATCHED:
            if name in row and len(self.start.setdefault(name, [])) < _START_STEPS:
                self.start[name].append(row[name])
        alarms = {}
        entropy, length = self._at_start("entropy"), self._at_start("response_length")
        if config.entropy_ratio is not None and entropy is not None:
            low, high = config.entropy_ratio
            alarms["alarm_entropy"] = not low * entropy <= row["entropy"] <= high * entropy
        if config.length_ratio is not None and length is not None:
            alarms["alarm_length"] = row["response_length"] > config.length_ratio * length
        if config.truncated_share is not None:
            alarms["alarm_truncated"] = row["truncated_share"] > config.truncated_share
        return alarms

    def runaway(self, row: dict[str, Any], config: GuardConfig) -> str | None:
        """Why to halt, once the KL has been too large for `kl_steps` steps. Call it once a step, after `alarms`."""
        if "kl" not in row:
            return None
        limits = [] if config.max_kl is None else [("guards.max_kl", config.max_kl)]
        start = self._at_start("kl")
        if config.kl_ratio is not None and start is not None:
            limits.append((f"guards.kl_ratio: {config.kl_ratio:g} times the start", max(1.0, config.kl_ratio * start)))
        broken = [(name, limit) for name, limit in limits if row["kl"] > limit]
        self.runaway_steps = self.runaway_steps + 1 if broken else 0
        if self.runaway_steps < config.kl_steps:
            return None
        name, limit = broken[0]
        return (
            f"step {row['step']}: kl is {row['kl']:.3f} nats, and has been above {limit:.3f} for "
            f"{self.runaway_steps} steps ({name}). The student runs away from its teacher: lower "
            "optimizer.learning_rate, or raise the guard. The run halted and did not save; older checkpoints stand"
        )

    def state(self) -> dict[str, Any]:
        """As JSON, for `Guards(**state)`."""
        return asdict(self)

    def _at_start(self, name: str) -> float | None:
        """The mean of the first steps, once there are enough of them."""
        values = self.start.get(name, [])
        return sum(values) / len(values) if len(values) == _START_STEPS else None


@dataclass(slots=True)
class BestSoFar:
    """Held-out results so far. Part of a checkpoint."""

    step: int | None = None
    value: float = -1.0
    without: int = 0  # evaluations since the best one

    def note(self, step: int, value: float) -> bool:
        """Takes a result; whether it is the best yet."""
        better = value > self.value
        if better:
            self.step, self.value, self.without = step, value, 0
        else:
            self.without += 1
        return better

    def state(self) -> dict[str, Any]:
        """As JSON, for `BestSoFar(**state)`."""
        return asdict(self)
