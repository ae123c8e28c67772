"""The nodes of a teacher that takes several machines: who is there, and who is gone.

vLLM's processes on the nodes find each other and compute together over connections of their own, but none of them
looks after the others: without its leader a follower would wait for ever, and the leader for minutes. So every
follower keeps one connection to the leader, from before the model is loaded to the end, with lines of JSON on it:

- follower to leader: `{"node": 1, "facts": {...}}`, what has to be the same on all nodes;
- leader to follower: `{"refused": "..."}`, or once all are there `{"address": "10.0.0.1", "port": 40001}`, where
  vLLM's processes meet;
- follower to leader: `{"stopping": true}`: it was asked to stop, so the leader drains and all end.

The end of the connection is the end of the node, however it came: the kernel closes it for a process that was killed,
and keepalive finds a machine that vanished. The nodes trust each other, and whoever reaches their ports: vLLM itself
takes pickled objects there.
"""

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from teacher_server.options import OptionError
from teacher_server.start_failures import StartError

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 10.0
_TRY_EVERY_S = 1.0
_HELLO_S = 10.0
_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
"""A machine that vanished is found within 20 s."""


class NodeMissing(StartError):
    """A node did not come, or is gone before the teacher was ready."""

    reason = "engine"
    exit_code = 3


class Leader:
    """Node 0's end. facts: what has to be the same on all nodes.

    on_lost: called once, when a node ends that had come; `lost` says which from then on. on_stopping: called when
    a node was asked to stop.
    """

    def __init__(
        self, nodes: int, facts: dict[str, Any], *, on_lost: Callable[[], None], on_stopping: Callable[[], None]
    ) -> None:
        self._nodes = nodes
        self._facts = facts
        self._on_lost = on_lost
        self._on_stopping = on_stopping
        self._here: dict[int, asyncio.StreamWriter] = {}
        self._came = asyncio.Event()
        self._gathered = False
        self._closed = False
        self._server: asyncio.Server | None = None
        self.lost: str | None = None
        self.address = ""
        self.port = 0

    async def gather(self, port: int, wait_s: float) -> None:
        """Waits for the other nodes at `port`; `address` and `port` then say where vLLM's processes meet.

        Raises NodeMissing if one has not come after `wait_s`, OptionError if the port is taken.
        """
        try:
            self._server = await asyncio.start_server(self._meet, port=port)
        except OSError as error:
            raise OptionError(f"--leader-address: cannot listen at port {port} ({error}); give another") from None
        end_s = time.monotonic() + wait_s
        while missing := [node for node in range(1, self._nodes) if node not in self._here]:
            names = ", ".join(map(str, missing))
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                await self.close()
                raise NodeMissing(
                    f"of {self._nodes} nodes {names} did not come to port {port} within {wait_s:g} s (--nodes-wait-s)"
                )
            logger.warning("waiting for nodes=%s of=%d port=%d seconds_left=%.0f", names, self._nodes, port, left_s)
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), min(left_s, _SAY_EVERY_S))
        self._gathered = True
        self.address = own_address(self._here[1])
        self.port = _free_port(self.address)
        for writer in self._here.values():
            _say(writer, address=own_address(writer), port=self.port)

    async def close(self) -> None:
        """Lets the other nodes go; they end."""
        self._closed = True
        for writer in self._here.values():
            writer.close()
        if self._server is not None:
            self._server.close()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Connections are open when the program ends; asyncio would say so as an error.
        with contextlib.suppress(asyncio.CancelledError):
            await self._look_after(reader, writer)

    async def _look_after(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HELLO_S):
                hello = json.loads(await reader.readline())
            node, facts = int(hello["node"]), dict(hello["facts"])
        except (OSError, TimeoutError, ValueError, KeyError, TypeError):
            logger.debug("somebody came who is no node", exc_info=True)
            writer.close()
            return
        if reason := self._refusal(node, facts):
            logger.error("refused: %s", reason)
            _say(writer, refused=reason)
            writer.close()
            return
        _keep_alive(writer)
        self._here[node] = writer
        self._came.set()
        logger.info("here: node=%d of=%d address=%s", node, self._nodes, writer.get_extra_info("peername")[0])
        with contextlib.suppress(OSError, ValueError):  # a line of any length
            while await reader.readline():
                logger.warning("node %d was asked to stop", node)
                self._on_stopping()
        writer.close()
        if not self._gathered:
            del self._here[node]
            logger.warning("left again: node=%d", node)
        elif not self._closed and self.lost is None:
            self.lost = f"node {node} of {self._nodes} is gone"
            self._on_lost()

    def _refusal(self, node: int, facts: dict[str, Any]) -> str | None:
        if not 1 <= node < self._nodes:
            return f"a node came with --node-rank {node}; of {self._nodes} nodes these are 1 .. {self._nodes - 1}"
        if node in self._here or self._gathered:
            return f"a second node came with --node-rank {node}; give each its own"
        for name in sorted(self._facts.keys() | facts.keys()):
            here, there = self._facts.get(name), facts.get(name)
            if here != there:
                return f"node {node} and the leader must have the same {name}: {there!r} there, {here!r} here"
        return None


class Membership:
    """A follower's end. See `join`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, port: int) -> None:
        self._reader = reader
        self._writer = writer
        self.address = address
        self.port = port

    @property
    def own_address(self) -> str:
        """Where the leader reaches this node."""
        return own_address(self._writer)

    @classmethod
    async def join(cls, host: str, port: int, node: int, facts: dict[str, Any], wait_s: float) -> "Membership":
        """Comes to the leader and waits for the others; `address` and `port` then say where vLLM's processes meet.

        Raises NodeMissing if the leader has not come after `wait_s`, OptionError if it refuses this node.
        """
        end_s = time.monotonic() + wait_s
        said_s = -_SAY_EVERY_S
        while True:
            try:
                reader, writer, answer = await _ask(host, port, node=node, facts=facts)
                break
            except OSError as error:
                problem = str(error)
            now_s = time.monotonic()
            if now_s >= end_s:
                raise NodeMissing(
                    f"the leader did not come to {host}:{port} within {wait_s:g} s (--nodes-wait-s): {problem}"
                )
            if now_s - said_s >= _SAY_EVERY_S:
                logger.warning(
                    "waiting for the leader: address=%s:%d seconds_left=%.0f (%s)", host, port, end_s - now_s, problem
                )
                said_s = now_s
            await asyncio.sleep(_TRY_EVERY_S)
        if "refused" in answer:
            writer.close()
            raise OptionError(f"the leader at {host}:{port} refused this node: {answer['refused']}")
        return cls(reader, writer, answer["address"], answer["port"])

    async def ended(self) -> None:
        """Returns when the leader is gone."""
        with contextlib.suppress(OSError):
            await self._reader.read()

    def stopping(self) -> None:
        """Tells the leader that this node was asked to stop."""
        _say(self._writer, stopping=True)

    def close(self) -> None:
        """Leaves."""
        self._writer.close()


async def _ask(host: str, port: int, **hello: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, dict[str, Any]]:
    """Says it and waits for the answer. Raises OSError."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        _keep_alive(writer)
        _say(writer, **hello)
        logger.info("the leader is there: waiting for the other nodes")
        line = await reader.readline()
        if not line:
            raise ConnectionResetError("it closed the connection")
        return reader, writer, json.loads(line)
    except BaseException:
        writer.close()
        raise


def own_address(writer: asyncio.StreamWriter) -> str:
    """The address of this machine on the network that the nodes share."""
    return writer.get_extra_info("sockname")[0]


def _say(writer: asyncio.StreamWriter, **message: Any) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):  # not everywhere but on Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
