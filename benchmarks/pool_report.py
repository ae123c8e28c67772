"""The results of `benchmarks.pool` as text: tables of Markdown, printed and put between markers of a document.

A document has `<!-- pool:NAME -->` and `<!-- /pool:NAME -->` around each table; what stands between is replaced.
"""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], object]]


def tables(result: Row) -> dict[str, str]:
    """Every table that `result` has figures for, by name."""
    makers: dict[str, Callable[[Row], str]] = {
        "run": _run,
        "transport": _transport,
        "parts": _parts,
        "scaling": _scaling,
        "fairness": _fairness,
        "slow_server": _slow_server,
        "sharing": _sharing,
        "hedging": _hedging,
        "checked": _checked,
        "errors": _errors,
        "fair_cells": _fair_cells,
        "size": lambda result: _cells(result, "size"),
        "information": lambda result: _cells(result, "information"),
        "one_slow": lambda result: _cells(result, "one slow"),
        "failures": lambda result: _cells(result, "failures"),
        "overload": _overload,
        "max_servers": lambda result: _cells(result, "max_servers"),
        "queue": _queue,
        "policies": _policies,
        "limits": _limits,
    }
    found: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found[name] = make(result)
        except KeyError:  # not measured in this run
            continue
    return found


def put(document: str, found: dict[str, str]) -> str:
    """`document` with the tables that it has markers for."""
    for name, table in found.items():
        pattern = re.compile(rf"(<!-- pool:{name} -->\n).*?(<!-- /pool:{name} -->)", re.DOTALL)
        document = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", document)
    return document


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    cells = [[name for name, _ in columns]] + [[_text(of(row)) for _, of in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "0"
    return str(value)


def percent(share: float | None) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.3g}%"


def _of(name: str) -> Callable[[Row], object]:
    return lambda row: row.get(name)


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other and math.isfinite(one) and math.isfinite(other) else None


def _run(result: Row) -> str:
    run = result["run"]
    return (
        f"{run['date']}, {run['cores']} cores, {run['cpu']}, Python {run['python']}, grpcio {run['grpcio']}; "
        f"load of the machine before: {run['load_before']:.2f}; the run took {run['took_s'] / 60:.0f} minutes"
        + (" (--quick: too short for more than a look)." if run["quick"] else ".")
    )


def _transport(result: Row) -> str:
    rows = result["transport"]["rows"]
    floors = {row["replies"]: row["replies_per_s"] for row in rows if row["contender"] == "bare grpc.aio"}
    return table(
        [
            ("reply", _of("replies")),
            ("contender", _of("contender")),
            ("replies/s", _of("replies_per_s")),
            ("of the floor", lambda row: percent(_ratio(row["replies_per_s"], floors.get(row["replies"])))),
            ("MiB/s", _of("mib_per_s")),
            ("server CPU ms", _of("server_cpu_ms")),
            ("client CPU ms", _of("client_cpu_ms")),
            ("p50 ms", _of("p50_ms")),
            ("p99 ms", _of("p99_ms")),
            ("probe p99 ms", lambda row: row["probe"]["main"]["p99_ms"]),
            ("health port p99 ms", lambda row: row["probe"].get("health", {}).get("p99_ms")),
        ],
        rows,
    )


def _parts(result: Row) -> str:
    rows = [{"part": name, "ms": ms} for name, ms in result["transport"]["parts"].items()]
    return table([("part", _of("part")), ("CPU ms", _of("ms"))], rows)


def _scaling(result: Row) -> str:
    return table(
        [
            ("servers", _of("servers")),
            ("clients", _of("clients")),
            ("tokens/s", _of("tokens_per_s")),
            ("of servers x 20,000", lambda row: percent(row["tokens_per_s"] / row["bound_tokens_per_s"])),
            ("wait p50 ms", _of("wait_p50_ms")),
            ("wait p99 ms", _of("wait_p99_ms")),
            ("p50 ms", _of("p50_ms")),
            ("p99 ms", _of("p99_ms")),
        ],
        result["scaling"],
    )


def _fairness(result: Row) -> str:
    return table(
        [
            ("burst", _of("burst")),
            ("window", _of("window_batches")),
            ("neighbour", lambda row: row["flood"] + ("" if row["burst_tokens"] else ", burst-tokens 0")),
            ("alone p50 ms", lambda row: row["alone"]["p50_ms"]),
            ("alone p99 ms", lambda row: row["alone"]["p99_ms"]),
            ("beside p50 ms", lambda row: row["flooded"]["p50_ms"]),
            ("beside p99 ms", lambda row: row["flooded"]["p99_ms"]),
            ("p99 ratio", lambda row: _ratio(row["flooded"]["p99_ms"], row["alone"]["p99_ms"])),
            ("whole burst p50 ratio", lambda row: _ratio(row["flooded"]["burst_p50_ms"], row["alone"]["burst_p50_ms"])),
            ("both tokens/s", lambda row: row["flooded"]["tokens_per_s"] + row["flooder"]["tokens_per_s"]),
            ("flooder's refusals", lambda row: sum(row["flooder"]["retries"].values())),
            ("samples", lambda row: row["flooded"]["replies"]),
        ],
        result["fairness"],
    )


def _slow_server(result: Row) -> str:
    rows = result["slow_server"]
    floors = {row["clients"]: row["tokens_per_s"] for row in rows if row["balancing"] == "round_robin"}
    return table(
        [
            ("clients x in flight", lambda row: f"{row['clients']} x {row['in_flight']}"),
            ("balancing", _of("balancing")),
            ("tokens/s", _of("tokens_per_s")),
            ("of the sum", lambda row: percent(row["tokens_per_s"] / row["bound_tokens_per_s"])),
            ("times round_robin", lambda row: row["tokens_per_s"] / floors[row["clients"]]),
            ("p50 ms", _of("p50_ms")),
            ("p99 ms", _of("p99_ms")),
        ],
        rows,
    )


def _sharing(result: Row) -> str:
    return table(
        [
            ("balancing", _of("balancing")),
            ("tokens/s", _of("tokens_per_s")),
            ("p50 ms", _of("p50_ms")),
            ("p99 ms", _of("p99_ms")),
            ("whole burst p50 ms", _of("burst_p50_ms")),
            ("whole burst p99 ms", _of("burst_p99_ms")),
        ],
        result["sharing"],
    )


def _hedging(result: Row) -> str:
    return table(
        [
            ("hedge_share", _of("hedge_share")),
            ("replies", _of("replies")),
            ("p50 ms", _of("p50_ms")),
            ("p99 ms", _of("p99_ms")),
            ("p99.9 ms", _of("p999_ms")),
            ("calls sent twice", lambda row: percent(row["extra_load"])),
            ("tokens/s", _of("tokens_per_s")),
        ],
        result["hedging"],
    )


def _checked(result: Row) -> str:
    columns: list[Column] = [("table", _of("table")), ("run", _of("name"))]
    for figure, label in (("tokens_per_s", "tokens/s"), ("p50_ms", "p50 ms"), ("p99_ms", "p99 ms")):
        columns += [
            (label, _of(figure)),
            ("simulated", _of(f"simulated_{figure}")),
            ("error", lambda row, figure=figure: percent(row[f"error_{figure}"])),
        ]
    return table(columns, result["checked"])


def _errors(result: Row) -> str:
    rows = []
    for table in dict.fromkeys(row["table"] for row in result["checked"]):
        own = [row for row in result["checked"] if row["table"] == table]
        row: Row = {"table": table, "runs": len(own)}
        for figure in ("tokens_per_s", "p50_ms", "p99_ms"):
            errors = [abs(cell[f"error_{figure}"]) for cell in own if _finite(cell[f"error_{figure}"])]
            row[figure] = f"{percent(statistics.median(errors))} / {percent(max(errors))}" if errors else "-"
        rows.append(row)
    return table(
        [
            ("table", _of("table")),
            ("runs", _of("runs")),
            ("tokens/s", _of("tokens_per_s")),
            ("p50", _of("p50_ms")),
            ("p99", _of("p99_ms")),
        ],
        rows,
    )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _fair_cells(result: Row) -> str:
    return table(
        [
            ("burst", _of("burst")),
            ("window", _of("window_batches")),
            ("alone p99 ms", _of("alone_p99_ms")),
            ("beside p99 ms", _of("flooded_p99_ms")),
            ("p99 ratio", _of("p99_ratio")),
            ("whole burst p50 ratio", _of("burst_p50_ratio")),
            ("both tokens/s", _of("tokens_per_s")),
        ],
        result["fair_cells"],
    )


def _cells(result: Row, table: str) -> str:
    rows = [row for row in result["cells"] if row["table"] == table]
    if not rows:
        raise KeyError(table)
    columns: list[Column] = [("servers", _of("servers")), ("clients", _of("clients")), ("balancing", _of("balancing"))]
    if any(row["name"] for row in rows):
        columns.insert(2, ("max_servers" if table == "max_servers" else "what", _of("name")))
    columns += [
        ("p50 ms", _of("p50_ms")),
        ("p99 ms", _of("p99_ms")),
        ("p99.9 ms", _of("p999_ms")),
        ("of all capacity", lambda row: percent(row["share_of_capacity"])),
        ("failed", lambda row: percent(row["failed_share"])),
        ("attempts a call", _of("attempts_a_call")),
        ("busiest / mean", _of("busiest_to_mean")),
    ]
    if table in ("size", "max_servers"):
        columns += [
            ("unused servers", lambda row: percent(row["unused_share"])),
            ("connections a server", _of("connections_a_server")),
        ]
    if table == "failures":
        columns.append(("peak of the revived / mean", _of("revived_peak_to_mean")))
    columns.append(("seconds simulated", _of("simulated_s")))
    return table(columns, _sorted(rows))


def _sorted(rows: Sequence[Row]) -> list[Row]:
    order = ("least_expected_wait", "least_outstanding_tokens", "round_robin", "reported", "informed")

    def place(row: Row) -> tuple[Any, ...]:
        most = int(row["name"]) if row["name"].isdecimal() else 0
        return row["servers"], row["clients"], most, row["name"], order.index(row["balancing"])

    return sorted(rows, key=place)


def _overload(result: Row) -> str:
    rows = [row for row in result["cells"] if row["table"] == "overload"]
    if not rows:
        raise KeyError("overload")
    return table(
        [
            ("load", lambda row: percent(row["load"])),
            ("clients", _of("name")),
            ("balancing", _of("balancing")),
            ("of all capacity", lambda row: percent(row["share_of_capacity"])),
            ("p50 ms", _of("p50_ms")),
            ("p99 ms", _of("p99_ms")),
            ("failed", lambda row: percent(row["failed_share"])),
            ("attempts a call", _of("attempts_a_call")),
            ("refused", _of("refusals")),
            ("displaced", _of("displaced")),
            ("attempts/s a server", _of("attempts_per_s_and_server")),
        ],
        sorted(rows, key=lambda row: (row["load"], row["name"], row["balancing"])),
    )


def _queue(result: Row) -> str:
    return table(
        [
            ("tenants", _of("tenants")),
            ("waiting", _of("waiting")),
            ("admit us", _of("admit_us")),
            ("take and leave us", _of("take_and_leave_us")),
            ("admit and displace us", _of("displace_us")),
        ],
        result["queue"],
    )


def _policies(result: Row) -> str:
    return table([("servers", _of("servers")), ("balancing", _of("policy")), ("us", _of("us"))], result["policies"])


def _limits(result: Row) -> str:
    return table(
        [
            ("what grows", _of("what")),
            ("measured", _of("measured")),
            ("limit", _of("limit")),
            ("reached at", _of("reached_at")),
        ],
        result["limits"],
    )
