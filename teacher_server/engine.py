"""The seam between the service and whatever computes scores."""

from typing import Protocol

from stillhouse.codec import Scores, ScoreTask, Teacher
from teacher_server.start_failures import StartError


class EngineLost(RuntimeError):
    """The engine died while it was served."""


class SelfCheckFailed(StartError):
    """The engine's scores are not the model's; it must not serve."""

    reason = "engine"


class EngineNotStarted(StartError):
    """The engine did not come up."""

    reason = "engine"


class Engine(Protocol):
    """Scores sequences with one model.

    Tasks that reach an engine have been validated against `describe()`; an engine may batch them in any way,
    because the scores of a task do not depend on what it is batched with (to rounding). How many of them reach it at
    once is decided before it, by `teacher_server.gate`.
    """

    def describe(self) -> Teacher:
        """What this engine serves and can do. Constant for its lifetime."""
        ...

    async def score(self, task: ScoreTask) -> Scores:
        """Scores of one task. Raises `stillhouse.errors`.

        Cancelling the awaiting task withdraws the work if it has not started.
        """
        ...

    async def check(self) -> float:
        """Scores a known sequence. Raises SelfCheckFailed if the scores are not the model's, or returns the largest
        difference, nats."""
        ...

    async def died(self) -> str:
        """Waits until the engine can never score again, and says why. An engine that is busy has not died.

        From then on `score` raises Unavailable, and the process should end so that its supervisor starts another.
        """
        ...

    async def close(self) -> None:
        """Stops the engine; tasks not yet scored fail with Unavailable."""
        ...
