"""What the tests of the client share."""

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

import pytest

from stillhouse import pool
from stillhouse.client import Backoff, TeacherClient

TOKENS = [3, 1, 4, 1, 5]
QUICK = Backoff(initial_s=0.01, max_s=0.05)


def until(condition: Callable[[], bool]) -> None:
    """Returns once `condition()` holds; fails the test after 100 s."""
    end_s = time.monotonic() + 100.0
    while not condition():
        assert time.monotonic() < end_s, "the condition never held"
        time.sleep(0.002)


def submit(client: TeacherClient, **options: Any) -> concurrent.futures.Future[Any]:
    return client.submit_score(TOKENS, score_start=2, top_k=2, **options)


def score(client: TeacherClient, **options: Any) -> Any:
    return client.score(TOKENS, score_start=2, top_k=2, **options)


def set_channel_options(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    """Gives options that the client sets anyway a value that a test can wait for."""
    changes = {f"grpc.{name.replace('http2_', 'http2.')}": value for name, value in values.items()}
    assert changes.keys() <= dict(pool.CHANNEL_OPTIONS).keys()
    monkeypatch.setattr(pool, "CHANNEL_OPTIONS", tuple((dict(pool.CHANNEL_OPTIONS) | changes).items()))


def record_sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are then not waited."""
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(delay_s: float) -> None:
        waits.append(delay_s)
        await real(0)

    monkeypatch.setattr("stillhouse.client.asyncio.sleep", sleep)
    return waits
