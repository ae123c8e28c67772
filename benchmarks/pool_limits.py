"""Where the design breaks first: each limit from figures of the same run, by arithmetic that the table shows."""

import math
from typing import Any

Row = dict[str, Any]

MAX_SERVERS = 32
PING_EVERY_S = 10.0
CORE_SHARE = 0.1
"""Of one core, that connections may take for doing nothing."""
TOKENS = 2000
"""Of a sequence, where requests are made of tokens."""


def limits(result: Row) -> list[Row]:
    """The table, of what `result` has."""
    rows: list[Row] = []
    if "transport" in result:
        rows += _event_loop(result["transport"])
    if "queue" in result:
        rows += _queue(result["queue"])
    if "idle_connections" in result:
        rows += _connections(result["idle_connections"])
    if "cells" in result:
        rows += _balance(result["cells"])
    return rows


def _event_loop(transport: Row) -> list[Row]:
    rows = []
    for row in transport["rows"]:
        if row["contender"] == "stillhouse":
            most = 1e3 / row["server_cpu_ms"]
            reached = f"{most:,.0f} replies/s a server process"
            if row["replies"] != "small":
                reached += f" = {most * TOKENS:,.0f} tokens/s in sequences of {TOKENS:,}"
            rows.append(
                {
                    "what": f"a server's event loop, {row['replies']} replies",
                    "measured": f"{row['server_cpu_ms']:.2f} ms CPU a reply",
                    "limit": "1 core",
                    "reached_at": reached,
                }
            )
    return rows


def _queue(queue: list[Row]) -> list[Row]:
    rows = []
    for tenants in (50, 1000):
        found = max((row for row in queue if row["tenants"] == tenants), key=lambda row: row["waiting"])
        us = found["admit_us"] + found["take_and_leave_us"]
        rows.append(
            {
                "what": f"the fair queue, {tenants} tenants, {found['waiting']:,} waiting",
                "measured": f"{us:.0f} us a request",
                "limit": f"{CORE_SHARE:.0%} of a core",
                "reached_at": f"{CORE_SHARE * 1e6 / us:,.0f} requests/s a server",
            }
        )
        if found["displace_us"] and math.isfinite(found["displace_us"]):
            rows.append(
                {
                    "what": f"displacing in a full queue, {tenants} tenants",
                    "measured": f"{found['displace_us']:.0f} us a request",
                    "limit": f"{CORE_SHARE:.0%} of a core",
                    "reached_at": f"{CORE_SHARE * 1e6 / found['displace_us']:,.0f} displacements/s a server",
                }
            )
    return rows


def _connections(idle: Row) -> list[Row]:
    kib = idle["pinging"]["kib_a_connection"]
    by_memory = 2**20 / kib
    by_pings = CORE_SHARE * 1e6 * PING_EVERY_S / idle["cpu_us_a_ping"]
    return [
        {
            "what": "memory of connections with an open call",
            "measured": f"{kib:.0f} KiB each ({idle['idle']['kib_a_connection']:.0f} KiB idle)",
            "limit": "1 GiB",
            "reached_at": _clients(by_memory),
        },
        {
            "what": "keepalive pings during calls",
            "measured": f"at most {idle['cpu_us_a_ping']:.0f} us CPU each, one a client and {PING_EVERY_S:g} s",
            "limit": f"{CORE_SHARE:.0%} of a core",
            "reached_at": f"{by_pings:,.0f} connections a server",
        },
        {
            "what": "file descriptors, if the limit is not raised",
            "measured": "1 a connection",
            "limit": "1,024 (a shell's usual soft limit)",
            "reached_at": _clients(1000.0),
        },
    ]


def _clients(connections: float) -> str:
    many = connections * 1000 / MAX_SERVERS
    return (
        f"{connections:,.0f} a server: so many clients at {MAX_SERVERS} servers or fewer, {many:,.0f} at 1,000 servers"
    )


def _balance(cells: list[Row]) -> list[Row]:
    rows = []
    by_size: dict[tuple[int, int], dict[str, Row]] = {}
    for cell in cells:
        if cell["table"] == "size":
            by_size.setdefault((cell["servers"], cell["clients"]), {})[cell["balancing"]] = cell
    for policy in ("least_expected_wait", "least_outstanding_tokens"):
        found = {
            size: own[policy]["p99_ms"] / own["informed"]["p99_ms"]
            for size, own in by_size.items()
            if policy in own and "informed" in own
        }
        found = {size: ratio for size, ratio in found.items() if math.isfinite(ratio)}
        if not found:
            continue
        worst = max(found, key=lambda size: found[size])
        rows.append(
            {
                "what": f"balance, {policy}: clients know only their own calls",
                "measured": f"p99 {min(found.values()):.1f} .. {found[worst]:.1f} times that of perfect knowledge",
                "limit": "2 times",
                "reached_at": f"worst at {worst[0]:,} servers, {worst[1]:,} clients; over 2 in "
                f"{sum(ratio > 2 for ratio in found.values())} of {len(found)} sizes",
            }
        )
    for cell in cells:
        if cell["table"] == "one slow" and cell["balancing"] == "least_expected_wait" and not cell["name"]:
            even = _other(cells, cell, "round_robin")
            rows.append(
                {
                    "what": f"noticing one slow server of {cell['servers']:,}, {cell['clients']:,} clients",
                    "measured": f"p99.9 {cell['p999_ms'] / 1e3:.1f} s, round robin {even['p999_ms'] / 1e3:.1f} s",
                    "limit": "half of round robin's",
                    "reached_at": "over it" if cell["p999_ms"] > even["p999_ms"] / 2 else "not reached",
                }
            )
        if cell["table"] == "failures":
            peak = cell["revived_peak_to_mean"]
            rows.append(
                {
                    "what": f"all to a server that is back, {cell['servers']:,} servers, {cell['clients']:,} clients",
                    "measured": f"{peak:.1f} times the others' work at its peak",
                    "limit": f"the others' own peak, {cell['busiest_to_mean']:.1f} times",
                    "reached_at": "over it" if peak > cell["busiest_to_mean"] else "not reached",
                }
            )
        if cell["table"] == "overload" and cell["load"] > 1 and cell["balancing"] == "least_expected_wait":
            rows.append(
                {
                    "what": f"retries at {cell['load']:.0%} load, {cell['name']}",
                    "measured": f"{cell['attempts_a_call']:.1f} attempts a call, {cell['failed_share']:.0%} failed",
                    "limit": "2 attempts a call",
                    "reached_at": "over it" if cell["attempts_a_call"] > 2 else "not reached",
                }
            )
    unused = [cell for cell in cells if cell["table"] == "size" and cell["unused_share"] > 0.01]
    for cell in unused[:1]:
        rows.append(
            {
                "what": f"servers that nobody uses: each client takes {MAX_SERVERS} at most",
                "measured": f"{cell['unused_share']:.1%} unused",
                "limit": "1%",
                "reached_at": f"{cell['clients']:,} clients, {cell['servers']:,} servers "
                f"(clients < {-math.log(0.01) / -math.log1p(-MAX_SERVERS / cell['servers']):.0f})",
            }
        )
    return rows


def _other(cells: list[Row], cell: Row, balancing: str) -> Row:
    same = ("table", "name", "servers", "clients")
    return next(
        other for other in cells if other["balancing"] == balancing and all(other[key] == cell[key] for key in same)
    )
