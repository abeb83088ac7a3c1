"""The planner: micro-batches, parts of large groups, balanced ranks, cost and peak memory."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from flops import Flops
from tiny import make_prompt, save_pictures, tiny_policy
from torch.profiler import ProfilerActivity, profile

from cosmo_fast import _host, ops
from cosmo_fast.models.vision import Vision
from cosmo_fast.objectives import TokenBatch, objective
from cosmo_fast.plan import CostModel, GroupSize, Plan, Prompt, balance, calibrate, flops, micro_batches
from cosmo_fast.plan.cost import CHUNK_ROWS, loads


def _random_groups(n, seed, responses=8):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 400, (n, responses)).tolist()
    return [GroupSize(int(p), tuple(r), int(p) // 2) for p, r in zip(rng.integers(20, 1500, n), lengths, strict=True)]


@pytest.mark.parametrize("budget", [2500, 4000, 16384])
def test_every_response_is_planned_once_and_no_micro_batch_is_over_the_budget(budget):
    sizes = _random_groups(200, seed=budget)
    batches = micro_batches(sizes, budget)
    assert sorted(i for b in batches for i in b) == list(range(200))
    assert [b[0] for b in batches] == sorted(b[0] for b in batches) and all(b == sorted(b) for b in batches)
    for batch in batches:
        if batch.parts is None:
            assert sum(sizes[i].tokens for i in batch) <= budget
            continue
        ((prompt, responses, _),) = (sizes[i] for i in batch)
        assert sizes[batch[0]].tokens > budget and len(batch.parts) > 1
        assert [r for part in batch.parts for r in part] == list(range(8))
        assert all(prompt + sum(responses[r] for r in part) <= budget for part in batch.parts)
    assert any(b.parts for b in batches) == (max(s.tokens for s in sizes) > budget)


def test_bins_are_near_the_fewest_and_never_more_than_first_fit_makes():
    rng = np.random.default_rng(0)
    for optimum in (2, 7, 30, 100) * 5:
        # Full bins, cut at random: their number is the fewest.
        cuts = [np.diff([0, *np.sort(rng.integers(1, 1000, rng.integers(1, 6))), 1000]) for _ in range(optimum)]
        costs = rng.permutation(np.concatenate(cuts))
        first_fit = []
        for cost in costs:
            place = next((b for b in first_fit if sum(b) + cost <= 1000), None)
            first_fit.append([cost]) if place is None else place.append(cost)
        bins = len(micro_batches(costs.tolist(), 1000))
        assert bins <= 11 / 9 * optimum + 1 and bins <= len(first_fit)


def test_parts_are_the_fewest_and_the_largest_is_as_small_as_it_can_be():
    rng = np.random.default_rng(1)
    for _ in range(50):
        costs = rng.integers(0, 60, 7)
        parts = _host.even_parts(costs, 80)
        possible = [np.split(costs, cut) for k in range(7) for cut in itertools.combinations(range(1, 7), k)]
        possible = [p for p in possible if max(x.sum() for x in p) <= 80]
        fewest = min(len(p) for p in possible)
        smallest = min(max(x.sum() for x in p) for p in possible if len(p) == fewest)
        assert [i for p in parts for i in p] == list(range(7))
        assert len(parts) == fewest and max(costs[p].sum() for p in parts) == smallest


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (101, r"a group of 101 tokens .* is over max_tokens_per_batch=100"),
        (GroupSize(60, (5, 41, 7)), r"a prompt of 60 tokens with one response of 41 is over max_tokens_per_batch=100"),
        (GroupSize(101, (0,)), "101 tokens"),
    ],
)
def test_what_cannot_be_parted_is_refused_with_the_setting_to_change(size, message):
    with pytest.raises(ValueError, match=message):
        micro_batches([GroupSize(3, (4,)), size], 100)


def _least_heaviest(costs, ranks):
    best = sum(costs)

    def place(i, load):
        nonlocal best
        if i == len(costs):
            best = min(best, max(load))
        for r in range(ranks):
            if load[r] + costs[i] < best if i < len(costs) else False:
                place(i + 1, (*load[:r], load[r] + costs[i], *load[r + 1 :]))
                if load[r] == 0:
                    break

    place(0, (0.0,) * ranks)
    return best


@pytest.mark.parametrize(("n", "ranks"), [(5, 2), (8, 3), (9, 4), (10, 3), (11, 2)])
def test_the_heaviest_rank_is_within_5_percent_of_the_least_possible(n, ranks):
    rng = np.random.default_rng(n)
    for draw in (rng.uniform(50, 1000, (20, n)), rng.lognormal(6, 0.8, (20, n))):
        for costs in draw:
            heaviest = max(costs[r].sum() for r in balance(costs, ranks))
            assert heaviest <= 1.05 * _least_heaviest(sorted(costs, reverse=True), ranks)


@pytest.mark.parametrize(("n", "ranks", "bound"), [(40, 8, 0.05), (100, 16, 0.01), (1250, 8, 1e-6), (5000, 64, 1e-5)])
def test_many_groups_are_balanced_as_differencing_does_it(n, ranks, bound):
    costs = np.random.default_rng(n).lognormal(6, 0.8, n)
    ranked = balance(costs, ranks)
    assert sorted(i for r in ranked for i in r) == list(range(n))
    above = max(costs[r].sum() for r in ranked) / max(costs.sum() / ranks, costs.max()) - 1
    assert above <= bound


def test_ranks_are_the_same_every_time_and_start_with_the_lower_index():
    assert balance([1.0] * 6, 3) == balance([1.0] * 6, 3)
    assert sorted(len(r) for r in balance([1.0] * 6, 3)) == [2, 2, 2]
    assert balance([3.0, 9.0], 4) == [[0], [1], [], []]
    assert balance([], 2) == [[], []]
    assert balance([0.0, 0.0, 5.0], 1) == [[0, 1, 2]]
    ranked = balance(np.random.default_rng(0).integers(1, 4, 50), 5)
    assert all(r == sorted(r) for r in ranked) and [r[0] for r in ranked] == sorted(r[0] for r in ranked)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balance([1.0, float("nan")], 2), r"costs\[1\] = nan"),
        (lambda: balance([-1.0], 2), r"costs\[0\] = -1"),
        (lambda: balance([1.0, float("inf")], 2), r"costs\[1\] = inf"),
        (lambda: balance([1.0], 0), "ranks"),
        (lambda: _host.even_parts([3, 9], 8), r"costs\[1\] = 9 is over the budget of 8"),
    ],
)
def test_bad_costs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("budget", [16384, 2600])
def test_ten_thousand_samples_are_planned_in_a_tenth_of_a_second(budget):
    sizes = _random_groups(1250, seed=3)
    cost = CostModel("FLOP", token=5e6, pair=6e3, vision=1e6, row=2e6)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for rank in balance(cost.of(sizes), 8):
            micro_batches([sizes[i] for i in rank], budget)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1, times  # the least of five: other processes may hold the core


def test_pairs_are_the_keys_that_every_query_sees():
    sizes = [GroupSize(5, (3, 0, 4), 2), GroupSize(1), GroupSize(2, (1,))]
    pairs = [sum(range(1, s.prompt + 1)) + sum(s.prompt + j + 1 for r in s.responses for j in range(r)) for s in sizes]
    assert loads(sizes).tolist() == [[12, pairs[0], 2, 7], [1, 1, 0, 0], [3, pairs[2], 0, 1]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A policy whose tower learns, its vision, prompts with pictures, and its cost model."""
    folder = tmp_path_factory.mktemp("pictures")
    policy, _ = tiny_policy(vocab_size=1000)
    paths = save_pictures(folder, ((140, 140), (112, 140), (140, 84), (56, 140)))
    prompts = [make_prompt(policy, [7, path, 8, 9]) for path in paths]
    vision = Vision(policy)
    return policy, vision, prompts, calibrate(policy, vision, prompts, cache_dir=folder)


def _plan(prompts, lengths):
    return Plan(prompts, [[np.zeros(r, dtype=np.int64) for r in group] for group in lengths])


def _text(prompt, *lengths):
    return [Prompt(np.zeros(prompt, dtype=np.int64), (), {}, "", "")], [lengths]


def _train_on(policy, vision, plan):
    """Forward and backward as the trainer runs them; gradients add up."""
    vision.forget()
    hidden = policy.hidden(plan, vision.features(plan.media))[plan.tensor("label_rows", "cpu")]
    weight = torch.ones(len(hidden))
    batch = TokenBatch(targets=plan.tensor("targets", "cpu"), weight=weight, sequence=plan.tensor("sequence", "cpu"))
    ops.linear_policy_loss(hidden, policy.head_weight, batch, objective("sft")).loss.backward()


def _allocated(run):
    """Peak bytes by the allocator's own records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    return np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()


def test_the_peak_of_memory_is_predicted(measured):
    policy, vision, prompts, cost = measured
    cases = [_text(700, *(90,) * 8), _text(30, *(120,) * 16), _text(40, *(500,) * 16), (prompts, [(60,) * 4] * 4)]
    assert sum(cases[2][1][0]) > CHUNK_ROWS
    for members, lengths in cases:
        plan = _plan(members, lengths)
        sizes = [GroupSize.of(p, [range(r) for r in group]) for p, group in zip(members, lengths, strict=True)]
        _train_on(policy, vision, plan)  # the gradients are there, as in every micro-batch but the first
        ops.empty_cache()
        actual = _allocated(lambda plan=plan: _train_on(policy, vision, plan))
        predicted = cost.peak_bytes(sizes) - cost.memory.static
        assert 0.95 < predicted / actual < 1.25
    learned = sum(p.nbytes for p in policy.model.parameters())
    assert cost.memory.static == 4 * learned  # fp32 weights, gradients, two moments


def test_a_group_in_parts_is_predicted_by_its_largest_part_and_the_gradient_of_its_keys(measured):
    cost, size = measured[-1], GroupSize(300, (200, 50, 60, 40), 10)
    largest = cost.peak_bytes([GroupSize(300, (200,), 10)])
    assert cost.peak_bytes([size], [[0], [1, 2, 3]]) == pytest.approx(largest + 300 * cost.memory.keys, abs=1)
    assert cost.memory.keys == 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 heads of 8, fp32


def test_predicted_time_and_memory_grow_with_everything_that_a_batch_holds(measured):
    cost = measured[-1]
    assert cost.unit == "s" and cost.of([GroupSize(2000)]) > cost.of([GroupSize(20)])
    assert min(cost.pair, cost.vision, cost.row, cost.start, *vars(cost.memory).values()) >= 0
    small = [GroupSize(100, (50, 50), 20)]
    for more in (GroupSize(101, (50, 50), 20), GroupSize(100, (51, 50), 20), GroupSize(100, (50, 50), 21)):
        assert cost.of([more]) >= cost.of(small) and cost.peak_bytes([more]) >= cost.peak_bytes(small)


def test_calibrating_leaves_gradients_alone_and_is_read_back_from_the_cache(measured, tmp_path):
    policy, vision, prompts, _ = measured
    policy.model.zero_grad()
    policy.head_weight.grad = torch.ones_like(policy.head_weight)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    cost = calibrate(policy, vision, [], cache_dir=tmp_path)
    assert torch.equal(policy.head_weight.grad, torch.ones_like(policy.head_weight))
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
    assert [p.grad is None for p in policy.model.parameters()].count(False) == 1
    policy.head_weight.grad = None
    assert calibrate(policy, vision, [], cache_dir=tmp_path) == cost and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written.*XDG_CACHE_HOME"):
        calibrate(policy, vision, prompts, cache_dir=tmp_path / "file")


def test_a_frozen_tower_holds_nothing_for_the_backward_and_costs_a_third(measured, tmp_path):
    policy, vision, prompts, learning = measured
    counted = flops(policy)
    policy.freeze_vision_tower(True)
    frozen = calibrate(policy, vision, prompts, cache_dir=tmp_path)
    assert flops(policy) == replace(counted, vision=counted.vision / 3)
    policy.freeze_vision_tower(False)
    assert frozen.memory.held_vision < 0.05 * learning.memory.held_vision
    assert frozen.memory.static < learning.memory.static


def test_flops_are_those_of_the_matrix_products(measured):
    policy, vision, _, _ = measured
    cost = replace(flops(policy), pair=0.0)  # attention is one op
    members, lengths = _text(120, 40, 60)
    with Flops(1, 1, 1) as counted:
        _train_on(policy, vision, _plan(members, lengths))
    assert cost.of([GroupSize(120, (40, 60))])[0] == pytest.approx(2 * counted.total, rel=0.03)
