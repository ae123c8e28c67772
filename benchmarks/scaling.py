"""How the trainer grows: tokens a second with one process and two, and the time of a step against T, G and k.

    python -m benchmarks.scaling [--steps 6]

Processes: the same run (the same global batch) with one process of one thread, one of two threads, and two of one
thread each, so both of the latter have two cores. Growth: one process, one of the lengths of an answer (T), the
answers to a prompt (G) and the teacher's top-k (k) at a time, everything else kept; the exponent is the slope of
log(time) over log(size). Attention makes T grow faster than 1 in the end, fixed costs make all of them slower.

Writes benchmarks/results/scaling.json.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import toy_runs

GROWTH = {
    "T": [64, 128, 256, 512],
    "G": [4, 8, 16, 32],
    "k": [2, 4, 8, 16],  # of a vocabulary of 19
}


def main() -> None:
    options = _parse()
    result: dict[str, Any] = {
        "machine": {"cores": os.cpu_count()},
        "options": vars(options),
        "processes": [],
        "growth": {},
        "exponents": {},
    }
    with tempfile.TemporaryDirectory() as temporary, toy_runs.teacher() as teacher:
        folder = Path(temporary)
        student = toy_runs.student(folder / "student", hidden_size=256, layers=4)
        for count, threads in ((1, 1), (1, 2), (2, 1)):
            print(f"{count} processes of {threads} threads ...", file=sys.stderr, flush=True)
            shape = {"max_new_tokens": 256, "answers_per_prompt": 8}
            config = toy_runs.configure(
                folder / f"p{count}t{threads}", student, teacher.address, steps=options.steps, rollout=shape
            )
            found = _means(toy_runs.run(config, processes=count, threads=threads))
            result["processes"].append({"processes": count, "threads": threads} | found)
        for name, sizes in GROWTH.items():
            points = [_grown(folder, student, teacher.address, options, name, size) for size in sizes]
            result["growth"][name] = points
            result["exponents"][name] = {
                part: _exponent(points, part) for part in ("step_s", "training_s", "rollout_s")
            }
            toy_runs.write("scaling", result)  # what there is stays if the next one fails
    print(_table(result))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="How the trainer grows.")
    parser.add_argument("--steps", type=int, default=6)
    return parser.parse_args()


def _grown(
    folder: Path, student: Path, address: str, options: argparse.Namespace, name: str, size: int
) -> dict[str, Any]:
    print(f"{name} = {size} ...", file=sys.stderr, flush=True)
    rollout = {"max_new_tokens": 128, "answers_per_prompt": 8, "prompts_per_step": 4}
    changes: dict[str, Any] = {"rollout": rollout}
    if name == "k":
        changes["teacher"] = {"top_k": size}
    else:
        rollout |= {"max_new_tokens": size} if name == "T" else {"answers_per_prompt": size}
    config = toy_runs.configure(folder / f"{name}{size}", student, address, steps=options.steps, **changes)
    return {"size": size} | _means(toy_runs.run(config, threads=2))


def _means(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Over all steps but the first."""
    names = ("step_s", "training_s", "rollout_s", "waiting_s", "response_tokens")
    found = {name: statistics.mean(step[name] for step in steps[1:]) for name in names}
    return found | {
        "tokens_per_s": found["response_tokens"] / found["step_s"],
        "training_tokens_per_s": found["response_tokens"] / found["training_s"],
    }


def _exponent(points: list[dict[str, Any]], part: str) -> float:
    sizes, times = np.log([point["size"] for point in points]), np.log([point[part] for point in points])
    return float(np.polyfit(sizes, times, 1)[0])


def _table(result: dict[str, Any]) -> str:
    lines = ["processes  threads  tokens/s  training tokens/s  step s  of one process with all cores"]
    whole = result["processes"][1]
    for row in result["processes"]:
        share = row["tokens_per_s"] / whole["tokens_per_s"]
        lines.append(
            f"{row['processes']:9d}  {row['threads']:7d}  {row['tokens_per_s']:8,.0f}  "
            f"{row['training_tokens_per_s']:17,.0f}  {row['step_s']:6.2f}  {share:.2f}"
        )
    for name, points in result["growth"].items():
        exponents = result["exponents"][name]
        sizes = ", ".join(f"{point['size']}: {point['step_s']:.2f} s" for point in points)
        lines.append(
            f"{name}: {sizes}; exponents: step {exponents['step_s']:.2f}, training {exponents['training_s']:.2f}, "
            f"rollouts {exponents['rollout_s']:.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
