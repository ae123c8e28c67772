"""Answers that wait for their turn, and random states, as arrays: what a process puts into a checkpoint of its own.

No pickles: arrays and JSON in one .npz, so that reading a checkpoint runs no code. Scores are left out; they are
asked for again, and a teacher that is the same gives the same.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from student_trainer.batch import Rollout
from student_trainer.experience import InFlight, Judged
from student_trainer.prompts import Prompt

_RAGGED = ("response_ids", "sampler_logprobs", "candidate_ids")


def write_process(path: Path, batches: Sequence[InFlight], randomness: Mapping[str, NDArray[Any]]) -> None:
    """One process's part of a checkpoint."""
    answers = [judged for batch in batches for judged in batch.answers]
    meta = {
        "batches": [
            {
                "step": batch.step,
                "student_step": batch.student_step,
                "dropped": batch.dropped,
                "answers": [
                    {
                        "prompt": judged.rollout.prompt.key,
                        "group": judged.group,
                        "reward": judged.reward,
                        "tokens": len(judged.rollout.response_ids),
                        "text": judged.rollout.text,
                        "finished": judged.rollout.finished,
                    }
                    for judged in batch.answers
                ],
            }
            for batch in batches
        ]
    }
    arrays: dict[str, NDArray[Any]] = {f"random_{name}": value for name, value in randomness.items()}
    if answers:
        for name in _RAGGED:
            arrays[name] = np.concatenate([getattr(judged.rollout, name) for judged in answers])
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)


def read_batches(paths: Sequence[Path], prompts: Mapping[str, Prompt], rank: int, count: int) -> list[InFlight]:
    """The answers in flight of all `paths` whose group belongs to `rank` of `count`, batch by batch."""
    batches: dict[int, InFlight] = {}
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        start = 0
        for stored in json.loads(arrays["meta"].tobytes())["batches"]:
            batch = batches.setdefault(stored["step"], InFlight(stored["step"], stored["student_step"], []))
            # Counted once in all: processes add their numbers up.
            batch.dropped += stored["dropped"] if rank == 0 else 0
            for answer in stored["answers"]:
                part = slice(start, start + answer["tokens"])
                start = part.stop
                if answer["group"] % count == rank:
                    rollout = Rollout(
                        prompt=prompts[answer["prompt"]],
                        text=answer["text"],
                        finished=answer["finished"],
                        **{name: arrays[name][part] for name in _RAGGED},
                    )
                    batch.answers.append(Judged(rollout, answer["group"], answer["reward"]))
    for batch in batches.values():
        batch.answers.sort(key=lambda judged: (judged.group, judged.rollout.response_ids.tolist()))
    return [batches[step] for step in sorted(batches)]


def random_state(device: torch.device) -> dict[str, NDArray[Any]]:
    """The state of every generator that a step may draw from: torch's (dropout), numpy's and Python's (verifiers)."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # pyright: ignore
    version, internal, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state().numpy(),
        "numpy_keys": np.asarray(keys),
        "numpy_rest": np.array([position, has_gauss, gauss], np.float64),
        "python": np.array(internal, np.uint64),
        "python_gauss": np.array([np.nan if gauss_next is None else gauss_next]),
    }
    assert kind == "MT19937" and version == 3
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy()
    return state


def restore_random_state(path: Path, device: torch.device) -> None:
    """Takes over what `random_state` gave to `write_process`."""
    with np.load(path, allow_pickle=False) as file:
        state = {name.removeprefix("random_"): file[name] for name in file.files if name.startswith("random_")}
    torch.set_rng_state(torch.from_numpy(state["torch"]))
    position, has_gauss, gauss = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy_keys"], int(position), int(has_gauss), gauss))
    gauss_next = float(state["python_gauss"][0])
    random.setstate((3, tuple(state["python"].tolist()), None if np.isnan(gauss_next) else gauss_next))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.from_numpy(state["cuda"]), device)
