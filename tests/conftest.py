"""What every test may use. Servers live in this process on 127.0.0.1 and take a free port."""

import os
import socket
from collections.abc import Iterator

import pytest

# Tiny models gain nothing from threads, and several programs at once would fight for the cores. Before torch is
# imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from stillhouse.client import TeacherClient
from tests.calls import QUICK
from tests.fakes import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A teacher without faults; tests plan theirs with `server.faults`."""
    with FakeServer() as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[TeacherClient]:
    """A blocking client of `server` that does not wait long between tries."""
    with TeacherClient([server.address], backoff=QUICK) as opened:
        yield opened


@pytest.fixture
def three() -> Iterator[list[FakeServer]]:
    """Three servers of one model."""
    servers = [FakeServer() for _ in range(3)]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def free_address() -> Iterator[str]:
    """An address where nothing listens and no other program will."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"
