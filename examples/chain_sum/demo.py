"""The demo: a student distilled from a served teacher, against the same student trained by GRPO alone.

Starts a real teacher server, trains the student twice through the `student-trainer` program with the same number
of rollouts, evaluates everybody on held-out problems, and writes `summary.json` and `curves.png`.

    python examples/chain_sum/demo.py [--out runs/demo] [key=value ...]

`key=value` goes to every run, for example `steps=5` for a short look.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIG = HERE / "chain_sum.yaml"
BIN = Path(sys.executable).parent
# They differ in the objective alone; docs/demo.md has the sweep behind the settings they share.
ARMS = {
    "distilled": [],
    "grpo": ["objective.recipe=grpo"],
}


def main() -> None:
    """Runs the demo; exit status 1 if any of its programs fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="an earlier demo there is replaced")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, for example steps=5")
    options = parser.parse_args()
    start_s = time.monotonic()
    _clear(options.out)
    with _teacher(options.out) as address:
        common = [f"teacher.addresses=[{address!r}]", *options.overrides]
        teacher = _evaluate(HERE / "models" / "teacher", options.out / "teacher.json", common)
        runs = {name: _train(options.out / name, arm + common) for name, arm in ARMS.items()}
    rollouts = {run["rollouts"] for run in runs.values()}
    assert len(rollouts) == 1, f"the arms had {rollouts} rollouts"
    summary = {
        "teacher": teacher,
        "before": runs["distilled"]["before"],
        "grpo": runs["grpo"]["after"],
        "distilled": runs["distilled"]["after"],
        "rollouts": rollouts.pop(),
        "wall_s": round(time.monotonic() - start_s, 1),
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_curves(options.out, summary)
    print(table(summary))
    print(f"\n{summary['rollouts']} rollouts each, {summary['wall_s']:.0f} s in all.")
    print(f"Wrote {options.out / 'summary.json'} and {options.out / 'curves.png'}.")


def table(summary: dict[str, Any]) -> str:
    """Who solves how much, with 95% confidence intervals."""
    names = {"teacher": "teacher", "before": "student before", "grpo": "GRPO alone", "distilled": "distilled"}
    lines = [f"{'':16}{'pass@1':>8}{'95% interval':>20}{'pass@8':>10}{'95% interval':>20}"]
    for key, name in names.items():
        cells = []
        for k in ("pass@1", "pass@8"):
            low, high = summary[key][f"{k}_interval"]
            cells.append(f"{summary[key][k]:.3f}{f'[{low:.3f}, {high:.3f}]':>20}")
        lines.append(f"{name:16}{cells[0]:>28}{cells[1]:>30}")
    return "\n".join(lines)


def draw_curves(out: Path, summary: dict[str, Any]) -> None:
    """Held-out pass@1 and distance to the teacher over the rollouts seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.axhline(summary["teacher"]["pass@1"], color="0.4", linestyle="--", label="teacher")
    for name, label in (("distilled", "distilled: reverse KL + rewards"), ("grpo", "GRPO alone")):
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        results = [(0, summary["before"])]
        results += [(row["rollouts"], row["evaluation"]) for row in rows if "evaluation" in row]
        results.append((rows[-1]["rollouts"], summary[name]))
        x = [seen for seen, _ in results]
        (line,) = left.plot(x, [result["pass@1"] for _, result in results], marker="o", label=label)
        low, high = zip(*(result["pass@1_interval"] for _, result in results), strict=True)
        left.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
        right.plot(
            [row["rollouts"] for row in rows], [row["entropy"] for row in rows], color=line.get_color(),
            label=f"entropy, {label.split(':')[0]}",
        )  # fmt: skip
        if "kl" in rows[0]:
            right.plot(
                [row["rollouts"] for row in rows], [row["kl"] for row in rows], color=line.get_color(),
                linestyle=":", label="reverse KL to the teacher, distilled",
            )  # fmt: skip
    left.set(xlabel="rollouts", ylabel="pass@1 on held-out problems", ylim=(0, 1), title="What was gained")
    right.set(xlabel="rollouts", ylabel="nats a token", title="How the student changed")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "curves.png", dpi=120)


def _clear(out: Path) -> None:
    """An empty directory `out`; only what an earlier demo left is removed."""
    if out.exists() and any(out.iterdir()) and not (out / "teacher.log").is_file():
        sys.exit(f"--out: {out} holds something that is not an earlier demo; choose another directory")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)


@contextmanager
def _teacher(out: Path) -> Generator[str]:
    """A teacher server on free ports; gives its address, stops it at the end."""
    command = [BIN / "teacher-server", "--engine", "torch", "--model", HERE / "models" / "teacher"]
    command += ["--name", "chain-sum-teacher", "--listen", "127.0.0.1:0", "--metrics-port", "0"]
    with (out / "teacher.log").open("w") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            ready = server.stdout.readline()
            if "listen=" not in ready:
                sys.exit(f"the teacher server did not start; see {log.name}")
            print(ready.strip(), flush=True)
            yield ready.split("listen=")[1].split()[0]
        finally:
            server.terminate()
            server.wait(timeout=30)


def _evaluate(model: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    _trainer("eval", CONFIG, f"student.model={model}", *overrides, "--out", out)
    return json.loads(out.read_text())


def _train(run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    _trainer("train", CONFIG, f"run_dir={run_dir}", *overrides)
    return json.loads((run_dir / "summary.json").read_text())


def _trainer(*arguments: object) -> None:
    command = [str(BIN / "student-trainer"), *map(str, arguments)]
    print("$", " ".join(command), flush=True)
    # Its summary is printed at the end of the demo, with all the others.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            print(line, end="", flush=True)
    if process.wait():
        sys.exit(f"student-trainer failed with exit status {process.returncode}; its message is above")


if __name__ == "__main__":
    main()
