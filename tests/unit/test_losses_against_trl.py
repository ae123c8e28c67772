"""TRL's divergences as a second oracle, in value and in gradient. Private functions, called by name, pinned version."""

import os

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="the second oracle is a development dependency")

from trl.experimental.async_distillation.async_distillation_trainer import _chunked_jsd_loss
from trl.experimental.gkd import GKDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket, _jsd_divergence

from student_trainer.logprobs import support_logprobs
from student_trainer.losses import js

BETAS = [0.0, 0.3, 0.5, 0.9, 1.0]  # 0 is the forward and 1 the reverse KL, in both
V, D = 97, 8


def models(t=7, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = (2 * torch.randn(t, V, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    teacher = (2 * torch.randn(t, V, generator=g, dtype=torch.float64)).to(dtype)
    return student, teacher


def ours(student_logits, teacher_logits, ids, present, beta, temperature=1.0):
    """Per token, the logits fed through the walk with an identity for a head."""
    head = torch.eye(V, dtype=student_logits.dtype)
    options = {"present": present, "temperature": temperature, "slice_size": 40}
    s = support_logprobs(student_logits, head, ids, **options)
    t = support_logprobs(teacher_logits, head, ids, **options)
    return js(s.logprobs, t.logprobs, s.log_tail, t.log_tail, beta=beta)


def everything(t):
    return torch.arange(V).expand(t, V), torch.ones(t, V, dtype=torch.bool)


def assert_same(ours, theirs, logits, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    g = torch.linspace(0.5, 1.5, len(ours), dtype=ours.dtype)
    grads = [torch.autograd.grad((x * g).sum(), logits)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["f64", "f32"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_whole_vocabulary_equals_gkd(beta, temperature, dtype, tolerance):
    student, teacher = models(dtype=dtype)
    theirs = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=temperature, reduction="none"
    )[0].sum(-1)
    assert_same(ours(student, teacher, *everything(7), beta, temperature), theirs, student, tolerance)


@pytest.mark.parametrize("top_k", [1, 5, 60])
@pytest.mark.parametrize("beta", BETAS)
def test_top_k_with_a_tail_equals_iw_opd(beta, top_k):
    """On their support: the teacher's top k for the forward KL, the student's for the reverse, the union between."""
    student, teacher = models()
    theirs = IWOPDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, reduction="none", top_k=top_k, add_tail=True
    )[0].sum(-1)
    mine, its = student.topk(top_k).indices, teacher.topk(top_k).indices
    if beta == 0:
        ids, present = its, torch.ones_like(its, dtype=torch.bool)
    elif beta == 1:
        ids, present = mine, torch.ones_like(mine, dtype=torch.bool)
    else:
        ids = torch.cat([its, mine], 1)
        candidates_new = ~(mine[:, :, None] == its[:, None, :]).any(2)
        present = torch.cat([torch.ones_like(its, dtype=torch.bool), candidates_new], 1)
    assert_same(ours(student, teacher, ids, present, beta), theirs, student, 1e-11)


@pytest.mark.parametrize("beta", BETAS)
def test_log_probabilities_with_absent_entries_equal_the_server_distillation_trainer(beta):
    student, teacher = models()
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:9] for i in range(7)])
    present = torch.rand(7, 9, generator=torch.Generator().manual_seed(9)) < 0.7
    sides = []
    for logits in (student, teacher):
        logprobs = torch.log_softmax(logits, -1).gather(1, ids).masked_fill(~present, -torch.inf)
        sides.append(_add_tail_bucket(logprobs, present))
    theirs = _jsd_divergence(sides[0][0], sides[1][0], beta, sides[0][1]).sum(-1)
    assert_same(ours(student, teacher, ids, present, beta), theirs, student, 1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_whole_path_from_hidden_states_equals_the_async_distillation_trainer(beta):
    """float32 as theirs: value, and gradients of hidden and head, with bias, scale, soft-cap and temperature."""
    g = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(s, generator=g).requires_grad_() for s in ((33, D), (V, D), (V,)))
    _, teacher = models(33, torch.float32)
    teacher_logprobs = torch.log_softmax(teacher, -1)
    t, ids = teacher_logprobs.topk(12)
    present = torch.ones_like(ids, dtype=torch.bool)
    theirs, *_ = _chunked_jsd_loss(
        hidden, weight, bias, 0.7, 5.0, ids, t, present, beta, 1.3, True, None, 1, chunk_size=10
    )
    support = support_logprobs(hidden, weight, ids, bias=bias, scale=0.7, softcap=5.0, temperature=1.3, slice_size=40)
    t_tail = torch.log(-torch.expm1(t.logsumexp(-1)))
    mine = js(support.logprobs, t, support.log_tail, t_tail, beta=beta).sum()
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=0)
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), rtol=0, atol=1e-5
    )
