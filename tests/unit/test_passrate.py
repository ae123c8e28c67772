"""Pass rates, PACED weights, pass@k and the bootstrap, against oracles written another way."""

import itertools
import json
import math

import numpy as np
import pytest

from student_trainer.passrate import PassRates, bootstrap_interval, paced_weights, pass_at_k

RATES = [0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0]


def _says(error: pytest.ExceptionInfo, *parts: str) -> None:
    for part in (*parts, "Fix:"):
        assert part in str(error.value), f"{part!r} is not in: {error.value}"


def test_the_first_observation_counts_in_full_and_later_ones_by_the_decay():
    rates = PassRates(decay=0.75)
    rates.update("a", 1, 4)
    assert rates.rate("a") == 0.25
    rates.update("a", 8, 8)
    rates.update("a", 0, 2)
    assert rates.rate("a") == pytest.approx(0.75 * (0.75 * 0.25 + 0.25 * 1.0) + 0.25 * 0.0, abs=1e-15)


def test_without_decay_only_the_last_observation_counts():
    rates = PassRates(decay=0)
    rates.update("a", 1, 4)
    rates.update("a", 3, 4)
    assert rates.rate("a") == 0.75


def test_a_prompt_that_was_not_drawn_has_no_rate_and_one_that_failed_has_zero():
    rates = PassRates()
    rates.update("a", 0, 4)
    assert rates.rate("a") == 0.0
    assert rates.rate("b") is None


@pytest.mark.parametrize(("passes", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_an_impossible_count_is_a_bug_of_the_caller(passes, total):
    with pytest.raises(AssertionError):
        PassRates().update("a", passes, total)


def test_a_state_restored_through_json_goes_on_as_if_nothing_had_happened():
    first, second = PassRates(0.5), PassRates(0.5)
    first.update("a", 1, 3)
    second.load_state(json.loads(json.dumps(first.state())))
    saved = first.state()
    for rates in (first, second):
        rates.update("a", 3, 3)
        rates.update("b", 1, 3)
    assert first.state() == second.state()
    assert saved["rates"] == {"a": 1 / 3}  # a copy, not a view


def test_a_state_of_another_decay_is_refused():
    with pytest.raises(ValueError) as error:
        PassRates(0.5).load_state(PassRates(0.25).state())
    _says(error, "decay", "0.5", "0.25")


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError) as error:
        PassRates(decay)
    _says(error, "decay", str(decay), "[0, 1)")


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (2, 1), (0.5, 3), (1, 0), (0, 2), (0, 0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 2.0])
def test_paced_weights_are_the_kernel_at_every_rate(alpha, beta, smoothing):
    weights = paced_weights(RATES, alpha=alpha, beta=beta, smoothing=smoothing, samples=8, normalise="none")
    for weight, rate in zip(weights, RATES, strict=True):
        p = (rate * 8 + smoothing) / (8 + 2 * smoothing)
        assert weight == pytest.approx(math.pow(p, alpha) * math.pow(1 - p, beta), abs=1e-15)


def test_prompts_that_are_always_or_never_solved_weigh_nothing_unless_smoothed():
    assert paced_weights(RATES)[[0, -1]].tolist() == [0.0, 0.0]
    assert (paced_weights(RATES, smoothing=0.5, samples=8) > 0).all()


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (2, 1), (0.5, 3)])
def test_mean_normalisation_averages_one_over_the_prompts_with_weight_and_keeps_ratios(alpha, beta):
    weights = paced_weights(RATES, alpha=alpha, beta=beta)
    bare = paced_weights(RATES, alpha=alpha, beta=beta, normalise="none")
    assert weights[1:-1].mean() == pytest.approx(1.0, abs=1e-12)
    assert np.allclose(weights * bare.sum(), bare * weights.sum(), atol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (2, 1), (0.5, 3), (1, 0), (0, 2), (0, 0)])
def test_max_normalisation_puts_the_peak_of_the_kernel_at_one(alpha, beta):
    grid = np.linspace(0, 1, 100_001)
    weights = paced_weights(grid, alpha=alpha, beta=beta, normalise="max")
    assert weights.max() == pytest.approx(1.0, abs=1e-8)


def test_max_normalisation_of_the_default_kernel_is_four_p_one_minus_p():
    p = np.array(RATES)
    assert paced_weights(RATES, normalise="max") == pytest.approx(4 * p * (1 - p), abs=1e-15)


@pytest.mark.parametrize("normalise", ["mean", "max", "none"])
def test_weights_that_are_all_zero_stay_zero_and_no_prompts_give_no_weights(normalise):
    assert paced_weights([0.0, 1.0, 1.0], normalise=normalise).tolist() == [0.0, 0.0, 0.0]
    assert paced_weights([], normalise=normalise).tolist() == []


@pytest.mark.parametrize(
    ("rates", "fields", "parts"),
    [
        ([0.5, 1.1], {}, ["rates", "1.1", "[0, 1]"]),
        ([0.5, -0.1], {}, ["rates", "-0.1"]),
        ([0.5, math.nan], {}, ["rates", "nan"]),
        ([0.5, None], {}, ["rates", "None"]),
        ([[0.5]], {}, ["rates", "[[0.5]]"]),
        ([0.5], {"alpha": -1}, ["alpha", "-1"]),
        ([0.5], {"beta": -2}, ["beta", "-2"]),
        ([0.5], {"smoothing": -0.5}, ["smoothing", "-0.5"]),
        ([0.5], {"smoothing": 0.5}, ["samples", "None"]),
        ([0.5], {"smoothing": 0.5, "samples": 0}, ["samples", "0"]),
        ([0.5], {"normalise": "sum"}, ["normalise", "'sum'", "mean, max or none"]),
    ],
)
def test_a_wrong_argument_of_the_weights_is_named(rates, fields, parts):
    with pytest.raises(ValueError) as error:
        paced_weights(rates, **fields)
    _says(error, *parts)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_holds_for_many_samples():
    exact = 1 - math.comb(9_990, 100) / math.comb(10_000, 100)
    assert pass_at_k(10_000, 10, 100) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((4, 5, 1), ["num_correct", "5", "4"]),
        ((4, -1, 1), ["num_correct", "-1"]),
        ((4, 2, 5), ["k: 5", "4 samples"]),
        ((4, 2, 0), ["k: 0"]),
    ],
)
def test_a_wrong_argument_of_pass_at_k_is_named(arguments, parts):
    with pytest.raises(ValueError) as error:
        pass_at_k(*arguments)
    _says(error, *parts)


@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959964), (0.8, 1.281552)])
def test_the_bootstrap_interval_of_many_values_is_the_normal_one(confidence, z):
    values = np.random.default_rng(1).uniform(size=2_000)
    low, high = bootstrap_interval(values, confidence=confidence, resamples=4_000)
    half = z * values.std() / math.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(300):
        low, high = bootstrap_interval(rng.binomial(8, 0.4, size=60) / 8, confidence=0.9, resamples=300, seed=trial)
        hits += low <= 0.4 <= high
    assert 0.84 < hits / 300 < 0.95  # 0.9, with three standard errors of 300 trials and the bootstrap's own bias


def test_the_bootstrap_interval_depends_on_its_seed_only():
    values = [0.0, 0.5, 1.0, 1.0]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    wide = np.random.default_rng(0).uniform(size=50)
    assert bootstrap_interval(wide, seed=3) != bootstrap_interval(wide, seed=4)


def test_the_bootstrap_interval_of_equal_values_is_that_value():
    assert bootstrap_interval([0.25]) == bootstrap_interval([0.25] * 9) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (([],), ["values", "[]"]),
        (([0.5, math.nan],), ["values", "nan"]),
        (([[0.5]],), ["values", "[[0.5]]"]),
        (([0.5], 1.0), ["confidence", "1.0"]),
        (([0.5], 0.95, 0), ["resamples", "0"]),
    ],
)
def test_a_wrong_argument_of_the_bootstrap_is_named(arguments, parts):
    with pytest.raises(ValueError) as error:
        bootstrap_interval(*arguments)
    _says(error, *parts)
