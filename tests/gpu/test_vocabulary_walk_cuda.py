"""The vocabulary walk on a GPU against the same float64 oracle as on a CPU."""

import pytest
import torch

from student_trainer.logprobs import support_logprobs
from tests import oracles
from tests.unit.test_logprobs import HEADS, TOLERANCE, arrays, assert_near, make, upstream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("t", "v", "k", "dim", "slice_size"),
    [(7, 97, 9, 5, 40), (33, 1000, 64, 16, 300), (33, 1000, 64, 16, None), (256, 4096, 64, 128, 1000)],
)
def test_values_and_gradients_equal_the_full_vocabulary(t, v, k, dim, slice_size, head, dtype):
    """bfloat16: values to float32's tolerance, because the logits of exact inputs are float32; gradients to its own."""
    *cpu, ids, present = make(t, v, k, dtype, dim=dim)
    cpu[1] = cpu[1] * dim**-0.5
    settings = HEADS[head]
    leaves = [x.cuda().requires_grad_() for x in cpu]
    hidden, weight, bias = leaves
    out = support_logprobs(
        hidden, weight, ids.cuda(), present=present.cuda(), bias=bias, slice_size=slice_size, **settings
    )
    h, w, b = arrays(*cpu)
    z = oracles.logits(h, w, b, **settings)
    expected = oracles.scores(z, ids.numpy(), present.numpy())
    value_tolerance = TOLERANCE[torch.float32 if dtype == torch.bfloat16 else dtype]
    for actual, wanted in zip(out, expected, strict=True):
        assert actual.is_cuda and actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(actual.cpu(), wanted, value_tolerance)

    cotangents = upstream(*(x.shape for x in out), dtype=out.logprobs.dtype)
    grads = torch.autograd.grad(out, leaves, [x.cuda() for x in cotangents])
    dz = oracles.scores_gradient(z, ids.numpy(), present.numpy(), *arrays(*cotangents))
    for leaf, actual, wanted in zip(leaves, grads, oracles.head_gradients(dz, h, w, b, **settings), strict=True):
        assert actual.dtype == leaf.dtype
        assert_near(actual.cpu(), wanted, TOLERANCE[dtype])


def test_no_tokens_give_zero_gradients():
    hidden, weight, bias, ids, present = (x.cuda() for x in make(0, 11, 3, torch.bfloat16))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    out = support_logprobs(hidden, weight, ids, present=present, bias=bias)
    assert all(bool((x == 0).all()) for x in torch.autograd.grad(sum(x.sum() for x in out), leaves))
