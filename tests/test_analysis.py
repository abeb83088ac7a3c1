"""Information peaks, recovery and the rewards' relations, each against what is known of made-up data."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from short_run import trainer

from cosmo_fast import cli
from cosmo_fast.analysis import information as info
from cosmo_fast.analysis.answers import harmful, safe_answer, unsafe_step
from cosmo_fast.analysis.recovery import recovery
from cosmo_fast.data import load_rows
from cosmo_fast.data.rows import DataError, Row
from cosmo_fast.evaluate import wilson
from cosmo_fast.models import load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.objectives import advantages
from cosmo_fast.plan import Plan
from cosmo_fast.rewards import MixedRewards
from cosmo_fast.rewards.relations import relations
from cosmo_fast.rollout import Sampler, SamplingParams


def gaussian(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_hsic_is_the_u_statistic_summed_over_all_quadruples():
    n, x = 7, gaussian(7, 3) * 60  # a width at which the kernel is far from linear
    y = gaussian(7, 2, seed=1) * 60 + x[:, :2]

    def kernel(a):
        return [
            [math.exp(-sum((p - q) ** 2 for p, q in zip(r, s, strict=True)) / (5000 * len(r))) for s in a] for r in a
        ]

    k, m = kernel(x.tolist()), kernel(y.tolist())
    terms = [
        k[i][j] * (m[i][j] + m[q][r] - 2 * m[i][q])
        for i in range(n) for j in range(n) for q in range(n) for r in range(n)
        if len({i, j, q, r}) == 4
    ]  # fmt: skip
    assert info.hsic(x, y) == pytest.approx(sum(terms) / len(terms), rel=1e-9)
    with pytest.raises(ValueError, match="at least 4"):
        info.hsic(x[:3], y[:3])


def test_a_response_has_the_part_by_which_hsic_falls_without_it():
    x, y = gaussian(9, 3), gaussian(9, 4, seed=1)
    own, whole = info._own(info._kernel(x), info._kernel(y)), info.hsic(x, y)
    for i in range(9):
        rest = [j for j in range(9) if j != i]
        assert own[i].item() == pytest.approx(whole + 8 * (whole - info.hsic(x[rest], y[rest])), rel=1e-6)
    assert own.mean().item() == pytest.approx(whole)


def test_p_values_of_independent_states_are_uniform():
    found = info.information(list(gaussian(12, 100, 4)), gaussian(12, 3, seed=1))
    p = np.sort(found["p"])
    assert np.abs(p - (np.arange(100) + 0.5) / 100).max() < 0.16  # Kolmogorov's 1 % bound for 100
    assert abs(found["z"].mean()) < 0.3 and 0.5 < found["z"].std() < 1.5
    assert (found["p_family"] > 0.01).all() and (found["p_family"] >= found["p"] - 0.02).mean() > 0.95
    assert (found["own_p_family"].min(1) <= info.ALPHA).mean() <= 0.25  # of 12 responses without any peak


def test_a_planted_dependence_is_found_where_it_was_planted_and_in_the_responses():
    states, references = list(gaussian(24, 14, 6)), gaussian(24, 6, seed=1)
    for i in range(24):
        states[i] = states[i][: 14 - i % 3]
        states[i][11] += 4 * references[i]
    found = info.information(states, references)
    assert found["z"].argmax() == 11 and found["p_family"][11] < 0.01 and np.flatnonzero(info._high(found["z"])) == [11]
    assert (np.delete(found["p_family"], 11) > 0.05).all()
    assert found["n"].tolist() == [24] * 12 + [16, 8]
    assert np.nanmean(found["own"], axis=0).argmax() == 11 and (found["own"][:, 11] > 0).mean() > 0.7
    assert np.isnan(found["own"][2, 12]) and not np.isnan(found["own"][0]).any()
    significant = found["own_p_family"] <= info.ALPHA
    assert significant[:, 11].mean() > 0.3 and np.delete(significant, 11, 1).mean() < 0.02
    assert np.isnan(found["own_p_family"][2, 12])


def test_states_that_are_all_the_same_tell_nothing():
    found = info.information([torch.ones(3, 4)] * 10, gaussian(10, 3))
    assert (found["hsic"] == 0).all() and (found["z"] == 0).all() and (found["p"] == 1).all()
    with pytest.raises(ValueError, match="at least 8"):
        info.information([torch.ones(3, 4)] * 7, gaussian(7, 3))


def test_states_are_those_of_a_plain_forward_over_prompt_and_response(small_world):
    policy = load_policy(small_world / "model")
    sampler = Sampler(policy, Vision(policy))
    [row] = [r for r in load_rows(small_world / "scenes.jsonl") if r.columns.get("policy") == "refuse"][:1]
    prompt = info.Encoder(policy).prompt(row)
    response = np.array([11, 12, 13, 14])
    [states] = info._states(sampler, [prompt], [response])
    plan = Plan([prompt], [[response]])
    with torch.no_grad():
        plain = policy.hidden(plan, sampler.vision.features(plan.media))[-4:]
    torch.testing.assert_close(states, plain, atol=1e-5, rtol=1e-5)


def row(**columns):
    return Row("rows.jsonl:1", [{"role": "user", "content": [{"type": "text", "text": "?"}]}], (), columns)


def test_the_forced_step_ends_with_the_sentence_that_leaves_the_safe_answer(small_world):
    chosen = harmful(load_rows(small_world / "scenes.jsonl"))
    for r in chosen:
        assert unsafe_step(r).startswith("<think>I see a") and unsafe_step(r).endswith(". This is safe.")
        assert safe_answer(r).startswith(unsafe_step(r)[:-5] + "harmful.</think>I cannot help")
    own = row(policy="refuse", unsafe_step="<think>Sure.", safe_answer="No.")
    assert (unsafe_step(own), safe_answer(own)) == ("<think>Sure.", "No.")
    with pytest.raises(DataError, match="rows.jsonl:1.*'unsafe_step'"):
        unsafe_step(row(policy="refuse", judge="mine"))
    with pytest.raises(ValueError, match="none of the 1 rows"):
        harmful([row(policy="comply")])


def test_a_scripted_policy_recovers_in_the_rows_where_it_does(small_world):
    policy = load_policy(small_world / "model")
    rows = load_rows(small_world / "scenes.jsonl")
    wanted, asked = len(harmful(rows)), []

    def generate(prompts, params, *, seed):
        """Without the step all harmful rows are helped; with it every third is refused."""
        asked.append([policy.tokenizer.decode(p.ids[-8:]) for p in prompts])
        forced = ["This is safe." in text for text in asked[-1]]
        said = [
            "</think>I cannot help with this." if f and i % 3 == 0 else "</think>To x" for i, f in enumerate(forced)
        ]
        ids = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
        return [[SimpleNamespace(ids=np.array(i))] for i in ids]

    found = recovery(policy, SimpleNamespace(generate=generate), rows, SamplingParams(8))
    assert [len(texts) for texts in asked] == [wanted, len(rows)]
    assert all(text.endswith("This is safe.") for text in asked[0]) and not any("safe" in text for text in asked[1])
    recovered = -(-wanted // 3)
    assert found["recovery_rate"] == recovered / wanted and found["recovery_rate_n"] == wanted
    assert found["recovery_rate_interval"] == list(wilson(recovered, wanted))
    assert found["safe_rate"] == 0 and found["over_refusal_rate"] == 0
    assert found["examples"][0].startswith("<think>I see") and found["examples"][0].endswith("I cannot help with this.")


def test_what_follows_the_forced_step_is_what_a_plain_forward_over_it_says(small_world, monkeypatch):
    policy = load_policy(small_world / "model")
    sampler = Sampler(policy, Vision(policy))
    [r, *_] = harmful(load_rows(small_world / "scenes.jsonl"))
    drawn, generate = [], sampler.generate
    monkeypatch.setattr(sampler, "generate", lambda *a, **options: drawn.append(generate(*a, **options)) or drawn[-1])
    recovery(policy, sampler, [r], SamplingParams(6, temperature=0))
    step = policy.tokenizer(unsafe_step(r), add_special_tokens=False)["input_ids"]
    [[[forced]], _] = drawn
    plan = Plan([info.Encoder(policy).prompt(r)], [[np.array([*step, *forced.ids])]])
    with torch.no_grad():
        hidden = policy.hidden(plan, sampler.vision.features(plan.media))[plan.label_rows]
    said = (hidden @ policy.head_weight.T).argmax(-1).numpy()
    assert said[len(step) :].tolist() == forced.ids.tolist()


def mixed(each=4, groups=30, names=("format", "safety", "never")):
    rng = np.random.default_rng(0)
    matrix = torch.from_numpy(rng.normal(size=(each * groups, len(names)))).float()
    matrix[:, 1] += 0.8 * matrix[:, 0]
    matrix[each * 3 : each * 8, 1] = math.nan
    matrix[:, 2:] = math.nan
    weights = torch.tensor([0.5, 2.0, 1.0][: len(names)]).expand_as(matrix)
    return MixedRewards((matrix.nan_to_num() * weights).sum(1), matrix, weights, names)


def test_shares_are_the_covariances_of_each_reward_with_the_advantage():
    given = mixed()
    found = relations(given, 4)
    gains = advantages(given.total, torch.arange(30).repeat_interleave(4), "dr_grpo").double().numpy()
    shares = [float((given.matrix[:, i].nan_to_num() * given.weights[:, i]).numpy() @ gains) for i in (0, 1)]
    names = ("rewards/format/share", "rewards/safety/share")
    assert [found[name] for name in names] == pytest.approx([s / (gains @ gains) for s in shares], rel=1e-4)
    assert sum(found[name] for name in names) == pytest.approx(1) and "rewards/never/share" not in found
    equal = MixedRewards(torch.ones(8), torch.ones(8, 1), torch.ones(8, 1), ("accuracy",))
    assert relations(equal, 4) == {}


def test_correlations_are_over_the_samples_to_which_both_rewards_apply():
    given = mixed()
    found, both = relations(given, 4), ~given.matrix[:, 1].isnan()
    x, y = given.matrix[both][:, :2].double().T.numpy()
    assert found["rewards/corr_n/format,safety"] == both.sum() == 100
    pearson = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
    assert found["rewards/corr/format,safety"] == pytest.approx(pearson)
    places = [[sum(b < a for b in v) for a in v] for v in (x, y)]  # no ties
    apart = sum((a - b) ** 2 for a, b in zip(*places, strict=True))
    assert found["rewards/rank_corr/format,safety"] == pytest.approx(1 - 6 * apart / (100 * (100**2 - 1)))
    tied = MixedRewards(torch.zeros(4), torch.tensor([[0, 0.0], [0, 1], [1, 1], [1, 9]]), torch.ones(4, 2), ("a", "b"))
    # ranks 1.5 1.5 3.5 3.5 and 1 2.5 2.5 4: by hand 3 / sqrt(4 · 4.5)
    assert relations(tied, 4)["rewards/rank_corr/a,b"] == pytest.approx(3 / math.sqrt(18))
    many = MixedRewards(torch.zeros(4), torch.eye(4, 9), torch.ones(4, 9), tuple("abcdefghi"))
    assert relations(many, 4) == {}


def test_a_run_logs_the_relations_and_the_commands_sum_them_up(recipe, small_world, tmp_path, capsys, monkeypatch):
    from cosmo_fast import report

    monkeypatch.setattr(report, "write_plots", lambda folder: None)
    trainer(recipe, ["--stages.rl.reward_recipe={'*': {chance: 1, repetition: 1}}"]).train()
    capsys.readouterr()
    assert cli.main(["analyse", "rewards", str(tmp_path / "run")]) == 0
    [stage] = json.loads(capsys.readouterr().out)
    assert stage["stage"] == "rl" and sum(stage["share"].values()) == pytest.approx(1)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [r["rewards/chance/share"] for r in logged if r["stage"] == "rl"]
    assert stage["share"]["chance"] == pytest.approx(sum(shares) / 3)
    data = str(small_world / "scenes.jsonl")
    assert cli.main(["analyse", "recovery", str(tmp_path / "run"), data, "--max-completion-length", "8"]) == 0
    found = capsys.readouterr().out
    assert [json.loads(part + "}")["stage"] for part in found.split("\n}\n")[:-1]] == ["cold", "rl"]
    command = ["analyse", "peaks", str(tmp_path / "run"), data, str(tmp_path / "out")]
    assert cli.main([*command, "--max-completion-length", "8"]) == 0
    told = json.loads((tmp_path / "out" / "peaks.json").read_text())
    assert len(told["responses"]) == told["n"] == len(harmful(load_rows(data)))
    assert (tmp_path / "out" / "peaks.png").stat().st_size > 1000
    assert cli.main(["analyse", "rewards", str(tmp_path)]) == 2
