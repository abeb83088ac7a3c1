"""Advantages against their formulas, group by group in plain Python; on the CPU, a GPU and under the interpreter."""

import itertools
import math
from fractions import Fraction
from statistics import mean, stdev

import pytest
import torch
from devices import DEVICE, INTERPRETED, compiled_only, interpret

from cosmo_fast.objectives import advantages
from cosmo_fast.objectives.advantages import KINDS
from cosmo_fast.ops.group_advantages import SCALES, group_advantages, group_advantages_reference

twin = interpret("group_advantages", "group_advantages")
if INTERPRETED:
    twin.BLOCK = 4  # so that groups here are longer than a block

NAN, EPSILON = math.nan, 1e-4
IDS = {
    "sorted": [-9, -9, -9, -9, -9, 2, 3, 3, 3, 4, 4, 5, 5, 5, 5, 5, 5, 5, 2**62, 2**62, 2**62],
    "runs": [7, 7, 7, 7, 7, 1, 0, 0, 0, 9, 9, 5, 5, 5, 5, 5, 5, 5, 3, 3, 3],
    "interleaved": [5, 1, 5, 0, 5, 1, 5, -(2**63), 5, 1, 5, 0, 5, 2**63 - 1, 1, 0, 8, 8, 9, 9, 9],
}
REWARDS = [1.0, 0.25, NAN, 0.5, 0.125, 1.0, 0.7, 0.7, 0.7, NAN, NAN, 1, 0, 0, 1, 1, 0.5, 0.1, 0.3, 0.9, 0.31]


def _spread(values):
    return stdev(values) + EPSILON if len(values) > 1 else 1.0


def _formula(kind, rewards, groups, weighting="clip_filter"):
    """{sample: advantage} of the samples that have a reward."""
    known = {i: r for i, r in enumerate(rewards) if not math.isnan(r)}
    mates = {i: [known[j] for j in known if groups[j] == groups[i]] for i in known}
    centred = {i: r - mean(mates[i]) if len(set(mates[i])) > 1 else 0.0 for i, r in known.items()}
    prompts = {groups[i]: len(set(mates[i])) > 1 for i in known}
    if kind == "reinforce":
        return known
    if kind == "reinforce_pp":
        return {i: (r - mean(known.values())) / _spread(known.values()) for i, r in known.items()}
    if kind == "rloo":
        others = {
            i: mean(r for j, r in known.items() if groups[j] == groups[i] and j != i) for i in known if centred[i]
        }
        return {i: known[i] - others[i] if i in others else 0.0 for i in known}
    if kind == "group" or (kind, weighting) == ("cpgd", "std"):
        return {i: a / _spread(mates[i]) for i, a in centred.items()}
    if kind == "batch":
        return {i: a / _spread(known.values()) for i, a in centred.items()}
    if kind == "reinforce_pp_baseline":
        return {i: a / _spread(centred.values()) for i, a in centred.items()}
    if (kind, weighting) == ("cpgd", "clip_filter"):
        return {i: a * min(3.0, len(prompts) / sum(prompts.values())) for i, a in centred.items()}
    return centred


def _check(got, expected, dtype):
    tolerance = {"rel": 1e-11, "abs": 1e-13} if dtype == torch.float64 else {"rel": 2e-6, "abs": 2e-6}
    assert got.dtype == dtype
    assert got.tolist() == pytest.approx([expected.get(i, 0.0) for i in range(len(got))], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "cale"])
def test_every_kind_is_its_formula_for_groups_of_any_size_order_and_id(kind, ids, dtype):
    rewards = torch.tensor(REWARDS, dtype=dtype, device=DEVICE)
    got = advantages(rewards, torch.tensor(IDS[ids], device=DEVICE), kind)
    _check(got, _formula(kind, rewards.tolist(), IDS[ids]), dtype)


@pytest.mark.parametrize("weighting", ["equal", "std", "clip_filter"])
def test_the_weightings_of_cpgd_are_their_formulas(weighting):
    rewards, groups = torch.tensor(REWARDS, device=DEVICE), torch.tensor(IDS["runs"], device=DEVICE)
    got = advantages(rewards, groups, "cpgd", weighting=weighting)
    _check(got, _formula("cpgd", rewards.tolist(), IDS["runs"], weighting), torch.float32)


def test_the_weight_of_cpgd_is_capped():
    groups, rewards = torch.arange(10, device=DEVICE).repeat_interleave(2), torch.zeros(20, device=DEVICE)
    rewards[0] = 1.0
    assert advantages(rewards, groups, "cpgd")[0] == 1.5
    assert advantages(rewards, groups, "cpgd", weight_cap=4.0)[0] == 2.0


BASELINED = [k for k in KINDS if k not in ("reinforce", "reinforce_pp")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", BASELINED)
def test_a_group_without_variance_has_advantage_zero_exactly(kind, dtype):
    rewards = torch.tensor([0.1] * 3 + [0.7] * 7 + [0.3, 0.9], dtype=dtype, device=DEVICE)
    groups = torch.tensor([0] * 3 + [1] * 7 + [2, 2], device=DEVICE)
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        options = {"lengths": torch.arange(12), "multi_objective_aggregation": aggregation}
        got = advantages(rewards, groups, kind, **options)
        assert torch.equal(got[:10], torch.zeros_like(got[:10])) and (got[10:] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_does_not_apply_changes_nothing(kind):
    rewards = torch.tensor([1.0, NAN, 0.0, NAN, 0.5, 0.25], device=DEVICE)
    groups, lengths = torch.tensor([0, 0, 0, 1, 2, 2], device=DEVICE), torch.tensor([3, 1, 5, 2, 8, 9], device=DEVICE)
    kept = [0, 2, 4, 5]
    got = advantages(rewards, groups, kind, lengths=lengths)
    assert got[[1, 3]].tolist() == [0, 0]
    assert torch.equal(got[kept], advantages(rewards[kept], groups[kept], kind, lengths=lengths[kept]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_samples_does_not_matter(kind):
    g = torch.Generator().manual_seed(0)
    rewards, groups = torch.rand(40, generator=g, dtype=torch.float64), torch.randint(0, 7, (40,), generator=g)
    rewards[::9] = NAN
    lengths = torch.randint(1, 6, (40,), generator=g)
    order = torch.randperm(40, generator=g)
    got = advantages(rewards.to(DEVICE), groups.to(DEVICE), kind, lengths=lengths, a=0.9)
    other = advantages(rewards[order].to(DEVICE), groups[order].to(DEVICE), kind, lengths=lengths[order], a=0.9)
    torch.testing.assert_close(other, got[order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_samples_and_one_sample(kind, dtype):
    for n in (0, 1):
        ids, lengths = torch.zeros(n, dtype=torch.int64, device=DEVICE), torch.ones(n, device=DEVICE)
        got = advantages(torch.ones(n, dtype=dtype, device=DEVICE), ids, kind, lengths=lengths, a=0.5)
        assert got.dtype == dtype and got.tolist() == [float(kind == "reinforce")] * n


def test_an_infinite_reward_is_not_hidden():
    rewards = torch.tensor([math.inf, 0.0, 1.0, 0.0], device=DEVICE)
    got = advantages(rewards, torch.tensor([0, 0, 1, 1], device=DEVICE))
    assert got[:2].isnan().all() and got[2:].isfinite().all()


@compiled_only
@pytest.mark.parametrize("scale", SCALES)
def test_long_groups_over_many_blocks_are_the_reference(scale):
    g = torch.Generator().manual_seed(1)
    sizes = torch.tensor([1, 9000, 3, 20_000, 8192, 1, 8191, 40, 8192])  # starts and ends on and off the blocks' edges
    groups = torch.arange(len(sizes)).repeat_interleave(sizes).to(DEVICE)
    rewards = torch.rand(len(groups), generator=g, dtype=torch.float64).to(DEVICE)
    rewards[torch.randperm(len(groups), generator=g)[:99]] = NAN
    for order in (torch.arange(len(groups)), torch.randperm(len(groups), generator=g)):
        r, ids = rewards[order], groups[order]
        expected = group_advantages_reference(r, ids, scale)
        torch.testing.assert_close(group_advantages(r, ids, scale), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="threads of the CPU")
@pytest.mark.parametrize("scale", SCALES)
def test_the_number_of_threads_changes_no_bit(scale):
    g = torch.Generator().manual_seed(2)
    groups = torch.randint(0, 9000, (70_000,), generator=g)
    rewards, threads, got = torch.rand(70_000, generator=g), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            got += [(group_advantages(rewards, groups, scale), group_advantages(rewards, groups.sort().values, scale))]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(got[0][i], other[i]) for other in got[1:] for i in range(2))


def test_a_large_mean_costs_no_digits():
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=torch.float64, device=DEVICE) + 2.0**40
    groups = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for kind in ("group", "batch", "reinforce_pp", "reinforce_pp_baseline"):
        assert advantages(rewards, groups, kind).tolist() == pytest.approx(
            advantages(rewards - 2.0**40, groups, kind).tolist(), rel=1e-12
        )


def _shares(lengths):
    """How far each sample of a group lies in its shorter half: the mean over every order of samples of one length."""
    n = len(lengths)
    orders = [o for o in itertools.permutations(range(n)) if [lengths[i] for i in o] == sorted(lengths)]
    halves = [[i for i in order for _ in range(2)][:n] for order in orders]  # two half-samples each
    return [Fraction(sum(half.count(i) for half in halves), 2 * len(orders)) for i in range(n)]


@pytest.mark.parametrize(("mu", "a"), [(1.0, 1.0), (1.0, 0.9), (0.3, 1.2), (0.0, 0.5)])
def test_cale_is_its_formula_with_ties_and_odd_groups(mu, a):
    members = {4: [3, 9, 9, 30], -1: [5, 5, 5, 5, 8], 7: [1, 2, 3], 0: [6], 2: [4, 4, 7, 7, 9, 9]}
    groups = [g for g, lengths in members.items() for _ in lengths]
    lengths = [n for own in members.values() for n in own]
    rewards = torch.rand(len(groups), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected, at = {}, 0
    for own in members.values():
        r, s = rewards[at : at + len(own)].tolist(), [float(x) for x in _shares(own)]
        short = sum(x * y for x, y in zip(s, r, strict=True)) / (len(own) / 2)
        long = sum((1 - x) * y for x, y in zip(s, r, strict=True)) / (len(own) / 2)
        for i in range(len(own)):
            as_long = mu * (a * r[i] - short) + (1 - mu) * (r[i] - long)
            as_short = mu * (r[i] - a * long) + (1 - mu) * (r[i] - short)
            expected[at + i] = s[i] * as_short + (1 - s[i]) * as_long
        assert sum(expected[at + i] for i in range(len(own))) == pytest.approx(0, abs=1e-12)
        at += len(own)
    options = {"lengths": torch.tensor(lengths, device=DEVICE), "mu": mu, "a": a}
    _check(
        advantages(rewards.to(DEVICE), torch.tensor(groups, device=DEVICE), "cale", **options), expected, rewards.dtype
    )


def test_cale_of_an_even_group_without_ties_is_the_published_form():
    rewards, lengths = torch.tensor([0.9, 0.1, 0.4, 0.8], dtype=torch.float64), torch.tensor([50, 10, 30, 20])
    short, long, a, mu = (0.1 + 0.8) / 2, (0.9 + 0.4) / 2, 0.9, 0.75
    expected = [mu * (a * r - short) + (1 - mu) * (r - long) for r in (0.9, 0.4)]
    expected += [mu * (r - a * long) + (1 - mu) * (r - short) for r in (0.1, 0.8)]
    got = advantages(rewards, torch.zeros(4, dtype=torch.int64), "cale", lengths=lengths, mu=mu, a=a)
    assert got[[0, 2, 1, 3]].tolist() == pytest.approx(expected, rel=1e-12)


def test_cale_with_half_mu_and_a_of_one_is_dr_grpo():
    g = torch.Generator().manual_seed(4)
    rewards, groups = torch.rand(60, generator=g, dtype=torch.float64), torch.randint(0, 9, (60,), generator=g)
    lengths = torch.randint(1, 9, (60,), generator=g)
    got = advantages(rewards, groups, "cale", lengths=lengths, mu=0.5, a=1.0)
    torch.testing.assert_close(got, advantages(rewards, groups, "dr_grpo"), rtol=1e-12, atol=1e-14)


def test_cale_prefers_the_shorter_of_equal_answers_and_nothing_among_equal_lengths():
    rewards, groups = torch.ones(7), torch.tensor([0] * 4 + [1] * 3)
    got = advantages(rewards, groups, "cale", lengths=torch.tensor([5, 1, 9, 2, 4, 4, 4]), a=0.9)
    torch.testing.assert_close(got[:4], torch.tensor([-0.1, 0.1, -0.1, 0.1]))
    assert got[4:].tolist() == [0, 0, 0]


MATRIX = [[1, 0.5, NAN], [0, 0.25, 1], [NAN, NAN, NAN], [1, 1, 0], [0.2, NAN, 0.5], [0.5, 0, 1], [0.9, 0.1, 0.3]]
MATRIX_GROUPS = [4, 4, 4, 4, 1, 1, 1]
WEIGHTS = [2.0, 0.5, -1.0]


def _several(kind="group", **options):
    matrix = torch.tensor(MATRIX, dtype=torch.float64, device=DEVICE)
    return advantages(matrix, torch.tensor(MATRIX_GROUPS, device=DEVICE), kind, **options)


def _sum(row, weights):
    known = [w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r)]
    return sum(known) if known else NAN


@pytest.mark.parametrize("kind", ["group", "batch", "rloo", "reinforce"])
def test_sum_then_normalize_is_the_kind_of_the_weighted_sum(kind):
    totals = [_sum(row, WEIGHTS) for row in MATRIX]
    _check(_several(kind, reward_weights=WEIGHTS), _formula(kind, totals, MATRIX_GROUPS), torch.float64)


@pytest.mark.parametrize("kind", ["group", "dr_grpo", "reinforce", "reinforce_pp"])
def test_normalize_then_sum_normalizes_each_reward_and_the_batch(kind):
    parts = [_formula(kind, column, MATRIX_GROUPS) for column in zip(*MATRIX, strict=True)]
    totals = {i: sum(w * p.get(i, 0.0) for w, p in zip(WEIGHTS, parts, strict=True)) for i in (0, 1, 3, 4, 5, 6)}
    centre, spread = mean(totals.values()), _spread(totals.values())
    got = _several(kind, reward_weights=WEIGHTS, multi_objective_aggregation="normalize_then_sum")
    _check(got, {i: (x - centre) / spread for i, x in totals.items()}, torch.float64)


def test_gated_rewards_count_only_where_the_gate_is_reached_or_does_not_apply():
    matrix = torch.tensor([[1.0, 5.0], [0.4, 50.0], [0.5, 2.0], [NAN, 3.0]], device=DEVICE)
    groups = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    got = advantages(matrix, groups, "reinforce", multi_objective_aggregation="gated")
    assert got.tolist() == pytest.approx([6.0, 0.4, 2.5, 3.0])
    got = advantages(matrix, groups, "reinforce", multi_objective_aggregation="gated", gate_threshold=0.6)
    assert got.tolist() == pytest.approx([6.0, 0.4, 0.5, 3.0])


def test_the_lagrangian_is_objective_plus_multipliers_over_their_sum():
    totals = [_sum(row, [2.0, 0.5 * 3.0, -0.25]) / 4.25 for row in MATRIX]
    options = {"multi_objective_aggregation": "lagrangian", "multipliers": [3.0, 0.25], "reward_weights": WEIGHTS}
    _check(_several("dr_grpo", **options), _formula("dr_grpo", totals, MATRIX_GROUPS), torch.float64)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_one_column_is_one_reward(aggregation):
    rewards, groups = torch.tensor(REWARDS, device=DEVICE), torch.tensor(IDS["runs"], device=DEVICE)
    options = {"multi_objective_aggregation": aggregation, "reward_weights": [2.0]}
    assert torch.equal(advantages(rewards, groups, **options), advantages(rewards[:, None], groups, **options))


@compiled_only
def test_the_op_passes_opcheck():
    rewards, groups = torch.tensor(REWARDS, device=DEVICE), torch.tensor(IDS["runs"], device=DEVICE)
    for scale in range(len(SCALES)):
        torch.library.opcheck(torch.ops.cosmo_fast.group_advantages, (rewards, groups, scale, EPSILON, 3.0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "gae"}, "gae"),
        ({"kind": "cpgd", "weighting": "x"}, "weighting"),
        ({"kind": "cpgd", "weight_cap": 0.0}, "weight_cap"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"kind": "cale"}, "lengths"),
        ({"kind": "cale", "lengths": torch.ones(3)}, "lengths"),
        ({"kind": "cale", "lengths": torch.ones(2), "mu": 1.5}, "mu"),
        ({"multi_objective_aggregation": "mean"}, "multi_objective_aggregation"),
        ({"multi_objective_aggregation": "gated"}, "K = 1"),
        ({"multi_objective_aggregation": "lagrangian"}, "K = 1"),
        ({"rewards": torch.zeros(2, 3), "multi_objective_aggregation": "lagrangian"}, "multipliers"),
        ({"rewards": torch.zeros(2, 2), "multipliers": [1.0]}, "lagrangian"),
        (
            {"rewards": torch.zeros(2, 2), "multi_objective_aggregation": "lagrangian", "multipliers": [-1.0]},
            "at least 0",
        ),
        ({"rewards": torch.zeros(2, 3), "reward_weights": [1.0]}, "3 rewards"),
        ({"rewards": torch.zeros(3)}, "one length"),
        ({"rewards": torch.zeros(2, dtype=torch.int64)}, "floating"),
        ({"groups": torch.zeros(2)}, "integer"),
    ],
)
def test_bad_input_is_named(options, match):
    given = {"rewards": torch.zeros(2), "groups": torch.zeros(2, dtype=torch.int64), **options}
    with pytest.raises(ValueError, match=match):
        advantages(**given)


@compiled_only
def test_the_op_refuses_what_it_does_not_read():
    groups = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="float16"):
        group_advantages(torch.zeros(2, dtype=torch.float16, device=DEVICE), groups)
    with pytest.raises(ValueError, match="mean"):
        group_advantages(torch.zeros(2, device=DEVICE), groups, "mean")
    with pytest.raises(RuntimeError, match="one length"):
        group_advantages(torch.zeros(3, device=DEVICE), groups)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_the_weights_of_several_rewards_may_differ_by_sample(aggregation):
    g = torch.Generator().manual_seed(0)
    rewards, groups = torch.rand(8, 2, generator=g, dtype=torch.float64), torch.arange(8) // 4
    weights = torch.tensor([[1.0, 0.0]] * 4 + [[0.5, 2.0]] * 4, dtype=torch.float64)
    options = {"multi_objective_aggregation": aggregation}
    got = advantages(rewards.to(DEVICE), groups.to(DEVICE), reward_weights=weights, **options).cpu()
    if aggregation == "sum_then_normalize":
        expected = advantages((rewards * weights).sum(1).to(DEVICE), groups.to(DEVICE)).cpu()
    else:
        each = [advantages(rewards[:, k].to(DEVICE), groups.to(DEVICE)).cpu() for k in range(2)]
        total = each[0] * weights[:, 0] + each[1] * weights[:, 1]
        expected = total / (total.std() + EPSILON)
    torch.testing.assert_close(got, expected)
