"""What travels between the vLLM engine and the process that has the head: one block of bytes in, one array out.

In: what to score of one sequence, so that the worker needs nothing but the hidden states. Out: int32
[1 + N, 2 k + M + 5], a row of counters and one for each response token; log-probabilities are the bits of their
float32. Neither has an object for a token, and both cross process boundaries as they are.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.codec import ScoreTask
from teacher_server.row_scores import RowScores

_HEADER = struct.Struct("<IIIdB")
_SCALARS = ("sampled_logprobs", "log_tail", "log_support_tail", "entropy", "log_normalizer")


@dataclass(frozen=True, slots=True)
class RowRequest:
    """The rows of one sequence to score: N of them from position `first_row`, the row before the response."""

    first_row: int
    top_k: int
    temperature: float
    target_ids: NDArray[np.int32]  # [N]
    candidate_ids: NDArray[np.int32]  # [N, M]
    plain: bool = False  # by vLLM's own logits, for the check at start

    @property
    def group(self) -> tuple[int, int, bool]:
        """Requests of one group are scored together."""
        return self.top_k, self.candidate_ids.shape[1], self.plain

    def pack(self) -> bytes:
        """As bytes."""
        header = _HEADER.pack(
            self.first_row, self.top_k, self.candidate_ids.shape[1], self.temperature, int(self.plain)
        )
        return header + self.target_ids.tobytes() + self.candidate_ids.tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> "RowRequest":
        """From what `pack` gave."""
        first_row, top_k, candidates, temperature, plain = _HEADER.unpack_from(data)
        ids = np.frombuffer(data, np.int32, offset=_HEADER.size)
        rows = len(ids) // (1 + candidates)
        return cls(first_row, top_k, temperature, ids[:rows], ids[rows:].reshape(rows, candidates), bool(plain))


def row_request(task: ScoreTask, *, plain: bool = False) -> RowRequest:
    """What the worker needs to know of a task."""
    candidates = task.candidate_ids
    return RowRequest(
        first_row=task.score_start - 1,
        top_k=task.top_k,
        temperature=task.temperature,
        target_ids=np.ascontiguousarray(task.token_ids[task.score_start :], np.int32),
        candidate_ids=np.zeros((task.num_scored, 0), np.int32)
        if candidates is None
        else np.ascontiguousarray(candidates, np.int32),
        plain=plain,
    )


@dataclass(frozen=True, slots=True)
class Counters:
    """The first row of an answer."""

    engine_us: int = 0  # from the first schedule of the sequence to its answer
    batch_sequences: int = 0
    cached_tokens: int = 0


def pack_rows(rows: RowScores) -> Tensor:
    """int32 [R, 2 k + M + 5] of the scores of R rows, on their device."""
    floats = [rows.top_logprobs, rows.candidate_logprobs, *(getattr(rows, name)[:, None] for name in _SCALARS)]
    return torch.cat([rows.top_ids, torch.cat(floats, dim=1).view(torch.int32)], dim=1)


def join_answer(counters: Counters, parts: Sequence[Tensor]) -> Tensor:
    """The answer, from packed rows in their order."""
    first = parts[0].new_zeros((1, parts[0].shape[1]))
    first[0, :3] = torch.tensor([counters.engine_us, counters.batch_sequences, counters.cached_tokens])
    return torch.cat([first, *parts])


def unpack_answer(answer: NDArray[np.int32], request: RowRequest) -> tuple[Counters, dict[str, np.ndarray]]:
    """Counters, and the arrays of `Scores` by name."""
    k, candidates = request.top_k, request.candidate_ids.shape[1]
    counters = Counters(*(int(value) for value in answer[0, :3]))
    rows = answer[1:]
    floats = rows[:, k:].view(np.float32)
    fields: dict[str, np.ndarray] = {name: floats[:, k + candidates + index] for index, name in enumerate(_SCALARS)}
    fields["top_ids"] = rows[:, :k]
    fields["top_logprobs"] = floats[:, :k]
    fields["candidate_logprobs"] = floats[:, k : k + candidates]
    return counters, fields


def pack_failure(text: str) -> Tensor:
    """An answer that says why there is none."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def failure_of(answer: np.ndarray) -> str | None:
    """The reason that `pack_failure` packed, or None for scores."""
    return answer.tobytes().decode() if answer.dtype == np.uint8 else None
