"""Log lines: one a call, whatever a caller sends."""

import http.client
import json
import logging
import socket
import sys
import urllib.request
from typing import Any

import pytest

from teacher_server import logs
from teacher_server.metrics import Metrics
from tests.calls import until

HOSTILE = ["a\nb", "a\r\nERROR x", "code=OK", 'say "hi"', "it's", "", "\x1b[31mred", "\u2028", "\u202e", "a\0b", "a b"]


def record(message: str = "answered", **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("teacher_server.requests", logging.INFO, "file.py", 1, message, (), None)
    made.fields = fields
    return made


def text_of(made: logging.LogRecord) -> str:
    return logs.TextFormatter("%(levelname)s %(message)s").format(made)


def test_fields_stand_after_the_message_as_key_and_value() -> None:
    line = text_of(record(method="Score", ms=1.5, tokens=20, none=None))
    assert line == "INFO answered method=Score ms=1.5 tokens=20 none=None"


@pytest.mark.parametrize("value", HOSTILE)
def test_no_value_writes_a_line_or_a_field_of_its_own(value: str) -> None:
    line = text_of(record(error=value, last=1))
    assert line == f"INFO answered error={value!r} last=1"
    assert line.isprintable()


@pytest.mark.parametrize("value", [*HOSTILE, "\U0001f525", "é"])
def test_a_json_line_is_one_object_that_gives_every_value_back(value: str) -> None:
    line = logs.JsonFormatter().format(record(error=value, tokens=20))
    assert line.isascii() and line.isprintable()
    found = json.loads(line)
    assert (found["error"], found["tokens"], found["message"]) == (value, 20, "answered")
    assert (found["level"], found["logger"]) == ("INFO", "teacher_server.requests")
    assert found["time"].endswith("+00:00")


def test_a_json_line_holds_a_failure_s_traceback_on_the_same_line() -> None:
    made = record("failed")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = logs.JsonFormatter().format(made)
    assert "\n" not in line
    assert json.loads(line)["traceback"].endswith("ValueError: two\nlines")


def test_what_json_cannot_hold_is_written_as_text() -> None:
    assert json.loads(logs.JsonFormatter().format(record(kind=ValueError)))["kind"] == "<class 'ValueError'>"


@pytest.mark.parametrize(
    ("logger", "error", "shown"),
    [
        ("grpc._cython.cygrpc", type("ExecuteBatchError", (Exception,), {})(), False),
        ("grpc._cython.cygrpc", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), False),
        ("grpc._cython.cygrpc", ValueError("a fault"), True),
        ("teacher_server.failures", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), True),
        ("grpc._cython.cygrpc", None, True),
    ],
)
@pytest.mark.parametrize("style", logs.FORMATS)
def test_callers_that_go_away_or_send_no_text_fill_no_log(
    style: str, logger: str, error: Exception | None, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        logs.set_up("info", style)
        logging.getLogger(logger).error("something of it", exc_info=error)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert ("something of it" in capsys.readouterr().err) == shown


def test_a_scraper_that_says_nothing_is_let_go_and_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_server.metrics._SCRAPE_TIMEOUT_S", 0.2)
    port, stop = Metrics().listen("127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
        assert silent.recv(1) == b""  # closed by the server

        def answered() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
                    return b"stillhouse_teacher_requests_in_flight" in page.read()
            except (OSError, http.client.HTTPException):  # this process was too slow to ask
                return False

        until(answered)
    stop()
