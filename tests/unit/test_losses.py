"""The divergences against float64 NumPy over whole vocabularies, and the properties that they must have."""

import math

import numpy as np
import pytest
import torch

from student_trainer import losses
from student_trainer.logprobs import support_logprobs
from tests import oracles

DIVERGENCES = {
    "forward_kl": (losses.forward_kl, {}),
    "reverse_kl": (losses.reverse_kl, {}),
    "js": (losses.js, {}),
    "js_0.1": (losses.js, {"beta": 0.1}),
    "js_0.9": (losses.js, {"beta": 0.9}),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


def distributions(rows, vocab, seed=0, spread=2.0):
    """Student and teacher, [rows, vocab] probabilities that differ a good deal."""
    rng = np.random.default_rng(seed)
    return tuple(oracles.softmax(spread * rng.standard_normal((rows, vocab))) for _ in range(2))


def supports(rows, vocab, width, seed=1):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(vocab)[:width] for _ in range(rows)])


def measured(p, ids, dtype=torch.float64):
    """logprobs [rows, K] and log tail [rows] of full distributions p [rows, V]."""
    logprobs, _, log_tail = oracles.scores(np.log(p), ids)
    return torch.tensor(logprobs, dtype=dtype), torch.tensor(log_tail, dtype=dtype)


def arguments(student, teacher, ids, dtype=torch.float64):
    s, s_tail = measured(student, ids, dtype)
    t, t_tail = measured(teacher, ids, dtype)
    return s.requires_grad_(), t, s_tail.requires_grad_(), t_tail


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 3, 1), (1, 3, 3), (7, 97, 5), (33, 97, 97), (7, 1000, 64)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_equal_the_oracle(name, rows, vocab, width, dtype):
    function, options = DIVERGENCES[name]
    student, teacher = distributions(rows, vocab)
    ids = supports(rows, vocab, width)
    inputs = arguments(student, teacher, ids, dtype)
    value = function(*inputs, **options)
    s, t = oracles.buckets(student, ids), oracles.buckets(teacher, ids)
    expected = oracles.divergence(name.split("_0")[0], s, t, **options)
    assert value.dtype == dtype
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    grads = torch.autograd.grad(value.sum(), (inputs[0], inputs[2]))
    inside = slice(None) if width == vocab else slice(0, width + 1)
    used = s if width < vocab else s[:, :width]
    wanted = oracles.divergence_gradient(name.split("_0")[0], used, t if width < vocab else t[:, :width], **options)
    got = torch.cat([grads[0], grads[1][:, None]], 1).numpy()
    np.testing.assert_allclose(got[:, : wanted.shape[1]], wanted[:, inside], rtol=0, atol=TOLERANCE[dtype])
    if width == vocab:
        assert (grads[1] == 0).all()  # an empty tail on both sides is absent


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_reaches_the_model_through_the_walk(name):
    """hidden and weight of the student, float32, against d divergence / d logits in closed form."""
    function, options = DIVERGENCES[name]
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(7, 5, generator=g).requires_grad_(), torch.randn(97, 5, generator=g).requires_grad_()
    _, teacher = distributions(7, 97)
    ids = supports(7, 97, 11)
    t, t_tail = measured(teacher, ids, torch.float32)
    support = support_logprobs(hidden, weight, torch.tensor(ids), temperature=1.3, slice_size=40)
    value = function(support.logprobs, t, support.log_tail, t_tail, **options)
    grads = torch.autograd.grad(value.sum(), (hidden, weight))

    h, w = hidden.detach().double().numpy(), weight.detach().double().numpy()
    p = oracles.softmax(oracles.logits(h, w, temperature=1.3))
    s_buckets, t_buckets = oracles.buckets(p, ids), oracles.buckets(teacher, ids)
    by_bucket = oracles.divergence_gradient(name.split("_0")[0], s_buckets, t_buckets, **options)
    dz = np.zeros_like(p)
    for row in range(7):
        per_mass = by_bucket[row] / s_buckets[row]  # d / d probability of the bucket
        of_token = np.full(97, per_mass[-1])
        of_token[ids[row]] = per_mass[:-1]
        dz[row] = p[row] * (of_token - (p[row] * of_token).sum())
    for actual, wanted in zip(grads, oracles.head_gradients(dz, h, w, temperature=1.3), strict=False):
        np.testing.assert_allclose(actual.numpy(), wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name):
    function, options = DIVERGENCES[name]
    s, t, s_tail, t_tail = arguments(*distributions(3, 11), supports(3, 11, 4))
    assert torch.autograd.gradcheck(lambda a, b: function(a, t, b, t_tail, **options), (s, s_tail))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_truncation_never_raises_a_divergence_and_the_whole_vocabulary_gives_all_of_it(name):
    """Data processing, on 1,500 pairs of distributions; the supports are the teacher's top k."""
    function, options = DIVERGENCES[name]
    for seed, spread in enumerate((0.3, 1.0, 4.0)):
        student, teacher = distributions(500, 40, seed=seed, spread=spread)
        whole = function(*arguments(student, teacher, np.tile(np.arange(40), (500, 1))), **options)
        np.testing.assert_allclose(
            whole.detach(), oracles.divergence(name.split("_0")[0], student, teacher, **options), rtol=1e-9
        )
        for width in (1, 5, 39):
            ids = np.argsort(-teacher, 1)[:, :width]
            part = function(*arguments(student, teacher, ids), **options)
            assert bool((part <= whole + 1e-12).all()) and bool((part >= -1e-12).all())
            assert bool((part < whole - 1e-6).any()) or width == 39


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_distributions_have_divergence_zero_and_no_gradient(name):
    function, options = DIVERGENCES[name]
    student, _ = distributions(7, 97)
    inputs = arguments(student, student, supports(7, 97, 9), torch.float32)
    value = function(*inputs, **options)
    np.testing.assert_allclose(value.detach(), 0.0, atol=1e-7)
    d_s, d_tail = torch.autograd.grad(value.sum(), (inputs[0], inputs[2]))
    # the same number for every unit of mass, which the softmax takes out
    per_mass = torch.cat([d_s, d_tail[:, None]], 1) / torch.cat([inputs[0], inputs[2][:, None]], 1).exp()
    np.testing.assert_allclose(per_mass.detach(), per_mass[0, 0].detach(), atol=1e-5)


def test_js_at_one_half_is_symmetric_and_below_log_2():
    student, teacher = distributions(50, 97, spread=6.0)
    s, t, s_tail, t_tail = arguments(student, teacher, supports(50, 97, 20))
    one, other = losses.js(s, t, s_tail, t_tail), losses.js(t, s, t_tail, s_tail)
    torch.testing.assert_close(one, other)
    assert bool((one <= math.log(2)).all()) and bool((one > 0.1).any())


def test_js_mirrors_when_sides_and_beta_are_swapped():
    s, t, s_tail, t_tail = arguments(*distributions(7, 97), supports(7, 97, 20))
    torch.testing.assert_close(losses.js(s, t, s_tail, t_tail, 0.2), losses.js(t, s, t_tail, s_tail, 0.8))


def test_js_at_the_ends_of_beta_is_the_two_kl():
    inputs = arguments(*distributions(7, 97), supports(7, 97, 9))
    torch.testing.assert_close(losses.js(*inputs, beta=0.0), losses.forward_kl(*inputs), rtol=0, atol=0)
    torch.testing.assert_close(losses.js(*inputs, beta=1.0), losses.reverse_kl(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_js_refuses_a_beta_that_is_no_mixture(beta):
    with pytest.raises(ValueError, match=r"beta must be in 0\.\.1"):
        losses.js(*arguments(*distributions(7, 97), supports(7, 97, 9)), beta=beta)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_absent_entries_are_as_if_dropped(name):
    """-inf on both sides, wherever they stand, and no gradient for them."""
    function, options = DIVERGENCES[name]
    s, t, s_tail, t_tail = arguments(*distributions(7, 97), supports(7, 97, 9))
    gone = torch.full((7, 2), -math.inf, dtype=torch.float64)
    wide = torch.cat([gone[:, :1], s.detach(), gone[:, 1:]], 1).requires_grad_()
    masked = function(wide, torch.cat([gone[:, :1], t, gone[:, 1:]], 1), s_tail, t_tail, **options)
    dropped = function(s, t, s_tail, t_tail, **options)
    torch.testing.assert_close(masked, dropped)
    with_gone, tail = torch.autograd.grad(masked.sum(), (wide, s_tail))
    without, tail_without = torch.autograd.grad(dropped.sum(), (s, s_tail))
    torch.testing.assert_close(with_gone[:, 1:-1], without)
    torch.testing.assert_close(tail, tail_without)
    assert bool((with_gone[:, [0, -1]] == 0).all())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_absent_entries_stay_absent_through_the_walk(name):
    function, options = DIVERGENCES[name]
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(4, 5, generator=g).requires_grad_(), torch.randn(31, 5, generator=g)
    ids = torch.tensor([[3, 1, 3], [4, 5, 6], [7, 7, 8], [9, 10, 11]])
    present = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1]]).bool()
    s = support_logprobs(hidden, weight, ids, present=present)
    t, _, t_tail = (torch.tensor(x).float() for x in oracles.scores(np.log(distributions(4, 31)[1]), ids, present))
    value = function(s.logprobs, t, s.log_tail, t_tail, **options)
    (grad,) = torch.autograd.grad(value.sum(), hidden)
    assert bool(value.isfinite().all()) and bool(grad.isfinite().all())
    first = slice(0, 2)  # row 0 without its duplicate, by hand
    alone = support_logprobs(hidden[:1], weight, ids[:1, first])
    expected = function(alone.logprobs, t[:1, first], alone.log_tail, t_tail[:1], **options)
    torch.testing.assert_close(value[:1], expected)
    torch.testing.assert_close(grad[:1], torch.autograd.grad(expected.sum(), hidden)[0][:1])


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("log_tail", [-16.0, -23.0, -60.0])
def test_a_tiny_teacher_tail_counts_at_full_precision(name, log_tail):
    """The student keeps 10% in its tail, the teacher 1e-7 and less: log(1 - sum) would lose up to 0.69 nats here."""
    function, options = DIVERGENCES[name]
    teacher = np.array([[math.log(0.7), math.log(0.3), log_tail]])
    student = np.log(np.array([[0.5, 0.4, 0.1]]))
    s, t = (torch.tensor(x[:, :2], dtype=torch.float32) for x in (student, teacher))
    s_tail, t_tail = (torch.tensor(x[:, 2], dtype=torch.float32) for x in (student, teacher))
    expected = oracles.divergence(name.split("_0")[0], np.exp(student), np.exp(teacher), **options)
    np.testing.assert_allclose(function(s, t, s_tail, t_tail, **options), expected, rtol=1e-6)
    # the tail's own term, which a total dominated by the head would hide
    head = function(s, t, torch.full((1,), -math.inf), torch.full((1,), -math.inf), **options)
    tail = function(torch.full_like(s, -math.inf), torch.full_like(t, -math.inf), s_tail, t_tail, **options)
    own = oracles.divergence(name.split("_0")[0], np.exp(student[:, 2:]), np.exp(teacher[:, 2:]), **options)
    np.testing.assert_allclose(tail, own, rtol=1e-6)
    np.testing.assert_allclose(head + tail, expected, rtol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_two_tiny_tails_are_compared_at_full_precision(name):
    function, options = DIVERGENCES[name]
    gone = torch.full((1, 2), -math.inf)
    s_tail, t_tail = torch.tensor([-23.0]), torch.tensor([-25.0])
    got = function(gone, gone, s_tail, t_tail, **options)
    own = oracles.divergence(name.split("_0")[0], np.exp([[-23.0]]), np.exp([[-25.0]]), **options)
    np.testing.assert_allclose(got, own, rtol=1e-5)


def test_what_only_one_side_excludes():
    """p = 0 is worth 0 with zero gradient; a zero in front of it is +inf and stays so. JS is finite both ways."""
    half = math.log(0.5)
    none = torch.full((1,), -math.inf)

    def run(function, student, teacher):
        s = torch.tensor([student]).requires_grad_()
        value = function(s, torch.tensor([teacher]), none, none)
        return value.item(), torch.autograd.grad(value.sum(), s)[0][0]

    wide, narrow = [half, half], [0.0, -math.inf]
    value, grad = run(losses.forward_kl, wide, narrow)
    assert value == pytest.approx(math.log(2)) and grad.tolist() == [-1.0, 0.0]
    value, grad = run(losses.forward_kl, narrow, wide)
    assert value == math.inf and grad.tolist() == [-0.5, -0.5]
    value, grad = run(losses.reverse_kl, narrow, wide)
    assert value == pytest.approx(math.log(2)) and grad[1] == 0 and grad[0] == pytest.approx(1 + math.log(2))
    value, _ = run(losses.reverse_kl, wide, narrow)
    assert value == math.inf
    expected = oracles.divergence("js", np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]]))[0]
    for student, teacher in ((wide, narrow), (narrow, wide)):
        value, grad = run(losses.js, student, teacher)
        assert value == pytest.approx(expected) and bool(grad.isfinite().all())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_teacher_receives_no_gradient(name):
    function, options = DIVERGENCES[name]
    s, t, s_tail, t_tail = arguments(*distributions(7, 97), supports(7, 97, 9))
    t.requires_grad_(), t_tail.requires_grad_()
    function(s, t, s_tail, t_tail, **options).sum().backward()
    assert t.grad is None and t_tail.grad is None and s.grad is not None


@pytest.mark.parametrize("name", DIVERGENCES)
def test_any_leading_shape_is_kept(name):
    function, options = DIVERGENCES[name]
    flat = arguments(*distributions(6, 97), supports(6, 97, 9))
    expected = function(*flat, **options)
    folded = (flat[0].view(2, 3, 9), flat[1].view(2, 3, 9), flat[2].view(2, 3), flat[3].view(2, 3))
    torch.testing.assert_close(function(*folded, **options), expected.view(2, 3))
    torch.testing.assert_close(function(*(x[0] for x in flat), **options), expected[0])
    assert function(*(x[:0] for x in flat), **options).shape == (0,)


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        (0, torch.zeros(7, 9).bfloat16(), "student_logprobs must be float32 or float64, got torch.bfloat16"),
        (0, torch.zeros(()), r"student_logprobs must be \[\.\.\., K\], got a scalar"),
        (1, torch.zeros(7, 1), r"teacher_logprobs must be \(7, 9\) to match student_logprobs, got \(7, 1\)"),
        (2, torch.zeros(7, 1), r"student_log_tail must be \(7,\) to match student_logprobs, got \(7, 1\)"),
        (3, torch.zeros(1), r"teacher_log_tail must be \(7,\) to match student_logprobs, got \(1,\)"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(place, tensor, message):
    inputs = [torch.zeros(7, 9), torch.zeros(7, 9), torch.zeros(7), torch.zeros(7)]
    inputs[place] = tensor
    for function in (losses.forward_kl, losses.reverse_kl, losses.js, losses.sinkhorn):
        with pytest.raises(ValueError, match=message):
            function(*inputs)


# Sinkhorn


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 3, 1), (7, 97, 5), (33, 97, 97)])
def test_sinkhorn_equals_the_oracle_without_logarithms(rows, vocab, width, dtype):
    student, teacher = distributions(rows, vocab)
    ids = np.tile(supports(1, vocab, width), (rows, 1))  # common to all rows
    value = losses.sinkhorn(*arguments(student, teacher, ids, dtype))
    expected, _ = oracles.sinkhorn(oracles.buckets(student, ids), oracles.buckets(teacher, ids), 0.1, 20)
    np.testing.assert_allclose(value.detach(), expected, rtol=0, atol=20 * TOLERANCE[dtype])


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 1), (0.5, 3), (2.0, 50)])
def test_sinkhorn_takes_epsilon_and_iterations(epsilon, iterations):
    student, teacher = distributions(7, 97)
    ids = np.tile(np.arange(97), (7, 1))
    value = losses.sinkhorn(*arguments(student, teacher, ids), epsilon=epsilon, iterations=iterations)
    expected, _ = oracles.sinkhorn(student, teacher, epsilon, iterations)
    np.testing.assert_allclose(value.detach(), expected, rtol=1e-10)


def test_sinkhorn_with_ids_of_the_whole_vocabulary_is_the_full_distance_in_any_order():
    student, teacher = distributions(7, 97)
    ids = supports(7, 97, 97)  # another order in every row
    value = losses.sinkhorn(*arguments(student, teacher, ids), ids=torch.tensor(ids))
    expected, _ = oracles.sinkhorn(student, teacher, 0.1, 20)
    np.testing.assert_allclose(value.detach(), expected, rtol=1e-10)


def test_sinkhorn_with_ids_puts_unreported_mass_into_the_tail():
    student, teacher = distributions(7, 97)
    ids = supports(7, 97, 9)
    union = np.unique(ids)

    def spread(p):
        out = np.zeros((7, len(union) + 1))
        for row, own in enumerate(ids):
            for column, token in enumerate(union):
                if token in own:
                    out[row, column] = p[row, token]
            out[row, -1] = 1 - out[row].sum()
        return out

    expected, _ = oracles.sinkhorn(spread(student), spread(teacher), 0.1, 20)
    inputs = arguments(student, teacher, ids)
    value = losses.sinkhorn(*inputs, ids=torch.tensor(ids))
    np.testing.assert_allclose(value.detach(), expected, rtol=1e-9)
    folded = [x.view(1, 7, *x.shape[1:]) for x in inputs]
    torch.testing.assert_close(losses.sinkhorn(*folded, ids=torch.tensor(ids)[None]), value[None])


def test_sinkhorn_ignores_absent_entries_whatever_their_id():
    s, t, s_tail, t_tail = arguments(*distributions(7, 97), supports(7, 97, 9))
    ids = torch.tensor(supports(7, 97, 9))
    gone = torch.full((7, 1), -math.inf, dtype=torch.float64)
    wide = torch.cat([s.detach(), gone], 1).requires_grad_()
    for filler in (-1, 5):
        masked = losses.sinkhorn(
            wide, torch.cat([t, gone], 1), s_tail, t_tail, ids=torch.cat([ids, torch.full((7, 1), filler)], 1)
        )
        torch.testing.assert_close(masked, losses.sinkhorn(s, t, s_tail, t_tail, ids=ids))
        (grad,) = torch.autograd.grad(masked.sum(), wide)
        assert bool(grad.isfinite().all()) and bool((grad[:, -1] == 0).all())


def test_the_columns_of_the_plan_sum_to_one_and_its_rows_nearly():
    student, teacher = distributions(33, 97)
    cost = torch.cdist(torch.tensor(student), torch.tensor(teacher), p=1)
    plan = losses._log_plan(cost, 0.1, 200).exp()
    np.testing.assert_allclose(plan.sum(0), 1.0, atol=1e-12)
    np.testing.assert_allclose(plan.sum(1), 1.0, atol=1e-3)
    np.testing.assert_allclose(losses._log_plan(cost, 0.1, 20).exp().sum(0), 1.0, atol=1e-12)
    np.testing.assert_allclose(
        losses._log_plan(cost, 0.1, 20).exp(), oracles.sinkhorn(student, teacher, 0.1, 20)[1], atol=1e-12
    )


@pytest.mark.parametrize("with_ids", [False, True])
def test_the_gradient_of_sinkhorn_is_that_of_finite_differences(with_ids):
    """Through the cost and through the iterations."""
    ids = supports(5, 31, 4)
    s, t, s_tail, t_tail = arguments(*distributions(5, 31), ids)
    options = {"ids": torch.tensor(ids)} if with_ids else {}
    assert torch.autograd.gradcheck(lambda a, b: losses.sinkhorn(a, t, b, t_tail, **options), (s, s_tail))


def test_sinkhorn_detaches_the_teacher_and_survives_identical_rows():
    student, _ = distributions(4, 31)
    s, t, s_tail, t_tail = arguments(student, student, supports(4, 31, 4), torch.float32)
    t.requires_grad_(), t_tail.requires_grad_()
    value = losses.sinkhorn(s, t, s_tail, t_tail)
    value.sum().backward()
    assert t.grad is None and t_tail.grad is None
    assert bool(s.grad.isfinite().all()) and bool(s_tail.grad.isfinite().all())


def test_sinkhorn_of_no_rows_is_empty():
    empty = torch.zeros(0, 3, requires_grad=True)
    value = losses.sinkhorn(empty, torch.zeros(0, 3), torch.zeros(0), torch.zeros(0), ids=torch.zeros(0, 3).long())
    assert value.shape == (0,)
    assert torch.autograd.grad(value.sum(), empty)[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"ids": torch.zeros(7, 8).long()}, r"ids must be int64 \(7, 9\), got torch.int64 \(7, 8\)"),
        ({"ids": torch.zeros(7, 9).int()}, "ids must be int64"),
    ],
)
def test_sinkhorn_names_a_wrong_option(options, message):
    with pytest.raises(ValueError, match=message):
        losses.sinkhorn(torch.zeros(7, 9), torch.zeros(7, 9), torch.zeros(7), torch.zeros(7), **options)
