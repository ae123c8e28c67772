"""Weights that turn per-token losses into the loss of a global batch: loss = sum(weights * per_token).

The weights divide by counts of the *global* batch, so the losses of micro-batches and of ranks simply add up to
the loss of one big batch, and so do their gradients. (A trainer that averages gradients over ranks has to
multiply by the number of ranks.)
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"]


def token_weights(
    lengths: Tensor,
    reduction: Reduction,
    *,
    max_tokens: int,
    global_tokens: int,
    global_sequences: int,
) -> Tensor:
    """The weight of each token of this micro-batch, [lengths.sum()] float32, sequence after sequence.

    token_mean               1 / global_tokens                      (DAPO, KDRL)
    seq_mean_token_mean      1 / (global_sequences * own length)    (GRPO, RLAD)
    seq_mean_token_sum_norm  1 / (global_sequences * max_tokens)    (Dr.GRPO)

    Args:
        lengths: [B] integer, the number of trained tokens of each sequence of this micro-batch; 0 is allowed.
        max_tokens: the longest a response may be.
        global_tokens, global_sequences: counts over all micro-batches and ranks of this optimizer step.

    Raises:
        ValueError: an unknown reduction, or counts that cannot be those of a batch that contains this one.
    """
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be [B] of an integer dtype, got {lengths.dtype} {tuple(lengths.shape)}")
    longest, tokens = (int(lengths.max()), int(lengths.sum())) if lengths.numel() else (0, 0)
    for name, count, here in (
        ("max_tokens", max_tokens, longest),
        ("global_tokens", global_tokens, tokens),
        ("global_sequences", global_sequences, lengths.numel()),
    ):
        if count < here:
            raise ValueError(f"{name} is {count} but this micro-batch alone has {here}: pass the global count")
    match reduction:
        case "token_mean":
            divisors = torch.full_like(lengths, global_tokens)
        case "seq_mean_token_mean":
            divisors = global_sequences * lengths
        case "seq_mean_token_sum_norm":
            divisors = torch.full_like(lengths, global_sequences * max_tokens)
        case _:
            raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    # repeat first: a sequence without tokens has no weight to divide by zero for
    return divisors.repeat_interleave(lengths).to(torch.float32).reciprocal()
