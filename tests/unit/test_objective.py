"""The objective is the sum of the pieces that the configuration picks, and nothing else."""

import dataclasses

import numpy as np
import pytest
import torch

from student_trainer import losses
from student_trainer.batch import pack
from student_trainer.logprobs import support_logprobs
from student_trainer.objective import NonFiniteLoss, is_active, reduce_loss, refuse_non_finite, token_losses
from student_trainer.objective_config import ObjectiveConfig
from tests.unit.test_batch import make_sample

VOCABULARY = 50


def _samples():
    drawn = [make_sample([1, 2], [3, 4, 9], seed=1), make_sample([5], [6, 9], seed=2), make_sample([7], [8], seed=3)]
    first = dataclasses.replace(drawn[0], reward=1.0, passed=True, group_failed=False, advantage=1.5, prompt_weight=2.0)
    second = dataclasses.replace(drawn[1], reward=0.0, passed=False, group_failed=False, advantage=-0.5, group=0)
    third = dataclasses.replace(drawn[2], reward=0.0, passed=False, group_failed=True, advantage=0.0, group=1)
    return [first, second, third]


def _batch(samples=None):
    samples = samples or _samples()
    weights = [np.full(len(sample.rollout.response_ids), 1 / 6) for sample in samples]
    return pack(samples, weights, eos_ids={9}, pad_id=0)


def _student(batch, seed=0):
    """A random head over random hidden states: (support, log-probabilities of the targets)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(batch.targets), 8, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, 8, generator=generator)
    support = support_logprobs(hidden, weight, batch.support_ids, present=batch.support_present)
    return support, support.logprobs.gather(1, batch.target_column[:, None]).squeeze(1), hidden


def _terms(objective: dict, step: int = 0, batch=None):
    batch = batch or _batch()
    support, policy, _ = _student(batch)
    return token_losses(ObjectiveConfig.model_validate(objective), step, batch, support, policy), batch, support, policy


def test_a_divergence_is_weighted_by_coefficient_prompt_and_mask():
    token, batch, support, _ = _terms({"divergences": [{"kind": "reverse_kl", "coefficient": 0.5, "mask": "passed"}]})
    plain = losses.reverse_kl(support.logprobs, batch.teacher_logprobs, support.log_tail, batch.teacher_log_tail)
    expected = torch.cat([plain[:3] * 0.5 * 2.0, torch.zeros(3)])
    torch.testing.assert_close(token.terms["reverse_kl"], expected)


@pytest.mark.parametrize(
    ("mask", "rows"),
    [("all", range(6)), ("passed", range(3)), ("failed", range(3, 6)), ("group_failed", range(5, 6))],
)
def test_masks_choose_whole_answers(mask, rows):
    token, _, _, _ = _terms({"divergences": [{"kind": "forward_kl", "mask": mask}]})
    assert torch.nonzero(token.terms["forward_kl"]).flatten().tolist() == list(rows)


def test_a_masked_answer_does_not_matter_even_if_its_loss_is_infinite():
    samples = _samples()
    batch = _batch(samples)
    teacher = batch.teacher_logprobs.clone()
    support, policy, hidden = _student(batch)
    broken = dataclasses.replace(batch, teacher_logprobs=teacher.index_fill(0, torch.tensor([0]), -torch.inf))
    objective = ObjectiveConfig.model_validate({"divergences": [{"kind": "reverse_kl", "mask": "failed"}]})
    loss = reduce_loss(token_losses(objective, 0, broken, support, policy), broken)
    whole = reduce_loss(token_losses(objective, 0, batch, support, policy), batch)
    assert torch.equal(loss, whole)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.isfinite().all() and not gradient[:3].any()


def test_terms_whose_coefficient_is_zero_at_a_step_are_left_out():
    objective = {
        "divergences": [
            {"kind": "forward_kl", "coefficient": {0: 1.0, 1: 0.0}},
            {"kind": "reverse_kl", "coefficient": {0: 0.0, 1: 1.0}},
        ]
    }
    assert set(_terms(objective, 0)[0].terms) == {"forward_kl"}
    assert set(_terms(objective, 1)[0].terms) == {"reverse_kl"}


def test_grpo_on_policy_is_minus_the_advantage_with_the_policy_gradient():
    batch = _batch()
    support, policy, hidden = _student(batch)
    batch = dataclasses.replace(batch, sampler_logprobs=policy.detach())
    objective = ObjectiveConfig.model_validate({"recipe": "grpo"})
    token = token_losses(objective, 0, batch, support, policy)
    advantage = batch.advantages[batch.sequence]
    torch.testing.assert_close(token.terms["policy_gradient"], -advantage)
    (ours,) = torch.autograd.grad(token.terms["policy_gradient"].sum(), hidden, retain_graph=True)
    (expected,) = torch.autograd.grad(-(advantage * policy).sum(), hidden)
    torch.testing.assert_close(ours, expected)


def _advantage_of(objective: dict, step: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The advantage that the surrogate saw (on policy its loss is minus it), log T - log S, and group advantage."""
    batch = _batch()
    support, policy, _ = _student(batch)
    batch = dataclasses.replace(batch, sampler_logprobs=policy.detach())
    token = token_losses(ObjectiveConfig.model_validate(objective), step, batch, support, policy)
    log_ratio = batch.teacher_sampled - policy.detach()
    return -token.terms["policy_gradient"].detach(), log_ratio, batch.advantages[batch.sequence]


PASSED = torch.tensor([1.0, 1, 1, 0, 0, 0])
PROMPT_WEIGHT = torch.tensor([2.0, 2, 2, 1, 1, 1])
GROUP_FAILED = torch.tensor([0.0, 0, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("opd", lambda d, a: PROMPT_WEIGHT * d),
        ("kdrl", lambda d, a: a + 0.002 * PROMPT_WEIGHT * d),
        ("kdrl_masked", lambda d, a: a + 0.002 * PROMPT_WEIGHT * (1 - PASSED) * d),
        ("hdpo", lambda d, a: a + 0.01 * PROMPT_WEIGHT * GROUP_FAILED * d),
        ("srpo", lambda d, a: PASSED * a + PROMPT_WEIGHT * (1 - PASSED) * d),
        ("rlsd", lambda d, a: a * torch.exp(torch.sign(a) * d).clamp(0.8, 1.2)),
    ],
)
def test_recipes_make_the_advantages_of_their_papers(recipe, expected):
    seen, log_ratio, group = _advantage_of({"recipe": recipe})
    torch.testing.assert_close(seen, expected(log_ratio, group))


@pytest.mark.parametrize(("step", "coefficient"), [(0, 5e-3), (80, 1e-3), (200, 1e-3)])
def test_kdrl_anneals_the_teachers_share(step, coefficient):
    seen, log_ratio, group = _advantage_of({"recipe": "kdrl_annealed"}, step)
    torch.testing.assert_close(seen, group + coefficient * PROMPT_WEIGHT * log_ratio)


def test_opd_then_rl_switches_after_sixty_steps():
    seen, log_ratio, group = _advantage_of({"recipe": "opd_then_rl"}, 59)
    torch.testing.assert_close(seen, PROMPT_WEIGHT * log_ratio)
    seen, _, group = _advantage_of({"recipe": "opd_then_rl"}, 60)
    torch.testing.assert_close(seen, group)


def test_the_teachers_advantage_can_leave_the_end_token_out():
    seen, log_ratio, _ = _advantage_of({"policy_gradient": {"reward": 0.0, "teacher": 1.0, "teacher_at_eos": False}})
    is_eos = torch.tensor([False, False, True, False, True, False])
    torch.testing.assert_close(seen, torch.where(is_eos, 0.0, PROMPT_WEIGHT * log_ratio))


def test_trrd_with_alpha_one_is_ppo():
    trrd, *_ = _terms({"policy_gradient": {"surrogate": "trrd", "alpha": 1.0}})
    ppo, *_ = _terms({"policy_gradient": {"surrogate": "ppo_clip"}})
    torch.testing.assert_close(trrd.terms["policy_gradient"], ppo.terms["policy_gradient"])


def test_sinkhorn_by_sequence_does_not_depend_on_the_batch():
    objective = {"divergences": [{"kind": "sinkhorn"}]}
    whole, _, _, _ = _terms(objective)
    batch = _batch()
    support, _, _ = _student(batch)
    rows = batch.sequence == 1
    alone = losses.sinkhorn(
        support.logprobs[rows],
        batch.teacher_logprobs[rows],
        support.log_tail[rows],
        batch.teacher_log_tail[rows],
        ids=batch.support_ids[rows],
    )
    torch.testing.assert_close(whole.terms["sinkhorn"][rows], alone)


@pytest.mark.parametrize(
    "objective",
    [{"recipe": "opd_then_rl"}, {"divergences": [{"kind": "forward_kl", "coefficient": {3: 0.0, 4: 1.0}}]}],
)
def test_an_objective_is_active_where_it_has_a_gradient(objective):
    for step in (0, 3, 4, 70):
        token, batch, *_ = _terms(objective, step)
        active = is_active(ObjectiveConfig.model_validate(objective), step)
        assert active == reduce_loss(token, batch).requires_grad


def test_the_loss_is_the_weighted_sum_of_all_terms():
    token, batch, _, _ = _terms({"recipe": "reverse_kl_rewards"})
    expected = ((token.terms["reverse_kl"] + token.terms["policy_gradient"]) / 6).sum()
    torch.testing.assert_close(reduce_loss(token, batch), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_term_and_sample(value):
    token, batch, _, _ = _terms({"recipe": "reverse_kl_rewards"})
    token.terms["reverse_kl"] = token.terms["reverse_kl"].index_fill(0, torch.tensor([4]), value)
    with pytest.raises(NonFiniteLoss) as caught:
        refuse_non_finite(token, batch, 17)
    message = str(caught.value)
    assert "step 17: term reverse_kl is" in message
    assert "at token 1 (id 9) of the answer to p2" in message
    assert "update was not made" in message


def test_a_teacher_that_says_impossible_stops_the_run():
    """log T = -inf where the student has mass: the reverse KL is infinite, and that is said."""
    batch = _batch()
    column = int(torch.nonzero(batch.support_present[2])[0])
    teacher = batch.teacher_logprobs.clone()
    teacher[2, column] = -torch.inf
    batch = dataclasses.replace(batch, teacher_logprobs=teacher)
    token, *_ = _terms({"recipe": "reverse_kl"}, batch=batch)
    with pytest.raises(NonFiniteLoss, match="term reverse_kl is inf at token 2"):
        refuse_non_finite(token, batch, 1)
