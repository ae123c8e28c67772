"""The service: message -> task -> checked -> engine -> message. Errors, metrics and logs are interceptors."""

from typing import Any

from stillhouse.codec import decode_request, encode_response, encode_teacher
from stillhouse.v1 import teacher_pb2 as pb
from stillhouse.v1 import teacher_pb2_grpc as pb_grpc
from teacher_server.engine import Engine
from teacher_server.validation import check_model_name, check_task


class TeacherServicer(pb_grpc.TeacherServiceServicer):
    """`stillhouse.v1.TeacherService` over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """See `teacher.proto`. Raises `stillhouse.errors`."""
        task = decode_request(request)
        check_task(task, self._engine.describe())
        return encode_response(task, await self._engine.score(task))

    async def GetTeacher(self, request: pb.GetTeacherRequest, context: Any) -> pb.GetTeacherResponse:
        """See `teacher.proto`. Raises `stillhouse.errors`."""
        teacher = self._engine.describe()
        check_model_name(request.model, teacher)
        return encode_teacher(teacher)
