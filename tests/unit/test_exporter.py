"""The Prometheus endpoint of a run: what is on it, when, and who may keep it busy."""

import contextlib
import http.client
import re
import socket
import urllib.request
from pathlib import Path

import pytest

import student_trainer.exporter as module
from student_trainer.config import ConfigError, MetricsPage, metrics_page
from student_trainer.exporter import Exporter
from tests.calls import until
from tests.toy import toy_config

LOCAL = MetricsPage("127.0.0.1", 0, 0.0)


@pytest.fixture
def exporter():
    running = Exporter(LOCAL)
    yield running
    running.close()


def _text(exporter: Exporter) -> str:
    return urllib.request.urlopen(exporter.url, timeout=10).read().decode()


def _text_if_in_time(exporter: Exporter) -> str:
    """Nothing, if this process was too slow to ask."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return _text(exporter)
    return ""


def test_every_figure_is_a_gauge_and_one_can_be_set_in_the_middle_of_a_step(exporter):
    exporter.show({"kl": 0.5, "evaluation": {"pass@1": 1.0}, "alarm_length": True})
    exporter.set("teacher_outage_now_s", 12.0)
    for line in ("kl 0.5", "alarm_length 1.0", "teacher_outage_now_s 12.0"):
        assert f"stillhouse_student_{line}\n" in _text(exporter)


def test_before_the_first_step_the_times_are_those_of_the_start(exporter, monkeypatch):
    before = _text(exporter)
    for moment in ("last_step", "last_checkpoint"):
        (start,) = re.findall(rf"^stillhouse_student_{moment}_timestamp_seconds (\S+)$", before, re.MULTILINE)
        assert float(start) > 1.7e9
    monkeypatch.setattr(module.time, "time", lambda: 4e9)
    exporter.happened("last_step")
    assert "stillhouse_student_last_step_timestamp_seconds 4e+09\n" in _text(exporter)
    assert "last_checkpoint_timestamp_seconds 4e+09" not in _text(exporter)


def test_a_run_has_one_description_at_a_time(exporter, tmp_path):
    config = toy_config(tmp_path, "127.0.0.1:9", ("teacher.model=oak",))
    exporter.describe(config)
    labels = 'recipe="reverse_kl_rewards",teacher_model="oak",teacher_revision=""'
    assert f"stillhouse_student_info{{{labels},version=" in _text(exporter)
    exporter.describe(config, "oak", "r1")
    exporter.describe(config, "oak", "r2")
    assert re.findall(r'^stillhouse_student_info.*teacher_revision="(\w*)".* 1.0$', _text(exporter), re.MULTILINE) == [
        "r2"
    ]
    assert "stillhouse_student_steps 10.0\n" in _text(exporter)


def test_nothing_has_failed_until_it_has_and_the_first_reason_stands(exporter):
    assert "stillhouse_student_failed{" not in _text(exporter)
    exporter.failed("verifier")
    exporter.failed("peer")
    assert re.findall(r"^stillhouse_student_failed.*$", _text(exporter), re.MULTILINE) == [
        'stillhouse_student_failed{reason="verifier"} 1.0'
    ]


def test_connections_that_say_nothing_are_let_go_and_keep_nobody_waiting(monkeypatch):
    monkeypatch.setattr(module, "_SCRAPE_TIMEOUT_S", 0.2)
    exporter = Exporter(LOCAL)
    port = int(exporter.url.rsplit(":", 1)[1].removesuffix("/metrics"))
    silent = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(20)]
    try:
        until(lambda: "stillhouse_student_step 0.0" in _text_if_in_time(exporter))
        assert [connection.recv(1) for connection in silent] == [b""] * 20
    finally:
        for connection in silent:
            connection.close()
        exporter.close()


def test_it_listens_where_it_is_told_to():
    exporter = Exporter(MetricsPage("::1", 0, 0.0))
    try:
        assert exporter.url.startswith("http://[::1]:") and "stillhouse_student_step" in _text(exporter)
    finally:
        exporter.close()


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"metrics_port: {port} of 127.0.0.1 cannot be used .* 0 takes a free"):
            Exporter(MetricsPage("127.0.0.1", port, 0.0))


@pytest.mark.parametrize(
    ("text", "overrides", "page"),
    [
        ("metrics_port: 9465\nstepz: 1\n", [], MetricsPage("127.0.0.1", 9465, 0.0)),
        ("metrics_port: 9465\n", ["metrics_host=0.0.0.0", "metrics_hold_s=60"], MetricsPage("0.0.0.0", 9465, 60.0)),
        ("steps: 1\n", [], None),
        ("metrics_port: 99999\n", [], None),
        ("metrics_port: 9465\nmetrics_hold_s: -1\n", [], None),
        ("metrics_port: [\n", [], None),
        ("- metrics_port\n", [], None),
    ],
)
def test_where_the_page_is_wanted_is_known_whatever_else_is_wrong(tmp_path: Path, text, overrides, page):
    (tmp_path / "config.yaml").write_text(text)
    assert metrics_page(tmp_path / "config.yaml", overrides) == page
    assert metrics_page(tmp_path / "none.yaml", overrides) is None
