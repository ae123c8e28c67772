"""`grpc.health.v1` on the server's own port.

Not grpcio's: that one holds a lock of all watchers of a service while it writes to one of them, so that a single
watcher who does not read stops every change, and with it the drain.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):
    """The state of each service. Use it from one event loop."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}
        self._changed = asyncio.Event()

    def set(self, states: dict[str, Any]) -> None:
        """Replaces all states, by the services' names."""
        self._states = states
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """The state now; NOT_FOUND for a service that there is not."""
        if request.service not in self._states:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=self._states[request.service])

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """The state now and whenever it has changed. Who reads slowly misses what was in between."""
        last = None
        while True:
            changed = self._changed
            state = self._states.get(request.service, _UNKNOWN)
            if state != last:
                await context.write(health_pb2.HealthCheckResponse(status=state))
            last = state
            await changed.wait()
