"""What the worker does with the hidden states of a step: scores for the sequences that the step finishes.

A step may hold the rows of many sequences, and of a long sequence only a part. Each row is scored in the step that
computes it; what a sequence has is kept until its last row is there. Nothing here depends on vLLM.
"""

import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from teacher_server.packing import Counters, RowRequest, join_answer, pack_failure, pack_rows
from teacher_server.row_scores import RowScores, Shard, score_rows

logger = logging.getLogger(__name__)


class Head(Protocol):
    """What turns hidden states into logits."""

    columns: int
    shard: Shard | None

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [r, columns] in fresh memory."""
        ...

    def whole_logits(self, hidden: Tensor) -> Tensor | None:
        """Logits [r, V] as the engine itself makes them; None in a process that does not get them."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a sequence that one step computes: positions `begin` up to `end`, of `length` in all."""

    state: Any  # what the engine keeps for the sequence and for no other; when it goes, so does what is known here
    request: bytes  # of a RowRequest
    scheduled_s: float
    begin: int
    end: int
    length: int


@dataclass(slots=True)
class _Known:
    """What is known of a sequence between its steps."""

    request: RowRequest
    scheduled_s: float
    cached_tokens: int
    packed: list[tuple[int, Tensor]] = field(default_factory=list)  # (first position, rows), in their order


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one sequence in one step."""

    known: _Known
    first: int  # position in the sequence
    hidden: slice  # in the step's hidden states

    @property
    def span(self) -> slice:
        """Their indices among the rows of the request."""
        start = self.first - self.known.request.first_row
        return slice(start, start + self.hidden.stop - self.hidden.start)


class StepScorer:
    """Scores step after step. One process of a model has one."""

    def __init__(self, head: Head, *, max_top_k: int, max_candidates: int, logits_slice_bytes: int) -> None:
        self._head = head
        self._max_top_k = max_top_k
        self._max_candidates = max_candidates
        self._slice_bytes = logits_slice_bytes
        self._known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()

    def step(self, hidden: Tensor, parts: Sequence[Part]) -> list[Tensor | None]:
        """Answers (see `packing`) of the sequences that end in this step; None for the others.

        hidden: [R, d], the rows of `parts` one after the other.
        """
        work: dict[tuple[int, int, bool], list[_Rows]] = {}
        offset = 0
        for part in parts:
            known = self._known.get(part.state)
            if known is None:
                known = _Known(RowRequest.unpack(part.request), part.scheduled_s, part.begin)
                self._known[part.state] = known
            # A sequence that was preempted starts again from an earlier position.
            known.packed = [(first, rows) for first, rows in known.packed if first < part.begin]
            low = max(part.begin, known.request.first_row)
            high = min(part.end, known.request.first_row + len(known.request.target_ids))
            if low < high:
                here = slice(offset + low - part.begin, offset + high - part.begin)
                work.setdefault(known.request.group, []).append(_Rows(known, low, here))
            offset += part.end - part.begin
        for (top_k, candidates, plain), rows in work.items():
            self._score(hidden, rows, top_k, candidates, plain)
        done_s = time.monotonic()
        finished = sum(part.end == part.length for part in parts)
        return [self._answer(part, done_s, finished) for part in parts]

    def rehearse(self, hidden: Tensor) -> Tensor:
        """The most that a step of these rows can take, for a memory profile; returns the packed rows."""
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        candidates = targets[:, None].expand(-1, self._max_candidates)
        temperatures = torch.full((len(hidden),), 2.0, device=hidden.device)
        return pack_rows(self._score_rows(hidden.clone(), targets, self._max_top_k, candidates, temperatures))

    def _answer(self, part: Part, done_s: float, finished: int) -> Tensor | None:
        known = self._known[part.state]
        if part.end != part.length:
            # Rows that wait for the rest of their sequence wait in main memory.
            known.packed = [(first, rows.cpu()) for first, rows in known.packed]
            return None
        del self._known[part.state]
        return _join(known, done_s, finished)

    def _score(self, hidden: Tensor, work: list[_Rows], top_k: int, candidates: int, plain: bool) -> None:
        """Scores rows of sequences that have the same k and M."""
        requests = [(rows.known.request, rows.span) for rows in work]
        targets = np.concatenate([request.target_ids[span] for request, span in requests])
        wanted = np.concatenate([request.candidate_ids[span] for request, span in requests])
        counts = [span.stop - span.start for _, span in requests]
        temperatures = None
        if any(request.temperature != 1.0 for request, _ in requests):
            temperatures = np.repeat(np.array([request.temperature for request, _ in requests], np.float32), counts)

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(hidden.device)

        try:
            scores = self._score_rows(
                torch.cat([hidden[rows.hidden] for rows in work]),
                on_device(targets.astype(np.int64)),
                top_k,
                on_device(wanted.astype(np.int64)).reshape(sum(counts), candidates),
                None if temperatures is None else on_device(temperatures),
                plain=plain,
            )
            packed = pack_rows(scores).split(counts)
        except Exception as error:
            # An exception that leaves here ends the engine, with all that it has in flight. With several processes
            # there is no choice: the others already wait for this one's part.
            if self._head.shard is not None:
                raise
            logger.exception("scoring failed")
            kind = "memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else "failed"
            packed = [pack_failure(f"{kind}: {type(error).__name__}: {error}") for _ in work]
        for rows, scored in zip(work, packed, strict=True):
            rows.known.packed.append((rows.first, scored))

    def _score_rows(
        self,
        hidden: Tensor,
        targets: Tensor,
        top_k: int,
        candidates: Tensor,
        temperatures: Tensor | None,
        *,
        plain: bool = False,
    ) -> RowScores:
        if plain:
            return _plain_scores(self._head.whole_logits(hidden), targets, top_k, candidates, temperatures)
        return score_rows(
            hidden,
            self._head.logits,
            targets,
            columns=self._head.columns,
            top_k=top_k,
            candidate_ids=candidates,
            temperatures=temperatures,
            logits_slice_bytes=self._slice_bytes,
            shard=self._head.shard,
        )


def _join(known: _Known, done_s: float, finished: int) -> Tensor:
    """The answer of a finished sequence; without rows if one of them was not computed."""
    for _, rows in known.packed:
        if rows.dtype == torch.uint8:
            return rows
    request = known.request
    counters = Counters(
        engine_us=min(int(1e6 * (done_s - known.scheduled_s)), 2**31 - 1),
        batch_sequences=finished,
        cached_tokens=known.cached_tokens,
    )
    expected = request.first_row
    for first, rows in known.packed:
        expected = expected + len(rows) if first == expected else -1
    if expected != request.first_row + len(request.target_ids):
        columns = 2 * request.top_k + request.candidate_ids.shape[1] + 5
        return join_answer(counters, [torch.zeros((0, columns), dtype=torch.int32)])
    packed = [rows for _, rows in known.packed]
    if len({rows.device for rows in packed}) > 1:
        packed = [rows.cpu() for rows in packed]
    return join_answer(counters, packed)


def _plain_scores(
    logits: Tensor | None, targets: Tensor, top_k: int, candidates: Tensor, temperatures: Tensor | None
) -> RowScores:
    """Scores from whole logits by the definitions, for the check at start."""
    if logits is None:  # not the process that answers
        rows, m = candidates.shape
        nothing = targets.new_zeros(rows, dtype=torch.float32)
        return RowScores(
            top_ids=targets.new_zeros((rows, top_k), dtype=torch.int32),
            top_logprobs=nothing[:, None].expand(-1, top_k),
            sampled_logprobs=nothing,
            candidate_logprobs=nothing[:, None].expand(-1, m),
            log_tail=nothing,
            log_support_tail=nothing,
            entropy=nothing,
            log_normalizer=nothing,
        )
    z = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    if temperatures is not None:
        z = z / temperatures[:, None]
    normalizer = torch.logsumexp(z, -1)
    logprobs = z - normalizer[:, None]
    values, ids = logprobs.topk(top_k, dim=-1)
    outside = logprobs.scatter(1, ids, -torch.inf)
    found = RowScores(
        top_ids=ids.to(torch.int32),
        top_logprobs=values,
        sampled_logprobs=logprobs.gather(1, targets[:, None])[:, 0],
        candidate_logprobs=logprobs.gather(1, candidates),
        log_tail=torch.logsumexp(outside, -1),
        log_support_tail=torch.logsumexp(outside.scatter(1, candidates, -torch.inf), -1),
        entropy=torch.special.entr(logprobs.exp()).sum(-1),
        log_normalizer=normalizer,
    )
    floats = {name: getattr(found, name).float() for name in RowScores.__slots__ if name != "top_ids"}
    return replace(found, **floats)
