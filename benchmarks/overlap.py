"""The share of a step that the trainer waits, with batches made ahead and teachers of several speeds.

    python -m benchmarks.overlap [--ahead 0,1,2] [--teacher 0.5,1,2] [--steps 16]

A step is measured first with a teacher that takes no time: generating, judging and training, c seconds. Then for each
teacher speed f the teacher takes f * c seconds for a step's sequences, one after the other, as a pool on other
machines would (it sleeps), and the run is repeated with each number of batches made ahead.

What could be expected: without batches ahead the teacher works while the rest of the answers are still generated and
afterwards alone, so the trainer waits about f / (1 + f) of the step. With one ahead it works beside the whole step:
nothing to wait for while f <= 1, and 1 - 1 / f beyond, where the teacher is the slower of the two and no number of
batches ahead can help.

Writes benchmarks/results/overlap.json.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import toy_runs


def main() -> None:
    options = _parse()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, toy_runs.teacher() as teacher:
        folder = Path(temporary)
        student = toy_runs.student(folder / "student", hidden_size=options.hidden_size, layers=options.layers)
        instant = _measure(folder / "instant", student, teacher.address, options, ahead=0)
        compute_s, tokens = instant["step_s"], instant["response_tokens"]
        print(f"a step without a teacher's time: {compute_s:.2f} s, {tokens:.0f} tokens", file=sys.stderr)
        for factor in options.teacher:
            teacher.pace(factor * compute_s / tokens)
            for ahead in options.ahead:
                name = f"teacher {factor:g}x, {ahead} ahead"
                print(f"{name} ...", file=sys.stderr, flush=True)
                found = _measure(folder / name.replace(" ", "-"), student, teacher.address, options, ahead=ahead)
                expected = factor / (1 + factor) if ahead == 0 else max(0.0, 1 - 1 / factor)
                rows.append({"teacher": factor, "ahead": ahead, "expected_waiting_share": expected} | found)
    result = {"options": vars(options), "compute_s": compute_s, "rows": rows}
    toy_runs.write("overlap", result)
    print(_table(rows, compute_s))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overlap", description="How much of a step the trainer waits."
    )
    parser.add_argument("--ahead", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--teacher", type=lambda text: [float(part) for part in text.split(",")], default=[0.5, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    return parser.parse_args()


def _measure(folder: Path, student: Path, address: str, options: argparse.Namespace, *, ahead: int) -> dict[str, float]:
    """Means over the steps that are neither the first ones, whose batches come all at once, nor the last ones,
    which make none ahead."""
    config = toy_runs.configure(
        folder, student, address, steps=options.steps, rollout={"batches_ahead": ahead, "batch_size": 8}
    )
    steps = toy_runs.run(config)[3 : options.steps - ahead]
    names = ("step_s", "waiting_s", "rollout_s", "training_s", "response_tokens", "staleness")
    found = {name: statistics.mean(step[name] for step in steps) for name in names}
    return found | {"waiting_share": found["waiting_s"] / found["step_s"]}


def _table(rows: list[dict[str, Any]], compute_s: float) -> str:
    lines = [
        f"step without a teacher's time: {compute_s:.2f} s",
        "teacher  ahead  step s  waiting s  share  expected  staleness",
    ]
    lines += [
        f"{row['teacher']:6.1f}x  {row['ahead']:5d}  {row['step_s']:6.2f}  {row['waiting_s']:9.2f}  "
        f"{row['waiting_share']:5.1%}  {row['expected_waiting_share']:8.0%}  {row['staleness']:9.1f}"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
