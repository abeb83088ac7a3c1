"""Vision tokens pruned before and inside the language model: the same ones from the sampler to the gradient."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from test_families import spoken
from tiny import WITH_PICTURES, make_prompt, padded_logits, save_pictures, tiny_policy

from cosmo_fast import ops
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import DataError, single_row
from cosmo_fast.models import prune
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Plan
from cosmo_fast.pruning import VisionPrune
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.rollout.store import Store
from cosmo_fast.stages.packed import Group, passes

HALF = VisionPrune(selector="max_min", keep=0.5)
INSIDE = VisionPrune(selector="attention", keep=0.5, layer=1)


def pruned(prompt, setting):
    return replace(prompt, kept=prune.unchosen(setting, prompt.media))


def make_world(folder, family="qwen2_5_vl", setting=HALF, **text):
    """A policy, its unpruned and its pruned prompts: one picture, none, two of other sizes, one at the end."""
    policy, _ = tiny_policy(family=family, **text)
    square, portrait, wide = save_pictures(folder, ((112, 84), (56, 140), (140, 112)))
    pieces = [7, square, 8, 9], [10, 11], [7, portrait, 15, square, 16], [9, 8, wide]
    plain = [make_prompt(policy, p) for p in pieces]
    plain[-1] = replace(plain[-1], ids=plain[-1].ids[:-1])  # without the token behind the picture
    return policy, plain, [pruned(p, setting) for p in plain]


def sampled(policy, prompts, n=4, seed=5, length=12, **bounds):
    params = SamplingParams(length, temperature=1.5)
    return Sampler(policy, Vision(policy), **bounds).generate(prompts, params, num_generations=n, seed=seed)


def as_groups(prompts, completions):
    return [
        Group(p.reuse(c[0].kept), [x.ids for x in c], [np.ones(len(x.ids)) for x in c])
        for p, c in zip(prompts, completions, strict=True)
    ]


def logps_of(policy, groups, max_tokens=10_000):
    """Log-probs of every group's responses, one tensor a group, and the gradients of a weighted sum of them."""
    policy.model.zero_grad(set_to_none=True)
    found = {}
    for work in passes(policy, Vision(policy), groups, max_tokens):
        targets = torch.from_numpy(work.plan.targets)
        logp = (work.hidden @ policy.head_weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (logp * torch.linspace(1, 2, 97, dtype=logp.dtype)[targets]).sum().backward()
        parts = logp.detach().split([sum(map(len, g.responses)) for g in work.groups])
        for i, part in zip(work.indices, parts, strict=True):
            found.setdefault(i, []).append(part)
    grads = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    return [torch.cat(found[i]) for i in range(len(groups))], grads


def inside(family):
    """Pruning inside, where DeepStack's levels have all entered."""
    return INSIDE.model_copy(update={"layer": 2 if family == "qwen3_vl" else 1})


@pytest.mark.parametrize("family", WITH_PICTURES)
@pytest.mark.parametrize("where", ["before", "inside"])
def test_the_first_ratio_is_1_for_every_family(tmp_path, family, where):
    policy, _, prompts = make_world(tmp_path, family, HALF if where == "before" else inside(family))
    completions = sampled(policy, prompts)
    groups = as_groups(prompts, completions)
    assert [g.prompt.kept is None for g in groups] == [False, True, False, False]
    with torch.no_grad():
        for work in passes(policy, Vision(policy), groups, 10_000):
            targets = torch.from_numpy(work.plan.targets)
            ours, _ = ops.linear_logprobs(work.hidden, policy.head_weight, targets, temperature=1.5)
    old = np.concatenate([c.logps for group in completions for c in group])
    torch.testing.assert_close(ours, torch.from_numpy(old), rtol=0, atol=1e-5)


class Masked:
    """Dense attention over unpruned prompts in which nobody sees a dropped row in the layers from ``layer`` on."""

    def __init__(self, plan, dropped, layer):
        self.plan, self.dropped, self.layer = plan, dropped, layer

    def attend(self, layer, q, k, v, scale):
        n = len(q)
        owner = np.concatenate(
            [
                np.repeat(np.arange(len(self.plan.prompts)), self.plan.prompt_lengths),
                np.repeat(self.plan.response_prompt, self.plan.response_lengths),
            ]
        )
        response = np.concatenate([np.full(self.plan.prompt_tokens, -1), self.plan.sequence])
        seen = (owner[:, None] == owner) & ((response == -1) | (response[:, None] == response))
        seen &= np.tril(np.ones((n, n), dtype=bool))
        if layer >= self.layer:
            seen[:, self.dropped] = False
            seen[self.dropped, self.dropped] = True  # a dropped row's own output is read by nobody
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(~torch.from_numpy(seen), float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("family", WITH_PICTURES)
@pytest.mark.parametrize("where", ["before", "inside"])
def test_gradients_are_those_of_a_dense_model_that_masks_the_same_rows_at_the_same_positions(tmp_path, family, where):
    setting = HALF if where == "before" else inside(family)
    policy, plain, prompts = make_world(tmp_path, family, setting)
    groups = as_groups(prompts, sampled(policy, prompts))
    groups[-1].prompt = prompts[-1].keep(np.arange(1, 11))  # it loses its last row
    policy.model.double()
    logps, grads = logps_of(policy, groups)
    plan = Plan(plain, [g.responses for g in groups])
    starts, dropped, last = np.cumsum([0, *map(len, (p.ids for p in plain))]), [], []
    for start, group in zip(starts, groups, strict=False):
        prompt = group.prompt
        vision = np.concatenate([np.arange(m.offset, m.offset + m.rows) for m in prompt.media] or [np.zeros(0, int)])
        gone = np.setdiff1d(vision, vision[prompt.kept.rows] if prompt.kept else vision)
        dropped += (start + gone).tolist()
        last.append(start + np.setdiff1d(np.arange(len(prompt.ids)), gone)[-1])
    assert len(dropped) > 20 and last[-1] < starts[-1] - 1
    plan.label_rows[np.cumsum(plan.response_lengths) - plan.response_lengths] = np.array(last)[plan.response_prompt]
    policy.model.zero_grad(set_to_none=True)
    features = Vision(policy).features(plan.media)
    features.retain_grad()
    hidden = policy.hidden(plan, features, attention=Masked(plan, dropped, setting.layer))[plan.label_rows]
    targets = torch.from_numpy(plan.targets)
    wanted = (hidden @ policy.head_weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (wanted * torch.linspace(1, 2, 97, dtype=torch.double)[targets]).sum().backward()
    torch.testing.assert_close(torch.cat(logps), wanted.detach(), rtol=0, atol=1e-10)
    assert grads.keys() == {n for n, p in policy.model.named_parameters() if p.grad is not None}
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_dropped_rows_get_no_gradient_and_kept_rows_some(tmp_path, family):
    policy, _, prompts = make_world(tmp_path, family)
    [group] = as_groups(prompts[:1], sampled(policy, prompts[:1]))
    plan = Plan([group.prompt], [group.responses])
    features = Vision(policy).features(plan.media).detach().requires_grad_()
    policy.logprobs(plan, features)[0].sum().backward()
    zero = (features.grad == 0).all(1)
    assert np.flatnonzero(~zero).tolist() == group.prompt.kept.rows.tolist() and zero.sum() == 6


@pytest.mark.parametrize("setting", [HALF, INSIDE, VisionPrune(selector="random", keep=3)])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_prompt_keeps_the_same_rows_whatever_its_batch_mates(tmp_path, setting, frozen):
    policy, _, prompts = make_world(tmp_path, setting=setting)
    policy.freeze_vision_tower(frozen)
    together = [g[0].kept for g in sampled(policy, prompts)]
    backwards = [g[0].kept for g in sampled(policy, prompts[::-1])][::-1]
    alone = [sampled(policy, [p])[0][0].kept for p in prompts]
    small = [g[0].kept for g in sampled(policy, prompts, max_tokens=20, batch_size=4)]
    for other in (backwards, alone, small):
        assert [k and k.rows.tolist() for k in other] == [k and k.rows.tolist() for k in together]
        assert [k and k.hash for k in other] == [k and k.hash for k in together]
    whole = sampled(policy, prompts)
    assert all(c.kept is g[0].kept for g in whole for c in g)
    chosen = [p.reuse(k) for p, k in zip(prompts, together, strict=True)]  # and again, verbatim
    again = sampled(policy, chosen, max_tokens=20, batch_size=4)
    assert [c.ids.tolist() for g in again for c in g] == [c.ids.tolist() for g in whole for c in g]


def test_a_choice_that_a_prompt_brings_stays_beside_prompts_that_wait_for_theirs(tmp_path):
    policy, _, prompts = make_world(tmp_path)
    brought = prompts[0].keep(np.arange(6))
    [[first], [last]] = sampled(policy, [brought, prompts[-1]], n=1)
    assert first.kept is brought.kept and last.kept.rows.tolist() != [] and (last.kept.hash != first.kept.hash)


@pytest.mark.parametrize("selector", ["attention", "key_norm"])
def test_a_matrix_product_whose_rounding_depends_on_its_rows_changes_no_choice(tmp_path, selector, monkeypatch):
    policy, _, prompts = make_world(tmp_path, setting=VisionPrune(selector=selector, keep=0.5))
    projection = policy.model.get_decoder().layers[0].self_attn.k_proj
    call = projection.forward
    monkeypatch.setattr(projection, "forward", lambda x: call(x) * (1 + x.shape[-2] % 7 * call(x).sin()))
    rows = []
    for some in ([0], [0, 1, 2], [0, 3], [2, 0]):
        plan = Plan([prompts[i] for i in some])
        prune.choose(policy, plan, Vision(policy).features(plan.media, alone=True))
        rows.append(plan.prompts[some.index(0)].kept.rows.tolist())
    assert rows.count(rows[0]) == 4, rows


def test_features_encoded_beside_others_are_not_taken_for_those_of_a_picture_alone(tmp_path, monkeypatch):
    policy, plain, _ = make_world(tmp_path)
    policy.freeze_vision_tower(True)
    media, vision, run = [plain[0].media[0], plain[3].media[0]], Vision(policy), Vision._run
    monkeypatch.setattr(Vision, "_run", lambda self, some: run(self, some) + len(some))  # a product's last bits do so
    alone = Vision(policy).features(media, alone=True)
    together = vision.features(media)
    assert not torch.equal(alone, together) and torch.equal(vision.features(media), together)
    assert torch.equal(vision.features(media, alone=True), alone)
    assert torch.equal(vision.features(media), alone)  # what was chosen from is what is trained on


@pytest.mark.parametrize("setting", [HALF, INSIDE])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_is_alone_and_two_phases_are_one(tmp_path, setting, checkpointing):
    policy, _, prompts = make_world(tmp_path, setting=setting)
    groups = as_groups(prompts, sampled(policy, prompts, n=6))
    policy.model.double()
    whole, grads = logps_of(policy, groups)
    if checkpointing:
        policy.checkpoint_gradients()
    for i, group in enumerate(groups):
        torch.testing.assert_close(logps_of(policy, [group])[0][0], whole[i], rtol=0, atol=1e-12)
    longest = max(g.prompt.length + max(map(len, g.responses)) for g in groups)
    parts, found = logps_of(policy, groups, longest)
    torch.testing.assert_close(torch.cat(parts), torch.cat(whole), rtol=0, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", WITH_PICTURES)
def test_keep_1_is_no_pruning_bit_for_bit(tmp_path, family):
    for setting in (VisionPrune(selector="uniform", keep=1.0), inside(family).model_copy(update={"keep": 1.0})):
        policy, plain, prompts = make_world(tmp_path, family, setting)
        params = SamplingParams(12, temperature=0)
        # A picture encoded beside others may differ in its last bits: every sampler here sees them one by one.
        greedy = [
            [Sampler(policy, Vision(policy)).generate([p], params)[0][0].ids.tolist() for p in some]
            for some in (plain, prompts)
        ]
        assert greedy[0] == greedy[1]
        groups = as_groups(prompts, sampled(policy, prompts))
        bare = [replace(g, prompt=p) for g, p in zip(groups, plain, strict=True)]
        assert all(g.prompt.kept is None or g.prompt.dropped == 0 for g in groups)
        (with_rows, one), (without, other) = logps_of(policy, groups), logps_of(policy, bare)
        assert torch.equal(torch.cat(with_rows), torch.cat(without))
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_an_image_that_is_pruned_while_supervised_has_its_rows_chosen_from_the_pass_itself(tmp_path):
    policy, _, prompts = make_world(tmp_path)
    answers = [[np.array([11, 12, 13]), np.array([14])] for _ in prompts]
    groups = [Group(p, a, [np.ones(3), np.ones(1)]) for p, a in zip(prompts, answers, strict=True)]
    [work] = passes(policy, Vision(policy), groups, 10_000)
    chosen = [p.kept and p.kept.rows.tolist() for p in work.plan.prompts]
    assert chosen == [g[0].kept and g[0].kept.rows.tolist() for g in sampled(policy, prompts)]
    split, _ = logps_of(policy, groups, max(p.length for p in prompts) + 3)
    torch.testing.assert_close(torch.cat(split), torch.cat(logps_of(policy, groups)[0]), rtol=0, atol=1e-4)


def test_a_sample_whose_rows_were_changed_or_made_under_another_setting_is_refused(tmp_path):
    policy, plain, prompts = make_world(tmp_path)
    completions = sampled(policy, prompts)
    kept = completions[0][0].kept
    shifted = replace(kept, rows=np.setdiff1d(np.arange(12), kept.rows))
    with pytest.raises(ValueError, match=rf"test: the kept vision rows have hash .*, the sample says {kept.hash}"):
        prompts[0].reuse(shifted)
    group = as_groups(prompts, completions)[0]
    group.prompt = replace(group.prompt, kept=shifted)
    with pytest.raises(ValueError, match="it would be trained on other rows than it was sampled with"):
        next(passes(policy, Vision(policy), [group], 10_000))
    for other in (HALF.model_copy(update={"keep": 0.25}), VisionPrune(selector="uniform", keep=0.5)):
        with pytest.raises(ValueError, match=r"selector='max_min', keep=0\.5.*here it is.*keep="):
            pruned(plain[0], other).reuse(kept)
    with pytest.raises(ValueError, match=r"version 0; here it is .* version 1"):
        prompts[0].reuse(replace(kept, version=0))
    with pytest.raises(ValueError, match="here it is none"):
        plain[0].reuse(kept)


def test_keys_and_values_are_fewer_from_the_layer_on(tmp_path, monkeypatch):
    rows, made = {}, []
    begin = Store.__init__
    monkeypatch.setattr(Store, "__init__", lambda self, *a: made.append(self) or begin(self, *a))
    for name, setting in (("none", None), ("before", HALF), ("inside", INSIDE)):
        policy, plain, prompts = make_world(tmp_path, setting=setting)
        sampled(policy, prompts, n=2)
        rows[name] = [len(k) for k in made[-1].keys]
    fewer = sum(p.vision_rows - prune.unchosen(HALF, p.media).count for p in plain if p.media)
    assert rows["before"] == [n - fewer for n in rows["none"]] and rows["inside"] == [
        rows["none"][0],
        rows["before"][1],
    ]
    wide = Sampler(policy, Vision(policy), kv_cache_mib=1)
    length = 4096 // 8 - 20
    wide.generate(prompts[:1], SamplingParams(length), num_generations=8)
    with pytest.raises(ValueError, match="kv_cache_mib=1"):
        wide.generate(plain[:1], SamplingParams(length + 18), num_generations=8)


@pytest.mark.parametrize("family", WITH_PICTURES)
@pytest.mark.parametrize("selector", ["attention", "key_norm"])
def test_rows_are_chosen_by_the_attention_and_the_keys_that_transformers_has(tmp_path, family, selector, monkeypatch):
    layers, given = (0, 2 if family == "qwen3_vl" else 1), []
    call = ops.vision_prune
    monkeypatch.setattr(ops, "vision_prune", lambda *a, **k: given.append(k) or call(*a, **k))
    policy, plain = tiny_policy(family=family)
    square, portrait = save_pictures(tmp_path, ((112, 84), (56, 140)))
    prompt = make_prompt(policy, [7, square, 8, 9, portrait, 10])
    plain.set_attn_implementation("eager")
    seen = []
    forward = plain.get_decoder().forward
    plain.get_decoder().forward = lambda **k: (
        seen.append(forward(**k | {"output_attentions": True, "use_cache": True})) or seen[-1]
    )
    padded_logits(plain, policy, prompt, np.array([11]))
    counts = [m.rows for m in prompt.media]
    vision = np.concatenate([np.arange(m.offset, m.offset + m.rows) for m in prompt.media])
    for layer in layers:
        setting = VisionPrune(selector=selector, keep=0.5, layer=layer)
        [[sample]] = sampled(policy, [pruned(prompt, setting)], n=1)
        keys = seen[0].past_key_values.layers[layer].keys[0].transpose(0, 1)
        torch.testing.assert_close(given[-1]["key"], keys[vision], rtol=1e-4, atol=1e-4)
        if selector == "attention":
            weights = seen[0].attentions[layer][0][:, :-1].sum(0)
            texts = [np.setdiff1d(np.arange(m.offset + m.rows, len(prompt.ids)), vision) for m in prompt.media]
            want = [
                weights[t][:, m.offset : m.offset + m.rows].sum(0) for t, m in zip(texts, prompt.media, strict=True)
            ]
            rows = [w.argsort(descending=True)[: len(w) // 2].sort().values for w in want]
            wanted = torch.cat([rows[0], rows[1] + counts[0]]).tolist()
            assert sample.kept.rows.tolist() == wanted


def test_a_model_that_cannot_be_pruned_so_is_refused():
    with pytest.raises(ValueError, match="a 'qwen2' model takes no pictures; leave vision_prune out"):
        Encoder(spoken("qwen2")[0], vision_prune=HALF)
    with pytest.raises(ValueError, match=r"layer=2: the language model has the layers 0 to 1"):
        Encoder(spoken("qwen2_vl")[0], vision_prune=inside("qwen3_vl"))
    with pytest.raises(ValueError, match=r"layer=1: features of 2 depths enter .* set 0, or 2 or above"):
        Encoder(spoken("qwen3_vl")[0], vision_prune=INSIDE)


def test_a_clip_is_the_pictures_of_one_grid_and_anything_else_is_refused(tmp_path):
    policy, _ = spoken("qwen2_5_vl")
    frames = save_pictures(tmp_path, [(84, 56)] * 3 + [(56, 84)])
    setting = VisionPrune(selector="frame_difference", keep=0.5)
    encoder = Encoder(policy, vision_prune=setting)
    prompt = encoder.prompt(single_row("what is this", frames[:3]))
    [[sample]] = sampled(policy, [prompt], n=1)
    assert prompt.kept.count == len(sample.kept.rows) == 9 and (sample.kept.rows < 6).sum() == 5
    for some in (frames[:1], frames[2:]):
        with pytest.raises(DataError, match="the frames of a clip, at least two of one grid"):
            encoder.prompt(single_row("what is this", some))


@pytest.mark.parametrize("selector", get_args(VisionPrune.model_fields["selector"].annotation))
@pytest.mark.parametrize("budget", [dict(keep=0.25), dict(keep=5), dict(keep=5, per_prompt=True)])
def test_every_selector_keeps_what_was_planned(tmp_path, selector, budget):
    if selector == "frame_difference" and "per_prompt" in budget:
        return
    policy, _ = tiny_policy()
    pictures = save_pictures(tmp_path, ((112, 84), (112, 84)))
    plain = make_prompt(policy, [7, pictures[0], 8, pictures[1], 9])
    prompt = pruned(plain, VisionPrune(selector=selector, **budget))
    [[a, b]] = sampled(policy, [prompt], n=2)
    assert a.kept is b.kept and len(a.kept.rows) == prompt.kept.count == a.kept.count
    assert (np.diff(a.kept.rows) > 0).all() and a.kept.rows.max() < 24
    wanted = {0.25: 6, 5: 5 if "per_prompt" in budget or selector == "frame_difference" else 10}
    assert prompt.kept.count == wanted[budget["keep"]]
