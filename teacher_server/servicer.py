"""The service: message -> task -> allowed -> checked -> its turn -> engine -> message.

Errors, metrics and logs are interceptors.
"""

from dataclasses import replace
from typing import Any

from stillhouse.codec import decode_request, encode_response, encode_teacher
from stillhouse.v1 import teacher_pb2 as pb
from stillhouse.v1 import teacher_pb2_grpc as pb_grpc
from teacher_server.caller import CALLER
from teacher_server.gate import Gate
from teacher_server.serving import Serving
from teacher_server.validation import check_model_name, check_right, check_task


class TeacherServicer(pb_grpc.TeacherServiceServicer):
    """`stillhouse.v1.TeacherService` over the engine that answers now, behind a gate."""

    def __init__(self, serving: Serving, gate: Gate) -> None:
        self._serving = serving
        self._gate = gate

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """See `teacher.proto`. Raises `stillhouse.errors`."""
        tenant = CALLER.get().tenant
        with self._serving.engine() as engine:
            teacher = engine.describe()
            check_right(tenant, request.model, teacher)
            task = decode_request(request)
            check_task(task, teacher)
            async with self._gate.turn(
                tenant,
                tokens=len(task.token_ids),
                # The answer is in memory with its request, from when it is made until it is sent.
                size_bytes=request.ByteSize() + task.response_bytes,
                priority=task.priority,
                remaining_s=context.time_remaining(),
            ) as waited_s:
                scores = await engine.score(task)
        return encode_response(task, replace(scores, queue_wait_ms=scores.queue_wait_ms + 1e3 * waited_s))

    async def GetTeacher(self, request: pb.GetTeacherRequest, context: Any) -> pb.GetTeacherResponse:
        """See `teacher.proto`. Raises `stillhouse.errors`."""
        teacher = self._serving.describe()
        check_right(CALLER.get().tenant, request.model, teacher)
        check_model_name(request.model, teacher)
        return encode_teacher(teacher)
