"""A group that is larger than a micro-batch: its prompt forward and backward once, its responses in parts."""

import numpy as np
import pytest
import torch
from tiny import make_prompt, save_pictures, tiny_policy

from cosmo_fast.models.vision import Vision
from cosmo_fast.stages.packed import Group, passes


@pytest.fixture
def case(tmp_path):
    policy, _ = tiny_policy()
    square, portrait, _ = save_pictures(tmp_path)
    rng = np.random.default_rng(0)
    prompts = [make_prompt(policy, [7, square, 8, 9]), make_prompt(policy, [7, portrait, 8, 9, 10])]
    responses = [[rng.integers(7, 97, n) for n in sizes] for sizes in ((5, 0, 9, 3, 7, 2), (4,))]
    groups = [Group(p, r, weights=[np.ones(len(x)) for x in r]) for p, r in zip(prompts, responses, strict=True)]
    return policy, groups


def gradients(policy, groups, max_tokens, dtype=torch.float64):
    """(log-probs by group, gradients by name, the sizes of all forwards)."""
    policy.model.to(dtype).zero_grad(set_to_none=True)
    found, sizes = {}, []
    for work in passes(policy, Vision(policy), groups, max_tokens):
        logits = work.hidden @ policy.head_weight.T
        logp = logits.log_softmax(-1).gather(1, torch.from_numpy(work.plan.targets)[:, None])[:, 0]
        (logp * torch.linspace(1, 2, 97, dtype=dtype)[work.plan.targets]).sum().backward()
        sizes.append(len(work.plan.tokens))
        for index in work.indices:
            found.setdefault(index, []).append(logp.detach())
    grads = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    return {i: torch.cat(x) for i, x in found.items()}, grads, sizes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logprobs_and_gradients_are_those_of_one_pass(case, checkpointing):
    policy, groups = case
    whole, wanted, [one] = gradients(policy, groups, 10_000)
    if checkpointing:
        policy.checkpoint_gradients()
    parts, found, sizes = gradients(policy, groups, 18)
    assert len(sizes) > 3 and max(sizes) <= 18 < one
    # The two groups come in separate passes, so the order within each is that of its responses.
    torch.testing.assert_close(torch.cat([parts[0], parts[1]]), whole[0], rtol=0, atol=1e-12)
    assert wanted.keys() == found.keys() == dict(policy.model.named_parameters()).keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-10, msg=name)


def test_in_bf16_the_gradients_are_as_near_to_the_truth_as_those_of_one_pass(case):
    policy, groups = case
    groups = groups[:1]
    weights = {n: p.detach().to(torch.bfloat16) for n, p in policy.model.named_parameters()}

    def error(max_tokens):
        for name, parameter in policy.model.named_parameters():
            parameter.data = weights[name].clone()
        grads = gradients(policy, groups, max_tokens, torch.bfloat16)[1]
        return sum((grads[n].double() - truth[n]).square().sum() for n in truth).sqrt()

    for name, parameter in policy.model.named_parameters():
        parameter.data = weights[name].double()
    truth = gradients(policy, groups, 10_000)[1]
    assert error(18) <= 1.2 * error(10_000)


def test_the_prompt_goes_forward_once_and_the_tower_runs_once(case, monkeypatch):
    policy, groups = case
    rows, tower = [], []
    forward, run = policy.forward, policy.family.vision_features
    monkeypatch.setattr(policy, "forward", lambda e, *a: rows.append(len(e)) or forward(e, *a))
    monkeypatch.setattr(policy.family, "vision_features", lambda *a: tower.append(1) or run(*a))
    gradients(policy, groups[:1], 18, torch.float32)
    assert rows[0] == len(groups[0].prompt.ids) and sum(rows) == groups[0].tokens and len(tower) == 1


def test_scoring_without_gradients_takes_the_same_way(case):
    policy, groups = case
    whole, _, _ = gradients(policy, groups[:1], 10_000, torch.float32)
    with torch.no_grad():
        logps = [
            (w.hidden @ policy.head_weight.T).log_softmax(-1).gather(1, torch.from_numpy(w.plan.targets)[:, None])
            for w in passes(policy, Vision(policy), groups[:1], 18)
        ]
    torch.testing.assert_close(torch.cat(logps)[:, 0], whole[0], rtol=0, atol=1e-5)


def test_a_prompt_that_leaves_no_room_for_its_longest_response_is_refused(case):
    policy, groups = case
    with pytest.raises(ValueError, match="max_tokens_per_batch=12"):
        list(passes(policy, Vision(policy), groups, 12))
