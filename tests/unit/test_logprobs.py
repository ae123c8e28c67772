"""The vocabulary walk against a float64 oracle that holds all logits."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from student_trainer import vocabulary_walk
from student_trainer.logprobs import gathered_logprobs, support_logprobs
from tests import oracles

# atol of values and of gradients, relative to the largest of them
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 8e-3}
HEADS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 1.7},
    "everything": {"scale": 1.3, "softcap": 2.0, "temperature": 0.6},
}


def make(t, v, k, dtype=torch.float64, *, bias=True, seed=0, dim=5):
    """hidden, weight, bias, ids and present; the rounding to dtype belongs to the inputs, not to the error."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, dim, generator=g).to(dtype)
    weight = torch.randn(v, dim, generator=g).to(dtype)
    b = torch.randn(v, generator=g).to(dtype) if bias else None
    ids = torch.stack([torch.randperm(v, generator=g)[:k] for _ in range(t)]) if t else torch.zeros(0, k).long()
    present = torch.rand(t, k, generator=g) < 0.8 if k < v else torch.ones(t, k, dtype=torch.bool)
    return hidden, weight, b, torch.where(present, ids, -1), present


def upstream(*shapes, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def arrays(*tensors):
    return [None if x is None else x.detach().double().numpy() for x in tensors]


def assert_near(actual, expected, tolerance):
    actual, expected = np.asarray(actual.detach().double()), np.asarray(expected)
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    scale = max(1.0, np.abs(expected[finite]).max(initial=0.0))
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=0, atol=tolerance * scale)


def check_against_oracle(inputs, head, slice_size):
    hidden, weight, bias, ids, present = inputs
    dtype = hidden.dtype
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    got = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=slice_size, **head)

    h, w, b = arrays(hidden, weight, bias)
    z = oracles.logits(h, w, b, **head)
    expected = oracles.scores(z, ids.numpy(), present.numpy())
    value_tolerance = TOLERANCE[torch.float32 if dtype == torch.bfloat16 else dtype]
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(actual, wanted, value_tolerance)

    cotangents = upstream(*(x.shape for x in got), dtype=got.logprobs.dtype)
    grads = torch.autograd.grad(got, leaves, cotangents)
    dz = oracles.scores_gradient(z, ids.numpy(), present.numpy(), *arrays(*cotangents))
    for leaf, actual, wanted in zip(leaves, grads, oracles.head_gradients(dz, h, w, b, **head), strict=False):
        assert actual.dtype == leaf.dtype
        assert_near(actual, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("t", "v", "k", "slice_size"),
    [
        (1, 3, 1, 2),
        (1, 3, 3, 2),
        (7, 97, 5, 10),
        (7, 97, 97, 33),
        (33, 97, 1, 97),
        (33, 1000, 64, 300),
        (7, 3, 2, None),
    ],
)
def test_values_and_gradients_equal_the_full_vocabulary(t, v, k, slice_size, dtype):
    check_against_oracle(make(t, v, k, dtype), {}, slice_size)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("head", HEADS)
def test_the_head_is_part_of_value_and_gradient(head, bias, dtype):
    check_against_oracle(make(7, 97, 9, dtype, bias=bias), HEADS[head], 40)


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck_of_the_support(head):
    hidden, weight, bias, ids, present = make(3, 7, 4)

    def flat(h, w, b):
        out = support_logprobs(h, w, ids, present=present, bias=b, slice_size=3, **HEADS[head])
        return out.logprobs[present], out.entropy, out.log_tail

    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    assert torch.autograd.gradcheck(flat, leaves)


def test_gradcheck_of_gathered_with_ids_that_repeat():
    hidden, weight, bias, _, _ = make(3, 7, 4)
    ids = torch.tensor([[0, 0, 6, 0], [1, 2, 3, 4], [5, 5, 5, 5]])
    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h, w, b: tuple(gathered_logprobs(h, w, ids, bias=b, slice_size=2)), leaves)


def test_repeated_ids_are_worth_what_they_are_one_by_one():
    hidden, weight, bias, _, _ = make(4, 11, 3)
    ids = torch.tensor([[3, 3, 3], [0, 10, 0], [5, 6, 7], [2, 2, 9]])
    together = gathered_logprobs(hidden, weight, ids, bias=bias)
    alone = [gathered_logprobs(hidden, weight, ids[:, k : k + 1], bias=bias) for k in range(3)]
    torch.testing.assert_close(together.logprobs, torch.cat([x.logprobs for x in alone], 1))
    torch.testing.assert_close(together.entropy, alone[0].entropy)
    assert_near(together.entropy, oracles.scores(oracles.logits(*arrays(hidden, weight, bias)), ids)[1], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("slice_size", [1, 2, 13, 96, 97, 500])
def test_the_slice_size_changes_nothing(slice_size, dtype):
    hidden, weight, bias, ids, present = make(7, 97, 20, dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    results = []
    for size in (slice_size, None):
        out = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=size)
        grads = torch.autograd.grad(out, leaves, upstream(*(x.shape for x in out), dtype=dtype))
        results.append([*out, *grads])
    torch.testing.assert_close(*results, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block_rows", [1, 4, 32])
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_rows_that_do_not_fit_one_tile_are_equal_to_the_full_vocabulary(monkeypatch, head, block_rows, dtype):
    monkeypatch.setattr(vocabulary_walk, "_BLOCK_ROWS", block_rows)
    check_against_oracle(make(33, 97, 9, dtype), HEADS[head], 40)


def test_an_id_that_occurs_twice_is_named_by_its_row_in_any_tile(monkeypatch):
    monkeypatch.setattr(vocabulary_walk, "_BLOCK_ROWS", 2)
    hidden, weight, _, _, _ = make(7, 97, 3)
    ids = torch.arange(3).repeat(7, 1)
    ids[5] = torch.tensor([96, 4, 96])
    with pytest.raises(ValueError, match="ids: row 5 holds id 96 twice"):
        support_logprobs(hidden, weight, ids, slice_size=10)


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16_products", "float32_products"])
@pytest.mark.parametrize("block_rows", [64, 1024])
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_bfloat16_is_as_exact_as_float32_in_values_and_as_autograd_in_gradients(monkeypatch, head, block_rows, narrow):
    """Realistic widths, so that rounding averages as it does in a model; the inputs are exact bfloat16."""
    monkeypatch.setattr(vocabulary_walk, "_CPU_BFLOAT16", narrow)
    monkeypatch.setattr(vocabulary_walk, "_BLOCK_ROWS", block_rows)
    hidden, weight, bias, _, _ = make(200, 1500, 9, torch.bfloat16, dim=128)
    weight, settings = (weight.float() / 128**0.5).to(torch.bfloat16), HEADS[head]
    ids = torch.randint(1500 // 9, (200, 1)) * 9 + torch.arange(9)
    present = torch.ones_like(ids, dtype=torch.bool)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    out = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=400, **settings)
    h, w, b = arrays(*leaves)
    z = oracles.logits(h, w, b, **settings)
    for actual, wanted in zip(out, oracles.scores(z, ids.numpy(), present.numpy()), strict=True):
        np.testing.assert_allclose(actual.detach().double().numpy(), wanted, rtol=0, atol=1e-5)

    cotangents = upstream(*(x.shape for x in out))
    grads = torch.autograd.grad(out, leaves, cotangents)
    wanted = oracles.head_gradients(
        oracles.scores_gradient(z, ids.numpy(), present.numpy(), *arrays(*cotangents)), h, w, b, **settings
    )
    plain = torch.autograd.grad(_by_autograd(hidden, weight, bias, ids, **settings), leaves, cotangents)

    def error(actual, expected):
        return np.linalg.norm(actual.double().numpy() - expected) / np.linalg.norm(expected)

    for ours, theirs, expected in zip(grads, plain, wanted, strict=True):
        assert error(ours, expected) <= 3e-3
        assert error(ours, expected) <= error(theirs, expected)


def _by_autograd(hidden, weight, bias, ids, scale=1.0, softcap=None, temperature=1.0):
    """Values of a bfloat16 head whose logits are made whole and widened to float32."""
    z = torch.nn.functional.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logprobs = (z / temperature).log_softmax(1)
    outside = torch.ones_like(z, dtype=torch.bool).scatter(1, ids, False)
    tail = logprobs.masked_fill(~outside, -math.inf).logsumexp(1)
    return logprobs.gather(1, ids), -(logprobs.exp() * logprobs).sum(1), tail


@pytest.mark.parametrize("slice_size", [4, None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_no_tokens_give_empty_results_and_zero_gradients(dtype, slice_size):
    hidden, weight, bias, ids, present = make(0, 11, 3, dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    out = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=slice_size)
    assert [tuple(x.shape) for x in out] == [(0, 3), (0,), (0,)]
    grads = torch.autograd.grad(sum(x.sum() for x in out), leaves)
    assert [tuple(x.shape) for x in grads] == [(0, 5), (11, 5), (11,)]
    assert all(bool((x == 0).all()) for x in grads)


def test_no_ids_leave_everything_in_the_tail():
    hidden, weight, bias, _, _ = make(4, 11, 3)
    out = support_logprobs(hidden, weight, torch.zeros(4, 0).long(), bias=bias)
    assert out.logprobs.shape == (4, 0)
    assert_near(out.log_tail, np.zeros(4), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inputs_need_not_be_contiguous(dtype):
    hidden, weight, bias, ids, present = make(7, 97, 9, dtype)
    padded = torch.full((128, 10), math.nan, dtype=dtype)  # a padded head, every second column
    padded[:97, ::2] = weight
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    views = [hidden.t().contiguous().t(), padded[:97, ::2].requires_grad_(), bias.repeat_interleave(2)[::2]]
    assert not any(x.is_contiguous() for x in views)
    expected = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=40)
    actual = support_logprobs(
        views[0], views[1], ids.t().contiguous().t(), present=present, bias=views[2], slice_size=40
    )
    torch.testing.assert_close(actual, expected)
    cotangents = upstream(*(x.shape for x in expected), dtype=dtype)
    grads = torch.autograd.grad(actual, views, cotangents), torch.autograd.grad(expected, leaves, cotangents)
    torch.testing.assert_close(*grads, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    "wanted", [c for n in (1, 2) for c in itertools.combinations(("hidden", "weight", "bias"), n)], ids="+".join
)
def test_only_what_needs_a_gradient_gets_one(wanted):
    inputs = make(7, 97, 9)
    tensors = dict(zip(("hidden", "weight", "bias"), inputs, strict=False))
    ids, present = inputs[3:]

    def gradients(names):
        fresh = {n: x.detach().clone().requires_grad_(n in names) for n, x in tensors.items()}
        out = support_logprobs(
            fresh["hidden"], fresh["weight"], ids, present=present, bias=fresh["bias"], slice_size=40, softcap=2.0
        )
        sum(x.sum() for x in (out.logprobs[present], out.entropy, out.log_tail)).backward()
        return {n: x.grad for n, x in fresh.items()}

    every, some = gradients(tensors), gradients(wanted)
    for name in tensors:
        if name in wanted:
            torch.testing.assert_close(some[name], every[name])
        else:
            assert some[name] is None


def test_only_one_output_may_be_used():
    hidden, weight, bias, ids, present = make(7, 97, 9)
    z = oracles.logits(*arrays(hidden, weight, bias))
    zeros = np.zeros(ids.shape), np.zeros(7), np.zeros(7)
    for used in range(3):
        hidden.requires_grad_()
        out = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=40)
        chosen = torch.where(present, out[0], 0.0) if used == 0 else out[used]
        (grad,) = torch.autograd.grad(chosen.sum(), hidden)
        cotangents = [np.ones_like(x) if i == used else x for i, x in enumerate(zeros)]
        dz = oracles.scores_gradient(z, ids.numpy(), present.numpy(), *cotangents)
        assert_near(grad, oracles.head_gradients(dz, *arrays(hidden, weight, bias))[0], 1e-12)


def test_adding_a_constant_to_all_logits_changes_nothing():
    hidden, weight, bias, ids, present = make(7, 97, 9)
    torch.testing.assert_close(
        support_logprobs(hidden, weight, ids, present=present, bias=bias + 50.0, slice_size=40),
        support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=40),
    )


def test_an_absent_entry_is_an_entry_that_was_dropped():
    hidden, weight, bias, ids, _ = make(7, 97, 9)
    ids = ids.clamp(min=0)
    ids = torch.stack([torch.randperm(97, generator=torch.Generator().manual_seed(i))[:9] for i in range(7)])
    present = torch.ones_like(ids, dtype=torch.bool)
    present[:, 4] = False
    ids[:, 4] = ids[:, 0]  # a duplicate, as a candidate that is already in the top-k
    others = [k for k in range(9) if k != 4]
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    masked = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=40)
    dropped = support_logprobs(hidden, weight, ids[:, others], bias=bias, slice_size=40)
    assert bool((masked.logprobs[:, 4] == -math.inf).all())
    torch.testing.assert_close(masked.logprobs[:, others], dropped.logprobs)
    torch.testing.assert_close(masked[1:], dropped[1:])

    cotangents = upstream(*(x.shape for x in masked), dtype=torch.float64)
    cotangents[0][:, 4] = math.nan  # whatever comes back at an absent entry stays out
    torch.testing.assert_close(
        torch.autograd.grad(masked, leaves, cotangents),
        torch.autograd.grad(dropped, leaves, [cotangents[0][:, others], *cotangents[1:]]),
    )


@pytest.mark.parametrize("log_mass", [-1.0, -16.0, -23.0, -60.0, -200.0, -5000.0])
def test_a_tiny_tail_is_exact_in_value_and_gradient(log_mass):
    """float32; 1 - sum(p) would be 0 or rounding noise from about -16 on."""
    hidden, weight, _, ids, _ = make(5, 97, 9, torch.float32)
    ids = ids.clamp(min=0)
    ids = torch.arange(9).expand(5, 9).contiguous()
    bias = torch.full((97,), log_mass - math.log(88))
    bias[:9] = -math.log(9)
    hidden, weight = 0.1 * hidden, 0.1 * weight
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    out = support_logprobs(hidden, weight, ids, bias=bias, slice_size=20)
    h, w, b = arrays(*leaves)
    z = oracles.logits(h, w, b)
    expected = oracles.scores(z, ids.numpy())[2]
    assert expected.max() < log_mass + 1
    np.testing.assert_allclose(out.log_tail.detach().numpy(), expected, rtol=1e-6)

    grads = torch.autograd.grad(out.log_tail.sum(), leaves)
    nothing = np.zeros(ids.shape), np.zeros(5)
    dz = oracles.scores_gradient(z, ids.numpy(), np.ones(ids.shape, bool), *nothing, np.ones(5))
    for actual, wanted in zip(grads, oracles.head_gradients(dz, h, w, b), strict=True):
        assert_near(actual, wanted, max(2e-6, 1e-7 * -log_mass))  # the logits themselves are float32


@pytest.mark.parametrize("head", HEADS)
def test_a_whole_vocabulary_has_no_tail_and_a_finite_gradient(head):
    hidden, weight, bias, _, _ = make(4, 11, 11, torch.float32)
    ids = torch.arange(11).flip(0).expand(4, 11)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    out = support_logprobs(hidden, weight, ids, bias=bias, slice_size=3, **HEADS[head])
    assert bool((out.log_tail == -math.inf).all())
    with_tail = torch.autograd.grad(out, leaves, upstream(*(x.shape for x in out)), retain_graph=True)
    without = torch.autograd.grad(out[:2], leaves, upstream(*(x.shape for x in out))[:2])
    assert all(bool(x.isfinite().all()) for x in with_tail)
    torch.testing.assert_close(with_tail, without)


def test_large_logits_do_not_overflow():
    """Differences of hundreds of nats, whose float32 rounding is all that may remain."""
    hidden, weight, bias, ids, present = make(7, 97, 9, torch.float32)
    hidden = (300.0 * hidden).requires_grad_()
    out = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=40)
    expected = oracles.scores(oracles.logits(*arrays(hidden, weight, bias)), ids.numpy(), present.numpy())
    for actual, wanted in zip(out, expected, strict=True):
        assert_near(actual, wanted, 1e-4)
    (grad,) = torch.autograd.grad(out, hidden, upstream(*(x.shape for x in out)))
    assert bool(grad.isfinite().all())


def test_a_nan_in_the_model_is_not_hidden():
    hidden, weight, bias, ids, present = make(7, 97, 9)
    hidden[3, 0] = math.nan
    out = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=40)
    assert bool(out.entropy[3].isnan()) and bool(out.log_tail[3].isnan())
    assert bool(out.logprobs[3][present[3]].isnan().all())
    assert bool(out.entropy[[0, 1, 2, 4, 5, 6]].isfinite().all())


@pytest.mark.parametrize("onednn", [True, False])
def test_autocast_does_not_lower_the_precision(monkeypatch, onednn):
    monkeypatch.setattr(vocabulary_walk, "_ONEDNN", onednn and vocabulary_walk._ONEDNN)
    hidden, weight, bias, ids, present = make(7, 97, 9, torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=40, softcap=3.0)
            grads = torch.autograd.grad(out, leaves, upstream(*(x.shape for x in out)))
        results.append([*out, *grads])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_ways_to_multiply_agree(monkeypatch, dtype):
    """Where there is no oneDNN, torch.mm does it all, in float32."""
    monkeypatch.setattr(vocabulary_walk, "_ONEDNN", False)
    monkeypatch.setattr(vocabulary_walk, "_CPU_BFLOAT16", False)
    check_against_oracle(make(33, 97, 9, dtype), HEADS["everything"], 40)


class _LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest storage that an operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_as_large_as_the_logits_or_a_widened_head_is_ever_made(dtype):
    t, v, d = 64, 4000, 32
    hidden, weight, bias, ids, present = make(t, v, 8, dtype, dim=d)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with _LargestTensor() as largest:
        out = support_logprobs(hidden, weight, ids, present=present, bias=bias, slice_size=200, softcap=9.0, scale=0.5)
        torch.autograd.grad(out, leaves, upstream(*(x.shape for x in out)))
    d_weight = v * d * weight.element_size()
    assert d_weight <= largest.bytes < v * min(t, 2 * d) * 4
    assert largest.bytes == max(d_weight, t * 200 * 4)  # a tile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 5)}, r"hidden must be \[T, d\], got \(2, 3, 5\)"),
        ({"hidden": torch.zeros(7, 5).long()}, "hidden must be of a floating-point dtype, got torch.int64"),
        ({"weight": torch.zeros(97, 6)}, r"weight must be \[V, 5\] with V > 0, got \(97, 6\)"),
        ({"weight": torch.zeros(0, 5)}, r"weight must be \[V, 5\] with V > 0, got \(0, 5\)"),
        ({"ids": torch.zeros(6, 9).long()}, r"ids must be int64 \[7, K\], got torch.int64 \(6, 9\)"),
        ({"ids": torch.zeros(7, 9).int()}, r"ids must be int64 \[7, K\], got torch.int32"),
        ({"ids": torch.full((7, 9), 97)}, r"ids must lie in 0..96 \(the rows of weight\), got 97..97"),
        ({"ids": torch.full((7, 9), -1)}, "ids must lie in 0..96"),
        ({"ids": torch.full((7, 9), 4)}, "ids: row 0 holds id 4 twice; set present=False at one of them"),
        ({"bias": torch.zeros(96)}, r"bias must be \[97\], got \(96,\)"),
        ({"present": torch.ones(7, 8, dtype=torch.bool)}, r"present must be bool \(7, 9\), got torch.bool \(7, 8\)"),
        ({"present": torch.ones(7, 9)}, "present must be bool"),
        ({"softcap": 0.0}, "softcap must be positive and finite, got 0.0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"slice_size": 0}, "slice_size must be at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    hidden, weight, bias, _, _ = make(7, 97, 9)
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "ids": torch.arange(9).expand(7, 9), **change}
    arguments["present"] = change.get("present", torch.ones(arguments["ids"].shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        support_logprobs(**arguments)
