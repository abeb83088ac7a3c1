"""bf16 with fp32 masters, and gradient checkpointing, on the packed path."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from short_run import whole_and_resumed
from tiny import make_prompt, padded_logps, save_pictures, tiny_policy
from torch import nn

from cosmo_fast.models import load_policy
from cosmo_fast.models.adapter import add_adapter
from cosmo_fast.models.vision import Vision
from cosmo_fast.optimizer import AdamW
from cosmo_fast.plan import Plan

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.01}


def groups(policy, folder, count=2):
    paths = save_pictures(folder)
    rng = np.random.default_rng(0)
    prompts = [make_prompt(policy, [7, paths[i % 3], 8, 9 + i]) for i in range(count)]
    return prompts, [[rng.integers(7, 97, 3 + i), rng.integers(7, 97, 6)] for i in range(count)]


def logps(policy, prompts, responses):
    plan = Plan(prompts, responses)
    return policy.logprobs(plan, Vision(policy).features(plan.media))[0]


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llama"])
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointed_gradients_are_bitwise_those_without_from_fewer_saved_bytes(tmp_path, family, lora):
    results = []
    for checkpointed in (False, True):
        policy, _ = tiny_policy(family=family, attention_dropout=0.5)
        paths = save_pictures(tmp_path) if policy.image_processor is not None else [7, 8]
        prompts = [make_prompt(policy, [7, paths[0], 8, 9]), make_prompt(policy, [7, paths[1], 8])]
        rng = np.random.default_rng(0)
        responses = [[rng.integers(7, 97, 9), rng.integers(7, 97, 5)], [rng.integers(7, 97, 7)]]
        if lora:
            add_adapter(policy, r=2)
        if checkpointed:
            policy.checkpoint_gradients()
        calls, saved = [], []
        layer = policy.model.get_decoder().layers[0]
        layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t):
            loss = logps(policy, prompts, responses).sum()
        loss.backward()
        results.append((len(calls), sum(saved), gradients(policy), loss.detach()))
    (once, all_bytes, plain, loss), (twice, fewer, again, same) = results
    assert (once, twice) == (1, 2), "the layer is computed again, by the plan, in the backward"
    assert fewer < 0.5 * all_bytes and torch.equal(loss, same), "dropout stays off"
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


def test_updates_that_bf16_would_lose_add_up_in_the_master():
    model, exact, lossy = nn.ModuleDict({"w": nn.Linear(8, 4)}), nn.Linear(8, 4), nn.Linear(8, 4)
    with torch.no_grad():
        model["w"].weight.fill_(1), exact.weight.fill_(1), lossy.weight.fill_(1)
    model.bfloat16(), lossy.bfloat16()
    ours = AdamW(((n, p) for n, p in model.named_parameters() if p.dim() > 1), **SETTINGS)
    fp32, bf16 = (torch.optim.AdamW([m.weight], **SETTINGS) for m in (exact, lossy))
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        grad = 1 + 0.1 * torch.randn(4, 8, generator=generator).bfloat16()
        for module, optimizer in ((model["w"], ours), (exact, fp32), (lossy, bf16)):
            optimizer.zero_grad()
            (module.weight * grad.to(module.weight.dtype)).sum().backward()
            optimizer.step()
    [(parameter, master)] = ours.masters
    torch.testing.assert_close(master.detach(), exact.weight.detach(), rtol=0, atol=1e-7)
    assert torch.equal(parameter.detach(), master.detach().bfloat16()) and (parameter < 1).all()
    assert (lossy.weight == 1).all(), "an update of 1e-4 is below half an ulp of 1 in bf16"
    assert parameter.grad is None


def test_micro_batches_in_bf16_add_no_error_to_that_of_one(tmp_path):
    """Against fp32 on the same rounded weights; bf16 sums are what PyTorch would keep."""
    count, errors = 12, {}
    policy, _ = tiny_policy()
    prompts, responses = groups(policy, tmp_path, count)
    for parameter in policy.model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    logps(policy, prompts, responses).sum().backward()
    truth = gradients(policy)
    for case, parts in (("one", 1), ("many", count), ("bf16 sums", count)):
        policy.model.zero_grad()
        policy.model.bfloat16()
        optimizer = AdamW(policy.model.named_parameters(), **SETTINGS) if case != "bf16 sums" else None
        size = count // parts
        for i in range(0, count, size):
            logps(policy, prompts[i : i + size], responses[i : i + size]).sum().backward()
        if optimizer:
            assert all(p.grad is None for p in policy.model.parameters())
            found = {optimizer.names[master]: master.grad for _, master in optimizer.masters}
            optimizer.release()
        else:
            found = gradients(policy)
        error = sum((found[n].double() - truth[n].double()).square().sum() for n in truth if found[n] is not None)
        errors[case] = float(error.sqrt())
    assert errors["many"] <= 1.05 * errors["one"] and errors["many"] < errors["bf16 sums"], errors


def test_the_bf16_packed_path_is_no_further_from_fp32_than_transformers_in_bf16(tmp_path):
    policy, plain = tiny_policy()
    prompts, responses = groups(policy, tmp_path, 6)
    for parameter in (*policy.model.parameters(), *plain.parameters()):
        parameter.data.copy_(parameter.data.bfloat16())
    with torch.no_grad():
        truth = logps(policy, prompts, responses)
        policy.model.bfloat16(), plain.bfloat16()
        ours = logps(policy, prompts, responses)
        pairs = [(p, r) for p, group in zip(prompts, responses, strict=True) for r in group]
        theirs = torch.cat([padded_logps(plain, policy, p, r).float() for p, r in pairs])
    assert (ours.float() - truth).norm() <= 1.25 * (theirs - truth).norm()


def test_a_loaded_optimizer_goes_on_bitwise():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)).bfloat16()

    def step(module, optimizer, seed):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)).bfloat16()
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()

    whole = model()
    optimizer = AdamW(whole.named_parameters(), **SETTINGS)
    for seed in range(3):
        step(whole, optimizer, seed)
    saved = {name: value.clone() for name, value in optimizer.tensors().items()}
    resumed = model()
    again = AdamW(resumed.named_parameters(), **SETTINGS)
    again.load_tensors(saved)
    for module, one in ((whole, optimizer), (resumed, again)):
        step(module, one, 3)
    ours, theirs = optimizer.tensors(), again.tensors()
    assert {"master/0.weight", "exp_avg/1.bias", "step/0.bias"} <= ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_bf16_run_resumes_bitwise_with_its_masters_and_is_loaded_in_bf16(recipe, tmp_path, monkeypatch):
    whole, _, rows = whole_and_resumed(recipe, ["--dtype=bfloat16", "--stages.rl.beta=0.05"], tmp_path, monkeypatch)
    states = [load_file(tmp_path / name / "checkpoint-5" / "optimizer.safetensors") for name in ("whole", "cut")]
    masters = [name for name in states[0] if name.startswith("master/")]
    assert masters and all(states[0][name].dtype == torch.float32 for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    weights = dict(load_policy(tmp_path / "cut").model.named_parameters())
    assert all(torch.equal(weights[n.removeprefix("master/")], states[0][n].bfloat16()) for n in masters)
    assert all(abs(row["rollout/kl"]) < 0.01 for row in rows if "rollout/kl" in row)
    assert whole.policy.model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32
