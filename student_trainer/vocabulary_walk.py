"""The walk over the vocabulary behind `student_trainer.logprobs`: one autograd function and its parts.

A tile of logits, some rows by a slice of the vocabulary, is made, used and thrown away; what is kept is a few numbers
a row. The backward pass makes each tile again and turns it into its own gradient. The slices are the outer loop, so
every row of dW is written exactly once (slicing over tokens alone would read and write all of dW for every block) and
dH is accumulated in place. Half precision weights are widened one slice at a time.

The support of a row, its present ids, is kept out of the walk's sums: they run over the rest of the vocabulary, and
the support's few logits are added at the end. So the tail is exact however little mass it has.

Logits are always float32 (float64 if an input is). Where hidden and weight are bfloat16 and the device is fast at
that, the gradient of the logits is rounded to bfloat16, as in autograd through a bfloat16 head, for the product that
makes dW, and on a GPU for dH. Each sum is rounded once, at its end: torch has no product of bfloat16 into float32 on a
CPU, so there the dW of a slice takes all rows at once and dH, a sum over slices, stays float32.

Cost: the backward pass repeats the product h W^T, so there are four products of T*V*d multiply-adds (two of h W^T,
one for dH, one for dW) where full logits need three. That is the floor, 4/3 of the arithmetic; what is won back is
the memory traffic of three [T, V] tensors. `benchmarks/student_step.py` measures both.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm_head import ONEDNN as _ONEDNN

_TILE_BYTES = 4 * 2**20  # of logits: with its neighbours a tile stays in a shared cache
_BLOCK_ROWS = 1024  # of a tile on a CPU
_MIN_SLICE, _MAX_SLICE = 512, 8192  # matrix products lose more than the memory is worth; widened weights grow large
# Elsewhere oneDNN's products of bfloat16 are no faster than those of float32, or much slower.
_CPU_BFLOAT16 = _ONEDNN and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
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
    """The E present entries of ids [T, K] in the order of their tiles, so that a tile owns a contiguous run of them."""

    rows: Tensor  # [E] row of the entry
    spots: Tensor  # [E] its index in its flattened tile
    places: Tensor  # [E] its index in the flattened [T, K]
    first: Tensor  # [E] bool: not a repetition of an id that its row already had


class _Tiles:
    """How [T, V] is cut, and the run of entries of each tile. Slices and blocks are as equal as they can be."""

    def __init__(self, hidden: Tensor, vocab_size: int, slice_size: int | None):
        n_rows, itemsize = hidden.shape[0], 8 if hidden.dtype == torch.float64 else 4
        self.n_rows, self.vocab_size = n_rows, vocab_size
        self.block = _even(n_rows, _BLOCK_ROWS if hidden.is_cpu else n_rows)
        size = min(max(_TILE_BYTES // (itemsize * self.block), _MIN_SLICE), _MAX_SLICE)
        self.size = _even(vocab_size, size if slice_size is None else slice_size)
        self.blocks = [slice(i, min(i + self.block, n_rows)) for i in range(0, n_rows, self.block)]
        self.slices = [slice(i, min(i + self.size, vocab_size)) for i in range(0, vocab_size, self.size)]
        self._bounds: list[int] = []

    def runs(self, number: int) -> Iterator[tuple[slice, slice]]:
        """(rows, entries) of the tiles of a slice."""
        first = number * len(self.blocks)
        for i, block in enumerate(self.blocks, first):
            yield block, slice(self._bounds[i], self._bounds[i + 1])

    def sort(self, ids: Tensor, present: Tensor | None) -> _Entries:
        flat = ids.flatten()
        places = torch.arange(flat.numel(), device=ids.device) if present is None else present.flatten().nonzero()[:, 0]
        tokens, rows = flat[places], places // max(ids.shape[1], 1)
        if tokens.numel():
            lowest, highest = (int(x) for x in tokens.aminmax())
            if lowest < 0 or highest >= self.vocab_size:
                raise ValueError(
                    f"ids must lie in 0..{self.vocab_size - 1} (the rows of weight), got {lowest}..{highest}"
                )
        numbers, starts = tokens // self.size, rows // self.block * self.block
        tiles = numbers * len(self.blocks) + rows // self.block
        widths = (self.vocab_size - numbers * self.size).clamp_(max=self.size)
        spots = (rows - starts) * widths + tokens - numbers * self.size
        key, order = torch.sort(tiles * (self.block * self.size) + spots)
        tiles, rows, spots, places = tiles[order], rows[order], spots[order], places[order]
        edges = torch.arange(len(self.slices) * len(self.blocks) + 1, device=ids.device)
        self._bounds = torch.searchsorted(tiles, edges).tolist()
        first = torch.ones_like(key, dtype=torch.bool)
        torch.ne(key[1:], key[:-1], out=first[1:])
        if present is not None and not first.all():
            place = int(places[int((~first).nonzero()[0, 0])])
            raise ValueError(
                f"ids: row {place // ids.shape[1]} holds id {int(flat[place])} twice; set present=False at one of them"
            )
        return _Entries(rows, spots, places, first)


def _even(total: int, largest: int) -> int:
    """The size of equal parts of ``total``, none above ``largest``, instead of a small last one."""
    return math.ceil(total / math.ceil(total / largest)) if total else 1


def _widens_product(x: Tensor) -> bool:
    """Whether the device multiplies bfloat16 into float32, so that logits need no widened factors."""
    return x.is_cuda and torch.version.cuda is not None and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _rounds_gradient(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of the logits is rounded to bfloat16 for dW."""
    fast = _CPU_BFLOAT16 if hidden.is_cpu else _widens_product(hidden)
    return fast and hidden.dtype == weight.dtype == torch.bfloat16


def _factor(x: Tensor, other: Tensor) -> Tensor:
    """hidden or a slice of weight as `_product` wants it for logits; widening loses nothing."""
    if x.dtype == other.dtype == torch.bfloat16 and _widens_product(x):
        return x
    return x.to(torch.float64 if torch.float64 in (x.dtype, other.dtype) else torch.float32)


def _activations(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """A new tile: the logits, or before a soft-cap's outer factor the tanh."""
    z = _product(hidden, weight.t())
    if bias is not None:
        z.add_(bias.to(z.dtype))
    if head.inner != 1.0:
        z.mul_(head.inner)
    return z if head.softcap is None else z.tanh_()


class VocabularyWalk(torch.autograd.Function):
    """(hidden, weight, bias, ids, present, head) -> logprobs [T, K], entropy [T], log_tail [T]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, present, head):
        n_rows, vocab_size = hidden.shape[0], weight.shape[0]
        inputs = _factor(hidden, weight)
        tiles = _Tiles(hidden if weight.dtype != torch.float64 else inputs, vocab_size, head.slice_size)
        entries = tiles.sort(ids, present)
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        logits = torch.empty(entries.rows.shape, dtype=dtype, device=hidden.device)  # of the entries

        # Of the rest, the vocabulary without the row's entries: maximum m, sum of exp(z - m), and that weighted by
        # (z - m) for the entropy.
        top = logits.new_full((n_rows, 1), _EXCLUDED)
        total, weighted = torch.zeros_like(top), torch.zeros_like(top)
        for number, part in enumerate(tiles.slices):
            w, b = _factor(weight[part], hidden), None if bias is None else bias[part]
            for block, run in tiles.runs(number):
                z = _activations(inputs[block], w, b, head)
                if head.softcap is not None:
                    z.mul_(head.outer)
                spots = entries.spots[run]
                logits[run] = z.view(-1)[spots]
                z.view(-1)[spots] = _EXCLUDED
                new_top = torch.maximum(top[block], z.amax(1, keepdim=True))
                exps = z.sub_(new_top).exp()
                fall = top[block] - new_top
                decay = fall.exp()
                weighted[block].addcmul_(total[block], fall).mul_(decay).add_(z.mul_(exps).sum(1, keepdim=True))
                total[block].mul_(decay).add_(exps.sum(1, keepdim=True))
                top[block] = new_top
                del z, exps

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
        ctx.head, ctx.tiles = head, tiles
        ctx.save_for_backward(hidden, weight, bias, *entries, whole, rest_lse, logprobs, entropy, log_tail)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, log_tail

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy, grad_tail):
        hidden, weight, bias, *entry_tensors, whole, rest_lse, logprobs, entropy, log_tail = ctx.saved_tensors
        head, tiles, entries = ctx.head, ctx.tiles, _Entries(*entry_tensors)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        inputs = _factor(hidden, weight)
        row_terms, at_entries, added = _row_terms(
            entries, whole, logprobs, entropy, log_tail, grad_logprobs, grad_entropy, grad_tail
        )
        narrow = _rounds_gradient(hidden, weight)
        d_hidden = rest_lse.new_zeros(hidden.shape) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = rest_lse.new_zeros(weight.shape[:1]) if need_bias else None
        rounded = hidden.new_empty(hidden.shape[0], tiles.size) if need_weight and narrow else None
        # In float32 on a CPU dW is made as its transpose: oneDNN is slow at transposing dz when it comes first.
        flip = hidden.is_cpu and not narrow
        across = [inputs[block].t().contiguous() for block in tiles.blocks if flip and need_weight]

        for number, part in enumerate(tiles.slices):
            w, b = _factor(weight[part], hidden), None if bias is None else bias[part]
            d_slice = None
            for i, (block, run) in enumerate(tiles.runs(number)):
                act = z = _activations(inputs[block], w, b, head)
                if head.softcap is not None:
                    z = act * head.outer
                # Of the rest: u = p / tail, from the rest's own log-sum-exp because p alone may underflow.
                z.sub_(rest_lse[block, None])
                if grad_entropy is None:
                    dz = z.exp_().mul_(row_terms[0][block])
                else:
                    dz = z.exp().mul_(z.mul_(row_terms[1][block]).add_(row_terms[0][block]))
                spots = entries.spots[run]
                dz.view(-1)[spots] = at_entries[run]
                if added is not None:
                    dz.view(-1).index_add_(0, spots, added[run])
                if head.softcap is not None:
                    dz.mul_(act.square_().neg_().add_(1.0))
                if head.inner * head.outer != 1.0:
                    dz.mul_(head.inner * head.outer)
                if d_bias is not None:
                    d_bias[part] += dz.sum(0)
                del z, act
                dz = dz.to(w.dtype)
                if d_hidden is not None:
                    d_hidden[block] += _product(dz, w)
                if rounded is not None:
                    rounded[block, : dz.shape[1]] = dz
                elif d_weight is not None:
                    d_part = _product(across[i], dz).t() if flip else _product(dz.t(), inputs[block])
                    d_slice = d_part if d_slice is None else d_slice.add_(d_part)
                del dz
            if rounded is not None:
                d_slice = _product(rounded[:, : part.stop - part.start].t(), hidden)
            if d_weight is not None:
                d_weight[part] = 0.0 if d_slice is None else d_slice
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype)
        if bias is not None and d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
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


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, new. Of bfloat16 factors in float32 on a GPU, in bfloat16 on a CPU, for which torch has no such product."""
    if _ONEDNN and a.is_cpu and a.dtype == torch.float32 and a.numel() and b.numel():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    if a.dtype == torch.bfloat16 and not a.is_cpu:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))  # with out=, autocast leaves it alone
