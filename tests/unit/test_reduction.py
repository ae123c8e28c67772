"""One batch is four micro-batches is two ranks."""

import numpy as np
import pytest
import torch

from student_trainer.reduction import token_weights

REDUCTIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"]


def sequences(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, 13)
    lengths[3] = 0
    return lengths, [rng.standard_normal(n) for n in lengths]


def loop(reduction, losses, max_tokens):
    """As the papers write them."""
    if reduction == "token_mean":
        return sum(x.sum() for x in losses) / sum(len(x) for x in losses)
    if reduction == "seq_mean_token_mean":
        return sum(x.mean() for x in losses if len(x)) / len(losses)
    return sum(x.sum() / max_tokens for x in losses) / len(losses)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_weighted_sum_is_the_published_mean(reduction):
    lengths, losses = sequences()
    weights = token_weights(
        torch.tensor(lengths), reduction, max_tokens=16, global_tokens=lengths.sum(), global_sequences=13
    )
    assert weights.shape == (lengths.sum(),) and weights.dtype == torch.float32
    got = (weights.double().numpy() * np.concatenate(losses)).sum()
    assert got == pytest.approx(loop(reduction, losses, 16), rel=1e-6)


@pytest.mark.parametrize("splits", [[13], [3, 6, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [4, 4]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_have_the_weights_of_the_whole_batch_bit_for_bit(reduction, splits):
    lengths, _ = sequences()
    counts = {"max_tokens": 16, "global_tokens": int(lengths.sum()), "global_sequences": 13}
    whole = token_weights(torch.tensor(lengths), reduction, **counts)
    parts = [token_weights(torch.tensor(part), reduction, **counts) for part in np.split(lengths, splits)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_micro_batches_add_up_to_the_gradient_of_the_batch(reduction):
    lengths, losses = sequences()
    counts = {"max_tokens": 16, "global_tokens": int(lengths.sum()), "global_sequences": 13}
    features = torch.tensor(np.concatenate(losses))

    def gradient(rows, own_lengths):
        parameter = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        per_token = torch.tanh(parameter * features[rows])
        (token_weights(torch.tensor(own_lengths), reduction, **counts) * per_token).sum().backward()
        return parameter.grad

    edges = np.concatenate([[0], np.cumsum(lengths)])
    parts = [gradient(slice(edges[i], edges[j]), lengths[i:j]) for i, j in ((0, 3), (3, 4), (4, 9), (9, 13))]
    torch.testing.assert_close(sum(parts), gradient(slice(None), lengths), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens_have_no_weights(reduction, lengths):
    lengths = torch.tensor(lengths, dtype=torch.int64)
    got = token_weights(lengths, reduction, max_tokens=4, global_tokens=0, global_sequences=len(lengths))
    assert got.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_tokens": 4}, "global_tokens is 4 but this micro-batch alone has 5: pass the global count"),
        ({"global_sequences": 1}, "global_sequences is 1 but this micro-batch alone has 2"),
        ({"max_tokens": 2}, "max_tokens is 2 but this micro-batch alone has 3"),
        ({"reduction": "mean"}, "reduction must be one of token_mean, seq_mean_token_mean, .*, got 'mean'"),
        ({"lengths": torch.tensor([2.0, 3.0])}, r"lengths must be \[B\] of an integer dtype, got torch.float32"),
        ({"lengths": torch.tensor([[2, 3]])}, r"lengths must be \[B\] of an integer dtype, got torch.int64 \(1, 2\)"),
    ],
)
def test_counts_that_cannot_be_global_are_refused(change, message):
    arguments = {
        "lengths": torch.tensor([2, 3]),
        "reduction": "token_mean",
        "max_tokens": 3,
        "global_tokens": 5,
        "global_sequences": 2,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        token_weights(**arguments)
