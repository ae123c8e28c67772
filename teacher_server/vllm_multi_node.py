"""A teacher on several machines: what its nodes do that a teacher on one does not.

Node 0 leads: it has the scheduler, answers callers and is what a service points at. The others follow: their workers
hold a part of the model and do what the leader's scheduler sends them. All end with the first that ends, and their
supervisor starts all of them anew.
"""

import asyncio
import dataclasses
import json
import logging
import os
import signal
import time
from typing import Any

from stillhouse.codec import Teacher
from teacher_server.engine import EngineLost
from teacher_server.options import Options
from teacher_server.pages import Pages
from teacher_server.vllm_adapter import VERSION, Meeting, NodeWorkers, ProcessFailed, Settings, Vllm, kill_processes
from teacher_server.vllm_nodes import Leader, Membership, NodeMissing

logger = logging.getLogger(__name__)

_WATCH_S = 0.5
_DRAIN_EXTRA_S = 15.0
"""What a leader that drains may take beyond `--drain-s` to stop."""
_OWN_TO_EACH_NODE = ("model", "node_rank", "meeting", "log_level")


async def lead(options: Options, teacher: Teacher, settings: Settings) -> Vllm:
    """Waits for the other nodes and starts the engine with them.

    Raises what `Vllm.start` raises, and NodeMissing if a node does not come or goes again.
    """
    leader = Leader(
        options.nodes,
        _facts(teacher, settings),
        on_lost=kill_processes,
        on_stopping=lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    await leader.gather(options.leader[1], options.nodes_wait_s)
    meeting = Meeting(leader.address, leader.port, leader.address)
    start = asyncio.create_task(
        asyncio.to_thread(Vllm.start, dataclasses.replace(settings, meeting=meeting), lambda: leader.lost)
    )
    while not start.done():
        if leader.lost is not None:  # it may have begun another process since
            kill_processes()
        await asyncio.wait({start}, timeout=_WATCH_S)
    if leader.lost is not None:
        raise _missing(leader.lost, start.exception())
    return start.result()


async def follow(options: Options, pages: Pages, teacher: Teacher, settings: Settings) -> None:
    """Holds a part of the model until the leader ends, which it is asked to do at SIGTERM.

    Raises what `NodeWorkers.start` raises, OptionError if the leader refuses this node, NodeMissing if the leader does
    not come or goes again, and EngineLost if it or a worker ends later without being asked to.
    """
    pages.metrics.registry.unregister(pages.metrics.ready)  # it is no server that could be ready or not
    host, port = options.leader
    membership = await Membership.join(host, port, options.node_rank, _facts(teacher, settings), options.nodes_wait_s)
    ended = asyncio.create_task(membership.ended())
    meeting = Meeting(membership.address, membership.port, membership.own_address)
    start = asyncio.create_task(asyncio.to_thread(NodeWorkers.start, dataclasses.replace(settings, meeting=meeting)))
    while not start.done():
        if ended.done():
            kill_processes()
        await asyncio.wait({start}, timeout=_WATCH_S)
    gone = f"the leader at {host}:{port} is gone"
    if ended.done():
        raise _missing(gone, start.exception())
    workers = start.result()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    _set_ready(pages, True)
    said = f"node={options.node_rank} of={options.nodes} leader={host}:{port} metrics={pages.metrics_url}"
    print(f"teacher-server follows: {said}" + (f" health_port={pages.health.port}" if pages.health else ""), flush=True)
    try:
        end_s: float | None = None
        while not ended.done() and not workers.dead and (end_s is None or time.monotonic() < end_s):
            if stopped.is_set() and end_s is None:
                logger.info("stopping: the leader drains first")
                _set_ready(pages, False)
                membership.stopping()
                end_s = time.monotonic() + options.drain_s + _DRAIN_EXTRA_S
            if pages.health:
                pages.health.beat(0.0)
            await asyncio.wait({ended}, timeout=_WATCH_S)
    finally:
        cause = None if ended.done() or not workers.dead else workers.cause_of_death
        membership.close()
        await asyncio.to_thread(workers.shutdown)
    if not stopped.is_set():
        raise EngineLost(gone if cause is None else f"the vLLM workers of this node died: {cause}")
    logger.info("stopped")


def _missing(what: str, error: BaseException | None) -> NodeMissing:
    """Processes that lose their peers fail, and peers are lost when they fail: both are said."""
    if isinstance(error, ProcessFailed):
        what += f"; of this node's own processes one failed: {error}"
    return NodeMissing(what)


def _set_ready(pages: Pages, ready: bool) -> None:
    """For its supervisor alone: requests do not come to a follower."""
    pages.served = True
    if pages.health:
        pages.health.set_ready(ready)


def _facts(teacher: Teacher, settings: Settings) -> dict[str, Any]:
    """What has to be the same on all nodes, or they would hang, or their parts would not be of one model."""
    own = dataclasses.asdict(settings)
    facts = {name: value for name, value in own.items() if name not in _OWN_TO_EACH_NODE}
    facts |= {
        "model_revision": teacher.model_revision,
        "server_version": teacher.server_version,
        "vllm_version": VERSION,
    }
    return json.loads(json.dumps(facts))
