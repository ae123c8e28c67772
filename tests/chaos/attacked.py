"""A server process under attack, and a client of HTTP/2 frames that does what no gRPC client would."""

import base64
import contextlib
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.rpc import error_details_pb2, status_pb2
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import StreamClosedError
from h2.settings import SettingCodes

from stillhouse.errors import DOMAIN
from tests.fakes import ROOT, child_environment

SCORE = "/stillhouse.v1.TeacherService/Score"
GET_TEACHER = "/stillhouse.v1.TeacherService/GetTeacher"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

# What Python, gRPC and the machine say of themselves, and no caller is to read.
INTERNALS = re.compile(
    r"Traceback|<class|Error\(|Exception|Unexpected|object at 0x|\.py\b|site-packages|/tmp/|/home/|/usr/|sha256"
    r"|NoneType|asyncio|teacher_server|numpy|protobuf|upb"
)


def wait_for(condition: Callable[[], Any], what: str = "the condition", within_s: float = 20.0) -> None:
    """Returns once `condition()` holds; fails the test when it does not in time."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {within_s:g} s for {what}"
        time.sleep(0.02)


@dataclass(frozen=True)
class Attacked:
    """A running server: its ready line by key, and where its log goes."""

    process: subprocess.Popen[str]
    said: dict[str, str]
    log_path: Path

    @property
    def address(self) -> str:
        return self.said["listen"]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def log(self) -> str:
        """What it wrote to standard error so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def metrics(self) -> str:
        """The page that Prometheus reads."""
        with urllib.request.urlopen(self.said["metrics"], timeout=20) as page:
            return page.read().decode()

    def metric(self, name: str) -> float:
        """Value of one series without labels."""
        found = re.search(rf"^stillhouse_teacher_{name} (\S+)$", self.metrics, re.MULTILINE)
        assert found, name
        return float(found[1])

    def counted(self, **labels: str) -> float:
        """Requests counted under all of these labels, whatever the others are."""
        total = 0.0
        for found in re.finditer(r"^stillhouse_teacher_requests_total\{(.*)\} (\S+)$", self.metrics, re.MULTILINE):
            if all(f'{name}="{value}"' in found[1].split(",") for name, value in labels.items()):
                total += float(found[2])
        return total

    @property
    def memory_bytes(self) -> int:
        """Resident memory."""
        return psutil.Process(self.process.pid).memory_info().rss

    @property
    def descriptors(self) -> int:
        """Open files and sockets."""
        return psutil.Process(self.process.pid).num_fds()


@contextlib.contextmanager
def attacked(directory: Path, *options: object, module: str = "benchmarks.synthetic_server") -> Iterator[Attacked]:
    """A synthetic server, ready; its log lies in `directory`."""
    log_path = directory / "server.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--listen", "127.0.0.1:0", *map(str, options)],
            cwd=ROOT,
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if line.startswith("health_port="):
            line = process.stdout.readline()
        assert line.startswith("teacher-server ready: "), f"not ready: {line!r}\n{log_path.read_text()}"
        said = dict(part.split("=", 1) for part in shlex.split(line.removeprefix("teacher-server ready: ")))
        yield Attacked(process, said, log_path)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class Ending:
    """How a call ended: code and text, and of the contract's details the reason and its fields."""

    code: str
    text: str = ""
    reason: str = ""
    fields: tuple[tuple[str, str], ...] = ()
    details: str = ""

    @property
    def everything(self) -> str:
        """All that the caller could read."""
        return f"{self.text} {dict(self.fields)} {self.details}"


def ending_of(error: Any) -> Ending:
    """Of a failed call of a gRPC client."""
    trailers = dict(error.trailing_metadata() or ())
    return _ending(error.code().name, error.details() or "", trailers.get("grpc-status-details-bin", b""))


def _ending(code: str, text: str, details: bytes) -> Ending:
    info, status = error_details_pb2.ErrorInfo(), status_pb2.Status.FromString(details)
    for detail in status.details:
        detail.Unpack(info)
    assert info.domain in ("", DOMAIN)
    return Ending(code, text, info.reason, tuple(sorted(info.metadata.items())), str(status))


_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass
class Stream:
    """One HTTP/2 stream's answer so far."""

    headers: dict[bytes, bytes]
    body: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def ending(self) -> Ending:
        """As gRPC means it; code is HTTP-nnn or RST-n where gRPC's status is missing."""
        status = self.headers.get(b"grpc-status")
        if status is None:
            if self.reset is not None:
                return Ending(f"RST-{self.reset}")
            return Ending(f"HTTP-{self.headers.get(b':status', b'').decode()}")
        encoded = self.headers.get(b"grpc-status-details-bin", b"")
        details = base64.b64decode(encoded + b"=" * (-len(encoded) % 4))
        text = urllib.parse.unquote(self.headers.get(b"grpc-message", b"").decode("latin-1"))
        return _ending(_CODES[int(status)], text, details)


def frame(message: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """A gRPC message on the wire; `length` is what its prefix claims, by default the truth."""
    return bytes([compressed]) + (len(message) if length is None else length).to_bytes(4, "big") + message


class RawClient:
    """One HTTP/2 connection over plain TCP, blocking. window: bytes that the server may send on each stream."""

    def __init__(self, port: int, *, window: int = 2**24, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        # Nothing is validated or put right on the way out: wrong headers are the point.
        config = H2Configuration(
            header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.http2 = H2Connection(config)
        self.http2.initiate_connection()
        self.http2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        if window > 65_535:
            self.http2.increment_flow_control_window(2**30)
        self.streams: dict[int, Stream] = {}
        self.terminated = False
        self._flush()

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def start(
        self,
        path: str = SCORE,
        metadata: tuple[tuple[bytes, bytes], ...] = (),
        *,
        end: bool = False,
        replace: dict[bytes, bytes | None] | None = None,
    ) -> int:
        """Sends the headers of a call and returns its stream. replace: of gRPC's own headers; None leaves one out."""
        own: dict[bytes, bytes | None] = {
            b":method": b"POST",
            b":scheme": b"http",
            b":path": path.encode(),
            b":authority": b"localhost",
            b"te": b"trailers",
            b"content-type": b"application/grpc",
            **(replace or {}),
        }
        headers = [(name, value) for name, value in own.items() if value is not None]
        stream = self.http2.get_next_available_stream_id()
        self.http2.send_headers(stream, [*headers, *metadata], end_stream=end)
        self.streams[stream] = Stream({})
        self._flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = True) -> None:
        """Sends a body, as far as the server takes it; less arrives if it resets the stream meanwhile."""
        with contextlib.suppress(StreamClosedError):
            while data:
                size = min(len(data), self.http2.local_flow_control_window(stream), self.http2.max_outbound_frame_size)
                if size == 0:
                    self.receive()
                    if self.streams[stream].ended:
                        return
                    continue
                self.http2.send_data(stream, data[:size])
                data = data[size:]
                self._flush()
            if end:
                self.http2.end_stream(stream)
                self._flush()

    def push(self, stream: int, data: bytes) -> int:
        """Sends as much as the server takes now; returns how much that was."""
        if self.streams[stream].ended:
            return 0
        sent = 0
        while size := min(
            len(data) - sent, self.http2.local_flow_control_window(stream), self.http2.max_outbound_frame_size
        ):
            self.http2.send_data(stream, data[sent : sent + size])
            sent += size
            self._flush()
        return sent

    def call(self, data: bytes, path: str = SCORE, metadata: tuple[tuple[bytes, bytes], ...] = ()) -> Stream:
        """A whole call with these bytes as its body, frame included."""
        stream = self.start(path, metadata)
        self.send(stream, data)
        return self.wait(stream)

    def reset(self, stream: int) -> None:
        """Takes a call back, unless the server has ended it."""
        with contextlib.suppress(StreamClosedError):
            self.http2.reset_stream(stream, 8)
            self._flush()

    def wait(self, stream: int) -> Stream:
        """Reads until the stream has ended."""
        answer = self.streams[stream]
        while not answer.ended:
            self.receive()
        return answer

    def receive(self, *, flush: bool = True) -> list[Event]:
        """Reads what is there, waiting for some."""
        data = self.socket.recv(2**20)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        events = self.http2.receive_data(data)
        for event in events:
            self._note(event)
        if flush:
            self._flush()
        return events

    def _note(self, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            self.terminated = True
            return
        stream = self.streams.get(getattr(event, "stream_id", 0) or 0)
        if stream is None:
            return
        if isinstance(event, ResponseReceived | TrailersReceived | InformationalResponseReceived):
            stream.headers |= dict(event.headers)
        elif isinstance(event, DataReceived):
            stream.body += event.data
            with contextlib.suppress(StreamClosedError):
                self.http2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, StreamEnded):
            stream.ended = True
        elif isinstance(event, StreamReset):
            stream.ended, stream.reset = True, int(event.error_code)

    def _flush(self) -> None:
        self.socket.sendall(self.http2.data_to_send())
