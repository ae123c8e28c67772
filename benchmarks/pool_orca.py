"""The synthetic server with ORCA load reports in its answers' trailers, for gRPC's own weighted_round_robin.

    python -m benchmarks.pool_orca (the options of benchmarks.synthetic_server)

A report says the answers of the last second (rps) and the share of it in which work was pending (utilization); the
policy's weight is their quotient (gRFC A58), so of two busy servers each gets what it can do.
"""

import struct
import sys
import time
from collections import deque
from typing import Any

from benchmarks import synthetic_server
from stillhouse.v1 import teacher_pb2 as pb
from teacher_server import server
from teacher_server.servicer import TeacherServicer

_KEY = "endpoint-load-metrics-bin"
_WINDOW_S = 1.0


def report(*, utilization: float, rps: float) -> bytes:
    """An xds.data.orca.v3.OrcaLoadReport: doubles 1 cpu_utilization, 6 rps_fractional, 9 application_utilization."""
    fields = ((1, utilization), (6, rps), (9, utilization))
    return b"".join(struct.pack("<Bd", number << 3 | 1, value) for number, value in fields)


class ReportingServicer(TeacherServicer):
    """The servicer, and a report with every answer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._ends_s: deque[float] = deque()
        self._pending = 0
        self._busy: deque[tuple[float, float]] = deque()  # (from, to), times with work
        self._busy_since_s = 0.0

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """See TeacherServicer."""
        if not self._pending:
            self._busy_since_s = time.monotonic()
        self._pending += 1
        try:
            return await super().Score(request, context)
        finally:
            self._pending -= 1
            context.set_trailing_metadata(((_KEY, self._report(time.monotonic())),))

    def _report(self, now_s: float) -> bytes:
        since_s = now_s - _WINDOW_S
        self._ends_s.append(now_s)
        while self._ends_s[0] < since_s:
            self._ends_s.popleft()
        if not self._pending:
            self._busy.append((self._busy_since_s, now_s))
        while self._busy and self._busy[0][1] < since_s:
            self._busy.popleft()
        busy_s = sum(end_s - max(start_s, since_s) for start_s, end_s in self._busy)
        if self._pending:
            busy_s += now_s - max(self._busy_since_s, since_s)
        return report(utilization=min(1.0, max(1e-3, busy_s / _WINDOW_S)), rps=len(self._ends_s) / _WINDOW_S)


def main() -> int:
    server.TeacherServicer = ReportingServicer
    return synthetic_server.main()


if __name__ == "__main__":
    sys.exit(main())
