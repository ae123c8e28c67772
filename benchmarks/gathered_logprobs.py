"""Time, peak memory and error of the student's head: ours, full logits and TRL's chunked loss.

    python -m benchmarks.gathered_logprobs [--tokens 1024,4096] [--vocab 151936] [--dim 1024] [--k 64] [--repeats 3]

Every measurement is one forward and one backward pass in a fresh process, contenders taking turns, so that peak
memory is its own and a busy minute of the machine does not fall on one of them. float32 on the CPU.

The contenders in two groups, each with the same inputs:
  log-probabilities of k ids a token, a given gradient for each of them:
    full logits      F.linear -> log_softmax -> gather, by autograd
    ours             student_trainer.logprobs.gathered_logprobs (which also gives the entropy)
    ours, torch.mm   the same with every product through torch.mm, as full logits have it
  forward KL over k ids and the tail, summed over tokens:
    ours + KL        student_trainer.logprobs.support_logprobs, student_trainer.losses.forward_kl
    TRL              trl 1.16, _chunked_jsd_loss(beta=0) at its own chunk size

Memory is the highest resident set during both passes over the one before them. The gradients of hidden and head are
results that every contender has to return; "extra" is the peak without their size.

Writes benchmarks/results/gathered_logprobs.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

CONTENDERS = {
    "full": "full logits",
    "ours": "ours",
    "ours_mm": "ours, torch.mm",
    "ours_kl": "ours + KL",
    "trl": "TRL",
}
BASELINE = {"ours": "full", "ours_mm": "full", "ours_kl": "trl"}
RESULTS = Path(__file__).parent / "results" / "gathered_logprobs.json"


def main() -> None:
    options = _parse()
    if options.child:
        print(json.dumps(_child(options)))
        return
    rows = []
    for tokens in options.tokens:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for repeat in range(options.repeats):
            for name, of_name in runs.items():
                print(f"T={tokens} run {repeat + 1} of {options.repeats}: {CONTENDERS[name]} ...", file=sys.stderr)
                of_name.append(_measure(name, tokens, options))
        rows += [_summary(tokens, name, of_name) for name, of_name in runs.items()]
    for row in rows:
        _compare(row, rows)
    print(f"error against float64 at T={options.reference_tokens} ...", file=sys.stderr)
    errors = _run_child("errors", options.reference_tokens, options)
    result = {"machine": _machine(options), "options": _shape(options), "rows": rows, "errors": errors}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(_table(result))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gathered_logprobs", description="The student's head: time, memory, error."
    )
    parser.add_argument("--tokens", type=lambda s: [int(x) for x in s.split(",")], default=[1024, 4096])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--reference-tokens", type=int, default=32, help="rows of the float64 reference")
    parser.add_argument("--child", choices=[*CONTENDERS, "errors"], help=argparse.SUPPRESS)
    return parser.parse_args()


def _shape(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("tokens", "vocab", "dim", "k", "repeats", "reference_tokens")}


# The parent: processes, summaries, the table


def _measure(name: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    if name == "full":  # log-probabilities and two gradients of that size, the head and its gradient
        need = 4 * (3 * tokens * options.vocab + 2 * options.vocab * options.dim) / 2**30
        free = _available_gib()
        if need > free:
            return {"skipped": f"does not fit: needs about {need:.0f} GiB, {free:.0f} GiB are free"}
    return _run_child(name, tokens, options)


def _run_child(name: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gathered_logprobs", "--child", name, "--tokens", str(tokens)]
    for option in ("vocab", "dim", "k", "threads"):
        command += [f"--{option}", str(getattr(options, option))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == -9:
        return {"skipped": "does not fit: the system ended it for want of memory"}
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(tokens: int, name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"tokens": tokens, "name": name}
    skipped = [run["skipped"] for run in runs if "skipped" in run]
    if skipped:
        return {**row, "skipped": skipped[0]}
    row |= {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    row["runs_s"] = [run["time_s"] for run in runs]
    return row


def _compare(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Adds the ratios to the contender that this one is measured against."""
    name, tokens = BASELINE.get(row["name"]), row["tokens"]
    for base in (r for r in rows if r["name"] == name and r["tokens"] == tokens and "skipped" not in r):
        if "skipped" not in row:
            row |= {f"{what}_ratio": row[what] / base[what] for what in ("time_s", "cpu_s", "extra_mib")}


def _available_gib() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return float("inf")
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpu_count": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _table(result: dict[str, Any]) -> str:
    machine, options = result["machine"], result["options"]
    lines = [
        f"V={options['vocab']} d={options['dim']} k={options['k']} float32, median of {options['repeats']}; "
        f"{machine['threads']} threads of {machine['cpu']}, torch {machine['torch']}",
        f"{'T':>5}  {'contender':<15}{'time s':>8}{'cpu s':>8}{'peak MiB':>10}{'extra MiB':>11}{'others':>8}   against",
    ]
    for row in result["rows"]:
        head = f"{row['tokens']:>5}  {CONTENDERS[row['name']]:<15}"
        if "skipped" in row:
            lines.append(head + row["skipped"])
            continue
        line = f"{row['time_s']:>8.2f}{row['cpu_s']:>8.2f}{row['peak_mib']:>10.0f}{row['extra_mib']:>11.0f}"
        line += f"{row['others']:>8.2f}"
        if "time_s_ratio" in row:
            line += f"   {CONTENDERS[BASELINE[row['name']]]}: time x{row['time_s_ratio']:.2f} "
            line += f"(cpu x{row['cpu_s_ratio']:.2f}), extra x1/{1 / row['extra_mib_ratio']:.1f}"
        lines.append(head + line)
    lines.append("others: processors that other programs kept busy meanwhile; times are only worth something near 0")
    lines.append(f"largest absolute error against float64, T={options['reference_tokens']} (of the largest value)")
    for name, errors in result["errors"].items():
        parts = (f"{what} {x['error']:.1e} ({x['of']:.1e})" for what, x in errors.items())
        lines.append(f"       {CONTENDERS[name]:<15}" + "  ".join(parts))
    return "\n".join(lines)


# The child: one contender, once


def _child(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch

    torch.set_num_threads(options.threads)
    tokens = options.tokens[0]
    if options.child == "errors":
        return _errors(tokens, options)
    step = _steps()[options.child]
    step(*_inputs(8, 1000, options.dim, options.k))  # threads, kernels, imports
    inputs = _inputs(tokens, options.vocab, options.dim, options.k)
    with _Peak() as peak:
        others, cpu, start = _busy_elsewhere(), time.process_time(), time.perf_counter()
        step(*inputs)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        elsewhere = _busy_elsewhere() - others
    gradients = (inputs[0].numel() + inputs[1].numel()) * 4 / 2**20
    return {
        "time_s": seconds,
        "cpu_s": cpu_seconds,
        "peak_mib": peak.mib,
        "extra_mib": peak.mib - gradients,
        "others": elsewhere / seconds,
    }


def _inputs(tokens: int, vocab: int, dim: int, k: int) -> tuple[Any, ...]:
    """hidden [T, d], weight [V, d], ids [T, K] distinct in a row, gradients and teacher log-probs [T, K], tail [T]."""
    import torch

    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=g).requires_grad_()
    weight = torch.randn(vocab, dim, generator=g).mul_(dim**-0.5).requires_grad_()
    ids = (torch.randint(vocab, (tokens, 1), generator=g) + torch.arange(k) * (vocab // k)) % vocab
    gradients = torch.randn(tokens, k, generator=g)
    teacher = torch.log_softmax(2 * torch.randn(tokens, k + 1, generator=g), -1)
    return hidden, weight, ids, gradients, teacher[:, :k].contiguous(), teacher[:, k].contiguous()


def _steps() -> dict[str, Any]:
    """One forward and backward pass of each contender; they return the value that was differentiated."""
    import torch
    import torch.nn.functional as F

    from student_trainer import vocabulary_walk as walk
    from student_trainer.logprobs import gathered_logprobs, support_logprobs
    from student_trainer.losses import forward_kl

    def backward(values, gradients):
        values.backward(gradients)
        return values.detach()

    def full(hidden, weight, ids, gradients, *_):
        return backward(F.linear(hidden, weight).log_softmax(-1).gather(1, ids), gradients)

    def ours(hidden, weight, ids, gradients, *_):
        return backward(gathered_logprobs(hidden, weight, ids).logprobs, gradients)

    def ours_mm(*inputs):
        onednn, walk._ONEDNN = walk._ONEDNN, False
        try:
            return ours(*inputs)
        finally:
            walk._ONEDNN = onednn

    def ours_kl(hidden, weight, ids, _, teacher, teacher_tail):
        support = support_logprobs(hidden, weight, ids)
        return backward(forward_kl(support.logprobs, teacher, support.log_tail, teacher_tail).sum(), None)

    def trl(hidden, weight, ids, _, teacher, __):
        from trl.experimental.async_distillation import async_distillation_trainer as theirs

        present, chunk = torch.ones_like(ids, dtype=torch.bool), theirs._CHUNKED_LM_HEAD_CHUNK_SIZE
        loss, *_ = theirs._chunked_jsd_loss(
            hidden, weight, None, 1.0, None, ids, teacher, present, 0.0, 1.0, True, None, 1, chunk
        )
        return backward(loss, None)

    return {"full": full, "ours": ours, "ours_mm": ours_mm, "ours_kl": ours_kl, "trl": trl}


def _errors(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Largest absolute error of value, dH and dW of each contender, and the largest value they are errors of."""
    import torch

    inputs = _inputs(tokens, options.vocab, options.dim, options.k)
    wide = [x.detach().double().requires_grad_() if x.is_leaf and x.requires_grad else x for x in inputs]
    hidden, weight, ids, gradients, teacher, teacher_tail = wide
    logprobs = (hidden @ weight.t()).log_softmax(-1)
    outside = torch.ones_like(logprobs, dtype=torch.bool).scatter(1, ids, False)
    tail = logprobs.masked_fill(~outside, -torch.inf).logsumexp(1)
    at_ids = logprobs.gather(1, ids)
    p, p_tail = teacher.double(), teacher_tail.double()
    kl = (p.exp() * (p - at_ids)).sum() + (p_tail.exp() * (p_tail - tail)).sum()
    expected = {}
    for kind, values, cotangent in (("logprobs", at_ids, gradients.double()), ("kl", kl, None)):
        grads = torch.autograd.grad(values, (hidden, weight), cotangent, retain_graph=kind == "logprobs")
        expected[kind] = values.detach(), *grads

    result = {}
    for name, step in _steps().items():
        inputs[0].grad = inputs[1].grad = None
        got: list[Any] = [step(*inputs), inputs[0].grad, inputs[1].grad]
        wanted = expected["kl" if name in ("ours_kl", "trl") else "logprobs"]
        result[name] = {
            what: {"error": float((a.double() - b).abs().max()), "of": float(b.abs().max())}
            for what, a, b in zip(("value", "dH", "dW"), got, wanted, strict=True)
        }
    return result


class _Peak:
    """Resident memory above that at entry, sampled every 2 ms or, on Linux, from the kernel's own high-water mark."""

    def __enter__(self) -> "_Peak":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark so far
            self._exact = True
        except OSError:
            self._exact = False
        self._before = self._read("VmRSS")
        self._highest, self._stop = self._before, threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if not self._exact:
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._exact:
            self._highest = self._read("VmHWM")
        self.mib = (self._highest - self._before) / 1024

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, self._read("VmRSS"))

    def _read(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def _busy_elsewhere() -> float:
    """Seconds of processor time that other processes have used since the start of the machine."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    busy = (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system


if __name__ == "__main__":
    main()
