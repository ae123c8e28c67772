"""The walk over the vocabulary behind `student_trainer.logprobs`: one autograd function and its parts.

A slice of logits [T, slice] is made, used and overwritten by the next; what is kept is a few numbers a row. The
backward pass makes each slice again and turns it into its own gradient, so every row of dW is written exactly once
(slicing over tokens would read and write all of dW for every slice) and dH is accumulated in place. Half precision
weights are widened one slice at a time.

The support of a row, its present ids, is kept out of the walk's sums: they run over the rest of the vocabulary, and
the support's few logits are added at the end. So the tail is exact however little mass it has.

Cost: the backward pass repeats the product h W^T, so there are four products of T*V*d multiply-adds (two of h W^T,
one for dH, one for dW) where full logits need three. That is the floor, 4/3 of the arithmetic; what is won back is
the memory traffic of three [T, V] tensors. `benchmarks/gathered_logprobs.py` measures both.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm_head import ONEDNN as _ONEDNN

_SLICE_BYTES = 4 * 2**20  # of one [T, slice] buffer: with its neighbours it stays in a shared cache
_MIN_SLICE = 512  # below this the matrix products lose more than the memory is worth
# A support entry is taken out of the walk by giving it this logit: exp() of it is 0, and unlike -inf it can be
# subtracted from and multiplied by 0.
_EXCLUDED = -1e30


class Head(NamedTuple):
    """What makes logits of h W^T + b, and how many of them at a time."""

    scale: float
    softcap: float | None
    temperature: float
    slice_size: int | None

    @property
    def inner(self) -> float:
        """What multiplies h W^T + b."""
        return self.scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def outer(self) -> float:
        """What multiplies the tanh."""
        return 1.0 if self.softcap is None else self.softcap / self.temperature


class _Entries(NamedTuple):
    """The E present entries of ids [T, K] in rising order of id, so that a slice owns a contiguous run of them."""

    rows: Tensor  # [E] row of the entry
    tokens: Tensor  # [E] its id
    places: Tensor  # [E] its index in the flattened [T, K]
    first: Tensor  # [E] bool: not a repetition of an id that its row already had


def _sorted_entries(ids: Tensor, present: Tensor | None, vocab_size: int) -> _Entries:
    n_rows, width = ids.shape
    flat = ids.flatten()
    places = torch.arange(flat.numel(), device=ids.device) if present is None else present.flatten().nonzero()[:, 0]
    tokens, rows = flat[places], places // max(width, 1)
    key, order = torch.sort(tokens * n_rows + rows)
    tokens, rows, places = tokens[order], rows[order], places[order]
    if tokens.numel() and not (tokens[0] >= 0 and tokens[-1] < vocab_size):
        raise ValueError(
            f"ids must lie in 0..{vocab_size - 1} (the rows of weight), got {int(tokens[0])}..{int(tokens[-1])}"
        )
    first = torch.ones_like(key, dtype=torch.bool)
    torch.ne(key[1:], key[:-1], out=first[1:])
    if present is not None and not first.all():
        repeated = int((~first).nonzero()[0, 0])
        raise ValueError(
            f"ids: row {int(rows[repeated])} holds id {int(tokens[repeated])} twice; set present=False at one of them"
        )
    return _Entries(rows, tokens, places, first)


def _slices(n_rows: int, vocab_size: int, itemsize: int, tokens: Tensor, size: int | None) -> Iterator[tuple]:
    """Yields (start, stop) of the vocabulary and the slice of the sorted entries that lies in it."""
    if size is None:
        size = max(_SLICE_BYTES // (itemsize * max(n_rows, 1)), _MIN_SLICE)
    size = math.ceil(vocab_size / math.ceil(vocab_size / size))  # equal slices instead of a small last one
    starts = list(range(0, vocab_size, size))
    edges = torch.tensor([*starts, vocab_size], device=tokens.device)
    bounds = torch.searchsorted(tokens, edges).tolist()
    for i, start in enumerate(starts):
        yield start, min(start + size, vocab_size), slice(bounds[i], bounds[i + 1])


def _inputs(hidden: Tensor, weight: Tensor, head: Head) -> Tensor:
    """hidden in the dtype of the arithmetic, times the factor in front of the logits."""
    double = torch.float64 in (hidden.dtype, weight.dtype)
    scaled = hidden.to(torch.float64 if double else torch.float32)
    return scaled if head.inner == 1.0 else scaled * head.inner


def _activations(inputs: Tensor, weight: Tensor, bias: Tensor | None, head: Head, out: Tensor) -> Tensor:
    """[T, slice] in ``out``: the logits, or before a soft-cap's outer factor the tanh."""
    _product(inputs, weight.t(), out)
    if bias is not None:
        out.add_(bias.to(out.dtype), alpha=head.inner)
    return out if head.softcap is None else out.tanh_()


class VocabularyWalk(torch.autograd.Function):
    """(hidden, weight, bias, ids, present, head) -> logprobs [T, K], entropy [T], log_tail [T]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, present, head):
        n_rows, vocab_size = hidden.shape[0], weight.shape[0]
        inputs = _inputs(hidden, weight, head)
        entries = _sorted_entries(ids, present, vocab_size)
        logits = inputs.new_empty(entries.tokens.numel())  # of the entries

        # Of the rest, the vocabulary without the row's entries: maximum m, sum of exp(z - m), and that weighted by
        # (z - m) for the entropy.
        top = inputs.new_full((n_rows, 1), _EXCLUDED)
        total, weighted = torch.zeros_like(top), torch.zeros_like(top)
        buffers = None
        for start, stop, run in _slices(n_rows, vocab_size, inputs.element_size(), entries.tokens, head.slice_size):
            if buffers is None:
                buffers = inputs.new_empty(2, n_rows, stop - start)
            z, exps = buffers[0, :, : stop - start], buffers[1, :, : stop - start]
            w, b = weight[start:stop].to(z.dtype), None if bias is None else bias[start:stop]
            z = _activations(inputs, w, b, head, z)
            if head.softcap is not None:
                z.mul_(head.outer)
            at = entries.rows[run], entries.tokens[run] - start
            logits[run] = z[at]
            z[at] = _EXCLUDED
            new_top = torch.maximum(top, z.amax(1, keepdim=True))
            torch.exp(z.sub_(new_top), out=exps)
            fall = top - new_top
            decay = fall.exp()
            weighted.addcmul_(total, fall).mul_(decay).add_(z.mul_(exps).sum(1, keepdim=True))
            total.mul_(decay).add_(exps.sum(1, keepdim=True))
            top = new_top
        del buffers

        support = logits.new_full((n_rows * ids.shape[1],), -math.inf)
        support[entries.places[entries.first]] = logits[entries.first]
        support = support.view(ids.shape)
        whole = (support != -math.inf).sum(1) == vocab_size
        rest_lse = (top + total.log())[:, 0].masked_fill(whole, -math.inf)
        lse = torch.logaddexp(rest_lse, support.logsumexp(1))
        log_tail = rest_lse - lse
        # entropy = -sum p log p: the rest's share, then the entries', each token once
        mean_rest = (weighted / total + top)[:, 0] - lse
        support = support - lse[:, None]
        mean_support = torch.where(support == -math.inf, 0.0, support.exp() * support)
        entropy = -(log_tail.exp() * mean_rest) - mean_support.sum(1)

        logprobs = logits.new_full((ids.numel(),), -math.inf)
        logprobs[entries.places] = logits - lse[entries.rows]
        logprobs = logprobs.view(ids.shape)
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, *entries, whole, rest_lse, logprobs, entropy, log_tail)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, log_tail

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy, grad_tail):
        hidden, weight, bias, *entry_tensors, whole, rest_lse, logprobs, entropy, log_tail = ctx.saved_tensors
        head, entries = ctx.head, _Entries(*entry_tensors)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        inputs = _inputs(hidden, weight, head)
        row_terms, at_entries, added = _row_terms(
            entries, whole, logprobs, entropy, log_tail, grad_logprobs, grad_entropy, grad_tail
        )
        d_hidden = torch.zeros_like(inputs) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None

        buffers = None
        for start, stop, run in _slices(
            hidden.shape[0], weight.shape[0], inputs.element_size(), entries.tokens, head.slice_size
        ):
            if buffers is None:
                buffers = inputs.new_empty(
                    1 + (head.softcap is not None) + (grad_entropy is not None), hidden.shape[0], stop - start
                )
            w, b = weight[start:stop].to(inputs.dtype), None if bias is None else bias[start:stop]
            spare = [buffer[:, : stop - start] for buffer in buffers]
            act = z = _activations(inputs, w, b, head, spare.pop())
            if head.softcap is not None:
                z = torch.mul(act, head.outer, out=spare.pop())
            # Of the rest: u = p / tail, from the rest's own log-sum-exp because p alone may underflow.
            z.sub_(rest_lse[:, None])
            if grad_entropy is None:
                dz = z.exp_().mul_(row_terms[0])
            else:
                dz = torch.exp(z, out=spare.pop()).mul_(z.mul_(row_terms[1]).add_(row_terms[0]))
            at = entries.rows[run], entries.tokens[run] - start
            dz[at] = at_entries[run]
            if added is not None:
                dz.index_put_(at, added[run], accumulate=True)
            if head.softcap is not None:
                dz.mul_(act.square_().neg_().add_(1.0)).mul_(head.outer)
            if d_hidden is not None:
                _product(dz, w, d_hidden, add=True)
            if d_weight is not None:
                _product(dz.t(), inputs, d_weight[start:stop])
            if d_bias is not None:
                d_bias[start:stop] = dz.sum(0).mul_(head.inner)
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(head.inner).to(hidden.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def _row_terms(
    entries: _Entries,
    whole: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    log_tail: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_tail: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor | None]:
    """What turns u = p / tail into the gradient of the logits z.

    With g the gradients of the log-probabilities, e of the entropy and r of the log tail:

        dz_v = sum_k g_k [v = id_k] - p_v (sum_k g_k + r) - e p_v (log p_v + entropy) + r [v in the rest] p_v / tail

    Returns (constant, slope), each [T, 1], with dz = u * (constant + slope * (z - rest_lse)) for the rest; then for
    the entries, [E] each, the value that replaces it and the g that is added per occurrence.
    """
    pull, added = torch.zeros_like(entropy), None
    if grad_logprobs is not None:
        added = grad_logprobs.flatten()[entries.places]
        kept = torch.zeros_like(logprobs).view(-1)
        kept[entries.places] = added  # a gradient to an absent entry stays out, even if it is not finite
        pull = kept.view(logprobs.shape).sum(1)
    tail = log_tail.exp()
    constant = torch.zeros_like(entropy)
    if grad_tail is not None:
        constant = grad_tail.masked_fill(whole, 0.0)
        pull = pull + constant
    constant = constant - tail * pull
    slope = torch.zeros_like(entropy)
    here = logprobs.flatten()[entries.places]
    share = pull[entries.rows]
    if grad_entropy is not None:
        slope = -tail * grad_entropy
        constant = constant + slope * (log_tail.masked_fill(whole, 0.0) + entropy)
        share = share + grad_entropy[entries.rows] * (here + entropy[entries.rows])
    return (constant[:, None], slope[:, None]), -here.exp() * share, added


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a b, or out += a b."""
    if _ONEDNN and a.is_cpu and a.dtype == torch.float32 and a.numel() and b.numel():
        product = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        if add:
            out.add_(product)
        else:
            out.copy_(product)
    elif add:
        out.addmm_(a, b)
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b, out=a.new_empty(out.shape)))
