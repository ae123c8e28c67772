"""Time, peak memory and error of the student's loss: ours, full logits, TRL, verl and Liger.

    python -m benchmarks.student_step [--verl DIR] [--liger DIR] [--tokens 1024,4096,16384] [--vocab 32768,151936]
        [--dtype float32,bfloat16] [--dim 512] [--k 64] [--only NAME,NAME] [--out FILE]

A measurement is one forward and one backward pass from hidden states and the head's weight to their gradients, in a
fresh process, contenders taking turns, so that peak memory is its own and a busy minute of the machine does not fall
on one of them: three runs at up to 1,024 tokens (the median counts), one above. Forward KL on the teacher's top k:

    ours              student_trainer.logprobs.support_logprobs and student_trainer.losses.forward_kl
    ours, torch.mm    the same with every product through torch.mm, as full logits have it; float32, fewest tokens
    full logits       F.linear, log_softmax in float32, gather, the same loss by autograd; the tail is 1 - sum(p)
    full, rounded     bfloat16 only: log_softmax in bfloat16 as well
    TRL               trl 1.16, _chunked_jsd_loss(beta=0, add_tail_bucket=True) at its own chunk size
    verl              verl 0.9, compute_forward_kl_topk on full logits: without tail, with its diagnostics (a top k of
                      the student), without its clamp
    verl, chunked     the same with use_chunked_topk=True at its own chunk size
    Liger             LigerFusedLinearJSDLoss(beta=0), not compiled: another job, the divergence over the whole
                      vocabulary from a teacher whose hidden states and head (of the student's size) are local

verl and Liger come with `pip install --no-deps --target DIR verl==0.9.1` and `... liger-kernel==0.8.5`; without their
option they are left out. Importing either package asks for ray or triton, which their losses do not use, so only the
file of the loss is loaded; verl's two imports from its own package are replaced by "one process, no sequence
parallelism".

Memory is the highest resident set during both passes over the one before them. The gradients of hidden and head are
results that every contender has to return; "extra" is the peak without their size. What by its estimate does not fit
into free memory is skipped. "exact": has the tail, and logits in float32. Ratios are to the fastest of the contenders
of top-k losses (all but Liger), to the fastest exact one and, of extra memory, to the leanest exact one.

Writes benchmarks/results/student_step.json, after every cell.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "student_step.json"
REPEATED_UP_TO = 1024  # tokens
SPARE_GIB = 2.0  # interpreter, libraries, the head's widened slices, and some for the rest of the machine


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    loss: str  # "top-k + tail", "top-k" or "vocabulary"
    float32_logits: bool  # whatever the dtype of the inputs
    per_logit: tuple[int, int]  # bytes a [T, V] entry at the peak, float32 and bfloat16: an estimate
    rows: int | None = None  # how many rows of logits there are at a time; None: all
    per_weight: int = 0  # bytes a [V, d] entry, above head and gradient

    def exact(self, dtype: str) -> bool:
        return self.loss == "top-k + tail" and (dtype == "float32" or self.float32_logits)

    def gib(self, tokens: int, vocab: int, dim: int, dtype: str) -> float:
        """What a run is expected to need."""
        itemsize = 4 if dtype == "float32" else 2
        logits = min(tokens, self.rows or tokens) * vocab * self.per_logit[itemsize == 2]
        leaves = (vocab + tokens) * dim * 2 * itemsize
        return (logits + leaves + vocab * dim * self.per_weight) / 2**30 + SPARE_GIB


CONTENDERS = {
    "ours": Contender("ours", "top-k + tail", True, (16, 16), rows=64),
    "ours_mm": Contender("ours, torch.mm", "top-k + tail", True, (16, 16), rows=64),
    "full": Contender("full logits", "top-k + tail", False, (12, 12)),
    "full_rounded": Contender("full, rounded", "top-k + tail", False, (12, 8)),
    "trl": Contender("TRL", "top-k + tail", True, (24, 24), rows=256, per_weight=12),
    "verl": Contender("verl", "top-k", False, (16, 10)),
    "verl_chunked": Contender("verl, chunked", "top-k", False, (20, 22)),
    "liger": Contender("Liger", "vocabulary", False, (32, 20), rows=2047, per_weight=16),
}


def main() -> None:
    options = _parse()
    if options.child:
        print(json.dumps(_child(options)))
        return
    names = _available(options)
    result: dict[str, Any] = {"machine": _machine(options), "options": _shape(options), "rows": []}
    for dtype in options.dtype:
        for vocab in options.vocab:
            for tokens in options.tokens:
                chosen = [name for name in names if _applies(name, tokens, dtype, options)]
                cell = _cell(chosen, tokens, vocab, dtype, options)
                _compare(cell, dtype)
                result["rows"] += cell
                _write(result, options.out)
    result["errors"] = {}
    for dtype in options.dtype:
        print(f"{dtype}: error against float64 at T={options.reference_tokens} ...", file=sys.stderr)
        result["errors"][dtype] = _run_child("errors", options.reference_tokens, options.vocab[0], dtype, options)
        _write(result, options.out)
    result["growth"] = list(_growth(result["rows"]))
    _write(result, options.out)
    print(_table(result))


def _parse() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.student_step", description="The student's loss: time, memory, error."
    )
    parser.add_argument("--tokens", type=integers, default=[1024, 4096, 16_384])
    parser.add_argument("--vocab", type=integers, default=[32_768, 151_936])
    parser.add_argument("--dtype", type=lambda s: s.split(","), default=["float32", "bfloat16"])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help=f"runs of a cell of up to {REPEATED_UP_TO} tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--reference-tokens", type=int, default=64, help="rows of the float64 reference")
    parser.add_argument("--verl", type=Path, help="where pip put verl")
    parser.add_argument("--liger", type=Path, help="where pip put liger-kernel")
    parser.add_argument("--only", type=lambda s: s.split(","), help=f"some of {','.join(CONTENDERS)}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=[*CONTENDERS, "errors"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    for what, given, known in (
        ("--dtype", options.dtype, ["float32", "bfloat16"]),
        ("--only", options.only or [], [*CONTENDERS]),
    ):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"{what} has {', '.join(unknown)}; choose from {', '.join(known)}")
    return options


def _shape(options: argparse.Namespace) -> dict[str, Any]:
    names = ("tokens", "vocab", "dtype", "dim", "k", "repeats", "reference_tokens")
    return {name: getattr(options, name) for name in names}


# The parent: processes, summaries, the table


def _available(options: argparse.Namespace) -> list[str]:
    names = options.only or list(CONTENDERS)
    for package in ("verl", "liger"):
        mine = [name for name in names if name.startswith(package)]
        if mine and getattr(options, package) is None:
            print(f"{', '.join(CONTENDERS[x].name for x in mine)}: left out, no --{package} DIR", file=sys.stderr)
            names = [name for name in names if name not in mine]
    return names


def _applies(name: str, tokens: int, dtype: str, options: argparse.Namespace) -> bool:
    if name == "ours_mm":
        return dtype == "float32" and tokens == min(options.tokens)
    return name != "full_rounded" or dtype == "bfloat16"


def _cell(names: list[str], tokens: int, vocab: int, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    repeats = options.repeats if tokens <= REPEATED_UP_TO else 1
    for repeat in range(repeats):
        for name, of_name in runs.items():
            what = f"{dtype} V={vocab} T={tokens} run {repeat + 1} of {repeats}: {CONTENDERS[name].name}"
            need, free = CONTENDERS[name].gib(tokens, vocab, options.dim, dtype), _available_gib()
            if need > free:
                of_name.append({"skipped": f"does not fit: needs about {need:.0f} GiB, {free:.0f} GiB are free"})
                print(f"{what} {of_name[-1]['skipped']}", file=sys.stderr)
                continue
            print(f"{what} ...", file=sys.stderr)
            of_name.append(_run_child(name, tokens, vocab, dtype, options))
    head = {"dtype": dtype, "vocab": vocab, "tokens": tokens}
    return [{**head, "name": name, **_summary(of_name)} for name, of_name in runs.items()]


def _run_child(name: str, tokens: int, vocab: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.student_step", "--child", name]
    command += ["--tokens", str(tokens), "--vocab", str(vocab), "--dtype", dtype]
    for option in ("dim", "k", "threads", "verl", "liger"):
        if getattr(options, option) is not None:
            command += [f"--{option}", str(getattr(options, option))]
    if options.only:
        command += ["--only", ",".join(options.only)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == -9:
        return {"skipped": "does not fit: the system ended it for want of memory"}
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    if skipped := [run["skipped"] for run in runs if "skipped" in run]:
        return {"skipped": skipped[0]}
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]} | {
        "runs_s": [run["time_s"] for run in runs]
    }


def _compare(cell: list[dict[str, Any]], dtype: str) -> None:
    """Adds the ratios to the fastest contender, the fastest exact one and the leanest exact one."""
    measured = [row for row in cell if "skipped" not in row]
    same_job = [row for row in measured if CONTENDERS[row["name"]].loss != "vocabulary"]
    exact = [row for row in measured if CONTENDERS[row["name"]].exact(dtype)]
    for row in cell:
        row["exact"] = CONTENDERS[row["name"]].exact(dtype)
    for ratio, key, among in (
        ("time_to_fastest", "time_s", same_job),
        ("time_to_fastest_exact", "time_s", exact),
        ("extra_to_leanest_exact", "extra_mib", exact),
    ):
        if among:
            least = min(row[key] for row in among)
            for row in measured:
                row[ratio] = row[key] / least


def _growth(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """How our extra memory grows with the vocabulary: a straight line through it at each number of tokens."""
    mine = [row for row in rows if row["name"] == "ours" and "skipped" not in row]
    for dtype, tokens in dict.fromkeys((row["dtype"], row["tokens"]) for row in mine):
        points = [(row["vocab"], row["extra_mib"]) for row in mine if (row["dtype"], row["tokens"]) == (dtype, tokens)]
        if len(points) > 1:
            slope, constant = statistics.linear_regression(*zip(*points, strict=True))
            yield {
                "dtype": dtype,
                "tokens": tokens,
                "extra_mib_at_0": constant,
                "extra_mib_per_1000_entries": slope * 1000,
                "one_tensor_of_logits_mib_per_1000_entries": tokens * 1000 * (4 if dtype == "float32" else 2) / 2**20,
            }


def _write(result: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)


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
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpu_count": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _table(result: dict[str, Any]) -> str:
    machine, options = result["machine"], result["options"]
    lines = [
        f"d={options['dim']} k={options['k']}; {machine['threads']} threads of {machine['cpu']} "
        f"({machine['instructions']} {' '.join(machine['bfloat16_instructions'])}), torch {machine['torch']}",
        f"{'dtype':<9}{'V':>6}{'T':>6}  {'contender':<15}{'loss':<13}{'exact':<6}{'time s':>8}{'cpu s':>8}"
        f"{'extra MiB':>10}{'others':>7} {'t/fastest':>10}{'t/exact':>8}{'extra/exact':>12}",
    ]
    for row in result["rows"]:
        contender = CONTENDERS[row["name"]]
        line = f"{row['dtype']:<9}{row['vocab']:>6}{row['tokens']:>6}  {contender.name:<15}{contender.loss:<13}"
        line += f"{'yes' if row['exact'] else 'no':<6}"
        if "skipped" in row:
            lines.append(line + row["skipped"])
            continue
        line += f"{row['time_s']:>8.2f}{row['cpu_s']:>8.2f}{row['extra_mib']:>10.0f}{row['others']:>7.2f} "
        for key, width in (("time_to_fastest", 10), ("time_to_fastest_exact", 8), ("extra_to_leanest_exact", 12)):
            line += f"{row[key]:>{width}.2f}" if key in row else " " * width
        lines.append(line)
    lines += [
        "others: processors that other programs kept busy meanwhile; times are only worth something near 0",
        "t/fastest: time over that of the fastest top-k loss; t/exact, extra/exact: over the least of the exact ones",
    ]
    for fit in result["growth"]:
        lines.append(
            f"ours, {fit['dtype']}, T={fit['tokens']}: extra = {fit['extra_mib_at_0']:.0f} MiB "
            f"{fit['extra_mib_per_1000_entries']:+.3f} MiB a 1,000 entries of vocabulary "
            f"(one tensor of logits: {fit['one_tensor_of_logits_mib_per_1000_entries']:.1f})"
        )
    for dtype, contenders in result["errors"].items():
        lines.append(
            f"{dtype}: error against float64, T={options['reference_tokens']} V={options['vocab'][0]}: largest of the "
            "losses of a token; of the gradients norm of the error / norm"
        )
        for name, errors in contenders.items():
            parts = (f"{what} {error:.1e}" for what, error in errors.items())
            lines.append(f"       {CONTENDERS[name].name:<15}" + "  ".join(parts))
    return "\n".join(lines)


# The child: one contender, once


def _child(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch

    torch.set_num_threads(options.threads)
    tokens, vocab, dtype = options.tokens[0], options.vocab[0], getattr(torch, options.dtype[0])
    if options.child == "errors":
        return _errors(tokens, vocab, dtype, options)
    step = _steps(options)[options.child]
    small = _inputs(8, 1000, options.dim, options.k, dtype)
    step(small)  # threads, kernels, imports
    inputs = _inputs(tokens, vocab, options.dim, options.k, dtype)
    if options.child == "liger":
        inputs.add_teacher_head()
    with _Peak() as peak:
        others, cpu, start = _busy_elsewhere(), time.process_time(), time.perf_counter()
        step(inputs)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        elsewhere = _busy_elsewhere() - others
    gradients = (inputs.hidden.numel() + inputs.weight.numel()) * dtype.itemsize / 2**20
    return {
        "time_s": seconds,
        "cpu_s": cpu_seconds,
        "peak_mib": peak.mib,
        "extra_mib": peak.mib - gradients,
        "others": max(0.0, elsewhere / seconds),
    }


@dataclass(slots=True)
class Inputs:
    hidden: Any  # [T, d]
    weight: Any  # [V, d]
    ids: Any  # [T, K], distinct in a row
    teacher: Any  # [T, K] log-probabilities, float32
    teacher_tail: Any  # [T]
    teacher_hidden: Any = None  # [T, d], Liger's
    teacher_weight: Any = None  # [V, d]

    def add_teacher_head(self) -> None:
        import torch

        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            self.teacher_hidden = torch.randn(self.hidden.shape, generator=g).to(self.hidden.dtype)
            self.teacher_weight = self.weight.detach().flip(0).contiguous()


def _inputs(tokens: int, vocab: int, dim: int, k: int, dtype: Any) -> Inputs:
    import torch

    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=g).mul_(dim**-0.5).to(dtype).requires_grad_()
    ids = (torch.randint(vocab, (tokens, 1), generator=g) + torch.arange(k) * (vocab // k)) % vocab
    teacher = torch.log_softmax(2 * torch.randn(tokens, k + 1, generator=g), -1)
    return Inputs(hidden, weight, ids, teacher[:, :k].contiguous(), teacher[:, k].contiguous())


def _steps(options: argparse.Namespace) -> dict[str, Callable[[Inputs], Any]]:
    """One forward and backward pass of each contender; they return the loss, of every token where they have it."""
    import torch
    import torch.nn.functional as F

    from student_trainer import vocabulary_walk as walk
    from student_trainer.logprobs import support_logprobs
    from student_trainer.losses import forward_kl

    def backward(losses: Any) -> Any:
        losses.sum().backward()
        return losses.detach()

    def ours(x):
        support = support_logprobs(x.hidden, x.weight, x.ids)
        return backward(forward_kl(support.logprobs, x.teacher, support.log_tail, x.teacher_tail))

    def ours_mm(x):
        onednn, walk._ONEDNN = walk._ONEDNN, False
        try:
            return ours(x)
        finally:
            walk._ONEDNN = onednn

    def full(x, dtype=torch.float32):
        logprobs = F.linear(x.hidden, x.weight).log_softmax(-1, dtype=dtype).gather(1, x.ids).float()
        tail = torch.log(-torch.expm1(logprobs.logsumexp(1)))
        return backward(forward_kl(logprobs, x.teacher, tail, x.teacher_tail))

    def trl(x):
        from trl.experimental.async_distillation import async_distillation_trainer as theirs

        present, chunk = torch.ones_like(x.ids, dtype=torch.bool), theirs._CHUNKED_LM_HEAD_CHUNK_SIZE
        loss, *_ = theirs._chunked_jsd_loss(
            x.hidden, x.weight, None, 1.0, None, x.ids, x.teacher, present, 0.0, 1.0, True, None, 1, chunk
        )
        return backward(loss)

    def verl(x, chunked=False):
        settings = types.SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=chunked)
        teacher, ids = (torch.nested.as_nested_tensor([each], layout=torch.jagged) for each in (x.teacher, x.ids))
        logits = F.linear(x.hidden, x.weight)[None]
        config = types.SimpleNamespace(distillation_loss=settings)
        result = _verl(options.verl).compute_forward_kl_topk(logits, teacher, ids, config, "thd")
        return backward(result["distillation_losses"][0])

    def liger(x):
        if x.teacher_weight is None:
            x.add_teacher_head()
        loss = _liger(options.liger).LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False
        )
        labels = torch.zeros(len(x.hidden), dtype=torch.int64)
        return backward(loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, labels))

    return {
        "ours": ours,
        "ours_mm": ours_mm,
        "full": full,
        "full_rounded": lambda x: full(x, x.hidden.dtype),
        "trl": trl,
        "verl": verl,
        "verl_chunked": lambda x: verl(x, chunked=True),
        "liger": liger,
    }


def _verl(directory: Path) -> Any:
    """The module of verl's losses alone, in one process: see the head of this file."""
    if "verl.utils.ulysses" not in sys.modules:
        ulysses: Any = types.ModuleType("verl.utils.ulysses")
        ulysses.get_ulysses_sequence_parallel_world_size = lambda: 1
        ulysses.slice_input_tensor = None  # called with more than one process
        config: Any = types.ModuleType("verl.workers.config")
        config.DistillationConfig = config.DistillationLossConfig = None  # annotations
        sys.modules |= {"verl.utils.ulysses": ulysses, "verl.workers.config": config}
        for package in ("verl", "verl.utils", "verl.workers"):
            sys.modules[package] = types.ModuleType(package)
    return _load("verl_losses", directory / "verl/trainer/distillation/fsdp/losses.py")


def _liger(directory: Path) -> Any:
    """The module of Liger's divergence and the one that it imports, without its kernels."""
    for package in ("liger_kernel", "liger_kernel.chunked_loss"):
        if package not in sys.modules:
            module: Any = types.ModuleType(package)
            module.__path__ = [str(directory / package.replace(".", "/"))]
            sys.modules[package] = module
    return importlib.import_module("liger_kernel.chunked_loss.jsd_loss")


def _load(name: str, path: Path) -> Any:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader, path
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _errors(tokens: int, vocab: int, dtype: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Errors of loss, dH and dW of each contender; Liger has another loss and is left out."""
    import torch

    x: Any = _inputs(tokens, vocab, options.dim, options.k, dtype)
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (x.hidden, x.weight))
    logprobs = (hidden @ weight.t()).log_softmax(-1)
    outside = torch.ones_like(logprobs, dtype=torch.bool).scatter(1, x.ids, False)
    tail = logprobs.masked_fill(~outside, -torch.inf).logsumexp(1)
    p, p_tail = x.teacher.double(), x.teacher_tail.double()
    without = (p.exp() * (p - logprobs.gather(1, x.ids))).sum(1)
    losses = {"top-k": without, "top-k + tail": without + p_tail.exp() * (p_tail - tail)}
    expected = {
        name: (loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight), retain_graph=True))
        for name, loss in losses.items()
    }
    result = {}
    for name, step in _steps(options).items():
        package = name.split("_")[0]
        if name not in (options.only or CONTENDERS) or name == "liger" or getattr(options, package, True) is None:
            continue
        if name == ("full_rounded" if dtype == torch.float32 else "ours_mm"):
            continue
        x.hidden.grad = x.weight.grad = None
        value = step(x).double()
        grads: list[Any] = [x.hidden.grad, x.weight.grad]
        loss, d_hidden, d_weight = expected[CONTENDERS[name].loss]
        loss = loss if value.dim() else loss.sum()
        result[name] = {"loss" if value.dim() else "sum of the losses": float((value - loss).abs().max())} | {
            what: float((actual.double() - wanted).norm() / wanted.norm())
            for what, actual, wanted in zip(("dH", "dW"), grads, (d_hidden, d_weight), strict=True)
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
