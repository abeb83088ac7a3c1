"""Sampling: the log-probs that training would give, greedy tokens that transformers would give, streams of its own."""

import numpy as np
import pytest
import torch
from tiny import END, IMAGE, make_prompt, padded_logits, save_pictures, tiny_policy

from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Plan
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.rollout.sampler import sample


@pytest.fixture
def world(tmp_path):
    policy, plain = tiny_policy()
    square, portrait, _ = save_pictures(tmp_path)
    prompts = [
        make_prompt(policy, p) for p in ([7, square, 8, 9], [10, 11], [7, portrait, 15, square, 16], [9, 8, 7, 6])
    ]
    return policy, plain, prompts


def sampler(policy, batch_size=64):
    return Sampler(policy, Vision(policy), batch_size)


def test_sampled_logprobs_equal_the_training_forward_so_the_first_ratio_is_1(world):
    policy, _, prompts = world
    groups = sampler(policy).generate(prompts, SamplingParams(24, temperature=0.7), num_generations=5, seed=3)
    assert len({len(c.ids) for g in groups for c in g}) > 3, "the lengths must differ for compaction to be tested"
    plan = Plan(prompts, [[c.ids for c in g] for g in groups])
    with torch.no_grad():
        trained, _ = policy.logprobs(plan, Vision(policy).features(plan.media), temperature=0.7)
    recorded = torch.from_numpy(np.concatenate([c.logps for g in groups for c in g]))
    ratio_error = torch.expm1(trained - recorded).abs().max()
    assert ratio_error < 1e-5


def test_greedy_tokens_equal_transformers_generate(world):
    policy, plain, prompts = world
    groups = sampler(policy).generate(prompts, SamplingParams(16, temperature=0))
    for prompt, [completion] in zip(prompts, groups, strict=True):
        if not prompt.media:
            given = torch.from_numpy(prompt.ids)[None]
            out = plain.generate(given, max_new_tokens=16, do_sample=False, eos_token_id=END, pad_token_id=0)
            assert completion.ids.tolist() == out[0, len(prompt.ids) :].tolist()
        elif IMAGE not in completion.ids:
            best = padded_logits(plain, policy, prompt, completion.ids)[:-1].argmax(-1)
            assert completion.ids.tolist() == best.tolist()


def test_a_response_does_not_depend_on_its_batch_mates(world):
    policy, _, prompts = world
    params = SamplingParams(12)
    wide = sampler(policy).generate(prompts, params, num_generations=4, seed=9)
    narrow = sampler(policy, batch_size=4).generate(prompts, params, num_generations=4, seed=9)
    short = Sampler(policy, Vision(policy), max_tokens=12).generate(prompts, params, num_generations=4, seed=9)
    for a, b, c in zip(wide, narrow, short, strict=True):
        assert [r.ids.tolist() for r in a] == [r.ids.tolist() for r in b] == [r.ids.tolist() for r in c]
    other = sampler(policy).generate(prompts, params, num_generations=4, seed=10)
    assert [c.ids.tolist() for g in wide for c in g] != [c.ids.tolist() for g in other for c in g]


def test_an_ended_response_keeps_its_end_token_and_a_cut_one_says_so(world):
    policy, _, prompts = world
    for group in sampler(policy).generate(prompts, SamplingParams(20, temperature=1.5), num_generations=8):
        for c in group:
            assert c.ended == (c.ids[-1] == END) and END not in c.ids[:-1]
            assert len(c.ids) == len(c.logps) and (c.ended or len(c.ids) == 20)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]]).expand(20000, -1)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20000))
    tokens, logp = sample(logits, SamplingParams(1, temperature=2.0), uniform)
    expected = (logits[0] / 2).softmax(-1)
    torch.testing.assert_close(tokens.bincount(minlength=4) / 20000, expected, rtol=0, atol=0.015)
    torch.testing.assert_close(logp, expected.log()[tokens])


@pytest.mark.parametrize(
    "filters, allowed",
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.4}, {0}),
        ({"min_p": 0.5}, {0, 1}),
        ({"top_k": 1, "min_p": 1.0}, {0}),
    ],
)
def test_filters_leave_what_they_promise(filters, allowed):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, -1)
    tokens, _ = sample(logits, SamplingParams(1, **filters), torch.linspace(0, 1 - 1e-7, 2000))
    assert set(tokens.tolist()) == allowed


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}, {"max_completion_length": 0}]
)
def test_values_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
        SamplingParams(**bad)


def test_more_generations_than_the_batch_holds_is_refused(world):
    policy, _, prompts = world
    with pytest.raises(ValueError, match="num_generations=8 is over sampling_batch_size=4"):
        sampler(policy, 4).generate(prompts, SamplingParams(4), num_generations=8)
