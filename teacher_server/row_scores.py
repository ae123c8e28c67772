"""Logits in, scores out: the arithmetic that every engine shares.

The logits of a slice of rows are read as few times as possible, since at a vocabulary of 150,000 memory traffic
is the cost: once for the maxima of blocks of 64, from which the largest, the top k and the blocks that can hold
them follow; once for the exponentials; once for their sums by block and once for the entropy. What is left
outside the top k or the candidates is summed from the sums of the blocks, of which only those that lost a member
are summed anew: nothing is ever subtracted, so a tail of 1e-20 is as exact as one of 0.5.

With a head that is sharded over the vocabulary every process scores its own columns, and only what a row needs
(k + M + 4 numbers) is exchanged, never a row of logits.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

_BLOCK = 64
_TINY_TAIL = 1e-24
"""Share of the largest probability under which a tail's float32 exponentials have lost digits."""
_CACHED_BYTES = 8 * 2**20
"""Logits that a CPU works on at once after the head product, so that the next pass finds them in its cache."""


@dataclass(frozen=True, slots=True)
class RowScores:
    """Scores of R positions, in nats, normalised over the whole vocabulary at each row's temperature."""

    top_ids: Tensor  # int32 [R, k], most likely first
    top_logprobs: Tensor  # float32 [R, k]
    sampled_logprobs: Tensor  # [R]
    candidate_logprobs: Tensor  # [R, M]
    log_tail: Tensor  # [R]
    log_support_tail: Tensor  # [R]
    entropy: Tensor  # [R]
    log_normalizer: Tensor  # [R]; NaN or infinite where the model produced no scores

    def numpy(self) -> dict[str, np.ndarray]:
        """The fields as arrays in main memory."""
        return {field.name: getattr(self, field.name).cpu().numpy() for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Shard:
    """The columns of the vocabulary that this process has: one of `count` parts, in the order of their ranks."""

    rank: int
    count: int
    first_id: int
    all_gather: Callable[[Tensor], Tensor]  # float32 [r, c] of every process -> [count, r, c]


def score_rows(
    hidden: Tensor,
    logits: Callable[[Tensor], Tensor],
    target_ids: Tensor,
    *,
    columns: int,
    top_k: int,
    candidate_ids: Tensor,
    temperatures: Tensor | None,
    logits_slice_bytes: int,
    shard: Shard | None = None,
) -> RowScores:
    """Scores R positions from their hidden states.

    hidden: [R, d], any float dtype. logits: hidden [r, d] -> float32 [r, `columns`] over the vocabulary (or this
    process's `shard` of it), in fresh memory that is overwritten. target_ids: int64 [R]. candidate_ids:
    int64 [R, M], M may be 0. temperatures: float32 [R], None if all are 1.
    Never holds more than `logits_slice_bytes` of logits (at least one row); about three times as much is in use
    at the peak, whatever R, k, M and V.
    """
    assert hidden.ndim == 2 and candidate_ids.ndim == 2
    assert len(hidden) == len(target_ids) == len(candidate_ids)
    wanted = top_k + candidate_ids.shape[1]
    # What a row needs beside its logits and their exponentials: values, ids and blocks of its k and M.
    row_bytes = 4 * max(columns, min(columns, _BLOCK * wanted) + 8 * wanted)
    rows = max(1, logits_slice_bytes // row_bytes)
    cached = max(1, _CACHED_BYTES // row_bytes) if hidden.device.type == "cpu" else rows
    scratch = None
    if hidden.device.type == "cpu":  # fresh memory costs a CPU more than what is then done with it
        scratch = torch.empty((2, min(cached, rows, len(hidden)), columns))
    parts: list[RowScores] = []
    for start in range(0, len(hidden), rows):
        z = logits(hidden[start : start + rows])
        for low in range(0, len(z), cached):
            part = z[low : low + cached]
            here = slice(start + low, start + low + len(part))
            if temperatures is not None:
                part /= temperatures[here, None]
            parts.append(score_logits(part, target_ids[here], top_k, candidate_ids[here], shard, scratch))
        del z
    if len(parts) == 1:
        return parts[0]
    return RowScores(
        **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(RowScores)}
    )


def score_logits(
    z: Tensor,
    target_ids: Tensor,
    top_k: int,
    candidate_ids: Tensor,
    shard: Shard | None = None,
    scratch: Tensor | None = None,
) -> RowScores:
    """Scores of logits z: float32 [r, V], over their temperatures already. z is overwritten.

    scratch: float32 [2, r or more, V] to compute in, if the caller has it.
    """
    rows, columns = z.shape
    top_values, top_columns, largest = _top(z, min(top_k, columns))
    # A process whose columns are all masked has no largest logit; the exponentials are zero all the same.
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    wanted = torch.cat([target_ids[:, None], candidate_ids], dim=1)  # [r, 1 + M]
    owned, z_shift = None, shift
    if shard is not None:
        wanted = wanted - shard.first_id
        owned = (wanted >= 0) & (wanted < columns)
        wanted = wanted.clamp(0, columns - 1)
    z -= shift[:, None]
    wanted_values = z.gather(1, wanted)
    if owned is not None:
        wanted_values = torch.where(owned, wanted_values, -torch.inf)
    top_values = top_values - shift[:, None]

    e = torch.exp(z, out=None if scratch is None else scratch[0, :rows])
    sums = _Sums(e, by_block=2 * _BLOCK * (top_k + candidate_ids.shape[1]) <= columns)
    total = sums.total()
    log_total = torch.log(total)  # as all below less the shift: logits of 5,000 have no digits to spare
    entropy = log_total - _moment(z, e, None if scratch is None else scratch[1, :rows]) / total

    kept = None
    top_ids = top_columns
    if shard is not None:
        top_ids = top_columns + shard.first_id
        everyone = _exchange(shard, shift, log_total, entropy, wanted_values, top_values, top_ids)
        # The chain rule of entropy: which process, then which of its columns.
        log_total = torch.logsumexp(everyone.log_totals, 0)
        log_weights = everyone.log_totals - log_total
        entropies = torch.exp(log_weights) * (everyone.entropies - log_weights)
        entropy = torch.where(log_weights > -torch.inf, entropies, 0.0).sum(0)
        z_shift, shift = shift - everyone.shift, everyone.shift
        wanted_values, values = everyone.wanted_values, everyone.top_values
        top_values, chosen = torch.topk(values, min(top_k, values.shape[1]), dim=-1)
        top_ids = everyone.top_ids.gather(1, chosen)
        kept = torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)
        kept = kept.unflatten(1, (shard.count, -1))[:, shard.rank]

    sums.drop(top_columns, kept)
    tails = [sums.total()]
    if candidate_ids.shape[1]:
        sums.drop(wanted[:, 1:], None if owned is None else owned[:, 1:])
        tails.append(sums.total())
    if top_k < columns and (torch.stack(tails) < _TINY_TAIL).any():
        log_tails = _exact_log_tails(z, top_columns, kept, wanted, owned)
    else:
        log_tails = torch.stack(tails, dim=1).log()  # [r, 1 or 2]
    if shard is not None:
        log_tails = torch.logsumexp(shard.all_gather(log_tails + z_shift[:, None]), 0)
    # A mass of nearly one may round to more than one; nobody should have to take the log of a negative rest.
    log_tails = (log_tails - log_total[:, None]).clamp(max=0.0)
    wanted_logprobs = wanted_values - log_total[:, None]
    return RowScores(
        top_ids=top_ids.to(torch.int32),
        top_logprobs=top_values - log_total[:, None],
        sampled_logprobs=wanted_logprobs[:, 0],
        candidate_logprobs=wanted_logprobs[:, 1:],
        log_tail=log_tails[:, 0],
        log_support_tail=log_tails[:, -1],
        entropy=entropy,
        log_normalizer=shift + log_total,
    )


def _top(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of each row, in falling order, their columns, and the largest: [r, k], [r, k], [r]."""
    columns = z.shape[1]
    blocks = columns // _BLOCK
    if 2 * _BLOCK * k > columns or k == 0:
        values, indices = torch.topk(z, k, dim=-1)
        return values, indices, values[:, 0] if k else z.amax(-1)
    blocked = z[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    maxima = blocked.amax(-1)  # [r, blocks]
    # Whatever is among the k largest lies in one of the k blocks with the largest maxima, or after the last block.
    chosen = torch.topk(maxima, k, dim=-1, sorted=False).indices
    values = blocked.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    rest = z[:, blocks * _BLOCK :]
    values, indices = torch.topk(torch.cat([values, rest], dim=1), k, dim=-1)
    in_block = chosen.gather(1, (indices // _BLOCK).clamp(max=k - 1)) * _BLOCK + indices % _BLOCK
    in_rest = indices - k * _BLOCK + blocks * _BLOCK
    return values, torch.where(indices < k * _BLOCK, in_block, in_rest), values[:, 0]


class _Sums:
    """Sums of the rows of e [r, V] as members are dropped, kept by block if few will be."""

    def __init__(self, e: Tensor, *, by_block: bool) -> None:
        self._e = e
        self._by_block = by_block
        if by_block:
            blocks = e.shape[1] // _BLOCK
            self._blocked = e[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
            self._rest = e[:, blocks * _BLOCK :]
            self._sums = self._blocked.sum(-1)

    def total(self) -> Tensor:
        """Sum of each row: [r]."""
        if self._by_block:
            return self._sums.sum(-1) + self._rest.sum(-1)
        return self._e.sum(-1)

    def drop(self, columns: Tensor, valid: Tensor | None) -> None:
        """Sets e to zero at `columns` [r, n], where `valid` [r, n] (None: everywhere)."""
        if not columns.shape[1]:
            return
        if valid is None:
            self._e.scatter_(1, columns, 0.0)
        else:
            # Columns may repeat, valid and not: the least value wins whatever the order.
            zeros = torch.where(valid, 0.0, torch.inf)
            self._e.scatter_reduce_(1, columns, zeros, "amin")
        if self._by_block:
            touched = (columns // _BLOCK).clamp(max=self._sums.shape[1] - 1)
            members = self._blocked.gather(1, touched[:, :, None].expand(-1, -1, _BLOCK))
            self._sums.scatter_(1, touched, members.sum(-1))


def _moment(z: Tensor, e: Tensor, scratch: Tensor | None) -> Tensor:
    """Sum of e z of each row, z being e's logarithm: [r]."""
    moment = torch.mul(e, z, out=scratch).sum(-1)
    if moment.isnan().any():  # 0 times -inf; slower, and as NaN as before if there is a NaN in z
        moment = -torch.special.entr(e).sum(-1)
    return moment


@dataclass(frozen=True, slots=True)
class _Everyone:
    """What all processes know of their own columns, on a common scale: logits less `shift`."""

    shift: Tensor  # [r]
    log_totals: Tensor  # [count, r]
    entropies: Tensor  # [count, r], of a process's own distribution
    wanted_values: Tensor  # [r, 1 + M], of whoever has the column
    top_values: Tensor  # [r, count k]
    top_ids: Tensor  # int32 [r, count k]


def _exchange(
    shard: Shard,
    shift: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    wanted_values: Tensor,
    top_values: Tensor,
    top_ids: Tensor,
) -> _Everyone:
    wanted = 3 + wanted_values.shape[1]
    scalars = torch.stack([shift, log_total, entropy], dim=1)
    ids = top_ids.to(torch.int32).view(torch.float32)  # as bits, since not every backend gathers whole numbers
    everyone = shard.all_gather(torch.cat([scalars, wanted_values, top_values, ids], dim=1))
    ids = everyone[..., wanted + top_ids.shape[1] :].contiguous().view(torch.int32)
    everyone = everyone[..., : wanted + top_ids.shape[1]]
    shifts = everyone[..., 0]
    largest = shifts.amax(0)
    everyone[..., 3:] += (shifts - largest)[..., None]
    return _Everyone(
        shift=largest,
        log_totals=everyone[..., 1] + (shifts - largest),
        entropies=everyone[..., 2],
        wanted_values=everyone[..., 3:wanted].amax(0),
        top_values=everyone[..., wanted:].movedim(0, 1).flatten(1),
        top_ids=ids.movedim(0, 1).flatten(1),
    )


def _exact_log_tails(
    z: Tensor, top_columns: Tensor, kept: Tensor | None, wanted: Tensor, owned: Tensor | None
) -> Tensor:
    """Log of the masses outside the top k, and outside the candidates too, however small: [r, 1 or 2].

    z is overwritten.
    """
    tails: list[Tensor] = []
    for columns, valid in ((top_columns, kept), (wanted[:, 1:], None if owned is None else owned[:, 1:])):
        if columns.shape[1] or not tails:
            if valid is None:
                z.scatter_(1, columns, -torch.inf)
            else:
                z.scatter_reduce_(1, columns, torch.where(valid, -torch.inf, torch.inf), "amin")
            tails.append(torch.logsumexp(z, dim=-1))
    return torch.stack(tails, dim=1)
