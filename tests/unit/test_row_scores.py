"""Scores of rows of logits: exact at every size, temperature and depth, sliced or not, sharded or not."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_head import LMHead
from teacher_server.row_scores import RowScores, Shard, score_logits, score_rows
from tests.models import scores_of_logits

NO_CANDIDATES = torch.zeros((0, 0), dtype=torch.int64)


def draw(rows: int, columns: int, m: int, *, spread: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """float32 logits [rows, columns], targets [rows] and candidates [rows, m]."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, columns, generator=generator) * spread + 5
    targets = torch.randint(0, columns, (rows,), generator=generator)
    return z, targets, torch.randint(0, columns, (rows, m), generator=generator)


def reference(
    z: Tensor, targets: Tensor, k: int, candidates: Tensor, temperature: float = 1.0
) -> dict[str, np.ndarray]:
    return scores_of_logits(
        z.double().numpy(), targets.numpy(), top_k=k, candidate_ids=candidates.numpy(), temperature=temperature
    )


def assert_scores(rows: RowScores, expected: dict[str, np.ndarray], atol: float = 2e-5) -> None:
    found = rows.numpy()
    assert found["top_ids"].dtype == np.int32
    for name, want in expected.items():
        if name == "top_ids":
            # Equal logits may change places, so what is compared is what the ids point at, below.
            assert all(len(set(row)) == len(row) for row in found[name].tolist())
        else:
            assert found[name].dtype == np.float32, name
            np.testing.assert_allclose(found[name], want, atol=atol, rtol=1e-6, err_msg=name)


COLUMNS = [1, 2, 63, 64, 65, 97, 1000, 4096, 5003]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("k", [0, 1, 7, 64, 5003])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_every_size_matches_the_float64_reference(columns: int, k: int, m: int) -> None:
    k = min(k, columns)
    z, targets, candidates = draw(9, columns, m, seed=columns + k + m)
    rows = score_logits(z.clone(), targets, k, candidates)
    assert_scores(rows, reference(z, targets, k, candidates))
    picked = z.gather(1, rows.top_ids.long()) - rows.log_normalizer[:, None]
    torch.testing.assert_close(picked, rows.top_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 20])
@pytest.mark.parametrize("columns", [100, 6400, 6410])
def test_ties_are_broken_somehow_but_never_counted_twice(columns: int, k: int) -> None:
    z = torch.zeros(3, columns)
    z[1, columns // 2 :] = 1.0
    z[2, -k:] = 4.0
    targets = torch.zeros(3, dtype=torch.int64)
    candidates = torch.tensor([[0, 0, columns - 1]] * 3)  # with a repetition
    rows = score_logits(z.clone(), targets, k, candidates)
    assert_scores(rows, {**reference(z, targets, k, candidates), "log_support_tail": rows.log_support_tail.numpy()})
    support = [set(ids) | {0, columns - 1} for ids in rows.top_ids.tolist()]
    for row, ids in enumerate(support):
        rest = np.delete(z[row].double().numpy(), sorted(ids))
        expected = np.logaddexp.reduce(rest) - np.logaddexp.reduce(z[row].double().numpy())
        assert abs(float(rows.log_support_tail[row]) - expected) <= 1e-5


@pytest.mark.parametrize("columns", [1000, 8200])
@pytest.mark.parametrize("gap", [30.0, 80.0, 200.0, 5000.0])
def test_a_tail_is_exact_however_deep_it_lies(columns: int, gap: float) -> None:
    z, targets, candidates = draw(4, columns, 2)
    z -= gap
    z[:, 7:10] = torch.tensor([2.0, 1.0, 0.0])
    z[3] += gap  # one row of four is ordinary
    rows = score_logits(z.clone(), targets, 3, candidates)
    expected = reference(z, targets, 3, candidates)
    assert expected["log_tail"][0] < -gap + 20
    assert_scores(rows, expected, atol=1e-4)


@pytest.mark.parametrize("columns", [5, 300, 7000])
def test_logits_of_minus_infinity_are_probability_zero(columns: int) -> None:
    z, targets, _ = draw(4, columns, 0)
    z[:, 1::2] = -torch.inf
    targets[0] = 1
    candidates = torch.tensor([[0, 1, columns - 1]] * 4)
    k = min(4, columns)
    assert_scores(score_logits(z.clone(), targets, k, candidates), reference(z, targets, k, candidates))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [50, 7000])
def test_what_is_not_a_number_is_seen_in_its_row_and_only_there(columns: int, value: float) -> None:
    z, targets, candidates = draw(3, columns, 2)
    expected = reference(z, targets, 4, candidates)
    z[1, columns // 3] = value
    rows = score_logits(z, targets, 4, candidates)
    assert not torch.isfinite(rows.log_normalizer[1])
    for field in fields(RowScores):
        got = getattr(rows, field.name)
        if field.name != "top_ids":
            np.testing.assert_allclose(got[[0, 2]], expected[field.name][[0, 2]], atol=2e-5, err_msg=field.name)


@pytest.mark.parametrize("slice_bytes", [1, 20_000, 50_000, 2**30])
def test_slices_and_temperatures_change_nothing_else(slice_bytes: int) -> None:
    generator = torch.Generator().manual_seed(3)
    head = LMHead(torch.randn(4100, 16, generator=generator), torch.randn(4100, generator=generator))
    hidden = torch.randn(23, 16, generator=generator)
    _, targets, candidates = draw(23, 4100, 3)
    temperatures = torch.tensor([0.25, 1.0, 3.0])[torch.arange(23) % 3]
    seen: list[int] = []

    def logits(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return head.logits(rows)

    rows = score_rows(
        hidden,
        logits,
        targets,
        columns=4100,
        top_k=6,
        candidate_ids=candidates,
        temperatures=temperatures,
        logits_slice_bytes=slice_bytes,
    )
    assert max(seen) <= max(1, slice_bytes // (4 * 4100))
    assert sum(seen) == 23
    z = hidden.double() @ head.weight.double().T + head.bias.double() if head.bias is not None else hidden
    assert_scores(rows, reference(z / temperatures.double()[:, None], targets, 6, candidates))


def sharded(z: Tensor, targets: Tensor, k: int, candidates: Tensor, count: int, padded: int) -> list[RowScores]:
    """Scores by `count` threads that each have a part of the columns, padded to `padded` columns in all."""
    z = torch.nn.functional.pad(z, (0, padded - z.shape[1]), value=-1e30)
    columns = padded // count
    meet = threading.Barrier(count)
    table: dict[int, Tensor] = {}

    def all_gather(rank: int) -> Callable[[Tensor], Tensor]:
        def gather(own: Tensor) -> Tensor:
            table[rank] = own
            meet.wait(20)
            everyone = torch.stack([table[other] for other in range(count)])
            meet.wait(20)
            return everyone

        return gather

    def score(rank: int) -> RowScores:
        part = z[:, rank * columns : (rank + 1) * columns].clone()
        return score_logits(part, targets, k, candidates, Shard(rank, count, rank * columns, all_gather(rank)))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(score, range(count)))


@pytest.mark.parametrize(("columns", "padded"), [(97, 128), (97, 256), (1000, 1024), (20_000, 20_032)])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("k", "m"), [(0, 0), (1, 0), (8, 3), (64, 9)])
def test_a_head_sharded_over_processes_gives_the_scores_of_a_whole_one(
    columns: int, padded: int, count: int, k: int, m: int
) -> None:
    z, targets, candidates = draw(7, columns, m, seed=count)
    expected = reference(z, targets, k, candidates)
    ranks = sharded(z, targets, k, candidates, count, padded)
    for rows in ranks:
        assert_scores(rows, expected)
        assert torch.equal(rows.top_ids, ranks[0].top_ids)
        picked = z.gather(1, rows.top_ids.long()) - rows.log_normalizer[:, None]
        torch.testing.assert_close(picked, rows.top_logprobs, atol=1e-5, rtol=0)


def test_deep_tails_and_ties_across_processes() -> None:
    z, targets, candidates = draw(5, 400, 4)
    z[0] -= 300.0
    z[0, 399] = 0.0
    z[1] = 0.0  # all equal: the top k may come from any process
    z[2, :200] = -torch.inf
    z[3, 200:] -= 500.0
    expected = reference(z, targets, 6, candidates)
    for rows in sharded(z, targets, 6, candidates, 4, 512):
        keep = [0, 2, 3, 4]
        chosen = RowScores(**{field.name: getattr(rows, field.name)[keep] for field in fields(RowScores)})
        assert_scores(chosen, {name: value[keep] for name, value in expected.items()}, atol=1e-4)
        assert len(set(rows.top_ids[1].tolist())) == 6
        np.testing.assert_allclose(rows.log_tail[1], np.log(394 / 400), atol=1e-5)


def test_probabilities_of_the_top_k_and_of_the_tail_sum_to_one() -> None:
    z, targets, candidates = draw(50, 9000, 0, spread=1.0)
    rows = score_logits(z, targets, 100, candidates)
    mass = rows.top_logprobs.double().exp().sum(1) + rows.log_tail.double().exp()
    torch.testing.assert_close(mass, torch.ones(50, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (rows.log_tail <= 0).all()
    assert (rows.top_logprobs.diff(dim=1) <= 0).all()


def test_scores_do_not_depend_on_the_rows_beside_them() -> None:
    z, targets, candidates = draw(12, 5000, 3)
    whole = score_logits(z.clone(), targets, 9, candidates)
    alone = [score_logits(z[[row]].clone(), targets[[row]], 9, candidates[[row]]) for row in range(12)]
    for field in fields(replace(whole)):
        together = getattr(whole, field.name)
        torch.testing.assert_close(torch.cat([getattr(row, field.name) for row in alone]), together, rtol=0, atol=0)
