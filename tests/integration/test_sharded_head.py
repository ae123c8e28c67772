"""Log-probabilities through a head that is sharded over two processes, each with hidden states of its own."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from student_trainer.logprobs import gathered_logprobs, support_logprobs

ROWS, WIDTH, VOCABULARY, K = 5, 8, 37, 4  # 37 rows do not divide by two


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of both processes together: hidden [2 R, d], weight [V, d], bias [V], ids [2 R, K]."""
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(VOCABULARY, generator=g)[:K] for _ in range(2 * ROWS)])
    shapes = ((2 * ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    return *(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes), ids


def _loss(hidden, weight, bias, ids) -> torch.Tensor:
    support = support_logprobs(hidden, weight, ids, bias=bias, temperature=0.7)
    gathered = gathered_logprobs(hidden, weight, ids, bias=bias)
    return (support.logprobs.exp() + support.entropy[:, None] - 0.1 * gathered.logprobs).sum() + support.log_tail.sum()


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, bias, ids = _inputs()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    own = hidden[mine].clone().requires_grad_()
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    sharded_bias = distribute_tensor(bias, mesh, [Shard(0)]).requires_grad_()
    loss = _loss(own, sharded, sharded_bias, ids[mine])
    loss.backward()
    assert sharded.grad is not None and sharded_bias.grad is not None
    assert sharded.grad.to_local().shape == sharded.to_local().shape  # it stays in shards
    found = {
        "loss": loss.detach(),
        "hidden": own.grad,
        "weight": sharded.grad.full_tensor(),
        "bias": sharded_bias.grad.full_tensor(),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_sharded_head_gives_the_values_and_gradients_of_a_whole_one(tmp_path: Path):
    hidden, weight, bias, ids = _inputs()
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    loss = _loss(hidden, weight, bias, ids)
    loss.backward()
    mp.spawn(_process, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert sum(part["loss"] for part in parts).item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat([part["hidden"] for part in parts]), hidden.grad, rtol=1e-10, atol=1e-12)
    for part in parts:
        torch.testing.assert_close(part["weight"], weight.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(part["bias"], bias.grad, rtol=1e-10, atol=1e-12)
