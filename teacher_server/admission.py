"""How much work an engine takes on: a bound on the tokens that are admitted and not yet scored."""

import random
import threading

from stillhouse.errors import Overloaded


class Admission:
    """Counts tokens in and out; refuses what is too much, with an estimate of when to come again. Thread-safe."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._pending_tokens = 0
        self._tokens_per_s = 0.0  # of late

    @property
    def pending_tokens(self) -> int:
        """Tokens admitted and neither scored nor withdrawn."""
        return self._pending_tokens

    def admit(self, tokens: int) -> None:
        """Takes `tokens` on until they are released. Raises Overloaded."""
        with self._lock:
            # A sequence larger than the whole queue is still taken when nothing else is there.
            if self._pending_tokens and self._pending_tokens + tokens > self._max_tokens:
                raise Overloaded(
                    f"{self._pending_tokens} tokens are waiting; the queue takes {self._max_tokens}",
                    retry_delay_s=self._retry_delay_s(),
                    pending_tokens=self._pending_tokens,
                    max=self._max_tokens,
                )
            self._pending_tokens += tokens

    def release(self, tokens: int) -> None:
        """Lets `tokens` go: scored, failed or withdrawn."""
        with self._lock:
            self._pending_tokens -= tokens

    def observe(self, tokens: int, seconds: float) -> None:
        """Learns that `tokens` took the engine `seconds`."""
        rate = tokens / max(seconds, 1e-6)
        with self._lock:
            self._tokens_per_s = 0.8 * self._tokens_per_s + 0.2 * rate if self._tokens_per_s else rate

    def _retry_delay_s(self) -> float:
        """Time until half of the queue is gone, 0.1 .. 10 s, spread so that not all come at once."""
        estimate_s = 0.5 * self._pending_tokens / self._tokens_per_s if self._tokens_per_s else 1.0
        return min(10.0, max(0.1, estimate_s)) * random.uniform(0.75, 1.25)
