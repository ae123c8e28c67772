"""vLLM in one process tree without a server, and the floor: what the same engine needs for the model alone.

As a program (`-m benchmarks.baselines.offline MODEL`, under the interpreter that has vLLM) it takes a job a line on
standard input and answers with a line; as a module it is that program's client.

    offline  LLM.generate with prompt_logprobs=k as flat arrays, made into NumPy arrays
    floor    LLM.generate without log-probabilities, and on as many rows head product, log-sum-exp and top k in torch
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.baselines import contender
from benchmarks.baselines.contender import Answer, Contender, ContenderFailed, Sequences

OFFLINE, FLOOR = "vLLM offline", "floor"
_SLICE_BYTES = 256 * 2**20


# The client


@contextlib.contextmanager
def started(model: Path, *, variables: dict[str, str], limit_s: float) -> Iterator["Offline"]:
    """An engine of `model`."""

    def ready(running: subprocess.Popen[str]) -> bool:
        assert running.stdout is not None
        return running.stdout.readline() == "ready\n"

    command = [str(contender.VLLM_PYTHON), "-m", "benchmarks.baselines.offline", str(model)]
    options: dict[str, Any] = {"cwd": contender.ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with contender.process(command, ready, variables=variables, **options) as running:
        yield Offline(running)


class Offline(Contender):
    def __init__(self, running: subprocess.Popen[str]) -> None:
        super().__init__(running.pid)
        assert running.stdin is not None and running.stdout is not None
        self._jobs, self._answers = running.stdin, running.stdout

    def wave(self, variant: str, sequences: Sequences, k: int) -> float:
        return self._ask(variant, sequences, k)["seconds"]

    def answer(self, sequence: NDArray[np.int32], k: int) -> Answer:
        found = self._ask("answer", [sequence], k)
        logprobs, ids = np.array(found["logprobs"], np.float32), np.array(found["ids"], np.int32)
        return Answer(logprobs[:, 0], ids[:, 1:], logprobs[:, 1:])

    def _ask(self, what: str, sequences: Sequences, k: int) -> dict[str, Any]:
        job = {"what": what, "sequences": [sequence.tolist() for sequence in sequences], "k": k}
        self._jobs.write(json.dumps(job) + "\n")
        self._jobs.flush()
        line = self._answers.readline()
        if not line:
            raise ContenderFailed("the program ended")
        return json.loads(line)


# The program


def main() -> None:
    # Others print to standard output too; it is ours alone from here on.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        engine = _Engine(Path(sys.argv[1]))
        _write(answers, "ready")
        for line in sys.stdin:
            job = json.loads(line)
            _write(answers, json.dumps(engine.do(job["what"], job["sequences"], job["k"])))


def _write(file: IO[str], line: str) -> None:
    file.write(line + "\n")
    file.flush()


class _Engine:
    def __init__(self, model: Path) -> None:
        import torch
        from safetensors import safe_open
        from vllm import LLM

        self._llm = LLM(
            model=str(model),
            skip_tokenizer_init=True,
            dtype=contender.DTYPE,
            max_model_len=contender.MAX_TOKENS,
            max_num_batched_tokens=contender.MAX_BATCH_TOKENS,
            kv_cache_memory_bytes=contender.KV_CACHE_BYTES,
            max_logprobs=-1,
            enforce_eager=True,
        )
        with safe_open(str(model / "model.safetensors"), "pt") as weights:
            self._head: Any = weights.get_tensor("lm_head.weight")
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # as the engine's worker has; vLLM took it to 1

    def do(self, what: str, sequences: list[list[int]], k: int) -> dict[str, Any]:
        if what == FLOOR:
            return {"seconds": self._prefill_s(sequences) + self._head_s(sum(map(len, sequences)) - len(sequences), k)}
        began_s = time.perf_counter()
        arrays = self._scores(sequences, k)
        seconds = time.perf_counter() - began_s
        if what == OFFLINE:
            return {"seconds": seconds}
        ids, logprobs = arrays[0]
        return {"ids": ids.tolist(), "logprobs": logprobs.tolist()}

    def _generate(self, sequences: list[list[int]], **options: Any) -> list[Any]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=sequence) for sequence in sequences]
        params = SamplingParams(max_tokens=1, detokenize=False, **options)
        return self._llm.generate(prompts, params, use_tqdm=False)

    def _scores(self, sequences: list[list[int]], k: int) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """For each sequence ids and log-probabilities [N, 1 + k], the token that is there first."""
        arrays = []
        for output in self._generate(sequences, prompt_logprobs=k, flat_logprobs=True):
            flat, shape = output.prompt_logprobs, (len(output.prompt_token_ids) - 1, 1 + k)
            ids = np.array(flat.token_ids, np.int32).reshape(shape)
            arrays.append((ids, np.array(flat.logprobs, np.float32).reshape(shape)))
        return arrays

    def _prefill_s(self, sequences: list[list[int]]) -> float:
        began_s = time.perf_counter()
        self._generate(sequences)
        return time.perf_counter() - began_s

    def _head_s(self, rows: int, k: int) -> float:
        import torch

        hidden = torch.randn(rows, self._head.shape[1])
        began_s = time.perf_counter()
        for part in hidden.split(max(1, _SLICE_BYTES // (4 * self._head.shape[0]))):
            logits = torch.nn.functional.linear(part, self._head)
            torch.logsumexp(logits, -1)
            torch.topk(logits, k)
            del logits  # before the next are made: never two slices at once
        return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
