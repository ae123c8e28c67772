"""Faults under load: every sequence is answered, once, bit for bit, and no caller sees an error.

Each test hits real processes or real packets while two clients keep sequences in flight, and checks that what it did
was felt: by retries, by dropped packets, by new connections.
"""

import contextlib
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stillhouse.client import TeacherClient, Tls
from stillhouse.errors import StillhouseError
from tests.certificates import Authority, replace
from tests.chaos.pool_under_test import (
    FULL,
    Load,
    Namespace,
    PoolServer,
    figure,
    more_when_full,
    only_when_full,
    running,
    say,
    told,
    tool,
)

pytestmark = pytest.mark.timeout(600 if FULL else 180)

BEFORE = int(more_when_full(50, 600))
AFTER = int(more_when_full(100, 2000))


def test_a_server_that_is_killed_costs_no_answer() -> None:
    with running(3) as servers, Load(servers) as load:
        load.more(BEFORE)
        servers[0].kill()
        load.more(AFTER)
        report = told(load.stop())
    report.check_exactly_once()
    assert report.retries.get("UNAVAILABLE", 0) > 0  # calls were on their way to it


def test_a_server_that_drains_costs_no_answer() -> None:
    with running(3) as servers, Load(servers) as load:
        load.more(BEFORE)
        servers[0].drain()
        assert servers[0].process.returncode == 0
        load.more(AFTER)
        report = told(load.stop())
    report.check_exactly_once()


@only_when_full
def test_a_rolling_update_at_the_same_addresses_costs_no_answer() -> None:
    with running(3) as servers, Load(servers) as load:
        for server in servers:
            load.more(BEFORE)
            server.drain()
            server.start()
        load.more(AFTER)
        report = told(load.stop())
    report.check_exactly_once()
    assert all(report.servers.values())  # each is used again


def test_a_rolling_update_to_new_addresses_is_followed_by_name() -> None:
    """As Kubernetes does it behind a headless service: the new one joins the name, the old one leaves it and drains."""
    with Namespace() as network, contextlib.ExitStack() as stack:
        old = [PoolServer(listen=f"127.0.1.{number}:50051", namespace=network) for number in (1, 2, 3)]
        new = [PoolServer(listen=f"127.0.2.{number}:50051", namespace=network) for number in (1, 2, 3)]
        stack.enter_context(running(old))
        network.names({"teachers": [host(server) for server in old]})
        load = stack.enter_context(Load(["dns:///teachers:50051"], namespace=network))
        current = list(old)
        for leaving, joining in zip(old, new, strict=True):
            load.more(BEFORE)
            stack.callback(joining.end)
            joining.start()
            current = [server for server in current if server is not leaving] + [joining]
            network.names({"teachers": [host(server) for server in current]})
            leaving.drain()
        load.go_on_for(5.5)  # a name is looked up every 5 s
        load.more(AFTER)
        report = told(load.stop())
    report.check_exactly_once()
    assert report.servers == {server.address: True for server in new}


def host(server: PoolServer) -> str:
    return server.address.rpartition(":")[0]


def test_five_seconds_without_any_server_cost_no_answer() -> None:
    outage_s = 5.0
    with running(3) as servers, Load(servers) as load:
        load.more(BEFORE)
        for server in servers:
            server.kill()
        died_s = time.monotonic()
        load.go_on_for(outage_s)
        for server in servers:
            server.begin()
        for server in servers:
            server.wait_until_ready()
        back_s = time.monotonic()
        load.more(AFTER)
        report = told(load.stop())
    first_s = min(end_s for _, end_s, _ in report.replies if end_s > back_s)
    say(outage_s=back_s - died_s, first_answer_after_s=first_s - back_s)
    report.check_exactly_once()
    assert report.retries["UNAVAILABLE"] >= load.plan.clients * load.plan.in_flight
    assert report.longest_gap_s() >= outage_s - 1.0  # it was one
    assert first_s - back_s < 10.0  # servers rest for so long at most


def test_connections_that_are_reset_cost_no_answer() -> None:
    with Namespace() as network, running(3, namespace=network) as servers, Load(servers, namespace=network) as load:
        resets = 0
        for _ in range(int(more_when_full(3, 30))):
            load.more(BEFORE)
            # Kills every connection in the network in the middle of whatever it carries.
            killed = subprocess.run(
                [*network.prefix, tool("ss"), "-H", "-K", "-t", "-n", "state", "established"],
                capture_output=True,
                text=True,
                timeout=30,
            )
            resets += len(killed.stdout.splitlines())
        load.more(AFTER)
        report = told(load.stop())
    if resets == 0:
        pytest.skip("needs a kernel with CONFIG_INET_DIAG_DESTROY: `ss -K` reset nothing")
    say(resets=float(resets))
    report.check_exactly_once()
    assert report.retries.get("UNAVAILABLE", 0) > 0


def test_two_percent_packet_loss_costs_no_answer() -> None:
    with Namespace() as network:
        tool("nft")
        # The device's packets are as small as a network's, or hardly any would be lost.
        network.run("ip", "link", "set", "lo", "mtu", "1500", "gso_max_segs", "1")
        with running(3, namespace=network) as servers, Load(servers, namespace=network) as load:
            load.more(BEFORE)
            network.filter("meta l4proto tcp numgen random mod 100 < 2 counter drop")
            load.more(2 * AFTER, within_s=120.0)
            dropped = network.dropped()
            report = told(load.stop())
    say(dropped_packets=float(dropped))
    report.check_exactly_once()
    assert dropped > 20


SLOW_LINK = ("rate", "3mbit", "burst", "128kb", "latency", "400ms")


@only_when_full
def test_a_slow_link_costs_no_answer() -> None:
    with Namespace() as network:
        tool("tc")
        with running(2, namespace=network) as servers, Load(servers, namespace=network) as load:
            load.more(BEFORE)
            # A tenth of what the load would take: calls wait for the wire now, not for the engine.
            network.run("tc", "qdisc", "add", "dev", "lo", "root", "tbf", *SLOW_LINK)
            load.more(AFTER // 2, within_s=120.0)
            network.run("tc", "qdisc", "delete", "dev", "lo", "root")
            load.more(AFTER)
            report = told(load.stop())
    report.check_exactly_once()


def test_certificates_of_both_ends_are_exchanged_without_a_lost_answer(tmp_path: Path) -> None:
    """To another authority, in the order that leaves no gap: trust both, exchange the certificates, trust the new."""
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    server_pair, client_pair = old.server(), old.client("trainer.example")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(old.certificate.read_bytes())
    options = (
        *("--tls-certificate", str(server_pair.certificate), "--tls-key", str(server_pair.key)),
        *("--tls-client-ca", str(trusted)),
    )
    files = {"ca": trusted, "certificate": client_pair.certificate, "key": client_pair.key}
    kept = {name: tmp_path / f"kept-{name}.pem" for name in files}
    for name, file in files.items():
        kept[name].write_bytes(file.read_bytes())
    with (
        running(3, *options) as servers,
        Load(servers, tls={name: str(file) for name, file in files.items()}) as load,
    ):
        load.more(BEFORE)
        replace(trusted, old.certificate.read_bytes() + new.certificate.read_bytes())
        load.go_on_for(1.7)  # both ends look once a second
        new.server().replace(server_pair)
        new.client("trainer.example").replace(client_pair)
        load.go_on_for(1.7)
        replace(trusted, new.certificate.read_bytes())
        load.go_on_for(1.7)
        for server in servers:  # connections that are new for certain
            server.kill()
            server.start()
            load.more(BEFORE)
        report = told(load.stop())
        with (
            TeacherClient([servers[0].address], tls=Tls(**kept)) as stale,  # what was shown before is worth nothing now
            pytest.raises(StillhouseError) as caught,
        ):
            stale.get_teacher(deadline_s=2.0)
        assert caught.value.reason in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    report.check_exactly_once()
    assert all(report.servers.values())


SILENT = b""
HALF_A_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: teacher\r\n"
WITHOUT_READING = b"GET /metrics HTTP/1.1\r\nHost: teacher\r\n\r\n" * 20


@contextlib.contextmanager
def scrapers(server: PoolServer, number: int) -> Iterator[None]:
    """So many who open /metrics and hang, in one of three ways; killed at the end, which resets what they hold."""
    port = int(server.metrics_url.rpartition(":")[2].partition("/")[0])
    held = []
    try:
        for index in range(number):
            opened = socket.socket()
            # As little room as the system allows, so that the server has to wait for the reader.
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            opened.connect(("127.0.0.1", port))
            opened.sendall((SILENT, HALF_A_REQUEST, WITHOUT_READING)[index % 3])
            held.append(opened)
        yield
    finally:
        for opened in held:
            opened.close()


def scrape_s(server: PoolServer) -> float:
    """How long one good look at /metrics takes."""
    started_s = time.monotonic()
    assert "stillhouse_teacher_requests" in server.metrics
    return time.monotonic() - started_s


def test_scrapers_that_hang_cost_no_answer_and_leave_nothing_behind() -> None:
    number = int(more_when_full(24, 150))  # more would take longer to connect than the server waits for them
    with running(1, "--tokens-per-s", "30000") as (server,), Load([server]) as load:
        load.more(BEFORE)
        process = psutil.Process(server.process.pid)
        before = process.num_threads(), process.num_fds()
        quiet_s = load.more(AFTER)
        end_s = time.monotonic() + 20.0
        with scrapers(server, number):
            while process.num_fds() - before[1] <= number // 2:  # before it gives up those that say nothing
                assert time.monotonic() < end_s, f"{process.num_fds() - before[1]} descriptors more"
                load.go_on_for(0.1)
            busy_s = load.more(AFTER)
            slowest_s = max(scrape_s(server) for _ in range(3))
        end_s = time.monotonic() + 20.0
        # A few threads and descriptors are gRPC's own to open and close.
        while process.num_threads() > before[0] + 5 or process.num_fds() > before[1] + 5:
            assert time.monotonic() < end_s, f"{before} became {process.num_threads()}, {process.num_fds()}"
            load.go_on_for(0.1)
        report = told(load.stop())
    say(quiet_s=quiet_s, busy_s=busy_s, slowest_scrape_s=slowest_s)
    report.check_exactly_once()
    assert not report.retries
    assert slowest_s < 5.0


def clock(tmp_path: Path, name: str) -> tuple[Path, dict[str, str]]:
    """A file that says how wrong the wall clock is, and the environment of a process that believes it.

    The monotonic clock stays what it is: no system lets that jump.
    """
    tool("faketime")
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketimeMT.so.1: scripts/install_test_tools.sh installs it")
    file = tmp_path / name
    file.write_text("+0\n")
    return file, {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_RESET": "1",
    }


@pytest.mark.parametrize("whose", ["servers", pytest.param("callers", marks=only_when_full)])
def test_a_wall_clock_that_jumps_by_an_hour_costs_no_answer(tmp_path: Path, whose: str) -> None:
    file, variables = clock(tmp_path, "clock")
    with (
        running(2, variables=variables if whose == "servers" else None) as servers,
        Load(servers, variables=variables if whose == "callers" else None) as load,
    ):
        load.more(BEFORE)
        usual_s = load.more(BEFORE)
        slowest_s = 0.0
        for offset in ("+1h", "-1h", "+0") * int(more_when_full(1, 5)):
            replace(file, f"{offset}\n".encode())
            slowest_s = max(slowest_s, load.more(BEFORE))
        report = told(load.stop())
    say(whose=whose, usual_s=usual_s, slowest_s=slowest_s)
    report.check_exactly_once()
    assert not report.retries
    assert report.longest_gap_s() < figure(5.0, 30.0)


def test_a_full_disk_under_the_archive_costs_no_answer(tmp_path: Path) -> None:
    tool("mount")
    place = tmp_path / "archive"
    place.mkdir()
    # A mount of its own, seen by this one process, gone with it.
    script = f'mount -t tmpfs -o size=1m tmpfs {place} && exec "$@"'
    own_mount = (tool("unshare"), "--mount", "--propagation", "private", "sh", "-c", script, "sh")
    if subprocess.run([*own_mount, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs root: mounts a small disk")
    with running(2) as servers, Load(servers, clients=1, in_flight=24, prefix=own_mount, archive=str(place)) as load:
        load.more(AFTER)
        report = told(load.stop())
    say(archive=str(report.archive))
    report.check_exactly_once()
    assert report.archive["written"] > 5
    assert report.archive["write_failures"] > 5
    assert report.archive["written"] + report.archive["write_failures"] == report.answered
