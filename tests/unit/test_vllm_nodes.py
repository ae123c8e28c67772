"""How the nodes of one teacher find each other and notice that one is gone; without vLLM."""

import asyncio
import contextlib
import importlib.util
import json
import logging
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from teacher_server import vllm_nodes
from teacher_server.options import OptionError, check, parse
from teacher_server.vllm_nodes import Leader, Membership, NodeMissing

FACTS = {"model_revision": "r1", "max_batch_tokens": 512}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@dataclass
class Group:
    """A leader that gathers, and what it was told."""

    leader: Leader
    port: int
    gathering: asyncio.Task[None]
    calls: list[str] = field(default_factory=list)
    coming: list[asyncio.Task[Membership]] = field(default_factory=list)  # asyncio itself forgets a task

    async def come(self, node: int, **facts: Any) -> Membership:
        return await Membership.join("127.0.0.1", self.port, node, {**FACTS, **facts}, 10)

    async def here(self, node: int) -> asyncio.Task[Membership]:
        """A node that has come and waits for the others."""
        coming = asyncio.create_task(self.come(node))
        self.coming.append(coming)
        await until(lambda: node in self.leader._here)
        return coming


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def group(nodes: int, wait_s: float = 20) -> AsyncIterator[Group]:
    calls: list[str] = []
    leader = Leader(nodes, FACTS, on_lost=lambda: calls.append("lost"), on_stopping=lambda: calls.append("stopping"))
    port = free_port()
    gathering = asyncio.create_task(leader.gather(port, wait_s))
    await until(lambda: leader._server)
    try:
        yield Group(leader, port, gathering, calls)
    finally:
        gathering.cancel()
        await asyncio.gather(gathering, return_exceptions=True)
        await leader.close()


async def test_all_nodes_are_told_one_place_to_meet_once_the_last_has_come() -> None:
    async with group(3) as it:
        second = await it.here(2)
        assert not it.gathering.done() and not second.done()
        first = await it.come(1)
        members = [first, await second]
        await it.gathering
        assert {(member.address, member.port) for member in members} == {("127.0.0.1", it.leader.port)}
        assert it.leader.address == first.own_address == "127.0.0.1"
        assert it.leader.lost is None and it.calls == []


async def test_a_node_that_ends_is_named_once() -> None:
    async with group(3) as it:
        first = await it.here(1)
        second = await it.come(2)
        await it.gathering
        second.close()
        await until(lambda: it.leader.lost)
        assert it.leader.lost == "node 2 of 3 is gone"
        (await first).close()
        await asyncio.sleep(0.1)
        assert it.leader.lost == "node 2 of 3 is gone"
        assert it.calls == ["lost"]


async def test_a_leader_that_ends_is_noticed_and_its_own_end_is_no_loss() -> None:
    async with group(2) as it:
        member = await it.come(1)
        await it.gathering
        ended = asyncio.create_task(member.ended())
        await asyncio.sleep(0.1)
        assert not ended.done()
        await it.leader.close()
        await asyncio.wait_for(ended, 10)
        member.close()
        await asyncio.sleep(0.1)
        assert it.leader.lost is None and it.calls == []


async def test_a_node_that_is_asked_to_stop_tells_the_leader_and_stays() -> None:
    async with group(2) as it:
        member = await it.come(1)
        await it.gathering
        member.stopping()
        await until(lambda: it.calls)
        assert it.calls == ["stopping"]
        assert it.leader.lost is None


async def test_a_node_that_leaves_before_the_last_has_come_may_come_again() -> None:
    async with group(3) as it:
        first = await it.here(1)
        first.cancel()
        await until(lambda: 1 not in it.leader._here)
        again = await it.here(1)
        await it.come(2)
        await it.gathering
        await again
        assert it.leader.lost is None


@pytest.mark.parametrize(
    ("node", "facts", "says"),
    [
        (1, {"max_batch_tokens": 1024}, "node 1 and the leader must have the same max_batch_tokens: 1024 there, 512 h"),
        (1, {"model_revision": "r2"}, "the same model_revision: 'r2' there, 'r1' here"),
        (1, {"colour": "red"}, "the same colour: 'red' there, None here"),
        (3, {}, "--node-rank 3; of 3 nodes these are 1 .. 2"),
        (2, {}, "a second node came with --node-rank 2"),
    ],
)
async def test_a_node_that_does_not_belong_is_refused_by_name_and_the_others_wait_on(
    node: int, facts: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with group(3) as it:
        second = await it.here(2)
        with pytest.raises(OptionError, match="refused this node") as refused:
            await it.come(node, **facts)
        assert says in str(refused.value)
        assert says in caplog.text
        await it.come(1)
        await it.gathering
        await second


async def test_strangers_are_let_go_and_change_nothing() -> None:
    async with group(2) as it:
        for bytes_of_it in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"node": "one", "facts": {}}\n', b"x" * 2**20, b""):
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
            writer.write(bytes_of_it)
            if not bytes_of_it:
                writer.write_eof()
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
        member = await it.come(1)
        await it.gathering
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        writer.write(json.dumps({"node": 1, "facts": FACTS}).encode() + b"\n")
        assert b"refused" in await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert it.leader.lost is None
        member.close()


@dataclass
class Clock:
    """Stands until it is set."""

    now_s: float = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What those who wait look at, which they do often."""
    made = Clock()
    monkeypatch.setattr(vllm_nodes, "time", made)
    monkeypatch.setattr(vllm_nodes, "_SAY_EVERY_S", 0.05)
    return made


async def test_a_leader_says_for_whom_it_waits_and_gives_up(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    async with group(4, wait_s=600) as it:
        assert "waiting for nodes=1, 2, 3 of=4" in caplog.text
        coming = await it.here(2)
        await until(lambda: "waiting for nodes=1, 3 of=4" in caplog.text)
        clock.now_s = 599.0
        await until(lambda: "seconds_left=1" in caplog.text)
        assert not it.gathering.done()
        clock.now_s = 600.0
        with pytest.raises(NodeMissing, match=r"of 4 nodes 1, 3 did not come .* within 600 s \(--nodes-wait-s\)"):
            await asyncio.wait_for(it.gathering, 20)
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


async def test_a_follower_says_for_whom_it_waits_and_gives_up(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    coming = asyncio.create_task(Membership.join("127.0.0.1", port, 1, FACTS, 600))
    await until(lambda: f"waiting for the leader: address=127.0.0.1:{port}" in caplog.text)
    clock.now_s = 599.0
    await until(lambda: "seconds_left=1" in caplog.text)
    assert not coming.done()
    clock.now_s = 600.0
    with pytest.raises(NodeMissing, match=f"the leader did not come to 127.0.0.1:{port} within 600 s"):
        await asyncio.wait_for(coming, 20)


async def test_a_follower_that_is_there_before_its_leader_finds_it(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with caplog.at_level(logging.INFO):
        coming = asyncio.create_task(Membership.join("localhost", port, 1, FACTS, 20))
        await until(lambda: "waiting for the leader" in caplog.text)
        leader = Leader(2, FACTS, on_lost=lambda: None, on_stopping=lambda: None)
        await leader.gather(port, 20)
        (await coming).close()
        await leader.close()


async def test_a_leaders_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        leader = Leader(2, FACTS, on_lost=lambda: None, on_stopping=lambda: None)
        with pytest.raises(OptionError, match=f"--leader-address: cannot listen at port {port}"):
            await leader.gather(port, 1)


# Options


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A right command line of node 1 of two."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if vLLM were installed
    free = ["--listen", "127.0.0.1:0", "--metrics-port", "0"]
    shape = ["--tensor-parallel-size", "4", "--nodes", "2", "--node-rank", "1", "--leader-address", "oak-0.oak"]
    return ["--model", str(tmp_path), *free, "--engine", "vllm", *shape]


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("oak-0.oak", ("oak-0.oak", 29400)),
        ("oak-0.oak:7", ("oak-0.oak", 7)),
        ("10.0.0.1:7", ("10.0.0.1", 7)),
        ("[fd00::1]", ("fd00::1", 29400)),
        ("[fd00::1]:7", ("fd00::1", 7)),
    ],
)
def test_the_leaders_address_may_name_a_port(command: list[str], address: str, found: tuple[str, int]) -> None:
    options = parse([*command, "--leader-address", address])
    check(options)
    assert options.leader == found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--nodes", "0"], "--nodes 0: give 1 or more"),
        (["--node-rank", "2"], "--node-rank 2: with --nodes 2 the ranks are 0 .. 1"),
        (["--node-rank", "-1"], "--node-rank -1: with --nodes 2 the ranks are 0 .. 1"),
        (["--nodes", "3"], "no multiple of 3"),
        (["--nodes", "1", "--node-rank", "0"], "--leader-address oak-0.oak: give --nodes"),
        (["--leader-address", ""], "--leader-address '': with --nodes 2 give HOST"),
        (["--leader-address", ":29400"], "give HOST or HOST:PORT"),
        (["--leader-address", "oak:0"], "give HOST or HOST:PORT"),
        (["--leader-address", "oak:many"], "give HOST or HOST:PORT"),
        (["--leader-address", "grpc://oak"], "give HOST or HOST:PORT"),
        (["--nodes-wait-s", "0"], "--nodes-wait-s 0.0: give 1 .. 86400"),
        (["--follow"], "--follow: a teacher on 2 nodes"),
        (["--engine", "torch", "--tensor-parallel-size", "1"], "--nodes 2: the torch engine has no such option"),
    ],
)
def test_options_of_nodes_that_cannot_be_are_named(command: list[str], given: list[str], says: str) -> None:
    with pytest.raises(OptionError) as refused:
        check(parse([*command, *given]))
    assert says in str(refused.value)
