"""Many connections to one server, and nothing on them but, if asked for, keepalive pings.

    python -m benchmarks.pool_idle HOST:PORT CONNECTIONS PING_EVERY_MS

gRPC's clients ping while a call is open: with PING_EVERY_MS above 0 each connection has a watch on the server's health,
a call that costs nothing else. Ends when killed.
"""

import asyncio
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stillhouse.pool import CHANNEL_OPTIONS


async def _run(address: str, connections: int, ping_every_ms: int) -> None:
    options = [(name, value) for name, value in CHANNEL_OPTIONS if name != "grpc.keepalive_time_ms"]
    options += [("grpc.keepalive_time_ms", ping_every_ms), ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(connections)]
    if ping_every_ms:
        request = health_pb2.HealthCheckRequest()
        watches = [health_pb2_grpc.HealthStub(channel).Watch(request) for channel in channels]  # pyright: ignore
        for watch in watches:
            await watch.read()
    else:
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
    print("connected", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    address, connections, ping_every_ms = sys.argv[1:]
    asyncio.run(_run(address, int(connections), int(ping_every_ms)))


if __name__ == "__main__":
    main()
