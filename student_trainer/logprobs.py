"""Log-probabilities of chosen tokens, entropy and tail mass of a language-model head, without ever holding [T, V].

The logits are  z = softcap * tanh(scale * (h W^T + b) / softcap) / temperature,  softcap=None: without tanh.
The softmax runs over the rows of ``weight``: whoever pads the vocabulary passes ``weight[:vocab_size]``.

A weight that is sharded over processes (a DTensor) comes together for the walk and gets its gradient back in shards,
summed over the processes, each of which has hidden states of its own.

Arithmetic is float32 (float64 if an input is float64) whatever the dtype of the inputs, and gradients come back in
the dtype of their input. All values are nats. How it is done, and what it costs: `student_trainer.vocabulary_walk`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from student_trainer.vocabulary_walk import Head, VocabularyWalk


class Gathered(NamedTuple):
    logprobs: Tensor  # [T, K] nats, normalised over the whole vocabulary
    entropy: Tensor  # [T] nats, of the whole distribution


class Support(NamedTuple):
    logprobs: Tensor  # [T, K] nats; -inf where absent
    entropy: Tensor  # [T] nats, of the whole distribution
    log_tail: Tensor  # [T] nats, log of the mass outside the support; -inf if nothing is outside


def gathered_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    slice_size: int | None = None,
) -> Gathered:
    """Log-probabilities of ``ids`` and the entropy, differentiable in hidden, weight and bias.

    Args:
        hidden: [T, d], the input of the language-model head.
        weight: [V, d]; ``weight[:vocab_size]`` if the head is padded.
        ids: [T, K] int64 in 0..V-1; an id may occur several times in a row.
        bias: [V].
        scale, softcap, temperature: see the formula above.
        slice_size: vocabulary entries at a time; None chooses it by bytes.

    Raises:
        ValueError: an argument has the wrong shape, dtype or range (the message names it).
    """
    head = Head(scale, softcap, temperature, slice_size)
    weight, bias = _whole(weight), None if bias is None else _whole(bias)
    _check(hidden, weight, ids, bias, None, head)
    logprobs, entropy, _ = VocabularyWalk.apply(hidden, weight, bias, ids, None, head)
    return Gathered(logprobs, entropy)


def support_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    present: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    slice_size: int | None = None,
) -> Support:
    """As `gathered_logprobs`, and the log of the mass outside each row's ids, taken from the logits.

    log(1 - sum(p)) in float32 cannot go below about -16 nats; this log tail is as exact as the log-probabilities.

    Args:
        ids: [T, K] int64; the present ids of a row are distinct and in 0..V-1.
        present: [T, K] bool; where False the entry is not part of the support, whatever its id: its log-probability
            is -inf and it takes no gradient. None: all are present.

    A row whose support is the whole vocabulary has log_tail -inf, and a gradient to that value is ignored.

    Raises:
        ValueError: an argument has the wrong shape, dtype or range, or a row holds an id twice.
    """
    head = Head(scale, softcap, temperature, slice_size)
    weight, bias = _whole(weight), None if bias is None else _whole(bias)
    if present is None:
        present = torch.ones_like(ids, dtype=torch.bool)
    _check(hidden, weight, ids, bias, present, head)
    return Support(*VocabularyWalk.apply(hidden, weight, bias, ids, present, head))


def _whole(parameter: Tensor) -> Tensor:
    """All of a sharded parameter; its gradient is summed over processes, which have rows of their own."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)


def _check(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, present: Tensor | None, head: Head
) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [T, d], got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}] with V > 0, got {tuple(weight.shape)}")
    if ids.dim() != 2 or ids.shape[0] != hidden.shape[0] or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [{hidden.shape[0]}, K], got {ids.dtype} {tuple(ids.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if present is not None and (present.shape != ids.shape or present.dtype != torch.bool):
        raise ValueError(f"present must be bool {tuple(ids.shape)}, got {present.dtype} {tuple(present.shape)}")
    for name, value in (("softcap", head.softcap), ("temperature", head.temperature)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if head.slice_size is not None and head.slice_size < 1:
        raise ValueError(f"slice_size must be at least 1, got {head.slice_size}")
